"""Scoring many candidate fleets at once, and walking downhill from one of them."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import FleetMetrics, Objective, cost, evaluate
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.sizing import size_fleet
from fleetopt_jax.laws.routing import router_edges
from fleetopt_jax.optimize.plan import GAMMA_MAX, EngineChoice, Problem, thresholds
from fleetopt_jax.workload.atoms import Workload

BATCH = 8192  # candidates of one compiled call: fixed, so that a search compiles once
GAMMA_STEP = 0.05
NEAREST = 8  # thresholds on either side that are tried however far they are
MAX_NEIGHBOURS = 65_536  # candidates of one move of the coordinate search

Progress = Callable[[int, int], None]  # (done, total)


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
) -> tuple[Array, Array]:
    """(cost, least reachable P99 TTFT [s]) of M candidates, windows and gammas [M, K], each sized to hold `slo`.

    cost is inf where the limits cannot be held, and where the longest request the last window promises is accepted by
    no pool with traffic. The reachable TTFT is that of unlimited instances: the prefill alone.
    """

    def score(windows: Array, gammas: Array) -> tuple[Array, Array]:
        fleet = size_fleet(engines, windows, gammas, workload, slo, assumptions)
        metrics = evaluate(fleet, workload, assumptions)
        pools = metrics.pools
        busy = pools.traffic_frac > 0
        promised = jnp.max(jnp.where(busy, router_edges(windows, gammas), 0.0)) >= windows[-1]
        serves = promised & jnp.all(~busy | (pools.n_max >= 1))
        feasible = promised & jnp.isfinite(metrics.n_instances)
        reachable_s = jnp.where(serves, jnp.max(pools.prefill_s), jnp.inf)
        return jnp.where(feasible, cost(metrics, objective), jnp.inf), reachable_s

    return jax.vmap(score)(window_tokens, gamma)


@partial(jax.jit, static_argnames="assumptions")
def detail(
    engines: tuple[Engine, ...],
    window_tokens: Array,
    gamma: Array,
    workload: Workload,
    slo: Slo,
    *,
    assumptions: Assumptions,
) -> tuple[Fleet, FleetMetrics]:
    """One candidate [K], sized and evaluated in full."""
    fleet = size_fleet(engines, window_tokens, gamma, workload, slo, assumptions)
    return fleet, evaluate(fleet, workload, assumptions)


Candidate = tuple[float, np.ndarray, np.ndarray]  # (cost, windows [K], gammas [K])


class Scorer:
    """Scores candidates of one problem and engine assignment, counting them."""

    def __init__(self, problem: Problem, choices: tuple[EngineChoice, ...]):
        self.problem, self.choices, self.n_evaluated = problem, choices, 0
        self.reachable_s = math.inf
        self.thresholds = thresholds(problem)
        self._score = partial(
            score_batch,
            tuple(choice.engine for choice in choices),
            workload=problem.workload,
            slo=problem.slo,
            assumptions=problem.assumptions,
            objective=problem.objective,
        )

    def __call__(self, windows: np.ndarray, gammas: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """Costs [M] of candidates [M, K]."""
        costs = np.empty(len(windows))
        for start in range(0, len(windows), BATCH):
            rows = np.minimum(np.arange(start, start + BATCH), len(windows) - 1)  # the last batch repeats its last row
            batch_cost, reachable_s = self._score(windows[rows], gammas[rows])
            kept = min(BATCH, len(windows) - start)
            costs[start : start + kept] = np.asarray(batch_cost)[:kept]
            self.reachable_s = min(self.reachable_s, float(np.min(reachable_s)))
            if progress:
                progress(start + kept, len(windows))
        self.n_evaluated += len(windows)
        return costs

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
