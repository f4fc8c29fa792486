"""A given fleet with its inputs so many times what the plan has: every figure that somebody may observe of it.

Rate, burstiness, instances and the factors of engines leave the traffic of a lane as it is; lengths do not, and
requests are routed anew for each of them. All shifts are one compiled program, in batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax._optimize.engine_errors import EngineFactors, perturbed
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import as_floats, pytree, stack
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.evaluate import FleetMetrics, fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.traffic import PoolTraffic, routed
from fleetopt_jax.laws.ttft import ttft_mean_s, ttft_quantile_s
from fleetopt_jax.workload.atoms import Workload, grown_routed_tokens

BATCH = 64  # shifts that are computed at once
MEDIAN = 0.5


@pytree
class Shift:
    """What inputs are times what the plan has [-]; lengths are not among them. K lanes."""

    rate: Array  # of arrivals
    burstiness: Array  # squared CV of the gaps between arrivals
    instances: Array  # in service [K]
    engine: EngineFactors  # time of a decode step, watts, time of prefill [K]


@dataclass(frozen=True)
class Trial:
    """A shift, and what requests are times as long as the plan has them [-]."""

    shift: Shift
    prompts: float = 1.0
    outputs: float = 1.0


def no_shift(n_lanes: int) -> Shift:
    """Everything as the plan has it."""
    one = np.ones(n_lanes)
    return Shift(
        engine=EngineFactors(**as_floats(step=one, power=one, prefill=one)),
        **as_floats(rate=1.0, burstiness=1.0, instances=one),
    )


# --- figures, of each pool and last of the fleet [K + 1] --------------------------------------------------------------


def _ttft_mean(metrics: FleetMetrics) -> Array:
    pools = metrics.pools
    if pools.ttft is None:
        return _unknown(metrics)
    mean_s = jnp.where(pools.traffic_frac > 0, jnp.where(pools.stable, jax.vmap(ttft_mean_s)(pools.ttft), jnp.inf), 0.0)
    weighted = jnp.where(pools.traffic_frac > 0, pools.traffic_frac * mean_s, 0.0)
    return jnp.append(mean_s, safe_div(jnp.sum(weighted), jnp.sum(pools.traffic_frac)))


def _ttft_median(metrics: FleetMetrics) -> Array:
    pools, law = metrics.pools, metrics.pools.ttft
    if law is None:
        return _unknown(metrics)

    def of(share: Array) -> Array:
        return ttft_quantile_s(law, share, probability=MEDIAN)

    busy = pools.traffic_frac > 0
    each = jax.vmap(of)(jnp.eye(len(busy)))
    whole = jnp.where(jnp.all(pools.stable | ~busy), of(pools.traffic_frac), jnp.inf)
    return jnp.append(jnp.where(busy, jnp.where(pools.stable, each, jnp.inf), 0.0), whole)


def _itl_p99(metrics: FleetMetrics) -> Array:
    """Of all pools together no law says it, but of one."""
    of_pools = metrics.pools.itl_p99_s
    return jnp.append(of_pools, of_pools[0] if len(of_pools) == 1 else jnp.nan)


def _unknown(metrics: FleetMetrics) -> Array:
    return jnp.full(len(metrics.pools.rate_per_s) + 1, jnp.nan)


FIGURES: dict[str, Callable[[FleetMetrics], Array]] = {
    "rate_per_s": lambda metrics: jnp.append(metrics.pools.rate_per_s, jnp.sum(metrics.pools.rate_per_s)),
    "output_tok_per_s": lambda metrics: jnp.append(metrics.pools.output_tok_per_s, metrics.output_tok_per_s),
    "power_w": lambda metrics: jnp.append(metrics.pools.power_w, metrics.power_w),
    "ttft_s": _ttft_mean,
    "ttft_p50_s": _ttft_median,
    "ttft_p99_s": lambda metrics: jnp.append(metrics.pools.ttft_p99_s, metrics.ttft_p99_of_all_s),
    "itl_s": lambda metrics: jnp.append(metrics.pools.itl_s, metrics.itl_s),
    "itl_p99_s": _itl_p99,
}


# --- the program ------------------------------------------------------------------------------------------------------


@partial(program, static_argnames=("assumptions", "names"))
def _figures(
    fleet: Fleet,
    workload: Workload,
    shifts: Shift,
    traffic: PoolTraffic,
    assumptions: Assumptions,
    names: tuple[str, ...],
) -> dict[str, Array]:
    def one(shift: Shift, routed_so: PoolTraffic) -> dict[str, Array]:
        serving = fleet.with_instances(fleet.n_instances * shift.instances)
        served = replace(
            workload,
            arrival_rate_per_s=workload.arrival_rate_per_s * shift.rate,
            arrival_scv=workload.arrival_scv * shift.burstiness,
        )
        moved = perturbed(serving, shift.engine, np.arange(len(fleet.lanes)))
        metrics = fleet_metrics(moved, routed_so, served, assumptions)
        return {name: FIGURES[name](metrics) for name in names}

    return jax.vmap(one)(shifts, traffic)


def shifted_figures(plan: Plan, names: Sequence[str], trials: Sequence[Trial]) -> dict[str, np.ndarray]:
    """Figures [m, K + 1] of a plan's fleet in each of m trials: of every pool, last of the fleet. SI units; inf where
    requests wait for ever, nan for what no law of the plan's assumptions says."""
    problem, asked = plan.problem, tuple(sorted(set(names)))
    lengths = dict.fromkeys((trial.prompts, trial.outputs) for trial in trials)
    traffic = {of: routed(plan.fleet, _as_long(problem.workload, *of), problem.assumptions) for of in lengths}
    traffic = jax.tree.map(np.asarray, traffic)

    def part(some: Sequence[Trial]) -> dict[str, np.ndarray]:
        filled = [*some, *[some[-1]] * (BATCH - len(some))]
        found = _figures(
            plan.fleet,
            problem.workload,
            stack([trial.shift for trial in filled]),
            stack([traffic[trial.prompts, trial.outputs] for trial in filled]),
            problem.assumptions,
            asked,
        )
        return jax.tree.map(lambda x: np.asarray(x)[: len(some)], found)

    parts = [part(trials[start : start + BATCH]) for start in range(0, len(trials), BATCH)]
    return jax.tree.map(lambda *each: np.concatenate(each), *parts)


def _as_long(workload: Workload, prompts: float, outputs: float) -> Workload:
    """The workload whose prompts and outputs are so many times as long, in order again."""
    if prompts == outputs == 1.0:
        return workload
    prompt, output = prompts * np.asarray(workload.prompt_tokens), outputs * np.asarray(workload.output_tokens)
    order, longest = np.lexsort((output, prompt + output)), float(np.max(prompt + output))
    routed = grown_routed_tokens(workload, cast(Array, prompt), cast(Array, output))
    if routed is not None:
        routed = cast(Array, np.maximum(np.minimum(routed, longest), prompt + output)[order])
    reuse = None if workload.reuse is None else workload.reuse.scaled(cast(Array, np.full(len(prompt), prompts)))
    return replace(
        workload,
        **as_floats(
            prompt_tokens=prompt[order],
            output_tokens=output[order],
            weight=np.asarray(workload.weight)[order],
            by_prompt=np.argsort(prompt[order], kind="stable"),
            longest_tokens=longest,
        ),
        routed_tokens=routed,
        reuse=None if reuse is None else reuse.in_order(order),
    )
