"""A fleet is lanes of stages: what changes one part leaves the rest, and numbers of every part can be batched and
differentiated."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.fleet.assumptions import PHYSICAL
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import evaluate, pool_metrics
from fleetopt_jax.fleet.fleet import Fleet, Lane, Stage, fleet_of, make_fleet
from fleetopt_jax.fleet.stage import setting_of
from fleetopt_jax.fleet.surroundings import make_site, make_surroundings
from fleetopt_jax.fleet.traffic import route
from fleetopt_jax.laws.compression import make_compressor

REAL = replace(PHYSICAL, rounding="real")
AROUND = make_surroundings(
    make_site(host_w_per_gpu=150.0, pue=1.2, usd_per_kwh=0.1, kg_co2_per_kwh=0.4),
    make_compressor(success_frac=0.8, s_per_token=1e-6, j_per_token=0.2),
)


@pytest.fixture(scope="module", params=["vllm-0.11", pytest.param("vllm", marks=pytest.mark.nightly)])
def engine(request) -> Engine:
    """Of simple laws, and of operators, whose programs take ten times as long to compile."""
    return build(EngineSpec("h100", serving=request.param, own_fit=False))


def leaves_equal(one, other, **tolerance) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


# --- the record -----------------------------------------------------------------------------------------------------


def test_a_fleet_is_told_by_its_lanes_and_its_lanes_by_the_fleet(engine):
    other = build(EngineSpec("b200", own_fit=False))
    fleet = make_fleet([engine, other], window_tokens=[900, 20_480], n_instances=[3, 4], gamma=[1.5, 1])
    assert fleet.engines == (engine, other)
    for name, values in dict(window_tokens=[900, 20_480], n_instances=[3, 4], gamma=[1.5, 1]).items():
        np.testing.assert_array_equal(getattr(fleet, name), values)
    assert [lane.stage.role for lane in fleet.lanes] == ["mixed", "mixed"]
    again = fleet_of(fleet.engines, fleet.window_tokens, fleet.gamma, fleet.n_instances, fleet.surroundings)
    leaves_equal(again, fleet, rtol=0)


def test_what_changes_instances_or_engines_leaves_the_rest(engine):
    other = build(EngineSpec("b200", own_fit=False))
    fleet = fleet_of([engine, other], [900.0, 20_480.0], [1.5, 1.0], [3.0, 4.0], AROUND)
    more, swapped = fleet.with_instances([5.0, 0.0]), fleet.with_engines([other, engine])
    np.testing.assert_array_equal(more.n_instances, [5, 0])
    leaves_equal(more.with_instances(fleet.n_instances), fleet, rtol=0)
    assert swapped.engines == (other, engine)
    leaves_equal(swapped.with_engines(fleet.engines), fleet, rtol=0)
    for changed in (more, swapped):
        assert changed.surroundings is AROUND
        np.testing.assert_array_equal(changed.window_tokens, fleet.window_tokens)
        np.testing.assert_array_equal(changed.gamma, fleet.gamma)


def test_a_lane_of_two_stages_has_no_single_one(engine):
    """Whoever reads lanes of one stage refuses one of two, in a line that says so: it is not half served."""
    stage = Stage(engine, jnp.ones(()))
    lane = Lane(jnp.asarray(900.0), jnp.ones(()), (stage, stage))
    with pytest.raises(ValueError, match="a lane of two stages"):
        _ = Fleet((lane,), AROUND).engines


# --- evaluated ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_metrics_of_a_lane_are_those_of_its_one_stage(engine, workload):
    """Whatever stands beside it: in lanes of one kind of engine, which are one batch, and of two, which are not."""
    other = replace(engine, power=build(EngineSpec("h100", source="projected")).power)

    @jax.jit
    def both(n):
        same, mixed = (
            fleet_of(engines, [900.0, 20_480.0], [1.5, 1.0], n, AROUND) for engines in ((engine,) * 2, (engine, other))
        )
        traffic, setting = route(same, workload, PHYSICAL), setting_of(workload, AROUND, PHYSICAL)
        alone = []
        for k, lane in enumerate((*same.lanes, mixed.lanes[1])):
            mine = jax.tree.map(lambda x, k=k: x[min(k, 1)], traffic)
            alone.append(pool_metrics(lane.stage.engine, mine, lane.window_tokens, lane.stage.n_instances, setting))
        return [evaluate(fleet, workload, quantiles=False).pools for fleet in (same, mixed)], alone

    (same, mixed), (short, long, long_by_other) = both(np.array([5.0, 8.0]))
    for pools, k, expected in ((same, 0, short), (same, 1, long), (mixed, 0, short), (mixed, 1, long_by_other)):
        leaves_equal(jax.tree.map(lambda x, k=k: x[k], pools), expected, rtol=1e-12, atol=1e-13)
    assert np.all((np.asarray(same.utilization) > 0.1) & (np.asarray(same.utilization) < 1))
    assert float(same.gpu_power_w[1]) != float(mixed.gpu_power_w[1])  # the other kind of engine counts
    np.testing.assert_allclose(same.gpu_power_w[0], mixed.gpu_power_w[0], rtol=1e-12)


# --- batched and differentiated -------------------------------------------------------------------------------------

WATCHED = ("tok_per_j", "power_w", "ttft_p99_s", "ttft_p99_of_all_s", "itl_s", "itl_p99_s", "usd_per_h", "kg_co2_per_h")
BASE = np.array([900.0, 20_600.0, 1.5, 1.0, 2.3, 3.3, 1.0, 1.0, 1.0, 1.0])  # windows, gamma, instances, factors


@pytest.fixture(scope="module")
def differentiated(engine, workload):
    """(a number from every metric, the metrics, the gradient) of a batch of rows like `BASE`: one program for all."""

    def value(row):
        slower, hungrier = row[6:8], row[8:10]
        engines = [
            replace(engine, decode=engine.decode.slower(slower[k]), power=engine.power.hungrier(hungrier[k]))
            for k in range(2)
        ]
        metrics = evaluate(fleet_of(engines, row[:2], row[2:4], row[4:6], AROUND), workload, REAL, router_width=0.1)
        watched = jnp.stack([getattr(metrics, name) for name in WATCHED])
        logs = jnp.log(jnp.where(jnp.isfinite(watched) & (watched > 0), watched, 1.0))
        return jnp.sum(logs * jnp.arange(1.0, len(WATCHED) + 1)), metrics

    program = jax.jit(jax.vmap(jax.value_and_grad(value, has_aux=True)))

    def padded(rows: np.ndarray):
        """In batches of one shape."""
        (values, metrics), slopes = program(np.concatenate([rows, np.tile(BASE, (48 - len(rows), 1))]))
        return jax.tree.map(lambda x: np.asarray(x)[: len(rows)], (values, metrics, slopes))

    return padded


@pytest.mark.nightly
def test_gradients_of_windows_instances_and_engines_are_differences(differentiated):
    h, step = 2e-4, np.eye(len(BASE))
    nudges = BASE * (1.0 + h * np.concatenate([step, -step, 2.0 * step, -2.0 * step]))
    values, metrics, slopes = differentiated(np.vstack([BASE, nudges]))
    loads = metrics.pools.utilization[0]
    assert np.all((loads > 0.3) & (loads < 0.95))
    up, down, far_up, far_down = values[1:].reshape(4, -1)
    differences = (8.0 * (up - down) - (far_up - far_down)) / (12.0 * h)
    still = np.isin(np.arange(len(BASE)), [1, 3])  # the last window and edge, which nobody is near
    # h^4 of curvature, and over h the rounding of quantiles, whose tails are integrals over cells of microseconds.
    np.testing.assert_allclose((BASE * slopes[0])[~still], differences[~still], rtol=1e-5, atol=1e-6)
    assert np.all(slopes[0][~still] != 0)
    assert np.all(slopes[0][still] == 0) and np.all(np.abs(differences[still]) < 1e-9 / h)


@pytest.mark.slow
def test_gradients_stay_finite_where_a_lane_is_empty_idle_or_overloaded(differentiated):
    rows = np.tile(BASE, (6, 1))
    rows[0, [0, 4]] = 10.0, 0.0  # no traffic, no instances
    rows[1, [0, 4]] = 1.0, 5.0  # instances that nobody asks
    rows[2, 4] = 0.0  # traffic without instances
    rows[3, 4] = 1e9  # idle
    rows[4, 4] = 1e-3  # overload
    rows[5, 4:6] = 0.0  # nobody at all
    _, metrics, slopes = differentiated(rows)
    assert np.all(np.isfinite(slopes))
    for x in jax.tree.leaves(metrics):
        assert not np.any(np.isnan(x))
    pools = metrics.pools
    assert np.all(np.isinf(pools.ttft_p99_s[[2, 4, 5], 0]))
    for nobody in (pools.n_gpus, pools.output_tok_per_s):
        np.testing.assert_array_equal(nobody[[0, 2, 5], 0], 0.0)


@pytest.mark.slow
def test_a_batch_of_fleets_is_the_fleets_one_by_one(differentiated):
    rows = BASE * np.random.default_rng(0).uniform(1.0, 1.2, (8, len(BASE)))
    together, _, slopes = differentiated(rows)
    for row, value, slope in zip(rows, together, slopes, strict=True):
        alone, _, its_slope = differentiated(row[None])
        # A batch sums in another order: the fixed point and the inverted transform make 1e-12 of 1e-16, and slopes of
        # quantiles, which divide by a density, 1e-9.
        np.testing.assert_allclose(alone[0], value, rtol=1e-11)
        np.testing.assert_allclose(its_slope[0], slope, rtol=1e-8, atol=1e-12)
