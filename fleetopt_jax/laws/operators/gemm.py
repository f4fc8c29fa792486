"""Matrix products: `rows` tokens through a weight matrix of `inputs` x `outputs`.

    t = t0 + d k / (1 + k / k0) + s m + x_i 2 m k / BW + (t_b^r + t_f^r)^(1/r)
    t_b = x_b (w n k + a m k + x_o 2 m n) / BW,     t_f = x_f 2 m n k / peak

m rows, n outputs, k inputs; w and a are bytes of a weight and of an input as they are multiplied, scales included; BW
and peak are the data sheet's, the peak that of the bits multiplied. d is what a block takes to walk along one input: a
kernel with few blocks takes at least d k, however little it has to do, until it splits the inputs among blocks (k0; cuBLAS
does, the 8-bit and 4-bit kernels hardly). s and x_i are the kernel that quantizes the inputs: a launch for each row and
another pass over 16-bit inputs; both are 0 where nothing is quantized. x_o says that outputs are written slower than
weights are read.

The tables time one product in a loop: a weight matrix that fits the L2 cache is read from there. An engine reads all
other layers in between. So the law has both: `gemm_s` reads weights from memory, `timed_gemm_s` as in the loop,

    t_b (timed) = t_b (h + (1 - h) / (1 + (B0 / bytes)^3)),

and the errors below are of the latter. It holds for 1 to 32,768 rows and 32 to 65,536 inputs and outputs.
Coefficients: `catalog/data/operators/gemm.json`, fitted by `experiments/fit_operators.py`.
"""

import math
from typing import cast

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.hardware import Gpu, peak_of_bits
from fleetopt_jax.laws.operators.roofline import soft_roofline_s

OUTPUT_BYTES = 2.0  # of an output, and of an input before it is quantized
CACHE_SHARPNESS = 3.0  # how fast a growing matrix drops out of the cache


@pytree
class GemmLaw:
    """Coefficients of one data type on one GPU. Every field is traced; shape () or a leading vmap axis."""

    launch_s: Array  # t0 [s]
    depth_s: Array  # d: a block's walk along one input [s]
    split_inputs: Array  # k0: inputs from which they are split among blocks [-]
    row_s: Array  # s: quantizing a row [s]
    quantize_passes: Array  # x_i: passes over 16-bit inputs to quantize them, by peak bandwidth [-]
    byte_excess: Array  # x_b: inverse share of the peak bandwidth [-]
    output_excess: Array  # x_o: an output's bytes over a weight's [-]
    flop_excess: Array  # x_f: inverse share of the peak FLOP/s [-]
    sharpness: Array  # r [-]
    weight_bytes: Array  # w [B]
    input_bytes: Array  # a [B]
    flop_bits: Array  # 16, 8 or 4: of the numbers multiplied [bits]
    cached_bytes: Array  # B0: what the L2 cache keeps between two calls [B]
    cached_frac: Array  # h: time of bytes from the L2 cache over that of bytes from memory [-]


def make_gemm_law(**coefficients: float) -> GemmLaw:
    """A checked `GemmLaw`, of all its fields by name."""
    names = tuple(GemmLaw.__dataclass_fields__)
    if set(coefficients) != set(names):
        raise ValueError(f"need {', '.join(names)}, got {', '.join(coefficients)}")
    may_be_zero = ("launch_s", "depth_s", "row_s", "quantize_passes", "output_excess", "cached_bytes")
    for name, value in coefficients.items():
        if not (math.isfinite(value) and (value >= 0 if name in may_be_zero else value > 0)):
            raise ValueError(f"need a positive, finite {name}, got {value}")
    if not (coefficients["sharpness"] >= 1 >= coefficients["cached_frac"]):
        raise ValueError(f"need sharpness >= 1 >= cached_frac, got {coefficients}")
    return GemmLaw(**as_floats(**coefficients))


def gemm_bytes(law: GemmLaw, rows: ArrayLike, outputs: ArrayLike, inputs: ArrayLike) -> Array:
    """What the product itself reads and writes: weights, inputs, outputs [B]."""
    return cast(Array, law.weight_bytes * outputs * inputs + rows * (law.input_bytes * inputs + OUTPUT_BYTES * outputs))


def gemm_flop(rows: ArrayLike, outputs: ArrayLike, inputs: ArrayLike) -> Array:
    """Multiplications and additions [FLOP]."""
    return cast(Array, 2.0 * rows * outputs * inputs)


def gemm_s(law: GemmLaw, gpu: Gpu, rows: ArrayLike, outputs: ArrayLike, inputs: ArrayLike) -> Array:
    """Time of a product whose weights come from memory [s]. Rises with every size; of no rows, the time to read the
    weights."""
    return _gemm_s(law, gpu, rows, outputs, inputs, cached=0.0)


def timed_gemm_s(law: GemmLaw, gpu: Gpu, rows: ArrayLike, outputs: ArrayLike, inputs: ArrayLike) -> Array:
    """The same product over and over again [s]: from the L2 cache what fits it. Of at least one row."""
    xp = namespace(law, rows, outputs, inputs)
    over = gemm_bytes(law, rows, outputs, inputs) / xp.maximum(law.cached_bytes, 1.0)
    return _gemm_s(law, gpu, rows, outputs, inputs, cached=1.0 / (1.0 + over**CACHE_SHARPNESS))


def _gemm_s(
    law: GemmLaw, gpu: Gpu, rows: ArrayLike, outputs: ArrayLike, inputs: ArrayLike, *, cached: ArrayLike
) -> Array:
    written_bytes = (law.output_excess - 1.0) * OUTPUT_BYTES * rows * outputs  # beyond what they count as
    moved_bytes = gemm_bytes(law, rows, outputs, inputs) + written_bytes
    memory_s = law.byte_excess * moved_bytes / gpu.bandwidth_bytes_per_s * (1.0 - (1.0 - law.cached_frac) * cached)
    compute_s = law.flop_excess * gemm_flop(rows, outputs, inputs) / peak_of_bits(gpu, law.flop_bits)
    walk_s = law.depth_s * inputs / (1.0 + inputs / law.split_inputs)
    quantize_s = rows * (law.row_s + law.quantize_passes * OUTPUT_BYTES * inputs / gpu.bandwidth_bytes_per_s)
    return soft_roofline_s(law.launch_s + walk_s + quantize_s, memory_s, compute_s, law.sharpness)
