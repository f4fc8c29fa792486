"""The roofline engines behind tables 2 and 5, with the paper's own figures, right or wrong.

Kept apart from the catalog on purpose: the paper counts DeepSeek-V3's KV cache as 128 full heads, takes head_dim 64 for
Qwen3-235B, leaves the output layer out of the parameters, counts a model that does not fit as one slot, and keeps a
tabulated weight-streaming time for the power of MoE models.
"""

from dataclasses import dataclass, replace

from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.laws.decode import DecodeStep, decode_tok_per_s
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS, roofline_kv_blocks
from fleetopt_jax.laws.llm import Llm, gqa_kv_bytes_per_token, make_llm
from fleetopt_jax.laws.power import RooflinePower, roofline_power
from fleetopt_jax.laws.roofline import ROOFLINE_CONTEXT_TOKENS, roofline_decode_step

WINDOW_TOKENS = 8192


@dataclass(frozen=True)
class PublishedLlm:
    """An LLM as the paper counts it."""

    llm: Llm
    tp: int
    power_active_params: float  # parameters a token passes through, in the power formula
    power_weight_stream_s: dict[str, float]  # tabulated W of the power formula by GPU; empty for dense models


def _dense(n_params: float, layers: int, head_dim: int = 128, *, tp: int = 8) -> PublishedLlm:
    kv_bytes = gqa_kv_bytes_per_token(n_layers=layers, n_kv_heads=8, head_dim=head_dim, bytes_per_value=2)
    llm = make_llm(n_dense_params=n_params, n_layers=layers, bytes_per_weight=2, kv_bytes_per_token=kv_bytes)
    return PublishedLlm(llm, tp, n_params, {})


LLMS = {
    "llama-3.1-8b": _dense(7_504_658_432, 32, tp=1),
    "llama-3.1-70b": _dense(69_501_714_432, 80),
    "llama-3.1-405b": _dense(403_747_897_344, 126),
    "qwen3-235b-a22b": PublishedLlm(
        make_llm(
            n_dense_params=0,
            n_expert_params=231_069_974_528,
            expert_share=22e9 / 231_069_974_528,
            n_layers=94,
            bytes_per_weight=2,
            kv_bytes_per_token=gqa_kv_bytes_per_token(n_layers=94, n_kv_heads=4, head_dim=64, bytes_per_value=2),
        ),
        8,
        18_167_103_488,
        {"h100": 0.0457146165, "b200": 0.0249451629},
    ),
    "deepseek-v3": PublishedLlm(
        make_llm(
            n_dense_params=0,
            n_expert_params=701_195_091_968,
            expert_share=37e9 / 701_195_091_968,
            n_layers=61,
            bytes_per_weight=1,
            kv_bytes_per_token=gqa_kv_bytes_per_token(n_layers=61, n_kv_heads=128, head_dim=56, bytes_per_value=1),
        ),
        8,
        34_955_067_392,
        {"h100": 0.0434677376, "b200": 0.0236443322},
    ),
}


@dataclass(frozen=True)
class PublishedEngine:
    """One row of table 2 or 5 before it is evaluated."""

    decode: DecodeStep
    power: RooflinePower
    n_blocks: float
    tp: int

    @property
    def n_max(self) -> float:
        """Sequences at 8K; a model that does not fit counts as one slot."""
        return max(1.0, self.n_blocks * BLOCK_TOKENS // WINDOW_TOKENS)

    def power_w(self, n_active: float) -> float:
        return float(self.power.gpu_w(n_active, ROOFLINE_CONTEXT_TOKENS))

    def tok_per_s(self, n_active: float) -> float:
        return float(decode_tok_per_s(self.decode, n_active, ROOFLINE_CONTEXT_TOKENS))


def published_engine(gpu_name: str, llm_name: str) -> PublishedEngine:
    """The paper's roofline engine of this GPU and LLM."""
    gpu, entry = GPUS[gpu_name].nominal_gpu, LLMS[llm_name]
    decode = roofline_decode_step(gpu, entry.llm, entry.tp)
    power_step = decode
    if entry.power_weight_stream_s:
        power_step = replace(decode, **as_floats(base_s=entry.power_weight_stream_s[gpu_name]))
    power = roofline_power(gpu, entry.llm, entry.tp, power_step)
    compute_s_per_seq = 2 * entry.power_active_params / entry.tp / gpu.peak_flop_per_s
    return PublishedEngine(
        decode=decode,
        power=replace(power, compute_s_per_seq=compute_s_per_seq),
        n_blocks=float(roofline_kv_blocks(gpu, entry.llm, entry.tp)),
        tp=entry.tp,
    )
