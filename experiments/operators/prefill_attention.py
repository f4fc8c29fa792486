"""Prefill attention: the coefficients of `fleetopt_jax/laws/operators/attention.py`.

The newest vLLM table of each GPU, the fastest of the kernels timed. Fitted and tried on what an engine runs: 64 tokens
or more a prompt, 65,536 or fewer in all, longer than the window (others are those without). Left out: heads of 512,
and of 192 where the KV cache is fp8, whose kernels are others, in few models.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fleetopt_jax.laws.operators.attention import (
    HEAD_DIM,
    causal_pairs,
    make_prefill_attention_law,
    prefill_attention_s,
)

from ._attention import SHAPE, document, entry, usual_heads, variants_of, window_tokens
from ._fitting import Bounds, Rows, Tables, where

BOUNDS: Bounds = {
    "launch_s": (1e-5, 1e-6, 1e-4),
    "flop_excess": (1.5, 0.8, 20.0),
    "flop_narrow": (0.7, 1e-3, 3.0),
    "flop_wide": (0.9, 1e-3, 3.0),
    "operand_excess": (3.0, 0.3, 50.0),
    "operand_narrow": (0.5, 1e-3, 3.0),
    "operand_wide": (0.5, 1e-3, 3.0),
    "kv_excess": (2.0, 0.1, 100.0),
    "kv_growth": (0.8, 0.1, 1.0),
    "fill_blocks": (100.0, 0.1, 5000.0),
    "sharpness": (1.1, 1.0, 9.0),
}
OF_PAIRS = ("flop_excess", "flop_narrow", "flop_wide")  # which a layer with a window has from those without


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: coefficients by GPU and type of KV cache, and how well they describe its table."""
    return document(folder, variants)


def variants(tables: Tables) -> dict[str, Any]:
    """The types of KV cache that a GPU has a table of."""
    return variants_of(tables, "context_attention", "isl", _variant)


def _variant(tables: Tables, name: str, value_bytes: float, rows: Rows, full: dict[str, float]) -> dict[str, Any]:
    new_tokens = rows["batch_size"] * rows["isl"]
    rows = where(rows, (rows["isl"] >= 64) & (new_tokens <= 65536) & (rows["isl"] > rows["window_size"]))
    usual = usual_heads(rows, value_bytes)
    left_out = f"{np.sum(~usual)} rows of heads of 512, or 192 in fp8" if np.any(~usual) else ""
    if not tables.enough(usual, f"prefill_attention {name}"):
        return {}
    fixed = {name: full[name] for name in OF_PAIRS if full}
    if np.all(rows["head_dim"] == HEAD_DIM):
        fixed |= {name: 1.0 for name in BOUNDS if name.endswith(("narrow", "wide"))}  # nothing to tell them from
    bounds = {name: values for name, values in BOUNDS.items() if name not in fixed}
    bounds = tables.start("prefill_attention", name, bounds)
    seconds = partial(_seconds, tables.gpu, fixed)
    found = entry(seconds, where(rows, usual), bounds, "isl", hold=tables.hold, left_out=left_out)
    found["coefficients"] |= fixed
    return found


def _seconds(gpu: Any, fixed: dict[str, float], coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    prompts, tokens = rows["batch_size"], rows["isl"].astype(float)
    pairs = prompts * causal_pairs(tokens, 0.0, window_tokens(rows))
    heads, kv_heads, head_dim = (rows[name].astype(float) for name in SHAPE[:3])
    law = make_prefill_attention_law(**{**coefficients, **fixed})
    return np.asarray(prefill_attention_s(law, gpu, prompts * tokens, pairs, heads, kv_heads, head_dim))
