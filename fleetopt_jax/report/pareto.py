"""Pareto fronts and sweeps along one input, as tables, CSV and figures, of the documents that `--json` prints."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, MaxNLocator
from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.core.units import KW, MS
from fleetopt_jax.report.style import (
    BLUE,
    INK,
    LESS,
    MUTED,
    PURPLE,
    VERMILLION,
    log_values,
    new_figure,
    plain,
    plain_numbers,
    say,
    styled,
    ticks_at,
)
from fleetopt_jax.report.tables import new_table
from fleetopt_jax.report.words import (
    QUANTITIES,
    chance,
    instance_said,
    instances_said,
    listed,
    stages_of,
)

FRONT_COLOUR, KNEE_COLOUR, FLEETOPT_COLOUR = BLUE, VERMILLION, PURPLE
LOG_FROM = 6.0  # an axis whose values spread over a larger factor is logarithmic

_SHOWN = {  # of an objective: column, axis
    "tok_per_j": ("tok/J", "output tokens per joule"),
    "ttft_p99_s": ("P99 TTFT", "P99 time to first token [ms]"),
    "usd_per_h": ("Cost", "cost [USD/h]"),
}
_FLEET_COLUMNS = ("GPUs", "Gain", "Instances", "Windows")
CSV_METRICS = (
    *("tok_per_j", "power_w", "usd_per_h", "n_gpus", "n_instances", "gain_vs_homogeneous"),
    *("ttft_p99_worst_pool_s", "ttft_p99_of_all_s", "itl_s"),
)
CSV_POOLS = ("window_tokens", "gamma", "gpu", "tp", "n_instances")


def front_table(document: Mapping[str, Any]) -> RenderableType:
    """What can be had together, the reference fleets beside it, and what the front rests on."""
    if not document["points"]:
        return Text("No fleet holds the limits.")
    names = [objective["name"] for objective in document["objectives"]]
    title = f"{document['workload']['name']} at {document['workload']['arrival_rate_per_s']:,.6g} requests/s"
    others = [name for name in ("tok_per_j", "usd_per_h") if name not in names]
    table = new_table("Plan", *(_SHOWN[name][0] for name in (*names, *others)), *_FLEET_COLUMNS, title=title)
    for i, point in enumerate(document["points"], start=1):
        table.add_row(f"{i} (knee)" if point["knee"] else str(i), *_row(point, names, others))
    table.add_section()
    for key, label in (("homogeneous", "best one-pool fleet"), ("fleetopt", "FleetOpt")):
        if document[key]:
            table.add_row(label, *_row(document[key], names, others))
    volume = document["hypervolume"]
    against = ", ".join(_value(name, value) for name, value in volume["reference"].items())
    missing = volume["missing_at_most"]
    bound = "" if missing is None else f"; points between them could add at most {missing:.3g}"
    notes = [
        f"Gain: tokens per joule over the best one-pool fleet under the same limit. P99 TTFT: "
        f"{document['ttft_is'].removeprefix('P99 TTFT of ')}.",
        f"Hypervolume {volume['value']:.4g} {volume['unit']} ({volume['share_of_box']:.0%} of the box), reference "
        f"{against}: {volume['reference_is']}{bound}.",
        f"Knee: {document['knee_is']}.",
        f"FleetOpt: {document['fleetopt_is']}.",
        f"Method {document['method']}{' (every point certified)' if document['certified'] else ''}, "
        f"{document['search']['n_searches']} searches in {document['search']['wall_s']:.1f} s; assumptions "
        f"'{document['assume']}'.",
    ]
    return Group(
        Text(front_takeaway(document), style="bold"),
        table,
        *(Text(line) for line in off_the_chart(document)),
        *(Text(note, style="dim") for note in notes),
    )


def _row(point: Mapping[str, Any], names: Sequence[str], others: Sequence[str]) -> list[str]:
    metrics, pools = point["plan"]["metrics"], point["plan"]["pools"]
    gain = metrics["gain_vs_homogeneous"]
    return [
        *(_cell(name, point["objectives"][name]) for name in names),
        *(_cell(name, metrics[name]) for name in others),
        f"{metrics['n_gpus']:,}",
        "-" if gain is None else f"{gain:.2f}x",
        *_pools(pools),
    ]


def _pools(pools: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(instances, windows x gamma) of a fleet, pool by pool; the kind of engine once, where all are of one."""
    windows = [f"{pool['window_tokens']:,}" + (f" x {pool['gamma']:g}" if pool["gamma"] > 1 else "") for pool in pools]
    kinds = {instance_said(pool, " ") for pool in pools}
    if len(kinds) == 1 and not any(pool.get("stages") for pool in pools):
        counts = " + ".join(f"{pool['n_instances']:,}" for pool in pools)
        return f"{counts} x {kinds.pop()}", ", ".join(windows)
    return " + ".join(map(instances_said, pools)), ", ".join(windows)


def _cell(name: str, value: float) -> str:
    """A value under a heading that has its unit."""
    return f"{value:.4g}" if name == "tok_per_j" else _value(name, value)


def _value(name: str, value: float) -> str:
    match name:
        case "tok_per_j":
            return f"{value:.4g} tok/J"
        case "ttft_p99_s":
            return f"{value / MS:,.4g} ms" if abs(value) < 10.0 else f"{value:,.4g} s"
        case "usd_per_h":
            return f"${value:,.0f}/h"
        case _:
            return QUANTITIES[name].amount(value)


def front_takeaway(document: Mapping[str, Any]) -> str:
    """What the front says, in one sentence; of the first objective against the second."""
    points = document["points"]
    where = document["workload"]["name"]
    first, second = (objective["name"] for objective in document["objectives"][:2])
    if len(points) == 1:
        return f"{where}: one plan is the best in all of it, {_all_of(points[0])}."
    ends = sorted(points, key=lambda point: point["objectives"][first])
    low, high = (
        " at ".join(_value(name, end["objectives"][name]) for name in (first, second)) for end in (ends[0], ends[-1])
    )
    said = f"{where}: from {low} to {high}"
    turn = next((point for point in points if point["knee"]), None)
    return f"{said}; the knee is {_all_of(turn)}." if turn else f"{said}."


def _all_of(point: Mapping[str, Any]) -> str:
    first, *others = (_value(name, value) for name, value in point["objectives"].items())
    return f"{first} at {' and '.join(others)}"


def off_the_chart(document: Mapping[str, Any]) -> list[str]:
    """What there is to say about reference fleets that cannot be marked, or that no point of the front reaches."""
    limit = f"{document['reference_ttft_limit_s'] / MS:g} ms"
    lines = []
    for key, label in (("homogeneous", "The best one-pool fleet"), ("fleetopt", "FleetOpt")):
        if document[key] is None:
            lines.append(f"{label} is off the chart: it cannot hold the limits (P99 TTFT {limit}).")
    if document["fleetopt"] and document["gamma"] is not None and _beyond(document, document["fleetopt"]):
        lines.append(
            f"FleetOpt lies beyond the front: it compresses prompts, which gamma {document['gamma']:g} "
            "does not; search it with --gamma auto."
        )
    return lines


def _beyond(document: Mapping[str, Any], fleet: Mapping[str, Any]) -> bool:
    """Whether no point of the front is as good as a fleet in everything."""
    senses = {each["name"]: 1.0 if each["better"] == "low" else -1.0 for each in document["objectives"]}
    return not any(
        all(sense * point["objectives"][name] <= sense * fleet["objectives"][name] for name, sense in senses.items())
        for point in document["points"]
    )


def front_csv(document: Mapping[str, Any]) -> str:
    """One line a plan: the front, then the reference fleets; values of pools are joined by |, of two stages by +."""
    names = [objective["name"] for objective in document["objectives"]]
    metrics = [name for name in CSV_METRICS if name not in names]
    rows = [("front", point) for point in document["points"]]
    rows += [(kind, document[kind]) for kind in ("homogeneous", "fleetopt") if document[kind]]
    lines = []
    for kind, point in rows:
        values = point["plan"]["metrics"]
        lines.append(
            [kind, int(point.get("knee", False)), *(point["objectives"][name] for name in names)]
            + [values[name] for name in metrics]
            + _pool_columns(point["plan"])
        )
    return csv_text(["kind", "knee", *names, *metrics, *(f"pool_{name}" for name in CSV_POOLS)], lines)


def _pool_columns(plan: Mapping[str, Any]) -> list[str]:
    return ["|".join(map(partial(_pool_cell, name), plan["pools"])) for name in CSV_POOLS]


def _pool_cell(name: str, pool: Mapping[str, Any]) -> str:
    """A pool's value; of its two stages both, prefill first, joined by +."""
    each = [pool] if name in ("window_tokens", "gamma") else stages_of(pool)
    return "+".join(f"{one[name]}" for one in each)


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under their columns; nothing where a value is not known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if x is None else f"{x:.9g}" if isinstance(x, float) else x for x in row])
    return text.getvalue()


@styled
def front_figure(document: Mapping[str, Any]) -> Figure:
    """The front as a staircase of what is reachable, the reference fleets and the knee marked."""
    figure = new_figure(8.4, 5.4)
    axes = figure.subplots()
    draw_front(axes, document)
    say(figure, _wrapped(front_takeaway(document)))
    lines = off_the_chart(document)
    if lines:
        figure.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=10, color=MUTED)
    return figure


def draw_front(axes, document: Mapping[str, Any], *, colour: str = FRONT_COLOUR, label: str = "optimal plans") -> None:
    """Points and marks of one front: TTFT (or else cost) across, tokens per joule (or else cost) up, a third objective
    in colour."""
    names = [objective["name"] for objective in document["objectives"]]
    across = "ttft_p99_s" if "ttft_p99_s" in names else "usd_per_h"
    up = "tok_per_j" if "tok_per_j" in names else "usd_per_h"
    shade = next((name for name in names if name not in (across, up)), None)

    def of(point: Mapping[str, Any], name: str) -> float:
        return point["objectives"][name] / QUANTITIES[name].si

    points = document["points"]
    xs, ys = [of(point, across) for point in points], [of(point, up) for point in points]
    if shade:
        shades = [of(point, shade) for point in points]
        norm = LogNorm() if max(shades) > LOG_FROM * min(shades) else None
        edge = {"edgecolors": INK, "linewidths": 0.8}
        dots = axes.scatter(xs, ys, c=shades, cmap="cividis", norm=norm, s=46, zorder=3, **edge)
        axes.plot([], [], "o", color=MUTED, label=f"{label}, by {QUANTITIES[shade].title}")
        bar = axes.figure.colorbar(dots, ax=axes, label=_axis_label(shade, document))
        if norm:
            ticks_at(bar.ax.yaxis, log_values(min(shades), max(shades)))
        else:
            plain_numbers(bar.ax.yaxis)
        bar.ax.grid(False)
    else:
        order = sorted(range(len(xs)), key=xs.__getitem__)
        steps = [xs[i] for i in order], [ys[i] for i in order]
        axes.step(*steps, where="post", color=colour, alpha=0.7)
        axes.plot(*steps, "o", color=colour, label=label, zorder=3)
    for point in points:
        if point["knee"]:
            x, y = of(point, across), of(point, up)
            axes.plot(
                [x],
                [y],
                "o",
                markersize=15,
                markeredgewidth=1.8,
                linestyle="none",
                markerfacecolor="none",
                markeredgecolor=KNEE_COLOUR,
                label="knee",
            )
    for key, marker, own, said in (
        ("homogeneous", "s", MUTED, "best one-pool fleet"),
        ("fleetopt", "D", FLEETOPT_COLOUR, "FleetOpt (gamma 2)"),
    ):
        if document[key]:
            x, y = of(document[key], across), of(document[key], up)
            axes.plot([x], [y], marker, color=own, markersize=8, linestyle="none", label=said)
            xs, ys = [*xs, x], [*ys, y]
    _scale(axes, "x", xs)
    _scale(axes, "y", ys)
    axes.set_xlabel(_axis_label(across, document))
    axes.set_ylabel(_axis_label(up, document))
    axes.legend()


def _axis_label(name: str, document: Mapping[str, Any]) -> str:
    said = _SHOWN[name][1]
    if name == "tok_per_j" and document["points"]:
        one = document["points"][0]["plan"]["power_scope"] == "one_gpu_per_instance"
        return f"{said}\n(one GPU's watts per instance)" if one else said
    if name == "ttft_p99_s":
        return said + document["ttft_is"].removeprefix("P99 TTFT of the worst pool").replace("P99 TTFT of", "\nof")
    return said


def _scale(axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis where values spread widely; plain numbers, the more the fewer decades."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_FROM:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        ticks_at(axis, log_values(low / 1.3, high * 1.3))
    else:
        axis.set_major_locator(AutoLocator())
        plain_numbers(axis)


def _wrapped(text: str) -> str:
    """The title on two lines, broken after its first statement."""
    return text.replace("; ", ";\n", 1)


# --- along one input --------------------------------------------------------------------------------------------------

AXIS_SHOWN: Mapping[str, str] = {  # what is swept
    "workload-rate": "requests per second",
    "ttft-p99-ms": "limit of the P99 TTFT [ms]",
    "itl-ms": "limit of the mean inter-token latency [ms]",
    "pue": "power usage effectiveness",
    "usd-per-kwh": "price of electricity [USD/kWh]",
    "host-w-per-gpu": "host power a GPU [W]",
    "max-num-seqs": "sequences an instance runs",
    "tp": "GPUs an instance",
    "pools": "most pools",
    "spare": "instances of a pool that may be down",
    "spare-nodes": "nodes of a pool that may be down",
    "availability": "share of the time that pools hold, at least",
    "confidence": "P(limits hold), at least",
}
_AXIS_AT: Mapping[str, str] = {  # one value of it, in a sentence
    "workload-rate": "{} requests/s",
    "ttft-p99-ms": "a P99 TTFT of {} ms",
    "itl-ms": "a mean ITL of {} ms",
    "pue": "a PUE of {}",
    "usd-per-kwh": "{} USD/kWh",
    "host-w-per-gpu": "{} W of host a GPU",
    "max-num-seqs": "{} sequences an instance",
    "tp": "{} GPUs an instance",
    "pools": "at most {} pools",
    "spare": "{} spare a pool",
    "spare-nodes": "{} spare nodes a pool",
    "availability": "{} of the time",
    "confidence": "{} probability",
}
_OF_SIZE = ("confidence", "spare", "spare-nodes", "availability")  # what buys GPUs, which are said first
_PANELS = {
    "tok_per_j": "output tokens\nper joule",
    "n_gpus": "GPUs",
    "gain_vs_homogeneous": "tok/J over the best\none-pool fleet",
}


def axis_table(document: Mapping[str, Any]) -> RenderableType:
    """The optimum at each value."""
    name = document["axis"]["name"]
    sure = any(row["plan"].get("holds") for row in document["rows"])
    holds = ["Holds"] if sure else []
    table = new_table(AXIS_SHOWN[name], *holds, "tok/J", "Power", "Cost", "P99 TTFT", *_FLEET_COLUMNS)
    for row in document["rows"]:
        plan = row["plan"]
        if plan["metrics"] is None:
            table.add_row(f"{row['value']:,g}", *["-"] * (6 + len(holds)), "no fleet holds the limits", "-")
            continue
        metrics, gain = plan["metrics"], plan["metrics"]["gain_vs_homogeneous"]
        table.add_row(
            f"{row['value']:,g}",
            *([chance(plan["holds"]["probability"])] if sure else []),
            f"{metrics['tok_per_j']:.4g}",
            f"{metrics['power_w'] / KW:,.1f} kW",
            _value("usd_per_h", metrics["usd_per_h"]),
            _value("ttft_p99_s", metrics["ttft_p99_s"]),
            f"{metrics['n_gpus']:,}",
            "-" if gain is None else f"{gain:.2f}x",
            *_pools(plan["pools"]),
        )
    note = "Gain: tokens per joule over the best one-pool fleet at the same value; -: no such fleet holds the limits."
    note += " Holds: the probability that the limits do, under the errors of engines and laws." if sure else ""
    return Group(Text(axis_takeaway(document), style="bold"), table, Text(note, style="dim"))


def axis_takeaway(document: Mapping[str, Any]) -> str:
    """What the input does to tokens per joule and to the gain."""
    name, where = document["axis"]["name"], document["workload"]["name"]
    held = [row for row in document["rows"] if row["plan"]["metrics"]]
    if not held:
        return f"{where}: no fleet holds the limits at any value of the {AXIS_SHOWN[name]}."
    first, last = held[0], held[-1]

    def at(row: Mapping[str, Any]) -> str:
        return _AXIS_AT[name].format(plain(row["value"]))

    def said(row: Mapping[str, Any]) -> str:
        gain = row["plan"]["metrics"]["gain_vs_homogeneous"]
        worth = "" if gain is None else f" ({gain:.2f}x one pool)"
        gpus = f"{row['plan']['metrics']['n_gpus']:,} GPUs, " if name in _OF_SIZE else ""
        return f"{gpus}{row['plan']['metrics']['tok_per_j']:.3g} tok/J{worth} at {at(row)}"

    ends = f"{said(first)}; {said(last)}" if last is not first else said(first)
    missing = [at(row) for row in document["rows"] if not row["plan"]["metrics"]]
    return f"{where}: {ends}{f'; none at {listed(missing)}' if missing else ''}."


def axis_csv(document: Mapping[str, Any]) -> str:
    """One line a value; empty where no fleet holds the limits."""
    rows = []
    for row in document["rows"]:
        metrics = row["plan"]["metrics"] or {}
        rows.append(
            [
                *(row["value"], row["plan"]["status"], row["plan"].get("holds", {}).get("probability")),
                *(metrics.get(name) for name in CSV_METRICS),
                *_pool_columns(row["plan"]),
            ]
        )
    name = document["axis"]["name"].replace("-", "_")
    return csv_text([name, "status", "hold_probability", *CSV_METRICS, *(f"pool_{each}" for each in CSV_POOLS)], rows)


@styled
def axis_figure(document: Mapping[str, Any]) -> Figure:
    """Tokens per joule, GPUs and gain against the input, one above the other."""
    figure = new_figure(7.8, 7.6)
    panels = figure.subplots(len(_PANELS), 1, sharex=True)
    held = [row for row in document["rows"] if row["plan"]["metrics"]]
    for axes, (name, label) in zip(panels, _PANELS.items()):
        known = [(row["value"], row["plan"]["metrics"][name]) for row in held]
        known = [(x, y) for x, y in known if y is not None and math.isfinite(y)]
        ys = [y for _, y in known]
        if known:
            axes.plot([x for x, _ in known], ys, "o-", color=FRONT_COLOUR, clip_on=False)
            _scale(axes, "y", ys)
        else:
            axes.text(0.5, 0.5, "no one-pool fleet holds the limits", transform=axes.transAxes, ha="center")
        if name == "gain_vs_homogeneous":
            axes.axhline(1.0, color=MUTED, linewidth=1.0)
            if known:  # no zooming in on nothing
                axes.set_ylim(min(0.95, *ys) - 0.02, max(1.05, *ys) + 0.02)
                axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set_ylabel(label)
        for row in document["rows"]:
            if row not in held:
                axes.axvline(row["value"], color=LESS, linestyle=":", label="no fleet holds the limits")
    if len(held) < len(document["rows"]):
        panels[0].legend(handles=[panels[0].lines[-1]])
    if held:
        _scale(panels[-1], "x", [row["value"] for row in document["rows"]])
    panels[-1].set_xlabel(AXIS_SHOWN[document["axis"]["name"]])
    say(figure, _wrapped(axis_takeaway(document)))
    return figure
