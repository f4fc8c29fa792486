"""Services that share a budget as a table and a figure, of the document of `fleetopt services`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleetopt_jax.core.units import KW
from fleetopt_jax.report.room import limit_said, more_frac, more_said, more_shown
from fleetopt_jax.report.services_front import stricter_lines
from fleetopt_jax.report.style import (
    INK,
    POOL_COLOURS,
    POOL_HATCHES,
    grid_along,
    new_figure,
    plain_numbers,
    say,
    styled,
)
from fleetopt_jax.report.tables import Cells, filled
from fleetopt_jax.report.words import (
    QUANTITIES,
    goal_of,
    latency,
    limit_quantity,
    listed,
    ms,
    percent,
    sentence,
    stages_of,
)

NEAR = 0.97  # of a limit: it is what stops the fleets from being better
WORTH_SAYING = 1e-4  # of the cost, saved


def services_table(document: Mapping[str, Any]) -> RenderableType:
    """What is used and bought, what limits it, what more would save; then who gets what."""
    if document["metrics"] is None:
        return Text(
            f"No fleets hold what the services are promised ({document['search']['n_evaluated']:,} candidates)."
        )
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column()
    for name, text in services_decision(document).items():
        lines.add_row(name, text)
    tables = filled(who_cells(document)), filled(traffic_cells(document))
    notes = [
        "Pools: requests of up to so many tokens, in instances x GPUs of each. Limits in brackets; a dash: no limit."
    ]
    stricter = [stricter_lines(document)] if document.get("stricter") else []
    return Group(lines, *tables, *stricter, *(Text(note, style="dim") for note in [*notes, how_said(document)]))


def who_cells(document: Mapping[str, Any]) -> Cells:
    """Who gets which GPUs, and what that reaches."""
    kinds = [each["gpu"] for each in document["gpus"] if each["used"]]
    head = ["Service", *(kind.upper() for kind in kinds), "Power", "tok/J", "P99 TTFT", "Mean ITL", "Ends in"]
    rows = [
        [each["name"], *(f"{each['gpus_of'].get(kind, 0):,}" for kind in kinds), *_cells(each)]
        for each in document["services"]
    ]
    return Cells(head, rows)


def traffic_cells(document: Mapping[str, Any]) -> Cells:
    """What each service serves, by which pools, and how much more it carries."""
    rows = [
        [
            each["name"],
            each["llm"],
            f"{each['rate_per_s']:,.4g}",
            _pools(each["plan"]),
            percent(each["utilization"]),
            more_shown(each["room"], each["rate_per_s"]),
        ]
        for each in document["services"]
    ]
    return Cells(["Service", "LLM", "Requests/s", "Pools", "Load", "Carries more"], rows)


def _cells(each: Mapping[str, Any]) -> list[str]:
    slo = each["plan"]["slo"]
    own = each["class"] == "interactive"  # a batch is promised its deadline alone
    grows = " + ..." if slo["ttft_s_per_token"] else ""
    ttft = f" ({ms(slo['ttft_p99_s'])}{grows})" if own else ""
    itl = f" ({ms(slo['itl_s'])})" if own and slo["itl_s"] is not None and each["end_to_end_s"] is None else ""
    ends = "-" if each["end_to_end_s"] is None else f"{latency(each['ends_s'])} ({ms(each['end_to_end_s'])})"
    return [
        f"{each['power_w'] / KW:,.1f} kW",
        f"{each['tok_per_j']:#.3g}",
        f"{latency(each['ttft_p99_s'])}{ttft}",
        f"{ms(each['itl_s'])}{itl}",
        ends,
    ]


def _pools(plan: Mapping[str, Any]) -> str:
    each = []
    for pool in plan["pools"]:
        stages = [
            f"{stage['n_instances']:,} x {stage['n_gpus'] // max(1, stage['n_instances'])} {stage['gpu'].upper()}"
            for stage in stages_of(pool)
        ]
        each.append(f"{pool['window_tokens']:,.0f}: {' + '.join(stages)}")
    return "; ".join(each)


def services_decision(document: Mapping[str, Any]) -> dict[str, str]:
    """Question and answer, of a document with metrics."""
    metrics, goal = document["metrics"], goal_of(document["objective"])
    used = [_used_of(each) for each in document["gpus"] if each["used"] or each["stock"]]
    facts = f"{metrics['tok_per_j']:#.3g} output tokens per joule, {metrics['power_w'] / KW:,.4g} kW"
    buy = [_bought(document, each) for each in document["gpus"] if each["bought"]]
    said = {"Use": f"{listed(used)}: {facts}, ${metrics['usd_per_h']:,.0f} an hour."}
    if any(each["may_buy"] for each in document["gpus"]):
        price = f", which cost ${metrics['surcharge_usd_per_h']:,.0f} an hour more than those in stock"
        said["Buy"] = f"{listed(buy)}{price if metrics['surcharge_usd_per_h'] else ''}." if buy else "Nothing."
    said["Who"] = f"{sentence('; '.join(_who(each) for each in document['services']))}."
    said["What limits it"] = _limiting(document)
    if breaks := _breaks_first(document):
        said["What breaks first"] = breaks
    if more := [text for each in document["gpus"] if (text := _worth(each, document))]:
        said["More GPUs"] = f"{sentence('; '.join(more))}."
    gap = document["search"]["gap"]
    best = f"the {goal.best} of all candidates within the budget"
    found = f"Proved: {best}." if document["status"] == "optimal" else f"The best found; not proved to be {best}"
    if document["status"] != "optimal":
        found += "." if gap is None else f", which have at most {percent(gap, 2)} less cost."
    said["How sure"] = found
    return said


def _bought(document: Mapping[str, Any], kind: Mapping[str, Any]) -> str:
    """'8 B200 (for chat and code)'."""
    who = [each["name"] for each in document["services"] if each["gpus_of"].get(kind["gpu"])]
    return f"{kind['bought']:,} {kind['gpu'].upper()} (for {listed(who)})"


def _used_of(each: Mapping[str, Any]) -> str:
    if each["bought"]:
        return f"{each['used']:,} {each['gpu'].upper()}, {each['bought']:,} of them bought beyond {each['stock']:,.0f}"
    of = "" if each["stock"] is None else f" of {each['stock']:,.0f}"
    return f"{each['used']:,}{of} {each['gpu'].upper()}"


def _who(each: Mapping[str, Any]) -> str:
    return f"{each['name']} {listed([f'{n:,} {kind.upper()}' for kind, n in each['gpus_of'].items()])}"


def _limiting(document: Mapping[str, Any]) -> str:
    """Limits that are nearly used up."""
    parts = []
    for limit in document["limits"]:
        if limit["used"] >= NEAR * limit["with_bought"]:
            quantity = limit_quantity(limit["limit"])
            most = quantity.amount(limit["with_bought"])
            parts.append(f"{quantity.title} ({quantity.amount(limit['used'])} of {most})")
    return f"{sentence('; '.join(parts))}." if parts else "No limit of the budget: each service has its own best fleet."


def _breaks_first(document: Mapping[str, Any]) -> str:
    """Which service carries the least more traffic, what breaks there, and how much more the others carry."""
    known = [each for each in document["services"] if each["room"]]
    first, *others = sorted(known, key=lambda each: more_frac(each["room"], each["rate_per_s"])) or [None]
    if first is None:
        return ""
    room, plan = first["room"], first["plan"]
    k = 1 if room["pool"] is None else room["pool"]
    of = f" of pool {k}" if len(plan["pools"]) > 1 and room["pool"] is not None else ""
    value = first[room["limit"]] if room["pool"] is None else plan["pools"][k - 1][room["limit"]]
    split = ", its part of the deadline" if first["class"] == "batch" and room["limit"] != "utilization" else ""
    said = f"{first['name']}: {limit_said(room, value, plan['slo'], of)}{split}; it carries "
    said += f"{more_said(room, first['rate_per_s'])} before that breaks."
    rest = [f"{each['name']} {more_said(each['room'], each['rate_per_s'])}" for each in others]
    return f"{said} Of the others {listed(rest)}." if rest else said


def _worth(each: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """What more GPUs of a kind would save."""
    quantity, cost = QUANTITIES.get(document["cost"]), document["metrics"].get(document["cost"], 0.0)
    said = []
    for more in each["worth"]:
        amount = quantity.amount(more["saved"]) if quantity else f"{more['saved']:,.4g} weighted"
        found = "" if more["certified"] else " (not proved)"
        said.append(
            f"{more['n_gpus']} would save {amount if more['saved'] > WORTH_SAYING * cost else 'nothing'}{found}"
        )
    return f"of {each['gpu'].upper()}, {listed(said)}" if said else ""


def how_said(document: Mapping[str, Any]) -> str:
    search = document["search"]
    text = f"Method exact, services coupled by prices: {search['n_evaluated']:,} pools evaluated in "
    return f"{text}{search['wall_s']:.1f} s. Candidates: {search['candidates']}."


@styled
def services_figure(document: Mapping[str, Any]) -> Figure:
    """GPUs of each kind by service, against those in stock and those that are bought; and watts by service."""
    kinds = [each for each in document["gpus"] if each["used"] or each["stock"]]
    names = [each["name"] for each in document["services"]]
    figure = new_figure(9.2, 1.9 + 0.55 * max(len(kinds), 2) + 0.28 * ((len(names) - 1) // 4))
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1.0))
    rows = list(range(len(kinds)))
    start = np.zeros(len(kinds))
    for k, each in enumerate(document["services"]):
        n = np.array([each["gpus_of"].get(kind["gpu"], 0) for kind in kinds])
        left.barh(rows, n, left=start, height=0.6, label=each["name"], **_look(k))
        start += n
        right.barh([0], [each["power_w"] / KW], left=_before(document["services"], k), height=0.5, **_look(k))
    _mark(left, {row: kind["stock"] for row, kind in enumerate(kinds) if kind["stock"] is not None}, "in stock", "-")
    most = {row: kind["stock"] + kind["may_buy"] for row, kind in enumerate(kinds) if kind["may_buy"]}
    _mark(left, most, "with all that may be bought", ":")
    left.set_yticks(rows, [kind["gpu"].upper() for kind in kinds])
    left.invert_yaxis()
    left.set_xlabel("GPUs")
    for limit in document["limits"]:
        if limit["limit"] == "max_power_w":
            right.axvline(limit["cap"] / KW, color=INK, linestyle="--", linewidth=1.3)
    right.set_yticks([0], ["all"])
    right.set_ylim(-1, 1)
    right.set_xlabel("power [kW]")
    for axes in (left, right):
        grid_along(axes, "x")
        plain_numbers(axes.xaxis)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(4, len(labels)))
    say(figure, services_takeaway(document))
    return figure


def _look(k: int) -> dict[str, Any]:
    n = len(POOL_COLOURS)
    return {"color": POOL_COLOURS[k % n], "hatch": POOL_HATCHES[k // n % len(POOL_HATCHES)], "edgecolor": "white"}


def _before(services: Sequence[Mapping[str, Any]], k: int) -> float:
    return sum(each["power_w"] for each in services[:k]) / KW


def _mark(axes, counts: Mapping[int, float], label: str, line: str) -> None:
    """A line across the bar of each row."""
    rows = np.array(list(counts))
    if len(counts):
        ends = {"ymin": rows - 0.42, "ymax": rows + 0.42}
        axes.vlines(list(counts.values()), **ends, color=INK, linestyle=line, linewidth=1.6, label=label)


def services_takeaway(document: Mapping[str, Any]) -> str:
    """How many services, on what, at what."""
    metrics, used = document["metrics"], [_used_of(each) for each in document["gpus"] if each["used"]]
    proved = " (proved to be the best)" if document["status"] == "optimal" else ""
    return (
        f"{len(document['services'])} services on {listed(used)}: {metrics['tok_per_j']:#.3g} tokens per joule{proved}"
    )
