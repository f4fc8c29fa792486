"""Public configurations: what a `config.json` says of parameters, KV cache and weights, in files of our own making.

Dimensions, parameters and sizes of checkpoints are those of the model cards and repositories on Hugging Face.
"""

import dataclasses
import json
from typing import NamedTuple

import pytest
from hf_configs import CONFIGS, DEEPSEEK_V3, LLAMA_8B, OTHER_TOTALS, config, gpt_oss, qwen3_moe

from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.hf_config import HfModel, parse_config
from fleetopt_jax.catalog.hf_quantization import MAX_FREE
from fleetopt_jax.catalog.llms import KV_BYTES, LLMS, STATE_BYTES, checkpoint_size_bytes, llm_entry, names_of
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import GIB

LLAMA_70B, LLAMA_405B = CONFIGS["llama-3.3-70b"], CONFIGS["llama-3.1-405b"]
GB, B = 1e9, 1e9


def weights(bits: int, kind: str = "float", **more) -> dict:
    return {"weights": {"num_bits": bits, "type": kind, **more}, "targets": ["Linear"]}


def groups(group: dict, **more) -> dict:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}


def dynamic(group: dict) -> dict:
    """With activations as narrow as the weights."""
    return group | {"input_activations": {"num_bits": group["weights"]["num_bits"], "type": group["weights"]["type"]}}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "modules_to_not_convert": None}
BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
FBGEMM = {
    "quant_method": "fbgemm_fp8",
    "modules_to_not_convert": [
        *(f"model.layers.{i}.mlp.{name}_proj" for i in (0, 125) for name in ("down", "gate", "up")),
        *(f"model.layers.{i}.self_attn.{name}_proj" for i in range(126) for name in "qkvo"),
    ],
}
NVFP4 = {
    "quant_algo": "NVFP4",
    "kv_cache_quant_algo": "FP8",
    "group_size": 16,
    "exclude_modules": [
        "lm_head",
        "model.embed_tokens",
        "model.layers.61*",
        *(f"model.layers.{i}.self_attn*" for i in range(61)),
    ],
}
SCOUT = groups(
    dynamic(weights(8, strategy="channel")),
    ignore=[
        "vision_model.model.layers.0.self_attn.q_proj",
        *(f"language_model.model.layers.{i}.self_attn.{name}_proj" for i in range(48) for name in "qkvo"),
        *(f"language_model.model.layers.{i}.feed_forward.router" for i in range(48)),
        "language_model.lm_head",
    ],
)
KIMI = DEEPSEEK_V3 | dict(
    model_type="kimi_k2", num_attention_heads=64, n_routed_experts=384, first_k_dense_replace=1, vocab_size=163_840,
)  # fmt: skip
KIMI_INT4 = groups(
    weights(4, "int", group_size=32, strategy="group", symmetric=True),
    ignore=["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
)
QWEN3_NEXT = config(
    "Qwen3NextForCausalLM", 48, 2048, 16, 2, 5120, 151_936, head_dim=256, num_experts=512, num_experts_per_tok=10,
    moe_intermediate_size=512, shared_expert_intermediate_size=512, full_attention_interval=4, decoder_sparse_step=1,
    linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32,
    linear_value_head_dim=128, mamba_ssm_dtype="float32",
)  # fmt: skip
NEMOTRON = config(
    "NemotronHForCausalLM", 88, 4096, 32, 2, 2688, 131_072, head_dim=128, mlp_hidden_act="relu2",
    hybrid_override_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*E" + 4 * "MEMEMEMEM*E" + "MEMEMEM*EMEMEMEME",
    n_routed_experts=512, num_experts_per_tok=22, moe_intermediate_size=2688, moe_latent_size=1024, n_shared_experts=1,
    moe_shared_expert_intermediate_size=5376, mamba_num_heads=128, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
    conv_kernel=4, expand=2, time_step_limit=[0.0, float("inf")],
)  # fmt: skip
JAMBA = config(
    "JambaForCausalLM", 32, 4096, 32, 8, 14_336, 65_536, num_experts=16, num_experts_per_tok=2, attn_layer_period=8,
    attn_layer_offset=4, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2,
    mamba_dt_rank=256,
)  # fmt: skip
GEMMA_4 = {
    "model_type": "gemma4",
    "vision_config": {"hidden_size": 1152},
    "text_config": config(
        "", 30, 2816, 16, 8, 2112, 262_144, model_type="gemma4_text", head_dim=256, global_head_dim=512,
        num_global_key_value_heads=2, attention_k_eq_v=True, enable_moe_block=True, num_experts=128, top_k_experts=8,
        moe_intermediate_size=704, hidden_activation="gelu_pytorch_tanh", sliding_window=1024, num_kv_shared_layers=0,
        hidden_size_per_layer_input=0, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 5,
    ) | {"architectures": None},
}  # fmt: skip
DRAFT = {"num_nextn_predict_layers": 1}
DSA = dict(index_n_heads=64, index_head_dim=128, index_topk=2048, model_type="deepseek_v32")
OLMO_3 = config(
    "Olmo3ForCausalLM", 64, 5120, 40, 8, 27_648, 100_278, sliding_window=4096,
    layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 16,
)  # fmt: skip
LIGHTNING = config(
    "MiniMaxText01ForCausalLM", 80, 6144, 64, 8, 9216, 200_064, head_dim=128, num_local_experts=32,
    num_experts_per_tok=2, attn_type_list=([0] * 7 + [1]) * 10,
)  # fmt: skip


class Public(NamedTuple):
    """A published configuration: parameters, active ones, KV bytes of a token (16 bits), size of the checkpoint."""

    document: dict
    params: float
    kv_bytes: int
    active: float | None = None
    size: float | None = None  # [B]
    within: float = 5e-3  # of the parameters
    engine: bool = True  # whether one can be built of it


def moe(name, layers, hidden, heads, kv, width, vocabulary, n, k, expert, **more):
    routed = dict(n_routed_experts=n, num_experts_per_tok=k, moe_intermediate_size=expert)
    return config(name, layers, hidden, heads, kv, width, vocabulary, **routed, **more)


GLM = dict(head_dim=128, n_shared_experts=1)
PUBLIC = {
    **{name: Public(OTHER_TOTALS[name][0], OTHER_TOTALS[name][1], kv) for name, kv in (
        ("mixtral-8x7b", 131_072), ("mistral-7b", 131_072), ("phi-4", 204_800), ("qwen2.5-72b", 327_680),
        ("qwen1.5-moe-a2.7b", 196_608), ("deepseek-v2-lite", 31_104), ("gemma-2-9b", 344_064), ("gemma-3-27b", 507_904),
        ("gemma-3-4b", 139_264), ("glm-4-32b", 62_464), ("llama-4-maverick", 196_608),
    )},
    "llama-2-7b": Public(config("LlamaForCausalLM", 32, 4096, 32, 32, 11_008, 32_000), 6.738 * B, 524_288),
    "llama-3-8b": Public(LLAMA_8B, 8.030 * B, 131_072, size=16.06 * GB),
    "codellama-34b": Public(config("LlamaForCausalLM", 48, 8192, 64, 8, 22_016, 32_000), 33.74 * B, 196_608),
    "yi-34b": Public(config("LlamaForCausalLM", 60, 7168, 56, 8, 20_480, 64_000), 34.39 * B, 245_760),
    "falcon3-10b": Public(
        config("LlamaForCausalLM", 40, 3072, 12, 4, 23_040, 131_072, head_dim=256), 10.31 * B, 163_840),
    "qwen2.5-1.5b": Public(
        config("Qwen2ForCausalLM", 28, 1536, 12, 2, 8960, 151_936, tie_word_embeddings=True), 1.544 * B, 28_672),
    "qwen2.5-14b": Public(
        config("Qwen2ForCausalLM", 48, 5120, 40, 8, 13_824, 152_064, sliding_window=131_072), 14.77 * B, 196_608),
    "qwen2.5-vl-72b": Public(
        config("Qwen2_5_VLForConditionalGeneration", 80, 8192, 64, 8, 29_568, 152_064, vision_config={"depth": 32},
               sliding_window=32_768, max_window_layers=80, use_sliding_window=False), 72.70 * B, 327_680),
    "qwen3-vl-235b": Public(
        {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "vision_config": {"depth": 27},
         "text_config": qwen3_moe(94, 4096, 64, 4, 1536, 128) | {"model_type": "qwen3_vl_moe_text"}},
        235.1 * B, 192_512, active=22 * B),
    "mistral-large": Public(
        config("MistralForCausalLM", 88, 12_288, 96, 8, 28_672, 32_768, head_dim=128), 122.6 * B, 360_448),
    "mistral-small-3.2": Public(
        {"architectures": ["Mistral3ForConditionalGeneration"], "vision_config": {"hidden_size": 1024},
         "text_config": config("", 40, 5120, 32, 8, 32_768, 131_072, head_dim=128, model_type="mistral")
         | {"architectures": None}}, 23.57 * B, 163_840),
    "command-r-plus": Public(
        config("CohereForCausalLM", 64, 12_288, 96, 8, 33_792, 256_000, model_type="cohere"), 103.8 * B, 262_144),
    "granite-3.3-8b": Public(
        config("GraniteForCausalLM", 40, 4096, 32, 8, 12_800, 49_159, tie_word_embeddings=True), 8.17 * B, 163_840),
    "olmo-3-32b": Public(OLMO_3, 32.23 * B, 262_144),
    "exaone-4-32b": Public(
        config("Exaone4ForCausalLM", 64, 5120, 40, 8, 27_392, 102_400, head_dim=128, sliding_window=4096,
               sliding_window_pattern="LLLG"), 32.0 * B, 262_144),
    "seed-oss-36b": Public(
        config("SeedOssForCausalLM", 64, 5120, 80, 8, 27_648, 155_136, head_dim=128), 36.15 * B, 262_144),
    "mimo-7b": Public(
        config("MiMoForCausalLM", 36, 4096, 32, 8, 11_008, 151_680, head_dim=128, sliding_window=32_768,
               num_nextn_predict_layers=1), 7.62 * B, 147_456),
    "phi-3-mini": Public(
        config("Phi3ForCausalLM", 32, 3072, 32, 32, 8192, 32_064, sliding_window=2047), 3.82 * B, 393_216),
    "phi-2": Public(
        config("PhiForCausalLM", 32, 2560, 32, 32, 10_240, 51_200, hidden_act="gelu_new", model_type="phi"),
        2.78 * B, 327_680),
    "starcoder2-3b": Public(
        config("Starcoder2ForCausalLM", 30, 3072, 24, 2, 12_288, 49_152, hidden_act="gelu_pytorch_tanh",
               sliding_window=4096), 3.03 * B, 30_720),
    "starcoder": Public(
        {"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "n_layer": 40, "n_embd": 6144,
         "n_head": 48, "n_inner": 24_576, "n_positions": 8192, "vocab_size": 49_152, "multi_query": True,
         "activation_function": "gelu_pytorch_tanh"}, 15.52 * B, 20_480),
    "nemotron-4-15b": Public(
        config("NemotronForCausalLM", 32, 6144, 48, 8, 24_576, 256_000, hidden_act="relu2"), 15.6 * B, 131_072),
    "glm-4.5-air": Public(
        moe("Glm4MoeForCausalLM", 46, 4096, 96, 8, 10_944, 151_552, 128, 8, 1408, first_k_dense_replace=1,
            num_nextn_predict_layers=1, **GLM), 106.9 * B, 188_416, active=12.8 * B),
    "dots.llm1": Public(
        moe("Dots1ForCausalLM", 62, 4096, 32, 32, 10_944, 152_064, 128, 6, 1408, head_dim=128, n_shared_experts=2,
            first_k_dense_replace=1), 142.8 * B, 1_015_808),
    "hunyuan-a13b": Public(
        config("HunYuanMoEV1ForCausalLM", 32, 4096, 32, 8, 3072, 128_167, head_dim=128, num_experts=64,
               moe_topk=[8] * 32, moe_intermediate_size=[3072] * 32, num_shared_expert=[1] * 32,
               tie_word_embeddings=True), 80.4 * B, 131_072, active=13 * B),
    "ernie-4.5-300b": Public(
        config("Ernie4_5_MoeForCausalLM", 54, 8192, 64, 8, 28_672, 103_424, moe_num_experts=64, moe_k=8,
               moe_intermediate_size=3584, moe_layer_start_index=3, moe_layer_end_index=53, moe_layer_interval=1,
               moe_num_shared_experts=0), 299.5 * B, 221_184, active=47 * B),
    "minimax-m2.5": Public(
        config("MiniMaxM2ForCausalLM", 62, 3072, 48, 8, 1536, 200_064, head_dim=128, num_local_experts=256,
               num_experts_per_tok=8, shared_intermediate_size=0, num_mtp_modules=3,
               quantization_config=BLOCK_FP8 | {"modules_to_not_convert": ["gate", "lm_head"]}),
        228.7 * B, 253_952, active=10.4 * B, size=230.0 * GB),
    "deepseek-r1": Public(DEEPSEEK_V3 | DRAFT, 671.0 * B, 70_272, active=37 * B, size=688.6 * GB),
    "kimi-k2": Public(KIMI | {"quantization_config": BLOCK_FP8}, 1026 * B, 70_272, active=32 * B, size=1029 * GB),
    "kimi-k2-thinking": Public(
        {"model_type": "kimi_k25", "text_config": KIMI | {"quantization_config": KIMI_INT4}, "vision_config": {"a": 1}},
        1026 * B, 70_272, size=594 * GB),
    "glm-4.7-flash": Public(
        moe("Glm4MoeLiteForCausalLM", 47, 2048, 20, 20, 10_240, 154_880, 64, 4, 1536, n_shared_experts=1,
            first_k_dense_replace=1, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64,
            v_head_dim=256), 29.94 * B, 54_144, active=3.6 * B),
    "gpt-oss-20b": Public(gpt_oss(24, 32), 20.91 * B, 49_152, size=13.76 * GB),
    "gpt-oss-120b": Public(gpt_oss(36, 128), 116.8 * B, 73_728, size=65.25 * GB),
    "llama-3.1-405b-fp8": Public(
        LLAMA_405B | {"quantization_config": FBGEMM}, 405.9 * B, 516_096, size=454 * GIB),
    "llama-4-scout-fp8": Public(
        {"model_type": "llama4", "quantization_config": SCOUT, "text_config": OTHER_TOTALS["llama-4-maverick"][0][
            "text_config"] | {"num_local_experts": 16, "interleave_moe_layer_step": 1}},
        107.8 * B, 196_608, size=105.1 * GIB),
    "llama-3.3-70b-fp8-dynamic": Public(
        LLAMA_70B | {"quantization_config": groups(dynamic(weights(8, strategy="channel")))}, 70.55 * B, 327_680,
        size=72.68 * GB),
    "llama-3.3-70b-w8a8": Public(
        LLAMA_70B | {"quantization_config": groups(dynamic(weights(8, "int", strategy="channel")))}, 70.55 * B, 327_680,
        size=72.68 * GB),
    "qwen3-32b-awq": Public(CONFIGS["qwen3-32b"] | {"quantization_config": AWQ}, 32.76 * B, 262_144, size=19.3 * GB),
    "qwen3-32b-gptq-int8": Public(
        CONFIGS["qwen3-32b"] | {"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 128}},
        32.76 * B, 262_144),
    "deepseek-v3.1-nvfp4": Public(
        DEEPSEEK_V3 | DRAFT | {"quantization_config": NVFP4 | {"quant_method": "modelopt"}}, 671.0 * B, 70_272),
    # Read as far as their layers are described.
    "qwen3-next-80b": Public(QWEN3_NEXT, 79.7 * B, 24_576, active=3.5 * B),
    "nemotron-3-super": Public(NEMOTRON, 120.6 * B, 8192, active=12 * B, engine=False),
    "jamba-v0.1": Public(JAMBA, 51.6 * B, 16_384, active=12 * B),
    "minimax-text-01": Public(LIGHTNING, 456.1 * B, 40_960, active=45.9 * B, engine=False),
    "deepseek-v3.2": Public(DEEPSEEK_V3 | DSA, 671.9 * B, 70_272, active=37 * B, engine=False),
    "gemma-4-26b-a4b": Public(GEMMA_4, 25.2 * B, 225_280, active=3.8 * B, engine=False),
}  # fmt: skip


def read(document: dict, where: str = "config.json") -> HfModel:
    return parse_config(where, json.dumps(document).encode())


def test_public_configurations_have_their_published_figures():
    assert len(PUBLIC) >= 50
    for name, public in PUBLIC.items():
        found = read(public.document)
        a = found.architecture
        assert a.n_params == pytest.approx(public.params, rel=public.within), name
        assert KV_BYTES["bf16"] * a.kv_values_per_token == public.kv_bytes, name
        if public.active is not None:
            assert a.n_active_params == pytest.approx(public.active, rel=0.03), name
        if public.size is not None:
            assert checkpoint_size_bytes(a) + found.draft_bytes == pytest.approx(public.size, rel=1e-2), name
        assert (a.no_law == "") == public.engine, name


def parts_in(quantization: dict, document: dict = LLAMA_8B) -> dict[str, float]:
    """Of each part's weights, the share that is quantized."""
    return dict(read(document | {"quantization_config": quantization}).quantized)


def test_every_way_to_say_what_stays_in_16_bits_means_the_same():
    """Names, prefixes, parts of names, wildcards and regular expressions; under any of the keys."""
    each = range(32)
    ways = [
        {"quant_method": "fp8", "modules_to_not_convert": ["self_attn", "lm_head"]},
        {"quant_method": "fp8", "ignore": [f"model.layers.{i}.self_attn.{x}_proj" for x in "qkvo" for i in each]},
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.*.self_attn*"]},
        {"quant_algo": "NVFP4", "exclude_modules": [f"model.layers.{i}.self_attn*" for i in range(32)]},
        groups(weights(8), ignore=["lm_head", "re:.*self_attn.*"]),
        groups(weights(4, "int", group_size=128), ignore=["re:.*lm_head", "re:model\\.layers\\.\\d+\\.self_attn\\..*"]),
        groups(weights(8) | {"targets": ["re:.*mlp\\.(gate|up|down)_proj$"]}, ignore=[]),
        groups(weights(8), ignore=["lm_head", *(f"language_model.model.layers.{i}.self_attn.qkv_proj" for i in each),
                                   *(f"model.language_model.layers.{i}.self_attn.o_proj" for i in range(32))]),
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*self_attn.*": {}}},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            f"model.layers.{i}.mlp.{x}_proj": {"quant_algo": "NVFP4", "group_size": 16}
            for i in range(32) for x in ("gate", "up", "down")}},
    ]  # fmt: skip
    for way in ways:
        assert parts_in(way) == {"attention": 0, "dense": 1, "lm_head": 0}, way
    first = {"quant_method": "fp8", "modules_to_not_convert": ["layers.1"]}  # and not the eleventh
    assert parts_in(first) == {"attention": pytest.approx(31 / 32), "dense": pytest.approx(31 / 32), "lm_head": 0}
    assert parts_in(groups(weights(8), ignore=[]))["lm_head"] == 1  # a Linear as any other, unless it is ignored
    experts = {"quant_method": "fp8", "modules_to_not_convert": ["mlp.gate", "block_sparse_moe.experts"]}
    assert parts_in(experts, CONFIGS["qwen3-30b-a3b"]) == {"attention": 1, "dense": 0, "expert": 0, "lm_head": 0}


def test_bytes_are_those_of_the_format():
    def bits(quantization: dict) -> float:
        found = read(LLAMA_8B | {"quantization_config": quantization}).architecture
        assert found.held is not None
        return 8 * found.held.dense_bytes / found.dense_params

    zero_points = weights(4, "int", group_size=128, symmetric=False)
    for quantization, expected in (
        ({"quant_method": "fp8"}, 8.0),
        (BLOCK_FP8, 8 + 32 / 128**2),
        (AWQ, 4 + (16 + 4) / 128),
        (AWQ | {"zero_point": False}, 4 + 16 / 128),
        (groups(weights(4, "int", group_size=128)), 4 + 16 / 128),
        (groups(zero_points), 4 + 20 / 128),
        (groups(weights(4, group_size=16, strategy="tensor_group")), 4.5),
        ({"quant_algo": "NVFP4", "group_size": 16}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8.0),
    ):
        assert bits(quantization) == pytest.approx(expected, rel=1e-3), quantization
    assert bits({"quant_method": "gptq", "bits": 4, "group_size": 128}) == pytest.approx(4 + 20 / 128, rel=2e-3)


def test_low_bit_products_are_those_with_low_bit_activations():
    def low(quantization: dict) -> float:
        held = read(LLAMA_8B | {"quantization_config": quantization}).architecture.held
        assert held is not None
        return held.low_bits_frac

    attention = LLMS["llama-3.1-8b"].architecture.attention_params
    inner = LLMS["llama-3.1-8b"].architecture.inner_params
    assert low({"quant_method": "fp8"}) == low(groups(dynamic(weights(8, "int")))) == low({"quant_algo": "NVFP4"}) == 1
    assert low(groups(weights(8))) == low(AWQ) == low(groups(weights(4, "int"))) == 0  # weights only
    some = {"quant_method": "fp8", "modules_to_not_convert": ["self_attn"]}
    assert low(some) == pytest.approx(1 - attention / inner)


@pytest.mark.parametrize(
    ("says", "kv"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, "fp8"),
        ({"kv_cache_scheme": "FP8"}, "fp8"),
        ({"kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"kv_cache_scheme": None}, "bf16"),
        ({}, "bf16"),
    ],
)
def test_the_kv_cache_is_what_the_checkpoint_asks_for(says, kv):
    found = read(LLAMA_8B | {"quantization_config": {"quant_algo": "FP8"} | says})
    assert found.architecture.native_kv_precision == kv and not found.warnings
    odd = read(LLAMA_8B | {"quantization_config": {"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}})
    assert odd.architecture.native_kv_precision == "fp8" and "KV cache in NVFP4 is not known" in odd.warnings[0]


def test_a_quantization_beside_the_file_is_read(tmp_path):
    beside = {"producer": {"name": "modelopt"}, "quantization": NVFP4}
    for name in ("", "nvidia--DeepSeek_"):
        path = tmp_path / f"{name}config.json"
        path.write_text(json.dumps(DEEPSEEK_V3 | {"quantization_config": None}))
        alone = llm_entry(str(path))
        assert alone.architecture.native_precision == "bf16"
        assert "deepseek-v3, of the same architecture, is published in fp8" in alone.warnings[0]
        (tmp_path / f"{name}hf_quant_config.json").write_text(json.dumps(beside))
        found = llm_entry(str(path))
        a = found.architecture
        assert (a.native_precision, a.native_kv_precision, found.warnings) == ("nvfp4", "fp8", ())
        assert found.quantized_from == f"{name}hf_quant_config.json: NVFP4"
        assert dict(found.quantized) == {
            "attention": 0,
            "dense": pytest.approx(0.972, abs=1e-3),
            "expert": 1,
            "lm_head": 0,
        }
        assert names_of(a) == ("deepseek-v3",)
        path.write_text(json.dumps(DEEPSEEK_V3))  # what the file says comes first
        assert llm_entry(str(path)).architecture == LLMS["deepseek-v3"].architecture
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP99"}}')
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    with pytest.raises(BadInput, match=r"hf_quant_config\.json: .*quant_algo = FP99; need one of FP8"):
        llm_entry(str(tmp_path / "config.json"))


def test_a_name_that_says_quantized_is_never_16_bits_without_a_word():
    for where in ("Llama-3.1-70B-FP8/config.json", "a/Qwen3-32B-AWQ.json", "models--x--y-NVFP4/snapshots/1/config.json",
                  "zai-org--GLM-4.7-FP8_config.json", "m-w8a8/config.json", "m.GPTQ-Int4/config.json"):  # fmt: skip
        (warning,) = read(LLAMA_8B, where).warnings
        assert "no quantization is in the file" in warning and "--precision" in warning, where
        quantized = LLAMA_8B | {"quantization_config": {"quant_method": "fp8"}}
        assert not read(quantized, where).warnings
    assert read(LLAMA_8B | {"_name_or_path": "/ckpt/Llama-3.1-8B-Instruct-FP8/"}).warnings
    for where in ("Llama-3.1-8B/config.json", "fp8ish/config.json", "gpt4all/config.json"):
        assert not read(LLAMA_8B, where).warnings


def test_only_what_is_read_is_checked():
    odd = '"time_step_limit": [0.0, Infinity], "x": NaN, "n": %s, "a": 1, "a": 2, "s": "\\ud800", ' % (10**400)
    text = json.dumps(LLAMA_8B | {"max_position_embeddings": 131_072}).replace("{", "{" + odd, 1)
    found = parse_config("config.json", text.encode())
    assert found.architecture == LLMS["llama-3.1-8b"].architecture and found.max_position_tokens == 131_072
    twice = json.dumps(LLAMA_8B).replace("{", '{"hidden_size": 8192, ', 1)
    with pytest.raises(BadInput, match=r"hidden_size = \[8192, 4096\]: input should be a valid integer"):
        parse_config("config.json", twice.encode())
    same = json.dumps(LLAMA_8B).replace("{", '{"hidden_size": 4096, ', 1)
    assert parse_config("config.json", same.encode()).architecture == found.architecture


def test_what_is_left_out_is_said():
    found = read(PUBLIC["qwen3-vl-235b"].document | {"text_config": PUBLIC["mimo-7b"].document})
    assert found.left_out == ("draft (MTP) layers (num_nextn_predict_layers = 1)", "the encoder (vision_config)")
    assert found.draft_bytes == pytest.approx(0.42e9, rel=0.02)  # 7.83 B published with it, 7.62 B without
    nested = ["(" * 40 + "a" + ")+" * 40, "(a+)+b", "[", "x" * 999]
    says = read(LLAMA_8B | {"quantization_config": groups(weights(8), ignore=[f"re:{each}" for each in nested])})
    assert len(says.warnings) == len(nested) and all("is not read" in warning for warning in says.warnings)
    many = [f"*a{i}*" for i in range(MAX_FREE + 2)]
    assert "2 patterns" in read(LLAMA_8B | {"quantization_config": groups(weights(8), ignore=many)}).warnings[0]


def test_an_engine_on_layers_without_a_law_is_refused_in_one_line(tmp_path):
    for name, why in (
        ("nemotron-3-super", "only attention or only an MLP"),
        ("minimax-text-01", "70 of 80 layers are linear attention"),
        ("deepseek-v3.2", "a sparse index"),
        ("gemma-4-26b-a4b", "other heads"),
    ):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(PUBLIC[name].document))
        with pytest.raises(BadInput, match=why) as refusal:
            engine_entry(EngineSpec("h200", str(path)))
        assert "\n" not in str(refusal.value)


def test_layers_with_a_state_are_for_engines_of_operators(tmp_path):
    """Of each sequence a state of one size, beside a cache of the other layers alone."""
    path = tmp_path / "config.json"
    for name, layers, state in (
        ("qwen3-next-80b", 36, 36 * 32 * 128 * 128),
        ("jamba-v0.1", 28, 28 * 2 * 4096 * 16),
    ):
        path.write_text(json.dumps(PUBLIC[name].document))
        spec = EngineSpec("h200", str(path), 4, serving="vllm")
        engine = engine_entry(spec).engine
        bytes_a_token = PUBLIC[name].kv_bytes / min(4, read(PUBLIC[name].document).architecture.kv_heads)
        assert float(engine.kv.fixed_tokens) == pytest.approx(STATE_BYTES * state / 4 / bytes_a_token)
        for other in (
            dataclasses.replace(spec, serving=MEASURED_SERVING),
            dataclasses.replace(spec, source="projected"),
        ):
            with pytest.raises(BadInput, match=f"llm: {layers} of .* layers keep a state") as refusal:
                engine_entry(other)
            assert "\n" not in str(refusal.value)


def test_one_architecture_has_one_answer(tmp_path):
    """By either of its names and by its file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_70B))
    names = ("llama-3.1-70b", "llama-3.3-70b", str(path))
    for serving, quality in ((MEASURED_SERVING, "measured"), ("vllm", "kernels")):
        entries = [engine_entry(EngineSpec("h100", llm, 4, serving=serving)) for llm in names]
        assert {entry.quality for entry in entries} == {quality}
        assert len({float(entry.engine.decode.step_s(32.0, 1024.0)) for entry in entries}) == 1
    assert names_of(LLMS["llama-3.3-70b"].architecture) == ("llama-3.1-70b", "llama-3.3-70b")


def test_products_run_in_what_the_gpu_has():
    def prefill_s(gpu: str, precision: str) -> float:
        spec = EngineSpec(gpu, "llama-3.1-8b", 1, precision, serving=MEASURED_SERVING)
        return float(engine_entry(spec).engine.prefill.per_token_s)

    assert prefill_s("a100", "int8") < prefill_s("a100", "bf16")
    assert prefill_s("a100", "fp8") == prefill_s("a100", "bf16")  # unpacked
    assert (
        prefill_s("h100", "fp8") == prefill_s("h100", "int8") < prefill_s("h100", "nvfp4") == prefill_s("h100", "bf16")
    )
    assert prefill_s("b200", "nvfp4") == prefill_s("b200", "fp8") < prefill_s("b200", "bf16")


def test_catalog_llm_says_how_a_file_was_understood(tmp_path, capsys):
    path = tmp_path / "x-FP8" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(QWEN3_NEXT | {"num_nextn_predict_layers": 1}))
    assert main(["catalog", "llm", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    contract = ("llm", "family", "total_params", "active_params", "weight_bytes", "kv_bytes_per_token", "precision")
    assert shown.keys() >= {*contract, "quantized_from", "warnings"}
    assert shown["total_params"] == sum(part["params"] for part in shown["parts"].values())
    assert shown["weight_bytes"] == sum(part["bytes"] for part in shown["parts"].values())
    assert (shown["kv_bytes_per_token"], shown["precision"], shown["quantized_from"]) == (24_576, "bf16", None)
    assert "gated delta in 36 of 48 layers" in shown["family"] and shown["no_engine"] is None
    (warning,) = shown["warnings"]
    assert "says FP8" in warning and warning in err
    assert main(["engine", "--llm", str(path), "--serving", MEASURED_SERVING]) == 2
    refusal = capsys.readouterr().err.splitlines()
    assert "--llm: 36 of 48 layers keep a state" in refusal[-1] and warning in "\n".join(refusal[:-1])
    for name in LLMS:
        assert main(["catalog", "llm", name]) == 0
        table = capsys.readouterr().out
        assert "Bits a weight" in table and "config.json of" in table
    for arguments, says in (
        (("llm",), "names no LLM"),
        (("gpus", "x"), "takes no name"),
        (("llm", "x"), "unknown name"),
    ):
        assert main(["catalog", *arguments]) == 2
        assert says in capsys.readouterr().err
