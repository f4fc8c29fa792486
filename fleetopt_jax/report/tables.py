"""Rich tables for the terminal. Each takes the same JSON document that `--json` prints."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fleetopt_jax.core.units import GIB, KW, MS, TB, TFLOP
from fleetopt_jax.report.decision import decision
from fleetopt_jax.report.words import (
    certificate,
    choices_said,
    edge,
    in_flight,
    limits_said,
    ms,
    or_dash,
    percent,
    site_said,
)

PIPED_WIDTH = 120  # columns, where there is no terminal to ask
WIDEST = 1000  # columns a table may ask for
GAP = 3  # columns between two cells


def show(renderable: RenderableType) -> None:
    """Print to stdout; plain text when it is not a terminal. No number is cut to fit: rather are lines too long."""
    console = Console(markup=False, highlight=False, emoji=False)  # names are the user's
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    wide = console.options.update(max_width=WIDEST)
    for table in _tables(renderable):
        for column in table.columns:
            sizes = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
            column.min_width = max(size.maximum if column.no_wrap else size.minimum for size in sizes)
        widths = [column.min_width or 0 for column in table.columns]
        console.width = max(console.width, sum(width + GAP for width in widths) + GAP)
    console.print(renderable)


def _tables(renderable: RenderableType) -> list[Table]:
    parts = renderable.renderables if isinstance(renderable, Group) else [renderable]
    return [part for part in parts if isinstance(part, Table)]


def plan_table(plan: Mapping[str, Any]) -> RenderableType:
    """What to buy, where to split, what it saves; then the pools; then what it rests on."""
    if plan["metrics"] is None:
        return Text(f"No fleet holds the limits ({plan['search']['n_evaluated']:,} candidates).")
    metrics = plan["metrics"]
    pools = plan["pools"]
    table = new_table("Pool", *(str(number) for number in range(1, len(pools) + 1)))
    table.add_row("requests up to", *(edge(pool) for pool in pools))
    table.add_row("window", *(f"{pool['window_tokens']:,} tokens" for pool in pools))
    table.add_row("instances", *(f"{pool['n_instances']:,} x {pool['tp']} {pool['gpu'].upper()}" for pool in pools))
    table.add_row("max_num_seqs", *(f"{pool['max_num_seqs']:,}" for pool in pools))
    if any(pool["clock_frac"] < 1 for pool in pools):
        table.add_row("clock", *(f"{pool['clock_frac']:.0%} of the top" for pool in pools))
    table.add_row("share of requests", *(f"{pool['traffic_frac']:.2%}" for pool in pools))
    table.add_row("load", *(percent(pool["utilization"]) for pool in pools))
    if plan["assumptions"]["prefill"] != "free_chunks":
        table.add_row("time in prefill", *(percent(pool["prefill_frac"]) for pool in pools))
    table.add_row("in flight per instance", *(in_flight(pool["n_active"]) for pool in pools))
    table.add_row("power", *(f"{pool['power_w'] / KW:,.1f} kW" for pool in pools))
    table.add_row("tokens per joule", *(f"{pool['tok_per_j']:#.3g}" for pool in pools))
    table.add_row("P99 TTFT", *(ms(pool["ttft_p99_s"]) for pool in pools))
    table.add_row("mean ITL", *(ms(pool["itl_s"]) for pool in pools))
    if plan["assumptions"]["tail"] != "mean_prefill":
        table.add_row("P99 ITL", *(ms(pool["itl_p99_s"]) for pool in pools))
    facts = (
        f"{metrics['output_tok_per_s']:,.0f} output tok/s, {metrics['power_w'] / KW:,.1f} kW, "
        f"${metrics['usd_per_h']:,.0f}/h, P99 TTFT {ms(metrics['ttft_p99_s'])} "
        f"(limit {limits_said(plan['slo'])})."
    )
    return Group(_answer(plan), table, facts, Text(_how(plan), style="dim"))


def _answer(plan: Mapping[str, Any]) -> RenderableType:
    """The decision, a line each."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column()
    for name, text in decision(plan).items():
        lines.add_row(name, text)
    return lines


def _how(plan: Mapping[str, Any]) -> str:
    found = {
        "optimal": "the best of all candidates",
        "feasible": "the best found",
        "infeasible": "breaks its limits",
    }[plan["status"]]
    tried = f" ({plan['search']['n_evaluated']:,} evaluated in {plan['search']['wall_s']:.1f} s)"
    lines = [
        f"Method {plan['method']}: {found}{tried}.",
        certificate(plan),
        f"Assumptions '{plan['assume']}': {'; '.join(choices_said(plan))}.",
    ]
    return "\n".join([*lines, *filter(None, (_trust(plan), site_said(plan)))])


def _trust(plan: Mapping[str, Any]) -> str:
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


def ledger_table(document: Mapping[str, Any]) -> RenderableType:
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
                or_dash(row[name], "{:.4g}")
                for name in ("tok_per_j_homogeneous", "tok_per_j_two_pool", "tok_per_j_fleetopt")
            ),
            or_dash(row["gain"], "{:.3f}x"),
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


def engine_table(document: Mapping[str, Any]) -> RenderableType:
    """One engine at several batches."""
    title = f"{document['llm']} ({document['precision']}) on {document['tp']} x {document['gpu'].upper()}"
    table = new_table(
        "Batch", "Context", "Decode step", "Step", "Output", "Power a GPU", "Tokens per joule", title=title
    )
    for point in document["points"]:
        table.add_row(
            f"{point['batch']:g}",
            f"{point['context_tokens']:,.0f}",
            ms(point["decode_step_s"]),
            ms(point["step_s"]),
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
        f"KV cache {document['kv_capacity_tokens']:,.0f} tokens; prefill {ms(document['prefill_s_per_1k_tokens'])} "
        f"per 1,000 tokens at {document['prefill_power_w_per_gpu']:,.0f} W a GPU. 'Step' holds the prefill of "
        f"{document['prompt_per_output']:.2g} prompt tokens for each output token."
    )
    trust = f"Quality: {document['quality']} ({', '.join(errors)}). {document['source']}."
    return Group(table, Text(facts), Text(trust, style="dim"))


def reproduction_table(document: Mapping[str, Any]) -> RenderableType:
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


def trace_table(document: Mapping[str, Any]) -> RenderableType:
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
        ("planned rate", or_dash(document["arrival_rate_per_s"], "{:,.6g} requests/s")),
        ("recorded rate", or_dash(document["recorded_rate_per_s"], "{:,.6g} requests/s")),
        ("arrival SCV (1 = Poisson)", or_dash(document["arrival_scv"], "{:.3g}")),
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


def catalog_tables(document: Mapping[str, Any]) -> RenderableType:
    """The asked parts of the catalog."""
    makers = {"gpus": _gpus, "llms": _llms, "engines": _engines, "workloads": _workloads}
    parts: list[RenderableType] = []
    for part, entries in document.items():
        parts.append(makers[part](entries))
        parts += [Text(f"  {name}: {entry['source']}", style="dim") for name, entry in entries.items()]
    return Group(*parts)


def schemas_table(document: Mapping[str, Any]) -> RenderableType:
    """What files are read, and how to get the schema of each."""
    table = new_table("File", "Quantity", title="Files that are read")
    for name, schema in document["schemas"].items():
        table.add_row(name, schema.get("description", schema.get("title", "")).splitlines()[0])
    return Group(table, Text("fleetopt catalog schemas --json prints the JSON Schemas.", style="dim"))


def _gpus(entries: Mapping[str, Any]) -> Table:
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


def _llms(entries: Mapping[str, Any]) -> Table:
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


def _engines(entries: Mapping[str, Any]) -> Table:
    table = new_table("Engine", "Quality", "Step at batch 0", "Step error", "Power error", title="Engines (measured)")
    for name, engine in entries.items():
        table.add_row(
            name,
            engine["quality"],
            or_dash(engine["base_s"] and engine["base_s"] / MS, "{:.2f} ms"),
            f"{engine['step_error']:.1%}",
            f"{engine['power_error']:.1%}",
        )
    return table


def _workloads(entries: Mapping[str, Any]) -> Table:
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
