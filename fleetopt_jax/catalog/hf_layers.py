"""The matrices of a decoder, layer by layer: what quantization picks from, and what parameters are counted by.

Norms, biases, gates of shared experts and convolutions are left out (together below 0.1 % of the parameters, 0.3 % of
a state-space layer's).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fleetopt_jax.catalog.hf_fields import HfDecoder, HfDelta, HfExperts, HfLatent, HfLinear, HfStates

Mixer = Literal["full", "window", "gated delta", "delta", "lightning", "state space", "none"]
CACHELESS = ("gated delta", "delta", "lightning", "state space")  # they keep a state of one size
Kind = Literal["dense", "experts", "both", "none"]
PartName = Literal["attention", "dense", "expert", "lm_head"]


class Matrix(NamedTuple):
    """`copies` matrices alike, under the name checkpoints have for the first of them."""

    part: PartName
    module: str
    rows: int  # outputs
    cols: int  # inputs
    copies: int = 1
    linear: bool = True  # False of routers and states: never quantized

    @property
    def params(self) -> int:
        return self.rows * self.cols * self.copies


@dataclass(frozen=True)
class Heads:
    """Of one kind of attention."""

    q: int
    kv: int
    dim: int
    own_values: bool = True


@dataclass(frozen=True)
class Decoder:
    """What a file says, checked; None where a decoder has no such part."""

    fields: HfDecoder
    mixers: tuple[Mixer, ...]  # of each layer
    kinds: tuple[Kind, ...]  # of each layer's MLP
    heads: Heads
    full_heads: Heads  # of layers with full attention, where they differ
    gated: bool  # whether an MLP has three matrices
    mlp_width: int = 0
    shared_width: int = 0
    expert_width: int = 0
    latent: HfLatent | None = None
    experts: HfExperts | None = None
    linear: HfLinear | None = None
    delta: HfDelta | None = None
    states: HfStates | None = None


def matrices(decoder: Decoder) -> Iterator[Matrix]:
    """Of every layer, then the output layer; the input embedding is no matrix product."""
    for layer, (mixer, kind) in enumerate(zip(decoder.mixers, decoder.kinds)):
        prefix = f"layers.{layer}"
        yield from _mixer(decoder, mixer, f"{prefix}.self_attn")
        yield from _feed_forward(decoder, kind, f"{prefix}.mlp")
    yield Matrix("lm_head", "lm_head", decoder.fields.vocab_size, decoder.fields.hidden_size)


def drafts(decoder: Decoder, n_layers: int, own_embeddings: bool) -> Iterator[Matrix]:
    """Of draft (MTP) layers as DeepSeek adds them: each as the last layer, a matrix that takes two inputs, and, in
    some checkpoints, an embedding and an output layer of its own."""
    hidden, vocabulary, first = decoder.fields.hidden_size, decoder.fields.vocab_size, len(decoder.mixers)
    for layer in range(first, first + n_layers):
        prefix = f"layers.{layer}"
        yield from _mixer(decoder, decoder.mixers[-1], f"{prefix}.self_attn")
        yield from _feed_forward(decoder, decoder.kinds[-1], f"{prefix}.mlp")
        yield Matrix("dense", f"{prefix}.eh_proj", hidden, 2 * hidden, linear=False)
        if own_embeddings:
            yield Matrix("lm_head", f"{prefix}.embed_tokens", vocabulary, hidden, copies=2, linear=False)


def _mixer(decoder: Decoder, mixer: Mixer, at: str) -> Iterator[Matrix]:
    hidden = decoder.fields.hidden_size
    if mixer == "none":
        return
    if mixer in ("full", "window") and decoder.latent is not None:
        shapes = _latent(decoder.latent, hidden, decoder.heads.q)
    elif mixer in ("full", "window"):
        heads = decoder.heads if mixer == "window" else decoder.full_heads
        shapes = _grouped(heads, hidden, decoder.fields.attn_output_gate)
    elif mixer == "gated delta" and decoder.linear is not None:
        shapes = _gated_delta(decoder.linear, hidden)
    elif mixer == "delta" and decoder.delta is not None:
        shapes = _delta(decoder.delta, hidden)
    elif mixer == "lightning":
        width = decoder.heads.q * decoder.heads.dim
        shapes = {"qkv_proj": (3 * width, hidden), "output_gate": (width, hidden), "out_proj": (hidden, width)}
    else:
        assert decoder.states is not None, mixer
        shapes = _state_space(decoder.states, hidden)
    for name, (rows, cols) in shapes.items():
        yield Matrix("attention", f"{at}.{name}", rows, cols, linear=name != "A_log")


def _grouped(heads: Heads, hidden: int, gated: bool) -> dict[str, tuple[int, int]]:
    """Grouped-query attention; a gate comes out of the queries' matrix."""
    query, shared = heads.q * heads.dim, heads.kv * heads.dim
    values = {"v_proj": (shared, hidden)} if heads.own_values else {}
    return {
        "q_proj": ((1 + gated) * query, hidden),
        "k_proj": (shared, hidden),
        **values,
        "o_proj": (hidden, query),
    }


def _latent(mla: HfLatent, hidden: int, heads: int) -> dict[str, tuple[int, int]]:
    """Queries (by way of their own latent, if any), compressed and expanded KV, output, the index if any."""
    query = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    rank = mla.q_lora_rank
    queries = {"q_a_proj": (rank, hidden), "q_b_proj": (query, rank)} if rank else {"q_proj": (query, hidden)}
    index: dict[str, tuple[int, int]] = {}
    if mla.index_n_heads and mla.index_head_dim:  # its keys are made of the layer's input, its queries of theirs
        index = {
            "indexer.wq_b": (mla.index_n_heads * mla.index_head_dim, rank or hidden),
            "indexer.wk": (mla.index_head_dim, hidden),
            "indexer.weights_proj": (mla.index_n_heads, hidden),
        }
    return {
        **queries,
        "kv_a_proj_with_mqa": (mla.kv_lora_rank + mla.qk_rope_head_dim, hidden),
        "kv_b_proj": (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
        "o_proj": (hidden, heads * mla.v_head_dim),
        **index,
    }


def _gated_delta(linear: HfLinear, hidden: int) -> dict[str, tuple[int, int]]:
    """Qwen3-Next: keys and queries, values and their gate, two numbers a value head, output."""
    keys = (linear.linear_num_key_heads or 0) * (linear.linear_key_head_dim or 0)
    heads = linear.linear_num_value_heads or 0
    values = heads * (linear.linear_value_head_dim or 0)
    return {
        "in_proj_qkvz": (2 * keys + 2 * values, hidden),
        "in_proj_ba": (2 * heads, hidden),
        "out_proj": (hidden, values),
    }


def _delta(delta: HfDelta, hidden: int) -> dict[str, tuple[int, int]]:
    """Kimi Linear: keys, queries, values, output; decay and output gate by way of one head's width."""
    width, dim = delta.num_heads * delta.head_dim, delta.head_dim
    wide = {name: (width, hidden) for name in ("q_proj", "k_proj", "v_proj")}
    narrow = {name: (dim, hidden) for name in ("f_a_proj", "g_a_proj")}
    return {
        **wide,
        **narrow,
        "f_b_proj": (width, dim),
        "g_b_proj": (width, dim),
        "b_proj": (delta.num_heads, hidden),
        "o_proj": (hidden, width),
    }


def _state_space(states: HfStates, hidden: int) -> dict[str, tuple[int, int]]:
    """Mamba 2 where it has heads, else Mamba 1, with its time steps and states of a channel."""
    if states.heads:
        inner = states.heads * states.state_head_dim if states.state_head_dim else states.expand * hidden
        scan = 2 * inner + 2 * states.n_groups * states.state_size + states.heads
        return {"in_proj": (scan, hidden), "out_proj": (hidden, inner)}
    inner, rank = states.expand * hidden, states.dt_rank or -(-hidden // 16)
    return {
        "in_proj": (2 * inner, hidden),
        "x_proj": (rank + 2 * states.state_size, inner),
        "dt_proj": (inner, rank),
        "A_log": (inner, states.state_size),
        "out_proj": (hidden, inner),
    }


def _feed_forward(decoder: Decoder, kind: Kind, at: str) -> Iterator[Matrix]:
    hidden = decoder.fields.hidden_size
    if kind in ("dense", "both"):
        yield from _mlp("dense", at, hidden, decoder.mlp_width, decoder.gated)
    if kind in ("experts", "both") and decoder.experts is not None:
        n_experts, within = decoder.experts.n_experts, decoder.experts.moe_latent_size or hidden
        yield Matrix("dense", f"{at}.gate", n_experts, hidden, linear=False)
        if within != hidden:
            yield Matrix("dense", f"{at}.fc1_latent_proj", within, hidden)
            yield Matrix("dense", f"{at}.fc2_latent_proj", hidden, within)
        if decoder.shared_width:
            yield from _mlp("dense", f"{at}.shared_experts", hidden, decoder.shared_width, decoder.gated)
        yield from _mlp("expert", f"{at}.experts.0", within, decoder.expert_width, decoder.gated, n_experts)


def _mlp(part: PartName, at: str, hidden: int, width: int, gated: bool, copies: int = 1) -> Iterator[Matrix]:
    if gated:
        yield Matrix(part, f"{at}.gate_proj", width, hidden, copies)
    yield Matrix(part, f"{at}.up_proj", width, hidden, copies)
    yield Matrix(part, f"{at}.down_proj", hidden, width, copies)
