"""Which requests go to which pool, and what each pool takes of the fleet."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from fleetopt_jax.core.units import KW
from fleetopt_jax.report.style import (
    INK,
    MUTED,
    PAPER,
    POOL_COLOURS,
    POOL_HATCHES,
    log_values,
    new_figure,
    plain_numbers,
    say,
    styled,
    ticks_at,
)
from fleetopt_jax.report.words import percent, pool_edges

N_BINS = 72
LETTER_FRAC = 0.0125  # width of a letter of the labels over the width of the map


@styled
def pool_map_figure(plan: Mapping[str, Any], total_tokens: ArrayLike, weight: ArrayLike) -> Figure:
    """Requests by total length [tokens], coloured by pool, and each pool's share of requests, GPUs and power.

    `plan` is the document of `fleetopt optimize` or `evaluate`; lengths and weights are those of its workload.
    """
    pools, edges = plan["pools"], pool_edges(plan)
    total, share = np.asarray(total_tokens, dtype=float), np.asarray(weight, dtype=float)
    total, share = total[share > 0], share[share > 0] / share.sum()
    figure = new_figure(9.2, 4.6 + 0.36 * len(pools))
    panels = figure.subplot_mosaic(
        [["map"] * 3, ["requests", "gpus", "power"]], height_ratios=(3.2, 0.5 + 0.36 * len(pools))
    )
    _map(panels["map"], pools, edges, total, share)
    rows = _label_edges(panels["map"], pools, edges)
    figure.set_figheight(figure.get_figheight() + 0.27 * (rows - 1))
    shares = _shares(plan)
    reach = max(part for _, _, parts, _ in shares for part in parts)
    for name, title, parts, texts in shares:
        _bars(panels[name], title, parts, texts, reach, label_pools=name == "requests")
    say(figure, map_takeaway(plan))
    return figure


def map_takeaway(plan: Mapping[str, Any]) -> str:
    """What the longest requests take."""
    name, pools = plan["workload"]["name"], plan["pools"]
    if len(pools) == 1:
        return f"{name}: one pool serves all requests, up to {pool_edges(plan)[0]:,.0f} tokens"
    first, power_w = pools[0], plan["metrics"]["power_w"]
    return (
        f"{name}: pool 1, with the shortest {_percent(first['traffic_frac'])} of the requests, takes "
        f"{_percent(first['power_w'] / power_w)} of the power"
    )


def _map(
    axes, pools: Sequence[Mapping[str, Any]], edges: Sequence[float], total: np.ndarray, share: np.ndarray
) -> None:
    low, high = min(total.min(), edges[0]), max(total.max(), edges[-1])
    spread = max((high / low) ** 0.02, 1.05)
    low, high = low / spread, high * spread
    bins = _bins(low, edges, high)
    of_pool = np.minimum(np.searchsorted(edges, total, side="left"), len(pools) - 1)
    base = np.zeros(len(bins) - 1)
    for k in range(len(pools)):
        height = 100 * np.histogram(total, bins, weights=share * (of_pool == k))[0]
        look = {"facecolor": POOL_COLOURS[k % 6], "edgecolor": PAPER, "hatch": POOL_HATCHES[k % 6], "linewidth": 0}
        axes.stairs(base + height, bins, baseline=base, fill=True, **look)
        base = base + height
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1.12 * base.max())
    ticks_at(axes.xaxis, log_values(low, high))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    shaded = "\nshaded: prompts are shrunk to the window" if any(pool["gamma"] > 1 for pool in pools) else ""
    axes.set_xlabel(f"total length of a request, prompt and output [tokens]{shaded}")
    plain_numbers(axes.yaxis)
    axes.set_ylabel("requests [%]")


def _bins(low: float, edges: Sequence[float], high: float) -> np.ndarray:
    """Ends of bins alike in log-length, but that one ends at every threshold: no bin is of two pools."""
    width = np.log(high / low) / N_BINS
    stops = np.array([low, *(edge * (1 + 1e-9) for edge in edges), high])  # a request at a threshold is below it
    spans = [
        np.geomspace(start, stop, max(1, round(np.log(stop / start) / width)), endpoint=False)
        for start, stop in pairwise(stops)
    ]
    return np.concatenate([*spans, [high]])


def _label_edges(axes, pools: Sequence[Mapping[str, Any]], edges: Sequence[float]) -> int:
    """A line at the end of each pool, its label to the left above the map; returns the rows the labels take."""
    low, high = np.log(axes.get_xlim())
    lines: list[tuple[float, int]] = []  # (place as a share of the width, row of the label)
    for k, (pool, edge) in enumerate(zip(pools, edges)):
        at = (np.log(edge) - low) / (high - low)
        compressed = f" ({pool['gamma']:g} x {pool['window_tokens']:,})" if pool["gamma"] > 1 else ""
        text = f"{'all' if len(pools) == 1 else f'pool {k + 1}:'} up to {edge:,.0f}{compressed}"
        width = LETTER_FRAC * len(text)
        row = max((below + 1 for line, below in lines if line > at - width), default=0)  # no line through a label
        lines.append((at, row))
        top = 1.09 + 0.085 * row
        axes.plot(
            [edge, edge], [0, top], "--", color=INK, linewidth=1.1, transform=axes.get_xaxis_transform(), clip_on=False
        )
        axes.text(at - 0.005, top, text, transform=axes.transAxes, ha="right", va="top", fontsize=10.5)
        if pool["gamma"] > 1:
            axes.axvspan(pool["window_tokens"], edge, color=MUTED, alpha=0.2, linewidth=0, zorder=0)
    return 1 + max(row for _, row in lines)


def _shares(plan: Mapping[str, Any]) -> list[tuple[str, str, list[float], list[str]]]:
    """(panel, title, shares, labels) of what the pools share."""
    pools, metrics = plan["pools"], plan["metrics"]
    scope = "\n(one GPU of each instance)" if plan["power_scope"] == "one_gpu_per_instance" else ""
    return [
        ("requests", "Share of requests", [pool["traffic_frac"] for pool in pools], [""] * len(pools)),
        (
            "gpus",
            f"Share of {metrics['n_gpus']:,} GPUs",
            [pool["n_gpus"] / metrics["n_gpus"] for pool in pools],
            [f"{pool['n_gpus']:,} {pool['gpu'].upper()}" for pool in pools],
        ),
        (
            "power",
            f"Share of {_kw(metrics['power_w'])}{scope}",
            [pool["power_w"] / metrics["power_w"] for pool in pools],
            [_kw(pool["power_w"]) for pool in pools],
        ),
    ]


def _bars(axes, title: str, shares: Sequence[float], texts: Sequence[str], reach: float, *, label_pools: bool) -> None:
    """Shares on a scale up to `reach`, the same in every panel, with room for their labels."""
    for k, (part, text) in enumerate(zip(shares, texts)):
        look = {"color": POOL_COLOURS[k % 6], "hatch": POOL_HATCHES[k % 6], "edgecolor": PAPER}
        axes.barh(k, part, height=0.72, linewidth=0, **look)
        said = f"{_percent(part)}{f', {text}' if text else ''}"
        axes.annotate(said, (part, k), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10.5)
    axes.set_title(title)
    axes.set_xlim(0, 2.1 * reach)
    axes.set_ylim(len(shares) - 0.45, -0.55)
    axes.set_yticks(
        range(len(shares)), [f"pool {k + 1}" for k in range(len(shares))] if label_pools else [""] * len(shares)
    )
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.grid(False)


def _kw(power_w: float) -> str:
    power_kw = power_w / KW
    return f"{power_kw:,.0f} kW" if power_kw >= 100 else f"{power_kw:.3g} kW"


def _percent(share: float) -> str:
    share = round(share, 9)  # sums of shares are off by their rounding
    rest = min(share, 1.0 - share) if share < 1.0 else 1.0
    return percent(share, 0 if rest >= 0.005 and share >= 0.0995 else 1 if rest >= 0.0005 else 2)
