"""Launches of the smallest kernels and the memory's bytes/s: `fleetopt_jax/laws/operators/elementwise.py`."""

from pathlib import Path
from typing import Any

import numpy as np

from ._fitting import LICENCE, Rows, Tables, by_gpu, rounded, where

SOURCE = "projected: the smallest 16-bit GEMMs and the longest decode attentions of ai-dynamo/aiconfigurator (095f58a)"
SMALL_BYTES, LARGE_BYTES = 200e3, 1e9  # next to nothing to do; next to nothing but bytes
SMALL_ROWS = 16


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class. It has no errors: nobody has timed these operators."""
    return {"source": SOURCE, "licence": LICENCE, "gpus": by_gpu(folder, lambda tables: {"bf16": _entry(tables)})}


def _entry(tables: Tables) -> dict[str, Any]:
    coefficients = {"launch_s": np.median(_launches_s(tables)), "efficiency": np.median(_efficiencies(tables))}
    return {
        "coefficients": {name: rounded(value) for name, value in coefficients.items()},
        "rows": 0,
        "left_out": "",
        "borrowed_from": "the smallest GEMMs and the longest decode attentions: no table times these operators",
    }


def _launches_s(tables: Tables) -> np.ndarray:
    """Times of the 16-bit GEMMs that move next to nothing [s]."""
    table = _of_type(tables.rows("gemm"), "gemm_dtype")
    m, n, k = table["m"], table["n"], table["k"]
    small = (2.0 * (m * k + n * k + m * n) < SMALL_BYTES) & (m <= SMALL_ROWS)
    return table["seconds"][small]


def _efficiencies(tables: Tables) -> np.ndarray:
    """Shares of the bandwidth that decode attention reaches on a long 16-bit KV cache [-]."""
    table = _of_type(tables.rows("generation_attention"), "kv_cache_dtype")
    heads = np.where(table["num_key_value_heads"] > 0, table["num_key_value_heads"], table["num_heads"]).astype(float)
    n_bytes = 4.0 * table["batch_size"] * table["step"] * heads * table.get("head_dim", 128)
    long = (n_bytes > LARGE_BYTES) & (table.get("window_size", np.zeros(len(heads))) == 0)
    return n_bytes[long] / table["seconds"][long] / tables.entry.bandwidth_bytes_per_s


def _of_type(table: Rows, column: str) -> Rows:
    """The rows of 16 bits, where a table has others."""
    return where(table, table[column] == "bfloat16") if column in table else table
