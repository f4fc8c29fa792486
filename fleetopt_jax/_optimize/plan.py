"""What is answered: a `Plan`, or the limit that makes it `Infeasible`. Host-side records of specs, not of engines."""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

import numpy as np

from fleetopt_jax._optimize.problem import Method, Problem
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.fleet.evaluate import FleetMetrics
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.resources import usage

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
    specs: tuple[EngineSpec, ...]
    window_tokens: np.ndarray
    gamma: np.ndarray
    n_instances: np.ndarray
    certified: bool  # no candidate is cheaper
    n_evaluated: int
    candidates: str
    lower_bound: float | None = None  # of the cost
    by_pools: tuple[float, ...] = ()  # least cost with at most 1, 2, ... pools, where the method knows
    homogeneous_w: float | None = None  # least power of one pool [W]; inf where none holds the limits
    one_pool: OnePoolFleet | None = None  # the best of one pool, where the method knows `homogeneous_w`


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
    specs: tuple[EngineSpec, ...]  # one per lane
    fleet: Fleet
    metrics: FleetMetrics
    gain_vs_homogeneous: float | None  # tok/J over the best one-pool fleet's; None if no such fleet holds the limits
    search: Search
    binding: BrokenLimit | None = None
    one_pool: OnePoolFleet | None = None  # None if no such fleet holds the limits

    @property
    def kinds(self) -> tuple[str, ...]:
        """GPUs of the lanes, by name."""
        return tuple(spec.gpu_name for spec in self.specs)

    @property
    def used(self) -> dict[str, float]:
        """What it uses of every limit of the budget, by its name."""
        pools = self.metrics.pools.resources
        return {name: usage(weights, self.kinds, pools) for name, weights in self.problem.limit_weights.items()}

    @property
    def cost(self) -> float:
        """By the objective's weights."""
        return usage(self.problem.objective_weights, self.kinds, self.metrics.pools.resources)

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
        binding = answer.binding
        nearest = f"; the nearest feasible is {binding.nearest_feasible:g}" if binding.nearest_feasible else ""
        raise ValueError(f"no fleet holds {binding.limit} = {binding.asked}{nearest}")
    return answer
