"""Layouts that compete to be verified: the laws' best of every pool count, then what trials say may be better.

Pools over a few dozen boundaries are priced by the laws once. What a simulation needed of some of them, over what the
laws thought, is believed of pools alike (the mean of logarithms, weighed by the inverse square of the distance between
the logarithms of their ends: Shepard 1968), and the cheapest path by pools so corrected is the next to try.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fleetopt_jax._optimize.candidates import spread
from fleetopt_jax._optimize.exact import evenly
from fleetopt_jax._optimize.graph import Boundaries
from fleetopt_jax._optimize.holding import Pool, as_they_stand, pools_of
from fleetopt_jax._optimize.plan import OnePoolFleet, Plan, among, held_in_simulation, one_pool_of, without_proof
from fleetopt_jax._optimize.problem import Problem, thresholds
from fleetopt_jax._optimize.search import evaluate_given
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.limits import ROUNDING
from fleetopt_jax.fleet.resources import Weights, pool_prices

N_BOUNDARIES = 40
WORTH = 0.003  # of the cost: a layout that does not promise to save it is not tried
N_PATHS = 16  # that are kept at every node
CLOSE = 0.05  # of ends, in their logarithm: pools are not told apart by less

Edge = tuple[int, int, int]  # engine, and the boundaries from which and to which a pool goes


class Stands(Protocol):
    """How far a layout has come in simulation: instances [K]."""

    @property
    def rival(self) -> Any: ...
    @property
    def bound(self) -> tuple[int, ...]: ...
    @property
    def passed(self) -> tuple[int, ...] | None: ...


@dataclass
class _Priced:
    """A pool, and what it costs with numbers of instances."""

    pool: Pool
    problem: Problem
    known: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def costs(self, n: int) -> tuple[float, ...]:
        """By what the problem is searched for, and by every limit of its budget."""
        if n not in self.known:
            pool, problem = self.pool, self.problem
            power_w = np.asarray(pool.judged(float(n), as_they_stand(pool.spec)).power_w)[0] if n else 0.0
            self.known[n] = tuple(self._cost(weights, n, power_w) for weights in _weights(problem))
        return self.known[n]

    def _cost(self, weights: Weights, n: int, power_w: float) -> float:
        prices = pool_prices(weights, [self.pool.spec.gpu_name], [self.pool.engine], self.problem.around.site)
        return float(prices.cost(0, np.array([float(n)]), np.array([power_w]))[0])


def _weights(problem: Problem) -> list[Weights]:
    return [problem.search_weights, *problem.limit_weights.values()]


@dataclass(frozen=True)
class Contender:
    """A layout of a problem: a fleet with the instances to try first, and the fewest each pool may have."""

    specs: tuple[EngineSpec, ...]
    fleet: Fleet
    least: tuple[int, ...]
    priced: tuple[_Priced, ...]
    caps: tuple[float, ...] = ()
    edges: tuple[Edge, ...] = ()

    def cost(self, n_instances: Sequence[int]) -> float:
        """Of so many instances [K], by what the problem is searched for; inf where they exceed its budget."""
        each = [pool.costs(int(n)) for pool, n in zip(self.priced, n_instances, strict=True)]
        cost, *used = (math.fsum(column) for column in zip(*each, strict=True))
        within = all(of <= cap * (1.0 + ROUNDING) for of, cap in zip(used, self.caps, strict=True))
        return cost if within else math.inf


def contender(
    problem: Problem, specs: tuple[EngineSpec, ...], fleet: Fleet, *, floor: Sequence[int] | None = None
) -> Contender:
    """The layout of a fleet, whose instances are the first to try. The fewest are those that keep the load within its
    limit, which simulations do not judge, or a `floor` [K]."""
    pools = pools_of(fleet, specs, problem)
    loaded = [replace(pool, slo=problem.slo).judged(0.0, as_they_stand(pool.spec)) for pool in pools]
    needed = [float(np.asarray(each.n_instances)[0]) for each in loaded]
    least = [n if math.isfinite(n) else 1.0 for n in needed]
    return Contender(
        specs=specs,
        fleet=fleet,
        least=tuple(int(max(1, n, f)) for n, f in zip(least, floor or [0] * len(least), strict=True)),
        priced=tuple(_Priced(pool, problem) for pool in pools),
        caps=tuple(problem.budget.caps.values()),
    )


class Alone:
    """A plan's own layout, and no other."""

    def __init__(self, plan: Plan, *, floor: Sequence[int] | None = None):
        self._first = contender(plan.problem, plan.specs, plan.fleet, floor=floor)

    def __call__(self, standings: Sequence[Stands]) -> Contender | None:
        return None if standings else self._first


class Rivals:
    """A plan's layout, the laws' best of every pool count, and then what promises to be better by all that is known."""

    def __init__(self, plan: Plan):
        self.plan, self.problem = plan, plan.problem
        windows, gammas = _nodes(plan)
        self._boundaries = Boundaries(self.problem, windows, gammas)
        last = self._boundaries.last
        self._lower, self._upper = (each.ravel() for each in np.triu_indices(last + 1, 1))
        self._prices = self.problem.prices(self.problem.search_weights)
        self._by_laws = [self._needed(e) for e in range(len(self.problem.specs))]
        self._least = [self._boundaries.least(e, self._lower, self._upper)[0] for e in range(len(self.problem.specs))]
        ends = np.concatenate([[0.5 * self._boundaries.window_tokens[1:].min()], self._boundaries.window_tokens[1:]])
        self._ends = np.log(ends)
        self._waiting = [self._own(), *self._of_laws()]

    def _needed(self, e: int) -> tuple[np.ndarray, np.ndarray]:
        """(instances, watts) of all pools with engine e, by the laws; a pool without traffic is none."""
        instances, watts = self._boundaries.exact(e, self._lower, self._upper)
        return np.where(instances > 0, instances, np.inf), np.where(instances > 0, watts, np.inf)

    def __call__(self, standings: Sequence[Stands]) -> Contender | None:
        """The next layout to try; None where no other promises to save anything."""
        while self._waiting:
            edges = self._waiting.pop(0)
            if edges not in self._tried(standings):
                counts = [self._table(self._by_laws[e][0], i, j) for e, i, j in edges]
                return self._contender(edges, counts, own=not standings)
        known = [each.rival.cost(each.passed) for each in standings if each.passed]
        best = min(known, default=math.inf)
        instances, costs = self._corrected(standings)
        tried = self._tried(standings)
        for cost, edges in self._paths(costs):
            if cost >= best * (1.0 - WORTH):
                return None
            if edges not in tried:
                return self._contender(edges, [self._table(instances[e], i, j) for e, i, j in edges])
        return None

    def _tried(self, standings: Sequence[Stands]) -> set[tuple[Edge, ...]]:
        return {each.rival.edges for each in standings}

    def _contender(self, edges: tuple[Edge, ...], counts: Sequence[float], *, own: bool = False) -> Contender:
        plan, bounds = self.plan, self._boundaries
        if own:
            return replace(contender(self.problem, plan.specs, plan.fleet), edges=edges)
        specs = tuple(self.problem.specs[e] for e, _, _ in edges)
        upper = [j for _, _, j in edges]
        fleet = self.problem.fleet(specs, bounds.window_tokens[upper], bounds.gamma[upper], np.asarray(counts))
        return replace(contender(self.problem, specs, fleet), edges=edges)

    def _own(self) -> tuple[Edge, ...]:
        """The plan's pools."""
        bounds, plan = self._boundaries, self.plan
        ends = [0]
        for window, gamma in zip(np.asarray(plan.fleet.window_tokens), np.asarray(plan.fleet.gamma), strict=True):
            off = np.abs(bounds.window_tokens - window) + np.where(bounds.gamma == gamma, 0.0, 0.5)
            ends.append(int(np.argmin(off[1:])) + 1)
        engines = [self.problem.specs.index(spec) for spec in plan.specs]
        return tuple((e, i, j) for e, i, j in zip(engines, ends[:-1], ends[1:], strict=True))

    def _of_laws(self) -> list[tuple[Edge, ...]]:
        """Their best of every number of pools, the best first."""
        costs = [self._prices.cost(e, n, watts) for e, (n, watts) in enumerate(self._by_laws)]
        best: dict[int, tuple[Edge, ...]] = {}
        for _, edges in self._paths(costs):
            best.setdefault(len(edges), edges)
        return list(best.values())

    def _corrected(self, standings: Sequence[Stands]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(instances, costs) of all pools with each engine, as trials of some let expect."""
        instances, costs = [], []
        for e, (by_laws, _) in enumerate(self._by_laws):
            seen = [
                (i, j, math.log((each.passed or each.bound)[k] / self._table(by_laws, i, j)))
                for each in standings
                for k, (engine, i, j) in enumerate(each.rival.edges)
                if engine == e and 0 < self._table(by_laws, i, j) < math.inf
            ]
            factor = self._factors(seen) if seen else np.ones(len(by_laws))
            n = np.maximum(np.ceil(by_laws * factor - 1e-9), self._least[e])
            n = np.where(np.isfinite(by_laws), n, np.inf)
            instances.append(n)
            costs.append(self._prices.cost(e, n, self._boundaries.watts(e, self._lower, self._upper, n)))
        return instances, costs

    def _factors(self, seen: Sequence[tuple[int, int, float]]) -> np.ndarray:
        """By how much the instances of every pool are more than the laws think."""
        x, y = self._ends[self._lower], self._ends[self._upper]
        weights = [1.0 / (abs(x - self._ends[i]) + abs(y - self._ends[j]) + CLOSE) ** 2 for i, j, _ in seen]
        return np.exp(sum(w * each[2] for w, each in zip(weights, seen, strict=True)) / sum(weights))

    def _table(self, values: np.ndarray, i: int, j: int) -> float:
        last = self._boundaries.last
        return float(values[i * (last + 1) - i * (i + 1) // 2 + (j - i - 1)])

    def _paths(self, costs: Sequence[np.ndarray]) -> list[tuple[float, tuple[Edge, ...]]]:
        """The cheapest paths of at most K pools, cheapest first; with some of every number of pools among them."""
        last = self._boundaries.last
        table = np.min(costs, axis=0)
        engine = np.argmin(costs, axis=0)
        square, which = np.full((last + 1, last + 1), np.inf), np.zeros((last + 1, last + 1), int)
        square[self._lower, self._upper], which[self._lower, self._upper] = table, engine
        at: list[list[tuple[float, tuple[Edge, ...]]]] = [[] for _ in range(last + 1)]
        at[0], found = [(0.0, ())], []
        for _ in range(self.problem.n_pools):
            nearer: list[list[tuple[float, tuple[Edge, ...]]]] = [[] for _ in range(last + 1)]
            for i in range(last):
                for j in np.flatnonzero(np.isfinite(square[i])) if at[i] else ():
                    edge = int(which[i, j]), i, int(j)
                    nearer[j] += [(cost + float(square[i, j]), (*edges, edge)) for cost, edges in at[i]]
            at = [heapq.nsmallest(N_PATHS, paths) for paths in nearer]
            found += at[last]
        return sorted(found)


def simulated_plan(
    plan: Plan, specs: Sequence[EngineSpec], fleet: Fleet, standings: Sequence[Stands], *, held: bool
) -> Plan:
    """The plan of a fleet that a simulation chose instead of a plan's own, compared with the best one-pool fleet that
    the simulation knows of. Where it held, what the laws say of its latencies does not count any more."""
    names = "window_tokens", "gamma", "n_instances"
    numbers = {name: np.asarray(getattr(fleet, name)).tolist() for name in names}
    own = {name: np.asarray(getattr(plan.fleet, name)).tolist() for name in names}
    given = plan
    if numbers != own or tuple(specs) != plan.specs:
        given = evaluate_given(plan.problem, specs, **numbers)
        given = held_in_simulation(given) if held else given
        alike = all(numbers[name] == own[name] for name in names[:2])
        search = without_proof(plan.search) if alike else among(plan.search, "those that were simulated")
        given = replace(given, method=plan.method, search=search)
    one_pool = _one_pool(plan.problem, standings)
    if one_pool is None:
        return given
    gain = float(given.metrics.tok_per_j) / one_pool.tok_per_j
    return replace(given, one_pool=one_pool, gain_vs_homogeneous=gain)


def _one_pool(problem: Problem, standings: Sequence[Stands]) -> OnePoolFleet | None:
    """The best fleet of one pool that holds in simulation, or could by what is known."""
    alone = [(each.rival, each.passed or each.bound) for each in standings if len(each.rival.specs) == 1]
    if not alone:
        return None
    rival, n = min(alone, key=lambda each: each[0].cost(each[1]))
    numbers = {name: np.asarray(getattr(rival.fleet, name)).tolist() for name in ("window_tokens", "gamma")}
    return one_pool_of(evaluate_given(problem, rival.specs, n_instances=list(n), **numbers))


def _nodes(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(windows, gammas) of boundaries below the promised window: a few dozen over all lengths, some around the plan's
    own, and those."""
    problem = plan.problem
    options = thresholds(problem)
    options = options[options < problem.window_tokens]
    own = np.asarray(plan.fleet.window_tokens)[:-1]
    gamma = problem.gamma or float(np.asarray(plan.fleet.gamma)[0])
    if not len(options) or problem.n_pools == 1:
        return np.zeros(0), np.zeros(0)
    some = options[evenly(problem.workload, options, N_BOUNDARIES)]
    some = some[spread(len(some), N_BOUNDARIES)]
    nearby = np.concatenate([own * (1 + off) for off in (-0.06, -0.03, 0.03, 0.06)]) if len(own) else own
    nearby = np.floor(nearby[(nearby >= 1) & (nearby < options[-1])])
    windows = np.setdiff1d(np.unique(np.concatenate([some, nearby])), own)
    gammas = np.append(np.full(len(windows), gamma), np.asarray(plan.fleet.gamma)[:-1])
    windows = np.append(windows, own)
    order = np.argsort(windows, kind="stable")
    return windows[order], gammas[order]
