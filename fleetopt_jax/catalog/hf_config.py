"""Hugging Face `config.json` files of decoder-only LLMs, read as data: nothing is downloaded or executed.

Parameters are those of the matrices. Norms, biases and gates of shared experts (together below 0.1 %), draft (MTP)
layers and the encoders of multimodal models are left out. Llama 4's chunked attention counts as full attention.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.workload.readers import first_problem, parse_json, read_bytes


@dataclass(frozen=True)
class Architecture:
    """One LLM as its configuration describes it, whatever the precision. A dense model has no experts."""

    layers: int
    hidden: int
    q_heads: int
    kv_heads: int  # 1 for a latent (MLA) cache: it is on every GPU whole
    head_dim: int  # latent + rotary for MLA
    attention_params: int
    dense_params: int  # MLP, shared experts and routers
    lm_head_params: int
    embedding_params: int = 0  # of the input, where it is not the output layer
    expert_params: int = 0  # all routed experts
    n_experts: int = 0  # per layer that has them
    experts_per_token: int = 0
    latent_dim: int = 0  # of MLA's compressed cache
    rope_dim: int = 0  # its rotary part
    window_tokens: int = 0  # length of the sliding window
    windowed_layers: int = 0  # layers that have it
    native_precision: str = "bf16"  # of the checkpoint's weights


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


class _Part(BaseModel):
    """Fields we do not read may be there; numbers must be JSON integers."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _Weights(_Part):
    type: Literal["float", "int"]
    num_bits: int


class _Group(_Part):
    weights: _Weights


class _Quantization(_Part):
    quant_method: str
    bits: int | None = Field(None, validation_alias=AliasChoices("bits", "w_bit"))
    config_groups: dict[str, _Group] = {}


class _Decoder(_Part):
    num_hidden_layers: Few
    hidden_size: Many
    intermediate_size: Many
    intermediate_size_mlp: Many | None = None  # of Llama 4's dense layers
    vocab_size: Many
    num_attention_heads: Few
    num_key_value_heads: Few | None = None
    head_dim: Few | None = None
    tie_word_embeddings: bool = False
    use_sliding_window: bool = True
    sliding_window: Annotated[int, Field(ge=1, le=10**9)] | None = None
    sliding_window_pattern: Few | None = Field(
        None, validation_alias=AliasChoices("_sliding_window_pattern", "sliding_window_pattern")
    )
    max_window_layers: FewOrNone = 0  # Qwen: the first layers without a window
    layer_types: list[Literal["full_attention", "sliding_attention", "chunked_attention"]] | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", validation_alias=AliasChoices("dtype", "torch_dtype")
    )
    quantization_config: _Quantization | None = None


class _Latent(_Part):
    q_lora_rank: Many | None = None
    kv_lora_rank: Many
    qk_rope_head_dim: Few
    qk_nope_head_dim: Few
    v_head_dim: Few


class _Experts(_Part):
    n_experts: Few = Field(
        validation_alias=AliasChoices("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    )
    per_token: Few = Field(validation_alias=AliasChoices("num_experts_per_tok", "moe_top_k", "experts_per_token"))
    moe_intermediate_size: Many
    n_shared_experts: FewOrNone = 0
    shared_expert_intermediate_size: ManyOrNone = 0
    first_k_dense_replace: FewOrNone = 0
    moe_layer_freq: Few = 1
    sparse_step: Few = Field(1, validation_alias=AliasChoices("decoder_sparse_step", "interleave_moe_layer_step"))
    mlp_only_layers: list[FewOrNone] = []


Checked = TypeVar("Checked", bound=_Part)


def read_config(path: str) -> Architecture:
    """The architecture in a Hugging Face `config.json`, or `BadInput` naming the first field that is wrong."""
    family, where, document = _decoder_of(path, parse_json(path, read_bytes(path)))
    config = _check(_Decoder, where, document)
    layers, hidden, q_heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    if family in LATENT:
        mla = _check(_Latent, where, document)
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
        **_feed_forward(where, config, _check(_Experts, where, document) if family in MOE else None),
        **_windows(where, config),
        **latent,
    )


def _decoder_of(path: str, document: Any) -> tuple[str, str, dict[str, Any]]:
    """(family, place, fields) of the text decoder: what the file says over the family's defaults; null says nothing."""
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
        said = f"architectures = {str(document.get('architectures'))[:60]}"
        said += f", {key + '.' if key else ''}model_type = {str(inner.get('model_type'))[:40]}"
        raise BadInput(path, said, f"supported: {', '.join(SUPPORTED)}")
    family, defaults = SUPPORTED[name]
    outer = {field: document.get(field) for field in OUTER}
    fields = defaults | {k: v for part in (outer, inner) for k, v in part.items() if v is not None}
    if family in EXPERT_IS_MLP and "intermediate_size" in fields:
        fields["moe_intermediate_size"] = fields["intermediate_size"]
    return family, f"{path}, {key}" if key else path, fields


def _check(part: type[Checked], where: str, document: dict[str, Any]) -> Checked:
    try:
        return part.model_validate(document)
    except ValidationError as error:
        raise BadInput(where, first_problem(error)) from None


def _latent_attention(mla: _Latent, hidden: int, heads: int) -> int:
    """Parameters of one layer: queries (by way of their own latent, if any), compressed and expanded KV, output."""
    query_dim = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    query = mla.q_lora_rank * (hidden + query_dim) if mla.q_lora_rank else hidden * query_dim
    compress = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    expand = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return query + compress + expand + heads * mla.v_head_dim * hidden


def _feed_forward(where: str, config: _Decoder, moe: _Experts | None) -> dict[str, int]:
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


def _windows(where: str, config: _Decoder) -> dict[str, int]:
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


def _native_precision(where: str, quantization: _Quantization | None) -> str:
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
        f"quantization_config.quant_method = {method[:40]}" + (f" ({bits} bits)" if bits else ""),
        "need fp8, fbgemm_fp8, mxfp4, or gptq, awq, compressed-tensors of 4-bit integers or 8-bit floats",
    )
