"""Work on all cores at once: compiled programs run without Python's lock."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

from fleetopt_jax.core.progress import Progress

S = TypeVar("S")
T = TypeVar("T")

N_THREADS = os.cpu_count() or 1  # each keeps one core busy


def same_in_threads() -> bool:
    """Whether threads that are started now compute in the precision of this one: they have JAX's options as the process
    has them, not as a block of this thread does."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(_precision).result() == _precision()


def _precision() -> np.dtype:
    return jax.dtypes.canonicalize_dtype(float)


def in_threads(task: Callable[[S], T], each: Sequence[S], *, first_alone: bool = False) -> Iterator[T]:
    """What a task says of each, in their order, as many at a time as there are cores, where threads compute as this one
    does. `first_alone` where the first compiles what the others run."""
    alone = len(each) if len(each) < 2 or not same_in_threads() else int(first_alone)
    yield from map(task, each[:alone])
    if alone == len(each):
        return
    threads = ThreadPoolExecutor(N_THREADS)
    try:
        yield from threads.map(task, each[alone:])
    finally:
        threads.shutdown(cancel_futures=True)  # an interrupt waits for none


def in_batches(kernel: Callable[[Any, int], Any], size: int, columns: Any, *, progress: Progress | None = None) -> Any:
    """What a compiled `kernel` says of the rows of a record of columns [M, ...], as one record of arrays [M, ...].

    It is asked for `size` rows at a time, and told how many of them count: the last batch repeats its last row, so that
    all have the shape that was compiled.
    """
    n = len(jax.tree.leaves(columns)[0])

    def part(start: int) -> Any:
        rows, asked = np.minimum(np.arange(start, start + size), n - 1), min(size, n - start)
        some = jax.tree.map(lambda column: np.asarray(column)[rows], columns)
        return jax.tree.map(lambda each: np.asarray(each)[:asked], kernel(some, asked))

    starts, found = range(0, n, size), []
    for start, each in zip(starts, in_threads(part, starts, first_alone=True), strict=True):
        found.append(each)
        if progress:
            progress(min(start + size, n), n)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
