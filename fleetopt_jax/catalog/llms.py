"""LLMs by name, as their published configurations have them (16-bit KV cache)."""

from dataclasses import dataclass

from fleetopt_jax.core.errors import unknown_name
from fleetopt_jax.laws.llm import Llm, gqa_kv_bytes_per_token, make_llm, mla_kv_bytes_per_token

KV_BYTES_PER_VALUE = 2


@dataclass(frozen=True)
class LlmEntry:
    """One LLM of the catalog, with where its numbers come from."""

    title: str
    llm: Llm
    source: str


def _entry(
    title: str,
    *,
    layers: int,
    kv_bytes_per_token: float,
    attention: int,
    dense: int,
    embedding: int,
    experts: int = 0,
    experts_used: float = 0.0,
    bytes_per_weight: float = 2,
    source: str,
) -> LlmEntry:
    """An entry from parameter counts: attention, dense MLP (router and shared experts), routed experts, embedding."""
    always = attention + dense + 2 * embedding
    llm = make_llm(
        n_params=always + experts,
        n_active_params=always + experts * experts_used,
        n_layers=layers,
        bytes_per_weight=bytes_per_weight,
        kv_bytes_per_token=kv_bytes_per_token,
    )
    return LlmEntry(title, llm, source)


def _gqa(layers: int, kv_heads: int, head_dim: int = 128) -> float:
    return gqa_kv_bytes_per_token(
        n_layers=layers, n_kv_heads=kv_heads, head_dim=head_dim, bytes_per_value=KV_BYTES_PER_VALUE
    )


def _build() -> dict[str, LlmEntry]:
    return {
        "llama-3.1-8b": _entry(
            "Llama 3.1 8B, bf16",
            layers=32,
            kv_bytes_per_token=_gqa(32, 8),
            attention=1_342_177_280,
            dense=5_637_144_576,
            embedding=525_336_576,
            source="config.json of meta-llama/Llama-3.1-8B",
        ),
        "llama-3.1-70b": _entry(
            "Llama 3.1 70B, bf16",
            layers=80,
            kv_bytes_per_token=_gqa(80, 8),
            attention=12_079_595_520,
            dense=56_371_445_760,
            embedding=1_050_673_152,
            source="config.json of meta-llama/Llama-3.1-70B",
        ),
        "llama-3.1-405b": _entry(
            "Llama 3.1 405B, bf16",
            layers=126,
            kv_bytes_per_token=_gqa(126, 8),
            attention=71_873_593_344,
            dense=329_772_957_696,
            embedding=2_101_346_304,
            source="config.json of meta-llama/Llama-3.1-405B",
        ),
        "qwen3-235b-a22b": _entry(
            "Qwen3 235B-A22B, bf16 (MoE, 8 of 128 experts)",
            layers=94,
            kv_bytes_per_token=_gqa(94, 4),
            attention=6_702_497_792,
            dense=49_283_072,
            embedding=622_329_856,
            experts=227_096_395_776,
            experts_used=8 / 128,
            source="config.json of Qwen/Qwen3-235B-A22B (head_dim 128)",
        ),
        "deepseek-v3": _entry(
            "DeepSeek-V3, fp8 (MoE, 8 of 256 experts, MLA)",
            layers=61,
            kv_bytes_per_token=mla_kv_bytes_per_token(
                n_layers=61, latent_dim=512, rope_dim=64, bytes_per_value=KV_BYTES_PER_VALUE
            ),
            attention=11_413_422_080,
            dense=3_849_846_784,
            embedding=926_679_040,
            experts=653_908_770_816,
            experts_used=8 / 256,
            bytes_per_weight=1,
            source="config.json of deepseek-ai/DeepSeek-V3 (latent 512 + rotary 64)",
        ),
    }


LLMS = _build()


def llm_entry(name: str, where: str = "--llm") -> LlmEntry:
    """The catalog's LLM of that name (case does not matter)."""
    try:
        return LLMS[name.lower()]
    except KeyError:
        raise unknown_name(where, name, LLMS) from None
