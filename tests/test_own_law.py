"""A power law of the user's own: one record with one method, and everything works with it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fleetopt_jax._optimize.engine_errors import EngineFactors, perturb
from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax._optimize.uncertainty import plan_trust
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec, OwnLaws
from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.fleet.assumptions import PUBLISHED
from fleetopt_jax.fleet.engine import Engine, at_clock
from fleetopt_jax.fleet.evaluate import evaluate
from fleetopt_jax.fleet.fleet import fleet_of
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.power import PowerLaw


@pytree
class TwinPower(PowerLaw):
    """The published logistic, in other letters."""

    low_w: jax.Array
    span_w: jax.Array
    middle: jax.Array

    def gpu_w(self, n_active, context_tokens):
        return self.low_w + self.span_w / (1.0 + jnp.exp(self.middle - jnp.log2(jnp.maximum(1.0, n_active))))


@pytree
class UnsaidPower(PowerLaw):
    """A power law without its method."""

    low_w: jax.Array


class UnsaidDecode(DecodeLaw):
    """A decode law without its method."""


@pytest.fixture(scope="module")
def twin(h100) -> EngineSpec:
    """The paper's H100 with its own power law in the user's form."""
    paper = build(h100).power
    power = TwinPower(paper.idle_w, paper.nominal_w - paper.idle_w, paper.log2_half_batch)
    return replace(h100, laws=OwnLaws(power=power))


@pytest.fixture(scope="module")
def plans(h100, twin, small_workload):
    about = {"assume": "published", "assumptions": PUBLISHED}
    return [optimize(make_problem(small_workload, [spec], **about)) for spec in (h100, twin)]


def test_a_spec_with_a_law_of_ones_own_is_that_engine_but_for_the_law(h100, twin):
    ours, theirs = build(h100), build(twin)
    assert isinstance(theirs.power, TwinPower)
    jax.tree.map(np.testing.assert_array_equal, ours, replace(theirs, power=ours.power))
    again = replace(h100, laws=OwnLaws(power=replace(theirs.power)))
    assert again == twin
    assert hash(again) == hash(twin)
    other = replace(h100, laws=OwnLaws(power=replace(theirs.power, **as_floats(span_w=1.0))))
    assert other not in (h100, twin)


@pytest.mark.slow
def test_the_same_formula_gives_the_same_plan(plans):
    for name in ("window_tokens", "n_instances"):
        assert np.array_equal(*(getattr(plan.fleet, name) for plan in plans))
    np.testing.assert_allclose(*(float(plan.metrics.tok_per_j) for plan in plans), rtol=1e-12)


@pytest.mark.slow
def test_the_same_formula_gives_the_same_interval(plans):
    ours, theirs = (plan_trust(plan).metrics["tok_per_j"] for plan in plans)
    assert ours.sampled.low < ours.sampled.high
    for how in ("sampled", "linear"):
        for end in ("low", "high"):
            np.testing.assert_allclose(*(getattr(getattr(of, how), end) for of in (ours, theirs)), rtol=1e-9)


def test_gradients_go_through_it(twin, small_workload):
    real, engine = replace(PUBLISHED, rounding="real"), build(twin)

    @jax.jit
    def watts_and_slope(power):
        def watts(power):
            fleet = fleet_of([replace(engine, power=power)], [60_000.0], [1.0], [60.0])
            return evaluate(fleet, small_workload, real).power_w

        return jax.value_and_grad(watts)(power)

    _, slope = watts_and_slope(engine.power)
    step = 1e-3
    for name in ("low_w", "span_w", "middle"):
        nudged = (replace(engine.power, **{name: getattr(engine.power, name) + h}) for h in (step, -step))
        up, down = (watts_and_slope(power)[0] for power in nudged)
        np.testing.assert_allclose(getattr(slope, name), (up - down) / (2 * step), rtol=1e-6)


def test_an_error_of_its_engine_scales_its_watts(twin):
    engine = build(twin)
    off = perturb(engine, EngineFactors(**as_floats(step=1.0, power=1.3, prefill=1.0)))
    for batch in (1.0, 20.0, 300.0):
        np.testing.assert_allclose(off.power.gpu_w(batch, 1000.0), 1.3 * engine.power.gpu_w(batch, 1000.0), rtol=1e-12)


def test_a_law_without_its_method_is_not_taken_for_one():
    with pytest.raises(NotImplementedError):
        UnsaidPower(jnp.ones(())).gpu_w(1.0, 1.0)
    with pytest.raises(NotImplementedError):
        UnsaidDecode().step_s(1.0, 1.0)


def test_a_law_that_says_no_clock_is_refused_by_its_name(h100, twin):
    engine = build(twin)
    assert not engine.power.has_clock_law
    assert build(h100).power.has_clock_law
    with pytest.raises(ValueError, match="TwinPower has no clock law"):
        at_clock(engine, 0.7)
    with pytest.raises(ValueError, match="UnsaidDecode has no clock law"):
        at_clock(replace(engine, decode=UnsaidDecode()), 0.7)


def test_a_slower_engine_takes_a_factor_longer_whatever_its_law(h100):
    """A law that says no more than its step is slower, batched and in lines as the catalog's is."""

    @pytree
    class Twin(DecodeLaw):
        like: Engine

        def step_s(self, n_active, context_tokens):
            return self.like.decode.step_s(n_active, context_tokens)

    ours, theirs = build(h100).decode, Twin(build(h100))
    for one, other in ((ours, theirs), (ours.slower(1.7), theirs.slower(1.7))):
        np.testing.assert_allclose(one.step_s(7.0, 900.0), other.step_s(7.0, 900.0), rtol=1e-14)
        np.testing.assert_allclose(one.batch_s(7.0, 6300.0, 6300.0), other.batch_s(7.0, 6300.0, 6300.0), rtol=1e-14)
        np.testing.assert_allclose(one.line(7.0, 900.0), other.line(7.0, 900.0), rtol=1e-12)
    np.testing.assert_allclose(theirs.slower(1.7).step_s(7.0, 900.0), 1.7 * ours.step_s(7.0, 900.0), rtol=1e-14)
