"""With what probability a fleet holds its limits: pool by pool under drawn errors of its engines and of the laws.

An engine's errors are common to every pool that has it (`engine_errors.py`); the laws of latency err in each pool by
themselves (`law_errors.py`), by a factor on its P99 TTFT and one on its mean ITL, both exp(sigma z). Draws are common
random numbers: those of an engine depend on its name and the seed alone, those of the laws on the pool's place and the
seed, so that fleets are compared under the same errors, and a plan that is read again holds as often as it did.

What must hold is what is promised: the latencies, and that no pool is overloaded. That a pool is planned at 85 % load
is room for such errors, not a promise, and is not asked for again when they come.

Left out: errors of the workload, of the KV cache, and that laws and engines may be off together.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax._optimize.engine_errors import (
    EngineFactors,
    draw,
    errors_of,
    however_run,
    normal_scores,
    perturb,
    slower,
)
from fleetopt_jax._optimize.law_errors import LAW_ERRORS, LawErrors
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.core.threads import in_batches
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import pool_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo, with_limits
from fleetopt_jax.fleet.limits import ROUNDING, itl_excess, load_excess, ttft_excess
from fleetopt_jax.fleet.resources import pool_prices
from fleetopt_jax.fleet.sizing import least_held, least_instances
from fleetopt_jax.fleet.stage import Setting, setting_of
from fleetopt_jax.fleet.traffic import PoolTraffic, routed
from fleetopt_jax.workload.atoms import Workload

N_DRAWS = 1024
BATCH = 256  # draws that are judged at once, by one program for every pool
OF_LAWS = 1  # keeps the draws of the laws from those of an engine
FULL = 1.0  # load beyond which requests wait for ever


@pytree
class Errors:
    """What a pool's engine and the laws of its latencies are off by: factors, 1 as they stand [-]. Shape [m]."""

    engine: EngineFactors
    ttft: Array  # P99 TTFT over what the law says
    itl: Array  # mean ITL likewise


def drawn(spec: EngineSpec, k: int, n_draws: int = N_DRAWS, seed: int = 0, laws: LawErrors = LAW_ERRORS) -> Errors:
    """Draws [n] of what the k-th pool of a fleet, with this engine, is off by."""
    named = however_run(spec)
    name = (named.gpu_name, named.llm_name, named.split, named.precision, named.kv_precision, named.serving)
    z = normal_scores((2,), n_draws, (seed, OF_LAWS, k))
    factors = as_floats(ttft=np.exp(laws.ttft_p99_s * z[0]), itl=np.exp(laws.itl_s * z[1]))
    return Errors(engine=draw(errors_of(spec), n_draws, (seed, zlib.crc32(repr(name).encode()))), **factors)


def slowed(spec: EngineSpec, sigmas: np.ndarray, laws: LawErrors = LAW_ERRORS) -> Errors:
    """Engine and laws slower than they stand by so many sigmas [m], all by as many; watts as they are."""
    ttft, itl = np.exp(laws.ttft_p99_s * sigmas), np.exp(laws.itl_s * sigmas)
    factors = jax.tree.map(np.asarray, slower(errors_of(spec), sigmas))
    return Errors(engine=factors, **as_floats(ttft=ttft, itl=itl))


def as_they_stand(spec: EngineSpec, m: int = 1) -> Errors:
    """No error at all, m times."""
    return slowed(spec, np.zeros(m))


def tightened(slo: Slo, ttft: ArrayLike, itl: ArrayLike) -> Slo:
    """The limits that a law must hold so that latencies so many times what it says hold them."""
    return with_limits(
        slo, ttft_p99_s=slo.ttft_p99_s / ttft, ttft_s_per_token=slo.ttft_s_per_token / ttft, itl_s=slo.itl_s / itl
    )


@pytree
class Judged:
    """A pool with so many instances under such errors. Shape [m]."""

    n_instances: Array
    load: Array  # excess over a full load [-]; nothing holds where it is above 0
    ttft: Array  # excess over the limit, see `fleet/limits.py` [-]
    itl: Array
    power_w: Array
    output_tok_per_s: Array

    @property
    def worst(self) -> np.ndarray:
        """The largest excess; all limits hold where it is not above 0."""
        return np.maximum(np.maximum(self.load, self.ttft), self.itl)


@program
def _judged(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: Array,
    n_instances: Array,
    errors: Errors,
    slo: Slo,
    setting: Setting,
) -> Judged:
    def one(n: Array, off_by: Errors) -> Judged:
        off = perturb(engine, off_by.engine)
        limits = tightened(slo, off_by.ttft, off_by.itl)
        n = jnp.where(n > 0, n, least_instances(off, traffic, window_tokens, limits, setting))
        metrics = pool_metrics(off, traffic, window_tokens, jnp.where(jnp.isfinite(n), n, 1.0), setting)
        return Judged(
            n_instances=n,
            load=load_excess(metrics, limits),
            ttft=ttft_excess(metrics, limits),
            itl=itl_excess(metrics, limits),
            power_w=metrics.power_w,
            output_tok_per_s=metrics.output_tok_per_s,
        )

    return jax.vmap(one)(n_instances, errors)


@dataclass(frozen=True)
class Pool:
    """One pool of a fleet in what surrounds it: whatever its instances, under whatever errors."""

    spec: EngineSpec
    engine: Engine
    traffic: PoolTraffic
    window_tokens: Array
    slo: Slo  # that each of its instances must hold
    setting: Setting

    def judged(self, n_instances: np.ndarray | float, errors: Errors) -> Judged:
        """With so many instances, of each draw [m] or of all, as many as the load needs where that is 0."""
        n = np.broadcast_to(np.asarray(n_instances, float), (len(errors.ttft),))

        def kernel(asked: tuple[Array, Errors], _: int) -> Judged:
            return _judged(self.engine, self.traffic, self.window_tokens, *asked, self.slo, self.setting)

        return in_batches(kernel, BATCH, (n, errors))

    def costs(self, n_instances: np.ndarray, problem: Problem) -> np.ndarray:
        """Of so many instances [m], with engine and laws as they stand, by what the problem is searched for."""
        power_w = self.judged(n_instances, as_they_stand(self.spec, len(n_instances))).power_w
        prices = pool_prices(problem.search_weights, [self.spec.gpu_name], [self.engine], problem.around.site)
        return prices.cost(0, n_instances, np.asarray(power_w))

    def needed(self, errors: Errors) -> np.ndarray:
        """The least instances with which the pool holds its limits under each of the errors [m]; inf for none that are
        worth having."""
        first = self.judged(0.0, errors)
        found, left = np.array(first.n_instances, float), np.flatnonzero(np.isfinite(first.n_instances))
        at = least_held(cast(Array, found[left])).after(cast(Array, first.worst[left]))
        while True:
            closed = ~np.asarray(at.is_open)
            found[left[closed]] = np.asarray(at.found)[closed]
            left, at = left[~closed], jax.tree.map(lambda x, on=~closed: np.asarray(x)[on], at)
            if not len(left):
                return found
            some = jax.tree.map(lambda x, rows=left: np.asarray(x)[rows], errors)
            at = at.after(cast(Array, self.judged(np.asarray(at.trial), some).worst))


def pools_of(
    fleet: Fleet, specs: Sequence[EngineSpec], problem: Problem, workload: Workload | None = None
) -> list[Pool]:
    """The pools of a fleet of these specs, under the problem's workload or another one."""
    served = problem.workload if workload is None else workload
    traffic = jax.tree.map(np.asarray, routed(fleet, served, problem.assumptions))
    setting = setting_of(served, problem.around, problem.assumptions)
    return [
        Pool(
            spec=spec,
            engine=engine,
            traffic=jax.tree.map(lambda x, k=k: x[k], traffic),
            window_tokens=cast(Array, np.asarray(fleet.window_tokens)[k]),
            slo=with_limits(problem.slo, max_utilization=FULL),
            setting=setting,
        )
        for k, (spec, engine) in enumerate(zip(specs, fleet.engines, strict=True))
    ]


@dataclass(frozen=True)
class Draws:
    """How the draws came out, pool by pool: of each, excesses of the limits [K, n]."""

    load: np.ndarray
    ttft: np.ndarray
    itl: np.ndarray
    requests: np.ndarray  # share of the pools [K, 1]
    tokens_per_s: np.ndarray  # output [K, n]
    power_w: np.ndarray  # [K, n]
    scope: str

    @cached_property
    def by_limit(self) -> dict[str, np.ndarray]:
        """Which draws hold each limit [n], by its name; no pool is overloaded where `utilization` holds."""
        ttft, itl = self.ttft, self.itl
        if self.scope == "fleet":
            ttft, itl = _mean(ttft, self.requests), _mean(itl, self.tokens_per_s)
        found = {"utilization": self.load, "ttft_p99_s": ttft, "itl_s": itl}
        return {name: np.max(excess, axis=0) <= ROUNDING for name, excess in found.items()}

    @property
    def held(self) -> np.ndarray:
        """Which draws hold all of them [n]."""
        return np.all(list(self.by_limit.values()), axis=0)

    @property
    def tok_per_j(self) -> np.ndarray:
        """Output tokens per joule [n]; 0 in overload, where what is served comes too late."""
        served = np.max(self.load, axis=0) <= ROUNDING
        return np.where(served, np.sum(self.tokens_per_s, axis=0) / np.sum(self.power_w, axis=0), 0.0)

    @property
    def by_pool(self) -> np.ndarray:
        """The share of the draws in which each pool holds its limits by itself [K]."""
        return np.mean(np.maximum(np.maximum(self.load, self.ttft), self.itl) <= ROUNDING, axis=1)


def _mean(excess: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Over the pools, of all together [1, n]."""
    total = np.sum(weight * np.ones_like(excess), axis=0, keepdims=True)
    return np.asarray(safe_div(np.sum(weight * excess, axis=0, keepdims=True), total, otherwise=-1.0))


def judge_draws(
    pools: Sequence[Pool], n_instances: Sequence[float], draws_of: Callable[[EngineSpec, int], Errors] = drawn
) -> Draws:
    """A fleet with so many instances [K] under drawn errors, `draws_of(spec, k)` of each pool."""
    judged = [
        pool.judged(n, draws_of(pool.spec, k)) for k, (pool, n) in enumerate(zip(pools, n_instances, strict=True))
    ]
    return Draws(
        *(np.stack([np.asarray(getattr(each, name)) for each in judged]) for name in ("load", "ttft", "itl")),
        requests=np.array([[float(pool.traffic.traffic_frac)] for pool in pools]),
        tokens_per_s=np.stack([np.asarray(each.output_tok_per_s) for each in judged]),
        power_w=np.stack([np.asarray(each.power_w) for each in judged]),
        scope=pools[0].slo.scope,
    )


@dataclass(frozen=True)
class Holding:
    """How often a plan holds its limits."""

    probability: float  # that all hold
    by_limit: dict[str, float]  # that each limit of the service holds, and that no pool is overloaded (`utilization`)
    by_pool: tuple[float, ...]  # that each pool holds its own, where pools have limits of their own
    n_draws: int
    seed: int
    laws: LawErrors


def holding(plan: Plan, *, n_draws: int = N_DRAWS, seed: int = 0) -> Holding:
    """The probability that a plan's latencies hold, its fleet as it is, under the errors of its engines and the laws.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> plan = fo.require_plan(fo.optimize(fo.make_problem(chat, [fo.EngineSpec("h100")], n_pools=1)))
    >>> 0.0 < fo.holding(plan).probability <= 1.0
    True
    """
    draws = plan_draws(plan, n_draws, seed)
    limited = {"ttft_p99_s", "utilization"} | ({"itl_s"} if np.isfinite(float(plan.problem.slo.itl_s)) else set())
    served = float(plan.metrics.unserved_frac) <= ROUNDING
    return Holding(
        probability=float(np.mean(draws.held)) if served else 0.0,
        by_limit={name: float(np.mean(held)) for name, held in draws.by_limit.items() if name in limited},
        by_pool=tuple(draws.by_pool.tolist()) if plan.problem.slo.scope == "pool" else (),
        n_draws=n_draws,
        seed=seed,
        laws=LAW_ERRORS,
    )


def plan_draws(plan: Plan, n_draws: int = N_DRAWS, seed: int = 0) -> Draws:
    """A plan's fleet under drawn errors."""
    pools = pools_of(plan.fleet, plan.specs, plan.problem)
    return judge_draws(
        pools, np.asarray(plan.fleet.n_instances).tolist(), lambda spec, k: drawn(spec, k, n_draws, seed)
    )
