"""`evaluate` and `size_fleet` against plain Python, and the laws a fleet obeys under jit, vmap and grad."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.test_util import check_grads

from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.struct import stack
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED, Assumptions
from fleetopt_jax.fleet.choices.power_scope import WholeInstance
from fleetopt_jax.fleet.choices.routing_key import PromptAndLimit, TotalTokens
from fleetopt_jax.fleet.engine import Engine, make_engine, require_fit, roofline_engine
from fleetopt_jax.fleet.evaluate import FleetMetrics, PoolMetrics, evaluate, pool_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo, fleet_of, make_fleet, make_slo
from fleetopt_jax.fleet.sizing import least_held, required_instances, size_fleet
from fleetopt_jax.fleet.stage import setting_of
from fleetopt_jax.fleet.traffic import route
from fleetopt_jax.laws.decode import make_decode_step
from fleetopt_jax.laws.hardware import make_gpu
from fleetopt_jax.laws.kv_cache import make_kv_capacity
from fleetopt_jax.laws.llm import make_llm
from fleetopt_jax.laws.power import LogisticPower, make_logistic_power
from fleetopt_jax.laws.prefill import Prefill, make_prefill
from fleetopt_jax.laws.roofline import ROOFLINE_CONTEXT_TOKENS
from fleetopt_jax.workload.atoms import Workload, make_workload, rounded_up, total_tokens, with_rate

REAL = Assumptions(rounding="real")
TRACES: list[int] = []  # one entry each time `sized` is traced


@partial(jax.jit, static_argnames="assumptions")
def compiled(
    fleet: Fleet, workload: Workload, *, assumptions: Assumptions = PUBLISHED, router_width=None
) -> FleetMetrics:
    return evaluate(fleet, workload, assumptions, router_width=router_width)


@jax.jit
def sized(engines: tuple[Engine, ...], windows: Array, gamma: Array, workload: Workload, slo: Slo) -> FleetMetrics:
    TRACES.append(1)
    fleet = fleet_of(engines, windows, gamma, jnp.ones_like(windows))
    return evaluate(size_fleet(fleet, workload, slo, PUBLISHED), workload, PUBLISHED)


DEEPER = {"resources", "pools", "stages", "stable", "ttft", "itl"}  # of metrics, what is no number of a pool


def named(metrics: PoolMetrics | FleetMetrics) -> dict[str, Array]:
    """Numbers of metrics by name, resources as the others."""
    flat = vars(metrics) | vars(metrics.resources)
    return {name: value for name, value in flat.items() if name not in DEEPER}


def numbers_of(workload: Workload) -> dict[str, Array]:
    """What gradients are taken of; the order of the prompts is no number."""
    return {name: value for name, value in vars(workload).items() if name != "by_prompt"}


@pytest.fixture(scope="module")
def roofline() -> Engine:
    """Llama-3.1-8B on one 80 GB GPU: another power law and no cap on slots."""
    gpu = make_gpu(memory_bytes=85e9, bandwidth_bytes_per_s=3.35e12, peak_flop_per_s=9.89e14, tdp_w=700, usd_per_h=4)
    llm = make_llm(n_dense_params=8e9, n_layers=32, bytes_per_weight=2, kv_bytes_per_token=131_072)
    return roofline_engine(gpu, llm, 1, prefill(512, ROOFLINE_CONTEXT_TOKENS))


def prefill(chunk_tokens: float, calibration_tokens: float) -> Prefill:
    return make_prefill(chunk_tokens=chunk_tokens, calibration_tokens=calibration_tokens, per_token_s=2e-5, gpu_w=650)


def small_engine(*, n_blocks: float = 4096) -> Engine:
    """An engine of few slots, whose waits bind."""
    return make_engine(
        make_decode_step(base_s=5e-3, per_token_s=4e-4 / 8192),
        make_kv_capacity(n_blocks=n_blocks, slot_tokens=12 * 8192),
        make_logistic_power(idle_w=200, nominal_w=500, log2_half_batch=2),
        prefill(1024, 8192),
        gpus_per_instance=2,
        usd_per_gpu_h=3,
    )


# --- against plain Python -------------------------------------------------------------------------------------------


def erlang_c_by_recursion(servers: int, load: float) -> float:
    if load >= servers:
        return 1.0
    inverse_b = 1.0
    for c in range(1, servers + 1):
        inverse_b = 1.0 + c / load * inverse_b
    return 1.0 / (1.0 + (inverse_b - 1.0) * (1.0 - load / servers))


def reference_power_w(engine: Engine, n_active: float, context: float) -> float:
    power = engine.power
    if isinstance(power, LogisticPower):
        x = float(power.steepness) * (math.log2(max(1.0, n_active)) - float(power.log2_half_batch))
        return float(power.idle_w) + (float(power.nominal_w) - float(power.idle_w)) / (1.0 + math.exp(-x))
    kv_s = float(power.step.per_token_s) * context * n_active
    step_s = float(power.step.base_s) + kv_s
    activity = kv_s / step_s + float(power.compute_s_per_seq) * n_active / step_s
    return float(power.tdp_w) * (0.43 + 0.43 * min(1.0, activity))


def reference_pool(engine: Engine, window: float, n: int, served: list, rate: float, instance_watts: bool) -> dict:
    """One pool by loops over the requests (length, weight) it serves; the formulas of the published section 4."""
    step = engine.decode
    # Slots may be unlimited, blocks not; a floor of the smaller is the smaller of the floors.
    n_max = math.floor(min(float(engine.kv.slot_tokens) / window, float(engine.kv.n_blocks) / math.ceil(window / 16)))
    frac = sum(weight for _, weight in served)
    n_gpus = n * float(engine.gpus_per_instance)
    pool = dict(
        traffic_frac=frac, n_max=n_max, n_instances=n, n_gpus=n_gpus, usd_per_h=n_gpus * float(engine.usd_per_gpu_h)
    )
    busy = [
        "rate_per_s",
        "n_active",
        "utilization",
        "wait_s",
        "prefill_s",
        "ttft_p99_s",
        "itl_s",
        "output_tok_per_s",
    ]
    if not frac:
        return pool | dict.fromkeys([*busy, "tok_per_j"], 0.0)
    mean = dict.fromkeys(["service", "square", "steps", "steps_len", "chunks", "output"], 0.0)
    for length, weight in served:
        held = min(length, window)
        prompt = max(1, int(0.8 * held))
        chunks = math.ceil(prompt / float(engine.prefill.chunk_tokens))
        steps = chunks + held - prompt
        step_s = float(step.base_s) + float(step.per_token_s) * held * n_max
        features = [
            steps * step_s,
            (steps * step_s) ** 2,
            steps,
            steps * held,
            chunks,
            length - max(1, int(0.8 * length)),
        ]
        for name, value in zip(mean, features, strict=True):
            mean[name] += weight / frac * value
    scv = max(0.01, mean["square"] / mean["service"] ** 2 - 1.0)
    arrivals, servers = rate * frac, n * n_max
    load = arrivals * mean["service"]
    utilization = load / servers
    n_active = max(1, math.floor(min(1.0, utilization) * n_max))
    board_w = reference_power_w(engine, n_active, mean["steps_len"] / mean["steps"])
    power_w = board_w * (n_gpus if instance_watts else n)
    wait_s = math.inf
    if utilization < 1:
        probability = erlang_c_by_recursion(servers, load)
        decay = 2 * (servers / mean["service"] - arrivals) / (1 + scv)
        wait_s = max(0.0, math.log(probability / 0.01)) / decay if probability > 0 else 0.0
    alone_s = float(step.base_s) + float(step.per_token_s) * float(engine.prefill.calibration_tokens)
    prefill_s = mean["chunks"] * alone_s
    values = [arrivals, n_active, utilization, wait_s, prefill_s, wait_s + prefill_s]
    output_tok_per_s = min(arrivals, servers / mean["service"]) * mean["output"]  # in overload, what gets through
    values += [mean["service"] / mean["steps"], output_tok_per_s]
    tok_per_j = output_tok_per_s / power_w
    return pool | dict(zip(busy, values, strict=True)) | dict(gpu_power_w=board_w, power_w=power_w, tok_per_j=tok_per_j)


def reference(fleet: Fleet, workload: Workload, *, instance_watts: bool = False) -> tuple[list[dict], dict]:
    """(pools, fleet) in plain Python: each request goes to the first pool that accepts it."""
    windows, gammas, counts = (np.asarray(x).tolist() for x in (fleet.window_tokens, fleet.gamma, fleet.n_instances))
    served: list[list] = [[] for _ in windows]
    unserved = 0.0
    for length, weight in zip(
        np.asarray(total_tokens(workload)).tolist(), np.asarray(workload.weight).tolist(), strict=True
    ):
        accepting = [
            k for k, (window, gamma) in enumerate(zip(windows, gammas, strict=True)) if length <= gamma * window
        ]
        if accepting:
            served[accepting[0]].append((length, weight))
        else:
            unserved += weight
    rate = float(workload.arrival_rate_per_s)
    pools = [
        reference_pool(engine, window, int(n), requests, rate, instance_watts)
        for engine, window, n, requests in zip(fleet.engines, windows, counts, served, strict=True)
    ]
    used = [pool for pool in pools if pool["traffic_frac"]]
    tok_per_s, power_w = (sum(pool[name] for pool in used) for name in ("output_tok_per_s", "power_w"))
    total = dict(
        tok_per_j=tok_per_s / power_w,
        output_tok_per_s=tok_per_s,
        power_w=power_w,
        ttft_p99_s=max(pool["ttft_p99_s"] for pool in used),
        utilization=max(pool["utilization"] for pool in used),
        itl_s=sum(pool["output_tok_per_s"] * pool["itl_s"] for pool in used) / tok_per_s,
        unserved_frac=unserved,
        **{name: sum(pool[name] for pool in pools) for name in ("n_instances", "n_gpus", "usd_per_h")},
    )
    return pools, total


def random_fleets(engines: tuple[Engine, ...], workload: Workload, n: int) -> list[Fleet]:
    """Idle, busy and overloaded fleets, with compression, empty pools and requests left out."""
    rng = np.random.default_rng(len(engines))
    k = len(engines)
    lengths = np.asarray(total_tokens(workload))
    options = np.union1d(
        lengths[lengths > 150], np.round(np.geomspace(155.0, 60_000.0, 30))
    )  # half of them on a length
    fleets = []
    for _ in range(n):
        windows = np.sort(rng.choice(options, k, replace=False))
        windows[-1] = rng.choice([windows[-1], 62_464.0])
        gamma = np.where(rng.random(k) < 0.5, 1.0, rng.uniform(1.0, 2.0, k))
        one_each = make_fleet(engines, window_tokens=windows, gamma=gamma, n_instances=np.ones(k))
        needed = np.asarray(compiled(one_each, workload).pools.utilization)
        counts = jnp.asarray(np.ceil(np.minimum(needed, 1e3) * rng.uniform(0.7, 1.5, k)))
        fleets.append(one_each.with_instances(jnp.maximum(1.0, counts)))
    return fleets


def test_evaluate_matches_plain_python(h100, b200, roofline, small_workload):
    workload = with_rate(small_workload, 20.0)  # few enough servers that requests wait
    seen = {"overloaded": 0, "unserved": 0, "empty": 0, "waits": 0}
    pair, three = (roofline, build(b200)), (build(h100), build(b200), small_engine(n_blocks=40_000))
    for fleet in random_fleets(pair, workload, 20) + random_fleets(three, workload, 40):
        metrics = compiled(fleet, workload)
        pools, total = reference(fleet, workload)
        for k, pool in enumerate(pools):
            for name, value in pool.items():
                # Prefix sums of 40 terms lose a few digits of a pool's moments; ceilings and floors agree exactly.
                assert float(getattr(metrics.pools, name)[k]) == pytest.approx(value, rel=1e-9, abs=1e-12), (k, name)
            seen["empty"] += not pool["traffic_frac"]
            seen["waits"] += 0 < pool["wait_s"] < math.inf
            seen["overloaded"] += pool["utilization"] >= 1
        if all(pool["traffic_frac"] for pool in pools):
            seen["unserved"] += total["unserved_frac"] > 0
            for name, value in total.items():
                assert float(getattr(metrics, name)) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert min(seen.values()) >= 3, seen


def test_power_scope_instance_counts_every_gpu(b200, roofline, small_workload):
    fleet = make_fleet([roofline, build(b200)], window_tokens=[4096, 61_440], n_instances=[40, 40], gamma=[1.5, 1])
    one = compiled(fleet, small_workload)
    every = compiled(fleet, small_workload, assumptions=Assumptions(power_scope=WholeInstance()))
    np.testing.assert_allclose(every.pools.power_w, one.pools.power_w * np.array([1, 8]), rtol=1e-14)
    np.testing.assert_allclose(every.pools.gpu_power_w, one.pools.gpu_power_w, rtol=1e-14)
    expected = reference(fleet, small_workload, instance_watts=True)[1]
    assert float(every.power_w) == pytest.approx(expected["power_w"], rel=1e-9)
    assert float(every.tok_per_j) == pytest.approx(expected["tok_per_j"], rel=1e-9)


# --- routing --------------------------------------------------------------------------------------------------------


def test_traffic_is_conserved_hard_and_soft(h100, small_workload):
    engines = (build(h100),) * 3
    rng = np.random.default_rng(0)
    windows = np.sort(np.exp(rng.uniform(np.log(30), np.log(70_000), (1000, 3))), axis=1)
    gamma = rng.uniform(1.0, 2.0, (1000, 3))
    width = np.exp(rng.uniform(np.log(1e-3), 0.0, 1000))
    total, weight = np.asarray(total_tokens(small_workload)), np.asarray(small_workload.weight)
    edges = np.maximum.accumulate(windows * gamma, axis=1)
    beyond = (total > edges[:, -1:]) @ weight

    @jax.jit
    @jax.vmap
    def shares(windows, gamma, width):
        fleet = fleet_of(engines, windows, gamma, jnp.full(3, 50.0))
        hard = evaluate(fleet, small_workload, PUBLISHED)
        soft = evaluate(fleet, small_workload, REAL, router_width=width)
        return (hard.pools.traffic_frac, hard.unserved_frac), (soft.pools.traffic_frac, soft.unserved_frac)

    for frac, unserved in shares(windows, gamma, width):
        assert np.all(frac >= 0)
        assert np.all(unserved >= 0)
        # Differences of prefix sums: each is 1 up to the rounding of 40 terms.
        np.testing.assert_allclose(frac.sum(axis=1) + unserved, 1.0, atol=1e-13)
        assert np.all(np.abs(unserved)[beyond == 0] < 1e-13)
        assert np.all(np.asarray(unserved) <= beyond + 3e-12)  # each pool may drop a share below 1e-12 as nobody
    hard, _ = shares(windows, gamma, width)
    np.testing.assert_allclose(hard[1], beyond, atol=1e-13)
    lower = np.concatenate([np.zeros((1000, 1)), edges[:, :-1]], axis=1)
    expected = ((lower[:, :, None] < total) & (total <= edges[:, :, None])) @ weight
    np.testing.assert_allclose(hard[0], expected, atol=1e-13)


@pytest.mark.slow
def test_the_soft_router_sharpens_to_the_hard_one(b200, roofline, small_workload):
    fleet = make_fleet([roofline, build(b200)], window_tokens=[1501.5, 62_464], gamma=[1.3, 1], n_instances=[40, 30])
    hard = named(compiled(fleet, small_workload, assumptions=REAL).pools)
    # With spare slots nobody waits; the others the paper leaves out.
    zero = {"wait_s", "prefill_frac", "prefix_hit_frac", "kg_co2_per_h"}
    worst = []
    for width in (0.1, 0.02, 0.004, 1e-5):
        soft = named(compiled(fleet, small_workload, assumptions=REAL, router_width=width).pools)
        assert all(np.all(hard[name] == 0) and np.all(soft[name] == 0) for name in zero)
        worst.append(max(np.max(np.abs(soft[name] / hard[name] - 1)) for name in hard.keys() - zero))
    assert worst[0] > worst[1] > worst[2]
    assert worst[-1] < 1e-12  # no length is within 1e-3 of the edge: exp(-100) of it is misrouted


# --- jit, vmap, grad ------------------------------------------------------------------------------------------------


def test_compiling_does_not_change_the_metrics(b200, roofline, small_workload):
    fleet = make_fleet([roofline, build(b200)], window_tokens=[4096, 61_440], n_instances=[20, 40], gamma=[1.5, 1])
    one, other = evaluate(fleet, small_workload, PUBLISHED), compiled(fleet, small_workload)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), one, other)


def test_other_numbers_never_compile_again(h100, b200, small_workload):
    before = len(TRACES)
    results = []
    for first, rate, window, gamma, limit_s in (
        (build(h100), 100.0, 2048.0, 1.0, 0.5),
        (build(b200), 100.0, 2048.0, 1.0, 0.5),
        (build(b200), 1000.0, 2048.0, 1.0, 0.5),
        (build(b200), 1000.0, 8192.0, 1.5, 0.5),
        (small_engine(n_blocks=30_000), 1000.0, 8192.0, 1.5, 0.7),
    ):
        windows, gammas = jnp.array([window, 62_464.0]), jnp.array([gamma, 1.0])
        workload, slo = with_rate(small_workload, rate), make_slo(ttft_p99_s=limit_s)
        results.append(float(sized((first, build(h100)), windows, gammas, workload, slo).power_w))
    assert len(TRACES) - before <= 1
    assert len(set(results)) == 5  # the numbers did matter


@pytest.mark.slow
def test_a_batch_of_thresholds_equals_a_loop(h100, b200, small_workload):
    engines = (build(h100), build(b200))
    windows = np.stack([np.linspace(60.0, 60_000.0, 50), np.full(50, 62_464.0)], axis=1)
    gamma = np.stack([np.linspace(1.0, 2.0, 50), np.ones(50)], axis=1)
    batch = jax.jit(jax.vmap(sized, (None, 0, 0, None, None)))
    batched = batch(engines, windows, gamma, small_workload, make_slo())
    looped = stack([sized(engines, *row, small_workload, make_slo()) for row in zip(windows, gamma, strict=True)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), batched, looped)
    assert np.all(np.isfinite(batched.tok_per_j))


@pytest.mark.slow
def test_the_whole_relaxation_is_differentiable(b200, roofline, small_workload):
    """Soft routing and real rounding, in logs of every number of the fleet, the engines and the workload."""
    workload = with_rate(small_workload, 20.0)
    capped = replace(roofline, kv=make_kv_capacity(n_blocks=2000, slot_tokens=1e6))  # finite, for its log
    # The window lies between two lengths, where min(length, window) is smooth; both pools are busy enough to wait.
    fleet = make_fleet([capped, build(b200)], window_tokens=[1500, 70_000], gamma=[1.2, 1], n_instances=[0.75, 0.72])

    def logs(log_fleet, log_numbers):
        fleet, numbers = jax.tree.map(jnp.exp, (log_fleet, log_numbers))
        metrics = evaluate(fleet, replace(workload, **numbers), REAL, router_width=0.1)
        pools = named(metrics.pools) | named(metrics)
        return jnp.log(jnp.concatenate([jnp.atleast_1d(pools[name]) for name in WATCHED]))

    at = jax.tree.map(jnp.log, (fleet, numbers_of(workload)))
    pools = compiled(fleet, workload, assumptions=REAL, router_width=0.1).pools
    assert np.all(pools.wait_s > 0)
    assert np.all(pools.utilization < 1)
    # 1e-5: the checker's central differences of a wait that grows like 1 / (1 - utilisation).
    check_grads(jax.jit(logs), at, order=1, modes=("rev",), rtol=1e-5, atol=1e-5)


WATCHED = (
    "tok_per_j",
    "power_w",
    "ttft_p99_s",
    "itl_s",
    "usd_per_h",
    "traffic_frac",
    "n_active",
    "wait_s",
    "prefill_s",
)


@pytest.mark.slow
def test_gradients_stay_finite_where_a_pool_is_at_an_edge(h100, roofline, small_workload):
    """No traffic, no instances, overload, a window on a length, a window that holds no sequence: never nan."""
    tiny = small_engine(n_blocks=10)
    on_length = float(total_tokens(small_workload)[20])
    cases = {
        "no traffic": (build(h100), 10.0, 0.0),
        "instances without traffic": (build(h100), 10.0, 3.0),
        "traffic without instances": (build(h100), 2048.0, 0.0),
        "overload": (build(h100), 2048.0, 0.01),
        "idle": (build(h100), 2048.0, 1e6),
        "window on a length": (build(h100), on_length, 20.0),
        "window that holds nothing": (tiny, 2048.0, 3.0),
    }

    @partial(jax.jit, static_argnames="assumptions")
    def value_and_grad(fleet, workload, width, assumptions):
        def finite_sum(fleet, numbers):
            metrics = evaluate(fleet, replace(workload, **numbers), assumptions, router_width=width)
            values = jnp.concatenate([jnp.atleast_1d(x) for x in jax.tree.leaves(metrics)])
            return jnp.sum(jnp.where(jnp.isfinite(values), values, 0.0)), values

        return jax.value_and_grad(finite_sum, argnums=(0, 1), has_aux=True)(fleet, numbers_of(workload))

    broken = []
    for name, (engine, window, n) in cases.items():
        alone = make_fleet([engine], window_tokens=[window], n_instances=[n])
        beside = make_fleet([engine, roofline], window_tokens=[window, 62_464.0], n_instances=[n, 500.0])
        for fleet, width, assumptions in ((alone, None, PUBLISHED), (beside, 0.05, REAL), (beside, 1e-6, REAL)):
            (_, values), slopes = value_and_grad(fleet, small_workload, width, assumptions=assumptions)
            if np.any(np.isnan(values)):
                broken.append((name, width, "value"))
            broken += [
                (name, width, jax.tree_util.keystr(path))
                for path, slope in jax.tree_util.tree_leaves_with_path(slopes)
                if not np.all(np.isfinite(slope))
            ]
    assert not broken


def test_a_pool_without_traffic_counts_for_nothing(b200, roofline, small_workload):
    fleet = make_fleet([roofline, build(b200)], window_tokens=[10, 62_464], n_instances=[0, 60])
    metrics = compiled(fleet, small_workload)
    for name, values in named(metrics.pools).items():
        if name not in ("n_max", "gpu_power_w"):  # what an instance could hold, and draw, were there one
            assert float(values[0]) == 0.0, name
    pools, total = reference(fleet, small_workload)
    for name, value in total.items():
        assert float(getattr(metrics, name)) == pytest.approx(value, rel=1e-9, abs=1e-12), name
        if name in pools[1]:
            assert value == pools[1][name]


# --- the least instances that hold the limits -----------------------------------------------------------------------


def test_the_least_that_holds_is_found_whatever_the_curve():
    """Powers, exponentials, steps, and what never holds, against every whole number."""
    rng = np.random.default_rng(0)
    n = 400
    start, power = rng.integers(1, 800, n).astype(float), rng.uniform(0.2, 12.0, n)
    least = np.floor(start * np.exp(rng.uniform(-0.5, 3.0, n))) + 0.5
    curves = [
        lambda x: (least / x) ** power - 1.0,
        lambda x: np.exp(np.minimum(power * (least / start) * (1.0 - x / least), 5.0)) - 1.0,
        lambda x: np.where(x > least, -1.0, 99.0),
        lambda x: np.where(x > least, -1.0, 50.0 + 49.0 * (1.0 - x / least)),
        lambda x: 0.1 + start / x,
    ]
    for curve in curves:
        at = least_held(start)
        most = at.most
        while np.any(at.is_open):
            after = at.after(curve(at.trial))
            at = jax.tree.map(lambda new, old, open_=at.is_open: np.where(open_, new, old), after, at)
        held = [np.arange(a, b + 1)[curve_of <= 0] for a, b, curve_of in _all(curve, start, most)]
        np.testing.assert_array_equal(at.found, [each[0] if len(each) else np.inf for each in held])
        assert np.max(at.n_tried) <= 40  # of thousands, a cliff behind a slope that says nothing


def _all(curve, start, most):
    """(start, most, excess of every whole number between them) of every search."""
    width = int(np.max(most - start)) + 1
    values = np.stack([curve(start + i) for i in range(width)], axis=1)
    return [(a, b, row[: int(b - a) + 1]) for a, b, row in zip(start, most, values)]


def test_required_instances_is_the_least_that_holds_the_limits(small_workload):
    engine = small_engine(n_blocks=40_000)

    @jax.jit
    @jax.vmap
    def size(window, rate, limit_s):
        workload = with_rate(small_workload, rate)
        slo = replace(make_slo(), ttft_p99_s=limit_s)
        fleet = fleet_of((engine,), window[None], jnp.ones(1), jnp.ones(1))
        traffic = jax.tree.map(lambda x: x[0], route(fleet, workload, PUBLISHED))
        setting = setting_of(workload, fleet.surroundings, PUBLISHED)
        least = required_instances(engine, traffic, window, slo, setting)
        usable = jnp.where(jnp.isfinite(least), least, 10.0)
        at, below = (pool_metrics(engine, traffic, window, n, setting) for n in (usable, usable - 1))
        return least, at, below

    rate = np.exp(np.linspace(np.log(0.01), np.log(3e4), 3600))
    over = np.tile([1e-6, 0.5, 5.0, -1e-6], 900)  # how far the limit is above the prefill alone [s]
    reachable = over > 0
    decided = np.zeros(3, dtype=int)
    for window in (
        8192.0,
        62_464.0,
    ):  # 12 slots, where two instances often do, and 1, which takes many more to wait less
        windows = np.full(3600, window)
        prefill_s = float(size(windows, rate, np.ones(3600))[1].prefill_s[0])
        limit_s = prefill_s + over
        least, at, below = size(windows, rate, limit_s)
        least = np.asarray(least)
        np.testing.assert_array_equal(np.isfinite(least), reachable)
        busy = np.asarray(at.utilization * at.n_instances)
        # 1e-12: where N is filled to the limit exactly, the two ways to divide differ in the last place.
        assert np.all((least == np.floor(least))[reachable])
        assert np.all((np.asarray(at.utilization) <= 0.85 * (1 + 1e-12))[reachable])
        assert np.all((np.asarray(at.ttft_p99_s) <= limit_s)[reachable])
        assert np.all((least >= np.ceil(busy) + 1)[reachable])
        late = np.asarray(below.ttft_p99_s) > limit_s
        full = np.asarray(below.utilization) > 0.85 * (1 - 1e-12)
        scarce = least - 1 < np.ceil(busy) + 1
        assert np.all((late | full | scarce)[reachable])
        for limit in (1e-6, 0.5, 5.0):
            assert np.all(np.diff(least[over == limit]) >= 0)  # more requests never need fewer instances
        alone = np.stack([late & ~full & ~scarce, full & ~late & ~scarce, scarce & ~late & ~full])
        decided += np.sum(alone & reachable, axis=1)
    assert np.all(decided > 50), decided  # each limit decides somewhere


def test_a_window_that_holds_no_sequence_is_served_by_no_number_of_instances(h100, small_workload):
    engines = (small_engine(n_blocks=10), build(h100))
    needed = {
        window: sized(engines, jnp.array([window, 62_464.0]), jnp.ones(2), small_workload, make_slo()).pools.n_instances
        for window in (2048.0, 10.0)
    }
    np.testing.assert_array_equal(np.isfinite(needed[2048.0]), [False, True])
    assert needed[10.0][0] == 0  # nor are any needed where nothing arrives


# --- the door -------------------------------------------------------------------------------------------------------


def test_impossible_fleets_and_limits_are_refused(h100):
    good = dict(window_tokens=[100.0, 200.0], n_instances=[1.0, 1.0], gamma=[1.0, 1.0])
    engines = [build(h100)] * 2
    make_fleet(engines, **good)
    accepted = []
    for bad, says in (
        (dict(window_tokens=[200.0, 100.0]), "200.0, 100.0"),
        (dict(window_tokens=[-5.0, 100.0]), "-5"),
        (dict(window_tokens=[100.0]), "as many"),
        (dict(window_tokens=[100.0, math.nan]), "nan"),
        (dict(window_tokens=[100.0, math.inf]), "inf"),
        (dict(n_instances=[1.0, -1.0]), "-1"),
        (dict(n_instances=[1.0, math.nan]), "nan"),
        (dict(n_instances=[1.0, math.inf]), "inf"),
        (dict(gamma=[0.9, 1.0]), "0.9"),
        (dict(gamma=[math.nan, 1.0]), "nan"),
        (dict(gamma=[math.inf, 1.0]), "inf"),
    ):
        try:
            make_fleet(engines, **{**good, **bad})
        except ValueError as refusal:
            assert says in str(refusal)
        else:
            accepted.append(bad)
    assert not accepted
    for bad in (dict(ttft_p99_s=0.0), dict(ttft_p99_s=math.inf), dict(max_utilization=1.0), dict(max_utilization=0.0)):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            make_slo(**bad)


def test_a_model_that_does_not_fit_is_refused_with_what_it_needs():
    gpu = make_gpu(memory_bytes=80 * 2**30, bandwidth_bytes_per_s=3e12, peak_flop_per_s=1e15, tdp_w=700, usd_per_h=4)
    llm = make_llm(n_dense_params=70e9, n_layers=80, bytes_per_weight=2, kv_bytes_per_token=327_680)
    require_fit("70b", gpu, llm, 8)
    # 140 GB are 130.4 GiB; 3 GiB of workspace come on top.
    with pytest.raises(ValueError, match=r"70b: does not fit: needs 133\.1 GiB .* has 72\.0 GiB"):
        require_fit("70b", gpu, llm, 1)


def test_a_soft_router_sizes_like_a_narrow_one_and_its_gradient_is_a_difference(h100, small_workload):
    windows, gamma, slo = jnp.array([700.5, 60_000.0]), jnp.ones(2), make_slo()
    real = replace(PUBLISHED, rounding="real")

    @partial(jax.jit, static_argnames="soft")
    def n_instances(window, width, soft=True):
        fleet = fleet_of((build(h100),) * 2, jnp.stack([window, windows[1]]), gamma, jnp.ones(2))
        width = width if soft else None
        return jnp.sum(size_fleet(fleet, small_workload, slo, real, router_width=width).n_instances)

    np.testing.assert_allclose(n_instances(700.5, 1e-6), n_instances(700.5, 1e-6, soft=False), rtol=1e-9)
    slope = jax.grad(n_instances)(700.5, 0.2)
    difference = (n_instances(700.6, 0.2) - n_instances(700.4, 0.2)) / 0.2
    assert slope != 0
    np.testing.assert_allclose(slope, difference, rtol=1e-5)


@pytest.mark.parametrize("key", [TotalTokens(), PromptAndLimit(4096.0)])
def test_atoms_without_weight_change_nothing(key):
    """Programs are compiled for powers of two of atoms."""
    rng = np.random.default_rng(3)
    workload = make_workload(*np.round(np.exp(rng.normal([6.0, 4.0], 1.0, (70, 2)))).T + 1.0, arrival_rate_per_s=9.0)
    more = rounded_up(workload)
    prompts = np.asarray(more.prompt_tokens)[np.asarray(more.by_prompt, int)]
    assert len(more.weight) == 128 and np.all(np.diff(prompts) >= 0) and np.all(np.diff(total_tokens(more)) >= 0)
    assert sorted(more.by_prompt) == list(range(128)) and rounded_up(more).weight.shape == (128,)
    fleet = make_fleet(
        [build(EngineSpec("h100"))] * 2, window_tokens=[500, 40_000], gamma=[1.5, 1.0], n_instances=[2, 3]
    )
    assumptions = replace(PHYSICAL, route_by=key)
    ours, theirs = (jax.tree.leaves(route(fleet, each, assumptions)) for each in (workload, more))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
