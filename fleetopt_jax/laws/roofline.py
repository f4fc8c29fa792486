"""Decode step time (1/W Law, section 3): t(n, L) = W + H (L / L_cal) n.

Symbols: W=base_s, H=per_seq_s, L_cal=calibration_tokens. Source: arXiv 2603.17280v1 for the form; the roofline
coefficients are derived below from data sheets. Error of the published form refitted to measurements: 49 % (H100) and
51 % (B200) leave-one-architecture-out, so read it as the paper's model, not as a forecast.
"""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.core.units import US
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.llm import Llm, weight_bytes

BANDWIDTH_EFFICIENCY = 0.80  # share of the peak bandwidth that streaming reaches (published)
LAYER_OVERHEAD_S = 3 * US  # launch overhead a layer (published)
ROOFLINE_CONTEXT_TOKENS = 4096.0  # mean context at which the published roofline engine fixes H


@pytree
class DecodeStep:
    """Coefficients of the decode step. Every field is traced; shape () or a leading vmap axis."""

    base_s: Array  # W: weight streaming and overhead of one iteration [s]
    per_seq_s: Array  # H: cost of one more sequence at the calibration context [s]
    calibration_tokens: Array  # L_cal: context at which H holds [tokens]


def make_decode_step(*, base_s: float, per_seq_s: float, calibration_tokens: float) -> DecodeStep:
    """A checked `DecodeStep`."""
    if not all(0 < value < math.inf for value in (base_s, per_seq_s, calibration_tokens)):
        raise ValueError(f"need positive coefficients, got {base_s=}, {per_seq_s=}, {calibration_tokens=}")
    return DecodeStep(**as_floats(base_s=base_s, per_seq_s=per_seq_s, calibration_tokens=calibration_tokens))


def decode_step_s(step: DecodeStep, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
    """Time of one decode iteration [s] with `n_active` sequences of mean context `context_tokens`."""
    return step.base_s + step.per_seq_s * (context_tokens / step.calibration_tokens) * n_active


def decode_tok_per_s(step: DecodeStep, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
    """Output tokens per second of one instance [1/s]: every sequence gains one token an iteration."""
    return n_active / decode_step_s(step, n_active, context_tokens)


def weight_stream_s(gpu: Gpu, llm: Llm, tp: ArrayLike) -> Array:
    """W [s] = weight bytes per GPU / (0.80 bandwidth) + 3 us * layers."""
    streaming_s = weight_bytes(llm) / tp / (BANDWIDTH_EFFICIENCY * gpu.bandwidth_bytes_per_s)
    return streaming_s + LAYER_OVERHEAD_S * llm.n_layers


def active_weight_stream_s(gpu: Gpu, llm: Llm, tp: ArrayLike) -> Array:
    """W [s] the paper uses for MoE models: active weights only, at the peak bandwidth, without overhead.

    A lower bound, reached by one sequence: at 24 sequences Qwen3-235B already streams 79 % of its experts.
    """
    return llm.n_active_params * llm.bytes_per_weight / tp / gpu.bandwidth_bytes_per_s


def kv_scan_s(gpu: Gpu, llm: Llm, tp: ArrayLike) -> Array:
    """H [s] = 4096 * KV bytes per token / (0.80 bandwidth) / TP: reading one sequence's KV cache of 4,096 tokens."""
    kv_bytes = ROOFLINE_CONTEXT_TOKENS * llm.kv_bytes_per_token
    return kv_bytes / (BANDWIDTH_EFFICIENCY * gpu.bandwidth_bytes_per_s) / tp


def roofline_decode_step(gpu: Gpu, llm: Llm, tp: ArrayLike) -> DecodeStep:
    """The published roofline engine's `DecodeStep` for any GPU, LLM and tensor parallelism."""
    dense = jnp.equal(llm.n_active_params, llm.n_params)
    base_s = jnp.where(dense, weight_stream_s(gpu, llm, tp), active_weight_stream_s(gpu, llm, tp))
    return DecodeStep(
        base_s=base_s,
        per_seq_s=kv_scan_s(gpu, llm, tp),
        calibration_tokens=jnp.asarray(ROOFLINE_CONTEXT_TOKENS, dtype=float),
    )
