"""vLLM's pages of metrics, in Prometheus's text format, as what was observed of a fleet.

A page is one server's, an instance. Pages of several are one file, one after another, or what a Prometheus that gathers
them says; series with a label `pool` are that pool's, others the fleet's. Counters run since a server started: with an
earlier file of the same servers, what was counted between the two is taken. Latencies need no more; requests and tokens
per second need how long that was, and every instance of the pool, or of the fleet.

A histogram tells a quantile no nearer than its bucket: the value is interpolated in it, as Prometheus does, and lies
between its edges, or those of the buckets that so few requests leave possible (90 %, binomial).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from fleetopt_jax._optimize.compare import OF_LEVEL, ObservedFigure
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import MIB, shown
from fleetopt_jax.workload.readers.prometheus import samples_in

MAX_PAGES_BYTES = 256 * MIB
TTFT = "vllm:time_to_first_token_seconds"
ITL = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")  # newer versions have the first
TOKENS, REQUESTS = "vllm:generation_tokens_total", "vllm:request_success_total"
RATES = {TOKENS: "output_tok_per_s", REQUESTS: "rate_per_s"}
FIRST_ENGINE = "0"  # of a server, whose data-parallel engines count by themselves

Named = tuple[str, bytes]  # a file's name, and what is in it
Place = int | None  # a pool from 0, or the fleet
Key = tuple[Place, str]


@dataclass
class _Pages:
    """What is counted in the pages of one file, summed over servers, by place and name."""

    buckets: dict[Key, dict[float, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    sums: dict[Key, float] = field(default_factory=lambda: defaultdict(float))  # of counters too
    servers: Counter[Place] = field(default_factory=Counter)  # by the totals of their TTFT
    time_s: float = 0.0


def is_metrics(data: bytes) -> bool:
    """Whether a file is a page of metrics."""
    return any(line.startswith((b"# TYPE ", b"# HELP ", b"vllm:")) for line in data[:100_000].splitlines())


def scraped(
    page: Named, since: Named | None, over_s: float | None, pool_of: Callable[[str, str], Place], plan: Plan
) -> tuple[tuple[ObservedFigure, ...], tuple[str, ...], tuple[str, ...]]:
    """(figures, how they were understood, what was left out) of a file of pages; `pool_of(place, label)` is a pool."""
    where, pages = page[0], _pages(*page, pool_of)
    earlier = _Pages() if since is None else _pages(*since, pool_of)
    seconds = over_s or (pages.time_s - earlier.time_s if since is not None and earlier.time_s > 0 else 0.0)
    counted = _since(where, pages, earlier)
    figures = [each for key in counted.buckets for each in _of_histogram(key, counted)]
    if not figures:
        allowed = f"need {TTFT}_bucket or {ITL[0]}_bucket, of servers that served some"
        raise BadInput(where, "has no histogram of latencies that counted a request", allowed)
    rates, left_out = _rates(counted, pages, seconds, plan)
    between = "counted since the servers started" if since is None else f"counted since {shown(since[0])}"
    n = sum(max(each.values(), default=0.0) for (_, name), each in counted.buckets.items() if name == TTFT)
    lasted = f", {seconds:,.4g} s" if seconds > 0 else ""
    understood = f"pages of vLLM's metrics, {between}{lasted}: {n:,.0f} first tokens"
    return (*figures, *rates), (understood,), tuple(left_out)


def _pages(where: str, data: bytes, pool_of: Callable[[str, str], Place]) -> _Pages:
    pages = _Pages()
    for name, labels, (time_s, text) in samples_in(data.decode("utf-8", errors="replace")):
        base, _, part = name.rpartition("_")
        if name not in RATES and (base not in (TTFT, *ITL) or part not in ("bucket", "sum")):
            continue
        value, edge = _number(where, name, text), labels.get("le", "")
        place = pool_of(where, labels.get("pool", ""))
        pages.time_s = max(pages.time_s, time_s)
        if part == "bucket":
            upper = _number(where, f"{name} le", edge, most=math.inf)
            pages.buckets[place, base][upper] += value
            is_server = base == TTFT and upper == math.inf and labels.get("engine", FIRST_ENGINE) == FIRST_ENGINE
            pages.servers[place] += is_server
        else:
            pages.sums[place, base if part == "sum" else name] += value
    return pages


def _number(where: str, name: str, text: str, most: float = 1e300) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise BadInput(where, f"{name} = {shown(text)!r}", "need a number >= 0")
    return value


def _since(where: str, pages: _Pages, earlier: _Pages) -> _Pages:
    """What was counted after an earlier file."""

    def grown(name: str, now: float, before: float) -> float:
        if now < before:
            allowed = "need an earlier page of the same servers, none restarted since"
            raise BadInput(where, f"{name} falls from {before:g} to {now:g}", allowed)
        return now - before

    counted = _Pages()
    for key, edges in pages.buckets.items():
        before = earlier.buckets.get(key, {})
        counted.buckets[key] = {edge: grown(key[1], edges[edge], before.get(edge, 0.0)) for edge in sorted(edges)}
    for key, value in pages.sums.items():
        counted.sums[key] = grown(key[1], value, earlier.sums.get(key, 0.0))
    return counted


def _of_histogram(key: Key, counted: _Pages) -> Iterator[ObservedFigure]:
    """Mean and quantiles of a latency of a place."""
    place, name = key
    edges, cumulative = np.array(list(counted.buckets[key])), np.array(list(counted.buckets[key].values()))
    n = cumulative[-1]
    if not n > 0 or (name == ITL[1] and (place, ITL[0]) in counted.buckets):
        return
    latency = "ttft" if name == TTFT else "itl"
    if (total := counted.sums.get(key, 0.0)) > 0:
        yield ObservedFigure(f"{latency}_s", total / n, place)
    for statistic, share in (("p50", 0.5), ("p99", 0.99)):
        if latency == "ttft" or statistic == "p99":
            value, between = _quantile(edges, cumulative, share)
            yield ObservedFigure(f"{latency}_{statistic}_s", value, place, between)


def _quantile(edges: np.ndarray, cumulative: np.ndarray, share: float) -> tuple[float, tuple[float, float]]:
    """A quantile [s], and what it lies between."""
    n, lower = cumulative[-1], np.concatenate([[0.0], edges[:-1]])
    spread = OF_LEVEL * math.sqrt(n * share * (1.0 - share))
    first, at, last = (
        int(np.searchsorted(cumulative, np.clip(rank, 1e-9, n)))
        for rank in (share * n - spread, share * n, share * n + spread)
    )
    below = cumulative[at - 1] if at else 0.0
    inside = (share * n - below) / (cumulative[at] - below)
    value = lower[at] if edges[at] == math.inf else lower[at] + inside * (edges[at] - lower[at])
    return float(value), (float(min(lower[first], value)), float(edges[last]))


def _rates(counted: _Pages, pages: _Pages, seconds: float, plan: Plan) -> tuple[list[ObservedFigure], list[str]]:
    """Requests and tokens per second, and why there are none."""
    instances = np.asarray(plan.fleet.n_instances)
    found, left_out = [], {}
    for (place, name), count in counted.sums.items():
        if name not in RATES or count <= 0:
            continue
        n, has = pages.servers[place], round(float(instances.sum() if place is None else instances[place]))
        of = "the fleet" if place is None else f"pool {place + 1}"
        if not seconds > 0:
            left_out[
                "how long the counters ran is not known: give --over SECONDS for requests and tokens per second"
            ] = 0
        elif n != has:
            servers = f"{n} server{'s' if n != 1 else ''}"
            left_out[f"{of} has {has} instances, the file pages of {servers}: no requests and tokens per second"] = 0
        else:
            found.append(ObservedFigure(RATES[name], count / seconds, place))
    return found, list(left_out)
