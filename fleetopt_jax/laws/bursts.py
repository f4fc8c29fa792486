"""Bursts: who comes soon after a request, beyond those of a Poisson stream.

Requests with gamma gaps of mean 1 / lambda and squared CV c >= 1 come after each other as a renewal process has it:
within t of one lambda t and

    e(t) = 1 / ((1 + 1 / x)^(1 / c) - 1) - lambda t,     x = lambda t / c,

further ones, from none to (c - 1) / 2, and as many before it. Each goes to the instance with probability p, so p e(t)
of them come there. Most of a burst is close: of c = 8 a third comes within a hundredth of the mean gap.

The renewal function's transform is 1 / ((1 + s / c lambda)^c' - 1) / s, c' = 1 / c, so that e is the sum of six of its
values at s = k ln 2 / t, less lambda / s^2, by Gaver's and Stehfest's weights (Comm. ACM 13, 1970): within 0.3 % of the
exact sum. Of Poisson gaps every term is nothing.

Whom a request meets of those who stay for an exponential time of mean h, of an endless number of servers, has the
binomial moments (Takacs 1962)

    E[X over k] = C_1 ... C_k,    C_i = 1 / ((1 + i c / m)^(1 / c) - 1),    m = lambda h = n / p,

thinned p C_1 in the mean, and a level (`queueing.idle_share`) of squared CV 2 C_2 / C_1 - 1. Of times of squared CV a
half, or lognormal of 3, they find an idle server as often within 0.08 (of fewer than one in flight each).

A router that knows the queues finds an idle instance, unless bursts have filled them all: the request then goes to one
that has as many as the others (`crowded`). Those are n in flight in the mean, or what more it takes to fill each, of
whom as many are prefilled as at any moment: that there are more of them says nothing of when in that time they came, to
first order. Beside them are M = p (C_1 - m) who came in a burst just before it, p e(L) of them within a prompt's
iteration, of length L. Most of these are new: e grows like t^g, g = log2 e(L) / e(L / 2), and ages of that law are in
the mean those of (1 - g) / (1 + g) who have just come, and of others at any moment of L. One instance gets each N-th of
a burst: of an exponential number of mean m on either side 1 / (exp(1 / m) - 1) in the mean.
"""

import math
from typing import cast

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.queueing import idle_share

LEAST, MOST = 1e-12, 1e4  # of lambda t / c: beyond, nobody further comes than there
WEIGHTS = np.array([1.0, -49.0, 366.0, -858.0, 810.0, -270.0])  # of Gaver and Stehfest, of six terms
FEWEST = 1e-9  # in flight, or in a burst
LEAST_MATES = 0.01  # fewer have none: exp(-100)


@pytree
class Burst:
    """The bursts of a stream as one instance sees them. Every field is traced; shape () or a leading vmap axis."""

    share: Array  # p: of the stream's requests, those that come to the instance [-]
    rate_per_s: Array  # lambda, of the stream [1/s]
    scv: Array  # c, of the stream's gaps [-]

    def met(self, in_flight: ArrayLike) -> tuple[Array, Array]:
        """(Mean number that a request meets in flight at the instance, squared CV of its level) [-], where n are there
        at any moment (module docstring)."""
        m = jnp.maximum(safe_div(in_flight, self.share), LEAST)
        once, twice = (1.0 / jnp.expm1(jnp.log1p(i * self.scv / m) / self.scv) for i in (1.0, 2.0))
        return self.share * once, jnp.maximum(2.0 * twice / once - 1.0, 0.0)

    def within(self, time_s: ArrayLike) -> Array:
        """Who come to the instance within so long after a request, beyond a Poisson stream's [-]: >= 0."""
        x = jnp.clip(self.rate_per_s * time_s / self.scv, LEAST, MOST)
        k = np.arange(1, len(WEIGHTS) + 1)
        y = x[..., None] / (k * math.log(2.0))
        scv = jnp.asarray(self.scv)[..., None]
        further = 1.0 / jnp.expm1(jnp.log1p(1.0 / y) / scv) - scv * y
        return cast(Array, self.share * jnp.sum(WEIGHTS / k * further, axis=-1))


@pytree
class Crowd:
    """The requests that find no idle instance because a burst has filled them all. Shape () or a leading vmap axis."""

    share: Array  # of all requests [-]
    fresh: Array  # of them, that meet a prompt's iteration as it begins [-]
    meets: Array  # that meet one at any moment of it; the others meet a decode step [-]
    mates: Array  # who come in the burst to the same instance within half such an iteration, on either side [-]


def no_crowd(zero: Array) -> Crowd:
    """Nobody, in the shape of `zero`."""
    return Crowd(zero, zero, zero, zero)


def crowded(
    burst: Burst, in_flight: ArrayLike, rate_per_s: ArrayLike, n_instances: ArrayLike, iteration_s: ArrayLike
) -> tuple[Array, Crowd]:
    """(Share of the requests that find an idle instance [-], those that do not for a burst). Of `n_instances`, with so
    many sequences and requests a second each, where a lone prompt's iteration lasts `iteration_s`."""
    n = jnp.maximum(in_flight, FEWEST)
    met, clumped = burst.met(n)
    before = jnp.maximum(met - n, FEWEST)  # of a burst, who are still there
    within_one, within_half = burst.within(iteration_s), burst.within(iteration_s / 2.0)
    without, idle = idle_share(n, n_instances), idle_share(met, n_instances, clumped)
    idle = jnp.minimum(idle, without)
    others = jnp.maximum(n, 1.0)
    of_burst = jnp.clip(within_one / before, 0.0, 1.0) * before / (others + before)
    of_others = jnp.minimum(rate_per_s * iteration_s / n, 1.0) * others / (others + before)
    grows = jnp.log2(jnp.clip(within_one / jnp.maximum(within_half, FEWEST), 1.0, 2.0))
    fresh = of_burst * (1.0 - grows) / (1.0 + grows)
    mates = 1.0 / jnp.expm1(1.0 / jnp.maximum(within_half, LEAST_MATES))
    return idle, Crowd(without - idle, fresh, of_burst - fresh + of_others, mates)
