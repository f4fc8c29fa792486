"""A scheduled day in simulation: P99 TTFT by hour by the laws and by every iteration, and where they part.

    python experiments/day_replayed.py

The mean day of servegen-small at 200 requests/s on average, Azure conversations on eight H100 an instance, P99 TTFT
500 ms, scheduled by the hour. Replayed twice, every hour squeezed to three minutes: with a steady rate within hours, as
the laws take it; and with a burst in every fourth hour, a sixth of it at 1.75 times the hour's mean rate and the rest
below, which is the busiest window over its hour that the profile has in ten days. Writes day_replayed.csv and a figure.
"""

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _results import RESULTS, finish, log_ticks, new_figure, write_table  # noqa: E402

from fleetopt_jax._optimize.problem import make_problem  # noqa: E402
from fleetopt_jax._optimize.schedule import Schedule, schedule  # noqa: E402
from fleetopt_jax._simulate.day import Day, ReplayedDay, replay_day  # noqa: E402
from fleetopt_jax.catalog.rates import bundled_rates, hours_named  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load  # noqa: E402
from fleetopt_jax.core.units import MS  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.style import BLUE, ORANGE, VERMILLION  # noqa: E402
from fleetopt_jax.workload.hours import Hours, at_mean, make_hours  # noqa: E402

PROFILE, RATE_PER_S, SQUEEZE, N_REPLICATIONS = "servegen-small", 200.0, 20.0, 2
PARTS, BURST_EVERY = 6, 4
COLUMNS = (
    *("hour", "rate_per_s", "n_instances", "law_ttft_p99_s", "law_in_time"),
    *("steady_ttft_p99_s", "steady_in_time", "steady_low", "steady_high", "steady_fails"),
    *("bursts", "burst_ttft_p99_s", "burst_in_time", "burst_low", "burst_high", "burst_fails"),
)


def main() -> None:
    loaded = load("azure-conv")
    hours = at_mean(hours_named(PROFILE), RATE_PER_S)
    problem = make_problem(loaded.workload, [EngineSpec("h100")], n_pools=1)
    found = schedule(problem, hours)
    assert isinstance(found, Schedule)
    plan = found.scheduled
    day = Day(plan.plan.fleet, hours, plan.n_instances)
    about = loaded.workload, problem.assumptions, problem.slo
    steady, bursts = (
        replay_day(day, *about, arrivals=arrivals, squeeze=SQUEEZE, n_replications=N_REPLICATIONS)
        for arrivals in (hours, with_bursts(hours))
    )
    rows = []
    for t in range(hours.n_periods):
        law = [float(hours.rate_per_s[t]), int(plan.n_instances[t].sum()), float(plan.ttft_p99_s[t])]
        row = [t, *law, float(plan.slo_attainment[t]), *_seen(steady, t), t % BURST_EVERY == 0, *_seen(bursts, t)]
        rows.append(row)
        print(*row, sep=",", flush=True)
    write_table("day_replayed.csv", COLUMNS, rows)
    _draw(found, steady, bursts)


def _seen(replayed: ReplayedDay, t: int) -> list:
    share = replayed.attained[t]
    return [float(replayed.ttft_p99_s[:, t].mean()), share.mean, share.low, share.high, bool(replayed.fails[t])]


def with_bursts(hours: Hours) -> Hours:
    """The same hours in six parts, the third of which is busier in every fourth hour, the mean of each as it was."""
    most = bundled_rates()[PROFILE]["busiest_window_over_its_hour"]["max"]
    parts = np.ones((hours.n_periods, PARTS))
    parts[::BURST_EVERY] = (PARTS - most) / (PARTS - 1)
    parts[::BURST_EVERY, 2] = most
    rates = (hours.rate_per_s[:, None] * parts).ravel()
    return make_hours(rates, length_s=hours.length_s[0] / PARTS, name=f"{hours.name} with bursts")


def _draw(found: Schedule, steady: ReplayedDay, bursts: ReplayedDay) -> None:
    figure = new_figure(9.0, 6.4)
    rates, ttft = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    hour, edges = np.arange(found.hours.n_periods) + 0.5, np.arange(found.hours.n_periods + 1)
    rates.stairs(found.hours.rate_per_s, edges, baseline=None, color="black")
    finish(rates, x="", y="requests a second")
    rates.set_ylim(0, None)
    ttft.stairs(found.scheduled.ttft_p99_s / MS, edges, baseline=None, color=BLUE, label="by the laws")
    for replayed, colour, name, offset in (
        (steady, ORANGE, "steady hours", -0.12),
        (bursts, VERMILLION, "bursts", 0.12),
    ):
        p99 = replayed.ttft_p99_s.mean(axis=0) / MS
        ttft.plot(hour + offset, p99, "o", color=colour, label=f"simulated, {name}")
        ttft.plot(
            hour[replayed.fails] + offset, p99[replayed.fails], "o", color=colour, markersize=12, fillstyle="none"
        )
    ttft.axhline(float(found.problem.slo.ttft_p99_s) / MS, color="grey", linestyle="--")
    ttft.set_yscale("log")
    log_ticks(ttft.yaxis, (400, 500, 700, 1000, 1400))
    ttft.legend(frameon=False)
    n = int(steady.fails.sum()), int(bursts.fails.sum())
    title = f"ringed: surely fewer than 99 % in time ({n[0]} hours of steady rates, {n[1]} with bursts)"
    finish(ttft, x="hour of the day", y="P99 TTFT [ms]", title=title)
    save_figure(figure, RESULTS / "day_replayed")


if __name__ == "__main__":
    main()
