"""The reference of every search: fleets one by one, sized and evaluated by `fleet/`, priced and compared in NumPy. And
a problem small enough to try them all."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np
from jax import Array

from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec, OwnLaws
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import FleetMetrics, evaluate
from fleetopt_jax.fleet.fleet import Slo, fleet_of
from fleetopt_jax.fleet.limits import held
from fleetopt_jax.fleet.resources import Weights
from fleetopt_jax.fleet.sizing import size_fleet
from fleetopt_jax.fleet.surroundings import Surroundings
from fleetopt_jax.workload.atoms import Workload, make_workload

LONGEST = 1600.0
ROWS = 512  # fleets of one compiled call
FIELDS = ("power_w", "usd_per_h", "kg_co2_per_h", "n_gpus")


def few_lengths(arrival_rate_per_s: float = 2e4, longest: float = LONGEST) -> Workload:
    """30 lengths up to 1,600 tokens, most of them short."""
    total = np.round(np.geomspace(16.0, longest, 30))
    output = np.maximum(1.0, np.floor(0.3 * total))
    weight = np.random.default_rng(0).uniform(0.5, 1.0, 30) / total
    return make_workload(total - output, output, weight, arrival_rate_per_s=arrival_rate_per_s)


def with_less_kv(spec: EngineSpec, times: float = 16.0) -> EngineSpec:
    """A sixteenth of the KV cache, so that windows of 1,600 tokens matter as those of 25,600 do."""
    kv = build(spec).kv
    less = replace(kv, **as_floats(n_blocks=kv.n_blocks / times, slot_tokens=kv.slot_tokens / times))
    return replace(spec, laws=OwnLaws(kv=less))


@partial(jax.jit, static_argnames="assumptions")
def _sized(
    engines: tuple[Engine, ...],
    windows: Array,
    gammas: Array,
    workload: Workload,
    slo: Slo,
    surroundings: Surroundings,
    *,
    assumptions: Assumptions,
) -> tuple[FleetMetrics, Array]:
    """(metrics, whether all limits hold) of fleets with windows and gammas [M, K]."""

    def one(fleet_windows: Array, fleet_gammas: Array) -> tuple[FleetMetrics, Array]:
        fleet = fleet_of(engines, fleet_windows, fleet_gammas, np.ones(len(engines)), surroundings)
        metrics = evaluate(size_fleet(fleet, workload, slo, assumptions), workload, assumptions, quantiles=False)
        return metrics, held(metrics.pools, slo)

    return jax.vmap(one)(windows, gammas)


class AllFleets:
    """Every fleet of a problem's specs with these windows as boundaries, each with each gamma."""

    def __init__(self, problem: Problem, windows: Sequence[float], gammas: Sequence[float] = (1.0,)):
        k, last = problem.n_pools, problem.window_tokens
        options = np.unique([*windows, last])
        inner = [*itertools.combinations_with_replacement(options, k - 1)]
        compressed = [*itertools.product(gammas, repeat=k - 1)]
        pairs = [(w, g) for w in inner for g in compressed]
        self.windows = np.array([[*w, last] for w, _ in pairs])
        self.gammas = np.array([[*g, 1.0] for _, g in pairs])
        self.assignments = [*itertools.product(problem.specs, repeat=k)]
        found = [self._evaluated(problem, specs) for specs in self.assignments]
        self.resources = {name: np.stack([each[name] for each, _ in found]) for name in FIELDS}  # [A, M, K]
        self.kept = np.stack([kept for _, kept in found])  # [A, M]

    def _evaluated(self, problem: Problem, specs: Sequence[EngineSpec]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        parts = []
        for start in range(0, len(self.windows), ROWS):
            rows = np.minimum(np.arange(start, start + ROWS), len(self.windows) - 1)
            metrics, good = _sized(
                tuple(build(spec) for spec in specs),
                self.windows[rows],
                self.gammas[rows],
                problem.workload,
                problem.slo,
                problem.around,
                assumptions=problem.assumptions,
            )
            pools = metrics.pools
            edges = self.windows[rows] * problem.assumptions.compression.effective_gamma(self.gammas[rows])
            edges = np.where(np.asarray(pools.traffic_frac) > 0, np.maximum.accumulate(edges, axis=1), 0.0)
            promised = np.max(edges, axis=1) >= problem.window_tokens
            there = np.asarray(good) & np.all(np.isfinite(pools.n_instances), axis=1) & promised
            parts.append(({name: np.asarray(getattr(pools, name)) for name in FIELDS}, there))
        n = len(self.windows)
        resources = {name: np.concatenate([each[name] for each, _ in parts])[:n] for name in FIELDS}
        return resources, np.concatenate([there for _, there in parts])[:n]

    def used(self, weights: Weights) -> np.ndarray:
        """What every fleet uses by the weights [A, M]."""
        kinds = np.array([[weights.gpus_of.get(s.gpu_name, 0.0) for s in specs] for specs in self.assignments])
        total = sum(getattr(weights, name) * np.nan_to_num(self.resources[name], posinf=0.0) for name in FIELDS)
        return np.sum(total + kinds[:, None, :] * np.nan_to_num(self.resources["n_gpus"], posinf=0.0), axis=2)

    def cheapest(self, objective: Weights, caps: Sequence[tuple[Weights, float]] = ()) -> float:
        """The least cost of those that hold the limits, and use no more of each cap than it allows; inf without any."""
        kept = self.kept.copy()
        for weights, most in caps:
            kept &= self.used(weights) <= most * (1.0 + 1e-9)
        return float(np.min(np.where(kept, self.used(objective), np.inf)))
