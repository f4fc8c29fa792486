"""The gradient search: near the certified optimum where there is one, near brute force where a budget couples pools,
and within its limits always."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import LONGEST, AllFleets, few_lengths, with_less_kv

from fleetopt_jax._optimize import gradient
from fleetopt_jax._optimize.plan import Infeasible, Plan, is_plan
from fleetopt_jax._optimize.problem import Problem, make_problem
from fleetopt_jax._optimize.relaxed import smoothed
from fleetopt_jax._optimize.search import optimize, with_fleet
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.catalog.workloads import load_workload
from fleetopt_jax.cli.main import main
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED, parse_assumptions
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.fleet.limits import held
from fleetopt_jax.fleet.resources import limit_weights, make_budget, weights_of
from fleetopt_jax.fleet.traffic import atoms_of, running_sums
from fleetopt_jax.workload.atoms import Workload, make_workload, total_tokens, with_rate

REACHES = 0.998  # of the certified optimum's tok/J
REACHES_COUPLED = 0.995  # of the optimum within a budget
BOUND_HOLDS = 1e-9  # sums of float64 in another order
published_problem = partial(make_problem, assume="published", assumptions=PUBLISHED)


def assert_held(plan: Plan) -> None:
    """The limits, the budget, and that a person who types the plan in gets it again."""
    assert plan.status == "feasible"  # never claims what it has not tried
    assert held(plan.metrics.pools, plan.problem.slo)
    assert float(plan.metrics.unserved_frac) < 1e-9
    for name, used in plan.used.items():
        assert used <= plan.problem.budget.caps[name] * (1 + BOUND_HOLDS)
    assert all(n == int(n) for n in plan.fleet.n_instances)
    assert with_fleet(plan, plan.fleet).binding is None
    if plan.search.lower_bound is not None:
        assert plan.search.gap >= -BOUND_HOLDS


def in_tok_per_j(plan: Plan) -> float:
    return float(plan.metrics.tok_per_j)


def lengths(n: int, longest: float, seed: int, rate_per_s: float) -> Workload:
    """Requests of n kinds, in whole blocks: every window worth trying is a multiple of 16."""
    rng = np.random.default_rng(seed)
    blocks = np.arange(2.0, longest // 16)
    total = 16 * np.sort(rng.choice(blocks, n, replace=False, p=1 / blocks / np.sum(1 / blocks)))
    prompt = np.maximum(1.0, np.floor(0.8 * total))
    centre = rng.uniform(400.0, 1500.0)
    weight = rng.uniform(0.5, 1.0, len(total)) * np.exp(-0.5 * (np.log(total / centre) / 1.2) ** 2)
    return make_workload(prompt, total - prompt, weight, arrival_rate_per_s=rate_per_s)


def coupled(problem: Problem, rng: np.random.Generator) -> Problem:
    """A random budget that some fleet may keep: a part of the way from what the cheapest fleet uses to the least."""
    best = optimize(problem, "exact")
    used = {name: float(getattr(best.metrics, name)) for name in ("n_gpus", "power_w", "usd_per_h")}
    n_b200 = sum(float(n) for n, kind in zip(best.metrics.pools.n_gpus, best.kinds) if kind == "b200")
    caps = dict(gpus_of={"b200": float(np.floor(n_b200 * rng.uniform(0.2, 1.2)))})
    match rng.integers(3):
        case 0:
            caps["max_power_w"] = used["power_w"] * rng.uniform(0.9, 1.8)
        case 1:
            caps["max_usd_per_h"] = used["usd_per_h"] * rng.uniform(0.9, 1.5)
    return replace(problem, budget=make_budget(**caps))


def test_the_table_is_the_running_sums_seen_by_a_router_that_errs(h100, small_workload):
    """Nothing at the first row, everything at the last, whatever the width; never falling in between."""
    sums = running_sums(build(h100).prefill, atoms_of(small_workload, PUBLISHED), PUBLISHED, compresses=False)
    total = total_tokens(small_workload)
    table = smoothed(sums, jnp.log(total[jnp.array([0, -1])]))
    everything = jnp.concatenate([jnp.atleast_1d(x[-1]) for x in jax.tree.leaves(sums.as_is)])
    assert np.all(np.asarray(table.of_all[:, 0]) == 0.0)
    np.testing.assert_allclose(table.of_all[:, -1], np.tile(everything, (len(table.of_all), 1)), rtol=1e-12)
    assert np.all(np.diff(table.of_all, axis=1) >= -1e-9 * np.abs(everything))


# --- small problems, of which every fleet is tried ------------------------------------------------------------------


def small_problem(*specs: EngineSpec, assume: str = "published", **about) -> Problem:
    """30 lengths up to 1,600 tokens on engines with little KV cache."""
    assumptions = parse_assumptions(assume)
    about = {"slo": make_slo(ttft_p99_s=0.3), **about}
    few = [with_less_kv(spec) for spec in specs]
    return make_problem(few_lengths(), few, assume=assume, assumptions=assumptions, **about)


@pytest.mark.slow
def test_a_small_budget_is_kept_and_met_closely(h100, b200):
    """H100s cost less and B200s draw less; one cap, two, and one that no fleet keeps; from plans that are known, and
    without."""
    free = small_problem(h100, replace(b200, gpu=replace(GPUS["b200"], usd_per_h=14.0)), objective="usd")
    fleets = AllFleets(free, np.arange(1.0, LONGEST + 1))
    cheapest = optimize(free)
    least_w, n_h100 = fleets.cheapest(weights_of("power")), float(cheapest.metrics.n_gpus)
    assert set(cheapest.kinds) == {"h100"}
    for caps in (
        dict(max_power_w=0.5 * (least_w + float(cheapest.metrics.power_w))),
        dict(max_usd_per_h=1.2 * cheapest.cost, gpus_of={"h100": 0.7 * n_h100}),
    ):
        problem = replace(free, budget=make_budget(**caps))
        limits = [(limit_weights(name), most) for name, most in problem.budget.caps.items()]
        best = fleets.cheapest(weights_of("usd"), limits)
        found = optimize(problem, "gradient")
        assert_held(found)
        assert best * (1 - BOUND_HOLDS) <= found.cost <= best / REACHES_COUPLED
        assert found.search.lower_bound <= best * (1 + BOUND_HOLDS)
        cold = gradient.search(problem, warm=False)
        assert best * (1 - BOUND_HOLDS) <= cold.cost <= 1.05 * best
    refused = optimize(replace(free, budget=make_budget(max_power_w=0.99 * least_w)), "gradient")
    assert isinstance(refused, Infeasible) and refused.binding.limit == "max_power_w"


@pytest.mark.slow
def test_three_small_pools_and_a_searched_gamma_come_close_to_the_exact_search(h100):
    for about in (dict(n_pools=3), dict(gamma=None)):
        problem = small_problem(h100, **about)
        best, found = optimize(problem), optimize(problem, "gradient")
        assert_held(found)
        assert found.cost <= best.cost / REACHES
        assert found.cost >= best.cost * (1 - BOUND_HOLDS) or not best.search.lower_bound


@pytest.mark.slow
def test_free_caps_and_clocks_are_no_worse_than_any_of_a_few(h100):
    problem = small_problem(h100, assume="published,kv_cache=paged")
    found = optimize(replace(problem, free=("clock", "max_num_seqs")), "gradient")
    assert_held(found)
    assert any(spec.clock_frac < 1.0 for spec in found.specs)
    given = [
        optimize(problem.serving(specs=(replace(problem.specs[0], clock_frac=clock, max_num_seqs=cap),)))
        for clock in (0.55, 0.75, 1.0)
        for cap in (None, 128)
    ]
    assert found.cost <= min(plan.cost for plan in given if is_plan(plan)) / REACHES


@pytest.mark.nightly
def test_limits_of_a_small_fleet_are_met_closely(h100, b200):
    """Two engines; the latencies are those of all requests together. The grid has the windows where requests end, among
    which relaxed optima are rounded."""
    slo = make_slo(ttft_p99_s=0.15, scope="fleet")
    problem = small_problem(h100, b200, assume="published,tail=quantile", slo=slo)
    best, found = optimize(problem, "grid"), optimize(problem, "gradient")
    assert best.status == "optimal" and len(best.specs) == 2
    assert_held(found)
    assert best.cost * (1 - BOUND_HOLDS) <= found.cost <= 1.02 * best.cost


# --- against the certified optimum ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_gradient_comes_close_to_the_exact_search_and_keeps_any_budget(h100, b200):
    """Three pools of two engines: free, and under random budgets; what is infeasible is said to be."""
    rng = np.random.default_rng(0)
    kept = 0
    for i in range(5):
        workload = lengths(24, rng.uniform(2_000.0, 4_000.0), i, rng.uniform(200.0, 2_000.0))
        objective = ["tok_per_j", "usd"][i % 2]
        free = published_problem(workload, [h100, b200], n_pools=3, objective=objective)
        problem = replace(free, budget=make_budget(gpus_of={"b200": 1e6})) if i < 2 else coupled(free, rng)
        best, found = optimize(problem, "exact"), optimize(problem, "gradient")
        if isinstance(best, Infeasible):
            assert isinstance(found, Infeasible)
            continue
        assert_held(found)
        kept += 1
        reached = {"tok_per_j": in_tok_per_j, "usd": lambda plan: 1.0 / float(plan.metrics.usd_per_h)}[objective]
        assert reached(found) >= (REACHES if i < 2 else REACHES_COUPLED) * reached(best), problem.budget
    assert kept >= 3


ON_GPUS = (("h100", 2), ("b200", 3), ("h100", 4))  # and so many pools
TRACES = ("azure-conv", "azure-code", "azure-cdf", "lmsys-cdf", "mooncake-conv")


@pytest.mark.nightly
@pytest.mark.parametrize("name", TRACES)
def test_the_gradient_comes_close_to_the_exact_search_on_traces(name):
    """Published and physical, each kind of engines on one trace or two: each shape compiles for a minute."""
    workload, slo = load_workload(name), make_slo(ttft_p99_s=20.0 if name == "mooncake-conv" else 3.0)
    gpu, k = ON_GPUS[TRACES.index(name) % len(ON_GPUS)]
    for assume, assumptions, source in (("published", PUBLISHED, "projected"), ("physical", PHYSICAL, "measured")):
        spec = EngineSpec(gpu, source=source)
        problem = make_problem(workload, [spec], n_pools=k, slo=slo, assume=assume, assumptions=assumptions)
        best, found = optimize(problem, "exact"), optimize(problem, "gradient")
        assert_held(found)
        # The exact search moves thresholds until whole instances fit, the gradient rounds up: of a few dozen
        # instances that hold the tail of the physical laws, one is 1 or 2 %.
        whole = 1.0 / float(found.metrics.n_instances) if assume == "physical" else 0.0
        assert in_tok_per_j(found) >= (REACHES - whole) * in_tok_per_j(best), (assume, gpu, k)


@pytest.mark.nightly
def test_the_gradient_comes_close_to_brute_force_within_a_budget(h100, b200):
    """Every pair of request lengths and engines tried; the gradient may choose windows between lengths as well."""
    rng = np.random.default_rng(1)
    held_by = 0
    for i in range(14):
        workload = lengths(40, rng.uniform(8_000.0, 40_000.0), i, rng.uniform(50.0, 500.0))
        problem = coupled(published_problem(workload, [h100, b200]), rng)
        best, found = optimize(problem, "grid"), optimize(problem, "gradient")
        if isinstance(best, Infeasible):
            continue
        assert best.status == "optimal"
        assert_held(found)
        assert in_tok_per_j(found) >= REACHES_COUPLED * in_tok_per_j(best), problem.budget
        held_by += 1
    assert held_by >= 10


@pytest.mark.slow
def test_a_searched_gamma_is_not_worse_than_none(h100, small_workload):
    none = optimize(published_problem(small_workload, [h100]), "gradient")
    searched = optimize(published_problem(small_workload, [h100], gamma=None), "gradient")
    assert_held(searched)
    assert in_tok_per_j(searched) >= in_tok_per_j(none)


@pytest.mark.nightly
def test_a_free_clock_saves_energy_and_its_plan_evaluates_to_itself(tmp_path, capsys):
    """Against every clock by itself; and as a file, through the door."""
    workload = with_rate(load_workload("azure-conv"), 200.0)
    problem = make_problem(workload, [EngineSpec("h100")], slo=make_slo(ttft_p99_s=3.0), workload_name="azure-conv")
    found = optimize(replace(problem, free=("clock", "max_num_seqs")), "gradient")
    assert_held(found)
    by_clock = [
        optimize(problem.serving(specs=(replace(problem.specs[0], clock_frac=clock),)), "exact")
        for clock in (0.5, 0.7, 0.85, 1.0)
    ]
    assert in_tok_per_j(found) >= REACHES * max(in_tok_per_j(plan) for plan in by_clock if is_plan(plan))
    assert any(spec.clock_frac < 1.0 for spec in found.specs)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_to_json(found)))
    assert main(["evaluate", str(path), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"]["tok_per_j"] == pytest.approx(in_tok_per_j(found), rel=1e-9)


@pytest.mark.slow
def test_the_gradient_is_between_brute_force_and_the_exact_search(h100, b200, small_workload):
    """The windows of the exact search are all whole ones; those of the grid are the lengths of the requests."""
    for spec, rate in ((h100, 200.0), (b200, 1000.0)):
        problem = published_problem(with_rate(small_workload, rate), [spec])
        best, exact, found = (optimize(problem, method) for method in ("grid", "exact", "gradient"))
        assert_held(found)
        assert in_tok_per_j(found) >= REACHES * in_tok_per_j(best)
        assert in_tok_per_j(found) <= in_tok_per_j(exact) * (1 + BOUND_HOLDS)
        assert float(best.gain_vs_homogeneous) > 1.2  # the search had something to find


def test_what_cannot_be_tuned_is_refused(h100, small_workload):
    with pytest.raises(ValueError, match="paged"):
        published_problem(small_workload, [h100], free=("max_num_seqs",))
    roofline = EngineSpec("h100", "llama-3.1-8b", 1, source="projected")
    with pytest.raises(ValueError, match="clock"):
        published_problem(small_workload, [roofline], free=("clock",))
    problem = published_problem(small_workload, [h100], free=("clock",))
    with pytest.raises(ValueError, match="gradient"):
        optimize(problem, "exact")
