"""Board power of one GPU while decoding.

The published logistic (1/W Law, eq. 1), its roofline variant, and the activity law fitted to measurements. Three laws,
one question `gpu_power_w(power, n_active, context_tokens)`: the record's type is the choice. A law of your own is a
`@pytree` record with a function registered by `gpu_power_w.register`; searches rely on watts that do not fall with
`n_active`, and watts per sequence that do not rise.
"""

import math
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.laws.decode import DecodeStep, decode_step_s
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.llm import Llm, n_active_params

IDLE_FRAC = 0.43  # P / TDP as the batch goes to 0 (published)
ACTIVITY_FRAC = 0.43  # further P / TDP at full memory and compute activity (published)
CAP_SOFTNESS_W = 25.0  # width of the bend below the power limit, as fitted [W]


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


@pytree
class ActivityPower:
    """P = softmin(cap, floor + a u_mem + b sqrt(u_flop)), u the shares of the data-sheet peaks a step keeps busy.

    Fitted to ML.ENERGY's measurements (`laws/measured.py`): mean error on architectures it has not seen 13 % (H100) and
    12 % (B200). Fields traced, shape () or a leading vmap axis.
    """

    floor_w: Array  # P0, with the surcharge of tensor parallelism [W]
    memory_w: Array  # a: at the full memory bandwidth [W]
    sqrt_flop_w: Array  # b: at the full FLOP/s [W]
    cap_w: Array  # where the power limit holds it: 0.975 TDP [W]
    step: DecodeStep  # time of a step
    ideal_bytes: DecodeStep  # time its bytes take at the peak bandwidth
    ideal_flops: DecodeStep  # time its FLOPs take at the peak FLOP/s


@pytree
class ScaledPower:
    """Another law's watts, times a factor: what any law is when it is off by that."""

    power: Any  # the other law's record
    factor: Array  # [-]


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
        tdp_w=gpu.tdp_w, step=step, compute_s_per_seq=2 * n_active_params(llm) / tp / gpu.peak_flop_per_s
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


@gpu_power_w.register
def _(power: ActivityPower, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
    step_s = decode_step_s(power.step, n_active, context_tokens)
    memory_share = decode_step_s(power.ideal_bytes, n_active, context_tokens) / step_s
    flop_share = decode_step_s(power.ideal_flops, n_active, context_tokens) / step_s
    return activity_power_w(power, memory_share, flop_share)


@gpu_power_w.register
def _(power: ScaledPower, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
    return power.factor * gpu_power_w(power.power, n_active, context_tokens)


def activity_power_w(power: ActivityPower, memory_share: ArrayLike, flop_share: ArrayLike) -> Array:
    """Board power [W] at given shares of the peak bandwidth and the peak FLOP/s [-]."""
    asked_w = power.floor_w + power.memory_w * memory_share + power.sqrt_flop_w * jnp.sqrt(flop_share)
    return power.cap_w - CAP_SOFTNESS_W * jax.nn.softplus((power.cap_w - asked_w) / CAP_SOFTNESS_W)
