"""The published roofline engine: t(n, L) = W + H (L / L_cal) n with coefficients from data sheets (1/W Law, section 3).

Symbols: W = `base_s`, H / L_cal = `per_token_s` of the `DecodeStep`. Error of the published form refitted to
measurements: 49 % (H100) and 51 % (B200) leave-one-architecture-out: read it as the paper's model, not as a forecast.
"""

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace
from fleetopt_jax.core.units import US
from fleetopt_jax.laws.decode import DecodeStep
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.llm import Llm, n_active_params, weight_bytes

BANDWIDTH_EFFICIENCY = 0.80  # share of the peak bandwidth that streaming reaches (published)
LAYER_OVERHEAD_S = 3 * US  # launch overhead a layer (published)
ROOFLINE_CONTEXT_TOKENS = 4096.0  # mean context at which the published roofline engine fixes H


def weight_stream_s(gpu: Gpu, llm: Llm, tp: ArrayLike) -> Array:
    """W [s] = weight bytes per GPU / (0.80 bandwidth) + 3 us * layers."""
    streaming_s = weight_bytes(llm) / tp / (BANDWIDTH_EFFICIENCY * gpu.bandwidth_bytes_per_s)
    return streaming_s + LAYER_OVERHEAD_S * llm.n_layers


def active_weight_stream_s(gpu: Gpu, llm: Llm, tp: ArrayLike) -> Array:
    """W [s] the paper uses for MoE models: active weights only, at the peak bandwidth, without overhead.

    A lower bound, reached by one sequence: at 24 sequences Qwen3-235B already streams 79 % of its experts.
    """
    return n_active_params(llm) * llm.bytes_per_weight / tp / gpu.bandwidth_bytes_per_s


def kv_scan_s(gpu: Gpu, llm: Llm, tp: ArrayLike) -> Array:
    """H [s] = 4096 * KV bytes per token / (0.80 bandwidth) / TP: reading one sequence's KV cache of 4,096 tokens."""
    kv_bytes = ROOFLINE_CONTEXT_TOKENS * llm.kv_bytes_per_token
    return kv_bytes / (BANDWIDTH_EFFICIENCY * gpu.bandwidth_bytes_per_s) / tp


def roofline_decode_step(gpu: Gpu, llm: Llm, tp: ArrayLike) -> DecodeStep:
    """The published roofline engine's `DecodeStep` for any GPU, LLM and tensor parallelism."""
    xp = namespace(gpu, llm, tp)
    zero = xp.zeros_like(llm.n_layers)
    return DecodeStep(
        base_s=xp.where(llm.n_expert_params == 0, weight_stream_s(gpu, llm, tp), active_weight_stream_s(gpu, llm, tp)),
        expert_s=zero,
        expert_share=zero,
        per_seq_s=zero,
        per_token_s=kv_scan_s(gpu, llm, tp) / ROOFLINE_CONTEXT_TOKENS,
        windowed_token_s=zero,
        window_tokens=zero,
    )
