"""The rate by hour in words and as a table, of the document of `fleetopt trace`. Draws nothing: no matplotlib here."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.core.units import DAY_S, HOUR_S
from fleetopt_jax.workload.profile import Hour, RateProfile

CALENDAR_S = (1e8, 2.5e11)  # since 1970, 1973 to 9892: what is before counts from a day of its own
MOST_ROWS = 36  # bins of less than a day and a half are shown one by one, more by time of day
BAR_LETTERS = 20
HEAVIER = 1.1  # tokens of another hour over those of the busiest: less is not worth a line

Bins = Sequence[Mapping[str, Any]]


def stretch(length_s: float) -> str:
    """'hour', '5 minutes', '6 hours'."""
    if length_s < HOUR_S:
        n = round(length_s / 60)
        return "minute" if n == 1 else f"{n} minutes"
    n = round(length_s / HOUR_S)
    return "hour" if n == 1 else f"{n} hours"


def by_stretch(length_s: float) -> str:
    """'by hour', 'in steps of 5 minutes'."""
    name = stretch(length_s)
    return f"in steps of {name}" if name[0].isdigit() else f"by {name}"


def time_of_day(start_s: float, length_s: float) -> str:
    """'14:00-15:00', of a clock."""
    begin = round(start_s % DAY_S)
    ends = begin + round(length_s)
    return "-".join(f"{at // 3600:02d}:{at % 3600 // 60:02d}" for at in (begin, ends))


def is_calendar(start_s: float) -> bool:
    """Whether a clock counts from 1970."""
    return CALENDAR_S[0] <= start_s <= CALENDAR_S[1]


def clock(start_s: float, length_s: float) -> str:
    """'2025-03-04 14:00-15:00' of a calendar; '14:00-15:00' or 'day 2, 14:00-15:00' of a clock that began at 0."""
    said = time_of_day(start_s, length_s)
    if is_calendar(start_s):
        return f"{datetime.fromtimestamp(start_s, UTC):%Y-%m-%d} {said}"
    day = math.floor(start_s / DAY_S) + 1
    return said if day == 1 else f"day {day:,}, {said}"


def per_s(rate_per_s: float) -> str:
    """A rate in three digits, without exponents where they can be helped."""
    return f"{rate_per_s:,.0f}" if rate_per_s >= 1000 else f"{rate_per_s:.3g}"


def called(at: str, length_s: float) -> str:
    """'busiest hour', 'p95 hour'."""
    return f"{'busiest' if at == 'peak' else 'p95'} {stretch(length_s)}"


def planned_for(workload: Mapping[str, Any]) -> dict[str, str]:
    """A row of the decision: the hour that a plan was made for, of the plan's `workload`; nothing for a mean rate."""
    hour = workload.get("hour")
    if not hour:
        return {}
    length_s = hour["length_s"]
    lengths = f"its own {hour['n_requests']:,} requests" if hour["own_lengths"] else "the lengths of the whole trace"
    when, rate = clock(hour["start_s"], length_s), per_s(hour["rate_per_s"])
    said = (
        f"Its {called(workload['at'], length_s)} ({when}, {rate} requests/s; the mean is "
        f"{per_s(hour['mean_rate_per_s'])}), with {lengths}."
    )
    return {"Planned for": said}


def mean_warning(name: str, profile: RateProfile, mean_rate_per_s: float) -> str:
    """What a plan at the mean rate [1/s] leaves out."""
    k, over = profile.busiest, profile.peak_over_mean
    when = clock(float(profile.start_s[k]), profile.bin_s)
    return (
        f"{name} is planned at its mean of {per_s(mean_rate_per_s)} requests/s; its busiest {stretch(profile.bin_s)} "
        f"({when}) has {per_s(over * mean_rate_per_s)}, {over:.2f} times that: --at peak plans for it"
    )


def hour_warnings(profile: RateProfile, hour: Hour) -> list[str]:
    """What a plan for an hour leaves out."""
    k, said = profile.at(hour.at), []
    name = f"the {called(hour.at, hour.length_s)} ({clock(hour.start_s, hour.length_s)})"
    if not profile.varies:
        said.append(f"{name} is no busier than chance and bursts make it: the rate hardly changes, --at mean will do")
    if hour.other_lengths and not hour.own_lengths:
        prompt, output = profile.mean_prompt_tokens[k], profile.mean_output_tokens[k]
        said.append(
            f"the {hour.n_requests:,} requests of {name} have other lengths ({prompt:,.0f} in, {output:,.0f} out), but "
            "are too few to plan with: the lengths are those of the whole trace"
        )
    tokens = profile.tokens_per_s * profile.whole
    heaviest = int(tokens.argmax())
    if hour.at == "peak" and tokens[heaviest] > HEAVIER * tokens[k]:
        when, over = clock(float(profile.start_s[heaviest]), hour.length_s), tokens[heaviest] / tokens[k]
        said.append(f"{when} has fewer requests, but {over:.2f} times the tokens of {name}: it may need more")
    return said


def rates_table(document: Mapping[str, Any]) -> RenderableType:
    """The rate by hour, the busiest marked; by time of day where there are several days."""
    from fleetopt_jax.report.tables import new_table

    bins: Bins = document["rate_by_hour"]
    if not bins:
        return Text("Rate by hour: too few requests with arrival times, or too short a time, to tell.", style="dim")
    by = f"Rate {by_stretch(document['bin_s'])}"
    title = by if len(bins) <= MOST_ROWS else f"{by} of the day, over {_days(bins):,} days"
    rows = _each(document, bins) if len(bins) <= MOST_ROWS else _of_the_day(document, bins)
    columns = ("Clock", "Requests/s", *(() if len(bins) <= MOST_ROWS else ("Highest",)), "Prompt", "Output", "")
    table = new_table(*columns, title=title)
    table.columns[-1].justify = "left"
    for row in rows:
        table.add_row(*row)
    return Group(table, Text("\n".join(rates_said(document))))


def rates_said(document: Mapping[str, Any]) -> list[str]:
    """What the rate by hour comes to, a sentence each; `document` has bins."""
    bins, busiest, p95 = document["rate_by_hour"], document["busiest"], document["p95"]
    unit, length_s = stretch(document["bin_s"]), document["bin_s"]
    mean = sum(each["n_requests"] for each in bins) / sum(each["covered_s"] for each in bins)
    said = [
        f"Busiest {unit}: {clock(busiest['start_s'], length_s)}, {per_s(busiest['rate_per_s'])} requests/s, "
        f"{document['peak_over_mean']:.2f} times the mean of {per_s(mean)}; p95 {per_s(p95['rate_per_s'])}."
    ]
    if document["rate_varies"]:
        said.append("The rate varies beyond chance: plan with --at peak, or --at p95.")
    else:
        said.append("The rate varies by no more than chance and bursts, or too little to plan for.")
    if len(bins) <= MOST_ROWS and any(not each["whole"] for each in bins):
        said.append(f"(part): the trace begins or ends in it; such {_plural(unit)} are not compared.")
    return said


def _plural(unit: str) -> str:
    return f"spans of {unit}" if unit[0].isdigit() else f"{unit}s"


def _days(bins: Bins) -> int:
    return len({math.floor(each["start_s"] / DAY_S) for each in bins})


def _each(document: Mapping[str, Any], bins: Bins) -> list[tuple[str, ...]]:
    most = max(each["rate_per_s"] for each in bins if each["whole"])
    rows = []
    for each in bins:
        bar = "" if not each["whole"] else _bar(each["rate_per_s"], most)
        mark = " busiest" if each["start_s"] == document["busiest"]["start_s"] else "" if each["whole"] else "(part)"
        when = time_of_day(each["start_s"], document["bin_s"])
        rows.append((when, per_s(each["rate_per_s"]), *_lengths([each]), f"{bar}{mark}"))
    return rows


def _of_the_day(document: Mapping[str, Any], bins: Bins) -> list[tuple[str, ...]]:
    by_time: dict[str, list[Mapping[str, Any]]] = {}
    for each in bins:
        if each["whole"]:
            by_time.setdefault(time_of_day(each["start_s"], document["bin_s"]), []).append(each)
    busiest = time_of_day(document["busiest"]["start_s"], document["bin_s"])
    means = {when: _mean_rate(found) for when, found in by_time.items()}
    rows = []
    for when, found in sorted(by_time.items()):
        mark = " busiest" if when == busiest else ""
        highest = per_s(max(each["rate_per_s"] for each in found))
        bar = _bar(means[when], max(means.values()))
        rows.append((when, per_s(means[when]), highest, *_lengths(found), f"{bar}{mark}"))
    return rows


def _mean_rate(bins: Bins) -> float:
    return sum(each["n_requests"] for each in bins) / sum(each["covered_s"] for each in bins)


def _lengths(bins: Bins) -> tuple[str, str]:
    n = sum(each["n_requests"] for each in bins)
    if not n:
        return "-", "-"
    names = ("mean_prompt_tokens", "mean_output_tokens")
    prompt, output = (sum(each["n_requests"] * (each[name] or 0.0) for each in bins) / n for name in names)
    return f"{prompt:,.0f}", f"{output:,.0f}"


def _bar(rate_per_s: float, most_per_s: float) -> str:
    return "#" * max(1 if rate_per_s else 0, round(BAR_LETTERS * rate_per_s / most_per_s)) if most_per_s else ""
