"""The search for the least whole number with which noisy trials hold a limit, from a guess, up and down."""

import math
from dataclasses import dataclass, replace

import numpy as np

from fleetopt_jax._simulate.readings import Held

FALLS = 4.0  # the power of N by which a miss is thought to fall, until two tries have told
SLOPES = (-16.0, -1.5)  # between which what two tries told is believed
AIM = 0.05  # a step is aimed so far below a limit, in its logarithm: what is just at it is too close to tell
SHY = 0.1  # between two tries, no more than such a share of the way from the limit to the one that holds
FURTHEST = 2.0  # times that one step goes up
HOPELESS = 0.05  # a miss that falls by less, in its logarithm, while N grows by half will not come to its limit


@dataclass(frozen=True)
class Tried:
    """One number, and what its trial said."""

    n: int
    by: float  # ln of the worst value over its limit [-]
    reading: Held


@dataclass(frozen=True)
class Bracket:
    """What is known of the least N in [least, most] that holds. What is too close to tell does not hold."""

    least: int
    most: int
    first: int  # to try first
    tries: tuple[Tried, ...] = ()

    @property
    def passed(self) -> Tried | None:
        """The least that held, of which no larger one was found wanting since."""
        return min((each for each in self.tries if each.reading == "holds"), key=lambda each: each.n, default=None)

    @property
    def failed(self) -> Tried | None:
        """The largest below `passed` that did not hold."""
        below = math.inf if self.passed is None else self.passed.n
        wanting = (each for each in self.tries if each.reading != "holds" and each.n < below)
        return max(wanting, key=lambda each: each.n, default=None)

    @property
    def bound(self) -> int:
        """No smaller number is known to hold, or can."""
        return self.least if self.failed is None else self.failed.n + 1

    @property
    def hopeless(self) -> bool:
        """Whether no number worth having holds."""
        failed = sorted((each for each in self.tries if each.reading == "fails"), key=lambda each: each.n)
        if self.passed or not failed:
            return False
        if self.bound > self.most:
            return True
        last = failed[-1]
        before = [each for each in failed if 1.5 * each.n <= last.n]
        return bool(before) and last.by > HOPELESS and before[-1].by - last.by < HOPELESS

    @property
    def is_open(self) -> bool:
        """Whether a try could tell more."""
        if self.passed is None:
            return not self.hopeless and self.bound <= self.most
        return self.passed.n > self.bound

    @property
    def trial(self) -> int:
        """The next to try: where the logarithm of the miss, straight over that of N, is at its limit."""
        passed, failed = self.passed, self.failed
        if not self.tries:
            return int(np.clip(self.first, self.least, self.most))
        if passed is None:
            assert failed is not None, "what does not hold fails or is too close to tell"
            far = min(math.exp((max(failed.by, 0.0) + AIM) / -self._slope), FURTHEST)
            return int(np.clip(math.ceil(failed.n * far), failed.n + 1, self.most))
        if failed is None:
            near = passed.n * math.exp((passed.by - AIM) / -self._slope)  # past it: a bracket has two ends
            return int(np.clip(math.ceil(near), self.least, passed.n - 1))
        return int(np.clip(self._between(failed, passed), failed.n + 1, passed.n - 1))

    def after(self, n: int, by: float, reading: Held) -> "Bracket":
        """After one more trial; of the same number the last counts."""
        others = tuple(each for each in self.tries if each.n != n)
        return replace(self, tries=(*others, Tried(n, by, reading)))

    @property
    def _slope(self) -> float:
        """Of the logarithm of the miss over that of N, by the two tries that are nearest to the limit."""
        nearest = sorted(self.tries, key=lambda each: abs(each.by))[:2]
        if len(nearest) < 2:
            return -FALLS
        low, high = sorted(nearest, key=lambda each: each.n)
        return float(np.clip((high.by - low.by) / math.log(high.n / low.n), *SLOPES))

    def _between(self, failed: Tried, passed: Tried) -> int:
        gap = math.log(passed.n / failed.n)
        if len(self.tries) % 3 == 2:  # halves what is left, whatever the misses say
            return round(failed.n * math.exp(0.5 * gap))
        above = max(failed.by, passed.by + 1e-6)
        aim = -min(AIM, SHY * max(-passed.by, 0.0)) if above > 0 else 0.5 * (above + passed.by)
        return math.ceil(failed.n * math.exp(gap * (above - aim) / (above - passed.by)) - 1e-9)
