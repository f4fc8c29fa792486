"""Prefill as published: a prompt takes ceil(prompt / chunk) iterations and rides along with the decodes for free."""

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import whole_up
from fleetopt_jax.laws.roofline import DecodeStep, decode_step_s


def prefill_chunks(prompt_tokens: ArrayLike, chunk_tokens: ArrayLike, *, whole: bool = True) -> Array:
    """Iterations one prompt needs [-]: ceil(prompt / chunk); without the ceiling if not `whole`."""
    return whole_up(prompt_tokens / chunk_tokens, whole=whole)


def lone_prefill_s(step: DecodeStep, n_chunks: ArrayLike) -> Array:
    """Prefill time the published TTFT counts [s]: chunks * t(1, L_cal), as if the instance were empty."""
    return n_chunks * decode_step_s(step, 1.0, step.calibration_tokens)
