"""Work on all cores at once: compiled programs run without Python's lock."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np

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
