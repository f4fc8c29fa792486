"""Seconds of the small operators between the large ones: norms, activations, rotary embedding, cache writes.

    t = launch + bytes / (efficiency bandwidth)

Each reads and writes its tensors once, in one kernel: of a row of 16-bit elements, a norm that adds to the residual
moves 4 widths, a gated activation 3, the rotary embedding 2 (in place), a cache write 1 and that of the cache. Nobody
has published timings of them: they are projected. The launch is that of the smallest 16-bit GEMMs of the GPU, which
have next to nothing to do; the efficiency is what decode attention reaches over more than 1 GB of KV cache, which is
reading alone. Holds where tensors come from memory: a small one that is still in the L2 cache is quicker, but there the
launch decides. Norms do not divide over tensor parallelism; the widths of the others do, and the caller divides them.

    of        launch [us]   efficiency
    a100             3.08         0.74
    h100             2.73         0.90
    h200             2.72         0.86
    b200             2.14         0.85
    b300             1.86         0.84
    gb200            2.18         0.89
    gb300            2.15         0.86
    l40s             2.19         0.80
    rtx-pro-6000     2.16         0.83
"""

import math

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.laws.hardware import Gpu


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
