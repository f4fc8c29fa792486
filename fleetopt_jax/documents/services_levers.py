"""What pays for several services together, as JSON (SI units): `fleetopt-services-levers/1`."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fleetopt_jax._optimize.services import NoServicesPlan
from fleetopt_jax._optimize.services_levers import ServicesLevers, SharedLever
from fleetopt_jax.documents.levers import pools_to_json
from fleetopt_jax.documents.services import services_to_json
from fleetopt_jax.documents.services_front import METRICS, asked_to_json

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import Layout

SCHEMA = "fleetopt-services-levers/1"
IS = (
    "cost of all services at present over their cost with the lever, by the objective, everything else re-optimised "
    "under the budget that they share"
)


def services_levers_to_json(
    found: ServicesLevers, columns: "Sequence[Layout | None]" = (), *, path: str | os.PathLike | None = None
) -> dict[str, Any]:
    """The present plan of all services (`fleetopt-services/1`), every lever from it, ranked, and for which services one
    was not released. `columns` and `path` as in `services_to_json`."""
    present = services_to_json(found.present.answer, columns, path=path)
    return {
        "schema": SCHEMA,
        **asked_to_json(found.services),
        "objective": present["objective"],
        "gain_is": IS,
        "present": present,
        "levers": [_lever(found, one) for one in found.each],
        "left_out": [each._asdict() for each in found.left_out],
        "search": {"n_searches": found.n_searches, "wall_s": found.wall_s},
    }


def _lever(found: ServicesLevers, one: SharedLever) -> dict[str, Any]:
    """One lever, released for some of the services. `changed` are GPUs, so many more than at present."""
    return {
        "name": one.name,
        "titles": list(one.titles),
        "notes": list(one.notes),
        "released_for": list(one.levers),
        "status": one.answer.status,
        "certified": found.certified(one),
        "gain": found.gain(one),
        "quality": found.quality(one),
        "changed": found.gpus_changed(one),
        "without_end": list(found.without_end(one)),
        "compressor_w": one.extra_w,
        "metrics": _metrics(one),
        "fleets": _fleets(one),
    }


def _metrics(one: SharedLever) -> dict[str, float] | None:
    """Of all services, with what compresses every prompt."""
    if one.total is None:
        return None
    values = {name: float(value) for name, value in vars(one.total).items()}
    values["tok_per_j"] = one.output_tok_per_s / values["power_w"]
    return {name: values[name] for name in METRICS}


def _fleets(one: SharedLever) -> list[dict[str, Any]]:
    """Of every service, also of those for which it is not released."""
    if isinstance(one.answer, NoServicesPlan):
        return []
    return [
        {"service": service.name, "gpus_of": plan.n_gpus_of, "pools": pools_to_json(plan)}
        for service, plan in zip(one.answer.services.each, one.answer.plans, strict=True)
    ]
