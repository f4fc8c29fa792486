"""What the bursts of a trace did: the same requests at its own time stamps and as a Poisson process."""

from dataclasses import dataclass

import numpy as np

from fleetopt_jax._simulate.estimates import Estimate, student_t
from fleetopt_jax._simulate.requests import Requests
from fleetopt_jax._simulate.simulate import Simulation


@dataclass(frozen=True)
class Burstiness:
    """The P99 TTFT of a trace's own arrivals beside that of Poisson arrivals of the same rate."""

    gap_scv: float  # squared coefficient of variation of the gaps that were replayed; 1 for Poisson
    trace_s: Estimate
    poisson_s: Estimate
    ratio: Estimate  # trace over Poisson, replication by replication: geometric mean


def burstiness(trace: Simulation, poisson: Simulation, requests: Requests) -> Burstiness:
    """From two simulations of one fleet whose requests have the same lengths, replication by replication, so that only
    the arrivals differ; `requests` are those of the trace."""
    gaps = np.diff(requests.arrival_s[: trace.n_replications], axis=1)
    return Burstiness(
        gap_scv=float(gaps.var() / gaps.mean() ** 2),
        trace_s=trace.metrics["ttft_p99_s"],
        poisson_s=poisson.metrics["ttft_p99_s"],
        ratio=ratio_of(np.array(trace.ttft_p99_s), np.array(poisson.ttft_p99_s)),
    )


def ratio_of(values: np.ndarray, others: np.ndarray) -> Estimate:
    """Geometric mean of the ratios of paired replications, with the 95 % interval of the mean logarithm."""
    finite = np.isfinite(values).all() and np.isfinite(others).all() and (values > 0).all() and (others > 0).all()
    if not finite:
        return Estimate(np.inf if np.isinf(values).any() and np.isfinite(others).all() else np.nan, -np.inf, np.inf)
    logs, n = np.log(values / others), len(values)
    middle = float(np.exp(logs.mean()))
    if n < 2:
        return Estimate(middle, -np.inf, np.inf)
    widen = float(np.exp(min(student_t(n - 1) * float(np.std(logs, ddof=1)) / np.sqrt(n), 700.0)))
    return Estimate(middle, middle / widen, middle * widen)
