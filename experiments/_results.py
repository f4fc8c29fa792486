"""How results are kept: CSV to six digits, figures in the library's style."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fleetopt_jax.core.files import write_whole
from fleetopt_jax.report.style import BLUE, GREEN, GRID, MUTED, PURPLE, plain, ticks_at, tokens_k

RESULTS = Path(__file__).parent / "results"
GREY = MUTED
MEASURED, LAW, OWN_FIT, PAPER = "black", BLUE, GREEN, PURPLE  # GPUs keep report's colours


def write_table(name: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """results/`name`: floats to six digits, so that it is the same on any machine; nothing where nothing is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if x is None else f"{x:.6g}" if isinstance(x, float) else x for x in row])
    write_whole(RESULTS / name, text.getvalue())


def read_table(name: str) -> list[dict[str, Any]]:
    """The rows of results/`name`: whole numbers, other numbers and text; none where nothing is written yet."""

    def read(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text or None

    if not (RESULTS / name).exists():
        return []
    with (RESULTS / name).open(newline="") as file:
        return [{key: read(value) for key, value in row.items()} for row in csv.DictReader(file)]


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def finish(axes, *, x: str, y: str, title: str = "") -> None:
    """Labels, grid, no box."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def log_ticks(axis, values: Sequence[float], *, kilo: bool = False) -> None:
    """Label a logarithmic axis at these values only; `kilo`: in 1024s, as context windows are named."""
    ticks_at(axis, values, tokens_k if kilo else plain)
