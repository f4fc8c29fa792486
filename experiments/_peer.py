"""What AIConfigurator predicts of serving points, in its own aggregated mode (`pip install "fleetopt_jax[peer]"`).

Its newest kernel tables of the serving engine, and its defaults for whatever a row does not say, which is where it is
nearest: context of a step as long as the prompt (with vLLM's 8,192 tokens a step its TTFT is twice as far off), the
row's own quantization modes (with those it infers from checkpoints fp8 TPOT is twice as far off), mean lengths of what
was drawn. Its TTFT is that of a steady state, without the queueing of a first wave; it gives no watts here.

`results/peer_predictions.csv` keeps what it said, with version and date, for runs without it.
"""

import csv
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from _results import RESULTS, write_table
from _scored_points import Point

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
KEY = ("system", "model_path", "backend", "precision", "gemm_quant_mode", "moe_quant_mode", "isl", "osl", "concurrency")
KEY += ("batch_size", "tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")  # columns of the points


class Said(NamedTuple):
    """Means of one point, or why there are none."""

    ttft_s: float | None
    tpot_s: float | None
    why: str


def peer_version() -> str | None:
    """Of the installed peer; None without."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def peer_says(points: Sequence[Point], *, anew: bool = False) -> tuple[str, list[Said]]:
    """(version, what it says of each point): asked now if `anew`, which keeps it, else as it was kept."""
    if anew:
        answers = {_key(point): _ask(point) for point in points}
        said = f"{peer_version()}, {datetime.now(UTC):%Y-%m-%d}"
        rows = [[*key, answer.ttft_s, answer.tpot_s, answer.why, said] for key, answer in sorted(answers.items())]
        write_table(KEPT, [*KEY, "ttft_s", "tpot_s", "why", "version"], rows)
    answers, said = _kept()
    missing = Said(None, None, "not asked: run again with --peer")
    return said, [answers.get(_key(point), missing) for point in points]


def _key(point: Point) -> tuple[str, ...]:
    return tuple(point.columns[name] for name in KEY)


def _kept() -> tuple[dict[tuple[str, ...], Said], str]:
    if not (RESULTS / KEPT).exists():
        return {}, ""
    with (RESULTS / KEPT).open(newline="") as file:
        lines = list(csv.DictReader(file))
    answers = {
        tuple(line[name] for name in KEY): Said(_number(line["ttft_s"]), _number(line["tpot_s"]), line["why"])
        for line in lines
    }
    return answers, lines[0]["version"] if lines else ""


def _number(text: str) -> float | None:
    return float(text) if text else None


def _ask(point: Point) -> Said:
    """With the row's modes where there are tables of them, else with those of the checkpoint."""
    own_modes = point.precision == "fp4" and point.model in OWN_MODES
    name = FOUR_BIT_NAMES.get(point.model) if own_modes else None
    modes = {name: point.columns[name] or None for name in ("gemm_quant_mode", "moe_quant_mode")}
    said = _estimate(point, name or NAMES.get(point.model, point.model), {} if own_modes else modes)
    if said.why.startswith("perf database error") and not own_modes:
        return _estimate(point, NAMES.get(point.model, point.model), {})
    return said


def _estimate(point: Point, name: str, modes: dict[str, str | None]) -> Said:
    from aiconfigurator.cli.api import cli_estimate  # pyright: ignore[reportMissingImports]

    split = {
        "tp_size": point.tp,
        "attention_dp_size": point.attention_dp,
        "moe_tp_size": point.tp * point.attention_dp // point.moe_ep,
        "moe_ep_size": point.moe_ep,
    }
    system = point.columns["system"]
    try:
        found = cli_estimate(
            name,
            system,
            backend_name=point.serving,
            backend_version=_tables(system, point.serving),
            isl=round(point.prompt_tokens),
            osl=round(point.output_tokens),
            batch_size=max(1, round(point.concurrency / point.attention_dp)),
            kvcache_quant_mode="fp8" if point.spec.kv_precision == "fp8" else None,
            **split,
            **modes,
        )
    except Exception as error:  # it has no one class for what its tables do not have
        return Said(None, None, " ".join(str(error).split())[:80])
    if found.kv_cache_warning:
        return Said(None, None, "its KV cache does not hold the batch")
    return Said(float(found.ttft) * MS, float(found.tpot) * MS, "")


@cache
def _tables(system: str, backend: str) -> str | None:
    """The version of its newest kernel tables: asked once, for it reads hundreds of files to know."""
    from aiconfigurator.sdk.perf_database import get_latest_database_version  # pyright: ignore[reportMissingImports]

    logging.disable(logging.WARNING)  # a line for each point otherwise
    return get_latest_database_version(system=system, backend=backend)
