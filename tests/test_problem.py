"""A problem is services, periods and a budget; its answer is a plan or the limit that no fleet holds."""

import math
from dataclasses import FrozenInstanceError, replace
from functools import partial

import jax
import numpy as np
import pytest
from brute_force import few_lengths

from fleetopt_jax._optimize.plan import BrokenLimit, Infeasible, Plan, Unreachable, is_plan, require_plan
from fleetopt_jax._optimize.problem import (
    ALWAYS,
    Period,
    Problem,
    Service,
    assignments,
    demanded_tok_per_s,
    make_problem,
)
from fleetopt_jax._optimize.search import METHODS, evaluate_given, optimize, with_fleet
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.fleet.assumptions import CHOICES, PUBLISHED
from fleetopt_jax.fleet.fleet import Fleet, make_slo
from fleetopt_jax.fleet.resources import Budget, Weights, make_budget
from fleetopt_jax.fleet.surroundings import make_site, make_surroundings
from fleetopt_jax.workload.atoms import Workload, make_workload, with_rate

published_problem = partial(make_problem, assume="published", assumptions=PUBLISHED)
SITE = dict(host_w_per_gpu=100.0, pue=1.2, usd_per_kwh=0.1, kg_co2_per_kwh=0.3)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return few_lengths()


@pytest.fixture(scope="module")
def problem(workload, h100) -> Problem:
    surroundings = make_surroundings(make_site(**SITE))
    return published_problem(workload, [h100], slo=make_slo(ttft_p99_s=0.3), surroundings=surroundings)


def assert_same_plan(one: Plan, other: Plan) -> None:
    assert (one.specs, one.status) == (other.specs, other.status)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15),
        (one.fleet, one.metrics),
        (other.fleet, other.metrics),
    )


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_problem_keeps_specs_and_builds_their_engines(workload, h100, b200):
    asked = [h100, EngineSpec("B200", source="projected"), replace(b200, precision="bf16"), h100]
    problem = published_problem(workload, asked)
    assert problem.specs == tuple(
        EngineSpec(gpu, precision="bf16", kv_precision="bf16", source="projected") for gpu in ("h100", "b200")
    )
    assert problem.kinds == ("h100", "b200")
    assert all(engine is build(spec) for engine, spec in zip(problem.engines, problem.specs))
    assert problem.service.name == "workload" and problem.workload is workload
    assert problem.window_tokens == 1600.0 and problem.periods == (ALWAYS,) and problem.budget == Budget()
    assert len(assignments(problem)) == 4
    assert published_problem(workload, asked, window_tokens=2000).window_tokens == 2000.0
    uneven = make_workload([90.0], [11.0], arrival_rate_per_s=1.0)
    assert published_problem(uneven, asked).window_tokens == 112.0  # a whole block of 16 tokens
    with pytest.raises(FrozenInstanceError):
        problem.gamma = 2.0


def test_serving_replaces_parts_of_the_only_service(problem, workload, b200):
    other = problem.serving(specs=(b200,), workload=with_rate(workload, 7.0), slo=make_slo(ttft_p99_s=9.0))
    assert other.specs == (b200,) and other.kinds == ("b200",) and other.engines == (build(b200),)
    assert float(other.workload.arrival_rate_per_s) == 7.0 and float(other.slo.ttft_p99_s) == 9.0
    assert other.service.name == problem.service.name and other.surroundings is problem.surroundings
    assert problem.kinds == ("h100",)  # and leaves the problem it is made from


def test_what_is_demanded_is_the_output_of_every_fleet_that_holds_the_limits(problem):
    plan = optimize(problem)
    assert float(plan.metrics.output_tok_per_s) == pytest.approx(demanded_tok_per_s(problem), rel=1e-9)


# --- periods ----------------------------------------------------------------------------------------------------------


def test_a_period_multiplies_rate_prices_and_carbon(problem, workload):
    period = Period(rate=0.5, usd_per_kwh=3.0, kg_co2_per_kwh=0.25)
    there = replace(problem, periods=(period,))
    priced = make_site(**SITE | dict(usd_per_kwh=0.3, kg_co2_per_kwh=0.075))
    same = replace(problem.serving(workload=with_rate(workload, 1e4)), surroundings=make_surroundings(priced))
    assert float(there.workload.arrival_rate_per_s) == 1e4
    assert demanded_tok_per_s(there) == pytest.approx(0.5 * demanded_tok_per_s(problem), rel=1e-12)
    site = there.around.site
    assert (float(site.usd_per_kwh), float(site.kg_co2_per_kwh)) == pytest.approx((0.3, 0.075), rel=1e-12)
    assert (float(site.pue), float(site.host_w_per_gpu)) == (1.2, 100.0)
    for objective in ("usd", "co2", Weights(power_w=1.0, usd_per_h=10.0)):
        one, other = (optimize(replace(each, objective=objective)) for each in (there, same))
        assert_same_plan(one, other)
        assert one.objective == pytest.approx(other.objective, rel=1e-12)
    numbers = dict(window_tokens=[300.0, 1600.0], gamma=[1.0, 1.0], n_instances=[40.0, 30.0])
    assert_same_plan(*(evaluate_given(each, each.specs * 2, **numbers) for each in (there, same)))


def test_the_period_of_all_the_time_changes_nothing(problem, workload):
    assert replace(problem, periods=(Period(),)).workload is workload
    jax.tree.map(np.testing.assert_array_equal, problem.around, problem.surroundings)


def test_two_services_or_periods_are_refused_in_one_line(problem):
    other = replace(problem.service, name="other")
    for change, says in (
        (dict(services=(problem.service, other)), "2 services in 1 periods"),
        (dict(periods=(ALWAYS, Period(rate=2.0))), "1 services in 2 periods"),
        (dict(services=()), "0 services in 1 periods"),
    ):
        several = replace(problem, **change)
        asked = [partial(optimize, several, method) for method in (None, *METHODS)]
        numbers = dict(window_tokens=[1600.0], gamma=[1.0], n_instances=[9.0])
        for ask in (*asked, partial(evaluate_given, several, problem.specs, **numbers)):
            with pytest.raises(BadField, match=f"^services: {says}; need one service in one period") as refusal:
                ask()
            assert "\n" not in str(refusal.value)


def test_a_service_is_a_record_of_its_own(problem):
    service = Service("chat", problem.workload, problem.slo, problem.specs, 1600.0)
    assert_same_plan(optimize(replace(problem, services=(service,))), optimize(problem))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_single_precision_is_refused_in_one_line(problem):
    numbers = dict(window_tokens=[1600.0], gamma=[1.0], n_instances=[9.0])
    with jax.enable_x64(False):
        for name, ask in (
            ("optimize", partial(optimize, problem)),
            ("evaluate_given", partial(evaluate_given, problem, problem.specs, **numbers)),
        ):
            with pytest.raises(ValueError, match=f"^{name} needs float64: call jax.config.update") as refusal:
                ask()
            assert "\n" not in str(refusal.value)


def test_assumptions_that_do_not_go_together_are_refused(workload, h100):
    sampled = replace(PUBLISHED, integration=CHOICES["integration"]["sampled"])
    of_prompts = replace(PUBLISHED, compression=CHOICES["compression"]["prompt_only"])
    for bad, says in (
        (dict(assumptions=sampled), "need exact integration"),
        (dict(assumptions=replace(PUBLISHED, rounding="real")), "need whole rounding"),
        (dict(slo=make_slo(scope="fleet")), "need the tail 'quantile'"),
        (dict(free=("max_num_seqs",)), "need a paged KV cache"),
        (dict(gamma=2.5, assumptions=of_prompts), "need gamma <= 2 where only prompts shrink, got 2.5"),
    ):
        with pytest.raises(ValueError, match=says):
            published_problem(workload, [h100], **bad)
    many = published_problem(workload, [h100, replace(h100, tp=4)], n_pools=8)
    with pytest.raises(BadInput, match=r"engines and pools: 2 engines for 8 pools; need at most 128"):
        assignments(many)


# --- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_answer_is_a_whole_plan_or_the_limit_nobody_holds(problem):
    """Neither has a part that is None because of the other."""
    for method in METHODS:
        plan = optimize(problem, method)
        assert isinstance(plan, Plan) and is_plan(plan) and require_plan(plan) is plan
        assert isinstance(plan.fleet, Fleet) and plan.status == ("feasible" if method == "gradient" else "optimal")
        assert len(plan.specs) == len(plan.fleet.lanes) == len(plan.metrics.pools.power_w) == len(plan.kinds)
        assert plan.binding is None and plan.method == method and plan.gain_vs_homogeneous >= 1.0 - 1e-9
        assert plan.objective == float(plan.metrics.tok_per_j)
        assert plan.cost == pytest.approx(float(plan.metrics.power_w), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        (dict(budget=make_budget(max_gpus=4.0)), "max_gpus"),
        (dict(budget=make_budget(max_usd_per_h=1.0, max_power_w=1e9)), "max_usd_per_h"),
        (dict(budget=make_budget(gpus_of={"h100": 8})), "gpus_of.h100"),
    ],
)
def test_what_is_infeasible_has_no_fleet_but_says_why(problem, change, limit):
    answer = optimize(replace(problem, **change))
    assert isinstance(answer, Infeasible) and not is_plan(answer) and not hasattr(answer, "fleet")
    assert answer.status == "infeasible" and isinstance(answer.binding, Unreachable)
    assert answer.binding.limit == limit and answer.binding.asked == answer.problem.budget.caps[limit]
    nearest = answer.binding.nearest_feasible
    assert nearest > answer.binding.asked
    with pytest.raises(ValueError, match=f"no fleet holds {limit} = .*; the nearest feasible is {nearest:g}"):
        require_plan(answer)
    enough = replace(problem, budget=answer.problem.budget.with_cap(limit, nearest))
    assert is_plan(optimize(enough))
    assert isinstance(optimize(replace(enough, budget=enough.budget.with_cap(limit, nearest * 0.999))), Infeasible)


def test_limits_that_only_together_cannot_be_held_are_named_together(problem, b200):
    """H100s cost less, B200s draw less."""
    both = problem.serving(specs=(*problem.specs, replace(b200, gpu=replace(GPUS["b200"], usd_per_h=20.0))))
    usd, power_w = (optimize(replace(both, objective=name)).cost * (1 + 1e-6) for name in ("usd", "power"))
    for caps in (dict(max_usd_per_h=usd), dict(max_power_w=power_w)):
        assert is_plan(optimize(replace(both, budget=make_budget(**caps))))
    caps = dict(max_power_w=power_w, max_usd_per_h=usd)
    answer = optimize(replace(both, budget=make_budget(**caps)))
    assert isinstance(answer, Infeasible) and answer.binding == Unreachable("budget", caps, None)
    with pytest.raises(ValueError, match="no fleet holds budget = "):
        require_plan(answer)


def test_a_given_fleet_that_breaks_a_limit_is_a_plan_that_says_so(problem):
    plan = optimize(problem)
    fewer = with_fleet(plan, plan.fleet.with_instances(np.maximum(np.asarray(plan.fleet.n_instances) // 2, 1)))
    assert isinstance(fewer, Plan) and fewer.status == "infeasible" and not is_plan(fewer)
    assert isinstance(fewer.binding, BrokenLimit) and fewer.binding.value > fewer.binding.asked
    assert (fewer.method, fewer.search.n_evaluated) == ("given", 1)
    assert math.isfinite(float(fewer.metrics.power_w))
    over = evaluate_given(
        replace(problem, budget=make_budget(max_gpus=8.0)),
        plan.specs,
        window_tokens=np.asarray(plan.fleet.window_tokens).tolist(),
        gamma=[1.0] * len(plan.specs),
        n_instances=np.asarray(plan.fleet.n_instances).tolist(),
    )
    assert over.binding == BrokenLimit("max_gpus", float(plan.metrics.n_gpus), 8.0)
