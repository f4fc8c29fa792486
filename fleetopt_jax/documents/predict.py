"""`fleetopt predict` as JSON: each point as predicted, beside what was measured, and how far the two are apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fleetopt_jax._optimize import engine_errors
from fleetopt_jax.calibrate.predict import Prediction, Sigmas, predicted
from fleetopt_jax.catalog.engines import EngineEntry, engine_entry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.laws.closed_loop import Benchmark

COMPARED = ("ttft_s", "tpot_s", "output_tok_per_s", "power_w")
MEDIANS = {"ttft_s": "ttft_median_s", "tpot_s": "tpot_median_s"}  # compared where a file has no mean
GROUPS = {"by_gpu": "gpu", "by_llm": "llm", "by_serving": "serving"}


@dataclass(frozen=True)
class Case:
    """A point to predict, and what was measured of it, if anything."""

    entry: EngineEntry
    benchmark: Benchmark
    row: int | None = None  # of the file
    measured: Mapping[str, float] = field(default_factory=dict)


def predict(spec: EngineSpec, benchmarks: Sequence[Benchmark]) -> list[Prediction | None]:
    """What closed-loop benchmarks of one instance would show: latencies [s], tokens per second and joule, watts, each
    with the 90 % interval of the engine's errors. None for one whose longest request the KV cache does not hold.

    >>> (seen,) = fo.predict(fo.EngineSpec("h100", tp=4, precision="fp8"), [fo.Benchmark(1000, 100, 8, 80)])
    >>> low, high = seen.intervals["tpot_s"]
    >>> low < seen.tpot_s < high
    True
    """
    errors = engine_errors.errors_of(spec)
    sigmas = Sigmas(float(errors.step), float(errors.prefill), float(errors.power))
    return predicted(engine_entry(spec).engine, sigmas, benchmarks)


def predict_to_json(
    cases: Sequence[Case], predictions: Sequence[Prediction | None], skipped: Sequence[tuple[int | None, str]]
) -> dict[str, Any]:
    """The points in their order, the rows that cannot be predicted with why, and the errors of those measured."""
    points = [_point(case, found) for case, found in zip(cases, predictions, strict=True) if found is not None]
    unfit = [(case.row, TOO_LONG) for case, found in zip(cases, predictions, strict=True) if found is None]
    left_out = sorted((*skipped, *unfit), key=lambda each: -1 if each[0] is None else each[0])
    return {
        "points": points,
        "skipped": [{"row": row, "why": why} for row, why in left_out],
        "errors": errors_of(points) if any(point["measured"] for point in points) else {},
    }


TOO_LONG = "the KV cache does not hold one request"


def _point(case: Case, found: Prediction) -> dict[str, Any]:
    spec, benchmark = case.entry.spec, case.benchmark
    return {
        "row": case.row,
        "gpu": spec.gpu_name,
        "llm": spec.llm_name,
        **vars(spec.split),
        "precision": spec.precision,
        "serving": spec.serving,
        "isl": benchmark.prompt_tokens,
        "osl": benchmark.output_tokens,
        "length_spread": benchmark.length_spread,
        "concurrency": benchmark.concurrency,
        "n_requests": benchmark.n_requests,
        "ttft_s": found.ttft_s,
        "ttft_median_s": found.ttft_median_s,
        "ttft_p99_s": found.ttft_p99_s,
        "tpot_s": found.tpot_s,
        "tpot_median_s": found.tpot_median_s,
        "output_tok_per_s": found.output_tok_per_s,
        "output_tok_per_s_per_gpu": found.output_tok_per_s / spec.split.n_gpus,
        "power_w": found.power_w,
        "power_w_per_gpu": found.power_w / spec.split.n_gpus,
        "tok_per_j": found.tok_per_j,
        "j_per_request": found.j_per_request,
        "intervals": {name: list(ends) for name, ends in found.intervals.items()},
        "quality": case.entry.quality,
        "n_preempted": found.n_preempted,
        "measured": dict(case.measured) or None,
    }


def errors_of(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """|predicted / measured - 1|, its mean and median: of all, by GPU, by LLM, by serving engine, and by all three."""
    measured = [point for point in points if point["measured"]]

    def by(key: Callable[[Mapping[str, Any]], Any]) -> dict[Any, dict[str, Any]]:
        groups: dict[Any, list[Mapping[str, Any]]] = {}
        for point in measured:
            groups.setdefault(key(point), []).append(point)
        return {name: _errors(of) for name, of in sorted(groups.items())}

    configurations = by(lambda point: tuple(point[name] for name in GROUPS.values()))
    return {
        "all": _errors(measured),
        **{name: by(lambda point, key=key: point[key]) for name, key in GROUPS.items()},
        "groups": [dict(zip(GROUPS.values(), names)) | errors for names, errors in configurations.items()],
    }


def _errors(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"n": len(points)}
    for name in COMPARED:
        pairs = [pair for point in points if (pair := compared(point, name))]
        if pairs:
            off = np.array([predicted / measured - 1.0 for predicted, measured in pairs])
            found[name] = {
                "n": len(pairs),
                "mean": float(np.abs(off).mean()),
                "median": float(np.median(np.abs(off))),
                "bias": float(np.median(off)),
            }
    return found


def compared(point: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """(predicted, measured) of one quantity: means, or medians where no mean was measured."""
    seen = point["measured"] or {}
    kind = name if name in seen else MEDIANS.get(name, name)
    return (point[kind], seen[kind]) if kind in seen else None
