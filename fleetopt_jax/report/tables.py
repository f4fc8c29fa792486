"""Rich tables for the terminal. Each takes the same JSON document that `--json` prints."""

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleetopt_jax.core.units import GIB, KW, MS, TB, TFLOP


def show(renderable: RenderableType) -> None:
    """Print to stdout; plain text when it is not a terminal."""
    Console(soft_wrap=False).print(renderable)


def plan_table(plan: dict[str, Any]) -> RenderableType:
    """What to buy, where to split, what it saves; then the pools; then what it rests on."""
    if plan["metrics"] is None:
        return Text(f"No fleet holds the limits ({plan['search']['n_evaluated']:,} candidates).")
    metrics, workload = plan["metrics"], plan["workload"]
    gain = metrics["gain_vs_homogeneous"]
    gpus = " + ".join(f"{pool['n_gpus']} {pool['gpu'].upper()}" for pool in plan["pools"])
    answer = Text.assemble(
        (f"{metrics['tok_per_j']:.2f} tokens per joule", "bold"),
        f" for {workload['name']} at {workload['arrival_rate_per_s']:,.6g} requests/s with {gpus}",
        f", {gain:.2f}x the best one-pool fleet" if gain else "",
        ".",
    )
    table = _table("Pool", "Requests up to", "Window", "GPUs", "Instances", "Traffic", "Busy", "In flight", "Power", "tok/J")
    for column in ("P99 TTFT", "ITL"):
        table.add_column(column, justify="right")
    for number, pool in enumerate(plan["pools"], start=1):
        edge = pool["gamma"] * pool["window_tokens"]
        table.add_row(
            str(number),
            f"{edge:,.0f} tok" + (f" (gamma {pool['gamma']:g})" if pool["gamma"] > 1 else ""),
            f"{pool['window_tokens']:,}",
            f"{pool['n_gpus']} {pool['gpu'].upper()}",
            f"{pool['n_instances']} x TP {pool['tp']}",
            f"{pool['traffic_frac']:.1%}",
            _percent(pool["utilization"]),
            f"{pool['n_active']:.0f} of {pool['max_num_seqs']}",
            f"{pool['power_w'] / KW:.1f} kW",
            f"{pool['tok_per_j']:.2f}",
            _ms(pool["ttft_p99_s"]),
            _ms(pool["itl_s"]),
        )
    facts = (
        f"{metrics['output_tok_per_s']:,.0f} output tok/s, {metrics['power_w'] / KW:.1f} kW, "
        f"${metrics['usd_per_h']:,.0f}/h, P99 TTFT {_ms(metrics['ttft_p99_s'])} (limit {_ms(plan['slo']['ttft_p99_s'])})."
    )
    return Group(answer, table, facts, Text(_how(plan), style="dim"))


def _how(plan: dict[str, Any]) -> str:
    share = plan["output_share"]
    counted = "one GPU of each instance" if plan["power_scope"] == "one_gpu_per_instance" else "all GPUs of each instance"
    found = {
        "optimal": "the best of all candidates",
        "feasible": "the best found",
        "infeasible": "breaks its limits",
    }[plan["status"]]
    tried = f" ({plan['search']['n_evaluated']:,} evaluated in {plan['search']['wall_s']:.1f} s)" if plan["search"] else ""
    return (
        f"Method {plan['method']}: {found}{tried}.\n"
        f"Assumptions '{plan['assume']}': power counts {counted}; every request is {1 - share:.0%} prompt and {share:.0%} "
        "output of its total length; every slot reserves its whole window; prefill rides along free."
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
        "Reproduced: rounded as printed. Exact: in full; for table 3 the integral over all lengths instead of the paper's "
        "3,000 draws."
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
        *((f"total length, p{100 * float(q):g}", f"{x:,.0f} tokens") for q, x in document["quantiles"]["total_tokens"].items()),
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
    return Group(*(makers[part](entries) for part, entries in document.items()))


def _gpus(entries: dict[str, Any]) -> Table:
    table = _table("GPU", "Memory", "Bandwidth", "16-bit peak", "TDP", "Price", "Source", title="GPUs")
    for name, gpu in entries.items():
        table.add_row(
            name,
            f"{gpu['memory_bytes'] / GIB:.0f} GiB",
            f"{gpu['bandwidth_bytes_per_s'] / TB:.2f} TB/s",
            f"{gpu['peak_flop_per_s'] / TFLOP:,.0f} TFLOP/s",
            f"{gpu['tdp_w']:.0f} W",
            f"${gpu['usd_per_h']:.2f}/h",
            gpu["source"],
        )
    return table


def _llms(entries: dict[str, Any]) -> Table:
    table = _table("LLM", "Parameters", "Active", "Layers", "Weights", "KV cache", "Source", title="LLMs")
    for name, llm in entries.items():
        table.add_row(
            name,
            f"{llm['n_params'] / 1e9:.1f} B",
            f"{llm['n_active_params'] / 1e9:.1f} B",
            f"{llm['n_layers']:.0f}",
            f"{llm['n_params'] * llm['bytes_per_weight'] / GIB:.0f} GiB",
            f"{llm['kv_bytes_per_token']:,.0f} B/token",
            llm["source"],
        )
    return table


def _engines(entries: dict[str, Any]) -> Table:
    table = _table("Engine", "W", "H at L_cal", "L_cal", "n_max at 8K", "Quality", "Source", title="Calibrated engines")
    for name, engine in entries.items():
        table.add_row(
            name,
            f"{engine['base_s'] / MS:.3f} ms",
            f"{engine['per_seq_s'] / MS:.3f} ms",
            f"{engine['calibration_tokens']:,.0f}",
            f"{engine['n_max_8k']:.0f}",
            engine["quality"],
            engine["source"],
        )
    table.caption = "Any other GPU, LLM and TP is computed by the roofline law from the GPUs and LLMs of the catalog."
    return table


def _workloads(entries: dict[str, Any]) -> Table:
    table = _table("Workload", "Title", "Requests", "Source", "Licence", title="Workloads")
    for name, about in entries.items():
        count = about["summary"]["n_requests"] if "summary" in about else None
        table.add_row(name, about["title"], f"{count:,}" if count else "-", about["source"], about["licence"])
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        text = i == 0 or column in ("Quantity", "Source", "Title", "From", "Licence", "Quality", "Value")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    return table


def _mark(ok: bool) -> Text:
    return Text("ok", style="green") if ok else Text("MISS", style="bold red")


def _ms(seconds: float | None) -> str:
    return "never (overload)" if seconds is None else f"{seconds / MS:,.4g} ms"


def _percent(share: float | None) -> str:
    return "overload" if share is None else f"{share:.0%}"


def _or_dash(value: float | None, template: str) -> str:
    return "-" if value is None else template.format(value)
