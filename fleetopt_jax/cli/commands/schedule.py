"""`fleetopt schedule`: what is up when over the hours of a day, and what that saves."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetopt_jax._optimize.growth import purchases
from fleetopt_jax._optimize.plan import Infeasible
from fleetopt_jax._optimize.running import Running, make_running
from fleetopt_jax._optimize.schedule import schedule
from fleetopt_jax.catalog.rates import hours_named, names_of_rates
from fleetopt_jax.catalog.workloads import LoadedWorkload
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.inputs import at_door, problem_of, workload_of
from fleetopt_jax.cli.repeat import command_said
from fleetopt_jax.cli.terminal import progress, say, understood, warn
from fleetopt_jax.cli.values import flag
from fleetopt_jax.cli.verdicts import why
from fleetopt_jax.core.errors import BadInput, unknown_name
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.schedule import growth_to_json, schedule_to_json
from fleetopt_jax.report import tables
from fleetopt_jax.report.rates import per_s
from fleetopt_jax.report.schedule import schedule_table, span_said
from fleetopt_jax.workload.hours import Hours, Stretches, at_mean, hours_of, hours_of_profile, priced
from fleetopt_jax.workload.readers.hours_file import read_stretches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL_PROFILE = "servegen-large"  # of workloads without hours of their own


def run(options: argparse.Namespace) -> Answer:
    command = command_said(options)
    loaded = workload_of(options, need_rate=False)
    loaded, hours = _hours(options, loaded)
    hours = _with_prices(options, hours)
    _say_hours(options, hours)
    running = _running(options)
    if hours.kg_co2_per_kwh is not None:  # a mean, for what asks whether carbon is counted at all
        mean = float(np.average(hours.kg_co2_per_kwh, weights=hours.length_s))
        options = argparse.Namespace(**vars(options) | {"kg_co2_per_kwh": mean})
    problem = problem_of(options, loaded, options.objective)
    with at_door(options.workload), progress(options, "Scheduling") as step:
        found = schedule(problem, hours, running, step)
    if isinstance(found, Infeasible):
        say(options, f"infeasible in the busiest period: {why(found.binding)}")
        return Answer(plan_to_json(found), tables.plan_table, INFEASIBLE)
    document = schedule_to_json(found) | {"command": command}
    if options.growth is not None:
        with at_door("--growth"):
            document["growth"] = growth_to_json(purchases(found, options.growth, options.quarters), options.growth)
    return Answer(document, schedule_table, OK, _figure)


def _figure(document: dict[str, Any]) -> "Figure":
    from fleetopt_jax.report.schedule_figure import schedule_figure  # and matplotlib, which a table does without

    return schedule_figure(document)


def _running(options: argparse.Namespace) -> Running:
    return make_running(
        start_up_s=options.start_up_s,
        min_up_s=options.min_up_s,
        start_j=options.start_kj * 1000.0,
        warm_spares=options.warm_spares,
        down_w_per_gpu=options.down_w_per_gpu,
        reserved=options.reserved,
    )


def _hours(options: argparse.Namespace, loaded: LoadedWorkload) -> tuple[LoadedWorkload, Hours]:
    """The workload, and its rates: a profile's, or of a trace that has hours its own, as bursty as within an hour."""
    name, rate = options.profile, options.rate
    if name is None and loaded.profile is not None:
        hours = hours_of_profile(loaded.name, loaded.profile)
        bursts = as_floats(arrival_scv=loaded.profile.arrival_scv)
        loaded = dataclasses.replace(loaded, workload=dataclasses.replace(loaded.workload, **bursts))
        return loaded, at_mean(hours, rate) if rate else hours
    name = name or USUAL_PROFILE
    if name in names_of_rates():
        return loaded, at_mean(hours_named(name), _mean_rate(loaded))
    if "/" not in name and "." not in name:
        raise unknown_name("--profile", name, (*names_of_rates(), "FILE.csv"))
    rates = read_stretches(name, "rate")
    hours = hours_of(rates)
    if rates.relative:
        return loaded, at_mean(hours, _mean_rate(loaded))
    return loaded, at_mean(hours, rate) if rate else hours


def _mean_rate(loaded: LoadedWorkload) -> float:
    if not loaded.rate_known:
        problem = f"{loaded.name} tells no rate, and the profile only a shape"
        raise BadInput("--rate", problem, "need requests per second")
    return float(loaded.workload.arrival_rate_per_s)


def _with_prices(options: argparse.Namespace, hours: Hours) -> Hours:
    """The hours with prices and carbon by period, of the files that are named."""
    for file, constant in (("prices", "usd_per_kwh"), ("carbon", "kg_co2_per_kwh")):
        if getattr(options, file) and getattr(options, constant):
            problem = f"says it by period, {flag(constant)} for all of them"
            raise BadInput(flag(file), problem, "give one of the two")
    usd = read_stretches(options.prices, "price") if options.prices else None
    kg = read_stretches(options.carbon, "carbon") if options.carbon else None
    _warn_of_prices(options, usd)
    return priced(hours, usd_per_kwh=usd, kg_co2_per_kwh=kg)


def _warn_of_prices(options: argparse.Namespace, usd: Stretches | None) -> None:
    if usd is not None and (usd.values < 0).any():
        n = int((usd.values < 0).sum())
        said = f"{usd.name}: {n:,} of {len(usd.values):,} prices are below 0: what is up then is paid for"
        warn(options, said)


def _say_hours(options: argparse.Namespace, hours: Hours) -> None:
    if options.quiet:
        return
    note = f" ({hours.note})" if hours.note else ""
    understood(
        options,
        f"hours of {hours.name}{note}: {hours.n_periods:,} periods in {span_said(hours.span_s)}, "
        f"{per_s(hours.rate_per_s.min())} to {per_s(hours.rate_per_s.max())} requests/s, mean "
        f"{per_s(hours.mean_rate_per_s)}",
    )
