"""What one GPU of an instance runs in a step: the layers of an LLM, divided, and their seconds, bytes and FLOPs.

Tensor parallelism t divides heads and the widths of MLPs; a KV head is copied where there are fewer than t. Norms and
residuals are not divided, and both halves of a layer end with an all-reduce of the hidden state. Expert parallelism e
gives each GPU E / e whole experts instead of a slice of each. With data-parallel attention, d groups of t GPUs have
sequences of their own: rows and contexts of attention divide by d, and tokens are gathered for their experts and
scattered back. Pipeline stages s take s groups of sequences in turn: a token passes all layers, in s stages that see
1 / s of the rows each, and is handed on between them.

Everything here is built once for an engine: rows are looked up afterwards (`laws/mixed_step.py`). Gradients go through
the coefficients of the operator laws and the figures of the GPU.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.curve import Curve, curve_of
from fleetopt_jax.core.struct import pytree, static
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.host import HostLaw
from fleetopt_jax.laws.mixed_step import CLASSES, AttentionCost, Cost, MixedStep
from fleetopt_jax.laws.operators.collectives import CollectiveLaw, all_gather_s, all_reduce_s
from fleetopt_jax.laws.operators.elementwise import ElementwiseLaw, elementwise_s
from fleetopt_jax.laws.operators.experts import Experts, ExpertsLaw, experts_bytes, experts_flop, experts_s
from fleetopt_jax.laws.operators.gemm import GemmLaw, gemm_bytes, gemm_flop, gemm_s

KINDS = ("seconds", "bytes", "flops")


@pytree
class Cost3:
    """Seconds, bytes and FLOPs of something on one GPU."""

    seconds: Any
    bytes: Any
    flops: Any


@pytree
class OperatorLaws:
    """The laws of one GPU at the data types of one LLM."""

    gemm: dict[str, GemmLaw]  # by the form of weights that a `Product` names
    experts: ExpertsLaw | None
    reduce: CollectiveLaw  # all-reduces
    gather: CollectiveLaw  # all other collectives
    elementwise: ElementwiseLaw


@pytree
class Product:
    """A matrix, as one GPU has it."""

    outputs: Array
    inputs: Array
    copies: Array  # layers that have it
    rows_frac: Array  # of the instance's rows, those it multiplies [-]
    form: str = static(default="16 bits")  # of its weights, a key of `OperatorLaws.gemm`

    def cost(self, laws: OperatorLaws, gpu: Gpu, rows: ArrayLike) -> Cost3:
        """Of all copies, for `rows` of the instance."""
        law, shape = laws.gemm[self.form], (rows * self.rows_frac, self.outputs, self.inputs)
        one = Cost3(gemm_s(law, gpu, *shape), gemm_bytes(law, *shape), gemm_flop(*shape))
        return _times(self.copies, one)


@pytree
class ExpertLayers:
    """The routed experts of all layers that have them."""

    experts: Experts  # whole
    copies: Array
    rows_frac: Array
    tp: Array
    ep: Array

    def cost(self, laws: OperatorLaws, gpu: Gpu, rows: ArrayLike) -> Cost3:
        """Of all layers, for `rows` of the instance."""
        assert laws.experts is not None, "experts need a law"
        law, tokens = laws.experts, rows * self.rows_frac
        one = Cost3(
            experts_s(law, gpu, self.experts, tokens, self.tp, self.ep),
            experts_bytes(law, self.experts, tokens, self.tp, self.ep),
            experts_flop(law, self.experts, tokens, self.tp, self.ep),
        )
        return _times(self.copies, one)


@pytree
class Small:
    """Kernels between the large ones."""

    row_bytes: Array  # read and written for one row [B]
    copies: Array
    rows_frac: Array

    def cost(self, laws: OperatorLaws, gpu: Gpu, rows: ArrayLike) -> Cost3:
        """Of all copies, for `rows` of the instance."""
        n_bytes = rows * self.rows_frac * self.row_bytes
        seconds = elementwise_s(laws.elementwise, gpu, n_bytes)
        return _times(self.copies, Cost3(seconds, n_bytes, 0.0 * n_bytes))


@pytree
class Exchange:
    """Passing rows among GPUs."""

    row_bytes: Array  # of one row [B]
    n_gpus: Array
    copies: Array
    rows_frac: Array
    reduces: bool = static(default=True)  # an all-reduce; else an all-gather or a reduce-scatter

    def cost(self, laws: OperatorLaws, gpu: Gpu, rows: ArrayLike) -> Cost3:
        """Of all copies, for `rows` of the instance; what is passed is read and written once."""
        message = rows * self.rows_frac * self.row_bytes
        if self.reduces:
            seconds = all_reduce_s(laws.reduce, gpu, message, self.n_gpus)
        else:
            seconds = all_gather_s(laws.gather, gpu, message, self.n_gpus)
        return _times(self.copies, Cost3(seconds, 2.0 * message, 0.0 * message))


Part = Product | ExpertLayers | Small | Exchange
CLASS_OF = {Product: "gemm", ExpertLayers: "experts", Small: "elementwise", Exchange: "collectives"}


@pytree
class Stack:
    """All that one GPU runs for a step of its instance."""

    rows: tuple[Part, ...]  # what depends on the rows only
    head: tuple[Part, ...]  # and on the rows whose next token is asked for
    attention: tuple[Any, ...]  # layers with a state of each sequence, as `laws/layers.py` has them
    window_tokens: Array
    n_layers: Array  # that a step passes [-]


def _times(copies: ArrayLike, one: Cost3) -> Cost3:
    return jax.tree.map(lambda x: copies * x, one)
