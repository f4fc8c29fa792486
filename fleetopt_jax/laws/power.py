"""Board power of one GPU while decoding.

The published logistic (1/W Law, eq. 1), its roofline variant, and the activity law fitted to measurements: records of
one kind, of which each says `gpu_w(n_active, context_tokens)`. A law of your own is a `@pytree` record that derives
from `PowerLaw` and says the same; searches rely on watts that do not fall with `n_active`, and watts per sequence that
do not rise.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.clocks import DECODE_CORE_SHARE, clocked_w, dynamic_frac
from fleetopt_jax.laws.decode import DecodeStep
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.llm import Llm, n_active_params

if TYPE_CHECKING:
    from fleetopt_jax.laws.prefill import Prefill

IDLE_FRAC = 0.43  # P / TDP as the batch goes to 0 (published)
ACTIVITY_FRAC = 0.43  # further P / TDP at full memory and compute activity (published)
CAP_SOFTNESS_W = 25.0  # width of the bend below the power limit, as fitted [W]


class PowerLaw:
    """What the other laws ask of a GPU's power; a record of your own derives from this and says `gpu_w`."""

    def gpu_w(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        """Board power of one GPU [W] with `n_active` sequences of mean context `context_tokens` in flight."""
        raise NotImplementedError

    def hungrier(self, factor: ArrayLike) -> "PowerLaw":
        """The law with its watts, below any limit it knows, off by a factor."""
        return ScaledPower(self, jnp.asarray(factor, dtype=float))

    def bent_w(self, watts: ArrayLike, factor: ArrayLike) -> Array:
        """`watts` that this GPU draws, off by a factor; below the power limit where the law knows it."""
        return cast(Array, watts * factor)

    @property
    def has_clock_law(self) -> bool:
        """Whether `at_clock` gives a law: searches over clocks ask before they start."""
        return type(self).at_clock is not PowerLaw.at_clock

    def at_clock(self, prefill: "Prefill", idle_w: ArrayLike, clock_frac: ArrayLike) -> "PowerLaw":
        """The law on cores at `clock_frac` of their top clock; `prefill` is that at the top clock. See `clocks.py`."""
        raise ValueError(f"{type(self).__name__} has no clock law: it knows no idle power")


@pytree
class LogisticPower(PowerLaw):
    """P(n) = P_idle + (P_nom - P_idle) / (1 + exp(-k (log2 max(1, n) - x0))). Fields traced, shape () or batched."""

    idle_w: Array  # P_idle [W]
    nominal_w: Array  # P_nom [W]
    steepness: Array  # k, per doubling of the batch [-]
    log2_half_batch: Array  # x0, log2 of the batch at the midpoint [-]

    def gpu_w(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        x = self.steepness * (jnp.log2(jnp.maximum(1.0, n_active)) - self.log2_half_batch)
        return self.idle_w + (self.nominal_w - self.idle_w) * jax.nn.sigmoid(x)

    def hungrier(self, factor: ArrayLike) -> "LogisticPower":
        return replace(self, idle_w=self.idle_w * factor, nominal_w=self.nominal_w * factor)

    def at_clock(self, prefill: "Prefill", idle_w: ArrayLike, clock_frac: ArrayLike) -> "LogisticPower":
        return replace(
            self,
            idle_w=clocked_w(self.idle_w, idle_w, DECODE_CORE_SHARE, clock_frac),
            nominal_w=clocked_w(self.nominal_w, idle_w, DECODE_CORE_SHARE, clock_frac),
        )


@pytree
class RooflinePower(PowerLaw):
    """P(n) = TDP (0.43 + 0.43 min(1, kv + mac)). Fields traced, shape () or a leading vmap axis."""

    tdp_w: Array  # thermal design power [W]
    step: DecodeStep  # the step the activity shares are taken of
    compute_s_per_seq: Array  # 2 active_params / TP / peak FLOP/s: compute time of one sequence's token [s]

    def gpu_w(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        step_s = self.step.step_s(n_active, context_tokens)
        kv_share = (step_s - self.step.base_s) / step_s
        mac_share = self.compute_s_per_seq * n_active / step_s
        return self.tdp_w * (IDLE_FRAC + ACTIVITY_FRAC * jnp.minimum(1.0, kv_share + mac_share))

    def hungrier(self, factor: ArrayLike) -> "RooflinePower":
        return replace(self, tdp_w=self.tdp_w * factor)


@pytree
class ActivityPower(PowerLaw):
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

    def gpu_w(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        step_s = self.step.step_s(n_active, context_tokens)
        memory_share = self.ideal_bytes.step_s(n_active, context_tokens) / step_s
        flop_share = self.ideal_flops.step_s(n_active, context_tokens) / step_s
        return self.at_shares_w(memory_share, flop_share)

    def at_shares_w(self, memory_share: ArrayLike, flop_share: ArrayLike) -> Array:
        """Board power [W] at given shares of the peak bandwidth and the peak FLOP/s [-]."""
        xp = namespace(self, memory_share, flop_share)
        asked_w = self.floor_w + self.memory_w * memory_share + self.sqrt_flop_w * xp.sqrt(flop_share)
        return self.cap_w - CAP_SOFTNESS_W * xp.logaddexp((self.cap_w - asked_w) / CAP_SOFTNESS_W, 0.0)

    def hungrier(self, factor: ArrayLike) -> "ActivityPower":
        names = ("floor_w", "memory_w", "sqrt_flop_w")
        return replace(self, **{name: getattr(self, name) * factor for name in names})

    def bent_w(self, watts: ArrayLike, factor: ArrayLike) -> Array:
        below = jnp.maximum(self.cap_w - watts, 1e-3 * CAP_SOFTNESS_W) / CAP_SOFTNESS_W
        asked_w = self.cap_w - CAP_SOFTNESS_W * jnp.log(jnp.expm1(below))
        return self.cap_w - CAP_SOFTNESS_W * jax.nn.softplus((self.cap_w - factor * asked_w) / CAP_SOFTNESS_W)

    def at_clock(self, prefill: "Prefill", idle_w: ArrayLike, clock_frac: ArrayLike) -> "ActivityPower":
        """What a step asks for falls; the board's power limit stays. The shares are of the peaks at this clock."""
        frac = dynamic_frac(DECODE_CORE_SHARE, clock_frac)
        flops = self.ideal_flops
        return replace(
            self,
            floor_w=clocked_w(self.floor_w, idle_w, DECODE_CORE_SHARE, clock_frac),
            memory_w=self.memory_w * frac,
            sqrt_flop_w=self.sqrt_flop_w * frac,
            step=self.step.at_clock(prefill, clock_frac),
            ideal_flops=replace(
                flops,
                per_seq_s=flops.per_seq_s / clock_frac,
                per_token_s=flops.per_token_s / clock_frac,
                windowed_token_s=flops.windowed_token_s / clock_frac,
            ),
        )


@pytree
class ScaledPower(PowerLaw):
    """Another law's watts, times a factor: what any law is when it is off by that."""

    power: Any  # the other law's record
    factor: Array  # [-]

    def gpu_w(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        return self.factor * self.power.gpu_w(n_active, context_tokens)

    @property
    def has_clock_law(self) -> bool:
        return self.power.has_clock_law

    def at_clock(self, prefill: "Prefill", idle_w: ArrayLike, clock_frac: ArrayLike) -> "ScaledPower":
        return replace(self, power=self.power.at_clock(prefill, idle_w / self.factor, clock_frac))


def make_logistic_power(
    *, idle_w: float, nominal_w: float, log2_half_batch: float, steepness: float = 1.0
) -> LogisticPower:
    """A checked `LogisticPower`.

    >>> power = fo.make_logistic_power(idle_w=300, nominal_w=600, log2_half_batch=4.2)
    >>> round(float(power.gpu_w(64.0, 1000.0)), 1)
    557.4
    """
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
