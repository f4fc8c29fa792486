"""What the fits share: tables by GPU, rows as columns, a robust fit of logarithmic errors, the entry that is kept."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.optimize import least_squares

SOURCE = "kernel timings of ai-dynamo/aiconfigurator, 095f58a (21 Aug 2026), constant columns dropped"
LICENCE = "Apache-2.0"
TABLES = {  # GPU of the catalog -> folder of its tables
    "a100": "a100_sxm",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
ROBUST_ERROR = 0.1  # an error beyond this counts by its size, not by its square
HELD_OUT_EVERY = 5
FITTED_ROWS = 6000  # drawn of a table's, for a dozen coefficients; errors are of all

Rows = dict[str, np.ndarray]
Bounds = Mapping[str, tuple[float, float, float]]  # coefficient -> (where to start, least, most), all positive


def newest_rows(folder: Path, gpu: str, operator: str) -> Rows:
    """The newest table of an operator on a GPU, as columns; `seconds` instead of its milliseconds."""

    def version(path: Path) -> tuple[int, ...]:
        return tuple(int(part) for part in path.stem.rsplit("-", 1)[1].split("."))

    table = pq.read_table(max((folder / TABLES[gpu]).glob(f"{operator}.*.parquet"), key=version))
    rows = {name: np.asarray(table[name].to_pylist()) for name in table.column_names}
    return {**rows, "seconds": rows.pop("latency") * 1e-3}


def where(rows: Rows, chosen: np.ndarray) -> Rows:
    """Those rows, by a mask or by indices."""
    return {name: column[chosen] for name, column in rows.items()}


def groups(rows: Rows, names: tuple[str, ...]) -> np.ndarray:
    """The number of the group that a row is in: rows of equal columns."""
    codes = np.column_stack([np.unique(rows[name], return_inverse=True)[1] for name in names])
    return np.unique(codes, axis=0, return_inverse=True)[1].ravel()


def fastest(rows: Rows, names: tuple[str, ...]) -> Rows:
    """Of rows of equal columns the fastest: what an engine that picks the kernel runs."""
    of = groups(rows, names)
    order = np.lexsort((rows["seconds"], of))
    first = np.concatenate([[True], np.diff(of[order]) > 0])
    return where(rows, order[first])


def log_spacing(values: np.ndarray) -> np.ndarray:
    """Weights by which rows count evenly on a logarithmic scale of `values` [-]."""
    steps, at = np.unique(values, return_inverse=True)
    share = np.gradient(np.log2(steps)) / np.bincount(at)
    return (share * len(values) / np.sum(share * np.bincount(at)))[at]


def fitted(
    seconds: Callable[[dict[str, float], Rows], np.ndarray], rows: Rows, bounds: Bounds, weights: np.ndarray
) -> dict[str, float]:
    """The coefficients whose `seconds` are nearest to the rows', by weighted logarithmic ratios with a robust loss."""
    drawn = np.random.default_rng(0).permutation(len(weights))[:FITTED_ROWS]
    rows, weights, names = where(rows, drawn), weights[drawn], tuple(bounds)
    start, least, most = (np.log([bounds[name][i] for name in names]) for i in range(3))
    root = np.sqrt(weights)

    def residuals(logs: np.ndarray) -> np.ndarray:
        return root * np.log(seconds(dict(zip(names, np.exp(logs))), rows) / rows["seconds"])

    found = least_squares(residuals, start, bounds=(least, most), loss="soft_l1", f_scale=ROBUST_ERROR, xtol=1e-6)
    return {name: rounded(value) for name, value in zip(names, np.exp(found.x))}


def entry(
    seconds: Callable[[dict[str, float], Rows], np.ndarray],
    rows: Rows,
    bounds: Bounds,
    weights: np.ndarray,
    shape: tuple[str, ...],
    **kept: Any,
) -> dict[str, Any]:
    """The fit of one data type and its errors; once more with every fifth shape left out, tried on those."""
    found = fitted(seconds, rows, bounds, weights)

    def again(kept: np.ndarray) -> dict[str, float]:
        return fitted(seconds, where(rows, kept), bounds, weights[kept])

    return {**described(seconds, rows, found, again, shape), **kept}


def described(
    seconds: Callable[[dict[str, float], Rows], np.ndarray],
    rows: Rows,
    found: dict[str, float],
    again: Callable[[np.ndarray], dict[str, float]],
    shape: tuple[str, ...],
) -> dict[str, Any]:
    """The coefficients with their errors on all rows, and on every fifth shape of a fit `again` to the others."""
    wrong = np.abs(seconds(found, rows) / rows["seconds"] - 1.0)
    held = groups(rows, shape) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    unseen = np.abs(seconds(again(~held), where(rows, held)) / rows["seconds"][held] - 1.0)
    return {
        "coefficients": found,
        "rows": len(wrong),
        "median_error": float(np.median(wrong)),
        "p90_error": float(np.quantile(wrong, 0.9)),
        "held_out_median_error": float(np.median(unseen)),
    }


def borrowed(of: dict[str, Any], lender: str, changed: Mapping[str, float]) -> dict[str, Any]:
    """The entry of what has no rows: another's coefficients, some of them changed."""
    coefficients = {**of["coefficients"], **changed}
    return {"coefficients": coefficients, "rows": 0, "left_out": "", "borrowed_from": lender}


def with_borrowers(gpus: dict[str, dict[str, Any]], borrowers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """With the GPUs that have no table, and all of another's entries."""
    lent = {
        gpu: {name: borrowed(of, lender, {}) for name, of in gpus[lender].items()} for gpu, lender in borrowers.items()
    }
    return gpus | lent


def rounded(value: float) -> float:
    """To five significant digits."""
    return float(f"{value:.5g}")


def rounded_document(value: Any) -> Any:
    """A document whose floats have five significant digits."""
    if isinstance(value, dict):
        return {key: rounded_document(inner) for key, inner in value.items()}
    return rounded(value) if isinstance(value, float) else value
