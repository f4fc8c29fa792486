"""What a fleet is judged by, and its derivatives: in every input number, every factor of its engines, every limit.

All are derivatives of one function, the relaxed fleet: `evaluate` at the fleet's own traffic with real-valued slots
(`rounding="real"`), whose traffic moves with windows, gamma and the lengths of requests as that of a router of
log-width `ROUTER_WIDTH` would (a hard router's moves in steps); nothing else is softened. In reverse mode: the cost
does not grow with the inputs, and one program serves elasticities, intervals and prices. The parts are compiled one by
one, for the reverse mode of all together takes several times as long to compile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax._optimize.engine_errors import EngineFactors, factors_of, perturb
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.engine import Engine, inputs_of, with_inputs
from fleetopt_jax.fleet.evaluate import FleetMetrics, metrics_in
from fleetopt_jax.fleet.fleet import Fleet, Slo, fleet_of
from fleetopt_jax.fleet.limits import excesses
from fleetopt_jax.fleet.resources import Resources
from fleetopt_jax.fleet.stage import Setting, setting_of
from fleetopt_jax.fleet.traffic import PoolTraffic, route, routed
from fleetopt_jax.workload.atoms import Workload, grown_routed_tokens

ROUTER_WIDTH = 0.05  # in log-length: 5 % either side of a threshold
OUTCOMES = ("tok_per_j", "power_w", "usd_per_h", "ttft_p99_s", "itl_s")
SLO_LIMITS = ("ttft_p99_s", "itl_s", "max_utilization")
LIMITS = ("max_utilization", "ttft_p99_s", "itl_s", "spare")  # the SLO's, and the published rule's spare instance


def outcomes(metrics: FleetMetrics, slo: Slo) -> dict[str, Array]:
    """The metrics a plan is judged by: `OUTCOMES`, TTFT in the scope of `slo`."""
    values = {name: getattr(metrics, name) for name in OUTCOMES}
    return values | {"ttft_p99_s": metrics.ttft_p99_of_all_s} if slo.scope == "fleet" else values


def log_or_zero(value: Array) -> Array:
    """ln of a positive, finite value; 0, and so without slope, for a fleet that is free or overloaded."""
    usable = (value > 0) & jnp.isfinite(value)
    return jnp.where(usable, jnp.log(jnp.where(usable, value, 1.0)), 0.0)


def limit_excesses(metrics: FleetMetrics, n_instances: Array, slo: Slo, assumptions: Assumptions) -> dict[str, Array]:
    """The excess of each of `LIMITS`, [K] or of the whole fleet."""
    excess = excesses(metrics.pools, slo)
    spare = metrics.pools.utilization + assumptions.occupancy.spare_instances / n_instances - 1.0
    named = {"max_utilization": excess["utilization"], "spare": spare}
    return {name: jnp.atleast_1d(named[name] if name in named else excess[name]) for name in LIMITS}


# --- moves ------------------------------------------------------------------------------------------------------------


@pytree
class Moves:
    """By how much the logarithm of each number moves."""

    inputs: Array  # of `input_names`
    factors: EngineFactors  # of each lane's engine [K]
    limits: Array  # of `SLO_LIMITS`


def no_moves(fleet: Fleet, workload: Workload) -> Moves:
    """Everything as it is."""
    still = np.zeros(len(fleet.lanes))
    numbers = as_floats(inputs=np.zeros(len(input_names(fleet, workload))), limits=np.zeros(len(SLO_LIMITS)))
    return Moves(factors=EngineFactors(**as_floats(step=still, power=still, prefill=still)), **numbers)


def fleet_inputs(fleet: Fleet, workload: Workload) -> dict[str, Any]:
    """Every number the metrics of a fleet depend on, under the names of the records. Lengths have a common scale."""
    one = np.ones(())
    return {
        "pools": tuple(
            {
                "engine": inputs_of(lane.stage.engine),
                "window_tokens": lane.window_tokens,
                "gamma": lane.gamma,
                "n_instances": lane.stage.n_instances,
            }
            for lane in fleet.lanes
        ),
        "surroundings": replace(fleet.surroundings, reserve=None),  # what may be down is no number to move
        "workload": {
            "arrival_rate_per_s": workload.arrival_rate_per_s,
            "arrival_scv": workload.arrival_scv,
            "prompt_scale": one,
            "output_scale": one,
        },
    }


def input_names(fleet: Fleet, workload: Workload) -> list[str]:
    """The path of every input: 'pools.0.engine.decode.base_s', 'surroundings.site.pue', 'workload.arrival_scv'."""
    paths = jax.tree_util.tree_leaves_with_path(fleet_inputs(fleet, workload))
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


# --- the relaxed fleet ------------------------------------------------------------------------------------------------


@pytree
class _Moved:
    """A fleet and its workload with their numbers moved; each part of the traffic reads some of them."""

    fleet: Fleet
    unmoved: Fleet  # the same engines, with the windows there were
    rerouted: Fleet  # the engines there were, with other windows
    scaled: Workload  # of other lengths
    arrivals: Workload  # of another rate


@program
def _moved(moves: Moves, fleet: Fleet, workload: Workload) -> _Moved:
    leaves, structure = jax.tree.flatten(fleet_inputs(fleet, workload))
    finite = [jnp.isfinite(x) for x in leaves]
    numbers = [
        jnp.where(ok, jnp.where(ok, x, 0.0) * jnp.exp(move), x) for x, ok, move in zip(leaves, finite, moves.inputs)
    ]
    inputs = jax.tree.unflatten(structure, numbers)
    pools, about, around = inputs["pools"], inputs["workload"], inputs["surroundings"]
    around = replace(around, reserve=fleet.surroundings.reserve)
    windows, gamma, n = (jnp.stack([p[name] for p in pools]) for name in ("window_tokens", "gamma", "n_instances"))
    factors = jax.tree.map(jnp.exp, moves.factors)
    moved = [with_inputs(lane.stage.engine, pool["engine"]) for lane, pool in zip(fleet.lanes, pools, strict=True)]
    engines = [_off(engine, factors_of(factors, k)) for k, engine in enumerate(moved)]
    return _Moved(
        fleet=fleet_of(engines, windows, gamma, n, around),
        unmoved=fleet_of(engines, fleet.window_tokens, fleet.gamma, n, around),
        rerouted=fleet_of(fleet.engines, windows, gamma, n, fleet.surroundings),
        scaled=_scaled(workload, about["prompt_scale"], about["output_scale"]),
        arrivals=replace(workload, arrival_rate_per_s=about["arrival_rate_per_s"], arrival_scv=about["arrival_scv"]),
    )


def _scaled(workload: Workload, prompts: Array, outputs: Array) -> Workload:
    """The workload whose prompts and outputs are so many times as long, in the order that they have."""
    prompt, output = prompts * workload.prompt_tokens, outputs * workload.output_tokens
    routed = grown_routed_tokens(workload, prompt, output)
    return replace(workload, prompt_tokens=prompt, output_tokens=output, routed_tokens=routed)


def _off(engine: Engine, factors: EngineFactors) -> Engine:
    """`perturb`, which at factors of 1 is the engine itself, derivatives too: watts of prefill that are bent below the
    board's limit are moved by how much more they are bent."""
    off, fixed = perturb(engine, factors), jax.lax.stop_gradient(engine)

    def bent_w(factor: ArrayLike) -> Array:
        return fixed.power.bent_w(fixed.prefill.gpu_w, factor)

    gpu_w = engine.prefill.gpu_w + (bent_w(factors.power) - bent_w(1.0))
    return replace(off, prefill=replace(off.prefill, gpu_w=gpu_w))


@partial(program, static_argnames="assumptions")
def _soft_traffic(fleet: Fleet, workload: Workload, assumptions: Assumptions) -> PoolTraffic:
    above = fleet_of(fleet.engines, fleet.window_tokens + 0.5, fleet.gamma, fleet.n_instances, fleet.surroundings)
    return route(above, workload, assumptions, router_width=ROUTER_WIDTH)


@program
def _relaxed_traffic(as_is: PoolTraffic, there: PoolTraffic, here: PoolTraffic) -> PoolTraffic:
    return jax.tree.map(lambda x, to, away: x + (to - away), as_is, there, here)


@pytree
class Measures:
    """What a fleet is judged by."""

    outcomes: Array  # ln of `OUTCOMES`
    excesses: dict[str, Array]  # of `LIMITS`, [K] or [1]
    resources: Resources  # of the lanes [K]
    output_tok_per_s: Array


class _Relaxed(NamedTuple):
    """What a relaxed fleet's measures are of, moved."""

    fleet: Fleet
    traffic: PoolTraffic  # [K]
    setting: Setting
    log_limits: Array  # of `SLO_LIMITS`, what they are times of what they were


@program
def _measures(relaxed: _Relaxed, slo: Slo) -> Measures:
    fleet, log_limits, assumptions = relaxed.fleet, relaxed.log_limits, relaxed.setting.assumptions
    metrics = metrics_in(fleet, relaxed.traffic, relaxed.setting)
    values = outcomes(metrics, slo)
    limits = jnp.minimum(jnp.stack([getattr(slo, name) for name in SLO_LIMITS]), 1e9)  # inf has no derivative
    moved = replace(slo, **dict(zip(SLO_LIMITS, limits * jnp.exp(log_limits), strict=True)))
    return Measures(
        outcomes=jnp.stack([log_or_zero(values[name]) for name in OUTCOMES]),
        excesses=limit_excesses(metrics, fleet.n_instances, moved, assumptions),
        resources=metrics.pools.resources,
        output_tok_per_s=metrics.output_tok_per_s,
    )


@program
def _pulled(weights: Measures, relaxed: _Relaxed, slo: Slo) -> _Relaxed:
    """d sum(weights * measures) / d each number."""
    (found,) = jax.vjp(lambda relaxed: _measures(relaxed, slo), relaxed)[1](weights)
    return found


def _relaxed_fleet(moves: Moves, fleet: Fleet, workload: Workload, assumptions: Assumptions) -> _Relaxed:
    """The fleet with its numbers moved. jit, vmap and grad work.

    Traffic is the fleet's own, plus what a router of log-width 0.05 moves when windows, gamma or lengths do. Lengths
    are whole tokens, so a window lies half a token above its whole number there: no request is at its edge.
    """
    real = replace(assumptions, rounding="real")
    moved = _moved(moves, fleet, workload)
    as_is = routed(moved.unmoved, workload, real)
    there, here = _soft_traffic(moved.rerouted, moved.scaled, real), _soft_traffic(fleet, workload, real)
    traffic = _relaxed_traffic(as_is, there, here)
    return _Relaxed(moved.fleet, traffic, setting_of(moved.arrivals, moved.fleet.surroundings, real), moves.limits)


def log_outcomes(
    log_moves: Array, fleet: Fleet, workload: Workload, slo: Slo, assumptions: Assumptions = PHYSICAL
) -> Array:
    """ln of `OUTCOMES` [5] with input i of `input_names` times exp(`log_moves`[i])."""
    moves = replace(no_moves(fleet, workload), inputs=log_moves)
    return _measures(_relaxed_fleet(moves, fleet, workload, assumptions), slo).outcomes


# --- derivatives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Derivatives:
    """Measures of a relaxed fleet, NumPy arrays, and what pulls their derivatives back to the moves."""

    measures: Measures
    traffic: PoolTraffic
    _pull_back: Callable[[Measures], tuple[Moves]]

    def of(self, several: Sequence[Measures]) -> Moves:
        """d sum(weights * measures) / d move for several such weights, on a leading axis."""
        return jax.tree.map(lambda *rows: np.stack(rows), *(self._pull_back(weights)[0] for weights in several))

    def weights(self, **of: Any) -> Measures:
        """Of these measures; none of the others."""
        return replace(jax.tree.map(np.zeros_like, self.measures), **of)

    @cached_property
    def of_outcomes(self) -> Moves:
        """d ln outcome / d ln, a leading axis of `OUTCOMES`."""
        return self.of([self.weights(outcomes=row) for row in np.eye(len(OUTCOMES))])


def differentiate(fleet: Fleet, workload: Workload, slo: Slo, assumptions: Assumptions = PHYSICAL) -> Derivatives:
    """The derivatives at a fleet."""
    relaxed, pull_back = jax.vjp(
        lambda moves: _relaxed_fleet(moves, fleet, workload, assumptions), no_moves(fleet, workload)
    )
    measures = jax.tree.map(np.asarray, _measures(relaxed, slo))
    return Derivatives(measures, relaxed.traffic, lambda weights: pull_back(_pulled(weights, relaxed, slo)))


def derivatives_of(plan: Plan) -> Derivatives:
    """The derivatives at a plan's fleet."""
    problem = plan.problem
    return differentiate(plan.fleet, problem.workload, problem.slo, problem.assumptions)


def log_jacobian(fleet: Fleet, workload: Workload, slo: Slo, assumptions: Assumptions = PHYSICAL) -> np.ndarray:
    """d ln outcome / d ln input [5, inputs]."""
    return np.asarray(differentiate(fleet, workload, slo, assumptions).of_outcomes.inputs)
