"""What is in a workload, in the numbers a planner asks for first."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import LongTrace, Trace

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class TraceSummary:
    """Of the requests themselves, before any compression. Rate and SCV are None without time stamps."""

    n_requests: int | None  # None for a CDF
    mean_prompt_tokens: float
    mean_output_tokens: float
    longest_tokens: int
    arrival_rate_per_s: float | None
    arrival_scv: float | None
    total_token_quantiles: dict[str, float]


def summarize(trace: "Trace") -> TraceSummary:
    """Means, quantiles (linear interpolation), rate = n / (last - first) and squared CV of the gaps.

    Where a stamp stands for a stretch of time (an hour of sums, a day of dates alone), the last stretch counts as well,
    and the gaps are not known.
    """
    total = trace.prompt_tokens + trace.output_tokens
    weight = np.ones_like(total) if trace.weight is None else trace.weight
    n, rate, scv = trace.n_requests, None, None
    span_s = 0.0 if trace.arrival_s is None else float(trace.arrival_s[-1]) + trace.bucket_s
    if trace.arrival_s is not None and n > 1 and span_s > 0:
        with np.errstate(all="ignore"):
            span_rate = n / span_s
            gaps = np.diff(trace.arrival_s)
            span_scv = 1.0 if trace.bucket_s else np.var(gaps) / np.mean(gaps) ** 2
        if np.isfinite(span_rate) and np.isfinite(span_scv):  # not so for stamps at the ends of float64
            rate, scv = float(span_rate), None if trace.bucket_s else float(span_scv)
    return TraceSummary(
        n_requests=n,
        mean_prompt_tokens=float(np.average(trace.prompt_tokens, weights=weight)),
        mean_output_tokens=float(np.average(trace.output_tokens, weights=weight)),
        longest_tokens=math.ceil(total.max()),
        arrival_rate_per_s=rate,
        arrival_scv=scv,
        total_token_quantiles=weighted_quantiles(total, weight),
    )


def summarize_long(trace: "LongTrace") -> TraceSummary:
    """The same of requests that were counted as they passed; quantiles are off by a cell's width at most."""
    n, clock, total = trace.n_requests, trace.clock, trace.prompt_tokens + trace.output_tokens
    scv = clock.scv if clock else None
    return TraceSummary(
        n_requests=n,
        mean_prompt_tokens=float(np.average(trace.prompt_tokens, weights=trace.weight)),
        mean_output_tokens=float(np.average(trace.output_tokens, weights=trace.weight)),
        longest_tokens=math.ceil(trace.longest_tokens),
        arrival_rate_per_s=None if clock is None or scv is None else clock.n / clock.last_s,
        arrival_scv=scv,
        total_token_quantiles=_counted_quantiles(total, trace.weight),
    )


def _counted_quantiles(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """numpy's quantiles, by linear interpolation, of values that are there so many times."""
    order = np.argsort(values, kind="stable")
    values, below = values[order], np.cumsum(counts[order])
    found = {}
    for q in QUANTILES:
        rank = q * (below[-1] - 1)
        low, high = (values[np.searchsorted(below, k, side="right")] for k in (np.floor(rank), np.ceil(rank)))
        found[str(q)] = float(low + (high - low) * (rank - np.floor(rank)))
    return found


def weighted_quantiles(values: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Quantiles of weighted values; numpy's linear interpolation where the weights are equal."""
    if np.all(weight == weight[0]):
        return {str(q): float(np.quantile(values, q)) for q in QUANTILES}
    order = np.argsort(values, kind="stable")
    values, cumulative = values[order], np.cumsum(weight[order]) / np.sum(weight)
    return {str(q): float(values[min(np.searchsorted(cumulative, q), len(values) - 1)]) for q in QUANTILES}
