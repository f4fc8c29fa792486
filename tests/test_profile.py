"""The rate by hour: bins hold all requests and all time, a cycle is told from chance and bursts, and an hour is planned
with its own rate, burstiness and lengths."""

import json

import numpy as np
import pytest

from fleetopt_jax.catalog.workloads import load
from fleetopt_jax.cli.main import main
from fleetopt_jax.cli.table import options_of
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.units import DAY_S, HOUR_S
from fleetopt_jax.documents.plan import hour_to_json
from fleetopt_jax.report.rates import clock, planned_for, rates_table
from fleetopt_jax.workload.atoms import digest
from fleetopt_jax.workload.profile import BINS_S, MIN_REQUESTS, MOMENTS, hour_of, rate_profile, requests_of
from fleetopt_jax.workload.readers import Trace, read_workload_file

PEAK_HOUR, SWING = 14, 0.6  # of the days made here: the rate is 1 + 0.6 cos of the time from 14:30, times the mean


def busiest_hour(stamps_s: np.ndarray) -> int:
    """Of a day: chance may move it by an hour."""
    return int(np.argmax(np.bincount((stamps_s // HOUR_S).astype(int))))


def trace_of(stamps_s: np.ndarray, prompt_tokens=1000.0, output_tokens=200.0) -> Trace:
    """Requests at these times of a clock, in order."""
    n = len(stamps_s)
    lengths = (np.broadcast_to(np.asarray(each, dtype=float), n) for each in (prompt_tokens, output_tokens))
    return Trace(*lengths, stamps_s - stamps_s[0], float(stamps_s[0]))


def day(n: int = 20_000, seed: int = 0, swing: float = SWING, days: int = 1) -> np.ndarray:
    """Poisson arrivals of a day, or several, whose rate follows a cosine: times [s] of day, in order."""
    time_s = np.linspace(0.0, DAY_S, 24 * 60 + 1)
    phase = 2 * np.pi * (time_s - (PEAK_HOUR + 0.5) * HOUR_S) / DAY_S
    share = np.concatenate([[0.0], np.cumsum(1 + swing * np.cos(phase[1:] - np.pi / 1440))])
    rng = np.random.default_rng(seed)
    stamps = np.interp(rng.uniform(size=n), share / share[-1], time_s) + DAY_S * rng.integers(days, size=n)
    return np.sort(stamps)


def bursty(n: int, span_s: float, seed: int, scv: float) -> np.ndarray:
    """Arrivals of a constant rate whose gaps have this squared CV: exponential of two means."""
    rng = np.random.default_rng(seed)
    share = 0.5 * (1 + np.sqrt((scv - 1) / (scv + 1)))
    gaps = rng.exponential(size=n) * np.where(rng.uniform(size=n) < share, 0.5 / share, 0.5 / (1 - share))
    stamps = np.cumsum(gaps)
    return stamps * (span_s / stamps[-1])


def test_bins_hold_all_requests_and_all_time_at_any_offset_and_scale():
    """So that the time-weighted mean of their rates is the trace's own, n / (last - first)."""
    rng = np.random.default_rng(0)
    for seed in range(60):
        span_s, n = np.exp(rng.uniform(np.log(300), np.log(60 * DAY_S))), int(rng.integers(1000, 4000))
        stamps = rng.choice([0.0, 1.7e9, -4e4]) + rng.uniform(0, DAY_S) + np.sort(rng.uniform(0, span_s, n))
        prompt = rng.integers(1, 5000, n).astype(float)
        trace = trace_of(stamps, prompt)
        profile = rate_profile(trace)
        if profile is None:  # fewer than 100 requests in the longest bins
            assert n * BINS_S[-1] < MIN_REQUESTS * (stamps[-1] - stamps[0])
            continue
        span_s = stamps[-1] - stamps[0]
        assert profile.n_requests.sum() == n
        assert profile.covered_s.sum() == pytest.approx(span_s)
        assert profile.mean_rate_per_s == pytest.approx(n / span_s)
        assert profile.rate_per_s @ profile.covered_s == pytest.approx(n)
        assert np.nansum(profile.n_requests * profile.mean_prompt_tokens) == pytest.approx(prompt.sum())
        assert np.all(profile.start_s % profile.bin_s == 0)
        assert n * profile.bin_s >= MIN_REQUESTS * span_s, seed
        assert np.all(profile.rate_per_s[profile.whole] <= profile.rate_per_s[profile.busiest])
        above = profile.whole & (profile.rate_per_s > profile.rate_per_s[profile.p95])
        assert profile.covered_s[above].sum() <= 0.05 * profile.covered_s[profile.whole].sum()


def test_a_request_is_in_the_bin_of_its_time():
    stamps = day(3000)
    hours = np.bincount((stamps // HOUR_S).astype(int), minlength=24)
    profile = rate_profile(trace_of(stamps))
    assert (profile.bin_s, profile.n_requests.tolist()) == (HOUR_S, hours.tolist())
    inside = requests_of(trace_of(stamps), profile, 5)
    np.testing.assert_allclose(inside.first_arrival_s + inside.arrival_s, stamps[(stamps // HOUR_S) == 5])


@pytest.mark.parametrize("scv", [1.0, 5.0, 20.0])
def test_a_constant_rate_has_no_hours_however_bursty_it_is(scv):
    """A chance of p or less comes up in a share p of the traces, or less."""
    profiles = [rate_profile(trace_of(bursty(20_000, DAY_S, seed, scv))) for seed in range(60)]
    chances = np.sort([profile.chance for profile in profiles])
    assert sum(profile.varies for profile in profiles) <= 1  # two of 60 come once in 600
    assert np.all(chances >= np.arange(60) / 60 - 0.25)  # Kolmogorov-Smirnov at one in a thousand
    over = np.array([profile.peak_over_mean for profile in profiles])
    assert np.all((over > 1) & (over < 1 + 4.5 * np.sqrt(scv * 24 / 20_000)))
    low = 1 - np.median([profile.arrival_scv for profile in profiles]) / scv
    assert -0.02 < low < 0.01 * scv  # gaps that end in another bin are left out, and the longest most of all


def test_a_cosine_has_its_peak_where_and_as_high_as_it_is():
    top = 1 + SWING * np.sinc(1 / 24)  # the mean of the cosine over its highest hour
    profiles = [rate_profile(trace_of(day(200_000, seed))) for seed in range(5)]
    for profile in profiles:
        assert profile.varies
        assert abs(profile.start_s[profile.busiest] / HOUR_S - PEAK_HOUR) <= 1
        assert profile.peak_over_mean == pytest.approx(top, rel=0.03)
        assert profile.arrival_scv == pytest.approx(1, rel=0.03)  # Poisson within the hour
    assert all(rate_profile(trace_of(day(2400, seed))).varies for seed in range(20))  # the fewest with hours
    gaps = np.diff(day(200_000))
    assert np.var(gaps) / np.mean(gaps) ** 2 > 1.3  # of the whole day: the cycle taken for bursts


def test_a_part_of_a_bin_is_neither_busiest_nor_quiet():
    """Ten minutes of a flood before the hour, five of nothing but two requests at the end."""
    rng = np.random.default_rng(1)
    flood, steady = rng.uniform(50 * 60, HOUR_S, 5000), rng.uniform(HOUR_S, 13 * HOUR_S, 12_000)
    stamps = np.sort(np.concatenate([flood, steady, 13 * HOUR_S + np.array([1.0, 300.0])]))
    profile = rate_profile(trace_of(stamps))
    assert profile.whole.tolist() == [False, *[True] * 12, False]
    assert profile.rate_per_s[0] > 5 * profile.rate_per_s[profile.busiest]
    assert (profile.whole[profile.busiest], profile.varies) == (True, False)


def test_bins_are_as_fine_as_the_requests_and_the_time_allow():
    def bin_s(n: int, span_s: float) -> float | None:
        profile = rate_profile(trace_of(np.linspace(0.0, span_s, n)))
        return profile and profile.bin_s

    assert bin_s(30_000, 3500) == 300
    assert bin_s(30_000, 1000) == 60
    assert bin_s(30_000, 5.5 * HOUR_S) == 900
    assert bin_s(30_000, 7 * HOUR_S) == HOUR_S
    assert bin_s(30_000, 10 * DAY_S) == HOUR_S
    assert bin_s(1300, DAY_S) == 2 * HOUR_S
    assert bin_s(400, DAY_S) == 6 * HOUR_S
    assert bin_s(400, 2 * DAY_S) is None  # too few
    assert bin_s(30_000, 200.0) is None  # too short
    assert bin_s(30_000, 0.0) is None  # all at once
    assert bin_s(30_000, 1e18) is None
    assert rate_profile(Trace(np.ones(9), np.ones(9), None)) is None


def test_an_hour_has_its_own_lengths_where_they_differ_and_are_enough():
    stamps, rng = day(), np.random.default_rng(0)
    inside = stamps // HOUR_S == busiest_hour(stamps)
    prompt = np.round(rng.lognormal(7, 1, len(stamps)))
    few = day(4000)
    cases = [
        (trace_of(stamps, prompt), (False, False)),
        (trace_of(stamps, np.where(inside, 2 * prompt, prompt)), (True, True)),
        (trace_of(few, np.where(few // HOUR_S == busiest_hour(few), 2.0, 1.0) * prompt[: len(few)]), (False, True)),
    ]
    for trace, expected in cases:
        profile = rate_profile(trace)
        hour = hour_of(trace, profile, "peak", 20.0)
        assert (hour.own_lengths, hour.other_lengths) == expected
        assert hour.rate_per_s == pytest.approx(20 * profile.peak_over_mean)
        assert hour.at_rate(7.0).over_mean == pytest.approx(profile.peak_over_mean)


# ------------------------------------------------------------------------------------------------------------- the door


@pytest.fixture(scope="module")
def day_file(tmp_path_factory):
    """A day of 18,000 requests, their rows shuffled; prompts of the busiest hour are twice as long."""
    stamps, rng = day(18_000), np.random.default_rng(3)
    prompt = 100 * rng.integers(1, 10, len(stamps)) * np.where(stamps // HOUR_S == busiest_hour(stamps), 2, 1)
    rows = np.stack([stamps, prompt, rng.integers(10, 60, len(stamps))], axis=1)
    path = tmp_path_factory.mktemp("day") / "day.csv"
    lines = [f"{time:.3f},{prompt:.0f},{output:.0f}\n" for time, prompt, output in rng.permutation(rows)]
    path.write_text("timestamp_s,prompt_tokens,output_tokens\n" + "".join(lines))
    return path


def test_a_shuffled_file_keeps_the_lengths_of_its_requests(day_file):
    trace = read_workload_file(day_file)
    stamps = trace.first_arrival_s + trace.arrival_s
    busy = stamps // HOUR_S == busiest_hour(stamps)
    assert trace.prompt_tokens[busy].mean() > 1.8 * trace.prompt_tokens[~busy].mean()
    assert np.all(np.diff(trace.arrival_s) >= 0)


def test_a_workload_is_that_of_its_hour(day_file):
    mean, peak, p95 = (load(str(day_file), at=at) for at in MOMENTS)
    profile = mean.profile
    assert float(peak.workload.arrival_rate_per_s) == pytest.approx(profile.rate_per_s[profile.busiest])
    assert float(p95.workload.arrival_rate_per_s) == pytest.approx(profile.rate_per_s[profile.p95])
    assert mean.over_mean == 1 < p95.over_mean < peak.over_mean
    assert mean.summary == peak.summary
    assert float(mean.workload.longest_tokens) == float(peak.workload.longest_tokens)  # every request must be served
    assert float(peak.workload.weight @ peak.workload.prompt_tokens) == pytest.approx(1000, rel=0.05)
    assert float(p95.workload.weight @ p95.workload.prompt_tokens) == pytest.approx(500, rel=0.15)
    assert float(peak.workload.arrival_scv) == pytest.approx(1, abs=0.05) != mean.workload.arrival_scv
    scaled = load(str(day_file), at="peak", rate_per_s=100.0)
    assert float(scaled.workload.arrival_rate_per_s) == pytest.approx(100 * peak.over_mean)
    assert digest(scaled.workload) == digest(peak.workload)


def test_what_has_no_hours_is_refused_an_hour(tmp_path):
    few, untimed, cdf = tmp_path / "few.csv", tmp_path / "untimed.csv", tmp_path / "lengths.json"
    few.write_text("timestamp_s,prompt_tokens,output_tokens\n" + "".join(f"{t},10,5\n" for t in range(99)))
    untimed.write_text("prompt_tokens,output_tokens\n10,5\n")
    cdf.write_text("[[100, 0.5], [200, 1.0]]")
    for name, why in (
        (few, "99 requests in 98 s"),
        (untimed, "no arrival times"),
        (cdf, "holds a CDF"),
        ("azure-conv", ""),
    ):
        with pytest.raises(BadField, match=f"^at: peak: {name} .*{why}"):
            load(str(name), rate_per_s=1.0, at="peak")
    with pytest.raises(BadField, match="known: mean, p95, peak"):
        load("azure-conv", at="noon")


def test_trace_says_the_rate_by_hour_and_draws_it(day_file, tmp_path, capsys):
    assert main(["trace", str(day_file), "--json", "--figure", str(tmp_path / "rate.svg")]) == 0
    document = json.loads(capsys.readouterr().out)
    bins, busiest = document["rate_by_hour"], document["busiest"]
    assert sum(each["n_requests"] for each in bins) == document["n_requests"] == 18_000
    assert busiest["rate_per_s"] == max(each["rate_per_s"] for each in bins)
    assert busiest["mean_prompt_tokens"] == pytest.approx(1000, rel=0.05)
    assert document["rate_varies"] is True
    assert document["peak_over_mean"] == pytest.approx(busiest["rate_per_s"] / document["recorded_rate_per_s"])
    said = clock(busiest["start_s"], HOUR_S)
    assert said in (tmp_path / "rate.svg").read_text()  # as a comment beside the letters
    assert main(["trace", str(day_file)]) == 0
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if "busiest" in line]) == 1
    assert f"Busiest hour: {said}" in shown


def test_several_days_are_shown_by_the_hour_of_the_day(capsys):
    from rich.console import Console

    from fleetopt_jax.documents.rates import rates_to_json

    stamps = day(60_000, days=9) + 1.7e9 // DAY_S * DAY_S
    table = rates_table(rates_to_json(rate_profile(trace_of(stamps))))
    Console(width=120).print(table)
    shown = capsys.readouterr().out
    assert "over 9 days" in shown
    assert sum(line.strip()[2:6] == ":00-" for line in shown.splitlines()) == 24


def test_clocks_are_said_as_calendars_where_they_are():
    assert clock(14 * HOUR_S, HOUR_S) == "14:00-15:00"
    assert clock(1_700_157_600 + 300, 300.0) == "2023-11-16 18:05-18:10"
    assert clock(2 * DAY_S + 23 * HOUR_S, HOUR_S) == "day 3, 23:00-24:00"


def test_the_option_offers_every_moment():
    (option,) = (option for option in options_of("optimize") if option.name == "at")
    assert option.kind.names == MOMENTS


@pytest.mark.slow
def test_a_plan_for_an_hour_is_for_it_when_it_is_evaluated(day_file, tmp_path, capsys):
    def fleetopt(*arguments, code=0) -> tuple[dict, str]:
        ended = main([str(each) for each in (*arguments, "--json")])
        out, err = capsys.readouterr()
        assert ended == code, err
        return json.loads(out), err

    ask = ("--workload", day_file, "--rate", 400, "--pools", 1, "--assume", "published")
    plan, scenario = tmp_path / "plan.json", tmp_path / "peak.toml"
    peak, quiet = fleetopt("optimize", *ask, "--at", "peak", "--out", plan, "--save-scenario", scenario)
    mean, warned = fleetopt("optimize", *ask)
    _, chosen = fleetopt("optimize", *ask, "--at", "mean")
    assert "warning" not in quiet + chosen
    assert "its busiest hour (" in warned
    assert "--at peak" in warned
    assert peak["metrics"]["n_gpus"] > mean["metrics"]["n_gpus"]
    assert (peak["workload"]["at"], mean["workload"]["at"]) == ("peak", "mean")
    again, said = fleetopt("evaluate", plan)
    assert (again["workload"], again["status"]) == (peak["workload"], "optimal")
    assert "warning" not in said
    assert again["metrics"] == pytest.approx(peak["metrics"], rel=1e-6)
    at_mean, _ = fleetopt("evaluate", plan, "--at", "mean")
    assert at_mean["workload"]["arrival_rate_per_s"] == pytest.approx(400)
    again, _ = fleetopt("evaluate", plan, "--workload", day_file)  # another workload, in the plan's hour
    assert (again["workload"]["at"], again["workload"]["hour"]) == ("peak", peak["workload"]["hour"])
    wide = json.loads(plan.read_text())
    wide["pools"][0]["window_tokens"] = 16_384  # for the longest of another workload
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    other, said = fleetopt("evaluate", tmp_path / "wide.json", "--workload", "azure-conv", code=3)  # it is more
    assert (other["workload"]["at"], other["method"]) == ("mean", "given")
    assert other["workload"]["arrival_rate_per_s"] == pytest.approx(peak["workload"]["arrival_rate_per_s"])
    assert "azure-conv is bundled without its arrival times, so it has no busiest hour as the plan has" in said
    half, _ = fleetopt("evaluate", plan, "--rate", 200)
    assert half["workload"]["arrival_rate_per_s"] == pytest.approx(peak["workload"]["arrival_rate_per_s"] / 2)
    kept, _ = fleetopt("optimize", "--scenario", scenario)
    assert kept["workload"] == peak["workload"]


def test_rows_that_sum_requests_count_as_many_as_they_stand_for():
    """A day of hourly sums has the same rates as its requests, whose last hour counts whole."""
    stamps = day()
    n, hours = np.histogram(stamps, HOUR_S * np.arange(25))
    prompt = np.arange(24) + 1000.0
    trace = Trace(prompt, np.full(24, 200.0), hours[:-1], weight=n.astype(float), bucket_s=HOUR_S)
    profile = rate_profile(trace)
    assert profile is not None and profile.varies
    np.testing.assert_allclose(profile.rate_per_s, n / HOUR_S)
    np.testing.assert_allclose(profile.mean_prompt_tokens, prompt)
    assert profile.mean_rate_per_s == pytest.approx(len(stamps) / DAY_S) and profile.busiest == int(np.argmax(n))
    flat = rate_profile(Trace(prompt, prompt, hours[:-1], weight=np.full(24, 800.0), bucket_s=HOUR_S))
    assert flat is not None and not flat.varies
    assert rate_profile(Trace(prompt, prompt, DAY_S * np.arange(24.0), weight=n.astype(float), bucket_s=DAY_S)) is None


def test_the_hour_of_a_plan_is_said_in_its_answer():
    trace = trace_of(day())
    profile = rate_profile(trace)
    assert profile is not None
    for at, words in (("peak", "Its busiest hour ("), ("p95", "Its p95 hour (")):
        hour = hour_of(trace, profile, at, 10.0)
        said = planned_for({"name": "mine", **hour_to_json(hour)})["Planned for"]
        assert said.startswith(words) and "the mean is 10)" in said
    assert planned_for(hour_to_json(None)) == {}


def test_sums_are_binned_whatever_their_stamps_are_rounded_to():
    n = np.full(24, 800.0)
    for bucket_s in (HOUR_S - 1.5e-11, 0.1 * HOUR_S / 0.1, HOUR_S / 3600):
        trace = Trace(n, n, HOUR_S * np.arange(24.0), weight=n, bucket_s=bucket_s)
        assert rate_profile(trace) is not None
