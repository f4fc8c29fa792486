"""Traces at the door: csv, jsonl and Parquet files of request lengths, checked before anything is computed.

Known layouts need no options: Azure (`TIMESTAMP,ContextTokens,GeneratedTokens`), Mooncake (`timestamp` in ms,
`input_length`, `output_length`) and our own (`timestamp_s`, `prompt_tokens`, `output_tokens`). Any other column names
are given in a `Layout`. Time stamps are numbers or ISO 8601; they may be missing. `.gz` files are read as they are.

A trace is read in pieces and only its two or three columns are kept, so memory is 24 bytes a request and two pieces.
"""

import csv
import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import MIB, first_line, invalid, opened, parse_json, read_bytes, shown
from fleetopt_jax.core.units import MS
from fleetopt_jax.workload.atoms import OUTPUT_SHARE
from fleetopt_jax.workload.cdf import MAX_CDF_TOKENS, MAX_KNOTS, check_cdf

MAX_TOKENS = 1e9
MAX_REQUESTS = 100_000_000  # 2.4 GB of lengths and times
MAX_TRACE_BYTES = 4096 * MIB  # unpacked; MAX_REQUESTS lines of 40 characters
MAX_WHOLE_BYTES = 1024 * MIB  # of a Parquet file that cannot be read in pieces: packed, or from a pipe
MAX_CDF_BYTES = 64 * MIB  # a knot for each of a million lengths is half of it
MAX_TIME_S = 1e20
PIECE_BYTES = 8 * MIB  # of text, read at once; also the longest line
PIECE_ROWS = 2**20  # of Parquet
RAGGED = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")  # Arrow counts the header
BOM = b"\xef\xbb\xbf"
FIRST_LINES = 100  # of a jsonl file: those that tell its columns
NEED_STAMPS = "need seconds or ISO 8601 time stamps, of 1678 to 2261, one kind in all rows"


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
    """Requests in the order of their arrival. Arrays [n]; `arrival_s` counts from the first arrival, or is None."""

    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    arrival_s: np.ndarray | None
    first_arrival_s: float = 0.0  # on the file's own clock; since 1970 where that is a calendar


@dataclass(frozen=True)
class CdfFile:
    """A CDF of total lengths, and how a request's length splits."""

    knots: list[tuple[float, float]]
    output_share: float


Knot = tuple[
    Annotated[
        float, Field(description=f"Total request length [tokens]: a whole number, 1 to {MAX_CDF_TOKENS}, rising.")
    ],
    Annotated[float, Field(description="Share of requests that are at most this long [-]: 0 to 1, never falling.")],
]
Knots = Annotated[
    list[Knot],
    Field(
        title="CDF",
        fail_fast=True,
        description=f"[[tokens, fraction], ...], the last fraction 1; at most {MAX_KNOTS} knots. "
        "Linear in between, from [0, 0], which may be left out.",
    ),
]


class CdfObject(BaseModel):
    """A CDF of total request lengths, and how a length splits into prompt and output."""

    model_config = ConfigDict(extra="allow", title="CDF with its output share")
    cdf: Knots
    output_share: Annotated[
        float, Field(gt=0, lt=1, title="Output share", description="Output tokens of a request's total length [-].")
    ] = OUTPUT_SHARE


class CdfDocument(RootModel[CdfObject | Knots]):
    """A CDF file as it may be written: the knots alone, or an object that holds them. More fields are ignored."""

    model_config = ConfigDict(title="CDF of request lengths")


def read_workload_file(path: str | os.PathLike, layout: Layout | None = None) -> Trace | CdfFile:
    """The requests or the CDF in a file, by its ending: .csv, .jsonl, .parquet (traces) or .json (CDF); .gz of each."""
    where = os.fspath(path)
    ending = Path(where.lower().removesuffix(".gz")).suffix
    if ending == ".json":
        return parse_cdf(where, read_bytes(where, MAX_CDF_BYTES))
    with opened(where, MAX_TRACE_BYTES) as stream:
        if ending not in _BATCHES:
            raise BadInput(
                where, f"unknown file ending {ending!r}", "need .csv, .jsonl, .parquet or .json (CDF), or .gz of one"
            )
        return parse_trace(where, ending, stream, layout)


def parse_trace(where: str, ending: str, stream: BinaryIO, layout: Layout | None = None) -> Trace:
    """The requests in a stream, `ending` being .csv, .jsonl or .parquet; `BadInput` names the row that is wrong."""
    prompts, outputs, times, clock = [], [], [], None
    rows = 0
    try:
        for layout, batch in _BATCHES[ending](where, stream, layout):  # noqa: B020 — the file completes the layout
            prompts.append(_tokens(where, rows, layout.prompt, batch.column(layout.prompt)))
            outputs.append(_tokens(where, rows, layout.output, batch.column(layout.output)))
            if layout.time is not None:
                column = _plain(batch.column(layout.time))
                clock = clock or _clock(where, rows, layout.time, column)
                times.append(_stamps(where, rows, layout.time, layout.time_unit_s, column, clock))
            rows += batch.num_rows
            if rows > MAX_REQUESTS:
                raise _too_many_rows(where)
    except BadInput:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise BadInput(where, f"cannot be read as {ending[1:]}: {first_line(error)}") from error
    if not rows:
        raise BadInput(where, "no rows")
    prompt, output = np.concatenate(prompts), np.concatenate(outputs)
    if not times:
        return Trace(prompt, output, None)
    stamps = np.concatenate(times)
    if np.any(stamps[1:] < stamps[:-1]):
        order = np.argsort(stamps, kind="stable")  # a request keeps its own lengths
        stamps, prompt, output = stamps[order], prompt[order], output[order]
    return Trace(prompt, output, *_seconds(stamps))


def parse_cdf(where: str, data: bytes) -> CdfFile:
    """The CDF in a JSON document, or `BadInput`."""
    document = parse_json(where, data)
    bare = isinstance(document, list)
    if bare:
        document = {"cdf": document}
    if not isinstance(document, dict) or "cdf" not in document:
        raise BadInput(where, "holds no CDF", 'need [[tokens, fraction], ...] or {"cdf": [[tokens, fraction], ...]}')
    if isinstance(document["cdf"], list) and len(document["cdf"]) > MAX_KNOTS:
        raise BadInput(where, f"the CDF has {len(document['cdf'])} knots", f"need at most {MAX_KNOTS}")
    try:
        parsed = CdfObject.model_validate(document)
    except ValidationError as error:
        raise invalid(where, data, error, 'need "cdf": [[tokens, fraction], ...]', within=int(bare)) from None
    knots = parsed.cdf[1:] if parsed.cdf[:1] == [(0.0, 0.0)] else parsed.cdf  # the origin goes without saying
    check_cdf(where, knots)
    return CdfFile(knots, parsed.output_share)


Batches = Iterator[tuple[Layout, pa.RecordBatch]]  # the layout's columns; its time is None where the file has none


def _csv_batches(where: str, stream: BinaryIO, layout: Layout | None) -> Batches:
    head = _head(where, stream)
    if b"\0" in head:
        raise BadInput(where, "cannot be read as csv: holds NUL bytes", "need UTF-8 text")
    lines = csv.reader(io.StringIO(head.decode("utf-8-sig", errors="replace"), newline=""))
    try:
        names = next(line for line in lines if line)
    except csv.Error as error:
        raise BadInput(where, f"cannot be read as csv: {error}") from None
    if any("\ufffd" in name for name in names):
        raise BadInput(where, "cannot be read as csv: the header is not UTF-8 text", "save the file as UTF-8")
    layout = _complete(where, names, layout)
    columns = _columns(layout)
    try:
        yield from (
            (layout, batch)
            for batch in pyarrow.csv.open_csv(
                stream,
                pyarrow.csv.ReadOptions(block_size=PIECE_BYTES, use_threads=False),  # threads do not count rows
                pyarrow.csv.ParseOptions(newlines_in_values=True),
                pyarrow.csv.ConvertOptions(
                    include_columns=columns, column_types={name: pa.string() for name in columns}
                ),
            )
        )
    except pa.ArrowInvalid as error:
        ragged = RAGGED.search(str(error))
        if not ragged:
            raise
        row, expected, found = map(int, ragged.groups())
        raise BadInput(f"{where}, row {row - 1}", f"{found} cells", f"need {expected} as in the header") from None


def _jsonl_batches(where: str, stream: BinaryIO, layout: Layout | None) -> Batches:
    """With the types of the columns given, so that what stands beside them is passed over, however deep it is."""
    rows, schema, known = 0, None, layout
    _head(where, stream)
    for piece in _whole_lines(where, stream):
        if schema is None or known is None:
            first = [_json_row(where, row, line) for row, line in _rows(piece, FIRST_LINES)]
            known = _complete(where, list(dict.fromkeys(itertools.chain(*first))), layout)
            schema = pa.schema([(name, pa.float64()) for name in _columns(known)])
            if known.time and any(isinstance(row.get(known.time), str) for row in first):
                schema = schema.set(schema.get_field_index(known.time), pa.field(known.time, pa.string()))
        try:
            table = pyarrow.json.read_json(
                io.BytesIO(piece),
                pyarrow.json.ReadOptions(block_size=len(piece)),
                pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            )
        except pa.ArrowInvalid:
            for row, line in _rows(piece):
                _check_row(where, rows + row, _json_row(where, rows + row, line), schema)
            raise
        for batch in table.combine_chunks().to_batches():
            yield known, batch
        rows += table.num_rows


def _parquet_batches(where: str, stream: BinaryIO, layout: Layout | None) -> Batches:
    if not stream.seekable():
        data = stream.read(MAX_WHOLE_BYTES + 1)
        if len(data) > MAX_WHOLE_BYTES:
            raise BadInput(where, f"holds more than {MAX_WHOLE_BYTES // MIB:,} MiB", "unpack it into a file first")
        stream = io.BytesIO(data)
    _head(where, stream)
    file = pyarrow.parquet.ParquetFile(stream)
    if file.metadata.num_rows > MAX_REQUESTS:
        raise _too_many_rows(where)
    layout = _complete(where, file.schema_arrow.names, layout)
    for batch in file.iter_batches(PIECE_ROWS, columns=_columns(layout), use_threads=False):
        yield layout, batch


_BATCHES: dict[str, Callable[[str, BinaryIO, Layout | None], Batches]] = {
    ".csv": _csv_batches,
    ".jsonl": _jsonl_batches,
    ".parquet": _parquet_batches,
}


def _head(where: str, stream: BinaryIO) -> bytes:
    """The first bytes, which stay to be read."""
    head = stream.peek(1) if isinstance(stream, io.BufferedReader) else cast(io.BytesIO, stream).getvalue()[:MIB]
    if head.removeprefix(BOM).strip() == b"":
        raise BadInput(where, "the file is empty")
    return head


def _whole_lines(where: str, stream: BinaryIO) -> Iterator[bytes]:
    """The text in pieces that end where a line ends, blank ones left out."""
    rest = stream.read(PIECE_BYTES).removeprefix(BOM)
    while rest:
        end = rest.rfind(b"\n") + 1
        data = stream.read(PIECE_BYTES)
        if not data:
            end = len(rest)
        elif not end:
            raise BadInput(
                where, f"a line is longer than {PIECE_BYTES // MIB} MiB", "need one JSON object on each line"
            )
        piece, rest = rest[:end], rest[end:] + data
        if not piece.isspace():
            yield piece


def _rows(piece: bytes, most: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line), blank lines not counted."""
    lines = io.BytesIO(piece)
    return itertools.islice(enumerate((line for line in lines if not line.isspace()), start=1), most)


def _json_row(where: str, row: int, line: bytes) -> dict[str, Any]:
    place = f"{where}, row {row}"
    try:
        found = json.loads(line.decode("utf-8"))
    except RecursionError:
        raise BadInput(place, "is nested too deep", "need a flat JSON object on each line") from None
    except ValueError as error:
        raise BadInput(
            place, f"cannot be read as jsonl: {first_line(error)}", "need one JSON object on each line"
        ) from None
    if not isinstance(found, dict):
        raise BadInput(place, f"{shown(found)} is not a JSON object", "need one JSON object on each line")
    return found


def _check_row(where: str, row: int, found: dict[str, Any], schema: pa.Schema) -> None:
    """Refuse a value that is not of its column's type."""
    for field in schema:
        value, text = found.get(field.name), field.type == pa.string()
        if value is None or (isinstance(value, str) if text else _is_number(value)):
            continue
        kind = "a text, as in the rows before" if text else "a number"
        raise BadInput(f"{where}, row {row}", f"{field.name} = {shown(value)}", f"need {kind}")


def _is_number(value: Any) -> bool:
    """Whether a JSON value is one that a double holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max and not math.isnan(value)


def _complete(where: str, names: list[str], layout: Layout | None) -> Layout:
    """The layout of a file with these columns."""
    named = layout is not None
    listed = ", ".join(shown(name) for name in names[:8])
    if layout is None:
        layout = next((known for known in LAYOUTS if {known.prompt, known.output} <= set(names)), None)
    if layout is None:
        known = " or ".join(f"{known.prompt}/{known.output}" for known in LAYOUTS)
        raise BadInput(where, f"columns are {listed}", f"need {known}, or name the columns with options")
    if layout.time is not None and not named and layout.time not in names:
        layout = replace(layout, time=None)
    for name in _columns(layout):
        if name not in names:
            raise BadInput(where, f"column {name!r} is missing", f"columns are {listed}")
        if names.count(name) > 1:
            raise BadInput(where, f"column {name!r} is there more than once", "need it once")
    return layout


def _columns(layout: Layout) -> list[str]:
    names = (layout.prompt, layout.output, *([layout.time] if layout.time is not None else []))
    return list(dict.fromkeys(names))


def _too_many_rows(where: str) -> BadInput:
    return BadInput(
        where, f"more than {MAX_REQUESTS:,} rows", f"need at most {MAX_REQUESTS:,}: take a part of the trace"
    )


def _tokens(where: str, before: int, name: str, column: pa.Array) -> np.ndarray:
    """Whole numbers; `before` is the number of rows before this piece."""
    values = _numbers(where, before, name, column)
    good = np.isfinite(values) & (values >= 1) & (values <= MAX_TOKENS) & (values == np.floor(values))
    if not good.all():
        row = int(np.argmin(good))
        raise BadInput(
            f"{where}, row {before + row + 1}",
            f"{name} = {_shown(column, row)}",
            f"need a whole number from 1 to {MAX_TOKENS:.0e}",
        )
    return values


def _numbers(where: str, before: int, name: str, column: pa.Array) -> np.ndarray:
    column = _plain(column)
    values = None if pa.types.is_boolean(column.type) else _cast(column, pa.float64())
    if values is None:
        row = 0 if pa.types.is_boolean(column.type) else _first_uncastable(column, pa.float64())
        raise BadInput(f"{where}, row {before + row + 1}", f"{name} = {_shown(column, row)!r}", "need a number")
    _refuse_missing(where, before, name, values, "a number")
    return values.to_numpy(zero_copy_only=False)


def _refuse_missing(where: str, before: int, name: str, values: pa.Array, need: str) -> None:
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        raise BadInput(f"{where}, row {before + row + 1}", f"{name} is missing", f"need {need}")


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array | None:
    try:
        return pc.cast(column, kind)
    except pa.ArrowException:
        return None


def _first_uncastable(column: pa.Array, kind: pa.DataType) -> int:
    """The row of the first value that cannot be cast, by bisection."""
    good, bad = 0, len(column)  # the first `good` rows can be cast, the first `bad` cannot
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if _cast(column[good:middle], kind) is not None else (good, middle)
    return bad - 1


def _shown(column: pa.Array, row: int) -> str:
    try:
        value = column[row].as_py()
    except (ValueError, OverflowError):  # not UTF-8; a time finer or further than Python's
        return "unreadable"
    return shown(value)


def _clock(where: str, before: int, name: str, column: pa.Array) -> pa.DataType:
    """What the file's time stamps are: numbers, or calendar times with or without a zone. The first one tells."""
    if pa.types.is_timestamp(column.type):
        return pa.timestamp("ns", "UTC" if column.type.tz else None)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return pa.float64()
    first = column.drop_null()[:1]
    for clock in (pa.float64(), pa.timestamp("ns"), pa.timestamp("ns", "UTC")):
        if _cast(first, clock) is not None:
            return clock
    row = int(np.argmax(column.is_valid().to_numpy(zero_copy_only=False)))
    raise BadInput(f"{where}, row {before + row + 1}", f"{name} = {_shown(column, row)!r}", NEED_STAMPS)


def _stamps(where: str, before: int, name: str, unit_s: float, column: pa.Array, clock: pa.DataType) -> np.ndarray:
    """Seconds of a stamp that is a number, or whole nanoseconds since 1970 of one that is a calendar time."""
    if clock == pa.float64():
        with np.errstate(over="ignore"):
            seconds = _numbers(where, before, name, column) * unit_s
        good = np.abs(seconds) <= MAX_TIME_S  # also not NaN
        if not good.all():
            row = int(np.argmin(good))
            raise BadInput(f"{where}, row {before + row + 1}", f"{name} = {_shown(column, row)}", "need a finite time")
        return seconds
    stamps = _cast(column, clock)
    if stamps is None:
        row = _first_uncastable(column, clock)
        raise BadInput(f"{where}, row {before + row + 1}", f"{name} = {_shown(column, row)!r}", NEED_STAMPS)
    _refuse_missing(where, before, name, stamps, "a time stamp")
    return pc.cast(stamps, pa.int64()).to_numpy(zero_copy_only=False)


def _seconds(stamps: np.ndarray) -> tuple[np.ndarray, float]:
    """(seconds since the first arrival of stamps in order; the first arrival on the file's own clock [s])."""
    first = stamps[0]
    if stamps.dtype == np.int64:  # nanoseconds: their span may be more than an int64 holds
        return (stamps - first).view(np.uint64) / 1e9, float(first / 1e9)
    return stamps - first, float(first)
