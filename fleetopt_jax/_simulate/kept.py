"""Blocks of prompts that instances keep: an exact LRU cache each, in what the sequences in flight leave of the memory.

As vLLM does: the prompt of a sequence that is admitted finds the longest run of its first blocks that the instance has.
All blocks of its prompt are then in use, by each sequence that has them, and are held once. Who leaves, or is
preempted, gives its blocks up, the last of the prompt first: those that nobody else uses stay, until others need the
memory, and the one that was given up longest ago goes first. So what begins a prompt never goes before what follows.

A cell `held` of an instance and a block is c > 0 where c sequences use it, -n where it was given up with the n-th
sequence that left the instance, and 0 where it is not there. The log has who left; its oldest entry whose blocks are
still there as they were given up is where eviction takes from, so each entry is passed once. Blocks that an entry has
and that were used again since have another number: they are passed by. With I instances, G replications, requests
numbered to Q and U blocks in a replication.

What is evicted goes to the memory of the hosts, where an instance has room there, under the number that it had: the two
tiers are one list, of which the GPUs have the newest. A prompt that finds blocks there loads them, for which its next
iteration waits, and they are on the GPUs alone again.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.prefix_cache import HostCache
from fleetopt_jax.workload.blocks import Blocks

HOTTEST = 0.5  # share of an instance's requests that may begin with the block that a prompt is sent by
FEWEST_USES = 4  # below which no block is too hot
HOMELESS = -1


@dataclass(frozen=True)
class PromptBlocks:
    """The blocks of requests as a pool gets them; NumPy arrays."""

    ids: np.ndarray  # of each replication's own, U where a prompt has no more [R, m, B]
    size_tokens: np.ndarray  # of each block; 0 behind the last [R, U + 1]

    def rows(self, some: slice) -> "PromptBlocks":
        """Some of the replications."""
        return PromptBlocks(self.ids[some], self.size_tokens[some])


@pytree
class OnHosts:
    """What went to the hosts. Leaves traced."""

    held: Array  # the number that a block was given up with, 0 where it is not there [I, U + 1]
    oldest: Array  # entry of the log that still has blocks there [I]
    kept_tokens: Array  # of the blocks there [I]
    room_tokens: Array  # for them ()
    tokens_per_s: Array  # by which they come back ()
    spared_frac: Array  # of the prefill of a token that comes back ()
    loading_s: Array  # what the next iteration waits for [I]


@pytree
class Kept:
    """Who has which blocks. Leaves traced."""

    ids: Array  # of each request; U where there are no more, last nobody's [Q + 1, B]
    size_tokens: Array  # of a block [G, U + 1]
    home: Array  # a random number that those have in common who begin alike; `HOMELESS` without [Q + 1]
    held: Array  # as above; the last is no block [I, U + 1]
    log: Array  # who gave its blocks up, in turn and around [I, L]
    oldest: Array  # entry of it that still has blocks [I]
    newest: Array  # and the last one [I]
    kept_tokens: Array  # of the blocks that nobody uses [I]
    shared_tokens: Array  # of the blocks in use, as often as they are used but once [I]
    hosts: OnHosts | None = None  # None: what leaves the GPUs is lost


@pytree
class PromptInCache:
    """What instances have of a prompt each."""

    ids: Array  # [I, B]
    held: Array  # [I, B]
    size_tokens: Array  # [I, B]
    found_tokens: Array  # of its first blocks, before one that is nowhere, on the GPUs [I]
    shared_tokens: Array  # that others use now [I]
    on_hosts: Array | None = None  # the number they have there, 0 where they are not [I, B]
    loaded_tokens: ArrayLike = 0  # of its first blocks, on the hosts [I]


# --- the requests' blocks ---------------------------------------------------------------------------------------------


def prompt_blocks(rows: list[Blocks], prompt_tokens: list[np.ndarray], output_tokens: list[np.ndarray]) -> PromptBlocks:
    """Of the requests of each replication, in the order in which they come, whose lengths are [m] each."""
    known = [np.unique(row.ids, return_inverse=True) for row in rows]
    n_blocks = max(len(unique) for unique, _ in known)
    depth = max(int(row.counts.max(initial=1)) for row in rows)
    width = max(len(row.counts) for row in rows)
    ids = np.full((len(rows), width, depth), n_blocks, np.int32)
    sizes = np.zeros((len(rows), n_blocks + 1), np.int32)
    for r, (row, (_, local)) in enumerate(zip(rows, known, strict=True)):
        place, at, size = row.request, _depths(row), row.block_tokens
        # Hashes end with the prompt; what sessions tell of goes on through the answer.
        written = np.minimum(prompt_tokens[r] + output_tokens[r], row.counts * size)
        ends = np.where(row.counts > np.ceil(prompt_tokens[r] / size), written, prompt_tokens[r])
        ids[r, place, at] = local
        np.maximum.at(sizes[r], local, np.clip(ends[place] - size * at, 0, size).astype(np.int32))
    return PromptBlocks(ids, sizes)


def without(blocks: Blocks, empty: np.ndarray) -> Blocks:
    """The blocks where some prompts [n] have none."""
    return Blocks(blocks.ids[~empty[blocks.request]], np.where(empty, 0, blocks.counts), blocks.block_tokens)


def _depths(blocks: Blocks) -> np.ndarray:
    """The how manieth of its prompt each block is, from 0 [M]."""
    return np.arange(len(blocks.ids)) - np.repeat(np.cumsum(blocks.counts) - blocks.counts, blocks.counts)


def homes_of(blocks: PromptBlocks, n_instances: int, seed: int) -> np.ndarray:
    """The number that decides where a prompt is sent [R, m]: that of its first block but for those that so many begin
    with that they would be too much for an instance, as a common system prompt is; `HOMELESS` where all are."""
    n_rows, width, _ = blocks.ids.shape
    n_blocks = blocks.size_tokens.shape[1] - 1
    homes = np.full((n_rows, width), HOMELESS, np.int32)
    for r, ids in enumerate(blocks.ids):
        uses = np.bincount(ids.ravel(), minlength=n_blocks + 1)
        n_requests = np.count_nonzero(ids[:, 0] < n_blocks)
        most = max(HOTTEST * n_requests / n_instances, FEWEST_USES)
        fits = (uses[ids] <= most) & (ids < n_blocks)
        first = ids[np.arange(width), np.argmax(fits, axis=1)]
        numbers = np.random.default_rng([seed, r, 2]).integers(np.iinfo(np.int32).max, size=n_blocks + 1)
        homes[r] = np.where(fits.any(axis=1), numbers[first], HOMELESS)
    return homes


def nothing_kept(
    blocks: PromptBlocks,
    homes: np.ndarray,
    width: int,
    n_instances: int,
    n_slots: int,
    host: HostCache | None = None,
    spared_frac: float = 0.0,
    least: tuple[int, int] = (0, 0),
) -> Kept:
    """Empty caches of so many instances of each replication, whose requests are padded to `width`; with the `host` of
    each, what comes back from there spares a share of its prefill. There is room for so many blocks, and of a prompt,
    at `least`."""
    n_rows, n_requests, depth = blocks.ids.shape
    n_blocks, n = blocks.size_tokens.shape[1] - 1, n_rows * n_instances
    room, deepest = (_round_up(max(each)) for each in zip((n_blocks, depth), least, strict=True))
    ids = np.full((n_rows, width, deepest), room, np.int32)
    ids[:, :n_requests, :depth] = np.where(blocks.ids < n_blocks, blocks.ids, room)
    sizes = np.zeros((n_rows, room + 1), np.int32)
    sizes[:, :n_blocks] = blocks.size_tokens[:, :-1]
    of_all = np.full((n_rows, width), HOMELESS, np.int32)
    of_all[:, :n_requests] = homes
    zero = np.zeros(n, np.int32)
    n_log = width + n_slots
    return Kept(
        ids=jnp.asarray(np.concatenate([ids.reshape(-1, deepest), np.full((1, deepest), room, np.int32)])),
        size_tokens=jnp.asarray(sizes),
        home=jnp.asarray(np.append(of_all.ravel(), np.int32(HOMELESS))),
        held=jnp.zeros((n, room + 1), jnp.int32),
        # Every request leaves once; the preempted leave again, but then nothing was kept before them on the GPUs.
        log=jnp.zeros((n, n_log if host is None else 2 * n_log), jnp.int32),
        oldest=jnp.asarray(zero + 1),
        newest=jnp.asarray(zero.copy()),
        kept_tokens=jnp.asarray(zero.copy()),
        shared_tokens=jnp.asarray(zero.copy()),
        hosts=None if host is None else _nothing_on_hosts(host, spared_frac, n, room),
    )


def _nothing_on_hosts(host: HostCache, spared_frac: float, n_instances: int, n_blocks: int) -> OnHosts:
    """Empty memory on the hosts of so many instances."""
    zero = np.zeros(n_instances, np.int32)
    return OnHosts(
        held=jnp.zeros((n_instances, n_blocks + 1), jnp.int32),
        oldest=jnp.asarray(zero + 1),
        kept_tokens=jnp.asarray(zero.copy()),
        room_tokens=jnp.asarray(host.tokens, float),
        tokens_per_s=jnp.asarray(host.tokens_per_s, float),
        spared_frac=jnp.asarray(spared_frac, float),
        loading_s=jnp.zeros(n_instances),
    )


def _round_up(n: int) -> int:
    """The next of eight steps between powers of two, so that traces of about a size share a program."""
    unit = 1 << max(n.bit_length() - 4, 0)
    return -(-n // unit) * unit


# --- what instances do ------------------------------------------------------------------------------------------------


def look_up(kept: Kept, request: Array) -> PromptInCache:
    """What each instance has of the prompt of `request` [I]."""
    ids = kept.ids[request]
    n, n_groups = len(request), len(kept.size_tokens)
    group = jnp.arange(n) // (n // n_groups)
    held, sizes = jnp.take_along_axis(kept.held, ids, axis=1), kept.size_tokens[group[:, None], ids]
    if kept.hosts is None:
        leads = jnp.cumsum(held == 0, axis=1) == 0
        return PromptInCache(ids, held, sizes, _sum(leads, sizes), _sum(held > 0, sizes))
    on_hosts = jnp.take_along_axis(kept.hosts.held, ids, axis=1)
    leads = jnp.cumsum((held == 0) & (on_hosts == 0), axis=1) == 0
    here, there = leads & (held != 0), leads & (held == 0)
    return PromptInCache(ids, held, sizes, _sum(here, sizes), _sum(held > 0, sizes), on_hosts, _sum(there, sizes))


def used(kept: Kept, prompt: PromptInCache, takes: Array) -> Kept:
    """The caches after the instances `takes` [I] admit the request whose prompt was looked up."""
    there = prompt.ids < kept.held.shape[1] - 1
    now = jnp.where(prompt.held > 0, prompt.held + 1, 1)
    return replace(
        kept,
        held=_written(kept.held, prompt.ids, takes[:, None] & there, now),
        kept_tokens=kept.kept_tokens - jnp.where(takes, _sum(prompt.held < 0, prompt.size_tokens), 0),
        shared_tokens=kept.shared_tokens + jnp.where(takes, prompt.shared_tokens, 0),
        hosts=_loaded(kept.hosts, prompt, takes),
    )


def _loaded(hosts: OnHosts | None, prompt: PromptInCache, takes: Array) -> OnHosts | None:
    """The hosts after the instances `takes` have a prompt on their GPUs: what was found is loaded, what is behind a gap
    is computed anew, and nothing of it is in both."""
    if hosts is None or prompt.on_hosts is None:
        return hosts
    there = takes[:, None] & (prompt.on_hosts > 0)
    loading_s = jnp.where(takes, prompt.loaded_tokens / hosts.tokens_per_s, 0.0)
    return replace(
        hosts,
        held=_written(hosts.held, prompt.ids, there, jnp.zeros_like(prompt.on_hosts)),
        kept_tokens=hosts.kept_tokens - _sum(there, prompt.size_tokens),
        loading_s=hosts.loading_s + loading_s,
    )


def waited_for(kept: Kept, runs: Array) -> Kept:
    """The caches after the instances `runs` [I] have waited for what was loaded."""
    if kept.hosts is None:
        return kept
    return replace(kept, hosts=replace(kept.hosts, loading_s=jnp.where(runs, 0.0, kept.hosts.loading_s)))


def given_up(kept: Kept, gives: Array, request: Array, done_tokens: ArrayLike) -> Kept:
    """The caches after `request` [I] leaves the instances `gives` [I], of whose prompt so many tokens are done."""
    prompt, number = look_up(kept, request), kept.newest + 1
    starts = jnp.cumsum(prompt.size_tokens, axis=1) - prompt.size_tokens
    done = starts + prompt.size_tokens <= jnp.asarray(done_tokens)[..., None]
    last = prompt.held == 1
    now = jnp.where(last, jnp.where(done, -number[:, None], 0), prompt.held - 1)
    row, n_log = jnp.arange(len(gives)), kept.log.shape[1]
    place = jnp.where(gives, number % n_log, n_log)  # n_log is out of range: dropped
    return replace(
        kept,
        held=_written(kept.held, prompt.ids, gives[:, None] & (prompt.held > 0), now),
        log=kept.log.at[row, place].set(request.astype(jnp.int32), mode="drop"),
        newest=kept.newest + gives,
        kept_tokens=kept.kept_tokens + jnp.where(gives, _sum(last & done, prompt.size_tokens), 0),
        shared_tokens=kept.shared_tokens - jnp.where(gives, _sum(prompt.held > 1, prompt.size_tokens), 0),
    )


def all_given_up(kept: Kept, ended: Array, request: Array, turn: Array) -> Kept:
    """The caches after the sequences `ended` [I, S] leave, in the order in which they were admitted."""

    def one(loop: tuple[Kept, Array]) -> tuple[Kept, Array]:
        kept, ended = loop
        slot = jnp.argmin(jnp.where(ended, turn, jnp.iinfo(turn.dtype).max), axis=1)
        row = jnp.arange(len(slot))
        kept = given_up(kept, ended[row, slot], request[row, slot], jnp.iinfo(jnp.int32).max)
        return kept, ended.at[row, slot].set(False)

    return jax.lax.while_loop(lambda loop: jnp.any(loop[1]), one, (kept, ended))[0]


def evicted(kept: Kept, room_tokens: Array) -> Kept:
    """The caches where the blocks that nobody uses have `room_tokens` [I]: those given up longest ago go, to the hosts
    if there are any, and from there for good."""

    def too_much(kept: Kept) -> Array:
        return kept.kept_tokens > room_tokens

    kept = jax.lax.while_loop(
        lambda kept: jnp.any(too_much(kept)),
        lambda kept: _evict(kept, jnp.where(too_much(kept), kept.kept_tokens - room_tokens, 0.0)),
        kept,
    )
    kept = replace(kept, oldest=jnp.where(kept.kept_tokens == 0, kept.newest + 1, kept.oldest))
    return kept if kept.hosts is None else replace(kept, hosts=_gone(kept, kept.hosts))


def _gone(kept: Kept, hosts: OnHosts) -> OnHosts:
    """The hosts with no more than they have room for."""
    n_log = kept.log.shape[1]

    def excess(hosts: OnHosts) -> Array:
        # Before the log comes around, which it does after many preemptions alone, its entry goes as a whole.
        outrun = (kept.newest - hosts.oldest >= n_log // 2) & (hosts.kept_tokens > 0)
        return jnp.where(outrun, hosts.kept_tokens, jnp.maximum(hosts.kept_tokens - hosts.room_tokens, 0.0))

    def evict(hosts: OnHosts) -> OnHosts:
        held, freed, passed, _ = _last_of(kept, hosts.held, hosts.oldest, hosts.oldest, excess(hosts))
        return replace(hosts, held=held, oldest=hosts.oldest + passed, kept_tokens=hosts.kept_tokens - freed)

    hosts = jax.lax.while_loop(lambda hosts: jnp.any(excess(hosts) > 0), evict, hosts)
    return replace(hosts, oldest=jnp.where(hosts.kept_tokens == 0, kept.oldest, hosts.oldest))


def _evict(kept: Kept, excess_tokens: Array) -> Kept:
    """The last blocks of the oldest entry that has any, as many as make so much room [I]; or all of them."""
    held, freed, passed, (ids, goes) = _last_of(kept, kept.held, kept.oldest, -kept.oldest, excess_tokens)
    hosts = kept.hosts
    if hosts is not None:
        numbers = jnp.broadcast_to(kept.oldest[:, None], ids.shape)
        moved = _written(hosts.held, ids, goes, numbers)
        hosts = replace(hosts, held=moved, kept_tokens=hosts.kept_tokens + freed)
    return replace(kept, held=held, oldest=kept.oldest + passed, kept_tokens=kept.kept_tokens - freed, hosts=hosts)


def _last_of(
    kept: Kept, held: Array, entry: Array, mark: Array, excess_tokens: Array
) -> tuple[Array, Array, Array, tuple[Array, Array]]:
    """`held` without the last blocks that an entry [I] of the log left there as `mark` [I], as many as make so much
    room; what they free [tokens]; whether none are left; and which they are: ids, and whether they go [I, B]."""
    row, over = jnp.arange(len(excess_tokens)), excess_tokens > 0
    ids = kept.ids[kept.log[row, entry % kept.log.shape[1]]]
    group = row // (len(row) // len(kept.size_tokens))
    left = jnp.take_along_axis(held, ids, axis=1) == mark[:, None]
    sizes = jnp.where(left, kept.size_tokens[group[:, None], ids], 0)
    behind = jnp.sum(sizes, axis=1, keepdims=True) - jnp.cumsum(sizes, axis=1)
    goes = left & (behind < excess_tokens[:, None])
    freed = jnp.where(over, _sum(goes, sizes), 0)
    without = _written(held, ids, goes, jnp.zeros_like(ids))
    return without, freed, over & (freed == jnp.sum(sizes, axis=1)), (ids, goes)


def _written(held: Array, ids: Array, writes: Array, values: Array) -> Array:
    """`held` with some cells [I, B] changed."""
    row, n = jnp.arange(len(ids))[:, None], held.shape[1]
    return held.at[row, jnp.where(writes, ids, n)].set(values, mode="drop")  # n is out of range


def _sum(mask: Array, values: Array) -> Array:
    return jnp.sum(jnp.where(mask, values, 0), axis=1, dtype=jnp.int32)
