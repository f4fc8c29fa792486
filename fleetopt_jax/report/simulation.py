"""Analytic beside simulated: the table and the figure of a simulation document."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleetopt_jax.core.units import KW, MS
from fleetopt_jax.documents.simulation import TOLERANCE, TOLERANCE_ELSE
from fleetopt_jax.report.style import GREEN, INK, MUTED, POOL_COLOURS, POOL_MARKERS, grid_along, new_figure, say, styled
from fleetopt_jax.report.tables import new_table, plan_table
from fleetopt_jax.report.words import UNBOUNDED

SHOWN = {
    "tok_per_j": ("tokens per joule", "{:.3f}", 1.0),
    "output_tok_per_s": ("output tokens/s", "{:,.0f}", 1.0),
    "power_w": ("power, kW", "{:,.1f}", KW),
    "n_active": ("in flight per instance", "{:,.1f}", 1.0),
    "ttft_p50_s": ("median TTFT, ms", "{:,.0f}", MS),
    "ttft_p99_s": ("P99 TTFT, ms", "{:,.0f}", MS),
    "itl_s": ("mean ITL, ms", "{:,.1f}", MS),
    "itl_p99_s": ("P99 ITL, ms", "{:,.1f}", MS),
    "e2e_p50_s": ("median end to end, s", "{:,.1f}", 1.0),
    "e2e_p99_s": ("P99 end to end, s", "{:,.1f}", 1.0),
    "slo_attainment": ("TTFT within limit, %", "{:.2f}", 0.01),
    "kv_occupancy": ("KV cache in use, %", "{:.1f}", 0.01),
}


def simulation_table(document: Mapping[str, Any]) -> RenderableType:
    """The verdict, the metrics of the fleet, those of each pool where there are several."""
    rate = document["workload"]["arrival_rate_per_s"]
    off = [name for name, each in document["metrics"].items() if each["agrees"] is False and name in SHOWN]
    said = f"the laws are off in {', '.join(SHOWN[name][0].split(',')[0] for name in off)}" if off else "the laws agree"
    answer = Text.assemble(
        ("The limits hold" if document["slo_held"] else "The limits do not hold", "bold"),
        f" in simulation, and {said}.",
    )
    parts: list[RenderableType] = [answer, _metrics_table("Fleet", document["metrics"])]
    if len(document["pools"]) > 1:
        parts += [
            _metrics_table(f"Pool of {pool['window_tokens']:,} tokens", pool["metrics"]) for pool in document["pools"]
        ]
    counts = (
        f"{document['n_arrivals']:,} requests at {rate:,.6g}/s: {document['n_completed']:,} completed, "
        f"{document['n_rejected']:,} rejected, {document['n_in_system']:,} still there; "
        f"{document['n_preemptions']:,} preemptions, {document['n_iterations']:,} iterations. "
        f"Statistics over {document['window_s']:,.0f} s after a warm-up of {document['warm_up_s']:,.0f} s, "
        f"state of {document['memory_bytes'] / 1e6:,.0f} MB."
    )
    return Group(*parts, Text(counts, style="dim"))


def verified_plan_table(document: Mapping[str, Any]) -> RenderableType:
    """The plan, and what the simulation said of it."""
    verified = document["verified"]
    added = verified["instances_added"]
    said = f"{added} instance{'s' if added != 1 else ''} added until the simulated limits held"
    if not verified["held"]:
        said = f"the limits do not hold even with {added} instances more"
    elif not added:
        said = "the limits hold as planned"
    metrics = _metrics_table("Fleet", verified["metrics"])
    return Group(plan_table(document), Text(f"Verified by simulation: {said}.", style="bold"), metrics)


def _metrics_table(title: str, metrics: dict[str, dict[str, Any]]) -> Table:
    table = new_table(title, "laws", "simulated", "95 % interval", "laws against it", "")
    for name in SHOWN:
        if name in metrics:
            table.add_row(*_row(name, metrics[name]))
    return table


def _row(name: str, each: Mapping[str, Any]) -> list[str]:
    label, pattern, unit = SHOWN[name]
    analytic, simulated, (low, high) = each["analytic"], each["simulated"], each["ci95"]

    def shown(value: float | None) -> str:
        return UNBOUNDED if value is None else pattern.format(value / unit)

    return [
        label,
        "" if each["agrees"] is None else shown(analytic),
        shown(simulated),
        "" if low is None else f"{shown(low)} to {shown(high)}",
        f"{100 * (analytic / simulated - 1):+.1f} %" if analytic is not None and simulated else "",
        "differs" if each["agrees"] is False else "",
    ]


RATIO_LIMITS = (0.5, 1.6)  # of the axis; what lies beyond is marked at its end


@styled
def agreement_figure(document: Mapping[str, Any]) -> Figure:
    """Simulated over analytic of every metric, the fleet's and its pools', with 95 % intervals and the tolerance."""
    parts = [("fleet", INK, "o", document["metrics"])]
    if len(document["pools"]) > 1:
        parts += [
            (f"pool {k + 1}", POOL_COLOURS[k % 6], POOL_MARKERS[k % 6], pool["metrics"])
            for k, pool in enumerate(document["pools"])
        ]
    names = [name for name in SHOWN if any(_ratio(metrics.get(name)) for *_, metrics in parts)]
    figure = new_figure(9.2, 1.9 + (0.2 + 0.13 * len(parts)) * max(len(names), 2))
    axes = figure.subplots()
    for row, name in enumerate(names):
        tolerance = TOLERANCE.get(name, TOLERANCE_ELSE)
        low, high = 1 / (1 + tolerance), 1 / (1 - tolerance)
        label = "tolerance" if row == 0 else None
        axes.barh(row, high - low, left=low, height=0.92, color=GREEN, alpha=0.22, linewidth=0, label=label)
    beyond = [_points(axes, names, i, parts) for i in range(len(parts))]
    axes.axvline(1.0, color=MUTED, linewidth=1.0, zorder=0.9)
    reach = [ratio for ratios in beyond for ratio in ratios]
    low, high = max(min([0.87, *reach]) - 0.03, RATIO_LIMITS[0]), min(max([1.18, *reach]) + 0.03, RATIO_LIMITS[1])
    axes.set_xlim(low, high)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks(range(len(names)), [SHOWN[name][0].split(",")[0] for name in names])
    axes.set_xlabel("simulated over analytic, 95 % interval")
    grid_along(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower left", ncols=4)
    say(figure, f"{document['workload']['name']}: {agreement_takeaway(document)}")
    return figure


def agreement_takeaway(document: Mapping[str, Any]) -> str:
    """How many of the fleet's metrics the laws get, and which they do not."""
    compared = [name for name in SHOWN if document["metrics"].get(name, {}).get("agrees") is not None]
    off = [name for name in compared if not document["metrics"][name]["agrees"]]
    said = f"{len(compared) - len(off)} of {len(compared)} metrics of the fleet agree with the simulation"
    return f"{said}, not {' and '.join(SHOWN[name][0].split(',')[0] for name in off)}" if off else said


def _ratio(each: Mapping[str, Any] | None) -> float | None:
    """Simulated over analytic; None where one of them says nothing."""
    if each is None or each["agrees"] is None or each["analytic"] in (None, 0) or each["simulated"] is None:
        return None
    return each["simulated"] / each["analytic"]


def _points(axes, names: list[str], i: int, parts: list[tuple[str, str, str, dict[str, Any]]]) -> list[float]:
    """The ratios of one part with their intervals; returns what the axis should reach."""
    title, colour, marker, metrics = parts[i]
    reach: list[float] = []
    label: str | None = title
    for row, name in enumerate(names):
        ratio = _ratio(metrics.get(name))
        if ratio is None:
            continue
        at = row + (i - (len(parts) - 1) / 2) * 0.8 / len(parts)
        ends = [end / metrics[name]["analytic"] for end in metrics[name]["ci95"] if end is not None]
        seen = min(max(ratio, RATIO_LIMITS[0]), RATIO_LIMITS[1])
        if len(ends) == 2:
            axes.plot(ends, [at, at], "-", color=colour, linewidth=1.6)
        look = {"color": colour, "markeredgecolor": INK, "markeredgewidth": 0.8, "linestyle": "none"}
        if seen == ratio:
            axes.plot([ratio], [at], marker, label=label, **look)
        else:
            axes.plot([seen], [at], "<" if ratio < seen else ">", label=label, clip_on=False, **look)
            side = 1 if ratio < seen else -1
            look = {"ha": "left" if side == 1 else "right", "va": "center", "fontsize": 10}
            axes.annotate(f"{ratio:.2g}", (seen, at), xytext=(9 * side, 0), textcoords="offset points", **look)
        reach += [seen, *(min(max(end, 0.7 * seen), 1.3 * seen) for end in ends)]
        label = None
    return reach
