"""Levers as a ranked table and as a figure, of the document that `fleetopt levers --json` prints."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.core.units import KW, MS
from fleetopt_jax.report.style import (
    INK,
    LESS,
    MORE,
    MUTED,
    PAPER,
    grid_along,
    new_figure,
    plain,
    printable,
    say,
    styled,
    ticks_at,
)
from fleetopt_jax.report.tables import new_table
from fleetopt_jax.report.verdict import broken
from fleetopt_jax.report.words import (
    goal_of,
    instances_said,
    limits_said,
    ms,
)

NOTHING = 0.01  # gains and losses smaller than this are within what whole instances decide
NEAR = 1.4  # of the largest gain to the smallest: from here on ticks are far apart
MOST_RATIO = 1.25  # of the colours of the pair matrix


def levers_table(document: Mapping[str, Any]) -> RenderableType:
    """Which lever pays, then all of them, then pairs, then what is left out and what it rests on."""
    table = new_table("Lever", "Gain", "90 %", "tok/J", "Cost", "GPUs", "P99 TTFT", "Quality")
    for lever in document["levers"]:
        table.add_row(lever_label(lever), *_row(lever))
    parts: list[RenderableType] = [Text(answer(document), style="bold"), Text(_present(document)), table]
    if document["pairs"]:
        pairs = new_table("Pair", "Gain", "If they multiplied", "Ratio", "90 %", "They")
        for pair in document["pairs"]:
            pairs.add_row(
                " x ".join(_short(document, name) for name in pair["levers"]),
                _times(pair["gain"]),
                _times(pair["product"]),
                _number(pair["ratio"]),
                _interval(pair["ratio_interval"]),
                pair["verdict"],
            )
        parts.append(pairs)
    notes = [f"{lever_label(lever)}: {lever['note']}." for lever in document["levers"] if lever["note"]]
    notes += [_why_not(lever) for lever in document["levers"] if not lever["feasible"]]
    notes += [f"Left out, {each['name']}: {each['why']}." for each in document["left_out"]]
    notes.append(
        f"Gain: {goal_of(document['objective']).gain} over the present fleet planned anew, everything else "
        f"re-optimised. 90 %: from the engines' errors, common to fleets that share one; what is assumed, as it is. "
        f"Assumptions '{document['assume']}'."
    )
    return Group(*parts, *(Text(note, style="dim") for note in notes))


def _row(lever: Mapping[str, Any]) -> list[str]:
    if not lever["feasible"]:
        return ["-", "-", "-", "-", "-", "no fleet holds the limits", lever["quality"]]
    return [
        _times(lever["gain"]),
        _interval(lever["gain_interval"]),
        f"{lever['tok_per_j']:.3g}",
        f"${lever['usd_per_h']:,.0f}/h" + _change(lever["usd_per_h_change"], lambda x: f"{x:+,.0f}"),
        f"{lever['n_gpus']:,.0f}",
        f"{lever['ttft_p99_s'] / MS:,.0f} ms" + _change(lever["ttft_p99_change_s"], lambda x: f"{x / MS:+,.0f}"),
        lever["quality"],
    ]


def _change(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else f" ({form(value)})"


def answer(document: Mapping[str, Any]) -> str:
    """Which lever pays on this workload and these limits, and what does not."""
    workload, limits = document["workload"], limits_said(document["slo"])
    where = f"{workload['name']} at {workload['arrival_rate_per_s']:,.6g} requests/s, P99 TTFT {limits}"
    feasible = [lever for lever in document["levers"] if lever["feasible"]]
    if document["present"]["tok_per_j"] is None:
        if not feasible:
            return f"{where}: the present fleet cannot hold the limits, and no single lever makes it."
        names = ", ".join(f"{lever_label(lever)} ({lever['tok_per_j']:.3g} tok/J)" for lever in feasible)
        return f"{where}: the present fleet cannot hold the limits; these make it: {names}."
    pays = [lever for lever in feasible if lever["gain"] > 1.0 + NOTHING]
    if not pays:
        return f"{where}: no lever pays: each gains less than {NOTHING:.0%}."
    said = f"{where}: most comes from {_gains(pays[0])}"
    same = next((lever for lever in pays if not lever["note"]), None)
    if same is not pays[0]:
        said += f"; with the same prompts, precision and model, from {_gains(same)}" if same else "; else from nothing"
    idle = [lever_label(lever) for lever in feasible if abs(lever["gain"] - 1.0) <= NOTHING]
    said += f". Nothing (within {NOTHING:.0%}): {', '.join(idle)}" if idle else ""
    loses = [f"{lever_label(lever)} ({_times(lever['gain'])})" for lever in feasible if lever["gain"] < 1.0 - NOTHING]
    return said + (f". It loses with {', '.join(loses)}." if loses else ".")


def _gains(lever: Mapping[str, Any]) -> str:
    low, high = lever["gain_interval"]
    return f"{lever_label(lever)} {_times(lever['gain'])} ({low:.2f} to {high:.2f})"


def _present(document: Mapping[str, Any]) -> str:
    present = document["present"]
    given = present["given"]
    said = ""
    if given:
        held = "" if given["status"] != "infeasible" else f", which breaks a limit: {broken(given['binding'])}"
        said = f"As given: {given['tok_per_j']:.3g} tok/J, {given['n_gpus']:,.0f} GPUs{held}. "
    if present["tok_per_j"] is None:
        binding = present["binding"]
        return f"{said}Present fleet: none holds the limits ({_reason(binding)})."
    fleet = " + ".join(f"{instances_said(pool)} {pool['llm']} {pool['precision']}" for pool in present["pools"])
    return (
        f"{said}Present fleet{', planned anew' if given else ''}: {fleet}; {present['tok_per_j']:.3g} tok/J, "
        f"{present['power_w'] / KW:,.1f} kW, ${present['usd_per_h']:,.0f}/h, "
        f"P99 TTFT {ms(present['ttft_p99_s'])}."
    )


def _why_not(lever: Mapping[str, Any]) -> str:
    return f"{lever_label(lever)}: no fleet holds the limits ({_reason(lever['binding'])})."


def _reason(binding: Mapping[str, Any] | None) -> str:
    return broken(binding) if binding else "no candidate does"


def lever_label(lever: Mapping[str, Any]) -> str:
    """A lever with what the search chose."""
    pools = lever["pools"]

    def chosen(name: str, form: Callable[[Any], str] = str) -> str:
        values = list(dict.fromkeys(form(pool[name]) for pool in pools))
        return f" ({', '.join(values)})" if values else ""

    match lever["name"]:
        case "routing":
            return "context routing"
        case "gamma":
            return "FleetOpt" if "FleetOpt" in lever["title"] else "gamma"
        case "pools":
            return "more pools" + (f" ({len(pools)})" if pools else "")
        case "tp":
            return "tensor parallelism" + chosen("tp")
        case "max_num_seqs":
            return "max_num_seqs" + chosen("max_num_seqs", lambda n: "as it is" if n is None else f"{n:,}")
        case "clock":
            return "GPU clock" + chosen("clock_frac", lambda frac: f"{frac:.0%}")
        case "speculate":
            return "drafts ahead" + chosen("speculate", lambda d: f"{d['head']}:{d['k']}" if d else "none")
        case "precision":
            return "fp8 weights"
        case "kv_precision":
            return "fp8 KV cache"
        case "disaggregate":
            return "prefill and decode apart"
        case "compression":
            return "compressed prompts"
        case _:
            return lever["title"].removesuffix(" in every pool").removeprefix("serve ")


def _short(document: Mapping[str, Any], name: str) -> str:
    lever = next(lever for lever in document["levers"] if lever["name"] == name)
    return lever_label(lever).split(" (")[0]


@styled
def levers_figure(document: Mapping[str, Any]) -> Figure:
    """Ranked bars with intervals, and which pairs multiply, reinforce or cancel."""
    levers = [lever for lever in document["levers"] if lever["gain"] is not None]
    names = [lever["name"] for lever in levers if any(lever["name"] in pair["levers"] for pair in document["pairs"])]
    figure = new_figure(14.5 if names else 8.4, 2.2 + 0.5 * max(len(levers), len(names), 5))
    panels = figure.subplots(1, 2, width_ratios=(1.05, 1.0)) if names else [figure.subplots()]
    say(figure, _takeaway(document, levers))
    _bars(panels[0], document, levers)
    if names:
        _matrix(panels[1], document, names)
    return figure


def _bars(axes, document: Mapping[str, Any], levers: Sequence[Mapping[str, Any]]) -> None:
    gains = [lever["gain"] for lever in levers]
    lows, highs = ([lever["gain_interval"][end] for lever in levers] for end in (0, 1))
    for i, (lever, gain) in enumerate(zip(levers, gains)):
        colour = MORE if gain >= 1 else LESS
        hatch = "///" if lever["quality"] in ("projected", "roofline", "assumed") else None
        axes.barh(i, gain - 1.0, left=1.0, height=0.62, color=PAPER if hatch else colour, edgecolor=colour, hatch=hatch)
        reach = [[max(0.0, gain - lows[i])], [max(0.0, highs[i] - gain)]]
        if max(map(max, reach)) > 1e-6 * gain:  # of what energy decides
            axes.errorbar(gain, i, xerr=reach, color=INK, linewidth=1.1, capsize=3)
        axes.text(max(gain, highs[i], 1.0), i, f"  {gain:.2f}x", va="center", ha="left", fontsize=11, clip_on=False)
    axes.axvline(1.0, color=MUTED, linewidth=1.0)
    axes.set_yticks(range(len(levers)), [printable(lever_label(lever)) for lever in levers])
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = min([*lows, *gains, 0.95]), max([*highs, *gains, 1.05])
    axes.set_xlim(low * 0.93, high * (high / low) ** 0.18)
    gain_ticks(axes, low, high)
    axes.set_xlabel(
        f"{goal_of(document['objective']).gain} over the present fleet, 90 % interval\n"
        "of the engines' errors (hatched: projected or assumed)"
    )
    grid_along(axes, "x")


def gain_ticks(axes, low: float, high: float) -> None:
    """Of a logarithmic axis of gains; those near 1 where all are."""
    near = (0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.3)
    wide = (0.05, 0.1, 0.25, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 8, 16, 32)
    each = wide if high > NEAR * low else near
    ticks_at(axes.xaxis, [t for t in each if low * 0.93 <= t <= high * 1.2], lambda gain: f"{plain(gain)}x")


def _takeaway(document: Mapping[str, Any], levers: Sequence[Mapping[str, Any]]) -> str:
    where = f"{document['workload']['name']}, P99 TTFT {limits_said(document['slo'])}"
    pays = [lever for lever in levers if lever["gain"] > 1.0 + NOTHING]
    if not pays:
        return f"{where}:\nno lever pays"
    said = f"{where}:\nmost comes from {lever_label(pays[0])}, {pays[0]['gain']:.2f}x"
    routing = next((lever for lever in levers if lever["name"] == "routing"), None)
    if routing is not None and routing is not pays[0]:
        said += f"; from context routing {routing['gain']:.2f}x"
    return said


def _matrix(axes, document: Mapping[str, Any], names: list[str]) -> None:
    """The pairs below the diagonal, without the rows and columns that hold none."""
    pairs = {frozenset(pair["levers"]): pair for pair in document["pairs"]}
    tried = [(i, j) for i, a in enumerate(names) for j, b in enumerate(names) if i > j and frozenset((a, b)) in pairs]
    rows, columns = (sorted({place[axis] for place in tried}) for axis in (0, 1))
    table = [[math.nan] * len(columns) for _ in rows]
    for i, j in tried:
        pair, y, x = pairs[frozenset((names[i], names[j]))], rows.index(i), columns.index(j)
        known = pair["ratio"] is not None
        table[y][x] = math.log(pair["ratio"]) if known else math.nan
        text = f"{pair['ratio']:.2f}\n({pair['gain']:.2f}x)" if known else "no fleet"
        dark = known and abs(math.log(pair["ratio"])) > 0.6 * math.log(MOST_RATIO)
        axes.text(x, y, text, ha="center", va="center", fontsize=10, color="white" if dark else "black")
    reach = math.log(MOST_RATIO)
    axes.imshow(table, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
    labels = [printable(_short(document, name)) for name in names]
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), [labels[j] for j in columns], **turned)
    axes.set_yticks(range(len(rows)), [labels[i] for i in rows])
    blank = ";\nblank: not tried together" if len(tried) < sum(i > j for i in rows for j in columns) else ""
    axes.set_title(
        f"Pairs: gain of both over the product of theirs\n(orange, below 1: they cancel; purple: they reinforce{blank})"
    )
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _times(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:.2f}x"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _interval(ends: list[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"
