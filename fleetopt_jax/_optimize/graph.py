"""Pools as edges between boundaries: bounds on what every pool costs at once, and the exact cost of those that matter.

A pool is an edge from a lower boundary to an upper one (a window and its router edge), served by one of the offers, a
spec that serves it whole, or by two, one for each stage (`offers.py`). What an offer needs, instances and watts,
depends on nothing else, for the limits of an `Slo` are held by each pool, and shared out to stages beforehand. Two
kernels, batched and compiled once:

- the bound: watts with the instances the load alone needs, latencies not looked at. Watts do not fall as instances are
  added (tested), so no pool costs less;
- a try: watts and the worst limit with so many instances, some three times as dear. The exact cost takes four or five,
  until the least instances that hold every limit are known. A try that fails is a bound too, and the first is of a
  little fewer instances than a pool should need by one alike, so that most pools are done with after one.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.core.threads import in_batches
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.fleet.limits import ROUNDING
from fleetopt_jax.fleet.parts import Part
from fleetopt_jax.fleet.resources import PoolPrices
from fleetopt_jax.fleet.sizing import LeastHeld, least_held
from fleetopt_jax.fleet.stage import Setting, setting_of
from fleetopt_jax.fleet.traffic import (
    PoolTraffic,
    RunningSums,
    Slice,
    atoms_of,
    routed_lengths,
    running_sums,
    slice_traffic,
)
from fleetopt_jax.laws.prefill import Prefill
from fleetopt_jax.workload.atoms import Workload, rounded_up

T = TypeVar("T")
PoolCost = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of instances and watts, with one engine

BOUND_BATCH = 8192  # pools of one compiled call: fixed, so that a search compiles once
TRY_BATCH = 512
CHUNK = 128  # of them whose numbers stay in the cache together
HOPELESS = 1e9  # instances, to begin with, of a pool whose like no number of them suffices
JUST_BELOW = 0.98  # of the instances that a pool should need: a try that fails is a bound


@partial(program, static_argnames=("assumptions", "compresses"))
def _running_sums(prefill: Prefill, workload: Workload, *, assumptions: Assumptions, compresses: bool) -> RunningSums:
    return running_sums(prefill, atoms_of(workload, assumptions), assumptions, compresses=compresses, all_read=True)


@program
def bound_batch(sums: RunningSums, part: Part, pools: Slice, slo: Slo, setting: Setting) -> tuple[Array, Array]:
    """(instances, watts) [M] that pools need at least; inf where no instance runs a sequence of the window."""

    def bound(pool: Slice) -> tuple[Array, Array]:
        traffic = _traffic(sums, part, pool, setting)
        least = part.least(traffic, pool.window_tokens, slo, setting)
        power_w = part.bound_w(traffic, pool.window_tokens, least, setting)
        return least, jnp.where(jnp.isfinite(least), power_w, jnp.inf)

    return _chunked(bound, pools)


@program
def tried_batch(
    sums: RunningSums, part: Part, pools: Slice, n_instances: Array, slo: Slo, setting: Setting
) -> tuple[Array, Array, Array]:
    """(instances, by how much they break a limit, watts) [M] of pools with so many instances, with those that the load
    needs where that is 0. With real rounding the latencies are left to the caller as constraints."""

    def tried(pool: Slice, n: Array) -> tuple[Array, Array, Array]:
        traffic = _traffic(sums, part, pool, setting)
        n = jnp.where(n > 0, n, part.least(traffic, pool.window_tokens, slo, setting))
        excess, power_w = part.tried(traffic, pool.window_tokens, n, slo, setting)
        judged = jnp.isfinite(n) & (n > 0) & setting.assumptions.whole
        return n, jnp.where(judged, excess, -1.0), jnp.where(jnp.isfinite(n), power_w, jnp.inf)

    return jax.vmap(tried)(pools, n_instances)


def _traffic(sums: RunningSums, part: Part, pool: Slice, setting: Setting) -> PoolTraffic:
    return slice_traffic(sums, part.engine.prefill, setting.surroundings.compressor, pool, setting.assumptions)


def _chunked(law: Callable[[Slice], T], pools: Slice) -> T:
    rows = jax.lax.map(jax.vmap(law), jax.tree.map(lambda x: x.reshape(-1, CHUNK), pools))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


class Known(NamedTuple):
    """What is known of pools [M] before they are tried."""

    least: np.ndarray  # instances that the load needs
    instances: np.ndarray  # that they need at least
    watts: np.ndarray  # the same
    guess: np.ndarray  # instances to try first


class Cuts(NamedTuple):
    """What pools can be cut by: boundary 0 is nothing, the last one the promised window. Arrays [N]."""

    window_tokens: np.ndarray
    gamma: np.ndarray
    edge_tokens: np.ndarray  # of the router, gamma times as far
    window_row: np.ndarray  # how many atoms are up to the window
    edge_row: np.ndarray  # and up to the edge

    @classmethod
    def of(cls, problem: Problem, window_tokens: np.ndarray, gamma: np.ndarray) -> "Cuts":
        """Boundaries at these windows [S], which need not rise where gammas differ, between the first and the last."""
        windows = np.concatenate([[0.0], window_tokens, [problem.window_tokens]])
        gammas = np.concatenate([[1.0], gamma, [1.0]])
        edges = np.asarray(windows * problem.assumptions.compression.effective_gamma(gammas))
        lengths = np.sort(routed_lengths(rounded_up(problem.workload), problem.assumptions))
        rows = (np.searchsorted(lengths, ends, side="right").astype(np.int32) for ends in (windows, edges))
        return cls(windows, gammas, edges, *rows)

    @property
    def last(self) -> int:
        return len(self.window_tokens) - 1

    def slices(self, lower: np.ndarray, upper: np.ndarray) -> Slice:
        """Of the requests between two boundaries [M]."""
        rows = self.window_row[lower], self.window_row[upper], self.edge_row[lower], self.edge_row[upper]
        return Slice(*(cast(Array, values) for values in (self.window_tokens[upper], *rows)))

    def in_order(self, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Whether windows rise and, but for the last pool, router edges do not fall [M]."""
        rises = self.window_tokens[lower] < self.window_tokens[upper]
        return rises & ((upper == self.last) | (self.edge_tokens[lower] <= self.edge_tokens[upper]))

    def spared(self, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Whether it is the last pool, whose traffic the one below promises to take [M]: it costs nothing where it has
        none, where another pool without traffic is no pool."""
        return (upper == self.last) & (self.edge_tokens[lower] >= self.window_tokens[-1])


def sums_of(problem: Problem, engines: Sequence[Engine], *, compresses: bool) -> list[RunningSums]:
    """The workload's sums for engines that pools may have: one for those of one published chunk."""
    workload = rounded_up(problem.workload)
    by_chunk: dict[float, RunningSums] = {}
    found: list[RunningSums] = []
    for engine in engines:
        chunk = float(engine.prefill.chunk_tokens) if problem.assumptions.prefill.reads_chunk else 0.0
        if chunk not in by_chunk:
            by_chunk[chunk] = _running_sums(
                engine.prefill, workload, assumptions=problem.assumptions, compresses=compresses
            )
        found.append(by_chunk[chunk])
    return found


class Boundaries:
    """What pools can be cut by, with the workload's sums for every engine a pool may have.

    Where it `compresses`, the programs can although no gamma asks for it.
    """

    def __init__(self, problem: Problem, window_tokens: np.ndarray, gamma: np.ndarray, *, compresses: bool = False):
        self.problem, self.n_evaluated = problem, 0
        self.cuts = Cuts.of(problem, window_tokens, gamma)
        self.window_tokens, self.gamma = self.cuts.window_tokens, self.cuts.gamma
        self.setting = setting_of(problem.workload, problem.around, problem.assumptions)
        self.offers = problem.offers
        self.n_offers = len(self.offers.each)
        engines = [offer.part.engine for offer in self.offers.each]
        self.sums = sums_of(problem, engines, compresses=compresses or problem.gamma != 1.0)

    @property
    def last(self) -> int:
        return self.cuts.last

    def at_rate(self, rate_per_s: float) -> "Boundaries":
        """The same requests coming at another rate [1/s]."""
        found = copy.copy(self)
        found.setting = replace(self.setting, **as_floats(arrival_rate_per_s=rate_per_s))
        return found

    def nearest(self, window_tokens: np.ndarray) -> np.ndarray:
        """The boundary whose window is the least that is not shorter, of any shape."""
        return np.searchsorted(self.window_tokens, window_tokens).clip(1, self.last)

    def bounds(self, e: int, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(instances, watts) [M] that pools with engine e need at least."""
        found = in_batches(lambda ends, _: bound_batch(*self._about(e, *ends)), BOUND_BATCH, (lower, upper))
        self.n_evaluated += len(lower)
        return self._if_allowed(lower, upper, *found)

    def least(self, e: int, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, and whether that is what they need [M]; by the program of `exact`, so that a search of few pools
        compiles no other. Of a stage only bounds, which are the same on all terms."""
        if self.setting.assumptions.occupancy.floors_in_flight or self.offers.each[e].agreed:
            found = self.bounds(e, lower, upper)
            return *found, ~np.isfinite(found[1])
        n, excess, watts = self._tried(e, lower, upper, np.zeros(len(lower)))
        self.n_evaluated += len(lower)
        instances, watts = self._if_allowed(lower, upper, n, watts)
        return instances, watts, np.asarray(excess <= ROUNDING) | ~np.isfinite(watts)

    def of_all(
        self,
        rule: Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, ...]],
        lower: np.ndarray,
        upper: np.ndarray,
    ) -> list[tuple[np.ndarray, ...]]:
        """`least` or `bounds` of all offers [R]; asked once of a spec in a role, whatever the terms."""
        known: dict[tuple[str, EngineSpec], tuple[np.ndarray, ...]] = {}
        for e, offer in enumerate(self.offers.each):
            if (offer.role, offer.spec) not in known:
                known[offer.role, offer.spec] = rule(e, lower, upper)
        return [tuple(x.copy() for x in known[offer.role, offer.spec]) for offer in self.offers.each]

    def exact(self, e: int, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(instances, watts) [M] that pools with engine e need."""
        instances, excess, watts = self._tried(e, lower, upper, np.zeros(len(lower)))
        self.n_evaluated += len(lower)
        left = np.flatnonzero(np.isfinite(instances) & (instances > 0))
        at = least_held(cast(Array, instances[left])).after(excess[left])
        never = np.full(len(left), np.inf)
        found = self._tried_until(e, lower[left], upper[left], at, watts[left], lambda instances, watts: watts, never)
        instances[left], watts[left], _ = found
        return self._if_allowed(lower, upper, instances, watts)

    def watts(self, e: int, lower: np.ndarray, upper: np.ndarray, n_instances: np.ndarray) -> np.ndarray:
        """Of pools with so many instances [M], whether they hold their limits or not; inf of pools there cannot be."""
        some = np.isfinite(n_instances) & (n_instances > 0)
        found = self._tried(e, lower, upper, np.where(some, n_instances, 1.0))[2]
        return self._if_allowed(
            lower, upper, n_instances, np.where(some, found, np.where(n_instances == 0, 0.0, np.inf))
        )[1]

    def pursued(
        self, e: int, lower: np.ndarray, upper: np.ndarray, known: Known, cost: PoolCost, worth: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same of pools that have traffic, and whether it is what they need [M]: one that turns out to cost no less
        than it is worth [M] is left with a bound, mostly after the first try."""
        at = least_held(cast(Array, known.least))
        trial = np.clip(known.guess, known.instances, at.most)
        at = replace(at, failed=cast(Array, known.instances - 1.0), trial=cast(Array, trial))
        if self.setting.assumptions.occupancy.floors_in_flight:  # watts may fall as instances are added: no bound
            worth = np.full(len(lower), np.inf)
        self.n_evaluated += len(lower)
        return self._tried_until(e, lower, upper, at, known.watts, cost, worth)

    def _tried_until(
        self,
        e: int,
        lower: np.ndarray,
        upper: np.ndarray,
        at: LeastHeld,
        watts: np.ndarray,
        cost: PoolCost,
        worth: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(instances, watts, whether they are what pools need) [M]: tried until they are, or until a try that fails
        shows that they cost what they are worth or more."""
        instances, watts, bound_w = np.asarray(at.found, float).copy(), watts.copy(), watts.copy()
        is_exact, left = np.ones(len(lower), bool), np.arange(len(lower))
        while True:
            closed = ~np.asarray(at.is_open)
            instances[left[closed]] = at.found[closed]
            least = np.asarray(at.failed) + 1.0
            bounded = ~closed & (cost(least, bound_w[left]) >= worth[left])
            rows = left[bounded]
            instances[rows], watts[rows], is_exact[rows] = least[bounded], bound_w[rows], False
            on = ~(closed | bounded)
            left, at = left[on], jax.tree.map(lambda x, on=on: x[on], at)
            if not len(left):
                return instances, np.where(np.isfinite(instances), watts, np.inf), is_exact
            _, excess, found = self._tried(e, lower[left], upper[left], np.asarray(at.trial))
            ok = excess <= ROUNDING
            watts[left[ok]], bound_w[left[~ok]] = found[ok], found[~ok]  # the last that passes is the least
            at = at.after(excess)

    def _tried(
        self, e: int, lower: np.ndarray, upper: np.ndarray, n_instances: np.ndarray
    ) -> tuple[np.ndarray, Array, np.ndarray]:
        """(instances, excess, watts) [M] of `tried_batch`."""

        def kernel(some: tuple[np.ndarray, np.ndarray, np.ndarray], _: int) -> tuple[Array, Array, Array]:
            lower, upper, n = some
            sums, part, pools, slo, setting = self._about(e, lower, upper)
            return tried_batch(sums, part, pools, cast(Array, n), slo, setting)

        return in_batches(kernel, TRY_BATCH, (lower, upper, n_instances))

    def _about(self, e: int, lower: np.ndarray, upper: np.ndarray) -> tuple[RunningSums, Part, Slice, Slo, Setting]:
        problem = self.problem
        return self.sums[e], self.offers.each[e].part, self.cuts.slices(lower, upper), problem.slo, self.setting

    def _if_allowed(
        self, lower: np.ndarray, upper: np.ndarray, instances: np.ndarray, watts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        cuts = self.cuts
        allowed = cuts.in_order(lower, upper) & ((instances > 0) | cuts.spared(lower, upper))
        return np.where(allowed, instances, np.inf), np.where(allowed, watts, np.inf)


class Pools:
    """Instances and watts of many pools for each offer: bounds, until they are made exact. Arrays [R, P].

    `ends` gives the two boundaries of the pools at some indices.
    """

    def __init__(
        self,
        boundaries: Boundaries,
        ends: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        instances: np.ndarray,
        watts: np.ndarray,
        is_exact: np.ndarray | None = None,
    ):
        self.boundaries, self.ends, self.instances, self.watts = boundaries, ends, instances, watts
        self.offers = boundaries.offers
        self.n_engines, self.least = len(watts), instances.copy()
        self.is_exact = (instances == 0) | (~np.isfinite(watts) if is_exact is None else is_exact)

    def make_exact(self, e: int, index: np.ndarray) -> None:
        """Replace the bounds of these pools; those that are exact are left alone."""
        index = index[~self.is_exact[e, index]]
        if len(index):
            self.instances[e, index], self.watts[e, index] = self.boundaries.exact(e, *self.ends(index))
            self.is_exact[e, index] = True

    def pursue(self, e: int, index: np.ndarray, near: np.ndarray, prices: PoolPrices, slack: np.ndarray) -> None:
        """The same of pools that are not exact; those whose cost rises by their slack [M] or more keep a bound, which
        says so. `near` are pools that may be exact: as many instances over what the load needs are tried first."""
        if not len(index):
            return
        least, at_least, watts = (each[e, index].astype(float) for each in (self.least, self.instances, self.watts))
        known = Known(least, at_least, watts, guess=np.floor(JUST_BELOW * self._over_least(e, near) * least))
        worth = prices.cost(e, at_least, watts) + slack
        found = self.boundaries.pursued(e, *self.ends(index), known, partial(prices.cost, e), worth)
        self.instances[e, index], self.watts[e, index], self.is_exact[e, index] = found

    def _over_least(self, e: int, index: np.ndarray) -> np.ndarray:
        """Instances that pools need over those that the load needs; 1 where not known, many where none suffice."""
        least = self.least[e, index]
        known = self.is_exact[e, index] & np.isfinite(least) & (least > 0)
        return np.divide(self.instances[e, index].clip(max=HOPELESS), least, out=np.ones(len(index)), where=known)

    def costs(self, prices: PoolPrices, e: int) -> np.ndarray:
        """Of every pool with engine e [P]."""
        return prices.cost(e, self.instances[e], self.watts[e])
