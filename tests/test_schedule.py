"""A day by three plans: the dynamic program against brute force, the day against its parts, and what is refused."""

import argparse
import contextlib
import io
import itertools
import json
import math

import numpy as np
import pytest
from rich.console import Console

import fleetopt_jax as fo
from fleetopt_jax._optimize.running import POD_START_S, start_up_s_of, tariff_of
from fleetopt_jax._optimize.schedule import cheapest_path
from fleetopt_jax._optimize.search import compiled_excesses
from fleetopt_jax._optimize.switching import Switching, cheapest_course, periods_held
from fleetopt_jax.catalog.rates import bundled_rates, names_of_rates
from fleetopt_jax.cli.main import main
from fleetopt_jax.cli.values import Growth
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.files import to_json
from fleetopt_jax.documents.schedule import COUNTED, schedule_to_json
from fleetopt_jax.fleet.evaluate import fleet_metrics
from fleetopt_jax.fleet.resources import Weights
from fleetopt_jax.fleet.traffic import routed
from fleetopt_jax.report.schedule import schedule_table
from fleetopt_jax.report.schedule_figure import schedule_figure
from fleetopt_jax.workload.atoms import with_rate
from fleetopt_jax.workload.hours import Hours, Stretches, along, at_mean, hours_of, priced
from fleetopt_jax.workload.readers.hours_file import read_stretches

HOUR_S = 3600.0

# ------------------------------------------------------------------------------------------------ the dynamic program


def brute_force(costs: np.ndarray, counts: np.ndarray, switching: Switching) -> float:
    """The least cost of all courses, each checked by the definition."""
    n, best = len(costs), math.inf
    for places in itertools.product(range(len(counts)), repeat=n):
        total, held = sum(costs[t, places[t]] for t in range(n)), True
        for t in range(0 if switching.repeats else 1, n):
            before, now = counts[places[t - 1]], counts[places[t]]
            if now > before:
                total += switching.start_cost[t] * (now - before)
                through = range(t, t + switching.n_held[t] + 1)
                held &= all(counts[places[u % n]] >= now for u in through if u < n or switching.repeats)
        best = min(best, total) if held else best
    return best


@pytest.mark.parametrize("repeats", [False, True])
def test_the_course_is_the_cheapest_of_all(repeats):
    """Any costs, negative ones and such that no count is allowed included; holds longer than the whole round too."""
    rng = np.random.default_rng(7)
    for _ in range(150):
        n, m = rng.integers(1, 7), rng.integers(1, 4)
        counts = np.sort(rng.choice(12, m, replace=False)).astype(float)
        costs = 3.0 * rng.normal(size=(n, m)) + counts * rng.normal()
        costs[rng.random((n, m)) < 0.15] = np.inf
        min_up_s = rng.choice([0.0, 1.0, 2.5, 5.0, 20.0])
        held = periods_held(rng.uniform(1, 3, n), min_up_s, repeats=repeats)
        switching = Switching(0.5 + 1.5 * rng.normal(size=n), held, repeats)
        found = cheapest_course(costs, counts, switching)
        assert found.cost == pytest.approx(brute_force(costs, counts, switching), rel=1e-12, abs=1e-12)
        if math.isfinite(found.cost):
            there = counts[found.place]
            before = np.roll(there, 1) if repeats else np.append(there[:1], there[:-1])
            again = np.sum(costs[np.arange(n), found.place] + switching.start_cost * np.maximum(0, there - before))
            assert again == pytest.approx(found.cost, rel=1e-12, abs=1e-12)


def test_free_starts_make_every_period_its_own():
    rng = np.random.default_rng(1)
    costs = rng.normal(size=(30, 9))
    free = Switching(np.zeros(30), np.zeros(30, int), True)
    assert cheapest_course(costs, np.arange(9.0), free).cost == pytest.approx(costs.min(axis=1).sum(), rel=1e-12)


def test_starts_that_cost_more_than_a_day_leave_all_up():
    costs = np.where(np.arange(5.0) >= np.array([[4], [1], [0], [2]]), np.arange(5.0), np.inf)
    dear = Switching(np.full(4, 1e6), np.zeros(4, int), True)
    assert cheapest_course(costs, np.arange(5.0), dear).place.tolist() == [4, 4, 4, 4]


def test_a_hold_counts_periods_by_their_lengths():
    lengths = np.array([1.0, 1.0, 4.0, 1.0])
    assert periods_held(lengths, 0.0, repeats=True).tolist() == [0, 0, 0, 0]
    assert periods_held(lengths, 2.0, repeats=True).tolist() == [1, 1, 0, 1]
    assert periods_held(lengths, 2.5, repeats=False).tolist() == [2, 1, 0, 0]


def test_the_path_is_the_cheapest_of_all():
    rng = np.random.default_rng(3)
    for k in (1, 2, 3):
        square = rng.uniform(1, 9, (5, 5))
        square[np.tril_indices(5)] = np.inf
        inner = [nodes for n in range(k) for nodes in itertools.combinations(range(1, 4), n)]
        ways = [list(itertools.pairwise((0, *nodes, 4))) for nodes in inner]
        cost, path = cheapest_path(square, k)
        assert cost == pytest.approx(min(sum(square[edge] for edge in way) for way in ways))
        assert sum(square[edge] for edge in path) == pytest.approx(cost)
    assert cheapest_path(np.full((2, 2), np.inf), 2) == (math.inf, [])


# ------------------------------------------------------------------------------------------------------------- the day


SPEC = fo.EngineSpec("h100", source="projected")
CHAT = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)


@pytest.fixture(scope="module")
def problem() -> fo.Problem:
    return fo.make_problem(CHAT, [SPEC], n_pools=2, assume="published")


@pytest.fixture(scope="module")
def alone() -> fo.Problem:
    """The same with one pool, which is quickly scheduled again."""
    return fo.make_problem(CHAT, [SPEC], n_pools=1, assume="published")


@pytest.fixture(scope="module")
def found_alone(alone) -> fo.Schedule:
    return scheduled(alone)


PRICES = [0.1, -0.02, 0.3, 0.2]
DAY = fo.make_hours([60.0, 0.0, 150.0, 90.0], length_s=6 * HOUR_S, usd_per_kwh=PRICES, kg_co2_per_kwh=0.4)


@pytest.fixture(scope="module")
def found(problem) -> fo.Schedule:
    return scheduled(problem)


def scheduled(problem: fo.Problem, hours: Hours = DAY, **running) -> fo.Schedule:
    answer = fo.schedule(problem, hours, fo.make_running(**running))
    assert isinstance(answer, fo.Schedule)
    return answer


def metrics_at(plan: fo.Plan, n_instances: np.ndarray, rate_per_s: float) -> fo.FleetMetrics:
    """By the programs that searches share."""
    fleet, problem = plan.fleet.with_instances(n_instances), plan.problem
    traffic = routed(fleet, problem.workload, problem.assumptions)
    return fleet_metrics(fleet, traffic, with_rate(problem.workload, rate_per_s), problem.assumptions)


def test_every_period_holds_its_limits_and_no_instance_less_would(problem, found):
    """The counts of the elastic plan are the least of each pool at each rate."""
    elastic = found.elastic
    for t in (0, 2, 3):
        n, rate = elastic.n_instances[t], DAY.rate_per_s[t]
        enough, fewer = (
            np.max([np.asarray(each) for each in compiled_excesses(metrics.pools, problem.slo).values()], axis=0)
            for metrics in (metrics_at(elastic.plan, n, rate), metrics_at(elastic.plan, n - 1, rate))
        )
        assert np.all(enough <= 1e-9)
        assert np.all((fewer > 0) | (n == 1))
    assert not elastic.n_instances[1].any()
    for plan in (found.static, found.scheduled, elastic):
        assert np.all(plan.slo_attainment >= 0.99 - 1e-9)
        assert np.all(plan.ttft_p99_s <= 0.5 * (1 + 1e-6))
    assert np.all(found.scheduled.n_instances >= elastic.n_instances)


def test_elastic_costs_least_and_static_most(found):
    elastic, scheduled_, static = (plan.cost.sum() for plan in (found.elastic, found.scheduled, found.static))
    assert elastic <= scheduled_ < static
    assert found.changing_bound <= elastic * (1 + 1e-12)
    assert 0.1 < found.saves("energy_kwh") < 1


def test_starts_that_take_no_time_are_elastic(alone, found_alone):
    free = scheduled(alone, start_up_s=0.0)
    assert free.scheduled.cost.sum() == pytest.approx(free.elastic.cost.sum(), rel=1e-9)
    assert free.elastic.cost.sum() == pytest.approx(found_alone.elastic.cost.sum(), rel=1e-12)


def test_energy_and_money_are_those_of_every_period_by_itself(found):
    """The static plan takes the watts of its metrics; what starts is counted at the prices of the period before."""
    static, usd_per_gpu_h = found.static, float(fo.build(SPEC).usd_per_gpu_h)
    for t in (0, 2, 3):
        metrics = metrics_at(static.plan, static.n_instances[t], DAY.rate_per_s[t])
        kwh, rent = 6 * float(metrics.power_w) / 1e3, 6 * float(metrics.n_gpus) * usd_per_gpu_h
        assert static.energy_kwh[t] == pytest.approx(kwh, rel=1e-9)
        assert static.usd[t] == pytest.approx(rent + kwh * PRICES[t], rel=1e-9)
        assert static.kg_co2[t] == pytest.approx(0.4 * kwh, rel=1e-9)
    spec, before = found.scheduled.plan.specs[0], PRICES[1]
    tariff = tariff_of(found.problem, DAY, found.running, spec, Weights(usd_per_h=1.0))
    hours, engine = start_up_s_of(spec, found.running) / HOUR_S, fo.build(spec)
    idle_kw, rent = 8 * float(engine.idle_w) / 1e3, 8 * usd_per_gpu_h
    assert tariff.start_cost[2] == pytest.approx(hours * (idle_kw * before + rent), rel=1e-12)
    assert start_up_s_of(spec, found.running) > POD_START_S


@pytest.mark.slow
def test_a_longer_hold_and_dearer_starts_cost_no_less(alone, found_alone):
    costs = [found_alone.scheduled.cost.sum()]
    for min_up_s in (7 * HOUR_S, 13 * HOUR_S, 24 * HOUR_S):
        held = scheduled(alone, min_up_s=min_up_s)
        costs.append(held.scheduled.cost.sum())
    assert np.all(np.diff(costs) >= -1e-6)
    assert held.scheduled.n_started.sum() == 0  # who stays up for a day never stops
    dear = scheduled(alone, start_j=1e12)
    assert dear.scheduled.n_started.sum() == 0


def test_spares_idle_and_what_is_reserved_is_paid_for(alone, found_alone):
    spare, found = scheduled(alone, warm_spares=2), found_alone
    idle_kwh = 24 * 2 * 8 * float(fo.build(SPEC).idle_w) / 1e3
    assert spare.elastic.energy_kwh.sum() - found.elastic.energy_kwh.sum() == pytest.approx(idle_kwh, rel=1e-9)
    assert np.array_equal(spare.scheduled.n_gpus - 16, spare.scheduled.n_instances.sum(axis=1) * 8)
    reserved = scheduled(alone, reserved=True)
    electricity = reserved.scheduled.usd.sum() - reserved.static.usd.sum()
    assert abs(electricity) < 0.2 * reserved.static.usd.sum()  # GPUs cost as much either way
    assert found.saves("usd") > reserved.saves("usd") > 0


def test_a_negative_price_keeps_instances_up(alone):
    free = fo.make_hours(DAY.rate_per_s, length_s=6 * HOUR_S, usd_per_kwh=[0.1, -50.0, 0.3, 0.2])
    paid = fo.make_problem(CHAT, alone.specs, n_pools=1, objective="usd", assume="published")
    answer = scheduled(paid, free)
    assert np.all(answer.scheduled.n_instances[1] == answer.scheduled.n_instances.max(axis=0))
    assert answer.scheduled.usd[1] < 0
    mild = scheduled(paid, fo.make_hours(DAY.rate_per_s, length_s=6 * HOUR_S, usd_per_kwh=[0.1, -0.01, 0.0, 0.2]))
    assert mild.scheduled.usd.sum() < mild.static.usd.sum()  # too few instances are no bargain at any price


def test_the_document_the_table_and_the_figure_say_the_same(found):
    document = json.loads(to_json(schedule_to_json(found)))
    plans = document["plans"]
    assert [each["rate_per_s"] for each in document["periods"]] == DAY.rate_per_s.tolist()
    assert set(plans) == {"static", "scheduled", "elastic"}
    for name, plan in plans.items():
        assert plan["n_gpus"] == [8 * sum(row) for row in zip(*(pool["n_instances"] for pool in plan["pools"]))]
        assert 0.99 <= plan["slo_attainment"] <= 1, name
        for counted in COUNTED:
            assert plan[counted] == pytest.approx(sum(plan["by_period"][counted]))
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(schedule_table(document))
    text = console.export_text()
    assert f"Own {plans['scheduled']['n_gpus_owned']:,} GPUs" in text
    assert "00:00-06:00" in text
    assert len(schedule_figure(document).axes) == 5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"slo": fo.make_slo(scope="fleet")}, "scope"),
        ({"gamma": None}, "gamma"),
        ({"budget": fo.make_budget(max_gpus=8)}, "max_gpus"),
    ],
)
def test_what_is_not_scheduled_is_refused(problem, changes, says):
    asked = fo.make_problem(problem.workload, problem.specs, n_pools=2, **changes)
    with pytest.raises(BadField, match=says):
        fo.schedule(asked, DAY)


def test_starts_longer_than_a_period_are_refused(problem):
    with pytest.raises(BadField, match=r"start_up_s: 30,000 s, longer than the shortest period of hours, 21,600 s"):
        fo.schedule(problem, DAY, fo.make_running(start_up_s=30_000.0))


def test_growth_is_bought_by_quarter(found_alone):
    now, *quarters = fo.purchases(found_alone, 2.0, 4)
    assert (now.n_gpus, now.n_bought) == (found_alone.scheduled.n_gpus_owned, 0)
    assert quarters[-1].rate_per_s == pytest.approx(2.0 * DAY.rate_per_s.max())
    assert sum(each.n_bought for each in quarters) == quarters[-1].n_gpus - now.n_gpus
    assert all(each.n_bought >= 0 for each in quarters)
    assert now.n_gpus < quarters[-1].n_gpus <= 2 * now.n_gpus + 8  # larger pools wait less
    with pytest.raises(BadField, match="quarters"):
        fo.purchases(found_alone, 2.0, 0)


@pytest.mark.parametrize(
    ("text", "factor"), [("2x/year", 2.0), ("1.5x/quarter", 1.5**4), ("30%/year", 1.3), ("-20%/year", 0.8)]
)
def test_growth_is_typed_in_several_ways(text, factor):
    assert Growth().parse(text) == pytest.approx(factor)
    assert Growth().parse(Growth().kept(factor)) == pytest.approx(factor)


@pytest.mark.parametrize("text", ["2", "x/year", "0x/year", "-100%/year", "9x/month", "2x/week"])
def test_growth_that_is_none_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="2x/year"):
        Growth().parse(text)


@pytest.mark.slow  # what is reachable is searched for
def test_a_peak_that_no_fleet_holds_is_said(problem):
    hopeless = fo.make_problem(problem.workload, problem.specs, n_pools=1, slo=fo.make_slo(ttft_p99_s=1e-4))
    assert isinstance(fo.schedule(hopeless, DAY), fo.Infeasible)


@pytest.mark.parametrize(
    "numbers", [{"start_up_s": -1.0}, {"min_up_s": math.inf}, {"warm_spares": 0.5}, {"start_j": math.nan}]
)
def test_running_is_checked(numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        fo.make_running(**numbers)


# ------------------------------------------------------------------------------------------------------------ the hours


def test_bundled_profiles_are_facts_with_a_source():
    for name in names_of_rates():
        hours = fo.hours_named(name)
        assert hours.n_periods == (240 if name.endswith("-10d") else 24)
        assert hours.repeats == (hours.n_periods == 24)
        assert np.all(hours.rate_per_s > 0)
    means = {name: fo.hours_named(f"{name}-10d").mean_rate_per_s for name in bundled_rates()}
    assert means == pytest.approx({"servegen-small": 1132.2, "servegen-mid": 1655.6, "servegen-large": 213.2}, rel=0.01)
    assert all(
        "2505.09999" in about["source"] and about["licence"] == "Apache-2.0" for about in bundled_rates().values()
    )


HABITS = {  # csv: (clock, starts [h], lengths [h], rates [1/s])
    "start_s,rate\n0,2\n3600,4\n7200,6\n": ("since", [0, 1, 2], [1, 1, 1], [2, 4, 6]),
    "hour,rate_per_s\n" + "".join(f"{h},{h + 1}\n" for h in range(24)): (
        "day",
        [*range(24)],
        [1] * 24,
        [*range(1, 25)],
    ),
    "Period;Rate\n1;1,5\n2;3,0\n": ("since", [0, 1], [1, 1], [1.5, 3]),
    "start,rpm\n00:00,60\n06:00,600\n18:30,120\n": ("day", [0, 6, 18.5], [6, 12.5, 5.5], [1, 10, 2]),
    "timestamp\trequests\n2025-03-04T00:00\t3600\n2025-03-04T01:00\t7200\n": ("calendar", [0, 1], [1, 1], [1, 2]),
    "start,end,relative\n2025-03-04T00:00Z,2025-03-04T06:00Z,1\n2025-03-04T06:00Z,2025-03-04T07:00Z,3\n": (
        *("calendar", [0, 6], [6, 1]),
        [1, 3],
    ),
    "start_h,minutes,qps\n0,30,5\n0.5,60,7\n": ("since", [0, 0.5], [0.5, 1], [5, 7]),
}


@pytest.mark.parametrize("text", HABITS)
def test_habits_of_rate_files(tmp_path, text):
    clock, starts, lengths, values = HABITS[text]
    path = tmp_path / "rates.csv"
    path.write_text(text)
    read = read_stretches(path, "rate")
    assert read.clock == clock
    assert (read.start_s - (read.start_s[0] if clock == "calendar" else 0)).tolist() == [HOUR_S * x for x in starts]
    assert read.length_s.tolist() == [HOUR_S * x for x in lengths]
    assert read.values.tolist() == pytest.approx(values)
    assert read.relative == ("relative" in text)
    assert hours_of(read).repeats == (clock == "day")


UNITS = {
    ("price", "usd_per_mwh", "-20"): -0.02,
    ("price", "Price (USD/kWh)", "0.3"): 0.3,
    ("price", "eur_per_kwh", "0.3"): None,
    ("price", "cents_per_kwh", "12"): 0.12,
    ("carbon", "g_per_kwh", "400"): 0.4,
    ("carbon", "Carbon intensity gCO2eq/kWh (direct)", "250"): 0.25,
    ("carbon", "kg_per_kwh", "0.1"): 0.1,
}


@pytest.mark.parametrize("of", UNITS)
def test_units_of_prices_and_carbon(tmp_path, of):
    quantity, column, value = of
    path = tmp_path / "tariff.csv"
    path.write_text(f"start,{column}\n00:00,{value}\n12:00,{value}\n")
    if UNITS[of] is None:
        with pytest.raises(BadInput, match="need a price of electricity"):
            read_stretches(path, quantity)
    else:
        assert read_stretches(path, quantity).values == pytest.approx(UNITS[of])


REFUSED = {
    "hour,rate\n0,1\n1,2\n2,3\n3,1\n5,2\n": "line 6: a gap: a period ends at 14,400 s, the next begins at 18,000 s",
    "start,end,rate\n00:00,02:00,1\n01:00,24:00,2\n": "line 3: an overlap: a period ends at 02:00",
    "start_s,rate\n0,1\n3600,-2\n": "line 3: rate = -2; need a finite number, 0",
    "start_s,rate\n0,1\n3600,nan\n": "line 3: rate = nan; need",
    "start_s,rate\n0,0\n3600,0\n": "all rate are 0; need one > 0",
    "start,rate\n2025-03-04T00:00Z,1\n2025-03-04T01:00,2\n": "line 3: start = 2025-03-04T01:00 has no time zone",
    "start,rate\n2025-10-26T02:00,1\n2025-10-26T02:00,2\n": "clocks that go back: give offsets",
    "start,rate\n06:00,1\n12:00,2\n": "a gap from 00:00 to 06:00; need all 24 hours",
    "start,rate\n00:00,1\n25:00,2\n": "line 3: start = 25:00; need times of day",
    "start,rate\nMonday,1\nTuesday,2\n": "line 2: start = Monday; need times of day",
    "period,rate\n1,1\n3,2\n": "line 3: period = 3; need 0, 1, 2",
    "when,rate\n0,1\n1,2\n": "no column tells when a period begins: when, rate",
    "start_s,load\n0,1\n3600,2\n": "no column tells it: start_s, load; need requests/s",
    "start_s,rate\n0,1\n": "1 periods; need a header and 2",
    "start_s,rate\n0,1,2\n3600,2\n": "line 2: 3 cells, the header has 2",
    "start_s,length_s,rate\n0,0,1\n3600,60,2\n": "line 2: a period that ends where it begins",
    "rate,rate\n0,1\n3600,2\n": "need each name once",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_wrong_with_a_rate_file_is_said_in_a_line(tmp_path, text):
    path = tmp_path / "rates.csv"
    path.write_text(text)
    with pytest.raises(BadInput) as refusal:
        read_stretches(path, "rate")
    assert str(refusal.value).startswith(str(path))
    assert REFUSED[text] in str(refusal.value)


def stretches(clock, start_h, values, *, length_h=1.0, offset_h=None) -> Stretches:
    start_s = HOUR_S * np.asarray(start_h, float)
    offset_s = None if offset_h is None else HOUR_S * offset_h
    return Stretches("prices.csv", clock, start_s, np.full(len(start_s), HOUR_S * length_h), np.array(values), offset_s)


def test_prices_are_means_over_each_period_on_its_own_clock():
    by_hour = stretches("day", range(24), np.arange(24.0))
    assert along(by_hour, fo.make_hours([1.0] * 24)).tolist() == list(range(24))
    assert along(by_hour, fo.make_hours([1.0] * 12, length_s=2 * HOUR_S)).tolist() == [0.5 + 2 * k for k in range(12)]
    ten_pm = HOUR_S * (480_000 - 480_000 % 24 + 22)
    night = Hours("trace", "calendar", np.array([ten_pm]), np.array([4 * HOUR_S]), np.ones(1), False)
    assert along(by_hour, night).tolist() == [(22 + 23 + 0 + 1) / 4]
    # Dates with zones meet at the same instant: 10:00+02:00 is 08:00Z.
    day = 20_000 * 24.0
    berlin = stretches("calendar", day + np.arange(24.0), np.arange(24.0), offset_h=2.0)
    utc = hours_of(stretches("calendar", day + np.arange(4.0, 8.0), np.ones(4), offset_h=0.0))
    assert along(berlin, utc).tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize(
    ("clock", "offset_h", "starts", "says"),
    [
        ("calendar", 1.0, 480_000, "has stamps with a time zone, trace without one"),
        ("since", None, 0, "has times from a beginning of its own, trace has dates"),
        ("calendar", None, 480_005, "begins after trace does"),
        ("calendar", None, 479_990, "ends before trace does"),
    ],
)
def test_clocks_that_do_not_go_together_are_refused(clock, offset_h, starts, says):
    trace = Hours("trace", "calendar", HOUR_S * (480_000 + np.arange(6.0)), np.full(6, HOUR_S), np.ones(6), False)
    with pytest.raises(BadInput, match=says):
        along(stretches(clock, starts + np.arange(12.0), np.ones(12), offset_h=offset_h), trace)


def test_a_shape_takes_any_mean():
    day = at_mean(fo.hours_named("servegen-small"), 50.0)
    assert day.mean_rate_per_s == pytest.approx(50.0)
    dear = priced(day, usd_per_kwh=stretches("day", range(24), [0.1] * 24), kg_co2_per_kwh=None)
    assert np.array_equal(np.asarray(dear.usd_per_kwh), [0.1] * 24)
    assert dear.kg_co2_per_kwh is None


@pytest.mark.parametrize(
    ("rates", "how"),
    [
        ([], {}),
        ([1.0, -1.0], {}),
        ([0.0, 0.0], {}),
        ([1.0, math.inf], {}),
        ([1.0], {"length_s": 0.0}),
        ([1.0], {"usd_per_kwh": math.nan}),
        ([1.0], {"kg_co2_per_kwh": -1.0}),
    ],
)
def test_hours_are_checked(rates, how):
    with pytest.raises(ValueError, match="need"):
        fo.make_hours(rates, **how)


# ---------------------------------------------------------------------------------------------------------- the command


def refusal(*arguments: object) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["schedule", *map(str, arguments)])
    assert (code, out.getvalue(), err.getvalue().count("\n")) == (2, "", 1), err.getvalue()
    return err.getvalue()


def test_bad_inputs_of_the_command_are_one_line_each(tmp_path):
    prices = tmp_path / "prices.csv"
    prices.write_text("start,usd_per_kwh\n00:00,0.1\n12:00,0.2\n")
    shape, requests = tmp_path / "shape.csv", tmp_path / "requests.csv"
    shape.write_text("hour,relative\n0,1\n12,2\n")
    requests.write_text("prompt_tokens,output_tokens\n" + "100,50\n200,60\n" * 20)
    assert "did you mean servegen-small" in refusal("--profile", "servegen-smal")
    assert "no-such.csv" in refusal("--profile", tmp_path / "no-such.csv")
    assert "--prices: says it by period" in refusal("--prices", prices, "--usd-per-kwh", 0.1)
    assert "--rate: " in refusal("--workload", requests, "--profile", shape)
    assert "--start-up-s: 7,200 s, longer than the shortest period" in refusal("--start-up-s", 7200)
    assert "--gamma: auto is not searched over a day" in refusal("--gamma", "auto")
    assert "--kg-co2-per-kwh" in refusal("--objective", "co2")
