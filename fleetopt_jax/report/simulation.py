"""The laws beside a simulation: the table and the figure of a simulation document."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleetopt_jax.core.units import KW, MS
from fleetopt_jax.documents.simulation import TOLERANCE, TOLERANCE_ELSE
from fleetopt_jax.laws.latency import TAIL_PROBABILITY
from fleetopt_jax.report.style import (
    GREEN,
    INK,
    MUTED,
    POOL_COLOURS,
    POOL_MARKERS,
    grid_along,
    new_figure,
    plain_numbers,
    say,
    styled,
)
from fleetopt_jax.report.tables import new_table, plan_table
from fleetopt_jax.report.words import UNBOUNDED, margin, ms, percent, slope_said

WITHIN = 1.0 - TAIL_PROBABILITY  # of the requests must be within their limit
SHARES = ("slo_attainment", "kv_occupancy")
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


def missed(document: Mapping[str, Any]) -> str:
    """Which pools, or the whole fleet where all requests are judged together, miss which limit, and by how much."""
    slo, pools = document["slo"], document["pools"]
    of_all, parts = slo["scope"] == "fleet" or len(pools) == 1, []
    judged = (
        [("the fleet", document["metrics"])]
        if of_all
        else [(f"pool {k}", pool["metrics"]) for k, pool in enumerate(pools, 1)]
    )
    for who, metrics in judged:
        share, itl = (metrics.get(name, {}).get("simulated") for name in ("slo_attainment", "itl_s"))
        if share is not None and share < WITHIN:
            limit = ms(slo["ttft_p99_s"]) + slope_said(slo["ttft_s_per_token"])
            short = percent(min(share, WITHIN - 0.0001), 2)
            parts.append(f"{who} answers {short} of its requests within the TTFT of {limit}, {percent(WITHIN)} must be")
        if slo["itl_s"] is not None and metrics and (itl is None or itl > slo["itl_s"]):
            parts.append(f"{who} has a mean ITL of {ms(itl)}, {margin(itl, slo['itl_s'])} of {ms(slo['itl_s'])}")
    if rejected := document["n_rejected"]:
        parts.append(f"{rejected:,} of {document['n_arrivals']:,} requests fit no pool")
    return "; ".join(parts)


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


def interval_of(name: str, low: float | None, high: float | None) -> tuple[float | None, float | None]:
    """An interval as it is shown: that of a share ends at nothing and at all."""
    if name not in SHARES or low is None or high is None:
        return low, high
    return max(low, 0.0), min(high, 1.0)


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

    low, high = interval_of(name, low, high)
    return [
        label,
        "" if each["agrees"] is None else shown(analytic),
        shown(simulated),
        "" if low is None else f"{shown(low)} to {shown(high)}",
        f"{100 * (analytic / simulated - 1):+.1f} %" if analytic is not None and simulated else "",
        "differs" if each["agrees"] is False else "",
    ]


RATIO_LIMITS = (0.5, 1.6)  # of the axis; what lies beyond has an arrow at its end, and its number
NEAR_LIMITS = (0.84, 1.21)  # that it reaches at least
Part = tuple[str, str, str, Mapping[str, Any]]  # title, colour, marker and metrics of the fleet, or of a pool


@styled
def agreement_figure(document: Mapping[str, Any]) -> Figure:
    """Simulated over the laws' figure of every metric, the fleet's and its pools', with 95 % intervals and the
    tolerance."""
    parts: list[Part] = [("fleet", INK, "o", document["metrics"])]
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
    reach = [x for *_, metrics in parts for name in names for x in (_ratio(metrics.get(name)), *_ends(metrics, name))]
    known = [x for x in reach if x is not None]
    limits = max(min([*known, NEAR_LIMITS[0]]), RATIO_LIMITS[0]), min(max([*known, NEAR_LIMITS[1]]), RATIO_LIMITS[1])
    axes.set_xlim(*limits)
    for i in range(len(parts)):
        _points(axes, names, i, parts)
    axes.axvline(1.0, color=MUTED, linewidth=1.0, zorder=0.9)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks(range(len(names)), [SHOWN[name][0].split(",")[0] for name in names])
    axes.set_xlabel("simulated over the laws' figure, 95 % interval")
    plain_numbers(axes.xaxis)
    grid_along(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=BESIDE if min([*known, 1.0]) < limits[0] else 4)
    figure.legend(loc="outside lower left", ncols=5)
    say(figure, f"{document['workload']['name']}: {agreement_takeaway(document)}")
    return figure


BESIDE = 34  # points that a number beside the axis takes


def agreement_takeaway(document: Mapping[str, Any]) -> str:
    """How many of the fleet's metrics the laws get, and which they do not."""
    compared = [name for name in SHOWN if document["metrics"].get(name, {}).get("agrees") is not None]
    off = [name for name in compared if not document["metrics"][name]["agrees"]]
    said = f"{len(compared) - len(off)} of {len(compared)} metrics of the fleet agree with the simulation"
    return f"{said}, not {' and '.join(SHOWN[name][0].split(',')[0] for name in off)}" if off else said


def _ratio(each: Mapping[str, Any] | None) -> float | None:
    """Simulated over the laws' figure; None where one of them says nothing."""
    if each is None or each["agrees"] is None or each["analytic"] in (None, 0) or each["simulated"] is None:
        return None
    return each["simulated"] / each["analytic"]


def _ends(metrics: Mapping[str, Any], name: str) -> list[float]:
    """The interval of a ratio, where it has one."""
    each = metrics.get(name)
    if _ratio(each) is None or each is None or None in each["ci95"]:
        return []
    return [end / each["analytic"] for end in each["ci95"]]


def _points(axes, names: list[str], i: int, parts: Sequence[Part]) -> None:
    """The ratios of one part with their intervals, within the axis."""
    title, colour, marker, metrics = parts[i]
    low, high = axes.get_xlim()
    label: str | None = title
    for row, name in enumerate(names):
        ratio = _ratio(metrics.get(name))
        if ratio is None:
            continue
        at = row + (i - (len(parts) - 1) / 2) * 0.8 / len(parts)
        ends = _ends(metrics, name)
        if ends and ends[0] < high and ends[1] > low:
            axes.plot([max(ends[0], low), min(ends[1], high)], [at, at], "-", color=colour, linewidth=1.6)
        look = {"color": colour, "markeredgecolor": INK, "markeredgewidth": 0.8, "linestyle": "none"}
        if low <= ratio <= high:
            axes.plot([ratio], [at], marker, label=label, clip_on=False, **look)
            for end in ends:
                if not low <= end <= high:
                    _beyond(axes, end, at, f"{end:.2g}", {"color": colour, "markersize": 5, "linestyle": "none"})
        else:
            _beyond(axes, ratio, at, f"{ratio:.2g}", look | {"label": label})
        label = None


def _beyond(axes, value: float, at: float, said: str, look: Mapping[str, Any]) -> None:
    """An arrow at the end of the axis that a value lies beyond, and its number beside the axis."""
    low, high = axes.get_xlim()
    side, end, arrow = (-1, low, "<") if value < low else (1, high, ">")
    axes.plot([end], [at], arrow, clip_on=False, **look)
    around = {"ha": "right" if side < 0 else "left", "va": "center", "fontsize": 8.5, "annotation_clip": False}
    axes.annotate(said, (end, at), xytext=(6 * side, 0), textcoords="offset points", **around)
