"""Conversations: which requests go on with an earlier one, and the length that a router compares which keeps them.

A request goes on with the one that was last to use the deepest block it finds, if it begins with all whole blocks of
that prompt; a common system prompt alone makes no conversation. Sticky sessions send one to the pool where H times its
first total length fits, and leave it there until a turn no longer does:

    routed = min(max(p + o, H (p + o of the first turn)), the longest of all)

which is never less than p + o, so that no window is exceeded, and the total length itself where H is 1 and turns only
grow. What a request of no conversation is compared by is H times its own length.
"""

import numpy as np

from fleetopt_jax.workload.blocks import Blocks, uses_of


def first_turns(blocks: Blocks, prompt_tokens: np.ndarray) -> np.ndarray:
    """The request that each one's conversation began with, itself where it began one [n]."""
    uses, n = uses_of(blocks, prompt_tokens), len(blocks.counts)
    found = uses.previous >= 0
    depth = np.bincount(uses.request[found], minlength=n)  # what is found is how a prompt begins
    deepest = np.cumsum(blocks.counts) - blocks.counts + depth - 1
    previous = np.where(depth > 0, uses.previous[np.maximum(deepest, 0)], -1)
    whole = np.maximum(prompt_tokens[previous] // blocks.block_tokens, 1)
    begin = np.where((previous >= 0) & (depth >= whole), previous, np.arange(n))
    while not np.array_equal(begin, begin[begin]):
        begin = begin[begin]
    return begin


def sticky_tokens(
    blocks: Blocks, prompt_tokens: np.ndarray, output_tokens: np.ndarray, headroom: float, longest_tokens: float
) -> np.ndarray:
    """The length that sticky sessions route by [tokens] [n]: the equation above."""
    total = prompt_tokens + output_tokens
    began = total[first_turns(blocks, prompt_tokens)]
    return np.maximum(np.minimum(headroom * began, longest_tokens), total).astype(float)
