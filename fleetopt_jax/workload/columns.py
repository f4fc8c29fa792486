"""Requests as the laws see them: what is routed, prefilled, held, stepped and credited.

A request of p prompt and o output tokens is routed by p + o, prefills p, holds p, p + 1, ..., p + o tokens over o
steps, and is credited o. Each column may come to differ: a prefix found in the cache is held but not prefilled, a
draft gains several tokens a step, another router sees another length. No law knows why.
"""

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace, pytree


@pytree
class Columns:
    """Whatever the laws read of requests. Leaves traced, any common shape, [J] for the atoms of a workload."""

    route_tokens: Array  # what the router compares with its thresholds
    prefill_tokens: Array  # prompt tokens the engine computes
    held_tokens: Array  # in the KV cache when decoding begins
    steps: Array  # decode iterations, over which what is held grows by the output
    output_tokens: Array  # credited
    kept_tokens: Array | None = None  # what sticky sessions route by, where it is known


def columns_of(prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Columns:
    """The columns of requests that nothing has changed: no cache, no draft, routed by their total length."""
    xp = namespace(prompt_tokens, output_tokens)
    prompt, output = xp.asarray(prompt_tokens), xp.asarray(output_tokens)
    return Columns(
        route_tokens=prompt + output, prefill_tokens=prompt, held_tokens=prompt, steps=output, output_tokens=output
    )
