"""Fit every measured configuration of the catalog's LLMs by itself: fleetopt_jax/catalog/data/engines.json.

    python experiments/fit_engines.py FOLDER

A configuration is (GPU, LLM, tensor parallelism, precision), all its text tasks together. The step is fitted to mean
iterations, prefill in them; what the benchmark's own prefill costs by the prefill law is then taken off the cost of a
sequence, and the mix is kept beside the fit, so that decode and prefill can be told apart and put together again. The
power is the logistic in the batch or the activity law with coefficients of its own, whichever describes it better. A
fit is kept where it describes its own points, within 10 % in the step and 6 % in the power on average: elsewhere (small
models on B200, which jump between two regimes that the batch does not tell; nodes whose power differs by 15 %) a fit
would claim what the data do not say, and the law with its own error serves.
"""

import argparse
import contextlib
import json
from dataclasses import replace
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _mlenergy import CATALOG, SOURCE, Row, configurations, read_rows  # noqa: E402
from scipy.optimize import least_squares  # noqa: E402

from fleetopt_jax.calibrate.fit import DecodeFit, fit_decode, fit_power  # noqa: E402
from fleetopt_jax.calibrate.measurements import Measurements  # noqa: E402
from fleetopt_jax.catalog.engines import build  # noqa: E402
from fleetopt_jax.catalog.gpus import gpu_entry  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.core.errors import BadInput  # noqa: E402
from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.fleet.engine import Engine  # noqa: E402

OUT = Path(__file__).parents[1] / "fleetopt_jax" / "catalog" / "data" / "engines.json"
STEP_LIMIT, POWER_LIMIT = 0.10, 0.06


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    kept = []
    for (gpu, architecture, tp, precision), rows in configurations(read_rows(parser.parse_args().folder)).items():
        if architecture not in CATALOG:
            continue
        name = f"{gpu} {CATALOG[architecture]} tp{tp} {precision} ({len(rows)} batches)"
        try:
            document = _fit(gpu, CATALOG[architecture], tp, precision, rows)
        except BadInput as error:
            print(f"{name}: not fitted: {error}")
            continue
        good = document["step_error"] <= STEP_LIMIT and document["power_error"] <= POWER_LIMIT
        errors = f"step {document['step_error']:.2%}, power {document['power_error']:.2%}"
        print(f"{name}: {errors}: {'kept' if good else 'not kept, the law serves'}")
        if good:
            kept.append(document)
    write_whole(OUT, json.dumps({"source": SOURCE, "engines": kept}, indent=1) + "\n")


def _fit(gpu: str, llm: str, tp: int, precision: str, rows: list[Row]) -> dict:
    law = build(EngineSpec(gpu, llm, tp, precision, own_fit=False))
    measured = Measurements(
        batch=np.array([row.batch for row in rows]),
        step_s=np.array([row.iteration_s for row in rows]),
        context_tokens=np.array([row.context_tokens for row in rows]),
        power_w_per_gpu=np.array([row.power_w_per_gpu for row in rows]),
        source=f"{gpu} {llm} tp{tp}",
    )
    step = best_step(measured, law)
    power, power_error = _best_power(measured, law, step, gpu)
    mix = float(np.average([row.prompt_per_output for row in rows], weights=measured.batch))
    prefill_s = mix * float(law.prefill.per_token_s)
    per_seq_s = float(step.step.per_seq_s)
    mix *= (
        min(1.0, per_seq_s / prefill_s) if prefill_s else 1.0
    )  # the cost of a sequence holds no more prefill than it is
    decode = replace(step.step, per_seq_s=max(0.0, per_seq_s - prefill_s))
    return {
        "gpu": gpu,
        "llm": llm,
        "tp": tp,
        "precision": precision,
        "decode": {name: float(value) for name, value in vars(decode).items()},
        "power": power,
        "prompt_per_output": mix,
        "step_error": step.mape,
        "power_error": power_error,
        "step_leave_one_out": step.leave_one_out_mape,
        "form": step.form,
        "n_points": len(rows),
        "batch_min": float(measured.batch.min()),
        "batch_max": float(measured.batch.max()),
        "context_tokens": float(measured.context_tokens.mean()),
    }


def _best_power(measured: Measurements, law: Engine, step: DecodeFit, gpu: str) -> tuple[dict, float]:
    """(coefficients, mean error) of the better of the two forms."""
    asked = replace(law.power, step=step.step)
    fitted = ("floor_w", "memory_w", "sqrt_flop_w")

    def predict(values: np.ndarray) -> np.ndarray:
        power = replace(asked, **dict(zip(fitted, values)))
        return np.asarray(power.gpu_w(measured.batch, measured.context_tokens))

    start = np.array([float(getattr(asked, name)) for name in fitted]) + 1.0
    solved = least_squares(
        lambda x: predict(x) / measured.power_w_per_gpu - 1.0, start, bounds=(0, np.inf), x_scale=100
    )
    activity = {"kind": "activity", **dict(zip(fitted, solved.x.tolist()))}
    options = [(activity, float(np.abs(predict(solved.x) / measured.power_w_per_gpu - 1.0).mean()))]
    try:
        logistic = fit_power(measured, limit_w=float(gpu_entry(gpu).gpu.tdp_w))
    except BadInput:  # a power that does not rise with the batch
        return options[0]
    values = {name: float(value) for name, value in vars(logistic.power).items()}
    options.append(({"kind": "logistic", **values}, logistic.mape))
    return min(options, key=lambda option: option[1])


def best_step(measured: Measurements, law: Engine) -> DecodeFit:
    """The form with the least leave-one-out error. A cost of a context token below what the data sheet's bandwidth
    allows (contexts are estimates) gives way to that bound: the bytes are read, and the rest is fitted again."""
    ideal_s = float(law.power.ideal_bytes.per_token_s)
    fits = _fits(measured, law, float(law.decode.per_token_s))
    possible = [fit for fit in fits if float(fit.step.per_token_s) >= ideal_s * (1 - 1e-9)]
    return min(possible or _bounded(measured, law, ideal_s), key=lambda fit: fit.leave_one_out_mape)


def _fits(measured: Measurements, law: Engine, per_token_s: float) -> list[DecodeFit]:
    share = float(law.decode.expert_share)
    fits = [fit_decode(measured, form="dense", per_token_s=per_token_s)]
    if share > 0:
        with contextlib.suppress(BadInput):  # too few points, or experts that cannot be told apart
            fits.append(fit_decode(measured, form="moe", expert_share=share, per_token_s=per_token_s))
    return fits


def _bounded(measured: Measurements, law: Engine, per_token_s: float) -> list[DecodeFit]:
    """Fits of what reading the contexts at `per_token_s` leaves of the steps, errors relative to the whole steps."""
    contexts_s = measured.batch * measured.context_tokens * per_token_s
    rest = replace(measured, step_s=measured.step_s - contexts_s, context_tokens=None)
    scale = rest.step_s / measured.step_s
    return [
        replace(
            fit,
            residuals=fit.residuals * scale,
            left_out=fit.left_out * scale,
            step=replace(fit.step, per_token_s=jax.numpy.asarray(per_token_s)),
        )
        for fit in _fits(rest, law, 0.0)
    ]


if __name__ == "__main__":
    main()
