"""A calibration to look at: the laws through the measured points, and what they leave."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.calibrate.benchmarks import BenchmarkFit
from fleetopt_jax.calibrate.factors import PRIORS, FactorsFit
from fleetopt_jax.calibrate.fit import DecodeFit, PowerFit, predict_power_w, predict_step_s
from fleetopt_jax.calibrate.measurements import Measurements
from fleetopt_jax.core.units import MS
from fleetopt_jax.laws.prefill import EFFICIENCY_ERROR
from fleetopt_jax.report.style import (
    BLUE,
    MUTED,
    PAPER,
    VERMILLION,
    batch_ticks,
    log_values,
    new_figure,
    plain_numbers,
    say,
    styled,
    ticks_at,
)
from fleetopt_jax.report.tables import new_table
from fleetopt_jax.report.words import (
    instance_said,
    listed,
    percent,
)

LABELS = {  # parameter: what it is, its unit, the unit in SI
    "base_s": ("decode step at batch 0", "ms", MS),
    "per_seq_at_context_s": ("each sequence in flight", "ms", MS),
    "expert_s": ("reading all experts", "ms", MS),
    "per_token_s": ("each token of context", "ns", 1e-9),
    "idle_w": ("power at the smallest batches", "W", 1.0),
    "nominal_w": ("power at the largest batches", "W", 1.0),
    "log2_half_batch": ("log2 of the batch half way between", "", 1.0),
    "decode_factor": ("decode, over the catalog's", "", 1.0),
    "prefill_factor": ("prefill, over the catalog's", "", 1.0),
    "iteration_s": ("and the host's of an iteration", "ms", MS),
    "sequence_s": ("and of each sequence in it", "ms", MS),
    "gpu": ("kernels of the GPU", "", 1.0),
    "prompt": ("further, in steps with prompt tokens", "", 1.0),
    "exchange": ("large exchanges between GPUs", "", 1.0),
    "host": ("host's time of a step", "", 1.0),
    "sequence": ("time of each sequence", "", 1.0),
    "first_token": ("first token's time beyond its steps", "", 1.0),
    "watts": ("watts above idle", "", 1.0),
}
KINDS = {
    "ttft_s": "TTFT",
    "ttft_median_s": "median TTFT",
    "tpot_s": "TPOT",
    "tpot_median_s": "median TPOT",
    "output_tok_per_s": "throughput",
    "step_s": "decode step",
    "power_w": "power",
}


@styled
def calibration_figure(
    measurements: Measurements, decode_fit: DecodeFit | FactorsFit, power_fit: PowerFit | None
) -> Figure:
    """Step time and, where measured, power against the batch; relative residuals beneath. Of whole benchmarks, the
    residuals of each mean."""
    if isinstance(decode_fit, (BenchmarkFit, FactorsFit)):
        return _benchmark_figure(decode_fit)
    batch = measurements.batch
    line = np.geomspace(batch.min(), batch.max(), 200)
    context = decode_fit.context_tokens or 0.0
    at = "" if decode_fit.context_tokens is None else f", {context:,.0f} context tokens"
    step_ms = predict_step_s(decode_fit, line, context) / MS
    columns = [
        _Column("decode step [ms]", f"decode law{at}", BLUE, decode_fit, measurements.step_s / MS, step_ms),
    ]
    if power_fit is not None and measurements.power_w_per_gpu is not None:
        label = "power law" if power_fit.identified else "power law (not all fitted)"
        measured_w, law_w = measurements.power_w_per_gpu, predict_power_w(power_fit, line)
        columns.append(_Column("power of one GPU [W]", label, VERMILLION, power_fit, measured_w, law_w))
    figure = new_figure(0.6 + 5.0 * len(columns), 6.4)
    axes = figure.subplots(2, len(columns), sharex=True, squeeze=False, height_ratios=(2, 1))
    for pair, column in zip(axes.T, columns, strict=True):
        _draw(pair, batch, line, column)
    axes[0, 0].set_yscale("log")
    ticks_at(axes[0, 0].yaxis, log_values(*axes[0, 0].get_ylim()))
    say(figure, _takeaway(decode_fit, power_fit))
    return figure


def _benchmark_figure(fit: BenchmarkFit | FactorsFit) -> Figure:
    """What the factors leave of each mean, over the sequences in flight."""
    kinds = list(dict.fromkeys(fit.kinds))
    figure = new_figure(0.6 + 4.4 * len(kinds), 4.2)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        of_kind = np.array(fit.kinds) == kind
        _residuals(axes, fit.batch[of_kind], fit.residuals[of_kind], fit.left_out[of_kind], BLUE)
        axes.set_title(f"{KINDS[kind]}: predicted over measured, less 1 [%]", loc="left")
        batch_ticks(axes, fit.batch.min(), fit.batch.max())
        axes.set_xlabel("sequences in flight")
    off = ", ".join(f"{KINDS[kind]} within {error:.1%}" for kind, error in fit.left_out_mape.items())
    say(figure, f"Points left out are predicted, on average:\n{off}")
    return figure


def _residuals(axes, batch: np.ndarray, residuals: np.ndarray, left_out: np.ndarray, colour: str) -> None:
    axes.axhline(0, color=MUTED, linewidth=1.0)
    axes.plot(batch, 100 * residuals, "o", color=colour, label="fit")
    axes.plot(batch, 100 * left_out, "x", color=MUTED, label="predicted from the other points")
    largest = 100 * max(np.abs(residuals).max(), np.abs(left_out).max(), 1e-4)
    axes.set_ylim(-1.15 * largest, 1.85 * largest)  # the legend lies above the points
    axes.legend(loc="upper left", ncols=2, handletextpad=0.2, columnspacing=1.0)
    axes.yaxis.set_major_locator(MaxNLocator(5))


@dataclass(frozen=True)
class _Column:
    """One law of the figure: through the points above, what it leaves beneath."""

    title: str
    label: str  # of the law
    colour: str
    fit: DecodeFit | PowerFit
    measured: np.ndarray  # at the batches measured
    law: np.ndarray  # at those of the line


def _draw(pair, batch: np.ndarray, line: np.ndarray, column: _Column) -> None:
    (upper, lower), fit, colour = pair, column.fit, column.colour
    upper.plot(line, column.law, color=colour, label=column.label)
    upper.plot(batch, column.measured, "o", color=colour, markerfacecolor=PAPER, label="measured")
    upper.set_title(column.title, loc="left")
    upper.legend(loc="upper left")
    lower.set_title("predicted over measured, less 1 [%]", loc="left")
    _residuals(lower, batch, fit.residuals, fit.left_out, colour)
    for axes in pair:
        plain_numbers(axes.yaxis)
    batch_ticks(lower, batch.min(), batch.max())
    lower.set_xlabel("sequences in flight")


def _takeaway(decode_fit: DecodeFit, power_fit: PowerFit | None) -> str:
    step = f"step within {percent(decode_fit.leave_one_out_mape, 1)}"
    power = "" if power_fit is None else f", power within {percent(power_fit.leave_one_out_mape, 1)}"
    return f"Points left out are predicted, on average:\n{step}{power}"


def calibration_table(document: Mapping[str, Any]) -> RenderableType:
    """Estimates with their standard errors, how well they predict, and what the data could not tell."""
    title = f"{document['llm']} on {instance_said(document)}"
    if document.get("step_factors"):
        return _factors_table(document, title)
    table = new_table("Quantity", "Estimate", "Standard error", "Unit", title=title)
    parts: list[RenderableType] = [table]
    for law, fit in document["fit"].items():
        if fit is None:
            continue
        for name, value in fit["estimates"].items():
            label, unit, size = LABELS[name]
            table.add_row(label, f"{value / size:.4g}", f"{fit['standard_errors'][name] / size:.2g}", unit)
        table.add_section()
        parts.append(
            f"{_fitted(law, fit)}: {fit['n_points']} {_points(fit)} of {fit['batch_min']:,.0f} to "
            f"{fit['batch_max']:,.0f} sequences in flight, off by {percent(fit['fit_mape'], 1)} on average and "
            f"{percent(fit['max_ape'], 1)} at most; by {percent(fit['leave_one_out_mape'], 1)} where a point is left "
            "out."
        )
        parts += [Text(f"  {note}", style="yellow") for note in fit["notes"]]
    if document.get("factors"):
        parts.append(_factors(document))
    said = f"Not calibrated, as the catalog has it: {listed(document['of_catalog'])}."
    if "prefill" in document["of_catalog"]:
        said += f" Prefill is known to +-{percent(EFFICIENCY_ERROR)}."
    return Group(*parts, Text(said, style="dim"))


def _factors_table(document: Mapping[str, Any], title: str) -> RenderableType:
    """Of factors on a step of operators: what the data tell, what stays the catalog's, and the errors of both."""
    fit = document["fit"]["step_factors"]
    table = new_table("Factor on the catalog's", "Estimate", "Standard error", title=f"{title}, {document['serving']}")
    for name in PRIORS:
        told = name in fit["estimates"]
        error = f"{fit['standard_errors'][name]:.2g}" if told else "the catalog's"
        table.add_row(LABELS[name][0], f"{document['step_factors'][name]:.4g}", error)
    errors = new_table("Predicted off, on average", "by the catalog", "by the factors, point left out")
    for kind, error in fit["catalog_mape"].items():
        errors.add_row(KINDS[kind], percent(error, 1), percent(fit["left_out_mape"][kind], 1))
    sizes = (
        f"{fit['n_points']} means at {fit['batch_min']:,.0f} to {fit['batch_max']:,.0f} sequences in flight, off by "
        f"{percent(fit['fit_mape'], 1)} on average and {percent(fit['max_ape'], 1)} at most."
    )
    notes = [Text(f"  {note}", style="yellow") for note in fit["notes"]]
    said = f"Not calibrated, as the catalog has it: {listed(document['of_catalog'])}."
    return Group(table, errors, sizes, *notes, Text(said, style="dim"))


def _fitted(law: str, fit: Mapping[str, Any]) -> str:
    return "Power" if law == "power" else "Benchmarks" if fit["form"] == "benchmark" else "Decode step"


def _points(fit: Mapping[str, Any]) -> str:
    return "means" if fit.get("form") == "benchmark" else "points"


def _factors(document: Mapping[str, Any]) -> RenderableType:
    """How well whole benchmarks are predicted where one is left out, by kind, and the factor on the watts."""
    factors, error_of_power = document["factors"], document["relative_error"]["power"]
    off = listed([f"{KINDS[kind]} by {percent(error, 1)}" for kind, error in factors["left_out_mape"].items()])
    text = f"A benchmark that is left out is predicted off, on average: {off}."
    if factors["power"] is not None:
        within = "" if error_of_power is None else f" (+-{percent(error_of_power, 1)})"
        text += f" Power is {factors['power']:.3g} times the catalog's{within}."
    return Text(text)
