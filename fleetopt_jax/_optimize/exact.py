"""Exact search: the shortest path over boundaries, for every number of pools up to the asked one, with its certificate.

A fleet's power, price and GPUs are sums over its pools (`graph.py`), so the best fleet of at most K pools is the
cheapest path of at most K edges from nothing to the promised window. Costs start as lower bounds. The cheapest path
under them, and every pool through which a path could be cheaper than the best fleet known, is made exact, until the
cheapest path has exact costs only: then no fleet over the candidates is cheaper, whatever was never computed.

Candidates: every whole window for two pools (where requests are longer than 65,536 tokens, the distinct lengths and the
multiples of 16), every multiple of 16 tokens, vLLM's block, for three and more. Where gamma is searched, 1, 1.05, ...,
2 at each of them for two pools, and at some hundred windows for three and more, which are then searched again around
the best: these are not certified.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fleetopt_jax._optimize.candidates import GAMMA_STEP, gamma_grid
from fleetopt_jax._optimize.graph import Boundaries, Pools
from fleetopt_jax._optimize.layouts import Layout, ManyPools, OnePool, Path, Step, TwoPools
from fleetopt_jax._optimize.plan import Found, OnePoolFleet, nothing
from fleetopt_jax._optimize.problem import GAMMA_MAX, Problem, demanded_tok_per_s
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.resources import PoolPrices, Weights
from fleetopt_jax.fleet.traffic import routed_lengths
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.workload.atoms import Workload, total_tokens

MAX_BOUNDARIES = 65_536  # up to here every whole window is a candidate; beyond it, the distinct lengths
MAX_POOLS = 40_000_000  # in one table, all engines together (0.6 GB)
MAX_TWO_POOLS = 3_000_000  # boundaries, all engines together, between two pools
MAX_GAMMA_NODES = 2500  # boundaries (a window and a gamma) for three pools and more
NEAR = 12  # windows on either side of the best that are searched again, with
NEAR_GAMMA = 0.15  # gammas within this
ROUND = 65_536  # pools made exact at once
COST_TOLERANCE = 1e-14  # costs are compared this loosely: sums of a few float64, whose ties a far smaller part breaks


NO_PATH = Path(math.inf, ())


@dataclass(frozen=True)
class Settled:
    """The cheapest path, and the certificate: no path is cheaper than `lower_bound`."""

    path: Path
    lower_bound: float


def settle(layout: Layout, prices: PoolPrices, k: int) -> Settled:
    """The cheapest path of at most k pools, with exact costs."""
    pools, offers = layout.pools, layout.pools.offers
    known = [np.where(pools.is_exact[e], pools.costs(prices, e), np.inf) for e in range(pools.n_engines)]
    _, path = layout.best(offers.cheapest(known), k)
    best = _as_exact(pools, prices, path)
    while True:
        costs = [pools.costs(prices, e) for e in range(pools.n_engines)]
        cheapest = offers.cheapest(costs)
        bound, path = layout.best(cheapest, k)
        if not bound < best.cost * (1.0 - COST_TOLERANCE):
            return Settled(best, best.cost)
        limit = best.cost * (1.0 - COST_TOLERANCE)
        for e, cost in enumerate(costs):
            own = offers.of_lane(e, np.where(pools.is_exact[e], np.inf, cost), costs)
            index, through = layout.undecided(cheapest, own, k, limit)
            if len(index) > ROUND:
                first = np.argpartition(through, ROUND // 4)[: ROUND // 4]
                index, through = index[first], through[first]
            ahead = np.array(path)[~pools.is_exact[e, path]]  # made exact whatever they cost
            others = ~np.isin(index, ahead)
            slack = np.append(limit - through[others], np.full(len(ahead), np.inf))
            layout.pursue(e, np.append(index[others], ahead), prices, slack)
        best = min(best, _as_exact(pools, prices, path), key=lambda each: each.cost)


def _as_exact(pools: Pools, prices: PoolPrices, path: list[int]) -> Path:
    """The path with its exact costs, each pool served by the offers that are best where they are exact."""
    steps, total = [], 0.0
    for p in path:
        costs = [pools.costs(prices, e)[p] if pools.is_exact[e, p] else math.inf for e in range(pools.n_engines)]
        cost, way = pools.offers.best_way(costs)
        steps.append(Step(p, way))
        total += cost
    return Path(float(total), tuple(steps)) if math.isfinite(total) else NO_PATH


class Cheapest(NamedTuple):
    """The best of at most so many pools, and whose pools its path counts."""

    layout: Layout
    settled: Settled

    @property
    def cost(self) -> float:
        return self.settled.path.cost


class Fleets:
    """All fleets of at most K pools over the candidates of a problem."""

    def __init__(
        self,
        problem: Problem,
        progress: Progress | None = None,
        max_pools: int = MAX_POOLS,
        *,
        compresses: bool = False,
    ):
        if problem.slo.scope == "fleet":
            raise BadInput("method exact", "limits of the whole fleet couple its pools", "need method grid or gradient")
        self.problem, self._progress, self._max_pools = problem, progress, max_pools
        windows, gammas = candidates(problem)
        self.boundaries = Boundaries(problem, windows, gammas, compresses=compresses)
        self._inner = np.arange(1, self.boundaries.last)
        self.layouts: list[Layout] = [OnePool(self.boundaries).seeded()]
        if problem.n_pools > 1 and len(windows):
            self.layouts.append(TwoPools(self.boundaries, self._inner).seeded())
        if problem.n_pools > 2 and len(windows) and self._may_be_several():
            self.layouts.append(self._many_pools(self.many_pool_nodes()))

    def cheapest(self, prices: PoolPrices) -> list[Cheapest]:
        """For k = 1 ... K, the best of at most k pools."""
        best: list[Cheapest] = []
        for k in range(1, self.problem.n_pools + 1):
            layout = self.layouts[min(k, len(self.layouts)) - 1]
            answer = Cheapest(layout, settle(layout, prices, k))
            if self.problem.gamma is None and layout.refinable and answer.settled.path.steps:
                near = self._many_pools(self._near_nodes(answer))
                answer = min(answer, Cheapest(near, settle(near, prices, k)), key=lambda each: each.cost)
            best.append(min([*best[-1:], answer], key=lambda each: each.cost))
        return best

    def cheapest_of_all(self, prices: PoolPrices) -> Cheapest:
        """The best of at most K pools, without the smaller numbers."""
        answers = [Cheapest(layout, settle(layout, prices, self.problem.n_pools)) for layout in self.layouts]
        return min(answers, key=lambda each: each.cost)

    @property
    def certified(self) -> bool:
        """Whether no fleet over the candidates is cheaper than the cheapest found."""
        return self.problem.gamma is not None or len(self.layouts) < 3

    def description(self) -> str:
        """What the candidates are, in words."""
        n = len(np.unique(self.boundaries.window_tokens)) - 2
        gamma = "" if self.problem.gamma is not None else f", gamma 1 to {GAMMA_MAX:g} by {GAMMA_STEP:g}"
        text = f"{n:,} windows{gamma}"
        if len(self.layouts) < 3:
            return text
        many = len(np.unique(self.boundaries.window_tokens[self.many_pool_nodes()])) - 2
        return f"{text} for two pools, {many:,} windows for three and more"

    def _may_be_several(self) -> bool:
        """Whether some pool could be the last of several, with two pools or more: where none can, nobody need ask what
        lies between."""
        two, prices = self.layouts[1], self.problem.prices(self.problem.search_weights)
        if math.isfinite(settle(two, prices, 2).path.cost):
            return True
        last = np.arange(len(self._inner), 2 * len(self._inner))
        for e in range(two.pools.n_engines):
            left = last[np.isfinite(two.pools.costs(prices, e)[last]) & ~two.pools.is_exact[e, last]]
            two.pursue(e, left, prices, np.full(len(left), np.inf))
        costs = [two.pools.costs(prices, e)[last] for e in range(two.pools.n_engines)]
        return bool(np.isfinite(two.pools.offers.cheapest(costs)).any())

    def _many_pools(self, nodes: np.ndarray) -> Layout:
        return ManyPools(self.boundaries, nodes, self._progress).seeded()

    def many_pool_nodes(self) -> np.ndarray:
        """Boundaries of three pools and more, as many as the table allows: multiples of 16 tokens, or of 32, ..."""
        n_engines = self.boundaries.n_offers
        windows, inner = self.boundaries.window_tokens, self._inner
        if self.problem.gamma is None:
            options = np.unique(windows[inner])
            most = max(
                2, int(min(MAX_GAMMA_NODES, (self._max_pools / n_engines) ** 0.5)) // len(gamma_grid(self.problem))
            )
            kept = np.isin(windows[inner], options[evenly(self.problem.workload, options, most)])
        else:
            grain = BLOCK_TOKENS
            while n_engines * np.sum(windows[inner] % grain == 0) ** 2 > self._max_pools:
                grain *= 2
            kept = windows[inner] % grain == 0
        return np.concatenate([[0], inner[kept], [self.boundaries.last]])

    def _near_nodes(self, answer: Cheapest) -> np.ndarray:
        """Boundaries around those of a path: every window and gamma near each."""
        windows, gammas = self.boundaries.window_tokens, self.boundaries.gamma
        options = np.unique(windows[self._inner])
        uppers = [answer.layout.pools.ends(np.array(step.pool))[1] for step in answer.settled.path.steps[:-1]]
        kept = np.zeros(len(windows), bool)
        for node in uppers:
            rank = np.searchsorted(options, windows[node])
            near = options[max(rank - NEAR, 0) : rank + NEAR + 1]
            kept |= np.isin(windows, near) & (np.abs(gammas - gammas[node]) <= NEAR_GAMMA + COST_TOLERANCE)
        inner = self._inner[kept[self._inner]]
        return np.concatenate([[0], inner, [self.boundaries.last]])


def candidates(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(windows, gammas) [S] of the boundaries below the promised window."""
    window, gammas = problem.window_tokens, gamma_grid(problem)
    lengths = np.unique(np.ceil(routed_lengths(problem.workload, problem.assumptions)))
    affordable = MAX_TWO_POOLS // (len(gammas) * len(problem.offers.each))
    if window <= min(MAX_BOUNDARIES, affordable):
        options = np.arange(1.0, window)
    elif window <= MAX_BOUNDARIES:
        options = np.arange(BLOCK_TOKENS, window, BLOCK_TOKENS)
    else:
        ends = np.unique(np.append(lengths, np.ceil(lengths / (problem.gamma or 1.0))))
        options = np.unique(np.append(ends, BLOCK_TOKENS * np.ceil(ends / BLOCK_TOKENS)))
    # Beyond the longest request a window leaves the next pool nothing: no pool, but where it promises all itself.
    options = options[(options < window) & ((options < lengths[-1]) | (options * gammas[-1] >= window))]
    options = options[evenly(problem.workload, options, affordable)]
    return np.repeat(options, len(gammas)), np.tile(gammas, len(options))


def evenly(workload: Workload, options: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most so many options, even in a mean of three measures: requests, tokens and log-length."""
    if len(options) <= most:
        return np.arange(len(options))
    total, weight = np.asarray(total_tokens(workload)), np.asarray(workload.weight)
    below = np.searchsorted(total, options, side="right")
    measures = [np.append(0.0, np.cumsum(mass))[below] for mass in (weight, weight * total)]
    rank = np.log(options / options[0]) / np.log(options[-1] / options[0])
    for each in measures:
        rank = rank + each / max(each[-1], COST_TOLERANCE)
    n, kept = most, np.zeros(0)
    while len(kept) < 0.95 * most and n < 64 * most:  # several may fall on one option
        kept, n = np.unique(np.searchsorted(rank, np.linspace(rank[0], rank[-1], n)).clip(0, len(rank) - 1)), n * 5 // 4
    return kept[:: 1 + len(kept) // (most + 1)] if len(kept) > most else kept


def search(problem: Problem, progress: Progress | None = None, *, compresses: bool = False) -> Found:
    """The cheapest fleet over the candidates. Where it `compresses`, by programs that can, whatever gamma is."""
    fleets = Fleets(problem, progress, compresses=compresses)
    answers = fleets.cheapest(problem.prices(problem.search_weights))
    return as_found(fleets, answers[-1], answers)


def own_cost(problem: Problem, answer: Cheapest) -> float:
    """What a path costs by the objective alone, without what breaks its ties; inf where there is none."""
    if not answer.settled.path.steps:
        return math.inf
    return path_cost(problem.prices(problem.objective_weights), answer.layout.pools, answer.settled.path.steps)


def path_cost(prices: PoolPrices, pools: Pools, steps: Sequence[Step]) -> float:
    """What the pools of a path cost together."""
    return float(
        sum(
            prices.per_instance[e] * float(pools.instances[e, p]) + prices.per_watt[e] * float(pools.watts[e, p])
            for p, way in steps
            for e in way
        )
    )


def as_found(fleets: Fleets, answer: Cheapest, answers: list[Cheapest]) -> Found:
    """A path as the fleet it stands for."""
    boundaries, path, alone = fleets.boundaries, answer.settled.path, fleets.layouts[0].pools
    cost, *by_pools = (own_cost(fleets.problem, each) for each in (answer, *answers))
    by_pools = tuple(by_pools)
    if not path.steps:
        none = nothing(boundaries.n_evaluated, fleets.description(), certified=fleets.certified)
        return replace(none, by_pools=by_pools)
    pools = answer.layout.pools
    ends = [pools.ends(np.array(step.pool)) for step in path.steps]
    upper = [int(high) for _, high in ends]
    counts = [[float(pools.instances[e, step.pool]) for e in step.way] for step in path.steps]
    of_whole = fleets.problem.service.serve == "mixed"
    return Found(
        cost=cost,
        lanes=tuple(pools.offers.lane(step.way) for step in path.steps),
        window_tokens=boundaries.window_tokens[upper],
        gamma=boundaries.gamma[upper],
        n_instances=instances_of(counts),
        certified=fleets.certified,
        n_evaluated=boundaries.n_evaluated,
        candidates=fleets.description(),
        lower_bound=cost if fleets.certified else None,
        by_pools=by_pools,
        homogeneous_w=float(np.min(alone.watts)) if of_whole else None,
        one_pool=best_alone(fleets.problem, alone.instances[:, 0], alone.watts[:, 0]) if of_whole else None,
    )


def instances_of(counts: list[list[float]]) -> np.ndarray:
    """Instances of lanes [K]; [K, 2] where one has two stages, 0 behind those of lanes with one."""
    most = max(map(len, counts))
    rows = np.array([row + [0.0] * (most - len(row)) for row in counts])
    return rows[:, 0] if most == 1 else rows


def homogeneous(problem: Problem) -> tuple[float, OnePoolFleet | None]:
    """(least power [W], the best by the objective) of one pool of the full window, its instances serving requests
    whole; (inf, None) where none holds the limits."""
    if not problem.specs:
        return math.inf, None
    problem = problem.serving(serve="mixed")
    alone, ends = Boundaries(problem, np.zeros(0), np.zeros(0)), (np.array([0]), np.array([1]))
    found = [alone.exact(e, *ends) for e in range(len(problem.specs))]
    instances, watts = np.concatenate(found, axis=1)
    return float(np.min(watts)), best_alone(problem, instances, watts)


def best_alone(problem: Problem, instances: np.ndarray, watts: np.ndarray) -> OnePoolFleet | None:
    """The best of the only pool with each engine [E]."""
    if not np.isfinite(watts).any():
        return None

    def used(weights: Weights) -> np.ndarray:
        of, some = problem.prices(weights), np.isfinite(watts)  # 0 times inf is not 0
        return np.where(
            some, of.per_instance * np.where(some, instances, 0) + of.per_watt * np.where(some, watts, 0), np.inf
        )

    e = int(np.argmin(used(problem.search_weights)))
    spec, n = problem.specs[e], round(float(instances[e]))
    return OnePoolFleet(
        gpu=spec.gpu_name,
        **vars(spec.split),
        n_instances=n,
        n_gpus=n * spec.split.n_gpus,
        power_w=float(watts[e]),
        usd_per_h=float(used(Weights(usd_per_h=1.0))[e]),
        kg_co2_per_h=float(used(Weights(kg_co2_per_h=1.0))[e]),
        tok_per_j=demanded_tok_per_s(problem) / float(watts[e]),
    )
