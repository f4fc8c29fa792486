"""A simulation beside the laws as JSON (`fleetopt-simulation/1`, SI units): written whole, checked when it is read."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.problem import as_objective
from fleetopt_jax._simulate.burstiness import Burstiness
from fleetopt_jax._simulate.estimates import Estimate
from fleetopt_jax._simulate.readings import Compared, Held, LimitReading, compared, limits_read, verdict
from fleetopt_jax._simulate.simulate import Simulation, widest_frac
from fleetopt_jax._simulate.verify import Verified
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.files import to_json, write_whole
from fleetopt_jax.documents.failures import rates_to_json
from fleetopt_jax.documents.fields import NotNegative, Part, read_as
from fleetopt_jax.documents.plan import SAME, plan_to_json
from fleetopt_jax.documents.plan_file import SCHEMA as PLAN_SCHEMA
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.reserve import Failures

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import Layout

SCHEMA = "fleetopt-simulation/1"
COUNTS = ("n_arrivals", "n_completed", "n_rejected", "n_in_system", "n_preemptions", "n_iterations")
TOLERANCE = {"ttft_p99_s": 0.15, "ttft_p99_of_all_s": 0.15, "itl_p99_s": 0.15, "itl_s": 0.05, "n_active": 0.05}
FLEET = ("window_tokens", "gpu", "llm", "tp", "n_instances")  # of a pool: which fleet was simulated
TOLERANCE_ELSE = 0.03  # of tok/J, power and shares: what the laws are held to in the agreement study


def simulation_to_json(
    simulation: Simulation,
    plan: Plan,
    *,
    arrivals: Literal["renewal", "poisson", "trace"] = "renewal",
    seed: int = 0,
    until_frac: float | None = None,
    bursts: Burstiness | None = None,
    columns: "Layout | None" = None,
) -> dict[str, Any]:
    """A simulation of `plan`'s fleet under its workload as the contract's JSON object, and how it was run.

    `until` has the half width that was asked for, the widest that was reached, and whether that is it; `burstiness`
    the P99 TTFT of a trace's arrivals beside Poisson arrivals of the same rate; `down` how many instances of every pool
    were left out, `outages` how often things failed, how many instances did, and the share of the time that those of
    each pool were up. All of them only where they were asked for.
    """
    of_plan = plan_to_json(plan, columns)
    return {
        "schema": SCHEMA,
        **{name: of_plan[name] for name in ("workload", "slo", "assume", "dispatch")},
        "arrivals": arrivals,
        "seed": seed,
        **outcome_to_json(simulation, plan),
        **({} if until_frac is None else {"until": _until(simulation, until_frac)}),
        **({} if bursts is None else {"burstiness": _bursts(bursts)}),
        **({"down": simulation.down} if simulation.down else {}),
        **({} if simulation.failures is None else {"outages": _outages(simulation, simulation.failures)}),
    }


def _outages(simulation: Simulation, failures: Failures) -> dict[str, Any]:
    counts = {"n_outages": simulation.n_outages, "up_frac": list(simulation.up_frac)}
    return {"rates": rates_to_json(failures), **counts}


def _until(simulation: Simulation, asked_frac: float) -> dict[str, Any]:
    widest = widest_frac(simulation)
    return {
        "half_width_frac": asked_frac,
        "reached_frac": _finite(widest),
        "reached": widest <= asked_frac,
    }


def _bursts(bursts: Burstiness) -> dict[str, Any]:
    return {"gap_scv": bursts.gap_scv} | {
        name: {"simulated": _finite(found.mean), "ci95": [_finite(found.low), _finite(found.high)]}
        for name, found in (
            ("trace_ttft_p99_s", bursts.trace_s),
            ("poisson_ttft_p99_s", bursts.poisson_s),
            ("ratio", bursts.ratio),
        )
    }


def outcome_to_json(simulation: Simulation, plan: Plan) -> dict[str, Any]:
    """What came out of a simulation of `plan`'s fleet, beside the laws.

    `slo_held` is of the means; `verdict` and each of `limits` say what the intervals allow: holds, fails or unclear,
    and then `suffices_replications`, how many would tell by the spread seen (null: nobody knows, or too many). Pools
    count from 1; null is all requests together. `reading` of a metric is the laws': agrees, differs or unclear.
    """
    limits = limits_read(simulation, plan.problem.slo)
    return {
        "verdict": verdict(limits),
        "limits": [_limit(each) for each in limits],
        **{name: getattr(simulation, name) for name in COUNTS},
        "slo_held": simulation.slo_held,
        "warm_up_s": simulation.warm_up_s,
        "warmed_up": simulation.warmed_up,
        "window_s": simulation.window_s,
        "memory_bytes": simulation.memory_bytes,
        "n_replications": simulation.n_replications,
        "enough_requests": simulation.enough_requests,
        "metrics": _beside(simulation, simulation.analytic, simulation.metrics),
        "pools": [
            {
                "window_tokens": int(plan.fleet.window_tokens[k]),
                **_names(lane.stages[-1]),
                "n_instances": int(np.sum(np.asarray(plan.fleet.n_instances)[k])),
                **_stages(plan, k),
                "metrics": _beside(simulation, simulation.pools_analytic[k], simulation.pools[k]),
            }
            for k, lane in enumerate(plan.lanes)
        ],
    }


def _names(spec: EngineSpec) -> dict[str, Any]:
    return {"gpu": spec.gpu_name, "llm": spec.llm_name, "tp": spec.tp}


def _stages(plan: Plan, k: int) -> dict[str, Any]:
    """The stages of a pool that has two; its own names are of the one that decodes."""
    lane, specs = plan.fleet.lanes[k], plan.lanes[k].stages
    if len(specs) == 1:
        return {}
    stages = zip(lane.stages, specs, strict=True)
    return {"stages": [{"role": of.role, **_names(spec), "n_instances": int(of.n_instances)} for of, spec in stages]}


def verified_to_json(found: Verified, plan: Plan, laws: Plan) -> dict[str, Any]:
    """How the plan that a simulation chose was found, beside the laws' own, and what came out of its simulation.

    `tried` has every fleet that was simulated, the last the answer: its `verdict` is of its trial, which looks at as
    many replications as decide; `objective` by the laws, null where a budget forbids the fleet.
    """
    added = np.sum(np.asarray(plan.fleet.n_instances)) - np.sum(np.asarray(laws.fleet.n_instances))
    rivals = [each.rival for each in found.standings]
    return {
        "held": found.held,
        "rounds": found.rounds,
        "instances_added": int(added),
        "n_tried": len({(each.rival, each.n_instances) for each in found.tried}),
        "laws": _fleet(laws.specs, laws.fleet, np.asarray(laws.fleet.n_instances)) | {"objective": laws.objective},
        "tried": [
            _fleet(rivals[each.rival].specs, rivals[each.rival].fleet, np.asarray(each.n_instances))
            | {
                "objective": as_objective(laws.problem, each.cost) if math.isfinite(each.cost) else None,
                "verdict": each.reading,
            }
            for each in found.tried
        ],
        **outcome_to_json(found.simulation, plan),
    }


def _fleet(specs: Sequence[EngineSpec], fleet: Fleet, n_instances: np.ndarray) -> dict[str, Any]:
    """A fleet in short, pool by pool."""
    return {
        "window_tokens": [int(x) for x in fleet.window_tokens],
        "gpu": [spec.gpu_name for spec in specs],
        "n_instances": [int(n) for n in n_instances],
        "n_gpus": int(sum(int(n) * spec.split.n_gpus for n, spec in zip(n_instances, specs, strict=True))),
    }


def save_simulation(simulation: Simulation, plan: Plan, path: str | os.PathLike, **how: Any) -> None:
    """`simulation_to_json`, which takes `how`, as a file, whole or not at all: `load_simulation` reads it back."""
    write_whole(path, to_json(simulation_to_json(simulation, plan, **how)) + "\n")


def _limit(each: LimitReading) -> dict[str, Any]:
    return {
        "pool": each.pool,
        "limit": each.limit,
        "metric": each.metric,
        "allowed": each.allowed,
        "simulated": _finite(each.found.mean),
        "ci95": [_finite(each.found.low), _finite(each.found.high)],
        "reading": each.reading,
        "suffices_replications": each.suffices_replications,
    }


def _beside(
    simulation: Simulation, analytic: Mapping[str, float | None], estimates: Mapping[str, Estimate]
) -> dict[str, dict[str, Any]]:
    parts = {}
    for name, found in estimates.items():
        reading, enough = compared(
            name,
            analytic.get(name),
            found,
            TOLERANCE.get(name, TOLERANCE_ELSE),
            simulation.n_replications,
            warmed_up=simulation.warmed_up,
        )
        parts[name] = {
            "analytic": _finite(analytic.get(name)),
            "simulated": _finite(found.mean),
            "ci95": [_finite(found.low), _finite(found.high)],
            "agrees": {"agrees": True, "differs": False}.get(reading or ""),
            "reading": reading,
            "suffices_replications": enough,
        }
    return parts


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: null is a time that never comes, or no bound."""
    return None if value is None or not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------------------- reading

Count = Annotated[int, Field(ge=0)]


class MetricPart(Part):
    """One metric: null is infinite, or of the laws nothing where nothing is read of them either."""

    analytic: float | None
    simulated: float | None
    ci95: tuple[float | None, float | None]
    agrees: bool | None
    reading: Compared | None = None  # files of before have none
    suffices_replications: Count | None = None

    @property
    def estimate(self) -> Estimate:
        low, high = self.ci95
        return Estimate(
            math.inf if self.simulated is None else self.simulated,
            -math.inf if low is None else low,
            math.inf if high is None else high,
        )

    @property
    def law(self) -> float | None:
        return math.inf if self.analytic is None and (self.agrees, self.reading) != (None, None) else self.analytic


class PoolPart(Part):
    metrics: dict[str, MetricPart]


class OutcomePart(Part):
    """What came out of a simulation."""

    n_arrivals: Count
    n_completed: Count
    n_rejected: Count
    n_in_system: Count
    n_preemptions: Count
    n_iterations: Count
    slo_held: bool
    warm_up_s: NotNegative
    warmed_up: bool = True
    window_s: NotNegative
    memory_bytes: Count
    n_replications: Count = 0
    enough_requests: Count = 0
    metrics: dict[str, MetricPart]
    pools: list[PoolPart]


class SimulationFile(OutcomePart):
    """What is read of a simulation."""

    schema_name: Literal["fleetopt-simulation/1"] = Field(SCHEMA, alias="schema")  # files of 0.1.0 have none


class _LimitPart(Part):
    pool: Annotated[int, Field(ge=1)] | None
    limit: Literal["ttft_p99_s", "itl_s", "rejected_frac"]
    metric: str
    allowed: float
    simulated: float | None
    ci95: tuple[float | None, float | None]
    reading: Held
    suffices_replications: Count | None


class _VerifiedPart(OutcomePart):
    held: bool
    instances_added: int  # over the laws' plan; below zero where fewer hold
    verdict: Held | None = None  # files of before have none
    limits: tuple[_LimitPart, ...] = ()


class _TrafficPart(Part):
    arrival_rate_per_s: NotNegative
    digest: str | None = None


class _MetricsPart(Part):
    tok_per_j: float


class _VerifiedPlan(Part):
    workload: _TrafficPart
    dispatch: str = "jsq"
    metrics: _MetricsPart | None = None
    verified: _VerifiedPart | None = None


def verified_of(path: str | os.PathLike, document: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a simulation found of the plan in a file, where `document`, the same fleet evaluated again, still has its
    traffic, its dispatch and its tokens per joule; else None, for nobody has simulated that."""
    file = read_as(_VerifiedPlan, os.fspath(path), PLAN_SCHEMA, "optimize")
    if file.verified is None or file.metrics is None or len(file.verified.pools) != len(document["pools"]):
        return None
    workload, known = document["workload"], file.workload
    same = workload["digest"] == known.digest and document["dispatch"] == file.dispatch
    for now, then in (
        (workload["arrival_rate_per_s"], known.arrival_rate_per_s),
        (document["metrics"]["tok_per_j"], file.metrics.tok_per_j),
    ):
        same = same and math.isclose(now, then, rel_tol=SAME)
    if not same:
        return None
    fleet = [{name: pool[name] for name in FLEET} for pool in document["pools"]]
    found = file.verified.model_dump()
    return found | {"pools": [pool | each for pool, each in zip(fleet, found["pools"], strict=True)]}


def load_simulation(path: str | os.PathLike) -> Simulation:
    """The simulation in a file that `fleetopt simulate` or `save_simulation` wrote.

    Raises BadInput that names the file, the field and the value.
    """
    where = os.fspath(path)
    file = read_as(SimulationFile, where, SCHEMA, "simulate")
    numbers = file.model_dump(exclude={"schema_name", "metrics", "pools"})
    of_pools = [pool.metrics for pool in file.pools]
    return Simulation(
        **numbers,
        metrics=_estimates(file.metrics),
        analytic=_laws(file.metrics),
        pools=tuple(map(_estimates, of_pools)),
        pools_analytic=tuple(map(_laws, of_pools)),
    )


def _estimates(metrics: dict[str, MetricPart]) -> dict[str, Estimate]:
    return {name: metric.estimate for name, metric in metrics.items()}


def _laws(metrics: dict[str, MetricPart]) -> dict[str, float | None]:
    return {name: metric.law for name, metric in metrics.items()}
