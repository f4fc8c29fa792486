"""What was observed of a fleet, read at the door: csv of any habit of names, or vLLM's pages of metrics.

csv       a row for the fleet, or one for each pool with a column `pool`: its number, its window in tokens, or a name
          that ends in one ("fleetopt-pool-8192"); `fleet`, `all` or nothing for the fleet. Columns by what they are
          (ttft, itl or tpot, tokens/s, power, rate), which statistic (p50, p99, mean), and their unit, in any order.
metrics   see `scrape.py`
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetopt_jax._optimize.compare import ObservedFigure
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax.calibrate.readers import Row, read_rows
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import read_bytes, shown
from fleetopt_jax.core.units import KW, MS, US
from fleetopt_jax.documents.scrape import MAX_PAGES_BYTES, is_metrics, scraped

NEED = (
    "need some of ttft_p50_ms, ttft_p99_ms, ttft_mean_ms, itl_ms, itl_p99_ms, tokens_per_s, power_kw, rate_per_s; and "
    "a column pool where a row is of one"
)
WHOLE = ("", "all", "fleet", "overall", "total")  # what a row of the fleet has as its pool
MOST = 1e12  # of any number
IN_SECONDS = {
    "ttft": (5.0, 20.0),
    "itl": (1.0, 1.0),
}  # without a unit: all below the first are s, all from the second ms
MEANS, MEDIANS, P99 = ("mean", "avg", "average"), ("p50", "median"), ("p99",)
OTHER_STATISTICS = ("min", "max", "std", "stddev", "stdev", "peak", "count", "sum", "total")
TIMES = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": MS, "millisecond": MS, "milliseconds": MS, "us": US}
WATTS = {"w": 1.0, "watt": 1.0, "watts": 1.0, "kw": KW, "kilowatt": KW, "kilowatts": KW, "mw": KW * KW}
A_SECOND, A_MINUTE = (
    ("s", "sec", "second", "seconds", "tps", "qps", "rps", "throughput"),
    ("minute", "tpm", "rpm"),
)
OF_A_RATE = {
    *("arrival", "arrivals", "rate", "request", "requests", "req", "reqs", "queries", "query", "throughput"),
    *("per", *A_SECOND, *A_MINUTE, *MEANS, "observed", "measured"),
}
NAMES = {("ttft", "mean"): "ttft_s", ("ttft", "p50"): "ttft_p50_s", ("ttft", "p99"): "ttft_p99_s"}
NAMES |= {("itl", "mean"): "itl_s", ("itl", "p99"): "itl_p99_s"}


@dataclass(frozen=True)
class ObservedFile:
    """What a file says of a fleet, and how it was read."""

    figures: tuple[ObservedFigure, ...]
    understood: tuple[str, ...]  # what was taken for what
    left_out: tuple[str, ...]  # what was not taken, and why


def load_observed(
    path: str | os.PathLike, plan: Plan, *, since: str | os.PathLike | None = None, over_s: float | None = None
) -> ObservedFile:
    """The figures in a file, of the pools of a plan; `BadInput` names what is wrong.

    Of pages of metrics, `since` is an earlier page of the same servers, from which on is counted, and `over_s` how long
    they counted [s]: without it no rates are known.
    """
    where = os.fspath(path)
    data = read_bytes(where, MAX_PAGES_BYTES)
    if is_metrics(data):
        earlier = None if since is None else (os.fspath(since), read_bytes(os.fspath(since), MAX_PAGES_BYTES))
        return ObservedFile(
            *scraped((where, data), earlier, over_s, lambda place, text: pool_of(place, text, plan), plan)
        )
    for name, given in (("--since", since), ("--over", over_s)):
        if given is not None:
            raise BadInput(name, f"{where} is no page of metrics, whose counters it is about", "leave it out")
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        raise BadInput(where, "is JSON", "need csv, or a page of vLLM's metrics in Prometheus's text format")
    return _of_csv(where, plan)


def pool_of(place: str, text: str, plan: Plan) -> int | None:
    """The pool, from 0, that a text stands for; None for the fleet."""
    if text.strip().lower() in WHOLE:
        return None
    windows = [round(window) for window in np.asarray(plan.fleet.window_tokens).tolist()]
    digits = re.fullmatch(r"(?:.*[^\d.])?(\d{1,9})", text.strip())
    number = int(digits[1]) if digits else 0
    if 1 <= number <= len(windows):
        return number - 1
    if number in windows:
        return windows.index(number)
    listed = ", ".join(map(str, windows))
    raise BadInput(
        place, f"pool = {shown(text)!r}", f"need 1 to {len(windows)}, a window of the plan ({listed}), or fleet"
    )


# --- csv --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """What a column holds: a figure, in a unit; None where its numbers must tell."""

    title: str
    figure: str
    size: float | None
    per_token: bool = False  # called TPOT


def _of_csv(where: str, plan: Plan) -> ObservedFile:
    table = read_rows(where)
    columns, left_out = _columns(where, [name for name in table.columns if name not in ("pool", "lane")])
    pool_column = next((name for name in ("pool", "lane") if name in table.columns), None)
    columns = [_sized(column, table.rows) for column in columns]
    figures, seen = [], {}
    for row in table.rows:
        pool = None if pool_column is None else pool_of(row.place, row.cells[pool_column], plan)
        if pool in seen:
            of = "the fleet" if pool is None else f"pool {pool + 1}"
            raise BadInput(row.place, f"{of} has been in {seen[pool]} before", "need one row of each")
        seen[pool] = row.place
        for column in columns:
            if row.cells[column.title]:
                value = row.number(column.title, MOST) * (column.size or 1.0)
                figures.append(ObservedFigure(column.figure, value, pool))
    if not figures:
        raise BadInput(where, "has no number in a column that is known", NEED)
    understood = tuple(f"{shown(column.title)} as {column.figure}{_unit_said(column)}" for column in columns)
    return ObservedFile(tuple(figures), understood, tuple(left_out))


def _unit_said(column: _Column) -> str:
    size = column.size or 1.0
    if column.figure.startswith(("ttft", "itl")):
        return f" in {({1.0: 's', MS: 'ms', US: 'us'})[size]}"
    return f" times {size:g}" if size != 1.0 else ""


def _columns(where: str, titles: Sequence[str]) -> tuple[list[_Column], list[str]]:
    """What is known of the columns, one of a figure, and what of those that are known is left out and why."""
    found: dict[str, _Column] = {}
    left_out = []
    for title in titles:
        column = _understood(where, title)
        if column is None:
            left_out.append(f"{shown(title)}: nothing that the laws say")
        elif column.figure not in found or (found[column.figure].per_token and not column.per_token):
            if column.figure in found:
                left_out.append(f"{shown(found[column.figure].title)}: {column.figure} is in {shown(title)}")
            found[column.figure] = column
        else:
            left_out.append(f"{shown(title)}: {column.figure} is in {shown(found[column.figure].title)}")
    if not found:
        raise BadInput(where, f"columns are {', '.join(map(shown, titles[:12])) or 'none'}", NEED)
    return list(found.values()), left_out


def _understood(where: str, title: str) -> _Column | None:
    """What a column's name says that it holds."""
    text = re.sub(r"[\s_]+", " ", title.lower().replace("µs", "us").replace("/", " per "))
    words = re.findall(r"[a-z0-9.]+", re.sub(r"per min\b", "per minute", text))
    given, a_token = set(words), {"token", "tokens", "tok"}
    first_token = {"first", "token"} <= given
    a_gap = bool({"itl", "tpot"} & given) or {"inter", "token"} <= given or {"time", "per", "token"} <= given
    if "ttft" in given or first_token or a_gap:
        kind = "ttft" if "ttft" in given or first_token else "itl"
        figure = NAMES.get((kind, _statistic(given)))
        size = next((TIMES[word] for word in words if word in TIMES), None)
        return _Column(title, figure, size, "tpot" in given or "output" in given) if figure else None
    if given & {"p50", "p90", "p95", "p99", "median", *OTHER_STATISTICS, "gpu", "gpus", "input", "prompt", "prefill"}:
        return None
    if given & a_token or given & {"tps", "tpm"} or {"output", "throughput"} <= given:
        size = _a_second(given)
        return _Column(title, "output_tok_per_s", size) if size else None
    if given & {*WATTS, "power"} and not given & {"per", "cap", "limit"}:
        if not given & WATTS.keys():
            raise BadInput(where, f"column {shown(title)!r} has no unit", "call it power_w or power_kw")
        return _Column(title, "power_w", next(WATTS[word] for word in words if word in WATTS))
    if given <= OF_A_RATE and given & {"rate", "qps", "rps", "rpm", *OF_A_RATE - {"per", *A_SECOND, *A_MINUTE, *MEANS}}:
        return _Column(title, "rate_per_s", _a_second(given) or 1.0)
    return None


def _statistic(words: set[str]) -> str:
    """Which statistic a name says: the mean where it says none; nothing that is known where it says another."""
    if words & {*OTHER_STATISTICS} or any(re.fullmatch(r"p\d+(\.\d+)?", word) for word in words - {"p50", "p99"}):
        return "another"
    return "p99" if words & {*P99} else "p50" if words & {*MEDIANS} else "mean"


def _a_second(words: set[str]) -> float | None:
    """The unit of a rate in 1/s; None where the name says none."""
    return 1.0 if words & {*A_SECOND} else 1.0 / 60.0 if words & {*A_MINUTE} else None


def _sized(column: _Column, rows: Sequence[Row]) -> _Column:
    """The column with its unit: where its name says none, by how large its numbers are."""
    if column.size is not None:
        return column
    below, above = IN_SECONDS["ttft" if column.figure.startswith("ttft") else "itl"]
    filled = [row for row in rows if row.cells[column.title]]
    values = [row.number(column.title, MOST) for row in filled]
    if all(value < below for value in values):
        return replace(column, size=1.0)
    if all(value >= above for value in values):
        return replace(column, size=MS)
    odd = next(row for row, value in zip(filled, values, strict=True) if value >= below)
    bare = column.title.replace(" ", "_")
    allowed = f"call the column {bare}_ms or {bare}_s"
    raise BadInput(odd.place, f"{column.title} = {odd.cells[column.title]} may be s or ms", allowed)
