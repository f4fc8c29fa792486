"""The laws of the preset `physical`: experts, sequences in flight, paged caches, demand, latency, measured engines."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats
from scipy.optimize import brentq

from fleetopt_jax.catalog.engines import build, law_of, own_fits
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.llms import LLMS, at_precision, llm_entry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.struct import as_floats, stack
from fleetopt_jax.laws.decode import DecodeStep
from fleetopt_jax.laws.demand import Demand, held_tokens, prefill_moments_s, squeezed_demand
from fleetopt_jax.laws.demand import demand as demand_of_columns
from fleetopt_jax.laws.itl import ItlLaw, cycle_moments, itl_quantile_s
from fleetopt_jax.laws.kv_cache import KvCapacity, max_sequences, paged_sequences, physical_kv
from fleetopt_jax.laws.llm import Llm, expert_coverage, make_llm
from fleetopt_jax.laws.measured import ideal_bytes, ideal_flops, measured_decode_step, measured_power, prefill_gpu_w
from fleetopt_jax.laws.occupancy import instance_capacity_per_s, sequences_in_flight, shared_prefill
from fleetopt_jax.laws.prefill import make_prefill, prefill_coefficients_s, prefill_s
from fleetopt_jax.laws.queueing import bursty_wait, erlang_c, mean_wait_s, thinned_scv

N = 2000
in_flight = jax.jit(jax.vmap(sequences_in_flight))
in_flight_grad = jax.jit(jax.vmap(jax.grad(sequences_in_flight, argnums=tuple(range(6)))))
step_s = jax.jit(jax.vmap(DecodeStep.step_s))
paged = jax.jit(jax.vmap(paged_sequences))


def uniform(*ranges: tuple[float, float], seed: int = 0, n: int = N) -> list[np.ndarray]:
    """One array of n numbers for each range."""
    u = np.random.default_rng(seed).random((len(ranges), n))
    return [low + (high - low) * row for (low, high), row in zip(ranges, u, strict=True)]


def demand(prompt_tokens, output_tokens) -> Demand:
    """Of requests with no cache and no draft: what is prefilled is held, each step gives a token."""
    return demand_of_columns(prompt_tokens, prompt_tokens, output_tokens, output_tokens)


def random_steps(seed: int = 1, *, experts: bool = True, windowed: bool = True) -> DecodeStep:
    base, expert, share, per_seq, per_token, short, window = uniform(
        (1e-3, 2e-2), (0, 5e-2), (0.002, 0.5), (0, 1e-4), (0, 1e-7), (0, 1e-7), (0, 4096), seed=seed
    )
    return DecodeStep(
        base_s=base,
        expert_s=expert * experts,
        expert_share=share * experts,
        per_seq_s=per_seq,
        per_token_s=per_token,
        windowed_token_s=short * windowed,
        window_tokens=window * windowed,
    )


def busy_instances(step: DecodeStep, load: np.ndarray, seed: int = 2) -> tuple[np.ndarray, ...]:
    """(n_max, rate, steps, context, f) of instances at `load` times what they can take."""
    n_max, steps, context, prefill = uniform((1, 512), (2, 1000), (1, 16_384), (1e-4, 0.5), seed=seed)
    capacity = jax.vmap(instance_capacity_per_s)(step, n_max, steps, context, prefill)
    rate = load * np.asarray(capacity)
    return n_max, rate, steps, context, rate * prefill


# --- experts --------------------------------------------------------------------------------------------------------


def test_expert_coverage_is_that_of_random_routing():
    rng = np.random.default_rng(0)
    for n_experts, k, n_tokens in ((8, 2, 3), (128, 8, 24), (256, 8, 100), (64, 6, 1)):
        chosen = np.argpartition(rng.random((1000, n_tokens, n_experts)), k, axis=2)[:, :, :k]
        touched = np.zeros((1000, n_experts), dtype=bool)
        touched[np.arange(1000)[:, None], chosen.reshape(1000, -1)] = True
        shares = touched.mean(axis=1)
        # Four standard errors of the simulated mean.
        assert float(expert_coverage(k / n_experts, n_tokens)) == pytest.approx(
            shares.mean(), abs=4 * shares.std() / np.sqrt(1000) + 1e-12
        )


def test_expert_coverage_starts_with_one_token_and_ends_with_all_experts():
    share, n = uniform((0, 0.999), (0, 2000))
    covered = np.asarray(expert_coverage(share, n))
    assert np.all((covered >= 0) & (covered <= 1))
    np.testing.assert_allclose(expert_coverage(share, 1.0), share, rtol=1e-12)
    assert np.all(np.asarray(expert_coverage(share, 0.0)) == 0)
    assert np.all(np.asarray(expert_coverage(0.0, n)) == 0)
    assert np.all(np.asarray(expert_coverage(share, n + 1)) >= covered)


def test_qwen3_235b_streams_79_percent_of_its_experts_at_24_tokens():
    llm = at_precision(llm_entry("qwen3-235b-a22b").architecture, None, "bf16")
    assert round(float(expert_coverage(llm.expert_share, 24.0)), 2) == 0.79


# --- decode step ----------------------------------------------------------------------------------------------------


def test_the_general_decode_step_adds_experts_and_sliding_windows():
    step, (n, context) = random_steps(), uniform((0, 1024), (1, 16_384), seed=3)
    covered = 1 - (1 - step.expert_share) ** n
    scanned = step.per_token_s * context + step.windowed_token_s * np.minimum(context, step.window_tokens)
    expected = step.base_s + step.expert_s * covered + n * (step.per_seq_s + scanned)
    np.testing.assert_allclose(step_s(step, n, context), expected, rtol=1e-12)
    # Concave in n, affine in L on either side of the window: what the fixed point and the service moments rest on.
    middle, low, high = step_s(step, n + 1, context), step_s(step, n, context), step_s(step, n + 2, context)
    assert np.all(np.asarray(2 * middle - low - high) >= -1e-15)
    intercept, slope = jax.vmap(DecodeStep.line)(step, n, context)
    np.testing.assert_allclose(intercept + slope * context, low, rtol=1e-12)
    same_side = np.where(context < step.window_tokens, 0.5 * context, 2 * context)
    np.testing.assert_allclose(intercept + slope * same_side, step_s(step, n, same_side), rtol=1e-12)


# --- sequences in flight --------------------------------------------------------------------------------------------


def test_sequences_of_a_dense_model_have_a_closed_form():
    step = random_steps(experts=False)
    (load,) = uniform((0.0, 0.9), seed=4)
    n_max, rate, steps, context, f = busy_instances(step, load)
    h = step.per_seq_s + step.per_token_s * context + step.windowed_token_s * np.minimum(context, step.window_tokens)
    # n = lambda D (W + h) / (1 - f - lambda D h), as long as it is below n_max.
    exact = rate * steps * (step.base_s + h) / (1 - f - rate * steps * h)
    np.testing.assert_allclose(
        in_flight(step, n_max, rate, steps, context, f), np.where(exact < n_max, exact, n_max), rtol=1e-10
    )
    assert np.mean(exact < n_max) > 0.7


def test_sequences_of_a_mixture_of_experts_solve_littles_law():
    step = random_steps()
    (load,) = uniform((0.0, 1.0), seed=5)
    instances = busy_instances(step, load)
    n_max, rate, steps, context, f = instances
    n = np.asarray(in_flight(step, *instances))

    def missing(x, i):
        one = DecodeStep(*(float(values[i]) for values in vars(step).values()))
        covered = 1 - (1 - one.expert_share) ** (x + 1)
        scanned = one.per_token_s * context[i] + one.windowed_token_s * min(context[i], one.window_tokens)
        t = one.base_s + one.expert_s * covered + (x + 1) * (one.per_seq_s + scanned)
        return rate[i] * steps[i] * t - x * (1 - f[i])

    below = 0
    for i in range(500):
        if missing(n_max[i], i) < 0:
            below += 1
            assert n[i] == pytest.approx(brentq(missing, 0, n_max[i], args=(i,), xtol=1e-13, rtol=1e-14), rel=1e-10)
        else:
            assert n[i] == n_max[i]
    assert 300 < below < 500


@pytest.mark.slow
def test_sequences_rise_with_the_rate_up_to_their_cap_and_stay_finite_beyond():
    step = random_steps()
    loads = np.array([0.0, 0.3, 0.7, 0.95, 1 - 1e-9, 1.0, 1 + 1e-9, 1.3, 1e6])
    rows = [busy_instances(step, load) for load in loads]
    n = np.stack([in_flight(step, *row) for row in rows])
    assert np.all(n[0] == 0)
    assert np.all(np.diff(n, axis=0) >= -1e-9)
    assert np.all(n <= rows[0][0])
    assert np.all(n[loads >= 1] == rows[0][0])
    for row in rows:
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(in_flight_grad(step, *row)))


def test_the_fixed_point_is_differentiable_in_every_coefficient():
    step = DecodeStep(6e-3, 2e-2, 1 / 16, 6e-5, 3e-8, 2e-8, 1024.0)
    at = jax.tree.map(jnp.log, (step, 200.0, 5.0, 150.0, 3000.0, 0.2))

    def logs(logs_of):
        return jnp.log(sequences_in_flight(*jax.tree.map(jnp.exp, logs_of)))

    n = float(jnp.exp(logs(at)))
    assert 5 < n < 150  # experts matter, and the cap does not
    check_grads(jax.jit(logs), (at,), order=1, modes=("fwd", "rev"), rtol=1e-6, atol=1e-6)


def test_an_instance_at_its_capacity_is_full_by_littles_law():
    step = random_steps()
    n_max, steps, context, prefill = uniform((1, 512), (2, 1000), (1, 16_384), (0, 0.5), seed=6)
    rate = np.asarray(jax.vmap(instance_capacity_per_s)(step, n_max, steps, context, prefill))
    f = rate * prefill
    assert np.all((f >= 0) & (f <= 1))
    # n_max sequences, each for D steps stretched by the share prefill takes.
    np.testing.assert_allclose(rate * steps * step_s(step, n_max, context), n_max * (1 - f), rtol=1e-9)


# --- paged KV cache -------------------------------------------------------------------------------------------------


def test_paged_caches_overflow_about_one_time_in_a_hundred():
    """Whole requests, whole blocks, random ages: nothing of the law's normal approximation but its answer."""
    rng = np.random.default_rng(7)
    for median, spread, output, blocks in ((600, 1.0, 200, 20_000), (8000, 0.5, 100, 60_000), (40, 0.7, 500, 9000)):
        p = np.ceil(median * np.exp(spread * rng.standard_normal(4000)))
        o = np.ceil(output * rng.exponential(size=4000)) + 1
        held, variance = held_tokens(jax.tree.map(jnp.mean, demand(p, o)))
        kv = KvCapacity(1.0 * blocks, jnp.inf, 0.0, 4096.0)
        n = int(paged_sequences(kv, 16.0, held, variance))
        assert 60 < n < 4096
        active = rng.choice(4000, (4000, n), p=o / o.sum())  # an active sequence is met for as long as it decodes
        tokens = p[active] + rng.random((4000, n)) * o[active]
        overflow = np.mean(np.ceil(tokens / 16).sum(axis=1) > blocks)
        # 1 % by the normal law; skewed lengths make it up to twice that, and 4,000 trials know it to +-0.5 %.
        assert 0.003 < overflow < 0.025, (n, overflow)


def test_paging_is_reserving_where_every_request_fills_its_window():
    rng = np.random.default_rng(8)
    blocks, window = rng.integers(1, 200_000, N), rng.integers(64, 100_000, N)
    kv = KvCapacity(1.0 * blocks, np.full(N, np.inf), np.zeros(N), np.full(N, 1e9))
    n = np.asarray(paged(kv, window, 1.0 * window, np.zeros(N)))
    fits = blocks * 16 >= window
    assert np.all((n > 0) == fits)
    whole = np.ceil(window / 16)
    # Half a block is left unfilled on average, between none and one.
    assert np.all(n[fits] <= np.maximum(blocks // (whole - 1), 1)[fits])
    assert np.all(n[fits] >= (blocks // (whole + 1))[fits])
    reserved = np.asarray(jax.vmap(max_sequences)(kv, 1.0 * window))
    assert np.mean(n[fits] == reserved[fits]) > 0.9  # one block is little of most windows


def test_paged_capacity_is_monotone_capped_and_zero_without_room():
    blocks, window, held, spread, most = uniform((10, 1e5), (16, 2e5), (1, 2e4), (0, 2e4), (1, 2000), seed=9)
    kv = KvCapacity(blocks, np.full(N, np.inf), np.zeros(N), np.floor(most))
    n = np.asarray(paged(kv, window, held, spread**2))
    fits = window <= 16 * blocks
    assert 0.3 < np.mean(fits) < 1
    assert np.all(n[~fits] == 0)
    assert np.all((n >= fits) & (n <= np.floor(most)) & (n == np.floor(n)))
    assert np.any(n[fits] == np.floor(most)[fits])
    assert np.all(n >= paged(kv, window, 1.1 * held, spread**2))
    assert np.all(n >= paged(kv, window, held, 1.1 * spread**2))
    assert np.all(n >= paged(kv, 2 * window, held, spread**2))
    assert np.all(n <= paged(KvCapacity(1.1 * blocks, *list(vars(kv).values())[1:]), window, held, spread**2))
    # Tokens of sliding-window layers count for every sequence.
    assert np.all(n >= paged(KvCapacity(blocks, kv.slot_tokens, held, kv.max_num_seqs), window, held, spread**2))


def test_paged_capacity_is_differentiable_in_every_number():
    def logs(blocks, fixed, held, variance):
        kv = KvCapacity(jnp.exp(blocks), jnp.inf, jnp.exp(fixed), 1e9)
        return jnp.log(paged_sequences(kv, 4096.0, jnp.exp(held), jnp.exp(variance), whole=False))

    check_grads(jax.jit(logs), tuple(np.log([2e4, 300.0, 900.0, 8e5])), order=1, modes=("fwd", "rev"), rtol=1e-6)
    slope = jax.grad(lambda v: paged_sequences(KvCapacity(100.0, jnp.inf, 0.0, 64.0), 16.0, 30.0, v, whole=False))
    assert jnp.isfinite(slope(0.0))  # no variance: the square root is guarded


# --- demand ---------------------------------------------------------------------------------------------------------


def test_held_tokens_are_the_time_average_over_every_decode_step():
    rng = np.random.default_rng(10)
    p, o = rng.integers(1, 3000, 200), rng.integers(1, 800, 200)
    weight = rng.dirichlet(np.ones(200))
    mean, variance = held_tokens(jax.tree.map(lambda x: jnp.sum(weight * x), demand(1.0 * p, 1.0 * o)))
    steps = [pi + np.arange(oi) + 0.5 for pi, oi in zip(p, o, strict=True)]  # half way between two tokens
    each = np.concatenate(steps)
    of_each = np.repeat(weight, o)
    exact = np.average(each, weights=of_each)
    assert float(mean) == pytest.approx(exact, rel=1e-12)
    # The integral over a step of the square exceeds the square at its middle by 1 / 12.
    assert float(variance) == pytest.approx(np.average((each - exact) ** 2, weights=of_each) + 1 / 12, rel=1e-9)


def test_held_variance_is_never_negative_and_nothing_asked_holds_nothing():
    p, o = np.exp(uniform((0, 12), (0, 10), seed=11))
    mean, variance = jax.vmap(lambda p, o: held_tokens(demand(p, o)))(p, o)
    np.testing.assert_allclose(mean, p + o / 2, rtol=1e-14)
    assert np.all(np.asarray(variance) >= 0)
    assert [float(x) for x in held_tokens(demand(5.0, 0.0))] == [0.0, 0.0]


def test_squeezed_prompts_fill_the_window():
    rng = np.random.default_rng(12)
    output, weight = np.floor(rng.uniform(0, 2000, 300)), rng.random(300)
    powers = jnp.stack([jnp.sum(weight * output**j) for j in range(5)])
    for window in (2000.0, 4096.0, 131_072.0):
        each = jax.tree.map(lambda x: jnp.sum(weight * x), demand(window - output, output))
        # Differences of fourth powers: (B - o)^4 in five terms loses some digits to cancellation.
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), squeezed_demand(window, powers), each)


def test_prefill_moments_are_those_of_the_prompts_themselves():
    rng = np.random.default_rng(13)
    prefill = make_prefill(chunk_tokens=1, calibration_tokens=1, per_token_s=3e-5, per_token2_s=2e-10, gpu_w=1)
    p, weight = np.exp(rng.uniform(0, 12, 300)), rng.dirichlet(np.ones(300))
    each = prefill_s(prefill, p)
    mean, square = prefill_moments_s(prefill, jax.tree.map(lambda x: jnp.sum(weight * x), demand(p, np.ones(300))))
    np.testing.assert_allclose([mean, square], [weight @ each, weight @ each**2], rtol=1e-12)


# --- iterations that prefill ----------------------------------------------------------------------------------------


def test_iterations_are_those_of_a_gated_queue():
    """Simulated: each iteration is one decode step and the work that came during the one before."""
    rng = np.random.default_rng(18)
    for step, f, sizes, shares in (
        (0.02, 0.6, [0.01, 0.2], [0.8, 0.2]),
        (0.03, 0.2, [0.05, 0.4], [0.5, 0.5]),
        (0.05, 0.85, [0.02, 0.03], [0.3, 0.7]),
    ):
        sizes, shares = np.array(sizes), np.array(shares)
        rate = f / (sizes @ shares)
        cycle, totals = np.full(20_000, step / (1 - f)), np.zeros(3)
        for i in range(260):
            counts = rng.poisson(rate * shares * cycle[:, None])
            if i >= 60:  # the first forget the start
                totals += [len(cycle), cycle.sum(), (cycle**2).sum()]
            cycle = step + counts @ sizes
        mean = totals[1] / totals[0]
        variance = totals[2] / totals[0] - mean**2
        cycle_s, variance_s2 = cycle_moments(step, rate, f, shares @ sizes**2)
        # Four million iterations, correlated over some ten: 1 % of a variance is more than four standard errors.
        assert float(cycle_s) == pytest.approx(mean, rel=3e-3)
        assert float(variance_s2) == pytest.approx(variance, rel=2e-2)


def test_itl_quantile_counts_the_chunk_one_token_in_a_hundred_shares():
    def quantile(rate, prompts=(100.0, 5000.0), variance=0.0, cycle=0.03):
        numbers = as_floats(step_s=0.02, cycle_s=cycle, cycle_variance_s2=variance, rate_per_s=rate, most_s=2048e-5)
        full, rest = np.divmod(prompts, 2048.0)  # chunks of at most 2,048 tokens, 10 us each
        chunk_s = np.concatenate([1e-5 * rest, np.full(2, 2048e-5)])
        law = ItlLaw(**numbers, chunk_s=jnp.array(chunk_s), chunks=jnp.concatenate([np.full(2, 0.5), 0.5 * full]))
        return float(itl_quantile_s(law))

    assert quantile(0.0) == 0.02
    assert quantile(1e-3) == 0.02  # fewer than one iteration in a hundred has a chunk
    assert quantile(100.0) == pytest.approx(0.02 + 2048e-5, rel=1e-12)  # most have one, and it is full
    assert quantile(100.0, prompts=(100.0, 300.0)) == pytest.approx(0.02 + 300e-5, rel=1e-12)
    rates = [quantile(rate) for rate in np.geomspace(1e-4, 1e3, 60)]
    assert rates == sorted(rates)
    # Prompts that share an iteration add up: the gamma quantile, here against scipy, up to a whole budget.
    shared = quantile(1e-3, prompts=(10.0, 20.0), variance=2e-5, cycle=0.03)
    exact = 0.02 + stats.gamma.ppf(0.99, a=1e-4 / 2e-5, scale=2e-5 / 1e-2)
    assert shared == pytest.approx(min(exact, 0.02 + 2048e-5), rel=0.01)
    assert quantile(1e-3, variance=1e-3) == pytest.approx(0.02 + 2048e-5)


# --- prefill shared with others --------------------------------------------------------------------------------------


def test_shared_prefill_is_the_covariance_of_a_simulated_batch():
    """Iterations that prefill what came during the one before; a constant decode step; geometric outputs of mean D.

    400,000 iterations leave about 2 % of noise; the law takes arrivals during an iteration as Poisson given its length,
    which is how they are drawn here."""
    rng = np.random.default_rng(5)
    rate, step_s, prefill_s, n_steps = 6.0, 0.02, 0.1, 20.0  # f = 0.6
    n_iterations = 400_000
    cycle, arrived, decoding = step_s, 0, 0
    cycles, counts = np.empty(n_iterations), np.empty(n_iterations)
    for i in range(n_iterations):
        cycle = step_s + prefill_s * arrived
        cycles[i], counts[i] = cycle, decoding
        decoding = decoding - rng.binomial(decoding, 1.0 / n_steps) + arrived
        arrived = rng.poisson(rate * cycle)
    cycles, counts = cycles[1000:], counts[1000:]
    measured = np.cov(cycles, counts)[0, 1] / cycles.mean()
    assert float(shared_prefill(rate * prefill_s, n_steps, 0.0)) == pytest.approx(measured, rel=0.08)
    assert float(shared_prefill(0.0, n_steps, 1.0)) == 0.0


# --- bursty arrivals ------------------------------------------------------------------------------------------------


def test_bursty_waits_are_those_of_mmc_at_scv_one():
    u = np.random.default_rng(20).random((3, N))
    servers, service = np.exp(u[0] * 8), 0.05 * 400.0 ** u[1]
    rate = (0.01 + 0.98 * u[2]) * servers / service
    ones = np.ones(N)
    waits, mean_s = jax.jit(jax.vmap(bursty_wait))(servers, rate, service, ones, ones)
    np.testing.assert_allclose(waits, jax.jit(jax.vmap(erlang_c))(servers, rate * service), rtol=1e-12)
    np.testing.assert_allclose(mean_s, jax.jit(jax.vmap(mean_wait_s))(servers, rate, service, ones), rtol=1e-12)


def test_waits_rise_with_both_variabilities_and_are_for_ever_in_overload():
    u = np.random.default_rng(21).random((5, N))
    servers, service, rho = np.exp(u[0] * 6), 0.05 * 400.0 ** u[1], 1.2 * u[2] + 1e-3
    rate, arrivals, services = rho * servers / service, 200 * u[3] ** 4, 10 * u[4]
    waits = jax.jit(jax.vmap(bursty_wait))
    q, mean_s = (np.asarray(x) for x in waits(servers, rate, service, arrivals, services))
    assert np.all((q >= 0) & (q <= 1))
    assert np.all(np.isinf(mean_s) == (rate * service >= servers))
    assert np.all(q[np.isinf(mean_s)] == 1)
    stable = np.isfinite(mean_s)
    for more in ((arrivals + 0.5, services), (arrivals, services + 0.5)):
        q2, mean2_s = (np.asarray(x) for x in waits(servers, rate, service, *more))
        assert np.all(q2 >= q * (1 - 1e-9))
        assert np.all((mean2_s >= mean_s * (1 - 1e-9))[stable])
    assert np.any(mean2_s[stable] > mean_s[stable])
    slopes = jax.jit(jax.vmap(jax.grad(lambda *x: bursty_wait(*x)[1], argnums=(0, 1, 2, 3, 4))))
    assert all(np.all(np.isfinite(x)) for x in slopes(servers, rate, service, arrivals, services))


def test_splitting_a_stream_makes_it_poisson():
    scv, kept = uniform((0, 200), (0, 1), seed=22)
    np.testing.assert_allclose(thinned_scv(scv, 1.0), scv, rtol=1e-12)
    np.testing.assert_allclose(thinned_scv(scv, 0.0), 1.0)
    np.testing.assert_allclose(thinned_scv(1.0, kept), 1.0)
    assert np.all(np.abs(thinned_scv(scv, kept) - 1) <= np.abs(scv - 1))
    # A renewal stream of hyperexponential gaps, thinned: the gaps between those kept.
    rng = np.random.default_rng(23)
    gaps = rng.exponential(size=1_000_000) * np.where(rng.random(1_000_000) < 0.1, 5.0, 5 / 9)
    arrivals = np.cumsum(gaps)[rng.random(1_000_000) < 0.3]
    found = np.var(np.diff(arrivals)) / np.mean(np.diff(arrivals)) ** 2
    assert float(thinned_scv(np.var(gaps) / np.mean(gaps) ** 2, 0.3)) == pytest.approx(found, rel=0.03)


# --- what the hardware allows ---------------------------------------------------------------------------------------


def test_prefill_of_llama_70b_is_counted_by_hand():
    """80 layers of width 8,192 with 64 query and 8 KV heads of 128, MLP of 28,672; head of 128,256 tokens."""
    attention = 8192 * (8192 + 2 * 1024) + 8192 * 8192
    params = 80 * (attention + 3 * 8192 * 28_672 + 2 * 8192) + 8192 + 8192 * 128_256
    scores = 2 * 2 * 80 * 64 * 128  # queries times keys, weights times values
    llm = at_precision(llm_entry("llama-3.1-70b").architecture, None, "bf16")
    for name, tp, peak in (("h100", 8, 989e12), ("b200", 2, 2250e12), ("a100", 4, 312e12)):
        per_token_s, per_token2_s = prefill_coefficients_s(GPUS[name].gpu, llm, tp)
        assert float(per_token_s) == pytest.approx(2 * params / (tp * 0.6 * peak), rel=1e-3)
        assert float(per_token2_s) == pytest.approx(scores / 2 / (tp * 0.6 * peak), rel=1e-12)


def test_attention_of_windowed_layers_is_linear_in_the_prompt():
    numbers = dict(n_dense_params=7e9, n_layers=32, bytes_per_weight=2, kv_bytes_per_token=1e5)
    gpu, attention = GPUS["h100"].gpu, 5e5
    full = make_llm(**numbers, attention_flop_per_token2=attention)
    half = make_llm(**numbers, attention_flop_per_token2=attention, windowed_frac=0.5, window_tokens=1024)
    (t1, t2), (w1, w2) = prefill_coefficients_s(gpu, full, 1), prefill_coefficients_s(gpu, half, 1)
    assert float(w2) == pytest.approx(float(t2) / 2, rel=1e-12)
    assert float(w1 - t1) == pytest.approx(0.5 * attention * 1024 / (0.6 * 989e12), rel=1e-9)
    assert float(physical_kv(gpu, half, 1, 64).fixed_tokens) == 1024  # each sequence holds the window beside its tokens


def catalog() -> tuple[list[str], Llm, np.ndarray, list[str]]:
    """Every GPU, LLM, precision and tensor parallelism: (GPU names, LLMs stacked, TP, labels)."""
    gpus, llms, tps, labels = [], [], [], []
    for llm_name, found in LLMS.items():
        for precision in (None, "fp8"):
            numbers = at_precision(found.architecture, precision, "bf16")
            for gpu_name in GPUS:
                for tp in (1, 2, 8, 64):
                    gpus.append(gpu_name)
                    llms.append(numbers)
                    tps.append(float(tp))
                    labels.append(f"{llm_name}/{precision}/{gpu_name}/{tp}")
    return gpus, stack(llms), np.array(tps), labels


def test_no_measured_step_beats_the_data_sheet_and_no_board_its_limit():
    gpu_names, llms, tps, labels = catalog()
    assert len(labels) > 200
    gpus = stack([GPUS[name].gpu for name in gpu_names])
    laws = stack([law_of(GPUS[name]).law() for name in gpu_names])
    n, context = (x.ravel() for x in np.meshgrid([0.0, 1, 8, 64, 512, 4096], [1.0, 500, 8192, 131_072]))

    @jax.jit
    @jax.vmap
    def check(law, gpu, llm, tp):
        step = measured_decode_step(law, gpu, llm, tp)
        power = measured_power(law, gpu, llm, tp, step)

        def at(n, context):
            ideal = [ideal(gpu, llm, tp).step_s(n, context) for ideal in (ideal_bytes, ideal_flops)]
            return step.step_s(n, context), jnp.stack(ideal), power.gpu_w(n, context)

        t, ideal, watts = jax.vmap(at)(n, context)
        return t, ideal, watts, power.at_shares_w(0.0, 0.0), power.cap_w, prefill_gpu_w(power, llm)

    t, ideal, watts, floor_w, cap_w, prefill_w = (np.asarray(x) for x in check(laws, gpus, llms, tps))
    short = t[..., None] < ideal
    assert not np.any(short), [labels[i] for i in np.unique(np.argwhere(short)[:, 0])]
    tdp_w, idle_w = np.asarray(gpus.tdp_w), np.asarray(gpus.idle_w)
    assert np.all(watts >= floor_w[:, None] - 1e-9)
    assert np.all(watts <= cap_w[:, None])
    assert np.all((floor_w <= prefill_w) & (prefill_w <= cap_w))
    assert np.all(cap_w < tdp_w)
    assert np.all(floor_w > idle_w)


def test_no_own_fit_beats_the_data_sheet_and_no_board_its_limit():
    """A configuration's own fit, also at the contexts it was not measured at."""
    n, context = (x.ravel() for x in np.meshgrid([1.0, 8, 64, 512, 1024], [1.0, 500, 8192, 131_072]))
    beaten, hot = {}, {}
    for names in own_fits():
        gpu, llm, tp, precision = names
        engine = build(EngineSpec(gpu, llm, tp, precision))
        numbers = at_precision(llm_entry(llm).architecture, precision, "bf16")
        record = GPUS[gpu].gpu
        t = engine.decode.step_s(n, context)
        ideal = np.maximum(*(of(record, numbers, tp).step_s(n, context) for of in (ideal_bytes, ideal_flops)))
        least = float(np.min(t / ideal))
        # A tenth: fits extrapolate, and boards have been seen a little faster than their data sheets.
        if least < 0.9:
            beaten[names] = least
        if float(np.max(engine.power.gpu_w(n, context))) > float(record.tdp_w):
            hot[names] = True
    assert not hot
    assert not beaten
