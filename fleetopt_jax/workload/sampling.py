"""Blocks of prompts that pass: a sample of them in bounded memory, however many there are.

**A spatial sample** (SHARDS: Waldspurger, Park, Garthwaite, Ahmad, FAST'15): a block is in it if its hash is below a
threshold, so that all of its uses are there or none. Whenever more uses are kept than there is room for, the threshold
halves and the blocks above it go, with all that was kept of them: what is left depends on the blocks alone, not on the
pieces that they came in. Ages are counted over all requests, in the sample or not, so they need no correction by the
rate. And a block's hash names the prompt up to its end, so whoever finds a block finds all before it: each block of the
sample tells by itself whether it is found, and what is found of a request adds up over its blocks, also in its squares.

**Blocks that many requests begin with** (system prompts) would make such a sample bad: in or out by chance, with a good
part of all uses. Of a block that is used often in a stretch of the log (`OFTEN`, by one in four requests of it) all
uses but its first there, and all later ones, count whatever its hash is; of these uses, which tell nearly the same, a
sample is kept. Whoever has not been used for longest makes room for others, and is in or out by chance again. Which
blocks these are does not depend on their hashes, so nothing is biased. What is known exactly (blocks and tokens of
either kind) the sample is scaled to.

**Sessions** are sampled by their own hash; their turns make the blocks (`blocks_of_sessions`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.workload.blocks import NO_PREFIX, blocks_of_sessions, last_uses, same_parents

MAX_USES = 2**20  # that are kept, of blocks by chance
MAX_OFTEN = 2**14  # blocks that are used often
MAX_OFTEN_USES = 2**18  # that are kept of them
STRETCH = 2**21  # blocks of a log, over which it is found out who is used often
EVERY, OFTEN = 4, 8  # one in so many requests is looked at; uses by those
NO_DEPTH = 2**40  # of a use that only says when a block was last used
N_GROUPS = 16  # of blocks, each left out once to see how much that changes

Rows = dict[str, np.ndarray]
_BITS = 21  # of a key, by which most keys that are not looked for are known at once


def mixed(keys: np.ndarray) -> np.ndarray:
    """Whole numbers as 64 even bits, one to one (the finaliser of SplitMix64)."""
    x = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class SampledUses:
    """Uses of blocks that stand for all; first those of blocks by chance, then those of blocks used often. [M]"""

    block: np.ndarray  # 0, 1, ...; -1 of those used often
    request: np.ndarray  # 0, 1, ... of all that passed
    depth: np.ndarray  # of the block in its prompt
    prompt_tokens: np.ndarray  # of its request
    output_tokens: np.ndarray
    age_requests: np.ndarray  # since it was last used; inf where it never was
    previous_prompt: np.ndarray  # of the request that did; 0 where none
    previous_output: np.ndarray
    before: np.ndarray  # uses of the block before
    uses_a_request: np.ndarray  # of a block used often, before
    group: np.ndarray  # of N_GROUPS, of the block; -1 of what is there without chance
    often: np.ndarray  # is of a block used often
    block_tokens: int
    source: str  # hashes or sessions
    one_in: int  # blocks, or sessions, of which one is in the sample
    n_requests: int  # all, whether they have blocks or not
    totals: tuple[tuple[float, float], ...]  # (blocks, tokens) of prompts: by chance, used often, all; sessions or not

    @property
    def tokens(self) -> np.ndarray:
        """Of the block that are this prompt's."""
        return np.clip(self.prompt_tokens - self.block_tokens * self.depth, 0.0, self.block_tokens)

    def stands_for(self, size: np.ndarray, of: int, without: int | None = None) -> np.ndarray:
        """Blocks (`of` 0, each of `size` 1) or tokens (1) that each use stands for, scaled to what is known of all;
        without one of the groups, as if it had not been there."""
        size = size.astype(float) if without is None else np.where(self.group == without, 0.0, size)
        for kind, mine in enumerate((~self.often, self.often)):
            there = size[mine].sum()
            size[mine] *= self.totals[kind][of] / there if there else 0.0
        return size


@dataclass
class Thinned:
    """Rows whose draw, of 64 bits, is below a threshold; it halves whenever there are more than `most`."""

    most: int
    by: str = ""  # what counts; else rows
    shift: int = 0
    _pieces: list[Rows] = field(default_factory=list)

    def keeps(self, draw: np.ndarray) -> np.ndarray:
        return draw >> np.uint64(64 - self.shift) == 0 if self.shift else np.ones(len(draw), bool)

    def add(self, rows: Rows) -> None:
        """Rows that it keeps; `draw` is one of the columns."""
        self._pieces.append(rows)
        while sum(self._size(piece) for piece in self._pieces) > self.most and self.shift < 63:
            self.shift += 1
            self._pieces = [{k: x[self.keeps(piece["draw"])] for k, x in piece.items()} for piece in self._pieces]

    def settled(self) -> Rows:
        pieces = self._pieces
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]} if pieces else {}

    def _size(self, piece: Rows) -> int:
        return int(piece[self.by].sum()) if self.by else len(piece["draw"])


class _Found:
    """Keys among those that are looked for [K]."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys  # rising
        self._maybe = np.zeros(1 << _BITS, bool)
        self._maybe[self._low(keys)] = True

    def among(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(where they are, which they are)."""
        at = np.flatnonzero(self._maybe[self._low(keys)])
        slot = np.searchsorted(self.keys, keys[at])
        good = slot < len(self.keys)
        good[good] = self.keys[slot[good]] == keys[at[good]]
        return at[good], slot[good]

    def _low(self, keys: np.ndarray) -> np.ndarray:
        return (keys & np.uint64((1 << _BITS) - 1)).astype(np.int64)


@dataclass
class _Stretch:
    """Requests in order, and the keys of their blocks one after another."""

    keys: np.ndarray
    counts: np.ndarray  # [n], none 0
    request: np.ndarray
    prompt: np.ndarray
    output: np.ndarray

    def rows(self, at: np.ndarray) -> Rows:
        """Of some of its blocks."""
        ends = np.cumsum(self.counts)
        mine = np.searchsorted(ends, at, side="right")
        depth = at - (ends - self.counts)[mine]
        names = ("request", "prompt", "output")
        return {"key": self.keys[at], "depth": depth, **{name: getattr(self, name)[mine] for name in names}}

    def part(self, begin: int, end: int) -> "_Stretch":
        """Some of its requests."""
        ends = np.concatenate([[0], np.cumsum(self.counts)])
        rows = (x[begin:end] for x in (self.counts, self.request, self.prompt, self.output))
        return _Stretch(self.keys[ends[begin] : ends[end]], *rows)


def _together(pieces: list[_Stretch]) -> _Stretch:
    """One after another."""
    names = ("keys", "counts", "request", "prompt", "output")
    return _Stretch(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in names))


_LAST = ("request", "prompt", "output")


def _first_and_last(slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each slot begins and ends [K], of slots in order."""
    first = np.flatnonzero(np.diff(slot, prepend=-1))
    return first, np.append(first[1:], len(slot)) - 1


class _Often:
    """Blocks that are used often: when and by whom they were last used, and how often."""

    def __init__(self):
        self.kept = Thinned(MAX_OFTEN_USES)
        self.found = _Found(np.empty(0, np.uint64))
        self.rows: Rows = {name: np.empty(0, np.int64) for name in (*_LAST, "first", "count")}

    def take(self, stretch: _Stretch, at: np.ndarray, slot: np.ndarray, block_tokens: int) -> float:
        """Uses of them; the tokens of prompts that these are."""
        order = np.argsort(slot, kind="stable")
        slot, rows = slot[order], stretch.rows(at[order])
        first, last = _first_and_last(slot)
        previous = {}
        for name in _LAST:
            previous[name] = np.roll(rows[name], 1)
            previous[name][first] = self.rows[name][slot[first]]
        size = last - first + 1
        before = self.rows["count"][slot] + np.arange(len(slot)) - np.repeat(first, size)
        draw = mixed(rows["key"] ^ mixed(rows["request"]))
        keeps = self.kept.keeps(draw)
        span = previous["request"] - self.rows["first"][slot]
        self.kept.add(
            {name: rows[name][keeps] for name in (*_LAST, "depth")}
            | {"draw": draw[keeps], "age": (rows["request"] - previous["request"])[keeps], "before": before[keeps]}
            | {"previous_prompt": previous["prompt"][keeps], "previous_output": previous["output"][keeps]}
            | {"uses_a_request": ((before - 1) / np.maximum(span, 1))[keeps]}
        )
        for name in _LAST:
            self.rows[name][slot[first]] = rows[name][last]
        self.rows["count"][slot[first]] += size
        return float(np.clip(rows["prompt"] - block_tokens * rows["depth"], 0, block_tokens).sum())

    def forget(self) -> Rows:
        """Those that were not used for longest, once there is little room; when they were."""
        if len(self.found.keys) <= MAX_OFTEN // 2:
            return {}
        order = np.argsort(self.rows["request"], kind="stable")
        oldest, latest = order[: -(MAX_OFTEN // 4)], np.sort(order[-(MAX_OFTEN // 4) :])
        gone = {"draw": self.found.keys[oldest], **{name: self.rows[name][oldest] for name in _LAST}}
        self.rows, self.found = {k: x[latest] for k, x in self.rows.items()}, _Found(self.found.keys[latest])
        return gone

    def look(self, stretch: _Stretch, others: np.ndarray) -> np.ndarray:
        """Find out who else is used often in a stretch, of the `others` that are not known to be: from their second use
        in it on. Where the first ones are."""
        some = others & np.repeat(mixed(stretch.request) % np.uint64(EVERY) == 0, stretch.counts)
        keys, n = np.unique(stretch.keys[some], return_counts=True)
        room = MAX_OFTEN - len(self.found.keys)
        most = np.sort(np.argsort(-n, kind="stable")[:room])
        keys = keys[most][n[most] >= OFTEN]
        if not len(keys):
            return np.empty(0, np.int64)
        at, slot = _Found(keys).among(stretch.keys)
        at = at[np.unique(slot, return_index=True)[1]]  # keys rise, as their slots do
        rows = stretch.rows(at)
        rows |= {"first": rows["request"], "count": np.ones(len(at), np.int64)}
        both = np.concatenate([self.found.keys, keys])
        order = np.argsort(both)
        self.rows = {name: np.concatenate([x, rows[name]])[order] for name, x in self.rows.items()}
        self.found = _Found(both[order])
        return at


class BlockSampler:
    """A sample of the blocks of prompts that pass, by their hashes."""

    def __init__(self, block_tokens: int):
        self.block_tokens, self.n_requests = block_tokens, 0
        self._kept, self._often = Thinned(MAX_USES), _Often()
        self._pending: list[_Stretch] = []
        self._all, self._of_often = np.zeros(2), np.zeros(2)  # (blocks, tokens) of prompts

    def add(self, keys: np.ndarray, counts: np.ndarray, prompt_tokens: np.ndarray, output_tokens: np.ndarray) -> None:
        """Requests [n] in order, and the keys (`mixed`) of their blocks one after another."""
        request, some = self.n_requests + np.arange(len(counts)), counts > 0
        self.n_requests += len(counts)
        self._all += counts.sum(), np.minimum(prompt_tokens, counts * self.block_tokens).sum()
        of_some = (x[some].astype(np.int64) for x in (counts, request, prompt_tokens, output_tokens))
        self._pending.append(_Stretch(keys, *of_some))
        if sum(len(each.keys) for each in self._pending) >= STRETCH:
            self._pending = list(self._taken(_together(self._pending)))

    def settled(self, where: str) -> SampledUses | None:
        """The sample of all that passed, None of no blocks; `BadInput` where its hashes are not of prefixes."""
        if not self._all[0]:
            return None
        if self._pending:
            for rest in self._taken(_together(self._pending)):
                self._take(rest)
        self._pending = []
        rows, often = self._kept.settled(), self._often.kept.settled()
        block = np.unique(rows["draw"], return_inverse=True)[1]
        same = same_parents(block, rows["parent"]) | (rows["depth"] == NO_DEPTH)
        if not same.all():
            request, depth = (int(rows[name][np.argmin(same)]) for name in ("request", "depth"))
            raise BadInput(f"{where}, request {request + 1:,}", f"block hash {depth + 1} {NO_PREFIX[0]}", NO_PREFIX[1])
        return _sampled(
            (rows, block, _groups(self._kept, rows)),
            (often, _groups(self._often.kept, often)),
            (self.block_tokens, "hashes", 1 << self._kept.shift, self.n_requests),
            (self._all - self._of_often, self._of_often, self._all),
        )

    def _taken(self, stretch: _Stretch) -> Iterator[_Stretch]:
        """Take whole stretches, and give back what is left over: where they end does not depend on the pieces."""
        ends, begin = np.cumsum(stretch.counts), 0
        while True:
            before = ends[begin - 1] if begin else 0
            end = int(np.searchsorted(ends, before + STRETCH)) + 1
            if end > len(ends):
                break
            self._take(stretch.part(begin, end))
            begin = end
        if begin < len(ends):
            yield stretch.part(begin, len(ends))

    def _take(self, stretch: _Stretch) -> None:
        at, slot = self._often.found.among(stretch.keys)
        others = np.ones(len(stretch.keys), bool)
        others[at] = False
        if len(first := self._often.look(stretch, others)):
            at, slot = self._often.found.among(stretch.keys)
            known = ~np.isin(at, first)
            at, slot = at[known], slot[known]
            others[at] = False
        if len(at):
            self._of_often += len(at), self._often.take(stretch, at, slot, self.block_tokens)
        kept = np.flatnonzero(others & self._kept.keeps(stretch.keys))
        rows = stretch.rows(kept)
        parent = np.where(rows["depth"] > 0, stretch.keys[np.maximum(kept - 1, 0)], np.uint64(0))
        self._kept.add({"draw": rows.pop("key"), "parent": parent, **rows})
        if gone := self._often.forget():
            gone = {name: x[self._kept.keeps(gone["draw"])] for name, x in gone.items()}
            n = len(gone["draw"])
            self._kept.add({**gone, "parent": np.zeros(n, np.uint64), "depth": np.full(n, NO_DEPTH)})


class SessionSampler:
    """A sample of sessions that pass, with all of their turns."""

    def __init__(self, block_tokens: int):
        self.block_tokens, self.n_requests = block_tokens, 0
        self._kept = Thinned(MAX_USES, "size")
        self._all, self._of_nobody = np.zeros(2), np.zeros(2)

    def add(self, keys: np.ndarray, somebody: np.ndarray, prompt_tokens: np.ndarray, output_tokens: np.ndarray) -> None:
        """Requests [n] in order, and the keys of the sessions of those that are of `somebody`."""
        request = self.n_requests + np.arange(len(keys))
        self.n_requests += len(keys)
        n_blocks = np.ceil(prompt_tokens / self.block_tokens)
        self._all += n_blocks.sum(), prompt_tokens.sum()
        self._of_nobody += n_blocks[~somebody].sum(), prompt_tokens[~somebody].sum()
        kept = somebody & self._kept.keeps(keys)
        prompt, output = (x[kept].astype(np.int64) for x in (prompt_tokens, output_tokens))
        size = -(-(prompt + output) // self.block_tokens)
        rows = {"draw": keys[kept], "request": request[kept], "prompt": prompt, "output": output, "size": size}
        self._kept.add(rows)

    def settled(self) -> SampledUses | None:
        """The sample of all that passed; None where no session is in it."""
        turns = self._kept.settled()
        if not turns or not len(turns["draw"]):
            return None
        session = np.unique(turns["draw"], return_inverse=True)[1]
        blocks = blocks_of_sessions(session, turns["prompt"], turns["output"], self.block_tokens)
        turn = blocks.request
        rows = {name: turns[name][turn] for name in _LAST}
        rows["depth"] = np.arange(len(turn)) - np.repeat(np.cumsum(blocks.counts) - blocks.counts, blocks.counts)
        nothing: Rows = {}
        return _sampled(
            (rows, blocks.ids, _groups(self._kept, turns)[turn]),
            (nothing, np.empty(0, np.int64)),
            (self.block_tokens, "sessions", 1 << self._kept.shift, self.n_requests),
            (self._all - self._of_nobody, np.zeros(2), self._all),
        )


def _groups(kept: Thinned, rows: Rows) -> np.ndarray:
    """The group of each row; -1 where all rows are kept."""
    if not rows or not kept.shift:
        return np.full(len(rows["draw"]) if rows else 0, -1)
    return (rows["draw"] % np.uint64(N_GROUPS)).astype(np.int64)


def _sampled(
    by_chance: tuple[Rows, np.ndarray, np.ndarray],
    often: tuple[Rows, np.ndarray],
    about: tuple[int, str, int, int],
    totals: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> SampledUses:
    """Put together: (rows, blocks, groups) of blocks by chance, (rows, groups) of those used often."""
    rows, block, group = by_chance
    last, before = last_uses(block)
    some = last >= 0
    request, n = rows["request"], len(block)
    columns = {
        "age": np.where(some, request - request[last], np.inf),
        "previous_prompt": np.where(some, rows["prompt"][last], 0),
        "previous_output": np.where(some, rows["output"][last], 0),
        "before": before,
        "uses_a_request": np.zeros(n),
        **{name: rows[name] for name in ("request", "depth", "prompt", "output")},
    }
    more, m = often[0] or {name: x[:0] for name, x in columns.items()}, len(often[1])
    both = {name: np.concatenate([x, more[name]]) for name, x in columns.items()}
    block_tokens, source, one_in, n_requests = about
    return SampledUses(
        block=np.concatenate([block, np.full(m, -1)]),
        request=both["request"],
        depth=both["depth"],
        prompt_tokens=both["prompt"].astype(float),
        output_tokens=both["output"].astype(float),
        age_requests=both["age"].astype(float),
        previous_prompt=both["previous_prompt"],
        previous_output=both["previous_output"],
        before=both["before"],
        uses_a_request=both["uses_a_request"],
        group=np.concatenate([group, often[1]]),
        often=np.repeat([False, True], [n, m]),
        block_tokens=block_tokens,
        source=source,
        one_in=one_in,
        n_requests=n_requests,
        totals=tuple((float(n_blocks), float(tokens)) for n_blocks, tokens in totals),
    )
