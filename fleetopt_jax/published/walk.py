"""A row of a ledger: the best fleets after one change, everything else re-optimised."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.search import homogeneous_tok_per_j, optimize, optimize_as_compressing
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.documents.ledger import LedgerRow


@dataclass(frozen=True)
class Step:
    """One change, from what to what, and what is asked after it. Of several problems, where what is allowed cannot be
    said as one, the best answer counts."""

    choice: str
    before: str | None
    after: str | None
    problems: tuple[Problem, ...]


def walked(steps: Sequence[Step], progress: Progress | None = None) -> Iterator[LedgerRow]:
    """A row for each step, as it is found; a problem that an earlier step had is not searched again."""
    known: dict[int, tuple[Problem, LedgerRow]] = {}  # the problem is kept, so that its id stays its own
    for done, step in enumerate(steps, 1):
        rows = []
        for problem in step.problems:
            if id(problem) not in known:
                known[id(problem)] = problem, _searched(problem)
            rows.append(known[id(problem)][1])
        yield _best(step, rows)
        if progress:
            progress(done, len(steps))


def _best(step: Step, rows: list[LedgerRow]) -> LedgerRow:
    """The best of each kind of fleet; window and gamma are of the best FleetOpt."""
    best = max(rows, key=lambda row: row.tok_per_j_fleetopt or 0.0)
    homogeneous, two_pool = (
        max((getattr(row, name) or 0.0 for row in rows), default=0.0) or None
        for name in ("tok_per_j_homogeneous", "tok_per_j_two_pool")
    )
    split = best.short_window_tokens, best.gamma
    return made_row(step.choice, step.before, step.after, homogeneous, two_pool, best.tok_per_j_fleetopt, *split)


def made_row(
    choice: str,
    before: str | None,
    after: str | None,
    homogeneous: float | None,
    two_pool: float | None,
    fleetopt: float | None,
    short_window: int | None,
    gamma: float | None,
) -> LedgerRow:
    """A row with its gain."""
    gain = fleetopt / homogeneous if fleetopt and homogeneous else None
    return LedgerRow(choice, before, after, homogeneous, two_pool, fleetopt, gain, short_window, gamma)


def _searched(problem: Problem) -> LedgerRow:
    """Of one problem, the best homogeneous fleet, two pools, and two pools that may compress."""
    two_pool = optimize_as_compressing(problem)
    fleetopt = optimize(replace(problem, gamma=None))
    best = _tok_per_j(fleetopt)
    if best is None or (_tok_per_j(two_pool) or 0.0) > best:
        fleetopt = two_pool  # gamma 1 is among the gammas
    found = _homogeneous_tok_per_j(two_pool), _tok_per_j(two_pool), _tok_per_j(fleetopt)
    return made_row("", None, None, *found, *_short_pool(fleetopt))


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
