"""What block hashes and sessions say of prompts that pass: a sample of them (`workload/sampling.py`)."""

import numpy as np
import pyarrow as pa

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.workload.blocks import BLOCK_TOKENS, SESSION_BLOCK_TOKENS, check_counts
from fleetopt_jax.workload.readers.gathered_reuse import NOBODY, GatheredReuse
from fleetopt_jax.workload.readers.known import Settled
from fleetopt_jax.workload.readers.numbers import arrow, place
from fleetopt_jax.workload.sampling import BlockSampler, SampledUses, SessionSampler, mixed

FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd
TEXTS = 2**16  # made numbers of at once


class PassingReuse:
    """A sampler of what the pieces of a log say of reuse; `gathered` is what they said until now."""

    def __init__(self, where: str, settled: Settled, gathered: GatheredReuse):
        self.where, self._gathered = where, gathered
        self._blocks = self._sessions = None
        self._texts: bool | None = None
        if gathered.n_blocks and not gathered.warnings:
            self._blocks = BlockSampler(settled.block_tokens or BLOCK_TOKENS)
        elif gathered.sessions:
            self._sessions = SessionSampler(settled.block_tokens or SESSION_BLOCK_TOKENS)

    def take(self, k: int, prompt_tokens: np.ndarray, output_tokens: np.ndarray, rows: np.ndarray | None) -> None:
        """Piece k of what is gathered, of whose requests [n] some pass in the order of `rows`; None: all."""
        gathered = self._gathered
        if self._blocks is not None and not gathered.warnings:
            hashes, counts = gathered.hashes[k], gathered.counts[k]
            check_counts(self.where, counts, self._blocks.block_tokens, prompt_tokens, gathered.rows[k])
            keys = self._keys(hashes, int(gathered.rows[k][0]) - 1 if len(counts) else 0)
            if rows is not None:
                first = np.cumsum(counts) - counts
                counts, begin = counts[rows], np.repeat(first[rows], counts[rows])
                keys = keys[begin + np.arange(len(begin)) - np.repeat(np.cumsum(counts) - counts, counts)]
                prompt_tokens, output_tokens = prompt_tokens[rows], output_tokens[rows]
            self._blocks.add(keys, counts, prompt_tokens, output_tokens)
        elif self._sessions is not None and len(gathered.sessions) == len(gathered.rows):
            names = gathered.sessions[k]
            nobody = arrow.fill_null(arrow.is_in(names, value_set=pa.array(NOBODY)), fill_value=True)
            keys, somebody = text_keys(names), arrow.and_(arrow.invert(nobody), names.is_valid())
            columns = [keys, somebody.to_numpy(zero_copy_only=False), prompt_tokens, output_tokens]
            self._sessions.add(*(x if rows is None else x[rows] for x in columns))

    def settled(self) -> SampledUses | None:
        """The sample; None where nothing tells of reuse."""
        if self._blocks is None and self._gathered.n_blocks and not self._gathered.warnings:
            self._gathered.warnings.append("its first requests have no block hashes: those of others are not read")
        if self._blocks is not None and not self._gathered.warnings:
            return self._blocks.settled(self.where)
        found = self._sessions.settled() if self._sessions is not None else None
        if found is None and self._sessions is not None:
            self._gathered.warnings.append("its sessions are none, or too long to keep one: they are not read")
        return found

    def _keys(self, hashes: pa.Array, before: int) -> np.ndarray:
        if hashes.null_count:
            raise BadInput(place(self.where, 0, before), "a block hash is null", "need a hash of every block")
        texts = not pa.types.is_integer(hashes.type)
        if len(hashes) and self._texts not in (None, texts):
            problem = "block hashes are numbers in some pieces and texts in others"
            raise BadInput(place(self.where, 0, before), problem, "need hashes of one kind in a log as long as this")
        self._texts = texts if len(hashes) else self._texts
        return text_keys(hashes) if texts else mixed(hashes.to_numpy(zero_copy_only=False))


def text_keys(texts: pa.Array) -> np.ndarray:
    """64 even bits of each text [n], the same of the same; 0 of a null."""
    texts = arrow.fill_null(texts.cast(pa.large_string()), "")
    found = np.empty(len(texts), np.uint64)
    of_byte = mixed(np.arange(256))
    for start in range(0, len(texts), TEXTS):
        part = pa.concat_arrays([texts.slice(start, TEXTS)])  # with offsets of its own
        offsets = np.frombuffer(part.buffers()[1], np.int64)[part.offset : part.offset + len(part) + 1]
        size, raw = np.diff(offsets), np.frombuffer(part.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
        position = np.arange(len(raw)) - np.repeat(offsets[:-1] - offsets[0], size)
        powers = np.multiply.accumulate(np.full(max(int(size.max(initial=1)), 1), FACTOR))
        sums = np.concatenate([[np.uint64(0)], np.cumsum(of_byte[raw] * powers[position])])  # modulo 2^64, as all here
        ends = offsets - offsets[0]
        found[start : start + len(part)] = mixed(sums[ends[1:]] - sums[ends[:-1]] + mixed(size))
    return found
