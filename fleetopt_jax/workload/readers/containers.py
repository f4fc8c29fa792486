"""What a file is, by its first bytes: packed or not, in which encoding, and which format lies inside."""

import codecs
import gzip
import io
import re
import zipfile
from collections.abc import Callable
from typing import BinaryIO, Literal, NamedTuple, cast

import pyarrow as pa

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import BUFFER_BYTES, GZIP_MAGIC, MIB, Bounded, first_line, shown
from fleetopt_jax.workload.readers import limits

Kind = Literal["csv", "jsonl", "json", "parquet", "prometheus"]
MOST_LAYERS = 3  # of packing
BOM = b"\xef\xbb\xbf"
UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
FOREIGN = {  # first bytes of files that people have beside their traces
    b"ARROW1": ("an Arrow or Feather file", "save it as Parquet"),
    b"SQLite format 3": ("an SQLite database", "export a table as csv"),
    b"\x89HDF": ("an HDF5 file", "save it as csv or Parquet"),
    b"\x93NUMPY": ("a NumPy array", "save it as csv or Parquet"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "save the sheet as csv"),
    b"\x80\x04\x95": ("a Python pickle", "save it as csv or Parquet"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it first"),
    b"BZh9": ("a bzip2 file", "unpack it first"),
    b"\xfd7zXZ\x00": ("an xz file", "unpack it first"),
    b"Obj\x01": ("an Avro file", "save it as Parquet"),
}
LINES = ("jsonl", "ndjson")  # endings
_PACKINGS = re.compile(r"(\.(gz|zst|zip))+$")
_SAMPLE = re.compile(rb"^[A-Za-z_:][\w:]*_bucket\{[^\n]*\ble=\"", re.MULTILINE)


class Opened(NamedTuple):
    """A stream of plain bytes, text in UTF-8 without a byte-order mark, and what it was taken out of."""

    stream: BinaryIO
    details: tuple[str, ...]


def plain(where: str, stream: BinaryIO, packed: tuple[str, ...] = ()) -> Opened:
    """The bytes of a file unpacked, and as UTF-8 where they are UTF-16; `BadInput` for what is no table at all."""
    details = packed
    for _ in range(MOST_LAYERS):
        head = head_of(where, stream)
        name, unpack = next(((n, u) for magic, n, u in _PACKED if head.startswith(magic)), ("", None))
        if unpack is None:
            break
        stream, detail = unpack(where, stream)
        details = (*details, detail or name)
    head = head_of(where, stream)
    for magic, (what, instead) in FOREIGN.items():
        if head.startswith(magic):
            raise BadInput(where, f"is {what}", instead)
    encoding = _utf16(head)
    if encoding:
        marked = head.startswith(tuple(UTF16))
        stream = _buffered(where, cast(BinaryIO, _Recoded(stream, encoding, marked)))
        details = (*details, "UTF-16")
    elif head.startswith(BOM):
        stream.read(len(BOM))
    return Opened(stream, details)


def head_of(where: str, stream: BinaryIO) -> bytes:
    """The first bytes, which stay to be read."""
    head = stream.peek(1) if isinstance(stream, io.BufferedReader) else cast(io.BytesIO, stream).getvalue()[:MIB]
    if head.removeprefix(BOM).strip() == b"":
        raise BadInput(where, "the file is empty")
    return head


def kind_of(where: str, head: bytes) -> Kind:
    """The format of a plain file. Its name decides only what its bytes leave open."""
    if head.startswith(b"PAR1"):
        return "parquet"
    ending = _PACKINGS.sub("", where.lower()).rsplit(".", 1)[-1]
    start = head.lstrip()
    if start[:1] in (b"{", b"["):
        return "json" if start[:1] == b"[" else _object_kind(start, ending)
    if _SAMPLE.search(head):
        return "prometheus"
    if ending in LINES:
        return "jsonl"
    first, _, rest = start.partition(b"\n")
    table = any(delimiter in first for delimiter in b",;\t|") and rest.strip()
    return "json" if ending == "json" and not table else "csv"


def _object_kind(start: bytes, ending: str) -> Kind:
    """Whether a text that begins with an object is one document or has an object on each line."""
    first, _, rest = start.partition(b"\n")
    if ending in LINES:
        return "jsonl" if first.strip() != b"{" else "json"
    return "jsonl" if first.rstrip().endswith(b"}") and rest.lstrip()[:1] == b"{" else "json"


def whole(where: str, stream: BinaryIO, most_bytes: int, instead: str = "take a part of it") -> bytes:
    """All that is left of a stream, up to a limit."""
    data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise BadInput(where, f"too large: it holds more; need at most {most_bytes // MIB:,} MiB", instead)
    return data


def seekable(where: str, stream: BinaryIO) -> BinaryIO:
    """The stream, or all its bytes where one cannot go back in it."""
    if stream.seekable():
        return stream
    return io.BytesIO(whole(where, stream, limits.MAX_WHOLE_BYTES, "unpack it into a file first"))


class _Recoded(io.RawIOBase):
    """Text of another encoding, in UTF-8."""

    def __init__(self, source: BinaryIO, encoding: str, marked: bool):
        self._source, self._rest = source, b""
        self._decode = codecs.getincrementaldecoder(encoding)(errors="replace")
        if marked:
            source.read(2)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest:
            data = self._source.read(len(buffer))
            self._rest = self._decode.decode(data, final=not data).encode(errors="replace")
            if not data:
                break
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _utf16(head: bytes) -> str | None:
    """The encoding of UTF-16 text: by its mark, or by every second byte being zero."""
    for mark, encoding in UTF16.items():
        if head.startswith(mark):
            return encoding
    sample = head[:512]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if len(sample) < 16 or max(even, odd) < 0.45 * len(sample) or min(even, odd) > 0:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _buffered(where: str, source: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(Bounded(where, source, limits.MAX_TRACE_BYTES, False), BUFFER_BYTES))


def _unzipped(where: str, stream: BinaryIO) -> tuple[BinaryIO, str]:
    """The one file in a zip archive; several are named."""
    try:
        archive = zipfile.ZipFile(seekable(where, stream))
        names = [name for name in archive.namelist() if not name.endswith("/") and not _hidden(name)]
        if any(name.startswith("xl/") for name in names):
            raise BadInput(where, "is an Excel workbook", "save the sheet as csv")
        if len(names) != 1:
            listed = ", ".join(shown(name) for name in names[:5]) or "none"
            raise BadInput(where, f"holds {len(names)} files: {listed}", "need one: unpack the one you mean")
        return _buffered(where, cast(BinaryIO, archive.open(names[0]))), f"zip, {shown(names[0])}"
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(where, f"cannot be read as zip: {first_line(error)}") from None


def _hidden(name: str) -> bool:
    return name.startswith("__MACOSX/") or name.rsplit("/", 1)[-1].startswith(".")


def _through(open_: Callable[[BinaryIO], object]) -> Callable[[str, BinaryIO], tuple[BinaryIO, str]]:
    def unpack(where: str, stream: BinaryIO) -> tuple[BinaryIO, str]:
        return _buffered(where, cast(BinaryIO, open_(stream))), ""

    return unpack


def _zstd(stream: BinaryIO) -> pa.CompressedInputStream:
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


_PACKED = (
    (GZIP_MAGIC, "gzip", _through(lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"))),
    (b"\x28\xb5\x2f\xfd", "zstd", _through(_zstd)),
    (b"PK\x03\x04", "zip", _unzipped),
)
