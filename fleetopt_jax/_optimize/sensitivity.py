"""What matters: elasticities of a fleet's metrics in every input number, prices of its limits, value of its thresholds.

All are derivatives of one function, the relaxed fleet (`derivatives.py`). An elasticity is d ln(metric) / d ln(input),
the percent a metric moves when an input moves by one percent, the fleet as it is: no instance is added. Inputs at 0 or
inf have none. The limits themselves move no metric of a given fleet; their worth is their shadow price.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # whose parts load on first use
from jax import Array

from fleetopt_jax._optimize.derivatives import (
    LIMITS,
    OUTCOMES,
    SLO_LIMITS,
    Derivatives,
    Measures,
    derivatives_of,
    differentiate,
    fleet_inputs,
    input_names,
    limit_excesses,
    outcomes,
)
from fleetopt_jax._optimize.graph import Boundaries
from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.problem import Problem, demanded_tok_per_s
from fleetopt_jax._optimize.uncertainty import Trust, plan_trust
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.evaluate import fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo, fleet_of, with_limits
from fleetopt_jax.fleet.resources import Resources, Weights, usage
from fleetopt_jax.fleet.sizing import instances_for
from fleetopt_jax.fleet.traffic import PoolTraffic, route, routed
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.workload.atoms import Workload

BISECTIONS = 60
ACTIVE = 1e-6  # a limit this near to zero excess binds
MOVES = (0.9, 1.1)  # by how much a threshold is moved, besides a block of 16 tokens either way


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


def elasticities(plan: Plan, derivatives: Derivatives | None = None) -> Elasticities:
    """Of the plan's metrics in every input. A metric that is infinite or free (0 USD) has none: its list is empty."""
    fleet, problem = plan.fleet, plan.problem
    jacobian = (derivatives or derivatives_of(plan)).of_outcomes.inputs
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


def relaxed_instances(fleet: Fleet, workload: Workload, slo: Slo, *, assumptions: Assumptions = PHYSICAL) -> Array:
    """Real instances [K] at which the limits just hold, the fleet's windows as they are; by bisection in ln N.

    Limits of the whole fleet are held by pools that grow in one proportion.
    """
    traffic = routed(fleet, workload, replace(assumptions, rounding="real"))
    return _relaxed_instances(fleet, traffic, workload, slo, assumptions)


@partial(program, static_argnames="assumptions")
def _relaxed_instances(
    fleet: Fleet, traffic: PoolTraffic, workload: Workload, slo: Slo, assumptions: Assumptions
) -> Array:
    real = replace(assumptions, rounding="real")

    def worst(n: Array) -> Array:
        metrics = fleet_metrics(fleet.with_instances(n), traffic, workload, real, quantiles=False)
        found = limit_excesses(metrics, n, slo, assumptions).values()
        return jnp.max(jnp.stack([jnp.broadcast_to(x, n.shape) for x in found]), axis=0)

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2.0
        holds = worst(jnp.exp(middle)) <= 0
        return jnp.where(holds, low, middle), jnp.where(holds, middle, high)

    start = jnp.log(fleet.n_instances)
    return jnp.exp(jax.lax.fori_loop(0, BISECTIONS, halve, (start - 4.0, start + 2.0))[1])


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


def _at_relaxed_optimum(plan: Plan, traffic: PoolTraffic | None = None) -> _Optimum:
    """`traffic` [K] is the plan's with real-valued lengths, where it is known."""
    problem = plan.problem
    about = problem.workload, problem.slo
    if traffic is None:
        n = relaxed_instances(plan.fleet, *about, assumptions=problem.assumptions)
    else:
        n = _relaxed_instances(plan.fleet, traffic, *about, problem.assumptions)
    fleet = plan.fleet.with_instances(np.asarray(n))
    found = differentiate(fleet, *about, problem.assumptions)
    caps = _binding_caps(plan)
    excess = np.concatenate([found.measures.excesses[name] for name in LIMITS])
    names = np.concatenate([[name] * len(found.measures.excesses[name]) for name in LIMITS])
    active = np.flatnonzero(excess > -ACTIVE)
    log_cost, cost = _log_used(found, problem.objective_weights, plan.kinds)
    if problem.objective == "tok_per_j":
        output = float(found.measures.output_tok_per_s)
        log_cost, cost = log_cost - math.log(output), replace(cost, output_tok_per_s=np.asarray(-1.0 / output))
    used = [_log_used(found, problem.limit_weights[name], plan.kinds)[1] for name in caps]
    limits = [_one_excess(found, int(i)) for i in active]
    of = found.of([cost, *used, *limits])  # derivatives of each in everything
    inputs = input_names(fleet, problem.workload)
    by_n, by_window = (
        np.asarray(of.inputs)[:, [inputs.index(f"pools.{k}.{name}") for k in range(len(plan.specs))]]
        for name in ("n_instances", "window_tokens")
    )
    free = len(plan.specs) - 1 if caps else 0  # windows that may move with the instances
    gradient = np.concatenate([by_n, by_window[:, :free]], axis=1)
    multipliers, _ = scipy.optimize.nnls(gradient[1:].T, -gradient[0])
    on_caps, on_limits = np.split(multipliers, [len(caps)])
    first = 1 + len(caps)
    by_slo = on_limits @ np.asarray(of.limits)[first:]
    return _Optimum(
        reached=bool(np.all(excess <= ACTIVE)),
        log_cost=log_cost,
        by_limit=dict(zip(SLO_LIMITS, by_slo.tolist(), strict=True))
        | dict(zip(caps, (-on_caps).tolist(), strict=True)),
        by_window=by_window[0] + on_limits @ by_window[first:],
        binding={*names[active].tolist(), *caps},
    )


def _log_used(found: Derivatives, weights: Weights, kinds: Sequence[str]) -> tuple[float, Measures]:
    """ln of what all pools use by weights, and its own weights among the measures."""
    used = max(usage(weights, kinds, found.measures.resources), 1e-9)
    by_kind = np.array([weights.gpus_of.get(kind, 0.0) for kind in kinds])
    plain = {name: np.full(len(kinds), getattr(weights, name)) for name in vars(found.measures.resources)}
    per_unit = as_floats(**plain | {"n_gpus": plain["n_gpus"] + by_kind})
    return math.log(used), found.weights(resources=jax.tree.map(lambda x: x / used, Resources(**per_unit)))


def _one_excess(found: Derivatives, i: int) -> Measures:
    """The weights of the i-th excess of all."""
    sizes = [len(found.measures.excesses[name]) for name in LIMITS]
    parts = np.split(np.eye(sum(sizes))[i], np.cumsum(sizes)[:-1])
    return found.weights(excesses=dict(zip(LIMITS, parts, strict=True)))


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


def _sized_objective(plan: Plan, windows: np.ndarray) -> np.ndarray:
    """The objective [M] of the plan's fleet sized anew with windows [M, K], tok/J or what is used, by the search's
    program; 0 where none holds the limits."""
    problem, gamma = plan.problem.serving(specs=tuple(dict.fromkeys(plan.specs))), np.asarray(plan.fleet.gamma)
    compresses, prices = bool(np.any(gamma != 1.0)), problem.prices(problem.objective_weights)
    boundaries = Boundaries(problem, windows.ravel(), np.tile(gamma, len(windows)), compresses=compresses)
    upper = 1 + np.arange(windows.size).reshape(windows.shape)
    lower = np.column_stack([np.zeros(len(windows), int), upper[:, :-1]])
    holds, watts, used = np.ones(len(windows), bool), *np.zeros((2, len(windows)))
    for k, spec in enumerate(plan.specs):
        e = problem.specs.index(spec)
        n, power_w = boundaries.exact(e, lower[:, k], upper[:, k])
        holds &= np.isfinite(n)
        n, power_w = np.where(np.isfinite(n), (n, power_w), 0.0)
        watts += power_w
        used += prices.per_instance[e] * n + prices.per_watt[e] * power_w
    reached = demanded_tok_per_s(problem) / np.where(holds, watts, 1.0) if problem.objective == "tok_per_j" else used
    return np.where(holds, reached, 0.0)


def _shared_objective(plan: Plan, windows: np.ndarray) -> np.ndarray:
    """The same where the limits are those of the whole fleet."""
    problem = plan.problem
    held, tok_per_j, resources = _shared(
        plan.fleet, jnp.asarray(windows), problem.workload, problem.slo, assumptions=problem.assumptions
    )
    if problem.objective == "tok_per_j":
        return np.where(held, tok_per_j, 0.0)
    rows = [jax.tree.map(lambda x, m=m: x[m], resources) for m in range(len(windows))]
    return np.where(held, [usage(problem.objective_weights, plan.kinds, row) for row in rows], 0.0)


@partial(program, static_argnames="assumptions")
def _shared(
    fleet: Fleet, windows: Array, workload: Workload, slo: Slo, *, assumptions: Assumptions
) -> tuple[Array, Array, Resources]:
    """(whether the limits are held [M], tok/J [M], what the pools take [M, K]) of the fleet sized anew with windows
    [M, K]."""

    def one(window: Array) -> tuple[Array, Array, Resources]:
        moved = fleet_of(fleet.engines, window, fleet.gamma, fleet.n_instances, fleet.surroundings)
        traffic = route(moved, workload, assumptions)
        n = instances_for(moved, traffic, workload, slo, assumptions)
        metrics = fleet_metrics(moved.with_instances(n), traffic, workload, assumptions, quantiles=False)
        return jnp.all(jnp.isfinite(n)), metrics.tok_per_j, metrics.pools.resources

    return jax.vmap(one)(windows)


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
    sized = (_shared_objective if problem.slo.scope == "fleet" else _sized_objective)(plan, rows)
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
    here = derivatives_of(plan)
    found, optimum = elasticities(plan, here), _at_relaxed_optimum(plan, here.traffic)
    return Sensitivity(
        elasticities=found,
        trust=plan_trust(plan, derivatives=here),
        shadow_prices=_prices(plan, optimum, reoptimize),
        thresholds=_thresholds(plan, found, optimum),
    )
