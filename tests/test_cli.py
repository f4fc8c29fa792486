"""The command line: one JSON object on stdout, one line on stderr, exit codes 0, 2 and 3, files whole or not at all."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fleetopt_jax.catalog.spec import MEASURED_SERVING
from fleetopt_jax.cli import commands
from fleetopt_jax.cli.codes import BAD_INPUT, BUG, INFEASIBLE, INTERRUPTED, OK
from fleetopt_jax.cli.commands import reproduce as reproduce_command
from fleetopt_jax.cli.main import main
from fleetopt_jax.fleet.assumptions import CHOICES, PHYSICAL, choice_names
from fleetopt_jax.published.tables import Cell, Reproduction

PLAN_FIELDS = {"schema", "status", "assume", "power_scope", "method", "workload", "slo", "pools", "metrics", "search"}
WORKLOAD_FIELDS = {"name", "arrival_rate_per_s", "mean_prompt_tokens", "mean_output_tokens"}
POOL_FIELDS = {
    *("window_tokens", "gpu", "llm", "tp", "n_instances", "n_gpus", "max_num_seqs", "gamma", "traffic_frac"),
    *("utilization", "n_active", "power_w", "tok_per_j", "ttft_p99_s", "itl_s"),
}
METRIC_FIELDS = {
    *("tok_per_j", "output_tok_per_s", "power_w", "n_instances", "n_gpus", "usd_per_h", "ttft_p99_s", "itl_s"),
    "gain_vs_homogeneous",
}
COMMANDS = ("reproduce", "optimize", "evaluate", "simulate", "pareto", "sensitivity", "levers", "ledger", "engine")
COMMANDS += ("calibrate", "trace", "catalog", "report", "export")
LEDGER_FIELDS = {
    *("choice", "from", "to", "tok_per_j_homogeneous", "tok_per_j_two_pool", "tok_per_j_fleetopt", "gain"),
    "short_window_tokens",
}


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """stdout as standard JSON; fails on anything around it and on NaN or Infinity."""
        return strict_json(self.out)


def strict_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not standard JSON")

    document = json.loads(text, parse_constant=refuse)
    assert isinstance(document, dict)
    return document


@pytest.fixture
def fleetopt(capsys) -> Callable[..., Answer]:
    """The command in this process."""

    def run(*arguments: object) -> Answer:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Answer(code, *capsys.readouterr())

    return run


def in_a_process(*arguments: object) -> Answer:
    """The command as a user runs it."""
    command = [sys.executable, "-m", "fleetopt_jax.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def default_plan(tmp_path_factory) -> tuple[Answer, Path]:
    """`fleetopt optimize --json --out FILE` with no other option, and the file."""
    path = tmp_path_factory.mktemp("default") / "plan.json"
    return in_a_process("optimize", "--json", "--out", path), path


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory) -> Path:
    """60 requests in 30 s, most of them short, a few of 9,000 tokens and more."""
    rng = np.random.default_rng(0)
    prompt = np.round(np.exp(rng.normal(6.0, 0.8, 60)))
    prompt[:4] = [9000, 9100, 9500, 9900]
    output = np.round(np.exp(rng.normal(4.5, 0.5, 60)))
    rows = zip(np.linspace(0.0, 30.0, 60), prompt, output, strict=True)
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    path.write_text("timestamp_s,prompt_tokens,output_tokens\n" + "".join(f"{t},{p:g},{o:g}\n" for t, p, o in rows))
    return path


@pytest.fixture
def plan_file(default_plan, tmp_path) -> Callable[[Callable[[dict], Any]], Path]:
    """A plan file of two pools after an edit; what the edit returns, if anything, is written in its place."""

    def write(edit: Callable[[dict], Any]) -> Path:
        document = strict_json(default_plan[1].read_text())
        document["pools"].insert(0, document["pools"][0] | {"window_tokens": 4109.0})
        edited = edit(document)
        path = tmp_path / "edited.json"
        path.write_text(edited if isinstance(edited, str) else json.dumps(document if edited is None else edited))
        return path

    return write


def put(*keys_and_value: Any) -> Callable[[dict], None]:
    """The edit that sets (or, for `...`, removes) the field at the end of the keys."""
    *keys, last, value = keys_and_value

    def edit(document: Any) -> None:
        for key in keys:
            document = document[key]
        if value is ...:
            del document[last]
        else:
            document[last] = value

    return edit


def assert_refused(answer: Answer, *says: str) -> None:
    """Bad input: exit code 2, nothing on stdout, one line on stderr that names what is wrong."""
    assert answer.code == BAD_INPUT
    assert answer.out == ""
    assert answer.err.startswith("fleetopt")
    assert answer.err.endswith("\n")
    assert answer.err.count("\n") == 1
    for fragment in says:
        assert fragment in answer.err


def assert_same_plan(plan: dict[str, Any], other: dict[str, Any]) -> None:
    """To the rounding in which two compilations may differ."""

    def numbers(values: Any) -> Any:
        if isinstance(values, dict):
            return {key: numbers(value) for key, value in values.items()}
        if isinstance(values, list):
            return [numbers(value) for value in values]
        return pytest.approx(values, rel=1e-12) if isinstance(values, float) else values

    for part in ("workload", "slo", "pools", "metrics", "site", "compressor", "assumptions"):
        assert plan[part] == numbers(other[part])


# ----------------------------------------------------------------------------------------------- what comes back


def test_the_default_plan_keeps_the_contract(default_plan):
    answer, _ = default_plan
    assert (answer.code, answer.err) == (OK, "")
    plan = answer.document
    assert plan.keys() >= PLAN_FIELDS
    assert plan["workload"].keys() >= WORKLOAD_FIELDS
    assert plan["slo"]["ttft_p99_s"] == 0.5
    assert plan["metrics"].keys() >= METRIC_FIELDS
    assert all(pool.keys() >= POOL_FIELDS for pool in plan["pools"])
    assert plan["search"].keys() >= {"n_evaluated", "wall_s"}
    assert plan["schema"] == "fleetopt-plan/1"
    assert plan["status"] == "optimal"
    assert plan["power_scope"] == "instance"
    assert plan["assumptions"] == choice_names(PHYSICAL)
    assert (plan["workload"]["name"], plan["workload"]["arrival_rate_per_s"]) == ("azure-conv", 1000.0)
    assert {(pool["gpu"], pool["llm"], pool["tp"]) for pool in plan["pools"]} == {("h100", "llama-3.1-70b", 8)}


def test_the_default_plan_adds_up_and_holds_its_limits(default_plan):
    plan = default_plan[0].document
    pools, metrics = plan["pools"], plan["metrics"]
    for name in ("n_instances", "n_gpus", "power_w"):
        assert sum(pool[name] for pool in pools) == pytest.approx(metrics[name])
    assert sum(pool["traffic_frac"] for pool in pools) == pytest.approx(1.0)
    assert metrics["tok_per_j"] == pytest.approx(metrics["output_tok_per_s"] / metrics["power_w"])
    assert metrics["ttft_p99_s"] == max(pool["ttft_p99_s"] for pool in pools) <= plan["slo"]["ttft_p99_s"]
    assert all(pool["utilization"] <= plan["slo"]["max_utilization"] for pool in pools)
    assert all(pool["n_gpus"] == pool["tp"] * pool["n_instances"] for pool in pools)
    assert metrics["gain_vs_homogeneous"] == pytest.approx(1.0)  # one pool is the best of all there
    windows = [pool["window_tokens"] for pool in pools]
    assert windows == sorted(windows)
    assert windows[-1] >= 14_089  # the longest request of the trace


def test_out_holds_the_document_of_stdout_and_nothing_lies_beside_it(default_plan):
    answer, path = default_plan
    assert path.read_text() == answer.out
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "options",
    [
        ("--rate", "2000", "--gpu", "h100,b200", "--objective", "usd", "--assume", "published"),
        ("--rate", "200", "--gamma", "1.3", "--pue", "1.3", "--host-w-per-gpu", "100", "--usd-per-kwh", "0.1"),
        *(
            pytest.param(options, marks=pytest.mark.nightly)
            for options in (
                ("--rate", "200", "--gpu", "h100,b200", "--ttft-p99-ms", "2500", "--slo-scope", "fleet"),
                ("--rate", "20", "--assume", "physical,kv_cache=reserved", "--ttft-ms-per-1k", "100", "--itl-ms", "40"),
                ("--rate", "0.5", "--precision", "fp8", "--tp", "2", "--ttft-p99-ms", "4000", "--max-num-seqs", "64"),
                ("--workload", "azure-conv", "--gamma", "auto"),
            )
        ),
    ],
)
@pytest.mark.slow
def test_evaluate_gives_an_optimized_plan_its_own_metrics(fleetopt, trace_file, tmp_path, options):
    path = tmp_path / "plan.json"
    optimized = fleetopt("optimize", "--workload", trace_file, *options, "--json", "--out", path)
    evaluated = fleetopt("evaluate", path, "--json")
    assert (optimized.code, evaluated.code) == (OK, OK)
    before, after = optimized.document, evaluated.document
    assert after.keys() >= PLAN_FIELDS
    assert_same_plan(after, before)


@pytest.mark.slow
def test_evaluate_gives_the_default_plan_its_own_metrics(fleetopt, default_plan):
    before, after = default_plan[0].document, fleetopt("evaluate", default_plan[1], "--json").document
    assert_same_plan(after, before)


@pytest.mark.slow
def test_evaluate_says_which_limit_a_fleet_breaks(fleetopt, plan_file):
    """An overloaded fleet waits for ever: null in JSON, which has no infinity."""
    answer = fleetopt("evaluate", plan_file(put("pools", -1, "n_instances", 1)), "--json")
    assert answer.code == INFEASIBLE
    assert re.fullmatch(
        r"fleetopt evaluate: infeasible: pool 2 is asked for \S+ times what its one instance can serve; "
        r"add \d+ instances to pool 2\n",
        answer.err,
    )
    document = answer.document
    assert document["status"] == "infeasible"
    assert document["binding"]["limit"] == "utilization"
    assert document["metrics"]["ttft_p99_s"] is None
    late = fleetopt("evaluate", plan_file(put("slo", "ttft_p99_s", 0.001)), "--json")
    assert (late.code, late.document["binding"]["limit"]) == (INFEASIBLE, "ttft_p99_s")


@pytest.mark.slow
def test_a_rate_can_be_asked_of_a_given_plan(fleetopt, plan_file):
    path = plan_file(lambda plan: None)
    half = fleetopt("evaluate", path, "--rate", 500, "--json").document
    full = fleetopt("evaluate", path, "--json").document
    assert half["workload"]["arrival_rate_per_s"] == 500
    assert half["metrics"]["output_tok_per_s"] == pytest.approx(full["metrics"]["output_tok_per_s"] / 2)
    assert half["metrics"]["tok_per_j"] < full["metrics"]["tok_per_j"]  # the same GPUs, less to do


def test_trace_says_what_is_in_a_file(fleetopt, trace_file):
    answer = fleetopt("trace", trace_file, "--json")
    assert (answer.code, answer.err) == (OK, "")
    document = answer.document
    times, prompt, output = np.loadtxt(trace_file, delimiter=",", skiprows=1).T
    assert document["n_requests"] == 60
    assert document["mean_prompt_tokens"] == pytest.approx(prompt.mean())
    assert document["mean_output_tokens"] == pytest.approx(output.mean())
    assert document["arrival_rate_per_s"] == pytest.approx(60 / times[-1])
    assert document["arrival_scv"] == pytest.approx(0.0, abs=1e-9)
    assert 1 <= document["n_atoms"] <= 60
    quantiles = document["quantiles"]["total_tokens"]
    assert quantiles == {q: pytest.approx(np.quantile(prompt + output, float(q))) for q in ("0.5", "0.9", "0.99")}
    assert fleetopt("trace", trace_file, "--rate", 7, "--json").document["arrival_rate_per_s"] == 7


def test_trace_of_a_cdf_knows_no_rate_until_it_is_given(fleetopt, tmp_path):
    path = tmp_path / "lengths.json"
    path.write_text("[[100, 0.5], [200, 1.0]]")
    document = fleetopt("trace", path, "--json").document
    assert (document["n_requests"], document["arrival_rate_per_s"], document["arrival_scv"]) == (None, None, None)
    assert_refused(fleetopt("optimize", "--workload", path), str(path), "--rate")


def test_columns_named_by_options_are_read(fleetopt, tmp_path):
    path = tmp_path / "named.csv"
    path.write_text("p,o,ms\n30,10,0\n50,20,2000\n")
    named = ("--prompt-column", "p", "--output-column", "o", "--time-column", "ms", "--time-unit", "ms")
    document = fleetopt("trace", path, *named, "--json").document
    assert (document["mean_prompt_tokens"], document["mean_output_tokens"]) == (40, 15)
    assert document["arrival_rate_per_s"] == pytest.approx(1.0)


def test_engine_says_what_one_engine_does_and_how_far_to_trust_it(fleetopt, tmp_path):
    ask = ("engine", "--gpu", "h100", "--llm", "llama-3.1-70b", "--batch", "8,32,128", "--context", "1000", "--json")
    assert fleetopt(*ask).document["quality"] == "kernels"
    ask = ("engine", "--serving", MEASURED_SERVING, *ask[1:])
    answer = fleetopt(*ask, "--tp", 4)
    document = answer.document
    assert (answer.code, answer.err) == (OK, "")
    assert (document["gpu"], document["llm"], document["tp"], document["quality"]) == (
        *("h100", "llama-3.1-70b", 4),
        "measured",
    )
    assert 0 < document["relative_error"] < 0.05
    assert [point["batch"] for point in document["points"]] == [8, 32, 128]
    for point in document["points"]:
        assert point["tok_per_s"] == pytest.approx(point["batch"] / point["step_s"])
        assert point["tok_per_j"] == pytest.approx(point["tok_per_s"] / (4 * point["power_w_per_gpu"]))
        assert point["decode_step_s"] <= point["step_s"]
    assert fleetopt(*ask, "--tp", 4, "--law").document["quality"] == "law"
    assert fleetopt(*ask, "--tp", 8).document["quality"] == "law"
    assert fleetopt(*ask, "--tp", 4, "--gpu", "h200").document["quality"] == "projected"
    rows = "".join(f"{gpu},4,{n},{9 + n / 10}\n" for gpu in ("h100", "b200") for n in (1, 8, 64))
    (tmp_path / "both.csv").write_text("gpu,tp,batch,mean_tpot_ms\n" + rows)
    beside = fleetopt(*ask, "--tp", 4, "--measured", tmp_path / "both.csv").document["warnings"]
    assert "3 rows are of other engines, left out" in beside[0] and "mean_tpot_ms holds the prefill" in beside[1]
    none = fleetopt(*ask, "--tp", 4, "--gpu", "h200", "--measured", tmp_path / "both.csv")
    assert_refused(none, str(tmp_path / "both.csv"), "has no rows of 4 x h200 llama-3.1-70b bf16")
    alone = fleetopt(*ask, "--tp", 4, "--prompt-per-output", 0).document["points"]
    assert all(point["decode_step_s"] == point["step_s"] for point in alone)
    assert "Quality: measured" in fleetopt(*ask[:-1], "--tp", 4).out


def test_an_engine_can_be_any_hugging_face_config(fleetopt, tmp_path):
    path = tmp_path / "config.json"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    path.write_text(json.dumps(config))
    ask = ("engine", "--tp", 8, "--json")
    named, read = fleetopt(*ask).document, fleetopt(*ask, "--llm", path).document
    assert read["llm"] == str(path)
    assert read["points"] == named["points"]
    path.write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    assert_refused(fleetopt(*ask, "--llm", path), str(path), "architectures", "MambaForCausalLM")


@pytest.fixture(scope="module")
def measurements_file(tmp_path_factory) -> Path:
    """Eight points of an engine with W = 16 ms, h = 0.1 ms and a logistic power."""
    batch = 2.0 ** np.arange(3, 11)
    watts = 430 + 210 / (1 + np.exp(-(np.log2(batch) - 7)))
    path = tmp_path_factory.mktemp("measured") / "mine.csv"
    rows = (f"{n:g},{16 + 0.1 * n:.6f},{w:.4f}\n" for n, w in zip(batch, watts))
    path.write_text("batch,step_ms,power_w_per_gpu\n" + "".join(rows))
    return path


@pytest.mark.slow
def test_a_calibrated_engine_serves_wherever_a_gpu_can(fleetopt, measurements_file, trace_file, tmp_path):
    names = ("--gpu", "h100", "--llm", "llama-3.1-70b", "--tp", 4)
    engine, figure = tmp_path / "engine.json", tmp_path / "fit.svg"
    answer = fleetopt("calibrate", measurements_file, *names, "--json", "--out", engine, "--figure", figure)
    assert (answer.code, answer.err) == (OK, "")
    fit = answer.document["fit"]["decode"]
    assert fit["estimates"]["base_s"] == pytest.approx(16e-3, rel=1e-4)
    assert fit["estimates"]["per_seq_at_context_s"] == pytest.approx(1e-4, rel=1e-4)
    assert figure.read_text().startswith("<?xml")
    point = fleetopt("engine", "--gpu", engine, "--batch", 100, "--json").document
    assert (point["quality"], point["tp"]) == ("measured", 4)
    assert point["points"][0]["decode_step_s"] == pytest.approx(26e-3, rel=1e-3)
    path = tmp_path / "plan.json"
    plan = fleetopt(
        "optimize", "--workload", trace_file, "--gpu", engine, "--ttft-p99-ms", 3000, "--json", "--out", path
    )
    assert plan.code == OK
    assert {pool["engine_file"] for pool in plan.document["pools"]} == {str(engine)}
    assert_same_plan(fleetopt("evaluate", path, "--json").document, plan.document)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch,step_ms\n8,20\n8,21\n8,22\n", ("batch",)),
        ("batch,step_ms\n8,20\n16,21\n", ("2 points",)),
        ("batch,step_ms\n8,20\n16,-21\n32,22\n", ("row 2", "step_ms", "-21")),
        ("n,t\n8,20\n", ("batch",)),
        ("", ("empty",)),
    ],
)
def test_measurements_that_tell_nothing_are_refused(fleetopt, tmp_path, text, says):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    names = ("--gpu", "h100", "--llm", "llama-3.1-70b", "--tp", 4, "--serving", MEASURED_SERVING)
    assert_refused(fleetopt("calibrate", path, *names), str(path), *says)


def test_what_was_measured_must_be_said(fleetopt, measurements_file):
    assert_refused(fleetopt("calibrate", measurements_file), "--gpu")
    assert_refused(fleetopt("calibrate", measurements_file, "--gpu", "h100", "--tp", 4), "--llm")
    named = ("--gpu", "h100", "--tp", 4, "--llm", "llama-3.1-70b")
    assert_refused(fleetopt("calibrate", measurements_file, *named, "--form", "moe"), "--form moe")
    assert_refused(fleetopt("calibrate", measurements_file, *named, "--figure", "fit.gif"), "fit.gif", ".svg")


@pytest.mark.nightly  # README's commands run it as well
def test_the_ledger_walks_from_published_to_physical(fleetopt, trace_file, tmp_path):
    figure, of = tmp_path / "ledger.png", ("--workload", trace_file, "--rate", 200)
    answer = fleetopt("ledger", *of, "--json", "--figure", figure)
    assert answer.code == OK
    rows = answer.document["rows"]
    assert [row["choice"] for row in rows] == ["published", *CHOICES]
    assert all(row.keys() >= LEDGER_FIELDS for row in rows)
    for row in rows:
        assert row["tok_per_j_homogeneous"] <= row["tok_per_j_two_pool"] * (1 + 1e-12)
        assert row["tok_per_j_two_pool"] <= row["tok_per_j_fleetopt"] * (1 + 1e-12)
        assert row["gain"] == pytest.approx(row["tok_per_j_fleetopt"] / row["tok_per_j_homogeneous"])
    last = rows[-1]
    for column, options in (("two_pool", ()), ("fleetopt", ("--gamma", "auto")), ("homogeneous", ("--pools", 1))):
        plan = fleetopt("optimize", *of, "--assume", "physical", *options, "--json").document
        assert last[f"tok_per_j_{column}"] == pytest.approx(plan["metrics"]["tok_per_j"], rel=1e-6)
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_the_ledger_begins_with_the_published_rows(fleetopt, monkeypatch):
    monkeypatch.setattr("fleetopt_jax.published.ledger.CHOICES", list(CHOICES)[:1])
    answer = fleetopt("ledger", "--workload", "azure-cdf", "--rate", 1000, "--json")
    assert (answer.code, answer.err) == (OK, "")
    published, integrated = answer.document["rows"]
    assert published["gain"] == pytest.approx(2.52, abs=0.01)
    assert integrated["tok_per_j_two_pool"] == pytest.approx(9.3265, abs=1e-4)  # the exact integral's best


def test_catalog_lists_every_part_and_where_its_numbers_come_from(fleetopt):
    document = fleetopt("catalog", "--json").document
    assert document.keys() == {"gpus", "llms", "engines", "workloads"}
    assert document["gpus"].keys() >= {"a100", "h100", "h200", "b200", "gb200"}
    assert document["llms"].keys() >= {"llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "qwen3-235b-a22b"}
    assert document["workloads"].keys() >= {"azure-conv", "azure-code", "azure-cdf", "lmsys-cdf", "agent-cdf"}
    assert all(entry["source"] for part in document.values() for entry in part.values())
    for part in document:
        assert fleetopt("catalog", part, "--json").document == {part: document[part]}


def test_reproduce_gives_the_asked_tables_cell_by_cell(fleetopt):
    answer = fleetopt("reproduce", 2, 1, "--json")
    document = answer.document
    assert answer.code == OK
    assert document.keys() >= {"tables", "ratios", "mismatches"}
    assert document["tables"].keys() == {"1", "2"}
    assert document["mismatches"] == 0
    for cell in [*document["tables"]["1"], *document["tables"]["2"]]:
        assert cell.keys() >= {"row", "column", "published", "reproduced", "exact"}
        assert cell["published"] == cell["reproduced"]


def test_a_missed_cell_is_a_bug_of_ours(fleetopt, monkeypatch):
    missed = Reproduction({"1": [Cell("2048", "h100_n_max", 1024.0, 1023.0, 1023.0)]}, [])
    monkeypatch.setattr(reproduce_command, "reproduce", lambda numbers: missed)
    answer = fleetopt("reproduce", "--json")
    assert (answer.code, answer.document["mismatches"]) == (BUG, 1)
    assert "MISS" in fleetopt("reproduce").out


@pytest.mark.slow
def test_the_table_says_what_the_json_says(fleetopt, default_plan):
    plan = default_plan[0].document
    shown = fleetopt("evaluate", default_plan[1])
    assert (shown.code, shown.err) == (OK, "")
    with pytest.raises(json.JSONDecodeError):
        json.loads(shown.out)
    assert f"{plan['metrics']['tok_per_j']:#.3g} output tokens per joule" in " ".join(shown.out.split())
    for pool in plan["pools"]:
        assert f"{pool['window_tokens']:,}" in shown.out
    assert "azure-conv" in fleetopt("trace", "azure-conv").out
    assert "h100" in fleetopt("catalog", "gpus").out


# ------------------------------------------------------------------------------------------------ infeasible plans


@pytest.mark.nightly
def test_an_unreachable_ttft_names_the_smallest_that_is_reachable(fleetopt, trace_file):
    def ask(ttft_p99_ms: float) -> Answer:
        return fleetopt("optimize", "--workload", trace_file, "--ttft-p99-ms", ttft_p99_ms, "--json")

    answer = ask(0.001)
    assert answer.code == INFEASIBLE
    assert (answer.document["status"], answer.document["pools"]) == ("infeasible", [])
    assert answer.err.count("\n") == 1
    reachable_ms = float(re.search(r"0\.001 ms; the smallest reachable is ([\d.]+) ms", answer.err).group(1))
    held = ask(reachable_ms)
    assert held.code == OK and held.err.count("\n") == 1 and ": read " in held.err
    assert held.document["metrics"]["ttft_p99_s"] <= reachable_ms / 1e3
    assert ask(reachable_ms - 0.1).code == INFEASIBLE  # it was rounded up to a tenth of a millisecond, no further


@pytest.mark.slow
def test_a_window_no_engine_can_hold_is_infeasible_and_names_the_largest(fleetopt, tmp_path):
    """Llama-3.1-70B at TP 2 leaves an H100 few KV blocks."""
    path = tmp_path / "long.csv"
    path.write_text("prompt_tokens,output_tokens\n100000,1000\n")
    answer = fleetopt("optimize", "--workload", path, "--rate", 1, "--tp", 2, "--json")
    assert answer.code == INFEASIBLE
    assert answer.document["binding"]["limit"] == "window_tokens"
    largest = answer.document["binding"]["nearest_feasible"]
    assert 0 < largest < 101_000
    assert "101008-token window" in answer.err
    assert f"{largest:g} tokens" in answer.err


@pytest.mark.slow
def test_an_asked_window_no_engine_can_hold_is_infeasible(fleetopt, trace_file):
    answer = fleetopt("optimize", "--workload", trace_file, "--window", 2**22, "--json")
    assert answer.code == INFEASIBLE
    assert answer.document["binding"]["limit"] == "window_tokens"


@pytest.mark.parametrize(
    "options",
    [
        ("--pools", "1"),
        ("--pools", "3", "--gamma", "auto", "--assume", "published"),
        pytest.param(("--pools", "6", "--gamma", "auto"), marks=pytest.mark.nightly),
    ],
)
@pytest.mark.slow
def test_every_number_of_pools_gets_an_answer(fleetopt, trace_file, options):
    answer = fleetopt("optimize", "--workload", trace_file, *options, "--json")
    assert answer.code == OK
    assert 1 <= len(answer.document["pools"]) <= int(options[1])


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *((("--rate", value), ("--rate", value)) for value in ("0", "-200", "nan", "inf", "abc")),
        *((("--ttft-p99-ms", value), ("--ttft-p99-ms", value)) for value in ("0", "-1", "nan", "inf", "soon")),
        *((("--gamma", value), ("--gamma", value)) for value in ("0.5", "-1", "nan", "inf", "much")),
        *((("--pools", value), ("--pools", value, "1 to 6")) for value in ("0", "7", "2.5", "two")),
        *((("--tp", value), ("--tp", value)) for value in ("0", "-8", "65", "8.5")),
        *((("--window", value), ("--window", value)) for value in ("0", "-4096", "8k")),
        (("--window", "14088"), ("--window", "14088", "0.0052%", "14089", "azure-conv")),
        (("--window", "1000"), ("--window", "1000", "58.4220%", "14089")),
        (("--gpu", "h10"), ("--gpu", "h10", "h100")),
        (("--gpu", "h100,b20"), ("--gpu", "'b20'", "b200")),
        (("--gpu", ""), ("--gpu", "is empty")),
        (("--llm", "llama-70b"), ("--llm", "llama-70b", "llama-3.1-70b")),
        (("--workload", "azure-conversation"), ("--workload", "azure-conversation", "azure-conv")),
        (("--workload", "トレース"), ("--workload", "トレース", "azure-conv")),
        (("--workload", "missing/trace.csv"), ("missing/trace.csv", "no such file")),
        (("--tp", "1"), ("llama-3.1-70b on 1 x h100", "does not fit", "134.9 GiB", "71.3 GiB")),
        (("--llm", "llama-3.1-405b", "--gpu", "a100,h100"), ("llama-3.1-405b on 8 x h100", "does not fit")),
        (("--method", "luck"), ("--method", "luck", "grid")),
        (("--objective", "joy"), ("--objective", "joy", "tok_per_j")),
        (("--assume", "best"), ("--assume", "best", "published")),
        (("--assume", "physical,luck=good"), ("--assume", "luck", "kv_cache")),
        (("--assume", "physical,kv_cache=big"), ("kv_cache = 'big'", "paged")),
        (("--assume", "published,integration=sampled"), ("sampled", "exact")),
        (("--assume", "published", "--slo-scope", "fleet"), ("quantile",)),
        (("--gamma", "3"), ("gamma", "2")),
        (("--precision", "fp3"), ("--precision", "fp3", "fp8")),
        (("--kv-precision", "int2"), ("--kv-precision", "int2", "fp8")),
        (("--precision", "mxfp4"), ("mxfp4", "experts")),
        (("--pue", "0.9"), ("--pue", "0.9")),
        (("--itl-ms", "0"), ("--itl-ms", "0")),
        (("--ttft-ms-per-1k", "-1"), ("--ttft-ms-per-1k", "-1")),
        (("--compress-success", "1.2"), ("--compress-success", "1.2")),
        (("--slo-scope", "world"), ("--slo-scope", "world", "fleet")),
        (("--gpu", "missing.json"), ("missing.json", "no such file")),
        (("--llm", "missing/config.json"), ("missing/config.json", "no such file")),
        (("--time-unit", "min"), ("--time-unit", "min", "ms")),
        (("--prompt-column", "p"), ("--prompt-column", "--output-column", "both")),
        (("--output-column", "o", "--time-column", "t"), ("--prompt-column", "--output-column", "both")),
        (("--out", "missing/plan.json"), ("--out missing/plan.json", "no such directory: missing")),
        (("--colour", "red"), ("--colour",)),
        (("--max-gpus", "0"), ("--max-gpus", "0", "positive")),
        (("--gpus-of", "b2000=3"), ("--gpus-of", "b2000", "b200")),
        (("--gpus-of", "b200"), ("--gpus-of", "GPU=N")),
        (("--tp", "2,x"), ("--tp", "x", "whole number")),
        (("--free", "speed"), ("--free", "max_num_seqs", "clock")),
        (("--free", "clock"), ("method exact", "method gradient")),
        (("--method", "exact", "--slo-scope", "fleet"), ("method exact", "grid or gradient")),
    ],
)
def test_a_bad_option_is_refused_by_name_and_value(fleetopt, arguments, says):
    assert_refused(fleetopt("optimize", "--json", *arguments), *says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ("COMMAND",)),
        (("optimise",), ("optimise", "optimize")),
        (("trace",), ("FILE|NAME",)),
        (("trace", "azure-cod"), ("azure-cod", "azure-code")),
        (("trace", "azure-conv", "--rate", "-1"), ("--rate", "-1")),
        (("evaluate", "missing.json"), ("missing.json", "no such file")),
        (("reproduce", "0"), ("0", "1 to 5")),
        (("reproduce", "6"), ("6", "1 to 5")),
        (("catalog", "gpu"), ("gpu", "gpus")),
    ],
)
def test_a_bad_command_is_refused(fleetopt, arguments, says):
    assert_refused(fleetopt(*arguments), *says)


@pytest.mark.parametrize("command", [("optimize",), ("trace", "azure-conv"), ("catalog",), ("reproduce", "1")])
def test_a_directory_is_no_place_for_a_file(fleetopt, tmp_path, command):
    assert_refused(fleetopt(*command, "--json", "--out", tmp_path), f"--out {tmp_path}", "is a directory")
    assert os.listdir(tmp_path) == []


def test_a_directory_is_no_file_to_read(fleetopt, tmp_path):
    for arguments in (("trace", tmp_path), ("evaluate", tmp_path), ("optimize", "--workload", tmp_path)):
        assert_refused(fleetopt(*arguments), str(tmp_path), "directory")


def test_a_bad_row_of_a_trace_is_named(fleetopt, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("prompt_tokens,output_tokens\n10,5\n10,-5\n")
    for command in (("trace", path), ("optimize", "--workload", path, "--rate", 1)):
        assert_refused(fleetopt(*command), str(path), "row 2", "output_tokens = -5")


REQUIRED = [
    *(("schema",), ("workload",), ("pools",), ("workload", "name"), ("workload", "arrival_rate_per_s")),
    *(("pools", 1, name) for name in ("window_tokens", "gpu", "llm", "tp", "n_instances")),
]


@pytest.mark.parametrize("keys", REQUIRED, ids=lambda keys: ".".join(map(str, keys)))
def test_a_plan_that_lacks_a_field_is_refused_by_its_name(fleetopt, plan_file, keys):
    path = plan_file(put(*keys, ...))
    assert_refused(fleetopt("evaluate", path), str(path), ".".join(map(str, keys)), "required")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda plan: "tokens per joule", ("not JSON",)),
        (lambda plan: "[" * 100_000, ("nested more than 100 deep",)),
        (lambda plan: " \n", ("empty",)),
        (lambda plan: "[1, 2]", ("[1, 2]",)),
        (put("schema", "fleetopt-plan/0"), ("schema = fleetopt-plan/0", "fleetopt-plan/1")),
        (put("assume", "best"), ("assume", "'best'", "physical")),
        (put("assume", "physical,tail=long"), ("tail = 'long'", "quantile")),
        (put("site", "pue", 0.5), ("site.pue = 0.5",)),
        (put("slo", "scope", "world"), ("slo.scope = world",)),
        (put("pools", 0, "precision", "fp3"), ("precision", "'fp3'", "fp8")),
        (put("pools", []), ("has no pools",)),
        (put("pools", 0, "n_instances", -3), ("pools.0.n_instances = -3",)),
        (put("pools", 0, "n_instances", 0), ("pools.0.n_instances = 0",)),
        (put("pools", 0, "n_instances", 2.5), ("pools.0.n_instances = 2.5",)),
        (put("pools", 0, "n_instances", float("nan")), ("pools.0.n_instances = NaN",)),
        (put("pools", 1, "tp", 0), ("pools.1.tp = 0",)),
        (put("pools", 0, "gamma", 0.9), ("pools.0.gamma = 0.9",)),
        (put("pools", 0, "gamma", float("inf")), ("pools.0.gamma = Infinity",)),
        (put("pools", 0, "window_tokens", -5), ("pools.0.window_tokens = -5",)),
        (put("pools", 0, "window_tokens", 20_000), ("pools.window_tokens = [20000, 14096]", "rising")),
        (put("pools", 0, "window_tokens", 14_096), ("pools.window_tokens = [14096, 14096]", "rising")),
        (put("pools", 1, "window_tokens", 14_000), ("window_tokens", "14000", "0.0052%", "14089")),
        (put("pools", 0, "gpu", 7), ("pools.0.gpu = 7",)),
        (put("workload", "arrival_rate_per_s", 0), ("workload.arrival_rate_per_s = 0",)),
        (put("workload", "arrival_rate_per_s", -200), ("workload.arrival_rate_per_s = -200",)),
        (put("slo", "ttft_p99_s", -1), ("slo.ttft_p99_s = -1",)),
        (put("slo", "max_utilization", 1), ("slo.max_utilization = 1",)),
    ],
)
def test_a_bad_plan_file_is_refused_by_file_field_and_value(fleetopt, plan_file, edit, says):
    path = plan_file(edit)
    assert_refused(fleetopt("evaluate", path, "--json"), str(path), *says)


@pytest.mark.parametrize(
    ("field", "value", "near"), [("gpu", "h1000", "h100"), ("llm", "llama-3-70b", "llama-3.1-70b")]
)
def test_an_unknown_name_in_a_plan_is_refused_with_the_nearest(fleetopt, plan_file, field, value, near):
    assert_refused(fleetopt("evaluate", plan_file(put("pools", 0, field, value))), field, value, near)


def test_an_unknown_name_in_a_plan_is_refused_with_its_file_and_field(fleetopt, plan_file):
    path = plan_file(put("pools", 1, "gpu", "h1000"))
    assert_refused(fleetopt("evaluate", path), str(path), "pools.1.gpu", "h1000", "h100")


def test_a_number_beyond_all_floats_is_refused(fleetopt, plan_file):
    assert_refused(fleetopt("optimize", "--window", 10**400), "--window")
    assert_refused(fleetopt("evaluate", plan_file(put("pools", 0, "n_instances", 10**400))), "pools.0.n_instances")


def test_a_workload_without_output_is_refused(fleetopt, tmp_path):
    path = tmp_path / "ones.json"
    path.write_text("[[1, 1.0]]")
    assert_refused(fleetopt("optimize", "--workload", path, "--rate", 1), str(path), "output")


def test_columns_named_where_there_are_none_are_refused(fleetopt):
    answer = fleetopt("trace", "azure-conv", "--prompt-column", "p", "--output-column", "o", "--json")
    assert_refused(answer, "--prompt-column", "azure-conv")


# ------------------------------------------------------------------------------------------------ files and signals


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(fleetopt, tmp_path, monkeypatch):
    path = tmp_path / "gpus.json"
    path.write_text("old")

    def fail(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    answer = fleetopt("catalog", "gpus", "--json", "--out", path)
    assert answer.code == BAD_INPUT
    assert f"--out {path}: cannot be written: No space left on device" in answer.err
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_a_written_file_replaces_the_old_one(fleetopt, tmp_path):
    path = tmp_path / "gpus.json"
    path.write_text("old " * 10_000)
    answer = fleetopt("catalog", "gpus", "--json", "--out", path)
    assert strict_json(path.read_text()) == answer.document


def test_what_is_no_plain_file_is_not_replaced_by_one(fleetopt, tmp_path):
    """Run by root, `--out /dev/null` would remove the device."""
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(target)
    fleetopt("catalog", "gpus", "--json", "--out", link)
    assert link.is_symlink()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # so that a writer need not wait for one
    try:
        fleetopt("catalog", "gpus", "--json", "--out", pipe)
        assert pipe.is_fifo()
    finally:
        os.close(reader)


def test_a_name_too_long_for_a_file_is_refused(fleetopt, tmp_path):
    assert_refused(fleetopt("catalog", "--out", tmp_path / ("x" * 300)), "--out", "name too long")


def test_an_interrupt_ends_quietly(fleetopt, monkeypatch):
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupted)
    answer = fleetopt("catalog", "--json")
    assert (answer.code, answer.out) == (INTERRUPTED, "")
    assert answer.err.count("\n") == 1


# --------------------------------------------------------------------------------------------- as a process of its own


def test_help_comes_without_loading_jax():
    ask = (
        "import sys\n"
        "from fleetopt_jax.cli.main import main\n"
        f"for command in {[[], *([command] for command in COMMANDS)]!r}:\n"
        "    try:\n"
        "        main([*command, '--help'])\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0\n"
        "sys.exit(sorted({'jax', 'numpy', 'pyarrow'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"usage: fleetopt {command}" in done.stdout for command in COMMANDS)


def test_a_process_shows_one_line_and_no_traceback(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(bytes(range(256)))
    assert_refused(in_a_process("trace", path, "--json"), str(path))


@pytest.mark.slow
def test_an_infeasible_process_exits_3(trace_file):
    answer = in_a_process(
        "optimize", "--workload", trace_file, "--ttft-p99-ms", "0.001", "--assume", "published", "--json"
    )
    assert answer.code == INFEASIBLE
    assert answer.document["status"] == "infeasible"
    assert answer.err.startswith("fleetopt optimize: infeasible: ")
    assert answer.err.count("\n") == 1


# ------------------------------------------------------------------------------------------------- what once went wrong


def test_names_are_shown_as_they_are_and_never_read_as_markup(fleetopt, tmp_path):
    path = tmp_path / "[bold]q[" / "z].csv"
    path.parent.mkdir()
    path.write_text("prompt_tokens,output_tokens\n10,5\n")
    shown = fleetopt("trace", path)
    assert shown.code == OK
    assert "[bold]q[" in shown.out


def test_a_control_character_is_refused_wherever_it_is_typed(fleetopt):
    assert_refused(fleetopt("trace", "e\x1b[31mz.csv"), "workload", "control characters")


@pytest.mark.parametrize("option", ["--scenario", "--out", "--figure", "--save-scenario", "--workload"])
def test_an_empty_text_is_not_taken_for_none(fleetopt, option):
    assert_refused(fleetopt("optimize", option, ""), option, "is empty")


def test_no_input_is_written_over(fleetopt, trace_file, tmp_path):
    mine, plan = tmp_path / "mine.csv", tmp_path / "plan.json"
    mine.write_bytes(trace_file.read_bytes())
    made = fleetopt("optimize", "--workload", mine, "--assume", "published", "--pools", "1", "--out", plan)
    assert made.code == OK
    before = mine.read_bytes(), plan.read_bytes()
    assert_refused(fleetopt("evaluate", plan, "--out", mine), "--out", "read as well")
    assert_refused(fleetopt("evaluate", plan, "--out", plan), "--out", "read as well")
    engine = tmp_path / "engine.json"
    engine.write_text("{}")
    assert_refused(fleetopt("optimize", "--gpu", f"h100,{engine}", "--out", engine), "--out", "read as well")
    assert (mine.read_bytes(), plan.read_bytes()) == before
    assert engine.read_text() == "{}"


def test_what_is_not_drawn_is_said(fleetopt, trace_file, tmp_path):
    ask = ("--workload", trace_file, "--assume", "published", "--pools", "1", "--gpus-of", "h100=8")
    answer = fleetopt("optimize", *ask, "--figure", tmp_path / "none.svg")
    assert answer.code == INFEASIBLE
    assert "no fleet holds its latencies with 8 H100; the smallest reachable is " in answer.err
    assert "none.svg: nothing to draw, not written" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fleetopt_jax.cli.main", "catalog", "gpus", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr.count("\n")) == (BAD_INPUT, 1)
    assert "stdout: cannot be written" in done.stderr


def test_a_name_no_terminal_can_show_is_still_shown(tmp_path):
    path = tmp_path / "caf\u00e9\u6f22.csv"
    path.write_text("prompt_tokens,output_tokens\n10,5\n")
    done = subprocess.run(
        [sys.executable, "-m", "fleetopt_jax.cli.main", "trace", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (OK, "")
