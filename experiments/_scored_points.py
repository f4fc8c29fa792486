"""End-to-end serving points: what closed-loop benchmarks measured, and which of them a scorecard can count.

The folder given to the scripts holds `points.csv`, in the columns of the `silicon_sample.csv` of aiconfigurator-core
0.12.0 (Apache-2.0), most of it measured by SemiAnalysis InferenceX: means of TTFT and TPOT over 10 x concurrency
requests, all sent at once, `concurrency` of them in flight. InferenceX draws prompts and outputs evenly from 0.8 to 1.0
of their nominal lengths.

`tp`, `pp`, `attention_dp` and `moe_ep` are what ran (`_serving_points.split_of`), `columns` what is written.
"""

import csv
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from _serving_points import LLMS, PRECISIONS, split_of

from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.units import MS
from fleetopt_jax.laws.kv_cache import paged_sequences

OWN_RUNS = ("nvidia/Llama-3.1-8B-Instruct-FP8",)  # prompts alone up to 95 % of the fp8 peak: a load nobody states
OWN_FOUR_BITS = {"openai/gpt-oss-120b": "mxfp4"}  # what "fp4" means of its checkpoint
DRAWN = {(1024, 1024), (1024, 8192), (8192, 1024)}  # InferenceX's prompts and outputs: drawn, the others are exact
LEAST_FRAC = 0.8  # of the nominal length, of a drawn one
DISAGGREGATED = ("prefill_num_workers", "decode_num_workers", "prefill_batch_size", "decode_batch_size")
NODE_GPUS = 8  # of an HGX node; GB200 has domains of 72


@dataclass(frozen=True)
class Point:
    """One row: what served what where, and what was measured."""

    row: int  # of the file's data rows, from 0
    gpu: str  # of the catalog
    model: str  # as the file has it
    serving: str  # vllm, sglang, trtllm
    version: str
    precision: str  # as the file has it; empty where nobody knows
    aggregated: bool
    nominal_prompt_tokens: int
    nominal_output_tokens: int
    concurrency: int  # requests in flight; 0 where the file does not say
    tp: int
    pp: int
    attention_dp: int
    moe_ep: int
    ttft_s: float
    tpot_s: float
    columns: dict[str, str]  # as they are written

    @property
    def is_drawn(self) -> bool:
        return (self.nominal_prompt_tokens, self.nominal_output_tokens) in DRAWN

    @property
    def mean_frac(self) -> float:
        """Mean length over the nominal one."""
        return (1.0 + LEAST_FRAC) / 2.0 if self.is_drawn else 1.0

    @property
    def prompt_tokens(self) -> float:
        return self.mean_frac * self.nominal_prompt_tokens

    @property
    def output_tokens(self) -> float:
        return self.mean_frac * self.nominal_output_tokens

    @property
    def tok_per_s(self) -> float:
        return throughput(self, self.ttft_s, self.tpot_s)

    @property
    def spec(self) -> EngineSpec:
        """InferenceX serves Llama-70B with an 8-bit KV cache (benchmarks/70b_fp8_h100_slurm.sh of
        SemiAnalysisAI/InferenceX); the other scripts leave it to the checkpoint."""
        precision = "mxfp4" if self.precision == "fp4" and self.model in OWN_FOUR_BITS else PRECISIONS[self.precision]
        eight_bit_kv = self.model == "meta-llama/Llama-3.1-70B" and self.is_drawn
        return EngineSpec(self.gpu, LLMS[self.model], self.tp, precision, "fp8" if eight_bit_kv else None)

    @cached_property
    def left_out(self) -> str:
        """Why no prediction is asked of anybody; empty where it is."""
        if not self.aggregated:
            return "disaggregated"
        if not self.precision:
            return "precision unknown"
        if self.model in OWN_RUNS:
            return "not the load that is said"
        if self.model not in LLMS or self.gpu not in GPUS:
            return "LLM or GPU unknown"
        if self.precision == "fp8" and self.model in OWN_FOUR_BITS:
            return "not a precision of the checkpoint"
        if not self.concurrency:
            return "concurrency unknown"
        if self.tp * self.attention_dp > NODE_GPUS or self.pp > 1:
            return "more than a node"
        if self.ttft_s > self.output_tokens * self.tpot_s:
            return "queues"  # longer for the first token than for all others: fewer run than are in flight
        return self._overflow

    @property
    def _overflow(self) -> str:
        try:
            kv = build(self.spec).kv
        except BadField:  # no law of the LLM today: who has one must say whether it fits
            return ""
        prompt, output = self.prompt_tokens, self.output_tokens
        variance = output**2 / 12.0 + (self.is_drawn * (1.0 - LEAST_FRAC) * self.nominal_prompt_tokens) ** 2 / 12.0
        longest = self.nominal_prompt_tokens + self.nominal_output_tokens
        most = float(paged_sequences(kv, longest, prompt + output / 2.0, variance))
        return "batch does not fit" if most < self.concurrency / max(self.attention_dp, 1) else ""


def throughput(point: Point, ttft_s: float, tpot_s: float) -> float:
    """Output tokens per second of the instance [1/s], by Little's law: each request in flight takes TTFT + (o - 1) TPOT
    for its o tokens. The points have no throughput of their own, so measured and predicted are computed alike."""
    return point.concurrency * point.output_tokens / (ttft_s + (point.output_tokens - 1.0) * tpot_s)


def read_points(folder: Path) -> list[Point]:
    """Every row of `points.csv`, but for those that it repeats."""
    with (folder / "points.csv").open(newline="") as file:
        points = [_point(row, line) for row, line in enumerate(csv.DictReader(file))]
    first = {_identity(point): point for point in reversed(points)}
    return [point for point in points if first[_identity(point)] is point]


def _identity(point: Point) -> tuple:
    """Equal for what was measured once: DeepSeek-R1 is listed as V3 again."""
    own = [getattr(point, each.name) for each in fields(point) if each.name not in ("row", "columns", "model")]
    return LLMS.get(point.model, point.model), *own, *(point.columns[name] for name in DISAGGREGATED)


def _point(row: int, line: dict[str, str]) -> Point:
    def whole(name: str, least: int = 1) -> int:
        return max(int(float(line[name] or 0)), least)

    split = split_of(line)
    return Point(
        row=row,
        gpu=line["system"].removesuffix("_sxm"),
        model=line["model_path"],
        serving=line["backend"],
        version=line["backend_version"],
        precision=line["precision"],
        aggregated=line["mode"] == "agg",
        nominal_prompt_tokens=whole("isl"),
        nominal_output_tokens=whole("osl"),
        concurrency=whole("concurrency", 0),
        tp=split.tp,
        pp=split.pp,
        attention_dp=split.dp,
        moe_ep=split.ep,
        ttft_s=float(line["silicon_ttft_ms"]) * MS,
        tpot_s=float(line["silicon_tpot_ms"]) * MS,
        columns=line,
    )
