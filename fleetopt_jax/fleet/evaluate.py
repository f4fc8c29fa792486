"""Metrics of a fleet under a workload."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree, stack
from fleetopt_jax.fleet.assumptions import PUBLISHED, Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.laws.kv_cache import max_sequences
from fleetopt_jax.laws.power import gpu_power_w
from fleetopt_jax.laws.prefill import lone_prefill_s
from fleetopt_jax.laws.queueing import p99_wait_s
from fleetopt_jax.laws.service import service_moments_s
from fleetopt_jax.workload.atoms import Workload


@pytree
class PoolMetrics:
    """One pool, or K of them with a leading axis. Rates, loads and latencies are 0 for a pool without traffic."""

    traffic_frac: Array  # share of all requests [-]
    rate_per_s: Array  # requests [1/s]
    n_max: Array  # sequences one instance can run [-]
    n_active: Array  # sequences in flight per instance, as counted for power [-]
    utilization: Array  # busy share of the slots; > 1 is overload [-]
    gpu_power_w: Array  # one GPU [W]
    power_w: Array  # the pool, in the power scope of the assumptions [W]
    output_tok_per_s: Array  # what the slots get through; short of the demand in overload [1/s]
    tok_per_j: Array  # output tokens per joule [1/J]
    wait_p99_s: Array  # P99 wait for a slot; inf in overload [s]
    prefill_s: Array  # mean prefill time counted in TTFT [s]
    ttft_p99_s: Array  # P99 wait for a slot + mean prefill on an empty instance [s]
    itl_s: Array  # mean time of an iteration with all slots full, as the service time takes it [s]
    n_instances: Array
    n_gpus: Array
    usd_per_h: Array


@pytree
class FleetMetrics:
    """A fleet, and its pools stacked on a leading axis of K."""

    tok_per_j: Array  # sum of output tokens per second / sum of watts [1/J]
    output_tok_per_s: Array
    power_w: Array
    ttft_p99_s: Array  # of the worst pool [s]
    itl_s: Array  # mean over output tokens [s]
    utilization: Array  # of the busiest pool [-]
    n_instances: Array
    n_gpus: Array
    usd_per_h: Array
    unserved_frac: Array  # requests longer than every pool accepts [-]
    pools: PoolMetrics


def evaluate(
    fleet: Fleet, workload: Workload, assumptions: Assumptions = PUBLISHED, *, router_width: ArrayLike | None = None
) -> FleetMetrics:
    """Metrics of `fleet` serving `workload`: tok/W = sum_i lambda_i E[out_i] / sum_i N_i P(n_i).

    Hard routing by default; `router_width` > 0 (in log-length) is the soft router, which gradients with respect to
    windows and gamma need, with `Assumptions(rounding="real")`. jit, vmap and grad work; nothing raises inside.
    Source: arXiv 2603.17280v1, section 4.
    """
    traffic = route(fleet.engines, fleet.window_tokens, fleet.gamma, workload, assumptions, router_width=router_width)
    return _total(
        stack(
            [
                pool_metrics(engine, pool, fleet.window_tokens[k], fleet.n_instances[k], workload, assumptions)
                for k, (engine, pool) in enumerate(zip(fleet.engines, traffic, strict=True))
            ]
        )
    )


def pool_metrics(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    n_instances: ArrayLike,
    workload: Workload,
    assumptions: Assumptions,
) -> PoolMetrics:
    """Metrics of one pool of `n_instances` equal instances serving `traffic`."""
    rate, n_max, service_s, service_scv = pool_load(engine, traffic, window_tokens, workload, assumptions)
    used = (traffic.traffic_frac > 0) & (jnp.asarray(n_instances) > 0) & (n_max > 0)
    servers = jnp.where(used, n_instances * n_max, 1.0)
    offered = rate * service_s
    utilization = offered / servers
    in_flight = jnp.minimum(utilization, 1.0) * n_max
    n_active = jnp.maximum(1.0, jnp.floor(in_flight)) if assumptions.whole else in_flight
    context = safe_div(traffic.mean.steps_len, traffic.mean.steps, otherwise=1.0)
    board_w = gpu_power_w(engine.power, n_active, context)
    n_gpus = n_instances * engine.gpus_per_instance
    power_w = board_w * (n_instances if assumptions.power_scope == "one_gpu_per_instance" else n_gpus)
    wait_s = jnp.where(used, p99_wait_s(servers, rate, service_s, service_scv), jnp.inf)
    prefill_s = lone_prefill_s(engine.decode, traffic.mean.chunks)
    served = jnp.where(used, 1.0 / jnp.maximum(1.0, utilization), 0.0)  # in overload, what the slots get through
    output_tok_per_s = rate * traffic.output_tokens * served
    busy = traffic.traffic_frac > 0

    def if_busy(value: ArrayLike) -> Array:
        return jnp.where(busy, value, 0.0)

    return PoolMetrics(
        traffic_frac=traffic.traffic_frac,
        rate_per_s=if_busy(rate),
        n_max=n_max,
        n_active=if_busy(n_active),
        utilization=if_busy(jnp.where(used, utilization, jnp.inf)),
        gpu_power_w=board_w,
        power_w=power_w,
        output_tok_per_s=output_tok_per_s,
        tok_per_j=safe_div(output_tok_per_s, power_w),
        wait_p99_s=if_busy(wait_s),
        prefill_s=if_busy(prefill_s),
        ttft_p99_s=if_busy(wait_s + prefill_s),
        itl_s=if_busy(safe_div(service_s, traffic.mean.steps)),
        n_instances=jnp.asarray(n_instances, dtype=float),
        n_gpus=n_gpus,
        usd_per_h=n_gpus * engine.usd_per_gpu_h,
    )


Objective = Literal["tok_per_j", "usd", "power", "gpus"]


def cost(metrics: FleetMetrics, objective: Objective) -> Array:
    """What an optimizer minimises: joules per token, USD/h, watts or GPUs."""
    match objective:
        case "tok_per_j":
            return metrics.power_w / metrics.output_tok_per_s
        case "usd":
            return metrics.usd_per_h
        case "power":
            return metrics.power_w
        case "gpus":
            return metrics.n_gpus


def pool_load(
    engine: Engine, traffic: PoolTraffic, window_tokens: ArrayLike, workload: Workload, assumptions: Assumptions
) -> tuple[Array, Array, Array, Array]:
    """(rate [1/s], n_max, E[s] [s], cs2) of a pool; harmless positive numbers where it has no traffic."""
    n_max = max_sequences(engine.kv, window_tokens, whole=assumptions.whole)
    busy = traffic.traffic_frac > 0
    mean = jax.tree.map(lambda x: jnp.where(busy, x, 1.0), traffic.mean)
    service_s, service_scv = service_moments_s(engine.decode, mean, n_max)
    return workload.arrival_rate_per_s * traffic.traffic_frac, n_max, service_s, service_scv


def _total(pools: PoolMetrics) -> FleetMetrics:
    output_tok_per_s, power_w = jnp.sum(pools.output_tok_per_s), jnp.sum(pools.power_w)
    return FleetMetrics(
        tok_per_j=safe_div(output_tok_per_s, power_w),
        output_tok_per_s=output_tok_per_s,
        power_w=power_w,
        ttft_p99_s=jnp.max(pools.ttft_p99_s),
        itl_s=safe_div(jnp.sum(pools.output_tok_per_s * pools.itl_s), output_tok_per_s),
        utilization=jnp.max(pools.utilization),
        n_instances=jnp.sum(pools.n_instances),
        n_gpus=jnp.sum(pools.n_gpus),
        usd_per_h=jnp.sum(pools.usd_per_h),
        unserved_frac=jnp.maximum(0.0, 1.0 - jnp.sum(pools.traffic_frac)),
        pools=pools,
    )
