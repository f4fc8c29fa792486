"""aiperf and genai-perf: `profile_export_aiperf.json`, statistics of a run as objects with a unit and an average."""

from collections.abc import Iterator
from typing import Any

from fleetopt_jax.calibrate.readers.rows import Record, at, said
from fleetopt_jax.core.units import MS

LAYOUT = "aiperf"
TO_MS = {"ms": 1.0, "s": 1.0 / MS, "sec": 1.0 / MS, "seconds": 1.0 / MS, "us": MS, "ns": MS * MS}


def records(document: Record) -> list[Record] | None:
    """One run; None where it is no such export."""
    if at(document, "output_token_throughput", "avg") is None or at(document, "time_to_first_token", "avg") is None:
        return None
    gpus = list(_gpus(document))
    config = document.get("input_config") or {}
    models = at(config, "endpoint", "model_names") or [
        item.get("name") for item in at(config, "models", "items") or [] if isinstance(item, dict)
    ]
    watts = [w for gpu in gpus if isinstance(w := at(gpu, "metrics", "gpu_power_usage", "avg"), (int, float))]
    streams = at(config, "loadgen", "concurrency") or at(config, "perf_analyzer", "stimulus", "concurrency")
    record = {
        "llm": models[0] if isinstance(models, list) and models else None,
        "gpu": gpus[0].get("gpu_name") if gpus else None,
        "tp": len(gpus) or None,
        "max_concurrency": streams,
        "completed": at(document, "request_count", "avg"),
        "isl": at(document, "input_sequence_length", "avg"),
        "osl": at(document, "output_sequence_length", "avg"),
        "lengths_are_means": 1,
        "output_throughput": at(document, "output_token_throughput", "avg"),
        "power_w": sum(watts) if watts and len(watts) == len(gpus) else None,
    }
    # An inter-token latency of aiperf is that of a request, its mean: the time per output token of others.
    for ours, theirs in (("ttft", "time_to_first_token"), ("tpot", "inter_token_latency")):
        unit = TO_MS.get(str(at(document, theirs, "unit") or "ms").lower())
        for statistic, name in (("avg", "mean"), ("p50", "median"), ("p99", "p99")):
            value = at(document, theirs, statistic)
            record[f"{name}_{ours}_ms"] = value * unit if unit and isinstance(value, (int, float)) else None
    return [said(record)]


def _gpus(document: Record) -> Iterator[Record]:
    """Every GPU that telemetry saw."""
    endpoints: Any = at(document, "telemetry_data", "endpoints")
    for endpoint in endpoints.values() if isinstance(endpoints, dict) else ():
        gpus = at(endpoint, "gpus")
        yield from (gpu for gpu in gpus.values() if isinstance(gpu, dict)) if isinstance(gpus, dict) else ()
