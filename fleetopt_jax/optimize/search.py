"""`optimize`: the one entry to every method, from a `Problem` to a re-checked `Plan`."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fleetopt_jax.fleet.evaluate import FleetMetrics, evaluate
from fleetopt_jax.fleet.fleet import Fleet, make_fleet
from fleetopt_jax.fleet.limits import ROUNDING, excesses
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.optimize import gradient, grid
from fleetopt_jax.optimize.candidates import BATCH, Candidate, Progress, Scorer, detail, gamma_grid, spread
from fleetopt_jax.optimize.plan import EngineChoice, Method, Plan, Problem, Search, Status, assignments

METHODS = {"grid": grid.search, "gradient": gradient.search}


def optimize(problem: Problem, method: Method = "grid", progress: Progress | None = None) -> Plan:
    """The best plan `method` finds over every assignment of engines to pools, re-evaluated hard in whole instances."""
    started = time.perf_counter()
    scorers = [Scorer(problem, choices) for choices in assignments(problem)]
    found: list[tuple[Candidate, bool]] = [METHODS[method](scorer, progress) for scorer in scorers]
    best = min(range(len(found)), key=lambda i: found[i][0][0])
    (best_cost, windows, gammas), _ = found[best]
    n_evaluated = sum(scorer.n_evaluated for scorer in scorers)
    if not math.isfinite(best_cost):
        return _infeasible(problem, method, scorers, Search(n_evaluated, time.perf_counter() - started))
    status: Status = "optimal" if all(exhaustive for _, exhaustive in found) else "feasible"
    choices = scorers[best].choices
    fleet, metrics = _detail(problem, choices, windows, gammas)
    if broken := broken_limit(problem, metrics):
        raise AssertionError(f"the {method} search returned a plan that breaks a limit: {broken}")
    return make_plan(
        problem, method, status, choices, fleet, metrics, Search(n_evaluated, time.perf_counter() - started)
    )


def evaluate_given(
    problem: Problem,
    choices: tuple[EngineChoice, ...],
    *,
    window_tokens: Sequence[float],
    gamma: Sequence[float],
    n_instances: Sequence[float],
) -> Plan:
    """The plan of a fleet somebody else chose; `infeasible`, with the limit it breaks, where it breaks one."""
    started = time.perf_counter()
    fleet = make_fleet(
        [choice.engine for choice in choices], window_tokens=window_tokens, gamma=gamma, n_instances=n_instances
    )
    metrics = jax.jit(evaluate, static_argnames="assumptions")(fleet, problem.workload, assumptions=problem.assumptions)
    binding = broken_limit(problem, metrics)
    return dataclasses.replace(
        make_plan(
            problem,
            "given",
            "infeasible" if binding else "feasible",
            choices,
            fleet,
            metrics,
            Search(1, time.perf_counter() - started),
        ),
        binding=binding,
    )


def broken_limit(problem: Problem, metrics: FleetMetrics) -> dict[str, Any] | None:
    """The first limit the metrics break: its name, its value and what was asked."""
    if not float(metrics.unserved_frac) <= ROUNDING:
        return {"limit": "unserved_frac", "value": float(metrics.unserved_frac), "asked": 0.0}
    slo = problem.slo
    of_all = slo.scope == "fleet"
    values = {
        "utilization": (metrics.utilization, slo.max_utilization),
        "ttft_p99_s": (metrics.ttft_p99_of_all_s if of_all else metrics.ttft_p99_s, slo.ttft_p99_s),
        "itl_s": (metrics.itl_s if of_all else np.max(metrics.pools.itl_s), slo.itl_s),
    }
    for name, excess in excesses(metrics.pools, slo).items():
        if not bool(np.all(np.asarray(excess) <= 2.0 * ROUNDING)):
            value, limit = values[name]
            return {"limit": name, "value": float(value), "asked": float(limit)}
    return None


def make_plan(
    problem: Problem,
    method: str,
    status: Status,
    choices: tuple[EngineChoice, ...],
    fleet: Fleet,
    metrics: FleetMetrics,
    search: Search,
) -> Plan:
    """A plan of the pools that have traffic, beside the best homogeneous fleet."""
    used = np.flatnonzero(np.asarray(fleet.n_instances) > 0)
    kept_fleet = Fleet(
        engines=tuple(fleet.engines[k] for k in used),
        window_tokens=fleet.window_tokens[used],
        gamma=fleet.gamma[used],
        n_instances=fleet.n_instances[used],
    )
    kept_metrics = FleetMetrics(**{**vars(metrics), "pools": jax.tree.map(lambda x: x[used], metrics.pools)})
    reference = homogeneous_tok_per_j(problem)
    return Plan(
        status=status,
        method=method,
        problem=problem,
        choices=tuple(choices[k] for k in used),
        fleet=kept_fleet,
        metrics=kept_metrics,
        gain_vs_homogeneous=float(metrics.tok_per_j) / reference if reference else None,
        search=search,
    )


def homogeneous_tok_per_j(problem: Problem) -> float:
    """tok/J of the best fleet with one pool of the full window; 0 where none holds the limits."""
    k = problem.n_pools
    windows, gammas = np.full(k, problem.window_tokens), np.ones(k)
    return max(float(_detail(problem, (choice,) * k, windows, gammas)[1].tok_per_j) for choice in problem.choices)


def _detail(
    problem: Problem, choices: tuple[EngineChoice, ...], windows: np.ndarray, gammas: np.ndarray
) -> tuple[Fleet, FleetMetrics]:
    engines = tuple(choice.engine for choice in choices)
    return detail(
        engines,
        windows,
        gammas,
        problem.workload,
        problem.slo,
        assumptions=problem.assumptions,
        objective=problem.objective,
    )


def _infeasible(problem: Problem, method: Method, scorers: list[Scorer], search: Search) -> Plan:
    ttft_s, itl_s = (np.concatenate(each) for each in zip(*(_reach(scorer) for scorer in scorers), strict=True))
    itl_held = itl_s <= float(problem.slo.itl_s)
    if not np.isfinite(ttft_s).any():
        limit, asked, nearest = "window_tokens", problem.window_tokens, _largest_window(problem)
    elif not itl_held.any():
        limit, asked, nearest = "itl_s", float(problem.slo.itl_s), float(itl_s.min())
    else:
        limit, asked, nearest = "ttft_p99_s", float(problem.slo.ttft_p99_s), float(ttft_s[itl_held].min())
    return Plan(
        status="infeasible",
        method=method,
        problem=problem,
        choices=(),
        fleet=None,
        metrics=None,
        gain_vs_homogeneous=None,
        search=search,
        binding={"limit": limit, "asked": asked, "nearest_feasible": nearest},
    )


def _reach(scorer: Scorer) -> tuple[np.ndarray, np.ndarray]:
    """What the best latencies are: of one pool, and of a spread of fleets with one boundary (the rest left empty)."""
    problem = scorer.problem
    options = scorer.thresholds[spread(len(scorer.thresholds), BATCH)]
    gammas = gamma_grid(problem)[[0, -1]]
    windows = np.full((2 * len(options), problem.n_pools), problem.window_tokens)
    compressed = np.ones_like(windows)
    windows[:, :-1] = np.tile(options, 2)[:, None]
    compressed[:, :-1] = np.repeat(gammas, len(options))[:, None]
    found = [scorer.reach(windows[i : i + BATCH], compressed[i : i + BATCH]) for i in range(0, len(windows), BATCH)]
    return tuple(np.concatenate(each) for each in zip(*found, strict=True))


def _largest_window(problem: Problem) -> float:
    """The largest window of which some engine's KV cache holds one sequence [tokens]."""
    caches = [choice.engine.kv for choice in problem.choices]
    return max(float(min(kv.n_blocks * BLOCK_TOKENS, kv.slot_tokens)) for kv in caches)
