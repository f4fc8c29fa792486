"""The rows of a sweep (`fleetopt-sweep/1`): a row a scenario, in Parquet, its columns named as a plan has them.

    scenario                    its number, from 0
    <input> ...                 what was varied, by its name
    status, reason              optimal, feasible, infeasible or failed; why, of the last two
    binding.*                   which limit no fleet holds, and the nearest that one does
    method, search.*            how the answer was found, and of what it is the best
    metrics.*                   of the fleet, as in a plan (SI units)
    pools                       a list of its pools

What is not known is null. Nothing in a row says when, where or how fast it was made: the same scenarios make the same
rows, bit for bit.
"""

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from fleetopt_jax._optimize.batch import Answers, Asked
from fleetopt_jax._optimize.plan import Infeasible, Plan, Unreachable, unreached
from fleetopt_jax._optimize.problem import Problem, demanded_tok_per_s
from fleetopt_jax._optimize.search import largest_window
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import first_line
from fleetopt_jax.documents.plan import plan_to_json

SCHEMA = "fleetopt-sweep/1"
STATUSES = ("optimal", "feasible", "infeasible", "failed")
ROWS_OF_A_GROUP = 2**16  # of Parquet

Value = float | int | str | None  # of an input
Row = dict[str, Any]

_WHOLE = ("n_instances", "n_gpus")
METRICS = {
    name: pa.int64() if name in _WHOLE else pa.float64()
    for name in (
        *("tok_per_j", "output_tok_per_s", "power_w", "n_instances", "n_gpus", "usd_per_h", "kg_co2_per_h"),
        *("ttft_p99_s", "ttft_p99_of_all_s", "itl_s", "itl_p99_s", "unserved_frac", "gain_vs_homogeneous"),
    )
}
_NAMES = ("gpu", "llm", "precision")
_COUNTS = ("window_tokens", "tp", "ep", "dp", "pp", "n_instances", "n_gpus", "max_num_seqs")
_NUMBERS = ("traffic_frac", "utilization", "n_active", "power_w", "tok_per_j", "ttft_p99_s", "itl_s")
POOL = pa.struct(
    [(name, pa.string()) for name in _NAMES]
    + [(name, pa.int64()) for name in _COUNTS]
    + [(name, pa.float64()) for name in ("gamma", *_NUMBERS)]
)
_COLUMNS = [
    ("status", pa.string()),
    ("reason", pa.string()),
    ("binding.limit", pa.string()),
    ("binding.asked", pa.float64()),
    ("binding.nearest_feasible", pa.float64()),
    ("method", pa.string()),
    ("search.candidates", pa.string()),
    ("search.n_evaluated", pa.int64()),
    *((f"metrics.{name}", kind) for name, kind in METRICS.items()),
    ("pools", pa.list_(POOL)),
]
OURS = ("scenario", *(name for name, _ in _COLUMNS))  # what no input may be called


def schema_of(axes: Mapping[str, Sequence[Value]]) -> pa.Schema:
    """Of the rows of scenarios with these inputs; the inputs and their values are kept in its metadata."""
    inputs = [(name, _type(values)) for name, values in axes.items()]
    about = {"schema": SCHEMA, "axes": {name: list(values) for name, values in axes.items()}}
    return pa.schema([("scenario", pa.int64()), *inputs, *_COLUMNS], {b"fleetopt": json.dumps(about).encode()})


def _type(values: Iterable[Value]) -> pa.DataType:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int}:
        return pa.int64()
    return pa.float64() if kinds <= {int, float} else pa.string()


# --- rows -------------------------------------------------------------------------------------------------------------


def failed_row(reason: str) -> Row:
    """Of a scenario that there is no problem for, or whose answer never came."""
    return {"status": "failed", "reason": reason}


def plan_row(plan: Plan | Infeasible) -> Row:
    """Of an answer of `optimize`."""
    document = plan_to_json(plan)
    row: Row = {
        "status": document["status"],
        "method": document["method"],
        "search.candidates": document["search"]["candidates"],
        "search.n_evaluated": document["search"]["n_evaluated"],
    }
    if isinstance(plan, Infeasible):
        return row | _unreached(plan.binding)
    row |= {f"metrics.{name}": _known(document["metrics"][name]) for name in METRICS}
    pools = [{field.name: _known(pool[field.name]) for field in POOL} for pool in document["pools"]]
    return row | {"pools": pools}


def answer_rows(asked: Sequence[Asked], answers: Answers) -> list[Row]:
    """Of the answers to a batch."""
    metrics = {name: np.asarray(getattr(answers.metrics, name)) for name in METRICS if name != "gain_vs_homogeneous"}
    pools = {name: np.asarray(getattr(answers.metrics.pools, name)) for name in ("n_max", "n_gpus", *_NUMBERS)}
    return [_answer_row(each, answers, metrics, pools, i) for i, each in enumerate(asked)]


def _answer_row(
    asked: Asked, answers: Answers, metrics: Mapping[str, np.ndarray], pools: Mapping[str, np.ndarray], i: int
) -> Row:
    problem, choice = asked.problem, answers.choice
    row: Row = {
        "method": "exact",
        "search.candidates": f"{asked.n_windows:,} windows",
        "search.n_evaluated": (1 + 2 * asked.n_windows) * len(problem.specs),
    }
    if not choice.used[i, 0]:
        return row | {"status": "infeasible"} | _unreached(_binding(problem, answers, i))
    if not answers.holds[i]:
        return row | failed_row("the fleet that was found breaks a limit when it is evaluated as a whole")
    found = {name: float(values[i]) for name, values in metrics.items()}
    one_pool = demanded_tok_per_s(problem) / float(choice.homogeneous_w[i])
    found["gain_vs_homogeneous"] = found["tok_per_j"] / one_pool if one_pool else math.nan
    there = [k for k in range(2) if choice.used[i, k] and choice.n_instances[i, k] > 0]
    return (
        row
        | {"status": "optimal"}
        | {f"metrics.{name}": int(found[name]) if name in _WHOLE else _known(found[name]) for name in METRICS}
        | {"pools": [_pool(asked, choice, pools, i, k) for k in there]}
    )


def _pool(asked: Asked, choice: Any, pools: Mapping[str, np.ndarray], i: int, k: int) -> Row:
    spec: EngineSpec = asked.problem.specs[int(choice.engine[i, k])]
    at = int(choice.pool[i, k])
    return {
        "gpu": spec.gpu_name,
        "llm": spec.llm_name,
        "precision": spec.precision,
        **vars(spec.split),
        "window_tokens": int(asked.question.pools.window_tokens[at]),
        "gamma": float(asked.question.gamma[at]),
        "n_instances": int(choice.n_instances[i, k]),
        "n_gpus": int(pools["n_gpus"][i, k]),
        "max_num_seqs": int(pools["n_max"][i, k]),
        **{name: _known(float(pools[name][i, k])) for name in _NUMBERS},
    }


def _binding(problem: Problem, answers: Answers, i: int) -> Unreachable:
    """Which limit no fleet holds, as `optimize` says it."""
    ttft_s, itl_s = float(answers.best_ttft_s[i]), float(answers.best_itl_s[i])
    if not math.isfinite(ttft_s):
        return Unreachable("window_tokens", problem.window_tokens, largest_window(problem))
    if not itl_s <= float(problem.slo.itl_s):
        return Unreachable("itl_s", float(problem.slo.itl_s), itl_s)
    return Unreachable("ttft_p99_s", float(problem.slo.ttft_p99_s), ttft_s)


def _unreached(binding: Unreachable) -> Row:
    return {
        "reason": unreached(binding),
        "binding.limit": binding.limit,
        "binding.asked": None if isinstance(binding.asked, dict) else binding.asked,
        "binding.nearest_feasible": binding.nearest_feasible,
    }


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- files ------------------------------------------------------------------------------------------------------------


def table_of(rows: Iterable[Row], schema: pa.Schema) -> pa.Table:
    """Rows as they stand in the file."""
    return pa.Table.from_pylist(list(rows), schema)


def parquet_of(table: pa.Table) -> bytes:
    """A Parquet file."""
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written, compression="zstd", row_group_size=ROWS_OF_A_GROUP)
    return written.getvalue()


def load_sweep(path: str | os.PathLike) -> pa.Table:
    """The rows of a sweep, an Arrow table; `BadInput` where the file is none."""
    where = os.fspath(path)
    try:
        table = pyarrow.parquet.ParquetFile(where).read()
    except FileNotFoundError:
        raise BadInput(where, "no such file", "need the file of a sweep: fleetopt sweep --out FILE.parquet") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadInput(where, f"cannot be read as Parquet: {first_line(error)}", "need the file of a sweep") from None
    if (table.schema.metadata or {}).get(b"fleetopt") is None or not set(OURS) <= set(table.column_names):
        raise BadInput(where, "is not the file of a sweep", "need one that fleetopt sweep --out has written")
    return table


def axes_of(table: pa.Table) -> dict[str, list[Value]]:
    """What was varied in a sweep, and its values."""
    return json.loads(table.schema.metadata[b"fleetopt"])["axes"]


def sweep_to_json(table: pa.Table, path: str | os.PathLike, *, rows: bool) -> dict[str, Any]:
    """What a sweep comes to, its `rows` with it where they are asked for."""
    statuses = table["status"].to_pylist()
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "file": os.fspath(path),
        "axes": axes_of(table),
        "n_scenarios": len(table),
        "by_status": {status: n for status in STATUSES if (n := statuses.count(status))},
    }
    return document | ({"rows": table.to_pylist()} if rows else {})
