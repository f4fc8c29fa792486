"""How many sequences are in flight: Little's law with a step time that depends on how many are in flight.

    n = lambda D (C + cov(n, C) / n),   C = t(n + 1, m) / (1 - f)

lambda requests per second and instance of D decode steps each, mean context m, f the share of the time that prefill
takes, C the mean iteration. The + 1: a sequence in a Poisson-filled batch shares its steps with n others, itself comes
on top. The covariance: prompts that come together are prefilled together and decode together, so full iterations are
the long ones, and a token sees longer iterations than the average; cov(n, C) = u C with `shared_prefill` u. Solved for
n, n = (a + sqrt(a^2 + 4 a u)) / 2 with a = lambda D C(n): the time of a sequence, C / n, does not rise with n, so there
is one root. Where prompts share iterations (`laws/cycle.py`) f depends on n as well: m = n / D prompts come in an
iteration. Newton's method goes in the logarithms of both sides, no further below what it asks for than a factor of
eight, and a step that leaves the bracket is taken back: 10 steps reach 2e-8 of the watts on 3,800 random pools.
Gradients go through the fixed point implicitly.

Error against the iteration-level simulator on 29 random plans of the newest vLLM up to 85 % load, requests to the
shortest queue: sequences in flight 5 % in the median and 16 % in the 90th percentile, mean ITL 4 and 13 %, watts 1 and
5 % (`experiments/agreement.py`).
"""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.laws.decode import DecodeLaw

MOST_PREFILL = 0.999  # share of the time; beyond it nothing is decoded
FEWEST = 1e-30  # sequences that are divided by
LONGEST = 8.0  # a step goes no further below what so many sequences would be
NEWTON_STEPS = 10


def instance_capacity_per_s(
    step: DecodeLaw, n_max: ArrayLike, n_steps: ArrayLike, context_tokens: ArrayLike, prefill_s: ArrayLike
) -> Array:
    """Requests per second one instance gets through with `n_max` in flight [1/s]: n / (D t(n, m) + n E[s_p]).

    The lambda at which n (1 - lambda E[s_p]) = lambda D t(n, m).
    """
    return cast(Array, n_max / (n_steps * step.step_s(n_max, context_tokens) + n_max * prefill_s))


def shared_prefill(
    prefill_frac: ArrayLike, n_steps: ArrayLike, prefill_scv: ArrayLike, co_arrivals: ArrayLike = 1.0
) -> Array:
    """u = cov(n, C) / C [sequences]: g f^2 / (1 - f (1 - 1 / D)) (1 + f^2 (1 + cs2) / (1 - f^2)).

    Arrivals N during one iteration lengthen the next by E[s] N, and that one the next again: iterations are a
    first-order autoregression with coefficient f and variance lambda C E[s^2] / (1 - f^2). A sequence decodes for D
    iterations after its own prefill, taken as geometric; u sums what those who came with it still add. `co_arrivals`,
    g, counts them against those of a Poisson stream: 0 where requests come in turn; negative where they avoid each
    other, and then only the first factor counts. 0 without prefill.
    """
    f = prefill_frac
    together = 1.0 + jnp.where(jnp.greater(co_arrivals, 0), f**2 * (1.0 + prefill_scv) / (1.0 - f**2), 0.0)
    alone = co_arrivals * f**2 / (1.0 - f * (1.0 - 1.0 / jnp.maximum(n_steps, 1.0)))
    return cast(Array, alone * together)


def sequences_in_flight(
    step: DecodeLaw,
    n_max: ArrayLike,
    rate_per_s: ArrayLike,
    n_steps: ArrayLike,
    context_tokens: ArrayLike,
    prefill_frac: ArrayLike,
    covariance: ArrayLike = 0.0,
) -> Array:
    """Mean number of decoding sequences of one instance [-]: the fixed point, at most `n_max`; `n_max` in overload.

    `covariance` is the `shared_prefill` u, not negative.
    """
    return in_flight(
        lambda n: step.step_s(n + 1.0, context_tokens),
        lambda _: cast(Array, prefill_frac),
        lambda _: cast(Array, covariance),
        n_max,
        rate_per_s,
        n_steps,
    )


def in_flight(
    step_s: Callable[[Array], Array],
    prefill_frac: Callable[[Array], Array],
    covariance: Callable[[Array], Array],
    n_max: ArrayLike,
    rate_per_s: ArrayLike,
    n_steps: ArrayLike,
) -> Array:
    """`sequences_in_flight` where prefill depends on them: the step, f and u are functions, the first two of n and u of
    f. f must not rise with n: prompts that meet cost less each."""
    n_max = jnp.asarray(n_max, dtype=float)

    def excess_at(n: Array, busy: ArrayLike) -> Array:
        f = jnp.minimum(busy * prefill_frac(n), MOST_PREFILL)
        a, u = busy * rate_per_s * n_steps * step_s(n) / (1.0 - f), busy * covariance(f)
        # (a + sqrt(a^2 + 4 a u)) / 2, whose gradient at a = 0 needs a guard
        some = a > 0
        safe = jnp.where(some, a, 1.0)
        return jnp.where(some, safe * (1.0 + jnp.sqrt(1.0 + 4.0 * u / safe)) / 2.0, 0.0) - n

    # Whether the root lies below n_max; where not, it is guarded to lie at 0.
    holds = excess_at(n_max, 1.0) < 0.0
    busy = jnp.where(holds, 1.0, 0.0)

    def excess(n: Array) -> Array:
        return excess_at(n, busy)

    def solve(residual, start: Array) -> Array:
        def newton(_, bracket: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            n, least, most = bracket
            value, slope = jax.jvp(residual, (n,), (jnp.ones_like(n),))
            least, most = jnp.where(value > 0, n, least), jnp.where(value > 0, most, n)
            # of ln(n + value) - ln(n) over ln(n), in which what is asked of few sequences and of many looks alike
            some, asked = jnp.maximum(n, FEWEST), jnp.maximum(n + value, 0.0)
            elasticity = n * (1.0 + slope) / jnp.maximum(asked, FEWEST)
            step = n * (asked / some) ** (1.0 / jnp.maximum(1.0 - elasticity, 1e-3))
            step = jnp.maximum(step, asked / LONGEST)
            inside = (step >= least) & (step <= most)
            back = most * jnp.sqrt(jnp.maximum(least / jnp.maximum(most, FEWEST), 1e-2))
            return jnp.where(inside, step, back), least, most

        return jax.lax.fori_loop(0, NEWTON_STEPS, newton, (start, jnp.zeros_like(start), start))[0]

    root = jax.lax.custom_root(excess, n_max, solve, lambda linear, y: y / linear(jnp.ones_like(y)))
    return jnp.where(holds, root, n_max)
