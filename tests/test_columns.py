"""What the laws read of requests is sums of columns of atoms: hard slices, soft shares and a plain sum agree."""

import itertools
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.fleet.assumptions import Assumptions, parse_assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.fleet import fleet_of
from fleetopt_jax.fleet.stage import setting_of, stage_load
from fleetopt_jax.fleet.surroundings import make_surroundings
from fleetopt_jax.fleet.traffic import (
    Atoms,
    PoolTraffic,
    ServedSums,
    Slice,
    atoms_of,
    route,
    running_sums,
    served_features,
    slice_traffic,
)
from fleetopt_jax.laws.compression import make_compressor
from fleetopt_jax.workload.atoms import Workload, make_workload, with_rate
from fleetopt_jax.workload.columns import columns_of

J = 64
CHUNKS = parse_assumptions("physical,prefill=free_chunks,tail=mean_prefill")
COMPUTE = parse_assumptions("physical,tail=mean_prefill")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build(EngineSpec("h100", own_fit=False, serving=MEASURED_SERVING))


@pytest.fixture(scope="module")
def workload() -> Workload:
    """Prompts and outputs that sort differently, some of both alike."""
    rng = np.random.default_rng(3)
    prompt, output = (np.round(np.exp(rng.uniform(1.0, high, J))) for high in (9.5, 7.0))
    prompt[:8] = 200.0
    return make_workload(prompt, output, rng.random(J), arrival_rate_per_s=40.0)


def rows(x, n: int = J) -> np.ndarray:
    """A feature of atoms as columns [n, ...]."""
    return np.asarray(x).reshape(n, -1)


def same(one, other, **tolerance) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


# --- the workload and its columns -----------------------------------------------------------------------------------


def test_by_prompt_sorts_the_prompts(workload):
    order = np.asarray(workload.by_prompt).astype(int)
    np.testing.assert_array_equal(np.sort(order), np.arange(J))
    assert np.all(np.diff(workload.prompt_tokens[order]) >= 0)
    assert np.any(np.diff(order) < 0)  # the order of totals is another
    np.testing.assert_array_equal(with_rate(workload, 3.0).by_prompt, order)


def test_columns_of_requests_that_nothing_changed():
    columns = columns_of(np.array([3.0, 5.0]), np.array([2.0, 0.0]))
    expected = dict(route_tokens=[5, 5], prefill_tokens=[3, 5], held_tokens=[3, 5], steps=[2, 0], output_tokens=[2, 0])
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(columns, name), values)
    assert columns.kept_tokens is None  # what sticky sessions route by is known of traces with conversations alone
    assert {field.name for field in fields(columns)} == {*expected, "kept_tokens"}


# --- sums -----------------------------------------------------------------------------------------------------------


@jax.jit
def sums_of(engine: Engine, workload: Workload) -> tuple[ServedSums, ServedSums, Atoms]:
    """Features of each atom, their running sums, and the atoms themselves: with the histogram of prompts."""
    assumptions = parse_assumptions("physical")
    atoms = atoms_of(workload, assumptions)
    running = running_sums(engine.prefill, atoms, assumptions, compresses=False)
    return served_features(engine.prefill, atoms, assumptions), running.as_is, atoms


def test_slices_sum_to_all_and_are_the_sums_of_their_atoms(engine, workload):
    each, running, atoms = sums_of(engine, workload)
    weight = np.asarray(atoms.weight)[:, None]
    cuts = [0, 5, 5, 31, J]
    for feature, sums in zip(jax.tree.leaves(each), jax.tree.leaves(running), strict=True):
        feature, sums = rows(feature), rows(sums, J + 1)
        slices = np.diff(sums[cuts], axis=0)
        np.testing.assert_array_equal(sums[0], 0.0)
        # Differences of running sums lose what is small beside the sum of all.
        tolerance = dict(rtol=1e-12, atol=1e-14 * np.max(np.abs(sums)) + 1e-300)
        np.testing.assert_allclose(slices.sum(axis=0), (weight * feature).sum(axis=0), **tolerance)
        expected = [(weight * feature)[a:b].sum(axis=0) for a, b in itertools.pairwise(cuts)]
        np.testing.assert_allclose(slices, expected, **tolerance)


def test_features_are_what_a_request_asks(engine, workload):
    each, _, atoms = sums_of(engine, workload)
    p, o = np.asarray(workload.prompt_tokens), np.asarray(workload.output_tokens)
    np.testing.assert_array_equal(each.requests, 1.0)
    np.testing.assert_array_equal(each.output_tokens, o)
    expected = dict(prefill=p, prefill2=p**2, prefill3=p**3, prefill4=p**4, steps=o, steps2=o**2)
    expected |= dict(held=o * (p + o / 2), held2=o * (p**2 + p * o + o**2 / 3))
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(each.demand, name), values, rtol=1e-13)
    # Each is in one cell, whose prompts it lies between.
    np.testing.assert_array_equal(np.sum(each.in_cells, axis=1), 1.0)
    cells = atoms.cells
    assert np.all((cells.shortest[cells.cell] <= p) & (p <= cells.longest[cells.cell]))


def brute_force(workload: Workload, shares: np.ndarray) -> dict[str, np.ndarray]:
    """Means over the pools' requests by plain sums, of which pool k serves `shares`[k, j] of atom j."""
    p, o, w = (np.asarray(getattr(workload, name)) for name in ("prompt_tokens", "output_tokens", "weight"))
    frac = shares @ w
    means = {name: shares @ (w * x) / frac for name, x in dict(prefill=p, prefill2=p**2, steps=o, steps2=o**2).items()}
    return means | dict(traffic_frac=frac, held=shares @ (w * o * (p + o / 2)) / frac)


def found_means(traffic: PoolTraffic) -> dict[str, np.ndarray]:
    names = ("prefill", "prefill2", "steps", "steps2", "held")
    return {name: getattr(traffic.demand, name) for name in names} | dict(traffic_frac=traffic.traffic_frac)


def test_hard_and_soft_routing_are_sums_over_shares_of_atoms(engine, workload):
    """No try to compress succeeds: a request longer than its pool's window goes on to the next that holds it."""
    windows = np.array([150.5, 2000.5, 20_000.0])
    never = make_surroundings(compressor=make_compressor(success_frac=0.0))
    fleet = fleet_of([engine] * 3, windows, np.ones(3), np.ones(3), never)
    total = np.asarray(workload.prompt_tokens + workload.output_tokens)
    hard = (np.r_[0, windows[:-1], 0][:3, None] < total) & (total <= windows[:, None])

    @jax.jit
    def routed(width):
        return [route(fleet, workload, COMPUTE, router_width=w) for w in (None, width)]

    by_slices, sharp = routed(1e-7)
    _, wide = routed(0.3)
    same(found_means(by_slices), brute_force(workload, hard), rtol=1e-10)
    same(found_means(sharp), brute_force(workload, hard), rtol=1e-10)

    below = np.vstack([1.0 / (1.0 + np.exp((np.log(total) - np.log(edge)) / 0.3)) for edge in windows[:2]])
    accepted = np.diff(np.vstack([np.zeros(J), below, np.ones(J)]), axis=0)
    soft, waiting = [], np.zeros(J)
    for share, window in zip(accepted, windows, strict=True):
        waiting = waiting + share
        soft.append(np.where(total <= window, waiting, 0.0))
        waiting = np.where(total <= window, 0.0, waiting)
    same(found_means(wide), brute_force(workload, np.stack(soft)), rtol=1e-10)
    np.testing.assert_allclose(np.sum(wide.traffic_frac), 1.0, rtol=1e-12)


# --- a column of its own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("assumptions", "by_chunks"), [(COMPUTE, False), (CHUNKS, True)])
def test_prompts_of_which_half_is_cached_are_held_and_decoded_as_before(engine, workload, assumptions, by_chunks):
    """As a prefix cache would: half of each prompt is computed, all of it held."""

    @jax.jit
    def of(share: float) -> tuple[PoolTraffic, PoolTraffic]:
        atoms = atoms_of(workload, assumptions)
        columns = replace(atoms.columns, prefill_tokens=share * atoms.columns.prefill_tokens)
        sums = running_sums(engine.prefill, replace(atoms, columns=columns), assumptions, compresses=False)
        everything = Slice(jnp.asarray(40_000.0), *(jnp.asarray(row) for row in (0, J, 0, J)))
        traffic = slice_traffic(sums, engine.prefill, make_compressor(), everything, assumptions)
        setting = setting_of(workload, make_surroundings(), assumptions)
        return traffic, stage_load(engine, traffic, 40_000.0, setting)

    (full, full_load), (half, half_load) = of(1.0), of(0.5)
    for power, name in enumerate(("prefill", "prefill2", "prefill3", "prefill4"), start=1):
        np.testing.assert_allclose(getattr(half.demand, name), 0.5**power * getattr(full.demand, name), rtol=1e-12)
    unmoved = ("steps", "steps2", "held", "held2")
    same(*({name: getattr(x.demand, name) for name in unmoved} for x in (half, full)), rtol=1e-14)
    same((half.traffic_frac, half.output_tokens), (full.traffic_frac, full.output_tokens), rtol=1e-14)
    assert float(half_load.n_max) == float(full_load.n_max)
    assert float(half_load.context_tokens) == pytest.approx(float(full_load.context_tokens), rel=1e-14)
    if by_chunks:
        assert float(half.steps.chunks) < float(full.steps.chunks)
        assert float(half.steps.steps - half.steps.chunks) == pytest.approx(
            float(full.steps.steps - full.steps.chunks), rel=1e-12
        )
    else:
        same(half.steps, full.steps, rtol=1e-14)
        linear, square = (float(x) for x in (engine.prefill.per_token_s, engine.prefill.per_token2_s))
        cached_s = linear * half.demand.prefill + square * half.demand.prefill2
        assert float(half_load.prefill_s) == pytest.approx(float(cached_s), rel=1e-12)
        decode_s = [float(load.service_s - load.n_max * load.prefill_s) for load in (half_load, full_load)]
        assert decode_s[0] == pytest.approx(decode_s[1], rel=1e-12)


def test_choices_say_the_columns_of_a_workload(workload):
    """Lengths split by a share, or as traced: the columns follow, and what is routed is the total either way."""
    total = np.asarray(workload.prompt_tokens + workload.output_tokens)
    traced, split = (atoms_of(workload, how).columns for how in (COMPUTE, Assumptions()))
    np.testing.assert_array_equal(traced.prefill_tokens, workload.prompt_tokens)
    np.testing.assert_array_equal(split.prefill_tokens, np.maximum(1.0, np.floor(0.8 * total)))
    for columns in (traced, split):
        np.testing.assert_array_equal(columns.route_tokens, total)
        np.testing.assert_array_equal(columns.held_tokens + columns.output_tokens, total)
        np.testing.assert_array_equal(columns.steps, columns.output_tokens)
