"""Brute force: every candidate threshold and gamma at once, batched. The reference the other methods are held to."""

import itertools
import math

import numpy as np

from fleetopt_jax.optimize.candidates import Candidate, Progress, Scorer, gamma_grid, spread
from fleetopt_jax.optimize.plan import thresholds

MAX_CANDIDATES = 400_000


def search(scorer: Scorer, progress: Progress | None = None) -> tuple[Candidate, bool]:
    """The best candidate, and whether every candidate was tried.

    Where thresholds x gammas over all boundaries exceed 400,000 combinations, evenly spaced thresholds are combined
    and the best is improved by coordinate search over all of them: then it is not certified.
    """
    problem = scorer.problem
    n_boundaries = problem.n_pools - 1
    options, gammas = thresholds(problem), gamma_grid(problem)
    kept = options[spread(len(options), _affordable(len(options), len(gammas), n_boundaries))]
    windows = np.array(list(itertools.combinations_with_replacement(kept, n_boundaries))).reshape(-1, n_boundaries)
    boundary_gammas = np.array(list(itertools.product(gammas, repeat=n_boundaries))).reshape(-1, n_boundaries)
    window_rows = np.repeat(windows, len(boundary_gammas), axis=0)
    gamma_rows = np.tile(boundary_gammas, (len(windows), 1))
    window_rows = np.pad(window_rows, ((0, 0), (0, 1)), constant_values=problem.window_tokens)
    gamma_rows = np.pad(gamma_rows, ((0, 0), (0, 1)), constant_values=1.0)
    costs = scorer(window_rows, gamma_rows, progress)
    best = int(np.argmin(costs))
    candidate = (costs[best], window_rows[best], gamma_rows[best])
    if len(kept) == len(options):
        return candidate, True
    return scorer.descend(*candidate[1:]), False


def _affordable(n_options: int, n_gammas: int, n_boundaries: int) -> int:
    """The most thresholds whose combinations stay within MAX_CANDIDATES."""
    affordable = n_options
    while math.comb(affordable + n_boundaries - 1, n_boundaries) * n_gammas**n_boundaries > MAX_CANDIDATES:
        affordable = int(0.95 * affordable)
    return affordable
