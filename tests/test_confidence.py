"""Plans that hold with a probability: the cheapest counts, common draws, what is asked and refused."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from fleetopt_jax._optimize.confidence import Confident, confident, confident_along
from fleetopt_jax._optimize.counts import cheapest_counts, rows_for, share_held
from fleetopt_jax._optimize.holding import as_they_stand, drawn, holding, plan_draws, pools_of
from fleetopt_jax._optimize.law_errors import LAW_ERRORS
from fleetopt_jax._optimize.plan import Infeasible, Plan, require_plan
from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.search import evaluate_given, optimize
from fleetopt_jax.cli.codes import BAD_INPUT, INFEASIBLE, OK
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.files import to_json
from fleetopt_jax.documents.confidence import confident_to_json, holding_to_json
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.fleet.assumptions import PUBLISHED
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.fleet.resources import make_budget
from fleetopt_jax.report.decision import decision


def brute_force(needed: np.ndarray, prices: np.ndarray, share: float) -> float:
    """The least cost of any counts that are enough in so many rows."""
    options = [np.unique(column[np.isfinite(column)]) for column in needed.T]
    enough = [n for n in itertools.product(*options) if share_held(needed, np.array(n)) >= share - 1e-12]
    return min((float(np.dot(prices, n)) for n in enough), default=np.inf)


@pytest.mark.parametrize("pools", [1, 2])
def test_counts_are_the_cheapest_there_are(pools):
    rng = np.random.default_rng(0)
    for _ in range(40):
        needed = rng.integers(1, 9, (24, pools)).astype(float)
        needed[rng.random((24, pools)) < 0.05] = np.inf
        prices, share = rng.uniform(1.0, 9.0, pools), float(rng.uniform(0.2, 0.95))
        n = cheapest_counts(needed, lambda k, x, p=prices: p[k] * x, share)
        cost = np.inf if n is None else float(np.dot(prices, n))
        assert cost == pytest.approx(brute_force(needed, prices, share))
        assert n is None or share_held(needed, n) >= share - 1e-12


def test_counts_of_more_pools_are_enough_and_no_pool_can_have_fewer():
    needed = np.random.default_rng(1).integers(1, 30, (200, 4)).astype(float)
    n = cheapest_counts(needed, lambda k, x: (k + 1.0) * x, 0.6)
    assert n is not None and share_held(needed, n) >= 0.6
    for k in range(4):
        assert share_held(needed, n - (np.arange(4) == k)) < 0.6
    assert rows_for(0.9, 10) == 9 and rows_for(0.9, 1024) == 922


@pytest.fixture(scope="module")
def nominal(h100, small_workload) -> Plan:
    problem = make_problem(small_workload, [h100], assume="published", assumptions=PUBLISHED)
    return require_plan(optimize(problem))


@pytest.fixture(scope="module")
def surer(nominal) -> Confident:
    found = confident(nominal, 0.8)
    assert isinstance(found, Confident)
    return found


def test_errors_are_common_random_numbers(h100, b200):
    """Of an engine by its name, whatever fleet it is in; of the laws by the pool's place."""
    first, again, beside = drawn(h100, 0), drawn(dataclasses.replace(h100, max_num_seqs=64), 0), drawn(h100, 1)
    np.testing.assert_array_equal(first.engine.step, again.engine.step)
    np.testing.assert_array_equal(first.engine.prefill, beside.engine.prefill)
    assert abs(np.corrcoef(np.log(first.ttft), np.log(beside.ttft))[0, 1]) < 0.1
    assert abs(np.corrcoef(np.log(first.engine.step), np.log(drawn(b200, 0).engine.step))[0, 1]) < 0.1
    assert np.std(np.log(first.ttft)) == pytest.approx(LAW_ERRORS.ttft_p99_s, rel=0.01)
    assert np.std(np.log(first.itl)) == pytest.approx(LAW_ERRORS.itl_s, rel=0.01)


def check_needed(plan: Plan) -> int:
    """That the first pool holds with what it needs and not with one less; in how many draws for more than the load."""
    pool = pools_of(plan.fleet, plan.specs, plan.problem)[0]
    errors = drawn(pool.spec, 0, 256)
    needed, of_load = pool.needed(errors), np.asarray(pool.judged(0.0, errors).n_instances)
    some = np.isfinite(needed)
    assert np.all(pool.judged(np.where(some, needed, 1.0), errors).worst[some] <= 1e-9)
    more = some & (needed > of_load)
    assert np.all(pool.judged(np.where(more, needed - 1, 1.0), errors).worst[more] > 1e-9)
    return int(more.sum())


@pytest.mark.slow
def test_a_pool_whose_first_tokens_wait_needs_more_than_its_load(h100, small_workload):
    problem = make_problem(small_workload, [h100], n_pools=1)
    assert check_needed(require_plan(optimize(problem))) > 0


def test_a_pool_holds_where_it_has_what_it_needs(nominal):
    check_needed(nominal)
    pool = pools_of(nominal.fleet, nominal.specs, nominal.problem)[0]
    assert pool.needed(as_they_stand(pool.spec))[0] <= float(nominal.fleet.n_instances[0])


def test_a_plan_holds_as_often_as_its_draws(nominal):
    found, draws = holding(nominal), plan_draws(nominal)
    assert found.probability == np.mean(draws.held) == holding(nominal).probability
    assert found.probability <= min(found.by_pool) and found.probability <= min(found.by_limit.values())
    more = evaluate_given(
        nominal.problem,
        nominal.specs,
        window_tokens=np.asarray(nominal.fleet.window_tokens).tolist(),
        gamma=np.asarray(nominal.fleet.gamma).tolist(),
        n_instances=(np.asarray(nominal.fleet.n_instances) + 3).tolist(),
    )
    assert holding(more).probability > found.probability
    assert np.all(plan_draws(more).held >= draws.held)
    assert holding(nominal, seed=1).probability == pytest.approx(found.probability, abs=0.05)


def test_a_confident_plan_holds_as_often_as_asked_and_wastes_no_instance(nominal, surer):
    assert surer.holding.probability >= 0.8 > surer.nominal_holding.probability
    assert surer.plan.binding is None and surer.plan.status == "feasible"
    assert surer.costs["n_gpus"] == float(surer.plan.metrics.n_gpus - nominal.metrics.n_gpus) > 0
    n = np.asarray(surer.plan.fleet.n_instances)
    for k in range(len(n)):
        fewer = surer.plan.fleet.with_instances(n - (np.arange(len(n)) == k))
        assert holding(dataclasses.replace(surer.plan, fleet=fewer)).probability < surer.holding.probability
    assert surer.plan.one_pool is not None and surer.plan.one_pool.power_w >= float(surer.plan.metrics.power_w)
    found = confident_along(nominal, [0.3, 0.9])
    costs = [each.plan.cost for each in found if isinstance(each, Confident)]
    assert len(costs) == 2 and costs == sorted(costs)


def test_what_is_said_of_a_confident_plan(nominal, surer):
    document = plan_to_json(surer.plan)
    document |= {"holds": holding_to_json(surer.holding), "confidence": confident_to_json(surer)}
    document = json.loads(to_json(document))
    rows = decision(document)
    assert rows["How sure"].startswith(f"It holds its limits with {100 * surer.holding.probability:.0f} % probability")
    assert f"{int(nominal.metrics.n_gpus):,} GPUs would hold" in rows["80 % confidence costs"]
    assert "holds with 80 % as well" in rows["It saves"] or "Nothing" in rows["It saves"]
    assert document["confidence"]["asked"] == 0.8
    assert document["holds"]["law_log_sigmas"]["ttft_p99_s"] == LAW_ERRORS.ttft_p99_s


def test_a_confidence_out_of_reach_says_what_is_within(nominal):
    """A budget the nominal plan spends to the last GPU, and limits no number of instances holds so often."""
    spent = dataclasses.replace(nominal.problem, budget=make_budget(max_gpus=float(nominal.metrics.n_gpus)))
    found = confident(require_plan(optimize(spent)), 0.9)
    assert isinstance(found, Infeasible) and found.binding.limit == "confidence"
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"need 0 < confidence <= 0\.99"):
            confident(nominal, wrong)


def refusal(capsys, *arguments: str) -> str:
    try:
        assert main(list(arguments)) == BAD_INPUT
    except SystemExit as stop:  # argparse's
        assert stop.code == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_the_door_refuses_confidences_that_make_no_sense(capsys):
    assert "a share from 1.0% to 99%" in refusal(capsys, "optimize", "--confidence", "1.5")
    assert "90x" in refusal(capsys, "optimize", "--confidence", "90x")
    assert "give one" in refusal(capsys, "optimize", "--confidence", "0.9", "--robust", "cvar")
    assert "need --axis" in refusal(capsys, "pareto", "--confidence", "90%")
    assert "confidence: '1.2' is not allowed" in refusal(capsys, "pareto", "--axis", "confidence=0.5,1.2")


@pytest.mark.slow
def test_the_commands_plan_for_a_confidence(capsys, tmp_path):
    about = ("--workload", "azure-cdf", "--rate", "100", "--assume", "published")
    plan, front, csv = (str(tmp_path / name) for name in ("plan.json", "front.svg", "front.csv"))
    assert main(["optimize", *about, "--confidence", "80%", "--out", plan]) == OK
    assert "80 % confidence costs" in capsys.readouterr().out
    assert main(["evaluate", plan, "--json"]) == OK
    written = json.loads(Path(plan).read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out)["holds"] == written["holds"]
    assert written["holds"]["probability"] >= 0.8
    assert main(["pareto", *about, "--axis", "confidence", "--figure", front, "--csv", csv, "--json"]) == OK
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["value"] for row in rows] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert all(row["plan"]["holds"]["probability"] >= row["value"] for row in rows)
    watts = [row["plan"]["metrics"]["power_w"] for row in rows]
    assert watts == sorted(watts)
    tight = [*about, "--ttft-p99-ms", "60", "--confidence", "0.99"]
    assert main(["optimize", *tight]) in (OK, INFEASIBLE)


@pytest.mark.nightly
def test_limits_of_all_requests_together_are_sized_along_slowness(h100, small_workload):
    slo = make_slo(ttft_p99_s=0.5, scope="fleet")
    problem = make_problem(small_workload, [h100], slo=slo)
    plan = require_plan(optimize(problem))
    found = confident(plan, 0.7)
    assert isinstance(found, Confident) and found.holding.probability >= 0.7
