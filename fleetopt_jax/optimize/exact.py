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
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.optimize.candidates import GAMMA_STEP, gamma_grid
from fleetopt_jax.optimize.graph import Boundaries, Pools, Progress, Weights, objective_weights
from fleetopt_jax.optimize.plan import GAMMA_MAX, Found, Problem, nothing
from fleetopt_jax.workload.atoms import Workload, total_tokens

MAX_BOUNDARIES = 65_536  # up to here every whole window is a candidate; beyond it, the distinct lengths
MAX_POOLS = 40_000_000  # in one table, all engines together (0.6 GB)
MAX_STAR = 3_000_000  # boundaries, all engines together, between two pools
MAX_GAMMA_NODES = 2500  # boundaries (a window and a gamma) for three pools and more
NEAR = 12  # windows on either side of the best that are searched again, with
NEAR_GAMMA = 0.15  # gammas within this
TILE = 256  # nodes on a side of the square of pools that is bounded in one call
LATTICE = 48  # nodes of the first, coarse search
ROUND = 65_536  # pools made exact at once
BLOCK_ROWS = 32  # of a table that stay in the cache together
STAR_SEEDS = 512  # boundaries made exact before two pools are searched
SAME = 1e-12  # costs are compared this loosely


class Step(NamedTuple):
    """One pool of a path: its index among the pools, and its engine."""

    pool: int
    engine: int


class Path(NamedTuple):
    cost: float
    steps: tuple[Step, ...]


NO_PATH = Path(math.inf, ())


@dataclass(frozen=True)
class Settled:
    """The cheapest path, and the certificate: no path is cheaper than `lower_bound`."""

    path: Path
    lower_bound: float


class Alone:
    """One pool."""

    def __init__(self, boundaries: Boundaries):
        ends = np.array([0]), np.array([boundaries.last])
        found = [boundaries.bounds(e, *ends) for e in range(len(boundaries.problem.choices))]
        self.pools = Pools(boundaries, lambda index: (ends[0][index], ends[1][index]), *map(np.stack, zip(*found)))

    def seeds(self) -> np.ndarray:
        """Pools made exact before anything is searched."""
        return np.zeros(1, int)

    def best(self, costs: np.ndarray, k: int) -> tuple[float, list[int]]:
        """The cheapest path of at most k pools: its cost and its pools, under the costs of all pools."""
        return float(costs[0]), [0]

    def undecided(self, costs: np.ndarray, own: np.ndarray, k: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
        """(pools, cost of the cheapest path through each) where that is below `limit`: the pool at its `own` cost, the
        rest at `costs`."""
        index = np.flatnonzero(own < limit)
        return index, own[index]


class Star:
    """Two pools: from nothing to each of S boundaries, and from each to the end. Pools [2 S]."""

    def __init__(self, boundaries: Boundaries, inner: np.ndarray):
        self.size = s = len(inner)

        def ends(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            first, node = index < s, inner[index % s]
            return np.where(first, 0, node), np.where(first, node, boundaries.last)

        found = [boundaries.bounds(e, *ends(np.arange(2 * s))) for e in range(len(boundaries.problem.choices))]
        self.pools = Pools(boundaries, ends, *map(np.stack, zip(*found)))

    def seeds(self) -> np.ndarray:
        spread = np.unique(np.linspace(0, self.size - 1, min(self.size, STAR_SEEDS)).astype(int))
        return np.concatenate([spread, spread + self.size])

    def best(self, costs: np.ndarray, k: int) -> tuple[float, list[int]]:
        both = costs[: self.size] + costs[self.size :]
        i = int(np.argmin(both))
        return float(both[i]), [i, i + self.size]

    def undecided(self, costs: np.ndarray, own: np.ndarray, k: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
        through = own + np.concatenate([costs[self.size :], costs[: self.size]])
        index = np.flatnonzero(through < limit)
        return index, through[index]


class Web:
    """At most K pools: between any two of D nodes, the first nothing, the last the promised window. Pools [D^2]."""

    def __init__(self, boundaries: Boundaries, nodes: np.ndarray, progress: Progress | None):
        self.size = d = len(nodes)

        def ends(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return nodes[index // d], nodes[index % d]

        shape = len(boundaries.problem.choices), d, d
        instances = np.full(shape, np.inf, np.float32)  # whole numbers: exact up to 16 million
        watts = np.full(shape, np.inf)
        starts = range(0, d, TILE)
        tiles = [(e, i, j) for e in range(shape[0]) for i in starts for j in starts if j >= i]
        for done, (e, i, j) in enumerate(tiles):
            lower, upper = (nodes[np.minimum(np.arange(start, start + TILE), d - 1)] for start in (i, j))
            found = boundaries.bounds(e, np.repeat(lower, TILE), np.tile(upper, TILE))
            for table, values in zip((instances, watts), found):
                part = table[e, i : i + TILE, j : j + TILE]
                part[:] = values.reshape(TILE, TILE)[: part.shape[0], : part.shape[1]]
            if progress:
                progress(done + 1, len(tiles))
        self.pools = Pools(boundaries, ends, instances.reshape(shape[0], -1), watts.reshape(shape[0], -1))

    def seeds(self) -> np.ndarray:
        """The first and the last pool at every node, and all between nodes of a coarse lattice."""
        d = self.size
        inner = np.arange(1, d - 1)
        lattice = np.unique(np.linspace(0, d - 1, min(d, LATTICE)).astype(int))
        lower, upper = (lattice[index] for index in np.triu_indices(len(lattice), 1))
        return np.unique(np.concatenate([inner, inner * d + d - 1, lower * d + upper]))

    def best(self, costs: np.ndarray, k: int) -> tuple[float, list[int]]:
        square = costs.reshape(self.size, self.size)
        to = self._to(square, k - 1)
        last = to[-1] + square[:, -1]
        node = int(np.argmin(last))
        steps = [node * self.size + self.size - 1]
        for m in range(k - 1, 0, -1):
            if node == 0:
                break
            if to[m - 1][node] == to[m][node]:  # with one pool fewer as well
                continue
            before = int(np.argmin(to[m - 1] + square[:, node]))
            steps.append(before * self.size + node)
            node = before
        return float(last.min()), steps[::-1]

    def undecided(self, costs: np.ndarray, own: np.ndarray, k: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
        d = self.size
        square, mine = costs.reshape(d, d), own.reshape(d, d)
        to, onwards = self._to(square, k - 1), self.onwards(square, k - 1)
        found, through = [], []
        for rows in self._blocks():
            columns = slice(rows.start, d)
            rest = np.min([to[m][rows, None] + onwards[k - 1 - m][None, columns] for m in range(k)], axis=0)
            rest += mine[rows, columns]
            i, j = np.nonzero(rest < limit)
            found.append((rows.start + i) * d + rows.start + j)
            through.append(rest[i, j])
        return np.concatenate(found), np.concatenate(through)

    def _blocks(self) -> list[slice]:
        return [slice(start, min(start + BLOCK_ROWS, self.size)) for start in range(0, self.size, BLOCK_ROWS)]

    def _to(self, square: np.ndarray, k: int) -> list[np.ndarray]:
        """The least cost from the first node to each with at most 0 ... k pools; a pool leads to a later node."""
        nothing_ = np.full(self.size, np.inf)
        nothing_[0] = 0.0
        layers = [nothing_]
        for m in range(k):
            nearer = np.minimum(layers[-1], square[0]) if m == 0 else layers[-1].copy()
            for rows in self._blocks() if m else ():
                columns = slice(rows.start, self.size)
                step = np.min(square[rows, columns] + layers[-1][rows, None], axis=0)
                np.minimum(nearer[columns], step, out=nearer[columns])
            layers.append(nearer)
        return layers

    def onwards(self, square: np.ndarray, k: int) -> list[np.ndarray]:
        """The least cost from each node to the last with at most 0 ... k pools."""
        nothing_ = np.full(self.size, np.inf)
        nothing_[-1] = 0.0
        layers = [nothing_]
        for m in range(k):
            nearer = np.minimum(layers[-1], square[:, -1]) if m == 0 else layers[-1].copy()
            for rows in self._blocks() if m else ():
                columns = slice(rows.start, self.size)
                step = np.min(square[rows, columns] + layers[-1][None, columns], axis=1)
                np.minimum(nearer[rows], step, out=nearer[rows])
            layers.append(nearer)
        return layers


Layout = Alone | Star | Web
L = TypeVar("L", Alone, Star, Web)


def settle(layout: Layout, weights: Weights, k: int) -> Settled:
    """The cheapest path of at most k pools, with exact costs."""
    pools = layout.pools
    known = np.min(
        [np.where(pools.is_exact[e], pools.costs(weights, e), np.inf) for e in range(pools.n_engines)], axis=0
    )
    _, path = layout.best(known, k)
    best = _as_exact(pools, weights, path)
    while True:
        costs = [pools.costs(weights, e) for e in range(pools.n_engines)]
        cheapest = costs[0] if len(costs) == 1 else np.min(costs, axis=0)
        bound, path = layout.best(cheapest, k)
        if not bound < best.cost * (1.0 - SAME):
            return Settled(best, best.cost)
        limit = best.cost * (1.0 - SAME)
        for e, cost in enumerate(costs):
            own = np.where(pools.is_exact[e], np.inf, cost)
            index, through = layout.undecided(cheapest, own, k, limit)
            if len(index) > ROUND:
                index = index[np.argpartition(through, ROUND // 4)[: ROUND // 4]]
            pools.make_exact(e, np.concatenate([index, path]).astype(int))
        best = min(best, _as_exact(pools, weights, path), key=lambda each: each.cost)


def _as_exact(pools: Pools, weights: Weights, path: list[int]) -> Path:
    """The path with its exact costs, each pool with the engine that is best where it is exact."""
    steps, total = [], 0.0
    for p in path:
        costs = [pools.costs(weights, e)[p] if pools.is_exact[e, p] else math.inf for e in range(pools.n_engines)]
        e = int(np.argmin(costs))
        steps.append(Step(p, e))
        total += costs[e]
    return Path(float(total), tuple(steps)) if math.isfinite(total) else NO_PATH


class Answer(NamedTuple):
    """The best of at most so many pools, and whose pools its path counts."""

    layout: Layout
    settled: Settled

    @property
    def cost(self) -> float:
        return self.settled.path.cost


class Fleets:
    """All fleets of at most K pools over the candidates of a problem."""

    def __init__(self, problem: Problem, progress: Progress | None = None, max_pools: int = MAX_POOLS):
        if problem.slo.scope == "fleet":
            raise BadInput("method exact", "limits of the whole fleet couple its pools", "need method grid or gradient")
        self.problem, self._progress, self._max_pools = problem, progress, max_pools
        windows, gammas = candidates(problem)
        self.boundaries = Boundaries(problem, windows, gammas)
        self._inner = np.arange(1, self.boundaries.last)
        self.layouts: list[Layout] = [seeded(Alone(self.boundaries))]
        if problem.n_pools > 1 and len(windows):
            self.layouts.append(seeded(Star(self.boundaries, self._inner)))
        if problem.n_pools > 2 and len(windows):
            self.layouts.append(self._web(self.web_nodes()))

    def cheapest(self, weights: Weights) -> list[Answer]:
        """For k = 1 ... K, the best of at most k pools."""
        best: list[Answer] = []
        for k in range(1, self.problem.n_pools + 1):
            layout = self.layouts[min(k, len(self.layouts)) - 1]
            answer = Answer(layout, settle(layout, weights, k))
            if self.problem.gamma is None and isinstance(layout, Web) and answer.settled.path.steps:
                near = self._web(self._near_nodes(answer))
                answer = min(answer, Answer(near, settle(near, weights, k)), key=lambda each: each.cost)
            best.append(min([*best[-1:], answer], key=lambda each: each.cost))
        return best

    def cheapest_of_all(self, weights: Weights) -> Answer:
        """The best of at most K pools, without the smaller numbers."""
        answers = [Answer(layout, settle(layout, weights, self.problem.n_pools)) for layout in self.layouts]
        return min(answers, key=lambda each: each.cost)

    @property
    def certified(self) -> bool:
        """Whether no fleet over the candidates is cheaper than the cheapest found."""
        return self.problem.gamma is not None or len(self.layouts) < 3

    def said(self) -> str:
        """What the candidates are, in words."""
        n = len(np.unique(self.boundaries.window_tokens)) - 2
        gamma = "" if self.problem.gamma is not None else f", gamma 1 to {GAMMA_MAX:g} by {GAMMA_STEP:g}"
        text = f"{n:,} windows{gamma}"
        if len(self.layouts) < 3:
            return text
        web = len(np.unique(self.boundaries.window_tokens[self.web_nodes()])) - 2
        return f"{text} for two pools, {web:,} windows for three and more"

    def _web(self, nodes: np.ndarray) -> Web:
        return seeded(Web(self.boundaries, nodes, self._progress))

    def web_nodes(self) -> np.ndarray:
        """Boundaries of three pools and more, as many as the table allows: multiples of 16 tokens, or of 32, ..."""
        n_engines = len(self.problem.choices)
        windows, inner = self.boundaries.window_tokens, self._inner
        if self.problem.gamma is None:
            options = np.unique(windows[inner])
            most = max(
                2, int(min(MAX_GAMMA_NODES, (self._max_pools / n_engines) ** 0.5)) // len(gamma_grid(self.problem))
            )
            kept = np.isin(windows[inner], options[_evenly(self.problem.workload, options, most)])
        else:
            grain = BLOCK_TOKENS
            while n_engines * np.sum(windows[inner] % grain == 0) ** 2 > self._max_pools:
                grain *= 2
            kept = windows[inner] % grain == 0
        return np.concatenate([[0], inner[kept], [self.boundaries.last]])

    def _near_nodes(self, answer: Answer) -> np.ndarray:
        """Boundaries around those of a path: every window and gamma near each."""
        windows, gammas = self.boundaries.window_tokens, self.boundaries.gamma
        options = np.unique(windows[self._inner])
        uppers = [answer.layout.pools.ends(np.array(step.pool))[1] for step in answer.settled.path.steps[:-1]]
        kept = np.zeros(len(windows), bool)
        for node in uppers:
            rank = np.searchsorted(options, windows[node])
            near = options[max(rank - NEAR, 0) : rank + NEAR + 1]
            kept |= np.isin(windows, near) & (np.abs(gammas - gammas[node]) <= NEAR_GAMMA + SAME)
        inner = self._inner[kept[self._inner]]
        return np.concatenate([[0], inner, [self.boundaries.last]])


def seeded(layout: L) -> L:
    """The layout with its seeds made exact."""
    for e in range(layout.pools.n_engines):
        layout.pools.make_exact(e, layout.seeds())
    return layout


def candidates(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(windows, gammas) [S] of the boundaries below the promised window."""
    window, gammas = problem.window_tokens, gamma_grid(problem)
    lengths = np.unique(np.ceil(np.asarray(total_tokens(problem.workload))))
    blocks = np.arange(BLOCK_TOKENS, window, BLOCK_TOKENS)
    affordable = MAX_STAR // (len(gammas) * len(problem.choices))
    if window <= min(MAX_BOUNDARIES, affordable):
        options = np.arange(1.0, window)
    elif window <= MAX_BOUNDARIES:
        options = blocks[_evenly(problem.workload, blocks, affordable)]
    else:
        ends = np.unique(np.append(lengths, np.ceil(lengths / (problem.gamma or 1.0))))
        options = np.unique(np.append(ends, BLOCK_TOKENS * np.ceil(ends / BLOCK_TOKENS)))
        options = options[options < window]
        options = options[_evenly(problem.workload, options, affordable)]
    return np.repeat(options, len(gammas)), np.tile(gammas, len(options))


def _evenly(workload: Workload, options: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most so many options, even in a mean of three measures: requests, tokens and log-length."""
    if len(options) <= most:
        return np.arange(len(options))
    total, weight = np.asarray(total_tokens(workload)), np.asarray(workload.weight)
    below = np.searchsorted(total, options, side="right")
    measures = [np.append(0.0, np.cumsum(mass))[below] for mass in (weight, weight * total)]
    rank = sum(
        (each / max(each[-1], SAME) for each in measures),
        np.log(options / options[0]) / np.log(options[-1] / options[0]),
    )
    n, kept = most, np.zeros(0)
    while len(kept) < 0.95 * most and n < 64 * most:  # several may fall on one option
        kept, n = np.unique(np.searchsorted(rank, np.linspace(rank[0], rank[-1], n)).clip(0, len(rank) - 1)), n * 5 // 4
    return kept[:: 1 + len(kept) // (most + 1)] if len(kept) > most else kept


def search(problem: Problem, progress: Progress | None = None) -> Found:
    """The cheapest fleet over the candidates."""
    fleets = Fleets(problem, progress)
    answers = fleets.cheapest(objective_weights(problem))
    return as_found(fleets, answers[-1], answers)


def as_found(fleets: Fleets, answer: Answer, answers: list[Answer]) -> Found:
    """A path as the fleet it stands for."""
    boundaries, path = fleets.boundaries, answer.settled.path
    if not path.steps:
        none = nothing(boundaries.n_evaluated, fleets.said(), certified=fleets.certified)
        return replace(none, by_pools=tuple(each.cost for each in answers))
    upper = [int(answer.layout.pools.ends(np.array(step.pool))[1]) for step in path.steps]
    return Found(
        cost=path.cost,
        choices=tuple(fleets.problem.choices[step.engine] for step in path.steps),
        window_tokens=boundaries.window_tokens[upper],
        gamma=boundaries.gamma[upper],
        n_instances=np.array([answer.layout.pools.instances[step.engine, step.pool] for step in path.steps], float),
        certified=fleets.certified,
        n_evaluated=boundaries.n_evaluated,
        candidates=fleets.said(),
        lower_bound=path.cost if fleets.certified else None,
        by_pools=tuple(each.cost for each in answers),
        homogeneous_w=float(np.min(fleets.layouts[0].pools.watts)),
    )


def homogeneous_w(problem: Problem) -> float:
    """Power of the best fleet with one pool of the full window [W]; inf where none holds the limits."""
    alone = seeded(Alone(Boundaries(problem, np.zeros(0), np.zeros(0))))
    return float(np.min(alone.pools.watts))
