"""What is odd about a trace that can be read: said, not refused."""

import re

import numpy as np

from fleetopt_jax.core.units import DAY_S, HOUR_S
from fleetopt_jax.workload.readers.known import Settled
from fleetopt_jax.workload.readers.records import Trace
from fleetopt_jax.workload.readers.stamps import RATES_PER_S, Arrivals

LONG_TOKENS = 1e6  # of a request; few checkpoints hold as many
LONG_SPAN_S = 60 * DAY_S
SWAPPED = 3.0  # outputs so many times longer than prompts are rare
_OUT = re.compile(r"out|compl|gener|respon|decode", re.IGNORECASE)
_IN = re.compile(r"(?:^|[\W_])in(?:$|[\W_])|input|prompt|context|request|prefill", re.IGNORECASE)


def hints(trace: Trace, settled: Settled, arrivals: Arrivals | None) -> list[str]:
    """One line for each thing that a planner should look at."""
    return [*_of_lengths(trace, settled), *(_of_time(trace, arrivals) if arrivals else [])]


def _of_lengths(trace: Trace, settled: Settled) -> list[str]:
    prompt, output = trace.prompt_tokens, trace.output_tokens
    said, n = [], len(prompt)
    if n > 1 and prompt.min() == prompt.max() and output.min() == output.max():
        said.append(f"all {n:,} rows are the same: {prompt[0]:,.0f} prompt and {output[0]:,.0f} output tokens")
    elif n > 1 and (prompt == output).all():
        said.append(f"{settled.prompt!r} and {settled.output!r} are equal in every row")
    by_name = _OUT.search(settled.prompt) and _IN.search(settled.output) and not _OUT.search(settled.output)
    means = float(np.average(prompt, weights=trace.weight)), float(np.average(output, weights=trace.weight))
    if by_name:
        said.append(f"prompts are read from {settled.prompt!r} and outputs from {settled.output!r}, as if swapped")
    elif means[1] > SWAPPED * means[0]:
        said.append(f"outputs are {means[1] / means[0]:,.3g} times as long as prompts: the columns may be swapped")
    if "total" in settled.prompt.lower():
        said.append(f"{settled.prompt!r} sounds like prompt and output together: the prompt alone is needed")
    total = prompt + output
    long = total >= LONG_TOKENS
    if long.any():
        usual = total[~long].max(initial=0)
        many = "1 request of" if long.sum() == 1 else f"{long.sum():,} requests of"
        said.append(
            f"{many} {n:,} has {total.max():,.0f} tokens, the longest other {usual:,.0f}: it decides the last pool's "
            "window, and is longer than most checkpoints' positions"
        )
    return said


def _step(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _of_time(trace: Trace, arrivals: Arrivals) -> list[str]:
    span_s, n = float(arrivals.seconds.max(initial=0.0)), trace.n_requests
    said = [arrivals.doubt] if arrivals.doubt else []
    if arrivals.unit == "day":
        days = (span_s + trace.bucket_s) / DAY_S
        over = "one day" if days == 1 else f"{days:,.0f} whole days"
        said.append(
            f"the stamps are dates without a time of day: {n / days:,.4g} requests a day over {over}, and no rate of "
            "any hour"
        )
    elif span_s == 0 and n > 1:
        said.append("all time stamps are the same: they tell no rate")
    if (grid := arrivals.grid) and not trace.bucket_s:
        said.append(
            f"the stamps lie {_step(grid.step_s)} apart and {grid.per_step:,.3g} requests share one: they are taken as "
            "rounded, and their requests as spread over that step at random"
        )
    span_s += trace.bucket_s
    if span_s > LONG_SPAN_S:
        said.append(
            f"the stamps span {span_s / DAY_S:,.0f} days: the rate is the mean over all of them, nights included"
        )
    if span_s > 0 and n > 1 and not RATES_PER_S[0] <= n / span_s <= RATES_PER_S[1]:
        rate = f"{3600 * n / span_s:.3g} requests an hour" if n / span_s < 1 else f"{n / span_s:,.3g} requests/s"
        said.append(f"{rate} is an odd rate: is the time unit {arrivals.unit} right? (--time-unit)")
    if 0 < span_s < HOUR_S and trace.weight is not None:
        said.append(f"the sums cover {span_s:.0f} s only")
    return said
