"""Continuous batching, iteration by iteration, of many independent instances at once.

Each instance has a clock of its own and a queue, first come first served. As vLLM schedules: at the start of an
iteration the sequences that decode take a token each of the iteration's token budget, then the prompt that was cut off
goes on, then waiting requests are admitted while `max_num_seqs`, the KV cache and the budget allow; a prompt that does
not fit the budget is cut (chunked prefill). The iteration takes the decode law's time at the real batch and the real
contexts plus the prefill law's time of the chunks in it. Every decoding sequence gains a token, and so does every
sequence whose prompt is done. Where the cache then overflows, the newest sequences are preempted: they lose their
cache, go back to the head of the queue, and later prefill their prompt and what they had generated again. The oldest
sequence is never preempted while another is there, and alone it fits (longer requests are refused at the door), so some
sequence always advances: no livelock.

One `advance` does a small step for every instance whose clock has not reached its limit: it admits at most one request
and, if no other can be admitted now, runs one iteration, or idles to the next arrival. So instances that admit do not
hold up those that decode. Shapes: G replications of N instances make I = G N instances with S slots each; requests are
numbered over all replications and lists of them are linked through `Queues.next`. Times in float64.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.struct import pytree, static
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.decode import batch_step_s
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.laws.power import gpu_power_w
from fleetopt_jax.laws.prefill import prefill_s

N_GAPS = 2048  # bins of the inter-token times, even in their logarithm
GAP_RANGE_S = (1e-5, 1e3)  # 0.9 % a bin
NEVER = jnp.inf


@pytree
class Scheduler:
    """What bounds an instance's batch. Leaves traced, shape ()."""

    max_num_seqs: Array  # sequences at once [-]
    n_blocks: Array  # KV blocks; inf where slots reserve their windows and `max_num_seqs` is the bound [-]
    fixed_tokens: Array  # KV tokens a sequence holds besides its context [tokens]
    window_s: Array  # [G, 2]: from when to when statistics are taken [s]
    chunks_are_free: bool = static(default=False)  # prompts take ceil(p / chunk) iterations and no time, as published


@pytree
class Queues:
    """Requests, shape [Q + 1]: the last entry stands for nobody. What is left to do changes with preemption."""

    arrival_s: Array  # at the pool [s]; inf for nobody
    prompt_tokens: Array  # to prefill before the next output token [tokens]
    output_tokens: Array  # still to generate [tokens]
    next: Array  # who waits behind it
    admit_s: Array  # first admission; inf before [s]
    first_s: Array  # first token [s]
    last_s: Array  # newest token known here, at preemption or at the end [s]


@pytree
class Slots:
    """Sequences in flight, shape [I, S]. A slot is free where `left` is 0; it keeps its request until reused."""

    request: Array
    left: Array  # output tokens still to generate
    context: Array  # tokens the sequence keeps in the cache
    phase: Array  # iterations of prefill left, this one included (if not free, 2 until the last); 0 decodes
    turn: Array  # order of admission
    first_s: Array  # first token; inf before [s]
    last_s: Array  # last token, of a sequence that has ended or was preempted; inf before [s]


@pytree
class Instances:
    """Scheduler state, shape [I]."""

    clock_s: Array  # start of the next iteration [s]
    head: Array  # first in the queue
    tail: Array  # last in the queue; without meaning where nobody waits
    n_waiting: Array
    n_running: Array
    n_decoding: Array
    tokens: Array  # summed context of the decoding
    windowed_tokens: Array  # the same, each cut to the sliding window
    n_blocks: Array  # KV blocks in use
    prompt_left: Array  # of the one prompt that was cut off
    prompt_done: Array  # of it
    prompt_slot: Array  # where it is
    scheduled_tokens: Array  # prompt tokens in the next iteration
    scheduled_s: Array  # their time [s]
    n_turns: Array
    just_finished: Array  # sequences that ended with the last iteration


class Tally(NamedTuple):
    """Sums over an instance's iterations, shape [I]; in the window unless `path_` is in the name."""

    gpu_j: Array  # energy of one GPU [J]
    tokens: Array  # generated
    in_flight_s: Array  # sequences in flight, times seconds
    blocks_s: Array  # KV blocks in use, times seconds
    prefill_s: Array
    busy_s: Array
    gaps: Array  # inter-token times seen
    gaps_s: Array  # their sum [s]
    path_in_flight_s: Array  # over the whole run
    path_in_system_s: Array  # the waiting with them
    path_iterations: Array
    preemptions: Array


@pytree
class State:
    queues: Queues
    slots: Slots
    instances: Instances
    tally: Tally
    gap_counts: Array  # [G, N_GAPS]
    cramped: Array  # whether the S slots, not the scheduler, ever refused a request


def empty_state(queues: Queues, n_groups: int, n_instances: int, n_slots: int) -> State:
    """Everybody is still to come."""
    n, nobody = n_groups * n_instances, queues.arrival_s.shape[0] - 1
    zero = jnp.zeros(n, jnp.int32)
    slots = jnp.zeros((n, n_slots), jnp.int32)
    return State(
        queues=queues,
        slots=Slots(
            request=jnp.full_like(slots, nobody),
            left=slots,
            context=slots,
            phase=slots,
            turn=slots,
            first_s=jnp.full(slots.shape, NEVER),
            last_s=jnp.full(slots.shape, NEVER),
        ),
        instances=Instances(
            clock_s=jnp.zeros(n),
            head=jnp.full_like(zero, nobody),
            tail=jnp.full_like(zero, nobody),
            n_waiting=zero,
            n_running=zero,
            n_decoding=zero,
            tokens=zero.astype(int),
            windowed_tokens=zero.astype(int),
            n_blocks=zero,
            prompt_left=zero,
            prompt_done=zero,
            prompt_slot=zero,
            scheduled_tokens=zero,
            scheduled_s=jnp.zeros(n),
            n_turns=zero,
            just_finished=zero,
        ),
        tally=Tally(*(jnp.zeros(n) for _ in Tally._fields)),
        gap_counts=jnp.zeros((n_groups, N_GAPS)),
        cramped=jnp.zeros((), bool),
    )


def run_until(state: State, engine: Engine, scheduler: Scheduler, until_s: Array) -> State:
    """Every instance, up to the first iteration that ends at `until_s` [I] or later; idle ones to `until_s`."""

    def behind(state: State) -> Array:
        return jnp.any(state.instances.clock_s < until_s)

    return jax.lax.while_loop(behind, lambda state: advance(state, engine, scheduler, until_s), state)


def advance(state: State, engine: Engine, scheduler: Scheduler, until_s: Array) -> State:
    """One admission, or one iteration, or a pause, of every instance whose clock is before `until_s` [I]."""
    active = state.instances.clock_s < until_s
    state, more = _admit(state, engine, scheduler, active)
    runs = active & ~more & (state.instances.n_running > 0)
    state = _pause(state, engine, scheduler, active & ~more & ~runs, until_s)
    state = _iterate(state, engine, scheduler, runs)
    if scheduler.chunks_are_free:
        return state  # slots are reserved: the cache cannot overflow
    return jax.lax.while_loop(
        lambda state: jnp.any(state.instances.n_blocks > scheduler.n_blocks),
        lambda state: _preempt(state, engine, scheduler),
        state,
    )


def blocks_of(scheduler: Scheduler, tokens: Array) -> Array:
    """KV blocks of a sequence of `tokens`, in whole."""
    return jnp.ceil((tokens + scheduler.fixed_tokens) / BLOCK_TOKENS).astype(jnp.int32)


def gap_bin(gap_s: Array) -> Array:
    """Where an inter-token time is counted."""
    low, high = jnp.log(GAP_RANGE_S[0]), jnp.log(GAP_RANGE_S[1])
    place = (jnp.log(jnp.maximum(gap_s, GAP_RANGE_S[0])) - low) / (high - low)
    return jnp.clip(place * N_GAPS, 0, N_GAPS - 1).astype(jnp.int32)


def finished(state: State) -> Queues:
    """The requests, with the times that still stand in the slots."""
    slots = state.slots
    return _leave(state.queues, slots.request.ravel(), slots.first_s.ravel(), slots.last_s.ravel())


def _leave(queues: Queues, request: Array, first_s: Array, last_s: Array) -> Queues:
    """`queues` with the times of requests that give up their slots."""
    return replace(
        queues, first_s=queues.first_s.at[request].set(first_s), last_s=queues.last_s.at[request].set(last_s)
    )


def _budget(engine: Engine, scheduler: Scheduler, instances: Instances) -> Array:
    """Prompt tokens the next iteration can still take; at least one in all even beside the fullest batch."""
    if scheduler.chunks_are_free:
        return jnp.full_like(instances.n_decoding, jnp.iinfo(jnp.int32).max)
    budget = engine.prefill.budget_tokens.astype(jnp.int32) - instances.n_decoding
    return jnp.maximum(budget, 1) - instances.scheduled_tokens


def _admissible(state: State, engine: Engine, scheduler: Scheduler) -> Array:
    """Whether the scheduler takes the head of each queue now."""
    queues, instances = state.queues, state.instances
    fits = instances.n_blocks + blocks_of(scheduler, queues.prompt_tokens[instances.head] + 1) <= scheduler.n_blocks
    takes = fits & (instances.n_running < scheduler.max_num_seqs) & (instances.prompt_left == 0)
    here = queues.arrival_s[instances.head] <= instances.clock_s
    return here & takes & (_budget(engine, scheduler, instances) > 0)


def _admit(state: State, engine: Engine, scheduler: Scheduler, active: Array) -> tuple[State, Array]:
    """Take the head of each queue that can be taken; and whether the next can be taken too."""
    queues, slots, instances = state.queues, state.slots, state.instances
    n_slots, nobody = slots.left.shape[1], queues.next.shape[0] - 1
    takes = active & _admissible(state, engine, scheduler)
    cramped = jnp.any(takes & (instances.n_running >= n_slots))
    takes &= instances.n_running < n_slots
    index = jnp.arange(n_slots, dtype=jnp.int32)
    slot = jnp.min(jnp.where(slots.left == 0, index, n_slots - 1), axis=1)
    place = jnp.arange(len(slot)), slot
    request = jnp.where(takes, instances.head, nobody)
    prompt = queues.prompt_tokens[request]

    # The request that had the slot leaves its times; the new one brings what it had before a preemption.
    leaver = jnp.where(takes, slots.request[place], nobody)
    queues = _leave(queues, leaver, slots.first_s[place], slots.last_s[place])
    queues = replace(queues, admit_s=queues.admit_s.at[request].min(instances.clock_s))
    free = scheduler.chunks_are_free  # then a prompt counts in the batch from its first chunk
    if free:
        chunk, chunk_s = prompt, jnp.zeros_like(instances.clock_s)
        phase = jnp.ceil(prompt / engine.prefill.chunk_tokens).astype(jnp.int32)
    else:
        chunk = jnp.minimum(prompt, _budget(engine, scheduler, instances))
        chunk_s = prefill_s(engine.prefill, chunk.astype(float))
        phase = jnp.where(chunk == prompt, 1, 2).astype(jnp.int32)
    here = takes[:, None] & (index == slot[:, None])

    def put(values: Array, new: Array) -> Array:
        return jnp.where(here, new[:, None], values)

    slots = Slots(
        request=put(slots.request, request),
        left=put(slots.left, queues.output_tokens[request]),
        context=put(slots.context, prompt),
        phase=put(slots.phase, phase),
        turn=put(slots.turn, instances.n_turns),
        first_s=put(slots.first_s, queues.first_s[request]),
        last_s=put(slots.last_s, queues.last_s[request]),
    )
    cut = takes & (chunk < prompt)
    counted = takes & free
    instances = replace(
        instances,
        head=jnp.where(takes, queues.next[instances.head], instances.head),
        n_waiting=instances.n_waiting - takes,
        n_running=instances.n_running + takes,
        n_decoding=instances.n_decoding + counted,
        tokens=instances.tokens + jnp.where(counted, prompt, 0),
        windowed_tokens=instances.windowed_tokens + jnp.where(counted, _cut(engine, prompt), 0),
        n_blocks=instances.n_blocks + jnp.where(takes, blocks_of(scheduler, prompt), 0),
        prompt_left=jnp.where(cut, prompt - chunk, instances.prompt_left),
        prompt_done=jnp.where(cut, chunk, instances.prompt_done),
        prompt_slot=jnp.where(cut, slot, instances.prompt_slot),
        scheduled_tokens=instances.scheduled_tokens + jnp.where(takes, chunk, 0),
        scheduled_s=instances.scheduled_s + jnp.where(takes, chunk_s, 0.0),
        n_turns=instances.n_turns + takes,
    )
    state = replace(state, queues=queues, slots=slots, instances=instances, cramped=state.cramped | cramped)
    return state, _admissible(state, engine, scheduler) & (instances.n_running < n_slots)


def _cut(engine: Engine, tokens: Array) -> Array:
    """Contexts as the layers with a sliding window see them."""
    return jnp.minimum(tokens, engine.decode.window_tokens.astype(tokens.dtype))


def _iterate(state: State, engine: Engine, scheduler: Scheduler, runs: Array) -> State:
    """One iteration of the instances that run."""
    slots, instances = state.slots, state.instances
    decode_s = batch_step_s(engine.decode, instances.n_decoding, instances.tokens, instances.windowed_tokens)
    took_s = decode_s + instances.scheduled_s
    end_s = instances.clock_s + took_s

    emits = runs[:, None] & (slots.left > 0) & (slots.phase <= 1)
    first = emits & jnp.isinf(slots.first_s)
    again = emits & ~first & (slots.phase == 1)  # the first token after a preemption
    left, context = slots.left - emits, slots.context + emits
    ended, there = emits & (left == 0), left > 0
    if scheduler.chunks_are_free:
        phase = jnp.where(runs[:, None], jnp.maximum(slots.phase - 1, 0), slots.phase)
        decodes = there
    else:
        phase = jnp.where(emits, 0, slots.phase)
        decodes = there & (phase == 0)
    n_decoding, n_ended, n_emitted, n_gaps = map(_count, (decodes, ended, emits, emits & ~first & ~again))

    # The prompt that was cut off goes on with its next chunk.
    budget = jnp.maximum(engine.prefill.budget_tokens.astype(jnp.int32) - n_decoding, 1)
    chunk = jnp.minimum(instances.prompt_left, budget)
    done = instances.prompt_done + chunk
    chunk_s = prefill_s(engine.prefill, done.astype(float)) - prefill_s(
        engine.prefill, instances.prompt_done.astype(float)
    )
    completes = runs & (instances.prompt_left > 0) & (chunk == instances.prompt_left)
    index = jnp.arange(left.shape[1], dtype=jnp.int32)
    phase = jnp.where(completes[:, None] & (index == instances.prompt_slot[:, None]), 1, phase)

    inside = jnp.where(runs, _inside(scheduler, instances.clock_s, end_s) / took_s, 0.0)  # share in the window
    stalled_s = jnp.where(again, end_s[:, None] - slots.last_s, 0.0)
    stalls = _count(again), jnp.sum(stalled_s, axis=1)
    tally = _tally_iteration(state.tally, engine, instances, runs, inside, decode_s, n_emitted, n_gaps, stalls)
    group = jnp.arange(len(runs)) // (len(runs) // len(state.gap_counts))
    gap_counts = state.gap_counts.at[group, gap_bin(took_s)].add(inside * n_gaps)
    gap_counts = jax.lax.cond(
        jnp.any(again),
        lambda: gap_counts.at[group[:, None], gap_bin(stalled_s)].add(jnp.where(again, inside[:, None], 0.0)),
        lambda: gap_counts,
    )

    def now(new: Array, old: Array) -> Array:
        return jnp.where(runs, new, old)

    return replace(
        state,
        slots=replace(
            slots,
            left=left,
            context=context,
            phase=phase,
            first_s=jnp.where(first, end_s[:, None], slots.first_s),
            last_s=jnp.where(ended, end_s[:, None], slots.last_s),
        ),
        instances=replace(
            instances,
            clock_s=now(end_s, instances.clock_s),
            n_running=instances.n_running - n_ended,
            n_decoding=now(n_decoding, instances.n_decoding),
            tokens=now(_sum(decodes, context), instances.tokens),
            windowed_tokens=now(_sum(decodes, _cut(engine, context)), instances.windowed_tokens),
            n_blocks=now(_sum(there, blocks_of(scheduler, context)).astype(jnp.int32), instances.n_blocks),
            prompt_left=now(instances.prompt_left - chunk, instances.prompt_left),
            prompt_done=now(done, instances.prompt_done),
            scheduled_tokens=now(chunk, instances.scheduled_tokens),
            scheduled_s=now(chunk_s, instances.scheduled_s),
            just_finished=now(n_ended, instances.just_finished),
        ),
        tally=tally,
        gap_counts=gap_counts,
    )


def _count(mask: Array) -> Array:
    return jnp.sum(mask, axis=1, dtype=jnp.int32)


def _sum(mask: Array, values: Array) -> Array:
    return jnp.sum(jnp.where(mask, values, 0), axis=1, dtype=int)


def _tally_iteration(
    tally: Tally,
    engine: Engine,
    instances: Instances,
    runs: Array,
    inside: Array,
    decode_s: Array,
    n_emitted: Array,
    n_gaps: Array,
    stalls: tuple[Array, Array],
) -> Tally:
    """`n_gaps` are as long as the iteration; `stalls` (number, seconds) are the first after a preemption."""
    took_s = decode_s + instances.scheduled_s
    n = jnp.maximum(instances.n_decoding, 1e-9)
    decode_j = gpu_power_w(engine.power, n, instances.tokens / n) * decode_s
    path_s = jnp.where(runs, took_s, 0.0)
    return Tally(
        gpu_j=tally.gpu_j + inside * (decode_j + engine.prefill.gpu_w * instances.scheduled_s),
        tokens=tally.tokens + inside * n_emitted,
        in_flight_s=tally.in_flight_s + inside * took_s * instances.n_running,
        blocks_s=tally.blocks_s + inside * took_s * instances.n_blocks,
        prefill_s=tally.prefill_s + inside * instances.scheduled_s,
        busy_s=tally.busy_s + inside * took_s,
        gaps=tally.gaps + inside * (n_gaps + stalls[0]),
        gaps_s=tally.gaps_s + inside * (n_gaps * took_s + stalls[1]),
        path_in_flight_s=tally.path_in_flight_s + path_s * instances.n_running,
        path_in_system_s=tally.path_in_system_s + path_s * (instances.n_running + instances.n_waiting),
        path_iterations=tally.path_iterations + runs,
        preemptions=tally.preemptions,
    )


def _inside(scheduler: Scheduler, start_s: Array, end_s: Array) -> Array:
    """Seconds of [start, end] [I] in the window of statistics."""
    opens_s, closes_s = jnp.repeat(scheduler.window_s, len(start_s) // len(scheduler.window_s), axis=0).T
    return jnp.maximum(jnp.minimum(end_s, closes_s) - jnp.maximum(start_s, opens_s), 0.0)


def _pause(state: State, engine: Engine, scheduler: Scheduler, pauses: Array, until_s: Array) -> State:
    """Idle to the next arrival in the queue, or to the limit."""
    instances, tally = state.instances, state.tally
    next_s = jnp.minimum(state.queues.arrival_s[instances.head], until_s)
    end_s = jnp.where(pauses, jnp.maximum(next_s, instances.clock_s), instances.clock_s)
    idle_s = _inside(scheduler, instances.clock_s, end_s)
    waiting_s = (end_s - instances.clock_s) * instances.n_waiting
    return replace(
        state,
        instances=replace(instances, clock_s=end_s, just_finished=jnp.where(pauses, 0, instances.just_finished)),
        tally=tally._replace(
            gpu_j=tally.gpu_j + engine.idle_w * idle_s, path_in_system_s=tally.path_in_system_s + waiting_s
        ),
    )


def _preempt(state: State, engine: Engine, scheduler: Scheduler) -> State:
    """The newest sequence of every instance whose cache overflows goes back to the head of its queue.

    This follows an iteration, when at most the newest sequence has prompt tokens scheduled: they go with it.
    """
    queues, slots, instances = state.queues, state.slots, state.instances
    nobody = queues.next.shape[0] - 1
    over = instances.n_blocks > scheduler.n_blocks
    slot = jnp.argmax(jnp.where(slots.left > 0, slots.turn, -1), axis=1)
    place = jnp.arange(len(slot)), slot
    request = jnp.where(over, slots.request[place], nobody)
    context, left, first_s = (values[place] for values in (slots.context, slots.left, slots.first_s))
    decoded = over & (slots.phase[place] == 0)
    behind = jnp.where(instances.n_waiting > 0, instances.head, nobody)
    here = over[:, None] & (jnp.arange(slots.left.shape[1]) == slot[:, None])
    last_s = jnp.where(decoded, instances.clock_s, slots.last_s[place])  # or of an earlier preemption
    return replace(
        state,
        queues=replace(
            queues,
            prompt_tokens=queues.prompt_tokens.at[request].set(jnp.where(over, context, 0)),
            output_tokens=queues.output_tokens.at[request].set(jnp.where(over, left, 0)),
            next=queues.next.at[request].set(jnp.where(over, behind, nobody)),
            first_s=queues.first_s.at[request].set(jnp.where(over, first_s, NEVER)),
            last_s=queues.last_s.at[request].set(jnp.where(over, last_s, NEVER)),
        ),
        slots=replace(slots, left=jnp.where(here, 0, slots.left), request=jnp.where(here, nobody, slots.request)),
        instances=replace(
            instances,
            head=jnp.where(over, request, instances.head),
            tail=jnp.where(over & (instances.n_waiting == 0), request, instances.tail),
            n_waiting=instances.n_waiting + over,
            n_running=instances.n_running - over,
            n_decoding=instances.n_decoding - decoded,
            tokens=instances.tokens - jnp.where(decoded, context, 0),
            windowed_tokens=instances.windowed_tokens - jnp.where(decoded, _cut(engine, context), 0),
            n_blocks=instances.n_blocks - jnp.where(over, blocks_of(scheduler, context), 0),
            prompt_left=jnp.where(over, 0, instances.prompt_left),
            scheduled_tokens=jnp.where(over, 0, instances.scheduled_tokens),
            scheduled_s=jnp.where(over, 0.0, instances.scheduled_s),
        ),
        tally=state.tally._replace(preemptions=state.tally.preemptions + over),
    )
