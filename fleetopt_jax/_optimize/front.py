"""What a front is asked for and what it is: objectives, points of whole plans, or the limit that no fleet holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from fleetopt_jax._optimize.plan import Plan, Unreachable
from fleetopt_jax._optimize.problem import GAMMA_MAX, Method, Problem
from fleetopt_jax._optimize.search import default_method
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.units import KW
from fleetopt_jax.fleet.limits import reached
from fleetopt_jax.fleet.resources import Objective, Weights

N_POINTS = 24  # searches
SHORT_WINDOWS = tuple(float(512 * 2**i) for i in range(8))  # of the FleetOpt recipe, where none is given


@dataclass(frozen=True)
class FrontObjective:
    """One axis of a front."""

    name: str
    unit: str
    sense: float  # what is to be high has its sign turned
    objective: Objective | None = None  # of a search for it alone; None: searches take it as a limit
    cost: Weights | None = None  # the same as a cost of a scale like the others': kW, USD/h


FRONT_OBJECTIVES: Mapping[str, FrontObjective] = MappingProxyType(
    {
        each.name: each
        for each in (
            FrontObjective("tok_per_j", "tok/J", -1.0, "tok_per_j", Weights(power_w=1.0 / KW)),
            FrontObjective("ttft_p99_s", "s", 1.0),
            FrontObjective("usd_per_h", "USD/h", 1.0, "usd", Weights(usd_per_h=1.0)),
        )
    }
)
TTFT = "ttft_p99_s"


@dataclass(frozen=True)
class FrontQuestion:
    """What `pareto` is asked, checked."""

    problem: Problem
    objectives: tuple[str, ...]
    method: Method
    n_points: int  # searches
    max_ttft_p99_s: float | None  # where the sweep of the TTFT ends [s]
    short_windows: tuple[float, ...]  # the FleetOpt reference may have [tokens]
    reference: tuple[float, ...] | None  # of the hypervolume, in the order of the objectives; None: from the front

    @property
    def alone(self) -> Objective:
        """The objective of searches for one cost alone, such as those of the reference fleets: the first one."""
        named: list[Objective | None] = [FRONT_OBJECTIVES[name].objective for name in self.objectives]
        return next(objective for objective in named if objective is not None)

    @property
    def fleetopt_is(self) -> str:
        """The FleetOpt reference in words."""
        windows = [f"{window:,.0f}" for window in (min(self.short_windows), max(self.short_windows))]
        several = f"the best of {len(self.short_windows)} from {windows[0]} to {windows[1]}"
        return (
            f"two pools, gamma {GAMMA_MAX:g}, short window {windows[0] if len(self.short_windows) == 1 else several}, "
            "whole instances sized and evaluated under the same assumptions"
        )

    @property
    def reference_is(self) -> str:
        """What the reference of the hypervolume is, in words."""
        if self.reference is not None:
            return "given"
        return "the worst of each objective among the front and the best one-pool fleet"


@dataclass(frozen=True)
class Point:
    """A plan by its objectives."""

    plan: Plan
    values: tuple[float, ...]  # in the order and units of the front's objectives


def point_of(plan: Plan, objectives: Sequence[str]) -> Point:
    """A plan by these objectives."""
    return Point(plan, tuple(objective_value(plan, name) for name in objectives))


def sense_of(objectives: Sequence[str]) -> np.ndarray:
    """Of each objective [D]: 1 where less is better, -1 where more is."""
    return np.array([FRONT_OBJECTIVES[name].sense for name in objectives])


def costs_of(points: Sequence[Point], objectives: Sequence[str]) -> np.ndarray:
    """The points' objectives as costs [M, D]: less is better."""
    return np.array([point.values for point in points]).reshape(-1, len(objectives)) * sense_of(objectives)


@dataclass(frozen=True)
class Front:
    """Feasible, non-dominated points, from the tightest TTFT (without it: the least cost) to the loosest."""

    problem: Problem
    objectives: tuple[str, ...]
    method: Method
    points: tuple[Point, ...]  # at least one
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

    @property
    def binding(self) -> None:
        """As of a `Plan` that holds its limits."""


@dataclass(frozen=True)
class NoFront:
    """No fleet holds the limits."""

    problem: Problem
    objectives: tuple[str, ...]
    method: Method
    fleetopt_is: str
    reference_is: str
    binding: Unreachable
    n_searches: int
    wall_s: float

    @property
    def points(self) -> tuple[Point, ...]:
        """None at all."""
        return ()


def make_question(
    problem: Problem,
    objectives: Sequence[str],
    *,
    n_points: int = N_POINTS,
    method: Method | None = None,
    max_ttft_p99_s: float | None = None,
    short_windows: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
) -> FrontQuestion:
    """A checked `FrontQuestion`. Raises BadInput for names that are not objectives, ValueError for numbers."""
    names = checked_objectives(objectives)
    if n_points < 3:
        raise ValueError(f"need n_points >= 3, got {n_points}")
    if max_ttft_p99_s is not None and not 0 < max_ttft_p99_s < math.inf:
        raise ValueError(f"need a finite max_ttft_p99_s > 0, got {max_ttft_p99_s}")
    if reference is not None and not (len(reference) == len(names) and np.isfinite(reference).all()):
        raise ValueError(f"need a finite reference for each of {', '.join(names)}, got {list(reference)}")
    windows = SHORT_WINDOWS if short_windows is None else tuple(short_windows)
    if not (windows and min(windows) > 0):
        raise ValueError(f"need positive short_windows, at least one, got {list(windows)}")
    return FrontQuestion(
        problem=problem,
        objectives=names,
        method=method or default_method(problem),
        n_points=n_points,
        max_ttft_p99_s=max_ttft_p99_s,
        short_windows=windows,
        reference=None if reference is None else tuple(float(x) for x in reference),
    )


def checked_objectives(names: Sequence[str], where: str = "objectives") -> tuple[str, ...]:
    """Two or three different objectives, or a refusal that says what is known."""
    known = ", ".join(FRONT_OBJECTIVES)
    if unknown := [name for name in names if name not in FRONT_OBJECTIVES]:
        raise BadInput(where, f"unknown name {unknown[0]!r}", f"known: {known}")
    if not 2 <= len(set(names)) == len(names):
        raise BadInput(where, f"{', '.join(names) or 'none'}", f"need two or three different ones of {known}")
    return tuple(names)


def objective_value(plan: Plan, name: str) -> float:
    """What a plan reaches in one objective, by its evaluated metrics."""
    metrics, slo = plan.metrics, plan.problem.slo
    if name != TTFT:
        return float(getattr(metrics, name))
    if float(slo.ttft_s_per_token) > 0:
        return float(_reached(metrics, slo)[0])
    return float(metrics.ttft_p99_s if slo.scope == "pool" else metrics.ttft_p99_of_all_s)


_reached = program(reached)
