"""The least instances that hold the limits."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import whole_up
from fleetopt_jax.fleet.assumptions import PUBLISHED, Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import pool_load
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.laws.prefill import lone_prefill_s
from fleetopt_jax.laws.queueing import p99_wait_s
from fleetopt_jax.workload.atoms import Workload


def required_instances(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    workload: Workload,
    slo: Slo,
    assumptions: Assumptions = PUBLISHED,
) -> Array:
    """Least N of one pool: ceil(lambda / (0.85 mu)), ceil(lambda / mu) + 1, and P99 TTFT within the limit.

    0 without traffic; inf where no N holds the limit (the prefill alone breaks it, or the window holds no sequence).
    With real rounding the wait is left to the caller as a constraint. The published rule bounds the wait alone;
    here wait plus prefill is bounded, which is the P99 TTFT the plan reports.
    """
    rate, n_max, service_s, service_scv = pool_load(engine, traffic, window_tokens, workload, assumptions)
    busy_instances = rate * service_s / jnp.maximum(n_max, 1.0)
    least = jnp.maximum(
        whole_up(busy_instances / slo.max_utilization, whole=assumptions.whole),
        whole_up(busy_instances, whole=assumptions.whole) + 1.0,
    )
    prefill_s = lone_prefill_s(engine.decode, traffic.mean.chunks)
    reachable = jnp.logical_and(n_max >= 1, prefill_s <= slo.ttft_p99_s)
    busy = traffic.traffic_frac > 0
    if assumptions.whole:

        def holds(n_instances: Array) -> Array:
            wait_s = p99_wait_s(n_instances * n_max, rate, service_s, service_scv)
            return jnp.logical_or(wait_s + prefill_s <= slo.ttft_p99_s, ~(busy & reachable))

        least = _least_true(holds, least)
    return jnp.where(busy, jnp.where(reachable, least, jnp.inf), 0.0)


def size_fleet(
    engines: tuple[Engine, ...],
    window_tokens: Array,
    gamma: Array,
    workload: Workload,
    slo: Slo,
    assumptions: Assumptions = PUBLISHED,
) -> Fleet:
    """The fleet with the least instances per pool that hold `slo` (inf where none do)."""
    traffic = route(engines, window_tokens, gamma, workload, assumptions)
    n_instances = jnp.stack(
        [
            required_instances(engine, pool, window, workload, slo, assumptions)
            for engine, pool, window in zip(engines, traffic, window_tokens, strict=True)
        ]
    )
    return Fleet(engines=engines, window_tokens=window_tokens, gamma=gamma, n_instances=n_instances)


def _least_true(holds, start: Array) -> Array:
    """Least whole number >= start for which the monotone `holds` is true: gallop, then bisect.

    One evaluation where `start` already holds; a batch under `vmap` loops only as long as one of its members needs.
    """

    # Whether the trial holds is carried along, not tested by the loop: `vmap` would evaluate a test twice an iteration.
    def gallop(state):
        _, offset, _ = state
        further = jnp.maximum(1.0, 2.0 * offset)
        return offset, further, holds(start + further)

    def bisect(state):
        failed, passed = state
        middle = jnp.floor((failed + passed) / 2.0)
        ok = holds(start + middle)
        return jnp.where(ok, failed, middle), jnp.where(ok, middle, passed)

    first = (-jnp.ones_like(start), jnp.zeros_like(start), holds(start))  # offsets that failed and passed
    failed, passed, _ = jax.lax.while_loop(lambda state: ~state[2], gallop, first)
    return start + jax.lax.while_loop(lambda state: state[1] - state[0] > 1.0, bisect, (failed, passed))[1]
