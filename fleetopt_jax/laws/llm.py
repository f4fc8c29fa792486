"""What a model's configuration says about its weights and its KV cache."""

import math

from jax import Array

from fleetopt_jax.core.struct import as_floats, pytree


@pytree
class Llm:
    """One LLM at one precision. Every field is traced; shape () or a leading vmap axis."""

    n_params: Array  # all parameters [-]
    n_active_params: Array  # parameters a token passes through; = n_params when dense [-]
    n_layers: Array  # transformer layers [-]
    bytes_per_weight: Array  # 2 for bf16, 1 for fp8 [B]
    kv_bytes_per_token: Array  # KV cache of one token over all layers [B]


def make_llm(
    *,
    n_params: float,
    n_layers: float,
    bytes_per_weight: float,
    kv_bytes_per_token: float,
    n_active_params: float | None = None,
) -> Llm:
    """A checked `Llm`; leave out `n_active_params` for a dense model."""
    active = n_params if n_active_params is None else n_active_params
    values = dict(
        n_params=n_params,
        n_active_params=active,
        n_layers=n_layers,
        bytes_per_weight=bytes_per_weight,
        kv_bytes_per_token=kv_bytes_per_token,
    )
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"need a positive, finite {name}, got {value}")
    if active > n_params:
        raise ValueError(f"need n_active_params <= n_params, got {active} > {n_params}")
    return Llm(**as_floats(**values))


def gqa_kv_bytes_per_token(*, n_layers: float, n_kv_heads: float, head_dim: float, bytes_per_value: float) -> float:
    """Bytes of keys and values of one token: 2 * layers * KV heads * head_dim * bytes (grouped-query attention)."""
    return 2 * n_layers * n_kv_heads * head_dim * bytes_per_value


def mla_kv_bytes_per_token(*, n_layers: float, latent_dim: float, rope_dim: float, bytes_per_value: float) -> float:
    """Bytes of the compressed latent of one token: layers * (latent + rotary) * bytes (multi-head latent attention)."""
    return n_layers * (latent_dim + rope_dim) * bytes_per_value


def weight_bytes(llm: Llm) -> Array:
    """All weights [B]: parameters times bytes per weight."""
    return llm.n_params * llm.bytes_per_weight
