"""Attention, latent attention, recurrent layers: times rise with every size, gradients are finite, tables are met."""

import json
from functools import cache
from importlib.resources import files

import jax
import numpy as np
import pytest

from fleetopt_jax.catalog.gpus import GPUS, gpu_entry
from fleetopt_jax.laws.operators.attention import (
    causal_pairs,
    decode_attention_s,
    make_decode_attention_law,
    make_prefill_attention_law,
    prefill_attention_s,
    timed_decode_attention_s,
)
from fleetopt_jax.laws.operators.latent_attention import (
    latent_decode_s,
    latent_prefill_s,
    latent_weights,
    make_latent_attention_law,
    make_latent_shape,
)
from fleetopt_jax.laws.operators.recurrent import (
    delta_net_shape,
    make_recurrent_decode_law,
    make_recurrent_prefill_law,
    mamba_shape,
    recurrent_decode_s,
    recurrent_prefill_s,
    state_bytes,
    timed_recurrent_decode_s,
)

H200 = gpu_entry("h200").gpu
# Microseconds of one call, timed by ai-dynamo/aiconfigurator (095f58a, Apache-2.0), vLLM 0.24 (A100: 0.14), 16 bits:
# prefill of 8,192 tokens and decode of 64 sequences of 8,192 tokens, 8 query heads and 1 key-value head of 128;
# DeepSeek-V3's block of 16 heads, prefill of 4,096 tokens, decode of 64 sequences of 4,096; a gated delta net of 8 key
# and 16 value heads, prefill of 8,192 tokens, decode of 64 sequences.
TIMED_US = {
    "a100": (906.5, 185.6),
    "h100": (221.4, 101.4, 748.5, 224.3, 468.8, 53.2),
    "h200": (228.9, 77.0, 723.4, 185.1, 477.0, 41.9),
    "b200": (176.0, 49.7, 279.2, 117.5, 380.7, 26.1),
    "b300": (140.2, 48.5, 430.0, 171.6, 372.6, 24.8),
    "gb200": (176.9, 48.5, 438.5, 176.6, 356.6, 25.4),
    "gb300": (133.5, 49.6, 420.4, 174.3, 364.8, 24.8),
    "l40s": (745.0, 376.3, 1890.5, 653.7, 991.8, 36.4),
    "rtx-pro-6000": (559.4, 193.9, 1398.6, 384.2, 508.8, 26.1),
}
TIMED_ERROR = 0.25  # of one point: the 90th percentile of most tables


@cache
def documents(operator: str) -> dict:
    return json.loads(files("fleetopt_jax.catalog").joinpath("data", "operators", f"{operator}.json").read_text())


def coefficients(operator: str, gpu: str, variant: str) -> dict:
    return documents(operator)["gpus"][gpu][variant]["coefficients"]


def prefill(gpu="h200", variant="bf16"):
    return make_prefill_attention_law(**coefficients("prefill_attention", gpu, variant))


def decode(gpu="h200", variant="bf16"):
    return make_decode_attention_law(**coefficients("decode_attention", gpu, variant))


def latent(phase, gpu="h200", types="bf16_bf16"):
    return make_latent_attention_law(**coefficients("latent_attention", gpu, f"{phase}_{types}"))


def recurrent(phase, gpu="h200"):
    make = {"prefill": make_recurrent_prefill_law, "decode": make_recurrent_decode_law}[phase]
    return make(**coefficients("recurrent", gpu, phase))


def deepseek(heads=16.0):
    return make_latent_shape(heads=heads, hidden=7168, query_rank=1536)


DELTA_NET = delta_net_shape(key_heads=8, value_heads=16)


def of_chunk(tokens, past, heads, kv_heads, head_dim):
    return prefill_attention_s(prefill(), H200, tokens, causal_pairs(tokens, past), heads, kv_heads, head_dim)


def of_batch(sequences, mean_tokens, heads, kv_heads, head_dim):
    return decode_attention_s(decode(), H200, sequences, sequences * mean_tokens, heads, kv_heads, head_dim)


def of_latent_chunk(tokens, past, heads):
    shape = deepseek()
    shape = type(shape)(**{**vars(shape), "heads": heads})
    return latent_prefill_s(latent("prefill"), H200, shape, tokens, causal_pairs(tokens, past), past)


def of_latent_batch(sequences, mean_tokens, heads):
    shape = deepseek()
    shape = type(shape)(**{**vars(shape), "heads": heads})
    return latent_decode_s(latent("decode"), H200, shape, sequences, sequences * mean_tokens)


def of_states(sequences, mean_tokens):
    return recurrent_prefill_s(recurrent("prefill", "l40s"), H200, DELTA_NET, sequences * mean_tokens, sequences)


def of_decoded_states(sequences):
    return recurrent_decode_s(recurrent("decode"), H200, DELTA_NET, sequences)


# Sizes each from its least to its most, on a logarithmic scale.
RISING = {
    "prefill": (of_chunk, ((1, 65536), (1, 131072), (1, 128), (1, 64), (32, 512))),
    "decode": (of_batch, ((1, 2048), (1, 131072), (1, 128), (1, 64), (32, 512))),
    "latent prefill": (of_latent_chunk, ((1, 65536), (1, 131072), (1, 128))),
    "latent decode": (of_latent_batch, ((1, 2048), (1, 131072), (1, 128))),
    "recurrent prefill": (of_states, ((1, 256), (1, 32768))),
    "recurrent decode": (of_decoded_states, ((1, 4096),)),
}


@pytest.mark.parametrize("name", RISING)
def test_times_rise_with_every_size_and_slopes_are_those_of_differences(name):
    law, sizes = RISING[name]
    u = np.random.default_rng(0).random((len(sizes), 2000))
    points = np.stack([least * (most / least) ** of for (least, most), of in zip(sizes, u)])
    step = 1e-5
    both = jax.jit(jax.vmap(jax.value_and_grad(law, argnums=tuple(range(len(sizes))))))
    seconds, slopes = both(*np.concatenate([points, points * (1 - step), points * (1 + step)], axis=1))
    slopes = np.stack(slopes)
    assert np.all(np.isfinite(slopes)) and np.all(slopes >= 0)
    here, less, more = np.split(np.asarray(seconds), 3)
    told = 2 * step * np.sum(slopes[:, :2000] * points, axis=0)
    smooth = np.abs(more - less - told) < 1e-6 * told + 1e-13 * here
    assert np.mean(smooth) > 0.998  # where a step crosses no kink


def test_gradients_are_finite_without_any_work():
    shape = deepseek()
    laws = [
        lambda m, a: prefill_attention_s(prefill(), H200, m, a, 8.0, 1.0, 128.0),
        lambda n, c: timed_decode_attention_s(decode(), H200, n, c, 8.0, 1.0, 128.0),
        lambda m, a: latent_prefill_s(latent("prefill"), H200, shape, m, a),
        lambda n, c: latent_decode_s(latent("decode"), H200, shape, n, c),
        lambda m, n: recurrent_prefill_s(recurrent("prefill"), H200, DELTA_NET, m, n),
        lambda n, _: timed_recurrent_decode_s(recurrent("decode"), H200, DELTA_NET, n),
        lambda m, w: causal_pairs(m, 0.0, w),
    ]
    at_zero = jax.jit(lambda m, a: [jax.value_and_grad(law, argnums=(0, 1))(m, a) for law in laws])
    for value, slopes in at_zero(0.0, 0.0):
        assert np.isfinite(value) and np.all(np.isfinite(slopes)) and value >= 0


def test_large_sizes_take_their_bytes_and_flops():
    law, n, tokens = decode(), 256.0, 256 * 131072.0
    kv_s = 2 * 2 * 128 * 8 * tokens / H200.bandwidth_bytes_per_s
    assert decode_attention_s(law, H200, n, tokens, 64.0, 8.0, 128.0) == pytest.approx(law.byte_excess * kv_s, rel=0.02)
    long = prefill()
    flop_s = 4 * 64 * 128 * causal_pairs(1e6) / H200.peak_flop_per_s
    seconds = prefill_attention_s(long, H200, 1e6, causal_pairs(1e6), 64.0, 8.0, 128.0)
    assert seconds == pytest.approx(long.flop_excess * flop_s, rel=0.02)
    assert 1.0 <= law.byte_excess < 1.3 and 1.0 < long.flop_excess < 2.0  # shares of the peaks that can be


def test_decode_is_affine_in_context():
    context = np.linspace(1e5, 1e7, 50)
    seconds = decode_attention_s(decode(), H200, 64.0, context, 8.0, 1.0, 128.0)
    assert np.max(np.abs(np.diff(seconds, 2))) < 1e-3 * np.min(np.diff(seconds))


def test_in_the_loop_only_what_fits_the_cache_is_faster():
    law = decode("l40s")
    few, many = (share * law.cached_bytes / (2 * 2 * 8 * 128) for share in (0.25, 4.0))
    cold, warm = (
        [f(law, gpu_entry("l40s").gpu, 64.0, tokens, 32.0, 8.0, 128.0) for tokens in (few, many)]
        for f in (decode_attention_s, timed_decode_attention_s)
    )
    assert cold[0] > 1.5 * warm[0] and cold[1] == pytest.approx(warm[1], rel=0.01)


def test_pairs_of_chunks_add_up_to_those_of_the_prompt():
    tokens, cut, window = 5000.0, 1777.0, 1024.0
    for limit in (np.inf, window):
        whole = causal_pairs(tokens, 0.0, limit)
        assert causal_pairs(cut, 0.0, limit) + causal_pairs(tokens - cut, cut, limit) == pytest.approx(whole)
    assert causal_pairs(tokens, 0.0, window) == sum(min(i, window) for i in range(1, 5001))


def test_latent_weights_are_deepseeks():
    assert latent_weights(deepseek(128.0)) == 7168 * 2112 + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168


def test_states_are_nemotrons():
    shape = mamba_shape(heads=128, head_dim=64, state_dim=128, groups=8)
    assert shape.conv_channels == 128 * 64 + 2 * 8 * 128 and state_bytes(shape) == 4 * 128 * 64 * 128


@pytest.mark.parametrize("gpu", [gpu for gpu in TIMED_US if gpu in GPUS])
def test_laws_meet_what_was_timed(gpu):
    sheet = gpu_entry(gpu).gpu
    told = [
        prefill_attention_s(prefill(gpu), sheet, 8192.0, causal_pairs(8192.0), 8.0, 1.0, 128.0),
        timed_decode_attention_s(decode(gpu), sheet, 64.0, 64 * 8192.0, 8.0, 1.0, 128.0),
        latent_prefill_s(latent("prefill", gpu), sheet, deepseek(), 4096.0, causal_pairs(4096.0)),
        latent_decode_s(latent("decode", gpu), sheet, deepseek(), 64.0, 64 * 4096.0),
        recurrent_prefill_s(recurrent("prefill", gpu), sheet, DELTA_NET, 8192.0),
        timed_recurrent_decode_s(recurrent("decode", gpu), sheet, DELTA_NET, 64.0),
    ]
    for seconds, timed_us in zip(told, TIMED_US[gpu]):
        assert 1e6 * seconds == pytest.approx(timed_us, rel=TIMED_ERROR)


def test_every_committed_law_loads():
    makers = {
        "prefill_attention": lambda _: make_prefill_attention_law,
        "decode_attention": lambda _: make_decode_attention_law,
        "latent_attention": lambda _: make_latent_attention_law,
        "recurrent": lambda phase: make_recurrent_prefill_law if phase == "prefill" else make_recurrent_decode_law,
    }
    for operator, maker in makers.items():
        found = documents(operator)["gpus"]
        assert set(found) == set(TIMED_US)
        for variants in found.values():
            for variant, entry in variants.items():
                maker(variant)(**entry["coefficients"])
                assert entry["rows"] == 0 or 0 < entry["median_error"] < entry["p90_error"] < 1


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("launch_s", -1.0, "launch_s"), ("sharpness", 0.5, "sharpness"), ("byte_excess", 0.0, ">")],
)
def test_impossible_coefficients_are_refused(name, value, why):
    with pytest.raises(ValueError, match=why):
        make_decode_attention_law(**{**coefficients("decode_attention", "h200", "bf16"), name: value})
    with pytest.raises(ValueError, match="need launch_s"):
        make_decode_attention_law(launch_s=1e-5)
