"""Matrix products and routed experts: the laws' limits, slopes and errors, of every committed coefficient at once."""

import json
from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.core.struct import stack
from fleetopt_jax.laws.hardware import peak_of_bits
from fleetopt_jax.laws.llm import expert_coverage
from fleetopt_jax.laws.operators.experts import (
    Experts,
    experts_load,
    experts_s,
    make_experts,
    make_experts_law,
    timed_experts_s,
)
from fleetopt_jax.laws.operators.gemm import gemm_bytes, gemm_flop, gemm_s, make_gemm_law, timed_gemm_s
from fleetopt_jax.laws.operators.roofline import soft_roofline_s

N = 40  # points of each law
US = 1e-6
# Microseconds by (rows, outputs, inputs) that the laws were fitted to among others: vLLM 0.24.0, A100 0.14.0, in the
# kernel timings of ai-dynamo/aiconfigurator (095f58a, Apache-2.0).
SHAPES = ((8, 10240, 8192), (256, 10240, 8192), (4096, 10240, 8192), (64, 4096, 4096))
PRODUCTS = {
    ("a100", "bf16"): (120.9, 202.7, 2360.1, 27.2),
    ("h100", "bf16"): (71.5, 65.8, 876.3, 14.8),
    ("h100", "fp8"): (35.4, 56.1, 595.6, 12.1),
    ("h200", "bf16"): (47.5, 54.9, 940.7, 12.0),
    ("h200", "fp8"): (28.9, 52.1, 545.5, 10.8),
    ("b200", "bf16"): (30.5, 36.1, 382.5, 9.1),
    ("b200", "fp8"): (23.4, 32.2, 290.8, 9.4),
    ("b200", "nvfp4"): (15.3, 19.4, 156.4, 9.1),
    ("b300", "bf16"): (30.9, 34.7, 382.5, 9.4),
    ("b300", "nvfp4"): (15.2, 16.9, 148.9, 8.9),
    ("gb200", "bf16"): (29.3, 34.4, 377.3, 9.5),
    ("gb200", "fp8"): (24.7, 32.9, 249.2, 9.4),
    ("gb300", "bf16"): (29.5, 34.5, 347.9, 8.4),
    ("gb300", "nvfp4"): (15.0, 17.6, 144.3, 10.7),
    ("l40s", "bf16"): (248.7, 293.7, 2840.9, 50.2),
    ("l40s", "fp8"): (142.7, 216.6, 1811.4, 30.2),
    ("rtx-pro-6000", "bf16"): (118.7, 139.1, 1659.2, 27.4),
    ("rtx-pro-6000", "nvfp4"): (51.9, 41.6, 551.5, 21.2),
}
# The same of 8 of 128 experts of 4,096 x 1,536 by (tokens, tp, ep), loads drawn from a power law with exponent 1.2.
LOADS = ((64, 4, 1), (1024, 4, 1), (256, 1, 8))
GROUPED = {
    ("a100", "bf16"): (696.6, 1351.8, 622.6),
    ("h100", "bf16"): (405.9, 577.1, 293.4),
    ("h100", "fp8_block"): (238.3, 433.3, 157.1),
    ("h200", "bf16"): (303.0, 464.9, 233.4),
    ("b200", "bf16"): (175.8, 272.1, 109.9),
    ("b200", "fp8_block"): (114.2, 248.2, 99.9),
    ("b200", "nvfp4"): (71.0, 135.4, 61.0),
    ("b300", "fp8"): (101.9, 169.2, 69.8),
    ("gb200", "nvfp4"): (67.4, 129.4, 55.4),
    ("gb300", "bf16"): (171.7, 263.1, 108.3),
    ("l40s", "bf16"): (1574.9, 2195.8, 1065.9),
    ("rtx-pro-6000", "bf16"): (766.9, 1077.4, 451.3),
    ("rtx-pro-6000", "nvfp4"): (297.7, 470.5, 163.8),
}


def committed(name: str) -> dict:
    """The entries of a class by (GPU, data type)."""
    text = (files("fleetopt_jax.catalog") / "data" / "operators" / f"{name}.json").read_text(encoding="utf-8")
    gpus = json.loads(text)["gpus"]
    return {(gpu, variant): found for gpu, variants in gpus.items() for variant, found in variants.items()}


GEMM, EXPERTS = committed("gemm"), committed("experts")
GEMM_LAWS = stack([make_gemm_law(**found["coefficients"]) for found in GEMM.values()])
GEMM_GPUS = stack([gpu_entry(gpu).gpu for gpu, _ in GEMM])
EXPERTS_LAWS = stack([make_experts_law(**found["coefficients"]) for found in EXPERTS.values()])
EXPERTS_GPUS = stack([gpu_entry(gpu).gpu for gpu, _ in EXPERTS])


def sizes(*ranges: tuple[float, float], seed: int = 0) -> list[jnp.ndarray]:
    """N numbers for each range, evenly on a logarithmic scale."""
    u = np.random.default_rng(seed).random((len(ranges), N))
    return [jnp.asarray(low * (high / low) ** row) for (low, high), row in zip(ranges, u)]


def with_slopes(law_s, n_sizes: int):
    """Times and their slopes in each size: of every law [first axis] at every point [second]."""
    of_sizes = jax.value_and_grad(law_s, argnums=tuple(range(2, 2 + n_sizes)))
    return jax.jit(jax.vmap(jax.vmap(of_sizes, (None, None) + (0,) * n_sizes), (0, 0) + (None,) * n_sizes))


@pytest.mark.parametrize("law_s", [gemm_s, timed_gemm_s])
def test_a_product_takes_longer_with_every_size(law_s):
    shape = sizes((1, 32768), (32, 65536), (32, 65536))
    seconds, slopes = with_slopes(law_s, 3)(GEMM_LAWS, GEMM_GPUS, *shape)
    assert np.all(np.isfinite(seconds)) and np.all(np.asarray(seconds) > 0)
    assert all(np.all(np.isfinite(slope)) and np.all(np.asarray(slope) >= 0) for slope in slopes)


def test_of_no_rows_a_product_reads_its_weights():
    nothing = jnp.zeros(1), jnp.full(1, 8192.0), jnp.full(1, 8192.0)
    seconds, slopes = with_slopes(gemm_s, 3)(GEMM_LAWS, GEMM_GPUS, *nothing)
    weights_s = GEMM_LAWS.weight_bytes * 8192.0**2 / GEMM_GPUS.bandwidth_bytes_per_s
    assert np.all(np.asarray(seconds)[:, 0] > weights_s * GEMM_LAWS.byte_excess)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


def test_large_products_are_bound_by_bytes_or_by_flops():
    laws, gpus = GEMM_LAWS, GEMM_GPUS
    wide = 1.0, 2.0**24, 2.0**14
    seconds = jax.vmap(gemm_s, (0, 0, None, None, None))(laws, gpus, *wide)
    ideal_s = jax.vmap(gemm_bytes, (0, None, None, None))(laws, *wide) / gpus.bandwidth_bytes_per_s
    np.testing.assert_allclose(seconds, laws.byte_excess * ideal_s, rtol=0.02)
    cube = (2.0**18,) * 3
    seconds = jax.vmap(gemm_s, (0, 0, None, None, None))(laws, gpus, *cube)
    ideal_s = gemm_flop(*cube) / jax.vmap(peak_of_bits)(gpus, laws.flop_bits)
    np.testing.assert_allclose(seconds, laws.flop_excess * ideal_s, rtol=0.12)  # r is near 1 where nothing overlaps


def test_a_matrix_beyond_the_cache_is_read_from_memory():
    shape = 16.0, 65536.0, 65536.0
    cold, timed = (jax.vmap(f, (0, 0, None, None, None))(GEMM_LAWS, GEMM_GPUS, *shape) for f in (gemm_s, timed_gemm_s))
    np.testing.assert_allclose(timed, cold, rtol=2e-3)
    small = 16.0, 2048.0, 2048.0
    cold, timed = (jax.vmap(f, (0, 0, None, None, None))(GEMM_LAWS, GEMM_GPUS, *small) for f in (gemm_s, timed_gemm_s))
    assert np.all(np.asarray(timed) <= np.asarray(cold))


def test_the_soft_roofline_is_between_the_longer_time_and_the_sum():
    memory, compute = sizes((1e-9, 1.0), (1e-9, 1.0))
    for sharpness in (1.0, 1.5, 4.0, 12.0):
        seconds = np.asarray(soft_roofline_s(0.0, memory, compute, sharpness))
        assert np.all(seconds >= np.maximum(memory, compute) * (1 - 1e-12))
        assert np.all(seconds <= (memory + compute) * (1 + 1e-12))
    slopes = jax.vmap(jax.grad(soft_roofline_s, argnums=(1, 2, 3)), (None, 0, 0, None))
    at_zero = slopes(0.0, jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([0.0, 1.0, 0.0, 1.0]), 2.5)
    assert all(np.all(np.isfinite(slope)) for slope in at_zero)


def test_gradients_of_both_laws_are_right():
    law, gpu = make_gemm_law(**GEMM["h100", "fp8"]["coefficients"]), gpu_entry("h100").gpu
    check_grads(lambda law, *shape: 1e4 * gemm_s(law, gpu, *shape), (law, 100.0, 3000.0, 5000.0), 1, modes="rev")
    law, experts = make_experts_law(**EXPERTS["h100", "bf16"]["coefficients"]), qwen3()
    check_grads(lambda tokens, ep: 1e3 * experts_s(law, gpu, experts, tokens, 2.0, ep), (100.0, 4.0), 1, modes="rev")


def qwen3() -> Experts:
    return make_experts(hidden=4096, width=1536, per_token=8, n_experts=128)


def test_experts_take_longer_with_every_size():
    def seconds(law, gpu, tokens, hidden, width, per_token, n_experts, ep):
        experts = Experts(hidden, width, jnp.minimum(per_token, n_experts / 4), n_experts, jnp.asarray(3.0))
        return experts_s(law, gpu, experts, tokens, 1.0, ep)

    ranges = (1, 32768), (1024, 8192), (64, 16384), (1, 24), (8, 512), (1, 64)
    *shape, ep = sizes(*ranges)
    shape.append(jnp.minimum(ep, shape[-1]))
    values, slopes = with_slopes(seconds, 6)(EXPERTS_LAWS, EXPERTS_GPUS, *shape)
    assert np.all(np.isfinite(values)) and np.all(np.asarray(values) > 0)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    assert all(np.all(np.asarray(slope) >= 0) for slope in slopes[:4])


def test_of_no_tokens_experts_cost_a_launch_and_gradients_are_finite():
    def seconds(law, gpu, tokens, ep):
        return experts_s(law, gpu, qwen3(), tokens, 1.0, ep)

    values, slopes = with_slopes(seconds, 2)(EXPERTS_LAWS, EXPERTS_GPUS, jnp.zeros(2), jnp.array([1.0, 8.0]))
    walk_s = EXPERTS_LAWS.launch_s + EXPERTS_LAWS.depth_s * (4096 + 1536)
    np.testing.assert_allclose(values, np.column_stack([walk_s, walk_s]), rtol=1e-12)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


def test_an_even_router_touches_what_chance_says_and_an_uneven_one_less():
    (tokens,) = sizes((1, 4096))
    coefficients = EXPERTS["h100", "bf16"]["coefficients"]
    even = make_experts_law(**{**coefficients, "unevenness": 0.0})
    choices, used = experts_load(even, qwen3(), tokens)
    np.testing.assert_allclose(choices, 8 * tokens, rtol=1e-6)
    np.testing.assert_allclose(used, 128 * expert_coverage(8 / 128, tokens), rtol=1e-6)
    uneven = make_experts_law(**{**coefficients, "unevenness": 1.15})
    assert np.all(np.asarray(experts_load(uneven, qwen3(), tokens)[1]) <= np.asarray(used))
    in_turn = make_experts_law(**{**coefficients, "unevenness": -1.0, "spread": 0.0})
    assert float(experts_load(in_turn, qwen3(), 16.0)[1]) == pytest.approx(128.0)
    assert float(experts_load(in_turn, qwen3(), 4.0)[1]) == pytest.approx(32.0, rel=0.05)
    busiest, mean = experts_load(uneven, qwen3(), tokens, 8.0)[0], tokens
    assert np.all(np.asarray(busiest) >= np.asarray(mean)) and np.all(np.asarray(busiest) <= np.asarray(8 * tokens))


def test_committed_errors_are_as_small_as_asked():
    """8 % of 16-bit products, 12 % of others; what misses it is named, with the error it may have at most."""
    missed = {("gemm", "l40s", "bf16"): 0.10, ("gemm", "l40s", "fp8"): 0.13, ("experts", "a100", "bf16"): 0.125}
    for name, entries in (("gemm", GEMM), ("experts", EXPERTS)):
        for (gpu, variant), found in entries.items():
            if found["rows"]:
                limit = 0.08 if (name, variant) == ("gemm", "bf16") else 0.12
                assert found["median_error"] <= missed.get((name, gpu, variant), limit), (name, gpu, variant)
                assert found["held_out_median_error"] <= 0.15, (name, gpu, variant)
            else:
                assert found["borrowed_from"] in {variant for _, variant in entries}


def test_the_laws_describe_measured_points_of_every_gpu():
    wrong = []
    for key, measured_us in PRODUCTS.items():
        law, gpu = make_gemm_law(**GEMM[key]["coefficients"]), gpu_entry(key[0]).gpu
        seconds = [float(timed_gemm_s(law, gpu, *map(float, shape))) for shape in SHAPES]
        wrong.append(np.abs(np.array(seconds) / US / measured_us - 1))
    assert np.median(wrong) <= 0.08
    assert np.sort(wrong, axis=None)[-2] <= 0.30  # all but 256 rows in nvfp4 on RTX PRO 6000, quicker than 8 rows
    wrong = []
    for key, measured_us in GROUPED.items():
        law, gpu = make_experts_law(**EXPERTS[key]["coefficients"]), gpu_entry(key[0]).gpu
        seconds = [float(timed_experts_s(law, gpu, qwen3(), float(n), tp, ep)) for n, tp, ep in LOADS]
        wrong.append(np.abs(np.array(seconds) / US / measured_us - 1))
    assert np.median(wrong) <= 0.12
    assert np.max(wrong) <= 0.20


def test_coefficients_that_are_none_are_refused():
    coefficients = GEMM["h100", "bf16"]["coefficients"]
    for bad in ({"byte_excess": 0.0}, {"sharpness": 0.5}, {"launch_s": float("nan")}, {"cached_frac": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make_gemm_law(**{**coefficients, **bad})
    with pytest.raises(ValueError, match="need launch_s"):
        make_gemm_law(launch_s=1e-6)
    with pytest.raises(ValueError, match="per_token"):
        make_experts(hidden=4096, width=1536, per_token=128, n_experts=128)
    with pytest.raises(ValueError, match="unevenness"):
        make_experts_law(**{**EXPERTS["h100", "bf16"]["coefficients"], "unevenness": -2.0})
