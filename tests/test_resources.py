"""Objectives and limits are weights over what a fleet takes: one sum, whoever computes it, and every search takes the
least of it."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import jax
import numpy as np
import pytest
from brute_force import LONGEST, AllFleets, few_lengths, with_less_kv

from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.problem import Problem, make_problem
from fleetopt_jax._optimize.search import evaluate_given, optimize
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.fleet.assumptions import PUBLISHED
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.fleet.resources import (
    OBJECTIVES,
    Budget,
    Resources,
    Weights,
    limit_weights,
    limited_resource,
    make_budget,
    pool_prices,
    resources_of,
    usage,
    weights_of,
)
from fleetopt_jax.fleet.surroundings import make_site, make_surroundings
from fleetopt_jax.workload.atoms import Workload

SAME = 1e-9  # sums of float64 in another order
SITE = make_site(host_w_per_gpu=120.0, pue=1.3, usd_per_kwh=0.11, kg_co2_per_kwh=0.4)
MIXTURES = (
    Weights(power_w=1.0, usd_per_h=20.0),
    Weights(usd_per_h=1.0, kg_co2_per_h=3.0),
    Weights(n_gpus=1.0, power_w=1e-3),
    Weights(usd_per_h=1.0, gpus_of={"b200": 7.0}),
    Weights(power_w=1.0, usd_per_h=2.0, kg_co2_per_h=30.0, n_gpus=4.0, gpus_of={"h100": 100.0}),
)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return few_lengths()


@pytest.fixture(scope="module")
def problem(workload, h100, b200) -> Problem:
    """Of H100s, which cost less, and B200s, which draw less; a sixteenth of their KV cache, so that windows matter."""
    dear = replace(b200, gpu=replace(GPUS["b200"], usd_per_h=14.0))
    return make_problem(
        workload,
        [with_less_kv(h100), with_less_kv(dear)],
        slo=make_slo(ttft_p99_s=0.3),
        assume="published",
        assumptions=PUBLISHED,
        surroundings=make_surroundings(SITE),
    )


@pytest.fixture(scope="module")
def every_fleet(problem) -> AllFleets:
    """Of two pools, by every whole window."""
    return AllFleets(problem, np.arange(1.0, LONGEST + 1))


def random_weights(rng: np.random.Generator) -> Weights:
    plain = rng.uniform(0.0, 2.0, 4) * rng.integers(0, 2, 4)
    return Weights(*plain, gpus_of={kind: rng.uniform(0.0, 9.0) for kind in ("h100", "b200") if rng.integers(2)})


def random_pools(rng: np.random.Generator, k: int) -> Resources:
    return Resources(*rng.uniform(1.0, 1e4, (4, k)))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_add_up():
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b, price = random_weights(rng), random_weights(rng), rng.uniform(0.0, 5.0)
        kinds, pools = rng.choice(["h100", "b200", "l40s"], 3), random_pools(rng, 3)
        together = usage(a.plus(price, b), kinds, pools)
        np.testing.assert_allclose(together, usage(a, kinds, pools) + price * usage(b, kinds, pools), rtol=1e-12)
        assert usage(Weights(), kinds, pools) == 0.0
        by_pool = [usage(a, kinds[k : k + 1], jax.tree.map(lambda x, k=k: x[k : k + 1], pools)) for k in range(3)]
        np.testing.assert_allclose(usage(a, kinds, pools), sum(by_pool), rtol=1e-12)


def test_each_weight_is_of_one_resource():
    kinds, pools = ("h100", "b200", "h100"), random_pools(np.random.default_rng(2), 3)
    for name in ("power_w", "usd_per_h", "kg_co2_per_h", "n_gpus"):
        assert usage(Weights(**{name: 3.0}), kinds, pools) == pytest.approx(3.0 * getattr(pools, name).sum(), rel=1e-12)
    gpus = pools.n_gpus
    for kind, count in (("h100", gpus[0] + gpus[2]), ("b200", gpus[1]), ("l40s", 0.0)):
        assert usage(Weights(gpus_of={kind: 2.0}), kinds, pools) == pytest.approx(2.0 * count, rel=1e-12)


def test_equal_weights_are_one_key():
    one, other = (
        Weights(1.0, gpus_of={"a": 1.0, "b": 2.0}),
        Weights(1.0, gpus_of=MappingProxyType({"b": 2.0, "a": 1.0})),
    )
    assert one == other and hash(one) == hash(other)
    assert len({one, other, Weights(1.0), Weights(1.0, gpus_of={"a": 1.0}), Weights(0.0, 1.0)}) == 4
    assert Weights().plus(2.0, one) == Weights(2.0, gpus_of={"a": 2.0, "b": 4.0})


def test_objectives_and_limits_have_names():
    assert {name: weights_of(name) for name in OBJECTIVES} == dict(OBJECTIVES)
    assert weights_of("tok_per_j") == weights_of("power") == limit_weights("max_power_w")
    assert weights_of(MIXTURES[0]) is MIXTURES[0]
    with pytest.raises(BadField, match="objective: unknown name 'co3'; did you mean co2"):
        weights_of("co3")
    names = ("max_gpus", "max_power_w", "max_usd_per_h", "max_kg_co2_per_h", "gpus_of.h100")
    assert [limited_resource(name) for name in names] == ["n_gpus", "power_w", "usd_per_h", "kg_co2_per_h", "n_gpus"]
    for name in names[:-1]:
        assert limit_weights(name) == Weights(**{limited_resource(name): 1.0})
    assert limit_weights("gpus_of.h100") == Weights(gpus_of={"h100": 1.0})


def test_a_budget_has_its_finite_limits_by_name():
    assert make_budget() == Budget() and Budget().caps == {}
    budget = make_budget(max_power_w=1e5, max_kg_co2_per_h=4.0, gpus_of={"h100": 16, "b200": 0})
    assert budget.caps == {"max_power_w": 1e5, "max_kg_co2_per_h": 4.0, "gpus_of.b200": 0, "gpus_of.h100": 16}
    assert budget.with_cap("max_power_w", 2e5).caps == budget.caps | {"max_power_w": 2e5}
    assert budget.with_cap("gpus_of.h100", 8).caps == budget.caps | {"gpus_of.h100": 8}
    assert Budget().with_cap("max_gpus", 3) == make_budget(max_gpus=3)
    assert hash(budget) == hash(make_budget(max_power_w=1e5, max_kg_co2_per_h=4.0, gpus_of={"b200": 0, "h100": 16}))
    for name in ("max_gpus", "max_power_w", "max_usd_per_h", "max_kg_co2_per_h"):
        for bad in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"need {name} > 0, got"):
                make_budget(**{name: bad})
    with pytest.raises(ValueError, match=r"need gpus_of\.h100 >= 0, got -1"):
        make_budget(gpus_of={"h100": -1})


# --- one sum ----------------------------------------------------------------------------------------------------------


def test_what_has_no_price_costs_nothing_even_of_infinitely_much(h100):
    engine = replace(build(h100), usd_per_gpu_h=np.zeros(()))
    taken = resources_of(engine, make_site(), np.inf, np.asarray(np.inf))
    assert (float(taken.usd_per_h), float(taken.kg_co2_per_h), float(taken.n_gpus)) == (0.0, 0.0, np.inf)
    priced = resources_of(engine, SITE, 2.0, np.asarray(5e3))
    assert float(priced.usd_per_h) == pytest.approx(5.0 * 0.11, rel=1e-12)
    assert float(priced.kg_co2_per_h) == pytest.approx(5.0 * 0.4, rel=1e-12)


@pytest.mark.parametrize("weights", [*OBJECTIVES.values(), *MIXTURES])
def test_prices_of_pools_are_the_usage_of_what_is_evaluated(problem, weights):
    """Any fleet's: prices of an instance and of a watt, times both."""
    rng = np.random.default_rng(3)
    for _ in range(4):
        specs = [problem.specs[i] for i in rng.integers(0, 2, 2)]
        windows = [float(rng.integers(20, 300)), problem.window_tokens]
        numbers = dict(window_tokens=windows, gamma=[1.0, 1.0], n_instances=rng.integers(30, 90, 2).tolist())
        plan = evaluate_given(replace(problem, objective=weights), specs, **numbers)
        prices = pool_prices(weights, plan.kinds, plan.fleet.engines, problem.around.site)
        pools = plan.metrics.pools
        by_price = np.sum(
            prices.per_instance * np.asarray(pools.n_instances) + prices.per_watt * np.asarray(pools.power_w)
        )
        assert plan.cost == plan.objective == pytest.approx(by_price, rel=1e-12)
        assert plan.cost == pytest.approx(usage(weights, plan.kinds, pools.resources), rel=1e-12)


def test_prices_add_up(problem):
    rng = np.random.default_rng(4)
    for _ in range(20):
        a, b, price = random_weights(rng), random_weights(rng), rng.uniform(0.0, 5.0)
        together, apart = problem.prices(a.plus(price, b)), problem.prices(a).plus(price, problem.prices(b))
        np.testing.assert_allclose(together.per_instance, apart.per_instance, rtol=1e-12)
        np.testing.assert_allclose(together.per_watt, apart.per_watt, rtol=1e-12)


# --- objectives -------------------------------------------------------------------------------------------------------


def cost_of(answer: Plan | Infeasible) -> float:
    return answer.cost if isinstance(answer, Plan) else math.inf


@pytest.mark.parametrize("objective", [*OBJECTIVES, *MIXTURES])
def test_the_exact_search_finds_the_least_of_any_weights(problem, every_fleet, objective):
    plan = optimize(replace(problem, objective=objective))
    assert plan.status == "optimal"
    assert plan.cost == pytest.approx(every_fleet.cheapest(weights_of(objective)), rel=SAME)
    if objective != "tok_per_j":
        assert plan.search.lower_bound == pytest.approx(plan.cost, rel=SAME)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["co2", MIXTURES[0], MIXTURES[3]])
def test_grid_and_gradient_find_the_least_of_any_weights(problem, every_fleet, objective):
    best = every_fleet.cheapest(weights_of(objective))
    lengths = np.unique(np.asarray(problem.workload.prompt_tokens + problem.workload.output_tokens))
    of_lengths = np.isin(every_fleet.windows[:, 0], lengths)
    by_length = np.where(every_fleet.kept, every_fleet.used(weights_of(objective)), np.inf)[:, of_lengths].min()
    asked = replace(problem, objective=objective)
    assert optimize(asked, "grid").cost == pytest.approx(by_length, rel=SAME)
    assert best * (1.0 - SAME) <= optimize(asked, "gradient").cost <= best * 1.005


def test_ties_are_broken_by_what_comes_next(problem, every_fleet):
    """Of all fleets of as few GPUs the cheapest; of all that cost as little the one that draws least."""
    rented = replace(problem, surroundings=make_surroundings(replace(SITE, usd_per_kwh=np.zeros(()))))
    rent = Weights(gpus_of={kind: float(build(spec).usd_per_gpu_h) for kind, spec in zip(problem.kinds, problem.specs)})
    for asked, first, then in (
        (replace(problem, objective="gpus"), weights_of("gpus"), weights_of("usd")),
        (replace(rented, objective="usd"), rent, weights_of("power")),
    ):
        cost, further = (np.where(every_fleet.kept, every_fleet.used(weights), np.inf) for weights in (first, then))
        tied = further[cost <= cost.min() * (1.0 + SAME)]
        assert tied.max() > tied.min() * (1.0 + 4e-6)  # there is something to break
        plan = optimize(asked)
        assert plan.cost == plan.search.lower_bound == pytest.approx(cost.min(), rel=SAME)
        assert usage(then, plan.kinds, plan.metrics.pools.resources) == pytest.approx(tied.min(), rel=1e-6)
        again = optimize(asked)
        np.testing.assert_array_equal(again.fleet.window_tokens, plan.fleet.window_tokens)
        assert again.specs == plan.specs


def test_carbon_of_electricity_alone_is_power(problem):
    power, carbon = (optimize(replace(problem, objective=objective)) for objective in ("power", "co2"))
    for name in ("window_tokens", "n_instances"):
        np.testing.assert_array_equal(getattr(power.fleet, name), getattr(carbon.fleet, name))
    assert power.kinds == carbon.kinds
    assert carbon.objective == pytest.approx(0.4 * power.objective / 1000.0, rel=1e-12)


# --- limits -----------------------------------------------------------------------------------------------------------


def budgets(every_fleet: AllFleets) -> dict[str, Mapping[str, object]]:
    """Caps between what the cheapest fleet uses and the least."""
    kept = every_fleet.kept
    usd = np.where(kept, every_fleet.used(OBJECTIVES["usd"]), np.inf)
    cheapest = np.unravel_index(np.argmin(usd), usd.shape)

    def between(name: str, share: float) -> float:
        used = every_fleet.used(OBJECTIVES[name])
        return float(share * used[cheapest] + (1 - share) * used[kept].min())

    n_h100 = float(every_fleet.used(Weights(gpus_of={"h100": 1.0}))[cheapest])
    return {
        "power": dict(max_power_w=between("power", 0.5)),
        "carbon": dict(max_kg_co2_per_h=between("co2", 0.5)),
        "kind": dict(gpus_of={"h100": 0.7 * n_h100}),
        "two": dict(max_power_w=between("power", 0.7), gpus_of={"h100": 0.8 * n_h100}),
        "impossible": dict(max_power_w=between("power", 0.0) * 0.99),
        "hardly": dict(max_usd_per_h=between("usd", 1.0) * 1.0001, max_power_w=between("power", 0.0) * 1.0001),
    }


def test_limits_bind_as_brute_force_says(problem, every_fleet):
    """The coupled search: one cap, two, GPUs of a kind; and what is called infeasible is."""
    statuses = {}
    for name, caps in budgets(every_fleet).items():
        budget = make_budget(**caps)
        limits = [(limit_weights(limit), most) for limit, most in budget.caps.items()]
        answer = optimize(replace(problem, objective="usd", budget=budget))
        statuses[name] = answer.status
        best = every_fleet.cheapest(OBJECTIVES["usd"], limits)
        assert cost_of(answer) == best or cost_of(answer) == pytest.approx(best, rel=SAME), name
        if isinstance(answer, Plan):
            assert answer.search.lower_bound == pytest.approx(best, rel=SAME)
            assert all(used <= budget.caps[limit] * (1.0 + SAME) for limit, used in answer.used.items())
    assert statuses["impossible"] == "infeasible" and statuses["power"] == "optimal"


def test_a_cap_on_carbon_binds_like_one_on_power(problem, every_fleet):
    caps = budgets(every_fleet)
    power_w = caps["power"]["max_power_w"]
    by_power, by_carbon = (
        optimize(replace(problem, objective="usd", budget=make_budget(**cap)))
        for cap in (dict(max_power_w=power_w), dict(max_kg_co2_per_h=0.4 * power_w / 1000.0))
    )
    free = optimize(replace(problem, objective="usd"))
    assert by_carbon.cost == pytest.approx(by_power.cost, rel=1e-12) and by_carbon.cost > free.cost
    np.testing.assert_array_equal(by_power.fleet.n_instances, by_carbon.fleet.n_instances)
    least = optimize(replace(problem, objective="co2")).cost
    refused = optimize(replace(problem, objective="usd", budget=make_budget(max_kg_co2_per_h=0.99 * least)))
    assert isinstance(refused, Infeasible) and refused.binding.limit == "max_kg_co2_per_h"
    assert refused.binding.nearest_feasible == pytest.approx(least, rel=SAME)


def test_gpus_are_counted_by_kind(problem):
    budget = make_budget(gpus_of={"h100": 1000, "b200": 1000, "l40s": 5})
    plan = evaluate_given(
        replace(problem, budget=budget),
        problem.specs,
        window_tokens=[100.0, problem.window_tokens],
        gamma=[1.0, 1.0],
        n_instances=[40, 20],
    )
    assert plan.kinds == ("h100", "b200")
    assert plan.used == {"gpus_of.h100": 320.0, "gpus_of.b200": 160.0, "gpus_of.l40s": 0.0}
    assert float(plan.metrics.n_gpus) == 480.0


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_objective_that_prices_nothing_or_backwards_is_refused(workload, h100, b200):
    ask = partial(make_problem, workload, [h100, b200], assume="published", assumptions=PUBLISHED)
    for objective in (Weights(), Weights(gpus_of={"b200": 1.0}), Weights(gpus_of={"l40s": 1.0})):
        with pytest.raises(ValueError, match="need an objective by which every engine costs something"):
            ask(objective=objective)
    for objective in (Weights(power_w=-1.0), Weights(usd_per_h=math.inf), Weights(1.0, gpus_of={"b200": math.nan})):
        with pytest.raises(ValueError, match="need finite weights >= 0 of the objective"):
            ask(objective=objective)
    with pytest.raises(BadField, match="objective: unknown name 'cost'"):
        ask(objective="cost")
    for carbon in (dict(objective="co2"), dict(budget=make_budget(max_kg_co2_per_h=1.0))):
        with pytest.raises(ValueError, match="need kg_co2_per_kwh > 0 to count carbon, got 0"):
            ask(**carbon)
    assert [*itertools.chain(ask(objective=Weights(gpus_of={"b200": 1.0, "h100": 2.0})).kinds)] == ["h100", "b200"]
    assert ask().specs == tuple(
        EngineSpec(gpu, precision="bf16", kv_precision="bf16", source="projected") for gpu in ("h100", "b200")
    )
