"""What pays, on which trace, within which limit; the three largest levers of each case against the simulator.

    python experiments/levers.py

Llama-3.1-70B on eight H100 an instance, one pool, 1,000 requests/s; one lever at a time, everything else re-optimised,
and pairs (`fleetopt levers`). Published: the paper's claim that topology and generation multiply, on its Azure CDF.
Physical: the Azure traces with a P99 TTFT of 500 ms, and of 30 s, which is none worth the name. Of the physical cases
the present fleet and the fleets of the three largest levers are simulated, request by request: the analytic gain stands
beside the simulated one, with the 95 % interval over replications (of a ratio: both in quadrature).
"""

import math
from dataclasses import dataclass, replace

import jax

jax.config.update("jax_enable_x64", True)

from _results import RESULTS, finish, new_figure, write_table  # noqa: E402

from fleetopt_jax._optimize.levers import Levers, Pulled, pull_levers  # noqa: E402
from fleetopt_jax._optimize.problem import make_problem  # noqa: E402
from fleetopt_jax._simulate import simulate  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load  # noqa: E402
from fleetopt_jax.documents.levers import levers_to_json  # noqa: E402
from fleetopt_jax.fleet.assumptions import PRESETS  # noqa: E402
from fleetopt_jax.fleet.fleet import make_slo  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.levers import answer, lever_label, levers_figure  # noqa: E402
from fleetopt_jax.report.style import COLOURS  # noqa: E402

CASES = (  # name, preset, workload, P99 TTFT limit [s]
    ("published", "published", "azure-cdf", 0.5),
    ("conv", "physical", "azure-conv", 0.5),
    ("conv_30s", "physical", "azure-conv", 30.0),
    ("code", "physical", "azure-code", 0.5),
    ("code_30s", "physical", "azure-code", 30.0),
)
N_SIMULATED = 3
N_REPLICATIONS = 4
GAINS = (
    *("case", "levers", "gain", "gain_low", "gain_high", "product", "ratio", "verdict", "tok_per_j", "usd_per_h"),
    *("n_gpus", "ttft_p99_s", "quality"),
)
SIMULATED = (
    *("case", "lever", "tok_per_j", "simulated_tok_per_j", "simulated_low", "simulated_high", "gain", "simulated_gain"),
    *("simulated_gain_low", "simulated_gain_high", "ttft_p99_s", "simulated_ttft_p99_s", "limits_held"),
)


@dataclass(frozen=True)
class Ratio:
    """A simulated gain and its 95 % interval."""

    mean: float
    low: float
    high: float


def main() -> None:
    gains, simulated = [], []
    for case, preset, workload, limit_s in CASES:
        found = find(preset, workload, limit_s)
        document = levers_to_json(found)
        print(answer(document), flush=True)
        gains += gain_rows(case, document)
        save_figure(levers_figure(document), RESULTS / f"levers_{case}")
        if preset == "physical":
            simulated += simulated_rows(case, found, document)
    write_table("levers.csv", GAINS, gains)
    write_table("levers_simulated.csv", SIMULATED, simulated)
    save_figure(figure(simulated), RESULTS / "levers_simulated")


def find(preset: str, name: str, limit_s: float) -> Levers:
    loaded = load(name)
    assumptions = replace(PRESETS[preset], output_share=loaded.output_share)
    problem = make_problem(
        loaded.workload,
        [EngineSpec("h100", source=assumptions.engine.name)],
        slo=make_slo(ttft_p99_s=limit_s),
        workload_name=name,
        n_pools=1,
        assume=preset,
        assumptions=assumptions,
    )
    return pull_levers(problem, next_gpu="b200")


def gain_rows(case: str, document: dict) -> list[list]:
    rows = []
    for each in [*document["levers"], *document["pairs"]]:
        names = each.get("levers", [each.get("name")])
        low, high = each["gain_interval"] or (None, None)
        facts = [each[name] for name in ("tok_per_j", "usd_per_h", "n_gpus", "ttft_p99_s", "quality")]
        pair = [each.get(name) for name in ("product", "ratio", "verdict")]
        rows.append([case, " x ".join(names), each["gain"], low, high, *pair, *facts])
    return rows


def simulated_rows(case: str, found: Levers, document: dict) -> list[list]:
    """The present fleet and the levers with the largest gains, analytic beside simulated."""
    labels = {lever["name"]: lever_label(lever) for lever in document["levers"]}
    largest = [gain for gain in found.gains if gain.gain is not None][:N_SIMULATED]
    rows, present = [], None
    for pulled in (found.present, *(gain.pulled for gain in largest)):
        result = run(pulled)
        estimate, ttft = result.metrics["tok_per_j"], result.metrics["ttft_p99_s"]
        present = present or estimate
        ratio = over(estimate, present)
        label = labels[pulled.levers[0].name] if pulled.levers else "present fleet"
        analytic = pulled.values["tok_per_j"]
        gain = analytic / found.present.values["tok_per_j"]
        rows.append(
            [
                *(case, label, analytic, estimate.mean, estimate.low, estimate.high, gain),
                *((ratio.mean, ratio.low, ratio.high) if pulled.levers else (1.0, 1.0, 1.0)),
                *(pulled.values["ttft_p99_s"], ttft.mean, int(result.slo_held)),
            ]
        )
        print(f"  {case}, {label}: gain {gain:.3f}, simulated {ratio.mean:.3f}", flush=True)
    return rows


def run(pulled: Pulled):
    problem = pulled.plan.problem
    return simulate(
        pulled.plan.fleet, problem.workload, problem.assumptions, problem.slo, n_replications=N_REPLICATIONS
    )


def over(lever, present) -> Ratio:
    """The ratio of two independent estimates."""
    mean = lever.mean / present.mean
    spread = math.hypot(*((each.high - each.low) / 2.0 / each.mean for each in (lever, present)))
    return Ratio(mean, mean * (1.0 - spread), mean * (1.0 + spread))


def figure(rows: list[list]):
    rows = [dict(zip(SIMULATED, row)) for row in rows]
    rows = [row for row in rows if row["lever"] != "present fleet"]
    plot = new_figure(8.4, 1.4 + 0.36 * len(rows))
    axes = plot.subplots()
    for i, row in enumerate(rows):
        mean = row["simulated_gain"]
        axes.errorbar(
            mean,
            i,
            xerr=[[mean - row["simulated_gain_low"]], [row["simulated_gain_high"] - mean]],
            fmt="s",
            color=COLOURS["b200"],
            capsize=3,
            label="simulated, 95 %" if i == 0 else None,
        )
        axes.plot(
            row["gain"],
            i,
            "o",
            color=COLOURS["h100"],
            markerfacecolor="none",
            markersize=9,
            label="analytic" if i == 0 else None,
        )
    titles = {case: f"{workload}, {limit_s:g} s" for case, _, workload, limit_s in CASES}
    axes.set_yticks(range(len(rows)), [f"{titles[row['case']]}: {row['lever']}" for row in rows])
    axes.invert_yaxis()
    off = max(abs(row["gain"] / row["simulated_gain"] - 1.0) for row in rows)
    finish(
        axes,
        x="tokens per joule over the present fleet (one pool of H100)",
        y="",
        title=f"The three largest levers of each case: analytic within {off:.1%} of simulated",
    )
    axes.legend(frameon=False, fontsize=9)
    return plot


if __name__ == "__main__":
    main()
