"""What of a plan may be down, and what it can lose, as JSON (SI units, hours for what is repaired).

`reserve` of a plan is what was asked: {name: "spares", instances, nodes, gpus_per_node}, or {name: "target",
availability, repair_h, gpu_mtbf_h, node_mtbf_h, gpus_per_node}; absent where nothing may be down. `failure_rates` are
how often things fail where spares were asked, or nothing: {repair_h, gpu_mtbf_h, node_mtbf_h, gpus_per_node}; null is
never. `failures`, written and not read: {pools: a list of {pool (from 1), role, may_lose (instances), then (the limit
that one more breaks, its value, null without bound, and what is asked), holds_frac}, spare (what one instance more in
every pool takes: n_instances, n_gpus, power_w, usd_per_h), holds_frac}; shares of the time, null where not known.
"""

import math
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field

from fleetopt_jax._optimize.failures import resilience
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.documents.fields import NotNegative, Part, Positive
from fleetopt_jax.fleet.reserve import Failures, Reserve, Spares, Target, make_failures, make_spares, make_target

Whole = Annotated[int, Field(ge=0, le=10**6)]
TAKEN = ("n_gpus", "power_w", "usd_per_h")


class FailureRatesPart(Part):
    """How often things fail, and how long it takes to mend them."""

    repair_h: NotNegative
    gpu_mtbf_h: Positive | None = None  # none: never
    node_mtbf_h: Positive | None = None
    gpus_per_node: Annotated[int, Field(ge=1, le=1000)]

    @property
    def rates(self) -> Failures:
        return make_failures(
            repair_h=self.repair_h,
            gpu_mtbf_h=math.inf if self.gpu_mtbf_h is None else self.gpu_mtbf_h,
            node_mtbf_h=math.inf if self.node_mtbf_h is None else self.node_mtbf_h,
            gpus_per_node=self.gpus_per_node,
        )


class SparesPart(Part):
    """N + k."""

    name: Literal["spares"]
    instances: Whole
    nodes: Whole
    gpus_per_node: Annotated[int, Field(ge=1, le=1000)]

    @property
    def choice(self) -> Spares:
        return make_spares(**self.model_dump(exclude={"name"}))


class TargetPart(FailureRatesPart):
    """So much of the time."""

    name: Literal["target"]
    availability: Annotated[float, Field(gt=0, lt=1)]

    @property
    def choice(self) -> Target:
        rates = FailureRatesPart(**self.model_dump(exclude={"name", "availability"})).rates
        return make_target(self.availability, rates)


ReservePart = Annotated[SparesPart | TargetPart, Field(discriminator="name")]


def reserve_to_json(problem: Problem) -> dict[str, Any]:
    """The fields `reserve` and `failure_rates` of a plan, where there are any."""
    reserve, rates = problem.surroundings.reserve, problem.rates
    found: dict[str, Any] = {} if reserve is None else {"reserve": _said(reserve)}
    return found | ({} if rates is None else {"failure_rates": rates_to_json(rates)})


def _said(reserve: Reserve) -> dict[str, Any]:
    """A reserve by its name, and what it was made of."""
    return {"name": reserve.name, **{name: _finite(value) for name, value in reserve.asked.items()}}


def rates_to_json(rates: Failures) -> dict[str, Any]:
    """How often things fail; null is never."""
    return {name: _finite(value) for name, value in vars(rates).items()}


def _finite(value: float) -> float | int | None:
    return None if math.isinf(value) else value


def failures_to_json(plan: Plan) -> dict[str, Any]:
    """The field `failures` of a plan that holds its limits."""
    found = resilience(plan)
    if found is None:
        return {}
    pools = [
        asdict(each) | {"pool": each.pool + 1, "then": asdict(each.then) | {"value": _finite(each.then.value)}}
        for each in found.pools
    ]
    spare = {"n_instances": found.n_spares, **{name: getattr(found.spare, name) for name in TAKEN}}
    return {"failures": {"pools": pools, "spare": spare, "holds_frac": found.holds_frac}}
