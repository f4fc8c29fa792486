"""Intervals of simulations cover what they estimate, within bounds; what is too noisy is said to be."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fleetopt_jax._simulate import draw_requests, limits_read, poisson_arrivals, simulate
from fleetopt_jax._simulate.burstiness import ratio_of
from fleetopt_jax._simulate.estimates import Estimate, estimate, half_width_frac, sufficing, wilson
from fleetopt_jax._simulate.readings import compared, verdict
from fleetopt_jax._simulate.simulate import widest_frac
from fleetopt_jax.fleet.assumptions import PHYSICAL
from fleetopt_jax.fleet.fleet import make_slo
from tests.test_simulate import small_fleet, steady

N_STUDIES = 2000


def covered(draws: np.ndarray, truth: float, **how: object) -> float:
    found = [estimate(values, **how) for values in draws]
    return float(np.mean([each.low <= truth <= each.high for each in found]))


@pytest.mark.parametrize("n", [2, 4, 16])
def test_intervals_of_times_and_shares_cover_their_means_within_bounds(n):
    """Lognormal times and beta shares of known means; 95 % of the intervals hold them, one side or the other."""
    rng = np.random.default_rng(n)
    times = rng.lognormal(-(0.3**2) / 2, 0.3, (N_STUDIES, n))
    shares = rng.beta(0.97 * 200, 0.03 * 200, (N_STUDIES, n))
    assert 0.92 <= covered(times, 1.0) <= 0.98
    assert 0.92 <= covered(shares, 0.97, share=True) <= 0.98
    for values in times[:200]:
        assert 0 < estimate(values).low <= np.mean(values) <= estimate(values).high
    for values in shares[:200]:
        assert 0 <= estimate(values, share=True).low <= estimate(values, share=True).high <= 1


def test_a_share_that_is_whole_in_all_replications_is_not_certain():
    whole = estimate(np.ones(4), share=True, n_requests=400)
    assert whole.mean == whole.high == 1.0
    assert whole.low == pytest.approx(400 / (400 + 1.959964**2))  # Wilson's, where all tries succeed
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # as in textbooks
    enough = sufficing(estimate(np.ones(4), share=True, n_requests=100), 4, [0.99], share=True)
    assert enough == 16  # 381 requests where 25 are one replication's


def test_what_would_suffice_does():
    """As many replications of that spread have the interval off the edge, and one fewer does not."""
    values = np.array([0.9, 1.0, 1.1, 1.0])
    found = estimate(values)
    n = sufficing(found, 4, [1.03])
    deviation = math.log(found.high / found.mean) * math.sqrt(4) / 3.182446
    times = {m: deviation * t / math.sqrt(m) for m, t in ((n, 1.96), (4, 3.182446))}
    assert n > 4 and times[n] <= math.log(1.03) < times[4]
    assert sufficing(found, 4, [1.01]) > n > sufficing(found, 4, [1.1])
    assert sufficing(found, 4, [found.mean]) is None and sufficing(found, 1, [1.03]) is None


def test_laws_agree_differ_or_cannot_be_told():
    narrow, wide = Estimate(1.0, 0.99, 1.01), Estimate(1.0, 0.7, 1.5)
    assert compared("itl_s", 1.0, narrow, 0.05, 4) == ("agrees", None)
    assert compared("itl_s", 1.2, narrow, 0.05, 4) == ("differs", None)
    reading, enough = compared("itl_s", 1.0, wide, 0.05, 4)
    assert reading == "unclear" and enough > 4
    assert compared("itl_s", 1.0, narrow, 0.05, 4, warmed_up=False) == ("unclear", None)
    assert compared("itl_s", None, narrow, 0.05, 4) == (None, None)
    assert compared("itl_s", 1.0, Estimate(1.0, -math.inf, math.inf), 0.05, 1) == ("unclear", None)
    assert compared("ttft_p99_s", math.inf, narrow, 0.05, 4) == ("differs", None)
    assert compared("slo_attainment", 1.0, Estimate(0.9999, 0.999, 1.0), 0.03, 4) == ("agrees", None)


@pytest.fixture(scope="module")
def some():
    return simulate(small_fleet(), steady(20.0), n_requests=400, n_replications=4)


@pytest.mark.slow
def test_replications_are_added_and_those_done_kept(some):
    few = draw_requests(steady(20.0), PHYSICAL, 400, 6, 0)
    grown = simulate(small_fleet(), steady(20.0), requests=few, n_replications=2, until_frac=1e-9)
    assert grown.n_replications == 6 and widest_frac(grown) > 1e-9  # the most there are
    loose = widest_frac(some) * 1.01
    stopped = simulate(small_fleet(), steady(20.0), n_requests=400, n_replications=2, until_frac=loose)
    assert stopped.n_replications in (2, 4) and widest_frac(stopped) <= loose
    np.testing.assert_allclose(grown.ttft_p99_s[:4], some.ttft_p99_s, rtol=1e-9)


def test_limits_are_read_three_ways_and_what_fails_comes_first(some):
    loose, none = make_slo(ttft_p99_s=100.0, itl_s=100.0), make_slo(ttft_p99_s=100.0, itl_s=1e-6)
    assert verdict(limits_read(some, loose)) == "holds"
    read = limits_read(some, none)
    assert (verdict(read), read[0].limit, read[0].reading) == ("fails", "itl_s", "fails")
    mean = some.metrics["itl_s"].mean
    read = limits_read(some, make_slo(ttft_p99_s=100.0, itl_s=mean * (1 + 1e-5)))
    assert (verdict(read), read[0].limit) == ("unclear", "itl_s") and (read[0].suffices_replications or 5) > 4
    assert verdict(limits_read(replace(some, warmed_up=False), loose)) == "unclear"
    assert verdict(limits_read(replace(some, warmed_up=False, n_rejected=1), loose)) == "fails"


def test_poisson_arrivals_have_the_trace_s_lengths_and_the_asked_rate():
    requests = draw_requests(steady(20.0), PHYSICAL, 2000, 3, 0)
    calm = poisson_arrivals(requests, 40.0, 0)
    assert np.array_equal(calm.prompt_tokens, requests.prompt_tokens)
    np.testing.assert_allclose(calm.arrival_s[:, -1], 2000 / 40.0)
    gaps = np.diff(calm.arrival_s, axis=1)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1.0, abs=0.1)


def test_ratios_are_of_pairs():
    base = np.array([1.0, 4.0, 0.2])
    found = ratio_of(2 * base, base)
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio_of(np.array([np.inf, 1.0]), np.ones(2)).mean == np.inf
    assert half_width_frac(found) == pytest.approx(0.0, abs=1e-12)
