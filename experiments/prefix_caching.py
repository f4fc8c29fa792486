"""What prefix caching leaves of routing by length, and how well its laws hold in simulation.

    python experiments/prefix_caching.py TRACE [TRACE ...] [--plans 20] [--rate 100] [--only gains,plans,thresholds]
    python experiments/prefix_caching.py --only gains

Each trace has block hashes (Mooncake's FAST'25 release); gains takes the bundled ones where none is named, but for
conversations that stay, which those do not tell of. Three parts, each with a table in results/:

- gains: the best fleet of at most two pools and the best of one, without a cache; with one and requests sent at random;
  by prefix; by prefix with conversations that stay in their pool (`sticky_sessions`, four times the first turn). H100
  and B200, Llama-3.1-70B, P99 TTFT 8 s.
- plans: random plans of one pool or two, at a random load, the first `--requests` of the trace replayed in their order
  from empty caches on: hit share, tokens per joule and P99 TTFT by the laws, of those requests, beside the simulation,
  and their medians, by trace as well. They come as a Poisson process, to the laws too: the stamps of Mooncake's
  conversations are whole multiples of 3 s, ten requests at once, evenly apart, which is no burst and no chance either.
- thresholds: the share of prompt tokens that two pools whose caches forget nothing find, by where requests are split,
  by length and with conversations that stay: the law beside sets of blocks in plain Python.
"""

import argparse
import gzip
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from fleetopt_jax.cli.backend import configure

configure()  # keeps compiled programs: plans share them

import jax  # noqa: E402
import numpy as np  # noqa: E402
from _results import BLUE, GREEN, GREY, RESULTS, finish, log_ticks, new_figure, write_table  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from prefix_law import requests_of  # noqa: E402

from fleetopt_jax._optimize.plan import Plan  # noqa: E402
from fleetopt_jax._optimize.problem import make_problem  # noqa: E402
from fleetopt_jax._optimize.search import optimize  # noqa: E402
from fleetopt_jax._simulate import Simulation, poisson_arrivals, replay_requests  # noqa: E402
from fleetopt_jax._simulate.dispatch import Balancer  # noqa: E402
from fleetopt_jax._simulate.observed import n_whole  # noqa: E402
from fleetopt_jax._simulate.pool import Room  # noqa: E402
from fleetopt_jax._simulate.simulate import (  # noqa: E402
    RELAXATIONS,
    Setting,
    arrive,
    gather,
    outlook,
    run_alone,
    simulation_of,
    slots_for,
)
from fleetopt_jax.catalog.engines import build  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load_workload  # noqa: E402
from fleetopt_jax.fleet.assumptions import DISPATCHES, PHYSICAL, Assumptions, WorkingSetCache  # noqa: E402
from fleetopt_jax.fleet.choices.dispatch import STALENESS_S  # noqa: E402
from fleetopt_jax.fleet.choices.routing_key import StickySessions  # noqa: E402
from fleetopt_jax.fleet.evaluate import fleet_metrics  # noqa: E402
from fleetopt_jax.fleet.fleet import Fleet, fleet_of, make_fleet, make_slo  # noqa: E402
from fleetopt_jax.fleet.traffic import route, routed  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.workload.atoms import Workload, with_rate  # noqa: E402
from fleetopt_jax.workload.conversations import sticky_tokens  # noqa: E402
from fleetopt_jax.workload.readers import Trace, read_workload_file  # noqa: E402

HEADROOM, TTFT_S, SEED = 4.0, 8.0, 18_700
GPUS = ("h100", "b200")
BUNDLED = ("mooncake-conv", "mooncake-synthetic")  # with their reuse, without their requests
CACHED = replace(PHYSICAL, prefix_cache=WorkingSetCache())
WAYS: dict[str, Assumptions] = {
    "off": PHYSICAL,
    "random": replace(CACHED, dispatch=DISPATCHES["random"]),
    "affinity": replace(CACHED, dispatch=DISPATCHES["affinity"]),
    "sticky": replace(CACHED, dispatch=DISPATCHES["affinity"], route_by=StickySessions(HEADROOM)),
}
THRESHOLDS = (2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0)
N_INSTANCES, UTILIZATION = (1, 2, 4, 8), (0.15, 0.7)
ROOMS, SLOTS = (2, 8), (64, 256, 1024)  # instances of a pool, and sequences of one, that programs are compiled for
METRICS = ("prefix_hit_frac", "tok_per_j", "ttft_p99_s")
GOALS = {"prefix_hit_frac": 0.03, "tok_per_j": 0.05, "ttft_p99_s": 0.20}  # medians: points, and shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--only", default="thresholds,plans,gains")
    options = parser.parse_args()
    if not options.traces and options.only != "gains":
        parser.error("need traces, but for --only gains")
    for part in options.only.split(","):
        {"thresholds": thresholds, "plans": plans, "gains": gains}[part](options)


def said(row: dict) -> dict:
    print(*(f"{key}={x:.4g}" if isinstance(x, float) else f"{key}={x}" for key, x in row.items()), flush=True)
    return row


def written(name: str, rows: Sequence[dict]) -> None:
    write_table(name, list(rows[0]), [list(row.values()) for row in rows])


def name_of(path: Path) -> str:
    return path.name.partition(".")[0].removesuffix("_first70").removesuffix("_hashes")


# --- gains ------------------------------------------------------------------------------------------------------------


def gains(options: argparse.Namespace) -> None:
    rows = []
    for path in options.traces or [Path(name) for name in BUNDLED]:
        plain = load_workload(str(path), rate_per_s=options.rate)
        kept = None if str(path) in BUNDLED else load_workload(str(path), rate_per_s=options.rate, sticky=HEADROOM)
        for gpu in GPUS:
            for way, assumptions in WAYS.items():
                workload = plain if assumptions.route_by.sticky is None else kept
                if workload is None:
                    continue
                rows.append(said({"trace": name_of(path), "gpu": gpu, "way": way} | gain(workload, gpu, assumptions)))
                written("prefix_gains.csv", rows)
    save_figure(gains_figure(rows), RESULTS / "prefix_gains")


def gain(workload: Workload, gpu: str, assumptions: Assumptions) -> dict:
    """The best fleet of at most two pools beside the best of one."""
    start, found = time.perf_counter(), {}
    for n_pools in (1, 2):
        problem = make_problem(
            workload, [EngineSpec(gpu)], n_pools=n_pools, slo=make_slo(ttft_p99_s=TTFT_S), assumptions=assumptions
        )
        plan = optimize(problem)
        found |= of_plan(plan, n_pools)
    ratio = (found["tok_per_j_2"] or np.nan) / (found["tok_per_j_1"] or np.nan)
    return found | {"gain": ratio, "seconds": round(time.perf_counter() - start)}


def of_plan(plan: object, n_pools: int) -> dict:
    if not isinstance(plan, Plan):
        return dict.fromkeys([f"{name}_{n_pools}" for name in ("windows", "instances", "tok_per_j", "hit_frac")])
    pools = plan.metrics.pools
    tokens = np.asarray(pools.traffic_frac * pools.mean_prompt_tokens)
    windows, instances = np.asarray(plan.fleet.window_tokens), np.asarray(plan.fleet.n_instances)
    return {
        f"windows_{n_pools}": "+".join(f"{x:.0f}" for x in windows),
        f"instances_{n_pools}": "+".join(f"{x:.0f}" for x in instances),
        f"tok_per_j_{n_pools}": float(plan.metrics.tok_per_j),
        f"hit_frac_{n_pools}": float(np.sum(tokens * np.asarray(pools.prefix_hit_frac)) / np.sum(tokens)),
    }


def gains_figure(rows: Sequence[dict]) -> Figure:
    """Tokens per joule of one pool and of two, a panel a trace and GPU."""
    panels = list(dict.fromkeys((row["trace"], row["gpu"]) for row in rows))
    figure = new_figure(3.2 * len(panels), 3.2)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        some = [row for row in rows if (row["trace"], row["gpu"]) == panel]
        at = np.arange(len(some))
        for shift, key, color in ((-0.2, "tok_per_j_1", GREY), (0.2, "tok_per_j_2", BLUE)):
            label = "one pool" if key.endswith("1") else "two pools"
            axes.bar(at + shift, [row[key] or 0.0 for row in some], 0.38, color=color, label=label)
        for x, row in zip(at, some, strict=True):
            if np.isfinite(row["gain"]):
                top = max(row["tok_per_j_1"], row["tok_per_j_2"])
                axes.text(x, top, f"{row['gain']:.2f}x", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(at, [row["way"] for row in some])
        axes.margins(y=0.2)
        finish(axes, x="", y="tokens per joule", title=f"{panel[0].replace('_', ' ')}, {panel[1].upper()}")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    return figure


# --- random plans -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A plan as drawn, and the trace it serves."""

    about: dict
    fleet: Fleet
    workload: Workload
    trace: Trace
    assumptions: Assumptions


def plans(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parts = [first_requests(path, options.requests, Path(folder)) for path in options.traces]
        traces = [(name_of(path), read_workload_file(path), smooth(load_workload(str(path)))) for path in parts]
    most = most_blocks([trace for _, trace, _ in traces])
    rows = []
    for k in range(options.plans):
        start = time.perf_counter()
        row = compared(drawn(k, traces), most) | {"seconds": round(time.perf_counter() - start)}
        rows.append(said(row))
        written("prefix_plans.csv", rows)
    summed_up(rows)


def summed_up(rows: Sequence[dict]) -> None:
    """Say the errors of all plans, and of each trace's."""
    for trace in ("", *dict.fromkeys(row["trace"] for row in rows)):
        for name in METRICS:
            errors = [abs(row[f"{name}_error"]) for row in rows if row["trace"] == trace or not trace]
            median, far = np.median(errors), np.quantile(errors, 0.9)
            print(f"{trace or 'all'}, {name}: median {median:.3f}, 90th {far:.3f}; goal {GOALS[name]}", flush=True)


def first_requests(path: Path, n: int, folder: Path) -> Path:
    """A file of the first requests of a trace: the laws are of what is replayed."""
    part = folder / path.name.removesuffix(".gz")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as whole:
        part.write_text("".join(islice(whole, n)))
    return part


def smooth(workload: Workload) -> Workload:
    """The requests as a Poisson stream."""
    return replace(workload, arrival_scv=np.ones_like(workload.arrival_scv))


def most_blocks(traces: Sequence[Trace]) -> tuple[int, int, int]:
    """Requests, blocks, and blocks of a prompt of the trace that has most of each."""
    each = [(len(x.prompt_tokens), len(np.unique(x.blocks.ids)), int(x.blocks.counts.max())) for x in traces]
    n_requests, n_blocks, n_each = (max(column) for column in zip(*each, strict=True))
    return n_requests, n_blocks, n_each


def drawn(k: int, traces: Sequence[tuple[str, Trace, Workload]]) -> Case:
    """The same plan every time: one pool or two, its rate such that the fullest pool has a random load."""
    rng = np.random.default_rng([SEED, k])
    name, trace, workload = traces[k % len(traces)]
    gpu, tp, dispatch = rng.choice(GPUS), int(rng.choice((4, 8))), str(rng.choice(("affinity", "random")))
    n_pools = int(rng.integers(1, 3))
    total = trace.prompt_tokens + trace.output_tokens
    windows = [float(np.quantile(total, rng.uniform(0.4, 0.8))), float(total.max())][-n_pools:]
    instances = [int(rng.choice(N_INSTANCES)) for _ in range(n_pools)]
    engine = build(EngineSpec(gpu, tp=tp))
    fleet = make_fleet([engine] * n_pools, window_tokens=windows, n_instances=instances)
    assumptions = replace(CACHED, dispatch=DISPATCHES[dispatch])
    traffic = routed(fleet, workload, assumptions)  # whatever the rate
    load = float(rng.uniform(*UTILIZATION))
    low, high = 1e-3, 1e3
    for _ in range(24):
        rate = float(np.sqrt(low * high))
        metrics = fleet_metrics(fleet, traffic, with_rate(workload, rate), assumptions)
        low, high = (rate, high) if float(metrics.utilization) < load else (low, rate)
    about = dict(plan=k, trace=name, gpu=gpu, tp=tp, dispatch=dispatch, load=load, rate_per_s=low)
    about |= {"windows": "+".join(f"{x:.0f}" for x in windows), "instances": "+".join(map(str, instances))}
    return Case(about, fleet, with_rate(workload, low), trace, assumptions)


def compared(case: Case, most: tuple[int, int, int]) -> dict:
    """The laws beside the simulation of the whole trace."""
    found = simulated(case, most)
    row = dict(case.about)
    for name in METRICS:
        law, measured = found.analytic[name], found.metrics[name].mean
        law = np.nan if law is None else float(law)
        error = law - measured if name == "prefix_hit_frac" else law / measured - 1.0
        row |= {f"{name}_law": law, f"{name}_simulated": measured, f"{name}_error": error}
    row["ttft_p99_s_of_pools"] = "+".join(f"{pool['ttft_p99_s'].mean:.3g}" for pool in found.pools if pool)
    return row


def simulated(case: Case, most: tuple[int, int, int]) -> Simulation:
    """As `simulate` does it, in rooms that plans share: each is compiled once."""
    rate = float(case.workload.arrival_rate_per_s)
    requests = poisson_arrivals(replay_requests(case.trace, rate, len(case.trace.prompt_tokens), 1), rate, SEED)
    analytic, life_s = outlook(case.fleet, case.workload, assumptions=case.assumptions)
    warm_up_s, balancer = RELAXATIONS * float(np.max(life_s)), Balancer(case.assumptions.dispatch, STALENESS_S, 0)
    setting = Setting(case.fleet, case.workload, case.assumptions, make_slo(), analytic, warm_up_s, balancer, None)
    arrived, runs = arrive(setting, requests, 0), []
    for k, lane in enumerate(case.fleet.lanes):
        n_instances = next(n for n in ROOMS if n >= n_whole(lane))
        n_slots = next(n for n in SLOTS if n >= slots_for(setting, k))
        room = Room(n_instances, n_slots, most[0], *most[1:])
        runs.append(run_alone(setting, arrived, k, n_whole(lane), room=room))
    return simulation_of(setting, [gather(setting, arrived, runs)])


# --- thresholds -------------------------------------------------------------------------------------------------------


def thresholds(options: argparse.Namespace) -> None:
    rows = [
        said({"trace": name_of(path), **row})
        for path in options.traces
        for row in split(read_workload_file(path), str(path))
    ]
    written("prefix_thresholds.csv", rows)
    save_figure(thresholds_figure(rows), RESULTS / "prefix_thresholds")


def split(trace: Trace, file: str) -> Iterator[dict]:
    """Shares found, by length and with conversations that stay."""
    total, longest = trace.prompt_tokens + trace.output_tokens, float((trace.prompt_tokens + trace.output_tokens).max())
    kept = sticky_tokens(trace.blocks, trace.prompt_tokens, trace.output_tokens, HEADROOM, longest)
    engine = build(EngineSpec("h100"))
    for router, lengths, headroom in (("length", total, None), ("sticky", kept, HEADROOM)):
        assumptions = WAYS["affinity" if headroom is None else "sticky"]
        workload = load_workload(file, sticky=headroom)
        for window in THRESHOLDS:
            fleet = fleet_of([engine] * 2, [window, longest], np.ones(2), np.ones(2))
            lanes = route(fleet, workload, assumptions).reuse
            found = jax.vmap(lambda lane: lane.kept(1.0) * lane.stream.reused_tokens)(lanes)
            law = float(np.sum(found[:, -1])) / float(trace.prompt_tokens.mean())
            share = float(np.mean(lengths <= window))
            plain = found_by_sets(trace, lengths > window)
            yield {"router": router, "threshold": window, "short_share": share, "simulated": plain, "law": law}


def found_by_sets(trace: Trace, pool: np.ndarray) -> float:
    """Share of the prompt tokens that pools find which forget nothing: sets of blocks."""
    size, caches, found = trace.blocks.block_tokens, (set(), set()), 0.0
    for blocks, prompt, k in zip(
        requests_of(trace), trace.prompt_tokens.tolist(), pool.astype(int).tolist(), strict=True
    ):
        known = 0.0
        for depth, block in enumerate(blocks):
            if block not in caches[k]:
                break
            known = min((depth + 1.0) * size, prompt - 1.0)
        found += known
        caches[k].update(blocks)
    return found / float(trace.prompt_tokens.sum())


def thresholds_figure(rows: Sequence[dict]) -> Figure:
    """What is found of prompts by the threshold: lines are the law's, dots the sets'."""
    names = list(dict.fromkeys(row["trace"] for row in rows))
    figure = new_figure(4.4 * len(names), 3.2)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for router, color in (("length", BLUE), ("sticky", GREEN)):
            some = [row for row in rows if row["trace"] == name and row["router"] == router]
            at = [row["threshold"] for row in some]
            axes.plot(at, [100 * row["law"] for row in some], color=color, label=f"by {router}, law")
            axes.plot(at, [100 * row["simulated"] for row in some], "o", color=color, label=f"by {router}, simulated")
        axes.set_xscale("log")
        log_ticks(axes.xaxis, THRESHOLDS, kilo=True)
        axes.set_ylim(0.0, 115.0 * max(row["simulated"] for row in rows if row["trace"] == name))
        finish(axes, x="threshold [tokens]", y="prompt tokens found [%]", title=name.replace("_", " "))
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


if __name__ == "__main__":
    main()
