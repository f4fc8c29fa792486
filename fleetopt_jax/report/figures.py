"""Figures of the published laws, and how every figure becomes a file."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import check_writable, write_whole
from fleetopt_jax.report.style import (
    COLOURS,
    INK,
    LESS,
    MARKERS,
    MORE,
    MUTED,
    PAPER,
    STYLE,
    grid_along,
    new_figure,
    plain_numbers,
    say,
    styled,
    ticks_at,
    tokens_k,
)


@styled
def one_over_w_figure(
    windows: Sequence[float], tok_per_w: Mapping[str, Sequence[float]], published: Mapping[str, Sequence[float]]
) -> Figure:
    """tok/W against the context window: the law as a line, the printed table as points, ideal 1/W dashed."""
    figure = new_figure(7.4, 5.0)
    axes = figure.subplots()
    last = list(tok_per_w)[-1]
    for gpu, values in tok_per_w.items():
        axes.plot(windows, values, color=COLOURS[gpu], label=f"{gpu.upper()}, this library")
        axes.plot(
            windows,
            published[gpu],
            MARKERS[gpu],
            color=COLOURS[gpu],
            markerfacecolor=PAPER,
            label=f"{gpu.upper()}, printed (table 1)",
        )
        ideal = [values[0] * windows[0] / window for window in windows]
        axes.plot(windows, ideal, "--", color=MUTED, linewidth=1.0, label="ideal 1/W" if gpu == last else None)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks_at(axes.xaxis, windows, tokens_k)
    ticks_at(axes.yaxis, [1, 2, 5, 10, 20, 50])
    axes.set_xlabel("context window [tokens]")
    axes.set_ylabel("output tokens per joule\n(one GPU's watts per instance)")
    first, last = _kept_per_doubling(tok_per_w["h100"])
    takeaway = "Doubling the window about halves tokens per joule:\n"
    say(figure, takeaway + f"x{first:.2f} from 2K to 4K, x{last:.2f} from 64K to 128K (H100)")
    axes.legend()
    return figure


LEDGER_LABELS = {
    "published": "as published",
    "integration": "exact integration",
    "power_scope": "all GPUs counted",
    "lengths": "the trace's lengths",
    "compression": "only prompts shrink",
    "occupancy": "real occupancy",
    "prefill": "prefill costs",
    "kv_cache": "paged KV cache",
    "engine": "measured engine",
    "tail": "TTFT distribution",
    "prefix_cache": "a prefix cache",
}


LEDGER_BASE = 0.9  # where the axis of gains begins
LABEL_GAP = 0.015  # of the axis, between a bar and its label


@styled
def ledger_figure(document: Mapping[str, Any]) -> Figure:
    """The waterfall: FleetOpt's gain after each choice, and what the choice took; the two-pool gain as marks. What a
    prefix cache changes, where one is assumed, comes behind."""
    rows = document["rows"]
    physical = len(rows) - (2 if "prefix_cache" in document else 1)
    figure = new_figure(8.4, 5.4)
    axes = figure.subplots()
    gains = [row["gain"] for row in rows]
    two_pools = [
        row["tok_per_j_two_pool"] / row["tok_per_j_homogeneous"]
        if row["tok_per_j_two_pool"] and row["tok_per_j_homogeneous"]
        else None
        for row in rows
    ]
    known = 1.0  # level of the last row with an answer
    top = 1.12 * max([gain for gain in (*gains, *two_pools) if gain] or [1.0])
    gap = LABEL_GAP * (top - LEDGER_BASE)
    for i, (gain, mark) in enumerate(zip(gains, two_pools)):
        if gain is None:
            axes.text(i, 1.02, "no fleet\nholds the\nlimits", ha="center", fontsize=9.5, color=MUTED)
            continue
        total = i in (0, physical)
        low, high = (1.0, gain) if total else sorted((known, gain))
        colour, hatch = (MUTED, "") if total else (MORE, "") if gain >= known else (LESS, "///")
        look = {"color": colour, "hatch": hatch, "edgecolor": PAPER, "linewidth": 0}
        axes.bar(i, max(high - low, 0.012), bottom=low, width=0.62, **look)
        beneath = gain < known and not total and not (mark and low - 6 * gap < mark < low + gap)
        over = high if not mark or abs(mark - high) > gap else max(mark, high) + gap  # a mark has its place
        at, va = (low - gap, "top") if beneath else (over + gap, "bottom")
        axes.text(i, at, f"{gain:.2f}x", ha="center", va=va, fontsize=11)
        known = gain
    marked = [(i, gain) for i, gain in enumerate(two_pools) if gain is not None]
    if marked:
        axes.plot(*zip(*marked), "D", color=INK, markersize=6, label="two pools, nothing compressed")
    axes.axhline(1.0, color=MUTED, linewidth=1.0)
    labels = [LEDGER_LABELS[row["choice"]] for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylabel("tokens per joule over the\nbest homogeneous fleet")
    axes.set_ylim(LEDGER_BASE, top)
    plain_numbers(axes.yaxis)
    ends = slice(None, physical + 1)
    say(figure, _ledger_takeaway(document, gains[ends], two_pools[ends]))
    grid_along(axes, "y")
    axes.legend(loc="upper right")
    return figure


def _ledger_takeaway(document: Mapping[str, Any], gains: list[float | None], two_pools: list[float | None]) -> str:
    where = f"{document['workload']['name']} on {document['gpu'].upper()}"
    if gains[-1] is None or gains[0] is None:
        return f"{where}: no fleet holds the limits once all is counted"
    alone = f" ({two_pools[-1]:.2f}x without compression)" if two_pools[-1] else ""
    return f"{where}: a gain of {gains[0]:.2f}x as published,\n{gains[-1]:.2f}x with all nine choices physical{alone}"


FIGURE_KINDS = {"svg": {"metadata": {"Date": None}}, "png": {"dpi": 160}}


def save_figure(figure: Figure, stem: Path) -> None:
    """Write `stem`.svg and `stem`.png; the same figure gives the same bytes."""
    for kind in FIGURE_KINDS:
        write_figure(figure, stem.with_suffix(f".{kind}"))


def write_figure(figure: Figure, path: str | Path) -> None:
    """Write one file, of the kind its name ends with."""
    path = Path(path)
    kind = path.suffix[1:].lower()
    buffer = BytesIO()
    settings: dict[Any, Any] = STYLE | {"svg.hashsalt": path.stem}
    with rc_context(settings):  # ticks are made, and so styled, when they are drawn
        figure.savefig(buffer, format=kind, **FIGURE_KINDS[kind])
    write_whole(path, buffer.getvalue(), "--figure")


def check_figure(path: str, option: str = "--figure") -> None:
    """Refuse, before the work is done, a figure that cannot be written."""
    if Path(path).suffix[1:].lower() not in FIGURE_KINDS:
        raise BadInput(
            f"{option} {path}", "unknown kind of file", f"need a name ending in .{' or .'.join(FIGURE_KINDS)}"
        )
    check_writable(path, option)


def _kept_per_doubling(values: Sequence[float]) -> tuple[float, float]:
    """What the first and the last doubling leave."""
    return values[1] / values[0], values[-1] / values[-2]
