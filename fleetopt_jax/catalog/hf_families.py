"""What a Hugging Face `config.json` leaves to its class: a table of data, each line with its reason.

Families are read by the structure their fields describe; what is here cannot be seen in a file. A family is a
`model_type`, or a class, without case, underscores and the endings that every family has.
"""

from typing import Any

_WINDOW_OFF = {"use_sliding_window": False}  # the class's default; the files name a window all the same
_TIED = {"tie_word_embeddings": True}  # the default of transformers' PretrainedConfig, which these classes keep
_GEMMA = {"head_dim": 256, **_TIED}
_GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208, "sliding_window_pattern": 6}
_GATED_QUERIES = {"attn_output_gate": True}  # in the class, whatever the file says

DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2", "qwen2moe", "qwen2vl", "qwen25vl", "qwen3", "qwen3moe", "qwen3vl"), _WINDOW_OFF),
    **dict.fromkeys(("qwen3vlmoe", "mimo", "qwen25omni", "qwen3omnimoe"), _WINDOW_OFF),
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), _WINDOW_OFF | _GATED_QUERIES),
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {"sliding_window_pattern": 2},
    "gemma3": _GEMMA | _GEMMA3,
    "gemma4": _TIED,
    "gptoss": {"sliding_window_pattern": 2},
    "llama4": {"n_shared_experts": 1},
    "cohere": _TIED,
    "cohere2": _TIED | {"sliding_window_pattern": 4},
    "exaone4": {"sliding_window_pattern": 4},
    "olmo3": {"sliding_window_pattern": 4},
    **dict.fromkeys(("gpt2", "gptbigcode", "falcon", "bloom", "opt", "mpt", "starcoder2", "ernie45"), _TIED),
    "granitemoehybrid": {"tie_word_embeddings": True},
    "chatglm": {"hidden_act": "silu"},  # SwiGLU, which the file does not say
}
# MLPs of two matrices where the file's activation leaves that open: up and down, no gate.
UNGATED = (
    *("gpt2", "gptbigcode", "gptneox", "gptneoxjapanese", "gptj", "codegen", "bloom", "opt", "mpt", "falcon"),
    *("phi", "starcoder2", "persimmon", "nemotron", "nemotronh", "arcee", "apertus", "stablelmalpha", "olmohf"),
)
GATED = ("gemma", "gemma2", "gemma3", "gemma4", "chatglm", "dbrx", "glm", "grok", "granite")  # though with GELU
SQUARED = ("relu2", "xielu")  # activations that only MLPs without a gate have
SWISH = ("silu", "swiglu", "swish")  # and one that, in decoders of today, is a gate's
FOUR_TIMES = ("gpt2", "gptbigcode", "gptj", "codegen", "bloom", "mpt", "falcon")  # MLP of four hidden_size, unless said
EXPERT_IS_MLP = ("jamba",)  # experts as wide as dense layers, and both there
HALF_SAID = ("qwen",)  # an MLP half as wide as intermediate_size says (the first Qwen)
ONE_KV_HEAD = ("falcon", "gptbigcode")  # where multi_query is true
DRAFT_HAS_EMBEDDINGS = ("deepseekv3", "deepseekv32", "glm4moe", "glmmoedsa", "glm4moelite")  # of its own, in the file
EVEN = ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")  # Hunyuan lists them layer by layer
LIGHTNING = ("minimax",)  # whose linear_attention is of that kind
NESTED = ("attn_config", "ffn_config")  # parts that DBRX and MPT put their fields in

# Structures that nothing here describes: the field, or the family, and what it means.
UNKNOWN_FIELDS = {
    "altup_num_inputs": "alternating updates (Gemma 3n)",
    "block_configs": "layers that differ one by one (block_configs)",
    "cross_attention_layers": "layers of cross-attention",
    "zero_expert_num": "experts that compute nothing",
    "share_q_dim": "factorized attention",
    "lru_width": "recurrent layers",
    "conv_L_cache": "convolutional layers",
    "mamba_d_ssm": "attention and a state space in one layer",
    "hybrid_layer_ids": "layers that share their weights",
    "relative_attention_num_buckets": "an encoder",
    "type_vocab_size": "an encoder",
    "use_cla": "layers that share their KV cache",
    "num_kv_shared_layers": "layers that share their KV cache",
    "hidden_size_per_layer_input": "embeddings of every layer",
    "is_encoder_decoder": "an encoder and a decoder",
    "swa_num_attention_heads": "other heads in layers with a window",
    "swa_num_key_value_heads": "other heads in layers with a window",
}
UNKNOWN_FAMILIES = {
    **dict.fromkeys(("mamba", "mamba2", "falconmamba", "rwkv", "rwkv5", "rwkv6", "xlstm", "jetmoe"), "no attention"),
    **dict.fromkeys(("bert", "roberta", "xlmroberta", "distilbert", "electra", "albert", "modernbert"), "an encoder"),
    **dict.fromkeys(("t5", "mt5", "umt5", "bart", "mbart", "whisper", "pegasus", "marian"), "an encoder and a decoder"),
    **dict.fromkeys(("clip", "siglip", "vit", "wav2vec2", "dinov2"), "an encoder"),
}


def family_of(model_type: str) -> str:
    """`qwen3_vl_moe_text` and `Qwen3VLMoeForConditionalGeneration` are one family: `qwen3vlmoe`."""
    name = model_type.lower()
    for ending in ("forcausallm", "forconditionalgeneration", "lmheadmodel"):
        name = name.removesuffix(ending)
    name = "".join(letter for letter in name if letter.isalnum())
    return name.removesuffix("text") or name
