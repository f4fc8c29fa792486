"""What requests ask of an engine, as features whose weighted means are all that a pool's laws need.

A request of p prompt and o output tokens makes o decode steps, over which it holds p, p + 1, ..., p + o tokens of KV
cache. Means over a pool are decode-time weighted where they are of active sequences: the mean context of a decoding
sequence is E[o (p + o / 2)] / E[o].
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.prefill import Prefill


@pytree
class Demand:
    """Features of one request, or their weighted sums over many. Fields traced, any common shape."""

    prompt: Array  # p
    prompt2: Array  # p^2
    prompt3: Array  # p^3
    prompt4: Array  # p^4
    output: Array  # o
    output2: Array  # o^2
    held: Array  # integral of the tokens held over the o steps: o (p + o / 2)
    held2: Array  # of their square: o (p^2 + p o + o^2 / 3)


def demand(prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Demand:
    """The features of requests with the given lengths [tokens], elementwise."""
    p, o = jnp.asarray(prompt_tokens), jnp.asarray(output_tokens)
    return Demand(
        prompt=p,
        prompt2=p**2,
        prompt3=p**3,
        prompt4=p**4,
        output=o,
        output2=o**2,
        held=o * (p + o / 2.0),
        held2=o * (p**2 + p * o + o**2 / 3.0),
    )


def squeezed_demand(window_tokens: ArrayLike, output_powers: Array) -> Demand:
    """Sum of the features of requests whose prompts shrink until they fill the window: p = B - o.

    `output_powers` [5] are the sums of o^0 ... o^4 over them: each feature is a polynomial in B and o.
    """
    b = jnp.asarray(window_tokens)
    s0, s1, s2, s3, s4 = output_powers
    return Demand(
        prompt=b * s0 - s1,
        prompt2=b**2 * s0 - 2 * b * s1 + s2,
        prompt3=b**3 * s0 - 3 * b**2 * s1 + 3 * b * s2 - s3,
        prompt4=b**4 * s0 - 4 * b**3 * s1 + 6 * b**2 * s2 - 4 * b * s3 + s4,
        output=s1,
        output2=s2,
        held=b * s1 - s2 / 2.0,
        held2=b**2 * s1 - b * s2 + s3 / 3.0,
    )


def held_tokens(mean: Demand) -> tuple[Array, Array]:
    """(mean [tokens], variance [tokens^2]) of the KV tokens an active sequence holds, weighted by decode time."""
    m = safe_div(mean.held, mean.output)
    return m, jnp.maximum(safe_div(mean.held2, mean.output) - m**2, 0.0)


def prefill_moments_s(prefill: Prefill, mean: Demand) -> tuple[Array, Array]:
    """(E[s_p] [s], E[s_p^2] [s^2]) of s_p = tau1 p + tau2 p^2."""
    t1, t2 = prefill.per_token_s, prefill.per_token2_s
    return (
        t1 * mean.prompt + t2 * mean.prompt2,
        t1**2 * mean.prompt2 + 2.0 * t1 * t2 * mean.prompt3 + t2**2 * mean.prompt4,
    )
