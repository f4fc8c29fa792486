"""What of prompts is used again, as features of atoms: sums over requests, whatever the slice that a lane serves.

Each request has, for a grid of ages, the prompt tokens whose block was last used no longer ago; an atom has their mean
and mean square. A reuse also has two lengths, its own and that of the request before: a lane that serves only one of
them finds nothing, so the tokens are kept by cells of both. And of a block that was used often before, a cache that saw
few of the uses has one still: the share of the reuse that is kept by a cache that sees a share of the uses.

Means over requests are exact, so that the hit curve of the atoms is that of the requests; between two ages of the grid
it is a straight line, and the distribution of what is found within an atom is one of two values with its two moments.
`HitCurve.grid_error` is the most that the grid changes the hit share of any cache.
"""

from dataclasses import dataclass, replace

import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.laws.prefix_cache import WorkingSet, make_working_set, resident_tokens
from fleetopt_jax.workload.atoms import Workload, mean_tokens
from fleetopt_jax.workload.blocks import Blocks, Uses, uses_of
from fleetopt_jax.workload.sampling import N_GROUPS, SampledUses

N_AGES = 32  # of the grid, at most
N_CELLS = 48  # of lengths of a reuse
SHARES = 2.0 ** -np.arange(11)  # of the uses that a cache sees
CHUNK = 2**18  # requests whose features are made at once
CURVE_POINTS = 25


@pytree
class Reuse:
    """The reuse in a workload of J atoms. Leaves traced."""

    age_requests: Array  # rising from 0 [A]
    cached_tokens: Array  # of an atom's prompt last used at most each age ago, mean [tokens] [J, A]
    cached_tokens2: Array  # mean square [tokens^2] [J, A]
    cell: Array  # of lengths, that the atom is in; as a float, so that all of it differentiates [J]
    pair_tokens: Array  # per request, by age and the cells of both its lengths [A, N_CELLS, N_CELLS]
    shares: Array  # of the uses that a cache sees, falling from 1 [S]
    kept_frac: Array  # of the reuse that such a cache keeps, by age [S, A]

    def in_order(self, order: ArrayLike) -> "Reuse":
        """Of the atoms in another order [J]."""
        cached, cached2, cell = (x[order] for x in (self.cached_tokens, self.cached_tokens2, self.cell))
        return replace(self, cached_tokens=cached, cached_tokens2=cached2, cell=cell)

    def scaled(self, factor: Array) -> "Reuse":
        """Of prompts that are so many times as long, and find as many times as much [J]."""
        cached, cached2 = self.cached_tokens * factor[:, None], self.cached_tokens2 * factor[:, None] ** 2
        return replace(self, cached_tokens=cached, cached_tokens2=cached2)


@dataclass(frozen=True)
class HitCurve:
    """What caches of growing size would find in a trace that one cache serves, by the law."""

    block_tokens: int
    source: str  # hashes, sessions, or a curve
    n_blocks: int
    n_unique: int
    cache_tokens: tuple[float, ...]
    age_requests: tuple[float, ...]  # to which blocks are kept
    hit_frac: tuple[float, ...]  # of the blocks of prompts
    hit_token_frac: tuple[float, ...]  # of the tokens of prompts
    grid_error: float  # of the atoms' hit share, absolute, at worst
    one_in: int = 1  # of the blocks, or sessions, that it is taken from; 1: all
    standard_error: float = 0.0  # of a hit share for that, absolute, at worst

    @property
    def hit_frac_infinite(self) -> float:
        """Share of blocks that were used before."""
        return 1.0 - self.n_unique / self.n_blocks


def mean_reused_tokens(workload: Workload) -> float:
    """What a cache that forgets nothing would find of a prompt, in the mean [tokens]; 0 where nothing is known."""
    if workload.reuse is None:
        return 0.0
    return float(np.asarray(workload.weight) @ np.asarray(workload.reuse.cached_tokens)[:, -1])


# --- from blocks ------------------------------------------------------------------------------------------------------


def age_grid(n_requests: int, uses: Uses, n_ages: int = N_AGES) -> np.ndarray:
    """Ages from 0 and 1 request to all of them, half in even ratios, half where as much is used again between two."""
    again = np.isfinite(uses.age_requests)
    ages, order = uses.age_requests[again], np.argsort(uses.age_requests[again], kind="stable")
    rank = np.cumsum(uses.tokens[again][order])
    n_even = n_ages // 2
    even = np.round(np.geomspace(1.0, max(n_requests, 2), n_even))
    shares = np.arange(1, n_ages - n_even) / (n_ages - n_even) * (rank[-1] if len(rank) else 0.0)
    some = ages[order][np.searchsorted(rank, shares)] if len(rank) else even
    return np.unique(np.concatenate([[0.0], even, some]))


def reuse_of(blocks: Blocks, prompt_tokens: np.ndarray, total_tokens: np.ndarray, atom: np.ndarray) -> Reuse:
    """The features of atoms, of the blocks of requests [n] and the atom that each of them is in, 0, 1, ... J - 1."""
    uses, n, n_atoms = uses_of(blocks, prompt_tokens), len(prompt_tokens), int(atom.max()) + 1
    ages = age_grid(n, uses)
    bins = np.searchsorted(ages, uses.age_requests)  # len(ages) for what was never used before
    mass = np.bincount(atom, minlength=n_atoms)
    first, second = _by_age(uses, bins, prompt_tokens, atom, len(ages))
    cell = _cells_of(np.bincount(atom, total_tokens, n_atoms) / mass, first[:, -1])
    of_request = cell[atom]
    found = bins < len(ages)
    ends = np.ravel_multi_index(
        (bins[found], of_request[uses.request[found]], of_request[uses.previous[found]]),
        (len(ages), N_CELLS, N_CELLS),
    )
    pairs = np.bincount(ends, uses.tokens[found], len(ages) * N_CELLS**2).reshape(len(ages), N_CELLS, N_CELLS)
    return Reuse(
        **as_floats(
            age_requests=ages,
            cached_tokens=first / mass[:, None],
            cached_tokens2=second / mass[:, None],
            cell=cell,
            pair_tokens=np.cumsum(pairs, axis=0) / n,
            shares=SHARES,
            kept_frac=_kept(blocks, uses, ages),
        )
    )


def _by_age(
    uses: Uses, bins: np.ndarray, prompt_tokens: np.ndarray, atom: np.ndarray, n_ages: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the requests of each atom of the tokens found, and of their squares [J, A]."""
    n, sums = len(prompt_tokens), np.zeros((2, int(atom.max()) + 1, n_ages))
    for start in range(0, n, CHUNK):
        rows = slice(*np.searchsorted(uses.request, [start, start + CHUNK]))
        size = min(CHUNK, n - start)
        at = (uses.request[rows] - start) * (n_ages + 1) + bins[rows]
        tokens = np.bincount(at, uses.tokens[rows], size * (n_ages + 1)).reshape(size, -1)[:, :n_ages].cumsum(axis=1)
        # The last token of a prompt is always computed: the first answer comes from it.
        tokens = np.minimum(tokens, np.maximum(prompt_tokens[start : start + size, None] - 1.0, 0.0))
        np.add.at(sums[0], atom[start : start + size], tokens)
        np.add.at(sums[1], atom[start : start + size], tokens**2)
    return sums[0], sums[1]


def _cells_of(length_tokens: np.ndarray, reused: np.ndarray) -> np.ndarray:
    """Cells of lengths that hold as much of the reuse each, but for what a single length has [J]."""
    order = np.argsort(length_tokens, kind="stable")
    rank = np.empty(len(order))
    some = reused[order] + 1e-9 * max(reused.mean(), 1e-9)
    rank[order] = (np.cumsum(some) - some / 2.0) / some.sum()
    return np.clip((N_CELLS * rank).astype(int), 0, N_CELLS - 1)


def _kept(blocks: Blocks, uses: Uses, ages: np.ndarray) -> np.ndarray:
    """Share of the reuse within each age that a cache keeps which sees a share of the uses [S, A]: of u uses of a block
    within the age, by chance 1 - (1 - share)^u has seen one."""
    return _kept_share(uses, ages, *_kept_tokens(blocks.ids, len(blocks.counts), uses, ages))


def _kept_tokens(ids: np.ndarray, n: int, uses: Uses, ages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are kept [S, A], and those that are used again [A], within each age."""
    kept, reused = np.zeros((len(SHARES), len(ages))), np.zeros(len(ages))
    again = np.isfinite(uses.age_requests)
    key = np.sort(ids * (2 * n + 1) + uses.request)
    mine = (ids * (2 * n + 1) + uses.request)[again]
    before, tokens = uses.before[again], uses.tokens[again]
    at = np.searchsorted(key, mine)
    for k, age in enumerate(ages[1:], 1):
        within = np.minimum(at - np.searchsorted(key, mine - int(age)), before)
        by_uses = np.bincount(within, tokens)
        missed = (1.0 - SHARES[:, None]) ** np.arange(len(by_uses))
        kept[:, k], reused[k] = (1.0 - missed[:, 1:]) @ by_uses[1:], by_uses[1:].sum()
    return kept, reused


def _kept_share(uses: Uses, ages: np.ndarray, kept_tokens: np.ndarray, reused: np.ndarray) -> np.ndarray:
    if not np.isfinite(uses.age_requests).any():
        return np.ones((len(SHARES), len(ages))) * SHARES[:, None]
    kept = kept_tokens / np.maximum(reused, 1e-300)
    kept[:, 0] = 1.0
    some = [k for k in range(1, len(ages)) if (uses.age_requests <= ages[k]).any()]
    kept[:, : some[0]] = kept[:, [some[0]]]
    return kept


# --- the hit curve of a trace -----------------------------------------------------------------------------------------


def hit_curve(blocks: Blocks, prompt_tokens: np.ndarray) -> HitCurve:
    """The curve of a trace, by the law at every age it has; and what the grid of the atoms changes."""
    uses, n = uses_of(blocks, prompt_tokens), len(prompt_tokens)
    exact = _ages_of(n, uses)
    in_blocks, in_tokens = (_stream(uses, weight, exact, n) for weight in (uses.tokens > 0, uses.tokens))
    n_unique = int(np.count_nonzero(np.isinf(uses.age_requests) & (uses.tokens > 0)))
    sizes = np.geomspace(min(max(0.001 * n_unique, 1.0), n_unique), n_unique, CURVE_POINTS)
    ages = np.interp(sizes, np.asarray(resident_tokens(in_blocks)), exact)
    on_grid = _stream(uses, uses.tokens, age_grid(n, uses), n)
    return HitCurve(
        block_tokens=blocks.block_tokens,
        source=blocks.source,
        n_blocks=int(np.count_nonzero(uses.tokens)),
        n_unique=n_unique,
        cache_tokens=tuple((sizes * blocks.block_tokens).tolist()),
        age_requests=tuple(ages.tolist()),
        hit_frac=_shares_at(in_blocks, ages),
        hit_token_frac=_shares_at(in_tokens, ages),
        grid_error=_grid_error(in_tokens, on_grid),
    )


def _grid_error(in_tokens: WorkingSet, on_grid: WorkingSet) -> float:
    fine = np.asarray(resident_tokens(in_tokens))
    coarse = np.interp(fine, np.asarray(resident_tokens(on_grid)), np.asarray(on_grid.reused_tokens))
    return float(np.max(np.abs(coarse - np.asarray(in_tokens.reused_tokens)))) / float(in_tokens.prompt_tokens)


def stream_of(blocks: Blocks, prompt_tokens: np.ndarray, *, in_blocks: bool = False) -> WorkingSet:
    """The reuse of a whole trace at every age it has, of its tokens, or with every block counted as one token."""
    uses, n = uses_of(blocks, prompt_tokens), len(prompt_tokens)
    return _stream(uses, uses.tokens > 0 if in_blocks else uses.tokens, _ages_of(n, uses), n)


def _ages_of(n: int, uses: Uses) -> np.ndarray:
    """The ages that a trace has, up to all of its requests."""
    found = uses.age_requests[np.isfinite(uses.age_requests)]
    return np.unique(np.concatenate([[0.0, 1.0, max(n, 2)], found]))


def _stream(uses: Uses, weight: np.ndarray, ages: np.ndarray, n: int, total: float | None = None) -> WorkingSet:
    """Of uses that weigh so much; of a `total`, where some of it is of no use."""
    mean = float(weight.sum() if total is None else total) / n
    bins = np.searchsorted(ages, uses.age_requests)
    reused = np.cumsum(np.bincount(bins, weight, len(ages) + 1)[: len(ages)]) / n
    return make_working_set(age_requests=ages, prompt_tokens=mean, reused_tokens=np.minimum(reused, mean))


def _shares_at(stream: WorkingSet, ages: np.ndarray) -> tuple[float, ...]:
    found = np.interp(ages, np.asarray(stream.age_requests), np.asarray(stream.reused_tokens))
    return tuple((found / float(stream.prompt_tokens)).tolist())


# --- from a sample of uses --------------------------------------------------------------------------------------------

Atoms = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, total and number of requests [J]
MAX_EVEN_USES = 2**16  # of blocks used often, from which it is told how much of them is kept
N_SHARING, USES_OF_SHARING = 512, 1024  # groups of atoms that find the same share of their prompts; uses of each


def _weighed(sample: SampledUses, without: int | None = None) -> tuple[Uses, np.ndarray]:
    """The uses of a sample with the tokens that each stands for, and the blocks."""
    tokens = sample.stands_for(sample.tokens, 1, without)
    blocks = sample.stands_for(sample.tokens > 0, 0, without)
    nobody = np.full(len(tokens), -1)
    return Uses(sample.request, tokens, sample.age_requests, nobody, sample.before), blocks


def reuse_of_sample(sample: SampledUses, atoms: Atoms, atom: np.ndarray, previous: np.ndarray) -> Reuse:
    """The features of atoms of a sample of uses [M], each by a request of an `atom`, after one of a `previous` one.

    A sample tells too little of a single atom: atoms of about one total and one prompt find the same share of their
    prompts. What is found adds up block by block, from its begin b to its end e, as (e - b) and as (e^2 - b^2).
    """
    prompt, total, mass = atoms
    (uses, _), n, n_atoms = _weighed(sample), sample.n_requests, len(prompt)
    ages = age_grid(n, uses)
    bins = np.searchsorted(ages, uses.age_requests)
    begin = sample.block_tokens * sample.depth.astype(float)
    # The last token of a prompt is always computed: the first answer comes from it.
    end = np.minimum(begin + sample.tokens, np.maximum(sample.prompt_tokens - 1.0, begin))
    each = uses.tokens / np.maximum(sample.tokens, 1.0)
    found = bins < len(ages)
    cell = _cells_of(total, np.bincount(atom[found], (each * (end - begin))[found], n_atoms))
    sharing = _sharing(cell, prompt, np.bincount(atom, minlength=n_atoms))
    n_sharing = int(sharing.max()) + 1
    at = np.ravel_multi_index((sharing[atom[found]], bins[found]), (n_sharing, len(ages)))
    first, second = (
        _shared(np.bincount(at, (each * (end**power - begin**power))[found], n_sharing * len(ages)), *about)
        for power, about in ((1, (sharing, prompt, mass)), (2, (sharing, prompt**2, mass)))
    )
    most = np.maximum(prompt - 1.0, 0.0)[:, None]
    first = np.minimum(first, most)
    second = np.clip(second, first**2, first * most)
    shape = (len(ages), N_CELLS, N_CELLS)
    ends = np.ravel_multi_index((bins[found], cell[atom[found]], cell[previous[found]]), shape)
    pairs = np.bincount(ends, uses.tokens[found], np.prod(shape)).reshape(shape)
    return Reuse(
        **as_floats(
            age_requests=ages,
            cached_tokens=first,
            cached_tokens2=second,
            cell=cell,
            pair_tokens=np.cumsum(pairs, axis=0) / n,
            shares=SHARES,
            kept_frac=_kept_of_sample(sample, uses, ages),
        )
    )


def _sharing(cell: np.ndarray, prompt_tokens: np.ndarray, n_uses: np.ndarray) -> np.ndarray:
    """Groups of atoms, near in their totals and in their prompts, with about as many uses each [J]."""
    n = int(np.clip(n_uses.sum() // USES_OF_SHARING, 1, N_SHARING))
    total = cell * int(np.sqrt(n)) // N_CELLS
    order = np.lexsort((prompt_tokens, total))
    rank = np.cumsum(n_uses[order]) - n_uses[order] / 2.0
    place = np.empty(len(order), int)
    place[order] = n * rank / max(n_uses.sum(), 1)
    return np.unique(total * (n + 1) + place, return_inverse=True)[1]


def _shared(tokens: np.ndarray, sharing: np.ndarray, most: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """What atoms find, each of them as large a share of its `most`, of the tokens that their groups find by age [J, A];
    what is more than all of a few that happen to be in the sample, others find."""
    n_sharing = int(sharing.max()) + 1
    by_age = np.cumsum(tokens.reshape(n_sharing, -1), axis=1)
    share = np.minimum(by_age / np.bincount(sharing, mass * most, n_sharing)[:, None], 1.0)
    found = share[sharing] * most[:, None]
    there = mass @ found
    scaled = found * np.where(there > 0, by_age.sum(axis=0) / np.maximum(there, 1e-300), 1.0)
    return np.maximum.accumulate(np.minimum(scaled, most[:, None]), axis=1)


def _kept_of_sample(sample: SampledUses, uses: Uses, ages: np.ndarray) -> np.ndarray:
    """`_kept` of a sample; blocks used often are used by chance, as often as they were before."""
    rare, often = ~sample.often, np.flatnonzero(sample.often)
    few = Uses(*(x[rare] for x in (uses.request, uses.tokens, uses.age_requests, uses.previous, uses.before)))
    kept, reused = _kept_tokens(sample.block[rare], sample.n_requests, few, ages)
    some = often[:: max(len(often) // MAX_EVEN_USES, 1)]
    age, tokens = uses.age_requests[some], uses.tokens[some] * len(often) / max(len(some), 1)
    a_request, before = np.minimum(sample.uses_a_request[some], 1.0 - 1e-12), sample.before[some]
    span = (before - 1) / np.maximum(a_request, 1e-300)
    for k, limit in enumerate(ages[1:], 1):
        within = np.where(age <= limit, tokens, 0.0)
        requests = np.minimum(np.maximum(limit - age, 0.0), span)
        for i, share in enumerate(SHARES):
            kept[i, k] += within @ (1.0 - (1.0 - share) * np.exp(requests * np.log1p(-share * a_request)))
        reused[k] += within.sum()
    return _kept_share(uses, ages, kept, reused)


def hit_curve_of_sample(sample: SampledUses) -> HitCurve:
    """The curve of a trace of whose uses there is a sample, and its standard error: how much it changes where each of
    the groups of blocks is left out (delete-a-group jackknife), at the cache where that is the most."""
    (uses, blocks), n = _weighed(sample), sample.n_requests
    n_blocks, n_tokens = sample.totals[-1]
    exact = _ages_of(n, uses)
    in_blocks, in_tokens = _stream(uses, blocks, exact, n, n_blocks), _stream(uses, uses.tokens, exact, n, n_tokens)
    n_unique = n_blocks - n * float(in_blocks.reused_tokens[-1])
    sizes = np.geomspace(min(max(0.001 * n_unique, 1.0), n_unique), n_unique, CURVE_POINTS)
    ages = np.interp(sizes, np.asarray(resident_tokens(in_blocks)), exact)
    on_grid = _stream(uses, uses.tokens, age_grid(n, uses), n, n_tokens)
    hits = _shares_at(in_blocks, ages), _shares_at(in_tokens, ages)
    return HitCurve(
        block_tokens=sample.block_tokens,
        source=sample.source,
        n_blocks=round(n_blocks),
        n_unique=round(n_unique),
        cache_tokens=tuple((sizes * sample.block_tokens).tolist()),
        age_requests=tuple(ages.tolist()),
        hit_frac=hits[0],
        hit_token_frac=hits[1],
        grid_error=_grid_error(in_tokens, on_grid),
        one_in=sample.one_in,
        standard_error=_standard_error(sample, exact, sizes, np.array(hits)),
    )


def _standard_error(sample: SampledUses, exact: np.ndarray, sizes: np.ndarray, hits: np.ndarray) -> float:
    if (sample.group < 0).all():
        return 0.0
    n, (n_blocks, n_tokens), squares = sample.n_requests, sample.totals[-1], np.zeros_like(hits)
    for group in range(N_GROUPS):
        uses, blocks = _weighed(sample, group)
        in_blocks, in_tokens = _stream(uses, blocks, exact, n, n_blocks), _stream(uses, uses.tokens, exact, n, n_tokens)
        ages = np.interp(sizes, np.asarray(resident_tokens(in_blocks)), exact)
        squares += (np.array([_shares_at(in_blocks, ages), _shares_at(in_tokens, ages)]) - hits) ** 2
    return float(np.sqrt((N_GROUPS - 1) / N_GROUPS * squares.max()))


# --- from a curve -----------------------------------------------------------------------------------------------------


def with_hit_curve(workload: Workload, cache_tokens: ArrayLike, hit_frac: ArrayLike) -> Workload:
    """The workload whose prompts find so large a share of themselves in a cache of so many tokens [A], each alike.

    The curve is of one cache that serves all requests. It does not say which lengths meet: both ends of a reuse are
    taken to be of about one length, so that a threshold separates hardly any.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> chat = fo.with_hit_curve(chat, cache_tokens=[0, 1e6], hit_frac=[0.0, 0.5])
    >>> chat.reuse.cached_tokens[:, -1].tolist()
    [250.0, 2000.0]
    """
    sizes, hits = check_curve(cache_tokens, hit_frac)
    mean = float(np.asarray(mean_tokens(workload)[0]))
    missed = 1.0 - (hits[1:] + hits[:-1]) / 2.0
    ages = np.concatenate([[0.0], np.cumsum(np.diff(sizes) / (mean * np.maximum(missed, 1e-9)))])
    return _of_shares(workload, ages, hits)


def with_age_curve(workload: Workload, age_s: ArrayLike, hit_frac: ArrayLike) -> Workload:
    """The same of a curve over ages: the share of prompt tokens that were last used at most so long ago [s] [A]."""
    ages, hits = check_curve(age_s, hit_frac, "age_s")
    return _of_shares(workload, ages * float(np.asarray(workload.arrival_rate_per_s)), hits)


def check_curve(x: ArrayLike, hit_frac: ArrayLike, name: str = "cache_tokens") -> tuple[np.ndarray, np.ndarray]:
    """A curve from 0 on, or ValueError that names what is wrong with it."""
    at, hits = (np.atleast_1d(np.asarray(each, dtype=float)) for each in (x, hit_frac))
    if at.ndim != 1 or at.shape != hits.shape:
        raise ValueError(f"need as many {name} as hit_frac, got {at.size} and {hits.size}")
    if not (np.isfinite(at).all() and at.min() >= 0):
        raise ValueError(f"need finite {name} >= 0, got {at[np.argmin(np.isfinite(at) & (at >= 0))]:g}")
    if not ((hits >= 0) & (hits <= 1)).all():
        raise ValueError(f"need hit_frac from 0 to 1, got {hits[np.argmin((hits >= 0) & (hits <= 1))]:g}")
    for each, values, strictly in ((name, at, True), ("hit_frac", hits, False)):
        falls = np.diff(values) <= 0 if strictly else np.diff(values) < 0
        if falls.any():
            k = int(np.argmax(falls))
            must = "rises" if strictly else "does not fall"
            raise ValueError(f"need {each} that {must}, got {values[k + 1]:g} after {values[k]:g}")
    if at[0] > 0:
        at, hits = np.concatenate([[0.0], at]), np.concatenate([[0.0], hits])
    if len(at) < 2:
        raise ValueError(
            f"need two {name} or more, got {len(at)}: of a share that does not depend on it, give the share"
        )
    return at, hits


def _of_shares(workload: Workload, ages: np.ndarray, hits: np.ndarray) -> Workload:
    prompt, weight = np.asarray(workload.prompt_tokens), np.asarray(workload.weight)
    cached = prompt[:, None] * hits
    cell = _cells_of(prompt + np.asarray(workload.output_tokens), weight * cached[:, -1])
    by_cell = np.bincount(cell, weight * prompt, N_CELLS)
    pairs = hits[:, None, None] * np.diag(by_cell)
    found = Reuse(
        **as_floats(
            age_requests=ages,
            cached_tokens=cached,
            cached_tokens2=cached**2,
            cell=cell,
            pair_tokens=pairs,
            shares=SHARES,
            kept_frac=np.repeat(SHARES[:, None], len(ages), axis=1),
        )
    )
    return replace(workload, reuse=found)
