"""Prompts on an instance that does nothing but prefill: gated batches, with pauses where nobody is there.

An iteration takes whoever came during the one before; where nobody did, the instance waits for the next request, which
is then prefilled alone. With A(k) the time of an iteration of k prompts, r the rate of those who come while one runs,

    k = m + exp(-m),   m = r A(k)

are its mean prompts: those that came meanwhile, or the one that ended the pause. A prompt's share is s(k) = A(k) / k,
the stage is busy for f = lambda s(k) of the time, and a request waits unless it finds an instance idle: with
probability W = f where it comes to an instance at random; where N instances share a queue, Erlang's C of N servers, of
bursts by Hayward's peakedness (`laws/queueing.py`). Then r = lambda W / f: who waits comes while others are served.

The root is unique while s does not rise with k; found by bisection in the logarithm of k, with implicit gradients.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.numerics import falling_root
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.queueing import bursty_wait

MOST_TOGETHER = 1e4  # prompts of an iteration
BUSIEST = 0.999  # share of the time; beyond it batches grow for ever
BISECTIONS = 45


@pytree
class Batches:
    """The iterations of one instance, means, shape ()."""

    together: Array  # k, prompts of an iteration [-]
    each_s: Array  # s(k) [s]
    busy_frac: Array  # f [-]
    waits: Array  # W: share of the requests that find no instance idle [-]
    meet_per_s: Array  # r: requests to an instance while it is busy [1/s]


def gated_batches(
    each_s: Callable[[Array], Array], rate_per_s: Array, n_instances: Array, scv: Array, *, sees_idle: bool
) -> Batches:
    """The batches of instances that get `rate_per_s` each, of a stream of squared CV `scv`, by a router that
    `sees_idle` instances or does not; `each_s` is s(k) [s]. In overload as many together as there can be."""

    def at(log_k: Array) -> Batches:
        k = jnp.exp(log_k)
        s = each_s(k)
        busy = jnp.minimum(rate_per_s * s, BUSIEST)
        waits = busy
        if sees_idle:
            shared, _ = bursty_wait(n_instances, n_instances * busy / s, s, scv, 1.0)
            waits = jnp.minimum(busy, shared)
        return Batches(k, s, busy, waits, rate_per_s * waits / jnp.maximum(busy, 1e-30))

    def shortfall(log_k: Array) -> Array:
        batches = at(log_k)
        m = batches.meet_per_s * batches.together * batches.each_s
        return m + jnp.exp(-m) - batches.together

    most = jnp.full_like(rate_per_s, jnp.log(MOST_TOGETHER))
    return at(falling_root(shortfall, jnp.zeros_like(most), most, BISECTIONS))
