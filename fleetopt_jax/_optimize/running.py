"""How instances are switched on and off, and what each of them costs by period.

An instance that serves in a period and did not in the one before starts before it begins, for `start_up_s`: it draws
idle watts meanwhile, is paid for, and takes `start_j` once more. It is up when the period begins. What its start takes
counts in the period that it starts for, at the prices of the one before. One that stops is gone at once, and what is
down draws `down_w_per_gpu`. Warm spares are loaded and idle all the time, beside those that serve.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.switching import Switching, periods_held
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.llms import checkpoint_size_bytes, llm_entry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.core.units import GB, HOUR_S
from fleetopt_jax.fleet.resources import Weights, pool_prices
from fleetopt_jax.fleet.surroundings import Site
from fleetopt_jax.workload.hours import Hours

POD_START_S = 100.0  # of a node that is there: the image, the process, its graphs. Assumed, not measured
LOADED_PER_S = 2 * GB  # weights of an instance from a disk or a cache nearby [B/s]. Assumed


@dataclass(frozen=True)
class Running:
    """How instances are switched."""

    start_up_s: float | None = None  # from the decision to the first request [s]; None: by what they load
    min_up_s: float = 0.0  # that an instance stays up at least [s]
    start_j: float = 0.0  # of a start beside idle watts, an instance [J]
    warm_spares: int = 0  # of each pool
    down_w_per_gpu: float = 0.0  # of a GPU whose instance is down [W]
    reserved: bool = False  # whether GPUs that are down are paid for as well


def make_running(
    *,
    start_up_s: float | None = None,
    min_up_s: float = 0.0,
    start_j: float = 0.0,
    warm_spares: int = 0,
    down_w_per_gpu: float = 0.0,
    reserved: bool = False,
) -> Running:
    """A checked `Running`; by default a start takes 100 s and the loading of the weights at 2 GB/s.

    >>> fo.make_running(start_up_s=0.0).min_up_s
    0.0
    """
    numbers = {"min_up_s": min_up_s, "start_j": start_j, "warm_spares": warm_spares, "down_w_per_gpu": down_w_per_gpu}
    for name, value in (numbers | {"start_up_s": start_up_s or 0.0}).items():
        if not 0 <= value < math.inf:
            raise ValueError(f"need a finite {name} >= 0, got {value}")
    if warm_spares != int(warm_spares):
        raise ValueError(f"need whole warm_spares, got {warm_spares}")
    return Running(start_up_s, min_up_s, start_j, int(warm_spares), down_w_per_gpu, reserved)


def start_up_s_of(spec: EngineSpec, running: Running) -> float:
    """How long an instance takes to come up [s]: what is asked for, or 100 s and its weights at 2 GB/s."""
    if running.start_up_s is not None:
        return running.start_up_s
    precision = spec.precision if spec.laws is None else None
    return POD_START_S + checkpoint_size_bytes(llm_entry(spec.llm).architecture, precision) / LOADED_PER_S


def site_at(site: Site, usd_per_kwh: float, kg_co2_per_kwh: float) -> Site:
    """The site at a period's prices, negative ones too."""
    return replace(site, **as_floats(usd_per_kwh=usd_per_kwh, kg_co2_per_kwh=kg_co2_per_kwh))


@dataclass(frozen=True)
class Tariff:
    """What instances of one engine cost by some weights. Arrays [T]."""

    running: Running
    length_h: np.ndarray  # [h]
    per_wh: np.ndarray  # of a watt for an hour, at the period's prices
    per_h: float  # of an instance that is up, for an hour, beside its watts
    reserved_per_h: float  # of one that is there, up or down
    idle_w: float  # of an instance that is loaded and has nothing to do [W]
    down_w: float  # of one that is down
    start_cost: np.ndarray  # of one start for each period

    def costs(self, counts: np.ndarray, watts: np.ndarray, n_owned: float) -> np.ndarray:
        """Of `counts`, [M] or [T, M], that serve with `watts` [T, M] together, spares and what is down with them
        [T, M]; but for what is reserved. Infinite, at any price, where the watts are: these do not serve."""
        spares, serves = self.running.warm_spares, np.isfinite(watts)
        all_w = np.where(serves, watts, 0.0) + spares * self.idle_w + (n_owned - counts) * self.down_w
        costs = self.length_h[:, None] * (self.per_wh[:, None] * all_w + self.per_h * (counts + spares))
        return np.where(serves, costs, np.inf)

    def reserved(self, n_owned: float) -> float:
        """Of what is there all the time, up or down."""
        return self.reserved_per_h * (n_owned + self.running.warm_spares) * float(self.length_h.sum())

    def switching(self, hours: Hours) -> Switching:
        """Starts, and how long they bind."""
        held = periods_held(hours.length_s, self.running.min_up_s, repeats=hours.repeats)
        return Switching(self.start_cost, held, hours.repeats)


def tariff_of(problem: Problem, hours: Hours, running: Running, spec: EngineSpec, weights: Weights) -> Tariff:
    """What instances of a spec cost by weights over watts, USD, CO2 and GPUs."""
    engine, site = build(spec), problem.surroundings.site
    usd, kg = prices_of(hours, site)
    rent = replace(weights, usd_per_h=0.0) if running.reserved else weights
    of_rent = pool_prices(rent, [spec.gpu_name], [engine], site)
    of_all = pool_prices(weights, [spec.gpu_name], [engine], site)
    sites = [site_at(site, *at) for at in zip(usd, kg, strict=True)]
    per_wh = np.array([pool_prices(weights, [spec.gpu_name], [engine], each).per_watt[0] for each in sites])
    scope = problem.assumptions.power_scope
    idle_w, down_w = (
        float(scope.pool_w(engine, site, 1.0, watts, 0.0)) for watts in (engine.idle_w, running.down_w_per_gpu)
    )
    per_h = float(of_rent.per_instance[0])
    start_h = start_up_s_of(spec, running) / HOUR_S
    before = np.roll(per_wh, 1) if hours.repeats else np.append(per_wh[:1], per_wh[:-1])
    start_cost = start_h * (before * (idle_w - down_w) + per_h) + before * running.start_j / HOUR_S
    return Tariff(
        running=running,
        length_h=hours.length_s / HOUR_S,
        per_wh=per_wh,
        per_h=per_h,
        reserved_per_h=float(of_all.per_instance[0]) - per_h,
        idle_w=idle_w,
        down_w=down_w,
        start_cost=start_cost,
    )


def prices_of(hours: Hours, site: Site) -> tuple[np.ndarray, np.ndarray]:
    """(USD/kWh, kg CO2/kWh) of every period [T]: the site's where the hours have none of their own."""
    flat = np.ones(hours.n_periods)
    usd = flat * float(site.usd_per_kwh) if hours.usd_per_kwh is None else hours.usd_per_kwh
    kg = flat * float(site.kg_co2_per_kwh) if hours.kg_co2_per_kwh is None else hours.kg_co2_per_kwh
    return usd, kg


def check_running(hours: Hours, running: Running, specs: list[EngineSpec]) -> None:
    """Refuse starts that take longer than a period, in which nobody knows yet for what."""
    longest, shortest = max(start_up_s_of(spec, running) for spec in specs), float(hours.length_s.min())
    if longest > shortest and hours.n_periods > 1:
        problem = f"{longest:,.0f} s, longer than the shortest period of {hours.name}, {shortest:,.0f} s"
        raise BadField("start_up_s", problem, "need periods in which what is started for the next comes up")
