"""Running a GPU's cores below their top clock, f = clock / top clock in [0.4, 1]: slower compute, fewer watts.

    compute time ~ 1 / f,   memory time, launches and scheduling stay
    P(f) = P_idle + (P(1) - P_idle) (1 - c + c f V(f)^2),   V(f) = v0 + (1 - v0) f,   c the cores' share

A *projected* law: none of our measurements varies the clock. The form is CMOS dynamic power, f V^2, with a voltage that
falls linearly to v0 of its top value; what is left (1 - c) is memory, which keeps its own clock. v0 = 0.4 +- 0.2 makes
power fall as f^2.2 near the top (f^1.8 to f^2.6); c = 0.65 +- 0.2 while decoding and 0.9 +- 0.1 in prefill are assumed.
Together +-20 % of the watts above idle at f = 0.7. A decoded token's FLOPs are taken to last as long as a prefilled
one's, at most all of the cost the step has for a sequence: too long rather than too short. Below f = 0.5 caches and
crossbar slow down too, which is left out: there the law is too kind to low clocks.

By the operators of Llama-3.1-70B energy is least at f = 0.5 in prefill (25 % less on H100, 21 % on B200, in 1.7 and 1.6
times the time) and at 0.4 to 0.5 when decoding 200 sequences (26 % less, 1.2 times the time); few sequences, bound by
memory, want the lowest clock. On a board at its power limit this is too kind by some 5 %: H100's prefill asks for 835 W
and is timed at 700 W, on cores that are below their top clock already, and is slowed down here as if they were not. A
power limit in watts acts as the clock that `clock_at_power_w` gives, in each iteration its own (`LimitedStep` of
`laws/operator_step.py`). The records of step, power and prefill have an `at_clock` of their own, of these functions.
"""

from typing import cast

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

MIN_CLOCK_FRAC = 0.4  # the law holds down to here, and loses its good faith below 0.5
VOLTAGE_FLOOR = 0.4  # v0; +-0.2
DECODE_CORE_SHARE = 0.65  # c while decoding; +-0.2
PREFILL_CORE_SHARE = 0.9  # c in prefill; +-0.1
N_NEWTON = 8  # from above on a convex function: converges from 1 to any f >= 0.01 to rounding


def core_power_frac(clock_frac: ArrayLike) -> Array:
    """Dynamic power of the cores over that at the top clock [-]: f V(f)^2."""
    voltage = VOLTAGE_FLOOR + (1.0 - VOLTAGE_FLOOR) * clock_frac
    return cast(Array, clock_frac * voltage**2)


def dynamic_frac(core_share: ArrayLike, clock_frac: ArrayLike) -> Array:
    """Watts above idle over those at the top clock [-]."""
    return cast(Array, 1.0 + core_share * (core_power_frac(clock_frac) - 1.0))


def clocked_w(power_w: Array, idle_w: ArrayLike, core_share: ArrayLike, clock_frac: ArrayLike) -> Array:
    """Board power [W] at `clock_frac` of a GPU that draws `power_w` at the top clock."""
    return cast(Array, idle_w + (power_w - idle_w) * dynamic_frac(core_share, clock_frac))


def clock_at_power_w(power_w: ArrayLike, idle_w: ArrayLike, core_share: ArrayLike, limit_w: ArrayLike) -> Array:
    """The clock [-] at which a GPU that draws `power_w` at its top clock draws `limit_w`: the inverse of `clocked_w`.

    1 where the limit does not bind, `MIN_CLOCK_FRAC` where the limit cannot be held by the clock.
    """
    asked = 1.0 + (limit_w - jnp.asarray(power_w)) / (core_share * (power_w - jnp.asarray(idle_w)))
    core = jnp.clip(asked, core_power_frac(MIN_CLOCK_FRAC), 1.0)
    clock = jnp.ones_like(core)
    for _ in range(N_NEWTON):
        voltage = VOLTAGE_FLOOR + (1.0 - VOLTAGE_FLOOR) * clock
        slope = voltage * (voltage + 2.0 * (1.0 - VOLTAGE_FLOOR) * clock)
        clock = clock - (core_power_frac(clock) - core) / slope
    return clock
