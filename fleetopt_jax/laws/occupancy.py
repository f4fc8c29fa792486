"""How many sequences are in flight: Little's law with a step time that depends on how many are in flight.

    n = lambda D t(n + 1, m) / (1 - f)

lambda requests per second and instance of D decode steps each, mean context m, f the share of the time that prefill
takes. The + 1: a sequence in a Poisson-filled batch shares its steps with n others, itself comes on top. t is concave
in n, so there is one root; Newton's method from the right of it converges monotonically, in one step for a dense model:
n = lambda D (W + h) / (1 - f - lambda D h). Gradients go through the fixed point implicitly.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.laws.decode import DecodeStep, decode_step_s

NEWTON_STEPS = 10  # quadratic convergence: 6 reach 1e-12 for the sparsest catalog model


def instance_capacity_per_s(
    step: DecodeStep, n_max: ArrayLike, n_steps: ArrayLike, context_tokens: ArrayLike, prefill_s: ArrayLike
) -> Array:
    """Requests per second one instance gets through with `n_max` in flight [1/s]: n / (D t(n, m) + n E[s_p]).

    The lambda at which n (1 - lambda E[s_p]) = lambda D t(n, m).
    """
    return n_max / (n_steps * decode_step_s(step, n_max, context_tokens) + n_max * prefill_s)


def sequences_in_flight(
    step: DecodeStep,
    n_max: ArrayLike,
    rate_per_s: ArrayLike,
    n_steps: ArrayLike,
    context_tokens: ArrayLike,
    prefill_frac: ArrayLike,
) -> Array:
    """Mean number of decoding sequences of one instance [-]: the fixed point, at most `n_max`; `n_max` in overload."""
    n_max = jnp.asarray(n_max, dtype=float)

    def missing(n: ArrayLike) -> Array:
        return rate_per_s * n_steps * decode_step_s(step, n + 1.0, context_tokens) - n * (1.0 - prefill_frac)

    holds = missing(n_max) < 0.0  # the root lies below n_max
    target = jnp.where(holds, rate_per_s, 0.0)  # guarded: without arrivals the root is 0

    def excess(n: Array) -> Array:
        return target * n_steps * decode_step_s(step, n + 1.0, context_tokens) - n * (
            1.0 - jnp.where(holds, prefill_frac, 0.0)
        )

    def solve(residual, start: Array) -> Array:
        def newton(_, n: Array) -> Array:
            value, slope = jax.jvp(residual, (n,), (jnp.ones_like(n),))
            return n - value / slope

        return jax.lax.fori_loop(0, NEWTON_STEPS, newton, start)

    root = jax.lax.custom_root(excess, n_max, solve, lambda linear, y: y / linear(jnp.ones_like(y)))
    return jnp.where(holds, root, n_max)
