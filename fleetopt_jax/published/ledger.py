"""The ledger: from the published system to the physical one, a choice at a time, everything else re-optimised.

Row 0 is the paper's own procedure with its sampling. Each later row switches one choice of `Assumptions` and answers
again: the best homogeneous fleet, the best two pools, and the best two pools with compression (FleetOpt). The last of
them is the preset `physical`. Where a prefix cache is assumed, one row more has the same of fleets that all have it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fleetopt_jax._optimize.problem import Problem, make_problem
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
from fleetopt_jax.published.walk import Step, made_row, walked
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

    def asked(current: Assumptions) -> Problem:
        return make_problem(
            workload,
            specs(current),
            slo=slo if current.tail.has_distribution else replace(slo, scope="pool"),
            workload_name=name,
            assume="ledger",
            assumptions=current,
            window_tokens=window_tokens,
            surroundings=surroundings,
        )

    return [*rows, *walked(list(_switched(current, switched, asked)), progress)]


def _switched(
    current: Assumptions, switched: Mapping[str, Any], asked: Callable[[Assumptions], Problem]
) -> Iterator[Step]:
    """One choice after the other."""
    for choice, after in switched.items():
        before = getattr(current, choice)
        current = replace(current, **{choice: after})
        yield Step(choice, before.name, after.name, (asked(current),))


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
    return made_row(
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
