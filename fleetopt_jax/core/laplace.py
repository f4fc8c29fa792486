"""Tails of positive random times from their Laplace transforms, by a damped Fourier series.

    P(X > y) = exp(-y / tau) + exp(s y) / T Re(r(s) / 2 + sum_k w_k r(s + i k pi / T) exp(i k pi y / T)),

r the transform of what the tail is more than exp(-y / tau), s = DAMPING / (2 T). The series is that of Durbin (Computer
Journal 17, 1974); tau, any time near the mean, takes the jump at 0 out of it, and w_k are Lanczos' factors, which keep
corners from ringing. Off by at most exp(-DAMPING) P(X > 2 T) and by corners that are smoothed over T / TERMS. The y are
spread evenly over (0, T], so that the sines are constants and a grid costs what a point does.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

DAMPING = 4.0
TERMS = 16
POINTS = 32  # of the grid, one at 0

_K = np.arange(TERMS)
_Y = np.linspace(0.0, 1.0, POINTS)
_WEIGHTS = np.sinc(_K / TERMS) * np.where(_K == 0, 0.5, 1.0)
_WAVES = np.exp(DAMPING / 2.0 * _Y)[:, None] * np.exp(1j * np.pi * _K * _Y[:, None]) * _WEIGHTS


def tail_on_grid(transform: Callable[[Array], Array], span: Array, tau: Array) -> Array:
    """P(X > y) at POINTS times from 0 to `span`, of E exp(-z X) = `transform(z)` for complex z [TERMS]; in [0, 1]."""
    z = jnp.asarray(DAMPING / 2.0 + 1j * np.pi * _K) / span
    rest = (1.0 - transform(z)) / z - tau / (1.0 + z * tau)
    series = _WAVES.real @ jnp.real(rest) - _WAVES.imag @ jnp.imag(rest)
    return jnp.where(_Y == 0.0, 1.0, jnp.clip(jnp.exp(-_Y * span / tau) + series / span, 0.0, 1.0))


def integral_at(tail: Array, span: Array, y: Array) -> Array:
    """Integral of a tail that is given on the grid from 0 to `y`, straight lines in between; 1 below 0."""
    step = span / (POINTS - 1)
    areas = jnp.concatenate([jnp.zeros(1), jnp.cumsum((tail[1:] + tail[:-1]) / 2.0)])
    place = jnp.clip(y / step, 0.0, POINTS - 1.0)
    k = jnp.minimum(place.astype(int), POINTS - 2)
    x = place - k
    at, first, second = (
        values.at[i].get(mode="promise_in_bounds") for values, i in ((areas, k), (tail, k), (tail, k + 1))
    )
    return jnp.minimum(y, 0.0) + step * (at + x * (first + 0.5 * x * (second - first)))
