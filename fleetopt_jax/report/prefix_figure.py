"""What caches would find of a trace's prompts as a figure, of the document of `fleetopt trace`."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import LogLocator, NullFormatter

from fleetopt_jax.report.prefix import span_said
from fleetopt_jax.report.rates_figure import draw_rates, rates_figure
from fleetopt_jax.report.style import BLUE, MUTED, ORANGE, grid_along, new_figure, say, styled, ticks_at

TIMES_S = (0.1, 1, 10, 60, 600, 3600, 6 * 3600, 86_400, 7 * 86_400)


@styled
def trace_figure(document: Mapping[str, Any]) -> Figure:
    """The rate by hour, where the trace is long enough, and the hit curve, where prefixes are known."""
    if "prefix" not in document:
        return rates_figure(document)
    if not document["rate_by_hour"]:
        figure = new_figure(9.2, 4.4)
        draw_prefix(figure, document)
        return figure
    figure = new_figure(9.2, 10.4)
    above, below = cast(Sequence[FigureBase], figure.subfigures(2, 1, height_ratios=(6.0, 4.4)))
    draw_rates(above, document)
    draw_prefix(below, document)
    return figure


def draw_prefix(figure: FigureBase, document: Mapping[str, Any]) -> None:
    """The share of prompts that is found, over the size of one cache and over the age that it keeps; dashed, what an
    infinite cache finds."""
    prefix = document["prefix"]
    panels = figure.subplots(1, 2, sharey=True)
    most = prefix["hit_frac_infinite"]
    for axes, name, label in zip(
        panels, ("cache_tokens", "age_s"), ("size of one cache [tokens]", "age of the oldest block"), strict=True
    ):
        x = [max(point[name], 1e-9) for point in prefix["curve"]]
        for share, of, colour in (("hit_frac", "blocks", BLUE), ("hit_token_frac", "tokens", ORANGE)):
            axes.plot(x, [100.0 * point[share] for point in prefix["curve"]], color=colour, label=f"of {of}")
        axes.axhline(100.0 * most, color=MUTED, linestyle="--", linewidth=1.3, label=f"infinite: {most:.1%} of blocks")
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(LogLocator(subs=()))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        grid_along(axes, "y")
        if name == "age_s":
            ticks_at(axes.xaxis, [at for at in TIMES_S if x[0] <= at <= x[-1]], span_said)
        else:
            ticks_at(axes.xaxis, [10.0**k for k in range(16) if x[0] <= 10.0**k <= x[-1]], _tokens)
    panels[0].set_ylim(0.0, 100.0 * min(1.0, 1.45 * max(most, prefix["curve"][-1]["hit_token_frac"], 0.01)))
    panels[0].set_ylabel("found in the cache [%]")
    panels[0].legend(loc="upper left")
    say(figure, f"{document['name']}: {most:.0%} of the blocks of prompts were there before")


def _tokens(tokens: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:g} {unit}"
    return f"{tokens:g}"
