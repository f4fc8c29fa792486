"""Every method against brute force, and what a plan promises: within its limits, never worse with more choice."""

import dataclasses
import json
import math
from functools import partial

import jax
import numpy as np
import pytest
from brute_force import AllFleets, few_lengths, with_less_kv

import fleetopt_jax as fo
from fleetopt_jax._optimize import candidates
from fleetopt_jax._optimize.candidates import gamma_grid
from fleetopt_jax._optimize.plan import Infeasible, Plan, is_plan, require_plan
from fleetopt_jax._optimize.problem import Method, Problem, make_problem, thresholds
from fleetopt_jax._optimize.search import optimize, with_fleet
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec, OwnLaws
from fleetopt_jax.catalog.workloads import load_workload
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.fleet.assumptions import PUBLISHED
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.laws.kv_cache import make_kv_capacity, max_sequences
from fleetopt_jax.workload.atoms import Workload, total_tokens, with_rate

GRADIENT_REACHES = 0.998  # of the exhaustive search's tok/J
published_problem = partial(make_problem, assume="published", assumptions=PUBLISHED)


def assert_within_limits(plan: Plan) -> None:
    metrics, slo = plan.metrics, plan.problem.slo
    assert plan.status in ("optimal", "feasible")
    assert plan.binding is None
    # 1e-12: where instances are filled to the limit exactly, the two ways to divide differ in the last place.
    assert float(metrics.utilization) <= float(slo.max_utilization) * (1 + 1e-12)
    assert float(metrics.ttft_p99_s) <= float(slo.ttft_p99_s)
    assert float(metrics.unserved_frac) < 1e-9
    counts = np.asarray(plan.fleet.n_instances)
    assert np.all((counts >= 1) & (counts == np.floor(counts)))
    windows = np.asarray(plan.fleet.window_tokens)
    assert np.all(np.diff(windows) > 0)
    assert np.all(np.asarray(metrics.pools.n_max) >= 1)
    assert 1 <= len(windows) <= plan.problem.n_pools


def given(plan: Plan) -> Plan:
    """The same fleet, as if a person had typed it in."""
    return with_fleet(plan, plan.fleet)


def infeasible(problem: Problem, method: Method | None = None) -> Infeasible:
    """The refusal of a problem that no fleet solves."""
    answer = optimize(problem, method)
    assert isinstance(answer, Infeasible)
    return answer


# --- brute force in plain Python ------------------------------------------------------------------------------------


def waiting_probability(servers: int, load: float) -> float:
    """Erlang-C by its recursion; 0 once it is certain to be below 1e-12."""
    inverse_b = 1.0
    for c in range(1, servers + 1):
        inverse_b = 1.0 + c / load * inverse_b
        if c > load and inverse_b > 1e14:
            return 0.0
    return 1.0 / (1.0 + (inverse_b - 1.0) * (1.0 - load / servers))


def least_pool(engine: Engine, window: float, requests: list, rate: float, limit_s: float) -> tuple[float, float]:
    """(watts of one GPU an instance, output tokens per second) of the least instances; inf W where none do."""
    step = engine.decode
    if not requests:
        return 0.0, 0.0
    n_max = min(int(float(engine.kv.slot_tokens) / window), int(float(engine.kv.n_blocks) / math.ceil(window / 16)))
    if n_max < 1:
        return math.inf, 0.0
    share = sum(weight for _, weight in requests)
    service = square = chunks_mean = output = 0.0
    for length, weight in requests:
        held = min(length, window)
        prompt = max(1, int(0.8 * held))
        chunks = math.ceil(prompt / float(engine.prefill.chunk_tokens))
        steps = chunks + held - prompt
        seconds = steps * (float(step.base_s) + float(step.per_token_s) * n_max * held)
        service += weight / share * seconds
        square += weight / share * seconds**2
        chunks_mean += weight / share * chunks
        output += weight / share * (length - max(1, int(0.8 * length)))
    alone_s = float(step.base_s) + float(step.per_token_s) * float(engine.prefill.calibration_tokens)
    prefill_s = chunks_mean * alone_s
    if prefill_s > limit_s:
        return math.inf, 0.0
    scv, arrivals = max(0.01, square / service**2 - 1), rate * share
    load = arrivals * service
    n = max(math.ceil(load / n_max) + 1, math.ceil(load / n_max / 0.85))
    while True:
        probability = waiting_probability(n * n_max, load)
        decay = 2 * (n * n_max / service - arrivals) / (1 + scv)
        wait_s = max(0.0, math.log(probability / 0.01)) / decay if probability else 0.0
        if wait_s + prefill_s <= limit_s:
            break
        n += 1
    power, in_flight = engine.power, max(1, math.floor(load / (n * n_max) * n_max))
    x = float(power.steepness) * (math.log2(in_flight) - float(power.log2_half_batch))
    watts = float(power.idle_w) + (float(power.nominal_w) - float(power.idle_w)) / (1 + math.exp(-x))
    return n * watts, arrivals * output


def lengths(problem: Problem) -> list[float]:
    return np.asarray(total_tokens(problem.workload)).tolist()


def brute_force(problem: Problem) -> dict[float, float]:
    """tok/J by short window: two pools, every window at which the traffic of the short one changes."""
    requests = list(zip(lengths(problem), np.asarray(problem.workload.weight).tolist(), strict=True))
    rate, limit_s = float(problem.workload.arrival_rate_per_s), float(problem.slo.ttft_p99_s)
    (engine,) = problem.engines
    found = {}
    for window in {*lengths(problem), *(math.ceil(x / problem.gamma) for x in lengths(problem)), problem.window_tokens}:
        edge = window * problem.gamma
        if edge >= max(lengths(problem)) and edge < problem.window_tokens:
            found[window] = 0.0  # the last pool would be empty and dropped, and with it the window that was promised
            continue
        pools = (
            least_pool(engine, window, [r for r in requests if r[0] <= edge], rate, limit_s),
            least_pool(engine, problem.window_tokens, [r for r in requests if r[0] > edge], rate, limit_s),
        )
        found[window] = sum(tok for _, tok in pools) / sum(watts for watts, _ in pools)
    return found


@pytest.mark.slow
def test_grid_is_the_brute_force_optimum(h100, b200, small_workload):
    for spec, gamma, rate, ttft_s in ((h100, 1.0, 200.0, 0.5), (b200, 1.5, 200.0, 0.5), (h100, 1.25, 2.0, 0.3)):
        slo = make_slo(ttft_p99_s=ttft_s)
        problem = published_problem(with_rate(small_workload, rate), [spec], gamma=gamma, slo=slo)
        by_window = brute_force(problem)
        plan = optimize(problem, "grid")
        assert plan.status == "optimal"
        # 1e-9: prefix sums of 40 terms. The waits decide through whole instances only.
        assert float(plan.metrics.tok_per_j) == pytest.approx(max(by_window.values()), rel=1e-9)
        assert by_window[float(plan.fleet.window_tokens[0])] == pytest.approx(max(by_window.values()), rel=1e-9)
        assert plan.search.n_evaluated == len(by_window)
        assert_within_limits(plan)


# --- the methods ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_grid_is_the_best_of_all_fleets_and_walks_there_where_they_are_too_many(h100, monkeypatch):
    """Over three pools, and over gamma; then with fewer candidates than there are, from the best of which it walks."""
    three = published_problem(few_lengths(), [with_less_kv(h100)], n_pools=3, slo=make_slo(ttft_p99_s=0.3))
    compressed = dataclasses.replace(three, n_pools=2, gamma=None)
    for problem in (three, compressed):
        gammas = gamma_grid(problem)
        best = AllFleets(problem, thresholds(problem), gammas).cheapest(problem.objective_weights)
        plan = optimize(problem, "grid")
        assert_within_limits(plan)
        assert plan.status == "optimal" and plan.cost == pytest.approx(best, rel=1e-9)
        assert (plan.fleet.gamma.max() > 1.0) == (problem is compressed)
        with monkeypatch.context() as few:
            few.setattr(candidates, "FULL", candidates.Effort(every=60, coarse=60))
            walked = optimize(problem, "grid")
        assert walked.status == "feasible"
        assert_within_limits(walked)
        assert best * (1 - 1e-9) <= walked.cost <= 1.01 * best


@pytest.mark.slow
@pytest.mark.parametrize("most", [2, 3])
def test_more_pools_are_never_worse(h100, small_workload, most):
    counts = range(1, most + 1)
    plans = [optimize(published_problem(small_workload, [h100], n_pools=k), "grid") for k in counts]
    reached = [float(plan.metrics.tok_per_j) for plan in plans]
    assert reached == sorted(reached)
    assert reached[1] > 1.2 * reached[0]
    for plan, k in zip(plans, counts, strict=True):
        assert plan.status == "optimal"
        assert_within_limits(plan)
        assert plan.gain_vs_homogeneous == pytest.approx(float(plan.metrics.tok_per_j) / reached[0], rel=1e-12)
        assert plan.search.n_evaluated == math.comb(len(thresholds(plan.problem)) + k - 2, k - 1)


@pytest.mark.slow
def test_more_engines_are_never_worse(h100, b200, small_workload):
    alone = [optimize(published_problem(small_workload, [spec]), "grid") for spec in (h100, b200)]
    both = optimize(published_problem(small_workload, [h100, b200]), "grid")
    assert float(both.metrics.tok_per_j) >= max(float(plan.metrics.tok_per_j) for plan in alone)
    assert both.search.n_evaluated == 2 * sum(plan.search.n_evaluated for plan in alone)
    assert_within_limits(both)


@pytest.mark.slow
def test_a_searched_gamma_is_never_worse_than_a_given_one(h100, small_workload):
    searched = optimize(published_problem(small_workload, [h100], gamma=None))
    assert_within_limits(searched)
    for gamma in (1.0, 1.5, 2.0):
        fixed = optimize(published_problem(small_workload, [h100], gamma=gamma))
        assert float(searched.metrics.tok_per_j) >= float(fixed.metrics.tok_per_j)


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_holds_its_limits_and_evaluates_to_itself(h100, small_workload):
    """At any rate, limit and gamma; also where the load fills instances exactly to the highest utilisation."""
    rng = np.random.default_rng(0)
    rates = np.exp(rng.uniform(np.log(0.05), np.log(2e4), 24))
    first = optimize(published_problem(small_workload, [h100]))
    filled = 0.85 * (np.arange(24) + 1) * 200 / float(first.metrics.pools.utilization[-1] * first.fleet.n_instances[-1])
    for i, rate in enumerate([*rates, *filled]):
        slo = make_slo(ttft_p99_s=rng.choice([0.2, 0.5, 5.0]))
        gamma = [1.0, 1.4, None][i % 3] if i < len(rates) else 1.0
        problem = published_problem(with_rate(small_workload, rate), [h100], gamma=gamma, slo=slo)
        plan = optimize(problem)
        assert_within_limits(plan)
        again = given(plan)
        assert (again.status, again.binding) == ("feasible", None), (rate, gamma)
        jax.tree.map(  # the same program but for the pools dropped as empty
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), again.metrics, plan.metrics
        )


def test_one_instance_less_breaks_a_limit(h100, small_workload):
    plan = optimize(published_problem(small_workload, [h100]))
    for k in range(len(plan.specs)):
        fewer = np.asarray(plan.fleet.n_instances) - (np.arange(len(plan.specs)) == k)
        broken = with_fleet(plan, plan.fleet.with_instances(fewer))
        assert broken.status == "infeasible"
        assert broken.binding.limit in ("utilization", "ttft_p99_s")
        assert broken.binding.value > broken.binding.asked


def test_infeasible_says_what_is_reachable(h100, small_workload):
    answer = infeasible(published_problem(small_workload, [h100], slo=make_slo(ttft_p99_s=1e-3)))
    assert answer.status == "infeasible"
    assert not is_plan(answer)
    assert answer.binding.limit == "ttft_p99_s"
    assert answer.binding.asked == 1e-3
    nearest = answer.binding.nearest_feasible
    with pytest.raises(ValueError, match=f"no fleet holds ttft_p99_s = 0.001; the nearest feasible is {nearest:g}"):
        require_plan(answer)
    enough = optimize(published_problem(small_workload, [h100], slo=make_slo(ttft_p99_s=nearest * (1 + 1e-9))))
    assert_within_limits(enough)
    # Limits are compared to 1e-9: a shortfall must be larger to count.
    short = infeasible(published_problem(small_workload, [h100], slo=make_slo(ttft_p99_s=nearest * (1 - 1e-8))))
    infeasible(short.problem, "gradient")


def test_no_pool_for_the_longest_requests_is_known_before_all_pools_are_tried(h100, small_workload):
    """The answer is that of two pools, and no pool between two boundaries is asked for."""
    slo = make_slo(ttft_p99_s=1e-3)
    two, four = (infeasible(published_problem(small_workload, [h100], n_pools=k, slo=slo)) for k in (2, 4))
    assert four.search.n_evaluated < 1.01 * two.search.n_evaluated and "three and more" not in four.search.candidates
    assert four.binding == two.binding
    some = optimize(published_problem(small_workload, [h100], n_pools=4))
    assert some.search.n_evaluated > 2 * two.search.n_evaluated and "three and more" in some.search.candidates


def test_a_window_no_engine_can_hold_is_infeasible(h100, small_workload):
    cache = make_kv_capacity(n_blocks=1000, slot_tokens=float(build(h100).kv.slot_tokens))
    spec = dataclasses.replace(h100, laws=OwnLaws(kv=cache))
    binding = infeasible(published_problem(small_workload, [spec])).binding
    assert binding.limit == "window_tokens"
    held = binding.nearest_feasible
    assert max_sequences(cache, held) == 1
    assert max_sequences(cache, held + 1) == 0


def test_impossible_problems_are_refused(h100, small_workload):
    longest = float(small_workload.longest_tokens)
    accepted = []
    for bad, says in (
        (dict(window_tokens=longest - 1), f"{longest - 1:g}"),
        (dict(window_tokens=math.nan), "nan"),
        (dict(window_tokens=math.inf), "inf"),
        (dict(n_pools=0), "n_pools >= 1, got 0"),
        (dict(gamma=0.9), "gamma >= 1, got 0.9"),
        (dict(gamma=math.nan), "gamma >= 1, got nan"),
    ):
        try:
            published_problem(small_workload, [h100], **bad)
        except ValueError as refusal:
            assert says in str(refusal)
        else:
            accepted.append(bad)
    assert not accepted
    with pytest.raises(ValueError, match="engine"):
        published_problem(small_workload, [])


# --- the contract ---------------------------------------------------------------------------------------------------

PLAN_FIELDS = {"schema", "status", "assume", "method", "workload", "slo", "pools", "metrics", "search", "power_scope"}
WORKLOAD_FIELDS = {"name", "arrival_rate_per_s", "mean_prompt_tokens", "mean_output_tokens"}
POOL_FIELDS = {"window_tokens", "gpu", "llm", "tp", "n_instances", "n_gpus", "max_num_seqs", "gamma", "traffic_frac"}
POOL_FIELDS |= {"utilization", "n_active", "power_w", "tok_per_j", "ttft_p99_s", "itl_s"}
METRIC_FIELDS = {
    "tok_per_j",
    "output_tok_per_s",
    "power_w",
    "n_instances",
    "n_gpus",
    "usd_per_h",
    "ttft_p99_s",
    "itl_s",
}
METRIC_FIELDS |= {"gain_vs_homogeneous"}


def test_the_plan_file_has_the_fields_others_read(h100, small_workload):
    plan = optimize(published_problem(small_workload, [h100], workload_name="small"))
    document = json.loads(json.dumps(plan_to_json(plan), allow_nan=False))
    assert set(document) >= PLAN_FIELDS
    assert document["schema"] == "fleetopt-plan/1"
    assert (document["status"], document["method"], document["assume"]) == ("optimal", "exact", "published")
    assert document["power_scope"] == "one_gpu_per_instance"
    assert set(document["workload"]) >= WORKLOAD_FIELDS
    assert document["workload"]["name"] == "small"
    assert document["workload"]["arrival_rate_per_s"] == 200.0
    assert document["slo"]["ttft_p99_s"] == 0.5
    assert set(document["search"]) >= {"n_evaluated", "wall_s"}
    pools, metrics = document["pools"], document["metrics"]
    assert len(pools) == 2
    assert all(set(pool) >= POOL_FIELDS for pool in pools)
    assert set(metrics) >= METRIC_FIELDS
    whole = ("window_tokens", "tp", "n_instances", "n_gpus", "max_num_seqs")
    assert all(isinstance(pool[name], int) for pool in pools for name in whole)
    assert all((pool["gpu"], pool["llm"], pool["tp"]) == ("h100", "llama-3.1-70b", 8) for pool in pools)
    assert all(pool["n_gpus"] == 8 * pool["n_instances"] for pool in pools)
    for name in ("n_instances", "n_gpus", "power_w"):
        assert metrics[name] == pytest.approx(sum(pool[name] for pool in pools), rel=1e-12)
    assert sum(pool["traffic_frac"] for pool in pools) == pytest.approx(1.0, abs=1e-12)
    assert metrics["tok_per_j"] == pytest.approx(metrics["output_tok_per_s"] / metrics["power_w"], rel=1e-12)
    assert metrics["ttft_p99_s"] == max(pool["ttft_p99_s"] for pool in pools)
    assert metrics["gain_vs_homogeneous"] == plan.gain_vs_homogeneous


def test_an_infeasible_plan_file_has_no_metrics(h100, small_workload):
    answer = infeasible(published_problem(small_workload, [h100], slo=make_slo(ttft_p99_s=1e-3)))
    document = json.loads(json.dumps(plan_to_json(answer), allow_nan=False))
    assert set(document) >= PLAN_FIELDS | {"binding"}
    assert (document["status"], document["pools"], document["metrics"]) == ("infeasible", [], None)
    assert document["binding"]["nearest_feasible"] > 1e-3


def test_the_function_stays_what_it_is_when_its_room_is_imported(h100, small_workload):
    problem = fo.make_problem(small_workload, [h100], assume="published", assumptions=fo.PUBLISHED)
    plan = fo.optimize(problem, method="exact")
    assert float(plan.metrics.tok_per_j) == float(optimize(problem).metrics.tok_per_j)
    assert fo.optimize is optimize


# --- the figures people quote ---------------------------------------------------------------------------------------


def tok_per_j(workload: Workload, gpu: str, method: str = "grid") -> float:
    plan = optimize(published_problem(workload, [EngineSpec(gpu, source="projected")]), method)
    assert_within_limits(plan)
    return float(plan.metrics.tok_per_j)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpu", "at_least"),
    [
        ("azure-cdf", "h100", 9.31),
        ("azure-cdf", "b200", 15.86),
        ("lmsys-cdf", "h100", 9.28),
        ("lmsys-cdf", "b200", 14.81),
    ],
)
def test_two_pools_reach_the_known_optimum(name, gpu, at_least):
    """At 1,000 requests/s without compression, every length of the CDF tried as the threshold."""
    workload = load_workload(name)
    best = tok_per_j(workload, gpu)
    assert best >= at_least
    assert tok_per_j(workload, gpu, "gradient") >= GRADIENT_REACHES * best


@pytest.mark.slow
@pytest.mark.parametrize("name", ["azure-conv", "azure-code", "mooncake-conv"])
def test_gradient_comes_close_to_the_exhaustive_search_on_traces(name):
    workload = load_workload(name)
    problem = published_problem(workload, [EngineSpec("h100", source="projected")], slo=make_slo(ttft_p99_s=2.0))
    best, found = optimize(problem, "grid"), optimize(problem, "gradient")
    assert_within_limits(found)
    assert float(found.metrics.tok_per_j) >= GRADIENT_REACHES * float(best.metrics.tok_per_j)


@pytest.mark.slow
def test_gradient_searches_engines_without_a_slot_cap(small_workload):
    """The roofline engines of the catalog: any GPU and LLM the paper did not calibrate."""
    spec = EngineSpec("h100", "llama-3.1-8b", 1, source="projected")
    problem = published_problem(small_workload, [spec], slo=make_slo(ttft_p99_s=2.0))
    best, found = optimize(problem, "grid"), optimize(problem, "gradient")
    assert best.gain_vs_homogeneous > 1.05
    assert float(found.metrics.tok_per_j) >= GRADIENT_REACHES * float(best.metrics.tok_per_j)
