"""Prompts in the iterations of an instance: the limits of what one adds, and the tables that searches read."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import fleetopt_jax as fo
from fleetopt_jax.core.numerics import at_some, between
from fleetopt_jax.fleet.assumptions import PHYSICAL
from fleetopt_jax.fleet.evaluate import evaluate
from fleetopt_jax.fleet.fleet import make_fleet
from fleetopt_jax.fleet.stage import KINDS, KNOTS, setting_of, stage_load
from fleetopt_jax.fleet.step_law import decoding_in, step_law_of
from fleetopt_jax.fleet.surroundings import make_surroundings
from fleetopt_jax.fleet.traffic import route
from fleetopt_jax.laws.cycle import (
    Company,
    Prompt,
    PromptKinds,
    added,
    added_s,
    alone_s,
    mates,
    of_prompts,
    prompt_of,
    together,
    with_prompt,
)
from fleetopt_jax.laws.demand import demand

OPERATORS, SUM = fo.EngineSpec("h100", tp=4), fo.EngineSpec("h100", tp=4, serving="vllm-0.11")
PER_CYCLE = np.geomspace(1e-3, 100.0, 40)


def of_one_kind(law, beside, prompt, per_cycle):
    """s(m) where all prompts are alike."""
    kinds = jax.tree.map(lambda x: jnp.reshape(x, 1), prompt), jnp.ones(1)
    return added_s(law, beside, prompt, kinds, together(per_cycle), 8192.0)


@pytest.fixture(scope="module", params=[OPERATORS, SUM], ids=["operators", "sum"])
def engine(request):
    return fo.build(request.param)


@pytest.fixture(scope="module")
def workload():
    return fo.make_workload(
        [100, 900, 4000, 9000], [200, 150, 300, 100], [0.4, 0.4, 0.15, 0.05], arrival_rate_per_s=20.0
    )


def test_a_prompt_by_itself_pays_its_step_and_many_pay_the_slope(engine):
    law, beside = step_law_of(engine), decoding_in(engine, 64.0, 2000.0)
    prompt = prompt_of(800.0, 800.0**2, law.window_tokens)
    one_s = jax.jit(jax.vmap(lambda m: of_one_kind(law, beside, prompt, m)))(PER_CYCLE)
    alone = law.added_s(with_prompt(beside, prompt))
    full = law.added_s(with_prompt(beside, prompt, 8192.0 / 800.0)) / (8192.0 / 800.0)
    np.testing.assert_allclose(one_s[0], alone, rtol=2e-3)
    np.testing.assert_allclose(one_s[-1], full, rtol=1e-9)
    assert np.all(np.asarray(one_s) <= float(alone) * (1 + 1e-9))  # to meet costs nobody more
    kinds = jax.tree.map(lambda x: x[None], prompt), jnp.ones(1)
    seconds, joules = jax.vmap(lambda m: added(law, beside, prompt, kinds, together(m), 8192.0))(PER_CYCLE)
    np.testing.assert_allclose(seconds, one_s, rtol=1e-12)
    watts = joules / seconds
    assert np.all((watts > 100.0) & (watts < 1.1 * 700.0))  # above the limit: with prompts the decodes draw more too


def test_a_crowd_takes_what_its_prompts_add_at_two_points(engine):
    """From one prompt to as many as meet in 99 % of the time, at most, and their tokens in the mean of Poisson."""
    law, beside = step_law_of(engine), decoding_in(engine, 64.0, 2000.0)
    kinds = PromptKinds(jnp.asarray([0.7, 0.3]), jnp.asarray([400.0, 2000.0]), jnp.asarray([400.0**2, 2000.0**2]))
    mean = prompt_of(kinds.mass @ kinds.tokens, kinds.mass @ kinds.square_tokens2, law.window_tokens)
    step_s = jax.jit(lambda k: law.step_s(with_prompt(beside, mean, k)))
    for n in (4.0, 10.0, 40.0):  # of fewer the normal distribution is too short
        some = np.random.default_rng(7).poisson(n * np.asarray(kinds.mass), (400_000, 2)) @ np.asarray(kinds.tokens)
        points = np.asarray(mates(n, kinds))
        crowd = 2.0 * points.mean() - 1.0
        assert crowd == pytest.approx(np.quantile(some, 0.99) / float(mean.tokens), rel=0.15)
        of_two, of_all = (
            np.mean([step_s(k + 1.0) - step_s(k) for k in beside_how_many])
            for beside_how_many in (points, np.linspace(1.0, crowd, 101))
        )
        assert of_two == pytest.approx(of_all, rel=0.03)
    alone = jnp.stack(mates(1e-9, kinds))
    assert np.allclose(alone, 1.0)  # with nobody else, the first beside another
    check_grads(lambda n: jnp.stack(mates(n, kinds)), (2.0,), order=1, modes=["fwd", "rev"])


def test_where_steps_add_up_a_prompt_takes_the_same_whatever_it_meets():
    engine = fo.build(SUM)
    law, beside = step_law_of(engine), decoding_in(engine, 64.0, 2000.0)
    tokens, square = 800.0, 2.0 * 800.0**2
    one_s = jax.vmap(lambda m: of_one_kind(law, beside, prompt_of(tokens, square, 0.0), m))(PER_CYCLE)
    expected = engine.prefill.per_token_s * tokens + engine.prefill.per_token2_s * square
    np.testing.assert_allclose(one_s, expected, rtol=1e-12)
    own_s = alone_s(law, beside, prompt_of(20_000.0, 4e8, 0.0), 8192.0)
    step_s = law.step_s(beside)
    expected = engine.prefill.per_token_s * 2e4 + engine.prefill.per_token2_s * 4e8 + step_s * 2e4 / 8192.0
    np.testing.assert_allclose(own_s, expected, rtol=1e-12)


def test_a_long_prompt_takes_its_chunks(engine):
    """Three whole chunks, each at its own depth: the step is affine in pairs where the GPU is the longer."""
    law, beside = step_law_of(engine), decoding_in(engine, 16.0, 2000.0)
    tokens = 3 * 8192.0
    whole = prompt_of(tokens, tokens**2, law.window_tokens)
    steps_s = 0.0
    for i in range(3):
        before, after = (prompt_of(x, x**2, law.window_tokens) for x in (i * 8192.0, (i + 1) * 8192.0))
        steps_s += law.step_s(with_prompt(beside, jax.tree.map(lambda a, b: b - a, before, after)))
    np.testing.assert_allclose(alone_s(law, beside, whole, 8192.0), steps_s, rtol=2e-4)


@pytest.mark.slow
def test_what_is_added_has_gradients(engine):
    law = step_law_of(engine)

    def logs(x):
        n, context, tokens, m = jnp.exp(x)
        beside, prompt = decoding_in(engine, n, context), prompt_of(tokens, 1.5 * tokens**2, law.window_tokens)
        return jnp.stack([jnp.log(of_one_kind(law, beside, prompt, m)), jnp.log(alone_s(law, beside, prompt, 8192.0))])

    check_grads(jax.jit(logs), (jnp.log(jnp.array([40.0, 1500.0, 900.0, 0.7])),), order=1, modes=["rev"], rtol=1e-4)
    slopes = jax.jacrev(logs)(jnp.log(jnp.array([1e-6, 1e-3, 1e-3, 1e-12])))
    assert jnp.all(jnp.isfinite(slopes))


@pytest.mark.slow
def test_the_table_of_a_pool_is_near_the_law_it_is_of(engine, workload):
    """Within 5 % between its knots, and on them exactly."""
    fleet = make_fleet([engine], window_tokens=[9100], n_instances=[4])
    setting = setting_of(workload, make_surroundings(), PHYSICAL)
    traffic = jax.tree.map(lambda x: x[0], route(fleet, workload, PHYSICAL))
    load = stage_load(engine, traffic, 9100.0, setting)
    n = load.n_max * jnp.exp2(-2.0 * jnp.linspace(0.0, KNOTS - 1.0, 4 * (KNOTS - 1) + 1))
    asked = [np.asarray(x).ravel() for x in np.meshgrid(n, [1.0, 1.3, 2.0, 4.0, 8.0], indexing="ij")]

    def exact(n, n_prompts):
        beside = decoding_in(engine, n, load.context_tokens)
        return PHYSICAL.prefill.moments_s(engine, traffic.demand, traffic.kinds(KINDS), beside, n_prompts)[0]

    def interpolated(n, n_prompts):
        return of_prompts(load.at(load.prefill_at_s, n), n_prompts)

    tabulated, found = (np.asarray(jax.vmap(law)(*asked)).reshape(len(n), 5) for law in (interpolated, exact))
    np.testing.assert_allclose(tabulated, found, rtol=0.05)
    np.testing.assert_allclose(tabulated[::4, [0, 2, 4]], found[::4, [0, 2, 4]], rtol=1e-9)


def test_between_is_exact_on_the_knots_and_smooth():
    values = jnp.array([3.0, 1.0, 4.0, 1.0, 5.0])
    np.testing.assert_allclose(jax.vmap(lambda x: between(values, x))(jnp.arange(5.0)), values, rtol=1e-12)
    line = jnp.arange(5.0) * 2.0 + 1.0
    x = jnp.linspace(0.0, 4.0, 33)
    np.testing.assert_allclose(jax.vmap(lambda x: between(line, x))(x), 2.0 * x + 1.0, rtol=1e-12)
    assert float(between(values, jnp.asarray(-3.0))) == 3.0 and float(between(values, jnp.asarray(9.0))) == 5.0
    slope = jax.vmap(jax.grad(lambda x: between(values, x)))(jnp.array([2.0 - 1e-7, 2.0 + 1e-7]))
    np.testing.assert_allclose(slope[0], slope[1], atol=1e-4)


def test_a_function_at_some_points_is_a_straight_line_in_between():
    asked = []

    def square(x):
        asked.append(x.size)
        return x**2

    x = jnp.linspace(1.0, 2.0, 163)
    np.testing.assert_allclose(at_some(square, x, 16), x**2, rtol=3e-3)
    assert asked == [2 * 11]
    np.testing.assert_array_equal(at_some(square, x[:20], 16), x[:20] ** 2)


@pytest.mark.slow
def test_more_instances_wait_less_and_draw_more(engine, workload):
    """What sizing and the proof of the search rely on, of engines whose prompts share iterations as well."""

    @jax.jit
    @jax.vmap
    def metrics(n, rate):
        at = replace(workload, arrival_rate_per_s=rate)
        fleet = make_fleet([engine], window_tokens=[9100], n_instances=[1]).with_instances(n[None])
        found = evaluate(fleet, at)
        return found.ttft_p99_s, found.itl_s, found.resources.power_w, found.utilization

    rates, counts = np.geomspace(1.0, 200.0, 8), np.array([*range(1, 13), *range(14, 41, 4)], float)
    n, rate = (x.ravel() for x in np.meshgrid(counts, rates))
    ttft_s, itl_s, power_w, load = (np.asarray(x).reshape(len(rates), len(counts)) for x in metrics(n, rate))
    stable = load[:, :-1] < 1.0
    assert stable.sum() > 90
    for falls in (np.where(load < 1.0, x, 1e9) for x in (ttft_s, itl_s)):
        assert np.all((np.diff(falls) <= 1e-5 * falls[:, :-1])[stable])
    assert np.all((np.diff(power_w) >= -1e-9 * power_w[:, :-1])[stable])


def test_watts_are_those_of_prompts_that_differ_and_meet():
    """Beside iterations drawn one by one, of prompts of two lengths, the longer twenty times the other, whom Poisson's
    numbers of others meet. Others of the mean length are 1 to 9 % too low, the mean prompt alone 10 to 17 %."""
    engine = fo.build(fo.EngineSpec("b200"))
    law, beside = engine.step, decoding_in(engine, 64.0, 2000.0)
    lengths, mass, rng = np.array([150.0, 3000.0]), np.array([0.8, 0.2]), np.random.default_rng(3)
    kinds = PromptKinds(jnp.asarray(mass), jnp.asarray(lengths), jnp.asarray(lengths**2))
    mean = demand(*(mass @ np.stack([lengths] * 2 + [np.full(2, 300.0)] * 2, axis=1)).tolist())
    mean = replace(mean, prefill2=jnp.asarray(mass @ lengths**2))
    drawn = jax.jit(lambda tokens, pairs: law.added(with_prompt(beside, Prompt(tokens, pairs, 0.0 * pairs))))
    for others in (0.1, 0.5, 1.2):
        k = 1 + rng.poisson(others, 4000)
        tokens = lengths[(rng.random((len(k), k.max())) < mass[1]).astype(int)] * (np.arange(k.max()) < k[:, None])
        seconds, joules = drawn(tokens.sum(axis=1), (tokens**2 + tokens).sum(axis=1) / 2.0)
        expected = np.sum(joules / k) / np.sum(seconds / k)
        company = Company(*(jnp.asarray(x) for x in (together(others), together(others), 0.0)))
        found = float(PHYSICAL.prefill.gpu_w(engine, mean, kinds, beside, company))
        assert found == pytest.approx(float(expected), rel=0.09)
        alike = PromptKinds(jnp.ones(1), mean.prefill[None], mean.prefill2[None])
        assert float(PHYSICAL.prefill.gpu_w(engine, mean, alike, beside, company)) < 0.99 * found
    long = Company(jnp.asarray(1.2), jnp.asarray(2.0), jnp.asarray(0.25))
    table = jnp.asarray([1.0, 0.5, 0.125])  # 1 / k itself
    assert float(long.of(table)) == pytest.approx(float(long.one_in), rel=1e-12) == 0.75 / 1.2 + 0.25 / 2.0
