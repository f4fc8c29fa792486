"""Waiting for a slot: Erlang-B and Erlang-C for real-valued servers, and the tail of an M/G/c queue.

Symbols: c servers (instances times slots), a = lambda / mu_slot offered load [erlang], rho = a / c.
"""

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

TAIL_PROBABILITY = 0.01  # the P99 of the published limit
LEAST_MET = 1e-9  # in flight at an instance
MOST_INSTANCES = 1e9  # inf where no number holds
_TAIL_NATS = 30.0  # the integrand is cut where it is below exp(-30) of its peak
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)


def log_erlang_b(servers: ArrayLike, offered_load: ArrayLike) -> Array:
    """ln of the Erlang-B blocking probability, for real `servers` >= 1 and 0 < `offered_load` < `servers`.

    From 1/B = a int_0^inf exp(-a t) (1 + t)^c dt (Jagerman 1974). Centred on the integrand's peak, with
    exp(v) = a (1 + t) / c and delta = 1 - rho,

        ln(1/B) = ln c + c (-ln rho - delta) + ln int_{ln rho}^inf exp(c (v + 1 - exp(v)) + v) dv,

    whose integrand is a bell of width 1/sqrt(c) around 0. 48 Gauss-Legendre nodes between the points where it falls to
    e^-30 give a relative error of B below 1e-11 in float64 for whole c from 1 to 100,000 (tested against the
    recursion). No branch, no loop: smooth in c and a, so gradients and `vmap` come free. Equal to
    c ln a - a - lnGamma(c + 1) - ln Q(c + 1, a).
    """
    c = jnp.asarray(servers, dtype=float)
    rho = offered_load / c
    drop = _TAIL_NATS / c
    half_width = jnp.sqrt(2.0 * drop)
    # With y = exp(v) - 1: y - ln(1 + y) >= y^2 / 2 left of the peak, >= drop right of y = drop + half_width; and
    # v + 1 - exp(v) < v + 1 serves where half_width > 1.
    lo = jnp.maximum(jnp.log1p(-jnp.minimum(half_width, 1.0 - 1e-15)), -(_TAIL_NATS + c) / (c + 1.0))
    lo = jnp.maximum(lo, jnp.log(rho))
    hi = jnp.log1p(drop + half_width)
    v = lo + (hi - lo) * 0.5 * (1.0 + _NODES)
    integral = 0.5 * (hi - lo) * jnp.dot(jnp.exp(c * (v - jnp.expm1(v)) + v), _WEIGHTS)
    return -(jnp.log(c) - c * (jnp.log(rho) + 1.0 - rho) + jnp.log(integral))


def log_erlang_c(servers: ArrayLike, offered_load: ArrayLike) -> Array:
    """ln of the Erlang-C probability of waiting, C = B / (1 - rho (1 - B)), real `servers` >= 1; 0 when unstable."""
    rho = jnp.asarray(offered_load / servers)
    usable = jnp.logical_and(rho < 1.0, rho > 0.0)
    safe_load = jnp.where(usable, offered_load, 0.5 * jnp.asarray(servers, dtype=float))
    log_b = log_erlang_b(servers, safe_load)
    safe_rho = safe_load / servers
    log_c = log_b - jnp.log1p(-safe_rho * -jnp.expm1(log_b))
    return jnp.where(usable, log_c, jnp.where(rho >= 1.0, 0.0, -jnp.inf))


def erlang_c(servers: ArrayLike, offered_load: ArrayLike) -> Array:
    """Erlang-C probability of waiting in M/M/c [-], in [0, 1]; 1 when unstable. See `log_erlang_c`."""
    return jnp.exp(log_erlang_c(servers, offered_load))


def mean_wait_s(servers: ArrayLike, rate_per_s: ArrayLike, service_s: ArrayLike, service_scv: ArrayLike) -> Array:
    """Mean wait of M/G/c [s]: C / (c mu - lambda) * (1 + cs2) / 2 (Kimura 1994); inf when unstable.

    Exact for M/M/c (cs2 = 1) and for M/G/1 (Pollaczek-Khinchine); an approximation, some percent off, between.
    """
    spare_per_s, stable = _spare_rate(servers, rate_per_s, service_s)
    wait = erlang_c(servers, rate_per_s * service_s) / spare_per_s * (1.0 + service_scv) / 2.0
    return jnp.where(stable, wait, jnp.inf)


def p99_wait_s(servers: ArrayLike, rate_per_s: ArrayLike, service_s: ArrayLike, service_scv: ArrayLike) -> Array:
    """P99 wait of M/G/c [s]: max(0, ln(C / 0.01) / (2 (c mu - lambda) / (1 + cs2))); inf when unstable.

    0 as soon as less than 1 % of the requests wait. Exact for M/M/c, whose wait is exponential given that it is not
    zero; Kimura's two-moment scaling otherwise. Source: arXiv 2603.17280v1.
    """
    spare_per_s, stable = _spare_rate(servers, rate_per_s, service_s)
    log_excess = log_erlang_c(servers, rate_per_s * service_s) - jnp.log(TAIL_PROBABILITY)
    decay_per_s = 2.0 * spare_per_s / (1.0 + service_scv)
    return jnp.where(stable, jnp.maximum(0.0, log_excess) / decay_per_s, jnp.inf)


def bursty_wait(
    servers: ArrayLike, rate_per_s: ArrayLike, service_s: ArrayLike, arrival_scv: ArrayLike, service_scv: ArrayLike
) -> tuple[Array, Array]:
    """(probability of waiting [-], mean wait [s]) of GI/G/c; (1, inf) when unstable.

    P(wait) by Hayward's approximation, Erlang-C of (c / z, a / z) with the peakedness z = (1 + ca2) / 2; the mean wait
    given that there is one is that of M/M/c times (ca2 + cs2) / 2 (Allen and Cunneen). M/M/c where both are 1.
    """
    spare_per_s, stable = _spare_rate(servers, rate_per_s, service_s)
    peakedness = jnp.clip((1.0 + arrival_scv) / 2.0, 0.5, jnp.maximum(servers, 1.0))  # at least one server remains
    waits = erlang_c(servers / peakedness, rate_per_s * service_s / peakedness)
    mean_s = waits / spare_per_s * (arrival_scv + service_scv) / 2.0
    return jnp.where(stable, waits, 1.0), jnp.where(stable, mean_s, jnp.inf)


def thinned_scv(arrival_scv: ArrayLike, kept_frac: ArrayLike) -> Array:
    """Squared CV of the gaps of a stream of which each arrival is kept with probability `kept_frac`: 1 + f (ca2 - 1).

    Exact for renewal streams. Splitting makes any stream more like Poisson.
    """
    return cast(Array, 1.0 + kept_frac * (arrival_scv - 1.0))


def fresh_frac(cycle_s: ArrayLike, staleness_s: float) -> Array:
    """Share of an iteration of length C that is left when a router learns of its begin, between now and s later
    [-]: E max(0, 1 - d / C) with d even in [0, s]: 1 - s / 2C, or C / 2s where s > C.

    Too small where few sequences are in flight and few prompts much longer than the rest: of old queues comes then a
    tenth of what random dispatch would add, not a third (two plans of `experiments/agreement.py`).
    """
    ratio = jnp.asarray(cycle_s) / staleness_s
    return cast(Array, jnp.where(ratio > 1.0, 1.0 - 0.5 / jnp.maximum(ratio, 1.0), 0.5 * ratio))


def idle_share(met: ArrayLike, n_instances: ArrayLike, clumped: ArrayLike = 0.0) -> Array:
    """Share of the requests that find one of N instances idle, beyond those that would at random [-].

    A request meets so many in flight, M an instance in the mean, of a level of squared CV v (`clumped`; none of a
    Poisson stream). One of N is idle where all have fewer than N together, an instance at random where it has less than
    one: (q(N) - q(1)) / (1 - q(1)), within 0.02, with the q of `_fewer_than`. 0 for one instance.
    """
    among = jnp.clip(n_instances, 1.0, MOST_INSTANCES)
    by_chance, one_of_all = _fewer_than(jnp.stack([jnp.ones_like(among), among]), met, clumped)
    return jnp.clip((one_of_all - by_chance) / (1.0 - by_chance), 0.0, 1.0)


def busy_share(in_flight: ArrayLike, n_instances: ArrayLike = 1.0, before: ArrayLike = 0.0) -> Array:
    """Share of the time that an instance of N has a sequence, each sent to one without, if there is one [-].

    X in flight together, n an instance in the mean, keep min(X, N) of N instances busy. X has the variance
    N n (1 + N b) of a queue whose requests meet b more each than there are at any moment (`bursts.Burst.met`). Of one
    instance X is negative binomial, of many about normal: with d^2 = n / N + n b and k = (n - 1) / d

        one:  1 - (1 + b)^(-n / b),    1 - exp(-n) of a Poisson stream
        many: n - (n - 1) ndtr(k) - d phi(k)

    and between them 1 / N of the first and the rest of the second, where that is more: within 0.05. N times that does
    not fall as instances are added to the same X, so that watts do not.
    """
    n, b = jnp.maximum(in_flight, LEAST_MET), jnp.maximum(before, 0.0)
    among = jnp.clip(n_instances, 1.0, MOST_INSTANCES)
    some = b > 1e-6
    of_one = -jnp.expm1(-n * jnp.where(some, jnp.log1p(b) / jnp.where(some, b, 1.0), 1.0 - b / 2.0))
    d = jnp.sqrt(n / among + n * b)
    k = (n - 1.0) / d
    of_many = n - (n - 1.0) * jax.scipy.special.ndtr(k) - d * jnp.exp(-k * k / 2.0) / math.sqrt(2.0 * math.pi)
    return of_one + (1.0 - 1.0 / among) * jnp.maximum(of_many - of_one, 0.0)


def _fewer_than(among: ArrayLike, level: ArrayLike, clumped: ArrayLike) -> Array:
    """P(fewer than N in flight together), of so many an instance in the mean, Poisson about a gamma level of squared CV
    v: a negative binomial number [-].

    A gamma variable of shape N, mean 1, is then more than the level over N. By Wilson and Hilferty's cube (1931) both
    cube roots are normal: ndtr((1 - 1 / 9N - m (1 - v / 9)) / sqrt(1 / 9N + m^2 v / 9)), m the cube root of the mean
    level, within 0.02.
    """
    m, mean = jnp.cbrt(jnp.maximum(level, LEAST_MET)), 1.0 / (9.0 * jnp.asarray(among))
    deviation = jnp.sqrt(mean + m**2 * clumped / 9.0)
    return jax.scipy.special.ndtr((1.0 - mean - m * (1.0 - clumped / 9.0)) / deviation)


def dispatched_scv(arrival_scv: ArrayLike, n_instances: ArrayLike, regularity_scv: ArrayLike) -> Array:
    """Squared CV of the gaps of the stream that one of N instances gets of a stream of squared CV ca2 [-].

        c2 = ca2 / N + (1 - 1 / N) r

    with r that of a stream of which every N-th goes to the instance, N large: 1 for random dispatch (then this is
    `thinned_scv` at 1 / N, exact for renewal streams), 0 in turn (exact), in between for the shortest queue.
    """
    n = jnp.maximum(n_instances, 1.0)
    return cast(Array, arrival_scv / n + (1.0 - 1.0 / n) * regularity_scv)


def _spare_rate(servers: ArrayLike, rate_per_s: ArrayLike, service_s: ArrayLike) -> tuple[Array, Array]:
    """c mu - lambda [1/s], made harmless where it is not positive, and whether it is."""
    spare_per_s = jnp.asarray(servers / service_s - rate_per_s)
    stable = spare_per_s > 0
    return jnp.where(stable, spare_per_s, 1.0), stable
