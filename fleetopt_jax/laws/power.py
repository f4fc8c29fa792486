"""Board power of one GPU while decoding (1/W Law, eq. 1, and its roofline variant).

Two laws, one question `gpu_power_w(power, n_active, context_tokens)`: the record's type is the choice.
"""

import math
from functools import singledispatch

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.llm import Llm
from fleetopt_jax.laws.roofline import DecodeStep, decode_step_s

IDLE_FRAC = 0.43  # P / TDP as the batch goes to 0 (published)
ACTIVITY_FRAC = 0.43  # further P / TDP at full memory and compute activity (published)


@pytree
class LogisticPower:
    """P(n) = P_idle + (P_nom - P_idle) / (1 + exp(-k (log2 max(1, n) - x0))). Fields traced, shape () or batched."""

    idle_w: Array  # P_idle [W]
    nominal_w: Array  # P_nom [W]
    steepness: Array  # k, per doubling of the batch [-]
    log2_half_batch: Array  # x0, log2 of the batch at the midpoint [-]


@pytree
class RooflinePower:
    """P(n) = TDP (0.43 + 0.43 min(1, kv + mac)). Fields traced, shape () or a leading vmap axis."""

    tdp_w: Array  # thermal design power [W]
    step: DecodeStep  # the step the activity shares are taken of
    compute_s_per_seq: Array  # 2 active_params / TP / peak FLOP/s: compute time of one sequence's token [s]


def make_logistic_power(
    *, idle_w: float, nominal_w: float, log2_half_batch: float, steepness: float = 1.0
) -> LogisticPower:
    """A checked `LogisticPower`."""
    if not (0 <= idle_w < nominal_w < math.inf and 0 < steepness < math.inf and math.isfinite(log2_half_batch)):
        raise ValueError(
            "need 0 <= idle_w < nominal_w, steepness > 0 and log2_half_batch, all finite, "
            f"got {idle_w=}, {nominal_w=}, {steepness=}, {log2_half_batch=}"
        )
    return LogisticPower(
        **as_floats(idle_w=idle_w, nominal_w=nominal_w, steepness=steepness, log2_half_batch=log2_half_batch)
    )


def roofline_power(gpu: Gpu, llm: Llm, tp: ArrayLike, step: DecodeStep) -> RooflinePower:
    """The published roofline engine's power record. It scales no better than its one H100 anchor: order of 12 %."""
    return RooflinePower(
        tdp_w=gpu.tdp_w, step=step, compute_s_per_seq=2 * llm.n_active_params / tp / gpu.peak_flop_per_s
    )


@singledispatch
def gpu_power_w(power, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
    """Board power of one GPU [W] with `n_active` sequences of mean context `context_tokens` in flight."""
    raise TypeError(f"no power law for {type(power).__name__}")


@gpu_power_w.register
def _(power: LogisticPower, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
    x = power.steepness * (jnp.log2(jnp.maximum(1.0, n_active)) - power.log2_half_batch)
    return power.idle_w + (power.nominal_w - power.idle_w) * jax.nn.sigmoid(x)


@gpu_power_w.register
def _(power: RooflinePower, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
    step_s = decode_step_s(power.step, n_active, context_tokens)
    kv_share = (step_s - power.step.base_s) / step_s
    mac_share = power.compute_s_per_seq * n_active / step_s
    return power.tdp_w * (IDLE_FRAC + ACTIVITY_FRAC * jnp.minimum(1.0, kv_share + mac_share))
