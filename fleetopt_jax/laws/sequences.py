"""Layers that keep something of each sequence, as costs affine in a batch's sums.

    decoding   a0 + a1 n + a2 C + a3 C / n       n sequences with C tokens of context together
    prompts    p0 + p1 P + p2 A                  P tokens that attend to A pairs of tokens

a3 is what few sequences cannot fill the GPU with. The operator laws bend a little between the regimes that they join;
the coefficients here meet them where serving is: a2 and a3 at 64 sequences and at one, between contexts of 2,048 and
8,192 tokens; a1 and a0 there and at one sequence of 16 tokens; p2, p1 and p0 at lone prompts of 512, 2,048 and 8,192
tokens (with a window, p1 at 2,048). So they stay within 5 % of the operator laws from 256 tokens of context on, and of
prompts (tests/test_mixed_step.py).

Of an instance's n sequences a GPU has f n + g: its share, and in seconds what the fullest of several groups has more.
That is affine in the same sums: a0 + g a1, and a3 + g a2.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace, pytree
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.mixed_step import Amounts, AttentionCost, SequenceCost, attention_cost
from fleetopt_jax.laws.operators.attention import (
    DecodeAttentionLaw,
    PrefillAttentionLaw,
    causal_pairs,
    decode_attention_s,
    prefill_attention_s,
)
from fleetopt_jax.laws.operators.latent_attention import (
    LatentAttentionLaw,
    LatentShape,
    latent_decode_s,
    latent_prefill_s,
)
from fleetopt_jax.laws.operators.recurrent import (
    RecurrentDecodeLaw,
    RecurrentPrefillLaw,
    RecurrentShape,
    recurrent_decode_s,
    recurrent_prefill_s,
    state_bytes,
)

MANY, FEW, SHORT, LONG = 64.0, 16.0, 2048.0, 8192.0  # sequences, contexts
PROMPTS = (512.0, 2048.0, 8192.0)
ELEMENT_BYTES = 2.0  # of queries and outputs


@pytree
class SequenceLaws:
    """Of one GPU and type of KV cache; None where an LLM has no such layers."""

    decode: DecodeAttentionLaw | None = None
    windowed_decode: DecodeAttentionLaw | None = None
    prefill: PrefillAttentionLaw | None = None
    windowed_prefill: PrefillAttentionLaw | None = None
    latent_decode: LatentAttentionLaw | None = None
    latent_prefill: LatentAttentionLaw | None = None
    recurrent_decode: RecurrentDecodeLaw | None = None
    recurrent_prefill: RecurrentPrefillLaw | None = None


@pytree
class GroupedAttention:
    """Attention layers over keys and values kept by head, as one GPU has them."""

    layers: Array  # without a window
    windowed_layers: Array
    window_tokens: Array
    heads: Array  # on this GPU
    kv_heads: Array  # on this GPU
    head_dim: Array
    kv_bytes: Array  # of a value in the cache [B]
    sequences_frac: Array  # f: of the instance's sequences, those it has [-]
    sequences_more: Array  # g: and those that the fullest group has more [-]

    def cost(self, laws: SequenceLaws, gpu: Gpu) -> Amounts:
        """`AttentionCost` of each amount, for the sums of the whole instance."""
        shape = self.heads, self.kv_heads, self.head_dim
        full = affine(
            lambda n, c: decode_attention_s(_there(laws.decode), gpu, n, c, *shape),
            lambda p, a: prefill_attention_s(_there(laws.prefill), gpu, p, a, *shape),
        )
        windowed = affine(
            lambda n, c: decode_attention_s(_there(laws.windowed_decode), gpu, n, c, *shape),
            lambda p, a: prefill_attention_s(_there(laws.windowed_prefill), gpu, p, a, *shape),
            self.window_tokens,
        )
        token_bytes = 2.0 * self.kv_heads * self.head_dim * self.kv_bytes
        pair_flop = 4.0 * self.heads * self.head_dim
        n_bytes = _counted(token_bytes, 2.0 * self.heads * self.head_dim * ELEMENT_BYTES + token_bytes, 0.0)
        flops = _counted(pair_flop, 0.0, pair_flop)
        peak_s = _over(flops, gpu.peak_flop_per_s)
        both = self.layers, self.windowed_layers
        return Amounts(
            _of_layers(full, windowed, *both, self.sequences_frac, self.sequences_more),
            _of_layers(n_bytes, n_bytes, *both, self.sequences_frac),
            _of_layers(flops, flops, *both, self.sequences_frac),
            _of_layers(peak_s, peak_s, *both, self.sequences_frac),
        )


@pytree
class LatentAttention:
    """Layers of multi-head latent attention, without what depends on rows only (`stack.LatentProjections`)."""

    shape: LatentShape  # on this GPU
    layers: Array
    kv_bytes: Array  # of a value in the cache [B]
    sequences_frac: Array  # f: of the instance's sequences, those it has [-]
    sequences_more: Array  # g: and those that the fullest group has more [-]

    def cost(self, laws: SequenceLaws, gpu: Gpu) -> Amounts:
        """`AttentionCost` of each amount, for the sums of the whole instance."""
        shape = self.shape
        decode_law, prefill_law = _there(laws.latent_decode), _there(laws.latent_prefill)

        seconds = affine(
            lambda n, c: latent_decode_s(decode_law, gpu, shape, n, c) - latent_rows_s(laws, gpu, shape, n),
            lambda p, a: latent_prefill_s(prefill_law, gpu, shape, p, a) - latent_rows_s(laws, gpu, shape, p),
        )
        of_pair = shape.nope_dim + shape.rope_dim + shape.value_dim
        n_bytes = _counted(
            (shape.latent_dim + shape.rope_dim) * self.kv_bytes, 2.0 * ELEMENT_BYTES * shape.heads * of_pair, 0.0
        )
        flops = _counted(
            2.0 * shape.heads * (2.0 * shape.latent_dim + shape.rope_dim), 0.0, 2.0 * shape.heads * of_pair
        )
        amounts = seconds, n_bytes, flops, _over(flops, gpu.peak_flop_per_s)
        more = self.sequences_more, 0.0, 0.0, 0.0  # of seconds alone
        shares = ((self.layers, 0.0, self.sequences_frac, each) for each in more)
        return Amounts(*(_of_layers(each, each, *share) for each, share in zip(amounts, shares, strict=True)))


@pytree
class RecurrentLayers:
    """Layers with a state of one size instead of a cache, without their projections."""

    shape: RecurrentShape  # on this GPU
    layers: Array
    sequences_frac: Array  # f: of the instance's sequences, those it has [-]
    sequences_more: Array  # g: and those that the fullest group has more [-]

    def cost(self, laws: SequenceLaws, gpu: Gpu) -> Amounts:
        """`AttentionCost` of each amount, for the sums of the whole instance. Their FLOPs are next to nothing."""
        decode_law, prefill_law = _there(laws.recurrent_decode), _there(laws.recurrent_prefill)
        seconds = affine(
            lambda n, c: recurrent_decode_s(decode_law, gpu, self.shape, n) + 0.0 * c,
            lambda p, a: recurrent_prefill_s(prefill_law, gpu, self.shape, p) + 0.0 * a,
        )
        nothing = _counted(0.0 * self.layers, 0.0, 0.0)
        of_state = 2.0 * state_bytes(self.shape) + 0.0 * self.layers
        n_bytes = replace(nothing, per_seq=of_state, per_prompt_token=2.0 * ELEMENT_BYTES * self.shape.conv_channels)
        amounts = seconds, n_bytes, nothing, nothing
        more = self.sequences_more, 0.0, 0.0, 0.0  # of seconds alone
        shares = ((self.layers, 0.0, self.sequences_frac, each) for each in more)
        return Amounts(*(_of_layers(each, each, *share) for each, share in zip(amounts, shares, strict=True)))


def latent_rows_s(laws: SequenceLaws, gpu: Gpu, shape: LatentShape, rows: ArrayLike) -> Array:
    """What a layer of latent attention takes for every row, decoding or of a prompt [s]: the block without attention,
    of the phase that takes less for so many. Few rows read weights as decode does; thousands are multiplied as prompts
    are, for decode's law is of products that absorb the up-projections."""
    of_decode = latent_decode_s(_there(laws.latent_decode), gpu, shape, rows, 0.0)
    of_prompt = latent_prefill_s(_there(laws.latent_prefill), gpu, shape, rows, 0.0)
    return namespace(of_decode, of_prompt).minimum(of_decode, of_prompt)


T = TypeVar("T")


def _there(law: T | None) -> T:
    if law is None:
        raise ValueError("layers of this kind need their law")
    return law


def _of_layers(
    full: SequenceCost,
    windowed: SequenceCost,
    layers: ArrayLike,
    windowed_layers: ArrayLike,
    share: ArrayLike,
    more: ArrayLike = 0.0,
) -> AttentionCost:
    """Of all layers; the sums of an instance are those of one GPU over its share, beyond which it may have `more`."""
    whole = ("per_step", "per_prompt_step", "per_mean_token")  # which do not divide

    def times(n: ArrayLike, one: SequenceCost) -> SequenceCost:
        fuller = replace(
            one,
            per_step=one.per_step + more * one.per_seq,
            per_mean_token=one.per_mean_token + more * one.per_token,
        )
        return SequenceCost(
            **{name: n * value * (1.0 if name in whole else share) for name, value in vars(fuller).items()}
        )

    return attention_cost(times(layers, full), times(windowed_layers, windowed))


def _over(cost: SequenceCost, peak: ArrayLike) -> SequenceCost:
    return jax.tree.map(lambda x: x / peak, cost)


def _counted(per_token: Any, per_prompt_token: Any, per_pair: Any) -> SequenceCost:
    """Bytes or FLOPs of one layer."""
    zero = 0.0 * (per_token + per_prompt_token + per_pair)
    return SequenceCost(zero, zero, per_token + zero, zero, zero, per_prompt_token + zero, per_pair + zero)


def affine(
    decode_s: Callable[[Any, Any], Any],
    prompt_s: Callable[[Any, Any], Any],
    window_tokens: ArrayLike | None = None,
) -> SequenceCost:
    """One layer that takes decode_s(sequences, contexts together) and prompt_s(prompt tokens, pairs)."""
    xp = namespace(decode_s(1.0, FEW), prompt_s(FEW, FEW))
    many = (decode_s(MANY, MANY * LONG) - decode_s(MANY, MANY * SHORT)) / (MANY * (LONG - SHORT))
    lone = (decode_s(1.0, LONG) - decode_s(1.0, SHORT)) / (LONG - SHORT)
    per_mean_token = xp.maximum(lone - many, 0.0) / (1.0 - 1.0 / MANY)
    per_token = xp.maximum(many - per_mean_token / MANY, 0.0)
    of_many = decode_s(MANY, MANY * SHORT) - SHORT * (MANY * per_token + per_mean_token)
    of_one = decode_s(1.0, FEW) - FEW * (per_token + per_mean_token)
    per_seq = xp.maximum(of_many - of_one, 0.0) / (MANY - 1.0)
    return SequenceCost(
        xp.maximum(of_one - per_seq, 0.0), per_seq, per_token, per_mean_token, *_prompt(prompt_s, window_tokens)
    )


def _prompt(prompt_s: Callable[[Any, Any], Any], window_tokens: ArrayLike | None) -> tuple[Any, Any, Any]:
    """(p0, p1, p2) through three lone prompts; with a window p1 through the second."""
    xp = namespace(prompt_s(FEW, FEW))
    a, b, c = PROMPTS
    at_a, at_b, at_c = (prompt_s(p, causal_pairs(p)) for p in PROMPTS)
    low, high = (at_b - at_a) / (b - a), (at_c - at_b) / (c - b)
    square = xp.maximum(high - low, 0.0) / (c - a)  # of P^2, half of which are pairs
    per_token = xp.maximum(high - square * (c + b), 0.0)
    per_step = xp.maximum(at_a - per_token * a - square * a**2, 0.0)
    if window_tokens is not None:
        pairs = causal_pairs(b, 0.0, window_tokens)
        per_token = xp.maximum(prompt_s(b, pairs) - per_step - 2.0 * square * pairs, 0.0) / b
    return per_step, per_token, 2.0 * square
