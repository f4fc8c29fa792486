"""GuideLLM reports: benchmarks[], each with metrics.NAME.successful statistics of a run."""

from typing import Any

from fleetopt_jax.calibrate.readers.rows import Record, at, said

LAYOUT = "GuideLLM"
CLOSED = ("concurrent", "synchronous", "throughput")  # strategies that replace a request as it ends


def records(document: Record) -> list[Record] | None:
    """The runs of a report; None where it is none."""
    runs = document.get("benchmarks")
    if not isinstance(runs, list) or not any(at(run, "metrics", "output_tokens_per_second") for run in runs):
        return None
    model = at(document, "args", "model") or at(document, "args", "backend_kwargs", "model")
    return [_record(run, model) for run in runs if at(run, "metrics")]


def _record(run: Any, model: str | None) -> Record:
    strategy = at(run, "config", "strategy") or at(run, "scheduler", "strategy") or at(run, "args", "strategy")
    kind = str(at(strategy, "type_") or at(strategy, "type") or "")
    streams = at(strategy, "streams") or at(strategy, "max_concurrency")
    if kind == "synchronous":
        streams = 1
    record = {
        "llm": model or at(run, "worker", "backend_model") or at(run, "request_loader", "processor"),
        "max_concurrency": streams,
        "mode": None if kind in (*CLOSED, "") else f"open loop ({kind})",
        "completed": at(run, "run_stats", "requests_made", "successful") or at(run, "request_totals", "successful"),
        "isl": _of(run, "prompt_token_count", "mean"),
        "osl": _of(run, "output_token_count", "mean"),
        "lengths_are_means": 1,
        "output_throughput": _of(run, "output_tokens_per_second", "mean"),
    }
    # Its time per output token counts the first; its inter-token latency is that of a request, without.
    for ours, theirs in (("ttft", "time_to_first_token_ms"), ("tpot", "inter_token_latency_ms")):
        record[f"mean_{ours}_ms"], record[f"median_{ours}_ms"] = _of(run, theirs, "mean"), _of(run, theirs, "median")
        record[f"p99_{ours}_ms"] = at(run, "metrics", theirs, "successful", "percentiles", "p99")
    return said(record)


def _of(run: Any, metric: str, statistic: str) -> Any:
    return at(run, "metrics", metric, "successful", statistic)
