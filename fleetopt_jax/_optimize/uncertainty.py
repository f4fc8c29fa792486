"""How far to trust a fleet's metrics: the errors of its engines, propagated by sampling and by the linear method.

What engines are off by is in `engine_errors.py`. Left out of the intervals: errors of the workload, of the KV cache, of
the queueing laws themselves, and of the shape of an engine's laws. The probability that the limits hold is that of
`holding.py`, which draws the laws' errors too.

    sampled   the quantiles of the metric over draws, limits and floors as they are
    linear    ln m ~ normal with variance sum (d ln m / d ln factor * sigma)^2, from one derivative of the relaxation

The two agree where a metric is close to a power law of the factors over the spread: watts and tok/J to some percent.
They part where a limit is near: TTFT on the way to overload grows beyond bounds (its upper sampled end may be inf),
power at the board's cap grows no further, and whole sequences in flight move in steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax._optimize.derivatives import OUTCOMES, Derivatives, derivatives_of, outcomes
from fleetopt_jax._optimize.engine_errors import (
    N_SAMPLES,
    EngineErrors,
    EngineFactors,
    draw,
    perturbed,
    shared_errors,
)
from fleetopt_jax._optimize.holding import N_DRAWS, plan_draws
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.evaluate import fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.traffic import PoolTraffic, routed
from fleetopt_jax.workload.atoms import Workload

LEVEL = 0.9  # of an interval: from the 5th to the 95th percentile


def sample(
    fleet: Fleet,
    workload: Workload,
    slo: Slo,
    factors: EngineFactors,
    engine_of: ArrayLike,
    *,
    assumptions: Assumptions = PHYSICAL,
) -> dict[str, Array]:
    """`outcomes` [n] of one fleet under `factors` [n, E], all in one `vmap`. No factor sends a request another way: the
    traffic is the fleet's own."""
    traffic = routed(fleet, workload, assumptions)
    return _sample(fleet, traffic, workload, slo, factors, engine_of, assumptions=assumptions)


@partial(program, static_argnames="assumptions")
def _sample(
    fleet: Fleet,
    traffic: PoolTraffic,
    workload: Workload,
    slo: Slo,
    factors: EngineFactors,
    engine_of: ArrayLike,
    *,
    assumptions: Assumptions,
) -> dict[str, Array]:
    def one(drawn: EngineFactors) -> dict[str, Array]:
        return outcomes(fleet_metrics(perturbed(fleet, drawn, engine_of), traffic, workload, assumptions), slo)

    return jax.vmap(one)(factors)


def slopes(derivatives: Derivatives, engine_of: ArrayLike, n_engines: int) -> dict[str, EngineFactors]:
    """d ln outcome / d ln factor [E] of a fleet whose lane k has engine `engine_of`[k], of the relaxation with
    real-valued slots."""
    of_lane = derivatives.of_outcomes.factors  # [5, K]

    def of_engines(by_lane: np.ndarray) -> np.ndarray:
        total = np.zeros(n_engines)
        np.add.at(total, np.asarray(engine_of), by_lane)
        return total

    return {name: jax.tree.map(lambda x, i=i: of_engines(x[i]), of_lane) for i, name in enumerate(OUTCOMES)}


@dataclass(frozen=True)
class Interval:
    """What a value lies between; inf where draws are in overload."""

    low: float
    high: float


@dataclass(frozen=True)
class MetricTrust:
    """One metric, or ratio of metrics, and both its intervals."""

    value: float
    sampled: Interval
    linear: Interval
    log_sigma: float  # standard deviation of its logarithm, by the linear method [-]


@dataclass(frozen=True)
class Trust:
    """What metrics are, give or take, and how often the limits hold."""

    level: float  # of the intervals: 0.9 is the 5th to the 95th percentile
    n_samples: int
    metrics: Mapping[str, MetricTrust]  # of `OUTCOMES`
    hold_probability: float  # that the latencies hold, under the laws' errors too: see `holding.py`


def plan_trust(
    plan: Plan,
    *,
    n_samples: int = N_SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    derivatives: Derivatives | None = None,
) -> Trust:
    """The intervals of a plan's metrics, its fleet as it is, and the probability that its limits hold; by its
    `derivatives` where they are known."""
    return _trust([plan], n_samples, level, seed, [derivatives or derivatives_of(plan)])


def gain_trust(plan: Plan, base: Plan, *, n_samples: int = N_SAMPLES, level: float = LEVEL, seed: int = 0) -> Trust:
    """The same of `plan` over `base`, metric by metric: an engine that both use is off by the same in both.

    The limits are those of both fleets at once.
    """
    return _trust([plan, base], n_samples, level, seed, [derivatives_of(plan), derivatives_of(base)])


def _trust(plans: Sequence[Plan], n_samples: int, level: float, seed: int, derivatives: Sequence[Derivatives]) -> Trust:
    """Of the first plan, over the second where there is one."""
    errors, engine_of = shared_errors([spec for plan in plans for spec in plan.specs])
    factors = draw(errors, n_samples, seed)
    ends = np.cumsum([len(plan.specs) for plan in plans])
    values = {name: 1.0 for name in OUTCOMES}
    drawn = {name: np.ones(n_samples) for name in OUTCOMES}
    nothing = np.zeros_like(errors.step)
    no_slope = EngineFactors(**as_floats(step=nothing, power=nothing, prefill=nothing))
    slope = {name: no_slope for name in OUTCOMES}
    holds = np.ones(N_DRAWS, dtype=bool)
    of_plans = np.split(engine_of, ends[:-1])
    for plan, power, indices, known in zip(plans, (1.0, -1.0), of_plans, derivatives, strict=False):
        problem = plan.problem
        about = (plan.fleet, problem.workload, problem.slo)
        sampled = sample(*about, factors, indices, assumptions=problem.assumptions)
        derivative = slopes(known, indices, len(nothing))
        here = outcomes(plan.metrics, problem.slo)
        for name in OUTCOMES:
            values[name] *= float(here[name]) ** power
            with np.errstate(invalid="ignore"):  # inf over inf
                drawn[name] = drawn[name] * np.asarray(sampled[name]) ** power
            slope[name] = jax.tree.map(lambda x, y, p=power: x + p * y, slope[name], derivative[name])
        holds &= plan_draws(plan, seed=seed).held
    return Trust(
        level=level,
        n_samples=n_samples,
        metrics={name: metric_trust(values[name], drawn[name], slope[name], errors, level) for name in OUTCOMES},
        hold_probability=float(np.mean(holds)),
    )


def metric_trust(
    value: float, drawn: np.ndarray, slope: EngineFactors, errors: EngineErrors, level: float = LEVEL
) -> MetricTrust:
    """Both intervals of a metric: `drawn` [n] under the factors, `slope` d ln metric / d ln factor [E]."""
    log_sigma = log_deviation(slope, errors)
    log_half = NormalDist().inv_cdf((1.0 + level) / 2.0) * log_sigma
    return MetricTrust(
        value=value,
        sampled=sampled_interval(drawn, level),
        linear=Interval(value * math.exp(-log_half), value * math.exp(log_half)),
        log_sigma=log_sigma,
    )


def sampled_interval(drawn: np.ndarray, level: float = LEVEL) -> Interval:
    """The middle share `level` of the draws; no interpolation, so that inf stays what it is.

    Draws in which both parts of a ratio are infinite say nothing and are left out.
    """
    known = drawn[~np.isnan(drawn)]
    if not known.size:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(known, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], method="closest_observation")
    return Interval(float(low), float(high))


def log_deviation(slope: EngineFactors, errors: EngineErrors) -> float:
    """sigma of ln m: sqrt of the sum over engines and factors of (d ln m / d ln factor * sigma)^2."""
    sigmas = vars(errors)
    return math.sqrt(
        sum(float(np.sum((np.asarray(x) * np.asarray(sigmas[name])) ** 2)) for name, x in vars(slope).items())
    )
