"""Results on disk, whole or not at all."""

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
    target = Path(path)
    if target.is_dir():
        raise BadInput(f"{option} {path}", "is a directory", "need a file name")
    folder = target.parent
    if not folder.is_dir():
        raise BadInput(f"{option} {path}", f"no such directory: {folder}", "create it first")
    try:
        descriptor, probe = tempfile.mkstemp(dir=folder)
    except OSError as error:
        raise BadInput(f"{option} {path}", f"cannot be written: {error.strerror}") from None
    os.close(descriptor)
    os.unlink(probe)


def write_whole(path: str | os.PathLike, content: str | bytes, option: str = "--out") -> None:
    """Write beside the target, then rename: the file is the old one or the new one, never half of it."""
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise BadInput(f"{option} {path}", f"cannot be written: {error.strerror}") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


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
