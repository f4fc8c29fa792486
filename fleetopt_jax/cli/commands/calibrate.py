"""`fleetopt calibrate`: an engine from measurements."""

import argparse
import os
from typing import TypeVar

from fleetopt_jax.calibrate.benchmarks import fit_benchmarks, is_benchmark
from fleetopt_jax.calibrate.fit import DecodeFit, PowerFit, fit_decode, fit_power
from fleetopt_jax.calibrate.measurements import Measurements, read_measurements
from fleetopt_jax.calibrate.names import gpu_name, llm_name, precision_name, precision_of_checkpoint
from fleetopt_jax.calibrate.points import Point, points_of
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.inputs import at_door, catalog_of
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.engine import engine_to_json
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
    )
    spec = _measured_spec(options, measured)
    step, power = _fits(options, measured, spec)
    document = engine_to_json(
        step,
        power,
        gpu=spec.gpu_name,
        llm=spec.llm_name,
        tp=spec.tp,
        precision=engine_entry(spec).spec.precision,
        source=os.path.basename(path),
    )
    return Answer(document, calibration_table, OK, lambda _: calibration_figure(measured, step, power))


def _fits(options: argparse.Namespace, measured: Measurements, spec: EngineSpec) -> tuple[DecodeFit, PowerFit | None]:
    """Factors where the points are of whole benchmarks; else a step of its own, and a power where watts are there."""
    path = options.measurements
    with at_door(path):
        engine, limit_w = engine_entry(spec).engine, gpu_entry(spec.gpu).tdp_w
    points = _benchmarks(options, measured)
    if points:
        return fit_benchmarks(engine, points, path), None
    if not isinstance(engine.decode, DecodeStep):
        raise AssertionError(f"the catalog's law of {spec.llm_name} on {spec.gpu_name} is no DecodeStep")
    step = _fit_step(options.form, measured, engine.decode)
    return step, None if measured.power_w_per_gpu is None else fit_power(measured, limit_w=limit_w)


def _benchmarks(options: argparse.Namespace, measured: Measurements) -> list[Point]:
    """The points, where all are of whole benchmarks or such a fit is asked for."""
    if options.form not in ("auto", "benchmark"):
        return []
    rows = [point for point in points_of(measured.rows) if not point.parallel]
    points = [point for point in rows if is_benchmark(point)]
    if options.form == "benchmark" and not points:
        need = "need mean TTFT and TPOT, prompt and output lengths and the concurrency of each run"
        raise BadInput(options.measurements, "no row is a whole benchmark", need)
    return points if options.form == "benchmark" or len(points) == len(rows) else []


def _measured_spec(options: argparse.Namespace, measured: Measurements) -> EngineSpec:
    """What was measured, as the options have it, else the file."""
    gpu, tp = options.gpu or (gpu_name(measured.gpu) if measured.gpu else None), options.tp or measured.tp
    llm = options.llm or (llm_name(measured.llm) if measured.llm else None)
    said = measured.precision or (precision_of_checkpoint(measured.llm) if measured.llm else None)
    precision = options.precision or (precision_name(said, llm or "") if said else None)
    path = options.measurements
    names = _known("--gpu", gpu, path), _known("--llm", llm, path), _known("--tp", tp, path), precision
    with at_door(path):
        return catalog_of(options).spec(*names, own_fit=False)


def _known(option: str, value: T | None, path: str) -> T:
    if value is None:
        raise BadInput(option, f"{path} does not say it", "give what was measured")
    return value


def _fit_step(form: str, measured: Measurements, law: DecodeStep) -> DecodeFit:
    """The asked form; 'auto' takes the one with the least leave-one-out error, for a model with experts."""
    share, per_token_s = float(law.expert_share), float(law.per_token_s)
    if form == "moe" and share == 0:
        raise BadInput("--form moe", "the LLM has no experts", "need dense or auto")
    fits = []
    if form != "moe":
        fits.append(fit_decode(measured, form="dense", per_token_s=per_token_s))
    if form == "moe" or (form == "auto" and share > 0):
        try:
            fits.append(fit_decode(measured, form="moe", expert_share=share, per_token_s=per_token_s))
        except BadInput:
            if form == "moe":
                raise
    return min(fits, key=lambda fit: fit.leave_one_out_mape)
