"""Rich tables for the terminal. Each takes the same JSON document that `--json` prints."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fleetopt_jax.core.units import GIB, KW, MS, TB, TFLOP
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS, whole_blocks_tokens
from fleetopt_jax.report.decision import decision
from fleetopt_jax.report.failures import reserve_said
from fleetopt_jax.report.words import (
    certificate,
    choices_said,
    drafts_said,
    edge,
    in_flight,
    instance_said,
    instances_said,
    latency,
    ms,
    or_dash,
    percent,
    power_limit_said,
    rests_on,
    site_said,
    stages_of,
    ttft_limit_rows,
    ttft_said,
)

PIPED_WIDTH = 120  # columns, where there is no terminal to ask
WIDEST = 1000  # columns a table may ask for
GAP = 3  # columns between two cells
NUMBER = 14  # columns of a number with its unit, '14,096 tokens'
NARROW = 60  # columns below which an answer stands under its question


def show(renderable: RenderableType) -> None:
    """Print to stdout; plain text when it is not a terminal, of 120 columns unless COLUMNS says how many. No number is
    cut to fit: a table that is too wide is folded, its columns in several tables with the first one repeated."""
    console = Console(markup=False, highlight=False, emoji=False)  # names are the user's
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdecimal():
        console.width = PIPED_WIDTH
    console.print(_fitted(console, renderable))


def _fitted(console: Console, renderable: RenderableType) -> RenderableType:
    """Everything that is shown, its tables folded where the console is narrower."""
    if isinstance(renderable, Group):
        return Group(*(_fitted(console, part) for part in renderable.renderables))
    if not isinstance(renderable, Table):
        return renderable
    if renderable.box is None:  # the answers
        return _stacked(renderable) if console.width < NARROW else renderable
    return _folded(console, renderable)


def _folded(console: Console, table: Table) -> RenderableType:
    """The table as it is, or in parts of as many columns as there is room for; a lone column wraps, letter by letter at
    last."""
    wide = console.options.update(max_width=WIDEST)
    least = []
    for column in table.columns:
        sizes = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
        whole = column.justify == "right"  # numbers stand beside their units
        of_cells = [size.maximum if whole and size.maximum <= NUMBER else size.minimum for size in sizes[1:]]
        of_column = [size.maximum for size in sizes] if column.no_wrap else [sizes[0].minimum, *of_cells]
        least.append(max(of_column))
        column.min_width, column.overflow = least[-1], "fold"
    room = console.width - GAP
    if sum(least) + GAP * len(least) <= room or len(least) < 2:
        return table
    head = min(least[0], max(room - 2 * GAP - max(least[1:]), room // 3))  # where even two are too wide, it wraps
    parts, first = [], 1
    while first < len(least):
        last = first + 1
        while last < len(least) and head + sum(least[first : last + 1]) + GAP * (last - first + 2) <= room:
            last += 1
        parts.append(_part(table, [0, *range(first, last)], wraps=head < least[0]))
        first = last
    return Group(*parts)


def _part(table: Table, kept: list[int], *, wraps: bool) -> Table:
    """Some columns of a table, the first of which `wraps`."""
    part = Table(title=table.title if kept[1] == 1 else None, title_justify="left", header_style="bold", box=table.box)
    for i in kept:
        column, free = table.columns[i], i == 0 and wraps
        part.add_column(
            column.header,
            justify=column.justify,
            overflow="fold",
            no_wrap=column.no_wrap and not free,
            min_width=None if free else column.min_width,
        )
    cells = [list(table.columns[i].cells) for i in kept]
    for row, values in zip(table.rows, zip(*cells, strict=True), strict=True):
        part.add_row(*values, end_section=row.end_section)
    return part


def _stacked(answers: Table) -> RenderableType:
    """Each answer under its question."""
    questions, texts = (list(column.cells) for column in answers.columns)
    lines: list[RenderableType] = []
    for question, text in zip(questions, texts, strict=True):
        lines += [Text(str(question), style="bold"), Padding(text, (0, 0, 0, 2))]
    return Group(*lines)


def plan_table(plan: Mapping[str, Any]) -> RenderableType:
    """What to buy, where to split, what it saves; then the pools; then what it rests on."""
    if plan["metrics"] is None:
        binding = plan.get("binding") or {}
        as_often = f" with {percent(binding['asked'])} probability" if binding.get("limit") == "confidence" else ""
        return Text(f"No fleet holds the limits{as_often} ({plan['search']['n_evaluated']:,} candidates).")
    metrics = plan["metrics"]
    pools = plan["pools"]
    table = new_table("Pool", *(str(number) for number in range(1, len(pools) + 1)))
    table.add_row("requests up to", *(edge(pool) for pool in pools))
    table.add_row("window", *(f"{pool['window_tokens']:,} tokens" for pool in pools))
    for row in _instance_rows(pools):
        table.add_row(*row)
    table.add_row("max_num_seqs", *(f"{pool['max_num_seqs']:,}" for pool in pools))
    if any(each["clock_frac"] < 1 for pool in pools for each in stages_of(pool)):
        clocks = [" / ".join(percent(each["clock_frac"]) for each in stages_of(pool)) for pool in pools]
        table.add_row("clock", *(f"{clock} of the top" for clock in clocks))
    if any(each.get("power_limit_w") for pool in pools for each in stages_of(pool)):
        table.add_row("power limit of a GPU", *(power_limit_said(pool) for pool in pools))
    if any(pool.get("speculate") for pool in pools):
        table.add_row("drafts an iteration", *(drafts_said(pool) for pool in pools))
    table.add_row("share of requests", *(percent(pool["traffic_frac"], 2) for pool in pools))
    loads = [" / ".join(percent(each["utilization"]) for each in stages_of(pool)) for pool in pools]
    table.add_row("load", *loads)
    if plan["assumptions"]["prefill"] != "free_chunks":
        table.add_row("time in prefill", *("-" if p.get("stages") else percent(p["prefill_frac"]) for p in pools))
    if plan.get("prefix_cache"):
        table.add_row("found in the cache", *(percent(pool["prefix_hit_frac"]) for pool in pools))
    table.add_row("in flight per instance", *(in_flight(pool["n_active"]) for pool in pools))
    table.add_row("power", *(f"{pool['power_w'] / KW:,.1f} kW" for pool in pools))
    table.add_row("tokens per joule", *(_rate(pool) for pool in pools))
    table.add_row("P99 TTFT", *(latency(pool["ttft_p99_s"]) for pool in pools))
    for name, cells in ttft_limit_rows(plan):
        table.add_row(name, *cells)
    table.add_row("mean ITL", *(ms(pool["itl_s"]) for pool in pools))
    if plan["assumptions"]["tail"] != "mean_prefill":
        table.add_row("P99 ITL", *(latency(pool["itl_p99_s"]) for pool in pools))
    facts = (
        f"{metrics['output_tok_per_s']:,.0f} output tok/s, {metrics['power_w'] / KW:,.1f} kW, "
        f"${metrics['usd_per_h']:,.0f}/h, {ttft_said(plan)}."
    )
    return Group(_answer(plan), table, facts, Text(_how(plan), style="dim"))


def _instance_rows(pools: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What the pools run on, and of those with two stages how caches are handed over."""
    if not any(pool.get("stages") for pool in pools):
        return [["instances", *map(instances_said, pools)]]
    each = [stages_of(pool) for pool in pools]
    only = {len(stages) for stages in each} == {2}
    first = [f"{stages[0]['n_instances']:,} x {instance_said(stages[0], ' ')}" for stages in each]
    second = [
        f"{stages[1]['n_instances']:,} x {instance_said(stages[1], ' ')}" if len(stages) > 1 else "the same"
        for stages in each
    ]
    ways = [ms(pool["hand_over"]["mean_s"]) if pool.get("stages") else "-" for pool in pools]
    name = "prefill instances" if only else "prefill or all"
    return [[name, *first], ["decode instances", *second], ["hand-over", *ways]]


def _rate(pool: Mapping[str, Any]) -> str:
    """Tokens per joule of a pool that keeps up; what an overloaded one gets through is no measure of anything."""
    keeps_up = pool["utilization"] is not None and pool["utilization"] < 1.0
    return f"{pool['tok_per_j']:#.3g}" if keeps_up else "-"


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
    if plan["method"] == "given" and plan["status"] == "feasible":
        found = "holds its limits"
    tried = f" ({plan['search']['n_evaluated']:,} evaluated in {plan['search']['wall_s']:.1f} s)"
    lines = [
        f"Method {plan['method']}: {found}{tried}.",
        certificate(plan),
        f"Assumptions '{plan['assume']}': {'; '.join(choices_said(plan))}.",
    ]
    return "\n".join([*lines, *filter(None, (_trust(plan), site_said(plan), reserve_said(plan)))])


def _trust(plan: Mapping[str, Any]) -> str:
    """How far the engines can be trusted, once each."""
    served = [each for pool in plan["pools"] for each in stages_of(pool)]
    seen = {(each["gpu"], each["llm"], each["tp"], each["precision"], drafts_said(each)): each for each in served}
    parts = []
    for pool in seen.values():
        errors = [
            f"{name} +-{percent(pool[key])}"
            for name, key in (
                ("step", "engine_step_error"),
                ("power", "engine_power_error"),
                ("prefill", "engine_prefill_error"),
            )
            if pool.get(key) is not None
        ]
        known = f" ({', '.join(errors)})" if errors else ""
        parts.append(f"{instance_said(pool)} {pool['llm']} {pool['precision']}: {rests_on(pool)}{known}")
    return f"Engines: {'; '.join(parts)}." if parts else ""


def engine_table(document: Mapping[str, Any]) -> RenderableType:
    """One engine at several batches."""
    title = f"{document['llm']} ({document['precision']}) on {instance_said(document)}"
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
        f"{name} +-{percent(document[key], 1)}"
        for name, key in (
            ("step", "relative_error"),
            ("power", "power_relative_error"),
            ("prefill", "prefill_relative_error"),
        )
        if document[key] is not None
    ]
    facts = (
        f"KV cache {document['kv_capacity_tokens']:,.0f} tokens; prefill {ms(document['prefill_s_per_1k_tokens'])} "
        f"per 1,000 tokens at {document['prefill_power_w_per_gpu']:,.0f} W a GPU{_limited(document)}. 'Step' holds the "
        f"prefill of {document['prompt_per_output']:,.4g} prompt tokens for each output token{_in_prompts(document)}."
    )
    trust = f"Quality: {document['quality']} ({', '.join(errors)}). {document['source']}."
    return Group(table, Text(facts), Text(trust, style="dim"))


def _limited(document: Mapping[str, Any]) -> str:
    limit_w = document.get("power_limit_w")
    return "" if limit_w is None else f", which may draw {limit_w:,.0f} W"


def _in_prompts(document: Mapping[str, Any]) -> str:
    return f", in prompts of {document['prompt_tokens']:,.0f}" if document["prompt_per_output"] else ""


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
        ("longest", f"{document['longest_tokens']:,} tokens{_window_of(document['longest_tokens'])}"),
        ("planned rate", or_dash(document["arrival_rate_per_s"], "{:,.6g} requests/s")),
        ("recorded rate", or_dash(document["recorded_rate_per_s"], "{:,.6g} requests/s")),
        ("arrival SCV (1 = Poisson)", or_dash(document["arrival_scv"], "{:.3g}")),
        ("atoms", f"{document['n_atoms']:,}"),
        *_understood_rows(document),
    ]
    for row in rows:
        table.add_row(*row)
    parts: list[RenderableType] = [table, *(Text(f"Warning: {each}.") for each in document.get("warnings", ()))]
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


def _window_of(longest_tokens: int) -> str:
    """The window that a plan has for it, of whole blocks of the KV cache, where that is another number."""
    window = whole_blocks_tokens(longest_tokens)
    return f", {window:,.0f} in whole blocks of {BLOCK_TOKENS:g}" if window > longest_tokens else ""


def _understood_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a file was taken for."""
    if "format" not in document:
        return []
    details = f" ({', '.join(document['details'])})" if document["details"] else ""
    rows = [("read as", f"{document['format']}{details}, {document['layout']}")]
    rows += [(f"{role} column", name) for role, name in document["columns"].items()]
    rows.append(("time", document["time"] or "no time stamps"))
    if document["n_rows_left_out"]:
        rows.append(("rows left out", f"{document['n_rows_left_out']:,} of {document['n_rows']:,}"))
    if document["zero_output_requests"]:
        how = "left out" if document["zero_output"] == "drop" else "prefilled only"
        rows.append(("requests without output", f"{document['zero_output_requests']:,}, {how}"))
    return rows


def catalog_tables(document: Mapping[str, Any]) -> RenderableType:
    """The asked parts of the catalog."""
    makers = {"gpus": _gpus, "llms": _llms, "engines": _engines, "workloads": _workloads}
    parts: list[RenderableType] = []
    for part, entries in document.items():
        parts.append(makers[part](entries))
        parts += [Text(f"  {name}: {entry['source']}", style="dim") for name, entry in entries.items()]
    return Group(*parts)


def llm_table(document: Mapping[str, Any]) -> RenderableType:
    """One LLM in full."""
    table = new_table(
        "Part", "Parameters", "Weights", "Bits a weight", title=f"{document['llm']}: {document['family']}"
    )
    for name, part in document["parts"].items():
        bits = 8 * part["bytes"] / part["params"]
        size = f"{part['params'] / 1e9:,.2f} B", f"{part['bytes'] / GIB:,.2f} GiB"
        table.add_row(name.replace("_", " "), *size, f"{bits:.3g}")
    total, active = document["total_params"] / 1e9, document["active_params"] / 1e9
    loaded = document["loaded_weight_bytes"]
    padded = f" ({loaded / GIB:,.2f} loaded, padded)" if loaded > document["weight_bytes"] else ""
    table.add_row("all", f"{total:,.2f} B", f"{document['weight_bytes'] / GIB:,.2f} GiB", "")
    heads = f"{document['q_heads']} query and {document['kv_heads']} KV heads of {document['head_dim']}"
    facts = [
        f"{active:,.2f} B parameters active a token; weights {document['precision']}{padded}, "
        f"KV cache {document['kv_precision']}, {document['kv_bytes_per_token']:,.0f} B a token.",
        f"{document['layers']} layers, {heads}.",
    ]
    if document["n_experts"]:
        facts.append(f"{document['experts_per_token']} of {document['n_experts']} experts.")
    if document["windowed_layers"]:
        window, n = document["window_tokens"], document["windowed_layers"]
        facts.append(f"{n} layers with a window of {window:,} tokens.")
    if document["max_position_tokens"]:
        facts.append(f"Sequences to {document['max_position_tokens']:,} tokens.")
    said = [f"Quantized: {document['quantized_from'] or 'no'}."]
    said += [f"Left out: {', '.join(document['left_out'])}."] if document["left_out"] else []
    if document["draft_bytes"]:
        said.append(f"Draft layers are {document['draft_bytes'] / GIB:,.2f} GiB more in the checkpoint.")
    said += [f"No engine can be built of it: {document['no_engine']}."] if document["no_engine"] else []
    return Group(table, Text(" ".join(facts)), *map(Text, said), Text(document["source"], style="dim"))


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
            percent(engine["step_error"], 1),
            percent(engine["power_error"], 1),
        )
    return table


def _workloads(entries: Mapping[str, Any]) -> Table:
    table = new_table("Workload", "Title", "Requests", "Licence", title="Workloads")
    for name, about in entries.items():
        count = about["summary"]["n_requests"] if "summary" in about else None
        table.add_row(name, about["title"], f"{count:,}" if count else "-", about["licence"])
    return table


_TEXTS = ("Quantity", "Title", "From", "Licence", "Quality", "Value", "Released for", "Whose GPUs change")


def new_table(*columns: str, title: str | None = None) -> Table:
    """The one style of all tables: the first column and texts to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        text = i == 0 or column in _TEXTS
        table.add_column(column, justify="left" if text else "right", no_wrap=i == 0)
    return table


class Cells(NamedTuple):
    """A table as texts, for a terminal and for a page: the heads of its columns, and its rows, each as long."""

    head: list[str]
    rows: list[list[str]]


def filled(cells: Cells, title: str | None = None) -> Table:
    table = new_table(*cells.head, title=title)
    for row in cells.rows:
        table.add_row(*row)
    return table


def _mark(ok: bool) -> Text:
    return Text("ok", style="green") if ok else Text("MISS", style="bold red")
