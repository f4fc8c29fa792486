"""Hugging Face `config.json` files of decoders, read as data: nothing is downloaded or executed.

A decoder is what its fields describe: grouped-query or latent attention, windows, shared and routed experts, linear
attention and state spaces. The class of the model decides only what its file leaves unsaid (`hf_families`). Norms,
biases, draft (MTP) layers and the encoders of multimodal models are left out; chunked attention counts as full.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import PurePath
from typing import Any, TypeVar

from pydantic import ValidationError

from fleetopt_jax.catalog.architecture import Architecture, LinearLayers, StateLayers, Widths
from fleetopt_jax.catalog.hf_families import (
    DEFAULTS,
    DRAFT_HAS_EMBEDDINGS,
    EVEN,
    EXPERT_IS_MLP,
    FOUR_TIMES,
    GATED,
    HALF_SAID,
    LIGHTNING,
    NESTED,
    ONE_KV_HEAD,
    SQUARED,
    SWISH,
    UNGATED,
    UNKNOWN_FAMILIES,
    UNKNOWN_FIELDS,
    family_of,
)
from fleetopt_jax.catalog.hf_fields import HfConfig as HfConfig
from fleetopt_jax.catalog.hf_fields import (
    HfDecoder,
    HfDelta,
    HfExperts,
    HfLatent,
    HfLinear,
    HfQuantization,
    HfQuantized,
    HfStates,
    Part,
)
from fleetopt_jax.catalog.hf_layers import CACHELESS, Decoder, Heads, Kind, Mixer, drafts, matrices
from fleetopt_jax.catalog.hf_quantization import Quantization, held, matrix_bytes, quantization_of
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import invalid, parse_json, read_bytes, shown

TEXT = ("text_config", "llm_config", "language_config", "thinker_config")  # where multimodal models keep their decoder
OUTER = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")  # said beside it, not in it
DECODERS = re.compile(r"(CausalLM|ConditionalGeneration|LMHeadModel|ChatGLMModel|ChatModel|LMModel)$")
STATES = ("hybrid_override_pattern", "mamba_d_state", "ssm_state_size", "attn_layer_period", "attn_layer_indices")
DRAFTS = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers", "mtp_num_layers")
MAX_DRAFTS = 100
ENCODERS = ("vision_config", "visual", "audio_config", "vision_tower", "speech_config")
MIXERS: dict[str, Mixer] = {  # of layer_types and layers_block_type
    "full_attention": "full",
    "attention": "full",
    "chunked_attention": "full",
    "sliding_attention": "window",
    "linear_attention": "gated delta",
    "mamba": "state space",
    "mamba2": "state space",
    "mlp": "none",
    "moe": "none",
}
ALONE: dict[str, Kind] = {"mlp": "dense", "moe": "experts"}  # layers that are nothing else
PATTERN: dict[str, tuple[Mixer, Kind]] = {  # of hybrid_override_pattern
    "M": ("state space", "none"),
    "*": ("full", "none"),
    "-": ("none", "dense"),
    "E": ("none", "experts"),
}
NAMED = re.compile(  # a quantized checkpoint's name
    r"(?i)(?:^|[-_.])((?:nv|mx)?fp4|fp8|int[48]|w[48]a(?:4|8|16)|awq|gptq|bnb|[48]-?bit|gguf)(?:$|[-_.])"
)


@dataclass(frozen=True)
class HfModel:
    """What a `config.json` says, and how it was understood."""

    architecture: Architecture
    family: str  # by its structure
    model_type: str | None  # as the file calls it
    max_position_tokens: int | None
    quantized_from: str | None  # where its quantization is said
    quantized: tuple[tuple[str, float], ...]  # of each part's weights, the share that is [-]
    left_out: tuple[str, ...]
    draft_bytes: float  # of draft layers, in the checkpoint beside the rest [B]
    warnings: tuple[str, ...]


Checked = TypeVar("Checked", bound=Part)


@dataclass(frozen=True)
class _File:
    """The text decoder of a file: its fields over its family's defaults; null is unsaid."""

    where: str
    data: bytes
    key: str | None  # that holds it
    family: str
    model_type: str | None
    fields: dict[str, Any]
    document: dict[str, Any]

    def check(self, part: type[Checked], under: str | None = None) -> Checked:
        """A part of the fields, or the refusal of the first that is wrong."""
        try:
            return part.model_validate(self.fields[under] if under else self.fields)
        except ValidationError as error:
            path = tuple(key for key in (self.key, under) if key)
            raise invalid(self.where, self.data, error, under=path) from None

    def refuse(self, problem: str, allowed: str = "") -> BadInput:
        return BadInput(self.where, problem, allowed)


def read_config(path: str) -> HfModel:
    """What a Hugging Face `config.json` describes, or `BadInput` naming the first field that is wrong.

    An `hf_quant_config.json` beside it is read as well, where the file itself names no quantization.
    """
    beside = _beside(path)
    return parse_config(path, read_bytes(path), (beside, read_bytes(beside)) if beside else None)


@lru_cache(maxsize=32)  # a search asks for its LLM again and again
def parse_config(where: str, data: bytes, beside: tuple[str, bytes] | None = None) -> HfModel:
    """What the bytes of a `config.json` describe; `beside` are the name and bytes of its `hf_quant_config.json`."""
    file = _decoder_of(where, data, parse_json(where, data, only_read=True))
    decoder = _structure(file)
    quantization = _quantization(file, beside)
    parts = list(matrices(decoder))
    params = {
        part: sum(m.params for m in parts if m.part == part) for part in ("attention", "dense", "expert", "lm_head")
    }
    architecture = _architecture(file, decoder, params)
    warnings, shares = list(_warnings(where, file, quantization)), {}
    if quantization is not None:
        precision, how, shares = held(quantization, parts, architecture.expert_share)
        if not any(shares.values()):
            warnings.append(f"{quantization.said} takes no module of it: all weights in 16 bits")
        native = dict(native_precision=precision, held=how, native_kv_precision=quantization.kv_precision)
        architecture = Architecture(**{**vars(architecture), **native})
    return HfModel(
        architecture=architecture,
        family=_family(architecture, decoder),
        model_type=file.model_type,
        max_position_tokens=decoder.fields.max_position_embeddings,
        quantized_from=quantization.said if quantization else None,
        quantized=tuple(shares.items()),
        left_out=tuple(_left_out(file)),
        draft_bytes=_draft_bytes(file, decoder, quantization),
        warnings=tuple(warnings),
    )


# ------------------------------------------------------------------------------------------------------ which decoder


def _decoder_of(where: str, data: bytes, document: Any) -> _File:
    if not isinstance(document, dict):
        raise BadInput(where, "holds no JSON object", "need a Hugging Face config.json")
    inner, keys, outer = document, [], {}
    while key := next((key for key in TEXT if isinstance(inner.get(key), dict)), None):
        outer |= {field: inner.get(field) for field in OUTER if inner.get(field) is not None}
        inner, keys = inner[key], [*keys, key]
    place = f"{where}, {'.'.join(keys)}" if keys else where
    classes, model_type = inner.get("architectures"), inner.get("model_type")
    name = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else None
    said = f"architectures = {shown(classes)}, model_type = {shown(model_type)}"
    if classes not in (None, []) and name is None:
        raise BadInput(place, said, "need the name of a class, in a list")
    family = family_of(model_type if isinstance(model_type, str) and model_type else name or "")
    for known in (family, family_of(name or "")):
        if known in UNKNOWN_FAMILIES:
            raise BadInput(place, said, f"need a decoder with attention; this has {UNKNOWN_FAMILIES[known]}")
    if name is not None and not keys and not DECODERS.search(name):
        raise BadInput(place, said, "need a decoder, ...ForCausalLM or ...ForConditionalGeneration")
    fields = dict(DEFAULTS.get(family, {}))
    for part in (outer, inner, *(inner[each] for each in NESTED if isinstance(inner.get(each), dict))):
        fields |= {
            field: _even(value) if field in EVEN else value for field, value in part.items() if value is not None
        }
    for field, meaning in UNKNOWN_FIELDS.items():
        if fields.get(field) not in (None, False, 0, [], {}):
            raise BadInput(place, f"{field} = {shown(fields[field])}", f"{meaning}: no such structure is known yet")
    key = keys[0] if len(keys) == 1 else None
    return _File(place, data, key, family, model_type if isinstance(model_type, str) else None, fields, document)


def _even(value: Any) -> Any:
    """One number for every layer, where a list says the same one each time."""
    if type(value) is list and value and all(type(each) is int and each == value[0] for each in value):
        return value[0]
    return value


# ---------------------------------------------------------------------------------------------------------- structure


def _structure(file: _File) -> Decoder:
    """What the fields describe, or the refusal of the one that does not go with the others."""
    fields, said = file.check(HfDecoder), file.fields
    latent = file.check(HfLatent) if "kv_lora_rank" in said or "qk_nope_head_dim" in said else None
    experts = file.check(HfExperts) if _has_experts(said) else None
    delta = file.check(HfDelta, "linear_attn_config") if isinstance(said.get("linear_attn_config"), dict) else None
    linear = file.check(HfLinear)
    states = file.check(HfStates) if any(field in said for field in STATES) else None
    heads = _heads(file, fields, latent)
    full = heads
    if fields.global_head_dim or fields.num_global_key_value_heads:
        kv = fields.num_global_key_value_heads or heads.kv
        full = Heads(heads.q, kv, fields.global_head_dim or heads.dim, not fields.attention_k_eq_v)
    mixers, kinds = _kinds(file, fields, experts, linear, delta, states)
    shared, mlp, expert = _widths(file, fields, experts, kinds)
    return Decoder(
        fields=fields,
        mixers=mixers,
        kinds=kinds,
        heads=heads,
        full_heads=full,
        gated=_gated(file, fields),
        mlp_width=mlp,
        shared_width=shared,
        expert_width=expert,
        latent=latent,
        experts=experts,
        linear=linear,
        delta=delta,
        states=states,
    )


def _has_experts(said: dict[str, Any]) -> bool:
    """Whether there are routed experts: two at least, or a number that `HfExperts` refuses."""

    def names(field: str) -> list[str]:
        return [str(name) for name in getattr(HfExperts.model_fields[field].validation_alias, "choices", [field])]

    counts = [said[name] for name in names("n_experts") if name in said]
    sent = [said[name] for name in names("per_token") if name in said]
    if counts and counts[0] in (0, 1) and (not sent or sent[0] in (0, 1)):
        return False
    return bool(counts or sent or "moe_intermediate_size" in said)


def _heads(file: _File, fields: HfDecoder, latent: HfLatent | None) -> Heads:
    q, hidden = fields.num_attention_heads, fields.hidden_size
    kv = fields.num_key_value_heads or q
    if (
        file.family in ONE_KV_HEAD
        and file.fields.get("multi_query")
        and not file.fields.get("new_decoder_architecture")
    ):
        kv = 1
    if latent is not None:
        return Heads(q, 1, latent.kv_lora_rank + latent.qk_rope_head_dim)
    if fields.head_dim is None and hidden % q:
        raise file.refuse(f"hidden_size = {hidden}", f"need head_dim, or a multiple of {q} heads")
    if q % kv:
        raise file.refuse(f"num_key_value_heads = {kv}", f"need a divisor of {q} heads")
    dim = fields.head_dim or hidden // q
    if file.fields.get("v_head_dim") not in (None, dim):
        raise file.refuse(
            f"v_head_dim = {shown(file.fields['v_head_dim'])}", f"need head_dim = {dim}: no other is known"
        )
    return Heads(q, kv, dim)


def _kinds(
    file: _File,
    fields: HfDecoder,
    experts: HfExperts | None,
    linear: HfLinear,
    delta: HfDelta | None,
    states: HfStates | None,
) -> tuple[tuple[Mixer, ...], tuple[Kind, ...]]:
    """Of each layer, what mixes its tokens and what follows."""
    layers = fields.num_hidden_layers
    if states is not None and states.hybrid_override_pattern is not None:
        pattern = states.hybrid_override_pattern
        if len(pattern) != layers or not set(pattern) <= set(PATTERN):
            allowed = f"need one of {' '.join(PATTERN)} for each of {layers} layers"
            raise file.refuse(f"hybrid_override_pattern = {shown(pattern)}", allowed)
        both = [PATTERN[sign] for sign in pattern]
        return tuple(mixer for mixer, _ in both), tuple(kind for _, kind in both)
    mixers = _mixers(file, fields, linear, delta, states)
    if "none" in mixers and fields.layer_types:  # layers that are only an MLP, or only a mixer
        alone: list[Kind] = [ALONE.get(kind, "none") for kind in fields.layer_types]
        return mixers, tuple(alone)
    if fields.enable_moe_block and experts is not None:
        both_in_each: list[Kind] = ["both"] * layers
        return mixers, tuple(both_in_each)
    with_experts = _layers_with_experts(file, experts, layers) if experts is not None else set()
    kinds: list[Kind] = ["experts" if layer in with_experts else "dense" for layer in range(layers)]
    return mixers, tuple(kinds)


def _mixers(
    file: _File, fields: HfDecoder, linear: HfLinear, delta: HfDelta | None, states: HfStates | None
) -> tuple[Mixer, ...]:
    """By the list of layers; else by the period or list of full attention among others; else by the windows."""
    if fields.layer_types is not None:
        mixers = _listed(file, fields, fields.layer_types)
    else:
        others, full = _others(fields.num_hidden_layers, linear, delta, states)
        mixers = _windows(file, fields) if full is None else _among(fields.num_hidden_layers, full, others)
    _need_parts(file, set(mixers), linear, states)
    return mixers


def _listed(file: _File, fields: HfDecoder, listed: list[str]) -> tuple[Mixer, ...]:
    layers = fields.num_hidden_layers
    if len(listed) != layers:
        raise file.refuse(f"layer_types has {len(listed)} entries", f"need one for each of {layers} layers")
    known: dict[str, Mixer] = dict(MIXERS)
    if file.family in LIGHTNING:
        known["linear_attention"] = "lightning"
    for kind in listed:
        if kind not in known:
            raise file.refuse(f"layer_types has {shown(kind)}", f"known: {', '.join(known)}")
    if "sliding_attention" in listed and (fields.sliding_window is None or not fields.use_sliding_window):
        raise file.refuse("layer_types has sliding_attention without a sliding window", "need sliding_window")
    return tuple(known[kind] for kind in listed)


def _others(
    layers: int, linear: HfLinear, delta: HfDelta | None, states: HfStates | None
) -> tuple[Mixer, set[int] | None]:
    """What layers without attention have, and which have it; None where all do."""
    if delta is not None:
        return "delta", {layer - 1 for layer in delta.full_attn_layers}
    if linear.attn_type_list is not None:
        return "lightning", {layer for layer, kind in enumerate(linear.attn_type_list) if kind == 1}
    if linear.full_attention_interval and linear.linear_num_value_heads:
        return "gated delta", {i for i in range(layers) if (i + 1) % linear.full_attention_interval == 0}
    if states is not None and states.attn_layer_period:
        return "state space", {i for i in range(layers) if i % states.attn_layer_period == states.attn_layer_offset}
    if states is not None and states.attn_layer_indices is not None:
        return "state space", set(states.attn_layer_indices)
    return "full", None


def _among(layers: int, full: set[int], others: Mixer) -> tuple[Mixer, ...]:
    mixers: list[Mixer] = ["full" if layer in full else others for layer in range(layers)]
    return tuple(mixers)


def _need_parts(file: _File, mixers: set[Mixer], linear: HfLinear, states: HfStates | None) -> None:
    """Refuse layers whose sizes are not said."""
    if "gated delta" in mixers:
        for name in ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads"):
            if getattr(linear, f"linear_{name}") is None:
                raise file.refuse(f"linear_{name}: field required", "need it for layers of linear attention")
    if "state space" in mixers and states is None:
        raise file.refuse("mamba_d_state: field required", "need it for layers with a state space")
    if not mixers & {"full", "window"}:
        raise file.refuse("no layer has attention", "need one at least")


def _windows(file: _File, fields: HfDecoder) -> tuple[Mixer, ...]:
    """Sliding windows, by the pattern or period of full attention, or after the first layers."""
    layers, pattern = fields.num_hidden_layers, fields.sliding_window_pattern
    if fields.sliding_window is None or not fields.use_sliding_window:
        return ("full",) * layers
    if isinstance(pattern, str):  # LLLG: local, local, local, global
        if not pattern or not set(pattern.upper()) <= {"L", "G"}:
            raise file.refuse(f"sliding_window_pattern = {shown(pattern)}", "need a number, or letters L and G")
        return tuple("full" if pattern[i % len(pattern)] in "Gg" else "window" for i in range(layers))
    if pattern:
        return tuple("full" if (i + 1) % pattern == 0 else "window" for i in range(layers))
    return tuple("full" if i < fields.max_window_layers else "window" for i in range(layers))


def _layers_with_experts(file: _File, moe: HfExperts, layers: int) -> set[int]:
    if moe.per_token >= moe.n_experts:
        raise file.refuse(f"num_experts_per_tok = {moe.per_token}", f"need fewer than the {moe.n_experts} experts")
    if moe.expert_layer_period:
        return {i for i in range(layers) if i % moe.expert_layer_period == moe.expert_layer_offset}
    every, without = moe.moe_layer_freq, set(moe.mlp_only_layers)
    last = moe.moe_layer_end_index if (moe.moe_layer_end_index or 0) > 0 else layers
    if isinstance(every, list) and len(every) != layers:
        raise file.refuse(f"moe_layer_freq has {len(every)} entries", f"need one for each of {layers} layers")
    found = {
        i
        for i in range(layers)
        if moe.first_k_dense_replace <= i <= (last or 0)
        and (every[i] == 1 if isinstance(every, list) else i % every == 0)
        and (i + 1) % moe.sparse_step == 0
        and i not in without
    }
    if not found:
        raise file.refuse(f"no layer of {layers} has experts", "need one at least in a mixture of experts")
    return found


def _widths(file: _File, fields: HfDecoder, moe: HfExperts | None, kinds: tuple[Kind, ...]) -> tuple[int, int, int]:
    """Of shared experts together, of the MLP and of one routed expert."""
    four = 4 * fields.hidden_size if file.family in FOUR_TIMES else None
    said = fields.intermediate_size or four
    mlp = fields.intermediate_size_mlp or said
    only_shared = file.fields.get("shared_intermediate_size")  # Granite 4: the MLP of a layer, with experts or not
    if moe is None and isinstance(only_shared, int) and not isinstance(only_shared, bool) and only_shared > 0:
        mlp = only_shared
    if ("dense" in kinds or "both" in kinds) and mlp is None:
        raise file.refuse("intermediate_size: field required", "need the width of the MLP")
    if file.family in HALF_SAID and mlp is not None:
        mlp //= 2
    if moe is None:
        return 0, mlp or 0, 0
    ambiguous = "dense" in kinds and fields.intermediate_size_mlp is None and file.family not in EXPERT_IS_MLP
    width = moe.moe_intermediate_size or (None if ambiguous else said)
    if width is None:
        raise file.refuse("moe_intermediate_size: field required", "need the width of an expert")
    shared = (moe.shared_expert_intermediate_size or width) * moe.n_shared_experts
    return shared or moe.shared_expert_intermediate_size, mlp or 0, width


def _gated(file: _File, fields: HfDecoder) -> bool:
    """Whether MLPs have a gate: by the activation, or by what is known of the family."""
    activation = (fields.hidden_act or "").lower()
    if file.family in UNGATED or activation in SQUARED:
        return False
    if file.family in GATED or activation in SWISH or not activation or file.family in DEFAULTS:
        return True
    raise file.refuse(f"hidden_act = {shown(activation)}", "a gated MLP has silu; of others the family must be known")


# ------------------------------------------------------------------------------------------------- what is made of it


def _architecture(file: _File, decoder: Decoder, params: dict[str, int]) -> Architecture:
    fields, moe, mla = decoder.fields, decoder.experts, decoder.latent
    vocabulary = fields.vocab_size * fields.hidden_size
    windowed = decoder.mixers.count("window")
    return Architecture(
        layers=fields.num_hidden_layers,
        hidden=fields.hidden_size,
        q_heads=decoder.heads.q,
        kv_heads=decoder.heads.kv,
        head_dim=decoder.heads.dim,
        attention_params=params["attention"],
        dense_params=params["dense"],
        lm_head_params=params["lm_head"],
        embedding_params=0 if fields.tie_word_embeddings else vocabulary,
        expert_params=params["expert"],
        n_experts=moe.n_experts if moe else 0,
        experts_per_token=moe.per_token if moe else 0,
        expert_width=decoder.expert_width,
        latent_dim=mla.kv_lora_rank if mla else 0,
        rope_dim=mla.qk_rope_head_dim if mla else 0,
        window_tokens=(fields.sliding_window or 0) if windowed else 0,
        windowed_layers=windowed,
        cacheless_layers=fields.num_hidden_layers - windowed - decoder.mixers.count("full"),
        kv_values=_kv_values(decoder),
        no_law=_no_law(decoder),
        said_widths=_matrix_widths(decoder),
    )


def _matrix_widths(decoder: Decoder) -> Widths:
    """The shapes of the matrices of its layers."""
    kinds, mla, linear, states = decoder.kinds, decoder.latent, decoder.linear, decoder.states
    return Widths(
        mlp=decoder.mlp_width if {"dense", "both"} & set(kinds) else 0,
        shared=decoder.shared_width,
        gated=decoder.gated,
        mlp_layers=kinds.count("dense") + kinds.count("both"),
        expert_layers=kinds.count("experts") + kinds.count("both"),
        query_rank=(mla.q_lora_rank or 0) if mla else 0,
        nope_dim=mla.qk_nope_head_dim if mla else 0,
        value_dim=mla.v_head_dim if mla else 0,
        query_gate=decoder.fields.attn_output_gate,
        linear=_linear_layers(linear) if linear is not None and "gated delta" in decoder.mixers else None,
        states=_state_layers(states, decoder.fields.hidden_size)
        if states is not None and "state space" in decoder.mixers
        else None,
    )


def _linear_layers(linear: HfLinear) -> LinearLayers:
    return LinearLayers(
        key_heads=linear.linear_num_key_heads or 0,
        value_heads=linear.linear_num_value_heads or 0,
        key_dim=linear.linear_key_head_dim or 0,
        value_dim=linear.linear_value_head_dim or 0,
    )


def _state_layers(states: HfStates, hidden: int) -> StateLayers:
    of_heads = (states.heads or 0) * (states.state_head_dim or 0)
    return StateLayers(
        channels=of_heads or states.expand * hidden,
        states=states.state_size,
        heads=states.heads or 0,
        groups=states.n_groups,
    )


def _kv_values(decoder: Decoder) -> int:
    """Values of one token over all layers, where layers differ in their heads; else 0."""
    if decoder.full_heads == decoder.heads:
        return 0
    of = {
        "full": 2 * decoder.full_heads.kv * decoder.full_heads.dim,
        "window": 2 * decoder.heads.kv * decoder.heads.dim,
    }
    return sum(of.get(mixer, 0) for mixer in decoder.mixers)


def _no_law(decoder: Decoder) -> str:
    """Why no engine can be built of it, in one line; empty where one can."""
    layers, mla = len(decoder.mixers), decoder.latent
    if n := sum(mixer in ("delta", "lightning") for mixer in decoder.mixers):
        return f"{n} of {layers} layers are linear attention, whose state and steps no law describes yet"
    if mla is not None and mla.index_n_heads:
        return "attention picks its tokens by a sparse index (index_topk), which no law describes yet"
    if decoder.full_heads != decoder.heads:
        return "layers with a window have other heads than those without, which no law describes yet"
    if any(mixer == "none" for mixer in decoder.mixers):
        return "some layers are only attention or only an MLP, which no law describes yet"
    return ""


def _family(a: Architecture, decoder: Decoder) -> str:
    """The structure in words."""
    words = [a.family]
    if decoder.latent is not None and decoder.latent.index_n_heads:
        words.append("sparse index")
    others = dict.fromkeys(mixer for mixer in decoder.mixers if mixer in CACHELESS)
    words += [f"{mixer} in {decoder.mixers.count(mixer)} of {a.layers} layers" for mixer in others]
    return ", ".join(words)


def _draft_bytes(file: _File, decoder: Decoder, quantization: Quantization | None) -> float:
    n = file.fields.get("num_nextn_predict_layers")
    if not isinstance(n, int) or not 0 < n <= MAX_DRAFTS:
        return 0.0
    layers = drafts(decoder, n, file.family in DRAFT_HAS_EMBEDDINGS)
    return sum(matrix_bytes(quantization, matrix) for matrix in layers)


def _left_out(file: _File) -> Iterator[str]:
    for field in DRAFTS:
        n = file.fields.get(field)
        if isinstance(n, int) and n > 0:
            yield f"draft (MTP) layers ({field} = {n})"
            break
    for field in ENCODERS:
        if file.document.get(field) not in (None, {}, False):
            yield f"the encoder ({field})"
    if file.fields.get("attention_chunk_size") and any("chunk" in str(k) for k in file.fields):
        yield "chunks of attention (attention_chunk_size), counted as full attention"
    if file.fields.get("dtype", file.fields.get("torch_dtype")) == "float32":
        yield "32 bits: weights are counted in 16, as engines load them"


# -------------------------------------------------------------------------------------------------------- quantization


def _quantization(file: _File, beside: tuple[str, bytes] | None) -> Quantization | None:
    """The checkpoint's, from the file or from the one beside it."""
    said = file.fields.get("quantization_config", file.fields.get("compression_config"))
    if said is None:
        return _quantization_beside(*beside) if beside else None
    if isinstance(said, dict):  # modelopt nests it at times
        said = said | {key: value for key, value in _dict(said.get("quantization")).items() if value is not None}
    found = replace(file, fields={"quantization_config": said}).check(HfQuantized).quantization_config
    method, algorithm = found.quant_method or "modelopt", f" {found.quant_algo}" if found.quant_algo else ""
    return quantization_of(file.where, found, f"quantization_config: {method}{algorithm}")


def _quantization_beside(where: str, data: bytes) -> Quantization | None:
    """What an `hf_quant_config.json` says (modelopt)."""
    document = parse_json(where, data, only_read=True)
    said = _dict(_dict(document).get("quantization"))
    if said.get("quant_algo") is None and said.get("quantized_layers") is None:
        return None
    fields = {"quantization": said | {"quant_method": "modelopt"}}
    found = _File(where, data, None, "", None, fields, {}).check(HfQuantization, "quantization")
    return quantization_of(where, found, f"{os.path.basename(where)}: {found.quant_algo or 'mixed'}")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _beside(path: str) -> str | None:
    """`hf_quant_config.json` beside `config.json`, `NAME_hf_quant_config.json` beside `NAME_config.json`."""
    if not path.endswith("config.json"):
        return None
    beside = path.removesuffix("config.json") + "hf_quant_config.json"
    try:
        return beside if os.path.isfile(beside) else None
    except ValueError:
        return None


def _warnings(where: str, file: _File, quantization: Quantization | None) -> Iterator[str]:
    if quantization is not None:
        yield from quantization.warnings
        return
    name = file.document.get("_name_or_path")
    places = [*PurePath(os.path.abspath(where)).parts[-4:], *(PurePath(name).parts if isinstance(name, str) else ())]
    for place in places:
        if found := NAMED.search(re.sub(r"(?i)(_?hf_quant)?_?config\.json$|\.json$", "", place)):
            yield (
                f"{shown(place)} says {found[1]}, but no quantization is in the file or in an hf_quant_config.json "
                "beside it: weights are counted in 16 bits; say --precision"
            )
            return
