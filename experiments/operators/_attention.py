"""What the fits of attention share: rows of its tables, and the fit of many rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._fitting import (
    LICENCE,
    SOURCE,
    Bounds,
    Rows,
    Tables,
    borrowed,
    by_gpu,
    described,
    fastest,
    fitted,
    log_spacing,
    where,
)

SHAPE = ("num_heads", "num_key_value_heads", "head_dim", "window_size")
VARIANTS = {"bfloat16": ("bf16", 2.0), "fp8": ("fp8", 1.0)}  # of the KV cache: name, bytes of a value
WINDOWS_BORROWED = {"a100": "l40s"}  # whose kernel is the same, FlashAttention 2
FITTED_ROWS = 1500  # of a variant, evenly picked: more change nothing but the time it takes
SHARPNESSES = (1.1, 4.0)  # from which fits start: the one leads where the other does not
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

Seconds = Callable[[dict[str, float], Rows], np.ndarray]


def variants_of(tables: Tables, operator: str, size: str, variant: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The types of KV cache that a GPU has a table of; `variant(tables, name, value_bytes, rows, full)` fits rows of
    one.

    Layers with a sliding window are a variant of their own, that has the coefficients of the other as `full`.
    """
    rows = _rows(tables.rows(operator), size)
    found = {}
    for kind, (of, value_bytes) in VARIANTS.items():
        full: dict[str, float] = {}
        for windowed in (False, True):
            its = (rows["kv_cache_dtype"] == kind) & ((rows["window_size"] > 0) == windowed)
            name = f"{of}_windowed" if windowed else of
            if np.any(its) and (kept := variant(tables, name, value_bytes, where(rows, its), full)):
                found[name], full = kept, kept["coefficients"]
    return found


def document(folder: Path, variants: Callable[[Tables], dict[str, Any]]) -> dict[str, Any]:
    """The document of a class."""
    gpus = by_gpu(folder, variants)
    for gpu, lender in WINDOWS_BORROWED.items():
        gpus[gpu]["bf16_windowed"] = borrowed(gpus[lender]["bf16_windowed"], lender, {})
    return {"source": SOURCE, "licence": LICENCE, "gpus": gpus}


def _rows(rows: Rows, size: str) -> Rows:
    """The fastest of each shape, with the columns that the A100's table has as constants."""
    for name, constant in (("head_dim", 128), ("kv_cache_dtype", "bfloat16"), ("window_size", 0)):
        rows.setdefault(name, np.full(len(rows["seconds"]), constant))
    return fastest(rows, (*SHAPE, "kv_cache_dtype", "batch_size", size))


def cache_bounds(tables: Tables) -> Bounds:
    """Of what the second-level cache keeps. Of one's own GPU it is not known, and copies that are read in turn leave
    less of it to each."""
    l2_bytes = L2_BYTES.get(tables.known)
    around = (0.9 * l2_bytes, 0.4 * l2_bytes, 1.3 * l2_bytes) if l2_bytes else (1e7, 1e5, 2e8)
    return {"cached_bytes": around, "cached_frac": (0.5, 0.02, 1.0)}


def usual_heads(rows: Rows, value_bytes: float) -> np.ndarray:
    """Rows of the kernels that most models run: not of heads of 512 (FlashAttention 4), nor of 192 in fp8 (Triton)."""
    return (rows["head_dim"] != 512) & ((rows["head_dim"] != 192) | (value_bytes == 2.0))


def window_tokens(rows: Rows) -> np.ndarray:
    """A layer's window, infinite without one."""
    return np.where(rows["window_size"] > 0, rows["window_size"], np.inf)


def entry(
    seconds: Seconds,
    rows: Rows,
    bounds: Bounds,
    size: str,
    shape: tuple[str, ...] = SHAPE,
    *,
    hold: float = 0.0,
    left_out: str,
) -> dict[str, Any]:
    """The fit to evenly picked rows and its errors on all; again without every fifth shape, tried on those."""
    several = "sharpness" in bounds and not hold
    starts = [{**bounds, "sharpness": (start, 1.0, 9.0)} for start in SHARPNESSES] if several else [bounds]
    found = _found(seconds, rows, starts, size, hold)
    near = bounds if hold else {name: (found[name], least, most) for name, (_, least, most) in bounds.items()}

    def again(kept: np.ndarray) -> dict[str, float]:
        return _found(seconds, where(rows, kept), [near], size, hold)

    return {**described(seconds, rows, found, again, shape), "left_out": left_out}


def _found(seconds: Seconds, rows: Rows, starts: Sequence[Bounds], size: str, hold: float) -> dict[str, float]:
    """The best fit to every k-th row, so that about `FITTED_ROWS` count, evenly on a logarithmic scale of `size`."""
    step = max(len(rows["seconds"]) // FITTED_ROWS, 1)
    picked = where(rows, np.arange(0, len(rows["seconds"]), step))
    weights = log_spacing(picked[size])

    def error(found: dict[str, float]) -> float:
        return float(np.mean(weights * np.abs(np.log(seconds(found, picked) / picked["seconds"]))))

    return min((fitted(seconds, picked, bounds, weights, hold) for bounds in starts), key=error)
