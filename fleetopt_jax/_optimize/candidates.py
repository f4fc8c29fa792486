"""Scoring many candidate fleets at once, and walking downhill from one of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax._optimize.plan import Found, nothing
from fleetopt_jax._optimize.problem import GAMMA_MAX, Problem, assignments, thresholds
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.core.threads import in_batches
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.evaluate import fleet_metrics, for_each_lane
from fleetopt_jax.fleet.fleet import Fleet, Slo, fleet_of
from fleetopt_jax.fleet.limits import ROUNDING, reached
from fleetopt_jax.fleet.resources import Resources, Weights
from fleetopt_jax.fleet.sizing import most_instances, sized_lanes, worth_having
from fleetopt_jax.fleet.stage import setting_of
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.laws.routing import router_edges
from fleetopt_jax.workload.atoms import Workload

BATCH = 8192  # candidates of one compiled call: fixed, so that a search compiles once
CHUNK = 1024  # of them that are sized together
FEW = 64  # the same where a tail has a distribution: a candidate costs a hundred times as much
CACHED = 4  # and where what is found depends on the cache: a table of the reuse of each
GAMMA_STEP = 0.05
NEAREST = 8  # thresholds on either side that are tried however far they are


class Effort(NamedTuple):
    """How many candidates a search may try."""

    every: int = 150_000  # where there are no more, all of them
    coarse: int = 12_000  # where there are more, or gamma is searched as well: coarse first, then around the best
    neighbours: int = 16_384  # of one move of the coordinate search
    latencies: int = BATCH  # windows for the best latencies
    radii: tuple[float, ...] = ()  # around the best, of one coordinate search after the other


FULL = Effort()
SPARING = Effort(every=160, coarse=96, neighbours=32, latencies=24, radii=(0.25, 0.03, 0.0))


def effort_of(problem: Problem) -> Effort:
    """What can be afforded: with a cache whose hits depend on instances, a candidate costs some hundred times as much
    and so many fewer are tried."""
    return SPARING if problem.assumptions.prefix_cache.reads_reuse else FULL


@pytree
class WeightRows:
    """`Weights` as numbers that a compiled search holds: Q of them, of a fleet with K engines."""

    of_totals: Array  # over watts, USD/h, kg CO2/h and GPUs of all pools [Q, 4]
    of_gpus: Array  # further, over the GPUs of each engine [Q, K]

    def used(self, totals: Resources, gpus: Array) -> Array:
        """The weighted sums [Q] of a fleet's totals and of the GPUs of each of its engines [K]."""
        plain = jnp.stack([totals.power_w, totals.usd_per_h, totals.kg_co2_per_h, totals.n_gpus])
        return self.of_totals @ plain + self.of_gpus @ gpus


def weight_rows(weights: Iterable[Weights], specs: Sequence[EngineSpec]) -> WeightRows:
    """The weights, of a fleet whose pools have these engines."""
    weights = list(weights)
    of_totals = [[each.power_w, each.usd_per_h, each.kg_co2_per_h, each.n_gpus] for each in weights]
    of_gpus = [[each.gpus_of.get(spec.gpu_name, 0.0) for spec in specs] for each in weights]
    return WeightRows(
        **as_floats(of_totals=np.reshape(of_totals, (-1, 4)), of_gpus=np.reshape(of_gpus, (-1, len(specs))))
    )


@pytree
class Caps:
    """A `Budget` as numbers that a compiled search holds: Q limits, of a fleet with K engines."""

    most: Array  # [Q]
    limits: WeightRows

    def excesses(self, totals: Resources, gpus: Array) -> Array:
        """Use of every cap over it, less one [Q], arguments as in `WeightRows.used`: not positive where it holds."""
        used = self.limits.used(totals, gpus)
        return used / jnp.maximum(self.most, 1e-9) - 1.0


def make_caps(problem: Problem, specs: Sequence[EngineSpec]) -> Caps:
    """The caps of a fleet whose pools have these engines."""
    most = list(problem.budget.caps.values())
    return Caps(limits=weight_rows(problem.limit_weights.values(), specs), **as_floats(most=most))


@partial(program, static_argnames="assumptions")
def score_batch(
    fleet: Fleet,
    boundaries: tuple[Array, Array],
    n_asked: int,
    workload: Workload,
    slo: Slo,
    *,
    assumptions: Assumptions,
    objective: WeightRows,
    caps: Caps,
) -> tuple[Array, Array]:
    """(costs [M], instances [M, K]) of M candidates, the first `n_asked` of them at least: `fleet` with windows and
    gammas [M, K] for `boundaries`, each sized to hold `slo`.

    The cost is inf where the limits cannot be held or a cap is exceeded, and where the longest request the last window
    promises is accepted by no pool with traffic.
    """

    def score(windows: Array, gammas: Array, traffic: PoolTraffic, grown: Array) -> tuple[Array, Array, Array]:
        there = _with_boundaries(fleet, windows, gammas)
        n_instances, resources, grown = sized_lanes(there, traffic, workload, slo, assumptions, grown)
        used = jax.tree.map(jnp.sum, resources), resources.n_gpus
        feasible = _promised(traffic, windows, gammas) & jnp.all(jnp.isfinite(n_instances))
        feasible &= jnp.all(caps.excesses(*used) <= ROUNDING)
        # Every fleet that holds its limits has the same output, so its weighted resources are what is compared.
        (cost,) = objective.used(*used)
        return jnp.where(feasible, cost, jnp.inf), n_instances, grown

    # All are routed at once, for the running sums are common to them, but sized in chunks: a chunk loops as long as the
    # slowest of its candidates needs, its numbers stay in the cache, and those that nobody asked for cost nothing. The
    # candidates of a chunk lie apart, so that those of the next are their neighbours, which begin with what they came
    # to. The reuse of a candidate is a table that is made where it is read.
    cached = assumptions.prefix_cache.reads_reuse

    def routed(windows: Array, gammas: Array) -> PoolTraffic:
        return route(_with_boundaries(fleet, windows, gammas), workload, assumptions, many=not cached)

    window_tokens, gamma = boundaries
    size = min(CACHED if cached else FEW if assumptions.tail.has_distribution else CHUNK, len(window_tokens))
    m, n_chunks = len(window_tokens), (n_asked + size - 1) // size
    rows = place = jnp.arange(m)
    if assumptions.tail.has_distribution:  # else the first try decides, and neighbours share what they read
        rows, place = _apart(m, size, n_chunks)
    boundaries = window_tokens[rows], gamma[rows]
    candidates = boundaries if cached else (*boundaries, jax.vmap(routed)(*boundaries))

    def scored(i: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        chunk = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size), candidates)
        windows, gammas, traffic = (*chunk, jax.vmap(routed)(*chunk)) if cached else chunk
        costs, n_instances, grown = jax.vmap(score)(windows, gammas, traffic, found[2])
        return (
            jax.lax.dynamic_update_slice_in_dim(found[0], costs, i * size, 0),
            jax.lax.dynamic_update_slice_in_dim(found[1], n_instances, i * size, 0),
            grown,
        )

    nothing_yet = jnp.full(m, jnp.inf), jnp.zeros(window_tokens.shape)
    as_the_load = jnp.ones((size, window_tokens.shape[1]))
    costs, n_instances, _ = jax.lax.fori_loop(0, n_chunks, scored, (*nothing_yet, as_the_load))
    return jnp.where(jnp.arange(m) < n_asked, costs[place], jnp.inf), n_instances[place]


def _apart(m: int, size: int, n_chunks: ArrayLike) -> tuple[Array, Array]:
    """(which of m candidates is at each place, the place of each) where a chunk has every so manieth of them."""
    at = jnp.arange(m)
    return jnp.minimum(at % size * n_chunks + at // size, m - 1), jnp.minimum(
        at % n_chunks * size + at // n_chunks, m - 1
    )


def _with_boundaries(fleet: Fleet, windows: Array, gammas: Array) -> Fleet:
    return fleet_of(fleet.engines, windows, gammas, fleet.n_instances, fleet.surroundings)


@partial(program, static_argnames="assumptions")
def best_latencies_batch(
    fleet: Fleet,
    window_tokens: Array,
    gamma: Array,
    workload: Workload,
    slo: Slo,
    *,
    assumptions: Assumptions,
) -> tuple[Array, Array]:
    """(P99 TTFT less what the limit grows with the prompt [s], mean ITL [s]) [M] with the most instances worth having.

    In the scope of `slo`; inf where a pool's instance cannot run a sequence of its window.
    """

    setting = setting_of(workload, fleet.surroundings, assumptions)
    cached = assumptions.prefix_cache.reads_reuse

    def best(windows: Array, gammas: Array) -> tuple[Array, Array]:
        there = _with_boundaries(fleet, windows, gammas)
        traffic = route(there, workload, assumptions, many=not cached)
        least, most = for_each_lane(
            lambda engine, pool, window: worth_having(engine, pool, window, slo, setting),
            there.engines,
            traffic,
            windows,
        )
        most = jnp.where(least > 0, jnp.where(jnp.isfinite(least), most, most_instances(1.0)), 0.0)
        metrics = fleet_metrics(there.with_instances(most), traffic, workload, assumptions, quantiles=False)
        serves = _promised(traffic, windows, gammas) & jnp.all(jnp.isfinite(least))
        ttft_s, itl_s = reached(metrics, slo)
        return jnp.where(serves, ttft_s, jnp.inf), jnp.where(serves, itl_s, jnp.inf)

    if cached:
        return jax.lax.map(lambda row: best(*row), (window_tokens, gamma), batch_size=CACHED)
    return jax.vmap(best)(window_tokens, gamma)


def _promised(traffic: PoolTraffic, windows: Array, gammas: Array) -> Array:
    """Whether a pool with traffic accepts the longest request the last window promises."""
    busy = traffic.traffic_frac > 0
    return jnp.max(jnp.where(busy, router_edges(windows, gammas), 0.0)) >= windows[-1]


Candidate = tuple[float, np.ndarray, np.ndarray]  # (cost, windows [K], gammas [K])


def over_assignments(
    problem: Problem,
    search: Callable[["Scorer", Progress | None], tuple[Candidate, bool]],
    progress: Progress | None,
    candidates: str,
) -> Found:
    """The best of what `search` finds for every assignment of engines to pools; certified where each of them is.
    `candidates` says in words what it was searched over."""
    scorers = [Scorer(problem, specs) for specs in assignments(problem)]
    found = [search(scorer, progress) for scorer in scorers]
    certified = all(exhaustive for _, exhaustive in found)
    scored = [(scorer, candidate) for scorer, (candidate, _) in zip(scorers, found)]
    return best_found(scored, candidates, certified=certified)


def best_found(found: Sequence[tuple["Scorer", Candidate]], candidates: str, *, certified: bool) -> Found:
    """The best of candidates, each with the scorer that knows its engines."""
    scorer, (cost, windows, gammas) = min(found, key=lambda each: each[1][0])
    n_evaluated = sum(each.n_evaluated for each in {id(each): each for each, _ in found}.values())
    if not math.isfinite(cost):
        return nothing(n_evaluated, candidates, certified=certified)
    n_instances = scorer.instances(windows, gammas)
    return Found(cost, scorer.specs, windows, gammas, n_instances, certified, n_evaluated, candidates)


class Scorer:
    """Scores candidates of one problem and engine assignment, counting them."""

    def __init__(self, problem: Problem, specs: tuple[EngineSpec, ...]):
        self.problem, self.specs, self.n_evaluated = problem, specs, 0
        self.thresholds = thresholds(problem)
        none = np.ones(len(specs))
        self._fleet = problem.fleet(specs, none, none, none)
        self._caps = make_caps(problem, specs)
        self._objective = weight_rows([problem.search_weights], specs)

    def _score(self, windows: np.ndarray, gammas: np.ndarray, n_asked: int) -> tuple[np.ndarray, np.ndarray]:
        problem = self.problem
        found = score_batch(
            self._fleet,
            (jnp.asarray(windows), jnp.asarray(gammas)),
            n_asked,
            problem.workload,
            problem.slo,
            assumptions=problem.assumptions,
            objective=self._objective,
            caps=self._caps,
        )
        return np.asarray(found[0]), np.asarray(found[1])

    def instances(self, windows: np.ndarray, gammas: np.ndarray) -> np.ndarray:
        """The instances [K] of one candidate [K]; in a batch of itself, as a search has compiled it."""
        rows = (BATCH, len(self.specs))
        return self._score(np.broadcast_to(windows, rows), np.broadcast_to(gammas, rows), 1)[1][0]

    def __call__(self, windows: np.ndarray, gammas: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """Costs [M] of candidates [M, K]."""
        self.n_evaluated += len(windows)
        if not len(windows):
            return np.empty(0)

        def kernel(some: tuple[np.ndarray, np.ndarray], n_asked: int) -> np.ndarray:
            return self._score(*some, n_asked)[0]

        return in_batches(kernel, BATCH, (windows, gammas), progress=progress)

    def best_latencies(self, windows: np.ndarray, gammas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(TTFT, ITL) [M] of candidates [M, K] with the most instances worth having; see `best_latencies_batch`."""
        problem, of = self.problem, {"assumptions": self.problem.assumptions}
        found = best_latencies_batch(
            self._fleet, jnp.asarray(windows), jnp.asarray(gammas), problem.workload, problem.slo, **of
        )
        return np.asarray(found[0]), np.asarray(found[1])

    def descend(self, windows: np.ndarray, gammas: np.ndarray, *, radius: float = math.inf) -> Candidate:
        """Exact coordinate search from one candidate [K] until nothing improves.

        Each boundary in turn tries the thresholds nearest to it or within a factor of 1 + radius, and its
        neighbours' windows (which empties a pool); where gamma is searched, first windows (thinned) with gammas.
        """
        best = (self(windows[None], gammas[None])[0], windows, gammas)
        before = math.inf
        while best[0] < before:
            before = best[0]
            for k in range(len(windows) - 1):
                for free_gamma in (True, False) if self.problem.gamma is None else (False,):
                    trial = self._neighbours(*best[1:], k, radius, free_gamma)
                    costs = self(*trial)
                    i = int(np.argmin(costs))
                    if costs[i] < best[0]:
                        best = (costs[i], trial[0][i], trial[1][i])
        return best

    def _neighbours(
        self, windows: np.ndarray, gammas: np.ndarray, k: int, radius: float, free_gamma: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates [M, K] that differ from one in boundary k."""
        options = self.thresholds
        rank = np.arange(len(options)) - np.searchsorted(options, windows[k])
        near = (np.abs(np.log(options / windows[k])) <= np.log1p(radius)) | (np.abs(rank) <= NEAREST)
        options = options[near & (options >= (windows[k - 1] if k else 0.0)) & (options <= windows[k + 1])]
        gamma_options = gamma_grid(self.problem) if free_gamma else gammas[k : k + 1]
        options = options[spread(len(options), effort_of(self.problem).neighbours // len(gamma_options))]
        options = np.unique([*options, *windows[max(k - 1, 0) : k + 2]])
        moved_windows = np.tile(windows, (len(options) * len(gamma_options), 1))
        moved_gammas = np.tile(gammas, (len(options) * len(gamma_options), 1))
        moved_windows[:, k] = np.repeat(options, len(gamma_options))
        moved_gammas[:, k] = np.tile(gamma_options, len(options))
        return moved_windows, moved_gammas


def spread(n: int, kept: int) -> np.ndarray:
    """Indices of at most `kept` of n things, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, n - 1, min(n, kept)).round().astype(int))


def gamma_grid(problem: Problem) -> np.ndarray:
    """The gammas a search tries: the given one, or 1, 1.05, ..., GAMMA_MAX."""
    if problem.gamma is not None:
        return np.array([problem.gamma])
    return np.round(1.0 + GAMMA_STEP * np.arange(round((GAMMA_MAX - 1.0) / GAMMA_STEP) + 1), 2)
