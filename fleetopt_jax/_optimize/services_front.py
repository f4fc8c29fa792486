"""What several services can have together, and what a stricter promise to one of them costs.

Which fleets a service may have depends on its traffic and on what it is promised alone: neither on the objective nor on
the others. So they are found once, and every point of a front is the exact search of `shared.py` among the same ones,
under another weighting of two costs; where the limit of one service changes, only its own are found anew.

A front is the convex hull of what the services can have: both ends, then between neighbours the weights under which
both cost the same, until no plan is cheaper (Cohon, Church and Sheer 1979). Plans that no weighting prefers are not on
it.
"""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from fleetopt_jax._optimize.dominance import knee, non_dominated
from fleetopt_jax._optimize.services import (
    NoServicesPlan,
    Services,
    ServicesPlan,
    SharedService,
    ttft_limit_s,
    with_objective,
    with_promise,
)
from fleetopt_jax._optimize.shared import Candidates, candidates_of, settled
from fleetopt_jax.core.errors import BadField, BadInput, unknown_name
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.core.units import KW
from fleetopt_jax.fleet.resources import Objective, Resources, Weights

N_POINTS = 9  # searches
SPREAD = 4.0  # of limits to both sides of what is asked
TIGHTER_FRAC = 0.2
TIE_WEIGHT = 1e-6  # of the other cost where one alone is asked for, so that ties go the right way
SAME = 1e-9  # relative: points that are as near are one


@dataclass(frozen=True)
class SharedObjective:
    """One axis of a front of services."""

    unit: str
    sense: float  # 1 where less is better
    cost: Weights  # what is minimised, of a scale like the others': kW, USD/h, kg/h, GPUs


SHARED_OBJECTIVES: Mapping[str, SharedObjective] = MappingProxyType(
    {
        "kg_co2_per_h": SharedObjective("kg CO2/h", 1.0, Weights(kg_co2_per_h=1.0)),
        "usd_per_h": SharedObjective("USD/h", 1.0, Weights(usd_per_h=1.0)),
        "tok_per_j": SharedObjective("tok/J", -1.0, Weights(power_w=1.0 / KW)),
        "n_gpus": SharedObjective("GPUs", 1.0, Weights(n_gpus=1.0)),
    }
)


@dataclass(frozen=True)
class ServicesPoint:
    """A plan of all services by the two objectives of a front."""

    plan: ServicesPlan  # of services whose objective are the weights that it is the best by
    values: tuple[float, float]  # in the order and units of the objectives


@dataclass(frozen=True)
class ServicesFront:
    """Plans of all services that no other equals or betters in both objectives."""

    services: Services
    objectives: tuple[str, str]
    points: tuple[ServicesPoint, ...]  # at least one, from the best of the first objective to the best of the second
    knee: int | None  # index of the point deepest below the chord of the normalised front
    complete: bool  # whether no weighting is left that could have another plan
    n_searches: int
    wall_s: float

    @property
    def certified(self) -> bool:
        """Whether every point is proved to be the best by its weights."""
        return all(point.plan.search.gap == 0.0 for point in self.points)


@dataclass(frozen=True)
class PromiseFront:
    """The best plan of all services at each P99 TTFT limit of one of them."""

    services: Services
    service: str
    ttft_p99_s: tuple[float, ...]  # rising [s]
    answers: tuple[ServicesPlan | NoServicesPlan, ...]  # one for each
    wall_s: float


@dataclass(frozen=True)
class StricterPromise:
    """All services once more, what one of them is promised being tighter."""

    service: str
    promise: Literal["ttft_p99_s", "end_to_end_s"]  # of a batch its deadline, which is all it is promised
    was_s: float
    is_s: float
    answer: ServicesPlan | NoServicesPlan


@dataclass(frozen=True)
class StricterPromises:
    """What a stricter promise to each service would cost, all else the same."""

    tighter_frac: float
    present: ServicesPlan | NoServicesPlan  # as they are promised now
    each: tuple[StricterPromise, ...]  # in the order of the services; none where nothing holds what is promised now

    def extra(self, one: StricterPromise) -> Resources | None:
        """What it takes beyond the present plan: below 0 where it takes less of what is not the objective. None where
        no fleets hold it."""
        if isinstance(self.present, NoServicesPlan) or isinstance(one.answer, NoServicesPlan):
            return None
        now, then = vars(self.present.total), vars(one.answer.total)
        return Resources(**{name: then[name] - now[name] for name in now})


# ----------------------------------------------------------------------------------------------- objective, objective


def services_front(
    services: Services,
    objectives: Sequence[str] = ("kg_co2_per_h", "usd_per_h"),
    *,
    n_points: int = N_POINTS,
    progress: Progress | None = None,
) -> ServicesFront | NoServicesPlan:
    """What all services can have together of two of kg_co2_per_h, usd_per_h, n_gpus (low) and tok_per_j (high), by at
    most `n_points` searches: plans that are the best by some weights of the two, within the budget. USD include what
    bought GPUs cost more. The objective of the services themselves is not read.

    Raises BadInput for names, ValueError for numbers that are refused; and where carbon is asked for and the site has
    no carbon intensity.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> site = fo.make_surroundings(fo.make_site(kg_co2_per_kwh=0.4))
    >>> specs = [fo.EngineSpec("h100", tp=4), fo.EngineSpec("b200", tp=4)]
    >>> asked = {name: fo.make_problem(chat, specs, n_pools=1, surroundings=site) for name in ("ours", "theirs")}
    >>> front = fo.services_front(fo.make_services(asked))
    >>> front.certified, front.points[0].values[0] <= front.points[-1].values[0]
    (True, True)
    """
    require_float64("services_front")
    names = checked_shared(objectives)
    if n_points < 3:
        raise ValueError(f"need n_points >= 3, got {n_points}")
    if "kg_co2_per_h" in names and not float(services.any.around.site.kg_co2_per_kwh) > 0:
        raise BadField("kg_co2_per_kwh", "0", "need more, to count carbon")
    started = time.perf_counter()
    hull = _Hull(services, names, candidates_of(services), progress, n_points)
    found = hull.run()
    if isinstance(found, NoServicesPlan):
        return found
    costs = np.array([[float(f"{x:.9g}") for x in hull.costs(point)] for point in found])
    costs, first = np.unique(costs, axis=0, return_index=True)  # in order of the first
    kept = np.flatnonzero(non_dominated(costs))
    return ServicesFront(
        services=services,
        objectives=names,
        points=tuple(found[first[i]] for i in kept),
        knee=knee(costs[kept]),
        complete=hull.complete,
        n_searches=hull.n_searches,
        wall_s=time.perf_counter() - started,
    )


def checked_shared(names: Sequence[str], where: str = "objectives") -> tuple[str, str]:
    """Two different objectives, or a refusal that says what is known."""
    for name in names:
        if name not in SHARED_OBJECTIVES:
            raise unknown_name(where, name, SHARED_OBJECTIVES)
    if len(names) != 2 or names[0] == names[1]:
        known = ", ".join(SHARED_OBJECTIVES)
        raise BadInput(where, ", ".join(names) or "none", f"need two different ones of {known}")
    return names[0], names[1]


def shared_value(plan: ServicesPlan, name: str) -> float:
    """What a plan of all services comes to in one objective."""
    if name != "tok_per_j":
        return float(getattr(plan.total, name))
    return sum(float(each.metrics.output_tok_per_s) for each in plan.plans) / float(plan.total.power_w)


class _Hull:
    """Searches under one weighting after the other, and counts them."""

    def __init__(
        self,
        services: Services,
        names: tuple[str, str],
        each: Sequence[Candidates],
        progress: Progress | None,
        n_points: int,
    ):
        self._services, self._names, self._each = services, names, each
        self._progress, self._n_points = progress, n_points
        self._weights = [SHARED_OBJECTIVES[name].cost for name in names]
        self.n_searches, self.complete = 0, False

    def run(self) -> list[ServicesPoint] | NoServicesPlan:
        """Both ends, then what lies farthest below a chord, until there is nothing or the searches are spent."""
        hull: list[ServicesPoint] = []
        for mix in ((1.0, TIE_WEIGHT), (TIE_WEIGHT, 1.0)):
            end = self._best(mix)
            if isinstance(end, NoServicesPlan):
                return end
            hull.append(end)
        closed = set()  # pairs of neighbours between which there is nothing
        while True:
            pairs = [(a, b) for a, b in itertools.pairwise(hull) if (id(a), id(b)) not in closed]
            opened = [(self._area(a, b), i) for i, (a, b) in enumerate(pairs) if self._chord(a, b)]
            self.complete = not opened
            if not opened or self.n_searches >= self._n_points:
                return hull
            a, b = pairs[max(opened)[1]]
            mix = self._chord(a, b)
            assert mix is not None
            point = self._best(mix)
            if isinstance(point, ServicesPoint) and self._mixed(point, mix) < self._mixed(a, mix) * (1.0 - SAME):
                hull.insert(hull.index(b), point)
            else:
                closed.add((id(a), id(b)))

    def costs(self, point: ServicesPoint) -> tuple[float, float]:
        """The two, as less is better: of tokens per joule the kW."""
        first, second = (float(np.asarray(weights.of(point.plan.total))) for weights in self._weights)
        return first, second

    def _best(self, mix: tuple[float, float]) -> ServicesPoint | NoServicesPlan:
        """The least of the costs, weighted."""
        weights = Weights().plus(mix[0], self._weights[0]).plus(mix[1], self._weights[1])
        found = settled(with_objective(self._services, weights), self._each, time.perf_counter())
        self.n_searches += 1
        if self._progress:
            self._progress(min(self.n_searches, self._n_points), self._n_points)
        if isinstance(found, NoServicesPlan):
            return found
        first, second = (shared_value(found, name) for name in self._names)
        return ServicesPoint(found, (first, second))

    def _chord(self, a: ServicesPoint, b: ServicesPoint) -> tuple[float, float] | None:
        """Weights under which both cost the same; None where one is as good as the other in both."""
        (a0, a1), (b0, b1) = self.costs(a), self.costs(b)
        up, down = b0 - a0, a1 - b1
        if up <= SAME * abs(b0) or down <= SAME * abs(a1):
            return None
        return down / (up + down), up / (up + down)

    def _area(self, a: ServicesPoint, b: ServicesPoint) -> float:
        (a0, a1), (b0, b1) = self.costs(a), self.costs(b)
        return abs((b0 - a0) * (a1 - b1))

    def _mixed(self, point: ServicesPoint, mix: tuple[float, float]) -> float:
        return sum(weight * cost for weight, cost in zip(mix, self.costs(point), strict=True))


# ------------------------------------------------------------------------------------------------ promises to a service


def promise_front(
    services: Services,
    service: str,
    ttft_p99_s: Sequence[float] | None = None,
    *,
    objective: Objective | Weights = "tok_per_j",
    n_points: int = N_POINTS,
    progress: Progress | None = None,
) -> PromiseFront:
    """The best plan of all services, by tokens per joule or another `objective`, at each P99 TTFT limit [s] of one of
    them; by default `n_points` limits from a quarter of what it is promised to four times that. What the limit grows
    with the prompt stays, and so does where answers end, so that the ITL has what another TTFT leaves of that.

    Raises ValueError for a service that is not there, that is a batch, or for limits that are none.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> asked = {name: fo.make_problem(chat, [fo.EngineSpec("h100")], n_pools=1) for name in ("ours", "theirs")}
    >>> along = fo.promise_front(fo.make_services(asked), "ours", [1e-6, 0.5])
    >>> [answer.status for answer in along.answers]
    ['infeasible', 'optimal']
    """
    require_float64("promise_front")
    started, one = time.perf_counter(), service_named(services, service)
    if one.batch:
        raise BadField("service", f"{service!r} is a batch, which is promised a deadline alone", "need another one")
    limits = _limits_around(one, n_points) if ttft_p99_s is None else sorted(set(map(float, ttft_p99_s)))
    if not limits or not all(0 < limit < math.inf for limit in limits):
        raise BadField("ttft_p99_s", f"{list(limits)}", "need positive, finite limits, at least one")
    asked, known, answers = with_objective(services, objective), [], []
    for done, limit in enumerate(reversed(limits)):  # what is held at the loosest says most about the others
        there = with_promise(asked, service, ttft_p99_s=limit)
        known = candidates_of(there, known)
        answers.append(settled(there, known, time.perf_counter()))
        if progress:
            progress(done + 1, len(limits))
    wall_s = time.perf_counter() - started
    return PromiseFront(services, service, tuple(limits), tuple(reversed(answers)), wall_s)


def service_named(services: Services, name: str, where: str = "service") -> SharedService:
    """One of the services, or a refusal that says which there are."""
    found = [service for service in services.each if service.name == name]
    if not found:
        raise unknown_name(where, name, [service.name for service in services.each])
    return found[0]


def _limits_around(service: SharedService, n_points: int) -> list[float]:
    """Geometrically around what a service is promised, which is one of them; less those that leave answers no time."""
    if n_points < 3:
        raise ValueError(f"need n_points >= 3, got {n_points}")
    slo, half = service.asked[0].slo, n_points // 2
    asked_s = float(slo.ttft_p99_s)
    room_s = service.end_to_end_s - max(ttft_limit_s(way) - float(way.slo.ttft_p99_s) for way in service.asked)
    limits = [asked_s * SPREAD ** ((i - half) / half) for i in range(n_points)]
    return [limit for limit in limits if limit < room_s]


def stricter(
    services: Services,
    tighter_frac: float = TIGHTER_FRAC,
    *,
    worth: bool = False,
    progress: Progress | None = None,
) -> StricterPromises:
    """What it costs to promise each service more: its P99 TTFT limit tighter by a share, or the deadline of a batch,
    all else the same; each searched with the others once more. With `worth` as `optimize_services`.

    Raises ValueError for a share that is not between 0 and 1.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> asked = {name: fo.make_problem(chat, [fo.EngineSpec("h100")], n_pools=1) for name in ("ours", "theirs")}
    >>> found = fo.stricter(fo.make_services(asked), 0.2)
    >>> [(one.service, one.was_s, one.is_s) for one in found.each]
    [('ours', 0.5, 0.4), ('theirs', 0.5, 0.4)]
    """
    require_float64("stricter")
    if not 0 < tighter_frac < 1:
        raise BadField("tighter_frac", f"{tighter_frac:g}", "need a share between 0 and 1")
    total, started = len(services.each) + 1, time.perf_counter()
    each = candidates_of(services)
    present = settled(services, each, started, worth=worth)
    if progress:
        progress(1, total)
    if isinstance(present, NoServicesPlan):
        return StricterPromises(tighter_frac, present, ())
    found = []
    for done, service in enumerate(services.each):
        found.append(_stricter(services, service, each, 1.0 - tighter_frac))
        if progress:
            progress(done + 2, total)
    return StricterPromises(tighter_frac, present, tuple(found))


def _stricter(services: Services, service: SharedService, known: Sequence[Candidates], times: float) -> StricterPromise:
    """With the promise of one service so many times as long."""
    if service.batch:
        promise, was_s = "end_to_end_s", service.end_to_end_s
        there = with_promise(services, service.name, end_to_end_s=times * was_s)
    else:
        slo = service.asked[0].slo
        promise, was_s = "ttft_p99_s", float(slo.ttft_p99_s)
        slope = times * float(slo.ttft_s_per_token)
        there = with_promise(services, service.name, ttft_p99_s=times * was_s, ttft_s_per_token=slope)
    answer = settled(there, candidates_of(there, known), time.perf_counter())
    return StricterPromise(service.name, promise, was_s, times * was_s, answer)
