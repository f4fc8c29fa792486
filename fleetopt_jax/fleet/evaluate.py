"""Metrics of a fleet under a workload."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree, stack
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.choices.occupancy import Operation
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.resources import Resources, resources_of
from fleetopt_jax.fleet.stage import Setting, StageState, setting_of, stage_load, stage_state
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.laws.itl import ItlLaw, itl_quantile_s
from fleetopt_jax.laws.ttft import TtftLaw, ttft_quantile_s
from fleetopt_jax.workload.atoms import Workload

T = TypeVar("T")


class _Takes:
    """What metrics of a pool or a fleet take, by their own names."""

    resources: Resources

    @property
    def power_w(self) -> Array:
        return self.resources.power_w

    @property
    def usd_per_h(self) -> Array:
        return self.resources.usd_per_h

    @property
    def kg_co2_per_h(self) -> Array:
        return self.resources.kg_co2_per_h

    @property
    def n_gpus(self) -> Array:
        return self.resources.n_gpus


@pytree
class PoolMetrics(_Takes):
    """One lane, or K of them with a leading axis. Rates, loads and latencies are 0 for a pool without traffic."""

    resources: Resources
    traffic_frac: Array  # share of all requests [-]
    rate_per_s: Array  # requests [1/s]
    n_max: Array  # sequences one instance can run [-]
    n_active: Array  # sequences in flight per instance, those in prefill with them [-]
    utilization: Array  # load over what the instances can take; > 1 is overload [-]
    prefill_frac: Array  # share of an instance's time that prefill takes [-]
    gpu_power_w: Array  # one GPU, mean over time [W]
    output_tok_per_s: Array  # what the slots get through; short of the demand in overload [1/s]
    tok_per_j: Array  # output tokens per joule [1/J]
    wait_s: Array  # wait for a slot: its P99 as published, its mean with a full distribution; inf in overload [s]
    prefill_s: Array  # mean prefill time counted in TTFT [s]
    ttft_p99_s: Array  # P99 time to first token; inf in overload [s]
    mean_prompt_tokens: Array  # as served, what is found in a cache with it [tokens]
    prefix_hit_frac: Array  # share of the prompt tokens that is found in a cache [-]
    itl_s: Array  # mean inter-token latency [s]
    itl_p99_s: Array  # [s]
    n_instances: Array
    stable: Array  # whether it keeps up [bool]
    ttft: TtftLaw | None  # its distribution, under assumptions that have one
    itl: ItlLaw | None  # of the inter-token latency


@pytree
class FleetMetrics(_Takes):
    """A fleet, and its lanes stacked on a leading axis of K."""

    resources: Resources
    tok_per_j: Array  # sum of output tokens per second / sum of watts [1/J]
    output_tok_per_s: Array
    ttft_p99_s: Array  # of the worst pool [s]
    ttft_p99_of_all_s: Array  # of all requests together; the worst pool's where there is no distribution [s]
    itl_s: Array  # mean over output tokens [s]
    itl_p99_s: Array  # of the worst pool [s]
    utilization: Array  # of the busiest pool [-]
    n_instances: Array
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

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> fleet = fo.make_fleet([fo.build(fo.EngineSpec("h100"))], window_tokens=[4400], n_instances=[6])
    >>> metrics = fo.evaluate(fleet, chat)
    >>> round(float(metrics.output_tok_per_s)), round(float(metrics.n_gpus))
    (4200, 48)
    """
    traffic = route(fleet, workload, assumptions, router_width=router_width)
    return fleet_metrics(fleet, traffic, workload, assumptions, quantiles=quantiles)


@partial(jax.jit, static_argnames=("assumptions", "quantiles"))
def fleet_metrics(
    fleet: Fleet, traffic: PoolTraffic, workload: Workload, assumptions: Assumptions, *, quantiles: bool = True
) -> FleetMetrics:
    """Metrics of `fleet` whose lanes get `traffic` [K], of which a search needs to route but once; see `evaluate`. A
    compiled program of its own, as `routed` is."""
    setting = setting_of(workload, fleet.surroundings, assumptions)
    pools = for_each_lane(
        lambda engine, pool, window, n: pool_metrics(engine, pool, window, n, setting),
        fleet.engines,
        traffic,
        fleet.window_tokens,
        fleet.n_instances,
    )
    return total_metrics(with_quantiles(pools) if quantiles else pools, quantiles=quantiles)


def for_each_lane(law: Callable[..., T], engines: tuple[Engine, ...], traffic: PoolTraffic, *numbers: Array) -> T:
    """`law(engine, traffic, *numbers)` of every lane, stacked on a leading axis: one `vmap`, and so one compilation,
    where the engines are of one kind; else one call a lane."""
    if len({jax.tree.structure(engine) for engine in engines}) == 1:
        stacked = jax.tree.map(jnp.asarray, stack(engines))  # NumPy's cannot be the constants of a batched root
        return jax.vmap(law)(stacked, traffic, *numbers)
    each = [jax.tree.map(lambda x, k=k: x[k], (traffic, *numbers)) for k in range(len(engines))]
    return stack([law(engine, *row) for engine, row in zip(engines, each, strict=True)])


def pool_metrics(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    n_instances: ArrayLike,
    setting: Setting,
) -> PoolMetrics:
    """Metrics of a lane whose one stage is `n_instances` equal instances serving `traffic`; see `evaluate`. P99s of
    distributions stand at inf until `with_quantiles` solves for them.

    What is found in a cache, load, state, operation, delay, resources: each from the one before (`stage.py`).
    """
    assumptions, surroundings = setting.assumptions, setting.surroundings

    run = partial(_running, engine, window_tokens, n_instances, setting)
    traffic = assumptions.prefix_cache.met(engine, traffic, n_instances, setting, run)
    state, operation = run(traffic)
    load = state.load
    delay = assumptions.tail.delay(state, operation)

    n_total = operation.n_decoding + state.instance_per_s * delay.running_s
    slots_frac = safe_div(n_total, load.n_max)  # 0 where all is as published: prefill holds its slot as steps do
    slots_frac = jnp.where(state.stable & (delay.running_s > 0), slots_frac, 0.0)
    busy, stable = traffic.traffic_frac > 0, state.stable & (slots_frac < 1.0)
    compressor_w = setting.arrival_rate_per_s * traffic.compressor_tokens * surroundings.compressor.j_per_token
    power_w = assumptions.power_scope.pool_w(engine, surroundings.site, n_instances, operation.gpu_w, compressor_w)
    # In overload, what the slots get through.
    served = jnp.where(state.used, 1.0 / jnp.maximum(1.0, state.utilization), 0.0)
    output_tok_per_s = load.rate_per_s * traffic.output_tokens * served

    cached_tokens = 0.0 if traffic.demand.cached is None else traffic.demand.cached.tokens

    def if_busy(value: ArrayLike, unstable: ArrayLike = jnp.inf) -> Array:
        return jnp.where(busy, jnp.where(stable, value, unstable), 0.0)

    return PoolMetrics(
        resources=resources_of(engine, surroundings.site, n_instances, power_w),
        traffic_frac=traffic.traffic_frac,
        rate_per_s=jnp.where(busy, load.rate_per_s, 0.0),
        n_max=load.n_max,
        n_active=if_busy(jnp.minimum(n_total, load.n_max), load.n_max),
        utilization=jnp.where(busy, jnp.where(state.used, jnp.maximum(state.utilization, slots_frac), jnp.inf), 0.0),
        prefill_frac=if_busy(operation.prefill_frac, jnp.minimum(load.prefill_s * load.instance_per_s, 1.0)),
        gpu_power_w=operation.gpu_w,
        output_tok_per_s=output_tok_per_s,
        tok_per_j=safe_div(output_tok_per_s, power_w),
        wait_s=if_busy(delay.wait_s),
        prefill_s=if_busy(delay.prefill_s, delay.prefill_s),
        ttft_p99_s=if_busy(delay.ttft_p99_s),
        mean_prompt_tokens=traffic.demand.prefill + cached_tokens,
        prefix_hit_frac=safe_div(cached_tokens, traffic.demand.prefill + cached_tokens),
        itl_s=if_busy(operation.itl_s, operation.itl_s),
        itl_p99_s=if_busy(delay.itl_p99_s, delay.itl_p99_s),
        n_instances=state.n_instances,
        stable=stable,
        ttft=delay.ttft,
        itl=delay.itl,
    )


def _running(
    engine: Engine, window_tokens: ArrayLike, n_instances: ArrayLike, setting: Setting, traffic: PoolTraffic
) -> tuple[StageState, Operation]:
    """The state of a stage, and how it runs."""
    load = stage_load(engine, traffic, window_tokens, setting)
    state = stage_state(engine, traffic, load, n_instances, setting)
    return state, setting.assumptions.occupancy.operate(state)


def with_quantiles(pools: PoolMetrics) -> PoolMetrics:
    """The lanes [K] with the P99s of their distributions, where they have any."""
    if pools.ttft is None or pools.itl is None:
        return pools

    def one(ttft: TtftLaw, itl: ItlLaw) -> tuple[Array, Array]:
        return ttft_quantile_s(jax.tree.map(lambda x: x[None], ttft), jnp.ones(1)), itl_quantile_s(itl)

    ttft_s, itl_s = jax.vmap(one)(pools.ttft, pools.itl)
    # Where nothing is prefilled beside them, all tokens are a mean step apart.
    itl_s = jnp.where(pools.prefill_frac > 0, jnp.maximum(itl_s, pools.itl_s), pools.itl_s)
    ttft_s = jnp.where(pools.stable, ttft_s, jnp.inf)
    busy = pools.traffic_frac > 0
    return replace(pools, ttft_p99_s=jnp.where(busy, ttft_s, 0.0), itl_p99_s=jnp.where(busy, itl_s, 0.0))


def total_metrics(pools: PoolMetrics, *, quantiles: bool = True) -> FleetMetrics:
    """Metrics of the fleet whose lanes are `pools` [K]; `quantiles` as in `evaluate`."""
    output_tok_per_s = jnp.sum(pools.output_tok_per_s)
    resources = jax.tree.map(jnp.sum, pools.resources)
    worst_s = jnp.max(pools.ttft_p99_s)
    of_all_s = worst_s
    if pools.ttft is not None and quantiles:
        of_all_s = jnp.where(jnp.isfinite(worst_s), ttft_quantile_s(pools.ttft, pools.traffic_frac), worst_s)
    return FleetMetrics(
        resources=resources,
        tok_per_j=safe_div(output_tok_per_s, resources.power_w),
        output_tok_per_s=output_tok_per_s,
        ttft_p99_s=worst_s,
        ttft_p99_of_all_s=of_all_s,
        itl_s=safe_div(jnp.sum(pools.output_tok_per_s * pools.itl_s), output_tok_per_s),
        itl_p99_s=jnp.max(pools.itl_p99_s),
        utilization=jnp.max(pools.utilization),
        n_instances=jnp.sum(pools.n_instances),
        unserved_frac=jnp.maximum(0.0, 1.0 - jnp.sum(pools.traffic_frac)),
        pools=pools,
    )
