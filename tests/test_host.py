"""The serving engine's own time: limits, gradients, committed coefficients, and points that were measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.hosts import document, host_entry, serving_engines
from fleetopt_jax.catalog.llms import LLMS
from fleetopt_jax.catalog.steps import Parallelism, step_entry
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.laws.host import make_host_law
from fleetopt_jax.laws.mixed_step import decoding
from fleetopt_jax.laws.operators.roofline import soft_roofline_s

# Mean TPOT [ms] of closed loops of vLLM: SemiAnalysis InferenceX, by way of silicon_sample.csv of aiconfigurator-core
# 0.12.0 (Apache-2.0); 1,024 tokens in, 8,192 out, so that next to no step has a prompt.
MEASURED = (  # GPU, LLM, precision, KV cache, split, sequences, ms
    ("h100", "llama-3.1-70b", "fp8", "bf16", Parallelism(tp=4), 4, 11.9954),
    ("h100", "llama-3.1-70b", "fp8", "bf16", Parallelism(tp=4), 64, 23.4067),
    ("h100", "llama-3.1-70b", "fp8", "bf16", Parallelism(tp=8), 16, 11.5839),
    ("h100", "gpt-oss-120b", "mxfp4", "bf16", Parallelism(tp=2), 4, 4.96240),
    ("h100", "gpt-oss-120b", "mxfp4", "bf16", Parallelism(tp=2), 64, 14.3759),
    ("b200", "llama-3.1-70b", "nvfp4", "fp8", Parallelism(tp=2), 16, 10.7310),
    ("b200", "llama-3.1-70b", "fp8", "fp8", Parallelism(tp=2), 64, 15.6773),
    ("b200", "gpt-oss-120b", "mxfp4", "fp8", Parallelism(tp=1), 32, 7.32716),
)
CONTEXT_TOKENS = 0.9 * (1024 + 8192 / 2)  # lengths are drawn from 0.8 to 1.0 of the nominal ones


def longer_of(a, b, sharpness):
    return soft_roofline_s(0.0, a, b, sharpness)


def test_the_longer_counts_and_both_where_they_meet():
    a, b = np.geomspace(1e-6, 1.0, 50), np.full(50, 1e-3)
    both = longer_of(a, b, 4.0)
    np.testing.assert_allclose(both, (a**4 + b**4) ** 0.25, rtol=1e-12)
    np.testing.assert_allclose(longer_of(a, np.zeros(50), 4.0), a, rtol=1e-12)
    slopes = jax.vmap(jax.grad(longer_of, argnums=(0, 1)), (0, 0, None))(jnp.asarray(a), jnp.zeros(50), 4.0)
    assert all(jnp.all(jnp.isfinite(slope)) for slope in slopes)
    check_grads(longer_of, (2.0, 1.0, 4.0), order=1, modes=["rev"], rtol=1e-3)


def test_a_host_hides_behind_the_gpu_and_prompts_cost_it_more():
    host = make_host_law(slowdown=1.1, prompt_slowdown=1.3, layer_s=5e-5, prompt_layer_s=5e-4, per_seq_s=1e-5)
    long_s, short_s = host.step_of_s(1.0, 80, 0.0), host.step_of_s(1e-6, 80, 0.0)
    np.testing.assert_allclose([long_s, short_s], [1.1, 80 * 5e-5], rtol=1e-6)
    np.testing.assert_allclose(host.step_of_s(1e-6, 80, 0.0, 1.0), 80 * 5.5e-4, rtol=1e-6)
    np.testing.assert_allclose(host.step_of_s(1.0, 80, 100.0) - long_s, 1e-3, rtol=1e-9)


def test_small_steps_with_prompts_replay_a_graph():
    host = make_host_law(layer_s=5e-5, prompt_layer_s=5e-4, graph_rows=512.0)

    def step_s(rows):
        return host.step_of_s(1e-6, 80, 0.0, 1.0, rows)

    few_s, many_s = step_s(64.0), step_s(8192.0)
    np.testing.assert_allclose([few_s, many_s], [80 * 5e-5, 80 * 5.5e-4], rtol=5e-3)
    assert (np.diff(step_s(np.geomspace(1.0, 16384.0, 50))) >= 0).all()
    assert jnp.isfinite(jax.grad(step_s)(0.0)) and jnp.isfinite(jax.grad(step_s)(512.0))


def test_a_host_law_refuses_what_is_no_time():
    for wrong in (dict(slowdown=0.0), dict(layer_s=-1e-6), dict(per_seq_s=float("nan"))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make_host_law(**wrong)


def test_committed_laws_are_laws_and_say_how_good_they_are():
    assert serving_engines()[0] in document()["engines"]
    for serving in serving_engines():
        for gpu in GPUS.values():
            for experts in (False, True):
                entry = host_entry(serving, gpu, experts=experts)
                law = entry.law
                assert law.prompt_slowdown >= law.slowdown  # or a step would fall with its first prompt token
                assert 0.0 < entry.errors.get("tpot", 0.2) < 0.6, (serving, gpu.name)
    assert host_entry("vllm", GPUS["h100"], experts=False).measured_on == "h100"
    assert host_entry("vllm", GPUS["l40s"], experts=False).measured_on is None
    with pytest.raises(BadField, match="serving"):
        host_entry("vlm", GPUS["h100"], experts=False)


def test_measured_steps_are_met():
    """Within 15 %, one by one, what the fit's mean errors of 3 to 10 % leave room for."""
    for gpu, llm, precision, kv, split, n, ms in MEASURED:
        step = step_entry(LLMS[llm].architecture, GPUS[gpu], split, precision, kv).step
        step_s = float(step.step_s(decoding(n, CONTEXT_TOKENS, step.window_tokens)))
        assert abs(step_s / (ms * 1e-3) - 1.0) < 0.15, (gpu, llm, n, step_s)
