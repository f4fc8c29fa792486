"""Services that share a budget as one self-contained page, of the document of `fleetopt services`."""

from collections.abc import Mapping, Sequence
from typing import Any

from fleetopt_jax.report.failures import reserve_said
from fleetopt_jax.report.html import as_text, decision_of, figure_of, list_of, page_of, repeat_of, section_of, table_of
from fleetopt_jax.report.services import (
    how_said,
    services_decision,
    services_figure,
    services_takeaway,
    traffic_cells,
    who_cells,
)
from fleetopt_jax.report.words import (
    QUANTITIES,
    choices_said,
    dispatch_said,
    edge,
    goal_of,
    instances_said,
    latency,
    limit_quantity,
    limits_said,
    number,
    percent,
    rests_on,
    sentence,
    site_said,
    stages_of,
    without_engines,
)

Document = Mapping[str, Any]
NOT_SAID = (
    "The arrival rates and the lengths of every service are taken to stay as they are: no daily swing, no growth.",
    "Services do not borrow GPUs from one another: each has its own, all the time.",
    "Networks, disks and schedulers other than continuous batching are left out.",
    "The best of the candidates named above, under these laws: another law may have another best.",
    "No intervals, and not simulated: fleetopt services --plans writes the plan of each service, of which fleetopt "
    "sensitivity and fleetopt simulate tell.",
)
NO_SPARE = "All instances are taken to be up: there is no spare for failures."


def services_page(document: Document, commands: Sequence[str] = ()) -> str:
    """The page as HTML; `commands` are the lines that made it."""
    search = document["search"]
    body = [
        decision_of(services_decision(document)),
        section_of("Who gets what", *_who(document)),
        section_of("What they share", _gpus(document), *_limits(document)),
        section_of("Figures", figure_of("services", "GPUs and power by service", services_figure(document))),
        section_of("How sure", f"<p>{as_text(how_said(document))}</p>", _engines(document)),
        section_of("What is assumed", *_assumed(document)),
        section_of(
            "What this does not say", list_of([*NOT_SAID, reserve_said(document["services"][0]["plan"]) or NO_SPARE])
        ),
        repeat_of(
            [*commands] or ["fleetopt report SERVICES.json"],
            [f"{search['n_evaluated']:,} pools evaluated in {search['wall_s']:.1f} s", *_digests(document)],
        ),
    ]
    names = ", ".join(each["name"] for each in document["services"])
    return page_of(services_takeaway(document), names, f"{names}: each with its own traffic and promises", body)


def _who(document: Document) -> list[str]:
    tables = table_of("The services", *who_cells(document)), table_of("Their traffic", *traffic_cells(document))
    note = "Limits in brackets; a dash: no limit. Pools: requests of up to so many tokens, in instances x GPUs of each."
    more = "Carries more: requests on top of its own before a limit of the service breaks, its GPUs as they are."
    return [*tables, f"<p>{as_text(f'{note} {more}')}</p>", _pools(document)]


def _pools(document: Document) -> str:
    rows = [
        [
            f"{each['name']}, pool {k}" if len(each["plan"]["pools"]) > 1 else each["name"],
            edge(pool),
            instances_said(pool),
            f"{pool['llm']} in {pool['precision']}",
            percent(pool["traffic_frac"], 1),
            percent(pool["utilization"]),
            latency(pool["ttft_p99_s"]),
            latency(pool["itl_s"]),
        ]
        for each in document["services"]
        for k, pool in enumerate(each["plan"]["pools"], 1)
    ]
    head = ["", "requests up to", "instances", "LLM", "share", "load", "P99 TTFT", "mean ITL"]
    return table_of("What each pool is", head, rows)


def _gpus(document: Document) -> str:
    """By kind of GPU: what there is, what is used, bought, and worth."""
    goal, quantity = goal_of(document["objective"]), QUANTITIES.get(document["cost"])
    unit = quantity.unit if quantity else goal.quantity.unit
    size = quantity.si if quantity else 1.0
    steps = sorted({more["n_gpus"] for each in document["gpus"] for more in each["worth"]})
    rows = []
    for each in document["gpus"]:
        worth = {more["n_gpus"]: f"{more['saved'] / size:,.4g}" for more in each["worth"]}
        dearer = each["buy_usd_per_gpu_h"]
        rows.append(
            [
                each["gpu"].upper(),
                "-" if each["stock"] is None else f"{each['stock']:,.0f}",
                f"{each['used']:,}",
                f"{each['bought']:,}",
                f"{each['may_buy']:,.0f}",
                f"${each['usd_per_gpu_h']:,.2f}",
                "-" if dearer is None else f"${dearer:,.2f}",
                *(worth.get(n, "-") for n in steps),
            ]
        )
    head = ["GPU", "in stock", "used", "bought", "may buy", "USD/h", "if bought"]
    title = f"GPUs by kind, and what more of them would save [{unit}]" if steps else "GPUs by kind"
    return table_of(title, [*head, *(f"{n:,} more" for n in steps)], rows)


def _limits(document: Document) -> list[str]:
    names = [each["name"] for each in document["services"]]
    rows = []
    for each in document["limits"]:
        of = limit_quantity(each["limit"])
        amounts = [of.amount(each["by_service"].get(name, 0.0)) for name in names]
        rows.append([of.title, of.amount(each["with_bought"]), of.amount(each["used"]), *amounts])
    return [table_of("Limits of all together", ["limit", "at most", "used", *names], rows)] if rows else []


def _engines(document: Document) -> str:
    rows, seen = [], set()
    for each in document["services"]:
        for pool in each["plan"]["pools"]:
            for stage in stages_of(pool):
                name = f"{stage['gpu'].upper()}, {pool['llm']}, {pool['precision']}, TP {stage['tp']}"
                if name in seen:
                    continue
                seen.add(name)
                errors = [stage[f"engine_{of}_error"] for of in ("step", "power", "prefill")]
                said = ["nobody knows" if error is None else f"{percent(error)} on average" for error in errors]
                rows.append([name, sentence(rests_on(stage)), *said])
    head = ["engine", "its coefficients rest on", "error of the step", "of the power", "of the prefill"]
    return table_of("How well the engines are known", head, rows)


def _assumed(document: Document) -> list[str]:
    said = []
    for each in document["services"]:
        plan, ends = each["plan"], each["end_to_end_s"]
        of = plan["workload"]
        batch = each["class"] == "batch"
        limits = f"an answer within {latency(ends)}" if batch else f"P99 TTFT {limits_said(plan['slo'])}"
        whole = f", an answer within {latency(ends)}" if ends is not None and not batch else ""
        load = percent(plan["slo"]["max_utilization"])
        lengths = f"{number(of['mean_prompt_tokens'])} tokens in and {number(of['mean_output_tokens'])} out"
        said.append(
            f"{each['name']}: {of['name']} at {each['rate_per_s']:,.6g} requests a second, on average {lengths}; "
            f"{limits}{whole}, load at most {load}."
        )
    first = document["services"][0]["plan"]
    site = site_said({**first, "metrics": document["metrics"]})
    texts = [*choices_said(without_engines(first)), dispatch_said(first)]
    said += [f"{sentence(text.rstrip('.'))}." for text in texts if text]
    said += [site or "Only GPU boards are counted: no host, no cooling."]
    return [f"<p>Preset <code>{as_text(document['assume'])}</code>. In words:</p>", list_of(said)]


def _digests(document: Document) -> list[str]:
    workloads = {each["plan"]["workload"]["name"]: each["plan"]["workload"] for each in document["services"]}
    return [f"{name} has digest {of['digest']}" for name, of in workloads.items() if of["digest"]]
