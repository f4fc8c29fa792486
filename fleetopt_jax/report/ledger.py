"""Both ledgers as a table and a figure: from the published system to the physical one, and on to a stack of 2026."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.report.style import (
    COLOURS,
    INK,
    LESS,
    MORE,
    MUTED,
    PAPER,
    POOL_COLOURS,
    grid_along,
    new_figure,
    plain_numbers,
    say,
    styled,
)
from fleetopt_jax.report.tables import new_table
from fleetopt_jax.report.words import factor, instance_said, or_dash, percent

TITLES = {
    "published": "From the published system to the physical one",
    "stack": "From the physical system to a stack of 2026",
}
LABELS = {
    "published": "as published",
    "integration": "exact integration",
    "power_scope": "all GPUs counted",
    "lengths": "the trace's lengths",
    "compression": "only prompts shrink",
    "occupancy": "real occupancy",
    "prefill": "prefill costs",
    "kv_cache": "paged KV cache",
    "engine": "measured engine",
    "tail": "TTFT distribution",
    "prefix_cache": "a prefix cache",
}
BASE = 0.9  # where the axis of gains begins
LABEL_GAP = 0.015  # of the axis, between a bar and its label
STACK_LABELS = {"stages": "two stages", "prefix_cache": "prefix cache", "speculate": "drafts"}
SERVED_BY = {"vllm-0.11": "vLLM 0.11", "vllm": "the newest vLLM"}
BELOW, ABOVE = -16, 6  # of a dot, its gain [points]


def walk_of(document: Mapping[str, Any]) -> str:
    """Which of the two ledgers a document is."""
    return document.get("walk", "published")


def ledger_table(document: Mapping[str, Any]) -> RenderableType:
    """Row by row, with what remains of the gain."""
    title = f"{document['workload']['name']} at {document['workload']['arrival_rate_per_s']:,.6g} requests/s, "
    title += f"{document['llm']} on {instance_said(document)} (output tokens per joule)"
    table = new_table("Choice", "From", "To", "One pool", "Two pools", "FleetOpt", "Gain", "Split at", title=title)
    for row in document["rows"]:
        window, gamma = row["short_window_tokens"], row["gamma"]
        split = "-" if window is None else f"{window:,}" + (f" x {gamma:g}" if gamma and gamma > 1 else "")
        table.add_row(
            row["choice"],
            row["from"] or "",
            _found_of(document) if row["choice"] == "prefix_cache" else row["to"] or "",
            *(
                or_dash(row[name], "{:.4g}")
                for name in ("tok_per_j_homogeneous", "tok_per_j_two_pool", "tok_per_j_fleetopt")
            ),
            "-" if row["gain"] is None else factor(row["gain"]),
            split,
        )
    answer = _stack_answer(document) if walk_of(document) == "stack" else _physical_answer(document)
    note = "FleetOpt: two pools, gamma searched; 'Split at' its short window x gamma. -: no fleet holds the limits."
    return Group(Text(answer, style="bold"), table, Text(note, style="dim"))


def _physical_answer(document: Mapping[str, Any]) -> str:
    """What the published gain has become."""
    rows = document["rows"]
    first, (last, *cached) = rows[0], rows[-2:] if "prefix_cache" in document else rows[-1:]
    if last["gain"] is None:
        answer = "With all choices physical no fleet holds the limits: see fleetopt optimize for what is reachable."
    else:
        answer = f"Published gain {factor(first['gain'])}; physical {_gains(last)}."
    for row in cached:
        gains = "no fleet holds the limits" if row["gain"] is None else _gains(row)
        answer += f" Where {_found_of(document)} of the prompt tokens are found in a prefix cache: {gains}."
    return answer


def _stack_answer(document: Mapping[str, Any]) -> str:
    """What the gain becomes, and what the stack itself is worth to one pool."""
    now, last = _ends(document["rows"])
    if now["gain"] is None or last["gain"] is None:
        return "No fleet holds the limits: see fleetopt optimize for what is reachable."
    stack = last["tok_per_j_homogeneous"] / now["tok_per_j_homogeneous"]
    return (
        f"FleetOpt gains {factor(now['gain'])} with {_served_by(now)}, and {_gains(last)}, on a stack of 2026, where "
        f"{_found_of(document)} of every prompt is assumed to be found; the stack gives one pool {factor(stack)}."
    )


def _gains(row: Mapping[str, Any]) -> str:
    alone = row["tok_per_j_two_pool"] / row["tok_per_j_homogeneous"]
    return f"{factor(row['gain'])}, of which splitting by length alone is {factor(alone)}"


def _found_of(document: Mapping[str, Any]) -> str:
    return percent(document.get("prefix_cache", {}).get("hit_frac", 0.0))


def _ends(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """With the engine of today and nothing else, and the last."""
    return next(row for row in rows if row["choice"] == "release"), rows[-1]


def _served_by(row: Mapping[str, Any]) -> str:
    return SERVED_BY.get(row["to"]) or str(row["to"])


def ledger_figure(document: Mapping[str, Any]) -> Figure:
    """The waterfall, or of the second ledger the tokens per joule behind each change."""
    if walk_of(document) == "stack":
        return stack_figure({document["workload"]["name"]: {document["gpu"]: document["rows"]}})
    return waterfall_figure(document)


@styled
def waterfall_figure(document: Mapping[str, Any]) -> Figure:
    """FleetOpt's gain after each choice, and what the choice took; the two-pool gain as marks. What a
    prefix cache changes, where one is assumed, comes behind."""
    rows = document["rows"]
    physical = len(rows) - (2 if "prefix_cache" in document else 1)
    figure = new_figure(8.4, 5.4)
    axes = figure.subplots()
    gains = [row["gain"] for row in rows]
    two_pools = [
        row["tok_per_j_two_pool"] / row["tok_per_j_homogeneous"]
        if row["tok_per_j_two_pool"] and row["tok_per_j_homogeneous"]
        else None
        for row in rows
    ]
    known = 1.0  # level of the last row with an answer
    top = 1.12 * max([gain for gain in (*gains, *two_pools) if gain] or [1.0])
    gap = LABEL_GAP * (top - BASE)
    for i, (gain, mark) in enumerate(zip(gains, two_pools)):
        if gain is None:
            axes.text(i, 1.02, "no fleet\nholds the\nlimits", ha="center", fontsize=9.5, color=MUTED)
            continue
        total = i in (0, physical)
        low, high = (1.0, gain) if total else sorted((known, gain))
        colour, hatch = (MUTED, "") if total else (MORE, "") if gain >= known else (LESS, "///")
        look = {"color": colour, "hatch": hatch, "edgecolor": PAPER, "linewidth": 0}
        axes.bar(i, max(high - low, 0.012), bottom=low, width=0.62, **look)
        beneath = gain < known and not total and not (mark and low - 6 * gap < mark < low + gap)
        over = high if not mark or abs(mark - high) > gap else max(mark, high) + gap  # a mark has its place
        at, va = (low - gap, "top") if beneath else (over + gap, "bottom")
        axes.text(i, at, f"{gain:.2f}x", ha="center", va=va, fontsize=11)
        known = gain
    marked = [(i, gain) for i, gain in enumerate(two_pools) if gain is not None]
    if marked:
        axes.plot(*zip(*marked), "D", color=INK, markersize=6, label="two pools, nothing compressed")
    axes.axhline(1.0, color=MUTED, linewidth=1.0)
    labels = [LABELS[row["choice"]] for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylabel("tokens per joule over the\nbest homogeneous fleet")
    axes.set_ylim(BASE, top)
    plain_numbers(axes.yaxis)
    ends = slice(None, physical + 1)
    say(figure, _takeaway(document, gains[ends], two_pools[ends]))
    grid_along(axes, "y")
    axes.legend(loc="upper right")
    return figure


def _takeaway(document: Mapping[str, Any], gains: list[float | None], two_pools: list[float | None]) -> str:
    where = f"{document['workload']['name']} on {document['gpu'].upper()}"
    if gains[-1] is None or gains[0] is None:
        return f"{where}: no fleet holds the limits once all is counted"
    alone = f" ({two_pools[-1]:.2f}x without compression)" if two_pools[-1] else ""
    return f"{where}: a gain of {gains[0]:.2f}x as published,\n{gains[-1]:.2f}x with all nine choices physical{alone}"


# --- the second ledger ------------------------------------------------------------------------------------------------


@styled
def stack_figure(walks: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """A panel for each workload: the rows of each GPU, tokens per joule of the best single pool and of FleetOpt above
    it, with its gain."""
    n_columns = min(3, len(walks))
    n_lines = -(-len(walks) // n_columns)
    figure = new_figure(2.0 + (6.4 if len(walks) == 1 else 3.6 * n_columns), 1.4 + 3.2 * n_lines)
    panels = figure.subplots(n_lines, n_columns, sharex=True, squeeze=False)
    for axes, (name, by_gpu) in zip(panels.flat, walks.items()):
        for i, (gpu, rows) in enumerate(by_gpu.items()):
            _draw_walk(axes, gpu, rows, COLOURS.get(gpu, POOL_COLOURS[i]), BELOW if i < len(by_gpu) - 1 else ABOVE)
        rows = max(by_gpu.values(), key=len)
        axes.set_title(name)
        labels = [STACK_LABELS.get(row["choice"]) or _served_by(row) for row in rows]
        axes.set_xticks(range(len(rows)), labels, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.4, len(rows) - 0.6)
        axes.set_ylim(0.0, 1.15 * max(row["tok_per_j_fleetopt"] or 1e-3 for rows in by_gpu.values() for row in rows))
        plain_numbers(axes.yaxis)
        grid_along(axes, "y")
    for axes in panels.flat[len(walks) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("output tokens per joule")
    panels[0, 0].legend(loc="lower right")
    say(figure, _stack_takeaway(walks))
    return figure


def _draw_walk(axes, gpu: str, rows: Sequence[Mapping[str, Any]], colour: str, label_at: int) -> None:
    one, best = ([row[f"tok_per_j_{name}"] or float("nan") for row in rows] for name in ("homogeneous", "fleetopt"))
    look = {"color": colour, "markersize": 5}
    axes.plot(one, "o--", linewidth=1.2, label=f"{gpu.upper()}, one pool", **look)
    axes.plot(best, "o-", label=f"{gpu.upper()}, FleetOpt", **look)
    for x, (row, y) in enumerate(zip(rows, best if label_at > 0 else one)):
        if row["gain"]:
            at = {"xytext": (0, label_at), "textcoords": "offset points", "ha": "center", "fontsize": 9.5}
            axes.annotate(f"{row['gain']:.2f}x", (x, y), color=colour, **at)


def _stack_takeaway(walks: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """What FleetOpt gains before and behind the stack, of each GPU over all workloads."""
    texts = []
    for gpu in dict.fromkeys(gpu for by_gpu in walks.values() for gpu in by_gpu):
        of_gpu = [by_gpu[gpu] for by_gpu in walks.values() if gpu in by_gpu]
        ends = [[row["gain"] for row in rows if row["gain"]] for rows in zip(*map(_ends, of_gpu))]
        if all(ends):
            before, after = (" to ".join(f"{x:.2f}" for x in sorted({min(some), max(some)})) for some in ends)
            texts.append(f"{gpu.upper()} {before}x and {after}x")
    said = "; ".join(texts) or "no fleet holds the limits"
    return f"FleetOpt over one pool, with today's engine and on a stack of 2026:\n{said}"
