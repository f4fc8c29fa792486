"""Services that share a budget as JSON (`fleetopt-services/1`, SI units).

Each service has its whole plan (`fleetopt-plan/1`), which `evaluate`, `simulate` and `export` read once it is a file of
its own.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetopt_jax import __version__
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.room import room_of
from fleetopt_jax._optimize.services import (
    NoServicesPlan,
    ServicesPlan,
    SharedService,
    longest_answer,
    price_of,
)
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.room import room_to_json
from fleetopt_jax.fleet.resources import Weights, limited_resource

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import Layout

SCHEMA = "fleetopt-services/1"
COSTS = {"tok_per_j": "power_w", "power": "power_w", "usd": "usd_per_h", "co2": "kg_co2_per_h", "gpus": "n_gpus"}


def services_to_json(
    answer: ServicesPlan | NoServicesPlan,
    columns: "Sequence[Layout | None]" = (),
    *,
    path: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """The fleets of all services, or what they cannot keep together. `columns` are those that the trace of each service
    was read by, `path` is the file that it is written to, if any, as in `plan_to_json`.

    `saved` is of the cost that the objective counts (`cost`: watts, USD an hour, ...), found by another search, and so
    is a limit's `price`, of a unit of it, found by the relaxed problem. What bought GPUs cost more than those in stock
    is in the metrics and the limits, not in the services' own plans. `room` is the most requests a second that a
    service's fleet carries, and what a little more breaks.
    """
    services = answer.services
    objective = services.any.objective
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "status": answer.status,
        "assume": services.any.assume,
        "objective": objective if isinstance(objective, str) else {"weights": _weights(objective)},
        "cost": COSTS.get(objective, "weighted") if isinstance(objective, str) else "weighted",
        "services": [],
        "gpus": [],
        "limits": [],
        "metrics": None,
        "search": {key: value for key, value in dataclasses.asdict(answer.search).items() if key != "by_pools"},
    }
    if isinstance(answer, NoServicesPlan):
        binding = dataclasses.asdict(answer.binding) | {"service": answer.service, "proved": answer.proved}
        asked = [{"name": each.name, **promised(each)} for each in services.each]
        return document | {"services": asked, "binding": binding, "would_do": dict(answer.helps)}
    layouts = columns or [None] * len(answer.plans)
    return document | {
        "services": [
            _service(each, plan, plan_to_json(plan, layout, path=path))
            for each, plan, layout in zip(services.each, answer.plans, layouts, strict=True)
        ],
        "gpus": [_gpus(answer, kind) for kind in services.kinds],
        "limits": [_limit(answer, name) for name in services.budget.caps],
        "metrics": _metrics(answer),
    }


def _weights(weights: Weights) -> dict[str, Any]:
    return {**vars(weights), "gpus_of": dict(weights.gpus_of)}


def promised(service: SharedService) -> dict[str, Any]:
    """What a service is promised, by itself."""
    return {
        "class": "batch" if service.batch else "interactive",
        "end_to_end_s": None if service.end_to_end_s == math.inf else service.end_to_end_s,
    }


def _service(service: SharedService, plan: Plan, document: dict[str, Any]) -> dict[str, Any]:
    """Of one service; the end of its answers is that of its slowest pool."""
    pools, metrics = plan.metrics.pools, plan.metrics
    ends_s = np.asarray(pools.ttft_p99_s) + longest_answer(plan.problem) * np.asarray(pools.itl_s)
    return {
        "name": service.name,
        **promised(service),
        "llm": document["pools"][0]["llm"],
        "rate_per_s": float(plan.problem.workload.arrival_rate_per_s),
        "gpus_of": plan.n_gpus_of,
        "power_w": float(metrics.power_w),
        "usd_per_h": float(metrics.usd_per_h),
        "tok_per_j": float(metrics.tok_per_j),
        "utilization": float(np.max(np.asarray(pools.utilization))),
        "ttft_p99_s": float(metrics.ttft_p99_s),
        "itl_s": float(np.max(np.asarray(pools.itl_s))),
        "ends_s": float(np.max(ends_s)),
        "room": room_to_json(room_of(plan)),
        "plan": document,
    }


def _gpus(answer: ServicesPlan, kind: str) -> dict[str, Any]:
    """Of one kind: how many there are, who gets them, and what more of them would save."""
    services = answer.services
    purchase, stock = services.purchases.get(kind), services.stock.get(kind)
    return {
        "gpu": kind,
        "stock": stock,
        "may_buy": purchase.most if purchase else 0.0,
        "usd_per_gpu_h": price_of(services, kind),
        "buy_usd_per_gpu_h": purchase.usd_per_gpu_h if purchase else None,
        "used": answer.n_gpus_of[kind],
        "bought": answer.bought.get(kind, 0),
        "price": answer.prices.get(f"gpus_of.{kind}"),
        "worth": [
            {"n_gpus": each.n_gpus, "saved": each.saved, "certified": each.certified}
            for each in answer.worth
            if each.kind == kind
        ],
    }


def _limit(answer: ServicesPlan, name: str) -> dict[str, Any]:
    """What is used of a limit, in all and by each service."""
    services, each = answer.services, answer.used(name)
    surcharge = answer.surcharge_usd_per_h if name == "max_usd_per_h" else 0.0
    kind = name.removeprefix("gpus_of.")
    return {
        "limit": name,
        "of": limited_resource(name),
        "cap": float(services.budget.caps[name]),
        "with_bought": float(services.most_of[kind]) if kind != name else float(services.budget.caps[name]),
        "used": sum(each) + surcharge,
        "by_service": dict(zip([service.name for service in services.each], each, strict=True)),
        "price": answer.prices[name],
    }


def _metrics(answer: ServicesPlan) -> dict[str, Any]:
    total = answer.total
    output = sum(float(plan.metrics.output_tok_per_s) for plan in answer.plans)
    return {
        "tok_per_j": output / float(total.power_w),
        "output_tok_per_s": output,
        "power_w": float(total.power_w),
        "usd_per_h": float(total.usd_per_h),
        "kg_co2_per_h": float(total.kg_co2_per_h),
        "n_gpus": round(float(total.n_gpus)),
        "surcharge_usd_per_h": answer.surcharge_usd_per_h,
    }
