"""A front as JSON (`fleetopt-front/1`, SI units): every point is a whole plan with the objectives it is judged by."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fleetopt_jax._optimize.front import FRONT_OBJECTIVES, Front, NoFront, Point, checked_objectives, point_of
from fleetopt_jax._optimize.pareto import measured
from fleetopt_jax._optimize.problem import Method
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.catalog.workloads import LoadedWorkload
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import to_json, write_whole
from fleetopt_jax.documents.fields import Name, NotNegative, Part, Positive, read_as
from fleetopt_jax.documents.plan import SAME, hour_to_json, is_another, plan_of_file, plan_to_json, workload_of_file
from fleetopt_jax.documents.plan_file import PlanFile
from fleetopt_jax.fleet.fleet import with_limits

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import Layout

SCHEMA = "fleetopt-front/1"
KNEE_IS = (
    "the point deepest below the chord through the two extremes (three objectives: the plane sum = 1), every objective "
    "normalised to 0 at the front's best and 1 at its worst"
)
MAX_POINTS = 1000

# ------------------------------------------------------------------------------------------------------------- writing


def front_to_json(
    front: Front | NoFront, columns: "Layout | None" = None, *, path: str | os.PathLike | None = None
) -> dict[str, Any]:
    """The front, or the limit for which there is none. `columns` and `path` as in `plan_to_json`."""
    problem, axes = front.problem, [FRONT_OBJECTIVES[name] for name in front.objectives]
    found = _found(front, columns, path) if isinstance(front, Front) else NOTHING
    return {
        "schema": SCHEMA,
        "objectives": [
            {"name": axis.name, "better": "low" if axis.sense > 0 else "high", "unit": axis.unit} for axis in axes
        ],
        "ttft_is": _ttft_is(front),
        "workload": {
            "name": problem.service.name,
            "arrival_rate_per_s": float(problem.workload.arrival_rate_per_s),
            **hour_to_json(problem.service.hour),
        },
        "assume": problem.assume,
        "n_pools": problem.n_pools,
        "gamma": problem.gamma,
        "method": front.method,
        "certified": found["certified"],
        "points": found["points"],
        "knee_is": KNEE_IS,
        "hypervolume": {
            "value": found["value"],
            "unit": " ".join(axis.unit for axis in axes),
            "share_of_box": found["share_of_box"],
            "missing_at_most": found["missing_at_most"],
            "reference": found["reference"],
            "reference_is": front.reference_is,
        },
        "homogeneous": found["homogeneous"],
        "fleetopt": found["fleetopt"],
        "fleetopt_is": front.fleetopt_is,
        "reference_ttft_limit_s": float(problem.slo.ttft_p99_s),
        "search": {"n_searches": front.n_searches, "wall_s": front.wall_s},
        "binding": None if front.binding is None else dataclasses.asdict(front.binding),
    }


NOTHING = {
    "certified": True,
    "points": [],
    "value": 0.0,
    "share_of_box": 0.0,
    "missing_at_most": None,
    "reference": {},
    "homogeneous": None,
    "fleetopt": None,
}


def _found(front: Front, columns: "Layout | None", path: str | os.PathLike | None) -> dict[str, Any]:
    def point(each: Point | None) -> dict[str, Any] | None:
        if each is None:
            return None
        return {
            "objectives": dict(zip(front.objectives, each.values, strict=True)),
            "plan": plan_to_json(each.plan, columns, path=path),
        }

    return {
        "certified": front.certified,
        "points": [(point(each) or {}) | {"knee": i == front.knee} for i, each in enumerate(front.points)],
        "value": front.hypervolume,
        "share_of_box": front.hypervolume_frac,
        "missing_at_most": front.hypervolume_missing,
        "reference": dict(zip(front.objectives, front.reference, strict=True)),
        "homogeneous": point(front.homogeneous),
        "fleetopt": point(front.fleetopt),
    }


def _ttft_is(front: Front | NoFront) -> str:
    slo = front.problem.slo
    scope = "the worst pool" if slo.scope == "pool" else "all requests together"
    slope = float(slo.ttft_s_per_token)
    return f"P99 TTFT of {scope}" + (f", less {slope:g} s for every token of the prompt" if slope else "")


def save_front(front: Front | NoFront, path: str | os.PathLike, columns: "Layout | None" = None) -> None:
    """`front_to_json` as a file, written whole or not at all: `load_front` reads it back."""
    write_whole(path, to_json(front_to_json(front, columns, path=path)) + "\n")


# ------------------------------------------------------------------------------------------------------------- reading


class AxisPart(Part):
    name: Name


class PointPart(Part):
    objectives: dict[str, float]
    plan: PlanFile


class HypervolumePart(Part):
    reference: dict[str, float]
    reference_is: Name
    missing_at_most: NotNegative | None = None


class SearchesPart(Part):
    n_searches: Annotated[int, Field(ge=0)]
    wall_s: NotNegative


class FrontFile(Part):
    """What is read of a front; its plans are evaluated anew."""

    schema_name: Annotated[Literal["fleetopt-front/1"], Field(alias="schema")]
    objectives: Annotated[list[AxisPart], Field(min_length=2, max_length=3)]
    n_pools: Annotated[int, Field(ge=1)]
    gamma: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None
    method: Method
    certified: bool
    points: Annotated[list[PointPart], Field(max_length=MAX_POINTS)]
    hypervolume: HypervolumePart
    homogeneous: PointPart | None
    fleetopt: PointPart | None
    fleetopt_is: Name
    reference_ttft_limit_s: Positive
    search: SearchesPart


def load_front(
    path: str | os.PathLike, *, specs: Sequence[EngineSpec] = (), workload: LoadedWorkload | None = None
) -> Front:
    """The front in a file that `fleetopt pareto` or `save_front` wrote, its plans evaluated anew.

    `specs` and `workload` as `load_plan` takes them. Where a point is not what the file says of it, which it warns of,
    nothing is certified any more. Raises BadInput that names the file, the field and the value; also for a file without
    points, of no fleet at all.
    """
    where = os.fspath(path)
    file = read_as(FrontFile, where, SCHEMA, "pareto")
    names = checked_objectives([axis.name for axis in file.objectives], f"{where}, objectives")
    if not file.points:
        raise BadInput(where, "the front has no points, for no fleet held its limits", "need a front that was found")
    if set(file.hypervolume.reference) != set(names):
        raise BadInput(f"{where}, hypervolume.reference", f"{file.hypervolume.reference}", f"need {', '.join(names)}")
    first = file.points[0].plan
    loaded = workload or workload_of_file(first, where)

    def point(part: PointPart | None, place: str) -> Point | None:
        return part and point_of(plan_of_file(part.plan, f"{where}, {place}.plan", loaded, specs=specs), names)

    read = [point(part, f"points.{i}") for i, part in enumerate(file.points)]
    points = [each for each in read if each is not None]
    promised = [[part.objectives.get(name) for name in names] for part in file.points]
    kept = not is_another(first, loaded.workload) and np.allclose(
        np.array([each.values for each in points]), np.array(promised, dtype=float), rtol=SAME, atol=0.0
    )
    if not kept:
        warnings.warn(f"the points of {where} are not what they were when it was made", stacklevel=2)
    plans = [each.plan for each in points]
    problem = plans[0].problem.serving(
        slo=with_limits(plans[0].problem.slo, ttft_p99_s=file.reference_ttft_limit_s),
        specs=tuple(dict.fromkeys(spec for plan in plans for spec in plan.problem.specs)),
    )
    reference = [file.hypervolume.reference[name] for name in names]
    return Front(
        problem=dataclasses.replace(problem, n_pools=file.n_pools, gamma=file.gamma),
        objectives=names,
        method=file.method,
        points=tuple(points),
        homogeneous=point(file.homogeneous, "homogeneous"),
        fleetopt=point(file.fleetopt, "fleetopt"),
        fleetopt_is=file.fleetopt_is,
        reference_is=file.hypervolume.reference_is,
        **measured(points, names, reference),
        hypervolume_missing=file.hypervolume.missing_at_most if kept else None,
        certified=file.certified and kept,
        n_searches=file.search.n_searches,
        wall_s=file.search.wall_s,
    )
