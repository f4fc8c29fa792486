"""How long a request holds its slot (1/W Law, section 4): s = (ceil(prompt / chunk) + output) * t(n_max, L).

t(n, L) is affine in L at a given n: with t = w + v L, s = w steps + v steps L, so the mean and the second moment of s
over a pool are combinations of five moments of its traffic. The moments do not depend on the window: a search
computes them once for every threshold.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.decode import DecodeLaw

MIN_SCV = 0.01  # floor of the service time's squared coefficient of variation (published)


@pytree
class StepMoments:
    """Features of one request, or their weighted sums over many. Fields traced, any common shape.

    `steps` are the iterations a request takes, L its total tokens while being served.
    """

    chunks: Array  # prefill iterations
    steps: Array  # chunks + output tokens
    steps_len: Array  # steps * L
    steps2: Array  # steps^2
    steps2_len: Array  # steps^2 * L
    steps2_len2: Array  # steps^2 * L^2


def step_moments(chunks: ArrayLike, output_tokens: ArrayLike, length_tokens: ArrayLike) -> StepMoments:
    """The features of requests with the given prefill iterations, output and total length [tokens], elementwise."""
    steps, length_tokens = jnp.asarray(chunks + output_tokens), jnp.asarray(length_tokens)
    return StepMoments(
        chunks=jnp.asarray(chunks),
        steps=steps,
        steps_len=steps * length_tokens,
        steps2=steps**2,
        steps2_len=steps**2 * length_tokens,
        steps2_len2=(steps * length_tokens) ** 2,
    )


def service_moments_s(step: DecodeLaw, mean: StepMoments, n_active: ArrayLike) -> tuple[Array, Array]:
    """(E[s] [s], cs2 [-]) of requests with mean features `mean` on an instance running `n_active` sequences."""
    base_s, per_token_s = step.line(n_active, safe_div(mean.steps_len, mean.steps))
    mean_s = base_s * mean.steps + per_token_s * mean.steps_len
    square_s2 = (
        base_s**2 * mean.steps2 + 2.0 * base_s * per_token_s * mean.steps2_len + per_token_s**2 * mean.steps2_len2
    )
    return mean_s, jnp.maximum(MIN_SCV, square_s2 / mean_s**2 - 1.0)
