"""Pareto fronts: what tokens per joule, P99 TTFT and cost can be had together.

Every point is the optimum of a `Problem` under one limit of the TTFT (the epsilon constraint) and one weighting of
power against cost, by the method asked; then it is judged by the metrics its plan was evaluated to, never by the limit
it was searched under, and dropped where another dominates it. Limits are not spread evenly: each next one bisects, in
log TTFT, the gap in which unseen points could still add most. Of tokens per joule against cost alone the convex hull is
found by weighting, what lies between its corners by limits of the cost; of all three, at each TTFT the hull's ends and
the weighting between them: other points may exist.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fleetopt_jax._optimize.dominance import hypervolume, knee, non_dominated
from fleetopt_jax._optimize.front import (
    N_POINTS,
    SHORT_WINDOWS,
    TTFT,
    Front,
    FrontQuestion,
    NoFront,
    Point,
    costs_of,
    make_question,
    objective_value,
    point_of,
    sense_of,
)
from fleetopt_jax._optimize.plan import Plan, Unreachable
from fleetopt_jax._optimize.problem import GAMMA_MAX, Method, Problem
from fleetopt_jax._optimize.search import evaluate_given, optimize
from fleetopt_jax._optimize.sweep import Sweep
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.sizing import size_fleet


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
) -> Front | NoFront:
    """The front of two or three of tok_per_j (high), ttft_p99_s and usd_per_h (low), by about `n_points` searches.

    The TTFT is the P99 in the scope of the problem's limits: of the worst pool or of all requests, less what the limit
    grows with the prompt. Where it is an objective, its limit is swept from the smallest reachable to where it stops
    mattering, or to `max_ttft_p99_s`; the problem's own limit is the one that the two reference fleets are sized for.
    All other limits hold everywhere. `short_windows` are those the FleetOpt reference may have (default: powers of
    two), `reference` the point of the hypervolume. `progress(done, total)` counts searches. Raises BadInput for names,
    ValueError for numbers that are refused.
    """
    started = time.perf_counter()
    question = make_question(
        problem,
        objectives,
        n_points=n_points,
        method=method,
        max_ttft_p99_s=max_ttft_p99_s,
        short_windows=short_windows,
        reference=reference,
    )
    sweep = Sweep(question, progress)
    missing = sweep.run()
    about = {
        "problem": problem,
        "objectives": question.objectives,
        "method": question.method,
        "fleetopt_is": question.fleetopt_is,
        "reference_is": question.reference_is,
    }
    if isinstance(missing, Unreachable) and not sweep.found:
        wall_s = time.perf_counter() - started
        return NoFront(**about, binding=missing, n_searches=sweep.n_searches, wall_s=wall_s)
    homogeneous, fleetopt = _references(question)
    counted = [homogeneous] if homogeneous and _counts(homogeneous, max_ttft_p99_s) else []
    points = _front_of(question.objectives, [*sweep.found, *counted])
    if progress:
        progress(n_points, n_points)
    return Front(
        **about,
        **measured(points, question.objectives, _reference(question, points, homogeneous)),
        points=tuple(points),
        homogeneous=homogeneous,
        fleetopt=fleetopt,
        hypervolume_missing=missing if sweep.bounds_unseen and not isinstance(missing, Unreachable) else None,
        certified=sweep.certified,
        n_searches=sweep.n_searches,
        wall_s=time.perf_counter() - started,
    )


def measured(points: Sequence[Point], objectives: Sequence[str], reference: Sequence[float]) -> dict[str, Any]:
    """The reference, hypervolume, its share of the box and the knee of a `Front` of these points."""
    costs, corner = costs_of(points, objectives), sense_of(objectives) * np.asarray(reference)
    volume, box = hypervolume(costs, corner), float(np.prod(corner - costs.min(axis=0)))
    return {
        "reference": tuple(float(x) for x in reference),
        "hypervolume": volume,
        "hypervolume_frac": volume / box if box > 0 else 0.0,
        "knee": knee(costs),
    }


def _references(question: FrontQuestion) -> tuple[Point | None, Point | None]:
    """(the best one-pool fleet, the paper's recipe) under the problem's own limits; None where it cannot hold them."""
    problem = replace(question.problem, objective=question.alone)
    alone = optimize(replace(problem, n_pools=1), question.method)
    recipe = paper_fleet(problem, question.short_windows)
    return (
        point_of(alone, question.objectives) if isinstance(alone, Plan) else None,
        None if recipe is None else point_of(recipe, question.objectives),
    )


def _reference(question: FrontQuestion, points: Sequence[Point], homogeneous: Point | None) -> Sequence[float]:
    """Of the hypervolume [D]."""
    if question.reference is not None:
        return question.reference
    names = question.objectives
    seen = costs_of([*points, *([homogeneous] if homogeneous else [])], names)
    return (sense_of(names) * seen.max(axis=0)).tolist()


_size = program(size_fleet, static_argnames="assumptions")


def paper_fleet(
    problem: Problem, short_windows: Sequence[float] = SHORT_WINDOWS, gamma: float = GAMMA_MAX
) -> Plan | None:
    """The paper's FleetOpt recipe, sized for the problem's limits; None where no such fleet holds them.

    Two pools of one engine, the short window the best of `short_windows`, requests up to gamma x window compressed into
    it.
    """
    longest = float(problem.workload.longest_tokens)
    windows = [[float(short), problem.window_tokens] for short in short_windows if gamma * short < longest]
    gammas, plans = [gamma, 1.0], []
    for spec, window in itertools.product(problem.specs, windows):
        fleet = problem.fleet((spec,) * 2, window, gammas, np.ones(2))
        n = np.asarray(_size(fleet, problem.workload, problem.slo, assumptions=problem.assumptions).n_instances)
        if np.isfinite(n).all() and n.all():
            plans.append(
                evaluate_given(problem, (spec,) * 2, window_tokens=window, gamma=gammas, n_instances=n.tolist())
            )
    held = [plan for plan in plans if plan.binding is None]
    return min(held, key=lambda plan: plan.cost, default=None)


def _counts(point: Point, most_ttft_s: float | None) -> bool:
    """Whether the homogeneous fleet, which is one of those that are searched, may stand on the front."""
    return most_ttft_s is None or objective_value(point.plan, TTFT) <= most_ttft_s


def _front_of(objectives: tuple[str, ...], points: list[Point]) -> list[Point]:
    """The non-dominated points, each once, in order of their TTFT or, without it, of their last objective.

    Values are compared to nine digits: sums in another order are no trade-off. Rounding keeps their order, so that what
    is left is not dominated to the last digit either.
    """
    costs = np.array([float(f"{x:.9g}") for x in costs_of(points, objectives).ravel()])
    costs, first = np.unique(costs.reshape(-1, len(objectives)), axis=0, return_index=True)
    key = objectives.index(TTFT) if TTFT in objectives else len(objectives) - 1
    kept = np.flatnonzero(non_dominated(costs))
    return [points[first[i]] for i in kept[np.argsort(costs[kept, key], kind="stable")]]
