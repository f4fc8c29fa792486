"""Fronts of several services and what stricter promises cost: tables, CSV and figures, of the documents that
`fleetopt services` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.core.units import MS
from fleetopt_jax.report.pareto import FRONT_COLOUR, KNEE_COLOUR, LOG_FROM, csv_text
from fleetopt_jax.report.style import (
    LESS,
    MUTED,
    log_values,
    new_figure,
    plain_numbers,
    say,
    styled,
    ticks_at,
)
from fleetopt_jax.report.tables import new_table
from fleetopt_jax.report.words import QUANTITIES, listed, ms, percent, sentence

METRICS = ("tok_per_j", "power_w", "usd_per_h", "kg_co2_per_h", "n_gpus")
HARDLY = 1e-6  # of the present, more: nothing
_AXES = {
    "kg_co2_per_h": "carbon [kg CO2/h]",
    "usd_per_h": "cost [USD/h]",
    "tok_per_j": "output tokens per joule, all services",
    "n_gpus": "GPUs",
}

# ----------------------------------------------------------------------------------------------- objective, objective


def services_front_table(document: Mapping[str, Any]) -> RenderableType:
    """The plans of a front, and what it rests on."""
    if not document["points"]:
        return Text("No fleets hold what the services are promised.")
    names = [each["name"] for each in document["objectives"]]
    others = [name for name in ("tok_per_j", "power_w", "usd_per_h") if name not in names]
    kinds = _kinds([point["plan"] for point in document["points"]])
    columns = [_heading(name) for name in (*names, *others)]
    table = new_table("Plan", *columns, *(kind.upper() for kind in kinds), "Proved")
    for i, point in enumerate(document["points"], start=1):
        metrics = point["plan"]["metrics"]
        values = [_amount(name, (point["objectives"] | metrics)[name]) for name in (*names, *others)]
        label = f"{i} (knee)" if point["knee"] else str(i)
        table.add_row(label, *values, *_counts(point["plan"], kinds), _proved(point))
    search = document["search"]
    spent = "" if document["complete"] else "; more of them may be found with more --points"
    notes = [
        f"{sentence(document['front_is'])}{spent}.",
        f"Proved: the best by its weights, of all candidates. {search['n_searches']} searches among the same ones in "
        f"{search['wall_s']:.1f} s; assumptions '{document['assume']}'.",
    ]
    said = Text(services_front_takeaway(document), style="bold")
    return Group(said, table, *(Text(note, style="dim") for note in notes))


def services_front_takeaway(document: Mapping[str, Any]) -> str:
    """From one end to the other, and the knee."""
    points, who = document["points"], f"{len(document['asked'])} services"
    if len(points) == 1:
        return f"{who}: one plan is the best in both, {_both(points[0])}."
    knee = next((point for point in points if point["knee"]), None)
    turn = f"; the knee is {_both(knee)}" if knee else ""
    return f"{who}: from {_both(points[0])} to {_both(points[-1])}{turn}."


def _both(point: Mapping[str, Any]) -> str:
    return " at ".join(_amount(name, value) for name, value in point["objectives"].items())


def services_front_csv(document: Mapping[str, Any]) -> str:
    """One line a plan."""
    names = [each["name"] for each in document["objectives"]]
    metrics = [name for name in METRICS if name not in names]
    kinds = _kinds([point["plan"] for point in document["points"]])
    rows = [
        [
            *(point["objectives"][name] for name in names),
            *(point["plan"]["metrics"][name] for name in metrics),
            *(int(point["knee"]), int(point["certified"]), point["gap"], *_numbers(point["plan"], kinds)),
        ]
        for point in document["points"]
    ]
    return csv_text([*names, *metrics, "knee", "certified", "gap", *(f"gpus_{kind}" for kind in kinds)], rows)


@styled
def services_front_figure(document: Mapping[str, Any]) -> Figure:
    """The second objective across, the first up, GPUs of each kind beside the ends and the knee."""
    figure = new_figure(8.4, 5.2)
    axes = figure.subplots()
    up, across = (each["name"] for each in document["objectives"])
    points = sorted(document["points"], key=lambda point: point["objectives"][across])
    xs = [point["objectives"][across] for point in points]
    ys = [point["objectives"][up] for point in points]
    better = {each["name"]: each["better"] for each in document["objectives"]}
    axes.step(xs, ys, where="post" if better[across] == "low" else "pre", color=FRONT_COLOUR, alpha=0.5)
    _dots(axes, xs, ys, [point["certified"] for point in points], "plans of all services")
    for point, x, y in zip(points, xs, ys, strict=True):
        if point["knee"]:
            ring = {"markersize": 15, "markeredgewidth": 1.8, "linestyle": "none", "markerfacecolor": "none"}
            axes.plot([x], [y], "o", **ring, markeredgecolor=KNEE_COLOUR, label="knee")
        if point["knee"] or point in (points[0], points[-1]):
            last = point is points[-1] and len(points) > 1
            said = listed([f"{n:,} {kind.upper()}" for kind, n in _of_kinds(point["plan"]).items() if n])
            place: dict[str, Any] = {"xytext": (-9 if last else 9, 9), "ha": "right" if last else "left"}
            axes.annotate(said, (x, y), textcoords="offset points", fontsize=10, color=MUTED, **place)
    for axis in (axes.xaxis, axes.yaxis):
        plain_numbers(axis)
    axes.margins(0.08, 0.12)
    axes.set_xlabel(_AXES[across])
    axes.set_ylabel(_AXES[up])
    axes.legend()
    say(figure, services_front_takeaway(document).replace("; ", ";\n", 1))
    return figure


# ----------------------------------------------------------------------------------------------- limits of one service


def promise_front_table(document: Mapping[str, Any]) -> RenderableType:
    """The best plan of all services at each limit."""
    kinds = _kinds([row["plan"] for row in document["rows"]])
    columns = ("reached", "tok/J", "Power", "Cost", *(kind.upper() for kind in kinds), "Proved")
    table = new_table(f"P99 TTFT of {document['service']}", *columns)
    for row in document["rows"]:
        limit = ms(row["ttft_p99_s"]) + (" (asked)" if row["ttft_p99_s"] == document["asked_s"] else "")
        if row["tok_per_j"] is None:
            table.add_row(limit, "none", *["-"] * (3 + len(kinds)), _proved(row))
            continue
        metrics = [_amount(name, row[name]) for name in ("tok_per_j", "power_w", "usd_per_h")]
        table.add_row(limit, ms(row["reached_s"]), *metrics, *_counts(row["plan"], kinds), _proved(row))
    reasons = [f"{ms(row['ttft_p99_s'])}: {row['why']}." for row in document["rows"] if row.get("why")]
    search = document["search"]
    note = (
        f"Proved: most tokens per joule of all candidates, or that there is none. {search['n_searches']} searches in "
    )
    note += f"{search['wall_s']:.1f} s; assumptions '{document['assume']}'."
    said = Text(promise_front_takeaway(document), style="bold")
    return Group(said, table, *map(Text, reasons), Text(note, style="dim"))


def promise_front_takeaway(document: Mapping[str, Any]) -> str:
    """What the limit of one service does to the tokens per joule of all."""
    held = [row for row in document["rows"] if row["tok_per_j"] is not None]
    who = f"{len(document['asked'])} services, P99 TTFT of {document['service']}"
    if not held:
        return f"{who}: no fleets hold any of these limits."
    first, last = (
        f"{_amount('tok_per_j', row['tok_per_j'])} at {ms(row['ttft_p99_s'])}" for row in (held[0], held[-1])
    )
    said = f"from {first} to {last}"
    if held[0]["tok_per_j"] == held[-1]["tok_per_j"]:
        said = first if held[0] is held[-1] else f"{first}, and no more at {ms(held[-1]['ttft_p99_s'])}"
    missing = [ms(row["ttft_p99_s"]) for row in document["rows"] if row["tok_per_j"] is None]
    return f"{who}: {said}{f'; none at {listed(missing)}' if missing else ''}."


def promise_front_csv(document: Mapping[str, Any]) -> str:
    """One line a limit; empty where no fleets hold it."""
    kinds = _kinds([row["plan"] for row in document["rows"]])
    rows = [
        [row["ttft_p99_s"], row["status"], int(row["certified"]), row["gap"], row["reached_s"]]
        + [row[name] for name in METRICS]
        + (_numbers(row["plan"], kinds) if row["tok_per_j"] is not None else [None] * len(kinds))
        for row in document["rows"]
    ]
    columns = ["ttft_p99_s", "status", "certified", "gap", "reached_s", *METRICS]
    return csv_text([*columns, *(f"gpus_{kind}" for kind in kinds)], rows)


@styled
def promise_front_figure(document: Mapping[str, Any]) -> Figure:
    """Tokens per joule of all over the limit of one."""
    figure = new_figure(8.4, 5.0)
    axes = figure.subplots()
    held = [row for row in document["rows"] if row["tok_per_j"] is not None]
    xs, ys = [row["ttft_p99_s"] / MS for row in held], [row["tok_per_j"] for row in held]
    axes.step(xs, ys, where="post", color=FRONT_COLOUR, alpha=0.5)
    _dots(axes, xs, ys, [row["certified"] for row in held], "best plan of all services")
    axes.axvline(document["asked_s"] / MS, color=MUTED, linestyle="--", linewidth=1.3, label="asked")
    missing = [row["ttft_p99_s"] / MS for row in document["rows"] if row["tok_per_j"] is None]
    for i, x in enumerate(missing):
        axes.axvline(x, color=LESS, linestyle=":", label=None if i else "no fleets hold it")
    everything = [*xs, *missing, document["asked_s"] / MS]
    low, high = min(everything), max(everything)
    if high > LOG_FROM * low:
        axes.set_xscale("log")
        ticks_at(axes.xaxis, log_values(low / 1.1, high * 1.1))
    else:
        plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    if ys:  # no zooming in on nothing
        room = max(0.05 * max(ys), 0.12 * (max(ys) - min(ys)))
        axes.set_ylim(min(ys) - room, max(ys) + room)
    axes.set_xlabel(f"limit of the P99 TTFT of {document['service']} [ms]")
    axes.set_ylabel(_AXES["tok_per_j"])
    figure.legend(loc="outside lower left", ncols=3)
    say(figure, promise_front_takeaway(document).replace("; ", ";\n", 1))
    return figure


# --------------------------------------------------------------------------------------------------- stricter promises


def stricter_lines(document: Mapping[str, Any]) -> RenderableType:
    """What a stricter promise to each service costs: a sentence each, then numbers."""
    found = document["stricter"]
    table = new_table("Stricter promise", "Now", "Then", "GPUs", "Power", "Cost", "Proved")
    for one in found["each"]:
        cells = ["none holds it", "-", "-"]
        if one["extra"] is not None:
            cells = [_signed(name, one["extra"][name]) for name in ("n_gpus", "power_w", "usd_per_h")]
        proved = "yes" if one["certified"] else "no"
        table.add_row(one["service"], ms(one["was_s"]), ms(one["is_s"]), *cells, proved)
    note = "One promise at a time, all else the same: P99 TTFT, of a batch its deadline. "
    note += "Proved: that both plans are the best, or that there is none."
    lines = [Text(stricter_said(one, document["metrics"])) for one in found["each"]]
    return Group(*lines, table, Text(note, style="dim"))


def stricter_said(one: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """'Chat with a P99 TTFT of 400 ms instead of 500 ms: 8 more GPUs, 6.2 kW more and 38 USD/h more.'"""
    what = "a P99 TTFT" if one["promise"] == "ttft_p99_s" else "a deadline"
    asked = f"{sentence(one['service'])} with {what} of {ms(one['is_s'])} instead of {ms(one['was_s'])}"
    if one["extra"] is None:
        why = f" ({one['why']})" if one.get("why") else ""
        return (
            f"{asked}: no fleet holds it{why}." if one["certified"] else f"{asked}: no fleet was found that holds it."
        )
    parts = []
    for name in ("n_gpus", "power_w", "usd_per_h"):
        more = one["extra"][name]
        if abs(more) > HARDLY * abs(metrics[name]):
            amount = QUANTITIES[name].amount(abs(more))
            parts.append(f"{amount} {'more' if more > 0 else 'less'}")
    return f"{asked}: {listed(parts) if parts else 'costs nothing'}."


def _signed(name: str, more: float) -> str:
    amount = QUANTITIES[name].amount(abs(more))
    return f"{'-' if more < 0 else '+'}{amount}"


# ----------------------------------------------------------------------------------------------------------- the parts


def _dots(axes, xs: Sequence[float], ys: Sequence[float], certified: Sequence[bool], label: str) -> None:
    """Filled where proved, hollow where not."""
    for proved, face in ((True, FRONT_COLOUR), (False, "white")):
        some = [(x, y) for x, y, each in zip(xs, ys, certified, strict=True) if each is proved]
        if some:
            said = label if proved else f"{label}, not proved to be the best"
            axes.plot(*zip(*some, strict=True), "o", color=FRONT_COLOUR, markerfacecolor=face, label=said, zorder=3)


def _kinds(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """GPUs that any plan uses."""
    all_of = dict.fromkeys(each["gpu"] for plan in plans for each in plan["gpus"])
    return [kind for kind in all_of if any(_of_kinds(plan).get(kind) for plan in plans)]


def _of_kinds(plan: Mapping[str, Any]) -> dict[str, int]:
    return {each["gpu"]: each["used"] for each in plan["gpus"]}


def _numbers(plan: Mapping[str, Any], kinds: Sequence[str]) -> list[int]:
    used = _of_kinds(plan)
    return [used.get(kind, 0) for kind in kinds]


def _counts(plan: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    return [f"{n:,}" for n in _numbers(plan, kinds)]


def _proved(point: Mapping[str, Any]) -> str:
    if point["certified"]:
        return "yes"
    return "no" if point["gap"] is None else f"to {percent(point['gap'], 2)}"


def _heading(name: str) -> str:
    return "tok/J" if name == "tok_per_j" else sentence(QUANTITIES[name].title)


def _amount(name: str, value: float) -> str:
    return QUANTITIES[name].amount(value)
