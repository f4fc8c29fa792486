"""Fleets under the preset `physical`: hardware, conservation, mixtures of choices, gradients, odd inputs, sizing."""

import itertools
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fleetopt_jax.catalog.engines import EngineEntry, build, engine_entry
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.llms import at_precision, llm_entry
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.catalog.workloads import bundled, load_workload
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED, Assumptions, parse_assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import FleetMetrics, PoolMetrics, evaluate, pool_metrics
from fleetopt_jax.fleet.fleet import Fleet, fleet_of, make_fleet, make_slo
from fleetopt_jax.fleet.limits import excesses, held
from fleetopt_jax.fleet.sizing import least_instances, most_instances, required_instances, size_fleet
from fleetopt_jax.fleet.stage import setting_of
from fleetopt_jax.fleet.surroundings import Site, Surroundings, make_site, make_surroundings
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.laws.compression import Compressor, make_compressor
from fleetopt_jax.laws.demand import demand
from fleetopt_jax.laws.llm import expert_coverage, kv_split, n_active_params
from fleetopt_jax.laws.prefill import prefill_s
from fleetopt_jax.laws.service import step_moments
from fleetopt_jax.workload.atoms import Workload, make_workload, mean_tokens, split_total, total_tokens, with_rate
from fleetopt_jax.workload.compress import compressed

REAL = replace(PHYSICAL, rounding="real")
N_ATOMS = 512


@partial(jax.jit, static_argnames="assumptions")
def compiled(
    fleet: Fleet, workload: Workload, *, assumptions: Assumptions = PHYSICAL, router_width=None
) -> FleetMetrics:
    return evaluate(fleet, workload, assumptions, router_width=router_width)


routed = jax.jit(route, static_argnames="assumptions")


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Llama-3.1-70B on eight H100 by the measured law."""
    return build(EngineSpec("h100", serving=MEASURED_SERVING))


def requests_of(prompts: list[float], outputs: list[float], rate: float) -> Workload:
    """Equally many requests of each kind, in as many atoms as `workload` has: the same shapes compile once."""
    return make_workload(np.resize(prompts, 24), np.resize(outputs, 24), arrival_rate_per_s=rate)


def lane(records, k: int):
    """Of metrics or traffic of all lanes, those of one."""
    return jax.tree.map(lambda x: x[k], records)


def squeezing(**numbers: float) -> Surroundings:
    """Surroundings with such a compressor."""
    return make_surroundings(compressor=make_compressor(**numbers))


def nan_metrics(metrics: FleetMetrics) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(metrics)
    return [jax.tree_util.keystr(path) for path, x in leaves if np.any(np.isnan(x))]


# --- hardware -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twice_the_gpus_at_equal_activity_draw_twice_the_power(engine, workload):
    fleet = make_fleet([engine], window_tokens=[20_480], n_instances=[20])
    doubled = fleet.with_engines([replace(engine, gpus_per_instance=2 * engine.gpus_per_instance)])
    one, two = compiled(fleet, workload), compiled(doubled, workload)
    np.testing.assert_allclose(two.pools.gpu_power_w, one.pools.gpu_power_w, rtol=1e-14)
    np.testing.assert_allclose(two.pools.power_w, 2 * one.pools.power_w, rtol=1e-14)
    assert float(one.power_w) == pytest.approx(20 * 8 * float(one.pools.gpu_power_w[0]), rel=1e-12)


def padded(workload: Workload) -> Workload:
    """The same requests in N_ATOMS atoms: what is missing is filled up with atoms nobody sends."""
    seen = compressed(workload, N_ATOMS)
    missing = N_ATOMS - len(seen.weight)
    filled = {
        name: jnp.pad(getattr(seen, name), (0, missing), mode="edge") for name in ("prompt_tokens", "output_tokens")
    }
    by_prompt = np.argsort(filled["prompt_tokens"], kind="stable")
    return replace(seen, **filled, weight=jnp.pad(seen.weight, (0, missing)), by_prompt=by_prompt)


@pytest.mark.slow
def test_no_plan_computes_or_reads_more_than_its_gpus_can():
    """FLOPs and bytes of the requests counted again, over random fleets of every kind of model within their load."""
    names = [
        ("h100", "llama-3.1-70b", 8),
        ("b200", "llama-3.1-70b", 2),
        ("h100", "qwen3-235b-a22b", 8),
        ("b200", "deepseek-v3", 8),
        ("h100", "gpt-oss-120b", 2),
        ("a100", "llama-3.1-8b", 1),
    ]
    entries = [engine_entry(EngineSpec(*of, own_fit=False)) for of in names]
    specs = [entry.spec for entry in entries]
    records = [at_precision(llm_entry(s.llm).architecture, s.precision, s.kv_precision) for s in specs]
    rng = np.random.default_rng(1)
    workloads = [padded(load_workload(name)) for name in bundled()]
    checked, busiest = 0, []
    for workload, (entry, llm), _ in itertools.product(workloads, zip(entries, records, strict=True), range(2)):
        longest = float(workload.longest_tokens)
        windows = np.array([math.exp(rng.uniform(math.log(64), math.log(longest))), longest])
        gamma = np.array([rng.choice([1.0, 1.5, 2.0]), 1.0])
        workload = with_rate(workload, 10.0 ** rng.uniform(0, 4))
        fleet = make_fleet([entry.engine] * 2, window_tokens=windows, gamma=gamma, n_instances=[1e3, 1e3])
        needed = 1e3 * np.nan_to_num(np.asarray(compiled(fleet, workload).pools.utilization), posinf=1.0)
        fleet = fleet.with_instances(np.ceil(needed / rng.uniform(0.5, 0.999, 2)))
        pools = compiled(fleet, workload).pools
        traffic = routed(fleet, workload, assumptions=PHYSICAL)
        for k in range(2):
            if not 0 < float(pools.utilization[k]) < 1:
                continue
            shares = busy_shares(entry, llm, lane(traffic, k), lane(pools, k))
            # Decode steps and prefill take turns on a GPU, so the sum is bounded too.
            assert sum(shares) < 1, (entry.spec, windows, shares)
            checked += 1
            busiest.append(sum(shares))
    assert checked > 100
    assert max(busiest) > 0.6  # the bound is not met for want of load


def busy_shares(entry: EngineEntry, llm, traffic: PoolTraffic, pools: PoolMetrics) -> tuple[float, float]:
    """Shares of the time in which a pool's GPUs need their full bandwidth for decoding and full FLOP/s for prefill."""
    gpu, tp, mean = GPUS[entry.spec.gpu_name].gpu, entry.spec.tp, traffic.demand
    instance_per_s = float(pools.rate_per_s / pools.n_instances)
    full = 1.0 - float(llm.windowed_frac)  # layers with a window read and compute less than others: left out
    held_tokens = float(mean.held / mean.steps)
    steps_per_s = 1.0 / float(pools.itl_s)
    n = instance_per_s * float(mean.steps) / steps_per_s
    dense, experts = (float(x) for x in (llm.n_dense_params, llm.n_expert_params))
    weights = dense * float(llm.bytes_per_weight)
    weights += float(expert_coverage(llm.expert_share, n)) * experts * float(llm.bytes_per_expert_weight)
    copies = tp / float(kv_split(llm, tp))
    kv_bytes = copies * n * full * held_tokens * float(llm.kv_bytes_per_token)
    decoding = steps_per_s * (weights + kv_bytes) / (tp * float(gpu.bandwidth_bytes_per_s))
    active, attention = float(n_active_params(llm)), full * float(llm.attention_flop_per_token2)
    peak = tp * float(gpu.peak_flop8_per_s if float(llm.eight_bit_frac) else gpu.peak_flop_per_s)
    prefilling = instance_per_s * (2 * active * float(mean.prefill) + attention * float(mean.prefill2) / 2) / peak
    decode_flop = instance_per_s * (2 * active * float(mean.steps) + attention * float(mean.held))
    assert decode_flop / peak + prefilling < 1
    return decoding, prefilling


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_fixed_point_is_the_published_occupancy_where_steps_do_not_depend_on_the_batch(engine, workload):
    """Steps of one length and prompts that take neither steps nor time: n = rho n_max = lambda D t either way."""
    step = jax.tree.map(jnp.zeros_like, engine.decode)
    free = replace(
        engine.prefill, chunk_tokens=jnp.asarray(1e12), per_token_s=jnp.asarray(1e-15), per_token2_s=jnp.zeros(())
    )
    even = replace(engine, decode=replace(step, base_s=jnp.asarray(0.02)), prefill=free)
    fleet = make_fleet([even], window_tokens=[20_480], n_instances=[40])
    published = replace(parse_assumptions("published,lengths=trace"), rounding="real")
    full_batch = compiled(fleet, workload, assumptions=published)
    compute = parse_assumptions("published,lengths=trace,occupancy=fixed_point,prefill=compute")
    fixed_point = compiled(fleet, workload, assumptions=replace(compute, rounding="real"))
    # 1e-8: the 1e-15 s of a prompt's token, and its 1e-12 of a chunk.
    np.testing.assert_allclose(fixed_point.pools.n_active, full_batch.pools.n_active, rtol=1e-8)
    exact = 60.0 * float(mean_tokens(workload)[1]) * 0.02 / 40
    np.testing.assert_allclose(full_batch.pools.n_active, exact, rtol=1e-8)
    np.testing.assert_allclose(fixed_point.itl_s, 0.02, rtol=1e-8)


@pytest.mark.slow
def test_steps_as_long_as_with_full_slots_overstate_what_is_in_flight(engine, workload):
    fleet = make_fleet([engine], window_tokens=[20_480], n_instances=[20])
    chunks, full = (
        replace(parse_assumptions(f"physical,tail=mean_prefill,occupancy={occupancy}"), rounding="real")
        for occupancy in ("fixed_point", "full_batch")
    )
    full_batch = compiled(fleet, workload, assumptions=full).pools
    fixed_point = compiled(fleet, workload, assumptions=chunks).pools
    assert np.all((fixed_point.utilization > 0) & (fixed_point.utilization < 0.9))
    assert np.all(fixed_point.n_active < full_batch.n_active)
    assert np.all(fixed_point.itl_s < full_batch.itl_s)


# --- conservation of traffic ----------------------------------------------------------------------------------------

COMBINATIONS = list(itertools.product(("free", "prompt_only"), ("output_share", "trace")))


def reference_traffic(fleet: Fleet, workload: Workload, assumptions: Assumptions) -> tuple[list[dict], float]:
    """(sums over the requests of each pool, unserved share) by a loop over atoms."""
    windows, engines = np.asarray(fleet.window_tokens), fleet.engines
    edges = np.maximum.accumulate(windows * np.asarray(fleet.gamma))
    only_prompt, traced = assumptions.compression.name == "prompt_only", assumptions.lengths.name == "trace"
    success = float(fleet.surroundings.compressor.success_frac) if only_prompt else 1.0
    total = np.asarray(total_tokens(workload))
    mean_prompt, mean_output = (float(x) for x in mean_tokens(workload))
    share = mean_output / (mean_prompt + mean_output) if traced else 0.2
    pools = [dict(frac=0.0, output=0.0, tried=0.0, sums=np.zeros(14)) for _ in windows]

    def add(k: int, weight: float, prompt: float, output: float, credited: float):
        engine = engines[k]
        chunks = 0.0 if assumptions.prefill.name == "compute" else prompt / float(engine.prefill.chunk_tokens)
        features = [
            *vars(step_moments(chunks, output, prompt + output)).values(),
            *jax.tree.leaves(demand(prompt, prompt, output, output)),
        ]
        pools[k]["frac"] += weight
        pools[k]["output"] += weight * credited
        pools[k]["sums"] += weight * np.array([float(x) for x in features])

    unserved = 0.0
    for length, p, o, weight in zip(
        total,
        np.asarray(workload.prompt_tokens),
        np.asarray(workload.output_tokens),
        np.asarray(workload.weight),
        strict=True,
    ):
        if not traced:
            p, o = (float(x) for x in split_total(length, 0.2, whole=False))
        k = next((k for k in range(len(windows)) if length <= edges[k]), None)
        if k is None:
            unserved += weight
            continue
        as_is = weight
        if length > windows[k]:
            can = not only_prompt or p >= o + 2
            pools[k]["tried"] += weight * p * can
            if only_prompt:
                add(k, weight * success * can, windows[k] - o, o, o)
            else:
                add(k, weight, *(float(x) for x in split_total(windows[k], share, whole=False)), o)
            as_is = weight * (1 - success * can)
        holder = next((j for j in range(len(windows)) if length <= windows[j]), None)
        if holder is None:
            unserved += as_is
        elif as_is:
            add(holder, as_is, p, o, o)
    return pools, unserved


def features(traffic: PoolTraffic) -> np.ndarray:
    """Sums, not means, of the features of a pool."""
    each = jax.tree.leaves((traffic.steps, traffic.demand))
    return np.asarray(traffic.traffic_frac) * np.stack([np.asarray(x) for x in each])


@pytest.mark.slow
@pytest.mark.parametrize(("compression", "lengths"), COMBINATIONS)
def test_traffic_is_conserved_through_compression_and_its_failures(engine, workload, compression, lengths):
    how = f"physical,prefill=free_chunks,tail=mean_prefill,compression={compression},lengths={lengths}"
    chosen = replace(parse_assumptions(how), rounding="real")
    rng = np.random.default_rng(2)
    options = np.asarray(total_tokens(workload))
    scale = features(lane(routed(fleet_of([engine], [1e6], [1.0], [1.0]), workload, assumptions=chosen), 0))
    for success in (0.0, 0.3, 1.0) * 8:
        windows = np.sort(np.where(rng.random(3) < 0.5, rng.choice(options, 3), np.exp(rng.uniform(3, 10, 3))))
        windows += np.arange(3) * 1e-3  # apart
        gamma = np.where(rng.random(3) < 0.3, 1.0, rng.uniform(1.0, 2.0, 3))
        fleet = fleet_of([engine] * 3, windows, gamma, np.ones(3), squeezing(success_frac=success))
        expected, unserved = reference_traffic(fleet, workload, chosen)
        found = routed(fleet, workload, assumptions=chosen)
        assert float(jnp.sum(found.traffic_frac)) + unserved == pytest.approx(1.0, abs=1e-11)
        for traffic, pool in zip((lane(found, k) for k in range(3)), expected, strict=True):
            # Of the whole workload's sums: differences of prefix sums lose what is small beside them.
            assert float(traffic.traffic_frac) == pytest.approx(pool["frac"], rel=1e-9, abs=2e-12)
            assert float(traffic.traffic_frac * traffic.output_tokens) == pytest.approx(
                pool["output"], rel=1e-9, abs=1e-9
            )
            assert float(traffic.compressor_tokens) == pytest.approx(pool["tried"], rel=1e-9, abs=1e-9)
            np.testing.assert_allclose(features(traffic) / scale, pool["sums"] / scale, rtol=1e-9, atol=1e-11)


def test_all_pools_compress_with_the_success_of_their_surroundings(engine, workload):
    shares = []
    for success in (0.0, 0.4, 1.0):
        fleet = fleet_of([engine] * 2, [500.0, 20_480.0], [2.0, 1.0], [1.0, 1.0], squeezing(success_frac=success))
        expected, unserved = reference_traffic(fleet, workload, REAL)
        assert unserved == 0
        found = routed(fleet, workload, assumptions=REAL).traffic_frac
        np.testing.assert_allclose(found, [pool["frac"] for pool in expected], rtol=1e-9)
        shares.append(float(found[0]))
    assert shares[0] < shares[1] < shares[2]


def test_histograms_hold_every_request_of_a_pool(engine, workload):
    around = squeezing(success_frac=0.7, s_per_token=1e-5)
    for window, gamma in ((200.0, 1.0), (700.0, 1.5), (5000.0, 2.0)):
        fleet = fleet_of([engine] * 2, [window, 20_480.0], [gamma, 1.0], [1.0, 1.0], around)
        both = routed(fleet, workload, assumptions=REAL)
        for traffic in (lane(both, k) for k in range(2)):
            cells = traffic.prompts
            assert float(jnp.sum(cells.mass)) == pytest.approx(1.0, abs=1e-12)
            assert np.all(np.asarray(cells.mass) >= 0)
            busy = np.asarray(cells.mass) > 0
            shortest, longest = cells.ends_tokens
            assert np.all((shortest <= longest)[busy])
            # 24 kinds of requests have cells of their own, so the mean prompt is exact.
            middle = (shortest + longest) / 2
            assert float(jnp.sum(cells.mass * middle)) == pytest.approx(float(traffic.demand.prefill), rel=1e-9)


def test_the_soft_router_retries_no_compression_that_failed(engine):
    """A request that one pool failed to compress goes to the first window that holds it as it is, sharply or softly."""
    requests = requests_of([300, 900, 1500, 4000], [50], rate=5.0)
    fleet = fleet_of([engine] * 3, [800.0, 1000, 5000], [2.0, 2, 1], np.ones(3), squeezing(success_frac=0.5))
    hard, soft = (routed(fleet, requests, assumptions=REAL, router_width=w).traffic_frac for w in (None, 1e-4))
    np.testing.assert_allclose(hard, [0.5, 0.125, 0.375], rtol=1e-12)
    np.testing.assert_allclose(soft, hard, rtol=1e-9)


@pytest.mark.slow
def test_no_prompt_shrinks_below_nothing(engine):
    """Whatever gamma a fleet is given: an output that fills the window leaves no room for a prompt."""
    requests = requests_of([2000], [900], rate=5.0)
    fleet = make_fleet([engine] * 2, window_tokens=[800, 3000], gamma=[4, 1], n_instances=[4, 4])
    metrics = compiled(fleet, requests)
    assert np.all(metrics.pools.mean_prompt_tokens >= 0)
    assert np.all(metrics.pools.prefill_frac >= 0)


# --- every mixture of choices ---------------------------------------------------------------------------------------

SWITCHES = ("power_scope", "lengths", "compression", "occupancy", "prefill", "kv_cache", "tail")


def mixtures() -> list[Assumptions]:
    """16 mixtures in which every three of the seven choices take all their eight settings (a 2^(7-3) design)."""
    columns = [[a, b, c, d, a ^ b ^ c, b ^ c ^ d, a ^ c ^ d] for a, b, c, d in itertools.product((0, 1), repeat=4)]
    presets = (PUBLISHED, PHYSICAL)
    return [
        Assumptions(**{name: getattr(presets[x], name) for name, x in zip(SWITCHES, row, strict=True)})
        for row in columns
    ]


@pytest.mark.nightly
def test_every_mixture_of_choices_is_finite(engine, workload):
    fleet = make_fleet([engine] * 2, window_tokens=[900, 20_480], n_instances=[40, 60], gamma=[1.5, 1.0])
    tok_per_j = set()
    for mixture in mixtures():
        metrics = compiled(fleet, workload, assumptions=mixture)
        assert np.all(np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(metrics)]))), mixture
        assert all(np.all(np.asarray(x) >= 0) for x in jax.tree.leaves(replace(metrics, pools=None))), mixture
        assert 0 < float(metrics.utilization) < 1, mixture
        assert float(metrics.ttft_p99_s) > 0
        tok_per_j.add(round(float(metrics.tok_per_j), 9))
    assert len(tok_per_j) > 12  # the choices matter


@pytest.mark.slow
def test_every_mixture_of_choices_compiles(engine, workload):
    fleet = make_fleet([engine] * 2, window_tokens=[900, 20_480], n_instances=[40, 60], gamma=[1.5, 1.0])
    for mixture in mixtures():
        one, other = evaluate(fleet, workload, mixture), compiled(fleet, workload, assumptions=mixture)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-12), one, other)


# --- gradients ------------------------------------------------------------------------------------------------------

WATCHED = ("tok_per_j", "power_w", "ttft_p99_s", "ttft_p99_of_all_s", "itl_s", "usd_per_h")


@jax.jit
def softly(fleet: Fleet, workload: Workload, width: float, all_of_it: bool):
    """((a number from every metric, the metrics), its gradient in fleet and rate): one program for all tests."""

    def value(fleet, rate):
        metrics = evaluate(fleet, replace(workload, arrival_rate_per_s=rate), REAL, router_width=width)
        watched = jnp.stack([getattr(metrics, name) for name in WATCHED])
        everything = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(metrics)])
        everything = jnp.sum(jnp.where(jnp.isfinite(everything), everything, 0.0))
        logs = jnp.log(jnp.where(jnp.isfinite(watched) & (watched > 0), watched, 1.0))
        return jnp.where(all_of_it, everything, jnp.sum(logs * jnp.arange(1.0, len(WATCHED) + 1))), metrics

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(fleet, workload.arrival_rate_per_s)


def rich(engine: Engine) -> Engine:
    """The same engine with every number in play: experts and sliding windows."""
    short = as_floats(expert_s=8e-3, expert_share=1 / 16, windowed_token_s=1e-8, window_tokens=128.0)
    return replace(
        engine,
        decode=replace(engine.decode, **short),
        kv=replace(engine.kv, **as_floats(slot_tokens=1e9, fixed_tokens=64.0)),
    )


RICH = make_surroundings(
    make_site(host_w_per_gpu=150.0, pue=1.2, usd_per_kwh=0.1, kg_co2_per_kwh=0.4),
    make_compressor(success_frac=0.8, s_per_token=1e-6, j_per_token=0.2),
)


@pytest.mark.nightly
def test_the_soft_router_sharpens_to_the_hard_one(engine, workload):
    around = squeezing(success_frac=0.6, s_per_token=1e-6, j_per_token=0.1)
    fleet = fleet_of([engine] * 2, [900.0, 20_480.0], [1.5, 1.0], [12.0, 20.0], around)
    hard = compiled(fleet, workload, assumptions=REAL)
    assert np.all(hard.pools.utilization < 1)
    worst = []
    for width in (0.1, 0.03, 1e-3):
        (_, soft), _ = softly(fleet, workload, width, False)
        pairs = zip(
            jax.tree.leaves(replace(soft.pools, ttft=None, itl=None)),
            jax.tree.leaves(replace(hard.pools, ttft=None, itl=None)),
            strict=True,
        )
        worst.append(max(float(np.max(np.abs(a - 1.0 * b) / (1e-9 + np.abs(b)))) for a, b in pairs))
    assert worst[0] > worst[1] > worst[2]
    assert worst[-1] < 1e-9


@pytest.mark.slow
def test_the_whole_relaxation_is_differentiable(engine, workload):
    """Soft routing and real rounding: central differences in every number of the fleet, engines included."""
    fleet = fleet_of([rich(engine)] * 2, [860.0, 21_000.0], [1.5, 1.0], [2.3, 3.3], RICH)
    (_, metrics), slopes = softly(fleet, workload, 0.1, False)
    assert np.all((metrics.pools.utilization > 0.3) & (metrics.pools.utilization < 0.95))
    leaves, tree = jax.tree.flatten((fleet, workload.arrival_rate_per_s))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(fleet)] + ["rate"]
    exact = [np.ravel(x * slope) for x, slope in zip(leaves, jax.tree.leaves(slopes), strict=True)]
    h, moving = 1e-3, set()  # within which no quantile of this fleet crosses an end of a cell of prompts
    for i, (leaf, name) in enumerate(zip(leaves, names, strict=True)):
        for j in range(jnp.size(leaf)):
            values = []
            for factor in (1 + h, 1 - h):
                nudged = leaves.copy()
                nudged[i] = jnp.ravel(leaf).at[j].multiply(factor).reshape(jnp.shape(leaf))
                moved, rate = jax.tree.unflatten(tree, nudged)
                values.append(float(softly(moved, with_rate(workload, rate), 0.1, False)[0][0]))
            # h^2 of curvature, and over h the rounding of bisected quantiles and integrated tails: some 1e-9.
            assert exact[i][j] == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4, abs=1e-6), name
            moving |= {name.split(".")[-1]} if exact[i][j] else set()
    assert moving >= {"expert_s", "expert_share", "per_token2_s", "success_frac", "pue", "n_instances", "gamma", "rate"}
    assert moving >= {"window_tokens", "j_per_token", "s_per_token", "n_blocks", "host_w_per_gpu", "windowed_token_s"}


@pytest.mark.slow
def test_metrics_and_gradients_stay_finite_at_the_edges(engine, workload):
    """No traffic, no instances, full to the brim, overload, nobody between short and long requests: never nan."""
    needed = float(compiled(make_fleet([engine], window_tokens=[20_480], n_instances=[1.0]), workload).utilization)
    gap = jnp.where((workload.prompt_tokens > 100) & (workload.prompt_tokens < 6000), 0.0, workload.weight)
    apart = replace(workload, weight=gap / jnp.sum(gap))
    cases = {
        "no traffic": (workload, 10.0, 0.0),
        "next to no traffic": (workload, 1.0, 5.0),
        "traffic without instances": (workload, 900.0, 0.0),
        "idle": (workload, 900.0, 1e9),
        "overload": (workload, 900.0, 1e-3),
        "full to the brim": (workload, 20_400.0, needed),
        "a hair below": (workload, 20_400.0, needed * (1 + 1e-12)),
        "a hair above": (workload, 20_400.0, needed * (1 - 1e-12)),
        "next to nothing compressed": (apart, 100.0, 5.0),
    }

    broken = []
    for (name, (requests, window, n)), width in itertools.product(cases.items(), (0.1, 0.01, 1e-3)):
        fleet = make_fleet([engine] * 2, window_tokens=[window, 20_480.0], n_instances=[n, 40.0])
        (_, metrics), slopes = softly(fleet, requests, width, True)
        broken += [(name, width, path) for path in nan_metrics(metrics)]
        broken += [
            (name, width, jax.tree_util.keystr(path))
            for path, slope in jax.tree_util.tree_leaves_with_path(slopes)
            if not np.all(np.isfinite(slope))
        ]
    assert not broken


# --- odd inputs -----------------------------------------------------------------------------------------------------

CASES, ATOMS = 600, 8
many = jax.jit(
    jax.vmap(
        lambda engine, around, requests, windows, gamma, n: evaluate(
            fleet_of((engine,) * 2, windows, gamma, n, around), requests
        )
    )
)
OddCases = tuple[Engine, Surroundings, Workload, np.ndarray, np.ndarray, np.ndarray]


def log_uniform(rng, low: float, high: float, *shape: int) -> np.ndarray:
    return np.exp(rng.uniform(math.log(low), math.log(high), shape or CASES))


def odd_cases(engine: Engine, *, some_output: bool) -> OddCases:
    """Engines from toys to TP 64, one-token prompts, windows from two tokens to a billion, any burstiness and load."""
    rng = np.random.default_rng(4)

    def some(values, p=0.5, otherwise=0.0):
        return np.where(rng.random(np.shape(values)) < p, values, otherwise)

    engine = jax.tree.map(lambda x: np.broadcast_to(np.asarray(x, dtype=float), (CASES, *np.shape(x))), engine)
    decode = dict(base_s=log_uniform(rng, 1e-4, 0.1), per_token_s=some(log_uniform(rng, 1e-10, 1e-6), 0.9))
    decode |= dict(expert_s=some(log_uniform(rng, 1e-4, 0.1)), expert_share=rng.uniform(0, 0.9, CASES))
    decode |= dict(windowed_token_s=some(log_uniform(rng, 1e-10, 1e-6)), window_tokens=some(log_uniform(rng, 100, 1e4)))
    kv = dict(n_blocks=np.floor(log_uniform(rng, 1, 1e6)), max_num_seqs=np.floor(log_uniform(rng, 1, 2048)))
    kv |= dict(fixed_tokens=some(log_uniform(rng, 10, 1e4)))
    prefill = dict(per_token_s=log_uniform(rng, 1e-7, 1e-3), per_token2_s=some(log_uniform(rng, 1e-12, 1e-8)))
    prefill |= dict(budget_tokens=log_uniform(rng, 256, 2**15), gpu_w=rng.uniform(100, 1200, CASES))
    site = dict(host_w_per_gpu=rng.uniform(0, 300, CASES), pue=rng.uniform(1, 2, CASES))
    site |= dict(usd_per_kwh=rng.uniform(0, 0.3, CASES), kg_co2_per_kwh=rng.uniform(0, 0.8, CASES))
    compressor = dict(success_frac=rng.choice([0.0, 0.3, 1.0], CASES), s_per_token=some(np.full(CASES, 1e-5)))
    compressor |= dict(j_per_token=some(np.full(CASES, 0.01)))
    engine = replace(
        engine,
        gpus_per_instance=2.0 ** rng.integers(0, 7, CASES),
        idle_w=rng.uniform(0, 300, CASES),
        **{
            name: replace(getattr(engine, name), **numbers)
            for name, numbers in dict(decode=decode, kv=kv, prefill=prefill).items()
        },
    )
    shape = (CASES, ATOMS)
    prompt = some(np.round(log_uniform(rng, 1, 2e5, *shape)), 0.8, 1.0)
    output = some(np.round(log_uniform(rng, 1, 2e4, *shape)), 0.8, 1.0 if some_output else 0.0)
    order = np.argsort(prompt + output, axis=1)
    prompt, output = (np.take_along_axis(x, order, 1) for x in (prompt, output))
    weight = rng.dirichlet(np.full(ATOMS, 0.3), CASES)
    weight[:100] = np.eye(ATOMS)[rng.integers(0, ATOMS, 100)]  # one kind of request
    longest = (prompt + output)[:, -1]
    requests = Workload(
        prompt_tokens=prompt,
        output_tokens=output,
        weight=weight,
        arrival_rate_per_s=log_uniform(rng, 1e-3, 1e6),
        arrival_scv=rng.choice([0.0, 1.0, 5.0, 200.0], CASES),
        longest_tokens=longest,
        by_prompt=np.argsort(prompt, axis=1, kind="stable"),
    )
    windows = np.stack([log_uniform(rng, 2, 1e6), some(longest + 1, 0.9, 1e9)], axis=1)
    windows = np.sort(windows, axis=1)
    gamma = np.stack([some(rng.uniform(1, 2, CASES), 0.5, 1.0), np.ones(CASES)], axis=1)
    n = some(np.ceil(log_uniform(rng, 0.3, 1e4, CASES, 2)), 0.9)
    return engine, Surroundings(Site(**site), Compressor(**compressor)), requests, windows, gamma, n


@pytest.mark.slow
def test_odd_inputs_give_no_nan_and_nothing_negative(engine):
    broken = {}
    for some_output in (True, False):
        cases = odd_cases(engine, some_output=some_output)
        metrics = many(*cases)
        for path, x in jax.tree_util.tree_leaves_with_path(metrics):
            wrong = ~(np.asarray(x) >= 0)
            if np.any(wrong):
                broken[some_output, jax.tree_util.keystr(path)] = int(np.sum(wrong))
        pools = metrics.pools
        np.testing.assert_allclose(np.sum(pools.traffic_frac, axis=1) + metrics.unserved_frac, 1.0, atol=3e-12)
        loads = np.asarray(pools.utilization)
        assert np.all(np.mean([loads == 0, (loads > 0) & (loads < 1), np.isinf(loads)], axis=(1, 2)) > 0.05)
        # Not one second or watt where nobody comes.
        empty = np.asarray(pools.traffic_frac) == 0
        assert all(
            np.all(np.asarray(x)[empty] == 0) for x in (pools.ttft_p99_s, pools.output_tok_per_s, pools.n_active)
        )
    assert not broken


@pytest.mark.slow
def test_a_finite_ttft_means_there_is_room(engine):
    for some_output in (True, False):
        pools = many(*odd_cases(engine, some_output=some_output)).pools
        waits = np.isfinite(pools.ttft_p99_s)
        assert np.all(np.asarray(pools.output_tok_per_s >= 0)[waits])
        assert np.all(np.asarray(pools.utilization)[waits] < 1)


@pytest.mark.slow
def test_money_carbon_and_watts_add_up(engine):
    cases = odd_cases(engine, some_output=True)
    engine, around, requests, windows, gamma, n = cases
    metrics = many(*cases)
    pools, site = metrics.pools, jax.tree.map(lambda x: x[:, None], around.site)
    gpus = n * engine.gpus_per_instance[:, None]
    np.testing.assert_allclose(pools.n_gpus, gpus, rtol=1e-12)
    total = requests.prompt_tokens + requests.output_tokens
    can = requests.prompt_tokens >= requests.output_tokens + 2
    tried = (total > windows[:, :1]) & (total <= windows[:, :1] * gamma[:, :1]) & can
    joules = np.sum(requests.weight * requests.prompt_tokens * tried, axis=1) * around.compressor.j_per_token
    compressor_w = np.stack([requests.arrival_rate_per_s * joules, np.zeros(CASES)], axis=1)  # tries, not successes
    watts = site.pue * (gpus * (pools.gpu_power_w + site.host_w_per_gpu) + compressor_w)
    np.testing.assert_allclose(pools.power_w, watts, rtol=1e-9)
    assert np.sum(compressor_w > 0) > 5
    money = gpus * engine.usd_per_gpu_h[:, None] + watts / 1e3 * site.usd_per_kwh
    np.testing.assert_allclose(pools.usd_per_h, money, rtol=1e-9)
    np.testing.assert_allclose(pools.kg_co2_per_h, watts / 1e3 * site.kg_co2_per_kwh, rtol=1e-9)
    for name in ("power_w", "usd_per_h", "kg_co2_per_h", "n_gpus", "output_tok_per_s"):
        np.testing.assert_allclose(getattr(metrics, name), np.sum(getattr(pools, name), axis=1), rtol=1e-12)
    np.testing.assert_allclose(
        metrics.tok_per_j * metrics.power_w, metrics.output_tok_per_s * (metrics.power_w > 0), rtol=1e-9
    )


@pytest.mark.slow
def test_latencies_fall_with_instances_and_rise_with_bursts(engine):
    *where, requests, windows, gamma, n = odd_cases(engine, some_output=True)
    n = np.maximum(n, 1.0)
    requests = replace(requests, arrival_scv=np.maximum(requests.arrival_scv, 1.0))
    metrics = many(*where, requests, windows, gamma, n).pools
    more = many(*where, requests, windows, gamma, np.ceil(1.2 * n)).pools
    bursty = many(*where, replace(requests, arrival_scv=3 * requests.arrival_scv), windows, gamma, n).pools
    finite = np.isfinite(metrics.ttft_p99_s) & (np.asarray(metrics.traffic_frac) > 0)
    assert np.sum(finite) > 200

    def at_most(less, most, rtol):
        return np.all((np.asarray(less) <= np.asarray(most) * (1 + rtol))[finite])

    # 4 %: to one instance requests come at any moment of an iteration, to one of two also just as one begins. 2 %: of
    # nearly idle instances, in iterations that have one length, which the inversion of the tail smooths.
    assert at_most(more.ttft_p99_s, metrics.ttft_p99_s, 0.04)
    assert at_most(metrics.ttft_p99_s, bursty.ttft_p99_s, 0.02)
    assert at_most(more.utilization, metrics.utilization, 1e-9)
    assert at_most(more.itl_s, metrics.itl_s, 1e-9)
    assert at_most(more.prefill_frac, metrics.prefill_frac, 1e-9)
    assert at_most(metrics.power_w, more.power_w, 1e-9)
    np.testing.assert_allclose(metrics.output_tok_per_s[finite], more.output_tok_per_s[finite], rtol=1e-9)


@pytest.mark.slow
def test_regular_arrivals_wait_no_longer_with_more_instances(engine):
    """Squared CV 0: requests come like clockwork."""
    *where, requests, windows, gamma, n = odd_cases(engine, some_output=True)
    requests, n = replace(requests, arrival_scv=np.zeros(CASES)), np.maximum(n, 1.0)
    few, more = (np.asarray(many(*where, requests, windows, gamma, k).pools.ttft_p99_s) for k in (n, np.ceil(1.2 * n)))
    assert np.all((more <= few * 1.04) | ~np.isfinite(few))


@pytest.mark.slow
def test_a_tail_is_no_shorter_than_the_prefill_in_it(engine, workload):
    """TTFT holds a request's own prefill, so its P99 holds the P99 of that; all requests' lies between the pools'."""
    for windows, n in (([900, 20_480], [9, 14]), ([3000, 20_480], [12, 9]), ([60, 20_480], [2, 20])):
        metrics = compiled(make_fleet([engine] * 2, window_tokens=windows, n_instances=n), workload)
        assert float(metrics.utilization) < 1
        total, prompt = np.asarray(total_tokens(workload)), np.asarray(workload.prompt_tokens)
        for k, (low, high) in enumerate(itertools.pairwise([0, *windows])):
            mine = (total > low) & (total <= high)
            order = np.argsort(prompt[mine])
            beyond = 1 - np.cumsum(np.asarray(workload.weight)[mine][order]) / np.sum(np.asarray(workload.weight)[mine])
            late = prompt[mine][order][np.argmax(beyond <= 0.01)]
            own_s = prefill_s(engine.prefill, late)
            assert float(metrics.pools.ttft_p99_s[k]) >= float(own_s)
        worst, best = float(jnp.max(metrics.pools.ttft_p99_s)), float(jnp.min(metrics.pools.ttft_p99_s))
        assert best - 1e-9 <= float(metrics.ttft_p99_of_all_s) <= worst + 1e-9
        assert worst == float(metrics.ttft_p99_s)


@pytest.mark.slow
def test_an_itl_quantile_is_no_shorter_than_the_mean(engine):
    """Short prompts at high load: hardly an iteration without several of them."""
    requests = requests_of([100], [300], rate=60.0)
    pools = compiled(make_fleet([engine], window_tokens=[400], n_instances=[2]), requests).pools
    assert 0.8 < float(pools.utilization[0]) < 1
    assert float(pools.itl_p99_s[0]) >= float(pools.itl_s[0])


@pytest.mark.slow
def test_a_compressor_costs_latency_and_energy(engine):
    """One kind of request, too long for the first window: all of it is tried, and what is done is counted."""
    requests = requests_of([1500], [100], rate=5.0)

    def metrics(**numbers) -> FleetMetrics:
        fleet = fleet_of([engine] * 2, [1000.0, 1600.0], [2.0, 1.0], [4.0, 4.0], squeezing(**numbers))
        return compiled(fleet, requests)

    free, dear, vain = metrics(), metrics(s_per_token=1e-4, j_per_token=0.5), metrics(success_frac=0.0, j_per_token=0.5)
    np.testing.assert_allclose(free.pools.traffic_frac, [1, 0])
    np.testing.assert_allclose(free.pools.mean_prompt_tokens, [900, 0])
    np.testing.assert_allclose(free.output_tok_per_s, 500.0)
    assert float(dear.ttft_p99_s - free.ttft_p99_s) == pytest.approx(1500 * 1e-4, rel=1e-9)
    assert float(dear.power_w - free.power_w) == pytest.approx(5 * 1500 * 0.5, rel=1e-9)
    np.testing.assert_allclose(vain.pools.traffic_frac, [0, 1])
    np.testing.assert_allclose(vain.pools.mean_prompt_tokens, [0, 1500])
    idle_w = 4 * float(engine.gpus_per_instance) * float(vain.pools.gpu_power_w[0])
    assert float(vain.pools.power_w[0]) - idle_w == pytest.approx(5 * 1500 * 0.5, rel=1e-9)


# --- sizing ---------------------------------------------------------------------------------------------------------

MOST = 64


@pytest.mark.slow
def test_a_pool_gets_the_least_instances_that_hold_every_limit(engine, workload):
    """Against every number of instances up to 64, for limits on load, TTFT (growing with the prompt) and ITL."""

    @jax.jit
    @jax.vmap
    def size(rate, scv, slo):
        requests, window = replace(workload, arrival_rate_per_s=rate, arrival_scv=scv), jnp.asarray(20_480.0)
        fleet = fleet_of((engine,), window[None], jnp.ones(1), jnp.ones(1))
        traffic, setting = lane(route(fleet, requests, PHYSICAL), 0), setting_of(requests, fleet.surroundings, PHYSICAL)
        load = least_instances(engine, traffic, window, slo, setting)

        def holds(n):
            alone = jax.tree.map(lambda x: x[None], pool_metrics(engine, traffic, window, n, setting))
            return jnp.stack([jnp.all(excess <= 1e-9) for excess in excesses(alone, slo).values()])

        tried = jax.vmap(holds)(jnp.arange(1.0, MOST + 1))
        return required_instances(engine, traffic, window, slo, setting), load, most_instances(load), tried

    rng = np.random.default_rng(5)
    n = 400
    slo = replace(
        jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (n,)), make_slo()),
        ttft_p99_s=log_uniform(rng, 0.05, 20.0, n),
        ttft_s_per_token=rng.choice([0.0, 2e-4], n),
        itl_s=rng.choice([np.inf, 0.015, 0.02, 0.03], n),
    )
    rate = np.exp(rng.uniform(np.log(0.02), np.log(60.0), n))
    needed, load, most, tried = (np.asarray(x) for x in size(rate, rng.choice([1.0, 20.0], n), slo))
    assert np.all(most <= MOST)
    counts, passed = np.arange(1, MOST + 1), np.all(tried, axis=2)
    assert np.all(np.diff(tried.astype(int), axis=1) >= 0)  # one more instance never breaks a limit
    allowed = passed & (counts >= load[:, None]) & (counts <= most[:, None])
    expected = np.where(allowed.any(axis=1), counts[allowed.argmax(axis=1)], np.inf)
    np.testing.assert_array_equal(needed, expected)
    below = tried[np.arange(n), np.maximum(np.where(np.isfinite(needed), needed, 2) - 2, 0).astype(int)]
    decided = ~below & np.isfinite(needed)[:, None] & (needed > 1)[:, None]
    alone = decided & (decided.sum(axis=1) == 1)[:, None]
    assert np.all(alone.sum(axis=0) >= 3), alone.sum(axis=0)  # each limit decides somewhere by itself
    assert 0.1 < np.mean(np.isinf(needed)) < 0.9


@pytest.mark.slow
def test_no_pool_of_a_fleet_can_be_smaller(engine, workload):
    fleet = fleet_of([engine] * 2, [900.0, 20_480.0], [1.5, 1.0], [1.0, 1.0])

    @jax.jit
    def size(requests, slo):
        sized = size_fleet(fleet, requests, slo)
        fewer = sized.n_instances - jnp.concatenate([jnp.zeros((1, 2)), jnp.eye(2)])

        def holds(n):
            return held(evaluate(sized.with_instances(n), requests).pools, slo)

        return sized, jax.lax.map(holds, fewer)

    for ttft_s, slope, itl_s, rate in ((0.6, 0.0, math.inf, 60.0), (0.3, 1e-4, 0.02, 60.0), (0.6, 1e-4, 0.02, 200.0)):
        slo = make_slo(scope="fleet", ttft_p99_s=ttft_s, ttft_s_per_token=slope, itl_s=itl_s)
        sized, holds = size(with_rate(workload, rate), slo)
        counts = np.asarray(sized.n_instances)
        assert np.all(np.isfinite(counts) & (counts >= 1) & (counts == np.floor(counts)))
        np.testing.assert_array_equal(holds, [True, False, False])
    unreachable, _ = size(workload, make_slo(scope="fleet", ttft_p99_s=1e-3))
    assert np.all(np.isinf(unreachable.n_instances))
    assert not nan_metrics(compiled(unreachable, workload))
