"""An engine: what one instance (an LLM on TP GPUs) can do, as coefficients of the laws."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.core.units import GIB
from fleetopt_jax.laws.clocks import PREFILL_CORE_SHARE, clock_at_power_w
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.hand_over import HandOver
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
from fleetopt_jax.laws.operator_step import OperatorPower, StepDecode
from fleetopt_jax.laws.power import PowerLaw, roofline_power
from fleetopt_jax.laws.prefill import Prefill, prefill_coefficients_s
from fleetopt_jax.laws.prefix_cache import HostCache
from fleetopt_jax.laws.roofline import ROOFLINE_CONTEXT_TOKENS, roofline_decode_step
from fleetopt_jax.laws.speculation import Speculation
from fleetopt_jax.laws.step_law import StepInputs, StepLaw

Role = Literal["mixed", "prefill", "decode"]  # of a stage: "mixed" prefills and decodes


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
    speculation: Speculation | None = None  # what its iterations draft and gain; None: a token of each sequence
    host_cache: HostCache | None = None  # behind its prefix cache; None: what leaves the GPUs is lost

    @property
    def tokens_per_step(self) -> ArrayLike:
        """Tokens that a decoding sequence gains in an iteration, in the mean [-]."""
        return 1.0 if self.speculation is None else self.speculation.tokens_per_step

    @property
    def parts(self) -> tuple[tuple[Role, "Engine"], ...]:
        """The stages of a lane that it serves: all in one."""
        return (("mixed", self),)

    def with_parts(self, engines: "Sequence[Engine]") -> "Engine":
        """Another engine in its place."""
        (engine,) = engines
        return engine

    @property
    def hand_over(self) -> HandOver | None:
        """Nothing leaves an instance."""
        return None


@pytree
class EnginePair:
    """Engines of a lane of two stages: one prefills, hands the KV cache over, the other decodes."""

    prefill: Engine
    decode: Engine
    hand_over: HandOver

    @property
    def parts(self) -> tuple[tuple[Role, Engine], ...]:
        """The stages of a lane that they serve."""
        return (("prefill", self.prefill), ("decode", self.decode))

    def with_parts(self, engines: Sequence[Engine]) -> "EnginePair":
        """Other engines in their places."""
        prefill, decode = engines
        return EnginePair(prefill, decode, self.hand_over)


Server = Engine | EnginePair  # of a lane


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
            n_blocks=blocks,
            slot_tokens=zero + math.inf,
            fixed_tokens=zero,
            max_num_seqs=zero + DEFAULT_MAX_NUM_SEQS,
            n_caches=zero + 1.0,
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
        decode=cast(Any, engine.decode).of_step(step),
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


def at_power_limit(engine: Engine, limit_w: ArrayLike) -> Engine:
    """`engine` of operators on boards limited to `limit_w` [W], as `nvidia-smi -pl` does; traced, so that it can be
    optimised. Cores slow down in every iteration that would draw more, until it meets the limit, and in no other.

    Projected as `at_clock` is (`laws/operator_step.py`). Raises ValueError for engines of other laws, and with drafts.

    >>> h100 = fo.build(fo.EngineSpec("h100", precision="fp8"))
    >>> capped = fo.at_power_limit(h100, 400.0)
    >>> bool(capped.prefill.gpu_w <= 400.0) and bool(capped.prefill.per_token_s > h100.prefill.per_token_s)
    True
    """
    if engine.step is None or engine.speculation is not None:
        why = "drafts ahead" if engine.speculation is not None else "is not made of operators"
        raise ValueError(f"need an engine of operators that drafts nothing, got one that {why}")
    law = engine.step.at_power_limit(limit_w)
    clock = clock_at_power_w(engine.prefill.gpu_w, engine.idle_w, PREFILL_CORE_SHARE, limit_w)
    return with_laws(
        engine,
        decode=StepDecode(law),
        power=OperatorPower(law),
        prefill=engine.prefill.at_clock(engine.idle_w, clock),
        step=law,
    )


def speculating(engine: Engine, speculation: Speculation) -> Engine:
    """`engine`, which drafts nothing yet, with drafts ahead (`laws/speculation.py`); the number of drafts and all else
    of them is traced, so that it can be optimised.

    Each sequence holds a token more of cache for each draft. Memory of a draft head's own is the caller's to count.

    >>> h100, head = fo.build(fo.EngineSpec("h100")), fo.make_speculation([0.8, 0.6, 0.4], 3, layers_frac=1 / 80)
    >>> drafts = fo.speculating(h100, head)
    >>> bool(drafts.decode.step_s(8.0, 2000.0) / drafts.tokens_per_step < h100.decode.step_s(8.0, 2000.0))
    True
    """
    if engine.step is None or engine.speculation is not None:
        why = "drafts already" if engine.speculation is not None else "is not made of operators"
        raise ValueError(f"need an engine of operators that drafts nothing, got one that {why}")
    step, decode = engine.step.speculating(speculation, engine.prefill)
    return replace(
        engine,
        decode=decode,
        power=replace(cast(Any, engine.power), law=step),
        prefill=engine.prefill.slower(1.0 + speculation.some * speculation.layers_frac),
        kv=replace(engine.kv, fixed_tokens=engine.kv.fixed_tokens + speculation.n_drafts),
        step=step,
        speculation=speculation,
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
