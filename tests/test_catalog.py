"""The catalog: data-sheet GPUs, LLMs at their precisions, and Hugging Face configs that must count the same."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.catalog.gpus import GPUS, gpu_entry
from fleetopt_jax.catalog.hf_config import SUPPORTED, read_config
from fleetopt_jax.catalog.llms import BYTES_4_BIT, KV_BYTES, LLMS, PRECISIONS, at_precision, llm_entry
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.units import GIB
from fleetopt_jax.laws.hardware import IDLE_FRAC_OF_TDP
from fleetopt_jax.laws.llm import n_active_params, n_params, weight_bytes


def config(class_name: str, layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, **more):
    """A config.json as published, without what we do not read."""
    return {
        "architectures": [class_name],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        **more,
    }


def qwen3_moe(layers: int, hidden: int, heads: int, kv_heads: int, expert: int, n_experts: int):
    return config(
        "Qwen3MoeForCausalLM", layers, hidden, heads, kv_heads, 3 * hidden, 151_936, head_dim=128,
        num_experts=n_experts, num_experts_per_tok=8, moe_intermediate_size=expert, decoder_sparse_step=1,
        mlp_only_layers=[], sliding_window=None, use_sliding_window=False, tie_word_embeddings=False,
    )  # fmt: skip


def gpt_oss(layers: int, n_experts: int):
    return config(
        "GptOssForCausalLM", layers, 2880, 64, 8, 2880, 201_088, head_dim=64,
        num_local_experts=n_experts, num_experts_per_tok=4, experts_per_token=4, sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    )  # fmt: skip


LLAMA_8B = config("LlamaForCausalLM", 32, 4096, 32, 8, 14_336, 128_256, tie_word_embeddings=False)
DEEPSEEK_V3 = config(
    "DeepseekV3ForCausalLM", 61, 7168, 128, 128, 18_432, 129_280, q_lora_rank=1536, kv_lora_rank=512,
    qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=256, n_shared_experts=1,
    num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3, moe_layer_freq=1,
    quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
)  # fmt: skip
CONFIGS = {
    "llama-3.1-8b": LLAMA_8B,
    "llama-3.1-70b": config("LlamaForCausalLM", 80, 8192, 64, 8, 28_672, 128_256),
    "llama-3.1-405b": config("LlamaForCausalLM", 126, 16_384, 128, 8, 53_248, 128_256),
    "llama-3.3-70b": config("LlamaForCausalLM", 80, 8192, 64, 8, 28_672, 128_256, head_dim=128),
    "qwen3-8b": config("Qwen3ForCausalLM", 36, 4096, 32, 8, 12_288, 151_936, head_dim=128),
    "qwen3-14b": config("Qwen3ForCausalLM", 40, 5120, 40, 8, 17_408, 151_936, head_dim=128),
    "qwen3-32b": config("Qwen3ForCausalLM", 64, 5120, 64, 8, 25_600, 151_936, head_dim=128),
    "qwen3-30b-a3b": qwen3_moe(48, 2048, 32, 4, 768, 128),
    "qwen3-235b-a22b": qwen3_moe(94, 4096, 64, 4, 1536, 128),
    "qwen3-coder-480b-a35b": qwen3_moe(62, 6144, 96, 8, 2560, 160),
    "deepseek-v3": DEEPSEEK_V3,
    "gpt-oss-20b": gpt_oss(24, 32),
    "gpt-oss-120b": gpt_oss(36, 128),
}
# Published totals; we leave out norms and biases, which is most in gpt-oss (its experts have biases).
TOTALS = {
    "llama-3.1-8b": 8.030e9,
    "llama-3.1-70b": 70.55e9,
    "llama-3.1-405b": 405.85e9,
    "qwen3-8b": 8.19e9,
    "qwen3-14b": 14.77e9,
    "qwen3-32b": 32.76e9,
    "qwen3-30b-a3b": 30.53e9,
    "qwen3-235b-a22b": 235.09e9,
    "qwen3-coder-480b-a35b": 480.15e9,
    "deepseek-v3": 671.03e9,
    "gpt-oss-20b": 20.91e9,
    "gpt-oss-120b": 116.83e9,
}
ACTIVE = {"qwen3-235b-a22b": 22e9, "qwen3-coder-480b-a35b": 35e9, "deepseek-v3": 37e9, "gpt-oss-120b": 5.1e9}
GEMMA_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text", "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21_504,
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}  # fmt: skip
GEMMA_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
}  # fmt: skip
LLAMA_4 = config(
    "", 48, 5120, 40, 8, 8192, 202_048, model_type="llama4_text", head_dim=128, intermediate_size_mlp=16_384,
    num_local_experts=128, num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=8192,
) | {"architectures": None}  # fmt: skip
OTHER_TOTALS = {  # (config, published parameters of the decoder, within)
    "mixtral-8x7b": (
        config(
            "MixtralForCausalLM", 32, 4096, 32, 8, 14_336, 32_000,
            num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
        ),
        46.70e9,
        1e-3,
    ),
    "mistral-7b": (config("MistralForCausalLM", 32, 4096, 32, 8, 14_336, 32_000, sliding_window=4096), 7.242e9, 1e-3),
    "phi-4": (config("Phi3ForCausalLM", 40, 5120, 40, 10, 17_920, 100_352), 14.66e9, 1e-3),
    "qwen2.5-72b": (config("Qwen2ForCausalLM", 80, 8192, 64, 8, 29_568, 152_064), 72.71e9, 1e-3),
    "qwen1.5-moe-a2.7b": (
        config(
            "Qwen2MoeForCausalLM", 24, 2048, 16, 16, 5632, 151_936, num_experts=60, num_experts_per_tok=4,
            moe_intermediate_size=1408, shared_expert_intermediate_size=5632, decoder_sparse_step=1,
        ),
        14.32e9,
        1e-3,
    ),
    "deepseek-v2-lite": (
        config(
            "DeepseekV2ForCausalLM", 27, 2048, 16, 16, 10_944, 102_400, q_lora_rank=None, kv_lora_rank=512,
            qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=64, n_shared_experts=2,
            num_experts_per_tok=6, moe_intermediate_size=1408, first_k_dense_replace=1,
        ),
        15.71e9,
        1e-3,
    ),
    "gemma-2-9b": (
        config("Gemma2ForCausalLM", 42, 3584, 16, 8, 14_336, 256_000, head_dim=256, sliding_window=4096),
        9.24e9,
        1e-3,
    ),
    "gemma-3-27b": (GEMMA_27B, 27.01e9, 1e-3),
    "gemma-3-4b": (GEMMA_4B, 3.88e9, 1e-3),
    "glm-4-32b": (config("Glm4ForCausalLM", 61, 6144, 48, 2, 23_040, 151_552, head_dim=128), 32.57e9, 1e-3),
    "glm-4.5": (
        config(
            "Glm4MoeForCausalLM", 92, 5120, 96, 8, 12_288, 151_552, head_dim=128, n_routed_experts=160,
            n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=1536, first_k_dense_replace=3,
        ),
        355e9,  # with the draft layer, which is left out
        1e-2,
    ),
    "llama-4-maverick": ({"architectures": ["Llama4ForConditionalGeneration"], "text_config": LLAMA_4}, 400.7e9, 2e-3),
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """Reads a document, or text, as if it were a config.json."""

    def read_document(document):
        path = tmp_path / "config.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return read_config(str(path))

    return read_document


def total(a: Architecture) -> int:
    return a.attention_params + a.dense_params + a.expert_params + a.lm_head_params + a.embedding_params


# GPUs


def test_gpus_are_as_their_data_sheets_and_default_as_vllm():
    published = {"a100": 2.21, "h100": 4.025, "h200": 6.0, "b200": 8.0, "gb200": 10.0}
    assert {name: GPUS[name].gpu.usd_per_h.item() for name in published} == published
    for name, entry in GPUS.items():
        gpu, large = entry.gpu, entry.gpu.memory_bytes >= 70 * GIB and name != "a100"
        assert (entry.max_num_seqs, entry.batched_tokens) == ((1024, 8192) if large else (256, 2048)), name
        eight_bit_gain = gpu.peak_flop8_per_s / gpu.peak_flop_per_s
        assert eight_bit_gain == 1 if name == "a100" else abs(eight_bit_gain - 2) < 0.03
        assert gpu.idle_w == (IDLE_FRAC_OF_TDP * gpu.tdp_w if entry.idle_w is None else entry.idle_w)
    # With a model loaded (sgl-project/sglang#3196, #27567); nobody has published GB200's.
    measured = {"a100": 62, "h100": 121.7, "h200": 115, "b200": 251.3, "l40s": 102.1}
    assert {name: entry.idle_w for name, entry in GPUS.items() if entry.idle_w is not None} == measured
    # nvidia-smi's MiB: CUDA has 0.4 to 3.3 % less. The paper counts with what the name says.
    shown = {"a100": 81_920, "h100": 81_559, "h200": 143_771, "b200": 183_359, "gb200": 189_471, "l40s": 46_068}
    for name, mib in shown.items():
        assert 0.965 < GPUS[name].memory_bytes / (mib * 2**20) < 0.997, name
        assert GPUS[name].nominal_gpu.memory_bytes >= GPUS[name].memory_bytes
    assert gpu_entry("L40S") is GPUS["l40s"]
    with pytest.raises(BadInput, match=r"^gpu: unknown name 'h10'; did you mean h100"):
        gpu_entry("h10")


# LLMs at a precision


def test_known_models_have_their_published_bytes():
    llama = at_precision(LLMS["llama-3.1-70b"].architecture)
    assert weight_bytes(llama) == 2 * (12_079_595_520 + 56_371_445_760 + 2 * 1_050_673_152)
    assert llama.kv_bytes_per_token == 327_680
    assert llama.attention_flop_per_token2 == 4 * 80 * 64 * 128
    assert at_precision(LLMS["qwen3-235b-a22b"].architecture).kv_bytes_per_token == 192_512
    deepseek = at_precision(LLMS["deepseek-v3"].architecture)
    assert deepseek.kv_bytes_per_token == 70_272 and deepseek.n_kv_heads == 1
    assert deepseek.attention_flop_per_token2 == 2 * 61 * 128 * (2 * 512 + 64)
    gpt = at_precision(LLMS["gpt-oss-120b"].architecture)
    assert gpt.windowed_frac == 0.5 and gpt.window_tokens == 128
    assert weight_bytes(gpt) == pytest.approx(65.2e9, rel=2e-3)  # size of the checkpoint


@pytest.mark.parametrize("name", LLMS)
def test_precision_changes_bytes_and_nothing_else(name):
    a = LLMS[name].architecture
    allowed = [precision for precision in PRECISIONS if a.n_experts or precision != "mxfp4"]
    at = {precision: at_precision(a, precision) for precision in allowed}
    for precision, llm in at.items():
        assert n_params(llm) == total(a)
        half = at_precision(a, precision, "fp8")
        assert half.kv_bytes_per_token * 2 == llm.kv_bytes_per_token == at["bf16"].kv_bytes_per_token
        assert weight_bytes(half) == weight_bytes(llm)
        assert llm.eight_bit_frac == (precision == "fp8")
    sixteen_bit = 2 * (a.lm_head_params + a.embedding_params)
    quantised = total(a) - a.lm_head_params - a.embedding_params
    assert weight_bytes(at["bf16"]) == pytest.approx(2 * quantised + sixteen_bit, rel=1e-12)
    assert weight_bytes(at["fp8"]) == pytest.approx(quantised + sixteen_bit, rel=1e-12)
    assert weight_bytes(at["int4"]) == pytest.approx(BYTES_4_BIT * quantised + sixteen_bit, rel=1e-12)
    assert weight_bytes(at_precision(a)) == weight_bytes(at[a.native_precision])
    if name in ACTIVE:
        assert n_active_params(at["bf16"]) == pytest.approx(ACTIVE[name], rel=0.03)


def test_a_precision_that_makes_no_sense_is_refused():
    llama = LLMS["llama-3.1-8b"].architecture
    with pytest.raises(BadInput, match=f"^precision: unknown name 'fp9'.*known: {', '.join(sorted(PRECISIONS))}"):
        at_precision(llama, "fp9")
    with pytest.raises(BadInput, match=f"^kv_precision: unknown name 'int4'.*{', '.join(sorted(KV_BYTES))}"):
        at_precision(llama, "fp8", "int4")
    with pytest.raises(BadField, match=r"^precision: mxfp4 is for routed experts") as refusal:
        at_precision(llama, "MXFP4")
    assert str(refusal.value.at("plan, ".__add__)).startswith("plan, precision: mxfp4 is for routed experts")


def test_llms_are_found_by_name_or_file(tmp_path):
    assert llm_entry("Llama-3.1-70B") is LLMS["llama-3.1-70b"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    assert llm_entry(str(path)).architecture == LLMS["llama-3.1-8b"].architecture
    path.rename(tmp_path / "noending")
    assert llm_entry(str(tmp_path / "noending")).architecture == LLMS["llama-3.1-8b"].architecture
    with pytest.raises(BadInput, match="did you mean qwen3-8b"):
        llm_entry("Qwen/Qwen3-8B")  # a repository, not a file
    with pytest.raises(BadInput, match=r"config\.json: no such file"):
        llm_entry(str(path))
    for name in ("", "\0/x", "x" * 5000 + "/y", ".", "\0.json"):
        with pytest.raises(BadInput):
            llm_entry(name)


# Hugging Face configs


@pytest.mark.parametrize("name", LLMS)
def test_configs_count_what_the_catalog_says(name, read):
    assert read(CONFIGS[name]) == LLMS[name].architecture
    if name in TOTALS:
        assert total(LLMS[name].architecture) == pytest.approx(TOTALS[name], rel=1e-3)


@pytest.mark.parametrize("name", OTHER_TOTALS)
def test_other_families_have_their_published_size(name, read):
    document, published, within = OTHER_TOTALS[name]
    assert total(read(document)) == pytest.approx(published, rel=within)


def test_sliding_windows_are_read_in_each_way_they_are_written(read):
    def windows(document):
        found = read(document)
        return found.window_tokens, found.windowed_layers

    assert windows(GEMMA_27B) == (1024, 52)
    assert windows(OTHER_TOTALS["gemma-2-9b"][0]) == (4096, 21)
    assert windows(OTHER_TOTALS["mistral-7b"][0]) == (4096, 32)
    qwen = CONFIGS["qwen3-8b"] | {"sliding_window": 4096, "max_window_layers": 28}
    assert windows(qwen) == windows(qwen | {"use_sliding_window": False}) == (0, 0)
    assert windows(qwen | {"use_sliding_window": True}) == (4096, 8)
    without_list = {field: value for field, value in gpt_oss(24, 32).items() if field != "layer_types"}
    assert windows(without_list) == (128, 12)
    gemma = {**GEMMA_27B["text_config"], "architectures": ["Gemma3ForCausalLM"], "_sliding_window_pattern": 2}
    assert windows(gemma) == (1024, 31)


def test_unsaid_fields_mean_what_transformers_means(read):
    no_kv = {field: value for field, value in LLAMA_8B.items() if field != "num_key_value_heads"}
    assert read(no_kv).kv_heads == read(LLAMA_8B | {"num_key_value_heads": None}).kv_heads == 32
    assert read(CONFIGS["qwen3-235b-a22b"]).head_dim == 128  # and not 4096 / 64
    assert read(GEMMA_27B).embedding_params == 0 < read(LLAMA_8B).embedding_params
    assert read(LLAMA_8B | {"tie_word_embeddings": True}).embedding_params == 0
    assert read({"architectures": ["KimiVLForConditionalGeneration"], "text_config": DEEPSEEK_V3}) == read(DEEPSEEK_V3)
    assert read({"llm_config": LLAMA_8B | {"rope_scaling": {"factor": 8.0}}}) == read(LLAMA_8B)


QUANTIZATIONS = {
    "fp8": [
        {"quant_method": "fp8"},
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}}}},
    ],
    "int4": [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "w_bit": 4},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}},
    ],
    "mxfp4": [{"quant_method": "mxfp4"}],
    "bf16": [None],
}


def test_the_checkpoint_says_its_precision(read):
    for precision, quantizations in QUANTIZATIONS.items():
        for quantization in quantizations:
            document = LLAMA_8B | {"quantization_config": quantization, "torch_dtype": "bfloat16"}
            assert read(document).native_precision == precision
            nested = {"text_config": LLAMA_8B, "quantization_config": quantization}
            assert read(nested).native_precision == precision


REFUSED = [
    ({"hidden_size": -1}, "hidden_size = -1: .*greater than or equal to 1"),
    ({"hidden_size": 4096.5}, "hidden_size = 4096.5: .*valid integer"),
    ({"hidden_size": "4096"}, "hidden_size = 4096: .*valid integer"),
    ({"hidden_size": True}, "hidden_size = True: .*valid integer"),
    ({"hidden_size": None}, "hidden_size: field required"),
    ({"hidden_size": 10**400}, "hidden_size = 1000.*; need a number of at most 300 digits"),
    ({"hidden_size": float("nan")}, "hidden_size = NaN; need a finite number"),
    ({"vocab_size": float("inf")}, "vocab_size = Infinity; need a finite number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: .*less than or equal to 10000"),
    ({"num_attention_heads": 30}, "hidden_size = 4096; need head_dim, or a multiple of 30 heads"),
    ({"num_key_value_heads": 5}, "num_key_value_heads = 5; need a divisor of 32 heads"),
    ({"layer_types": ["mamba"] * 32}, "layer_types.0 = mamba: "),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; need one for each of 32 layers"),
    ({"layer_types": ["sliding_attention"] * 32}, "sliding_attention without a sliding window"),
    ({"sliding_window": 0}, "sliding_window = 0: "),
    ({"torch_dtype": "int8"}, "torch_dtype = int8: .*'bfloat16'"),
    ({"quantization_config": "fp8"}, "quantization_config = fp8: "),
    ({"quantization_config": {}}, "quantization_config.quant_method: field required"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method = bitsandbytes; need fp8"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, r"gptq \(int 8 bits\); need fp8"),
    ({"architectures": ["MambaForCausalLM"]}, r"architectures = \['MambaForCausalLM'\].*supported: LlamaFor"),
    ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "architectures = .*T5"),
    ({"architectures": "LlamaForCausalLM"}, "architectures = LlamaForCausalLM"),
    ({"architectures": None, "model_type": "bert"}, "architectures = None, model_type = bert; supported"),
    ({"text_config": {"model_type": "mllama_text_model"}}, "text_config.model_type = mllama_text_model; supported"),
    ({"text_config": LLAMA_8B | {"vocab_size": 0}}, ", text_config, line 1: vocab_size = 0"),
]
REFUSED_MOE = [
    ({"n_routed_experts": 0}, "n_routed_experts = 0: "),
    ({"n_routed_experts": None}, "experts: field required"),
    ({"num_experts_per_tok": 256}, "num_experts_per_tok = 256; need fewer than the 256 experts"),
    ({"moe_intermediate_size": None}, "moe_intermediate_size: field required"),
    ({"first_k_dense_replace": 61}, "no layer of 61 has experts"),
    ({"mlp_only_layers": [-1]}, "mlp_only_layers.0 = -1: "),
    ({"kv_lora_rank": None}, "kv_lora_rank: field required"),
]
ALL_REFUSED = [(LLAMA_8B | change, said) for change, said in REFUSED]
ALL_REFUSED += [(DEEPSEEK_V3 | change, said) for change, said in REFUSED_MOE]
ALL_REFUSED += [
    ("[]", "holds no JSON object"),
    ("", "the file is empty"),
    ("{", "is not JSON"),
    ("[" * 9999, "is nested more than 100 deep"),
]


@pytest.mark.parametrize("document, said", ALL_REFUSED)
def test_a_bad_config_is_refused_in_one_line_that_names_the_field(document, said, read):
    with pytest.raises(BadInput, match=f"config.json.*{said}") as refusal:
        read(document)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 800


FIELDS = sorted({field for document in (*CONFIGS.values(), LLAMA_4) for field in document} | {"text_config"})
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.integers() | st.floats() | st.sampled_from(sorted(SUPPORTED)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(CONFIGS)), st.dictionaries(st.sampled_from(FIELDS), ODD, min_size=1, max_size=3))
def test_any_config_is_read_or_refused(tmp_path_factory, name, changes):
    path = tmp_path_factory.getbasetemp() / "odd.json"
    path.write_text(json.dumps(CONFIGS[name] | changes))
    try:
        found = read_config(str(path))
    except BadInput:
        return
    assert found.attention_params > 0 and found.dense_params > 0 and found.lm_head_params > 0
    assert 0 <= found.windowed_layers <= found.layers and found.q_heads % found.kv_heads == 0
    llm = at_precision(found, "int4", "fp8")
    assert 0 <= llm.expert_share < 1 and weight_bytes(llm) > 0
