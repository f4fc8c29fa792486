"""What each pool has to serve: the workload's atoms, routed and summed.

The hard router needs no loop over atoms: with prefix sums over the sorted lengths, a pool's traffic is a difference of
two of them. Under `vmap` over thresholds the sums are computed once and a candidate costs a binary search.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.routing import router_edges, soft_share
from fleetopt_jax.laws.service import StepMoments, step_moments
from fleetopt_jax.workload.atoms import Workload, split_total, total_tokens


@pytree
class PoolTraffic:
    """One pool's traffic; the mean features are 0 where the pool gets nothing."""

    traffic_frac: Array  # share of all requests [-]
    output_tokens: Array  # mean output a request of the pool is credited with [tokens]
    mean: StepMoments  # mean features of the requests as served


def route(
    engines: tuple[Engine, ...],
    window_tokens: Array,
    gamma: Array,
    workload: Workload,
    assumptions: Assumptions,
    *,
    router_width: ArrayLike | None = None,
) -> tuple[PoolTraffic, ...]:
    """The traffic of each pool; hard, or with a router of log-width `router_width` > 0.

    Lengths are split by `assumptions.output_share`. A request in (B, gamma B] is served as one of length B and
    credited its own output (the published compression). Requests beyond the last edge are served by nobody.
    """
    edges = router_edges(window_tokens, gamma)
    traffic = []
    for k, engine in enumerate(engines):
        lower, upper = edges[k - 1] if k else jnp.zeros(()), edges[k]
        if router_width is None:
            traffic.append(_hard_traffic(engine, window_tokens[k], lower, upper, workload, assumptions))
            continue
        # The last edge stays hard: what is longer than every window is rejected, whatever the router predicts.
        last = k == len(engines) - 1
        total = total_tokens(workload)
        share = soft_share(total, lower, jnp.inf if last else upper, router_width) * (total <= upper if last else 1.0)
        traffic.append(_shared_traffic(engine, window_tokens[k], share, workload, assumptions))
    return tuple(traffic)


def _features(engine: Engine, length: ArrayLike, assumptions: Assumptions) -> StepMoments:
    prompt, output = split_total(length, assumptions.output_share, whole=assumptions.whole)
    return step_moments(prompt, output, engine.chunk_tokens, whole=assumptions.whole)


def _hard_traffic(
    engine: Engine, window: Array, lower: Array, upper: Array, workload: Workload, assumptions: Assumptions
) -> PoolTraffic:
    """The requests in (lower, upper]; those longer than the window are served at its length."""
    total = total_tokens(workload)
    _, output = split_total(total, assumptions.output_share, whole=assumptions.whole)
    as_is = jnp.clip(window, lower, upper)
    start, middle, end = (jnp.searchsorted(total, edge, side="right") for edge in (lower, as_is, upper))

    def between(values: ArrayLike, i: Array, j: Array) -> Array:
        sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(workload.weight * values)])
        return sums[j] - sums[i]

    squeezed = between(1.0, middle, end)
    own = jax.tree.map(lambda x: between(x, start, middle), _features(engine, total, assumptions))
    sums = jax.tree.map(lambda x, at_window: x + squeezed * at_window, own, _features(engine, window, assumptions))
    return _traffic(between(1.0, start, end), between(output, start, end), sums)


def _shared_traffic(
    engine: Engine, window: Array, share: Array, workload: Workload, assumptions: Assumptions
) -> PoolTraffic:
    """The pool's `share` [J] of every atom; those longer than the window are served at its length."""
    total = total_tokens(workload)
    mass = workload.weight * share
    _, output = split_total(total, assumptions.output_share, whole=assumptions.whole)
    features = _features(engine, jnp.minimum(total, window), assumptions)
    return _traffic(jnp.sum(mass), jnp.sum(mass * output), jax.tree.map(lambda x: jnp.sum(mass * x), features))


def _traffic(frac: Array, output_sum: Array, sums: StepMoments) -> PoolTraffic:
    return PoolTraffic(
        traffic_frac=frac,
        output_tokens=safe_div(output_sum, frac),
        mean=jax.tree.map(lambda x: safe_div(x, frac), sums),
    )
