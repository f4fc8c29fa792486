"""Compressing a prompt so that a request fits a shorter window (FleetOpt's gamma), and what that costs."""

import math

from jax import Array

from fleetopt_jax.core.struct import as_floats, pytree

MAX_SHRINK = (
    2.0  # largest gamma with real prompts: those of half the length or more can give way to a window half as long
)


@pytree
class Compressor:
    """The compressor in front of a pool. Every field is traced; shape () or a leading vmap axis."""

    success_frac: Array  # share of the tries that keep the answer good enough [-]
    s_per_token: Array  # latency a prompt token [s]
    j_per_token: Array  # energy a prompt token, whether the try succeeds or not [J]


def make_compressor(*, success_frac: float = 1.0, s_per_token: float = 0.0, j_per_token: float = 0.0) -> Compressor:
    """A checked `Compressor`; by default perfect and free.

    >>> float(fo.make_compressor(success_frac=0.9).success_frac)
    0.9
    """
    if not (0 <= success_frac <= 1 and 0 <= s_per_token < math.inf and 0 <= j_per_token < math.inf):
        raise ValueError(
            f"need success_frac in 0..1 and finite s_per_token, j_per_token >= 0, "
            f"got {success_frac=}, {s_per_token=}, {j_per_token=}"
        )
    return Compressor(**as_floats(success_frac=success_frac, s_per_token=s_per_token, j_per_token=j_per_token))
