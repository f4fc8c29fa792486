"""Fronts: never a dominated point, volumes and knees against brute force, every point a plan that holds its limits."""

import csv
import dataclasses
import io
import itertools
import json
import logging
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fleetopt_jax as fo
from fleetopt_jax._optimize.dominance import hypervolume, knee, non_dominated
from fleetopt_jax._optimize.front import Front, NoFront, costs_of, sense_of
from fleetopt_jax._optimize.pareto import pareto
from fleetopt_jax._optimize.plan import require_plan
from fleetopt_jax._optimize.problem import Problem, make_problem
from fleetopt_jax._optimize.search import optimize, with_fleet
from fleetopt_jax.catalog.engines import resolved
from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.catalog.workloads import made_workload
from fleetopt_jax.cli.codes import BAD_INPUT, INFEASIBLE, OK
from fleetopt_jax.cli.main import main
from fleetopt_jax.cli.table import AXES
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.front import front_to_json, load_front, save_front
from fleetopt_jax.fleet.assumptions import PUBLISHED
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.fleet.resources import make_budget
from fleetopt_jax.report.pareto import AXIS_SHOWN, front_csv, front_figure, front_table
from fleetopt_jax.workload.atoms import with_rate

SIDE = 6  # of a grid of unit cells, on which a hypervolume is a count
cells = st.integers(2, 3).flatmap(
    lambda n_dims: hnp.arrays(int, st.tuples(st.integers(0, 12), st.just(n_dims)), elements=st.integers(0, SIDE + 1))
)

# --- dominance, volume, knee ------------------------------------------------------------------------------------------


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return all(x <= y for x, y in zip(a, b)) and any(x < y for x, y in zip(a, b))


@given(cells)
def test_exactly_the_dominated_points_are_left_out(points):
    mask = non_dominated(points)
    for i, point in enumerate(points):
        assert mask[i] == (not any(dominates(other, point) for other in points))


def test_what_is_not_finite_is_never_on_a_front():
    points = np.array([[1.0, 2.0], [math.nan, 0.0], [0.0, math.inf], [-math.inf, 0.0], [2.0, 1.0]])
    assert non_dominated(points).tolist() == [True, False, False, False, True]


@given(cells)
def test_hypervolume_counts_the_dominated_cells(points):
    n_dims = points.shape[1]
    grid = itertools.product(range(SIDE), repeat=n_dims)
    dominated = sum(any(all(p <= c for p, c in zip(point, cell)) for point in points) for cell in grid)
    assert hypervolume(points, np.full(n_dims, SIDE)) == dominated


@given(cells)
def test_hypervolume_needs_only_the_front_and_scales_with_its_units(points):
    reference = np.full(points.shape[1], SIDE)
    volume, units = hypervolume(points, reference), np.array([0.5, 3.0, 7.0])[: points.shape[1]]
    assert hypervolume(points[non_dominated(points)], reference) == volume
    assert hypervolume(points[::-1] * units - 2.0, reference * units - 2.0) == pytest.approx(volume * units.prod())


@given(hnp.arrays(float, (8, 3), elements=st.floats(0.0, 1.0)))
@settings(max_examples=20)
def test_hypervolume_is_the_share_of_random_points_dominated(points):
    draws = np.random.default_rng(0).uniform(size=(4000, 3))
    share = (points[None] <= draws[:, None]).all(axis=2).any(axis=1).mean()
    # Five standard errors of 4,000 draws.
    assert hypervolume(points, np.ones(3)) == pytest.approx(share, abs=5 * 0.5 / math.sqrt(4000))


def test_the_knee_by_hand():
    assert knee(np.array([[0.0, 1.0], [0.1, 0.2], [0.6, 0.1], [1.0, 0.0]])) == 1
    assert knee(np.array([[1.0, 16.0], [2.0, 8.0], [4.0, 4.0], [8.0, 2.0], [16.0, 1.0]])) == 2  # x y = 16
    assert knee(np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.2, 0.2]])) == 3
    straight = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    bulging = np.array([[0.0, 1.0], [0.7, 0.7], [1.0, 0.0]])
    assert knee(straight) is None
    assert knee(bulging) is None
    assert knee(straight[:2]) is None
    assert knee(np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])) is None


@given(hnp.arrays(float, 7, elements=st.floats(0.01, 1.0)), st.floats(0.1, 100.0), st.floats(-5.0, 5.0))
def test_the_knee_is_farthest_from_the_chord_in_any_units(steps, scale, shift):
    x = np.cumsum(steps)
    front = np.stack([x, np.cumsum(steps[::-1])[::-1] ** 2], axis=1)
    found = knee(front)
    a, b = (front[[0, -1]] - front.min(axis=0)) / np.ptp(front, axis=0)
    normal = (front - front.min(axis=0)) / np.ptp(front, axis=0)
    below = np.array([np.cross([*(b - a), 0.0], [*(p - a), 0.0])[2] for p in normal]) / np.linalg.norm(b - a)
    deepest = -below.min()  # of the points on the origin's side of the chord
    if found is None:
        assert deepest <= 1e-9
    else:
        assert -below[found] == pytest.approx(deepest, abs=1e-12)
        # Rounding may turn the choice among points that are equally deep, never the depth.
        again = knee(front * scale + shift)
        assert -below[again] == pytest.approx(deepest, abs=1e-9)


# --- fronts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem(h100, small_workload) -> Problem:
    return make_problem(small_workload, [h100], assume="published", assumptions=PUBLISHED, slo=make_slo(ttft_p99_s=0.3))


def traced(problem: Problem, *objectives: str, **how) -> Front:
    """The front of a problem that has one."""
    front = pareto(problem, *([objectives] if objectives else []), **how)
    assert isinstance(front, Front)
    return front


@pytest.fixture(scope="module")
def front(problem) -> Front:
    return traced(problem, n_points=14)


def costs(front: Front) -> np.ndarray:
    return costs_of(front.points, front.objectives)


def assert_sound(front: Front) -> None:
    """Every point feasible, evaluated to the values it is judged by, and dominated by no other nor by a reference."""
    assert non_dominated(costs(front)).all()
    assert len(np.unique(costs(front), axis=0)) == len(front.points)
    for point in front.points:
        plan = point.plan
        assert plan.status in ("optimal", "feasible")
        again = with_fleet(plan, plan.fleet)
        assert again.status == "feasible"
        metrics = front_to_json(front)["points"][0]["plan"]["metrics"]
        assert set(front.objectives) <= set(metrics)
        for name, value in zip(front.objectives, point.values):
            assert float(getattr(again.metrics, name)) == pytest.approx(value, rel=1e-9)
    if front.homogeneous:
        (alone,) = costs_of([front.homogeneous], front.objectives)
        assert not any(dominates(alone, point) for point in costs(front))
    assert 0 <= front.hypervolume_frac <= 1
    assert front.knee is None or 0 <= front.knee < len(front.points)


@pytest.mark.slow
def test_a_front_is_sound_and_holds_what_finer_sweeps_find(problem, front):
    """A sweep over many limits finds nothing beyond the front by more than the front says it may miss."""
    assert_sound(front)
    assert len(front.points) >= 5
    assert front.certified
    assert front.n_searches <= 14
    assert float(front.points[-1].values[1]) > float(front.points[0].values[1])
    swept = []
    for limit_s in np.geomspace(front.points[0].values[1], front.points[-1].values[1], 25):
        plan = require_plan(optimize(problem.serving(slo=make_slo(ttft_p99_s=limit_s * (1 + 1e-9)))))
        swept.append([-float(plan.metrics.tok_per_j), float(plan.metrics.ttft_p99_s)])
    reference = np.array(front.reference) * sense_of(front.objectives)
    both = hypervolume(np.concatenate([costs(front), swept]), reference)
    assert front.hypervolume <= both <= front.hypervolume + front.hypervolume_missing + 1e-12
    assert front.hypervolume >= 0.9 * both


@pytest.mark.slow
def test_more_searches_never_shrink_a_front(problem, front):
    fewer = traced(problem, n_points=6, reference=front.reference)
    assert_sound(fewer)
    assert fewer.hypervolume <= front.hypervolume * (1 + 1e-12)
    assert fewer.hypervolume_missing >= front.hypervolume_missing


@pytest.mark.slow
def test_a_cap_on_the_ttft_is_kept(problem, front):
    cap_s = front.points[len(front.points) // 2].values[1]
    capped = traced(problem, n_points=8, max_ttft_p99_s=cap_s)
    assert_sound(capped)
    assert max(point.values[1] for point in capped.points) <= cap_s * (1 + 1e-9)


@pytest.mark.slow
def test_a_budget_cuts_the_front_short(problem, front):
    """Where GPUs are scarce, the tightest latencies are out of reach, and the rest of the front is not."""
    counts = [float(point.plan.metrics.n_gpus) for point in front.points]
    cap = (min(counts) + max(counts)) / 2.0
    scarce = traced(dataclasses.replace(problem, budget=make_budget(max_gpus=cap)), n_points=14)
    assert_sound(scarce)
    assert max(float(point.plan.metrics.n_gpus) for point in scarce.points) <= cap
    assert len(scarce.points) >= 2
    assert scarce.points[0].values[1] > front.points[0].values[1]
    assert scarce.points[-1].values == pytest.approx(front.points[-1].values, rel=1e-9)


def dear_b200(problem: Problem) -> EngineSpec:
    """A GPU that saves power at four times the price of the problem's."""
    gpu = gpu_entry("b200")
    price = 4.0 * float(problem.engines[0].usd_per_gpu_h)
    return resolved(EngineSpec(dataclasses.replace(gpu, usd_per_h=price), source="projected"))


def test_power_and_cost_trade_between_gpus_in_one_pool_whatever_comes_first(problem, tmp_path):
    """One pool: either the one GPU or the other."""
    both = dataclasses.replace(problem.serving(specs=(*problem.specs, dear_b200(problem))), n_pools=1)
    front = traced(both, "tok_per_j", "usd_per_h", n_points=4)
    assert [point.plan.kinds for point in front.points] == [("h100",), ("b200",)]
    assert front.certified and front.hypervolume_missing >= 0.0
    cheap, dear = (float(point.plan.metrics.usd_per_h) for point in front.points)
    turned = traced(both, "usd_per_h", "tok_per_j", n_points=4)
    assert sorted(point.values[::-1] for point in turned.points) == sorted(point.values for point in front.points)
    # A budget in USD is held by every point, whatever it was weighted by.
    capped = dataclasses.replace(both, budget=make_budget(max_usd_per_h=0.5 * (cheap + dear)))
    assert [point.plan.kinds for point in traced(capped, "tok_per_j", "usd_per_h", n_points=4).points] == [("h100",)]
    document = front_to_json(front)
    assert [point["plan"]["objective"] for point in document["points"]] == ["tok_per_j"] * 2
    # What is written is read back, the plans evaluated anew.
    save_front(front, tmp_path / "front.json")
    workload = made_workload("workload", problem.workload)
    again = load_front(tmp_path / "front.json", specs=[dear_b200(problem)], workload=workload)
    for new, old in zip(again.points, front.points, strict=True):
        assert new.values == pytest.approx(old.values, rel=1e-9)
    assert front_to_json(again)["hypervolume"]["reference"] == document["hypervolume"]["reference"]
    assert (again.certified, again.knee, again.n_searches) == (front.certified, front.knee, front.n_searches)
    slower = made_workload("workload", with_rate(problem.workload, 150.0))
    with pytest.warns(UserWarning, match="are not what they were"):
        another = load_front(tmp_path / "front.json", specs=[dear_b200(problem)], workload=slower)
    assert not another.certified and another.hypervolume_missing is None
    (tmp_path / "none.json").write_text(json.dumps(document | {"points": []}))
    with pytest.raises(BadInput, match="the front has no points"):
        load_front(tmp_path / "none.json")


@pytest.mark.slow
def test_power_and_cost_trade_between_gpus(problem):
    """Under one limit and in three objectives; a dear GPU that saves power makes the two costs conflict."""
    both = problem.serving(specs=(*problem.specs, dear_b200(problem)))
    flat = traced(both, "tok_per_j", "usd_per_h", n_points=8)
    assert_sound(flat)
    assert len(flat.points) >= 2
    cheapest = require_plan(optimize(dataclasses.replace(both, objective="usd")))
    assert flat.points[0].values[1] == pytest.approx(float(cheapest.metrics.usd_per_h), rel=1e-9)
    assert flat.points[-1].values[0] == pytest.approx(float(require_plan(optimize(both)).metrics.tok_per_j), rel=1e-9)
    swept = []
    for usd in np.linspace(flat.points[0].values[1], flat.points[-1].values[1], 6)[1:-1]:
        plan = require_plan(optimize(dataclasses.replace(both, budget=make_budget(max_usd_per_h=usd))))
        swept.append([-float(plan.metrics.tok_per_j), float(plan.metrics.usd_per_h)])
    every = hypervolume(np.concatenate([costs(flat), swept]), [-flat.reference[0], flat.reference[1]])
    assert every <= flat.hypervolume + flat.hypervolume_missing + 1e-9
    for point in flat.points:  # proved for its own question, or not called optimal
        beaten = max(float(other.plan.metrics.tok_per_j) for other in flat.points)
        assert point.plan.status == "feasible" or point.plan.metrics.tok_per_j == pytest.approx(beaten, rel=1e-9)
    deep = traced(both, "tok_per_j", "ttft_p99_s", "usd_per_h", n_points=10)
    assert_sound(deep)
    assert len(deep.points) > len(flat.points)


@pytest.mark.slow
def test_limits_no_fleet_holds_leave_an_empty_front(problem, front):
    least_s = front.points[0].values[1]
    too_tight = pareto(problem, n_points=4, max_ttft_p99_s=0.5 * least_s)
    assert isinstance(too_tight, NoFront)
    assert too_tight.points == ()
    assert too_tight.binding.limit == "ttft_p99_s"
    assert 0.5 * least_s < too_tight.binding.nearest_feasible <= least_s
    document = front_to_json(too_tight)
    assert document["points"] == [] and document["binding"]["limit"] == "ttft_p99_s"
    assert document.keys() == front_to_json(front).keys()
    no_itl = pareto(problem.serving(slo=make_slo(itl_s=1e-6)), n_points=4)
    assert isinstance(no_itl, NoFront) and no_itl.binding.limit == "itl_s"
    off = traced(problem.serving(slo=make_slo(ttft_p99_s=0.1 * least_s)), n_points=4)
    assert off.points
    assert off.homogeneous is None
    assert off.fleetopt is None


def test_impossible_questions_are_refused(problem):
    for bad, says in (
        (dict(objectives=("tok_per_j",)), "two or three"),
        (dict(objectives=("tok_per_j", "tok_per_j")), "two or three"),
        (dict(objectives=("tok_per_j", "co2")), "co2"),
        (dict(n_points=2), "n_points >= 3, got 2"),
        (dict(max_ttft_p99_s=math.nan), "nan"),
        (dict(reference=(1.0,)), "reference"),
        (dict(short_windows=[]), "short_windows"),
    ):
        with pytest.raises(ValueError, match=says):
            pareto(problem, **bad)
    with pytest.raises(BadInput):
        pareto(problem, ("tok_per_j", "watts"))
    assert fo.pareto is pareto


@pytest.mark.slow
def test_a_sweep_of_rates_compiles_once(problem, caplog):
    optimize(problem)  # what it compiled before may be dropped between tests
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        for rate in (20.0, 500.0, 1500.0):
            optimize(problem.serving(workload=with_rate(problem.workload, rate)))
    compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert not [message for message in compiled if "_batch" in message or "evaluate" in message]


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_documents_say_what_the_front_is(front):
    document = json.loads(json.dumps(front_to_json(front)))
    assert document["schema"] == "fleetopt-front/1"
    assert [point["objectives"] for point in document["points"]] == [
        dict(zip(front.objectives, point.values)) for point in front.points
    ]
    assert [i for i, point in enumerate(document["points"]) if point["knee"]] == (
        [] if front.knee is None else [front.knee]
    )
    rows = list(csv.DictReader(io.StringIO(front_csv(document))))
    assert [row["kind"] for row in rows].count("front") == len(front.points)
    assert {"homogeneous", "fleetopt"} <= {row["kind"] for row in rows}
    assert float(rows[0]["tok_per_j"]) == pytest.approx(front.points[0].values[0], rel=1e-8)
    labels = front_figure(document).axes[0].get_legend_handles_labels()[1]
    assert "best one-pool fleet" in labels
    assert front_table(document)
    document |= {"homogeneous": None, "fleetopt": None}
    assert "best one-pool fleet" not in front_figure(document).axes[0].get_legend_handles_labels()[1]


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        code = main(["pareto", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory) -> Path:
    """40 requests in 20 s, of 40 to 9,000 tokens: as many atoms as the small workload has, for its compilations."""
    lengths = 10 * np.round(np.geomspace(4.0, 900.0, 40) + np.arange(40))
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    rows = (
        f"{0.5 * i},{0.8 * x:.0f},{0.2 * x:.0f}\n" for i, x in enumerate(np.random.default_rng(0).permutation(lengths))
    )
    path.write_text("timestamp_s,prompt_tokens,output_tokens\n" + "".join(rows))
    return path


@pytest.mark.slow
def test_the_command_draws_writes_and_prints(capsys, trace_file, tmp_path):
    given_ = ("--workload", trace_file, "--rate", 300, "--assume", "published")
    files = {name: tmp_path / name for name in ("front.svg", "front.csv", "front.json")}
    code, out, err = command(
        capsys, *given_, "--points", 6, "--json", "--figure", files["front.svg"], "--csv", files["front.csv"],
        "--out", files["front.json"],
    )  # fmt: skip
    assert code == OK and err.count("\n") == 1 and ": read " in err
    document = json.loads(out)
    assert document == json.loads(files["front.json"].read_text())
    assert len(files["front.csv"].read_text().splitlines()) >= 1 + len(document["points"])
    assert "P99 time to first token" in files["front.svg"].read_text() or files["front.svg"].stat().st_size > 5000
    code, out, _ = command(capsys, *given_, "--axis", "workload-rate=50,300,1000", "--csv", files["front.csv"])
    assert code == OK
    assert "1,000" in out
    rows = list(csv.DictReader(io.StringIO(files["front.csv"].read_text())))
    assert [float(row["workload_rate"]) for row in rows] == [50.0, 300.0, 1000.0]
    assert [int(row["n_gpus"]) for row in rows] == sorted(int(row["n_gpus"]) for row in rows)
    code, out, err = command(capsys, *given_, "--ttft-p99-ms", 0.001, "--points", 3, "--figure", tmp_path / "no.png")
    assert code == INFEASIBLE
    assert "smallest reachable is" in err
    assert not (tmp_path / "no.png").exists()


def test_the_command_refuses_in_one_line(capsys, trace_file, tmp_path):
    wrong = {
        "workload-rate": ["--axis", "workload-rate=0,5"],
        "NAME=V1,V2": ["--axis", "speed"],
        "need workload-rate, ": ["--axis", "speed=1,2"],
        "two different": ["--axis", "pue=1.2"],
        "tokens": ["--objectives", "tok_per_j,tokens"],
        "two or three": ["--objectives", "tok_per_j"],
        "unknown kind of file": ["--figure", tmp_path / "front.pdf"],
        "no such directory": ["--csv", tmp_path / "none" / "front.csv"],
        "from 3 to 1000": ["--points", "1"],
    }
    for says, arguments in wrong.items():
        code, out, err = command(capsys, "--workload", trace_file, *arguments)
        assert (code, out) == (BAD_INPUT, "")
        assert err.count("\n") == 1
        assert says in err, err


def test_every_axis_has_a_label():
    assert set(AXES) == set(AXIS_SHOWN)
