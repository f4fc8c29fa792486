"""What a plan that fails breaks, pool by pool, and the instances that mend it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.search import compiled_excesses, with_fleet
from fleetopt_jax.core.programs import program
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.evaluate import fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.limits import ROUNDING, held, reached
from fleetopt_jax.fleet.sizing import most_instances, size_fleet
from fleetopt_jax.fleet.traffic import PoolTraffic, routed
from fleetopt_jax.workload.atoms import Workload


@dataclass(frozen=True)
class PoolLimit:
    """A limit that a pool, or the whole fleet, breaks or cannot hold. SI units; inf where requests wait for ever."""

    pool: int | None  # from 0; None: the fleet as a whole
    limit: str  # as `BrokenLimit` has it
    value: float  # what it is, or of an `Unmended` repair the nearest that instances reach
    asked: float


@dataclass(frozen=True)
class Repair:
    """The least change of instances, at the plan's own windows, engines and gammas, that holds every limit."""

    before: Plan
    after: Plan | None  # None: no number of instances holds the limits; it may break the budget, as its status says
    unmended: tuple[PoolLimit, ...] = ()  # why there is none

    @property
    def instances_added(self) -> np.ndarray | None:
        """Of each pool [K]; negative where one gives some back, as a budget may ask."""
        return None if self.after is None else _instances(self.after) - _instances(self.before)


def broken_limits(plan: Plan) -> tuple[PoolLimit, ...]:
    """Every limit that a plan breaks, pool by pool, then those of the fleet as a whole; nothing of one that holds."""
    if plan.binding is None:
        return ()
    found = [*_broken_by_pools(plan), *_broken_by_all(plan)]
    return tuple(found) or (PoolLimit(None, plan.binding.limit, plan.binding.value, plan.binding.asked),)


def _broken_by_pools(plan: Plan) -> Iterator[PoolLimit]:
    slo, pools = plan.problem.slo, plan.metrics.pools
    values = {"utilization": pools.utilization, "ttft_p99_s": pools.ttft_p99_s, "itl_s": pools.itl_s}
    found = {name: np.asarray(x) for name, x in compiled_excesses(pools, slo).items()}
    for k in range(len(plan.lanes)):
        for name, value in values.items():
            if found[name].ndim and not found[name][k] <= 2.0 * ROUNDING:
                yield PoolLimit(k, name, float(np.asarray(value)[k]), _asked(slo, name))


def _broken_by_all(plan: Plan) -> Iterator[PoolLimit]:
    metrics, slo = plan.metrics, plan.problem.slo
    if not float(metrics.unserved_frac) <= ROUNDING:
        yield PoolLimit(None, "unserved_frac", float(metrics.unserved_frac), 0.0)
    values = {"ttft_p99_s": metrics.ttft_p99_of_all_s, "itl_s": metrics.itl_s}
    for name, excess in compiled_excesses(metrics.pools, slo).items():
        if np.ndim(excess) == 0 and not float(excess) <= 2.0 * ROUNDING:
            yield PoolLimit(None, name, float(values[name]), _asked(slo, name))
    for name, cap in plan.problem.budget.caps.items():
        if not plan.used[name] <= cap * (1.0 + 2.0 * ROUNDING):
            yield PoolLimit(None, name, plan.used[name], cap)


def _asked(slo: Slo, limit: str) -> float:
    return float(getattr(slo, "max_utilization" if limit == "utilization" else limit))


def repair(plan: Plan) -> Repair:
    """The fewest instances to add to each pool of a plan that breaks its limits, so that it holds them all.

    Pools that hold theirs keep what they have; only where the fleet then breaks its budget, and without its spare
    instances would not, they give those back. A fleet that needs more than the budget allows is returned with what it
    breaks. Where no number of instances holds a limit, says which, and the nearest that is reached.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=40.0)
    >>> problem = fo.make_problem(chat, [fo.EngineSpec("h100", serving="vllm-0.11")], n_pools=1)
    >>> few = fo.evaluate_given(problem, problem.specs, window_tokens=[4400], gamma=[1.0], n_instances=[1])
    >>> mended = fo.repair(few)
    >>> few.status, mended.after.status, int(mended.instances_added[0]) > 0
    ('infeasible', 'feasible', True)
    """
    if plan.binding is None:
        return Repair(plan, plan)
    if plan.binding.limit == "unserved_frac":
        return Repair(plan, None, broken_limits(plan))
    problem, present = plan.problem, _instances(plan)
    sized = _sized(plan.fleet, problem.workload, problem.slo, problem.assumptions)
    least = np.asarray(sized.n_instances)
    if not np.isfinite(least).all():
        return Repair(plan, None, _out_of_reach(plan, least))
    tried = []
    for n in (_grown(plan, np.maximum(present, least)), least):
        if not n.any():
            continue
        after = plan if np.array_equal(n, present) else _with_instances(plan, n)
        if after.binding is None:
            return Repair(plan, after)
        tried.append(after)
    more = [after for after in tried if (_instances(after) > present).any()]
    if not more:  # it holds its latencies, and cannot be so small as its budget
        return Repair(plan, None, tuple(_broken_by_all(tried[-1])))
    return Repair(plan, more[0])


def _instances(plan: Plan) -> np.ndarray:
    return np.rint(np.asarray(plan.fleet.n_instances))


def _with_instances(plan: Plan, n_instances: np.ndarray) -> Plan:
    return with_fleet(plan, plan.fleet.with_instances(n_instances))


def _grown(plan: Plan, most: np.ndarray) -> np.ndarray:
    """Instances [K] between the plan's and `most`, which hold the limits. Where each pool holds its own there are no
    fewer; where all requests together do, pools give back what they need not have been given, in both orders."""
    present, problem = _instances(plan), plan.problem
    if problem.slo.scope == "pool":
        return most
    traffic = routed(plan.fleet, problem.workload, problem.assumptions)

    def holds(n: np.ndarray) -> bool:
        fleet = plan.fleet.with_instances(n)
        return bool(_held(fleet, traffic, problem.workload, problem.slo, problem.assumptions))

    options = []
    for order in (range(len(most)), range(len(most))[::-1]):
        n = most.copy()
        for k in order:
            low = present[k]
            while low < n[k]:
                middle = np.floor((low + n[k]) / 2.0)
                fewer = np.where(np.arange(len(n)) == k, middle, n)
                low, n = (low, fewer) if holds(fewer) else (middle + 1.0, n)
        options.append(n)
    gpus = [engine.gpus_per_instance for engine in plan.fleet.engines]
    return min(options, key=lambda n: float(np.dot(n, np.asarray(gpus, dtype=float))))


def _out_of_reach(plan: Plan, least: np.ndarray) -> tuple[PoolLimit, ...]:
    """The limits that no number of instances holds, with what they come to at the most that are worth having."""
    slo, load = plan.problem.slo, np.asarray(plan.metrics.pools.utilization)
    fits = np.isfinite(load)
    if not fits.all():
        return tuple(PoolLimit(int(k), "window_tokens", 0.0, _window(plan, int(k))) for k in np.flatnonzero(~fits))
    needed = np.maximum(np.ceil(_instances(plan) * load / float(slo.max_utilization)), 1.0)
    largest = _with_instances(plan, np.asarray(most_instances(needed)))
    found = []
    for each in broken_limits(largest):
        if each.pool is not None and np.isfinite(least[each.pool]):
            continue
        if each.limit in largest.problem.budget.caps:
            continue
        at = each.pool if each.limit == "ttft_p99_s" else None
        value = float(_reached(_alone(largest, at), slo)[0]) if each.limit == "ttft_p99_s" else each.value
        found.append(replace(each, value=value))
    return tuple(found) or broken_limits(plan)


def _window(plan: Plan, k: int) -> float:
    return float(np.asarray(plan.fleet.window_tokens)[k])


def _alone(plan: Plan, k: int | None):
    """The metrics with the k-th pool alone, or all."""
    if k is None:
        return plan.metrics
    return replace(plan.metrics, pools=jax.tree.map(lambda x: np.asarray(x)[[k]], plan.metrics.pools))


def _holds(fleet: Fleet, traffic: PoolTraffic, workload: Workload, slo: Slo, assumptions: Assumptions):
    return held(fleet_metrics(fleet, traffic, workload, assumptions, quantiles=False).pools, slo)


_sized = program(size_fleet, static_argnames="assumptions")
_held = program(_holds, static_argnames="assumptions")
_reached = program(reached)
