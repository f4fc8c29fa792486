"""Prefix caching: the law against caches that are simulated, the reuse of atoms, and what they do to a fleet."""

import gzip
import json
import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax._simulate import simulate
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.catalog.workloads import load
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.assumptions import (
    DISPATCHES,
    PHYSICAL,
    PREFIX_CACHES,
    PUBLISHED,
    ConstantHits,
    PrefixAffinity,
    WorkingSetCache,
)
from fleetopt_jax.fleet.avoided import avoided_prefill
from fleetopt_jax.fleet.choices.tail import MeanPrefillTail
from fleetopt_jax.fleet.evaluate import evaluate
from fleetopt_jax.fleet.fleet import Fleet, fleet_of
from fleetopt_jax.fleet.traffic import route
from fleetopt_jax.laws.demand import cached_demand, demand, prefill_moments_s
from fleetopt_jax.laws.prefill import make_prefill, prefill_s
from fleetopt_jax.laws.prefix_cache import (
    WorkingSet,
    cache_age_s,
    fresh_tokens,
    hit_frac,
    kept_frac,
    make_host_cache,
    make_working_set,
    settled_place,
    used_within_tokens,
)
from fleetopt_jax.workload.atoms import Workload, make_workload
from fleetopt_jax.workload.blocks import Blocks, blocks_of_sessions, check_blocks, uses_of
from fleetopt_jax.workload.compress import compress_with_members
from fleetopt_jax.workload.readers import read_workload_file
from fleetopt_jax.workload.reuse import check_curve, hit_curve, reuse_of, stream_of, with_age_curve, with_hit_curve

SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the unique blocks
WITHIN = 0.02  # of hit share
SPEC = EngineSpec("h100", own_fit=False, serving=MEASURED_SERVING)
CACHED = replace(PHYSICAL, prefix_cache=WorkingSetCache(), tail=MeanPrefillTail())  # whose programs are small
REAL = replace(CACHED, rounding="real", dispatch=PrefixAffinity())
compiled = jax.jit(evaluate, static_argnames="assumptions")


# --- a stream of conversations, in plain Python -----------------------------------------------------------------------


def conversations(n_requests: int, seed: int = 0) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """(blocks of each request, prompts, outputs) of conversations that come and go, half of which begin with one of a
    few system prompts."""
    rng = np.random.default_rng(seed)
    open_ones: list[list[int]] = []
    requests, fresh = [], 0
    for _ in range(n_requests):
        if open_ones and rng.random() < 0.6:
            blocks = open_ones[rng.integers(len(open_ones))]
        else:
            blocks = [-1 - int(rng.integers(4))] if rng.random() < 0.5 else []
            open_ones.append(blocks)
            open_ones = open_ones[-400:]
        more = int(rng.geometric(0.25))
        blocks += range(fresh, fresh + more)
        fresh += more
        requests.append(list(blocks))
    prompts = np.array([512.0 * len(blocks) - int(rng.integers(512)) for blocks in requests])
    return requests, prompts, rng.integers(50, 400, n_requests).astype(float)


def blocks_of(requests: list[list[int]]) -> Blocks:
    ids = np.unique(np.concatenate([np.array(blocks) for blocks in requests]), return_inverse=True)[1]
    return Blocks(ids, np.array([len(blocks) for blocks in requests]), 512)


def lru_hits(requests: list[list[int]], n_blocks: int) -> int:
    """Blocks found by a cache of so many that evicts the one used longest ago."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for blocks in requests:
        for block in blocks:
            hits += block in cache
            cache[block] = None
            cache.move_to_end(block)
            if len(cache) > n_blocks:
                cache.popitem(last=False)
    return hits


def workload_of(requests: list[list[int]], prompts: np.ndarray, outputs: np.ndarray, most: int = 8192) -> Workload:
    atoms, atom = compress_with_members(prompts, outputs, max_atoms=most)
    reuse = reuse_of(blocks_of(requests), prompts, prompts + outputs, atom)
    return make_workload(*atoms, arrival_rate_per_s=8.0, reuse=reuse)


@pytest.fixture(scope="module")
def stream() -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    return conversations(3000)


@pytest.fixture(scope="module")
def workload(stream) -> Workload:
    return workload_of(*stream, most=150)


@pytest.fixture(scope="module")
def fleet(workload) -> Fleet:
    return fleet_of([build(SPEC)] * 2, [16_384.0, float(workload.longest_tokens)], np.ones(2), [5.0, 6.0])


# --- the law ----------------------------------------------------------------------------------------------------------


def differences(requests: list[list[int]], prompts: np.ndarray) -> np.ndarray:
    """The law's hit share of blocks less that of a simulated cache, at every size."""
    blocks = blocks_of(requests)
    n_unique, law = len(set(blocks.ids)), stream_of(blocks, prompts, in_blocks=True)
    simulated = [lru_hits(requests, max(int(size * n_unique), 1)) / len(blocks.ids) for size in SIZES]
    return np.array([float(hit_frac(law, size * n_unique)) for size in SIZES]) - simulated


def test_the_law_is_an_lru_cache(stream):
    requests, prompts, _ = stream
    assert np.max(np.abs(differences(requests, prompts))) < WITHIN
    curve = hit_curve(blocks_of(requests), prompts)
    n_blocks = sum(map(len, requests))
    assert curve.hit_frac_infinite == pytest.approx(lru_hits(requests, n_blocks) / n_blocks, abs=1e-12)
    assert curve.hit_frac[-1] == pytest.approx(curve.hit_frac_infinite, abs=1e-12)
    assert curve.grid_error < 0.01
    assert np.all(np.diff(curve.hit_frac) >= 0)


@pytest.mark.skipif("FLEETOPT_TRACES" not in os.environ, reason="needs the folder of the Mooncake traces")
@pytest.mark.parametrize(
    ("file", "infinite"),
    [("mooncake_conversation_hashes_first70.jsonl.gz", 0.352), ("mooncake_synthetic_hashes.jsonl.gz", 0.640)],
)
def test_the_law_is_an_lru_cache_of_mooncake(file, infinite):
    with gzip.open(Path(os.environ["FLEETOPT_TRACES"]) / file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    requests, prompts = [row["hash_ids"] for row in rows], np.array([float(row["input_length"]) for row in rows])
    assert np.max(np.abs(differences(requests, prompts))) < WITHIN
    assert hit_curve(blocks_of(requests), prompts).hit_frac_infinite == pytest.approx(infinite, abs=1e-3)


@pytest.mark.parametrize(("name", "infinite"), [("mooncake-conv", 0.352), ("mooncake-synthetic", 0.640)])
def test_bundled_traces_carry_their_reuse(name, infinite):
    found = load(name)
    assert found.prefix is not None
    assert found.workload.reuse is not None
    assert found.prefix.hit_frac_infinite == pytest.approx(infinite, abs=1e-3)
    mean = found.workload.weight @ found.workload.prompt_tokens
    oldest = found.workload.weight @ found.workload.reuse.cached_tokens[:, -1]
    assert oldest / mean == pytest.approx(found.prefix.hit_token_frac[-1], abs=1e-4)  # in single precision


def test_the_law_differentiates_in_cache_rate_and_weights():
    ages = np.array([0.0, 1.0, 4.0, 20.0, 100.0, 1000.0])
    rng = np.random.default_rng(1)
    atoms = np.cumsum(rng.random((7, 6)) * 100.0, axis=1)

    def law(cache, rate, weight):
        reuse = WorkingSet(jnp.asarray(ages), weight @ jnp.full(7, 900.0), weight @ atoms)
        return hit_frac(reuse, cache), cache_age_s(reuse, cache, rate), used_within_tokens(reuse, 7.0 * rate)

    check_grads(jax.jit(law), (50_000.0, 3.0, jnp.asarray(rng.dirichlet(np.ones(7)))), order=1, modes=["fwd", "rev"])
    reuse = make_working_set(age_requests=ages, prompt_tokens=900.0, reused_tokens=atoms[0])
    caches = jnp.geomspace(1.0, 1e7, 500)
    found = jax.vmap(hit_frac, (None, 0))(reuse, caches)
    assert np.all(np.diff(found) >= 0)
    assert found[-1] == pytest.approx(atoms[0, -1] / 900.0)
    # Twice the rate: the same cache keeps blocks half as long, and finds as much.
    assert cache_age_s(reuse, 1e4, 2.0) == pytest.approx(cache_age_s(reuse, 1e4, 1.0) / 2.0)


def test_caches_that_requests_come_to_at_random_keep_what_the_law_says(stream):
    requests, prompts, outputs = stream
    reuse = reuse_of(blocks_of(requests), prompts, prompts + outputs, np.zeros(len(prompts), int))
    tokens = uses_of(blocks_of(requests), prompts).tokens
    for n in (2, 5, 12):
        where, kept, at = np.random.default_rng(n).integers(0, n, len(requests)), 0.0, 0
        seen: list[set[int]] = [set() for _ in range(n)]
        for blocks, cache in zip(requests, where, strict=True):
            for block in blocks:
                kept += tokens[at] * (block in seen[cache])
                at += 1
            seen[cache] |= set(blocks)
        law = kept_frac(1.0 / n, reuse.shares, reuse.kept_frac)[-1] * reuse.cached_tokens[0, -1] * len(prompts)
        assert law / prompts.sum() == pytest.approx(kept / prompts.sum(), abs=WITHIN)
    everything = kept_frac(1.0, reuse.shares, reuse.kept_frac)
    np.testing.assert_allclose(everything, 1.0)


@pytest.mark.slow
def test_pools_split_by_length_lose_what_the_law_says(stream):
    requests, prompts, outputs = stream
    total = prompts + outputs
    workload = workload_of(requests, prompts, outputs)
    tokens = uses_of(blocks_of(requests), prompts).tokens
    routed = jax.jit(route, static_argnames="assumptions")
    for window in np.quantile(total, [0.3, 0.7]):
        kept, at = 0.0, 0
        seen: list[set[int]] = [set(), set()]
        for blocks, pool in zip(requests, (total > window).astype(int), strict=True):
            for block in blocks:
                kept += tokens[at] * (block in seen[pool])
                at += 1
            seen[pool] |= set(blocks)
        fleet = fleet_of([build(SPEC)] * 2, [window, float(total.max())], np.ones(2), np.ones(2))
        lanes = routed(fleet, workload, assumptions=CACHED).reuse
        law = sum(
            float((lane.kept(1.0) * lane.stream.reused_tokens)[-1])
            for lane in (jax.tree.map(lambda x, k=k: x[k], lanes) for k in range(2))
        )
        whole = float(workload.weight @ workload.reuse.cached_tokens[:, -1])
        assert kept / prompts.sum() == pytest.approx(law / prompts.mean(), abs=2 * WITHIN)  # Mooncake: 0.7 points
        assert law < whole


def test_new_tokens_attend_to_the_cached_ones():
    rng = np.random.default_rng(2)
    new, past = rng.uniform(1, 20_000, (2, 500))
    prefill = make_prefill(chunk_tokens=512, calibration_tokens=4096, per_token_s=3e-5, per_token2_s=4e-9, gpu_w=600)
    asked = cached_demand(new, new + past, 1.0, 1.0)
    mean_s, square_s2 = prefill_moments_s(prefill, asked)
    own_s = prefill_s(prefill, new + past) - prefill_s(prefill, past)
    np.testing.assert_allclose(mean_s, own_s, rtol=1e-9)
    np.testing.assert_allclose(square_s2, own_s**2, rtol=1e-9)
    np.testing.assert_allclose(asked.held, demand(new + past, new + past, 1.0, 1.0).held)  # as long as without
    fresh = fresh_tokens(prefill.per_token_s, prefill.per_token2_s, new, past)
    np.testing.assert_allclose(prefill_s(prefill, fresh), own_s, rtol=1e-9)
    np.testing.assert_array_equal(fresh_tokens(prefill.per_token_s, prefill.per_token2_s, new, 0.0 * past), new)


def test_the_least_fixed_point_is_found():
    def place(shift, slope):  # three crossings where the slope is steep: from 0 the lowest is reached
        return settled_place(lambda x: 10.0 * jax.nn.sigmoid(slope * (x - 5.0 + shift)), 10.0)

    shifts = jnp.linspace(-1.0, 1.0, 41)
    found = jax.vmap(place, (0, None))(shifts, 2.0)
    np.testing.assert_allclose(found, 10.0 * jax.nn.sigmoid(2.0 * (found - 5.0 + shifts)), atol=1e-6)
    assert np.all(found[shifts < 0] < 5.0)
    assert np.all(np.diff(found) > 0)
    check_grads(lambda shift: place(shift, 0.2), (0.3,), order=1, modes=["fwd", "rev"])


# --- the fleet --------------------------------------------------------------------------------------------------------


def of_caches(fleet: Fleet, workload: Workload, blocks_factor: float, host_tokens: float):
    """The pools of a fleet whose engines have so many times the KV blocks, and hosts that keep some tokens more."""
    host = replace(make_host_cache(memory_bytes=1.0, bytes_per_s=2e5), **as_floats(tokens=host_tokens))
    engines = [
        replace(each, kv=replace(each.kv, n_blocks=each.kv.n_blocks * blocks_factor), host_cache=host)
        for each in fleet.engines
    ]
    again = fleet_of(engines, fleet.window_tokens, fleet.gamma, fleet.n_instances)
    return evaluate(again, workload, REAL).pools


@pytest.mark.slow
def test_more_cache_never_hurts_and_the_fixed_point_differentiates(fleet, workload):
    program = jax.jit(jax.vmap(of_caches, (None, None, 0, 0)))
    factor = jnp.array([0.15, 0.2, 0.3, 0.5, 1.0, 3.0, 0.15, 0.15, 0.15])
    host = jnp.array([0.0] * 6 + [1e3, 1e5, 1e6])
    pools = program(fleet, workload, factor, host)
    for rows in (slice(0, 6), np.array([0, 6, 7, 8])):
        assert np.all(np.diff(pools.prefix_hit_frac[rows], axis=0) >= -1e-9)
        assert np.all(np.diff(pools.prefill_frac[rows], axis=0) <= 1e-9)
    assert np.any(pools.prefix_hit_frac[5] > pools.prefix_hit_frac[0] + 0.05)
    assert np.any(pools.prefix_hit_frac[8] > pools.prefix_hit_frac[0] + 0.05)

    def found(factor, rate, instances):
        moved = replace(fleet.with_instances(instances), surroundings=fleet.surroundings)
        pools = of_caches(moved, replace(workload, arrival_rate_per_s=rate), factor, 1e5)
        return pools.prefix_hit_frac, pools.prefill_frac, pools.n_active, jnp.log(pools.resources.power_w)

    check_grads(jax.jit(found), (0.17, 8.1, jnp.array([5.0, 6.0])), order=1, modes=["fwd"], rtol=1e-4)


@pytest.mark.slow
def test_without_hits_all_is_as_without_a_cache(workload):
    fleet = fleet_of([build(SPEC)], [float(workload.longest_tokens)], [1.0], [9.0])
    reuse = workload.reuse
    nothing = replace(reuse, cached_tokens=0 * reuse.cached_tokens, cached_tokens2=0 * reuse.cached_tokens2)
    usual = compiled(fleet, workload, assumptions=replace(CACHED, prefix_cache=PREFIX_CACHES["none"]))
    found = compiled(fleet, replace(workload, reuse=nothing), assumptions=CACHED)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), found, usual)


@pytest.mark.nightly
def test_a_constant_share_is_what_a_cache_that_finds_it_gives(workload):
    """Both shorten prompts alike where each finds the same share of itself."""
    fleet = fleet_of([build(SPEC)], [float(workload.longest_tokens)], [1.0], [9.0])
    curve = with_hit_curve(workload, [0.0, 1.0], [0.3, 0.3])
    usual, none = (
        compiled(fleet, curve, assumptions=replace(CACHED, prefix_cache=cache))
        for cache in (PREFIX_CACHES["none"], ConstantHits(0.0))
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), none, usual)
    constant, from_curve = (
        compiled(fleet, curve, assumptions=replace(CACHED, dispatch=PrefixAffinity(), prefix_cache=cache))
        for cache in (ConstantHits(0.3), WorkingSetCache())
    )
    np.testing.assert_allclose(from_curve.pools.prefix_hit_frac, 0.3, rtol=1e-6)
    np.testing.assert_allclose(constant.pools.prefix_hit_frac, 0.3, rtol=1e-6)
    np.testing.assert_allclose(from_curve.tok_per_j, constant.tok_per_j, rtol=1e-6)
    np.testing.assert_allclose(constant.pools.mean_prompt_tokens, from_curve.pools.mean_prompt_tokens, rtol=1e-9)


@pytest.mark.nightly
def test_the_full_tail_reads_what_is_left_of_prompts(fleet, workload):
    """First tokens come earlier, the more is found; by a share of each prompt or by the workload's own reuse."""
    whole = replace(PHYSICAL, dispatch=PrefixAffinity())
    none, some, most = (
        compiled(fleet, workload, assumptions=replace(whole, prefix_cache=cache))
        for cache in (PREFIX_CACHES["none"], ConstantHits(0.2), ConstantHits(0.6))
    )
    found = compiled(fleet, workload, assumptions=replace(whole, prefix_cache=WorkingSetCache()))
    at_random = compiled(fleet, workload, assumptions=replace(PHYSICAL, prefix_cache=WorkingSetCache()))
    assert none.ttft_p99_s > some.ttft_p99_s > most.ttft_p99_s
    assert found.ttft_p99_s < none.ttft_p99_s
    assert np.all(found.pools.prefix_hit_frac > at_random.pools.prefix_hit_frac)
    mass = np.sum(found.pools.ttft.mass, axis=-1)
    np.testing.assert_allclose(mass, 1.0, rtol=1e-9)


@pytest.mark.nightly
def test_the_soft_router_splits_reuse_and_differentiates(fleet, workload):
    def found(window):
        windows = jnp.array([window, float(workload.longest_tokens)])
        moved = fleet_of(fleet.engines, windows, fleet.gamma, fleet.n_instances)
        metrics = evaluate(moved, workload, REAL, router_width=0.1)
        return metrics.tok_per_j, metrics.pools.prefix_hit_frac

    check_grads(jax.jit(found), (9000.0,), order=1, modes=["rev"], rtol=1e-3)


@pytest.mark.slow
def test_a_share_is_searched(workload):
    specs, constant = [SPEC], replace(PHYSICAL, tail=MeanPrefillTail(), prefix_cache=ConstantHits(0.5))
    plan = optimize(make_problem(workload, specs, n_pools=1, assumptions=constant))
    without = optimize(
        make_problem(workload, specs, n_pools=1, assumptions=replace(constant, prefix_cache=PREFIX_CACHES["none"]))
    )
    assert plan.status == without.status == "optimal"
    assert plan.metrics.tok_per_j > without.metrics.tok_per_j


@pytest.mark.slow
def test_what_is_avoided_is_the_law_of_prompts_that_are_computed():
    """Of prompts of one length: tau1 p + tau2 p^2 against tau1 (p - c) + tau2 (p^2 - c^2); watts of prefill in it."""
    one = make_workload([6000.0], [50.0], arrival_rate_per_s=8.0)
    engine = build(EngineSpec("h100", serving="vllm-0.11"))
    assumptions = replace(PHYSICAL, tail=MeanPrefillTail(), prefix_cache=ConstantHits(0.4))
    fleet = fleet_of([engine], [6400.0], [1.0], [30.0])
    pools = compiled(fleet, one, assumptions=assumptions).pools
    avoided = avoided_prefill(fleet, one, pools, assumptions)
    assert float(avoided.tokens_per_s[0]) == pytest.approx(8.0 * 0.4 * 6000, rel=1e-9)
    tau1, tau2 = float(engine.prefill.per_token_s), float(engine.prefill.per_token2_s)
    spared_s = tau1 * 2400 + tau2 * 2400**2
    assert float(avoided.instances[0]) == pytest.approx(8.0 * spared_s, rel=1e-3)
    watts = float(avoided.power_w[0] / avoided.instances[0] / engine.gpus_per_instance)
    assert watts == pytest.approx(float(engine.prefill.gpu_w), rel=1e-6)


@pytest.mark.slow
def test_what_is_avoided_is_what_the_same_fleet_spends_without(fleet, workload):
    """Of instances enough for both, by the operators' law, whose steps do not add up."""
    large = fleet.with_instances(jnp.array([40.0, 40.0]))
    hits = replace(CACHED, dispatch=PrefixAffinity(), prefix_cache=ConstantHits(0.3))
    none = replace(hits, prefix_cache=PREFIX_CACHES["none"])
    pools, without = (compiled(large, workload, assumptions=each).pools for each in (hits, none))
    avoided = avoided_prefill(large, workload, pools, hits)
    np.testing.assert_allclose(avoided.instances, 40 * (without.prefill_frac - pools.prefill_frac), rtol=0.05)
    assert np.all(avoided.power_w > 100 * avoided.instances * 8) and np.all(
        avoided.power_w < 700 * avoided.instances * 8
    )


def test_hosts_hold_tokens_by_the_share_of_each_gpu():
    """Llama 3.1 70B: 320 KiB a token, an eighth of it on each of 8 GPUs; copies of KV heads where there are more."""
    for tp, tokens in ((8, 8e9 / 327_680 * 8), (4, 4 * 8e9 / 327_680), (16, 8 * 8e9 / 327_680)):
        host = build(replace(SPEC, tp=tp, host_cache_bytes=8e9, host_cache_bytes_per_s=2e9)).host_cache
        assert host is not None
        assert (float(host.tokens), float(host.tokens_per_s)) == pytest.approx((tokens, tokens / 4))
    assert build(SPEC).host_cache is None and build(replace(SPEC, host_cache_bytes=0.0)) is build(SPEC)
    for wrong in ({"host_cache_bytes": -1.0}, {"host_cache_bytes": np.inf}, {"host_cache_bytes_per_s": 0.0}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            build(replace(SPEC, **wrong))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host-cache-gb", "100"], "--host-cache-gb: there is no prefix cache"),
        (["--host-cache-gb", "100", "--prefix-hit", "0.3"], "a share of every prompt is found whatever the memory"),
        (["--host-cache-gb-per-s", "20", "--prefix-hit", "trace"], "nothing is kept in the hosts' memory"),
        (["--host-cache-gb", "-1", "--prefix-hit", "trace"], "-1 is not allowed: need a finite number >= 0"),
    ],
)
def test_hosts_that_would_keep_nothing_are_refused(capsys, words, says):
    try:
        code = main(["optimize", "--workload", "mooncake-conv", *words])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err.splitlines()
    assert code == 2
    assert says in said[-1] and sum("warning" not in line and "read" not in line for line in said) == 1


@pytest.mark.slow
def test_a_strict_bound_keeps_caches_nearly_one(fleet, workload):
    """Between chance and a bound that is never met, by how many are in flight."""
    hits = [
        compiled(fleet, workload, assumptions=replace(CACHED, dispatch=DISPATCHES[name])).pools.prefix_hit_frac
        for name in ("random", "bounded_hash", "affinity")
    ]
    assert np.all(hits[0] < hits[1]) and np.all(hits[1] < hits[2])


@pytest.mark.nightly
def test_a_plan_keeps_what_its_hosts_hold(tmp_path, capsys):
    """Given to a plan, written, read again, taken away."""
    bare, tiered = tmp_path / "bare.json", tmp_path / "tiered.json"
    asked = ["--workload", "mooncake-conv", "--rate", "10", "--pools", "1", "--ttft-p99-ms", "20000"]
    fast = ["--assume", "physical,tail=mean_prefill", "--serving", "vllm-0.11", "--dispatch", "affinity"]
    assert main(["optimize", *asked, *fast, "--prefix-hit", "0.3", "--out", str(bare), "--quiet"]) == 0

    def evaluated(file, *words):
        capsys.readouterr()
        main(["evaluate", str(file), *words, "--json"])
        return json.loads(capsys.readouterr().out)

    without = evaluated(bare, "--prefix-hit", "trace")
    hosts = ["--host-cache-gb", "200", "--host-cache-gb-per-s", "40"]
    found = evaluated(bare, "--prefix-hit", "trace", *hosts, "--out", str(tiered))
    assert "host_cache" not in without["pools"][0]
    assert found["pools"][0]["host_cache"] == {"bytes_per_gpu": 200e9, "bytes_per_s_per_gpu": 40e9}
    assert found["pools"][0]["prefix_hit_frac"] > without["pools"][0]["prefix_hit_frac"]
    assert evaluated(tiered)["pools"] == found["pools"]
    assert evaluated(tiered, "--host-cache-gb", "0")["pools"] == without["pools"]
    assert main(["evaluate", str(tiered)]) in (0, 3)
    assert "200 GB of its host's memory" in " ".join(capsys.readouterr().out.split())
    assert main(["export", str(tiered), "--to", "vllm", "--anyway"]) == 0
    assert "--kv-offloading-size" in capsys.readouterr().out


def test_what_a_prefix_cache_needs_is_asked_for(fleet, workload):
    with pytest.raises(ValueError, match="whose reuse is known"):
        evaluate(fleet, replace(workload, reuse=None), CACHED)
    with pytest.raises(ValueError, match="prefill 'compute'"):
        evaluate(fleet, workload, replace(PUBLISHED, prefix_cache=ConstantHits(0.5)))
    with pytest.raises(BadInput, match="from 0 to below 1"):
        ConstantHits(1.0)
    with pytest.raises(BadInput, match="need --method grid"):
        optimize(make_problem(workload, [SPEC], n_pools=1, assumptions=CACHED), "exact")
    with pytest.raises(BadInput, match="no block hashes"):
        simulate(fleet, workload, CACHED)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_sessions_tell_of_prefixes():
    """A turn finds the prompt and the answer before it; one that is shorter begins anew."""
    sessions = np.array([0, 1, 0, -1, 1, 0])
    prompts, outputs = np.array([640.0, 300.0, 1280.0, 900.0, 100.0, 1800.0]), np.full(6, 100.0)
    blocks = blocks_of_sessions(sessions, prompts, outputs, 64)
    uses = uses_of(blocks, prompts)
    found = np.bincount(uses.request, uses.tokens * np.isfinite(uses.age_requests))
    np.testing.assert_array_equal(found, [0, 0, 11 * 64, 0, 0, 21 * 64])
    assert np.bincount(uses.request, uses.tokens).tolist() == prompts.tolist()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([(1000, [1, 2]), (1000, [2, 3])], "row 2: block hash 1 was seen after another one before"),
        (
            [(1000, [1, 2]), (1000, [1, 2, 3])],
            "row 2: 3 block hashes for 1,000 prompt tokens do not match blocks of 512",
        ),
        ([(1000, [*range(16)]), (500, [*range(8)])], "need one a block: --block-tokens 64 fits"),
    ],
)
def test_hashes_that_cannot_be_are_refused(tmp_path, capsys, rows, says):
    file = tmp_path / "bad.jsonl"
    lines = [
        {"timestamp": i, "input_length": p, "output_length": 9, "hash_ids": ids} for i, (p, ids) in enumerate(rows)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert main(["trace", str(file)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_hashes_are_read_whatever_they_are(tmp_path):
    """Numbers, long ones, or texts; as JSON lines or as a list; a csv's are left alone."""
    rows = [
        {"input_length": p, "output_length": 9, "timestamp": i * 1000, "hash_ids": ids}
        for i, (p, ids) in enumerate([(700, [5, 7]), (600, [5, 8]), (1024, [5, 7])])
    ]
    kinds = (lambda i: i, lambda i: 2**63 + i, lambda i: f"h{i}")
    for kind in kinds:
        of_kind = [row | {"hash_ids": [kind(i) for i in row["hash_ids"]]} for row in rows]
        for text in ("\n".join(map(json.dumps, of_kind)), json.dumps(of_kind)):
            file = tmp_path / "trace.jsonl"
            file.write_text(text)
            blocks = read_workload_file(file).blocks
            assert blocks is not None
            assert blocks.ids.tolist() == [0, 1, 0, 2, 0, 1]
    file = tmp_path / "trace.csv"
    file.write_text("input_length,output_length,timestamp,hash_ids\n700,9,0,5 7\n600,9,1000,5 8\n")
    trace = read_workload_file(file)
    assert trace.blocks is None
    assert any("hash_ids" in text for text in trace.understood.warnings)


@pytest.mark.parametrize(
    ("curve", "says"),
    [
        ("cache_tokens,hit_frac\n0,0\n1e6,1.2\n", "need hit_frac from 0 to 1, got 1.2"),
        ("age_s,hit_frac\n-5,0\n1e6,0.2\n", "need finite age_s >= 0, got -5"),
        ("cache_tokens,hit_frac\n0,0.3\n1e6,0.2\n", "need hit_frac that does not fall, got 0.2 after 0.3"),
        ("tokens,hits\n0,0.3\n", "has no hit curve: its columns are tokens, hits"),
    ],
)
def test_a_hit_curve_that_cannot_be_is_refused(tmp_path, capsys, curve, says):
    file = tmp_path / "curve.csv"
    file.write_text(curve)
    assert main(["optimize", "--prefix-hit", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"{file}: {says}" in said
    assert said.count("\n") == 1


def test_a_curve_over_ages_is_one_over_caches(workload):
    ages_s, hits = np.array([0.0, 10.0, 100.0]), np.array([0.0, 0.2, 0.5])
    by_age = with_age_curve(workload, ages_s, hits).reuse
    stream = make_working_set(age_requests=by_age.age_requests, prompt_tokens=100.0, reused_tokens=100.0 * hits)
    np.testing.assert_allclose(by_age.age_requests, 8.0 * ages_s)
    sizes = [float(used_within_tokens(stream, age)) for age in by_age.age_requests]
    scaled = np.array(sizes) / 100.0 * float(workload.weight @ workload.prompt_tokens)
    np.testing.assert_allclose(
        with_hit_curve(workload, scaled, hits).reuse.age_requests, by_age.age_requests, rtol=1e-9
    )
    with pytest.raises(ValueError, match="two cache_tokens or more"):
        check_curve([0.0], [0.5])


@pytest.mark.parametrize("wrong", [{"age_requests": [0, -1]}, {"reused_tokens": [0, 11]}, {"prompt_tokens": 0.0}])
def test_a_working_set_that_cannot_be_is_refused(wrong):
    right = {"age_requests": [0, 1], "prompt_tokens": 10.0, "reused_tokens": [0, 5]}
    make_working_set(**right)
    with pytest.raises(ValueError, match="need"):
        make_working_set(**(right | wrong))


def test_trace_prints_the_hit_curve_and_evaluate_reads_it(tmp_path, capsys, stream):
    requests, prompts, outputs = stream
    file, shape = tmp_path / "trace.jsonl", tmp_path / "curve.json"
    rows = zip(requests[:400], prompts, outputs, strict=False)
    lines = [
        {"timestamp": 250 * i, "input_length": p, "output_length": o, "hash_ids": ids}
        for i, (ids, p, o) in enumerate(rows)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    figure = tmp_path / "figure.svg"
    assert main(["trace", str(file), "--json", "--out", str(shape), "--figure", str(figure)]) == 0
    prefix = json.loads(capsys.readouterr().out)["prefix"]
    assert prefix["block_tokens"] == 512
    assert prefix["curve"][-1]["hit_frac"] == pytest.approx(prefix["hit_frac_infinite"])
    assert figure.stat().st_size > 1000
    curve = load(str(file)).workload
    again = with_hit_curve(
        curve, *zip(*((point["cache_tokens"], point["hit_frac"]) for point in prefix["curve"]), strict=True)
    )
    assert again.reuse is not None
    assert check_blocks("x", blocks_of(requests), prompts, np.arange(len(prompts))) is None


@pytest.mark.nightly
def test_a_plan_keeps_what_its_prompts_find(tmp_path, capsys):
    """Searched with a share, then evaluated with the trace's own reuse; written, read again and exported."""
    plan, traced = tmp_path / "plan.json", tmp_path / "traced.json"
    asked = ["--workload", "mooncake-conv", "--rate", "10", "--pools", "1", "--ttft-p99-ms", "20000"]
    assert (
        main(["optimize", *asked, "--serving", "vllm-0.11", "--prefix-hit", "0.3", "--out", str(plan), "--json"]) == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert document["pools"][0]["prefix_hit_frac"] == pytest.approx(0.3, abs=1e-6)
    assert document["prefill_avoided"]["prompt_frac"] == pytest.approx(0.3, abs=1e-6)
    assert 0 < document["prefill_avoided"]["instances"] < document["metrics"]["n_instances"]
    assert main(["evaluate", str(plan)]) == 0
    assert "Prefill avoided" in capsys.readouterr().out
    for command in (["--prefix-hit", "trace", "--dispatch", "affinity", "--out", str(traced)], []):
        place = plan if command else traced
        main(["evaluate", str(place), *command, "--json"])
        document = json.loads(capsys.readouterr().out)
        assert document["prefix_cache"] == {"name": "working_set"}
        assert document["dispatch"] == "affinity"
        assert 0.1 < document["pools"][0]["prefix_hit_frac"] < document["workload"]["reused_frac"]
    for file, assumed in ((plan, "Assumes that 30 % of the prompt tokens"), (traced, "by a law.")):
        assert main(["export", str(file), "--to", "vllm", "--anyway"]) == 0
        script = capsys.readouterr().out
        assert assumed in script and "--enable-prefix-caching" in script
