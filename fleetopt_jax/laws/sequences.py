"""Layers that keep something of each sequence, as costs affine in a batch's sums.

    decoding   a0 + a1 n + a2 C + a3 C / n       n sequences with C tokens of context together
    prompts    p0 + p1 P + p2 A                  P tokens that attend to A pairs of tokens

a3 is what few sequences cannot fill the GPU with. The operator laws bend a little between the regimes that they join;
the coefficients here meet them where serving is: a2 and a3 at 64 sequences and at one, between contexts of 2,048 and
8,192 tokens; a1 and a0 there and at one sequence of 16 tokens; p2, p1 and p0 at lone prompts of 512, 2,048 and 8,192
tokens (with a window, p1 at 2,048). So they stay within 5 % of the operator laws from 256 tokens of context on, and of
prompts (tests/test_mixed_step.py).
"""

from collections.abc import Callable

import jax
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace, pytree
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.mixed_step import Amounts, AttentionCost, SequenceCost
from fleetopt_jax.laws.operators.attention import (
    DecodeAttentionLaw,
    PrefillAttentionLaw,
    causal_pairs,
    decode_attention_s,
    prefill_attention_s,
)

MANY, FEW, SHORT, LONG = 64.0, 16.0, 2048.0, 8192.0  # sequences, contexts
PROMPTS = (512.0, 2048.0, 8192.0)
ELEMENT_BYTES = 2.0  # of queries and outputs


@pytree
class AttentionLaws:
    """Of one GPU and type of KV cache."""

    decode: DecodeAttentionLaw
    windowed_decode: DecodeAttentionLaw
    prefill: PrefillAttentionLaw
    windowed_prefill: PrefillAttentionLaw


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
    sequences_frac: Array  # of the instance's sequences, those it has [-]

    def cost(self, laws: AttentionLaws, gpu: Gpu) -> Amounts:
        """`AttentionCost` of each amount, for the sums of the whole instance."""
        shape = self.heads, self.kv_heads, self.head_dim
        full = affine(
            lambda n, c: decode_attention_s(laws.decode, gpu, n, c, *shape),
            lambda p, a: prefill_attention_s(laws.prefill, gpu, p, a, *shape),
        )
        windowed = affine(
            lambda n, c: decode_attention_s(laws.windowed_decode, gpu, n, c, *shape),
            lambda p, a: prefill_attention_s(laws.windowed_prefill, gpu, p, a, *shape),
            self.window_tokens,
        )
        token_bytes = 2.0 * self.kv_heads * self.head_dim * self.kv_bytes
        pair_flop = 4.0 * self.heads * self.head_dim
        prompt_bytes = 2.0 * self.heads * self.head_dim * ELEMENT_BYTES + token_bytes
        flops = _counted(pair_flop, 0.0, pair_flop)
        peak_s = jax.tree.map(lambda x: x / gpu.peak_flop_per_s, flops)
        counted = (_counted(token_bytes, prompt_bytes, 0.0), flops, peak_s)
        return Amounts(self._of_all(full, windowed), *(self._of_all(each, each) for each in counted))

    def _of_all(self, full: SequenceCost, windowed: SequenceCost) -> AttentionCost:
        """Of all layers; the sums of an instance are those of its GPUs times their number."""

        def times(layers: Array, one: SequenceCost) -> SequenceCost:
            share = self.sequences_frac
            whole = ("per_step", "per_prompt_step", "per_mean_token")  # which do not divide
            return SequenceCost(
                **{name: layers * value * (1.0 if name in whole else share) for name, value in vars(one).items()}
            )

        return AttentionCost(times(self.layers, full), times(self.windowed_layers, windowed))


def _counted(per_token: ArrayLike, per_prompt_token: ArrayLike, per_pair: ArrayLike) -> SequenceCost:
    """Bytes or FLOPs of one layer."""
    zero = 0.0 * (per_token + per_prompt_token + per_pair)
    return SequenceCost(zero, zero, per_token + zero, zero, zero, per_prompt_token + zero, per_pair + zero)


def affine(
    decode_s: Callable[[ArrayLike, ArrayLike], Array],
    prompt_s: Callable[[ArrayLike, ArrayLike], Array],
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


def _prompt(
    prompt_s: Callable[[ArrayLike, ArrayLike], Array], window_tokens: ArrayLike | None
) -> tuple[Array, Array, Array]:
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
