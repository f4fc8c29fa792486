"""Power, decode step, KV capacity, routing, prefill and service time: what each law promises, over many records."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax.catalog.engines import build
from fleetopt_jax.core.struct import stack
from fleetopt_jax.fleet.engine import Engine, make_engine, roofline_engine
from fleetopt_jax.fleet.surroundings import make_site
from fleetopt_jax.laws.compression import make_compressor
from fleetopt_jax.laws.decode import DecodeStep, decode_tok_per_s, make_decode_step
from fleetopt_jax.laws.hardware import Gpu, make_gpu
from fleetopt_jax.laws.kv_cache import KvCapacity, make_kv_capacity, max_sequences, roofline_kv_blocks
from fleetopt_jax.laws.llm import Llm, gqa_kv_bytes_per_token, make_llm, mla_kv_bytes_per_token, n_active_params
from fleetopt_jax.laws.power import LogisticPower, PowerLaw, make_logistic_power, roofline_power
from fleetopt_jax.laws.prefill import Prefill, lone_iteration_s, make_prefill, prefill_chunks
from fleetopt_jax.laws.roofline import roofline_decode_step
from fleetopt_jax.laws.routing import router_edges, soft_share
from fleetopt_jax.laws.service import MIN_SCV, service_moments_s, step_moments

N = 2000
EIGHT_B200 = dict(memory_bytes=180e9, bandwidth_bytes_per_s=8e12, peak_flop_per_s=2.25e15, tdp_w=1000.0, usd_per_h=8.0)
DENSE_8B = dict(n_dense_params=8e9, n_layers=32, bytes_per_weight=2, kv_bytes_per_token=131_072)
SPARSE = dict(n_dense_params=1e10, n_expert_params=2e11, expert_share=0.0625, n_layers=90, bytes_per_weight=1)
SPARSE |= dict(kv_bytes_per_token=7e4, windowed_frac=0.5, window_tokens=1024)
CHUNKS = dict(chunk_tokens=1024, calibration_tokens=8192, per_token_s=2e-5, gpu_w=650)


def gpu_w(power: PowerLaw, n_active, context_tokens):
    return power.gpu_w(n_active, context_tokens)


power_w = jax.jit(jax.vmap(gpu_w))
power_slope = jax.jit(jax.vmap(jax.grad(gpu_w, argnums=1)))


def uniform(*ranges: tuple[float, float], seed: int = 0) -> list[np.ndarray]:
    """One array of N numbers for each range."""
    u = np.random.default_rng(seed).random((len(ranges), N))
    return [low + (high - low) * row for (low, high), row in zip(ranges, u, strict=True)]


def published_step(base_s, per_token_s) -> DecodeStep:
    """t = W + H (L / L_cal) n: of the general form only two terms."""
    zero = jnp.zeros_like(jnp.asarray(base_s))
    return DecodeStep(base_s, zero, zero, zero, per_token_s, zero, zero)


def random_steps(seed: int = 1) -> DecodeStep:
    base_s, per_seq_s, tokens = uniform((1e-3, 2e-2), (1e-5, 1e-3), (1024, 16_384), seed=seed)
    return published_step(base_s, per_seq_s / tokens)


def random_gpus(seed: int = 2) -> Gpu:
    memory, bandwidth, flop, tdp, nccl = uniform(
        (16e9, 200e9), (1e12, 8e12), (1e14, 3e15), (300, 1200), (0, 1e9), seed=seed
    )
    return Gpu(
        memory_bytes=memory,
        bandwidth_bytes_per_s=bandwidth,
        peak_flop_per_s=flop,
        peak_flop8_per_s=2 * flop,
        tdp_w=tdp,
        idle_w=tdp / 4,
        usd_per_h=np.ones(N),
        nccl_bytes=nccl,
        link_bytes_per_s=bandwidth / 8,
        link_gpus=np.full(N, 8.0),
        inter_node_bytes_per_s=bandwidth / 80,
        peak_flop4_per_s=4 * flop,
    )


def random_llms(seed: int = 3) -> Llm:
    params, sparse, share, layers, weight_bytes, kv_bytes = uniform(
        (1e9, 7e11), (-1, 1), (0.02, 0.9), (20, 130), (0.5, 2), (3e4, 5e5), seed=seed
    )
    experts = np.maximum(sparse, 0.0)  # half of them dense
    return Llm(
        n_dense_params=params * (1 - experts),
        n_expert_params=params * experts,
        expert_share=np.where(experts > 0, share, 0.0),
        n_embedding_params=np.zeros(N),
        n_layers=layers,
        bytes_per_weight=weight_bytes,
        bytes_per_expert_weight=weight_bytes,
        eight_bit_frac=np.zeros(N),
        kv_bytes_per_token=kv_bytes,
        n_kv_heads=np.full(N, 8.0),
        attention_flop_per_token2=np.zeros(N),
        windowed_frac=np.zeros(N),
        window_tokens=np.zeros(N),
        padding_bytes=np.zeros(N),
        state_bytes=np.zeros(N),
    )


def test_logistic_power_is_bounded_and_rises_with_batch():
    idle, span, steepness, half, log2_batch = uniform((0, 500), (1, 600), (0.1, 3), (-1, 9), (-3, 12))
    power = LogisticPower(idle_w=idle, nominal_w=idle + span, steepness=steepness, log2_half_batch=half)
    batch, context = 2.0**log2_batch, np.ones(N)
    watts = np.asarray(power_w(power, batch, context))
    assert np.all((idle <= watts) & (watts <= idle + span))
    slope = np.asarray(power_slope(power, batch, context))
    assert np.all(slope[batch > 1] > 0)
    assert np.all(slope[batch < 1] == 0)  # an instance with less than one sequence draws what one sequence draws
    half_batch = 2.0 ** np.abs(half)
    midway = power_w(LogisticPower(idle, idle + span, steepness, np.abs(half)), half_batch, context)
    np.testing.assert_allclose(midway, idle + span / 2, rtol=1e-12)


def test_roofline_power_is_bounded_and_rises_with_batch():
    step, gpu, llm = random_steps(), random_gpus(), random_llms()
    log2_batch, context = uniform((0, 12), (16, 65_536))
    power = jax.vmap(roofline_power)(gpu, llm, np.full(N, 8.0), step)
    np.testing.assert_allclose(power.compute_s_per_seq, 2 * n_active_params(llm) / 8 / gpu.peak_flop_per_s, rtol=1e-14)
    batch = 2.0**log2_batch
    watts = np.asarray(power_w(power, batch, context))
    assert np.all((0.43 * gpu.tdp_w <= watts) & (watts <= 0.86 * gpu.tdp_w * (1 + 1e-15)))
    assert np.any(watts > 0.8599 * gpu.tdp_w)
    assert np.all(np.asarray(power_slope(power, batch, context)) >= 0)


def test_decode_step_is_weights_plus_a_scan_of_every_cache():
    step, (batch, context) = random_steps(), uniform((1, 1024), (1, 131_072))
    seconds = jax.jit(jax.vmap(DecodeStep.step_s))(step, batch, context)
    expected = step.base_s + step.per_token_s * batch * context
    np.testing.assert_allclose(seconds, expected, rtol=1e-14)
    tok_per_s = jax.jit(jax.vmap(decode_tok_per_s))(step, batch, context)
    np.testing.assert_allclose(tok_per_s * seconds, batch, rtol=1e-14)
    # More sequences always give more tokens a second, but never more than the caches can be read.
    assert np.all(tok_per_s < 1 / (step.per_token_s * context))


def test_roofline_coefficients_are_bytes_over_bandwidth():
    gpu, llm = random_gpus(), random_llms()
    tp = np.exp2(np.floor(uniform((0, 4))[0]))
    step = jax.jit(jax.vmap(roofline_decode_step))(gpu, llm, tp)
    n_params = llm.n_dense_params + llm.n_expert_params
    streamed = n_params * llm.bytes_per_weight / tp / (0.8 * gpu.bandwidth_bytes_per_s) + 3e-6 * llm.n_layers
    sparse = n_active_params(llm) * llm.bytes_per_weight / tp / gpu.bandwidth_bytes_per_s
    dense = llm.n_expert_params == 0
    assert 0.2 < np.mean(dense) < 0.8
    np.testing.assert_allclose(step.base_s, np.where(dense, streamed, sparse), rtol=1e-14)
    scanned = 4096 * llm.kv_bytes_per_token / (0.8 * gpu.bandwidth_bytes_per_s) / tp
    np.testing.assert_allclose(4096 * step.per_token_s, scanned, rtol=1e-14)
    rest = (step.expert_s, step.expert_share, step.per_seq_s, step.windowed_token_s, step.window_tokens)
    assert all(np.all(np.asarray(x) == 0) for x in rest)


def test_roofline_blocks_fill_the_free_memory_and_never_more():
    gpu, llm = random_gpus(), random_llms()
    tp = np.exp2(np.floor(uniform((0, 4))[0]))
    blocks = np.asarray(jax.jit(jax.vmap(roofline_kv_blocks))(gpu, llm, tp))
    nccl = np.where(tp > 1, gpu.nccl_bytes, 0.0)
    free = 0.9 * gpu.memory_bytes - (llm.n_dense_params + llm.n_expert_params) * llm.bytes_per_weight / tp - nccl
    block_bytes = 16 * llm.kv_bytes_per_token
    assert np.all(blocks == np.floor(blocks))
    assert np.all(blocks[free < 0] == 0)
    assert 0.1 < np.mean(free > 0) < 0.95
    assert np.all((blocks * block_bytes <= free)[free > 0])
    assert np.all(((blocks + 1) * block_bytes > free)[free > 0])


def test_kv_bytes_follow_the_attention_kind():
    # Llama-3.1-70B: 80 layers, 8 KV heads of 128 in 16 bits; DeepSeek-V3: 61 layers, latent 512 + rotary 64.
    assert gqa_kv_bytes_per_token(n_layers=80, n_kv_heads=8, head_dim=128, bytes_per_value=2) == 327_680
    assert mla_kv_bytes_per_token(n_layers=61, latent_dim=512, rope_dim=64, bytes_per_value=2) == 70_272


def test_capacity_halves_when_the_window_doubles():
    rng = np.random.default_rng(4)
    blocks, slot_tokens = rng.integers(0, 200_000, N), rng.integers(1, 8_000_000, N)
    window = 16 * rng.integers(1, 8192, N)
    kv = KvCapacity(1.0 * blocks, 1.0 * slot_tokens, fixed_tokens=np.zeros(N), max_num_seqs=np.full(N, 1024.0))
    whole = jax.jit(jax.vmap(max_sequences))
    real = jax.jit(jax.vmap(lambda kv, window: max_sequences(kv, window, whole=False)))
    n_max = np.asarray(whole(kv, 1.0 * window))
    assert np.all(n_max == np.minimum(slot_tokens // window, blocks // (window // 16)))
    assert np.all(whole(kv, 2.0 * window) == n_max // 2)
    np.testing.assert_allclose(2 * real(kv, 2.0 * window), real(kv, 1.0 * window), rtol=1e-15)
    odd = window - rng.uniform(0.0, 15.5, N)
    assert np.all(whole(kv, odd) == np.minimum(np.floor(slot_tokens / odd), blocks // np.ceil(odd / 16)))
    assert np.all(np.asarray(whole(kv, odd)) <= np.asarray(real(kv, odd)))
    assert np.all(jax.vmap(jax.grad(lambda window, kv: max_sequences(kv, window, whole=False)))(odd, kv) <= 0)


def test_tokens_per_watt_halve_when_the_window_doubles(h100):
    """The 1/W law with real-valued slots: exactly one half, times how much more a fuller batch draws."""

    def tok_per_w(window):
        engine = build(h100)
        n_max = max_sequences(engine.kv, window, whole=False)
        watts = engine.power.gpu_w(n_max, window / 2)
        return decode_tok_per_s(engine.decode, n_max, window / 2) / watts, watts

    windows = np.geomspace(2048.0, 131_072.0, 601)  # 100 steps to a doubling
    tok, watts = (np.asarray(x) for x in jax.jit(jax.vmap(tok_per_w))(windows))
    assert np.all(np.diff(tok) < 0)
    ratio = tok[100:] / tok[:-100]
    np.testing.assert_allclose(ratio, 0.5 * watts[:-100] / watts[100:], rtol=1e-12)
    assert np.all((ratio > 0.5) & (ratio < 0.65))
    assert np.all(ratio[windows[:-100] <= 8192] < 0.56)  # a full batch draws nearly its most: close to one half


def test_soft_shares_of_all_pools_sum_to_one_and_sharpen_to_the_hard_router():
    rng = np.random.default_rng(5)
    total = np.exp(rng.uniform(0, 12, N))
    width = np.exp(rng.uniform(np.log(1e-4), np.log(2.0), N))
    windows = np.sort(np.exp(rng.uniform(1, 11, (N, 4))), axis=1)
    gamma = 1 + rng.random((N, 4))
    edges = np.asarray(jax.jit(jax.vmap(router_edges))(windows, gamma))
    assert np.all(np.diff(edges, axis=1) >= 0)
    assert np.all(edges >= windows * gamma)
    lower = np.concatenate([np.zeros((N, 1)), edges], axis=1)
    upper = np.concatenate([edges, np.full((N, 1), np.inf)], axis=1)
    of_pools = jax.jit(jax.vmap(jax.vmap(soft_share, (None, 0, 0, None))))
    shares = np.asarray(of_pools(total, lower, upper, width))
    assert np.all((shares >= 0) & (shares <= 1))
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-14)
    hard = (lower < total[:, None]) & (total[:, None] <= upper)
    # A logistic is within exp(-|distance| / width) of its step.
    distance = np.abs(np.log(edges / total[:, None])).min(axis=1)
    assert np.all(np.abs(shares - hard).max(axis=1) <= 2 * np.exp(-distance / width) + 1e-15)
    slopes = jax.jit(jax.vmap(jax.vmap(jax.grad(soft_share, argnums=(0, 1, 2, 3)), (None, 0, 0, None))))
    assert all(np.all(np.isfinite(x)) for x in slopes(total, lower, upper, width))


def test_prefill_takes_whole_chunks_of_an_empty_instance():
    rng = np.random.default_rng(6)
    prompt, chunk = rng.integers(1, 200_000, N), rng.integers(1, 4096, N)
    chunks = np.asarray(prefill_chunks(1.0 * prompt, 1.0 * chunk))
    assert np.all(chunks == -(-prompt // chunk))
    np.testing.assert_allclose(prefill_chunks(prompt, chunk, whole=False), prompt / chunk, rtol=1e-15)
    step, (tokens,) = random_steps(), uniform((1024, 16_384))
    prefill = Prefill(1.0 * chunk, tokens, *np.ones((5, N)))
    seconds = chunks * jax.vmap(lone_iteration_s)(step, prefill)
    np.testing.assert_allclose(seconds, chunks * (step.base_s + step.per_token_s * tokens), rtol=1e-14)


def test_service_moments_are_those_of_the_requests_themselves():
    rng = np.random.default_rng(7)
    prompt, output = np.round(np.exp(rng.uniform(0, 10, (2, 300))))
    weight = rng.dirichlet(np.ones(300))
    step, (n_active,) = random_steps(), uniform((1, 512))
    length = prompt + output
    mean = jax.tree.map(lambda x: jnp.sum(weight * x), step_moments(np.ceil(prompt / 1024), output, length))
    mean_s, scv = jax.jit(jax.vmap(service_moments_s, (0, None, 0)))(step, mean, n_active)
    step_s = step.base_s[:, None] + (step.per_token_s * n_active)[:, None] * length
    service_s = (np.ceil(prompt / 1024) + output) * step_s
    expected = service_s @ weight
    variance = (service_s - expected[:, None]) ** 2 @ weight
    np.testing.assert_allclose(mean_s, expected, rtol=1e-12)
    np.testing.assert_allclose(scv, variance / expected**2, rtol=1e-10)  # a difference of second moments loses digits


def test_equal_requests_have_the_least_variability_and_finite_gradients():
    mean = step_moments(1.0, 200.0, 1000.0)

    def scv(base_s):
        return service_moments_s(published_step(base_s, 3e-4 / 8192), mean, 64.0)[1]

    assert scv(4e-3) == MIN_SCV
    assert jnp.isfinite(jax.grad(scv)(4e-3))


def engines() -> dict[str, Engine]:
    """One engine of each power law, every number finite and away from a kink."""
    logistic = make_engine(
        make_decode_step(base_s=4e-3, per_token_s=3.2e-4 / 8192),
        make_kv_capacity(n_blocks=65_536, slot_tokens=2e6),
        make_logistic_power(idle_w=300, nominal_w=600, log2_half_batch=4.2),
        make_prefill(**CHUNKS),
        gpus_per_instance=8,
        usd_per_gpu_h=4,
    )
    roofline = roofline_engine(make_gpu(**EIGHT_B200), make_llm(**DENSE_8B), 8, make_prefill(**CHUNKS))
    return {"logistic": logistic, "roofline": Engine(**{**vars(roofline), "kv": logistic.kv})}


def instance_metrics(engine: Engine, window: jax.Array) -> jax.Array:
    """A number from every law, of one instance of `engine` at half its capacity, with real rounding."""
    n_active = 0.5 * max_sequences(engine.kv, window, whole=False)
    prompt, output = jnp.array([300.0, 3000.0]), jnp.array([500.0, 90.0])
    chunks = prefill_chunks(prompt, engine.prefill.chunk_tokens, whole=False)
    mean = jax.tree.map(jnp.mean, step_moments(chunks, output, prompt + output))
    return jnp.stack(
        [
            engine.power.gpu_w(n_active, window / 2),
            decode_tok_per_s(engine.decode, n_active, window / 2),
            mean.chunks * lone_iteration_s(engine.decode, engine.prefill),
            *service_moments_s(engine.decode, mean, n_active),
            engine.gpus_per_instance * engine.usd_per_gpu_h,
        ]
    )


@pytest.mark.parametrize("kind", ["logistic", "roofline"])
def test_every_number_of_an_engine_is_differentiable(kind):
    """In logs, so that seconds and bytes have one scale: every leaf is moved by a factor (what is 0 stays 0)."""
    engine = engines()[kind]

    def logs(log_factors, log_window):
        moved = jax.tree.map(lambda x, log_factor: x * jnp.exp(log_factor), engine, log_factors)
        return jnp.log(instance_metrics(moved, jnp.exp(log_window)))

    at = jax.tree.map(jnp.zeros_like, engine), jnp.log(8000.0)
    check_grads(jax.jit(logs), at, order=1, modes=("rev",), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["logistic", "roofline"])
def test_gradients_are_finite_on_the_boundaries(kind):
    """One sequence, none at all, one token of context, more than the memory holds."""
    power, kv = engines()[kind].power, engines()[kind].kv
    batch, context = (x.ravel() for x in np.meshgrid([0.0, 1.0, 1e6], [1.0, 1e6]))
    assert np.all(np.isfinite(jax.vmap(gpu_w, (None, 0, 0))(power, batch, context)))
    slopes = jax.vmap(jax.grad(gpu_w, argnums=(0, 1, 2)), (None, 0, 0))(power, batch, context)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slopes))
    empty, unlimited = replace(kv, n_blocks=jnp.zeros(())), replace(kv, slot_tokens=jnp.asarray(jnp.inf))
    for capacity, whole in itertools.product((kv, empty, unlimited), (True, False)):
        assert jnp.isfinite(jax.grad(partial(max_sequences, whole=whole), argnums=1)(capacity, 1e9))


def test_a_batch_of_engines_equals_a_loop_over_them():
    fleet = [jax.tree.map(lambda x, f=f: x * f, engines()["roofline"]) for f in (1.0, 1.1, 0.7)]
    windows = jnp.array([1000.0, 4096.0, 30_000.0])
    batched = jax.jit(jax.vmap(instance_metrics))(stack(fleet), windows)
    one = jax.jit(instance_metrics)
    looped = [one(engine, window) for engine, window in zip(fleet, windows, strict=True)]
    np.testing.assert_allclose(batched, np.stack(looped), rtol=1e-13)


REFUSED = [
    (make_gpu, EIGHT_B200, dict(memory_bytes=0), dict(tdp_w=-700), dict(usd_per_h=-1), dict(nccl_bytes=-1)),
    (make_gpu, EIGHT_B200, dict(peak_flop_per_s=float("nan")), dict(bandwidth_bytes_per_s=float("inf"))),
    (make_gpu, EIGHT_B200, dict(peak_flop8_per_s=0), dict(idle_w=-1), dict(idle_w=1001.0)),
    (make_llm, DENSE_8B, dict(bytes_per_weight=-2), dict(n_layers=float("nan")), dict(n_kv_heads=0)),
    (make_llm, DENSE_8B, dict(n_dense_params=-1), dict(n_expert_params=9e9), dict(expert_share=0.1)),
    (make_llm, SPARSE, dict(expert_share=1.0), dict(expert_share=0), dict(n_expert_params=0), dict(windowed_frac=1.5)),
    (make_llm, SPARSE, dict(eight_bit_frac=1.5), dict(window_tokens=float("inf")), dict(attention_flop_per_token2=-1)),
    (
        make_decode_step,
        dict(base_s=4e-3, per_token_s=3e-8),
        *(dict(base_s=0), dict(base_s=float("inf")), dict(per_token_s=-1e-8), dict(per_seq_s=-1e-4)),
        *(dict(expert_share=1.0), dict(expert_s=float("nan")), dict(window_tokens=float("inf"))),
    ),
    (make_kv_capacity, dict(n_blocks=65_536), dict(n_blocks=-1), dict(slot_tokens=0), dict(n_blocks=float("nan"))),
    (make_kv_capacity, dict(n_blocks=65_536), dict(fixed_tokens=-1), dict(max_num_seqs=0.5)),
    (
        make_prefill,
        CHUNKS,
        *(dict(chunk_tokens=0), dict(chunk_tokens=0.5), dict(chunk_tokens=float("inf")), dict(per_token_s=-1e-5)),
        *(dict(per_token2_s=-1e-9), dict(budget_tokens=0), dict(gpu_w=float("nan")), dict(calibration_tokens=0)),
        dict(first_token_s=-1e-3),
    ),
    (make_compressor, {}, dict(success_frac=1.1), dict(success_frac=-0.1), dict(s_per_token=-1), dict(j_per_token=-1)),
    (make_compressor, {}, dict(success_frac=float("nan")), dict(s_per_token=float("inf"))),
    (make_site, {}, dict(pue=0.9), dict(host_w_per_gpu=-1), dict(usd_per_kwh=float("nan")), dict(kg_co2_per_kwh=-1)),
    (
        make_logistic_power,
        dict(idle_w=300, nominal_w=600, log2_half_batch=4.2),
        *(dict(idle_w=-1), dict(idle_w=600), dict(nominal_w=float("inf")), dict(steepness=0)),
        dict(log2_half_batch=float("nan")),
    ),
    (
        make_engine,
        dict(decode=None, kv=None, power=None, prefill=None, gpus_per_instance=8, usd_per_gpu_h=4),
        *(dict(idle_w=-1), dict(gpus_per_instance=0.5), dict(usd_per_gpu_h=-4), dict(idle_w=float("inf"))),
    ),
]


def test_impossible_records_are_refused_by_name_and_value():
    accepted = []
    for make, good, *bads in REFUSED:
        make(**good)
        for ((name, value),) in (bad.items() for bad in bads):
            try:
                make(**{**good, name: value})
            except ValueError as refusal:
                assert name in str(refusal)
                assert str(value) in str(refusal) or str(float(value)) in str(refusal)
            else:
                accepted.append((make.__name__, name, value))
    assert not accepted
    with pytest.raises(ValueError, match="parameters"):
        make_llm(**{**DENSE_8B, "n_dense_params": 0})
