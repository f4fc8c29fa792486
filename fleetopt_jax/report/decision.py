"""What a plan says: what to buy, where to split, what it saves, what limits it, how sure."""

import math
from collections.abc import Mapping
from typing import Any

from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.fleet.resources import limited_resource
from fleetopt_jax.report.failures import failures_said
from fleetopt_jax.report.rates import planned_for
from fleetopt_jax.report.verdict import broken, failing_said, is_overloaded, repair_in_full, repaired_said, takes_said
from fleetopt_jax.report.words import (
    HARDLY,
    QUANTITIES,
    chance,
    drafts_said,
    factor,
    goal_of,
    instance_said,
    instances_said,
    limit_quantity,
    listed,
    margin,
    ms,
    number,
    percent,
    pool_edges,
    routed_by,
    sentence,
    signed,
    stages_of,
)

NOTHING = 0.005  # of an elasticity: not worth a word
NEAR = 0.97  # of a limit: it is what stops the fleet from being smaller
UNSURE, SURE = 0.8, 0.9  # probability below which more is offered, and how much
NEXT = 0.9  # of a limit: it is near, though another one stops the fleet
NOTICED = 0.0005  # of USD, GPUs or energy: less is rounding
AN = "ahlr"  # GPUs of these letters are spoken with a vowel first
FULL = 0.9  # of the load: a batch as full as that is what the load is of


def decision(plan: Mapping[str, Any], sensitivity: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Question and answer, of a plan document with metrics; sharper with its sensitivity document."""
    sure = {"How sure": _sure(plan, sensitivity)} | _confidence(plan)
    if plan.get("binding"):
        said = {**_failing(plan), **planned_for(plan["workload"])}
        said |= {"This fleet": _buy(plan), "Split": _split(plan)} | _avoided(plan) | _drafts(plan) | sure
    else:
        said = {"Repaired": repaired_said(plan)} if plan.get("repaired") else {}
        said |= {**planned_for(plan["workload"]), "Buy": _buy(plan), "Split": _split(plan), "It saves": _saves(plan)}
        said |= _avoided(plan) | _drafts(plan)
        said |= {"What limits it": _limiting(plan, sensitivity)} | failures_said(plan) | sure
    warnings = [text.rstrip(".") + "." for text in plan.get("warnings", ())]  # begun by a name, perhaps
    return said | ({"Beware": " ".join(warnings)} if warnings else {})


def _failing(plan: Mapping[str, Any]) -> dict[str, str]:
    """What a plan that fails breaks, and what mends it: first of all that is said."""
    said = failing_said(plan) or f"the {broken(plan['binding'], plan['slo']['ttft_s_per_token'])}"
    fails = f"{sentence(said)}.{' Requests wait ever longer.' if is_overloaded(plan) else ''}"
    repair = repair_in_full(plan)
    return {"It fails": fails} | ({"Repair": repair} if repair else {})


def _buy(plan: Mapping[str, Any]) -> str:
    parts = [instances_said(pool) for pool in plan["pools"]]
    llms = ", ".join(dict.fromkeys(f"{pool['llm']} in {pool['precision']}" for pool in plan["pools"]))
    metrics = plan["metrics"]
    scope = " (counting the power of one GPU an instance)" if plan["power_scope"] == "one_gpu_per_instance" else ""
    rate = "" if plan.get("binding") else f"{metrics['tok_per_j']:#.3g} output tokens per joule{scope}, "
    return (
        f"{gpus_said(plan)}: {listed(parts)}, each instance running {llms}{_chosen_of(plan)}; "
        f"{rate}{_kw(metrics['power_w'])}{scope if not rate else ''}, "
        f"${metrics['usd_per_h']:,.0f} an hour{_prices(plan)}."
    )


def _drafts(plan: Mapping[str, Any]) -> dict[str, str]:
    """Which pools draft ahead, what they gain in an iteration, and where that stops paying."""
    drafting = [(k, pool, pool["speculate"]) for k, pool in enumerate(plan["pools"], 1) if pool.get("speculate")]
    if not drafting:
        return {}
    parts = [
        f"pool {k} drafts {drafts['k']} ahead ({drafts['head']}) and gains {drafts['tokens_per_step']:.3g} tokens an "
        f"iteration{'' if drafts['measured'] else ' (projected)'}, which pays {_pays(pool, drafts)}"
        for k, pool, drafts in drafting
    ]
    rest = len(plan["pools"]) - len(drafting)
    others = f"; {'the other pool drafts' if rest == 1 else f'the other {rest} pools draft'} nothing" if rest else ""
    tasks = listed(list(dict.fromkeys(drafts["task"] for _, _, drafts in drafting if drafts["task"])))
    assumed = f" Accepted as on: {tasks}; other traffic accepts other shares." if tasks else ""
    return {"Drafts": f"{sentence('; '.join(parts))}{others}.{assumed}"}


def _pays(pool: Mapping[str, Any], drafts: Mapping[str, Any]) -> str:
    """Up to which batch a token is faster with drafts, beside the batch that there is."""
    most = drafts["pays_up_to_seqs"]
    there = f"{pool['n_active']:,.3g} in flight an instance"
    if most >= pool["max_num_seqs"]:
        return f"in every batch up to max_num_seqs, with {there}"
    return f"up to {most:,.0f} sequences an instance, with {there}" if most >= 1 else f"in no batch, with {there}"


def _chosen_of(plan: Mapping[str, Any]) -> str:
    """How many engines were asked for, where not all are bought."""
    asked = plan["search"].get("n_engines", 1)
    served = [each for pool in plan["pools"] for each in stages_of(pool)]
    used = len({(each["gpu"], each["tp"], each["precision"], drafts_said(each)) for each in served})
    if used >= asked:
        return ""
    return f", the best of {asked} engines" if used == 1 else f", {used} of {asked} engines that were tried"


def _prices(plan: Mapping[str, Any]) -> str:
    """The prices of a GPU hour, and which are not the catalog's."""
    prices = {each["gpu"]: each.get("usd_per_gpu_h") for pool in plan["pools"] for each in stages_of(pool)}
    ours, own = [], []
    for gpu, price in prices.items():
        if price is not None and gpu in GPUS and math.isclose(price, GPUS[gpu].usd_per_h):
            ours.append(f"${price:,.2f} {'an' if gpu[0] in AN else 'a'} {gpu.upper()} hour")
        elif price is not None:
            own.append(f"{gpu.upper()} ${price:,.2f}")
    said = [f"at {listed(ours)}"] * bool(ours) + [f"at your prices ({listed(own)} a GPU hour)"] * bool(own)
    return f" {listed(said)}" if said else ""


def _kw(power_w: float) -> str:
    return QUANTITIES["power_w"].amount(power_w)


def _split(plan: Mapping[str, Any]) -> str:
    pools, edges = plan["pools"], pool_edges(plan)
    if len(pools) == 1:
        return f"Do not: one pool takes every request, up to {edges[0]:,.0f} tokens."
    said = f"By {routed_by(plan)}, at {listed([f'{edge:,.0f}' for edge in edges[:-1]])} tokens"
    shrunk = [f"{pool['window_tokens']:,}" for pool in pools if pool["gamma"] > 1]
    return f"{said}; prompts above {listed(shrunk)} tokens are shrunk to fit." if shrunk else f"{said}."


def _avoided(plan: Mapping[str, Any]) -> dict[str, str]:
    """What a prefix cache spares: not a comparison with a fleet that has none, which would be another one."""
    avoided = plan.get("prefill_avoided")
    if not avoided:
        return {}
    how = "as assumed" if plan["prefix_cache"]["name"] == "constant" else "by the law of its KV memory"
    return {
        "Prefill avoided": f"{percent(avoided['prompt_frac'])} of the prompt tokens are found in the prefix cache, "
        f"{how}; computing them would take {avoided['instances']:,.3g} instances' time, at "
        f"{_kw(avoided['power_w'])} of their GPUs."
    }


def _saves(plan: Mapping[str, Any]) -> str:
    """What is less than the best one-pool fleet takes, and what is more: energy a token, USD, GPUs."""
    beside, gain = plan.get("one_pool"), plan["metrics"]["gain_vs_homogeneous"]
    if not beside:
        if gain is None:
            return "There is no one-pool fleet within the limits to compare with."
        return f"{factor(gain)} the tokens per joule of the best one-pool fleet{_why_worse(plan, gain)}."
    best = f"the {_BEST_BY.get(_name_of(plan), 'best')} one-pool fleet"
    best += " of instances that prefill and decode" if plan.get("serve") else ""
    best += f" ({beside['n_instances']:,} x {instance_said(beside, ' ')}"
    best += ", which breaks the budget)" if _breaks_budget(plan, beside) else ")"
    best += f" that holds with {percent(plan['confidence']['asked'])} as well" if plan.get("confidence") else ""
    best += " that holds in as many scenarios" if plan.get("robust") else ""
    best += " sized for this traffic" if plan["method"] == "given" else ""
    changes = _changes(plan["metrics"], beside)
    rate, own = 1.0 / changes[0][0], {"usd": 1, "gpus": 2}.get(_name_of(plan), 0)
    ordered = sorted(changes, key=lambda each: each is not changes[min(own, len(changes) - 1)])  # the objective's first
    saved = [less for ratio, less, _ in ordered if ratio < 1.0 - NOTICED]
    lost = [more for ratio, _, more in ordered if ratio > 1.0 + NOTICED]
    if not saved and not lost:
        if len(plan["pools"]) == 1:
            return f"Nothing: this is {best}{_behind(plan, rate)}."
        same = "as many GPUs and as much money"
        return (
            f"Nothing: {factor(rate)} the tokens per joule of {best} for {same}. To split by length does not pay here."
        )
    if not saved:
        return f"Nothing: against {best} this {listed(lost)}{_why_worse(plan, rate)}."
    hardly = min(ratio for ratio, *_ in changes) > 1.0 / HARDLY
    said = f"{'Hardly anything: ' if hardly else ''}{listed(saved)}, against {best}"
    said += f"; but it {listed(lost)}{_why_worse(plan, rate)}" if lost else _behind(plan, rate)
    return f"{said}{'. Whole instances decide as much' if hardly else ''}."


def _name_of(plan: Mapping[str, Any]) -> str:
    return plan["objective"] if isinstance(plan["objective"], str) else ""


def _behind(plan: Mapping[str, Any], rate: float) -> str:
    """Of another one-pool fleet, where one has more tokens per joule than the best by the plan's own objective."""
    gain = plan["metrics"]["gain_vs_homogeneous"]
    if gain is None or gain > min(rate, 1.0) - NOTICED:
        return ""
    return f". One pool can have more tokens per joule: this is {factor(gain)} of the most{_why_worse(plan, gain)}"


_BEST_BY = {"usd": "cheapest", "gpus": "smallest", "co2": "cleanest"}  # of one-pool fleets, by the objective


def _changes(metrics: Mapping[str, Any], beside: Mapping[str, Any]) -> list[tuple[float, str, str]]:
    """(ratio, as less, as more after "it") of what a fleet takes to what another does: energy a token, USD, GPUs."""
    energy = beside["tok_per_j"] / metrics["tok_per_j"]
    watts = f"({_kw(metrics['power_w'])} instead of {_kw(beside['power_w'])})"
    rate = f"{factor(1.0 / energy)} the tokens per joule {watts}"
    found = [(energy, f"{percent(1.0 - energy)} of the energy, {rate}", f"has {rate}")]
    for field, takes, name, of in (
        ("usd_per_h", "costs", "an hour", "${:,.0f}"),
        ("n_gpus", "takes", "GPUs", "{:,.0f}"),
    ):
        mine, other = metrics[field], beside[field]
        by, instead = of.format(abs(mine - other)), f"({of.format(mine)} instead of {of.format(other)})"
        if other > 0:
            found.append((mine / other, f"{by} {name} {instead}", f"{takes} {by} {name} more {instead}"))
    return found


def _breaks_budget(plan: Mapping[str, Any], beside: Mapping[str, Any]) -> bool:
    used = {
        name: beside["n_gpus"] * (beside["gpu"] == name.removeprefix("gpus_of."))
        if name.startswith("gpus_of.")
        else beside[limited_resource(name)]
        for name in plan["budget"]
    }
    return any(used[name] > cap * (1.0 + NOTICED) for name, cap in plan["budget"].items())


def _why_worse(plan: Mapping[str, Any], gain: float) -> str:
    """Of fewer tokens per joule than one pool has: what else the plan was made for, if anything."""
    if gain > 1.0 - NOTICED:
        return ""
    of_energy = plan["objective"] == "tok_per_j"
    if plan["method"] == "given":
        return ". This fleet is as it was given: fleetopt optimize sizes one for this traffic"
    if of_energy and not plan["budget"]:
        return ". One pool would do better"
    if of_energy:
        return ", for this must keep its budget as well"
    return f", for this seeks the {goal_of(plan['objective']).best}"


def _limiting(plan: Mapping[str, Any], sensitivity) -> str:
    """What stops the fleet from being smaller: as a simulation has it, where one had the last word."""
    verified = plan.get("verified")
    if verified and (verified["instances_added"] or _moved(verified) or not verified["held"]):
        return _simulated(plan, verified)
    asked = _asked_share(plan)
    parts = [*([asked] if asked else _stops(plan)), *_budgets(plan)] or [_roomy(plan)]
    said = f"{sentence('; '.join(parts))}."
    if sensitivity:
        priced = [_priced(price, sensitivity["objective"]) for price in sensitivity["shadow_prices"] if price["binds"]]
        said += "".join(f" {sentence(text)}." for text in priced if text)
    return said


def _asked_share(plan: Mapping[str, Any]) -> str:
    """Of a fleet that was sized to hold in a share of what may come: that this is what it is so large for."""
    robust = plan.get("robust") and plan["robust"]["chosen"]["sized_for"]
    if plan.get("confidence"):
        least = f"the {percent(plan['confidence']['asked'])} with which it is to hold its limits"
    elif robust:
        least = f"the {percent(robust)} of the scenarios in which it is to hold its limits"
    else:
        return ""
    highest = plan["metrics"]["ttft_p99_s"]
    reached = "" if plan["slo"]["ttft_s_per_token"] else f"; as engines and laws stand its P99 TTFT is {ms(highest)}"
    return f"{least}, and with one instance fewer in any pool would not{reached}"


def _simulated(plan: Mapping[str, Any], verified: Mapping[str, Any]) -> str:
    """The nearest latency of a simulation that asked for another fleet than the laws do."""
    slo, differs = plan["slo"], _differs(verified)
    found = [each for each in verified["metrics"].items() if each[0] in ("ttft_p99_s", "itl_s") and slo[each[0]]]
    parts = [
        f"{QUANTITIES[name].title} {ms(each['simulated'])}, {margin(each['simulated'], slo[name])}"
        for name, each in found
        if name != "ttft_p99_s" or not slo["ttft_s_per_token"]
    ]
    if not verified["held"]:
        return f"In simulation the limits do not hold, even with {differs}: {', '.join(parts)}."
    return f"The simulation, whose latencies need {differs}: with them {', '.join(parts) or 'the limits hold'}."


def _moved(verified: Mapping[str, Any]) -> bool:
    """Whether the simulation chose another split than the laws do."""
    laws = verified.get("laws")
    return bool(laws) and laws["window_tokens"] != [pool["window_tokens"] for pool in verified["pools"]]


def _differs(verified: Mapping[str, Any]) -> str:
    """By what a fleet that a simulation chose differs from the laws' plan."""
    added = verified["instances_added"]
    if _moved(verified):
        laws = verified["laws"]
        n, now = len(laws["window_tokens"]), sum(pool["n_instances"] for pool in verified["pools"])
        pools = f"{n} pool{'s' if n != 1 else ''} of {sum(laws['n_instances']):,} instances together"
        return f"these {now:,} instances, where the laws ask for {pools}"
    less = "fewer" if added < 0 else "more"
    return f"{abs(added):,} instance{'s' if abs(added) != 1 else ''} {less} than the laws ask for"


def _roomy(plan: Mapping[str, Any]) -> str:
    """Of a fleet that was given: how far its limits are."""
    loads = [pool["utilization"] for pool in plan["pools"]]
    k = max(range(len(loads)), key=lambda each: loads[each])
    room = f"the busiest pool, {k + 1}, runs" if len(loads) > 1 else "the pool runs"
    return (
        f"none of its limits is near at this traffic: {room} at {percent(loads[k])} load, where "
        f"{percent(plan['slo']['max_utilization'])} is allowed, and the latencies are under theirs. Fewer instances "
        "may do for this traffic alone"
    )


def _stops(plan: Mapping[str, Any]) -> list[str]:
    """Which limit each pool would break with one instance fewer; of a fleet that was given, which are near."""
    slo, pools = plan["slo"], plan["pools"]
    cap, sized = slo["max_utilization"], plan["method"] != "given"
    by: dict[str, list[int]] = {}
    for k, pool in enumerate(pools):
        n, load = pool["n_instances"], pool["utilization"]
        if sized and pool.get("stages"):
            by.setdefault("stages", []).append(k)
        elif load is None or load >= NEAR * cap:
            by.setdefault("load", []).append(k)
        elif sized and n == 1:
            by.setdefault("alone", []).append(k)
        elif sized and load * n / (n - 1) > cap:
            by.setdefault("whole", []).append(k)
        elif name := _latency(slo, _judged(plan, pool), NEXT if sized else NEAR):
            by.setdefault(name, []).append(k)
        elif sized:
            by.setdefault("ttft_p99_s" if slo["itl_s"] is None else "some", []).append(k)
    parts = [_stop(plan, name, held) for name, held in by.items()]
    if sized and not {"ttft_p99_s", "itl_s", "some", "stages"} & set(by):
        k = max(range(len(pools)), key=lambda each: _nearness(slo, _judged(plan, pools[each])))
        name = _latency(slo, _judged(plan, pools[k]), NEXT)
        parts += [f"next is the {_latency_said(plan, name, [k])}"] if name else []
    return parts


def _stop(plan: Mapping[str, Any], name: str, held: list[int]) -> str:
    pools, cap = plan["pools"], percent(plan["slo"]["max_utilization"])
    who, one = _pools_said(held), len(held) == 1
    loads = listed([percent(pools[k]["utilization"]) for k in held])
    match name:
        case "load":
            they = "ies all the load it may" if one else "y all the load they may"
            return f"{who} carr{they} ({cap}); {_full(plan, held)}".rstrip("; ")
        case "whole":
            fewer = "with one instance fewer it" if one else "with one instance fewer each"
            return f"whole instances: {who} run{'s' if one else ''} at {loads} load, {fewer} would exceed {cap}"
        case "alone":
            return f"{who} {'is one instance' if one else 'are one instance each'}, the least there is"
        case "stages":
            shared = "whose two stages each hold their part of them, and with one instance fewer in either would not"
            return f"the limits of {who}, {shared}: {', '.join(_of_stages(pools[k]) for k in held)}"
        case "some":
            return f"the latencies of {who}, which one instance fewer would exceed"
    return f"the {_latency_said(plan, name, held)}"


def _of_stages(pool: Mapping[str, Any]) -> str:
    """How near a lane of two stages is to what its stages share out."""
    loads = listed([f"{each['role']} at {percent(each['utilization'])} load" for each in stages_of(pool)])
    return f"{loads}, P99 TTFT {ms(pool['ttft_p99_s'])}, mean ITL {ms(pool['itl_s'])}"


def _full(plan: Mapping[str, Any], held: list[int]) -> str:
    """What the load of the first of these pools is of: a full batch, or the time of its GPUs."""
    pool = plan["pools"][held[0]]
    load, n, most = pool["utilization"], pool["n_active"], pool["max_num_seqs"]
    if load is None or not most:
        return ""
    which = "" if len(held) == 1 else f" of pool {held[0] + 1}"
    if n >= FULL * load * most:
        by = "max_num_seqs" if pool.get("max_num_seqs_by") == "max_num_seqs" else "the KV cache"
        return f"full is the batch{which}: {by} allows {most:,} sequences an instance"
    prefill = f" (prefill takes {percent(pool['prefill_frac'])})" if pool["prefill_frac"] else ""
    return f"full is the GPUs' time{which}{prefill}, not the batch ({n:,.0f} of {most:,} sequences)"


def _pools_said(held: list[int]) -> str:
    return f"pool{'s' if len(held) > 1 else ''} {listed([str(k + 1) for k in held])}"


def _judged(plan: Mapping[str, Any], pool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Whose latencies are limited: the pool's, or those of all requests together."""
    return plan["metrics"] if plan["slo"]["scope"] == "fleet" else pool


def _latency(slo: Mapping[str, Any], judged: Mapping[str, Any], near: float) -> str | None:
    """The latency that is nearest to its limit, if it is as near as that."""
    shares = _shares(slo, judged)
    name = max(shares, key=lambda each: shares[each], default=None)
    return name if name and shares[name] >= near else None


def _nearness(slo: Mapping[str, Any], judged: Mapping[str, Any]) -> float:
    return max(_shares(slo, judged).values(), default=0.0)


def _shares(slo: Mapping[str, Any], judged: Mapping[str, Any]) -> dict[str, float]:
    """Latencies over their limits. Where the limit of the TTFT grows with the prompt, a plan does not say how near."""
    named = ("itl_s",) if slo["ttft_s_per_token"] else ("ttft_p99_s", "itl_s")
    return {name: (judged[name] or 0.0) / slo[name] for name in named if slo[name] is not None}


def _latency_said(plan: Mapping[str, Any], name: str, held: list[int]) -> str:
    slo, of = plan["slo"], QUANTITIES[name].title
    who = _pools_said(held)
    if name == "ttft_p99_s" and slo["ttft_s_per_token"]:
        return f"{of} of {who}, whose limit grows with the prompt"
    values = [_judged(plan, plan["pools"][k])[name] for k in held]
    if slo["scope"] == "fleet":
        who, values = "all requests together", values[:1]
    nearest = max(values, key=lambda each: math.inf if each is None else each)
    which = "the highest " if len(set(map(ms, values))) > 1 else ""
    said = listed([ms(each) for each in values])
    return f"{of} of {who}, {said}, {which}{margin(nearest, slo[name])} of {ms(slo[name])}"


def _budgets(plan: Mapping[str, Any]) -> list[str]:
    """Limits of the budget that are used up."""
    found = []
    for name, cap in plan["budget"].items():
        if cap > 0 and _used(plan, name) >= NEAR * cap:
            limit = limit_quantity(name)
            found.append(f"the budget of {limit.amount(cap)} is used ({limit.title})")
    return found


def _used(plan: Mapping[str, Any], limit: str) -> float:
    """What a plan uses of a limit of its budget."""
    if limit.startswith("gpus_of."):
        served = [each for pool in plan["pools"] for each in stages_of(pool)]
        return sum(each["n_gpus"] for each in served if each["gpu"] == limit.removeprefix("gpus_of."))
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
    parts = [_holds(plan, sensitivity), "As given; it holds its limits." if given else f"{said}."]
    if sensitivity:
        intervals = sensitivity["intervals"]
        low, high = (number(end) for end in intervals["metrics"]["tok_per_j"]["sampled"])
        within = f"({percent(intervals['level'])})"
        parts.append(f"With the engines' errors tokens per joule lie between {low} and {high} {within}.")
    return " ".join(filter(None, [*parts, doubts_said(plan)]))


def _holds(plan: Mapping[str, Any], sensitivity) -> str:
    """The probability that the limits hold; '' where nobody has drawn it."""
    holds = plan.get("holds") or (sensitivity and {"probability": sensitivity["intervals"]["hold_probability"]})
    if not holds:
        return ""
    by_pool = [f"pool {k} with {chance(each)}" for k, each in enumerate(holds.get("by_pool", ()), 1)]
    pools = f" ({listed(by_pool)})" if len(by_pool) > 1 else ""
    said = f"It holds its limits with {chance(holds['probability'])} probability under the errors of engines and laws"
    asked = not plan.get("binding") and not plan.get("confidence") and holds["probability"] < UNSURE
    searched = (plan.get("prefix_cache") or {}).get("name") != "working_set"  # else no plan is made for a probability
    more = f"; fleetopt optimize --confidence {SURE:g} plans for {percent(SURE)}" if asked and searched else ""
    return f"{said}{pools}{more}."


def _confidence(plan: Mapping[str, Any]) -> dict[str, str]:
    """What the confidence that was asked for costs."""
    found = plan.get("confidence")
    if not found:
        return {}
    nominal, costs = found["nominal"], found["costs"]
    taken = takes_said(costs)
    kept = f"{nominal['n_gpus']:,} GPUs would hold with {chance(nominal['probability'])}"
    as_if = ""
    if found["sigmas"]:
        as_if = f" That is about what it takes where engines and latencies are all {found['sigmas']:.3g} sigmas slower."
    said = f"{taken} more than the best plan with engines and laws as they stand, whose {kept}.{as_if}"
    return {f"{percent(found['asked'])} confidence costs": said}


def doubts_said(plan: Mapping[str, Any]) -> str:
    """The largest error of the engines' laws by what it does to the plan: of times by the share of the time, of watts
    in full."""
    found: dict[str, tuple[float, float, str]] = {}
    for k, pool in enumerate(plan["pools"], 1):
        counted = plan["assumptions"]["prefill"] != "free_chunks"
        prefill = (pool["prefill_frac"] or 0.0) if counted else 0.0
        where = f" in pool {k}" if len(plan["pools"]) > 1 else ""
        takes = f", and it takes {percent(prefill)} of the time{where}"
        prompts, tokens = stages_of(pool)[0], stages_of(pool)[-1]
        if pool.get("stages"):  # each does one thing all of its time
            prefill, takes = 0.5, f" in the stage of it{where}"
        for name, error, share, said in (
            ("prefill", prompts.get("engine_prefill_error"), prefill, takes),
            ("the decode step", tokens["engine_step_error"], 1.0 - prefill, ""),
            ("power", max((each["engine_power_error"] or 0.0) for each in (prompts, tokens)) or None, 1.0, ""),
        ):
            if error is not None and share > 0 and error * share > found.get(name, (0.0,))[0]:
                found[name] = (error * share, error, said)
    if not found:
        return "Nobody has stated how far the engines' laws are off."
    (first, (_, error, said)), *rest = sorted(found.items(), key=lambda each: -each[1][0])
    others = [f"{name} +-{percent(each[1])}" for name, each in rest]
    return f"The largest doubt is {first}: +-{percent(error)}{said}{'; ' if others else ''}{listed(others)}."


def gpus_said(plan: Mapping[str, Any]) -> str:
    counts: dict[str, int] = {}
    for each in [each for pool in plan["pools"] for each in stages_of(pool)]:
        counts[each["gpu"]] = counts.get(each["gpu"], 0) + each["n_gpus"]
    return " + ".join(f"{count:,} {gpu.upper()}" for gpu, count in counts.items())
