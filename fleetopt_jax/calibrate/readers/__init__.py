"""Benchmark results at the door: files of measured points, known by what is in them, as rows of text.

    csv         our own columns; ML.ENERGY's table; a row a point with the names of any format below, in any case;
                AIConfigurator's points (silicon_ttft_ms, ...)
    JSON        `vllm bench serve`, aiperf, GuideLLM, InferenceX: one object, a list of them, or one a line
    a folder    every .json, .jsonl and .csv file in it, by name: a run a file, as benchmarks write them

Each format is one file here, which finds its records in a JSON object or says that it is another's.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator

from fleetopt_jax.calibrate.readers import aiperf, guidellm, inferencex, vllm_bench
from fleetopt_jax.calibrate.readers.rows import Record, Row, Rows, rows_of
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import MIB, first_line, parse_json, read_bytes, shown

__all__ = ["Row", "Rows", "read_rows"]

FORMATS = (inferencex, vllm_bench, aiperf, guidellm)
MAX_BYTES = 256 * MIB  # reports that hold their requests too
MAX_FILES = 1000  # of a folder
ENDINGS = (".json", ".jsonl", ".csv")
KNOWN = ", ".join(each.LAYOUT for each in FORMATS)


def read_rows(path: str | os.PathLike) -> Rows:
    """The rows of a file or folder; `BadInput` names what cannot be read."""
    where = os.fspath(path)
    if os.path.isdir(where):
        return _of_folder(where)
    data = read_bytes(where, MAX_BYTES)
    return _of_json(where, data) if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else _of_csv(where, data)


def _of_folder(where: str) -> Rows:
    """Every file of a folder, its rows one after another."""
    try:
        names = sorted(name for name in os.listdir(where) if name.lower().endswith(ENDINGS))
    except OSError as error:
        raise BadInput(where, f"cannot be read: {first_line(error)}") from None
    if not 1 <= len(names) <= MAX_FILES:
        problem = f"cannot be read: is a directory with {len(names):,} files that end in {', '.join(ENDINGS)}"
        raise BadInput(where, problem, f"need 1 to {MAX_FILES:,}")
    tables = [read_rows(os.path.join(where, name)) for name in names]
    columns = tuple(dict.fromkeys(name for table in tables for name in table.columns))
    rows = [Row(row.place, dict.fromkeys(columns, "") | dict(row.cells)) for table in tables for row in table.rows]
    return Rows(where, ", ".join(dict.fromkeys(table.layout for table in tables)), columns, tuple(rows))


def _of_json(where: str, data: bytes) -> Rows:
    layouts, found = {}, []
    for place, document in _documents(where, data):
        layout, records = _records(place, document)
        layouts[layout] = None
        found += records
    return rows_of(where, ", ".join(layouts), found)


def _records(place: str, document: Record) -> tuple[str, list[Record]]:
    for each in FORMATS:
        records = each.records(document)
        if records is not None:
            return each.LAYOUT, records
    keys = ", ".join(shown(key) for key in list(document)[:8]) or "none"
    raise BadInput(place, f"is no benchmark result that is known: its keys are {keys}", f"need one of {KNOWN}")


def _documents(where: str, data: bytes) -> Iterator[tuple[str, Record]]:
    """The objects of a document, of a list, or of lines, each with its place."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        lines = [line for line in data.splitlines() if line.strip()]
        if len(lines) < 2 or not all(line.strip().endswith(b"}") for line in lines):
            content = parse_json(where, data, only_read=True)  # says the line
        else:
            content = [parse_json(f"{where}, row {i}", line, only_read=True) for i, line in enumerate(lines, start=1)]
    listed = content if isinstance(content, list) else [content]
    if not listed:
        raise BadInput(where, "is an empty list", "need benchmark results")
    for i, document in enumerate(listed, start=1):
        place = where if content is document else f"{where}, row {i}"
        if not isinstance(document, dict):
            raise BadInput(place, f"{shown(document)} is no object", f"need one of {KNOWN}")
        yield place, document


def _of_csv(where: str, data: bytes) -> Rows:
    try:
        lines = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(where, f"cannot be read as csv: {error}") from error
    columns, rows = [name.strip().lower() for name in (lines or [[]])[0]], []  # no line: a byte-order mark alone
    for name, count in Counter(columns).items():
        if count > 1:
            raise BadInput(where, f"column {shown(name)!r} is there more than once", "need it once")
    for number, line in enumerate((line for line in lines[1:] if any(cell.strip() for cell in line)), start=1):
        place = f"{where}, row {number}"
        if len(line) != len(columns):
            raise BadInput(place, f"{len(line)} cells", f"need {len(columns)}, as in the header")
        rows.append(Row(place, dict(zip(columns, (cell.strip() for cell in line)))))
    return Rows(where, _csv_layout(columns), tuple(columns), tuple(rows))


def _csv_layout(columns: list[str]) -> str:
    """What a header is taken for, in words."""
    marks = {
        "silicon_tpot_ms": "AIConfigurator's points",
        "mean_iteration_ms": "ML.ENERGY's table",
        "framework": inferencex.LAYOUT,
        "total_output_tokens": vllm_bench.LAYOUT,
    }
    return next((f"csv, {name}" for mark, name in marks.items() if mark in columns), "csv")
