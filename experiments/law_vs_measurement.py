"""The laws against every measured steady state: throughput, power and tokens per joule.

    python experiments/law_vs_measurement.py FOLDER

The paper (The 1/W Law, arXiv 2603.17280v1) predicts the step as W + H (L / L_cal) n, by hand for Llama-3.1-70B on H100
and from data sheets elsewhere, and the power of other GPUs by TDP (table 5). Measured here: the text rows of the
ML.ENERGY Benchmark v3 on H100 and B200. Predicted, for each row: by the law of its GPU (the laws saw these rows but for
code infill; on architectures left out of the fit their source gives 16 % and 22 % in throughput, 13 % and 9.5 % in
power, the latter at the measured step), by the configuration's own fit where the catalog has one, by the published
roofline engine, whose prefill is free, and by the law of the other GPU, which is what `projected` engines rest on.
Errors are of predicted / measured - 1. Hybrids have no law; rows bound by the host are in the table but in no mean.
"""

import argparse
import csv
import json
from collections import Counter, defaultdict
from importlib.resources import files
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _mlenergy import Row, benchmark_llm, read_rows  # noqa: E402
from _predictions import OTHER, decode_point, law_point, own_fit_point, roofline_point  # noqa: E402
from _refit import left_out_errors  # noqa: E402
from _results import GREY, RESULTS, finish, log_ticks, new_figure, write_table  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fleetopt_jax.catalog.engines import EnginePoint  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.style import COLOURS, MARKERS  # noqa: E402

PREDICTORS = (
    "law",
    "own_fit",
    "law_where_own_fit",
    "roofline",
    "other_gpus_law",
    "other_gpus_law_unseen",
    "law_decode_only",
)
QUANTITIES = ("tok_per_s", "power_w_per_gpu", "tok_per_j")
HELD_OUT = {("h100", "tok_per_s"): 0.16, ("b200", "tok_per_s"): 0.22, ("h100", "power_w_per_gpu"): 0.13}
HELD_OUT["b200", "power_w_per_gpu"] = 0.095  # the source's, architectures left out of the fit
BAND = 0.20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows = read_rows(folder)
    seen = {gpu: {row.architecture for row in rows if row.gpu == gpu} for gpu in OTHER}
    predictions = [_predict(folder, row, seen) for row in rows]
    kinds = [
        "moe" if float(benchmark_llm(folder, r.architecture, r.precision).n_expert_params) else "dense" for r in rows
    ]
    _write_rows(rows, kinds, predictions)
    summary = _summary(rows, kinds, predictions)
    columns = [f"{name}_{of}" for name in QUANTITIES for of in ("mean_error", "median_error", "bias", "step_error")]
    columns = [name for name in columns if not name.endswith("step_error") or name.startswith("tok_per_s")]
    write_table(
        "law_vs_measurement_summary.csv",
        ["gpu", "kind", "predictor", "n_rows", *columns],
        [(*key, *values) for key, values in summary.items()],
    )
    save_figure(_figure(rows, kinds, predictions, summary), RESULTS / "law_vs_measurement")
    _report(folder, rows, summary)


def _predict(folder: Path, row: Row, seen: dict[str, set[str]]) -> dict[str, EnginePoint | None]:
    law, own, other = law_point(folder, row), own_fit_point(row), OTHER[row.gpu]
    carried = law_point(folder, row, measured_on=other)
    return {
        "law": law,
        "own_fit": own,
        "law_where_own_fit": law if own else None,
        "roofline": roofline_point(folder, row),
        "other_gpus_law": carried,
        "other_gpus_law_unseen": carried if row.architecture not in seen[other] else None,
        "law_decode_only": decode_point(folder, row),
    }


def _write_rows(rows: list[Row], kinds: list[str], predictions: list[dict[str, EnginePoint | None]]) -> None:
    names = ("row_id", "model", "architecture", "task", "gpu", "tp", "precision", "batch", "context_tokens")
    shown = ("law", "own_fit", "roofline", "other_gpus_law")
    columns = [f"{name}_{predictor}" for predictor in shown for name in QUANTITIES]
    lines = []
    for row, kind, points in zip(rows, kinds, predictions):
        line = [getattr(row, name) for name in names] + [kind, row.prompt_per_output, int(row.host_bound)]
        line += [getattr(row, name) for name in QUANTITIES]
        line += [getattr(points[p], name) if points[p] else None for p in shown for name in QUANTITIES]
        lines.append(line)
    head = [*names, "kind", "prompt_per_output", "host_bound", *(f"{name}_measured" for name in QUANTITIES), *columns]
    write_table("law_vs_measurement.csv", head, lines)


def _summary(rows, kinds, predictions) -> dict[tuple[str, str, str], list]:
    """(gpu, kind, predictor) -> number of rows and, of each quantity, the mean and median error and the bias."""
    groups = defaultdict(list)
    for row, kind, points in zip(rows, kinds, predictions):
        if not row.host_bound:
            for predictor, point in points.items():
                if point:
                    for group in (kind, "all"):
                        groups[row.gpu, group, predictor].append((row, point))
    summary = {}
    for key in ((g, k, p) for p in PREDICTORS for g in ("h100", "b200") for k in ("dense", "moe", "all")):
        if key not in groups:
            continue
        values = [len(groups[key])]
        for name in QUANTITIES:
            ratio = np.array([getattr(point, name) / getattr(row, name) for row, point in groups[key]])
            error = np.abs(ratio - 1)
            values += [float(error.mean()), float(np.median(error)), float((ratio - 1).mean())]
            if name == "tok_per_s":
                values.append(float(np.abs(1 / ratio - 1).mean()))
        summary[key] = values
    return summary


def _figure(rows, kinds, predictions, summary) -> Figure:
    figure = new_figure(10.4, 5.0)
    for axes, name in zip(figure.subplots(1, 2), QUANTITIES[:2]):
        for gpu in OTHER:
            for kind in ("dense", "moe"):
                pairs = [
                    (getattr(row, name), getattr(points["law"], name))
                    for row, of, points in zip(rows, kinds, predictions)
                    if (row.gpu, of, row.host_bound) == (gpu, kind, False)
                ]
                face = COLOURS[gpu] if kind == "dense" else "none"
                label = f"{gpu.upper()}, {'dense' if kind == 'dense' else 'mixture of experts'}"
                axes.plot(
                    *zip(*pairs), MARKERS[gpu], color=COLOURS[gpu], mfc=face, ms=4, mew=0.8, alpha=0.75, label=label
                )
        low, high = (150, 30_000) if name == "tok_per_s" else (150, 1000)
        line = np.array([low, high])
        axes.fill_between(line, (1 - BAND) * line, (1 + BAND) * line, color="#dddddd", label="within 20 %", zorder=0)
        axes.plot(line, line, color=GREY, linewidth=1.0)
        errors = ", ".join(
            f"{summary[gpu, 'all', 'law'][1 if name == 'tok_per_s' else 5]:.0%} on {gpu.upper()}" for gpu in OTHER
        )
        if name == "tok_per_s":
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                log_ticks(axis, [200, 500, 1000, 2000, 5000, 10_000, 20_000])
            finish(axes, x="measured output tokens per second of the instance", y="predicted by the law [1/s]")
            axes.legend(frameon=False, fontsize=9)
        else:
            finish(axes, x="measured power of one GPU [W]", y="predicted by the law [W]")
        axes.set_title(
            f"{'Throughput' if name == 'tok_per_s' else 'Power'}: mean error {errors}", loc="left", fontsize=10
        )
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
    within = " and ".join(f"{summary[gpu, 'all', 'law'][1]:.0%} ({gpu.upper()})" for gpu in OTHER)
    compared = [entry for entry in zip(rows, kinds, predictions) if not entry[0].host_bound]
    dense, moe = (
        np.median([points["roofline"].tok_per_s / row.tok_per_s for row, of, points in compared if of == kind])
        for kind in ("dense", "moe")
    )
    figure.suptitle(
        f"A law for each GPU predicts the throughput of {len(compared)} steady states within {within} on average;\n"
        f"the published roofline promises {dense:.1f}x the measured throughput of dense and {moe:.0f}x of MoE models",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def _report(folder: Path, rows: list[Row], summary: dict) -> None:
    with (folder / "llm_steady_state.csv").open(newline="") as file:
        text_rows = [line for line in csv.DictReader(file) if line["flag_multimodal"] == "0"]
    used = {row.row_id for row in rows}
    hybrids = Counter(line["gpu_model"] for line in text_rows if int(line["row_id"]) not in used)
    host_bound, compared = ([row for row in rows if row.host_bound == bound] for bound in (True, False))
    print(f"{len(compared)} rows compared; left out: {sum(hybrids.values())} of hybrids (no law)")
    ratios = [law_point(folder, row).tok_per_s / row.tok_per_s for row in host_bound]
    fast = f"{min(ratios):.1f} to {max(ratios):.1f} times as fast as measured"
    print(f"not averaged: {len(ratios)} rows bound by the host, predicted {fast}")
    print(f"{'':38}  rows   tok/s: mean median bias    power: mean median bias    tok/J: mean median bias")
    for (gpu, kind, predictor), (n, *v) in summary.items():
        s, p, j = v[0:3], v[4:7], v[7:10]
        cells = "     ".join(f"{a:8.1%} {b:6.1%} {c:+6.1%}" for a, b, c in (s, p, j))
        print(f"{gpu} {kind:5} {predictor:22}  {n:4}   {cells}   (step {v[3]:.1%})")
    for (gpu, name), error in HELD_OUT.items():
        print(f"source, architectures left out of the fit: {gpu} {name} {error:.1%}")
    for (fitted_on, gpu), (rate, step, power) in left_out_errors(folder, compared).items():
        print(
            f"law fitted again without the architecture on {fitted_on}, applied to {gpu}: "
            f"tok/s {rate:.1%}, step {step:.1%}, power {power:.1%}"
        )
    fits = json.loads((files("fleetopt_jax.catalog") / "data" / "engines.json").read_text())["engines"]
    left_out = np.average([fit["step_leave_one_out"] for fit in fits], weights=[fit["n_points"] for fit in fits])
    print(f"own fits, each point predicted from the configuration's others: step {left_out:.1%}")


if __name__ == "__main__":
    main()
