"""What the fits share: tables by GPU, rows as columns, a robust fit of logarithmic errors, the entry that is kept."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pyarrow.lib import ArrowException
from scipy.optimize import least_squares

from fleetopt_jax.catalog.gpus import GpuEntry, gpu_entry
from fleetopt_jax.catalog.operators import document as packaged
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.laws.hardware import Gpu

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
OWN_ROWS = 8  # of one's own GPU, below which a data type is not fitted but borrowed
HOLD = 0.03  # of one's own: what a coefficient e times the lender's counts, as the error of a row

Rows = dict[str, np.ndarray]
Bounds = Mapping[str, tuple[float, float, float]]  # coefficient -> (where to start, least, most), all positive


@dataclass(frozen=True)
class Tables:
    """The kernel tables of one GPU: of the nine public ones, or of one's own, whose few rows leave coefficients near
    those of the GPU that lends it the rest."""

    entry: GpuEntry
    folder: Path
    lender: str | None = None  # of one's own, the GPU of the catalog that lends
    too_few: list[str] = field(default_factory=list)  # what was not fitted for that, in words

    @property
    def gpu(self) -> Gpu:
        """Its data sheet."""
        return self.entry.gpu

    @property
    def known(self) -> str:
        """The name of a public table, of which some rows are known to be doubtful; none of one's own."""
        return "" if self.lender else self.entry.name

    @property
    def hold(self) -> float:
        """How coefficients are held where they start."""
        return HOLD if self.lender else 0.0

    def path(self, operator: str) -> Path | None:
        """The newest table of an operator, or of several ways to do the same."""

        def version(path: Path) -> tuple[int, ...]:
            return tuple(int(part) for part in re.findall(r"\d+", path.stem.partition(".")[2]))

        return max(self.folder.glob(f"{operator}.*.parquet"), key=version, default=None)

    def rows(self, operator: str) -> Rows:
        """The newest table of an operator, as columns; `seconds` instead of its milliseconds."""
        path = self.path(operator)
        if path is None:
            raise BadInput(f"{self.folder}", f"has no table {operator}.*.parquet")
        if self.lender:
            _refuse_wrong(path, NEEDED[operator])
        table = pq.read_table(path)
        rows = {name: np.asarray(table[name].to_pylist()) for name in table.column_names}
        return {**rows, "seconds": rows.pop("latency") * 1e-3}

    def enough(self, chosen: np.ndarray, what: str) -> bool:
        """Whether there are rows to fit; of one's own enough, else that is kept."""
        n = int(np.sum(chosen))
        if 0 < n < OWN_ROWS and self.lender:
            self.too_few.append(f"{what}: {n} rows, {OWN_ROWS} are needed")
            return False
        return n > 0

    def start(self, operator: str, variant: str, bounds: Bounds) -> Bounds:
        """Bounds that start where the lender is, if any."""
        if not self.lender:
            return bounds
        lent = packaged(operator)["gpus"].get(self.lender, {}).get(variant, {}).get("coefficients", {})
        return {
            name: (min(max(lent.get(name, start), least), most), least, most)
            for name, (start, least, most) in bounds.items()
        }


NEEDED = {  # columns of a table of one's own
    "gemm": ("m", "n", "k"),
    "context_attention": ("batch_size", "isl", "num_heads", "num_key_value_heads"),
    "generation_attention": ("batch_size", "step", "num_heads", "num_key_value_heads"),
    "custom_allreduce": ("num_gpus", "message_size"),
    "nccl": ("nccl_dtype", "num_gpus", "message_size"),
    "moe": (
        *("num_tokens", "hidden_size", "inter_size", "topk", "num_experts"),
        *("moe_tp_size", "moe_ep_size", "moe_dtype", "distribution"),
    ),
}


def _refuse_wrong(path: Path, needed: Sequence[str]) -> None:
    """Refuse a table that no fit can use, by the first thing that is wrong with it."""
    try:
        table = pq.read_table(path)
    except (ArrowException, OSError) as error:
        raise BadInput(f"{path}", f"is not a Parquet table: {error}") from None
    if lacks := [name for name in (*needed, "latency") if name not in table.column_names]:
        raise BadInput(f"{path}", f"has no column {', '.join(lacks)}", f"need {', '.join((*needed, 'latency'))}")
    for name in set(table.column_names) & {*needed, "latency"} - {"moe_dtype", "distribution", "nccl_dtype"}:
        try:
            values = np.array(table[name].to_pylist(), float)
        except (TypeError, ValueError):
            raise BadInput(f"{path}", f"column {name} is not of numbers") from None
        may_be_zero = name == "num_key_value_heads"  # as many as query heads
        wrong = ~np.isfinite(values) | (values < 0 if may_be_zero else values <= 0)
        if np.any(wrong):
            row = int(np.argmax(wrong))
            raise BadInput(f"{path}, row {row + 1}", f"{name} = {values[row]:g}", "need a positive, finite number")


def by_gpu(folder: Path, variants: Callable[[Tables], dict[str, Any]], *but: str) -> dict[str, dict[str, Any]]:
    """What `variants` gives of each of the nine GPUs' tables in a folder, `but` some."""
    return {gpu: variants(Tables(gpu_entry(gpu), folder / name)) for gpu, name in TABLES.items() if gpu not in but}


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
    if len(steps) == 1:
        return np.ones(len(values))
    share = np.gradient(np.log2(steps)) / np.bincount(at)
    return (share * len(values) / np.sum(share * np.bincount(at)))[at]


def fitted(
    seconds: Callable[[dict[str, float], Rows], np.ndarray],
    rows: Rows,
    bounds: Bounds,
    weights: np.ndarray,
    hold: float = 0.0,
) -> dict[str, float]:
    """The coefficients whose `seconds` are nearest to the rows', by weighted logarithmic ratios with a robust loss;
    held near where they start, where there is a `hold`."""
    drawn = np.random.default_rng(0).permutation(len(weights))[:FITTED_ROWS]
    rows, weights, names = where(rows, drawn), weights[drawn], tuple(bounds)
    start, least, most = (np.log([bounds[name][i] for name in names]) for i in range(3))
    root = np.sqrt(weights)

    def residuals(logs: np.ndarray) -> np.ndarray:
        wrong = root * np.log(seconds(dict(zip(names, np.exp(logs))), rows) / rows["seconds"])
        return np.concatenate([wrong, hold * (logs - start)]) if hold else wrong

    found = least_squares(residuals, start, bounds=(least, most), loss="soft_l1", f_scale=ROBUST_ERROR, xtol=1e-6)
    return {name: rounded(value) for name, value in zip(names, np.exp(found.x))}


def entry(
    seconds: Callable[[dict[str, float], Rows], np.ndarray],
    rows: Rows,
    bounds: Bounds,
    weights: np.ndarray,
    shape: tuple[str, ...],
    hold: float = 0.0,
    **kept: Any,
) -> dict[str, Any]:
    """The fit of one data type and its errors; once more with every fifth shape left out, tried on those."""
    found = fitted(seconds, rows, bounds, weights, hold)

    def again(kept: np.ndarray) -> dict[str, float]:
        return fitted(seconds, where(rows, kept), bounds, weights[kept], hold)

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
    errors = {"median_error": float(np.median(wrong)), "p90_error": float(np.quantile(wrong, 0.9))}
    held = groups(rows, shape) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    if np.any(held):  # of fewer than three shapes none is left out
        unseen = np.abs(seconds(again(~held), where(rows, held)) / rows["seconds"][held] - 1.0)
        errors["held_out_median_error"] = float(np.median(unseen))
    return {"coefficients": found, "rows": len(wrong), **errors}


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
