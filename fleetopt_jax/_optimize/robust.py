"""Plans that stay good when engines and traffic are not what they seem.

A scenario is a draw of the errors of engines and laws (`holding.py`) under one of the workloads, the problem's own or
another that is named, all equally likely. Candidates are whole fleets: the nominal optimum, the optima of problems in
which the engines are slower or off by drawn factors or the traffic is another, the windows that are best for holding in
1 - level of the draws (`sections.py`), and one pool; each as it was found, and with the cheapest instances that hold in
1 - level of the scenarios, or in nearly as many as any do (`sized.py`): no step of slowness jumps over that share.
A candidate's score is, of tok/J over all scenarios, the quantile at `level` or the mean of the worst share `level`
(CVaR); tok/J counts 0 in overload, where what is served comes too late. Only candidates that hold their limits as
planned, on the nominal workload with engines and laws as they stand, are ever chosen, and of them by one of two rules:

    score       some hold in 1 - level of the scenarios: of these the one with the best score
    hold share  none does: the one that holds in most

The best of the candidates tried: no certificate.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fleetopt_jax._optimize.confidence import one_pool_plans
from fleetopt_jax._optimize.counts import rows_for
from fleetopt_jax._optimize.engine_errors import factors_of
from fleetopt_jax._optimize.holding import drawn, judge_draws, slowed
from fleetopt_jax._optimize.plan import Plan, one_pool_of
from fleetopt_jax._optimize.problem import Method, Problem
from fleetopt_jax._optimize.scenarios import as_nominal, off_by, slower_engines
from fleetopt_jax._optimize.search import optimize, with_fleet
from fleetopt_jax._optimize.sections import Sections
from fleetopt_jax._optimize.sized import Cut, Scenarios, scenarios_of
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.choices.prefix_cache import not_searched
from fleetopt_jax.workload.atoms import Workload, total_tokens

N_SCENARIOS = 256  # draws of the errors in which every candidate is evaluated, under each workload
SLOWER = (1.0, 2.0)  # sigmas by which step and prefill of all engines are slower, each a problem to search
N_DRAWN = 2  # further ones, of drawn factors
N_SECTIONS = 2  # windows that are best for the share of the draws
NEARLY = 0.98  # of the most scenarios that any number of instances holds
SHOWN = (0.0, 0.5, 1.0, 1.5, 2.0)  # sigmas by which engines and laws are slower in the scenarios that are shown
LEVEL = 0.1

Measure = Literal["quantile", "cvar"]
Rule = Literal["score", "hold share"]


@dataclass(frozen=True)
class Shown:
    """One scenario by itself, and what becomes of a fleet there."""

    workload: str
    sigmas: float  # by which engines and laws are slower than they stand
    holds: bool  # the latencies
    tok_per_j: float  # 0 in overload


@dataclass(frozen=True)
class Scored:
    """One candidate over all scenarios."""

    plan: Plan  # on the nominal workload, with the engines as they stand
    origin: str  # what its windows are the best of
    sized_for: float | None  # the share of the scenarios that its instances are for; None: as it was found
    score: float  # quantile or CVaR of tok/J [1/J]
    mean_tok_per_j: float
    hold_share: float  # of the scenarios in which every latency holds
    by_workload: tuple[float, ...]  # the same of each workload alone


@dataclass(frozen=True)
class Robust:
    """The choice, the nominal optimum beside it, and all that was compared, best first."""

    measure: Measure
    level: float
    n_scenarios: int  # draws of errors, each with every workload
    workloads: tuple[str, ...]
    rule: Rule  # that picked the choice
    chosen: Scored  # its `one_pool` holds in as many scenarios, where one does
    nominal: Scored
    one_pool: Scored | None  # the best of one pool by the same rule; None where none holds its limits as planned
    candidates: tuple[Scored, ...]
    shown: dict[str, tuple[Shown, ...]]  # scenario by scenario, of "chosen", "nominal" and "one_pool"


def score(tok_per_j: np.ndarray, measure: Measure, level: float) -> float:
    """The quantile of tok/J at `level`, or the mean of the worst share `level` of the scenarios."""
    ordered = np.sort(np.ravel(tok_per_j))
    worst = ordered[: max(1, math.ceil(level * len(ordered)))]
    return float(worst[-1] if measure == "quantile" else np.mean(worst))


def robust(
    problem: Problem,
    nominal: Plan,
    *,
    measure: Measure = "quantile",
    level: float = LEVEL,
    workloads: Sequence[tuple[str, Workload]] = (),
    method: Method | None = None,
    n_scenarios: int = N_SCENARIOS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Robust:
    """The candidate with the best score, of those that hold the limits in at least 1 - `level` of the scenarios.

    `nominal` is the optimum of `problem`; `workloads` are the other traffics (name, workload) the fleet must live with:
    each scenario is one of these or the problem's own, equally likely. Where no candidate holds so often, the one that
    holds most often is chosen. Raises ValueError for a level outside 0..1, BadInput for traffic beyond the window.
    """
    if not 0 < level < 1:
        raise ValueError(f"need 0 < level < 1, got {level}")
    if problem.assumptions.prefix_cache.reads_reuse:
        raise not_searched("a robust plan")
    require_window(problem, workloads)
    judge = _Judge(scenarios_of(problem, workloads, n_draws=n_scenarios, seed=seed), measure, level)
    alone = judge.scored(("one pool", plan) for plan in one_pool_plans(problem))
    scored = judge.scored([("as planned", nominal)], keep=True)
    scored += judge.scored(_optima(judge.scenarios, seed, method, progress))
    if problem.n_pools > 1 and problem.slo.scope == "pool":
        sections = Sections(nominal, seed).best(1.0 - level, N_SECTIONS)
        scored += judge.scored((f"look at all windows, {i}", plan) for i, plan in enumerate(sections, 1))
    scored = list({_key(each.plan): each for each in reversed([*scored, *alone])}.values())[::-1]
    best, rule = judge.best(scored)
    one_pool = judge.best(alone)[0] if alone else None
    reference = one_pool and one_pool_of(one_pool.plan)
    gain = reference and float(best.plan.metrics.tok_per_j) / reference.tok_per_j
    chosen = replace(best, plan=replace(best.plan, one_pool=reference, gain_vs_homogeneous=gain))
    beside = {"chosen": chosen, "nominal": scored[0]} | ({"one_pool": one_pool} if one_pool else {})
    return Robust(
        measure=measure,
        level=level,
        n_scenarios=n_scenarios,
        workloads=tuple(name for name, _ in judge.scenarios.workloads),
        rule=rule,
        chosen=chosen,
        nominal=scored[0],
        one_pool=one_pool,
        candidates=tuple(sorted(scored, key=lambda each: -each.score)),
        shown={name: tuple(_shown(Cut(judge.scenarios, each.plan))) for name, each in beside.items()},
    )


@dataclass(frozen=True)
class _Judge:
    """How candidates are compared."""

    scenarios: Scenarios
    measure: Measure
    level: float

    def scored(self, plans: Iterable[tuple[str, Plan]], *, keep: bool = False) -> list[Scored]:
        """Fleets of the windows of some plans, by what they are, that hold their limits as planned: as they were found,
        and sized to hold in 1 - level of the scenarios. With `keep` plans stay as they are, not evaluated anew."""
        found = []
        for origin, plan in plans:
            cut = Cut(self.scenarios, plan)
            share = min(1.0 - self.level, NEARLY * cut.most())
            n = cut.counts(share)
            sized = [] if n is None else [(cut.with_counts(n), share)]
            here = plan if keep else with_fleet(plan, plan.fleet)
            found += [self._score(cut, *each, origin) for each in ((here, None), *sized) if each[0].binding is None]
        return found

    def _score(self, cut: Cut, plan: Plan, sized_for: float | None, origin: str) -> Scored:
        longest_served = float(plan.fleet.window_tokens[-1] * plan.fleet.gamma[-1])
        n, tok_per_j, held = np.asarray(plan.fleet.n_instances), [], []
        for (_, workload), draws in zip(self.scenarios.workloads, cut.drawn(n), strict=True):
            served = float(np.max(np.asarray(total_tokens(workload)))) <= longest_served
            tok_per_j.append(draws.tok_per_j)
            held.append(draws.held & served)
        return Scored(
            plan=plan,
            origin=origin,
            sized_for=sized_for,
            score=score(np.concatenate(tok_per_j), self.measure, self.level),
            mean_tok_per_j=float(np.mean(tok_per_j)),
            hold_share=float(np.mean(held)),
            by_workload=tuple(np.mean(held, axis=1).tolist()),
        )

    def best(self, scored: Sequence[Scored]) -> tuple[Scored, Rule]:
        """The choice, and the rule that made it."""
        n = self.scenarios.n_draws * len(self.scenarios.workloads)
        able = [each for each in scored if round(each.hold_share * n) >= rows_for(1.0 - self.level, n)]
        if able:
            return max(able, key=lambda each: each.score), "score"
        return max(scored, key=lambda each: each.hold_share), "hold share"


def require_window(problem: Problem, workloads: Sequence[tuple[str, Workload]]) -> None:
    """Refuse traffic with requests longer than the fleet promises to serve."""
    window = problem.window_tokens
    for name, workload in workloads:
        if float(workload.longest_tokens) > window:
            raise BadInput(
                "--robust-workloads",
                f"{name} has requests of {float(workload.longest_tokens):.0f} tokens, the window is {window:.0f}",
                "give --window to promise more, or another workload",
            )


def _optima(
    scenarios: Scenarios, seed: int, method: Method | None, progress: Progress | None
) -> Iterator[tuple[str, Plan]]:
    """The optima of the problems that are searched, by what each is the optimum of."""
    searches = list(_searches(scenarios, seed))
    for done, (origin, problem) in enumerate(searches):
        found = optimize(problem, method)
        if isinstance(found, Plan):
            yield origin, as_nominal(found, scenarios.problem)
        if progress:
            progress(done + 1, len(searches))


def _searches(scenarios: Scenarios, seed: int) -> Iterator[tuple[str, Problem]]:
    """The problems whose optima are candidates, by what they are."""
    problem = scenarios.problem
    for name, other in scenarios.workloads[1:]:
        yield f"traffic of {name}", problem.serving(workload=other)
    for z in SLOWER:
        yield f"engines slower by {z:g} sigma", slower_engines(problem, z)
    for i in range(N_DRAWN):
        yield (
            f"engines of draw {i + 1}",
            off_by(problem, lambda spec, i=i: factors_of(drawn(spec, 0, N_DRAWN, seed + 1).engine, i)),
        )


def _key(plan: Plan) -> tuple:
    numbers = (plan.fleet.window_tokens, plan.fleet.gamma, plan.fleet.n_instances)
    return plan.specs, *(tuple(np.asarray(x).tolist()) for x in numbers)


def _shown(cut: Cut) -> Iterator[Shown]:
    """What becomes of a fleet in a few scenarios, under each workload: as all stands, and slower by sigmas."""
    n = np.asarray(cut.plan.fleet.n_instances)
    for (name, _), pools in zip(cut.scenarios.workloads, cut.pools, strict=True):
        draws = judge_draws(pools, n.tolist(), lambda spec, k: slowed(spec, np.array(SHOWN)))
        for sigmas, holds, tok_per_j in zip(SHOWN, draws.held, draws.tok_per_j, strict=True):
            yield Shown(name, sigmas, bool(holds), float(tok_per_j))
