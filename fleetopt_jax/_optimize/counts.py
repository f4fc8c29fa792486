"""The fewest instances with which a fleet holds its limits in a given share of scenarios.

Where pools have limits of their own, what a pool needs in a scenario does not depend on the others: from the least
instances of each pool in each scenario, [n, K], the cheapest counts under which that share of the rows lie are found
exactly for one and two pools, and for more by exchanges between every two until none is cheaper.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np

Costs = Callable[[int, np.ndarray], np.ndarray]  # of pool k with so many instances [m]


def rows_for(share: float, n: int) -> int:
    """How many of n scenarios a share of them is."""
    return max(1, math.ceil(share * n - 1e-9))


def share_held(needed: np.ndarray, n_instances: np.ndarray) -> float:
    """The share of the scenarios [n] in which so many instances [K] are enough of each pool."""
    return float(np.mean(np.all(needed <= n_instances, axis=1)))


def cheapest_counts(needed: np.ndarray, costs: Costs, share: float) -> np.ndarray | None:
    """The cheapest instances [K] that are enough in that share of the scenarios; None where no numbers are."""
    rows, m = needed[np.isfinite(needed).all(axis=1)], rows_for(share, len(needed))
    if len(rows) < m:
        return None
    ranks = np.argsort(np.argsort(rows, axis=0, kind="stable"), axis=0, kind="stable")
    easiest = np.argsort(ranks.max(axis=1), kind="stable")[:m]
    n = rows[easiest].max(axis=0)
    k = range(rows.shape[1])
    while True:
        before = n.copy()
        for i, j in itertools.combinations(k, 2):
            others = np.array([each for each in k if each not in (i, j)], int)
            left = rows[np.all(rows[:, others] <= n[others], axis=1)]
            n[[i, j]] = _cheapest_two(left[:, i], left[:, j], m, lambda x, i=i: costs(i, x), lambda x, j=j: costs(j, x))
        if np.array_equal(n, before):
            return n


def _cheapest_two(
    a: np.ndarray,
    b: np.ndarray,
    m: int,
    cost_a: Callable[[np.ndarray], np.ndarray],
    cost_b: Callable[[np.ndarray], np.ndarray],
) -> tuple[float, float]:
    """The cheapest (x, y) with a <= x and b <= y in m of the rows, of which there are as many."""
    order = np.argsort(a, kind="stable")
    a, b = a[order], b[order]
    xs = a[m - 1 :]
    ys = np.array([np.partition(b[:t], m - 1)[m - 1] for t in range(m, len(b) + 1)])
    best = int(np.argmin(cost_a(xs) + cost_b(ys)))
    return float(xs[best]), float(ys[best])
