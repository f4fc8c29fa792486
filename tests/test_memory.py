"""KV tokens against lines that vLLM logged, and what a board's memory is shared into."""

from dataclasses import replace

import numpy as np
import pytest

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.catalog.engines import build, engine_entry, engine_points, prompt_of_mix, workspace_of
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.llms import LLMS, LlmEntry, llm_entry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.catalog.steps import Parallelism
from fleetopt_jax.cli import table
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.units import GIB
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS, CONTEXT_BYTES, MEMORY_UTILIZATION, workspace_bytes


def entry(title: str, shape: tuple[int, ...], dense: int, experts: tuple[int, int, int] = (0, 0, 0), **how) -> LlmEntry:
    """shape: layers, hidden, heads, KV heads, head_dim, vocabulary; attention and output layer follow."""
    layers, hidden, q_heads, kv_heads, head_dim, vocabulary = shape
    attention = layers * hidden * head_dim * 2 * (q_heads + kv_heads)
    architecture = Architecture(
        **dict(zip(("layers", "hidden", "q_heads", "kv_heads", "head_dim"), shape)),
        attention_params=attention,
        dense_params=dense,
        lm_head_params=vocabulary * hidden,
        **dict(zip(("expert_params", "experts_per_token", "n_experts"), experts)),
        **how,
    )
    return LlmEntry(title, architecture, "its config.json")


QWEN_14B = entry(
    "qwen2.5-14b", (48, 5120, 40, 8, 128, 152_064), 48 * 3 * 5120 * 13_824, embedding_params=152_064 * 5120
)
QWEN_1B = entry("qwen2.5-1.5b", (28, 1536, 12, 2, 128, 151_936), 28 * 3 * 1536 * 8960)  # tied embeddings
MINIMAX = entry(
    "minimax-m2.7",
    (62, 3072, 48, 8, 128, 200_064),
    62 * 3072 * 256,
    (62 * 256 * 3 * 3072 * 1536, 8, 256),
    embedding_params=200_064 * 3072,
    native_precision="fp8",
)
LOGGED = (  # spec, what vLLM logged, where it is to be read
    (EngineSpec("h100", QWEN_14B, 1), 226_240, "vLLM 0.21, blis-evaluator benchmark notes"),
    (EngineSpec("h100", "qwen3-8b", 1), 389_888, "vLLM 0.19.1"),
    (EngineSpec("h100", "llama-3.1-8b", 1), 439_984, "vLLM 0.30"),
    (
        EngineSpec("h200", "deepseek-v3", 8),
        635_648,
        "vLLM 0.11.2, ashishkamra/vllm-memory-estimator (DeepSeek-R1-0528)",
    ),
    (EngineSpec("h200", "llama-3.3-70b", 4, "fp8"), 1_391_552, "vLLM 0.11.2, ashishkamra/vllm-memory-estimator"),
    (EngineSpec("a100", "gpt-oss-20b", 1, memory_utilization=0.65), 36.56 * GIB / 24_576, "vLLM 0.19, myoceane.fr"),
    (EngineSpec("h100", "llama-3.1-70b", 1, "fp8", memory_utilization=0.98), 22_096, "vllm-project/vllm#12569"),
    (EngineSpec("l40s", QWEN_1B, 1), 1_251_440, "vLLM 0.11.2, at a share of 0.85 or 0.90 (not said)"),
    (EngineSpec("h100", MINIMAX, 4), 244_576, "vLLM 0.22"),
    (EngineSpec("b200", "llama-3.1-70b", 8), 3.6e6, "vLLM on 8 B200: 3.53 to 3.68 million"),
)


@pytest.mark.parametrize(("spec", "tokens", "source"), LOGGED, ids=lambda each: getattr(each, "llm_name", ""))
def test_kv_tokens_are_within_five_percent_of_what_was_logged(spec, tokens, source):
    assert float(build(spec).kv.n_blocks) * BLOCK_TOKENS == pytest.approx(tokens, rel=0.05), source


def test_the_workspace_is_that_of_one_step():
    rng = np.random.default_rng(0)
    sizes = dict(hidden=rng.uniform(1e3, 2e4, 2000), mlp_width=rng.uniform(1e3, 5e4, 2000))
    sizes |= dict(experts_per_token=rng.integers(0, 9, 2000), expert_width=rng.uniform(500, 3000, 2000))
    one, half, two = (workspace_bytes(**sizes, tp=1, batched_tokens=n) for n in (8192, 4096, 16_384))
    np.testing.assert_allclose(one - CONTEXT_BYTES, 2 * (half - CONTEXT_BYTES))  # in proportion to its tokens
    np.testing.assert_allclose(two - CONTEXT_BYTES, 2 * (one - CONTEXT_BYTES))
    split = workspace_bytes(**sizes, tp=8, batched_tokens=8192)
    whole = workspace_bytes(**sizes | {"mlp_width": 0.0, "expert_width": 0.0}, tp=1, batched_tokens=8192)
    assert np.all((whole < split) & (split < one))  # hidden states are on every GPU whole
    of_8b = workspace_of(llm_entry("llama-3.1-8b").architecture, GPUS["h100"], Parallelism(1))
    by_hand = CONTEXT_BYTES + 8192 * (4 * 4096 + 6 * 14_336)
    assert of_8b == pytest.approx(by_hand, rel=1e-3)  # the width its parameters come to: norms count too


def test_memory_is_shared_as_the_utilization_says():
    spec = EngineSpec("h100", "llama-3.1-8b", 1)
    shares = np.linspace(0.3, 1.0, 8)
    tokens = [float(build(replace(spec, memory_utilization=float(x))).kv.n_blocks) * BLOCK_TOKENS for x in shares]
    a_token = float(LLMS["llama-3.1-8b"].architecture.layers) * 2 * 8 * 128 * 2
    np.testing.assert_allclose(
        np.diff(tokens), np.diff(shares) * GPUS["h100"].memory_bytes / a_token, atol=BLOCK_TOKENS
    )
    assert MEMORY_UTILIZATION == spec.memory_utilization == table.MEMORY_UTILIZATION
    with pytest.raises(BadField, match=r"does not fit: needs .* has 15.8 GiB \(20% of the memory\)"):
        build(replace(spec, memory_utilization=0.2))


def test_what_the_paper_counts_stays_as_its_names_say():
    """Its roofline takes 80 GiB of an H100, 180 of a B200."""
    for gpu, gib in (("h100", 80), ("b200", 180)):
        kv = build(EngineSpec(gpu, "llama-3.1-8b", 1, source="projected")).kv
        weights = 2 * (1_342_177_280 + 5_637_144_576 + 2 * 525_336_576)
        assert float(kv.n_blocks) == (0.9 * gib * GIB - weights) // (16 * 131_072)


# --- an engine with the prefill of others -----------------------------------------------------------------------------


def test_a_step_holds_the_attention_of_long_prompts():
    """n mix prompt tokens a step, in prompts of p tokens: tau1 + tau2 p each."""
    found = engine_entry(EngineSpec("h100", "qwen3-14b", 1))
    prefill = found.engine.prefill
    mean, mix = 32_050.0, 320.0
    assert prompt_of_mix(mean, mix) == pytest.approx(32_000)  # 32,000 in, 100 out
    (long,) = engine_points(found, [8.0], mean, mix)
    (short,) = engine_points(found, [8.0], mean, mix, prompt_tokens=0.0)
    attention_s = 8 * mix * 32_000 * float(prefill.per_token2_s)
    assert long.step_s - short.step_s == pytest.approx(attention_s) and attention_s > 0.2 * short.step_s
    assert long.prefill_frac == pytest.approx(1 - long.decode_step_s / long.step_s)
    # Watts are those of the time it decodes and of the time it prefills.
    (alone,) = engine_points(found, [8.0], mean)
    ends = sorted((alone.power_w_per_gpu, float(prefill.gpu_w)))
    assert ends[0] <= long.power_w_per_gpu <= ends[1]
    assert long.power_w_per_gpu == pytest.approx(float(prefill.gpu_w), rel=0.1)  # nearly all of its time


def test_tensor_parallelism_divides_the_heads():
    allowed = {tp for tp in range(1, 65) if 40 % tp == 0}
    for tp in range(1, 65):
        spec = EngineSpec("b200", "qwen3-14b", tp)
        if tp in allowed:
            assert float(build(spec).gpus_per_instance) == tp
        else:
            with pytest.raises(BadField, match=r"need one of 1, 2, 4, 5, 8, 10, 20, 40$"):
                build(spec)
