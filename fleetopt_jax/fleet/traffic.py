"""What each pool has to serve: the workload's atoms, routed and summed.

Everything a lane's laws read of its requests is one record of weighted sums, `ServedSums`, and one of what its
compressor squeezes, `CompressedSums`; both are sums of the same features of atoms, whatever the weights: a range of
atoms (hard routing), shares of each (soft routing), or smoothed rows of running sums (the relaxation).

The hard router needs no loop over atoms: with running sums over the sorted lengths, a pool's traffic is a difference of
two rows. Under `vmap` over thresholds the sums are computed once and a candidate costs two binary searches a pool, of
its window and of its edge. Every feature has a sum of its own: the compiler leaves out what the assumptions leave
unread, which it cannot do with the columns of a matrix.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import pytree, stack
from fleetopt_jax.fleet.assumptions import EXACT, Assumptions
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.lane_reuse import LaneReuse, lane_reuse
from fleetopt_jax.laws.compression import Compressor
from fleetopt_jax.laws.cycle import PromptKinds
from fleetopt_jax.laws.demand import Demand, with_nothing_cached
from fleetopt_jax.laws.prefill import Prefill
from fleetopt_jax.laws.routing import router_edges, soft_share
from fleetopt_jax.laws.service import StepMoments, step_moments
from fleetopt_jax.workload.atoms import Workload, rounded_up, total_tokens
from fleetopt_jax.workload.columns import Columns, columns_of
from fleetopt_jax.workload.reuse import Reuse

T = TypeVar("T")

N_CELLS = 160  # of the histogram of prompts
KINDS = 10  # of prompts that a histogram is told apart in, at most
NOBODY = 1e-12  # shares below are the rounding of running sums
OUTPUT_POWERS = 5  # sums of o^0 ... o^4 over compressible requests


# --- what a pool gets -------------------------------------------------------------------------------------------------


@pytree
class PromptHistogram:
    """A pool's prompts in the C cells of the workload, and behind them in one of those that are compressed."""

    mass: Array  # share of the pool's requests, sums to 1 (0 without traffic) [-] [C + 1]
    shortest: Array  # prompt of each cell, in whatever pool [tokens] [C]
    longest: Array  # [tokens] [C]
    window_tokens: Array  # beyond which the pool has none
    compressed_tokens: Array  # mean of the compressed ones
    compression_s: Array  # latency before those reach the engine

    @property
    def ends_tokens(self) -> tuple[Array, Array]:
        """(shortest, longest) prompt of each cell in this pool [tokens] [C + 1]."""
        clipped = jnp.minimum(jnp.stack([self.shortest, self.longest]), self.window_tokens)
        shortest, longest = (jnp.append(each, self.compressed_tokens) for each in clipped)
        return shortest, longest

    def kinds(self, n: int) -> PromptKinds:
        """The prompts in n parts of equal weight: a third by requests, by their tokens, and by the squares; n divides
        KINDS, so that all who ask share the work. Linear in a cell's mass through 0, for gradients that fill a cell
        which nobody is in."""
        tokens = sum(self.ends_tokens) / 2.0
        powers = jnp.stack([jnp.ones_like(tokens), tokens, tokens**2])
        each = self.mass * powers
        up_to = jnp.cumsum(each, axis=1)
        weights = KINDS / 3.0 * mean_over(jnp.ones(3), up_to[:, -1])
        reached, weight = weights @ up_to, weights @ powers
        ends = jnp.arange(1, KINDS)
        cell = jnp.minimum(jnp.sum(reached < ends[:, None], axis=1), self.mass.shape[-1] - 1)  # in which a part ends

        def there(of_cells: Array) -> Array:
            return of_cells.at[..., cell].get(mode="promise_in_bounds")

        part = mean_over(ends - there(reached - self.mass * weight), there(weight))
        at_ends = there(up_to - each) + part * there(powers)
        bounds = jnp.concatenate([jnp.zeros((3, 1)), at_ends, up_to[:, -1:]], axis=1)
        mass, of_tokens, of_square = jnp.diff(bounds[:, :: KINDS // n], axis=1)
        return PromptKinds(mass, mean_over(of_tokens, mass), mean_over(of_square, mass))

    def ends_of(self, rising: Callable[[Array], Array]) -> tuple[Array, Array]:
        """A rising function of the prompt at both [C + 1]. It is asked for where the workload's cells end, which many
        pools share, and for the window and the compressed prompt."""
        of_cells = rising(jnp.stack([self.shortest, self.longest], axis=1).reshape(-1)).reshape(-1, 2).T
        of_window, of_compressed = rising(jnp.stack([self.window_tokens, self.compressed_tokens]))
        least, most = (jnp.append(each, of_compressed) for each in jnp.minimum(of_cells, of_window))
        return least, most


@pytree
class PoolTraffic:
    """One pool's traffic, or that of K with a leading axis; the mean features are 0 where a pool gets nothing."""

    traffic_frac: Array  # share of all requests [-]
    output_tokens: Array  # mean output a request of the pool is credited with [tokens]
    steps: StepMoments  # mean features of the requests as served
    demand: Demand  # mean features of the requests as served
    compressor_tokens: Array  # prompt tokens the pool's compressor reads, per request of the whole workload [tokens]
    prompts: PromptHistogram | None  # where the assumptions need it
    reuse: LaneReuse | None = None  # of its prompts, where what is found of them depends on the cache

    def kinds(self, n: int) -> PromptKinds:
        """Its prompts in n kinds; in one, the mean, where there is no histogram."""
        if self.prompts is not None:
            return self.prompts.kinds(n)
        one, mean = jnp.ones(1), self.demand
        square = mean.prefill2 if mean.cached is None else mean.cached.prefill_square
        return PromptKinds(one, mean.prefill * one, square * one)


@pytree
class ServedSums:
    """Sums over the requests a lane serves as they come; or one request's features. Leaves of any common shape."""

    requests: Array  # share of all requests [-]
    output_tokens: Array  # credited
    steps: StepMoments
    demand: Demand
    in_cells: Array | None  # prompts by cell of the histogram, a last axis of C; None where no law reads them


@pytree
class CompressedSums:
    """Sums over the requests a lane tries to compress; or one request's features. Leaves of any common shape."""

    output_powers: tuple[Array, ...]  # o^0 ... o^4 of the output that is kept
    output_tokens: Array  # credited
    prompt_tokens: Array


# --- atoms and their features -----------------------------------------------------------------------------------------


@pytree
class PromptCells:
    """Cells of the histogram of prompts."""

    cell: Array  # of each atom [J]
    shortest: Array  # prompt of each cell [tokens] [C]
    longest: Array  # [tokens] [C]


@pytree
class Atoms:
    """The workload under the assumptions, in order of what the router sees: what all pools share."""

    weight: Array  # [J]
    columns: Columns  # [J]
    compressible: Array  # 1 for requests that can give way to a shorter window [J]
    whole_share: Array  # output share of a request compressed as a whole [-]
    cells: PromptCells | None
    reuse: Reuse | None = None  # where the assumptions read it


def atoms_of(workload: Workload, assumptions: Assumptions) -> Atoms:
    """The atoms as the assumptions have them, sorted by the length that is routed.

    A workload is sorted by total length when it is made; only a router that sees something else sorts again.
    """
    columns = _routed_columns(workload, assumptions)
    prompt = columns.held_tokens
    columns = assumptions.prefix_cache.columns(columns)
    reuse = _reuse_read(workload, prompt, assumptions)
    weight = jnp.asarray(workload.weight)
    by_prompt = jnp.asarray(workload.by_prompt).astype(int)
    if not assumptions.route_by.sorts_like_total:
        order = jnp.argsort(columns.route_tokens)
        columns = jax.tree.map(lambda x: jnp.asarray(x)[order], columns)
        weight, by_prompt = weight[order], jnp.argsort(order)[by_prompt]
        reuse = None if reuse is None else reuse.in_order(order)
    return Atoms(
        weight=weight,
        columns=columns,
        compressible=assumptions.compression.compressible(columns.held_tokens, columns.output_tokens),
        whole_share=jnp.asarray(assumptions.lengths.whole_share(workload, assumptions.output_share)),
        cells=_prompt_cells(weight, columns.prefill_tokens, by_prompt) if assumptions.tail.has_distribution else None,
        reuse=reuse,
    )


def _routed_columns(workload: Workload, assumptions: Assumptions) -> Columns:
    """The columns of the atoms in the workload's order, nothing of their prompts found in a cache."""
    split = assumptions.lengths.split(workload, assumptions.output_share, whole=assumptions.whole)
    seen = {"route_tokens": jnp.asarray(total_tokens(workload)), "kept_tokens": workload.routed_tokens}
    columns = replace(columns_of(*split), **seen)
    return replace(columns, route_tokens=assumptions.route_by.route_tokens(columns))


def routed_lengths(workload: Workload, assumptions: Assumptions) -> np.ndarray:
    """What the router compares with its thresholds, of each atom [tokens] [J]."""
    return np.asarray(_routed_columns(workload, assumptions).route_tokens)


def _reuse_read(workload: Workload, prompt_tokens: Array, assumptions: Assumptions) -> Reuse | None:
    """The reuse of the prompts as the assumptions have them, where they read it."""
    check_prefix_cache(workload, assumptions)
    if workload.reuse is None or not assumptions.prefix_cache.reads_reuse:
        return None
    return workload.reuse.scaled(prompt_tokens / workload.prompt_tokens)


def check_prefix_cache(workload: Workload, assumptions: Assumptions) -> None:
    """Refuse a prefix cache that spares nothing, or of which nothing is known."""
    if assumptions.prefix_cache.finds and assumptions.prefill.chunks_are_free:
        raise ValueError("need the prefill 'compute' for a prefix cache: prompts that ride along free spare nothing")
    if assumptions.prefix_cache.reads_reuse and workload.reuse is None:
        raise ValueError(
            "need a workload whose reuse is known for a prefix cache of the working set: of a trace with block hashes "
            "or sessions, or with a hit curve"
        )


def served_features(prefill: Prefill, atoms: Atoms, assumptions: Assumptions) -> ServedSums:
    """What is summed over requests that are served as they are, of each atom [J]."""
    columns = atoms.columns
    chunks = assumptions.prefill.chunks(prefill, columns.prefill_tokens, whole=assumptions.whole)
    return ServedSums(
        requests=jnp.ones_like(atoms.weight),
        output_tokens=columns.output_tokens,
        steps=step_moments(chunks, columns.steps, columns.held_tokens + columns.output_tokens),
        demand=assumptions.prefix_cache.demand(columns),
        in_cells=None if atoms.cells is None else jax.nn.one_hot(atoms.cells.cell, N_CELLS),
    )


def compressed_features(atoms: Atoms, kept_output: ArrayLike) -> CompressedSums:
    """What is summed over requests that a pool tries to compress, of each atom [J]."""
    kept = jnp.asarray(kept_output)
    return CompressedSums(
        output_powers=tuple(kept**j for j in range(OUTPUT_POWERS)),
        output_tokens=atoms.columns.output_tokens,
        prompt_tokens=atoms.columns.held_tokens,
    )


def _prompt_cells(weight: Array, prompt: Array, order: Array) -> PromptCells:
    """Cells even in a mean of three measures, requests, tokens and log-length, so that tails are resolved as finely as
    bulk and a spike in the data is a cell of its own. `order` sorts the prompts."""
    w, p = jnp.asarray(weight)[order], jnp.asarray(prompt)[order]
    requests, tokens = jnp.cumsum(w), jnp.cumsum(w * p)
    span = jnp.log(p[-1] / p[0])
    logs = jnp.where(span > 0, jnp.log(p / p[0]) / jnp.where(span > 0, span, 1.0), 0.0)
    rank = (requests / requests[-1] + tokens / tokens[-1] + logs) / 3.0
    cell = jnp.clip(jnp.floor(N_CELLS * rank).astype(int), 0, N_CELLS - 1)
    shortest = jnp.minimum(jax.ops.segment_min(p, cell, N_CELLS, indices_are_sorted=True), p[-1])
    longest = jnp.maximum(jax.ops.segment_max(p, cell, N_CELLS, indices_are_sorted=True), p[0])
    shortest, longest = jax.lax.cummin(shortest, reverse=True), jax.lax.cummax(longest)  # empty cells lie in between
    return PromptCells(jnp.zeros_like(cell).at[order].set(cell), shortest, jnp.maximum(longest, shortest))


# --- hard routing: differences of running sums ------------------------------------------------------------------------


@pytree
class RunningSums:
    """Sums of a workload's features over its first 0 ... J atoms: any pool's traffic is a difference of two rows."""

    as_is: ServedSums  # over all requests, leaves [J + 1, ...]
    eligible: ServedSums | None  # over those that can be compressed, if any are
    compressed: CompressedSums | None
    cells: PromptCells | None
    whole_share: Array
    route_tokens: Array  # of the atoms, rising [J]


@pytree
class Slice:
    """The requests between two boundaries that a lane serves. A boundary is a window and its router edge, gamma times
    as far; rows count the atoms up to them. Shape () or [M]."""

    window_tokens: Array  # of the pool: its upper boundary's
    start: Array  # row of the lower window
    end: Array  # row of the upper window
    lower_edge: Array  # row of the lower edge
    upper_edge: Array  # row of the upper edge


def running_sums(
    prefill: Prefill, atoms: Atoms, assumptions: Assumptions, *, compresses: bool, all_read: bool = False
) -> RunningSums:
    """The sums for `slice_traffic`. Of the engine only its published prefill chunk counts, where that is assumed.

    Where `all_read`, as in a search that keeps them, they are the columns of one scan, which compiles in half the time;
    else one scan each, so that a program that reads a few leaves the others out.
    """
    eligible = atoms.weight * atoms.compressible
    as_is = served_features(prefill, atoms, assumptions)
    compressed = compressed_features(atoms, atoms.columns.output_tokens)
    weighted = (
        _weighted(atoms.weight, as_is),
        _weighted(eligible, as_is) if compresses else None,
        _weighted(eligible, compressed) if compresses else None,
    )
    of_all, of_eligible, of_compressed = (
        _by_column(_running, weighted) if all_read else jax.tree.map(_running, weighted)
    )
    return RunningSums(
        as_is=of_all,
        eligible=of_eligible,
        compressed=of_compressed,
        cells=atoms.cells,
        whole_share=atoms.whole_share,
        route_tokens=atoms.columns.route_tokens,
    )


def slice_traffic(
    sums: RunningSums,
    prefill: Prefill,
    compressor: Compressor,
    requests: Slice,
    assumptions: Assumptions,
    in_cells: Array | None = None,
) -> PoolTraffic:
    """The traffic of the pool between two boundaries: the requests longer than the lower window up to the upper one,
    less those the pool below compresses, and those up to the upper edge that this pool compresses.

    What is compressed up to the lower edge does not depend on which of the pools below did it. `in_cells` are its
    prompts by cell, where `sums` have no running ones.
    """
    start, end = requests.start, requests.end

    def as_they_are(of_all: Array, of_eligible: Array | None) -> Array:
        kept = of_all[end] - of_all[start]
        if of_eligible is None:
            return kept
        taken = of_eligible[jnp.clip(requests.lower_edge, start, end)] - of_eligible[start]
        return kept - assumptions.compression.success_frac(compressor) * taken

    def compressed(of_eligible: Array) -> Array:
        first = jnp.maximum(end, requests.lower_edge)
        return of_eligible[jnp.maximum(requests.upper_edge, first)] - of_eligible[first]

    if sums.compressed is None:
        as_is, to_compress = jax.tree.map(lambda x: as_they_are(x, None), sums.as_is), nothing_compressed()
    else:
        as_is, to_compress = (
            jax.tree.map(as_they_are, sums.as_is, sums.eligible),
            jax.tree.map(compressed, sums.compressed),
        )
    if in_cells is not None:
        as_is = replace(as_is, in_cells=in_cells)
    about = sums.cells, sums.whole_share
    return served_traffic(prefill, compressor, requests.window_tokens, as_is, to_compress, about, assumptions)


def nothing_compressed() -> CompressedSums:
    """The sums of nobody."""
    nothing = jnp.zeros(())
    return CompressedSums((nothing,) * OUTPUT_POWERS, nothing, nothing)


def _weighted(mass: Array, features: T) -> T:
    return jax.tree.map(lambda x: (mass * x.T).T, features)


def _running(x: Array) -> Array:
    """Sums of the first 0, 1, 2, ... rows."""
    return jnp.concatenate([jnp.zeros_like(x[:1]), jnp.cumsum(x, axis=0)])


def _by_column(along_rows: Callable[[Array], Array], tree: T) -> T:
    """`along_rows` of all leaves at once, as the columns of one matrix."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = along_rows(jnp.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1))
    parts = jnp.split(columns, np.cumsum([x[0].size for x in leaves])[:-1], axis=1)
    return jax.tree.unflatten(treedef, [p.reshape(-1, *x.shape[1:]) for p, x in zip(parts, leaves, strict=True)])


# --- the router -------------------------------------------------------------------------------------------------------


def route(
    fleet: Fleet,
    workload: Workload,
    assumptions: Assumptions,
    *,
    router_width: ArrayLike | None = None,
    all_read: bool = False,
    many: bool = False,
) -> PoolTraffic:
    """The traffic of each lane, a leading axis of K; hard, or with a router of log-width `router_width` > 0. `all_read`
    as in `running_sums`; `many` where a program routes many fleets, which share even the sums of prompts by cell.

    A request goes to the first pool whose edge gamma B it does not exceed. Longer than B, it is compressed to B; where
    that fails it goes to the first pool whose window holds it as it is. Requests beyond the last edge are served by
    nobody.
    """
    if assumptions.integration != EXACT:
        raise ValueError("need exact integration: the sampled procedure is `published.procedure`'s alone")
    windows = fleet.window_tokens
    edges = router_edges(windows, jnp.asarray(assumptions.compression.effective_gamma(fleet.gamma)))
    atoms = atoms_of(workload, assumptions)
    prefills = stack([lane.stages[0].engine.prefill for lane in fleet.lanes])
    compressor = fleet.surroundings.compressor
    if router_width is not None:
        return _soft_traffic(atoms, prefills, compressor, windows, edges, assumptions, router_width)
    lengths = jnp.concatenate([windows, edges])
    window_rows, edge_rows = jnp.split(jnp.searchsorted(atoms.columns.route_tokens, lengths, side="right"), 2)
    none = jnp.zeros_like(window_rows[:1])
    slices = Slice(
        window_tokens=windows,
        start=jnp.concatenate([none, window_rows[:-1]]),
        end=window_rows,
        lower_edge=jnp.concatenate([none, edge_rows[:-1]]),
        upper_edge=edge_rows,
    )

    def one(prefill: Prefill, requests: Slice) -> PoolTraffic:
        summed = atoms if many else replace(atoms, cells=None)
        sums = running_sums(prefill, summed, assumptions, compresses=True, all_read=all_read)
        success_frac = assumptions.compression.success_frac(compressor)
        in_cells = None if many else _slice_in_cells(atoms, requests, success_frac)
        traffic = slice_traffic(replace(sums, cells=atoms.cells), prefill, compressor, requests, assumptions, in_cells)
        return _with_reuse(traffic, atoms, lambda: atoms.weight * _kept_share(atoms, requests, success_frac))

    return jax.vmap(one)(prefills, slices)


def routed(fleet: Fleet, workload: Workload, assumptions: Assumptions) -> PoolTraffic:
    """`route`, hard, as a compiled program of its own, which all who keep the traffic of a fleet share."""
    return _routed(fleet, rounded_up(workload), assumptions)


@partial(program, static_argnames="assumptions")
def _routed(fleet: Fleet, workload: Workload, assumptions: Assumptions) -> PoolTraffic:
    return route(fleet, workload, assumptions, all_read=True)


def _slice_in_cells(atoms: Atoms, requests: Slice, success_frac: ArrayLike) -> Array | None:
    """Prompts by cell of the requests a lane serves as they come [C]. For few lanes: running sums of so many cells cost
    more than all others together."""
    if atoms.cells is None:
        return None
    kept = _kept_share(atoms, requests, success_frac)
    return jax.ops.segment_sum(atoms.weight * kept, atoms.cells.cell, N_CELLS)


def _kept_share(atoms: Atoms, requests: Slice, success_frac: ArrayLike) -> Array:
    """Of every atom, the share that a lane serves as it comes [J]."""
    row, first = jnp.arange(len(atoms.weight)), requests.start
    taken = (row >= first) & (row < jnp.clip(requests.lower_edge, first, requests.end))  # by the lanes below
    return ((row >= first) & (row < requests.end)) - success_frac * atoms.compressible * taken


def _with_reuse(traffic: PoolTraffic, atoms: Atoms, mass: Callable[[], Array]) -> PoolTraffic:
    """A lane's traffic with the reuse of the atoms' `mass` [J] that it serves as they come, where it is read."""
    if atoms.reuse is None:
        return traffic
    cells = None if atoms.cells is None else (atoms.cells.cell, N_CELLS)
    served = traffic.traffic_frac, traffic.demand.prefill
    found = lane_reuse(atoms.reuse, atoms.columns.held_tokens, atoms.weight, mass(), served, cells)
    return replace(traffic, reuse=found)


def _soft_traffic(
    atoms: Atoms,
    prefills: Prefill,
    compressor: Compressor,
    windows: Array,
    edges: Array,
    assumptions: Assumptions,
    width: ArrayLike,
) -> PoolTraffic:
    """Every atom in shares. What is longer than its pool's window is compressed, if it can be, or goes on to the next
    pool whose window holds it. The last edge stays hard: what is longer than every window is rejected."""
    columns, compression = atoms.columns, assumptions.compression
    as_they_are, to_try = _soft_shares(atoms, windows, edges, compression.success_frac(compressor), width)

    def one(prefill: Prefill, window: Array, kept_share: Array, tries: Array) -> PoolTraffic:
        kept = compression.kept_output(columns.output_tokens, window)
        as_is = _served(prefill, atoms, atoms.weight * kept_share, assumptions)
        to_compress = _sums(atoms.weight * tries, compressed_features(atoms, kept))
        about = atoms.cells, atoms.whole_share
        traffic = served_traffic(prefill, compressor, window, as_is, to_compress, about, assumptions)
        return _with_reuse(traffic, atoms, lambda: atoms.weight * kept_share)

    return jax.vmap(one)(prefills, windows, as_they_are, to_try)


def _soft_shares(
    atoms: Atoms, windows: Array, edges: Array, success_frac: ArrayLike, width: ArrayLike
) -> tuple[Array, Array]:
    """Shares of every atom that each pool serves as it is, and tries to compress [K, J]."""
    length = atoms.columns.route_tokens
    failed = jnp.zeros_like(atoms.weight)  # could not be compressed, and waits for a window that holds it
    as_they_are, to_try = [], []
    for k in range(len(windows)):
        last = k == len(windows) - 1
        lower, upper = edges[k - 1] if k else jnp.zeros(()), edges[k]
        accepted = soft_share(length, lower, jnp.inf if last else upper, width)
        accepted = accepted * (length <= upper if last else 1.0)
        too_long = length > windows[k]
        tries = accepted * too_long * atoms.compressible
        kept = jnp.where(too_long, 0.0, accepted + failed)
        failed = accepted + failed - tries * success_frac - kept
        as_they_are.append(kept)
        to_try.append(tries)
    return jnp.stack(as_they_are), jnp.stack(to_try)


def _served(prefill: Prefill, atoms: Atoms, mass: Array, assumptions: Assumptions) -> ServedSums:
    """The sums over atoms of `mass`. A matrix of who is in which cell would cost as much as all else together."""
    sums = _sums(mass, served_features(prefill, replace(atoms, cells=None), assumptions))
    if atoms.cells is None:
        return sums
    return replace(sums, in_cells=jax.ops.segment_sum(mass, atoms.cells.cell, N_CELLS))


def _sums(mass: Array, features: T) -> T:
    """Weighted sums of features [J]. As one product: of one each the compiler would compute `mass` anew for each."""
    leaves, structure = jax.tree.flatten(features)
    return jax.tree.unflatten(structure, list(mass @ jnp.stack(leaves, axis=1)))


# --- from sums to traffic ---------------------------------------------------------------------------------------------


def served_traffic(
    prefill: Prefill,
    compressor: Compressor,
    window: Array,
    as_is: ServedSums,
    compressed: CompressedSums,
    about: tuple[PromptCells | None, ArrayLike],
    assumptions: Assumptions,
) -> PoolTraffic:
    """One pool's traffic from its sums. `about`: the cells of `as_is.in_cells`, and the output share of a request
    compressed as a whole."""
    cells, whole_share = about
    compression = assumptions.compression
    success = compression.success_frac(compressor)
    powers = jnp.asarray(success) * jnp.stack(compressed.output_powers)
    squeezed = compression.squeezed(assumptions.prefill, prefill, window, powers, whole_share, whole=assumptions.whole)
    if as_is.demand.cached is not None:
        squeezed = squeezed[0], with_nothing_cached(squeezed[1])
    frac = as_is.requests + powers[0]
    steps, demand_sums = jax.tree.map(jnp.add, (as_is.steps, as_is.demand), squeezed)
    prompts = None
    if as_is.in_cells is not None and cells is not None:
        compression_s = compressor.s_per_token * mean_over(compressed.prompt_tokens, compressed.output_powers[0])
        ends = (assumptions.prefix_cache.as_fresh(prefill, x) for x in (cells.shortest, cells.longest))
        prompts = _histogram(as_is.in_cells, tuple(ends), window, powers, compression_s)
    return PoolTraffic(
        traffic_frac=jnp.where(frac > NOBODY, frac, 0.0),
        output_tokens=mean_over(as_is.output_tokens + success * compressed.output_tokens, frac),
        steps=jax.tree.map(lambda total: mean_over(total, frac), steps),
        demand=jax.tree.map(lambda total: mean_over(total, frac), demand_sums),
        compressor_tokens=compressed.prompt_tokens,
        prompts=prompts,
    )


def _histogram(
    mass: Array, ends: tuple[Array, ...], window: Array, output_powers: Array, compression_s: Array
) -> PromptHistogram:
    """The as-is cells, from `ends` to `ends`, and one for the compressed prompts, at their mean, later by
    `compression_s`."""
    shortest, longest = ends
    total = jnp.append(jnp.maximum(mass, 0.0), output_powers[0])
    return PromptHistogram(
        mass=mean_over(total, jnp.sum(total)),
        shortest=shortest,
        longest=longest,
        window_tokens=window,
        compressed_tokens=window - mean_over(output_powers[1], output_powers[0]),
        compression_s=jnp.asarray(compression_s),
    )


def mean_over(total: Array, frac: Array) -> Array:
    """total / frac; 0 where frac is nobody's, which also keeps gradients of vanishing shares finite."""
    some = frac > NOBODY
    return jnp.where(some, total / jnp.where(some, frac, 1.0), 0.0)
