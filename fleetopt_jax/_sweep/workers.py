"""Who answers the units of a sweep: this process, a pool of processes, or Ray's workers on many machines.

Each takes an iterator of units and gives (unit, rows) as they are done, a few units ahead of the slowest. A worker that
ends without an answer, killed or out of memory, loses nothing: what it had is given out again, each unit alone, so that
one that ends its worker a second time is known by it and becomes rows that say so.
"""

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import cache
from multiprocessing.reduction import ForkingPickler

import jax

from fleetopt_jax._sweep.units import Unit, answer
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.files import first_line
from fleetopt_jax.core.threads import same_in_threads
from fleetopt_jax.documents.sweep import Row, failed_row

AHEAD = 2  # units given out for each worker
TRIES = 2  # of a unit alone, before its worker's end is taken for its fault
RAY_TRIES = 3  # of Ray, with others beside it
RAY_NEED = "need auto, local, or the host:port that `ray start --head` says"
ENDED = "the worker that had it ended without an answer, each time: killed, or out of memory"

Done = Iterator[tuple[Unit, list[Row]]]
Prepare = Callable[[], object]
Log = Callable[[str], None]


def lost(unit: Unit, reason: str) -> list[Row]:
    """The rows of a unit whose answer never comes."""
    return [member.row(failed_row(reason)) for member in unit.members]


# --- this process -----------------------------------------------------------------------------------------------------


def in_process(units: Iterator[Unit]) -> Done:
    """By this process: all of its devices share a batch; where it has one, a CPU, its cores have a batch each."""
    several = len(jax.local_devices()) > 1 or jax.default_backend() != "cpu" or not same_in_threads()
    if several:
        yield from ((unit, answer(unit)) for unit in units)
        return
    for unit in itertools.islice(units, 1):  # compiles
        yield unit, answer(unit)
    n_threads = os.cpu_count() or 1
    threads = ThreadPoolExecutor(n_threads)
    try:
        pending: deque[tuple[Unit, Future[list[Row]]]] = deque()
        for unit in units:
            pending.append((unit, threads.submit(answer, unit)))
            if len(pending) >= AHEAD * n_threads:
                first, rows = pending.popleft()
                yield first, rows.result()
        yield from ((unit, rows.result()) for unit, rows in pending)
    finally:
        threads.shutdown(cancel_futures=True)


# --- a pool of processes ----------------------------------------------------------------------------------------------


@cache
def _prepared(prepare: Prepare | None) -> None:
    """Once in each process."""
    if prepare is not None:
        prepare()


def in_worker(unit: Unit, prepare: Prepare | None) -> list[Row]:
    """What a worker does, in a process of its own."""
    _prepared(prepare)
    return answer(unit)


class _Pool:
    """Processes of this machine, new ones where one of them ended."""

    def __init__(self, n_workers: int, prepare: Prepare | None):
        self._n_workers, self._prepare = n_workers, prepare
        self._start()

    def submit(self, unit: Unit) -> Future[list[Row]]:
        _check_sendable(unit, self._prepare)
        try:
            return self._processes.submit(in_worker, unit, self._prepare)
        except BrokenExecutor as error:
            ended: Future[list[Row]] = Future()
            ended.set_exception(error)
            return ended

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._processes.shutdown(cancel_futures=True)

    def _start(self) -> None:
        spawned = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        self._processes = ProcessPoolExecutor(self._n_workers, spawned)


def in_pool(units: Iterator[Unit], n_workers: int, prepare: Prepare | None, log: Log) -> Done:
    """By a pool of processes of this machine."""
    pool, pending = _Pool(n_workers, prepare), {}
    suspects: deque[Unit] = deque()  # had been given out as a worker ended
    try:
        while True:
            while suspects:
                unit = suspects.popleft()
                yield unit, _by_itself(pool, unit, log)
            for unit in itertools.islice(units, AHEAD * n_workers - len(pending)):
                pending[pool.submit(unit)] = unit
            if not pending:
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            if any(isinstance(future.exception(), BrokenExecutor) for future in done):
                done, _ = wait(pending)  # the others have their answer, or have none either
            for future in done:
                unit, rows = pending.pop(future), _rows_of(future)
                if rows is None:
                    suspects.append(unit)
                else:
                    yield unit, rows
            if suspects:
                n = sum(len(unit.members) for unit in suspects)
                log(f"a worker ended without an answer: {n:,} scenarios are given out again")
                pool.restart()
    finally:
        pool.close()


def _by_itself(pool: _Pool, unit: Unit, log: Log) -> list[Row]:
    """The rows of a unit while no other is given out."""
    for _ in range(TRIES):
        rows = _rows_of(pool.submit(unit))
        if rows is not None:
            return rows
        pool.restart()
    log(f"scenario {unit.members[0].number}: {ENDED}")
    return lost(unit, ENDED)


def _rows_of(future: "Future[list[Row]]") -> list[Row] | None:
    """What a worker answered; None where it ended without."""
    try:
        return future.result()
    except BrokenExecutor:
        return None


def _check_sendable(unit: Unit, prepare: Prepare | None) -> None:
    try:
        ForkingPickler.dumps((unit, prepare))
    except Exception as error:  # of whatever a scenario's own laws are made of
        problem = f"a scenario cannot go to another process: {first_line(error)}"
        raise BadField("workers", problem, "need laws of modules that it can import, or one worker") from None


# --- Ray --------------------------------------------------------------------------------------------------------------


def on_ray(units: Iterator[Unit], address: str, n_workers: int | None, prepare: Prepare | None, log: Log) -> Done:
    """By workers of a Ray cluster, which gives a unit out again where its worker ends; "local" starts one here."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadField("address", "Ray is not installed", "pip install 'fleetopt_jax[ray]', or leave it out") from None
    try:
        ray.init(**_where(address, n_workers), log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BadField("address", f"{address}: no Ray cluster is reached: {first_line(error)}", RAY_NEED) from None
    try:
        work = ray.remote(max_retries=RAY_TRIES)(in_worker)
        most = AHEAD * (n_workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
        pending = {}
        while True:
            for unit in itertools.islice(units, most - len(pending)):
                pending[work.remote(unit, prepare)] = unit
            if not pending:
                return
            (done, *_), _ = ray.wait(list(pending))
            unit = pending.pop(done)
            try:
                yield unit, ray.get(done)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                log(f"scenario {unit.members[0].number}: {ENDED}")
                yield unit, lost(unit, ENDED)
    finally:
        ray.shutdown()


def _where(address: str, n_workers: int | None) -> dict[str, object]:
    return {"num_cpus": n_workers or os.cpu_count()} if address == "local" else {"address": address}
