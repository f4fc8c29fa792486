"""Blocks of prompts that may be in a cache: what a trace's hashes, or its sessions, say is used again, and when.

A prompt is cut into blocks of so many tokens, the last of which may be shorter. A block is known by a number that
stands for the prompt up to its end: equal numbers are equal prefixes. Order is that of arrival; ages count requests.
"""

from dataclasses import dataclass

import numpy as np

from fleetopt_jax.core.errors import BadInput

BLOCK_TOKENS = 512  # of a hash, as Mooncake and Dynamo write them
NO_PREFIX = (
    "was seen after another one before: it does not stand for the prompt up to there",
    "need hashes of prefixes, which name a block and all before it",
)
SESSION_BLOCK_TOKENS = 64  # that sessions are cut into: near the 16 of a KV block, and a quarter of the work


@dataclass(frozen=True)
class Blocks:
    """The blocks of n prompts, one after another."""

    ids: np.ndarray  # 0, 1, ... [M]
    counts: np.ndarray  # of each prompt [n]
    block_tokens: int
    source: str = "hashes"  # or "sessions", of which they are made

    @property
    def request(self) -> np.ndarray:
        """Whose each block is [M]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def of(self, rows: np.ndarray) -> "Blocks":
        """Of some prompts, in this order."""
        ends = np.cumsum(self.counts)
        counts = self.counts[rows]
        first = np.repeat(ends[rows] - counts - (np.cumsum(counts) - counts), counts)
        return Blocks(self.ids[first + np.arange(counts.sum())], counts, self.block_tokens, self.source)


@dataclass(frozen=True)
class Uses:
    """Every use of a block, request by request. Arrays [M]."""

    request: np.ndarray
    tokens: np.ndarray  # of the block that are this prompt's; 0 of what is only written
    age_requests: np.ndarray  # since it was last used; inf where it never was
    previous: np.ndarray  # the request that did; -1 where none
    before: np.ndarray  # uses of the block before, all of them


def uses_of(blocks: Blocks, prompt_tokens: np.ndarray) -> Uses:
    """The uses of the blocks of prompts [n]."""
    request = blocks.request
    last, before = last_uses(blocks.ids)
    previous = np.where(last >= 0, request[last], -1)
    depth = np.arange(len(last)) - np.repeat(np.cumsum(blocks.counts) - blocks.counts, blocks.counts)
    tokens = np.clip(prompt_tokens[request] - blocks.block_tokens * depth, 0.0, blocks.block_tokens)
    return Uses(request, tokens, np.where(previous >= 0, request - previous, np.inf), previous, before)


def last_uses(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the use before of each use of a block, -1 where none; how many there were) [M], of uses in order."""
    order = np.argsort(ids, kind="stable")
    in_order = ids[order]
    again = np.flatnonzero(in_order[1:] == in_order[:-1]) + 1
    last = np.full(len(ids), -1)
    last[order[again]] = order[again - 1]
    first = np.maximum.accumulate(np.where(np.diff(in_order, prepend=-1) != 0, np.arange(len(ids)), 0))
    before = np.empty(len(ids), int)
    before[order] = np.arange(len(ids)) - first
    return last, before


def check_blocks(where: str, blocks: Blocks, prompt_tokens: np.ndarray, rows: np.ndarray) -> None:
    """Refuse hashes that do not fit their prompts, or that are not of prefixes; `rows` count from 1."""
    counts = blocks.counts
    check_counts(where, counts, blocks.block_tokens, prompt_tokens, rows)
    start = np.zeros(len(blocks.ids), bool)
    start[(np.cumsum(counts) - counts)[counts > 0]] = True
    parent = np.where(start, -1, np.concatenate([[-1], blocks.ids[:-1]]))
    same = same_parents(blocks.ids, parent)
    if not same.all():
        k = int(np.argmin(same))
        row = rows[blocks.request[k]]
        depth = k - int((np.cumsum(counts) - counts)[blocks.request[k]])
        raise BadInput(f"{where}, row {row}", f"block hash {depth + 1} {NO_PREFIX[0]}", NO_PREFIX[1])


def check_counts(where: str, counts: np.ndarray, size: int, prompt_tokens: np.ndarray, rows: np.ndarray) -> None:
    """Refuse prompts [n] that have not one hash for each of their blocks."""
    fits = (counts == np.ceil(prompt_tokens / size)) | (counts == np.floor(prompt_tokens / size))
    if not fits.all():
        i = int(np.argmin(fits))
        asked = f"{int(counts[i]):,} block hashes for {prompt_tokens[i]:,.0f} prompt tokens"
        raise BadInput(
            f"{where}, row {rows[i]}",
            f"{asked} do not match blocks of {size} tokens",
            f"need one a block: --block-tokens{_likely_size(counts, prompt_tokens)}",
        )


def same_parents(ids: np.ndarray, parent: np.ndarray) -> np.ndarray:
    """Whether each use [M] comes after the block that it came after at first."""
    _, first, where_of = np.unique(ids, return_index=True, return_inverse=True)
    return parent == parent[first][where_of]


def _likely_size(counts: np.ndarray, prompt_tokens: np.ndarray) -> str:
    """The block size that would fit all prompts, if a power of two does."""
    for size in (8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        if ((counts == np.ceil(prompt_tokens / size)) | (counts == np.floor(prompt_tokens / size))).all():
            return f" {size} fits"
    return ""


def blocks_of_sessions(
    sessions: np.ndarray,
    prompt_tokens: np.ndarray,
    output_tokens: np.ndarray,
    block_tokens: int = SESSION_BLOCK_TOKENS,
) -> Blocks:
    """The blocks that sessions [n] tell of (equal numbers are one session; -1 is none), where no hashes are known.

    A turn whose prompt is not shorter than that of the turn before begins with it and with its answer, in whole blocks;
    one that is shorter begins anew. Blocks of an answer are no prompt tokens of the turn that it answers.
    """
    counts = np.ceil((prompt_tokens + output_tokens) / block_tokens).astype(int)
    previous = np.full(len(counts), -1)
    order = np.argsort(sessions, kind="stable")
    turn = np.flatnonzero((sessions[order][1:] == sessions[order][:-1]) & (sessions[order][1:] >= 0)) + 1
    previous[order[turn]] = order[turn - 1]
    goes_on = previous >= 0
    goes_on[goes_on] = prompt_tokens[goes_on] >= prompt_tokens[previous[goes_on]]
    said = (prompt_tokens + output_tokens)[previous] // block_tokens
    shared = np.where(goes_on, np.minimum(said, np.ceil(prompt_tokens / block_tokens)), 0).astype(int)
    ends = np.cumsum(counts)
    ids = np.arange(ends[-1])
    for i in np.flatnonzero(shared):
        begin, of = ends[i] - counts[i], ends[previous[i]] - counts[previous[i]]
        ids[begin : begin + shared[i]] = ids[of : of + shared[i]]
    return Blocks(np.unique(ids, return_inverse=True)[1], counts, block_tokens, "sessions")
