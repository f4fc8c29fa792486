"""What switching instances by the hour saves: three ServeGen profiles, the mean day and ten days, static and scheduled.

    python experiments/schedule.py

Llama-3.1-70B on eight H100 an instance, the Azure conversation lengths, a P99 TTFT of 500 ms, at each profile's own
rates. Prices are two tariffs written here, not anybody's: a flat one, and one by time of day that is negative at noon.
Writes schedule.csv and a figure of the mean days.
"""

from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _results import RESULTS, finish, new_figure, write_table  # noqa: E402

from fleetopt_jax._optimize.plan import Infeasible  # noqa: E402
from fleetopt_jax._optimize.problem import make_problem  # noqa: E402
from fleetopt_jax._optimize.running import make_running  # noqa: E402
from fleetopt_jax._optimize.schedule import Schedule, schedule  # noqa: E402
from fleetopt_jax.catalog.rates import bundled_rates, hours_named, names_of_rates  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load  # noqa: E402
from fleetopt_jax.core.units import DAY_S, HOUR_S, KW  # noqa: E402
from fleetopt_jax.fleet.resources import Objective  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.style import BLUE, GREEN, VERMILLION  # noqa: E402
from fleetopt_jax.workload.hours import Stretches, priced  # noqa: E402

FLAT = np.full(24, 0.08)  # USD/kWh
SOLAR = np.array([0.09] * 6 + [0.12] * 3 + [0.05] * 2 + [-0.01] * 4 + [0.05] * 2 + [0.16] * 4 + [0.10] * 3)
CASES: tuple[
    tuple[str, np.ndarray, Objective, dict[str, Any]], ...
] = (  # name, USD/kWh by time of day, objective, how instances are switched
    ("flat", FLAT, "tok_per_j", {}),
    ("start-up 0", FLAT, "tok_per_j", {"start_up_s": 0.0}),
    ("up 4 h at least", FLAT, "tok_per_j", {"min_up_s": 4 * HOUR_S}),
    ("2 warm spares", FLAT, "tok_per_j", {"warm_spares": 2}),
    ("reserved, solar prices", SOLAR, "usd", {"reserved": True}),
)
OF_TEN_DAYS = CASES[0]
COLUMNS = (
    *("profile", "case", "mean_rate_per_s", "peak_over_mean", "gpus_owned", "gpus_least", "starts_per_day"),
    *("static_kwh_per_day", "scheduled_kwh_per_day", "elastic_kwh_per_day", "saved_energy", "saved_usd"),
    *("static_in_time", "scheduled_in_time", "changing_windows_could_save"),
)


def main() -> None:
    loaded = load("azure-conv")
    means = list(bundled_rates())
    asked = [(name, case) for case in CASES for name in means]
    asked += [(name, OF_TEN_DAYS) for name in names_of_rates() if name not in means]
    rows, days = {}, {}
    for name, case in asked:
        title, usd, objective, how = case
        tariff = Stretches(title, "day", HOUR_S * np.arange(24.0), np.full(24, HOUR_S), usd)
        hours = priced(hours_named(name), usd_per_kwh=tariff, kg_co2_per_kwh=None)
        problem = make_problem(loaded.workload, [EngineSpec("h100")], objective=objective)
        found = schedule(problem, hours, make_running(**how))
        assert not isinstance(found, Infeasible)
        rows[name, title] = _row(found)
        print(name, title, *rows[name, title], sep=",", flush=True)
        if case == CASES[0]:
            days.setdefault(name, found)
            write_table("schedule.csv", COLUMNS, [(*key, *row) for key, row in sorted(rows.items())])
    write_table("schedule.csv", COLUMNS, [(*key, *row) for key, row in sorted(rows.items())])
    _draw({name: days[name] for name in means})


def _row(found: Schedule) -> list[float]:
    static, scheduled, elastic = found.static, found.scheduled, found.elastic
    days, requests = found.hours.span_s / DAY_S, found.hours.rate_per_s * found.hours.length_s
    in_time = [float(np.average(plan.slo_attainment, weights=requests)) for plan in (static, scheduled)]
    return [
        found.hours.mean_rate_per_s,
        float(found.hours.rate_per_s.max()) / found.hours.mean_rate_per_s,
        scheduled.n_gpus_owned,
        int(scheduled.n_gpus.min()),
        float(scheduled.n_started.sum()) / days,
        *(float(plan.energy_kwh.sum()) / days for plan in (static, scheduled, elastic)),
        found.saves("energy_kwh"),
        found.saves("usd"),
        *in_time,
        1.0 - found.changing_bound / float(scheduled.cost.sum()),
    ]


def _draw(days: dict[str, Schedule]) -> None:
    figure = new_figure(10.5, 6.0)
    panels = figure.subplots(2, len(days), sharex=True, sharey="row", squeeze=False)
    for k, (name, found) in enumerate(days.items()):
        edges = np.append(found.hours.start_s, found.hours.span_s) / HOUR_S
        rates, power = panels[:, k]
        rates.stairs(found.hours.rate_per_s / found.hours.mean_rate_per_s, edges, baseline=None, color="black")
        lines = (("static", VERMILLION, "--"), ("scheduled", BLUE, "-"), ("elastic", GREEN, ":"))
        peak = found.static.energy_kwh.max()
        for plan, colour, line in lines:
            energy = getattr(found, plan).energy_kwh / peak
            power.stairs(energy, edges, baseline=None, color=colour, linestyle=line, label=plan)
        title = f"{name}: {found.saves('energy_kwh'):.1%} of {found.static.energy_kwh.sum() / KW:,.0f} MWh"
        finish(rates, x="", y="rate over its mean" if not k else "", title=title)
        finish(power, x="hour of the day", y="power over the static peak" if not k else "")
        rates.set_ylim(0, None)
        power.set_ylim(0, None)
    panels[1, 0].legend(frameon=False, loc="lower right")
    figure.suptitle("What switching by the hour saves of a mean day's energy", x=0.01, ha="left")
    save_figure(figure, RESULTS / "schedule")


if __name__ == "__main__":
    main()
