"""The choice `prefix_cache`: what of the prompts is found in the KV cache, and so is not computed again.

What is found shortens `prefill_tokens` alone: it is held, and the rest of the prompt attends to it. Compressed prompts
find nothing, for compressing changes how they begin.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.fleet.choices.dispatch import home_frac
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.lane_reuse import with_hits
from fleetopt_jax.laws.demand import Demand, cached_demand, demand
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.laws.prefill import Prefill
from fleetopt_jax.laws.prefix_cache import (
    age_place,
    at_place,
    fresh_tokens,
    resident_tokens,
    settled_place,
    spared_by_host_frac,
    thinned,
    used_within_tokens,
)
from fleetopt_jax.workload.columns import Columns

if TYPE_CHECKING:
    from fleetopt_jax.fleet.choices.occupancy import Operation
    from fleetopt_jax.fleet.lane_reuse import LaneReuse
    from fleetopt_jax.fleet.stage import Setting, StageState
    from fleetopt_jax.fleet.traffic import PoolTraffic

T = TypeVar("T")
Run = Callable[["PoolTraffic"], tuple["StageState", "Operation"]]  # how a stage runs that serves some traffic


class PrefixCache:
    """What is found of prompts: nothing, but for what a record says."""

    name: ClassVar[str]
    finds: ClassVar[bool] = True  # whether anything is found at all
    reads_reuse: ClassVar[bool] = False  # whether that depends on the cache, and the workload's reuse is needed

    def columns(self, columns: Columns) -> Columns:
        """The requests, whatever instance they come to."""
        return columns

    def demand(self, columns: Columns) -> Demand:
        """The features of such requests."""
        return demand(columns.prefill_tokens, columns.held_tokens, columns.steps, columns.output_tokens)

    def whole_tokens_found(self, prompt_tokens: np.ndarray) -> np.ndarray:
        """What each prompt finds where the cache does not decide, in whole tokens, never all of them."""
        return np.zeros_like(prompt_tokens)

    def as_fresh(self, prefill: Prefill, new_tokens: Array) -> Array:
        """The prompt without a cache that takes as long as so many new tokens of one [tokens], elementwise."""
        return new_tokens

    def met(
        self, engine: Engine, traffic: "PoolTraffic", n_instances: ArrayLike, setting: "Setting", run: Run
    ) -> "PoolTraffic":
        """The traffic of a stage of `n_instances`, less what it finds in its caches."""
        return traffic

    def at_best(self, engine: Engine, traffic: "PoolTraffic") -> "PoolTraffic":
        """The traffic of a stage whose caches hold everything: no stage has less to do."""
        return traffic


@dataclass(frozen=True)
class NoPrefixCache(PrefixCache):
    """Every prompt is computed as a whole."""

    name: ClassVar[str] = "none"
    finds: ClassVar[bool] = False


@dataclass(frozen=True)
class ConstantHits(PrefixCache):
    """Every prompt finds the same share of itself, whatever the cache, the pool and the instance; as somebody measured
    it. At least one token is computed."""

    hit_frac: float
    name: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.hit_frac < 1:
            raise BadField("prefix_hit", f"{self.hit_frac}", "need a share of the prompt tokens from 0 to below 1")

    def columns(self, columns: Columns) -> Columns:
        prompt = columns.held_tokens
        return replace(columns, prefill_tokens=jnp.maximum((1.0 - self.hit_frac) * prompt, jnp.minimum(prompt, 1.0)))

    def demand(self, columns: Columns) -> Demand:
        return cached_demand(columns.prefill_tokens, columns.held_tokens, columns.steps, columns.output_tokens)

    def whole_tokens_found(self, prompt_tokens: np.ndarray) -> np.ndarray:
        found = np.floor(self.hit_frac * prompt_tokens + 0.5).astype(prompt_tokens.dtype)
        return np.minimum(found, np.maximum(prompt_tokens - 1, 0))

    def as_fresh(self, prefill: Prefill, new_tokens: Array) -> Array:
        cached = new_tokens * self.hit_frac / (1.0 - self.hit_frac)
        return fresh_tokens(prefill.per_token_s, prefill.per_token2_s, new_tokens, cached)


@dataclass(frozen=True)
class WorkingSetCache(PrefixCache):
    """Instances keep the KV blocks of prompts they have served until others need the room, what was used longest ago
    first: Denning's law (`laws/prefix_cache.py`), with the workload's own reuse.

    The cache of an instance is what the sequences in flight leave of its KV memory; how many those are depends on what
    is found: the least fixed point. The prompts of those in flight are found as well, so a block is kept for as long as
    a sequence decodes, and then for the age that the cache allows. An instance sees every use of a block in its pool
    where the dispatch follows prefixes, else one of N. What comes back from the host's memory, if there is any
    (`Engine.host_cache`), takes the engine's time.
    """

    name: ClassVar[str] = "working_set"
    reads_reuse: ClassVar[bool] = True

    def met(
        self, engine: Engine, traffic: "PoolTraffic", n_instances: ArrayLike, setting: "Setting", run: Run
    ) -> "PoolTraffic":
        reuse = _reuse_of(traffic)
        n = jnp.maximum(jnp.asarray(n_instances, dtype=float), 1e-3)
        kept = self._kept(engine, traffic, n, setting, run)
        stream = thinned(reuse.stream, kept)
        host = engine.host_cache

        def found(place: Array) -> "PoolTraffic":
            if host is None:
                return _with_hits(engine, traffic, kept, place)
            cache = at_place(resident_tokens(stream), place) + n * host.tokens
            spared = spared_by_host_frac(host, engine.prefill.per_token_s)
            return _with_hits(engine, traffic, kept, place, age_place(stream, cache), spared)

        def next_place(place: Array) -> Array:
            state, operation = run(found(place))
            free = free_tokens(state, operation.n_decoding)
            flight_s = safe_div(operation.n_decoding, state.instance_per_s)
            in_flight = used_within_tokens(stream, flight_s * setting.arrival_rate_per_s)
            return age_place(stream, n * free + in_flight)

        return found(settled_place(next_place, reuse.last))

    def _kept(self, engine: Engine, traffic: "PoolTraffic", n_instances: Array, setting: "Setting", run: Run) -> Array:
        """Share of the reuse, by age, that is seen by the cache that it comes to [A]."""
        reuse, dispatch = _reuse_of(traffic), setting.assumptions.dispatch
        if not dispatch.shares_caches:
            return reuse.kept(1.0 / jnp.maximum(n_instances, 1.0))
        if math.isinf(dispatch.bound):
            return reuse.kept(1.0)
        in_flight = run(self.at_best(engine, traffic))[1].n_decoding
        home = home_frac(dispatch.bound, in_flight, n_instances)
        return home * reuse.kept(home) + (1.0 - home) * reuse.kept(1.0 - home)

    def at_best(self, engine: Engine, traffic: "PoolTraffic") -> "PoolTraffic":
        reuse = _reuse_of(traffic)
        return _with_hits(engine, traffic, reuse.kept(1.0), jnp.asarray(float(reuse.last)))


def free_tokens(state: "StageState", n_active: Array) -> Array:
    """KV memory of an instance that so many sequences in flight leave [tokens]."""
    kv = state.engine.kv
    return jnp.maximum(BLOCK_TOKENS * kv.n_blocks - n_active * (state.load.context_tokens + kv.fixed_tokens), 0.0)


def not_searched(by: str = "this") -> BadInput:
    """The refusal of whoever cannot size pools by what they find."""
    return BadInput(
        "a prefix cache of the working set",
        f"what is found depends on instances and memory, which {by} does not take into account yet",
        "need a share of the prompt tokens; optimize, pareto and evaluate take a trace or a curve",
    )


def _reuse_of(traffic: "PoolTraffic") -> "LaneReuse":
    if traffic.reuse is None:
        raise not_searched()
    return traffic.reuse


def _with_hits(
    engine: Engine,
    traffic: "PoolTraffic",
    kept: Array,
    place: Array,
    host_place: Array | None = None,
    spared_frac: ArrayLike = 0.0,
) -> "PoolTraffic":
    """The traffic where this share of the reuse, by age, is found up to an age on the GPUs, and up to another on the
    hosts, where it spares a share of the work."""
    reuse = _reuse_of(traffic)

    def mixed(near: T, far: T) -> T:
        return jax.tree.map(lambda a, b: a + spared_frac * (b - a), near, far)

    demand, cells = reuse.demand_at(traffic.demand, kept, place), reuse.cells_at(kept, place)
    if host_place is not None:
        demand = mixed(demand, reuse.demand_at(traffic.demand, kept, host_place))
        cells = mixed(cells, reuse.cells_at(kept, host_place))
    prompts = traffic.prompts
    if prompts is not None and cells is not None:
        prompts = with_hits(prompts, cells, engine.prefill)
    return replace(traffic, demand=demand, prompts=prompts, reuse=None)
