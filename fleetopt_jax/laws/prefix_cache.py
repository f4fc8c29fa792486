"""Prefix caching: how much of the prompts a cache of so many tokens has computed before.

Denning's working set. Prompts are blocks; m(T) is the share of prompt tokens whose block was not used within age T, b
the prompt tokens of a request. What was used within T is

    W(T) = rate * b * integral of m from 0 to T,

so a cache of C tokens that evicts what was used longest ago keeps blocks up to the age T with W(T) = C, and 1 - m(T) of
the prompt tokens are found there. Ages are counted in requests of the stream, r = rate * T: a trace that is played
faster has the same W(r) and m(r), and drifts of its rate do not matter. m falls along a grid of ages, straight between.

**Several caches.** Of N that requests are sent to without looking, a use is seen by each with chance 1 / N; routed by
prefix, N act as one. A reuse is kept if any of the u uses within its age is seen by the same cache, 1 - (1 - seen)^u:
one prompt that everybody begins with is soon in all of them (`kept_frac`). Each cache has W / N tokens to keep.

**Requests of prompts p of which h are found** compute p - h tokens, which attend to all p: their engine time is
tau1 (p - h) + tau2 (p^2 - h^2).

**A second tier** in the hosts' memory gets what the GPUs let go, what came first leaves it first, and what is found
there goes back: both hold what one cache of both sizes would. A token comes back in the time that its bytes take by the
link, nothing overlapped, instead of being computed.

Holds where uses come alike over time. Against a simulated LRU cache of the same blocks (`experiments/prefix_law.py`),
from 1 to 100 % of the unique blocks: within 0.3 points of hit share on the Mooncake conversations, 1.8 on its synthetic
trace, the most where a cache holds fifteen requests. An infinite cache finds exactly what the trace repeats. N caches
at random: within 0.7 points.

Sources: P. J. Denning, The working set model for program behavior, CACM 11 (1968); P. J. Denning and D. R. Slutz,
Generalized working sets for segment reference strings, CACM 21 (1978).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import as_floats, namespace, pytree

T = TypeVar("T")

HOST_LINK_BYTES_PER_S = 50e9  # of a GPU, of the 64 GB/s of PCIe 5.0 x16
NOBODY = 1e-12  # shares of the uses below are none
CLIMBS = 16  # from an empty cache towards the least fixed point
NEWTON_STEPS = 6  # from there
STEEPEST = 0.9  # slope by which Newton's steps are bounded: ten times the last climb


@pytree
class WorkingSet:
    """The reuse in one stream of prompts. Leaves traced."""

    age_requests: Array  # rising from 0 [requests] [A]
    prompt_tokens: Array  # of a request, in the mean [tokens]
    reused_tokens: Array  # of them, last used at most each age ago; rising [tokens] [A]


def make_working_set(*, age_requests: ArrayLike, prompt_tokens: float, reused_tokens: ArrayLike) -> WorkingSet:
    """A checked `WorkingSet`. Raises ValueError that names what is wrong.

    >>> chat = fo.make_working_set(age_requests=[0, 100, 1000], prompt_tokens=800, reused_tokens=[0, 200, 400])
    >>> round(float(fo.laws.prefix_cache.hit_frac(chat, 70_000.0)), 3)
    0.25
    """
    ages, reused = (np.asarray(x, dtype=float) for x in (age_requests, reused_tokens))
    if not (ages.ndim == 1 and ages.shape == reused.shape and ages.size >= 2):
        raise ValueError(f"need as many ages as reused tokens, two or more, got shapes {ages.shape}, {reused.shape}")
    if not (np.isfinite(ages).all() and ages[0] == 0 and (np.diff(ages) > 0).all()):
        raise ValueError(
            f"need finite age_requests that rise from 0, got {ages[np.argmin(np.diff(ages, prepend=-1))]:g}"
        )
    if not 0 < prompt_tokens < np.inf:
        raise ValueError(f"need a positive, finite prompt_tokens, got {prompt_tokens}")
    if not ((reused >= 0).all() and (np.diff(reused) >= 0).all() and reused[-1] <= prompt_tokens):
        raise ValueError(f"need reused_tokens that rise from 0 on to at most the prompt's {prompt_tokens:g}")
    return WorkingSet(**as_floats(age_requests=ages, prompt_tokens=prompt_tokens, reused_tokens=reused))


def resident_tokens(reuse: WorkingSet) -> Array:
    """W at each age of the grid [tokens] [A]: what a cache must hold to keep all that was used within it."""
    xp = namespace(reuse)
    missed = xp.maximum(reuse.prompt_tokens - reuse.reused_tokens, 0.0)
    grown = xp.diff(reuse.age_requests) * (missed[1:] + missed[:-1]) / 2.0
    return xp.concatenate([xp.zeros_like(grown[:1]), xp.cumsum(grown)])


def age_place(reuse: WorkingSet, cache_tokens: ArrayLike) -> Array:
    """The age up to which a cache keeps blocks, as a place among 0, 1, ... A - 1 of the grid [-].

    Rises with the cache; the last place, all that the stream repeats, beyond W of the last age. Differentiable in the
    cache and in all that `reuse` holds.
    """
    return _place(resident_tokens(reuse), cache_tokens)


def _place(rising: Array, x: ArrayLike) -> Array:
    """Where `x` lies among rising values [A], straight between two."""
    rising, last = jnp.asarray(rising), len(rising) - 1
    at = jnp.searchsorted(jax.lax.stop_gradient(rising), jax.lax.stop_gradient(jnp.asarray(x)), side="right")
    k = jnp.clip(at - 1, 0, last - 1)
    left, right = rising[k], rising[k + 1]
    return jnp.clip(k + safe_div(x - left, right - left), 0.0, last)


def at_place(values: T, place: ArrayLike) -> T:
    """Values of the ages [A, ...], each leaf of a record, at a real place among them: straight between two."""

    whole = jax.lax.stop_gradient(jnp.asarray(place)).astype(int)

    def at(x: Array) -> Array:
        x, k = jnp.asarray(x), jnp.clip(whole, 0, len(x) - 2)
        return x[k] + (place - k) * (x[k + 1] - x[k])

    return jax.tree.map(at, values)


def hit_frac(reuse: WorkingSet, cache_tokens: ArrayLike) -> Array:
    """Share of the prompt tokens that a cache of so many tokens has [-]: 1 - m(T) where W(T) = C."""
    return safe_div(at_place(reuse.reused_tokens, age_place(reuse, cache_tokens)), reuse.prompt_tokens)


def cache_age_s(reuse: WorkingSet, cache_tokens: ArrayLike, rate_per_s: ArrayLike) -> Array:
    """How long a cache keeps what is not used again [s], of a stream of so many requests a second."""
    return at_place(reuse.age_requests, age_place(reuse, cache_tokens)) / rate_per_s


def used_within_tokens(reuse: WorkingSet, age_requests: ArrayLike) -> Array:
    """W of any age [tokens]; of more than the grid's last, as much as of that."""
    return at_place(resident_tokens(reuse), _place(reuse.age_requests, age_requests))


def kept_frac(seen: ArrayLike, shares: Array, kept: Array) -> Array:
    """Share of the reuse that is kept where a cache sees a share of the uses, by age [-] [A]; `seen` [A] or ().

    `kept` [S, A] has it of the `shares` [S], falling from 1; in between straight over their logarithms, below the last
    in proportion. Of a block with one use before, kept = seen.
    """
    ages = jnp.arange(kept.shape[1])
    some = jnp.maximum(jnp.broadcast_to(jnp.asarray(seen, dtype=float), ages.shape), NOBODY)
    place = _place(-jnp.log(shares), -jnp.log(some))
    k = jnp.clip(jax.lax.stop_gradient(place).astype(int), 0, len(shares) - 2)
    per_share = kept / shares[:, None]
    left, right = per_share[k, ages], per_share[k + 1, ages]
    return jnp.clip(some * (left + (place - k) * (right - left)), 0.0, 1.0)


def thinned(reuse: WorkingSet, kept: ArrayLike) -> WorkingSet:
    """The stream of which so much of the reuse is kept, by age [A]; the rest is computed, and cached, once more."""
    return replace(reuse, reused_tokens=jax.lax.cummax(reuse.reused_tokens * kept))


def settled_place(next_place: Callable[[Array], Array], last: ArrayLike) -> Array:
    """The least place that leads to itself: more found, less prefill, fewer in flight, more cache, more found.

    `next_place` must not fall, so that places reached from 0, an empty cache, climb to the least fixed point; of
    several it is the one that a fleet gets to by itself. Gradients go through it implicitly.
    """

    def solve(residual: Callable[[Array], Array], start: Array) -> Array:
        def nearer(k: Array, place: Array) -> Array:
            value, slope = jax.jvp(residual, (place,), (jnp.ones_like(place),))
            climb, newton = jnp.maximum(value, 0.0), value / jnp.maximum(-slope, 1.0 - STEEPEST)
            return jnp.clip(place + jnp.where(k < CLIMBS, climb, newton), 0.0, last)

        return jax.lax.fori_loop(0, CLIMBS + NEWTON_STEPS, nearer, start)

    return jax.lax.custom_root(
        lambda place: next_place(place) - place, jnp.zeros(()), solve, lambda linear, y: y / linear(jnp.ones_like(y))
    )


def fresh_tokens(
    per_token_s: ArrayLike, per_token2_s: ArrayLike, new_tokens: ArrayLike, cached_tokens: ArrayLike
) -> Array:
    """The prompt without a cache that takes an engine as long as so many new tokens after cached ones [tokens].

    x with tau1 x + tau2 x^2 = tau1 n + tau2 (n^2 + 2 n h): not shorter than n, nor longer than n + h.
    """
    linear = safe_div(per_token2_s, per_token_s)
    n, asked = jnp.asarray(new_tokens), new_tokens * (1.0 + linear * (new_tokens + 2.0 * cached_tokens))
    root = 2.0 * asked / (1.0 + jnp.sqrt(1.0 + 4.0 * linear * asked))
    return cast(Array, jnp.clip(root, n, n + cached_tokens))


@pytree
class HostCache:
    """A second tier of an instance, in the memory of its hosts. Leaves traced, shape ()."""

    tokens: Array  # whose keys and values it holds, beside those on the GPUs; 0 for none [tokens]
    tokens_per_s: Array  # by which they come back to the GPUs [tokens/s]


def make_host_cache(
    *, memory_bytes: float = 0.0, bytes_per_s: float = HOST_LINK_BYTES_PER_S, kv_bytes_per_token: float = 1.0
) -> HostCache:
    """A checked `HostCache` of an instance, of its memory and the bandwidth to its GPUs; or, as each GPU keeps its own
    share, of those of one GPU, with the bytes of a token on it.

    >>> float(fo.make_host_cache(memory_bytes=640e9, bytes_per_s=100e9, kv_bytes_per_token=320e3).tokens)
    2000000.0
    """
    if not (0 <= memory_bytes < np.inf and 0 < bytes_per_s < np.inf and 0 < kv_bytes_per_token < np.inf):
        raise ValueError(
            f"need a finite memory_bytes >= 0 and positive bytes_per_s and kv_bytes_per_token, "
            f"got {memory_bytes=}, {bytes_per_s=}, {kv_bytes_per_token=}"
        )
    return HostCache(
        **as_floats(tokens=memory_bytes / kv_bytes_per_token, tokens_per_s=bytes_per_s / kv_bytes_per_token)
    )


def spared_by_host_frac(host: HostCache, per_token_s: ArrayLike) -> Array:
    """Share of a token's prefill that is spared where it comes from the host instead [-]: 1 - (1 / bandwidth) / tau1.

    Loading takes engine time as prefill does, nothing overlapped; 0 where computing anew is as fast.
    """
    return jnp.where(host.tokens > 0, jnp.clip(1.0 - safe_div(1.0 / host.tokens_per_s, per_token_s), 0.0, 1.0), 0.0)
