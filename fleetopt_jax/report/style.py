"""The one style of every figure: colours that survive colour blindness, plain numbers, the takeaway as the title.

Figures are made to be read at half their size. `styled` goes on every function that draws; what a user typed is text,
never markup.
"""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, cast

from matplotlib import rc_context
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

INK, MUTED, GRID, PAPER = "#1a1a1a", "#555555", "#dddddd", "#fefefe"  # a page may give these other values
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"  # Okabe
MORE, LESS = BLUE, VERMILLION  # gains and losses
COLOURS = {"h100": BLUE, "b200": VERMILLION, "neutral": MUTED}
MARKERS = {"h100": "o", "b200": "s"}
POOL_COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE)
POOL_MARKERS = ("o", "s", "^", "D", "v", "P")
POOL_LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)))
POOL_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---")

STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.titlesize": 13,
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,  # as in texts
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 7,
    "text.color": INK,
    "text.parse_math": False,  # a dollar is a dollar
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
styled = rc_context(STYLE)
TITLE_LETTERS_PER_INCH = 9.6


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of these inches."""
    return Figure(figsize=(width, height))


def say(figure: FigureBase, takeaway: str) -> None:
    """The takeaway as the title, broken into lines that fit."""
    root = cast(Figure, figure.figure)  # of a part of a figure, all of it
    width = int(TITLE_LETTERS_PER_INCH * root.get_figwidth())
    lines = [wrapped for line in takeaway.split("\n") for wrapped in textwrap.wrap(printable(line), width)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left")


def printable(text: str) -> str:
    """Text without the control characters that neither a figure nor a page can hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def grid_along(axes, which: str) -> None:
    """Grid lines for the values of one axis only, "x" or "y"."""
    axes.grid(False, axis="y" if which == "x" else "x")


def plain(value: float) -> str:
    """A number in full, whatever its size: '0.05', '20,000'; no power of ten."""
    digits = 4 if abs(value) >= 1 else 6 if abs(value) >= 1e-3 else 12
    return f"{round(value, digits) + 0.0:,.{digits}f}".rstrip("0").rstrip(".")  # and no -0


def plain_numbers(axis) -> None:
    """Ticks where matplotlib puts them, as plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def ticks_at(axis, values: Sequence[float], label: Callable[[float], str] = plain) -> None:
    """Ticks at these values and no others, as plain numbers."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def tokens_k(tokens: float) -> str:
    """A context window as windows are named, in units of 1,024 tokens."""
    return f"{tokens / 1024:g}K"


def log_values(low: float, high: float) -> list[float]:
    """Round values from `low` to `high` > 0 for a logarithmic axis, the fewer a decade the more decades."""
    ratio = high / low
    steps = (1,) if ratio > 3e3 else (1, 3) if ratio > 100 else (1, 2, 5) if ratio > 8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    values = [step * 10.0**decade for decade in range(-9, 13) for step in steps]
    return [value for value in values if low <= value <= high]


def batch_ticks(axes, low: float, high: float) -> None:
    """A logarithmic axis of sequences in flight, in powers of two: of less than one, where an instance idles."""
    axes.set_xscale("log", base=2)
    powers = [2.0**power for power in range(-20, 21) if low / 1.1 <= 2.0**power <= high * 1.1]
    ticks_at(axes.xaxis, powers[:: 1 + len(powers) // 8])
