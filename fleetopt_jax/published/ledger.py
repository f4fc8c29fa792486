"""The ledger: from the published system to the physical one, a choice at a time, everything else re-optimised.

Row 0 is the paper's own procedure with its sampling. Each later row switches one choice of `Assumptions` and answers
again: the best homogeneous fleet, the best two pools, and the best two pools with compression (FleetOpt). The last of
them is the preset `physical`. Where a prefix cache is assumed, one row more has the same of fleets that all have it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.problem import Problem, make_problem
from fleetopt_jax._optimize.search import homogeneous_tok_per_j, optimize, optimize_as_compressing
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.documents.ledger import LedgerRow
from fleetopt_jax.fleet.assumptions import CHOICES, PHYSICAL, PUBLISHED, SAMPLED, Assumptions
from fleetopt_jax.fleet.choices.prefix_cache import NoPrefixCache, PrefixCache, not_searched
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.fleet.surroundings import Surroundings
from fleetopt_jax.published.procedure import Knots, SampledFleet, sampled_homogeneous, sampled_two_pool
from fleetopt_jax.workload.atoms import Workload, total_tokens

PAPER_WINDOWS = {"azure-cdf": 4096, "lmsys-cdf": 1536}  # the short windows of table 3
PAPER_GAMMA = 2.0
N_KNOTS = 18  # of the CDF the sampled procedure sees of a trace; the paper's CDFs have as many
SAMPLED_WINDOWS = tuple(512 * 2**i for i in range(8))  # short windows the sampled row tries where the paper has none


def ledger(
    workload: Workload,
    specs: Callable[[Assumptions], Sequence[EngineSpec]],
    *,
    slo: Slo,
    name: str = "workload",
    knots: Knots | None = None,
    output_share: float = PUBLISHED.output_share,
    window_tokens: float | None = None,
    surroundings: Surroundings | None = None,
    prefix_cache: PrefixCache | None = None,
    progress: Progress | None = None,
) -> list[LedgerRow]:
    """The rows for `workload`; `specs(assumptions)` gives the engines a pool may have under the choice `engine`.

    `knots` are a CDF's own; of a trace, the quantiles the sampled procedure sees are taken. The sampled row has the
    paper's limits whatever `slo` says: they are part of the procedure. `window_tokens` and `surroundings` as in
    `make_problem`, which refuses what cannot be asked. `prefix_cache` adds a row, of fleets that find in it what it
    says; the others are as without.
    """
    cache = prefix_cache or NoPrefixCache()
    if cache.reads_reuse:
        raise not_searched("a ledger")
    rate_per_s = float(workload.arrival_rate_per_s)
    rows = [_sampled_row(build(specs(PUBLISHED)[0]), knots or _quantile_knots(workload), name, rate_per_s)]
    current = replace(PUBLISHED, integration=SAMPLED, output_share=output_share)
    switched = {choice: getattr(PHYSICAL, choice) for choice in CHOICES} | (
        {"prefix_cache": cache} if cache.finds else {}
    )
    for done, (choice, after) in enumerate(switched.items()):
        before = getattr(current, choice)
        current = replace(current, **{choice: after})
        if progress:
            progress(done, len(switched))
        problem = make_problem(
            workload,
            specs(current),
            slo=slo if current.tail.has_distribution else replace(slo, scope="pool"),
            workload_name=name,
            assume="ledger",
            assumptions=current,
            window_tokens=window_tokens,
            surroundings=surroundings,
        )
        rows.append(_row(choice, before.name, after.name, problem))
    if progress:
        progress(len(switched), len(switched))
    return rows


def _row(choice: str, before: str, after: str, problem: Problem) -> LedgerRow:
    two_pool = optimize_as_compressing(problem)
    fleetopt = optimize(replace(problem, gamma=None))
    best = _tok_per_j(fleetopt)
    if best is None or (_tok_per_j(two_pool) or 0.0) > best:
        fleetopt = two_pool  # gamma 1 is among the gammas
    return _make_row(
        choice,
        before,
        after,
        _homogeneous_tok_per_j(two_pool),
        _tok_per_j(two_pool),
        _tok_per_j(fleetopt),
        *_short_pool(fleetopt),
    )


def _tok_per_j(answer: Plan | Infeasible) -> float | None:
    return None if isinstance(answer, Infeasible) else float(answer.metrics.tok_per_j)


def _homogeneous_tok_per_j(two_pool: Plan | Infeasible) -> float | None:
    """Of the best homogeneous fleet, as the search for two pools has it along."""
    if isinstance(two_pool, Infeasible):
        return homogeneous_tok_per_j(two_pool.problem) or None
    gain = two_pool.gain_vs_homogeneous
    return float(two_pool.metrics.tok_per_j) / gain if gain else None


def _short_pool(answer: Plan | Infeasible) -> tuple[int | None, float | None]:
    """(window, gamma) of the first of two pools."""
    if isinstance(answer, Infeasible) or float(answer.fleet.window_tokens[0]) >= answer.problem.window_tokens:
        return None, None
    return int(answer.fleet.window_tokens[0]), float(answer.fleet.gamma[0])


def _make_row(
    choice: str,
    before: str | None,
    after: str | None,
    homogeneous: float | None,
    two_pool: float | None,
    fleetopt: float | None,
    short_window: int | None,
    gamma: float | None,
) -> LedgerRow:
    gain = fleetopt / homogeneous if fleetopt and homogeneous else None
    return LedgerRow(choice, before, after, homogeneous, two_pool, fleetopt, gain, short_window, gamma)


def _sampled_row(engine: Engine, knots: Knots, name: str, rate_per_s: float) -> LedgerRow:
    """The paper's procedure, at its own short window where it names one, else at the best of a few."""
    longest = knots[-1][0]
    shorter = [window for window in SAMPLED_WINDOWS if window < longest / PAPER_GAMMA]
    windows = [PAPER_WINDOWS[name]] if name in PAPER_WINDOWS else shorter
    homogeneous = sampled_homogeneous(engine, knots, rate_per_s)

    def best(gamma: float) -> tuple[SampledFleet, int] | None:
        fleets = [(sampled_two_pool(engine, knots, window, gamma, rate_per_s), window) for window in windows]
        return max(fleets, key=lambda fleet: fleet[0].tok_per_w) if fleets else None

    two_pool, fleetopt = best(1.0), best(PAPER_GAMMA)
    return _make_row(
        "published",
        None,
        None,
        homogeneous.tok_per_w,
        two_pool[0].tok_per_w if two_pool else homogeneous.tok_per_w,
        fleetopt[0].tok_per_w if fleetopt else homogeneous.tok_per_w,
        fleetopt[1] if fleetopt else None,
        PAPER_GAMMA if fleetopt else None,
    )


def _quantile_knots(workload: Workload) -> Knots:
    """A CDF of the total lengths at 18 of them, even in log-length, as the paper makes of its traces."""
    totals, shares = np.asarray(total_tokens(workload)), np.cumsum(np.asarray(workload.weight))
    tokens = np.unique(np.ceil(np.geomspace(max(totals[0], 16.0), totals[-1], N_KNOTS)))
    found = shares[np.searchsorted(totals, tokens, side="right") - 1]
    return [(float(t), float(f)) for t, f in zip(tokens, [*found[:-1], 1.0])]
