"""`optimize`: the one entry to every method, from a `Problem` to a re-checked `Plan`."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.fleet.choices import LENGTHS
from fleetopt_jax.fleet.evaluate import FleetMetrics, evaluate
from fleetopt_jax.fleet.fleet import Fleet, Slo, make_fleet
from fleetopt_jax.fleet.limits import ROUNDING, excesses
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.optimize import coupled, exact, gradient, grid
from fleetopt_jax.optimize.candidates import BATCH, Progress, Scorer, gamma_grid, spread
from fleetopt_jax.optimize.plan import (
    Budget,
    EngineChoice,
    Found,
    Method,
    Plan,
    Problem,
    Search,
    Status,
    usage,
)

METHODS: dict[str, Callable[[Problem, Progress | None], Found]] = {
    "exact": lambda problem, progress: (coupled if problem.budget.caps else exact).search(problem, progress),
    "grid": grid.search,
    "gradient": gradient.search,
}

_evaluate = jax.jit(evaluate, static_argnames="assumptions")


def optimize(problem: Problem, method: Method | None = None, progress: Progress | None = None) -> Plan:
    """The best plan `method` finds over the engines each pool may have, re-evaluated hard in whole instances.

    `exact` proves its answer, but cannot share latencies out over a whole fleet (`Slo.scope`); `gradient` scales where
    limits couple the pools; `grid` tries every candidate there is and serves as reference. Without a method, exact
    where it can, else grid.
    """
    method = method or default_method(problem.slo)
    if problem.free and method != "gradient":
        names = " and ".join(problem.free)
        raise BadInput(f"method {method}", f"pools choose their own {names}", "need method gradient")
    started = time.perf_counter()
    found = METHODS[method](problem, progress)
    if not math.isfinite(found.cost):
        return _infeasible(problem, method, found, started)
    engines = tuple(choice.engine for choice in found.choices)
    fleet = Fleet(
        engines, *(jnp.asarray(x, dtype=float) for x in (found.window_tokens, found.gamma, found.n_instances))
    )
    metrics = _evaluate(fleet, problem.workload, assumptions=problem.assumptions)
    if broken := broken_limit(problem, found.choices, metrics):
        raise AssertionError(f"the {method} search returned a plan that breaks a limit: {broken}")
    status: Status = "optimal" if found.certified else "feasible"
    return make_plan(problem, method, status, found.choices, fleet, metrics, _search(problem, found, started), found)


def default_method(slo: Slo) -> Method:
    """The exact search, but where the latencies are limits of the whole fleet."""
    return "grid" if slo.scope == "fleet" else "exact"


def _search(problem: Problem, found: Found, started: float) -> Search:
    bound = found.lower_bound
    return Search(
        n_evaluated=found.n_evaluated,
        wall_s=time.perf_counter() - started,
        candidates=found.candidates,
        lower_bound=None if bound is None else as_objective(problem, bound),
        gap=None if bound is None or not math.isfinite(found.cost) else found.cost / bound - 1.0,
        by_pools=tuple(as_objective(problem, each) if math.isfinite(each) else None for each in found.by_pools),
    )


def as_objective(problem: Problem, cost: float) -> float:
    """A cost that a method minimises, as the objective's own number: tokens per joule are output over watts."""
    return demanded_tok_per_s(problem) / cost if problem.objective == "tok_per_j" else cost


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
    metrics = _evaluate(fleet, problem.workload, assumptions=problem.assumptions)
    binding = broken_limit(problem, choices, metrics)
    search = Search(1, time.perf_counter() - started, "the given fleet")
    status: Status = "infeasible" if binding else "feasible"
    return dataclasses.replace(make_plan(problem, "given", status, choices, fleet, metrics, search), binding=binding)


def broken_limit(problem: Problem, choices: Sequence[EngineChoice], metrics: FleetMetrics) -> dict[str, Any] | None:
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
    for name, used in usage(problem.budget, choices, metrics).items():
        cap = problem.budget.caps[name]
        if not used <= cap * (1.0 + 2.0 * ROUNDING):
            return {"limit": name, "value": used, "asked": cap}
    return None


def make_plan(
    problem: Problem,
    method: str,
    status: Status,
    choices: tuple[EngineChoice, ...],
    fleet: Fleet,
    metrics: FleetMetrics,
    search: Search,
    found: Found | None = None,
) -> Plan:
    """A plan of the pools that have traffic, beside the best homogeneous fleet (the one `found` along, if any)."""
    used = np.flatnonzero(np.asarray(fleet.n_instances) > 0)
    kept_fleet = Fleet(
        engines=tuple(fleet.engines[k] for k in used),
        window_tokens=fleet.window_tokens[used],
        gamma=fleet.gamma[used],
        n_instances=fleet.n_instances[used],
    )
    kept_metrics = FleetMetrics(**{**vars(metrics), "pools": jax.tree.map(lambda x: x[used], metrics.pools)})
    known = found is not None and found.homogeneous_w is not None
    reference = demanded_tok_per_s(problem) / found.homogeneous_w if known else homogeneous_tok_per_j(problem)
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
    return demanded_tok_per_s(problem) / exact.homogeneous_w(problem)


def demanded_tok_per_s(problem: Problem) -> float:
    """Output tokens per second of every fleet that holds the limits."""
    _, output = LENGTHS[problem.assumptions.lengths](problem.workload, problem.assumptions)
    return float(problem.workload.arrival_rate_per_s * jnp.sum(problem.workload.weight * output))


def _infeasible(problem: Problem, method: Method, found: Found, started: float) -> Plan:
    binding = _unaffordable(problem, method) or _unreachable(problem)
    return Plan(
        status="infeasible",
        method=method,
        problem=problem,
        choices=(),
        fleet=None,
        metrics=None,
        gain_vs_homogeneous=None,
        search=_search(problem, found, started),
        binding=binding,
    )


def _unaffordable(problem: Problem, method: Method) -> dict[str, Any] | None:
    """The first limit of the budget that no fleet keeps which holds the latencies; None if there is no such fleet."""
    if not problem.budget.caps:
        return None
    free = dataclasses.replace(problem, budget=Budget())
    resources = {"max_gpus": "gpus", "max_power_w": "power", "max_usd_per_h": "usd"}
    for name, cap in problem.budget.caps.items():
        if name.startswith("gpus_of."):
            gpu = name.removeprefix("gpus_of.")
            scarce = dataclasses.replace(free, budget=Budget(gpus_of=((gpu, cap),)))
            if not math.isfinite(METHODS[method](scarce, None).cost) and optimize(free, method).metrics is not None:
                return {"limit": name, "asked": cap, "nearest_feasible": _fewest(free, gpu, method)}
            continue
        plan = optimize(dataclasses.replace(free, objective=resources[name]), method)
        if plan.metrics is None:
            return None
        least = usage(problem.budget, plan.choices, plan.metrics)[name]
        if least > cap:
            return {"limit": name, "asked": cap, "nearest_feasible": least}
    return {"limit": "budget", "asked": dict(problem.budget.caps), "nearest_feasible": None}


def _fewest(free: Problem, gpu: str, method: Method) -> float | None:
    """GPUs of the smallest fleet, where there is no other kind; None where nobody knows how few of them would do."""
    if any(choice.gpu != gpu for choice in free.choices):
        return None
    return float(optimize(dataclasses.replace(free, objective="gpus"), method).metrics.n_gpus)


def _unreachable(problem: Problem) -> dict[str, Any]:
    """The latency or window that no fleet reaches, and what is reachable with one kind of engine in all pools."""
    scorers = [Scorer(problem, (choice,) * problem.n_pools) for choice in problem.choices]
    ttft_s, itl_s = (np.concatenate(each) for each in zip(*(_reach(scorer) for scorer in scorers), strict=True))
    itl_held = itl_s <= float(problem.slo.itl_s)
    if not np.isfinite(ttft_s).any():
        limit, asked, nearest = "window_tokens", problem.window_tokens, _largest_window(problem)
    elif not itl_held.any():
        limit, asked, nearest = "itl_s", float(problem.slo.itl_s), float(itl_s.min())
    else:
        limit, asked, nearest = "ttft_p99_s", float(problem.slo.ttft_p99_s), float(ttft_s[itl_held].min())
    return {"limit": limit, "asked": asked, "nearest_feasible": nearest}


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
