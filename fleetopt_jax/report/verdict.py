"""What is said of a plan that fails its limits: which pool breaks which, by how much, and what mends it."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, isfinite, log10
from typing import Any

from fleetopt_jax.core.units import MS
from fleetopt_jax.report.words import (
    GROWS,
    NOT_TOGETHER,
    QUANTITIES,
    broken_quantity,
    instance_said,
    latency,
    limit_quantity,
    listed,
    ms,
    number,
    percent,
    sentence,
    slope_said,
)

LATENCIES = ("ttft_p99_s", "itl_s")
Limit = Mapping[str, Any]  # an entry of `broken` or `unmended`


def failing_said(plan: Mapping[str, Any]) -> str:
    """What a plan breaks, pool by pool: '' where it breaks nothing. It begins with a small letter."""
    found = plan.get("broken") or ()
    overloaded = {each["pool"] for each in found if each["limit"] == "utilization" and _overloads(each)}
    return "; ".join(_broken(plan, each) for each in found if not _goes_without_saying(each, overloaded))


def _goes_without_saying(each: Limit, overloaded: set[int]) -> bool:
    """Of a latency: that its pool, or one of all, is overloaded says it."""
    return each["limit"] in LATENCIES and (each["pool"] in overloaded or (each["pool"] is None and bool(overloaded)))


def _overloads(each: Limit) -> bool:
    return _endless(each["value"]) or not each["value"] < 1.0


def _endless(value: float | None) -> bool:
    """Of a number without bound, which JSON has as null."""
    return value is None or not isfinite(value)


def is_overloaded(plan: Mapping[str, Any]) -> bool:
    """Whether a pool of a plan is asked for more than it can serve."""
    return any(each["limit"] == "utilization" and _overloads(each) for each in plan.get("broken") or ())


def _broken(plan: Mapping[str, Any], each: Limit) -> str:
    name, value, asked, slo = each["limit"], each["value"], each["asked"], plan["slo"]
    k = each["pool"]
    pool = plan["pools"][k - 1] if k else {}
    who = f"pool {k}" if k else "all requests together"
    if name == "utilization" and _overloads(each):
        if _endless(value):
            return f"an instance of {who} does not hold one sequence of its window of {pool['window_tokens']:,} tokens"
        return f"{who} is asked for {_times(value)} times what {_its_instances(pool)} can serve"
    if name == "utilization":
        return f"{who} is {percent(value, 1)} loaded with {_its_instances(pool)}, where {percent(asked)} is the most"
    if name == "ttft_p99_s" and slo["ttft_s_per_token"]:
        limit = f"{ms(asked)}{slope_said(slo['ttft_s_per_token'])}"
        within = pool.get("ttft_within_frac")
        share = "too few" if within is None else f"only {percent(within, 2)}"
        return f"{share} of the requests of {who} have their first token within {limit}, where 99 % must"
    if name in LATENCIES:
        over = f", {percent(value / asked - 1.0, 1)} over the limit of {ms(asked)}" if not _endless(value) else ""
        return f"the {QUANTITIES[name].title} of {who} is {latency(value)}{over}"
    return _over(each)


def _times(load: float) -> str:
    return f"{load:,.2f}" if load < 100.0 else f"{load:,.0f}"


def _its_instances(pool: Mapping[str, Any]) -> str:
    n = pool["n_instances"]
    return f"its {n:,} instances" if n != 1 else "its one instance"


def broken(binding: Mapping[str, Any], ttft_s_per_token: float = 0.0) -> str:
    """Which limit is broken or out of reach, and by how much; that of the TTFT may grow with the prompt."""
    name = binding["limit"]
    if name == "budget":
        return NOT_TOGETHER
    of = broken_quantity(name)
    had = "is" if "value" in binding else "can at the nearest be"
    reached, limit = (
        f"{number(value, of.si)} {of.unit}".strip()
        for value in (binding.get("value", binding.get("nearest_feasible")), binding["asked"])
    )
    grows = f"{slope_said(ttft_s_per_token)}, of {GROWS}" if name == "ttft_p99_s" and ttft_s_per_token else ""
    return f"{of.title} {had} {reached}; asked is {limit}{grows}"


def _over(each: Limit) -> str:
    """A limit of the fleet as a whole, of the budget mostly."""
    return f"the {broken(each).removeprefix('the ')}"


def change_said(instances_added: Sequence[int], verbs: tuple[str, str] = ("add", "take")) -> str:
    """'add 12 instances to pool 2', 'add 12 instances to pool 1 and 3 to pool 2', 'take 1 instance from pool 1'."""
    parts = []
    for verb, to, sign in ((verbs[0], "to", 1), (verbs[1], "from", -1)):
        some = [(k, sign * n) for k, n in enumerate(instances_added, 1) if sign * n > 0]
        if some:
            (k, n), *rest = some
            first = f"{n:,} instance{'s' if n != 1 else ''} {to} pool {k}"
            parts.append(f"{verb} {listed([first, *(f'{n:,} {to} pool {k}' for k, n in rest)])}")
    return ", and ".join(parts)


def repair_said(plan: Mapping[str, Any]) -> str:
    """What mends a plan in a few words, by its field `repair`, with a small letter first: '' where there is none."""
    repair = plan.get("repair")
    if not repair:
        return ""
    if repair["instances_added"] is None:
        return "; ".join(_unmended(each) for each in repair["unmended"])
    return change_said(repair["instances_added"]) + _breaks_budget(repair)


def _breaks_budget(repair: Mapping[str, Any]) -> str:
    binding = repair["binding"]
    return f", which breaks the budget: {_over(binding)}" if binding else ""


def _unmended(each: Limit) -> str:
    name, value, asked = each["limit"], each["value"], each["asked"]
    of = f" of pool {each['pool']}" if each["pool"] else ""
    if name == "window_tokens":
        return f"no number of instances helps: one{of} does not hold a sequence of its window"
    if name in LATENCIES:
        whose = of or " of all requests together"
        nearest = f" (the nearest is {ms(_up(value))})" if not _endless(value) else ""
        return f"no number of instances holds a {QUANTITIES[name].title} of {ms(asked)}{whose}{nearest}"
    if name == "unserved_frac":
        return "no number of instances helps: no pool accepts the longest requests"
    if name == "utilization":
        return f"no number of instances{of} worth having carries the load"
    limit = limit_quantity(name)
    nearest = f", these windows need {limit.amount(value)}" if not _endless(value) else ""
    return f"no number of instances keeps the budget of {limit.amount(asked)} ({limit.title}){nearest}"


def _up(seconds: float) -> float:
    """So that a limit of what is said can be held: up by 0.1 ms at most, or by as many digits as are shown."""
    step = MS * 10.0 ** (floor(log10(max(seconds, 1e-9) / MS)) - 3)
    return ceil(seconds / step - 1e-9) * step


def repair_in_full(plan: Mapping[str, Any]) -> str:
    """What mends a plan, what that takes, and what else would: sentences."""
    repair = plan.get("repair")
    if not repair:
        return ""
    if repair["instances_added"] is None:
        return f"{sentence(repair_said(plan))}. What would help: {_else(plan)}."
    added, whole = repair["added"], repair["metrics"]
    said = f"{sentence(change_said(repair['instances_added']))}: {takes_said(added)} more; {takes_said(whole)} in all."
    if repair["binding"]:
        said += f" That breaks the budget: {_breaks_budget(repair).split(': ', 1)[1]}. Fewer may do with other windows"
        said += " and engines: fleetopt optimize."
    return f"{said} fleetopt evaluate with --repair --out grown.json writes that plan."


def _else(plan: Mapping[str, Any]) -> str:
    """What would help where no number of instances does."""
    looser = [each["limit"] for each in plan["repair"]["unmended"]]
    limit = "a looser limit (slo in the plan), or " if set(LATENCIES) & set(looser) else ""
    limit = limit or ("a larger budget, or " if {"window_tokens", "unserved_frac"}.isdisjoint(looser) else "")
    said = f"{limit}fleetopt optimize, which may choose other windows and engines"
    beside = plan.get("one_pool")
    if not beside:
        return said
    best = f"{beside['n_instances']:,} x {instance_said(beside, ' ')}"
    return f"{said}; one pool of {best} holds the latencies of this traffic"


def takes_said(taken: Mapping[str, float]) -> str:
    """'96 GPUs, 57.6 kW and $386 an hour'; what is less with its sign."""
    gpus, usd = taken["n_gpus"], taken["usd_per_h"]
    dollars = f"{'-' if usd < 0 else ''}${abs(usd):,.0f} an hour"
    return f"{gpus:,.0f} GPU{'s' if gpus != 1 else ''}, {QUANTITIES['power_w'].amount(taken['power_w'])} and {dollars}"


def repaired_said(plan: Mapping[str, Any]) -> str:
    """Of a plan that was grown: what was added, and why."""
    done = plan["repaired"]
    before = {**plan, "broken": done["broken"], "pools": _before(plan)}
    said = f"{sentence(change_said(done['instances_added'], ('added', 'took')))}: {takes_said(done['added'])} more."
    return f"{said} Without, {failing_said(before)}."


def _before(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pools with the instances that they had."""
    return [
        {**pool, "n_instances": pool["n_instances"] - added}
        for pool, added in zip(plan["pools"], plan["repaired"]["instances_added"], strict=True)
    ]
