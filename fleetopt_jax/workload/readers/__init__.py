"""Requests at the door: files of request lengths, read as they are and checked before anything is computed.

A file is known by its content: packed (`containers.py`), and csv, JSON lines, a JSON document, Parquet or Prometheus
metrics, each read by its own module into a `Source`: the names of its columns, and a stream of some of them. Layouts
that are known by name are in one table (`known.py`); others are named in a `Layout`. `collect.py` makes a checked
`Trace` of any source; the trace carries what was understood of the file, and what is odd about it.
"""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import first_line, opened
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.workload.clock import OutOfOrder
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.cdf_document import CdfDocument, parse_cdf
from fleetopt_jax.workload.readers.collect import Part, collect
from fleetopt_jax.workload.readers.containers import Kind, head_of, kind_of, plain
from fleetopt_jax.workload.readers.csv_text import open_csv
from fleetopt_jax.workload.readers.json_document import open_json
from fleetopt_jax.workload.readers.json_lines import open_jsonl
from fleetopt_jax.workload.readers.limits import MAX_TOKENS
from fleetopt_jax.workload.readers.parquet import open_parquet
from fleetopt_jax.workload.readers.prometheus import parse_metrics
from fleetopt_jax.workload.readers.records import (
    CdfFile,
    Histogram,
    Histograms,
    Layout,
    LongTrace,
    Source,
    Trace,
    Understood,
)

__all__ = [
    "MAX_TOKENS",
    "CdfDocument",
    "CdfFile",
    "Histogram",
    "Histograms",
    "Layout",
    "LongTrace",
    "Trace",
    "Understood",
    "parse_cdf",
    "read_workload_file",
]

Watch = Callable[[int], None] | None
Found = Trace | LongTrace | CdfFile | Histograms
READERS: dict[Kind, Callable[[str, BinaryIO, Layout | None], Source | CdfFile | Histograms]] = {
    "csv": open_csv,
    "jsonl": open_jsonl,
    "json": open_json,
    "parquet": open_parquet,
    "prometheus": parse_metrics,
}


def read_workload_file(
    path: str | os.PathLike,
    layout: Layout | None = None,
    *,
    keep: bool = False,
    within_s: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> Found:
    """The requests, the CDF or the histograms in a file; `BadInput` names the row or field that is wrong.

    A folder, or a pattern as `logs/2026-*.parquet`, is the trace of its files one after another, in order of their
    names. A trace of more than `limits.MAX_KEPT_ROWS` requests, or `limits.MAX_KEPT_BLOCKS` hashes, is read in one pass
    and in bounded memory, with a sample of its blocks or sessions; unless its rows are to be kept (`keep`), sum
    requests, or name the turn before; or unless its time stamps are out of order by more than a piece, which is found
    out on the way: then it is read again and kept. `within_s` and `keep` as in `collect`; `progress` is told of bytes.
    """
    where = os.fspath(path)
    names = files_of(where)
    try:
        return _read(names, layout, _watch(names, progress), keep=keep, within_s=within_s)
    except OutOfOrder:
        if not all(os.path.isfile(name) for name in names):
            raise BadInput(where, "a long trace is not in order of time", "sort it, or put it into a file") from None
    return _read(names, layout, _watch(names, progress), keep=True)


def _read(
    names: list[str], layout: Layout | None, watch: Watch, **how: Any
) -> Trace | LongTrace | CdfFile | Histograms:
    if len(names) > 1:
        return collect(_parts(names, layout, watch), layout, **how)
    with _opened(names[0], layout, watch) as (found, details):
        return collect([Part(names[0], found, details)], layout, **how) if isinstance(found, Source) else found


def _watch(names: list[str], progress: Progress | None) -> Watch:
    """What is told of bytes as they are read, and tells how many there are of all."""
    if progress is None:
        return None
    total, read = sum(os.path.getsize(name) for name in names if os.path.isfile(name)), 0

    def watch(n_bytes: int) -> None:
        nonlocal read
        read += n_bytes
        progress(min(read, total), total)

    return watch


@contextmanager
def _opened(
    where: str, layout: Layout | None, watch: Watch
) -> Iterator[tuple[Source | CdfFile | Histograms, tuple[str, ...]]]:
    """What a file holds, and what it was taken out of."""
    with opened(where, limits.MAX_TRACE_BYTES, unpack=False, watch=watch) as packed:
        stream, details = plain(where, packed)
        kind = kind_of(where, head_of(where, stream))
        try:
            found = READERS[kind](where, stream, layout)
        except BadInput:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise BadInput(where, f"cannot be read as {kind}: {first_line(error)}") from error
        yield found, details


def files_of(where: str) -> list[str]:
    """The files that a name stands for: those of a folder, but for hidden ones, and of a pattern; else itself."""
    if os.path.isdir(where):
        names = [os.path.join(where, name) for name in sorted(os.listdir(where)) if not name.startswith((".", "_"))]
        found = [name for name in names if os.path.isfile(name)]
        need = "need files in it, no folders of folders"
    elif any(letter in where for letter in "*?[") and not os.path.exists(where):
        found, need = sorted(filter(os.path.isfile, glob.glob(where))), "need a pattern that files match"
    else:
        return [where]
    if not found or len(found) > limits.MAX_FILES:
        raise BadInput(where, f"{len(found):,} files", need if not found else f"need at most {limits.MAX_FILES:,}")
    return found


def _parts(names: list[str], layout: Layout | None, watch: Watch) -> Iterator[Part]:
    """Each file of a trace, open while it is read."""
    for name in names:
        with _opened(name, layout, watch) as (found, details):
            if not isinstance(found, Source):
                what = "a CDF" if isinstance(found, CdfFile) else "histograms"
                raise BadInput(name, f"holds {what}, not requests", "need one file, or files of requests")
            yield Part(name, found, details)
