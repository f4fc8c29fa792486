"""Prefill attention: the coefficients of `fleetopt_jax/laws/operators/attention.py`.

The newest vLLM table of each GPU, the fastest of the kernels timed. Fitted and tried on what an engine runs: 64 tokens or
more a prompt, 65,536 or fewer in all, longer than the window (others are those without). Left out: heads of 512, and of
192 where the KV cache is fp8, whose kernels are others, in few models.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.laws.operators.attention import causal_pairs, make_prefill_attention_law, prefill_attention_s

from ._attention import SHAPE, document, entry, usual_heads, window_tokens
from ._fitting import Bounds, Rows, where

BOUNDS: Bounds = {
    "launch_s": (1e-5, 1e-6, 1e-4),
    "flop_excess": (1.5, 0.8, 20.0),
    "flop_narrow": (0.7, 1e-3, 3.0),
    "flop_wide": (0.9, 1e-3, 3.0),
    "operand_excess": (3.0, 0.3, 50.0),
    "operand_narrow": (0.5, 1e-3, 3.0),
    "operand_wide": (0.5, 1e-3, 3.0),
    "kv_excess": (2.0, 0.1, 100.0),
    "base_heads": (0.5, 1e-3, 100.0),
    "fill_blocks": (100.0, 0.1, 5000.0),
    "sharpness": (1.1, 1.0, 9.0),
}


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: the coefficients of every GPU and type of KV cache, and how well they describe its table."""
    return document(folder, "context_attention", "isl", _variant)


def _variant(gpu: str, value_bytes: float, rows: Rows) -> dict[str, Any]:
    new_tokens = rows["batch_size"] * rows["isl"]
    rows = where(rows, (rows["isl"] >= 64) & (new_tokens <= 65536) & (rows["isl"] > rows["window_size"]))
    usual = usual_heads(rows, value_bytes)
    left_out = f"{np.sum(~usual)} rows of heads of 512, or 192 in fp8" if np.any(~usual) else ""
    return entry(partial(_seconds, gpu_entry(gpu).gpu), where(rows, usual), BOUNDS, "isl", left_out=left_out)


def _seconds(gpu: Any, coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    prompts, tokens = rows["batch_size"], rows["isl"].astype(float)
    pairs = prompts * causal_pairs(tokens, 0.0, window_tokens(rows))
    heads, kv_heads, head_dim = (rows[name].astype(float) for name in SHAPE[:3])
    law = make_prefill_attention_law(**coefficients)
    return prefill_attention_s(law, gpu, prompts * tokens, pairs, heads, kv_heads, head_dim)
