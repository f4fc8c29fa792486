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
    MARKERS,
    MUTED,
    PAPER,
    STYLE,
    new_figure,
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
