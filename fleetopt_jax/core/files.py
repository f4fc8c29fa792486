"""Files: opened without waiting, read within bounds, JSON that says one thing only; and written whole or not at all.

A file never decides how much memory or time it takes: sizes are checked before reading where the system knows them, and
while reading where it does not (pipes, packed files, files that grow).
"""

import contextlib
import datetime
import errno
import gzip
import io
import itertools
import json
import math
import os
import re
import reprlib
import secrets
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from fleetopt_jax.core.errors import BadInput

MIB = 2**20
MAX_DOCUMENT_BYTES = 8 * MIB  # plans, engines, configurations and tables of measurements are kilobytes
MAX_KEYS = 100_000  # of a JSON object
MAX_DEPTH = 100  # of nested JSON; ours is 5 deep
MAX_DIGITS = 300  # of a JSON integer: one that a double can hold
MAX_SEARCHED_CHARS = 4 * MIB  # of a text whose wrong line is looked for
BUFFER_BYTES = MIB
SHOWN_CHARS = 60  # of a wrong value
GZIP_MAGIC = b"\x1f\x8b"

KeyPath = tuple[str | int, ...]  # keys and indices that lead to a value of a document

_TOKEN = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]|-?Infinity|NaN|true|false|null'
    r"|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|[^ \t\r\n]",
    re.DOTALL,
)
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class Invalid(Protocol):
    """A pydantic `ValidationError`, which this room does not import."""

    def errors(self, *, include_url: bool) -> Sequence[Mapping[str, Any]]: ...


class Bounded(io.RawIOBase):
    """The bytes of `source` up to a limit, then `BadInput`; also where the source cannot be read on."""

    def __init__(
        self, where: str, source: BinaryIO, most_bytes: int, seekable: bool, watch: Callable[[int], None] | None = None
    ):
        self._watch = watch  # is told of the bytes that are read
        self._where, self._source, self._most_bytes, self._seekable = where, source, most_bytes, seekable
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if not self._seekable:
            raise io.UnsupportedOperation("seek")
        self._position = self._source.seek(offset, whence)
        return self._position

    def readinto(self, buffer) -> int:
        try:
            data = self._source.read(len(buffer))
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise BadInput(self._where, f"cannot be read: {first_line(error)}") from error
        self._position += len(data)
        if self._position > self._most_bytes:
            raise _too_large(self._where, "it holds more", self._most_bytes)
        buffer[: len(data)] = data
        if self._watch:
            self._watch(len(data))
        return len(data)


@contextlib.contextmanager
def opened(
    where: str,
    most_bytes: int = MAX_DOCUMENT_BYTES,
    *,
    unpack: bool = True,
    watch: Callable[[int], None] | None = None,
) -> Iterator[BinaryIO]:
    """A file's bytes as a stream, unpacked if they are gzip's (unless not `unpack`); `BadInput` beyond `most_bytes`.
    `watch` is told how many are read, each time some are.

    Regular files and pipes only. A pipe that nobody writes to is empty: to open one never waits.
    """
    try:
        descriptor = os.open(where, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise BadInput(where, "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise BadInput(where, f"cannot be read: {first_line(error)}") from None
    try:
        status = os.fstat(descriptor)
        regular = stat.S_ISREG(status.st_mode)
        if not regular and not stat.S_ISFIFO(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a device"
            raise BadInput(where, f"cannot be read: is {kind}", "need a file")
        if status.st_size > most_bytes:
            raise _too_large(where, f"it is {status.st_size / MIB:,.0f} MiB", most_bytes)
        if not regular:
            os.set_blocking(descriptor, True)
        with open(descriptor, "rb", closefd=False) as raw:
            packed = unpack and raw.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC)
            source = cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb") if packed else raw)
            bounded = Bounded(where, source, most_bytes, regular and not packed, watch)
            yield io.BufferedReader(bounded, BUFFER_BYTES)
    finally:
        os.close(descriptor)


def _too_large(where: str, problem: str, most_bytes: int) -> BadInput:
    return BadInput(where, f"too large: {problem}", f"need at most {most_bytes // MIB:,} MiB")


def read_bytes(where: str, most_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
    """A file's bytes, unpacked if they are gzip's; `BadInput` where it is missing, unreadable, large or empty."""
    with opened(where, most_bytes) as stream:
        data = stream.read()
    if not data or data.isspace():
        raise BadInput(where, "the file is empty")
    return data


class Twice(list):
    """The values of a key that an object has more than once, where they differ: what no field takes."""


def parse_json(where: str, data: bytes, *, only_read: bool = False) -> Any:
    """The document in a JSON file, or `BadInput` with the line.

    Stricter than the standard library: no key twice in an object, no NaN or infinity in any spelling, no integer that a
    double cannot hold, no half of a surrogate pair, and at most 100 levels. `only_read` is for the files of others, of
    which we read a part: such numbers become what a float makes of them and such keys `Twice`, so that the model of
    what is read refuses them, and nobody minds them elsewhere.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{where}, line {line}", "is not JSON: not UTF-8 text", "save it as UTF-8") from None
    too_deep = BadInput(where, f"is nested more than {MAX_DEPTH} deep", "need a flatter document")
    try:
        document = json.loads(text, **(_AS_IT_IS if only_read else _STRICT))
    except _Refused as refused:
        raise refused.at(where, text) from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}, line {error.lineno}", f"is not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise too_deep from None
    if _depth(document) > MAX_DEPTH:
        raise too_deep
    if not only_read and _HALF_PAIR.search(text):
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadInput(where, "has a text with half of a surrogate pair", "need UTF-8 text") from None
    return document


def invalid(
    where: str, data: bytes, error: Invalid, allowed: str = "", *, under: KeyPath = (), within: int = 0
) -> BadInput:
    """The refusal of a JSON file by the first thing pydantic found wrong, with its line.

    `under` leads from the whole document to the part that was validated; where more was validated than the document,
    it is what the first `within` steps lead to.
    """
    line = _line(data.decode("utf-8-sig"), (*under, *error.errors(include_url=False)[0]["loc"][within:]))
    return BadInput(f"{where}, line {line}" if line else where, first_problem(error), allowed)


def first_problem(error: Invalid) -> str:
    """The first thing pydantic found wrong: field, value and rule."""
    problem = error.errors(include_url=False)[0]
    path, value = problem["loc"], problem["input"]
    if path and path[-1] == "[key]":
        return f"{dotted(path[:-2])}: {shown(value)} cannot be a name here"
    unsaid = problem["type"] == "missing" or (problem["type"] == "extra_forbidden" and isinstance(value, (dict, list)))
    field = dotted(path) + ("" if unsaid else f" = {shown(value)}")
    said = _RULES.get(problem["type"], f"{problem['msg'][0].lower()}{problem['msg'][1:]}")
    return f"{field}: {said}".removeprefix(": ")


_RULES = {  # of pydantic's, those whose own words are not the user's
    "extra_forbidden": "no such key",
    "dict_type": "input should be named keys and their values",
    "model_type": "input should be named keys and their values",
    "model_attributes_type": "input should be named keys and their values",
}


def shown(value: Any) -> str:
    """A wrong value in a message: a text without quotes, the start of anything large, and of keys their names."""
    if isinstance(value, dict):
        value = "{" + ", ".join(itertools.islice(map(str, value), 4)) + (", ...}" if len(value) > 4 else "}")
    elif isinstance(value, list):
        parts = ["..." if isinstance(each, (dict, list)) else shown(each) for each in value[:4]]
        value = "[" + ", ".join(parts) + (", ...]" if len(value) > 4 else "]")
    elif isinstance(value, (datetime.date, datetime.time)):
        value = value.isoformat()
    return (value if isinstance(value, str) else reprlib.repr(value))[:SHOWN_CHARS]


def dotted(path: KeyPath) -> str:
    """`cdf.3.0`."""
    return ".".join(str(part) for part in path)


def first_line(error: BaseException) -> str:
    """What an error says, in one line and without the file's name."""
    said = str(getattr(error, "strerror", None) or error).strip()
    return said.splitlines()[0] if said else type(error).__name__


class _Refused(Exception):
    """JSON that Python reads and we do not: a number, or the keys of an object, for which `token` is None."""

    def __init__(self, problem: str, token: str | None = None):
        self.problem, self.token = problem, token

    def at(self, where: str, text: str) -> BadInput:
        seen: set[KeyPath] = set()
        for path, offset, token in _values(text):
            if path in seen if self.token is None else token == self.token:
                line, name = text.count("\n", 0, offset) + 1, dotted(path)
                if self.token is None:
                    return BadInput(f"{where}, line {line}", f"key {name!r} is there more than once", "need it once")
                return BadInput(f"{where}, line {line}", f"{name} = {shown(token)}".removeprefix(" = "), self.problem)
            seen.add(path)
        return BadInput(where, self.problem) if self.token is None else BadInput(where, shown(self.token), self.problem)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(pairs) > MAX_KEYS:
        raise _Refused(f"an object has {len(pairs)} keys; need at most {MAX_KEYS}")
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f"key {shown(twice)!r} is there more than once; need it once")
    return found


def _refuse_number(token: str) -> None:
    raise _Refused("need a finite number", token)


def _finite(token: str) -> float:
    value = float(token)
    if value in (float("inf"), float("-inf")):
        _refuse_number(token)
    return value


def _bounded_int(token: str) -> int:
    if len(token) > MAX_DIGITS:
        raise _Refused(f"need a number of at most {MAX_DIGITS} digits", token)
    return int(token)


def _all_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(pairs) > MAX_KEYS:
        raise _Refused(f"an object has {len(pairs)} keys; need at most {MAX_KEYS}")
    if len(found) < len(pairs):
        values: dict[str, list[Any]] = {}
        for key, value in pairs:
            values.setdefault(key, []).append(value)
        for key, several in values.items():
            if any(value != several[0] for value in several):
                found[key] = Twice(several)
    return found


def _any_int(token: str) -> float:
    return int(token) if len(token) <= MAX_DIGITS else float(token)


_STRICT: dict[str, Any] = {
    "object_pairs_hook": _once,
    "parse_constant": _refuse_number,
    "parse_float": _finite,
    "parse_int": _bounded_int,
}
_AS_IT_IS: dict[str, Any] = {"object_pairs_hook": _all_of, "parse_int": _any_int}


def _depth(document: Any) -> int:
    level, depth = [document], 0
    while level:
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ())
            if isinstance(child, (dict, list))
        ]
        depth += 1
    return depth


def _line(text: str, path: KeyPath) -> int | None:
    """The line of the value at `path`, or of the innermost that is there on the way to it."""
    nearest, depth = None, -1
    for found, offset, _ in _values(text):
        if depth < len(found) <= len(path) and found == path[: len(found)]:
            nearest, depth = offset, len(found)
            if depth == len(path):
                break
    return None if nearest is None else text.count("\n", 0, nearest) + 1


def _values(text: str) -> Iterator[tuple[KeyPath, int, str]]:
    """(path, where it starts, first token) of each value of a JSON text, from the key on where it has one.

    Nothing of a text that is too long to search. The text may end to be JSON after the value that is looked for.
    """
    if len(text) > MAX_SEARCHED_CHARS:
        return
    path: list[str | int | None] = []  # for each open list the index, for each open object the key or None before it
    start = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token == ":":
            continue
        if token in "]},":
            if not path:
                return  # not JSON from here on
            if token != ",":
                path.pop()
            else:
                path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
        elif path and path[-1] is None:
            if len(token) < 2 or token[0] != '"':
                return
            path[-1], start = json.loads(token, strict=False), match.start()
        else:
            here = tuple(key for key in path if key is not None)  # every key on the way to a value is known
            yield here, start if path and isinstance(path[-1], str) else match.start(), token
            if token in "[{":
                path.append(0 if token == "[" else None)


# ------------------------------------------------------------------------------------------------------------- writing


def to_json(document: Any) -> str:
    """Standard JSON; a number that is not finite becomes null."""
    return json.dumps(_or_null(document), indent=2, allow_nan=False)


def check_writable(path: str, option: str = "") -> None:
    """Refuse, before the work is done, a place where no file can be written; `option` is what named it, if anything."""
    try:
        target = _target(path)
        if target.is_dir():
            raise BadInput(_place(option, path), "is a directory", "need a file name")
        if not target.parent.is_dir():
            raise BadInput(_place(option, path), f"no such directory: {Path(path).parent}", "create it first")
        if _replaceable(target):
            _refuse_protected(target)
            temporary = _sibling(target)
            try:
                temporary.touch(exist_ok=False)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
    except (OSError, ValueError) as error:
        raise _unwritable(path, option, error) from None


def write_whole(path: str | os.PathLike, content: str | bytes, option: str = "") -> None:
    """Write beside the target, then rename: the file is the old one or the new one, never half of it.

    A link keeps pointing to its file, which is replaced and keeps its permissions; a read-only file is refused. A
    device is written to, and a pipe that somebody reads.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = None
    try:
        target = _target(path)
        if not _replaceable(target):
            _write_through(target, data)
            return
        _refuse_protected(target)
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask()
        temporary = _sibling(target)  # named before it is there: an interrupt in between leaves nothing
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except (OSError, ValueError) as error:
        raise _unwritable(os.fspath(path), option, error) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # not there, or not even its directory
                temporary.unlink()


def same_file(first: str | os.PathLike, second: str | os.PathLike) -> bool:
    """Whether both names lead to one file, by any links. Not if either is not there."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return False


def _target(path: str | os.PathLike) -> Path:
    """The file itself, behind any link. A name too long for a file is an error here, not after the work."""
    target = Path(os.path.realpath(path))
    if target.parent.is_dir():
        with contextlib.suppress(FileNotFoundError):
            target.stat()
    return target


def _replaceable(target: Path) -> bool:
    return target.is_file() or not target.exists()


def _refuse_protected(target: Path) -> None:
    """A rename would replace a file that its owner made read-only."""
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "is read-only")


def _write_through(target: Path, data: bytes) -> None:
    """To a device or a pipe, without waiting for one to read the pipe."""
    descriptor = os.open(target, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "wb") as file:
        os.set_blocking(descriptor, True)
        file.write(data)


def _sibling(target: Path) -> Path:
    """The name of a new hidden file in the target's directory."""
    return target.parent / f".fleetopt-{secrets.token_hex(8)}"


def _place(option: str, path: str) -> str:
    """The place of a refusal: the file, after the option that named it, if any."""
    return f"{option} {path}" if option else path


def _unwritable(path: str, option: str, error: OSError | ValueError) -> BadInput:
    if isinstance(error, BadInput):
        return error
    if getattr(error, "errno", None) == errno.ENXIO:
        return BadInput(_place(option, path), "cannot be written: nobody reads the pipe")
    return BadInput(_place(option, path), f"cannot be written: {getattr(error, 'strerror', None) or error}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _or_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_or_null(item) for item in value]
    return value
