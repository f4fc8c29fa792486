"""What a plan rests on: elasticities ranked, intervals, prices of the limits; and the tornado."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.report.style import LESS, MORE, MUTED, PAPER, grid_along, new_figure, say, styled
from fleetopt_jax.report.tables import new_table, plan_table
from fleetopt_jax.report.words import QUANTITIES, UNBOUNDED, goal_of, limit_quantity, percent, sentence

INPUTS = {  # the last part of a path: in the field's words
    "n_instances": "instances",
    "window_tokens": "window",
    "gamma": "gamma",
    "gpus_per_instance": "GPUs an instance (TP)",
    "pue": "PUE",
    "arrival_rate_per_s": "arrival rate",
    "arrival_scv": "burstiness (SCV)",
    "prompt_scale": "length of all prompts",
    "output_scale": "length of all outputs",
    "base_s": "step at batch 0",
    "per_seq_s": "step per sequence",
    "per_token_s": "time per token",
    "per_token2_s": "attention time per token squared",
    "n_blocks": "KV blocks",
    "max_num_seqs": "max_num_seqs",
    "slot_tokens": "slot tokens",
    "idle_w": "idle power",
    "nominal_w": "nominal power",
    "floor_w": "floor of the power",
    "memory_w": "power at the full bandwidth",
    "sqrt_flop_w": "power at the full FLOP/s",
    "cap_w": "power cap",
    "gpu_w": "power while prefilling",
    "usd_per_gpu_h": "price of a GPU hour",
    "host_w_per_gpu": "host power a GPU",
    "usd_per_kwh": "price of electricity",
    "kg_co2_per_kwh": "carbon of electricity",
    "success_frac": "success of compression",
    "s_per_token": "time of compression per token",
    "j_per_token": "energy of compression per token",
}
_PLUS = {  # what more of a metric is
    "tok_per_j": "better",
    "power_w": "worse",
    "usd_per_h": "dearer",
    "ttft_p99_s": "slower",
    "itl_s": "slower",
}
_PARTS = {
    "decode": "decode",
    "prefill": "prefill",
    "kv": "KV cache",
    "power": "power law",
    "step": "its step",
    "ideal_bytes": "its bytes",
    "ideal_flops": "its FLOPs",
}


def sensitivity_table(document: Mapping[str, Any]) -> RenderableType:
    """The metric shown, input by input; then every metric, give or take; then what limits and thresholds are worth."""
    name, top = document["shown"]["metric"], document["shown"]["top"]
    title = QUANTITIES[name].title
    ranked = document["elasticities"][name]
    parts: list[RenderableType] = []
    plan = document["plan"]
    about = f"{plan['workload']['name']} at {plan['workload']['arrival_rate_per_s']:,.6g} requests/s"
    parts.append(Text(f"{about}: {_takeaway(document)}", style="bold"))
    if ranked:
        of = f"What moves {title} [{QUANTITIES[name].unit}]: % more of it for 1 % more of an input (+ is {_PLUS[name]})"
        table = new_table("Input", "Quantity", "Value", "% per %", title=of)
        for e in ranked[:top]:
            table.add_row(e["input"], input_label(e["input"]), f"{e['value']:.4g}", f"{e['elasticity']:+.3f}")
        parts.append(table)
    else:
        parts.append(f"No elasticity: {title} is 0 or infinite here.")
    parts += [_intervals(document["intervals"]), _prices(document)]
    if document["thresholds"]:
        parts.append(_thresholds(document["thresholds"]))
    quiet = len(ranked) - top
    notes = [
        *([f"{quiet} more inputs move it less (--top)."] if quiet > 0 else []),
        f"{len(document['skipped'])} inputs at 0 or infinity have no elasticity. The fleet is as it is: nothing is "
        "sized anew. Values in SI units.",
        "Instances and slots are taken as real numbers; windows, gamma and lengths move traffic as a router of "
        "log-width 0.05 would.",
        "Intervals: errors of the engines' step, power and prefill alone; sampled and linear part near a limit.",
    ]
    parts.append(Text("\n".join(notes), style="dim"))
    return Group(*parts)


def input_label(path: str) -> str:
    """'pools.0.engine.decode.base_s' -> 'pool 1: decode, step at batch 0'; 'surroundings.site.pue' -> 'PUE'."""
    keys = path.split(".")
    where = f"pool {int(keys[1]) + 1}: " if keys[0] == "pools" else ""
    parts = [_PARTS.get(key, "") for key in keys[3:-1]] if keys[0] == "pools" else []
    words = " ".join(part for part in parts if part)
    last = INPUTS.get(keys[-1], keys[-1].replace("_", " "))
    return f"{where}{words + ', ' if words else ''}{last}"


def _takeaway(document: Mapping[str, Any]) -> str:
    name = document["shown"]["metric"]
    of, shown = document["intervals"]["metrics"][name], QUANTITIES[name]
    value, low, high = (_number(x, shown.si) for x in (of["value"], *of["sampled"]))
    return (
        f"{sentence(shown.title)} {value} {shown.unit}, between {low} and {high} with "
        f"{percent(document['intervals']['level'])} probability; all latency and load limits hold with "
        f"{percent(document['intervals']['hold_probability'])}."
    )


def _number(value: float | None, size: float = 1.0) -> str:
    return UNBOUNDED if value is None or not math.isfinite(value) else f"{value / size:,.4g}"


def _intervals(intervals: Mapping[str, Any]) -> RenderableType:
    title = f"{percent(intervals['level'])} intervals ({intervals['n_samples']:,} draws of the engines' errors)"
    table = new_table("Metric", "Value", "Sampled", "Linear", "", title=title)
    for name, of in intervals["metrics"].items():
        shown = QUANTITIES[name]
        ends = [" to ".join(_number(end, shown.si) for end in of[how]) for how in ("sampled", "linear")]
        table.add_row(shown.title, _number(of["value"], shown.si), *ends, shown.unit)
    return table


def _prices(document: Mapping[str, Any]) -> RenderableType:
    objective = goal_of(document["objective"]).quantity
    checked = any(price["reoptimized"] is not None for price in document["shadow_prices"])
    columns = [
        "Limit",
        "Asked",
        "Binds",
        f"One more unit [{objective.unit}]",
        "% per %",
        *(["Whole plans"] if checked else []),
    ]
    table = new_table(
        *columns,
        title=f"Shadow prices, in {objective.title} (windows stay, instances as real numbers)",
    )
    for price in document["shadow_prices"]:
        limit = limit_quantity(price["limit"])
        known = price["elasticity"] is not None
        row = [
            limit.title,
            limit.amount(price["asked"]),
            "yes" if price["binds"] else "no",
            f"{price['per_unit'] * limit.si / objective.si:+.3g} / {limit.unit}" if known else "not held",
            f"{price['elasticity']:+.3f}" if known else "-",
        ]
        if checked:
            row.append("-" if price["reoptimized"] is None else f"{price['reoptimized']:+.3f}")
        table.add_row(*row)
    return table


def _thresholds(values: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = new_table(
        "Window",
        "As sized",
        "Sized anew",
        "Whole fleets sized anew",
        title="Thresholds: tok/J in % per % of the window",
    )
    for value in values:
        moves = ", ".join(
            f"{move['window_tokens']:,.0f}: {'not held' if move['change'] is None else format(move['change'], '+.2%')}"
            for move in value["moves"]
        )
        table.add_row(
            f"{value['window_tokens']:,.0f} tokens", f"{value['as_sized']:+.3f}", f"{value['resized']:+.3f}", moves
        )
    return table


@styled
def tornado_figure(document: Mapping[str, Any]) -> Figure:
    """The largest elasticities of the metric shown, as bars either side of nought."""
    name, top = document["shown"]["metric"], document["shown"]["top"]
    shown = QUANTITIES[name]
    ranked = document["elasticities"][name][:top]
    figure = new_figure(9.2, 1.9 + 0.38 * max(len(ranked), 3))
    axes = figure.subplots()
    for i, e in enumerate(ranked):
        value = e["elasticity"]
        axes.barh(i, value, height=0.68, color=MORE if value > 0 else LESS, hatch="" if value > 0 else "///", ec=PAPER)
        side = 1 if value > 0 else -1
        axes.annotate(
            f"{value:+.2f}",
            (value, i),
            xytext=(4 * side, 0),
            textcoords="offset points",
            ha="left" if value > 0 else "right",
            va="center",
            fontsize=10.5,
        )
    axes.set_yticks(range(len(ranked)), [input_label(e["input"]) for e in ranked])
    axes.set_ylim(max(len(ranked), 1) - 0.4, -0.6)
    reach = 1.25 * max([abs(e["elasticity"]) for e in ranked] or [1.0])
    axes.set_xlim(-reach, reach)
    axes.axvline(0.0, color=MUTED, linewidth=1.0)
    axes.set_xlabel(f"% more {shown.title} for 1 % more of the input")
    of = document["intervals"]["metrics"][name]
    value, low, high = (_number(x, shown.si) for x in (of["value"], *of["sampled"]))
    first = f"{input_label(ranked[0]['input'])} moves {shown.title} most" if ranked else f"nothing moves {shown.title}"
    takeaway = f"{document['plan']['workload']['name']}: {first};\n"
    say(figure, f"{takeaway}{value} {shown.unit}, {low} to {high} with the engines' errors")
    grid_along(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def robust_table(found: Mapping[str, Any]) -> RenderableType:
    """The chosen plan beside the nominal one, and the other candidates."""
    what = (
        f"{found['level']:.0%} quantile"
        if found["measure"] == "quantile"
        else f"CVaR of the worst {found['level']:.0%}"
    )
    title = f"Robust: {what} of tok/J over {found['n_scenarios']:,} draws of the engines' errors"
    if len(found["workloads"]) > 1:
        title += f" x {', '.join(found['workloads'])}"
    table = new_table("", "Optimum of", "Score", "Mean", "As planned", "Limits hold", "GPUs", "Windows", title=title)
    for each in found["candidates"]:
        marks = [name for name in ("chosen", "nominal") if each["origin"] == found[name]["origin"]]
        table.add_row(
            ", ".join(marks),
            each["origin"],
            *(f"{each[name]:.4g}" for name in ("score", "mean_tok_per_j", "tok_per_j")),
            f"{each['hold_share']:.0%}",
            f"{each['n_gpus']:,}",
            " / ".join(f"{window:,.0f}" for window in each["window_tokens"]),
        )
    held = found["chosen"]["hold_share"]
    short = "" if held >= 1.0 - found["level"] else f" No candidate holds in {1.0 - found['level']:.0%} of them."
    note = f"The chosen plan holds its limits as planned, and in {held:.0%} of the scenarios.{short}"
    return Group(table, Text(note, style="dim"))


def robust_plan_table(document: Mapping[str, Any]) -> RenderableType:
    """The chosen plan, then what it was chosen from."""
    return Group(plan_table(document), robust_table(document["robust"]))
