"""A fleet over the hours of a day: what is up when, so that every period holds the limits, and what that saves.

Three plans side by side. **Static**: the best plan for the busiest period, all of it up all the time. **Scheduled**:
windows and engines that stay as they are, instances switched by period. **Elastic**: the same windows with starts that
take no time and cost nothing, which no schedule beats.

Each period is taken for steady: its rate is the mean, and a pool needs the least instances that hold its limits at that
rate, whatever was before. A burst that is shorter than a period is planned for only so far as the workload says how
bursty its arrivals are.

**Exact.** With windows given, a pool's day depends on nothing else, so its cheapest course is a dynamic program over
periods (`switching.py`), over every count from none to what its busiest period needs. The cost of a fleet is the sum
over its pools, so the best windows are a shortest path over candidate windows whose edges are the days of pools. There
an edge is allowed the counts that some period needs: of watts that are concave in the count no other could be cheaper.
The windows are chosen among candidates and kept over the day; a bound says what windows that change with every period
could save at most.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetopt_jax._optimize.exact import candidates, evenly
from fleetopt_jax._optimize.graph import Boundaries
from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.running import (
    Running,
    Tariff,
    check_running,
    make_running,
    prices_of,
    site_at,
    start_up_s_of,
    tariff_of,
)
from fleetopt_jax._optimize.search import compiled_excesses, evaluate_given, optimize
from fleetopt_jax._optimize.switching import cheapest_course
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.core.units import KW
from fleetopt_jax.fleet.choices.prefix_cache import not_searched
from fleetopt_jax.fleet.evaluate import PoolMetrics, fleet_metrics
from fleetopt_jax.fleet.resources import Weights
from fleetopt_jax.fleet.traffic import routed
from fleetopt_jax.laws.ttft import TAIL_PROBABILITY
from fleetopt_jax.workload.atoms import with_rate
from fleetopt_jax.workload.hours import Hours

FAINT = 1e-6  # of the highest rate: what stands for a rate of 0, of which no law speaks
WINDOWS = 64  # candidates for one boundary, where there are up to as many
DAY_PERIODS = 48  # periods; with more of them there are
FEWER_WINDOWS = 24
MANY_POOLS_WINDOWS = 20  # for several boundaries, between any two of which a pool may be


@dataclass(frozen=True)
class DayPlan:
    """What is up by period, and what that takes. Arrays [T], of pools [T, K]."""

    plan: Plan  # its windows and engines, with what the busiest period needs
    n_instances: np.ndarray  # that serve [T, K]
    n_started: np.ndarray  # for this period [T, K]
    energy_kwh: np.ndarray  # starts for the period with it
    usd: np.ndarray
    kg_co2: np.ndarray
    cost: np.ndarray  # by the weights of the objective
    ttft_p99_s: np.ndarray  # of the worst pool, as the next two
    itl_s: np.ndarray  # a mean
    utilization: np.ndarray
    slo_attainment: np.ndarray  # share of the requests whose first token is in time; NaN where no law tells
    n_gpus: np.ndarray  # up, warm spares with them

    @property
    def n_gpus_owned(self) -> int:
        """The most that are up at once."""
        return int(self.n_gpus.max())


@dataclass(frozen=True)
class Schedule:
    """A day by three plans."""

    problem: Problem  # at the rate of the busiest period, and mean prices
    hours: Hours
    running: Running
    static: DayPlan
    scheduled: DayPlan
    elastic: DayPlan
    start_up_s: tuple[float, ...]  # of the pools of the scheduled plan
    candidates: str  # that its windows are the best of, in words
    changing_bound: float  # of the objective's cost, were windows to change with every period for nothing
    wall_s: float

    def saves(self, name: str) -> float:
        """Share of the static plan's energy_kwh, usd or kg_co2 that the scheduled one does without."""
        static, scheduled = (float(getattr(each, name).sum()) for each in (self.static, self.scheduled))
        return (static - scheduled) / abs(static) if static else 0.0


def schedule(
    problem: Problem, hours: Hours, running: Running | None = None, progress: Progress | None = None
) -> Schedule | Infeasible:
    """The static, the scheduled and the elastic plan of a problem over hours; `Infeasible` where no fleet holds the
    limits of the busiest period.

    The rates are the hours'; the problem's own is not read. Prices are the hours' where they have some, else the
    site's. Raises BadField for what is not scheduled: budgets, limits of the whole fleet, lanes of two stages, prefix
    caches whose hits depend on the instances, a gamma that is searched, and starts longer than a period.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> day = fo.make_hours([5.0, 40.0, 20.0], length_s=8 * 3600)
    >>> found = fo.schedule(fo.make_problem(chat, [fo.EngineSpec("h100")]), day)
    >>> bool(found.saves("energy_kwh") > 0.1)
    True
    """
    started, running = time.perf_counter(), running or make_running()
    _check(problem, hours)
    check_running(hours, running, list(problem.specs))
    problem = _at_the_peak(problem, hours)
    static = optimize(problem)
    if isinstance(static, Infeasible):
        return static
    days = _Days(problem, hours, running)
    windows = _windows(problem, static, hours)
    path, bound = days.best_path(windows, progress)
    counts, fewest = days.courses(path)
    peak = days.plan_of(path, counts.max(axis=0))
    still = np.broadcast_to(np.asarray(static.fleet.n_instances), (hours.n_periods, len(static.lanes)))
    return Schedule(
        problem=problem,
        hours=hours,
        running=running,
        static=days.judged(static, still),
        scheduled=days.judged(peak, counts),
        elastic=days.judged(peak, fewest, starts=False),
        start_up_s=tuple(start_up_s_of(spec, running) for spec in peak.specs),
        candidates=f"{len(windows):,} windows, kept over the day",
        changing_bound=bound,
        wall_s=time.perf_counter() - started,
    )


def _check(problem: Problem, hours: Hours) -> None:
    """Refuse what is not scheduled."""
    if problem.budget.caps:
        raise BadField("budget", f"{', '.join(problem.budget.caps)}", "need no limits of all pools together")
    if problem.slo.scope == "fleet":
        raise BadField("scope", "fleet: limits of the whole fleet couple its pools", "need scope pool")
    if problem.service.serve != "mixed":
        raise BadField("serve", f"{problem.service.serve}: lanes of two stages", "need mixed")
    if problem.gamma is None:
        raise BadField("gamma", "auto is not searched over a day", "need a number")
    if problem.assumptions.prefix_cache.reads_reuse:
        raise not_searched("prefix_hit")
    _, kg = prices_of(hours, problem.surroundings.site)
    if problem.objective_weights.kg_co2_per_h and not kg.any():
        raise BadField("kg_co2_per_kwh", "0 in all periods", "need carbon of electricity to count CO2")


def _at_the_peak(problem: Problem, hours: Hours) -> Problem:
    """The problem at the rate of the busiest period and the mean prices, none below 0."""
    usd, kg = (np.average(x, weights=hours.length_s) for x in prices_of(hours, problem.surroundings.site))
    site = site_at(problem.surroundings.site, max(0.0, usd), kg)
    workload = with_rate(problem.service.workload, hours.rate_per_s.max())
    return replace(problem.serving(workload=workload), surroundings=replace(problem.surroundings, site=site))


def _windows(problem: Problem, static: Plan, hours: Hours) -> np.ndarray:
    """Candidate windows below the last: some evenly, and those of the best plans at the peak and at the mean rate."""
    if problem.n_pools == 1:
        return np.zeros(0)
    options = np.unique(candidates(problem)[0])
    most = WINDOWS if hours.n_periods <= DAY_PERIODS else FEWER_WINDOWS
    most = most if problem.n_pools == 2 else MANY_POOLS_WINDOWS
    own = [static]
    usual = optimize(problem.serving(workload=with_rate(problem.workload, hours.mean_rate_per_s)))
    own += [] if isinstance(usual, Infeasible) else [usual]
    found = [np.asarray(plan.fleet.window_tokens)[:-1] for plan in own]
    return np.unique(np.concatenate([options[evenly(problem.workload, options, most)] if len(options) else [], *found]))


@dataclass(frozen=True)
class _Pool:
    """A pool between two boundaries, with one of the specs."""

    lower: int
    upper: int
    e: int


class _Days:
    """Days of pools: what they need by period, and what that costs by the problem's weights."""

    def __init__(self, problem: Problem, hours: Hours, running: Running):
        self._problem, self._hours, self._running = problem, hours, running
        self._rates, self._of_period = np.unique(hours.rate_per_s, return_inverse=True)
        self._tariffs = [self._tariff(spec, problem.search_weights) for spec in problem.specs]
        self._at = self._boundaries(np.zeros(0))

    def _tariff(self, spec: EngineSpec, weights: Weights) -> Tariff:
        return tariff_of(self._problem, self._hours, self._running, spec, weights)

    def _boundaries(self, windows: np.ndarray) -> list[Boundaries]:
        """Those of the candidate windows at every rate [U]."""
        gamma = 1.0 if self._problem.gamma is None else self._problem.gamma
        there = Boundaries(self._problem, windows, np.full(len(windows), gamma))
        return [there.at_rate(max(rate, FAINT * self._rates[-1])) for rate in self._rates]

    # ---------------------------------------------------------------------------------------------- which windows

    def best_path(self, windows: np.ndarray, progress: Progress | None) -> tuple[list[_Pool], float]:
        """(the pools of the cheapest day over the windows, what windows that change could not get below)."""
        self._at, k = self._boundaries(windows), self._problem.n_pools
        last = self._at[0].last
        ends = [(i, j) for i in range(last) for j in range(i + 1, last + 1) if k > 2 or i == 0 or j == last]
        lower, upper = np.array([pair for pair in ends if k > 1 or pair == (0, last)]).T
        n_offers, n = len(self._tariffs), last + 1
        day, steps = np.full((n_offers, n, n), np.inf), np.full((n_offers, self._hours.n_periods, n, n), np.inf)
        owned = np.full((n_offers, n, n), np.inf)
        for e in range(n_offers):
            found = self._days(e, lower, upper, progress)
            for table, values in zip((day[e], owned[e], *steps[e]), found, strict=True):
                table[lower, upper] = values
        cost, path = cheapest_path(day.min(axis=0), k)
        bound = sum(cheapest_path(each, k)[0] for each in (owned.min(axis=0), *steps.min(axis=0)))
        return [_Pool(i, j, int(np.argmin(day[:, i, j]))) for i, j in path], min(bound, cost)

    def _days(self, e: int, lower: np.ndarray, upper: np.ndarray, progress: Progress | None) -> list[np.ndarray]:
        """Costs [M] of pools with spec e: of their cheapest day, of what the busiest period owns, and of every period
        by itself."""
        needed = np.stack([self._needed(e, at, lower, upper) for at in self._at])  # [U, M]
        levels = [np.unique(each) if np.isfinite(each).all() else np.zeros(0) for each in needed.T]
        watts = [np.full((len(needed), len(each)), np.inf) for each in levels]
        pool = np.repeat(np.arange(len(lower)), [len(each) for each in levels])
        place = np.concatenate([np.arange(len(each)) for each in levels])
        count = np.concatenate(levels)
        for u, at in enumerate(self._at):
            rows = np.flatnonzero(count >= needed[u, pool])
            found = _watts(at, e, lower[pool[rows]], upper[pool[rows]], count[rows])
            for m, c, value in zip(pool[rows], place[rows], found, strict=True):
                watts[m][u, c] = value
            if progress:
                progress(u + 1, len(self._at))
        each = [self._day(self._tariffs[e], counts, watts[m]) for m, counts in enumerate(levels)]
        return [np.array(column) for column in zip(*each, strict=True)]

    def _day(self, tariff: Tariff, counts: np.ndarray, watts: np.ndarray) -> list[float]:
        """Of one pool, what `_days` has of each; 0 of a pool that nobody needs."""
        if not len(counts):
            return [math.inf] * (2 + self._hours.n_periods)
        if not counts[-1]:
            return [0.0] * (2 + self._hours.n_periods)
        costs = tariff.costs(counts, watts[self._of_period], counts[-1])
        course = cheapest_course(costs, counts, tariff.switching(self._hours))
        reserved = tariff.reserved(counts[-1])
        return [course.cost + reserved, reserved, *costs.min(axis=1)]

    def _needed(self, e: int, at: Boundaries, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """The least instances [M] that hold the limits; none at a rate of 0."""
        found = at.exact(e, lower, upper)[0]
        idle = float(at.setting.arrival_rate_per_s) < self._rates[-1] * FAINT * (1.0 + FAINT) and not self._rates[0]
        return np.where(np.isfinite(found) & idle, 0.0, found)

    # ----------------------------------------------------------------------------------------- what is up, and when

    def courses(self, path: Sequence[_Pool]) -> tuple[np.ndarray, np.ndarray]:
        """Counts [T, K] of the cheapest day of each pool, over all counts, and of a day whose starts are free."""
        scheduled, elastic = [], []
        for pool in path:
            ends = np.array([pool.lower]), np.array([pool.upper])
            needed = np.array([self._needed(pool.e, at, *ends)[0] for at in self._at])
            counts = np.arange(needed.max() + 1.0)
            watts = np.full((len(needed), len(counts)), np.inf)
            for u, at in enumerate(self._at):
                some = counts[counts >= needed[u]]
                lower, upper = (np.repeat(each, len(some)) for each in ends)
                watts[u, len(counts) - len(some) :] = _watts(at, pool.e, lower, upper, some)
            costs = self._tariffs[pool.e].costs(counts, watts[self._of_period], counts[-1])
            course = cheapest_course(costs, counts, self._tariffs[pool.e].switching(self._hours))
            scheduled.append(counts[course.place])
            elastic.append(counts[np.argmin(costs, axis=1)])
        return np.stack(scheduled, axis=1), np.stack(elastic, axis=1)

    def plan_of(self, path: Sequence[_Pool], counts: np.ndarray) -> Plan:
        """The fleet of a path with so many instances [K]."""
        cuts = self._at[0].cuts
        upper = [pool.upper for pool in path]
        return evaluate_given(
            self._problem,
            [self._problem.specs[pool.e] for pool in path],
            window_tokens=cuts.window_tokens[upper].tolist(),
            gamma=cuts.gamma[upper].tolist(),
            n_instances=counts.tolist(),
        )

    # ------------------------------------------------------------------------------------------------ what that takes

    def judged(self, plan: Plan, n_instances: np.ndarray, *, starts: bool = True) -> DayPlan:
        """A plan with so many instances by period [T, K]."""
        problem, hours = self._problem, self._hours
        before = np.roll(n_instances, 1, axis=0) if hours.repeats else np.vstack([n_instances[:1], n_instances[:-1]])
        n_started = np.maximum(0.0, n_instances - before) * starts
        traffic = routed(plan.fleet, problem.workload, problem.assumptions)
        least = FAINT * self._rates[-1]
        watts, worst, attained = [], [], []
        for rate, n in zip(hours.rate_per_s, n_instances, strict=True):
            workload = with_rate(problem.workload, max(rate, least))
            metrics = fleet_metrics(plan.fleet.with_instances(n), traffic, workload, problem.assumptions)
            watts.append(np.where(n > 0, metrics.pools.power_w, 0.0))
            pools = metrics.ttft_p99_s, np.max(metrics.pools.itl_s), np.max(metrics.pools.utilization)
            worst.append([float(x) if rate else 0.0 for x in pools])
            attained.append(_attainment(problem, metrics.pools) if rate else 1.0)
        ttft_s, itl_s, utilization = np.array(worst).T
        used = [self._used(plan, n_instances, n_started, np.array(watts), weights) for weights in _counted(problem)]
        each = np.array([spec.split.n_gpus for spec in plan.specs])
        return DayPlan(
            plan=plan,
            n_instances=n_instances,
            n_started=n_started,
            energy_kwh=used[0] / KW,
            usd=used[1],
            kg_co2=used[2],
            cost=used[3],
            ttft_p99_s=ttft_s,
            itl_s=itl_s,
            utilization=utilization,
            slo_attainment=np.array(attained),
            n_gpus=(n_instances + self._running.warm_spares) @ each,
        )

    def _used(
        self, plan: Plan, n_instances: np.ndarray, n_started: np.ndarray, watts: np.ndarray, weights: Weights
    ) -> np.ndarray:
        """What all pools take by period [T], by some weights, what is reserved with it."""
        total = np.zeros(len(watts))
        for k, spec in enumerate(plan.specs):
            tariff, n = self._tariff(spec, weights), n_instances[:, k]
            total += tariff.costs(n[:, None], watts[:, k : k + 1], n.max())[:, 0] + tariff.start_cost * n_started[:, k]
            total += tariff.reserved(n.max()) * self._hours.length_s / self._hours.span_s
        return total


def _counted(problem: Problem) -> tuple[Weights, ...]:
    """What is told of a day: energy, money, carbon, and the objective."""
    each = Weights(power_w=1.0), Weights(usd_per_h=1.0), Weights(kg_co2_per_h=1.0)
    return (*each, problem.objective_weights)


def _watts(at: Boundaries, e: int, lower: np.ndarray, upper: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of pools with so many instances [M], none of which draw nothing."""
    some = counts > 0
    watts = np.zeros(len(counts))
    if some.any():
        watts[some] = at.watts(e, lower[some], upper[some], counts[some])
    return watts


def _attainment(problem: Problem, pools: PoolMetrics) -> float:
    """The share of the requests whose first token is in time; NaN where no law tells."""
    if pools.ttft is None:
        return math.nan
    late = (np.asarray(compiled_excesses(pools, problem.slo)["ttft_p99_s"]) + 1.0) * TAIL_PROBABILITY
    share = np.asarray(pools.traffic_frac)
    return float(1.0 - np.sum(share * late.clip(0.0, 1.0)) / np.sum(share))


def cheapest_path(square: np.ndarray, k: int) -> tuple[float, list[tuple[int, int]]]:
    """The cheapest path of at most k edges (i, j) from the first node to the last, by its cost: inf for none."""
    to, came = np.full(len(square), np.inf), []
    to[0], best, length = 0.0, math.inf, 0
    for m in range(1, k + 1):
        through = to[:, None] + square
        came.append(through.argmin(axis=0))
        to = through.min(axis=0)
        if to[-1] < best:
            best, length = float(to[-1]), m
    path, node = [], len(square) - 1
    for m in range(length, 0, -1):
        path.append((int(came[m - 1][node]), node))
        node = path[-1][0]
    return best, path[::-1]
