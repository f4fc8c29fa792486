"""What one GPU of an instance runs in a step: the layers of an LLM, divided, and their seconds, bytes and FLOPs.

Tensor parallelism t divides heads and the widths of MLPs; a KV head is copied where there are fewer than t. Norms and
residuals are not divided, and both halves of a layer end with an all-reduce of the hidden state. Expert parallelism e
gives each GPU E / e whole experts instead of a slice of each. With data-parallel attention, d groups of t GPUs have
sequences of their own: rows and contexts of attention divide by d, and tokens are gathered for their experts and
scattered back. A step lasts as long as the fullest group's, and groups without sequences take part in it all the same
(engines run a dummy batch there): decoding sequences are dealt out in turn, of which the fullest group has (d - 1) / 2d
more than the mean, in the mean over their number, and a prompt is one group's (`laws/mixed_step.py`). Left out: that
contexts of few sequences add up to more in one group than in another. Pipeline stages s take s groups of sequences in
turn: a token passes all layers, in s stages that see 1 / s of the rows each, and is handed on between them, over the
link of a node even where stages are on several.

Everything here is built once for an engine: rows are looked up afterwards (`laws/mixed_step.py`). Gradients go through
the coefficients of the operator laws and the figures of the GPU.
"""

from functools import reduce
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.curve import KNOTS, curve_through
from fleetopt_jax.core.struct import pytree, stack, static
from fleetopt_jax.laws.hardware import Gpu, peak_of_bits
from fleetopt_jax.laws.host import HostLaw
from fleetopt_jax.laws.mixed_step import AMOUNTS, CLASSES, Amounts, Costs, MixedStep
from fleetopt_jax.laws.operators.collectives import CollectiveLaw, all_gather_s, all_reduce_s
from fleetopt_jax.laws.operators.elementwise import ElementwiseLaw, elementwise_s
from fleetopt_jax.laws.operators.experts import Experts, ExpertsLaw, experts_bytes, experts_flop, experts_s
from fleetopt_jax.laws.operators.gemm import GemmLaw, gemm_bytes, gemm_flop, gemm_s
from fleetopt_jax.laws.operators.latent_attention import LatentShape, latent_weights
from fleetopt_jax.laws.sequences import GroupedAttention, LatentAttention, RecurrentLayers, SequenceLaws, latent_rows_s


@pytree
class OperatorLaws:
    """The laws of one GPU at the data types of one LLM."""

    gemm: dict[str, GemmLaw]  # by the form of weights that a `Product` names
    experts: ExpertsLaw | None
    reduce: CollectiveLaw  # all-reduces
    gather: CollectiveLaw  # all other collectives
    elementwise: ElementwiseLaw
    sequences: SequenceLaws  # of layers that keep something of each sequence


@pytree
class Product:
    """A matrix, as one GPU has it."""

    outputs: Array
    inputs: Array
    copies: Array  # layers that have it
    rows_frac: Array  # of the instance's rows, those it multiplies [-]
    form: str = static(default="16 bits")  # of its weights, a key of `OperatorLaws.gemm`

    def cost(self, laws: OperatorLaws, gpu: Gpu, rows: ArrayLike) -> Amounts:
        """Of all copies, for `rows` of the instance."""
        law, shape = laws.gemm[self.form], (rows * self.rows_frac, self.outputs, self.inputs)
        flop = gemm_flop(*shape)
        one = Amounts(gemm_s(law, gpu, *shape), gemm_bytes(law, *shape), flop, flop / peak_of_bits(gpu, law.flop_bits))
        return _times(self.copies, one)


@pytree
class ExpertLayers:
    """The routed experts of all layers that have them."""

    experts: Experts  # whole
    copies: Array
    rows_frac: Array
    tp: Array
    ep: Array

    def cost(self, laws: OperatorLaws, gpu: Gpu, rows: ArrayLike) -> Amounts:
        """Of all layers, for `rows` of the instance."""
        assert laws.experts is not None, "experts need a law"
        law, tokens = laws.experts, rows * self.rows_frac
        flop = experts_flop(law, self.experts, tokens, self.tp, self.ep)
        one = Amounts(
            experts_s(law, gpu, self.experts, tokens, self.tp, self.ep),
            experts_bytes(law, self.experts, tokens, self.tp, self.ep),
            flop,
            flop / peak_of_bits(gpu, law.flop_bits),
        )
        return _times(self.copies, one)


@pytree
class Small:
    """Kernels between the large ones."""

    row_bytes: Array  # read and written for one row [B]
    copies: Array
    rows_frac: Array

    def cost(self, laws: OperatorLaws, gpu: Gpu, rows: ArrayLike) -> Amounts:
        """Of all copies, for `rows` of the instance."""
        n_bytes = rows * self.rows_frac * self.row_bytes
        seconds = elementwise_s(laws.elementwise, gpu, n_bytes)
        return _times(self.copies, Amounts(seconds, n_bytes, 0.0 * n_bytes, 0.0 * n_bytes))


@pytree
class Exchange:
    """Passing rows among GPUs."""

    row_bytes: Array  # of one row [B]
    n_gpus: Array
    copies: Array
    rows_frac: Array
    reduces: bool = static(default=True)  # an all-reduce; else an all-gather or a reduce-scatter

    def cost(self, laws: OperatorLaws, gpu: Gpu, rows: ArrayLike) -> Amounts:
        """Of all copies, for `rows` of the instance; what is passed is read and written once, by a lone GPU nothing."""
        message = rows * self.rows_frac * self.row_bytes * (self.n_gpus > 1)
        if self.reduces:
            seconds = all_reduce_s(laws.reduce, gpu, message, self.n_gpus)
        else:
            seconds = all_gather_s(laws.gather, gpu, message, self.n_gpus)
        return _times(self.copies, Amounts(seconds, 2.0 * message, 0.0 * message, 0.0 * message))


@pytree
class LatentProjections:
    """What layers of latent attention do for every row: projections, norms, rotary embedding, the cache's entry."""

    shape: LatentShape  # on this GPU
    copies: Array
    rows_frac: Array

    def cost(self, laws: OperatorLaws, gpu: Gpu, rows: ArrayLike) -> Amounts:
        """Of all layers, for `rows` of the instance."""
        law, seen, weights = laws.sequences.latent_decode, rows * self.rows_frac, latent_weights(self.shape)
        assert law is not None, "latent attention needs its law"
        flop = 2.0 * seen * weights
        n_bytes = law.weight_bytes * weights + 0.0 * seen
        peak_s = flop / peak_of_bits(gpu, 8.0 * law.weight_bytes)
        return _times(self.copies, Amounts(latent_rows_s(laws.sequences, gpu, self.shape, seen), n_bytes, flop, peak_s))


SequenceLayers = GroupedAttention | LatentAttention | RecurrentLayers
Part = Product | ExpertLayers | Small | Exchange | LatentProjections
CLASS_OF = {
    Product: "gemm",
    LatentProjections: "gemm",
    ExpertLayers: "experts",
    Small: "elementwise",
    Exchange: "collectives",
}


@pytree
class Stack:
    """All that one GPU runs for a step of its instance."""

    rows: tuple[Part, ...]  # what depends on the rows only
    groups: tuple[Part, ...]  # of it, where there are several groups, what each does for itself: not in `rows`
    head: tuple[Part, ...]  # and on the rows whose next token is asked for
    attention: tuple[SequenceLayers, ...]  # layers that keep something of each sequence
    window_tokens: Array
    n_layers: Array  # that a step passes [-]
    n_groups: Array  # that prompts are of, one each; 1 where the engine deals them out evenly [-]


def mixed_step(whole: Stack, laws: OperatorLaws, gpu: Gpu, host: HostLaw) -> MixedStep:
    """The step of an instance of which each GPU runs `whole`."""
    nothing = Amounts(*(np.zeros_like(KNOTS) for _ in AMOUNTS))
    rows, groups = (_by_class(parts, laws, gpu, nothing) for parts in (whole.rows, whole.groups))  # [amount, class]
    seconds, n_bytes, flops, peak_s = (AMOUNTS.index(name) for name in ("seconds", "bytes", "flops", "peak_s"))
    both = rows + groups
    costs = stack([rows[seconds], both[n_bytes], both[flops], both[peak_s]])
    head = reduce(_sum, (part.cost(laws, gpu, KNOTS) for part in whole.head), nothing)
    attention = reduce(_sum, (layers.cost(laws.sequences, gpu) for layers in whole.attention))
    of_head, of_attention = (stack([getattr(amounts, name) for name in AMOUNTS]) for amounts in (head, attention))
    return MixedStep(
        rows_s=curve_through(_in_engine(rows[seconds], host)),
        groups_s=curve_through(_in_engine(groups[seconds], host)) if whole.groups else None,
        head_s=curve_through(head.seconds),
        attention_s=attention.seconds,
        window_tokens=whole.window_tokens,
        n_layers=whole.n_layers,
        host=host,
        costs=Costs(
            rows=curve_through(costs),
            groups=curve_through(stack([groups[seconds], groups[peak_s]])) if whole.groups else None,
            head=curve_through(of_head),
            attention=of_attention,
            n_groups=whole.n_groups if whole.groups else None,
        ),
    )


def _by_class(parts: tuple[Part, ...], laws: OperatorLaws, gpu: Gpu, nothing: Amounts) -> Array:
    """What parts cost at every knot [amount, class, knot]."""
    by_class: dict[str, Amounts] = dict.fromkeys(CLASSES, nothing)
    for part in parts:
        name = CLASS_OF[type(part)]
        by_class[name] = _sum(by_class[name], part.cost(laws, gpu, KNOTS))
    return stack([stack([getattr(one, name) for one in by_class.values()]) for name in AMOUNTS])


def _in_engine(seconds: Array, host: HostLaw) -> Array:
    """Of [class, knot] the sum over classes, with collectives as long as they take in the engine [s]."""
    passed = CLASSES.index("collectives")
    return seconds.sum(axis=0) + (host.exchanges(KNOTS) - 1.0) * seconds[passed]


def _times(copies: ArrayLike, one: Amounts) -> Amounts:
    return jax.tree.map(lambda x: copies * x, one)


def _sum(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: x + y, a, b)
