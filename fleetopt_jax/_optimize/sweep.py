"""The searches behind a front: which limits and weightings are asked for next, until they are spent."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fleetopt_jax._optimize.front import FRONT_OBJECTIVES, TTFT, FrontQuestion, Point, point_of, sense_of
from fleetopt_jax._optimize.plan import Infeasible, Unreachable
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.fleet import with_limits
from fleetopt_jax.fleet.resources import Objective, Weights, usage

LOOSEST_S, TIGHTEST_S = 1e6, 1e-6  # limits of the TTFT that any fleet, and none, holds
LIMIT_MARGIN = 1e-6  # beyond the smallest reachable limit, so that a search under it succeeds
RESOLVED = 1e-4  # of the front's box in log TTFT: smaller gaps are left
CLOSE = 1.03  # times a limit that cannot be held, where the smallest one that can is bisected for
POINT_TOLERANCE = 1e-9  # relative difference below which two points are one
TIE_WEIGHT = 1e-4  # of the other cost where one alone is asked for, so that ties go the right way


@dataclass(frozen=True)
class _Optima:
    """The optima under one limit of the swept objective, one for each of a few weightings."""

    limit: float  # in the unit of the objective that is swept
    points: tuple[Point, ...]
    costs: tuple[float, ...]  # what each search minimised, in its own unit


class Sweep:
    """Searches for optima, counts them and keeps every one."""

    def __init__(self, question: FrontQuestion, progress: Progress | None):
        self.question, self._progress = question, progress
        self.n_searches = 0
        self.found: list[Point] = []
        self.certified = True
        self._swept = TTFT if TTFT in question.objectives else "usd_per_h"  # the objective that is limited
        self._costs = [
            each for name, each in FRONT_OBJECTIVES.items() if each.cost is not None and name in question.objectives
        ]

    def run(self) -> float | Unreachable | None:
        """The most that unseen points could add to the hypervolume of two objectives; None where not known. Or the
        limit that no fleet holds."""
        if self._swept == TTFT:
            return self._over_ttft(self.question.max_ttft_p99_s or LOOSEST_S)
        return self._at_one_limit()

    @property
    def bounds_unseen(self) -> bool:
        """Whether what lies between two limits is known: pools of two stages, which share a limit out, reach less than
        the one that they are found under."""
        return self.certified and self.question.problem.service.serve == "mixed"

    # --- along the TTFT ---------------------------------------------------------------------------------------------

    def _over_ttft(self, most_s: float) -> float | Unreachable | None:
        """Sweep the limit from the tightest that can be held to the loosest, and stop at the problem's own."""
        loosest = self._under(most_s)
        if isinstance(loosest, Unreachable):
            return loosest
        rows = [*self._tightest(loosest), loosest]
        problem_s = float(self.question.problem.slo.ttft_p99_s)
        if rows[0].limit < problem_s < self._comes_to(rows[-1]) and self.n_searches < self.question.n_points:
            optima = self._under(problem_s)
            if isinstance(optima, _Optima):
                rows.insert(1, optima)
        return self._fill(rows, self._under)

    def _fill(self, rows: list[_Optima], under: Callable[[float], _Optima | Unreachable]) -> float | None:
        """Bisect the widest gap until the searches are spent; what is still unseen between two objectives."""
        box = self._gap(rows[0], rows[-1])
        per_limit = max(len(each.points) for each in rows)
        while self.n_searches + per_limit <= self.question.n_points:
            gaps = [self._gap(a, b) for a, b in itertools.pairwise(rows)]
            if not gaps or max(gaps) <= RESOLVED * box:
                break
            i = gaps.index(max(gaps))
            limit = math.sqrt(rows[i].limit * self._comes_to(rows[i + 1]))
            middle = under(limit)
            # Only a method that is not exact loses what a tighter limit had.
            rows.insert(i + 1, middle if isinstance(middle, _Optima) else replace(rows[i], limit=limit))
        if len(self.question.objectives) > 2:
            return None
        return sum(self._unseen(a, b) for a, b in itertools.pairwise(rows))

    def _tightest(self, loosest: _Optima) -> list[_Optima]:
        """The smallest limit that can be held, if it is below what the loosest comes to.

        Where a budget keeps the fleet from what it could reach without, or pools may have two stages, it is bisected
        for, and what is met on the way is kept: to a few per cent, or half of the searches.
        """
        least = self._under(TIGHTEST_S)
        if isinstance(least, _Optima):
            return [least]
        nearest_s = least.nearest_feasible if least.limit == TTFT else None
        # What pools of one stage reach is no end where others may have two.
        is_end = self.question.problem.service.serve == "mixed"
        beyond = nearest_s is not None and nearest_s >= self._comes_to(loosest)
        if beyond and is_end:
            return []
        held: list[_Optima] = []
        if nearest_s and not beyond:
            least = self._under(nearest_s * (1.0 + LIMIT_MARGIN))
            held = [least] if isinstance(least, _Optima) else []
            if held and is_end:
                return held
        low_s = nearest_s if nearest_s and is_end else TIGHTEST_S
        while 2 * self.n_searches < self.question.n_points:
            high_s = self._comes_to(held[0] if held else loosest)
            if high_s <= CLOSE * low_s:
                break
            middle_s = math.sqrt(low_s * high_s)
            optima = self._under(middle_s)
            if isinstance(optima, _Optima):
                held.insert(0, optima)
            else:
                low_s = middle_s
        return held

    def _under(self, limit_s: float) -> _Optima | Unreachable:
        """The optima under one limit: of each cost and, where two conflict, of their chord's weighting."""
        problem = self.question.problem
        problem = problem.serving(slo=with_limits(problem.slo, ttft_p99_s=limit_s))
        points: list[Point] = []
        for mix in self._corners():
            point = self._best(problem, mix)
            if isinstance(point, Unreachable):
                return point
            points.append(point)
        costs = tuple(self._cost(point, j) for j, point in enumerate(points))
        if len(points) == 2 and (chord := self._chord(*points)) is not None:
            middle = self._best(problem, chord)
            points.append(points[0] if isinstance(middle, Unreachable) else middle)
        return _Optima(limit_s, tuple(points), costs)

    def _comes_to(self, optima: _Optima) -> float:
        """The most that the optima under a limit come to: between it and the limit nothing changes."""
        i = self.question.objectives.index(self._swept)
        return max(point.values[i] for point in optima.points)

    def _gap(self, tighter: _Optima, looser: _Optima) -> float:
        """Where between two limits points are unseen: log limit x the relative difference of a cost."""
        low, high = tighter.limit, self._comes_to(looser)
        if high <= low * (1.0 + POINT_TOLERANCE):
            return 0.0
        return math.log(high / low) * max(0.0, *(a / b - 1.0 for a, b in zip(tighter.costs, looser.costs)))

    def _unseen(self, tighter: _Optima, looser: _Optima) -> float:
        """The rectangle of two objectives in which points between two limits could lie."""
        i = next(i for i, name in enumerate(self.question.objectives) if name != self._swept)
        sense = float(sense_of(self.question.objectives)[i])
        a, b = (sense * optima.points[0].values[i] for optima in (tighter, looser))
        return max(0.0, self._comes_to(looser) - tighter.limit) * max(0.0, a - b)

    # --- tokens per joule against cost under one limit --------------------------------------------------------------

    def _at_one_limit(self) -> float | Unreachable | None:
        """Both ends of the convex hull, then between neighbours the weighting of their chord, then limits of the cost;
        what is still unseen."""
        hull: list[Point] = []
        for mix in self._corners():
            end = self._best(self.question.problem, mix)
            if isinstance(end, Unreachable):
                return end
            hull.append(end)
        closed = set()  # gaps between neighbours, by the identity of their ends
        while self.n_searches < self.question.n_points:
            open_gaps = [
                (self._rectangle(a, b), i, chord)
                for i, (a, b) in enumerate(itertools.pairwise(hull))
                if (id(a), id(b)) not in closed and (chord := self._chord(a, b)) is not None
            ]
            if not open_gaps:
                break
            _, i, mix = max(open_gaps)
            point = self._best(self.question.problem, mix)
            if isinstance(point, Point) and self._mixed(point, mix) < self._mixed(hull[i], mix) * (
                1.0 - POINT_TOLERANCE
            ):
                hull.insert(i + 1, point)
            else:
                closed.add((id(hull[i]), id(hull[i + 1])))
        rows = [_Optima(self._cost(point, 1), (point,), (self._cost(point, 0),)) for point in reversed(hull)]
        return self._fill(rows, self._within)

    def _within(self, usd_per_h: float) -> _Optima | Unreachable:
        """The least power that so much money buys."""
        problem = self.question.problem
        cap = min(usd_per_h, problem.budget.max_usd_per_h)
        point = self._best(replace(problem, budget=problem.budget.with_cap("max_usd_per_h", cap)), (1.0, 0.0))
        if isinstance(point, Unreachable):
            return point
        return _Optima(usd_per_h, (point,), (self._cost(point, 0),))

    def _corners(self) -> list[tuple[float, ...]]:
        """Weights of the costs that ask for one alone."""
        return [(1.0,)] if len(self._costs) == 1 else [(1.0, TIE_WEIGHT), (TIE_WEIGHT, 1.0)]

    def _chord(self, cheap_power: Point, cheap_usd: Point) -> tuple[float, float] | None:
        """Weights under which both points cost the same; None where one is as good in both costs."""
        d_kw = self._cost(cheap_usd, 0) - self._cost(cheap_power, 0)
        d_usd = self._cost(cheap_power, 1) - self._cost(cheap_usd, 1)
        if min(d_kw / self._cost(cheap_usd, 0), d_usd / self._cost(cheap_power, 1)) <= POINT_TOLERANCE:
            return None
        return d_usd / (d_kw + d_usd), d_kw / (d_kw + d_usd)

    def _rectangle(self, a: Point, b: Point) -> float:
        return abs((self._cost(a, 0) - self._cost(b, 0)) * (self._cost(a, 1) - self._cost(b, 1)))

    def _mixed(self, point: Point, mix: tuple[float, ...]) -> float:
        return sum(weight * self._cost(point, j) for j, weight in enumerate(mix))

    def _cost(self, point: Point, j: int) -> float:
        """The j-th cost: power [kW] or price [USD/h]."""
        plan, cost = point.plan, self._costs[j].cost
        assert cost is not None
        return usage(cost, plan.kinds, plan.of_kinds)

    # --- one search -------------------------------------------------------------------------------------------------

    def _best(self, problem: Problem, mix: tuple[float, ...]) -> Point | Unreachable:
        """The least of the costs, weighted by `mix`, within the limits of `problem`; the limit that nothing holds."""
        found = optimize(replace(problem, objective=self._objective(mix)), self.question.method)
        self.n_searches += 1
        if self._progress:
            self._progress(min(self.n_searches, self.question.n_points), self.question.n_points)
        if isinstance(found, Infeasible):
            return found.binding
        self.certified &= found.status == "optimal"
        original, plan = self.question.problem, found
        alone = isinstance(found.problem.objective, str)
        if not alone or problem.budget != original.budget:  # proved for the front, not for the plan
            search = replace(found.search, lower_bound=None, gap=None, by_pools=())
            plan = replace(found, status="feasible", search=search)
        objective = plan.problem.objective if alone else original.objective
        plan = replace(plan, problem=replace(plan.problem, budget=original.budget, objective=objective))
        point = point_of(plan, self.question.objectives)
        self.found.append(point)
        return point

    def _objective(self, mix: tuple[float, ...]) -> Objective | Weights:
        """The one cost that counts by its name, or the weighted sum."""
        counted = [(weight, each) for weight, each in zip(mix, self._costs, strict=True) if weight]
        if len(counted) == 1 and (name := counted[0][1].objective) is not None:
            return name
        total = Weights()
        for weight, each in counted:
            assert each.cost is not None
            total = total.plus(weight, each.cost)
        return total
