"""What a law, a configuration's own fit and the published roofline say of a measured row, and how rows compare.

A measured throughput contains the prefill of the benchmark's own prompts. The law is pure decode, so prefill is added
at the row's own prompt tokens per output token; an own fit brings its benchmark's mean mix; in the published roofline
prefill rides along for free.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from _mlenergy import CATALOG, Row, benchmark_llm

from fleetopt_jax.catalog.engines import EngineEntry, EnginePoint, engine_entry, engine_points, law_of, own_fits
from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.fleet.engine import measured_engine, roofline_engine

OTHER = {"h100": "b200", "b200": "h100"}


def law_point(folder: Path, row: Row, measured_on: str | None = None) -> EnginePoint:
    """The law of the row's GPU, or of `measured_on` carried over by data-sheet peaks and fractions of the TDP."""
    entry = _law_entry(folder, row.gpu, row.architecture, row.tp, row.precision, measured_on or row.gpu)
    return engine_points(entry, [row.batch], row.context_tokens, row.prompt_per_output)[0]


def decode_point(folder: Path, row: Row) -> EnginePoint:
    """The law of the row's GPU as if the benchmark had no prompts."""
    entry = _law_entry(folder, row.gpu, row.architecture, row.tp, row.precision, row.gpu)
    return engine_points(entry, [row.batch], row.context_tokens, 0.0)[0]


def own_fit_point(row: Row) -> EnginePoint | None:
    """The configuration's own fit, None where the catalog has none."""
    key = (row.gpu, CATALOG.get(row.architecture, ""), row.tp, row.precision)
    if key not in own_fits():
        return None
    return engine_points(_own_fit_entry(*key), [row.batch], row.context_tokens)[0]


def roofline_point(folder: Path, row: Row) -> EnginePoint:
    """The published roofline engine, t = W + H (L / L_cal) n with data-sheet coefficients."""
    entry = _roofline_entry(folder, row.gpu, row.architecture, row.tp, row.precision)
    return engine_points(entry, [row.batch], row.context_tokens, 0.0)[0]


@cache
def _law_entry(folder: Path, gpu: str, architecture: str, tp: int, precision: str, measured_on: str) -> EngineEntry:
    found, law = gpu_entry(gpu), law_of(gpu_entry(measured_on))
    engine = measured_engine(
        law.law(), found.gpu, benchmark_llm(folder, architecture, precision), tp, chunk_tokens=found.chunk_tokens
    )
    spec = EngineSpec(gpu, architecture, tp, precision)
    return EngineEntry(spec, engine, law.quality, law.step_error, law.power_error, law.source)


@cache
def _own_fit_entry(gpu: str, llm: str, tp: int, precision: str) -> EngineEntry:
    return engine_entry(EngineSpec(gpu, llm, tp, precision, serving=MEASURED_SERVING))


@cache
def _roofline_entry(folder: Path, gpu: str, architecture: str, tp: int, precision: str) -> EngineEntry:
    law = _law_entry(folder, gpu, architecture, tp, precision, gpu)
    llm = benchmark_llm(folder, architecture, precision)
    engine = roofline_engine(gpu_entry(gpu).gpu, llm, tp, law.engine.prefill)
    return EngineEntry(law.spec, engine, "roofline", None, None, "arXiv 2603.17280v1")


Value = Callable[[Row], float]


def at_batch(rows: Sequence[Row], value: Value, batch: float) -> float:
    """A positive value between the measured batches, by a straight line in logarithms; rows in order of the batch."""
    return math.exp(
        float(np.interp(math.log(batch), [math.log(row.batch) for row in rows], [math.log(value(row)) for row in rows]))
    )


def shared_batches(rows: Sequence[Row], others: Sequence[Row]) -> list[float]:
    """The batches of `rows` that lie in the range of `others` too (1 % over: mean batches of one limit differ)."""
    low, high = others[0].batch / 1.01, others[-1].batch * 1.01
    return [row.batch for row in rows if low <= row.batch <= high]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
