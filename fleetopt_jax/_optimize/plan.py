"""What is answered: a `Plan`, or the limit that makes it `Infeasible`. Host-side records of specs, not of engines."""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

import jax
import numpy as np

from fleetopt_jax._optimize.problem import Method, Problem
from fleetopt_jax.catalog.links import one_stage
from fleetopt_jax.catalog.spec import EngineSpec, LaneSpec
from fleetopt_jax.fleet.evaluate import FleetMetrics, PoolMetrics, StageMetrics
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.resources import Resources, usage

Status = Literal["optimal", "feasible", "infeasible"]


@dataclass(frozen=True)
class Search:
    """How an answer was found, and how sure it is."""

    n_evaluated: int  # pools (exact) or fleets (grid, gradient) whose cost was computed
    wall_s: float
    candidates: str  # what the plan is the best of, in words
    lower_bound: float | None = None  # of the objective over these candidates, whoever found it; None where not known
    gap: float | None = None  # cost of the plan over the lower bound, less one
    by_pools: tuple[float | None, ...] = ()  # the objective with at most 1, 2, ... pools; None where none holds
    n_engines: int = 1  # that every pool could be of


def without_proof(search: Search) -> Search:
    """The search, less what it proved of the fleet it found: another one is taken."""
    return replace(search, lower_bound=None, gap=None)


def among(search: Search, candidates: str) -> Search:
    """The same where that one comes from other candidates, which the search never counted by pools."""
    return replace(without_proof(search), by_pools=(), candidates=candidates)


@dataclass(frozen=True)
class OnePoolFleet:
    """The best fleet with one pool of the full window, by the objective and without the budget: what a plan is compared
    with. Host-side numbers, SI units but for USD and kg CO2 an hour."""

    gpu: str
    tp: int
    n_instances: int
    n_gpus: int
    power_w: float
    usd_per_h: float
    kg_co2_per_h: float
    tok_per_j: float
    ep: int = 1
    dp: int = 1
    pp: int = 1


@dataclass(frozen=True)
class Found:
    """What a method found: the cheapest fleet, its pools with engines, or a cost of inf. Arrays [K]."""

    cost: float
    lanes: tuple[LaneSpec, ...]
    window_tokens: np.ndarray
    gamma: np.ndarray
    n_instances: np.ndarray  # or [K, 2], of the stages
    certified: bool  # no candidate is cheaper
    n_evaluated: int
    candidates: str
    lower_bound: float | None = None  # of the cost
    by_pools: tuple[float, ...] = ()  # least cost with at most 1, 2, ... pools, where the method knows
    homogeneous_w: float | None = None  # least power of one pool [W]; inf where none holds the limits
    one_pool: OnePoolFleet | None = None  # the best of one pool, where the method knows `homogeneous_w`

    @property
    def specs(self) -> tuple[EngineSpec, ...]:
        """Of the lanes, which have one stage each."""
        return tuple(one_stage(lane) for lane in self.lanes)


def nothing(n_evaluated: int, candidates: str, *, certified: bool = True) -> Found:
    """No candidate holds the limits."""
    empty = np.zeros(0)
    return Found(math.inf, (), empty, empty, empty, certified, n_evaluated, candidates)


@dataclass(frozen=True)
class BrokenLimit:
    """A limit that a given fleet breaks, in SI units."""

    limit: str
    value: float
    asked: float


@dataclass(frozen=True)
class Unreachable:
    """A limit that no fleet holds, and the nearest that one does; None where nobody knows. SI units."""

    limit: str
    asked: float | dict[str, float]  # several where only together they cannot be held
    nearest_feasible: float | None


@dataclass(frozen=True)
class Plan:
    """A fleet for a problem, with its metrics. One that was given, not found, may break a limit."""

    status: Status
    method: Method | Literal["given"]
    problem: Problem
    lanes: tuple[LaneSpec, ...]  # what serves each lane
    fleet: Fleet
    metrics: FleetMetrics
    gain_vs_homogeneous: float | None  # tok/J over the best one-pool fleet's; None if no such fleet holds the limits
    search: Search
    binding: BrokenLimit | None = None
    one_pool: OnePoolFleet | None = None  # None if no such fleet holds the limits

    @property
    def specs(self) -> tuple[EngineSpec, ...]:
        """Of the lanes, which have one stage each; refused, in one line, where one has two."""
        return tuple(one_stage(lane) for lane in self.lanes)

    @property
    def kinds(self) -> tuple[str, ...]:
        """GPUs of the lanes by name, of one after the other stage where a lane has two."""
        return tuple(spec.gpu_name for spec in self.stage_specs)

    @property
    def stage_specs(self) -> tuple[EngineSpec, ...]:
        """Of all stages, one lane after the other."""
        return tuple(spec for lane in self.lanes for spec in lane.stages)

    @property
    def stages(self) -> PoolMetrics | StageMetrics:
        """Metrics of all stages, one lane after the other: of lanes of one stage the lanes' own."""
        pools = self.metrics.pools
        if pools.stages is None:
            return pools
        there = np.array([[i < len(lane.stages) for i in range(2)] for lane in self.lanes])
        return jax.tree.map(lambda x: np.asarray(x)[there], pools.stages)

    @property
    def of_kinds(self) -> Resources:
        """What is taken of each of its `kinds`."""
        return self.stages.resources

    @property
    def n_gpus_of(self) -> dict[str, int]:
        """GPUs of each of its kinds."""
        both = list(zip(self.kinds, np.asarray(self.of_kinds.n_gpus), strict=True))
        return {kind: round(sum(float(n) for of, n in both if of == kind)) for kind in dict.fromkeys(self.kinds)}

    @property
    def used(self) -> dict[str, float]:
        """What it uses of every limit of the budget, by its name."""
        limits = self.problem.limit_weights
        return {name: usage(weights, self.kinds, self.of_kinds) for name, weights in limits.items()}

    @property
    def cost(self) -> float:
        """By the objective's weights."""
        return usage(self.problem.objective_weights, self.kinds, self.of_kinds)

    @property
    def objective(self) -> float:
        """The number it was chosen by: its tok/J, USD/h, watts, kg CO2/h or GPUs."""
        return float(self.metrics.tok_per_j) if self.problem.objective == "tok_per_j" else self.cost


def held_in_simulation(plan: Plan) -> Plan:
    """A plan whose latencies a simulation holds, whatever the laws say of them."""
    lifted = plan.binding is not None and plan.binding.limit in ("ttft_p99_s", "itl_s")
    return replace(plan, status="feasible", binding=None) if lifted else plan


def one_pool_of(plan: Plan) -> OnePoolFleet:
    """A plan of one pool as what others are compared with."""
    (spec,), metrics = plan.specs, plan.metrics
    return OnePoolFleet(
        gpu=spec.gpu_name,
        **vars(spec.split),
        n_instances=round(float(metrics.n_instances)),
        n_gpus=round(float(metrics.n_gpus)),
        power_w=float(metrics.power_w),
        usd_per_h=float(metrics.usd_per_h),
        kg_co2_per_h=float(metrics.kg_co2_per_h),
        tok_per_j=float(metrics.tok_per_j),
    )


@dataclass(frozen=True)
class Infeasible:
    """No fleet holds the limits of the problem."""

    method: Method
    problem: Problem
    search: Search
    binding: Unreachable

    @property
    def status(self) -> Status:
        return "infeasible"


def is_plan(answer: Plan | Infeasible) -> TypeGuard[Plan]:
    """Whether there is a fleet that holds the limits."""
    return isinstance(answer, Plan) and answer.binding is None


def require_plan(answer: Plan | Infeasible) -> Plan:
    """The plan, or ValueError that says which limit no fleet holds: for scripts that need one.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> plan = fo.require_plan(fo.optimize(fo.make_problem(chat, [fo.EngineSpec("h100")], n_pools=1)))
    """
    if isinstance(answer, Infeasible):
        raise ValueError(unreached(answer.binding))
    return answer


def unreached(binding: Unreachable) -> str:
    """Which limit no fleet holds, and the nearest that one does, by their fields."""
    nearest = f"; the nearest feasible is {binding.nearest_feasible:g}" if binding.nearest_feasible else ""
    return f"no fleet holds {binding.limit} = {binding.asked}{nearest}"
