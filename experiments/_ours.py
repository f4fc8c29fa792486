"""What our engines say of serving points and of steady states, blind: by a host law and by watts that were fitted to
other LLMs, or to other GPUs.

The operators of a step are timed kernels of the GPU, unseen or not: there is nobody's serving in those.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from _mlenergy import CATALOG, Row
from _scored_points import Point
from _serving_points import Point as ServedPoint
from _serving_points import Served, read_points
from fit_hosts import (
    GRAPH_ROWS,
    Fit,
    Measured,
    fit,
    iteration,
    measured_iterations,
    measured_point,
    served_iteration,
    step_of,
)
from fit_hosts import errors as errors_of
from operators.serving_watts import FLOP_POWER, MEASURED, NAMES, Table, read_table

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.catalog.llms import llm_entry
from fleetopt_jax.catalog.steps import Parallelism
from fleetopt_jax.laws.host import make_host_law
from fleetopt_jax.laws.mixed_step import CLASSES
from fleetopt_jax.laws.operator_step import operator_step
from fleetopt_jax.laws.operators.watts import ServingWatts, make_serving_watts, step_watts

Without = Literal["llm", "gpu"]


def predict_points(folder: Path, points: Sequence[Point], without: Without) -> tuple[np.ndarray, list[str]]:
    """(TTFT [s], TPOT [s]) of each point [points, 2], nan where there is none, and why there is none: by engines that
    have seen no point of its LLM (`without` "llm"), or of its GPU. All others that `fit_hosts.py` fits to are fitted
    to, scored or not; a point that it does not fit to is predicted alike."""
    read, fitted = {each.row: each for each in read_points(folder)[0]}, _fitted(folder)
    steps = {point.row: fitted.get(point.row, "not fitted to") for point in points}
    for point in points:
        if isinstance(steps[point.row], str):
            steps[point.row] = measured_point(read.get(point.row) or _served(point), queues=True)
    values = {}
    for engine in dict.fromkeys(point.serving for point in points):
        others = [each for each in fitted.values() if not isinstance(each, str) and each.engine == engine]
        mine = {row: each for row, each in steps.items() if not isinstance(each, str) and each.engine == engine}
        for name in sorted({getattr(each, without) for each in mine.values()}):
            law = fit([each for each in others if getattr(each, without) != name])
            held = {row: each for row, each in mine.items() if getattr(each, without) == name}
            off = errors_of(list(held.values()), law, known=without != "gpu")
            for (row, each), (tpot, ttft) in zip(held.items(), off):
                values[row] = (1.0 + ttft) * each.ttft_s, (1.0 + tpot) * each.tpot_s
    whys = [each if isinstance(each, str) else "" for each in (steps[point.row] for point in points)]
    return np.array([values.get(point.row, (np.nan, np.nan)) for point in points]).reshape(-1, 2), whys


@cache
def _fitted(folder: Path) -> dict[int, Measured | str]:
    """By row of the file: every step of its benchmark, or why there is no law of it."""
    return {each.row: measured_point(each) for each in read_points(folder)[0]}


def _served(point: Point) -> ServedPoint:
    """A point that nothing is fitted to, as the fit would have it."""
    spec, llm = point.spec, llm_entry(point.spec.llm)
    a = llm.architecture
    split = Parallelism(point.tp, point.moe_ep if a.n_experts else 1, point.attention_dp, point.pp)
    precision, kv = spec.precision or a.native_precision, spec.kv_precision or a.native_kv_precision
    gpu = gpu_entry(point.gpu)
    served = Served(point.serving, point.version, spec.llm_name, a, gpu, precision, kv, split)
    nominal = point.nominal_prompt_tokens, point.nominal_output_tokens
    return ServedPoint(point.row, served, *nominal, point.concurrency, point.ttft_s, point.tpot_s)


def predict_steady(mlenergy: Path, kernels: Path, rows: Sequence[Row], without: Without) -> np.ndarray:
    """(output tokens per second, watts of a GPU) of each steady state of ML.ENERGY that is not bound by its host
    [rows, 2], nan where there is none, likewise blind."""
    of = {"llm": lambda row: CATALOG[row.architecture], "gpu": lambda row: row.gpu}[without]
    everything, table = measured_iterations(mlenergy), read_table(kernels)
    known = [i for i, row in enumerate(rows) if row.architecture in CATALOG]
    values = np.full((len(rows), 2), np.nan)
    for name in sorted({of(rows[i]) for i in known}):
        host = fit([each for each in everything if getattr(each, without) != name])
        watts = table.fit(np.array([_differs(row, without, name) for row in table.rows]))
        for i in (i for i in known if of(rows[i]) == name):
            gpu = rows[i].gpu
            seen = {"llm": gpu, "gpu": next(other for other in MEASURED if other != gpu)}[without]
            values[i] = _steady(rows[i], host, None if without == "gpu" else gpu, _watts(table, watts, seen))
    return values


def _differs(row: Row, without: Without, name: str) -> bool:
    return (row.gpu if without == "gpu" else CATALOG.get(row.architecture)) != name


def _watts(table: Table, x: np.ndarray, gpu: str) -> ServingWatts:
    values = table.coefficients(x, gpu == MEASURED[1])
    return make_serving_watts(**dict(zip(NAMES, np.maximum(values, 0.0))), flop_power=FLOP_POWER)


def _steady(row: Row, host: Fit, host_gpu: str | None, watts: ServingWatts) -> tuple[float, float]:
    """(tokens per second, watts of a GPU) of the mean of steps with and without a new prompt."""
    served = served_iteration(row)
    a = served.architecture
    law = host.law(a.n_experts > 0, host_gpu)
    law["prompt_slowdown"] = law["slowdown"] * (1.0 + law.pop("prompt_excess"))
    step = replace(step_of(served), host=make_host_law(**law, graph_rows=GRAPH_ROWS.get(served.engine, 0.0)))
    slow = a.n_experts > 0 and row.precision != "bf16"
    whole = operator_step(step, step_watts(watts, CLASSES, slow_experts=slow), served.gpu.gpu)
    batch, shares = iteration(row)
    step_s, gpu_j = (shares @ np.asarray(each) for each in _seconds_and_joules(whole, batch))
    return row.batch / float(step_s), float(gpu_j / step_s)


_seconds_and_joules = jax.jit(jax.vmap(lambda step, batch: (step.step_s(batch), step.gpu_j(batch)), (None, 0)))
