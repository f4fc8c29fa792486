"""The soft roofline: of two things that go on at once, it takes a little longer than the longer.

A kernel moves bytes while it multiplies; the host prepares a step while the GPU runs one (`laws/host.py`).

    t = t0 + (t_memory^r + t_compute^r)^(1/r)

r, the sharpness, is 1 where nothing overlaps and large where everything does.

A kernel timed in a loop reads from the L2 cache what fits it. An engine reads all other layers in between. The laws of
operators with weights therefore say both: from memory, as an engine has it, and as timed, for comparison with tables.
"""

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace

CACHE_SHARPNESS = 3.0  # how fast weights that grow drop out of the cache


def soft_roofline_s(launch_s: ArrayLike, memory_s: ArrayLike, compute_s: ArrayLike, sharpness: ArrayLike) -> Array:
    """t0 + (tm^r + tc^r)^(1/r) [s], for times >= 0 and r >= 1; its gradients are finite where either is zero, or both.

    Written as the longer time times (1 + (shorter / longer)^r)^(1/r), which neither overflows nor divides by zero.
    """
    xp = namespace(launch_s, memory_s, compute_s, sharpness)
    longer, shorter = xp.maximum(memory_s, compute_s), xp.minimum(memory_s, compute_s)
    some = longer > 0
    ratio = xp.where(some, shorter, 0.0) / xp.where(some, longer, 1.0)
    return launch_s + longer * (1.0 + ratio**sharpness) ** (1.0 / xp.asarray(sharpness))


def cached_share(n_bytes: ArrayLike, cached_bytes: ArrayLike, sharpness: float = CACHE_SHARPNESS) -> Array:
    """Share of what a loop reads again that comes from the cache [-]: 1 / (1 + (bytes / cached)^sharpness)."""
    xp = namespace(n_bytes, cached_bytes)
    return 1.0 / (1.0 + (n_bytes / xp.maximum(cached_bytes, 1.0)) ** sharpness)
