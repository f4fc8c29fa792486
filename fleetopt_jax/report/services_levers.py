"""What pays for several services: table, CSV and figure, of the document that `fleetopt services --levers` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.report.levers import NOTHING, gain_ticks, lever_label
from fleetopt_jax.report.pareto import csv_text
from fleetopt_jax.report.services import services_takeaway
from fleetopt_jax.report.services_front import METRICS
from fleetopt_jax.report.style import (
    GRID,
    INK,
    MUTED,
    POOL_COLOURS,
    POOL_MARKERS,
    grid_along,
    new_figure,
    printable,
    say,
    styled,
)
from fleetopt_jax.report.tables import new_table
from fleetopt_jax.report.words import QUANTITIES, goal_of, listed, sentence

MOST_NAMES = 8  # of services in a legend
_SHOWN = ("tok_per_j", "usd_per_h")

# ------------------------------------------------------------------------------------------------------------- in words


def services_levers_table(document: Mapping[str, Any]) -> RenderableType:
    """Which lever pays for all, for whom it is released and whose GPUs change; then what is left out."""
    table = new_table("Lever", "Released for", "Gain", "tok/J", "Cost", "Whose GPUs change", "Quality", "Proved")
    shown = [lever for lever in document["levers"] if not _idle(lever)]
    for lever in shown:
        table.add_row(shared_label(lever), for_whom(document, lever), *_cells(lever))
    goal = goal_of(document["objective"]).gain
    notes = [
        *_idle_said(document),
        *_notes(document, shown),
        *_left_out(document),
        f"Gain: {goal} of all services over their present fleets, everything else re-optimised under the budget that "
        f"they share. Proved: that both are the best of all candidates, or that no fleets hold what is promised. "
        f"{document['search']['n_searches']} searches in {document['search']['wall_s']:.1f} s; assumptions "
        f"'{document['assume']}'.",
    ]
    said = Text(services_levers_takeaway(document), style="bold")
    return Group(
        said, Text(_present(document)), *([table] if shown else []), *(Text(note, style="dim") for note in notes)
    )


def _cells(lever: Mapping[str, Any]) -> list[str]:
    proved = "yes" if lever["certified"] else "no"
    if lever["metrics"] is None:
        return ["-", "-", "-", "no fleets hold what is promised", lever["quality"], proved]
    amounts = [QUANTITIES[name].amount(lever["metrics"][name]) for name in _SHOWN]
    return [_times(lever["gain"]), *amounts, gpus_said(lever["changed"]) or "nobody's", lever["quality"], proved]


def _times(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:.2f}x"


def gpus_said(changed: Mapping[str, Mapping[str, int]]) -> str:
    """'chat: -8 B200; code: +8 B200, -4 H100'."""
    each = [f"{name}: {', '.join(f'{n:+,} {kind.upper()}' for kind, n in of.items())}" for name, of in changed.items()]
    return "; ".join(each)


def for_whom(document: Mapping[str, Any], lever: Mapping[str, Any]) -> str:
    """'all', or the services that it is released for."""
    names = lever["released_for"]
    return "all" if len(names) == len(document["asked"]) > 1 else listed(names)


def shared_label(lever: Mapping[str, Any]) -> str:
    """A lever with what the search chose for the services that it is released for."""
    own = [each["pools"] for each in lever["fleets"] if each["service"] in lever["released_for"]]
    pools = max(own, key=len, default=[]) if lever["name"] == "pools" else [pool for each in own for pool in each]
    return lever_label({"name": lever["name"], "title": " or ".join(lever["titles"]), "pools": pools})


def services_levers_takeaway(document: Mapping[str, Any]) -> str:
    """Which lever gives all services most, for all and for one alone, and what does not."""
    who = f"{len(document['asked'])} services"
    held = [lever for lever in document["levers"] if lever["metrics"] is not None]
    if document["present"]["metrics"] is None:
        if not held:
            return f"{who}: no fleets hold what they are promised, and no single lever makes it."
        names = [f"{_short(lever)} for {for_whom(document, lever)}" for lever in held]
        return f"{who}: the present fleets do not hold what they are promised; these make it: {listed(names)}."
    pays = [lever for lever in held if lever["gain"] > 1.0 + NOTHING]
    if not pays:
        return f"{who}: no lever pays: each gains less than {NOTHING:.0%}."
    said = f"{who}: most comes from {_gains(document, pays[0])}"
    alone = next((lever for lever in pays if len(lever["released_for"]) == 1), None)
    if alone is not None and alone is not pays[0]:
        said += f"; for one of them alone, from {_gains(document, alone)}"
    if alone is not None and (others := [name for name in alone["changed"] if name not in alone["released_for"]]):
        said += f", where the GPUs of {listed(others)} change too"
    return f"{said}."


def _gains(document: Mapping[str, Any], lever: Mapping[str, Any]) -> str:
    return f"{_short(lever)} for {for_whom(document, lever)}, {_times(lever['gain'])}"


def _short(lever: Mapping[str, Any]) -> str:
    return shared_label(lever).split(" (")[0]


def _present(document: Mapping[str, Any]) -> str:
    if document["present"]["metrics"] is None:
        return f"Present: none{_because(document)}."
    return f"Present: {services_takeaway(document['present'])}."


def _because(found: Mapping[str, Any]) -> str:
    return f" ({found['why']})" if found.get("why") else ""


def _idle(lever: Mapping[str, Any]) -> bool:
    """Whether it neither gains nor loses."""
    return lever["gain"] is not None and abs(lever["gain"] - 1.0) <= NOTHING


def _idle_said(document: Mapping[str, Any]) -> list[str]:
    """Levers that do nothing for anybody, then those that do for some alone."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for lever in document["levers"]:
        found.setdefault(_short(lever), []).append(lever)
    said = []
    for name, levers in found.items():
        idle = [lever for lever in levers if _idle(lever)]
        who = "" if len(idle) == len(levers) else f" for {listed([for_whom(document, lever) for lever in idle])}"
        said += [f"{name}{who}"] if idle else []
    return [f"Nothing (within {NOTHING:.0%}): {'; '.join(said)}."] if said else []


def _notes(document: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is assumed of levers, once each, and why no fleets hold what is promised with one."""
    notes = {}
    for lever in shown:
        notes |= {f"{_short(lever)}: {note}.": None for note in lever["notes"]}
        kinds = listed([kind.upper() for kind in lever["without_end"]])
        if kinds:
            notes[f"{_short(lever)}: no stock of {kinds} is given, so that there are as many as it takes."] = None
        if lever["compressor_w"]:
            draws = QUANTITIES["power_w"].amount(lever["compressor_w"])
            notes[f"{_short(lever)} for {for_whom(document, lever)}: compressing draws {draws}, counted in."] = None
        if lever["metrics"] is None:
            proved = "no fleets hold" if lever["certified"] else "no fleets were found that hold"
            why = f"{proved} what is promised{_because(lever)}"
            notes[f"{_short(lever)} for {for_whom(document, lever)}: {why}."] = None
    return list(notes)


def _left_out(document: Mapping[str, Any]) -> list[str]:
    """Each reason once, with the services that it is of."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in document["left_out"]:
        found.setdefault((each["name"], each["why"]), []).append(each["service"])
    everyone = set(document["asked"])
    return [
        f"Left out{'' if set(services) == everyone else f' for {listed(services)}'}, {name}: {why}."
        for (name, why), services in found.items()
    ]


def services_levers_csv(document: Mapping[str, Any]) -> str:
    """One line a lever; empty where no fleets hold what is promised."""
    levers = document["levers"]
    kinds = list(dict.fromkeys(kind for lever in levers for fleet in lever["fleets"] for kind in fleet["gpus_of"]))
    rows = []
    for lever in levers:
        metrics, fleets = lever["metrics"] or {}, lever["fleets"]
        counts = [sum(fleet["gpus_of"].get(kind, 0) for fleet in fleets) if fleets else None for kind in kinds]
        who = [lever["name"], ";".join(lever["released_for"])]
        how = [lever["gain"], lever["status"], int(lever["certified"]), lever["quality"]]
        values = [metrics.get(name) for name in METRICS]
        rows.append([*who, *how, *values, *counts, ";".join(lever["changed"])])
    columns = ["lever", "released_for", "gain", "status", "certified", "quality", *METRICS]
    return csv_text([*columns, *(f"gpus_{kind}" for kind in kinds), "gpus_change_of"], rows)


# -------------------------------------------------------------------------------------------------------------- drawn


@styled
def services_levers_figure(document: Mapping[str, Any]) -> Figure:
    """A line a lever, ranked: a bar where it is released for several services, a mark where for one."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for lever in document["levers"]:
        if lever["gain"] is not None:
            by_name.setdefault(lever["name"], []).append(lever)
    figure = new_figure(9.2, 2.4 + 0.55 * max(len(by_name), 3))
    axes = figure.subplots()
    for y, levers in enumerate(by_name.values()):
        for lever in levers:
            if len(lever["released_for"]) > 1:
                gain, label = lever["gain"], None if y else "all services that it is released for"
                axes.barh(y, gain - 1.0, left=1.0, height=0.62, color=GRID, edgecolor=MUTED, label=label)
        said = f"  {max(lever['gain'] for lever in levers):.2f}x"
        right = max(1.0, *(lever["gain"] for lever in levers))
        axes.text(right, y, said, va="center", ha="left", fontsize=11, clip_on=False)
    for k, name in enumerate(document["asked"]):
        own = [
            (lever["gain"], y)
            for y, levers in enumerate(by_name.values())
            for lever in levers
            if lever["released_for"] == [name]
        ]
        i = k % len(POOL_COLOURS)
        look: dict[str, Any] = {"color": POOL_COLOURS[i], "marker": POOL_MARKERS[i], "linestyle": "none"}
        label = f"{printable(name)} alone" if k < MOST_NAMES else None
        if own:
            axes.plot(*zip(*own, strict=True), markeredgecolor="white", label=label, **look)
    axes.axvline(1.0, color=INK, linewidth=1.0)
    gains = [lever["gain"] for levers in by_name.values() for lever in levers]
    _scaled(axes, [printable(_short(levers[0])) for levers in by_name.values()], gains)
    axes.set_xlabel(f"{goal_of(document['objective']).gain} of all services over their present fleets")
    figure.legend(loc="outside lower left", ncols=3)
    say(figure, services_levers_takeaway(document).replace("; ", ";\n", 1))
    return figure


def _scaled(axes, names: Sequence[str], gains: Sequence[float]) -> None:
    """A name a line, from above, over a logarithmic axis of gains."""
    low, high = min([*gains, 0.95]), max([*gains, 1.05])
    axes.set_yticks(range(len(names)), [sentence(name) for name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(low * 0.97, high * (high / low) ** 0.18)
    gain_ticks(axes, low, high)
    grid_along(axes, "x")
