"""Board watts of serving: `fleetopt_jax/laws/operators/watts.py`, fitted to instances of H100 and B200.

The rows are those of the ML.ENERGY Benchmark v3 (vLLM 0.11): a mean step and mean watts. What the step is made of is
estimated: bytes and FLOPs of the LLM over the data-sheet peaks, seconds of its operators from these at round
efficiencies, experts' from the kernel tables; the rest of the step is a gap. The law is linear in its coefficients
below the power limit. They are held near those of the kernels, and H100's near B200's, by a penalty, since twelve
architectures identify no more.
"""

import csv
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
from _mlenergy import SOURCE, Row, benchmark_llm, read_rows
from scipy.optimize import least_squares

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.laws.llm import expert_coverage
from fleetopt_jax.laws.measured import ideal_bytes, ideal_flops
from fleetopt_jax.laws.operators.watts import LEAST_SHARE, held_w
from operators._fitting import TABLES

LICENCE = "facts of a public leaderboard without a licence file; the benchmark is Apache-2.0"
MEASURED = ("h100", "b200")
BORROWED = {  # GPUs whose serving nobody has published with watts, and the one whose fractions they take
    "a100": "h100",
    "h200": "h100",
    "l40s": "h100",
    "b300": "b200",
    "gb200": "b200",
    "gb300": "b200",
    "rtx-pro-6000": "b200",
}
LINK_BYTES_PER_S = {"h100": 450e9, "b200": 900e9}
FLOP_POWER = 0.7
# gap, memory of products, of KV caches, of experts, FLOPs, running at all, slow kernels; as kernels have it
NAMES = ("gap_frac", "memory_frac", "kv_memory_frac", "expert_memory_frac", "flop_frac", "busy_frac", "slow_frac")
KERNELS = np.array([0.2, 0.56, 0.4, 0.7, 1.2, 0.05, 0.5])
SPREAD, HOLD, HOLD_TOGETHER = 0.3, 10.0, 1.0  # of a coefficient; penalties of straying from KERNELS, and apart
ROBUST = 0.1
EXPERTS = {  # hidden size, width, experts of a token, experts
    "Qwen3-235B-A22B": (4096, 1536, 8, 128),
    "Qwen3-30B-A3B": (2048, 768, 8, 128),
    "gpt-oss-120b": (2880, 2880, 4, 128),
    "DeepSeek-V3/R1": (7168, 2048, 8, 256),
    "Llama-4-Scout": (5120, 8192, 1, 16),
    "Llama-4-Maverick": (5120, 8192, 1, 128),
}
ENOUGH_ROWS, ENOUGH_LLMS = 20, 3  # that an error of one kind of LLM stands on
PER_TENSOR = ("Llama-4-Maverick",)  # one scale of a matrix; the other 8-bit and 4-bit experts have blocks of scales


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class. Errors held out are of architectures that were not in the fit, on either GPU; those of
    borrowers, of the other GPU's fractions, and the architecture not in the fit either.

    The benchmark's rows are expected in `mlenergy` beside the folder of the kernel tables.
    """
    table = read_table(folder)
    rows = table.rows
    found, unseen = table.fit(np.ones(len(rows), bool)), np.zeros(len(rows))
    carried, experts = np.zeros(len(rows)), np.array([row.architecture in EXPERTS for row in rows])
    names = np.array([row.architecture for row in rows])
    for architecture in sorted(set(names.tolist())):
        out = names == architecture
        unseen[out] = table.error(table.fit(~out))[out]
        for second in (False, True):
            here = table.second == second
            carried[out & here] = table.error(table.fit(~out & ~here), table.second ^ True)[out & here]
    gpus: dict[str, dict[str, Any]] = {gpu: {} for gpu in TABLES}
    for i, gpu in enumerate(MEASURED):
        of = table.second == bool(i)
        wrong, held_out = np.abs(table.error(found)[of]), np.abs(unseen[of])
        blind = _by_kind(np.abs(unseen), names, of, experts)
        gpus[gpu]["serving"] = {
            **_entry(table.coefficients(found, bool(i)), wrong, held_out),
            "blind_mean_error": blind,
        }
    lent = _by_kind(np.abs(carried), names, np.ones(len(rows), bool), experts)
    for gpu, lender in BORROWED.items():
        coefficients = gpus[lender]["serving"]["coefficients"]
        gpus[gpu]["serving"] = {"coefficients": coefficients, "rows": 0, "borrowed_from": lender}
    return {"source": SOURCE, "licence": LICENCE, "gpus": gpus, "borrowed_blind_mean_error": lent}


def read_table(folder: Path) -> "Table":
    """The benchmark's rows, with the kernels of `folder`."""
    mlenergy = folder.parent / "mlenergy"
    rows = [row for row in read_rows(mlenergy) if row.gpu in MEASURED and not row.host_bound]
    return Table(rows, np.array([_terms(folder, mlenergy, row) for row in rows]))


class Table:
    """Rows of both GPUs and what the coefficients multiply."""

    def __init__(self, rows: list[Row], terms: np.ndarray) -> None:
        self.rows = rows
        sheets = [gpu_entry(row.gpu) for row in rows]
        self.second = np.array([row.gpu == MEASURED[1] for row in rows])
        self.terms = terms
        self.idle_frac = np.array([(sheet.idle_w or 0.0) / sheet.tdp_w for sheet in sheets])
        self.power_frac = np.array([row.power_w_per_gpu / sheet.tdp_w for row, sheet in zip(rows, sheets)])
        names = [f"{row.gpu} {row.architecture} {row.tp} {row.precision} {row.task}" for row in rows]
        _, of, count = np.unique(names, return_inverse=True, return_counts=True)
        self.weight = 1.0 / np.sqrt(count[of])  # configurations count the same, however many batches they ran

    def coefficients(self, x: np.ndarray, second: np.ndarray | bool) -> np.ndarray:
        """Of H100 or, where `second`, of B200, in the order of NAMES."""
        n = len(NAMES)
        return np.where(np.asarray(second)[..., None], x[:n] + x[n:], x[:n] - x[n:])

    def error(self, x: np.ndarray, second: np.ndarray | None = None) -> np.ndarray:
        """Of every row by the coefficients of its GPU, or of the `second` where that is said."""
        coefficients = self.coefficients(x, self.second if second is None else second)
        asked = self.idle_frac + np.sum(self.terms * coefficients, axis=1)
        return np.asarray(held_w(asked, 1.0)) / self.power_frac - 1.0

    def fit(self, chosen: np.ndarray) -> np.ndarray:
        """What `coefficients` are made of, from some of the rows."""
        n = len(NAMES)

        def residuals(x: np.ndarray) -> np.ndarray:
            wrong = np.log(np.maximum(1.0 + self.error(x)[chosen], 0.05)) / ROBUST
            data = self.weight[chosen] * np.sqrt(2.0 * (np.sqrt(1.0 + wrong**2) - 1.0))
            stray, apart = (x[:n] - KERNELS) / SPREAD, x[n:] / SPREAD
            return np.concatenate([data, np.sqrt(HOLD) * stray, np.sqrt(HOLD_TOGETHER) * apart])

        return least_squares(residuals, np.concatenate([KERNELS, np.zeros(n)])).x


def _by_kind(wrong: np.ndarray, names: np.ndarray, chosen: np.ndarray, experts: np.ndarray) -> dict[str, float]:
    """Mean errors of dense LLMs and of mixtures of experts; of few rows or architectures not below that of both."""
    found = {}
    for kind, of_kind in (("dense", ~experts), ("experts", experts)):
        here = chosen & of_kind
        few = here.sum() < ENOUGH_ROWS or len(set(names[here].tolist())) < ENOUGH_LLMS
        found[kind] = float(max(wrong[here].mean(), wrong[chosen].mean() if few else 0.0))
    return found


def _entry(coefficients: np.ndarray, wrong: np.ndarray, unseen: np.ndarray) -> dict[str, Any]:
    return {
        "coefficients": {**dict(zip(NAMES, map(float, coefficients))), "flop_power": FLOP_POWER},
        "rows": len(wrong),
        "left_out": "rows of one B200 that the benchmark's host held back",
        "median_error": float(np.median(wrong)),
        "p90_error": float(np.quantile(wrong, 0.9)),
        "mean_error": float(np.mean(wrong)),
        "held_out_median_error": float(np.median(unseen)),
        "held_out_mean_error": float(np.mean(unseen)),
    }


def _terms(folder: Path, mlenergy: Path, row: Row) -> list[float]:
    """What the coefficients multiply, in the order of NAMES: shares of the step."""
    gpu, llm = gpu_entry(row.gpu).gpu, benchmark_llm(mlenergy, row.architecture, row.precision)
    tokens, layers = row.batch * (1.0 + row.prompt_per_output), float(llm.n_layers)
    bytes_s, flops_s = (jax.device_get(ideal(gpu, llm, row.tp)) for ideal in (ideal_bytes, ideal_flops))
    kv_s = bytes_s.step_s(row.batch, row.context_tokens) - bytes_s.step_s(row.batch, 0.0)
    # Prompts come in few steps: most touch the experts of the sequences alone.
    expert_bytes_s = float(bytes_s.expert_s * expert_coverage(llm.expert_share, row.batch))
    active = float(llm.n_expert_params * llm.expert_share)
    of_experts = active / (active + float(llm.n_dense_params))
    flop_s = float(flops_s.per_seq_s) * tokens
    gemm_flop_s, expert_flop_s = (1.0 - of_experts) * flop_s, of_experts * flop_s
    reach = 0.55 if row.precision == "fp8" else 0.68
    gemm_s = ((float(bytes_s.base_s) / 0.85) ** 3 + (gemm_flop_s / reach) ** 3) ** (1 / 3) + layers * 12e-6
    expert_s = _experts_s(folder, row, tokens, float(llm.n_expert_params)) if active else 0.0
    hidden_bytes = 2 * tokens * _hidden(mlenergy, row.architecture)
    small_s = layers * 5 * (2.5e-6 + 2 * hidden_bytes / float(gpu.bandwidth_bytes_per_s) / 0.7)
    reduce_s = 2 * layers * (10e-6 + 2 * (row.tp - 1) / row.tp * hidden_bytes / LINK_BYTES_PER_S[row.gpu] / 0.7)
    kernels_s = gemm_s + expert_s + float(kv_s) / 0.7 + layers * 7e-6 + small_s + (row.tp > 1) * reduce_s
    whole_s = row.iteration_s
    fit = min(1.0, whole_s / kernels_s)  # estimates longer than the step are shortened
    gap = 1.0 - fit * kernels_s / whole_s
    blocks = active > 0 and row.precision != "bf16" and row.architecture not in PER_TENSOR
    flops = sum(
        fit * seconds / whole_s * _bent(min(1.0, of / (fit * seconds)))
        for seconds, of in ((gemm_s, gemm_flop_s), (expert_s, expert_flop_s))
        if seconds
    )
    memory = (float(bytes_s.base_s) / whole_s, float(kv_s) / whole_s, expert_bytes_s / whole_s)
    return [gap * (not blocks), *memory, flops, 1.0 - gap, gap * blocks]


def _bent(share: float) -> float:
    return (share + LEAST_SHARE) ** FLOP_POWER - LEAST_SHARE**FLOP_POWER


def _experts_s(folder: Path, row: Row, tokens: float, n_expert_params: float) -> float:
    """Time of the experts of all layers, from the kernel tables [s]."""
    hidden, width, _, n_experts = EXPERTS[row.architecture]
    dtype = {"bf16": "bfloat16", "mxfp4": "w4a16_mxfp4", "fp8": "fp8_block"}[row.precision]
    dtype = "fp8" if row.architecture in PER_TENSOR and row.precision == "fp8" else dtype
    whole_experts = dtype != "w4a16_mxfp4"  # experts are divided among the GPUs, but those of gpt-oss are sliced
    divided = (1.0, float(row.tp)) if whole_experts else (float(row.tp), 1.0)
    sizes, seconds = _expert_table(folder, row.gpu, row.architecture, dtype, divided)
    n_layers = n_expert_params / (3 * hidden * width * n_experts)
    return n_layers * float(np.exp(np.interp(np.log(tokens), np.log(sizes), np.log(seconds))))


@cache
def _expert_table(
    folder: Path, gpu: str, architecture: str, dtype: str, divided: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    names = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    table = pq.read_table(folder / TABLES[gpu] / "moe.vllm-0.24.0.parquet")
    rows = {name: table[name].to_numpy() for name in table.column_names}
    chosen = (rows["moe_dtype"] == dtype) & (rows["distribution"] == "power_law_1.2")
    for name, value in zip(names, (*EXPERTS[architecture], *divided)):
        chosen &= rows[name] == value
    tokens, seconds = rows["num_tokens"][chosen], rows["latency"][chosen] * 1e-3
    sizes = np.unique(tokens)
    return sizes, np.array([seconds[tokens == size].min() for size in sizes])


@cache
def _hidden(mlenergy: Path, architecture: str) -> float:
    with (mlenergy / "model_arch.csv").open(newline="") as file:
        return next(float(line["hidden"]) for line in csv.DictReader(file) if line["arch"] == architecture)
