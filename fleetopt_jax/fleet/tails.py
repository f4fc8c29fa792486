"""The choice `tail`: what the P99 time to first token is made of."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices import MEAN_OWN_PREFILL, OWN_PREFILL
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.operation import Operation, PoolLoad
from fleetopt_jax.fleet.traffic import PoolTraffic
from fleetopt_jax.laws.latency import (
    TtftLaw,
    cycle_moments,
    cycle_wait_s,
    itl_quantile_s,
    ttft_quantile_s,
)
from fleetopt_jax.laws.queueing import bursty_wait, p99_wait_s


@pytree
class Tail:
    """The latencies of a pool, shape (). Finite, but without meaning, in overload."""

    wait_s: Array  # for a slot: P99 as published, mean with a full distribution [s]
    prefill_s: Array  # mean prefill counted in TTFT [s]
    ttft_p99_s: Array  # [s]
    itl_p99_s: Array  # [s]
    running_s: Array  # how long a request is in flight before it decodes [s]
    ttft: TtftLaw | None


def mean_prefill(
    engine: Engine,
    traffic: PoolTraffic,
    load: PoolLoad,
    operation: Operation,
    n_instances: ArrayLike,
    pool_scv: Array,
    instance_scv: Array,
    stable: Array,
    assumptions: Assumptions,
    quantiles: bool,
) -> Tail:
    """P99 wait for a slot under Poisson arrivals + mean prefill (arXiv 2603.17280v1)."""
    servers = jnp.where(stable, n_instances * load.n_max, 1.0)
    wait_s = p99_wait_s(servers, load.rate_per_s, load.service_s, load.service_scv)
    prefill_s = MEAN_OWN_PREFILL[assumptions.prefill](engine, traffic.steps, traffic.demand, operation.step_s)
    return Tail(
        wait_s=wait_s,
        prefill_s=prefill_s,
        ttft_p99_s=wait_s + prefill_s,
        itl_p99_s=operation.itl_s,
        running_s=jnp.zeros_like(prefill_s),
        ttft=None,
    )


def quantile(
    engine: Engine,
    traffic: PoolTraffic,
    load: PoolLoad,
    operation: Operation,
    n_instances: ArrayLike,
    pool_scv: Array,
    instance_scv: Array,
    stable: Array,
    assumptions: Assumptions,
    quantiles: bool,
) -> Tail:
    """The P99 of slot wait + prefill queue + own prefill, arrivals as bursty as the workload's.

    The slot queue is the pool's, with its share of the burstiness (`pool_scv`); an instance's prefill queue sees what
    dispatch leaves of it (`instance_scv`).
    """
    instances = jnp.where(stable, n_instances, 1.0)
    rate = jnp.where(stable, load.rate_per_s, 0.5 * load.instance_per_s)
    servers = jnp.maximum(instances * load.n_max, 1.0)
    slot_q, slot_s = bursty_wait(servers, rate, load.service_s, pool_scv, load.service_scv)

    f = operation.prefill_frac
    cycle_s, variance = cycle_moments(
        operation.step_s, rate / instances, f, load.prefill_square_s2 + (instance_scv - 1.0) * load.prefill_s**2
    )
    queue_s = cycle_wait_s(cycle_s, variance, f)
    waits_q = 1.0 - (1.0 - slot_q) * (1.0 - f)
    some = waits_q > 1e-9
    random_s = jnp.where(some, slot_s + queue_s, 1.0)
    prompts = traffic.prompts
    own = OWN_PREFILL[assumptions.prefill]
    law = TtftLaw(
        mass=prompts.mass,
        least_s=prompts.extra_s + own(engine, prompts.shortest, operation.step_s, assumptions.whole) + f * cycle_s,
        most_s=prompts.extra_s
        + own(engine, prompts.longest, operation.step_s, assumptions.whole)
        + (1.0 + f) * cycle_s,
        shortest_tokens=prompts.shortest,
        longest_tokens=prompts.longest,
        wait_probability=jnp.where(stable, jnp.where(some, waits_q, 0.0), 1.0),
        wait_decay_per_s=jnp.where(stable, jnp.where(some, waits_q, 1.0) / jnp.maximum(random_s, 1e-9), 1e-9),
    )
    ttft_p99_s = itl_p99_s = jnp.full_like(cycle_s, jnp.inf)
    if quantiles:
        ttft_p99_s = ttft_quantile_s(jax.tree.map(lambda x: x[None], law), jnp.ones(1))
        middle = (prompts.shortest + prompts.longest) / 2.0
        itl_p99_s = itl_quantile_s(
            operation.step_s, cycle_s, variance, rate / instances, prompts.mass, middle, engine.prefill
        )
    own_mean_s = MEAN_OWN_PREFILL[assumptions.prefill](engine, traffic.steps, traffic.demand, operation.step_s)
    return Tail(
        wait_s=slot_s,
        prefill_s=own_mean_s,
        ttft_p99_s=ttft_p99_s,
        itl_p99_s=jnp.maximum(operation.itl_s, jnp.where(load.prefill_s > 0, itl_p99_s, operation.itl_s)),
        running_s=jnp.where(load.prefill_s > 0, own_mean_s, 0.0),
        ttft=law,
    )


TAIL = {"mean_prefill": mean_prefill, "quantile": quantile}
