"""How far to trust a fleet's metrics: the errors of its engines, propagated by sampling and by the linear method.

An engine is off by three factors, exp(sigma z) with z standard normal: on the time of a decode step, on the watts at a
given batch, on the engine time of prefill. A factor is common to all batches and contexts of an engine, to every pool
and every fleet that uses it (so that ratios of two fleets keep only what differs), and independent between engines.
Two tensor parallelisms or precisions on one GPU count as two engines: their errors surely go together, so intervals of
ratios between them are too wide rather than too narrow. Left out: errors of the workload, of the KV cache, of the
queueing laws themselves (`experiments/agreement.py` states those), and of the shape of an engine's laws.

    sampled   the quantiles of the metric over draws, limits and floors as they are
    linear    ln m ~ normal with variance sum (d ln m / d ln factor * sigma)^2, from one derivative of the relaxation

The two agree where a metric is close to a power law of the factors over the spread: watts and tok/J to some percent.
They part where a limit is near: TTFT on the way to overload grows beyond bounds (its upper sampled end may be inf),
power at the board's cap grows no further, and whole sequences in flight move in steps.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import ndtri

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.spec import EngineSpec, OwnLaws
from fleetopt_jax.core.struct import as_floats, pytree, stack
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import FleetMetrics, evaluate
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.limits import held
from fleetopt_jax.laws.prefill import EFFICIENCY_ERROR
from fleetopt_jax.workload.atoms import Workload

LEVEL = 0.9  # of an interval: from the 5th to the 95th percentile
N_SAMPLES = 1000
OF_MEAN_ABSOLUTE = math.sqrt(math.pi / 2.0)  # sigma of a normal error over its mean absolute value
UNSTATED = 0.2  # sigma where nobody states an error: what the paper states of its B200 (+-20 %)
OUTCOMES = ("tok_per_j", "power_w", "usd_per_h", "ttft_p99_s", "itl_s")


@pytree
class EngineErrors:
    """Standard deviations of the logarithms of an engine's factors [-]. Shape (), or [E] of E engines."""

    step: Array  # time of a decode step
    power: Array  # watts of a GPU at a given batch
    prefill: Array  # engine time of a prompt


@pytree
class EngineFactors:
    """What an engine is off by; 1 as it stands [-]. Shape (), [E] of E engines, or with axes before it."""

    step: Array
    power: Array
    prefill: Array


def make_errors(*, step: float, power: float, prefill: float) -> EngineErrors:
    """Checked `EngineErrors`."""
    values = dict(locals())
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"need a finite {name} error >= 0, got {value}")
    return EngineErrors(**as_floats(**values))


def errors_of(spec: EngineSpec) -> EngineErrors:
    """The errors of an engine, from what its catalog entry states.

    Stated step and power errors are mean absolute ones of predictions, so sigma is sqrt(pi / 2) times as much. Where
    none is stated (the paper's engines) sigma is 0.2, the +-20 % the paper gives its B200: for its H100 a guess,
    and no bound, for the published shape refitted to measurements is 49 % off on architectures left out. Prefill is
    0.4 everywhere: no engine's has been measured by itself.
    """
    entry = engine_entry(spec)

    def sigma(stated: float | None) -> float:
        return UNSTATED if stated is None else OF_MEAN_ABSOLUTE * stated

    return make_errors(step=sigma(entry.step_error), power=sigma(entry.power_error), prefill=EFFICIENCY_ERROR)


def however_run(spec: EngineSpec) -> EngineSpec:
    """The spec at its top clock and with the default batch: what of it shares its errors."""
    return replace(spec, max_num_seqs=None, clock_frac=1.0)


def shared_errors(
    specs: Sequence[EngineSpec], same: Callable[[EngineSpec], Hashable] = however_run
) -> tuple[EngineErrors, Array]:
    """(errors [E] of the distinct engines, index of its engine for each spec): those with an equal `same` share their
    factors."""
    keys = [same(spec) for spec in specs]
    distinct = {key: errors_of(spec) for key, spec in zip(keys, specs, strict=True)}
    return stack(list(distinct.values())), jnp.array([list(distinct).index(key) for key in keys])


def perturb(engine: Engine, factors: EngineFactors) -> Engine:
    """The engine with its step, its power and its prefill off by `factors` of shape (). jit, vmap and grad work.

    Each factor is on what was compared with measurements at a given batch, so power does not follow the step. Watts
    below a board's power limit grow, the limit (known, where the law has one) does not.
    """
    prefill = engine.prefill.slower(factors.prefill)
    return replace(
        engine,
        decode=engine.decode.slower(factors.step),
        power=engine.power.hungrier(factors.power),
        idle_w=engine.idle_w * factors.power,
        prefill=replace(prefill, gpu_w=engine.power.bent_w(prefill.gpu_w, factors.power)),
    )


def perturbed_spec(spec: EngineSpec, factors: EngineFactors) -> EngineSpec:
    """The spec whose laws, at the top clock, are off by `factors` of shape (): run as it was, and as well known."""
    entry = engine_entry(however_run(spec))
    engine = jax.tree.map(np.asarray, perturb(entry.engine, factors))
    laws = OwnLaws(
        decode=engine.decode,
        power=engine.power,
        prefill=engine.prefill,
        kv=engine.kv,
        idle_w=float(engine.idle_w),
        quality=entry.quality,
        step_error=entry.step_error,
        power_error=entry.power_error,
        source=entry.source,
        file=spec.file,
    )
    return replace(spec, laws=laws)


def factors_of(factors: EngineFactors, index: int | Array) -> EngineFactors:
    """Those of one engine, of [E]; or of one draw, of [n, E]."""
    return jax.tree.map(lambda x: x[index], factors)


def perturbed(fleet: Fleet, factors: EngineFactors, engine_of: Array) -> Fleet:
    """The fleet whose lane k has the engine it has, off by `factors` [E] of engine `engine_of`[k]."""
    return fleet.with_engines(
        [perturb(engine, factors_of(factors, engine_of[k])) for k, engine in enumerate(fleet.engines)]
    )


def draw(errors: EngineErrors, n_samples: int = N_SAMPLES, seed: int = 0) -> EngineFactors:
    """Factors [n, E], a Latin hypercube: of each factor one draw in each n-th of its distribution."""
    sigma = np.stack([errors.step, errors.power, errors.prefill])  # [3, E]
    rng = np.random.default_rng(seed)
    ranks = rng.permuted(np.broadcast_to(np.arange(n_samples), (*sigma.shape, n_samples)), axis=-1)
    z = ndtri((ranks + rng.uniform(1e-9, 1.0 - 1e-9, ranks.shape)) / n_samples)
    step, power, prefill = np.moveaxis(np.exp(sigma[..., None] * z), -1, 1)
    return EngineFactors(**as_floats(step=step, power=power, prefill=prefill))


def outcomes(metrics: FleetMetrics, slo: Slo) -> dict[str, Array]:
    """The metrics a plan is judged by: `OUTCOMES`, TTFT in the scope of `slo`."""
    values = {name: getattr(metrics, name) for name in OUTCOMES}
    return values | {"ttft_p99_s": metrics.ttft_p99_of_all_s} if slo.scope == "fleet" else values


@partial(jax.jit, static_argnames="assumptions")
def sample(
    fleet: Fleet,
    workload: Workload,
    slo: Slo,
    factors: EngineFactors,
    engine_of: Array,
    *,
    assumptions: Assumptions = PHYSICAL,
) -> tuple[dict[str, Array], Array]:
    """(`outcomes` [n], whether the limits hold [n]) of one fleet under `factors` [n, E], all in one `vmap`."""

    def one(drawn: EngineFactors) -> tuple[dict[str, Array], Array]:
        metrics = evaluate(perturbed(fleet, drawn, engine_of), workload, assumptions)
        return outcomes(metrics, slo), held(metrics.pools, slo)

    return jax.vmap(one)(factors)


@partial(jax.jit, static_argnames="assumptions")
def slopes(
    fleet: Fleet,
    workload: Workload,
    slo: Slo,
    errors: EngineErrors,
    engine_of: Array,
    *,
    assumptions: Assumptions = PHYSICAL,
) -> dict[str, EngineFactors]:
    """d ln outcome / d ln factor [E] of one fleet, of the relaxation with real-valued slots (`errors` gives E)."""
    real = replace(assumptions, rounding="real")

    def logs(log_factors: EngineFactors) -> dict[str, Array]:
        factors = jax.tree.map(jnp.exp, log_factors)
        values = outcomes(evaluate(perturbed(fleet, factors, engine_of), workload, real), slo)
        return {name: log_or_zero(value) for name, value in values.items()}

    zero = jnp.zeros_like(errors.step)
    return jax.jacfwd(logs)(EngineFactors(zero, zero, zero))


def log_or_zero(value: Array) -> Array:
    """ln of a positive, finite value; 0, and so without slope, for a fleet that is free or overloaded."""
    usable = (value > 0) & jnp.isfinite(value)
    return jnp.where(usable, jnp.log(jnp.where(usable, value, 1.0)), 0.0)


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
    hold_probability: float  # share of the draws in which every limit of the service holds


def plan_trust(plan: Plan, *, n_samples: int = N_SAMPLES, level: float = LEVEL, seed: int = 0) -> Trust:
    """The intervals of a plan's metrics, its fleet as it is, and the probability that its limits hold."""
    return _trust([plan], n_samples, level, seed)


def gain_trust(plan: Plan, base: Plan, *, n_samples: int = N_SAMPLES, level: float = LEVEL, seed: int = 0) -> Trust:
    """The same of `plan` over `base`, metric by metric: an engine that both use is off by the same in both.

    The limits are those of both fleets at once.
    """
    return _trust([plan, base], n_samples, level, seed)


def _trust(plans: Sequence[Plan], n_samples: int, level: float, seed: int) -> Trust:
    """Of the first plan, over the second where there is one."""
    errors, engine_of = shared_errors([spec for plan in plans for spec in plan.specs])
    factors = draw(errors, n_samples, seed)
    ends = np.cumsum([len(plan.specs) for plan in plans])
    values = {name: 1.0 for name in OUTCOMES}
    drawn = {name: np.ones(n_samples) for name in OUTCOMES}
    slope = {name: EngineFactors(*(jnp.zeros_like(errors.step) for _ in range(3))) for name in OUTCOMES}
    holds = np.ones(n_samples, dtype=bool)
    for plan, power, indices in zip(plans, (1.0, -1.0), jnp.split(engine_of, ends[:-1]), strict=False):
        problem = plan.problem
        about = (plan.fleet, problem.workload, problem.slo)
        sampled, held_there = sample(*about, factors, indices, assumptions=problem.assumptions)
        derivative = slopes(*about, errors, indices, assumptions=problem.assumptions)
        here = outcomes(plan.metrics, problem.slo)
        for name in OUTCOMES:
            values[name] *= float(here[name]) ** power
            with np.errstate(invalid="ignore"):  # inf over inf
                drawn[name] = drawn[name] * np.asarray(sampled[name]) ** power
            slope[name] = jax.tree.map(lambda x, y, p=power: x + p * y, slope[name], derivative[name])
        holds &= np.asarray(held_there)
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
