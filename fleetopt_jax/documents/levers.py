"""What pays, as a JSON object (SI units)."""

import dataclasses
from typing import Any

import numpy as np

from fleetopt_jax._optimize.levers import Gain, Levers, Pair, Pulled
from fleetopt_jax._optimize.plan import BrokenLimit, Plan, Unreachable
from fleetopt_jax._optimize.uncertainty import LEVEL, Interval
from fleetopt_jax.catalog.spec import EngineSpec, LaneSpec
from fleetopt_jax.documents.drafts import drafts_to_json
from fleetopt_jax.documents.plan import plan_to_json

SCHEMA = "fleetopt-levers/1"
SHARED = ("assume", "assumptions", "power_scope", "dispatch", "workload", "slo", "site", "compressor", "objective")


def levers_to_json(found: Levers) -> dict[str, Any]:
    """The present fleet, every lever from it, pairs of them, and what was left out."""
    present = found.present
    document = plan_to_json(present.plan)
    given = None if found.given is None else _given(found.given)
    return {
        "schema": SCHEMA,
        **{name: document[name] for name in SHARED},
        "interval_level": LEVEL,
        "present": _fleet(present) | {"binding": _binding(present.plan.binding), "given": given},
        "levers": [_lever(gain, present) for gain in found.gains],
        "pairs": [_pair(pair, present) for pair in found.pairs],
        "left_out": [{"name": name, "why": why} for name, why in found.left_out.items()],
    }


def _given(plan: Plan) -> dict[str, Any]:
    return {
        "status": plan.status,
        "binding": _binding(plan.binding),
        **{name: float(getattr(plan.metrics, name)) for name in ("tok_per_j", "usd_per_h", "n_gpus")},
    }


def _lever(gain: Gain, present: Pulled) -> dict[str, Any]:
    (lever,) = gain.pulled.levers
    return {"name": lever.name, "title": lever.title, "note": lever.note} | _gain(gain, present)


def _pair(pair: Pair, present: Pulled) -> dict[str, Any]:
    return {
        "levers": list(pair.gain.pulled.names),
        **_gain(pair.gain, present),
        "product": pair.product,
        "ratio": pair.ratio,
        "ratio_interval": _ends(pair.interval),
        "verdict": pair.verdict,
    }


def _gain(gain: Gain, present: Pulled) -> dict[str, Any]:
    now, then = present.values, gain.pulled.values
    known = bool(now and then)
    return {
        "feasible": gain.pulled.feasible,
        "gain": gain.gain,
        "gain_interval": _ends(gain.interval),
        "tok_per_j_gain": then["tok_per_j"] / now["tok_per_j"] if known else None,
        "usd_per_h_change": then["usd_per_h"] - now["usd_per_h"] if known else None,
        "ttft_p99_change_s": then["ttft_p99_s"] - now["ttft_p99_s"] if known else None,
        "quality": gain.quality,
        "binding": _binding(gain.pulled.plan.binding),
        **_fleet(gain.pulled),
    }


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _binding(binding: BrokenLimit | Unreachable | None) -> dict[str, Any] | None:
    return None if binding is None else dataclasses.asdict(binding)


def _fleet(pulled: Pulled) -> dict[str, Any]:
    names = ("tok_per_j", "power_w", "usd_per_h", "ttft_p99_s", "itl_s", "n_gpus", "n_instances")
    plan = pulled.plan
    pools = pools_to_json(plan) if isinstance(plan, Plan) else []
    return {"status": plan.status, **{name: pulled.values.get(name) for name in names}, "pools": pools}


def pools_to_json(plan: Plan) -> list[dict[str, Any]]:
    """The pools of a fleet by what a lever may change of them."""
    numbers = (plan.fleet.window_tokens, plan.fleet.gamma, plan.fleet.n_instances)
    return [
        {"window_tokens": int(window), "gamma": float(gamma), "n_instances": int(np.sum(n)), **_lane(lane, n)}
        for lane, window, gamma, n in zip(plan.lanes, *numbers, strict=True)
    ]


def _lane(lane: LaneSpec, n_instances: Any) -> dict[str, Any]:
    """The engine of a pool, where it has two stages that of the one that decodes, with those of both."""
    found = _spec(lane.stages[-1])
    if len(lane.stages) == 1:
        return found
    each = zip(("prefill", "decode"), lane.stages, np.asarray(n_instances), strict=True)
    return found | {"stages": [{"role": role, "n_instances": int(n), **_spec(spec)} for role, spec, n in each]}


def _spec(spec: EngineSpec) -> dict[str, Any]:
    return {
        "gpu": spec.gpu_name,
        "llm": spec.llm_name,
        **vars(spec.split),
        "serving": spec.serving,
        "precision": spec.precision,
        "kv_precision": spec.kv_precision,
        "max_num_seqs": spec.max_num_seqs,
        "clock_frac": spec.clock_frac,
        "power_limit_w": spec.power_limit_w,
        "speculate": drafts_to_json(spec.drafts) if spec.drafts else None,
        "file": spec.file,
    }
