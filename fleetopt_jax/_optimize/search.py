"""`optimize`: the one entry to every method, from a `Problem` to a re-checked `Plan`."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Literal, cast

import jax
import numpy as np

from fleetopt_jax._optimize import coupled, exact, gradient, grid
from fleetopt_jax._optimize.candidates import BATCH, Scorer, effort_of, gamma_grid, spread
from fleetopt_jax._optimize.plan import BrokenLimit, Found, Infeasible, OnePoolFleet, Plan, Search, Status, Unreachable
from fleetopt_jax._optimize.problem import Method, Problem, as_objective, demanded_tok_per_s
from fleetopt_jax.catalog.spec import EngineSpec, LaneSpec
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.evaluate import FleetMetrics, fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet, fleet_of, make_fleet
from fleetopt_jax.fleet.limits import ROUNDING, excesses
from fleetopt_jax.fleet.resources import Budget, limit_weights
from fleetopt_jax.fleet.sizing import least_held, worth_having
from fleetopt_jax.fleet.stage import setting_of
from fleetopt_jax.fleet.traffic import routed
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS, caches_of

METHODS: dict[Method, Callable[[Problem, Progress | None], Found]] = {
    "exact": lambda problem, progress: (coupled if problem.budget.caps else exact).search(problem, progress),
    "grid": grid.search,
    "gradient": gradient.search,
}


def optimize(problem: Problem, method: Method | None = None, progress: Progress | None = None) -> Plan | Infeasible:
    """The best plan `method` finds over the engines each pool may have, re-evaluated hard in whole instances; or the
    limit that no fleet holds.

    `exact` proves its answer, but cannot share latencies out over a whole fleet (`Slo.scope`); `gradient` scales where
    limits couple the pools; `grid` tries every candidate there is and serves as reference. Without a method, exact
    where it can, else grid. Refuses float32, and more than one service or period.

    Where prompts find what the caches of a pool hold (`WorkingSetCache`), each candidate of `grid`, the only method
    then, is sized with what it finds. Nothing is proved: a pool has the least instances that hold its limits, and one
    more, whose cache spares prefill, may take less power.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> plan = fo.optimize(fo.make_problem(chat, [fo.EngineSpec("h100")], n_pools=1))
    >>> plan.status, plan.kinds
    ('optimal', ('h100',))
    """
    require_float64("optimize")
    method = method or default_method(problem)
    _check_method(problem, method)
    return _answer(problem, method, lambda: METHODS[method](problem, progress))


def _check_method(problem: Problem, method: Method) -> None:
    """Refuse a method that cannot search the problem."""
    free = " and ".join(problem.free)
    if problem.service.serve != "mixed" and method != "exact":
        allowed = "need method exact, with latencies that each pool holds" if method == "grid" else "need method exact"
        raise BadField("serve", f"{problem.service.serve}: method {method} searches lanes of one stage only", allowed)
    if problem.assumptions.prefix_cache.reads_reuse and (method != "grid" or free):
        asked = f"a free {free}" if free else f"method {method}"
        problem_is = "what a prefix cache finds depends on the instances of a pool, which only grid takes into account"
        raise BadInput(asked, problem_is, "need --method grid, which frees nothing" if free else "need --method grid")
    if free and method != "gradient":
        raise BadInput(f"method {method}", f"pools choose their own {free}", "need method gradient")


def optimize_as_compressing(problem: Problem) -> Plan | Infeasible:
    """`optimize` by the programs of the same problem with another gamma: who asks both compiles once."""
    if default_method(problem) != "exact" or problem.budget.caps:
        return optimize(problem)
    return _answer(problem, "exact", lambda: exact.search(problem, compresses=True))


def _answer(problem: Problem, method: Method, search: Callable[[], Found]) -> Plan | Infeasible:
    """What a search found, as a re-checked plan."""
    started = time.perf_counter()
    found = search()
    if not math.isfinite(found.cost):
        return _infeasible(problem, method, found, started)
    return planned(problem, method, found, started)


def planned(problem: Problem, method: Method, found: Found, started: float) -> Plan:
    """A fleet that a search found, re-evaluated hard; it must hold every limit."""
    fleet = problem.fleet(found.lanes, found.window_tokens, found.gamma, found.n_instances)
    status: Status = "optimal" if found.certified else "feasible"
    plan = _plan(problem, method, status, found.lanes, fleet, _search(problem, found, started), found)
    if plan.binding:
        raise AssertionError(f"the {method} search returned a plan that breaks a limit: {plan.binding}")
    return plan


def default_method(problem: Problem) -> Method:
    """The exact search, but where the latencies are limits of the whole fleet, or prompts find what caches hold."""
    coupled_or_cached = problem.slo.scope == "fleet" or problem.assumptions.prefix_cache.reads_reuse
    return "grid" if coupled_or_cached else "exact"


def _search(problem: Problem, found: Found, started: float) -> Search:
    bound = found.lower_bound
    return Search(
        n_evaluated=found.n_evaluated,
        wall_s=time.perf_counter() - started,
        candidates=found.candidates,
        lower_bound=None if bound is None else as_objective(problem, bound),
        gap=None if bound is None or not math.isfinite(found.cost) else _gap(found.cost, bound),
        by_pools=tuple(as_objective(problem, each) if math.isfinite(each) else None for each in found.by_pools),
        n_engines=len(problem.all_specs),
    )


def _gap(cost: float, bound: float) -> float:
    """What a cost is over its lower bound, less one; nothing is over a cost of nothing."""
    return cost / bound - 1.0 if bound else 0.0


def evaluate_given(
    problem: Problem,
    specs: Sequence[LaneSpec],
    *,
    window_tokens: Sequence[float],
    gamma: Sequence[float],
    n_instances: Sequence[float] | Sequence[Sequence[float]],
) -> Plan:
    """The plan of a fleet somebody else chose; `infeasible`, with the limit it breaks, where it breaks one. Instances
    are pairs where a lane has two stages, as in `make_fleet`."""
    require_float64("evaluate_given")
    started = time.perf_counter()
    engines = problem.fleet(specs, window_tokens, gamma, n_instances).servers
    numbers = {"window_tokens": window_tokens, "gamma": gamma, "n_instances": n_instances}
    fleet = make_fleet(engines, **numbers, surroundings=problem.around)
    search = Search(1, time.perf_counter() - started, "the given fleet")
    return _plan(problem, "given", "feasible", tuple(specs), fleet, search)


def with_fleet(plan: Plan, fleet: Fleet) -> Plan:
    """The plan of the same specs with other numbers, as `evaluate_given` has it."""
    numbers = {name: np.asarray(getattr(fleet, name)).tolist() for name in ("window_tokens", "gamma", "n_instances")}
    return evaluate_given(plan.problem, plan.lanes, **numbers)


def broken_limit(problem: Problem, metrics: FleetMetrics, used: dict[str, float], itl_s: float) -> BrokenLimit | None:
    """The first limit that metrics, or what a fleet uses of the budget, break; `itl_s` is that of the worst pool."""
    if not float(metrics.unserved_frac) <= ROUNDING:
        return BrokenLimit("unserved_frac", float(metrics.unserved_frac), 0.0)
    slo = problem.slo
    of_all = slo.scope == "fleet"
    values = {
        "utilization": (metrics.utilization, slo.max_utilization),
        "ttft_p99_s": (metrics.ttft_p99_of_all_s if of_all else metrics.ttft_p99_s, slo.ttft_p99_s),
        "itl_s": (metrics.itl_s if of_all else itl_s, slo.itl_s),
    }
    found = compiled_excesses(metrics.pools, slo)
    for name, (value, limit) in values.items():  # an overload is said first
        if not bool(np.all(np.asarray(found[name]) <= 2.0 * ROUNDING)):
            return BrokenLimit(name, float(value), float(limit))
    for name, cap in problem.budget.caps.items():
        if not used[name] <= cap * (1.0 + 2.0 * ROUNDING):
            return BrokenLimit(name, used[name], cap)
    return None


compiled_excesses = program(excesses)  # for whoever checks one fleet, outside of a program


def _plan(
    problem: Problem,
    method: Method | Literal["given"],
    status: Status,
    lanes: tuple[LaneSpec, ...],
    fleet: Fleet,
    search: Search,
    found: Found | None = None,
) -> Plan:
    """A plan of the pools that have traffic, beside the best homogeneous fleet (the one `found` along, if any)."""
    traffic = routed(fleet, problem.workload, problem.assumptions)
    metrics = fleet_metrics(fleet, traffic, problem.workload, problem.assumptions)
    used = np.flatnonzero(np.asarray(metrics.pools.n_instances) > 0)
    pools = jax.tree.map(lambda x: np.asarray(x)[used], metrics.pools)
    windows, gammas, n = (np.asarray(x)[used] for x in (fleet.window_tokens, fleet.gamma, fleet.n_instances))
    servers = [fleet.servers[k] for k in used]
    n = n if max(len(server.parts) for server in servers) > 1 or n.ndim == 1 else n[:, 0]
    kept = fleet_of(servers, windows, gammas, n, fleet.surroundings)
    if found is not None and found.homogeneous_w is not None:
        least_w, one_pool = found.homogeneous_w, found.one_pool
    else:
        least_w, one_pool = _homogeneous(problem, len(fleet.lanes))
    reference = demanded_tok_per_s(problem) / least_w
    plan = Plan(
        status=status,
        method=method,
        problem=problem,
        lanes=tuple(lanes[k] for k in used),
        fleet=kept,
        metrics=dataclasses.replace(metrics, pools=pools),
        gain_vs_homogeneous=float(metrics.tok_per_j) / reference if reference else None,
        search=search,
        one_pool=one_pool,
    )
    binding = broken_limit(problem, metrics, plan.used, float(np.max(pools.itl_s)))
    return dataclasses.replace(plan, status="infeasible", binding=binding) if binding else plan


def homogeneous_tok_per_j(problem: Problem) -> float:
    """tok/J of the best fleet with one pool of the full window; 0 where none holds the limits."""
    return demanded_tok_per_s(problem) / _homogeneous(problem)[0]


def _homogeneous(problem: Problem, n_lanes: int = 1) -> tuple[float, OnePoolFleet | None]:
    """(least power [W], the best by the objective) of one pool of the full window; (inf, None) where none holds the
    limits. With a cache whose hits are searched by the programs that evaluate a fleet of `n_lanes`."""
    if not problem.assumptions.prefix_cache.reads_reuse:
        return exact.homogeneous(problem)
    instances, watts = np.array([_alone(problem, spec, n_lanes) for spec in problem.specs]).T
    return float(watts.min()), exact.best_alone(problem, instances, watts)


_worth_having = program(worth_having)


def _alone(problem: Problem, spec: EngineSpec, n_lanes: int) -> tuple[float, float]:
    """(least instances that hold the limits, watts) of the first of so many pools, the others left empty; inf where
    none do."""
    of_first = np.arange(n_lanes) == 0
    fleet = problem.fleet((spec,) * n_lanes, np.full(n_lanes, problem.window_tokens), np.ones(n_lanes), of_first * 1.0)
    traffic = routed(fleet, problem.workload, problem.assumptions)
    setting = setting_of(problem.workload, fleet.surroundings, problem.assumptions)
    first = jax.tree.map(lambda x: x[0], traffic)
    least, most = map(np.asarray, _worth_having(fleet.engines[0], first, problem.window_tokens, problem.slo, setting))
    if not np.isfinite(least):
        return math.inf, math.inf
    at, watts = least_held(cast(jax.Array, least), cast(jax.Array, most)), math.inf
    while bool(at.is_open):
        tried = fleet.with_instances(np.where(of_first, at.trial, 0.0))
        metrics = fleet_metrics(tried, traffic, problem.workload, problem.assumptions)
        pool = jax.tree.map(lambda x: np.asarray(x)[:1], metrics.pools)
        excess = np.max([np.max(each) for each in compiled_excesses(pool, problem.slo).values()])
        watts = float(metrics.power_w) if excess <= ROUNDING else watts  # the last to hold is the least
        at = at.after(excess)
    return float(at.found), watts


def _infeasible(problem: Problem, method: Method, found: Found, started: float) -> Infeasible:
    binding = _unaffordable(problem, method) or unreachable(problem)
    return Infeasible(method, problem, _search(problem, found, started), binding)


def _unaffordable(problem: Problem, method: Method) -> Unreachable | None:
    """The first limit of the budget that no fleet keeps which holds the latencies; None if there is no such fleet."""
    caps = problem.budget.caps
    if not caps:
        return None
    free = dataclasses.replace(problem, budget=Budget())
    for name, cap in caps.items():
        if limit_weights(name).gpus_of:  # another kind may serve instead: ask whether any fleet does with so few
            scarce = dataclasses.replace(free, budget=Budget().with_cap(name, cap))
            if not math.isfinite(METHODS[method](scarce, None).cost) and isinstance(optimize(free, method), Plan):
                return Unreachable(name, cap, _fewest(free, name, method))
            continue
        plan = optimize(dataclasses.replace(free, objective=limit_weights(name)), method)
        if isinstance(plan, Infeasible):
            return None
        if plan.cost > cap:
            return Unreachable(name, cap, plan.cost)
    return Unreachable("budget", dict(caps), None)


def _fewest(free: Problem, limit: str, method: Method) -> float | None:
    """GPUs of the smallest fleet, where there is no other kind; None where nobody knows how few of them would do."""
    if any(kind not in limit_weights(limit).gpus_of for kind in free.kinds):
        return None
    plan = optimize(dataclasses.replace(free, objective="gpus"), method)
    return plan.cost if isinstance(plan, Plan) else None


def unreachable(problem: Problem) -> Unreachable:
    """The latency or window that no fleet reaches, and what is reachable with one kind of engine in all pools; of two
    stages nobody knows how near one comes."""
    if problem.service.serve == "disaggregated":
        return Unreachable("ttft_p99_s", float(problem.slo.ttft_p99_s), None)
    ttft_s, itl_s = best_latencies(problem)
    itl_held = itl_s <= float(problem.slo.itl_s)
    if not np.isfinite(ttft_s).any():
        limit, asked, nearest = "window_tokens", problem.window_tokens, largest_window(problem)
    elif not itl_held.any():
        limit, asked, nearest = "itl_s", float(problem.slo.itl_s), float(itl_s.min())
    else:
        limit, asked, nearest = "ttft_p99_s", float(problem.slo.ttft_p99_s), float(ttft_s[itl_held].min())
    return Unreachable(limit, asked, nearest)


def best_latencies(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(P99 TTFT less what its limit grows with the prompt, mean ITL) [s] of a spread of fleets of one and of two pools
    with the most instances worth having, each with one kind of engine in all pools; inf where none serves."""
    problem = dataclasses.replace(problem, n_pools=min(problem.n_pools, 2))
    scorers = [Scorer(problem, (spec,) * problem.n_pools) for spec in problem.specs]
    ttft_s, itl_s = zip(*(_best_latencies(scorer) for scorer in scorers), strict=True)
    return np.concatenate(ttft_s), np.concatenate(itl_s)


def _best_latencies(scorer: Scorer) -> tuple[np.ndarray, np.ndarray]:
    """What the best latencies are: of one pool, and of a spread of fleets with one boundary."""
    problem = scorer.problem
    options = scorer.thresholds[spread(len(scorer.thresholds), effort_of(problem).latencies)]
    gammas = gamma_grid(problem)[[0, -1]]
    windows = np.full((2 * len(options), problem.n_pools), problem.window_tokens)
    compressed = np.ones_like(windows)
    windows[:, :-1] = np.tile(options, 2)[:, None]
    compressed[:, :-1] = np.repeat(gammas, len(options))[:, None]
    fleets = np.unique(np.stack([windows, compressed], axis=1), axis=0)  # one pool is one fleet, and so is one gamma
    windows, compressed = fleets[:, 0], fleets[:, 1]
    found = [
        scorer.best_latencies(windows[i : i + BATCH], compressed[i : i + BATCH]) for i in range(0, len(windows), BATCH)
    ]
    ttft_s, itl_s = (np.concatenate(each) for each in zip(*found, strict=True))
    return ttft_s, itl_s


def largest_window(problem: Problem) -> float:
    """The largest window of which some engine's KV cache holds one sequence [tokens]."""
    caches = [engine.kv for engine in problem.engines]
    return max(float(min(kv.n_blocks / caches_of(kv) * BLOCK_TOKENS, kv.slot_tokens)) for kv in caches)
