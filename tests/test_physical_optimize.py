"""Search under the preset `physical`: against every candidate by itself, and what an infeasible answer promises."""

import math

import jax
import numpy as np
import pytest

from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.problem import Problem, make_problem, thresholds
from fleetopt_jax._optimize.search import optimize, with_fleet
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.fleet.assumptions import PHYSICAL
from fleetopt_jax.fleet.evaluate import evaluate
from fleetopt_jax.fleet.fleet import fleet_of, make_slo
from fleetopt_jax.fleet.limits import held
from fleetopt_jax.fleet.sizing import size_fleet
from fleetopt_jax.workload.atoms import with_rate


@pytest.fixture(scope="module")
def spec() -> EngineSpec:
    """Llama-3.1-70B on eight H100 by the measured law."""
    return EngineSpec("h100")


@jax.jit
def alone(engines, windows, gamma, workload, slo):
    """One candidate by itself."""
    fleet = size_fleet(fleet_of(engines, windows, gamma, np.ones(len(engines))), workload, slo, PHYSICAL)
    return fleet, evaluate(fleet, workload, PHYSICAL)


def brute_force(problem: Problem) -> dict[float, float]:
    """tok/J by short window, each candidate sized and evaluated alone; 0 where it holds no limit."""
    found = {}
    for window in thresholds(problem):
        windows, gamma = np.array([window, problem.window_tokens]), np.array([problem.gamma, 1.0])
        fleet, metrics = alone(problem.engines * 2, windows, gamma, problem.workload, problem.slo)
        sized = bool(np.all(np.isfinite(fleet.n_instances)))
        serves = window * problem.gamma < float(problem.workload.longest_tokens) or window == problem.window_tokens
        assert not sized or held(metrics.pools, problem.slo)
        found[float(window)] = float(metrics.tok_per_j) if sized and serves else 0.0
    return found


def assert_held(plan: Plan) -> None:
    assert plan.status in ("optimal", "feasible")
    assert held(plan.metrics.pools, plan.problem.slo)
    assert float(plan.metrics.unserved_frac) < 1e-9
    again = with_fleet(plan, plan.fleet)
    assert (again.status, again.binding) == ("feasible", None)
    assert float(again.metrics.tok_per_j) == pytest.approx(float(plan.metrics.tok_per_j), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["pool", pytest.param("fleet", marks=pytest.mark.nightly)])
def test_grid_is_the_best_of_all_candidates(spec, workload, scope):
    for gamma, rate, limits in (
        (1.0, 60.0, dict(ttft_p99_s=1.0)),
        (1.5, 60.0, dict(ttft_p99_s=0.3, ttft_s_per_token=1e-4)),
        (1.0, 400.0, dict(ttft_p99_s=1.5, itl_s=0.02)),
    ):
        slo = make_slo(scope=scope, **limits)
        problem = make_problem(with_rate(workload, rate), [spec], gamma=gamma, slo=slo)
        by_window = brute_force(problem)
        plan = optimize(problem, "grid")
        assert_held(plan)
        assert plan.status == "optimal"
        assert plan.search.n_evaluated == len(by_window)
        assert float(plan.metrics.tok_per_j) == pytest.approx(max(by_window.values()), rel=1e-9)
        assert by_window[float(plan.fleet.window_tokens[0])] == pytest.approx(max(by_window.values()), rel=1e-9)


@pytest.mark.nightly
@pytest.mark.parametrize("scope", ["pool", "fleet"])
def test_infeasible_names_what_is_reachable(spec, workload, scope):
    """Asked again for what was named, a little rounded up, until all is held."""
    named, method = [], "exact" if scope == "pool" else "grid"
    for limits in (dict(ttft_p99_s=0.01), dict(ttft_p99_s=2.0, itl_s=0.005), dict(ttft_p99_s=0.01, itl_s=0.005)):
        for _ in range(3):
            problem = make_problem(workload, [spec], slo=make_slo(scope=scope, **limits))
            plan = optimize(problem, method)
            if isinstance(plan, Plan):
                break
            limit, nearest = plan.binding.limit, plan.binding.nearest_feasible
            assert limits[limit] == plan.binding.asked < nearest < math.inf
            short = make_slo(scope=scope, **{**limits, limit: nearest * (1 - 1e-6)})
            assert isinstance(optimize(make_problem(workload, [spec], slo=short), method), Infeasible)
            limits = {**limits, limit: nearest * (1 + 1e-6)}
            named.append(limit)
        assert_held(plan)
    assert {*named} == {"ttft_p99_s", "itl_s"}


@pytest.mark.nightly
def test_gradient_comes_close_to_the_exhaustive_search(spec, workload):
    for scope, rate, gamma, limits in (
        ("pool", 400.0, 1.0, dict(ttft_p99_s=1.5, itl_s=0.02)),
        ("fleet", 60.0, None, dict(ttft_p99_s=1.0)),
    ):
        slo = make_slo(scope=scope, **limits)
        problem = make_problem(with_rate(workload, rate), [spec], gamma=gamma, slo=slo)
        best, found = optimize(problem, "grid"), optimize(problem, "gradient")
        assert_held(found)
        assert found.status == "feasible"
        assert 0.98 <= float(found.metrics.tok_per_j) / float(best.metrics.tok_per_j) <= 1 + 1e-9
