"""Plans that stay good when engines and traffic are not what they seem.

Candidates are whole fleets: the nominal optimum, the optima of scenarios, in which the engines are slower or off by
drawn factors (`uncertainty.py`) or the traffic is another, and the pools of these sized to hold under all traffic.
Every candidate is evaluated in every scenario, factors by workloads, in one `vmap` a workload. Its score is, of tok/J
over all of them, the quantile at `level` or the mean of the worst share `level` (CVaR); tok/J counts 0 in overload,
where what is served comes too late. Only candidates that hold their limits as planned, on the nominal workload with the
engines as they stand, are ever chosen, and of them those that hold in 1 - level of the scenarios, where there are any.
Best of the candidates tried: no certificate.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax._optimize.engine_errors import (
    EngineErrors,
    EngineFactors,
    draw,
    factors_of,
    however_run,
    perturbed,
    perturbed_spec,
    shared_errors,
)
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.problem import Method, Problem
from fleetopt_jax._optimize.search import optimize, with_fleet
from fleetopt_jax._optimize.uncertainty import sample
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.sizing import size_fleet
from fleetopt_jax.workload.atoms import Workload, total_tokens

N_SCENARIOS = 256  # draws of the engines' factors in which every candidate is evaluated
SLOWER = (0.5, 1.0, 1.5, 2.0)  # sigmas by which step and prefill of all engines are slower, each a scenario to search
N_DRAWN = 2  # further ones, of drawn factors
LEVEL = 0.1

Measure = Literal["quantile", "cvar"]


@dataclass(frozen=True)
class Scored:
    """One candidate over all scenarios."""

    plan: Plan  # on the nominal workload, with the engines as they stand
    origin: str  # what it is the optimum of
    score: float  # quantile or CVaR of tok/J [1/J]
    mean_tok_per_j: float
    hold_share: float  # of the scenarios in which every limit of the service holds


@dataclass(frozen=True)
class Robust:
    """The choice, the nominal optimum beside it, and all that was compared, best first."""

    measure: Measure
    level: float
    n_scenarios: int  # draws of factors, each with every workload
    workloads: tuple[str, ...]
    chosen: Scored
    nominal: Scored
    candidates: tuple[Scored, ...]


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
    require_window(problem, workloads)
    errors, engine_of = shared_errors(problem.specs)
    scenarios = _Scenarios(
        problem=problem,
        workloads=((problem.service.name, problem.workload), *workloads),
        errors=errors,
        engine_of=engine_of,
        factors=draw(errors, n_scenarios, seed),
    )
    plans = _candidates(scenarios, nominal, draw(errors, N_DRAWN, seed + 1), method, progress)
    scored = [_scored(scenarios, plan, origin, measure, level) for plan, origin in plans]
    able = [each for each in scored if each.hold_share >= 1.0 - level]
    best = max(able, key=lambda each: each.score) if able else max(scored, key=lambda each: each.hold_share)
    return Robust(
        measure=measure,
        level=level,
        n_scenarios=n_scenarios,
        workloads=tuple(name for name, _ in scenarios.workloads),
        chosen=best,
        nominal=scored[0],
        candidates=tuple(sorted(scored, key=lambda each: -each.score)),
    )


@dataclass(frozen=True)
class _Scenarios:
    """What every candidate is evaluated in: each workload with each draw of the engines' factors."""

    problem: Problem
    workloads: tuple[tuple[str, Workload], ...]  # by name; the problem's own first
    errors: EngineErrors  # [E] of the problem's distinct engines
    engine_of: np.ndarray  # which of these each spec of the problem is
    factors: EngineFactors  # [n, E]

    def engines_of(self, plan: Plan) -> Array:
        """Which of the distinct engines each lane of a plan has [K]."""
        known = [however_run(spec) for spec in self.problem.specs]
        return jnp.array([int(self.engine_of[known.index(however_run(spec))]) for spec in plan.specs])

    def off_by(self, factors: EngineFactors) -> Problem:
        """The problem whose engines are off by `factors` [E]; its specs in the same order."""
        return self.problem.serving(
            specs=tuple(
                perturbed_spec(spec, factors_of(factors, int(e)))
                for spec, e in zip(self.problem.specs, self.engine_of, strict=True)
            )
        )


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


def _candidates(
    scenarios: _Scenarios, nominal: Plan, drawn: EngineFactors, method: Method | None, progress: Progress | None
) -> list[tuple[Plan, str]]:
    """(plan on the nominal problem, origin) of the distinct optima that hold the nominal limits, the nominal first.

    Left out are optima that break a nominal limit: they were sized for better engines or lighter traffic.
    """
    kept = {_key(nominal): (nominal, "as planned")}

    def keep(plan: Plan, fleet: Fleet, origin: str) -> None:
        """Add a fleet of the plan's specs if it holds the nominal limits and is none of those there are."""
        here = with_fleet(plan, fleet)
        if here.binding is None:
            kept.setdefault(_key(here), (here, origin))

    searches = _searches(scenarios, drawn)
    for done, (origin, problem) in enumerate(searches):
        found = optimize(problem, method)
        if isinstance(found, Plan):
            keep(_as_nominal(found, scenarios.problem), found.fleet, origin)
        if progress:
            progress(done + 1, len(searches))
    if len(scenarios.workloads) > 1:
        for plan, origin in list(kept.values())[: len(scenarios.workloads)]:
            for fleet, slower in _covering(scenarios, plan):
                keep(plan, fleet, f"{origin}, sized for all traffic{slower}")
    return list(kept.values())


def _searches(scenarios: _Scenarios, drawn: EngineFactors) -> list[tuple[str, Problem]]:
    """The scenarios whose optima are candidates, by what they are."""
    problem = scenarios.problem
    return [
        *((f"traffic of {name}", problem.serving(workload=other)) for name, other in scenarios.workloads[1:]),
        *((f"engines slower by {z:g} sigma", scenarios.off_by(_slower(scenarios.errors, z))) for z in SLOWER),
        *((f"engines of draw {i + 1}", scenarios.off_by(factors_of(drawn, i))) for i in range(N_DRAWN)),
    ]


def _as_nominal(found: Plan, problem: Problem) -> Plan:
    """A scenario's plan with the specs it stands for in the problem."""
    pairs = zip(found.problem.specs, problem.specs, strict=True)
    laws = {however_run(off): spec.laws for off, spec in pairs}
    return replace(found, problem=problem, specs=tuple(replace(s, laws=laws[however_run(s)]) for s in found.specs))


_sized = jax.jit(size_fleet, static_argnames="assumptions")


def _covering(scenarios: _Scenarios, plan: Plan) -> Iterator[tuple[Fleet, str]]:
    """The plan's lanes with the instances that hold the limits under every traffic, by how much slower the engines are;
    none where no number of them does."""
    problem = scenarios.problem
    for z in (0.0, *SLOWER):
        off = perturbed(plan.fleet, _slower(scenarios.errors, z), scenarios.engines_of(plan))
        fleets = [
            _sized(off, workload, problem.slo, assumptions=problem.assumptions) for _, workload in scenarios.workloads
        ]
        n_instances = np.maximum(1.0, np.max([np.asarray(fleet.n_instances) for fleet in fleets], axis=0))
        if np.all(np.isfinite(n_instances)):
            yield plan.fleet.with_instances(n_instances), f", engines slower by {z:g} sigma" if z else ""


def _key(plan: Plan) -> tuple:
    numbers = (plan.fleet.window_tokens, plan.fleet.gamma, plan.fleet.n_instances)
    return plan.specs, *(tuple(np.asarray(x).tolist()) for x in numbers)


def _slower(errors: EngineErrors, sigmas: float) -> EngineFactors:
    step, prefill = (jnp.exp(sigmas * sigma) for sigma in (errors.step, errors.prefill))
    return EngineFactors(step=step, power=jnp.ones_like(step), prefill=prefill)


def _scored(scenarios: _Scenarios, plan: Plan, origin: str, measure: Measure, level: float) -> Scored:
    problem, engine_of = scenarios.problem, scenarios.engines_of(plan)
    longest_served = float(plan.fleet.window_tokens[-1] * plan.fleet.gamma[-1])
    tok_per_j, holds = [], []
    for _, workload in scenarios.workloads:
        sampled, held = sample(
            plan.fleet, workload, problem.slo, scenarios.factors, engine_of, assumptions=problem.assumptions
        )
        served = float(np.max(np.asarray(total_tokens(workload)))) <= longest_served
        tok_per_j.append(np.where(np.isfinite(sampled["ttft_p99_s"]), sampled["tok_per_j"], 0.0))
        holds.append(np.asarray(held) & served)
    return Scored(
        plan=plan,
        origin=origin,
        score=score(np.concatenate(tok_per_j), measure, level),
        mean_tok_per_j=float(np.mean(tok_per_j)),
        hold_share=float(np.mean(holds)),
    )
