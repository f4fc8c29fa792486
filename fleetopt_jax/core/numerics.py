"""Primitives that stay finite, in value and in gradient, at the boundaries of the laws."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace


def safe_div(numerator: ArrayLike, denominator: ArrayLike, otherwise: ArrayLike = 0.0) -> Array:
    """numerator / denominator where the denominator is not zero, `otherwise` elsewhere."""
    nonzero = jnp.not_equal(denominator, 0)
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1.0), otherwise)


def whole_down(x: ArrayLike, *, whole: bool) -> Array:
    """floor(x) for exact evaluation, x itself for the relaxation that gradients need."""
    xp = namespace(x)
    return xp.floor(x) if whole else xp.asarray(x)


def whole_up(x: ArrayLike, *, whole: bool) -> Array:
    """ceil(x) for exact evaluation, x itself for the relaxation that gradients need."""
    xp = namespace(x)
    return xp.ceil(x) if whole else xp.asarray(x)


def require_float64(function: str) -> None:
    """Refuse, in one line, single precision: queues need double, and the library never changes JAX's settings."""
    if not jax.config.read("jax_enable_x64"):
        raise ValueError(f'{function} needs float64: call jax.config.update("jax_enable_x64", True) before it')
