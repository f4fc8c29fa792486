"""What a limit of the time to first token costs, and where splitting by length is what keeps it.

    python experiments/ttft_limit.py

The paper's limit of 500 ms never binds: prefill rides along free. Physically, prompts of 7,400 tokens (Azure code) take
0.2 s of eight H100, prompts of 88,000 tokens (the longest hundredth of Mooncake's) 5 s. The P99 TTFT limit, held by
every pool, is tightened from 30 s to the smallest reachable, for one pool and for two, the fewest GPUs that serve 1,000
requests/s. Two kinds of limit: the same for every request, and growing by 100 ms for every 1,000 tokens of its prompt.
"""

import csv
import io

import jax

jax.config.update("jax_enable_x64", True)

from _tables import RESULTS  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # noqa: E402

from fleetopt_jax._optimize.plan import Infeasible  # noqa: E402
from fleetopt_jax._optimize.problem import make_problem  # noqa: E402
from fleetopt_jax._optimize.search import optimize  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load_workload  # noqa: E402
from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.fleet.fleet import make_slo  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.style import COLOURS  # noqa: E402

CASES = {  # title: workload, growth of the limit with the prompt [s/token]
    "azure-code, one limit": ("azure-code", 0.0),
    "mooncake-conv, one limit": ("mooncake-conv", 0.0),
    "mooncake-conv, + 100 ms per 1,000 tokens": ("mooncake-conv", 1e-4),
}
LIMITS_S = (30.0, 20.0, 15.0, 10.0, 7.0, 5.0, 3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.35, 0.25)
COLUMNS = ("case", "pools", "ttft_limit_s", "n_gpus", "tok_per_j", "ttft_p99_s", "short_window_tokens")


def main() -> None:
    lines = []
    for case in CASES:
        for n_pools in (1, 2):
            lines += _sweep(case, n_pools)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in line.items()})
    write_whole(RESULTS / "ttft_limit.csv", text.getvalue())
    save_figure(_figure(lines), RESULTS / "ttft_limit")
    print(text.getvalue())


def _sweep(case: str, n_pools: int) -> list[dict]:
    """Every limit that can be held, then the smallest reachable (with ten times the GPUs the load needs at most)."""
    name, slope = CASES[case]
    problem = make_problem(
        load_workload(name), [EngineSpec("h100")], workload_name=name, n_pools=n_pools, objective="gpus"
    )
    lines, limits = [], list(LIMITS_S)
    while limits:
        limit = limits.pop(0)
        plan = optimize(problem.serving(slo=make_slo(ttft_p99_s=limit, ttft_s_per_token=slope)))
        if isinstance(plan, Infeasible):
            nearest = plan.binding.nearest_feasible
            if plan.binding.limit == "ttft_p99_s" and nearest and limit in LIMITS_S:
                limits = [nearest * (1.0 + 1e-6)]
            continue
        lines.append(
            {
                "case": case,
                "pools": n_pools,
                "ttft_limit_s": limit,
                "n_gpus": int(plan.metrics.n_gpus),
                "tok_per_j": float(plan.metrics.tok_per_j),
                "ttft_p99_s": float(plan.metrics.ttft_p99_s),
                "short_window_tokens": int(plan.fleet.window_tokens[0]),
            }
        )
    return lines


def _figure(lines: list[dict]) -> Figure:
    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    panels = figure.subplots(1, len(CASES))
    for axes, case in zip(panels, CASES):
        for n_pools, colour, marker, size in ((1, COLOURS["neutral"], "o", 8), (2, COLOURS["h100"], "D", 4)):
            found = [line for line in lines if (line["case"], line["pools"]) == (case, n_pools)]
            limits, gpus = [line["ttft_limit_s"] for line in found], [line["n_gpus"] for line in found]
            label = f"{n_pools} pool{'s' if n_pools > 1 else ''}"
            axes.plot(limits, gpus, f"{marker}-", color=colour, markersize=size, linewidth=1.6, label=label)
            axes.axvline(limits[-1], color=colour, linestyle=":", linewidth=1.0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(FixedLocator([30, 10, 5, 2, 1, 0.5, 0.25]))
        axes.yaxis.set_major_locator(FixedLocator([500, 1000, 2000, 5000, 10_000, 20_000, 50_000]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("limit of the P99 TTFT [s], tighter to the right")
        axes.set_ylabel("H100 GPUs for 1,000 requests/s")
        axes.set_title(_takeaway(lines, case), loc="left", fontsize=10)
        axes.grid(which="both", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _takeaway(lines: list[dict], case: str) -> str:
    """Where one pool and two differ most at the same limit."""
    by_limit: dict[float, dict[int, int]] = {}
    for line in lines:
        if line["case"] == case:
            by_limit.setdefault(line["ttft_limit_s"], {})[line["pools"]] = line["n_gpus"]
    saved = {limit: 1 - pools[2] / pools[1] for limit, pools in by_limit.items() if len(pools) == 2}
    limit = max(saved, key=saved.__getitem__)
    if saved[limit] < 0.02:
        return f"{case}:\ntwo pools save nothing"
    return f"{case}:\ntwo pools save up to {saved[limit]:.0%} of the GPUs (at {limit:.3g} s)"


if __name__ == "__main__":
    main()
