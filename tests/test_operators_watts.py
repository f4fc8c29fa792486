"""Board watts of operators and of steps: limits, monotonicity, gradients, and what was measured."""

import json
from dataclasses import replace
from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.core.struct import stack
from fleetopt_jax.laws.operators.watts import (
    LIMIT_FRAC,
    OperatorWatts,
    StepParts,
    asked_w,
    make_operator_watts,
    make_serving_watts,
    operator_w,
    step_asked_w,
    step_energy_j,
    step_power_w,
    step_s,
    step_watts,
    stretch_at_limit,
)

KINDS = ("gemm", "experts", "decode_attention", "elementwise")
EXACT = 1e-12
DATA = files("fleetopt_jax.catalog").joinpath("data", "operators")


def entries(name: str) -> dict:
    return json.loads(DATA.joinpath(f"{name}.json").read_text())["gpus"]


def operator_law(gpu: str, variant: str) -> OperatorWatts:
    return make_operator_watts(**entries("watts")[gpu][variant]["coefficients"])


def serving_law(gpu: str):
    return make_serving_watts(**entries("serving_watts")[gpu]["serving"]["coefficients"])


def random_parts(n: int) -> StepParts:
    """Steps of all mixtures, some without some kinds or without a gap; an operator keeps no peak busier than fully."""
    u = jax.random.uniform(jax.random.key(0), (n, 4, len(KINDS)))
    seconds_s = jnp.where(u[:, 0] < 0.2, 0.0, 10.0 ** (-5.0 + 4.0 * u[:, 1]))
    gap_s = jnp.where(u[:, 2, 0] < 0.3, 0.0, 10.0 ** (-5.0 + 4.0 * u[:, 3, 0]))
    return StepParts(seconds_s, seconds_s * u[:, 2], seconds_s * u[:, 3] ** 3, gap_s)


def test_an_operator_draws_more_the_busier_it_keeps_the_gpu_and_never_more_than_the_board_may():
    laws = [
        (GPUS[gpu].gpu, operator_law(gpu, v)) for gpu in entries("watts") if gpu in GPUS for v in entries("watts")[gpu]
    ]
    share = jnp.linspace(0.0, 1.0, 41)

    def grid(gpu, law):
        return jax.vmap(lambda m: jax.vmap(lambda f: operator_w(law, gpu, m, f))(share))(share)

    gpus, records = (stack(column) for column in zip(*laws))
    watts = jax.jit(jax.vmap(grid))(gpus, records)
    assert jnp.all(jnp.diff(watts, axis=1) >= 0) and jnp.all(jnp.diff(watts, axis=2) >= 0)
    limit_w = gpus.tdp_w[:, None, None]
    assert jnp.all(watts <= LIMIT_FRAC * limit_w * (1 + EXACT))
    assert jnp.all(watts > gpus.idle_w[:, None, None] - 1e-3 * limit_w)


def test_an_operator_that_does_nothing_draws_little_more_than_idle_and_the_limit_holds_a_large_product():
    for name in ("h200", "b200", "gb200"):
        gpu, law = GPUS[name].gpu, operator_law(name, "gemm_bf16")
        assert abs(float(operator_w(law, gpu, 0.0, 0.0)) / float(gpu.idle_w) - 1.0) < 0.12
        assert float(operator_w(law, gpu, 0.1, 0.7)) > 0.95 * float(gpu.tdp_w)
        assert float(asked_w(law, gpu, 0.1, 0.7)) > float(gpu.tdp_w)


def test_a_step_of_one_kind_is_that_operator_and_a_step_that_waits_is_a_gap():
    gpu = GPUS["h100"].gpu
    law = step_watts(serving_law("h100"), KINDS)
    for i in range(len(KINDS)):
        one = jax.tree.map(lambda x: x[i], law.operators)
        only = jnp.arange(len(KINDS)) == i
        parts = StepParts(2e-3 * only, 0.6e-3 * only, 0.2e-3 * only, jnp.zeros(()))
        np.testing.assert_allclose(step_power_w(law, gpu, parts), operator_w(one, gpu, 0.3, 0.1), EXACT)
    zeros = jnp.zeros(len(KINDS))
    waits = step_asked_w(law, gpu, StepParts(zeros, zeros, zeros, jnp.asarray(1e-3)))
    np.testing.assert_allclose(waits, gpu.idle_w + gpu.tdp_w * law.gap_frac, EXACT)
    slow = step_watts(serving_law("h100"), KINDS, slow_experts=True)
    assert slow.gap_frac > law.gap_frac


def test_energies_of_steps_add_up_below_the_limit():
    """Two steps in one take the joules of both: watts are joules over seconds, whatever is beside what."""
    gpu, law = GPUS["b200"].gpu, step_watts(serving_law("b200"), KINDS)
    parts = random_parts(2000)
    other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), parts)

    def joules(p):
        return jax.vmap(lambda q: step_asked_w(law, gpu, q) * step_s(q))(p)

    def beside(a, b, axis):
        return jnp.concatenate([a, b], axis=axis)

    both = StepParts(
        *(beside(getattr(parts, x), getattr(other, x), 1) for x in ("seconds_s", "memory_s", "flop_s")),
        parts.gap_s + other.gap_s,
    )
    twice = step_watts(serving_law("b200"), KINDS * 2)
    together = jax.vmap(lambda q: step_asked_w(twice, gpu, q) * step_s(q))(both)
    np.testing.assert_allclose(together, joules(parts) + joules(other), 1e-9)


def test_watts_of_a_step_rise_with_its_bytes_and_flops_and_their_gradients_are_finite_everywhere():
    gpu, law = GPUS["h100"].gpu, step_watts(serving_law("h100"), KINDS)
    parts = random_parts(2000)
    slope = jax.jit(jax.vmap(jax.grad(lambda p: step_power_w(law, gpu, p))))(parts)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slope))
    assert jnp.all(slope.memory_s >= 0) and jnp.all(slope.flop_s >= 0)
    nothing = jax.tree.map(jnp.zeros_like, jax.tree.map(lambda x: x[0], parts))
    for record in (nothing, replace(nothing, gap_s=jnp.asarray(1e-3))):
        leaves = jax.tree.leaves(jax.grad(lambda p: step_energy_j(law, gpu, p))(record))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)


def test_gradients_of_the_whole_law():
    gpu, law = GPUS["b200"].gpu, step_watts(serving_law("b200"), KINDS)
    parts = StepParts(jnp.array([3e-3, 2e-3, 1e-3, 5e-4]), jnp.full(4, 4e-4), jnp.full(4, 1e-4), jnp.asarray(1e-3))
    floats = jax.tree.map(jnp.asarray, (law, gpu))

    def kilowatts(law, gpu, milliseconds):
        return step_power_w(law, gpu, jax.tree.map(lambda x: 1e-3 * x, milliseconds)) / 1e3

    scale = jax.tree.map(lambda x: 1e3 * x, parts)
    check_grads(lambda law, ms: kilowatts(law, floats[1], ms), (floats[0], scale), order=1, modes=("rev",))


def test_a_lower_limit_takes_longer_and_draws_less_and_the_board_s_own_is_already_in_the_timings():
    gpu, law = GPUS["h100"].gpu, step_watts(serving_law("h100"), KINDS)
    parts = random_parts(500)
    limits_w = float(gpu.tdp_w) * jnp.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    at = jax.jit(jax.vmap(lambda p: jax.vmap(lambda w: stretch_at_limit(law, gpu, p, w))(limits_w)))(parts)
    np.testing.assert_allclose(at[:, -1], 1.0, EXACT)
    assert jnp.all(jnp.diff(at, axis=1) <= 1e-12) and jnp.all(at < 2.5) and jnp.any(at[:, 0] > 1.05)
    watts = jax.vmap(lambda p: jax.vmap(lambda w: step_power_w(law, gpu, p, w))(limits_w))(parts)
    assert jnp.all(jnp.diff(watts, axis=1) >= 0) and jnp.all(watts < limits_w)


@pytest.mark.parametrize(
    "bad", [{"memory_frac": -0.1}, {"flop_power": 0.0}, {"flop_power": 1.5}, {"busy_frac": np.nan}]
)
def test_bad_coefficients_are_refused(bad):
    good = {"busy_frac": 0.05, "memory_frac": 0.6, "flop_frac": 1.0, "flop_power": 0.7}
    with pytest.raises(ValueError, match="need fractions >= 0"):
        make_operator_watts(**{**good, **bad})
