"""Every command once, in this process, on forty requests: its JSON, its table, and the files it is asked for."""

import json
import math
import re
import shlex
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fleetopt_jax._optimize.derivatives import outcomes
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.sensitivity import Elasticities, Elasticity, Sensitivity
from fleetopt_jax._optimize.uncertainty import Interval, MetricTrust, Trust
from fleetopt_jax.catalog.links import kv_link
from fleetopt_jax.cli.codes import BAD_INPUT, INFEASIBLE, OK
from fleetopt_jax.cli.commands import sensitivity as sensitivity_command
from fleetopt_jax.cli.main import main
from fleetopt_jax.cli.parser import make_parser
from fleetopt_jax.cli.repeat import command_said, from_here
from fleetopt_jax.documents.engine import load_engine
from fleetopt_jax.documents.ledger import LedgerRow, load_ledger
from fleetopt_jax.documents.plan import SAME, load_plan
from fleetopt_jax.documents.simulation import load_simulation
from fleetopt_jax.published import ledger as published_ledger
from fleetopt_jax.published import stack as published_stack

PLAIN = ("--assume", "published")  # laws that compile quickly


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def fleetopt(capsys) -> Callable[..., Ran]:
    """The command in this process."""

    def run(*arguments: object) -> Ran:
        return Ran(main([str(argument) for argument in arguments]), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def trace(folder) -> Path:
    """40 requests in 20 s: most are short, four are long."""
    rows = [(i * 0.5, 200 + (i * 37) % 400 + (6000 if i % 13 == 0 else 0), 40 + (i * 11) % 90) for i in range(40)]
    path = folder / "trace.csv"
    path.write_text("when,p,o\n" + "".join(f"{t},{p},{o}\n" for t, p, o in rows))
    return path


@pytest.fixture(scope="module")
def named(trace) -> tuple[object, ...]:
    """The options that read it."""
    columns = ("--prompt-column", "p", "--output-column", "o", "--time-column", "when")
    return ("--workload", trace, *columns, "--rate", 2000)


def same(one: Any, other: Any) -> bool:
    """Whether two evaluations of one fleet say the same: numbers to the rounding of compiled programs."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=SAME)
    return one == other


@pytest.fixture(scope="module")
def plan(folder, named) -> Path:
    """Two pools of whole instances, which hold their limits."""
    path = folder / "plan.json"
    assert main([str(a) for a in ("optimize", *named, *PLAIN, "--quiet", "--json", "--out", path)]) == OK
    assert len(json.loads(path.read_text())["pools"]) == 2
    return path


@pytest.fixture(scope="module")
def one_pool(folder, named) -> Path:
    """The best fleet of one pool."""
    path = folder / "one_pool.json"
    assert main([str(a) for a in ("optimize", *named, *PLAIN, "--pools", 1, "--quiet", "--json", "--out", path)]) == OK
    return path


@pytest.fixture
def no_derivatives(monkeypatch) -> None:
    """A sensitivity by hand: the real one, which `test_sensitivity.py` has, takes half a minute to compile."""

    def by_hand(plan: Plan, *, reoptimize: object = None) -> Sensitivity:
        values = {name: float(value) for name, value in outcomes(plan.metrics, plan.problem.slo).items()}
        ranked = {name: [Elasticity("workload.arrival_rate_per_s", 2000.0, 1.0)] for name in values}
        metrics = {
            name: MetricTrust(x, Interval(0.9 * x, 1.1 * x), Interval(0.8 * x, 1.2 * x), 0.1)
            for name, x in values.items()
        }
        return Sensitivity(Elasticities(ranked, {}), Trust(0.9, 100, metrics, 0.5), [], [])

    monkeypatch.setattr(sensitivity_command, "sensitivity", by_hand)


def besides_reading(ran) -> str:
    """stderr without the one line that says what the workload's file was taken for."""
    lines = ran.err.splitlines(keepends=True)
    assert sum(": read " in line for line in lines) == 1
    return "".join(line for line in lines if ": read " not in line)


def drawn(path: Path) -> bool:
    return path.read_bytes().startswith((b"<?xml", b"\x89PNG"))


def test_optimize_says_on_stderr_what_no_fleet_holds(fleetopt, named):
    ran = fleetopt("optimize", *named, *PLAIN, "--max-gpus", 8, "--json")
    assert (ran.code, ran.document["status"]) == (INFEASIBLE, "infeasible")
    nearest = f"the smallest reachable is {ran.document['binding']['nearest_feasible']:,.0f} GPUs"
    assert ran.err == f"fleetopt optimize: infeasible: no fleet holds its latencies with 8 GPUs; {nearest}\n"


def test_carbon_is_an_objective_and_a_limit(fleetopt, named):
    ask = ("optimize", *named, *PLAIN, "--kg-co2-per-kwh", 0.4, "--json")
    least = fleetopt(*ask, "--objective", "co2").document
    assert least["objective"] == "co2"
    most = least["metrics"]["kg_co2_per_h"]
    assert most == pytest.approx(0.4 * least["metrics"]["power_w"] / 1000)
    held = fleetopt(*ask, "--max-kg-co2-per-h", 1.01 * most)
    assert (held.code, held.document["budget"]) == (OK, {"max_kg_co2_per_h": 1.01 * most})
    refused = fleetopt(*ask, "--max-kg-co2-per-h", 0.9 * most)
    assert refused.code == INFEASIBLE
    assert refused.document["binding"]["nearest_feasible"] == pytest.approx(most)
    assert "kg CO2/h" in refused.err


def test_evaluate_takes_a_plan_by_its_own_columns_and_draws_its_pools(fleetopt, plan, tmp_path):
    figure = tmp_path / "pools.svg"
    ran = fleetopt("evaluate", plan, "--json", "--figure", figure)
    before = json.loads(plan.read_text())
    assert (ran.code, besides_reading(ran)) == (OK, "")
    for part in ("status", "method", "workload", "metrics", "pools"):
        assert same(ran.document[part], before[part])
    assert drawn(figure)
    overloaded = fleetopt("evaluate", plan, "--rate", 200000)
    assert overloaded.code == INFEASIBLE
    assert "pool 1 is asked for" in overloaded.err and "times what its" in overloaded.err
    with pytest.warns(UserWarning):  # of other columns than the plan's trace has
        plan_file = json.loads(plan.read_text())
        plan_file["workload"]["digest"] = "sha256:of another"
        other = tmp_path / "other.json"
        other.write_text(json.dumps(plan_file))
        load_plan(other)
    assert "has other requests than when" in fleetopt("evaluate", other).err


@pytest.mark.slow
def test_simulate_stands_beside_the_laws(fleetopt, one_pool, tmp_path):
    path, figure = tmp_path / "simulation.json", tmp_path / "agreement.svg"
    how = ("--requests", 300, "--replications", 2, "--seed", 1)
    ran = fleetopt("simulate", one_pool, *how, "--json", "--out", path, "--figure", figure)
    assert ran.code in (OK, INFEASIBLE)
    document = ran.document
    assert (document["n_arrivals"], document["seed"], document["n_replications"]) == (600, 1, 2)
    names = {"window_tokens", "gpu", "llm", "tp", "n_instances", "metrics"}
    assert [set(pool) for pool in document["pools"]] == [names]
    assert load_simulation(path).n_arrivals == 600
    assert drawn(figure)
    assert "in simulation" in fleetopt("simulate", one_pool, *how).out


def test_pareto_draws_a_front_and_an_axis(fleetopt, named, tmp_path):
    table, figure = tmp_path / "front.csv", tmp_path / "front.svg"
    ask = ("pareto", *named, *PLAIN, "--pools", 1)
    ran = fleetopt(*ask, "--points", 3, "--json", "--csv", table, "--figure", figure)
    assert (ran.code, besides_reading(ran)) == (OK, "")
    points = ran.document["points"]
    lines = table.read_text().splitlines()
    assert len([line for line in lines if line.startswith("front,")]) == len(points) > 0
    assert all(point["plan"]["workload"]["columns"]["prompt"] == "p" for point in points)
    assert drawn(figure)
    axis = fleetopt(*ask, "--axis", "ttft-p99-ms=0.001,500", "--json", "--csv", table)
    assert axis.code == OK
    assert [row["plan"]["status"] for row in axis.document["rows"]] == ["infeasible", "optimal"]
    assert "infeasible at ttft-p99-ms 0.001" in axis.err
    none = fleetopt(*ask, "--points", 3, "--itl-ms", 0.001)
    assert none.code == INFEASIBLE
    assert "no fleet holds a mean ITL of 0.001 ms" in none.err


def test_sensitivity_says_what_a_plan_rests_on(fleetopt, plan, tmp_path, no_derivatives):
    figure = tmp_path / "tornado.svg"
    ran = fleetopt("sensitivity", plan, "--json", "--figure", figure, "--metric", "power_w", "--top", 5)
    assert (ran.code, besides_reading(ran)) == (OK, "")
    assert ran.document["shown"] == {"metric": "power_w", "top": 5}
    assert same(ran.document["plan"]["pools"], json.loads(plan.read_text())["pools"])
    assert drawn(figure)
    assert "elastic" in fleetopt("sensitivity", plan).out.lower()


def test_report_is_one_page_of_everything(fleetopt, plan, tmp_path, no_derivatives):
    page = tmp_path / "page.html"
    ran = fleetopt("report", plan, "--out", page)
    assert (ran.code, ran.out, besides_reading(ran)) == (OK, f"Wrote {page}\n", "")
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    found, itself = repeating(text)
    assert itself == ["fleetopt", "report", str(plan), "--out", str(page)]
    first = json.loads(plan.read_text())
    again = fleetopt(*found[1:-2], "--json").document  # but for --out, which would write over the plan
    assert found[-2:] == ["--out", str(plan)]
    assert _without_time(again) == _without_time(first)


def repeating(page: str) -> list[list[str]]:
    """The commands under "How to repeat it"."""
    return [shlex.split(unescape(line)) for line in re.findall("<pre><code>(.*?)</code></pre>", page)]


def test_a_command_kept_in_a_plan_names_its_files_wherever_it_is_read(tmp_path, monkeypatch):
    for folder in ("planner/plans", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("trace.csv", "mine.json", "my.toml"):
        (tmp_path / "planner" / name).write_text("there")
    monkeypatch.chdir(tmp_path / "planner")
    ask = "optimize --workload trace.csv --gpu mine.json,h100 --catalog my.toml --itl-ms 80 --out plans/plan.json"
    kept = command_said(make_parser().parse_args(ask.split()))
    assert kept == (
        "fleetopt optimize --workload ../trace.csv --gpu ../mine.json,h100 --catalog ../my.toml --itl-ms 80"
    )
    assert from_here(kept, "plans/plan.json") == kept.replace("../", "")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert from_here(kept, "../planner/plans/plan.json") == kept.replace("../", "../planner/")
    assert from_here("what's this", "plan.json") == "what's this"


def _without_time(plan: dict[str, Any]) -> dict[str, Any]:
    return plan | {"search": plan["search"] | {"wall_s": 0.0}}


def test_a_page_of_another_traffic_repeats_its_evaluation(fleetopt, plan, tmp_path, no_derivatives):
    page = tmp_path / "page.html"
    assert fleetopt("report", plan, "--rate", 1900, "--out", page).code == OK
    evaluated, _ = repeating(page.read_text())
    assert evaluated == ["fleetopt", "evaluate", str(plan), "--rate", "1900"]
    again = fleetopt(*evaluated[1:], "--json").document
    assert f"{again['metrics']['tok_per_j']:#.3g} tokens per joule" in page.read_text()


@pytest.mark.slow
def test_levers_start_from_a_plan_or_from_options(fleetopt, plan, named, tmp_path):
    figure = tmp_path / "levers.svg"
    ran = fleetopt("levers", plan, "--json", "--figure", figure)
    assert ran.code == OK
    names = {lever["name"] for lever in ran.document["levers"]}
    assert names >= {"gamma", "generation", "pools"}
    assert drawn(figure)
    late = fleetopt("levers", *named, *PLAIN, "--ttft-p99-ms", 0.001, "--json")
    assert late.code == INFEASIBLE
    assert "the present fleet: no fleet holds a P99 TTFT of 0.001 ms" in late.err


def test_the_ledger_has_a_row_for_every_choice(fleetopt, named, tmp_path, monkeypatch):
    """Of two choices here: each compiles laws of its own."""
    choices = ("integration", "power_scope")
    monkeypatch.setattr(published_ledger, "CHOICES", choices)
    path, figure = tmp_path / "ledger.json", tmp_path / "ledger.svg"
    ran = fleetopt("ledger", *named, "--pue", 1.5, "--json", "--out", path, "--figure", figure)
    assert (ran.code, besides_reading(ran)) == (OK, "")
    rows = load_ledger(path)
    assert [row.choice for row in rows] == ["published", *choices]
    watts = [1.0 / row.tok_per_j_homogeneous for row in rows[1:] if row.tok_per_j_homogeneous]
    assert watts[1] == pytest.approx(8 * 1.5 * watts[0])  # of all GPUs of an instance, and what the site adds
    assert drawn(figure)


@pytest.mark.slow
def test_the_ledger_has_a_row_of_a_prefix_cache_where_one_is_assumed(fleetopt, named, tmp_path, monkeypatch):
    """All other rows are as without; the last has the best fleets that all find the share."""
    monkeypatch.setattr(published_ledger, "CHOICES", ("integration", "prefill"))
    figure = tmp_path / "ledger.svg"
    without = fleetopt("ledger", *named, "--json").document
    ran = fleetopt("ledger", *named, "--prefix-hit", 0.37, "--json", "--figure", figure)
    assert ran.code == OK and drawn(figure) and "prefix_cache" not in without
    *rows, cached = ran.document["rows"]
    assert rows == without["rows"]
    assert (cached["choice"], cached["from"], cached["to"]) == ("prefix_cache", "none", "constant")
    assert ran.document["prefix_cache"] == {"name": "constant", "hit_frac": 0.37}
    assert cached["tok_per_j_homogeneous"] > rows[-1]["tok_per_j_homogeneous"]
    of = (*named, "--prefix-hit", 0.37, "--assume", "published,prefill=compute", "--slo-scope", "pool", "--json")
    plan = fleetopt("optimize", *of).document
    assert cached["tok_per_j_two_pool"] == pytest.approx(plan["metrics"]["tok_per_j"], rel=1e-6)
    said = fleetopt("ledger", *named, "--prefix-hit", 0.37).out
    assert "Where 37 % of the prompt tokens are found in a prefix cache: " in " ".join(said.split())


def test_the_ledger_goes_on_to_a_stack_of_2026(fleetopt, named, tmp_path, monkeypatch):
    """What each row asks is as the options say; nothing is searched here."""
    asked = []

    def walked(steps, progress):
        for step in steps:
            asked.append(step)
            yield LedgerRow(step.choice, step.before, step.after, 0.5, 0.5, 0.6, 1.2, 512, 1.0)

    monkeypatch.setattr(published_stack, "walked", walked)
    path, figure = tmp_path / "stack.json", tmp_path / "stack.svg"
    of = (*named, "--tp", 4, "--prefix-hit", 0.5, "--kv-link", "ethernet", "--pue", 1.5)
    ran = fleetopt("ledger", "--stack", *of, "--json", "--out", path, "--figure", figure)
    assert ran.code == OK and drawn(figure)
    assert [row.choice for row in load_ledger(path)] == list(published_stack.CHANGES)
    assert (ran.document["walk"], ran.document["prefix_cache"]["hit_frac"]) == ("stack", 0.5)
    cached, apart = asked[-1].problems
    assert cached.assumptions.prefix_cache.hit_frac == 0.5 and not apart.assumptions.prefix_cache.finds
    assert {spec.tp for step in asked for problem in step.problems for spec in problem.specs} == {4}
    assert {float(problem.around.site.pue) for step in asked for problem in step.problems} == {1.5}
    assert apart.service.link == kv_link("ethernet")
    usual = fleetopt("ledger", "--stack", *named)
    assert "36 % of every prompt is assumed to be found" in " ".join(usual.out.split())
    refused = fleetopt("ledger", "--stack", "--workload", "mooncake-conv", "--prefix-hit", "trace")
    assert refused.code == BAD_INPUT and "a ledger does not take into account" in refused.err


def test_what_only_the_second_ledger_reads_is_said_to_be_unread(fleetopt, named, monkeypatch):
    monkeypatch.setattr(published_ledger, "CHOICES", ())
    ran = fleetopt("ledger", *named, "--kv-link", "nvlink")
    assert ran.code == OK and "--kv-link is not read without --stack" in ran.err


def test_a_ledger_searches_a_share_alone(fleetopt, monkeypatch):
    """What depends on memory and instances is refused before anything is computed."""
    monkeypatch.setattr(published_ledger, "_sampled_row", lambda *_: pytest.fail("computed"))
    ran = fleetopt("ledger", "--workload", "mooncake-conv", "--prefix-hit", "trace")
    assert ran.code == BAD_INPUT and "a ledger does not take into account yet" in ran.err


def test_export_takes_a_plan(fleetopt, plan, tmp_path):
    router = tmp_path / "router.json"
    ran = fleetopt("export", plan, "--to", "kubernetes", "--router", router)
    assert ran.code == OK
    assert ran.out.count("kind: Deployment") >= 2
    assert len(json.loads(router.read_text())["pools"]) == 2
    assert "LeastRequest" in fleetopt("export", plan, "--to", "envoy").out
    refused = fleetopt("export", plan, "--to", "vllm", "--weights", "host")
    assert refused.code == BAD_INPUT and refused.err.startswith("fleetopt export: --weights: not read with --to vllm")


def test_calibrate_writes_an_engine_that_serves(fleetopt, named, tmp_path):
    batch = 2.0 ** np.arange(3, 11)
    measured, engine, figure = (tmp_path / name for name in ("mine.csv", "engine.json", "fit.svg"))
    measured.write_text("batch,step_ms\n" + "".join(f"{n:g},{16 + 0.1 * n:.6f}\n" for n in batch))
    names = ("--gpu", "h100", "--llm", "llama-3.1-70b", "--tp", 4, "--serving", "vllm-0.11")
    ran = fleetopt("calibrate", measured, *names, "--json", "--out", engine, "--figure", figure)
    assert (ran.code, ran.err) == (OK, "")
    assert load_engine(engine).file == str(engine)
    assert drawn(figure)
    shown = fleetopt("engine", "--gpu", engine, "--batch", 100, "--json", "--figure", tmp_path / "engine.svg").document
    assert (shown["quality"], shown["tp"], shown["kv_precision"]) == ("measured", 4, "bf16")
    assert shown["points"][0]["decode_step_s"] == pytest.approx(26e-3, rel=1e-3)
    made = fleetopt("optimize", *named, *PLAIN, "--gpu", f"h100,{engine}", "--kv-precision", "fp8", "--json")
    assert made.code == OK
    assert {pool["engine_file"] for pool in made.document["pools"]} <= {None, str(engine)}


def test_the_catalog_has_the_schemas_of_all_files(fleetopt):
    found = fleetopt("catalog", "schemas", "--json").document["schemas"]
    assert next(iter(found)) == "scenario"
    assert found.keys() >= {"plan", "engine", "simulation", "CDF"}
    assert "properties" in found["plan"]
    assert "plan" in fleetopt("catalog", "schemas").out


# --- plans that fail --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing(folder, plan) -> Path:
    """The plan under three times its traffic."""
    path = folder / "failing.json"
    assert main(["evaluate", str(plan), "--rate", "6000", "--quiet", "--json", "--out", str(path)]) == INFEASIBLE
    return path


def test_evaluate_says_what_a_plan_breaks_and_writes_one_that_does_not(fleetopt, plan, failing, folder):
    document = json.loads(failing.read_text())
    assert document["status"] == "infeasible" and {each["pool"] for each in document["broken"]} == {1, 2}
    assert document["repair"]["held"] and all(n > 0 for n in document["repair"]["instances_added"])
    table = fleetopt("evaluate", failing)
    assert table.code == INFEASIBLE and table.out.lstrip().startswith("It fails")
    assert "It saves" not in table.out and "never: overloaded" in table.out and " inf" not in table.out
    assert "times what its" in table.err and "; add " in table.err

    grown = folder / "grown.json"
    ran = fleetopt("evaluate", plan, "--rate", 6000, "--repair", "--json", "--out", grown)
    assert (ran.code, ran.document["status"], ran.document["repaired"]["held"]) == (OK, "feasible", True)
    assert [pool["n_instances"] for pool in ran.document["pools"]] == document["repair"]["n_instances"]
    again = fleetopt("evaluate", grown, "--repair", "--json")
    assert again.code == OK and "nothing to repair" in again.err
    assert same(again.document["metrics"], ran.document["metrics"])
    assert fleetopt("export", grown, "--to", "vllm").code == OK


def test_export_refuses_a_plan_that_fails_unless_anyway(fleetopt, failing):
    for target in ("vllm", "kubernetes"):
        refused = fleetopt("export", failing, "--to", target)
        assert refused.code == BAD_INPUT and refused.out == "" and refused.err.count("\n") == 1
        assert "pool 1 is asked for" in refused.err and "add " in refused.err and "--anyway" in refused.err
        assert "--repair --out grown.json" in refused.err
        written = fleetopt("export", failing, "--to", target, "--anyway")
        assert written.code == OK and "THIS FLEET FAILS ITS LIMITS" in written.out
