"""Decode step time: one iteration in which every sequence in flight gains one token.

    t(n, L) = base + expert c(n) + n (per_seq + per_token L + windowed min(L, window)),   c(n) = 1 - (1 - k / E)^n

with n sequences of mean context L. One form carries every engine: the published law (base W, per_token H / L_cal), the
law fitted to measurements (`laws/measured.py`) and a configuration's own fit. It is concave and rising in n, and affine
in L on either side of the attention window.
"""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.laws.llm import expert_coverage


@pytree
class DecodeStep:
    """Coefficients of the decode step. Every field is traced; shape () or a leading vmap axis."""

    base_s: Array  # overhead and the weights every step streams [s]
    expert_s: Array  # streaming all routed experts; 0 for a dense model [s]
    expert_share: Array  # k / E, share of the experts one token uses [-]
    per_seq_s: Array  # cost of one more sequence, whatever its context [s]
    per_token_s: Array  # cost of one more token of one sequence's context [s]
    windowed_token_s: Array  # the same of the layers with a sliding window, up to its length [s]
    window_tokens: Array  # length of the sliding window; 0 without [tokens]


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
    """A checked `DecodeStep`."""
    values = dict(locals())
    if not (0 < base_s < math.inf and all(0 <= value < math.inf for value in values.values())):
        raise ValueError(f"need a positive base_s and other coefficients >= 0, all finite, got {values}")
    if not expert_share < 1:
        raise ValueError(f"need expert_share < 1, got {expert_share}")
    return DecodeStep(**as_floats(**values))


def decode_step_s(step: DecodeStep, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
    """Time of one decode iteration [s] with `n_active` sequences of mean context `context_tokens`."""
    windowed_tokens = jnp.minimum(context_tokens, step.window_tokens)
    return batch_step_s(step, n_active, n_active * context_tokens, n_active * windowed_tokens)


def batch_step_s(step: DecodeStep, n_active: ArrayLike, tokens: ArrayLike, windowed_tokens: ArrayLike) -> Array:
    """The same of a batch whose contexts sum to `tokens`, and to `windowed_tokens` where each is cut to the window."""
    weights_s = step.base_s + step.expert_s * expert_coverage(step.expert_share, n_active)
    return weights_s + step.per_seq_s * n_active + step.per_token_s * tokens + step.windowed_token_s * windowed_tokens


def decode_line(step: DecodeStep, n_active: ArrayLike, context_tokens: ArrayLike) -> tuple[Array, Array]:
    """(intercept [s], slope [s/token]) of t(n, .) around a context: the affine piece it lies on."""
    slope_s = n_active * (
        step.per_token_s + jnp.where(jnp.less(context_tokens, step.window_tokens), step.windowed_token_s, 0.0)
    )
    return decode_step_s(step, n_active, context_tokens) - slope_s * context_tokens, slope_s


def decode_tok_per_s(step: DecodeStep, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
    """Output tokens per second of one instance [1/s]: every sequence gains one token an iteration."""
    return n_active / decode_step_s(step, n_active, context_tokens)
