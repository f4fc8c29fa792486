"""Seconds of the small operators between the large ones: norms, activations, rotary embedding, cache writes.

    t = launch + bytes / (efficiency bandwidth)

Each reads and writes its tensors once, 16 bits an element, in one kernel. Nobody has published timings of them: they
are projected. The launch is that of the smallest 16-bit GEMMs of the GPU, which have next to nothing to do; the
efficiency is what decode attention reaches over more than 1 GB of KV cache, which is reading alone. Holds where
tensors come from memory; a small one that is still in the L2 cache is quicker, but then the launch decides. What an
engine fuses is one kernel here: a norm adds the residual, an activation multiplies the gate, and each may write 8 bits
instead of 16. They do not divide over tensor parallelism but for activations, rotary embedding and cache writes,
whose widths the caller divides.

"""

import math

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.laws.hardware import Gpu

ELEMENT_BYTES = 2.0  # of activations


@pytree
class ElementwiseLaw:
    """Coefficients of one GPU. Every field is traced; shape () or a leading vmap axis."""

    launch_s: Array  # of one kernel [s]
    efficiency: Array  # share of the memory's bytes/s [-]


def make_elementwise_law(*, launch_s: float, efficiency: float) -> ElementwiseLaw:
    """A checked `ElementwiseLaw`."""
    if not (0 < launch_s < math.inf and 0 < efficiency <= 1):
        raise ValueError(f"need a positive, finite launch_s and efficiency in (0, 1], got {launch_s}, {efficiency}")
    return ElementwiseLaw(**as_floats(launch_s=launch_s, efficiency=efficiency))


def elementwise_s(law: ElementwiseLaw, gpu: Gpu, n_bytes: ArrayLike) -> Array:
    """Time of one kernel that reads and writes `n_bytes` in all [s]."""
    return law.launch_s + n_bytes / (law.efficiency * gpu.bandwidth_bytes_per_s)


def norm_s(law: ElementwiseLaw, gpu: Gpu, rows: ArrayLike, width: ArrayLike) -> Array:
    """Time to add `rows` of `width` elements to the residual and normalise them [s]: two read, two written."""
    return elementwise_s(law, gpu, 4.0 * ELEMENT_BYTES * rows * width)


def activation_s(law: ElementwiseLaw, gpu: Gpu, rows: ArrayLike, width: ArrayLike) -> Array:
    """Time of a gated activation of `rows` with `width` elements each [s]: gate and value read, one written."""
    return elementwise_s(law, gpu, 3.0 * ELEMENT_BYTES * rows * width)


def rope_s(law: ElementwiseLaw, gpu: Gpu, rows: ArrayLike, width: ArrayLike) -> Array:
    """Time to rotate queries and keys of `rows`, `width` elements in all each [s]: in place."""
    return elementwise_s(law, gpu, 2.0 * ELEMENT_BYTES * rows * width)


def cache_write_s(law: ElementwiseLaw, gpu: Gpu, rows: ArrayLike, width: ArrayLike, kv_bytes: ArrayLike) -> Array:
    """Time to write keys and values of `rows`, `width` elements each, into a cache of `kv_bytes` an element [s]."""
    return elementwise_s(law, gpu, (ELEMENT_BYTES + kv_bytes) * rows * width)
