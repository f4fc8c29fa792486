"""The rate by hour of a trace as JSON (SI units), a part of what `fleetopt trace` prints."""

import math
from typing import Any

from fleetopt_jax.workload.profile import RateProfile


def rates_to_json(profile: RateProfile | None) -> dict[str, Any]:
    """The bins, the busiest and the p95 one, and whether the rates differ beyond chance; nulls without a profile.

    `start_s` is on the file's own clock, since 1970 where that is a calendar; `covered_s` is less than `bin_s` where
    the trace begins or ends in a bin.
    """
    if profile is None:
        names = ("bin_s", "busiest", "p95", "p95_rate_per_s", "peak_over_mean", "rate_varies")
        return {"rate_by_hour": []} | dict.fromkeys((*names, "arrival_scv_within_bins"))
    bins = [_bin(profile, k) for k in range(len(profile.start_s))]
    return {
        "rate_by_hour": bins,
        "bin_s": profile.bin_s,
        "busiest": bins[profile.busiest],
        "p95": bins[profile.p95],
        "p95_rate_per_s": bins[profile.p95]["rate_per_s"],
        "peak_over_mean": profile.peak_over_mean,
        "rate_varies": profile.varies,
        "arrival_scv_within_bins": profile.arrival_scv,
    }


def _bin(profile: RateProfile, k: int) -> dict[str, Any]:
    prompt, output = float(profile.mean_prompt_tokens[k]), float(profile.mean_output_tokens[k])
    return {
        "start_s": float(profile.start_s[k]),
        "covered_s": float(profile.covered_s[k]),
        "whole": bool(profile.whole[k]),
        "rate_per_s": float(profile.rate_per_s[k]),
        "n_requests": int(profile.n_requests[k]),
        "mean_prompt_tokens": None if math.isnan(prompt) else prompt,
        "mean_output_tokens": None if math.isnan(output) else output,
    }
