"""What breaks first, in words: the limit, its value, and how much more traffic is carried before it breaks."""

from collections.abc import Mapping
from typing import Any

from fleetopt_jax.report.rates import per_s
from fleetopt_jax.report.words import QUANTITIES, latency, limits_said, ms, percent

HARDLY = 5e-4  # of the traffic: no more is worth a number


def more_frac(room: Mapping[str, Any], rate_per_s: float) -> float:
    """Traffic on top of a rate, as a share of it, before a limit breaks."""
    return max(0.0, room["rate_per_s"] / rate_per_s - 1.0)


def more_shown(room: Mapping[str, Any] | None, rate_per_s: float) -> str:
    """The same in a table; a dash where there is nothing to carry more of."""
    if not room or not rate_per_s:
        return "-"
    more = more_frac(room, rate_per_s)
    return percent(more, 1) if more < 1.0 else f"{100.0 * more:,.0f} %"


def more_said(room: Mapping[str, Any], rate_per_s: float) -> str:
    """'3.1 % more requests (61.9 a second)', '4.3 times its requests (258 a second)'."""
    more = more_frac(room, rate_per_s)
    if more < HARDLY:
        return "no more requests"
    if more >= 1.0:
        return f"{1.0 + more:,.3g} times its requests ({per_s(room['rate_per_s'])} a second)"
    return f"{percent(more, 1)} more requests ({per_s(room['rate_per_s'])} a second)"


def limit_said(room: Mapping[str, Any], value: float | None, slo: Mapping[str, Any], of: str = "") -> str:
    """'P99 TTFT 486 ms of at most 500 ms', `of` a pool."""
    limit = room["limit"]
    if limit == "utilization":
        return f"load{of} {percent(value, 1)} of at most {percent(slo['max_utilization'], 1)}"
    if limit == "ttft_p99_s" and slo["ttft_s_per_token"]:
        return f"P99 TTFT{of} {latency(value)}, whose limit grows with the prompt ({limits_said(slo)})"
    return f"{QUANTITIES[limit].title}{of} {latency(value)} of at most {ms(slo[limit])}"
