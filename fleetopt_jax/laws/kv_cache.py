"""KV-cache capacity (1/W Law): every slot reserves the whole context window.

n_max(Wn) = min(floor(slots * L_cal / Wn), floor(blocks / ceil(Wn / 16))): capacity halves when the window doubles.
"""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import whole_down, whole_up
from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.llm import Llm, weight_bytes

BLOCK_TOKENS = 16.0  # tokens of a KV block (vLLM's default)
MEMORY_UTILIZATION = 0.90  # share of GPU memory the engine may use (vLLM's default)


@pytree
class KvCapacity:
    """What one instance can hold. Every field is traced; shape () or a leading vmap axis."""

    n_blocks: Array  # 16-token blocks [-]
    slot_tokens: Array  # slots * L_cal: tokens the scheduler's slot cap allows; inf when it has none [tokens]


def make_kv_capacity(*, n_blocks: float, slot_tokens: float = float("inf")) -> KvCapacity:
    """A checked `KvCapacity`."""
    if not (0 <= n_blocks < math.inf and slot_tokens > 0):
        raise ValueError(f"need n_blocks >= 0 and slot_tokens > 0, got {n_blocks=}, {slot_tokens=}")
    return KvCapacity(**as_floats(n_blocks=n_blocks, slot_tokens=slot_tokens))


def max_sequences(kv: KvCapacity, window_tokens: ArrayLike, *, whole: bool = True) -> Array:
    """n_max, the sequences one instance runs at once when each reserves `window_tokens` [-].

    `whole=False` drops the floors and the block rounding: the relaxation is smooth in the window and never below the
    whole value. Source: arXiv 2603.17280v1, table 1 (all 14 counts).
    """
    capped = jnp.isfinite(kv.slot_tokens)
    by_slots = whole_down(jnp.where(capped, kv.slot_tokens, 1.0) / window_tokens, whole=whole)
    by_slots = jnp.where(capped, by_slots, jnp.inf)
    blocks_per_seq = whole_up(window_tokens / BLOCK_TOKENS, whole=whole)
    return jnp.minimum(by_slots, whole_down(kv.n_blocks / blocks_per_seq, whole=whole))


def roofline_kv_blocks(gpu: Gpu, llm: Llm, tp: ArrayLike) -> Array:
    """Blocks = floor((0.90 memory - weights / TP - NCCL) / (16 * KV bytes per token)), at least 0.

    As published: the KV cache is *not* divided by TP, which understates capacity by up to TP.
    """
    nccl_bytes = jnp.where(jnp.greater(tp, 1), gpu.nccl_bytes, 0.0)
    free_bytes = MEMORY_UTILIZATION * gpu.memory_bytes - weight_bytes(llm) / tp - nccl_bytes
    return jnp.maximum(0.0, jnp.floor(free_bytes / (BLOCK_TOKENS * llm.kv_bytes_per_token)))
