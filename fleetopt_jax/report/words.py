"""How numbers, limits and choices are said, wherever a plan is shown."""

from collections.abc import Sequence
from typing import Any

from fleetopt_jax.core.units import KW, MS

METRICS = {  # name: what it is called, its unit, the unit in SI
    "tok_per_j": ("tokens per joule", "tok/J", 1.0),
    "power_w": ("power", "kW", KW),
    "usd_per_h": ("cost", "USD/h", 1.0),
    "ttft_p99_s": ("P99 TTFT", "ms", MS),
    "itl_s": ("mean ITL", "ms", MS),
}

LIMITS = {  # name: what it is called, its unit, the unit in SI
    "ttft_p99_s": ("P99 TTFT", "ms", MS),
    "itl_s": ("mean ITL", "ms", MS),
    "max_utilization": ("load an instance may take", "point", 0.01),
    "max_gpus": ("GPUs", "GPU", 1.0),
    "max_power_w": ("power", "kW", KW),
    "max_usd_per_h": ("cost", "USD/h", 1.0),
}

OBJECTIVES = {"tok_per_j": ("tok/J", 1.0), "usd": ("USD/h", 1.0), "power": ("kW", KW), "gpus": ("GPUs", 1.0)}

NOT_TOGETHER = "each limit of the budget can be kept alone, but no fleet was found that keeps all of them"
HARDLY = 1.02  # gains below this are within what whole instances and the engines' errors decide
CHOICES_SAID = {
    "power_scope": {
        "one_gpu_per_instance": "power counts one GPU of each instance",
        "instance": "power counts all GPUs",
    },
    "lengths": {
        "output_share": "every request is {share:.0%} output of its total length",
        "trace": "prompts and outputs are the workload's own",
    },
    "compression": {
        "free": "compressing is free and always works",
        "prompt_only": "only prompts can be compressed",
    },
    "occupancy": {
        "full_batch": "steps take as long as with all slots full",
        "fixed_point": "steps take as long as the load makes them",
    },
    "prefill": {"free_chunks": "prefill rides along free", "compute": "prefill takes engine time and power"},
    "kv_cache": {"reserved": "a slot reserves its whole window", "paged": "the KV cache is paged"},
    "engine": {"projected": "engines are the paper's projections", "measured": "engines go by measurements"},
    "tail": {
        "mean_prefill": "TTFT is the P99 wait and a mean prefill",
        "quantile": "TTFT is the P99 of wait, prefill queue and own prefill",
    },
}


def slope_said(ttft_s_per_token: float) -> str:
    """What a limit of the TTFT grows by, after its value."""
    return f" + {ttft_s_per_token * 1000 / MS:g} ms per 1,000 prompt tokens" if ttft_s_per_token else ""


def limits_said(slo: dict[str, Any]) -> str:
    grows = slope_said(slo["ttft_s_per_token"])
    itl = f", mean ITL {ms(slo['itl_s'])}" if slo["itl_s"] is not None else ""
    held = ", of all requests together" if slo["scope"] == "fleet" else ""
    return f"{ms(slo['ttft_p99_s'])}{grows}{itl}{held}"


def edge(pool: dict[str, Any]) -> str:
    compressed = f" (gamma {pool['gamma']:g})" if pool["gamma"] > 1 else ""
    return f"{pool['gamma'] * pool['window_tokens']:,.0f} tokens{compressed}"


def certificate(plan: dict[str, Any]) -> str:
    """What the answer is the best of, how far the best could be, and what fewer pools reach."""
    search = plan["search"]
    parts = [f"Candidates: {search['candidates']}"]
    if search["gap"]:
        parts.append(f"at most {search['gap']:.2%} from the best of them")
    reached = [value for value in search["by_pools"] if value is not None]
    if len(reached) > 1:
        unit = {"tok_per_j": "tokens per joule", "usd": "USD/h", "power": "W", "gpus": "GPUs"}[plan["objective"]]
        values = ", ".join(or_dash(value, "{:,.4g}") for value in search["by_pools"])
        parts.append(f"with at most 1 to {len(search['by_pools'])} pools {values} {unit}")
    return "; ".join(parts) + "."


def site_said(plan: dict[str, Any]) -> str:
    """What is counted besides GPU boards, where anything is."""
    site, metrics = plan["site"], plan["metrics"]
    parts = []
    if site["host_w_per_gpu"]:
        parts.append(f"{site['host_w_per_gpu']:g} W of host a GPU")
    if site["pue"] > 1:
        parts.append(f"PUE {site['pue']:g}")
    if site["usd_per_kwh"]:
        parts.append(f"electricity at ${site['usd_per_kwh']:g}/kWh in the cost")
    if site["kg_co2_per_kwh"]:
        parts.append(f"{metrics['kg_co2_per_h']:,.0f} kg CO2/h")
    return f"Counted besides the boards: {', '.join(parts)}." if parts else ""


def ms(seconds: float | None) -> str:
    if seconds is None:
        return "never (overload)"
    return f"{seconds:,.4g} s" if seconds >= 10.0 else f"{seconds / MS:,.4g} ms"


def percent(share: float | None) -> str:
    return "overload" if share is None else f"{share:.0%}"


def or_dash(value: float | None, template: str) -> str:
    return "-" if value is None else template.format(value)


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def listed(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def pool_edges(plan: dict[str, Any]) -> list[float]:
    """The longest total length each pool accepts: gamma times its window [tokens]."""
    return [pool["gamma"] * pool["window_tokens"] for pool in plan["pools"]]
