"""The choice `dispatch`: which of a pool's instances gets a request; to the laws, what that leaves of chance.

Of a Poisson stream over very many instances each policy states the squared CV of one instance's arrivals
(`arrival_scv`); how many come together with a request in its iterations, against a Poisson stream's (`co_arrivals`);
the share that comes whatever the instance is at (`in_time`; the others follow its departures); and how many sequences
fewer than the mean one an instance has when it gets a request (`fewer`). In turn and at random they are exact. The
shortest queue keeps an instance at the level of the others: while it lets nobody go, in a long iteration, that level
rises or falls below it with equal chance, so that half of its requests come in time; and who has the least has about
one fewer than the mean. A router knows the queues as they were up to `STALENESS_S` ago: the later it learns that a
sequence has gone, the less do requests follow departures. The simulator asks the same record to `choose`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.queueing import log_erlang_b

STALENESS_S = 0.05  # how old the queues are, at most, that a router knows
# Of an instance that prefixes lead to: times the mean, and so many requests more.
OVERLOAD, OVERLOAD_REQUESTS = 1.5, 4.0
BOUND = 1.25  # times the mean that an instance may have where the bound is kept to the request
PASSES = 8  # of overflow that meets overflow


@pytree
class Queues:
    """What a router knows when it sends A requests of each of G replications to their N instances."""

    lengths: Array  # requests an instance has [G, N]
    rank: Array  # requests sent before [G]
    keys: Array  # of random numbers [G]
    n_instances: Array  # in service; those behind are not
    home: Array | None = None  # numbers that prompts have in common that begin alike, -1 for none [G, A]


class Dispatch:
    """Who gets a request."""

    name: ClassVar[str]
    arrival_scv: ClassVar[float]
    co_arrivals: ClassVar[float]
    in_time: ClassVar[float] = 1.0
    fewer: ClassVar[float] = 0.0  # sequences
    looks_at_queues: ClassVar[bool] = False  # where not, the simulator sends everything beforehand
    shares_caches: ClassVar[bool] = False  # whether who begins alike comes together: N prefix caches then act as one

    bound: ClassVar[float] = math.inf  # times the mean that an instance may have before others get who begins alike

    def choose(self, queues: Queues, n_sent: int) -> Array:
        """The instances of the next `n_sent` requests, in order of arrival [G, n_sent]."""
        raise NotImplementedError


@dataclass(frozen=True)
class ShortestQueue(Dispatch):
    """The instance with the fewest, what is sent in the same call with them; ties at random."""

    name: ClassVar[str] = "jsq"
    arrival_scv: ClassVar[float] = 0.25
    co_arrivals: ClassVar[float] = 0.5
    in_time: ClassVar[float] = 0.5
    fewer: ClassVar[float] = 1.0
    looks_at_queues: ClassVar[bool] = True

    def choose(self, queues: Queues, n_sent: int) -> Array:
        width = queues.lengths.shape[1]
        known = jnp.where(jnp.arange(width) < queues.n_instances, queues.lengths, jnp.iinfo(jnp.int32).max // 4)
        ties = jax.vmap(lambda key: jax.random.uniform(key, known.shape[1:]))(queues.keys)
        order = jnp.argsort(known + ties, axis=1)
        lengths = jnp.take_along_axis(known, order, axis=1).astype(int)
        # Before the k-th queue is as long as the others, k l_k - (l_0 + ... + l_{k - 1}) requests go to the shorter.
        filled = jnp.arange(width) * lengths - (jnp.cumsum(lengths, axis=1) - lengths)
        sent = jnp.arange(n_sent)
        level = jax.vmap(lambda row: jnp.searchsorted(row, sent, side="right") - 1)(filled)
        # A round of those that are level begins anywhere: who has just been sent one ties with the others.
        anywhere = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(queues.keys)
        first = jnp.floor(anywhere[:, None] * (level + 1)).astype(int)
        place = (sent - jnp.take_along_axis(filled, level, axis=1) + first) % (level + 1)
        return jnp.take_along_axis(order, place, axis=1)


@dataclass(frozen=True)
class RoundRobin(Dispatch):
    """In turn."""

    name: ClassVar[str] = "round_robin"
    arrival_scv: ClassVar[float] = 0.0
    co_arrivals: ClassVar[float] = 0.0

    def choose(self, queues: Queues, n_sent: int) -> Array:
        return (queues.rank[:, None] + jnp.arange(n_sent)) % queues.n_instances


@dataclass(frozen=True)
class AtRandom(Dispatch):
    """Any, whatever is there."""

    name: ClassVar[str] = "random"
    arrival_scv: ClassVar[float] = 1.0
    co_arrivals: ClassVar[float] = 1.0

    def choose(self, queues: Queues, n_sent: int) -> Array:
        return jax.vmap(lambda key: jax.random.randint(key, (n_sent,), 0, queues.n_instances))(queues.keys)


@dataclass(frozen=True)
class PrefixAffinity(Dispatch):
    """The instance that a prompt's beginning is given to: consistent hashing. Its caches act as one; to the laws its
    load is as uneven as at random.

    Where the simulator knows prefixes, the load is bounded (V. Mirrokni et al., Consistent hashing with bounded loads,
    SODA 2018): a prompt without a home, or whose home has more than `OVERLOAD` times the mean and some, goes to the
    shortest queue. Where it knows none, each prompt begins as no other, and goes anywhere."""

    name: ClassVar[str] = "affinity"
    arrival_scv: ClassVar[float] = 1.0
    co_arrivals: ClassVar[float] = 1.0
    shares_caches: ClassVar[bool] = True

    def choose(self, queues: Queues, n_sent: int) -> Array:
        if queues.home is None:
            return AtRandom().choose(queues, n_sent)
        serves = jnp.arange(queues.lengths.shape[1]) < queues.n_instances
        lengths = jnp.where(serves, queues.lengths, 0)
        most = OVERLOAD * jnp.sum(lengths, axis=1, keepdims=True) / queues.n_instances + OVERLOAD_REQUESTS
        home = jnp.maximum(queues.home, 0) % queues.n_instances
        stays = (queues.home >= 0) & (jnp.take_along_axis(lengths, home, axis=1) <= most)
        return jnp.where(stays, home, ShortestQueue().choose(queues, n_sent))


@dataclass(frozen=True)
class BoundedHashing(Dispatch):
    """Consistent hashing with bounded loads (V. Mirrokni et al., SODA 2018): no instance is given more than `BOUND`
    times the mean, the new request with it, rounded up. Who finds its home full goes to the instance with room that its
    own hash ranks first: those that overflow from one beginning mostly meet again.

    To the laws the caches act as one for those that stay home, and as one of their own for those that do not. A home of
    m in flight has room for k = 1.25 m + 1/2, the mean of what is rounded up; of the requests that come to it, and of
    those that come from other full ones, Erlang's B(k, m (1 + B)) find it full. That is where no beginning is hot, and
    m is the decoding where everything is found, the fewest there can be. Within 0.06 of simulated shares for 2 to 50 in
    flight on 4 to 16 instances; up to 0.1 too few stay home below, and on two (`tests/test_simulate_cache.py`)."""

    name: ClassVar[str] = "bounded_hash"
    arrival_scv: ClassVar[float] = 1.0
    co_arrivals: ClassVar[float] = 1.0
    shares_caches: ClassVar[bool] = True
    bound: ClassVar[float] = BOUND

    def choose(self, queues: Queues, n_sent: int) -> Array:
        if queues.home is None:
            return AtRandom().choose(queues, n_sent)
        numbers = jnp.arange(queues.lengths.shape[1])
        serves = numbers < queues.n_instances
        lengths = jnp.where(serves, queues.lengths, 0)
        total = jnp.sum(lengths, axis=1, keepdims=True)
        has_room = serves & (lengths + 1 <= jnp.ceil(BOUND * (total + 1) / queues.n_instances))
        home = jnp.maximum(queues.home, 0) % queues.n_instances
        stays = (queues.home >= 0) & jnp.take_along_axis(has_room, home, axis=1)
        ranks = _mixed(queues.home[:, :, None], numbers)
        away = jnp.argmin(jnp.where(has_room[:, None], ranks, jnp.iinfo(jnp.uint32).max), axis=2)
        away = jnp.where(queues.home >= 0, away, ShortestQueue().choose(queues, n_sent))
        return jnp.where(stays, home, away)


def home_frac(bound: float, in_flight: ArrayLike, n_instances: ArrayLike) -> Array:
    """Share of the requests that go where others went that begin alike [-], of instances with so many in flight that
    may have `bound` times the mean: the law of `BoundedHashing`."""
    m = jnp.maximum(jnp.asarray(in_flight, dtype=float), 1e-6)
    room, full = jnp.maximum(bound * m + 0.5, 1.0), jnp.zeros_like(m)
    for _ in range(PASSES):
        full = jnp.exp(log_erlang_b(room, jnp.minimum(m * (1.0 + full), 0.999 * room)))
    return jnp.where(jnp.asarray(n_instances) > 1.0, 1.0 - full, 1.0)


def _mixed(key: Array, number: Array) -> Array:
    """A number of both that looks random, as MurmurHash3 ends (A. Appleby, public domain)."""
    bits = key.astype(jnp.uint32) ^ (number.astype(jnp.uint32) * jnp.uint32(0x9E3779B1))
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(multiplier)
    return bits ^ (bits >> 16)
