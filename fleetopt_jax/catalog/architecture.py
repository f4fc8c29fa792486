"""What an LLM is made of, by name or by its configuration file."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Held:
    """How a checkpoint holds its weights, scales and zero points with them [B]. Embeddings stay in 16 bits."""

    attention_bytes: float
    dense_bytes: float  # MLP, shared experts and routers
    expert_bytes: float  # all routed experts
    lm_head_bytes: float
    low_bits_frac: float = 0.0  # of the weights a token is multiplied with, whose activations have no 16 bits [-]


@dataclass(frozen=True)
class LinearLayers:
    """Layers of a gated delta rule (Qwen3-Next and kin)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class StateLayers:
    """Layers of a state space (Mamba)."""

    channels: int  # inner width
    states: int  # of a channel
    heads: int = 0  # of Mamba 2; 0: Mamba 1
    groups: int = 1


@dataclass(frozen=True)
class Widths:
    """The shapes of the matrices of a layer, where parameters alone do not say them."""

    mlp: int  # of a layer without experts; 0 where all have them
    shared: int = 0  # of the shared experts together
    gated: bool = True  # MLPs of three matrices, not two
    mlp_layers: int = 0  # layers that have an MLP
    expert_layers: int = 0  # layers that have experts
    query_rank: int = 0  # of MLA's queries; 0: they have no latent
    nope_dim: int = 0  # of MLA's heads, without position
    value_dim: int = 0  # of MLA's values
    query_gate: bool = False  # whether queries come with a gate of their width
    linear: LinearLayers | None = None
    states: StateLayers | None = None


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
    expert_width: int = 0  # of one routed expert
    latent_dim: int = 0  # of MLA's compressed cache
    rope_dim: int = 0  # its rotary part
    window_tokens: int = 0  # length of the sliding window
    windowed_layers: int = 0  # layers that have it
    cacheless_layers: int = 0  # layers that keep a state instead of a KV cache: linear attention, state spaces
    kv_values: int = 0  # cached of one token over all layers, where their heads differ; 0: as the heads say
    no_law: str = ""  # why no engine can be built of it; empty where one can
    native_precision: str = "bf16"  # of the checkpoint's weights
    native_kv_precision: str = "bf16"  # of the KV cache it asks for
    held: Held | None = None  # in the checkpoint; None: every weight as `native_precision` has it
    # Equal numbers of everything else are one architecture, whether its file said the widths or not.
    said_widths: Widths | None = field(default=None, compare=False)

    @property
    def shape(self) -> "Architecture":
        """It without its checkpoint: equal for every model of one architecture."""
        return replace(self, native_precision="bf16", native_kv_precision="bf16", held=None)

    @property
    def widths(self) -> Widths:
        """What its file said; else what the parameters come to, with gated MLPs and without shared experts."""
        if self.said_widths is not None:
            return self.said_widths
        of_a_width = 3 * self.hidden
        expert = of_a_width * self.expert_width * self.n_experts
        with_experts = min(round(self.expert_params / expert), self.layers) if expert else 0
        without = self.layers - with_experts
        mlp = self.dense_params - with_experts * self.n_experts * self.hidden
        return Widths(
            mlp=max(round(mlp / (of_a_width * without)), 0) if without else 0,
            shared=0 if without or not with_experts else max(round(mlp / (of_a_width * with_experts)), 0),
            mlp_layers=without,
            expert_layers=with_experts,
        )

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer."""
        return round(self.lm_head_params / self.hidden)

    @property
    def inner_params(self) -> int:
        """Attention, MLP, experts and routers: what quantization is about."""
        return self.attention_params + self.dense_params + self.expert_params

    @property
    def n_params(self) -> int:
        """All parameters."""
        return self.inner_params + self.lm_head_params + self.embedding_params

    @property
    def expert_share(self) -> float:
        """Of the routed experts, that a token is sent to."""
        return self.experts_per_token / self.n_experts if self.n_experts else 0.0

    @property
    def n_active_params(self) -> int:
        """Parameters a token is multiplied with."""
        dense = self.attention_params + self.dense_params + self.lm_head_params
        return dense + round(self.expert_share * self.expert_params)

    @property
    def kv_values_per_token(self) -> int:
        """Values the KV cache keeps of one token: keys and values of every head, or the latent, over all layers."""
        if self.kv_values:
            return self.kv_values
        of_a_layer = self.latent_dim + self.rope_dim if self.latent_dim else 2 * self.kv_heads * self.head_dim
        return (self.layers - self.cacheless_layers) * of_a_layer

    @property
    def state_values(self) -> int:
        """Values that layers without a cache keep of a sequence, however long: a matrix for each head, all together.
        What their convolutions keep is left out (2 % of it in Qwen3.5)."""
        linear, states = self.widths.linear, self.widths.states
        of_linear = linear.value_heads * linear.key_dim * linear.value_dim if linear else 0
        return self.cacheless_layers * (of_linear + (states.channels * states.states if states else 0))

    @property
    def family(self) -> str:
        """Its structure in words."""
        words = ["mixture of experts" if self.n_experts else "dense"]
        alone = "MQA" if self.kv_heads == 1 else "GQA"
        words.append("MLA" if self.latent_dim else "MHA" if self.kv_heads == self.q_heads else alone)
        if self.windowed_layers:
            words.append(f"window in {self.windowed_layers} of {self.layers} layers")
        return ", ".join(words)
