"""What a plan rests on as JSON objects (SI units)."""

from dataclasses import asdict
from typing import Any

from fleetopt_jax._optimize.sensitivity import Sensitivity
from fleetopt_jax._optimize.uncertainty import Trust


def sensitivity_to_json(found: Sensitivity) -> dict[str, Any]:
    """Elasticities, intervals, shadow prices and thresholds."""
    return {
        "elasticities": {name: [asdict(each) for each in ranked] for name, ranked in found.elasticities.of.items()},
        "skipped": dict(found.elasticities.skipped),
        "intervals": trust_to_json(found.trust),
        "shadow_prices": [asdict(price) for price in found.shadow_prices],
        "thresholds": [
            {
                "window_tokens": value.window_tokens,
                "as_sized": value.as_sized,
                "resized": value.resized,
                "moves": [{"window_tokens": window, "change": change} for window, change in value.moves.items()],
            }
            for value in found.thresholds
        ],
    }


def trust_to_json(trust: Trust) -> dict[str, Any]:
    """The intervals; inf becomes null where it is written."""
    return {
        "level": trust.level,
        "n_samples": trust.n_samples,
        "hold_probability": trust.hold_probability,
        "metrics": {
            name: {
                "value": metric.value,
                "sampled": [metric.sampled.low, metric.sampled.high],
                "linear": [metric.linear.low, metric.linear.high],
                "log_sigma": metric.log_sigma,
            }
            for name, metric in trust.metrics.items()
        },
    }
