"""What matters: elasticities of a fleet's metrics in every input number, prices of its limits, value of its thresholds.

All are derivatives of one function, the relaxed fleet: `evaluate` at the plan's own traffic with real-valued slots
(`rounding="real"`), whose traffic moves with windows, gamma and the lengths of requests as that of a router of
log-width `ROUTER_WIDTH` would (a hard router's moves in steps); nothing else is softened. An elasticity is
d ln(metric) / d ln(input), the percent a metric moves when an input moves by one percent, the fleet as it is: no
instance is added. Inputs at 0 or inf have none. The limits themselves move no metric of a given fleet; their worth is
their shadow price.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.optimize import nnls

from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.uncertainty import OUTCOMES, Trust, log_or_zero, outcomes, plan_trust
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.evaluate import FleetMetrics, fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo, fleet_of, with_limits
from fleetopt_jax.fleet.limits import excesses
from fleetopt_jax.fleet.resources import Resources, Weights, usage
from fleetopt_jax.fleet.sizing import instances_for
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.workload.atoms import Workload

ROUTER_WIDTH = 0.05  # in log-length: 5 % either side of a threshold
BISECTIONS = 60
ACTIVE = 1e-6  # a limit this near to zero excess binds
MOVES = (0.9, 1.1)  # by how much a threshold is moved, besides a block of 16 tokens either way


# --- the relaxed fleet ----------------------------------------------------------------------------------------------


def fleet_inputs(fleet: Fleet, workload: Workload) -> dict[str, Any]:
    """Every number the metrics of a fleet depend on, under the names of the records. Lengths have a common scale."""
    one = jnp.ones(())
    return {
        "pools": tuple(
            {
                "engine": lane.stage.engine,
                "window_tokens": lane.window_tokens,
                "gamma": lane.gamma,
                "n_instances": lane.stage.n_instances,
            }
            for lane in fleet.lanes
        ),
        "surroundings": fleet.surroundings,
        "workload": {
            "arrival_rate_per_s": workload.arrival_rate_per_s,
            "arrival_scv": workload.arrival_scv,
            "prompt_scale": one,
            "output_scale": one,
        },
    }


def relaxed_fleet(
    inputs: dict[str, Any], fleet: Fleet, workload: Workload, assumptions: Assumptions = PHYSICAL
) -> tuple[Fleet, PoolTraffic, Workload]:
    """(fleet, its traffic [K], its workload) with the numbers of `fleet` moved to `inputs`, as `fleet_metrics` takes
    them.

    Traffic is the fleet's own, plus what a router of log-width 0.05 moves when windows, gamma or lengths do. Lengths
    are whole tokens, so a window lies half a token above its whole number there: no request is at its edge.
    """
    pools, about = inputs["pools"], inputs["workload"]
    windows, gamma, n = (jnp.stack([p[name] for p in pools]) for name in ("window_tokens", "gamma", "n_instances"))
    moved = fleet_of([pool["engine"] for pool in pools], windows, gamma, n, inputs["surroundings"])
    scaled = replace(
        workload,
        prompt_tokens=about["prompt_scale"] * workload.prompt_tokens,
        output_tokens=about["output_scale"] * workload.output_tokens,
    )
    real = replace(assumptions, rounding="real")
    unmoved = fleet_of(moved.engines, fleet.window_tokens, fleet.gamma, n, moved.surroundings)
    as_is = _hard_traffic(unmoved, workload, real)
    there = _soft_traffic(fleet_of(fleet.engines, windows, gamma, n, fleet.surroundings), scaled, real)
    here = _soft_traffic(fleet, workload, real)
    traffic = jax.tree.map(lambda x, to, away: x + (to - jax.lax.stop_gradient(away)), as_is, there, here)
    arrivals = replace(workload, arrival_rate_per_s=about["arrival_rate_per_s"], arrival_scv=about["arrival_scv"])
    return moved, traffic, arrivals


# Compiled one by one: the reverse mode of the three together takes several times as long to compile.
_hard_traffic = jax.jit(route, static_argnums=2)


@partial(jax.jit, static_argnums=2)
def _soft_traffic(fleet: Fleet, workload: Workload, assumptions: Assumptions) -> PoolTraffic:
    above = fleet_of(fleet.engines, fleet.window_tokens + 0.5, fleet.gamma, fleet.n_instances, fleet.surroundings)
    return route(above, workload, assumptions, router_width=ROUTER_WIDTH)


@partial(jax.jit, static_argnums=4)
def _log_outcomes(fleet: Fleet, traffic: PoolTraffic, workload: Workload, slo: Slo, assumptions: Assumptions) -> Array:
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
    """The path of every input: 'pools.0.engine.decode.base_s', 'surroundings.site.pue', 'workload.arrival_scv'."""
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
    fleet, problem = plan.fleet, plan.problem
    jacobian = np.asarray(log_jacobian(fleet, problem.workload, problem.slo, problem.assumptions))
    names = input_names(fleet, problem.workload)
    values = [float(x) for x in jax.tree.leaves(fleet_inputs(fleet, problem.workload))]
    here = outcomes(plan.metrics, problem.slo)
    usable = [i for i, value in enumerate(values) if value != 0 and math.isfinite(value)]
    skipped = {names[i]: "is 0" if value == 0 else "is infinite" for i, value in enumerate(values) if i not in usable}
    by_metric = {}
    for name, row in zip(OUTCOMES, jacobian, strict=True):
        known = 0 < float(here[name]) < math.inf
        order = sorted(usable, key=lambda i: -abs(row[i])) if known else []
        by_metric[name] = [Elasticity(names[i], values[i], float(row[i])) for i in order]
    return Elasticities(by_metric, skipped)


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
    """What moving a threshold is worth. Changes are relative, of the objective but for `as_sized`."""

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
    traffic = route(fleet, workload, real)

    def worst(n: Array) -> Array:
        metrics = fleet_metrics(fleet.with_instances(n), traffic, workload, real, quantiles=False)
        return jnp.max(jnp.stack([jnp.broadcast_to(x, n.shape) for x in _limits(metrics, n, slo, assumptions)]), axis=0)

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2.0
        holds = worst(jnp.exp(middle)) <= 0
        return jnp.where(holds, low, middle), jnp.where(holds, middle, high)

    start = jnp.log(fleet.n_instances)
    return jnp.exp(jax.lax.fori_loop(0, BISECTIONS, halve, (start - 4.0, start + 2.0))[1])


SLO_LIMITS = ("ttft_p99_s", "itl_s", "max_utilization")
_LIMITS = ("max_utilization", "ttft_p99_s", "itl_s", "spare")  # of `_limits`: the SLO's, and the published rule's


def _limits(metrics: FleetMetrics, n: Array, slo: Slo, assumptions: Assumptions) -> tuple[Array, ...]:
    """The excess of each of `_LIMITS`, [K] or of the whole fleet; "spare" is the published rule's spare instance."""
    excess = excesses(metrics.pools, slo)
    spare = metrics.pools.utilization + assumptions.occupancy.spare_instances / n - 1.0
    return excess["utilization"], excess["ttft_p99_s"], excess["itl_s"], spare


def _used(weights: Weights, kinds: Sequence[str], pools: Resources) -> Array:
    """`fleet.resources.usage` of traced resources [K]."""
    by_kind = np.array([weights.gpus_of.get(kind, 0.0) for kind in kinds])
    return jnp.sum(jnp.asarray(weights.of(pools))) + by_kind @ pools.n_gpus


@partial(jax.jit, static_argnames=("assumptions", "weights", "kinds"))
def _conditions(
    fleet: Fleet,
    workload: Workload,
    slo: Slo,
    *,
    assumptions: Assumptions,
    weights: tuple[Weights, ...],
    kinds: tuple[str, ...],
):
    """((excesses of `_limits`, ln of what is used by each of `weights` [W], ln of output tokens per second), their
    derivatives in ln N [K], ln B [K] and ln of the SLO's numbers [3])."""
    limits = jnp.minimum(jnp.stack([getattr(slo, name) for name in SLO_LIMITS]), 1e9)  # inf has no derivative
    real = replace(assumptions, rounding="real")

    def values(log_n: Array, log_window: Array, log_slo: Array):
        inputs = fleet_inputs(fleet, workload)
        factors = zip(inputs["pools"], jnp.exp(log_n), jnp.exp(log_window), strict=True)
        pools = tuple(
            pool | {"n_instances": pool["n_instances"] * n, "window_tokens": pool["window_tokens"] * b}
            for pool, n, b in factors
        )
        moved, traffic, arrivals = relaxed_fleet(inputs | {"pools": pools}, fleet, workload, assumptions)
        metrics = fleet_metrics(moved, traffic, arrivals, real, quantiles=False)
        moved_slo = replace(slo, **dict(zip(SLO_LIMITS, limits * jnp.exp(log_slo), strict=True)))
        excess = tuple(jnp.atleast_1d(x) for x in _limits(metrics, moved.n_instances, moved_slo, assumptions))
        used = jnp.stack([_used(each, kinds, metrics.pools.resources) for each in weights])
        return excess, jnp.log(jnp.maximum(used, 1e-9)), jnp.log(metrics.output_tok_per_s)

    still = jnp.zeros(len(kinds))
    at = (still, still, jnp.zeros(len(SLO_LIMITS)))
    return values(*at), jax.jacfwd(values, argnums=(0, 1, 2))(*at)


Reoptimize = Callable[[Problem], Plan | Infeasible]


def shadow_prices(plan: Plan, *, reoptimize: Reoptimize | None = None) -> list[ShadowPrice]:
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
    """The relaxed optimum at a plan's windows: derivatives there, by the multipliers of the limits that bind."""

    reached: bool  # whether the limits can be held
    log_cost: float  # of the objective's resources; of tokens per joule, of joules per token
    by_limit: dict[str, float]  # d ln cost / d ln of each limit of the SLO, and of the caps that bind
    by_window: np.ndarray  # d ln cost / d ln B, instances following [K]
    binding: set[str]


def _at_relaxed_optimum(plan: Plan) -> _Optimum:
    problem = plan.problem
    about = {"assumptions": problem.assumptions}
    n = relaxed_instances(plan.fleet, problem.workload, problem.slo, **about)
    caps = _binding_caps(plan)
    weights = (problem.objective_weights, *(problem.limit_weights[name] for name in caps))
    values, derivatives = _conditions(
        plan.fleet.with_instances(n), problem.workload, problem.slo, **about, weights=weights, kinds=plan.kinds
    )
    per_token = 1.0 if problem.objective == "tok_per_j" else 0.0
    excess, used, output = values
    names = np.concatenate([[name] * len(x) for name, x in zip(_LIMITS, excess, strict=True)])
    excess = np.concatenate(excess)
    # Derivatives in ln N, ln B and ln of the SLO's numbers, one array each.
    of_excess = [np.concatenate([x[i] for x in derivatives[0]]) for i in range(3)]
    of_used = [np.asarray(x) for x in derivatives[1]]
    of_cost = [x[0] - per_token * np.asarray(y) for x, y in zip(of_used, derivatives[2], strict=True)]
    active = np.flatnonzero(excess > -ACTIVE)
    free = len(plan.specs) - 1 if caps else 0  # windows that may move with the instances

    def gradient(by_n: np.ndarray, by_window: np.ndarray) -> np.ndarray:
        return np.concatenate([by_n, by_window[..., :free]], axis=-1)

    columns = np.concatenate(
        [gradient(of_excess[0][active], of_excess[1][active]), gradient(of_used[0][1:], of_used[1][1:])]
    )
    multipliers, _ = nnls(columns.T, -gradient(of_cost[0], of_cost[1]))
    on_limits, on_caps = np.split(multipliers, [len(active)])
    by_slo = on_limits @ of_excess[2][active]
    return _Optimum(
        reached=bool(np.all(excess <= ACTIVE)),
        log_cost=float(used[0]) - per_token * float(output),
        by_limit=dict(zip(SLO_LIMITS, by_slo.tolist(), strict=True))
        | dict(zip(caps, (-on_caps).tolist(), strict=True)),
        by_window=of_cost[1] + on_limits @ of_excess[1][active],
        binding={*names[active].tolist(), *caps},
    )


def _binding_caps(plan: Plan) -> list[str]:
    """The caps of the budget that leave no room for one more instance."""
    pools, n_instances = plan.metrics.pools.resources, np.asarray(plan.fleet.n_instances)

    def of_one(weights: Weights, k: int) -> float:
        """What one instance of lane k uses."""
        return usage(weights, plan.kinds[k : k + 1], jax.tree.map(lambda x: x[k : k + 1], pools)) / n_instances[k]

    return [
        name
        for name, weights in plan.problem.limit_weights.items()
        if plan.problem.budget.caps[name] - plan.used[name] < max(of_one(weights, k) for k in range(len(n_instances)))
    ]


def _prices(plan: Plan, optimum: _Optimum, reoptimize: Reoptimize | None) -> list[ShadowPrice]:
    problem = plan.problem
    sign = -1.0 if problem.objective == "tok_per_j" else 1.0
    objective = math.exp(sign * optimum.log_cost)
    limits = {name: float(getattr(problem.slo, name)) for name in SLO_LIMITS} | problem.budget.caps
    prices = []
    for name, limit in limits.items():
        if not math.isfinite(limit):
            continue
        binds = name in optimum.binding
        elasticity = sign * optimum.by_limit.get(name, 0.0) if binds else 0.0
        prices.append(
            ShadowPrice(
                limit=name,
                asked=limit,
                binds=binds,
                elasticity=elasticity if optimum.reached else None,
                per_unit=elasticity * objective / limit if optimum.reached else None,
                reoptimized=_reoptimized(problem, name, limit, reoptimize) if reoptimize and binds else None,
            )
        )
    return prices


def _reoptimized(problem: Problem, name: str, limit: float, reoptimize: Reoptimize) -> float | None:
    """d ln(objective) / d ln(limit) between whole optima at 0.9 and 1.1 times it; None where one does not hold."""
    factors = (MOVES[0], min(MOVES[1], 0.999 / limit) if name == "max_utilization" else MOVES[1])
    low, high = (reoptimize(with_limit(problem, name, factor * limit)) for factor in factors)
    if isinstance(low, Infeasible) or isinstance(high, Infeasible):
        return None
    return math.log(high.objective / low.objective) / math.log(factors[1] / factors[0])


def with_limit(problem: Problem, name: str, value: float) -> Problem:
    """The problem with one limit of its SLO or its budget changed."""
    if name in SLO_LIMITS:
        return problem.serving(slo=with_limits(problem.slo, **{name: value}))
    return replace(problem, budget=problem.budget.with_cap(name, value))


# --- thresholds -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("assumptions", "weights", "kinds", "per_joule"))
def _sized_objective(
    fleet: Fleet,
    windows: Array,
    workload: Workload,
    slo: Slo,
    *,
    assumptions: Assumptions,
    weights: Weights,
    kinds: tuple[str, ...],
    per_joule: bool,
) -> Array:
    """The objective [M] of the fleet sized anew with windows [M, K], tok/J or what is used; 0 where none holds the
    limits."""

    def one(window: Array) -> Array:
        moved = fleet_of(fleet.engines, window, fleet.gamma, fleet.n_instances, fleet.surroundings)
        traffic = route(moved, workload, assumptions)
        n = instances_for(moved, traffic, workload, slo, assumptions)
        metrics = fleet_metrics(moved.with_instances(n), traffic, workload, assumptions, quantiles=False)
        value = metrics.tok_per_j if per_joule else _used(weights, kinds, metrics.pools.resources)
        return jnp.where(jnp.all(jnp.isfinite(n)), value, 0.0)

    return jax.vmap(one)(windows)


def threshold_values(plan: Plan, found: Elasticities) -> list[ThresholdValue]:
    """Of every window but the last; see `ThresholdValue`."""
    return _thresholds(plan, found, _at_relaxed_optimum(plan))


def _thresholds(plan: Plan, found: Elasticities, optimum: _Optimum) -> list[ThresholdValue]:
    problem, windows = plan.problem, np.asarray(plan.fleet.window_tokens)
    sign = -1.0 if problem.objective == "tok_per_j" else 1.0
    as_sized = {each.input: each.elasticity for each in found.of["tok_per_j"]}
    places = [(k, window) for k in range(len(windows) - 1) for window in _moved(windows, k)]
    if not places:
        return []
    rows = np.tile(windows, (len(places), 1))
    for row, (k, window) in zip(rows, places, strict=True):
        row[k] = window
    sized = _sized_objective(
        plan.fleet,
        jnp.asarray(rows),
        problem.workload,
        problem.slo,
        assumptions=problem.assumptions,
        weights=problem.objective_weights,
        kinds=plan.kinds,
        per_joule=problem.objective == "tok_per_j",
    )
    change = [float(x) / plan.objective - 1.0 if x > 0 else None for x in np.asarray(sized)]
    return [
        ThresholdValue(
            window_tokens=float(windows[k]),
            as_sized=as_sized[f"pools.{k}.window_tokens"],
            resized=sign * float(optimum.by_window[k]),
            moves={window: x for (lane, window), x in zip(places, change, strict=True) if lane == k},
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


def sensitivity(plan: Plan, *, reoptimize: Reoptimize | None = None) -> Sensitivity:
    """Elasticities, intervals, shadow prices and the value of the thresholds of a plan."""
    found, optimum = elasticities(plan), _at_relaxed_optimum(plan)
    return Sensitivity(
        elasticities=found,
        trust=plan_trust(plan),
        shadow_prices=_prices(plan, optimum, reoptimize),
        thresholds=_thresholds(plan, found, optimum),
    )
