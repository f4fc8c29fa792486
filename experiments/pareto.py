"""What the P99 TTFT costs in tokens per joule, and how much of the front is a second pool's.

    python experiments/pareto.py

Azure conversations and Azure code, 1,000 requests/s of Llama-3.1-70B on eight H100 or eight B200, physical assumptions,
limits that grow by 100 ms for every 1,000 prompt tokens: the fronts of tokens per joule against the P99 TTFT (less what
the limit grows) of at most two pools and of one.
"""

from collections.abc import Iterator, Sequence

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _results import RESULTS, finish, log_ticks, new_figure, write_table  # noqa: E402

from fleetopt_jax._optimize.dominance import hypervolume  # noqa: E402
from fleetopt_jax._optimize.front import Front  # noqa: E402
from fleetopt_jax._optimize.pareto import pareto  # noqa: E402
from fleetopt_jax._optimize.problem import make_problem  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load_workload  # noqa: E402
from fleetopt_jax.fleet.fleet import make_slo  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.style import COLOURS, MARKERS  # noqa: E402

WORKLOADS = ("azure-conv", "azure-code")
GPUS = ("h100", "b200")
POOLS = (2, 1)
SLOPE_S = 1e-4  # by which the limit grows for every token of the prompt [s]
N_POINTS = 24
COLUMNS = (
    *("workload", "gpu", "pools", "knee", "tok_per_j", "ttft_p99_s", "usd_per_h", "n_gpus"),
    *("window_tokens", "n_instances"),
)
SUMMARY = (
    "workload",
    "gpu",
    "points",
    "hypervolume",
    "missing_at_most",
    "one_pool_share",
    "best_gain",
    "at_s",
    "loosest_gain",
)

Key = tuple[str, str, int]


def main() -> None:
    fronts: dict[Key, Front] = {}
    for name in WORKLOADS:
        for gpu in GPUS:
            for n_pools in POOLS:
                problem = make_problem(
                    load_workload(name),
                    [EngineSpec(gpu)],
                    workload_name=name,
                    n_pools=n_pools,
                    slo=make_slo(ttft_s_per_token=SLOPE_S),
                )
                fronts[name, gpu, n_pools] = front = pareto(problem, n_points=N_POINTS)
                print(name, gpu, n_pools, f"{len(front.points)} points in {front.wall_s:.1f} s", flush=True)
    write_table("pareto.csv", COLUMNS, list(_rows(fronts)))
    summary = [_summary(fronts, name, gpu) for name in WORKLOADS for gpu in GPUS]
    write_table("pareto_summary.csv", SUMMARY, summary)
    for row in summary:
        print(dict(zip(SUMMARY, row)))
    save_figure(_figure(fronts, summary), RESULTS / "pareto")


def _rows(fronts: dict[Key, Front]) -> Iterator[Sequence]:
    for key, front in fronts.items():
        for i, point in enumerate(front.points):
            metrics, fleet = point.plan.metrics, point.plan.fleet
            yield (
                *key,
                int(i == front.knee),
                *point.values,
                float(metrics.usd_per_h),
                int(metrics.n_gpus),
                "|".join(f"{x:.0f}" for x in fleet.window_tokens),
                "|".join(f"{x:.0f}" for x in fleet.n_instances),
            )


def _values(front: Front) -> np.ndarray:
    """(P99 TTFT, tok/J) [M, 2]."""
    return np.array([point.values[::-1] for point in front.points])


def _summary(fronts: dict[Key, Front], name: str, gpu: str) -> Sequence:
    """Two pools against one: volumes under one reference, the worst of both fronts, and the largest gain at a TTFT."""
    two, one = (_values(fronts[name, gpu, n_pools]) for n_pools in POOLS)
    front = fronts[name, gpu, 2]
    sign = np.array([1.0, -1.0])
    reference = (np.concatenate([two, one]) * sign).max(axis=0)
    volumes = [hypervolume(values * sign, reference) for values in (two, one)]
    gains = [
        (two[two[:, 0] <= ttft_s, 1].max() / tok_per_j, ttft_s) for ttft_s, tok_per_j in one if ttft_s >= two[0, 0]
    ]
    best, at_s = max(gains)
    return (
        *(name, gpu, len(front.points), volumes[0], front.hypervolume_missing, volumes[1] / volumes[0]),
        *(float(best), float(at_s), float(two[:, 1].max() / one[:, 1].max())),
    )


def _figure(fronts: dict[Key, Front], summary: Sequence[Sequence]):
    figure = new_figure(12.0, 4.9)
    panels = figure.subplots(1, len(WORKLOADS))
    for axes, name in zip(panels, WORKLOADS):
        for gpu in GPUS:
            for n_pools, style in zip(POOLS, ("-", ":")):
                values = _values(fronts[name, gpu, n_pools])
                label = f"{gpu.upper()}, {'one pool' if n_pools == 1 else 'two pools'}"
                filled = COLOURS[gpu] if n_pools == 2 else "white"
                axes.step(*values.T, style, where="post", color=COLOURS[gpu], linewidth=1.4)
                axes.plot(
                    *values.T, MARKERS[gpu], color=COLOURS[gpu], markerfacecolor=filled, label=label, markersize=5
                )
            front = fronts[name, gpu, 2]
            if front.knee is not None:
                x, y = front.points[front.knee].values[::-1]
                axes.plot([x], [y], "o", markersize=14, markerfacecolor="none", markeredgecolor="black")
                axes.annotate("knee", (x, y), xytext=(8, -14), textcoords="offset points", fontsize=9)
        axes.set_xscale("log")
        log_ticks(axes.xaxis, [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0])
        finish(
            axes,
            x="P99 TTFT beyond 100 ms per 1,000 prompt tokens [s]",
            y="output tokens per joule",
            title=_takeaway(name, summary),
        )
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _takeaway(name: str, summary: Sequence[Sequence]) -> str:
    rows = [dict(zip(SUMMARY, row)) for row in summary if row[0] == name]
    said = ", ".join(f"{row['best_gain']:.2f}x ({row['gpu'].upper()})" for row in rows)
    loose = max(row["loosest_gain"] for row in rows)
    return f"{name}: two pools gain up to {said}\nunder tight limits, at most {loose:.2f}x under the loosest"


if __name__ == "__main__":
    main()
