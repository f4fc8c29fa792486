"""`fleetopt calibrate`: an engine from measurements."""

import argparse
import os
from typing import TypeVar

from fleetopt_jax.calibrate.fit import DecodeFit, fit_decode, fit_power
from fleetopt_jax.calibrate.measurements import Measurements, read_measurements
from fleetopt_jax.calibrate.names import PRECISION_NAMES
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.catalog.llms import catalog_name
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
    measured = read_measurements(path, model=options.model, gpu=options.gpu, tp=options.tp, task=options.task)
    spec = _measured_spec(options, measured)
    with at_door(path):
        law = engine_entry(spec).engine.decode
        limit_w = gpu_entry(spec.gpu).tdp_w
    if not isinstance(law, DecodeStep):
        raise AssertionError(f"the catalog's law of {spec.llm_name} on {spec.gpu_name} is no DecodeStep")
    step = _fit_step(options.form, measured, law)
    power = None if measured.power_w_per_gpu is None else fit_power(measured, limit_w=limit_w)
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


def _measured_spec(options: argparse.Namespace, measured: Measurements) -> EngineSpec:
    """What was measured, as the options have it, else the file."""
    gpu, tp = options.gpu or measured.gpu, options.tp or measured.tp
    llm = options.llm or (catalog_name(measured.llm) if measured.llm else None)
    precision = options.precision or PRECISION_NAMES.get(measured.precision or "", measured.precision)
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
