"""Figures in one style: units on the axes, colours that survive colour blindness, the takeaway as the title."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fleetopt_jax.report.files import write_whole

COLOURS = {"h100": "#0072B2", "b200": "#D55E00", "neutral": "#555555"}  # Okabe and Ito
MARKERS = {"h100": "o", "b200": "s"}


def one_over_w_figure(
    windows: Sequence[float], tok_per_w: Mapping[str, Sequence[float]], published: Mapping[str, Sequence[float]]
) -> Figure:
    """tok/W against the context window: the law as a line, the printed table as points, ideal 1/W dashed."""
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    for gpu, values in tok_per_w.items():
        axes.plot(windows, values, color=COLOURS[gpu], linewidth=1.8, label=f"{gpu.upper()}, this library")
        axes.plot(
            windows,
            published[gpu],
            MARKERS[gpu],
            color=COLOURS[gpu],
            markerfacecolor="white",
            label="printed (table 1)",
        )
        ideal = [values[0] * windows[0] / window for window in windows]
        axes.plot(windows, ideal, "--", color=COLOURS["neutral"], linewidth=1.0, label=_once(axes, "ideal 1/W"))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(windows)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:g}K"))
    axes.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("context window [tokens]")
    axes.set_ylabel("output tokens per joule\n(one GPU's watts per instance)")
    first, last = _kept_per_doubling(tok_per_w["h100"])
    takeaway = "Doubling the window about halves tokens per joule:\n"
    kept = f"x{first:.2f} from 2K to 4K, x{last:.2f} from 64K to 128K (H100)"
    axes.set_title(takeaway + kept, loc="left", fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_figure(figure: Figure, stem: Path) -> None:
    """Write `stem`.svg and `stem`.png; the same figure gives the same bytes."""
    for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 160})):
        buffer = BytesIO()
        with rc_context({"svg.hashsalt": stem.name}):
            figure.savefig(buffer, format=kind, **options)
        write_whole(stem.with_suffix(f".{kind}"), buffer.getvalue())


def _kept_per_doubling(values: Sequence[float]) -> tuple[float, float]:
    """What the first and the last doubling leave."""
    return values[1] / values[0], values[-1] / values[-2]


def _once(axes, label: str) -> str | None:
    return None if label in axes.get_legend_handles_labels()[1] else label
