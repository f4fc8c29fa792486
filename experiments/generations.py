"""What a new GPU generation gains: tokens per joule of B200 over H100, measured and predicted.

    python experiments/generations.py FOLDER

The paper (The 1/W Law, arXiv 2603.17280v1) gives B200 1.7 times the tokens per watt of H100 (table 1 at 8K, each GPU
at its own full batch), from an engine scaled by data sheets. Measured: the ML.ENERGY Benchmark v3, an LLM at one
precision in one task on both GPUs. At equal batch per instance: every batch measured on B200, against H100 at that
batch by a straight line between its measured ones in logarithms, for every pair of instance sizes. Best against best:
the most tokens per joule of any instance size and batch on either GPU. Rows bound by the host are left out. The law and
the own fits predict the same points; the best ones they choose themselves.
"""

import argparse
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import median

import jax

jax.config.update("jax_enable_x64", True)

from _mlenergy import Row, read_rows  # noqa: E402
from _predictions import at_batch, geometric_mean, law_point, own_fit_point, shared_batches  # noqa: E402
from _results import GREY, LAW, MEASURED, PAPER, RESULTS, finish, log_ticks, new_figure, write_table  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fleetopt_jax.published.tables import reproduce  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402

SIZES = {  # GPUs of the B200 instance against those of the H100 one: label, colour, marker
    "fewer": ("B200 instance of half the GPUs or fewer", "#0072B2", "o"),
    "equal": ("of as many GPUs", "#D55E00", "s"),
    "more": ("of twice the GPUs", "#009E73", "^"),
}
WHO = ("measured", "law", "own_fit")
TASKS = {"lm-arena-chat": "chat", "gpqa": "reasoning", "sourcegraph-fim": "infill"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    groups = defaultdict(list)
    for row in read_rows(folder):
        if not row.host_bound:
            groups[(row.task, row.model, row.precision), row.gpu, row.tp].append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: row.batch)
    tok_per_j = {row: _tok_per_j(folder, row) for rows in groups.values() for row in rows}
    equal, best = _equal_batch(groups, tok_per_j), _best(groups, tok_per_j)
    gains = [f"gain_{who}" for who in WHO]
    columns = ["task", "model", "precision", "tp_h100", "tp_b200", "batch", *gains]
    write_table("generations.csv", columns, [[*line[:6], *line[6]] for line in equal])
    tops = [f"{name}_{gpu}" for gpu in ("h100", "b200") for name in ("tp", "batch", "tok_per_j")]
    lines = [[*key, *h100, *b200, *values] for key, h100, b200, values in best]
    write_table("generations_best.csv", ["task", "model", "precision", *tops, *gains], lines)
    paper = _paper_gain()
    save_figure(_figure(equal, best, paper), RESULTS / "generations")
    _report(equal, best, paper)


def _tok_per_j(folder: Path, row: Row) -> tuple[float, float, float | None]:
    """Measured, by the law, by the own fit."""
    own = own_fit_point(row)
    return row.tok_per_j, law_point(folder, row).tok_per_j, own.tok_per_j if own else None


def _equal_batch(groups: dict, tok_per_j: dict) -> list[tuple]:
    """(task, model, precision, GPUs of H100, of B200, batch, gains)."""
    lines = []
    for (llm, gpu, tp), (other_llm, other_gpu, other_tp) in product(sorted(groups), repeat=2):
        if (gpu, other_gpu) != ("h100", "b200") or llm != other_llm:
            continue
        old, new = groups[llm, gpu, tp], groups[llm, other_gpu, other_tp]
        for batch in shared_batches(new, old):
            values = [
                at_batch(new, lambda row, i=i: tok_per_j[row][i], batch)
                / at_batch(old, lambda row, i=i: tok_per_j[row][i], batch)
                if None not in (tok_per_j[new[0]][i], tok_per_j[old[0]][i])
                else None
                for i in range(len(WHO))
            ]
            lines.append((*llm, tp, other_tp, batch, values))
    return lines


def _best(groups: dict, tok_per_j: dict) -> list[tuple]:
    """((task, model, precision), (GPUs, batch, tok/J) of H100, of B200, gains)."""
    lines = []
    for llm in sorted({llm for llm, _, _ in groups}):
        rows = {
            gpu: [r for (of, on, _), group in groups.items() if (of, on) == (llm, gpu) for r in group]
            for gpu in ("h100", "b200")
        }
        if not all(rows.values()):
            continue
        tops = [[_top(rows[gpu], tok_per_j, i) for gpu in ("h100", "b200")] for i in range(len(WHO))]
        values = [b200[1] / h100[1] if h100 and b200 else None for h100, b200 in tops]
        lines.append((llm, *((row.tp, row.batch, value) for row, value in tops[0]), values))
    return lines


def _top(rows: list[Row], tok_per_j: dict, i: int) -> tuple[Row, float] | None:
    """The best row by the i-th of WHO; None where it does not know every row."""
    if any(tok_per_j[row][i] is None for row in rows):
        return None
    row = max(rows, key=lambda row: tok_per_j[row][i])
    return row, tok_per_j[row][i]


def _paper_gain() -> float:
    """B200 over H100 in table 1, at 8K."""
    cells = {(cell.row, cell.column): cell.published for cell in reproduce([1]).tables["1"]}
    return cells["8192", "b200_tok_per_w"] / cells["8192", "h100_tok_per_w"]


def _size(tp: int, other_tp: int) -> str:
    return "fewer" if other_tp < tp else "equal" if other_tp == tp else "more"


def _figure(equal: list[tuple], best: list[tuple], paper: float) -> Figure:
    figure = new_figure(11.4, 5.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for size, (label, colour, marker) in SIZES.items():
        points = [(line[5], line[6][0]) for line in equal if _size(line[3], line[4]) == size]
        left.plot(*zip(*points), marker, color=colour, ms=5, alpha=0.75, mew=0, label=f"{label} ({len(points)})")
    mean = geometric_mean([line[6][0] for line in equal])
    law = geometric_mean([line[6][1] for line in equal])
    left.axhline(mean, color=MEASURED, linewidth=1.5, label=f"measured, geometric mean {mean:.2f}x")
    left.axhline(law, color=LAW, linewidth=1.5, linestyle="-.", label=f"law, geometric mean {law:.2f}x")
    left.axhline(paper, color=PAPER, linewidth=1.5, linestyle="--", label=f"the paper {paper:.1f}x")
    left.axhline(1.0, color=GREY, linewidth=0.8)
    left.set_xscale("log", base=2)
    log_ticks(left.xaxis, [8, 16, 32, 64, 128, 256, 512, 1024])
    left.set_yscale("log")
    log_ticks(left.yaxis, [0.8, 1, 1.25, 1.5, 2, 2.5, 3])
    left.set_ylim(0.8, 3.6)
    left.legend(frameon=False, fontsize=8.5, loc="upper left")
    finish(left, x="sequences in flight, equal on both instances", y="tokens per joule, B200 over H100")
    left.set_title(f"At equal batch: {mean:.2f}x", loc="left", fontsize=10)
    order = sorted(best, key=lambda line: line[3][0])
    names = [
        f"{line[0][1].split('/')[-1].replace('-Instruct', '').replace('-2507', '')}, {TASKS[line[0][0]]}"
        for line in order
    ]
    for i, (who, colour, face) in enumerate((("law", LAW, "white"), ("measured", MEASURED, MEASURED))):
        gains = [line[3][WHO.index(who)] for line in order]
        right.plot(
            gains, range(len(order)), "D" if i == 0 else "o", color=colour, mfc=face, ms=5.5, label=who, zorder=3
        )
    right.axvline(paper, color=PAPER, linewidth=1.5, linestyle="--", label=f"the paper {paper:.1f}x")
    right.axvline(1.0, color=GREY, linewidth=0.8)
    right.set_yticks(range(len(order)), names, fontsize=8.5)
    right.legend(frameon=False, fontsize=8.5, loc="lower right")
    finish(right, x="best tokens per joule, B200 over H100", y="")
    top = median([line[3][0] for line in best])
    right.set_title(f"Best against best: {top:.2f}x in the median", loc="left", fontsize=10)
    figure.suptitle(
        f"B200 gives {mean:.2f}x the tokens per joule of H100 at equal batch, {top:.2f}x best against best (median):\n"
        f"most of the gain is the larger batch that its memory holds, which the paper's {paper:.1f}x takes for granted",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def _report(equal: list[tuple], best: list[tuple], paper: float) -> None:
    for name, lines, at in (("equal batch", equal, 6), ("best against best", best, 3)):
        for i, who in enumerate(WHO):
            known = [line[at][i] for line in lines if line[at][i] is not None]
            both = [line[at][0] for line in lines if line[at][i] is not None]
            beside = f", measured there {geometric_mean(both):.2f}x" if len(known) < len(lines) else ""
            error = geometric_mean([max(a / b, b / a) for a, b in zip(known, both)]) - 1
            told = f", off by {error:.0%} on average" if i else ""
            spread = f"{min(known):.2f} to {max(known):.2f}"
            means = f"geometric mean {geometric_mean(known):.2f}x, median {median(known):.2f}x"
            print(f"{name}, {who}: {means} ({spread}, {len(known)} points{beside}){told}")
    for size, (label, _, _) in SIZES.items():
        chosen = [line[6] for line in equal if _size(line[3], line[4]) == size]
        measured, law = (geometric_mean([values[i] for values in chosen]) for i in (0, 1))
        print(f"equal batch, {label}: measured {measured:.2f}x, law {law:.2f}x ({len(chosen)} points)")
    for low, high in ((0, 24), (24, 100), (100, 2000)):
        chosen = [line[6] for line in equal if low <= line[5] < high]
        measured, law = (geometric_mean([values[i] for values in chosen]) for i in (0, 1))
        print(f"equal batch of {low} to {high}: measured {measured:.2f}x, law {law:.2f}x ({len(chosen)} points)")
    print(f"the paper, table 1 at 8K: {paper:.2f}x")


if __name__ == "__main__":
    main()
