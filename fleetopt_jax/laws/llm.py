"""What a model's configuration says about its weights, its KV cache and its attention."""

import math

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree


@pytree
class Llm:
    """One LLM at one precision. Every field is traced; shape () or a leading vmap axis.

    Mixture of experts: a token uses `expert_share` = k / E of the routed experts. A dense model has no experts and a
    share of 0. Attention layers with a sliding window read and hold at most `window_tokens` of a sequence.
    """

    n_dense_params: Array  # read in every step: attention, dense and shared MLP, router, output layer [-]
    n_expert_params: Array  # all routed experts together [-]
    expert_share: Array  # k / E, in [0, 1) [-]
    n_embedding_params: Array  # input embedding where it is not the output layer: held, not streamed [-]
    n_layers: Array  # transformer layers [-]
    bytes_per_weight: Array  # of the dense parameters: 2 for bf16, 1 for fp8 [B]
    bytes_per_expert_weight: Array  # of the experts [B]
    eight_bit_frac: Array  # share of the matrix products that run in 8 bits, not in 16 [-]
    kv_bytes_per_token: Array  # KV cache of one token over all layers [B]
    n_kv_heads: Array  # the KV cache divides over at most so many GPUs; 1 for a latent (MLA) cache [-]
    attention_flop_per_token2: Array  # FLOPs of one token attending to one token, over all layers [FLOP]
    windowed_frac: Array  # share of the layers with a sliding window [-]
    window_tokens: Array  # its length [tokens]
    padding_bytes: Array  # held and not streamed: what kernels pad weights with [B]
    state_bytes: Array  # of one sequence, over all layers that keep a state instead of a KV cache [B]


EMBEDDING_BYTES = 2.0  # the input embedding stays in 16 bits, whatever the weights are quantised to


def make_llm(
    *,
    n_dense_params: float,
    n_layers: float,
    bytes_per_weight: float,
    kv_bytes_per_token: float,
    n_expert_params: float = 0.0,
    expert_share: float = 0.0,
    n_embedding_params: float = 0.0,
    bytes_per_expert_weight: float | None = None,
    eight_bit_frac: float = 0.0,
    n_kv_heads: float = 8.0,
    attention_flop_per_token2: float = 0.0,
    windowed_frac: float = 0.0,
    window_tokens: float = 0.0,
    padding_bytes: float = 0.0,
    state_bytes: float = 0.0,
) -> Llm:
    """A checked `Llm`; leave out the experts for a dense model, the window for full attention.

    >>> llm = fo.make_llm(n_dense_params=8e9, n_layers=32, bytes_per_weight=2, kv_bytes_per_token=131_072)
    >>> float(fo.laws.llm.weight_bytes(llm))
    16000000000.0
    """
    values = dict(locals())
    if bytes_per_expert_weight is None:
        values["bytes_per_expert_weight"] = bytes_per_weight
    positive = ("n_layers", "bytes_per_weight", "bytes_per_expert_weight", "kv_bytes_per_token", "n_kv_heads")
    for name, value in values.items():
        if not (math.isfinite(value) and (value > 0 if name in positive else value >= 0)):
            raise ValueError(f"need a {'positive' if name in positive else 'non-negative'}, finite {name}, got {value}")
    if not n_dense_params + n_expert_params > 0:
        raise ValueError("need parameters, got none")
    if not expert_share < 1 or (n_expert_params > 0) != (expert_share > 0):
        raise ValueError(f"need 0 < expert_share < 1 with experts, 0 without, got {expert_share=}, {n_expert_params=}")
    if not (eight_bit_frac <= 1 and windowed_frac <= 1):
        raise ValueError(f"need fractions in 0..1, got {eight_bit_frac=}, {windowed_frac=}")
    return Llm(**as_floats(**values))


def gqa_kv_bytes_per_token(*, n_layers: float, n_kv_heads: float, head_dim: float, bytes_per_value: float) -> float:
    """Bytes of keys and values of one token: 2 * layers * KV heads * head_dim * bytes (grouped-query attention)."""
    return 2 * n_layers * n_kv_heads * head_dim * bytes_per_value


def mla_kv_bytes_per_token(*, n_layers: float, latent_dim: float, rope_dim: float, bytes_per_value: float) -> float:
    """Bytes of the compressed latent of one token: layers * (latent + rotary) * bytes (multi-head latent attention)."""
    return n_layers * (latent_dim + rope_dim) * bytes_per_value


def n_params(llm: Llm) -> Array:
    """All parameters [-]."""
    return llm.n_dense_params + llm.n_expert_params + llm.n_embedding_params


def n_active_params(llm: Llm) -> Array:
    """Parameters a token is multiplied with [-]: dense plus k / E of the experts."""
    return llm.n_dense_params + llm.expert_share * llm.n_expert_params


def weight_bytes(llm: Llm) -> Array:
    """All weights in memory [B]."""
    return checkpoint_bytes(llm) + llm.padding_bytes


def weight_bytes_of_gpu(llm: Llm, tp: ArrayLike, dp: ArrayLike = 1.0, pp: ArrayLike = 1.0) -> Array:
    """Weights in the memory of one GPU of an instance [B]: `dp` groups of `tp` GPUs divide the experts together and
    hold everything else each; `pp` stages have as many layers each, and the same share of the embeddings."""
    routed_bytes = expert_bytes(llm) + llm.padding_bytes
    return (weight_bytes(llm) - (1.0 - 1.0 / dp) * routed_bytes) / (tp * pp)


def checkpoint_bytes(llm: Llm) -> Array:
    """All weights in files [B]."""
    return dense_bytes(llm) + expert_bytes(llm) + EMBEDDING_BYTES * llm.n_embedding_params


def dense_bytes(llm: Llm) -> Array:
    """Weights every step streams [B]."""
    return llm.n_dense_params * llm.bytes_per_weight


def expert_bytes(llm: Llm) -> Array:
    """All routed experts [B]; a step streams the share `expert_coverage` of them."""
    return llm.n_expert_params * llm.bytes_per_expert_weight


def expert_coverage(expert_share: ArrayLike, n_tokens: ArrayLike) -> Array:
    """Expected share of the experts that n tokens touch [-]: 1 - (1 - k / E)^n, for a router that spreads evenly.

    One token touches k / E; at 24 tokens Qwen3-235B (8 of 128) already touches 79 %.
    """
    xp = namespace(expert_share, n_tokens)
    return -xp.expm1(n_tokens * xp.log1p(-xp.asarray(expert_share)))


def kv_split(llm: Llm, tp: ArrayLike) -> Array:
    """Over how many GPUs the KV cache divides [-]: min(TP, KV heads); a latent cache is whole on every one."""
    xp = namespace(llm, tp)
    return xp.minimum(xp.asarray(tp, dtype=float), llm.n_kv_heads)
