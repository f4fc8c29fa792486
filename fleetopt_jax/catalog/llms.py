"""LLMs by name or by Hugging Face config file, and the precisions to serve them at."""

import os
from collections.abc import Collection
from dataclasses import dataclass, replace

from fleetopt_jax.catalog.architecture import Architecture, Held, LinearLayers, Widths
from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.core.errors import BadField, unknown_name
from fleetopt_jax.laws.llm import (
    EMBEDDING_BYTES,
    Llm,
    gqa_kv_bytes_per_token,
    make_llm,
    mla_kv_bytes_per_token,
)

BYTES_16_BIT = 2.0
BYTES_4_BIT = 4.25 / 8  # with the scales: 8 bits per group of 32 (mxfp4), 16 per 64 (int4; 4.16 bits at 128)
BYTES_NVFP4 = 4.5 / 8  # 8 bits of scale per group of 16
ALL_FORMATS = ("fp8", "int8", "nvfp4")  # that tensor cores multiply besides 16 bits
# vLLM's Marlin kernel takes mxfp4 experts in tiles: their width is padded to a multiple of 128, the model's to one of
# 256 (vllm/model_executor/layers/quantization/mxfp4.py). Logged: gpt-oss-20b 13.72 GiB (A100), gpt-oss-120b 65.97 GiB
# (H100, vllm-project/vllm#23278). Triton's kernels on H100 hold 2.4 % less (64.38 GiB, #33155); FlashInfer's on B200
# pad both to 256, 4 % more.
MXFP4_TILE = (128, 256)


@dataclass(frozen=True)
class Precision:
    """How the weights are held and multiplied. The output layer always stays in 16 bits, as checkpoints have it."""

    dense_bytes: float  # per weight of attention, MLP, shared experts and router [B]
    expert_bytes: float  # per weight of the routed experts [B]
    format: str | None = None  # of the activations as well, so that products run in it; None: unpacked to 16 bits
    latent_bytes: float | None = None  # per weight of latent attention, where that differs [B]


PRECISIONS = {
    "bf16": Precision(BYTES_16_BIT, BYTES_16_BIT),
    "fp8": Precision(1.0, 1.0, "fp8"),
    "int8": Precision(1.0, 1.0, "int8"),
    "int4": Precision(BYTES_4_BIT, BYTES_4_BIT),
    "mxfp4": Precision(BYTES_16_BIT, BYTES_4_BIT),  # as gpt-oss: only the routed experts
    # As NVIDIA's checkpoints, which leave latent attention in 16 bits. No law of 4-bit units is known yet: where a GPU
    # has them, products count at its 8-bit peak, half of what the data sheet says.
    "nvfp4": Precision(BYTES_NVFP4, BYTES_NVFP4, "nvfp4", latent_bytes=BYTES_16_BIT),
}
KV_BYTES = {"bf16": 2.0, "fp8": 1.0}  # of one value
STATE_BYTES = 4.0  # of one value of a layer's state: mamba_ssm_dtype of Qwen3.5's config.json, 32 bits


@dataclass(frozen=True)
class LlmEntry:
    """One LLM, with where its numbers come from."""

    title: str
    architecture: Architecture
    source: str
    repository: str | None = None  # of the checkpoint on Hugging Face
    max_position_tokens: int | None = None  # longest sequence of that checkpoint (max_position_embeddings) [tokens]
    family: str = ""  # its structure in words, and as its file calls it
    quantized_from: str | None = None  # where its quantization is said
    quantized: tuple[tuple[str, float], ...] = ()  # of each part's weights, the share that is quantized [-]
    left_out: tuple[str, ...] = ()  # of its file
    draft_bytes: float = 0.0  # of draft layers, which the checkpoint has beside the rest [B]
    warnings: tuple[str, ...] = ()  # what may be wrong with it


def at_precision(
    architecture: Architecture,
    precision: str | None = None,
    kv_precision: str | None = None,
    formats: Collection[str] = ALL_FORMATS,
) -> Llm:
    """The LLM with weights at `precision` and a KV cache at `kv_precision`; None, or what the checkpoint has: its own,
    matrix by matrix. `formats` are those that the GPU multiplies; others are unpacked to 16 bits.

    Attention costs 4 * layers * heads * head_dim FLOPs per pair of tokens (scores and values, a multiply-add is two).
    A latent cache is attended to in the absorbed form, 2 * layers * heads * (2 * latent + rotary); in prefill, engines
    expand the latent instead, which is up to 3.4 times cheaper (DeepSeek-V3).
    """
    a = architecture
    name = a.native_precision if precision is None else precision.lower()
    kv_name = a.native_kv_precision if kv_precision is None else kv_precision.lower()
    if a.no_law:
        raise BadField("llm", a.no_law, "fleetopt catalog llm says what it is made of")
    if name not in PRECISIONS:
        raise unknown_name("precision", name, PRECISIONS)
    if kv_name not in KV_BYTES:
        raise unknown_name("kv_precision", kv_precision or kv_name, KV_BYTES)
    if name == "mxfp4" and not a.expert_params and a.native_precision != name:
        others = ", ".join(known for known in PRECISIONS if known != name)
        raise BadField("precision", "mxfp4 is for routed experts and this LLM has none", f"need one of {others}")
    weights, how, caching = PRECISIONS[name], held_at(a, name), a.layers - a.cacheless_layers
    n_dense = a.attention_params + a.dense_params + a.lm_head_params
    value_bytes = KV_BYTES[kv_name]
    if a.latent_dim:
        kv_bytes = mla_kv_bytes_per_token(
            n_layers=caching, latent_dim=a.latent_dim, rope_dim=a.rope_dim, bytes_per_value=value_bytes
        )
        attention_flop = 2 * caching * a.q_heads * (2 * a.latent_dim + a.rope_dim)
    else:
        kv_bytes = gqa_kv_bytes_per_token(
            n_layers=caching, n_kv_heads=a.kv_heads, head_dim=a.head_dim, bytes_per_value=value_bytes
        )
        attention_flop = 4 * caching * a.q_heads * a.head_dim
    return make_llm(
        n_dense_params=n_dense,
        n_expert_params=a.expert_params,
        expert_share=a.expert_share,
        n_embedding_params=a.embedding_params,
        n_layers=a.layers,
        bytes_per_weight=(how.attention_bytes + how.dense_bytes + how.lm_head_bytes) / n_dense,
        bytes_per_expert_weight=how.expert_bytes / a.expert_params if a.expert_params else None,
        eight_bit_frac=how.low_bits_frac if weights.format in formats else 0.0,
        kv_bytes_per_token=kv_bytes,
        n_kv_heads=a.kv_heads,
        attention_flop_per_token2=attention_flop,
        windowed_frac=a.windowed_layers / caching,
        window_tokens=a.window_tokens,
        padding_bytes=padding_bytes(a, name),
        state_bytes=STATE_BYTES * a.state_values,
    )


def held_at(a: Architecture, precision: str) -> Held:
    """The bytes of each part at a precision: the checkpoint's own, where that is what it has."""
    if a.held is not None and precision == a.native_precision:
        return a.held
    weights = PRECISIONS[precision]
    attention = weights.dense_bytes
    if a.latent_dim and weights.latent_bytes is not None:
        attention = weights.latent_bytes
    active = a.inner_params - a.expert_params + a.expert_share * a.expert_params
    in_16_bits = a.attention_params if attention != weights.dense_bytes else 0
    return Held(
        attention_bytes=attention * a.attention_params,
        dense_bytes=weights.dense_bytes * a.dense_params,
        expert_bytes=weights.expert_bytes * a.expert_params,
        lm_head_bytes=BYTES_16_BIT * a.lm_head_params,
        low_bits_frac=1.0 - in_16_bits / active if weights.format else 0.0,
    )


def checkpoint_size_bytes(a: Architecture, precision: str | None = None) -> float:
    """All weights in files [B], of an LLM that no engine may be built of as well."""
    how = held_at(a, precision or a.native_precision)
    parts = how.attention_bytes + how.dense_bytes + how.expert_bytes + how.lm_head_bytes
    return parts + EMBEDDING_BYTES * a.embedding_params


def padding_bytes(a: Architecture, precision: str) -> float:
    """What kernels add to the weights in memory [B]: tiles of mxfp4 experts, at TP 1."""
    if precision != "mxfp4" or not (a.expert_width and a.expert_params):
        return 0.0
    width, hidden = (-(-n // tile) * tile / n for n, tile in zip((a.expert_width, a.hidden), MXFP4_TILE))
    return held_at(a, precision).expert_bytes * (width * hidden - 1.0)


def precision_notes(precision: str | None, gpu: GpuEntry) -> list[str]:
    """What is to be known of products in a precision on a GPU."""
    form = PRECISIONS[precision].format if precision in PRECISIONS else None
    if form is not None and form not in gpu.formats:
        return [f"{gpu.name} has no units for {form}: weights are unpacked to 16 bits, at its 16-bit peak"]
    if form == "nvfp4":
        return [f"nvfp4: no law of 4-bit units is known yet, products count at the 8-bit peak of {gpu.name}"]
    return []


def names_of(architecture: Architecture) -> tuple[str, ...]:
    """The catalog's names of LLMs of this architecture, whatever their checkpoints."""
    shape = architecture.shape
    return tuple(name for name, entry in LLMS.items() if entry.architecture.shape == shape)


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

    found = read_config(name_or_file)
    a, warnings = found.architecture, list(found.warnings)
    others = [name for name in names_of(a) if LLMS[name].architecture.native_precision != "bf16"]
    if others and found.quantized_from is None and not warnings:
        published = LLMS[others[0]].architecture.native_precision
        warnings.append(
            f"no quantization is in the file or in an hf_quant_config.json beside it, so that its weights are counted "
            f"in 16 bits; {others[0]}, of the same architecture, is published in {published}: say --precision"
        )
    return LlmEntry(
        name_or_file,
        a,
        f"Hugging Face config {name_or_file}",
        max_position_tokens=found.max_position_tokens,
        family=f"{found.family} ({found.model_type})" if found.model_type else found.family,
        quantized_from=found.quantized_from,
        quantized=found.quantized,
        left_out=found.left_out,
        draft_bytes=found.draft_bytes,
        warnings=tuple(warnings),
    )


def _entry(
    title: str,
    repository: str,
    *,
    shape: tuple[int, int, int, int, int],
    params: tuple[int, int, int],
    experts: tuple[int, int, int, int] = (0, 0, 0, 0),
    attention: tuple[int, int, int, int] = (0, 0, 0, 0),
    positions: int,
    checkpoint: tuple[str, Held | None] = ("bf16", None),
) -> LlmEntry:
    """An LLM with untied embeddings.

    shape: layers, hidden, heads, KV heads, head_dim; params: attention, dense, output layer; experts: parameters, k, E,
    width; attention: of a sliding window its tokens and layers, of a latent its length and rotary part; positions: of
    the longest sequence; checkpoint: its precision and, where it is quantized, its bytes.
    """
    architecture = Architecture(
        **dict(zip(("layers", "hidden", "q_heads", "kv_heads", "head_dim"), shape)),
        **dict(zip(("attention_params", "dense_params", "lm_head_params"), params)),
        **dict(zip(("expert_params", "experts_per_token", "n_experts", "expert_width"), experts)),
        **dict(zip(("window_tokens", "windowed_layers", "latent_dim", "rope_dim"), attention)),
        embedding_params=params[2],
        native_precision=checkpoint[0],
        held=checkpoint[1],
    )
    source = f"config.json of {repository}"
    quantized = f"quantization_config in the {source}" if checkpoint[1] else None
    return LlmEntry(title, architecture, source, repository, positions, quantized_from=quantized)


def _with_widths(entry: LlmEntry, widths: Widths, cacheless_layers: int = 0) -> LlmEntry:
    """An LLM whose parameters do not say the shapes of its matrices, nor which layers keep a state."""
    more = {"said_widths": widths, "cacheless_layers": cacheless_layers}
    return replace(entry, architecture=replace(entry.architecture, **more))


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
        experts=(28_991_029_248, 8, 128, 768),
        positions=40_960,
    ),
    "qwen3-235b-a22b": _entry(
        "Qwen3 235B-A22B (MoE, 8 of 128 experts)",
        "Qwen/Qwen3-235B-A22B",
        shape=(94, 4096, 64, 4, 128),
        params=(6_702_497_792, 49_283_072, 622_329_856),
        experts=(227_096_395_776, 8, 128, 1536),
        positions=40_960,
    ),
    "qwen3-coder-480b-a35b": _entry(
        "Qwen3-Coder 480B-A35B (MoE, 8 of 160 experts)",
        "Qwen/Qwen3-Coder-480B-A35B-Instruct",
        shape=(62, 6144, 96, 8, 128),
        params=(10_141_827_072, 60_948_480, 933_494_784),
        experts=(468_084_326_400, 8, 160, 2560),
        positions=262_144,
    ),
    "qwen3-next-80b-a3b": _with_widths(
        _entry(
            "Qwen3-Next 80B-A3B (MoE, 10 of 512 experts, 36 of 48 layers gated delta)",
            "Qwen/Qwen3-Next-80B-A3B-Instruct",
            shape=(48, 2048, 16, 2, 256),
            params=(1_539_833_856, 201_326_592, 311_164_928),
            experts=(77_309_411_328, 10, 512, 512),
            positions=262_144,
        ),
        Widths(mlp=0, shared=512, expert_layers=48, query_gate=True, linear=LinearLayers(16, 32, 128, 128)),
        cacheless_layers=36,
    ),
    "qwen3.5-397b-a17b": _with_widths(
        _entry(
            "Qwen3.5 397B-A17B (MoE, 10 of 512 experts, 45 of 60 layers gated delta)",
            "Qwen/Qwen3.5-397B-A17B",
            shape=(60, 4096, 32, 2, 256),
            params=(6_881_280_000, 880_803_840, 1_017_118_720),
            experts=(386_547_056_640, 10, 512, 1024),
            positions=262_144,
        ),
        Widths(mlp=0, shared=1024, expert_layers=60, query_gate=True, linear=LinearLayers(16, 64, 128, 128)),
        cacheless_layers=45,
    ),
    "minimax-m2.5": _with_widths(
        _entry(
            "MiniMax-M2.5 (MoE, 8 of 256 experts, fp8)",
            "MiniMaxAI/MiniMax-M2.5",
            shape=(62, 3072, 48, 8, 128),
            params=(2_730_491_904, 48_758_784, 614_596_608),
            experts=(224_680_476_672, 8, 256, 1536),
            checkpoint=("fp8", Held(2_731_158_528.0, 97_517_568.0, 224_735_330_304.0, 1_229_193_216.0, 1.0)),
            positions=196_608,
        ),
        Widths(mlp=0, expert_layers=62),
    ),
    "deepseek-v3": _with_widths(
        _entry(
            "DeepSeek-V3 (MoE, 8 of 256 experts, MLA, fp8)",
            "deepseek-ai/DeepSeek-V3",
            shape=(61, 7168, 128, 1, 576),
            params=(11_413_422_080, 3_849_846_784, 926_679_040),
            experts=(653_908_770_816, 8, 256, 2048),
            attention=(0, 0, 512, 64),
            checkpoint=("fp8", Held(11_416_215_392.0, 3_957_191_168.0, 654_068_416_512.0, 1_853_358_080.0, 1.0)),
            positions=163_840,
        ),
        Widths(
            mlp=18_432,
            shared=2048,
            mlp_layers=3,
            expert_layers=58,
            query_rank=1536,
            nope_dim=128,
            value_dim=128,
        ),
    ),
    "gpt-oss-20b": _entry(
        "gpt-oss 20B (MoE, 4 of 32 experts, mxfp4)",
        "openai/gpt-oss-20b",
        shape=(24, 2880, 64, 8, 64),
        params=(637_009_920, 2_211_840, 579_133_440),
        experts=(19_110_297_600, 4, 32, 2880),
        attention=(128, 12, 0, 0),
        checkpoint=("mxfp4", Held(1_274_019_840.0, 4_423_680.0, 10_152_345_600.0, 1_158_266_880.0)),
        positions=131_072,
    ),
    "gpt-oss-120b": _entry(
        "gpt-oss 120B (MoE, 4 of 128 experts, mxfp4)",
        "openai/gpt-oss-120b",
        shape=(36, 2880, 64, 8, 64),
        params=(955_514_880, 13_271_040, 579_133_440),
        experts=(114_661_785_600, 4, 128, 2880),
        attention=(128, 18, 0, 0),
        checkpoint=("mxfp4", Held(1_911_029_760.0, 26_542_080.0, 60_914_073_600.0, 1_158_266_880.0)),
        positions=131_072,
    ),
}


def catalog_name(repository: str) -> str | None:
    """The catalog's name of a Hugging Face model id such as 'meta-llama/Llama-3.1-70B-Instruct', or None."""
    model = repository.lower().rsplit("/", 1)[-1]
    return max((name for name in LLMS if model == name or model.startswith(f"{name}-")), key=len, default=None)
