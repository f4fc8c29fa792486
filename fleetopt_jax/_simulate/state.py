"""Where a simulation stands: requests, slots, instances, and what was counted, as arrays.

G replications of N instances make I = G N instances with S slots each; requests are numbered over all replications, and
lists of them are linked through `RequestTable.next`. Times in float64.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax._simulate.kept import Kept
from fleetopt_jax.core.struct import pytree, static
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS

N_GAPS = 2048  # bins of the inter-token times, even in their logarithm
GAP_RANGE_S = (1e-5, 1e3)  # 0.9 % a bin
NEVER = jnp.inf

Sums = Array | np.ndarray  # NumPy's once the run is over


@pytree
class Scheduler:
    """What bounds an instance's batch. Leaves traced, shape ()."""

    max_num_seqs: Array  # sequences at once [-]
    n_blocks: Array  # KV blocks; inf where slots reserve their windows and `max_num_seqs` is the bound [-]
    fixed_tokens: Array  # KV tokens a sequence holds besides its context [tokens]
    window_s: Array  # [G, 2]: from when to when statistics are taken [s]
    chunks_are_free: bool = static(default=False)  # prompts take ceil(p / chunk) iterations and no time, as published
    decodes_only: bool = static(default=False)  # prompts are in the cache when requests come


@pytree
class RequestTable:
    """Requests, shape [Q + 1]: the last entry stands for nobody. What is left to do changes with preemption."""

    arrival_s: Array  # at the pool [s]; inf for nobody
    prompt_tokens: Array  # to prefill before the next output token [tokens]
    output_tokens: Array  # still to generate [tokens]
    next: Array  # who waits behind it
    admit_s: Array  # first admission; inf before [s]
    first_s: Array  # first token [s]
    last_s: Array  # newest token known here, at preemption or at the end [s]
    found_tokens: Array | None = None  # of the prompt, in the prefix cache; None where there is none [tokens]

    @property
    def nobody(self) -> int:
        """The number that stands for no request."""
        return self.next.shape[0] - 1


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
    scheduled_pairs: Array  # pairs of tokens that those attend to
    scheduled_windowed_pairs: Array  # the same, each cut by the sliding window
    n_turns: Array
    just_finished: Array  # sequences that ended with the last iteration


class Tally(NamedTuple):
    """Sums over an instance's iterations, shape [I]; in the window unless `path_` is in the name."""

    gpu_j: Sums  # energy of one GPU [J]
    tokens: Sums  # generated
    in_flight_s: Sums  # sequences in flight, times seconds
    blocks_s: Sums  # KV blocks in use, times seconds
    prefill_s: Sums
    busy_s: Sums
    gaps: Sums  # inter-token times seen
    gaps_s: Sums  # their sum [s]
    path_in_flight_s: Sums  # over the whole run
    path_in_system_s: Sums  # the waiting with them
    path_iterations: Sums
    preemptions: Sums


@pytree
class State:
    """All of it."""

    table: RequestTable
    slots: Slots
    instances: Instances
    tally: Tally
    gap_counts: Array  # [G, N_GAPS]
    cramped: Array  # whether the S slots, not the scheduler, ever refused a request
    kept: Kept | None = None  # blocks of prompts, where instances keep them


def empty_state(table: RequestTable, n_groups: int, n_instances: int, n_slots: int) -> State:
    """Everybody is still to come."""
    n, nobody = n_groups * n_instances, table.nobody
    zero = jnp.zeros(n, jnp.int32)
    slots = jnp.zeros((n, n_slots), jnp.int32)
    return State(
        table=table,
        slots=Slots(
            request=jnp.full_like(slots, nobody),
            left=slots,
            context=slots,
            phase=slots,
            turn=slots,
            first_s=jnp.full(slots.shape, NEVER, float),
            last_s=jnp.full(slots.shape, NEVER, float),
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
            scheduled_pairs=jnp.zeros(n),
            scheduled_windowed_pairs=jnp.zeros(n),
            n_turns=zero,
            just_finished=zero,
        ),
        tally=Tally(*(jnp.zeros(n) for _ in Tally._fields)),
        gap_counts=jnp.zeros((n_groups, N_GAPS)),
        cramped=jnp.zeros((), bool),
    )


def used_blocks(state: State) -> Array:
    """KV blocks that the sequences of each instance use [I], those of several once."""
    if state.kept is None:
        return state.instances.n_blocks
    return state.instances.n_blocks - (state.kept.shared_tokens // BLOCK_TOKENS).astype(jnp.int32)


def gap_bin(gap_s: Array) -> Array:
    """Where an inter-token time is counted."""
    low, high = jnp.log(GAP_RANGE_S[0]), jnp.log(GAP_RANGE_S[1])
    place = (jnp.log(jnp.maximum(gap_s, GAP_RANGE_S[0])) - low) / (high - low)
    return jnp.clip(place * N_GAPS, 0, N_GAPS - 1).astype(jnp.int32)
