"""LLMs by name or by Hugging Face config file, and the precisions to serve them at."""

import os
from dataclasses import dataclass

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.core.errors import BadField, unknown_name
from fleetopt_jax.laws.llm import Llm, gqa_kv_bytes_per_token, make_llm, mla_kv_bytes_per_token

BYTES_16_BIT = 2.0
BYTES_4_BIT = 4.25 / 8  # with the scales: 8 bits per group of 32 (mxfp4), 16 per 64 (int4; 4.16 bits at 128)


@dataclass(frozen=True)
class Precision:
    """How the weights are held and multiplied. The output layer always stays in 16 bits, as checkpoints have it."""

    dense_bytes: float  # per weight of attention, MLP, shared experts and router [B]
    expert_bytes: float  # per weight of the routed experts [B]
    eight_bit_frac: float  # 1 where activations are 8 bits as well; 4-bit weights are unpacked to 16 [-]


PRECISIONS = {
    "bf16": Precision(BYTES_16_BIT, BYTES_16_BIT, 0.0),
    "fp8": Precision(1.0, 1.0, 1.0),
    "int4": Precision(BYTES_4_BIT, BYTES_4_BIT, 0.0),
    "mxfp4": Precision(BYTES_16_BIT, BYTES_4_BIT, 0.0),  # as gpt-oss: only the routed experts
}
KV_BYTES = {"bf16": 2.0, "fp8": 1.0}  # of one value


@dataclass(frozen=True)
class LlmEntry:
    """One LLM, with where its numbers come from."""

    title: str
    architecture: Architecture
    source: str
    repository: str | None = None  # of the checkpoint on Hugging Face
    max_position_tokens: int | None = None  # longest sequence of that checkpoint (max_position_embeddings) [tokens]


def at_precision(
    architecture: Architecture,
    precision: str | None = None,
    kv_precision: str = "bf16",
) -> Llm:
    """The LLM with weights at `precision` (None: the checkpoint's own) and a KV cache at `kv_precision`.

    Attention costs 4 * layers * heads * head_dim FLOPs per pair of tokens (scores and values, a multiply-add is two).
    A latent cache is attended to in the absorbed form, 2 * layers * heads * (2 * latent + rotary); in prefill, engines
    expand the latent instead, which is up to 3.4 times cheaper (DeepSeek-V3).
    """
    a = architecture
    name = a.native_precision if precision is None else precision.lower()
    if name not in PRECISIONS:
        raise unknown_name("precision", name, PRECISIONS)
    if kv_precision.lower() not in KV_BYTES:
        raise unknown_name("kv_precision", kv_precision, KV_BYTES)
    if name == "mxfp4" and not a.expert_params:
        others = ", ".join(known for known in PRECISIONS if known != name)
        raise BadField("precision", "mxfp4 is for routed experts and this LLM has none", f"need one of {others}")
    weights, value_bytes = PRECISIONS[name], KV_BYTES[kv_precision.lower()]
    inner = a.attention_params + a.dense_params
    n_dense = inner + a.lm_head_params
    if a.latent_dim:
        kv_bytes = mla_kv_bytes_per_token(
            n_layers=a.layers, latent_dim=a.latent_dim, rope_dim=a.rope_dim, bytes_per_value=value_bytes
        )
        attention_flop = 2 * a.layers * a.q_heads * (2 * a.latent_dim + a.rope_dim)
    else:
        kv_bytes = gqa_kv_bytes_per_token(
            n_layers=a.layers, n_kv_heads=a.kv_heads, head_dim=a.head_dim, bytes_per_value=value_bytes
        )
        attention_flop = 4 * a.layers * a.q_heads * a.head_dim
    return make_llm(
        n_dense_params=n_dense,
        n_expert_params=a.expert_params,
        expert_share=a.experts_per_token / a.n_experts if a.n_experts else 0.0,
        n_embedding_params=a.embedding_params,
        n_layers=a.layers,
        bytes_per_weight=(weights.dense_bytes * inner + BYTES_16_BIT * a.lm_head_params) / n_dense,
        bytes_per_expert_weight=weights.expert_bytes,
        eight_bit_frac=weights.eight_bit_frac,
        kv_bytes_per_token=kv_bytes,
        n_kv_heads=a.kv_heads,
        attention_flop_per_token2=attention_flop,
        windowed_frac=a.windowed_layers / a.layers,
        window_tokens=a.window_tokens,
    )


def llm_entry(name_or_file: "str | LlmEntry", where: str = "llm") -> LlmEntry:
    """The catalog's LLM of that name (case does not matter), the one a Hugging Face config.json describes, or the one
    that is given."""
    if isinstance(name_or_file, LlmEntry):
        return name_or_file
    if name_or_file.lower() in LLMS:
        return LLMS[name_or_file.lower()]
    is_file = name_or_file.lower().endswith(".json") or ("/" in name_or_file and os.path.exists(name_or_file))
    if not is_file:  # a repository's name as well: nothing is downloaded
        raise unknown_name(where, name_or_file, LLMS)
    from fleetopt_jax.catalog.hf_config import read_config  # and pydantic, which names do without

    return LlmEntry(name_or_file, read_config(name_or_file), f"Hugging Face config {name_or_file}")


def _entry(
    title: str,
    repository: str,
    *,
    shape: tuple[int, int, int, int, int],
    params: tuple[int, int, int],
    experts: tuple[int, int, int] = (0, 0, 0),
    attention: tuple[int, int, int, int] = (0, 0, 0, 0),
    positions: int,
    precision: str = "bf16",
) -> LlmEntry:
    """An LLM with untied embeddings.

    shape: layers, hidden, heads, KV heads, head_dim; params: attention, dense, output layer; experts: parameters, k, E;
    attention: of a sliding window its tokens and the layers that have it, of a latent its length and rotary part;
    positions: of the longest sequence.
    """
    architecture = Architecture(
        **dict(zip(("layers", "hidden", "q_heads", "kv_heads", "head_dim"), shape)),
        **dict(zip(("attention_params", "dense_params", "lm_head_params"), params)),
        **dict(zip(("expert_params", "experts_per_token", "n_experts"), experts)),
        **dict(zip(("window_tokens", "windowed_layers", "latent_dim", "rope_dim"), attention)),
        embedding_params=params[2],
        native_precision=precision,
    )
    return LlmEntry(title, architecture, f"config.json of {repository}", repository, positions)


LLMS = {
    "llama-3.1-8b": _entry(
        "Llama 3.1 8B",
        "meta-llama/Llama-3.1-8B",
        shape=(32, 4096, 32, 8, 128),
        params=(1_342_177_280, 5_637_144_576, 525_336_576),
        positions=131_072,
    ),
    "llama-3.1-70b": _entry(
        "Llama 3.1 70B",
        "meta-llama/Llama-3.1-70B",
        shape=(80, 8192, 64, 8, 128),
        params=(12_079_595_520, 56_371_445_760, 1_050_673_152),
        positions=131_072,
    ),
    "llama-3.1-405b": _entry(
        "Llama 3.1 405B",
        "meta-llama/Llama-3.1-405B",
        shape=(126, 16384, 128, 8, 128),
        params=(71_873_593_344, 329_772_957_696, 2_101_346_304),
        positions=131_072,
    ),
    "llama-3.3-70b": _entry(
        "Llama 3.3 70B",
        "meta-llama/Llama-3.3-70B-Instruct",
        shape=(80, 8192, 64, 8, 128),
        params=(12_079_595_520, 56_371_445_760, 1_050_673_152),
        positions=131_072,
    ),
    "qwen3-8b": _entry(
        "Qwen3 8B",
        "Qwen/Qwen3-8B",
        shape=(36, 4096, 32, 8, 128),
        params=(1_509_949_440, 5_435_817_984, 622_329_856),
        positions=40_960,
    ),
    "qwen3-14b": _entry(
        "Qwen3 14B",
        "Qwen/Qwen3-14B",
        shape=(40, 5120, 40, 8, 128),
        params=(2_516_582_400, 10_695_475_200, 777_912_320),
        positions=40_960,
    ),
    "qwen3-32b": _entry(
        "Qwen3 32B",
        "Qwen/Qwen3-32B",
        shape=(64, 5120, 64, 8, 128),
        params=(6_039_797_760, 25_165_824_000, 777_912_320),
        positions=40_960,
    ),
    "qwen3-30b-a3b": _entry(
        "Qwen3 30B-A3B (MoE, 8 of 128 experts)",
        "Qwen/Qwen3-30B-A3B",
        shape=(48, 2048, 32, 4, 128),
        params=(905_969_664, 12_582_912, 311_164_928),
        experts=(28_991_029_248, 8, 128),
        positions=40_960,
    ),
    "qwen3-235b-a22b": _entry(
        "Qwen3 235B-A22B (MoE, 8 of 128 experts)",
        "Qwen/Qwen3-235B-A22B",
        shape=(94, 4096, 64, 4, 128),
        params=(6_702_497_792, 49_283_072, 622_329_856),
        experts=(227_096_395_776, 8, 128),
        positions=40_960,
    ),
    "qwen3-coder-480b-a35b": _entry(
        "Qwen3-Coder 480B-A35B (MoE, 8 of 160 experts)",
        "Qwen/Qwen3-Coder-480B-A35B-Instruct",
        shape=(62, 6144, 96, 8, 128),
        params=(10_141_827_072, 60_948_480, 933_494_784),
        experts=(468_084_326_400, 8, 160),
        positions=262_144,
    ),
    "deepseek-v3": _entry(
        "DeepSeek-V3 (MoE, 8 of 256 experts, MLA, fp8)",
        "deepseek-ai/DeepSeek-V3",
        shape=(61, 7168, 128, 1, 576),
        params=(11_413_422_080, 3_849_846_784, 926_679_040),
        experts=(653_908_770_816, 8, 256),
        attention=(0, 0, 512, 64),
        precision="fp8",
        positions=163_840,
    ),
    "gpt-oss-20b": _entry(
        "gpt-oss 20B (MoE, 4 of 32 experts, mxfp4)",
        "openai/gpt-oss-20b",
        shape=(24, 2880, 64, 8, 64),
        params=(637_009_920, 2_211_840, 579_133_440),
        experts=(19_110_297_600, 4, 32),
        attention=(128, 12, 0, 0),
        precision="mxfp4",
        positions=131_072,
    ),
    "gpt-oss-120b": _entry(
        "gpt-oss 120B (MoE, 4 of 128 experts, mxfp4)",
        "openai/gpt-oss-120b",
        shape=(36, 2880, 64, 8, 64),
        params=(955_514_880, 13_271_040, 579_133_440),
        experts=(114_661_785_600, 4, 128),
        attention=(128, 18, 0, 0),
        precision="mxfp4",
        positions=131_072,
    ),
}


def catalog_name(repository: str) -> str | None:
    """The catalog's name of a Hugging Face model id such as 'meta-llama/Llama-3.1-70B-Instruct', or None."""
    model = repository.lower().rsplit("/", 1)[-1]
    return max((name for name in LLMS if model == name or model.startswith(f"{name}-")), key=len, default=None)
