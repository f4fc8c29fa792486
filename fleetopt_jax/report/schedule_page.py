"""A day by three plans as one self-contained page, of the document of `fleetopt schedule`."""

from collections.abc import Mapping, Sequence
from typing import Any

from fleetopt_jax.report.failures import reserve_said
from fleetopt_jax.report.html import as_text, decision_of, figure_of, list_of, page_of, repeat_of, section_of, table_of
from fleetopt_jax.report.rates import per_s
from fleetopt_jax.report.schedule import (
    grows_said,
    growth_cells,
    plan_cells,
    schedule_decision,
    schedule_notes,
    span_said,
    time_cells,
)
from fleetopt_jax.report.schedule_figure import schedule_figure
from fleetopt_jax.report.words import (
    choices_said,
    dispatch_said,
    instance_said,
    limits_said,
    listed,
    number,
    percent,
    sentence,
    without_engines,
)

Document = Mapping[str, Any]
NOT_SAID = (
    "What is shorter than a period is not seen: bursts within it, and how fast a queue drains after one.",
    "The rates are taken to be known: a day that is busier than this one is not planned for.",
    "Networks, disks and schedulers other than continuous batching are left out.",
)
NO_SPARE = "All instances that are up are taken to serve: there is no spare for failures."


def schedule_page(document: Document, commands: Sequence[str] = ()) -> str:
    """The page as HTML; `commands` are the lines that made it."""
    profile, workload, plan = document["profile"], document["workload"], document["plans"]["scheduled"]
    saved = percent(document["saves"]["energy_kwh"], 1)
    title = f"{plan['n_gpus_owned']:,} GPUs, switched by the hours: {saved} of the energy saved"
    about = f"{workload['name']} at {per_s(profile['mean_rate_per_s'])} requests a second on average, over "
    about += f"{span_said(document['span_s'])} of {profile['name']}, P99 TTFT {limits_said(document['slo'])}"
    growth = document.get("growth")
    facts = [f"found in {document['search']['wall_s']:.1f} s"]
    facts += [f"workload digest {workload['digest']}"] if workload["digest"] else []
    body = [
        decision_of(schedule_decision(document)),
        section_of("The plans", table_of("Three plans side by side", *plan_cells(document)), _pools(document)),
        section_of("The hours", table_of("What is up when", *time_cells(document)), f"<p>{as_text(CARRIES)}</p>"),
        *([section_of("Growth", table_of(grows_said(document), *growth_cells(document)))] if growth else []),
        section_of("Figures", figure_of("day", "What is up over the day", schedule_figure(document))),
        section_of("How sure", list_of(schedule_notes(document))),
        section_of("What is assumed", *_assumed(document)),
        section_of("What this does not say", list_of([*NOT_SAID, reserve_said(document) or NO_SPARE])),
        repeat_of([*commands] or ["fleetopt report SCHEDULE.json"], facts),
    ]
    return page_of(title, workload["name"], about, body)


CARRIES = "Carries more: requests on top of those of the period before a limit breaks, with what is up then."


def _pools(document: Document) -> str:
    plan = document["plans"]["scheduled"]
    rows = [
        [
            f"pool {k}",
            f"{pool['gamma'] * pool['window_tokens']:,.0f} tokens",
            instance_said(pool, " "),
            f"{pool['llm']} in {pool['precision']}",
            f"{min(pool['n_instances']):,}",
            f"{max(pool['n_instances']):,}",
            f"{sum(pool['n_started']):,}",
        ]
        for k, pool in enumerate(plan["pools"], 1)
    ]
    head = ["", "requests up to", "an instance", "LLM", "least up", "most up", "starts"]
    return table_of("What each pool is", head, rows)


def _assumed(document: Document) -> list[str]:
    profile, of = document["profile"], document["workload"]
    source = f", from {profile['source']}" if profile["source"] else ""
    note = f" ({profile['note']})" if profile["note"] else ""
    said = [
        f"hours: {profile['name']}{note}{source}; {len(document['periods']):,} periods, the busiest at "
        f"{profile['peak_over_mean']:.3g} times the mean",
        f"requests: {of['name']}, on average {number(of['mean_prompt_tokens'])} tokens in and "
        f"{number(of['mean_output_tokens'])} out",
        f"limits: P99 TTFT {limits_said(document['slo'])}, load at most {percent(document['slo']['max_utilization'])}",
        *choices_said(without_engines(document)),
        dispatch_said(document),
        _electricity(document),
    ]
    items = [f"{sentence(text.rstrip('.'))}." for text in said if text]
    return [f"<p>Preset <code>{as_text(document['assume'])}</code>. In words:</p>", list_of(items)]


def _electricity(document: Document) -> str:
    """What is counted besides the boards, and what electricity costs and emits over the day."""
    site, parts = document["site"], []
    if site.get("host_w_per_gpu"):
        parts.append(f"{site['host_w_per_gpu']:g} W of host a GPU")
    if site.get("pue", 1.0) > 1.0:
        parts.append(f"PUE {site['pue']:g}")
    for name, unit in (("usd_per_kwh", "USD"), ("kg_co2_per_kwh", "kg CO2")):
        each = [period[name] for period in document["periods"]]
        low, high = min(each), max(each)
        if low or high:
            parts.append(f"electricity at {low:g}{f' to {high:g}' if high > low else ''} {unit}/kWh")
    return f"counted besides the boards: {listed(parts)}" if parts else "only GPU boards are counted, no electricity"
