"""Work on all cores at once."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fleetopt_jax.core import threads
from fleetopt_jax.core.threads import in_batches, in_threads


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize("first_alone", [False, True])
def test_all_are_answered_in_their_order(n, first_alone):
    assert list(in_threads(lambda i: i * i, range(n), first_alone=first_alone)) == [i * i for i in range(n)]


def test_the_first_is_done_before_the_others_begin():
    done: list[int] = []

    def task(i: int) -> tuple[int, ...]:
        done.append(i)
        return tuple(done)

    first, *_ = in_threads(task, range(5), first_alone=True)
    assert first == (0,)


def test_several_run_at_once(monkeypatch):
    monkeypatch.setattr(threads, "N_THREADS", 2)
    both = threading.Barrier(2)  # that one alone never passes
    assert list(in_threads(lambda i: both.wait(timeout=30.0) >= 0, range(2))) == [True, True]


def test_another_precision_is_kept():
    """An option that a block of this thread has, other threads have not: then nothing runs in them."""

    def kind(_: int) -> np.dtype:
        return jnp.zeros(1).dtype

    with jax.enable_x64(False):
        assert {*in_threads(kind, range(4))} == {np.dtype("float32")}


def test_what_goes_wrong_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda i: 1 // (2 - i), range(6)))


@pytest.mark.parametrize("n", [1, 4, 5, 11])
def test_rows_in_batches_are_those_of_one(n):
    """Every batch has the one shape, and says how many of its rows count; the order stays, and progress is told."""
    rng, told, asked = np.random.default_rng(n), [], []
    columns = {"a": rng.random(n), "b": rng.random((n, 3))}

    def kernel(some: dict[str, np.ndarray], n_asked: int) -> tuple[np.ndarray, np.ndarray]:
        assert some["a"].shape == (4,) and some["b"].shape == (4, 3)
        asked.append(n_asked)
        return some["a"] + some["b"].sum(axis=1), 2.0 * some["b"]

    sums, twice = in_batches(kernel, 4, columns, progress=lambda *far: told.append(far))
    np.testing.assert_array_equal(sums, columns["a"] + columns["b"].sum(axis=1))
    np.testing.assert_array_equal(twice, 2.0 * columns["b"])
    assert sorted(asked) == sorted(min(4, n - start) for start in range(0, n, 4)) and told[-1] == (n, n)
