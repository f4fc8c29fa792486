"""Time to first token as a distribution, on an instance that prefills what has come at the next iteration.

Iterations follow each other. One takes a decode step t, g if it has any prompt, and b for each prompt beside others
(`laws/cycle.py`); those who came during it are in the next, C' = t + g [N(C) > 0] + sum of N(C) b's. With B(z) = E
exp(-z b), N(C) Poisson at rate l of groups of size G, G(x) their generating function, and m_f who follow departures,

    phi(z) = E exp(-z C) = exp(-z t) (P0 (1 - exp(-z g)) + exp(-z g) exp(-m_f (1 - B(z))) phi(a(z))),
    a(z) = l (1 - G(B(z))).

A newcomer waits for the rest R of the iteration it meets, then shares its own with all who came during it:

    TTFT = R + slot wait + sum of the others' b + own,

own a prompt's iterations when it is alone. Who comes in time meets an iteration as long as chance has it, at any moment
of it, whose transform with the others is (phi(a) - phi(a + z)) / (z E[C]); who follows a departure, as the shortest
queue has it, comes when one begins, phi(a + z), and as many come to a long iteration as to a short one
(`fleet/choices/dispatch.py`: the share `in_time`). phi is taken down one iteration, and that of the one before it as a
gamma distribution's of the right mean and variance. Prompts come as a histogram: own is exact in it, and the others'
are kinds of equal parts of the requests and of their tokens. All is smooth; nothing in it is fitted.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.laplace import integral_at, tail_on_grid
from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree

TAIL_PROBABILITY = 0.01  # P99
STEPS = 40  # of the quantile's bracket


@pytree
class Iterations:
    """The iterations of an instance. Shape (), or with leading vmap axes; kinds of prompts [G]."""

    rate_per_s: Array  # requests to the instance [1/s]
    step_s: Array  # t [s]
    any_s: Array  # g [s]
    mass: Array  # share of the requests of each kind, sums to 1 [G]
    beside_s: Array  # b [s] [G]
    behind_s: Array  # what those who come later delay one that waits [s] [G]
    group: Array  # mean number that come together, in the long run [-]
    group_s: Array  # mean time between those [s]
    in_time: Array  # share of the requests that do not wait for departures [-]
    hazard_per_s: Array  # at which a departure is followed [1/s]
    idle: Array  # share of the requests that find an instance which does nothing, beyond those at random


@pytree
class TtftLaw:
    """Distribution of a pool's TTFT. Cells [C]; the rest shape (). All may have leading vmap axes."""

    mass: Array  # share of the pool's requests in each cell, sums to 1 (0 for a pool without traffic) [C]
    least_s: Array  # own: of the cell's shortest prompt [s] [C]
    most_s: Array  # of its longest prompt [s] [C]
    shortest_tokens: Array  # the cell's shortest prompt, for limits that grow with the prompt [tokens] [C]
    longest_tokens: Array  # [tokens] [C]
    iterations: Iterations
    slot_probability: Array  # of waiting for a slot [-]
    slot_s: Array  # mean of that wait over all requests [s]
    stable: Array  # whether it keeps up


def cycle_of(law: Iterations) -> tuple[Array, Array]:
    """(E[C] [s], Var(C) [s^2]) of iterations."""
    mean_b, square_b = jnp.sum(law.mass * law.beside_s), jnp.sum(law.mass * law.beside_s**2)
    busy = jnp.minimum(law.rate_per_s * mean_b, 0.999)
    cycle_s = law.step_s / (1.0 - busy)
    for _ in range(2):
        m = law.rate_per_s * cycle_s
        none = jnp.exp(-m)
        cycle_s = (law.step_s + law.any_s * (1.0 - none)) / (1.0 - busy)
    together = 1.0 + law.in_time * 2.0 * (law.group - 1.0)
    of_prompts = m * (square_b + (together - 1.0) * mean_b**2)
    of_any = law.any_s * none * (law.any_s * (1.0 - none) + 2.0 * m * mean_b)
    return cycle_s, (of_prompts + of_any) / (1.0 - (law.in_time * busy) ** 2)


def _waits(law: TtftLaw) -> tuple:
    """(transform of R, slot wait and the others', its mean)."""
    it = law.iterations
    cycle_s, variance = cycle_of(it)
    met_s = cycle_s + variance / cycle_s
    group = 1.0 + (it.group - 1.0) * -jnp.expm1(-met_s / it.group_s)
    shape = (cycle_s - it.step_s) ** 2 / jnp.maximum(variance, 1e-30)
    scale = variance / jnp.maximum(cycle_s - it.step_s, 1e-30)
    h = it.hazard_per_s
    rate = it.in_time * (1.0 - it.idle) * it.rate_per_s

    def before(v):
        return jnp.exp(-v * it.step_s - shape * jnp.log1p(v * scale))

    follow = (1.0 - it.in_time) * (1.0 - it.idle) * it.rate_per_s * cycle_s / (1.0 - before(h))
    one = jnp.minimum(follow, 0.5)
    more = follow - one
    none = jnp.exp(-more) * ((1.0 - one) * before(rate / group) + one * before(rate / group + h))
    mean_b = jnp.sum(it.mass * it.beside_s)
    mean_s = it.step_s + it.any_s * (1.0 - none) + mean_b * (1.0 - it.idle) * it.rate_per_s * cycle_s

    def b(z, beside_s):
        return jnp.exp(-z[:, None] * beside_s) @ it.mass.astype(z.dtype)

    def events(bz):
        return rate * (1.0 - bz) / (group - (group - 1.0) * bz)

    def phi(z):
        bz = b(z, it.beside_s)
        v, q = events(bz), one * (1.0 - bz)
        inner = jnp.exp(-more * (1.0 - bz)) * ((1.0 - q) * before(v) + q * before(v + h))
        return jnp.exp(-z * it.step_s) * (none + jnp.exp(-z * it.any_s) * (inner - none))

    def transform(z):
        bz, bz2 = b(z, it.beside_s), b(z, it.behind_s)
        a, a2, q = events(bz), events(bz2), one * (1.0 - (bz + bz2) / 2.0)
        at_a, at_h, at_end, at_both = jnp.split(phi(jnp.concatenate([a, a + h, a2 + z, a2 + h + z])), 4)
        mates = 1.0 / ((group - (group - 1.0) * bz) * (group - (group - 1.0) * bz2))
        in_time = mates * ((1.0 - q) * (at_a - at_end) + q * (at_h - at_both)) / ((z + a2 - a) * mean_s)
        slot = 1.0 - law.slot_probability * (1.0 - 1.0 / (1.0 + z * slot_s))
        one_h = phi(jnp.full((1,), h, dtype=z.dtype))[0]
        after = h * (at_h - at_end) / ((z + a2 - a - h) * (1.0 - one_h))
        met = jnp.exp(-more * (1.0 - (bz + bz2) / 2.0)) * (it.in_time * in_time + (1.0 - it.in_time) * after)
        return slot * (it.idle + (1.0 - it.idle) * met)

    slot_s = safe_div(law.slot_s, law.slot_probability)
    others = rate * met_s + follow + 2.0 * (group - 1.0) * it.in_time
    return transform, law.slot_s + met_s / 2.0 + mean_b * others


def ttft_tail(law: TtftLaw, limit_s: ArrayLike, slope_s_per_token: ArrayLike = 0.0) -> Array:
    """P(TTFT > limit + slope * prompt) [-], in [0, 1]."""
    a = limit_s + slope_s_per_token * law.shortest_tokens - law.least_s
    b = limit_s + slope_s_per_token * law.longest_tokens - law.most_s
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    width = jnp.maximum(high - low, 1e-9)
    transform, mean_s = _waits(law)
    span = jnp.maximum(jnp.max(jnp.where(law.mass > 0, high, 0.0)), 1e-6)
    tail = tail_on_grid(transform, span, jnp.maximum(mean_s, 1e-9))
    above = (integral_at(tail, span, low + width) - integral_at(tail, span, low)) / width
    return jnp.where(law.stable, jnp.sum(law.mass * above), jnp.sum(law.mass))


def ttft_quantile_s(
    laws: TtftLaw, frac: ArrayLike, slope_s_per_token: ArrayLike = 0.0, probability: float = TAIL_PROBABILITY
) -> Array:
    """The TTFT (less slope * prompt) that the share `probability` of the requests of K pools exceeds [s].

    `laws` has a leading axis of K, `frac` [K] the pools' shares of the requests. Bisection on the falling tail, with
    implicit gradients.
    """
    total = jnp.sum(frac)
    share = frac / jnp.where(total > 0, total, 1.0)

    def excess(limit_s: Array) -> Array:
        tails = jax.vmap(lambda law: ttft_tail(law, limit_s, slope_s_per_token))(laws)
        return jnp.sum(share * tails) - probability

    low = -(slope_s_per_token * jnp.max(laws.longest_tokens))
    mean_s = jax.vmap(lambda law: _waits(law)[1])(laws)
    top = jnp.max(jnp.where(share > 0, jnp.max(laws.most_s, axis=-1) + mean_s * 60.0, 0.0))

    def solve(residual, start: Array) -> Array:
        def halve(_, bounds):
            lo, hi = bounds
            middle = (lo + hi) / 2.0
            over = residual(middle) > 0
            return jnp.where(over, middle, lo), jnp.where(over, hi, middle)

        return jax.lax.fori_loop(0, STEPS, halve, (low, start))[1]

    def tangent(linear, y: Array) -> Array:
        slope = linear(jnp.ones_like(y))  # minus the density; 0 beyond every request: then nothing moves the quantile
        return jnp.where(slope < 0, y / jnp.where(slope < 0, slope, -1.0), 0.0)

    return jax.lax.custom_root(excess, top, solve, tangent)


def ttft_mean_s(law: TtftLaw) -> Array:
    """Mean TTFT [s]."""
    return jnp.sum(law.mass * (law.least_s + law.most_s) / 2.0) + _waits(law)[1]
