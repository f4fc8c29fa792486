"""Primitives that stay finite, in value and in gradient, at the boundaries of the laws."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace

HALF_PI = 1.5707963267341256, 6.077100506506192e-11  # the first exact times a whole number
SINE = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(7))
COSINE = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(8))


def safe_div(numerator: ArrayLike, denominator: ArrayLike, otherwise: ArrayLike = 0.0) -> Array:
    """numerator / denominator where the denominator is not zero, `otherwise` elsewhere."""
    xp = namespace(numerator, denominator, otherwise)
    nonzero = xp.not_equal(denominator, 0)
    return xp.where(nonzero, numerator / xp.where(nonzero, denominator, 1.0), otherwise)


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


def between(values: Array, place: Array) -> Array:
    """`values` [k] at a real `place` among 0, 1, ... k - 1, smooth and exact at each: Keys' cubic convolution (IEEE
    Trans. ASSP 29, 1981), with straight lines beyond the ends."""
    first, last = 2.0 * values[0] - values[1], 2.0 * values[-1] - values[-2]
    wide = jnp.concatenate([first[None], values, last[None]])
    inside = jnp.clip(place, 0.0, len(values) - 1.0)
    k = jnp.minimum(jax.lax.stop_gradient(inside).astype(int), len(values) - 2)
    x = inside - k
    before, left, right, after = (wide.at[k + i].get(mode="promise_in_bounds") for i in range(4))
    bend = 2.0 * before - 5.0 * left + 4.0 * right - after
    return left + 0.5 * x * (right - before + x * (bend + x * (3.0 * (left - right) + after - before)))


def at_some(function: Callable[[Array], Array], x: ArrayLike, every: int) -> Array:
    """The function at `x` [..., n], asked for at the first and the last of every so many neighbours, a straight line in
    between; for smooth functions that cost much and `x` that lie close together."""
    x = jnp.asarray(x)
    n = x.shape[-1]
    if n <= 2 * every:
        return function(x)
    padded = jnp.concatenate([x, jnp.repeat(x[..., -1:], -n % every, axis=-1)], axis=-1)
    groups = padded.reshape(*x.shape[:-1], -1, every)
    low, high = groups[..., :1], groups[..., -1:]
    at_low, at_high = jnp.split(function(jnp.concatenate([low, high], axis=-1)), 2, axis=-1)
    between = safe_div(groups - low, high - low)
    return (at_low + (at_high - at_low) * between).reshape(padded.shape)[..., :n]


def falling_root(function: Callable[[Array], Array], low: Array, high: Array, bisections: int) -> Array:
    """Where a function that falls passes zero, of one number or of many that each have their own: by bisection from
    `low` to `high`, with implicit gradients; 0 where it is flat, for then nothing moves the root."""

    def solve(residual: Callable[[Array], Array], start: Array) -> Array:
        def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = (low + high) / 2.0
            over = residual(middle) > 0
            return jnp.where(over, middle, low), jnp.where(over, high, middle)

        return jax.lax.fori_loop(0, bisections, halve, (low, start))[1]

    def tangent(linear: Callable[[Array], Array], y: Array) -> Array:
        slope = linear(jnp.ones_like(y))
        return jnp.where(slope < 0, y / jnp.where(slope < 0, slope, -1.0), 0.0)

    return jax.lax.custom_root(function, high, solve, tangent)


def exp(z: Array) -> Array:
    """exp(z), of complex z within 1e-11 of its size for imaginary parts below 1e6: XLA takes the sines of doubles one
    by one on a CPU, a fourth as fast as polynomials on all lanes (Taylor's, on the quarter of the circle around 0)."""
    return _complex_exp(z) if jnp.iscomplexobj(z) else jnp.exp(z)


@jax.custom_jvp
def _complex_exp(z: Array) -> Array:
    quarter = jnp.round(z.imag * (2.0 / math.pi))
    x = (z.imag - quarter * HALF_PI[0]) - quarter * HALF_PI[1]
    square = x * x
    sine, cosine = x * _in_powers(square, SINE), _in_powers(square, COSINE)
    odd = quarter - 2.0 * jnp.floor(quarter / 2.0) == 1.0
    turned = quarter - 4.0 * jnp.floor(quarter / 4.0)
    real, imag = jnp.where(odd, sine, cosine), jnp.where(odd, cosine, sine)
    size = jnp.exp(z.real)
    left, down = (turned == 1.0) | (turned == 2.0), turned >= 2.0
    return jax.lax.complex(size * jnp.where(left, -real, real), size * jnp.where(down, -imag, imag))


@_complex_exp.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value = _complex_exp(primals[0])
    return value, value * tangents[0]


def _in_powers(x: Array, coefficients: tuple[float, ...]) -> Array:
    value = jnp.full_like(x, coefficients[-1])
    for each in reversed(coefficients[:-1]):
        value = each + x * value
    return value
