"""`fleetopt calibrate`: an engine from measurements."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from fleetopt_jax.calibrate.benchmarks import fit_benchmarks, is_benchmark
from fleetopt_jax.calibrate.factors import FactorsFit, fit_factors, is_measured
from fleetopt_jax.calibrate.fit import DecodeFit, PowerFit, fit_decode, fit_power
from fleetopt_jax.calibrate.measurements import SPLIT, Measurements, read_measurements
from fleetopt_jax.calibrate.names import gpu_name, llm_name, precision_name, precision_of_checkpoint
from fleetopt_jax.calibrate.points import Point, points_of
from fleetopt_jax.catalog.engines import SERVING, engine_entry
from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.catalog.hosts import NEWEST
from fleetopt_jax.catalog.llms import llm_entry
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.inputs import at_door, catalog_of
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.engine import engine_to_json
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.decode import DecodeStep
from fleetopt_jax.report.calibration import calibration_figure, calibration_table

T = TypeVar("T")


def run(options: argparse.Namespace) -> Answer:
    path = options.measurements
    measured = read_measurements(
        path,
        model=options.model,
        gpu=options.gpu,
        tp=options.tp,
        task=options.task,
        llm=options.llm,
        precision=options.precision,
        **{name: getattr(options, name) for name in SPLIT},
    )
    points = _points(options, measured)
    spec = _measured_spec(options, measured, points)
    step, power = _fits(options, measured, points, spec)
    document = engine_to_json(
        step,
        power,
        gpu=spec.gpu_name,
        llm=spec.llm_name,
        tp=spec.tp,
        precision=engine_entry(spec).spec.precision,
        serving=spec.serving,
        source=os.path.basename(path),
        **{name: getattr(spec, name) for name in SPLIT},
    )
    return Answer(document, calibration_table, OK, lambda _: calibration_figure(measured, step, power))


def _points(options: argparse.Namespace, measured: Measurements) -> list[Point]:
    """The rows as points of a load, with the lengths of the options where they say some."""
    lengths: dict[str, Any] = {name: value for name in ("isl", "osl") if (value := getattr(options, name))}
    lengths |= {"nominal": True} if lengths else {}  # what a benchmark asks for, as predict takes them
    return [replace(point, **lengths) for point in points_of(measured.rows)]


def _fits(
    options: argparse.Namespace, measured: Measurements, points: Sequence[Point], spec: EngineSpec
) -> tuple[DecodeFit | FactorsFit, PowerFit | None]:
    """Factors on the catalog's engine; where it is not made of operators, and steps were measured alone, or where it is
    asked for, a step of its own, and a power where watts are there."""
    path = options.measurements
    with at_door(path):
        entry, limit_w = engine_entry(spec), gpu_entry(spec.gpu).tdp_w
    of_operators = entry.engine.step is not None
    loads = _benchmarks(options, points, of_operators)
    if loads:
        return (fit_factors(spec, loads, path) if of_operators else fit_benchmarks(entry.engine, loads, path)), None
    measured, alone = _with_contexts(options, measured, points), options.form == "auto"
    if of_operators and (options.form == "steps" or (alone and measured.context_tokens is not None)):
        return fit_factors(spec, measured, path), None
    if options.form == "steps":
        raise BadInput("--form steps", f"{spec.serving} is not made of operators", "need auto, dense or moe")
    step = _fit_step(options.form, measured, entry.engine, llm_entry(spec.llm).architecture.expert_share)
    if of_operators and alone:
        why = "a decode step of its own: without contexts, or lengths, steps tell no factors on the catalog's"
        step = replace(step, notes=(*step.notes, why))
    return step, None if measured.power_w_per_gpu is None else fit_power(measured, limit_w=limit_w)


def _with_contexts(options: argparse.Namespace, measured: Measurements, points: Sequence[Point]) -> Measurements:
    """The steps, their contexts those of the options' lengths where the file does not say them."""
    if measured.context_tokens is not None or not (options.isl or options.osl):
        return measured
    lengths = [(point.isl or 0.0) + (point.osl or 0.0) / 2.0 for point in points]
    return measured if len(lengths) != len(measured.batch) else replace(measured, context_tokens=np.array(lengths))


def _benchmarks(options: argparse.Namespace, points: Sequence[Point], of_operators: bool) -> list[Point]:
    """The points, where all are of whole benchmarks or such a fit is asked for."""
    if options.form not in ("auto", "benchmark"):
        return []
    found = [point for point in points if (is_measured if of_operators else is_benchmark)(point)]
    if options.form == "benchmark" and not found:
        need = "need mean TTFT and TPOT, prompt and output lengths and the concurrency of each run"
        raise BadInput(options.measurements, "no row is a whole benchmark", need)
    return found if options.form == "benchmark" or len(found) == len(points) else []


def _measured_spec(options: argparse.Namespace, measured: Measurements, points: Sequence[Point]) -> EngineSpec:
    """What was measured, as the options have it, else the file."""
    gpu, tp = options.gpu or (gpu_name(measured.gpu) if measured.gpu else None), options.tp or measured.tp
    llm = options.llm or (llm_name(measured.llm) if measured.llm else None)
    said = measured.precision or (precision_of_checkpoint(measured.llm) if measured.llm else None)
    precision = options.precision or (precision_name(said, llm or "") if said else None)
    path = options.measurements
    names = _known("--gpu", gpu, path), _known("--llm", llm, path), _known("--tp", tp, path), precision
    serving = _serving(options, points)
    split = {name: getattr(options, name) or _divided(measured, name, serving) for name in SPLIT}
    with at_door(path):
        return catalog_of(options).spec(*names, **split, own_fit=False, serving=serving)


def _divided(measured: Measurements, name: str, serving: str) -> int:
    """What the file says of how an instance is divided; to the law of vLLM 0.11 it is one whole, as it was fitted."""
    return 1 if serving == MEASURED_SERVING else getattr(measured, name)


def _serving(options: argparse.Namespace, points: Sequence[Point]) -> str:
    """The serving engine of the options, else of all rows, else the newest."""
    said = {point.serving for point in points if point.serving}
    if not options.serving and len(said) > 1:
        problem = f"has rows of {' and '.join(sorted(said))}"
        raise BadInput(options.measurements, problem, "need those of one serving engine, or --serving")
    found = options.serving or next(iter(said), NEWEST)
    return found if options.serving or found in SERVING else NEWEST


def _known(option: str, value: T | None, path: str) -> T:
    if value is None:
        raise BadInput(option, f"{path} does not say it", "give what was measured")
    return value


def _fit_step(form: str, measured: Measurements, engine: Engine, expert_share: float) -> DecodeFit:
    """The asked form; 'auto' takes the one with the least leave-one-out error, for a model with experts."""
    per_token_s = _per_token_s(measured, engine)
    if form == "moe" and expert_share == 0:
        raise BadInput("--form moe", "the LLM has no experts", "need dense or auto")
    fits = []
    if form != "moe":
        fits.append(fit_decode(measured, form="dense", per_token_s=per_token_s))
    if form == "moe" or (form == "auto" and expert_share > 0):
        try:
            fits.append(fit_decode(measured, form="moe", expert_share=expert_share, per_token_s=per_token_s))
        except BadInput:
            if form == "moe":
                raise
    return min(fits, key=lambda fit: fit.leave_one_out_mape)


def _per_token_s(measured: Measurements, engine: Engine) -> float:
    """What a token of context costs by the catalog's law [s]; of one that bends, in the middle of the points."""
    if isinstance(engine.decode, DecodeStep):
        return float(engine.decode.per_token_s)
    if measured.context_tokens is None:
        return 0.0
    n, context = float(np.median(measured.batch)), float(measured.context_tokens.mean())
    return float(engine.decode.line(n, context)[1]) / n
