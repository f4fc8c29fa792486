"""A day request by request: arrivals follow the rates, instances come and go, a steady day is the stationary one."""

import numpy as np
import pytest

import fleetopt_jax as fo
from fleetopt_jax._simulate.day import requests_of_day
from fleetopt_jax._simulate.pool import Course

CHAT = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=5.0, arrival_scv=1.5)
SLO = fo.make_slo()


def test_requests_follow_the_rates():
    hours = fo.make_hours([4.0, 0.0, 12.0, 8.0], length_s=500.0)
    requests = requests_of_day(hours, CHAT, fo.PHYSICAL, squeeze=2.0, seed=3)
    arrival_s = requests.arrival_s[0]
    assert len(arrival_s) == 24 * 250
    assert np.all(np.diff(arrival_s) >= 0)
    assert 0 <= arrival_s[0] <= arrival_s[-1] <= 1000.0
    counts = np.histogram(arrival_s, bins=[0, 250, 500, 750, 1000])[0]
    expected = np.array([1000, 0, 3000, 2000])
    assert counts[1] == 0
    assert np.all(np.abs(counts - expected) <= 4.0 * np.sqrt(1.5 * expected))


def test_a_course_counts_from_each_moment_on():
    course = Course(np.array([0.0, 10.0, 20.0]), np.array([3, 1, 2]))
    assert course.at(np.array([0.0, 9.9, 10.0, 15.0, 99.0])).tolist() == [3, 3, 1, 1, 2]


@pytest.mark.slow
def test_a_day_in_which_nothing_changes_is_the_stationary_one():
    """The same fleet at the same rate, cut into periods, has the P99 TTFT that `simulate` finds."""
    fleet = fo.make_fleet([fo.build(fo.EngineSpec("h100"))], window_tokens=[4400], n_instances=[3])
    hours = fo.make_hours([12.0] * 4, length_s=250.0)
    steady = fo.replay_day(fo.Day(fleet, hours, np.full((4, 1), 3)), CHAT, fo.PHYSICAL, SLO, n_replications=2)
    there = fo.simulate(
        fleet,
        fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=12.0, arrival_scv=1.5),
        n_requests=12_000,
        n_replications=2,
    )
    assert steady.n_requests.sum() == 24_000
    assert np.mean(steady.ttft_p99_s[:, 1:]) == pytest.approx(there.metrics["ttft_p99_of_all_s"].mean, rel=0.1)


@pytest.mark.slow
def test_instances_that_stop_leave_the_rest_in_trouble():
    """Half of the instances in the second of two periods: its requests wait, those of the first do not."""
    fleet = fo.make_fleet([fo.build(fo.EngineSpec("h100"))], window_tokens=[4400], n_instances=[4])
    hours = fo.make_hours([16.0] * 2, length_s=200.0)
    found = fo.replay_day(fo.Day(fleet, hours, np.array([[4], [1]])), CHAT, fo.PHYSICAL, SLO, n_replications=2)
    assert not found.fails[0]
    assert found.fails[1]
    assert np.all(found.ttft_p99_s[:, 1] > 2.0 * found.ttft_p99_s[:, 0])
    with pytest.raises(ValueError, match="need arrivals of 400 s"):
        fo.replay_day(fo.Day(fleet, hours, np.array([[4], [1]])), CHAT, fo.PHYSICAL, SLO, arrivals=fo.make_hours([1.0]))
