"""A day by three plans in words and as tables, of the document that `fleetopt schedule --json` prints."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.core.units import DAY_S, HOUR_S, KW
from fleetopt_jax.report.rates import MOST_ROWS, per_s, time_of_day
from fleetopt_jax.report.room import limit_said, more_frac, more_said, more_shown
from fleetopt_jax.report.tables import Cells, filled
from fleetopt_jax.report.words import gpus_of_instance, listed, ms, percent, sentence

TITLES = {"static": "Static, for the peak", "scheduled": "Scheduled", "elastic": "Elastic, starts are free"}
FREE_GAP = 5e-4  # less is not worth a number
MOST_SWITCHES = 12  # of a pool, that are said one by one

Document = Mapping[str, Any]


def schedule_table(document: Document) -> RenderableType:
    """What it saves, the three plans, what is up when, and what that rests on."""
    return Group(
        Text("\n".join(schedule_said(document)), style="bold"),
        filled(plan_cells(document)),
        filled(time_cells(document)),
        *([filled(growth_cells(document), grows_said(document))] if document.get("growth") else []),
        *(Text(note, style="dim") for note in schedule_notes(document)),
    )


def grows_said(document: Document) -> str:
    return f"{document['growth']['factor_per_year']:.3g}x a year"


def growth_cells(document: Document) -> Cells:
    """What to buy by quarter."""
    rows = []
    for each in document["growth"]["quarters"]:
        named = ("now", "-") if not each["quarter"] else (str(each["quarter"]), f"{each['n_bought']:+,}")
        rows.append([named[0], per_s(each["peak_rate_per_s"]), f"{each['n_gpus']:,}", named[1]])
    return Cells(["Quarter", "Peak, requests/s", "GPUs", "Buy"], rows)


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
    return [*said, *([f"First to break: {breaks}"] if (breaks := _breaks_first(document)) else [])]


def schedule_decision(document: Document) -> dict[str, str]:
    """Question and answer: what to own and buy, what to switch when, what that saves, what breaks first, how sure."""
    scheduled = document["plans"]["scheduled"]
    said = {"Own": f"{_gpus_said(scheduled)}: {_owned(scheduled)}."}
    if document.get("growth"):
        said["Buy"] = _bought(document)
    said["Switch"] = _courses(document)
    said["It saves"] = _saved(document)
    if breaks := _breaks_first(document):
        said["What breaks first"] = breaks
    attained = scheduled["slo_attainment"]
    held = "" if attained is None else f" By the laws {percent(attained, 2)} of the first tokens come in time."
    return said | {"How sure": f"{schedule_notes(document)[0]}{held}"}


def _gpus_said(plan: Mapping[str, Any]) -> str:
    """The most GPUs of each kind that serve, and the spares with them."""
    counts: dict[str, int] = {}
    for pool in plan["pools"]:
        counts[pool["gpu"]] = counts.get(pool["gpu"], 0) + max(pool["n_instances"]) * gpus_of_instance(pool)
    each = [f"{count:,} {gpu.upper()}" for gpu, count in counts.items()]
    more = plan["n_gpus_owned"] - sum(counts.values())
    return f"{plan['n_gpus_owned']:,} GPUs, warm spares with them" if more > 0 else listed(each)


def _bought(document: Document) -> str:
    """What to buy by which quarter, as traffic grows."""
    first, *later = document["growth"]["quarters"]
    bought = [f"{each['n_bought']:,} in quarter {each['quarter']}" for each in later if each["n_bought"] > 0]
    grows = f"growing {grows_said(document)}"
    if not bought:
        return f"Nothing in {len(later):,} quarters, {grows}: the {first['n_gpus']:,} GPUs do."
    return f"{listed(bought)}, {grows}: from {first['n_gpus']:,} GPUs today to {later[-1]['n_gpus']:,}."


def _courses(document: Document) -> str:
    """How many instances of which pool are switched on and off when."""
    pools = document["plans"]["scheduled"]["pools"]
    parts = []
    for k, pool in enumerate(pools, 1):
        who = f"pool {k} (up to {pool['window_tokens']:,.0f} tokens)" if len(pools) > 1 else ""
        parts.append(f"{who}{': ' if who else ''}{_course(document, pool['n_instances'])}")
    start_up_s = document["running"]["start_up_s"]
    early = f" An instance is started {start_up_s:,.0f} s before it is needed." if start_up_s else ""
    return f"{sentence('; '.join(parts))}.{early}"


def _course(document: Document, counts: Sequence[int]) -> str:
    """Of one pool; where there are too many switches to say, between what it is switched."""
    changes = [(t, counts[t] - counts[t - 1]) for t in range(len(counts)) if t or document["profile"]["repeats"]]
    changes = [(t, change) for t, change in changes if change]
    low, high = min(counts), max(counts)
    if not changes:
        return f"{high:,} instance{'s' if high != 1 else ''} up all the time"
    if len(changes) > MOST_SWITCHES:
        on = sum(max(0, change) for _, change in changes)
        return f"between {low:,} and {high:,} instances up, {on:,} switched on over {span_said(document['span_s'])}"
    return listed(
        [
            f"{abs(change):,} {'on' if change > 0 else 'off'} at {begins(document, t)} ({counts[t]:,} up)"
            for t, change in changes
        ]
    )


def _saved(document: Document) -> str:
    """What the scheduled and the elastic plan save over the static one: energy, cost, carbon."""
    static, scheduled, elastic = (document["plans"][name] for name in TITLES)
    shown = {"energy_kwh": ("energy", kwh), "usd": ("cost", _usd), "kg_co2": ("carbon", _kg)}
    of_each, of_elastic = [], []
    for name, (title, amount) in shown.items():
        if not static[name]:
            continue
        saved = percent(document["saves"][name], 1)
        of_each.append(f"{saved} of the {title} ({amount(scheduled[name])} instead of {amount(static[name])})")
        of_elastic.append(f"{percent((static[name] - elastic[name]) / abs(static[name]), 1)} of the {title}")
    free = f"were starts free, it would be {listed(of_elastic)} (elastic)"
    span = span_said(document["span_s"])
    return f"Over {span}, against as many up all the time as the peak needs: {listed(of_each)}; {free}."


def _usd(usd: float) -> str:
    return f"${usd:,.0f}"


def _kg(kg: float) -> str:
    return f"{kg:,.0f} kg"


def _breaks_first(document: Document) -> str:
    """The period with the least room: its limit, its value, how much more it carries."""
    plan, periods = document["plans"]["scheduled"], document["periods"]
    rooms = [(t, room) for t, room in enumerate(plan.get("room") or []) if room and periods[t]["rate_per_s"]]
    if not rooms:
        return ""
    t, room = min(rooms, key=lambda each: more_frac(each[1], periods[each[0]]["rate_per_s"]))
    rate = periods[t]["rate_per_s"]
    of = f" of pool {room['pool']}" if len(plan["pools"]) > 1 and room["pool"] is not None else ""
    values = plan["utilization" if room["limit"] == "utilization" else room["limit"]]
    reached = limit_said(room, values[t] if values else None, document["slo"], of)
    return (
        f"{when(document, t)}, with {plan['n_gpus'][t]:,} GPUs up at {per_s(rate)} requests/s: {reached}; it carries "
        f"{more_said(room, rate)} before that breaks."
    )


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


def begins(document: Document, t: int) -> str:
    """When a period begins, as its clock has it: '14:00'."""
    return when(document, t).split("-")[0] if document["profile"]["clock"] == "day" else when(document, t)


def _kw(power_kw: float) -> str:
    return f"{power_kw:,.0f} kW" if abs(power_kw) >= 100.0 else f"{power_kw:.3g} kW"


def when(document: Document, t: int) -> str:
    """A period as its clock has it: '14:00-15:00', '2025-03-04 14:00', 'day 2, 14:00'."""
    period, clock = document["periods"][t], document["profile"]["clock"]
    if clock == "day":
        return time_of_day(period["start_s"], period["length_s"])
    if clock == "calendar":
        return f"{datetime.fromtimestamp(period['start_s'], UTC):%Y-%m-%d %H:%M}"
    day, second = divmod(round(period["start_s"]), round(DAY_S))
    return f"day {day + 1}, {second // 3600:02d}:{second % 3600 // 60:02d}"


def plan_cells(document: Document) -> Cells:
    """The three plans side by side."""
    counted: list[tuple[str, str, Callable[[float], str]]] = [("Energy", "energy_kwh", kwh)]
    if document["plans"]["static"]["usd"]:
        counted.append(("Cost", "usd", _usd))
    if document["plans"]["static"]["kg_co2"]:
        counted.append(("CO2", "kg_co2", _kg))
    known = document["plans"]["static"]["slo_attainment"] is not None  # which assumptions may not tell
    rows = []
    for name, title in TITLES.items():
        plan = document["plans"][name]
        n = plan["n_gpus"]
        up = f"{max(n):,}" if min(n) == max(n) else f"{min(n):,} to {max(n):,}"
        in_time = [percent(plan["slo_attainment"], 2)] if known else []
        starts = f"{plan['n_starts']:,}" if name != "elastic" else "-"
        rows.append([title, *(said(plan[key]) for _, key, said in counted), up, starts, *in_time])
    return Cells(["Plan", *(title for title, *_ in counted), "GPUs up", "Starts", *["In time"] * known], rows)


def time_cells(document: Document) -> Cells:
    """What is up when."""
    return _hours(document) if len(document["periods"]) <= MOST_ROWS else _days(document)


def _hours(document: Document) -> Cells:
    """A row a period."""
    static, scheduled = document["plans"]["static"], document["plans"]["scheduled"]
    priced = len({period["usd_per_kwh"] for period in document["periods"]}) > 1
    price = ("USD/kWh",) if priced else ()
    rooms = scheduled.get("room") or [None] * len(document["periods"])
    rows = []
    n = scheduled["n_gpus"]
    for t, period in enumerate(document["periods"]):
        before = n[t - 1] if t or document["profile"]["repeats"] else n[0]
        hours = period["length_s"] / HOUR_S
        row = [
            when(document, t),
            per_s(period["rate_per_s"]),
            *((f"{period['usd_per_kwh']:.3g}",) if priced else ()),
            f"{n[t]:,}",
            *(f"{change:,}" if change > 0 else "" for change in (n[t] - before, before - n[t])),
            *(_kw(plan["by_period"]["energy_kwh"][t] / hours) for plan in (scheduled, static)),
            ms(scheduled["ttft_p99_s"][t]),
            more_shown(rooms[t], period["rate_per_s"]),
        ]
        rows.append(row)
    head = ["When", "Requests/s", *price, "GPUs up", "Start", "Stop", "Power", "Static", "P99 TTFT", "Carries more"]
    return Cells(head, rows)


def _days(document: Document) -> Cells:
    """A row a day, of many periods."""
    static, scheduled = document["plans"]["static"], document["plans"]["scheduled"]
    rows = []
    days: dict[int, list[int]] = {}
    for t, period in enumerate(document["periods"]):
        days.setdefault(math.floor(period["start_s"] / DAY_S), []).append(t)
    for k, of_day in list(days.items())[:MOST_ROWS]:
        rates, n = ([_of(document, t) for t in of_day], [scheduled["n_gpus"][t] for t in of_day])
        used, would = (sum(plan["by_period"]["energy_kwh"][t] for t in of_day) for plan in (scheduled, static))
        calendar = document["profile"]["clock"] == "calendar"
        row = [
            f"{datetime.fromtimestamp(k * DAY_S, UTC):%Y-%m-%d}" if calendar else f"{k - min(days) + 1}",
            per_s(sum(rates) / len(rates)),
            per_s(max(rates)),
            f"{min(n):,} to {max(n):,}",
            kwh(used),
            kwh(would),
            percent(1.0 - used / would, 1) if would else "-",
            ms(max(scheduled["ttft_p99_s"][t] for t in of_day)),
        ]
        rows.append(row)
    head = ["Day", "Requests/s", "Highest", "GPUs up", "Energy", "Static", "Saved", "Worst P99 TTFT"]
    return Cells(head, rows)


def _of(document: Document, t: int) -> float:
    return document["periods"][t]["rate_per_s"]


def schedule_notes(document: Document) -> Sequence[str]:
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
    if document.get("growth"):
        notes.append("Bought by the end of a quarter, for its peak; windows and engines as they are.")
    notes.append("Each period is taken for steady at its mean rate; what is shorter than a period is not seen.")
    return notes
