"""The simulator against queueing theory: with a constant step and no prefill an instance of c slots is M/G/c."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaincc, gammaln

from fleetopt_jax.fleet.engine import Engine, make_engine
from fleetopt_jax.laws.decode import make_decode_step
from fleetopt_jax.laws.kv_cache import make_kv_capacity
from fleetopt_jax.laws.power import make_logistic_power
from fleetopt_jax.laws.prefill import make_prefill
from fleetopt_jax.simulate.batching import Scheduler
from fleetopt_jax.simulate.pool import PoolRequests, PoolRun, run_pool

STEP_S = 1.0
LOADS = (0.5, 0.8, 0.95)
STANDARD_ERRORS = 4.0


def constant_engine() -> Engine:
    """Every iteration takes `STEP_S`; prompts cost nothing."""
    return make_engine(
        make_decode_step(base_s=STEP_S, per_token_s=0.0),
        make_kv_capacity(n_blocks=1e6),
        make_logistic_power(idle_w=100.0, nominal_w=200.0, log2_half_batch=1.0),
        make_prefill(chunk_tokens=1.0, calibration_tokens=1.0, per_token_s=1e-15, budget_tokens=1e6, gpu_w=200.0),
        gpus_per_instance=1.0,
        usd_per_gpu_h=1.0,
    )


def run(slots: int, loads, output: np.ndarray, seed: int) -> tuple[PoolRun, np.ndarray, float]:
    """(what happened, arrivals [R, m], mean service [s]) at utilisations `loads` [R] with `output` [R, m] tokens."""
    rng = np.random.default_rng(seed)
    service_s = output.mean() * STEP_S
    gaps = rng.exponential(size=output.shape) * service_s / (slots * np.asarray(loads)[:, None])
    arrival_s = np.cumsum(gaps, axis=1)
    window_s = np.stack([np.zeros(len(loads)), arrival_s[:, -1]], axis=1)
    scheduler = Scheduler(
        max_num_seqs=jnp.asarray(slots), n_blocks=jnp.asarray(1e6), fixed_tokens=jnp.zeros(()), window_s=window_s
    )
    requests = PoolRequests(arrival_s, np.ones_like(output), output)
    horizon_s = arrival_s[:, -1] * 10.0 + 1e6
    done = run_pool(constant_engine(), scheduler, requests, 1, horizon_s, policy="random", n_slots=slots)
    assert np.isfinite(done.last_s).all()
    assert not done.in_system.any()
    return done, arrival_s, service_s


def agrees(found: np.ndarray, expected: float) -> bool:
    """Within `STANDARD_ERRORS` of the mean over replications."""
    error = found.std(ddof=1) / np.sqrt(len(found))
    return abs(found.mean() - expected) <= STANDARD_ERRORS * error


def in_system(done: PoolRun, arrival_s: np.ndarray, from_s: np.ndarray) -> np.ndarray:
    """Time average of the number in system from `from_s` [R] to the last arrival [R]."""
    to_s = arrival_s[:, -1]
    inside = np.minimum(done.last_s, to_s[:, None]) - np.maximum(arrival_s, from_s[:, None])
    return np.maximum(inside, 0.0).sum(axis=1) / (to_s - from_s)


def erlang_c(c: int, a: float) -> float:
    """P(wait) of M/M/c, from the incomplete gamma function."""
    b = np.exp(c * np.log(a) - a - gammaln(c + 1)) / gammaincc(c + 1, a)
    return b / (1 - a / c * (1 - b))


def geometric(mean: float, shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).geometric(1.0 / mean, shape)


SERVICES = {
    "geometric": lambda shape: geometric(8.0, shape, 0),
    "deterministic": lambda shape: np.full(shape, 8),
    "two points": lambda shape: np.random.default_rng(1).choice([2, 50], shape, p=[0.9, 0.1]),
}


@pytest.mark.parametrize("service", SERVICES)
def test_one_slot_is_pollaczek_khinchine(service):
    """M/G/1, exactly: an instance that is busy admits at the end of a service, one that idles at once.

    Mean wait lambda E[S^2] / (2 (1 - rho)), P(wait) = rho, mean number in system lambda (W + E[S]).
    """
    replications, m, warm = 12, 6000, 1500
    loads = np.repeat(LOADS, replications)
    output = SERVICES[service]((len(loads), m))
    done, arrival_s, _ = run(1, loads, output, seed=2)
    mean, square = output.mean() * STEP_S, (output.astype(float) ** 2).mean() * STEP_S**2
    wait_s = (done.admit_s - arrival_s)[:, warm:]
    number = in_system(done, arrival_s, arrival_s[:, warm])
    for load in LOADS:
        rows = loads == load
        rate = load / mean
        expected_s = rate * square / (2 * (1 - load))
        assert agrees(wait_s[rows].mean(axis=1), expected_s), (load, wait_s[rows].mean(), expected_s)
        assert agrees((wait_s[rows] > 1e-9).mean(axis=1), load), load
        assert agrees(number[rows], rate * (expected_s + mean)), load


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "mean_output"), [(4, 60.0), (64, 150.0)])
def test_many_slots_are_m_m_c(slots, mean_output):
    """An arrival at a busy instance waits for the iteration's end, whatever the queue: those part steps do not count.

    What is left of the grid is of the order of a step in a service, 1 / `mean_output`, and below the standard errors.
    """
    replications, m, warm = 12, 12_000, 3000
    loads = np.repeat(LOADS, replications)
    output = geometric(mean_output, (len(loads), m), 3)
    done, arrival_s, service_s = run(slots, loads, output, seed=4)
    steps = np.floor((done.admit_s - arrival_s) / STEP_S + 1e-9)[:, warm:]  # whole steps waited
    part_s = (done.admit_s - arrival_s)[:, warm:] - steps * STEP_S
    number = in_system(done, arrival_s, arrival_s[:, warm])
    for load in LOADS:
        rows = loads == load
        waits = erlang_c(slots, slots * load)
        wait_s = waits * service_s / (slots * (1 - load))
        rate = slots * load / service_s
        # One who waits at all waits half a step on average until the next grid point, which `floor` takes away.
        found_s = steps[rows].mean(axis=1) * STEP_S + 0.5 * STEP_S * (steps[rows] > 0).mean(axis=1)
        assert agrees(found_s, wait_s) or abs(found_s.mean() - wait_s) < 0.5 * STEP_S * waits, (load, found_s.mean())
        assert agrees((steps[rows] > 0).mean(axis=1), waits) or waits < 1e-3, load
        assert agrees(number[rows], rate * (wait_s + service_s + part_s[rows].mean())), load


def test_littles_law_holds_on_the_path():
    """Counters kept iteration by iteration against the requests' own times, to 1e-9."""
    output = geometric(8.0, (12, 2000), 5)
    done, arrival_s, _ = run(3, np.repeat(LOADS, 4), output, seed=6)
    np.testing.assert_allclose(
        done.tally.path_in_system_s.sum(axis=1), (done.last_s - arrival_s).sum(axis=1), rtol=1e-9
    )
    np.testing.assert_allclose(
        done.tally.path_in_flight_s.sum(axis=1), (done.last_s - done.admit_s).sum(axis=1), rtol=1e-9
    )
