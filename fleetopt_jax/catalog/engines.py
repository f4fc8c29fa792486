"""Engines by (GPU, LLM, tensor parallelism): the paper's calibrated ones, and its roofline law for all others."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.catalog.llms import llm_entry
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import MS
from fleetopt_jax.fleet.engine import Engine, make_engine, require_fit, roofline_engine
from fleetopt_jax.laws.kv_cache import make_kv_capacity
from fleetopt_jax.laws.power import make_logistic_power
from fleetopt_jax.laws.roofline import make_decode_step
from fleetopt_jax.optimize.plan import EngineChoice

CALIBRATION_TOKENS = 8192
DEFAULT_LLM, DEFAULT_TP = "llama-3.1-70b", 8


Quality = Literal["calibrated", "scaled", "roofline"]  # by hand on H100 and A100; from H100; from data sheets


@dataclass(frozen=True)
class EngineEntry:
    """One engine of the catalog, with how far to trust it."""

    engine: Engine
    quality: Quality
    source: str


def _calibrated(
    gpu: str,
    *,
    base_s: float,
    per_seq_s: float,
    blocks: float,
    slots: float,
    idle_w: float,
    nominal_w: float,
    x0: float,
    quality: Quality,
    source: str,
) -> EngineEntry:
    """An engine of the paper's fleets: Llama-3.1-70B in fp16 on eight GPUs."""
    entry = gpu_entry(gpu)
    engine = make_engine(
        make_decode_step(base_s=base_s, per_seq_s=per_seq_s, calibration_tokens=CALIBRATION_TOKENS),
        make_kv_capacity(n_blocks=blocks, slot_tokens=slots * CALIBRATION_TOKENS),
        make_logistic_power(idle_w=idle_w, nominal_w=nominal_w, log2_half_batch=x0),
        chunk_tokens=entry.chunk_tokens,
        gpus_per_instance=DEFAULT_TP,
        usd_per_gpu_h=float(entry.gpu.usd_per_h),
    )
    return EngineEntry(engine, quality, source)


def _build() -> dict[tuple[str, str, int], EngineEntry]:
    b200_base_s, b200_per_seq_s = 2.95491 * MS, 0.134 * MS
    engines = {
        "a100": _calibrated(
            "a100",
            base_s=8.0 * MS,
            per_seq_s=0.65 * MS,
            blocks=65_536,
            slots=128,
            idle_w=175,
            nominal_w=385,
            x0=2.5,
            quality="calibrated",
            source="arXiv 2603.17280v1; power from one measured anchor",
        ),
        "h100": _calibrated(
            "h100",
            base_s=4.0 * MS,
            per_seq_s=0.32 * MS,
            blocks=65_536,
            slots=256,
            idle_w=300,
            nominal_w=600,
            x0=4.2,
            quality="calibrated",
            source="arXiv 2603.17280v1; power fitted to ML.ENERGY, step calibrated by hand",
        ),
        "b200": _calibrated(
            "b200",
            base_s=b200_base_s,
            per_seq_s=b200_per_seq_s,
            blocks=171_936,
            slots=671,
            idle_w=430,
            nominal_w=860,
            x0=math.log2(b200_base_s / b200_per_seq_s),
            quality="scaled",
            source="arXiv 2603.17280v1; scaled from H100 by bandwidth, memory and TDP (+-20 %)",
        ),
    }
    return {(gpu, DEFAULT_LLM, DEFAULT_TP): entry for gpu, entry in engines.items()}


CALIBRATED = _build()


def engine_entry(
    gpu: str, llm: str = DEFAULT_LLM, tp: int = DEFAULT_TP, *, where: Callable[[str], str] = "--".__add__
) -> EngineEntry:
    """The calibrated engine where the paper has one, else the roofline engine of the catalog's data-sheet entries.

    `where` names the place of a field ("gpu", "llm", "tp") in what the user wrote.
    """
    if tp < 1 or tp > 64:
        raise BadInput(where("tp"), f"{tp}", "need 1 to 64 GPUs per instance")
    gpu_found, llm_found = gpu_entry(gpu, where("gpu")), llm_entry(llm, where("llm"))
    key = (gpu.lower(), llm.lower(), tp)
    if key in CALIBRATED:
        return CALIBRATED[key]
    require_fit(f"{where('llm')}: {llm} on {tp} x {gpu}", gpu_found.gpu, llm_found.llm, tp)
    engine = roofline_engine(gpu_found.gpu, llm_found.llm, tp, chunk_tokens=gpu_found.chunk_tokens)
    return EngineEntry(engine, "roofline", "roofline law of arXiv 2603.17280v1 on data-sheet figures")


def engine_choice(
    gpu: str, llm: str = DEFAULT_LLM, tp: int = DEFAULT_TP, *, where: Callable[[str], str] = "--".__add__
) -> EngineChoice:
    """`engine_entry` under its names, as the optimizers take it."""
    entry = engine_entry(gpu, llm, tp, where=where)
    return EngineChoice(gpu.lower(), llm.lower(), tp, entry.engine, entry.quality)
