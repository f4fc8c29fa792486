"""What a plan that fails is said to break, pool by pool, and the instances that mend it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.problem import Problem, make_problem
from fleetopt_jax._optimize.repair import broken_limits, repair
from fleetopt_jax._optimize.search import evaluate_given, with_fleet
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.documents.plan import load_plan, plan_to_json, save_plan
from fleetopt_jax.documents.repair import repair_to_json, repaired_to_json
from fleetopt_jax.fleet.assumptions import PUBLISHED
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.fleet.resources import make_budget
from fleetopt_jax.report.decision import decision
from fleetopt_jax.report.verdict import change_said, failing_said, repair_said
from fleetopt_jax.workload.atoms import with_rate

SPLIT = 2048.0


@pytest.fixture(scope="module")
def problem(small_workload, h100) -> Problem:
    """Two pools, by laws that compile quickly."""
    return make_problem(with_rate(small_workload, 1000.0), [h100], assume="published", assumptions=PUBLISHED)


@pytest.fixture(scope="module")
def least(problem) -> list[float]:
    """The instances that two pools need: what repairs one of each."""
    after = repair(given(problem, [1.0, 1.0])).after
    assert after is not None and after.binding is None
    return np.asarray(after.fleet.n_instances).tolist()


def given(problem: Problem, n_instances: list[float]) -> Plan:
    windows = [SPLIT, problem.window_tokens]
    how = {"window_tokens": windows, "gamma": [1.0, 1.0], "n_instances": n_instances}
    return evaluate_given(problem, problem.specs * 2, **how)


def added(found) -> list[float]:
    assert found.instances_added is not None
    return found.instances_added.tolist()


def without_one(plan: Plan, k: int) -> Plan:
    """The plan with one instance fewer in the k-th pool."""
    fewer = np.asarray(plan.fleet.n_instances) - (np.arange(len(plan.specs)) == k)
    return with_fleet(plan, plan.fleet.with_instances(fewer))


def document_of(plan: Plan) -> dict[str, Any]:
    return plan_to_json(plan) | {"repair": repair_to_json(repair(plan))}


def test_what_is_added_is_the_least_that_holds(problem, least):
    after = given(problem, least)
    assert after.binding is None and min(least) > 1
    assert all(without_one(after, k).binding is not None for k in range(2))


@pytest.mark.parametrize("short", [(0,), (1,), (0, 1)])
def test_an_overloaded_pool_is_named_with_its_load_and_what_mends_it(problem, least, short):
    n = [1.0 if k in short else least[k] for k in range(2)]
    plan = given(problem, n)
    assert {each.pool for each in broken_limits(plan)} == set(short)
    found = repair(plan)
    assert added(found) == [least[k] - n[k] for k in range(2)]
    document = document_of(plan)
    said = failing_said(document)
    for k in short:
        load = document["pools"][k]["utilization"]
        assert load > 1 and f"pool {k + 1} is asked for {load:,.2f} times what its one instance can serve" in said
        assert f"{least[k] - 1:,.0f} instance" in repair_said(document) or f"{least[k] - 1:,.0f} to" in repair_said(
            document
        )
    assert "TTFT" not in said and "inf" not in said


def test_a_failing_plan_is_led_by_its_verdict_and_praised_for_nothing(problem, least):
    rows = decision(document_of(given(problem, [1.0, least[1]])))
    assert list(rows)[:3] == ["It fails", "Repair", "This fleet"]
    assert not {"Buy", "It saves", "What limits it"} & set(rows)
    text = " ".join(rows.values())
    assert "tokens per joule" not in text and "inf" not in text.replace("infeasible", "")
    gpus = 8 * (least[0] - 1)
    assert f"{gpus:,.0f} GPUs" in rows["Repair"] and "--repair" in rows["Repair"]


def test_pools_that_hold_keep_what_they_have(problem, least):
    found = repair(given(problem, [least[0] + 5, least[1] - 1]))
    assert added(found) == [0.0, 1.0]
    assert repair(given(problem, least)).instances_added is not None  # nothing to mend
    assert added(repair(given(problem, least))) == [0.0, 0.0]


def test_a_latency_without_overload_is_said_and_mended_or_said_to_be_out_of_reach(problem):
    """At 97 % load requests wait; what they take by themselves no number of instances mends."""
    loose = problem.serving(slo=make_slo(ttft_p99_s=1e3, max_utilization=0.97))
    full = repair(given(loose, [1.0, 1.0])).after
    assert full is not None
    many = with_fleet(full, full.fleet.with_instances(10 * np.asarray(full.fleet.n_instances)))
    ttft_s, floor_s = (np.asarray(plan.metrics.pools.ttft_p99_s) for plan in (full, many))
    k = int(np.argmax(ttft_s - floor_s))
    assert ttft_s[k] > floor_s[k]

    def late(limit_s: float) -> Plan:
        slo = make_slo(ttft_p99_s=limit_s, max_utilization=0.97)
        return given(loose.serving(slo=slo), np.asarray(full.fleet.n_instances).tolist())

    worst = int(np.argmax(floor_s))
    between = late(max(0.5 * (ttft_s[k] + floor_s[k]), 1.001 * floor_s[worst]))
    broken = broken_limits(between)
    assert {each.limit for each in broken} == {"ttft_p99_s"} and "over the limit" in failing_said(document_of(between))
    mended = repair(between)
    assert mended.after is not None and mended.after.binding is None and sum(added(mended)) > 0
    assert all(n == 0 or without_one(mended.after, j).binding is not None for j, n in enumerate(added(mended)))

    hopeless = repair(late(0.9 * floor_s[worst]))
    assert hopeless.after is None and hopeless.instances_added is None
    nearest = {each.pool: each.value for each in hopeless.unmended}
    assert nearest[worst] == pytest.approx(floor_s[worst], rel=1e-6)
    said = decision(document_of(hopeless.before))["Repair"]
    assert "No number of instances holds a P99 TTFT of" in said and "looser limit" in said and "optimize" in said


def test_a_repair_beyond_the_budget_is_said_and_spares_are_given_back_for_it(problem, least):
    def within(max_gpus: float) -> Problem:
        return replace(problem, budget=make_budget(max_gpus=max_gpus))

    needed = 8 * sum(least)
    poor = document_of(given(within(needed - 8), [1.0, 1.0]))
    assert not poor["repair"]["held"] and poor["repair"]["binding"]["limit"] == "max_gpus"
    assert "breaks the budget" in repair_said(poor) and "breaks the budget" in decision(poor)["Repair"]

    swapped = repair(given(within(needed), [least[0] + 1, least[1] - 1]))
    assert added(swapped) == [-1.0, 1.0] and swapped.after is not None and swapped.after.binding is None
    dear = repair(given(within(needed - 8), least))
    assert dear.after is None and [each.limit for each in dear.unmended] == ["max_gpus"]
    assert "keeps the budget" in decision(document_of(dear.before))["Repair"]
    spare = repair(given(within(needed), [least[0] + 2, least[1]]))
    assert added(spare) == [-2.0, 0.0]


def test_a_repaired_plan_is_a_plan_as_any_other(problem, least, tmp_path):
    found = repair(given(problem, [1.0, least[1]]))
    assert found.after is not None
    document = plan_to_json(found.after) | {"repaired": repaired_to_json(found)}
    assert "broken" not in document and document["status"] == "feasible"
    assert [each["pool"] for each in document["repaired"]["broken"]] == [1, 1]
    rows = decision(document)
    assert list(rows)[:2] == ["Repaired", "Buy"]
    assert "Without, pool 1 is asked for" in rows["Repaired"] and "its one instance can serve" in rows["Repaired"]
    save_plan(found.after, tmp_path / "grown.json")
    again = load_plan(tmp_path / "grown.json", workload=problem.workload)
    assert again.status == "feasible" and np.asarray(again.fleet.n_instances).tolist() == least


def test_changes_are_said_in_words():
    assert change_said([0, 12]) == "add 12 instances to pool 2"
    assert change_said([1, 0, 3]) == "add 1 instance to pool 1 and 3 to pool 3"
    assert change_said([-1, 2]) == "add 2 instances to pool 2, and take 1 instance from pool 1"
    assert change_said([4], ("added", "took")) == "added 4 instances to pool 1"


@pytest.mark.slow
def test_limits_of_all_requests_together_are_mended_by_as_few_as_hold_them(workload):
    spec = EngineSpec("h100", serving="vllm-0.11")
    slo = make_slo(ttft_p99_s=1.0, scope="fleet")
    found = repair(given(make_problem(workload, [spec], slo=slo), [1.0, 1.0]))
    assert found.after is not None and found.after.binding is None
    for k, n in enumerate(added(found)):
        assert n == 0 or without_one(found.after, k).binding is not None
