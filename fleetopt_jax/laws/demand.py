"""What requests ask of an engine, as features whose weighted means are all that a pool's laws need.

A request that prefills p tokens holds h tokens of KV cache when it begins to decode, h + o after its d decode steps, as
many more each step. Means over a pool are decode-time weighted where they are of active sequences: the mean context of
a decoding sequence is E[d (h + o / 2)] / E[d]. Without a cache or drafts h = p and d = o.

Where c tokens of the prompt are found in a cache, p = h - c are computed and attend to all h: engine time is tau1 p +
tau2 (h^2 - c^2), so that h^2 - c^2 stands where p^2 did, and p^2 is kept beside it.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.prefill import Prefill

NO_STEPS = 1e-9  # mean decode steps of a request below which nothing is decoded: the rounding of running sums


@pytree
class CachedPrompts:
    """What a cache adds to the features: of requests some of whose prompt is found. Fields traced, any common shape."""

    tokens: Array  # c
    prefill_square: Array  # p^2


@pytree
class Demand:
    """Features of one request, or their weighted sums over many. Fields traced, any common shape."""

    prefill: Array  # p
    prefill2: Array  # p^2; with a cache h^2 - c^2
    prefill3: Array  # p^3; p (h^2 - c^2)
    prefill4: Array  # p^4; (h^2 - c^2)^2
    steps: Array  # d
    steps2: Array  # d^2
    held: Array  # integral of the tokens held over the d steps: d (h + o / 2)
    held2: Array  # of their square: d (h^2 + h o + o^2 / 3)
    cached: CachedPrompts | None = None  # None: nothing is found


def demand(prefill_tokens: ArrayLike, held_tokens: ArrayLike, steps: ArrayLike, output_tokens: ArrayLike) -> Demand:
    """The features of requests with the given columns [tokens], elementwise."""
    p, h, d, o = (jnp.asarray(x) for x in (prefill_tokens, held_tokens, steps, output_tokens))
    return Demand(
        prefill=p,
        prefill2=p**2,
        prefill3=p**3,
        prefill4=p**4,
        steps=d,
        steps2=d**2,
        held=d * (h + o / 2.0),
        held2=d * (h**2 + h * o + o**2 / 3.0),
    )


def cached_demand(
    prefill_tokens: ArrayLike, held_tokens: ArrayLike, steps: ArrayLike, output_tokens: ArrayLike
) -> Demand:
    """The same of requests that find in a cache what they hold and do not compute."""
    p, h = (jnp.asarray(x) for x in (prefill_tokens, held_tokens))
    pairs = h**2 - (h - p) ** 2
    without = demand(p, h, steps, output_tokens)
    found = CachedPrompts(tokens=h - p, prefill_square=p**2)
    return replace(without, prefill2=pairs, prefill3=p * pairs, prefill4=pairs**2, cached=found)


def with_nothing_cached(without: Demand) -> Demand:
    """The features of requests that find nothing, beside those of others that do."""
    return replace(without, cached=CachedPrompts(jnp.zeros_like(without.prefill), without.prefill2))


def squeezed_demand(window_tokens: ArrayLike, output_powers: Array) -> Demand:
    """Sum of the features of requests whose prompts shrink until they fill the window: p = h = B - o, d = o.

    `output_powers` [5] are the sums of o^0 ... o^4 over them: each feature is a polynomial in B and o.
    """
    b = jnp.asarray(window_tokens)
    s0, s1, s2, s3, s4 = output_powers
    return Demand(
        prefill=b * s0 - s1,
        prefill2=b**2 * s0 - 2 * b * s1 + s2,
        prefill3=b**3 * s0 - 3 * b**2 * s1 + 3 * b * s2 - s3,
        prefill4=b**4 * s0 - 4 * b**3 * s1 + 6 * b**2 * s2 - 4 * b * s3 + s4,
        steps=s1,
        steps2=s2,
        held=b * s1 - s2 / 2.0,
        held2=b**2 * s1 - b * s2 + s3 / 3.0,
    )


def held_tokens(mean: Demand) -> tuple[Array, Array]:
    """(mean [tokens], variance [tokens^2]) of the KV tokens an active sequence holds, weighted by decode time."""
    steps = jnp.where(mean.steps > NO_STEPS, mean.steps, 0.0)
    m = safe_div(mean.held, steps)
    return m, jnp.maximum(safe_div(mean.held2, steps) - m**2, 0.0)


def prefill_moments_s(prefill: Prefill, mean: Demand) -> tuple[Array, Array]:
    """(E[s_p] [s], E[s_p^2] [s^2]) of s_p = tau1 p + tau2 p^2."""
    t1, t2 = prefill.per_token_s, prefill.per_token2_s
    square = mean.prefill2 if mean.cached is None else mean.cached.prefill_square
    return (
        t1 * mean.prefill + t2 * mean.prefill2,
        t1**2 * square + 2.0 * t1 * t2 * mean.prefill3 + t2**2 * mean.prefill4,
    )
