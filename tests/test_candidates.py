"""Many candidate fleets scored at once."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from fleetopt_jax._optimize.candidates import BATCH, Scorer
from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.fleet.sizing import size_fleet

LATE = replace(PUBLISHED, tail=PHYSICAL.tail, kv_cache=PHYSICAL.kv_cache, occupancy=PHYSICAL.occupancy)


@pytest.mark.parametrize(
    "assumptions", [PUBLISHED, pytest.param(LATE, marks=pytest.mark.slow)], ids=["first try", "many tries"]
)
def test_a_candidate_is_sized_as_if_it_were_alone(small_workload, assumptions):
    """Whatever is scored beside it, and whichever its neighbours began with."""
    specs = [EngineSpec("h100", source="projected")]
    problem = make_problem(small_workload, specs, assumptions=assumptions, slo=make_slo(ttft_p99_s=1.0))
    scorer = Scorer(problem, problem.specs * 2)
    rng = np.random.default_rng(0)
    last = float(problem.window_tokens)
    windows = np.stack([rng.permutation(scorer.thresholds)[:24], np.full(24, last)], axis=1)
    gammas = np.ones_like(windows)
    costs = scorer(windows, gammas)
    order = rng.permutation(24)
    np.testing.assert_allclose(scorer(windows[order], gammas[order]), costs[order], rtol=1e-12)
    for row in (0, 7, 19):
        fleet = problem.fleet(problem.specs * 2, windows[row], gammas[row], np.ones(2))
        alone = np.asarray(size_fleet(fleet, problem.workload, problem.slo, assumptions).n_instances)
        np.testing.assert_array_equal(scorer.instances(windows[row], gammas[row]), alone)
        assert np.isfinite(costs[row]) == np.isfinite(alone).all()


@pytest.mark.slow
def test_more_than_a_batch_is_scored_in_parts(small_workload):
    problem = make_problem(small_workload, [EngineSpec("h100", source="projected")], assumptions=PUBLISHED)
    scorer, told = Scorer(problem, problem.specs), []
    windows = np.full((2 * BATCH + 5, 1), float(problem.window_tokens))
    costs = scorer(windows, np.ones_like(windows), lambda done, total: told.append((done, total)))
    assert len(costs) == len(windows) == scorer.n_evaluated and len({*costs.tolist()}) == 1
    assert told == [(BATCH, len(windows)), (2 * BATCH, len(windows)), (len(windows), len(windows))]
    assert jnp.isfinite(costs[0])
