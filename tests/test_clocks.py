"""Lower clocks: compute slows, watts fall, memory stays; the top clock changes nothing."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax.catalog.engines import build, engine_entry
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.struct import stack
from fleetopt_jax.fleet.engine import Engine, at_clock
from fleetopt_jax.laws.clocks import (
    DECODE_CORE_SHARE,
    MIN_CLOCK_FRAC,
    clock_at_power_w,
    clocked_w,
    core_power_frac,
    dynamic_frac,
)
from fleetopt_jax.laws.prefill import prefill_s

CLOCKS = np.linspace(MIN_CLOCK_FRAC, 1.0, 25)
BATCHES = np.array([1.0, 8.0, 32.0, 128.0, 512.0])


@pytest.fixture(scope="module")
def engines() -> dict[str, list[Engine]]:
    """By kind of power: the laws of both generations, configurations with a fit of their own, and operators."""
    names = [("h100", "llama-3.1-70b", 8), ("b200", "llama-3.1-70b", 8), ("h100", "qwen3-235b-a22b", 8)]
    laws = [build(EngineSpec(*name, own_fit=False, serving=MEASURED_SERVING)) for name in names]
    fitted = [build(EngineSpec("h100", tp=4, serving=MEASURED_SERVING)), build(EngineSpec("h100", source="projected"))]
    operators = [build(EngineSpec(*name)) for name in names]
    return {"activity": laws, "logistic": fitted, "operators": operators}


@jax.jit
def curves(engines: Engine, clocks, batches, context=1500.0, prompt=2000.0):
    """[engine, clock, batch]: step, watts; [engine, clock]: seconds and watts of a prompt."""

    def one(engine, clock):
        slow = at_clock(engine, clock)
        step_s = jax.vmap(lambda n: slow.decode.step_s(n, context))(batches)
        power_w = jax.vmap(lambda n: slow.power.gpu_w(n, context))(batches)
        return step_s, power_w, prefill_s(slow.prefill, prompt), slow.prefill.gpu_w

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(engines, clocks)


@pytest.mark.parametrize("kind", ["activity", "logistic", "operators"])
def test_lower_clocks_take_longer_and_draw_less(engines, kind):
    stacked = stack(engines[kind])
    step_s, power_w, prompt_s, prompt_w = (np.asarray(x) for x in curves(stacked, CLOCKS, BATCHES))
    np.testing.assert_allclose(prompt_s * CLOCKS, prompt_s[:, -1:] * np.ones_like(CLOCKS), rtol=1e-12)
    assert np.all(np.diff(step_s, axis=1) <= 0) and np.all(np.diff(power_w, axis=1) > 0)
    assert np.all(np.diff(prompt_w, axis=1) > 0)
    idle_w = np.asarray(stacked.idle_w)[:, None, None]
    assert np.all(power_w > idle_w)
    # No step slows by more than the clock, and few sequences, bound by memory, hardly at all.
    slower = step_s / step_s[:, -1:]
    assert np.all(slower <= 1.0 / CLOCKS[:, None] + 1e-12)
    assert np.all(slower[:, 0, 0] < 1.02)
    # Compute wants a clock inside the range: prompts, and tokens of many sequences where the law knows their FLOPs.
    for energy in (prompt_s * prompt_w, *([(step_s * power_w)[:, :, -1]] if kind == "activity" else [])):
        best = energy.argmin(axis=1)
        assert np.all((best > 0) & (best < len(CLOCKS) - 1))


def test_the_top_clock_changes_nothing(engines):
    for engine in itertools.chain(*engines.values()):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), engine, at_clock(engine, 1.0))


def test_a_power_limit_is_the_inverse_of_the_law_and_clips():
    powers = np.linspace(200.0, 1000.0, 40)[:, None]
    limits = np.asarray(clocked_w(powers, 175.0, DECODE_CORE_SHARE, CLOCKS))
    np.testing.assert_allclose(
        clock_at_power_w(powers, 175.0, DECODE_CORE_SHARE, limits), CLOCKS + 0 * powers, rtol=1e-9
    )
    assert float(clock_at_power_w(600.0, 175.0, DECODE_CORE_SHARE, 700.0)) == 1.0
    assert float(clock_at_power_w(600.0, 175.0, DECODE_CORE_SHARE, 100.0)) == pytest.approx(MIN_CLOCK_FRAC)


def test_power_near_the_top_falls_as_the_stated_power_of_the_clock():
    assert float(jax.grad(core_power_frac)(1.0)) == pytest.approx(2.2)  # f V^2 with dV/df = 0.6
    assert float(dynamic_frac(0.0, 0.5)) == 1.0  # memory alone keeps its watts


def test_gradients_through_a_clocked_engine(engines):
    def energy(scales, clock, engine):
        parts = (engine.decode, engine.power, engine.prefill, engine.idle_w)
        leaves, kind = jax.tree.flatten(parts)
        decode, power, prefill, idle_w = jax.tree.unflatten(kind, [leaf * scale for leaf, scale in zip(leaves, scales)])
        slow = at_clock(replace(engine, decode=decode, power=power, prefill=prefill, idle_w=idle_w), clock)
        token_j = slow.decode.step_s(40.0, 1500.0) * slow.power.gpu_w(40.0, 1500.0)
        return token_j + 1e-2 * prefill_s(slow.prefill, 2000.0) * slow.prefill.gpu_w

    for kind in engines:
        engine = engines[kind][0]
        ones = [1.0] * len(jax.tree.leaves((engine.decode, engine.power, engine.prefill, engine.idle_w)))
        check_grads(jax.jit(partial(energy, engine=engine)), (ones, 0.7), order=1, modes=["rev"], atol=1e-5, rtol=1e-5)
    check_grads(lambda limit: clock_at_power_w(600.0, 175.0, 0.9, limit), (400.0,), order=1, atol=1e-6, rtol=1e-6)


def test_the_published_roofline_has_no_clock_law():
    roofline = EngineSpec("h100", tp=4, source="projected")
    assert not build(roofline).power.has_clock_law
    with pytest.raises(ValueError, match="RooflinePower has no clock law"):
        at_clock(build(roofline), 0.7)
    with pytest.raises(BadField, match=r"clock_frac: 0\.7; the roofline engine has no clock law"):
        engine_entry(replace(roofline, clock_frac=0.7))
