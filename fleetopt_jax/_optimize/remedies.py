"""What would make a problem feasible that is not: tried, one change at a time, never guessed.

What is tried costs no search: the best latencies with the most instances worth having, as `search` finds the nearest
feasible ones, and the windows that KV caches hold.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fleetopt_jax._optimize.plan import Infeasible
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.search import best_latencies, largest_window
from fleetopt_jax.catalog.engines import resolved
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.fleet.fleet import with_limits
from fleetopt_jax.laws.prefill import prefill_s

GROWTHS = (1.5, 4.0)  # of the TTFT limit with the prompt, over the fastest prefill of one prompt by itself
TPS = (2, 4, 8)  # GPUs of an instance: for a window all that are more than asked are tried, for a latency the most


@dataclass(frozen=True)
class Remedy:
    """One change under which some fleet holds the limits: the field of the problem, and its new value (SI units)."""

    field: str  # "ttft_s_per_token", "scope", "n_pools" or "tp"
    value: float | str


def remedies(answer: Infeasible) -> list[Remedy]:
    """What would help, of a latency or a window that no fleet holds; nothing is tried for limits of the budget."""
    problem = answer.problem
    if answer.binding.limit == "window_tokens":
        return [remedy for remedy, other in _larger(problem) if largest_window(other) >= problem.window_tokens][:1]
    if answer.binding.limit not in ("ttft_p99_s", "itl_s"):
        return []
    found: dict[str, Remedy] = {}
    for trials in (_alike, _otherwise):  # the second, of programs that must be compiled first, only where it is needed
        for remedy, other in trials(problem, answer.binding.limit == "ttft_p99_s"):
            if remedy.field not in found and _reachable(other):
                found[remedy.field] = remedy
        if found:
            break
    return list(found.values())


def _alike(problem: Problem, of_ttft: bool) -> Iterator[tuple[Remedy, Problem]]:
    """A TTFT limit that grows with the prompt, where that is what cannot be held; the most GPUs an instance."""
    slo = problem.slo
    if of_ttft and float(slo.ttft_s_per_token) == 0.0:
        fastest_s = min(float(prefill_s(engine.prefill, 1000.0)) for engine in problem.engines) / 1000.0
        for growth in GROWTHS:
            grows = float(np.ceil(growth * fastest_s * 1e6) / 1e6)  # whole milliseconds for 1,000 tokens
            yield Remedy("ttft_s_per_token", grows), problem.serving(slo=with_limits(slo, ttft_s_per_token=grows))
    yield from list(_larger(problem))[-1:]


def _otherwise(problem: Problem, of_ttft: bool) -> Iterator[tuple[Remedy, Problem]]:
    """Limits of all requests together; two pools."""
    slo, tail = problem.slo, problem.assumptions.tail
    if slo.scope == "pool" and problem.n_pools > 1 and tail.has_distribution:
        yield Remedy("scope", "fleet"), problem.serving(slo=dataclasses.replace(slo, scope="fleet"))
    if problem.n_pools == 1:
        yield Remedy("n_pools", 2), dataclasses.replace(problem, n_pools=2)


def _larger(problem: Problem) -> Iterator[tuple[Remedy, Problem]]:
    """The same engines on more GPUs an instance."""
    most = max(spec.tp for spec in problem.specs)
    for tp in TPS:
        if tp > most:
            specs = tuple(spec for spec in (_on(each, tp) for each in problem.specs) if spec)
            if specs:
                yield Remedy("tp", tp), problem.serving(specs=specs)


def _on(spec: EngineSpec, tp: int) -> EngineSpec | None:
    """The engine on so many GPUs; None where there is none."""
    if spec.laws is not None:  # of one's own, on as many GPUs as it was measured on
        return None
    try:
        return resolved(dataclasses.replace(spec, tp=tp))
    except BadInput:
        return None


def _reachable(problem: Problem) -> bool:
    ttft_s, itl_s = best_latencies(problem)
    return bool(np.any((ttft_s <= float(problem.slo.ttft_p99_s)) & (itl_s <= float(problem.slo.itl_s))))
