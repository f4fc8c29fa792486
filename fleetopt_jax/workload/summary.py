"""What is in a workload, in the numbers a planner asks for first."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import Trace

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
    """Means, quantiles (linear interpolation), rate = n / (last - first) and squared CV of the gaps."""
    total = trace.prompt_tokens + trace.output_tokens
    rate = scv = None
    if trace.arrival_s is not None and len(total) > 1 and trace.arrival_s[-1] > 0:
        gaps = np.diff(trace.arrival_s)
        with np.errstate(all="ignore"):
            span_rate, span_scv = len(total) / trace.arrival_s[-1], np.var(gaps) / np.mean(gaps) ** 2
        if np.isfinite(span_rate) and np.isfinite(span_scv):  # not so for stamps at the ends of float64
            rate, scv = float(span_rate), float(span_scv)
    return TraceSummary(
        n_requests=len(total),
        mean_prompt_tokens=float(trace.prompt_tokens.mean()),
        mean_output_tokens=float(trace.output_tokens.mean()),
        longest_tokens=int(total.max()),
        arrival_rate_per_s=rate,
        arrival_scv=scv,
        total_token_quantiles=weighted_quantiles(total, np.ones_like(total)),
    )


def weighted_quantiles(values: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Quantiles of weighted values; numpy's linear interpolation where the weights are equal."""
    if np.all(weight == weight[0]):
        return {str(q): float(np.quantile(values, q)) for q in QUANTILES}
    cumulative = np.cumsum(weight) / np.sum(weight)
    return {str(q): float(values[min(np.searchsorted(cumulative, q), len(values) - 1)]) for q in QUANTILES}
