"""What a file's block hashes and sessions say of its prompts, gathered piece by piece."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.workload.blocks import BLOCK_TOKENS, Blocks, check_blocks
from fleetopt_jax.workload.readers.known import Settled
from fleetopt_jax.workload.readers.numbers import arrow, place, undictionaried
from fleetopt_jax.workload.readers.records import Columns

MAX_BLOCKS = 200_000_000  # 1.6 GB
NOBODY = ("", "-", "null", "None", "-1")  # names of sessions that are none


@dataclass
class GatheredReuse:
    """Columns of blocks and sessions, of the rows that are kept."""

    hashes: list[pa.Array] = field(default_factory=list)  # of all blocks, one after another
    counts: list[np.ndarray] = field(default_factory=list)  # of blocks, of each row
    rows: list[np.ndarray] = field(default_factory=list)  # of the file, from 1
    sessions: list[pa.Array] = field(default_factory=list)
    parents: list[pa.Array] = field(default_factory=list)
    n_blocks: int = 0  # that were seen
    n_held: int = 0  # of them that are held here
    warnings: list[str] = field(default_factory=list)

    def add(self, settled: Settled, columns: Columns, before: int, n_rows: int, kept: np.ndarray | None) -> None:
        """What a piece says, before which there are `before` rows; None kept is all."""
        rows = np.arange(n_rows) if kept is None else kept
        self.rows.append(before + rows + 1)
        for name, found in ((settled.session, self.sessions), (settled.parent, self.parents)):
            if name and not pa.types.is_nested(columns[name].type):
                found.append(undictionaried(columns[name]).take(pa.array(rows)).cast(pa.string()))
        if settled.hashes is None or self.warnings:
            return
        lists = columns[settled.hashes]
        if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
            if lists.null_count < len(lists):
                self.warnings.append(f"column {settled.hashes!r} holds no lists: its block hashes are not read")
            else:
                self.hashes.append(pa.array([], pa.int64()))
                self.counts.append(np.zeros(len(rows), int))
            return
        lists = lists.take(pa.array(rows))
        hashes = arrow.list_flatten(lists)
        counts = arrow.fill_null(arrow.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        self.n_blocks += len(hashes)
        self.n_held += len(hashes)
        if self.n_held > MAX_BLOCKS:
            self.warnings.append(f"more than {MAX_BLOCKS:,} block hashes: they are not read")
            return
        self.hashes.append(hashes)
        self.counts.append(counts.astype(int))

    def settled(
        self, where: str, settled: Settled, prompt_tokens: np.ndarray
    ) -> tuple[Blocks | None, np.ndarray | None]:
        """The blocks and the sessions of the prompts in the order of the file, or `BadInput`."""
        sessions = _sessions(self.sessions, self.parents) if len(self.sessions) == len(self.rows) else None
        if self.warnings or not self.n_blocks:
            return None, sessions
        ids = np.concatenate([_numbers(each) for each in _of_one_type(self.hashes)])
        blocks = Blocks(
            np.unique(ids, return_inverse=True)[1], np.concatenate(self.counts), settled.block_tokens or BLOCK_TOKENS
        )
        rows = np.concatenate(self.rows)
        for_null = [i for i, each in enumerate(self.hashes) if each.null_count]
        if for_null:
            raise BadInput(place(where, 0, int(rows[0]) - 1), "a block hash is null", "need a hash of every block")
        check_blocks(where, blocks, prompt_tokens, rows)
        return blocks, sessions

    def release(self) -> None:
        """Let go what was kept row by row."""
        self.hashes, self.counts, self.rows, self.sessions, self.parents, self.n_held = [], [], [], [], [], 0

    def roles(self, settled: Settled) -> dict[str, str | None]:
        """Which columns were read for what."""
        hashes = settled.hashes if self.n_blocks and not self.warnings else None
        return {f"hashes of {settled.block_tokens or BLOCK_TOKENS} tokens": hashes, "session": settled.session}


def _of_one_type(parts: list[pa.Array]) -> list[pa.Array]:
    """Hashes as whole numbers where all pieces have such, else as texts."""
    if all(pa.types.is_integer(part.type) for part in parts if len(part)):
        return [part.cast(pa.int64()) if not pa.types.is_uint64(part.type) else part for part in parts if len(part)]
    texts = pa.concat_arrays([part.cast(pa.string()) for part in parts if len(part)])
    return [texts.dictionary_encode().indices]


def _numbers(part: pa.Array) -> np.ndarray:
    return part.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)


def _sessions(sessions: list[pa.Array], parents: list[pa.Array]) -> np.ndarray | None:
    """Numbers of sessions; a turn that names the turn before is of its session."""
    if not sessions:
        return None
    own = pa.concat_arrays(sessions)
    names = own.dictionary_encode()
    codes = arrow.fill_null(names.indices, -1).to_numpy(zero_copy_only=False).astype(int)
    nobody = arrow.is_in(own, value_set=pa.array(NOBODY)).to_numpy(zero_copy_only=False)
    codes = np.where(nobody, -1, codes)
    if parents:
        before = arrow.index_in(pa.concat_arrays(parents), value_set=names.dictionary)
        root = np.arange(len(names.dictionary))
        turn = arrow.fill_null(before, -1).to_numpy(zero_copy_only=False).astype(int)
        goes_on = (turn >= 0) & (codes >= 0) & (turn != codes)
        root[codes[goes_on]] = turn[goes_on]
        for _ in range(len(root).bit_length()):  # each time twice as far back; a circle ends somewhere on it
            root = root[root]
        codes = np.where(codes >= 0, root[codes], -1)
    return codes if (codes >= 0).any() else None
