"""Means of independent replications and their confidence intervals."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jax.scipy.special import betainc

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over replications and its 95 % confidence interval (Student's t; infinite for one replication)."""

    mean: float
    low: float
    high: float


def estimate(values: np.ndarray) -> Estimate:
    """Mean and 95 % interval of independent replications."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2 or not np.isfinite(values).all():
        return Estimate(mean, -np.inf, np.inf)
    half = student_t(n - 1) * float(np.std(values, ddof=1)) / np.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


@cache
def student_t(freedom: int) -> float:
    """The t that |T| exceeds with probability 5 %: I_{v / (v + t^2)}(v / 2, 1 / 2) = 0.05, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2.0
        outside = float(betainc(freedom / 2.0, 0.5, freedom / (freedom + middle**2)))
        low, high = (middle, high) if outside > 1.0 - CONFIDENCE else (low, middle)
    return high
