"""Arrivals counted by stretches of time as they pass: bounded memory, however many there are.

Stretches are quarters of the finest bins of a profile (`profile.py`), and once a log spans more than the finer bins are
for, of an hour: of each non-empty one count, first and last arrival, the sum of its squared gaps, and sums and squares
of lengths. So rates, burstiness within any bin and over all, and mean lengths are those of the arrivals themselves, as
long as they pass in order.
"""

from dataclasses import dataclass, field, fields

import numpy as np

from fleetopt_jax.core.units import HOUR_S

FINE_S, COARSE_S = 15.0, HOUR_S / 4.0
FINE_FOR_S = 8 * HOUR_S  # a longer log has no bins of less than an hour
MANY = 200_000  # stretches that are gathered before they are put together


class OutOfOrder(Exception):
    """An arrival before one that has passed."""


@dataclass
class Stretches:
    """Of each stretch of time with arrivals, in order [R]."""

    index: np.ndarray  # its number on the file's own clock
    n: np.ndarray
    first_s: np.ndarray  # since the first arrival of all
    last_s: np.ndarray
    gaps2_s2: np.ndarray  # sum of the squares of the gaps inside
    prompt: np.ndarray  # sums of lengths, and of their squares
    output: np.ndarray
    prompt2: np.ndarray
    output2: np.ndarray

    def by(self, key: np.ndarray) -> "Stretches":
        """Put together where `key` [R], which does not fall, is equal; it is their number then."""
        start = np.flatnonzero(np.diff(key, prepend=key[0] - 1))
        end = np.append(start[1:], len(key)) - 1
        between = (self.first_s[1:] - self.last_s[:-1]) ** 2
        gaps2 = self.gaps2_s2 + np.insert(between, 0, 0.0)
        gaps2[start] = self.gaps2_s2[start]
        sums = {name: np.add.reduceat(getattr(self, name), start) for name in ("n", *_SUMS)}
        return Stretches(
            key[start],
            first_s=self.first_s[start],
            last_s=self.last_s[end],
            gaps2_s2=np.add.reduceat(gaps2, start),
            **sums,
        )


_SUMS = ("prompt", "output", "prompt2", "output2")


@dataclass
class Clock:
    """Arrivals by stretches of time, gathered piece by piece; `first_s` is the first, on the file's own clock."""

    first_s: float
    n: int = 0
    last_s: float = 0.0
    gaps2_s2: float = 0.0  # of all gaps
    width_s: float = FINE_S
    _pieces: list[Stretches] = field(default_factory=list)

    def add(self, seconds: np.ndarray, prompt_tokens: np.ndarray, output_tokens: np.ndarray) -> None:
        """Arrivals since the first [s] [n > 0], in any order among themselves; `OutOfOrder` before what passed."""
        if (np.diff(seconds) < 0).any():
            order = np.argsort(seconds, kind="stable")
            seconds, prompt_tokens, output_tokens = seconds[order], prompt_tokens[order], output_tokens[order]
        if seconds[0] < self.last_s:
            raise OutOfOrder
        gaps2 = np.diff(seconds, prepend=self.last_s) ** 2
        self.gaps2_s2 += float(gaps2.sum())  # the very first arrival is 0 s after itself
        one_each = Stretches(
            self._index(seconds),
            np.ones(len(seconds)),
            seconds,
            seconds,
            np.zeros(len(seconds)),
            prompt_tokens,
            output_tokens,
            prompt_tokens**2,
            output_tokens**2,
        )
        self._pieces.append(one_each.by(one_each.index))
        self.n, self.last_s = self.n + len(seconds), float(seconds[-1])
        if sum(len(piece.index) for piece in self._pieces) > MANY:
            self.settled()

    def settled(self) -> Stretches:
        """All that passed."""
        names = [each.name for each in fields(Stretches)]
        found = Stretches(*(np.concatenate([getattr(piece, name) for piece in self._pieces]) for name in names))
        if self.width_s < COARSE_S and self.last_s > FINE_FOR_S:
            self.width_s = COARSE_S
            found.index = self._index(found.first_s)
        self._pieces = [found.by(found.index)]
        return self._pieces[0]

    def _index(self, seconds: np.ndarray) -> np.ndarray:
        """The stretch of each arrival, by the hours of the file's own clock."""
        hours = np.floor(self.first_s / HOUR_S)
        offset_s = self.first_s - HOUR_S * hours
        return (hours * HOUR_S / self.width_s + np.floor((seconds + offset_s) / self.width_s)).astype(np.int64)

    @property
    def scv(self) -> float | None:
        """Squared CV of all gaps; None where there is no span."""
        if self.n < 2 or self.last_s <= 0:
            return None
        mean = self.last_s / (self.n - 1)
        return self.gaps2_s2 / (self.n - 1) / mean**2 - 1.0
