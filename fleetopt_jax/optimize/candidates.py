"""Scoring many candidate fleets at once, and walking downhill from one of them."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import FleetMetrics, Objective, cost, evaluate, fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.limits import ROUNDING, reached
from fleetopt_jax.fleet.sizing import instances_for, least_instances, most_instances
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.laws.routing import router_edges
from fleetopt_jax.optimize.plan import (
    GAMMA_MAX,
    Budget,
    EngineChoice,
    Found,
    Problem,
    assignments,
    nothing,
    thresholds,
)
from fleetopt_jax.workload.atoms import Workload

BATCH = 8192  # candidates of one compiled call: fixed, so that a search compiles once
CHUNK = 1024  # of them that are sized together
GAMMA_STEP = 0.05
NEAREST = 8  # thresholds on either side that are tried however far they are
MAX_NEIGHBOURS = 16_384  # candidates of one move of the coordinate search

Progress = Callable[[int, int], None]  # (done, total)


@pytree
class Caps:
    """A `Budget` as numbers: of all pools, and of the G kinds of GPU that are scarce."""

    n_gpus: Array
    power_w: Array
    usd_per_h: Array
    gpus_of: Array  # [G]
    is_of: Array  # whether a pool's GPUs are of the kind [G, K]


def make_caps(budget: Budget, choices: Sequence[EngineChoice]) -> Caps:
    """The caps of a fleet whose pools have these engines."""
    is_of = [[choice.gpu == gpu for choice in choices] for gpu, _ in budget.gpus_of]
    return Caps(
        **as_floats(
            n_gpus=budget.max_gpus,
            power_w=budget.max_power_w,
            usd_per_h=budget.max_usd_per_h,
            gpus_of=[count for _, count in budget.gpus_of],
            is_of=np.reshape(is_of, (len(budget.gpus_of), len(choices))),
        )
    )


def cap_excesses(metrics: FleetMetrics, caps: Caps) -> Array:
    """Use of every cap over it, less one [3 + G]: not positive where it holds."""
    totals = jnp.stack(
        [metrics.n_gpus / caps.n_gpus, metrics.power_w / caps.power_w, metrics.usd_per_h / caps.usd_per_h]
    )
    scarce = caps.is_of @ metrics.pools.n_gpus / jnp.maximum(caps.gpus_of, 1e-9)
    return jnp.concatenate([totals, scarce]) - 1.0


@partial(jax.jit, static_argnames=("assumptions", "objective"))
def score_batch(
    engines: tuple[Engine, ...],
    window_tokens: Array,
    gamma: Array,
    workload: Workload,
    slo: Slo,
    *,
    assumptions: Assumptions,
    objective: Objective,
    caps: Caps | None = None,
) -> tuple[Array, Array]:
    """(costs [M], instances [M, K]) of M candidates, windows and gammas [M, K], each sized to hold `slo`.

    The cost is inf where the limits cannot be held or a cap is exceeded, and where the longest request the last window
    promises is accepted by no pool with traffic.
    """

    def score(windows: Array, gammas: Array, traffic: tuple[PoolTraffic, ...]) -> tuple[Array, Array]:
        n_instances = instances_for(engines, traffic, windows, workload, slo, assumptions)
        fleet = Fleet(engines, windows, gammas, n_instances)
        metrics = fleet_metrics(fleet, traffic, workload, assumptions, quantiles=False)
        feasible = _promised(metrics, windows, gammas) & jnp.isfinite(metrics.n_instances)
        if caps is not None:
            feasible &= jnp.all(cap_excesses(metrics, caps) <= ROUNDING)
        return jnp.where(feasible, cost(metrics, objective), jnp.inf), n_instances

    # All are routed at once, for the running sums are common to them, but sized in chunks: a chunk loops as long as the
    # slowest of its candidates needs, and its numbers stay in the cache.
    traffic = jax.vmap(lambda *candidate: route(engines, *candidate, workload, assumptions))(window_tokens, gamma)
    return jax.lax.map(lambda candidate: score(*candidate), (window_tokens, gamma, traffic), batch_size=CHUNK)


@partial(jax.jit, static_argnames="assumptions")
def reach_batch(
    engines: tuple[Engine, ...],
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

    def reach(windows: Array, gammas: Array) -> tuple[Array, Array]:
        traffic = route(engines, windows, gammas, workload, assumptions)
        pools = list(zip(engines, traffic, windows, strict=True))
        least = jnp.stack([least_instances(*pool, workload, slo, assumptions) for pool in pools])
        most = jnp.where(least > 0, most_instances(jnp.where(jnp.isfinite(least), least, 1.0)), 0.0)
        fleet = Fleet(engines, windows, gammas, most)
        metrics = fleet_metrics(fleet, traffic, workload, assumptions, quantiles=False)
        serves = _promised(metrics, windows, gammas) & jnp.all(jnp.isfinite(least))
        ttft_s, itl_s = reached(metrics, slo)
        return jnp.where(serves, ttft_s, jnp.inf), jnp.where(serves, itl_s, jnp.inf)

    return jax.vmap(reach)(window_tokens, gamma)


def _promised(metrics: FleetMetrics, windows: Array, gammas: Array) -> Array:
    """Whether a pool with traffic accepts the longest request the last window promises."""
    busy = metrics.pools.traffic_frac > 0
    return jnp.max(jnp.where(busy, router_edges(windows, gammas), 0.0)) >= windows[-1]


_evaluate = jax.jit(evaluate, static_argnames="assumptions")


def detail(
    engines: tuple[Engine, ...],
    window_tokens: np.ndarray,
    gamma: np.ndarray,
    workload: Workload,
    slo: Slo,
    *,
    assumptions: Assumptions,
    objective: Objective = "tok_per_j",
) -> tuple[Fleet, FleetMetrics]:
    """One candidate [K], sized and evaluated in full. Sized in a batch of itself, as a search has compiled it."""
    rows = (BATCH, len(engines))
    windows, gammas = np.broadcast_to(window_tokens, rows), np.broadcast_to(gamma, rows)
    # Arguments by the same names as the search passes: the cache of compilations tells names from positions.
    _, n_instances = score_batch(
        engines, windows, gammas, workload=workload, slo=slo, assumptions=assumptions, objective=objective
    )
    fleet = Fleet(engines, jnp.asarray(window_tokens, dtype=float), jnp.asarray(gamma, dtype=float), n_instances[0])
    return fleet, _evaluate(fleet, workload, assumptions=assumptions)


Candidate = tuple[float, np.ndarray, np.ndarray]  # (cost, windows [K], gammas [K])


def over_assignments(
    problem: Problem,
    search: Callable[["Scorer", Progress | None], tuple[Candidate, bool]],
    progress: Progress | None,
    said: str,
) -> Found:
    """The best of what `search` finds for every assignment of engines to pools; certified where each of them is."""
    scorers = [Scorer(problem, choices) for choices in assignments(problem)]
    found = [search(scorer, progress) for scorer in scorers]
    certified = all(exhaustive for _, exhaustive in found)
    candidates = [(scorer, candidate) for scorer, (candidate, _) in zip(scorers, found)]
    return best_found(problem, candidates, said, certified=certified)


def best_found(problem: Problem, found: Sequence[tuple["Scorer", Candidate]], said: str, *, certified: bool) -> Found:
    """The best of candidates, each with the scorer that knows its engines."""
    scorer, (cost_, windows, gammas) = min(found, key=lambda each: each[1][0])
    n_evaluated = sum(each.n_evaluated for each in {id(each): each for each, _ in found}.values())
    if not math.isfinite(cost_):
        return nothing(n_evaluated, said, certified=certified)
    choices = scorer.choices
    engines = tuple(choice.engine for choice in choices)
    fleet, _ = detail(
        engines,
        windows,
        gammas,
        problem.workload,
        problem.slo,
        assumptions=problem.assumptions,
        objective=problem.objective,
    )
    return Found(cost_, choices, windows, gammas, np.asarray(fleet.n_instances), certified, n_evaluated, said)


class Scorer:
    """Scores candidates of one problem and engine assignment, counting them."""

    def __init__(self, problem: Problem, choices: tuple[EngineChoice, ...]):
        self.problem, self.choices, self.n_evaluated = problem, choices, 0
        self.thresholds = thresholds(problem)
        self._score = partial(
            score_batch,
            tuple(choice.engine for choice in choices),
            workload=problem.workload,
            slo=problem.slo,
            assumptions=problem.assumptions,
            objective=problem.objective,
            caps=make_caps(problem.budget, choices) if problem.budget.caps else None,
        )

    def __call__(self, windows: np.ndarray, gammas: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """Costs [M] of candidates [M, K]."""
        costs = np.empty(len(windows))
        for start in range(0, len(windows), BATCH):
            rows = np.minimum(np.arange(start, start + BATCH), len(windows) - 1)  # the last batch repeats its last row
            kept = min(BATCH, len(windows) - start)
            costs[start : start + kept] = np.asarray(self._score(windows[rows], gammas[rows])[0])[:kept]
            if progress:
                progress(start + kept, len(windows))
        self.n_evaluated += len(windows)
        return costs

    def reach(self, windows: np.ndarray, gammas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(TTFT, ITL) [M] that candidates [M, K] reach with the most instances worth having; see `reach_batch`."""
        problem = self.problem
        engines = tuple(choice.engine for choice in self.choices)
        found = reach_batch(engines, windows, gammas, problem.workload, problem.slo, assumptions=problem.assumptions)
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
        options = options[spread(len(options), MAX_NEIGHBOURS // len(gamma_options))]
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
