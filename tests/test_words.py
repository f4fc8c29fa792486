"""What the command says: what is saved, what limits, what is in doubt, what was perhaps meant; on any width."""

import argparse
import dataclasses
import json
import math
from typing import Any

import jax
import pytest

from fleetopt_jax._optimize.plan import Infeasible, Search, Unreachable
from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.remedies import remedies
from fleetopt_jax._optimize.search import evaluate_given
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.cli import backend
from fleetopt_jax.cli.answer import Answer, deliver
from fleetopt_jax.cli.codes import BAD_INPUT, INFEASIBLE
from fleetopt_jax.cli.main import main
from fleetopt_jax.cli.terminal import warn
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.plan_file import beside_plan, seen_from_plan
from fleetopt_jax.fleet.assumptions import PHYSICAL, choice_names
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.laws.ttft import ttft_tail
from fleetopt_jax.report.decision import decision
from fleetopt_jax.report.simulation import bursts_said, limits_lines, missed
from fleetopt_jax.report.tables import _window_of, new_table, plan_table, show
from fleetopt_jax.report.words import certificate, choices_said, margin, ms, percent, ttft_limit_rows

POOL = {
    "window_tokens": 14096,
    "gpu": "h100",
    "llm": "llama-3.1-70b",
    "tp": 8,
    "precision": "bf16",
    "kv_precision": "bf16",
    "engine_file": None,
    "engine_quality": "law",
    "engine_step_error": 0.16,
    "engine_power_error": 0.13,
    "engine_prefill_error": 0.4,
    "n_instances": 40,
    "n_gpus": 320,
    "max_num_seqs": 700,
    "max_num_seqs_by": "kv_cache",
    "max_num_seqs_asked": None,
    "clock_frac": 1.0,
    "gamma": 1.0,
    "traffic_frac": 1.0,
    "utilization": 0.6,
    "n_active": 200.0,
    "prefill_frac": 0.3,
    "gpu_power_w": 590.0,
    "power_w": 200e3,
    "tok_per_j": 0.5,
    "ttft_p99_s": 0.3,
    "itl_s": 0.05,
    "itl_p99_s": 0.1,
}
ONE_POOL = {"gpu": "h100", "tp": 8, "n_instances": 50, "n_gpus": 400, "power_w": 250e3, "usd_per_h": 1600.0}
ONE_POOL |= {"kg_co2_per_h": 0.0, "tok_per_j": 0.4}


def plan_of(*pools: dict[str, Any], metrics: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A plan document of pools that differ from `POOL`."""
    made = [POOL | {"window_tokens": 1000 * (k + 1)} | pool for k, pool in enumerate(pools or ({},))]
    plan = {
        "status": "optimal",
        "assume": "physical",
        "power_scope": "instance",
        "output_share": 0.2,
        "assumptions": choice_names(PHYSICAL),
        "method": "exact",
        "slo": {"ttft_p99_s": 0.5, "ttft_s_per_token": 0.0, "itl_s": None, "max_utilization": 0.85, "scope": "pool"},
        "budget": {},
        "workload": {"name": "mine", "arrival_rate_per_s": 1000.0, "at": "mean", "hour": None},
        "objective": "tok_per_j",
        "site": {"host_w_per_gpu": 0.0, "pue": 1.0, "usd_per_kwh": 0.0, "kg_co2_per_kwh": 0.0},
        "pools": made,
        "metrics": {
            "tok_per_j": 0.5,
            "output_tok_per_s": 1e5,
            "power_w": 200e3,
            "n_instances": 40,
            "n_gpus": 320,
            "usd_per_h": 1288.0,
            "ttft_p99_s": 0.3,
            "itl_s": 0.05,
            "gain_vs_homogeneous": 1.25,
        }
        | (metrics or {}),
        "one_pool": ONE_POOL,
        "search": {"n_evaluated": 10, "wall_s": 1.0, "candidates": "some", "gap": 0.0, "by_pools": [0.4, 0.5]},
    }
    return plan | more


# --- what is saved ----------------------------------------------------------------------------------------------------


def saves(**more: Any) -> str:
    return decision(plan_of({}, {}, **more))["It saves"]


def test_what_is_saved_is_a_number_with_what_it_is_compared_with():
    said = saves()
    for text in ("20 % of the energy", "1.25x the tokens per joule", "200 kW instead of 250 kW", "50 x 8 H100"):
        assert text in said
    assert "$312 an hour ($1,288 instead of $1,600)" in said and "80 GPUs (320 instead of 400)" in said


@pytest.mark.parametrize(("field", "more"), [("usd_per_h", 1700.0), ("n_gpus", 408)])
def test_what_costs_more_is_never_praised(field, more):
    said = saves(metrics={field: more})
    saved, lost = said.split("; but it ")
    word = {"usd_per_h": "an hour", "n_gpus": "GPUs"}[field]
    assert word not in saved and f"{word} more" in lost
    said = saves(metrics={"tok_per_j": 0.3, "power_w": 333e3, "usd_per_h": 1700.0, "n_gpus": 408})
    assert said.startswith("Nothing") and "0.75x the tokens per joule" in said and "One pool would do better" in said


def test_nothing_is_saved_by_a_fleet_that_does_not_hold_its_limits_or_is_the_one_compared_with():
    broken = {"limit": "utilization", "asked": 0.85, "value": 1.2}
    assert "It saves" not in decision(plan_of(binding=broken, status="infeasible", method="given"))
    same = {name: ONE_POOL[name] for name in ("tok_per_j", "power_w", "usd_per_h", "n_gpus")}
    assert decision(plan_of(metrics=same | {"gain_vs_homogeneous": 1.0}))["It saves"].startswith("Nothing: this is the")
    assert "does not pay" in saves(metrics=same | {"gain_vs_homogeneous": 1.0})


def test_the_plan_is_compared_by_its_own_objective_first():
    said = saves(objective="usd", metrics={"gain_vs_homogeneous": 0.9})
    assert said.startswith("$312 an hour") and "the cheapest one-pool fleet" in said
    assert "0.90x of the most, for this seeks the least cost" in said
    assert "which breaks the budget" in saves(budget={"max_gpus": 390.0})


# --- what limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "more", "said"),
    [
        ({"utilization": 0.85}, {}, "Pool 1 carries all the load it may (85 %); full is the GPUs' time"),
        ({"utilization": 0.85, "n_active": 590.0}, {}, "full is the batch: the KV cache allows 700 sequences"),
        (
            {"utilization": 0.85, "n_active": 590.0, "max_num_seqs_by": "max_num_seqs"},
            {},
            "full is the batch: max_num_seqs allows 700",
        ),
        ({"utilization": 0.7, "n_instances": 4}, {}, "Whole instances: pool 1 runs at 70 % load"),
        ({"ttft_p99_s": 0.499}, {}, "The P99 TTFT of pool 1, 499 ms, at the limit of 500 ms"),
        ({"ttft_p99_s": 0.45}, {}, "The P99 TTFT of pool 1, 450 ms, 10.0 % under the limit of 500 ms"),
        ({"n_instances": 1}, {}, "Pool 1 is one instance, the least there is"),
        (
            {},
            {"method": "given"},
            "None of its limits is near at this traffic: the pool runs at 60 % load, where 85 % is allowed",
        ),
        (
            {"utilization": 0.85, "ttft_p99_s": 0.48},
            {},
            "next is the P99 TTFT of pool 1, 480 ms, 4.0 % under the limit",
        ),
    ],
)
def test_what_limits_is_what_one_instance_fewer_would_break(pool, more, said):
    assert said in decision(plan_of(pool, **more))["What limits it"]


def test_a_fleet_that_fails_is_not_to_be_bought():
    broken = {"limit": "utilization", "asked": 0.85, "value": 1.2}
    failing = decision(plan_of(binding=broken, status="infeasible", method="given"))
    assert "Buy" not in failing and "This fleet" in failing and "Buy" in decision(plan_of())
    given = saves(method="given", metrics={"tok_per_j": 0.3, "power_w": 333e3, "usd_per_h": 1700.0, "n_gpus": 408})
    assert "one-pool fleet (50 x 8 H100) sized for this traffic" in given
    assert given.endswith("This fleet is as it was given: fleetopt optimize sizes one for this traffic.")


def test_prices_of_ones_own_are_said():
    assert "at your prices (H100 $2.10 a GPU hour)" in decision(plan_of({"usd_per_gpu_h": 2.1}))["Buy"]
    assert "your prices" not in decision(plan_of({"usd_per_gpu_h": GPUS["h100"].usd_per_h}))["Buy"]


def test_a_ttft_limit_that_grows_is_said_for_each_pool():
    plan = plan_of({"mean_prompt_tokens": 2000.0, "window_tokens": 8000})
    assert ttft_limit_rows(plan) == []
    plan["slo"] = plan["slo"] | {"ttft_p99_s": 0.5, "ttft_s_per_token": 1e-4}
    (_, prompts), (_, there), (_, most) = ttft_limit_rows(plan)
    assert (prompts, there, most) == (["2,000 tokens"], ["700 ms"], ["1,300 ms"])
    assert ms(math.inf) == "unbounded"


def test_a_growing_limit_is_judged_request_by_request():
    plan = plan_of({"mean_prompt_tokens": 2000.0, "ttft_within_frac": 0.9912, "ttft_p99_s": 1.5})
    plan["slo"] = plan["slo"] | {"ttft_s_per_token": 2e-5}
    assert ttft_limit_rows(plan)[-1] == ("within TTFT limit", ["99.12 %"])
    binding = {"limit": "ttft_p99_s", "asked": 0.5, "value": 1.546}
    said = decision(plan | {"binding": binding, "status": "infeasible"})["It fails"]
    assert "P99 TTFT is 1,546 ms; asked is 500 ms + 20 ms per 1,000 prompt tokens" in said
    assert "prompt tokens" not in decision(plan_of(binding=binding, status="infeasible"))["It fails"]


@pytest.mark.slow  # to evaluate a fleet compiles
def test_the_share_within_a_growing_limit_is_the_laws_tail(h100, small_workload):
    problem = make_problem(small_workload, [h100], n_pools=1, slo=make_slo(ttft_p99_s=0.3, ttft_s_per_token=1e-4))
    window, n = [problem.window_tokens], [21]
    plan = evaluate_given(problem, problem.specs, window_tokens=window, gamma=[1.0], n_instances=n)
    (pool,) = plan_to_json(plan)["pools"]
    law = jax.tree.map(lambda x: x[0], plan.metrics.pools.ttft)
    assert 0 < pool["ttft_within_frac"] < 1
    assert pool["ttft_within_frac"] == pytest.approx(1.0 - float(ttft_tail(law, 0.3, 1e-4)))
    steady = dataclasses.replace(problem, services=(dataclasses.replace(problem.service, slo=make_slo()),))
    assert "ttft_within_frac" not in plan_to_json(dataclasses.replace(plan, problem=steady))["pools"][0]


def test_the_price_and_the_engines_that_lost_are_said():
    pools = {"gpu": "b200", "usd_per_gpu_h": GPUS["b200"].usd_per_h}
    plan = plan_of(pools, {"usd_per_gpu_h": GPUS["h100"].usd_per_h})
    said = decision(plan)["Buy"]
    assert (
        f"an hour at ${GPUS['b200'].usd_per_h:.2f} a B200 hour and ${GPUS['h100'].usd_per_h:.2f} an H100 hour" in said
    )
    assert "engines" not in said
    one = plan_of() | {"search": plan["search"] | {"n_engines": 3}}
    assert "bf16, the best of 3 engines;" in decision(one)["Buy"]
    assert "2 of 3 engines" in decision(plan | {"search": plan["search"] | {"n_engines": 3}})["Buy"]


def test_what_costs_more_costs():
    assert "; but it costs $100 an hour more ($1,700" in saves(metrics={"usd_per_h": 1700.0})
    assert "; but it takes 8 GPUs more (408" in saves(metrics={"n_gpus": 408})


def test_a_trace_says_its_longest_request_and_the_window_of_a_plan():
    assert _window_of(61_252) == ", 61,264 in whole blocks of 16" and _window_of(61_264) == ""


def simulated(*limits: dict[str, Any], n_replications: int = 4, warmed_up: bool = True) -> dict[str, Any]:
    said = {"pool": 2, "limit": "ttft_p99_s", "allowed": 0.99, "suffices_replications": None}
    return {
        "slo": {"ttft_p99_s": 0.5, "ttft_s_per_token": 2e-5},
        "limits": [said | each for each in limits],
        "n_rejected": 2,
        "n_arrivals": 10_000 * n_replications,
        "n_replications": n_replications,
        "warmed_up": warmed_up,
        "enough_requests": 12_345,
        "metrics": {},
    }


def test_a_simulation_says_first_which_pool_misses_what_and_then_what_is_unclear():
    late = {"simulated": 0.957, "ci95": [0.95, 0.962], "reading": "fails"}
    slow = {"pool": 1, "limit": "itl_s", "allowed": 0.08, "simulated": 0.09, "ci95": [0.088, 0.092], "reading": "fails"}
    lost = {"pool": None, "limit": "rejected_frac", "simulated": 0.1, "ci95": [0.1, 0.1], "reading": "fails"}
    unclear = {"pool": None, "simulated": 0.991, "ci95": [0.985, 0.995], "reading": "unclear"}
    said = limits_lines(simulated(late, slow, lost, unclear | {"suffices_replications": 9}))
    assert said == [
        "The limits do not hold in simulation: pool 2 answers 95.70 % (95.00 % to 96.20 %) of its requests within the "
        "TTFT of 500 ms + 20 ms per 1,000 prompt tokens, 99 % must be; pool 1 has a mean ITL of 90 ms (88 ms to 92 "
        "ms), 12.5 % over the limit of 80 ms; 2 of 40,000 requests fit no pool.",
        "Too noisy to tell whether the limits hold in simulation: the fleet answers 99.10 % (98.50 % to 99.50 %) of "
        "its requests within the TTFT of 500 ms + 20 ms per 1,000 prompt tokens, 99 % must be; about 9 replications "
        "would tell: --replications 9.",
    ]
    assert missed(simulated(late | {"simulated": 0.98999, "ci95": [0.98, 0.98999]})).startswith(
        "pool 2 answers 98.99 %"
    )
    many = limits_lines(simulated(unclear | {"suffices_replications": 640}))[0]
    assert many.endswith("about 640 replications would tell: --replications 64 --requests 100000.")
    (once,) = limits_lines(simulated(unclear | {"ci95": [None, None]}, n_replications=1))
    assert "the fleet answers 99.10 % of its" in once and once.endswith("no interval: --replications 4.")
    (short,) = limits_lines(simulated(unclear, warmed_up=False))
    assert short.startswith("Too short to tell") and "--requests 13000 would last" in short
    assert limits_lines(simulated()) == ["The limits hold in simulation."]


def test_bursts_are_told_from_noise():
    found = {"gap_scv": 13.2, "trace_ttft_p99_s": {"simulated": 0.8}, "poisson_ttft_p99_s": {"simulated": 0.4}}
    document = simulated() | {"metrics": {"ttft_p99_s": {"analytic": 0.6}}}

    def said(ratio: float | None, low: float | None, high: float | None) -> str:
        return bursts_said(document | {"burstiness": found | {"ratio": {"simulated": ratio, "ci95": [low, high]}}})

    assert said(2.0, 1.5, 2.7) == (
        "Bursts: P99 TTFT is 800 ms at the trace's own time stamps (squared CV of the gaps 13.2) and 400 ms where the "
        "same requests arrive as a Poisson process of the same rate: they lengthen it to 2.00 times (1.50 to 2.70); "
        "the laws say 600 ms."
    )
    assert "too noisy to tell whether bursts matter" in said(1.2, 0.9, 1.6)
    assert "they shorten it to 0.50 times" in said(0.5, 0.4, 0.6)
    assert said(None, None, None).endswith("of the same rate; the laws say 600 ms.")


def test_the_certificate_says_what_fewer_pools_reach():
    plan = plan_of()
    plan["search"] = plan["search"] | {"by_pools": [0.6563, 0.6565, None]}
    assert "the best have 0.6563 tok/J with one pool, 0.6565 with at most 2 and none with at most 3" in certificate(
        plan
    )


def test_a_simulation_that_asked_for_more_has_the_last_word():
    metrics = {"ttft_p99_s": {"simulated": 0.4}, "itl_s": {"simulated": 0.05}}
    verified = {"held": True, "instances_added": 3, "metrics": metrics}
    said = decision(plan_of({"utilization": 0.85}, verified=verified))["What limits it"]
    assert "3 instances more than the laws ask for" in said and "400 ms, 20.0 % under the limit" in said
    assert (
        "carries all"
        in decision(plan_of({"utilization": 0.85}, verified=verified | {"instances_added": 0}))["What limits it"]
    )
    fewer = verified | {"instances_added": -2}
    assert "2 instances fewer than the laws ask for" in decision(plan_of({}, verified=fewer))["What limits it"]
    moved = {"laws": {"window_tokens": [1], "n_instances": [9]}, "pools": [{"window_tokens": 2, "n_instances": 8}]}
    said = decision(plan_of({"utilization": 0.85}, verified=verified | moved))["What limits it"]
    assert "these 8 instances, where the laws ask for 1 pool of 9 instances together" in said


# --- how sure ---------------------------------------------------------------------------------------------------------


def test_the_largest_doubt_is_said_with_its_share_of_the_time():
    said = decision(plan_of({"prefill_frac": 0.57, "engine_step_error": 0.04, "engine_power_error": 0.05}))["How sure"]
    assert "The largest doubt is prefill: +-40 %, and it takes 57 % of the time; power +-5 %" in said
    said = decision(plan_of({"prefill_frac": 0.02}))["How sure"]
    assert "The largest doubt is the decode step: +-16 %" in said
    assert (
        "Nobody has stated"
        in decision(plan_of({"engine_step_error": None, "engine_power_error": None, "engine_prefill_error": None}))[
            "How sure"
        ]
    )


def test_engines_go_by_what_they_go_by():
    kinds = {"measured": "this very configuration", "law": "a law fitted", "projected": "another GPU"}
    for quality, text in kinds.items():
        assert any(text in each for each in choices_said(plan_of({"engine_quality": quality})))
    mine = {"engine_file": "mine.json", "engine_quality": "measured", "engine_of_catalog": ["prefill", "KV cache"]}
    (said,) = (each for each in choices_said(plan_of({}, mine)) if "engines go by" in each)
    assert "pool 1 by a law" in said and "not calibrated, the catalog's: prefill and KV cache" in said


def test_one_word_for_one_figure():
    assert (ms(None), percent(0.187, 1), percent(None)) == ("unbounded", "18.7 %", "overload")
    assert [margin(x, 1.0) for x in (0.813, 1.05, 0.999, None)] == [
        "18.7 % under the limit",
        "5.0 % over the limit",
        "at the limit",
        "unbounded, over the limit",
    ]
    assert margin(0.1, None) == "no limit"


def test_warnings_stand_in_the_answer_and_after_it(capsys):
    plan = plan_of()
    options = argparse.Namespace(command="optimize", out=None, json=False, quiet=False, warned=[])
    for _ in range(2):
        warn(options, "azure-conv has other requests")
    deliver(options, Answer(plan, plan_table, 0))
    assert decision(plan | {"warnings": options.warned})["Beware"] == "azure-conv has other requests."
    assert capsys.readouterr().out.count("azure-conv has other requests") == 1
    deliver(argparse.Namespace(**{**vars(options), "json": True}), Answer(plan, plan_table, 0))
    assert json.loads(capsys.readouterr().out)["warnings"] == ["azure-conv has other requests"]


# --- any width --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_table_loses_a_letter_on_a_narrow_screen(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    cells = [
        [f"row-{i}-of-many", *(f"{1000 * i + j}.25 kW" for j in range(9)), "law fitted elsewhere"] for i in range(3)
    ]
    table = new_table("Name", *(f"Column {j}" for j in range(9)), "Quality", title="What there is")
    for row in cells:
        table.add_row(*row)
    show(table)
    show(plan_table(plan_of(*[{}] * 6)))
    out = capsys.readouterr().out
    assert "…" not in out and max(map(len, out.splitlines())) <= width
    for row in cells:
        assert all(cell in out for cell in row[:-1])
    for word in ("requests", "P99 ITL", "300 ms", "What limits it", *(f"Column {j}" for j in range(9))):
        assert word in " ".join(out.split())


# --- what was meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("optimise", "unknown command 'optimise'; did you mean optimize?"),
        ("optimize --objectve usd", "fleetopt optimize: unknown option --objectve; did you mean --objective?"),
        ("optimize --objective gpu", "invalid choice: 'gpu'; did you mean gpus? need tok_per_j, usd"),
        ("optimize --free clok", "invalid choice: 'clok'; did you mean clock?"),
        ("catalog workload", "did you mean workloads?"),
        ("pareto --axis rate-of-work=1,2", "invalid choice: 'rate-of-work'"),
        ("evaluate plan.json --pools 3", "unknown option --pools; it is of optimize, services, pareto"),
        ("optimize trace.csv", "unexpected 'trace.csv'"),
        ("trace azure-cnv", "unknown name 'azure-cnv'; did you mean azure-conv"),
    ],
)
def test_a_slip_is_answered_with_what_was_perhaps_meant(line, said, capsys):
    try:
        code = main(line.split())
    except SystemExit as error:
        code = error.code
    done = capsys.readouterr()
    assert (code, done.out, done.err.count("\n")) == (BAD_INPUT, "", 1)
    assert said in done.err


# --- files ------------------------------------------------------------------------------------------------------------


def test_an_infeasible_run_leaves_a_good_plan_alone(tmp_path, capsys):
    path, bad = tmp_path / "plan.json", {"schema": "fleetopt-plan/1", "status": "infeasible", "n": 1}
    options = argparse.Namespace(command="optimize", out=str(path), json=True, quiet=False, warned=[])
    deliver(options, Answer(bad, plan_table, INFEASIBLE))
    assert json.loads(path.read_text())["n"] == 1  # there was nothing
    deliver(options, Answer(bad | {"n": 2}, plan_table, INFEASIBLE))
    assert json.loads(path.read_text())["n"] == 2  # no better
    assert capsys.readouterr().err == ""
    for good in ('{"schema": "fleetopt-plan/1", "status": "optimal"}', "notes of mine"):
        path.write_text(good)
        deliver(options, Answer(bad, plan_table, INFEASIBLE))
        assert path.read_text() == good
        assert "stays" in capsys.readouterr().err
    deliver(options, Answer(bad | {"status": "optimal"}, plan_table, 0))
    assert json.loads(path.read_text())["status"] == "optimal"


def test_a_workload_is_found_from_the_plan_wherever_both_are_moved(tmp_path, monkeypatch):
    for name in ("here/data/t.csv", "here/plans/plan.json", "there/data/t.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path / "here")
    assert seen_from_plan("data/t.csv", "plans/plan.json") == "../data/t.csv"
    assert seen_from_plan("azure-conv", "plans/plan.json") is None
    assert beside_plan("data/t.csv", "plans/plan.json", "../data/t.csv") == "data/t.csv"
    assert beside_plan("data/t.csv", "plans/plan.json") == "data/t.csv"  # of an older plan: from the current folder
    monkeypatch.chdir(tmp_path / "there")
    assert beside_plan("data/t.csv", "../here/plans/plan.json", "../data/t.csv") == "../here/data/t.csv"
    assert beside_plan("data/t.csv", "../here/plan.json") == "../here/data/t.csv"
    absolute = str(tmp_path / "here/data/t.csv")
    assert beside_plan(absolute, "plan.json") == absolute and seen_from_plan(absolute, "plan.json") is None


def test_an_unusable_cache_folder_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEETOPT_CACHE", str(tmp_path / "file" / "below"))
    folder, why_not = backend._cache()
    assert (
        folder is None and f"{tmp_path / 'file' / 'below'} cannot be written" in why_not and "FLEETOPT_CACHE" in why_not
    )
    for usable in ("off", str(tmp_path)):
        monkeypatch.setenv("FLEETOPT_CACHE", usable)
        assert backend._cache()[1] == ""


# --- what would help --------------------------------------------------------------------------------------------------


def infeasible(problem, limit: str) -> Infeasible:
    return Infeasible("exact", problem, Search(1, 0.0, "none"), Unreachable(limit, 0.0, None))


def test_a_window_is_held_by_the_least_tp_that_holds_it(small_workload):
    problem = make_problem(small_workload, [EngineSpec("h100", tp=4)], window_tokens=500_000)
    assert [(each.field, each.value) for each in remedies(infeasible(problem, "window_tokens"))] == [("tp", 8)]
    assert remedies(infeasible(problem, "max_gpus")) == []


@pytest.mark.slow
def test_what_would_help_does(small_workload):
    """A TTFT limit below the prefill of the longest prompt: one that grows with prompts can be held. Of an ITL no limit
    that grows with the prompt is a help."""
    spec = EngineSpec("h100", tp=4)
    of_ttft = remedies(infeasible(make_problem(small_workload, [spec], slo=make_slo(ttft_p99_s=0.1)), "ttft_p99_s"))
    assert "ttft_s_per_token" in [each.field for each in of_ttft]
    tight = make_problem(small_workload, [spec], slo=make_slo(ttft_p99_s=60.0, itl_s=0.016))
    assert "ttft_s_per_token" not in [each.field for each in remedies(infeasible(tight, "itl_s"))]
