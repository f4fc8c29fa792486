"""The mixed step of an LLM on GPUs: its layers divided as asked, with the operator laws of the GPU and data types and
the host law of the serving engine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.catalog.hosts import NEWEST, HostEntry, host_entry
from fleetopt_jax.catalog.llms import KV_BYTES, held_at
from fleetopt_jax.catalog.operators import OperatorEntry, operator_entry
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.laws.factors import StepFactors
from fleetopt_jax.laws.mixed_step import MixedStep
from fleetopt_jax.laws.operators.experts import make_experts
from fleetopt_jax.laws.operators.latent_attention import LatentShape, make_latent_shape
from fleetopt_jax.laws.operators.recurrent import delta_net_shape, mamba_shape
from fleetopt_jax.laws.sequences import GroupedAttention, LatentAttention, RecurrentLayers, SequenceLaws
from fleetopt_jax.laws.stack import (
    Exchange,
    ExpertLayers,
    LatentProjections,
    OperatorLaws,
    Part,
    Product,
    SequenceLayers,
    Small,
    Stack,
    mixed_step,
)

ELEMENT_BYTES = 2.0  # of an activation
PLAIN_DIM = 128  # of latent attention's heads without position and of its values, where a file does not say: DeepSeek's
MAMBA_1_HEAD = 64  # channels that count as a head, where a state space has none
# Engines that hold prompts back until every group has some, as TensorRT-LLM was measured (attention_dp_config with
# enable_balance, up to 60 iterations; InferenceX's launchers): their steps have prompts dealt out evenly, and first
# tokens come later by a wait that nothing here describes. The others take prompts as they come (vLLM's #51199).
DEALS_PROMPTS_OUT = ("trtllm",)
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

    def passes(self, n: int, form: str) -> float:
        """Bytes that a small kernel before a product moves for each element: `n` passes of 16 bits. Where the product
        quantizes its inputs, engines do that in the small kernel: what it would write, and the product read, is not."""
        quantized = self.gemm[form] not in ("bf16", "int4", "mxfp4")
        return ELEMENT_BYTES * (n - 2 * quantized)


@dataclass(frozen=True, eq=False)
class StepEntry:
    """A mixed step, with where its laws are from."""

    step: MixedStep
    host: HostEntry
    operators: tuple[OperatorEntry, ...]

    @property
    def quality(self) -> Literal["kernels", "projected"]:
        """Whether the operators were timed on this GPU, or some borrowed; small ones, which nobody timed, aside."""
        return "projected" if any(entry.borrowed for entry in self.timed) else "kernels"

    @property
    def timed(self) -> tuple[OperatorEntry, ...]:
        """The operators that somebody timed somewhere."""
        return tuple(entry for entry in self.operators if entry.operator != "elementwise")


def step_entry(
    a: Architecture,
    gpu: GpuEntry,
    split: Parallelism,
    precision: str,
    kv_precision: str = "bf16",
    serving: str = NEWEST,
    factors: StepFactors | None = None,
) -> StepEntry:
    """The mixed step of an LLM on an instance, by the newest releases of vLLM where no other engine is asked for, with
    `factors` of one's own.

    >>> from fleetopt_jax.catalog.gpus import GPUS
    >>> from fleetopt_jax.catalog.llms import LLMS
    >>> from fleetopt_jax.laws.mixed_step import decoding
    >>> llama = LLMS["llama-3.1-70b"].architecture
    >>> step = step_entry(llama, GPUS["h100"], Parallelism(tp=8), "fp8").step
    >>> 0.008 < float(step.step_s(decoding(4, 1500.0))) < 0.010
    True
    """
    _check(a, split)
    types = data_types(a, gpu, precision, kv_precision)
    laws, operators = operator_laws(gpu, a, types)
    if split.n_gpus == 1:  # which passes nothing on
        operators = tuple(entry for entry in operators if entry.operator != "collectives")
    host = host_entry(serving, gpu, experts=a.n_experts > 0)
    law = factors.of_host(host.law) if factors else host.law
    whole = stack_of(a, split, types, serving)
    return StepEntry(mixed_step(whole, laws, gpu.gpu, law.of_each(split.dp)), host, operators)


def _check(a: Architecture, split: Parallelism) -> None:
    """Refuse what an LLM cannot be divided into."""
    for name in ("tp", "ep", "dp", "pp"):
        if getattr(split, name) < 1:
            raise BadField(name, f"{getattr(split, name)}", "need at least 1")
    if a.q_heads % split.tp:
        raise BadField("tp", f"{split.tp} GPUs cannot share {a.q_heads} heads", "need a divisor of the heads")
    if split.pp > a.layers:
        raise BadField("pp", f"{split.pp} stages of {a.layers} layers", "need no more stages than layers")
    if split.ep > 1 and not a.n_experts:
        raise BadField("ep", f"{split.ep} groups of experts, and the LLM has no experts", "need 1")
    if split.expert_gpus % split.ep or (split.ep > 1 and a.n_experts % split.ep):
        raise BadField(
            "ep",
            f"{split.ep} groups of {a.n_experts} experts on {split.expert_gpus} GPUs",
            "need a divisor of the experts and of the GPUs of a layer",
        )


def data_types(a: Architecture, gpu: GpuEntry, precision: str, kv_precision: str) -> DataTypes:
    """As a checkpoint holds its parts: whatever takes more than 12 bits a weight is multiplied in 16.

    Checkpoints of experts in fp8 scale blocks of 128 x 128 (DeepSeek, Qwen, MiniMax), dense ones whole matrices.
    """
    held = held_at(a, precision)
    kind = "fp8_block" if precision == "fp8" and a.n_experts else precision
    experts = kind
    if kind == "mxfp4":  # by its 8-bit units; else by Marlin's kernels for 4-bit weights, as vLLM is benchmarked
        experts = "mxfp4_mxfp8" if "nvfp4" in gpu.formats else "int4"

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
    gemm = {form: operator_entry("gemm", gpu, variant) for form, variant in types.gemm.items()}
    sequences = _sequence_entries(gpu, a, types)
    others = {
        "reduce": operator_entry("collectives", gpu, "all_reduce"),
        "gather": operator_entry("collectives", gpu, "exchange"),
        "elementwise": operator_entry("elementwise", gpu, "bf16"),
    }
    if a.n_experts:
        others["experts"] = operator_entry("experts", gpu, types.experts)
    laws = OperatorLaws(
        gemm={form: entry.law for form, entry in gemm.items()},
        sequences=SequenceLaws(**{name: entry.law for name, entry in sequences.items()}),
        **{"experts": None, **{name: entry.law for name, entry in others.items()}},
    )
    return laws, (*gemm.values(), *sequences.values(), *others.values())


def _sequence_entries(gpu: GpuEntry, a: Architecture, types: DataTypes) -> dict[str, OperatorEntry]:
    """The laws of layers that keep something of each sequence, as `SequenceLaws` names them."""
    cache = "fp8" if types.kv_bytes == 1.0 else "bf16"
    found = {}
    for phase in ("decode", "prefill"):
        if a.latent_dim:
            weights = {"fp8": "fp8_block", "nvfp4": "nvfp4", "fp8_block": "fp8_block"}.get(types.attention, "bf16")
            wanted = [f"{phase}_{w}_{c}" for w in (weights, "bf16") for c in (cache, "bf16")]
            found[f"latent_{phase}"] = operator_entry("latent_attention", gpu, *wanted)
        else:
            operator = f"{phase}_attention"
            found[phase] = operator_entry(operator, gpu, cache, "bf16")
            windowed = (f"{cache}_windowed", cache, "bf16") if a.windowed_layers else (cache, "bf16")
            found[f"windowed_{phase}"] = operator_entry(operator, gpu, *windowed)
        if a.widths.linear or a.widths.states:
            found[f"recurrent_{phase}"] = operator_entry("recurrent", gpu, phase)
    return found


def stack_of(a: Architecture, split: Parallelism, types: DataTypes, serving: str = NEWEST) -> Stack:
    """What one GPU of an instance has of an LLM, its groups given prompts as the serving engine does."""
    rows = _attention_rows(a, split, types), _feed_forward(a, split, types), _between_stages(a, split)
    parts = [part for parts in rows for part in parts]
    own = [split.dp > 1 and float(part.rows_frac) < 1.0 / split.pp for part in parts]  # a group's rows, not all
    return Stack(
        rows=tuple(part for part, mine in zip(parts, own, strict=True) if not mine),
        groups=tuple(part for part, mine in zip(parts, own, strict=True) if mine),
        head=tuple(_head(a, split)),
        attention=tuple(_sequences(a, split, types)),
        **as_floats(
            window_tokens=a.window_tokens if a.windowed_layers else 0.0,
            n_layers=a.layers,
            n_groups=1 if serving in DEALS_PROMPTS_OUT else split.dp,
        ),
    )


def _attention_rows(a: Architecture, split: Parallelism, types: DataTypes) -> Iterator[Part]:
    """Of the first half of each layer, what depends on rows only."""
    n, share = a.layers - a.cacheless_layers, 1.0 / (split.dp * split.pp)
    if a.latent_dim:
        yield LatentProjections(_latent_shape(a, split), **as_floats(copies=n, rows_frac=share))
    else:
        heads, kv_heads = a.q_heads / split.tp, max(1.0, a.kv_heads / split.tp)
        queries, shared = heads * a.head_dim, kv_heads * a.head_dim
        yield _product(queries * (1 + a.widths.query_gate) + 2 * shared, a.hidden, n, share, "attention")
        yield _product(a.hidden, queries, n, share, "attention")
        yield _small(2 * (queries + shared) * ELEMENT_BYTES, n, share)  # rotary embedding
        yield _small(2 * shared * (ELEMENT_BYTES + types.kv_bytes), n, share)  # into the cache
    for inputs, outputs in _recurrent_widths(a):
        yield _product(inputs / split.tp, a.hidden, a.cacheless_layers, share, "attention")
        yield _product(a.hidden, outputs / split.tp, a.cacheless_layers, share, "attention")
    yield _small(a.hidden * types.passes(4, "attention"), a.layers, share)  # the norm, and the residual added
    yield _exchange(a.hidden, split.tp, a.layers, share)


def _recurrent_widths(a: Architecture) -> Iterator[tuple[float, float]]:
    """(outputs of the first projection, inputs of the last) of layers with a state, whole."""
    linear, states = a.widths.linear, a.widths.states
    if linear is not None:
        keys, values = linear.key_heads * linear.key_dim, linear.value_heads * linear.value_dim
        yield 2 * keys + 2 * values + 2 * linear.value_heads, values
    if states is not None:
        yield 2 * states.channels + 2 * states.groups * states.states + states.heads, states.channels


def _latent_shape(a: Architecture, split: Parallelism) -> LatentShape:
    w = a.widths
    return make_latent_shape(
        heads=a.q_heads / split.tp,
        hidden=a.hidden,
        query_rank=w.query_rank,
        latent_dim=a.latent_dim,
        rope_dim=a.rope_dim,
        nope_dim=w.nope_dim or PLAIN_DIM,
        value_dim=w.value_dim or PLAIN_DIM,
    )


def _feed_forward(a: Architecture, split: Parallelism, types: DataTypes) -> Iterator[Part]:
    """Of the second half of each layer."""
    w, share = a.widths, 1.0 / (split.dp * split.pp)
    matrices = 2 if w.gated else 1
    for width, layers in ((w.mlp, w.mlp_layers), (w.shared, w.expert_layers)):
        if width and layers:
            mine = width / split.tp
            yield _product(matrices * mine, a.hidden, layers, share, "dense")
            yield _product(a.hidden, mine, layers, share, "dense")
            yield _small(mine * types.passes(matrices + 1, "dense"), layers, share)  # the activation
    norm = types.passes(4, "dense" if w.mlp_layers else "16 bits")  # experts read the rows in 16 bits
    yield _small(a.hidden * norm, a.layers, share)  # the norm, and the residual added
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
        **as_floats(copies=w.expert_layers, rows_frac=1.0 / split.pp, tp=split.expert_gpus / split.ep, ep=split.ep),
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


def _sequences(a: Architecture, split: Parallelism, types: DataTypes) -> Iterator[SequenceLayers]:
    """Layers that keep something of each sequence."""
    n, share = a.layers - a.cacheless_layers, 1.0 / (split.dp * split.pp)
    more = (split.dp - 1) / 2.0 * share  # of n dealt out to groups in turn, in the mean over n
    if a.latent_dim:
        numbers = as_floats(layers=n, kv_bytes=types.kv_bytes, sequences_frac=share, sequences_more=more)
        yield LatentAttention(_latent_shape(a, split), **numbers)
    else:
        yield GroupedAttention(
            **as_floats(
                layers=n - a.windowed_layers,
                windowed_layers=a.windowed_layers,
                window_tokens=a.window_tokens,
                heads=a.q_heads / split.tp,
                kv_heads=max(1.0, a.kv_heads / split.tp),
                head_dim=a.head_dim,
                kv_bytes=types.kv_bytes,
                sequences_frac=share,
                sequences_more=more,
            )
        )
    linear, states = a.widths.linear, a.widths.states
    stateful = as_floats(layers=a.cacheless_layers, sequences_frac=share, sequences_more=more)
    if linear is not None:
        shape = delta_net_shape(
            key_heads=max(linear.key_heads / split.tp, 1.0),
            value_heads=max(linear.value_heads / split.tp, 1.0),
            key_dim=linear.key_dim,
            value_dim=linear.value_dim,
        )
        yield RecurrentLayers(shape, **stateful)
    if states is not None:
        heads = (states.heads or states.channels / MAMBA_1_HEAD) / split.tp
        shape = mamba_shape(
            heads=max(heads, 1.0),
            head_dim=states.channels / (states.heads or states.channels / MAMBA_1_HEAD),
            state_dim=states.states,
            groups=max(states.groups / split.tp, 1.0) if states.heads else 0.0,
        )
        yield RecurrentLayers(shape, **stateful)


def _product(outputs: float, inputs: float, copies: float, rows_frac: float, form: str) -> Product:
    return Product(**as_floats(outputs=outputs, inputs=inputs, copies=copies, rows_frac=rows_frac), form=form)


def _small(row_bytes: float, copies: float, rows_frac: float) -> Small:
    return Small(**as_floats(row_bytes=row_bytes, copies=copies, rows_frac=rows_frac))


def _exchange(width: float, n_gpus: int, copies: float, rows_frac: float, *, reduces: bool = True) -> Exchange:
    numbers = as_floats(row_bytes=width * ELEMENT_BYTES, n_gpus=n_gpus, copies=copies, rows_frac=rows_frac)
    return Exchange(**numbers, reduces=reduces)
