"""What a plan breaks, and what mends it, as JSON (SI units): fields of `fleetopt-plan/1` that are written, not read.

`broken`, of every plan that breaks a limit: a list of {pool (from 1, in the order of `pools`; null: the whole fleet),
limit, value (null: without bound), asked}. `repair`, of `fleetopt evaluate` and `report`: {held, n_instances and
instances_added (a number a pool; null where no number of instances holds the limits), added and metrics (what is added
to, and in all of, n_gpus, power_w and usd_per_h), binding (the limit of the budget that it breaks, or null), unmended
(as `broken`, `value` the nearest that instances reach)}. `repaired`, of a plan that `evaluate --repair` has grown: the
same, with what was `broken`.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.repair import PoolLimit, Repair, broken_limits

TAKEN = ("n_gpus", "power_w", "usd_per_h")


def broken_to_json(plan: Plan) -> dict[str, Any]:
    """The field `broken`, where a plan breaks a limit."""
    found = broken_limits(plan)
    return {"broken": _limits(found)} if found else {}


def repair_to_json(found: Repair) -> dict[str, Any]:
    """The value of the field `repair`."""
    document: dict[str, Any] = {
        "held": found.after is not None and found.after.binding is None,
        "n_instances": None,
        "instances_added": None,
        "added": None,
        "metrics": None,
        "binding": None,
        "unmended": _limits(found.unmended),
    }
    after, added = found.after, found.instances_added
    if after is None or added is None:
        return document
    taken = [{name: float(getattr(plan.metrics, name)) for name in TAKEN} for plan in (found.before, after)]
    return document | {
        "n_instances": [int(n) for n in after.fleet.n_instances],
        "instances_added": [int(n) for n in added],
        "added": {name: taken[1][name] - taken[0][name] for name in TAKEN},
        "metrics": taken[1],
        "binding": asdict(after.binding) if after.binding else None,
    }


def repaired_to_json(found: Repair) -> dict[str, Any]:
    """The value of the field `repaired`, of the plan that the repair is."""
    return repair_to_json(found) | broken_to_json(found.before)


def _limits(found: Iterable[PoolLimit]) -> list[dict[str, Any]]:
    return [asdict(each) | {"pool": None if each.pool is None else each.pool + 1} for each in found]
