"""Board watts of operators looped alone: `fleetopt_jax/laws/operators/watts.py`.

A meter that averages over about a second reads loops that are shorter, or start from another load, too low or too high.
Rows count where it had settled: watts within 8 % of those of the next smaller and the next larger shape of the same
sweep, and not 10 % below those of a smaller shape.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.optimize import least_squares

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.laws.operators.watts import OperatorWatts, operator_w
from operators._fitting import HELD_OUT_EVERY, LICENCE, SOURCE, TABLES, Rows, groups, where

GPUS = ("h200", "b200", "gb200")
BORROWED = {  # no watts were published of these GPUs, or not of all their operators: fractions of the TDP carry over
    "gb200": ("b200",),
    "b200": ("gb200",),
    "h200": ("b200",),
    "a100": ("h200",),
    "h100": ("h200",),
    "l40s": ("h200",),
    "b300": ("b200",),
    "gb300": ("gb200",),
    "rtx-pro-6000": ("b200",),
}
NO_FP4 = ("a100", "h100", "h200", "l40s")
CACHE_BYTES = {"h200": 50e6, "b200": 126e6, "gb200": 126e6}  # second-level: a loop over less does not reach the memory
SETTLED, FALLEN = 0.08, 0.10
WEIGHT_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625}
PEAK_FACTOR = {"bfloat16": 1.0, "fp8": 2.0, "fp8_block": 2.0, "nvfp4": 4.0}  # of the 16-bit peak
NAMES = ("busy_frac", "memory_frac", "flop_frac", "flop_power")
START, LEAST, MOST = (0.05, 0.6, 1.0, 0.7), (0.0, 0.0, 0.0, 0.2), (0.5, 1.5, 2.5, 1.0)
UNSETTLED = "rows the meter had not settled on; loops that the cache holds"
SHARE_EDGES = (
    np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    np.array([1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
)


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: the coefficients of every GPU and kind of operator, and how well they describe it."""
    gpus: dict[str, dict[str, Any]] = {gpu: {} for gpu in TABLES}
    for gpu in GPUS:
        for operator, read in READERS.items():
            for dtype, rows in _by_dtype(gpu, read(folder / TABLES[gpu])).items():
                gpus[gpu][f"{operator}_{dtype}"] = _entry(gpu, rows)
    for gpu, lenders in BORROWED.items():
        for lender in lenders:
            for variant, lent in gpus[lender].items():
                if gpu in NO_FP4 and variant.endswith("fp4"):
                    continue
                borrowed = {"coefficients": lent["coefficients"], "rows": 0, "borrowed_from": lender}
                gpus[gpu].setdefault(variant, borrowed)
    return {"source": f"{SOURCE}, engine 0.22, with watts", "licence": LICENCE, "gpus": gpus}


def _table(folder: Path, operator: str) -> Rows:
    table = pq.read_table(folder / f"{operator}.vllm-0.22.0.parquet")
    rows = {name: table[name].to_numpy() for name in table.column_names}
    kept = {name: x.astype(float) if x.dtype != object else x.astype(str) for name, x in rows.items()}
    return {**kept, "seconds": kept.pop("latency") * 1e-3}


def _gemm(folder: Path) -> Rows:
    rows = _table(folder, "gemm")
    m, n, k, dtype = (rows[name] for name in ("m", "n", "k", "gemm_dtype"))
    weights = n * k * _of(WEIGHT_BYTES, dtype)
    rows |= {"dtype": dtype, "bytes": weights + m * k * _of(WEIGHT_BYTES, dtype) + 2 * m * n, "flops": 2 * m * n * k}
    rows |= {"settled": _settled(rows, ("gemm_dtype", "n", "k"), "m"), "shape": groups(rows, ("n", "k"))}
    return where(rows, dtype != "fp8_block")  # those have a floor of host launches


def _prefill_attention(folder: Path) -> Rows:
    rows = _table(folder, "context_attention")
    batch, tokens, heads, kv_heads, size, window = (
        rows[name] for name in ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "window_size")
    )
    kv_heads, seen = np.where(kv_heads == 0, heads, kv_heads), np.where(window == 0, tokens, np.minimum(window, tokens))
    rows["bytes"] = batch * tokens * size * 2 * 2 * (heads + kv_heads)
    rows["flops"] = 4 * batch * heads * size * (seen * tokens - seen**2 / 2)
    sweep = ("batch_size", "num_heads", "num_key_value_heads", "head_dim", "window_size", "kv_cache_dtype")
    rows |= {"settled": _settled(rows, sweep, "isl"), "shape": groups(rows, sweep[1:4])}
    return {**rows, "dtype": np.full(len(tokens), "bfloat16")}


def _experts(folder: Path) -> Rows:
    rows = _table(folder, "moe")
    if "hidden_size" not in rows:  # GB200: a table of one model that does not say which
        return {}
    tokens, hidden, width, k, n_experts, tp, ep = (
        rows[name]
        for name in ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    )
    dtype = rows["moe_dtype"]
    touched = n_experts / ep * (1.0 - (1.0 - k / n_experts) ** tokens)
    one = 3 * hidden * width / tp
    rows |= {"dtype": dtype, "bytes": touched * one * _of(WEIGHT_BYTES, dtype) + 4 * tokens * hidden}
    rows["flops"] = 2 * one * tokens * k / ep
    sweep = ("moe_dtype", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    rows["settled"] = _settled(rows, (*sweep, "distribution"), "num_tokens")
    rows["shape"] = groups(rows, sweep[1:5])
    return where(rows, np.isin(dtype, list(PEAK_FACTOR)))


READERS: dict[str, Callable[[Path], Rows]] = {
    "gemm": _gemm,
    "prefill_attention": _prefill_attention,
    "experts": _experts,
}
TYPES = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4"}


def _of(values: dict[str, float], dtype: np.ndarray) -> np.ndarray:
    return np.array([values.get(name, 1.0) for name in dtype])


def _settled(rows: Rows, sweep: tuple[str, ...], size: str) -> np.ndarray:
    """Where the meter had settled: see above."""
    of = groups(rows, sweep)
    order = np.lexsort((rows[size], of))
    watts, first = rows["power"][order], np.diff(of[order], prepend=-1) != 0
    last = np.append(first[1:], True)
    before = np.where(first, np.nan, np.roll(watts, 1))
    after = np.where(last, np.nan, np.roll(watts, -1))
    near = (np.abs(before / watts - 1.0) < SETTLED) & (np.abs(after / watts - 1.0) < SETTLED)
    offset = np.cumsum(first) * 1e5  # a running maximum that starts again with every sweep
    highest = np.maximum.accumulate(np.where(near, watts, 0.0) + offset) - offset
    settled = np.zeros(len(watts), bool)
    settled[order] = near & (watts >= (1.0 - FALLEN) * highest)
    return settled


def _by_dtype(gpu: str, rows: Rows) -> dict[str, Rows]:
    """The rows to fit, with their shares of the peaks, by data type."""
    if not rows:
        return {}
    sheet = gpu_entry(gpu)
    shares = {
        "memory_share": rows["bytes"] / sheet.bandwidth_bytes_per_s / rows["seconds"],
        "flop_share": rows["flops"] / sheet.peak_flop_per_s / _of(PEAK_FACTOR, rows["dtype"]) / rows["seconds"],
    }
    rows = {**rows, **shares}
    cached = (rows["bytes"] < 2 * CACHE_BYTES[gpu]) & (rows["memory_share"] > 0.15)
    kept = where(rows, rows["settled"] & ~cached & (rows["memory_share"] < 1.1))
    return {TYPES[name]: where(kept, kept["dtype"] == name) for name in np.unique(kept["dtype"])}


def _watts(gpu: str, coefficients: np.ndarray, rows: Rows) -> np.ndarray:
    law = OperatorWatts(*coefficients)  # type: ignore[arg-type]
    return np.asarray(operator_w(law, gpu_entry(gpu).gpu, rows["memory_share"], np.minimum(rows["flop_share"], 1.0)))


def _fitted(gpu: str, rows: Rows) -> np.ndarray:
    """Least squares of logarithmic ratios, robust, regions of the shares counting more evenly than their rows do."""
    cells = np.digitize(rows["memory_share"], SHARE_EDGES[0]) * 20 + np.digitize(rows["flop_share"], SHARE_EDGES[1])
    _, of, count = np.unique(cells, return_inverse=True, return_counts=True)
    weight = 1.0 / np.sqrt(count[of] + 20.0)

    def residuals(x: np.ndarray) -> np.ndarray:
        return weight * np.log(_watts(gpu, x, rows) / rows["power"])

    return least_squares(residuals, START, bounds=(LEAST, MOST), loss="soft_l1", f_scale=0.02).x


def _entry(gpu: str, rows: Rows) -> dict[str, Any]:
    found = _fitted(gpu, rows)
    wrong = np.abs(_watts(gpu, found, rows) / rows["power"] - 1.0)
    held = rows["shape"] % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    unseen = where(rows, held)
    fewer = _fitted(gpu, where(rows, ~held))
    below = rows["power"] < 0.9 * gpu_entry(gpu).tdp_w  # where the limit does not say the answer
    return {
        "coefficients": dict(zip(NAMES, map(float, found))),
        "rows": len(wrong),
        "left_out": UNSETTLED,
        "median_error": float(np.median(wrong)),
        "p90_error": float(np.quantile(wrong, 0.9)),
        "below_limit_median_error": float(np.median(wrong[below])),
        "held_out_median_error": float(np.median(np.abs(_watts(gpu, fewer, unseen) / unseen["power"] - 1.0))),
    }
