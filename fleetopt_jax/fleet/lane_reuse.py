"""What the prompts of a lane have in common: the workload's reuse, summed over the requests that the lane serves.

A sum over atoms, as all that laws read. A reuse counts with the share that both its requests have in the lane:
who was served elsewhere left nothing in these caches. Of a block that was used more than once before, uses are taken to
be in the lane by chance, as often as the last one is. Error against pools whose caches forget nothing, split anywhere:
0.7 points of hit share on Mooncake's traces; up to 4, and 7 in one of the pools, where conversations of many turns
grow across the threshold, whose turns before are all on the other side (`experiments/prefix_law.py`,
`tests/test_prefix_cache.py`, `tests/test_sticky.py`).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.demand import CachedPrompts, Demand, with_nothing_cached
from fleetopt_jax.laws.prefill import Prefill
from fleetopt_jax.laws.prefix_cache import WorkingSet, at_place, fresh_tokens, kept_frac
from fleetopt_jax.workload.reuse import Reuse

if TYPE_CHECKING:
    from fleetopt_jax.fleet.traffic import PromptHistogram

N_HIT_CELLS = 64  # of what is left of prompts, even in log-length


@pytree
class HitCells:
    """The prompts of which some is found, by what is left of them, by age. Shares of the lane's requests."""

    taken: Array  # of the requests in each cell of the workload's prompts [A, C]
    mass: Array  # [A, N_HIT_CELLS]
    new_tokens: Array  # to compute, times mass [tokens] [A, N_HIT_CELLS]
    cached_tokens: Array  # found, times mass [tokens] [A, N_HIT_CELLS]


@pytree
class LaneReuse:
    """The reuse among the requests of a lane, by age [A]. Leaves traced, or with a leading axis of K lanes."""

    stream: WorkingSet  # of the lane's share of a request of the workload, whichever lane the reused block is in
    both_frac: Array  # of this reuse, the share whose other request is in the lane [A]
    shares: Array  # of the uses that a cache sees [S]
    kept_frac: Array  # of the reuse that it keeps [S, A]
    change: Demand  # of the lane's mean features where all is found [A]
    cells: HitCells | None  # where prompts are kept as a histogram

    @property
    def last(self) -> int:
        """The place of the oldest age."""
        return len(self.stream.age_requests) - 1

    def kept(self, seen_frac: ArrayLike) -> Array:
        """Share of the reuse that is kept, by age, where a cache sees such a share of the lane's uses [A]."""
        return kept_frac(seen_frac * self.both_frac, self.shares, self.kept_frac)

    def demand_at(self, without: Demand, kept: Array, place: ArrayLike) -> Demand:
        """The lane's mean features where this share of the reuse is found up to an age, against those `without`."""
        change = at_place(jax.tree.map(lambda x: kept * x, self.change), place)
        return jax.tree.map(jnp.add, with_nothing_cached(without), change)

    def cells_at(self, kept: Array, place: ArrayLike) -> HitCells | None:
        """The histogram where this share of the reuse is found up to an age; the leaves without their axis of ages."""
        return at_place(jax.tree.map(lambda x: kept[:, None] * x, self.cells), place)


def with_hits(prompts: "PromptHistogram", cells: HitCells, prefill: Prefill) -> "PromptHistogram":
    """The histogram with what is left of prompts beside those of which nothing is found; each by the prompt without a
    cache that takes an engine as long."""
    some = cells.mass > 0
    mass = jnp.where(some, cells.mass, 1.0)
    new, past = (jnp.where(some, x / mass, 0.0) for x in (cells.new_tokens, cells.cached_tokens))
    fresh = jax.lax.cummax(jnp.maximum(fresh_tokens(prefill.per_token_s, prefill.per_token2_s, new, past), 1.0))
    whole = jnp.maximum(prompts.mass[:-1] - cells.taken, 0.0)
    return replace(
        prompts,
        mass=jnp.concatenate([whole, cells.mass, prompts.mass[-1:]]),
        shortest=jnp.concatenate([prompts.shortest, fresh]),
        longest=jnp.concatenate([prompts.longest, fresh]),
    )


def lane_reuse(
    reuse: Reuse,
    prompt_tokens: Array,
    weight: Array,
    mass: Array,
    served: tuple[Array, Array],
    prompt_cells: tuple[Array, int] | None,
) -> LaneReuse:
    """The reuse of one lane that serves `mass` [J] of the atoms, of `weight` [J], as they come. `served`: its share of
    all requests and their mean prompt, the compressed among them; `prompt_cells`: the cell of each atom [J] in the
    histogram of prompts, and how many there are."""
    frac, mean_prompt = served
    n_cells = reuse.pair_tokens.shape[1]
    cell = reuse.cell.astype(int)
    oldest = reuse.cached_tokens[:, -1]
    in_cell, of_cell = (jax.ops.segment_sum(each * oldest, cell, n_cells) for each in (mass, weight))
    inside = safe_div(in_cell, of_cell)
    this_end = jnp.einsum("g,agh->a", inside, reuse.pair_tokens)
    both_ends = jnp.einsum("g,h,agh->a", inside, inside, reuse.pair_tokens)
    return LaneReuse(
        stream=WorkingSet(reuse.age_requests, frac * mean_prompt, mass @ reuse.cached_tokens),
        both_frac=jnp.clip(safe_div(both_ends, this_end, 1.0), 0.0, 1.0),
        shares=reuse.shares,
        kept_frac=reuse.kept_frac,
        change=jax.tree.map(lambda x: safe_div(mass @ x, frac), _change(reuse, prompt_tokens)),
        cells=None if prompt_cells is None else _hit_cells(reuse, prompt_tokens, safe_div(mass, frac), prompt_cells),
    )


def _two_values(reuse: Reuse) -> tuple[Array, Array]:
    """(share of an atom's requests that find anything, tokens that those find) [J, A]: two values with the mean and the
    mean square of what is found."""
    some = reuse.cached_tokens > 0
    h, h2 = (jnp.where(some, x, 1.0) for x in (reuse.cached_tokens, reuse.cached_tokens2))
    return jnp.where(some, jnp.minimum(h**2 / h2, 1.0), 0.0), jnp.where(some, h2 / h, 0.0)


def _change(reuse: Reuse, prompt_tokens: Array) -> Demand:
    """By how much the features of atoms change where all is found that was used within each age [J, A]."""
    h, h2, p = reuse.cached_tokens, reuse.cached_tokens2, prompt_tokens[:, None]
    share, found = _two_values(reuse)
    nothing = jnp.zeros_like(h)
    return Demand(
        prefill=-h,
        prefill2=-h2,
        prefill3=-(p**2) * h - p * h2 + share * found**3,
        prefill4=-2.0 * p**2 * h2 + share * found**4,
        steps=nothing,
        steps2=nothing,
        held=nothing,
        held2=nothing,
        cached=CachedPrompts(tokens=h, prefill_square=h2 - 2.0 * p * h),
    )


def _hit_cells(reuse: Reuse, prompt_tokens: Array, mass: Array, prompt_cells: tuple[Array, int]) -> HitCells:
    """The histogram of prompts of which some is found, by age."""
    of, n_prompt_cells = prompt_cells
    share, found = _two_values(reuse)
    share = share * mass[:, None]
    new = jnp.maximum(prompt_tokens[:, None] - found, jnp.minimum(prompt_tokens[:, None], 1.0))
    span = jnp.log(jnp.maximum(prompt_tokens.max(), 2.0))
    left = jnp.clip(jnp.floor(N_HIT_CELLS * jnp.log(jnp.maximum(new, 1.0)) / span), 0, N_HIT_CELLS - 1).astype(int)
    n_ages = found.shape[1]
    at = (jnp.arange(n_ages) * N_HIT_CELLS + left).ravel()

    def summed(x: Array) -> Array:
        return jax.ops.segment_sum(x.ravel(), at, n_ages * N_HIT_CELLS).reshape(n_ages, N_HIT_CELLS)

    taken = jax.ops.segment_sum(share, of, n_prompt_cells).T
    return HitCells(taken, summed(share), summed(share * new), summed(share * found))
