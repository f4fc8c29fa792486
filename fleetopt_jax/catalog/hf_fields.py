"""The fields of a Hugging Face `config.json` that are read, with their bounds. Whatever else is there is ignored."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, RootModel

MAX_LAYERS = 1_000
MAX_LISTED = 10_000  # entries of a list: modules that stay in 16 bits
Few = Annotated[int, Field(ge=1, le=10_000)]
Many = Annotated[int, Field(ge=1, le=10_000_000)]
FewOrNone = Annotated[int, Field(ge=0, le=10_000)]
ManyOrNone = Annotated[int, Field(ge=0, le=10_000_000)]
Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Tokens = Annotated[int, Field(ge=1, le=10**9)]
ByLayer = Annotated[list[FewOrNone], Field(max_length=MAX_LISTED)]
Words = Annotated[list[str], Field(max_length=MAX_LISTED)]


def _said(description: str, *names: str, default: Any = ...) -> Any:
    """A field with its description, read under the first of these names that is there."""
    if len(names) < 2:
        return Field(default, description=description)
    also = f" Also called {', '.join(names[1:])}."
    return Field(default, description=description + also, validation_alias=AliasChoices(*names))


class Part(BaseModel):
    """Fields we do not read may be there; numbers must be JSON integers."""

    model_config = ConfigDict(extra="ignore", strict=True)


class HfWeights(Part):
    """One format of compressed-tensors or modelopt."""

    type: Literal["float", "int"] = "int"
    num_bits: int = _said("Bits of a value.")
    group_size: int | None = _said("Weights of a row that share a scale.", default=None)
    strategy: str | None = _said("tensor, channel, group, block or tensor_group.", default=None)
    block_structure: list[int] | str | None = _said("Weights that share a scale, as [128, 128].", default=None)
    symmetric: bool | None = _said("Whether there are no zero points.", default=None)


class HfGroup(Part):
    """Modules of one format."""

    weights: HfWeights | None = None
    input_activations: HfWeights | None = None
    targets: Words | None = _said("Classes or names of modules; Linear: all of them.", default=None)


class HfQuantization(Part):
    """How the checkpoint's weights are quantized."""

    quant_method: str | None = _said(
        "fp8, fbgemm_fp8, mxfp4, gptq, awq, compressed-tensors, modelopt, bitsandbytes, ...", default=None
    )
    quant_algo: str | None = _said("Of modelopt: FP8, NVFP4, MIXED_PRECISION, ...", default=None)
    bits: int | None = _said("Bits of a weight, of gptq and awq.", "bits", "w_bit", default=None)
    group_size: int | None = _said(
        "Weights of a row that share a scale; -1: all.", "group_size", "q_group_size", default=None
    )
    zero_point: bool | None = _said("Whether awq has zero points.", default=None)
    lm_head: bool | None = _said("Whether gptq takes the output layer as well.", default=None)
    weight_block_size: Annotated[list[Few], Field(min_length=2, max_length=2)] | None = _said(
        "Weights that share a scale, of fp8.", default=None
    )
    load_in_4bit: bool | None = _said("Of bitsandbytes.", default=None)
    load_in_8bit: bool | None = _said("Of bitsandbytes.", default=None)
    config_groups: Annotated[dict[str, HfGroup], Field(max_length=MAX_LISTED)] | None = _said(
        "Formats of compressed-tensors and modelopt.", default=None
    )
    quantized_layers: Annotated[dict[str, dict[str, Any]], Field(max_length=100_000)] | None = _said(
        "Of modelopt's MIXED_PRECISION: module and its quant_algo.", default=None
    )
    dynamic: dict[str, Any] | None = _said("Of gptq: '-:' before a pattern leaves modules in 16 bits.", default=None)
    modules_to_not_convert: Words | None = _said("Modules in 16 bits.", default=None)
    ignore: Words | None = _said("Modules in 16 bits.", default=None)
    ignored_layers: Words | None = _said("Modules in 16 bits.", default=None)
    exclude_modules: Words | None = _said("Modules in 16 bits.", default=None)
    exclude: Words | None = _said("Modules in 16 bits.", default=None)
    llm_int8_skip_modules: Words | None = _said("Modules in 16 bits.", default=None)
    kv_cache_scheme: HfWeights | str | None = _said("Of the KV cache.", default=None)
    kv_cache_quant_algo: str | None = _said("Of the KV cache, as modelopt has it.", default=None)


class HfDecoder(Part):
    """The decoder of any family. null says nothing, and a family's own defaults stand for what is not said."""

    num_hidden_layers: Layers = _said("Layers.", "num_hidden_layers", "num_layers", "n_layers", "n_layer")
    hidden_size: Many = _said("Width of the model.", "hidden_size", "n_embd", "d_model")
    intermediate_size: Many | None = _said(
        "Width of a dense layer's MLP; of an expert where nothing else says that.",
        "intermediate_size",
        "ffn_hidden_size",
        "n_inner",
        "ffn_dim",
        default=None,
    )
    intermediate_size_mlp: Many | None = _said("Width of Llama 4's dense layers.", default=None)
    vocab_size: Many = _said("Tokens of the vocabulary.", "vocab_size", "padded_vocab_size")
    num_attention_heads: Few = _said("Query heads.", "num_attention_heads", "n_head", "n_heads", "num_heads")
    num_key_value_heads: Few | None = _said(
        "Key and value heads; as many as query heads if not said.",
        "num_key_value_heads",
        "num_kv_heads",
        "n_head_kv",
        "kv_n_heads",
        "multi_query_group_num",
        default=None,
    )
    head_dim: Few | None = _said(
        "Width of a head; hidden_size / num_attention_heads if not said.",
        "head_dim",
        "attention_head_dim",
        "kv_channels",
        default=None,
    )
    tie_word_embeddings: bool = _said("Whether the output layer is the input embedding.", default=False)
    hidden_act: str | None = _said(
        "Activation of the MLP.",
        "hidden_act",
        "mlp_hidden_act",
        "hidden_activation",
        "activation_function",
        default=None,
    )
    max_position_embeddings: Tokens | None = _said(
        "Longest sequence [tokens].",
        "max_position_embeddings",
        "n_positions",
        "seq_length",
        "max_seq_len",
        "max_sequence_length",
        default=None,
    )
    use_sliding_window: bool = _said("Whether sliding_window applies.", default=True)
    sliding_window: Tokens | None = _said("Attention window [tokens].", "sliding_window", "window_size", default=None)
    sliding_window_pattern: Few | str | None = _said(
        "One layer in so many has full attention; or the kinds of layers, as LLLG.",
        "_sliding_window_pattern",
        "sliding_window_pattern",
        "global_attn_every_n_layers",
        default=None,
    )
    max_window_layers: FewOrNone = _said("Qwen: the first layers without a window.", default=0)
    layer_types: Annotated[list[str], Field(max_length=MAX_LISTED)] | None = _said(
        "Attention of each layer.", "layer_types", "layers_block_type", default=None
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _said(
        "Type of the weights that are not quantized.", "dtype", "torch_dtype", default="auto"
    )
    attn_output_gate: bool = _said("Whether queries come with a gate of their width.", default=False)
    attention_k_eq_v: bool = _said("Gemma 4: layers of full attention have no values of their own.", default=False)
    global_head_dim: Few | None = _said("Gemma 4: width of a head in layers of full attention.", default=None)
    num_global_key_value_heads: Few | None = _said("Gemma 4: their key and value heads.", default=None)
    enable_moe_block: bool = _said("Gemma 4: whether every layer has experts beside its MLP.", default=False)


class HfLatent(Part):
    """What multi-head latent attention (DeepSeek) adds."""

    q_lora_rank: Many | None = _said("Width of the queries' latent; none: they have none.", default=None)
    kv_lora_rank: Many = _said("Width of the cached latent.")
    qk_rope_head_dim: Few = _said("Rotary part of a head.")
    qk_nope_head_dim: Few = _said("Part of a query's head without position.")
    v_head_dim: Few = _said("Width of a value's head.")
    index_n_heads: Few | None = _said("Heads of a sparse index (DeepSeek-V3.2).", default=None)
    index_head_dim: Few | None = _said("Width of one of them.", default=None)


class HfExperts(Part):
    """What a mixture of experts adds."""

    n_experts: Few = _said(
        "Routed experts of a layer.", "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
    )
    per_token: Few = _said(
        "Experts that a token is sent to.",
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_top_k",
        "moe_topk",
        "moe_k",
        "top_k_experts",
        "experts_per_token",
    )
    moe_intermediate_size: Many | None = _said(
        "Width of an expert; intermediate_size where every layer has experts.",
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        default=None,
    )
    moe_latent_size: Many | None = _said("Nemotron 3: the width experts read and write.", default=None)
    n_shared_experts: FewOrNone = _said(
        "Experts that every token is sent to.",
        "n_shared_experts",
        "num_shared_experts",
        "num_shared_expert",
        "moe_num_shared_experts",
        default=0,
    )
    shared_expert_intermediate_size: ManyOrNone = _said(
        "Width of the shared expert, where it has its own.",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
        default=0,
    )
    first_k_dense_replace: FewOrNone = _said(
        "The first layers, which have no experts.",
        "first_k_dense_replace",
        "num_dense_layers",
        "moe_layer_start_index",
        "moe_layer_num_skipped",
        default=0,
    )
    moe_layer_end_index: int | None = _said("The last layer with experts.", default=None)
    moe_layer_freq: Few | ByLayer = _said(
        "One layer in so many has experts; or 1 for each that has.", "moe_layer_freq", "moe_layer_interval", default=1
    )
    sparse_step: Few = _said(
        "One layer in so many has experts.", "decoder_sparse_step", "interleave_moe_layer_step", default=1
    )
    mlp_only_layers: ByLayer = _said("Layers without experts.", default=[])
    expert_layer_period: Few | None = _said("Jamba: one layer in so many has experts.", default=None)
    expert_layer_offset: FewOrNone = _said("Jamba: the first of them.", default=0)


class HfLinear(Part):
    """What layers of linear attention add."""

    full_attention_interval: Few | None = _said("One layer in so many has full attention.", default=None)
    attn_type_list: ByLayer | None = _said("1 for each layer with full attention.", default=None)
    linear_num_key_heads: Few | None = _said("Key heads of the gated delta rule.", default=None)
    linear_num_value_heads: Few | None = _said("Its value heads.", default=None)
    linear_key_head_dim: Few | None = _said("Width of a key.", default=None)
    linear_value_head_dim: Few | None = _said("Width of a value.", default=None)
    linear_conv_kernel_dim: Few = _said("Tokens of its convolution.", default=4)


class HfDelta(Part):
    """Kimi's delta attention (linear_attn_config)."""

    full_attn_layers: ByLayer = _said("Layers with full attention, counted from 1.")
    num_heads: Few = _said("Heads of the others.")
    head_dim: Few = _said("Width of a head.")
    short_conv_kernel_size: Few = _said("Tokens of its convolution.", default=4)


class HfStates(Part):
    """What layers with a state space (Mamba) add."""

    hybrid_override_pattern: Annotated[str, Field(max_length=MAX_LAYERS)] | None = _said(
        "Kind of each layer: M Mamba, * attention, - MLP, E experts.", default=None
    )
    attn_layer_period: Few | None = _said("Jamba: one layer in so many has attention.", default=None)
    attn_layer_offset: FewOrNone = _said("Jamba: the first of them.", default=0)
    attn_layer_indices: ByLayer | None = _said("Bamba: layers with attention.", default=None)
    heads: Few | None = _said("Heads of Mamba 2.", "mamba_num_heads", "mamba_n_heads", default=None)
    state_head_dim: Few | None = _said("Width of a head.", "mamba_head_dim", default=None)
    state_size: Few = _said("States of a channel.", "ssm_state_size", "mamba_d_state")
    n_groups: Few = _said("Groups that share them.", "n_groups", "mamba_n_groups", default=1)
    expand: Few = _said("Channels over hidden_size.", "expand", "mamba_expand", default=2)
    conv_kernel: Few = _said("Tokens of its convolution.", "conv_kernel", "mamba_d_conv", default=4)
    dt_rank: Few | None = _said("Rank of Mamba 1's time steps.", "mamba_dt_rank", default=None)


class HfNamed(Part):
    """Which family it is: what it is made of is read off its fields, and not off its name."""

    architectures: Words | None = _said("Its class, as LlamaForCausalLM.", default=None)
    model_type: str | None = _said("Its family, as llama.", default=None)


class HfQuantized(Part):
    """A checkpoint that is quantized."""

    quantization_config: HfQuantization = _said("How it is.")


class HfDense(HfNamed, HfDecoder):
    """A dense decoder."""

    quantization_config: HfQuantization | None = _said("How it is quantized.", default=None)


class HfMixture(HfDense, HfExperts):
    """A mixture of experts."""


class HfLatentMixture(HfMixture, HfLatent):
    """A mixture of experts with latent attention."""


class HfHybrid(HfDense, HfLinear):
    """Layers of linear attention among others."""


HfText = HfLatentMixture | HfMixture | HfHybrid | HfDense


class HfMultimodal(Part):
    """A multimodal model, of which the text decoder is read."""

    text_config: HfText | None = _said(
        "The text decoder.", "text_config", "llm_config", "language_config", default=None
    )


class HfConfig(RootModel[HfLatentMixture | HfMixture | HfHybrid | HfDense | HfMultimodal]):
    """A Hugging Face `config.json` as far as it is read. More fields are ignored."""

    model_config = ConfigDict(title="Hugging Face config.json")
