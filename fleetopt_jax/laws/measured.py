"""Decode step and board power fitted to measurements, for any GPU, LLM, tensor parallelism and precision.

    t = layers (a + b [TP > 1] + c [MoE]) + t_weights / eta_w + t_kv / eta_kv + t_flops / eta_f + s n
    P = softmin(0.975 TDP, P0 + a u_mem + b sqrt(u_flop) + d [TP > 1])

t_x are bytes or FLOPs of one GPU over its data-sheet peak; u are the shares of the peaks a step keeps busy. Source:
least squares over the text rows of the ML.ENERGY Benchmark v3 (Chung et al., arXiv 2505.06371 and 2601.22076), contexts
of 0.4 to 8 thousand tokens, batches of 8 to 2,048, vLLM 0.11.1. Mean error on architectures left out of the fit: step
16 % (H100), 22 % (B200); power 13 %, 12 % (9.5 % where the step is measured). Where it is worse
(experiments/law_vs_measurement.py, context_sweep.py): small models on B200 are often bound by the host; fp8 experts
come out 18 to 30 % too fast, gpt-oss on B200 37 % too slow; and a newer engine (vLLM 0.20, Llama-3.1-70B on 8 B200) is
2.5 times as efficient as the law says.
"""

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.core.units import US
from fleetopt_jax.laws.decode import DecodeStep
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.llm import Llm, dense_bytes, expert_bytes, kv_split, n_active_params
from fleetopt_jax.laws.power import ActivityPower
from fleetopt_jax.laws.prefill import peak_flop_per_s, prefill_efficiency

POWER_LIMIT_FRAC = 0.975  # of the TDP: the highest mean power seen


@pytree
class EngineLaw:
    """Coefficients of one GPU generation. Powers are fractions of the TDP, so that the law carries over to others."""

    layer_s: Array  # a: launches of one layer [s]
    layer_parallel_s: Array  # b: further with more than one GPU [s]
    layer_expert_s: Array  # c: further with experts [s]
    per_seq_s: Array  # s: scheduling and sampling of one sequence [s]
    weight_inverse_efficiency: Array  # 1 / eta_w [-]
    kv_inverse_efficiency: Array  # 1 / eta_kv [-]
    flop_inverse_efficiency: Array  # 1 / eta_f [-]
    floor_frac: Array  # P0 / TDP [-]
    memory_frac: Array  # a / TDP [-]
    sqrt_flop_frac: Array  # b / TDP [-]
    parallel_frac: Array  # d / TDP [-]


def _law(
    tdp_w: float, *, step_us: tuple[float, ...], inverse: tuple[float, ...], watts: tuple[float, ...]
) -> EngineLaw:
    steps = dict(zip(("layer_s", "layer_parallel_s", "layer_expert_s", "per_seq_s"), (x * US for x in step_us)))
    names = ("weight_inverse_efficiency", "kv_inverse_efficiency", "flop_inverse_efficiency")
    powers = ("floor_frac", "memory_frac", "sqrt_flop_frac", "parallel_frac")
    return EngineLaw(**as_floats(**steps, **dict(zip(names, inverse)), **dict(zip(powers, (w / tdp_w for w in watts)))))


def h100_law() -> EngineLaw:
    """Fitted to H100 SXM (80 GB, 700 W)."""
    return _law(
        700,
        step_us=(48.3273, 47.7787, 107.891, 58.7739),
        inverse=(1.02856, 1.0, 1.0),
        watts=(456.628, 0.0, 371.479, -55.7087),
    )


def b200_law() -> EngineLaw:
    """Fitted to B200 SXM (180 GB, 1,000 W)."""
    return _law(
        1000,
        step_us=(67.0987, 49.8529, 86.274, 54.1083),
        inverse=(1.10248, 1.26284, 1.07894),
        watts=(358.48, 535.577, 885.974, 105.008),
    )


def measured_decode_step(law: EngineLaw, gpu: Gpu, llm: Llm, tp: ArrayLike) -> DecodeStep:
    """The law's `DecodeStep`, pure decode: no prefill in it."""
    bytes_s, flops_s = ideal_bytes(gpu, llm, tp), ideal_flops(gpu, llm, tp)
    xp = namespace(law, gpu, llm, tp)
    parallel, experts = xp.greater(tp, 1), xp.greater(llm.n_expert_params, 0)
    layer_s = law.layer_s + parallel * law.layer_parallel_s + experts * law.layer_expert_s

    def summed(of_bytes: Array, of_flops: Array, inverse_efficiency: Array) -> Array:
        return inverse_efficiency * of_bytes + law.flop_inverse_efficiency * of_flops

    return DecodeStep(
        base_s=llm.n_layers * layer_s + law.weight_inverse_efficiency * bytes_s.base_s,
        expert_s=law.weight_inverse_efficiency * bytes_s.expert_s,
        expert_share=llm.expert_share,
        per_seq_s=law.per_seq_s + law.flop_inverse_efficiency * flops_s.per_seq_s,
        per_token_s=summed(bytes_s.per_token_s, flops_s.per_token_s, law.kv_inverse_efficiency),
        windowed_token_s=summed(bytes_s.windowed_token_s, flops_s.windowed_token_s, law.kv_inverse_efficiency),
        window_tokens=llm.window_tokens,
    )


def measured_power(law: EngineLaw, gpu: Gpu, llm: Llm, tp: ArrayLike, step: DecodeStep) -> ActivityPower:
    """The law's power of one GPU whose steps take `step`."""
    return ActivityPower(
        floor_w=gpu.tdp_w * (law.floor_frac + namespace(tp).greater(tp, 1) * law.parallel_frac),
        memory_w=gpu.tdp_w * law.memory_frac,
        sqrt_flop_w=gpu.tdp_w * law.sqrt_flop_frac,
        cap_w=POWER_LIMIT_FRAC * gpu.tdp_w,
        step=step,
        ideal_bytes=ideal_bytes(gpu, llm, tp),
        ideal_flops=ideal_flops(gpu, llm, tp),
    )


def prefill_gpu_w(power: ActivityPower, llm: Llm) -> Array:
    """Board power while prefilling [W]: the sustained share of the peak FLOP/s, next to no memory traffic a FLOP."""
    return power.at_shares_w(0.0, prefill_efficiency(llm))


def ideal_bytes(gpu: Gpu, llm: Llm, tp: ArrayLike) -> DecodeStep:
    """Time the bytes one GPU must read take at its peak bandwidth [s]: no step is shorter."""
    bandwidth = gpu.bandwidth_bytes_per_s
    kv_s = llm.kv_bytes_per_token / kv_split(llm, tp) / bandwidth
    return DecodeStep(
        base_s=dense_bytes(llm) / tp / bandwidth,
        expert_s=expert_bytes(llm) / tp / bandwidth,
        expert_share=llm.expert_share,
        per_seq_s=namespace(kv_s).zeros_like(kv_s),
        per_token_s=(1.0 - llm.windowed_frac) * kv_s,
        windowed_token_s=llm.windowed_frac * kv_s,
        window_tokens=llm.window_tokens,
    )


def ideal_flops(gpu: Gpu, llm: Llm, tp: ArrayLike) -> DecodeStep:
    """Time the FLOPs of one GPU take at its peak FLOP/s [s]."""
    peak = tp * peak_flop_per_s(gpu, llm)
    attention_s = llm.attention_flop_per_token2 / peak
    zero = namespace(attention_s).zeros_like(attention_s)
    return DecodeStep(
        base_s=zero,
        expert_s=zero,
        expert_share=zero,
        per_seq_s=2.0 * n_active_params(llm) / peak,
        per_token_s=(1.0 - llm.windowed_frac) * attention_s,
        windowed_token_s=llm.windowed_frac * attention_s,
        window_tokens=llm.window_tokens,
    )
