"""All-reduces as vLLM does them, and NCCL's other collectives: `fleetopt_jax/laws/operators/collectives.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.core.units import US
from fleetopt_jax.laws.operators.collectives import CollectiveLaw, all_gather_s, all_reduce_s, make_collective_law

from ._fitting import HELD_OUT_EVERY, LICENCE, ROBUST_ERROR, TABLES, Rows, Tables, groups, rounded, where

# What rows that are left out would say, of a GPU joined in the same way.
BORROWED = {
    ("l40s", "all_reduce"): ("rtx-pro-6000", ("per_gpu_s", "growth")),
    ("l40s", "exchange"): ("rtx-pro-6000", ("per_gpu_s", "growth")),
    ("gb200", "all_reduce"): ("gb300", ("growth",)),
}
SOURCE = "ai-dynamo/aiconfigurator (snapshot 095f58a, 21 Aug 2026): custom_allreduce, kernels in a CUDA graph, and nccl"
LEAST_BYTES, MOST_BYTES = 2_048, 2**29  # one token of a small model to 32,768 tokens of a large one
BOUNDS = {
    "direct_launch_s": (1 * US, 50 * US),
    "ring_launch_s": (1 * US, 500 * US),
    "per_gpu_s": (0.01 * US, 20 * US),
    "direct_efficiency": (0.02, 1.5),
    "ring_efficiency": (0.02, 1.5),
    "growth": (0.1, 4.0),
}
STARTS = tuple(
    {
        "direct_launch_s": 5 * US,
        "ring_launch_s": slower * 10 * US,
        "per_gpu_s": 0.3 * US,
        "direct_efficiency": share,
        "ring_efficiency": 0.7,
        "growth": 1.0,
    }
    for slower in (1.0, 5.0)
    for share in (0.2, 0.5)
)
Law = Callable[..., Any]


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: the coefficients of every GPU, and how well they describe its table."""
    gpus: dict[str, dict[str, Any]] = {gpu: {} for gpu in TABLES}
    borrowers = {gpu for gpu, _ in BORROWED}
    for gpu in sorted(TABLES, key=lambda name: name in borrowers):  # after those that lend
        tables = Tables(gpu_entry(gpu), folder / TABLES[gpu])
        for kind, (read, law) in WAYS.items():
            rows, left_out = _kept(gpu, kind, read(tables))
            lender, names = BORROWED.get((gpu, kind), (gpu, ()))
            fixed = {name: gpus[lender][kind]["coefficients"][name] for name in names}
            gpus[gpu][kind] = _entry(tables, kind, law, rows, fixed, left_out)
    return {"source": SOURCE, "licence": LICENCE, "gpus": gpus}


def variants(tables: Tables) -> dict[str, Any]:
    """The collectives of one's own GPU, as they were timed."""
    found = {}
    for (kind, (read, law)), table in zip(WAYS.items(), ("custom_allreduce", "nccl")):
        rows = read(tables) if tables.path(table) else {"bytes": np.zeros(0)}
        if tables.enough(np.ones(len(rows["bytes"]), bool), kind):
            found[kind] = _entry(tables, kind, law, rows, {}, "")
    return found


def _entry(tables: Tables, kind: str, law: Law, rows: Rows, fixed: dict[str, float], left_out: str) -> dict[str, Any]:
    found = _fit(tables, kind, law, rows, fixed)

    def errors(found: CollectiveLaw, rows: Rows) -> np.ndarray:
        return np.abs(law(found, tables.gpu, rows["bytes"], rows["gpus"]) / rows["seconds"] - 1.0)

    wrong, unseen = errors(found, rows), {}
    held = groups(rows, ("bytes",)) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    if np.any(held):  # of fewer than three sizes none is left out
        fewer = _fit(tables, kind, law, where(rows, ~held), fixed)
        unseen = {"held_out_median_error": rounded(np.median(errors(fewer, where(rows, held))))}
    return {
        "coefficients": {name: float(getattr(found, name)) for name in BOUNDS},
        "rows": len(wrong),
        "left_out": left_out,
        "median_error": rounded(np.median(wrong)),
        "p90_error": rounded(np.quantile(wrong, 0.9)),
        **unseen,
    }


def _fit(tables: Tables, kind: str, law: Law, rows: Rows, fixed: dict[str, float]) -> CollectiveLaw:
    """The coefficients that describe the rows best, but for those that are fixed; of one's own, near the lender's."""
    sheet, measured, hold = tables.gpu, np.log(rows["seconds"]), tables.hold
    free = [name for name in BOUNDS if name not in fixed]
    bounds = np.log([BOUNDS[name] for name in free]).T
    near = tables.start("collectives", kind, {name: (STARTS[0][name], *BOUNDS[name]) for name in BOUNDS})
    lent = np.log([near[name][0] for name in free])

    def record(logs: np.ndarray) -> CollectiveLaw:
        return CollectiveLaw(**dict(zip(free, np.exp(logs))), **fixed)  # pyright: ignore[reportArgumentType]

    def residuals(logs: np.ndarray) -> np.ndarray:
        wrong = np.log(law(record(logs), sheet, rows["bytes"], rows["gpus"])) - measured
        return np.concatenate([wrong, hold * (logs - lent)]) if hold else wrong

    starts = [lent] if hold else [np.log([start[name] for name in free]) for start in STARTS]
    found = [least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=ROBUST_ERROR) for start in starts]
    best = record(min(found, key=lambda each: each.cost).x)
    return make_collective_law(**{name: rounded(getattr(best, name)) for name in BOUNDS})


def _all_reduces(tables: Tables) -> Rows:
    """As vLLM does them in a CUDA graph: of the ways it has, the one it takes for that size. One's own, all."""
    rows = tables.rows("custom_allreduce")
    graph = rows["backend"] == "vllm_graph" if "backend" in rows else np.zeros(len(rows["seconds"]), bool)
    rows = where(rows, graph | ~np.any(graph))
    return _rows(rows, 2.0 * rows["message_size"])  # in elements of 16 bits


def _exchanges(tables: Tables) -> Rows:
    """NCCL's collectives; the tables hold their median over all-gather, all-reduce, all-to-all and reduce-scatter."""
    rows = tables.rows("nccl")
    width = np.where(rows["nccl_dtype"] == "half", 2.0, 1.0)
    return _rows(rows, width * rows["message_size"])


WAYS: dict[str, tuple[Callable[[Tables], Rows], Law]] = {
    "all_reduce": (_all_reduces, all_reduce_s),
    "exchange": (_exchanges, all_gather_s),
}


def _rows(table: Rows, n_bytes: np.ndarray) -> Rows:
    rows = {"bytes": n_bytes, "gpus": table["num_gpus"].astype(float), "seconds": table["seconds"]}
    return where(rows, (n_bytes >= LEAST_BYTES) & (n_bytes <= MOST_BYTES))


def _kept(gpu: str, kind: str, rows: Rows) -> tuple[Rows, str]:
    """The rows that are to be trusted, and which are not, and why."""
    if gpu == "l40s":
        return where(rows, rows["gpus"] == 2), (
            "more than 2 GPUs: one host without peer access between them; per_gpu_s and growth are those of "
            "RTX PRO 6000"
        )
    if gpu == "gb200" and kind == "all_reduce":
        return where(rows, (rows["gpus"] > 2) | (rows["bytes"] < 2**23)), (
            "8 MiB and more over 2 GPUs: a third of the bytes/s that its 4 GPUs, B200 and GB300 reach; growth is that "
            "of GB300"
        )
    return rows, ""
