"""Tables of text: comma, semicolon, tab or bar between the cells, as spreadsheets and databases write them."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import MIB, shown
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.containers import head_of
from fleetopt_jax.workload.readers.known import settle
from fleetopt_jax.workload.readers.records import Columns, Layout, Source

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
RAGGED = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_SEP = re.compile(r"^\ufeff?\"?sep=(.)\"?\s*$")  # Excel's own line before the header


@dataclass(frozen=True)
class _Header:
    """How a table begins. `n_bytes` lead to its first row."""

    names: list[str]
    delimiter: str
    n_bytes: int
    n_comments: int


def open_csv(where: str, stream: BinaryIO, layout: Layout | None) -> Source:
    """A table of text. Its delimiter is the one that makes known or named columns of the header, or the most cells."""
    head = head_of(where, stream)
    if b"\0" in head:
        raise BadInput(where, "cannot be read as csv: holds NUL bytes", "need UTF-8 or UTF-16 text")
    header = _header(where, head, layout)
    details = [f"{DELIMITERS[header.delimiter]}-separated"] if header.delimiter != "," else []
    if header.n_comments:
        details.append(f"{header.n_comments} lines before the header passed over")
    source = Source("csv", header.names, lambda columns: _batches(where, stream, header, columns), tuple(details))
    source.decimal_comma = header.delimiter == ";"
    return source


def _batches(where: str, stream: BinaryIO, header: _Header, columns: list[str]) -> Iterator[Columns]:
    stream.read(header.n_bytes)
    given = [f"{i}" for i in range(len(header.names))]  # the header's own may be there twice, or empty
    wanted = {name: given[header.names.index(name)] for name in columns}
    before = 0
    for piece in _whole_records(where, stream):
        try:
            table = pyarrow.csv.read_csv(
                pa.BufferReader(piece),
                pyarrow.csv.ReadOptions(  # threads do not count rows
                    block_size=len(piece), use_threads=False, column_names=given
                ),
                pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter=header.delimiter),
                pyarrow.csv.ConvertOptions(
                    include_columns=list(wanted.values()),
                    column_types={name: pa.string() for name in wanted.values()},
                ),
            )
        except pa.ArrowInvalid as error:
            if "Empty CSV file" in str(error):
                continue
            ragged = RAGGED.search(str(error))
            if not ragged:
                raise
            row, expected, found = map(int, ragged.groups())
            raise BadInput(
                f"{where}, row {before + row}", f"{found} cells", f"need {expected} as in the header"
            ) from None
        for batch in table.combine_chunks().to_batches():
            yield {name: batch.column(as_given) for name, as_given in wanted.items()}
        before += table.num_rows


def _whole_records(where: str, stream: BinaryIO) -> Iterator[bytes]:
    """The text in pieces that end with a row. Arrow's own reader of pieces leaves a thread behind, which ends the
    process where it ends soon (exit code 134)."""
    rest = b""
    while data := stream.read(limits.PIECE_BYTES):
        rest += data
        end = _end_of_records(rest)
        if end:
            yield rest[:end]
            rest = rest[end:]
        elif len(rest) > 2 * limits.PIECE_BYTES:
            raise BadInput(where, f"a row is longer than {limits.PIECE_BYTES // MIB} MiB", "need a line break each row")
    if rest:
        yield rest


def _end_of_records(text: bytes) -> int:
    """Where the last whole row ends: after a line break that is not between quotes; 0 where there is none."""
    end = text.rfind(b"\n") + 1
    odd = text.count(b'"', 0, end) % 2
    while end and odd:
        earlier = text.rfind(b"\n", 0, text.rfind(b'"', 0, end)) + 1
        odd = (odd + text.count(b'"', earlier, end)) % 2
        end = earlier
    return end


def _header(where: str, head: bytes, layout: Layout | None) -> _Header:
    """The names in the first line that is neither blank nor a comment."""
    n_bytes = n_comments = 0
    declared = ""
    lines = head.splitlines(keepends=True)
    while lines:
        text = lines[0].decode("utf-8", errors="replace")
        if text.strip() and not text.lstrip().startswith(("#", "//")) and not _SEP.match(text):
            break
        declared = sep[1] if (sep := _SEP.match(text)) else declared
        n_comments += bool(text.strip())
        n_bytes += len(lines.pop(0))
    if not lines:
        raise BadInput(where, "cannot be read as csv: only comments", "need a header and a row a request")
    found = {}
    for delimiter in DELIMITERS if declared not in DELIMITERS else [declared]:
        if parsed := _cells(lines, delimiter):
            found[delimiter] = parsed
    if not found:
        raise BadInput(where, f"cannot be read as csv: the header is no line of at most {len(head) / MIB:.3g} MiB")
    delimiter = _delimiter(where, found, layout)
    names, header_bytes = found[delimiter]
    if any("\ufffd" in name for name in names):
        raise BadInput(where, "cannot be read as csv: the header is not UTF-8 text", "save the file as UTF-8")
    return _Header(names, delimiter, n_bytes + header_bytes, n_comments)


def _cells(lines: list[bytes], delimiter: str) -> tuple[list[str], int] | None:
    """(names without blanks around them, bytes of the header with its quoted line breaks)."""
    used = 0

    def fed() -> Iterator[str]:
        nonlocal used
        for line in lines:
            used += len(line)
            yield line.decode("utf-8", errors="replace")

    try:
        names = next(csv.reader(fed(), delimiter=delimiter, skipinitialspace=True))
    except (csv.Error, StopIteration):
        return None
    return [name.strip() for name in names], used


def _delimiter(where: str, found: dict[str, tuple[list[str], int]], layout: Layout | None) -> str:
    """The one that makes the columns that are known or named; or `BadInput` with the columns of the likeliest."""
    refused: dict[str, BadInput] = {}
    settled = []
    for delimiter, (names, _) in found.items():
        try:
            settle(where, names, layout)
            settled.append(delimiter)
        except BadInput as error:
            refused[delimiter] = error
    if len(settled) == 1:
        return settled[0]
    if settled:
        several = " or ".join(DELIMITERS[each] for each in settled)
        raise BadInput(where, f"its cells may be parted by {several}", "need one delimiter in the header")
    likeliest = max(found, key=lambda delimiter: len(found[delimiter][0]))
    names = found[likeliest][0]
    if len(names) == 1:
        parted = "blanks" if len(names[0].split()) > 1 else "nothing"
        raise BadInput(
            where,
            f"the header is one cell: {shown(names[0])}; its words are parted by {parted}",
            "need cells parted by comma, semicolon, tab or bar, and two columns at least",
        )
    if likeliest == ",":
        raise refused[likeliest]
    raise BadInput(where, f"read with {DELIMITERS[likeliest]} between the cells: {_after(where, refused[likeliest])}")


def _after(where: str, error: BadInput) -> str:
    return str(error).removeprefix(f"{where}: ")
