"""How results are kept: CSV to six digits, figures in the library's style."""

import csv
import io
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from fleetopt_jax.core.files import write_whole
from fleetopt_jax.report.style import BLUE, GREEN, GRID, MUTED, PURPLE, plain, ticks_at, tokens_k

RESULTS = Path(__file__).parent / "results"
GREY = MUTED
Case = TypeVar("Case")
CASES_OF_PROCESS = 4  # compiled code of every shape would use up the memory maps of a process
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


def kept_rows(
    name: str,
    cases: Sequence[Case],
    row_of: Callable[[Case], dict[str, Any]],
    *,
    key_of: Callable[[Case], dict[str, Any]],
    processes: int,
    together: int = 1,
) -> list[dict[str, Any]]:
    """A row of each case, in their order: those that results/`name` has, by the columns that `key_of` gives, and the
    others, which `row_of` finds in new processes, so many cases `together`; kept as they are found, so that what ended
    goes on."""

    def those_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        keys = [key_of(case).items() for case in cases]
        return [row for key in keys for row in rows if key <= row.items()]

    rows = those_of(read_table(name))
    left = [case for case in cases if not any(key_of(case).items() <= row.items() for row in rows)]
    # New processes, which JAX's threads do not survive a fork in.
    with get_context("spawn").Pool(processes, maxtasksperchild=CASES_OF_PROCESS) as pool:
        for row in pool.imap_unordered(row_of, left, chunksize=together):
            print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr, flush=True)
            rows = those_of([*rows, row])
            write_table(name, list(row), [[each[column] for column in row] for each in rows])
    return rows


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
