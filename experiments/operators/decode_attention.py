"""Decode attention: the coefficients of `fleetopt_jax/laws/operators/attention.py`.

The newest vLLM table of each GPU, the fastest of the kernels timed. Fitted and tried on what an engine runs: 1,024 sequences
or fewer, contexts of 128 tokens or more, longer than the window (others are those without). Left out: heads of 512, and
of 192 where the KV cache is fp8, whose kernels are others, in few models; on A100 as many query heads as key-value heads,
which vLLM 0.14 did not split among blocks (23 us for each 1,024 tokens of context, however empty the GPU).
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.laws.operators.attention import make_decode_attention_law, timed_decode_attention_s

from ._attention import L2_BYTES, SHAPE, document, entry, usual_heads, window_tokens
from ._fitting import Bounds, Rows, where

BOUNDS: Bounds = {
    "launch_s": (1e-5, 1e-6, 1e-4),
    "byte_excess": (1.1, 1.0, 10.0),
    "byte_narrow": (0.9, 1e-3, 3.0),
    "byte_wide": (0.9, 1e-3, 3.0),
    "few_blocks": (1.0, 1e-3, 100.0),
    "kv_head_s": (1e-8, 1e-11, 1e-6),
    "head_s": (1e-9, 1e-11, 1e-6),
    "head_growth": (0.3, 1e-3, 2.0),
    "sharpness": (1.3, 1.0, 9.0),
}


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: the coefficients of every GPU and type of KV cache, and how well they describe its table."""
    return document(folder, "generation_attention", "step", _variant)


def _variant(gpu: str, value_bytes: float, rows: Rows) -> dict[str, Any]:
    context = rows["step"] + 1
    rows = where(rows, (rows["batch_size"] <= 1024) & (context >= 128) & (context > rows["window_size"]))
    usual = usual_heads(rows, value_bytes)
    reasons = [f"{np.sum(~usual)} rows of heads of 512, or 192 in fp8"] if np.any(~usual) else []
    if gpu == "a100":
        unsplit = rows["num_heads"] == rows["num_key_value_heads"]
        reasons.append(f"{np.sum(unsplit)} rows of multi-head attention")
        usual &= ~unsplit
    l2_bytes = L2_BYTES[gpu]
    cache = {"cached_bytes": (0.9 * l2_bytes, 0.4 * l2_bytes, 1.3 * l2_bytes), "cached_frac": (0.5, 0.02, 1.0)}
    seconds = partial(_seconds, gpu_entry(gpu).gpu, value_bytes)
    found = entry(seconds, where(rows, usual), {**BOUNDS, **cache}, "step", left_out=", ".join(reasons))
    found["coefficients"]["value_bytes"] = value_bytes
    return found


def _seconds(gpu: Any, value_bytes: float, coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    seen = np.minimum(rows["step"] + 1.0, window_tokens(rows))  # the new token attends to itself, too
    heads, kv_heads, head_dim = (rows[name].astype(float) for name in SHAPE[:3])
    law = make_decode_attention_law(**{**coefficients, "value_bytes": value_bytes})
    n = rows["batch_size"].astype(float)
    return timed_decode_attention_s(law, gpu, n, n * seen, heads, kv_heads, head_dim)
