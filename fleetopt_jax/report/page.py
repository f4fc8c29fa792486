"""A plan as one self-contained page: the decision first, then what it rests on. No scripts, nothing from the network.

Built of the JSON documents that `--json` prints. Whatever a user typed is escaped, in the figures too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from fleetopt_jax.calibrate.measurements import Measurements
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import MS
from fleetopt_jax.report.decision import decision, gpus_said
from fleetopt_jax.report.failures import reserve_said
from fleetopt_jax.report.html import as_text, decision_of, figure_of, list_of, page_of, repeat_of, section_of, table_of
from fleetopt_jax.report.ledger import TITLES, ledger_figure, walk_of
from fleetopt_jax.report.pareto import front_figure
from fleetopt_jax.report.pool_map import pool_map_figure
from fleetopt_jax.report.power import Curve, power_figure
from fleetopt_jax.report.sensitivity import moves_said, one_more, tornado_figure, unbounded_said
from fleetopt_jax.report.simulation import SHOWN, agreement_figure, agreement_takeaway, reading_of
from fleetopt_jax.report.verdict import broken
from fleetopt_jax.report.words import (
    QUANTITIES,
    certificate,
    choices_said,
    dispatch_said,
    drafts_said,
    edge,
    goal_of,
    in_flight,
    instance_said,
    limit_quantity,
    limits_said,
    ms,
    number,
    percent,
    power_limit_said,
    rests_on,
    sentence,
    site_said,
    stages_of,
    ttft_limit_rows,
)

DOCUMENTS = {  # what each optional document must hold
    "sensitivity": ("elasticities", "intervals", "shadow_prices", "thresholds", "plan", "shown", "objective"),
    "simulate": ("metrics", "pools", "workload", "n_arrivals", "slo_held"),
    "ledger": ("rows", "workload", "gpu"),
    "pareto": ("points", "objectives", "hypervolume"),
}
NOT_ALIKE = (
    "What another threshold costs is left out: the simulation {did} this fleet, and fleets of "
    "other thresholds would be sized by the laws alone."
)
INTEGRATION_SAID = "every length of the workload counts, none is drawn at random"


def report_page(
    plan: Mapping[str, Any],
    total_tokens: ArrayLike,
    weight: ArrayLike,
    *,
    curves: Sequence[Curve] | None = None,
    measured: Measurements | None = None,
    sensitivity: Mapping[str, Any] | None = None,
    simulation: Mapping[str, Any] | None = None,
    ledger: Mapping[str, Any] | None = None,
    front: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
) -> str:
    """The page as HTML. `plan` is the document of `optimize` or `evaluate`, lengths [tokens] and weights those of its
    workload, `curves` from `pool_curves`, the others the documents of `sensitivity`, `simulate`, `ledger` and
    `pareto`; `commands` are the lines that made them."""
    _require(plan, sensitivity=sensitivity, simulate=simulation, ledger=ledger, pareto=front)
    if plan.get("verified") and simulation is None:
        simulation = {**plan["verified"], "workload": plan["workload"]}
    if plan["metrics"] is None:
        return _page(f"No fleet holds the limits of {plan['workload']['name']}", _no_fleet(plan), plan, commands)
    figures: list[tuple[str, str, Figure]] = [
        (
            "map",
            "Which requests go to which pool, and what each pool takes",
            pool_map_figure(plan, total_tokens, weight),
        )
    ]
    if curves is not None:
        figures.append(("power", "Where each pool runs on its engine", power_figure(plan, curves, measured)))
    if sensitivity:
        figures.append(("tornado", "What moves the answer", tornado_figure(sensitivity)))
    if simulation:
        figures.append(("agreement", "The laws against a simulation", agreement_figure(simulation)))
    if ledger:
        figures.append(("ledger", TITLES[walk_of(ledger)], ledger_figure(ledger)))
    if front and front["points"]:
        figures.append(("front", "What can be had together", front_figure(front)))
    body = [
        _decision(plan, sensitivity, simulation),
        section_of("The pools", _pools(plan)),
        section_of("Figures", *(figure_of(*each) for each in figures)),
        section_of("How sure", *_how_sure(plan, sensitivity, simulation)),
        section_of("What is assumed", *_assumed(plan)),
        section_of("What this does not say", *_limits(plan, sensitivity, simulation)),
    ]
    return _page(_headline(plan), body, plan, commands)


def _require(plan: Mapping[str, Any], **documents: Mapping[str, Any] | None) -> None:
    """Refuse a document of another command or of another fleet."""
    for name, document in documents.items():
        if document is None:
            continue
        missing = [key for key in DOCUMENTS[name] if key not in document]
        if missing:
            raise BadInput(f"{name} document", f"has no {missing[0]}", f"need what fleetopt {name} --json prints")
    for name, under in (("sensitivity", "plan"), ("simulate", None)):
        document = documents[name]
        about = document[under] if document and under else document
        if about and _fleet(about["pools"]) != _fleet(plan["pools"]):
            raise BadInput(f"{name} document", "is of another fleet", "need the one of this plan")


def _fleet(pools: Sequence[Mapping[str, Any]]) -> list[tuple]:
    return [tuple(pool[name] for name in ("window_tokens", "gpu", "llm", "tp", "n_instances")) for pool in pools]


# --- what it says -----------------------------------------------------------------------------------------------------


def _headline(plan: Mapping[str, Any]) -> str:
    n = len(plan["pools"])
    said = "fails its limits" if plan.get("binding") else f"{plan['metrics']['tok_per_j']:#.3g} tokens per joule"
    return f"{gpus_said(plan)} in {n} pool{'s' if n > 1 else ''}: {said}"


def _decision(plan: Mapping[str, Any], sensitivity, simulation) -> str:
    rows = decision(plan, sensitivity)
    if simulation:
        held = "the limits hold in simulation" if simulation["slo_held"] else "the limits do not hold in simulation"
        if simulation.get("verdict") == "unclear":
            held += " in the mean, but it is too noisy or too short to tell"
        held = f"Verified: {held}" if simulation.get("held") else sentence(held)
        rows["How sure"] += f" {held}; {agreement_takeaway(simulation)}."
    return decision_of(rows)


def _pools(plan: Mapping[str, Any]) -> str:
    pools = plan["pools"]
    rows: list[tuple[str, list[str]]] = [
        ("requests up to", [edge(pool) for pool in pools]),
        ("window", [f"{pool['window_tokens']:,} tokens" for pool in pools]),
        ("instances", [f"{pool['n_instances']:,} x {instance_said(pool, ' ')}" for pool in pools]),
        ("GPUs", [f"{pool['n_gpus']:,}" for pool in pools]),
        ("max_num_seqs", [f"{pool['max_num_seqs']:,}" for pool in pools]),
        ("share of requests", [percent(pool["traffic_frac"], 2) for pool in pools]),
        ("load", [percent(pool["utilization"]) for pool in pools]),
        ("time in prefill", [percent(pool["prefill_frac"]) for pool in pools]),
        ("in flight per instance", [in_flight(pool["n_active"]) for pool in pools]),
        ("power", [QUANTITIES["power_w"].amount(pool["power_w"]) for pool in pools]),
        ("tokens per joule", [f"{pool['tok_per_j']:#.3g}" for pool in pools]),
        ("P99 TTFT", [ms(pool["ttft_p99_s"]) for pool in pools]),
        *ttft_limit_rows(plan),
        ("mean ITL", [ms(pool["itl_s"]) for pool in pools]),
        ("P99 ITL", [ms(pool["itl_p99_s"]) for pool in pools]),
    ]
    if any(pool["clock_frac"] < 1 for pool in pools):
        rows.insert(5, ("clock", [f"{percent(pool['clock_frac'])} of the top" for pool in pools]))
    if any(each.get("power_limit_w") for pool in pools for each in stages_of(pool)):
        rows.insert(5, ("power limit of a GPU", [power_limit_said(pool) for pool in pools]))
    if any(pool.get("speculate") for pool in pools):
        rows.insert(5, ("drafts an iteration", [drafts_said(pool) for pool in pools]))
    head = ["", *(f"pool {k}" for k in range(1, len(pools) + 1))]
    return table_of("What each pool is", head, [[name, *cells] for name, cells in rows])


def _how_sure(plan: Mapping[str, Any], sensitivity, simulation) -> list[str]:
    found = [f"<p>{as_text(certificate(plan))}</p>", _engines(plan)]
    if sensitivity:
        found += [_intervals(sensitivity), _prices(sensitivity)]
        if added := (plan.get("verified") or {}).get("instances_added"):
            n = f"{abs(added):,} instance{'s' if abs(added) > 1 else ''}"
            did = f"added {n} to" if added > 0 else f"freed {n} of"
            found.append(f"<p>{as_text(NOT_ALIKE.format(did=did))}</p>")
        elif sensitivity["thresholds"]:
            found.append(_thresholds(sensitivity))
    if simulation:
        found.append(_simulated(simulation))
    return found


def _engines(plan: Mapping[str, Any]) -> str:
    rows = []
    for k, pool in enumerate(plan["pools"], 1):
        name = f"{instance_said(pool)}, {pool['llm']}, {pool['precision']}, KV {pool['kv_precision']}"
        errors = [_error(pool.get(f"engine_{of}_error")) for of in ("step", "power", "prefill")]
        rows.append([f"pool {k}", name, sentence(rests_on(pool)), *errors])
    head = ["", "engine", "its coefficients rest on", "error of the step", "of the power", "of the prefill"]
    return table_of("How well the engines are known", head, rows)


def _error(error: float | None) -> str:
    return "nobody knows" if error is None else f"{percent(error)} on average"


def _intervals(sensitivity: Mapping[str, Any]) -> str:
    intervals = sensitivity["intervals"]
    rows = []
    for name, of in intervals["metrics"].items():
        shown = QUANTITIES[name]
        ends = [" to ".join(number(end, shown.si) for end in of[how]) for how in ("sampled", "linear")]
        rows.append([f"{shown.title} [{shown.unit}]", number(of["value"], shown.si), *ends])
    title = f"{percent(intervals['level'])} intervals, from {intervals['n_samples']:,} draws of the engines' errors"
    notes = "".join(f"<p>{as_text(said)}</p>" for said in unbounded_said(intervals))
    return table_of(title, ["metric", "value", "sampled", "linear"], rows) + notes


def _prices(sensitivity: Mapping[str, Any]) -> str:
    objective = goal_of(sensitivity["objective"]).quantity
    rows = []
    for price in sensitivity["shadow_prices"]:
        limit = limit_quantity(price["limit"])
        elasticity = "-" if price["elasticity"] is None else f"{price['elasticity']:+.3f}"
        binds = "yes" if price["binds"] else "no"
        rows.append([limit.title, limit.amount(price["asked"]), binds, one_more(price, objective), elasticity])
    head = ["limit", "asked", "binds", f"one more unit [{objective.unit}]", "% per %"]
    return table_of("What the limits cost (shadow prices)", head, rows)


def _thresholds(sensitivity: Mapping[str, Any]) -> str:
    rows = [[f"{of['window_tokens']:,.0f} tokens", moves_said(of["moves"])] for of in sensitivity["thresholds"]]
    title = goal_of(sensitivity["objective"]).quantity.title
    return table_of("What another threshold costs, the fleet sized anew", ["threshold", title], rows)


def _simulated(simulation: Mapping[str, Any]) -> str:
    rows = []
    for name, (label, pattern, unit) in SHOWN.items():
        each = simulation["metrics"].get(name)
        if each is None or each["simulated"] is None:
            continue
        shown = [None if x is None else pattern.format(x / unit) for x in (each["analytic"], *each["ci95"])]
        agrees = {"unclear": "cannot tell"}.get(reading_of(each), reading_of(each))
        interval = "-" if shown[1] is None or shown[2] is None else f"{shown[1]} to {shown[2]}"
        analytic = shown[0] if shown[0] and reading_of(each) else "-"
        rows.append([label, analytic, pattern.format(each["simulated"] / unit), interval, agrees])
    title = f"Every iteration of {simulation['n_arrivals']:,} requests simulated, beside the laws"
    return table_of(title, ["metric", "laws", "simulated", "95 % interval", ""], rows)


def _assumed(plan: Mapping[str, Any]) -> list[str]:
    workload = plan["workload"]
    said = [
        f"requests: {workload['name']} at {workload['arrival_rate_per_s']:,.6g} a second, on average "
        f"{number(workload['mean_prompt_tokens'])} tokens in and {number(workload['mean_output_tokens'])} out",
        f"limits: P99 TTFT {limits_said(plan['slo'])}, load at most {percent(plan['slo']['max_utilization'])}",
        INTEGRATION_SAID,
        *choices_said(plan),
        dispatch_said(plan),
        _compressed(plan),
        site_said(plan) or "only GPU boards are counted: no host, no cooling, no price of electricity",
    ]
    items = [f"{sentence(text.rstrip('.'))}." for text in said if text]
    return [f"<p>Preset <code>{as_text(plan['assume'])}</code>. In words:</p>", list_of(items)]


def _compressed(plan: Mapping[str, Any]) -> str:
    if all(pool["gamma"] <= 1 for pool in plan["pools"]):
        return "no prompt is compressed"
    of = plan["compressor"]
    return (
        f"compression succeeds with {percent(of['success_frac'])} of the prompts and takes "
        f"{of['s_per_token'] * 1000 / MS:,.4g} ms and {of['j_per_token'] * 1000:,.4g} J per 1,000 tokens"
    )


def _limits(plan: Mapping[str, Any], sensitivity, simulation) -> list[str]:
    said = [
        "The arrival rate and the lengths are taken to stay as they are"
        + (": no daily swing, " if plan["workload"].get("at", "mean") == "mean" else " in the hour planned for: ")
        + "no growth.",
        reserve_said(plan) or "All instances are taken to be up: there is no spare for failures.",
        "Clients are taken to ask for as many tokens as said, however many they then get."
        if (plan.get("route_by") or {}).get("name") == "prompt_and_limit"
        else "Every request is known by its total length when it is routed; a router that must guess the output does "
        "worse.",
        "Networks, disks and schedulers other than continuous batching are left out.",
        "The best of the candidates named above, under these laws: another law may have another best.",
    ]
    if any(pool["engine_quality"] in ("projected", "roofline", "scaled") for pool in plan["pools"]):
        said.append("At least one engine is projected, not measured on its GPU: measure it before you buy.")
    if plan["power_scope"] == "one_gpu_per_instance":
        said.append("Power counts one GPU of each instance, as the paper does: it is not what a meter reads.")
    if not sensitivity:
        said.append("No intervals: run fleetopt sensitivity for what the engines' errors do to the answer.")
    if not simulation:
        said.append("Not simulated: run fleetopt simulate to check the laws against every iteration.")
    elif not simulation["slo_held"] and "held" in simulation:
        said.append("In simulation no fleet of these thresholds that was tried holds its limits.")
    elif not simulation["slo_held"]:
        said.append(
            "In simulation this fleet does not hold its limits: fleetopt optimize --verify finds one that does."
        )
    return [list_of(said)]


def _no_fleet(plan: Mapping[str, Any]) -> list[str]:
    binding = plan.get("binding")
    why = f" {sentence(broken(binding, plan['slo']['ttft_s_per_token']))}." if binding else ""
    said = f"Of {plan['search']['n_evaluated']:,} candidates none holds the limits.{why}"
    return [
        f'<section id="decision"><h2>The decision</h2><p>{as_text(said)}</p></section>',
        section_of("What is assumed", *_assumed(plan)),
    ]


def _repeat(plan: Mapping[str, Any], commands: Sequence[str]) -> str:
    search, workload = plan["search"], plan["workload"]
    facts = [f"method {plan['method']}"]
    facts.append(f"{search['n_evaluated']:,} candidates evaluated in {search['wall_s']:.1f} s")
    digest = next((workload[name] for name in ("sha256", "digest") if workload.get(name)), None)
    if digest:
        facts.append(f"workload digest {digest}")
    return repeat_of([*commands] or ["fleetopt evaluate PLAN.json"], facts)


def _page(title: str, body: Sequence[str], plan: Mapping[str, Any], commands: Sequence[str]) -> str:
    workload = plan["workload"]
    rate = f"{workload['arrival_rate_per_s']:,.6g} requests a second"
    about = f"{workload['name']} at {rate}, P99 TTFT {limits_said(plan['slo'])}"
    return page_of(title, workload["name"], about, [*body, _repeat(plan, commands)])
