"""Results on disk, whole or not at all."""

import contextlib
import errno
import json
import math
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from fleetopt_jax.core.errors import BadInput


def to_json(document: Any) -> str:
    """Standard JSON; a number that is not finite becomes null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def check_writable(path: str, option: str = "--out") -> None:
    """Refuse, before the work is done, a place where no file can be written."""
    try:
        target = _target(path)
        if target.is_dir():
            raise BadInput(f"{option} {path}", "is a directory", "need a file name")
        if not target.parent.is_dir():
            raise BadInput(f"{option} {path}", f"no such directory: {Path(path).parent}", "create it first")
        if _replaceable(target):
            _refuse_protected(target)
            temporary = _beside(target)
            try:
                temporary.touch(exist_ok=False)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
    except (OSError, ValueError) as error:
        raise _unwritable(path, option, error) from None


def write_whole(path: str | os.PathLike, content: str | bytes, option: str = "--out") -> None:
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
        temporary = _beside(target)  # named before it is there: an interrupt in between leaves nothing
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


def _beside(target: Path) -> Path:
    """The name of a new hidden file in the target's directory."""
    return target.parent / f".fleetopt-{secrets.token_hex(8)}"


def _unwritable(path: str, option: str, error: OSError | ValueError) -> BadInput:
    if isinstance(error, BadInput):
        return error
    if getattr(error, "errno", None) == errno.ENXIO:
        return BadInput(f"{option} {path}", "cannot be written: nobody reads the pipe")
    return BadInput(f"{option} {path}", f"cannot be written: {getattr(error, 'strerror', None) or error}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
