"""Lanes of two stages: their law and its limits, what they are sized by, and the exact search over them and lanes of
one stage together, against every lane tried one by one."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import few_lengths
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetopt_jax._optimize import exact
from fleetopt_jax._optimize.front import Front
from fleetopt_jax._optimize.pareto import pareto
from fleetopt_jax._optimize.plan import Infeasible
from fleetopt_jax._optimize.problem import Problem, make_problem
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax._optimize.sweep import CLOSE
from fleetopt_jax._simulate import simulate
from fleetopt_jax._simulate.staged import handed_over_s
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.links import LINKS, build_pair, kv_link, n_links
from fleetopt_jax.catalog.spec import EngineSpec, KvLink, TwoStageSpec
from fleetopt_jax.catalog.workloads import made_workload
from fleetopt_jax.cli.codes import BAD_INPUT
from fleetopt_jax.cli.inputs import stage_specs_of
from fleetopt_jax.cli.main import main
from fleetopt_jax.cli.parser import make_parser
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.struct import stack
from fleetopt_jax.documents.front import front_to_json, load_front, save_front
from fleetopt_jax.documents.plan import load_plan, save_plan
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED
from fleetopt_jax.fleet.engine import EnginePair
from fleetopt_jax.fleet.evaluate import evaluate, fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet, fleet_of, make_fleet, make_slo, with_limits
from fleetopt_jax.fleet.limits import ROUNDING, itl_excess, load_excess, ttft_excess
from fleetopt_jax.fleet.parts import SHARES, Terms, parts_of
from fleetopt_jax.fleet.resources import make_budget
from fleetopt_jax.fleet.sizing import part_instances, required_instances, size_fleet
from fleetopt_jax.fleet.stage import setting_of
from fleetopt_jax.fleet.surroundings import make_surroundings
from fleetopt_jax.fleet.traffic import route
from fleetopt_jax.laws.gated import gated_batches
from fleetopt_jax.laws.hand_over import make_hand_over
from fleetopt_jax.report.pareto import front_csv, front_table
from fleetopt_jax.workload.atoms import Workload, make_workload

SAME = 1e-9
SERVING = "vllm-0.11"  # of simple laws, whose programs compile quickly
LLM = "llama-3.1-8b"
WAY = make_hand_over(bytes_per_token=131_072, bytes_per_s=50e9, latency_s=1e-5)
AROUND = make_surroundings()


def specs_of(gpus: Sequence[str], tps: Sequence[int]) -> list[EngineSpec]:
    return [EngineSpec(gpu, LLM, tp=tp, serving=SERVING, own_fit=False) for gpu in gpus for tp in tps]


@pytest.fixture(scope="module")
def pair() -> EnginePair:
    return build_pair(TwoStageSpec(*specs_of(["h100"], [2, 4]), LINKS["infiniband"]))


# --- the exact search against every lane ------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="assumptions")
def _lanes(servers, shares, windows, workload, slo, *, assumptions):
    """(watts, whether all limits hold, whether any number does) [P, M, S, 2] of both lanes of fleets of two, the same
    pair in both, cut at each of the windows [M, 2], sized on each of the shares."""
    setting = setting_of(workload, AROUND, assumptions)

    def fleet(pair, cut, share):
        lanes = fleet_of([pair] * 2, cut, jnp.ones(2), jnp.ones((2, 2)))
        traffic = route(lanes, workload, assumptions)
        parts = parts_of(pair.prefill, pair.decode, Terms(pair.hand_over, share))
        n = jax.vmap(
            lambda pool, window: jnp.stack([part_instances(part, pool, window, slo, setting) for part in parts])
        )(traffic, cut)
        finite = jnp.where(jnp.isfinite(n), n, 1.0)
        pools = fleet_metrics(lanes.with_instances(finite), traffic, workload, assumptions, quantiles=False).pools
        return pools.power_w, _held(pools, slo), jnp.all(jnp.isfinite(n), axis=1)

    per_share = jax.vmap(fleet, (None, None, 0))
    return jax.lax.map(lambda pair: jax.vmap(per_share, (None, 0, None))(pair, windows, shares), servers)


@partial(jax.jit, static_argnames="assumptions")
def _whole_lanes(engines, windows, workload, slo, *, assumptions):
    """The same of lanes of one stage [E, M, 2]."""
    setting = setting_of(workload, AROUND, assumptions)

    def fleet(engine, cut):
        lanes = fleet_of([engine] * 2, cut, jnp.ones(2), jnp.ones(2))
        traffic = route(lanes, workload, assumptions)
        n = jax.vmap(lambda pool, window: required_instances(engine, pool, window, slo, setting))(traffic, cut)
        finite = jnp.where(jnp.isfinite(n), n, 1.0)
        pools = fleet_metrics(lanes.with_instances(finite), traffic, workload, assumptions, quantiles=False).pools
        return pools.power_w, _held(pools, slo), jnp.isfinite(n)

    return jax.lax.map(lambda engine: jax.vmap(fleet, (None, 0))(engine, windows), engines)


def _held(pools, slo):
    return jnp.max(jnp.stack([rule(pools, slo) for rule in (load_excess, ttft_excess, itl_excess)]), axis=0) <= ROUNDING


def cheapest_of_all(problem: Problem, serve: str) -> float:
    """The least watts of every fleet of at most two lanes cut at any length, each served by any spec, by any pair of
    them on any share of the limit, or by either."""
    lengths = np.unique(np.asarray(problem.workload.prompt_tokens + problem.workload.output_tokens))
    cuts = np.column_stack(
        [np.append(lengths[:-1], problem.window_tokens), np.full(len(lengths), problem.window_tokens)]
    )
    about = {"assumptions": problem.assumptions}
    ways = []  # [., M, 2]
    if serve != "disaggregated":
        engines = jax.tree.map(jnp.asarray, stack([build(spec) for spec in problem.specs]))
        watts, held, finite = _whole_lanes(engines, cuts, problem.workload, problem.slo, **about)
        assert np.all(held | ~finite)
        ways.append(np.where(finite, watts, np.inf))
    if serve != "mixed":
        service = problem.service
        stages = (service.prefill_specs or problem.specs, service.decode_specs or problem.specs)
        pairs = [build_pair(TwoStageSpec(a, b, service.link)) for a in stages[0] for b in stages[1]]
        servers = jax.tree.map(jnp.asarray, stack(pairs))
        watts, held, finite = _lanes(servers, jnp.array(SHARES), cuts, problem.workload, problem.slo, **about)
        assert np.all(held | ~finite)  # stages that hold their parts of the limits make lanes that hold the limits
        of_pairs = np.moveaxis(np.where(finite, watts, np.inf), 2, 1)
        ways.append(of_pairs.reshape(-1, *of_pairs.shape[2:]))
    best = np.min(np.concatenate(ways), axis=0)  # [M, 2]
    best[-1, 1] = 0.0  # cut at the promised window: one lane
    return float(np.min(np.sum(best, axis=1)))


def problem_of(workload: Workload, specs: Sequence[EngineSpec], **more) -> Problem:
    return make_problem(workload, specs, n_pools=2, objective="power", **more)


def assert_equals_brute_force(problem: Problem) -> list[float]:
    """Lanes of one stage, of two, and of either: each as every lane tried; the last no worse than the others."""
    costs = []
    for serve in ("mixed", "disaggregated", "any"):
        found, brute = exact.search(problem.serving(serve=serve)), cheapest_of_all(problem, serve)
        assert found.certified
        assert found.cost == brute or found.cost == pytest.approx(brute, rel=SAME), serve
        costs.append(found.cost)
    assert costs[2] <= min(costs[:2]) * (1.0 + SAME)
    return costs


@pytest.mark.slow
def test_equals_brute_force_over_both_kinds_of_lanes():
    specs = specs_of(["h100"], [1, 2])
    for slo in (make_slo(ttft_p99_s=0.25, itl_s=0.02), make_slo(ttft_p99_s=1.0)):
        mixed, staged, _ = assert_equals_brute_force(problem_of(few_lengths(4000.0), specs, slo=slo))
        assert np.isfinite([mixed, staged]).all()


@pytest.mark.slow
def test_equals_brute_force_where_stages_have_specs_of_their_own():
    """GPU, TP, clock and tokens of a step: each stage of its own, pools served whole of none of them. More to choose
    from is never worse."""
    whole, _, larger = specs_of(["h100"], [1, 2, 4])
    prefill = [replace(larger, clock_frac=0.8), replace(larger, tp=2, max_num_batched_tokens=2048)]
    decode = [replace(larger, gpu="h200", tp=1), replace(larger, tp=2, max_num_seqs=64)]
    workload, slo = few_lengths(4000.0), make_slo(ttft_p99_s=0.25, itl_s=0.02)
    found = {}
    for serve in ("disaggregated", "any"):
        problem = problem_of(workload, [whole], serve=serve, slo=slo, prefill_specs=prefill, decode_specs=decode)
        plan = optimize(problem)
        assert plan.status == "optimal" and plan.search.n_engines == 5
        assert float(plan.metrics.power_w) == pytest.approx(cheapest_of_all(problem, serve), rel=SAME)
        found[serve] = float(plan.metrics.power_w)
        for lane in plan.lanes:
            assert (
                (lane in problem.specs)
                if len(lane.stages) == 1
                else (lane.prefill in problem.service.prefill_specs and lane.decode in problem.service.decode_specs)
            )
    assert found["any"] <= found["disaggregated"] * (1.0 + SAME)


def test_specs_of_stages_are_kept_where_their_gpus_are_in_stock():
    """A pool is served by what is left; None where nothing could serve it."""
    whole, other = specs_of(["h100", "h200"], [2])
    workload = few_lengths(100.0)
    staged = problem_of(workload, [whole], serve="disaggregated", prefill_specs=[whole, other], decode_specs=[other])
    assert staged.kinds == ("h100", "h200") and len(staged.offers.each) == 3 * len(SHARES)
    left = staged.keeping(lambda spec: spec.gpu_name == "h200")
    assert left is not None and {offer.spec for offer in left.offers.each} == {problem_of(workload, [other]).specs[0]}
    assert staged.keeping(lambda spec: spec.gpu_name == "h100") is None
    assert problem_of(workload, [whole]).keeping(lambda spec: spec.gpu_name == "h200") is None


@pytest.mark.nightly
@settings(max_examples=2, deadline=None)
@given(st.data())
def test_equals_brute_force_with_two_gpus_and_tp_1_to_8(data):
    """Heterogeneous pairs among the 16; random lengths, rates, bursts, limits and links."""
    total = np.sort(np.array(data.draw(st.lists(st.integers(8, 1600), min_size=8, max_size=8, unique=True))))
    output = np.maximum(1.0, np.floor(total * data.draw(st.floats(0.05, 0.6))))
    share = np.array(data.draw(st.lists(st.floats(0.0, 1.0), min_size=8, max_size=8))) + 1e-3
    rate = data.draw(st.floats(5.0, 2e3))
    workload = make_workload(
        total - output, output, share, arrival_rate_per_s=rate, arrival_scv=data.draw(st.floats(1.0, 9.0))
    )
    slo = make_slo(
        ttft_p99_s=data.draw(st.sampled_from([0.1, 0.5, 2.0])), itl_s=data.draw(st.sampled_from([0.01, 0.03, np.inf]))
    )
    link = KvLink("own", data.draw(st.sampled_from([1e8, 1e9, 5e10])), 1e-4)
    specs = [*specs_of(["h100"], [1, 8]), *specs_of(["h200"], [2, 4])]
    assert_equals_brute_force(problem_of(workload, specs, slo=slo, link=link))


@pytest.mark.slow
def test_under_a_budget_the_best_is_the_best_of_all_that_keep_it():
    """A stock of one GPU less than the best fleet takes: another pair, or lanes of the other kind."""
    specs = specs_of(["h100", "h200"], [2])
    free = problem_of(few_lengths(400.0), specs, serve="any", slo=make_slo(ttft_p99_s=0.25, itl_s=0.02))
    best = optimize(free)
    kinds = dict(zip(best.kinds, np.asarray(best.of_kinds.n_gpus), strict=True))
    scarce = max(kinds, key=lambda gpu: kinds[gpu])
    used = sum(n for gpu, n in zip(best.kinds, np.asarray(best.of_kinds.n_gpus), strict=True) if gpu == scarce)
    short = optimize(replace(free, budget=make_budget(gpus_of={scarce: float(used - 1)})))
    assert short.status == "optimal" and short.cost >= best.cost
    assert short.used[f"gpus_of.{scarce}"] <= used - 1
    assert short.search.lower_bound <= short.cost * (1.0 + SAME)


# --- the law ----------------------------------------------------------------------------------------------------------


def fleet_with(pair: EnginePair, n, window: float = 1600.0) -> Fleet:
    return fleet_of([pair], jnp.array([window]), jnp.ones(1), jnp.asarray(n, dtype=float)[None])


@pytest.fixture(scope="module")
def lanes(pair):
    """Metrics of fleets of one lane, by rows of (instances that prefill, that decode, requests/s, bytes/s, latency):
    one program for all."""

    @jax.jit
    @jax.vmap
    def metrics(row):
        way = replace(pair.hand_over, bytes_per_s=row[3], latency_s=row[4])
        workload = replace(few_lengths(), arrival_rate_per_s=row[2])
        return evaluate(fleet_with(replace(pair, hand_over=way), row[:2]), workload)

    def of(*rows):
        table = np.array([[*row, *(100.0, 1e11, 0.0)[len(row) - 2 :]] for row in rows])
        found = metrics(np.concatenate([table, np.tile(table[-1:], (8 - len(table), 1))]))
        return [jax.tree.map(lambda x, i=i: np.asarray(x)[i], found) for i in range(len(table))]

    return of


@pytest.mark.slow
def test_limits_of_the_way_between_stages(lanes):
    """At infinite bandwidth only the latency is left, and a TTFT is later by exactly that; a slow link is a load."""
    none, late, slow = lanes((2, 2, 100.0, np.inf), (2, 2, 100.0, np.inf, 0.1), (2, 2, 100.0, 1e8))
    assert none.pools.stages.utilization[0, 1] < 0.5
    np.testing.assert_allclose(late.ttft_p99_s - none.ttft_p99_s, 0.1, rtol=1e-6)
    for name in ("power_w", "itl_s", "output_tok_per_s"):
        np.testing.assert_allclose(getattr(late, name), getattr(none, name), rtol=1e-12)
    assert slow.utilization > 1.0 and np.isinf(slow.ttft_p99_s)  # each port would send for longer than there is


def test_stages_do_what_they_are_for(lanes, pair):
    """No prefill in an inter-token latency, whatever prompts there are; each stage as many watts as by itself; more of
    either stage helps what it is for, and nothing else."""
    two, more_prefill, more_decode = lanes((2, 2, 200.0), (4, 2, 200.0), (2, 4, 200.0))
    pools = two.pools
    np.testing.assert_allclose(pools.itl_s, pools.itl_p99_s, rtol=1e-12)
    np.testing.assert_allclose(more_prefill.itl_s, two.itl_s, rtol=1e-12)
    np.testing.assert_allclose(np.sum(pools.stages.power_w), two.power_w, rtol=1e-12)
    np.testing.assert_allclose(more_decode.pools.stages.power_w[0, 0], pools.stages.power_w[0, 0], rtol=1e-12)
    assert more_decode.itl_s < two.itl_s
    assert more_prefill.ttft_p99_s < two.ttft_p99_s
    step_s = float(pair.decode.decode.step_s(pools.stages.n_active[0, 1], 800.0))
    assert 0.5 * step_s < two.itl_s < 2.0 * step_s
    np.testing.assert_array_equal(two.n_gpus, 2 * 2 + 2 * 4)


def test_an_overload_of_either_stage_is_one_of_the_lane(lanes):
    *over, enough = lanes((1, 60, 4e3), (60, 1, 2e4), (0, 60, 4e3), (60, 0, 4e3), (60, 60, 4e3))
    for found in over:
        assert found.utilization > 1.0 and np.isinf(found.ttft_p99_s)
        assert not np.any([np.isnan(np.sum(x)) for x in jax.tree.leaves(found.resources)])
    assert enough.utilization < 1.0 and np.isfinite(enough.ttft_p99_s)


def test_gated_batches_are_those_of_a_queue():
    """Of prompts that share nothing, service s: the busy time is lambda s, and W is Erlang's; of those that share all
    of it, there are more together the more come, and the load stays below one."""
    rate = jnp.linspace(0.5, 9.0, 12)
    alone = jax.vmap(lambda r: gated_batches(lambda k: 0.1 + 0.0 * k, r, jnp.ones(()), jnp.ones(()), sees_idle=True))
    found = alone(rate)
    np.testing.assert_allclose(found.busy_frac, 0.1 * rate, rtol=1e-12)
    np.testing.assert_allclose(found.waits, found.busy_frac, rtol=1e-9)
    m = found.meet_per_s * found.together * found.each_s
    np.testing.assert_allclose(found.together, m + np.exp(-m), rtol=1e-9)
    shared = jax.vmap(lambda r: gated_batches(lambda k: 0.1 / k, r, jnp.ones(()), jnp.ones(()), sees_idle=False))
    together = shared(10.0 * rate).together
    assert np.all(np.diff(together) > 0)
    np.testing.assert_allclose(together[-1], 9.0, rtol=0.01)  # each iteration 0.1 s, whoever is in it


@pytest.mark.nightly
def test_gradients_are_differences_and_stay_finite(pair):
    """In instances, bandwidth, latency and how slow either stage is; where nobody comes, or nobody serves."""
    real = replace(PHYSICAL, rounding="real")
    workload = few_lengths(200.0)

    def values(row):
        slow = replace(
            pair,
            prefill=replace(pair.prefill, prefill=pair.prefill.prefill.slower(row[2])),
            decode=replace(pair.decode, decode=pair.decode.decode.slower(row[3])),
            hand_over=replace(pair.hand_over, bytes_per_s=row[4] * 5e10, latency_s=row[5] * 1e-3),
        )
        metrics = evaluate(fleet_with(slow, row[:2]), workload, real)
        watched = [metrics.tok_per_j, metrics.ttft_p99_s, metrics.itl_s, metrics.usd_per_h]
        return jnp.log(jnp.where(jnp.isfinite(jnp.stack(watched)), jnp.stack(watched), 1.0) + 1e-9)

    base, eps = jnp.array([2.3, 1.7, 1.0, 1.0, 1.0, 1.0]), 1e-4
    edges = [base.at[0].set(0.0), base.at[1].set(0.0), base.at[0].set(1e-3), base.at[4].set(1e-6)]
    slopes = jax.jit(jax.vmap(jax.jacrev(values)))(jnp.stack([base, *edges]))
    steps = eps * jnp.eye(base.size)
    after, before = jnp.split(jax.jit(jax.vmap(values))(jnp.concatenate([base + steps, base - steps])), 2)
    np.testing.assert_allclose(slopes[0].T, (after - before) / (2.0 * eps), rtol=2e-3, atol=1e-4)
    assert np.all(np.isfinite(slopes))


@pytest.mark.slow
def test_a_fleet_may_have_both_kinds_of_lanes(pair):
    """Each lane as in a fleet of its own kind."""
    workload, engine = few_lengths(300.0), build(specs_of(["h100"], [2])[0])
    cut = jnp.array([400.0, 1600.0])

    @jax.jit
    def both():
        mixed = evaluate(fleet_of([engine] * 2, cut, jnp.ones(2), jnp.array([2.0, 4.0])), workload)
        staged = evaluate(fleet_of([pair] * 2, cut, jnp.ones(2), jnp.array([[2.0, 1.0], [3.0, 2.0]])), workload)
        of_both = evaluate(fleet_of([engine, pair], cut, jnp.ones(2), jnp.array([[2.0, 0.0], [3.0, 2.0]])), workload)
        return mixed, staged, of_both

    mixed, staged, of_both = both()
    for name in ("power_w", "ttft_p99_s", "itl_s", "itl_p99_s", "n_gpus", "utilization", "n_instances"):
        found = getattr(of_both.pools, name)
        np.testing.assert_allclose(found[0], getattr(mixed.pools, name)[0], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(found[1], getattr(staged.pools, name)[1], rtol=1e-9, err_msg=name)
    np.testing.assert_array_equal(of_both.pools.stages.n_instances, [[2, 0], [3, 2]])


@pytest.mark.slow
def test_sized_lanes_hold_their_limits(pair):
    slo, workload = make_slo(ttft_p99_s=0.3, itl_s=0.02), few_lengths(2000.0)
    fleet = jax.jit(lambda: size_fleet(fleet_with(pair, [1, 1]), workload, slo))()
    pools = jax.jit(lambda fleet: evaluate(fleet, workload).pools)(fleet)
    assert np.all(np.asarray(_held(pools, slo)))
    assert np.all(np.asarray(fleet.n_instances) >= 1)


# --- simulated, written and read --------------------------------------------------------------------------------------


def test_ports_send_one_cache_after_the_other():
    """First come first served, each port one at a time; a latency keeps no port."""
    way = make_hand_over(bytes_per_token=1.0, bytes_per_s=100.0, latency_s=0.5)
    done_s, prompts = np.array([[0.0, 0.0, 1.0, np.inf]]), np.array([[100, 200, 100, 100]])
    np.testing.assert_allclose(handed_over_s(done_s, prompts, 1, way), [[1.5, 3.5, 4.5, np.inf]])
    np.testing.assert_allclose(handed_over_s(done_s, prompts, 2, way), [[1.5, 2.5, 2.5, np.inf]])
    assert np.all(handed_over_s(done_s, prompts, 9, replace(way, bytes_per_s=np.inf)) == done_s + 0.5)


@pytest.mark.slow
def test_the_law_is_what_a_simulation_sees(pair):
    """Poisson arrivals to two instances of each stage; watts, tokens and the step within 5 %, the P99 within 25 %."""
    fleet, workload = fleet_with(pair, [2, 2]), few_lengths(300.0)
    found = simulate(fleet, workload, n_requests=6000, n_replications=2)
    within = {"tok_per_j": 0.05, "power_w": 0.05, "output_tok_per_s": 0.03, "itl_s": 0.05, "ttft_p99_s": 0.25}
    for name, error in within.items():
        assert found.analytic[name] == pytest.approx(found.metrics[name].mean, rel=error), name
    assert found.n_rejected == 0


@pytest.mark.slow
def test_a_plan_of_two_stages_is_read_back(tmp_path):
    """Its lanes, numbers and certificate; what a file says wrongly of stages is refused by its field."""
    specs, workload = specs_of(["h100"], [1, 2]), few_lengths(4000.0)
    specs = [replace(spec, own_fit=True) for spec in specs]  # which a file can name
    plan = optimize(problem_of(workload, specs, serve="disaggregated", slo=make_slo(ttft_p99_s=0.25, itl_s=0.02)))
    path = tmp_path / "plan.json"
    save_plan(plan, path)
    again = load_plan(path, workload=workload)
    assert (again.lanes, again.status, again.kinds) == (plan.lanes, "optimal", plan.kinds)
    assert float(again.metrics.power_w) == pytest.approx(float(plan.metrics.power_w), rel=SAME)
    np.testing.assert_array_equal(again.fleet.n_instances, plan.fleet.n_instances)
    document = json.loads(path.read_text())
    assert [stage["role"] for stage in document["pools"][0]["stages"]] == ["prefill", "decode"]
    for change, words in (
        ({"serve": "mixed"}, "need 'disaggregated' or 'any'"),
        ({"pools": [document["pools"][0] | {"stages": document["pools"][0]["stages"][::-1]}]}, "prefill stage, then"),
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(BadInput, match=words):
            load_plan(path, workload=workload)


# --- as options name them ---------------------------------------------------------------------------------------------


def options_with(*words: str):
    return make_parser().parse_args(["optimize", f"--llm={LLM}", f"--serving={SERVING}", "--quiet", *words])


def test_stages_have_the_engines_that_the_options_name():
    """What a stage's own engine does not say is the options': here two TPs, and a cap of the sequences."""
    options = options_with("--tp=2,4", "--max-num-seqs=99", "--prefill-gpu=h100:clock=0.7:max_num_batched_tokens=4096")
    (name, prefill), *others = stage_specs_of(options, PHYSICAL).items()
    assert name == "prefill_specs" and not others
    expected = {"clock_frac": 0.7, "max_num_batched_tokens": 4096, "max_num_seqs": 99, "gpu": "h100", "llm": LLM}
    assert [spec.tp for spec in prefill] == [2, 4]
    for spec in prefill:
        assert {field: getattr(spec, field) for field in expected} == expected
    decode = stage_specs_of(options_with("--decode-gpu=h200:tp=1:max_num_seqs=512:precision=fp8,b200"), PHYSICAL)
    found = [(spec.gpu_name, spec.tp, spec.precision, spec.max_num_seqs) for spec in decode["decode_specs"]]
    assert found == [("h200", 1, "fp8", 512), ("b200", 8, "bf16", None)]
    assert stage_specs_of(options_with(), PHYSICAL) == {}
    limited = options_with(
        "--gpu-power-limit-w=500", "--prefill-gpu=h100:power_limit_w=600", "--decode-gpu=h100", "--serving=vllm"
    )
    assert [spec.power_limit_w for specs in stage_specs_of(limited, PHYSICAL).values() for spec in specs] == [600, 500]
    for key, says in (
        ("tp=3", "tp: 3 GPUs cannot share"),
        ("power_limit_w=50", "power_limit_w: 50 W; need above 122 W"),
    ):
        with pytest.raises(BadInput, match=f"--prefill-gpu h100: {says}"):
            stage_specs_of(options_with(f"--prefill-gpu=h100:{key}"), PHYSICAL)
    with pytest.raises(BadInput, match=r"--prefill-gpu mine.json: the file says tp itself"):
        stage_specs_of(options_with("--prefill-gpu=mine.json:tp=4"), PHYSICAL)


# --- fronts -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_front_over_both_kinds_of_lanes(tmp_path):
    """Nothing that the search finds under a point's own TTFT is better; with both kinds the front reaches further."""
    specs = [replace(spec, own_fit=True) for spec in specs_of(["h100"], [2])]  # which a file can name
    problem = problem_of(few_lengths(4000.0), specs, slo=make_slo(ttft_p99_s=0.25, itl_s=0.02))
    mixed, both = (pareto(problem.serving(serve=serve), n_points=6) for serve in ("mixed", "any"))
    assert isinstance(mixed, Front) and isinstance(both, Front) and mixed.certified and both.certified
    assert both.points[0].values[1] <= mixed.points[0].values[1] * CLOSE
    assert both.points[-1].values[0] >= mixed.points[-1].values[0] * (1.0 - SAME)
    assert mixed.hypervolume_missing is not None and both.hypervolume_missing is None
    assert any(len(lane.stages) == 2 for point in both.points for lane in point.plan.lanes)
    for point in both.points:
        tok_per_j, ttft_s = point.values
        under = both.problem.serving(slo=with_limits(both.problem.slo, ttft_p99_s=ttft_s * (1.0 + 1e-9)))
        found = optimize(under)
        assert isinstance(found, Infeasible) or float(found.metrics.tok_per_j) <= tok_per_j * (1.0 + SAME)
    save_front(both, tmp_path / "front.json")
    again = load_front(tmp_path / "front.json", workload=made_workload("few", problem.workload))
    assert [point.plan.lanes for point in again.points] == [point.plan.lanes for point in both.points]
    shown = front_to_json(both)
    rows = list(csv.DictReader(io.StringIO(front_csv(shown))))
    assert all(
        (row["pool_gpu"] == "h100+h100") == bool(point["plan"]["pools"][0].get("stages"))
        for row, point in zip(rows, shown["points"])
        if len(point["plan"]["pools"]) == 1
    )
    assert front_table(shown) is not None


def test_a_front_of_two_stages_is_not_asked_how_sure_it_is(capsys):
    for words in (("--axis", "confidence"), ("--axis", "pools=1,2", "--confidence", "0.9")):
        assert main(["pareto", "--serve", "any", *words]) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert "lanes of two stages (--serve any) are not judged by it yet; need --serve mixed" in line


# --- refused in one line ----------------------------------------------------------------------------------------------


def test_what_two_stages_cannot_be_asked_is_refused_in_one_line(pair):
    workload, specs = few_lengths(100.0), specs_of(["h100"], [2])
    staged = problem_of(workload, specs, serve="disaggregated")
    refused = {
        "method gradient": lambda: optimize(staged, "gradient"),
        "method grid": lambda: optimize(staged, "grid"),
        "a lane of two stages": lambda: fleet_with(pair, [1, 1]).engines,
        "need mixed, disaggregated or any": lambda: problem_of(workload, specs, serve="both"),
        "prefill_specs: pools have one stage": lambda: problem_of(workload, specs, prefill_specs=specs),
        "decode_specs: there are none": lambda: problem_of(workload, specs, serve="any", decode_specs=[]),
        "need the same LLM and KV precision": lambda: problem_of(
            workload, specs, serve="any", decode_specs=[replace(specs[0], kv_precision="fp8")]
        ),
        "need assume physical": lambda: problem_of(workload, specs, serve="any", assumptions=PUBLISHED),
        "need nvlink": lambda: kv_link("pigeons"),
        "above 0": lambda: kv_link("-3"),
        "a pair of each lane": lambda: make_fleet([pair], window_tokens=[1600], n_instances=[3]),
        "need the same of both stages": lambda: build_pair(
            TwoStageSpec(specs[0], replace(specs[0], kv_precision="fp8"), LINKS["nvlink"])
        ),
        "need bytes_per_s > 0": lambda: make_hand_over(bytes_per_token=1.0, bytes_per_s=0.0),
    }
    for words, ask in refused.items():
        with pytest.raises(ValueError) as error:
            ask()
        assert words in str(error.value), words
        assert "\n" not in str(error.value)


def test_links_of_a_request_are_the_gpus_that_have_a_part_of_its_cache():
    assert [n_links(spec) for spec in specs_of(["h100"], [1, 2, 4, 8])] == [1, 2, 4, 8]
    assert n_links(EngineSpec("h100", "deepseek-v3", tp=8)) == 1  # a latent cache is whole on every GPU
