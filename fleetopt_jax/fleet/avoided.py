"""What a prefix cache spares a fleet: prompt tokens, engine time and the watts that would be drawn in it.

A prompt takes some engine time beside the sequences that decode. How much longer the same law says it would take if
nothing of it were found, on the same instances with as many in flight, times the time that prefill takes of them, is
the time avoided; drawn in it is the power of prefill. It is no forecast of the fleet without the cache, which would
have more in flight, if it held at all: to plan without says what that takes.
"""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices.prefill import KINDS
from fleetopt_jax.fleet.choices.prefix_cache import NoPrefixCache
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import PoolMetrics, for_each_lane, running
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.stage import Setting, StageLoad, setting_of, stage_load
from fleetopt_jax.fleet.step_law import decoding_in
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.laws.cycle import alone, of_prompts, together
from fleetopt_jax.laws.demand import NO_STEPS
from fleetopt_jax.workload.atoms import Workload


@pytree
class AvoidedPrefill:
    """Of one lane, or K of them with a leading axis; 0 where nothing is found."""

    tokens_per_s: Array  # of prompts, found instead of computed [1/s]
    instances: Array  # that would do nothing but compute them [-]
    power_w: Array  # that their boards would draw [W]


def avoided_prefill(fleet: Fleet, workload: Workload, pools: PoolMetrics, assumptions: Assumptions) -> AvoidedPrefill:
    """What the prefix cache of `assumptions` spares the `fleet` whose `pools` have been evaluated under them [K]."""
    whole = route(fleet, workload, replace(assumptions, prefix_cache=NoPrefixCache()))
    return _avoided(fleet, route(fleet, workload, assumptions), whole, workload, pools, assumptions)


@partial(program, static_argnames=("assumptions",))
def _avoided(
    fleet: Fleet,
    traffic: PoolTraffic,
    whole: PoolTraffic,
    workload: Workload,
    pools: PoolMetrics,
    assumptions: Assumptions,
) -> AvoidedPrefill:
    setting = setting_of(workload, fleet.surroundings, assumptions)

    of_lane = partial(_times_longer, setting)
    numbers = (fleet.window_tokens, pools.n_active, fleet.n_instances)
    longer, gpu_w = for_each_lane(of_lane, fleet.engines, traffic, whole, *numbers)
    instances = pools.n_instances * pools.prefill_frac * longer
    gpus_per_instance = jnp.stack([jnp.asarray(engine.gpus_per_instance) for engine in fleet.engines])
    return AvoidedPrefill(
        tokens_per_s=pools.rate_per_s * pools.mean_prompt_tokens * pools.prefix_hit_frac,
        instances=instances,
        power_w=instances * gpus_per_instance * gpu_w,
    )


def _times_longer(
    setting: Setting,
    engine: Engine,
    traffic: PoolTraffic,
    whole: PoolTraffic,
    window_tokens: Array,
    n_active: Array,
    n_instances: Array,
) -> tuple[Array, Array]:
    """(How much longer a prompt would take without the cache, as a share of what it takes; watts of a GPU in it)."""
    run = partial(running, engine, window_tokens, n_instances, setting)
    found = setting.assumptions.prefix_cache.met(engine, traffic, n_instances, setting, run)
    load, without = (stage_load(engine, each, window_tokens, setting) for each in (found, whole))
    n = jnp.minimum(n_active, load.n_max)

    def prompt_s(of: StageLoad) -> Array:
        return of_prompts(of.at(of.prefill_at_s, n), together(n / jnp.maximum(of.steps, NO_STEPS)))

    beside = decoding_in(engine, n, without.context_tokens)
    gpu_w = setting.assumptions.prefill.gpu_w(engine, whole.demand, whole.kinds(KINDS), beside, alone())
    busy = (traffic.traffic_frac > 0) & (prompt_s(load) > 0)
    longer = jnp.maximum(safe_div(prompt_s(without), prompt_s(load)) - 1.0, 0.0)
    return jnp.where(busy, longer, 0.0), jnp.where(busy, gpu_w, 0.0)
