"""Hugging Face `config.json` files of decoder-only LLMs, read as data: nothing is downloaded or executed.

Parameters are those of the matrices. Norms, biases and gates of shared experts (together below 0.1 %), draft (MTP)
layers and the encoders of multimodal models are left out. Llama 4's chunked attention counts as full attention.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, RootModel, ValidationError

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import invalid, parse_json, read_bytes, shown

QWEN = {"use_sliding_window": False}
GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208, "sliding_window_pattern": 6}
# Class and model_type of what can be read, with the defaults of the class that files leave unsaid.
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {}),
    "MixtralForCausalLM": ("mixtral", {}),
    "Qwen2ForCausalLM": ("qwen2", QWEN),
    "Qwen2MoeForCausalLM": ("qwen2_moe", QWEN),
    "Qwen3ForCausalLM": ("qwen3", QWEN),
    "Qwen3MoeForCausalLM": ("qwen3_moe", QWEN),
    "Gemma2ForCausalLM": ("gemma2", GEMMA | {"sliding_window_pattern": 2}),
    "Gemma3ForCausalLM": ("gemma3_text", GEMMA | GEMMA3),
    "Phi3ForCausalLM": ("phi3", {}),
    "DeepseekV2ForCausalLM": ("deepseek_v2", {}),
    "DeepseekV3ForCausalLM": ("deepseek_v3", {}),
    "GptOssForCausalLM": ("gpt_oss", {"sliding_window_pattern": 2}),
    "Llama4ForCausalLM": ("llama4_text", {"n_shared_experts": 1}),
    "Glm4ForCausalLM": ("glm4", {}),
    "Glm4MoeForCausalLM": ("glm4_moe", {}),
}
LATENT = ("deepseek_v2", "deepseek_v3")  # with multi-head latent attention
EXPERT_IS_MLP = ("mixtral", "gpt_oss", "llama4_text")  # intermediate_size is that of an expert
MOE = (*LATENT, *EXPERT_IS_MLP, "qwen2_moe", "qwen3_moe", "glm4_moe")
OUTER = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")  # said beside text_config, not in it

Few = Annotated[int, Field(ge=1, le=10_000)]
Many = Annotated[int, Field(ge=1, le=10_000_000)]
FewOrNone = Annotated[int, Field(ge=0, le=10_000)]
ManyOrNone = Annotated[int, Field(ge=0, le=10_000_000)]
MAX_LISTED = 10_000  # layers


def _said(description: str, *names: str, default: Any = ...) -> Any:
    """A field with its description, read under the first of these names that is there."""
    if len(names) < 2:
        return Field(default, description=description)
    also = f" Also called {', '.join(names[1:])}."
    return Field(default, description=description + also, validation_alias=AliasChoices(*names))


class _Part(BaseModel):
    """Fields we do not read may be there; numbers must be JSON integers."""

    model_config = ConfigDict(extra="ignore", strict=True)


class HfWeights(_Part):
    type: Literal["float", "int"]
    num_bits: int = _said("Bits of a weight.")


class HfGroup(_Part):
    weights: HfWeights


class HfQuantization(_Part):
    """How the checkpoint's weights are quantized."""

    quant_method: str = _said("fp8, fbgemm_fp8, mxfp4, gptq, awq or compressed-tensors.")
    bits: int | None = _said("Bits of a weight, of gptq and awq.", "bits", "w_bit", default=None)
    config_groups: Annotated[dict[str, HfGroup], Field(max_length=MAX_LISTED)] = _said(
        "Formats of compressed-tensors.", default={}
    )


class HfDecoder(_Part):
    """The decoder of any family. null says nothing, and a family's own defaults stand for what is not said."""

    num_hidden_layers: Few = _said("Layers.")
    hidden_size: Many = _said("Width of the model.")
    intermediate_size: Many = _said("Width of a dense layer's MLP; of an expert in Mixtral, GPT-OSS and Llama 4.")
    intermediate_size_mlp: Many | None = _said("Width of Llama 4's dense layers.", default=None)
    vocab_size: Many = _said("Tokens of the vocabulary.")
    num_attention_heads: Few = _said("Query heads.")
    num_key_value_heads: Few | None = _said("Key and value heads; as many as query heads if not said.", default=None)
    head_dim: Few | None = _said("Width of a head; hidden_size / num_attention_heads if not said.", default=None)
    tie_word_embeddings: bool = _said("Whether the output layer is the input embedding.", default=False)
    use_sliding_window: bool = _said("Whether sliding_window applies.", default=True)
    sliding_window: Annotated[int, Field(ge=1, le=10**9)] | None = _said("Attention window [tokens].", default=None)
    sliding_window_pattern: Few | None = _said(
        "One layer in so many has full attention.",
        "_sliding_window_pattern",
        "sliding_window_pattern",
        default=None,
    )
    max_window_layers: FewOrNone = _said("Qwen: the first layers without a window.", default=0)
    layer_types: (
        Annotated[
            list[Literal["full_attention", "sliding_attention", "chunked_attention"]], Field(max_length=MAX_LISTED)
        ]
        | None
    ) = _said("Attention of each layer.", default=None)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _said(
        "Type of the weights that are not quantized.", "dtype", "torch_dtype", default="auto"
    )
    quantization_config: HfQuantization | None = None


class HfLatent(_Part):
    """What multi-head latent attention (DeepSeek) adds."""

    q_lora_rank: Many | None = _said("Width of the queries' latent; none: they have none.", default=None)
    kv_lora_rank: Many = _said("Width of the cached latent.")
    qk_rope_head_dim: Few = _said("Rotary part of a head.")
    qk_nope_head_dim: Few = _said("Part of a query's head without position.")
    v_head_dim: Few = _said("Width of a value's head.")


class HfExperts(_Part):
    """What a mixture of experts adds."""

    n_experts: Few = _said(
        "Routed experts of a layer.", "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
    )
    per_token: Few = _said("Experts that a token is sent to.", "num_experts_per_tok", "moe_top_k", "experts_per_token")
    moe_intermediate_size: Many = _said("Width of an expert; intermediate_size in Mixtral, GPT-OSS and Llama 4.")
    n_shared_experts: FewOrNone = _said("Experts that every token is sent to.", default=0)
    shared_expert_intermediate_size: ManyOrNone = _said("Width of Qwen 2's shared expert.", default=0)
    first_k_dense_replace: FewOrNone = _said("The first layers, which have no experts.", default=0)
    moe_layer_freq: Few = _said("One layer in so many has experts.", default=1)
    sparse_step: Few = _said(
        "One layer in so many has experts.", "decoder_sparse_step", "interleave_moe_layer_step", default=1
    )
    mlp_only_layers: Annotated[list[FewOrNone], Field(max_length=MAX_LISTED)] = _said(
        "Layers without experts.", default=[]
    )


class HfNamed(_Part):
    """Which family it is."""

    architectures: list[str] | None = _said(f"One of {', '.join(SUPPORTED)}; or none, with model_type.", default=None)
    model_type: str | None = _said(f"One of {', '.join(kind for kind, _ in SUPPORTED.values())}.", default=None)


class HfDense(HfNamed, HfDecoder):
    """A dense decoder."""


class HfMixture(HfNamed, HfDecoder, HfExperts):
    """A mixture of experts."""


class HfLatentMixture(HfNamed, HfDecoder, HfLatent, HfExperts):
    """A mixture of experts with latent attention."""


HfText = HfLatentMixture | HfMixture | HfDense


class HfMultimodal(_Part):
    """A multimodal model, of which the text decoder is read."""

    text_config: HfText | None = _said("The text decoder.", "text_config", "llm_config", default=None)


class HfConfig(RootModel[HfLatentMixture | HfMixture | HfDense | HfMultimodal]):
    """A Hugging Face `config.json` as far as it is read. More fields are ignored."""

    model_config = ConfigDict(title="Hugging Face config.json")


Checked = TypeVar("Checked", bound=_Part)


def read_config(path: str) -> Architecture:
    """The architecture in a Hugging Face `config.json`, or `BadInput` naming the first field that is wrong."""
    return parse_config(path, read_bytes(path))


def parse_config(where: str, data: bytes) -> Architecture:
    """The architecture in the bytes of a `config.json`."""
    family, key, document = _decoder_of(where, parse_json(where, data))
    where = f"{where}, {key}" if key else where

    def check(part: type[Checked]) -> Checked:
        try:
            return part.model_validate(document)
        except ValidationError as error:
            raise invalid(where, data, error, under=(key,) if key else ()) from None

    config = check(HfDecoder)
    layers, hidden, q_heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    if family in LATENT:
        mla = check(HfLatent)
        kv_heads, head_dim = 1, mla.kv_lora_rank + mla.qk_rope_head_dim
        attention_params = layers * _latent_attention(mla, hidden, q_heads)
        latent = dict(latent_dim=mla.kv_lora_rank, rope_dim=mla.qk_rope_head_dim)
    else:
        kv_heads, head_dim = config.num_key_value_heads or q_heads, config.head_dim or hidden // q_heads
        if config.head_dim is None and hidden % q_heads:
            raise BadInput(where, f"hidden_size = {hidden}", f"need head_dim, or a multiple of {q_heads} heads")
        if q_heads % kv_heads:
            raise BadInput(where, f"num_key_value_heads = {kv_heads}", f"need a divisor of {q_heads} heads")
        attention_params = layers * 2 * hidden * head_dim * (q_heads + kv_heads)
        latent = {}
    vocabulary = config.vocab_size * hidden
    return Architecture(
        layers=layers,
        hidden=hidden,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        attention_params=attention_params,
        lm_head_params=vocabulary,
        embedding_params=0 if config.tie_word_embeddings else vocabulary,
        native_precision=_native_precision(where, config.quantization_config),
        **_feed_forward(where, config, check(HfExperts) if family in MOE else None),
        **_windows(where, config),
        **latent,
    )


def _decoder_of(path: str, document: Any) -> tuple[str, str | None, dict[str, Any]]:
    """(family, key that holds it, fields) of the text decoder: the file over the family's defaults; null is unsaid."""
    if not isinstance(document, dict):
        raise BadInput(path, "holds no JSON object", "need a Hugging Face config.json")
    key = next((key for key in ("text_config", "llm_config") if isinstance(document.get(key), dict)), None)
    inner = document[key] if key else document
    match inner.get("architectures"):
        case [str(name), *_] if name in SUPPORTED:
            pass
        case None | []:  # as in most text parts
            name = next((known for known, (kind, _) in SUPPORTED.items() if kind == inner.get("model_type")), None)
        case _:
            name = None
    if name is None:
        said = f"architectures = {shown(document.get('architectures'))}"
        said += f", {key + '.' if key else ''}model_type = {shown(inner.get('model_type'))}"
        raise BadInput(path, said, f"supported: {', '.join(SUPPORTED)}")
    family, defaults = SUPPORTED[name]
    outer = {field: document.get(field) for field in OUTER}
    fields = defaults | {k: v for part in (outer, inner) for k, v in part.items() if v is not None}
    if family in EXPERT_IS_MLP and "intermediate_size" in fields:
        fields["moe_intermediate_size"] = fields["intermediate_size"]
    return family, key, fields


def _latent_attention(mla: HfLatent, hidden: int, heads: int) -> int:
    """Parameters of one layer: queries (by way of their own latent, if any), compressed and expanded KV, output."""
    query_dim = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    query = mla.q_lora_rank * (hidden + query_dim) if mla.q_lora_rank else hidden * query_dim
    compress = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    expand = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return query + compress + expand + heads * mla.v_head_dim * hidden


def _feed_forward(where: str, config: HfDecoder, moe: HfExperts | None) -> dict[str, int]:
    """Parameters of MLPs and experts: gated, three matrices each, in every supported family."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    if moe is None:
        return dict(dense_params=layers * 3 * hidden * config.intermediate_size)
    if moe.per_token >= moe.n_experts:
        raise BadInput(where, f"num_experts_per_tok = {moe.per_token}", f"need fewer than the {moe.n_experts} experts")
    without = set(moe.mlp_only_layers)
    n_moe = sum(
        i >= moe.first_k_dense_replace
        and i % moe.moe_layer_freq == 0
        and (i + 1) % moe.sparse_step == 0
        and i not in without
        for i in range(layers)
    )
    if not n_moe:
        raise BadInput(where, f"no layer of {layers} has experts", "need one at least in a mixture of experts")
    shared = moe.n_shared_experts * moe.moe_intermediate_size + moe.shared_expert_intermediate_size
    mlp = config.intermediate_size_mlp or config.intermediate_size
    return dict(
        dense_params=hidden * (n_moe * (3 * shared + moe.n_experts) + (layers - n_moe) * 3 * mlp),
        expert_params=n_moe * moe.n_experts * 3 * hidden * moe.moe_intermediate_size,
        n_experts=moe.n_experts,
        experts_per_token=moe.per_token,
    )


def _windows(where: str, config: HfDecoder) -> dict[str, int]:
    """Sliding windows, by the list of layers, by the period of full attention, or after the first layers."""
    layers, kinds = config.num_hidden_layers, config.layer_types
    if kinds is not None and len(kinds) != layers:
        raise BadInput(where, f"layer_types has {len(kinds)} entries", f"need one for each of {layers} layers")
    if config.sliding_window is None or not config.use_sliding_window:
        if kinds and "sliding_attention" in kinds:
            raise BadInput(where, "layer_types has sliding_attention without a sliding window", "need sliding_window")
        return {}
    if kinds is not None:
        windowed = kinds.count("sliding_attention")
    elif config.sliding_window_pattern:
        windowed = layers - layers // config.sliding_window_pattern
    else:
        windowed = max(0, layers - config.max_window_layers)
    return dict(window_tokens=config.sliding_window, windowed_layers=windowed) if windowed else {}


def _native_precision(where: str, quantization: HfQuantization | None) -> str:
    """The checkpoint's precision. 32-bit checkpoints are served in 16 bits."""
    if quantization is None:
        return "bf16"
    method, groups = quantization.quant_method, quantization.config_groups.values()
    formats = {(group.weights.type, group.weights.num_bits) for group in groups} or {("int", quantization.bits)}
    if method in ("fp8", "fbgemm_fp8") or (method == "compressed-tensors" and formats == {("float", 8)}):
        return "fp8"
    if method == "mxfp4":
        return "mxfp4"
    if method in ("gptq", "awq", "compressed-tensors") and formats == {("int", 4)}:
        return "int4"
    bits = " and ".join(f"{kind} {bits}" for kind, bits in formats if bits)
    raise BadInput(
        where,
        f"quantization_config.quant_method = {shown(method)}" + (f" ({bits} bits)" if bits else ""),
        "need fp8, fbgemm_fp8, mxfp4, or gptq, awq, compressed-tensors of 4-bit integers or 8-bit floats",
    )
