"""Time stamps: seconds from the first, whatever clock and unit a file has; a unit is checked, never assumed.

A unit that nobody names is read off the numbers. Digits tell an epoch: seconds since 1970 have 10 digits, milliseconds
13, microseconds 16, nanoseconds 19. Other numbers are seconds where that is a usual rate of requests; where it is not
and several units give a rate that a log may have, they are refused with the candidates.
"""

import re
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import HOUR_S, MS, NS, US
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.numbers import (
    BadRow,
    arrow,
    cast,
    first_uncastable,
    is_text,
    numbers,
    place,
    undictionaried,
    value_at,
)
from fleetopt_jax.workload.readers.rounded import Grid, grid_of

UNITS = {"s": 1.0, "ms": MS, "us": US, "ns": NS}
EPOCH_S = (946_684_800.0, 4_102_444_800.0)  # 2000 to 2100
EXCEL_DAYS = (36_526.0, 73_051.0)  # the same, in a spreadsheet's days
RATES_PER_S = (1 / HOUR_S, 1e6)  # what a log may have: one request an hour to a million a second
USUAL_PER_S = (0.1, 1000.0)  # where seconds are taken for seconds
USUAL_FRACTIONAL_PER_S = (0.01, 1e6)  # the same where stamps have fractions, which whole milliseconds have not
NEED = "need seconds or ISO 8601 time stamps, of 1678 to 2261, one kind in all rows"
_SLASHED = re.compile(r"^\s*\d{1,4}[/.]\d{1,2}[/.]\d{1,4}\b")
_DAY = r"^\s*\d{4}-\d{2}-\d{2}\s*$"
_CLOCKS = (pa.float64(), pa.timestamp("ns"), pa.timestamp("ns", "UTC"))


@dataclass
class Stamps:
    """The stamps of one column, gathered piece by piece: numbers, or nanoseconds since 1970 of a calendar."""

    where: str
    name: str
    decimal_comma: bool = False
    clock: pa.DataType | None = None
    zone: str = ""
    days_only: bool = True
    pieces: list[np.ndarray] = field(default_factory=list)
    _kept: np.ndarray | None = None  # rows of the present piece

    def add(self, before: int, column: pa.Array, kept: np.ndarray | None = None) -> None:
        """The stamps of the `kept` rows of a piece after `before` rows; the first one tells the kind of all."""
        self._kept = kept
        column = undictionaried(column if kept is None else column.take(pa.array(kept)))
        if self.clock is None:
            self.clock = self._kind(before, column)
        if self.clock == pa.float64():
            self.pieces.append(self._numeric(before, column))
            return
        if pa.types.is_date(column.type):
            column = column.cast(pa.timestamp("ms")) if pa.types.is_date64(column.type) else column
        elif is_text(column.type):
            self.days_only = self.days_only and bool(arrow.all(arrow.match_substring_regex(column, _DAY)).as_py())
        else:
            self.days_only = False
        stamps = cast(column, self.clock)
        if stamps is None and is_text(column.type):
            column = _as_iso(column)
            stamps = cast(column, self.clock)
        if stamps is None:
            raise self._refused(before, first_uncastable(column, self.clock), column)
        if stamps.null_count:
            row = int(np.argmax(stamps.is_null().to_numpy(zero_copy_only=False)))
            raise BadInput(self._place(before, row), f"{self.name} is missing", "need a time stamp")
        self.pieces.append(pc.cast(stamps, pa.int64()).to_numpy(zero_copy_only=False))

    def _numeric(self, before: int, column: pa.Array) -> np.ndarray:
        try:
            values = numbers(self.name, column, decimal_comma=self.decimal_comma, whole=False)
        except BadRow as error:
            raise BadInput(self._place(before, error.row), error.problem, NEED) from None
        good = np.abs(values) <= limits.MAX_TIME_S  # not NaN either, which is missing
        if not good.all():
            row = int(np.argmin(good))
            if np.isnan(values[row]):
                raise BadInput(self._place(before, row), f"{self.name} is missing", "need a time stamp")
            problem = f"{self.name} = {value_at(column, row)}"
            raise BadInput(self._place(before, row), problem, "need a finite time")
        return values

    def _kind(self, before: int, column: pa.Array) -> pa.DataType:
        if pa.types.is_timestamp(column.type):
            self.zone = column.type.tz or ""
            return pa.timestamp("ns", "UTC" if column.type.tz else None)
        if pa.types.is_date(column.type):
            return pa.timestamp("ns")
        if pa.types.is_time(column.type):
            raise BadInput(self.where, f"column {self.name!r} is a time of day without a date", "need both in one")
        if not is_text(column.type):
            return pa.float64()
        first = column.drop_null()[:1]
        for text in (first, _as_iso(first)):
            for clock in _CLOCKS:
                if cast(text, clock) is not None:
                    self.zone = "offsets in the stamps" if clock == _CLOCKS[2] else ""
                    return clock
        if self.decimal_comma and re.fullmatch(r"\s*-?\d[\d.]*,\d+\s*", first[0].as_py() or ""):
            return pa.float64()
        raise self._refused(before, int(np.argmax(column.is_valid().to_numpy(zero_copy_only=False))), column)

    def _place(self, before: int, row: int) -> str:
        return place(self.where, before, row if self._kept is None else int(self._kept[row]))

    def _refused(self, before: int, row: int, column: pa.Array) -> BadInput:
        value = value_at(column, row)
        need = NEED
        if _SLASHED.match(value):
            need = (
                "a date with slashes or dots may begin with the day or the month: need ISO 8601, as 2024-05-10 00:00:03"
            )
        return BadInput(self._place(before, row), f"{self.name} = {value!r}", need)


@dataclass(frozen=True)
class Arrivals:
    """Seconds since the first stamp, in the rows' order, and what the stamps were taken for."""

    seconds: np.ndarray
    first_s: float  # on the file's own clock; since 1970 where that is a calendar
    unit: str  # s, ms, us, ns, calendar or day
    note: str
    doubt: str = ""  # why the unit that was asked for may be wrong
    first: np.generic | None = None  # stamp, as it is read
    unit_s: float = 0.0  # of numbers; 0 of a calendar's nanoseconds
    grid: Grid | None = None  # that the stamps were rounded to (`rounded.py`)

    def since_first(self, stamps: np.ndarray) -> np.ndarray:
        """Seconds of further stamps, none before the first."""
        return (stamps - self.first) * self.unit_s if self.unit_s else (stamps - self.first).view(np.uint64) / 1e9


def arrivals(stamps: Stamps, n_requests: float, asked_s: float | None, documented_s: float | None) -> Arrivals:
    """What the gathered stamps say; `BadInput` where their unit is anybody's guess."""
    raw = np.concatenate(stamps.pieces)
    first = raw.min()
    if raw.dtype == np.int64:  # nanoseconds: their span may be more than an int64 holds
        seconds = (raw - first).view(np.uint64) / 1e9
        unit = "day" if stamps.days_only else "calendar"
        kind = "dates without a time of day" if stamps.days_only else "calendar times"
        zone = f"zone {stamps.zone}" if stamps.zone else "no zone given, taken as they stand"
        grid = None if stamps.days_only else grid_of(seconds)
        return Arrivals(seconds, float(first / 1e9), unit, f"{kind}, {zone}", first=first, grid=grid)
    unit_s, note = _unit(stamps.where, stamps.name, raw, n_requests, (asked_s, documented_s))
    name = next((each for each, size in UNITS.items() if size == unit_s), f"{unit_s:g} s")
    with np.errstate(over="ignore"):
        seconds, first_s = (raw - first) * unit_s, float(first * unit_s)
    epoch = _epoch(raw) if asked_s else None
    doubt = ""
    if epoch not in (None, asked_s):
        doubt = f"time stamps in {stamps.name!r} are read in {name}, and look like {_name(epoch)} since 1970"
    return Arrivals(seconds, first_s, name, f"time in {name} ({note})", doubt, first, unit_s, grid_of(seconds))


def _unit(
    where: str, name: str, stamps: np.ndarray, n_requests: float, given: tuple[float | None, float | None]
) -> tuple[float, str]:
    """(length of the stamps' unit [s], how it was found)."""
    asked_s, documented_s = given
    if asked_s is not None:
        return asked_s, "as asked"
    low, high, epoch = float(stamps.min()), float(stamps.max()), _epoch(stamps)
    if epoch is not None and documented_s in (None, epoch):
        return epoch, f"{len(f'{high:.0f}')} digits since 1970"
    if epoch is not None and documented_s is not None:
        both = f"{_name(documented_s)} by its layout or name, {_name(epoch)} by its digits since 1970"
        raise BadInput(where, f"time stamps in {name!r} may be {both}", "say which: --time-unit")
    if documented_s is not None:
        return documented_s, "as the layout or the name says"
    if high == low or n_requests < 2:
        return 1.0, "nothing tells: there is no span"
    per_unit = n_requests / (high - low)
    fractional = bool((stamps != np.floor(stamps)).any())
    if fractional and EXCEL_DAYS[0] <= low and high <= EXCEL_DAYS[1] and per_unit > 1000:
        raise BadInput(where, f"time stamps in {name!r} look like a spreadsheet's days", "need ISO 8601 or seconds")
    usual = USUAL_FRACTIONAL_PER_S if fractional else USUAL_PER_S
    if usual[0] <= per_unit <= usual[1]:
        return 1.0, f"{per_unit:,.3g} requests/s{', with fractions' if fractional else ''}"
    able = {each: size for each, size in UNITS.items() if RATES_PER_S[0] <= per_unit / size <= RATES_PER_S[1]}
    if len(able) > 1:
        listed = " or ".join(f"{each} ({per_unit / size:,.3g} requests/s)" for each, size in able.items())
        raise BadInput(where, f"time stamps in {name!r} may be {listed}", "say which: --time-unit")
    return next(iter(able.values()), 1.0), "the only unit that gives a rate a log may have"


def _epoch(stamps: np.ndarray) -> float | None:
    """The unit in which all stamps lie between 2000 and 2100."""
    low, high = float(stamps.min()), float(stamps.max())
    return next((size for size in UNITS.values() if EPOCH_S[0] <= low * size and high * size <= EPOCH_S[1]), None)


def _name(size: float | None) -> str:
    return next(each for each, known in UNITS.items() if known == size)


def _as_iso(column: pa.Array) -> pa.Array:
    """Text stamps as Arrow reads them: no blanks, `UTC` as Z, a fraction after a dot, of nine digits at most."""
    text = arrow.utf8_trim_whitespace(column)
    for found, instead in (
        (r"\s*(UTC|GMT|[zZ])$", "Z"),
        (r"(\d{2}:\d{2}:\d{2}),(\d+)", r"\1.\2"),
        (r"(\d{2}:\d{2}:\d{2}\.\d{9})\d+", r"\1"),
        (r"(:\d{2}(?:\.\d+)?)\s+([-+]\d{2})", r"\1\2"),
    ):
        text = arrow.replace_substring_regex(text, found, instead)
    return text
