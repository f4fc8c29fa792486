"""`sweep`: the best plan of every scenario, as the rows of one file."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from fleetopt_jax._optimize.batch import THRESHOLDS
from fleetopt_jax._optimize.problem import Method
from fleetopt_jax._sweep.parts import Parts
from fleetopt_jax._sweep.units import How, Make, Unit, scenarios_of, units_of
from fleetopt_jax._sweep.workers import Done, Log, Prepare, in_pool, in_process, on_ray
from fleetopt_jax.core.files import check_writable
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.documents.sweep import schema_of

MAX_THRESHOLDS = 65_536


def sweep(
    make: Make,
    axes: Mapping[str, Sequence[Any]],
    out: str | os.PathLike,
    *,
    method: Method | None = None,
    n_thresholds: int = THRESHOLDS,
    workers: int = 1,
    address: str | None = None,
    prepare: Prepare | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
) -> pa.Table:
    """The best plan of every combination of inputs, a row each: `documents/sweep.py` has the columns. Written to `out`
    (Parquet) and returned.

    `make(**inputs)` is the `Problem` of one scenario; `axes` are the values of each input. A scenario that it refuses
    (ValueError), that no fleet serves, or whose worker ended, is a row that says why. Scenarios go two ways:
    - **Together**, much faster: the exact search of at most two pools, with a given gamma, without a budget,
      limits of the whole fleet, free batch limits or clocks, or a prefix cache whose hits depend on its size; under any
      assumptions, published or physical, with any engines. They are searched over `n_thresholds` windows, even in a
      mean of requests, tokens and log-length, and `optimal` is over these (`search.candidates`). Those of one shape,
      whose requests are one workload's at whatever rate, share a program and a batch (`_optimize/batch.py`).
    - **One by one**, by `optimize` with all of its candidates: all others. They share programs as any two calls do.
    Batches are shared by all local devices. `workers` > 1 are processes of this machine, `address` a Ray cluster
    ("auto", "local" or host:port; `workers` then says how many units are given out); each first runs `prepare`, which
    must switch float64 on (a function of a module; the main script of a pool is imported as well). Rows do not depend
    on any of this, to the bit. What is done is kept in `out`.parts: a sweep that was ended, however, goes on from there
    when it is called again. `progress` is told of scenarios, `log` of workers that ended.

    >>> def problem(rate):
    ...     chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=rate)
    ...     return fo.make_problem(chat, [fo.EngineSpec("h100")])
    >>> fo.sweep(problem, {"rate": [10.0, 20.0]}, "rates.parquet")["status"].to_pylist()
    ['optimal', 'optimal']
    """
    require_float64("sweep")
    if not 1 <= n_thresholds <= MAX_THRESHOLDS or workers < 1:
        allowed = f"need n_thresholds from 1 to {MAX_THRESHOLDS:,} and workers >= 1"
        raise ValueError(f"{allowed}, got {n_thresholds}, {workers}")
    scenarios = scenarios_of(make, axes)
    check_writable(os.fspath(out))
    parts = Parts(out, schema_of(scenarios.axes))
    done, total = 0, len(scenarios)

    def missing(units: Iterator[Unit]) -> Iterator[Unit]:
        nonlocal done
        for unit in units:
            if not parts.has(unit):
                yield unit
                continue
            done += len(unit.members)

    units = missing(units_of(scenarios, How(method, n_thresholds)))
    for unit, rows in _answered(units, workers, address, prepare, log or (lambda text: None)):
        parts.put(unit, rows)
        done += len(unit.members)
        if progress:
            progress(done, total)
    return parts.finish()


def _answered(units: Iterator[Unit], workers: int, address: str | None, prepare: Prepare | None, log: Log) -> Done:
    if address is not None:
        return on_ray(units, address, workers if workers > 1 else None, prepare, log)
    return in_process(units) if workers == 1 else in_pool(units, workers, prepare, log)
