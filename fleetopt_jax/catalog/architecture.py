"""What an LLM is made of, by name or by its configuration file."""

from dataclasses import dataclass


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
