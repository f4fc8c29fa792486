"""Traces at the door: csv, jsonl and Parquet files of request lengths, checked before anything is computed.

Known layouts need no options: Azure (`TIMESTAMP,ContextTokens,GeneratedTokens`), Mooncake (`timestamp` in ms,
`input_length`, `output_length`) and our own (`timestamp_s`, `prompt_tokens`, `output_tokens`). Any other column names
are given in a `Layout`. Time stamps are numbers or ISO 8601; they may be missing. `.gz` files are read as they are.
"""

import gzip
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, ValidationError

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import MS
from fleetopt_jax.workload.atoms import OUTPUT_SHARE
from fleetopt_jax.workload.cdf import check_cdf

MAX_TOKENS = 1e9


@dataclass(frozen=True)
class Layout:
    """Which columns hold what. `time_unit_s` is the length of one time unit, for numeric time stamps."""

    prompt: str
    output: str
    time: str | None
    time_unit_s: float = 1.0


LAYOUTS = (
    Layout("ContextTokens", "GeneratedTokens", "TIMESTAMP"),
    Layout("input_length", "output_length", "timestamp", MS),
    Layout("prompt_tokens", "output_tokens", "timestamp_s"),
)


@dataclass(frozen=True)
class Trace:
    """Requests as recorded. Arrays [n]; `arrival_s` counts from the first arrival, or is None."""

    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    arrival_s: np.ndarray | None
    first_arrival_s: float = 0.0  # on the file's own clock; since 1970 where that is a calendar


@dataclass(frozen=True)
class CdfFile:
    """A CDF of total lengths, and how a request's length splits."""

    knots: list[tuple[float, float]]
    output_share: float


class _CdfDocument(BaseModel):
    model_config = ConfigDict(extra="allow")
    cdf: list[tuple[float, float]]
    output_share: float = OUTPUT_SHARE


def read_workload_file(path: str | os.PathLike, layout: Layout | None = None) -> Trace | CdfFile:
    """The requests or the CDF in a file, by its ending: .csv, .jsonl, .parquet (traces) or .json (CDF); .gz of each."""
    where = os.fspath(path)
    ending = Path(where.lower().removesuffix(".gz")).suffix
    data = read_bytes(where)
    if ending == ".json":
        return _parse_cdf(where, data)
    tables = {".csv": _csv_table, ".jsonl": _jsonl_table, ".parquet": _parquet_table}
    if ending not in tables:
        raise BadInput(
            where, f"unknown file ending {ending!r}", "need .csv, .jsonl, .parquet or .json (CDF), or .gz of one"
        )
    try:
        table = tables[ending](data)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadInput(where, f"cannot be read as {ending[1:]}: {_first_line(error)}") from error
    return _parse_trace(where, table, layout)


def parse_json(where: str, data: bytes) -> Any:
    """The document in a JSON file, or `BadInput`."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadInput(where, f"is not JSON: {_first_line(error)}") from error


def first_problem(error: ValidationError) -> str:
    """The first thing pydantic found wrong: field, value and rule."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    value = "" if problem["type"] == "missing" else f" = {str(problem['input'])[:60]}"
    return f"{field}{value}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def read_bytes(where: str) -> bytes:
    """A file's bytes, unpacked if its name ends in .gz; `BadInput` where it is missing, unreadable or empty."""
    try:
        data = Path(where).read_bytes()
        if where.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise BadInput(where, "no such file") from None
    except (OSError, EOFError, ValueError, gzip.zlib.error) as error:
        raise BadInput(where, f"cannot be read: {_first_line(error)}") from error
    if not data.strip():
        raise BadInput(where, "the file is empty")
    return data


def _csv_table(data: bytes) -> pa.Table:
    header = data.split(b"\n", 1)[0].decode("utf-8").strip().lstrip("\ufeff")
    names = [name.strip().strip('"') for name in header.split(",")]
    as_text = pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in names})
    return pyarrow.csv.read_csv(io.BytesIO(data), convert_options=as_text)


def _jsonl_table(data: bytes) -> pa.Table:
    return pyarrow.json.read_json(io.BytesIO(data))


def _parquet_table(data: bytes) -> pa.Table:
    return pyarrow.parquet.read_table(io.BytesIO(data))


def _parse_trace(where: str, table: pa.Table, layout: Layout | None) -> Trace:
    named = layout is not None
    if layout is None:
        layout = next((known for known in LAYOUTS if {known.prompt, known.output} <= set(table.column_names)), None)
    if layout is None:
        known = " or ".join(f"{known.prompt}/{known.output}" for known in LAYOUTS)
        raise BadInput(
            where, f"columns are {', '.join(table.column_names[:8])}", f"need {known}, or name the columns with options"
        )
    for name in (layout.prompt, layout.output, *([layout.time] if named and layout.time else [])):
        if name not in table.column_names:
            raise BadInput(where, f"column {name!r} is missing", f"columns are {', '.join(table.column_names[:8])}")
        if table.column_names.count(name) > 1:
            raise BadInput(where, f"column {name!r} is there more than once", "need it once")
    if table.num_rows == 0:
        raise BadInput(where, "no rows")
    prompt, output = (_tokens(where, name, table[name]) for name in (layout.prompt, layout.output))
    if layout.time is None or layout.time not in table.column_names:
        return Trace(prompt, output, None)
    return Trace(prompt, output, *_seconds(where, layout, table[layout.time]))


def _tokens(where: str, name: str, column: pa.ChunkedArray) -> np.ndarray:
    values = _numbers(where, name, column)
    good = np.isfinite(values) & (values >= 1) & (values <= MAX_TOKENS) & (values == np.floor(values))
    if not good.all():
        row = int(np.argmin(good))
        raise BadInput(
            f"{where}, row {row + 1}",
            f"{name} = {column[row].as_py()}",
            f"need a whole number from 1 to {MAX_TOKENS:.0e}",
        )
    return values


def _numbers(where: str, name: str, column: pa.ChunkedArray) -> np.ndarray:
    values = _cast(column, pa.float64())
    if values is None:
        row = _first_uncastable(column, pa.float64())
        raise BadInput(f"{where}, row {row + 1}", f"{name} = {column[row].as_py()!r}", "need a number")
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise BadInput(f"{where}, row {row + 1}", f"{name} is missing", "need a number")
    return values.to_numpy()


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    try:
        return pc.cast(column, kind)
    except pa.ArrowException:
        return None


def _first_uncastable(column: pa.ChunkedArray, kind: pa.DataType) -> int:
    """The row of the first value that cannot be cast, by bisection."""
    good, bad = 0, len(column)  # the first `good` rows can be cast, the first `bad` cannot
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if _cast(column[:middle], kind) is not None else (good, middle)
    return bad - 1


def _seconds(where: str, layout: Layout, column: pa.ChunkedArray) -> tuple[np.ndarray, float]:
    """(seconds since the first arrival, in arrival order; the first arrival on the file's own clock [s])."""
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    on_clock = pa.types.is_timestamp(column.type) or (is_text and _cast(column.drop_null()[:1], pa.float64()) is None)
    if on_clock:
        return _calendar_seconds(where, layout.time, column)
    seconds = _numbers(where, layout.time, column) * layout.time_unit_s
    if not np.isfinite(seconds).all():
        row = int(np.argmin(np.isfinite(seconds)))
        raise BadInput(f"{where}, row {row + 1}", f"{layout.time} = {column[row].as_py()}", "need a finite time")
    seconds = np.sort(seconds)
    return seconds - seconds[0], float(seconds[0])


def _calendar_seconds(where: str, name: str, column: pa.ChunkedArray) -> tuple[np.ndarray, float]:
    for kind in (pa.timestamp("ns"), pa.timestamp("ns", tz="UTC")):
        stamps = _cast(column, kind)
        if stamps is None:
            continue
        if stamps.null_count:
            row = pc.index(pc.is_null(stamps), True).as_py()
            raise BadInput(f"{where}, row {row + 1}", f"{name} is missing", "need a time stamp")
        nanoseconds = np.sort(pc.cast(stamps, pa.int64()).to_numpy())
        return (nanoseconds - nanoseconds[0]) / 1e9, nanoseconds[0] / 1e9
    raise BadInput(
        where, f"{name} = {column[0].as_py()!r}", "need seconds or ISO 8601 time stamps, one kind in all rows"
    )


def _parse_cdf(where: str, data: bytes) -> CdfFile:
    document = parse_json(where, data)
    if isinstance(document, list):
        document = {"cdf": document}
    if not isinstance(document, dict) or "cdf" not in document:
        raise BadInput(where, "holds no CDF", 'need [[tokens, fraction], ...] or {"cdf": [[tokens, fraction], ...]}')
    try:
        parsed = _CdfDocument.model_validate(document)
    except ValidationError as error:
        raise BadInput(where, first_problem(error), 'need "cdf": [[tokens, fraction], ...]') from None
    if not (math.isfinite(parsed.output_share) and 0 < parsed.output_share < 1):
        raise BadInput(where, f"output_share = {parsed.output_share}", "need 0 < output_share < 1")
    knots = parsed.cdf[1:] if parsed.cdf[:1] == [(0.0, 0.0)] else parsed.cdf  # the origin goes without saying
    check_cdf(where, knots)
    return CdfFile(knots, parsed.output_share)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
