"""A robust choice as a JSON object (SI units)."""

import dataclasses
from typing import Any

import numpy as np

from fleetopt_jax._optimize.robust import Robust, Scored


def robust_to_json(found: Robust) -> dict[str, Any]:
    """The rule that made the choice, the nominal optimum, one pool and all candidates, best first, and what becomes of
    the first three scenario by scenario."""
    return {
        "measure": found.measure,
        "level": found.level,
        "n_scenarios": found.n_scenarios,
        "workloads": list(found.workloads),
        "rule": found.rule,
        "chosen": _scored_json(found.chosen),
        "nominal": _scored_json(found.nominal),
        "one_pool": found.one_pool and _scored_json(found.one_pool),
        "scenarios": {name: [dataclasses.asdict(each) for each in shown] for name, shown in found.shown.items()},
        "candidates": [_scored_json(each) for each in found.candidates],
    }


def _scored_json(scored: Scored) -> dict[str, Any]:
    plan = scored.plan
    return {
        "origin": scored.origin,
        "sized_for": scored.sized_for,
        "score": scored.score,
        "mean_tok_per_j": scored.mean_tok_per_j,
        "hold_share": scored.hold_share,
        "hold_share_by_workload": list(scored.by_workload),
        "tok_per_j": float(plan.metrics.tok_per_j),
        "n_gpus": int(plan.metrics.n_gpus),
        "window_tokens": np.asarray(plan.fleet.window_tokens).tolist(),
        "gamma": np.asarray(plan.fleet.gamma).tolist(),
        "n_instances": np.asarray(plan.fleet.n_instances).tolist(),
        "gpus": list(plan.kinds),
    }
