"""A power law of the user's own: one record and one registered function, and everything works with it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fleetopt_jax as fo
from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.laws.clocks import clocked_power
from fleetopt_jax.laws.power import gpu_power_w
from fleetopt_jax.optimize.uncertainty import EngineFactors, perturb, plan_trust


@pytree
class TwinPower:
    """The published logistic, in other letters."""

    low_w: jax.Array
    span_w: jax.Array
    middle: jax.Array


@gpu_power_w.register
def _(power: TwinPower, n_active, context_tokens):
    return power.low_w + power.span_w / (1.0 + jnp.exp(power.middle - jnp.log2(jnp.maximum(1.0, n_active))))


@pytree
class UnknownPower:
    """A record that no function is registered for."""

    low_w: jax.Array


@pytest.fixture(scope="module")
def twin(h100):
    """The paper's H100 with its own power law in the user's form."""
    paper = h100.engine.power
    power = TwinPower(paper.idle_w, paper.nominal_w - paper.idle_w, paper.log2_half_batch)
    return replace(h100, engine=replace(h100.engine, power=power))


@pytest.fixture(scope="module")
def plans(h100, twin, small_workload):
    about = {"assume": "published", "assumptions": fo.PUBLISHED}
    return [fo.optimize(fo.make_problem(small_workload, [choice], **about)) for choice in (h100, twin)]


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
    real = replace(fo.PUBLISHED, rounding="real")

    @jax.jit
    def watts(power):
        engine = replace(twin.engine, power=power)
        return fo.evaluate(
            fo.make_fleet([engine], window_tokens=[60_000], n_instances=[60]), small_workload, real
        ).power_w

    power = twin.engine.power
    slope = jax.jit(jax.grad(watts))(power)
    step = 1e-3
    for name in ("low_w", "span_w", "middle"):
        up, down = (watts(replace(power, **{name: getattr(power, name) + h})) for h in (step, -step))
        np.testing.assert_allclose(getattr(slope, name), (up - down) / (2 * step), rtol=1e-6)


def test_an_error_of_its_engine_scales_its_watts(twin):
    factors = EngineFactors(**as_floats(step=1.0, power=1.3, prefill=1.0))
    off = perturb(twin.engine, factors)
    for batch in (1.0, 20.0, 300.0):
        np.testing.assert_allclose(
            gpu_power_w(off.power, batch, 1000.0), 1.3 * gpu_power_w(twin.engine.power, batch, 1000.0), rtol=1e-12
        )


def test_a_law_nobody_registered_is_refused_by_its_name():
    power = UnknownPower(jnp.ones(()))
    with pytest.raises(TypeError, match="no power law for UnknownPower"):
        gpu_power_w(power, 1.0, 1.0)
    with pytest.raises(TypeError, match="no clock law for UnknownPower"):
        clocked_power(power, None, 1.0, 0.7)
