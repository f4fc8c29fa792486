"""Searches for prompts that find what the caches of a pool hold: against every fleet, without hits, by dispatch."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from brute_force import with_less_kv

from fleetopt_jax._optimize import candidates
from fleetopt_jax._optimize.changes import affinity
from fleetopt_jax._optimize.front import Front
from fleetopt_jax._optimize.levers import pull_levers
from fleetopt_jax._optimize.pareto import pareto
from fleetopt_jax._optimize.plan import Infeasible, Plan, Search, Unreachable, require_plan
from fleetopt_jax._optimize.problem import Problem, make_problem, thresholds
from fleetopt_jax._optimize.search import default_method, optimize, with_fleet
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.fleet.assumptions import (
    DISPATCHES,
    PHYSICAL,
    PREFIX_CACHES,
    Assumptions,
    ConstantHits,
    PrefixAffinity,
    WorkingSetCache,
)
from fleetopt_jax.fleet.choices.tail import MeanPrefillTail
from fleetopt_jax.fleet.evaluate import PoolMetrics, evaluate
from fleetopt_jax.fleet.fleet import Fleet, fleet_of, make_slo
from fleetopt_jax.fleet.sizing import least_held, size_fleet
from fleetopt_jax.workload.atoms import Workload, make_workload
from fleetopt_jax.workload.blocks import Blocks
from fleetopt_jax.workload.compress import compress_with_members
from fleetopt_jax.workload.reuse import reuse_of

SPEC = EngineSpec("h100", own_fit=False, serving=MEASURED_SERVING)
CACHED = replace(PHYSICAL, prefix_cache=WorkingSetCache(), dispatch=PrefixAffinity(), tail=MeanPrefillTail())
RATE_PER_S = 20.0
SLO = make_slo(ttft_p99_s=3.0)


@pytest.fixture(scope="module")
def workload() -> Workload:
    """Conversations that come and go, in 24 atoms."""
    rng = np.random.default_rng(0)
    open_ones: list[list[int]] = []
    requests, fresh = [], 0
    for _ in range(1500):
        if open_ones and rng.random() < 0.7:
            blocks = open_ones[rng.integers(len(open_ones))]
        else:
            blocks = []
            open_ones = [*open_ones, blocks][-60:]
        more = int(rng.geometric(0.25))
        blocks += range(fresh, fresh + more)
        fresh += more
        requests.append(list(blocks))
    prompts = np.array([512.0 * len(blocks) - int(rng.integers(512)) for blocks in requests])
    outputs = rng.integers(50, 400, len(requests)).astype(float)
    counts = np.array([len(blocks) for blocks in requests])
    ids = np.unique(np.concatenate([np.array(each) for each in requests]), return_inverse=True)[1]
    blocks = Blocks(ids, counts, 512)
    atoms, atom = compress_with_members(prompts, outputs, max_atoms=24)
    reuse = reuse_of(blocks, prompts, prompts + outputs, atom)
    return make_workload(*atoms, arrival_rate_per_s=RATE_PER_S, reuse=reuse)


def problem_of(workload: Workload, assumptions: Assumptions = CACHED, **more) -> Problem:
    """Two pools of engines whose KV memory is short."""
    return make_problem(workload, [with_less_kv(SPEC, 10.0)], slo=SLO, assumptions=assumptions, **more)


NS = np.arange(1.0, 25.0)  # instances that the brute force tries of each pool


@jax.jit
def _tried(fleet: Fleet, windows: jax.Array, instances: jax.Array, workload: Workload):
    """The pools of two-pool fleets with a short window [M], each with every number of instances [N]: [M, N, 2]."""

    def one(window: jax.Array, n: jax.Array) -> PoolMetrics:
        both = jax.numpy.stack([window, fleet.window_tokens[-1]])
        there = fleet_of(fleet.engines, both, fleet.gamma, jax.numpy.stack([n, n]))
        return evaluate(there, workload, CACHED).pools

    return jax.lax.map(lambda window: jax.vmap(one, (None, 0))(window, instances), windows)


def brute_force(problem: Problem) -> tuple[dict[float, float], PoolMetrics]:
    """Least watts by short window, inf where no instances hold the limits: no search in it, each pool by trial."""
    options = thresholds(problem)
    fleet = problem.fleet(problem.specs * 2, [1.0, problem.window_tokens], np.ones(2), np.ones(2))
    pools = jax.tree.map(np.asarray, _tried(fleet, options, NS, problem.workload))
    held = (pools.ttft_p99_s <= float(SLO.ttft_p99_s)) & (pools.utilization <= float(SLO.max_utilization))
    least = np.where(held.any(axis=1), held.argmax(axis=1), -1)
    rows = np.arange(len(options))[:, None], least, np.arange(2)
    watts = np.where(least >= 0, pools.power_w[rows], np.inf)
    busy = pools.traffic_frac[:, 0] > 0
    return dict(zip(options.tolist(), np.where(busy, watts, 0.0).sum(axis=1).tolist(), strict=True)), pools


@pytest.fixture(scope="module")
def everything(workload) -> tuple[dict[float, float], PoolMetrics]:
    return brute_force(problem_of(workload))


@pytest.fixture(scope="module")
def plan(workload) -> Plan:
    return require_plan(optimize(problem_of(workload)))


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_grid_is_the_best_of_all_fleets_and_proves_nothing(plan, everything):
    by_window, _ = everything
    best, alone = min(by_window.values()), by_window[plan.problem.window_tokens]
    assert (plan.method, plan.status) == ("grid", "feasible")
    assert "no proof is given" in plan.search.candidates
    assert plan.search.lower_bound is None
    assert plan.search.n_evaluated == len(by_window)
    assert plan.cost == pytest.approx(best, rel=1e-9)
    assert by_window[float(plan.fleet.window_tokens[0])] == pytest.approx(best, rel=1e-9)
    assert best < 0.95 * alone  # so that the split is worth its loss of reuse
    assert plan.one_pool is not None
    assert plan.one_pool.power_w == pytest.approx(alone, rel=1e-9)
    assert plan.gain_vs_homogeneous == pytest.approx(alone / best, rel=1e-9)
    again = with_fleet(plan, plan.fleet)
    assert again.binding is None
    assert again.gain_vs_homogeneous == pytest.approx(plan.gain_vs_homogeneous, rel=1e-9)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), again.metrics, plan.metrics)


@pytest.mark.slow
def test_more_instances_find_more_and_go_on_holding_the_limits(everything):
    """Behind prefixes; so that there is a least number of instances."""
    _, pools = everything
    held = (pools.ttft_p99_s <= float(SLO.ttft_p99_s)) & (pools.utilization <= float(SLO.max_utilization))
    assert not np.any(held[:, :-1] & ~held[:, 1:])
    assert np.all(np.diff(pools.prefix_hit_frac, axis=1) > -1e-9)
    assert np.all(np.diff(pools.utilization, axis=1) <= 1e-9)
    assert np.any(pools.prefix_hit_frac[:, -1] > pools.prefix_hit_frac[:, 0] + 0.3)


@pytest.mark.slow
def test_where_candidates_are_dear_few_are_tried_and_the_best_walked_to(workload, everything, monkeypatch):
    monkeypatch.setattr(candidates, "SPARING", candidates.SPARING._replace(every=12, coarse=12))
    walked = require_plan(optimize(problem_of(workload)))
    best = min(everything[0].values())
    assert best * (1 - 1e-9) <= walked.cost <= 1.02 * best


@pytest.mark.slow
def test_without_hits_the_search_is_as_without_a_cache(workload):
    reuse = workload.reuse
    nothing = replace(reuse, cached_tokens=0 * reuse.cached_tokens, cached_tokens2=0 * reuse.cached_tokens2)
    found = require_plan(optimize(problem_of(replace(workload, reuse=nothing))))
    usual = require_plan(optimize(problem_of(workload, replace(CACHED, prefix_cache=PREFIX_CACHES["none"])), "grid"))
    np.testing.assert_array_equal(found.fleet.window_tokens, usual.fleet.window_tokens)
    np.testing.assert_array_equal(found.fleet.n_instances, usual.fleet.n_instances)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), found.metrics, usual.metrics)


@pytest.mark.nightly
def test_affinity_never_needs_more_instances_than_chance(workload):
    problem = problem_of(workload)
    windows = np.array([1000.0, 3011.0, 8000.0, problem.window_tokens])

    def sized(assumptions: Assumptions) -> np.ndarray:
        def one(window: jax.Array, rate_per_s: jax.Array) -> jax.Array:
            both = jax.numpy.stack([window, jax.numpy.asarray(problem.window_tokens)])
            fleet = problem.fleet(problem.specs * 2, both, np.ones(2), np.ones(2))
            moved = replace(workload, arrival_rate_per_s=rate_per_s)
            return size_fleet(fleet, moved, SLO, assumptions).n_instances

        return np.asarray(jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(windows, np.array([4.0, 20.0, 60.0])))

    affinity, chance = sized(CACHED), sized(replace(CACHED, dispatch=DISPATCHES["random"]))
    assert np.all(affinity <= chance)
    assert np.any(affinity < chance)
    assert np.all(np.isfinite(chance))


def test_the_least_is_found_beyond_an_overload():
    """Whose latency is inf: with what is found at best the load alone needs fewer instances than with what is found."""
    for least in range(4, 40):
        at = least_held(np.array(3.0), np.array(60.0))
        while at.is_open:
            at = at.after(np.array(np.inf if at.trial < least else 0.7 * least / at.trial - 1.0))
        assert at.found == least


@pytest.mark.nightly
def test_a_front_is_of_plans_that_find_what_their_caches_hold(workload):
    """Each point is a grid search of its own; none is certified."""
    front = pareto(problem_of(workload, n_pools=1), n_points=4)
    assert isinstance(front, Front) and len(front.points) >= 2 and not front.certified
    assert (front.method, front.hypervolume_missing) == ("grid", None)
    assert np.all(np.diff([point.values for point in front.points], axis=0) > 0)  # tokens per joule, and P99 TTFT
    for point in front.points:
        assert np.max(np.asarray(point.plan.metrics.pools.prefix_hit_frac)) > 0.1


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_search_it_is_refused(workload):
    problem = problem_of(workload)
    assert default_method(problem) == "grid"
    assert default_method(problem_of(workload, replace(CACHED, prefix_cache=PREFIX_CACHES["none"]))) == "exact"
    for method in ("exact", "gradient"):
        with pytest.raises(BadInput, match=f"method {method}: .*depends on the instances.*need --method grid"):
            optimize(problem, method)
    with pytest.raises(BadInput, match=r"a free max_num_seqs: .*need --method grid"):
        optimize(replace(problem, free=("max_num_seqs",)))


# --- levers -----------------------------------------------------------------------------------------------------------


def released(problem: Problem, **how) -> tuple[dict[str, Problem], dict[str, str]]:
    """The problem that each lever becomes, and why others are left out; nothing is searched."""

    def search(asked: Problem) -> Infeasible:
        return Infeasible("grid", asked, Search(0, 0.0, "none"), Unreachable("ttft_p99_s", 0.5, 0.6))

    found = pull_levers(problem, next_gpu="b200", search=search, **how)
    return {each.pulled.levers[0].name: each.pulled.plan.problem for each in found.gains}, found.left_out


NONE, CHANCE = replace(CACHED, prefix_cache=PREFIX_CACHES["none"]), replace(CACHED, dispatch=DISPATCHES["jsq"])


@pytest.mark.parametrize(
    ("present", "title"),
    [(replace(NONE, dispatch=DISPATCHES["jsq"]), "prefix caching by the KV memory"), (CHANCE, "dispatch by prefix")],
)
def test_dispatch_by_prefix_is_a_lever_beside_a_share(workload, present, title):
    """With the cache that it needs, where there is none."""
    problem = problem_of(workload, present, n_pools=1)
    found, _ = released(problem)
    assert found["affinity"].assumptions == CACHED
    assert affinity(present).title.startswith(title)
    assert ("prefix_cache" in found) == (present.prefix_cache == PREFIX_CACHES["none"])
    same = {name: each for name, each in found.items() if name not in ("affinity", "prefix_cache")}
    assert {each.assumptions for each in same.values()} == {present}


def test_dispatch_by_prefix_is_left_out_where_it_changes_nothing(workload):
    found, left_out = released(problem_of(workload, n_pools=1))
    assert "affinity" not in found.keys() | left_out.keys()
    for of, assumptions, why in (
        (workload, replace(CHANCE, prefix_cache=ConstantHits(0.3)), "whatever instance it goes to"),
        (replace(workload, reuse=None), NONE, "nor a hit curve"),
    ):
        found, left_out = released(problem_of(of, assumptions, n_pools=1))
        assert "affinity" not in found and why in left_out["affinity"]


def test_levers_of_a_fleet_with_a_cache_size_as_many_fleets_as_can_be(workload):
    """One pool may choose its engine, two have the same; more pools are left out, and refused as the present."""
    one, left_out = released(problem_of(workload, n_pools=1))
    assert one.keys() >= {"routing", "gamma", "tp", "max_num_seqs", "clock", "generation"}
    assert {"pools", "compression", "disaggregate"} <= left_out.keys()
    two, left_out = released(problem_of(workload, n_pools=2))
    assert two.keys() >= {"gamma", "generation", "precision"}
    assert left_out["tp"].startswith("3 engines in 2 pools, each sized with what its caches find")
    with pytest.raises(BadInput, match=r"the present fleet: 3 pools.*need up to 2 pools of one engine"):
        released(problem_of(workload, n_pools=3))


@pytest.mark.nightly
def test_the_gain_of_dispatch_by_prefix_is_that_of_the_plans(workload):
    def search(asked: Problem) -> Plan | Infeasible:
        known = asked.n_pools == 1 and asked.specs == problem.specs
        stays = asked.service.workload is problem.service.workload and asked.assumptions in (NONE, CACHED)
        if known and stays:
            return optimize(asked)
        return Infeasible("grid", asked, Search(0, 0.0, "none"), Unreachable("ttft_p99_s", 0.5, 0.6))

    problem = problem_of(workload, NONE, n_pools=1)
    found = pull_levers(problem, search=search)
    (gain,) = (each for each in found.gains if each.pulled.names == ("affinity",))
    without, cached = (require_plan(optimize(replace(problem, assumptions=each))) for each in (NONE, CACHED))
    assert gain.gain == pytest.approx(float(cached.metrics.tok_per_j / without.metrics.tok_per_j), rel=1e-9)
    assert gain.gain > 1.05 and gain.quality == "law" and gain.interval.low < gain.gain < gain.interval.high


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("optimize", "--method", "exact"), "need --method grid"),
        (("optimize", "--confidence", "0.9"), "--confidence does not take into account yet"),
        (("optimize", "--robust", "cvar"), "--robust does not take into account yet"),
        (("levers",), "'trace' is not a share"),
    ],
)
def test_the_command_line_refuses_in_one_line(asked, says, capsys):
    assert main([*asked, "--workload", "mooncake-conv", "--at", "mean", "--prefix-hit", "trace", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


# --- from the command line --------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_plan_that_was_searched_is_evaluated_to_the_same(tmp_path, capsys):
    """By a trace's own sessions, or a curve; the answer says what is found."""
    trace, curve, place = (str(tmp_path / name) for name in ("trace.jsonl", "curve.csv", "plan.json"))
    rng, turns = np.random.default_rng(0), np.zeros(40)
    rows = []
    for i in range(600):
        who = int(rng.integers(40))
        turns[who] = turns[who] + int(rng.integers(100, 900)) if turns[who] < 6000 else int(rng.integers(100, 900))
        ids = [f"{who}-{k}" for k in range(math.ceil(turns[who] / 512))]
        row = {"timestamp": 200 * i, "input_length": turns[who], "output_length": int(rng.integers(50, 300))}
        rows.append(row | {"hash_ids": ids})
    Path(trace).write_text("\n".join(map(json.dumps, rows)))
    Path(curve).write_text("cache_tokens,hit_frac\n0,0\n100000,0.3\n1000000,0.6\n")
    for hits in ("trace", curve):
        asked = ["--workload", trace, "--prefix-hit", hits, "--dispatch", "affinity", "--rate", "40"]
        asked += ["--ttft-p99-ms", "2000", "--assume", "physical,tail=mean_prefill"]
        assert main(["optimize", *asked, "--out", place, "--quiet"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "of the prompt tokens are found in the prefix cache, by the law of its KV memory" in said
        assert "no proof is given" in said
        found = json.loads(Path(place).read_text())
        assert main(["evaluate", place, *(() if hits == "trace" else ("--prefix-hit", hits)), "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["metrics"] == pytest.approx(found["metrics"], rel=1e-9)
        for one, other in zip(found["pools"], again["pools"], strict=True):
            assert other["prefix_hit_frac"] == pytest.approx(one["prefix_hit_frac"], rel=1e-9)
            assert one["prefix_hit_frac"] > 0.1
