"""The exact search of many problems by one program: of at most two pools, over a few hundred thresholds each.

What a problem asks is numbers (`Question`): its engines, limits, rate, prices and the slices of the traffic between its
thresholds. Problems whose numbers have one shape, and that share the requests of a workload, are one group. Programs
are compiled once for a shape and answer problem after problem, so that neither the size of a batch, nor how many
devices share it, changes a bit of an answer. Of each problem they

1. find, for the pool of all requests and for the two pools on either side of each threshold, the least instances that
   hold every limit, and their watts, with each engine;
2. take the cheapest of one pool and of all splits by the objective, fewer pools where they cost the same;
3. evaluate it; or, where no split holds the limits, find the best latencies that a split reaches.

That is the certificate of `optimize`, over these thresholds instead of every window.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from fleetopt_jax._optimize.exact import candidates, evenly
from fleetopt_jax._optimize.graph import Cuts, sums_of
from fleetopt_jax._optimize.problem import Method, Problem
from fleetopt_jax._optimize.search import default_method
from fleetopt_jax.core.struct import as_floats, pytree, static
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import FleetMetrics, pool_metrics, total_metrics
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.fleet.limits import ROUNDING, alone_reached_s
from fleetopt_jax.fleet.sizing import LeastHeld, least_held, least_instances, most_instances, pool_excess
from fleetopt_jax.fleet.stage import Setting, setting_of
from fleetopt_jax.fleet.traffic import PoolTraffic, RunningSums, Slice, slice_traffic
from fleetopt_jax.workload.atoms import Workload

THRESHOLDS = 256  # of a problem, unless asked otherwise
BATCH = 128  # problems of one call
CHUNK = 64  # pools that are sized together: they loop as long as the slowest of them needs

T = TypeVar("T")
Sums = tuple[RunningSums, ...]  # of the requests, for each of the engines


@pytree
class Question:
    """What one problem asks, of P pools: all requests, those below each of S thresholds, those above each, and as many
    more as fill the last chunk. Leaves of these shapes, or with a leading axis of a batch."""

    engines: tuple[Engine, ...]  # E that a pool may have
    per_instance: Array  # price of an instance of each, by the objective [E]
    per_watt: Array  # and of a watt [E]
    slo: Slo
    setting: Setting
    pools: Slice  # [P]
    gamma: Array  # of each pool's boundary [P]
    allowed: Array  # whether its boundaries are in order [P] [bool]
    spared: Array  # whether it may have no traffic [P] [bool]
    n_thresholds: int = static()


@pytree
class Choice:
    """The cheapest fleet of one problem, two pools of which the second may not be there."""

    pool: Array  # index of each among P [2]
    engine: Array  # of each [2]
    n_instances: Array  # [2]
    used: Array  # whether it is there; neither is where no fleet holds the limits [2] [bool]
    homogeneous_w: Array  # least watts of one pool; inf where none holds []


@pytree
class Answers:
    """The best fleets of a batch of B problems; NumPy's."""

    choice: Choice  # leaves [B, ...]
    metrics: FleetMetrics  # leaves [B] and [B, 2]; without meaning where there is no fleet
    holds: Array  # whether it holds its limits when it is evaluated as a whole [B]
    best_ttft_s: Array  # where no fleet holds the limits: what `_best_latencies` says, else 0 [B]
    best_itl_s: Array


# --- one problem, compiled --------------------------------------------------------------------------------------------


def _choice(sums: Sums, asked: Question) -> Choice:
    """The cheapest fleet."""
    costs, instances, watts = [], [], []
    for e, (of_engine, engine) in enumerate(zip(sums, asked.engines, strict=True)):
        n, power_w = _sized(of_engine, engine, asked)
        there = asked.allowed & jnp.isfinite(power_w) & ((n > 0) | asked.spared)
        cost = asked.per_instance[e] * jnp.where(there, n, 0.0) + asked.per_watt[e] * jnp.where(there, power_w, 0.0)
        costs.append(jnp.where(there, cost, jnp.inf))
        instances.append(n)
        watts.append(jnp.where(there, power_w, jnp.inf)[0])
    engine, cost = jnp.argmin(jnp.stack(costs), axis=0), jnp.min(jnp.stack(costs), axis=0)
    both = jnp.append(sum(_of_split(cost, asked)), jnp.inf)
    i = jnp.argmin(both)
    split = both[i] < cost[0]
    pool = jnp.where(split, jnp.stack([1 + i, 1 + asked.n_thresholds + i]), 0)
    found = jnp.isfinite(jnp.minimum(both[i], cost[0]))
    used = found & jnp.stack([jnp.ones_like(split), split])
    return Choice(
        pool=pool,
        engine=engine[pool],
        n_instances=jnp.where(used, jnp.stack(instances)[engine[pool], pool], 0.0),
        used=used,
        homogeneous_w=jnp.min(jnp.stack(watts)),
    )


def _sized(sums: RunningSums, engine: Engine, asked: Question) -> tuple[Array, Array]:
    """(least instances that hold the limits, their watts) of all pools with one engine [P]; inf where none do."""

    def one(pool: Slice) -> tuple[Array, Array]:
        traffic = _traffic(sums, engine, asked, pool)
        least = least_instances(engine, traffic, pool.window_tokens, asked.slo, asked.setting)
        usable = jnp.isfinite(least) & (least > 0)

        def tried(state: tuple[LeastHeld, Array]) -> tuple[LeastHeld, Array]:
            at, watts = state
            metrics = pool_metrics(engine, traffic, pool.window_tokens, at.trial, asked.setting)
            excess = jnp.where(usable, pool_excess(metrics, asked.slo), -1.0)
            return at.after(excess), jnp.where(excess <= ROUNDING, metrics.power_w, watts)  # the last is the least's

        start = least_held(jnp.where(usable, least, 1.0)), jnp.full((), jnp.inf)
        at, watts = jax.lax.while_loop(lambda state: state[0].is_open, tried, start)
        n = jnp.where(usable, at.found, least)
        return n, jnp.where(usable & jnp.isfinite(n), watts, jnp.where(least == 0, 0.0, jnp.inf))

    chunk = min(CHUNK, len(asked.gamma))
    rows = jax.lax.map(jax.vmap(one), jax.tree.map(lambda x: x.reshape(-1, chunk), asked.pools))
    return jax.tree.map(lambda x: x.reshape(-1), rows)


def _traffic(sums: RunningSums, engine: Engine, asked: Question, pool: Slice) -> PoolTraffic:
    setting = asked.setting
    return slice_traffic(sums, engine.prefill, setting.surroundings.compressor, pool, setting.assumptions)


def _of_split(pools: Array, asked: Question) -> tuple[Array, Array]:
    """Of the pools below every threshold, and of those above [S]."""
    n = asked.n_thresholds
    return pools[1 : 1 + n], pools[1 + n : 1 + 2 * n]


def _evaluated(sums: Sums, asked: Question, choice: Choice) -> tuple[FleetMetrics, Array]:
    """The metrics of the fleet, and whether it holds its limits."""
    slices = jax.tree.map(lambda x: x[choice.pool], asked.pools)
    of_each = []
    for of_engine, engine in zip(sums, asked.engines, strict=True):
        traffic = jax.vmap(partial(_traffic, of_engine, engine, asked))(slices)
        traffic = replace(traffic, traffic_frac=jnp.where(choice.used, traffic.traffic_frac, 0.0))
        law = partial(pool_metrics, engine, setting=asked.setting)
        of_each.append(jax.vmap(law)(traffic, slices.window_tokens, choice.n_instances))
    pools = of_each[0]
    for e, other in enumerate(of_each[1:], start=1):
        mine = choice.engine == e
        pools = jax.tree.map(
            lambda x, y, mine=mine: jnp.where(mine.reshape(-1, *(1,) * (x.ndim - 1)), y, x), pools, other
        )
    excess = jax.vmap(lambda pool: pool_excess(pool, asked.slo))(pools)
    metrics = total_metrics(pools)
    metrics = replace(metrics, pools=replace(metrics.pools, ttft=None, itl=None))
    return metrics, jnp.all(~choice.used | (excess <= 2.0 * ROUNDING))


def _best_latencies(sums: Sums, asked: Question) -> tuple[Array, Array]:
    """(P99 TTFT less what the limit grows with the prompt, mean ITL) [s] that splits reach with the most instances
    worth having and one engine in all pools: the TTFT of those within the limit of the ITL, where some are."""
    found = []
    for of_engine, engine in zip(sums, asked.engines, strict=True):

        def one(pool: Slice, of: RunningSums = of_engine, engine: Engine = engine) -> tuple[Array, Array]:
            traffic = _traffic(of, engine, asked, pool)
            least = least_instances(engine, traffic, pool.window_tokens, asked.slo, asked.setting)
            serves = jnp.isfinite(least)
            n = jnp.where(least > 0, most_instances(jnp.where(serves, least, 1.0)), 0.0)
            metrics = pool_metrics(engine, traffic, pool.window_tokens, n, asked.setting)
            reached = alone_reached_s(metrics, asked.slo), metrics.itl_s
            ttft_s, itl_s = (jnp.where(serves, jnp.where(least > 0, each, 0.0), jnp.inf) for each in reached)
            return ttft_s, itl_s

        pools = [jnp.where(asked.allowed, each, jnp.inf) for each in jax.vmap(one)(asked.pools)]
        found.append([jnp.append(each[0], jnp.maximum(*_of_split(each, asked))) for each in pools])
    ttft_s, itl_s = (jnp.concatenate(each) for each in zip(*found, strict=True))
    held = itl_s <= asked.slo.itl_s
    return jnp.min(jnp.where(held | ~jnp.any(held), ttft_s, jnp.inf)), jnp.min(itl_s)


# --- many problems, on all local devices ------------------------------------------------------------------------------


@cache
def _program(law: Callable[..., T], n_devices: int) -> Callable[..., T]:
    """`law(sums, *of_problem)` of a batch of problems that so many local devices share, compiled.

    Each device answers the first `n_asked` of its own, one after another: what is compiled is the law of one problem,
    whatever the batch and its share of it.
    """

    def in_turn(sums: Sums, batch: tuple[Any, ...], n_asked: Array) -> T:
        def nth(i: Array) -> T:
            one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
            return law(sums, *jax.lax.optimization_barrier(one))

        def put(i: Array, kept: T) -> T:
            return jax.tree.map(lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, i, 0), kept, nth(i))

        n = len(jax.tree.leaves(batch)[0])
        nothing = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), jax.eval_shape(nth, jnp.zeros((), int)))
        return jax.lax.fori_loop(0, n_asked[0], put, nothing)

    mesh = Mesh(np.array(jax.local_devices()[:n_devices]), ("problems",))
    shared, parted = PartitionSpec(), PartitionSpec("problems")
    return jax.jit(
        jax.shard_map(in_turn, mesh=mesh, in_specs=(shared, parted, parted), out_specs=parted, check_vma=False)
    )


def _of_all(law: Callable[..., T], sums: Sums, of_problem: tuple[Any, ...]) -> T:
    """The law of at most `BATCH` problems, leaves [B, ...]; NumPy's."""
    n, n_devices = len(jax.tree.leaves(of_problem)[0]), len(jax.local_devices())
    each = math.ceil(BATCH / n_devices)
    rows = np.minimum(np.arange(each * n_devices), n - 1)
    n_asked = np.clip(n - each * np.arange(n_devices), 0, each)
    found = _program(law, n_devices)(sums, jax.tree.map(lambda x: x[rows], of_problem), n_asked)
    return jax.tree.map(lambda x: np.asarray(x)[:n], found)


def answers(sums: Sums, questions: Sequence[Question]) -> Answers:
    """The answers to at most `BATCH` questions of one shape, of problems that share `sums`."""
    asked = jax.tree.map(lambda *x: np.stack(x), *questions)
    choice = _of_all(_choice, sums, (asked,))
    metrics, holds = _of_all(_evaluated, sums, (asked, choice))
    best_s, none = np.zeros((2, len(questions))), ~choice.used[:, 0]
    if none.any():
        best_s[:, none] = _of_all(_best_latencies, sums, (jax.tree.map(lambda x: x[none], asked),))
    return Answers(choice, metrics, cast(Array, holds | none), *cast(Array, best_s))


# --- from problems to questions ---------------------------------------------------------------------------------------


def is_batched(problem: Problem, method: Method | None) -> bool:
    """Whether the program answers it: the exact search of one service in one period, of at most two pools that hold
    their limits each by itself, served whole, with a given gamma, no budget, and prompts that do not depend on what
    caches hold."""
    return (
        (method or default_method(problem)) == "exact"
        and len(problem.services) == len(problem.periods) == 1
        and problem.n_pools <= 2
        and problem.service.serve == "mixed"
        and problem.gamma is not None
        and problem.slo.scope == "pool"
        and not (problem.budget.caps or problem.free or problem.assumptions.prefix_cache.reads_reuse)
    )


class Requests:
    """The requests of a workload, whatever their rate: equal where they hold the same."""

    def __init__(self, workload: Workload):
        parts = workload.prompt_tokens, workload.output_tokens, workload.weight, workload.routed_tokens
        self.content = _content(_Arrays(parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Requests) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


class _Arrays:
    """Arrays by what they are, not by what they hold."""

    def __init__(self, parts: tuple[Any, ...]):
        self.parts = parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Arrays) and all(x is y for x, y in zip(self.parts, other.parts))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.parts)))


@lru_cache(maxsize=4096)
def _content(arrays: _Arrays) -> bytes:
    return hashlib.sha256(b"|".join(b"" if x is None else np.asarray(x).tobytes() for x in arrays.parts)).digest()


@dataclass(frozen=True)
class Asked:
    """A problem, and what it asks the program."""

    problem: Problem
    question: Question
    requests: Requests
    n_windows: int  # that differ, of its thresholds

    @property
    def shape(self) -> tuple:
        """Equal for problems that one call may answer: the same program, and the same requests."""
        leaves, structure = jax.tree.flatten(self.question)
        return structure, tuple(np.shape(x) for x in leaves), self._sums_key()

    def _sums_key(self) -> "_SumsKey":
        problem = self.problem
        reads_chunk = problem.assumptions.prefill.reads_chunk
        chunks = tuple(float(x.prefill.chunk_tokens) if reads_chunk else 0.0 for x in problem.engines)
        return _SumsKey(self.requests, problem.assumptions, chunks, problem.gamma != 1.0, problem)

    def sums(self) -> Sums:
        """Of the requests, for each engine."""
        return _sums(self._sums_key())


@dataclass(frozen=True)
class _SumsKey:
    """All that the sums of a problem's requests depend on."""

    requests: Requests
    assumptions: Assumptions
    chunks: tuple[float, ...]
    compresses: bool
    problem: Problem = field(compare=False)


@lru_cache(maxsize=4)
def _sums(key: _SumsKey) -> Sums:
    return tuple(sums_of(key.problem, key.problem.engines, compresses=key.compresses))


@dataclass(frozen=True)
class _CutKey:
    """All that the thresholds of a problem, and the slices between them, depend on."""

    requests: Requests
    assumptions: Assumptions
    window_tokens: float
    gamma: float
    n_thresholds: int
    problem: Problem = field(compare=False)


class _Division(NamedTuple):
    """The pools [P] that thresholds make."""

    pools: Slice
    gamma: np.ndarray
    allowed: np.ndarray
    spared: np.ndarray
    n_windows: int


@lru_cache(maxsize=1024)
def _divided(key: _CutKey) -> _Division:
    windows, gammas = np.zeros(0), np.zeros(0)
    if key.n_thresholds:
        windows, gammas = candidates(key.problem)
        kept = _spread(key.problem.workload, windows, key.n_thresholds)
        windows, gammas = windows[kept], gammas[kept]
    cuts = Cuts.of(key.problem, windows, gammas)
    inner, last = np.arange(1, cuts.last), cuts.last
    if len(inner) < key.n_thresholds:  # one shape for all: the last threshold again, or none below the only window
        inner = np.append(inner, np.full(key.n_thresholds - len(inner), inner[-1] if len(inner) else last))
    lower = np.concatenate([[0], np.zeros_like(inner), inner])
    upper = np.concatenate([[last], inner, np.full_like(inner, last)])
    filled = np.minimum(np.arange(_filled(len(lower))), len(lower) - 1)
    lower, upper = lower[filled], upper[filled]
    allowed, spared = cuts.in_order(lower, upper), cuts.spared(lower, upper)
    return _Division(cuts.slices(lower, upper), cuts.gamma[upper], allowed, spared, len(windows))


def _spread(workload: Workload, windows: np.ndarray, most: int) -> np.ndarray:
    """Indices of so many windows: as `evenly` has them, and of the others every so-manieth."""
    if len(windows) <= most:
        return np.arange(len(windows))
    kept = evenly(workload, windows, most)
    others = np.setdiff1d(np.arange(len(windows)), kept)
    return np.union1d(kept, others[np.linspace(0, len(others) - 1, most - len(kept)).astype(int)])


def _filled(n_pools: int) -> int:
    """So many pools that whole chunks of them are made."""
    return n_pools if n_pools <= CHUNK else CHUNK * math.ceil(n_pools / CHUNK)


def asked_of(problem: Problem, n_thresholds: int = THRESHOLDS) -> Asked:
    """What a problem asks, over at most so many thresholds: even in a mean of requests, tokens and log-length."""
    requests = Requests(problem.service.workload)
    n_thresholds = n_thresholds if problem.n_pools > 1 else 0
    assert problem.gamma is not None  # `is_batched`
    key = _CutKey(requests, problem.assumptions, problem.window_tokens, problem.gamma, n_thresholds, problem)
    prices, division = problem.prices(problem.search_weights), _divided(key)
    question = Question(
        engines=problem.engines,
        **as_floats(per_instance=prices.per_instance, per_watt=prices.per_watt),
        slo=problem.slo,
        setting=setting_of(problem.workload, problem.around, problem.assumptions),
        **{name: getattr(division, name) for name in ("pools", "gamma", "allowed", "spared")},
        n_thresholds=n_thresholds,
    )
    return Asked(problem, question, requests, division.n_windows)


def fingerprint(problem: Problem) -> bytes:
    """Of all that a problem asks: equal for equal problems, in any process."""
    workload = problem.service.workload
    reuse = () if workload.reuse is None else tuple(jax.tree.leaves(workload.reuse))
    shared = [_Arrays(reuse), *(_Arrays(tuple(jax.tree.leaves(engine))) for engine in problem.engines)]
    numbers = workload.arrival_rate_per_s, workload.arrival_scv, workload.longest_tokens, problem.slo, problem.around
    asked = (problem.periods, problem.window_tokens, problem.n_pools, problem.gamma, problem.objective, problem.budget)
    served = problem.service.serve, problem.service.link
    names = repr((problem.specs, served, problem.assumptions, problem.slo.scope, problem.free, *asked))
    parts = [Requests(workload).content, *map(_content, shared), names.encode()]
    return hashlib.sha256(b"|".join([*parts, *(np.asarray(x).tobytes() for x in jax.tree.leaves(numbers))])).digest()
