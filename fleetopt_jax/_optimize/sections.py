"""Which windows a fleet may have so that it holds in a share of the draws: a coarse look at all of them.

A section is a pool between two of some ten windows, even in a mean of requests, tokens and log-length. Of each, with
each engine, the least instances are found in a few hundred draws once; then every way to put two or three of them
together is priced by the cheapest instances that hold often enough (`counts.py`). What lies near the best is left to
whoever moves its windows.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fleetopt_jax._optimize.counts import cheapest_counts, rows_for
from fleetopt_jax._optimize.exact import candidates, evenly
from fleetopt_jax._optimize.holding import BATCH, Pool, drawn, pools_of
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.catalog.spec import EngineSpec

FEW_WINDOWS, MORE_WINDOWS = 9, 14  # below the last one: for three pools, for two
MOST_POOLS = 3


@dataclass(frozen=True)
class Section:
    """A pool between two windows, with one engine."""

    spec: EngineSpec
    needed: np.ndarray  # least instances in each draw [n]; inf where none worth having hold
    fixed: float  # cost without, and of each, instance
    each: float

    def cost(self, n_instances: np.ndarray) -> np.ndarray:
        """With so many instances; inf where there is no such number."""
        some = np.isfinite(n_instances)
        return np.where(some, self.fixed + self.each * np.where(some, n_instances, 0.0), np.inf)

    def cost_for(self, share: float) -> float:
        """By itself, where it holds in that share of the draws."""
        return float(self.cost(np.sort(self.needed)[rows_for(share, len(self.needed)) - 1]))


class Sections:
    """All of a problem, with the gamma of a plan where the problem searches it."""

    def __init__(self, nominal: Plan, seed: int):
        self.nominal, self.seed = nominal, seed
        self.problem: Problem = nominal.problem
        windows = np.unique(candidates(self.problem)[0])
        most = MORE_WINDOWS if self.problem.n_pools == 2 else FEW_WINDOWS
        inner = windows[evenly(self.problem.workload, windows, most)] if len(windows) else windows
        self.windows = np.concatenate([[0.0], inner, [self.problem.window_tokens]])
        self.gamma = float(nominal.fleet.gamma[0]) if self.problem.gamma is None else self.problem.gamma
        self._known: dict[tuple[int, int], list[Section]] = {}

    @cached_property
    def paths(self) -> list[tuple[int, ...]]:
        """Every way to cut the lengths into two or three pools, by the windows at the ends of each."""
        last, most = len(self.windows) - 1, min(self.problem.n_pools, MOST_POOLS)
        inner = [itertools.combinations(range(1, last), k) for k in range(1, most)]
        return [(0, *each, last) for each in itertools.chain(*inner)]

    def best(self, share: float, n: int) -> Iterator[Plan]:
        """The n cheapest ways that hold in that share of the draws, as plans that are not evaluated."""
        priced = []
        for path in self.paths:
            chosen = [min(self._sections(*ends), key=lambda s: s.cost_for(share)) for ends in itertools.pairwise(path)]
            needed = np.stack([section.needed for section in chosen], axis=1)
            counts = cheapest_counts(needed, lambda k, x, of=chosen: of[k].cost(x), share)
            if counts is not None:
                cost = sum(float(section.cost(x)) for section, x in zip(chosen, counts, strict=True))
                priced.append((cost, path, [section.spec for section in chosen]))
        for _, path, specs in sorted(priced, key=lambda each: each[0])[:n]:
            yield self._plan(path, specs)

    def _plan(self, path: tuple[int, ...], specs: list[EngineSpec]) -> Plan:
        gammas = [self.gamma] * (len(specs) - 1) + [1.0]
        fleet = self.problem.fleet(specs, self.windows[list(path[1:])], gammas, np.ones(len(specs)))
        return replace(self.nominal, lanes=tuple(specs), fleet=fleet)

    def _sections(self, low: int, high: int) -> list[Section]:
        """Those between two windows, one of each engine."""
        if (low, high) not in self._known:
            self._known[low, high] = [self._section(low, high, spec) for spec in self.problem.specs]
        return self._known[low, high]

    def _section(self, low: int, high: int, spec: EngineSpec) -> Section:
        pool = self._pool(low, high, spec)
        if not float(pool.traffic.traffic_frac) > 0:
            return Section(spec, np.full(BATCH, np.inf), 0.0, 0.0)
        # The laws err in each pool by themselves: sections that begin elsewhere are never one pool's.
        needed = pool.needed(drawn(spec, low, BATCH, self.seed))
        known = needed[np.isfinite(needed)]
        if not known.size:
            return Section(spec, needed, 0.0, 0.0)
        n = np.array([np.min(known), np.max(known) + 1.0])
        costs = pool.costs(n, self.problem)
        each = float((costs[1] - costs[0]) / (n[1] - n[0]))
        return Section(spec, needed, float(costs[0] - each * n[0]), each)

    def _pool(self, low: int, high: int, spec: EngineSpec) -> Pool:
        """The pool of a fleet that has no others than those below and above."""
        ends = [i for i in (low, high, len(self.windows) - 1) if i]
        ends = list(dict.fromkeys(ends))
        plan = self._plan((0, *ends), [spec] * len(ends))
        return pools_of(plan.fleet, plan.specs, self.problem)[ends.index(high)]
