"""The soft roofline: a kernel moves bytes while it multiplies, and takes a little longer than the longer of both.

    t = t0 + (t_memory^r + t_compute^r)^(1/r)

r, the sharpness, is 1 where nothing overlaps and large where everything does.
"""

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace


def soft_roofline_s(launch_s: ArrayLike, memory_s: ArrayLike, compute_s: ArrayLike, sharpness: ArrayLike) -> Array:
    """t0 + (tm^r + tc^r)^(1/r) [s], for times >= 0 and r >= 1; its gradients are finite where either is zero, or both.

    Written as the longer time times (1 + (shorter / longer)^r)^(1/r), which neither overflows nor divides by zero.
    """
    xp = namespace(launch_s, memory_s, compute_s, sharpness)
    longer, shorter = xp.maximum(memory_s, compute_s), xp.minimum(memory_s, compute_s)
    some = longer > 0
    ratio = xp.where(some, shorter, 0.0) / xp.where(some, longer, 1.0)
    return launch_s + longer * (1.0 + ratio**sharpness) ** (1.0 / xp.asarray(sharpness))
