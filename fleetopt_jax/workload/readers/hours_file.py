"""Rates, prices and carbon by period: csv of several habits, each row a period, in order of time.

When a period begins: `start_s`, `hour` or `minute` (numbers), `period` (their count, an hour each), or `start`, `time`,
`timestamp`, `date`: times of day as 07:30, or ISO 8601 with or without a time zone. When it ends: a column `end` of the
same kind, or `length_s`, `length_h`, `minutes`; else where the next begins, the last one as long as the one before, or
up to midnight where all are times of one day.

What it says: a rate (`rate`, `rate_per_s`, `rps`, `rpm`, `requests_per_hour`), requests in the period (`requests`,
`count`), or a shape (`relative`, `share`); a price (`usd_per_kwh`, `usd_per_mwh`, `cents_per_kwh`); carbon
(`g_per_kwh`, `kg_per_kwh`, `carbon_intensity`).

Gaps, overlaps and rates below zero are refused. Without a column of ends, periods most of which are equally long have a
gap where one is several times as long.
"""

import csv
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

import numpy as np

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import read_bytes, shown
from fleetopt_jax.core.units import DAY_S, HOUR_S
from fleetopt_jax.workload.hours import MAX_PERIODS, MAX_RATE_PER_S, ROUNDING_S, Clock, Stretches

Quantity = Literal["rate", "price", "carbon"]

MINUTE_S = 60.0
STARTS = {"start_s": 1.0, "time_s": 1.0, "t_s": 1.0, "seconds": 1.0, "window_start_s": 1.0}
STARTS |= {"minute": MINUTE_S, "start_min": MINUTE_S}
STARTS |= dict.fromkeys(("hour", "hours", "start_h", "start_hour", "hour_of_day"), HOUR_S)
STAMPS = ("start", "time", "timestamp", "datetime", "date", "begin", "from", "interval_start", "time_of_day")
ENDS = {"end_s": 1.0, "end_min": MINUTE_S, "end_h": HOUR_S, "end_hour": HOUR_S}
STAMPED_ENDS = ("end", "until", "to", "interval_end")
LENGTHS = {"length_s": 1.0, "duration_s": 1.0, "minutes": MINUTE_S, "duration_min": MINUTE_S, "length_min": MINUTE_S}
LENGTHS |= {"length_h": HOUR_S, "duration_h": HOUR_S}
PERIOD = ("period", "index")


def _called(unit: float, *names: str) -> dict[str, float]:
    """Columns of one unit."""
    return dict.fromkeys(names, unit)


def _named(unit: float, *names: str) -> dict[str, float]:
    return dict.fromkeys(names, unit)


VALUES: dict[Quantity, dict[str, float]] = {
    "rate": _named(1.0, "rate", "rate_per_s", "requests_per_s", "req_per_s", "rps", "qps")
    | _named(1.0 / MINUTE_S, "rpm", "requests_per_min", "requests_per_minute", "rate_per_min")
    | _named(1.0 / HOUR_S, "rph", "requests_per_h", "requests_per_hour", "rate_per_h"),
    "price": _named(1.0, "usd_per_kwh", "price_usd_per_kwh", "price_usd_kwh", "usd_kwh", "price")
    | _named(1e-3, "usd_per_mwh", "price_usd_per_mwh", "price_usd_mwh", "usd_mwh", "lmp")
    | _named(1e-2, "cents_per_kwh", "price_cents_per_kwh", "cent_kwh"),
    "carbon": _named(1.0, "kg_co2_per_kwh", "kg_per_kwh")
    | _named(1e-3, "g_per_kwh", "g_co2_per_kwh", "gco2_per_kwh", "gco2eq_per_kwh", "carbon_intensity"),
}
COUNTS, SHAPES = ("requests", "n_requests", "count"), ("relative", "share", "multiplier", "shape")
WORDS = {
    "rate": "requests/s of a period: rate, rate_per_s, rpm, requests, or relative",
    "price": "a price of electricity: usd_per_kwh, usd_per_mwh or cents_per_kwh",
    "carbon": "carbon of electricity: g_per_kwh, kg_per_kwh or carbon_intensity (g/kWh)",
}
NEED_START = "need start_s, hour, period, or start with times of day or ISO 8601"
MOST = 1e6  # USD or kg a kWh
REGULAR_FROM = 4  # lengths from which periods may have a usual one
_TIME_OF_DAY = re.compile(r"^\s*(\d{1,2}):(\d{2})(?::(\d{2}))?\s*$")


class _Row(NamedTuple):
    place: str
    cells: dict[str, str]


@dataclass(frozen=True)
class _Times:
    """When rows begin or end [T]."""

    clock: Clock
    at_s: np.ndarray
    offset_s: float | None = None


def read_stretches(path: str | os.PathLike, quantity: Quantity) -> Stretches:
    """A quantity by period in a csv file; `BadInput` names the file, the line, the value and what is allowed."""
    where = os.fspath(path)
    rows = _rows(where)
    columns = tuple(rows[0].cells)
    times, lengths = _periods(where, columns, rows)
    values, relative, column = _values(where, columns, rows, quantity, lengths)
    whole_day = abs(times.at_s[0]) < ROUNDING_S and abs(lengths.sum() - DAY_S) < ROUNDING_S
    clock = "day" if times.clock == "day" or (times.clock == "since" and whole_day) else times.clock
    if clock == "day" and not whole_day:
        raise BadInput(where, _short_day(times, lengths), "need all 24 hours of a day, from 00:00 on")
    note = f"{len(rows):,} periods of {quantity} from column {column!r}"
    return Stretches(where, clock, times.at_s, lengths, values, times.offset_s, relative, note)


def _short_day(times: _Times, lengths: np.ndarray) -> str:
    if times.at_s[0] > ROUNDING_S:
        return f"a gap from 00:00 to {_said('day', times.at_s[0])}"
    return f"its times of day cover {lengths.sum() / HOUR_S:,.4g} hours"


def _rows(where: str) -> list[_Row]:
    """The rows with names of columns as we write them: small letters, `_` for all that is no letter or digit."""
    try:
        text = read_bytes(where).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(where, "is no text in UTF-8", "need csv") from None
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    try:
        table = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)]
    except csv.Error as error:
        raise BadInput(where, f"is no csv: {error}", "need csv with a header") from None
    lines = [(n, row) for n, row in enumerate(table, start=1) if any(cell.strip() for cell in row)]
    if not 3 <= len(lines) <= MAX_PERIODS + 1:
        n = max(0, len(lines) - 1)
        raise BadInput(where, f"{n:,} periods", f"need a header and 2 to {MAX_PERIODS:,} periods, a row each")
    names = [re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in lines[0][1]]
    if len(set(names)) < len(names):
        raise BadInput(where, f"its columns are {', '.join(names)}", "need each name once")
    rows = []
    for n, row in lines[1:]:
        if len(row) != len(names):
            raise BadInput(f"{where}, line {n}", f"{len(row)} cells, the header has {len(names)}", "need as many")
        decimal = {name: cell.strip() for name, cell in zip(names, row)}
        rows.append(_Row(f"{where}, line {n}", decimal))
    return rows


def _number(row: _Row, column: str, least: float = -MOST, most: float = 1e12) -> float:
    text = row.cells[column]
    if re.fullmatch(r"-?\d+,\d+", text):  # a decimal comma: cells are not parted by commas then
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        raise BadInput(row.place, f"{column} = {shown(text)}", "need a number") from None
    if not least <= value <= most:  # not NaN either
        raise BadInput(row.place, f"{column} = {shown(text)}", f"need a finite number, {least:g} to {most:g}")
    return value


def _periods(where: str, columns: Sequence[str], rows: Sequence[_Row]) -> tuple[_Times, np.ndarray]:
    """(when periods begin, how long they are [s])."""
    starts = _column(columns, (*STARTS, *STAMPS, *(f"{name}_utc" for name in STAMPS), *PERIOD))
    if starts is None:
        raise BadInput(where, f"no column tells when a period begins: {', '.join(columns)}", NEED_START)
    times = _times(rows, starts)
    back = np.flatnonzero(np.diff(times.at_s) <= ROUNDING_S)
    if len(back):
        k = int(back[0])
        before, after = (_said(times.clock, times.at_s[i]) for i in (k, k + 1))
        again = " (clocks that go back: give offsets from UTC)" if times.clock == "calendar" else ""
        raise BadInput(rows[k + 1].place, f"{after} comes after {before}{again}", "need periods in order, none twice")
    ends = _column(columns, (*ENDS, *STAMPED_ENDS))
    given = _column(columns, tuple(LENGTHS))
    if ends is not None:
        lengths = _times(rows, ends).at_s - times.at_s
        lengths += np.where((times.clock == "day") & (lengths <= 0), DAY_S, 0.0)
    elif given is not None:
        lengths = np.array([_number(row, given, 0.0) * LENGTHS[given] for row in rows])
    else:
        return times, _up_to_next(rows, times)
    if not np.all(lengths > 0):
        k = int(np.argmin(lengths))
        raise BadInput(rows[k].place, "a period that ends where it begins, or before", "need ends after starts")
    misses = np.diff(times.at_s) - lengths[:-1]
    if np.any(np.abs(misses) > ROUNDING_S):
        raise _missed(rows, times, int(np.argmax(np.abs(misses) > ROUNDING_S)), lengths)
    return times, lengths


def _up_to_next(rows: Sequence[_Row], times: _Times) -> np.ndarray:
    """Lengths where nothing tells when periods end."""
    steps = np.diff(times.at_s)
    rest = DAY_S - times.at_s[-1] if times.clock == "day" else steps[-1]
    kinds, n = np.unique(np.round(steps, 3), return_counts=True)
    usual = float(kinds[np.argmax(n)])
    longer = steps / usual
    odd = (longer > 1.5) & (np.abs(longer - np.round(longer)) < 1e-6)
    if len(steps) >= REGULAR_FROM and 2 * n.max() > len(steps) and odd.any():
        raise _missed(rows, times, int(np.argmax(odd)), np.full(len(rows), usual))
    return np.append(steps, rest)


def _missed(rows: Sequence[_Row], times: _Times, k: int, lengths: np.ndarray) -> BadInput:
    ends, begins = times.at_s[k] + lengths[k], times.at_s[k + 1]
    what = "a gap" if begins > ends else "an overlap"
    said = f"{what}: a period ends at {_said(times.clock, ends)}, the next begins at {_said(times.clock, begins)}"
    return BadInput(rows[k + 1].place, said, "need periods one after another")


def _column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _times(rows: Sequence[_Row], column: str) -> _Times:
    """The times of a column."""
    if column in PERIOD:
        counted = np.array([_number(row, column, 0) for row in rows])
        if np.any(np.diff(counted) != 1) or counted[0] not in (0, 1):
            k = int(np.argmax(np.diff(counted) != 1)) + 1 if np.any(np.diff(counted) != 1) else 0
            raise BadInput(rows[k].place, f"{column} = {counted[k]:g}", "need 0, 1, 2, ... or 1, 2, 3, ...")
        return _Times("since", (counted - counted[0]) * HOUR_S)
    unit_s = STARTS.get(column) or ENDS.get(column)
    if unit_s is not None and not _TIME_OF_DAY.match(rows[0].cells[column]):
        return _Times("since", np.array([_number(row, column, 0.0) * unit_s for row in rows]))
    if _TIME_OF_DAY.match(rows[0].cells[column]):
        return _Times("day", np.array([_time_of_day(row, column) for row in rows]))
    return _calendar(rows, column)


def _time_of_day(row: _Row, column: str) -> float:
    match = _TIME_OF_DAY.match(row.cells[column])
    hour, minute, second = (int(part or 0) for part in match.groups()) if match else (99, 0, 0)
    if not (hour < 24 or (hour, minute, second) == (24, 0, 0)) or minute > 59 or second > 59:
        raise BadInput(
            row.place, f"{column} = {shown(row.cells[column])}", "need times of day, 00:00 to 24:00, in all rows"
        )
    return hour * HOUR_S + minute * MINUTE_S + second


def _calendar(rows: Sequence[_Row], column: str) -> _Times:
    stamps = [_stamp(row, column) for row in rows]
    zoned = [stamp.tzinfo is not None for stamp in stamps]
    if any(zoned) != all(zoned):
        k = zoned.index(not zoned[0])
        problem = f"{column} = {shown(rows[k].cells[column])} {'has' if zoned[k] else 'has no'} time zone"
        raise BadInput(rows[k].place, problem, "need one in all rows, or in none")
    first = stamps[0].utcoffset()
    offset_s = None if first is None else first.total_seconds()
    instants = np.array([(stamp if all(zoned) else stamp.replace(tzinfo=UTC)).timestamp() for stamp in stamps])
    return _Times("calendar", instants + (offset_s or 0.0), offset_s)


def _stamp(row: _Row, column: str) -> datetime:
    text = re.sub(r"\s*(UTC|GMT)$", "Z", row.cells[column])
    try:
        stamp = datetime.fromisoformat(text)
    except ValueError:
        need = "need times of day as 07:30, or ISO 8601 as 2025-03-04T14:00+01:00"
        raise BadInput(row.place, f"{column} = {shown(row.cells[column])}", need) from None
    return stamp.replace(tzinfo=UTC) if column.endswith("_utc") and stamp.tzinfo is None else stamp


def _values(
    where: str, columns: Sequence[str], rows: Sequence[_Row], quantity: Quantity, lengths: np.ndarray
) -> tuple[np.ndarray, bool, str]:
    """(the values in our unit [T], whether they are a shape, their column)."""
    units = VALUES[quantity]
    names = (*units, *((*COUNTS, *SHAPES) if quantity == "rate" else ()))
    column = _column(columns, names)
    if column is None and quantity == "carbon":
        column = next((name for name in columns if name.startswith("carbon_intensity")), None)
    if column is None:
        raise BadInput(where, f"no column tells it: {', '.join(columns)}", f"need {WORDS[quantity]}")
    least, most = (0.0, MAX_RATE_PER_S * DAY_S) if quantity == "rate" else (-MOST if quantity == "price" else 0.0, MOST)
    values = np.array([_number(row, column, least, most) for row in rows]) * units.get(column, 1.0)
    if quantity == "carbon" and column not in units:
        values = values * 1e-3
    if column in COUNTS:
        values = values / lengths
    if quantity == "rate" and not values.max() > 0:
        raise BadInput(where, f"all {column} are 0", "need one > 0")
    return values, column in SHAPES, column


def _said(clock: Clock, at_s: float) -> str:
    """A time, as its file would have it."""
    if clock == "calendar":
        return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M}"
    if clock == "day":
        minutes = math.floor(at_s / MINUTE_S + 1e-6)
        return f"{minutes // 60:02d}:{minutes % 60:02d}"
    return f"{at_s:,.6g} s"
