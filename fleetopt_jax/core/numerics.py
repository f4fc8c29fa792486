"""Primitives that stay finite, in value and in gradient, at the boundaries of the laws."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def safe_div(numerator: ArrayLike, denominator: ArrayLike, otherwise: ArrayLike = 0.0) -> Array:
    """numerator / denominator where the denominator is not zero, `otherwise` elsewhere."""
    nonzero = jnp.not_equal(denominator, 0)
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1.0), otherwise)


def whole_down(x: ArrayLike, *, whole: bool) -> Array:
    """floor(x) for exact evaluation, x itself for the relaxation that gradients need."""
    return jnp.floor(x) if whole else jnp.asarray(x)


def whole_up(x: ArrayLike, *, whole: bool) -> Array:
    """ceil(x) for exact evaluation, x itself for the relaxation that gradients need."""
    return jnp.ceil(x) if whole else jnp.asarray(x)
