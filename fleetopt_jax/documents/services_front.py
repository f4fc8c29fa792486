"""Fronts of several services, and what stricter promises cost, as JSON (SI units): `fleetopt-services-front/1`,
`fleetopt-promise-front/1`, and the part `stricter` of `fleetopt-services/1`. Every point has the whole plan of all
services (`fleetopt-services/1`)."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fleetopt_jax import __version__
from fleetopt_jax._optimize.services import NoServicesPlan, Services, ServicesPlan
from fleetopt_jax._optimize.services_front import (
    SHARED_OBJECTIVES,
    PromiseFront,
    ServicesFront,
    StricterPromise,
    StricterPromises,
)
from fleetopt_jax.documents.services import services_to_json

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import Layout

Layouts = Sequence["Layout | None"]

FRONT_SCHEMA = "fleetopt-services-front/1"
PROMISE_SCHEMA = "fleetopt-promise-front/1"
METRICS = ("tok_per_j", "power_w", "usd_per_h", "kg_co2_per_h", "n_gpus")
IS = "convex hull: plans that are the best by some weights of the two objectives; those that no weights prefer are not"


def services_front_to_json(
    front: ServicesFront | NoServicesPlan,
    objectives: Sequence[str],
    columns: Layouts = (),
    *,
    path: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """A front of two `objectives`, or what the services cannot keep. `columns` and `path` as in `services_to_json`."""
    axes = [(name, SHARED_OBJECTIVES[name]) for name in objectives]
    named = [{"name": name, "better": "low" if axis.sense > 0 else "high", "unit": axis.unit} for name, axis in axes]
    document = {
        "schema": FRONT_SCHEMA,
        **asked_to_json(front.services),
        "objectives": named,
        "front_is": IS,
        "certified": None,
        "complete": None,
        "points": [],
        "search": None,
        "infeasible": None,
    }
    if isinstance(front, NoServicesPlan):
        return document | {"infeasible": services_to_json(front, columns, path=path)}
    points = [
        {
            "objectives": dict(zip(front.objectives, point.values, strict=True)),
            "knee": i == front.knee,
            **_point(point.plan, columns, path),
        }
        for i, point in enumerate(front.points)
    ]
    return document | {
        "certified": front.certified,
        "complete": front.complete,
        "points": points,
        "search": {"n_searches": front.n_searches, "wall_s": front.wall_s},
    }


def promise_front_to_json(
    front: PromiseFront, columns: Layouts = (), *, path: str | os.PathLike | None = None
) -> dict[str, Any]:
    """The plan of all services at each limit of one of them. `columns` and `path` as in `services_to_json`."""
    one = next(each for each in front.services.each if each.name == front.service)
    rows = []
    for limit, answer in zip(front.ttft_p99_s, front.answers, strict=True):
        row: dict[str, Any] = {"ttft_p99_s": limit, **_point(answer, columns, path)}
        of_all = row["plan"]["metrics"] or {}
        own = next(each for each in row["plan"]["services"] if each["name"] == front.service)
        rows.append(row | {"reached_s": own.get("ttft_p99_s")} | {name: of_all.get(name) for name in METRICS})
    return {
        "schema": PROMISE_SCHEMA,
        **asked_to_json(front.services),
        "service": front.service,
        "asked_s": float(one.asked[0].slo.ttft_p99_s),
        "certified": all(row["certified"] for row in rows),
        "rows": rows,
        "search": {"n_searches": len(rows), "wall_s": front.wall_s},
    }


def stricter_to_json(found: StricterPromises) -> dict[str, Any]:
    """What a stricter promise to each service costs, beside the present plan."""
    return {"tighter_frac": found.tighter_frac, "each": [_stricter(found, one) for one in found.each]}


def _stricter(found: StricterPromises, one: StricterPromise) -> dict[str, Any]:
    extra = found.extra(one)
    proved = _certified(found.present) and _certified(one.answer)
    return {
        "service": one.service,
        "promise": one.promise,
        "was_s": one.was_s,
        "is_s": one.is_s,
        "status": one.answer.status,
        "certified": proved,
        "extra": None if extra is None else {name: float(value) for name, value in vars(extra).items()},
        "gpus_of": None if isinstance(one.answer, NoServicesPlan) else one.answer.n_gpus_of,
    }


def asked_to_json(services: Services) -> dict[str, Any]:
    """Whose plans they are, and by which assumptions."""
    return {
        "version": __version__,
        "assume": services.any.assume,
        "asked": [each.name for each in services.each],
    }


def _point(answer: ServicesPlan | NoServicesPlan, columns: Layouts, path: str | os.PathLike | None) -> dict[str, Any]:
    return {
        "status": answer.status,
        "certified": _certified(answer),
        "gap": answer.search.gap,
        "plan": services_to_json(answer, columns, path=path),
    }


def _certified(answer: ServicesPlan | NoServicesPlan) -> bool:
    """Whether there is proved to be none better; or none."""
    return answer.proved if isinstance(answer, NoServicesPlan) else answer.search.gap == 0.0
