"""Metrics of a fleet under a workload."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import pytree, stack
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.choices.occupancy import Operation
from fleetopt_jax.fleet.engine import Engine, EnginePair, Server
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.resources import Resources, resources_of
from fleetopt_jax.fleet.stage import Setting, StageState, left_and_all, setting_of, stage_load, stage_state
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.fleet.two_stage import (
    DecodeRun,
    PrefillRun,
    decode_run,
    first_token_ttft,
    handed_over_ttft,
    prefill_run,
    require_stage_laws,
)
from fleetopt_jax.laws.itl import ItlLaw, itl_quantile_s, steps_alone
from fleetopt_jax.laws.ttft import TtftLaw, ttft_quantiles_s
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
class StageMetrics(_Takes):
    """The stages of a lane [2], the one of a lane that has one with nothing behind it; or those of K lanes [K, 2]."""

    resources: Resources
    n_instances: Array
    n_max: Array  # sequences, or prompts, that one instance can hold [-]
    n_active: Array  # that one holds [-]
    utilization: Array  # load over what the instances can take; > 1 is overload [-]
    gpu_power_w: Array  # one GPU, mean over time [W]


@pytree
class PoolMetrics(_Takes):
    """One lane, or K of them with a leading axis. Rates, loads and latencies are 0 for a pool without traffic.

    Of a lane of two stages `n_max`, `n_active` and `prefill_frac`, which is 0, are those of the stage that decodes;
    load is the busier stage's, `wait_s` is for a slot there, and `prefill_s` counts all else up to the first token."""

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
    itl_s: Array  # mean inter-token latency; with drafts of each token of an iteration [s]
    itl_p99_s: Array  # with drafts between the iterations that bring a sequence its tokens [s]
    n_instances: Array
    stable: Array  # whether it keeps up [bool]
    ttft: TtftLaw | None  # its distribution, under assumptions that have one
    itl: ItlLaw | None  # of the inter-token latency
    stages: StageMetrics | None = None  # where a lane of the fleet has two


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


def fleet_metrics(
    fleet: Fleet, traffic: PoolTraffic, workload: Workload, assumptions: Assumptions, *, quantiles: bool = True
) -> FleetMetrics:
    """Metrics of `fleet` whose lanes get `traffic` [K], of which a search needs to route but once; see `evaluate`. A
    compiled program of its own, as `routed` is, which does not depend on how many kinds of requests there are."""
    return metrics_in(fleet, traffic, setting_of(workload, fleet.surroundings, assumptions), quantiles=quantiles)


@partial(program, static_argnames="quantiles")
def metrics_in(fleet: Fleet, traffic: PoolTraffic, setting: Setting, *, quantiles: bool = True) -> FleetMetrics:
    """`fleet_metrics` in the setting of the fleet."""
    law = pool_metrics if fleet.n_stages == 1 else staged_metrics
    pools = for_each_lane(
        lambda server, pool, window, n: law(server, pool, window, n, setting),
        fleet.servers,
        traffic,
        fleet.window_tokens,
        fleet.n_instances,
    )
    return total_metrics(pools, quantiles=quantiles)


def for_each_lane(law: Callable[..., T], engines: tuple[Server, ...], traffic: PoolTraffic, *more: Any) -> T:
    """`law(engine, traffic, *more)` of every lane, stacked on a leading axis: one `vmap`, and so one compilation,
    where the engines are of one kind; else one call a lane."""
    if len({jax.tree.structure(engine) for engine in engines}) == 1:
        stacked = jax.tree.map(jnp.asarray, stack(engines))  # NumPy's cannot be the constants of a batched root
        return jax.vmap(law)(stacked, traffic, *more)
    each = [jax.tree.map(lambda x, k=k: x[k], (traffic, *more)) for k in range(len(engines))]
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

    Where some may be down (`Surroundings.reserve`), utilization and latencies are those of what is left, all else, the
    watts, the money and the batch, those of all.
    """
    law = partial(_metrics_of_up, engine, traffic, window_tokens)
    return _as_taken(*left_and_all(law, engine, n_instances, setting))


def _as_taken(left: PoolMetrics, whole: PoolMetrics) -> PoolMetrics:
    """What is left of a lane holds its limits; all of it takes what it takes."""
    if left is whole:
        return whole
    if left.stages is not None and whole.stages is not None:
        left = replace(left, stages=replace(whole.stages, utilization=left.stages.utilization))
    held = ("utilization", "wait_s", "prefill_s", "ttft_p99_s", "itl_s", "itl_p99_s", "stable", "ttft", "itl", "stages")
    return replace(whole, **{name: getattr(left, name) for name in held})


def _metrics_of_up(
    engine: Engine, traffic: PoolTraffic, window_tokens: ArrayLike, n_instances: ArrayLike, setting: Setting
) -> PoolMetrics:
    """Metrics of instances that are all up.

    What is found in a cache, load, state, operation, delay, resources: each from the one before (`stage.py`).
    """
    assumptions, surroundings = setting.assumptions, setting.surroundings

    run = partial(running, engine, window_tokens, n_instances, setting)
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


def running(
    engine: Engine, window_tokens: ArrayLike, n_instances: ArrayLike, setting: Setting, traffic: PoolTraffic
) -> tuple[StageState, Operation]:
    """The state of a stage, and how it runs."""
    load = stage_load(engine, traffic, window_tokens, setting)
    state = stage_state(engine, traffic, load, n_instances, setting)
    return state, setting.assumptions.occupancy.operate(state)


def staged_metrics(
    server: Server, traffic: PoolTraffic, window_tokens: ArrayLike, n_instances: Array, setting: Setting
) -> PoolMetrics:
    """Metrics of a lane of one stage or of two, of `n_instances` [2], with those of its stages: beside any lane."""
    if isinstance(server, EnginePair):
        return pair_metrics(server, traffic, window_tokens, n_instances, setting)
    found = pool_metrics(server, traffic, window_tokens, n_instances[0], setting)
    own = {name: getattr(found, name) for name in ("n_instances", "n_max", "n_active", "utilization", "gpu_power_w")}
    only = StageMetrics(found.resources, **own)
    ttft = found.ttft and replace(found.ttft, pauses=jnp.zeros_like(found.traffic_frac))
    return replace(found, ttft=ttft, stages=jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), only))


def pair_metrics(
    pair: EnginePair, traffic: PoolTraffic, window_tokens: ArrayLike, n_instances: Array, setting: Setting
) -> PoolMetrics:
    """Metrics of a lane whose stages are `n_instances` [2] that prefill and that decode (`two_stage.py`); what may be
    down counts as in `pool_metrics`."""
    require_stage_laws(setting.assumptions)
    law = partial(_metrics_of_up_pair, pair, traffic, window_tokens)
    return _as_taken(*left_and_all(law, pair, n_instances, setting))


def _metrics_of_up_pair(
    pair: EnginePair, traffic: PoolTraffic, window_tokens: ArrayLike, n_instances: Array, setting: Setting
) -> PoolMetrics:
    """Metrics of stages whose instances are all up."""
    busy = traffic.traffic_frac > 0
    about = traffic, window_tokens
    prefill = prefill_run(pair.prefill, *about, n_instances[0], pair.hand_over, setting)
    decode = decode_run(pair.decode, *about, n_instances[1], pair.hand_over, setting)
    compressor = setting.surroundings.compressor
    compressor_w = setting.arrival_rate_per_s * traffic.compressor_tokens * compressor.j_per_token
    stages = _stages(pair, (prefill, decode), n_instances, compressor_w, setting)
    resources = jax.tree.map(jnp.sum, stages.resources)
    served = jnp.minimum(prefill.run.served, decode.run.served)
    stable = prefill.run.stable & decode.run.stable
    output_tok_per_s = decode.rate_per_s * traffic.output_tokens * served
    operation = decode.operation
    boards = n_instances * jnp.stack([pair.prefill.gpus_per_instance, pair.decode.gpus_per_instance])

    def if_busy(value: ArrayLike) -> Array:
        return jnp.where(busy, jnp.where(stable, value, jnp.inf), 0.0)

    return PoolMetrics(
        resources=resources,
        traffic_frac=traffic.traffic_frac,
        rate_per_s=jnp.where(busy, decode.rate_per_s, 0.0),
        n_max=decode.run.n_max,
        n_active=decode.run.n_active,
        utilization=jnp.max(stages.utilization),
        prefill_frac=jnp.zeros_like(served),
        gpu_power_w=safe_div(jnp.sum(boards * stages.gpu_power_w), jnp.sum(boards)),
        output_tok_per_s=output_tok_per_s,
        tok_per_j=safe_div(output_tok_per_s, resources.power_w),
        wait_s=if_busy(decode.slot_s),
        prefill_s=if_busy(prefill.own_s + prefill.hand_over_s + decode.first_s),
        ttft_p99_s=if_busy(jnp.inf),
        mean_prompt_tokens=traffic.demand.prefill,
        prefix_hit_frac=jnp.zeros_like(served),
        itl_s=jnp.where(busy, operation.itl_s, 0.0),
        itl_p99_s=if_busy(jnp.inf),
        n_instances=jnp.sum(n_instances),
        stable=stable,
        ttft=first_token_ttft(handed_over_ttft(prefill, pair.hand_over), decode),
        itl=None if traffic.prompts is None else steps_alone(operation.step_s, traffic.prompts.mass),
        stages=stages,
    )


def _stages(
    pair: EnginePair,
    found: tuple[PrefillRun, DecodeRun],
    n_instances: Array,
    compressor_w: Array,
    setting: Setting,
) -> StageMetrics:
    """Metrics of the stages of a lane [2]; the compressor is counted where prompts are prefilled."""
    site, scope, each = setting.surroundings.site, setting.assumptions.power_scope, []
    beside_w = compressor_w, jnp.zeros_like(compressor_w)
    for (_, engine), stage, n, more_w in zip(pair.parts, found, n_instances, beside_w, strict=True):
        run = stage.run
        power_w = scope.pool_w(engine, site, n, run.gpu_w, more_w)
        resources = resources_of(engine, site, n, power_w)
        each.append(StageMetrics(resources, n, run.n_max, run.n_active, run.utilization, run.gpu_w))
    return stack(each)


def with_quantiles(pools: PoolMetrics) -> tuple[PoolMetrics, Array]:
    """The lanes [K] with the P99s of their distributions, where they have any, and the P99 TTFT of all requests
    together: the worst lane's where there is no distribution, or where a lane has none in overload."""
    if pools.ttft is None or pools.itl is None:
        return pools, jnp.max(pools.ttft_p99_s)
    ttft_s, of_all_s = ttft_quantiles_s(pools.ttft, pools.traffic_frac)
    itl_s = jax.vmap(itl_quantile_s)(pools.itl)
    # Where nothing is prefilled beside them, all tokens are a mean step apart.
    itl_s = jnp.where(pools.prefill_frac > 0, jnp.maximum(itl_s, pools.itl_s), pools.itl_s)
    busy = pools.traffic_frac > 0
    ttft_s = jnp.where(busy, jnp.where(pools.stable, ttft_s, jnp.inf), 0.0)
    worst_s = jnp.max(ttft_s)
    found = replace(pools, ttft_p99_s=ttft_s, itl_p99_s=jnp.where(busy, itl_s, 0.0))
    return found, jnp.where(jnp.isfinite(worst_s), of_all_s, worst_s)


def total_metrics(pools: PoolMetrics, *, quantiles: bool = True) -> FleetMetrics:
    """Metrics of the fleet whose lanes are `pools` [K]; `quantiles` as in `evaluate`."""
    output_tok_per_s = jnp.sum(pools.output_tok_per_s)
    resources = jax.tree.map(jnp.sum, pools.resources)
    pools, of_all_s = with_quantiles(pools) if quantiles else (pools, jnp.max(pools.ttft_p99_s))
    return FleetMetrics(
        resources=resources,
        tok_per_j=safe_div(output_tok_per_s, resources.power_w),
        output_tok_per_s=output_tok_per_s,
        ttft_p99_s=jnp.max(pools.ttft_p99_s),
        ttft_p99_of_all_s=of_all_s,
        itl_s=safe_div(jnp.sum(pools.output_tok_per_s * pools.itl_s), output_tok_per_s),
        itl_p99_s=jnp.max(pools.itl_p99_s),
        utilization=jnp.max(pools.utilization),
        n_instances=jnp.sum(pools.n_instances),
        unserved_frac=jnp.maximum(0.0, 1.0 - jnp.sum(pools.traffic_frac)),
        pools=pools,
    )
