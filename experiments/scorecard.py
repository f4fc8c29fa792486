"""How near predictions come to silicon, blind: ours, the law they replace, and AIConfigurator on the same rows.

    python experiments/scorecard.py POINTS [MLENERGY] [--peer] [--others]

POINTS is a folder with `points.csv` (`_scored_points.py`), MLENERGY one with the tables of the ML.ENERGY Benchmark v3
(`_mlenergy.py`), beside which `kernels` has the kernel tables. Ours is blind: fitted to the points of other LLMs
("ours"), or of other GPUs (`_ours.py`). Every predictor is scored on the rows that all of them predict; rows left out
are counted with the reason. Errors are |predicted / measured - 1|, mean and median. `--peer` asks AIConfigurator anew,
where it is installed, and keeps what it says; without, what was kept is read. `--others` leaves ours out, whose fits
take two minutes. Writes scorecard.csv, .md and the figure to results/.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _mlenergy import Row, benchmark_llm, read_rows  # noqa: E402
from _peer import PACKAGE, Said, of_point, of_steady, peer_says, peer_version  # noqa: E402
from _predictions import law_point  # noqa: E402
from _replaced_law import replaced_law_says  # noqa: E402
from _results import RESULTS, write_table  # noqa: E402
from _scored_points import Point, read_points, throughput  # noqa: E402
from _scores import (  # noqa: E402
    DENSE,
    EXPERTS,
    NEW_GPU,
    OURS,
    OVER_ALL,
    PEER,
    POOLED,
    PREDICTORS,
    REPLACED,
    STEADY,
    TITLES,
    Aim,
    Score,
    Scored,
    aims,
    scores,
)
from matplotlib.figure import Figure  # noqa: E402

from fleetopt_jax.catalog.llms import llm_entry  # noqa: E402
from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.style import (  # noqa: E402
    BLUE,
    MUTED,
    SKY,
    VERMILLION,
    grid_along,
    new_figure,
    plain_numbers,
    say,
    styled,
)

COLOURS = {OURS: BLUE, NEW_GPU: SKY, REPLACED: MUTED, PEER: VERMILLION}
MARKERS = {OURS: "o", NEW_GPU: "^", REPLACED: "x", PEER: "s"}
SHOWN_ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM", "vllm-0.11": "vLLM 0.11"}
SHOWN_GROUPS = {DENSE: "dense LLMs", EXPERTS: "mixtures of experts"}
LONG_TOKENS = 8000  # nominal prompts from which on they are "8K"
NEARER = 1.05  # mean errors within 5 % of each other are alike
NOTES = (
    "- Ours is blind but in its structure: what its laws are made of was chosen while these points were looked at.",
    "  Points that are kept back are the true test.",
    "- The law it replaces was fitted to the points of vLLM 0.11: there it is not blind.",
    "- Every predictor of a quantity is scored on the same rows. Measured tok/s of serving points are computed of TTFT",
    "  and TPOT by Little's law, as predicted ones are; those of vLLM 0.11 (ML.ENERGY) were measured.",
    "- AIConfigurator has no tables of vLLM 0.11: it is asked with its newest, of 0.24, and gives no watts.",
)
OWN_KERNELS = "it has tables of this engine's own kernels, our operators are vLLM's"
WHYS: tuple[tuple[set[str], str], ...] = (  # where AIConfigurator is nearer; the first that holds
    ({"trtllm", "ttft_s"}, "ours has one time before a first token for all LLMs of an engine, and DeepSeek's is long"),
    ({"trtllm"}, OWN_KERNELS),
    ({"sglang"}, OWN_KERNELS),
    ({STEADY, "Qwen3-235B-A22B"}, "vLLM 0.11 runs these fp8 experts slower than any other LLM of the benchmark tells"),
)
LEFT_OVER = (
    "What is left over on vLLM 0.11: fp8 experts with blocks of scales (Qwen3-235B-A22B in fp8 comes out 11 to 40 %",
    "too fast, in 16 bits within 11 %), which no other LLM of the benchmark tells; gpt-oss on B200, 23 to 32 % too",
    "slow; small dense LLMs on one B200, some of whose batches the host holds back (Llama-3.1-8B goes from 9 to 27 ms",
    "between 64 and 128 sequences). Watts: the form of the law alone, fitted to every row, is off by 8 % (H100) and",
    "10 % (B200), and nodes of one configuration differ by up to 15 %.",
)
MOST_SHOWN = 100.0  # percent, in the figure


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
            kernels = given.mlenergy.parent / "kernels"
            ours = {
                OURS: predict_steady(given.mlenergy, kernels, steady, "llm"),
                NEW_GPU: predict_steady(given.mlenergy, kernels, steady, "gpu"),
            }
    rows, silent = scored(kept, says)
    for i, (row, answer) in enumerate(zip(steady, said[len(kept) :])):
        rows.append(_scored(given.mlenergy, row, answer, {name: values[i] for name, values in ours.items()}))
    found = list(scores(rows))
    reasons = Counter(point.left_out for point in points if point.left_out)
    _write(found, list(aims(rows)), reasons, silent, f"{PACKAGE} {version}")
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
        experts = llm_entry(point.spec.llm).architecture.n_experts > 0
        rows.append(Scored(point.gpu, point.model.split("/")[-1], point.serving, experts, measured, predicted))
    return rows, silent


def _quantities(point: Point, ttft_s: float, tpot_s: float) -> dict[str, float]:
    return {
        "tpot_s": tpot_s,
        "ttft_s": ttft_s,
        "ttft_8k_s": ttft_s if point.nominal_prompt_tokens >= LONG_TOKENS else np.nan,
        "tok_per_s": throughput(point, ttft_s, tpot_s),
    }


def _scored(folder: Path, row: Row, peer: Said, ours: dict[str, np.ndarray]) -> Scored:
    """A steady state of ML.ENERGY: throughput, power and tokens per joule, prefill of its own prompts in it."""

    def of(tok_per_s: float, power_w: float) -> dict[str, float]:
        return {"tok_per_s": tok_per_s, "power_w": power_w, "tok_per_j": tok_per_s / (power_w * row.tp)}

    law = law_point(folder, row)
    predicted = {
        REPLACED: of(law.tok_per_s, law.power_w_per_gpu),
        PEER: {"tok_per_s": np.nan if peer.tok_per_s is None else peer.tok_per_s},
        **{name: of(*map(float, values)) for name, values in ours.items()},
    }
    experts = bool(benchmark_llm(folder, row.architecture, row.precision).n_expert_params > 0)
    measured = of(row.tok_per_s, row.power_w_per_gpu)
    return Scored(row.gpu, row.architecture, STEADY, experts, measured, predicted)


def _write(
    found: Sequence[Score], aimed: Sequence[Aim], reasons: Counter, silent: dict[str, Counter], peer: str
) -> None:
    columns = ["predictor", "gpu", "model", "serving", "quantity", "n_rows", "mean_error", "median_error"]
    write_table("scorecard.csv", columns, [[getattr(score, name) for name in columns] for score in found])
    lines = [
        *_markdown(found),
        "",
        *_aims(aimed),
        *_nearer(found),
        "",
        *LEFT_OVER,
        "",
        *_left_out(reasons, silent),
        "",
        *NOTES,
    ]
    text = "\n".join([*lines, f"- AIConfigurator: {peer}.", ""])
    write_whole(RESULTS / "scorecard.md", text)
    print(text)


def _markdown(found: Sequence[Score]) -> Iterator[str]:
    """Mean errors, and median ones in brackets, in percent: of what was served and of steady states a table of engines
    and GPUs, then one of models."""
    yield "Mean error (median) in percent."
    for pooled in (True, False):
        for is_steady in (False, True):
            some = [s for s in found if (s.serving == STEADY, s.model in OVER_ALL) == (is_steady, pooled)]
            if some:
                yield from ("", *_table(some))


def _table(found: Sequence[Score]) -> Iterator[str]:
    cells = {(s.serving, s.gpu, s.model, s.quantity, s.predictor): s for s in found}
    columns = [
        (q, name) for q in TITLES for name in PREDICTORS if any((s.quantity, s.predictor) == (q, name) for s in found)
    ]
    yield f"| | rows | {' | '.join(f'{TITLES[q]}, {name}' for q, name in columns)} |"
    yield f"|---|---:|{'---:|' * len(columns)}"
    for serving, gpu, model in dict.fromkeys((s.serving, s.gpu, s.model) for s in found):
        of_line = [cells.get((serving, gpu, model, *column)) for column in columns]
        n_rows = sorted({score.n_rows for score in of_line if score})
        shown = [_percent(score) if score else "-" for score in of_line]
        where = _where(serving, gpu, model)
        where = f"**{where}**" if (gpu, model) == (POOLED, POOLED) else where
        yield f"| {where} | {', '.join(map(str, n_rows))} | {' | '.join(shown)} |"


def _where(serving: str, gpu: str, model: str) -> str:
    parts = (SHOWN_ENGINES.get(serving, serving), gpu.upper() if gpu != POOLED else "", SHOWN_GROUPS.get(model, model))
    return ", ".join(part for part in parts if part not in ("", POOLED))


def _percent(of: Score | Aim) -> str:
    return f"{100 * of.mean_error:.0f} ({100 * of.median_error:.0f})"


def _aims(aimed: Sequence[Aim]) -> Iterator[str]:
    """Beside each target what was reached."""
    if not aimed:
        return
    yield "Aimed at, in the mean and in percent, over every row that ours predicts; LLMs left out where no GPUs are:"
    yield from ("", "| | aimed at | reached | rows | |", "|---|---:|---:|---:|---|")
    for aim in aimed:
        verdict = "reached" if aim.mean_error <= aim.most else "missed"
        reached = f"{100 * aim.mean_error:.1f} ({100 * aim.median_error:.1f})"
        yield f"| {aim.what} | {100 * aim.most:.0f} | {reached} | {aim.n_rows} | {verdict} |"
    yield ""


def _nearer(found: Sequence[Score]) -> Iterator[str]:
    """Groups of a GPU and a model where AIConfigurator is nearer than ours."""
    at = {(s.serving, s.gpu, s.model, s.quantity, s.predictor): s for s in found if s.model not in OVER_ALL}
    lines = []
    for (serving, gpu, model, quantity, name), peer in at.items():
        ours = at.get((serving, gpu, model, quantity, OURS))
        if name == PEER and ours and ours.mean_error > NEARER * peer.mean_error:
            of = f"{_where(serving, gpu, model)}: {TITLES[quantity]}"
            why = next((why for where, why in WHYS if where <= {serving, gpu, model, quantity}), "")
            lines.append(f"- {of} {_percent(peer)} against our {_percent(ours)}{': ' if why else ''}{why}")
    if lines:
        yield from ("AIConfigurator is nearer, of all groups above, on", "", *lines)


def _in_short(why: str) -> str:
    """A reason without the numbers of its row."""
    if "keep a state" in why:
        return "no law of linear attention"
    if "fit" in why or "OOM" in why:
        return "does not fit the memory"
    return why.split(":")[0].split(";")[0]


def _left_out(reasons: Counter, silent: dict[str, Counter]) -> Iterator[str]:
    listed = ", ".join(f"{n} {why}" for why, n in reasons.most_common())
    yield f"Rows left out: {listed}."
    for name, whys in silent.items():
        if whys:
            short = Counter()
            for why, n in whys.items():
                short[_in_short(why)] += n
            listed = "; ".join(f"{n} {why}" for why, n in short.most_common(6))
            yield f"- {name} says nothing of {sum(whys.values())}: {listed}."


@styled
def _figure(found: Sequence[Score]) -> Figure:
    """Mean errors by group, a dot for each predictor; one panel a quantity. Of each engine first all, larger."""
    quantities = ("tpot_s", "ttft_s", "tok_per_s")
    shown = [s for s in found if s.serving != STEADY and (s.model not in OVER_ALL or s.gpu == s.model == POOLED)]
    groups = sorted(
        dict.fromkeys((s.serving, s.gpu, s.model) for s in shown),
        key=lambda group: (list(SHOWN_ENGINES).index(group[0]), group[1] != POOLED),
    )
    at, y = {}, 0.0
    for i, group in enumerate(groups):
        y += 0.6 * (i > 0 and group[0] != groups[i - 1][0])
        at[group], y = y, y + 1.0
    figure = new_figure(12.0, 1.6 + 0.28 * y)
    panels = figure.subplots(1, len(quantities), sharey=True)
    for axes, quantity in zip(panels, quantities):
        for s in (s for s in shown if s.quantity == quantity):
            group = s.serving, s.gpu, s.model
            dot = {"color": COLOURS[s.predictor], "markersize": 9 if s.gpu == POOLED else 5, "clip_on": False}
            dot["zorder"] = 3 + len(PREDICTORS) - PREDICTORS.index(s.predictor)
            axes.plot(min(100 * s.mean_error, MOST_SHOWN), at[group], MARKERS[s.predictor], **dot)
        axes.set_xlim(0, MOST_SHOWN)
        plain_numbers(axes.xaxis)
        axes.set_title(TITLES[quantity])
        axes.set_xlabel(f"mean error [%], cut at {MOST_SHOWN:.0f}")
        grid_along(axes, "y")
    panels[0].set_yticks(list(at.values()), [_label(*group) for group in groups])
    panels[0].invert_yaxis()
    names = [name for name in PREDICTORS if any(s.predictor == name for s in shown)]
    dots = [panels[0].plot([], [], MARKERS[name], color=COLOURS[name])[0] for name in names]
    figure.legend(dots, names, loc="outside lower right", ncols=len(names))
    say(figure, _takeaway(found))
    return figure


def _label(serving: str, gpu: str, model: str) -> str:
    return f"{SHOWN_ENGINES[serving]}, all" if gpu == POOLED else f"{model}, {gpu.upper()}"


def _takeaway(found: Sequence[Score]) -> str:
    of = ("vllm", POOLED, POOLED, "tpot_s")
    pooled = {s.predictor: s for s in found if (s.serving, s.gpu, s.model, s.quantity) == of}
    errors = ", ".join(f"{name} {100 * s.mean_error:.0f} %" for name, s in pooled.items() if name != NEW_GPU)
    n_rows = next((s.n_rows for s in pooled.values()), 0)
    return f"Mean error in TPOT, blind, of {n_rows} points of vLLM: {errors}"


if __name__ == "__main__":
    main()
