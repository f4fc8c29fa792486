"""The limits as numbers that must not be positive: one definition for sizing, searching and checking a plan."""

import jax
import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.fleet.evaluate import FleetMetrics, PoolMetrics
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.laws.ttft import LEVEL, TAIL_PROBABILITY, TtftLaw, ttft_quantile_s, ttft_tail

ROUNDING = LEVEL / 2.0  # limits are compared this loosely: sums and compiled orders of float64 differ by less


def load_excess(pools: PoolMetrics, slo: Slo) -> Array:
    """Utilisation over its limit, less one; of one pool or of K."""
    return pools.utilization / slo.max_utilization - 1.0


def ttft_excess(pools: PoolMetrics, slo: Slo) -> Array:
    """P(TTFT > limit) over 1 %, less one; without a distribution P99 TTFT over its limit, less one; pools alone."""
    if pools.ttft is None:
        limit_s = slo.ttft_p99_s + slo.ttft_s_per_token * pools.mean_prompt_tokens
        return pools.ttft_p99_s / limit_s - 1.0
    tail = _tails(pools.ttft, slo)
    return jnp.where(jnp.isfinite(pools.utilization) & (pools.utilization < 1), tail, 1.0) / TAIL_PROBABILITY - 1.0


def _tails(ttft: TtftLaw, slo: Slo) -> Array:
    """P(TTFT > limit) of one pool, or of K."""

    def tail(law: TtftLaw) -> Array:
        return ttft_tail(law, slo.ttft_p99_s, slo.ttft_s_per_token)

    return tail(ttft) if jnp.ndim(ttft.stable) == 0 else jax.vmap(tail)(ttft)


def itl_excess(pools: PoolMetrics, slo: Slo) -> Array:
    """Mean ITL over its limit, less one; of one pool or of K."""
    return pools.itl_s / slo.itl_s - 1.0


def excesses(pools: PoolMetrics, slo: Slo) -> dict[str, Array]:
    """Every limit of a fleet of K pools in the scope of the SLO, each shape [K] or (); held where all are <= 0."""
    ttft, itl = ttft_excess(pools, slo), itl_excess(pools, slo)
    if slo.scope == "fleet":
        requests, tokens = pools.traffic_frac, pools.output_tok_per_s
        ttft = safe_div(jnp.sum(requests * ttft), jnp.sum(requests), otherwise=-1.0)
        itl = safe_div(jnp.sum(tokens * itl), jnp.sum(tokens), otherwise=-1.0)
    return {"utilization": load_excess(pools, slo), "ttft_p99_s": ttft, "itl_s": itl}


def worst_excess(pools: PoolMetrics, slo: Slo) -> Array:
    """The largest of all."""
    return jnp.max(jnp.stack([jnp.max(excess) for excess in excesses(pools, slo).values()]))


def held(pools: PoolMetrics, slo: Slo) -> Array:
    """Whether all limits hold."""
    return worst_excess(pools, slo) <= ROUNDING


def reached(metrics: FleetMetrics, slo: Slo) -> tuple[Array, Array]:
    """(P99 TTFT less what the limit grows with the prompt [s], mean ITL [s]) in the scope of the SLO."""
    pools = metrics.pools
    busy = pools.traffic_frac > 0
    if pools.ttft is not None and slo.scope == "fleet":
        return ttft_quantile_s(pools.ttft, pools.traffic_frac, slo.ttft_s_per_token), metrics.itl_s
    alone = jax.vmap(lambda pool: alone_reached_s(pool, slo))(pools)
    return jnp.max(jnp.where(busy, alone, 0.0)), jnp.max(pools.itl_s)


def alone_reached_s(pool: PoolMetrics, slo: Slo) -> Array:
    """P99 TTFT of one pool, less what the limit grows with the prompt [s]."""
    if pool.ttft is None:
        return pool.ttft_p99_s - slo.ttft_s_per_token * pool.mean_prompt_tokens
    return ttft_quantile_s(jax.tree.map(lambda x: x[None], pool.ttft), jnp.ones(1), slo.ttft_s_per_token)
