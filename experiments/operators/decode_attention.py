"""Decode attention: the coefficients of `fleetopt_jax/laws/operators/attention.py`.

The newest vLLM table of each GPU, the fastest of the kernels timed. Fitted and tried on what an engine runs: 1,024
sequences or fewer, contexts of 256 tokens or more, longer than the window (others are those without). Left out: heads
of 512, and of 192 where the KV cache is fp8, whose kernels are others, in few models; as many query heads as key-value
heads in FlashAttention 2 (A100, L40S, RTX PRO 6000 in 16 bits), which does not split them among blocks: on A100 23 us
for each 1,024 tokens of context, however empty the GPU.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fleetopt_jax.laws.operators.attention import HEAD_DIM, make_decode_attention_law, timed_decode_attention_s

from ._attention import SHAPE, cache_bounds, document, entry, usual_heads, variants_of, window_tokens
from ._fitting import Bounds, Rows, Tables, where

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
UNSPLIT = ("a100", "l40s", "rtx-pro-6000")  # whose 16-bit kernel is FlashAttention 2


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: coefficients by GPU and type of KV cache, and how well they describe its table."""
    return document(folder, variants)


def variants(tables: Tables) -> dict[str, Any]:
    """The types of KV cache that a GPU has a table of."""
    return variants_of(tables, "generation_attention", "step", _variant)


def _variant(tables: Tables, name: str, value_bytes: float, rows: Rows, full: dict[str, float]) -> dict[str, Any]:
    context = rows["step"] + 1
    rows = where(rows, (rows["batch_size"] <= 1024) & (context >= 256) & (context > rows["window_size"]))
    usual = usual_heads(rows, value_bytes)
    reasons = [f"{np.sum(~usual)} rows of heads of 512, or 192 in fp8"] if np.any(~usual) else []
    if tables.known in UNSPLIT and value_bytes == 2.0 and not full:
        unsplit = rows["num_heads"] == rows["num_key_value_heads"]
        reasons.append(f"{np.sum(unsplit)} rows of multi-head attention")
        usual &= ~unsplit
    if not tables.enough(usual, f"decode_attention {name}"):
        return {}
    fixed = {"value_bytes": value_bytes}
    if np.all(rows["head_dim"] == HEAD_DIM):
        fixed |= {"byte_narrow": 1.0, "byte_wide": 1.0, "head_growth": 1.0}  # nothing to tell them from
    bounds = {each: values for each, values in {**BOUNDS, **cache_bounds(tables)}.items() if each not in fixed}
    bounds = tables.start("decode_attention", name, bounds)
    seconds = partial(_seconds, tables.gpu, fixed)
    found = entry(seconds, where(rows, usual), bounds, "step", hold=tables.hold, left_out=", ".join(reasons))
    found["coefficients"] |= fixed
    return found


def _seconds(gpu: Any, fixed: dict[str, float], coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    seen = np.minimum(rows["step"] + 1.0, window_tokens(rows))  # the new token attends to itself, too
    heads, kv_heads, head_dim = (rows[name].astype(float) for name in SHAPE[:3])
    law = make_decode_attention_law(**{**coefficients, **fixed})
    n = rows["batch_size"].astype(float)
    return np.asarray(timed_decode_attention_s(law, gpu, n, n * seen, heads, kv_heads, head_dim))
