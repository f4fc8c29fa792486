"""A sweep answers what `optimize` answers, in the same rows whoever works them off and whatever interrupts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest

import fleetopt_jax as fo
from fleetopt_jax._optimize.batch import answers, asked_of, fingerprint, is_batched
from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax._sweep import units, workers
from fleetopt_jax._sweep.parts import Parts
from fleetopt_jax._sweep.units import How, Scenarios, answer, units_of
from fleetopt_jax.catalog.workloads import with_rate
from fleetopt_jax.cli.backend import configure
from fleetopt_jax.cli.main import main
from fleetopt_jax.documents.sweep import METRICS, answer_rows, axes_of, load_sweep, plan_row
from fleetopt_jax.workload.atoms import Workload

ROOT = Path(__file__).parents[1]
RATES = [20.0, 60.0, 150.0, 400.0]


def requests() -> Workload:
    """12 lengths up to 250 tokens: every window is among a few hundred thresholds."""
    total = np.round(np.geomspace(4.0, 250.0, 12))
    prompt = np.maximum(1.0, np.floor(0.7 * total))
    return fo.make_workload(prompt, total - prompt, 1.0 / total, arrival_rate_per_s=50.0, arrival_scv=2.0)


REQUESTS = requests()


def published(rate: float = 50.0, gpu: str = "h100", **how) -> fo.Problem:
    """A problem under the published laws; module-level, so that other processes have it."""
    specs = [fo.EngineSpec(name, source="projected") for name in gpu.split(",")]
    how = {"assume": "published", "assumptions": fo.PUBLISHED, "window_tokens": 256.0} | how
    return fo.make_problem(with_rate(REQUESTS, rate), specs, **how)


def physical(rate: float = 50.0, **how) -> fo.Problem:
    """The same under the physical laws, of engines that compile fast."""
    spec = fo.EngineSpec("h100", "llama-3.1-8b", tp=1, serving="vllm-0.11")
    return fo.make_problem(with_rate(REQUESTS, rate), [spec], window_tokens=256.0, **how)


def assert_row_is(row: dict, answer: Plan | Infeasible) -> None:
    """The row of a plan that is as good, in all that does not depend on which of equal windows was taken."""
    asked = plan_row(answer)
    assert row["status"] == asked["status"]
    if row["status"] == "infeasible":
        assert row["binding.limit"] == asked["binding.limit"]
        assert row["reason"] == asked["reason"]
        return
    assert row["metrics.power_w"] == pytest.approx(asked["metrics.power_w"], rel=1e-12)
    chosen = [pool["window_tokens"] for pool in row["pools"]]
    assert isinstance(answer, Plan)
    problem, e = answer.problem, [spec.gpu_name for spec in answer.problem.specs]
    again = fo.evaluate_given(
        problem,
        [problem.specs[e.index(pool["gpu"])] for pool in row["pools"]],
        window_tokens=chosen,
        gamma=[pool["gamma"] for pool in row["pools"]],
        n_instances=[pool["n_instances"] for pool in row["pools"]],
    )
    evaluated = plan_row(again)
    for name in METRICS:
        assert row[f"metrics.{name}"] == pytest.approx(evaluated[f"metrics.{name}"], rel=1e-9), name
    for mine, other in zip(row["pools"], evaluated["pools"], strict=True):
        for name, value in mine.items():
            assert value == (other[name] if isinstance(value, str) else pytest.approx(other[name], rel=1e-9)), name


@pytest.mark.parametrize(
    "problems",
    [
        [published(rate, slo=fo.make_slo(ttft_p99_s=limit_s)) for rate in RATES for limit_s in (1e-4, 0.006, 0.5)],
        pytest.param(
            [published(rate, "h100,b200", objective="usd", gamma=1.5) for rate in RATES], marks=pytest.mark.slow
        ),
        pytest.param(
            [published(rate, n_pools=1, slo=fo.make_slo(itl_s=0.005)) for rate in RATES], marks=pytest.mark.slow
        ),
        pytest.param(
            [physical(rate, slo=fo.make_slo(ttft_p99_s=limit_s)) for rate in RATES for limit_s in (1e-3, 0.05)],
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["limits of the TTFT", "two engines, usd, gamma", "one pool, a limit of the ITL", "physical"],
)
def test_a_batch_answers_what_optimize_answers(problems):
    assert all(is_batched(problem, None) for problem in problems)
    asked = [asked_of(problem, 300) for problem in problems]
    assert len({each.shape for each in asked}) == 1
    rows = answer_rows(asked, answers(asked[0].sums(), [each.question for each in asked]))
    for problem, row in zip(problems, rows, strict=True):
        assert_row_is(row, optimize(problem))


@pytest.mark.slow
def test_an_answer_does_not_depend_on_the_batch_to_the_bit():
    asked = [asked_of(published(rate), 16) for rate in RATES]
    together = answers(asked[0].sums(), [each.question for each in asked])
    for i, each in enumerate(asked):
        alone = answers(each.sums(), [each.question])
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y[0]), together, alone)


def test_fewer_thresholds_are_among_more():
    windows = [np.unique(asked_of(published(), n).question.pools.window_tokens) for n in (8, 64, 300)]
    assert [len(each) for each in windows] == [9, 65, 250]  # with the promised one; no pool lies beyond the longest
    problem = fo.make_problem(fo.load_workload("azure-conv"), [fo.EngineSpec("h100")])
    assert asked_of(problem, 256).n_windows == 256


# --- units of work ----------------------------------------------------------------------------------------------------


def some(rate: float, pools: int) -> fo.Problem:
    if rate > 300 and pools == 3:
        raise ValueError("need fewer requests")
    return published(rate, n_pools=pools)


def all_units(scenarios: Scenarios) -> list[units.Unit]:
    return list(units_of(scenarios, How(None, 16)))


def test_scenarios_of_one_shape_are_answered_together_and_the_others_one_by_one():
    found = all_units(Scenarios(some, {"rate": RATES, "pools": [1, 2, 3]}))
    by_numbers = {tuple(member.number for member in unit.members): unit.batched for unit in found}
    assert by_numbers == {(2,): False, (5,): False, (8,): False, (0, 3, 6, 9): True, (1, 4, 7, 10): True, (11,): True}
    (failed,) = answer(next(unit for unit in found if unit.members[0].number == 11))
    assert failed == {"scenario": 11, "rate": 400.0, "pools": 3, "status": "failed", "reason": "need fewer requests"}


def test_units_are_known_by_what_they_ask():
    first, again, other = (
        [unit.key for unit in all_units(Scenarios(make, {"rate": RATES, "pools": [2]}))]
        for make in (some, some, lambda rate, pools: published(rate, slo=fo.make_slo(max_utilization=0.8)))
    )
    assert first == again
    assert not set(first) & set(other)
    assert fingerprint(published()) == fingerprint(published()) != fingerprint(published(gpu="b200"))
    assert fingerprint(published(objective="usd")) != fingerprint(published())


# --- files ------------------------------------------------------------------------------------------------------------

AXES = {"rate": list(np.linspace(20.0, 400.0, 300)), "gpu": ["h100", "b200"]}  # five units


def test_a_sweep_that_was_ended_goes_on_and_comes_to_the_same_file(tmp_path, monkeypatch):
    whole, parted = tmp_path / "whole.parquet", tmp_path / "parted.parquet"
    told = []
    table = fo.sweep(published, AXES, whole, n_thresholds=16, progress=lambda *far: told.append(far))
    assert told[-1] == (600, 600)
    assert table.num_rows == 600
    assert table["scenario"].to_pylist() == list(range(600))
    assert axes_of(load_sweep(whole)) == {"rate": AXES["rate"], "gpu": ["h100", "b200"]}

    put, answered = Parts.put, []

    def ends(parts, unit, rows):
        if answered:
            raise KeyboardInterrupt
        put(parts, unit, rows)
        answered.append(unit.number)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "put", ends)
        with pytest.raises(KeyboardInterrupt):
            fo.sweep(published, AXES, parted, n_thresholds=16)
    assert not parted.exists()
    assert len(list(tmp_path.glob("parted.parquet.parts/*"))) == 1
    monkeypatch.setattr(Parts, "put", lambda parts, unit, rows: (answered.append(unit.number), put(parts, unit, rows)))
    fo.sweep(published, AXES, parted, n_thresholds=16)
    assert sorted(answered) == list(range(len(answered)))  # none of them twice
    assert parted.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def mixed(rate: float, limit_s: float, tp: int) -> fo.Problem:
    spec = fo.EngineSpec("h100", "llama-3.1-70b", tp=tp, source="projected")
    how = {"assume": "published", "assumptions": fo.PUBLISHED, "slo": fo.make_slo(ttft_p99_s=limit_s)}
    return fo.make_problem(with_rate(REQUESTS, rate), [spec], **how)


def test_every_scenario_is_a_row_with_its_reason(tmp_path):
    table = fo.sweep(
        mixed, {"rate": [50], "limit_s": [1e-5, 0.5], "tp": [1, 8]}, tmp_path / "some.parquet", n_thresholds=16
    )
    assert table.schema.field("rate").type == pa.int64()
    assert table["status"].to_pylist() == ["failed", "infeasible", "failed", "optimal"]
    failed, infeasible, _, optimal = table.to_pylist()
    assert "does not fit" in failed["reason"]
    assert infeasible["binding.limit"] == "ttft_p99_s"
    assert infeasible["binding.nearest_feasible"] > 1e-5
    assert optimal["reason"] is None
    assert optimal["metrics.tok_per_j"] > 0


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({}, "need 1 to"),
        ({"rate": []}, "has no values"),
        ({"status": [1.0]}, "a sweep has a column of that name"),
    ],
)
def test_no_sweep_of_nothing(axes, said, tmp_path):
    with pytest.raises(fo.BadField, match=said):
        fo.sweep(published, axes, tmp_path / "none.parquet")
    assert not list(tmp_path.iterdir())


def test_ray_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(fo.BadField, match=r"Ray is not installed; pip install 'fleetopt_jax\[ray\]'"):
        fo.sweep(published, {"rate": RATES}, tmp_path / "rates.parquet", address="auto")


# --- the command ------------------------------------------------------------------------------------------------------

OF_THE_COMMAND = ["--workload", "lmsys-cdf", "--assume", "published", "--thresholds", "16"]


def test_the_command_writes_rows_and_shows_them(tmp_path, capsys):
    rows, figure = str(tmp_path / "rates.parquet"), tmp_path / "rates.svg"
    scenario = tmp_path / "rates.toml"
    scenario.write_text(
        'schema = "fleetopt-scenario/1"\n[workload]\nname = "lmsys-cdf"\n[sweep]\nvary = ["rate=1,2"]\nthresholds = 8\n'
    )
    arguments = ["sweep", "--scenario", str(scenario), *OF_THE_COMMAND, "--vary", "rate=50:150:3"]
    assert main([*arguments, "--vary", "gpu=h100,b200", "--out", rows, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["by_status"] == {"optimal": 6}
    assert document["axes"] == {"rate": [50.0, 100.0, 150.0], "gpu": ["h100", "b200"]}
    assert main(["sweep", "--show", rows, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["gpu"] for row in shown["rows"]] == ["h100", "b200"] * 3
    h100, b200 = (np.array([row["metrics.tok_per_j"] for row in shown["rows"]][k::2]) for k in range(2))
    assert np.all(b200 > h100)
    assert main(["sweep", "--show", rows, "--figure", str(figure)]) == 0
    assert "6 scenarios: 6 optimal" in capsys.readouterr().out
    assert "gain over one pool" in figure.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vary", "rte=1,2", "--out", "x.parquet"], "'rte'; did you mean rate?"),
        (["--vary", "rate=0:10:3", "--out", "x.parquet"], "rate: 0.0 is not allowed"),
        (["--vary", "tp=1:8:3", "--out", "x.parquet"], "need a range of whole numbers"),
        (["--vary", "rate=1:9:1", "--out", "x.parquet"], "A:B:N, N from 2"),
        (["--vary", "objective=cheap", "--out", "x.parquet"], "objective: invalid choice: 'cheap'"),
        (["--vary", "rate", "--out", "x.parquet"], "KEY=V1,V2"),
        (["--vary", "rate=1,2"], "--out: no file for the rows"),
        (["--out", "x.parquet"], "--vary: nothing is varied"),
        (["--show", "none.parquet"], "none.parquet: no such file"),
        (["--vary", "rate=1,2", "--show", "none.parquet"], "--show: not read with --vary"),
        (["--vary", "rate=1,2", "--out", "x.parquet", "--workload", "none.csv"], "none.csv: no such file"),
    ],
)
def test_wrong_inputs_stop_at_the_door(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["sweep", *arguments])
    except SystemExit as ended:
        code = ended.code
    line = capsys.readouterr().err
    assert code == 2
    assert said in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- the same rows, whoever works them off ----------------------------------------------------------------------------


def ending(rate: float, gpu: str) -> fo.Problem:
    return published(rate, gpu)


def end_once() -> None:
    """Ends the first worker that gets to it."""
    configure()
    flag = Path(os.environ["ENDED"])
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def end_always() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ENDED", str(tmp_path / "ended"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    fo.sweep(published, AXES, tmp_path / "one.parquet", n_thresholds=16)
    said = []
    how = {"n_thresholds": 16, "workers": 2, "log": said.append}
    fo.sweep(ending, AXES, tmp_path / "two.parquet", prepare=end_once, **how)
    assert "a worker ended without an answer" in said[0]
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    table = fo.sweep(ending, {"rate": RATES, "gpu": ["h100"]}, tmp_path / "none.parquet", prepare=end_always, **how)
    assert table["status"].to_pylist() == ["failed"] * 4
    assert set(table["reason"].to_pylist()) == {workers.ENDED}


COMMAND = [sys.executable, "-m", "fleetopt_jax.cli.main", "sweep", "--workload", "azure-cdf", "--assume", "published"]
VARIED = ["--vary", "rate=50:1000:400", "--vary", "gpu=h100,b200", "--vary", "ttft_p99_ms=20,500"]


def swept(out: Path, *more: str, **environment: str) -> bytes:
    """The file of a sweep by the command, in a process of its own."""
    line = [*COMMAND, *VARIED, "--out", str(out), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    subprocess.run(line, env=environment, capture_output=True, check=True, text=True)
    return out.read_bytes()


@pytest.mark.slow
def test_devices_and_processes_and_kills_leave_the_same_file(tmp_path):
    one = swept(tmp_path / "one.parquet")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    assert swept(tmp_path / "eight.parquet", XLA_FLAGS=flags) == one
    assert swept(tmp_path / "two.parquet", "--workers", "2") == one
    out = tmp_path / "killed.parquet"
    run = subprocess.Popen(
        [*COMMAND, *VARIED, "--out", str(out), "--quiet"], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    while run.poll() is None and len(list(tmp_path.glob("killed.parquet.parts/0*"))) < 3:
        time.sleep(0.02)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert swept(out) == one


@pytest.mark.slow
def test_ray_leaves_the_same_file(tmp_path):
    pytest.importorskip("ray")
    one = swept(tmp_path / "one.parquet")
    assert swept(tmp_path / "ray.parquet", "--address", "local", "--workers", "2") == one


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, and JAX's of the processes that it starts
def test_a_worker_of_ray_that_is_killed_changes_nothing(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("ENDED", str(tmp_path / "ended"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    fo.sweep(published, AXES, tmp_path / "one.parquet", n_thresholds=16)
    how = {"n_thresholds": 16, "workers": 2, "address": "local"}
    fo.sweep(ending, AXES, tmp_path / "ray.parquet", prepare=end_once, **how)
    assert (tmp_path / "ended").exists()  # by a worker that was given scenarios
    assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
