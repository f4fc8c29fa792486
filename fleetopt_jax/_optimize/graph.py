"""Pools as edges between boundaries: bounds on what every pool costs at once, and the exact cost of those that matter.

A pool is an edge from a lower boundary to an upper one (a window and its router edge), served by one of E engines. What
it needs, instances and watts, depends on nothing else, for the limits of an `Slo` are held by each pool. Two kernels,
batched and compiled once:

- the bound: watts with the instances the load alone needs, latencies not looked at. Watts do not fall as instances are
  added (tested), so no pool costs less;
- the exact cost: the least instances that hold every limit, some hundred times as dear.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import PoolMetrics, pool_metrics
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.fleet.resources import PoolPrices
from fleetopt_jax.fleet.sizing import least_instances, required_instances
from fleetopt_jax.fleet.stage import Setting, setting_of
from fleetopt_jax.fleet.traffic import PoolTraffic, RunningSums, Slice, atoms_of, running_sums, slice_traffic
from fleetopt_jax.laws.prefill import Prefill
from fleetopt_jax.workload.atoms import Workload

T = TypeVar("T")

BOUND_BATCH = 8192  # pools of one compiled call: fixed, so that a search compiles once
EXACT_BATCH = 1024
N_THREADS = os.cpu_count() or 1  # batches at a time, each of which keeps one core busy
CHUNK = 1024  # of them whose numbers stay in the cache together


@partial(jax.jit, static_argnames=("assumptions", "compresses"))
def _running_sums(prefill: Prefill, workload: Workload, *, assumptions: Assumptions, compresses: bool) -> RunningSums:
    return running_sums(prefill, atoms_of(workload, assumptions), assumptions, compresses=compresses, all_read=True)


@jax.jit
def bound_batch(sums: RunningSums, engine: Engine, pools: Slice, slo: Slo, setting: Setting) -> tuple[Array, Array]:
    """(instances, watts) [M] that pools need at least; inf where no instance runs a sequence of the window."""

    assumptions = setting.assumptions

    def bound(pool: Slice) -> tuple[Array, Array]:
        traffic = _traffic(sums, engine, pool, setting)
        least = least_instances(engine, traffic, pool.window_tokens, slo, setting)
        watts = partial(_watts, engine, traffic, pool.window_tokens, setting=setting)
        metrics = watts(least)
        power_w = metrics.power_w
        if assumptions.whole and assumptions.occupancy.floors_in_flight:
            # n = floor(rho n_max): the only way to fewer watts is to add instances until one sequence fewer is counted.
            fewer = jnp.floor(metrics.utilization * metrics.n_max * least / jnp.maximum(metrics.n_active, 1.0)) + 1.0
            power_w = jnp.minimum(power_w, watts(jnp.where(jnp.isfinite(fewer), fewer, least)).power_w)
        return least, jnp.where(jnp.isfinite(least), power_w, jnp.inf)

    return _chunked(bound, pools)


@jax.jit
def exact_batch(
    sums: RunningSums, engine: Engine, pools: Slice, slo: Slo, setting: Setting
) -> tuple[Array, PoolMetrics]:
    """(instances [M] with which pools hold every limit, inf where none do; their metrics [M], P99s not solved for)."""

    def exact(pool: Slice) -> tuple[Array, PoolMetrics]:
        traffic = _traffic(sums, engine, pool, setting)
        n = required_instances(engine, traffic, pool.window_tokens, slo, setting)
        return n, _watts(engine, traffic, pool.window_tokens, n, setting=setting)

    return _chunked(exact, pools)


def _traffic(sums: RunningSums, engine: Engine, pool: Slice, setting: Setting) -> PoolTraffic:
    return slice_traffic(sums, engine.prefill, setting.surroundings.compressor, pool, setting.assumptions)


def _watts(engine: Engine, traffic: PoolTraffic, window: Array, n: Array, *, setting: Setting) -> PoolMetrics:
    finite = jnp.where(jnp.isfinite(n), n, 1.0)
    return pool_metrics(engine, traffic, window, finite, setting)


def _chunked(law: Callable[[Slice], T], pools: Slice) -> T:
    rows = jax.lax.map(jax.vmap(law), jax.tree.map(lambda x: x.reshape(-1, CHUNK), pools))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


class Boundaries:
    """What pools can be cut by, with the workload's sums for every engine a pool may have.

    Boundary 0 is nothing, the last one the promised window; windows [S] need not rise where gammas differ. Where it
    `compresses`, the programs can although no gamma asks for it.
    """

    def __init__(self, problem: Problem, window_tokens: np.ndarray, gamma: np.ndarray, *, compresses: bool = False):
        self.problem, self.n_evaluated = problem, 0
        self.window_tokens = np.concatenate([[0.0], window_tokens, [problem.window_tokens]])
        self.gamma = np.concatenate([[1.0], gamma, [1.0]])
        assumptions = problem.assumptions
        self.edge_tokens = np.asarray(self.window_tokens * assumptions.compression.effective_gamma(self.gamma))
        self.setting = setting_of(problem.workload, problem.around, assumptions)
        by_chunk: dict[float, RunningSums] = {}
        self.sums: list[RunningSums] = []
        for engine in problem.engines:
            chunk = float(engine.prefill.chunk_tokens) if assumptions.prefill.reads_chunk else 0.0
            if chunk not in by_chunk:
                by_chunk[chunk] = _running_sums(
                    engine.prefill,
                    problem.workload,
                    assumptions=assumptions,
                    compresses=compresses or problem.gamma != 1.0,
                )
            self.sums.append(by_chunk[chunk])
        route_tokens = np.asarray(self.sums[0].route_tokens)
        self._window_row, self._edge_row = (
            np.searchsorted(route_tokens, ends, side="right").astype(np.int32)
            for ends in (self.window_tokens, self.edge_tokens)
        )

    @property
    def last(self) -> int:
        return len(self.window_tokens) - 1

    def nearest(self, window_tokens: np.ndarray) -> np.ndarray:
        """The boundary whose window is the least that is not shorter, of any shape."""
        return np.searchsorted(self.window_tokens, window_tokens).clip(1, self.last)

    def bounds(self, e: int, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(instances, watts) [M] that pools with engine e need at least."""
        found = self._in_batches(bound_batch, BOUND_BATCH, e, lower, upper)
        return self._if_allowed(lower, upper, found)

    def exact(self, e: int, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(instances, watts) [M] that pools with engine e need."""

        def kernel(*about) -> tuple[Array, Array]:
            n, metrics = exact_batch(*about)
            return n, jnp.where(jnp.isfinite(n), metrics.power_w, jnp.inf)

        return self._if_allowed(lower, upper, self._in_batches(kernel, EXACT_BATCH, e, lower, upper))

    def metrics(self, e: int, lower: int, upper: int) -> PoolMetrics:
        """Of one pool with engine e and the instances it needs, by the search's program. P99s are not solved for."""
        _, metrics = self.sized(e, np.array([lower]), np.array([upper]))
        return jax.tree.map(lambda x: x[0], metrics)

    def sized(self, e: int, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, PoolMetrics]:
        """(instances, metrics) [M] of a few pools with engine e, as `metrics`; inf instances where none will do."""
        index = np.minimum(np.arange(EXACT_BATCH), len(lower) - 1)
        found = exact_batch(*self._about(e, lower[index], upper[index]))
        return jax.tree.map(lambda x: np.asarray(x)[: len(lower)], found)

    def _about(self, e: int, lower: np.ndarray, upper: np.ndarray) -> tuple[RunningSums, Engine, Slice, Slo, Setting]:
        problem = self.problem
        rows = self._window_row[lower], self._window_row[upper], self._edge_row[lower], self._edge_row[upper]
        pools = Slice(*(cast(Array, values) for values in (self.window_tokens[upper], *rows)))
        return self.sums[e], problem.engines[e], pools, problem.slo, self.setting

    def _in_batches(self, kernel, batch: int, e: int, lower: np.ndarray, upper: np.ndarray) -> list[np.ndarray]:
        n = len(lower)

        def part(start: int) -> list[np.ndarray]:
            rows = np.minimum(np.arange(start, start + batch), n - 1)  # the last batch repeats its last pool
            values = kernel(*self._about(e, lower[rows], upper[rows]))
            return [np.asarray(each)[: n - start] for each in values]

        first, *others = range(0, n, batch)
        found = [part(first)]  # compiles
        # Threads have JAX's options as the process has them, not as a block of this thread does.
        alike = jax.config.read("jax_enable_x64") == (jax.dtypes.canonicalize_dtype(np.float64) == np.float64)
        threads = ThreadPoolExecutor(N_THREADS)
        try:
            found += (threads.map if alike else map)(part, others)
        finally:
            threads.shutdown(cancel_futures=True)  # an interrupt waits for none
        self.n_evaluated += n
        return [np.concatenate(each) for each in zip(*found)]

    def _if_allowed(
        self, lower: np.ndarray, upper: np.ndarray, found: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        instances, watts = found
        allowed = self._allowed(lower, upper, instances)
        return np.where(allowed, instances, np.inf), np.where(allowed, watts, np.inf)

    def _allowed(self, lower: np.ndarray, upper: np.ndarray, instances: np.ndarray) -> np.ndarray:
        """Windows rise and, but for the last pool, router edges do not fall. A pool without traffic is no pool, but for
        a last one whose traffic the one below promises to take: it costs nothing."""
        rises = self.window_tokens[lower] < self.window_tokens[upper]
        last = upper == self.last
        spared = last & (self.edge_tokens[lower] >= self.window_tokens[-1])
        in_order = last | (self.edge_tokens[lower] <= self.edge_tokens[upper])
        return rises & in_order & ((instances > 0) | spared)


class Pools:
    """Instances and watts of many pools for each engine: bounds, until they are made exact. Arrays [E, P].

    `ends` gives the two boundaries of the pools at some indices.
    """

    def __init__(
        self,
        boundaries: Boundaries,
        ends: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        instances: np.ndarray,
        watts: np.ndarray,
    ):
        self.boundaries, self.ends, self.instances, self.watts = boundaries, ends, instances, watts
        self.n_engines = len(watts)
        self.is_exact = ~np.isfinite(watts)

    def make_exact(self, e: int, index: np.ndarray) -> None:
        """Replace the bounds of these pools; those that are exact are left alone."""
        index = index[~self.is_exact[e, index]]
        if len(index):
            self.instances[e, index], self.watts[e, index] = self.boundaries.exact(e, *self.ends(index))
            self.is_exact[e, index] = True

    def costs(self, prices: PoolPrices, e: int) -> np.ndarray:
        """Of every pool with engine e [P]."""
        per_instance, per_watt = prices.per_instance[e], prices.per_watt[e]
        if per_instance == 0.0 and per_watt == 1.0:
            return self.watts[e]
        total = np.where(np.isfinite(self.watts[e]), 0.0, np.inf)  # 0 times inf is not 0
        if per_instance:
            total += per_instance * self.instances[e]
        if per_watt:
            total += per_watt * self.watts[e]
        return total
