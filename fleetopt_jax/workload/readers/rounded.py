"""Time stamps that were rounded: whole seconds of a busy service, or what was gathered every three seconds.

As they are written, all requests of a stamp come at once, and a log by the second of a hundred requests a second has
gaps of squared CV 99, whoever sent them. What is known is how many came from a stamp to the next. There they are spread
at random, as a Poisson process puts a known number of arrivals: the burstiness is then that of the numbers.

Stamps are taken as rounded where `SHARING` requests or more share one in the mean and where nearly all gaps between
them are one step, or several. Bursts that were really sent by the clock, each at one moment, cannot be told from it.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

FEWEST_STAMPS = 20  # that a grid is seen in
SHARING = 2.0  # requests of a stamp, in the mean
OFF_GRID = 0.02  # of a step, that a gap may be off
ON_GRID = 0.98  # share of the gaps that lie on it


class Grid(NamedTuple):
    """What stamps were rounded to."""

    step_s: float
    per_step: float  # requests on a step, in the mean


def grid_of(seconds: np.ndarray) -> Grid | None:
    """The grid that stamps were rounded to; None where they were not."""
    stamps = np.unique(seconds)
    if len(stamps) < FEWEST_STAMPS or len(seconds) < SHARING * len(stamps):
        return None
    gaps = np.diff(stamps)
    step = float(np.median(gaps))
    steps = np.round(gaps / step)
    on_grid = (steps >= 1) & (np.abs(gaps / step - steps) <= OFF_GRID * steps)
    if on_grid.mean() < ON_GRID:
        return None
    return Grid(step, len(seconds) / (float(stamps[-1] - stamps[0]) / step + 1.0))


@dataclass
class Spread:
    """Puts arrivals of one stamp anywhere on the step that it stands for.

    Where they come piece by piece, nobody knows how many of a piece's last stamp are still to come: those that are
    there, k of some c a step, take the first 1 - exp(-k / c) of it, and those of the next piece the rest.
    """

    grid: Grid
    in_pieces: bool = False
    _stamp: float = -np.inf  # the last of the pieces before
    _there: int = 0  # requests of it
    _end_s: float = 0.0  # before which they were put
    _random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __call__(self, seconds: np.ndarray) -> np.ndarray:
        """Where arrivals at these stamps are put [s] [n > 0], not in order; the very first stays where it is."""
        first, last = self._stamp == -np.inf, float(seconds.max())
        begin, end = np.where(seconds == self._stamp, self._end_s, seconds), seconds + self.grid.step_s
        if self.in_pieces:
            there = int(np.sum(seconds == last)) + (self._there if last == self._stamp else 0)
            until_s = last - self.grid.step_s * np.expm1(-there / self.grid.per_step)
            self._stamp, self._there, self._end_s = last, there, float(until_s)
            end = np.where(seconds == last, until_s, end)
        found = begin + (end - begin) * self._random.random(len(seconds))
        if first:
            found[np.argmin(seconds)] = seconds.min()
        return found
