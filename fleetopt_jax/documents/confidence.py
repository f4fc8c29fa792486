"""With what probability a plan holds its limits, and what that costs, as JSON objects (SI units)."""

import dataclasses
from typing import Any

import numpy as np

from fleetopt_jax._optimize.confidence import Confident
from fleetopt_jax._optimize.holding import Holding, holding
from fleetopt_jax._optimize.plan import Plan


def holding_to_json(found: Holding) -> dict[str, Any]:
    """The probability that all limits hold, that each does, and that each pool holds its own."""
    return {
        "probability": found.probability,
        "by_limit": dict(found.by_limit),
        "by_pool": list(found.by_pool),
        "n_draws": found.n_draws,
        "seed": found.seed,
        "law_log_sigmas": dataclasses.asdict(found.laws),
    }


def plan_holding_to_json(plan: Plan, seed: int = 0) -> dict[str, Any]:
    """The field `holds` of a plan, drawn anew; none where a lane has two stages, of which no errors are known."""
    return {} if plan.fleet.n_stages > 1 else {"holds": holding_to_json(holding(plan, seed=seed))}


def confident_to_json(found: Confident) -> dict[str, Any]:
    """What was asked, by how many sigmas engines and laws may be slower for fleets sized for that to hold as often, and
    what the plan takes more than the nominal one; `holds` of the plan has what was reached."""
    nominal, metrics = found.nominal, found.nominal.metrics
    return {
        "asked": found.confidence,
        "sigmas": found.sigmas,
        "costs": found.costs,
        "nominal": {
            "probability": found.nominal_holding.probability,
            "tok_per_j": float(metrics.tok_per_j),
            "n_gpus": int(metrics.n_gpus),
            "power_w": float(metrics.power_w),
            "usd_per_h": float(metrics.usd_per_h),
            "window_tokens": np.asarray(nominal.fleet.window_tokens).tolist(),
            "n_instances": np.asarray(nominal.fleet.n_instances).tolist(),
            "gpus": list(nominal.kinds),
        },
    }
