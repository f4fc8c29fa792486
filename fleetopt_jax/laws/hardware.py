"""What a GPU's data sheet says."""

import math

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree

IDLE_FRAC_OF_TDP = 0.25  # with a model loaded and no work, where nobody has published it: 0.16 to 0.29 where one has
LINK_BYTES_PER_S, LINK_GPUS = 450e9, 8  # where nothing is said: NVLink 4 among the eight of a host
INTER_NODE_BYTES_PER_S = 50e9  # and one network card of 400 Gb/s a GPU


@pytree
class Gpu:
    """One GPU board. Every field is traced; shape () or a leading vmap axis."""

    memory_bytes: Array  # as CUDA reports it [B]
    bandwidth_bytes_per_s: Array  # peak memory bandwidth [B/s]
    peak_flop_per_s: Array  # dense 16-bit tensor-core peak [FLOP/s]
    peak_flop8_per_s: Array  # dense 8-bit floating-point peak; the 16-bit one where the GPU has no such units [FLOP/s]
    tdp_w: Array  # thermal design power [W]
    idle_w: Array  # board power with a model loaded and nothing to do [W]
    usd_per_h: Array  # rental price [USD/h]
    nccl_bytes: Array  # communication buffers when tensor-parallel [B]
    link_bytes_per_s: Array  # of its link to the other GPUs, one way [B/s]
    link_gpus: Array  # GPUs that reach one another over that link; those beyond, over the network
    inter_node_bytes_per_s: Array  # of its share of the network, one way [B/s]
    peak_flop4_per_s: Array  # dense 4-bit floating-point peak; the 8-bit one where the GPU has no such units [FLOP/s]


def make_gpu(
    *,
    memory_bytes: float,
    bandwidth_bytes_per_s: float,
    peak_flop_per_s: float,
    tdp_w: float,
    usd_per_h: float,
    peak_flop8_per_s: float | None = None,
    idle_w: float | None = None,
    nccl_bytes: float = 411_041_792,
    link_bytes_per_s: float = LINK_BYTES_PER_S,
    link_gpus: float = LINK_GPUS,
    inter_node_bytes_per_s: float = INTER_NODE_BYTES_PER_S,
    peak_flop4_per_s: float | None = None,
) -> Gpu:
    """A checked `Gpu`; the default NCCL buffer is the published one at TP 8, the default link NVLink 4's.

    >>> sheet = dict(memory_bytes=160e9, bandwidth_bytes_per_s=6e12, peak_flop_per_s=1.5e15)
    >>> gpu = fo.make_gpu(**sheet, tdp_w=800, usd_per_h=5)
    >>> float(gpu.idle_w)
    200.0
    """
    if peak_flop8_per_s is None:
        peak_flop8_per_s = peak_flop_per_s
    values = dict(
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        peak_flop_per_s=peak_flop_per_s,
        peak_flop8_per_s=peak_flop8_per_s,
        tdp_w=tdp_w,
        idle_w=IDLE_FRAC_OF_TDP * tdp_w if idle_w is None else idle_w,
        usd_per_h=usd_per_h,
        nccl_bytes=nccl_bytes,
        link_bytes_per_s=link_bytes_per_s,
        link_gpus=link_gpus,
        inter_node_bytes_per_s=inter_node_bytes_per_s,
        peak_flop4_per_s=peak_flop8_per_s if peak_flop4_per_s is None else peak_flop4_per_s,
    )
    may_be_zero = ("usd_per_h", "nccl_bytes", "idle_w")
    for name, value in values.items():
        if not (math.isfinite(value) and (value >= 0 if name in may_be_zero else value > 0)):
            raise ValueError(f"need a positive, finite {name}, got {value}")
    if values["idle_w"] > tdp_w:
        raise ValueError(f"need idle_w <= tdp_w, got {values['idle_w']} > {tdp_w}")
    return Gpu(**as_floats(**values))


def peak_of_bits(gpu: Gpu, bits: ArrayLike) -> Array:
    """Dense peak of products of numbers with that many bits (16, 8 or 4) [FLOP/s]."""
    xp = namespace(gpu, bits)
    below16 = xp.where(xp.less(bits, 8), gpu.peak_flop4_per_s, gpu.peak_flop8_per_s)
    return xp.where(xp.less(bits, 16), below16, gpu.peak_flop_per_s)
