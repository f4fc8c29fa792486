"""What each pool has to serve: the workload's atoms, routed and summed.

The hard router needs no loop over atoms: with prefix sums over the sorted lengths, a pool's traffic is a difference of
two of them. Under `vmap` over thresholds the sums are computed once and a candidate costs two binary searches a pool,
of its window and of its edge. Every feature has a sum of its own: the compiler leaves out what the assumptions leave
unread, which it cannot do with the columns of a matrix.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices import CHUNKS, CHUNKS_PER_TOKEN, COMPRESSIBLE, LENGTHS, REACH, SUCCESS, WHOLE_SHARE
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.demand import Demand, demand, squeezed_demand
from fleetopt_jax.laws.routing import router_edges, soft_share
from fleetopt_jax.laws.service import StepMoments, step_moments
from fleetopt_jax.workload.atoms import Workload, split_total, total_tokens

T = TypeVar("T")

N_CELLS = 160  # of the histogram of prompts
NOBODY = 1e-12  # shares below are the rounding of running sums
OUTPUT_POWERS = 5  # sums of o^0 ... o^4 over compressible requests


@pytree
class PromptHistogram:
    """A pool's prompts in cells; the last cell holds the compressed ones. Shapes [C]."""

    mass: Array  # share of the pool's requests, sums to 1 (0 without traffic) [-]
    shortest: Array  # [tokens]
    longest: Array  # [tokens]
    extra_s: Array  # latency before the request reaches the engine [s]


@pytree
class PoolTraffic:
    """One pool's traffic; the mean features are 0 where the pool gets nothing."""

    traffic_frac: Array  # share of all requests [-]
    output_tokens: Array  # mean output a request of the pool is credited with [tokens]
    steps: StepMoments  # mean features of the requests as served
    demand: Demand  # mean features of the requests as served
    tried_prompt_tokens: Array  # prompt tokens the pool's compressor reads, per request of the whole workload [tokens]
    prompts: PromptHistogram | None  # where the assumptions need it


def route(
    engines: tuple[Engine, ...],
    window_tokens: Array,
    gamma: Array,
    workload: Workload,
    assumptions: Assumptions,
    *,
    router_width: ArrayLike | None = None,
) -> tuple[PoolTraffic, ...]:
    """The traffic of each pool; hard, or with a router of log-width `router_width` > 0.

    A request goes to the first pool whose edge gamma B it does not exceed. Longer than B, it is compressed to B; where
    that fails it goes to the first pool whose window holds it as it is. Requests beyond the last edge are served by
    nobody.
    """
    if assumptions.integration != "exact":
        raise ValueError("need exact integration: the sampled procedure is `published.procedure`'s alone")
    edges = router_edges(window_tokens, REACH[assumptions.compression](gamma))
    if router_width is None:
        atoms = _Atoms(workload, assumptions)
        lengths = jnp.concatenate([window_tokens, edges])
        ends = jnp.split(jnp.searchsorted(atoms.total, lengths, side="right"), 2)
        return tuple(_hard_traffic(atoms, engines, k, window_tokens, *ends, assumptions) for k in range(len(engines)))
    return _soft_traffic(engines, window_tokens, edges, workload, assumptions, router_width)


class _Atoms:
    """The workload under the assumptions, with what all pools share."""

    def __init__(self, workload: Workload, assumptions: Assumptions):
        self.workload, self.total = workload, total_tokens(workload)
        self.prompt, self.output = LENGTHS[assumptions.lengths](workload, assumptions)
        self.compressible = COMPRESSIBLE[assumptions.compression](self.prompt, self.output)
        self.whole_share = WHOLE_SHARE[assumptions.lengths](workload, assumptions)
        self.cells = _prompt_cells(workload.weight, self.prompt) if assumptions.tail == "quantile" else None


def _features(engine: Engine, prompt: Array, output: Array, assumptions: Assumptions) -> tuple[StepMoments, Demand]:
    chunks = CHUNKS[assumptions.prefill](engine, prompt, assumptions.whole)
    return step_moments(chunks, output, prompt + output), demand(prompt, output)


def _hard_traffic(
    atoms: _Atoms,
    engines: tuple[Engine, ...],
    k: int,
    windows: Array,
    window_ends: Array,
    edge_ends: Array,
    assumptions: Assumptions,
) -> PoolTraffic:
    """As they are: the requests in (B_{k-1}, B_k], less those an earlier pool j compressed, which are some of
    (max(B_j, e_{j-1}), e_j]. Compressed: those in (max(B_k, e_{k-1}), e_k] that can be and are."""
    engine, window = engines[k], windows[k]
    weight, eligible = atoms.workload.weight, atoms.workload.weight * atoms.compressible
    success = [SUCCESS[assumptions.compression](each) for each in engines[:k]]

    def band(j: int) -> tuple[Array, Array]:
        return jnp.maximum(window_ends[j], edge_ends[j - 1] if j else 0), edge_ends[j]

    start, end = window_ends[k - 1] if k else jnp.zeros_like(window_ends[k]), window_ends[k]
    earlier = [tuple(jnp.clip(bound, start, end) for bound in band(j)) for j in range(k)]
    band_start, band_end = band(k)

    def as_they_are(x: Array) -> Array:
        """Sum of a feature [J] or [J, C] over the requests served as they are."""
        of_all, of_eligible = _running(weight, x), _running(eligible, x)
        kept = of_all[end] - of_all[start]
        for done, (first, last) in zip(success, earlier):
            kept -= done * (of_eligible[last] - of_eligible[first])
        return kept

    def tried(x: Array) -> Array:
        """Sum of a feature [J] over the requests this pool tries to compress."""
        sums = _running(eligible, x)
        return sums[band_end] - sums[band_start]

    own = jax.tree.map(as_they_are, _own_features(engine, atoms, assumptions))
    sums = jax.tree.map(tried, _tried_features(atoms))
    cells = None
    if atoms.cells is not None:
        cell, shortest, longest = atoms.cells
        cells = as_they_are(jax.nn.one_hot(cell, N_CELLS)), shortest, longest
    return served_traffic(engine, window, own, sums, cells, atoms.whole_share, assumptions)


def _own_features(engine: Engine, atoms: _Atoms, assumptions: Assumptions) -> tuple[Array, Array, StepMoments, Demand]:
    """What is summed over the requests served as they are: one, output, steps and demand, each [J]."""
    ones = jnp.ones_like(atoms.workload.weight)
    return ones, atoms.output, *_features(engine, atoms.prompt, atoms.output, assumptions)


def _tried_features(atoms: _Atoms) -> tuple[tuple[Array, ...], Array]:
    """What is summed over the requests a pool tries to compress: (o^0 ... o^4, prompt), each [J]."""
    return tuple(atoms.output**j for j in range(OUTPUT_POWERS)), atoms.prompt


def served_traffic(
    engine: Engine,
    window: Array,
    own: tuple[Array, Array, StepMoments, Demand],
    tried: tuple[tuple[Array, ...], Array],
    cells: tuple[Array, Array, Array] | None,
    whole_share: ArrayLike,
    assumptions: Assumptions,
) -> PoolTraffic:
    """One pool's traffic from its sums: of the requests as they are, and of those it tries to compress.

    `cells` are the prompts of the first: (mass, shortest, longest) [C].
    """
    tried_powers, tried_prompt = tried
    output_powers = SUCCESS[assumptions.compression](engine) * jnp.stack(tried_powers)
    squeezed = _SQUEEZED[assumptions.compression](engine, window, output_powers, whole_share, assumptions)
    frac, credited = own[0] + output_powers[0], own[1] + output_powers[1]
    steps, asked = jax.tree.map(jnp.add, own[2:], squeezed)
    histogram = None
    if cells is not None:
        mean_tried = mean_over(tried_prompt, tried_powers[0])
        histogram = _histogram(engine, *cells, window, output_powers, mean_tried)
    return _traffic(frac, credited, steps, asked, tried_prompt, histogram)


@pytree
class RunningSums:
    """Sums of a workload's features over its first 0 ... J atoms: any pool's traffic is a difference of two rows."""

    own: tuple[Array, Array, StepMoments, Demand]  # over all requests, leaves [J + 1]
    own_eligible: tuple[Array, Array, StepMoments, Demand] | None  # over those that can be compressed, if any are
    tried: tuple[tuple[Array, ...], Array] | None
    cells: tuple[Array, Array | None, Array, Array] | None  # prompts [J + 1, C], of the eligible, shortest, longest [C]
    whole_share: Array


@pytree
class Interval:
    """What a pool between two boundaries serves. A boundary is a window and its router edge, gamma times as far; rows
    count the atoms up to them. Shape () or [M]."""

    window_tokens: Array  # of the pool: its upper boundary's
    start: Array  # row of the lower window
    end: Array  # row of the upper window
    lower_edge: Array  # row of the lower edge
    upper_edge: Array  # row of the upper edge


def running_sums(engine: Engine, workload: Workload, assumptions: Assumptions, *, compresses: bool) -> RunningSums:
    """The sums for `interval_traffic`. Of the engine only its published prefill chunk counts, where that is assumed."""
    atoms = _Atoms(workload, assumptions)
    weight, eligible = workload.weight, workload.weight * atoms.compressible

    def running(mass: Array, features: T) -> T:
        return jax.tree.map(lambda x: _running(mass, x), features)

    own, cells = _own_features(engine, atoms, assumptions), None
    if atoms.cells is not None:
        cell, shortest, longest = atoms.cells
        one_hot = jax.nn.one_hot(cell, N_CELLS)
        cells = running(weight, one_hot), running(eligible, one_hot) if compresses else None, shortest, longest
    return RunningSums(
        own=running(weight, own),
        own_eligible=running(eligible, own) if compresses else None,
        tried=running(eligible, _tried_features(atoms)) if compresses else None,
        cells=cells,
        whole_share=jnp.asarray(atoms.whole_share),
    )


def interval_traffic(sums: RunningSums, engine: Engine, interval: Interval, assumptions: Assumptions) -> PoolTraffic:
    """The traffic of the pool between two boundaries: the requests longer than the lower window up to the upper one,
    less those the pool below compresses, and those up to the upper edge that this pool compresses.

    Equal to `route` of any fleet with these two boundaries next to each other, whose engines compress alike: what is
    compressed up to the lower edge does not depend on which of the pools below did it.
    """
    start, end = interval.start, interval.end

    def as_they_are(of_all: Array, of_eligible: Array | None) -> Array:
        kept = of_all[end] - of_all[start]
        if of_eligible is None:
            return kept
        taken = of_eligible[jnp.clip(interval.lower_edge, start, end)] - of_eligible[start]
        return kept - SUCCESS[assumptions.compression](engine) * taken

    def tried(of_eligible: Array) -> Array:
        first = jnp.maximum(end, interval.lower_edge)
        return of_eligible[jnp.maximum(interval.upper_edge, first)] - of_eligible[first]

    if sums.tried is None:
        own = jax.tree.map(lambda x: as_they_are(x, None), sums.own)
        nothing = jnp.zeros(())
        compressed = (nothing,) * OUTPUT_POWERS, nothing
    else:
        own = jax.tree.map(as_they_are, sums.own, sums.own_eligible)
        compressed = jax.tree.map(tried, sums.tried)
    cells = None
    if sums.cells is not None:
        of_all, of_eligible, shortest, longest = sums.cells
        cells = as_they_are(of_all, of_eligible), shortest, longest
    return served_traffic(engine, interval.window_tokens, own, compressed, cells, sums.whole_share, assumptions)


def _running(weight: Array, x: Array) -> Array:
    """Weighted sums of the first 0, 1, 2, ... rows."""
    return jnp.concatenate([jnp.zeros_like(x[:1]), jnp.cumsum((weight * x.T).T, axis=0)])


def _soft_traffic(
    engines: tuple[Engine, ...],
    windows: Array,
    edges: Array,
    workload: Workload,
    assumptions: Assumptions,
    width: ArrayLike,
) -> tuple[PoolTraffic, ...]:
    """Every atom in shares. What is longer than its pool's window is compressed, if it can be, or goes on to the next
    pool whose window holds it. The last edge stays hard: what is longer than every window is rejected."""
    atoms = _Atoms(workload, assumptions)
    failed = jnp.zeros_like(workload.weight)  # share that could not be compressed and waits for a window that holds it
    traffic = []
    for k, engine in enumerate(engines):
        last = k == len(engines) - 1
        lower, upper = edges[k - 1] if k else jnp.zeros(()), edges[k]
        accepted = soft_share(atoms.total, lower, jnp.inf if last else upper, width)
        accepted = accepted * (atoms.total <= upper if last else 1.0)
        too_long = atoms.total > windows[k]
        tries = accepted * too_long * atoms.compressible
        served = tries * SUCCESS[assumptions.compression](engine) + jnp.where(too_long, 0.0, accepted + failed)
        failed = accepted + failed - served
        mass = workload.weight * served
        prompt, output = _SHRUNK[assumptions.compression](atoms, windows[k], assumptions)
        steps, asked = _features(
            engine, jnp.where(too_long, prompt, atoms.prompt), jnp.where(too_long, output, atoms.output), assumptions
        )
        tried = jnp.sum(workload.weight * tries * atoms.prompt)
        sums = jax.tree.map(lambda x: jnp.sum(mass * x), (steps, asked))  # noqa: B023
        histogram = None
        if atoms.cells is not None:
            cell, shortest, longest = atoms.cells
            as_is = jax.ops.segment_sum(jnp.where(too_long, 0.0, mass), cell, N_CELLS)
            powers = jnp.stack([jnp.sum(jnp.where(too_long, mass * output**j, 0.0)) for j in range(OUTPUT_POWERS)])
            tried_mean = mean_over(jnp.sum(jnp.where(too_long, mass * atoms.prompt, 0.0)), powers[0])
            histogram = _histogram(engine, as_is, shortest, longest, windows[k], powers, tried_mean)
        traffic.append(_traffic(jnp.sum(mass), jnp.sum(mass * atoms.output), *sums, tried, histogram))
    return tuple(traffic)


# compression of many requests at once (sums over them), and of each


def _squeeze_whole(
    engine: Engine, window: Array, output_powers: Array, whole_share: ArrayLike, assumptions: Assumptions
) -> tuple[StepMoments, Demand]:
    """As if each were a request of the window's length."""
    prompt, output = split_total(window, whole_share, whole=assumptions.whole)
    return jax.tree.map(lambda x: output_powers[0] * x, _features(engine, prompt, output, assumptions))


def _squeeze_prompts(
    engine: Engine, window: Array, output_powers: Array, whole_share: ArrayLike, assumptions: Assumptions
) -> tuple[StepMoments, Demand]:
    """Each keeps its output and fills the window. Whole chunks are counted half a chunk up, their mean."""
    per_token = CHUNKS_PER_TOKEN[assumptions.prefill](engine)
    s0, s1, s2 = output_powers[:3]
    a = per_token * window + (0.5 * jnp.sign(per_token) if assumptions.whole else 0.0)
    b = 1.0 - per_token  # steps = a + b o
    steps, steps2 = a * s0 + b * s1, a**2 * s0 + 2 * a * b * s1 + b**2 * s2
    moments = StepMoments(
        chunks=a * s0 - per_token * s1,
        steps=steps,
        steps_len=steps * window,
        steps2=steps2,
        steps2_len=steps2 * window,
        steps2_len2=steps2 * window**2,
    )
    return moments, squeezed_demand(window, output_powers)


_SQUEEZED = {"free": _squeeze_whole, "prompt_only": _squeeze_prompts}


def _shrink_whole(atoms: _Atoms, window: Array, assumptions: Assumptions) -> tuple[Array, Array]:
    prompt, output = split_total(window, atoms.whole_share, whole=assumptions.whole)
    return jnp.broadcast_to(prompt, atoms.total.shape), jnp.broadcast_to(output, atoms.total.shape)


def _shrink_prompt(atoms: _Atoms, window: Array, assumptions: Assumptions) -> tuple[Array, Array]:
    output = jnp.minimum(atoms.output, window / 2.0)
    return window - output, output


_SHRUNK = {"free": _shrink_whole, "prompt_only": _shrink_prompt}


def _prompt_cells(weight: Array, prompt: Array) -> tuple[Array, Array, Array]:
    """(cell of each atom [J], shortest and longest prompt of each cell [C]).

    Cells are even in a mean of three measures, requests, tokens and log-length, so that tails are resolved as finely as
    bulk and a spike in the data is a cell of its own.
    """
    order = jnp.argsort(prompt)
    w, p = weight[order], prompt[order]
    requests, tokens = jnp.cumsum(w), jnp.cumsum(w * p)
    span = jnp.log(p[-1] / p[0])
    logs = jnp.where(span > 0, jnp.log(p / p[0]) / jnp.where(span > 0, span, 1.0), 0.0)
    rank = (requests / requests[-1] + tokens / tokens[-1] + logs) / 3.0
    cell = jnp.clip(jnp.floor(N_CELLS * rank).astype(int), 0, N_CELLS - 1)
    shortest = jnp.minimum(jax.ops.segment_min(p, cell, N_CELLS, indices_are_sorted=True), p[-1])
    longest = jnp.maximum(jax.ops.segment_max(p, cell, N_CELLS, indices_are_sorted=True), p[0])
    return jnp.zeros_like(cell).at[order].set(cell), shortest, jnp.maximum(longest, shortest)


def _histogram(
    engine: Engine,
    mass: Array,
    shortest: Array,
    longest: Array,
    window: Array,
    output_powers: Array,
    tried_prompt: Array,
) -> PromptHistogram:
    """The as-is cells and one for the compressed prompts, at their mean."""
    compressed = window - mean_over(output_powers[1], output_powers[0])
    total = jnp.append(jnp.maximum(mass, 0.0), output_powers[0])
    return PromptHistogram(
        mass=mean_over(total, jnp.sum(total)),
        shortest=jnp.append(jnp.minimum(shortest, window), compressed),
        longest=jnp.append(jnp.minimum(longest, window), compressed),
        extra_s=jnp.append(jnp.zeros_like(mass), engine.compressor.s_per_token * tried_prompt),
    )


def _traffic(
    frac: Array,
    output_sum: Array,
    steps: StepMoments,
    asked: Demand,
    tried_prompt: Array,
    prompts: PromptHistogram | None,
) -> PoolTraffic:
    return PoolTraffic(
        traffic_frac=jnp.where(frac > NOBODY, frac, 0.0),
        output_tokens=mean_over(output_sum, frac),
        steps=jax.tree.map(lambda total: mean_over(total, frac), steps),
        demand=jax.tree.map(lambda total: mean_over(total, frac), asked),
        tried_prompt_tokens=tried_prompt,
        prompts=prompts,
    )


def mean_over(total: Array, frac: Array) -> Array:
    """total / frac; 0 where frac is nobody's, which also keeps gradients of vanishing shares finite."""
    some = frac > NOBODY
    return jnp.where(some, total / jnp.where(some, frac, 1.0), 0.0)
