"""What a plan rests on: elasticities ranked, intervals, prices of the limits; and the tornado."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.report.style import LESS, MORE, MUTED, PAPER, grid_along, new_figure, plain_numbers, say, styled
from fleetopt_jax.report.tables import new_table, plan_table
from fleetopt_jax.report.words import (
    QUANTITIES,
    UNBOUNDED,
    Quantity,
    goal_of,
    limit_quantity,
    number,
    percent,
    sentence,
    signed,
)

INPUTS = {  # the end of a path: in the field's words
    "n_instances": "instances",
    "window_tokens": "window",
    "gamma": "gamma",
    "gpus_per_instance": "GPUs an instance",
    "pue": "PUE",
    "arrival_rate_per_s": "arrival rate",
    "arrival_scv": "burstiness (SCV)",
    "prompt_scale": "length of all prompts",
    "output_scale": "length of all outputs",
    "base_s": "step at batch 0",
    "expert_s": "step for the weights of all experts",
    "expert_share": "share of the experts a token takes",
    "per_seq_s": "step per sequence",
    "per_token_s": "time per token",
    "per_token2_s": "attention time per token squared",
    "windowed_token_s": "time per token in the sliding window",
    "decode.window_tokens": "sliding window",
    "step.window_tokens": "sliding window",
    "ideal_bytes.base_s": "bytes at batch 0",
    "ideal_bytes.expert_s": "bytes of all experts",
    "ideal_bytes.expert_share": "share of the experts whose bytes a token takes",
    "ideal_bytes.per_seq_s": "bytes per sequence",
    "ideal_bytes.per_token_s": "bytes per token",
    "ideal_bytes.windowed_token_s": "bytes per token in the sliding window",
    "ideal_bytes.window_tokens": "sliding window of the bytes",
    "ideal_flops.base_s": "FLOPs at batch 0",
    "ideal_flops.expert_s": "FLOPs of all experts",
    "ideal_flops.expert_share": "share of the experts whose FLOPs a token takes",
    "ideal_flops.per_seq_s": "FLOPs per sequence",
    "ideal_flops.per_token_s": "FLOPs per token",
    "ideal_flops.windowed_token_s": "FLOPs per token in the sliding window",
    "ideal_flops.window_tokens": "sliding window of the FLOPs",
    "n_blocks": "blocks",
    "max_num_seqs": "max_num_seqs",
    "n_caches": "KV caches of an instance",
    "slot_tokens": "tokens a slot reserves",
    "fixed_tokens": "tokens a sequence holds whatever its length",
    "chunk_tokens": "chunk",
    "calibration_tokens": "length of its calibration",
    "budget_tokens": "tokens an iteration takes",
    "idle_w": "idle power",
    "nominal_w": "nominal power",
    "steepness": "steepness",
    "log2_half_batch": "midpoint (log2 of the batch)",
    "floor_w": "floor of the power",
    "memory_w": "power at the full bandwidth",
    "sqrt_flop_w": "power at the full FLOP/s",
    "cap_w": "power cap",
    "factor": "factor",
    "gpu_w": "power while prefilling",
    "host.step_s": "time of a step",
    "slowdown": "GPU time over that of its kernels",
    "prompt_slowdown": "the same with prompts",
    "large_exchange": "time of large exchanges",
    "layer_s": "time per layer",
    "prompt_layer_s": "time per layer with prompts",
    "tdp_w": "power limit, and all watts with it",
    "gap_frac": "share of the power while the GPU waits",
    "first_token_s": "time of a first token beyond its iterations",
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
    "host": "serving engine",
    "decode": "decode",
    "prefill": "prefill",
    "kv": "KV cache",
    "power": "power law",
}
NOTHING = 0.005  # of an elasticity: it would be shown as 0.00
_METRICS = {"usd": "usd_per_h", "power": "power_w"}  # of an objective, where it is not tokens per joule


def metric_of(objective: object) -> str:
    """The metric to rank inputs for, where none is asked for: what a plan was chosen by, as far as it is a metric."""
    return _METRICS.get(objective, "tok_per_j") if isinstance(objective, str) else "tok_per_j"


def sensitivity_table(document: Mapping[str, Any]) -> RenderableType:
    """The metric shown, input by input; then every metric, give or take; then what limits and thresholds are worth."""
    name = document["shown"]["metric"]
    title = QUANTITIES[name].title
    ranked = document["elasticities"][name]
    parts: list[RenderableType] = []
    plan = document["plan"]
    about = f"{plan['workload']['name']} at {plan['workload']['arrival_rate_per_s']:,.6g} requests/s"
    parts.append(Text(f"{about}: {_takeaway(document)}", style="bold"))
    if ranked:
        of = f"What moves {title} [{QUANTITIES[name].unit}]: % more of it for 1 % more of an input (+ is {_PLUS[name]})"
        table = new_table("Input", "Value in SI units", "% per %", title=of)
        for e in _largest(document):
            table.add_row(input_label(e["input"]), f"{e['value']:.4g}", f"{e['elasticity']:+.3f}")
        parts.append(table)
    else:
        parts.append(f"No elasticity: {title} is 0 or infinite here.")
    parts += [_intervals(document["intervals"]), *map(Text, unbounded_said(document["intervals"])), _prices(document)]
    if document["thresholds"]:
        parts.append(_thresholds(document))
    quiet = len(ranked) - len(_largest(document))
    notes = [
        *([f"{quiet} more inputs move it less (--top)."] if quiet > 0 else []),
        f"{len(document['skipped'])} inputs at 0 or infinity have no elasticity. The fleet is as it is: nothing is "
        "sized anew. --json has every input by its path.",
        "Instances and slots are taken as real numbers; windows, gamma and lengths move traffic as a router of "
        "log-width 0.05 would.",
        "Intervals: errors of the engines' step, power and prefill alone; sampled and linear part near a limit. "
        "Whether limits hold: the errors of the laws of latency too.",
    ]
    parts.append(Text("\n".join(notes), style="dim"))
    return Group(*parts)


def _largest(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The elasticities to show: the first, without those that would be shown as 0.00, and without a PUE of 1, which
    says that no cooling is counted."""
    ranked = document["elasticities"][document["shown"]["metric"]]
    counted = [e for e in ranked if not (e["input"].endswith("site.pue") and e["value"] == 1.0)]
    return [e for e in counted[: document["shown"]["top"]] if abs(e["elasticity"]) >= NOTHING]


def input_label(path: str) -> str:
    """'pools.0.engine.decode.base_s' -> 'pool 1: decode, step at batch 0'; 'surroundings.site.pue' -> 'PUE'."""
    keys = path.split(".")
    of_pool = keys[0] == "pools"
    where = f"pool {int(keys[1]) + 1}: " if of_pool else ""
    parts = [_PARTS[key] for key in keys[3:-1] if key in _PARTS] if of_pool else []
    last = INPUTS.get(".".join(keys[-2:])) or INPUTS.get(keys[-1], keys[-1].replace("_", " "))
    return where + ", ".join([*dict.fromkeys(parts), last])


def _takeaway(document: Mapping[str, Any]) -> str:
    name = document["shown"]["metric"]
    of, shown = document["intervals"]["metrics"][name], QUANTITIES[name]
    value, low, high = (number(x, shown.si) for x in (of["value"], *of["sampled"]))
    within = f"between {low} and {high} with {percent(document['intervals']['level'])} probability"
    within = "whatever the engines' errors" if low == high == value else within
    return (
        f"{sentence(shown.title)} {value} {shown.unit}, {within}; all latency limits hold with "
        f"{percent(document['intervals']['hold_probability'])} probability."
    )


def _intervals(intervals: Mapping[str, Any]) -> RenderableType:
    title = f"{percent(intervals['level'])} intervals ({intervals['n_samples']:,} draws of the engines' errors)"
    table = new_table("Metric", "Value", "Sampled", "Linear", "", title=title)
    for name, of in intervals["metrics"].items():
        shown = QUANTITIES[name]
        ends = [" to ".join(number(end, shown.si) for end in of[how]) for how in ("sampled", "linear")]
        table.add_row(shown.title, number(of["value"], shown.si), *ends, shown.unit)
    return table


def unbounded_said(intervals: Mapping[str, Any]) -> list[str]:
    """What an end of an interval that is infinite means, where one is."""
    ends = [end for of in intervals["metrics"].values() for how in ("sampled", "linear") for end in of[how]]
    if all(end is not None and math.isfinite(end) for end in ends):
        return []
    return [
        f"{sentence(UNBOUNDED)}: with engines as slow as they may be, a pool gets more requests than it can serve, and "
        "its queue grows without end."
    ]


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
            one_more(price, objective),
            f"{price['elasticity']:+.3f}" if known else "-",
        ]
        if checked:
            row.append("-" if price["reoptimized"] is None else f"{price['reoptimized']:+.3f}")
        table.add_row(*row)
    return table


def _thresholds(document: Mapping[str, Any]) -> RenderableType:
    of_energy = document["objective"] == "tok_per_j"
    as_sized = ["As sized"] if of_energy else []  # with the instances there are, only energy moves
    title = f"Thresholds: {goal_of(document['objective']).quantity.title} in % per % of the window"
    table = new_table("Window", *as_sized, "Sized anew", "Whole fleets sized anew", title=title)
    for value in document["thresholds"]:
        slopes = [value["as_sized"], value["resized"]] if of_energy else [value["resized"]]
        table.add_row(
            f"{value['window_tokens']:,.0f} tokens", *(f"{slope:+.3f}" for slope in slopes), moves_said(value["moves"])
        )
    return table


def one_more(price: Mapping[str, Any], objective: Quantity) -> str:
    """What one more unit of a limit is worth, of a shadow price."""
    if price["per_unit"] is None:
        return "not held"
    limit = limit_quantity(price["limit"])
    worth = price["per_unit"] * limit.si / objective.si
    return f"{signed(worth)} per {limit.unit}" if worth else "0"


def moves_said(moves: Sequence[Mapping[str, Any]]) -> str:
    """Other places of a threshold, and what they change."""
    return ", ".join(
        f"{move['window_tokens']:,.0f}: {'not held' if move['change'] is None else format(move['change'], '+.2%')}"
        for move in moves
    )


@styled
def tornado_figure(document: Mapping[str, Any]) -> Figure:
    """The largest elasticities of the metric shown, as bars either side of nought."""
    name = document["shown"]["metric"]
    shown = QUANTITIES[name]
    ranked = _largest(document)
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
    signs = [e["elasticity"] > 0 for e in ranked]
    axes.set_xlim(*(side * (reach if up in signs else 0.05 * reach) for side, up in ((-1, False), (1, True))))
    axes.axvline(0.0, color=MUTED, linewidth=1.0)
    axes.set_xlabel(f"% more {shown.title} for 1 % more of the input")
    plain_numbers(axes.xaxis)
    say(figure, _tornado_takeaway(document, ranked))
    grid_along(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _tornado_takeaway(document: Mapping[str, Any], ranked: Sequence[Mapping[str, Any]]) -> str:
    name = document["shown"]["metric"]
    of, shown = document["intervals"]["metrics"][name], QUANTITIES[name]
    value, low, high = (number(x, shown.si) for x in (of["value"], *of["sampled"]))
    first = f"{input_label(ranked[0]['input'])} moves {shown.title} most" if ranked else f"nothing moves {shown.title}"
    within = "whatever" if low == high == value else f"{low} to {high} with"
    return f"{document['plan']['workload']['name']}, {first};\n{value} {shown.unit}, {within} the engines' errors"


def robust_table(found: Mapping[str, Any]) -> RenderableType:
    """By which rule the plan was chosen, from which candidates, and what becomes of it scenario by scenario."""
    title = f"Robust: {_measure(found)} of tok/J over {found['n_scenarios']:,} draws of the errors of engines and laws"
    several = len(found["workloads"]) > 1
    if several:
        title += f" x {', '.join(found['workloads'])}"
    names = [f"in {name}" for name in found["workloads"]] if several else []
    columns = ("", "Windows of", "Sized for", "Score", "Mean", "As planned", "Holds", *names, "GPUs", "Windows")
    table = new_table(*columns, title=title)
    for each in found["candidates"]:
        marks = [name for name in ("chosen", "nominal") if _named(each) == _named(found[name])]
        table.add_row(
            ", ".join(marks),
            each["origin"],
            "as found" if each["sized_for"] is None else percent(each["sized_for"]),
            *(f"{each[name]:.4g}" for name in ("score", "mean_tok_per_j", "tok_per_j")),
            percent(each["hold_share"]),
            *(percent(share) for share in (each["hold_share_by_workload"] if several else ())),
            f"{each['n_gpus']:,}",
            " / ".join(f"{window:,.0f}" for window in each["window_tokens"]),
        )
    return Group(Text(rule_said(found)), table, _scenarios_table(found["scenarios"]))


def _named(candidate: Mapping[str, Any]) -> tuple[str, float | None]:
    return candidate["origin"], candidate["sized_for"]


def _measure(found: Mapping[str, Any]) -> str:
    level = percent(found["level"])
    return f"{level} quantile" if found["measure"] == "quantile" else f"CVaR of the worst {level}"


def rule_said(found: Mapping[str, Any]) -> str:
    """Why the plan was chosen."""
    chosen, share = found["chosen"], percent(1.0 - found["level"])
    held, planned = percent(chosen["hold_share"]), percent(found["nominal"]["hold_share"])
    able = sum(each["hold_share"] >= 1.0 - found["level"] - 1e-9 for each in found["candidates"])
    if found["rule"] == "score":
        why = f"of {able} that hold in {share} of the scenarios, it has the best {_measure(found)} of tok/J"
    else:
        why = f"none holds in {share} of the scenarios, and it holds in most"
    return (
        f"Chosen of {len(found['candidates'])} candidates that hold their limits as planned: {why}. It holds "
        f"in {held}, the plan for engines and laws as they stand in {planned}."
    )


def _scenarios_table(scenarios: Mapping[str, Sequence[Mapping[str, Any]]]) -> RenderableType:
    """What becomes of the fleets in a few scenarios: whether the limits hold, and tokens per joule."""
    fleets = [name for name in ("chosen", "nominal", "one_pool") if name in scenarios]
    title = "Scenario by scenario: whether the limits hold, and tok/J (0: overloaded)"
    heads = {"chosen": "Chosen", "nominal": "As planned", "one_pool": "One pool"}
    table = new_table("Traffic", "Slower by", *(heads[name] for name in fleets), title=title)
    for row in zip(*(scenarios[name] for name in fleets), strict=True):
        cells = [f"{'holds' if each['holds'] else 'fails'}, {each['tok_per_j']:.3g}" for each in row]
        table.add_row(row[0]["workload"], f"{row[0]['sigmas']:g} sigma" if row[0]["sigmas"] else "as it stands", *cells)
    return table


def robust_plan_table(document: Mapping[str, Any]) -> RenderableType:
    """The chosen plan, then what it was chosen from."""
    return Group(plan_table(document), robust_table(document["robust"]))
