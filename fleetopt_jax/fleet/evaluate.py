"""Metrics of a fleet under a workload."""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree, stack
from fleetopt_jax.core.units import KW
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.choices import DISPATCH, POWER_SCOPE
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.operation import OCCUPANCY, pool_load
from fleetopt_jax.fleet.tails import TAIL
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.laws.latency import TtftLaw, ttft_quantile_s
from fleetopt_jax.laws.queueing import dispatched_scv, thinned_scv
from fleetopt_jax.workload.atoms import Workload

T = TypeVar("T")


@pytree
class PoolMetrics:
    """One pool, or K of them with a leading axis. Rates, loads and latencies are 0 for a pool without traffic."""

    traffic_frac: Array  # share of all requests [-]
    rate_per_s: Array  # requests [1/s]
    n_max: Array  # sequences one instance can run [-]
    n_active: Array  # sequences in flight per instance, those in prefill with them [-]
    utilization: Array  # load over what the instances can take; > 1 is overload [-]
    prefill_frac: Array  # share of an instance's time that prefill takes [-]
    gpu_power_w: Array  # one GPU, mean over time [W]
    power_w: Array  # the pool, in the power scope of the assumptions [W]
    output_tok_per_s: Array  # what the slots get through; short of the demand in overload [1/s]
    tok_per_j: Array  # output tokens per joule [1/J]
    wait_s: Array  # wait for a slot: its P99 as published, its mean with a full distribution; inf in overload [s]
    prefill_s: Array  # mean prefill time counted in TTFT [s]
    ttft_p99_s: Array  # P99 time to first token; inf in overload [s]
    mean_prompt_tokens: Array  # as served [tokens]
    itl_s: Array  # mean inter-token latency [s]
    itl_p99_s: Array  # [s]
    n_instances: Array
    n_gpus: Array
    usd_per_h: Array  # GPUs, and electricity where it has a price
    kg_co2_per_h: Array  # 0 where the carbon intensity is not given
    ttft: TtftLaw | None  # its distribution, under assumptions that have one


@pytree
class FleetMetrics:
    """A fleet, and its pools stacked on a leading axis of K."""

    tok_per_j: Array  # sum of output tokens per second / sum of watts [1/J]
    output_tok_per_s: Array
    power_w: Array
    ttft_p99_s: Array  # of the worst pool [s]
    ttft_p99_of_all_s: Array  # of all requests together; the worst pool's where there is no distribution [s]
    itl_s: Array  # mean over output tokens [s]
    itl_p99_s: Array  # of the worst pool [s]
    utilization: Array  # of the busiest pool [-]
    n_instances: Array
    n_gpus: Array
    usd_per_h: Array
    kg_co2_per_h: Array
    unserved_frac: Array  # requests longer than every pool accepts [-]
    pools: PoolMetrics


def evaluate(
    fleet: Fleet,
    workload: Workload,
    assumptions: Assumptions = PHYSICAL,
    *,
    router_width: ArrayLike | None = None,
    quantiles: bool = True,
) -> FleetMetrics:
    """Metrics of `fleet` serving `workload`: tok/J = sum_i lambda_i E[out_i] / sum_i watts_i.

    Hard routing by default; `router_width` > 0 (in log-length) is the soft router, which gradients with respect to
    windows and gamma need, with `rounding="real"`. jit, vmap and grad work; nothing raises inside. Without `quantiles`
    the P99s of distributions are not solved for and stand at inf: a search that holds limits by their tails needs none.
    Source: arXiv 2603.17280v1, section 4, for the preset `published`; `laws/` for the choices of `physical`.
    """
    traffic = route(fleet.engines, fleet.window_tokens, fleet.gamma, workload, assumptions, router_width=router_width)
    return fleet_metrics(fleet, traffic, workload, assumptions, quantiles=quantiles)


def fleet_metrics(
    fleet: Fleet,
    traffic: tuple[PoolTraffic, ...],
    workload: Workload,
    assumptions: Assumptions,
    *,
    quantiles: bool = True,
) -> FleetMetrics:
    """Metrics of `fleet` whose pools get `traffic`, of which a search needs to route but once; see `evaluate`."""
    return _total(
        for_each_pool(
            lambda engine, pool, window, n: pool_metrics(
                engine, pool, window, n, workload, assumptions, quantiles=quantiles
            ),
            fleet.engines,
            traffic,
            fleet.window_tokens,
            fleet.n_instances,
        ),
        quantiles,
    )


def for_each_pool(
    law: Callable[..., T], engines: tuple[Engine, ...], traffic: tuple[PoolTraffic, ...], *numbers: Array
) -> T:
    """`law(engine, traffic, *numbers)` of every pool, stacked on a leading axis: one `vmap`, and so one compilation,
    where the engines are of one kind; else one call a pool."""
    if len({jax.tree.structure(engine) for engine in engines}) == 1:
        return jax.vmap(law)(stack(engines), stack(traffic), *numbers)
    rows = zip(engines, traffic, *numbers, strict=True)
    return stack([law(*row) for row in rows])


def pool_metrics(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    n_instances: ArrayLike,
    workload: Workload,
    assumptions: Assumptions,
    *,
    quantiles: bool = True,
) -> PoolMetrics:
    """Metrics of one pool of `n_instances` equal instances serving `traffic`; `quantiles` as in `evaluate`."""
    load = pool_load(engine, traffic, window_tokens, workload, assumptions)
    busy = traffic.traffic_frac > 0
    used = busy & (jnp.asarray(n_instances) > 0) & (load.n_max > 0)
    servers = jnp.where(used, n_instances * load.n_max, 1.0)
    utilization = load.rate_per_s * load.service_s / servers
    stable = used & (utilization < 1.0)
    instance_per_s = load.rate_per_s / jnp.where(used, n_instances, 1.0)
    pool_scv = thinned_scv(jnp.maximum(workload.arrival_scv, 1.0), traffic.traffic_frac)
    instance_scv, companions = (
        dispatched_scv(pool_scv, n_instances, regularity) for regularity in DISPATCH[assumptions.dispatch]
    )
    operation = OCCUPANCY[assumptions.occupancy](
        engine, load, instance_per_s, companions, utilization, stable, assumptions
    )
    tail = TAIL[assumptions.tail](
        engine, traffic, load, operation, n_instances, pool_scv, instance_scv, stable, assumptions, quantiles
    )
    n_total = operation.n_decoding + instance_per_s * tail.running_s
    slots_frac = safe_div(n_total, load.n_max)  # 0 where all is as published: prefill holds its slot as steps do
    slots_frac = jnp.where(stable & (tail.running_s > 0), slots_frac, 0.0)
    stable = stable & (slots_frac < 1.0)
    compressor_w = workload.arrival_rate_per_s * traffic.tried_prompt_tokens * engine.compressor.j_per_token
    power_w = POWER_SCOPE[assumptions.power_scope](engine, n_instances, operation.gpu_w, compressor_w)
    served = jnp.where(used, 1.0 / jnp.maximum(1.0, utilization), 0.0)  # in overload, what the slots get through
    output_tok_per_s = load.rate_per_s * traffic.output_tokens * served
    n_gpus = n_instances * engine.gpus_per_instance

    def if_busy(value: ArrayLike, unstable: ArrayLike = jnp.inf) -> Array:
        return jnp.where(busy, jnp.where(stable, value, unstable), 0.0)

    return PoolMetrics(
        traffic_frac=traffic.traffic_frac,
        rate_per_s=jnp.where(busy, load.rate_per_s, 0.0),
        n_max=load.n_max,
        n_active=if_busy(jnp.minimum(n_total, load.n_max), load.n_max),
        utilization=jnp.where(busy, jnp.where(used, jnp.maximum(utilization, slots_frac), jnp.inf), 0.0),
        prefill_frac=if_busy(operation.prefill_frac, jnp.minimum(load.prefill_s * load.instance_per_s, 1.0)),
        gpu_power_w=operation.gpu_w,
        power_w=power_w,
        output_tok_per_s=output_tok_per_s,
        tok_per_j=safe_div(output_tok_per_s, power_w),
        wait_s=if_busy(tail.wait_s),
        prefill_s=if_busy(tail.prefill_s, tail.prefill_s),
        ttft_p99_s=if_busy(tail.ttft_p99_s),
        mean_prompt_tokens=traffic.demand.prompt,
        itl_s=if_busy(operation.itl_s, operation.itl_s),
        itl_p99_s=if_busy(tail.itl_p99_s, tail.itl_p99_s),
        n_instances=jnp.asarray(n_instances, dtype=float),
        n_gpus=n_gpus,
        usd_per_h=_priced(n_gpus, engine.usd_per_gpu_h) + _priced(power_w / KW, engine.site.usd_per_kwh),
        kg_co2_per_h=_priced(power_w / KW, engine.site.kg_co2_per_kwh),
        ttft=tail.ttft,
    )


def _priced(amount: ArrayLike, price: ArrayLike) -> Array:
    """amount * price; 0 where it costs nothing, even of an infinite amount."""
    free = jnp.equal(price, 0)
    return jnp.where(free, 0.0, jnp.where(free, 0.0, amount) * price)


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


def _total(pools: PoolMetrics, quantiles: bool) -> FleetMetrics:
    output_tok_per_s, power_w = jnp.sum(pools.output_tok_per_s), jnp.sum(pools.power_w)
    worst_s = jnp.max(pools.ttft_p99_s)
    of_all_s = worst_s
    if pools.ttft is not None and quantiles:
        of_all_s = jnp.where(jnp.isfinite(worst_s), ttft_quantile_s(pools.ttft, pools.traffic_frac), worst_s)
    return FleetMetrics(
        tok_per_j=safe_div(output_tok_per_s, power_w),
        output_tok_per_s=output_tok_per_s,
        power_w=power_w,
        ttft_p99_s=worst_s,
        ttft_p99_of_all_s=of_all_s,
        itl_s=safe_div(jnp.sum(pools.output_tok_per_s * pools.itl_s), output_tok_per_s),
        itl_p99_s=jnp.max(pools.itl_p99_s),
        utilization=jnp.max(pools.utilization),
        n_instances=jnp.sum(pools.n_instances),
        n_gpus=jnp.sum(pools.n_gpus),
        usd_per_h=jnp.sum(pools.usd_per_h),
        kg_co2_per_h=jnp.sum(pools.kg_co2_per_h),
        unserved_frac=jnp.maximum(0.0, 1.0 - jnp.sum(pools.traffic_frac)),
        pools=pools,
    )
