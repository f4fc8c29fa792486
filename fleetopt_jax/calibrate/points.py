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
    how     pp_size | pp; attention_dp_size | dp_attention | dp; moe_ep_size | ep; moe_tp_size: how the GPUs share it;
            mode: what no law is for is left out, with why

Nominal lengths are those a benchmark asks for, drawn from a share of them up. Of a run that gives its totals or means,
the nominal ones are those with these means; where both means are whole numbers, all requests are taken to be alike.
That matters: requests of one length go in step, and their prompts wait for each other.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
ALL_GPUS = ("num_gpus", "n_gpus")  # of an instance
TP = ("tp", "tp_size", "tensor_parallel_size", *ALL_GPUS)
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
PIPELINE = ("pp_size", "pp", "pipeline_parallel_size")
DATA = ("attention_dp_size", "dp_attention", "attention_dp_launched", "dp_size", "data_parallel_size", "dp")
EXPERTS = ("moe_ep_size", "ep", "ep_size", "moe_ep_launched", "expert_parallel_size", "enable_expert_parallel")
EXPERT_TENSORS = ("moe_tp_size",)
OFF = ("", "0", "1", "false", "none", "off", "no", "agg", "aggregated")
ON = ("true", "on", "yes")
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
    dp: int = 1  # groups of tp GPUs with sequences of their own
    ep: int = 1  # groups of GPUs that divide the experts whole
    pp: int = 1  # stages of layers

    @property
    def parallel(self) -> str:
        """A parallelism besides that of tensors, or nothing."""
        kinds = {"pipeline parallelism": self.pp, "data-parallel attention": self.dp, "expert parallelism": self.ep}
        return next((words for words, size in kinds.items() if size > 1), "")

    def seen(self, n_gpus: int) -> dict[str, float]:
        """What was measured of an instance of so many GPUs."""
        return {**self.measured, **{name: n_gpus * value for name, value in self.per_gpu.items()}}


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
    llm_text, serving = row.text(LLM), row.text(SERVING)
    llm = llm_name(llm_text) if llm_text else None
    prompt, output, nominal = _lengths(row)
    concurrency, requests = row.has(CONCURRENCY), row.has(REQUESTS)
    version, (tp, dp, ep, pp) = row.text(VERSION), split_of(row)
    point = Point(
        row=i,
        gpu=gpu_name(row.text(GPU)) if row.has(GPU) else None,
        llm=llm or llm_text or None,
        precision=_precision(row, llm or "", llm_text),
        serving=serving_name(serving, version) if serving else None,
        version=version or None,
        isl=prompt,
        osl=output,
        nominal=nominal,
        concurrency=math.ceil(row.number(concurrency, 1e5)) if concurrency else None,
        n_requests=row.count(requests, 10**6) if requests else None,
        measured=_measured(row, per_gpu=False),
        per_gpu=_measured(row, per_gpu=True),
        tp=tp,
        dp=dp,
        ep=ep,
        pp=pp,
    )
    why = served_otherwise(row)
    if not why and llm_text and llm is None:
        why = f"unknown LLM {llm_text}"
    return replace(point, why=why or _unsaid(row))


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


def split_of(row: Row) -> tuple[int | None, int, int, int]:
    """(tp, dp, ep, pp): how the GPUs share the LLM. Of a column of all GPUs each group and stage has its part.

    AIConfigurator's table names data-parallel attention also where vLLM was started without; those points agree with
    others of as many GPUs within 2 %. Where it has InferenceX's n GPUs divide the experts both ways, whole and by their
    width, it multiplies n with itself.
    """
    column = row.has(TP)
    tp = None if column is None else row.count(column)
    pp, dp = (_size(row, names, tp or 1) for names in (PIPELINE, DATA))
    if row.text(DATA).lower() in ON:  # InferenceX: all GPUs have sequences of their own
        tp = 1
    elif column in ALL_GPUS and tp is not None and tp % (dp * pp) == 0:
        tp //= dp * pp
    ep = _size(row, EXPERTS, (tp or 1) * dp)
    squared = ep > 1 and _size(row, EXPERT_TENSORS, 1) == ep and (tp or 0) * dp == ep**2
    if squared and row.text(DATA):  # those of InferenceX, which say it of all
        tp, dp = (ep, 1) if dp == 1 else (1, ep)
    if row.has(("silicon_tpot_ms",)) and row.text(SERVING).lower() == "vllm":
        dp = 1
    return tp, dp, min(ep, (tp or ep) * dp), pp


def _size(row: Row, names: Sequence[str], all_of_them: int) -> int:
    """The size of a kind of parallelism; of one that is only said to be on, all GPUs."""
    text = row.text(names).lower()
    if text in OFF:
        return 1
    return all_of_them if text in ON else row.count(row.has(names) or "", 10**4)


def gpus_of(row: Row) -> int | None:
    """GPUs of an instance; None where a row does not say."""
    tp, dp, _, pp = split_of(row)
    return None if tp is None else tp * dp * pp


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
