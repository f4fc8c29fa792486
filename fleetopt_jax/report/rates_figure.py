"""The rate by hour as a figure, of the document of `fleetopt trace`."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from fleetopt_jax.core.units import DAY_S, HOUR_S
from fleetopt_jax.report.rates import by_stretch, clock, is_calendar, per_s, stretch
from fleetopt_jax.report.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    VERMILLION,
    grid_along,
    new_figure,
    say,
    styled,
    ticks_at,
)

MOST_TICKS = 13
MOST_DAYS_IN_HOURS = 1.6 * DAY_S  # shorter traces have ticks of hours


@styled
def rates_figure(document: Mapping[str, Any]) -> Figure:
    """Requests a second by hour with the mean, the 95th percentile and the busiest hour; below, mean lengths by hour.
    Pale: hours in which the trace begins or ends."""
    figure = new_figure(9.2, 6.0)
    draw_rates(figure, document)
    return figure


def draw_rates(figure: FigureBase, document: Mapping[str, Any]) -> None:
    """The same in a figure or a part of one."""
    bins = document["rate_by_hour"]
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3.0, 1.2, 1.2))
    edges_s = np.array([*(each["start_s"] for each in bins), bins[-1]["start_s"] + document["bin_s"]])
    _rates(panels[0], document, edges_s)
    for axes, name, colour in ((panels[1], "prompt", BLUE), (panels[2], "output", ORANGE)):
        values = [each[f"mean_{name}_tokens"] or np.nan for each in bins]
        axes.stairs(values, edges_s, baseline=None, color=colour, linewidth=1.8)
        axes.set_ylim(0, 1.15 * np.nanmax(values))
        axes.set_ylabel(f"{name}\n[tokens]")
        axes.yaxis.set_major_locator(MaxNLocator(3))
        grid_along(axes, "y")
    time_ticks(panels[-1], edges_s, document["bin_s"])
    say(figure, rates_takeaway(document))
    figure.align_ylabels(panels)


def rates_takeaway(document: Mapping[str, Any]) -> str:
    """The busiest hour."""
    busiest, length_s = document["busiest"], document["bin_s"]
    return (
        f"{document['name']}: the busiest {stretch(length_s)}, {clock(busiest['start_s'], length_s)}, has "
        f"{document['peak_over_mean']:.2f} times the mean rate"
    )


def _rates(axes, document: Mapping[str, Any], edges_s: np.ndarray) -> None:
    bins, busiest = document["rate_by_hour"], document["busiest"]["start_s"]
    rates = np.array([each["rate_per_s"] for each in bins])
    whole = np.array([each["whole"] for each in bins])
    peak = np.array([each["start_s"] == busiest for each in bins])
    for chosen, colour, alpha in ((whole & ~peak, BLUE, 1.0), (~whole, MUTED, 0.35), (peak, VERMILLION, 1.0)):
        axes.stairs(np.where(chosen, rates, 0.0), edges_s, fill=True, color=colour, alpha=alpha, linewidth=0)
    mean = sum(each["n_requests"] for each in bins) / sum(each["covered_s"] for each in bins)
    p95 = document["p95_rate_per_s"]
    axes.axhline(mean, color=INK, linestyle="--", linewidth=1.3, label=f"mean {per_s(mean)}/s")
    if p95 < rates[peak][0]:  # not so of fewer than 20 bins
        axes.axhline(p95, color=MUTED, linestyle=":", linewidth=1.6, label=f"95 % of the time at most {per_s(p95)}/s")
    axes.stairs([], [0], fill=True, color=VERMILLION, label=f"busiest {per_s(rates[peak][0])}/s")
    axes.set_xlim(edges_s[0], edges_s[-1])
    axes.set_ylim(0, 1.25 * rates[whole].max())
    axes.set_ylabel(f"requests a second,\n{by_stretch(document['bin_s'])}")
    grid_along(axes, "y")
    axes.legend(loc="upper left", ncols=3)


def time_ticks(axes, edges_s: np.ndarray, bin_s: float) -> None:
    """Round times of the clock: hours and minutes of a day, or whole days."""
    span_s = edges_s[-1] - edges_s[0]
    if span_s <= MOST_DAYS_IN_HOURS:
        steps: Sequence[float] = (60, 300, 600, 900, 1800, HOUR_S, 2 * HOUR_S, 3 * HOUR_S, 6 * HOUR_S)
        label, axis = (
            _hour_and_minute,
            "time of day" if is_calendar(edges_s[0]) else "time on the trace's clock [h:min]",
        )
    else:
        steps = tuple(days * DAY_S for days in (1, 2, 5, 7, 14, 30, 60, 120, 365, 3650, 36500))
        label, axis = _day, "day"
    step = next((step for step in steps if span_s / step <= MOST_TICKS), steps[-1])
    first = np.ceil(edges_s[0] / step) * step
    ticks_at(axes.xaxis, list(np.arange(first, edges_s[-1] + 1e-6 * bin_s, step)), label)
    axes.set_xlabel(axis)


def _hour_and_minute(at_s: float) -> str:
    minutes = round(at_s / 60)
    return f"{minutes // 60 % 24}:{minutes % 60:02d}"


def _day(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s, UTC):%b %d}" if is_calendar(at_s) else f"{round(at_s / DAY_S) + 1}"
