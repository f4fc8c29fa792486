"""All fleets of at most so many pools, as paths over edges: one pool, two pools by one boundary, many pools by nodes.

An edge is a pool, a slice of the traffic with the cheapest way to serve it; its costs are bounds until they are exact.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fleetopt_jax._optimize.graph import Boundaries, Pools
from fleetopt_jax._optimize.offers import Way
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.resources import PoolPrices

TILE = 256  # nodes on a side of the square of pools that is bounded in one call
LATTICE = 48  # nodes of the first, coarse search
BLOCK_ROWS = 32  # of a table that stay in the cache together
STAGE_SEEDS = 16  # of so many seeds one is made exact of each offer of a stage, of which there are many
TWO_POOL_SEEDS = 512  # boundaries made exact before two pools are searched
MAX_LISTED = 300_000  # fleets, finished or not, on a list; beyond it the cheapest so many

Table = list[np.ndarray]  # costs [P] of each way to serve a pool, in the order of `Offers.ways`
Takes = Callable[[int, np.ndarray], np.ndarray]  # GPUs of each kind and watts [M, G + 1] of pools [M], served in a way


class Step(NamedTuple):
    """One pool of a path: its index among the pools, and the offers that serve it."""

    pool: int
    way: Way


class Path(NamedTuple):
    cost: float
    steps: tuple[Step, ...]


class Below(NamedTuple):
    """Paths that cost less than a ceiling: of all that take the same GPUs of each kind the one of the least watts."""

    takes: np.ndarray  # GPUs of each kind and watts [M, G + 1]
    codes: np.ndarray  # pool times ways plus way, of each pool of a path [M, K]; -1 beyond its last
    complete: bool  # whether none was left out

    def steps(self, i: int, layout: "Layout") -> tuple[Step, ...]:
        """Of the i-th path."""
        ways = layout.pools.offers.ways
        return tuple(Step(int(c) // len(ways), ways[int(c) % len(ways)]) for c in self.codes[i] if c >= 0)


def by_gpus(takes: np.ndarray) -> np.ndarray:
    """The rows [m] of the least watts, one for each number of GPUs of every kind that is among them."""
    order = np.lexsort(takes.T[::-1])  # by GPUs, then watts
    differs = np.any(takes[order[1:], :-1] != takes[order[:-1], :-1], axis=1)
    return order[np.append(True, differs)] if len(order) else order


class Layout:
    """Pools that paths are made of. Subclasses hold `pools`, of which each path takes some."""

    pools: Pools
    refinable = False  # whether its nodes are some of the candidates only, so that it pays to look around the best
    most_pools: int | None = None  # of a path; None: as many as are asked for

    def seeds(self) -> np.ndarray:
        """Pools made exact before anything is searched."""
        raise NotImplementedError

    def near(self, index: np.ndarray) -> np.ndarray:
        """The seed that each of these pools is most like."""
        raise NotImplementedError

    def best(self, costs: np.ndarray, k: int) -> tuple[float, list[int]]:
        """The cheapest path of at most k pools: its cost and its pools, under the costs of all pools."""
        raise NotImplementedError

    def undecided(self, costs: np.ndarray, own: np.ndarray, k: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
        """(pools, cost of the cheapest path through each) where that is below `limit`: the pool at its `own` cost, the
        rest at `costs`."""
        raise NotImplementedError

    def listed(self, tables: list[Table], most: np.ndarray, k: int) -> tuple[tuple[Step, ...], bool]:
        """The path of the least second cost of all whose costs by each of the tables are within `most` [2 + Q], and
        whether none was left out."""
        raise NotImplementedError

    def below(self, priced: Table, takes: Takes, ceiling: float, k: int) -> Below:
        """All paths of at most k pools whose cost is at most the ceiling."""
        raise NotImplementedError

    def seeded(self) -> "Layout":
        """The layout with its seeds made exact."""
        for e, offer in enumerate(self.pools.offers.each):
            self.pools.make_exact(e, self.seeds()[:: 1 if offer.agreed is None else STAGE_SEEDS])
        return self

    def pursue(self, e: int, index: np.ndarray, prices: PoolPrices, slack: np.ndarray) -> None:
        """Make pools that are not exact so, but those whose cost rises by their slack or more."""
        self.pools.pursue(e, index, self.near(index), prices, slack)


def _nearest(sorted_: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Ranks of the nearest of some sorted values."""
    return np.searchsorted((sorted_[1:] + sorted_[:-1]) / 2.0, values)


class OnePool(Layout):
    """One pool."""

    most_pools = 1

    def __init__(self, boundaries: Boundaries):
        ends = np.array([0]), np.array([boundaries.last])
        found = boundaries.of_all(boundaries.least, *ends)
        self.pools = Pools(boundaries, lambda index: (ends[0][index], ends[1][index]), *map(np.stack, zip(*found)))

    def seeds(self) -> np.ndarray:
        return np.zeros(1, int)

    def near(self, index: np.ndarray) -> np.ndarray:
        return index

    def best(self, costs: np.ndarray, k: int) -> tuple[float, list[int]]:
        return float(costs[0]), [0]

    def undecided(self, costs: np.ndarray, own: np.ndarray, k: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
        index = np.flatnonzero(own < limit)
        return index, own[index]

    def listed(self, tables: list[Table], most: np.ndarray, k: int) -> tuple[tuple[Step, ...], bool]:
        totals = np.array([[costs[0] for costs in table] for table in tables])
        allowed = np.where(np.all(totals <= most[:, None], axis=0), totals[1], np.inf)
        e = int(np.argmin(allowed))
        return ((Step(0, self.pools.offers.ways[e]),) if np.isfinite(allowed[e]) else ()), True

    def below(self, priced: Table, takes: Takes, ceiling: float, k: int) -> Below:
        found = [w for w, costs in enumerate(priced) if costs[0] <= ceiling]
        rows = np.concatenate([takes(w, np.zeros(1, int)) for w in found]) if found else takes(0, np.zeros(0, int))
        kept = by_gpus(rows)
        return Below(rows[kept], np.array(found, int)[kept, None], True)


class TwoPools(Layout):
    """Two pools: from nothing to each of S boundaries, and from each to the end. Pools [2 S]."""

    most_pools = 2

    def __init__(self, boundaries: Boundaries, inner: np.ndarray):
        self.size = s = len(inner)
        self._spread = np.unique(np.linspace(0, s - 1, min(s, TWO_POOL_SEEDS)).astype(int))

        def ends(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            first, node = index < s, inner[index % s]
            return np.where(first, 0, node), np.where(first, node, boundaries.last)

        found = boundaries.of_all(boundaries.least, *ends(np.arange(2 * s)))
        self.pools = Pools(boundaries, ends, *map(np.stack, zip(*found)))

    def seeds(self) -> np.ndarray:
        return np.concatenate([self._spread, self._spread + self.size])

    def near(self, index: np.ndarray) -> np.ndarray:
        return self._spread[_nearest(self._spread, index % self.size)] + index // self.size * self.size

    def best(self, costs: np.ndarray, k: int) -> tuple[float, list[int]]:
        both = costs[: self.size] + costs[self.size :]
        i = int(np.argmin(both))
        return float(both[i]), [i, i + self.size]

    def undecided(self, costs: np.ndarray, own: np.ndarray, k: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
        through = own + np.concatenate([costs[self.size :], costs[: self.size]])
        open_ = through < limit
        open_[: self.size] &= ~open_[self.size :]  # the pool of long requests first: it often decides for both
        index = np.flatnonzero(open_)
        return index, through[index]

    def listed(self, tables: list[Table], most: np.ndarray, k: int) -> tuple[tuple[Step, ...], bool]:
        s, best, steps, ways = self.size, math.inf, (), self.pools.offers.ways
        for first in range(len(tables[0])):
            for second in range(len(tables[0])):
                totals = np.array([table[first][:s] + table[second][s:] for table in tables])
                allowed = np.where(np.all(totals <= most[:, None], axis=0), totals[1], np.inf)
                i = int(np.argmin(allowed))
                if allowed[i] < best:
                    best, steps = float(allowed[i]), (Step(i, ways[first]), Step(i + s, ways[second]))
        return steps, True

    def below(self, priced: Table, takes: Takes, ceiling: float, k: int) -> Below:
        s, n_ways = self.size, len(priced)
        rows, codes = takes(0, np.zeros(0, int)), np.zeros((0, 2), int)
        for first, second in itertools.product(range(n_ways), repeat=2):
            i = np.flatnonzero(priced[first][:s] + priced[second][s:] <= ceiling)
            if not len(i):
                continue
            rows = np.concatenate([rows, takes(first, i) + takes(second, i + s)])
            codes = np.concatenate([codes, np.column_stack([i * n_ways + first, (i + s) * n_ways + second])])
            kept = by_gpus(rows)
            rows, codes = rows[kept], codes[kept]
        return Below(rows, codes, True)


class ManyPools(Layout):
    """At most K pools: between any two of D nodes, the first nothing, the last the promised window. Pools [D^2]."""

    refinable = True

    def __init__(self, boundaries: Boundaries, nodes: np.ndarray, progress: Progress | None):
        self.size = d = len(nodes)
        self._lattice = np.unique(np.linspace(0, d - 1, min(d, LATTICE)).astype(int))

        def ends(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return nodes[index // d], nodes[index % d]

        shape = boundaries.n_offers, d, d
        instances = np.full(shape, np.inf, np.float32)  # whole numbers: exact up to 16 million
        watts = np.full(shape, np.inf)
        starts = range(0, d, TILE)
        tiles = [(i, j) for i in starts for j in starts if j >= i]
        for done, (i, j) in enumerate(tiles):
            lower, upper = (nodes[np.minimum(np.arange(start, start + TILE), d - 1)] for start in (i, j))
            found = boundaries.of_all(boundaries.bounds, np.repeat(lower, TILE), np.tile(upper, TILE))
            for e, of_offer in enumerate(found):
                for table, values in zip((instances, watts), of_offer):
                    part = table[e, i : i + TILE, j : j + TILE]
                    part[:] = values.reshape(TILE, TILE)[: part.shape[0], : part.shape[1]]
            if progress:
                progress(done + 1, len(tiles))
        self.pools = Pools(boundaries, ends, instances.reshape(shape[0], -1), watts.reshape(shape[0], -1))

    def seeds(self) -> np.ndarray:
        """The first and the last pool at every node, and all between nodes of a coarse lattice."""
        d = self.size
        inner = np.arange(1, d - 1)
        lower, upper = (self._lattice[index] for index in np.triu_indices(len(self._lattice), 1))
        return np.unique(np.concatenate([inner, inner * d + d - 1, lower * d + upper]))

    def near(self, index: np.ndarray) -> np.ndarray:
        d, steps = self.size, self._lattice
        lower, upper = (_nearest(steps, each) for each in (index // d, index % d))
        upper = np.maximum(upper, np.minimum(lower + 1, len(steps) - 1))
        return steps[np.minimum(lower, upper - 1)] * d + steps[upper]

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

    def listed(self, tables: list[Table], most: np.ndarray, k: int) -> tuple[tuple[Step, ...], bool]:
        """Paths grow pool by pool, each kept while the cheapest way to the end by each table leaves it within
        `most`; and whether all were kept that could be."""
        d, n_engines = self.size, len(tables[0])
        to_go = [self.onwards(np.min(table, axis=0).reshape(d, d), k) for table in tables]  # [2 + Q][k + 1][D]
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
                best, ways = float(spent[i, 1]), self.pools.offers.ways
                steps = tuple(Step(int(c) // n_engines, ways[int(c) % n_engines]) for c in trail[i])
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

    def below(self, priced: Table, takes: Takes, ceiling: float, k: int) -> Below:
        """Paths grow pool by pool; of those at a node that take the same GPUs one of the least watts goes on, for what
        follows does not depend on how it was reached."""
        d = self.size
        to_go = self.onwards(np.min(priced, axis=0).reshape(d, d), k)
        paths = _Paths(np.zeros(1, int), np.zeros(1), np.zeros_like(takes(0, np.zeros(1, int))), np.full((1, k), -1))
        done, complete = [paths.some(np.zeros(0, int))], True
        for level in range(k):
            paths = self._grown(paths, level, (priced, takes), (to_go[k - 1 - level], ceiling))
            kept = by_gpus(np.column_stack([paths.node, paths.takes]))
            if len(kept) > MAX_LISTED:
                promise = paths.spent[kept] + to_go[k - 1 - level][paths.node[kept]]
                kept, complete = kept[np.argsort(promise)[:MAX_LISTED]], False
            done.append(paths.some(kept[paths.node[kept] == d - 1]))
            paths = paths.some(kept[paths.node[kept] != d - 1])
            if not len(paths.node):
                break
        found = _joined(done)
        found = found.some(by_gpus(found.takes))
        return Below(found.takes, found.codes, complete)

    def _grown(
        self, paths: "_Paths", level: int, of_pools: tuple[Table, Takes], within: tuple[np.ndarray, float]
    ) -> "_Paths":
        """The same with one pool more, where the cheapest way to go [D] leaves them at or below the ceiling."""
        (priced, takes), (to_go, ceiling) = of_pools, within
        d, k = self.size, paths.codes.shape[1]
        grown = [paths.some(np.zeros(0, int))]
        for i in np.unique(paths.node):
            upper = np.arange(d - 1 if level == k - 1 else i + 1, d)
            here = paths.some(np.flatnonzero(paths.node == i))
            for way, costs in enumerate(priced):
                own = costs[i * d + upper]
                near = np.flatnonzero(here.spent.min() + own + to_go[upper] <= ceiling)
                total = here.spent[:, None] + own[near][None]
                r, m = np.nonzero(total + to_go[upper[near]][None] <= ceiling)
                pool, further = i * d + upper[near[m]], here.some(r)
                further.codes[:, level] = pool * len(priced) + way
                grown.append(_Paths(upper[near[m]], total[r, m], further.takes + takes(way, pool), further.codes))
        return _joined(grown)


class _Paths(NamedTuple):
    """Paths that have come to a node, arrays [M] or [M, ...]."""

    node: np.ndarray
    spent: np.ndarray
    takes: np.ndarray
    codes: np.ndarray

    def some(self, rows: np.ndarray) -> "_Paths":
        return _Paths(*(each[rows] for each in self))


def _joined(parts: list[_Paths]) -> _Paths:
    return _Paths(*(np.concatenate(each) for each in zip(*parts)))
