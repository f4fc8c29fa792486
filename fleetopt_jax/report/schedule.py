"""A day by three plans in words and as tables, of the document that `fleetopt schedule --json` prints."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.core.units import DAY_S, HOUR_S, KW
from fleetopt_jax.report.rates import MOST_ROWS, per_s, time_of_day
from fleetopt_jax.report.tables import new_table
from fleetopt_jax.report.words import limits_said, listed, ms, percent

TITLES = {"static": "Static, for the peak", "scheduled": "Scheduled", "elastic": "Elastic, starts are free"}
FREE_GAP = 5e-4  # less is not worth a number

Document = Mapping[str, Any]


def schedule_table(document: Document) -> RenderableType:
    """What it saves, the three plans, what is up when, and what that rests on."""
    return Group(
        Text("\n".join(schedule_said(document)), style="bold"),
        _plans(document),
        _hours(document) if len(document["periods"]) <= MOST_ROWS else _days(document),
        *([_growth(document)] if "growth" in document else []),
        *(Text(note, style="dim") for note in _notes(document)),
    )


def _growth(document: Document) -> RenderableType:
    """What to buy by quarter."""
    growth = document["growth"]
    table = new_table("Quarter", "Peak, requests/s", "GPUs", "Buy", title=f"{growth['factor_per_year']:.3g}x a year")
    for each in growth["quarters"]:
        named = ("now", "-") if not each["quarter"] else (str(each["quarter"]), f"{each['n_bought']:+,}")
        table.add_row(named[0], per_s(each["peak_rate_per_s"]), f"{each['n_gpus']:,}", named[1])
    return table


def schedule_said(document: Document) -> list[str]:
    """The answer: what to own, what to switch when, what that saves, and where it is tightest."""
    static, scheduled, elastic = (document["plans"][name] for name in TITLES)
    span, name = span_said(document["span_s"]), document["profile"]["name"]
    saved = [f"{percent(document['saves']['energy_kwh'], 1)} of the energy"]
    if static["usd"]:
        saved.append(f"{percent(document['saves']['usd'], 1)} of the cost")
    if static["kg_co2"]:
        saved.append(f"{percent(document['saves']['kg_co2'], 1)} of the carbon")
    said = [
        f"Over {span} of {name} at {per_s(document['profile']['mean_rate_per_s'])} requests/s on average, switching "
        f"saves {listed(saved)}: {kwh(scheduled['energy_kwh'])} instead of {kwh(static['energy_kwh'])}.",
        f"Own {scheduled['n_gpus_owned']:,} GPUs ({_owned(scheduled)}); {_switched(document)}.",
    ]
    over = elastic["energy_kwh"] and scheduled["energy_kwh"] / elastic["energy_kwh"] - 1.0
    more = "nothing worth a number" if over < FREE_GAP else f"{percent(over, 1)} more energy than free ones"
    said.append(f"Starts of {document['running']['start_up_s']:,.0f} s cost {more}.")
    tight = max(range(len(scheduled["ttft_p99_s"])), key=lambda t: scheduled["ttft_p99_s"][t])
    said.append(
        f"Tightest at {when(document, tight)}: P99 TTFT {ms(scheduled['ttft_p99_s'][tight])}, limit "
        f"{limits_said(document['slo'])}."
    )
    return said


def _owned(plan: Mapping[str, Any]) -> str:
    parts = []
    for pool in plan["pools"]:
        n = max(pool["n_instances"])
        parts.append(f"{n:,} x {pool['tp']} {pool['gpu'].upper()} up to {pool['window_tokens']:,.0f} tokens")
    return ", ".join(parts)


def _switched(document: Document) -> str:
    n = document["plans"]["scheduled"]["n_gpus"]
    low, high = min(n), max(n)
    if low == high:
        return "nothing is worth switching"
    return f"from {low:,} up at {when(document, n.index(low))} to {high:,} at {when(document, n.index(high))}"


def span_said(span_s: float) -> str:
    """'a day', '10 days', '6 hours'."""
    if abs(span_s - DAY_S) < 1.0:
        return "a day"
    n, unit = (span_s / DAY_S, "days") if span_s > DAY_S else (span_s / HOUR_S, "hours")
    return f"{n:,.3g} {unit}"


def kwh(energy: float) -> str:
    if abs(energy) >= 1e5:
        return f"{energy / KW:,.4g} MWh"
    return f"{energy:,.4g} kWh" if abs(energy) < 1e3 else f"{energy:,.0f} kWh"


def when(document: Document, t: int) -> str:
    """A period as its clock has it: '14:00-15:00', '2025-03-04 14:00', 'day 2, 14:00'."""
    period, clock = document["periods"][t], document["profile"]["clock"]
    if clock == "day":
        return time_of_day(period["start_s"], period["length_s"])
    if clock == "calendar":
        return f"{datetime.fromtimestamp(period['start_s'], UTC):%Y-%m-%d %H:%M}"
    day, second = divmod(round(period["start_s"]), round(DAY_S))
    return f"day {day + 1}, {second // 3600:02d}:{second % 3600 // 60:02d}"


def _plans(document: Document) -> RenderableType:
    counted: list[tuple[str, str, Callable[[float], str]]] = [("Energy", "energy_kwh", kwh)]
    if document["plans"]["static"]["usd"]:
        counted.append(("Cost", "usd", lambda x: f"${x:,.0f}"))
    if document["plans"]["static"]["kg_co2"]:
        counted.append(("CO2", "kg_co2", lambda x: f"{x:,.0f} kg"))
    table = new_table("Plan", *(title for title, *_ in counted), "GPUs up", "Starts", "In time")
    for name, title in TITLES.items():
        plan = document["plans"][name]
        n = plan["n_gpus"]
        up = f"{max(n):,}" if min(n) == max(n) else f"{min(n):,} to {max(n):,}"
        attained = plan["slo_attainment"]
        in_time = "-" if attained is None else percent(attained, 2)
        starts = f"{plan['n_starts']:,}" if name != "elastic" else "-"
        table.add_row(title, *(said(plan[key]) for _, key, said in counted), up, starts, in_time)
    return table


def _hours(document: Document) -> RenderableType:
    """A row a period."""
    static, scheduled = document["plans"]["static"], document["plans"]["scheduled"]
    priced = len({period["usd_per_kwh"] for period in document["periods"]}) > 1
    price = ("USD/kWh",) if priced else ()
    table = new_table("When", "Requests/s", *price, "GPUs up", "Start", "Stop", "Power", "Static", "P99 TTFT")
    n = scheduled["n_gpus"]
    for t, period in enumerate(document["periods"]):
        before = n[t - 1] if t or document["profile"]["repeats"] else n[0]
        hours = period["length_s"] / HOUR_S
        table.add_row(
            when(document, t),
            per_s(period["rate_per_s"]),
            *((f"{period['usd_per_kwh']:.3g}",) if priced else ()),
            f"{n[t]:,}",
            *(f"{change:,}" if change > 0 else "" for change in (n[t] - before, before - n[t])),
            *(f"{plan['by_period']['energy_kwh'][t] / hours:,.0f} kW" for plan in (scheduled, static)),
            ms(scheduled["ttft_p99_s"][t]),
        )
    return table


def _days(document: Document) -> RenderableType:
    """A row a day, of many periods."""
    static, scheduled = document["plans"]["static"], document["plans"]["scheduled"]
    table = new_table("Day", "Requests/s", "Highest", "GPUs up", "Energy", "Static", "Saved", "Worst P99 TTFT")
    days: dict[int, list[int]] = {}
    for t, period in enumerate(document["periods"]):
        days.setdefault(math.floor(period["start_s"] / DAY_S), []).append(t)
    for k, rows in list(days.items())[:MOST_ROWS]:
        rates, n = ([_of(document, t) for t in rows], [scheduled["n_gpus"][t] for t in rows])
        used, would = (sum(plan["by_period"]["energy_kwh"][t] for t in rows) for plan in (scheduled, static))
        calendar = document["profile"]["clock"] == "calendar"
        table.add_row(
            f"{datetime.fromtimestamp(k * DAY_S, UTC):%Y-%m-%d}" if calendar else f"{k - min(days) + 1}",
            per_s(sum(rates) / len(rates)),
            per_s(max(rates)),
            f"{min(n):,} to {max(n):,}",
            kwh(used),
            kwh(would),
            percent(1.0 - used / would, 1) if would else "-",
            ms(max(scheduled["ttft_p99_s"][t] for t in rows)),
        )
    return table


def _of(document: Document, t: int) -> float:
    return document["periods"][t]["rate_per_s"]


def _notes(document: Document) -> Sequence[str]:
    running, search = document["running"], document["search"]
    cost, bound = search["cost"], search["changing_windows_bound"]
    notes = [
        "Scheduled: of each pool the cheapest course over all counts, by a dynamic program; of all windows the best of "
        f"{search['candidates']}."
    ]
    if cost > 0 and bound > 0:
        gap = 1.0 - bound / cost
        notes[0] += f" Windows that change by period and free starts could save {percent(max(0.0, gap), 1)} more."
    said = [f"an instance starts {running['start_up_s']:,.0f} s before its period, at idle watts"]
    if running["start_j"]:
        said.append(f"a start takes {running['start_j'] / KW:,.4g} kJ more")
    if running["min_up_s"]:
        said.append(f"a pool that grew stays as large for {running['min_up_s']:,.0f} s")
    if running["warm_spares"]:
        said.append(f"{running['warm_spares']:,} warm spares a pool")
    paid = "are paid for" if running["reserved"] else "are not paid for"
    said.append(f"GPUs that are down {paid} and draw {running['down_w_per_gpu']:,.4g} W")
    notes.append(f"Assumed: {'; '.join(said)}.")
    if "growth" in document:
        notes.append("Bought by the end of a quarter, for its peak; windows and engines as they are.")
    notes.append("Each period is taken for steady at its mean rate; what is shorter than a period is not seen.")
    return notes
