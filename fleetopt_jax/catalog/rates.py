"""Bundled rate profiles: facts of three production services, hour by hour, with source and licence."""

from functools import cache
from typing import Any

import numpy as np

from fleetopt_jax.catalog.packaged import packaged_json
from fleetopt_jax.core.errors import unknown_name
from fleetopt_jax.core.units import DAY_S, HOUR_S
from fleetopt_jax.workload.hours import Hours, Stretches, hours_of

HOURS_A_DAY = 24
AS_THEY_CAME = "-10d"  # behind a name: the ten days, not their mean


@cache
def bundled_rates() -> dict[str, dict[str, Any]]:
    """What is said of each: title, source, licence, and requests a second by hour, null where upstream has none."""
    return packaged_json("rate_profiles.json")


def names_of_rates() -> tuple[str, ...]:
    """`servegen-large` is the mean day of ten, `servegen-large-10d` the ten days one after another."""
    return tuple(name + more for name in bundled_rates() for more in ("", AS_THEY_CAME))


def hours_named(name: str) -> Hours:
    """A bundled profile at its own rates.

    The mean day is by hour of the day over the hours that are known; it repeats itself. In the ten days hours without a
    request, which upstream does not explain, are taken between their neighbours.

    >>> day = fo.hours_named("servegen-large")
    >>> day.n_periods, round(day.mean_rate_per_s, 1)
    (24, 213.2)
    """
    model = name.removesuffix(AS_THEY_CAME)
    if model not in bundled_rates():
        raise unknown_name("profile", name, names_of_rates())
    by_hour = np.array([np.nan if rate is None else rate for rate in bundled_rates()[model]["rate_per_s"]])
    n_missing = int(np.isnan(by_hour).sum())
    if name == model:
        rates = np.nanmean(by_hour.reshape(-1, HOURS_A_DAY), axis=0)
        note = f"the mean day of {len(by_hour) // HOURS_A_DAY}, by hour"
    else:
        known = ~np.isnan(by_hour)
        rates = np.interp(np.arange(len(by_hour)), np.flatnonzero(known), by_hour[known])
        note = f"{len(by_hour)} hours" + (f", {n_missing} that are missing taken between others" if n_missing else "")
    lengths = np.full(len(rates), HOUR_S)
    clock = "day" if lengths.sum() == DAY_S else "since"
    return hours_of(Stretches(name, clock, HOUR_S * np.arange(len(rates)), lengths, rates, note=note))
