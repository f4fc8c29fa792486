"""Rounded time stamps: seen, spread over their step, and nothing else touched."""

import re

import numpy as np
import pytest

from fleetopt_jax.workload.profile import rate_profile
from fleetopt_jax.workload.readers import Layout, limits, read_workload_file
from fleetopt_jax.workload.readers.records import LongTrace, Trace
from fleetopt_jax.workload.readers.rounded import Grid, Spread, grid_of
from fleetopt_jax.workload.summary import summarize, summarize_long

LAYOUT = Layout("in", "out", "when", 1.0)


def written(path, seconds, counts=None):
    """A csv of requests at these stamps."""
    extra = [""] * len(seconds) if counts is None else [f",{n}" for n in counts]
    lines = [f"{s!r},{100 + i % 7},{10 + i % 3}{more}" for i, (s, more) in enumerate(zip(seconds.tolist(), extra))]
    path.write_text("\n".join(["when,in,out" + ("" if counts is None else ",count"), *lines]) + "\n")
    return str(path)


def poisson(rate: float, n: int = 20_000, scv: float = 1.0) -> np.ndarray:
    """Arrivals with gamma gaps [s]."""
    rng = np.random.default_rng(5)
    return np.cumsum(rng.gamma(1.0 / scv, scv / rate, n))


@pytest.mark.parametrize("step", [1.0, 3.0, 0.01])
def test_a_grid_is_seen_where_most_share_a_stamp(step):
    seconds = poisson(10.0 / step)
    assert grid_of(np.floor(seconds / step) * step) == pytest.approx(Grid(step, 10.0), rel=0.03)
    assert grid_of(seconds) is None  # as they came
    assert grid_of(np.floor(10.0 * seconds / step) * step / 10.0) is None  # one of a stamp: the gaps are known
    rough = np.floor(seconds / step) * step + np.random.default_rng(1).choice([0.0, 1e-3 * step], len(seconds))
    assert grid_of(np.sort(rough)[::7]) is None  # a few of a stamp, and none shared


def test_stamps_off_by_a_thousandth_are_on_the_grid():
    """As Mooncake's conversations: every 2.997 to 3.003 s."""
    gaps = np.random.default_rng(2).choice([2.997, 3.0, 3.003], 300)
    grid = grid_of(np.repeat(np.cumsum(gaps), 9))
    assert grid is not None and grid.step_s == pytest.approx(3.0, abs=1e-9)


def test_bursts_at_any_moment_are_no_grid():
    moments = np.repeat(poisson(0.5, 400), 10)
    assert grid_of(moments) is None


@pytest.mark.parametrize("rate", [3.0, 40.0, 500.0])
def test_a_log_by_the_second_is_as_bursty_as_what_it_rounds(tmp_path, rate):
    seconds = np.floor(poisson(rate))
    trace = read_workload_file(written(tmp_path / "t.csv", seconds), LAYOUT)
    assert isinstance(trace, Trace) and trace.arrival_s is not None and trace.understood is not None
    found = summarize(trace)
    gaps = np.diff(seconds)
    assert np.var(gaps) / np.mean(gaps) ** 2 > 0.6 * rate  # as it is written
    assert found.arrival_scv == pytest.approx(1.0, abs=0.06)
    assert found.arrival_rate_per_s == pytest.approx(rate, rel=0.03)
    assert any("stamps lie 1 s apart" in said and f"{rate:.2g}"[0] in said for said in trace.understood.warnings)
    assert np.all(np.diff(trace.arrival_s) >= 0) and trace.arrival_s[0] == 0.0
    np.testing.assert_array_equal(np.floor(trace.arrival_s + seconds[0]), seconds)  # each in its own second


def test_exact_stamps_and_sums_stay_as_they_are(tmp_path):
    seconds = poisson(40.0, 2000)
    exact = read_workload_file(written(tmp_path / "t.csv", seconds), LAYOUT)
    np.testing.assert_allclose(exact.arrival_s, seconds - seconds[0], atol=1e-9)
    assert not any("apart" in said for said in exact.understood.warnings)
    hours = np.repeat(np.arange(30.0) * 3600.0, 3)
    sums = read_workload_file(
        written(tmp_path / "s.csv", hours, np.full(90, 50)), Layout("in", "out", "when", 1.0, "count")
    )
    np.testing.assert_array_equal(sums.arrival_s, hours)
    assert sums.bucket_s == 3600.0 and not any("apart" in said for said in sums.understood.warnings)


def test_a_long_log_is_spread_as_it_passes(tmp_path, monkeypatch):
    """Piece by piece, seconds cut in two among them; as bursty as the same log kept, to the chance of the spread."""
    path = written(tmp_path / "t.csv", np.floor(poisson(40.0)))
    kept = read_workload_file(path, LAYOUT)
    monkeypatch.setattr(limits, "MAX_KEPT_ROWS", 3000)
    monkeypatch.setattr(limits, "PIECE_ROWS", 1000)
    monkeypatch.setattr(limits, "PIECE_BYTES", 2**14)
    long = read_workload_file(path, LAYOUT)
    assert isinstance(long, LongTrace) and isinstance(kept, Trace)
    mine, theirs = summarize_long(long), summarize(kept)
    assert mine.arrival_scv == pytest.approx(theirs.arrival_scv, abs=0.05)
    assert mine.arrival_rate_per_s == pytest.approx(theirs.arrival_rate_per_s, rel=1e-3)
    (said,) = (each for each in long.understood.warnings if "apart" in each)
    assert re.search(r"stamps lie 1 s apart and (39|4[01])(\.\d)? requests share one", said)


def test_pieces_join_in_order():
    spread, seconds = Spread(Grid(1.0, 8.0), in_pieces=True), np.floor(poisson(8.0, 400))
    pieces = [np.sort(spread(piece)) for piece in np.array_split(seconds, 37)]
    whole = np.concatenate(pieces)
    assert np.all(np.diff(whole) >= 0) and whole[0] == seconds[0]
    np.testing.assert_array_equal(np.floor(whole), seconds)


def test_a_profile_of_a_rounded_log_is_no_burst(tmp_path):
    trace = read_workload_file(written(tmp_path / "t.csv", np.floor(poisson(2.0, 12_000))), LAYOUT)
    profile = rate_profile(trace)
    assert profile is not None and profile.arrival_scv == pytest.approx(1.0, abs=0.06)
