"""Rich tables for the terminal. Each takes the same JSON document that `--json` prints."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleetopt_jax.core.units import GIB, KW, MS, TB, TFLOP

PIPED_WIDTH = 120  # columns, where there is no terminal to ask


def show(renderable: RenderableType) -> None:
    """Print to stdout; plain text when it is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(renderable)


def plan_table(plan: dict[str, Any]) -> RenderableType:
    """What to buy, where to split, what it saves; then the pools; then what it rests on."""
    if plan["metrics"] is None:
        return Text(f"No fleet holds the limits ({plan['search']['n_evaluated']:,} candidates).")
    metrics = plan["metrics"]
    pools = plan["pools"]
    table = new_table("Pool", *(str(number) for number in range(1, len(pools) + 1)))
    table.add_row("requests up to", *(_edge(pool) for pool in pools))
    table.add_row("window", *(f"{pool['window_tokens']:,} tokens" for pool in pools))
    table.add_row("instances", *(f"{pool['n_instances']:,} x {pool['tp']} {pool['gpu'].upper()}" for pool in pools))
    table.add_row("max_num_seqs", *(f"{pool['max_num_seqs']:,}" for pool in pools))
    if any(pool["clock_frac"] < 1 for pool in pools):
        table.add_row("clock", *(f"{pool['clock_frac']:.0%} of the top" for pool in pools))
    table.add_row("share of requests", *(f"{pool['traffic_frac']:.2%}" for pool in pools))
    table.add_row("load", *(_percent(pool["utilization"]) for pool in pools))
    if plan["assumptions"]["prefill"] == "compute":
        table.add_row("time in prefill", *(_percent(pool["prefill_frac"]) for pool in pools))
    table.add_row("in flight per instance", *(f"{pool['n_active']:,.0f}" for pool in pools))
    table.add_row("power", *(f"{pool['power_w'] / KW:,.1f} kW" for pool in pools))
    table.add_row("tokens per joule", *(f"{pool['tok_per_j']:.3g}" for pool in pools))
    table.add_row("P99 TTFT", *(_ms(pool["ttft_p99_s"]) for pool in pools))
    table.add_row("mean ITL", *(_ms(pool["itl_s"]) for pool in pools))
    if plan["assumptions"]["tail"] == "quantile":
        table.add_row("P99 ITL", *(_ms(pool["itl_p99_s"]) for pool in pools))
    facts = (
        f"{metrics['output_tok_per_s']:,.0f} output tok/s, {metrics['power_w'] / KW:,.1f} kW, "
        f"${metrics['usd_per_h']:,.0f}/h, P99 TTFT {_ms(metrics['ttft_p99_s'])} "
        f"(limit {_limit(plan['slo'])})."
    )
    return Group(_answer(plan), table, facts, Text(_how(plan), style="dim"))


def _answer(plan: dict[str, Any]) -> RenderableType:
    """The decision, a line each."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column()
    for name, text in decision(plan).items():
        lines.add_row(name, text)
    return lines


def decision(plan: dict[str, Any]) -> dict[str, str]:
    """What a plan with metrics says, in the order a planner asks."""
    metrics, workload, pools = plan["metrics"], plan["workload"], plan["pools"]
    gain = metrics["gain_vs_homogeneous"]
    counts: dict[str, int] = {}
    for pool in pools:
        counts[pool["gpu"]] = counts.get(pool["gpu"], 0) + pool["n_gpus"]
    gpus = " + ".join(f"{count:,} {gpu.upper()}" for gpu, count in counts.items())
    edges = ", ".join(_edge(pool) for pool in pools[:-1])
    saves = "no one-pool fleet holds the limits" if gain is None else _saved(gain, plan)
    return {
        "Buy": f"{gpus} in {len(pools)} pool{'s' if len(pools) > 1 else ''}, for {workload['name']} at "
        f"{workload['arrival_rate_per_s']:,.6g} requests/s",
        "Split": f"at {edges} of prompt and output together" if edges else "nowhere: one pool takes all requests",
        "Gain": f"{metrics['tok_per_j']:.3g} tokens per joule, {saves}",
        "Limited by": _tightest(plan),
        "Sure": _sure(plan),
    }


def _tightest(plan: dict[str, Any]) -> str:
    """The limit that is used up most, and by which pool."""
    slo, pools = plan["slo"], plan["pools"]
    used: list[tuple[float, str]] = []
    for number, pool in enumerate(pools, 1):
        of = f" of pool {number}" if len(pools) > 1 else ""
        asked = [("utilization", "load", "max_utilization", _percent), ("itl_s", "mean ITL", "itl_s", _ms)]
        if not slo["ttft_s_per_token"] and slo["scope"] == "pool":
            asked.append(("ttft_p99_s", "P99 TTFT", "ttft_p99_s", _ms))
        for key, name, limit, said in asked:
            if slo[limit] is not None and pool[key] is not None:
                used.append((pool[key] / slo[limit], f"{name}{of}: {said(pool[key])} of at most {said(slo[limit])}"))
    if not used:
        return "nothing: it is overloaded"
    share, text = max(used)
    return text if share > 0.5 else f"whole instances ({text})"


def _sure(plan: dict[str, Any]) -> str:
    """How it was found, and how far the engines can be trusted."""
    found = {
        "optimal": "proved the best of all candidates",
        "feasible": "the best found",
        "infeasible": "breaks its limits",
    }[plan["status"]]
    errors = [pool["engine_step_error"] for pool in plan["pools"]]
    trust = "engines of unknown error" if None in errors else f"engines +-{max(errors):.0%} in the step"
    return f"{found}; {trust}"


def _saved(gain: float, plan: dict[str, Any]) -> str:
    """The gain over one pool, and a plain word where splitting is not worth its trouble."""
    times = f"{gain:.{3 if gain < 1.1 else 2}f}x the best one-pool fleet"
    if gain < 0.9995:
        why = "which the budget rules out" if plan["budget"] else f"for what is sought is {SOUGHT[plan['objective']]}"
        return f"{times}, {why}"
    return times + (": splitting by length hardly pays here" if len(plan["pools"]) > 1 and gain < HARDLY else "")


SOUGHT = {
    "tok_per_j": "tokens per joule",
    "usd": "the lowest cost",
    "power": "the lowest power",
    "gpus": "the fewest GPUs",
}
HARDLY = 1.02  # gains below this are within what whole instances and the engines' errors decide


def _limit(slo: dict[str, Any]) -> str:
    grows = f" + {slo['ttft_s_per_token'] * 1000 / MS:g} ms per 1,000 prompt tokens" if slo["ttft_s_per_token"] else ""
    itl = f", mean ITL {_ms(slo['itl_s'])}" if slo["itl_s"] is not None else ""
    held = ", of all requests together" if slo["scope"] == "fleet" else ""
    return f"{_ms(slo['ttft_p99_s'])}{grows}{itl}{held}"


def _edge(pool: dict[str, Any]) -> str:
    compressed = f" (gamma {pool['gamma']:g})" if pool["gamma"] > 1 else ""
    return f"{pool['gamma'] * pool['window_tokens']:,.0f} tokens{compressed}"


def _how(plan: dict[str, Any]) -> str:
    found = {
        "optimal": "the best of all candidates",
        "feasible": "the best found",
        "infeasible": "breaks its limits",
    }[plan["status"]]
    tried = f" ({plan['search']['n_evaluated']:,} evaluated in {plan['search']['wall_s']:.1f} s)"
    choices = [CHOICES_SAID[name][value] for name, value in plan["assumptions"].items() if name in CHOICES_SAID]
    said = "; ".join(text.format(share=plan["output_share"]) for text in choices)
    lines = [
        f"Method {plan['method']}: {found}{tried}.",
        *_certificate(plan),
        f"Assumptions '{plan['assume']}': {said}.",
    ]
    return "\n".join([*lines, *filter(None, (_trust(plan), _site(plan)))])


def _certificate(plan: dict[str, Any]) -> list[str]:
    """What the answer is the best of, how far the best could be, and what fewer pools reach."""
    search = plan["search"]
    parts = [f"Candidates: {search['candidates']}"]
    if search["gap"]:
        parts.append(f"at most {search['gap']:.2%} from the best of them")
    reached = [value for value in search["by_pools"] if value is not None]
    if len(reached) > 1:
        unit = {"tok_per_j": "tokens per joule", "usd": "USD/h", "power": "W", "gpus": "GPUs"}[plan["objective"]]
        values = ", ".join(_or_dash(value, "{:,.4g}") for value in search["by_pools"])
        parts.append(f"with at most 1 to {len(search['by_pools'])} pools {values} {unit}")
    return ["; ".join(parts) + "."]


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


def _trust(plan: dict[str, Any]) -> str:
    """How far the engines can be trusted, once each."""
    seen = {(pool["gpu"], pool["llm"], pool["tp"], pool["precision"]): pool for pool in plan["pools"]}
    parts = []
    for (gpu, llm, tp, precision), pool in seen.items():
        errors = [
            f"{name} +-{pool[key]:.0%}"
            for name, key in (("step", "engine_step_error"), ("power", "engine_power_error"))
            if pool[key] is not None
        ]
        known = f" ({', '.join(errors)})" if errors else ""
        parts.append(f"{tp} x {gpu.upper()} {llm} {precision}: {pool['engine_quality']}{known}")
    return f"Engines: {'; '.join(parts)}." if parts else ""


def _site(plan: dict[str, Any]) -> str:
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


def ledger_table(document: dict[str, Any]) -> RenderableType:
    """Row by row from the published system to the physical one."""
    title = f"{document['workload']['name']} at {document['workload']['arrival_rate_per_s']:,.6g} requests/s, "
    title += f"{document['llm']} on {document['tp']} x {document['gpu'].upper()} (output tokens per joule)"
    table = new_table("Choice", "From", "To", "One pool", "Two pools", "FleetOpt", "Gain", "Split at", title=title)
    for row in document["rows"]:
        window, gamma = row["short_window_tokens"], row["gamma"]
        split = "-" if window is None else f"{window:,}" + (f" x {gamma:g}" if gamma and gamma > 1 else "")
        table.add_row(
            row["choice"],
            row["from"] or "",
            row["to"] or "",
            *(
                _or_dash(row[name], "{:.4g}")
                for name in ("tok_per_j_homogeneous", "tok_per_j_two_pool", "tok_per_j_fleetopt")
            ),
            _or_dash(row["gain"], "{:.3f}x"),
            split,
        )
    first, last = document["rows"][0], document["rows"][-1]
    if last["gain"] is None:
        answer = "With all choices physical no fleet holds the limits: see fleetopt optimize for what is reachable."
    else:
        alone = last["tok_per_j_two_pool"] / last["tok_per_j_homogeneous"]
        answer = (
            f"Published gain {first['gain']:.2f}x; physical {last['gain']:.2f}x, "
            f"of which splitting by length alone is {alone:.3f}x."
        )
    note = "FleetOpt: two pools, gamma searched; 'Split at' its short window x gamma. -: no fleet holds the limits."
    return Group(Text(answer, style="bold"), table, Text(note, style="dim"))


def engine_table(document: dict[str, Any]) -> RenderableType:
    """One engine at several batches."""
    title = f"{document['llm']} ({document['precision']}) on {document['tp']} x {document['gpu'].upper()}"
    table = new_table(
        "Batch", "Context", "Decode step", "Step", "Output", "Power a GPU", "Tokens per joule", title=title
    )
    for point in document["points"]:
        table.add_row(
            f"{point['batch']:g}",
            f"{point['context_tokens']:,.0f}",
            _ms(point["decode_step_s"]),
            _ms(point["step_s"]),
            f"{point['tok_per_s']:,.0f} tok/s",
            f"{point['power_w_per_gpu']:,.0f} W",
            f"{point['tok_per_j']:.3f}",
        )
    errors = [
        f"{name} +-{document[key]:.1%}"
        for name, key in (("step", "relative_error"), ("power", "power_relative_error"))
        if document[key] is not None
    ]
    facts = (
        f"KV cache {document['kv_capacity_tokens']:,.0f} tokens; prefill {_ms(document['prefill_s_per_1k_tokens'])} "
        f"per 1,000 tokens at {document['prefill_power_w_per_gpu']:,.0f} W a GPU. 'Step' holds the prefill of "
        f"{document['prompt_per_output']:.2g} prompt tokens for each output token."
    )
    trust = f"Quality: {document['quality']} ({', '.join(errors)}). {document['source']}."
    return Group(table, Text(facts), Text(trust, style="dim"))


def reproduction_table(document: dict[str, Any]) -> RenderableType:
    """Published, reproduced and exact, cell by cell."""
    parts: list[RenderableType] = []
    for number, cells in document["tables"].items():
        table = new_table("Row", "Quantity", "Published", "Reproduced", "Exact", "", title=f"Table {number}")
        for cell in cells:
            table.add_row(
                cell["row"],
                cell["column"],
                f"{cell['published']:g}",
                f"{cell['reproduced']:g}",
                f"{cell['exact']:.6g}",
                _mark(cell["published"] == cell["reproduced"]),
            )
        parts.append(table)
    if document["ratio_details"]:
        table = new_table("Ratio (Azure)", "Published", "Reproduced", "Exact", "From", "", title="Headline ratios")
        for ratio in document["ratio_details"]:
            table.add_row(
                ratio["name"],
                f"{ratio['published']:.2f}",
                f"{ratio['reproduced']:.2f}",
                f"{ratio['exact']:.4f}",
                ratio["how"],
                _mark(ratio["published"] == ratio["reproduced"]),
            )
        parts.append(table)
    parts.append(
        "Reproduced: rounded as printed. Exact: in full; for table 3 the integral over all lengths instead of the "
        "paper's 3,000 draws."
    )
    parts.append(Text(f"{document['mismatches']} mismatches", style="bold"))
    return Group(*parts)


def trace_table(document: dict[str, Any]) -> RenderableType:
    """What is in a workload."""
    table = new_table("Quantity", "Value", title=document["name"])
    count = document["n_requests"]
    rows = [
        ("requests", "- (a CDF)" if count is None else f"{count:,}"),
        ("mean prompt", f"{document['mean_prompt_tokens']:,.1f} tokens"),
        ("mean output", f"{document['mean_output_tokens']:,.1f} tokens"),
        *(
            (f"total length, p{100 * float(q):g}", f"{x:,.0f} tokens")
            for q, x in document["quantiles"]["total_tokens"].items()
        ),
        ("longest", f"{document['longest_tokens']:,} tokens"),
        ("planned rate", _or_dash(document["arrival_rate_per_s"], "{:,.6g} requests/s")),
        ("recorded rate", _or_dash(document["recorded_rate_per_s"], "{:,.6g} requests/s")),
        ("arrival SCV (1 = Poisson)", _or_dash(document["arrival_scv"], "{:.3g}")),
        ("atoms", f"{document['n_atoms']:,}"),
    ]
    for row in rows:
        table.add_row(*row)
    parts: list[RenderableType] = [table]
    if document.get("source"):
        parts.append(Text(f"{document['source']}; {document['licence']}", style="dim"))
    if document.get("compression_error"):
        worst = document["compression_error"]
        parts.append(
            Text(
                f"Compression error: mean {worst['mean']:.1e}, variance {worst['variance']:.1e}, "
                f"fleet tok/J {worst['fleet_tok_per_j']:.1e} (relative).",
                style="dim",
            )
        )
    return Group(*parts)


def catalog_tables(document: dict[str, Any]) -> RenderableType:
    """The asked parts of the catalog."""
    makers = {"gpus": _gpus, "llms": _llms, "engines": _engines, "workloads": _workloads}
    parts: list[RenderableType] = []
    for part, entries in document.items():
        parts.append(makers[part](entries))
        parts += [Text(f"  {name}: {entry['source']}", style="dim") for name, entry in entries.items()]
    return Group(*parts)


def schemas_table(document: dict[str, Any]) -> RenderableType:
    """What files are read, and how to get the schema of each."""
    table = new_table("File", "Quantity", title="Files that are read")
    for name, schema in document["schemas"].items():
        table.add_row(name, schema.get("description", schema.get("title", "")).splitlines()[0])
    return Group(table, Text("fleetopt catalog schemas --json prints the JSON Schemas.", style="dim"))


def _gpus(entries: dict[str, Any]) -> Table:
    table = new_table("GPU", "Memory", "Bandwidth", "16-bit peak", "TDP", "Price", title="GPUs")
    for name, gpu in entries.items():
        table.add_row(
            name,
            f"{gpu['memory_bytes'] / GIB:.0f} GiB",
            f"{gpu['bandwidth_bytes_per_s'] / TB:.2f} TB/s",
            f"{gpu['peak_flop_per_s'] / TFLOP:,.0f} TFLOP/s",
            f"{gpu['tdp_w']:.0f} W",
            f"${gpu['usd_per_h']:.2f}/h",
        )
    return table


def _llms(entries: dict[str, Any]) -> Table:
    table = new_table("LLM", "Parameters", "Active", "Layers", "Weights", "Precision", "KV cache", title="LLMs")
    for name, llm in entries.items():
        table.add_row(
            name,
            f"{llm['n_params'] / 1e9:.1f} B",
            f"{llm['n_active_params'] / 1e9:.1f} B",
            f"{llm['n_layers']:.0f}",
            f"{llm['weight_bytes'] / GIB:.0f} GiB",
            llm["precision"],
            f"{llm['kv_bytes_per_token']:,.0f} B/token",
        )
    return table


def _engines(entries: dict[str, Any]) -> Table:
    table = new_table("Engine", "Quality", "Step at batch 0", "Step error", "Power error", title="Engines (measured)")
    for name, engine in entries.items():
        table.add_row(
            name,
            engine["quality"],
            _or_dash(engine["base_s"] and engine["base_s"] / MS, "{:.2f} ms"),
            f"{engine['step_error']:.1%}",
            f"{engine['power_error']:.1%}",
        )
    return table


def _workloads(entries: dict[str, Any]) -> Table:
    table = new_table("Workload", "Title", "Requests", "Licence", title="Workloads")
    for name, about in entries.items():
        count = about["summary"]["n_requests"] if "summary" in about else None
        table.add_row(name, about["title"], f"{count:,}" if count else "-", about["licence"])
    return table


def new_table(*columns: str, title: str | None = None) -> Table:
    """The one style of all tables: the first column and texts to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        text = i == 0 or column in ("Quantity", "Title", "From", "Licence", "Quality", "Value")
        table.add_column(column, justify="left" if text else "right", no_wrap=i == 0)
    return table


def _mark(ok: bool) -> Text:
    return Text("ok", style="green") if ok else Text("MISS", style="bold red")


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "never (overload)"
    return f"{seconds:,.4g} s" if seconds >= 10.0 else f"{seconds / MS:,.4g} ms"


def _percent(share: float | None) -> str:
    return "overload" if share is None else f"{share:.0%}"


def _or_dash(value: float | None, template: str) -> str:
    return "-" if value is None else template.format(value)
