"""A day as a schedule sees it: periods one after another, each with a rate that is taken to be steady, and what
electricity costs and emits in them.

**Clocks.** `day`: times of a day, after whose last period the first comes again. `calendar`: dates. `since`: seconds or
hours from a beginning that no calendar knows. Prices by times of day go with any profile; dated ones only with dates,
and both or neither with a time zone: nobody guesses.

**A price of a period** that several stretches of the price's own file fall into is their mean over time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import DAY_S
from fleetopt_jax.workload.profile import RateProfile

Clock = Literal["day", "calendar", "since"]

MAX_PERIODS = 8784  # hours of a leap year
MAX_RATE_PER_S = 1e9
CALENDAR_FROM_S = 1e8  # since 1970: earlier starts count from a beginning of their own
ROUNDING_S = 1e-3  # by which periods may miss each other


@dataclass(frozen=True)
class Stretches:
    """A number by stretches of time, each up to the next. Arrays [T]."""

    name: str
    clock: Clock
    start_s: np.ndarray  # on its own clock: of the day, since 1970 in local time, or since its beginning
    length_s: np.ndarray
    values: np.ndarray
    offset_s: float | None = None  # of local time from UTC, of stamps with a time zone
    relative: bool = False  # whether the values are relative to a rate that somebody else knows
    note: str = ""  # how it was understood

    @property
    def span_s(self) -> float:
        return float(self.length_s.sum())


@dataclass(frozen=True)
class Hours:
    """Periods, one after another without a gap, each with a steady rate and prices. Arrays [T]."""

    name: str
    clock: Clock
    start_s: np.ndarray  # see `Stretches`
    length_s: np.ndarray
    rate_per_s: np.ndarray  # mean of the period [1/s]
    repeats: bool  # whether the first period follows the last one again
    usd_per_kwh: np.ndarray | None = None  # may be negative; None: the site's
    kg_co2_per_kwh: np.ndarray | None = None
    offset_s: float | None = None
    note: str = ""

    @property
    def n_periods(self) -> int:
        return len(self.start_s)

    @property
    def span_s(self) -> float:
        return float(self.length_s.sum())

    @property
    def mean_rate_per_s(self) -> float:
        """Over time."""
        return float(np.sum(self.rate_per_s * self.length_s)) / self.span_s

    @property
    def busiest(self) -> int:
        """The period with the highest rate; the first of several."""
        return int(np.argmax(self.rate_per_s))


def make_hours(
    rate_per_s: Sequence[float] | np.ndarray,
    *,
    length_s: float | Sequence[float] | np.ndarray = 3600.0,
    usd_per_kwh: float | Sequence[float] | np.ndarray | None = None,
    kg_co2_per_kwh: float | Sequence[float] | np.ndarray | None = None,
    repeats: bool = True,
    name: str = "hours",
) -> Hours:
    """Checked `Hours` of rates [1/s] one after another, by default those of a day that repeats itself.

    >>> day = fo.make_hours([50.0] * 8 + [200.0] * 12 + [100.0] * 4, usd_per_kwh=0.1)
    >>> day.n_periods, day.mean_rate_per_s
    (24, 133.33333333333334)
    """
    rate = np.asarray(rate_per_s, dtype=float)
    lengths, usd, kg = (
        None if x is None else np.broadcast_to(np.asarray(x, float), rate.shape)
        for x in (length_s, usd_per_kwh, kg_co2_per_kwh)
    )
    if rate.ndim != 1 or not 1 <= len(rate) <= MAX_PERIODS:
        raise ValueError(f"need 1 to {MAX_PERIODS:,} rates one after another, got shape {rate.shape}")
    if not np.all((rate >= 0) & (rate <= MAX_RATE_PER_S)) or not rate.max() > 0:
        raise ValueError(f"need finite rates >= 0, one of them > 0, got {rate.min():g} to {rate.max():g}")
    if lengths is None or not np.all((lengths > 0) & (lengths < np.inf)):
        raise ValueError(f"need finite length_s > 0, got {length_s}")
    if usd is not None and not np.isfinite(usd).all():
        raise ValueError(f"need finite usd_per_kwh, got {usd_per_kwh}")
    if kg is not None and not np.all((kg >= 0) & (kg < np.inf)):
        raise ValueError(f"need finite kg_co2_per_kwh >= 0, got {kg_co2_per_kwh}")
    start_s = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    clock: Clock = "day" if repeats and abs(lengths.sum() - DAY_S) < ROUNDING_S else "since"
    return Hours(name, clock, start_s, lengths, rate, repeats, usd, kg)


def at_mean(hours: Hours, mean_rate_per_s: float) -> Hours:
    """The same shape with this mean rate [1/s]."""
    return replace(hours, rate_per_s=hours.rate_per_s * (mean_rate_per_s / hours.mean_rate_per_s))


def hours_of(rates: Stretches) -> Hours:
    """Rates by period as `Hours` without prices, relative ones with a mean of 1 request/s."""
    about = rates.start_s, rates.length_s, rates.values
    hours = Hours(rates.name, rates.clock, *about, repeats=rates.clock == "day", offset_s=rates.offset_s)
    hours = replace(hours, note=rates.note)
    return at_mean(hours, 1.0) if rates.relative else hours


def hours_of_profile(name: str, profile: RateProfile) -> Hours:
    """A trace's own periods, those that it covers whole, one after another as they came."""
    whole = np.flatnonzero(profile.whole)
    whole = np.arange(whole[0], whole[-1] + 1)
    start_s = profile.start_s[whole]
    lengths = np.full(len(whole), profile.bin_s)
    clock: Clock = "calendar" if start_s[0] > CALENDAR_FROM_S else "since"
    return Hours(name, clock, start_s, lengths, profile.rate_per_s[whole], repeats=False)


def priced(hours: Hours, *, usd_per_kwh: Stretches | None, kg_co2_per_kwh: Stretches | None) -> Hours:
    """The hours with prices and carbon of their own periods; `BadInput` where clocks do not go together."""
    usd, kg = (None if each is None else along(each, hours) for each in (usd_per_kwh, kg_co2_per_kwh))
    return replace(hours, usd_per_kwh=usd, kg_co2_per_kwh=kg)


def along(stretches: Stretches, hours: Hours) -> np.ndarray:
    """The mean of some stretches over each period [T]."""
    start_s = hours.start_s
    if stretches.clock == "day":
        return _means(stretches, start_s % DAY_S, hours.length_s)
    if stretches.clock != hours.clock:
        said = {"day": "times of day", "calendar": "dates", "since": "times from a beginning of its own"}
        problem = f"has {said[stretches.clock]}, {hours.name} has {said[hours.clock]}"
        raise BadInput(stretches.name, problem, f"need times of day, or {said[hours.clock]}")
    if (stretches.offset_s is None) != (hours.offset_s is None):
        zoned, plain = (stretches, hours) if hours.offset_s is None else (hours, stretches)
        problem = f"{zoned.name} has stamps with a time zone, {plain.name} without one"
        raise BadInput(stretches.name, problem, "need both or neither: 2025-03-04T14:00+01:00")
    if stretches.offset_s is not None and hours.offset_s is not None:
        start_s = start_s - hours.offset_s + stretches.offset_s
    first_s, last_s = stretches.start_s[0], stretches.start_s[0] + stretches.span_s
    if start_s[0] < first_s - ROUNDING_S or start_s[-1] + hours.length_s[-1] > last_s + ROUNDING_S:
        late = first_s - start_s[0] > ROUNDING_S
        problem = f"{'begins after' if late else 'ends before'} {hours.name} does"
        raise BadInput(stretches.name, problem, "need all of its time, or times of day")
    return _means(stretches, start_s, hours.length_s)


def _means(stretches: Stretches, start_s: np.ndarray, length_s: np.ndarray) -> np.ndarray:
    """Means over time from `start_s` on, of stretches that begin anew after their last."""
    edges = np.append(0.0, np.cumsum(stretches.length_s))
    total = np.append(0.0, np.cumsum(stretches.values * stretches.length_s))
    since = start_s - stretches.start_s[0]

    def before(at_s: np.ndarray) -> np.ndarray:
        laps, rest = np.divmod(at_s, edges[-1])
        return laps * total[-1] + np.interp(rest, edges, total)

    # A period in one stretch has that one's value to the digit.
    k = np.searchsorted(edges, since % edges[-1] + ROUNDING_S, side="right") - 1
    k = k.clip(0, len(stretches.values) - 1)
    inside = (since % edges[-1]) + length_s <= edges[k + 1] + ROUNDING_S
    return np.where(inside, stretches.values[k], (before(since + length_s) - before(since)) / length_s)
