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

from fleetopt_jax.fleet.limits import ROUNDING
from fleetopt_jax.optimize.exact import Answer, Fleets, Layout, Path, Settled, Star, Step, Web, as_found
from fleetopt_jax.optimize.graph import Progress, Weights, objective_weights, usd_weights
from fleetopt_jax.optimize.plan import Found, Problem, nothing

DUAL_STEPS = 60
MAX_POOLS = 3_000_000  # of three pools and more: each step searches the table again
MAX_EXACT = 100_000  # pools whose exact cost is computed for a list
MAX_LISTED = 300_000  # fleets, finished or not, on it; beyond it the cheapest so many


class _Priced(NamedTuple):
    """A fleet, its cost and what it uses of every limit [Q]."""

    answer: Answer
    cost: float
    used: np.ndarray


@dataclass(frozen=True)
class _Prices:
    """The objective and the limits, each as prices of an engine's instances and watts."""

    objective: Weights
    limits: tuple[Weights, ...]
    caps: np.ndarray  # [Q]

    def at(self, mu: np.ndarray) -> Weights:
        """The objective and the limits at prices mu [Q]."""
        weights = self.objective
        for price, limit in zip(mu, self.limits):
            weights = weights.plus(price, limit)
        return weights


def search(problem: Problem, progress: Progress | None = None) -> Found:
    """The cheapest fleet within the budget, certified where every rival could be listed."""
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
        return nothing(fleets.boundaries.n_evaluated, fleets.said(), certified=complete and fleets.certified)
    if not complete and dual.bound < best.cost * (1.0 - ROUNDING):
        best, complete = _best_of_list(fleets, prices, dual.mu, 1.0, best)
    else:
        complete = True
    bound = best.cost if complete else dual.bound
    certified = fleets.certified and complete
    found = as_found(fleets, best.answer, [])
    return replace(found, cost=best.cost, certified=certified, lower_bound=bound if fleets.certified else None)


def dual_bound(problem: Problem) -> float:
    """A lower bound of the cost of every fleet within the budget over the candidates; inf where there is none."""
    return dual_bound_of(Fleets(with_stock(problem), None, MAX_POOLS))


def dual_bound_of(fleets: Fleets) -> float:
    """A lower bound of the cost of every one of these fleets that keeps the budget; inf where there is none."""
    dual = _Dual(fleets, _prices(fleets.problem))
    dual.solve()
    return math.inf if dual.proves_infeasible else dual.bound


def with_stock(problem: Problem) -> Problem:
    """Without the engines whose GPUs are out of stock, unless nothing would be left."""
    gone = {gpu for gpu, count in problem.budget.gpus_of if count < 1}
    kept = tuple(choice for choice in problem.choices if choice.gpu not in gone)
    return replace(problem, choices=kept or problem.choices)


def frugal_weights(problem: Problem) -> list[Weights]:
    """What a fleet uses of the limits as costs: of all, each as a share of its cap, and of each by itself."""
    prices = _prices(problem)
    none = prices.objective.plus(-1.0, prices.objective)
    shares = [none.plus(1.0 / max(cap, 1e-9), limit) for cap, limit in zip(prices.caps, prices.limits)]
    total = none
    for share in shares:
        total = total.plus(1.0, share)
    return [total, *(shares if len(shares) > 1 else [])]


def _prices(problem: Problem) -> _Prices:
    choices = problem.choices
    gpus = np.array([float(choice.engine.gpus_per_instance) for choice in choices])
    zero, one = np.zeros(len(choices)), np.ones(len(choices))
    known = {"max_gpus": Weights(gpus, zero), "max_power_w": Weights(zero, one), "max_usd_per_h": usd_weights(problem)}
    for gpu, _ in problem.budget.gpus_of:
        known[f"gpus_of.{gpu}"] = Weights(gpus * [choice.gpu == gpu for choice in choices], zero)
    caps = problem.budget.caps
    return _Prices(objective_weights(problem), tuple(known[name] for name in caps), np.array([*caps.values()]))


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
        free = self._ask(self.mu)
        if free is None:
            self.proves_infeasible = True  # no fleet holds the latencies, whatever it uses
        elif self.best is None:
            (self._bisect if len(self.mu) == 1 else self._ascend)(free)

    def _ask(self, mu: np.ndarray, weights: Weights | None = None) -> _Priced | None:
        """The cheapest fleet at prices mu; or under other weights, which bound nothing."""
        answer = self.fleets.cheapest_of_all(weights or self.prices.at(mu))
        if not answer.settled.path.steps:
            return None
        priced = _priced(answer, self.prices)
        if np.all(priced.used <= self.prices.caps * (1.0 + ROUNDING)) and (
            self.best is None or priced.cost < self.best.cost
        ):
            self.best = priced
        if weights is None:
            bound = answer.cost - float(mu @ self.prices.caps)
            if bound > self.bound:
                self.bound, self.mu = bound, mu
        return priced

    def _bisect(self, over: _Priced) -> None:
        """One limit: the bound is concave in its price; where the lines of two fleets meet a third may lie below."""
        (cap,) = self.prices.caps
        under = self._ask(self.mu, self.prices.limits[0])
        if under.used[0] > cap * (1.0 + ROUNDING):
            self.proves_infeasible = True
            return
        for _ in range(DUAL_STEPS):
            mu = np.array([(under.cost - over.cost) / (over.used[0] - under.used[0])])
            met = self._ask(mu)
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
            met = self._ask(mu)

    def _seek(self, free: _Priced) -> None:
        """Some fleet within the budget: the limits it exceeds gain weight."""
        caps = self.prices.caps
        share = np.maximum(free.used / caps, 1e-3)
        least = -math.inf
        for _ in range(DUAL_STEPS // 2):
            share = share / share.sum()
            met = self._ask(self.mu, replace(self.prices, objective=self.none).at(share / caps))
            taken = float(share @ (met.used / caps))  # of any fleet's shares, the least weighted sum
            if taken > least:
                least, self.share = taken, share
            if taken > 1.0 + ROUNDING:
                self.proves_infeasible = True
            if taken > 1.0 + ROUNDING or self.best is not None:
                return
            share = share * np.exp(2.0 * (met.used / caps - 1.0))


def _priced(answer: Answer, prices: _Prices) -> _Priced:
    pools, steps = answer.layout.pools, answer.settled.path.steps
    n = np.array([pools.instances[step.engine, step.pool] for step in steps], float)
    watts = np.array([pools.watts[step.engine, step.pool] for step in steps])
    engines = [step.engine for step in steps]

    def total(weights: Weights) -> float:
        return float(np.sum(weights.per_instance[engines] * n + weights.per_watt[engines] * watts))

    return _Priced(answer, total(prices.objective), np.array([total(limit) for limit in prices.limits]))


def _best_of_list(
    fleets: Fleets, prices: _Prices, mu: np.ndarray, objective: float, best: _Priced | None = None
) -> tuple[_Priced | None, bool]:
    """The best fleet within the budget of all whose cost priced at mu is low enough for one, and whether none was left
    out. With a factor of 0 for the objective all that are within the budget are, with 1 those that cost less than
    `best`."""
    complete = True
    none = prices.objective.plus(objective - 1.0, prices.objective)
    weights = replace(prices, objective=none).at(mu)
    for layout in fleets.layouts:
        ceiling = float(mu @ prices.caps) + (objective * best.cost if objective else 0.0)
        ceiling *= 1.0 + (-ROUNDING if objective else ROUNDING)
        k = fleets.problem.n_pools if isinstance(layout, Web) else 2
        complete &= _make_exact_below(layout, weights, k, ceiling)
        tables = [_exact_costs(layout, each) for each in (weights, prices.objective, *prices.limits)]
        most = np.concatenate([[ceiling, best.cost if best else np.inf], prices.caps * (1.0 + ROUNDING)])
        if isinstance(layout, Web):
            steps, all_listed = _listed_in_web(layout, tables, most, k)
            complete &= all_listed
        else:
            steps = _listed_in_star(layout, tables, most) if isinstance(layout, Star) else _listed_alone(tables, most)
        if steps:
            best = _priced(Answer(layout, Settled(Path(0.0, steps), 0.0)), prices)
    return best, complete


def _make_exact_below(layout: Layout, weights: Weights, k: int, ceiling: float) -> bool:
    """Make exact every pool through which a path could cost less than the ceiling, or the likeliest; whether all."""
    pools = layout.pools
    while True:
        costs = [pools.costs(weights, e) for e in range(pools.n_engines)]
        cheapest = np.min(costs, axis=0)
        found = [
            layout.undecided(cheapest, np.where(pools.is_exact[e], np.inf, cost), k, ceiling)
            for e, cost in enumerate(costs)
        ]
        total = sum(len(index) for index, _ in found)
        for e, (index, through) in enumerate(found):
            if total > MAX_EXACT:
                index = index[np.argsort(through)[: MAX_EXACT // pools.n_engines]]
            pools.make_exact(e, index)
        if total == 0 or total > MAX_EXACT:
            return total == 0


Table = list[np.ndarray]  # costs [P] of each engine


def _exact_costs(layout: Layout, weights: Weights) -> Table:
    """The exact costs; inf where only a bound is known."""
    pools = layout.pools
    return [np.where(pools.is_exact[e], pools.costs(weights, e), np.inf) for e in range(pools.n_engines)]


# The lists: the path of the least second cost of all whose costs by each of the tables are within `most` [2 + Q].


def _listed_alone(tables: list[Table], most: np.ndarray) -> tuple[Step, ...]:
    totals = np.array([[costs[0] for costs in table] for table in tables])
    allowed = np.where(np.all(totals <= most[:, None], axis=0), totals[1], np.inf)
    e = int(np.argmin(allowed))
    return (Step(0, e),) if np.isfinite(allowed[e]) else ()


def _listed_in_star(layout: Star, tables: list[Table], most: np.ndarray) -> tuple[Step, ...]:
    s, best, steps = layout.size, math.inf, ()
    for first in range(len(tables[0])):
        for second in range(len(tables[0])):
            totals = np.array([table[first][:s] + table[second][s:] for table in tables])
            allowed = np.where(np.all(totals <= most[:, None], axis=0), totals[1], np.inf)
            i = int(np.argmin(allowed))
            if allowed[i] < best:
                best, steps = float(allowed[i]), (Step(i, first), Step(i + s, second))
    return steps


def _listed_in_web(layout: Web, tables: list[Table], most: np.ndarray, k: int) -> tuple[tuple[Step, ...], bool]:
    """Paths grow pool by pool, each kept while the cheapest way to the end by each table leaves it within `most`; and
    whether all were kept that could be."""
    d, n_engines = layout.size, len(tables[0])
    to_go = [layout.onwards(np.min(table, axis=0).reshape(d, d), k) for table in tables]  # [2 + Q][k + 1][D]
    node, spent, trail = np.zeros(1, int), np.zeros((1, len(tables))), np.zeros((1, 0), int)
    best, steps, complete = math.inf, (), True
    for level in range(k):
        grown: list[tuple[np.ndarray, ...]] = []
        for i in np.unique(node):
            upper = np.arange(d - 1 if level == k - 1 else i + 1, d)
            least = np.stack([each[k - 1 - level][upper] for each in to_go], axis=1)
            rows = np.flatnonzero(node == i)
            for e in range(n_engines):
                own = np.stack([table[e][i * d + upper] for table in tables], axis=1)
                for part in np.array_split(rows, 1 + len(rows) * len(upper) // MAX_LISTED):
                    totals = spent[part][:, None, :] + own[None]
                    r, m = np.nonzero(np.all(totals + least[None] <= most, axis=2))
                    code = (i * d + upper[m]) * n_engines + e
                    grown.append((upper[m], totals[r, m], np.column_stack([trail[part[r]], code])))
        node, spent, trail = (np.concatenate(each) for each in zip(*grown))
        done = np.flatnonzero(node == d - 1)
        if len(done) and spent[done, 1].min() < best:
            i = done[np.argmin(spent[done, 1])]
            best, steps = float(spent[i, 1]), tuple(Step(int(c) // n_engines, int(c) % n_engines) for c in trail[i])
            most = most.copy()
            most[1] = best
        on = np.flatnonzero(node != d - 1)
        if len(on) > MAX_LISTED:
            promise = spent[on, 0] + to_go[0][k - 1 - level][node[on]]
            on, complete = on[np.argsort(promise)[:MAX_LISTED]], False
        node, spent, trail = node[on], spent[on], trail[on]
        if not len(on):
            break
    return steps, complete
