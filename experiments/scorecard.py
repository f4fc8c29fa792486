"""How near predictions come to silicon, blind: ours, the law they replace, and AIConfigurator on the same rows.

    python experiments/scorecard.py POINTS [MLENERGY] [--peer] [--others]

POINTS is a folder with `points.csv` (`_scored_points.py`), MLENERGY one with the tables of the ML.ENERGY Benchmark v3
(`_mlenergy.py`). Ours is blind: fitted to the points of other LLMs ("ours"), or of other GPUs. Every predictor is
scored on the rows that all of them predict; rows left out are counted with the reason. Errors are |predicted / measured
- 1|, mean and median. `--peer` asks AIConfigurator anew, where it is installed, and keeps what it says; without, what
was kept is read. `--others` leaves ours out, whose fits take minutes. Writes scorecard.csv, .md and the figure to
results/.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _mlenergy import Row, read_rows  # noqa: E402
from _peer import PACKAGE, Said, of_point, of_steady, peer_says, peer_version  # noqa: E402
from _predictions import law_point  # noqa: E402
from _replaced_law import replaced_law_says  # noqa: E402
from _results import RESULTS, write_table  # noqa: E402
from _scored_points import Point, read_points, throughput  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.style import BLUE, MUTED, SKY, VERMILLION, grid_along, new_figure, plain_numbers, say, styled  # noqa: E402

OURS, NEW_GPU, REPLACED, PEER = "ours", "ours, GPU unseen", "law it replaces", "AIConfigurator"
COLOURS = {OURS: BLUE, NEW_GPU: SKY, REPLACED: MUTED, PEER: VERMILLION}
MARKERS = {OURS: "o", NEW_GPU: "^", REPLACED: "x", PEER: "s"}
TITLES = {"tpot_s": "TPOT", "ttft_s": "TTFT", "tok_per_s": "tok/s", "power_w": "watts", "tok_per_j": "tok/J"}
SHOWN_ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM", "vllm-0.11": "vLLM 0.11"}
STEADY = "vllm-0.11"  # what ML.ENERGY ran
POOLED = "all"
NOTES = (
    "- Every predictor of a quantity is scored on the same rows. Measured tok/s of serving points are computed of TTFT",
    "  and TPOT by Little's law, as predicted ones are; those of vLLM 0.11 (ML.ENERGY) were measured.",
    "- AIConfigurator has no tables of vLLM 0.11: it is asked with its newest, of 0.24, and gives no watts.",
)
MOST_SHOWN = 100.0  # percent, in the figure


@dataclass(frozen=True)
class Scored:
    """One row: where it belongs, what was measured, what each predictor says; nan where it says nothing."""

    gpu: str
    model: str
    serving: str
    measured: dict[str, float]
    predicted: dict[str, dict[str, float]]  # by predictor


@dataclass(frozen=True)
class Score:
    """Errors of one predictor in one quantity over one group of rows."""

    predictor: str
    gpu: str
    model: str
    serving: str
    quantity: str
    n_rows: int
    mean_error: float
    median_error: float


Says = Callable[[Sequence[Point]], tuple[np.ndarray, list[str]]]  # rows of (TTFT, TPOT) [s], and why there are none


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("points", type=Path)
    parser.add_argument("mlenergy", type=Path, nargs="?")
    parser.add_argument("--peer", action="store_true", help="ask AIConfigurator anew and keep what it says")
    parser.add_argument("--others", action="store_true", help="without ours, whose fits take minutes")
    given = parser.parse_args()
    if given.peer and peer_version() is None:
        parser.exit(2, f'--peer: {PACKAGE} is not installed; need pip install "fleetopt_jax[peer]"\n')
    points = read_points(given.points)
    kept = [point for point in points if not point.left_out]
    steady = [row for row in read_rows(given.mlenergy) if not row.host_bound] if given.mlenergy else []
    version, said = peer_says([*map(of_point, kept), *map(of_steady, steady)], anew=given.peer)
    says: dict[str, Says] = {REPLACED: replaced_law_says, PEER: lambda _: _arrays(said[: len(kept)])}
    ours: dict[str, np.ndarray] = {}
    if not given.others:
        from _ours import predict_points, predict_steady  # with the fits' own imports

        says[OURS] = partial(predict_points, given.points, without="llm")
        says[NEW_GPU] = partial(predict_points, given.points, without="gpu")
        if steady:
            ours = {
                OURS: predict_steady(given.mlenergy, steady, "llm"),
                NEW_GPU: predict_steady(given.mlenergy, steady, "gpu"),
            }
    rows, silent = scored(kept, says)
    for i, (row, answer) in enumerate(zip(steady, said[len(kept) :])):
        rows.append(_scored(given.mlenergy, row, answer, {name: float(values[i]) for name, values in ours.items()}))
    found = list(scores(rows))
    reasons = Counter(point.left_out for point in points if point.left_out)
    _write(found, reasons, silent, f"{PACKAGE} {version}")
    save_figure(_figure(found), RESULTS / "scorecard")


def _arrays(said: Sequence) -> tuple[np.ndarray, list[str]]:
    values = [(np.nan, np.nan) if each.why else (each.ttft_s, each.tpot_s) for each in said]
    return np.array(values, dtype=float).reshape(-1, 2), [each.why for each in said]


def scored(points: Sequence[Point], says: dict[str, Says]) -> tuple[list[Scored], dict[str, Counter]]:
    """Every point with what each predictor says of it; and of how many a predictor says nothing, by reason."""
    answers = {name: predict(points) for name, predict in says.items()}
    silent = {name: Counter(why for why in whys if why) for name, (_, whys) in answers.items()}
    rows = []
    for i, point in enumerate(points):
        predicted = {name: _quantities(point, *values[i]) for name, (values, _) in answers.items()}
        measured = _quantities(point, point.ttft_s, point.tpot_s)
        rows.append(Scored(point.gpu, point.model.split("/")[-1], point.serving, measured, predicted))
    return rows, silent


def _quantities(point: Point, ttft_s: float, tpot_s: float) -> dict[str, float]:
    return {"tpot_s": tpot_s, "ttft_s": ttft_s, "tok_per_s": throughput(point, ttft_s, tpot_s)}


def _scored(folder: Path, row: Row, peer: Said, ours: dict[str, float]) -> Scored:
    """A steady state of ML.ENERGY: throughput, power and tokens per joule, prefill of its own prompts in it."""
    law = law_point(folder, row)
    predicted = {
        REPLACED: {"tok_per_s": law.tok_per_s, "power_w": law.power_w_per_gpu, "tok_per_j": law.tok_per_j},
        PEER: {"tok_per_s": np.nan if peer.tok_per_s is None else peer.tok_per_s},
        **{name: {"tok_per_s": value} for name, value in ours.items()},
    }
    measured = {"tok_per_s": row.tok_per_s, "power_w": row.power_w_per_gpu, "tok_per_j": row.tok_per_j}
    return Scored(row.gpu, row.architecture, STEADY, measured, predicted)


def scores(rows: Sequence[Scored]) -> Iterator[Score]:
    """Errors by engine, GPU and model, and pooled over models and over GPUs, each over the rows that every predictor of
    the quantity predicts on that engine: nobody is scored on rows that others were spared."""
    for serving in dict.fromkeys(row.serving for row in rows):
        of_engine = [row for row in rows if row.serving == serving]
        for quantity in of_engine[0].measured:
            names = [name for name in COLOURS if any(_speaks(row, name, quantity) for row in of_engine)]
            shared = [row for row in of_engine if all(_speaks(row, name, quantity) for name in names)]
            for (gpu, model), group in _groups(shared).items():
                for name in names:
                    errors = [abs(row.predicted[name][quantity] / row.measured[quantity] - 1.0) for row in group]
                    middle = float(np.mean(errors)), float(np.median(errors))
                    yield Score(name, gpu, model, serving, quantity, len(group), *middle)


def _groups(rows: Sequence[Scored]) -> dict[tuple[str, str], list[Scored]]:
    """Rows by GPU and model, then by GPU, then all."""
    found: dict[tuple[str, str], list[Scored]] = {}
    for gpu in sorted({row.gpu for row in rows}):
        here = [row for row in rows if row.gpu == gpu]
        found |= {
            (gpu, name): [row for row in here if row.model == name] for name in sorted({row.model for row in here})
        }
        found[gpu, POOLED] = here
    return found | {(POOLED, POOLED): list(rows)}


def _speaks(row: Scored, name: str, quantity: str) -> bool:
    return bool(np.isfinite(row.predicted.get(name, {}).get(quantity, np.nan)))


def _write(found: Sequence[Score], reasons: Counter, silent: dict[str, Counter], peer: str) -> None:
    columns = ["predictor", "gpu", "model", "serving", "quantity", "n_rows", "mean_error", "median_error"]
    write_table("scorecard.csv", columns, [[getattr(score, name) for name in columns] for score in found])
    text = "\n".join([*_markdown(found), "", *_left_out(reasons, silent), "", *NOTES, f"- AIConfigurator: {peer}.", ""])
    write_whole(RESULTS / "scorecard.md", text)
    print(text)


def _markdown(found: Sequence[Score]) -> Iterator[str]:
    """Mean errors, and median ones in brackets, in percent: of what was served and of steady states a table of engines
    and GPUs, then one of models."""
    yield "Mean error (median) in percent."
    for pooled in (True, False):
        for is_steady in (False, True):
            some = [s for s in found if (s.serving == STEADY, s.model == POOLED) == (is_steady, pooled)]
            if some:
                yield from ("", *_table(some))


def _table(found: Sequence[Score]) -> Iterator[str]:
    cells = {(s.serving, s.gpu, s.model, s.quantity, s.predictor): s for s in found}
    columns = [
        (q, name) for q in TITLES for name in COLOURS if any((s.quantity, s.predictor) == (q, name) for s in found)
    ]
    yield f"| | rows | {' | '.join(f'{TITLES[q]}, {name}' for q, name in columns)} |"
    yield f"|---|---:|{'---:|' * len(columns)}"
    for serving, gpu, model in dict.fromkeys((s.serving, s.gpu, s.model) for s in found):
        of_line = [cells.get((serving, gpu, model, *column)) for column in columns]
        n_rows = sorted({score.n_rows for score in of_line if score})
        engine = SHOWN_ENGINES.get(serving, serving)
        where = (
            f"**{engine}**"
            if gpu == POOLED
            else ", ".join(part for part in (engine, gpu.upper(), model) if part != POOLED)
        )
        shown = [f"{100 * s.mean_error:.0f} ({100 * s.median_error:.0f})" if s else "-" for s in of_line]
        yield f"| {where} | {', '.join(map(str, n_rows))} | {' | '.join(shown)} |"


def _left_out(reasons: Counter, silent: dict[str, Counter]) -> Iterator[str]:
    listed = ", ".join(f"{n} {why}" for why, n in reasons.most_common())
    yield f"Rows left out: {listed}."
    for name, whys in silent.items():
        if whys:
            listed = "; ".join(f"{n} {why}" for why, n in whys.most_common(6))
            yield f"- {name} says nothing of {sum(whys.values())}: {listed}."


@styled
def _figure(found: Sequence[Score]) -> Figure:
    """Mean errors by group, a dot for each predictor; one panel a quantity."""
    quantities = ("tpot_s", "ttft_s", "tok_per_s")
    groups = list(
        dict.fromkeys((s.serving, s.gpu, s.model) for s in found if s.serving != STEADY and s.model != POOLED)
    )
    figure = new_figure(13.0, 1.6 + 0.3 * len(groups))
    panels = figure.subplots(1, len(quantities), sharey=True)
    for axes, quantity in zip(panels, quantities):
        for name in COLOURS:
            at = {(s.serving, s.gpu, s.model): s for s in found if (s.quantity, s.predictor) == (quantity, name)}
            errors = np.array([100 * at[group].mean_error if group in at else np.nan for group in groups])
            if np.isfinite(errors).any():
                shown = np.minimum(errors, MOST_SHOWN)
                axes.plot(shown, range(len(groups)), MARKERS[name], color=COLOURS[name], label=name, clip_on=False)
        axes.set_xlim(0, MOST_SHOWN)
        plain_numbers(axes.xaxis)
        axes.set_title(TITLES[quantity])
        axes.set_xlabel(f"mean error [%], cut at {MOST_SHOWN:.0f}")
        grid_along(axes, "y")
    labels = [f"{SHOWN_ENGINES[serving]}, {gpu.upper()}, {model}" for serving, gpu, model in groups]
    panels[0].set_yticks(range(len(groups)), labels)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=len(COLOURS))
    say(figure, _takeaway(found))
    return figure


def _takeaway(found: Sequence[Score]) -> str:
    pooled = {s.predictor: s for s in found if (s.serving, s.gpu, s.quantity) == ("vllm", POOLED, "tpot_s")}
    errors = ", ".join(
        f"{name} {100 * s.mean_error:.0f} % (median {100 * s.median_error:.0f} %)" for name, s in pooled.items()
    )
    n_rows = next((s.n_rows for s in pooled.values()), 0)
    return f"Mean error in TPOT on {n_rows} rows of vLLM: {errors}"


if __name__ == "__main__":
    main()
