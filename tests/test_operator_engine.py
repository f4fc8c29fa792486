"""Engines made of operators: what searches rely on, limits, gradients, and points that were measured."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import fleetopt_jax as fo
from fleetopt_jax.catalog.engines import SERVING, engine_entry
from fleetopt_jax.catalog.spec import MEASURED_SERVING
from fleetopt_jax.fleet.step_law import SumOfSteps, step_law_of
from fleetopt_jax.laws.clocks import MIN_CLOCK_FRAC
from fleetopt_jax.laws.mixed_step import CLASSES, StepBatch, decoding, with_prompts
from fleetopt_jax.laws.operator_step import OperatorStep
from fleetopt_jax.laws.operators.watts import LEAST_SHARE, held_w

BATCH = np.exp2(np.arange(0, 10.5, 0.5))
SPECS = [
    fo.EngineSpec("h100", "llama-3.1-70b", 4, "fp8", serving="vllm"),
    fo.EngineSpec("b200", "qwen3-235b-a22b", 4, "fp8", serving="vllm"),
    fo.EngineSpec("h200", "gpt-oss-120b", 2, serving="sglang"),
    fo.EngineSpec("a100", "llama-3.1-8b", 1, "fp8", serving="trtllm"),
    fo.EngineSpec("gb300", "deepseek-v3", 8, serving="vllm"),
]


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: f"{spec.gpu}-{spec.llm}")
def entry(request):
    return engine_entry(request.param)


def test_the_default_is_the_newest_vllm():
    assert (fo.EngineSpec("h100").serving, SERVING[0]) == ("vllm", MEASURED_SERVING)
    old, new = (engine_entry(fo.EngineSpec("h100", serving=name)) for name in ("vllm-0.11", "vllm"))
    assert old.engine.step is None and isinstance(step_law_of(old.engine), SumOfSteps)
    assert isinstance(step_law_of(new.engine), OperatorStep)
    assert [engine_entry(spec).quality for spec in SPECS[:4]] == ["measured", "kernels", "kernels", "projected"]


def test_watts_and_steps_are_as_searches_rely_on(entry):
    """Watts and seconds of a sequence fall with the batch; watts by less than 2 % of the TDP where they fall at all."""
    engine, spec = entry.engine, entry.spec
    gpu = fo.catalog.gpus.GPUS[spec.gpu].gpu
    for context in (256.0, 4096.0, 65_536.0):
        watts = np.asarray(jax.vmap(lambda n, c=context: engine.power.gpu_w(n, c))(BATCH))
        seconds = np.asarray(jax.vmap(lambda n, c=context: engine.decode.step_s(n, c))(BATCH))
        assert np.all(watts > engine.idle_w) and np.all(watts < gpu.tdp_w)
        assert (
            np.all(np.diff(watts / BATCH) < 0) and np.all(np.diff(seconds) > 0) and np.all(np.diff(seconds / BATCH) < 0)
        )
        assert np.all(np.diff(watts) > -0.02 * gpu.tdp_w)


def test_prefill_is_no_faster_than_the_peak_and_near_the_step(entry):
    """The polynomial is within a third of the step's own increase, for a prompt of a whole budget."""
    engine, law = entry.engine, step_law_of(entry.engine)
    prefill = engine.prefill
    budget = float(prefill.budget_tokens)
    beside = decoding(32.0, 2048.0, law.step.window_tokens)
    whole = with_prompts(beside, budget, 0.0, law.step.window_tokens)
    increase_s = float(law.step_s(whole) - law.step_s(beside))
    assert float(fo.laws.prefill.prefill_s(prefill, budget)) == pytest.approx(increase_s, rel=1 / 3)
    parts = law.step.parts(replace(whole, n_active=jnp.zeros(()), tokens=jnp.zeros(()), windowed_tokens=jnp.zeros(())))
    assert increase_s > 0.5 * float(jnp.sum(parts.peak_s))
    assert float(engine.idle_w) < float(prefill.gpu_w) < fo.catalog.gpus.GPUS[entry.spec.gpu].gpu.tdp_w


def test_a_first_token_takes_the_hosts_own_time_at_any_clock(entry):
    prefill = entry.engine.prefill
    assert float(prefill.first_token_s) == float(step_law_of(entry.engine).step.host.first_token_s) > 0
    assert prefill.slower(2.0).first_token_s == fo.at_clock(entry.engine, 0.7).prefill.first_token_s
    assert float(fo.at_clock(entry.engine, 0.7).prefill.first_token_s) == float(prefill.first_token_s)
    assert float(fo.build(replace(entry.spec, serving=MEASURED_SERVING)).prefill.first_token_s) == 0


def test_watts_are_those_of_the_operators_one_by_one(entry):
    """[sum over kinds of t_k (idle + TDP (b + m u_mem + f u_flop^p)) + t_gap (idle + TDP g)] / t, held by the board."""
    law, window = step_law_of(entry.engine), step_law_of(entry.engine).step.window_tokens
    n, prompt = (x.ravel() for x in np.meshgrid(BATCH, [0.0, 0.5, 100.0, 8192.0]))
    batch = with_prompts(decoding(n, 3000.0, window), prompt, 1000.0, window)
    parts, gpu, of = jax.device_get(law.step.parts(batch)), law.gpu, law.watts.operators
    asked_j = np.zeros(len(n))
    for k in range(len(CLASSES)):
        t, memory_s, flop_s = parts.seconds[k], parts.bytes[k] / gpu.bandwidth_bytes_per_s, parts.peak_s[k]
        bent = (np.where(t > 0, flop_s / np.where(t > 0, t, 1.0), 0.0) + LEAST_SHARE) ** of.flop_power[k]
        watts = (of.busy_frac[k] * t + of.memory_frac[k] * memory_s) * gpu.tdp_w
        asked_j += watts + gpu.idle_w * t + t * gpu.tdp_w * of.flop_frac[k] * (bent - LEAST_SHARE ** of.flop_power[k])
    watts, step_s, joules = jax.jit(lambda law, x: (law.gpu_w(x), law.step_s(x), law.gpu_j(x)))(law, batch)
    busy_s = parts.seconds.sum(axis=0)
    gap_s = np.maximum(step_s - busy_s, 0.0)
    asked_w = (asked_j + gap_s * (gpu.idle_w + gpu.tdp_w * law.watts.gap_frac)) / (busy_s + gap_s)
    np.testing.assert_allclose(watts, held_w(asked_w, gpu.tdp_w), rtol=1e-12)
    np.testing.assert_allclose(joules, watts * step_s, rtol=1e-12)


@jax.jit
@partial(jax.vmap, in_axes=(None, 0))
def energy_gradient(law, batch):
    """By every number of the law and of the batch."""
    return jax.grad(lambda law, one: law.gpu_j(one), argnums=(0, 1))(law, batch)


def test_gradients_of_energy_are_finite_in_everything(entry):
    batches = [
        decoding(0.0, 0.0),
        with_prompts(decoding(1.0, 100.0), 1.0),
        with_prompts(decoding(64.0, 4000.0), 8192.0),
    ]
    batch = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(each, dtype=float) for each in x]), *batches)
    found = energy_gradient(step_law_of(entry.engine), batch)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_a_part_of_ones_own_takes_the_place_of_the_mixed_step():
    spec = SPECS[0]
    engine = fo.build(spec)
    own = fo.build(replace(spec, laws=fo.OwnLaws(decode=engine.decode.slower(2.0))))
    assert own.step is None and isinstance(step_law_of(own), SumOfSteps)
    slow = fo.build(replace(spec, clock_frac=0.7))
    assert isinstance(slow.step, OperatorStep) and float(slow.decode.step_s(64, 1000.0)) > float(
        engine.decode.step_s(64, 1000.0)
    )
    assert float(slow.power.gpu_w(64.0, 1000.0)) < float(engine.power.gpu_w(64.0, 1000.0))


# A board's limit is a clock

LIMITS = np.array([250.0, 350.0, 450.0, 550.0, 650.0, 700.0])
LIMITED = fo.EngineSpec("h100", "llama-3.1-70b", 4, "fp8", serving="vllm")


def limited_batches() -> StepBatch:
    """Few sequences, bound by memory; many; and with a prompt, at the TDP."""
    found = [decoding(1.0, 500.0), decoding(256.0, 1500.0), with_prompts(decoding(64.0, 1500.0), 8192.0)]
    return jax.tree.map(lambda *x: np.stack([np.asarray(each, dtype=float) for each in x]), *found)


@jax.jit
def limited(law, limit_w, batch):
    """(seconds, watts) of iterations under a limit."""
    capped = law.at_power_limit(limit_w)
    return jax.vmap(capped.step_s)(batch), jax.vmap(capped.gpu_w)(batch)


def test_a_board_slows_down_until_it_meets_its_limit_and_no_further():
    law, batch = fo.build(LIMITED).step, limited_batches()
    free_s, free_w = jax.vmap(law.step_s)(batch), jax.vmap(law.gpu_w)(batch)
    assert float(free_w[2]) > 600.0 > float(free_w[0])
    seconds, watts = (np.array(each) for each in zip(*(limited(law, limit, batch) for limit in LIMITS)))
    binds = np.asarray(free_w) > LIMITS[:, None]
    slowest = np.asarray(jax.vmap(law.at_clock(MIN_CLOCK_FRAC).gpu_w)(batch))
    np.testing.assert_allclose(watts, np.where(binds, np.maximum(LIMITS[:, None], slowest), free_w), rtol=1e-9)
    np.testing.assert_allclose(np.where(binds, 0.0, seconds / free_s - 1.0), 0.0, atol=1e-12)  # else as without
    assert np.all(np.diff(seconds, axis=0) <= 1e-15) and np.all(np.diff(watts, axis=0) >= -1e-9)
    assert np.all(seconds[binds] > np.broadcast_to(free_s, binds.shape)[binds])
    assert np.all(seconds <= np.asarray(free_s) / MIN_CLOCK_FRAC * (1 + 1e-12))  # no more than all of it is slowed down


@pytest.mark.slow
def test_gradients_at_a_board_limit_are_finite_and_of_the_right_sign():
    """Below it, above it, and where the board draws just what it may."""
    law, batch = fo.build(LIMITED).step, limited_batches()
    one = jax.tree.map(lambda x: x[2], batch)
    meets_w = float(law.gpu_w(one))
    of_limit = jax.jit(jax.grad(lambda limit, batch: law.at_power_limit(limit).step_s(batch)))
    slopes = [float(of_limit(limit, one)) for limit in (0.7 * meets_w, meets_w, 1.2 * meets_w)]
    assert slopes[0] < 0 and slopes[0] <= slopes[1] <= slopes[2] == 0 and np.all(np.isfinite(slopes))
    by_all = jax.jit(jax.grad(lambda law, batch: law.at_power_limit(meets_w).gpu_j(batch), argnums=(0, 1)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(by_all(law, one)))
    check_grads(lambda limit: law.at_power_limit(limit).gpu_j(one), (0.8 * meets_w,), order=1, modes=["rev"], rtol=1e-4)


def test_an_engine_under_a_power_limit():
    engine = fo.build(LIMITED)
    capped = fo.at_power_limit(engine, 400.0)
    assert float(capped.power.gpu_w(256.0, 1500.0)) <= 400.0 * (1 + 1e-9) < float(engine.power.gpu_w(256.0, 1500.0))
    assert float(capped.decode.step_s(256.0, 1500.0)) > float(engine.decode.step_s(256.0, 1500.0))
    assert float(capped.prefill.gpu_w) == pytest.approx(400.0)
    assert float(capped.decode.step_s(256.0, 1500.0)) == float(capped.step.step_s(decoding(256.0, 1500.0)))
    one_s, other_s = (float(capped.decode.step_s(n, 1500.0)) / n for n in (128.0, 256.0))
    assert other_s < one_s  # as searches need it
    asked = fo.build(replace(LIMITED, power_limit_w=400.0))  # as a spec says it
    jax.tree.map(np.testing.assert_array_equal, asked.step, capped.step)
    slower = fo.build(replace(LIMITED, power_limit_w=400.0, clock_frac=0.5)).step  # no faster than its own clock
    assert float(slower.clock_frac(decoding(1.0, 500.0))) == 0.5
    apart = StepBatch(*(jnp.asarray(x) for x in (np.full((2, 1), 64.0), 1e5, 0.0, np.full(3, 512.0), 2e5, 0.0)))
    alike = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3)), apart)  # as searches ask for many prompts at once
    for name in ("step_s", "gpu_w", "gpu_j"):
        one, other = (jax.jit(getattr(capped.step, name))(batch) for batch in (apart, alike))
        np.testing.assert_allclose(one, other, rtol=1e-12)
    with pytest.raises(ValueError, match="is not made of operators"):
        fo.at_power_limit(fo.build(replace(LIMITED, serving="vllm-0.11")), 400.0)


@pytest.mark.nightly
def test_a_search_over_them_is_certified_and_no_worse_than_a_grid():
    workload = fo.make_workload([500, 4000, 9000], [200, 300, 150], [0.8, 0.15, 0.05], arrival_rate_per_s=40.0)
    specs = [fo.EngineSpec(gpu, "llama-3.1-70b", 4, "fp8", serving="vllm") for gpu in ("h100", "b200")]
    problem = fo.make_problem(workload, specs, slo=fo.make_slo(ttft_p99_s=2.0), n_pools=2)
    exact, grid = (fo.optimize(problem, method) for method in ("exact", "grid"))
    assert exact.status == "optimal"
    assert float(exact.metrics.tok_per_j) >= float(grid.metrics.tok_per_j) * (1 - 1e-9)
