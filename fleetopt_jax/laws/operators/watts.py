"""Board watts of an operator from the shares of the data-sheet peaks it keeps busy, and of a step from its operators.

    P = idle + TDP (b + m u_mem + f u_flop^p)                               what an operator asks for
    P = [sum over kinds k of t_k P_k + t_gap (idle + TDP g)] / t            what a step asks for, t = sum t_k + t_gap
    P_board = softmin(0.985 limit, P),  softness 0.03 limit

u_mem = bytes / (bandwidth x seconds), u_flop = FLOPs / (peak of their data type x seconds); t_gap is what a step takes
beside its operators' own time. Idle is that with a model loaded, the limit the TDP unless less is said.

Operators (`OperatorWatts`), fitted to kernels looped alone (vLLM 0.22, ai-dynamo/aiconfigurator). Their meter averages
over about a second: only rows that it had settled on count (a quarter), and only those whose bytes the cache does not
hold. Decode attention is left out: its loops are too short (at 0.8 of the bandwidth they read 0.24 TDP on GB200, 0.4 to
0.5 on B200, 0.5 to 0.7 on H200). Relative errors: median and 90th percentile, median of the rows below 0.9 TDP (most
are at the limit), median of shapes left out:

| GPU | kind | rows | median | p90 | below the limit | left out |
|---|---|---|---|---|---|---|
| H200 | GEMM 16-bit | 11,883 | 1 % | 21 % | 9 % | 1 % |
| H200 | experts 16-bit, fp8, fp8 block | 24,875 | 2 % | 20 to 24 % | 11 to 13 % | 2 % |
| H200 | prefill attention | 3,414 | 14 % | 30 % | 12 % | 12 % |
| B200 | GEMM 16-bit, nvfp4 | 8,985 | 1 % | 11 to 13 % | 7, 20 % | 1 % |
| B200 | experts 16-bit, fp8, fp8 block | 21,806 | 1 to 6 % | 19 to 23 % | 7 to 11 % | 1 to 6 % |
| B200 | prefill attention | 6,683 | 8 % | 32 % | 16 % | 7 % |
| GB200 | GEMM 16-bit, nvfp4 | 5,837 | 1 to 2 % | 10, 23 % | 5, 28 % | 1 to 2 % |
| GB200 | GEMM fp8 | 12,580 | 11 % | 39 % | 16 % | 10 % |
| GB200 | prefill attention | 2,943 | 8 % | 33 % | 13 % | 9 % |

Serving (`ServingWatts`), fitted to ML.ENERGY's instances (vLLM 0.11), whose watts are the mean of a steady state, with
the measured step; held near the kernels' fractions. Relative errors, on architectures left out in the last two columns:

| GPU | rows | mean | p90 | mean, left out | median, left out |
|---|---|---|---|---|---|
| H100 | 201 | 9 % | 19 % | 11 % | 9 % |
| B200 | 189 | 10 % | 19 % | 12 % | 9 % |

On architectures left out dense LLMs are 9 % (H100) and 8 % (B200) off, mixtures of experts 12 and 13 %; by fractions
fitted to the other GPU alone, architectures left out as well, 10 and 13 % on both, which is what borrowers say.
About 5 % is left within a configuration and the rest between them: nodes differ (one configuration on two H100 nodes:
477 and 547 W), and kernels of vLLM 0.11 that nobody has timed (`slow_frac`). Elsewhere it can be worse: Llama-3.1-70B
on eight B200 (vLLM 0.20, contexts of 2 to 64 thousand tokens) draws 0.75 to 0.87 of what this says. All other GPUs are
projected: they take the fractions of H200 or H100 (A100, H100, H200, L40S), B200 or GB200 (B300, GB200, GB300, RTX PRO
6000).
"""

import math
from collections.abc import Sequence

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.hardware import Gpu

LIMIT_FRAC = 0.985  # of the power limit: where mean watts end (H200 0.984 to 0.99, B200 0.98 to 0.99, GB200 0.98)
SOFTNESS = 0.03  # of the power limit: width of the bend below it
KV_KIND, EXPERT_KIND = "decode_attention", "experts"  # kinds of operators whose bytes cost watts of their own
LEAST_SHARE = 1e-3  # below it a power of a share is a line, so that its slope at zero is finite


@pytree
class OperatorWatts:
    """Coefficients of operators, as fractions of the TDP above idle, so that they carry over to other GPUs. Fields
    traced, shape () or one leading axis of kinds of operators."""

    busy_frac: Array  # b: running at all [-]
    memory_frac: Array  # m: at the full memory bandwidth [-]
    flop_frac: Array  # f: at the full FLOP/s [-]
    flop_power: Array  # p: 1 where watts go with FLOP/s, less where few FLOP/s cost much [-]


@pytree
class StepWatts:
    """Watts of steps of one GPU. Fields traced."""

    operators: OperatorWatts  # [kind]
    gap_frac: Array  # g: of the TDP above idle, while the GPU waits for the host [-]


@pytree
class StepParts:
    """What one GPU does in a step. Fields traced."""

    seconds_s: Array  # of every kind of operator [kind]
    memory_s: Array  # time its bytes take at the peak bandwidth [kind]
    flop_s: Array  # time its FLOPs take at the peak of their data type [kind]
    gap_s: Array  # rest of the step: the GPU waits for the host [s]


def asked_w(law: OperatorWatts, gpu: Gpu, memory_share: ArrayLike, flop_share: ArrayLike) -> Array:
    """Board power [W] that an operator would draw at the top clock without a power limit."""
    return running_w(law, gpu) + memory_w(law, gpu) * memory_share + flop_w(law, gpu, flop_share)


def running_w(law: OperatorWatts, gpu: Gpu) -> Array:
    """Of it, idle and running at all [W]."""
    return gpu.idle_w + gpu.tdp_w * law.busy_frac


def memory_w(law: OperatorWatts, gpu: Gpu) -> Array:
    """Of it, at the full memory bandwidth [W]: in proportion below."""
    return gpu.tdp_w * law.memory_frac


def flop_w(law: OperatorWatts, gpu: Gpu, flop_share: ArrayLike) -> Array:
    """Of it, at that share of the full FLOP/s [W]."""
    xp = namespace(law, gpu, flop_share)
    bent = (xp.asarray(flop_share) + LEAST_SHARE) ** law.flop_power - LEAST_SHARE**law.flop_power
    return gpu.tdp_w * law.flop_frac * bent


def held_w(watts: ArrayLike, limit_w: ArrayLike) -> Array:
    """`watts` asked for, on a board with that power limit [W]."""
    xp = namespace(watts, limit_w)
    softness_w = SOFTNESS * xp.asarray(limit_w)
    highest_w = LIMIT_FRAC * xp.asarray(limit_w)
    return highest_w - softness_w * xp.logaddexp((highest_w - watts) / softness_w, 0.0)


def operator_w(law: OperatorWatts, gpu: Gpu, memory_share: ArrayLike, flop_share: ArrayLike) -> Array:
    """Board power [W] of an operator that runs all the time, at given shares of the peaks [-]."""
    return held_w(asked_w(law, gpu, memory_share, flop_share), gpu.tdp_w)


def step_parts(gpu: Gpu, seconds_s: Array, n_bytes: Array, flop_s: Array, whole_s: ArrayLike) -> StepParts:
    """Of a step that takes `whole_s`, from its operators [kind]: what they do not take is the gap."""
    gap_s = namespace(seconds_s, whole_s).maximum(whole_s - seconds_s.sum(axis=-1), 0.0)
    return StepParts(seconds_s, n_bytes / gpu.bandwidth_bytes_per_s, flop_s, gap_s)


def step_s(parts: StepParts) -> Array:
    """The whole step [s]."""
    return parts.seconds_s.sum(axis=-1) + parts.gap_s


def step_asked_w(law: StepWatts, gpu: Gpu, parts: StepParts) -> Array:
    """Mean board power [W] that a step would draw at the top clock without a power limit."""
    memory_share, flop_share = (safe_div(x, parts.seconds_s) for x in (parts.memory_s, parts.flop_s))
    operators_j = (parts.seconds_s * asked_w(law.operators, gpu, memory_share, flop_share)).sum(axis=-1)
    return with_gap_w(law, gpu, operators_j, parts.seconds_s.sum(axis=-1), parts.gap_s)


def with_gap_w(law: StepWatts, gpu: Gpu, operators_j: ArrayLike, busy_s: ArrayLike, gap_s: ArrayLike) -> Array:
    """The same of a step whose operators take `operators_j` in `busy_s`, and the rest of it `gap_s` [W]."""
    gap_w = gpu.idle_w + gpu.tdp_w * law.gap_frac
    return safe_div(operators_j + gap_s * gap_w, busy_s + gap_s, gap_w)


def step_power_w(law: StepWatts, gpu: Gpu, parts: StepParts, limit_w: ArrayLike | None = None) -> Array:
    """Mean board power [W] of one GPU over steps of these parts, on a board limited to `limit_w` (default: the TDP)."""
    return held_w(step_asked_w(law, gpu, parts), gpu.tdp_w if limit_w is None else limit_w)


def make_operator_watts(*, busy_frac: float, memory_frac: float, flop_frac: float, flop_power: float) -> OperatorWatts:
    """A checked `OperatorWatts`."""
    values = dict(locals())
    _check(values)
    return OperatorWatts(**as_floats(**values))


@pytree
class ServingWatts:
    """Coefficients of one GPU in serving, as fractions of the TDP above idle. Fields traced."""

    busy_frac: Array  # b of all kinds of operators [-]
    memory_frac: Array  # m of products, and of what is not named below [-]
    kv_memory_frac: Array  # m of reading KV caches [-]
    expert_memory_frac: Array  # m of routed experts [-]
    flop_frac: Array  # f of all kinds but of reading KV caches [-]
    flop_power: Array  # p of all kinds [-]
    gap_frac: Array  # g [-]
    slow_frac: Array  # g where slow kernels take that time, and not the host [-]


def make_serving_watts(
    *,
    busy_frac: float,
    memory_frac: float,
    kv_memory_frac: float,
    expert_memory_frac: float,
    flop_frac: float,
    flop_power: float,
    gap_frac: float,
    slow_frac: float,
) -> ServingWatts:
    """A checked `ServingWatts`."""
    values = dict(locals())
    _check(values)
    return ServingWatts(**as_floats(**values))


def step_watts(law: ServingWatts, kinds: Sequence[str], *, slow_experts: bool = False) -> StepWatts:
    """The law of steps that are made of these kinds of operators, by name: see `KV_KIND`, `EXPERT_KIND`.

    FLOPs of decode attention cost nothing beside its bytes, with which they go.
    With `slow_experts` what a step takes beside its operators' own time draws `slow_frac`: so do 8-bit and 4-bit
    experts with blocks of scales in vLLM 0.11, whose kernels take twice what they are timed at today.
    """
    xp = namespace(law)
    memory = {KV_KIND: law.kv_memory_frac, EXPERT_KIND: law.expert_memory_frac}
    operators = OperatorWatts(
        busy_frac=xp.stack([law.busy_frac for _ in kinds]),
        memory_frac=xp.stack([memory.get(kind, law.memory_frac) for kind in kinds]),
        flop_frac=xp.stack([law.flop_frac * (kind != KV_KIND) for kind in kinds]),
        flop_power=xp.stack([law.flop_power for _ in kinds]),
    )
    return StepWatts(operators, law.slow_frac if slow_experts else law.gap_frac)


def _check(values: dict[str, float]) -> None:
    if not (all(0 <= value < math.inf for value in values.values()) and 0 < values["flop_power"] <= 1):
        raise ValueError(f"need fractions >= 0 and a flop_power above 0 and up to 1, all finite, got {values}")
