"""What one GPU of an instance runs in a step: the layers of an LLM, divided, and their seconds, bytes and FLOPs.

Tensor parallelism t divides heads and the widths of MLPs; a KV head is copied where there are fewer than t. Norms and
residuals are not divided, and both halves of a layer end with an all-reduce of the hidden state. Expert parallelism e
gives each GPU E / e whole experts instead of a slice of each. With data-parallel attention, d groups of t GPUs have
sequences of their own: rows and contexts of attention divide by d, and tokens are gathered for their experts and
scattered back. Pipeline stages s take s groups of sequences in turn: a token passes all layers, in s stages that see
1 / s of the rows each, and is handed on between them.

Everything here is built once for an engine: rows are looked up afterwards (`laws/mixed_step.py`). Gradients go through
the coefficients of the operator laws and the GPU's figures.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.curve import Curve, curve_of
from fleetopt_jax.core.struct import pytree, static
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.host import HostLaw
from fleetopt_jax.laws.mixed_step import CLASSES, AttentionCost, Cost, MixedStep
from fleetopt_jax.laws.operators.collectives import CollectiveLaw, all_gather_s, all_reduce_s
from fleetopt_jax.laws.operators.elementwise import ElementwiseLaw, elementwise_s
from fleetopt_jax.laws.operators.gemm import GemmLaw, gemm_bytes, gemm_flop, gemm_s

ACTIVATION_BYTES = 2.0  # of an element of the hidden state


@pytree
class OperatorLaws:
    """The laws of one GPU at the data types of one LLM."""

    gemm: dict[str, GemmLaw]  # by the form of the weights that a `Product` names
    reduce: CollectiveLaw  # all-reduces
    gather: CollectiveLaw  # all other collectives
    elementwise: ElementwiseLaw


@pytree
class Product:
    """A matrix of a layer, as one GPU has it."""

    outputs: Array
    inputs: Array
    copies: Array  # layers that have it
    rows_frac: Array  # of the instance's rows, those it multiplies [-]
    form: str = static(default="16 bits")  # of its weights, a key of `OperatorLaws.gemm`


@pytree
class Small:
    """Kernels between the large ones."""

    width_bytes: Array  # read and written for one row [B]
    copies: Array
    rows_frac: Array


@pytree
class Exchange:
    """Passing the rows of the hidden state among GPUs."""

    row_bytes: Array  # of one row [B]
    n_gpus: Array
    copies: Array
    rows_frac: Array
    reduces: bool = static(default=True)  # an all-reduce; else an all-gather or a reduce-scatter


Rows = tuple[Array, Array, Array]  # seconds, bytes, FLOPs


def product_cost(laws: OperatorLaws, gpu: Gpu, product: Product, rows: ArrayLike) -> Rows:
    """Of `rows` of the instance through all copies of a matrix."""
    law, seen = laws.gemm[product.form], rows * product.rows_frac
    shape = seen, product.outputs, product.inputs
    one = gemm_s(law, gpu, *shape), gemm_bytes(law, *shape), gemm_flop(*shape)
    return cast(Rows, tuple(product.copies * x for x in one))


def small_cost(laws: OperatorLaws, gpu: Gpu, small: Small, rows: ArrayLike) -> Rows:
    """Of all copies of a small kernel."""
    n_bytes = rows * small.rows_frac * small.width_bytes
    seconds = small.copies * elementwise_s(laws.elementwise, gpu, n_bytes)
    return seconds, small.copies * n_bytes, jnp.zeros_like(seconds)


def exchange_cost(laws: OperatorLaws, gpu: Gpu, exchange: Exchange, rows: ArrayLike) -> Rows:
    """Of all copies of a collective; its bytes pass the memory twice."""
    message = rows * exchange.rows_frac * exchange.row_bytes
    passed_s = all_reduce_s if exchange.reduces else all_gather_s
    seconds = exchange.copies * passed_s(laws.reduce if exchange.reduces else laws.gather, gpu, message, exchange.n_gpus)
    return seconds, exchange.copies * 2.0 * message, jnp.zeros_like(seconds)
