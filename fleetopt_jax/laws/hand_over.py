"""Handing a request's KV cache from the instance that prefilled it to the one that decodes it.

    t = l + b (p + f) / w

p prompt tokens of b bytes each, f what a sequence holds beside them (layers with a sliding window, states) as tokens,
w the bandwidth of the links that the two instances have for one request, l the latency of a message. Counts every
prompt as longer than the window of such layers, as the memory does. What the serving engine itself takes to notice and
to schedule a hand-over is not in it, unless the latency is said to contain it.

A port sends one cache after the other, for t - l each: a queue of Poisson arrivals (Pollaczek and Khinchine's mean).
Prompts leave prefill further apart than that, one iteration after the other, or together where they shared one.
"""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.laws.demand import Demand

BUSIEST = 0.999  # share of the time that a port sends; beyond it the queue grows for ever


@pytree
class HandOver:
    """The way from one stage of a lane to the other. Leaves traced, shape () or with a leading vmap axis."""

    bytes_per_token: Array  # of the KV cache, in layers with full attention [B]
    fixed_tokens: Array  # what a sequence holds beside its prompt, as tokens of those layers [tokens]
    bytes_per_s: Array  # of the links of one request's two instances together [B/s]
    latency_s: Array  # [s]
    sends: Array  # requests that a prefill instance hands over at a time: its groups of GPUs [-]
    receives: Array  # that a decode instance takes at a time [-]

    def sending_s(self, prompt_tokens: ArrayLike) -> Array:
        """How long one prompt's cache keeps a port [s]: 0 at infinite bandwidth."""
        return self.bytes_per_token * (prompt_tokens + self.fixed_tokens) / self.bytes_per_s

    def seconds(self, prompt_tokens: ArrayLike) -> Array:
        """t of one prompt [s]."""
        return self.latency_s + self.sending_s(prompt_tokens)

    def moments_s(self, mean: Demand) -> tuple[Array, Array]:
        """(mean [s], mean square [s^2]) of how long requests with these mean features keep a port."""
        per_token_s = self.bytes_per_token / self.bytes_per_s
        least_s = self.sending_s(0.0)
        square_s2 = least_s**2 + 2.0 * least_s * per_token_s * mean.prefill + per_token_s**2 * mean.prefill2
        return least_s + per_token_s * mean.prefill, square_s2


def make_hand_over(
    *,
    bytes_per_token: float,
    bytes_per_s: float,
    latency_s: float = 0.0,
    fixed_tokens: float = 0.0,
    sends: float = 1.0,
    receives: float = 1.0,
) -> HandOver:
    """A checked `HandOver`; an infinite bandwidth costs the latency alone.

    >>> way = fo.make_hand_over(bytes_per_token=327_680, bytes_per_s=400e9, latency_s=1e-5)
    >>> round(float(way.seconds(2000.0)), 5)
    0.00165
    """
    if not (bytes_per_s > 0 and 0 <= bytes_per_token < math.inf and 0 <= fixed_tokens < math.inf):
        raise ValueError(
            f"need bytes_per_s > 0 and finite bytes_per_token, fixed_tokens >= 0, got {bytes_per_s=}, "
            f"{bytes_per_token=}, {fixed_tokens=}"
        )
    if not (0 <= latency_s < math.inf and 1 <= sends < math.inf and 1 <= receives < math.inf):
        raise ValueError(
            f"need finite latency_s >= 0 and sends, receives >= 1, got {latency_s=}, {sends=}, {receives=}"
        )
    return HandOver(
        **as_floats(
            bytes_per_token=bytes_per_token,
            fixed_tokens=fixed_tokens,
            bytes_per_s=bytes_per_s,
            latency_s=latency_s,
            sends=sends,
            receives=receives,
        )
    )


def port_wait_s(rate_per_s: ArrayLike, moments_s: tuple[Array, Array], ports: ArrayLike) -> tuple[Array, Array]:
    """(share of the time that a port is busy [-], mean wait for it [s]) where `rate_per_s` come to so many ports."""
    mean_s, square_s2 = moments_s
    each_per_s = jnp.asarray(rate_per_s / ports)
    busy = each_per_s * mean_s
    return busy, each_per_s * square_s2 / (2.0 * (1.0 - jnp.minimum(busy, BUSIEST)))
