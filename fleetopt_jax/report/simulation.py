"""Analytic beside simulated: the JSON document and its table."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleetopt_jax.core.units import KW, MS
from fleetopt_jax.report.tables import new_table, plan_table
from fleetopt_jax.simulate import Estimate, Simulation

TOLERANCE = {"ttft_p99_s": 0.15, "ttft_p99_of_all_s": 0.15, "itl_p99_s": 0.15, "itl_s": 0.05, "n_active": 0.05}
TOLERANCE_ELSE = 0.03  # of tok/J, power and shares: what the laws are held to in the agreement study


def simulation_json(simulation: Simulation, pools: list[dict[str, Any]]) -> dict[str, Any]:
    """The contract's object; `pools` are the plan's, in their order."""
    return {
        "n_arrivals": simulation.n_arrivals,
        "n_completed": simulation.n_completed,
        "n_rejected": simulation.n_rejected,
        "n_in_system": simulation.n_in_system,
        "n_preemptions": simulation.n_preemptions,
        "n_iterations": simulation.n_iterations,
        "slo_held": simulation.slo_held,
        "warm_up_s": simulation.warm_up_s,
        "window_s": simulation.window_s,
        "memory_bytes": simulation.memory_bytes,
        "metrics": _beside(simulation.analytic, simulation.metrics),
        "pools": [
            {
                **{name: pool[name] for name in ("window_tokens", "gpu", "llm", "tp", "n_instances")},
                "metrics": _beside(analytic, estimates),
            }
            for pool, analytic, estimates in zip(pools, simulation.pools_analytic, simulation.pools, strict=True)
        ],
    }


def _beside(analytic: dict[str, float | None], estimates: dict[str, Estimate]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "analytic": _finite(analytic.get(name)),
            "simulated": _finite(found.mean),
            "ci95": [_finite(found.low), _finite(found.high)],
            "agrees": _agrees(name, analytic.get(name), found),
        }
        for name, found in estimates.items()
    }


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: null is a time that never comes, or no bound."""
    return None if value is None or not math.isfinite(value) else value


def _agrees(name: str, analytic: float | None, found: Estimate) -> bool | None:
    """Inside the interval, or within the tolerance of the mean; None where one of them says nothing."""
    if analytic is None:
        return None
    if not (math.isfinite(analytic) and math.isfinite(found.mean)):
        return math.isfinite(analytic) == math.isfinite(found.mean)
    off = abs(analytic - found.mean)
    inside = math.isfinite(found.low) and found.low <= analytic <= found.high
    return bool(inside or off <= TOLERANCE.get(name, TOLERANCE_ELSE) * abs(found.mean))


SHOWN = {
    "tok_per_j": ("tokens per joule", "{:.3f}", 1.0),
    "output_tok_per_s": ("output tokens/s", "{:,.0f}", 1.0),
    "power_w": ("power, kW", "{:,.1f}", KW),
    "n_active": ("in flight per instance", "{:,.1f}", 1.0),
    "ttft_p50_s": ("median TTFT, ms", "{:,.0f}", MS),
    "ttft_p99_s": ("P99 TTFT, ms", "{:,.0f}", MS),
    "itl_s": ("mean ITL, ms", "{:,.1f}", MS),
    "itl_p99_s": ("P99 ITL, ms", "{:,.1f}", MS),
    "e2e_p50_s": ("median end to end, s", "{:,.1f}", 1.0),
    "e2e_p99_s": ("P99 end to end, s", "{:,.1f}", 1.0),
    "slo_attainment": ("TTFT within limit, %", "{:.2f}", 0.01),
    "kv_occupancy": ("KV cache in use, %", "{:.1f}", 0.01),
}


def simulation_table(document: dict[str, Any]) -> RenderableType:
    """The verdict, the metrics of the fleet, those of each pool where there are several."""
    rate = document["workload"]["arrival_rate_per_s"]
    off = [name for name, each in document["metrics"].items() if each["agrees"] is False and name in SHOWN]
    said = f"the laws are off in {', '.join(SHOWN[name][0].split(',')[0] for name in off)}" if off else "the laws agree"
    answer = Text.assemble(
        ("The limits hold" if document["slo_held"] else "The limits do not hold", "bold"),
        f" in simulation, and {said}.",
    )
    parts: list[RenderableType] = [answer, _metrics_table("Fleet", document["metrics"])]
    if len(document["pools"]) > 1:
        parts += [
            _metrics_table(f"Pool of {pool['window_tokens']:,} tokens", pool["metrics"]) for pool in document["pools"]
        ]
    counts = (
        f"{document['n_arrivals']:,} requests at {rate:,.6g}/s: {document['n_completed']:,} completed, "
        f"{document['n_rejected']:,} rejected, {document['n_in_system']:,} still there; "
        f"{document['n_preemptions']:,} preemptions, {document['n_iterations']:,} iterations. "
        f"Statistics over {document['window_s']:,.0f} s after a warm-up of {document['warm_up_s']:,.0f} s, "
        f"state of {document['memory_bytes'] / 1e6:,.0f} MB."
    )
    return Group(*parts, Text(counts, style="dim"))


def verified_plan_table(document: dict[str, Any]) -> RenderableType:
    """The plan, and what the simulation said of it."""
    verified = document["verified"]
    added = verified["instances_added"]
    said = f"{added} instance{'s' if added != 1 else ''} added until the simulated limits held"
    if not verified["held"]:
        said = f"the limits do not hold even with {added} instances more"
    elif not added:
        said = "the limits hold as planned"
    metrics = _metrics_table("Fleet", verified["metrics"])
    return Group(plan_table(document), Text(f"Verified by simulation: {said}.", style="bold"), metrics)


def _metrics_table(title: str, metrics: dict[str, dict[str, Any]]) -> Table:
    table = new_table(title, "analytic", "simulated", "95 % interval", "difference", "")
    for name, (label, pattern, unit) in SHOWN.items():
        if name not in metrics:
            continue
        each = metrics[name]
        low, high = each["ci95"]

        def shown(value: float | None) -> str:
            return "never" if value is None else pattern.format(value / unit)  # noqa: B023

        analytic, simulated = each["analytic"], each["simulated"]
        known = each["agrees"] is not None
        compared = analytic is not None and simulated not in (None, 0)
        table.add_row(
            label,
            shown(analytic) if known else "",
            shown(simulated),
            "" if low is None else f"{shown(low)} - {shown(high)}",
            f"{analytic / simulated - 1:+.1%}" if compared else "",
            "differs" if each["agrees"] is False else "",
        )
    return table
