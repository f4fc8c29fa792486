"""A sweep's rows as a table and a figure."""

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.core.units import KW
from fleetopt_jax.documents.sweep import STATUSES, axes_of
from fleetopt_jax.report.style import LESS, POOL_COLOURS, POOL_LINES, POOL_MARKERS, new_figure, plain, say, styled
from fleetopt_jax.report.tables import new_table
from fleetopt_jax.report.words import ms

MOST_ROWS = 40  # of the table
MOST_LINES = 6  # of the figure
MOST_MARKERS = 60  # of a line
HELD = ("optimal", "feasible")
TOK_PER_J, GAIN = "metrics.tok_per_j", "metrics.gain_vs_homogeneous"

Row = dict[str, Any]


def sweep_table(table: pa.Table) -> RenderableType:
    """What a sweep comes to, and its first rows."""
    names, rows = list(axes_of(table)), table.slice(0, MOST_ROWS).to_pylist()
    shown = new_table(*names, "tok/J", "Gain", "GPUs", "Power", "P99 TTFT", "Pools")
    for row in rows:
        shown.add_row(*(_said(row[name]) for name in names), *_cells(row))
    notes = ["Gain: tokens per joule over the best one-pool fleet; windows in tokens, 'n x GPU' instances of each."]
    if len(table) > MOST_ROWS:
        notes.append(f"{MOST_ROWS} of {len(table):,} rows: the file, or --show with --json, has all.")
    of = sorted({row["search.candidates"] for row in rows if row["search.candidates"]})
    if of:
        notes.append(f"Searched over {'; '.join(of)}.")
    return Group(Text(sweep_takeaway(table), style="bold"), shown, *(Text(note, style="dim") for note in notes))


def _cells(row: Row) -> list[str]:
    if row["status"] not in HELD:
        return ["-"] * 5 + [row["reason"]]
    gain = row[GAIN]
    windows = [f"{pool['window_tokens']:,}: {pool['n_instances']:,} x {pool['gpu']}" for pool in row["pools"]]
    return [
        f"{row[TOK_PER_J]:.4g}",
        "-" if gain is None else f"{gain:.2f}x",
        f"{row['metrics.n_gpus']:,}",
        f"{row['metrics.power_w'] / KW:,.1f} kW",
        ms(row["metrics.ttft_p99_s"]),
        ", ".join(windows),
    ]


def _said(value: Any) -> str:
    return plain(value) if isinstance(value, (int, float)) else str(value)


def sweep_takeaway(table: pa.Table) -> str:
    """How many scenarios there are, and the best of them."""
    axes, statuses = axes_of(table), table["status"].to_pylist()
    counts = [f"{n:,} {status}" for status in STATUSES if (n := statuses.count(status))]
    text = f"{len(table):,} scenarios: {', '.join(counts)}"
    known = [(value, i) for i, value in enumerate(table[TOK_PER_J].to_pylist()) if value is not None]
    if not known:
        return f"{text}."
    most, i = max(known, key=lambda each: (each[0], -each[1]))
    least, _ = min(known)
    row = table.slice(i, 1).to_pylist()[0]
    where = ", ".join(f"{name} {_said(row[name])}" for name in axes)
    return f"{text}; {least:.3g} to {most:.3g} tok/J, most at {where}."


@styled
def sweep_figure(table: pa.Table) -> Figure:
    """Tokens per joule and the gain over the input with the most numbers, a line for each combination of the others."""
    axes = axes_of(table)
    along = _longest(axes)
    figure = new_figure(8.2, 7.0)
    panels = figure.subplots(2, 1, sharex=True)
    lines = _lines(table, along, [name for name in axes if name != along])
    for panel, (column, label) in zip(panels, ((TOK_PER_J, "tokens per joule"), (GAIN, "gain over one pool"))):
        for k, (name, rows) in enumerate(list(lines.items())[:MOST_LINES]):
            known = [(row[along], row[column]) for row in rows if row[column] is not None]
            style = {"color": POOL_COLOURS[k], "linestyle": POOL_LINES[k], "label": name or None}
            marker = POOL_MARKERS[k] if len(known) <= MOST_MARKERS else None
            panel.plot([x for x, _ in known], [y for _, y in known], marker=marker, **style)
        panel.set_ylabel(label)
    numbers = isinstance(axes[along][0], (int, float))
    without = sorted({row[along] for rows in lines.values() for row in rows if row["status"] not in HELD})
    for k, x in enumerate(without[:MOST_MARKERS] if numbers else ()):
        panels[0].axvline(
            x, color=LESS, linestyle=":", linewidth=1.0, zorder=0, label=None if k else "some without a fleet"
        )
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        panels[0].legend(handles, labels, ncols=2)
    panels[-1].set_xlabel(along)
    more = (
        f"\n{MOST_LINES} of {len(lines):,} combinations of the other inputs are drawn."
        if len(lines) > MOST_LINES
        else ""
    )
    say(figure, sweep_takeaway(table) + more)
    return figure


def _longest(axes: dict[str, list[Any]]) -> str:
    """The input with the most numbers; with the most values, where none are numbers."""
    return max(axes, key=lambda name: (isinstance(axes[name][0], (int, float)), len(axes[name])))


def _lines(table: pa.Table, along: str, others: Sequence[str]) -> dict[str, list[Row]]:
    """The rows of each combination of the other inputs, in order of the one along which they are drawn."""
    columns = table.select([along, *others, "status", TOK_PER_J, GAIN])
    found: dict[str, list[Row]] = {}
    for row in columns.to_pylist():
        found.setdefault(", ".join(f"{name} {_said(row[name])}" for name in others), []).append(row)
    for rows in found.values():
        if all(isinstance(row[along], (int, float)) and math.isfinite(row[along]) for row in rows):
            rows.sort(key=lambda row: row[along])
    return found
