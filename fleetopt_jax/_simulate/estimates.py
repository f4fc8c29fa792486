"""Means of independent replications, their confidence intervals, and how many replications would settle a question."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from jax.scipy.special import betainc

CONFIDENCE = 0.95
Z = 1.959964  # of the normal distribution at that confidence
MOST_SUFFICING = 10_000  # replications; what would take more is as good as never settled
SHARES = (
    "slo_attainment",
    "rejected_frac",
    "kv_occupancy",
    "busy_frac",
    "prefill_frac",
    "prefix_hit_frac",
)  # from 0 to 1


@dataclass(frozen=True)
class Estimate:
    """A mean over replications and its 95 % confidence interval; infinite for one replication."""

    mean: float
    low: float
    high: float


def estimate(values: np.ndarray, *, share: bool = False, n_requests: int = 0) -> Estimate:
    """Mean and 95 % interval of independent replications, within what the quantity can be.

    A quantity >= 0 has its interval on the log scale, mean exp(+-t s / (mean sqrt(n))), and a `share` on that of the
    logit, logit(mean) +- t s / (mean (1 - mean) sqrt(n)): Student's t times the standard error of the transformed mean
    by the delta method (Agresti, Categorical Data Analysis, section 3.1), so that the interval is of the mean itself
    and no end passes 0 or 1. A share counted over `n_requests` has at least Wilson's interval of as many independent
    requests (J. Am. Stat. Assoc. 22, 1927): replications in which all requests were in time do not prove that all are.

    >>> estimate(np.array([0.1, 0.3])).low > 0
    True
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2 or not np.isfinite(values).all():
        return Estimate(mean, -np.inf, np.inf)
    error = student_t(n - 1) * float(np.std(values, ddof=1)) / np.sqrt(n)
    if not share:
        widen = math.exp(min(error / mean, 700.0)) if mean > 0 else 1.0
        return Estimate(mean, mean / widen, mean * widen)
    low = high = mean = min(max(mean, 0.0), 1.0)
    if 0 < mean < 1:
        at, half = _logit(mean), error / (mean * (1 - mean))
        low, high = _share(at - half), _share(at + half)
    if n_requests:
        least, most = wilson(mean, n_requests)
        low, high = min(low, least), max(high, most)
    return Estimate(mean, low, high)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was counted over n independent tries."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def half_width_frac(found: Estimate) -> float:
    """The longer side of an interval, of the mean; infinite where it has none."""
    if found.mean == 0 or not (math.isfinite(found.mean) and math.isfinite(found.high - found.low)):
        return 0.0 if found.low == found.high == 0 else math.inf
    return max(found.high - found.mean, found.mean - found.low) / found.mean


def sufficing(found: Estimate, n: int, edges: Iterable[float], *, share: bool = False) -> int | None:
    """How many replications would clear the interval of the `edges`, by the spread that n of them showed.

    Taken on the scale of the interval: the least m with t(m - 1) s / sqrt(m) <= |edge - mean|, the mean staying where
    it is. None where n < 2 showed no spread, or more than `MOST_SUFFICING` would be needed. About right: the spread of
    few replications is itself a guess.
    """
    if n < 2 or not math.isfinite(found.high) or not math.isfinite(found.low):
        return None
    if share and found.mean in (0.0, 1.0):  # only Wilson's interval is open here: z^2 / n is its odds
        odds = found.low / (1 - found.low) if found.mean == 1.0 else (1 - found.high) / found.high
        wanted = max((edge / (1 - edge) if found.mean == 1.0 else (1 - edge) / edge) for edge in edges)
        return _few(math.ceil(n * wanted / odds)) if odds > 0 else None
    scaled = _logit if share else _log
    at = scaled(found.mean)
    half = max(scaled(found.high) - at, at - scaled(found.low))
    away = min(abs(scaled(edge) - at) for edge in edges)
    if not (half > 0 and away > 0 and math.isfinite(half)):
        return None
    deviation = half * math.sqrt(n) / student_t(n - 1)
    low, high = n, MOST_SUFFICING + 1
    while low < high:  # the half width falls with m
        m = (low + high) // 2
        low, high = (low, m) if student_t(m - 1) * deviation / math.sqrt(m) <= away else (m + 1, high)
    return _few(low)


def _few(n: int) -> int | None:
    return n if n <= MOST_SUFFICING else None


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _logit(share: float) -> float:
    return math.inf if share >= 1 else -math.inf if share <= 0 else math.log(share / (1 - share))


def _share(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


@cache
def student_t(freedom: int) -> float:
    """The t that |T| exceeds with probability 5 %: I_{v / (v + t^2)}(v / 2, 1 / 2) = 0.05, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2.0
        outside = float(betainc(freedom / 2.0, 0.5, freedom / (freedom + middle**2)))
        low, high = (middle, high) if outside > 1.0 - CONFIDENCE else (low, middle)
    return high
