"""The mixed step of an LLM on GPUs: its layers divided as asked, with the operator laws of the GPU and data types and
the host law of the serving engine."""

from collections.abc import Iterator
from dataclasses import dataclass

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.catalog.hosts import host_entry
from fleetopt_jax.catalog.llms import KV_BYTES, PRECISIONS, held_at
from fleetopt_jax.catalog.operators import OperatorEntry, operator_entry
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.laws.mixed_step import MixedStep
from fleetopt_jax.laws.operators.experts import make_experts
from fleetopt_jax.laws.sequences import AttentionLaws, GroupedAttention
from fleetopt_jax.laws.stack import (
    Exchange,
    ExpertLayers,
    OperatorLaws,
    Part,
    Product,
    Small,
    Stack,
    mixed_step,
)

ELEMENT_BYTES = 2.0  # of an activation
LOGIT_BYTES = 4.0  # of a logit, which sampling reads and writes in 32 bits


@dataclass(frozen=True)
class Parallelism:
    """How the GPUs of an instance share an LLM."""

    tp: int = 1  # GPUs that divide heads and widths
    ep: int = 1  # groups of GPUs that divide the experts whole
    dp: int = 1  # groups of tp GPUs with sequences of their own
    pp: int = 1  # stages of layers

    @property
    def n_gpus(self) -> int:
        """Of the instance."""
        return self.tp * self.dp * self.pp

    @property
    def expert_gpus(self) -> int:
        """That the experts of a layer are spread over."""
        return self.tp * self.dp


@dataclass(frozen=True)
class DataTypes:
    """What the matrices of an LLM are held and multiplied in: variants of the operator laws."""

    attention: str
    dense: str
    experts: str
    kv_bytes: float  # of a value in the cache

    @property
    def gemm(self) -> dict[str, str]:
        """By the form that a `Product` names."""
        return {"attention": self.attention, "dense": self.dense, "16 bits": "bf16"}


def data_types(a: Architecture, gpu: GpuEntry, precision: str, kv_precision: str) -> DataTypes:
    """As a checkpoint holds its parts: whatever takes more than 12 bits a weight is multiplied in 16.

    Checkpoints of experts in fp8 scale blocks of 128 x 128 (DeepSeek, Qwen, MiniMax), dense ones whole matrices.
    """
    held = held_at(a, precision)
    kind = "fp8_block" if precision == "fp8" and a.n_experts else precision
    experts = f"{kind}_mxfp8" if kind == "mxfp4" and "nvfp4" in gpu.formats else kind  # as its 8-bit units take them

    def of(n_bytes: float, n_params: float, kind: str = kind) -> str:
        return kind if n_params and n_bytes / n_params < 1.5 else "bf16"

    return DataTypes(
        attention=of(held.attention_bytes, a.attention_params),
        dense=of(held.dense_bytes, a.dense_params),
        experts=of(held.expert_bytes, a.expert_params, experts),
        kv_bytes=KV_BYTES[kv_precision],
    )


def operator_laws(gpu: GpuEntry, a: Architecture, types: DataTypes) -> tuple[OperatorLaws, tuple[OperatorEntry, ...]]:
    """The laws of a GPU at the data types of an LLM, and where each is from."""
    cache = "fp8" if types.kv_bytes == 1.0 else "bf16"
    gemm = {form: operator_entry("gemm", gpu, variant) for form, variant in types.gemm.items()}
    attention = {
        f"{windowed}{phase}": operator_entry(f"{phase}_attention", gpu, f"{cache}{'_windowed' if windowed else ''}")
        for phase in ("decode", "prefill")
        for windowed in ("", "windowed_")
    }
    others = {
        "reduce": operator_entry("collectives", gpu, "all_reduce"),
        "gather": operator_entry("collectives", gpu, "exchange"),
        "elementwise": operator_entry("elementwise", gpu, "bf16"),
    }
    if a.n_experts:
        others["experts"] = operator_entry("experts", gpu, types.experts)
    laws = OperatorLaws(
        gemm={form: entry.law for form, entry in gemm.items()},
        attention=AttentionLaws(**{name: entry.law for name, entry in attention.items()}),
        **{"experts": None, **{name: entry.law for name, entry in others.items()}},
    )
    return laws, (*gemm.values(), *attention.values(), *others.values())


def stack_of(a: Architecture, split: Parallelism, types: DataTypes) -> Stack:
    """What one GPU of an instance has of an LLM."""
    rows = _attention_rows(a, split, types), _feed_forward(a, split), _between_stages(a, split)
    return Stack(
        rows=tuple(part for parts in rows for part in parts),
        head=tuple(_head(a, split)),
        attention=tuple(_attention(a, split, types)),
        **as_floats(window_tokens=a.window_tokens if a.windowed_layers else 0.0, n_layers=a.layers),
    )


def _attention_rows(a: Architecture, split: Parallelism, types: DataTypes) -> Iterator[Part]:
    """Of the first half of each layer, what depends on rows only."""
    n, share = a.layers - a.cacheless_layers, 1.0 / (split.dp * split.pp)
    heads, kv_heads = a.q_heads / split.tp, max(1.0, a.kv_heads / split.tp)
    queries, shared = heads * a.head_dim, kv_heads * a.head_dim
    yield _product(queries * (1 + a.widths.query_gate) + 2 * shared, a.hidden, n, share, "attention")
    yield _product(a.hidden, queries, n, share, "attention")
    yield _small(4 * a.hidden * ELEMENT_BYTES, n, share)  # the norm, and the residual added
    yield _small(2 * (queries + shared) * ELEMENT_BYTES, n, share)  # rotary embedding
    yield _small(2 * shared * (ELEMENT_BYTES + types.kv_bytes), n, share)  # into the cache
    yield _exchange(a.hidden, split.tp, n, share)


def _feed_forward(a: Architecture, split: Parallelism) -> Iterator[Part]:
    """Of the second half of each layer."""
    w, share = a.widths, 1.0 / (split.dp * split.pp)
    matrices = 2 if w.gated else 1
    for width, layers in ((w.mlp, w.mlp_layers), (w.shared, w.expert_layers)):
        if width and layers:
            mine = width / split.tp
            yield _product(matrices * mine, a.hidden, layers, share, "dense")
            yield _product(a.hidden, mine, layers, share, "dense")
            yield _small((matrices + 1) * mine * ELEMENT_BYTES, layers, share)  # the activation
    yield _small(4 * a.hidden * ELEMENT_BYTES, a.layers, share)  # the norm, and the residual added
    if w.mlp_layers or split.dp == 1:
        yield _exchange(a.hidden, split.tp, a.layers if split.dp == 1 else w.mlp_layers, share)
    if w.expert_layers:
        yield from _experts(a, split)


def _experts(a: Architecture, split: Parallelism) -> Iterator[Part]:
    w, share = a.widths, 1.0 / (split.dp * split.pp)
    yield _product(a.n_experts, a.hidden, w.expert_layers, share, "16 bits")  # the router
    yield _small(3 * a.n_experts * ELEMENT_BYTES, w.expert_layers, share)  # and its choice
    yield ExpertLayers(
        experts=make_experts(
            hidden=a.hidden,
            width=a.expert_width,
            per_token=a.experts_per_token,
            n_experts=a.n_experts,
            matrices=3.0 if w.gated else 2.0,
        ),
        **as_floats(
            copies=w.expert_layers, rows_frac=1.0 / split.pp, tp=split.expert_gpus / split.ep, ep=split.ep
        ),
    )
    if split.dp > 1:  # rows are gathered from all groups, and scattered back
        yield _exchange(a.hidden, split.expert_gpus, 2 * w.expert_layers, 1.0 / split.pp, reduces=False)


def _between_stages(a: Architecture, split: Parallelism) -> Iterator[Part]:
    """The embedding, and the hidden state handed on to the next stage: half of what two GPUs gather."""
    yield _exchange(a.hidden, split.tp, 1, 1.0 / (split.dp * split.pp))
    if split.pp > 1:
        yield _exchange(2 * a.hidden, 2, split.pp - 1, 1.0 / (split.dp * split.pp), reduces=False)


def _head(a: Architecture, split: Parallelism) -> Iterator[Part]:
    """The last norm, the output layer, its logits brought together, and sampling: softmax, a draw, and a copy."""
    share = 1.0 / (split.dp * split.pp)
    yield _small(4 * a.hidden * ELEMENT_BYTES, 1, share)
    yield _product(a.vocabulary / split.tp, a.hidden, 1, share, "16 bits")
    yield _exchange(a.vocabulary, split.tp, 1, share, reduces=False)
    yield _small(2 * a.vocabulary * LOGIT_BYTES, 3, share)


def _attention(a: Architecture, split: Parallelism, types: DataTypes) -> Iterator[GroupedAttention]:
    yield GroupedAttention(
        **as_floats(
            layers=a.layers - a.cacheless_layers - a.windowed_layers,
            windowed_layers=a.windowed_layers,
            window_tokens=a.window_tokens,
            heads=a.q_heads / split.tp,
            kv_heads=max(1.0, a.kv_heads / split.tp),
            head_dim=a.head_dim,
            kv_bytes=types.kv_bytes,
            sequences_frac=1.0 / (split.dp * split.pp),
        )
    )


def _product(outputs: float, inputs: float, copies: float, rows_frac: float, form: str) -> Product:
    return Product(**as_floats(outputs=outputs, inputs=inputs, copies=copies, rows_frac=rows_frac), form=form)


def _small(row_bytes: float, copies: float, rows_frac: float) -> Small:
    return Small(**as_floats(row_bytes=row_bytes, copies=copies, rows_frac=rows_frac))


def _exchange(width: float, n_gpus: int, copies: float, rows_frac: float, *, reduces: bool = True) -> Exchange:
    numbers = as_floats(row_bytes=width * ELEMENT_BYTES, n_gpus=n_gpus, copies=copies, rows_frac=rows_frac)
    return Exchange(**numbers, reduces=reduces)
