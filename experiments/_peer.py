"""What AIConfigurator predicts, in its own aggregated mode (`pip install "fleetopt_jax[peer]"`).

Its newest kernel tables of the serving engine, and its defaults for whatever a row does not say, which is where it is
nearest: context of a step as long as the prompt (with vLLM's 8,192 tokens a step its TTFT is three times as far off),
the row's own quantization modes where it has tables of them (with those it infers from checkpoints its fp8 TPOT is
twice as far off), mean lengths of what was drawn. Its TTFT is that of a steady state, without the queueing of a first
wave. It gives no watts: it has them for less than nine tenths of what these steps run.

`results/peer_predictions.csv` keeps what it said, with version and date, for runs without it.
"""

import csv
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from _mlenergy import Row
from _results import RESULTS, write_table
from _scored_points import Point

from fleetopt_jax.catalog.engines import prompt_of_mix
from fleetopt_jax.core.units import MS

PACKAGE, KEPT = "aiconfigurator", "peer_predictions.csv"
NAMES = {  # of models, where the peer has another
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Meta-Llama-3.1-8B",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Meta-Llama-3.1-8B",
    "nvidia/Qwen3-32B-NVFP4": "Qwen/Qwen3-32B",
}
FOUR_BIT_NAMES = {  # of checkpoints it knows as such
    "MiniMaxAI/MiniMax-M2.5": "nvidia/MiniMax-M2.5-NVFP4",
    "Qwen/Qwen3.5-397B-A17B": "nvidia/Qwen3.5-397B-A17B-NVFP4",
}
OWN_MODES = ("openai/gpt-oss-120b", *FOUR_BIT_NAMES)  # whose modes it takes from their checkpoints where they are fp4
ARCHITECTURES = {  # of ML.ENERGY that it knows
    "Llama-3.1-8B": "meta-llama/Meta-Llama-3.1-8B",
    "Llama-3-70B": "meta-llama/Meta-Llama-3.1-70B",
    "Llama-3.1-405B": "meta-llama/Meta-Llama-3.1-405B",
    "Qwen3-8B": "Qwen/Qwen3-8B",
    "Qwen3-32B": "Qwen/Qwen3-32B",
    "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
    "Qwen3-235B-A22B": "Qwen/Qwen3-235B-A22B",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "DeepSeek-V3/R1": "deepseek-ai/DeepSeek-V3",
}


class Question(NamedTuple):
    """What it is asked, in its own words: as text, to be kept."""

    model_path: str
    system_name: str
    backend_name: str
    isl: str
    osl: str
    batch_size: str
    tp_size: str
    attention_dp_size: str
    moe_tp_size: str
    moe_ep_size: str
    gemm_quant_mode: str
    moe_quant_mode: str
    kvcache_quant_mode: str


class Said(NamedTuple):
    """Means, or why there are none."""

    ttft_s: float | None
    tpot_s: float | None
    tok_per_s: float | None
    why: str


def peer_version() -> str | None:
    """Of the installed peer; None without."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def of_point(point: Point) -> Question:
    """The row as it ran, its own quantization modes."""
    own_modes = point.precision == "fp4" and point.model in OWN_MODES
    name = FOUR_BIT_NAMES.get(point.model) if own_modes else None
    numbers = round(point.prompt_tokens), round(point.output_tokens), point.concurrency // point.attention_dp or 1
    split = point.tp, point.attention_dp, point.tp * point.attention_dp // point.moe_ep, point.moe_ep
    modes = ("", "") if own_modes else (point.columns["gemm_quant_mode"], point.columns["moe_quant_mode"])
    name = name or NAMES.get(point.model, point.model)
    kv_mode = "fp8" if point.spec.kv_precision == "fp8" else ""
    return _question(name, point.columns["system"], point.serving, (*numbers, *split), (*modes, kv_mode))


def of_steady(row: Row) -> Question:
    """A steady state with prompts of one length that give its mean context and its mix; experts divided over GPUs."""
    prompt = prompt_of_mix(row.context_tokens, row.prompt_per_output)
    output = prompt / max(row.prompt_per_output, 1e-9)
    mode = {"bf16": "bfloat16", "fp8": "fp8_block"}.get(row.precision, "")
    numbers = max(round(prompt), 1), max(round(output), 2), max(round(row.batch), 1), row.tp, 1, 1, row.tp
    name = ARCHITECTURES.get(row.architecture, row.model)
    return _question(name, f"{row.gpu}_sxm", "vllm", numbers, (mode, mode, ""))


def _question(name: str, system: str, engine: str, numbers: Sequence[int], modes: Sequence[str]) -> Question:
    return Question._make((name, system, engine, *map(str, numbers), *modes))


def peer_says(questions: Sequence[Question], *, anew: bool = False) -> tuple[str, list[Said]]:
    """(version, its answers): asked now if `anew`, which keeps them, else as they were kept."""
    if anew:
        answers = {question: _ask(question) for question in questions}
        said = f"{peer_version()}, {datetime.now(UTC):%Y-%m-%d}"
        rows = [[*question, *answer, said] for question, answer in sorted(answers.items())]
        write_table(KEPT, [*Question._fields, *Said._fields, "version"], rows)
    answers, said = _kept()
    missing = Said(None, None, None, "not asked: run again with --peer")
    return said, [answers.get(question, missing) for question in questions]


def _kept() -> tuple[dict[Question, Said], str]:
    if not (RESULTS / KEPT).exists():
        return {}, ""
    with (RESULTS / KEPT).open(newline="") as file:
        lines = list(csv.DictReader(file))
    answers = {}
    for line in lines:
        numbers = [float(line[name]) if line[name] else None for name in Said._fields[:-1]]
        answers[Question._make(line[name] for name in Question._fields)] = Said._make((*numbers, line["why"]))
    return answers, lines[0]["version"] if lines else ""


def _ask(question: Question) -> Said:
    """With the question's modes where there are tables of them, else with those of the checkpoint."""
    said = _estimate(question)
    if said.why.startswith("perf database error"):
        return _estimate(question._replace(gemm_quant_mode="", moe_quant_mode=""))
    return said


def _estimate(question: Question) -> Said:
    from aiconfigurator.cli.api import cli_estimate  # pyright: ignore[reportMissingImports]

    said = {name: value or None for name, value in question._asdict().items()}
    said |= {name: int(value) for name, value in question._asdict().items() if value.isdigit()}
    try:
        found = cli_estimate(backend_version=_tables(question.system_name, question.backend_name), **said)
    except Exception as error:  # it has no one class for what its tables do not have
        return Said(None, None, None, _in_short(str(error)))
    if found.kv_cache_warning:
        return Said(None, None, None, "its KV cache does not hold the batch")
    return Said(float(found.ttft) * MS, float(found.tpot) * MS, float(found.tokens_per_second), "")


def _in_short(error: str) -> str:
    if error.startswith("Failed to download"):
        return "it does not bring the model's config.json"
    return " ".join(error.split())[:80]


@cache
def _tables(system: str, backend: str) -> str | None:
    """The version of its newest kernel tables: asked once, for it reads hundreds of files to know."""
    from aiconfigurator.sdk.perf_database import get_latest_database_version  # pyright: ignore[reportMissingImports]

    logging.disable(logging.WARNING)  # a line for each point otherwise
    return get_latest_database_version(system=system, backend=backend)
