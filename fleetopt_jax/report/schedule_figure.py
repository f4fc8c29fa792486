"""A day by three plans as a figure, of the document that `fleetopt schedule --json` prints."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fleetopt_jax.core.units import HOUR_S, MS
from fleetopt_jax.report.rates_figure import time_ticks
from fleetopt_jax.report.schedule import schedule_said
from fleetopt_jax.report.style import BLUE, GREEN, INK, MUTED, ORANGE, VERMILLION, grid_along, new_figure, say, styled

COLOURS = {"static": VERMILLION, "scheduled": BLUE, "elastic": GREEN}
LINES = {"static": "--", "scheduled": "-", "elastic": ":"}


@styled
def schedule_figure(document: Mapping[str, Any]) -> Figure:
    """Over the day: the rate, prices and carbon where they change, GPUs that are up, power, P99 TTFT."""
    periods = document["periods"]
    edges_s = np.array([*(each["start_s"] for each in periods), periods[-1]["start_s"] + periods[-1]["length_s"]])
    changing = [name for name in ("usd_per_kwh", "kg_co2_per_kwh") if len({each[name] for each in periods}) > 1]
    figure = new_figure(9.2, 7.6 + 1.4 * len(changing))
    panels = figure.subplots(4 + len(changing), 1, sharex=True)
    _stairs(panels[0], edges_s, [each["rate_per_s"] for each in periods], INK, label=None)
    panels[0].set_ylabel("requests a\nsecond")
    for panel, name in zip(panels[1:], changing):
        _stairs(panel, edges_s, [each[name] for each in periods], ORANGE, label=None)
        panel.axhline(0.0, color=MUTED, linewidth=0.8)
        panel.set_ylabel({"usd_per_kwh": "USD/kWh", "kg_co2_per_kwh": "kg CO2/kWh"}[name])
    gpus, power, ttft = panels[-3:]
    length_h = np.array([each["length_s"] for each in periods]) / HOUR_S
    for name, plan in document["plans"].items():
        style = {"linestyle": LINES[name], "label": name}
        _stairs(gpus, edges_s, plan["n_gpus"], COLOURS[name], **style)
        _stairs(power, edges_s, np.array(plan["by_period"]["energy_kwh"]) / length_h, COLOURS[name], **style)
        if name != "elastic":
            _stairs(ttft, edges_s, np.array(plan["ttft_p99_s"]) / MS, COLOURS[name], **style)
    gpus.set_ylabel("GPUs up")
    gpus.legend(loc="lower right", ncols=3)
    power.set_ylabel("kW")
    ttft.axhline(document["slo"]["ttft_p99_s"] / MS, color=MUTED, linewidth=1.2, linestyle="-.")
    ttft.set_ylabel("P99 TTFT\n[ms]")
    for panel in panels:
        grid_along(panel, "y")
        panel.set_xlim(edges_s[0], edges_s[-1])
    for panel in (panels[0], gpus, power):
        panel.set_ylim(bottom=0)
    time_ticks(panels[-1], edges_s, float(periods[0]["length_s"]))
    for panel in panels[:-1]:
        panel.set_xlabel("")
        panel.tick_params(labelbottom=False)
    figure.align_ylabels(list(panels))
    say(figure, " ".join(schedule_said(document)[:2]))
    return figure


def _stairs(axes, edges_s: np.ndarray, values: Any, colour: str, **style: Any) -> None:
    axes.stairs(np.asarray(values, float), edges_s, baseline=None, color=colour, linewidth=1.8, **style)
