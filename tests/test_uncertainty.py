"""Errors of engines: what a factor does, that sampling and the linear method agree where they should, robust choice."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax._optimize.engine_errors import (
    OF_MEAN_ABSOLUTE,
    EngineFactors,
    draw,
    errors_of,
    however_run,
    make_errors,
    perturb,
    perturbed_spec,
    shared_errors,
)
from fleetopt_jax._optimize.holding import plan_draws
from fleetopt_jax._optimize.plan import Plan, require_plan
from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.robust import SHOWN, robust, score
from fleetopt_jax._optimize.search import evaluate_given, optimize
from fleetopt_jax._optimize.uncertainty import gain_trust, log_deviation, metric_trust, plan_trust
from fleetopt_jax.catalog.engines import build, engine_entry, resolved
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import to_json
from fleetopt_jax.documents.robust import robust_to_json
from fleetopt_jax.documents.sensitivity import trust_to_json
from fleetopt_jax.fleet.assumptions import PUBLISHED
from fleetopt_jax.fleet.step_law import step_law_of
from fleetopt_jax.laws.mixed_step import decoding, with_prompts
from fleetopt_jax.laws.prefill import prefill_s
from fleetopt_jax.report.sensitivity import rule_said
from fleetopt_jax.workload.atoms import with_rate


def given(specs, windows, n_instances, workload) -> Plan:
    problem = make_problem(workload, specs[:1], n_pools=len(specs), assume="published", assumptions=PUBLISHED)
    return evaluate_given(
        problem,
        [resolved(spec) for spec in specs],
        window_tokens=windows,
        gamma=[1.0] * len(specs),
        n_instances=n_instances,
    )


@pytest.fixture(scope="module")
def far_plan(h100, small_workload):
    """Far from its limits: four times the instances it needs."""
    return given((h100,), [60_000.0], [120.0], small_workload)


def test_a_factor_is_on_step_power_and_prefill_alone():
    """Every power law, 64 random factors at once: steps and prompts times theirs, watts below the cap times theirs."""
    u = jax.random.uniform(jax.random.key(0), (3, 64), minval=0.5, maxval=2.0)
    factors = EngineFactors(step=u[0], power=u[1], prefill=u[2])
    engines = [
        build(EngineSpec("h100", source="projected")),
        build(EngineSpec("a100", serving=MEASURED_SERVING)),
        build(EngineSpec("h100", "llama-3.1-8b", 1, source="projected")),
        build(EngineSpec("a100")),
    ]
    assert len({type(engine.power) for engine in engines}) == 4
    for engine in engines:

        def figures(f, engine=engine):
            made = perturb(engine, f)
            return (
                made.decode.step_s(20.0, 3000.0),
                made.power.gpu_w(2.0, 3000.0),
                prefill_s(made.prefill, 3000.0),
            )

        here = figures(EngineFactors(*jnp.ones(3)))
        step, power, prefill = jax.jit(jax.vmap(figures))(factors)
        np.testing.assert_allclose(step, here[0] * u[0], rtol=1e-12)
        np.testing.assert_allclose(prefill, here[2] * u[2], rtol=1e-12)
        cap = float(getattr(engine.power, "cap_w", np.inf))
        assert np.all(np.asarray(power) <= cap)
        assert np.all(np.diff(np.asarray(power)[np.argsort(np.asarray(u[1]))]) >= 0)
        if cap == np.inf:
            np.testing.assert_allclose(power, here[1] * u[1], rtol=1e-12)
        same = perturb(engine, EngineFactors(*jnp.ones(3)))
        for a, b in zip(jax.tree.leaves((same.prefill, same.idle_w)), jax.tree.leaves((engine.prefill, engine.idle_w))):
            np.testing.assert_allclose(a, b, rtol=1e-9)
        mixed, law = with_prompts(decoding(20.0, 3000.0), 500.0), step_law_of(engine)
        twice = step_law_of(perturb(engine, EngineFactors(*jnp.array([2.0, 1.0, 2.0]))))
        np.testing.assert_allclose(step_law_of(same).step_s(mixed), law.step_s(mixed), rtol=1e-9)
        np.testing.assert_allclose(twice.step_s(mixed), 2.0 * law.step_s(mixed), rtol=1e-9)
        np.testing.assert_allclose(step_law_of(same).gpu_j(mixed), law.gpu_j(mixed), rtol=1e-9)
        check_grads(
            lambda f, engine=engine: perturb(engine, EngineFactors(f, f, f)).prefill.gpu_w, (1.1,), 1, rtol=1e-5
        )


def test_errors_are_those_the_engine_states():
    measured, scaled = EngineSpec("h100", serving=MEASURED_SERVING), EngineSpec("b200", source="projected")
    entry, errors = engine_entry(measured), errors_of(measured)
    assert float(errors.step) == pytest.approx(math.sqrt(math.pi / 2) * entry.step_error)
    assert float(errors.power) == pytest.approx(OF_MEAN_ABSOLUTE * entry.power_error)
    assert float(errors.prefill) == 0.4
    assert engine_entry(scaled).quality == "scaled"
    assert float(errors_of(scaled).step) == float(errors_of(scaled).power) == 0.2
    slow = dataclasses.replace(measured, clock_frac=0.7, max_num_seqs=64)
    together, engine_of = shared_errors([measured, scaled, measured, slow])
    assert together.step.shape == (2,)
    assert engine_of.tolist() == [0, 1, 0, 0]  # however it is run
    with pytest.raises(ValueError, match="power error >= 0, got -1"):
        make_errors(step=0.1, power=-1, prefill=0.1)


def test_a_spec_that_is_off_is_its_engine_that_is_off_run_as_it_was():
    factors = EngineFactors(*(np.asarray(x) for x in (1.2, 0.9, 1.4)))
    spec = EngineSpec("h100", precision="fp8", clock_frac=0.8, max_num_seqs=96)
    off, at_top = perturbed_spec(spec, factors), however_run(spec)
    expected = perturb(build(at_top), factors)
    for x, y in zip(jax.tree.leaves(build(however_run(off))), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)
    assert (off.clock_frac, off.max_num_seqs) == (0.8, 96)
    slower = build(off).prefill.per_token_s / build(spec).prefill.per_token_s
    assert float(slower) == pytest.approx(1.4)
    assert errors_of(off) == errors_of(spec)
    assert engine_entry(off).quality == engine_entry(spec).quality
    assert perturbed_spec(spec, factors) == off  # and so one compilation, one search


def test_draws_are_lognormal_of_median_one_and_independent():
    errors = jax.tree.map(lambda x: jnp.array([x, 2 * x]), make_errors(step=0.1, power=0.2, prefill=0.3))
    logs = {name: np.log(np.asarray(x)) for name, x in vars(draw(errors, 2000)).items()}
    for name, x in logs.items():
        # Stratified: means and deviations of 2,000 draws are within a part in a thousand of sigma.
        sigma = np.asarray(getattr(errors, name))
        np.testing.assert_allclose(x.mean(axis=0) / sigma, 0.0, atol=2e-3)
        np.testing.assert_allclose(x.std(axis=0), sigma, rtol=5e-3)
    correlation = np.corrcoef(np.hstack(list(logs.values())).T) - np.eye(6)
    assert np.abs(correlation).max() < 0.1


def test_a_power_law_has_the_same_interval_either_way():
    """m = step^-0.7 power^-1 is lognormal: then the linear method is exact, and so the samplings' standard."""
    errors = jax.tree.map(lambda x: x[None], make_errors(step=0.15, power=0.1, prefill=0.4))
    factors = draw(errors, 4000)
    drawn = 5.0 * np.asarray(factors.step[:, 0] ** -0.7 / factors.power[:, 0])
    found = metric_trust(5.0, drawn, EngineFactors(np.array([-0.7]), np.array([-1.0]), np.zeros(1)), errors)
    assert found.log_sigma == pytest.approx(math.hypot(0.7 * 0.15, 0.1))
    # 1.5 %: the quantiles of 4,000 draws are uncertain by 0.03 of a standard deviation of 0.14.
    np.testing.assert_allclose(
        (found.sampled.low, found.sampled.high), (found.linear.low, found.linear.high), rtol=0.015
    )


@pytest.mark.slow
def test_intervals_agree_far_from_limits_and_hold_probability_falls_near_them(far_plan, h100, small_workload):
    far = plan_trust(far_plan)
    assert far.hold_probability == 1.0
    for name in ("tok_per_j", "power_w", "itl_s"):
        sampled, linear = far.metrics[name].sampled, far.metrics[name].linear
        assert sampled.low < far.metrics[name].value < sampled.high
        # 4 %: whole sequences in flight, of which one power law in real ones knows nothing.
        np.testing.assert_allclose((sampled.low, sampled.high), (linear.low, linear.high), rtol=0.04)
    assert far.metrics["usd_per_h"].log_sigma == 0.0
    near = plan_trust(given((h100,), [60_000.0], [31.0], small_workload))
    assert near.hold_probability < far.hold_probability
    assert near.metrics["ttft_p99_s"].sampled.high == math.inf  # in overload, which the linear method does not see
    assert near.metrics["ttft_p99_s"].linear.high < math.inf


@pytest.mark.slow
def test_ratios_keep_only_what_differs(far_plan, b200, small_workload):
    alone = gain_trust(far_plan, far_plan).metrics["tok_per_j"]
    assert (alone.value, alone.sampled.low, alone.sampled.high, alone.log_sigma) == pytest.approx((1.0, 1.0, 1.0, 0.0))
    other = given((b200,), [60_000.0], [120.0], small_workload)
    gain = gain_trust(other, far_plan).metrics["tok_per_j"]
    each = [plan_trust(plan).metrics["tok_per_j"] for plan in (other, far_plan)]
    assert gain.value == pytest.approx(each[0].value / each[1].value)
    # Two GPUs err independently: variances of logarithms add.
    assert gain.log_sigma == pytest.approx(math.hypot(*(one.log_sigma for one in each)), rel=1e-9)


@pytest.mark.slow
def test_intervals_are_written_in_si_units(far_plan):
    trust = plan_trust(far_plan)
    document = json.loads(to_json(trust_to_json(trust)))
    assert document["metrics"]["power_w"]["value"] == pytest.approx(float(far_plan.metrics.power_w))
    low, high = document["metrics"]["tok_per_j"]["linear"]
    assert low * high == pytest.approx(trust.metrics["tok_per_j"].value ** 2)


def test_deviation_adds_up_over_engines_and_factors():
    errors = jax.tree.map(lambda x: jnp.array([x, x]), make_errors(step=1.0, power=2.0, prefill=0.5))
    slope = EngineFactors(np.array([1.0, 2.0]), np.array([0.5, 0.0]), np.array([0.0, 4.0]))
    assert log_deviation(slope, errors) == pytest.approx(math.sqrt(1 + 4 + 1 + 4))


def test_scores_are_the_lower_tail():
    values = np.arange(1.0, 101.0)[::-1]
    assert score(values, "quantile", 0.1) == 10.0
    assert score(values, "cvar", 0.1) == pytest.approx(np.mean(np.arange(1, 11)))
    assert score(values, "cvar", 0.001) == 1.0


def test_a_robust_choice_holds_its_limits_as_planned(h100, small_workload):
    """One pool: candidates are numbers of instances."""
    problem = make_problem(small_workload, [h100], n_pools=1, assume="published", assumptions=PUBLISHED)
    nominal = require_plan(optimize(problem))
    found = robust(problem, nominal, n_scenarios=64)
    assert found.nominal.plan is nominal and found.nominal.origin == "as planned"
    assert found.chosen.plan.binding is None and found.chosen.plan.specs == problem.specs
    assert found.chosen.hold_share > found.nominal.hold_share  # of slower engines there are more
    assert found.chosen.plan.metrics.n_gpus > nominal.metrics.n_gpus
    assert found.rule == "score" and found.chosen.hold_share >= 0.9  # sized for just that
    fewer = found.chosen.plan.fleet.with_instances(np.asarray(found.chosen.plan.fleet.n_instances) - 1)
    assert np.mean(plan_draws(dataclasses.replace(nominal, fleet=fewer), 64).held) < 0.9
    beside = found.chosen.plan.one_pool
    assert found.one_pool and beside and beside.n_instances == int(found.one_pool.plan.metrics.n_instances)
    document = json.loads(to_json(robust_to_json(found)))
    assert document["chosen"]["gpus"] == ["h100"] and document["rule"] == "score"
    assert [each["sigmas"] for each in document["scenarios"]["chosen"]] == list(SHOWN)
    assert document["scenarios"]["nominal"][0]["holds"]  # as it stands
    held = [each["holds"] for each in document["scenarios"]["chosen"]]
    assert held == sorted(held, reverse=True)  # the slower, the less
    said = rule_said(document)
    assert "the best 10 % quantile of tok/J" in said and f"holds in {100 * found.chosen.hold_share:.0f} %" in said
    assert [each["score"] for each in document["candidates"]] == sorted(
        (x.score for x in found.candidates), reverse=True
    )
    with pytest.raises(ValueError, match="need 0 < level < 1, got 1"):
        robust(problem, nominal, level=1.0)
    longer = dataclasses.replace(small_workload, longest_tokens=np.asarray(1e6))
    with pytest.raises(BadInput, match="longer has requests of 1000000 tokens"):
        robust(problem, nominal, workloads=[("longer", longer)])


@pytest.mark.slow
def test_the_robust_plan_scores_no_worse_than_any_candidate_that_holds_as_often(h100, small_workload):
    problem = make_problem(small_workload, [h100], assume="published", assumptions=PUBLISHED)
    nominal = require_plan(optimize(problem, "exact"))
    tomorrow = ("tomorrow", with_rate(small_workload, 260.0))
    for measure in ("quantile", "cvar"):
        found = robust(problem, nominal, measure=measure, workloads=[tomorrow])
        assert found.chosen.plan.binding is None
        assert found.chosen.plan.status == "feasible" or found.chosen.plan is nominal
        assert found.chosen.hold_share > found.nominal.hold_share
        able = [each for each in found.candidates if each.hold_share >= 0.9]
        assert not able or found.chosen.score == max(each.score for each in able)
