"""A tabulated function of a size, cheap to look up: monotone where its values are, smooth in the size and the values.

Knots x_k with 1 + x_k = 1, 1.25, 1.5, 1.75, 2, 2.5, ... 2^15, which the first bits of a float tell; between two a cubic
in x with the slopes of Fritsch and Butland (SIAM J. Sci. Stat. Comput. 5, 1984): it does not overshoot, and what is
affine is kept as it is. Beyond the last knot it goes on as a straight line. A soft roofline of sharpness 3 is met
within 0.06 %, of 6 within 0.15 %.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace, pytree

BITS = 2  # of a mantissa, that tell the knots of a doubling apart
N_KNOTS = (15 << BITS) + 1
_WHOLES = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}  # of as many bits


def _first_bits(dtype: Any) -> tuple[int, int]:
    """(How many of a float's last bits are cut off, what is left of 1.0)."""
    form = np.finfo(dtype)
    return form.nmant - BITS, -int(form.minexp - 1) << BITS


def _knots() -> np.ndarray:
    cut, of_one = _first_bits(np.float64)
    return ((np.arange(N_KNOTS, dtype=np.int64) + of_one) << cut).view(np.float64) - 1.0


KNOTS = _knots()


@pytree
class Curve:
    """The cubics. One leaf, linear in the values: the sum of two curves, or one times a factor, is done on the leaf."""

    coefficients: Array  # [..., knot, power of x - x_k]

    def __call__(self, x: ArrayLike) -> Array:
        """The value at `x` >= 0, a scalar; of the shape of the leading axes."""
        return (_value if namespace(self.coefficients, x) is np else _value_once)(self.coefficients, x)

    def __add__(self, other: "Curve") -> "Curve":
        return Curve(self.coefficients + other.coefficients)

    def scaled(self, factor: ArrayLike) -> "Curve":
        """Every value times `factor`."""
        return Curve(self.coefficients * factor)


def _value(coefficients: Any, x: Any) -> Array:
    # The gradient goes through x - x_k alone: which knot is a step, and the cubics meet there.
    xp = namespace(coefficients, x)
    size = xp.asarray(x, dtype=float)
    cut, of_one = _first_bits(size.dtype)
    if xp is np:
        k = np.clip(((1.0 + size).view(_WHOLES[size.dtype]) >> cut) - of_one, 0, N_KNOTS - 1)
        knot, at = KNOTS[k], coefficients[..., k, :]
    else:
        whole = _WHOLES[size.dtype]
        bits = jax.lax.bitcast_convert_type(1.0 + jax.lax.stop_gradient(size), whole) >> cut
        bits = jnp.clip(bits, whole(of_one), whole(of_one + N_KNOTS - 1))
        knot = jax.lax.bitcast_convert_type(bits << cut, size.dtype) - 1.0
        at = (
            jnp.asarray(coefficients)
            .at[..., bits - of_one, :]
            .get(mode="promise_in_bounds", wrap_negative_indices=False)  # they are there
        )
    beyond = x - knot
    return at[..., 0] + beyond * (at[..., 1] + beyond * (at[..., 2] + beyond * at[..., 3]))


_value_once = jax.jit(_value)  # a program has some hundred look-ups, of few shapes: each is traced but once


def curve_through(values: Any) -> Curve:
    """The curve through `values` [..., knot], NumPy's or JAX's."""
    xp = namespace(values)
    width = np.diff(KNOTS)
    secant = xp.diff(values, axis=-1) / width
    slope = _slopes(secant, width)
    left, right = slope[..., :-1], slope[..., 1:]
    square = (3.0 * secant - 2.0 * left - right) / width
    cube = (left + right - 2.0 * secant) / width**2
    inside = xp.stack([values[..., :-1], left, square, cube], axis=-1)
    zero = xp.zeros_like(values[..., -1])
    last = xp.stack([values[..., -1], slope[..., -1], zero, zero], axis=-1)
    return Curve(xp.concatenate([inside, last[..., None, :]], axis=-2))


def _slopes(secant: Any, width: np.ndarray) -> Any:
    """Weighted harmonic means of the secants on both sides; at the ends the secant itself."""
    xp = namespace(secant)
    before, after = secant[..., :-1], secant[..., 1:]
    w_before, w_after = width[:-1] + 2.0 * width[1:], 2.0 * width[:-1] + width[1:]
    alike = before * after > 0
    b, a = xp.where(alike, before, 1.0), xp.where(alike, after, 1.0)
    inner = xp.where(alike, (w_before + w_after) / (w_before / b + w_after / a), 0.0)
    return xp.concatenate([secant[..., :1], inner, secant[..., -1:]], axis=-1)
