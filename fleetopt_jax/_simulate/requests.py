"""Requests as they come to the fleet: how long they are, and when they arrive."""

import math
from dataclasses import dataclass, replace

import numpy as np

from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.workload.atoms import Workload
from fleetopt_jax.workload.blocks import Blocks
from fleetopt_jax.workload.conversations import sticky_tokens
from fleetopt_jax.workload.readers import Trace


@dataclass(frozen=True)
class Requests:
    """R replications of M requests in order of arrival; numpy arrays [R, M]. Tokens are whole."""

    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    blocks: Blocks | None = None  # of all prompts, row after row, where they are known
    routed_tokens: np.ndarray | None = None  # what sticky sessions route by, where that is known

    def rows(self, first: int, n: int) -> "Requests":
        """Some of the replications."""
        columns = self.arrival_s, self.prompt_tokens, self.output_tokens
        arrival_s, prompt, output = (x[first : first + n] for x in columns)
        m, last = self.arrival_s.shape[1], first + len(arrival_s)
        blocks = None if self.blocks is None else self.blocks.of(np.arange(first * m, last * m))
        routed = None if self.routed_tokens is None else self.routed_tokens[first : first + n]
        return Requests(arrival_s, prompt, output, blocks, routed)


def draw_requests(
    workload: Workload, assumptions: Assumptions, n_requests: int, n_replications: int, seed: int, first: int = 0
) -> Requests:
    """Requests of the workload's kinds in random order, arriving with its rate and burstiness.

    Every replication has the workload's own mix and mean rate (stratified draws, gaps of the asked mean): what is
    estimated is the fleet under this load, not the load.

    The mean of a cell of a compressed trace is not whole: it is rounded up with the probability that keeps the mean.
    Every replication has its own stream of numbers, so that more of them do not change the first; `first` is the number
    of the first one that is drawn.
    """
    split = assumptions.lengths.split(workload, assumptions.output_share, whole=assumptions.whole)
    prompt, output = (np.asarray(x) for x in split)
    weight = np.cumsum(np.asarray(workload.weight))
    rows = []
    for r in range(first, first + n_replications):
        rng = np.random.default_rng([seed, r])
        share = rng.permutation((np.arange(n_requests) + rng.random(n_requests)) / n_requests)
        atom = np.searchsorted(weight, share * weight[-1], side="right").clip(max=len(weight) - 1)
        lengths = (
            np.floor(values[atom] + rng.random(n_requests) * (values[atom] % 1 > 0)) for values in (prompt, output)
        )
        prompt_r, output_r = (np.maximum(values, 1).astype(np.int64) for values in lengths)
        gaps = draw_gaps(rng, n_requests, float(workload.arrival_scv))
        arrival_s = np.cumsum(gaps / gaps.mean()) / float(workload.arrival_rate_per_s)
        rows.append((arrival_s, prompt_r, output_r, atom))
    arrival_s, prompt, output, atom = (np.stack(column) for column in zip(*rows))
    kept = workload.routed_tokens
    return Requests(arrival_s, prompt, output, routed_tokens=None if kept is None else np.asarray(kept)[atom])


def draw_gaps(rng: np.random.Generator, n: int, scv: float) -> np.ndarray:
    """Gaps of mean 1 between the arrivals of a gamma renewal process of squared CV `scv`; Poisson where it is 1."""
    if scv == 0:
        return np.ones(n)
    return rng.gamma(1.0 / scv, scv, n)


def poisson_arrivals(requests: Requests, rate_per_s: float, seed: int) -> Requests:
    """The same requests in the same order, arriving as a Poisson process of the asked rate: what is left of a trace
    without its bursts."""
    n_replications, n = requests.arrival_s.shape
    rows = []
    for r in range(n_replications):
        gaps = draw_gaps(np.random.default_rng([seed, r, 1]), n, 1.0)
        rows.append(np.cumsum(gaps / gaps.mean()) / rate_per_s)
    return replace(requests, arrival_s=np.stack(rows))


def replay_requests(
    trace: Trace, rate_per_s: float, n_requests: int, n_replications: int, *, sticky: float | None = None
) -> Requests:
    """A trace's own requests at its own time stamps, stretched to the asked mean rate.

    A replication is a stretch of the trace; they follow each other, and where the trace ends it starts again. Blocks of
    prompts come with them, and with `sticky` what sessions of that headroom are routed by.
    """
    if trace.arrival_s is None or not trace.arrival_s[-1] > 0:
        raise ValueError("need a trace with time stamps that are not all equal")
    n = len(trace.arrival_s)
    start = np.arange(n_replications)[:, None] * n_requests
    row, lap = (start + np.arange(n_requests)) % n, (start + np.arange(n_requests)) // n
    span_s = float(trace.arrival_s[-1]) * n / max(n - 1, 1)  # the last request has a gap behind it, too
    stamp_s = trace.arrival_s[row] + lap * span_s
    arrival_s = (stamp_s - stamp_s[:, :1]) * (n / span_s / rate_per_s)
    output = np.maximum(trace.output_tokens[row], 1)  # a request that is only prefilled leaves with its first token
    blocks = None if trace.blocks is None else trace.blocks.of(row.ravel())
    prompt, kept = trace.prompt_tokens, None
    if sticky is not None and trace.blocks is not None:
        longest = float((prompt + trace.output_tokens).max())
        kept = sticky_tokens(trace.blocks, prompt, trace.output_tokens, sticky, longest)[row]
    return Requests(arrival_s, prompt[row].astype(np.int64), output.astype(np.int64), blocks, kept)


def span_requests(rate_per_s: float, seconds: float) -> int:
    """How many requests come in so many seconds."""
    return math.ceil(rate_per_s * seconds)
