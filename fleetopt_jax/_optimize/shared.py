"""Exact search of services that share a budget.

What a fleet costs, and what it uses of every limit, is linear in its GPUs of each kind and its watts, and more watts
are never better. So of all fleets of a service that take the same GPUs only the one of least watts counts, and what all
services take is a sum of one such row of each. Searched in three steps:

1. Prices of the limits, by column generation (Dantzig and Wolfe 1960): a linear program mixes the fleets known so far
   within the budget, its prices mu ask every service for its cheapest fleet under c + mu A (the exact search of
   `exact.py`), until no service has a cheaper one. Their costs, less mu caps, bound every plan from below: L.
2. Fleets that could be part of a plan that costs less than L + g are those whose priced cost is within g of the
   service's least. They are listed as in `coupled.py`, of every service.
3. Sums over the lists, service by service, keeping what is within g and within the budget, one of the least watts for
   the same GPUs. The best of them is the best of all if it costs at most L + g; if there is none, L + g is a better
   bound, and g grows up to what the best plan known leaves.

Purchases are columns of the program: b GPUs beyond the stock, at a surcharge. A budget that even mixtures exceed is
proved to be too small by the same program, which then has the excess for its objective.
"""

import math
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import scipy  # whose parts load on first use

from fleetopt_jax._optimize.coupled import MAX_POOLS, MAX_WAYS, exact_costs, make_exact_below
from fleetopt_jax._optimize.exact import Cheapest, Fleets, Settled, as_found
from fleetopt_jax._optimize.layouts import Below, Layout, Path, by_gpus
from fleetopt_jax._optimize.plan import Infeasible, Plan, Search, Unreachable
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.search import optimize, planned
from fleetopt_jax._optimize.services import (
    NoServicesPlan,
    Services,
    ServicesPlan,
    SharedService,
    Worth,
    engines_of,
    services_objective,
    without,
)
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.limits import ROUNDING
from fleetopt_jax.fleet.resources import PoolPrices, Weights, limit_weights, pool_prices

MAX_ROUNDS = 60  # of finding prices
SAME = 1e-9  # relative: prices are found as closely
FIRST_GAP = 1e-3  # of the bound, between it and the plans that are looked for first; then
WIDER = 4.0  # times as wide
MAX_SUMS = 100_000_000  # pairs of fleets that are added, of two services
AT_ONCE = 2_000_000  # of them
TIE = 1e-9  # of the objective, beside a limit alone


class Row(NamedTuple):
    """A fleet of a service."""

    way: int  # of the service
    answer: Cheapest
    takes: np.ndarray  # GPUs of each kind and watts [G + 1]


class Rows(NamedTuple):
    """Fleets of a service, made when they are asked for."""

    takes: np.ndarray  # [M, G + 1]
    at: Callable[[int], Row]


@dataclass(frozen=True)
class Caps:
    """What plans are compared by and kept within: linear in what they take, [G + 1], and in what is bought, [H]."""

    objective: np.ndarray  # [G + 1]
    of_bought: np.ndarray  # cost of a bought GPU beside that [H]
    limits: np.ndarray  # [Q, G + 1]
    limits_bought: np.ndarray  # what a bought GPU adds to a limit, -1 to that of its kind [Q, H]
    most: np.ndarray  # [Q]
    most_bought: np.ndarray  # [H]
    kind_bought: np.ndarray  # index of the kind of each purchase [H]
    stock: np.ndarray  # of that kind [H]

    @property
    def scale(self) -> np.ndarray:
        """Of the limits, to compare them [Q]."""
        return np.maximum(self.most, 1.0)

    def cost(self, takes: np.ndarray) -> np.ndarray:
        """Of plans [M, G + 1]; inf beyond the budget."""
        bought = np.maximum(0.0, takes[:, self.kind_bought] - self.stock)
        used = takes @ self.limits.T + bought @ self.limits_bought.T
        within = np.all(used <= self.most + ROUNDING * self.scale, axis=1)
        within &= np.all(bought <= self.most_bought + ROUNDING, axis=1)
        return np.where(within, takes @ self.objective + bought @ self.of_bought, np.inf)

    @property
    def loosest(self) -> np.ndarray:
        """What plans may use of the limits at most, whatever is bought [Q]."""
        return self.most + np.maximum(0.0, -self.limits_bought) @ self.most_bought + ROUNDING * self.scale

    def per_taken(self, mu: np.ndarray, objective: float) -> np.ndarray:
        """The objective, times 1 or 0, and the limits at prices mu [Q], of a GPU of each kind and a watt [G + 1]."""
        return objective * self.objective + mu @ self.limits

    def constant(self, mu: np.ndarray, objective: float) -> float:
        """What the priced costs of services need to bound their plans: less the caps, and what buying could save."""
        of_bought = objective * self.of_bought + mu @ self.limits_bought
        return float(np.minimum(0.0, of_bought) @ self.most_bought - mu @ self.most)


class Prices(NamedTuple):
    """Prices of the limits and what they prove: no plan costs less than the bound."""

    mu: np.ndarray  # [Q]
    bound: float
    least: np.ndarray  # priced cost of each service's cheapest fleet [S]


class Best(NamedTuple):
    """The best plan known, a fleet of each service; and what none costs less than."""

    cost: float
    rows: tuple[Row, ...]
    bound: float


NOTHING = Best(math.inf, (), -math.inf)


class Taker:
    """What the pools of a problem take: GPUs of each kind and watts."""

    def __init__(self, problem: Problem, kinds: Sequence[str]):
        each = problem.offers.each
        self._kind = np.array([kinds.index(offer.spec.gpu_name) for offer in each])
        self._gpus = np.array([float(offer.part.engine.gpus_per_instance) for offer in each])
        self._ways, self._width = problem.offers.ways, len(kinds) + 1

    def prices(self, per_taken: np.ndarray) -> PoolPrices:
        """Prices of a GPU of each kind and of a watt [G + 1], of an instance and a watt of each offer."""
        return PoolPrices(per_taken[self._kind] * self._gpus, np.full(len(self._kind), per_taken[-1]))

    def of_pools(self, layout: Layout, way: int, pools: np.ndarray) -> np.ndarray:
        """Of pools [M] that are served in a way [M, G + 1]."""
        taken = np.zeros((len(pools), self._width))
        for e in self._ways[way]:
            taken[:, self._kind[e]] += self._gpus[e] * layout.pools.instances[e, pools]
            taken[:, -1] += layout.pools.watts[e, pools]
        return taken

    def of_path(self, answer: Cheapest) -> np.ndarray:
        """Of the pools of a path [G + 1]."""
        each = [
            self.of_pools(answer.layout, self._ways.index(way), np.array([pool]))
            for pool, way in answer.settled.path.steps
        ]
        return np.sum(np.concatenate(each), axis=0)


class Candidates:
    """All fleets of one service, by its ways; and those that were the cheapest at some prices."""

    def __init__(self, service: SharedService, services: Services):
        in_stock = [way for each in service.ways if (way := _in_stock(each, services))]
        for way in in_stock:
            _check_ways(service, way)
        self.service, self.known = service, dict[bytes, Row]()
        self.fleets = [Fleets(way, None, MAX_POOLS) for way in in_stock]
        self.kinds, self.takers = services.kinds, [Taker(way, services.kinds) for way in in_stock]

    def among(self, kinds: tuple[str, ...]) -> "Candidates":
        """The same fleets, where services may have GPUs of these kinds."""
        if kinds == self.kinds:
            return self
        again = copy(self)
        again.known, again.kinds = {}, kinds
        again.takers = [Taker(fleets.problem, kinds) for fleets in self.fleets]
        return again

    def cheapest(self, per_taken: np.ndarray) -> float:
        """The least cost, by prices [G + 1], whose fleet is then known; inf where none holds what is promised."""
        best = math.inf
        for way, (fleets, taker) in enumerate(zip(self.fleets, self.takers, strict=True)):
            answer = fleets.cheapest_of_all(taker.prices(per_taken))
            if answer.settled.path.steps:
                takes = taker.of_path(answer)
                self.known[takes.tobytes()] = Row(way, answer, takes)
                best = min(best, float(per_taken @ takes))
        return best

    def known_rows(self) -> Rows:
        rows = list(self.known.values())
        return Rows(np.array([row.takes for row in rows]), rows.__getitem__)

    def below(self, per_taken: np.ndarray, ceiling: float) -> tuple[Rows, bool]:
        """All fleets whose priced cost is at most the ceiling, one for the same GPUs, and whether all are there."""
        parts: list[tuple[int, Layout, Below]] = []
        complete = True
        for way, (fleets, taker) in enumerate(zip(self.fleets, self.takers, strict=True)):
            prices = taker.prices(per_taken)
            for layout in fleets.layouts:
                k = layout.most_pools or fleets.problem.n_pools
                complete &= make_exact_below(layout, prices, k, ceiling)
                found = layout.below(exact_costs(layout, prices), partial(taker.of_pools, layout), ceiling, k)
                complete &= found.complete
                parts.append((way, layout, found))
        takes = np.concatenate([found.takes for _, _, found in parts])
        sizes = [len(found.takes) for _, _, found in parts]
        origin = np.column_stack([np.repeat(range(len(parts)), sizes), np.concatenate([*map(np.arange, sizes)])])
        kept = by_gpus(takes)

        def at(i: int) -> Row:
            (part, row), takes_i = origin[kept[i]], takes[kept[i]]
            way, layout, found = parts[part]
            return Row(way, Cheapest(layout, Settled(Path(0.0, found.steps(int(row), layout)), 0.0)), takes_i)

        return Rows(takes[kept], at), complete


def _in_stock(problem: Problem, services: Services) -> Problem | None:
    """Without the engines of which there are not GPUs for one instance, even with one more; None without any."""
    more = {kind: least_instance(services, kind) for kind in services.stock}
    most = {kind: count + more[kind] - 1 for kind, count in services.most_of.items()}
    return problem.keeping(lambda spec: spec.split.n_gpus <= most.get(spec.gpu_name, math.inf))


def least_instance(services: Services, kind: str) -> int:
    """GPUs of the smallest instance of a kind."""
    return round(min(float(engine.gpus_per_instance) for engine in engines_of(services, kind)))


def _check_ways(service: SharedService, problem: Problem) -> None:
    if (n := len(problem.offers.ways)) > MAX_WAYS:
        allowed = f"need at most {MAX_WAYS} under a budget: name fewer engines, or serve mixed"
        raise BadInput(f"service {service.name!r}", f"{n} ways to serve a pool", allowed)


def caps_of(services: Services, objective: Weights) -> Caps:
    """An objective and the budget as numbers."""
    kinds, bought = services.kinds, list(services.purchases)
    site = services.any.around.site
    engines = [engines_of(services, kind)[0] for kind in kinds]

    def per_taken(weights: Weights) -> np.ndarray:
        prices = pool_prices(weights, kinds, engines, site)
        gpus = np.array([float(engine.gpus_per_instance) for engine in engines])
        return np.append(prices.per_instance / gpus, prices.per_watt[0])

    limits = {name: limit_weights(name) for name in services.budget.caps}
    surcharge = np.array([services.surcharge(kind) for kind in bought])
    of_kind = np.array([[float(name == f"gpus_of.{kind}") for kind in bought] for name in limits])
    of_usd = np.array([weights.usd_per_h for weights in limits.values()])
    return Caps(
        objective=per_taken(objective),
        of_bought=objective.usd_per_h * surcharge,
        limits=np.array([per_taken(weights) for weights in limits.values()]).reshape(len(limits), len(kinds) + 1),
        limits_bought=np.outer(of_usd, surcharge) - of_kind.reshape(len(limits), len(bought)),
        most=np.array([float(cap) for cap in services.budget.caps.values()]),
        most_bought=np.array([services.purchases[kind].most for kind in bought]),
        kind_bought=np.array([kinds.index(kind) for kind in bought], int),
        stock=np.array([services.stock[kind] for kind in bought]),
    )


# ----------------------------------------------------------------------------------------------------------- the prices


def _mixture(caps: Caps, known: Sequence[Rows], *, feasible: bool) -> tuple[float, np.ndarray]:
    """(cost, prices of the limits [Q]) of the cheapest mixture of known fleets within the budget; where that is not
    known to be `feasible`, the least share by which one exceeds the limits, and what that costs of each limit."""
    takes = np.concatenate([rows.takes for rows in known])
    sizes, n, h = [len(rows.takes) for rows in known], len(takes), len(caps.most_bought)
    costs = np.concatenate([takes @ caps.objective, caps.of_bought, [0.0]]) if feasible else np.eye(n + h + 1)[-1]
    unit = np.abs(costs).max()
    used = np.hstack([caps.limits @ takes.T, caps.limits_bought]) / caps.scale[:, None]
    one_each = np.hstack([np.repeat(np.eye(len(sizes)), sizes, axis=1), np.zeros((len(sizes), h + 1))])
    found = scipy.optimize.linprog(
        costs / unit,
        A_ub=np.hstack([used, np.full((len(used), 1), -1.0)]),  # the last variable: by which share they are exceeded
        b_ub=caps.most / caps.scale,
        A_eq=one_each,
        b_eq=np.ones(len(sizes)),
        bounds=[*[(0.0, None)] * n, *[(0.0, most) for most in caps.most_bought], (0.0, ROUNDING if feasible else None)],
        method="highs-ds",
    )
    if found.x is None:
        return math.inf, np.zeros(len(caps.most))
    return float(found.fun * unit), np.maximum(0.0, -found.ineqlin.marginals) * unit / caps.scale


def find_prices(caps: Caps, each: Sequence[Candidates], *, feasible: bool) -> Prices:
    """The prices of the best bound: of the cost of plans, or of the share by which they exceed the limits, of which any
    above 0 proves that there are none."""
    objective, best = float(feasible), Prices(np.zeros(len(caps.most)), -math.inf, np.zeros(len(each)))
    for _ in range(MAX_ROUNDS):
        cost, mu = _mixture(caps, [one.known_rows() for one in each], feasible=feasible)
        if best.bound >= cost - SAME * abs(cost) or (not feasible and (cost <= ROUNDING or best.bound > SAME)):
            break
        priced = _priced(caps, each, mu, objective)
        best = max(best, priced, key=lambda prices: prices.bound)
    return best


def _priced(caps: Caps, each: Sequence[Candidates], mu: np.ndarray, objective: float) -> Prices:
    """What prices prove."""
    least = np.array([one.cheapest(caps.per_taken(mu, objective)) for one in each])
    return Prices(mu, float(np.sum(least)) + caps.constant(mu, objective), least)


# ------------------------------------------------------------------------------------------------------- sums of fleets


def best_sum(caps: Caps, lists: Sequence[Rows], slacks: Sequence[np.ndarray], most: float) -> tuple[Best, bool]:
    """The cheapest plan within the budget, a fleet from each list, whose slacks sum to at most so much; and whether all
    were tried. Of sums that take the same GPUs one of the least watts goes on."""
    least = [np.min(rows.takes @ caps.limits.T, axis=0) for rows in lists]
    takes, slack, chosen, complete = np.zeros((1, lists[0].takes.shape[1])), np.zeros(1), np.zeros((1, 0), int), True
    for s, rows in enumerate(lists):
        if len(takes) * len(rows.takes) > MAX_SUMS:
            kept = np.argsort(slack)[: max(1, MAX_SUMS // len(rows.takes))]
            takes, slack, chosen, complete = takes[kept], slack[kept], chosen[kept], False
        room = caps.loosest - np.sum(least[s + 1 :], axis=0)
        a, b = _pairs((takes, slack), (rows.takes, slacks[s]), most, (caps.limits, room))
        takes, slack = takes[a] + rows.takes[b], slack[a] + slacks[s][b]
        chosen = np.column_stack([chosen[a], b])
        if not len(takes):
            return NOTHING, complete
    costs = caps.cost(takes)
    i = int(np.argmin(costs))
    if not math.isfinite(costs[i]):
        return NOTHING, complete
    return Best(float(costs[i]), tuple(rows.at(int(j)) for rows, j in zip(lists, chosen[i])), -math.inf), complete


Slacked = tuple[np.ndarray, np.ndarray]  # fleets [M, G + 1] and their slacks [M]


def _pairs(
    first: Slacked, second: Slacked, most: float, within: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Which sums of two are within the slack and, by the limits [Q, G + 1], within the room [Q]: of those that take the
    same GPUs one of the least watts."""
    (takes, slack), (others, more), (limits, room) = first, second, within
    a, b, kept = np.zeros(0, int), np.zeros(0, int), np.zeros((0, takes.shape[1]))
    size = max(1, AT_ONCE // len(others))
    for start in range(0, len(takes), size):
        i, j = np.nonzero(slack[start : start + size, None] + more[None] <= most)
        total = takes[start + i] + others[j]
        ok = np.all(total @ limits.T <= room, axis=1)
        a, b = np.concatenate([a, start + i[ok]]), np.concatenate([b, j[ok]])
        kept = np.concatenate([kept, total[ok]])
        some = by_gpus(kept)
        a, b, kept = a[some], b[some], kept[some]
    return a, b


def _listed_best(
    caps: Caps, each: Sequence[Candidates], prices: Prices, objective: float, gap: float
) -> tuple[Best, bool]:
    """The cheapest plan of all whose priced cost is within a gap of the bound, and whether none was left out."""
    per_taken = caps.per_taken(prices.mu, objective)
    within = gap + SAME * float(np.abs(prices.least).sum())
    found = [one.below(per_taken, least + within) for one, least in zip(each, prices.least, strict=True)]
    lists, complete = [rows for rows, _ in found], all(complete for _, complete in found)
    if not all(len(rows.takes) for rows in lists):
        return NOTHING, complete
    best, all_tried = best_sum(caps, lists, _slacks(lists, per_taken, prices.least), within)
    return best, complete and all_tried


def _slacks(lists: Sequence[Rows], per_taken: np.ndarray, least: np.ndarray) -> list[np.ndarray]:
    return [np.maximum(0.0, rows.takes @ per_taken - low) for rows, low in zip(lists, least, strict=True)]


class Outcome(NamedTuple):
    """The best plan within a budget, if one was found, and whether there is none or none better."""

    best: Best
    certified: bool
    mu: np.ndarray  # prices of the limits [Q]


def find_best(caps: Caps, each: Sequence[Candidates], known: Best = NOTHING) -> Outcome:
    """The best plan within the budget. With `known`, the best of another budget, if that keeps this one as well."""
    for one in each:
        for per_taken in (caps.objective, *caps.limits):
            if not math.isfinite(one.cheapest(per_taken + TIE * caps.objective)):
                raise Unserved(one.service)
    nothing = np.zeros(len(caps.most))
    if find_prices(caps, each, feasible=False).bound > SAME:
        return Outcome(NOTHING, True, nothing)
    prices = find_prices(caps, each, feasible=True)
    lists = [one.known_rows() for one in each]
    slacks = _slacks(lists, caps.per_taken(prices.mu, 1.0), prices.least)
    best = min(best_sum(caps, lists, slacks, math.inf)[0], known, key=lambda plan: plan.cost)
    bound, gap = prices.bound, FIRST_GAP * abs(prices.bound)
    while math.isinf(best.cost) or best.cost - bound > SAME * abs(best.cost):
        if math.isinf(best.cost) and gap > abs(prices.bound):
            # Of any plan within the budget the limits at any prices sum to no more than the caps at these.
            only_limits = _priced(caps, each, prices.mu, 0.0)
            found, complete = _listed_best(caps, each, only_limits, 0.0, -only_limits.bound)
            return Outcome(found._replace(bound=found.cost if complete else bound), complete, prices.mu)
        gap = min(gap, best.cost - prices.bound)
        found, complete = _listed_best(caps, each, prices, 1.0, gap)
        best = min(best, found, key=lambda plan: plan.cost)
        if not complete:
            return Outcome(best._replace(bound=bound), False, prices.mu)
        bound = min(best.cost, prices.bound + gap)
        gap *= WIDER
    return Outcome(best._replace(bound=bound), True, prices.mu)


# ----------------------------------------------------------------------------------------------------------- the search


class Unserved(Exception):
    """No fleet of one of the services holds what it is promised."""

    def __init__(self, service: SharedService):
        super().__init__(service.name)
        self.service = service


def optimize_services(
    services: Services, *, worth: bool = True, progress: Progress | None = None
) -> ServicesPlan | NoServicesPlan:
    """The fleets of all services that together cost least within the budget, each re-evaluated hard in whole instances,
    proved to be the best where all that could be better was listed; or what cannot be kept.

    With `worth`, what more GPUs of each kind in stock would save, searched again with them. Refuses float32.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> specs = [fo.EngineSpec("h100", tp=4), fo.EngineSpec("b200", tp=4)]
    >>> asked = {name: fo.make_problem(chat, specs, n_pools=1) for name in ("ours", "theirs")}
    >>> answer = fo.optimize_services(fo.make_services(asked, budget=fo.make_budget(gpus_of={"b200": 4})))
    >>> answer.status, answer.n_gpus_of["b200"] <= 4
    ('optimal', True)
    """
    require_float64("optimize_services")
    started = time.perf_counter()
    return settled(services, candidates_of(services, progress=progress), started, worth=worth)


def candidates_of(
    services: Services, known: Sequence[Candidates] = (), progress: Progress | None = None
) -> list[Candidates]:
    """All fleets of each service, up to the first that has none. Of services that were searched before, and are the
    same records, those that are `known` are taken: what they may be depends on neither objective nor prices."""
    each: list[Candidates] = []
    for done, service in enumerate(services.each):
        again = next((one for one in known if one.service is service), None)
        each.append(again.among(services.kinds) if again else Candidates(service, services))
        if not each[-1].fleets:
            break
        if progress:
            progress(done + 1, len(services.each) + 1)
    return each


def settled(
    services: Services, each: Sequence[Candidates], started: float, *, worth: bool = False
) -> ServicesPlan | NoServicesPlan:
    """The best of the candidates, by the objective of the services and within their budget."""
    if not each[-1].fleets:
        return _unserved(services, each[-1].service, _searched(services, each, started))
    try:
        outcome = find_best(caps_of(services, services.any.search_weights), each)
    except Unserved as nobody:
        return _unserved(services, nobody.service, _searched(services, each, started))
    search = _searched(services, each, started, outcome)
    if not outcome.best.rows:
        return _not_together(services, each, search, certified=outcome.certified)
    answer = ServicesPlan(
        status="optimal" if search.gap == 0.0 else "feasible",
        services=services,
        plans=tuple(_plan(one, row, started) for one, row in zip(each, outcome.best.rows, strict=True)),
        search=search,
        prices=MappingProxyType(dict(zip(services.budget.caps, outcome.mu.tolist(), strict=True))),
    )
    _check_kept(answer)
    return replace(answer, worth=tuple(_worth(services, each, outcome))) if worth else answer


def _check_kept(answer: ServicesPlan) -> None:
    """Fleets that were re-evaluated keep the budget, as each holds its own limits."""
    for name, cap in answer.services.budget.caps.items():
        most = answer.services.most_of.get(name.removeprefix("gpus_of."), cap)
        used = sum(answer.used(name)) + (answer.surcharge_usd_per_h if name == "max_usd_per_h" else 0.0)
        if not used <= most + 2.0 * ROUNDING * max(most, 1.0):
            raise AssertionError(f"the search of services returned a plan that breaks {name}: {used} > {most}")


def _plan(candidates: Candidates, row: Row, started: float) -> Plan:
    """A service's fleet, which is the best only beside the others."""
    fleets = candidates.fleets[row.way]
    found = replace(as_found(fleets, row.answer, []), certified=False, lower_bound=None)
    return planned(fleets.problem, "exact", found, started)


def _searched(services: Services, each: Sequence[Candidates], started: float, outcome: Outcome | None = None) -> Search:
    fleets = [one for candidates in each for one in candidates.fleets]
    proves = outcome is not None and all(one.certified for one in fleets)
    bound = outcome.best.bound if outcome and proves and outcome.best.rows else None
    gap = None if bound is None or outcome is None else max(0.0, outcome.best.cost / bound - 1.0)
    if outcome and outcome.certified and gap is not None:
        gap = 0.0
    return Search(
        n_evaluated=sum(one.boundaries.n_evaluated for one in fleets),
        wall_s=time.perf_counter() - started,
        candidates="; ".join(dict.fromkeys(one.description() for one in fleets)),
        lower_bound=None if bound is None else services_objective(services, bound),
        gap=gap,
        n_engines=max(len(one.problem.specs) for one in fleets) if fleets else 0,
    )


def _worth(services: Services, each: Sequence[Candidates], outcome: Outcome) -> list[Worth]:
    """What one more GPU of each kind in stock saves, and as many as an instance takes."""
    found, objective = [], services.any.search_weights
    for kind, count in services.budget.gpus_of:
        for n in sorted({1, least_instance(services, kind)}):
            richer = replace(services, budget=services.budget.with_cap(f"gpus_of.{kind}", count + n))
            better = find_best(caps_of(richer, objective), each, outcome.best)
            saved = max(0.0, outcome.best.cost - better.best.cost)
            found.append(Worth(kind, n, saved, outcome.certified and better.certified))
    return found


# -------------------------------------------------------------------------------------------------- where there is none


def _unserved(services: Services, service: SharedService, search: Search) -> NoServicesPlan:
    """The limit that no fleet of a service holds by itself."""
    for way in service.ways:
        answer = optimize(way)
        if isinstance(answer, Infeasible):
            return NoServicesPlan(services, search, answer.binding, service.name)
    kinds = [kind for kind in service.kinds if kind in services.stock]
    return NoServicesPlan(
        services, search, Unreachable(f"gpus_of.{kinds[0]}", services.most_of[kinds[0]], None), service.name
    )


def _not_together(services: Services, each: Sequence[Candidates], search: Search, *, certified: bool) -> NoServicesPlan:
    """Limits that services cannot keep together: the first that they exceed whatever the others are, else all; and the
    least value of each that would do if the others are kept."""
    objective, budget = services.any.search_weights, services.budget
    helps: dict[str, float] = {}
    for name in budget.caps if certified else ():
        others = without(services, name)
        found = find_best(caps_of(others, limit_weights(name).plus(TIE, objective)), each)
        if found.best.rows:
            helps[name] = _used(services, name, found.best.rows)
    caps = caps_of(services, objective)
    for name, row, most in zip(budget.caps, caps.limits, caps.loosest, strict=True):
        least = sum(one.cheapest(row + TIE * caps.objective) for one in each)
        if least > most * (1.0 + ROUNDING) + TIE * sum(one.cheapest(caps.objective) for one in each):
            return NoServicesPlan(services, search, Unreachable(name, budget.caps[name], helps.get(name)), None, helps)
    binding = Unreachable("budget", dict(budget.caps), None)
    return NoServicesPlan(services, search, binding, None, helps, proved=certified)


def _used(services: Services, limit: str, rows: Sequence[Row]) -> float:
    """What a plan uses of a limit, bought GPUs at the price of those in stock."""
    per_taken = caps_of(services, limit_weights(limit)).objective
    return float(sum(per_taken @ row.takes for row in rows))
