"""The laws beside a simulation: the table and the figure of a simulation document."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleetopt_jax._simulate.simulate import MOST_REPLICATIONS
from fleetopt_jax.core.units import KW, MS
from fleetopt_jax.documents.simulation import TOLERANCE, TOLERANCE_ELSE
from fleetopt_jax.laws.ttft import TAIL_PROBABILITY
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
from fleetopt_jax.report.words import UNBOUNDED, listed, margin, ms, percent, sentence, slope_said

WITHIN = 1.0 - TAIL_PROBABILITY  # of the requests must be within their limit
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
    "prefix_hit_frac": ("found in the cache, %", "{:.1f}", 0.01),
}


def simulation_table(document: Mapping[str, Any]) -> RenderableType:
    """The verdict, the metrics of the fleet, those of each pool where there are several."""
    rate = document["workload"]["arrival_rate_per_s"]
    first, *others = [*limits_lines(document), laws_said(document), *_asked_lines(document)]
    parts: list[RenderableType] = [Text(first, style="bold"), *map(Text, others)]
    parts.append(_metrics_table("Fleet", document["metrics"]))
    if len(document["pools"]) > 1:
        parts += [
            _metrics_table(f"Pool {k} of {pool['window_tokens']:,} tokens", pool["metrics"])
            for k, pool in enumerate(document["pools"], 1)
        ]
    n = document["n_replications"]
    counts = (
        f"{document['n_arrivals']:,} requests in {n} replication{'s' if n != 1 else ''} at {rate:,.6g}/s: "
        f"{document['n_completed']:,} completed, "
        f"{document['n_rejected']:,} rejected, {document['n_in_system']:,} still there; "
        f"{document['n_preemptions']:,} preemptions, {document['n_iterations']:,} iterations. "
        f"Statistics over {document['window_s']:,.0f} s after a warm-up of {document['warm_up_s']:,.0f} s, "
        f"state of {document['memory_bytes'] / 1e6:,.0f} MB."
    )
    return Group(*parts, Text(counts + outages_said(document), style="dim"))


def outages_said(document: Mapping[str, Any]) -> str:
    """What was down while it was simulated, where anything was."""
    said = ""
    if "down" in document:
        said = f" {document['down']:,} of the instances of every pool are left out, by the laws too."
    if found := document.get("outages"):
        up = [f"{100.0 * share:.4g} %" for share in found["up_frac"]]
        of = "their" if len(up) == 1 else "the pools'"
        said += f" {found['n_outages']:,} failures of instances, which were up {listed(up)} of {of} time"
        said += "; by the laws always."
    return said


def limits_lines(document: Mapping[str, Any]) -> list[str]:
    """Whether the limits hold: first which fail, pool by pool and by how much, then what is too noisy to tell and what
    would tell."""
    failed, unclear = missed(document), unclear_said(document)
    lines = [f"The limits do not hold in simulation: {failed}."] if failed else []
    if unclear:
        lines.append(f"{sentence(unclear)}.")
    return lines or ["The limits hold in simulation."]


def missed(document: Mapping[str, Any]) -> str:
    """Which pools, or the whole fleet where all requests are judged together, surely miss which limit, and by how
    much."""
    return "; ".join(_limit_said(each, document) for each in document["limits"] if each["reading"] == "fails")


def unclear_said(document: Mapping[str, Any]) -> str:
    """Of which limits the intervals cannot say whether they hold, and what would."""
    found = [each for each in document["limits"] if each["reading"] == "unclear"]
    if not found:
        return ""
    said = "; ".join(_limit_said(each, document) for each in found)
    needed = [each["suffices_replications"] for each in found]
    question = f"{_too(document)} whether the limits hold in simulation"
    return f"{question}: {said}; {_suffices_said(document, needed)}"


def laws_said(document: Mapping[str, Any]) -> str:
    """Which metrics of the fleet the laws get, which they do not, and of which nobody can tell."""
    metrics = {name: each for name, each in document["metrics"].items() if name in SHOWN}
    off, unclear = (
        [name for name, each in metrics.items() if reading_of(each) == word] for word in ("differs", "unclear")
    )
    if not off and not unclear:
        return "The laws agree with the simulation."
    parts = [f"the laws are off in {_names(off)}"] if off else []
    if unclear:
        needed = [metrics[name]["suffices_replications"] for name in unclear]
        who, enough = "they" if off else "the laws", _suffices_said(document, needed)
        parts.append(f"{_too(document)} whether {who} agree in {_names(unclear)}: {enough}")
    return f"{sentence('; '.join(parts))}."


def _too(document: Mapping[str, Any]) -> str:
    """What keeps a simulation from telling: it began empty and ended too soon, or its replications differ."""
    return f"too {'noisy' if document['warmed_up'] else 'short'} to tell"


def reading_of(each: Mapping[str, Any]) -> str:
    """How a metric's law was found: agrees, differs or unclear; '' where there is no law. Files of before have no
    reading."""
    return each.get("reading") or {True: "agrees", False: "differs"}.get(each["agrees"], "")


def bursts_said(document: Mapping[str, Any]) -> str:
    """What the bursts of a trace did to the P99 TTFT, beside Poisson arrivals of the same rate and beside the laws."""
    found = document["burstiness"]
    trace, poisson, ratio = (found[name] for name in ("trace_ttft_p99_s", "poisson_ttft_p99_s", "ratio"))
    law = document["metrics"]["ttft_p99_s"]["analytic"]
    said = (
        f"Bursts: P99 TTFT is {ms(trace['simulated'])} at the trace's own time stamps (squared CV of the gaps "
        f"{found['gap_scv']:.3g}) and {ms(poisson['simulated'])} where the same requests arrive as a Poisson process "
        "of the same rate"
    )
    low, high = ratio["ci95"]
    if low is None or high is None or ratio["simulated"] is None:
        did = " (too noisy to tell what they did: two replications at least have an interval)"
        did = did if document["n_replications"] < 2 else ""
    elif low <= 1.0 <= high:
        did = f": {ratio['simulated']:.2f} times ({low:.2f} to {high:.2f}), too noisy to tell whether bursts matter"
    else:
        word = "lengthen" if low > 1.0 else "shorten"
        did = f": they {word} it to {ratio['simulated']:.2f} times ({low:.2f} to {high:.2f})"
    return f"{said}{did}; the laws say {ms(law)}."


def _asked_lines(document: Mapping[str, Any]) -> list[str]:
    """What came of `--until`, and of the arrivals of a trace."""
    lines = []
    if until := document.get("until"):
        asked, n = percent(until["half_width_frac"], 1), document["n_replications"]
        widest = "without bound" if until["reached_frac"] is None else percent(until["reached_frac"], 1)
        said = f"The intervals of tokens per joule and P99 TTFT are {widest} of the mean to a side"
        short = "" if until["reached"] else f", not the {asked} asked for: these are the most replications there are"
        lines.append(f"{said} after {n} replications{short}.")
    return lines + ([bursts_said(document)] if "burstiness" in document else [])


def _limit_said(each: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """'pool 2 answers 98.10 % (97.52 to 98.61 %) of its requests within the TTFT of 500 ms, 99 % must be'."""
    slo, who = document["slo"], f"pool {each['pool']}" if each["pool"] else "the fleet"
    value, (low, high) = each["simulated"], each["ci95"]
    if each["limit"] == "rejected_frac":
        return f"{document['n_rejected']:,} of {document['n_arrivals']:,} requests fit no pool"
    if each["limit"] == "itl_s":
        between = f" ({ms(low)} to {ms(high)})" if low is not None and high is not None else ""
        return (
            f"{who} has a mean ITL of {ms(value)}{between}, {margin(value, each['allowed'])} of {ms(each['allowed'])}"
        )
    if each["reading"] == "fails":
        value = min(value, WITHIN - 0.0001)  # not rounded up to what it misses
    between = f" ({percent(low, 2)} to {percent(high, 2)})" if low is not None and high is not None else ""
    limit = ms(slo["ttft_p99_s"]) + slope_said(slo["ttft_s_per_token"])
    answered = f"{who} answers {percent(value, 2)}{between} of its requests"
    return f"{answered} within the TTFT of {limit}, {percent(WITHIN)} must be"


def _suffices_said(document: Mapping[str, Any], needed: Sequence[int | None]) -> str:
    """What would tell, as options; `needed` are replications, None where their spread does not say."""
    now = document["n_replications"]
    if not document["warmed_up"]:
        return f"--requests {_rounded_up(document['enough_requests'])} would last for the warm-up and a window"
    if now < 2:
        return "one replication has no interval: --replications 4"
    known = [n for n in needed if n is not None]
    if not known:
        return "the mean is so near the edge that no number of replications worth running would tell"
    n, some = max(known), "" if len(known) == len(needed) else " most of it"
    if n <= MOST_REPLICATIONS:
        return f"about {n} replications would tell{some}: --replications {n}"
    of_each = document["n_arrivals"] / now * n / MOST_REPLICATIONS
    requests = _rounded_up(of_each)
    return f"about {n:,} replications would tell{some}: --replications {MOST_REPLICATIONS} --requests {requests}"


def _rounded_up(n: float) -> int:
    """To two digits."""
    step = 10 ** max(0, math.floor(math.log10(max(n, 1))) - 1)
    return math.ceil(n / step) * step


def _names(names: Sequence[str]) -> str:
    return listed([SHOWN[name][0].split(",")[0] for name in names])


def verified_plan_table(document: Mapping[str, Any]) -> RenderableType:
    """The plan, and what the simulation said of it."""
    verified = document["verified"]
    metrics = _metrics_table("Fleet", verified["metrics"])
    unclear = unclear_said(verified | {"slo": document["slo"]})
    doubt = [Text(f"{sentence(unclear)}.")] if unclear else []
    return Group(plan_table(document), Text(verified_said(document), style="bold"), *doubt, metrics)


def verified_said(document: Mapping[str, Any]) -> str:
    """That the fleet holds, with its interval, how many were tried, and what became of the laws' plan."""
    verified, slo = document["verified"], document["slo"]
    tried = f"{verified['n_tried']:,} fleet{'s' if verified['n_tried'] != 1 else ''} tried"
    reached = verified["metrics"]["ttft_p99_s"]
    low, high = reached["ci95"]
    between = f" ({ms(low)} to {ms(high)})" if low is not None and high is not None else ""
    limit = f"{ms(slo['ttft_p99_s'])}{slope_said(slo['ttft_s_per_token'])}"
    said = f"P99 TTFT {ms(reached['simulated'])}{between}, limit {limit}"
    if not verified["held"]:
        return f"No fleet was seen to hold the limits in simulation, {tried}; of the one shown {said}."
    return f"Verified by simulation: the limits hold, {said}; {tried}. {_against_laws(document)}"


def _against_laws(document: Mapping[str, Any]) -> str:
    """What the laws' plan was, whether it holds in simulation, and what verification changed."""
    verified, laws = document["verified"], document["verified"]["laws"]
    own = {name: [pool[name] for pool in document["pools"]] for name in ("window_tokens", "gpu", "n_instances")}
    if all(own[name] == laws[name] for name in own):
        return "It is the laws' plan as it stands."
    alike = (each for each in verified["tried"] if all(each[name] == laws[name] for name in own))
    found = next((each["verdict"] for each in alike), "")
    held = {"fails": " and does not hold", "unclear": " and is too close to tell", "holds": " and holds, too"}.get(
        found, ""
    )
    plan = f"{_instances(laws['n_instances'])}, {laws['n_gpus']:,} GPUs"
    if own["window_tokens"] != laws["window_tokens"] or own["gpu"] != laws["gpu"]:
        return f"The laws' plan is another{held}: {plan}, pools up to {_tokens(laws['window_tokens'])}."
    changes = [now - then for now, then in zip(own["n_instances"], laws["n_instances"], strict=True)]
    parts = [
        f"pool {k} takes {abs(change):,} instance{'s' if abs(change) != 1 else ''} {'more' if change > 0 else 'fewer'}"
        for k, change in enumerate(changes, 1)
        if change
    ]
    return f"The laws' plan has {plan}{held}: {listed(parts)}."


def _instances(counts: Sequence[int]) -> str:
    return f"{' + '.join(f'{n:,}' for n in counts)} instance{'s' if sum(counts) != 1 else ''}"


def _tokens(windows: Sequence[int]) -> str:
    return f"{listed([f'{window:,}' for window in windows])} tokens"


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
        shown(analytic) if reading_of(each) else "",
        shown(simulated),
        "" if low is None else f"{shown(low)} to {shown(high)}",
        f"{100 * (analytic / simulated - 1):+.1f} %" if analytic is not None and simulated else "",
        {"differs": "differs", "unclear": "cannot tell"}.get(reading_of(each), ""),
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
    readings = {name: reading_of(document["metrics"].get(name, {"agrees": None})) for name in SHOWN}
    found, off, unclear = (
        [name for name, reading in readings.items() if reading in words]
        for words in (("agrees", "differs", "unclear"), ("differs",), ("unclear",))
    )
    said = f"{len(found) - len(off) - len(unclear)} of {len(found)} metrics of the fleet agree with the simulation"
    parts = [said, f"not {_names(off)}"] if off else [said]
    return ", ".join([*parts, f"too noisy to tell of {_names(unclear)}"] if unclear else parts)


def _ratio(each: Mapping[str, Any] | None) -> float | None:
    """Simulated over the laws' figure; None where one of them says nothing."""
    if each is None or not reading_of(each) or each["analytic"] in (None, 0) or each["simulated"] is None:
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
