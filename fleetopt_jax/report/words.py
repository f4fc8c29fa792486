"""How quantities, limits, objectives and choices are said, wherever a plan is shown: one table of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetopt_jax.core.units import GB, KW, MS
from fleetopt_jax.fleet.resources import limited_resource


@dataclass(frozen=True)
class Quantity:
    """What a number is called, and the unit it is shown in."""

    title: str
    unit: str
    si: float = 1.0  # the unit in SI

    def amount(self, value: float) -> str:
        """A value in SI units with its unit: '85 points', '120 kW'."""
        number = value / self.si
        shown = f"{number:,.0f}" if abs(number) >= 1e4 else f"{number:,.4g}"
        return f"{shown} {self.unit}{'s' if self.unit in _COUNTED and shown != '1' else ''}".strip()


GROWS = "each request by its own prompt, which 99 % must hold"  # how a limit that grows is judged
_COUNTED = ("GPU", "point")  # units with a plural

QUANTITIES = {  # by their fields: metrics of a plan and numbers of its SLO
    "tok_per_j": Quantity("tokens per joule", "tok/J"),
    "power_w": Quantity("power", "kW", KW),
    "usd_per_h": Quantity("cost", "USD/h"),
    "kg_co2_per_h": Quantity("carbon", "kg CO2/h"),
    "n_gpus": Quantity("GPUs", "GPU"),
    "ttft_p99_s": Quantity("P99 TTFT", "ms", MS),
    "itl_s": Quantity("mean ITL", "ms", MS),
    "max_utilization": Quantity("load an instance may take", "point", 0.01),
}
_BROKEN = {  # limits a plan may break that no number of its SLO is, or that are called otherwise there
    "max_gpus": Quantity("number of GPUs", ""),
    "utilization": Quantity("load of the busiest pool", "%", 0.01),
    "confidence": Quantity("probability that the limits hold", "%", 0.01),
    "unserved_frac": Quantity("share of requests that no pool accepts", "%", 0.01),
    "window_tokens": Quantity("window that fits into an engine's KV cache", "tokens"),
}
_KIND = "gpus_of."


def limit_quantity(limit: str) -> Quantity:
    """What a limit is of, by its name: the SLO's ('itl_s') or the budget's ('max_power_w', 'gpus_of.h100')."""
    if limit.startswith(_KIND):
        return Quantity(f"{limit.removeprefix(_KIND).upper()} in stock", "GPU")
    return QUANTITIES[limit] if limit in QUANTITIES else QUANTITIES[limited_resource(limit)]


def broken_quantity(limit: str) -> Quantity:
    """The same where a limit is broken, or cannot be held."""
    if limit.startswith(_KIND):
        return Quantity(f"the number of {limit.removeprefix(_KIND).upper()}", "")
    return _BROKEN[limit] if limit in _BROKEN else limit_quantity(limit)


@dataclass(frozen=True)
class Goal:
    """What a plan is chosen by."""

    quantity: Quantity
    best: str  # what is sought, after "the"
    gain: str  # what there is more of, the better a plan is


OBJECTIVES = {
    "tok_per_j": Goal(QUANTITIES["tok_per_j"], "most tokens per joule", "tokens per joule"),
    "usd": Goal(QUANTITIES["usd_per_h"], "least cost", "requests per dollar"),
    "power": Goal(QUANTITIES["power_w"], "least power", "less power"),
    "gpus": Goal(Quantity("GPUs", "GPUs"), "fewest GPUs", "fewer GPUs"),
    "co2": Goal(QUANTITIES["kg_co2_per_h"], "least carbon", "less carbon"),
}
_WEIGHTED = Goal(
    Quantity("weighted resources", "weighted"), "least weighted resources", "less of the weighted resources"
)


def goal_of(objective: str | Mapping[str, Any]) -> Goal:
    """Of the objective of a plan document: a name, or weights of one's own."""
    return OBJECTIVES[objective] if isinstance(objective, str) else _WEIGHTED


NO_LIMIT = "no limit"
UNBOUNDED = "unbounded"  # a latency or an end of an interval that is infinite
NEVER = "never: overloaded"  # a latency of a pool that is asked for more than it can serve
AT_LIMIT = 0.005  # of a limit: what is nearer to it is at it
NOT_TOGETHER = "each limit of the budget can be kept alone, but no fleet was found that keeps all of them"
HARDLY = 1.02  # gains below this are within what whole instances and the engines' errors decide
_CHOICES = {  # by the names of their records
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
    "tail": {
        "mean_prefill": "TTFT is the P99 wait and a mean prefill",
        "quantile": "TTFT is the P99 of wait, prefill queue and own prefill",
    },
}
_QUALITIES = {  # of an engine's coefficients: what they rest on
    "measured": "measurements of this very configuration",
    "kernels": "operators timed on its GPU and the serving engine's own time",
    "law": "a law fitted to measurements on its GPU",
    "projected": "the law of another GPU, carried over by data-sheet figures",
    "calibrated": "the paper's coefficients, calibrated by hand",
    "scaled": "the paper's coefficients, scaled from another GPU",
    "roofline": "the paper's roofline law on data-sheet figures",
}
_DISPATCHES = {
    "jsq": "a pool sends each request to its instance with the fewest in flight",
    "round_robin": "a pool sends requests to its instances in turn",
    "random": "a pool sends requests to its instances at random",
    "affinity": "a pool sends requests that begin alike to one instance",
    "bounded_hash": "a pool sends requests that begin alike to one instance, while it has at most 1.25 times the mean",
}


def choices_said(plan: Mapping[str, Any]) -> list[str]:
    """The assumptions of a plan in words, but for the integration, which in every plan is exact; a record of somebody's
    own by its name. Engines by what the coefficients of each rest on, not by what was asked for."""
    texts = []
    for choice, name in plan["assumptions"].items():
        if choice == "engine" and plan["pools"]:
            texts.append(engines_said(plan))
        elif choice != "integration":
            text = _CHOICES.get(choice, {}).get(name)
            texts.append(text.format(share=plan["output_share"]) if text else f"{choice.replace('_', ' ')}: {name}")
    return [*texts, prefix_said(plan)]


def without_engines(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Of a plan whose engines are told elsewhere, or not at all: what `choices_said` then reads."""
    left_out = {"engine"} if plan.get("output_share") is not None else {"engine", "lengths"}
    choices = {choice: name for choice, name in plan["assumptions"].items() if choice not in left_out}
    return {**plan, "assumptions": choices, "pools": []}


def prefix_said(plan: Mapping[str, Any]) -> str:
    """What is found of prompts in the KV cache."""
    reused, found = plan["workload"].get("reused_frac"), plan.get("prefix_cache")
    if found and found["name"] == "constant":
        return f"prompts find {percent(found['hit_frac'])} of their tokens in a prefix cache"
    before = "" if reused is None else f"{percent(reused)} of the prompt tokens were in prompts before"
    if found:
        return f"{before}: what the KV memory still has of them is not computed again{_on_hosts(plan)}"
    return f"no prefix cache{before and ', although '}{before}"


def _on_hosts(plan: Mapping[str, Any]) -> str:
    """What is kept in the hosts' memory besides, each kind once."""
    tiers = dict.fromkeys(
        (tier["bytes_per_gpu"], tier["bytes_per_s_per_gpu"])
        for pool in plan["pools"]
        if (tier := pool.get("host_cache"))
    )
    kinds = [f"{size / GB:,.4g} GB of its host's memory, loaded at {speed / GB:,.4g} GB/s" for size, speed in tiers]
    return f", nor what each GPU has besides in {' or '.join(kinds)}" if kinds else ""


def engines_said(plan: Mapping[str, Any]) -> str:
    """What the engines of a plan go by, each kind once."""
    pools_of: dict[str, list[str]] = {}
    for k, pool in enumerate(plan["pools"], 1):
        for text in dict.fromkeys(rests_on(each) for each in stages_of(pool)):
            pools_of.setdefault(text, []).append(str(k))
    if len(pools_of) == 1:
        return f"engines go by {next(iter(pools_of))}"
    parts = [f"{'pools' if len(pools) > 1 else 'pool'} {listed(pools)} by {text}" for text, pools in pools_of.items()]
    return f"engines go by different things: {', '.join(parts)}"


def drafts_said(pool: Mapping[str, Any]) -> str:
    """What a pool drafts ahead, as 'eagle3:3, 2.79 tokens'."""
    drafts = pool.get("speculate")
    return f"{drafts['head']}:{drafts['k']}, {drafts['tokens_per_step']:.3g} tokens" if drafts else "-"


def power_limit_said(pool: Mapping[str, Any]) -> str:
    """What each GPU of a pool may draw, or of its two stages."""
    limits = (each.get("power_limit_w") for each in stages_of(pool))
    return " / ".join("its TDP" if limit is None else f"{limit:,.0f} W" for limit in limits)


def rests_on(pool: Mapping[str, Any]) -> str:
    """What the coefficients of a pool's engine rest on, and what of a calibrated one does not."""
    own = pool.get("engine_file")
    quality = _QUALITIES.get(pool["engine_quality"], "laws as given")
    if not own:
        return quality
    left = pool.get("engine_of_catalog", ())
    return f"your measurements in {own}" + (f" (not calibrated, the catalog's: {listed(left)})" if left else "")


def gpus_of_instance(engine: Mapping[str, Any]) -> int:
    """GPUs of one instance of a pool, a point or another engine of a document."""
    return engine["tp"] * engine.get("dp", 1) * engine.get("pp", 1)


def instance_said(engine: Mapping[str, Any], times: str = " x ") -> str:
    """What one instance runs on: '8 x H100', or '16 x H100 (TP 8, EP 16, DP 2)' where not tensor parallelism alone
    divides the LLM."""
    sizes = {name.upper(): engine.get(name, 1) for name in ("tp", "ep", "dp", "pp")}
    ways = [f"{name} {n}" for name, n in sizes.items() if n > 1]
    split = f" ({', '.join(ways)})" if any(n > 1 for name, n in sizes.items() if name != "TP") else ""
    return f"{gpus_of_instance(engine)}{times}{engine['gpu'].upper()}{split}"


def stages_of(pool: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a pool is made of: its two stages where it has two, else itself."""
    return pool.get("stages") or [pool]


def instances_said(pool: Mapping[str, Any]) -> str:
    """The instances of a pool: '6 x 8 H100', or '2 x 8 H100 prefill + 3 x 8 H200 decode'."""
    said = [
        f"{each['n_instances']:,} x {instance_said(each, ' ')}{' ' + each['role'] if 'role' in each else ''}"
        for each in stages_of(pool)
    ]
    return " + ".join(said)


def dispatch_said(plan: Mapping[str, Any]) -> str:
    """How a pool's requests come to its instances."""
    return _DISPATCHES.get(plan["dispatch"], f"dispatch: {plan['dispatch']}")


def routed_by(plan: Mapping[str, Any]) -> str:
    """The length that the router compares with its thresholds."""
    key = plan.get("route_by")
    if not key:
        return "total length, prompt and output"
    if key["name"] == "prompt_and_limit":
        return "prompt and the max_tokens asked for"
    room = "" if key["headroom"] == 1 else f"{key['headroom']:g} times "
    return f"conversation ({room}its first total length, and it stays until a turn no longer fits)"


def slope_said(ttft_s_per_token: float) -> str:
    """What a limit of the TTFT grows by, after its value."""
    return f" + {ttft_s_per_token * 1000 / MS:g} ms per 1,000 prompt tokens" if ttft_s_per_token else ""


def limits_said(slo: Mapping[str, Any]) -> str:
    grows = slope_said(slo["ttft_s_per_token"])
    itl = f", mean ITL {ms(slo['itl_s'])}" if slo["itl_s"] is not None else ""
    held = ", of all requests together" if slo["scope"] == "fleet" else ""
    return f"{ms(slo['ttft_p99_s'])}{grows}{itl}{held}"


def ttft_limit_rows(plan: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows of the pools' table where the limit of the TTFT grows with the prompt: what it comes to in each pool."""
    slo, pools = plan["slo"], plan["pools"]
    if not slo["ttft_s_per_token"] or any("mean_prompt_tokens" not in pool for pool in pools):
        return []

    within = [pool.get("ttft_within_frac") for pool in pools]

    def at(tokens: float) -> str:
        return ms(slo["ttft_p99_s"] + slo["ttft_s_per_token"] * tokens)

    return [
        ("mean prompt", [f"{pool['mean_prompt_tokens']:,.0f} tokens" for pool in pools]),
        ("TTFT limit there", [at(pool["mean_prompt_tokens"]) for pool in pools]),
        ("TTFT limit at most", [at(pool["window_tokens"]) for pool in pools]),
        *([("within TTFT limit", [percent(share, 2) for share in within])] if None not in within else []),
    ]


def ttft_said(plan: Mapping[str, Any]) -> str:
    """The P99 TTFT of a plan and how far it is from its limit, where that does not grow with the prompt."""
    reached, slo = plan["metrics"]["ttft_p99_s"], plan["slo"]
    if verified := plan.get("verified"):
        reached = verified["metrics"]["ttft_p99_s"]["simulated"]
        return f"P99 TTFT in simulation {latency(reached)} (limit {limits_said(slo)})"
    if slo["ttft_s_per_token"] or reached is None or not math.isfinite(reached):
        return f"P99 TTFT {latency(reached)} (limit {limits_said(slo)})"
    return f"P99 TTFT {ms(reached)}, {margin(reached, slo['ttft_p99_s'])} of {limits_said(slo)}"


def edge(pool: Mapping[str, Any]) -> str:
    compressed = f" (gamma {pool['gamma']:g})" if pool["gamma"] > 1 else ""
    return f"{pool['gamma'] * pool['window_tokens']:,.0f} tokens{compressed}"


def certificate(plan: Mapping[str, Any]) -> str:
    """What the answer is the best of, how far the best could be, and what fewer pools reach."""
    search = plan["search"]
    parts = [f"Candidates: {search['candidates']}"]
    if search["gap"]:
        parts.append(f"at most {search['gap']:.2%} from the best of them")
    reached = [value for value in search["by_pools"] if value is not None]
    if len(reached) > 1:
        of = goal_of(plan["objective"]).quantity
        values = [or_dash(value and value / of.si, "{:,.4g}").replace("-", "none") for value in search["by_pools"]]
        more = [f"{value} with at most {n}" for n, value in enumerate(values[1:], 2)]
        parts.append(f"the best have {listed([f'{values[0]} {of.unit} with one pool', *more])}")
    return "; ".join(parts) + "."


def site_said(plan: Mapping[str, Any]) -> str:
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
    if seconds is None or not math.isfinite(seconds):
        return UNBOUNDED
    return f"{seconds:,.4g} s" if seconds >= 10.0 else f"{seconds / MS:,.4g} ms"


def number(value: float | None, size: float = 1.0) -> str:
    if value is None or not math.isfinite(value):
        return UNBOUNDED
    return f"{value / size:,.3g}" if abs(value / size) < 999.5 else f"{value / size:,.0f}"


def latency(seconds: float | None) -> str:
    """A latency of a plan; of one without bound why."""
    return NEVER if seconds is None or not math.isfinite(seconds) else ms(seconds)


def percent(share: float | None, digits: int = 0) -> str:
    """'85 %'; of a load without bound 'overload'."""
    return "overload" if share is None else f"{100.0 * share:.{digits}f} %"


def chance(probability: float) -> str:
    """'42 %'; never quite 0 or 100, which a thousand draws cannot tell."""
    if probability > 0.995:
        return "over 99 %"
    return percent(probability) if probability >= 0.005 else "under 1 %"


def factor(gain: float) -> str:
    """A gain: '1.13x'."""
    return f"{gain:.2f}x"


def margin(value: float | None, limit: float | None) -> str:
    """How far a value is from its limit: '18.7 % under the limit'."""
    if limit is None:
        return NO_LIMIT
    if value is None or not math.isfinite(value):
        return f"{UNBOUNDED}, over the limit"
    if abs(value / limit - 1.0) < AT_LIMIT:
        return "at the limit"
    return f"{percent(abs(value / limit - 1.0), 1)} {'under' if value < limit else 'over'} the limit"


def in_flight(n: float) -> str:
    """Sequences in flight, a mean: '277', '1.4', '0.03'."""
    if n >= 9.95 or n == round(n):
        return f"{n:,.0f}"
    return f"{n:.1f}" if n >= 0.95 else f"{n:.1g}" if n >= 0.001 else "under 0.001"


def signed(value: float) -> str:
    """A change with three digits, in full: '+0.0000594', '-24.8', '0'."""
    if not value:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{float(f'{value:.3g}'):+,.{digits}f}"


def or_dash(value: float | None, template: str) -> str:
    return "-" if value is None else template.format(value)


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def listed(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def pool_edges(plan: Mapping[str, Any]) -> list[float]:
    """The longest total length each pool accepts: gamma times its window [tokens]."""
    return [pool["gamma"] * pool["window_tokens"] for pool in plan["pools"]]
