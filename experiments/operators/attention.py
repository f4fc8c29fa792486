"""Prefill and decode attention: the coefficients of `fleetopt_jax/laws/operators/attention.py`.

The newest vLLM table of each GPU, the fastest of the kernels timed, by type of KV cache, layers with a sliding window
apart. Fitted and tried on what an engine runs: prefill of 64 tokens or more a prompt and 65,536 or fewer in all; decode of
1,024 sequences or fewer and contexts of 128 tokens or more; contexts longer than the window (others are those without).
Left out: heads of 512, and of 192 where the KV cache is fp8, whose kernels are others (FlashAttention 4, Triton), in few
models; on A100, decode of as many query heads as key-value heads, which vLLM 0.14 did not split among blocks (23 us for
each 1,024 tokens of context, however many GPUs' worth of blocks stay empty).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.laws.operators.attention import (
    causal_pairs,
    make_decode_attention_law,
    make_prefill_attention_law,
    prefill_attention_s,
    timed_decode_attention_s,
)

from ._fitting import (
    HELD_OUT_EVERY,
    LICENCE,
    SOURCE,
    TABLES,
    Bounds,
    Rows,
    fastest,
    fitted,
    groups,
    log_spacing,
    newest_rows,
    where,
)

VARIANTS = {"bfloat16": ("bf16", 2.0), "fp8": ("fp8", 1.0)}  # name, bytes of a value in the KV cache
SHAPE = ("num_heads", "num_key_value_heads", "head_dim", "window_size")
FITTED_ROWS = 3000  # of a variant, evenly picked: more change nothing but the time it takes
L2_BYTES = {  # of the data sheets: where the fit starts to look for what the cache keeps
    "a100": 40e6,
    "h100": 50e6,
    "h200": 50e6,
    "b200": 126e6,
    "b300": 126e6,
    "gb200": 126e6,
    "gb300": 126e6,
    "l40s": 96e6,
    "rtx-pro-6000": 128e6,
}
PREFILL_BOUNDS: Bounds = {
    "launch_s": (1e-5, 1e-6, 1e-4),
    "flop_excess": (1.5, 0.8, 20.0),
    "flop_narrow": (0.7, 1e-3, 3.0),
    "flop_wide": (0.9, 1e-3, 3.0),
    "operand_excess": (3.0, 0.3, 50.0),
    "operand_narrow": (0.5, 1e-3, 3.0),
    "operand_wide": (0.5, 1e-3, 3.0),
    "kv_excess": (2.0, 0.1, 100.0),
    "fill_blocks": (100.0, 0.1, 5000.0),
    "sharpness": (1.1, 1.0, 9.0),
}
DECODE_BOUNDS: Bounds = {
    "launch_s": (1e-5, 1e-6, 1e-4),
    "byte_excess": (1.1, 0.83, 10.0),
    "byte_narrow": (0.9, 1e-3, 3.0),
    "byte_wide": (0.9, 1e-3, 3.0),
    "few_blocks": (1.0, 1e-3, 100.0),
    "kv_head_s": (1e-8, 1e-11, 1e-6),
    "head_s": (1e-9, 1e-11, 1e-6),
    "head_growth": (0.3, 1e-3, 2.0),
    "sharpness": (1.3, 1.0, 9.0),
}

Seconds = Callable[[dict[str, float], Rows], np.ndarray]


def fit_prefill(folder: Path) -> dict[str, Any]:
    """The document of prefill: the coefficients of every GPU and type of KV cache, and how well they describe its table."""
    return _document(folder, _prefill_variant, "context_attention")


def fit_decode(folder: Path) -> dict[str, Any]:
    """The same of decode."""
    return _document(folder, _decode_variant, "generation_attention")


def _document(folder: Path, variant: Callable[..., dict[str, Any]], operator: str) -> dict[str, Any]:
    return {
        "source": SOURCE,
        "licence": LICENCE,
        "gpus": {gpu: _variants(variant, gpu, _rows(folder, gpu, operator)) for gpu in TABLES},
    }


def _rows(folder: Path, gpu: str, operator: str) -> Rows:
    """A table's rows, with the columns that the A100's has as constants."""
    rows = newest_rows(folder, gpu, operator)
    for name, constant in (("head_dim", 128), ("kv_cache_dtype", "bfloat16"), ("window_size", 0)):
        rows.setdefault(name, np.full(len(rows["seconds"]), constant))
    size = "isl" if operator == "context_attention" else "step"
    return fastest(rows, (*SHAPE, "kv_cache_dtype", "batch_size", size))


def _variants(variant: Callable[..., dict[str, Any]], gpu: str, rows: Rows) -> dict[str, Any]:
    found = {}
    for kind, (name, value_bytes) in VARIANTS.items():
        for windowed in (False, True):
            its = (rows["kv_cache_dtype"] == kind) & ((rows["window_size"] > 0) == windowed)
            if np.any(its):
                found[f"{name}_windowed" if windowed else name] = variant(gpu, value_bytes, where(rows, its))
    return found


def _prefill_variant(gpu: str, value_bytes: float, rows: Rows) -> dict[str, Any]:
    new_tokens = rows["batch_size"] * rows["isl"]
    usual = (rows["isl"] >= 64) & (new_tokens <= 65536) & (rows["isl"] > rows["window_size"])
    rows, left_out = _kept(gpu, value_bytes, where(rows, usual), decode=False)
    return entry(partial(_prefill_seconds, gpu_entry(gpu).gpu), rows, PREFILL_BOUNDS, "isl", left_out=left_out)


def _decode_variant(gpu: str, value_bytes: float, rows: Rows) -> dict[str, Any]:
    context = rows["step"] + 1
    usual = (rows["batch_size"] <= 1024) & (context >= 128) & (context > rows["window_size"])
    rows, left_out = _kept(gpu, value_bytes, where(rows, usual), decode=True)
    bounds = {
        **DECODE_BOUNDS,
        "cached_bytes": tuple(share * L2_BYTES[gpu] for share in (0.9, 0.4, 1.3)),
        "cached_frac": (0.5, 0.02, 1.0),
    }
    seconds = partial(_decode_seconds, gpu_entry(gpu).gpu, value_bytes)
    found = entry(seconds, rows, bounds, "step", left_out=left_out)
    found["coefficients"]["value_bytes"] = value_bytes
    return found


def _kept(gpu: str, value_bytes: float, rows: Rows, *, decode: bool) -> tuple[Rows, str]:
    """The rows that are fitted, and what was left out of them."""
    other = rows["head_dim"] == 512
    if value_bytes == 1.0:
        other |= rows["head_dim"] == 192
    reasons = [f"{np.sum(other)} rows of heads of 192 (fp8) or 512"] if np.any(other) else []
    if gpu == "a100" and decode:
        unsplit = rows["num_heads"] == rows["num_key_value_heads"]
        reasons.append(f"{np.sum(unsplit)} rows of multi-head attention")
        other |= unsplit
    return where(rows, ~other), ", ".join(reasons)


def _prefill_seconds(gpu: Any, coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    window = np.where(rows["window_size"] > 0, rows["window_size"], np.inf)
    prompts, tokens = rows["batch_size"], rows["isl"].astype(float)
    pairs = prompts * causal_pairs(tokens, 0.0, window)
    heads, kv_heads, head_dim = (rows[name].astype(float) for name in SHAPE[:3])
    law = make_prefill_attention_law(**coefficients)
    return prefill_attention_s(law, gpu, prompts * tokens, pairs, heads, kv_heads, head_dim)


def _decode_seconds(gpu: Any, value_bytes: float, coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    window = np.where(rows["window_size"] > 0, rows["window_size"], np.inf)
    seen = np.minimum(rows["step"] + 1.0, window)  # the new token attends to itself, too
    heads, kv_heads, head_dim = (rows[name].astype(float) for name in SHAPE[:3])
    law = make_decode_attention_law(**coefficients, value_bytes=value_bytes)
    n = rows["batch_size"].astype(float)
    return timed_decode_attention_s(law, gpu, n, n * seen, heads, kv_heads, head_dim)


def entry(seconds: Seconds, rows: Rows, bounds: Bounds, size: str, *, left_out: str) -> dict[str, Any]:
    """The fit of a variant to evenly picked rows and its errors on all; again without every fifth shape, tried on those."""
    found = _found(seconds, rows, bounds, size)
    wrong = np.abs(seconds(found, rows) / rows["seconds"] - 1.0)
    held = groups(rows, SHAPE) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    near = {name: (found[name], least, most) for name, (_, least, most) in bounds.items()}
    fewer = _found(seconds, where(rows, ~held), near, size)
    unseen = np.abs(seconds(fewer, where(rows, held)) / rows["seconds"][held] - 1.0)
    return {
        "coefficients": found,
        "rows": len(wrong),
        "left_out": left_out,
        "median_error": float(np.median(wrong)),
        "p90_error": float(np.quantile(wrong, 0.9)),
        "held_out_median_error": float(np.median(unseen)),
    }


def _found(seconds: Seconds, rows: Rows, bounds: Bounds, size: str) -> dict[str, float]:
    """The fit to every k-th row, so that about `FITTED_ROWS` count, evenly on a logarithmic scale of `size`."""
    step = max(len(rows["seconds"]) // FITTED_ROWS, 1)
    picked = where(rows, np.arange(0, len(rows["seconds"]), step))
    return fitted(seconds, picked, bounds, log_spacing(picked[size]))
