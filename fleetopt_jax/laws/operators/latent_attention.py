"""Multi-head latent attention (DeepSeek's): the whole block of a layer, with its projections.

The tables time the block (`mla_*_module`): queries and latents projected, norms, rotary embedding, cache written,
attention, output projected. So does the law, and who composes a step leaves its projections out; the norm before it
and the all-reduce behind it are not in it. (The older tables of the kernel alone, and of the absorbed products, are
not used.)

Decode absorbs the up-projections: every head reads the latent itself. n sequences whose contexts sum to C tokens:

    t = t0 + s n + R(x_w w P / BW, x_f 2 n P / peak) + R(x_k b (c + r) C (1 + f / max(n, 1)) / BW,
                                                         x_a 2 H C (2 c + r) / peak),      R(a, b) = (a^q + b^q)^(1/q)

Prefill expands keys and values: m new tokens that attend to A pairs (`attention.causal_pairs`), u tokens before them:

    t = t0 + s m + R(x_w w P / BW, x_f 2 (m P + u c H (d + v)) / peak)
           + R(x_o 4 m H (d + r + v) / BW, x_a 2 H A (d + r + v) / peak (1 + f / (H (m / 128 + 1))))

P = h (q + c + r) + q H (d + r) + c H (d + v) + H v h weights on one GPU: h hidden, q the queries' rank (without one, h
q and q H become h H), c the latent, r rotary, d plain and v value sizes, H heads of this GPU. w bytes of a weight, b
of a latent's value in the cache; BW and peak (16-bit, whatever is multiplied) are the data sheet's; x are inverse
shares of them, and x_o counts with the operands' bytes what a block takes besides its products. Both are affine in C
and in A.

Variants: PHASE_GEMM_KV, such as `decode_fp8_block_bf16`. Measured with DeepSeek-V3's sizes and 1 to 128 heads; other
sizes are projected. A100 has no table of the block: it takes H100's coefficients. The loop finds weights that fit the
L2 cache there: on B200 and its kin the least heads come out too fast, by up to the time their weights take to read.

Median / 90th percentile / median on head numbers left out of a fit, relative errors in % of the fitted rows.

    prefill      bf16_bf16         bf16_fp8          fp8_block_bf16
    a100         borrowed          borrowed          borrowed
    h100         2.6 / 7.4 / 3.0   3.8 / 15.8 / 6.1  2.2 / 6.8 / 2.7
    h200         2.3 / 6.0 / 2.7   3.8 / 14.0 / 5.9  2.0 / 6.3 / 2.4
    b200         3.8 / 12.4 / 5.4  3.9 / 11.9 / 5.3  4.2 / 12.0 / 4.6
    b300         2.7 / 7.5 / 3.2   2.8 / 7.4 / 3.1   2.9 / 8.4 / 3.2
    gb200        3.0 / 8.1 / 3.8   2.7 / 8.1 / 3.5   2.8 / 8.3 / 3.2
    gb300        3.1 / 7.6 / 3.5   3.2 / 7.6 / 3.8   2.8 / 8.3 / 3.1
    l40s         8.3 / 17.9 / 5.9  borrowed          12.7 / 23.5 / 13.0
    rtx-pro-6000 4.5 / 11.5 / 4.5  4.5 / 11.6 / 4.7  -

    prefill      fp8_block_fp8     nvfp4_bf16         nvfp4_fp8
    a100         borrowed          -                  -
    h100         3.3 / 14.1 / 4.1  -                  -
    h200         3.6 / 14.9 / 4.7  -                  -
    b200         4.2 / 11.8 / 4.7  4.7 / 13.2 / 5.9   4.8 / 13.1 / 5.7
    b300         3.0 / 8.3 / 3.5   4.3 / 10.0 / 4.9   4.7 / 10.1 / 4.9
    gb200        2.9 / 8.0 / 3.3   4.5 / 9.8 / 4.9    4.4 / 9.6 / 4.9
    gb300        3.1 / 8.2 / 3.6   4.5 / 9.8 / 4.8    4.7 / 9.6 / 4.9
    l40s         borrowed          -                  -
    rtx-pro-6000 -                 10.1 / 19.6 / 9.9  10.1 / 19.7 / 10.1

    decode       bf16_bf16          bf16_fp8          fp8_block_bf16
    a100         borrowed           borrowed          borrowed
    h100         2.9 / 8.6 / 3.4    4.0 / 12.9 / 4.0  3.1 / 8.5 / 4.1
    h200         3.5 / 10.3 / 4.8   4.2 / 14.3 / 6.2  3.6 / 10.3 / 5.4
    b200         6.0 / 15.8 / 11.4  4.4 / 13.1 / 8.4  4.9 / 12.8 / 7.2
    b300         5.7 / 16.4 / 9.5   5.8 / 19.6 / 8.2  4.9 / 13.2 / 7.8
    gb200        5.5 / 16.4 / 8.9   5.7 / 18.8 / 7.5  4.6 / 13.5 / 7.4
    gb300        5.7 / 16.5 / 8.8   5.5 / 18.9 / 7.2  4.6 / 13.6 / 7.8
    l40s         7.7 / 31.8 / 6.9   borrowed          5.8 / 28.5 / 8.1
    rtx-pro-6000 7.3 / 22.3 / 8.0   borrowed          -

    decode       fp8_block_fp8     nvfp4_bf16        nvfp4_fp8
    a100         borrowed          -                 -
    h100         3.4 / 10.5 / 4.9  -                 -
    h200         3.6 / 10.6 / 5.0  -                 -
    b200         3.7 / 10.6 / 5.2  4.3 / 15.1 / 5.2  3.9 / 13.8 / 3.8
    b300         4.4 / 16.8 / 6.0  5.2 / 14.5 / 5.9  5.2 / 17.3 / 6.1
    gb200        4.5 / 15.5 / 5.5  5.0 / 14.8 / 6.1  5.0 / 17.3 / 5.6
    gb300        4.4 / 15.4 / 5.5  5.2 / 14.9 / 6.2  5.2 / 17.5 / 6.3
    l40s         borrowed          -                 -
    rtx-pro-6000 -                 6.0 / 22.8 / 8.7  borrowed
"""

import math

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.operators.attention import unfilled
from fleetopt_jax.laws.operators.coefficients import checked
from fleetopt_jax.laws.operators.roofline import soft_roofline_s


@pytree
class LatentShape:
    """The sizes of one layer's block on one GPU. Every field is traced; shape () or a leading vmap axis."""

    heads: Array  # H: of this GPU [-]
    hidden: Array  # h [-]
    query_rank: Array  # q; 0 where queries are projected at once [-]
    latent_dim: Array  # c [-]
    rope_dim: Array  # r [-]
    nope_dim: Array  # d [-]
    value_dim: Array  # v [-]


@pytree
class LatentAttentionLaw:
    """Coefficients of one phase, on one GPU, by types of weights and KV cache. Every field is traced."""

    launch_s: Array  # t0 [s]
    token_s: Array  # s: a token: norms, rotary embedding, cache [s]
    weight_excess: Array  # x_w [-]
    flop_excess: Array  # x_f [-]
    operand_excess: Array  # x_k of decode, x_o of prefill [-]
    attention_excess: Array  # x_a [-]
    few_blocks: Array  # f: of decode sequences, of prefill blocks of 128 tokens of one head [-]
    sharpness: Array  # q [-]
    weight_bytes: Array  # w [B]
    value_bytes: Array  # b [B]


def make_latent_shape(
    *,
    heads: float,
    hidden: float,
    query_rank: float,
    latent_dim: float = 512.0,
    rope_dim: float = 64.0,
    nope_dim: float = 128.0,
    value_dim: float = 128.0,
) -> LatentShape:
    """A checked `LatentShape`; the defaults are DeepSeek-V3's."""
    values = dict(locals())
    for name, value in values.items():
        if not (math.isfinite(value) and (value >= 0 if name in ("query_rank", "rope_dim") else value > 0)):
            raise ValueError(f"need a positive, finite {name}, got {value}")
    return LatentShape(**as_floats(**values))


def make_latent_attention_law(**coefficients: float) -> LatentAttentionLaw:
    """A checked `LatentAttentionLaw`, of all its fields by name."""
    positive = ("weight_excess", "flop_excess", "operand_excess", "attention_excess", "weight_bytes", "value_bytes")
    return LatentAttentionLaw(**checked(LatentAttentionLaw, coefficients, positive=positive))


def latent_weights(shape: LatentShape) -> Array:
    """P: weights of the block's projections on one GPU [-]."""
    xp = namespace(shape)
    low_rank = shape.query_rank > 0
    query_inputs = xp.where(low_rank, shape.query_rank, shape.hidden)
    every = shape.hidden * (shape.query_rank + shape.latent_dim + shape.rope_dim)
    of_head = query_inputs * (shape.nope_dim + shape.rope_dim) + shape.latent_dim * (shape.nope_dim + shape.value_dim)
    return every + shape.heads * (of_head + shape.value_dim * shape.hidden)


def latent_decode_s(
    law: LatentAttentionLaw, gpu: Gpu, shape: LatentShape, sequences: ArrayLike, context_tokens: ArrayLike
) -> Array:
    """Time of one layer's block for `sequences` whose contexts sum to `context_tokens`, one new token each [s].

    Rises with context at a given number of sequences, and with sequences at a given mean context.
    """
    xp = namespace(law, gpu, shape, sequences, context_tokens)
    read_tokens = context_tokens * (1.0 + law.few_blocks / xp.maximum(sequences, 1.0))
    read_bytes = law.value_bytes * (shape.latent_dim + shape.rope_dim) * read_tokens
    read_s = law.operand_excess * read_bytes / gpu.bandwidth_bytes_per_s
    flop = 2.0 * shape.heads * context_tokens * (2.0 * shape.latent_dim + shape.rope_dim)
    attention_s = law.attention_excess * flop / gpu.peak_flop_per_s
    launch_s = law.launch_s + law.token_s * sequences + _projections_s(law, gpu, shape, sequences, 0.0)
    return soft_roofline_s(launch_s, read_s, attention_s, law.sharpness)


def latent_prefill_s(
    law: LatentAttentionLaw,
    gpu: Gpu,
    shape: LatentShape,
    new_tokens: ArrayLike,
    pairs: ArrayLike,
    past_tokens: ArrayLike = 0.0,
) -> Array:
    """Time of one layer's block for `new_tokens` that attend to `pairs` in all, after `past_tokens` of chunks before
    them, whose keys and values are expanded again [s]."""
    of_pair = shape.nope_dim + shape.rope_dim + shape.value_dim
    operand_s = law.operand_excess * 4.0 * new_tokens * shape.heads * of_pair / gpu.bandwidth_bytes_per_s
    flop = 2.0 * shape.heads * pairs * of_pair * unfilled(law.few_blocks, shape.heads, new_tokens)
    attention_s = law.attention_excess * flop / gpu.peak_flop_per_s
    launch_s = law.launch_s + law.token_s * new_tokens + _projections_s(law, gpu, shape, new_tokens, past_tokens)
    return soft_roofline_s(launch_s, operand_s, attention_s, law.sharpness)


def _projections_s(
    law: LatentAttentionLaw, gpu: Gpu, shape: LatentShape, tokens: ArrayLike, past_tokens: ArrayLike
) -> Array:
    weights = latent_weights(shape)
    weight_s = law.weight_excess * law.weight_bytes * weights / gpu.bandwidth_bytes_per_s
    expanded = past_tokens * shape.latent_dim * shape.heads * (shape.nope_dim + shape.value_dim)
    flop_s = law.flop_excess * 2.0 * (tokens * weights + expanded) / gpu.peak_flop_per_s
    return soft_roofline_s(0.0, weight_s, flop_s, law.sharpness)
