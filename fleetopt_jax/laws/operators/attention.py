"""Attention over keys and values kept by head: prefill and decode (grouped queries, sliding windows, any head size).

Prefill, of `new_tokens` m that attend to `pairs` A tokens in all (causal: a whole prompt of p tokens has p (p + 1) /
2, a chunk of q over c tokens before it q c + q (q + 1) / 2, a layer with a window fewer; sums over several prompts):

    t = t0 + (t_o^r + t_f^r)^(1/r)
    t_f = x_f(d) 4 H d A / peak (1 + f / (H (m / 128 + 1))),     t_o = x_o(d) 4 d m (H + k K^g) / BW

H query heads and K key-value heads of size d on one GPU; BW and peak (16-bit, whatever the KV cache is in) are the data
sheet's. A block has 128 tokens of one head; with fewer blocks than f the GPU is not full. x_o > 1 counts with the bytes
of q, k, v and o what a block takes besides its products; K heads of keys and values count as k K^g of queries.
Nobody has timed chunks with tokens before them: the law takes them for prompts of as many pairs.

Decode, of n sequences whose contexts sum to C tokens (a layer with a window: each cut by the window):

    t = t0 + (t_b^r + t_s^r)^(1/r)
    t_b = x_b(d) 2 w d C (K + f / max(n, 1)) / BW,     t_s = n (s_k K + s_h H) (d / 128)^j

w bytes of a value. f: one sequence of few key-value heads has too few blocks to fill the GPU. It is affine in C, rises
in C at a given n and in n at a given mean context. FlashAttention 2 (16 bits on A100, L40S, RTX PRO 6000) does not
split a sequence of as many query heads as key-value heads: few such sequences take longer than this, in proportion to
context.

Layers with a window have coefficients of their own (`VARIANT_windowed`), in prefill except those of FLOPs: kernels are
scheduled for the whole context (FlashAttention 3: 5 us more), or read keys once for each query head (FlashAttention 2).
A100 has no rows of windows: L40S's coefficients.

x(d) = x (d / 128)^(p - 1), p = narrow below heads of 128, wide above: times rise as d^p, p >= 0.

The tables time one call in a loop: keys and values that fit the L2 cache are read from there, on L40S three times as
fast. An engine reads all other layers in between. So decode has both, as `gemm.py`: `decode_attention_s` from memory,
`timed_decode_attention_s` as in the loop, t_b (h + (1 - h) / (1 + (B0 / bytes)^8)); errors below are of the latter.

Median / 90th percentile / median on the fifth of shapes left out of a fit, relative errors in % of the fitted rows.
Left out of them: see `experiments/operators/prefill_attention.py` and `decode_attention.py`.

    prefill      bf16              bf16_windowed      fp8               fp8_windowed
    a100         3.1 / 11.9 / 2.7  borrowed           -                 -
    h100         5.6 / 16.2 / 5.7  6.8 / 19.9 / 6.6   5.8 / 17.8 / 6.5  8.1 / 20.6 / 9.2
    h200         5.6 / 15.8 / 6.0  7.4 / 20.4 / 7.8   5.7 / 17.0 / 6.3  7.6 / 19.6 / 8.7
    b200         4.7 / 17.5 / 5.1  5.5 / 15.5 / 6.2   6.5 / 20.2 / 8.0  7.2 / 22.0 / 7.9
    b300         4.7 / 17.0 / 4.8  5.4 / 15.4 / 6.7   6.3 / 19.5 / 7.9  7.2 / 21.3 / 8.3
    gb200        5.0 / 17.6 / 5.2  5.4 / 15.5 / 6.1   6.3 / 19.8 / 7.3  7.3 / 21.9 / 8.1
    gb300        4.4 / 15.8 / 4.6  5.3 / 14.7 / 6.5   6.0 / 18.7 / 7.4  7.2 / 21.3 / 8.4
    l40s         6.7 / 24.3 / 6.4  9.2 / 38.0 / 11.3  7.2 / 31.9 / 7.0  12.3 / 39.6 / 8.7
    rtx-pro-6000 3.1 / 17.0 / 3.2  6.6 / 21.8 / 6.6   5.0 / 24.4 / 5.3  8.3 / 31.1 / 8.3

    decode       bf16              bf16_windowed     fp8               fp8_windowed
    a100         5.6 / 15.4 / 5.3  borrowed          -                 -
    h100         3.7 / 13.3 / 3.7  6.6 / 15.1 / 5.8  5.5 / 15.4 / 5.4  6.7 / 15.7 / 7.5
    h200         3.9 / 13.1 / 4.0  6.8 / 15.4 / 6.1  5.6 / 15.5 / 5.4  6.8 / 15.6 / 7.7
    b200         5.5 / 18.4 / 5.8  4.3 / 13.8 / 4.2  5.7 / 19.5 / 6.9  6.5 / 10.8 / 5.7
    b300         5.8 / 18.7 / 5.7  2.6 / 10.6 / 2.6  7.3 / 18.8 / 7.1  3.2 / 12.4 / 3.4
    gb200        4.9 / 17.3 / 5.2  5.7 / 11.8 / 6.1  6.0 / 19.0 / 5.9  2.3 / 7.9 / 2.3
    gb300        5.1 / 17.9 / 5.1  5.5 / 12.4 / 5.3  5.8 / 18.1 / 5.7  4.0 / 11.4 / 3.9
    l40s         7.5 / 19.3 / 7.9  3.8 / 14.4 / 3.8  6.1 / 25.9 / 5.3  7.8 / 22.9 / 7.6
    rtx-pro-6000 7.1 / 23.7 / 7.0  3.6 / 13.7 / 4.1  5.4 / 22.3 / 5.1  5.7 / 16.8 / 5.5
"""

import math
from typing import cast

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace, pytree
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.operators.coefficients import checked
from fleetopt_jax.laws.operators.roofline import cached_share, soft_roofline_s

HEAD_DIM = 128.0  # at which coefficients are
BLOCK_TOKENS = 128.0  # new tokens of one block of prefill
ACTIVATION_BYTES = 2.0  # of an element of q, k, v and o
CACHE_SHARPNESS = 8.0  # how fast growing keys and values drop out of the cache


@pytree
class PrefillAttentionLaw:
    """Coefficients of prefill, by GPU and type of KV cache. Every field is traced; shape () or a vmap axis."""

    launch_s: Array  # t0 [s]
    flop_excess: Array  # x_f: inverse share of the 16-bit peak [-]
    flop_narrow: Array  # p of FLOPs below heads of 128 [-]
    flop_wide: Array  # and above [-]
    operand_excess: Array  # x_o: inverse share of the peak bandwidth, a block's own time included [-]
    operand_narrow: Array  # p of operands below heads of 128 [-]
    operand_wide: Array  # and above [-]
    kv_excess: Array  # k: operands of one key-value head over those of a query head [-]
    kv_growth: Array  # g [-]
    fill_blocks: Array  # f [-]
    sharpness: Array  # r [-]


@pytree
class DecodeAttentionLaw:
    """Coefficients of decode, by GPU and type of KV cache. Every field is traced; shape () or a vmap axis."""

    launch_s: Array  # t0 [s]
    byte_excess: Array  # x_b: inverse share of the peak bandwidth [-]
    byte_narrow: Array  # p of bytes below heads of 128 [-]
    byte_wide: Array  # and above [-]
    few_blocks: Array  # f: key-value heads of a lone sequence, beyond its own, that its time is of [-]
    kv_head_s: Array  # s_k: a key-value head of a sequence [s]
    head_s: Array  # s_h: a query head of a sequence [s]
    head_growth: Array  # j [-]
    sharpness: Array  # r [-]
    value_bytes: Array  # w: of a key's or value's element in the cache [B]
    cached_bytes: Array  # B0: what the L2 cache keeps between two calls [B]
    cached_frac: Array  # h: time of bytes from the L2 cache over that of bytes from memory [-]


def make_prefill_attention_law(**coefficients: float) -> PrefillAttentionLaw:
    """A checked `PrefillAttentionLaw`, of all its fields by name."""
    return PrefillAttentionLaw(**checked(PrefillAttentionLaw, coefficients, positive=("flop_excess", "operand_excess")))


def make_decode_attention_law(**coefficients: float) -> DecodeAttentionLaw:
    """A checked `DecodeAttentionLaw`, of all its fields by name."""
    positive = ("byte_excess", "value_bytes", "cached_frac")
    return DecodeAttentionLaw(**checked(DecodeAttentionLaw, coefficients, positive=positive))


def causal_pairs(new_tokens: ArrayLike, past_tokens: ArrayLike = 0.0, window_tokens: ArrayLike = math.inf) -> Array:
    """Tokens that the new tokens of one sequence attend to, themselves included [-]; at most a window's each."""
    xp = namespace(new_tokens, past_tokens, window_tokens)
    growing = xp.clip(xp.asarray(window_tokens) - past_tokens, 0.0, new_tokens)  # tokens that see all before them
    full = xp.asarray(new_tokens - growing, dtype=float)
    windowed = xp.where(full > 0, full * xp.where(full > 0, window_tokens, 1.0), 0.0)
    return growing * past_tokens + growing * (growing + 1.0) / 2.0 + windowed


def prefill_attention_s(
    law: PrefillAttentionLaw,
    gpu: Gpu,
    new_tokens: ArrayLike,
    pairs: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
) -> Array:
    """Time of one layer's prefill attention [s]; heads are those of one GPU. Rises with every size where a new token
    attends to as many tokens as before, or more."""
    flop_s = 4.0 * heads * HEAD_DIM * pairs / gpu.peak_flop_per_s
    compute_s = law.flop_excess * _widened(head_dim, law.flop_narrow, law.flop_wide) * flop_s
    compute_s = compute_s * unfilled(law.fill_blocks, heads, new_tokens)
    operands = 2.0 * new_tokens * (heads + law.kv_excess * kv_heads**law.kv_growth) * HEAD_DIM
    operand_s = law.operand_excess * ACTIVATION_BYTES * operands / gpu.bandwidth_bytes_per_s
    operand_s = operand_s * _widened(head_dim, law.operand_narrow, law.operand_wide)
    return soft_roofline_s(law.launch_s, operand_s, compute_s, law.sharpness)


def unfilled(blocks: ArrayLike, heads: ArrayLike, new_tokens: ArrayLike) -> Array:
    """What prefill takes longer where its blocks are few, `blocks` of them as long again [-]."""
    return cast(Array, 1.0 + blocks / (heads * (new_tokens / BLOCK_TOKENS + 1.0)))


def decode_attention_s(
    law: DecodeAttentionLaw,
    gpu: Gpu,
    sequences: ArrayLike,
    context_tokens: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
) -> Array:
    """Time of one layer's decode attention [s] of `sequences` whose contexts sum to `context_tokens`, read from memory;
    heads are those of one GPU."""
    memory_s, blocks_s = _decode_s(law, gpu, sequences, context_tokens, heads, kv_heads, head_dim)
    return soft_roofline_s(law.launch_s, memory_s, blocks_s, law.sharpness)


def timed_decode_attention_s(
    law: DecodeAttentionLaw,
    gpu: Gpu,
    sequences: ArrayLike,
    context_tokens: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
) -> Array:
    """The same over and over again [s]: from the L2 cache what fits it."""
    memory_s, blocks_s = _decode_s(law, gpu, sequences, context_tokens, heads, kv_heads, head_dim)
    kv_bytes = 2.0 * law.value_bytes * head_dim * kv_heads * context_tokens
    cached = cached_share(kv_bytes, law.cached_bytes, CACHE_SHARPNESS)
    return soft_roofline_s(law.launch_s, memory_s * (1.0 - (1.0 - law.cached_frac) * cached), blocks_s, law.sharpness)


def _decode_s(
    law: DecodeAttentionLaw,
    gpu: Gpu,
    sequences: ArrayLike,
    context_tokens: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
) -> tuple[Array, Array]:
    """(time of its bytes from memory, time of its blocks) [s]."""
    xp = namespace(law, gpu, sequences, context_tokens)
    read_heads = kv_heads + law.few_blocks / xp.maximum(sequences, 1.0)
    read_bytes = 2.0 * law.value_bytes * HEAD_DIM * read_heads * context_tokens
    memory_s = law.byte_excess * read_bytes / gpu.bandwidth_bytes_per_s
    memory_s = memory_s * _widened(head_dim, law.byte_narrow, law.byte_wide)
    blocks_s = sequences * (law.kv_head_s * kv_heads + law.head_s * heads) * (head_dim / HEAD_DIM) ** law.head_growth
    return memory_s, cast(Array, blocks_s)


def _widened(head_dim: ArrayLike, narrow: ArrayLike, wide: ArrayLike) -> Array:
    """(d / 128)^p: what heads of a size take over heads of 128 [-]."""
    xp = namespace(head_dim, narrow, wide)
    return (head_dim / HEAD_DIM) ** xp.where(xp.less(head_dim, HEAD_DIM), narrow, wide)
