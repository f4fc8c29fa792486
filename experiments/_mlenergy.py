"""Text rows of the ML.ENERGY Benchmark v3, as tables of steady states with architecture constants beside them.

The folder given to the scripts holds `llm_steady_state.csv` (the leaderboard's rows), `llm_derived_roofline.csv` (mean
context and tokens processed per iteration, from replayed queues and assumed prompt lengths) and `model_arch.csv`.
Source: Chung et al., The ML.ENERGY Benchmark (arXiv 2505.06371), Where Do the Joules Go? (arXiv 2601.22076).
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fleetopt_jax.core.units import MS
from fleetopt_jax.laws.llm import Llm, make_llm

SOURCE = "ML.ENERGY Benchmark v3 (arXiv 2505.06371, 2601.22076), ml-energy/leaderboard 0cd52da"
PRECISIONS = {"bfloat16": "bf16", "fp8": "fp8", "mxfp4": "mxfp4"}
CATALOG = {  # architecture of the benchmark -> our name
    "Llama-3.1-8B": "llama-3.1-8b",
    "Llama-3-70B": "llama-3.1-70b",
    "Llama-3.1-405B": "llama-3.1-405b",
    "Qwen3-8B": "qwen3-8b",
    "Qwen3-14B": "qwen3-14b",
    "Qwen3-32B": "qwen3-32b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen3-235B-A22B": "qwen3-235b-a22b",
    "Qwen3-Coder-480B-A35B": "qwen3-coder-480b-a35b",
    "gpt-oss-20b": "gpt-oss-20b",
    "gpt-oss-120b": "gpt-oss-120b",
    "DeepSeek-V3/R1": "deepseek-v3",
}


@dataclass(frozen=True)
class Row:
    """One steady state of one instance."""

    row_id: int
    model: str
    architecture: str
    task: str
    gpu: str
    tp: int
    precision: str
    batch: float  # mean sequences in flight
    iteration_s: float  # batch / output tokens per second: the mean step, prefill in it
    itl_s: float  # median inter-token latency: mostly pure decode steps
    power_w_per_gpu: float
    context_tokens: float
    prompt_per_output: float  # prompt tokens prefilled for every output token
    prompt_tokens: float  # of one prompt, assumed
    attention_dp: int  # groups of GPUs with sequences of their own
    ep: int  # groups that the experts are divided over
    host_bound: bool  # the benchmark's flag of one-GPU B200 rows with a 17 to 44 ms floor: not the GPU's

    @property
    def tok_per_s(self) -> float:
        return self.batch / self.iteration_s

    @property
    def tok_per_j(self) -> float:
        return self.tok_per_s / (self.power_w_per_gpu * self.tp)


def read_rows(folder: Path) -> list[Row]:
    """Every text row of a transformer; hybrids (Mamba) have no architecture constants and no law."""
    derived = {line["row_id"]: line for line in _lines(folder / "llm_derived_roofline.csv")}
    rows = []
    for line in _lines(folder / "llm_steady_state.csv"):
        beside = derived.get(line["row_id"])
        if line["flag_multimodal"] == "1" or beside is None:
            continue
        batch = float(line["avg_batch_size"])
        rows.append(
            Row(
                row_id=int(line["row_id"]),
                model=line["model_id"],
                architecture=beside["arch"],
                task=line["task"],
                gpu=line["gpu_model"].lower(),
                tp=int(line["num_gpus"]),
                precision=PRECISIONS[line["weight_precision"]],
                batch=batch,
                iteration_s=float(line["mean_iteration_ms"]) * MS,
                itl_s=float(line["median_itl_ms"]) * MS,
                power_w_per_gpu=float(line["avg_power_per_gpu_w"]),
                context_tokens=float(beside["mean_context_tokens"]),
                prompt_per_output=max(0.0, float(beside["tokens_processed_per_iter"]) / batch - 1.0),
                prompt_tokens=float(beside["assumed_input_len_tokens"]),
                attention_dp=int(line["attention_dp_launched"] or 1),
                ep=int(line["moe_ep_launched"] or 1),
                host_bound=line["flag_anomaly_b200_1gpu_gpqa"] == "1",
            )
        )
    return rows


def configurations(rows: list[Row]) -> dict[tuple[str, str, int, str], list[Row]]:
    """Rows by (gpu, architecture, tp, precision), ordered by batch; host-bound rows left out."""
    groups: dict[tuple[str, str, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if not row.host_bound:
            groups[row.gpu, row.architecture, row.tp, row.precision].append(row)
    return {key: sorted(group, key=lambda row: row.batch) for key, group in sorted(groups.items())}


@cache
def benchmark_llm(folder: Path, architecture: str, precision: str) -> Llm:
    """The architecture as the benchmark's constants have it: models the catalog does not list are among them."""
    line = next(line for line in _lines(folder / "model_arch.csv") if line["arch"] == architecture)
    number = {name: float(value or 0) for name, value in line.items() if name not in ("arch", "kind")}
    attention, dense, head = (
        number[name] for name in ("attention_params", "dense_mlp_shared_router_params", "lm_head_params")
    )
    eight_bit = precision == "fp8"
    # The fp8 checkpoint of Llama-3.1-405B keeps attention in 16 bits; output layers are 16 bits everywhere.
    eight_bit_params = eight_bit * (dense + attention * (architecture != "Llama-3.1-405B"))
    sixteen_bit_params = attention + dense + head - eight_bit_params
    total = attention + dense + head
    n_experts = number["num_experts"]
    return make_llm(
        n_dense_params=total,
        n_expert_params=number["routed_expert_params"],
        expert_share=number["experts_per_token"] / n_experts if n_experts else 0.0,
        n_embedding_params=number["untied_input_embedding_params"],
        n_layers=number["layers"],
        bytes_per_weight=(eight_bit_params + 2 * sixteen_bit_params) / total,
        bytes_per_expert_weight={"bf16": 2.0, "fp8": 1.0, "mxfp4": 4.25 / 8}[precision],
        eight_bit_frac=float(eight_bit),
        kv_bytes_per_token=number["kv_bytes_per_token_bf16"],
        n_kv_heads=1 if number["mla"] else number["kv_heads"],
        attention_flop_per_token2=4 * number["layers"] * number["q_heads"] * number["head_dim"],
        windowed_frac=number["fraction_layers_windowed"],
        window_tokens=number["sliding_window_tokens"],
    )


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
