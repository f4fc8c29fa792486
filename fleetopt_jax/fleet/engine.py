"""An engine: what one instance (an LLM on TP GPUs) can do, as coefficients of the laws."""

import math
from dataclasses import replace
from typing import Any, cast

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.core.units import GIB
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.kv_cache import (
    BLOCK_TOKENS,
    DEFAULT_MAX_NUM_SEQS,
    MEMORY_UTILIZATION,
    WORKSPACE_BYTES,
    KvCapacity,
    kv_capacity_tokens,
    physical_kv,
    roofline_kv_blocks,
)
from fleetopt_jax.laws.llm import Llm, weight_bytes_of_gpu
from fleetopt_jax.laws.measured import EngineLaw, measured_decode_step, measured_power, prefill_gpu_w
from fleetopt_jax.laws.power import PowerLaw, roofline_power
from fleetopt_jax.laws.prefill import Prefill, prefill_coefficients_s
from fleetopt_jax.laws.roofline import ROOFLINE_CONTEXT_TOKENS, roofline_decode_step
from fleetopt_jax.laws.step_law import StepInputs, StepLaw


class DoesNotFit(BadField):
    """A model whose weights leave no room on its GPUs."""


@pytree
class Engine:
    """What one instance can do. Every number is traced; the types of `decode` and `power` choose their laws, which may
    be records of your own. Leaves shape () or with a leading vmap axis."""

    decode: DecodeLaw
    kv: KvCapacity
    power: PowerLaw
    prefill: Prefill
    idle_w: Array  # board power of one GPU of an instance without a request [W]
    gpus_per_instance: Array  # however they share the LLM [-]
    usd_per_gpu_h: Array  # price [USD/h]
    step: StepLaw | None = None  # of a mixed batch; None: decode and prefill, one after the other


def make_engine(
    decode: DecodeLaw,
    kv: KvCapacity,
    power: PowerLaw,
    prefill: Prefill,
    *,
    gpus_per_instance: float,
    usd_per_gpu_h: float,
    idle_w: float = 0.0,
) -> Engine:
    """A checked `Engine`."""
    if not (1 <= gpus_per_instance < math.inf and 0 <= usd_per_gpu_h < math.inf and 0 <= idle_w < math.inf):
        raise ValueError(
            f"need gpus_per_instance >= 1 and usd_per_gpu_h, idle_w >= 0, "
            f"got {gpus_per_instance=}, {usd_per_gpu_h=}, {idle_w=}"
        )
    return Engine(
        decode=decode,
        kv=kv,
        power=power,
        prefill=prefill,
        **as_floats(idle_w=idle_w, gpus_per_instance=gpus_per_instance, usd_per_gpu_h=usd_per_gpu_h),
    )


def law_prefill(
    law: EngineLaw,
    gpu: Gpu,
    llm: Llm,
    tp: float,
    *,
    chunk_tokens: float,
    calibration_tokens: float,
    budget_tokens: float,
) -> Prefill:
    """Prefill of any GPU, LLM and tensor parallelism: published chunks and physical FLOPs side by side."""
    step = measured_decode_step(law, gpu, llm, tp)
    per_token_s, per_token2_s = prefill_coefficients_s(gpu, llm, tp)
    return Prefill(
        per_token_s=per_token_s,
        per_token2_s=per_token2_s,
        gpu_w=prefill_gpu_w(measured_power(law, gpu, llm, tp, step), llm),
        **as_floats(
            chunk_tokens=chunk_tokens,
            calibration_tokens=calibration_tokens,
            budget_tokens=budget_tokens,
            first_token_s=0.0,
        ),
    )


def measured_engine(
    law: EngineLaw,
    gpu: Gpu,
    llm: Llm,
    tp: float,
    *,
    chunk_tokens: float,
    budget_tokens: float = 8192.0,
    kv: KvCapacity | None = None,
) -> Engine:
    """The engine the measured law gives for any GPU, LLM and tensor parallelism. Pure: no check that the model fits.

    `kv` is what an instance can hold; without it that of `physical_kv` at vLLM's defaults.
    """
    decode = measured_decode_step(law, gpu, llm, tp)
    return Engine(
        decode=decode,
        kv=physical_kv(gpu, llm, tp, DEFAULT_MAX_NUM_SEQS) if kv is None else kv,
        power=measured_power(law, gpu, llm, tp, decode),
        prefill=law_prefill(
            law,
            gpu,
            llm,
            tp,
            chunk_tokens=chunk_tokens,
            calibration_tokens=ROOFLINE_CONTEXT_TOKENS,
            budget_tokens=budget_tokens,
        ),
        idle_w=gpu.idle_w,
        usd_per_gpu_h=gpu.usd_per_h,
        **as_floats(gpus_per_instance=tp),
    )


def roofline_engine(
    gpu: Gpu, llm: Llm, tp: float, prefill: Prefill, utilization: ArrayLike = MEMORY_UTILIZATION
) -> Engine:
    """The published roofline engine of any GPU, LLM and tensor parallelism. Pure: no check that the model fits."""
    decode = roofline_decode_step(gpu, llm, tp)
    blocks = roofline_kv_blocks(gpu, llm, tp, utilization)
    zero = blocks * 0.0
    return Engine(
        decode=decode,
        kv=KvCapacity(
            n_blocks=blocks, slot_tokens=zero + math.inf, fixed_tokens=zero, max_num_seqs=zero + DEFAULT_MAX_NUM_SEQS
        ),
        power=roofline_power(gpu, llm, tp, decode),
        prefill=prefill,
        idle_w=gpu.idle_w,
        usd_per_gpu_h=gpu.usd_per_h,
        **as_floats(gpus_per_instance=tp),
    )


def with_laws(engine: Engine, **laws: Any) -> Engine:
    """The engine with other laws, by their fields. A mixed step was of the ones before: with another decode step, power
    or prefill, and no other mixed step, it is no more."""
    of_step = {"decode", "power", "prefill"} & laws.keys()
    return replace(engine, **{"step": None if of_step else engine.step, **laws})


@pytree
class EngineInputs:
    """The single numbers of an engine whose step is tabulated, each once. Leaves shape ()."""

    kv: KvCapacity
    step: StepInputs
    budget_tokens: Array  # tokens of one iteration
    idle_w: Array
    gpus_per_instance: Array
    usd_per_gpu_h: Array


def inputs_of(engine: Engine) -> Engine | EngineInputs:
    """The numbers that an engine depends on: all of it, or, of a tabulated one, those that are not tables."""
    if engine.step is None:
        return engine
    numbers = {name: getattr(engine, name) for name in ("kv", "idle_w", "gpus_per_instance", "usd_per_gpu_h")}
    return EngineInputs(step=engine.step.inputs, budget_tokens=engine.prefill.budget_tokens, **numbers)


def with_inputs(engine: Engine, inputs: Any) -> Engine:
    """The engine with other numbers, of the form of `inputs_of`."""
    if engine.step is None:
        return inputs
    step = engine.step.with_inputs(inputs.step)
    host = inputs.step.host
    return replace(
        engine,
        decode=replace(cast(Any, engine.decode), host=host),
        power=replace(cast(Any, engine.power), law=step),
        prefill=replace(engine.prefill, budget_tokens=inputs.budget_tokens, first_token_s=host.first_token_s),
        step=step,
        kv=inputs.kv,
        idle_w=inputs.idle_w,
        gpus_per_instance=inputs.gpus_per_instance,
        usd_per_gpu_h=inputs.usd_per_gpu_h,
    )


def at_clock(engine: Engine, clock_frac: ArrayLike) -> Engine:
    """`engine` with its GPUs' cores at `clock_frac` of their top clock, 0.4 to 1; traced, so that it can be optimised.

    Projected, +-20 % of the watts above idle at 0.7: see `laws/clocks.py`. Not for the published roofline's power.

    >>> h100 = fo.build(fo.EngineSpec("h100"))
    >>> bool(fo.at_clock(h100, 0.7).prefill.gpu_w < h100.prefill.gpu_w)
    True
    """
    return with_laws(
        engine,
        decode=engine.decode.at_clock(engine.prefill, clock_frac),
        power=engine.power.at_clock(engine.prefill, engine.idle_w, clock_frac),
        prefill=engine.prefill.at_clock(engine.idle_w, clock_frac),
        step=engine.step and engine.step.at_clock(clock_frac),
    )


def require_fit(
    of: str,
    gpu: Gpu,
    llm: Llm,
    tp: int,
    utilization: float = MEMORY_UTILIZATION,
    workspace: float = WORKSPACE_BYTES,
    dp: int = 1,
    pp: int = 1,
) -> None:
    """Refuse a model whose weights leave no room for a single KV block; `of` says in words which on which."""
    if float(kv_capacity_tokens(gpu, llm, tp, utilization, workspace, dp, pp)) < BLOCK_TOKENS:
        weights = float(weight_bytes_of_gpu(llm, tp, dp, pp))
        needs = (weights + workspace + float(gpu.nccl_bytes) * (tp * dp * pp > 1)) / GIB
        has = utilization * float(gpu.memory_bytes) / GIB
        divided = ", ".join(f"{name} {n}" for name, n in (("TP", tp), ("DP", dp), ("PP", pp)) if n > 1 or name == "TP")
        raise DoesNotFit(
            "llm",
            f"does not fit: needs {needs:.1f} GiB per GPU at {divided} for weights and workspace, before any KV cache, "
            f"has {has:.1f} GiB ({utilization:.0%} of the memory)",
            "use more GPUs per instance, a larger GPU, fewer bytes per weight or a higher memory utilization",
            of=of,
        )
