"""What failing instances do to a plan: how many of each pool it can lose, what breaks then, and what a spare costs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np

from fleetopt_jax._optimize.plan import BrokenLimit, Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.search import broken_limit
from fleetopt_jax.fleet.evaluate import FleetMetrics, fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.resources import Budget, Resources
from fleetopt_jax.fleet.traffic import routed


@dataclass(frozen=True)
class PoolLosses:
    """Of one pool, or one stage of it, while all others are whole."""

    pool: int  # from 0
    role: str  # of its instances
    may_lose: int  # instances that may be down while all limits hold
    then: BrokenLimit  # what one more breaks
    holds_frac: float | None  # share of the time in which no more are down [-]; None where that is not known


@dataclass(frozen=True)
class Resilience:
    """What a plan that holds its limits can lose."""

    pools: tuple[PoolLosses, ...]
    spare: Resources  # what one instance more in every pool, and stage, takes; Python's numbers
    n_spares: int  # instances that this is
    holds_frac: float | None  # share of the time in which no pool lacks too many [-]


def resilience(plan: Plan) -> Resilience | None:
    """What a plan can lose; None of one that breaks its limits with all that it has.

    The share of the time is that of pools on nodes of their own, which fail independently; where all requests share
    their limits, each pool's is with all others whole, and the fleet's is not known.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> spares = fo.make_surroundings(reserve=fo.make_spares(instances=1))
    >>> problem = fo.make_problem(chat, [fo.EngineSpec("h100")], n_pools=1, surroundings=spares)
    >>> fo.resilience(fo.require_plan(fo.optimize(problem))).pools[0].may_lose
    1
    """
    if plan.binding is not None:
        return None
    fleet, judged, problem = _all_up(plan)
    there = np.rint(np.asarray(plan.fleet.n_instances))
    pools = []
    for place in zip(*np.nonzero(there), strict=True):
        k, i = int(place[0]), int(place[-1]) if len(place) > 1 else 0
        lost, then = _most_lost(lambda n, at=place: judged(_fewer(there, at, n))[1], int(there[place]))
        spec, stage = plan.lanes[k].stages[i], fleet.lanes[k].stages[i]
        share = None
        if problem.failures is not None:
            share = float(problem.failures.down_pmf(int(there[place]), spec.split.n_gpus)[: lost + 1].sum())
        pools.append(PoolLosses(k, stage.role, lost, then, share))
    shares = [each.holds_frac for each in pools if each.holds_frac is not None]
    known = len(shares) == len(pools) and problem.slo.scope == "pool"
    more = judged(there + (there > 0))[0].resources
    spare = jax.tree.map(lambda after, before: float(after) - float(before), more, judged(there)[0].resources)
    return Resilience(tuple(pools), spare, int(np.sum(there > 0)), float(np.prod(shares)) if known else None)


Judge = Callable[[np.ndarray], tuple[FleetMetrics, BrokenLimit | None]]


def _all_up(plan: Plan) -> tuple[Fleet, Judge, Problem]:
    """The plan's fleet where nothing may be down, what judges it with other instances, and its problem."""
    problem = replace(plan.problem, budget=Budget())
    fleet = replace(plan.fleet, surroundings=replace(plan.fleet.surroundings, reserve=None))
    traffic = routed(fleet, problem.workload, problem.assumptions)

    def judged(n_instances: np.ndarray) -> tuple[FleetMetrics, BrokenLimit | None]:
        metrics = fleet_metrics(fleet.with_instances(n_instances), traffic, problem.workload, problem.assumptions)
        return metrics, broken_limit(problem, metrics, {}, float(np.max(np.asarray(metrics.pools.itl_s))))

    return fleet, judged, problem


def _fewer(n_instances: np.ndarray, place: tuple[np.ndarray, ...], lost: int) -> np.ndarray:
    n = n_instances.copy()
    n[place] -= lost
    return n


def _most_lost(broken_by: Callable[[int], BrokenLimit | None], n: int) -> tuple[int, BrokenLimit]:
    """The most of n instances that may be lost, and what one more breaks: twice as many at a time, then by halves. The
    loss of all breaks something."""
    low, high, then = 0, 1, broken_by(1)
    while then is None:
        low, high = high, min(2 * high, n)
        then = broken_by(high)
    while high - low > 1:
        middle = (low + high) // 2
        broken = broken_by(middle)
        low, high, then = (middle, high, then) if broken is None else (low, middle, broken)
    return low, then
