"""Public configurations as small documents: what is read of each config.json, with published parameters."""


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


def qwen3_delta(class_name: str, layers: int, hidden: int, heads: int, values: int, expert: int, vocabulary: int):
    """Three layers of the gated delta rule for one of attention."""
    return config(
        class_name, layers, hidden, heads, 2, 5120, vocabulary, head_dim=256, full_attention_interval=4,
        linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16,
        linear_num_value_heads=values, num_experts=512, num_experts_per_tok=10, moe_intermediate_size=expert,
        shared_expert_intermediate_size=expert, attn_output_gate=True, tie_word_embeddings=False,
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
    "qwen3-next-80b-a3b": qwen3_delta("Qwen3NextForCausalLM", 48, 2048, 16, 32, 512, 151_936),
    "qwen3.5-397b-a17b": qwen3_delta("Qwen3_5MoeForConditionalGeneration", 60, 4096, 32, 64, 1024, 248_320),
    "minimax-m2.5": config(
        "MiniMaxM2ForCausalLM",
        62,
        3072,
        48,
        8,
        1536,
        200_064,
        head_dim=128,
        num_local_experts=256,
        num_experts_per_tok=8,
        shared_intermediate_size=0,
        num_mtp_modules=3,
        tie_word_embeddings=False,
        quantization_config={
            "quant_method": "fp8",
            "fmt": "float8_e4m3fn",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    ),
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
    "qwen3-next-80b-a3b": 79.7e9,
    "minimax-m2.5": 228.7e9,
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
