"""What `fleetopt compare` says: which figures lie within the errors, and which input explains the difference best."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.core.units import KW, MS
from fleetopt_jax.report.style import BLUE, INK, MUTED, PAPER, grid_along, log_values, new_figure, say, styled, ticks_at
from fleetopt_jax.report.tables import new_table
from fleetopt_jax.report.words import Quantity, listed, number, percent, sentence

FIGURES = {
    "rate_per_s": Quantity("requests", "1/s"),
    "output_tok_per_s": Quantity("output tokens", "1/s"),
    "power_w": Quantity("power", "kW", KW),
    "ttft_s": Quantity("mean TTFT", "ms", MS),
    "ttft_p50_s": Quantity("median TTFT", "ms", MS),
    "ttft_p99_s": Quantity("P99 TTFT", "ms", MS),
    "itl_s": Quantity("mean ITL", "ms", MS),
    "itl_p99_s": Quantity("P99 ITL", "ms", MS),
}
INPUTS = {  # what more and less of an input is, after a share
    "rate": ("more requests than planned", "fewer requests than planned"),
    "prompts": ("longer prompts than the workload's", "shorter prompts than the workload's"),
    "outputs": ("longer outputs than the workload's", "shorter outputs than the workload's"),
    "decode": ("slower than the engine's law", "faster than the engine's law"),
    "prefill": ("slower than the engine's law", "faster than the engine's law"),
    "power": ("more watts than the engine's law", "fewer watts than the engine's law"),
}
BEFORE = {"decode": "decode ", "prefill": "prefill "}
ALMOST = 0.05  # share of the misfit within which another input explains it as well
SHOWN = 5  # inputs in the table
BEYOND = " beyond that of the rate"
HARDLY = 0.02  # a factor this near to 1 is within what meters tell
SAME = 0.005  # a factor this near to 1 is no change

Document = Mapping[str, Any]


def comparison_table(document: Document) -> RenderableType:
    """The verdict, figure by figure, then the inputs that explain most."""
    account = _last(document)
    first, *others = verdict_lines(document)
    parts: list[RenderableType] = [Text(first, style="bold"), *map(Text, others), _figures(document)]
    if account["misfit"] > 0:
        parts.append(_inputs(account))
    return Group(*parts, Text("\n".join(_notes(document)), style="dim"))


def _last(document: Document) -> Document:
    """The account at the observed rate, where there is one."""
    return document["at_observed_rate"] or document["planned"]


def verdict_lines(document: Document) -> list[str]:
    """How many figures lie within, at which rate, and what explains the rest."""
    planned, there = document["planned"], document["at_observed_rate"]
    lines = [f"At the plan's {planned['rate_per_s']:,.4g} requests/s {_inside_said(planned, document['level'])}."]
    if there:
        times = f"{there['rate_per_s'] / planned['rate_per_s']:.2f} times that"
        at = f"The observed rate is {there['rate_per_s']:,.4g} requests/s, {times}"
        (of_rate,) = (each for each in planned["explanations"] if each["input"] == "rate")
        close = of_rate["factor"] * planned["rate_per_s"] / there["rate_per_s"]  # to what would explain most
        alone = f", which alone takes away {percent(of_rate['removes'])} of the difference" if 0.9 < close < 1.1 else ""
        lines.append(f"{at}{alone}: there {_inside_said(there, document['level'])}.")
    return [*lines, explained_said(_last(document), BEYOND if there else "")]


def _inside_said(account: Document, level: float) -> str:
    figures = account["figures"]
    n, total = sum(each["inside"] for each in figures), len(figures)
    outside = [f"{_place(each['pool'])}'s {FIGURES[each['figure']].title}" for each in figures if not each["inside"]]
    which = f"; not {listed(outside)}" if 0 < len(outside) <= 4 else ""
    count = "the only figure lies" if n == total == 1 else "all figures lie" if n == total else f"{n} of {total} lie"
    return f"{count if n else 'no figure lies'} within the {percent(level)} interval of the laws{which}"


def explained_said(account: Document, beyond: str = "") -> str:
    """Which input explains the difference best, and which others almost as well; or that none does. `beyond` is what is
    explained already."""
    best, *others = account["explanations"]
    of = f"of the difference{beyond}"
    if best["removes"] <= 0:
        return f"No single input explains anything {of}." if not account["within_errors"] else "Nothing is to explain."
    said, share = input_said(best), percent(best["removes"])
    alike = [input_said(each) for each in others if each["removes"] >= max(best["removes"] - ALMOST, 0.5)]
    as_well = f" (almost as well: {'; '.join(alike)})" if alike else ""
    if account["within_errors"]:
        what = f"The errors of engines and laws alone explain the difference{beyond}"
        nearest = f"; of single inputs, nearest comes {said}: {share} of it{as_well}"
        return what + (nearest if account["explained"] and abs(best["factor"] - 1.0) > HARDLY else "") + "."
    if not account["explained"]:
        return f"No single input explains half {of}; the most {said}: {share}."
    return f"{sentence(said)} would explain {share} {of}{as_well}."


def input_said(each: Document) -> str:
    """'decode 12 % slower than the engine's law', '8.1 of 10 instances of pool 2 in service'."""
    name, factor = each["input"], each["factor"]
    if name == "instances":
        of = "" if each["pool"] is None else f" of pool {each['pool']}"
        return f"{each['would_be']:.3g} instances{of} in service, {each['planned']:g} planned"
    if name == "burstiness":
        return f"a squared CV of arrivals of {each['would_be']:.3g} for {each['planned']:.3g}"
    more, less = INPUTS[name]
    share = percent(abs(factor - 1.0))
    text = f"{BEFORE.get(name, '')}{'at least ' if each['at_bound'] else ''}{share} {more if factor > 1 else less}"
    hits = each["prefix_hit_frac"]
    return text + ("" if hits is None else f", as if prompts found {percent(hits)} of their tokens in a prefix cache")


def _place(pool: int | None) -> str:
    return "the fleet" if pool is None else f"pool {pool}"


def _figures(document: Document) -> RenderableType:
    """Intervals at the observed rate, where there is one; else at the plan's."""
    planned, there = document["planned"], document["at_observed_rate"]
    rates = [f"At {account['rate_per_s']:,.4g}/s" for account in (planned, there) if account]
    interval = f"{percent(document['level'])} interval"
    table = new_table("Figure", "Observed", *(rates if there else ["Predicted"]), interval, "Inside", "")
    table.title = "Observed and predicted"
    for first, last in zip(planned["figures"], _last(document)["figures"], strict=True):
        shown = FIGURES[first["figure"]]
        predicted = [number(each["predicted"], shown.si) for each in ((first, last) if there else (first,))]
        ends = " to ".join(number(end, shown.si) for end in last["interval"])
        name = f"{sentence(_place(first['pool']))}: {shown.title}"
        table.add_row(name, _observed(first, shown), *predicted, ends, "yes" if last["inside"] else "no", shown.unit)
    return table


def _observed(each: Document, shown: Quantity) -> str:
    value, between = number(each["observed"], shown.si), each["observed_between"]
    if between is None:
        return value
    low, high = between
    if high is None or not math.isfinite(high):
        return f"over {number(low, shown.si)}"
    return f"{value} ({number(low, shown.si)} to {number(high, shown.si)})"


def _inputs(account: Document) -> RenderableType:
    table = new_table("If there were", "Times planned", "Takes away", title="One input alone, and the misfit")
    table.columns[0].no_wrap = False
    ranked = [each for each in account["explanations"] if each["removes"] >= SAME and abs(each["factor"] - 1.0) > SAME]
    for each in ranked[:SHOWN]:
        times = f"{each['factor']:.2f}" + (" or beyond" if each["at_bound"] else "")
        table.add_row(input_said(each), times, percent(each["removes"]))
    return table


def _notes(document: Document) -> Sequence[str]:
    left = [f"{_place(each['pool'])}'s {FIGURES[each['figure']].title}" for each in document["not_compared"]]
    misfit, meters = _last(document)["misfit"], percent(document["meter_log_sigma"])
    return [
        *([f"Not compared, for no law of the plan's assumptions says it: {listed(left)}."] if left else []),
        f"Intervals: {document['n_draws']} draws of the errors of engines and laws, and {meters} of what counters and "
        "meters show. The fleet and its workload are the plan's.",
        f"Misfit: squared distance in sigmas, {number(misfit)} a figure; about 1 or less is what errors do. Times "
        "planned: of decode and prefill the time they take.",
    ]


@styled
def comparison_figure(document: Document) -> Figure:
    """Observed over predicted of every figure, with the interval of the prediction around 1."""
    account = _last(document)
    rows = [
        each for each in account["figures"] if math.isfinite(each["predicted"] or math.inf) and each["predicted"] > 0
    ]
    figure = new_figure(9.6, 1.8 + 0.42 * len(rows))
    axes = figure.subplots()
    ends = [1.0]
    for y, each in enumerate(reversed(rows)):
        low, high = (_ratio(end, each["predicted"]) for end in each["interval"])
        ratio = each["observed"] / each["predicted"]
        ends += [low, high, ratio]
        axes.plot([low, high], [y, y], color=BLUE, linewidth=7.0, alpha=0.25, solid_capstyle="butt")
        axes.plot([ratio], [y], "o", color=INK, markerfacecolor=INK if each["inside"] else PAPER, markersize=7.0)
    axes.axvline(1.0, color=MUTED, linewidth=1.0)
    axes.set_xscale("log")
    axes.set_xlim(min(ends) / 1.1, max(ends) * 1.1)
    ticks_at(axes.xaxis, log_values(min(ends) / 1.1, max(ends) * 1.1))
    names = [f"{sentence(_place(each['pool']))}: {FIGURES[each['figure']].title}" for each in reversed(rows)]
    axes.set_yticks(range(len(rows)), names)
    grid_along(axes, "x")
    axes.set_xlabel(
        f"observed over predicted; bars: {percent(document['level'])} interval of the prediction; hollow: outside"
    )
    say(figure, explained_said(account, BEYOND if document["at_observed_rate"] else ""))
    return figure


def _ratio(end: float | None, predicted: float) -> float:
    """An end of an interval over the prediction; one without end as ten times."""
    return 10.0 if end is None or not math.isfinite(end) else max(end / predicted, 0.01)
