"""Requests counted by their lengths as they pass: bounded memory, however many there are.

Each pair of prompt and output is a cell of its own while there are at most `MAX_CELLS`. Beyond, lengths are cut to so
many binary digits that there are no more cells than that: a cell holds the lengths from q to q (1 + w), with
w = 2 / 2^digits. Grids are nested, so the digits that are left depend on the requests, not on their order. Of every
cell count, mean prompt and mean output are exact, whatever its width; what is lost is the variance within it, at most
(w x)^2 / 4 of a length x (Popoviciu), and a quantile is off by at most w x.
"""

from dataclasses import dataclass, field

import numpy as np

MAX_CELLS = 2**19
GATHERED = 4  # times as many that are put together at once
SHIFT = 31  # bits of a length, of which none has more
EXACT = SHIFT  # digits that cut nothing off


@dataclass
class Cells:
    """Counts of requests by prompt and output, gathered piece by piece."""

    most: int = MAX_CELLS  # at least 1,024, which lengths of one digit fill
    digits: int = EXACT
    _pieces: list[tuple[np.ndarray, ...]] = field(default_factory=list)  # (key, count, prompt, output), the sums exact

    @property
    def width_frac(self) -> float:
        """Width of a cell over the least length in it; 0 where each pair has a cell of its own."""
        return 0.0 if self.digits == EXACT else 2.0 ** (1 - self.digits)

    def add(self, prompt_tokens: np.ndarray, output_tokens: np.ndarray) -> None:
        """Whole numbers of tokens [n]."""
        prompt, output = prompt_tokens.astype(np.int64), output_tokens.astype(np.int64)
        pairs, count = np.unique(prompt << SHIFT | output, return_counts=True)
        prompt, output = pairs >> SHIFT, pairs & ((1 << SHIFT) - 1)
        weight = count.astype(float)
        self._pieces.append((self._key(prompt, output), weight, prompt * weight, output * weight))
        if sum(len(piece[0]) for piece in self._pieces) > GATHERED * self.most:
            self._merge()

    def settled(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(mean prompt, mean output, count) of each cell."""
        self._merge()
        _, count, prompt, output = self._pieces[0]
        return prompt / count, output / count, count

    def of(self, prompt_tokens: np.ndarray, output_tokens: np.ndarray) -> np.ndarray:
        """The cell, as `settled` has them, of some of the requests that were counted."""
        key = self._key(prompt_tokens.astype(np.int64), output_tokens.astype(np.int64))
        return np.minimum(np.searchsorted(self._pieces[0][0], key), len(self._pieces[0][0]) - 1)

    def _merge(self) -> None:
        key, *sums = (np.concatenate(each) for each in zip(*self._pieces))
        while True:
            cells, where = np.unique(key, return_inverse=True)
            sums = [np.bincount(where, each, len(cells)) for each in sums]
            if len(cells) <= self.most:
                break
            self.digits = min(self.digits, 14) - 1
            key = self._key(cells >> SHIFT, cells & ((1 << SHIFT) - 1))
        self._pieces = [(cells, *sums)]

    def _key(self, prompt: np.ndarray, output: np.ndarray) -> np.ndarray:
        return _cut(prompt, self.digits) << SHIFT | _cut(output, self.digits)


def _cut(lengths: np.ndarray, digits: int) -> np.ndarray:
    """Whole numbers with all binary digits but the first few set to 0."""
    if digits == EXACT:
        return lengths
    over = np.maximum(np.frexp(lengths.astype(float))[1] - digits, 0)
    return lengths >> over << over
