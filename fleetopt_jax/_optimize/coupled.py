"""Exact search under a budget, which couples the pools: GPUs, power and price of all of them, GPUs of a kind.

Priced, a limit is part of the cost: for prices mu >= 0 of Q limits the cheapest path under c + mu r costs, less mu
caps, no more than the best fleet within the budget. The best such bound is found by bisection (one limit) or by
subgradients (several). Then every fleet that could lie between the bound and the best one known is listed: its priced
cost is below c_best + mu caps, and what it uses is within the caps, which few paths are. Where the list is complete,
the best fleet on it is the optimum, or the absence of any a proof that there is none.

More instances than the least that hold the latencies never help: they cost more of everything.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fleetopt_jax._optimize.exact import Cheapest, Fleets, Settled, as_found
from fleetopt_jax._optimize.layouts import Layout, Path, Table
from fleetopt_jax._optimize.plan import Found, nothing
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.limits import ROUNDING
from fleetopt_jax.fleet.resources import PoolPrices

DUAL_STEPS = 60
MAX_POOLS = 3_000_000  # of three pools and more: each step searches the table again
TIED = 1e-4  # of a cost: what breaks ties is less
MAX_WAYS = 128  # to serve a pool, each listed with each of the next
MAX_EXACT = 100_000  # pools whose exact cost is computed for a list


class _Priced(NamedTuple):
    """A fleet, its cost and what it uses of every limit [Q]."""

    answer: Cheapest
    cost: float
    used: np.ndarray


@dataclass(frozen=True)
class _Prices:
    """The objective and the limits, each as prices of an engine's instances and watts."""

    objective: PoolPrices
    limits: tuple[PoolPrices, ...]
    caps: np.ndarray  # [Q]

    def at(self, mu: np.ndarray) -> PoolPrices:
        """The objective and the limits at prices mu [Q]."""
        total = self.objective
        for price, limit in zip(mu, self.limits):
            total = total.plus(price, limit)
        return total


def search(problem: Problem, progress: Progress | None = None) -> Found:
    """The cheapest fleet within the budget, certified where every rival could be listed."""
    if (n := len(problem.offers.ways)) > MAX_WAYS:
        allowed = f"need at most {MAX_WAYS} under a budget: name fewer engines, or --serve mixed"
        raise BadInput("a budget", f"{n} ways to serve a pool", allowed)
    return within_budget(Fleets(with_stock(problem), progress, MAX_POOLS))


def within_budget(fleets: Fleets) -> Found:
    """The cheapest of these fleets within the budget, certified where they are and every rival could be listed."""
    prices = _prices(fleets.problem)
    dual = _Dual(fleets, prices)
    dual.solve()
    best, complete = dual.best, dual.proves_infeasible
    if best is None and not complete:
        # Of any fleet within the budget, the limits' shares, weighted to sum to 1, sum to no more than 1.
        best, complete = _best_of_list(fleets, prices, dual.share / prices.caps, 0.0)
    if best is None:
        return nothing(fleets.boundaries.n_evaluated, fleets.description(), certified=complete and fleets.certified)
    if not complete and dual.bound < best.cost * (1.0 - ROUNDING):
        better, complete = _best_of_list(fleets, prices, dual.mu, 1.0, best)
        best = better or best
    else:
        complete = True
    found = as_found(fleets, best.answer, [])  # its cost is the objective's alone, that of `best` breaks ties as well
    bound = found.cost if complete else min(dual.bound * (1.0 - TIED), found.cost)
    certified = fleets.certified and complete
    return replace(found, certified=certified, lower_bound=bound if fleets.certified else None)


def dual_bound(problem: Problem) -> float:
    """A lower bound of the cost of every fleet within the budget over the candidates; inf where there is none."""
    return dual_bound_of(Fleets(with_stock(problem), None, MAX_POOLS))


def dual_bound_of(fleets: Fleets) -> float:
    """A lower bound of the cost of every one of these fleets that keeps the budget; inf where there is none."""
    dual = _Dual(fleets, _prices(fleets.problem, ties=False))
    dual.solve()
    return math.inf if dual.proves_infeasible else dual.bound


def with_stock(problem: Problem) -> Problem:
    """Without the engines whose GPUs are out of stock, unless nothing would be left."""
    gone = {gpu for gpu, count in problem.budget.gpus_of if count < 1}
    return problem.keeping(lambda spec: spec.gpu_name not in gone) or problem


def frugal_prices(problem: Problem) -> list[PoolPrices]:
    """What a fleet uses of the limits as costs: of all, each as a share of its cap, and of each by itself."""
    prices = _prices(problem)
    none = prices.objective.plus(-1.0, prices.objective)
    shares = [none.plus(1.0 / max(cap, 1e-9), limit) for cap, limit in zip(prices.caps, prices.limits)]
    total = none
    for share in shares:
        total = total.plus(1.0, share)
    return [total, *(shares if len(shares) > 1 else [])]


def _prices(problem: Problem, *, ties: bool = True) -> _Prices:
    """With what breaks ties of the objective, or for a bound of it without."""
    objective = problem.search_weights if ties else problem.objective_weights
    limits = tuple(problem.prices(weights) for weights in problem.limit_weights.values())
    return _Prices(problem.prices(objective), limits, np.array([*problem.budget.caps.values()]))


class _NoFleet(Exception):
    """No fleet holds the latencies."""


class _Dual:
    """The best prices of the limits, and the best fleet within the budget met on the way."""

    def __init__(self, fleets: Fleets, prices: _Prices):
        self.fleets, self.prices = fleets, prices
        self.best: _Priced | None = None
        self.bound, self.mu = -math.inf, np.zeros(len(prices.caps))
        self.none = prices.objective.plus(-1.0, prices.objective)  # no objective, only limits
        self.share = np.ones(1)  # weights of the limits under which no fleet is least over them, sum to 1 [Q]
        self.proves_infeasible = False

    def solve(self) -> None:
        try:
            free = self._cheapest(self.mu)
        except _NoFleet:
            self.proves_infeasible = True  # none holds the latencies, whatever it uses
            return
        if self.best is None:
            (self._bisect if len(self.mu) == 1 else self._ascend)(free)

    def _cheapest(self, mu: np.ndarray, prices: PoolPrices | None = None) -> _Priced:
        """The cheapest fleet at prices mu; or under other prices, which bound nothing."""
        answer = self.fleets.cheapest_of_all(prices or self.prices.at(mu))
        if not answer.settled.path.steps:
            raise _NoFleet
        priced = _priced(answer, self.prices)
        if np.all(priced.used <= self.prices.caps * (1.0 + ROUNDING)) and (
            self.best is None or priced.cost < self.best.cost
        ):
            self.best = priced
        if prices is None:
            bound = answer.cost - float(mu @ self.prices.caps)
            if bound > self.bound:
                self.bound, self.mu = bound, mu
        return priced

    def _bisect(self, over: _Priced) -> None:
        """One limit: the bound is concave in its price; where the lines of two fleets meet a third may lie below."""
        (cap,) = self.prices.caps
        under = self._cheapest(self.mu, self.prices.limits[0])
        if under.used[0] > cap * (1.0 + ROUNDING):
            self.proves_infeasible = True
            return
        for _ in range(DUAL_STEPS):
            mu = np.array([(under.cost - over.cost) / (over.used[0] - under.used[0])])
            met = self._cheapest(mu)
            priced = met.cost + mu[0] * met.used[0]
            if priced >= (under.cost + mu[0] * under.used[0]) * (1.0 - 1e-12):
                return
            over, under = (met, under) if met.used[0] > cap else (over, met)

    def _ascend(self, free: _Priced) -> None:
        """Several limits: subgradient steps of Polyak's length towards the best fleet known."""
        caps = self.prices.caps
        self._seek(free)
        if self.proves_infeasible:
            return
        mu, met = self.mu, free
        for step in range(DUAL_STEPS):
            goal = self.best.cost if self.best else free.cost * 1.5
            over = (met.used - caps) / caps
            value = met.cost + float(mu @ (met.used - caps))
            if not over @ over > 1e-18 or goal - value < 1e-9 * goal:
                return
            length = (1.0 if step < DUAL_STEPS // 2 else 0.5) * (goal - value) / (over @ over)
            mu = np.maximum(0.0, mu + length * over / caps)
            met = self._cheapest(mu)

    def _seek(self, free: _Priced) -> None:
        """Some fleet within the budget: the limits it exceeds gain weight."""
        caps = self.prices.caps
        share = np.maximum(free.used / caps, 1e-3)
        least = -math.inf
        for _ in range(DUAL_STEPS // 2):
            share = share / share.sum()
            met = self._cheapest(self.mu, replace(self.prices, objective=self.none).at(share / caps))
            taken = float(share @ (met.used / caps))  # of any fleet's shares, the least weighted sum
            if taken > least:
                least, self.share = taken, share
            if taken > 1.0 + ROUNDING:
                self.proves_infeasible = True
            if taken > 1.0 + ROUNDING or self.best is not None:
                return
            share = share * np.exp(2.0 * (met.used / caps - 1.0))


def _priced(answer: Cheapest, by: _Prices) -> _Priced:
    pools, steps = answer.layout.pools, answer.settled.path.steps
    served = [(e, step.pool) for step in steps for e in step.way]
    n = np.array([pools.instances[at] for at in served], float)
    watts = np.array([pools.watts[at] for at in served])
    engines = [e for e, _ in served]

    def total(prices: PoolPrices) -> float:
        return float(np.sum(prices.per_instance[engines] * n + prices.per_watt[engines] * watts))

    return _Priced(answer, total(by.objective), np.array([total(limit) for limit in by.limits]))


def _best_of_list(
    fleets: Fleets, prices: _Prices, mu: np.ndarray, objective: float, best: _Priced | None = None
) -> tuple[_Priced | None, bool]:
    """The best fleet within the budget of all whose cost priced at mu is low enough for one, and whether none was left
    out. With a factor of 0 for the objective all that are within the budget are, with 1 those that cost less than
    `best`."""
    complete = True
    none = prices.objective.plus(objective - 1.0, prices.objective)
    priced = replace(prices, objective=none).at(mu)
    for layout in fleets.layouts:
        ceiling = float(mu @ prices.caps) + (objective * best.cost if best else 0.0)
        ceiling *= 1.0 + (-ROUNDING if objective else ROUNDING)
        k = layout.most_pools or fleets.problem.n_pools
        complete &= make_exact_below(layout, priced, k, ceiling)
        tables = [exact_costs(layout, each) for each in (priced, prices.objective, *prices.limits)]
        most = np.concatenate([[ceiling, best.cost if best else np.inf], prices.caps * (1.0 + ROUNDING)])
        steps, all_listed = layout.listed(tables, most, k)
        complete &= all_listed
        if steps:
            best = _priced(Cheapest(layout, Settled(Path(0.0, steps), 0.0)), prices)
    return best, complete


def make_exact_below(layout: Layout, prices: PoolPrices, k: int, ceiling: float) -> bool:
    """Make exact every pool through which a path could cost less than the ceiling, or the likeliest; whether all."""
    pools = layout.pools
    while True:
        costs = [pools.costs(prices, e) for e in range(pools.n_engines)]
        offers, cheapest = pools.offers, pools.offers.cheapest(costs)
        found = [
            layout.undecided(cheapest, offers.of_lane(e, np.where(pools.is_exact[e], np.inf, cost), costs), k, ceiling)
            for e, cost in enumerate(costs)
        ]
        total = sum(len(index) for index, _ in found)
        for e, (index, through) in enumerate(found):
            if total > MAX_EXACT:
                first = np.argsort(through)[: MAX_EXACT // pools.n_engines]
                index, through = index[first], through[first]
            layout.pursue(e, index, prices, ceiling - through)
        if total == 0 or total > MAX_EXACT:
            return total == 0


def exact_costs(layout: Layout, prices: PoolPrices) -> Table:
    """The exact costs; inf where only a bound is known."""
    pools = layout.pools
    each = [np.where(pools.is_exact[e], pools.costs(prices, e), np.inf) for e in range(pools.n_engines)]
    return [each[way[0]] if len(way) == 1 else each[way[0]] + each[way[1]] for way in pools.offers.ways]
