"""Decode step time: one iteration in which every sequence in flight gains one token.

    t(n, L) = base + expert c(n) + n (per_seq + per_token L + windowed min(L, window)),   c(n) = 1 - (1 - k / E)^n

with n sequences of mean context L. One form carries every engine: the published law (base W, per_token H / L_cal), the
law fitted to measurements (`laws/measured.py`) and a configuration's own fit. It is concave and rising in n, and affine
in L on either side of the attention window.

A law of your own is a `@pytree` record that derives from `DecodeLaw` and says `step_s`.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.llm import expert_coverage

if TYPE_CHECKING:
    from fleetopt_jax.laws.prefill import Prefill


class DecodeLaw:
    """What the other laws ask of a decode step; a record of your own derives from this and says `step_s`.

    Searches rely on a step that does not fall with sequences or context, and whose time for each sequence, t / n, does
    not rise with them.
    """

    def step_s(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        """Time of one decode iteration [s] with `n_active` sequences of mean context `context_tokens`."""
        raise NotImplementedError

    def batch_s(self, n_active: ArrayLike, tokens: ArrayLike, windowed_tokens: ArrayLike) -> Array:
        """The same of a batch whose contexts sum to `tokens`, and to `windowed_tokens` each cut by `seen_tokens`."""
        return self.step_s(n_active, tokens / jnp.maximum(n_active, 1e-9))

    def seen_tokens(self, context_tokens: Array) -> Array:
        """Of a context, what the layers with a sliding window read [tokens]."""
        return context_tokens

    def line(self, n_active: ArrayLike, context_tokens: ArrayLike) -> tuple[Array, Array]:
        """(intercept [s], slope [s/token]) of t(n, .) around a context: its tangent, or the affine piece it lies on."""
        context = jnp.asarray(context_tokens, dtype=float)
        step_s, slope = jax.jvp(lambda x: self.step_s(n_active, x), (context,), (jnp.ones_like(context),))
        return step_s - slope * context, slope

    def slower(self, factor: ArrayLike) -> "DecodeLaw":
        """The law with every time multiplied by `factor`."""
        return ScaledDecode(self, jnp.asarray(factor, dtype=float))

    def at_clock(self, prefill: "Prefill", clock_frac: ArrayLike) -> "DecodeLaw":
        """The law on cores at `clock_frac` of their top clock; `prefill` is that at the top clock. See `clocks.py`."""
        raise ValueError(f"{type(self).__name__} has no clock law: say at_clock, or leave the clock alone")


@pytree
class DecodeStep(DecodeLaw):
    """Coefficients of the decode step. Every field is traced; shape () or a leading vmap axis."""

    base_s: Array  # overhead and the weights every step streams [s]
    expert_s: Array  # streaming all routed experts; 0 for a dense model [s]
    expert_share: Array  # k / E, share of the experts one token uses [-]
    per_seq_s: Array  # cost of one more sequence, whatever its context [s]
    per_token_s: Array  # cost of one more token of one sequence's context [s]
    windowed_token_s: Array  # the same of the layers with a sliding window, up to its length [s]
    window_tokens: Array  # length of the sliding window; 0 without [tokens]

    def step_s(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        xp = namespace(self, n_active, context_tokens)
        windowed_tokens = xp.minimum(context_tokens, self.window_tokens)
        return self.batch_s(n_active, n_active * context_tokens, n_active * windowed_tokens)

    def batch_s(self, n_active: ArrayLike, tokens: ArrayLike, windowed_tokens: ArrayLike) -> Array:
        weights_s = self.base_s + self.expert_s * expert_coverage(self.expert_share, n_active)
        return (
            weights_s + self.per_seq_s * n_active + self.per_token_s * tokens + self.windowed_token_s * windowed_tokens
        )

    def seen_tokens(self, context_tokens: Array) -> Array:
        return jnp.minimum(context_tokens, self.window_tokens.astype(context_tokens.dtype))

    def line(self, n_active: ArrayLike, context_tokens: ArrayLike) -> tuple[Array, Array]:
        windowed_s = jnp.where(jnp.less(context_tokens, self.window_tokens), self.windowed_token_s, 0.0)
        slope_s = n_active * (self.per_token_s + windowed_s)
        return self.step_s(n_active, context_tokens) - slope_s * context_tokens, cast(Array, slope_s)

    def slower(self, factor: ArrayLike) -> "DecodeStep":
        times = ("base_s", "expert_s", "per_seq_s", "per_token_s", "windowed_token_s")
        return replace(self, **{name: getattr(self, name) * factor for name in times})

    def at_clock(self, prefill: "Prefill", clock_frac: ArrayLike) -> "DecodeStep":
        """The FLOPs of its tokens, no faster than `prefill` does them, take 1 / f as long."""
        xp = namespace(self, prefill, clock_frac)
        longer = 1.0 / clock_frac - 1.0
        flops_s = xp.minimum(self.per_seq_s, prefill.per_token_s)
        attention_s = xp.minimum(self.per_token_s, 2.0 * prefill.per_token2_s)  # a prompt's token attends to half of it
        return replace(
            self, per_seq_s=self.per_seq_s + longer * flops_s, per_token_s=self.per_token_s + longer * attention_s
        )


@pytree
class ScaledDecode(DecodeLaw):
    """Another law's times, multiplied by a factor."""

    law: Any  # the other law's record
    factor: Array  # [-]

    def step_s(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        return self.factor * self.law.step_s(n_active, context_tokens)

    def batch_s(self, n_active: ArrayLike, tokens: ArrayLike, windowed_tokens: ArrayLike) -> Array:
        return self.factor * self.law.batch_s(n_active, tokens, windowed_tokens)

    def seen_tokens(self, context_tokens: Array) -> Array:
        return self.law.seen_tokens(context_tokens)

    def at_clock(self, prefill: "Prefill", clock_frac: ArrayLike) -> "ScaledDecode":
        return replace(self, law=self.law.at_clock(prefill, clock_frac))


def make_decode_step(
    *,
    base_s: float,
    per_token_s: float,
    per_seq_s: float = 0.0,
    expert_s: float = 0.0,
    expert_share: float = 0.0,
    windowed_token_s: float = 0.0,
    window_tokens: float = 0.0,
) -> DecodeStep:
    """A checked `DecodeStep`.

    >>> step = fo.make_decode_step(base_s=8e-3, per_token_s=4e-8)
    >>> round(float(step.step_s(64, 1000.0)), 5)
    0.01056
    """
    values = dict(locals())
    if not (0 < base_s < math.inf and all(0 <= value < math.inf for value in values.values())):
        raise ValueError(f"need a positive base_s and other coefficients >= 0, all finite, got {values}")
    if not expert_share < 1:
        raise ValueError(f"need expert_share < 1, got {expert_share}")
    return DecodeStep(**as_floats(**values))


def decode_tok_per_s(law: DecodeLaw, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
    """Output tokens per second of one instance [1/s]: every sequence gains one token an iteration."""
    return cast(Array, n_active / law.step_s(n_active, context_tokens))
