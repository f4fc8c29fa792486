"""The law of TTFT: transforms inverted, against iterations that are simulated; limits, quantiles and gradients."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.test_util import check_grads
from scipy import stats

from fleetopt_jax.core.laplace import POINTS, integral_at, tail_on_grid
from fleetopt_jax.laws.bursts import Burst, crowded
from fleetopt_jax.laws.queueing import busy_share, idle_share
from fleetopt_jax.laws.ttft import (
    LEVEL,
    Iterations,
    TtftLaw,
    iteration_moments,
    ttft_mean_s,
    ttft_quantile_s,
    ttft_tail,
)

KINDS_S = np.array([0.005, 0.03, 0.4])
SHARES = np.array([0.6, 0.3, 0.1])
BURSTY_PER_S, BURSTY_SHARE = 1000.0, 0.1  # a stream, and what of it comes to a pool of many instances
tails = jax.jit(jax.vmap(ttft_tail, (None, 0, None)))
mean_s = jax.jit(ttft_mean_s)


@jax.jit
def late_s(law: TtftLaw, probability: float = 0.01) -> Array:
    """The TTFT of one pool that so many exceed [s]."""
    return ttft_quantile_s(jax.tree.map(lambda x: x[None], law), jnp.ones(1), probability=probability)


def law_of(busy: float = 0.5, *, step_s: float = 0.02, any_s: float = 0.0, n: float = 1.0, **of_iterations) -> TtftLaw:
    """Prompts of three lengths on one of N instances, whose own iterations are what they add and a step."""
    rate = busy / (SHARES @ KINDS_S)
    numbers = dict(in_time=1.0, idle=0.0, calm=0.0, burst=Burst(1.0, 1.0, 1.0)) | of_iterations
    own_s = step_s + any_s + KINDS_S
    iterations = Iterations(
        rate_per_s=rate, step_s=step_s, any_s=any_s, mass=SHARES, beside_s=KINDS_S, behind_s=KINDS_S, **numbers
    )
    tokens = 1e4 * KINDS_S
    law = TtftLaw(SHARES, own_s, own_s, tokens, tokens, iterations, 0.0, 0.0, True)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype=bool if x is True else float), law)


def drawn_ttft_s(law: TtftLaw, n: int, seed: int = 5, group: float = 1.0) -> np.ndarray:
    """TTFT of n requests to one instance: every iteration takes what came during the one before. Groups, if any, are
    geometric, at Poisson times."""
    it, rng = (
        jax.tree.map(float, replace(law.iterations, mass=0.0, beside_s=0.0, behind_s=0.0)),
        np.random.default_rng(seed),
    )
    own_s, found, length, total = np.asarray(law.least_s), [], it.step_s, 0
    while total < n:
        came = rng.poisson(it.rate_per_s / group * length)
        places = rng.random(came) * length
        if came == 0:  # steps without prompts until somebody comes
            came, places, length = 1, np.array([rng.exponential(group / it.rate_per_s) % it.step_s]), it.step_s
        places = np.repeat(places, rng.geometric(1.0 / group, came) if group > 1 else 1)
        kind = rng.choice(3, len(places), p=SHARES)
        together_s = KINDS_S[kind].sum()
        found.append(length - places + together_s - KINDS_S[kind] + own_s[kind])
        length, total = it.step_s + it.any_s + together_s, total + len(places)
    return np.concatenate(found)


def random_laws(n: int, *, cells: int = 6, seed: int = 14) -> TtftLaw:
    """n laws with cells of some width, idle and busy, with bursts, any_s, slot waits and followers or without."""
    rng = np.random.default_rng(seed)
    tokens = np.sort(np.exp(rng.uniform(0, 10, (n, cells, 2))), axis=2)
    costs = 10.0 ** rng.uniform(-4, 0, (n, 4))
    mass = rng.dirichlet(np.ones(4), n)
    own = 1e-2 + tokens * 10.0 ** rng.uniform(-6, -3, (n, 1, 1))
    return TtftLaw(
        mass=rng.dirichlet(np.ones(cells), n),
        least_s=own[..., 0],
        most_s=own[..., 1],
        shortest_tokens=tokens[..., 0],
        longest_tokens=tokens[..., 1],
        iterations=Iterations(
            rate_per_s=rng.uniform(0.05, 0.8, n) / np.sum(mass * costs, axis=1),
            step_s=10.0 ** rng.uniform(-3, -1, n),
            any_s=10.0 ** rng.uniform(-4, -1.5, n) * rng.integers(2, size=n),
            mass=mass,
            beside_s=costs,
            behind_s=costs * rng.random((n, 1)),
            in_time=rng.uniform(0.5, 1.0, n),
            idle=rng.random(n) * rng.integers(2, size=n),
            calm=rng.random(n) * rng.integers(2, size=n),
            burst=Burst(
                rng.random(n), 10.0 ** rng.uniform(-1, 3, n), 1.0 + rng.uniform(0, 9, n) * rng.integers(2, size=n)
            ),
        ),
        slot_probability=0.05 * rng.random(n) * rng.integers(2, size=n),
        slot_s=1e-4 * rng.random(n),
        stable=np.ones(n, bool),
    )


# --- inversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("span", "error"), [(0.5, 0.01), (3.0, 0.03), (12.0, 0.07)])
def test_transforms_are_inverted(span, error):
    """A gamma distribution, smooth; and one that has a corner: of a uniform and a rare long exponential. What happens
    within a sixteenth of the span is smoothed, so that the error is larger where that is as long as the mean."""
    y = np.linspace(0.0, span, POINTS)
    gamma = tail_on_grid(lambda z: (1.0 + z / 2.0) ** -3.0, jnp.asarray(span), jnp.asarray(1.5))
    np.testing.assert_allclose(gamma, stats.gamma(3.0, scale=0.5).sf(y), atol=error)

    def corner(z):
        return -jnp.expm1(-z) / z * (0.95 + 0.05 / (1.0 + 4.0 * z))

    drawn = np.random.default_rng(1).random(400_000)
    drawn[:20_000] += np.random.default_rng(2).exponential(4.0, 20_000)
    found = tail_on_grid(corner, jnp.asarray(span), jnp.asarray(0.7))
    exact = np.mean(drawn[:, None] > y, axis=0)
    np.testing.assert_allclose(found, exact, atol=error)
    np.testing.assert_allclose(found[y > 2.5], exact[y > 2.5], atol=0.003)  # far from the corner
    assert found[0] == 1.0


def test_the_integral_of_a_tail_goes_straight_below_nothing():
    span = jnp.asarray(2.0)
    tail = jnp.exp(-jnp.linspace(0.0, 2.0, POINTS))
    y = jnp.array([-3.0, 0.0, 0.1, 1.0, 2.0])
    expected = jnp.where(y < 0, y, -jnp.expm1(-y))
    np.testing.assert_allclose(integral_at(tail, span, y), expected, atol=3e-4)


# --- against iterations -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("busy", "any_s"), [(0.1, 0.0), (0.4, 0.02), (0.7, 0.0), (0.8, 0.01)])
def test_the_law_is_that_of_simulated_iterations(busy, any_s):
    """Of one instance, where all come in time: quantiles within 10 %, of which 1 % is the draw's error; the rest is the
    simpler iteration before the last, and the corners that the inversion smooths."""
    law = law_of(busy, any_s=any_s)
    drawn = drawn_ttft_s(law, 60_000)
    at = np.array([0.5, 0.1, 0.01])
    quantiles = [late_s(law, p) for p in at]
    np.testing.assert_allclose(quantiles, np.quantile(drawn, 1.0 - at), rtol=0.1)
    assert float(mean_s(law)) == pytest.approx(drawn.mean(), rel=0.06)


def test_groups_make_newcomers_wait_for_each_other():
    """In groups of two in the mean, all of them within an iteration."""
    law = law_of(0.4, burst=Burst(1.0, 1e9, 3.0))
    found = late_s(law)
    np.testing.assert_allclose(found, np.quantile(drawn_ttft_s(law, 60_000, group=2.0), 0.99), rtol=0.06)


def test_iterations_are_those_of_a_gated_queue():
    """Mean C = t / (1 - f), variance lambda C E[b^2] / (1 - f^2), where nothing else is in them."""
    law = law_of(0.6).iterations
    mean_s, variance_s2 = iteration_moments(law)
    assert float(mean_s) == pytest.approx(0.02 / 0.4, rel=1e-12)
    assert float(variance_s2) == pytest.approx(float(law.rate_per_s) * 0.05 * (SHARES @ KINDS_S**2) / (1 - 0.36))


def test_what_dispatch_leaves_of_chance_orders_the_wait():
    """Fewer wait where an idle instance is found, and where requests follow departures; more where they burst."""
    laws = {
        "idle": law_of(idle=0.9),
        "follow": law_of(in_time=0.5),
        "random": law_of(),
        "burst": law_of(burst=Burst(1.0, 10.0, 3.0)),
    }
    waits = [float(late_s(law)) for law in laws.values()]
    assert waits == sorted(waits) and waits[0] < 0.8 * waits[-1]
    np.testing.assert_allclose(
        tails(law_of(idle=1.0), jnp.array([0.0249, 0.0251, 0.4201]), 0.0), [1, 0.4, 0], atol=1e-2
    )


def test_idle_instances_are_found_by_who_looks():
    assert float(idle_share(2.0, 1.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(idle_share(0.1, 24.0)) == pytest.approx(1.0, abs=1e-3)
    found = jax.vmap(idle_share, (0, None))(jnp.geomspace(1e-6, 1e3, 60), 8.0)
    assert np.all((found >= 0) & (found <= 1)) and np.all(np.diff(found) <= 1e-9)


def met_in_flight(n: float, scv: float, kept: float, staying: Callable[[int], np.ndarray]) -> np.ndarray:
    """Whom each of many requests of gamma gaps meets, of those kept of the stream, n in flight at any moment."""
    rng = np.random.default_rng(3)
    arrivals_s = np.cumsum(rng.gamma(1.0 / scv, scv * kept, int(200_000 / kept)))
    arrivals_s = arrivals_s[rng.random(len(arrivals_s)) < kept]
    gone_s = np.sort(arrivals_s + n * staying(len(arrivals_s)))
    met = np.arange(len(arrivals_s)) - np.searchsorted(gone_s, arrivals_s, side="right")
    return met[len(met) // 20 :]


def idle_of(burst: Burst, n: Array, n_instances: Array) -> Array:
    met, clumped = burst.met(n)
    return idle_share(met, n_instances, clumped)


def test_a_burst_fills_idle_instances():
    """Beside streams of gamma gaps, of times that are exponential, less and more various."""
    rng = np.random.default_rng(4)
    times = {
        "exponential": lambda n: rng.exponential(1.0, n),
        "half its variance": lambda n: rng.gamma(2.0, 0.5, n),
        "lognormal": lambda n: rng.lognormal(-0.7, math.sqrt(1.4), n),
    }
    for (title, staying), scv, kept in itertools.product(times.items(), (1.0, 8.0, 30.0), (1.0, 0.3)):
        for n, n_instances in ((0.05, 2), (0.3, 8), (0.7, 4), (0.7, 40), (0.9, 100)):
            met, clumped = Burst(kept / n_instances, 1.0 / kept, scv).met(n)
            exact = met_in_flight(n * n_instances, scv, kept, staying)
            v = max(float(clumped), 1e-9)
            among, alone = np.mean(exact < n_instances), np.exp(-np.log1p(v * met) / v)
            expected = max((among - alone) / (1.0 - alone), 0.0)
            tolerance = 0.03 if title == "exponential" else 0.08
            assert float(idle_share(met, n_instances, clumped)) == pytest.approx(expected, abs=tolerance), title
            assert float(met) == pytest.approx(exact.mean() / n_instances, rel=0.03 if title == "exponential" else 0.15)


def test_instances_are_busy_for_as_long_as_sequences_keep_them():
    """Of gamma gaps and exponential times, at random moments, sequences at instances of their own if there are any."""
    rng = np.random.default_rng(8)
    for scv, (n, n_instances) in itertools.product((1.0, 8.0), ((0.05, 1), (0.7, 1), (3.0, 1), (0.3, 8), (0.9, 60))):
        arrivals_s = np.cumsum(rng.gamma(1.0 / scv, scv, 200_000))
        gone_s = np.sort(arrivals_s + n * n_instances * rng.exponential(1.0, len(arrivals_s)))
        at_s = np.sort(rng.uniform(arrivals_s[10_000], arrivals_s[-1], 50_000))
        there = np.searchsorted(arrivals_s, at_s) - np.searchsorted(gone_s, at_s)
        exact = np.mean(np.minimum(there, n_instances)) / n_instances
        met, _ = Burst(1.0 / n_instances, 1.0, scv).met(n)
        assert float(busy_share(n, n_instances, met - n)) == pytest.approx(exact, abs=0.05 * min(2 * n, 1))
    shares = jax.vmap(lambda n, among: busy_share(n, among, 0.1), (0, None))(jnp.geomspace(1e-9, 1e4, 80), 6.0)
    assert np.all(np.diff(shares) >= -1e-12) and float(shares[0]) < 1e-6 and float(shares[-1]) == pytest.approx(1.0)
    counts = jnp.arange(1.0, 60.0)
    for together, b in itertools.product(
        (0.03, 1.0, 5.0, 40.0), (0.0, 0.3, 20.0)
    ):  # of the same in flight, more are busy
        busy = counts * busy_share(together / counts, counts, b / counts)
        assert np.all(np.diff(busy) >= -1e-12)
    slopes = jax.vmap(jax.grad(busy_share, (0, 1, 2)))(
        *jnp.array([[1e-12, 0.5, 1e4, 2.0], [1.0, 40.0, 3.0, jnp.inf], [0.0, 0.2, 5.0, 0.0]])
    )
    assert np.all(np.isfinite(slopes))


def test_fewer_find_an_idle_instance_in_a_burst():
    scv = jnp.concatenate([jnp.ones(1), jnp.geomspace(1.001, 1e3, 60)])
    for n, among in ((0.3, 200.0), (0.9, 200.0), (1.3, 8.0), (1e-6, 1.0)):

        def found(scv: Array, n: Array, among: Array) -> Array:
            return idle_of(Burst(1.0 / among, jnp.ones(()), scv), n, among)

        shares = jax.vmap(found, (0, None, None))(scv, n, among)
        assert np.all(np.diff(shares) <= 1e-6) and float(shares[-1]) < float(shares[0]) + 1e-6
        slopes = jax.vmap(jax.grad(found, (0, 1, 2)), (0, None, None))(scv, n, among)
        assert all(np.all(np.isfinite(slope)) for slope in slopes)


def test_bursts_are_those_of_gamma_gaps():
    """The renewal function, less a Poisson stream's: as a sum over who comes next, and the one after, and so on."""
    times = np.geomspace(1e-3, 20.0, 30)
    within = jax.jit(jax.vmap(lambda t, scv: Burst(0.5, 2.0, scv).within(t / 2.0), (0, None)))
    for scv in (1.2, 2.0, 8.0, 40.0):
        exact = sum(stats.gamma.cdf(times / scv, n / scv) for n in range(1, 2000)) - times
        found = np.asarray(within(times, scv)) / 0.5
        np.testing.assert_allclose(found, exact, rtol=3e-3)
        assert float(within(np.array([1e9]), scv)[0]) == pytest.approx((scv - 1.0) / 4.0, rel=1e-3)
    assert np.all(np.abs(within(times, 1.0)) < 1e-9) and float(within(np.zeros(1), 8.0)[0]) < 0.05
    slopes = jax.vmap(jax.grad(lambda t, scv: Burst(0.5, 2.0, scv).within(t), (0, 1)), (0, None))
    for scv in (1.0, 8.0, 173.0):
        assert all(np.all(np.isfinite(x)) for x in slopes(np.append(times, [1e-9, 1e9]), scv))


def filled_ttft_s(step_s: float, prompt_s: float, n_steps: int, *, n_instances: int, scv: float) -> np.ndarray:
    """Requests of gamma gaps, some of them to this pool, each to the instance with the fewest; every iteration
    takes whom it finds waiting and gives all others a token. [s] less what a lone prompt takes."""
    rng = np.random.default_rng(6)
    gaps_s = rng.gamma(1.0 / scv, scv, 60_000) / BURSTY_PER_S
    arrivals_s = np.cumsum(gaps_s)[rng.random(len(gaps_s)) < BURSTY_SHARE]
    ends_s, waiting, left = np.full(n_instances, np.inf), [[] for _ in range(n_instances)], [[]] * n_instances
    waits_s = np.zeros(len(arrivals_s))

    def begin(i: int, now_s: float) -> None:
        for j in waiting[i]:
            waits_s[j] = now_s - arrivals_s[j] + (len(waiting[i]) - 1) * prompt_s
        left[i] = left[i] + [n_steps] * len(waiting[i])
        ends_s[i] = now_s + step_s + prompt_s * len(waiting[i]) if left[i] else np.inf
        waiting[i] = []

    for j, now_s in enumerate(arrivals_s):
        while (i := int(np.argmin(ends_s))) >= 0 and ends_s[i] <= now_s:
            left[i] = [n - 1 for n in left[i] if n > 1]
            begin(i, ends_s[i])
        lengths = np.array([len(a) + len(b) for a, b in zip(waiting, left, strict=True)])
        i = int(rng.choice(np.flatnonzero(lengths == lengths.min())))
        waiting[i].append(j)
        if np.isinf(ends_s[i]):
            begin(i, now_s)
    return waits_s


@pytest.mark.slow
def test_who_finds_none_idle_for_a_burst_meets_prompts():
    """Of many instances, of which a stream of Poisson gaps would leave some idle."""
    step_s, prompt_s, n_steps, n_instances, scv = 0.006, 0.15, 30, 50, 100.0
    rate = BURSTY_PER_S * BURSTY_SHARE / n_instances
    n = rate * (step_s * n_steps + prompt_s)
    burst = Burst(*(jnp.asarray(x) for x in (BURSTY_SHARE / n_instances, BURSTY_PER_S, scv)))
    idle, crowd = crowded(burst, n, rate, n_instances, step_s + prompt_s)
    assert float(idle + crowd.share) == pytest.approx(float(idle_share(n, n_instances)), abs=1e-12)
    drawn = filled_ttft_s(step_s, prompt_s, n_steps, n_instances=n_instances, scv=scv)
    drawn = drawn[drawn > 0]
    law = law_of(step_s=step_s, burst=burst)
    cost, none = jnp.full(3, prompt_s), jnp.zeros(3)
    crowd = replace(crowd, share=jnp.ones(()))
    iterations = replace(law.iterations, rate_per_s=jnp.asarray(rate), beside_s=cost, behind_s=cost, crowd=crowd)
    law = replace(law, least_s=none, most_s=none, iterations=iterations)
    assert float(mean_s(law)) == pytest.approx(drawn.mean(), rel=0.12)
    late = [late_s(law, p) for p in (0.3, 0.1)]
    np.testing.assert_allclose(late, np.quantile(drawn, (0.7, 0.9)), rtol=0.12)


def test_nobody_is_crowded_out_by_poisson_arrivals():
    one = jnp.ones(())
    for n, n_instances in ((0.3, 8.0), (0.9, 100.0), (4.0, 60.0), (1e-12, 1.0)):
        idle, crowd = crowded(Burst(0.1 * one, 50.0 * one, one), n, 2.0, n_instances, 0.1)
        assert float(idle) == pytest.approx(float(idle_share(n, n_instances)), abs=1e-12) and float(crowd.share) < 1e-12
        slopes = jax.grad(lambda x: sum(jax.tree.leaves(crowded(Burst(*x[:3]), *x[3:])[1])))(
            jnp.array([0.1, 50.0, 1.0, n, 2.0, n_instances, 0.1])
        )
        assert np.all(np.isfinite(slopes))


def test_followers_come_in_bursts_as_well():
    """Groups lengthen the wait as much where half of them follow departures."""
    burst = Burst(1.0, 1e9, 3.0)

    def p99(**of_iterations) -> float:
        law = law_of(0.4, **of_iterations)
        return float(late_s(law))

    rises = [p99(burst=burst, in_time=e) / p99(in_time=e) for e in (1.0, 0.5)]
    assert rises[1] > 0.95 * rises[0] > 1.2


# --- limits, quantiles, gradients -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tail_falls_from_one_to_nothing():
    laws = random_laws(80)
    limits = np.concatenate([[-1.0, 0.0], np.geomspace(1e-3, 1e5, 80)])
    found = np.asarray(jax.jit(jax.vmap(jax.vmap(ttft_tail, (None, 0)), (0, None)))(laws, limits))
    assert np.all(np.abs(found[:, 0] - 1) < 1e-6)  # rounding over the width of narrow cells
    assert np.all(found[:, -1] < 2e-3)  # what the inversion leaves of a tail that has long ended
    assert np.all(np.diff(found, axis=1) <= 0.01)
    unstable = replace(laws, stable=np.zeros(80, bool))
    np.testing.assert_allclose(jax.vmap(ttft_tail, (0, None))(unstable, 1e9), 1.0)


def test_the_quantile_inverts_the_tail_and_the_slope_shifts_the_limit():
    laws = random_laws(40)
    tail, quantile = jax.jit(jax.vmap(ttft_tail)), jax.jit(jax.vmap(ttft_quantile_s, (0, 0, None, None)))
    for slope, probability in ((0.0, 0.01), (2e-5, 0.01), (1e-3, 0.2)):
        limits = quantile(jax.tree.map(lambda x: x[:, None], laws), np.ones((40, 1)), slope, probability)
        np.testing.assert_allclose(tail(laws, limits, np.full(40, slope)), probability, rtol=1e-4)
    law = jax.tree.map(lambda x: x[0], laws)
    less = law.least_s - 1e-4 * law.shortest_tokens, law.most_s - 1e-4 * law.longest_tokens
    shifted = replace(law, least_s=less[0], most_s=less[1])
    limits = jnp.array([-1.0, 0.01, 0.1, 3.0])
    np.testing.assert_allclose(tails(law, limits, 1e-4), tails(shifted, limits, 0.0), atol=1e-6)


def test_where_just_one_per_cent_is_later_for_long_the_p99_is_when_that_begins():
    """Prompts of which 1 % take 4 s alone: who is promised anything between is kept, and is told so."""
    law = law_of(1e-6, idle=1.0)
    late = 0.01 * (1.0 + LEVEL / 2.0)
    own_s = jnp.array([0.5, 1.0, 4.0])
    law = replace(law, mass=jnp.array([0.5, 0.5 - late, late]), least_s=own_s, most_s=own_s)
    np.testing.assert_allclose(tails(law, jnp.array([1.1, 2.0, 3.9]), 0.0), late, rtol=1e-9)
    assert float(late_s(law)) == pytest.approx(1.0, abs=1e-3)
    assert float(late_s(law, 0.0099)) == pytest.approx(4.0, abs=1e-3)


@pytest.mark.slow
def test_the_quantile_of_many_pools_is_that_of_all_their_requests():
    laws = jax.tree.map(lambda x: x.reshape(30, 3, *x.shape[1:]), random_laws(90))
    frac = np.random.default_rng(16).dirichlet(np.ones(3), 30) * 0.7  # shares need not sum to 1: some are unserved
    of_all = np.asarray(jax.jit(jax.vmap(ttft_quantile_s))(laws, frac))
    tail = jax.jit(jax.vmap(lambda law, x: jax.vmap(ttft_tail, (0, None))(law, x)))(laws, of_all)
    np.testing.assert_allclose(np.sum(frac / 0.7 * tail, axis=1), 0.01, rtol=1e-4)
    empty = frac * np.array([1.0, 0.0, 0.0])
    alone = jax.jit(jax.vmap(ttft_quantile_s))(jax.tree.map(lambda x: x[:, :1], laws), np.ones((30, 1)))
    np.testing.assert_allclose(jax.jit(jax.vmap(ttft_quantile_s))(laws, empty), alone, rtol=1e-6)


@pytest.mark.slow
def test_the_law_is_differentiable_in_every_number():
    laws = jax.tree.map(lambda x: x[:2], random_laws(8, seed=17))
    numbers = replace(laws, stable=None)

    def log_quantile(log_numbers, log_frac):
        law = replace(jax.tree.map(jnp.exp, log_numbers), stable=laws.stable)
        return jnp.log(ttft_quantile_s(law, jnp.exp(log_frac), 1e-6))

    at = jax.tree.map(lambda x: jnp.log(jnp.maximum(x, 1e-3)), (numbers, jnp.array([0.3, 0.6])))
    check_grads(jax.jit(log_quantile), at, order=1, modes=("fwd", "rev"), rtol=1e-3, atol=1e-4)


def test_gradients_are_finite_at_the_boundaries():
    """Without traffic, without waits, without prompts that cost anything, just before saturation."""
    edges = [
        law_of(1e-12),
        law_of(0.9989),
        law_of(idle=1.0, in_time=0.5),
        law_of(step_s=1e-9),
        replace(law_of(), mass=jnp.zeros(3)),
    ]
    slope = jax.jit(jax.grad(ttft_tail, allow_int=True))
    for law in edges:
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slope(law, 0.5)) if x.dtype == float)
