import cmath

import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax.core.numerics import exp


def test_exp_of_complex_numbers_is_that_of_the_c_library():
    rng = np.random.default_rng(7)
    turns = np.concatenate([np.arange(-9, 10) * np.pi / 4.0, rng.uniform(-1e6, 1e6, 4000), rng.uniform(-30, 30, 4000)])
    z = rng.uniform(-30.0, 3.0, len(turns)) + 1j * turns
    expected = np.array([cmath.exp(each) for each in z])
    np.testing.assert_array_less(np.abs(exp(jnp.asarray(z)) - expected), 1e-11 * np.abs(expected))


def test_exp_of_real_numbers_is_jaxs():
    x = jnp.linspace(-5.0, 5.0, 11)
    np.testing.assert_array_equal(exp(x), jnp.exp(x))


@pytest.mark.parametrize("turn", [0.0, np.pi / 4.0, 2.0, -31.0])
def test_exp_is_differentiable(turn: float):
    def parts(x, y):
        z = exp(x + 1j * y)
        return z.real, z.imag

    check_grads(parts, (0.3, turn), order=2, modes=["fwd", "rev"], rtol=1e-6)
