"""Results on disk, whole or not at all."""

import contextlib
import json
import math
import os
import tempfile
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
            os.unlink(_beside(target))
    except OSError as error:
        raise _unwritable(path, option, error) from None


def write_whole(path: str | os.PathLike, content: str | bytes, option: str = "--out") -> None:
    """Write beside the target, then rename: the file is the old one or the new one, never half of it.

    A link keeps pointing to its file, which is replaced; a pipe or a device is written to.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        target = _target(path)
        if not _replaceable(target):
            target.write_bytes(data)
            return
        temporary = _beside(target)
        Path(temporary).write_bytes(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise _unwritable(os.fspath(path), option, error) from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _target(path: str | os.PathLike) -> Path:
    """The file itself, behind any link. A name too long for a file is an error here, not after the work."""
    target = Path(os.path.realpath(path))
    if target.parent.is_dir():
        with contextlib.suppress(FileNotFoundError):
            target.stat()
    return target


def _replaceable(target: Path) -> bool:
    return target.is_file() or not target.exists()


def _beside(target: Path) -> str:
    """A new, empty, hidden file in the target's directory."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".fleetopt-")
    os.close(descriptor)
    return name


def _unwritable(path: str, option: str, error: OSError) -> BadInput:
    return BadInput(f"{option} {path}", f"cannot be written: {error.strerror or error}")


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
