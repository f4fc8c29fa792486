"""Pareto fronts: what tokens per joule, P99 TTFT and cost can be had together.

Every point is the optimum of a `Problem` under one limit of the TTFT (the epsilon constraint) and one weighting of
power against cost, by the method asked; then it is judged by the metrics its plan was evaluated to, never by the limit
it was searched under, and dropped where another dominates it. Limits are not spread evenly: each next one bisects, in
log TTFT, the gap in which unseen points could still add most. Of tokens per joule against cost alone the convex hull is
found by weighting, what lies between its corners by limits of the cost; of all three, at each TTFT the hull's ends and
the weighting between them: other points may exist.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import KW
from fleetopt_jax.fleet.limits import reached
from fleetopt_jax.fleet.sizing import size_fleet
from fleetopt_jax.optimize.candidates import Progress
from fleetopt_jax.optimize.dominance import hypervolume, knee, non_dominated
from fleetopt_jax.optimize.plan import GAMMA_MAX, EngineChoice, Method, Plan, Problem, plan_to_json
from fleetopt_jax.optimize.search import default_method, evaluate_given, optimize

SCHEMA = "fleetopt-front/1"
SENSE = {"tok_per_j": -1.0, "ttft_p99_s": 1.0, "usd_per_h": 1.0}  # of a cost: what is to be high has its sign turned
UNITS = {"tok_per_j": "tok/J", "ttft_p99_s": "s", "usd_per_h": "USD/h"}
COSTS: dict[str, Literal["tok_per_j", "usd"]] = {
    "tok_per_j": "tok_per_j",
    "usd_per_h": "usd",
}  # what a search minimises

N_POINTS = 24  # searches
LOOSEST_S, TIGHTEST_S = 1e6, 1e-6  # limits of the TTFT that any fleet, and none, holds
WITHIN = 1e-6  # beyond the smallest reachable limit, so that asking for it succeeds
RESOLVED = 1e-4  # of the front's box in log TTFT: smaller gaps are left
CLOSE = 1.03  # times a limit that cannot be held, where the smallest one that can is bisected for
SAME = 1e-9  # relative difference below which two points are one
TIE = 1e-4  # weight of the other cost where one alone is asked for, so that ties go the right way
SHORT_WINDOWS = tuple(float(512 * 2**i) for i in range(8))  # of the FleetOpt recipe, where none is given

KNEE_IS = (
    "the point deepest below the chord through the two extremes (three objectives: the plane sum = 1), every objective "
    "normalised to 0 at the front's best and 1 at its worst"
)
REFERENCE_IS = "the worst of each objective among the front and the best one-pool fleet"
FLEETOPT_IS = (
    "two pools, gamma {gamma:g}, short window {windows}, whole instances sized and evaluated under the same assumptions"
)


@dataclass(frozen=True)
class Point:
    """A plan by its objectives."""

    plan: Plan
    values: tuple[float, ...]  # in the order and units of the front's objectives


@dataclass(frozen=True)
class Front:
    """Feasible, non-dominated points, from the tightest TTFT (without it: the least cost) to the loosest.

    Empty where no fleet holds the limits; `binding` then says which, as in a `Plan`.
    """

    problem: Problem
    objectives: tuple[str, ...]
    method: str
    points: tuple[Point, ...]
    homogeneous: Point | None  # best one-pool fleet that holds the problem's own limits; None where none does
    fleetopt: Point | None  # the paper's recipe under the same limits; None where it cannot hold them
    fleetopt_is: str  # the recipe in words
    reference: tuple[float, ...]  # of the hypervolume, in the order of the objectives
    reference_is: str  # what it is
    hypervolume: float  # in the product of the objectives' units
    hypervolume_frac: float  # of the box from the best of each objective to the reference [-]
    hypervolume_missing: float | None  # most that unseen points between these could add; None where not known
    knee: int | None  # index of the point deepest below the chord of the normalised front
    certified: bool  # every search proved its optimum over its candidates
    n_searches: int
    wall_s: float
    binding: dict[str, Any] | None = None


def pareto(
    problem: Problem,
    objectives: Sequence[str] = ("tok_per_j", "ttft_p99_s"),
    *,
    n_points: int = N_POINTS,
    method: Method | None = None,
    max_ttft_p99_s: float | None = None,
    short_windows: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Front:
    """The front of two or three of tok_per_j (high), ttft_p99_s and usd_per_h (low), by about `n_points` searches.

    The TTFT is the P99 in the scope of the problem's limits: of the worst pool or of all requests, less what the limit
    grows with the prompt. Where it is an objective, its limit is swept from the smallest reachable to where it stops
    mattering, or to `max_ttft_p99_s`; the problem's own limit is the one that the two reference fleets are sized for.
    All other limits hold everywhere. `short_windows` are those the FleetOpt reference may have (default: powers of
    two), `reference` the point of the hypervolume. `progress(done, total)` counts searches.
    """
    objectives = checked_objectives(objectives)
    if n_points < 3:
        raise ValueError(f"need n_points >= 3, got {n_points}")
    if max_ttft_p99_s is not None and not 0 < max_ttft_p99_s < math.inf:
        raise ValueError(f"need a finite max_ttft_p99_s > 0, got {max_ttft_p99_s}")
    if reference is not None and not (len(reference) == len(objectives) and np.isfinite(reference).all()):
        raise ValueError(f"need a finite reference for each of {', '.join(objectives)}, got {list(reference)}")
    windows = SHORT_WINDOWS if short_windows is None else tuple(short_windows)
    if not (windows and min(windows) > 0):
        raise ValueError(f"need positive short_windows, at least one, got {list(windows)}")
    method = method or default_method(problem.slo)
    started = time.perf_counter()
    sweep = _Sweep(problem, objectives, method, n_points, progress)
    missing = sweep.over_ttft(max_ttft_p99_s) if "ttft_p99_s" in objectives else sweep.at_one_limit()
    homogeneous = fleetopt = None
    if sweep.found:
        alone = optimize(replace(problem, n_pools=1, objective=sweep.costs[0]), method)
        homogeneous = sweep.point(alone)
        fleetopt = sweep.point(paper_fleet(replace(problem, objective=sweep.costs[0]), windows))
    extra = [homogeneous] if homogeneous and _counts(homogeneous, max_ttft_p99_s) else []
    front = _front_of(sweep.found + extra, objectives)
    costs = _as_costs(objectives, front)
    seen = np.concatenate([costs, _as_costs(objectives, [homogeneous] if homogeneous else [])])
    sense = np.array([SENSE[name] for name in objectives])
    corner = seen.max(axis=0, initial=-np.inf) if reference is None else sense * np.asarray(reference, dtype=float)
    volume = hypervolume(costs, corner)
    box = float(np.prod(corner - costs.min(axis=0))) if len(costs) else 0.0
    if progress:
        progress(n_points, n_points)
    return Front(
        problem=problem,
        objectives=objectives,
        method=method,
        points=tuple(front),
        homogeneous=homogeneous,
        fleetopt=fleetopt,
        fleetopt_is=FLEETOPT_IS.format(
            gamma=GAMMA_MAX,
            windows=f"{windows[0]:,.0f}"
            if len(windows) == 1
            else f"the best of {len(windows)} from {min(windows):,.0f} to {max(windows):,.0f}",
        ),
        reference=tuple((sense * corner).tolist()) if len(seen) else (),
        reference_is=REFERENCE_IS if reference is None else "given",
        hypervolume=volume,
        hypervolume_frac=volume / box if box > 0 else 0.0,
        hypervolume_missing=missing if sweep.certified else None,
        knee=knee(costs) if len(costs) else None,
        certified=sweep.certified,
        n_searches=sweep.n_searches,
        wall_s=time.perf_counter() - started,
        binding=None if front else sweep.binding,
    )


def checked_objectives(names: Sequence[str], where: str = "objectives") -> tuple[str, ...]:
    """Two or three different objectives, or a refusal that says what is known."""
    if unknown := [name for name in names if name not in SENSE]:
        raise BadInput(where, f"unknown name {unknown[0]!r}", f"known: {', '.join(SENSE)}")
    if not 2 <= len(set(names)) == len(names):
        raise BadInput(
            where, f"{', '.join(names) or 'none'}", f"need two or three different ones of {', '.join(SENSE)}"
        )
    return tuple(names)


@dataclass(frozen=True)
class _Asked:
    """The optima under one limit of the swept objective, one for each of a few weightings."""

    limit: float  # in the unit of the objective that is swept
    points: tuple[Point, ...]
    costs: tuple[float, ...]  # what each search minimised, in its own unit


class _Sweep:
    """Asks for optima, counts them and keeps every one."""

    def __init__(
        self, problem: Problem, objectives: tuple[str, ...], method: Method, n_points: int, progress: Progress | None
    ):
        self.problem, self.objectives, self.method = problem, objectives, method
        self.n_points, self.n_searches, self.progress = n_points, 0, progress
        self.found: list[Point] = []
        self.certified = True
        self.binding: dict[str, Any] | None = None
        self.swept = "ttft_p99_s" if "ttft_p99_s" in objectives else "usd_per_h"  # the objective that is limited
        self.costs = [COSTS[name] for name in objectives if name in COSTS]

    # --- along the TTFT ---------------------------------------------------------------------------------------------

    def over_ttft(self, most_s: float | None) -> float | None:
        """Sweep the limit; the most that unseen points could add to the hypervolume of two objectives."""
        loosest = self._under(LOOSEST_S if most_s is None else most_s)
        if loosest is None:
            return None
        asked = [*self._tightest(loosest), loosest]
        own_s = float(self.problem.slo.ttft_p99_s)
        between = asked[0].limit < own_s < self._reaches(asked[-1])
        if between and self.n_searches < self.n_points and (found := self._under(own_s)):
            asked.insert(1, found)
        return self._fill(asked, self._under)

    def _fill(self, asked: list[_Asked], under: Callable[[float], _Asked | None]) -> float | None:
        """Bisect the widest gap until the searches are spent; what is still unseen between two objectives."""
        box = self._gap(asked[0], asked[-1])
        per_limit = max(len(each.points) for each in asked)
        while self.n_searches + per_limit <= self.n_points:
            gaps = [self._gap(a, b) for a, b in itertools.pairwise(asked)]
            if not gaps or max(gaps) <= RESOLVED * box:
                break
            i = int(np.argmax(gaps))
            middle = math.sqrt(asked[i].limit * self._reaches(asked[i + 1]))
            # Only a method that is not exact loses what a tighter limit had.
            asked.insert(i + 1, under(middle) or replace(asked[i], limit=middle))
        if len(self.objectives) > 2:
            return None
        return sum(self._unseen(a, b) for a, b in itertools.pairwise(asked))

    def _tightest(self, loosest: _Asked) -> list[_Asked]:
        """The smallest limit that can be held, if it is below what the loosest comes to.

        Where a budget keeps the fleet from what it could reach without, it is bisected for, and what is met on the way
        is kept: to a few per cent, or half of the searches.
        """
        least = self._under(TIGHTEST_S)
        if least:
            return [least]
        nearest_s = self.binding["nearest_feasible"] if self.binding["limit"] == "ttft_p99_s" else None
        if nearest_s and (nearest_s >= self._reaches(loosest) or (least := self._under(nearest_s * (1.0 + WITHIN)))):
            return [least] if least else []
        low_s, held = nearest_s or TIGHTEST_S, []
        while 2 * self.n_searches < self.n_points:
            high_s = self._reaches(held[0] if held else loosest)
            if high_s <= CLOSE * low_s:
                break
            middle_s = math.sqrt(low_s * high_s)
            if found := self._under(middle_s):
                held.insert(0, found)
            else:
                low_s = middle_s
        return held

    def _under(self, limit_s: float) -> _Asked | None:
        """The optima under one limit: of each cost and, where two conflict, of their chord's weighting."""
        problem = replace(self.problem, slo=replace(self.problem.slo, ttft_p99_s=jnp.asarray(limit_s, dtype=float)))
        points = []
        for weights in self._corners():
            points.append(self._ask(problem, weights))
            if points[-1] is None:
                return None
        if len(points) == 2 and (chord := self._chord(*points)) is not None:
            points.append(self._ask(problem, chord) or points[0])
        costs = [self._cost(point, j) for j, point in enumerate(points[: len(self.costs)])]
        return _Asked(limit_s, tuple(points), tuple(costs))

    def _reaches(self, asked: _Asked) -> float:
        """The most that the optima under a limit come to: between it and the limit nothing changes."""
        i = self.objectives.index(self.swept)
        return max(point.values[i] for point in asked.points)

    def _gap(self, tighter: _Asked, looser: _Asked) -> float:
        """Where between two limits points are unseen: log limit x the relative difference of a cost."""
        low, high = tighter.limit, self._reaches(looser)
        if high <= low * (1.0 + SAME):
            return 0.0
        return math.log(high / low) * max(0.0, *(a / b - 1.0 for a, b in zip(tighter.costs, looser.costs)))

    def _unseen(self, tighter: _Asked, looser: _Asked) -> float:
        """The rectangle of two objectives in which points between two limits could lie."""
        cost = next(i for i, name in enumerate(self.objectives) if name != self.swept)
        a, b = (SENSE[self.objectives[cost]] * asked.points[0].values[cost] for asked in (tighter, looser))
        return max(0.0, self._reaches(looser) - tighter.limit) * max(0.0, a - b)

    # --- tokens per joule against cost under one limit --------------------------------------------------------------

    def at_one_limit(self) -> float | None:
        """Both ends of the convex hull, then between neighbours the weighting of their chord, then limits of the cost;
        what is still unseen."""
        ends = [self._ask(self.problem, weights) for weights in self._corners()]
        if any(point is None for point in ends):
            return None
        hull, closed = ends, set()  # gaps between neighbours, by the identity of their ends
        while self.n_searches < self.n_points:
            open_gaps = [
                (self._rectangle(a, b), i)
                for i, (a, b) in enumerate(itertools.pairwise(hull))
                if (id(a), id(b)) not in closed and self._chord(a, b) is not None
            ]
            if not open_gaps:
                break
            _, i = max(open_gaps)
            weights = self._chord(hull[i], hull[i + 1])
            found = self._ask(self.problem, weights)
            if found and self._weighted(found, weights) < self._weighted(hull[i], weights) * (1.0 - SAME):
                hull.insert(i + 1, found)
            else:
                closed.add((id(hull[i]), id(hull[i + 1])))
        asked = [_Asked(self._cost(point, 1), (point,), (self._cost(point, 0),)) for point in reversed(hull)]
        return self._fill(asked, self._within)

    def _within(self, usd_per_h: float) -> _Asked | None:
        """The least power that so much money buys."""
        budget = replace(self.problem.budget, max_usd_per_h=min(usd_per_h, self.problem.budget.max_usd_per_h))
        point = self._ask(replace(self.problem, budget=budget), (1.0, 0.0))
        return _Asked(usd_per_h, (point,), (self._cost(point, 0),)) if point else None

    def _corners(self) -> list[tuple[float, float]]:
        """Weights of (kW, USD/h) that ask for one cost alone."""
        if len(self.costs) == 1:
            return [(1.0, 0.0)] if self.costs[0] == "tok_per_j" else [(0.0, 1.0)]
        return [(1.0, TIE), (TIE, 1.0)]

    def _chord(self, cheap_power: Point, cheap_usd: Point) -> tuple[float, float] | None:
        """Weights under which both points cost the same; None where one is as good in both costs."""
        d_kw = self._cost(cheap_usd, 0) - self._cost(cheap_power, 0)
        d_usd = self._cost(cheap_power, 1) - self._cost(cheap_usd, 1)
        if min(d_kw / self._cost(cheap_usd, 0), d_usd / self._cost(cheap_power, 1)) <= SAME:
            return None
        return d_usd / (d_kw + d_usd), d_kw / (d_kw + d_usd)

    def _rectangle(self, a: Point, b: Point) -> float:
        return abs((self._cost(a, 0) - self._cost(b, 0)) * (self._cost(a, 1) - self._cost(b, 1)))

    def _weighted(self, point: Point, weights: tuple[float, float]) -> float:
        return weights[0] * self._cost(point, 0) + weights[1] * self._cost(point, 1)

    def _cost(self, point: Point, j: int) -> float:
        """Power [kW] or price [USD/h], as `costs` has them; with one cost, that one."""
        metrics = point.plan.metrics
        wants_power = self.costs[j] == "tok_per_j"
        return float(metrics.power_w) / KW if wants_power else float(metrics.usd_per_h)

    # --- one search -------------------------------------------------------------------------------------------------

    def _ask(self, problem: Problem, weights: tuple[float, float]) -> Point | None:
        """The least w_power kW + w_usd USD/h within the limits of `problem`; None where nothing holds them."""
        if 0.0 in weights:
            plan = optimize(replace(problem, objective="tok_per_j" if weights[1] == 0 else "usd"), self.method)
        else:
            plan = _weighted_optimum(problem, weights, self.method)
        self.n_searches += 1
        if self.progress:
            self.progress(min(self.n_searches, self.n_points), self.n_points)
        if plan.metrics is None or plan.status == "infeasible":
            self.binding = plan.binding
            return None
        self.certified &= plan.status == "optimal"
        if 0.0 not in weights or plan.problem.budget != self.problem.budget:  # proved for the front, not for the plan
            search = replace(plan.search, lower_bound=None, gap=None, by_pools=())
            plan = replace(plan, status="feasible", search=search)
        point = self.point(replace(plan, problem=replace(plan.problem, budget=self.problem.budget)))
        self.found.append(point)
        return point

    def point(self, plan: Plan | None) -> Point | None:
        """A plan by its objectives; None where it has no fleet."""
        if plan is None or plan.metrics is None:
            return None
        return Point(plan, tuple(objective_value(plan, name) for name in self.objectives))


def objective_value(plan: Plan, name: str) -> float:
    """What a plan reaches in one objective, by its evaluated metrics."""
    metrics, slo = plan.metrics, plan.problem.slo
    if name != "ttft_p99_s":
        return float(getattr(metrics, name))
    if float(slo.ttft_s_per_token) > 0:
        return float(_reached(metrics, slo)[0])
    return float(metrics.ttft_p99_s if slo.scope == "pool" else metrics.ttft_p99_of_all_s)


_reached = jax.jit(reached)
_size = jax.jit(size_fleet, static_argnames="assumptions")


def _weighted_optimum(problem: Problem, weights: tuple[float, float], method: Method) -> Plan:
    """The least w_power kW + w_usd USD/h: the cheapest fleet at prices that say so, evaluated again at its own.

    A limit in USD cannot be held at other prices than its own: a plan that breaks it comes back infeasible.
    """
    priced = tuple(_at_prices(choice, *weights) for choice in problem.choices)
    budget = replace(problem.budget, max_usd_per_h=math.inf)
    plan = optimize(replace(problem, choices=priced, objective="usd", budget=budget), method)
    if plan.fleet is None:
        return replace(plan, problem=problem)
    own = {id(asked): choice for asked, choice in zip(priced, problem.choices)}
    numbers = {
        name: np.asarray(getattr(plan.fleet, name)).tolist() for name in ("window_tokens", "gamma", "n_instances")
    }
    again = evaluate_given(problem, tuple(own[id(choice)] for choice in plan.choices), **numbers)
    if again.status == "infeasible":
        return again
    search = replace(plan.search, lower_bound=None, by_pools=())  # they are of the weighted prices
    return replace(again, status=plan.status, method=plan.method, search=search)


def _at_prices(choice: EngineChoice, per_kw: float, per_usd: float) -> EngineChoice:
    """An engine whose price per hour is a weighting of its power and its own price."""
    engine = choice.engine
    site = replace(engine.site, usd_per_kwh=per_usd * engine.site.usd_per_kwh + per_kw)
    return replace(choice, engine=replace(engine, site=site, usd_per_gpu_h=per_usd * engine.usd_per_gpu_h))


def paper_fleet(
    problem: Problem, short_windows: Sequence[float] = SHORT_WINDOWS, gamma: float = GAMMA_MAX
) -> Plan | None:
    """The paper's FleetOpt recipe, sized for the problem's limits; None where no such fleet holds them.

    Two pools of one engine, the short window the best of `short_windows`, requests up to gamma x window compressed into
    it.
    """
    longest = float(problem.workload.longest_tokens)
    windows = [np.array([short, problem.window_tokens]) for short in short_windows if gamma * short < longest]
    gammas, plans = np.array([gamma, 1.0]), []
    for choice, window in itertools.product(problem.choices, windows):
        engines = (choice.engine,) * 2
        fleet = _size(engines, window, gammas, problem.workload, problem.slo, assumptions=problem.assumptions)
        n_instances = np.asarray(fleet.n_instances)
        if np.isfinite(n_instances).all() and n_instances.all():
            numbers = {"window_tokens": window, "gamma": gammas, "n_instances": n_instances}
            plans.append(evaluate_given(problem, (choice,) * 2, **{name: x.tolist() for name, x in numbers.items()}))
    held = [plan for plan in plans if plan.status == "feasible"]
    name = {"tok_per_j": "power_w", "power": "power_w", "usd": "usd_per_h", "gpus": "n_gpus"}[problem.objective]
    return min(held, key=lambda plan: float(getattr(plan.metrics, name)), default=None)


def _as_costs(objectives: tuple[str, ...], points: Sequence[Point]) -> np.ndarray:
    """Objectives [M, D] of which less is better."""
    values = np.array([point.values for point in points]).reshape(-1, len(objectives))
    return values * np.array([SENSE[name] for name in objectives])


def _counts(point: Point, most_ttft_s: float | None) -> bool:
    """Whether the homogeneous fleet, which is one of those that are searched, may stand on the front."""
    return most_ttft_s is None or objective_value(point.plan, "ttft_p99_s") <= most_ttft_s


def _front_of(points: list[Point], objectives: tuple[str, ...]) -> list[Point]:
    """The non-dominated points, each once, in order of their TTFT or, without it, of their last objective.

    Values are compared to nine digits: sums in another order are no trade-off. Rounding keeps their order, so that what
    is left is not dominated to the last digit either.
    """
    costs = np.array([float(f"{x:.9g}") for x in _as_costs(objectives, points).ravel()])
    costs, first = np.unique(costs.reshape(-1, len(objectives)), axis=0, return_index=True)
    key = objectives.index("ttft_p99_s") if "ttft_p99_s" in objectives else len(objectives) - 1
    kept = np.flatnonzero(non_dominated(costs))
    return [points[first[i]] for i in kept[np.argsort(costs[kept, key], kind="stable")]]


def front_to_json(front: Front) -> dict[str, Any]:
    """The front as one JSON object (SI units); every point is a whole plan with the objectives it is judged by."""
    problem = front.problem
    slope = float(problem.slo.ttft_s_per_token)

    def about(point: Point | None) -> dict[str, Any] | None:
        if point is None:
            return None
        return {"objectives": dict(zip(front.objectives, point.values)), "plan": plan_to_json(point.plan)}

    return {
        "schema": SCHEMA,
        "objectives": [
            {"name": name, "better": "low" if SENSE[name] > 0 else "high", "unit": UNITS[name]}
            for name in front.objectives
        ],
        "ttft_is": "P99 TTFT of "
        + ("the worst pool" if problem.slo.scope == "pool" else "all requests together")
        + (f", less {slope:g} s for every token of the prompt" if slope else ""),
        "workload": {
            "name": problem.workload_name,
            "arrival_rate_per_s": float(problem.workload.arrival_rate_per_s),
        },
        "assume": problem.assume,
        "n_pools": problem.n_pools,
        "gamma": problem.gamma,
        "method": front.method,
        "certified": front.certified,
        "points": [about(point) | {"knee": i == front.knee} for i, point in enumerate(front.points)],
        "knee_is": KNEE_IS,
        "hypervolume": {
            "value": front.hypervolume,
            "unit": " ".join(UNITS[name] for name in front.objectives),
            "share_of_box": front.hypervolume_frac,
            "missing_at_most": front.hypervolume_missing,
            "reference": dict(zip(front.objectives, front.reference)),
            "reference_is": front.reference_is,
        },
        "homogeneous": about(front.homogeneous),
        "fleetopt": about(front.fleetopt),
        "fleetopt_is": front.fleetopt_is,
        "reference_ttft_limit_s": float(problem.slo.ttft_p99_s),
        "search": {"n_searches": front.n_searches, "wall_s": front.wall_s},
        "binding": front.binding,
    }
