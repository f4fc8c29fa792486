"""Prefill: reading the prompt before the first token.

As published, a prompt takes ceil(prompt / chunk) iterations and rides along with the decodes for free. Physically it is
compute: 2 active_params FLOPs a token and attention over the prompt so far, s_p = tau1 p + tau2 p^2, at the share of
the peak that prefill sustains. It takes that time from decoding and draws its own power.
"""

from dataclasses import replace

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import whole_up
from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.clocks import PREFILL_CORE_SHARE, clocked_w
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.llm import Llm, n_active_params

DENSE_EFFICIENCY = 0.60  # share of the 16-bit peak a dense model's prefill sustains
EIGHT_BIT_EFFICIENCY = 0.40  # of the 8-bit peak
EXPERT_EFFICIENCY = 0.20  # of the peak, counted in active parameters, for a mixture of experts
EFFICIENCY_ERROR = (
    0.4  # relative: from mean iteration minus median ITL in ML.ENERGY chat rows, whose prompts are estimates
)


@pytree
class Prefill:
    """What a prompt costs. Every field is traced; shape () or a leading vmap axis."""

    chunk_tokens: Array  # published: prompt tokens of one iteration [tokens]
    calibration_tokens: Array  # published: context at which the lone iteration is counted [tokens]
    per_token_s: Array  # tau1: linear layers [s/token]
    per_token2_s: Array  # tau2: attention [s/token^2]
    budget_tokens: Array  # tokens of one iteration (vLLM's max_num_batched_tokens) [tokens]
    gpu_w: Array  # board power while prefilling [W]
    first_token_s: Array  # of a first token beyond its iterations: tokenizer, the way there and back; 0: not known [s]

    def at_clock(self, idle_w: ArrayLike, clock_frac: ArrayLike) -> "Prefill":
        """On cores at `clock_frac` of their top clock (`laws/clocks.py`): bound by compute, so 1 / f as long."""
        return replace(
            self,
            per_token_s=self.per_token_s / clock_frac,
            per_token2_s=self.per_token2_s / clock_frac,
            gpu_w=clocked_w(self.gpu_w, idle_w, PREFILL_CORE_SHARE, clock_frac),
        )

    def slower(self, factor: ArrayLike) -> "Prefill":
        """Every prompt takes `factor` times as long."""
        return replace(self, per_token_s=self.per_token_s * factor, per_token2_s=self.per_token2_s * factor)


def make_prefill(
    *,
    chunk_tokens: float,
    calibration_tokens: float,
    per_token_s: float,
    per_token2_s: float = 0.0,
    budget_tokens: float = 8192.0,
    gpu_w: float,
    first_token_s: float = 0.0,
) -> Prefill:
    """A checked `Prefill`.

    >>> prefill = fo.make_prefill(chunk_tokens=1024, calibration_tokens=4096, per_token_s=3e-5, gpu_w=650)
    >>> round(float(fo.laws.prefill.prefill_s(prefill, 1000.0)), 4)
    0.03
    """
    values = dict(locals())
    for name, value in values.items():
        least_0 = name in ("per_token2_s", "first_token_s")
        if not (0 <= value < float("inf") if least_0 else 0 < value < float("inf")):
            raise ValueError(f"need a positive, finite {name}, got {value}")
    if chunk_tokens < 1:
        raise ValueError(f"need chunk_tokens >= 1, got {chunk_tokens}")
    return Prefill(**as_floats(**values))


def prefill_chunks(prompt_tokens: ArrayLike, chunk_tokens: ArrayLike, *, whole: bool = True) -> Array:
    """Iterations one prompt needs, as published [-]: ceil(prompt / chunk); without the ceiling if not `whole`."""
    return whole_up(prompt_tokens / chunk_tokens, whole=whole)


def lone_iteration_s(step: DecodeLaw, prefill: Prefill) -> Array:
    """t(1, L_cal) [s]: the time the published TTFT counts for a chunk, as if the instance were empty."""
    return step.step_s(1.0, prefill.calibration_tokens)


def prefill_s(prefill: Prefill, prompt_tokens: ArrayLike) -> Array:
    """Engine time of one prompt [s]: tau1 p + tau2 p^2."""
    return (prefill.per_token_s + prefill.per_token2_s * prompt_tokens) * prompt_tokens


def prefill_efficiency(llm: Llm) -> Array:
    """Share of the peak FLOP/s that prefill sustains [-]. Error +-40 %: see `EFFICIENCY_ERROR`."""
    dense = DENSE_EFFICIENCY + (EIGHT_BIT_EFFICIENCY - DENSE_EFFICIENCY) * llm.eight_bit_frac
    return namespace(llm).where(llm.n_expert_params > 0, EXPERT_EFFICIENCY, dense)


def peak_flop_per_s(gpu: Gpu, llm: Llm) -> Array:
    """Data-sheet peak at the precision the model computes in [FLOP/s]."""
    return gpu.peak_flop_per_s + (gpu.peak_flop8_per_s - gpu.peak_flop_per_s) * llm.eight_bit_frac


def prefill_coefficients_s(gpu: Gpu, llm: Llm, tp: ArrayLike) -> tuple[Array, Array]:
    """(tau1 [s/token], tau2 [s/token^2]) = (2 active_params, attention / 2) FLOPs / (TP * sustained FLOP/s).

    A token attends to half its prompt on average; layers with a sliding window to the window, which is linear.
    """
    sustained = tp * prefill_efficiency(llm) * peak_flop_per_s(gpu, llm)
    windowed_flop = llm.attention_flop_per_token2 * llm.windowed_frac * llm.window_tokens
    quadratic_flop = llm.attention_flop_per_token2 * (1.0 - llm.windowed_frac) / 2.0
    return (2.0 * n_active_params(llm) + windowed_flop) / sustained, quadratic_flop / sustained
