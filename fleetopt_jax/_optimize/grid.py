"""Brute force: every candidate threshold and gamma at once, batched. The reference the other methods are held to."""

import itertools
import math
from dataclasses import replace

import numpy as np

from fleetopt_jax._optimize.candidates import Candidate, Scorer, effort_of, gamma_grid, over_assignments, spread
from fleetopt_jax._optimize.plan import Found
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.core.progress import Progress

OF_LENGTHS = "the distinct request lengths as windows"
UNPROVED = (
    ", each pool with the least instances found to hold its limits; no proof is given: what a pool finds in its cache "
    "changes with its instances, so that more of them may take less power"
)

GAMMA_RADIUS = 0.12  # windows within this factor of the best are tried then


def search(problem: Problem, progress: Progress | None = None) -> Found:
    """The best candidate over every assignment of engines to pools."""
    cached = problem.assumptions.prefix_cache.reads_reuse
    found = over_assignments(problem, search_one, progress, OF_LENGTHS + (UNPROVED if cached else ""))
    return replace(found, certified=False) if cached else found


def search_one(scorer: Scorer, progress: Progress | None = None) -> tuple[Candidate, bool]:
    """The best candidate of one assignment, and whether every candidate was tried.

    Where thresholds over all boundaries exceed 150,000 combinations (160 where candidates are dear: `effort_of`), or
    gamma is searched too, evenly spaced ones are combined and the best of them is improved by coordinate search: then
    it is not certified. Fewer boundaries than asked are searched first, the other pools left empty: more pools are
    never worse, and all compile once.
    """
    problem = scorer.problem
    alone = np.full(problem.n_pools, problem.window_tokens), np.ones(problem.n_pools)
    best, exhaustive = (math.inf, *alone), True
    if problem.n_pools == 1:
        return (scorer(alone[0][None], alone[1][None])[0], *alone), True
    most = problem.n_pools - 1
    for n_boundaries in range(most if _all_affordable(scorer, most) else 1, problem.n_pools):
        candidate, exhaustive = _search(scorer, n_boundaries, progress)
        found = [best, candidate]
        if not exhaustive:
            _, windows, gammas = best  # its first pool given a twin without traffic, from which to go on
            grown = np.insert(windows[:-1], 0, windows[0]), np.insert(gammas[:-1], 0, gammas[0])
            few = effort_of(problem).radii and not math.isfinite(best[0])  # no walk from where nothing is known
            found += [_walked(scorer, start) for start in (candidate[1:], *(() if few else (grown,)))]
        best = min(found, key=lambda each: each[0])
    return best, exhaustive


def _walked(scorer: Scorer, start: tuple[np.ndarray, np.ndarray]) -> Candidate:
    """Where coordinate searches lead from one candidate, each within a smaller radius than the one before."""
    radii = effort_of(scorer.problem).radii or (math.inf if scorer.problem.gamma is not None else GAMMA_RADIUS,)
    found = scorer.descend(*start, radius=radii[0])
    for radius in radii[1:]:
        found = scorer.descend(*found[1:], radius=radius)
    return found


def _search(scorer: Scorer, n_boundaries: int, progress: Progress | None) -> tuple[Candidate, bool]:
    """The best of the candidates with so many boundaries, and whether these are all there are."""
    problem = scorer.problem
    options, gammas = scorer.thresholds, gamma_grid(problem)
    effort = effort_of(problem)
    most = effort.every if _all_affordable(scorer, n_boundaries) else effort.coarse
    kept_gammas = gammas[spread(len(gammas), int(most ** (0.5 / n_boundaries)))]
    affordable = _affordable(len(options), most // len(kept_gammas) ** n_boundaries, n_boundaries)
    kept = options[spread(len(options), affordable)]
    windows = np.array(list(itertools.combinations_with_replacement(kept, n_boundaries)))
    boundary_gammas = np.array(list(itertools.product(kept_gammas, repeat=n_boundaries)))
    rest = ((0, 0), (0, problem.n_pools - n_boundaries))
    window_rows = np.pad(np.repeat(windows, len(boundary_gammas), axis=0), rest, constant_values=problem.window_tokens)
    gamma_rows = np.pad(np.tile(boundary_gammas, (len(windows), 1)), rest, constant_values=1.0)
    costs = scorer(window_rows, gamma_rows, progress)
    best = int(np.argmin(costs))
    complete = len(kept) == len(options) and len(kept_gammas) == len(gammas)
    return (costs[best], window_rows[best], gamma_rows[best]), complete


def _all_affordable(scorer: Scorer, n_boundaries: int) -> bool:
    """Whether every combination of thresholds can be tried: those with fewer boundaries are among them."""
    combinations = math.comb(len(scorer.thresholds) + n_boundaries - 1, n_boundaries)
    return scorer.problem.gamma is not None and combinations <= effort_of(scorer.problem).every


def _affordable(n_options: int, n_combinations: int, n_boundaries: int) -> int:
    """The most thresholds, at least 2, whose combinations over the boundaries stay within the number given."""
    affordable = n_options
    while affordable > 2 and math.comb(affordable + n_boundaries - 1, n_boundaries) > n_combinations:
        affordable = max(2, int(0.95 * affordable))
    return affordable
