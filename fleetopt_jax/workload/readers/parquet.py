"""Parquet files: every numeric type, and the fields of structs by dotted path."""

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.containers import seekable
from fleetopt_jax.workload.readers.numbers import arrow
from fleetopt_jax.workload.readers.records import Columns, Layout, Source

Paths = dict[str, tuple[str, ...]]


def open_parquet(where: str, stream: BinaryIO, layout: Layout | None) -> Source:
    """A Parquet file, read by groups of rows."""
    file = pyarrow.parquet.ParquetFile(seekable(where, stream))
    if file.metadata.num_rows > limits.MAX_PASSED_ROWS:
        raise too_many_rows(where, limits.MAX_PASSED_ROWS)
    paths: Paths = {}
    twice = []
    for field in file.schema_arrow:
        for path in _leaves(field, ()):
            name = ".".join(path)
            twice += [name] if name in paths else []
            paths[name] = path
    return Source("Parquet", [*paths, *twice], lambda columns: _batches(file, paths, columns))


def _batches(file: pyarrow.parquet.ParquetFile, paths: Paths, columns: list[str]) -> Iterator[Columns]:
    for batch in file.iter_batches(limits.PIECE_ROWS, columns=columns, use_threads=False):
        yield {name: _field(batch, paths[name]) for name in columns}


def _field(batch: pa.RecordBatch, path: tuple[str, ...]) -> pa.Array:
    column = batch.column(path[0])
    return arrow.struct_field(column, list(path[1:])) if path[1:] else column


def _leaves(field: pa.Field, before: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    path = (*before, field.name)
    if pa.types.is_struct(field.type) and len(path) < limits.MAX_NESTING:
        for child in field.type:
            yield from _leaves(child, path)
    else:
        yield path


def too_many_rows(where: str, most: int = limits.MAX_REQUESTS) -> BadInput:
    """The refusal of a trace that is too long to hold."""
    return BadInput(where, f"more than {most:,} rows", f"need at most {most:,}: take a part of the trace")
