"""`fleetopt simulate` and `optimize --verify`: the contract's JSON, honest verdicts, bad input at the door."""

import json

import numpy as np
import pytest

from fleetopt_jax.cli.codes import BAD_INPUT, INFEASIBLE, OK
from fleetopt_jax.cli.main import main
from fleetopt_jax.report.simulation import TOLERANCE, TOLERANCE_ELSE

NAMES = {"tok_per_j", "power_w", "n_active", "ttft_p99_s", "itl_s", "slo_attainment"}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """2,000 requests with time stamps, about 10 a second, prompts and outputs of one magnitude."""
    rng = np.random.default_rng(1)
    stamps = np.cumsum(rng.exponential(0.1, 2000))
    rows = zip(stamps, rng.integers(100, 900, 2000), rng.integers(10, 60, 2000))
    path = tmp_path_factory.mktemp("simulate") / "trace.csv"
    path.write_text("timestamp_s,prompt_tokens,output_tokens\n" + "".join(f"{t:.4f},{p},{o}\n" for t, p, o in rows))
    return path


@pytest.fixture(scope="module")
def plan(trace):
    path = trace.with_name("plan.json")
    assert main(["optimize", "--workload", str(trace), "--pools", "1", "--out", str(path), "--json"]) == OK
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_simulate_prints_the_contract(plan, capsys):
    code, out, err = run(capsys, "simulate", plan, "--requests", 1500, "--replications", 3, "--json")
    assert code == OK and err.count("\n") == 1 and ": read " in err
    document = json.loads(out)
    assert set(document["metrics"]) >= NAMES
    assert document["n_arrivals"] == 3 * 1500
    assert document["n_arrivals"] == document["n_completed"] + document["n_rejected"] + document["n_in_system"]
    for name, each in document["metrics"].items():
        assert set(each) == {"analytic", "simulated", "ci95", "agrees", "reading", "suffices_replications"}
        low, high = each["ci95"]
        assert low <= each["simulated"] <= high, name
        if each["agrees"] is False:
            off = abs(each["analytic"] - each["simulated"])
            assert off > TOLERANCE.get(name, TOLERANCE_ELSE) * abs(each["simulated"])
    again = run(capsys, "simulate", plan, "--requests", 1500, "--replications", 3, "--json")[1]
    assert again == out  # same seed, same bytes
    other = run(capsys, "simulate", plan, "--requests", 1500, "--replications", 3, "--seed", 1, "--json")[1]
    assert other != out


@pytest.mark.slow
def test_a_trace_is_replayed_at_its_own_stamps(plan, capsys):
    code, out, _ = run(capsys, "simulate", plan, "--arrivals", "trace", "--replications", 1, "--json")
    document = json.loads(out)
    assert code == OK
    assert document["n_arrivals"] == 2000
    assert document["metrics"]["tok_per_j"]["ci95"] == [None, None]  # one replication has no interval


@pytest.mark.slow
def test_overload_is_shown_and_not_met(plan, capsys):
    document = json.loads(plan.read_text())
    needed = sum(pool["n_instances"] for pool in document["pools"])
    slow = plan.with_name("overload.json")
    document["workload"]["arrival_rate_per_s"] *= 30.0
    slow.write_text(json.dumps(document))
    code, out, err = run(capsys, "simulate", slow, "--requests", 1500, "--replications", 2)
    assert code == INFEASIBLE
    assert "does not hold the limits" in err
    assert "The limits do not hold" in out
    assert needed >= 1


@pytest.mark.slow
def test_verify_reports_what_it_found(trace, capsys):
    arguments = ("optimize", "--workload", trace, "--pools", 1, "--verify", "--requests", 1500, "--replications", 2)
    code, out, _ = run(capsys, *arguments, "--json")
    document = json.loads(out)
    assert code == OK
    assert document["verified"]["held"]
    assert document["verified"]["instances_added"] >= 0
    assert set(document["verified"]["metrics"]) >= NAMES


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--requests", "0"),
        ("--replications", "0"),
        ("--seed", "-1"),
        ("--dispatch", "fastest"),
        ("--staleness-ms", "-5"),
        ("--staleness-ms", "nan"),
        ("--arrivals", "trace", "--workload", "azure-conv", "--rate", "10"),
    ],
)
def test_bad_options_stop_at_the_door(plan, capsys, arguments):
    code, out, err = run(capsys, "simulate", plan, *arguments)
    assert (code, out) == (BAD_INPUT, "")
    assert len(err.strip().splitlines()) == 1
