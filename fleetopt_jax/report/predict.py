"""What `fleetopt predict` says: benchmarks as predicted, and how far from those that were measured."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleetopt_jax.core.units import MS
from fleetopt_jax.documents.predict import COMPARED, GROUPS, compared
from fleetopt_jax.report.style import (
    BLUE,
    INK,
    MUTED,
    PAPER,
    POOL_COLOURS,
    POOL_MARKERS,
    batch_ticks,
    log_values,
    new_figure,
    plain_numbers,
    say,
    styled,
    ticks_at,
)
from fleetopt_jax.report.tables import new_table
from fleetopt_jax.report.words import (
    gpus_of_instance,
    instance_said,
    percent,
)

Point = Mapping[str, Any]
SHOWN = {  # quantity: its title, unit, and the unit in SI
    "ttft_s": ("mean TTFT", "ms", MS),
    "ttft_p99_s": ("P99 TTFT", "ms", MS),
    "tpot_s": ("mean TPOT", "ms", MS),
    "output_tok_per_s": ("output of the instance", "tok/s", 1.0),
    "output_tok_per_s_per_gpu": ("output of a GPU", "tok/s", 1.0),
    "power_w": ("power of the instance", "W", 1.0),
    "tok_per_j": ("tokens per joule", "tok/J", 1.0),
    "j_per_request": ("energy of a request", "J", 1.0),
}
SHORT = {"ttft_s": "TTFT", "tpot_s": "TPOT", "output_tok_per_s": "tok/s", "power_w": "W"}
CURVES = ("ttft_s", "tpot_s", "output_tok_per_s_per_gpu", "tok_per_j")
LISTED = 30  # points of a file that are shown one by one
CONFIGURATION = ("gpu", "llm", "tp", "ep", "dp", "pp", "precision", "serving", "isl", "osl")


def predict_table(document: Mapping[str, Any]) -> RenderableType:
    """The benchmarks side by side; of a file, the errors of its rows by configuration."""
    points, parts = document["points"], []
    if any(point["row"] is not None for point in points) or document["skipped"]:
        if points and len(points) <= LISTED:
            parts.append(_rows(points))
        if document["errors"]:
            parts.append(_errors(document["errors"]))
        return Group(*parts, *_left_out(document))
    return Group(_side_by_side(points), Text(_protocol(points[0])), Text(_trust(points[0]), style="dim"))


def _side_by_side(points: Sequence[Point]) -> RenderableType:
    table = new_table("In flight", *(f"{point['concurrency']:,}" for point in points), title=_title(points[0]))
    _whole(table)
    for name, (title, unit, size) in SHOWN.items():
        cells = []
        for point in points:
            ends = point["intervals"].get(name)
            within = "" if ends is None else f"\n{_short(ends[0] / size)} to {_short(ends[1] / size)}"
            cells.append(f"{_short(point[name] / size)} {unit}{within}")
        table.add_row(title, *cells)
    return table


def _rows(points: Sequence[Point]) -> RenderableType:
    """One line a point: predicted, and measured in brackets. What is the same of all is said above."""
    names = [name for name in COMPARED if any(compared(p, name) for p in points)] or list(COMPARED[:2])
    engines = [f"{point['llm']} {point['precision']} on {instance_said(point)}" for point in points]
    of_one = len(set(engines)) == 1
    heads = [f"{SHORT[name]} [{SHOWN[name][1]}]" if SHOWN[name][2] != 1 else SHORT[name] for name in names]
    title = f"{engines[0]}: predicted (measured)" if of_one else "Predicted (measured)"
    table = new_table("Row", *([] if of_one else ["Engine"]), "In/out", "In flight", *heads, title=title)
    _whole(table)
    for point, engine in zip(points, engines):
        cells = []
        for name in names:
            size, pair = SHOWN[name][2], compared(point, name)
            beside = f" ({_short(pair[1] / size)})" if pair else ""
            cells.append(f"{_short((pair[0] if pair else point[name]) / size)}{beside}")
        lengths, in_flight = f"{point['isl']}/{point['osl']}", f"{point['concurrency']:,}"
        table.add_row(str(point["row"]), *([] if of_one else [engine]), lengths, in_flight, *cells)
    return table


def _whole(table: Table) -> None:
    """No number is broken: a table that is too wide is folded."""
    for column in table.columns:
        column.no_wrap = column.no_wrap or column.justify == "right"


def _errors(errors: Mapping[str, Any]) -> RenderableType:
    """Mean and median error of each configuration."""
    names = [name for name in COMPARED if name in errors["all"]]
    heads = [f"{SHORT[name]} off" for name in names]
    table = new_table("GPU", "LLM", "Serving", "Rows", *heads, title="Off by, mean and median")
    for column in table.columns[1:3]:
        column.justify = "left"
    _whole(table)
    for group in errors["groups"]:
        labels = [str(group[name]) for name in GROUPS.values()]
        table.add_row(*labels, f"{group['n']:,}", *(_off(group.get(name)) for name in names))
    table.add_section()
    table.add_row("all", "", "", f"{errors['all']['n']:,}", *(_off(errors["all"].get(name)) for name in names))
    return table


def _off(error: Mapping[str, float] | None) -> str:
    return "" if error is None else f"{percent(error['mean'])} {percent(error['median'])}"


def _left_out(document: Mapping[str, Any]) -> list[RenderableType]:
    """How many rows were predicted, and why the others were not."""
    skipped = document["skipped"]
    whys = Counter(each["why"] for each in skipped)
    n = len(document["points"])
    lines = [f"{n:,} of {n + len(skipped):,} rows predicted{', left out:' if skipped else '.'}"]
    lines += [f"  {count:,} {why}" for why, count in whys.most_common()]
    return [Text("\n".join(lines))]


def _title(point: Point) -> str:
    return (
        f"{point['llm']} ({point['precision']}) on {instance_said(point)}, {point['serving']}, "
        f"{point['isl']:,} in, {point['osl']:,} out"
    )


def _protocol(point: Point) -> str:
    drawn = f"lengths from {percent(point['length_spread'])} of these up" if point["length_spread"] < 1 else "all alike"
    total = point["n_requests"] / point["concurrency"]
    return f"Closed loop: all sent at once, {total:g} x as many requests as in flight, {drawn}; first wave in the TTFT."


def _trust(point: Point) -> str:
    return f"Below each figure the 90 % interval of the engine's errors. Quality: {point['quality']}."


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------------------ figures


@styled
def predict_figure(document: Mapping[str, Any]) -> Figure:
    """Curves over the requests in flight; of measured rows, predicted against measured as well."""
    points = document["points"]
    return _against(document) if document["errors"] else _curves_alone(points)


def _against(document: Mapping[str, Any]) -> Figure:
    """Above, every row that was measured; beneath, the configuration with the most rows over its concurrency."""
    points, errors = document["points"], document["errors"]["all"]
    names = [name for name in COMPARED if name in errors][:2]
    figure = new_figure(10.4, 9.0)
    upper, lower = figure.subplots(2, 2)
    for axes, name in zip(upper, names):
        _scatter(axes, points, name)
    for axes in upper[len(names) :]:
        axes.set_axis_off()
    fullest = _fullest(points)
    beneath = [name for name in names if any(compared(point, name) for point in fullest)] or list(CURVES[:2])
    for axes, name in zip(lower, (*beneath, *(each for each in CURVES if each not in beneath))):
        _curve(axes, fullest, name)
    upper[0].legend(loc="upper left")
    engine, _, load = _title(fullest[0]).partition(", ")
    for axes in lower:
        axes.set_xlabel(f"requests in flight: {engine},\n{load}")
    lower[0].legend(loc="upper left")
    off = ", ".join(f"{SHOWN[name][0]} off by {percent(errors[name]['mean'])}" for name in names)
    say(figure, f"{errors['n']:,} measured points: {off} on average\n({_medians(errors, names)} in the median)")
    return figure


def _medians(errors: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(percent(errors[name]["median"]) for name in names)


def _scatter(axes, points: Sequence[Point], name: str) -> None:
    title, unit, size = SHOWN[name]
    groups: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if pair := compared(point, name):
            groups.setdefault(point["gpu"], []).append((pair[1] / size, pair[0] / size))
    everything = np.array([pair for pairs in groups.values() for pair in pairs])
    low, high = everything.min() / 1.3, everything.max() * 1.3
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1.0)
    for (gpu, pairs), colour, marker in zip(sorted(groups.items()), _repeated(POOL_COLOURS), _repeated(POOL_MARKERS)):
        look = {"color": colour, "markersize": 4.5, "alpha": 0.6, "label": gpu.upper()}
        axes.plot(*np.array(pairs).T, marker, linestyle="none", **look)
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        ticks_at(axis, log_values(low, high))
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel(f"measured {title} [{unit}]")
    axes.set_ylabel(f"predicted [{unit}]")


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [*values] * 4


def _fullest(points: Sequence[Point]) -> list[Point]:
    """The points of the configuration that has the most concurrencies, in their order."""
    groups: dict[tuple, dict[int, Point]] = {}
    for point in points:
        groups.setdefault(tuple(point[name] for name in CONFIGURATION), {}).setdefault(point["concurrency"], point)
    most = max(groups.values(), key=len)
    return [most[concurrency] for concurrency in sorted(most)]


def _curves_alone(points: Sequence[Point]) -> Figure:
    figure = new_figure(10.4, 7.6)
    fullest = _fullest(points)
    panels = figure.subplots(2, 2)
    for axes, name in zip(panels.flat, CURVES):
        _curve(axes, fullest, name)
    panels[0, 0].legend(loc="upper left")
    best = max(fullest, key=lambda point: point["tok_per_j"])
    say(
        figure,
        f"{_title(best)}: {best['tok_per_j']:.3g} tokens per joule with {best['concurrency']:,} in flight, "
        f"at {_short(best['tpot_s'] / MS)} ms a token",
    )
    return figure


def _curve(axes, points: Sequence[Point], name: str) -> None:
    """One quantity over the requests in flight, with its interval, and what was measured."""
    title, unit, size = SHOWN[name]
    at = [point["concurrency"] for point in points]
    values = np.array([point[name] for point in points]) / size
    axes.plot(at, values, "o-", color=BLUE, label="predicted")
    of, share = (
        (name.removesuffix("_per_gpu"), 1.0 / gpus_of_instance(points[0])) if name.endswith("_per_gpu") else (name, 1.0)
    )
    ends = np.array([point["intervals"][of] for point in points]).T * share / size
    axes.fill_between(at, *ends, color=BLUE, alpha=0.12, linewidth=0, label="90 % by the engine's errors")
    seen = [(point["concurrency"], pair[1] / size) for point in points if (pair := compared(point, name))]
    if seen:
        axes.plot(*zip(*seen), "h", color=INK, markerfacecolor=PAPER, linestyle="none", label="measured", zorder=5)
    axes.set_title(f"{title} [{unit}]", loc="left")
    axes.set_ylim(bottom=0)
    plain_numbers(axes.yaxis)
    batch_ticks(axes, min(at), max(at))
    axes.set_xlabel("requests in flight")
