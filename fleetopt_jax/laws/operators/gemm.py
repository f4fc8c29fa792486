"""Matrix products: `rows` tokens through a weight matrix of `inputs` x `outputs`.

    t = t0 + d k / (1 + k / k0) + m (s + x_i 2 k / BW) + (t_b^r + t_f^r)^(1/r)
    t_b = x_b (w n k + a m k + x_o 2 m n) / BW,     t_f = x_f 2 m n k / peak

m rows, n outputs, k inputs; w and a are bytes of a weight and of an input as they are multiplied, scales included; BW
and peak are the data sheet's, the peak that of the bits multiplied. d is what a block takes to walk along one input: a
kernel with few blocks takes at least d k, however little it has to do, until it splits the inputs among blocks (from k0
on; kernels for 8 and 4 bits hardly do). s and x_i are the kernel that quantizes inputs: the time of a row and further
passes over its 16 bits; both are 0 where nothing is quantized. x_o says that outputs are written slower than weights
are read.

The tables time one product in a loop, with weights that fit the L2 cache read from there. An engine reads all other
layers in between. So `gemm_s` reads weights from memory and `timed_gemm_s` as in the loop,

    t_b (timed) = t_b (1 - (1 - h) / (1 + (bytes / B0)^3)),

and the errors are of the latter. They matter on L40S and RTX PRO 6000, whose caches hold most matrices.

Holds for 1 to 32,768 rows, 32 to 65,536 inputs and outputs. Source: kernel timings of ai-dynamo/aiconfigurator
(095f58a, Apache-2.0): vLLM 0.24.0 (A100 0.14.0), some 35,000 products of a type (A100 9,240), fitted by
`experiments/fit_operators.py` into `catalog/data/operators/gemm.json`. Median and 90th-percentile error [%]; with every
fifth (n, k) left out of the fit the medians on those are at most half a point higher:

                      bf16      fp8  fp8_block    nvfp4
    a100            6.9 19        -          -        -
    h100            5.1 15   8.2 25     5.9 17        -
    h200            5.2 14   8.8 26     5.8 15        -
    b200            6.0 17   6.6 22     3.9 10   5.9 17
    b300            6.1 18   5.3 14     4.4 12   5.9 18
    gb200           6.4 17   5.4 15     6.5 34   6.4 18
    gb300           5.8 17   5.1 14     4.0  9   5.9 17
    l40s            9.7 30  12.5 42     5.7 12        -
    rtx-pro-6000    7.3 24   7.7 26          -   7.8 28

On matrices of more than 32 MB, L40S's are 6.4 and 6.7: what it misses is the edge of its cache. fp8_block: only
products that take longer than their launch by the host (60 to 300 us in these tables, 9 to 16 in other engines'); t0 is
set to 9 us, d and k0 are fp8's. 16-bit products of more than 1,024 rows on GB200 are left out: they reach 800 to 1,960
TFLOP/s where B200, B300 and GB300 reach 1,300 to 2,320. Types without a table (int8, int4, mxfp4; fp8 on A100, nvfp4
but on Blackwell) borrow coefficients of those that have one, with their own bytes: projected, not measured.
"""

from typing import cast

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.hardware import Gpu, peak_of_bits
from fleetopt_jax.laws.operators.coefficients import checked
from fleetopt_jax.laws.operators.roofline import cached_share, soft_roofline_s

OUTPUT_BYTES = 2.0  # of an output, and of an input before it is quantized


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
    of_types = ("weight_bytes", "input_bytes", "flop_bits")
    positive = ("split_inputs", "byte_excess", "flop_excess", "cached_frac", *of_types)
    return GemmLaw(**checked(GemmLaw, coefficients, positive=positive))


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
    cached = cached_share(gemm_bytes(law, rows, outputs, inputs), law.cached_bytes)
    return _gemm_s(law, gpu, rows, outputs, inputs, cached=cached)


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
