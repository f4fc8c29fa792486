"""Measured points of closed-loop benchmarks: what served what, under which load, and what was seen.

Columns, the first that says anything; the layouts of `readers/` have them, and so may a csv of one's own:

    what    gpu | gpu_model | hw | system; llm | model_id | model_path | model; tp | tp_size | tensor_parallel_size |
            num_gpus | n_gpus; precision | weight_precision; serving | backend | framework
    load    isl | input_len | random_input_len; osl | output_len | random_output_len | avg_output_len_tokens, or
            total_input_tokens and total_output_tokens over completed; max_concurrency | concurrency | conc |
            max_num_seqs | batch; num_prompts | num_requests | completed
    seen    mean_, median_ and p99_ of ttft and tpot, in ms (with _ms) or s; ttft_s, tpot_s, silicon_ttft_ms,
            silicon_tpot_ms; output_throughput | output_tokens_per_s, or output_tput_per_gpu; power_w | watts |
            avg_power_total_w of all GPUs, or power_w_per_gpu | avg_power_per_gpu_w
    how     mode, pp_size, attention_dp_size | dp_attention, moe_ep_size | ep: what no law is for is left out, with why

Nominal lengths are those a benchmark asks for, drawn from a share of them up. Of a run that gives its totals or means,
the nominal ones are those with these means; where both means are whole numbers, all requests are taken to be alike.
That matters: requests of one length go in step, and their prompts wait for each other.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fleetopt_jax.calibrate.names import (
    gpu_name,
    llm_name,
    precision_name,
    precision_of_checkpoint,
    serving_name,
)
from fleetopt_jax.calibrate.readers import Row, read_rows
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import MS
from fleetopt_jax.laws.closed_loop import LENGTH_SPREAD, REQUESTS_PER_SEQUENCE, Benchmark

GPU = ("gpu", "gpu_model", "hw", "system")
LLM = ("llm", "model_id", "model_path", "model")
TP = ("tp", "tp_size", "tensor_parallel_size", "num_gpus", "n_gpus")
PRECISION = ("precision", "weight_precision")
SERVING = ("serving", "backend", "framework")
VERSION = ("serving_version", "backend_version", "version")
CONCURRENCY = ("max_concurrency", "concurrency", "conc", "max_num_seqs", "batch")
REQUESTS = ("num_prompts", "num_requests", "completed")
PROMPT = ("isl", "input_len", "random_input_len")
OUTPUT = ("osl", "output_len", "random_output_len")
MEAN_OUTPUT = "avg_output_len_tokens"
TOTALS = ("total_input_tokens", "total_output_tokens", "completed")  # of a run
NOT_NOMINAL = "lengths_are_means"  # a mark of readers: isl and osl are what a run had
PER_GPU = ("output_tput_per_gpu", "power_w_per_gpu", "avg_power_per_gpu_w")
SEEN: Mapping[str, Mapping[str, float]] = {  # what: column and its unit in SI
    "ttft_s": {"mean_ttft_ms": MS, "silicon_ttft_ms": MS, "mean_ttft": 1.0, "ttft_ms": MS, "ttft_s": 1.0},
    "ttft_median_s": {"median_ttft_ms": MS, "median_ttft": 1.0},
    "ttft_p99_s": {"p99_ttft_ms": MS, "p99_ttft": 1.0},
    "tpot_s": {"mean_tpot_ms": MS, "silicon_tpot_ms": MS, "mean_tpot": 1.0, "tpot_ms": MS, "tpot_s": 1.0},
    "tpot_median_s": {"median_tpot_ms": MS, "median_tpot": 1.0},
    "output_tok_per_s": {"output_throughput": 1.0, "output_tokens_per_s": 1.0, "output_tput_per_gpu": 1.0},
    "power_w": dict.fromkeys(("power_w", "watts", "avg_power_total_w", *PER_GPU[1:]), 1.0),
}
# What no law is for yet: the columns that say it, in words.
PARALLEL = {
    "pipeline parallelism": ("pp_size", "pp"),
    "data-parallel attention": ("attention_dp_size", "dp_attention", "attention_dp_launched", "dp_size"),
    "expert parallelism": ("moe_ep_size", "ep", "ep_size", "moe_ep_launched"),
}
OFF = ("", "0", "1", "false", "none", "off", "no", "agg", "aggregated")
MOST = 1e9


@dataclass(frozen=True)
class Point:
    """One measured point. Names are the catalog's, None where nobody says; `why` it cannot be predicted, or nothing."""

    row: int  # of the file's data rows, from 0
    gpu: str | None = None
    llm: str | None = None
    tp: int | None = None
    precision: str | None = None
    serving: str | None = None
    version: str | None = None
    isl: float | None = None  # nominal, or the run's mean
    osl: float | None = None
    nominal: bool = True
    concurrency: int | None = None
    n_requests: int | None = None
    measured: Mapping[str, float] = field(default_factory=dict)  # by the names of `SEEN`, SI units, of the instance
    per_gpu: Mapping[str, float] = field(default_factory=dict)  # those that the row has of one GPU
    why: str = ""
    parallel: str = ""  # parallelism that no law is for, if any

    def seen(self, tp: int) -> dict[str, float]:
        """What was measured of an instance of `tp` GPUs."""
        return {**self.measured, **{name: tp * value for name, value in self.per_gpu.items()}}


@dataclass(frozen=True)
class Points:
    """All points of a file, in its order."""

    source: str
    layout: str
    points: tuple[Point, ...]


def read_points(path: str | os.PathLike) -> Points:
    """The points of a file or folder that `readers` know. `BadInput` where a file is none of theirs, or a number that
    is there is none; a row that cannot be predicted says why."""
    table = read_rows(path)
    if not table.rows:
        raise BadInput(table.source, "no rows of measurements")
    if not any(name in table.columns for name in CONCURRENCY):
        listed = ", ".join(table.columns[:12])
        raise BadInput(table.source, f"columns are {listed}", f"need {' | '.join(CONCURRENCY)}")
    return Points(table.source, table.layout, points_of(table.rows))


def points_of(rows: Sequence[Row]) -> tuple[Point, ...]:
    """The points of rows, numbered from 0."""
    return tuple(_point(i, row) for i, row in enumerate(rows))


def _point(i: int, row: Row) -> Point:
    parallel = _parallel(row)
    why = served_otherwise(row) or (f"{parallel} has no law yet" if parallel else "")
    tp = None if row.has(TP) is None else row.count(row.has(TP) or "")
    llm_text = row.text(LLM)
    llm = llm_name(llm_text) if llm_text else None
    if llm_text and llm is None:
        why = why or f"unknown LLM {llm_text}"
    prompt, output, nominal = _lengths(row)
    concurrency = row.has(CONCURRENCY)
    requests = row.has(REQUESTS)
    serving = row.text(SERVING)
    return Point(
        row=i,
        gpu=gpu_name(row.text(GPU)) if row.has(GPU) else None,
        llm=llm or llm_text or None,
        tp=tp,
        precision=_precision(row, llm or "", llm_text),
        serving=serving_name(serving) if serving else None,
        version=row.text(VERSION) or None,
        isl=prompt,
        osl=output,
        nominal=nominal,
        concurrency=math.ceil(row.number(concurrency, 1e5)) if concurrency else None,
        n_requests=row.count(requests, 10**6) if requests else None,
        measured=_measured(row, per_gpu=False),
        per_gpu=_measured(row, per_gpu=True),
        why=why or _unsaid(row),
        parallel=parallel,
    )


def served_otherwise(row: Row) -> str:
    """How a row was served, where not by instances of one kind, token by token; or nothing."""
    if row.cells.get("flag_multimodal", "0") not in ("0", "False", "false"):
        return "images or video"
    mode = row.text(("mode", "disagg", "is_multinode", "disaggregated")).lower()
    if mode not in OFF:
        return "disaggregated" if mode in ("disagg", "disaggregated", "true") else f"served otherwise: {mode}"
    if row.text(("mtp", "spec_decoding", "speculative")).lower() not in OFF:
        return "speculative decoding"
    return ""


def _parallel(row: Row) -> str:
    """The parallelism of a row that no law is for, or nothing."""
    return next((words for words, names in PARALLEL.items() if row.text(names).lower() not in OFF), "")


def _unsaid(row: Row) -> str:
    """A column of the precision that says nothing: it may be any."""
    there = [name for name in PRECISION if name in row.cells]
    return "the precision is not said" if there and not row.has(PRECISION) else ""


def _precision(row: Row, llm: str, checkpoint: str) -> str | None:
    said = row.text(PRECISION) or precision_of_checkpoint(checkpoint)
    return precision_name(said, llm) if said else None


def _lengths(row: Row) -> tuple[float | None, float | None, bool]:
    """Prompt and output tokens of a request, and whether they are nominal."""
    prompt, output = row.has(PROMPT), row.has(OUTPUT)
    if prompt and output:
        return row.number(prompt, MOST), row.number(output, MOST), not row.has((NOT_NOMINAL,))
    if all(row.cells.get(name) for name in TOTALS):
        prompts, outputs, requests = (row.number(name, 1e15) for name in TOTALS)
        return prompts / requests, outputs / requests, False
    if row.cells.get(MEAN_OUTPUT):
        return (row.number(prompt, MOST) if prompt else None), row.number(MEAN_OUTPUT, MOST), False
    return (row.number(prompt, MOST) if prompt else None), (row.number(output, MOST) if output else None), True


def _measured(row: Row, *, per_gpu: bool) -> dict[str, float]:
    """What a row has of the instance, or of one GPU."""
    found = {}
    for name, columns in SEEN.items():
        column = row.has(tuple(columns))
        if column is not None and (column in PER_GPU) == per_gpu:
            found[name] = row.number(column, MOST) * columns[column]
    return found


def benchmark(
    point: Point, isl: float, osl: float, *, spread: float | None = None, n_requests: int | None = None
) -> Benchmark:
    """The closed loop of a point with these lengths, its own or given; drawn from `spread` of the nominal ones up."""
    nominal = point.nominal or (isl, osl) != (point.isl, point.osl)
    alike = not nominal and isl == round(isl) and osl == round(osl)
    spread = spread or (1.0 if alike else LENGTH_SPREAD)
    longer = 1.0 if nominal else 2.0 / (1.0 + spread)  # than the mean
    concurrency = point.concurrency or 1
    n = n_requests or point.n_requests or REQUESTS_PER_SEQUENCE * concurrency
    return Benchmark(
        prompt_tokens=max(1, round(longer * isl)),
        output_tokens=max(1, round(longer * osl)),
        concurrency=min(n, concurrency),
        n_requests=n,
        length_spread=spread,
    )
