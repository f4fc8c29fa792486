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
    metrics, workload = plan["metrics"], plan["workload"]
    gain = metrics["gain_vs_homogeneous"]
    counts: dict[str, int] = {}
    for pool in plan["pools"]:
        counts[pool["gpu"]] = counts.get(pool["gpu"], 0) + pool["n_gpus"]
    gpus = " + ".join(f"{count:,} {gpu.upper()}" for gpu, count in counts.items())
    saves = "no one-pool fleet holds the limits" if gain is None else f"{gain:.2f}x the best one-pool fleet"
    answer = Text.assemble(
        (f"{metrics['tok_per_j']:.2f} tokens per joule", "bold"),
        f" ({saves}): serve {workload['name']} at {workload['arrival_rate_per_s']:,.6g} requests/s with {gpus} "
        f"in {len(plan['pools'])} pool{'s' if len(plan['pools']) > 1 else ''}.",
    )
    pools = plan["pools"]
    table = _table("Pool", *(str(number) for number in range(1, len(pools) + 1)))
    table.add_row("requests up to", *(_edge(pool) for pool in pools))
    table.add_row("window", *(f"{pool['window_tokens']:,} tokens" for pool in pools))
    table.add_row("instances", *(f"{pool['n_instances']:,} x {pool['tp']} {pool['gpu'].upper()}" for pool in pools))
    table.add_row("max_num_seqs", *(f"{pool['max_num_seqs']:,}" for pool in pools))
    table.add_row("share of requests", *(f"{pool['traffic_frac']:.2%}" for pool in pools))
    table.add_row("slots busy", *(_percent(pool["utilization"]) for pool in pools))
    table.add_row("in flight per instance", *(f"{pool['n_active']:,.0f}" for pool in pools))
    table.add_row("power", *(f"{pool['power_w'] / KW:,.1f} kW" for pool in pools))
    table.add_row("tokens per joule", *(f"{pool['tok_per_j']:.2f}" for pool in pools))
    table.add_row("P99 TTFT", *(_ms(pool["ttft_p99_s"]) for pool in pools))
    table.add_row("mean ITL", *(_ms(pool["itl_s"]) for pool in pools))
    facts = (
        f"{metrics['output_tok_per_s']:,.0f} output tok/s, {metrics['power_w'] / KW:.1f} kW, "
        f"${metrics['usd_per_h']:,.0f}/h, P99 TTFT {_ms(metrics['ttft_p99_s'])} "
        f"(limit {_ms(plan['slo']['ttft_p99_s'])})."
    )
    return Group(answer, table, facts, Text(_how(plan), style="dim"))


def _edge(pool: dict[str, Any]) -> str:
    compressed = f" (gamma {pool['gamma']:g})" if pool["gamma"] > 1 else ""
    return f"{pool['gamma'] * pool['window_tokens']:,.0f} tokens{compressed}"


def _how(plan: dict[str, Any]) -> str:
    share = plan["output_share"]
    counted = (
        "one GPU of each instance" if plan["power_scope"] == "one_gpu_per_instance" else "all GPUs of each instance"
    )
    found = {
        "optimal": "the best of all candidates",
        "feasible": "the best found",
        "infeasible": "breaks its limits",
    }[plan["status"]]
    tried = f" ({plan['search']['n_evaluated']:,} evaluated in {plan['search']['wall_s']:.1f} s)"
    return (
        f"Method {plan['method']}: {found}{tried}.\n"
        f"Assumptions '{plan['assume']}': power counts {counted}; every request is {1 - share:.0%} prompt and "
        f"{share:.0%} output of its total length; every slot reserves its whole window; prefill rides along free."
    )


def reproduction_table(document: dict[str, Any]) -> RenderableType:
    """Published, reproduced and exact, cell by cell."""
    parts: list[RenderableType] = []
    for number, cells in document["tables"].items():
        table = _table("Row", "Quantity", "Published", "Reproduced", "Exact", "", title=f"Table {number}")
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
        table = _table("Ratio (Azure)", "Published", "Reproduced", "Exact", "From", "", title="Headline ratios")
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
    table = _table("Quantity", "Value", title=document["name"])
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


def _gpus(entries: dict[str, Any]) -> Table:
    table = _table("GPU", "Memory", "Bandwidth", "16-bit peak", "TDP", "Price", title="GPUs")
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
    table = _table("LLM", "Parameters", "Active", "Layers", "Weights", "KV cache", title="LLMs")
    for name, llm in entries.items():
        table.add_row(
            name,
            f"{llm['n_params'] / 1e9:.1f} B",
            f"{llm['n_active_params'] / 1e9:.1f} B",
            f"{llm['n_layers']:.0f}",
            f"{llm['n_params'] * llm['bytes_per_weight'] / GIB:.0f} GiB",
            f"{llm['kv_bytes_per_token']:,.0f} B/token",
        )
    return table


def _engines(entries: dict[str, Any]) -> Table:
    table = _table(
        "Engine",
        "W",
        "H at L_cal",
        "L_cal",
        "n_max at 8K",
        "Quality",
        title="Calibrated engines (any other GPU, LLM and TP: roofline law on the figures above)",
    )
    for name, engine in entries.items():
        table.add_row(
            name,
            f"{engine['base_s'] / MS:.3f} ms",
            f"{engine['per_seq_s'] / MS:.3f} ms",
            f"{engine['calibration_tokens']:,.0f}",
            f"{engine['n_max_8k']:.0f}",
            engine["quality"],
        )
    return table


def _workloads(entries: dict[str, Any]) -> Table:
    table = _table("Workload", "Title", "Requests", "Licence", title="Workloads")
    for name, about in entries.items():
        count = about["summary"]["n_requests"] if "summary" in about else None
        table.add_row(name, about["title"], f"{count:,}" if count else "-", about["licence"])
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        text = i == 0 or column in ("Quantity", "Title", "From", "Licence", "Quality", "Value")
        table.add_column(column, justify="left" if text else "right", no_wrap=i == 0)
    return table


def _mark(ok: bool) -> Text:
    return Text("ok", style="green") if ok else Text("MISS", style="bold red")


def _ms(seconds: float | None) -> str:
    return "never (overload)" if seconds is None else f"{seconds / MS:,.4g} ms"


def _percent(share: float | None) -> str:
    return "overload" if share is None else f"{share:.0%}"


def _or_dash(value: float | None, template: str) -> str:
    return "-" if value is None else template.format(value)
