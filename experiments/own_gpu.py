"""How few timings of one's own GPU are enough: public tables, cut to a few rows, by a lender of another kind.

    python experiments/own_gpu.py FOLDER        # the folder of `fit_operators.py`

Of each GPU 30 and 100 rows are drawn of its 16-bit products and its attention of prompts and of single tokens, as
`measure_gpu.py` would time them, and fitted as one's own GPU's are. The GPU's own time of Llama-3.1-8B by those laws,
and by the lender's alone, is compared with that by the laws of the whole tables: mean relative errors over eight
decoding steps (1 to 256 sequences of 1,000 and 8,000 tokens) and two prompts (1,024 and 8,192 tokens).
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _results import write_table
from fit_operators import CLASSES, own_operators
from operators._fitting import TABLES, Tables

from fleetopt_jax.catalog.gpus import GPUS, GpuEntry
from fleetopt_jax.catalog.llms import LLMS
from fleetopt_jax.catalog.steps import Parallelism, step_entry
from fleetopt_jax.laws.mixed_step import MixedStep, decoding, with_prompts

LENDERS = {"a100": "h100", "l40s": "h100", "rtx-pro-6000": "b200", "h200": "a100", "b200": "h100"}
ROWS = (30, 100)
LLM = "llama-3.1-8b"
DRAWN = {  # table, class, and rows that engines have: of large matrices, of whole prompts, of a context
    "gemm": ("gemm", lambda row: row["n"] * row["k"] > 2e6),
    "context_attention": ("prefill_attention", lambda row: row["isl"] >= 64),
    "generation_attention": ("decode_attention", lambda row: row["step"] >= 255),
}
USUAL = {"gemm_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "head_dim": 128, "window_size": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    rows = list(scores(parser.parse_args().folder))
    write_table("own_gpu.csv", list(rows[0]), [list(row.values()) for row in rows])
    for row in rows:
        print("  ".join(f"{value:.1%}" if isinstance(value, float) else f"{value!s:13s}" for value in row.values()))


def scores(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each GPU and number of timings; 0: all borrowed."""
    draw = np.random.default_rng(0)
    for gpu, lender in LENDERS.items():
        lent = replace(GPUS[gpu], name="own", borrows=lender)
        for n in (0, *ROWS):
            own = replace(lent, operators=tuple(own_operators(fitted(folder, lent, gpu, n, draw)))) if n else lent
            wrong = {
                f"{what}_error": float(np.mean(np.abs(time(step(own)) / time(step(GPUS[gpu])) - 1.0)))
                for what, time in (("decode", decode_s), ("prompt", prompt_s))
            }
            yield {"gpu": gpu, "lender": lender, "rows_of_each": n, **wrong}


def fitted(folder: Path, entry: GpuEntry, gpu: str, n: int, draw: np.random.Generator) -> dict[str, dict[str, Any]]:
    """The fits to n rows of each table."""
    public = Tables(GPUS[gpu], folder / TABLES[gpu])
    with TemporaryDirectory() as own:
        for table, (_, has) in DRAWN.items():
            rows = [row for row in pq.read_table(public.path(table)).to_pylist() if is_usual(row) and has(row)]
            chosen = [rows[i] for i in draw.permutation(len(rows))[:n]]
            pq.write_table(pa.Table.from_pylist(chosen), Path(own) / f"{table}.drawn-1.parquet")
        tables = Tables(entry, Path(own), entry.borrows)
        return {name: CLASSES[name].variants(tables) for name, _ in DRAWN.values()}


def is_usual(row: dict[str, Any]) -> bool:
    """Of 16 bits, grouped heads of 128, without a window."""
    grouped = "num_heads" not in row or row["num_heads"] != row["num_key_value_heads"]
    return grouped and all(row.get(name, value) == value for name, value in USUAL.items())


def step(gpu: GpuEntry) -> MixedStep:
    return step_entry(LLMS[LLM].architecture, gpu, Parallelism(), "bf16").step


def decode_s(of: MixedStep) -> np.ndarray:
    return np.array([float(of.gpu_s(decoding(n, c))) for n in (1.0, 8.0, 64.0, 256.0) for c in (1000.0, 8000.0)])


def prompt_s(of: MixedStep) -> np.ndarray:
    return np.array([float(of.gpu_s(with_prompts(decoding(0.0, 0.0), tokens))) for tokens in (1024.0, 8192.0)])


if __name__ == "__main__":
    main()
