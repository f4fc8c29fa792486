"""What the laws of latency are off by, engines apart: the one place that says so, for whoever draws their errors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LawErrors:
    """Standard deviations of ln(simulated / law) of one pool's latencies [-]; what the law is off by on average is in
    them."""

    ttft_p99_s: float
    itl_s: float  # mean
    source: str


LAW_ERRORS = LawErrors(
    ttft_p99_s=0.19,
    itl_s=0.14,
    source="experiments/agreement.py: 28 plans of the newest vLLM up to 85 % load, requests to the shortest queue",
)
