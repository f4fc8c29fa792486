"""Time to first token as a distribution, on an instance that prefills at its next iteration what has come during one.

Iterations follow each other. One takes a decode step t, g if it has any prompt, and b for each prompt beside others
(`laws/cycle.py`). Let N(C) come during one of length C, B(z) = E exp(-z b) over the prompts. Then

    phi(z) = E exp(-z C) = exp(-z t) (P(N = 0) (1 - exp(-z g)) + exp(-z g) E B(z)^N(C')),   C' the one before.

Of an instance's requests the share e (`in_time`) comes whatever it is at, Poisson at e lambda, in bursts where the
stream has them: groups of geometric size, whose mean is one and those who come in a burst within half the iteration
they meet, E[C^2] / 2 E[C], on either side (`laws/bursts.py`). The others follow departures, as the shortest queue has
it: they come as an iteration begins, Poisson, to long ones as to short ones. (An instance that lets nobody go for a
while is as often above the level of the others as below: e = 1/2 of many instances, 1 of one; and of those who would
follow, some come after the router has looked, into the iteration: `queueing.fresh_frac`. They come in the same groups:
a burst does not wait for departures.) A newcomer waits for the rest
R of the iteration it meets, then shares its own with all who came during it:

    TTFT = R + slot wait + sum of b of those before it + sum of b' of those behind it + own.

own are a prompt's iterations when it is alone, b' no more than what fits behind it: half a budget of tokens. With
a(z) the transform's rate of events, e lambda (1 - B(z)) for single ones, and a' that of b', R and those in time have

    (phi(a) - phi(a' + z)) / ((z + a' - a) E[C])    where one comes in time,    phi(a' + z)    where one follows,

and nothing where the shortest queue finds an idle instance (`queueing.idle_share`), or where an instance that only
prefills pauses (`laws/gated.py`). Who would find one but for a burst meets a lone prompt or a step (`bursts.crowded`).
An instance with fewer sequences than the mean one is as much less likely to be at a prompt, each having come with its
own: of the others the share by which they are fewer, but for one who is there, meets a decode step (`calm`).
phi is taken down one iteration; the one before that is a decode step and, sometimes, an exponential time, of the right
mean and variance. Prompts come as a histogram: own is exact in it, the others' b have a value for each of a few kinds.
Nothing of this is fitted; how well it holds is said in `experiments/agreement.py`.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.laplace import integral_at, tail_on_grid
from fleetopt_jax.core.numerics import exp, falling_root, safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.bursts import Burst, Crowd

TAIL_PROBABILITY = 0.01  # P99
LEVEL = 2e-9  # as near to its probability a tail that stays level is at its quantile, as limits are compared
BUSIEST = 0.999  # share of the time that prompts take; beyond it iterations grow for ever
BISECTIONS = 50
LONGEST_WAITS = 60.0  # mean waits that the quantile is looked for in
NARROWEST_S = 1e-6  # of a cell: less would be lost in the rounding of integrals


@pytree
class Iterations:
    """The iterations of an instance. Kinds of prompts [G]; the rest shape (). All may have leading vmap axes."""

    rate_per_s: Array  # requests to the instance [1/s]
    step_s: Array  # t [s]
    any_s: Array  # g [s]
    mass: Array  # share of the requests of each kind, sums to 1 (0 without traffic) [G]
    beside_s: Array  # b [s] [G]
    behind_s: Array  # b' [s] [G]
    in_time: Array  # e [-]
    idle: Array  # share of the requests that find an idle instance, beyond those at random [-]
    calm: Array  # of those who do not, that meet a decode step for going where fewer are [-]
    burst: Burst  # who come soon after a request to the instance
    crowd: Crowd | None = None  # who find none idle for a burst; None: no router looks for one


@pytree
class TtftLaw:
    """Distribution of a pool's TTFT. Cells [C]; the rest shape (). All may have leading vmap axes."""

    mass: Array  # share of the pool's requests in each cell, sums to 1 (0 for a pool without traffic) [C]
    least_s: Array  # own, of the cell's shortest prompt [s] [C]
    most_s: Array  # of its longest prompt [s] [C]
    shortest_tokens: Array  # the cell's shortest prompt, for limits that grow with the prompt [tokens] [C]
    longest_tokens: Array  # [tokens] [C]
    iterations: Iterations
    slot_probability: Array  # of waiting for a slot [-]
    slot_s: Array  # mean of that wait, over all requests [s]
    stable: Array  # whether it keeps up; if not, all are late
    pauses: Array | None = None  # share of the requests that come while no iteration runs; None: one always does [-]

    @property
    def at_once(self) -> Array:
        """Share of the requests that wait for no iteration [-]."""
        idle = self.iterations.idle
        return idle if self.pauses is None else idle + (1.0 - idle) * self.pauses


@pytree
class _Cycle:
    """What is known of an iteration before its transform is asked for, shape ()."""

    met_s: Array  # mean length of those met at any moment [s]
    least_s: Array  # of the iteration before: never less [s]
    some: Array  # share of those that take more [-]
    more_s: Array  # mean of what they take more [s]
    group: Array  # mean size of groups [-]
    per_s: Array  # requests that come in time [1/s]
    follow: Array  # that follow departures, of an iteration [-]
    none: Array  # P(N = 0) [-]
    mean_s: Array  # E[C] [s]


# --- iterations -------------------------------------------------------------------------------------------------------


def iteration_moments(law: Iterations) -> tuple[Array, Array]:
    """(E[C] [s], Var(C) [s^2]): C = (t + g P(N > 0)) / (1 - f), to first order of the burst."""
    mean_b, square_b = jnp.sum(law.mass * law.beside_s), jnp.sum(law.mass * law.beside_s**2)
    busy = _busy(law)

    def with_any_s(cycle_s: Array) -> Array:
        return (law.step_s - law.any_s * jnp.expm1(-law.rate_per_s * cycle_s)) / (1.0 - busy)

    cycle_s = with_any_s(with_any_s(law.step_s / (1.0 - busy)))
    m = law.rate_per_s * cycle_s
    none = jnp.exp(-m)
    of_prompts = m * (square_b + 2.0 * _burst(law, cycle_s) * mean_b**2)
    of_any = law.any_s * none * (law.any_s * (1.0 - none) + 2.0 * m * mean_b)
    return cast(Array, cycle_s), (of_prompts + of_any) / (1.0 - (law.in_time * busy) ** 2)


def _burst(law: Iterations, cycle_s: Array) -> Array:
    """Who come in a burst, on either side, to an iteration of `cycle_s` and those that it lengthens [-]."""
    return law.burst.within(cycle_s / (2.0 * (1.0 - law.in_time * _busy(law))))


def _busy(law: Iterations) -> Array:
    """Share of the time that prompts take [-]."""
    return jnp.minimum(law.rate_per_s * jnp.sum(law.mass * law.beside_s), BUSIEST)


def _cycle(law: Iterations) -> _Cycle:
    cycle_s, variance_s2 = iteration_moments(law)
    extra_s, square_s2 = jnp.maximum(cycle_s - law.step_s, 1e-15), jnp.maximum(variance_s2, 1e-30)
    wide = square_s2 >= extra_s**2
    deviation_s = jnp.sqrt(square_s2)
    more_s = jnp.where(wide, (square_s2 / extra_s + extra_s) / 2.0, deviation_s)
    some = jnp.where(wide, extra_s / more_s, 1.0)
    least_s = law.step_s + jnp.where(wide, 0.0, extra_s - deviation_s)
    met_s = cycle_s + variance_s2 / cycle_s
    met = 1.0 - law.idle if law.crowd is None else 1.0 - law.idle - law.crowd.share
    per_cycle = met * law.rate_per_s * cycle_s  # of those who meet one
    per_s, follow = law.in_time * met * law.rate_per_s, (1.0 - law.in_time) * per_cycle
    group = 1.0 + _burst(law, met_s)
    none = jnp.exp(-follow / group) * _before(least_s, some, more_s, per_s / group)
    mean_s = law.step_s + law.any_s * (1.0 - none) + jnp.sum(law.mass * law.beside_s) * per_cycle
    return _Cycle(met_s, least_s, some, more_s, group, per_s, follow, none, mean_s)


def _before(least_s: Array, some: Array, more_s: Array, v: Array) -> Array:
    """E exp(-v C') of the iteration before."""
    return exp(-v * least_s) * _rest_before(some, more_s, v)


def _rest_before(some: Array, more_s: Array, v: Array) -> Array:
    """The same of what it takes beyond its least."""
    return 1.0 - some * v * more_s / (1.0 + v * more_s)


def _of_prompts(law: Iterations, costs_s: Array, z: Array) -> Array:
    """B(z) [..., Z] of costs [..., G]."""
    each = exp(-z[:, None] * costs_s[..., None, :])
    return jax.lax.complex(each.real @ law.mass, each.imag @ law.mass)


def _of_group(cycle: _Cycle, b: Array) -> Array:
    """E b^n of the n of a group that are behind one of it, or before it."""
    return 1.0 / (cycle.group - (cycle.group - 1.0) * b)


def _events(cycle: _Cycle, b: Array) -> Array:
    """a, where B is b."""
    return cycle.per_s * (1.0 - b) * _of_group(cycle, b)


def _phi(law: Iterations, cycle: _Cycle, z: Array) -> Array:
    """E exp(-z C) [Z]."""
    b = _of_prompts(law, law.beside_s, z)
    v, step, with_any = _events(cycle, b), -z * law.step_s, -z * (law.step_s + law.any_s)
    of_prompts = with_any - cycle.follow * (1.0 - b) * _of_group(cycle, b) - v * cycle.least_s
    step, with_any, of_prompts = exp(jnp.stack([step, with_any, of_prompts]))
    return cycle.none * (step - with_any) + of_prompts * _rest_before(cycle.some, cycle.more_s, v)


def _waits(law: TtftLaw, cycle: _Cycle, z: Array) -> Array:
    """E exp(-z (TTFT - own)) of those who find no idle instance [Z], of complex z."""
    it = law.iterations
    b, behind = _of_prompts(it, jnp.stack([it.beside_s, it.behind_s]), z)
    a, end = _events(cycle, b), _events(cycle, behind) + z
    at_a, at_end = jnp.split(_phi(it, cycle, jnp.concatenate([a, end])), 2)
    before, after = _of_group(cycle, b), _of_group(cycle, behind)
    in_time = (at_a - at_end) / ((end - a) * cycle.mean_s)
    followers = exp(-cycle.follow * ((1.0 - b) * before + (1.0 - behind) * after) / 2.0)
    meets = it.in_time * in_time + (1.0 - it.in_time) * at_end
    of_step = (1.0 - exp(-z * it.step_s)) / (z * it.step_s)  # of who meets a decode step
    meets = meets + it.calm * (of_step - meets)
    met = before * after * followers * meets
    if it.crowd is not None:
        of_crowd = safe_div(it.crowd.share, 1.0 - it.idle)
        met = met + of_crowd * (_waits_in_crowd(it, it.crowd, z, b, behind, of_step) - met)
    slot_s = safe_div(law.slot_s, law.slot_probability)
    slot = 1.0 - law.slot_probability * z * slot_s / (1.0 + z * slot_s)
    return slot * met


def _waits_in_crowd(law: Iterations, crowd: Crowd, z: Array, b: Array, behind: Array, of_step: Array) -> Array:
    """The same of those whom a burst kept from an idle instance, but for the slot [Z]."""
    with_any_s = law.step_s + law.any_s
    lone = exp(-z * with_any_s) * b
    rest = (1.0 - lone) / (z * (with_any_s + jnp.sum(law.mass * law.beside_s)))
    met = crowd.fresh * lone + crowd.meets * rest + (1.0 - crowd.fresh - crowd.meets) * of_step
    return met / ((1.0 + crowd.mates * (1.0 - b)) * (1.0 + crowd.mates * (1.0 - behind)))


def _mean_wait_s(law: TtftLaw, cycle: _Cycle) -> Array:
    """Near its mean [s]: with others as a Poisson stream has them."""
    it = law.iterations
    others = it.rate_per_s * cycle.met_s + (cycle.group - 1.0) * 2.0
    mean_b = jnp.sum(it.mass * (it.beside_s + it.behind_s)) / 2.0
    return law.slot_s + cycle.met_s / 2.0 + others * mean_b


# --- the distribution -------------------------------------------------------------------------------------------------


def ttft_tail(law: TtftLaw, limit_s: ArrayLike, slope_s_per_token: ArrayLike = 0.0) -> Array:
    """P(TTFT > limit + slope * prompt) [-], in [0, 1]."""
    a = limit_s + slope_s_per_token * law.shortest_tokens - law.least_s
    b = limit_s + slope_s_per_token * law.longest_tokens - law.most_s
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)  # what is left for waiting
    width = jnp.maximum(high - low, NARROWEST_S)
    span = jnp.maximum(jnp.max(jnp.where(law.mass > 0, low + width, 0.0)), NARROWEST_S)
    cycle = _cycle(law.iterations)
    near_s = jnp.maximum(_mean_wait_s(law, cycle), 1e-9)
    tail = tail_on_grid(lambda z: _waits(law, cycle, z), span, near_s)
    met = (integral_at(tail, span, low + width) - integral_at(tail, span, low)) / width
    alone = (jnp.minimum(low + width, 0.0) - jnp.minimum(low, 0.0)) / width
    above = met + law.at_once * (alone - met)
    return jnp.sum(law.mass * jnp.where(law.stable, above, 1.0))


def ttft_quantile_s(
    laws: TtftLaw, frac: ArrayLike, slope_s_per_token: ArrayLike = 0.0, probability: float = TAIL_PROBABILITY
) -> Array:
    """The TTFT (less slope * prompt) that the share `probability` of the requests of K pools exceeds [s].

    `laws` has a leading axis of K, `frac` [K] the pools' shares of the requests. Bisection on the falling tail, with
    implicit gradients; where as many are later for a while (1 % are long prompts), the beginning of that while.
    """
    share, most = _shares(frac), _at_most(probability)

    def excess(limit_s: Array) -> Array:
        return jnp.sum(share * _tails(laws, jnp.broadcast_to(limit_s, share.shape), slope_s_per_token)) - most

    slack = -(jnp.asarray(slope_s_per_token) * jnp.max(laws.longest_tokens))
    return falling_root(excess, slack, jnp.max(jnp.where(share > 0, _longest_s(laws), 0.0)), BISECTIONS)


def ttft_quantiles_s(laws: TtftLaw, frac: ArrayLike, probability: float = TAIL_PROBABILITY) -> tuple[Array, Array]:
    """(Of each of K pools [K], of all their requests) as `ttft_quantile_s` has it [s], by one search."""
    share = _shares(frac)

    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), laws)

    def excess(limits_s: Array) -> Array:
        limits = jnp.concatenate([limits_s[:-1], jnp.broadcast_to(limits_s[-1], share.shape)])
        each, of_all = jnp.split(_tails(twice, limits, 0.0), 2)
        return jnp.append(each, jnp.sum(share * of_all)) - _at_most(probability)

    longest_s = _longest_s(laws)
    top = jnp.append(longest_s, jnp.max(jnp.where(share > 0, longest_s, 0.0)))
    found = falling_root(excess, jnp.zeros_like(top), top, BISECTIONS)
    return found[:-1], found[-1]


def _at_most(probability: float) -> float:
    return probability * (1.0 + LEVEL)


def _shares(frac: ArrayLike) -> Array:
    frac = jnp.asarray(frac)
    total = jnp.sum(frac)
    return frac / jnp.where(total > 0, total, 1.0)


def _tails(laws: TtftLaw, limits_s: Array, slope_s_per_token: ArrayLike) -> Array:
    """Of K pools, each at its own limit [K]."""
    return jax.vmap(ttft_tail, (0, 0, None))(laws, limits_s, slope_s_per_token)


def _longest_s(laws: TtftLaw) -> Array:
    """That no quantile of K pools is above [K] [s]."""
    wait_s = jax.vmap(lambda law: _mean_wait_s(law, _cycle(law.iterations)))(laws)
    return jnp.max(laws.most_s, axis=-1) + LONGEST_WAITS * wait_s


def ttft_mean_s(law: TtftLaw) -> Array:
    """Mean TTFT [s]: minus the slope of the transform at 0, and own."""
    cycle = _cycle(law.iterations)
    near = 1e-6 / jnp.maximum(_mean_wait_s(law, cycle), 1e-9)
    wait_s = jnp.real(1.0 - _waits(law, cycle, jnp.reshape(near, 1) + 0j)[0]) / near
    return (1.0 - law.at_once) * wait_s + jnp.sum(law.mass * (law.least_s + law.most_s)) / 2.0
