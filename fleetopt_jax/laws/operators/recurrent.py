"""Layers with a state instead of a KV cache: gated delta net (Qwen3-Next, Qwen3.5), and projected Mamba's.

Two kernels: a short causal convolution over c channels, then the recurrence of H heads, each with a state of S numbers
(key size x value size). Without the projections before and behind them.

Prefill of m new tokens of n sequences, in chunks that one block walks for one head:

    t = t0 + x_c 4 m c / BW + ((l S' m / max(n, 1))^r + (h S' m H)^r)^(1/r) + x_s 4 n H S / BW

Decode of n sequences, each of whose states is read and written:

    t = t0 + s_c n c + x_s 8 n H S / BW

S' = S / 16,384, a delta net's 128 x 128; states are of 4 bytes. BW is the data sheet's. l is a block's walk along one
token of the longest sequence (all taken as equally long), h the share of a token of one head in a full GPU. Time rises
with tokens at a given number of sequences, and with sequences at a given length.

The tables time the loop of a kernel: states that fit the L2 cache are read from there. `recurrent_decode_s` reads them
from memory, `timed_recurrent_decode_s` as in the loop: x_s (k + (1 - k) / (1 + (B0 / bytes)^8)).

Measured: gated delta net of eight Qwen3.5 shapes over TP, vLLM 0.24. A100 has no table: H100's coefficients. Mamba-2
(Nemotron-H: heads of 64 x 128 numbers, their channels d_inner + 2 groups d_state) and Mamba-1 (Jamba: d_inner channels
of 16 numbers each, here heads of 64 x 16) are projected by the size of their states; nobody has timed them in these
tables.

Median / 90th percentile / median on the fifth of shapes left out of a fit, relative errors in % of the fitted rows.

                 prefill           decode
    a100         borrowed          borrowed
    h100         3.2 / 12.4 / 3.3  0.9 / 2.2 / 1.1
    h200         3.0 / 12.5 / 3.1  1.2 / 3.3 / 1.5
    b200         2.3 / 12.1 / 2.4  3.3 / 7.1 / 3.6
    b300         2.7 / 12.7 / 2.8  3.6 / 7.7 / 3.5
    gb200        2.6 / 12.7 / 2.9  2.9 / 7.3 / 3.5
    gb300        2.6 / 12.4 / 2.6  3.5 / 8.6 / 3.5
    l40s         6.3 / 15.6 / 6.0  2.0 / 6.1 / 1.9
    rtx-pro-6000 5.8 / 14.3 / 5.8  1.3 / 5.1 / 1.1
"""

import math

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.operators.attention import CACHE_SHARPNESS
from fleetopt_jax.laws.operators.coefficients import checked
from fleetopt_jax.laws.operators.roofline import cached_share, soft_roofline_s

STATE_VALUES = 128.0 * 128.0  # of a head of the layers timed, at which coefficients are
STATE_BYTES = 4.0  # of a number of the state
SPILL_SHARPNESS = 2.0  # how fast growing operands drop out of the L2 cache
ACTIVATION_BYTES = 2.0  # of a channel of a token


@pytree
class RecurrentShape:
    """The recurrence of one layer on one GPU. Every field is traced; shape () or a leading vmap axis."""

    heads: Array  # H: heads with a state, of this GPU [-]
    state_values: Array  # S: numbers of a head's state [-]
    conv_channels: Array  # c: of this GPU [-]


@pytree
class RecurrentPrefillLaw:
    """Coefficients of prefill on one GPU. Every field is traced; shape () or a leading vmap axis."""

    launch_s: Array  # t0: of both kernels [s]
    conv_excess: Array  # x_c: inverse share of the peak bandwidth [-]
    walk_s: Array  # l: a block's walk along a token [s]
    head_s: Array  # h: a token of a head in a full GPU [s]
    state_excess: Array  # x_s [-]
    sharpness: Array  # r [-]
    spill_excess: Array  # y: how much longer what no longer fits the L2 cache takes [-]
    spill_tokens: Array  # w0: tokens times heads that fit it [-]


@pytree
class RecurrentDecodeLaw:
    """Coefficients of decode on one GPU. Every field is traced; shape () or a leading vmap axis."""

    launch_s: Array  # t0: of both kernels [s]
    channel_s: Array  # s_c: a channel of a sequence [s]
    state_excess: Array  # x_s: inverse share of the peak bandwidth [-]
    cached_bytes: Array  # B0: what the L2 cache keeps between two calls [B]
    cached_frac: Array  # k: time of bytes from the L2 cache over that of bytes from memory [-]


def make_recurrent_prefill_law(**coefficients: float) -> RecurrentPrefillLaw:
    """A checked `RecurrentPrefillLaw`, of all its fields by name."""
    return RecurrentPrefillLaw(**checked(RecurrentPrefillLaw, coefficients, positive=("spill_tokens",)))


def make_recurrent_decode_law(**coefficients: float) -> RecurrentDecodeLaw:
    """A checked `RecurrentDecodeLaw`, of all its fields by name."""
    return RecurrentDecodeLaw(**checked(RecurrentDecodeLaw, coefficients, positive=("state_excess", "cached_frac")))


def make_recurrent_shape(*, heads: float, state_values: float, conv_channels: float) -> RecurrentShape:
    """A checked `RecurrentShape`."""
    values = dict(locals())
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"need a positive, finite {name}, got {value}")
    return RecurrentShape(**as_floats(**values))


def delta_net_shape(
    *, key_heads: float, value_heads: float, key_dim: float = 128.0, value_dim: float = 128.0
) -> RecurrentShape:
    """A gated delta net's heads on one GPU: a state for each value head, channels of queries, keys and values."""
    channels = 2.0 * key_heads * key_dim + value_heads * value_dim
    return make_recurrent_shape(heads=value_heads, state_values=key_dim * value_dim, conv_channels=channels)


def mamba_shape(*, heads: float, head_dim: float, state_dim: float, groups: float) -> RecurrentShape:
    """Mamba-2's heads on one GPU. Mamba-1: heads of any 64 channels of d_inner, no groups."""
    channels = heads * head_dim + 2.0 * groups * state_dim
    return make_recurrent_shape(heads=heads, state_values=head_dim * state_dim, conv_channels=channels)


def state_bytes(shape: RecurrentShape) -> Array:
    """What one sequence's state holds on one GPU, without the convolution's few tokens [B]."""
    return STATE_BYTES * shape.heads * shape.state_values


def recurrent_prefill_s(
    law: RecurrentPrefillLaw, gpu: Gpu, shape: RecurrentShape, new_tokens: ArrayLike, sequences: ArrayLike = 1.0
) -> Array:
    """Time of one layer's convolution and recurrence over `new_tokens` of `sequences` prompts or chunks [s]."""
    xp = namespace(law, gpu, shape, new_tokens, sequences)
    conv_bytes = 2.0 * ACTIVATION_BYTES * new_tokens * shape.conv_channels
    state_size = shape.state_values / STATE_VALUES
    walk_s = law.walk_s * state_size * new_tokens / xp.maximum(sequences, 1.0)
    held_tokens = (state_size * new_tokens * shape.heads) ** SPILL_SHARPNESS
    spilled = 1.0 + law.spill_excess * held_tokens / (held_tokens + law.spill_tokens**SPILL_SHARPNESS)
    work_s = spilled * law.head_s * state_size * new_tokens * shape.heads
    bytes_s = spilled * law.conv_excess * conv_bytes + law.state_excess * sequences * state_bytes(shape)
    return soft_roofline_s(law.launch_s + bytes_s / gpu.bandwidth_bytes_per_s, walk_s, work_s, law.sharpness)


def recurrent_decode_s(law: RecurrentDecodeLaw, gpu: Gpu, shape: RecurrentShape, sequences: ArrayLike) -> Array:
    """Time of one layer's convolution and recurrence, one token of each of `sequences`, states from memory [s]."""
    return law.launch_s + law.channel_s * sequences * shape.conv_channels + _states_s(law, gpu, shape, sequences)


def timed_recurrent_decode_s(law: RecurrentDecodeLaw, gpu: Gpu, shape: RecurrentShape, sequences: ArrayLike) -> Array:
    """The same over and over again [s]: from the L2 cache what fits it."""
    cached = cached_share(sequences * state_bytes(shape), law.cached_bytes, CACHE_SHARPNESS)
    states_s = _states_s(law, gpu, shape, sequences) * (1.0 - (1.0 - law.cached_frac) * cached)
    return law.launch_s + law.channel_s * sequences * shape.conv_channels + states_s


def _states_s(law: RecurrentDecodeLaw, gpu: Gpu, shape: RecurrentShape, sequences: ArrayLike) -> Array:
    """Every state read and written [s]."""
    return law.state_excess * 2.0 * sequences * state_bytes(shape) / gpu.bandwidth_bytes_per_s
