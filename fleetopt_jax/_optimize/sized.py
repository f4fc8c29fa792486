"""Fleets sized for scenarios: one choice of windows and engines, with the instances that hold a share of what may come.

A scenario is a draw of the errors of engines and laws (`holding.py`) under one of the workloads. Where pools have
limits of their own, the counts are the cheapest there are for these windows (`counts.py`). Where all requests share
theirs, counts are those of a fleet sized for engines and laws that are z sigmas slower, with the least z that will do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np

from fleetopt_jax._optimize.counts import cheapest_counts, share_held
from fleetopt_jax._optimize.engine_errors import perturb
from fleetopt_jax._optimize.holding import (
    FULL,
    N_DRAWS,
    Draws,
    Errors,
    Pool,
    as_they_stand,
    drawn,
    judge_draws,
    pools_of,
    slowed,
    tightened,
)
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.search import with_fleet
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.programs import program
from fleetopt_jax.fleet.fleet import with_limits
from fleetopt_jax.fleet.sizing import size_fleet
from fleetopt_jax.workload.atoms import Workload

SIGMAS = np.linspace(0.0, 4.0, 81)  # by which engines and laws are slower: steps of 0.05

_size = program(size_fleet, static_argnames="assumptions")


@dataclass(frozen=True)
class Scenarios:
    """What fleets are sized for: every draw under every workload, the problem's own first."""

    problem: Problem
    workloads: tuple[tuple[str, Workload], ...]
    n_draws: int = N_DRAWS
    seed: int = 0

    def drawn(self, spec: EngineSpec, k: int) -> Errors:
        """What the k-th pool, with this engine, is off by [n]."""
        return drawn(spec, k, self.n_draws, self.seed)


def scenarios_of(
    problem: Problem, workloads: Sequence[tuple[str, Workload]] = (), *, n_draws: int = N_DRAWS, seed: int = 0
) -> Scenarios:
    """Those of a problem and, beside its own, other workloads by name."""
    return Scenarios(problem, ((problem.service.name, problem.workload), *workloads), n_draws, seed)


@dataclass(frozen=True)
class Cut:
    """The windows, engines and gammas of a plan, whose instances are yet to be said."""

    scenarios: Scenarios
    plan: Plan  # of the scenarios' problem; its instances are not read

    @cached_property
    def pools(self) -> tuple[list[Pool], ...]:
        """By workload."""
        of, problem = self.plan, self.scenarios.problem
        return tuple(pools_of(of.fleet, of.specs, problem, each) for _, each in self.scenarios.workloads)

    @cached_property
    def needed(self) -> np.ndarray:
        """The least instances of each pool in each scenario, draws of one workload together [S, K]."""
        return np.concatenate([_needed(pools, self.scenarios.drawn) for pools in self.pools])

    @cached_property
    def as_planned(self) -> np.ndarray:
        """The least instances [K] that hold the limits of the problem with engines and laws as they stand."""
        problem = self.scenarios.problem
        if self._shares_limits:
            sized = _size(self.plan.fleet, problem.workload, problem.slo, assumptions=problem.assumptions)
            return np.asarray(sized.n_instances)
        planned = [replace(pool, slo=problem.slo) for pool in self.pools[0]]
        return np.array([pool.needed(as_they_stand(pool.spec))[0] for pool in planned])

    @cached_property
    def by_sigmas(self) -> np.ndarray:
        """The least instances of each pool with engines and laws `SIGMAS` slower, under every workload [81, K]."""
        return np.max([_needed(pools, lambda spec, k: slowed(spec, SIGMAS)) for pools in self.pools], axis=0)

    def counts(self, share: float) -> np.ndarray | None:
        """Instances [K] that hold the limits as planned, and in that share of the scenarios; None where none do."""
        if not np.isfinite(self.as_planned).all():
            return None
        if self._shares_limits:
            sigmas = self.slowness(share)
            return None if sigmas is None else self._slower_by(sigmas)
        return cheapest_counts(np.maximum(self.needed, self.as_planned), self.costs, share)

    def slowness(self, share: float) -> float | None:
        """The least of `SIGMAS` so that what holds the limits when all is slower by as much holds them in that share
        of the scenarios; None where none of them does."""
        if self._shares_limits:
            least = _first(lambda i: self.share(self._slower_by(SIGMAS[i])) >= share, self._n_worth)
            return float(SIGMAS[least]) if least < self._n_worth else None
        enough = [share_held(self.needed, np.maximum(n, self.as_planned)) >= share for n in self.by_sigmas]
        return float(SIGMAS[np.argmax(enough)]) if any(enough) else None

    def most(self) -> float:
        """The largest share of the scenarios that instances worth having hold."""
        if not np.isfinite(self.as_planned).all():
            return 0.0
        if self._shares_limits:
            return self.share(self._slower_by(SIGMAS[self._n_worth - 1])) if self._n_worth else 0.0
        return float(np.mean(np.isfinite(self.needed).all(axis=1)))

    def costs(self, k: int, n_instances: np.ndarray) -> np.ndarray:
        """Of the k-th pool with so many instances [m], as planned, by what the problem is searched for."""
        values, where = np.unique(n_instances, return_inverse=True)
        return self.pools[0][k].costs(values, self.scenarios.problem)[where]

    def drawn(self, n_instances: np.ndarray) -> list[Draws]:
        """The fleet with so many instances [K] under every draw, workload by workload."""
        return [judge_draws(pools, n_instances.tolist(), self.scenarios.drawn) for pools in self.pools]

    def share(self, n_instances: np.ndarray) -> float:
        """The share of the scenarios in which so many instances [K] hold the limits."""
        if self._shares_limits:
            return float(np.mean([draws.held for draws in self.drawn(n_instances)]))
        return share_held(self.needed, n_instances)

    def with_counts(self, n_instances: np.ndarray) -> Plan:
        """The plan with so many instances [K]."""
        return with_fleet(self.plan, self.plan.fleet.with_instances(n_instances))

    @property
    def _shares_limits(self) -> bool:
        return self.scenarios.problem.slo.scope == "fleet"

    @cached_property
    def _n_worth(self) -> int:
        """How many of `SIGMAS`, from the least on, some number of instances worth having holds."""
        return _first(lambda i: not np.isfinite(self._slower_by(SIGMAS[i])).all(), len(SIGMAS))

    def _slower_by(self, sigmas: float) -> np.ndarray:
        """The instances [K] of a fleet that holds its limits as planned, and under every workload with engines and
        laws that much slower; inf where no number worth having does."""
        problem, fleets = self.scenarios.problem, [self.as_planned]
        slow = [jax.tree.map(lambda x: x[0], slowed(spec, np.array([sigmas]))) for spec in self.plan.specs]
        engines = [perturb(e, off.engine) for e, off in zip(self.plan.fleet.engines, slow, strict=True)]
        limits = with_limits(tightened(problem.slo, slow[0].ttft, slow[0].itl), max_utilization=FULL)
        for _, workload in self.scenarios.workloads:
            sized = _size(self.plan.fleet.with_engines(engines), workload, limits, assumptions=problem.assumptions)
            fleets.append(np.asarray(sized.n_instances))
        return np.max(fleets, axis=0)


def _needed(pools: Sequence[Pool], errors_of_pool: Callable[[EngineSpec, int], Errors]) -> np.ndarray:
    """The least instances of each pool under each of its errors [m, K]."""
    return np.stack([pool.needed(errors_of_pool(pool.spec, k)) for k, pool in enumerate(pools)], axis=1)


def _first(holds: Callable[[int], bool], n: int) -> int:
    """The first of 0 ... n - 1 for which something holds that goes on holding; n where it never does."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
