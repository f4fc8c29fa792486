"""Continuous batching, iteration by iteration, of many independent instances at once.

Each instance has a clock of its own and a queue, first come first served. As vLLM schedules: at the start of an
iteration the sequences that decode take a token each of the iteration's token budget, then the prompt that was cut off
goes on, then waiting requests are admitted while `max_num_seqs`, the KV cache and the budget allow; a prompt that does
not fit the budget is cut (chunked prefill). The iteration takes the time and the energy of the engine's step law at the
real batch, its real contexts and the chunks of prompts in it. Every decoding sequence gains a token, and so does every
sequence whose prompt is done; where the engine drafts ahead, a decoding one gains as many more as are accepted, at
random (`laws/speculation.py`). Where the cache then overflows, the newest sequences are preempted: they lose their
cache, go back to the head of the queue, and later prefill their prompt and what they had generated again. The oldest
sequence is never preempted while another is there, and alone it fits (longer requests are refused at the door), so some
sequence always advances: no livelock.

What a prompt finds in a prefix cache is held and attended to, but not computed: its first chunk begins behind it. Where
instances keep blocks of prompts (`kept.py`), a request looks its own up when it is admitted, may use those that others
use without more memory, and gives them up when it ends or is preempted. What of it is on the hosts is loaded first: its
iteration takes so much longer, at its own watts.

One `advance` does a step for every instance whose clock has not reached its limit: it admits whom it can, one request
of each queue at a time, which touches no more than their slots, and then runs one iteration, or idles to the next
arrival, which touches all slots. Shapes as in `state.py`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from fleetopt_jax._simulate.kept import all_given_up, evicted, given_up, look_up, used, waited_for
from fleetopt_jax._simulate.state import (
    NEVER,
    Instances,
    RequestTable,
    Scheduler,
    Slots,
    State,
    Tally,
    gap_bin,
    used_blocks,
)
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.step_law import step_law_of
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.laws.mixed_step import StepBatch
from fleetopt_jax.laws.operators.attention import causal_pairs
from fleetopt_jax.laws.prefill import prefill_chunks
from fleetopt_jax.laws.speculation import MOST_DRAFTS, Speculation


def run_until(state: State, engine: Engine, scheduler: Scheduler, until_s: Array) -> State:
    """Every instance, up to the first iteration that ends at `until_s` [I] or later; idle ones to `until_s`."""

    def behind(state: State) -> Array:
        return jnp.any(state.instances.clock_s < until_s)

    return jax.lax.while_loop(behind, lambda state: advance(state, engine, scheduler, until_s), state)


def advance(state: State, engine: Engine, scheduler: Scheduler, until_s: Array) -> State:
    """Admissions, and then one iteration or a pause, of every instance whose clock is before `until_s` [I]."""
    active = state.instances.clock_s < until_s
    state = _admit_all(state, engine, scheduler, active)
    runs = active & (state.instances.n_running > 0)
    state = _pause(state, engine, scheduler, active & ~runs, until_s)
    there = state.slots.left > 0
    state = _iterate(state, engine, scheduler, runs)
    state = _given_up_by(state, engine, scheduler, there & (state.slots.left == 0))
    if scheduler.chunks_are_free:
        return state  # slots are reserved: the cache cannot overflow
    return jax.lax.while_loop(
        lambda state: jnp.any(used_blocks(state) > scheduler.n_blocks),
        lambda state: _preempt(state, engine, scheduler),
        state,
    )


def finished(state: State) -> RequestTable:
    """The requests, with the times that still stand in the slots."""
    slots = state.slots
    return _leave(state.table, slots.request.ravel(), slots.first_s.ravel(), slots.last_s.ravel())


def _leave(table: RequestTable, request: Array, first_s: Array, last_s: Array) -> RequestTable:
    """`table` with the times of requests that give up their slots."""
    return replace(table, first_s=table.first_s.at[request].set(first_s), last_s=table.last_s.at[request].set(last_s))


def _blocks(scheduler: Scheduler, tokens: Array) -> Array:
    """KV blocks of a sequence of `tokens`, in whole."""
    return jnp.ceil((tokens + scheduler.fixed_tokens) / BLOCK_TOKENS).astype(jnp.int32)


def _seen(engine: Engine, tokens: Array) -> Array:
    """Contexts as the layers with a sliding window see them, in whole."""
    return engine.decode.seen_tokens(tokens).astype(tokens.dtype)


def _pairs(engine: Engine, tokens: Array, before: Array) -> tuple[Array, Array]:
    """Pairs of tokens that a chunk of `tokens` attends to, after `before` of its prompt: all, and cut by the window."""
    tokens, before = tokens.astype(float), before.astype(float)
    return causal_pairs(tokens, before), causal_pairs(tokens, before, step_law_of(engine).window_tokens)


# Whole numbers summed by a product with ones, several times as fast as a sum of integers, and as exact: float32 holds
# whole numbers up to 2^24, float64 up to 2^53.
def _count(mask: Array) -> Array:
    return (mask.astype(jnp.float32) @ jnp.ones(mask.shape[1], jnp.float32)).astype(jnp.int32)


def _sum(mask: Array, values: Array) -> Array:
    return (jnp.where(mask, values, 0).astype(float) @ jnp.ones(mask.shape[1])).astype(int)


# --- admission --------------------------------------------------------------------------------------------------------


def _prompt_room(engine: Engine, n_decoding: Array) -> Array:
    """Prompt tokens of an iteration; at least one even beside the fullest batch, whose drafts take room as well."""
    rows = n_decoding
    if engine.speculation is not None:
        rows = jnp.ceil(n_decoding * engine.speculation.rows_per_sequence).astype(jnp.int32)
    return jnp.maximum(engine.prefill.budget_tokens.astype(jnp.int32) - rows, 1)


def _budget(engine: Engine, scheduler: Scheduler, instances: Instances) -> Array:
    """Prompt tokens the next iteration can still take."""
    if scheduler.chunks_are_free:
        return jnp.full_like(instances.n_decoding, jnp.iinfo(jnp.int32).max)
    return _prompt_room(engine, instances.n_decoding) - instances.scheduled_tokens


def _admissible(state: State, engine: Engine, scheduler: Scheduler) -> Array:
    """Whether the scheduler takes the head of each queue now."""
    table, instances = state.table, state.instances
    needs = _blocks(scheduler, table.prompt_tokens[instances.head] + 1)
    if state.kept is not None:  # what others use now of the prompt needs no room
        shared = state.kept.shared_tokens + look_up(state.kept, instances.head).shared_tokens
        needs = needs - shared // BLOCK_TOKENS + state.kept.shared_tokens // BLOCK_TOKENS
    fits = used_blocks(state) + needs <= scheduler.n_blocks
    takes = fits & (instances.n_running < scheduler.max_num_seqs) & (instances.prompt_left == 0)
    here = table.arrival_s[instances.head] <= instances.clock_s
    return here & takes & (_budget(engine, scheduler, instances) > 0)


@pytree
class _FirstChunk:
    """How a prompt begins, shape [I]."""

    new_tokens: Array  # to compute: the prompt, less what was found of it
    done_tokens: Array  # with the first iteration, what was found with them
    tokens: Array  # in the first iteration
    pairs: Array  # that those attend to
    windowed_pairs: Array
    phase: Array  # as in `Slots`


def _first_chunk(
    prompt: Array, found: Array, engine: Engine, scheduler: Scheduler, instances: Instances
) -> _FirstChunk:
    """Of prompts of which `found` tokens are in the cache already: the rest is computed, and attends to them."""
    if scheduler.chunks_are_free:
        chunks = prefill_chunks(prompt, engine.prefill.chunk_tokens)
        nothing = jnp.zeros_like(instances.clock_s)
        return _FirstChunk(prompt, prompt, prompt, nothing, nothing, chunks.astype(jnp.int32))
    if scheduler.decodes_only:
        nothing, none = jnp.zeros_like(instances.clock_s), jnp.zeros_like(prompt)
        return _FirstChunk(none, prompt, none, nothing, nothing, jnp.ones_like(prompt, jnp.int32))
    new = prompt - found
    tokens = jnp.minimum(new, _budget(engine, scheduler, instances))
    phase = jnp.where(tokens == new, 1, 2).astype(jnp.int32)
    return _FirstChunk(new, found + tokens, tokens, *_pairs(engine, tokens, found), phase)


def _admit_all(state: State, engine: Engine, scheduler: Scheduler, active: Array) -> State:
    """Take from the head of each queue whom the scheduler takes now.

    Who is left without a slot is known from the loop: to look again behind it, at caches that are given away, would
    copy them in every iteration.
    """
    n_slots = state.slots.left.shape[1]

    def wanted(state: State) -> Array:
        return active & _admissible(state, engine, scheduler)

    def takes(state: State, wants: Array) -> Array:
        return wants & (state.instances.n_running < n_slots)

    def admit(loop: tuple[State, Array]) -> tuple[State, Array]:
        state = _admit(loop[0], takes(*loop), engine, scheduler)
        return state, wanted(state)

    state, wants = jax.lax.while_loop(lambda loop: jnp.any(takes(*loop)), admit, (state, wanted(state)))
    return replace(state, cramped=state.cramped | jnp.any(wants))


def _admit(state: State, takes: Array, engine: Engine, scheduler: Scheduler) -> State:
    """Take the head of each queue of the instances `takes`, into the first slot that is free."""
    table, slots, instances = state.table, state.slots, state.instances
    n_slots = slots.left.shape[1]
    index = jnp.arange(n_slots, dtype=jnp.int32)
    slot = jnp.min(jnp.where(slots.left == 0, index, n_slots - 1), axis=1)
    row = jnp.arange(len(slot))
    request = jnp.where(takes, instances.head, table.nobody)
    prompt = table.prompt_tokens[request]
    state, found = _found(state, request, prompt, takes)
    table = state.table
    chunk = _first_chunk(prompt, found, engine, scheduler, instances)

    # The request that had the slot leaves its times; the new one brings what it had before a preemption.
    leaver = jnp.where(takes, slots.request[row, slot], table.nobody)
    table = _leave(table, leaver, slots.first_s[row, slot], slots.last_s[row, slot])
    admit_s = jnp.where(takes, jnp.minimum(table.admit_s[request], instances.clock_s), NEVER)
    table = replace(table, admit_s=table.admit_s.at[request].set(admit_s))
    place = row, jnp.where(takes, slot, n_slots)  # n_slots is out of range: dropped

    def put(values: Array, new: Array) -> Array:
        return values.at[place].set(new.astype(values.dtype), mode="drop", unique_indices=True)

    slots = Slots(
        request=put(slots.request, request),
        left=put(slots.left, table.output_tokens[request]),
        context=put(slots.context, prompt),
        phase=put(slots.phase, chunk.phase),
        turn=put(slots.turn, instances.n_turns),
        first_s=put(slots.first_s, table.first_s[request]),
        last_s=put(slots.last_s, table.last_s[request]),
    )
    behind = table.next[instances.head]
    instances = _with_admitted(instances, engine, scheduler, takes, behind, prompt, chunk, slot)
    return _evicted(replace(state, table=table, slots=slots, instances=instances), engine, scheduler)


def _with_admitted(
    instances: Instances,
    engine: Engine,
    scheduler: Scheduler,
    takes: Array,
    behind: Array,
    prompt: Array,
    chunk: _FirstChunk,
    slot: Array,
) -> Instances:
    """The instances that take a request, `behind` whom the queue goes on."""
    cut = takes & (chunk.tokens < chunk.new_tokens)
    # From its first iteration on a request counts in the batch where no chunk of its prompt does.
    counted = takes & (scheduler.chunks_are_free or scheduler.decodes_only)
    return replace(
        instances,
        head=jnp.where(takes, behind, instances.head),
        n_waiting=instances.n_waiting - takes,
        n_running=instances.n_running + takes,
        n_decoding=instances.n_decoding + counted,
        tokens=instances.tokens + jnp.where(counted, prompt, 0),
        windowed_tokens=instances.windowed_tokens + jnp.where(counted, _seen(engine, prompt), 0),
        n_blocks=instances.n_blocks + jnp.where(takes, _blocks(scheduler, prompt), 0),
        prompt_left=jnp.where(cut, chunk.new_tokens - chunk.tokens, instances.prompt_left),
        prompt_done=jnp.where(cut, chunk.done_tokens, instances.prompt_done),
        prompt_slot=jnp.where(cut, slot, instances.prompt_slot),
        scheduled_tokens=instances.scheduled_tokens + jnp.where(takes, chunk.tokens, 0),
        scheduled_pairs=instances.scheduled_pairs + jnp.where(takes, chunk.pairs, 0.0),
        scheduled_windowed_pairs=instances.scheduled_windowed_pairs + jnp.where(takes, chunk.windowed_pairs, 0.0),
        n_turns=instances.n_turns + takes,
    )


# --- blocks of prompts that are kept --------------------------------------------------------------------------------


def _found(state: State, request: Array, prompt: Array, takes: Array) -> tuple[State, Array]:
    """The state where the instances `takes` [I] have looked up the prompt of `request`, and what they found [tokens].

    The last token of a prompt is always computed: the first answer comes from it. What counts as found is what was at
    the first admission; what comes from the hosts, by the share of its prefill that this spares.
    """
    table = state.table
    if table.found_tokens is None:
        return state, jnp.zeros_like(prompt)
    if state.kept is None:
        return state, table.found_tokens[request]
    there, most = look_up(state.kept, request), jnp.maximum(prompt - 1, 0)
    found = spared = jnp.minimum(there.found_tokens, most)
    if (hosts := state.kept.hosts) is not None:
        found = jnp.minimum(there.found_tokens + there.loaded_tokens, most)
        spared = spared + jnp.round(hosts.spared_frac * (found - spared)).astype(found.dtype)
    first = takes & jnp.isinf(table.admit_s[request])
    reported = table.found_tokens.at[jnp.where(first, request, table.nobody)].set(jnp.where(first, spared, 0))
    table = replace(table, found_tokens=reported)
    return replace(state, table=table, kept=used(state.kept, there, takes)), found


def _given_up_by(state: State, engine: Engine, scheduler: Scheduler, ended: Array) -> State:
    """The state where the sequences that have ended leave their blocks to whoever comes next."""
    if state.kept is None:
        return state
    kept = all_given_up(state.kept, ended, state.slots.request, state.slots.turn)
    return _evicted(replace(state, kept=kept), engine, scheduler)


def _evicted(state: State, engine: Engine, scheduler: Scheduler) -> State:
    """The state where blocks that nobody uses have gone, as far as the sequences in flight need the memory."""
    if state.kept is None:
        return state
    free = jnp.minimum(scheduler.n_blocks, engine.kv.n_blocks) - used_blocks(state)
    return replace(state, kept=evicted(state.kept, jnp.maximum(BLOCK_TOKENS * free, 0.0)))


# --- an iteration -----------------------------------------------------------------------------------------------------


@pytree
class _Iteration:
    """One iteration of the instances that run, shapes [I]."""

    runs: Array
    took_s: Array
    prefill_s: Array  # what it takes more than without the chunks of prompts in it [s]
    gpu_j: Array  # energy of one GPU [J]
    end_s: Array
    inside: Array  # share of it in the window of statistics


@pytree
class _Tokens:
    """Who gains tokens at the end of an iteration, shapes [I, S]."""

    emits: Array
    gained: Array  # how many
    first: Array  # those whose first it is
    ended: Array  # those whose last it is


def _batch(scheduler: Scheduler, instances: Instances) -> StepBatch:
    """What the next iteration of every instance works on."""
    prompts = instances.scheduled_tokens, instances.scheduled_pairs, instances.scheduled_windowed_pairs
    if scheduler.chunks_are_free:
        prompts = tuple(jnp.zeros_like(instances.clock_s) for _ in prompts)
    decoding = instances.n_decoding, instances.tokens, instances.windowed_tokens
    return StepBatch(*(x.astype(float) for x in (*decoding, *prompts)))


def _iterate(state: State, engine: Engine, scheduler: Scheduler, runs: Array) -> State:
    """One iteration of the instances that run."""
    slots, instances = state.slots, state.instances
    law, batch = step_law_of(engine), _batch(scheduler, instances)
    took_s, gpu_j = law.step_s(batch), law.gpu_j(batch)
    if state.kept is not None and state.kept.hosts is not None:
        waits_s = state.kept.hosts.loading_s
        took_s, gpu_j = took_s + waits_s, gpu_j * (1.0 + waits_s / took_s)
        state = replace(state, kept=waited_for(state.kept, runs))
    prefill_s = took_s - engine.decode.batch_s(batch.n_active, batch.tokens, batch.windowed_tokens)
    end_s = instances.clock_s + took_s
    inside = jnp.where(runs, _inside(scheduler, instances.clock_s, end_s) / took_s, 0.0)
    iteration = _Iteration(runs, took_s, prefill_s, gpu_j, end_s, inside)

    emits = runs[:, None] & (slots.left > 0) & (slots.phase <= 1)
    first = emits & jnp.isinf(slots.first_s)
    gained = _gained(engine.speculation, slots, emits)
    left = slots.left - gained
    tokens = _Tokens(emits, gained, first, emits & (left == 0))
    if scheduler.chunks_are_free:
        phase = jnp.where(runs[:, None], jnp.maximum(slots.phase - 1, 0), slots.phase)
        decodes = left > 0
    else:
        phase = jnp.where(emits, 0, slots.phase)
        decodes = (left > 0) & (phase == 0)
    slots = replace(
        slots,
        left=left,
        context=slots.context + gained,
        phase=phase,
        first_s=jnp.where(first, end_s[:, None], slots.first_s),
        last_s=jnp.where(tokens.ended, end_s[:, None], slots.last_s),
    )
    tally, gap_counts = _tallied(state, iteration, tokens)
    slots, instances = _carry_on(slots, instances, engine, scheduler, iteration, decodes, _count(tokens.ended))
    return replace(state, slots=slots, instances=instances, tally=tally, gap_counts=gap_counts)


def _gained(speculation: Speculation | None, slots: Slots, emits: Array) -> Array:
    """Tokens that each slot gains [I, S]: one, and of a sequence that decodes the drafts that are accepted, S_j of the
    first j together, up to its last token. Chance is a number of the sequence's first token's time, its own, and the
    tokens that are left: the same run gives the same tokens, and no two iterations of a sequence the same number."""
    if speculation is None:
        return emits
    chance = _chance(slots.first_s, slots.request, slots.left)
    accepted = sum((chance < speculation.accepted[j]).astype(jnp.int32) for j in range(MOST_DRAFTS))
    drafted = emits & (slots.phase == 0)
    return jnp.where(drafted, jnp.minimum(1 + accepted, slots.left), emits.astype(jnp.int32))


def _chance(time_s: Array, *counts: Array) -> Array:
    """A number in [0, 1) that looks random: the bits of all, mixed as MurmurHash3 ends (A. Appleby, public domain)."""
    low, high = jnp.moveaxis(jax.lax.bitcast_convert_type(time_s.astype(jnp.float64), jnp.uint32), -1, 0)
    bits = low ^ (high * jnp.uint32(0x9E3779B1))
    for count, multiplier in zip(counts, (0xC2B2AE3D, 0x85EBCA77), strict=True):
        bits ^= count.astype(jnp.uint32) * jnp.uint32(multiplier)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(multiplier)
    return ((bits ^ (bits >> 16)) >> 8).astype(jnp.float32) / jnp.float32(2**24)


def _carry_on(
    slots: Slots,
    instances: Instances,
    engine: Engine,
    scheduler: Scheduler,
    iteration: _Iteration,
    decodes: Array,
    n_ended: Array,
) -> tuple[Slots, Instances]:
    """The instances after the iteration that `slots` have behind them, and the slots with the phase of the prompt that
    was cut off and goes on with its next chunk."""
    n_decoding = _count(decodes)
    chunk = jnp.minimum(instances.prompt_left, _prompt_room(engine, n_decoding))
    done = instances.prompt_done + chunk
    pairs, windowed_pairs = _pairs(engine, chunk, instances.prompt_done)
    completes = iteration.runs & (instances.prompt_left > 0) & (chunk == instances.prompt_left)
    there, index = slots.left > 0, jnp.arange(slots.left.shape[1], dtype=jnp.int32)
    completed = completes[:, None] & (index == instances.prompt_slot[:, None])

    def now(new: Array, old: Array) -> Array:
        return jnp.where(iteration.runs, new, old)

    instances = replace(
        instances,
        clock_s=now(iteration.end_s, instances.clock_s),
        n_running=instances.n_running - n_ended,
        n_decoding=now(n_decoding, instances.n_decoding),
        tokens=now(_sum(decodes, slots.context), instances.tokens),
        windowed_tokens=now(_sum(decodes, _seen(engine, slots.context)), instances.windowed_tokens),
        n_blocks=now(_sum(there, _blocks(scheduler, slots.context)).astype(jnp.int32), instances.n_blocks),
        prompt_left=now(instances.prompt_left - chunk, instances.prompt_left),
        prompt_done=now(done, instances.prompt_done),
        scheduled_tokens=now(chunk, instances.scheduled_tokens),
        scheduled_pairs=now(pairs, instances.scheduled_pairs),
        scheduled_windowed_pairs=now(windowed_pairs, instances.scheduled_windowed_pairs),
        just_finished=now(n_ended, instances.just_finished),
    )
    return replace(slots, phase=jnp.where(completed, 1, slots.phase)), instances


def _tallied(state: State, iteration: _Iteration, tokens: _Tokens) -> tuple[Tally, Array]:
    """The sums, and the counts of inter-token times, with those of an iteration of `state`.

    A gap is as long as the iteration, but for the first token after a preemption: from the last token before it. Tokens
    that come with others, accepted drafts, have none of their own: they count where the mean gap is taken.
    """
    instances, tally, inside, took_s = state.instances, state.tally, iteration.inside, iteration.took_s
    group = jnp.arange(len(inside)) // (len(inside) // len(state.gap_counts))

    def stalled() -> tuple[Array, Array, Array]:
        again = tokens.emits & ~tokens.first & (state.slots.phase == 1)  # the first since a preemption
        gap_s = jnp.where(again, iteration.end_s[:, None] - state.slots.last_s, 0.0)
        counts = jnp.where(again, inside[:, None], 0.0)
        gap_counts = state.gap_counts.at[group[:, None], gap_bin(gap_s)].add(counts)
        return gap_counts, jnp.sum(gap_s, axis=1), _count(again)

    nobody = state.gap_counts, jnp.zeros_like(inside), jnp.zeros_like(instances.n_decoding)
    gap_counts, stalled_s, n_again = jax.lax.cond(jnp.any(tally.preemptions > 0), stalled, lambda: nobody)
    n_first, n_tokens = _count(tokens.first), _count(tokens.gained)
    n_gaps = (n_tokens if tokens.gained is tokens.emits else _count(tokens.emits)) - n_first - n_again
    gap_counts = gap_counts.at[group, gap_bin(took_s)].add(inside * n_gaps)
    path_s = jnp.where(iteration.runs, took_s, 0.0)
    tally = tally._replace(
        gpu_j=tally.gpu_j + inside * iteration.gpu_j,
        tokens=tally.tokens + inside * n_tokens,
        in_flight_s=tally.in_flight_s + inside * took_s * instances.n_running,
        blocks_s=tally.blocks_s + inside * took_s * used_blocks(state),
        prefill_s=tally.prefill_s + inside * iteration.prefill_s,
        busy_s=tally.busy_s + inside * took_s,
        gaps=tally.gaps + inside * (n_tokens - n_first),
        gaps_s=tally.gaps_s + inside * (n_gaps * took_s + stalled_s),
        path_in_flight_s=tally.path_in_flight_s + path_s * instances.n_running,
        path_in_system_s=tally.path_in_system_s + path_s * (instances.n_running + instances.n_waiting),
        path_iterations=tally.path_iterations + iteration.runs,
    )
    return tally, gap_counts


def _inside(scheduler: Scheduler, start_s: Array, end_s: Array) -> Array:
    """Seconds of [start, end] [I] in the window of statistics."""
    opens_s, closes_s = jnp.repeat(scheduler.window_s, len(start_s) // len(scheduler.window_s), axis=0).T
    return jnp.maximum(jnp.minimum(end_s, closes_s) - jnp.maximum(start_s, opens_s), 0.0)


# --- pauses and preemption --------------------------------------------------------------------------------------------


def _pause(state: State, engine: Engine, scheduler: Scheduler, pauses: Array, until_s: Array) -> State:
    """Idle to the next arrival in the queue, or to the limit."""
    instances, tally = state.instances, state.tally
    next_s = jnp.minimum(state.table.arrival_s[instances.head], until_s)
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
    table, slots, instances = state.table, state.slots, state.instances
    nobody = table.nobody
    over = used_blocks(state) > scheduler.n_blocks
    slot = jnp.argmax(jnp.where(slots.left > 0, slots.turn, -1), axis=1)
    place = jnp.arange(len(slot)), slot
    request = jnp.where(over, slots.request[place], nobody)
    context, left, first_s = (values[place] for values in (slots.context, slots.left, slots.first_s))
    decoded = over & (slots.phase[place] == 0)
    behind = jnp.where(instances.n_waiting > 0, instances.head, nobody)
    here = over[:, None] & (jnp.arange(slots.left.shape[1]) == slot[:, None])
    last_s = jnp.where(decoded, instances.clock_s, slots.last_s[place])  # or of an earlier preemption
    kept = state.kept
    if kept is not None:
        done = jnp.where(decoded, context, instances.prompt_done - instances.scheduled_tokens)
        kept = given_up(kept, over, request, done)
    state = replace(
        state,
        kept=kept,
        table=replace(
            table,
            prompt_tokens=table.prompt_tokens.at[request].set(jnp.where(over, context, 0)),
            output_tokens=table.output_tokens.at[request].set(jnp.where(over, left, 0)),
            next=table.next.at[request].set(jnp.where(over, behind, nobody)),
            first_s=table.first_s.at[request].set(jnp.where(over, first_s, NEVER)),
            last_s=table.last_s.at[request].set(jnp.where(over, last_s, NEVER)),
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
            windowed_tokens=instances.windowed_tokens - jnp.where(decoded, _seen(engine, context), 0),
            n_blocks=instances.n_blocks - jnp.where(over, _blocks(scheduler, context), 0),
            prompt_left=jnp.where(over, 0, instances.prompt_left),
            scheduled_tokens=jnp.where(over, 0, instances.scheduled_tokens),
            scheduled_pairs=jnp.where(over, 0.0, instances.scheduled_pairs),
            scheduled_windowed_pairs=jnp.where(over, 0.0, instances.scheduled_windowed_pairs),
        ),
        tally=state.tally._replace(preemptions=state.tally.preemptions + over),
    )
    return _evicted(state, engine, scheduler)
