"""Plans that stay good when engines and traffic are not what they seem.

Candidates are whole fleets: the nominal optimum, the optima of scenarios, in which the engines are slower or off by
drawn factors (`uncertainty.py`) or the traffic is another, and the pools of these sized to hold under all traffic.
Every candidate is evaluated in every scenario, factors by workloads, in one `vmap` a workload. Its score is, of tok/J
over all of them, the quantile at `level` or the mean of the worst share `level` (CVaR); tok/J counts 0 in overload,
where what is served comes too late. Only candidates that hold their limits as planned, on the nominal workload with the
engines as they stand, are ever chosen, and of them those that hold in 1 - level of the scenarios, where there are any.
Best of the candidates tried: no certificate.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.sizing import size_fleet
from fleetopt_jax.optimize.plan import EngineChoice, Method, Plan, Problem
from fleetopt_jax.optimize.search import evaluate_given, optimize
from fleetopt_jax.optimize.uncertainty import (
    EngineErrors,
    EngineFactors,
    draw,
    perturb,
    perturbed,
    sample,
    shared_errors,
)
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
    progress: Callable[[int, int], None] | None = None,
) -> Robust:
    """The candidate with the best score, of those that hold the limits in at least 1 - `level` of the scenarios.

    `nominal` is the optimum of `problem`, which has one; `workloads` are the other traffics (name, workload) the fleet
    must live with: each scenario is one of these or the problem's own, equally likely. Where no candidate holds
    so often, the one that holds most often is chosen.
    """
    if nominal.fleet is None:
        raise ValueError("need a nominal plan that holds its limits")
    if not 0 < level < 1:
        raise ValueError(f"need 0 < level < 1, got {level}")
    require_window(problem, workloads)
    traffic = [(problem.workload_name, problem.workload), *workloads]
    errors, _ = shared_errors(problem.choices)
    factors = draw(errors, n_scenarios, seed)
    plans = _candidates(problem, nominal, traffic, method, seed, progress)
    scored = [_scored(problem, plan, origin, traffic, factors, measure, level) for plan, origin in plans]
    able = [each for each in scored if each.hold_share >= 1.0 - level]
    best = max(able, key=lambda each: each.score) if able else max(scored, key=lambda each: each.hold_share)
    return Robust(
        measure=measure,
        level=level,
        n_scenarios=n_scenarios,
        workloads=tuple(name for name, _ in traffic),
        chosen=best,
        nominal=scored[0],
        candidates=tuple(sorted(scored, key=lambda each: -each.score)),
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
    problem: Problem,
    nominal: Plan,
    traffic: Sequence[tuple[str, Workload]],
    method: Method | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[Plan, str]]:
    """(plan on the nominal problem, origin) of the distinct optima that hold the nominal limits, the nominal first.

    Left out are optima that break a nominal limit: they were sized for better engines or lighter traffic.
    """
    errors, _ = shared_errors(problem.choices)
    drawn = draw(errors, N_DRAWN, seed + 1)
    scenarios = [(f"traffic of {name}", dataclasses.replace(problem, workload=other)) for name, other in traffic[1:]]
    scenarios += [(f"engines slower by {z:g} sigma", _off_by(problem, _slower(errors, z))) for z in SLOWER]
    scenarios += [
        (f"engines of draw {i + 1}", _off_by(problem, jax.tree.map(lambda x, i=i: x[i], drawn))) for i in range(N_DRAWN)
    ]
    found, seen = [(nominal, "as planned")], {_key(nominal)}

    def keep(choices: tuple[EngineChoice, ...], fleet: Fleet, n_instances: np.ndarray, origin: str) -> None:
        """Add a fleet to the candidates if it holds the nominal limits and is none of them."""
        windows, gamma = (np.asarray(x).tolist() for x in (fleet.window_tokens, fleet.gamma))
        here = evaluate_given(
            problem, choices, window_tokens=windows, gamma=gamma, n_instances=np.asarray(n_instances).tolist()
        )
        if here.binding is None and _key(here) not in seen:
            seen.add(_key(here))
            found.append((here, origin))

    for done, (origin, scenario) in enumerate(scenarios):
        plan = optimize(scenario, method)
        if plan.fleet is not None:
            names = [choice.names for choice in plan.choices]
            choices = tuple(next(c for c in problem.choices if c.names == name) for name in names)
            keep(choices, plan.fleet, plan.fleet.n_instances, origin)
        if progress:
            progress(done + 1, len(scenarios))
    if len(traffic) > 1:
        for plan, origin in found[: len(traffic)]:
            for z in (0.0, *SLOWER):
                n_instances = _covering(problem, plan, _slower(errors, z), traffic)
                if np.all(np.isfinite(n_instances)):
                    slower = f", engines slower by {z:g} sigma" if z else ""
                    keep(plan.choices, plan.fleet, n_instances, f"{origin}, sized for all traffic{slower}")
    return found


_sized = jax.jit(size_fleet, static_argnames="assumptions")


def _covering(
    problem: Problem, plan: Plan, factors: EngineFactors, traffic: Sequence[tuple[str, Workload]]
) -> np.ndarray:
    """Instances [K] that hold the limits under every traffic with engines off by `factors`; inf where none do."""
    engines = perturbed(plan.fleet, factors, _engine_of(problem, plan)).engines
    about = engines, plan.fleet.window_tokens, plan.fleet.gamma
    fleets = [_sized(*about, workload, problem.slo, assumptions=problem.assumptions) for _, workload in traffic]
    return np.maximum(1.0, np.max([np.asarray(fleet.n_instances) for fleet in fleets], axis=0))


def _engine_of(problem: Problem, plan: Plan) -> Array:
    """Which of the problem's distinct engines each pool of the plan has [K]."""
    names, (_, of) = [choice.names for choice in problem.choices], shared_errors(problem.choices)
    return jnp.array([int(of[names.index(choice.names)]) for choice in plan.choices])


def _key(plan: Plan) -> tuple:
    numbers = (plan.fleet.window_tokens, plan.fleet.gamma, plan.fleet.n_instances)
    return tuple(choice.names for choice in plan.choices), *(tuple(np.asarray(x).tolist()) for x in numbers)


def _slower(errors: EngineErrors, sigmas: float) -> EngineFactors:
    step, prefill = (jnp.exp(sigmas * sigma) for sigma in (errors.step, errors.prefill))
    return EngineFactors(step=step, power=jnp.ones_like(step), prefill=prefill)


def _off_by(problem: Problem, factors: EngineFactors) -> Problem:
    """The problem whose engines are off by `factors` [E], in the order of its distinct choices."""
    _, of = shared_errors(problem.choices)
    choices = tuple(
        dataclasses.replace(choice, engine=perturb(choice.engine, jax.tree.map(lambda x, i=int(i): x[i], factors)))
        for choice, i in zip(problem.choices, of, strict=True)
    )
    return dataclasses.replace(problem, choices=choices)


def _scored(
    problem: Problem,
    plan: Plan,
    origin: str,
    traffic: Sequence[tuple[str, Workload]],
    factors: EngineFactors,
    measure: Measure,
    level: float,
) -> Scored:
    of = _engine_of(problem, plan)
    tok_per_j, holds = [], []
    for _, workload in traffic:
        found, held = sample(plan.fleet, workload, problem.slo, factors, of, assumptions=problem.assumptions)
        served = float(jnp.max(total_tokens(workload))) <= float(plan.fleet.window_tokens[-1] * plan.fleet.gamma[-1])
        tok_per_j.append(np.where(np.isfinite(found["ttft_p99_s"]), found["tok_per_j"], 0.0))
        holds.append(np.asarray(held) & served)
    return Scored(
        plan=plan,
        origin=origin,
        score=score(np.concatenate(tok_per_j), measure, level),
        mean_tok_per_j=float(np.mean(tok_per_j)),
        hold_share=float(np.mean(holds)),
    )


def robust_to_json(found: Robust) -> dict[str, Any]:
    """As a JSON object (SI units)."""
    return {
        "measure": found.measure,
        "level": found.level,
        "n_scenarios": found.n_scenarios,
        "workloads": list(found.workloads),
        "chosen": _scored_json(found.chosen),
        "nominal": _scored_json(found.nominal),
        "candidates": [_scored_json(each) for each in found.candidates],
    }


def _scored_json(each: Scored) -> dict[str, Any]:
    fleet = each.plan.fleet
    return {
        "origin": each.origin,
        "score": each.score,
        "mean_tok_per_j": each.mean_tok_per_j,
        "hold_share": each.hold_share,
        "tok_per_j": float(each.plan.metrics.tok_per_j),
        "n_gpus": int(each.plan.metrics.n_gpus),
        "window_tokens": np.asarray(fleet.window_tokens).tolist(),
        "gamma": np.asarray(fleet.gamma).tolist(),
        "n_instances": np.asarray(fleet.n_instances).tolist(),
        "gpus": [choice.gpu for choice in each.plan.choices],
    }
