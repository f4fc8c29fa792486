"""What a plan says: what to buy, where to split, what it saves, what limits it, how sure."""

import math
from collections.abc import Mapping
from typing import Any

from fleetopt_jax.core.units import KW
from fleetopt_jax.fleet.resources import limited_resource
from fleetopt_jax.report.words import (
    HARDLY,
    NOT_TOGETHER,
    broken_quantity,
    goal_of,
    limit_quantity,
    listed,
    ms,
    pool_edges,
    routed_by,
    sentence,
    signed,
)

NOTHING = 0.005  # of an elasticity: not worth a word
NEAR = 0.97  # of a limit: it is what stops the fleet from being smaller


def decision(plan: Mapping[str, Any], sensitivity: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Question and answer, of a plan document with metrics; sharper with its sensitivity document."""
    return {
        "Buy": _buy(plan),
        "Split": _split(plan),
        "It saves": _saves(plan),
        "What limits it": _limiting(plan, sensitivity),
        "How sure": _sure(plan, sensitivity),
    }


def _buy(plan: Mapping[str, Any]) -> str:
    parts = [f"{pool['n_instances']:,} x {pool['tp']} {pool['gpu'].upper()}" for pool in plan["pools"]]
    llms = ", ".join(dict.fromkeys(f"{pool['llm']} in {pool['precision']}" for pool in plan["pools"]))
    metrics = plan["metrics"]
    return (
        f"{gpus_said(plan)}: {listed(parts)}, each instance running {llms}; "
        f"{metrics['power_w'] / KW:,.4g} kW, ${metrics['usd_per_h']:,.0f} an hour."
    )


def _split(plan: Mapping[str, Any]) -> str:
    pools, edges = plan["pools"], pool_edges(plan)
    if len(pools) == 1:
        return f"Do not: one pool takes every request, up to {edges[0]:,.0f} tokens."
    said = f"By {routed_by(plan)}, at {listed([f'{edge:,.0f}' for edge in edges[:-1]])} tokens"
    shrunk = [f"{pool['window_tokens']:,}" for pool in pools if pool["gamma"] > 1]
    return f"{said}; prompts above {listed(shrunk)} tokens are shrunk to fit." if shrunk else f"{said}."


def _saves(plan: Mapping[str, Any]) -> str:
    metrics = plan["metrics"]
    scope = ", counting the power of one GPU an instance" if plan["power_scope"] == "one_gpu_per_instance" else ""
    gain, said = metrics["gain_vs_homogeneous"], f"{metrics['tok_per_j']:#.3g} output tokens per joule{scope}"
    if gain is None:
        return f"{said}; there is no one-pool fleet within the limits to compare with."
    if len(plan["pools"]) == 1:
        return f"{said}, {gain:.3f} times the best one-pool fleet."
    if gain < 1.0 / HARDLY:
        worth = _why_worse(plan)
    elif gain < HARDLY:
        worth = ". Splitting by length hardly pays here: whole instances decide as much"
    else:
        worth = f" ({1.0 - 1.0 / gain:.0%} less energy a token)"
    return f"{said}, {gain:.3f} times the best one-pool fleet{worth}."


def _why_worse(plan: Mapping[str, Any]) -> str:
    """Than one pool: what else the plan was made for, if anything."""
    of_energy = plan["objective"] == "tok_per_j"
    if plan["method"] == "given" or (of_energy and not plan["budget"]):
        return ". One pool would do better"
    if of_energy:
        return ", for this must keep its budget as well"
    return f", for this seeks the {goal_of(plan['objective']).best}"


def _limiting(plan: Mapping[str, Any], sensitivity) -> str:
    binding = plan.get("binding")
    if binding:
        return f"This fleet breaks a limit: {broken(binding)}."
    near = _near(plan)
    none_near = "No limit is near: whole instances decide."
    if plan["slo"]["ttft_s_per_token"]:  # every prompt has a limit of its own, and the plan does not say how near
        none_near = "The TTFT limit, which grows with the prompt, or whole instances decide."
    said = f"{sentence(listed(near))}." if near else none_near
    if sensitivity:
        priced = [_priced(price, sensitivity["objective"]) for price in sensitivity["shadow_prices"] if price["binds"]]
        said += "".join(f" {sentence(text)}." for text in priced if text)
    return said


def broken(binding: Mapping[str, Any]) -> str:
    """Which limit is broken or out of reach, and by how much."""
    name = binding["limit"]
    if name == "budget":
        return NOT_TOGETHER
    of = broken_quantity(name)
    had = "is" if "value" in binding else "can at the nearest be"
    reached, limit = (
        f"{number(value, of.si)} {of.unit}".strip()
        for value in (binding.get("value", binding.get("nearest_feasible")), binding["asked"])
    )
    return f"{of.title} {had} {reached}; asked is {limit}"


def _near(plan: Mapping[str, Any]) -> list[str]:
    """Limits the fleet is close to, in words."""
    slo, pools, metrics = plan["slo"], plan["pools"], plan["metrics"]
    found = []
    loads = [(pool["utilization"], k) for k, pool in enumerate(pools, 1) if pool["utilization"] is not None]
    full = [str(k) for load, k in loads if load >= NEAR * slo["max_utilization"]]
    if full:
        who = f"pool {full[0]} carries all the load it" if len(full) == 1 else f"pools {listed(full)} carry all they"
        found.append(f"{who} may ({slo['max_utilization']:.0%})")
    if not slo["ttft_s_per_token"] and (metrics["ttft_p99_s"] or 0.0) >= NEAR * slo["ttft_p99_s"]:
        found.append(f"the P99 TTFT is {ms(metrics['ttft_p99_s'])} of {ms(slo['ttft_p99_s'])} allowed")
    if slo["itl_s"] is not None and (metrics["itl_s"] or 0.0) >= NEAR * slo["itl_s"]:
        found.append(f"the mean ITL is {ms(metrics['itl_s'])} of {ms(slo['itl_s'])} allowed")
    for name, cap in plan["budget"].items():
        if cap > 0 and _used(plan, name) >= NEAR * cap:
            limit = limit_quantity(name)
            found.append(f"the budget of {limit.amount(cap)} is used ({limit.title})")
    return found


def _used(plan: Mapping[str, Any], limit: str) -> float:
    """What a plan uses of a limit of its budget."""
    if limit.startswith("gpus_of."):
        return sum(pool["n_gpus"] for pool in plan["pools"] if pool["gpu"] == limit.removeprefix("gpus_of."))
    return plan["metrics"][limited_resource(limit)]


def _priced(price: Mapping[str, Any], objective: str | Mapping[str, Any]) -> str:
    """What one more unit of a limit is worth."""
    if price["per_unit"] is None or abs(price["elasticity"] or 0.0) < NOTHING:
        return ""
    limit, of = limit_quantity(price["limit"]), goal_of(objective).quantity
    worth = price["per_unit"] * limit.si / of.si
    return f"one more {limit.unit} of {limit.title} is worth {signed(worth)} {of.unit}"


def _sure(plan: Mapping[str, Any], sensitivity) -> str:
    given = plan["method"] == "given" and plan["status"] == "feasible"
    said = {
        "optimal": "No candidate is better (certified)",
        "feasible": "The best found, without a certificate of the best",
        "infeasible": "As given; it breaks a limit",
    }[plan["status"]]
    parts = ["As given; it holds its limits." if given else f"{said}."]
    if sensitivity:
        intervals = sensitivity["intervals"]
        low, high = (number(end) for end in intervals["metrics"]["tok_per_j"]["sampled"])
        parts.append(
            f"With the engines' errors tokens per joule lie between {low} and {high} "
            f"({intervals['level']:.0%}), and all limits hold with {intervals['hold_probability']:.0%} probability."
        )
    else:
        errors = [pool[key] for pool in plan["pools"] for key in ("engine_step_error", "engine_power_error")]
        known = [error for error in errors if error is not None]
        parts.append(f"The engines' laws are off by up to {max(known):.0%} on average." if known else "")
    return " ".join(filter(None, parts))


def gpus_said(plan: Mapping[str, Any]) -> str:
    counts: dict[str, int] = {}
    for pool in plan["pools"]:
        counts[pool["gpu"]] = counts.get(pool["gpu"], 0) + pool["n_gpus"]
    return " + ".join(f"{count:,} {gpu.upper()}" for gpu, count in counts.items())


def number(value: float | None, size: float = 1.0) -> str:
    if value is None or not math.isfinite(value):
        return "unbounded"
    return f"{value / size:,.3g}" if abs(value / size) < 999.5 else f"{value / size:,.0f}"
