"""One pool's instances over all its requests: dispatch, batch, dispatch, ..., in one compiled loop."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.simulate.batching import Queues, Scheduler, State, Tally, empty_state, finished, run_until
from fleetopt_jax.simulate.dispatch import Policy, dispatch

Progress = Callable[[float], None]

MOST_SENT = 256  # requests of a replication dispatched at once
SEGMENT = 128  # dispatches between two signs of progress
LEAST_SLOTS = 16
SLOT_BYTES = 5 * 4 + 2 * 8  # of `Slots`
MEMORY_BYTES = 1e9  # of the slots of the replications that run together


@dataclass(frozen=True)
class PoolRequests:
    """What a pool gets; numpy arrays [R, m], padded at the end with arrivals that never come."""

    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray


@dataclass(frozen=True)
class PoolRun:
    """What became of it: times [R, m] (inf where it did not happen), sums [R, N]."""

    admit_s: np.ndarray
    first_s: np.ndarray
    last_s: np.ndarray
    tally: Tally
    gap_counts: np.ndarray  # [R, bins]
    in_system: np.ndarray  # requests still there at the end [R]
    memory_bytes: int  # of the state


def run_pool(
    engine: Engine,
    scheduler: Scheduler,
    requests: PoolRequests,
    n_instances: int,
    horizon_s: np.ndarray,
    *,
    policy: Policy = "jsq",
    staleness_s: float = 0.05,
    n_slots: int = 64,
    seed: int = 0,
    first_replication: int = 0,
    progress: Progress | None = None,
) -> PoolRun:
    """Every iteration of the pool's `n_instances` until `horizon_s` [R], after which nothing is computed any more.

    The router knows the queues as they were up to `staleness_s` ago, and what it has sent since. `n_slots` is where to
    start: where it proves too few for the batches that come, the run starts again with twice as many, so that memory
    follows the batches that come and not the largest allowed. Replications whose slots would take more than
    `MEMORY_BYTES` together run one after another. Shapes are rounded up so that fleets of about the same
    size share one compilation.
    """
    if jnp.zeros(()).dtype != jnp.float64:
        raise ValueError("need float64: set jax_enable_x64 before simulating")
    again = partial(
        run_pool, engine, n_instances=n_instances, policy=policy, staleness_s=staleness_s, seed=seed, progress=progress
    )
    n_groups, n_requests = requests.arrival_s.shape
    width, n_padded, n_slots = _round_up(n_requests), _round_up(n_instances), _slots(n_slots)
    at_once = max(1, int(MEMORY_BYTES // (n_padded * n_slots * SLOT_BYTES)))
    if n_groups > at_once:
        parts = []
        for start in range(0, n_groups, at_once):
            some = slice(start, start + at_once)
            parts.append(
                again(
                    scheduler=replace(scheduler, window_s=scheduler.window_s[some]),
                    requests=PoolRequests(*(values[some] for values in vars(requests).values())),
                    horizon_s=horizon_s[some],
                    n_slots=n_slots,
                    first_replication=first_replication + start,
                )
            )
        return _joined(parts)
    ticks = _ticks(requests.arrival_s, horizon_s, policy, staleness_s)
    state = empty_state(_queues(requests, width), n_groups, n_padded, n_slots)
    state = jax.tree.map(jnp.copy, state)  # buffers of their own, so that they can be given away
    serves = np.arange(n_padded) < n_instances
    numbers = jnp.arange(n_groups) + first_replication
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    for start in range(0, len(ticks.now_s), SEGMENT):
        part = {name: values[start : start + SEGMENT] for name, values in vars(ticks).items()}
        state = _segment(state, engine, scheduler, part, jnp.asarray(n_instances), keys, serves, policy=policy)
        if bool(state.cramped):
            return again(
                scheduler=scheduler,
                requests=requests,
                horizon_s=horizon_s,
                n_slots=2 * n_slots,
                first_replication=first_replication,
            )
        if progress:
            progress((start + SEGMENT) / len(ticks.now_s))
    return _result(state, n_groups, n_requests, width, n_instances)


@dataclass(frozen=True)
class _Ticks:
    """Dispatches of all replications side by side, numpy arrays [T, R]."""

    now_s: np.ndarray  # when; the router knows the queues of that moment
    start: np.ndarray  # first request sent
    count: np.ndarray  # how many


def _ticks(arrival_s: np.ndarray, horizon_s: np.ndarray, policy: Policy, staleness_s: float) -> _Ticks:
    """A dispatch for every stretch of `staleness_s` in which requests come, or more where they are too many.

    Policies that do not look at the queues dispatch everything beforehand. Nobody is sent at the horizon.
    """
    columns = []
    for row, end_s in zip(arrival_s, horizon_s):
        times = row[np.isfinite(row)]
        if policy != "jsq":
            start = np.arange(0, len(times), MOST_SENT)
            now_s = np.zeros(len(start))
        else:
            stretch = np.floor(times / staleness_s) if staleness_s > 0 else np.arange(len(times), dtype=float)
            first = np.flatnonzero(np.diff(stretch, prepend=-1.0))
            sizes = np.diff(np.append(first, len(times)))
            start = np.concatenate([np.arange(a, a + n, MOST_SENT) for a, n in zip(first, sizes)] or [first])
            now_s = times[start]
            whole = np.isin(start, first) & (staleness_s > 0)
            now_s = np.where(whole, stretch[start] * staleness_s, now_s) if len(start) else now_s
        columns.append((now_s, start, np.diff(np.append(start, len(times))), end_s))
    n_ticks = (max(len(column[0]) for column in columns) // SEGMENT + 1) * SEGMENT

    def pad(values: np.ndarray, rest: float) -> np.ndarray:
        return np.append(values, np.full(n_ticks - len(values), rest))

    now_s = np.stack([pad(now_s, end_s) for now_s, _, _, end_s in columns], axis=1)
    start, count = (np.stack([pad(column[i], 0) for column in columns], axis=1).astype(np.int32) for i in (1, 2))
    return _Ticks(now_s, start, count)


def _queues(requests: PoolRequests, width: int) -> Queues:
    n_groups, n = requests.arrival_s.shape
    nobody = n_groups * width

    def column(values: np.ndarray, pad, dtype) -> Array:
        padded = np.full((n_groups, width), pad, dtype)
        padded[:, :n] = values
        return jnp.asarray(np.append(padded.ravel(), np.asarray(pad, dtype)))

    never = jnp.full(nobody + 1, jnp.inf)
    return Queues(
        arrival_s=column(requests.arrival_s, np.inf, float),
        prompt_tokens=column(requests.prompt_tokens, 0, np.int32),
        output_tokens=column(requests.output_tokens, 0, np.int32),
        next=jnp.full(nobody + 1, nobody, jnp.int32),
        admit_s=never,
        first_s=never,
        last_s=never,
    )


@partial(jax.jit, static_argnames="policy", donate_argnames="state")
def _segment(state: State, engine, scheduler, ticks, n_instances, keys, serves, *, policy: Policy) -> State:
    n_groups = len(state.gap_counts)
    nobody = state.queues.next.shape[0] - 1
    width = nobody // n_groups

    def tick(state: State, row) -> tuple[State, None]:
        until_s = jnp.where(serves, row["now_s"][:, None], 0.0).ravel()
        state = run_until(state, engine, scheduler, until_s)
        sent = jnp.arange(MOST_SENT)
        numbers = row["start"][:, None] + sent + width * jnp.arange(n_groups)[:, None]
        numbers = jnp.where(sent < row["count"][:, None], numbers, nobody).astype(jnp.int32)
        now_keys = jax.vmap(jax.random.fold_in)(keys, row["start"])
        return dispatch(state, numbers, row["start"], row["now_s"], n_instances, policy, now_keys), None

    return jax.lax.scan(tick, state, ticks)[0]


def _result(state: State, n_groups: int, n_requests: int, width: int, n_instances: int) -> PoolRun:
    queues = finished(state)

    def times(values: Array) -> np.ndarray:
        return np.asarray(values)[:-1].reshape(n_groups, width)[:, :n_requests]

    def sums(values: Array) -> np.ndarray:
        return np.asarray(values).reshape(n_groups, -1)[:, :n_instances]

    instances = state.instances
    return PoolRun(
        admit_s=times(queues.admit_s),
        first_s=times(queues.first_s),
        last_s=times(_ended(state, queues.last_s)),
        tally=Tally(*map(sums, state.tally)),
        gap_counts=np.asarray(state.gap_counts),
        in_system=sums(instances.n_waiting + instances.n_running).sum(axis=1),
        memory_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    )


def _joined(parts: list[PoolRun]) -> PoolRun:
    """Replications that ran one after another."""

    def rows(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return PoolRun(
        **{name: rows(name) for name in ("admit_s", "first_s", "last_s", "gap_counts", "in_system")},
        tally=Tally(*map(np.concatenate, zip(*(part.tally for part in parts)))),
        memory_bytes=max(part.memory_bytes for part in parts),
    )


def _ended(state: State, last_s: Array) -> np.ndarray:
    """Times of the last tokens; who is still there, or was preempted and never came back, has none."""
    queues, slots = state.queues, state.slots
    ended_s, following = np.array(last_s), np.asarray(queues.next)
    waiting = np.asarray(state.instances.head)[np.asarray(state.instances.n_waiting) > 0]
    while len(waiting):
        ended_s[waiting] = np.inf
        waiting = following[waiting]
        waiting = waiting[waiting < len(following) - 1]
    ended_s[np.asarray(slots.request)[np.asarray(slots.left) > 0]] = np.inf
    return ended_s


def _slots(n: int) -> int:
    """A power of two."""
    return max(LEAST_SLOTS, 1 << (n - 1).bit_length())


def _round_up(n: int) -> int:
    """The next number of three binary digits: at most a quarter more."""
    if n <= 4:
        return n
    unit = 1 << (n.bit_length() - 3)
    return -(-n // unit) * unit
