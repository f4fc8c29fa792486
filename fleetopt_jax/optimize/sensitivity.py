"""What matters: elasticities of a fleet's metrics in every input number, prices of its limits, value of its thresholds.

All are derivatives of one function, the relaxed fleet: `evaluate` at the plan's own traffic with real-valued slots
(`rounding="real"`), whose traffic moves with windows, gamma and the lengths of requests as that of a router of
log-width `ROUTER_WIDTH` would (a hard router's moves in steps); nothing else is softened. An elasticity is
d ln(metric) / d ln(input), the percent a metric moves when an input moves by one percent, the fleet as it is: no
instance is added. Inputs at 0 or inf have none. The limits themselves move no metric of a given fleet; their worth is
their shadow price.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.optimize import nnls

from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.choices import SPARE_INSTANCES
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import FleetMetrics, Objective, cost, fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.limits import excesses
from fleetopt_jax.fleet.sizing import instances_for
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.optimize.plan import Plan, Problem, usage
from fleetopt_jax.optimize.uncertainty import OUTCOMES, Trust, log_or_zero, outcomes, plan_trust, trust_to_json
from fleetopt_jax.workload.atoms import Workload

ROUTER_WIDTH = 0.05  # in log-length: 5 % either side of a threshold
BISECTIONS = 60
ACTIVE = 1e-6  # a limit this near to zero excess binds
MOVES = (0.9, 1.1)  # by how much a threshold is moved, besides a block of 16 tokens either way


# --- the relaxed fleet ----------------------------------------------------------------------------------------------


def fleet_inputs(fleet: Fleet, workload: Workload) -> dict[str, Any]:
    """Every number the metrics of a fleet depend on, under the names of the records. Lengths have a common scale."""
    one = jnp.ones(())
    pools = zip(fleet.engines, fleet.window_tokens, fleet.gamma, fleet.n_instances, strict=True)
    return {
        "pools": tuple(
            {"engine": engine, "window_tokens": window, "gamma": gamma, "n_instances": n}
            for engine, window, gamma, n in pools
        ),
        "workload": {
            "arrival_rate_per_s": workload.arrival_rate_per_s,
            "arrival_scv": workload.arrival_scv,
            "prompt_scale": one,
            "output_scale": one,
        },
    }


def relaxed_fleet(
    inputs: dict[str, Any], fleet: Fleet, workload: Workload, assumptions: Assumptions = PHYSICAL
) -> tuple[Fleet, tuple[PoolTraffic, ...], Workload]:
    """(fleet, its traffic, its workload) with the numbers of `fleet` moved to `inputs`, as `fleet_metrics` takes them.

    Traffic is the fleet's own, plus what a router of log-width 0.05 moves when windows, gamma or lengths do. Lengths
    are whole tokens, so a window lies half a token above its whole number there: no request is at its edge.
    """
    pools, about = inputs["pools"], inputs["workload"]
    moved = Fleet(
        engines=tuple(pool["engine"] for pool in pools),
        **{name: jnp.stack([p[name] for p in pools]) for name in ("window_tokens", "gamma", "n_instances")},
    )
    scaled = replace(
        workload,
        prompt_tokens=about["prompt_scale"] * workload.prompt_tokens,
        output_tokens=about["output_scale"] * workload.output_tokens,
    )
    real = replace(assumptions, rounding="real")
    own = _own_traffic(moved.engines, fleet.window_tokens, fleet.gamma, workload, real)
    there = _soft_traffic(fleet.engines, moved.window_tokens, moved.gamma, scaled, real)
    here = _soft_traffic(fleet.engines, fleet.window_tokens, fleet.gamma, workload, real)
    traffic = jax.tree.map(lambda x, to, away: x + (to - jax.lax.stop_gradient(away)), own, there, here)
    arrivals = replace(workload, arrival_rate_per_s=about["arrival_rate_per_s"], arrival_scv=about["arrival_scv"])
    return moved, traffic, arrivals


# Compiled one by one: the reverse mode of the three together takes several times as long to compile.
_own_traffic = jax.jit(route, static_argnums=4)


@partial(jax.jit, static_argnums=4)
def _soft_traffic(
    engines: tuple[Engine, ...], windows: Array, gamma: Array, workload: Workload, assumptions: Assumptions
) -> tuple[PoolTraffic, ...]:
    return route(engines, windows + 0.5, gamma, workload, assumptions, router_width=ROUTER_WIDTH)


@partial(jax.jit, static_argnums=4)
def _log_outcomes(
    fleet: Fleet, traffic: tuple[PoolTraffic, ...], workload: Workload, slo: Slo, assumptions: Assumptions
) -> Array:
    values = outcomes(fleet_metrics(fleet, traffic, workload, replace(assumptions, rounding="real")), slo)
    return jnp.stack([log_or_zero(values[name]) for name in OUTCOMES])


def log_outcomes(
    log_moves: Array, fleet: Fleet, workload: Workload, slo: Slo, assumptions: Assumptions = PHYSICAL
) -> Array:
    """ln of `OUTCOMES` [5] with input i of `input_names` times exp(`log_moves`[i]). jit, vmap and grad work."""
    leaves, structure = jax.tree.flatten(fleet_inputs(fleet, workload))
    finite = [jnp.isfinite(x) for x in leaves]
    moved = [jnp.where(ok, jnp.where(ok, x, 0.0) * jnp.exp(move), x) for x, ok, move in zip(leaves, finite, log_moves)]
    about = relaxed_fleet(jax.tree.unflatten(structure, moved), fleet, workload, assumptions)
    return _log_outcomes(*about, slo, assumptions)


def log_jacobian(fleet: Fleet, workload: Workload, slo: Slo, assumptions: Assumptions = PHYSICAL) -> Array:
    """d ln outcome / d ln input [5, inputs], in reverse mode: its cost does not grow with the inputs."""
    still = jnp.zeros(len(jax.tree.leaves(fleet_inputs(fleet, workload))))
    _, pull_back = jax.vjp(lambda moves: log_outcomes(moves, fleet, workload, slo, assumptions), still)
    return jnp.stack([pull_back(row)[0] for row in jnp.eye(len(OUTCOMES))])


def input_names(fleet: Fleet, workload: Workload) -> list[str]:
    """The path of every input: 'pools.0.engine.decode.base_s', 'workload.arrival_rate_per_s'."""
    paths = jax.tree_util.tree_leaves_with_path(fleet_inputs(fleet, workload))
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


# --- elasticities ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elasticity:
    """d ln(metric) / d ln(input), at the input's value (SI units)."""

    input: str
    value: float
    elasticity: float


@dataclass(frozen=True)
class Elasticities:
    """Of each metric, largest first; `skipped` says why an input has none."""

    of: Mapping[str, list[Elasticity]]
    skipped: Mapping[str, str]


def elasticities(plan: Plan) -> Elasticities:
    """Of the plan's metrics in every input. A metric that is infinite or free (0 USD) has none: its list is empty."""
    about = plan.fleet, plan.problem.workload, plan.problem.slo
    jacobian = np.asarray(log_jacobian(*about, plan.problem.assumptions))
    names = input_names(*about[:2])
    values = [float(x) for x in jax.tree.leaves(fleet_inputs(*about[:2]))]
    here = outcomes(plan.metrics, plan.problem.slo)
    usable = [i for i, value in enumerate(values) if value != 0 and math.isfinite(value)]
    skipped = {names[i]: "is 0" if value == 0 else "is infinite" for i, value in enumerate(values) if i not in usable}
    of = {}
    for name, row in zip(OUTCOMES, jacobian, strict=True):
        known = 0 < float(here[name]) < math.inf
        ranked = sorted(usable, key=lambda i: -abs(row[i])) if known else []
        of[name] = [Elasticity(names[i], values[i], float(row[i])) for i in ranked]
    return Elasticities(of, skipped)


# --- prices of the limits -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShadowPrice:
    """What one more unit of a limit is worth. A limit with room to spare is worth nothing."""

    limit: str
    asked: float  # SI units
    binds: bool
    elasticity: float | None  # d ln(objective at its optimum) / d ln(limit); None where no price was found [-]
    per_unit: float | None  # d objective / d limit
    reoptimized: float | None = None  # the elasticity of whole plans between 0.9 and 1.1 times the limit


@dataclass(frozen=True)
class ThresholdValue:
    """What moving a threshold is worth. Changes are relative, of tok/J."""

    window_tokens: float
    as_sized: float  # d ln(tok/J) / d ln B with the instances there are
    resized: float  # d ln(objective) / d ln B with as many as the limits then need: 0 at a smooth optimum
    moves: Mapping[float, float | None]  # whole fleets sized anew at other thresholds; None where none holds the limits


@partial(jax.jit, static_argnames="assumptions")
def relaxed_instances(fleet: Fleet, workload: Workload, slo: Slo, *, assumptions: Assumptions = PHYSICAL) -> Array:
    """Real instances [K] at which the limits just hold, the fleet's windows as they are; by bisection in ln N.

    Limits of the whole fleet are held by pools that grow in one proportion.
    """
    real = replace(assumptions, rounding="real")
    traffic = route(fleet.engines, fleet.window_tokens, fleet.gamma, workload, real)

    def worst(n: Array) -> Array:
        metrics = fleet_metrics(replace(fleet, n_instances=n), traffic, workload, real, quantiles=False)
        limits = _limits(metrics, n, slo, assumptions).values()
        return jnp.max(jnp.stack([jnp.broadcast_to(x, n.shape) for x in limits]), axis=0)

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2.0
        ok = worst(jnp.exp(middle)) <= 0
        return jnp.where(ok, low, middle), jnp.where(ok, middle, high)

    start = jnp.log(fleet.n_instances)
    return jnp.exp(jax.lax.fori_loop(0, BISECTIONS, halve, (start - 4.0, start + 2.0))[1])


def _limits(metrics: FleetMetrics, n: Array, slo: Slo, assumptions: Assumptions) -> dict[str, Array]:
    """Every limit's excess, and the published rule's spare instance."""
    spare = SPARE_INSTANCES[assumptions.occupancy]
    return excesses(metrics.pools, slo) | {"spare": metrics.pools.utilization + spare / n - 1.0}


SLO_LIMITS = ("ttft_p99_s", "itl_s", "max_utilization")
BUDGET_OF = {"max_gpus": "n_gpus", "max_power_w": "power_w", "max_usd_per_h": "usd_per_h"}


@partial(jax.jit, static_argnames=("assumptions", "objective"))
def _conditions(
    fleet: Fleet, workload: Workload, slo: Slo, shares: Array, *, assumptions: Assumptions, objective: Objective
):
    """((ln cost, excesses [m], ln of GPUs, watts, USD and GPUs of each kind in `shares` [G, K]), their derivatives in
    ln N [K], ln B [K] and ln of the SLO's numbers [3])."""
    asked = jnp.minimum(jnp.stack([getattr(slo, name) for name in SLO_LIMITS]), 1e9)  # inf has no derivative

    def values(log_n: Array, log_window: Array, log_slo: Array):
        inputs = fleet_inputs(fleet, workload)
        factors = zip(inputs["pools"], jnp.exp(log_n), jnp.exp(log_window), strict=True)
        pools = tuple(
            pool | {"n_instances": pool["n_instances"] * n, "window_tokens": pool["window_tokens"] * b}
            for pool, n, b in factors
        )
        moved, traffic, arrivals = relaxed_fleet(inputs | {"pools": pools}, fleet, workload, assumptions)
        real = replace(assumptions, rounding="real")
        metrics = fleet_metrics(moved, traffic, arrivals, real, quantiles=False)
        limits = replace(slo, **dict(zip(SLO_LIMITS, asked * jnp.exp(log_slo), strict=True)))
        excess = jnp.concatenate(
            [jnp.atleast_1d(x) for x in _limits(metrics, moved.n_instances, limits, assumptions).values()]
        )
        used = [getattr(metrics, name) for name in BUDGET_OF.values()]
        used = jnp.concatenate([jnp.stack(used), shares @ metrics.pools.n_gpus])
        return jnp.log(cost(metrics, objective)), excess, jnp.log(jnp.maximum(used, 1e-9))

    at = (jnp.zeros_like(fleet.n_instances), jnp.zeros_like(fleet.n_instances), jnp.zeros(len(SLO_LIMITS)))
    return values(*at), jax.jacfwd(values, argnums=(0, 1, 2))(*at)


def shadow_prices(plan: Plan, *, reoptimize: Callable[[Problem], Plan] | None = None) -> list[ShadowPrice]:
    """The worth of every limit of a plan's problem, by its multipliers.

    At the plan's windows with real-valued instances, as few as the limits allow, minimise ln cost subject to excesses
    c <= 0. Where grad ln cost + sum lambda_i grad c_i = 0 over the limits that bind, the optimum moves by
    d ln cost = sum lambda_i d c_i with a limit (envelope theorem). lambda >= 0 by least squares. A limit on what all
    pools together use is bought with windows too, which then are free; a whole fleet within one instance of it counts
    as bound by it. Whole instances follow such a price only in steps: `reoptimize` is tried at 0.9 and 1.1 times each
    limit that binds and gives the slope of whole optima beside it.
    """
    return _prices(plan, _at_relaxed_optimum(plan), reoptimize)


@dataclass(frozen=True)
class _Optimum:
    """The relaxed optimum at a plan's windows: derivatives there, and multipliers of the limits that bind."""

    reached: bool  # whether the limits can be held
    log_cost: float
    by_slo: np.ndarray  # d ln cost / d ln of the SLO's numbers [3]
    by_budget: dict[str, float]  # d ln cost / d ln cap, of caps that bind
    by_window: np.ndarray  # d ln cost / d ln B, instances following [K]
    binding: set[str]


def _at_relaxed_optimum(plan: Plan) -> _Optimum:
    problem, fleet = plan.problem, plan.fleet
    how = {"assumptions": problem.assumptions}
    n = relaxed_instances(fleet, problem.workload, problem.slo, **how)
    kinds = [gpu for gpu, _ in problem.budget.gpus_of]
    shares = np.array([[choice.gpu == gpu for choice in plan.choices] for gpu in kinds], dtype=float)
    about = replace(fleet, n_instances=n), problem.workload, problem.slo, shares.reshape(len(kinds), len(plan.choices))
    values, derivatives = jax.tree.map(np.asarray, _conditions(*about, **how, objective=problem.objective))
    (log_cost, excess, _), (of_cost, of_excess, of_used) = values, derivatives
    order = [*BUDGET_OF, *(f"gpus_of.{gpu}" for gpu in kinds)]
    caps = [(name, order.index(name)) for name in _binding_caps(plan)]
    free = len(fleet.n_instances) - 1 if caps else 0  # windows that may move with the instances

    def variables(derivative: tuple[np.ndarray, ...]) -> np.ndarray:
        return np.concatenate([derivative[0], derivative[1][..., :free]], axis=-1)

    active = np.flatnonzero(excess > -ACTIVE)
    columns = np.concatenate([variables(of_excess)[active], variables(of_used)[[i for _, i in caps]]])
    multipliers, _ = nnls(columns.T, -variables(of_cost))
    on_limits, on_caps = np.split(multipliers, [len(active)])
    by_slo = on_limits @ of_excess[2][active]
    pools = len(fleet.n_instances)
    width = 1 if problem.slo.scope == "fleet" else pools
    names = np.repeat(["max_utilization", "ttft_p99_s", "itl_s", "spare"], [pools, width, width, pools])
    return _Optimum(
        reached=bool(np.all(excess <= ACTIVE)),
        log_cost=float(log_cost),
        by_slo=by_slo,
        by_budget={name: -float(multiplier) for (name, _), multiplier in zip(caps, on_caps, strict=True)},
        by_window=of_cost[1] + on_limits @ of_excess[1][active],
        binding={str(names[i]) for i in active},
    )


def _binding_caps(plan: Plan) -> list[str]:
    """The caps of the budget that leave no room for one more instance."""
    pools, used = plan.metrics.pools, usage(plan.problem.budget, plan.choices, plan.metrics)
    bound = []
    for name, cap in plan.problem.budget.caps.items():
        each = np.asarray(getattr(pools, BUDGET_OF.get(name, "n_gpus")) / plan.fleet.n_instances)
        if name.startswith("gpus_of."):
            each = each[[f"gpus_of.{choice.gpu}" == name for choice in plan.choices]]
        if each.size and cap - used[name] < np.max(each):
            bound.append(name)
    return bound


def _prices(plan: Plan, optimum: _Optimum, reoptimize: Callable[[Problem], Plan] | None) -> list[ShadowPrice]:
    problem = plan.problem
    sign = -1.0 if problem.objective == "tok_per_j" else 1.0
    value = math.exp(sign * optimum.log_cost)
    rows = [(name, float(getattr(problem.slo, name)), name in optimum.binding) for name in SLO_LIMITS]
    rows += [(name, cap, name in optimum.by_budget) for name, cap in problem.budget.caps.items()]
    by_limit = dict(zip(SLO_LIMITS, optimum.by_slo, strict=True)) | optimum.by_budget
    prices = []
    for name, asked, binds in rows:
        if not math.isfinite(asked):
            continue
        elasticity = sign * float(by_limit.get(name, 0.0)) if binds else 0.0
        known = optimum.reached
        found = _reoptimized(problem, name, asked, reoptimize) if reoptimize and binds else None
        prices.append(
            ShadowPrice(
                limit=name,
                asked=asked,
                binds=binds,
                elasticity=elasticity if known else None,
                per_unit=elasticity * value / asked if known else None,
                reoptimized=found,
            )
        )
    return prices


def _reoptimized(problem: Problem, name: str, asked: float, reoptimize: Callable[[Problem], Plan]) -> float | None:
    """d ln(objective) / d ln(limit) between whole optima at 0.9 and 1.1 times it; None where one does not hold."""
    factors = (MOVES[0], min(MOVES[1], 0.999 / asked) if name == "max_utilization" else MOVES[1])
    plans = [reoptimize(with_limit(problem, name, factor * asked)) for factor in factors]
    if any(plan.metrics is None for plan in plans):
        return None
    low, high = (objective_of(plan) for plan in plans)
    return math.log(high / low) / math.log(factors[1] / factors[0])


def objective_of(plan: Plan) -> float:
    """The number a plan was chosen by: its tok/J, USD/h, watts or GPUs."""
    value = float(cost(plan.metrics, plan.problem.objective))
    return 1.0 / value if plan.problem.objective == "tok_per_j" else value


def with_limit(problem: Problem, name: str, value: float) -> Problem:
    """The problem with one limit of its SLO or its budget changed."""
    if name in SLO_LIMITS:
        return replace(problem, slo=replace(problem.slo, **{name: jnp.asarray(value, dtype=float)}))
    if name.startswith("gpus_of."):
        counts = dict(problem.budget.gpus_of) | {name.removeprefix("gpus_of."): value}
        return replace(problem, budget=replace(problem.budget, gpus_of=tuple(sorted(counts.items()))))
    return replace(problem, budget=replace(problem.budget, **{name: value}))


# --- thresholds -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="assumptions")
def _sized_tok_per_j(
    engines: tuple[Engine, ...],
    windows: Array,
    gamma: Array,
    workload: Workload,
    slo: Slo,
    *,
    assumptions: Assumptions = PHYSICAL,
) -> Array:
    """tok/J [M] of whole fleets of windows [M, K]; 0 where none holds the limits."""

    def one(window: Array) -> Array:
        traffic = route(engines, window, gamma, workload, assumptions)
        n = instances_for(engines, traffic, window, workload, slo, assumptions)
        metrics = fleet_metrics(Fleet(engines, window, gamma, n), traffic, workload, assumptions, quantiles=False)
        return jnp.where(jnp.all(jnp.isfinite(n)), metrics.tok_per_j, 0.0)

    return jax.vmap(one)(windows)


def threshold_values(plan: Plan, found: Elasticities) -> list[ThresholdValue]:
    """Of every window but the last; see `ThresholdValue`."""
    return _thresholds(plan, found, _at_relaxed_optimum(plan))


def _thresholds(plan: Plan, found: Elasticities, optimum: _Optimum) -> list[ThresholdValue]:
    problem, windows = plan.problem, np.asarray(plan.fleet.window_tokens)
    sign = -1.0 if problem.objective == "tok_per_j" else 1.0
    as_sized = {e.input: e.elasticity for e in found.of["tok_per_j"]}
    tries = [(k, window) for k in range(len(windows) - 1) for window in _moved(windows, k)]
    if not tries:
        return []
    rows = np.tile(windows, (len(tries), 1))
    for row, (k, window) in zip(rows, tries, strict=True):
        row[k] = window
    here = plan.fleet
    sized = _sized_tok_per_j(
        here.engines, rows, here.gamma, problem.workload, problem.slo, assumptions=problem.assumptions
    )
    change = [float(x) / float(plan.metrics.tok_per_j) - 1.0 if x > 0 else None for x in np.asarray(sized)]
    return [
        ThresholdValue(
            window_tokens=float(windows[k]),
            as_sized=as_sized[f"pools.{k}.window_tokens"],
            resized=sign * float(optimum.by_window[k]),
            moves={window: x for (of, window), x in zip(tries, change, strict=True) if of == k},
        )
        for k in range(len(windows) - 1)
    ]


def _moved(windows: np.ndarray, k: int) -> list[float]:
    """Other places for threshold k, between its neighbours: a block either way, and a tenth."""
    below = windows[k - 1] if k else 0.0
    places = [MOVES[0] * windows[k], windows[k] - BLOCK_TOKENS, windows[k] + BLOCK_TOKENS, MOVES[1] * windows[k]]
    return sorted({float(round(place)) for place in places if below < round(place) < windows[k + 1]})


# --- all of it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """What a plan's answer rests on."""

    elasticities: Elasticities
    trust: Trust
    shadow_prices: list[ShadowPrice]
    thresholds: list[ThresholdValue]


def sensitivity(plan: Plan, *, reoptimize: Callable[[Problem], Plan] | None = None) -> Sensitivity:
    """Elasticities, intervals, shadow prices and the value of the thresholds of a plan that has a fleet."""
    if plan.fleet is None or plan.metrics is None:
        raise ValueError("need a plan with a fleet, got one that is infeasible")
    found, optimum = elasticities(plan), _at_relaxed_optimum(plan)
    return Sensitivity(
        elasticities=found,
        trust=plan_trust(plan),
        shadow_prices=_prices(plan, optimum, reoptimize),
        thresholds=_thresholds(plan, found, optimum),
    )


def sensitivity_to_json(found: Sensitivity) -> dict[str, Any]:
    """As a JSON object (SI units)."""
    return {
        "elasticities": {
            name: [{"input": e.input, "value": e.value, "elasticity": e.elasticity} for e in ranked]
            for name, ranked in found.elasticities.of.items()
        },
        "skipped": dict(found.elasticities.skipped),
        "intervals": trust_to_json(found.trust),
        "shadow_prices": [asdict(price) for price in found.shadow_prices],
        "thresholds": [
            {
                "window_tokens": value.window_tokens,
                "as_sized": value.as_sized,
                "resized": value.resized,
                "moves": [{"window_tokens": window, "change": change} for window, change in value.moves.items()],
            }
            for value in found.thresholds
        ],
    }
