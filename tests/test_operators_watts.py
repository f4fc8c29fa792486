"""Board watts of operators and of steps: limits, monotonicity, gradients, and what was measured."""

import json
from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.core.struct import as_floats, stack
from fleetopt_jax.laws.operators.watts import (
    LIMIT_FRAC,
    OperatorWatts,
    StepParts,
    asked_w,
    make_operator_watts,
    make_serving_watts,
    operator_w,
    step_asked_w,
    step_parts,
    step_power_w,
    step_s,
    step_watts,
)

KINDS = ("gemm", "experts", "decode_attention", "elementwise")
EXACT = 1e-12
DATA = files("fleetopt_jax.catalog").joinpath("data", "operators")


# Watts of kernels looped alone, by their shares of the peak bandwidth and FLOP/s: ai-dynamo/aiconfigurator 095f58a,
# vLLM 0.22. Products of 65,536 x 8,192, of 16,384 x 8,192 (nvfp4) and of 512 x 512; experts of Qwen3-235B-A22B at TP 4;
# one prompt of 32 heads with 8 KV heads.
KERNELS = (
    ("h200", "gemm_bf16", 0.886, 0.0215, 642),
    ("h200", "gemm_bf16", 0.111, 0.6855, 690),
    ("h200", "gemm_bf16", 0.709, 0.5423, 695),
    ("h200", "gemm_bf16", 0.036, 0.0015, 158),
    ("h200", "experts_bf16", 0.931, 0.0070, 638),
    ("h200", "experts_fp8_block", 0.597, 0.0346, 669),
    ("h200", "prefill_attention_bf16", 0.109, 0.4323, 662),
    ("b200", "gemm_bf16", 0.807, 0.0172, 743),
    ("b200", "gemm_bf16", 0.180, 0.6957, 985),
    ("b200", "gemm_nvfp4", 0.121, 0.4651, 982),
    ("b200", "experts_bf16", 0.677, 0.0055, 950),
    ("b200", "experts_fp8_block", 0.494, 0.0105, 894),
    ("b200", "prefill_attention_bf16", 0.081, 0.4722, 863),
    ("gb200", "gemm_bf16", 0.921, 0.0236, 809),
    ("gb200", "gemm_bf16", 0.141, 0.7210, 1164),
    ("gb200", "gemm_nvfp4", 0.124, 0.4305, 1151),
    ("gb200", "prefill_attention_bf16", 0.054, 0.4228, 1101),
)
# Watts of one GPU and the mean step of ML.ENERGY's instances (v3, vLLM 0.11; arXiv 2601.22076): milliseconds of the
# step, of its products' and of attention's kernels (estimated), of weights and of KV caches over the peak bandwidth, of
# FLOPs over the peak, and watts. Llama-3.1-70B with 8 and 128 sequences at TP 4 and TP 2, Llama-3.1-8B with 32 and 128.
SERVED = (
    ("h100", 17.00, 14.3, 0.7, 10.4, 0.1, 0.56, 441),
    ("h100", 32.92, 20.2, 3.4, 10.4, 2.0, 8.8, 546),
    ("h100", 9.41, 6.2, 1.5, 4.5, 0.9, 0.9, 560),
    ("h100", 18.14, 7.6, 5.0, 4.5, 3.3, 3.5, 669),
    ("b200", 16.80, 12.2, 0.7, 8.7, 0.1, 0.5, 849),
    ("b200", 24.50, 13.1, 1.8, 8.7, 0.9, 3.9, 905),
)
SERVED_ERROR = 0.20  # the 90th percentile of the fit


def entries(name: str) -> dict:
    return json.loads(DATA.joinpath(f"{name}.json").read_text())["gpus"]


def operator_law(gpu: str, variant: str) -> OperatorWatts:
    return make_operator_watts(**entries("watts")[gpu][variant]["coefficients"])


def serving_law(gpu: str):
    return make_serving_watts(**entries("serving_watts")[gpu]["serving"]["coefficients"])


def parts_of(seconds_s, memory_s, flop_s, gap_s) -> StepParts:
    return StepParts(**as_floats(seconds_s=seconds_s, memory_s=memory_s, flop_s=flop_s, gap_s=gap_s))


def random_parts(n: int) -> StepParts:
    """Steps of all mixtures, some without some kinds or without a gap; an operator keeps no peak busier than fully."""
    u = np.random.default_rng(0).uniform(size=(n, 4, len(KINDS)))
    seconds_s = np.where(u[:, 0] < 0.2, 0.0, 10.0 ** (-5.0 + 4.0 * u[:, 1]))
    gap_s = np.where(u[:, 2, 0] < 0.3, 0.0, 10.0 ** (-5.0 + 4.0 * u[:, 3, 0]))
    return parts_of(seconds_s, seconds_s * u[:, 2], seconds_s * u[:, 3] ** 3, gap_s)


def test_an_operator_draws_more_the_busier_it_keeps_the_gpu_and_never_more_than_the_board_may():
    laws = [
        (GPUS[gpu].gpu, operator_law(gpu, v)) for gpu in entries("watts") if gpu in GPUS for v in entries("watts")[gpu]
    ]
    share = jnp.linspace(0.0, 1.0, 41)

    def grid(gpu, law):
        return jax.vmap(lambda m: jax.vmap(lambda f: operator_w(law, gpu, m, f))(share))(share)

    gpus, records = (stack(column) for column in zip(*laws))
    watts = jax.jit(jax.vmap(grid))(gpus, records)
    assert jnp.all(jnp.diff(watts, axis=1) >= 0) and jnp.all(jnp.diff(watts, axis=2) >= 0)
    limit_w = gpus.tdp_w[:, None, None]
    assert jnp.all(watts <= LIMIT_FRAC * limit_w * (1 + EXACT))
    assert jnp.all(watts > gpus.idle_w[:, None, None] - 1e-3 * limit_w)


def test_an_operator_that_does_nothing_draws_little_more_than_idle_and_the_limit_holds_a_large_product():
    for name in ("h200", "b200", "gb200"):
        gpu, law = GPUS[name].gpu, operator_law(name, "gemm_bf16")
        assert abs(float(operator_w(law, gpu, 0.0, 0.0)) / float(gpu.idle_w) - 1.0) < 0.12
        assert float(operator_w(law, gpu, 0.1, 0.7)) > 0.95 * float(gpu.tdp_w)
        assert float(asked_w(law, gpu, 0.1, 0.7)) > float(gpu.tdp_w)


def test_a_step_of_one_kind_is_that_operator_and_a_step_that_waits_is_a_gap():
    gpu = GPUS["h100"].gpu
    law = step_watts(serving_law("h100"), KINDS)
    mean_w = jax.jit(lambda parts: step_power_w(law, gpu, parts))
    for i in range(len(KINDS)):
        one = OperatorWatts(*(leaf[i] for leaf in jax.tree.leaves(law.operators)))
        only = np.arange(len(KINDS)) == i
        parts = parts_of(2e-3 * only, 0.6e-3 * only, 0.2e-3 * only, 0.0)
        np.testing.assert_allclose(mean_w(parts), operator_w(one, gpu, 0.3, 0.1), EXACT)
    zeros = np.zeros(len(KINDS))
    waits = step_asked_w(law, gpu, parts_of(zeros, zeros, zeros, 1e-3))
    np.testing.assert_allclose(waits, gpu.idle_w + gpu.tdp_w * law.gap_frac, EXACT)
    slow = step_watts(serving_law("h100"), KINDS, slow_experts=True)
    assert slow.gap_frac > law.gap_frac


def test_energies_of_steps_add_up_below_the_limit():
    """Two steps in one take the joules of both: watts are joules over seconds, whatever is beside what."""
    gpu = GPUS["b200"].gpu
    one, two = (step_watts(serving_law("b200"), KINDS * n) for n in (1, 2))

    def joules(law, parts):
        return step_asked_w(law, gpu, parts) * step_s(parts)

    def both(a, b):
        seconds_s, memory_s, flop_s = (
            jnp.concatenate([getattr(a, x), getattr(b, x)]) for x in ("seconds_s", "memory_s", "flop_s")
        )
        return StepParts(seconds_s, memory_s, flop_s, a.gap_s + b.gap_s)

    @jax.jit
    @jax.vmap
    def compared(a, b):
        return joules(two, both(a, b)), joules(one, a) + joules(one, b)

    parts = random_parts(2000)
    together, apart = compared(parts, jax.tree.map(lambda x: np.roll(x, 1, axis=0), parts))
    np.testing.assert_allclose(together, apart, 1e-9)


def test_watts_of_a_step_rise_with_its_bytes_and_flops_and_their_gradients_are_finite_everywhere():
    gpu, law = GPUS["h100"].gpu, step_watts(serving_law("h100"), KINDS)
    parts = random_parts(2000)
    slope = jax.jit(jax.vmap(jax.grad(lambda p: step_power_w(law, gpu, p))))(parts)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slope))
    assert jnp.all(slope.memory_s >= 0) and jnp.all(slope.flop_s >= 0)
    zeros = np.zeros(len(KINDS))
    energy = jax.jit(jax.grad(lambda p: step_power_w(law, gpu, p) * step_s(p)))
    for record in (parts_of(zeros, zeros, zeros, 0.0), parts_of(zeros, zeros, zeros, 1e-3)):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(energy(record)))


def test_gradients_of_the_whole_law():
    gpu, law = GPUS["b200"].gpu, step_watts(serving_law("b200"), KINDS)
    parts = parts_of(np.array([3e-3, 2e-3, 1e-3, 5e-4]), np.full(4, 4e-4), np.full(4, 1e-4), 1e-3)
    floats = jax.tree.map(jnp.asarray, (law, gpu))

    @jax.jit
    def kilowatts(law, gpu, milliseconds):
        return step_power_w(law, gpu, jax.tree.map(lambda x: 1e-3 * x, milliseconds)) / 1e3

    scale = jax.tree.map(lambda x: 1e3 * x, parts)
    check_grads(lambda law, ms: kilowatts(law, floats[1], ms), (floats[0], scale), order=1, modes=("rev",))


@pytest.mark.parametrize(
    "bad", [{"memory_frac": -0.1}, {"flop_power": 0.0}, {"flop_power": 1.5}, {"busy_frac": np.nan}]
)
def test_bad_coefficients_are_refused(bad):
    good = {"busy_frac": 0.05, "memory_frac": 0.6, "flop_frac": 1.0, "flop_power": 0.7}
    with pytest.raises(ValueError, match="need fractions >= 0"):
        make_operator_watts(**{**good, **bad})


def test_kernels_draw_what_was_measured_and_the_errors_said_are_those_kept():
    for gpu, variant, memory_share, flop_share, watts in KERNELS:
        said = float(operator_w(operator_law(gpu, variant), GPUS[gpu].gpu, memory_share, flop_share))
        error = entries("watts")[gpu][variant]["p90_error"]
        assert abs(said / watts - 1.0) < error, (gpu, variant, memory_share, flop_share, said, watts)
    fitted = [e for of in entries("watts").values() for e in of.values() if e["rows"]]
    assert len(fitted) == 15 and sum(e["rows"] for e in fitted) == 99_006
    assert all(e["median_error"] < 0.14 and e["p90_error"] < 0.40 for e in fitted)
    assert all(e["below_limit_median_error"] < 0.28 for e in fitted)


def test_steps_draw_what_was_measured():
    mean_w = jax.jit(step_power_w)
    for gpu, *ms, watts in SERVED:
        whole, products, attention, weights, caches, flops = (1e-3 * x for x in ms)
        law = step_watts(serving_law(gpu), ("gemm", "decode_attention"))
        gap_s = whole - products - attention
        parts = parts_of([products, attention], [weights, caches], [flops, 0.0], gap_s)
        said = float(mean_w(law, GPUS[gpu].gpu, parts))
        assert abs(said / watts - 1.0) < SERVED_ERROR, (gpu, ms, said, watts)
    for gpu, held_out in (("h100", 0.107), ("b200", 0.117)):
        assert entries("serving_watts")[gpu]["serving"]["held_out_mean_error"] < held_out


def test_parts_of_a_step_leave_a_gap_where_its_operators_take_less():
    gpu = GPUS["h100"].gpu
    seconds_s, n_bytes = jnp.array([3e-3, 1e-3]), jnp.array([6.7e9, 0.0])
    parts = step_parts(gpu, seconds_s, n_bytes, jnp.zeros(2), 5e-3)
    np.testing.assert_allclose(parts.gap_s, 1e-3, EXACT)
    np.testing.assert_allclose(parts.memory_s, [2e-3, 0.0], EXACT)
    assert float(step_parts(gpu, seconds_s, n_bytes, jnp.zeros(2), 3e-3).gap_s) == 0.0
