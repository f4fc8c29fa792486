"""The least instances that hold the limits."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import whole_up
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import PoolMetrics, for_each_lane, pool_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.limits import held
from fleetopt_jax.fleet.stage import Setting, setting_of, stage_load
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.workload.atoms import Workload

OVERSIZE = 10.0  # no limit is bought with more than so many times the instances the load needs
OVERSIZE_SMALL = 16.0  # or, of small pools, so many more


def least_instances(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    slo: Slo,
    setting: Setting,
) -> Array:
    """N the load alone needs: ceil(lambda / (0.85 mu)) and, as published, ceil(lambda / mu) + 1.

    0 without traffic; inf where an instance cannot run one sequence of the window.
    """
    assumptions = setting.assumptions
    load = stage_load(engine, traffic, window_tokens, setting)
    fits = load.n_max >= (1.0 if assumptions.whole else 1e-6)
    asked = load.rate_per_s * load.service_s / jnp.where(fits, load.n_max, 1.0)
    spare = assumptions.occupancy.spare_instances
    least = jnp.maximum(
        whole_up(asked / slo.max_utilization * (1.0 - 1e-12), whole=assumptions.whole),
        whole_up(asked, whole=assumptions.whole) + spare,
    )
    return jnp.where(traffic.traffic_frac > 0, jnp.where(fits, least, jnp.inf), 0.0)


def most_instances(least: ArrayLike) -> Array:
    """The whole N beyond which no limit is worth holding."""
    return jnp.ceil(jnp.maximum(OVERSIZE * least, least + OVERSIZE_SMALL))


def required_instances(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    slo: Slo,
    setting: Setting,
) -> Array:
    """Least N of one pool that holds every limit by itself; 0 without traffic, inf where no N does.

    With real rounding the latencies are left to the caller as constraints. The published rule bounds the slot wait
    alone; here the P99 TTFT the plan reports is bounded.
    """
    least = least_instances(engine, traffic, window_tokens, slo, setting)
    if not setting.assumptions.whole:
        return least
    usable = jnp.isfinite(least) & (least > 0)

    def holds(n_instances: Array) -> Array:
        return ~usable | _pool_held(pool_metrics(engine, traffic, window_tokens, n_instances, setting), slo)

    start = jnp.where(usable, least, 1.0)
    found = _least_true(holds, start, most_instances(start))
    return jnp.where(usable, found, least)


def size_fleet(
    fleet: Fleet,
    workload: Workload,
    slo: Slo,
    assumptions: Assumptions = PHYSICAL,
    *,
    router_width: ArrayLike | None = None,
) -> Fleet:
    """`fleet` with the least instances that hold `slo` (inf where none do); `router_width` as in `evaluate`.

    The instances that `fleet` has are not read. Where the latencies are held by the fleet as a whole, all pools grow by
    one factor until they are, then each shrinks while they are, in both orders; the smaller fleet is kept. None of its
    pools can be smaller, which is not a proof that no other fleet is.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> fleet = fo.make_fleet([fo.build(fo.EngineSpec("h100"))], window_tokens=[4400], n_instances=[1])
    >>> bool(fo.size_fleet(fleet, chat, fo.make_slo()).n_instances[0] >= 1)
    True
    """
    traffic = route(fleet, workload, assumptions, router_width=router_width)
    return fleet.with_instances(instances_for(fleet, traffic, workload, slo, assumptions))


def instances_for(
    fleet: Fleet, traffic: PoolTraffic, workload: Workload, slo: Slo, assumptions: Assumptions = PHYSICAL
) -> Array:
    """The instances [K] of `size_fleet` for lanes that get `traffic` [K]."""
    setting = setting_of(workload, fleet.surroundings, assumptions)
    rule = required_instances if slo.scope == "pool" else least_instances
    n_instances = for_each_lane(
        lambda engine, pool, window: rule(engine, pool, window, slo, setting),
        fleet.engines,
        traffic,
        fleet.window_tokens,
    )
    if slo.scope == "fleet" and assumptions.whole:
        return _share_out(fleet, traffic, n_instances, slo, setting)
    return n_instances


def _pool_held(metrics: PoolMetrics, slo: Slo) -> Array:
    alone = jax.tree.map(lambda x: x[None], metrics)
    return held(alone, dataclasses.replace(slo, scope="pool"))


def _share_out(fleet: Fleet, traffic: PoolTraffic, least: Array, slo: Slo, setting: Setting) -> Array:
    """Instances [K] of the pools that together hold latencies of the whole fleet."""
    engines = fleet.engines
    usable = jnp.all(jnp.isfinite(least)) & jnp.any(least > 0)
    start = jnp.where(usable, least, 1.0)
    most = jnp.where(start > 0, most_instances(start), 0.0)

    def holds(n: Array) -> Array:
        pools = for_each_lane(
            lambda engine, pool, window, count: pool_metrics(engine, pool, window, count, setting),
            engines,
            traffic,
            fleet.window_tokens,
            n,
        )
        return held(pools, slo)

    reachable = usable & holds(most)

    def shrink(n: Array, k: int) -> Array:
        """The least n[k] with which the others, as they are, still hold."""

        def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds  # `high` always holds
            middle = jnp.floor((low + high) / 2.0)
            ok = holds(n.at[k].set(middle))
            return jnp.where(ok, low, middle + 1.0), jnp.where(ok, middle, high)

        _, high = jax.lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (start[k], n[k]))
        return n.at[k].set(jnp.where(reachable, high, n[k]))

    def grow(state: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, _ = state
        wider = factor * 1.05
        return wider, holds(jnp.minimum(jnp.ceil(start * wider), most)) | (wider > OVERSIZE + OVERSIZE_SMALL)

    factor, _ = jax.lax.while_loop(lambda state: ~state[1], grow, (jnp.ones(()), holds(start) | ~reachable))
    grown = jnp.where(start > 0, jnp.minimum(jnp.ceil(start * factor - 1e-9), most), 0.0)
    grown = jnp.where(holds(grown), grown, most)
    options = []
    for order in (range(len(engines)), range(len(engines))[::-1]):
        n = grown
        for k in order:
            n = shrink(n, k)
        options.append(n)
    gpus = jnp.stack([jnp.sum(n * jnp.stack([e.gpus_per_instance for e in engines])) for n in options])
    best = jnp.where(gpus[0] <= gpus[1], options[0], options[1])
    return jnp.where(least == 0, 0.0, jnp.where(reachable, best, jnp.inf))


def _least_true(holds, start: Array, most: Array) -> Array:
    """Least whole number from `start` to `most` for which the monotone `holds` is true, inf for none.

    Gallop, then bisect: one evaluation where `start` already holds. One body for both phases, so that `holds` is
    compiled once; a batch under `vmap` loops as long as one of its members needs.
    """

    def step(state):
        failed, passed, offset, trial = state
        ok = holds(trial)
        failed, passed = jnp.where(ok, failed, trial), jnp.where(ok, trial, passed)
        offset = jnp.maximum(1.0, 2.0 * offset)
        galloping = passed > most  # nothing has passed yet
        further = jnp.minimum(start + offset, most)
        return failed, passed, offset, jnp.where(galloping, further, jnp.floor((failed + passed) / 2.0))

    first = (start - 1.0, most + 1.0, jnp.zeros_like(start), start)
    _, passed, _, _ = jax.lax.while_loop(lambda state: state[1] - state[0] > 1.0, step, first)
    return jnp.where(passed > most, jnp.inf, passed)
