"""Work on all cores at once."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fleetopt_jax.core import threads
from fleetopt_jax.core.threads import in_threads


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
