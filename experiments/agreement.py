"""The analytic laws against the simulator, on random plans: python experiments/agreement.py [N_PLANS]

Plans are drawn over workloads, GPUs, LLMs, KV policies, dispatch, instances, utilisation 0.3 to 0.9 and burstiness 1 to
10. Prints the errors' medians and 90th percentiles, writes results/agreement.csv and results/agreement.svg and .png.
"""

import dataclasses
import sys

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _results import GREY, RESULTS, finish, new_figure, write_table  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402

import fleetopt_jax as fo  # noqa: E402
from fleetopt_jax.report.figures import write_figure  # noqa: E402
from fleetopt_jax.report.tables import new_table, show  # noqa: E402

N_PLANS = 80
WORKLOADS = ("azure-conv", "azure-code", "mooncake-conv", "lmsys-cdf")
ENGINES = (
    ("h100", "llama-3.1-8b", 1),
    ("h100", "llama-3.1-70b", 4),
    ("h100", "llama-3.1-70b", 8),
    ("h100", "qwen3-235b-a22b", 8),
    ("b200", "llama-3.1-70b", 2),
    ("b200", "qwen3-235b-a22b", 4),
)
INSTANCES = (1, 8)
DISPATCH = ("jsq", "jsq", "random")  # the default twice as often
REPLICATIONS = 4
FEWEST_REQUESTS, MOST_REQUESTS = 20_000, 60_000
USUAL_LOAD = 0.85  # errors are judged up to here: beyond, waits grow without bound and so do errors in them
METRICS = {
    "tok_per_j": "tokens per joule",
    "power_w": "power",
    "n_active": "in flight",
    "itl_s": "mean ITL",
    "itl_p99_s": "P99 ITL",
    "ttft_p99_s": "P99 TTFT",
}
TARGETS = {"tok_per_j": 0.03, "n_active": 0.05, "itl_s": 0.05, "ttft_p99_s": 0.15}


def main(n_plans: int = N_PLANS) -> None:
    rng = np.random.default_rng(0)
    rows = []
    console = Console(stderr=True)
    for number in track(range(n_plans), "Simulating", console=console, disable=not console.is_terminal):
        row = study(number, rng)
        print(f"{number + 1} of {n_plans}: {describe(row)}", file=sys.stderr, flush=True)
        rows.append(row)
    columns = list(rows[0])
    write_table("agreement.csv", columns, [[row[name] for name in columns] for row in rows])
    usual = [row for row in rows if row["utilization"] <= USUAL_LOAD]
    show(summary(f"{len(usual)} plans up to {USUAL_LOAD:.0%} load: |analytic / simulated - 1|", usual))
    show(summary(f"All {len(rows)} plans", rows))
    for key in ("workload", "kv_cache", "dispatch", "gpu"):
        for value in sorted({row[key] for row in rows}):
            show(summary(f"{key} {value}", [row for row in usual if row[key] == value]))
    for ending in ("svg", "png"):
        write_figure(figure(rows), str(RESULTS / f"agreement.{ending}"))


def study(number: int, rng: np.random.Generator) -> dict:
    """A random plan that is stable and can be warmed up, simulated."""
    while True:
        name, (gpu, llm, tp) = rng.choice(WORKLOADS), ENGINES[rng.integers(len(ENGINES))]
        n, dispatch = int(rng.choice(INSTANCES)), str(rng.choice(DISPATCH))
        kv_cache = str(rng.choice(["paged", "reserved"]))
        load, scv = rng.uniform(0.3, 0.9), float(np.exp(rng.uniform(0.0, np.log(10.0))))
        assumptions = dataclasses.replace(fo.PHYSICAL, kv_cache=kv_cache, dispatch=dispatch)
        workload = dataclasses.replace(fo.load_workload(str(name), rate_per_s=1.0), arrival_scv=jnp.asarray(scv))
        engine = fo.engine_choice(gpu, llm, tp).engine
        fleet = fo.make_fleet([engine], window_tokens=[float(workload.longest_tokens)], n_instances=[n])
        rate = rate_of(fleet, workload, assumptions, load)
        if rate is None:
            continue
        workload = dataclasses.replace(workload, arrival_rate_per_s=jnp.asarray(rate))
        utilization = float(metrics(fleet, workload, assumptions).utilization)
        for n_requests in (FEWEST_REQUESTS, MOST_REQUESTS):
            found = fo.simulate(
                fleet, workload, assumptions, n_requests=n_requests, n_replications=REPLICATIONS, seed=number
            )
            if found.warmed_up:
                return {
                    "workload": str(name),
                    "gpu": gpu,
                    "llm": llm,
                    "tp": tp,
                    "kv_cache": kv_cache,
                    "dispatch": dispatch,
                    "n_instances": n,
                    "utilization": utilization,
                    "arrival_scv": scv,
                    "rate_per_s": rate,
                    "n_arrivals": found.n_arrivals,
                    "n_preemptions": found.n_preemptions,
                    **columns_of(found),
                }


def columns_of(found) -> dict[str, float]:
    """Analytic, simulated and its interval, of each metric."""
    columns = {}
    for name in METRICS:
        estimate = found.pools[0][name]
        columns[f"{name}_analytic"] = found.pools_analytic[0][name]
        columns |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return columns


metrics = jax.jit(fo.evaluate, static_argnames="assumptions")


def rate_of(fleet, workload, assumptions, load: float) -> float | None:
    """The rate of arrivals at which the fleet has that utilisation [1/s], by bisection; None where it cannot run."""
    low, high = 1e-4, 1e5
    for _ in range(50):
        rate = np.sqrt(low * high)
        found = metrics(fleet, dataclasses.replace(workload, arrival_rate_per_s=jnp.asarray(rate)), assumptions)
        utilization = float(found.utilization)
        low, high = (rate, high) if utilization < load else (low, rate)
    return rate if abs(utilization / load - 1.0) < 0.01 else None


def error(row: dict, name: str) -> float:
    return row[f"{name}_analytic"] / row[name] - 1.0


def describe(row: dict) -> str:
    what = f"{row['workload']} {row['gpu']} {row['llm']} x{row['tp']} N={row['n_instances']} {row['kv_cache']}"
    how = f"{row['dispatch']} load {row['utilization']:.2f} scv {row['arrival_scv']:.1f}"
    return f"{what} {how}: " + ", ".join(f"{name} {error(row, name):+.1%}" for name in METRICS)


def summary(title: str, rows: list[dict]):
    table = new_table("Metric", "median", "90th percentile", "mean, with sign", "target", title=title)
    for name, label in METRICS.items():
        errors = np.array([error(row, name) for row in rows]) if rows else np.zeros(1)
        middle, most = np.quantile(np.abs(errors), [0.5, 0.9])
        target = f"{TARGETS[name]:.0%}" if name in TARGETS else ""
        table.add_row(label, f"{middle:.1%}", f"{most:.1%}", f"{errors.mean():+.1%}", target)
    return table


def figure(rows: list[dict]):
    """Errors against utilisation, one panel a metric."""
    drawing = new_figure(10.0, 6.0)
    looks = {"jsq": ("o", "#0072B2", "shortest queue"), "random": ("^", "#D55E00", "random")}
    for axes, (name, label) in zip(drawing.subplots(2, 3).ravel(), METRICS.items(), strict=True):
        for dispatch, (marker, colour, said) in looks.items():
            own = [row for row in rows if row["dispatch"] == dispatch]
            x, y = [row["utilization"] for row in own], [100 * error(row, name) for row in own]
            axes.plot(x, y, marker, color=colour, markersize=4, alpha=0.8, label=said)
        axes.axhline(0.0, color=GREY, linewidth=0.8)
        usual = [abs(error(row, name)) for row in rows if row["utilization"] <= USUAL_LOAD]
        title = f"{label}: median {np.median(usual):.1%}"
        finish(axes, x="utilisation [-]", y="analytic over simulated, less one [%]", title=title)
    drawing.axes[0].legend(frameon=False, fontsize=8)
    return drawing


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
