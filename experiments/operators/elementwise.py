"""Launches of the smallest kernels and the memory's bytes/s: `fleetopt_jax/laws/operators/elementwise.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fleetopt_jax.catalog.gpus import GPUS

from ._fitting import LICENCE, TABLES, rounded

SOURCE = "projected: the smallest 16-bit GEMMs and the longest decode attentions of ai-dynamo/aiconfigurator (095f58a)"
SMALL_BYTES, LARGE_BYTES = 200e3, 1e9  # next to nothing to do; next to nothing but bytes
SMALL_ROWS = 16


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class. It has no errors: nobody has timed these operators."""
    gpus = {gpu: {"bf16": _entry(gpu, folder / table)} for gpu, table in TABLES.items()}
    return {"source": SOURCE, "licence": LICENCE, "gpus": gpus}


def _entry(gpu: str, folder: Path) -> dict[str, Any]:
    launches_s, efficiencies = _launches_s(folder), _efficiencies(gpu, folder)
    coefficients = {"launch_s": np.median(launches_s), "efficiency": np.median(efficiencies)}
    return {
        "coefficients": {name: rounded(value) for name, value in coefficients.items()},
        "rows": 0,
        "left_out": "",
        "borrowed_from": "the smallest GEMMs and the longest decode attentions: no table times these operators",
    }


def _launches_s(folder: Path) -> np.ndarray:
    """Times of the 16-bit GEMMs that move next to nothing [s]."""
    table = _table(folder, "gemm", ("m", "n", "k", "latency"), ("gemm_dtype", "bfloat16"))
    m, n, k = table["m"], table["n"], table["k"]
    small = (2.0 * (m * k + n * k + m * n) < SMALL_BYTES) & (m <= SMALL_ROWS)
    return 1e-3 * table["latency"][small]


def _efficiencies(gpu: str, folder: Path) -> np.ndarray:
    """Shares of the bandwidth that decode attention reaches on a long 16-bit KV cache [-]."""
    names = ("batch_size", "step", "num_heads", "num_key_value_heads", "latency")
    table = _table(folder, "generation_attention", names, ("kv_cache_dtype", "bfloat16"), ("head_dim", "window_size"))
    heads = np.where(table["num_key_value_heads"] > 0, table["num_key_value_heads"], table["num_heads"])
    n_bytes = 4.0 * table["batch_size"] * table["step"] * heads * table.get("head_dim", 128)
    long = (n_bytes > LARGE_BYTES) & (table.get("window_size", np.zeros(len(heads))) == 0)
    return n_bytes[long] / (1e-3 * table["latency"][long]) / GPUS[gpu].bandwidth_bytes_per_s


def _table(
    folder: Path, operator: str, names: tuple[str, ...], only: tuple[str, str], where_varied: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Columns of the newest table of an operator, where its column `only` has that value or is the same throughout."""
    path = max(folder.glob(f"{operator}.vllm-*.parquet"))
    has = pq.read_schema(path).names
    columns = [*names, *(name for name in where_varied if name in has)]
    table = pq.read_table(path, columns=columns, filters=[(only[0], "=", only[1])] if only[0] in has else None)
    return {name: table[name].to_numpy().astype(float) for name in columns}
