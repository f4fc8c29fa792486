"""JSON documents: lists of records, reports with their requests inside, arrays as columns, and CDFs."""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import MIB, first_line, parse_json, shown
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.cdf_document import parse_cdf
from fleetopt_jax.workload.readers.containers import head_of, whole
from fleetopt_jax.workload.readers.known import TEXTS, settle
from fleetopt_jax.workload.readers.paths import Path, Record, columns_of, paths_of
from fleetopt_jax.workload.readers.prometheus import is_promql, parse_promql
from fleetopt_jax.workload.readers.records import CdfFile, Columns, Histograms, Layout, Source
from fleetopt_jax.workload.readers.shapes import arrays_of, longest_list, refuse_summary, unfold


def open_json(where: str, stream: BinaryIO, layout: Layout | None) -> Source | CdfFile | Histograms:
    """A JSON document by what is in it. A list of records is streamed; anything else is read as a whole."""
    head = head_of(where, stream).lstrip()
    if head[:1] == b"[" and head[1:].lstrip()[:1] == b"{":
        return _of_records("json list", _elements(where, stream), where)
    if head[:1] == b"[":
        return parse_cdf(where, whole(where, stream, limits.MAX_CDF_BYTES))
    data = whole(where, stream, limits.MAX_JSON_BYTES, "give one request a line, as jsonl")
    document = _lenient(where, data)
    if not isinstance(document, dict) or "cdf" in document:
        return parse_cdf(where, data)
    if is_promql(document):
        return parse_promql(where, document)
    if shape := unfold(document):
        source = _of_records("json", iter(shape.records), where, shape.layout)
        source.no_rate, source.warnings = shape.no_rate, list(shape.warnings)
        return source
    refuse_summary(where, document)
    if arrays := arrays_of(document):
        return _of_arrays(where, arrays)
    return _inside(where, document, layout)


def _inside(where: str, document: Record, layout: Layout | None) -> Source:
    """The records in a document that no shape is known of: itself, or its longest list of objects."""
    itself, listed = _of_records("json", iter([document]), where), longest_list(document)
    if not listed:
        if not any(isinstance(value, (int, float, str)) for value in document.values()):
            keys = ", ".join(shown(key) for key in itertools.islice(document, 8))
            raise BadInput(where, f"holds no CDF and no requests: its keys are {keys or 'none'}", "need a known layout")
        return itself
    inside = _of_records("json", iter(listed), where)
    for source in (itself, inside):
        try:
            settle(where, source.names, layout)
        except BadInput:
            continue
        return source
    return itself if any(text in document for text in TEXTS) else inside


def _of_records(file_format: str, records: Iterator[Record], where: str, layout: str = "") -> Source:
    first = list(itertools.islice(records, limits.FIRST_LINES))
    paths = paths_of(first)
    return Source(
        file_format,
        [*paths],
        lambda columns: _batches(where, itertools.chain(first, records), {name: paths[name] for name in columns}),
        layout=layout,
    )


def _batches(where: str, records: Iterable[Record], paths: dict[str, Path]) -> Iterator[Columns]:
    before, left = 0, iter(records)
    while piece := list(itertools.islice(left, limits.RECORD_ROWS)):
        yield columns_of(where, before, piece, paths)
        before += len(piece)


def _of_arrays(where: str, arrays: dict[str, list[Any]]) -> Source:
    def batches(columns: list[str]) -> Iterator[Columns]:
        found: dict[str, pa.Array] = {}
        for name in columns:
            found |= columns_of(where, 0, [{name: value} for value in arrays[name]], {name: (name,)})
        yield found

    return Source("json", [*arrays], batches, details=("arrays as columns",))


def _elements(where: str, stream: BinaryIO) -> Iterator[Record]:
    """The objects of a JSON list, read piece by piece."""
    decoder, text, at, row, ended = json.JSONDecoder(), "", 0, 0, False
    utf8 = _Utf8(where, stream)
    while True:
        while at < len(text) and text[at] in " \t\r\n,[":
            at += 1
        if at < len(text) and text[at] == "]":
            return
        try:
            found, end = decoder.raw_decode(text, at)
        except RecursionError:
            raise BadInput(f"{where}, record {row + 1}", "is nested too deep", "need flat records") from None
        except ValueError as error:
            text, at = text[at:], 0
            more = "" if ended else utf8.read()
            if not more or len(text) > limits.PIECE_BYTES:
                raise _broken(f"{where}, record {row + 1}", text, error) from None
            text += more
            continue
        if not isinstance(found, dict):
            raise BadInput(f"{where}, record {row + 1}", f"{shown(found)} is not an object", "need a list of objects")
        row, at = row + 1, end
        yield found


def _broken(place: str, text: str, error: ValueError) -> BadInput:
    if len(text) > limits.PIECE_BYTES:
        return BadInput(place, f"is longer than {limits.PIECE_BYTES // MIB} MiB", "need a list of smaller objects")
    return BadInput(place, f"is not JSON: {first_line(error)}", "need a list of objects")


class _Utf8:
    """The text of a stream in pieces."""

    def __init__(self, where: str, stream: BinaryIO):
        self._where, self._stream, self._rest = where, stream, b""

    def read(self) -> str:
        data = self._rest + self._stream.read(limits.PIECE_BYTES)
        try:
            self._rest = b""
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            if len(data) - error.start > 3:
                raise BadInput(self._where, "is not JSON: not UTF-8 text", "save it as UTF-8") from None
            self._rest = data[error.start :]
            return data[: error.start].decode("utf-8")


def _lenient(where: str, data: bytes) -> Any:
    """A document of another tool, which may write NaN; what Python cannot read is refused with its line."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return parse_json(where, data)
