"""Compiled programs that outlive their process: the next one neither traces, lowers nor compiles them.

JAX's compilation cache (`jax_compilation_cache_dir`) keeps what XLA made of lowered functions. To look there, it traces
and lowers, which takes longer than anything else of a run that finds all it asks for. A `program` is kept in the same
folder by what it can depend on: the package's own files, versions, XLA's flags, the kind of device, the function, its
static arguments, and the structure, shapes and types of the others. Where that cannot be told from one process to the
next, where arguments are traced or lie on other devices, and where nothing is kept, it is what `jax.jit` makes of the
function.

What is in the folder is trusted, as JAX's own programs there are: it is code.

To load a program takes some tenths of a second, without the interpreter: `expect` begins with those that the last run
of the same name used, while this one still imports what it needs.
"""

# pyright: reportAttributeAccessIssue=false
# JAX's settings are attributes that it makes as it is imported.

import contextlib
import functools
import hashlib
import inspect
import os
import pickle
import secrets
import shutil
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
from jax.core import Tracer
from jax.experimental import serialize_executable
from jax.stages import Compiled

from fleetopt_jax.core.files import write_whole

P = ParamSpec("P")
T = TypeVar("T")

PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = "fleetopt-programs"  # within JAX's, with one folder a version of the package
MOST_VERSIONS = 4  # of the package that programs are kept of: the last used
MOST_EXPECTED = 16  # programs of a run
NOT_OURS = " at 0x"  # of an object that says where it lies, and nothing else


class Program(NamedTuple):
    """What takes leaves and makes leaves, and the structure of the record that these are of."""

    name: str  # of its file; "" where it has none
    compiled: Compiled
    result: Any


_loaded: dict[Hashable, Program] = {}
_making = threading.RLock()
_expected: dict[str, Future[tuple[Compiled, bytes] | None]] = {}
_used: dict[str, None] = {}  # names since the last `expect`, in the order of their first use


def program(
    function: Callable[P, T], *, static_argnames: str | tuple[str, ...] = (), compiler_options: dict | None = None
) -> Callable[P, T]:
    """`jax.jit(function, static_argnames=..., compiler_options=...)` that is kept. No argument is positional only."""
    names = (static_argnames,) if isinstance(static_argnames, str) else static_argnames
    jitted = jax.jit(function, static_argnames=names, compiler_options=compiler_options)
    signature = inspect.signature(function)
    who = f"{function.__module__}.{function.__qualname__} {compiler_options}"

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        folder = _folder()
        if folder is None:
            return jitted(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        choices = {name: bound.arguments.pop(name) for name in names}
        leaves, structure = jax.tree.flatten(bound.arguments)
        here = _default_device()
        if not all(_lies_on(here, leaf) for leaf in leaves):
            return jitted(*args, **kwargs)
        key = (who, tuple(choices.values()), structure, tuple(map(_kind, leaves)), _settings())
        with _making:
            if (found := _loaded.get(key)) is None:
                path = _path(folder, key)
                found = _kept(path) or _made(_Flat(function, structure, choices), leaves, compiler_options, path)
                _loaded[key] = found
        _used.setdefault(found.name)
        return cast(T, jax.tree.unflatten(found.result, found.compiled(*leaves)))

    return run


def forget() -> None:
    """Drop the programs of this process, as `jax.clear_caches` does with its own; kept ones stay kept."""
    _loaded.clear()


def expect(run: str) -> None:
    """Begin to load what the last run of that name used."""
    _used.clear()
    if folder := _folder():
        with contextlib.suppress(OSError):
            names = (_of_version(folder) / run).read_text().split()
            there = {each.name for each in _loaded.values()}
            loader = ThreadPoolExecutor(1)
            paths = [_of_version(folder) / name for name in names if name not in there]
            _expected.update({path.name: loader.submit(_read, path) for path in paths})
            loader.shutdown(wait=False)


def remember(run: str) -> None:
    """Say what this run used to the next of that name, and expect nothing more."""
    for each in _expected.values():
        each.cancel()
    _expected.clear()
    folder, names = _folder(), [name for name in _used if name][:MOST_EXPECTED]
    if folder and names:
        with contextlib.suppress(Exception):
            path, said = _of_version(folder) / run, "\n".join(names)
            if not path.exists() or path.read_text() != said:
                write_whole(path, said)


# --- what a program is known by ---------------------------------------------------------------------------------------


def _folder() -> Path | None:
    kept = jax.config.jax_compilation_cache_dir
    return Path(kept) if kept and jax.config.jax_enable_compilation_cache and not jax.config.jax_disable_jit else None


def _settings() -> Hashable:
    """What of JAX's settings programs depend on, that may change within a process."""
    return jax.config.jax_enable_x64, jax.config.jax_default_device, jax.config.jax_debug_nans


@functools.cache
def _default_device() -> Any:
    return jax.local_devices()[0]


def _lies_on(device: Any, leaf: Any) -> bool:
    """Whether an argument is a number, or an array on that device alone."""
    if isinstance(leaf, Tracer):
        return False
    return not isinstance(leaf, jax.Array) or leaf.sharding.device_set == {device}


def _kind(leaf: Any) -> Hashable:
    if hasattr(leaf, "dtype"):
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)
    return type(leaf)


@functools.cache
def _version() -> str:
    """Of all that programs are made of and by."""
    said = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            said.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    device, flags = _default_device(), os.environ.get("XLA_FLAGS")
    made_by = version("jax"), version("jaxlib"), device.client.platform_version, device.device_kind, flags
    said.update(repr(made_by).encode())
    return said.hexdigest()[:16]


def _of_version(folder: Path) -> Path:
    return folder / FOLDER / _version()


def _path(folder: Path, key: Hashable) -> Path | None:
    """Of a program's file; None where its name would say another thing in another process."""
    said = repr(key)
    return None if NOT_OURS in said else _of_version(folder) / hashlib.sha256(said.encode()).hexdigest()[:32]


# --- loaded, or made --------------------------------------------------------------------------------------------------


class _Flat:
    """A function from leaves to leaves. When it has been traced, `result` is the structure that these have."""

    result: Any

    def __init__(self, function: Callable, structure: Any, choices: dict[str, Any]):
        self._function, self._structure, self._choices = function, structure, choices
        # A name that JAX's cache does not know: of what that has loaded, XLA writes but a part.
        self.__name__ = f"{function.__name__}_{secrets.token_hex(4)}"

    def __call__(self, *leaves: Any) -> Sequence[Any]:
        found = self._function(**jax.tree.unflatten(self._structure, leaves), **self._choices)
        flat, self.result = jax.tree.flatten(found)
        return flat


def _read(path: Path) -> tuple[Compiled, bytes] | None:
    """A program and its pickled result; None where it was not kept, or cannot be read."""
    with contextlib.suppress(Exception):  # whatever is wrong with a file, it can be made again
        payload, n_leaves, n_results, result = pickle.loads(path.read_bytes())
        trees = jax.tree.structure(((0,) * n_leaves, {})), jax.tree.structure([0] * n_results)
        devices = [_default_device()]
        return serialize_executable.deserialize_and_load(payload, *trees, execution_devices=devices), result
    return None


def _kept(path: Path | None) -> Program | None:
    """A program that was kept; None where it was not."""
    if path is None:
        return None
    expected = _expected.pop(path.name, None)
    found = expected.result() if expected else _read(path)
    return found and Program(path.name, found[0], jax.tree.structure(pickle.loads(found[1])))


def _made(flat: _Flat, leaves: Sequence[Any], compiler_options: dict | None, path: Path | None) -> Program:
    """A program that is compiled, and kept where it can be."""
    compiled = jax.jit(flat, compiler_options=compiler_options).lower(*leaves).compile()
    # Programs with constants of their own cannot be written, nor anything to a full disk: then the next run is slower.
    with contextlib.suppress(Exception):
        if path is not None:
            n = flat.result.num_leaves
            payload, result = serialize_executable.serialize(compiled)[0], jax.tree.unflatten(flat.result, range(n))
            _make_room(path.parent)
            write_whole(path, pickle.dumps((payload, len(leaves), n, pickle.dumps(result))))
            return Program(path.name, compiled, flat.result)
    return Program("", compiled, flat.result)


def _make_room(folder: Path) -> None:
    """For the programs of this version of the package: those of the versions that were used last stay."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.parent.iterdir(), key=lambda each: each.stat().st_mtime)[:-MOST_VERSIONS]:
            shutil.rmtree(old, ignore_errors=True)
