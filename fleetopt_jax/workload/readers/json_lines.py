"""One JSON object on each line: jsonl, ndjson, and what databases and gateways log.

With the types of the columns given, Arrow passes over what stands beside them, however deep it is. Where a column has
values of more than one kind, its piece is read by Python.
"""

import io
import itertools
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.json

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import MIB, first_line, shown
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.numbers import arrow
from fleetopt_jax.workload.readers.paths import Path, columns_of, has_pairs, list_type, paths_of, value_of
from fleetopt_jax.workload.readers.records import Columns, Layout, Source
from fleetopt_jax.workload.readers.shapes import unfold

NEED = "need one JSON object on each line"


def open_jsonl(where: str, stream: BinaryIO, layout: Layout | None) -> Source:
    """A file of JSON lines; its first ones tell its columns."""
    pieces = whole_lines(where, stream)
    first = next(pieces, b"")
    rows = [_row(where, row, line) for row, line in _numbered(first, limits.FIRST_LINES)]
    pieces = itertools.chain([first], pieces)
    shapes = [unfold(row) for row in rows]
    if any(shapes):
        name = next(shape.layout for shape in shapes if shape)
        records = list(itertools.chain(*(shape.records for shape in shapes if shape)))
        paths = paths_of(records)
        return Source("jsonl", [*paths], lambda columns: _unfolded(where, pieces, _of(paths, columns)), layout=name)
    paths = paths_of(rows)
    return Source("jsonl", [*paths], lambda columns: _batches(where, pieces, rows, _of(paths, columns)))


def whole_lines(where: str, stream: BinaryIO) -> Iterator[bytes]:
    """The text in pieces that end where a line ends, blank ones left out."""
    rest = stream.read(limits.PIECE_BYTES)
    while rest:
        end = rest.rfind(b"\n") + 1
        data = stream.read(limits.PIECE_BYTES)
        if not data:
            end = len(rest)
        elif not end:
            raise BadInput(where, f"a line is longer than {limits.PIECE_BYTES // MIB} MiB", NEED)
        piece, rest = rest[:end], rest[end:] + data
        if not piece.isspace():
            yield piece


def _batches(where: str, pieces: Iterator[bytes], first: list[Any], paths: dict[str, Path]) -> Iterator[Columns]:
    before = 0
    schema = _schema(first, paths)
    for piece in pieces:
        columns = _by_arrow(piece, schema, paths) if schema is not None else None
        if columns is None:
            rows = [_row(where, before + row, line) for row, line in _numbered(piece)]
            columns = columns_of(where, before, rows, paths)
        yield columns
        before += len(next(iter(columns.values())))


def _unfolded(where: str, pieces: Iterator[bytes], paths: dict[str, Path]) -> Iterator[Columns]:
    """The records inside the lines."""
    before, lines = 0, 0
    for piece in pieces:
        rows = [_row(where, lines + row, line) for row, line in _numbered(piece)]
        records = [record for row in rows if (shape := unfold(row)) for record in shape.records]
        lines += len(rows)
        yield columns_of(where, before, records, paths)
        before += len(records)


def _by_arrow(piece: bytes, schema: pa.Schema, paths: dict[str, Path]) -> Columns | None:
    """The columns of a piece, or None where a value is not of its column's type, or a line is no JSON object."""
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(piece),
            pyarrow.json.ReadOptions(block_size=len(piece)),
            pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid as error:
        if "specified twice" in str(error):
            raise
        return None
    found = {}
    for name, path in paths.items():
        column = table.column(path[0]).combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        found[name] = arrow.struct_field(column, list(path[1:])) if path[1:] else column
    return found


def _schema(first: list[Any], paths: dict[str, Path]) -> pa.Schema | None:
    """The types of the columns, by the first rows; None where Arrow has no such type."""
    tree: dict[str, Any] = {}
    for path in paths.values():
        values = [value_of(row, path) for row in first]
        if any(has_pairs(row, path) for row in first):
            return None
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                return None
        if isinstance(node.get(path[-1]), dict):
            return None
        plain = pa.string() if any(isinstance(value, str) for value in values) else pa.float64()
        node[path[-1]] = list_type(values) or plain
    return pa.schema([(key, _type(node)) for key, node in tree.items()])


def _type(node: Any) -> pa.DataType:
    return pa.struct([(key, _type(child)) for key, child in node.items()]) if isinstance(node, dict) else node


def _of(paths: dict[str, Path], columns: list[str]) -> dict[str, Path]:
    return {name: paths[name] for name in columns}


def _numbered(piece: bytes, most: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line), blank lines not counted."""
    lines = io.BytesIO(piece)
    return itertools.islice(enumerate((line for line in lines if not line.isspace()), start=1), most)


def _row(where: str, row: int, line: bytes) -> dict[str, Any]:
    place = f"{where}, row {row}"
    try:
        found = json.loads(line.decode("utf-8"))
    except RecursionError:
        raise BadInput(place, "is nested too deep", "need a flat JSON object on each line") from None
    except ValueError as error:
        raise BadInput(place, f"cannot be read as jsonl: {first_line(error)}", NEED) from None
    if not isinstance(found, dict):
        raise BadInput(place, f"{shown(found)} is not a JSON object", NEED)
    return found
