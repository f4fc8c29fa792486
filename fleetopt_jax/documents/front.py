"""A front as one JSON object (SI units): every point is a whole plan with the objectives it is judged by."""

import dataclasses
from typing import Any

from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.optimize.front import FRONT_OBJECTIVES, Front, FrontQuestion, NoFront, Point

SCHEMA = "fleetopt-front/1"
KNEE_IS = (
    "the point deepest below the chord through the two extremes (three objectives: the plane sum = 1), every objective "
    "normalised to 0 at the front's best and 1 at its worst"
)


def front_to_json(front: Front | NoFront) -> dict[str, Any]:
    """The front, or the limit for which there is none."""
    question = front.question
    problem, axes = question.problem, [FRONT_OBJECTIVES[name] for name in question.objectives]
    found = _found(front) if isinstance(front, Front) else _nothing(question)
    return {
        "schema": SCHEMA,
        "objectives": [
            {"name": axis.name, "better": "low" if axis.sense > 0 else "high", "unit": axis.unit} for axis in axes
        ],
        "ttft_is": _ttft_is(question),
        "workload": {
            "name": problem.service.name,
            "arrival_rate_per_s": float(problem.workload.arrival_rate_per_s),
        },
        "assume": problem.assume,
        "n_pools": problem.n_pools,
        "gamma": problem.gamma,
        "method": question.method,
        "certified": found["certified"],
        "points": found["points"],
        "knee_is": KNEE_IS,
        "hypervolume": found["hypervolume"],
        "homogeneous": found["homogeneous"],
        "fleetopt": found["fleetopt"],
        "fleetopt_is": question.fleetopt_is,
        "reference_ttft_limit_s": float(problem.slo.ttft_p99_s),
        "search": {"n_searches": front.n_searches, "wall_s": front.wall_s},
        "binding": None if front.binding is None else dataclasses.asdict(front.binding),
    }


def _ttft_is(question: FrontQuestion) -> str:
    slo = question.problem.slo
    of = "the worst pool" if slo.scope == "pool" else "all requests together"
    slope = float(slo.ttft_s_per_token)
    return f"P99 TTFT of {of}" + (f", less {slope:g} s for every token of the prompt" if slope else "")


def _found(front: Front) -> dict[str, Any]:
    names = front.objectives
    return {
        "certified": front.certified,
        "points": [_point(point, names) | {"knee": i == front.knee} for i, point in enumerate(front.points)],
        "hypervolume": _hypervolume(front.question)
        | {
            "value": front.hypervolume,
            "share_of_box": front.hypervolume_frac,
            "missing_at_most": front.hypervolume_missing,
            "reference": dict(zip(names, front.reference, strict=True)),
        },
        "homogeneous": None if front.homogeneous is None else _point(front.homogeneous, names),
        "fleetopt": None if front.fleetopt is None else _point(front.fleetopt, names),
    }


def _nothing(question: FrontQuestion) -> dict[str, Any]:
    return {
        "certified": True,
        "points": [],
        "hypervolume": _hypervolume(question),
        "homogeneous": None,
        "fleetopt": None,
    }


def _hypervolume(question: FrontQuestion) -> dict[str, Any]:
    """Of nothing."""
    return {
        "value": 0.0,
        "unit": " ".join(FRONT_OBJECTIVES[name].unit for name in question.objectives),
        "share_of_box": 0.0,
        "missing_at_most": None,
        "reference": {},
        "reference_is": question.reference_is,
    }


def _point(point: Point, names: tuple[str, ...]) -> dict[str, Any]:
    return {"objectives": dict(zip(names, point.values, strict=True)), "plan": plan_to_json(point.plan)}
