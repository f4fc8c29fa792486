"""A day by three plans as a JSON object (`fleetopt-schedule/1`, SI units but for kWh, USD and kg of CO2)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fleetopt_jax._optimize.growth import Quarter
from fleetopt_jax._optimize.room import Room, room_of
from fleetopt_jax._optimize.running import prices_of
from fleetopt_jax._optimize.schedule import DayPlan, Schedule
from fleetopt_jax.catalog.rates import AS_THEY_CAME, bundled_rates
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.room import room_to_json
from fleetopt_jax.workload.hours import Hours

SCHEMA = "fleetopt-schedule/1"
SHARED = ("version", "assume", "assumptions", "power_scope", "dispatch", "workload", "slo", "site", "compressor")
SHARED += ("objective", "output_share", "prefix_cache", "reserve")
PLANS = ("static", "scheduled", "elastic")
COUNTED = ("energy_kwh", "usd", "kg_co2")


def schedule_to_json(found: Schedule) -> dict[str, Any]:
    """The periods, and by plan what is up in them and what that takes.

    `energy_kwh`, `usd` and `kg_co2` of a plan are of all `span_s`; `by_period` has them period by period, what starts
    for a period with it. `slo_attainment` is the share of the requests whose first token comes in time, by the laws;
    null under assumptions without a distribution. `n_gpus` are up, warm spares with them. `room` of the scheduled plan
    is by period the most requests a second that what serves then carries, and what a little more breaks. `workload` is
    that of the busiest period.
    """
    document = plan_to_json(found.scheduled.plan)
    plans = {name: _plan(getattr(found, name), found.hours) for name in PLANS}
    plans["scheduled"]["room"] = [room_to_json(room) for room in _rooms(found.scheduled)]
    return {
        "schema": SCHEMA,
        "status": "optimal",
        **{name: document[name] for name in SHARED if name in document},
        "profile": _profile(found.hours),
        "running": vars(found.running) | {"start_up_s": max(found.start_up_s)},
        "span_s": found.hours.span_s,
        "periods": _periods(found),
        "plans": plans,
        "saves": {name: found.saves(name) for name in COUNTED},
        "search": {
            "candidates": found.candidates,
            "cost": float(found.scheduled.cost.sum()),
            "changing_windows_bound": found.changing_bound,
            "wall_s": found.wall_s,
        },
    }


def _rooms(day: DayPlan) -> list[Room | None]:
    """By period; counts that come again have the same."""
    counts, of_period = np.unique(day.n_instances, axis=0, return_inverse=True)
    found = [room_of(day.plan, each) for each in counts]
    return [found[k] for k in of_period.ravel()]


def growth_to_json(quarters: Sequence[Quarter], growth_per_year: float) -> dict[str, Any]:
    """What to buy by quarter; `n_gpus` are those of its end, of today in quarter 0."""
    return {
        "factor_per_year": growth_per_year,
        "quarters": [
            {
                "quarter": each.quarter,
                "peak_rate_per_s": each.rate_per_s,
                "n_instances": each.n_instances.astype(int).tolist(),
                "n_gpus": each.n_gpus,
                "n_bought": each.n_bought,
            }
            for each in quarters
        ],
    }


def _profile(hours: Hours) -> dict[str, Any]:
    about = bundled_rates().get(hours.name.removesuffix(AS_THEY_CAME), {})
    return {
        "name": hours.name,
        "clock": hours.clock,
        "repeats": hours.repeats,
        "note": hours.note,
        "mean_rate_per_s": hours.mean_rate_per_s,
        "peak_over_mean": float(hours.rate_per_s.max()) / hours.mean_rate_per_s,
        **{name: about[name] for name in ("source", "licence", "busiest_window_over_its_hour") if name in about},
    }


def _periods(found: Schedule) -> list[dict[str, float]]:
    hours = found.hours
    usd, kg = prices_of(hours, found.problem.surroundings.site)
    columns = {"start_s": hours.start_s, "length_s": hours.length_s, "rate_per_s": hours.rate_per_s}
    columns |= {"usd_per_kwh": usd, "kg_co2_per_kwh": kg}
    return [{name: float(values[t]) for name, values in columns.items()} for t in range(hours.n_periods)]


def _plan(day: DayPlan, hours: Hours) -> dict[str, Any]:
    requests = hours.rate_per_s * hours.length_s
    attained = day.slo_attainment
    known = bool(np.isfinite(attained).all())
    pools = plan_to_json(day.plan)["pools"]
    named = ("window_tokens", "gamma", "gpu", "llm", "tp", "ep", "dp", "pp", "precision")
    return {
        **{name: float(getattr(day, name).sum()) for name in COUNTED},
        "slo_attainment": float(np.sum(requests * attained) / np.sum(requests)) if known else None,
        "n_gpus": [int(n) for n in day.n_gpus],
        "n_gpus_owned": day.n_gpus_owned,
        "n_starts": int(day.n_started.sum()),
        **{name: getattr(day, name).tolist() for name in ("ttft_p99_s", "itl_s", "utilization")},
        "by_period": {
            **{name: getattr(day, name).tolist() for name in COUNTED},
            "slo_attainment": attained.tolist() if known else None,
        },
        "pools": [
            {name: pool[name] for name in named if name in pool}
            | {name: getattr(day, name)[:, k].astype(int).tolist() for name in ("n_instances", "n_started")}
            for k, pool in enumerate(pools)
        ],
    }
