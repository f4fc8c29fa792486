"""KV-cache capacity: how many sequences one instance can run at once.

Reserved (1/W Law): every slot reserves the whole context window, n_max(Wn) = min(floor(slots * L_cal / Wn),
floor(blocks / ceil(Wn / 16))): capacity halves when the window doubles.
Paged (vLLM): a sequence holds the blocks of the tokens it has, so capacity depends on the traffic, not on the window.
"""

import math
from typing import cast

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import whole_down, whole_up
from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.llm import Llm, kv_split, weight_bytes_of_gpu

BLOCK_TOKENS = 16.0  # tokens of a KV block (vLLM's default)
MEMORY_UTILIZATION = 0.90  # share of GPU memory the engine may use (vLLM's default once; 0.92 in 0.33.0)
CONTEXT_BYTES = 1.9 * 1024.0**3  # of `workspace_bytes`: CUDA context, kernels' own buffers, sampler, captured graphs
WORKSPACE_BYTES = 2.7 * 1024.0**3  # `workspace_bytes` of 8B to 14B dense models on one GPU at 8,192 tokens a step
OVERFLOW_Z = 2.3263478740408408  # standard normal quantile of 0.99: KV demand exceeds capacity 1 % of the time


@pytree
class KvCapacity:
    """What one instance can hold. Every field is traced; shape () or a leading vmap axis."""

    n_blocks: Array  # 16-token blocks [-]
    slot_tokens: Array  # slots * L_cal: tokens the scheduler's slot cap allows; inf when it has none [tokens]
    fixed_tokens: Array  # what a sequence holds in layers with a sliding window, as tokens of the other layers [tokens]
    max_num_seqs: Array  # most sequences the scheduler runs at once, when paged [-]
    n_caches: Array | None = None  # equal parts, each with sequences of its own; None: one [-]


DEFAULT_MAX_NUM_SEQS = 1024.0  # vLLM's default on GPUs of 70 GiB and more


def make_kv_capacity(
    *,
    n_blocks: float,
    slot_tokens: float = math.inf,
    fixed_tokens: float = 0.0,
    max_num_seqs: float = DEFAULT_MAX_NUM_SEQS,
    n_caches: float = 1.0,
) -> KvCapacity:
    """A checked `KvCapacity`.

    >>> float(fo.make_kv_capacity(n_blocks=50_000).max_num_seqs)
    1024.0
    """
    if not (0 <= n_blocks < math.inf and slot_tokens > 0 and 0 <= fixed_tokens < math.inf and max_num_seqs >= 1):
        raise ValueError(
            f"need n_blocks, fixed_tokens >= 0, slot_tokens > 0 and max_num_seqs >= 1, "
            f"got {n_blocks=}, {fixed_tokens=}, {slot_tokens=}, {max_num_seqs=}"
        )
    if not 1 <= n_caches < math.inf:
        raise ValueError(f"need n_caches >= 1 and finite, got {n_caches}")
    numbers = {"n_blocks": n_blocks, "slot_tokens": slot_tokens, "fixed_tokens": fixed_tokens, "n_caches": n_caches}
    return KvCapacity(**as_floats(**numbers, max_num_seqs=max_num_seqs))


def caches_of(kv: KvCapacity) -> ArrayLike:
    """Parts that its blocks are in [-]; a sequence is in one of them."""
    return 1.0 if kv.n_caches is None else kv.n_caches


def max_sequences(kv: KvCapacity, window_tokens: ArrayLike, *, whole: bool = True) -> Array:
    """n_max, the sequences one instance runs at once when each reserves `window_tokens` [-].

    `whole=False` drops the floors and the block rounding: the relaxation is smooth in the window and never below the
    whole value. Source: arXiv 2603.17280v1, table 1 (all 14 counts).
    """
    capped = jnp.isfinite(kv.slot_tokens)
    by_slots = whole_down(jnp.where(capped, kv.slot_tokens, 1.0) / window_tokens, whole=whole)
    by_slots = jnp.where(capped, by_slots, jnp.inf)
    blocks_per_seq, n_caches = whole_up((window_tokens + kv.fixed_tokens) / BLOCK_TOKENS, whole=whole), caches_of(kv)
    return jnp.minimum(by_slots, n_caches * whole_down(kv.n_blocks / n_caches / blocks_per_seq, whole=whole))


def paged_sequences(
    kv: KvCapacity,
    window_tokens: ArrayLike,
    held_tokens: ArrayLike,
    held_variance: ArrayLike,
    *,
    whole: bool = True,
) -> Array:
    """The most sequences one instance may run at once so that their KV overflows the cache at most 1 % of the time [-].

    Sequences hold independent amounts of mean m = `held_tokens` and variance v = `held_variance` [tokens^2], plus half
    an unfilled block; the largest n with n m + z sqrt(n v) <= M is ((sqrt(z^2 v + 4 m M) - z sqrt(v)) / 2 m)^2 (normal
    approximation; z = 2.33). Capped by `max_num_seqs`; 0 where the cache does not hold one sequence of the window.
    Several caches each hold as many of theirs.
    Agrees with `max_sequences` to the rounding of one block when every request fills its window (v = 0).
    """
    n_caches = caches_of(kv)
    capacity = kv.n_blocks / n_caches * BLOCK_TOKENS
    mean = held_tokens + kv.fixed_tokens + (BLOCK_TOKENS - 1.0) / 2.0
    spread = OVERFLOW_Z * jnp.sqrt(jnp.maximum(held_variance, 1e-12))
    root = 2.0 * capacity / (spread + jnp.sqrt(spread**2 + 4.0 * mean * capacity))  # no cancellation for large spread
    n = jnp.minimum(n_caches * whole_down(root**2, whole=whole), kv.max_num_seqs)
    return jnp.where(window_tokens + kv.fixed_tokens <= capacity, jnp.maximum(n, 1.0), 0.0)


def workspace_bytes(
    *,
    hidden: ArrayLike,
    mlp_width: ArrayLike,
    tp: ArrayLike,
    batched_tokens: ArrayLike,
    experts_per_token: ArrayLike = 0.0,
    expert_width: ArrayLike = 0.0,
) -> Array:
    """What an engine keeps free of one GPU's share for anything but weights, NCCL and KV cache [B].

    1.9 GiB, and the activations of one step of `batched_tokens` tokens in 16 bits at their peak, which is in the MLP:
    twice the hidden state (4 H bytes a token), gate, up and their product (6 I / TP); with experts, for each of the k
    a token goes to, the hidden state gathered, its output and their sum, and the expert's own (6 H + 6 I_e / TP).

    Held against the "Available KV cache memory" or "GPU KV cache size" that vLLM 0.7 to 0.30 logged, with the weights
    it logged: KV tokens within -4 and +1 % for Qwen3-8B, Llama-3.1-8B, Qwen2.5-14B, Llama-3.1-70B (8 bits, 0.98 of one
    80 GB GPU), Llama-3.3-70B-FP8 on 4 H200, MiniMax-M2.7 on 4 of 80 GB, DeepSeek-R1 on 8 H200, gpt-oss-20b on A100.
    The rest is 0.6 GiB too large where steps have 2,048 tokens and 256 sequences (1.4 GiB for Qwen3-0.6B on L40S), and
    3.6 GiB too small for Qwen3-Next-80B on 2 H200 by vLLM 0.10.2, which sampled without FlashInfer.
    """
    dense_bytes = 4.0 * hidden + 6.0 * mlp_width / tp
    routed_bytes = experts_per_token * (6.0 * hidden + 6.0 * expert_width / tp)
    return cast(Array, CONTEXT_BYTES + batched_tokens * (dense_bytes + routed_bytes))


def _beside_weights_bytes(
    gpu: Gpu, llm: Llm, tp: ArrayLike, utilization: ArrayLike, dp: ArrayLike = 1.0, pp: ArrayLike = 1.0
) -> Array:
    """What weights and NCCL's buffers leave of one GPU's share of memory [B]."""
    xp = namespace(gpu, llm, tp, dp, pp)
    nccl_bytes = xp.where(xp.greater(tp * dp * pp, 1), gpu.nccl_bytes, 0.0)
    return utilization * gpu.memory_bytes - weight_bytes_of_gpu(llm, tp, dp, pp) - nccl_bytes


def kv_bytes_on_gpu(llm: Llm, tp: ArrayLike, pp: ArrayLike = 1.0) -> Array:
    """Bytes of a token's KV cache on one GPU of an instance, of the layers with full attention [B]."""
    full_frac = namespace(llm, tp).maximum(1.0 - llm.windowed_frac, 1e-9)
    return cast(Array, full_frac * llm.kv_bytes_per_token / (kv_split(llm, tp) * pp))


def kv_capacity_tokens(
    gpu: Gpu,
    llm: Llm,
    tp: ArrayLike,
    utilization: ArrayLike = MEMORY_UTILIZATION,
    workspace: ArrayLike = WORKSPACE_BYTES,
    dp: ArrayLike = 1.0,
    pp: ArrayLike = 1.0,
) -> Array:
    """Tokens of one instance's KV cache [tokens], of the layers with full attention; negative where weights do not fit.

    (utilization x memory - weights - NCCL - workspace) / (KV bytes of a token on one GPU), the cache divided over
    min(TP, KV heads) GPUs of each of `pp` stages; of `dp` groups with caches of their own, as many together. Error:
    `workspace_bytes`; 1 to 5 % above the 3.53 to 3.68 million tokens vLLM logged for Llama-3.1-70B on 8 B200.
    """
    free_bytes = _beside_weights_bytes(gpu, llm, tp, utilization, dp, pp) - workspace
    return cast(Array, dp * free_bytes / kv_bytes_on_gpu(llm, tp, pp))


def physical_kv(
    gpu: Gpu,
    llm: Llm,
    tp: ArrayLike,
    max_num_seqs: ArrayLike,
    utilization: ArrayLike = MEMORY_UTILIZATION,
    workspace: ArrayLike = WORKSPACE_BYTES,
    dp: ArrayLike = 1.0,
    pp: ArrayLike = 1.0,
) -> KvCapacity:
    """`KvCapacity` of any GPU, LLM and parallelism, from memory alone; a state of layers that keep one is a fixed part
    of each sequence, as windows are."""
    xp = namespace(gpu, llm, tp, max_num_seqs)
    tokens = kv_capacity_tokens(gpu, llm, tp, utilization, workspace, dp, pp)
    blocks = xp.floor(xp.maximum(tokens, 0.0) / BLOCK_TOKENS)
    full_frac = xp.maximum(1.0 - llm.windowed_frac, 1e-9)
    state_tokens = llm.state_bytes / tp / (full_frac * llm.kv_bytes_per_token / kv_split(llm, tp))
    return KvCapacity(
        n_blocks=blocks,
        slot_tokens=xp.full_like(blocks, xp.inf),
        fixed_tokens=llm.window_tokens * llm.windowed_frac / full_frac + state_tokens,
        max_num_seqs=xp.asarray(max_num_seqs, dtype=float),
        n_caches=xp.asarray(dp, dtype=float) + 0.0 * blocks,
    )


def whole_blocks_tokens(tokens: float) -> float:
    """The window of whole blocks that a request of so many tokens needs."""
    return BLOCK_TOKENS * math.ceil(tokens / BLOCK_TOKENS)


def roofline_kv_blocks(gpu: Gpu, llm: Llm, tp: ArrayLike, utilization: ArrayLike = MEMORY_UTILIZATION) -> Array:
    """Blocks = floor((0.90 memory - weights / TP - NCCL) / (16 * KV bytes per token)), at least 0.

    As published: the KV cache is *not* divided by TP, which understates capacity by up to TP.
    """
    xp, free_bytes = namespace(gpu, llm, tp), _beside_weights_bytes(gpu, llm, tp, utilization)
    return xp.maximum(0.0, xp.floor(free_bytes / (BLOCK_TOKENS * llm.kv_bytes_per_token)))
