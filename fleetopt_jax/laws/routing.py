"""Who serves which request: routing by total length, hard or soft, with compression at the boundary (FleetOpt).

Pool k takes the requests in (e_{k-1}, e_k], where e_k = gamma_k B_k is its router edge and B_k its window; those longer
than B_k are compressed into the window.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def router_edges(window_tokens: Array, gamma: Array) -> Array:
    """Edges e_k [tokens], shape [K]: gamma_k B_k, made non-decreasing so that the first pool that accepts serves."""
    return jax.lax.cummax(jnp.asarray(window_tokens) * gamma)


def soft_share(total_tokens: ArrayLike, lower_edge: ArrayLike, upper_edge: ArrayLike, log_width: ArrayLike) -> Array:
    """Share [0, 1] of requests of length L that the pool (lower, upper] gets.

    sigmoid((ln upper - ln L) / s) - sigmoid((ln lower - ln L) / s): the honest model of a router that predicts the
    length with a logistic error of scale s in log-length; s -> 0 is the hard router. `lower_edge` 0 takes all the
    short requests, `upper_edge` inf all the long ones.
    """
    log_total = jnp.log(total_tokens)
    return _below(log_total, upper_edge, log_width) - _below(log_total, lower_edge, log_width)


def _below(log_total: Array, edge: ArrayLike, log_width: ArrayLike) -> Array:
    inside = jnp.logical_and(jnp.greater(edge, 0), jnp.isfinite(edge))
    log_edge = jnp.log(jnp.where(inside, edge, 1.0))
    return jnp.where(
        inside, jax.nn.sigmoid((log_edge - log_total) / log_width), jnp.where(jnp.greater(edge, 0), 1.0, 0.0)
    )
