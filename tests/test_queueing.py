"""Erlang-B and Erlang-C against the exact recursion, and the M/G/c wait against every case with a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import gammaincc, gammaln

from fleetopt_jax.laws.queueing import erlang_c, fresh_frac, log_erlang_b, log_erlang_c, mean_wait_s, p99_wait_s

SERVERS = np.array([1, 2, 3, 4, 7, 10, 31, 100, 316, 1000, 3162, 10_000, 31_623, 100_000])
RHO = np.array([0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.85, 0.9, 0.95, 0.99, 0.999, 0.9999])
WAITS = {"mean": mean_wait_s, "p99": p99_wait_s}
N = 4000


def batched(law):
    """`law` over arrays of at most N numbers, repeated to one shape so that it compiles once."""
    compiled = jax.jit(jax.vmap(law))
    return lambda *arrays: jax.tree.map(
        lambda x: np.asarray(x)[: len(arrays[0])], compiled(*(np.resize(x, N) for x in arrays))
    )


log_b = batched(log_erlang_b)
log_b_slope = batched(jax.grad(log_erlang_b))
log_c = batched(log_erlang_c)
wait = {name: batched(law) for name, law in WAITS.items()}
wait_grad = {name: batched(jax.grad(law, argnums=(0, 1, 2, 3))) for name, law in WAITS.items()}


def recursion_log_inverse_b(servers: np.ndarray, load: np.ndarray) -> np.ndarray:
    """ln(1/B) by 1/B(c) = 1 + c/a / B(c-1), with the binary exponent kept apart: 1/B overflows, its mantissa never."""
    mantissa, exponent = np.ones_like(load), np.zeros(load.shape, dtype=int)
    result = np.empty_like(load)
    for c in range(1, servers.max() + 1):
        mantissa, shift = np.frexp(np.ldexp(1.0, -np.minimum(exponent, 2000)) + c / load * mantissa)
        exponent = exponent + shift
        if c in SERVERS:
            result = np.where(servers == c, np.log(mantissa) + exponent * np.log(2.0), result)
    return result


def random_queues(n: int, *, max_rho: float = 0.999) -> tuple[np.ndarray, ...]:
    """(servers, rate [1/s], service [s], scv) of n stable queues with real servers, offered loads up to 300 erlang."""
    u = np.random.default_rng(1).random((4, n))
    servers = np.exp(u[0] * np.log(300.0))
    service_s = 0.05 * 400.0 ** u[1]
    rate_per_s = (0.2 + (max_rho - 0.2) * u[2]) * servers / service_s
    return servers, rate_per_s, service_s, 4.0 * u[3]


def test_erlang_matches_the_exact_recursion_from_1_to_100000_servers():
    servers, rho = (x.ravel() for x in np.meshgrid(SERVERS, RHO))
    load = rho * servers
    exact_b = -recursion_log_inverse_b(servers, load)
    exact_c = exact_b - np.log1p(-(load / servers) * -np.expm1(exact_b))
    # A difference of logs is a relative error: 1e-10 is what the law promises.
    np.testing.assert_allclose(log_b(servers, load), exact_b, rtol=0, atol=1e-10)
    np.testing.assert_allclose(log_c(servers, load), exact_c, rtol=0, atol=1e-10)


def test_erlang_b_of_real_servers_is_the_incomplete_gamma_function():
    u = np.random.default_rng(2).random((2, N))
    # Up to 3,000 servers: beyond, the reference itself loses 1e-11 by subtracting terms of the order of c ln c.
    servers = 3000.0 ** u[0]
    load = servers * (0.01 + 0.9899 * u[1])
    exact = servers * np.log(load) - load - gammaln(servers + 1) - np.log(gammaincc(servers + 1, load))
    np.testing.assert_allclose(log_b(servers, load), exact, rtol=0, atol=1e-10)


def test_erlang_b_falls_smoothly_and_convexly_between_whole_servers():
    """B(c, a) is convex in real c (Jagers and van Doorn 1986): no kink shows at the whole numbers."""
    servers = np.linspace(10.0, 40.0, 3001)
    load = np.full_like(servers, 9.5)
    blocking = np.exp(log_b(servers, load))
    slope = blocking * log_b_slope(servers, load)
    assert np.all(np.diff(blocking) < 0)
    assert np.all(slope < 0)
    assert np.all(np.diff(slope) > 0)
    # Central differences with h = 0.01 are h^2 / 6 times a third derivative of the order of the slope: 1e-4 covers it.
    np.testing.assert_allclose((blocking[2:] - blocking[:-2]) / 0.02, slope[1:-1], rtol=1e-4)


def test_erlang_c_is_a_probability_and_certain_in_overload():
    rng = np.random.default_rng(3)
    servers, rho = 1e5 ** rng.random(N), 1.5 * rng.random(N)
    rho[:3] = 0.0, 1.0, 1.0 - 1e-16
    servers[:3] = 7.0
    probability = np.asarray(jax.vmap(erlang_c)(servers, rho * servers))
    assert np.all((probability >= 0) & (probability <= 1))
    assert np.all(probability[rho >= 1] == 1)
    assert probability[0] == 0


def test_mean_wait_of_mmc_is_littles_law_on_the_birth_death_chain():
    servers = np.array([1, 2, 3, 5, 8, 13, 21, 34])
    rho = np.array([0.1, 0.5, 0.8, 0.9, 0.95])
    for c in servers:
        rate = rho * c / 0.7
        n = np.arange(4000)  # 0.95^4000 is 1e-89: the chain is cut where nothing is left
        log_ratio = np.log(rate * 0.7)[:, None] - np.log(np.minimum(np.maximum(n, 1), c))
        log_ratio[:, 0] = 0.0
        state = np.exp(np.cumsum(log_ratio, axis=1))
        queue = (state * np.maximum(n - c, 0)).sum(axis=1) / state.sum(axis=1)
        waited = wait["mean"](np.full(5, float(c)), rate, np.full(5, 0.7), np.ones(5))
        np.testing.assert_allclose(waited, queue / rate, rtol=1e-10)


def test_one_server_waits_as_pollaczek_and_khinchine_say():
    _, _, service_s, scv = random_queues(N)
    rho = np.linspace(0.001, 0.9999, N)
    rate = rho / service_s
    ones = np.ones(N)
    second_moment = (1.0 + scv) * service_s**2
    # 1e-9: at rho = 0.9999 the rounding of 1 - rho alone is 1e-12, and C carries 1e-10.
    np.testing.assert_allclose(
        wait["mean"](ones, rate, service_s, scv), rate * second_moment / 2 / (1 - rho), rtol=1e-9
    )
    np.testing.assert_allclose(wait["mean"](ones, rate, service_s, ones), rho * service_s / (1 - rho), rtol=1e-9)
    p99 = np.maximum(0.0, np.log(rho / 0.01)) / (1 / service_s - rate)
    np.testing.assert_allclose(wait["p99"](ones, rate, service_s, ones), p99, rtol=1e-9, atol=1e-9)


def test_p99_wait_of_mmc_is_exceeded_by_one_request_in_a_hundred():
    servers, rate, service_s, _ = random_queues(N)
    p99 = np.asarray(wait["p99"](servers, rate, service_s, np.ones(N)))
    waiting = np.exp(log_c(servers, rate * service_s))
    late = waiting * np.exp(-(servers / service_s - rate) * p99)
    assert np.all((p99 == 0) == (waiting <= 0.01))
    np.testing.assert_allclose(late[p99 > 0], 0.01, rtol=1e-10)


@pytest.mark.parametrize("name", WAITS)
def test_waits_fall_with_servers_and_rise_with_rate_service_and_variability(name):
    queues = random_queues(N)
    assert np.all(np.isfinite(wait[name](*queues)))
    by_servers, *by_others = (np.asarray(x) for x in wait_grad[name](*queues))
    if name == "mean":
        assert np.all(by_servers < 0)
        assert all(np.all(x > 0) for x in by_others)
    else:  # flat at 0 where less than 1 % wait
        assert np.all(by_servers <= 0)
        assert np.any(by_servers < 0)
        assert all(np.all(x >= 0) for x in by_others)
        assert all(np.any(x > 0) for x in by_others)
    more = [queues[0], queues[1], queues[2], 1.0 + queues[3]]
    np.testing.assert_allclose(  # Kimura's scaling: both waits are proportional to 1 + cs2
        wait[name](*more) * (1 + queues[3]), wait[name](*queues) * (2 + queues[3]), rtol=1e-12
    )


@pytest.mark.parametrize("name", WAITS)
def test_overload_waits_for_ever_and_keeps_gradients_finite(name):
    rho = np.array([0.0, 1e-300, 1 - 1e-9, 1 - 1e-15, 1.0, 1 + 1e-15, 1.5, 100.0])
    servers, rho = (x.ravel() for x in np.meshgrid([1.0, 1.5, 40.0, 100_000.0], rho))
    queues = (servers, rho * servers / 2.0, np.full_like(rho, 2.0), np.full_like(rho, 0.5))
    waits = np.asarray(wait[name](*queues))
    assert np.all(np.isinf(waits[rho >= 1 + 1e-15]))
    assert np.all(np.isfinite(waits[rho <= 1 - 1e-15]))
    assert np.all(waits >= 0)
    assert all(np.all(np.isfinite(x)) for x in wait_grad[name](*queues))


@pytest.mark.parametrize("name", WAITS)
def test_wait_gradients_match_finite_differences(name):
    """As elasticities, where servers, rates and seconds have the same scale."""
    queues = np.array(random_queues(N, max_rho=0.98))
    queues[3] += 0.01  # away from zero, where a relative step is none
    scale = 1e-3 + wait[name](*queues)
    exact = queues * np.stack(wait_grad[name](*queues)) / scale
    h = 1e-6
    nudges = 1 + h * np.eye(4)[:, :, None]
    differences = np.stack([wait[name](*(queues * nudge)) - wait[name](*(queues / nudge)) for nudge in nudges]) / (
        2 * h
    )
    smooth = np.ones(N, dtype=bool)
    if name == "p99":  # the kink where exactly 1 % wait has one-sided differences only
        smooth = np.abs(log_c(queues[0], queues[1] * queues[2]) - np.log(0.01)) > 1e-3
    # Rounding of the values gives 1e-10 / h, curvature h^2 times up to 1 / (1 - rho)^3.
    np.testing.assert_allclose(exact[:, smooth], (differences / scale)[:, smooth], rtol=1e-5, atol=1e-5)


def test_what_is_left_of_an_iteration_when_a_router_learns_of_it():
    """Against drawn delays; all of it to a router that always knows, and without a step where both are as long."""
    late, lengths = np.random.default_rng(3).random(200_000) * 0.05, np.geomspace(0.002, 2.0, 30)
    drawn = [np.maximum(0.0, 1.0 - late / length).mean() for length in lengths]
    np.testing.assert_allclose(fresh_frac(lengths, 0.05), drawn, atol=3e-3)
    assert float(fresh_frac(1.0, 1e-9)) == pytest.approx(1.0)
    slope = jax.vmap(jax.grad(fresh_frac), (0, None))(jnp.asarray([0.05 - 1e-9, 0.05 + 1e-9]), 0.05)
    np.testing.assert_allclose(slope, 10.0, rtol=1e-6)


def test_waits_are_differentiable_both_ways():
    def law(logs):
        return jnp.log(jnp.stack([law(*jnp.exp(logs)) for law in WAITS.values()]))

    busy = np.log([13.7, 12.9 / 2.0, 2.0, 0.3])
    check_grads(jax.jit(law), (busy,), order=1, modes=("fwd", "rev"), rtol=1e-6, atol=1e-6)


def test_compiling_does_not_change_the_wait():
    queues = random_queues(N)
    # The sum over quadrature nodes may be taken in another order: some units in the last place of its terms.
    np.testing.assert_allclose(wait["p99"](*queues), jax.vmap(p99_wait_s)(*queues), rtol=1e-11, atol=1e-12)
