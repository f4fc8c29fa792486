"""Problems whose engines are not what they seem, and their plans with the engines as they stand."""

from collections.abc import Callable
from dataclasses import replace

from fleetopt_jax._optimize.engine_errors import EngineFactors, errors_of, however_run, perturbed_spec, slower
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.catalog.spec import EngineSpec


def off_by(problem: Problem, factors_of: Callable[[EngineSpec], EngineFactors]) -> Problem:
    """The problem whose engines are off by `factors_of(spec)`; its specs in the same order."""
    return problem.serving(specs=tuple(perturbed_spec(spec, factors_of(spec)) for spec in problem.specs))


def slower_engines(problem: Problem, sigmas: float) -> Problem:
    """The problem whose engines are slower by so many sigmas."""
    return off_by(problem, lambda spec: slower(errors_of(spec), sigmas))


def as_nominal(found: Plan, problem: Problem) -> Plan:
    """A scenario's plan with the specs it stands for in the problem, `found.problem` less its changes."""
    pairs = zip(found.problem.specs, problem.specs, strict=True)
    laws = {however_run(off): spec.laws for off, spec in pairs}
    return replace(found, problem=problem, lanes=tuple(replace(s, laws=laws[however_run(s)]) for s in found.specs))
