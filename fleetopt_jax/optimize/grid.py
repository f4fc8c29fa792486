"""Brute force: every candidate threshold and gamma at once, batched. The reference the other methods are held to."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fleetopt_jax.optimize.candidates import Candidate, Progress, Scorer, gamma_grid, spread

MAX_CANDIDATES = 150_000
MAX_WITH_GAMMA = 12_000  # where gamma is searched as well: coarse first, then around the best
GAMMA_RADIUS = 0.12  # windows within this factor of the best are tried then


def search(scorer: Scorer, progress: Progress | None = None) -> tuple[Candidate, bool]:
    """The best candidate, and whether every candidate was tried.

    Where thresholds over all boundaries exceed 150,000 combinations, or gamma is searched too, evenly spaced ones are
    combined, and the best of them and the answer for one pool less are improved by coordinate search: then it is not
    certified.
    """
    problem = scorer.problem
    n_boundaries = problem.n_pools - 1
    options, gammas = scorer.thresholds, gamma_grid(problem)
    most = MAX_CANDIDATES if len(gammas) == 1 else MAX_WITH_GAMMA
    kept_gammas = gammas[spread(len(gammas), int(most ** (0.5 / max(n_boundaries, 1))))]
    affordable = _affordable(len(options), most // len(kept_gammas) ** n_boundaries, n_boundaries)
    kept = options[spread(len(options), affordable)]
    windows = _rows(itertools.combinations_with_replacement(kept, n_boundaries), n_boundaries)
    boundary_gammas = _rows(itertools.product(kept_gammas, repeat=n_boundaries), n_boundaries)
    window_rows = np.repeat(windows, len(boundary_gammas), axis=0)
    gamma_rows = np.tile(boundary_gammas, (len(windows), 1))
    window_rows = np.pad(window_rows, ((0, 0), (0, 1)), constant_values=problem.window_tokens)
    gamma_rows = np.pad(gamma_rows, ((0, 0), (0, 1)), constant_values=1.0)
    costs = scorer(window_rows, gamma_rows, progress)
    best = int(np.argmin(costs))
    candidate = (costs[best], window_rows[best], gamma_rows[best])
    if len(kept) == len(options) and len(kept_gammas) == len(gammas):
        return candidate, True
    radius = math.inf if len(gammas) == 1 else GAMMA_RADIUS
    found = [scorer.descend(*candidate[1:], radius=radius)]
    if problem.n_pools > 2:  # never worse than one pool less: its answer with an empty second pool is where to go on
        fewer = Scorer(replace(problem, n_pools=problem.n_pools - 1), scorer.choices[:1] + scorer.choices[2:])
        (_, windows, gammas), _ = search(fewer)
        scorer.n_evaluated += fewer.n_evaluated
        found.append(scorer.descend(np.insert(windows, 0, windows[0]), np.insert(gammas, 0, gammas[0]), radius=radius))
    return min(found, key=lambda each: each[0]), False


def _affordable(n_options: int, n_combinations: int, n_boundaries: int) -> int:
    """The most thresholds, at least 2, whose combinations over the boundaries stay within the number given."""
    affordable = n_options
    while affordable > 2 and math.comb(affordable + n_boundaries - 1, n_boundaries) > n_combinations:
        affordable = max(2, int(0.95 * affordable))
    return affordable


def _rows(combinations: Iterable[tuple[float, ...]], n_columns: int) -> np.ndarray:
    """Combinations as rows; with no columns there is one, empty, combination."""
    rows = list(combinations)
    return np.array(rows, dtype=float).reshape(len(rows), n_columns)
