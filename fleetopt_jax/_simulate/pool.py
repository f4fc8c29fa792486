"""One pool's instances over all its requests: dispatch, batch, dispatch, ..., in one compiled loop."""

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax._simulate.batching import finished, run_until
from fleetopt_jax._simulate.dispatch import Balancer, Up, dispatch
from fleetopt_jax._simulate.kept import Kept, PromptBlocks, homes_of, nothing_kept
from fleetopt_jax._simulate.outages import Outages, Standing, failed, standings
from fleetopt_jax._simulate.state import NEVER, RequestTable, Scheduler, State, Sums, Tally, empty_state
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.choices.dispatch import Dispatch
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.prefix_cache import HostCache, spared_by_host_frac

MOST_SENT = 256  # requests of a replication dispatched at once
SEGMENT = 128  # dispatches between two signs of progress
LEAST_SLOTS = 16
SLOT_BYTES = 5 * 4 + 2 * 8  # of `Slots`
MEMORY_BYTES = 1e9  # of the slots of the replications that run together


@dataclass(frozen=True)
class Course:
    """How many instances of a pool take requests, from when on; the others finish what they have. Arrays [P]."""

    from_s: np.ndarray  # rising, the first not after the first request [s]
    n_instances: np.ndarray

    def at(self, now_s: np.ndarray) -> np.ndarray:
        """At these moments."""
        return self.n_instances[np.searchsorted(self.from_s, now_s, side="right") - 1]


@dataclass(frozen=True)
class Pool:
    """What serves: equal instances of one engine."""

    engine: Engine
    scheduler: Scheduler
    n_instances: int
    outages: Outages | None = None  # None: nothing fails
    course: Course | None = None  # where not all of them take requests all the time, of one replication


@dataclass(frozen=True)
class PoolRequests:
    """What a pool gets; numpy arrays [R, m], padded at the end with arrivals that never come."""

    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    found_tokens: np.ndarray | None = None  # of the prompts, in a cache; None where there is none
    blocks: PromptBlocks | None = None  # where the cache decides what is found

    def rows(self, some: slice) -> "PoolRequests":
        """Some of the replications."""
        arrival_s, prompt, output = (x[some] for x in (self.arrival_s, self.prompt_tokens, self.output_tokens))
        found = None if self.found_tokens is None else self.found_tokens[some]
        blocks = None if self.blocks is None else self.blocks.rows(some)
        return PoolRequests(arrival_s, prompt, output, found, blocks)


@dataclass(frozen=True)
class Room:
    """What a compiled program has room for. Another pool that needs no more can run by it, a little slower."""

    n_instances: int
    n_slots: int  # of an instance
    n_requests: int  # of a replication
    n_blocks: int = 0  # of prompts, where caches keep them: at least, for more are taken where there are more
    n_blocks_each: int = 0  # of a prompt

    @property
    def size(self) -> int:
        """What a run takes, about: slots of all instances."""
        return self.n_instances * self.n_slots


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
    n_slots: int = 0  # of an instance, that were enough
    found_tokens: np.ndarray | None = None  # of prompts when they were admitted; None without a cache [R, m]
    before: "PoolRun | None" = None  # of the stage that prefilled, where there are two
    outages: Outages | None = None  # of its instances


def run_pool(
    pool: Pool,
    requests: PoolRequests,
    horizon_s: np.ndarray,
    balancer: Balancer,
    *,
    n_slots: int = 64,
    room: Room | None = None,
    progress: Progress | None = None,
) -> PoolRun:
    """Every iteration of the pool's instances until `horizon_s` [R], after which nothing is computed any more.

    `n_slots` is where to start: where it proves too few for the batches that come, the run starts again with twice as
    many, so that memory follows the batches that come and not the largest allowed. Replications whose slots would take
    more than `MEMORY_BYTES` together run one after another. Shapes are rounded up so that fleets of about the same size
    share one compilation; with a `room`, which says where the slots start too, they are its own.
    """
    n_groups = len(horizon_s)
    room = room or Room(_round_up(pool.n_instances), _slots(n_slots), _round_up(requests.arrival_s.shape[1]))
    n_blocks = 0 if requests.blocks is None else requests.blocks.size_tokens.shape[1]
    n_tiers = 1 if _host_of(pool.engine)[0] is None else 2
    block_bytes = 4 * n_tiers * room.n_instances * n_blocks
    at_once = max(1, int(MEMORY_BYTES // (room.size * SLOT_BYTES + block_bytes)))
    if n_groups <= at_once:
        run = _run_together(pool, requests, horizon_s, balancer, room, progress)
        wider = replace(room, n_slots=_slots(2 * room.n_slots))
        return run or run_pool(pool, requests, horizon_s, balancer, room=wider, progress=progress)
    parts = []
    for start in range(0, n_groups, at_once):
        some = slice(start, start + at_once)
        outages = pool.outages and pool.outages.rows(start, at_once)
        scheduler = replace(pool.scheduler, window_s=pool.scheduler.window_s[some])
        part = replace(pool, scheduler=scheduler, outages=outages)
        part_balancer = replace(balancer, first_replication=balancer.first_replication + start)
        parts.append(run_pool(part, requests.rows(some), horizon_s[some], part_balancer, room=room, progress=progress))
    return replace(_joined(parts), outages=pool.outages)


def _run_together(
    pool: Pool,
    requests: PoolRequests,
    horizon_s: np.ndarray,
    balancer: Balancer,
    room: Room,
    progress: Progress | None,
) -> PoolRun | None:
    """All replications side by side; None where the slots prove too few."""
    n_groups, n_requests = requests.arrival_s.shape
    width, n_padded = room.n_requests, room.n_instances
    kept = _kept(requests, pool, room, balancer.seed)
    policy = balancer.policy
    comes_and_goes = pool.outages is not None or pool.course is not None
    looks = policy.looks_at_queues or (policy.shares_caches and kept is not None) or comes_and_goes
    ticks = _ticks(pool, requests.arrival_s, horizon_s, balancer, looks=looks)
    table = request_table(requests, width)
    state = replace(_empty_state(table, n_groups, n_padded, room.n_slots), kept=kept)
    keys = _keys(balancer.seed, np.arange(n_groups) + balancer.first_replication)
    serving = _Serving(keys, np.arange(n_padded) < pool.n_instances)
    way = partial(_segment, engine=pool.engine, scheduler=pool.scheduler, policy=policy)
    stretches = [None] if pool.outages is None else standings(pool.outages, ticks.now_s, serving.serves)
    down = np.broadcast_to(~serving.serves, (n_groups, n_padded))
    for stretch in stretches:
        first, last = (stretch.first, stretch.last) if stretch else (0, len(ticks.now_s))
        if stretch:
            serving = serving._replace(up=Up(stretch.down, stretch.order, stretch.n_up))
            if (stretch.down & ~down).any():
                state = way(state, ticks=ticks.pause_at(first), serving=serving)
                at = ticks.now_s[first], ticks.n_instances[first]
                state = _lost(state, table, stretch, down, at, serving, policy)
            down = stretch.down
        for start in range(first, last, SEGMENT):
            state = way(state, ticks=ticks.part(start, min(start + SEGMENT, last)), serving=serving)
            if bool(state.cramped):
                return None
            if progress:
                progress(start + SEGMENT, len(ticks.now_s))
    return replace(_result(state, n_groups, n_requests, room, pool.n_instances), outages=pool.outages)


def _lost(
    state: State,
    table: RequestTable,
    stretch: Standing,
    down: np.ndarray,
    at: tuple[np.ndarray, np.ndarray],
    serving: "_Serving",
    policy: Dispatch,
) -> State:
    """What becomes of the requests on instances that are down from now on and were not `down` [R, N]: they are sent
    again, at that moment and to as many as are in service."""
    whole = np.asarray(table.prompt_tokens), np.asarray(table.output_tokens)
    dies = (stretch.down & ~down).ravel()
    emptied, again = failed(state, dies, stretch.until_s.ravel(), whole)
    state = jax.tree.map(jnp.array, emptied)
    n_groups = len(at[0])
    width = table.nobody // n_groups
    rows = [again[again // width == g] for g in range(n_groups)]
    for start in range(0, max(len(row) for row in rows), MOST_SENT):
        sent = np.full((n_groups, MOST_SENT), table.nobody, np.int32)
        for g, row in enumerate(rows):
            some = row[start : start + MOST_SENT]
            sent[g, : len(some)] = some
        state = _again(state, sent, np.full(n_groups, start), *at, serving, policy=policy)
    return state


def _kept(requests: PoolRequests, pool: Pool, room: Room, seed: int) -> Kept | None:
    """Empty caches, where the blocks of prompts are known."""
    if requests.blocks is None:
        return None
    homes = homes_of(requests.blocks, pool.n_instances, seed)
    about = room.n_requests, room.n_instances, room.n_slots
    least = room.n_blocks, room.n_blocks_each
    return nothing_kept(requests.blocks, homes, *about, *_host_of(pool.engine), least=least)


def _host_of(engine: Engine) -> tuple[HostCache | None, float]:
    """The tier on the hosts of an instance and what that spares of a token's prefill; none where nothing is spared."""
    if engine.host_cache is None:
        return None, 0.0
    spared_frac = float(spared_by_host_frac(engine.host_cache, engine.prefill.per_token_s))
    return (engine.host_cache, spared_frac) if spared_frac > 0 else (None, 0.0)


def _in_service(pool: Pool, now_s: np.ndarray) -> np.ndarray:
    """How many instances take what is dispatched at these moments [T, R]: [T]."""
    if pool.course is None:
        return np.full(len(now_s), pool.n_instances)
    if now_s.shape[1] != 1:
        raise ValueError("need one replication where instances come and go")
    return pool.course.at(now_s[:, 0]).astype(int)


@dataclass(frozen=True)
class _Ticks:
    """Dispatches of all replications side by side, numpy arrays [T, R]."""

    now_s: np.ndarray  # when; the router knows the queues of that moment
    start: np.ndarray  # first request sent
    count: np.ndarray  # how many
    n_instances: np.ndarray  # in service [T]

    def part(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Of these, and as many more at the last's time in which nobody is sent as fill a segment."""
        rows = np.minimum(np.arange(first, first + SEGMENT), last - 1)
        part = {name: values[rows] for name, values in vars(self).items()}
        part["count"] = np.where((np.arange(first, first + SEGMENT) < last)[:, None], part["count"], 0)
        return part

    def pause_at(self, tick: int) -> dict[str, np.ndarray]:
        """A segment that runs until then, and in which nobody is sent."""
        part = self.part(tick, tick + 1)
        return part | {"count": np.zeros_like(part["count"])}


def _ticks(pool: Pool, arrival_s: np.ndarray, horizon_s: np.ndarray, balancer: Balancer, *, looks: bool) -> _Ticks:
    """A dispatch for every stretch of `staleness_s` in which requests come, or more where they are too many.

    Where nobody `looks` at the queues, or at what is up, everything is dispatched beforehand. Nobody is sent at the
    horizon.
    """
    staleness_s, columns = balancer.staleness_s, []
    for row, end_s in zip(arrival_s, horizon_s):
        times = row[np.isfinite(row)]
        if not looks:
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
    return _Ticks(now_s, start, count, _in_service(pool, now_s))


def request_table(requests: PoolRequests, width: int) -> RequestTable:
    """The requests of all replications one after another, each padded to `width`."""
    n_groups, n = requests.arrival_s.shape
    nobody = n_groups * width

    def column(values: np.ndarray, pad, dtype) -> np.ndarray:
        padded = np.full((n_groups, width), pad, dtype)
        padded[:, :n] = values
        return np.append(padded.ravel(), np.asarray(pad, dtype))

    never = np.full(nobody + 1, NEVER)
    columns: dict[str, Any] = {
        "arrival_s": column(requests.arrival_s, np.inf, float),
        "prompt_tokens": column(requests.prompt_tokens, 0, np.int32),
        "output_tokens": column(requests.output_tokens, 0, np.int32),
        "next": np.full(nobody + 1, nobody, np.int32),
    }
    columns |= {name: never for name in ("admit_s", "first_s", "last_s")}
    if requests.found_tokens is not None:
        columns["found_tokens"] = column(requests.found_tokens, 0, np.int32)
    elif requests.blocks is not None:
        columns["found_tokens"] = np.zeros(nobody + 1, np.int32)
    return RequestTable(**columns)


def _for_speed() -> dict[str, bool] | None:
    """Options that undo, for loops that run for long, a flag that compiles quickly what then runs half as fast. Where
    the flag is not set the compiler may not know it."""
    quick = "--xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")
    return {"xla_cpu_use_fusion_emitters": True} if quick else None


# One program makes all arrays, each with a buffer of its own, so that it can be given away.
_empty_state = jax.jit(empty_state, static_argnums=(1, 2, 3))


@jax.jit
def _keys(seed: int, numbers: Array) -> Array:
    """Random numbers of each replication's own."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)


class _Serving(NamedTuple):
    """Who serves, and how it is chosen; JAX's or NumPy's."""

    keys: Any  # of random numbers [R]
    serves: Any  # which instances of those there is room for [N]
    up: Up | None = None  # which of them are up; None: all


@partial(jax.jit, static_argnames="policy", donate_argnames="state", compiler_options=_for_speed())
def _segment(
    state: State,
    engine: Engine,
    scheduler: Scheduler,
    ticks: dict[str, Array],
    serving: _Serving,
    *,
    policy: Dispatch,
) -> State:
    """`SEGMENT` times: run until the next dispatch, then dispatch."""
    n_groups, nobody = len(state.gap_counts), state.table.nobody
    width = nobody // n_groups

    def tick(state: State, row: dict[str, Array]) -> tuple[State, None]:
        now_s, start = row["now_s"], row["start"]
        state = run_until(state, engine, scheduler, jnp.where(serving.serves, now_s[:, None], 0.0).ravel())
        sent = jnp.arange(MOST_SENT)
        numbers = start[:, None] + sent + width * jnp.arange(n_groups)[:, None]
        numbers = jnp.where(sent < row["count"][:, None], numbers, nobody).astype(jnp.int32)
        now_keys = jax.vmap(jax.random.fold_in)(serving.keys, start)
        about = {"keys": now_keys, "n_instances": row["n_instances"], "up": serving.up}
        return dispatch(state, numbers, policy, rank=start, now_s=now_s, **about), None

    return jax.lax.scan(tick, state, ticks)[0]


@partial(jax.jit, static_argnames="policy")
def _again(
    state: State,
    requests: Array,
    rank: Array,
    now_s: Array,
    n_instances: Array,
    serving: _Serving,
    *,
    policy: Dispatch,
) -> State:
    """Requests that were lost, sent to whom is up."""
    keys = jax.vmap(jax.random.fold_in)(serving.keys, requests[:, 0])
    about = {"keys": keys, "n_instances": n_instances, "up": serving.up}
    return dispatch(state, requests, policy, rank=rank, now_s=now_s, **about)


def _result(state: State, n_groups: int, n_requests: int, room: Room, n_instances: int) -> PoolRun:
    table, width = finished(state), room.n_requests

    def times(values: Array | np.ndarray) -> np.ndarray:
        return np.asarray(values)[:-1].reshape(n_groups, width)[:, :n_requests]

    def sums(values: Sums) -> np.ndarray:
        return np.asarray(values).reshape(n_groups, -1)[:, :n_instances]

    instances = state.instances
    return PoolRun(
        admit_s=times(table.admit_s),
        first_s=times(table.first_s),
        last_s=times(_ended(state, table.last_s)),
        tally=Tally(*(sums(values) for values in state.tally)),
        gap_counts=np.asarray(state.gap_counts),
        in_system=np.sum(sums(instances.n_waiting + instances.n_running), axis=1),
        memory_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        n_slots=room.n_slots,
        found_tokens=None if table.found_tokens is None else times(table.found_tokens),
    )


def _joined(parts: list[PoolRun]) -> PoolRun:
    """Replications that ran one after another."""

    def rows(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    cached = all(part.found_tokens is not None for part in parts)
    return PoolRun(
        admit_s=rows("admit_s"),
        first_s=rows("first_s"),
        last_s=rows("last_s"),
        gap_counts=rows("gap_counts"),
        in_system=rows("in_system"),
        tally=Tally(*map(np.concatenate, zip(*(part.tally for part in parts)))),
        memory_bytes=max(part.memory_bytes for part in parts),
        n_slots=max(part.n_slots for part in parts),
        found_tokens=rows("found_tokens") if cached else None,
    )


def _ended(state: State, last_s: Array) -> np.ndarray:
    """Times of the last tokens; who is still there, or was preempted and never came back, has none."""
    slots = state.slots
    ended_s, following = np.array(last_s), np.asarray(state.table.next)
    waiting = np.asarray(state.instances.head)[np.asarray(state.instances.n_waiting) > 0]
    while len(waiting):
        ended_s[waiting] = np.inf
        waiting = following[waiting]
        waiting = waiting[waiting < len(following) - 1]
    ended_s[np.asarray(slots.request)[np.asarray(slots.left) > 0]] = np.inf
    return ended_s


def _slots(n: int) -> int:
    return max(LEAST_SLOTS, _round_up(n))


def _round_up(n: int) -> int:
    """The next number of three binary digits: at most a quarter more."""
    if n <= 4:
        return n
    unit = 1 << (n.bit_length() - 3)
    return -(-n // unit) * unit
