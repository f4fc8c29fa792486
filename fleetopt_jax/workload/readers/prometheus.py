"""Prometheus histograms of prompt and output tokens: what a server's /metrics page or a PromQL query says.

A histogram is two marginals, not requests: how they are joined is an assumption (`workload/histogram.py`). Counters run
since the server started; with two samples of them, their difference is used and tells the rate.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import shown
from fleetopt_jax.core.units import MS
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.containers import whole
from fleetopt_jax.workload.readers.records import Histogram, Histograms, Layout, Understood

PAIRS = {  # engine: (prompt, output)
    "vLLM": ("vllm:request_prompt_tokens", "vllm:request_generation_tokens"),
    "SGLang": ("sglang:prompt_tokens_histogram", "sglang:generation_tokens_histogram"),
    "TGI": ("tgi_request_input_length", "tgi_request_generated_tokens"),
    "Dynamo": ("dynamo_frontend_input_sequence_tokens", "dynamo_frontend_output_sequence_tokens"),
}
QUERY = '{__name__=~"vllm:request_(prompt|generation)_tokens_(bucket|sum|count)"}'
MAX_METRICS_BYTES = limits.MAX_CDF_BYTES
MOST_BUCKETS = 1000
DIFFERENT = 0.02  # share by which the two counts may differ unsaid
_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+(-?\d+))?\s*$")
_LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"')

Sample = tuple[float, float]  # (time [s], value)


@dataclass
class _Counters:
    """Of one histogram: each series' samples in order of time, by its other labels and its bucket."""

    buckets: dict[tuple[str, float], list[Sample]] = field(default_factory=lambda: defaultdict(list))
    sums: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    models: set[str] = field(default_factory=set)


def parse_metrics(where: str, stream: BinaryIO, layout: Layout | None) -> Histograms:
    """The histograms in a page of metrics, in Prometheus's text format."""
    text = whole(where, stream, MAX_METRICS_BYTES).decode("utf-8", errors="replace")
    found: dict[str, _Counters] = defaultdict(_Counters)
    for name, labels, sample in samples_in(text):
        _count(where, found, name, labels, sample)
    return _histograms(where, found, "Prometheus metrics")


def samples_in(text: str) -> Iterator[tuple[str, dict[str, str], tuple[float, str]]]:
    """Every (name, labels, (time [s], value as it is written)) of a page in Prometheus's text format; 0 s where no time
    is said."""
    for line in text.splitlines():
        if not line.startswith("#") and (sample := _LINE.match(line)):
            name, labels, value, stamp = sample.groups()
            yield name, dict(_LABEL.findall(labels or "")), (float(stamp or 0) * MS, value)


def is_promql(document: dict[str, Any]) -> bool:
    """Whether a JSON document is the answer to a PromQL query."""
    data = document.get("data")
    return isinstance(data, dict) and "resultType" in data and isinstance(data.get("result"), list)


def parse_promql(where: str, document: dict[str, Any]) -> Histograms:
    """The histograms in the answer to a query, instant (vector) or over a range (matrix)."""
    found: dict[str, _Counters] = defaultdict(_Counters)
    for series in document["data"]["result"]:
        metric = series.get("metric") if isinstance(series, dict) else None
        if not isinstance(metric, dict):
            raise BadInput(where, "has a result without its labels (metric)", f"query {QUERY}")
        labels = {str(key): str(value) for key, value in metric.items()}
        name = labels.pop("__name__", "")
        samples = series.get("values") or [series.get("value")]
        for sample in samples if isinstance(samples, list) else []:
            if not isinstance(sample, list) or len(sample) != 2 or not isinstance(sample[0], (int, float)):
                raise BadInput(where, f"a sample of {name or 'a series'} is {shown(sample)}", "need [time, value]")
            _count(where, found, name, labels, (float(sample[0]), str(sample[1])))
    return _histograms(where, found, "PromQL result")


def _count(
    where: str, found: dict[str, _Counters], name: str, labels: dict[str, str], sample: tuple[float, str]
) -> None:
    base, _, part = name.rpartition("_")
    if part not in ("bucket", "sum", "count") and "le" not in labels:
        return
    base = base if part in ("bucket", "sum", "count") else name
    try:
        value, edge = float(sample[1]), float(labels.get("le", "nan"))
    except ValueError:
        raise BadInput(where, f"{name} has the value {shown(sample[1])}", "need a number") from None
    if not (math.isfinite(value) and value >= 0 and math.isfinite(sample[0])):
        raise BadInput(where, f"{name} = {shown(sample[1])}", "need a finite count")
    series = ",".join(f"{key}={labels[key]}" for key in sorted(labels) if key != "le")
    if part == "sum":
        found[base].sums[series].append((sample[0], value))
    elif not math.isnan(edge):
        found[base].buckets[series, edge].append((sample[0], value))
        found[base].models |= {labels[key] for key in ("model_name", "model") if key in labels}


def _histograms(where: str, found: dict[str, _Counters], file_format: str) -> Histograms:
    have = [name for name, counters in found.items() if counters.buckets]
    pair = next(((engine, *names) for engine, names in PAIRS.items() if set(names) <= set(have)), None)
    if pair is None:
        names = ", ".join(shown(name) or "one without a name" for name in have) or "none"
        raise BadInput(
            where,
            f"histograms are {names}",
            f"need the buckets of prompts and of outputs: save the page /metrics, or query {QUERY}",
        )
    engine, *names = pair
    (prompt, n, rate), (output, n_out, _) = (_histogram(where, name, found[name]) for name in names)
    warnings = []
    if abs(n_out - n) > DIFFERENT * n:
        warnings.append(f"{n:,.0f} prompts and {n_out:,.0f} outputs were counted: each is taken by its own shares")
    models = sorted(found[names[0]].models)
    if len(models) > 1:
        warnings.append(f"{len(models)} models are summed: {', '.join(map(shown, models[:5]))}")
    for name, histogram in zip(names, (prompt, output), strict=True):
        if histogram.mean_tokens is None:
            warnings.append(f"{name} has no _sum: lengths are taken as even within its buckets")
        if found[name].buckets and _open_share(found[name]) > 0:
            warnings.append(f"{name} counts lengths above its last bucket: they are taken to end at twice its edge")
    note = "counters between two samples" if rate else "counters since the server started, which tell no rate"
    columns = {"prompt": names[0], "output": names[1]}
    read = Understood(
        file_format=file_format,
        layout=f"{engine} histograms",
        columns=columns,
        time_note=note,
        n_rows=round(n),
        warnings=tuple(warnings),
    )
    return Histograms(prompt, output, rate, read)


def _histogram(where: str, name: str, counters: _Counters) -> tuple[Histogram, float, float | None]:
    """(histogram over all series, requests, requests per second if there are two samples)."""
    grown = {key: _growth(samples) for key, samples in counters.buckets.items()}
    edges = sorted({edge for _, edge in grown})
    if len(edges) > MOST_BUCKETS:
        raise BadInput(where, f"{name} has {len(edges)} buckets", f"need at most {MOST_BUCKETS}")
    all_series = {series for series, _ in grown}
    cumulative = np.zeros(len(edges))
    for i, edge in enumerate(edges):
        if any((series, edge) not in grown for series in all_series):
            raise BadInput(where, f"{name} has other buckets in some of its series", "need the same, or one series")
        cumulative[i] = sum(grown[series, edge][0] for series in all_series)
    if edges[0] < 0 or (np.diff(cumulative) < 0).any():
        raise BadInput(where, f"{name} has buckets that fall", "need cumulative counts that rise with le")
    n = float(cumulative[-1])
    if n <= 0:
        raise BadInput(where, f"{name} has counted no request", "need a server that has served some")
    bounds = [edge for edge in edges if math.isfinite(edge) and edge > 0]
    if not bounds or bounds[-1] > limits.MAX_TOKENS:
        raise BadInput(where, f"{name} has no bucket with an edge from 1 to {limits.MAX_TOKENS:.0e}", "need some")
    counts = np.diff(cumulative, prepend=0.0)
    if edges[0] <= 0:  # le="0": those without tokens go to the first bucket above
        counts[1] += counts[0]
        counts = counts[1:]
    if edges[-1] == math.inf:
        bounds.append(2 * bounds[-1])
    sums = [_growth(samples)[0] for samples in counters.sums.values()]
    span_s = max(seconds for _, seconds in grown.values())
    mean = sum(sums) / n if sums and sum(sums) > 0 else None
    return Histogram(np.array([0.0, *bounds]), counts, mean), n, n / span_s if span_s > 0 else None


def _growth(samples: list[Sample]) -> tuple[float, float]:
    """(growth of a counter from its first to its last sample, seconds between them); all of it if there is one."""
    first_s, last_s = min(samples)[0], max(samples)[0]
    if last_s == first_s:
        return samples[-1][1], 0.0
    in_order = [value for _, value in sorted(samples)]
    steps = (now - before if now >= before else now for before, now in itertools.pairwise(in_order))
    return float(sum(steps)), last_s - first_s


def _open_share(counters: _Counters) -> float:
    """Requests beyond the last finite edge."""
    edges = sorted({edge for _, edge in counters.buckets})
    if len(edges) < 2 or math.isfinite(edges[-1]):
        return 0.0
    last, before = (
        sum(_growth(samples)[0] for (_, at), samples in counters.buckets.items() if at == edge)
        for edge in (edges[-1], edges[-2])
    )
    return last - before
