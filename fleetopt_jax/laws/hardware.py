"""What a GPU's data sheet says."""

import math

from jax import Array

from fleetopt_jax.core.struct import as_floats, pytree


@pytree
class Gpu:
    """One GPU board. Every field is traced; shape () or a leading vmap axis."""

    memory_bytes: Array  # high-bandwidth memory [B]
    bandwidth_bytes_per_s: Array  # peak memory bandwidth [B/s]
    peak_flop_per_s: Array  # dense 16-bit tensor-core peak [FLOP/s]
    tdp_w: Array  # thermal design power [W]
    usd_per_h: Array  # rental price [USD/h]
    nccl_bytes: Array  # communication buffers when tensor-parallel [B]


def make_gpu(
    *,
    memory_bytes: float,
    bandwidth_bytes_per_s: float,
    peak_flop_per_s: float,
    tdp_w: float,
    usd_per_h: float,
    nccl_bytes: float = 411_041_792,
) -> Gpu:
    """A checked `Gpu`; the default NCCL buffer is the published one at TP 8."""
    values = {name: float(value) for name, value in locals().items()}
    for name, value in values.items():
        if not (math.isfinite(value) and (value >= 0 if name in ("usd_per_h", "nccl_bytes") else value > 0)):
            raise ValueError(f"need a positive, finite {name}, got {value}")
    return Gpu(**as_floats(**values))
