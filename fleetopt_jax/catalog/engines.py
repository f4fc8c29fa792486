"""Engines by (GPU, LLM, tensor parallelism, precision), each with how far to trust it.

`measured` engines: a configuration's own fit where it was measured and the fit describes it (`quality` measured), the
law fitted on that GPU (`law`), or the nearest generation's law carried over by data-sheet figures (`projected`).
`projected` engines: the paper's coefficients, and its roofline law for everything else.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Literal

import jax.numpy as jnp

from fleetopt_jax.catalog.gpus import GpuEntry, gpu_entry
from fleetopt_jax.catalog.llms import LlmEntry, at_precision, llm_entry
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.core.units import MS
from fleetopt_jax.fleet.engine import (
    Engine,
    Site,
    law_prefill,
    make_engine,
    measured_engine,
    require_fit,
    roofline_engine,
)
from fleetopt_jax.laws.compression import Compressor
from fleetopt_jax.laws.decode import DecodeStep, decode_step_s, make_decode_step
from fleetopt_jax.laws.kv_cache import make_kv_capacity
from fleetopt_jax.laws.llm import Llm
from fleetopt_jax.laws.measured import EngineLaw, b200_law, h100_law
from fleetopt_jax.laws.power import gpu_power_w, make_logistic_power
from fleetopt_jax.laws.roofline import ROOFLINE_CONTEXT_TOKENS
from fleetopt_jax.optimize.plan import EngineChoice

CALIBRATION_TOKENS = 8192
DEFAULT_LLM, DEFAULT_TP = "llama-3.1-70b", 8
MAX_TP = 64

Quality = Literal["measured", "law", "projected", "calibrated", "scaled", "roofline"]


@dataclass(frozen=True)
class EngineEntry:
    """One engine, with how far to trust it. Errors are mean absolute relative ones; None where nobody knows."""

    gpu: str
    llm: str
    tp: int
    precision: str
    kv_precision: str
    engine: Engine
    quality: Quality
    step_error: float | None
    power_error: float | None
    source: str
    prompt_per_output: float = 0.0  # prompt tokens prefilled for each output token in the benchmark it was fitted to


@dataclass(frozen=True)
class _LawOf:
    """The law a GPU goes by."""

    law: Callable[[], EngineLaw]
    quality: Quality
    step_error: float
    power_error: float
    source: str


_FIT = "fitted to ML.ENERGY Benchmark v3 (arXiv 2601.22076); error on architectures left out"
_H100 = _LawOf(h100_law, "law", 0.16, 0.13, f"H100 law {_FIT}")
_B200 = _LawOf(b200_law, "law", 0.22, 0.117, f"B200 law {_FIT}")
# Carried over: the error is the law's on the other GPU's measurements, architectures left out as well
# (experiments/law_vs_measurement.py).
_OVER = "carried over by data-sheet figures; error on the other measured GPU and architectures left out"
_FROM_H100 = replace(_H100, quality="projected", step_error=0.21, power_error=0.14, source=f"H100 law {_OVER}")
_FROM_B200 = replace(_B200, quality="projected", step_error=0.22, power_error=0.19, source=f"B200 law {_OVER}")
LAWS = {
    "h100": _H100,
    "b200": _B200,
    "a100": _FROM_H100,
    "h200": _FROM_H100,
    "l40s": _FROM_H100,
    "gb200": _FROM_B200,
}


def option(field: str) -> str:
    """A field as the command line names it."""
    return "--" + field.replace("_", "-")


def engine_entry(
    gpu: str,
    llm: str = DEFAULT_LLM,
    tp: int = DEFAULT_TP,
    *,
    precision: str | None = None,
    kv_precision: str = "bf16",
    engine: Literal["measured", "projected"] = "measured",
    own_fit: bool = True,
    where: Callable[[str], str] = option,
) -> EngineEntry:
    """The engine of these names, or of a file `fleetopt calibrate` wrote (`gpu` then names the file).

    `engine` is the choice of `Assumptions.engine`; `own_fit=False` takes the law even where a configuration has its own
    fit. `where` names the place of a field ("gpu", "llm", "tp", "precision") in what the user wrote.
    """
    if gpu.lower().endswith(".json"):
        return _of_file(gpu, kv_precision, where)
    if tp < 1 or tp > MAX_TP:
        raise BadInput(where("tp"), f"{tp}", f"need 1 to {MAX_TP} GPUs per instance")
    gpu_found, llm_found = gpu_entry(gpu, where("gpu")), llm_entry(llm, where("llm"))
    numbers = at_precision(llm_found.architecture, precision, kv_precision, where=where)
    llm_name, weights = llm if _is_file(llm) else llm.lower(), (precision or _native(llm_found)).lower()
    names = _Names(gpu.lower(), llm_name, tp, weights, kv_precision.lower())
    if engine == "projected" and names in PUBLISHED_FLEETS:
        return _published(names, gpu_found, numbers)
    require_fit(f"{where('llm')}: {llm} on {tp} x {gpu}", gpu_found.gpu, numbers, tp)
    if engine == "projected":
        return _roofline(names, gpu_found, numbers)
    law = _of_law(names, gpu_found, numbers)
    fit = own_fits().get((names.gpu, names.llm, names.tp, names.precision)) if own_fit else None
    return _of_fit(law, fit) if fit else law


def engine_choice(
    gpu: str,
    llm: str = DEFAULT_LLM,
    tp: int = DEFAULT_TP,
    *,
    precision: str | None = None,
    kv_precision: str = "bf16",
    engine: Literal["measured", "projected"] = "measured",
    site: Site | None = None,
    compressor: Compressor | None = None,
    max_num_seqs: int | None = None,
    where: Callable[[str], str] = option,
) -> EngineChoice:
    """`engine_entry` under its names, as the optimizers take it, where it stands and with a limit on its batch."""
    entry = engine_entry(gpu, llm, tp, precision=precision, kv_precision=kv_precision, engine=engine, where=where)
    made = entry.engine
    if site is not None:
        made = replace(made, site=site)
    if compressor is not None:
        made = replace(made, compressor=compressor)
    if max_num_seqs is not None:
        made = replace(made, kv=replace(made.kv, max_num_seqs=jnp.asarray(max_num_seqs, dtype=float)))
    return EngineChoice(
        gpu=entry.gpu,
        llm=entry.llm,
        tp=entry.tp,
        engine=made,
        quality=entry.quality,
        precision=entry.precision,
        kv_precision=entry.kv_precision,
        step_error=entry.step_error,
        power_error=entry.power_error,
        max_num_seqs=max_num_seqs,
        file=gpu if gpu.lower().endswith(".json") else None,
    )


@dataclass(frozen=True)
class EnginePoint:
    """One engine at one batch."""

    batch: float
    context_tokens: float
    step_s: float  # between two tokens of a sequence, with the prefill of others in it [s]
    decode_step_s: float  # without [s]
    tok_per_s: float  # of the instance [1/s]
    power_w_per_gpu: float  # [W]
    tok_per_j: float  # of the instance [1/J]


def engine_points(
    entry: EngineEntry, batches: list[float], context_tokens: float, prompt_per_output: float | None = None
) -> list[EnginePoint]:
    """Step, throughput, power and tokens per joule at each batch.

    With `prompt_per_output` prompt tokens prefilled for every output token: by default the benchmark's own mix, which a
    measured throughput contains.
    """
    engine = entry.engine
    mix = entry.prompt_per_output if prompt_per_output is None else prompt_per_output
    points = []
    for batch in batches:
        decode_s = float(decode_step_s(engine.decode, batch, context_tokens))
        step_s = decode_s + batch * mix * float(engine.prefill.per_token_s)
        power_w = float(gpu_power_w(engine.power, float(batch), context_tokens))
        tok_per_s = batch / step_s
        points.append(
            EnginePoint(
                batch=batch,
                context_tokens=context_tokens,
                step_s=step_s,
                decode_step_s=decode_s,
                tok_per_s=tok_per_s,
                power_w_per_gpu=power_w,
                tok_per_j=tok_per_s / (power_w * entry.tp),
            )
        )
    return points


@dataclass(frozen=True)
class OwnFit:
    """What was fitted to one measured configuration (experiments/fit_engines.py)."""

    decode: DecodeStep
    power: dict[str, float | str]  # "kind" logistic or activity, and its coefficients
    step_error: float
    power_error: float
    prompt_per_output: float
    source: str


@cache
def own_fits() -> dict[tuple[str, str, int, str], OwnFit]:
    """The fits of measured configurations, by (gpu, llm, tp, precision)."""
    document = json.loads((files("fleetopt_jax.catalog") / "data" / "engines.json").read_text())
    return {
        (fit["gpu"], fit["llm"], fit["tp"], fit["precision"]): OwnFit(
            decode=make_decode_step(**fit["decode"]),
            power=fit["power"],
            step_error=fit["step_error"],
            power_error=fit["power_error"],
            prompt_per_output=fit["prompt_per_output"],
            source=f"{document['source']}; {fit['n_points']} batches, {fit['batch_min']:.0f} to {fit['batch_max']:.0f}",
        )
        for fit in document["engines"]
    }


@dataclass(frozen=True)
class _Names:
    gpu: str
    llm: str
    tp: int
    precision: str
    kv_precision: str


def _is_file(llm: str) -> bool:
    return "/" in llm or llm.lower().endswith(".json")


def _native(found: LlmEntry) -> str:
    return found.architecture.native_precision


def _of_law(names: _Names, gpu: GpuEntry, llm: Llm) -> EngineEntry:
    law = LAWS[names.gpu]
    engine = measured_engine(
        law.law(),
        gpu.gpu,
        llm,
        names.tp,
        chunk_tokens=gpu.chunk_tokens,
        budget_tokens=gpu.batched_tokens,
        max_num_seqs=gpu.max_num_seqs,
    )
    return EngineEntry(
        **vars(names),
        engine=engine,
        quality=law.quality,
        step_error=law.step_error,
        power_error=law.power_error,
        source=law.source,
    )


def _of_fit(law: EngineEntry, fit: OwnFit) -> EngineEntry:
    coefficients = dict(fit.power)
    if coefficients.pop("kind") == "logistic":
        power = make_logistic_power(**coefficients)
    else:  # shares of the peaks as in the benchmark, whose steps hold its own prefill
        prefill_s = fit.prompt_per_output * law.engine.prefill.per_token_s
        step = replace(fit.decode, per_seq_s=fit.decode.per_seq_s + prefill_s)
        power = replace(law.engine.power, step=step, **as_floats(**coefficients))
    return replace(
        law,
        engine=replace(law.engine, decode=fit.decode, power=power),
        quality="measured",
        step_error=fit.step_error,
        power_error=fit.power_error,
        source=fit.source,
        prompt_per_output=fit.prompt_per_output,
    )


def _of_file(path: str, kv_precision: str, where: Callable[[str], str]) -> EngineEntry:
    """A calibrated engine: its own step and power on the memory, prefill and price of the GPU and LLM it names."""
    from fleetopt_jax.calibrate.document import read_document  # which names do without

    document = read_document(path)
    law = engine_entry(
        document.gpu,
        document.llm,
        document.tp,
        precision=document.precision,
        kv_precision=kv_precision,
        own_fit=False,
        where=lambda field: f"{path}, {field}",
    )
    return replace(
        law,
        engine=replace(law.engine, decode=document.decode, power=document.power or law.engine.power),
        quality="measured",
        step_error=document.step_error,
        power_error=document.power_error if document.power else law.power_error,
        source=f"{path}: {document.source}",
    )


# The paper's own engines: Llama-3.1-70B in 16 bits on eight GPUs.
# (W [s], H at 8,192 tokens [s], 16-token blocks, slots at 8,192 tokens, idle and nominal W, x0), quality, source.
_B200_W_S, _B200_H_S = 2.95491 * MS, 0.134 * MS
_PAPER = {
    "a100": (
        (8.0 * MS, 0.65 * MS, 65_536, 128, 175, 385, 2.5),
        "calibrated",
        "arXiv 2603.17280v1; power from one measured anchor",
    ),
    "h100": (
        (4.0 * MS, 0.32 * MS, 65_536, 256, 300, 600, 4.2),
        "calibrated",
        "arXiv 2603.17280v1; power fitted to ML.ENERGY, step calibrated by hand",
    ),
    "b200": (
        (_B200_W_S, _B200_H_S, 171_936, 671, 430, 860, math.log2(_B200_W_S / _B200_H_S)),
        "scaled",
        "arXiv 2603.17280v1; scaled from H100 by bandwidth, memory and TDP (+-20 %)",
    ),
}
PUBLISHED_FLEETS = {_Names(gpu, DEFAULT_LLM, DEFAULT_TP, "bf16", "bf16"): paper for gpu, paper in _PAPER.items()}


def _published(names: _Names, gpu: GpuEntry, llm: Llm) -> EngineEntry:
    (base_s, per_seq_s, blocks, slots, idle_w, nominal_w, x0), quality, source = PUBLISHED_FLEETS[names]
    engine = make_engine(
        make_decode_step(base_s=base_s, per_token_s=per_seq_s / CALIBRATION_TOKENS),
        make_kv_capacity(n_blocks=blocks, slot_tokens=slots * CALIBRATION_TOKENS, max_num_seqs=gpu.max_num_seqs),
        make_logistic_power(idle_w=idle_w, nominal_w=nominal_w, log2_half_batch=x0),
        law_prefill(
            LAWS[names.gpu].law(),
            gpu.gpu,
            llm,
            names.tp,
            chunk_tokens=gpu.chunk_tokens,
            calibration_tokens=CALIBRATION_TOKENS,
            budget_tokens=gpu.batched_tokens,
        ),
        gpus_per_instance=names.tp,
        usd_per_gpu_h=float(gpu.gpu.usd_per_h),
        idle_w=float(gpu.gpu.idle_w),
    )
    return EngineEntry(**vars(names), engine=engine, quality=quality, step_error=None, power_error=None, source=source)


def _roofline(names: _Names, gpu: GpuEntry, llm: Llm) -> EngineEntry:
    prefill = law_prefill(
        LAWS[names.gpu].law(),
        gpu.gpu,
        llm,
        names.tp,
        chunk_tokens=gpu.chunk_tokens,
        calibration_tokens=ROOFLINE_CONTEXT_TOKENS,
        budget_tokens=gpu.batched_tokens,
    )
    return EngineEntry(
        **vars(names),
        engine=roofline_engine(gpu.gpu, llm, names.tp, prefill),
        quality="roofline",
        step_error=0.5,
        power_error=None,
        source="roofline law of arXiv 2603.17280v1 on data-sheet figures",
    )
