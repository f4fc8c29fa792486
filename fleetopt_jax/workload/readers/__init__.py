"""Requests at the door: files of request lengths, read as they are and checked before anything is computed.

A file is known by its content: packed (`containers.py`), and csv, JSON lines, a JSON document, Parquet or Prometheus
metrics, each read by its own module into a `Source`: the names of its columns, and a stream of some of them. Layouts
that are known by name are in one table (`known.py`); others are named in a `Layout`. `collect.py` makes a checked
`Trace` of any source; the trace carries what was understood of the file, and what is odd about it.
"""

import os
from collections.abc import Callable
from typing import BinaryIO

import pyarrow as pa

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import first_line, opened
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.cdf_document import CdfDocument, parse_cdf
from fleetopt_jax.workload.readers.collect import collect
from fleetopt_jax.workload.readers.containers import Kind, head_of, kind_of, plain
from fleetopt_jax.workload.readers.csv_text import open_csv
from fleetopt_jax.workload.readers.json_document import open_json
from fleetopt_jax.workload.readers.json_lines import open_jsonl
from fleetopt_jax.workload.readers.limits import MAX_TOKENS
from fleetopt_jax.workload.readers.parquet import open_parquet
from fleetopt_jax.workload.readers.prometheus import parse_metrics
from fleetopt_jax.workload.readers.records import CdfFile, Histogram, Histograms, Layout, Source, Trace, Understood

__all__ = [
    "MAX_TOKENS",
    "CdfDocument",
    "CdfFile",
    "Histogram",
    "Histograms",
    "Layout",
    "Trace",
    "Understood",
    "parse_cdf",
    "read_workload_file",
]

READERS: dict[Kind, Callable[[str, BinaryIO, Layout | None], Source | CdfFile | Histograms]] = {
    "csv": open_csv,
    "jsonl": open_jsonl,
    "json": open_json,
    "parquet": open_parquet,
    "prometheus": parse_metrics,
}


def read_workload_file(path: str | os.PathLike, layout: Layout | None = None) -> Trace | CdfFile | Histograms:
    """The requests, the CDF or the histograms in a file; `BadInput` names the row or field that is wrong."""
    where = os.fspath(path)
    with opened(where, limits.MAX_TRACE_BYTES, unpack=False) as packed:
        stream, details = plain(where, packed)
        kind = kind_of(where, head_of(where, stream))
        try:
            found = READERS[kind](where, stream, layout)
        except BadInput:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise BadInput(where, f"cannot be read as {kind}: {first_line(error)}") from error
        return collect(where, found, layout, details) if isinstance(found, Source) else found
