"""What is said of failures: what a plan can lose, what breaks then, and what a spare costs."""

from collections.abc import Mapping
from typing import Any

from fleetopt_jax.report.verdict import takes_said
from fleetopt_jax.report.words import QUANTITIES, latency, listed, ms, percent, sentence

MOST_DIGITS = 6  # of a share of the time
_OF_WHOM = "load and latencies are those of what is left then, batches, watts and prices those of all"


def failures_said(plan: Mapping[str, Any]) -> dict[str, str]:
    """The answer to what happens if instances fail; nothing of a plan where nobody has looked."""
    found = plan.get("failures")
    if not found:
        return {}
    each = listed([_lost(plan, losses) for losses in found["pools"]])
    spare, asked = found["spare"], plan.get("reserve")
    one = "one more spare in every pool takes" if asked else "a spare in every pool takes"
    option = "" if asked else ": fleetopt optimize --spare 1 plans for it"
    said = [f"{sentence(each)}.", _share(plan), f"{sentence(one)} {takes_said(spare)}{option}."]
    return {"If some fail": " ".join(filter(None, said))}


def _lost(plan: Mapping[str, Any], losses: Mapping[str, Any]) -> str:
    """What a pool, or a stage of one, may lose, and what breaks then."""
    lost, then, slo = losses["may_lose"], losses["then"], plan["slo"]
    role = "" if losses["role"] == "mixed" else f"{losses['role']} "
    of_one = f" of pool {losses['pool']}" if len(plan["pools"]) > 1 else ""
    down = f"{lost + 1:,} {role}instance{'s' if lost else ''}{of_one} down"
    if then["limit"] == "utilization":
        load = then["value"]
        over = load is None or load >= 1.0
        most = f"the load is {percent(load)}, where {percent(then['asked'])} is the most"
        breaks = "there is more load than can be served" if over else most
    elif slo["ttft_s_per_token"] and then["limit"] == "ttft_p99_s":
        breaks = "more than 1 % of the requests miss their limit of the TTFT"
    else:
        name = QUANTITIES[then["limit"]].title
        breaks = f"the {name} is {latency(then['value'])}, over the limit of {ms(then['asked'])}"
    return f"with {down} {breaks}"


def _share(plan: Mapping[str, Any]) -> str:
    """How much of the time no pool lacks too many, where it is known how often things fail."""
    held = [losses["holds_frac"] for losses in plan["failures"]["pools"]]
    if any(share is None for share in held):
        return ""
    of_all = plan["failures"]["holds_frac"]
    each = f"its pools hold {listed([of_time(share) for share in held])}" if len(held) > 1 else ""
    if of_all is None:
        return f"{sentence(each)} of the time, each with the others whole." if each else ""
    whole = f"Fewer are down {of_time(of_all)} of the time"
    return f"{whole}{f' ({each})' if each else ''}."


def of_time(share: float) -> str:
    """'99.81 %', with as many digits as tell it from all of the time."""
    digits = next((n for n in range(2, MOST_DIGITS) if 1.0 - share >= 0.5 * 10.0 ** -(n + 2)), MOST_DIGITS)
    return percent(share, digits)


def reserve_said(plan: Mapping[str, Any]) -> str:
    """What may be down while the limits hold, where anything may."""
    asked = plan.get("reserve")
    if not asked:
        return ""
    if asked["name"] == "spares":
        counts = {"instance": asked["instances"], "node": asked["nodes"]}
        parts = [f"{n:,} {what}{'s' if n != 1 else ''}" for what, n in counts.items() if n]
        nodes = f" (a node holds {asked['gpus_per_node']} GPUs)" if asked["nodes"] else ""
        return f"Limits hold with {listed(parts)} of every pool down{nodes}: {_OF_WHOM}."
    rates = [
        f"a {what} failing every {hours:,.0f} h" if hours is not None else f"{what}s that never fail"
        for what, hours in (("GPU", asked["gpu_mtbf_h"]), ("node", asked["node_mtbf_h"]))
    ]
    return (
        f"Limits of every pool hold at least {of_time(asked['availability'])} of the time, with {listed(rates)} and "
        f"repairs of {asked['repair_h']:,.4g} h: {_OF_WHOM}."
    )
