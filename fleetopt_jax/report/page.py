"""A plan as one self-contained page: the decision first, then what it rests on. No scripts, nothing from the network.

Built of the JSON documents that `--json` prints. Whatever a user typed is escaped, in the figures too.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from fleetopt_jax import __version__
from fleetopt_jax.calibrate.measurements import Measurements
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import MS
from fleetopt_jax.report import style
from fleetopt_jax.report.decision import decision, gpus_said
from fleetopt_jax.report.failures import reserve_said
from fleetopt_jax.report.figures import ledger_figure
from fleetopt_jax.report.pareto import front_figure
from fleetopt_jax.report.pool_map import pool_map_figure
from fleetopt_jax.report.power import Curve, power_figure
from fleetopt_jax.report.sensitivity import moves_said, one_more, tornado_figure, unbounded_said
from fleetopt_jax.report.simulation import SHOWN, agreement_figure, agreement_takeaway, reading_of
from fleetopt_jax.report.svg import COLOURS, inline_svg
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
    rests_on,
    sentence,
    site_said,
    ttft_limit_rows,
)

DOCUMENTS = {  # what each optional document must hold
    "sensitivity": ("elasticities", "intervals", "shadow_prices", "thresholds", "plan", "shown", "objective"),
    "simulate": ("metrics", "pools", "workload", "n_arrivals", "slo_held"),
    "ledger": ("rows", "workload", "gpu"),
    "pareto": ("points", "objectives", "hypervolume"),
}
LONG_CELL = 30  # letters from which a cell of a table may wrap
SHORT_HEAD = 10  # letters of a row's head that never wrap
NARROW = 36  # letters of a row that a phone shows
NO_NUMBER = ("", "-", "not held", "unbounded", "unbounded (overload)", "never (overload)", "overload", "nobody knows")
SCROLLS = '<p class="hint" aria-hidden="true">Scroll sideways to see all of it &#8594;</p>'
NOTHING_FROM_OUTSIDE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
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
        figures.append(("ledger", "From the published system to the physical one", ledger_figure(ledger)))
    if front and front["points"]:
        figures.append(("front", "What can be had together", front_figure(front)))
    body = [
        _decision(plan, sensitivity, simulation),
        _section("The pools", _pools(plan)),
        _section("Figures", *(_figure(*each) for each in figures)),
        _section("How sure", *_how_sure(plan, sensitivity, simulation)),
        _section("What is assumed", *_assumed(plan)),
        _section("What this does not say", *_limits(plan, sensitivity, simulation)),
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
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{_text(said)}</dd></div>" for name, said in rows.items())
    return f'<section id="decision"><h2>The decision</h2><dl class="decision">{items}</dl></section>'


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
    if any(pool.get("speculate") for pool in pools):
        rows.insert(5, ("drafts an iteration", [drafts_said(pool) for pool in pools]))
    head = ["", *(f"pool {k}" for k in range(1, len(pools) + 1))]
    return _table("What each pool is", head, [[name, *cells] for name, cells in rows])


def _how_sure(plan: Mapping[str, Any], sensitivity, simulation) -> list[str]:
    found = [f"<p>{_text(certificate(plan))}</p>", _engines(plan)]
    if sensitivity:
        found += [_intervals(sensitivity), _prices(sensitivity)]
        if added := (plan.get("verified") or {}).get("instances_added"):
            n = f"{abs(added):,} instance{'s' if abs(added) > 1 else ''}"
            did = f"added {n} to" if added > 0 else f"freed {n} of"
            found.append(f"<p>{_text(NOT_ALIKE.format(did=did))}</p>")
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
    return _table("How well the engines are known", head, rows)


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
    notes = "".join(f"<p>{_text(said)}</p>" for said in unbounded_said(intervals))
    return _table(title, ["metric", "value", "sampled", "linear"], rows) + notes


def _prices(sensitivity: Mapping[str, Any]) -> str:
    objective = goal_of(sensitivity["objective"]).quantity
    rows = []
    for price in sensitivity["shadow_prices"]:
        limit = limit_quantity(price["limit"])
        elasticity = "-" if price["elasticity"] is None else f"{price['elasticity']:+.3f}"
        binds = "yes" if price["binds"] else "no"
        rows.append([limit.title, limit.amount(price["asked"]), binds, one_more(price, objective), elasticity])
    head = ["limit", "asked", "binds", f"one more unit [{objective.unit}]", "% per %"]
    return _table("What the limits cost (shadow prices)", head, rows)


def _thresholds(sensitivity: Mapping[str, Any]) -> str:
    rows = [[f"{of['window_tokens']:,.0f} tokens", moves_said(of["moves"])] for of in sensitivity["thresholds"]]
    title = goal_of(sensitivity["objective"]).quantity.title
    return _table("What another threshold costs, the fleet sized anew", ["threshold", title], rows)


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
    return _table(title, ["metric", "laws", "simulated", "95 % interval", ""], rows)


def _assumed(plan: Mapping[str, Any]) -> list[str]:
    workload = plan["workload"]
    said = [
        f"requests: {workload['name']} at {workload['arrival_rate_per_s']:,.6g} a second, on average "
        f"{workload['mean_prompt_tokens']:,.4g} tokens in and {workload['mean_output_tokens']:,.4g} out",
        f"limits: P99 TTFT {limits_said(plan['slo'])}, load at most {percent(plan['slo']['max_utilization'])}",
        INTEGRATION_SAID,
        *choices_said(plan),
        dispatch_said(plan),
        _compressed(plan),
        site_said(plan) or "only GPU boards are counted: no host, no cooling, no price of electricity",
    ]
    items = "".join(f"<li>{_text(sentence(text.rstrip('.')))}.</li>" for text in said if text)
    return [f"<p>Preset <code>{_text(plan['assume'])}</code>. In words:</p>", f"<ul>{items}</ul>"]


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
    return [f"<ul>{''.join(f'<li>{_text(text)}</li>' for text in said)}</ul>"]


def _no_fleet(plan: Mapping[str, Any]) -> list[str]:
    binding = plan.get("binding")
    why = f" {sentence(broken(binding, plan['slo']['ttft_s_per_token']))}." if binding else ""
    said = f"Of {plan['search']['n_evaluated']:,} candidates none holds the limits.{why}"
    return [
        f'<section id="decision"><h2>The decision</h2><p>{_text(said)}</p></section>',
        _section("What is assumed", *_assumed(plan)),
    ]


def _repeat(plan: Mapping[str, Any], commands: Sequence[str]) -> str:
    lines = [*commands] or ["fleetopt evaluate PLAN.json"]
    search, workload = plan["search"], plan["workload"]
    facts = [f"fleetopt_jax {__version__}", f"method {plan['method']}"]
    facts.append(f"{search['n_evaluated']:,} candidates evaluated in {search['wall_s']:.1f} s")
    digest = next((workload[name] for name in ("sha256", "digest") if workload.get(name)), None)
    if digest:
        facts.append(f"workload digest {digest}")
    code = "".join(f"<pre><code>{_text(line)}</code></pre>" for line in lines)
    return _section("How to repeat it", code, f"<p>{_text('; '.join(facts))}.</p>")


# --- how it is said ---------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    return escape(style.printable(text).replace(" %", "\u00a0%"))  # a number and its sign on one line


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column heads the rows, numbers to the right; it scrolls in its own box where the screen is
    narrow."""
    right = [False, *(_is_of_numbers([row[k] for row in rows]) for k in range(1, len(head)))]
    columns = "".join(
        f'<th scope="col"{_aligned(right[k])}>{_text(name)}</th>' if name else "<td></td>"
        for k, name in enumerate(head)
    )
    lines = "".join(
        f'<tr><th scope="row"{_wraps(row[0])}>{_text(row[0])}</th>{"".join(map(_cell, row[1:], right[1:]))}</tr>'
        for row in rows
    )
    widths = [max(len(row[k]) for row in (head, *rows)) + 2 for k in range(len(head))]
    letters = min(widths[0], NARROW // 2) + sum(widths[1:])  # the heads of rows wrap
    return (
        f'<h3>{_text(title)}</h3><div class="scroll" tabindex="0" role="region" aria-label="{_text(title)}">'
        f'<table aria-label="{_text(title)}"><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'
        f"{SCROLLS if letters > NARROW else ''}"
    )


def _is_of_numbers(cells: Sequence[str]) -> bool:
    """Whether a column is numbers, or what stands for one that there is not."""
    numbers = [re.match(r"[-+$]?[\d.]", cell) for cell in cells]
    short = all(len(cell) <= LONG_CELL for cell in cells)
    return short and any(numbers) and all(of or cell in NO_NUMBER for of, cell in zip(numbers, cells))


def _wraps(head: str) -> str:
    """Of a row's head that is long: it wraps on a phone, but not word by word."""
    return ' class="head"' if len(head) > SHORT_HEAD else ""


def _aligned(right: bool) -> str:
    return ' class="number"' if right else ""


def _cell(text: str, right: bool) -> str:
    kind = ' class="long"' if len(text) > LONG_CELL else _aligned(right)
    return f"<td{kind}>{_text(text)}</td>"


def _figure(key: str, title: str, figure: Figure) -> str:
    """The takeaway becomes the caption, which wraps, and with the title the text for who cannot see it."""
    takeaway = " ".join(figure.get_suptitle().split("\n"))
    figure.suptitle("")
    said = f"{title}. {takeaway.rstrip('.')}."
    return (
        f'<figure id="figure-{key}"><h3>{escape(title)}</h3><figcaption>{_text(takeaway)}</figcaption>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f"{inline_svg(figure, key, said)}</div>{SCROLLS}</figure>"
    )


def _page(title: str, body: Sequence[str], plan: Mapping[str, Any], commands: Sequence[str]) -> str:
    workload = plan["workload"]
    rate = f"{workload['arrival_rate_per_s']:,.6g} requests a second"
    about = f"{workload['name']} at {rate}, P99 TTFT {limits_said(plan['slo'])}"
    light, dark = ("".join(f"--{name}: {pair[i]}; " for name, *pair in COLOURS.values()) for i in (0, 1))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NOTHING_FROM_OUTSIDE}">\n'
        f"<title>{_text(title)} ({_text(workload['name'])})</title>\n"
        f"<style>\n:root {{ color-scheme: light dark; {light}}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n{CSS}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#decision">To the decision</a>\n'
        f"<header><h1>{_text(title)}</h1><p>{_text(about)}</p></header>\n<main>\n"
        f"{chr(10).join([*body, _repeat(plan, commands)])}\n</main>\n</body>\n</html>\n"
    )


CSS = """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
header, main { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
header p { margin-top: 0; color: var(--muted); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--grid); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .2rem; }
h1, h3, p, li, dd, dt, figcaption, code, .long { overflow-wrap: anywhere; }
.decision { margin: 0; }
.decision div { display: grid; grid-template-columns: 8.5rem 1fr; gap: .3rem 1rem; padding: .5rem 0;
  border-bottom: 1px solid var(--grid); }
dt { font-weight: 600; }
dd { margin: 0; }
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem; }
.hint { display: none; margin: -.9rem 0 1.2rem; color: var(--muted); font-size: .85rem; }
.scroll:focus-visible, a:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
.number { text-align: right; }
.long { white-space: normal; min-width: 15rem; }
th[scope=row] { font-weight: 400; color: var(--muted); }
figure { margin: 0 0 1.5rem; }
figure svg { display: block; width: 100%; min-width: 36rem; height: auto; font-family: system-ui, sans-serif; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
pre { margin: .5rem 0; padding: .6rem .8rem; border: 1px solid var(--grid); white-space: pre-wrap; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: .5rem; }
@media (max-width: 40rem) {
  .decision div { grid-template-columns: 1fr; gap: 0; }
  h1 { font-size: 1.35rem; }
  .hint { display: block; }
  .scroll:has(+ .hint) { border-right: 1px dashed var(--muted); }
  th[scope=row] { position: sticky; left: 0; background: var(--paper); }
  .head { min-width: 7rem; max-width: 9rem; white-space: normal; }
}
@media print {
  body { font-size: 10pt; }
  header, main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  figure svg { min-width: 0; max-width: 16cm !important; }
  figure, tr, .decision div { break-inside: avoid; }
  h2, h3, figcaption { break-after: avoid; }
  td, th { white-space: normal; }
  .long { min-width: 0; }
  .skip, .hint { display: none; }
}
"""
