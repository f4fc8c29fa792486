"""Tokens per joule of a mixture of experts against a dense model: Qwen3-235B-A22B against Llama-3.1-70B.

    python experiments/moe_against_dense.py FOLDER

The paper (The 1/W Law, arXiv 2603.17280v1, table 2) gives Qwen3-235B-A22B 5.1 times the tokens per watt of
Llama-3.1-70B on 8 H100 at 8K (37.8 against 7.41): it streams the active parameters only, at the peak bandwidth.
Measured: both in the chat task of the ML.ENERGY Benchmark v3, at equal batch per instance (every batch measured for
Qwen3, against Llama between its measured batches in logarithms; Llama in 16 bits on 4 H100 or 2 B200, Qwen3 on each
instance it was measured on). Predicted: by the law, by the own fits, and by the law at the paper's own setting. A step
of n sequences streams the share 1 - (1 - k / E)^n of the experts, not k / E.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _mlenergy import Row, read_rows  # noqa: E402
from _predictions import at_batch, geometric_mean, law_point, own_fit_point, shared_batches  # noqa: E402
from _results import GREY, PAPER, RESULTS, finish, log_ticks, new_figure, write_table  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fleetopt_jax.catalog.engines import engine_entry, engine_points  # noqa: E402
from fleetopt_jax.catalog.llms import at_precision, llm_entry  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.laws.llm import dense_bytes, expert_bytes, expert_coverage  # noqa: E402
from fleetopt_jax.published.tables import reproduce  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402

MOE, DENSE, TASK = "Qwen3-235B-A22B", "Llama-3-70B", "lm-arena-chat"
MOE_NAME, DENSE_NAME = "qwen3-235b-a22b", "llama-3.1-70b"
WHO = ("measured", "law", "own_fit")
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # of Qwen3's instances, as they come
PAPER_TOKENS, PAPER_BATCH = 8192, 24  # table 2: window, and the 24 sequences it lets Qwen3 hold on H100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    groups = defaultdict(list)
    for row in read_rows(folder):
        if row.task == TASK and row.architecture in (MOE, DENSE) and not row.host_bound:
            groups[row.gpu, row.architecture, row.precision, row.tp].append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: row.batch)
    tok_per_j = {row: _tok_per_j(folder, row) for rows in groups.values() for row in rows}
    lines = _compare(groups, tok_per_j)
    columns = ["gpu", "precision_moe", "tp_moe", "tp_dense", "batch", "expert_coverage"]
    columns += [f"{name}_{who}" for who in WHO for name in ("tok_per_j_moe", "tok_per_j_dense", "ratio")]
    write_table("moe_against_dense.csv", columns, lines)
    paper = _paper_ratio()
    save_figure(_figure(lines, paper), RESULTS / "moe_against_dense")
    _report(groups, tok_per_j, lines, paper)


def _tok_per_j(folder: Path, row: Row) -> tuple[float, float, float | None]:
    """Measured, by the law, by the own fit."""
    own = own_fit_point(row)
    return row.tok_per_j, law_point(folder, row).tok_per_j, own.tok_per_j if own else None


def _compare(groups: dict, tok_per_j: dict) -> list[list]:
    share = float(_llm(MOE_NAME).expert_share)
    lines = []
    for gpu, architecture, precision, tp in sorted(groups, reverse=True):
        if architecture != MOE:
            continue
        moe = groups[gpu, architecture, precision, tp]
        (dense_tp,) = (other for on, name, _, other in groups if (on, name) == (gpu, DENSE))
        dense = groups[gpu, DENSE, "bf16", dense_tp]
        for batch in shared_batches(moe, dense):
            line = [gpu, precision, tp, dense_tp, batch, float(expert_coverage(share, batch))]
            for i in range(len(WHO)):
                both = None
                if None not in (tok_per_j[moe[0]][i], tok_per_j[dense[0]][i]):
                    both = [at_batch(rows, lambda row, i=i: tok_per_j[row][i], batch) for rows in (moe, dense)]
                line += [*both, both[0] / both[1]] if both else [None] * 3
            lines.append(line)
    return lines


def _ratio(line: list, who: str) -> float | None:
    return line[6 + 3 * WHO.index(who) + 2]


def _llm(name: str):
    return at_precision(llm_entry(name).architecture, "bf16")


def _paper_ratio() -> float:
    cells = {(cell.row, cell.column): cell.published for cell in reproduce([2]).tables["2"]}
    return cells[MOE_NAME, "h100_tok_per_w"] / cells[DENSE_NAME, "h100_tok_per_w"]


def _figure(lines: list[list], paper: float) -> Figure:
    figure = new_figure(12.6, 4.9)
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.05))
    for axes, gpu in zip(panels, ("h100", "b200")):
        here = [line for line in lines if line[0] == gpu]
        for colour, (precision, tp) in zip(COLOURS, dict.fromkeys((line[1], line[2]) for line in here)):
            chosen = [line for line in here if (line[1], line[2]) == (precision, tp)]
            batches = [line[4] for line in chosen]
            label = f"{precision} on {tp} {gpu.upper()}"
            axes.plot(batches, [_ratio(line, "measured") for line in chosen], "o-", color=colour, ms=4.5, label=label)
            axes.plot(batches, [_ratio(line, "law") for line in chosen], "--", color=colour, linewidth=1.2)
            if _ratio(chosen[0], "own_fit") is not None:
                axes.plot(batches, [_ratio(line, "own_fit") for line in chosen], ":", color=colour, linewidth=1.6)
        axes.plot([], [], "--", color=GREY, label="by the law")
        axes.plot([], [], ":", color=GREY, label="by the own fits")
        axes.axhline(paper, color=PAPER, linewidth=1.5, linestyle="-.", label=f"the paper {paper:.1f}x")
        axes.axhline(1.0, color=GREY, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        log_ticks(axes.xaxis, [8, 16, 32, 64, 128, 256, 512, 1024])
        log_ticks(axes.yaxis, [0.2, 0.3, 0.5, 0.7, 1, 2, 3, 5])
        axes.set_ylim(0.2, 6)
        (dense_tp,) = {line[3] for line in here}
        finish(axes, x="sequences in flight, equal on both instances", y="tokens per joule over Llama-3.1-70B's")
        axes.set_title(f"Qwen3-235B over Llama-70B (bf16 on {dense_tp} {gpu.upper()})", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(0.0, 0.72))
    _draw_coverage(panels[2])
    ratios = [_ratio(line, "measured") for line in lines]
    figure.suptitle(
        f"Qwen3-235B-A22B gives {min(ratios):.2f} to {max(ratios):.2f}x the tokens per joule of Llama-3.1-70B, "
        f"not {paper:.1f}x:\na batch touches nearly all experts, so a step streams far more than the active parameters",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def _draw_coverage(axes) -> None:
    share, n = float(_llm(MOE_NAME).expert_share), 2 ** np.linspace(0, 11, 200)
    axes.plot(n, 100 * np.asarray(expert_coverage(share, n)), color="black", linewidth=1.8)
    for at, beside in ((1, (1.4, 4.2)), (PAPER_BATCH, (30, 80)), (128, (44, 91))):
        covered = float(expert_coverage(share, float(at)))
        axes.plot(at, 100 * covered, "o", color="black", ms=5)
        text = f"{at} sequence{'s' * (at > 1)}: {covered:.0%}, {_step_gb(at):.0f} GB"
        axes.text(*beside, text, fontsize=8.5, va="top")
    axes.axhline(100 * share, color=PAPER, linestyle="-.", linewidth=1.5)
    axes.text(2048, 100 * share + 2, "what the paper streams", color=PAPER, fontsize=9, ha="right")
    axes.set_xscale("log", base=2)
    log_ticks(axes.xaxis, [1, 4, 16, 64, 256, 1024])
    axes.set_ylim(0, 104)
    finish(axes, x="sequences in flight", y="experts that a step streams [%]")
    dense_gb = float(dense_bytes(_llm(DENSE_NAME))) / 1e9
    axes.set_title(f"What a step streams, bf16 (Llama-70B: {dense_gb:.0f} GB)", loc="left", fontsize=10)


def _step_gb(batch: float) -> float:
    llm = _llm(MOE_NAME)
    return float(dense_bytes(llm) + expert_coverage(llm.expert_share, batch) * expert_bytes(llm)) / 1e9


def _report(groups: dict, tok_per_j: dict, lines: list[list], paper: float) -> None:
    for gpu in ("h100", "b200"):
        for who in WHO:
            ratios = [_ratio(line, who) for line in lines if line[0] == gpu and _ratio(line, who) is not None]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}, geometric mean {geometric_mean(ratios):.2f}"
            print(f"{gpu}, equal batch, {who}: {spread} ({len(ratios)} points)")
        best = {
            name: [
                max(tok_per_j[r][i] for k, rows in groups.items() if k[:2] == (gpu, name) for r in rows) for i in (0, 1)
            ]
            for name in (MOE, DENSE)
        }
        measured, law = (best[MOE][i] / best[DENSE][i] for i in (0, 1))
        print(f"{gpu}, best against best: measured {measured:.2f}, law {law:.2f}")
    for who in WHO[1:]:
        known = [(_ratio(line, who), _ratio(line, "measured")) for line in lines if _ratio(line, who) is not None]
        print(f"{who}: off by {geometric_mean([max(a / b, b / a) for a, b in known]) - 1:.0%} on average")
    for gpu in ("h100", "b200"):
        points = [
            engine_points(
                engine_entry(EngineSpec(gpu, name, 8, "bf16", own_fit=False)), [PAPER_BATCH], PAPER_TOKENS, 0.0
            )[0]
            for name in (MOE_NAME, DENSE_NAME)
        ]
        moe, dense = points
        print(
            f"law at the paper's setting (8 {gpu.upper()}, bf16, {PAPER_BATCH} sequences of {PAPER_TOKENS}): "
            f"{moe.tok_per_j:.2f} against {dense.tok_per_j:.2f} tok/J, {moe.tok_per_j / dense.tok_per_j:.2f}x"
        )
    print(f"the paper: {paper:.2f}x")


if __name__ == "__main__":
    main()
