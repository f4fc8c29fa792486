"""Time to first token as a distribution, and inter-token latency, on an instance that prefills in chunks.

A prompt waits for a slot, for the iteration that runs when it comes, and for the prompts that came with it; then it is
prefilled itself. Iterations follow each other: each takes one decode step t and the prefill work that arrived during
the one before, so their mean is C = t / (1 - f) and their variance lambda C E[s^2] / (1 - f^2) (a gated queue). Hence

    TTFT = own + U(0, C) + Q,   own = s_p(p) + t max(1, p / budget) + f C,

where steps add up (own is the iterations of the mixed step, the first with lambda C prompts of others in it, where they
do not: `laws/cycle.py`), with Q, slot wait and the random part of the cycle, taken as zero with probability 1 - q and
exponential otherwise. The distribution of prompts enters as a histogram with uniform cells, so its tail is a sum of
closed forms: exact in the histogram, continuous, and differentiable. The two-moment waits and the exponential are
approximations: in the study that `laws/occupancy.py` cites P99 TTFT is 26 % too high in the median, 78 % in the 90th
percentile (15 and 55 % with engines of vLLM 0.11), most of all for long prompts to the shortest queue, which keeps
requests away from an instance that has one; and too low for the few long requests of a pool of their own.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import pytree

TAIL_PROBABILITY = 0.01  # P99
BISECTIONS = 60


@pytree
class TtftLaw:
    """Distribution of a pool's TTFT. Cells [C]; the rest shape (). All may have leading vmap axes."""

    mass: Array  # share of the pool's requests in each cell, sums to 1 (0 for a pool without traffic) [C]
    least_s: Array  # TTFT without random waits: of the cell's shortest prompt, when an iteration begins at once [s] [C]
    most_s: Array  # of its longest prompt, when an iteration has just begun [s] [C]
    shortest_tokens: Array  # the cell's shortest prompt, for limits that grow with the prompt [tokens] [C]
    longest_tokens: Array  # [tokens] [C]
    wait_probability: Array  # q [-]
    wait_decay_per_s: Array  # of the random waits, given that there is one [1/s]


def ttft_tail(law: TtftLaw, limit_s: ArrayLike, slope_s_per_token: ArrayLike = 0.0) -> Array:
    """P(TTFT > limit + slope * prompt) [-], in [0, 1]."""
    a = law.least_s - slope_s_per_token * law.shortest_tokens
    b = law.most_s - slope_s_per_token * law.longest_tokens
    low, width = jnp.minimum(a, b), jnp.maximum(jnp.abs(b - a), 1e-12)
    room_s = cast(Array, limit_s - low)
    above = _integrated_tail(law, room_s) - _integrated_tail(law, room_s - width)
    return jnp.sum(law.mass * above / width)


def _integrated_tail(law: TtftLaw, x: Array) -> Array:
    """Integral of P(wait > .) from 0 to x, where P(wait > x) = 1 below 0 and q exp(-decay x) from there on."""
    late = -jnp.expm1(-law.wait_decay_per_s * jnp.maximum(x, 0.0)) * law.wait_probability / law.wait_decay_per_s
    return jnp.minimum(x, 0.0) + late


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

    slack = -(slope_s_per_token * jnp.max(laws.longest_tokens))
    longest_s = jnp.max(laws.most_s, axis=-1) - jnp.log(probability) / laws.wait_decay_per_s
    top = jnp.max(jnp.where(share > 0, longest_s, 0.0))

    def solve(residual, start: Array) -> Array:
        def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = (low + high) / 2.0
            over = residual(middle) > 0
            return jnp.where(over, middle, low), jnp.where(over, high, middle)

        return jax.lax.fori_loop(0, BISECTIONS, halve, (slack, start))[1]

    def tangent(linear, y: Array) -> Array:
        slope = linear(jnp.ones_like(y))  # minus the density; 0 beyond every request: then nothing moves the quantile
        return jnp.where(slope < 0, y / jnp.where(slope < 0, slope, -1.0), 0.0)

    return jax.lax.custom_root(excess, top, solve, tangent)


def ttft_mean_s(law: TtftLaw) -> Array:
    """Mean TTFT [s]."""
    return jnp.sum(law.mass * (law.least_s + law.most_s) / 2.0) + law.wait_probability / law.wait_decay_per_s


def cycle_moments(
    step_s: ArrayLike, rate_per_s: ArrayLike, prefill_frac: ArrayLike, prefill_square_s2: ArrayLike
) -> tuple[Array, Array]:
    """(mean [s], variance [s^2]) of an iteration: C = t / (1 - f), lambda C E[s^2] / (1 - f^2)."""
    mean_s = step_s / (1.0 - prefill_frac)
    return cast(Array, mean_s), cast(Array, rate_per_s * mean_s * prefill_square_s2 / (1.0 - prefill_frac**2))


def cycle_wait_s(cycle_s: ArrayLike, cycle_variance_s2: ArrayLike, prefill_frac: ArrayLike) -> Array:
    """Mean random wait for prefill beyond that of iterations of one length [s]: Var(C) / (2 C) (1 + 2 f).

    A newcomer meets a size-biased iteration: it waits for the rest of it, E[C^2] / (2 C), and then shares its own with
    the work of all who came during it, f E[C^2] / C.
    """
    return cast(Array, cycle_variance_s2 / (2.0 * cycle_s) * (1.0 + 2.0 * prefill_frac))


@pytree
class ItlLaw:
    """What the distribution of a pool's inter-token latency is made of. Cells [C]; the rest shape (). All may have
    leading vmap axes."""

    step_s: Array  # a decode step by itself [s]
    cycle_s: Array  # mean iteration [s]
    cycle_variance_s2: Array  # [s^2]
    rate_per_s: Array  # requests to one instance [1/s]
    chunk_s: (
        Array  # what a chunk of a prompt adds to an iteration: the last of each cell's prompt, and a whole one [2C]
    )
    chunks: Array  # such chunks of a request in the mean [-] [2C]
    most_s: Array  # what a whole budget of the longest prompts adds [s]


def itl_quantile_s(law: ItlLaw, probability: float = TAIL_PROBABILITY) -> Array:
    """ITL that the share `probability` of the tokens exceeds [s]: a decode step and the prefill in the same iteration.

    The longer of two estimates, at most a whole budget of prompt tokens. Where prefill is rare, one chunk: a prompt
    fills floor(p / budget) iterations whole and one with the rest, and an iteration has a chunk that takes over x with
    probability 1 - exp(-C lambda E[chunks over x]). Where prompts share iterations, the quantile of a gamma
    distribution with the mean and variance of the prefill in an iteration (Wilson and Hilferty's cube).
    Error: 9 % in the median, too low (-4 %), most so for bursts to a single instance.
    """
    cycle_s, chunk_s = law.cycle_s, law.chunk_s
    counts = law.rate_per_s * cycle_s * law.chunks
    order = jnp.argsort(chunk_s)
    above = jnp.cumsum(counts[order][::-1])[::-1]  # expected chunks an iteration that take at least this long
    rare = -jnp.expm1(-above) <= probability
    one_s = jnp.max(jnp.where(rare, 0.0, chunk_s[order]), initial=0.0)
    mean_s, cycle_variance_s2 = cycle_s - law.step_s, law.cycle_variance_s2
    some = (mean_s > 1e-12) & (cycle_variance_s2 > 1e-18)
    ninth = jnp.where(some, cycle_variance_s2 / jnp.where(some, mean_s, 1.0) ** 2 / 9.0, 0.0)
    z = -jax.scipy.special.ndtri(probability)
    shared_s = jnp.where(
        some, mean_s * jnp.maximum(1.0 - ninth + z * jnp.sqrt(jnp.where(some, ninth, 1.0)), 0.0) ** 3, 0.0
    )
    return law.step_s + jnp.minimum(jnp.maximum(one_s, shared_s), law.most_s)
