"""How far the closed forms are from the iteration-level simulator, plan by random plan, law by law.

    python experiments/agreement.py [--plans 50] [--first 0] [--seed 17021] [--processes 2]
    python experiments/agreement.py --again

Every plan is one pool of 1 to 24 instances that serves a trace or a slice of its lengths (the shorter ones, the longer
ones, those between), at a random utilisation up to the 85 % that plans allow and a random burstiness. The
laws (`evaluate`) are closed forms; `simulate` runs every iteration, with the same engine coefficients: the errors here
are of the laws of queueing, latency and occupancy alone, not of the engines (`law_vs_measurement.py`). Where requests
go matters, so every plan of more than one instance runs with the shortest queue and with random dispatch. Errors are
of analytic / simulated - 1. While the laws were made, the first KEPT_OUT plans of the default seed were looked at, and
the later ones were not: they are reported apart. Any other seed draws plans that nobody has seen, which are not
written down. `--again` simulates nothing: it puts the laws as they are now beside the simulations that are written
down, of plans that are still drawn the same. Plans that are written down are not run again: with other laws, `--again`
first.

Bursts of ten times Poisson's make the P99 of a run of some thousand requests uncertain by half; so a second table has
what of each error is beyond the 95 % interval of its simulation.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _results import GREY, RESULTS, finish, new_figure, read_table, write_table  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fleetopt_jax._simulate import simulate  # noqa: E402
from fleetopt_jax._simulate.observed import analytic_metrics  # noqa: E402
from fleetopt_jax._simulate.simulate import RELAXATIONS, Simulation  # noqa: E402
from fleetopt_jax.catalog.engines import build  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load_workload  # noqa: E402
from fleetopt_jax.fleet.assumptions import CHOICES, DISPATCHES, PHYSICAL, Assumptions  # noqa: E402
from fleetopt_jax.fleet.evaluate import evaluate  # noqa: E402
from fleetopt_jax.fleet.fleet import Fleet, make_fleet, make_slo  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.workload.atoms import Workload, make_workload  # noqa: E402

SEED = 17_021
KEPT_OUT = 100  # plans from this one on
WORKLOADS = ("azure-conv", "azure-code", "azure", "mooncake-conv", "mooncake-synthetic")
ENGINES = (  # GPU, LLM, tensor parallelism
    ("h100", "llama-3.1-8b", 1),
    ("h100", "llama-3.1-70b", 4),
    ("h100", "llama-3.1-70b", 8),
    ("h100", "qwen3-235b-a22b", 8),
    ("h100", "gpt-oss-120b", 2),
    ("b200", "llama-3.1-8b", 1),
    ("b200", "llama-3.1-70b", 2),
    ("b200", "llama-3.1-70b", 4),
    ("b200", "qwen3-235b-a22b", 4),
    ("b200", "gpt-oss-120b", 1),
)
N_INSTANCES = (1, 2, 4, 8, 16, 24)
MAX_NUM_SEQS = (64, 256, 1024)
UTILIZATION = (0.1, 0.85)
BURSTINESS = (1.0, 10.0)
FEWEST_SLOTS = 2  # of an instance; a reserved window of 190,000 tokens leaves fewer on small engines
N_REPLICATIONS = 4
FEWEST_REQUESTS = 3000  # of a replication: 15 later than the P99 in its window, 60 in all
WARM_UPS = 2.1  # length of a run; what follows the warm-up counts
MOST_TOKENS = 2.0e6  # simulated tokens of a plan and dispatch; plans that need more are drawn again
MOST_ITERATIONS = 3e5  # and of an instance
BY_LAWS = ("prefill_frac",)  # what laws say of a plan, and nobody simulates
SAME_PLAN = 1e-2  # as near are the numbers of a plan that was written down: rates are drawn by the laws
RUNS_OF_PROCESS = 8  # compiled code of every shape would use up the memory maps of a process
TARGETS = {"tok_per_j": 0.015, "n_active": 0.04, "itl_s": 0.04, "ttft_p99_s": 0.10}
METRICS = {
    "tok_per_j": "output tokens per joule",
    "power_w": "power",
    "n_active": "sequences in flight",
    "itl_s": "mean inter-token latency",
    "ttft_p99_s": "P99 time to first token",
    "itl_p99_s": "P99 inter-token latency",
}
PARAMETERS = (
    "plan",
    "workload",
    "from_share",
    "to_share",
    "gpu",
    "llm",
    "tp",
    "kv_cache",
    "max_num_seqs",
    "n_instances",
    "arrival_scv",
    "utilization",
    "rate_per_s",
    "window_tokens",
    "n_max",
    "prefill_frac",
    "n_requests",
)


@dataclass(frozen=True)
class Case:
    """A plan as drawn, and how long to simulate it."""

    values: dict[str, object]  # PARAMETERS
    fleet: Fleet
    workload: Workload
    assumptions: Assumptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    if options.again:
        lines = [_anew(row) for row in read_table("agreement.csv")]
        _write(lines)
        print(report(lines))
        return
    start, lines = time.perf_counter(), read_table("agreement.csv") if options.seed == SEED else []
    done, asked = {line["plan"] for line in lines}, range(options.first, options.first + options.plans)
    plans = [(plan, options.seed) for plan in asked if plan not in done]
    # New processes, which JAX's threads do not survive a fork in; each starts with what it compiles.
    with get_context("spawn").Pool(options.processes, maxtasksperchild=RUNS_OF_PROCESS // 2) as pool:
        for rows in pool.imap(_rows_of, plans, chunksize=1):
            for row in rows:
                brief = " ".join(f"{name} {row[f'{name}_error']:+.1%}" for name in METRICS)
                what = "{plan} {workload} {gpu} {llm} {kv_cache} N={n_instances} rho={utilization:.2f}".format(**row)
                how = f"scv={row['arrival_scv']:.1f} {row['dispatch']}"
                _say(f"{time.perf_counter() - start:.0f} s: {what} {how} {brief}")
            lines = sorted([*lines, *rows], key=lambda line: line["plan"])
            if options.seed == SEED:
                _write(lines)
    print(report(lines))


def _rows_of(plan: tuple[int, int]) -> list[dict]:
    """A plan of a seed by every dispatch, laws and simulation beside each other."""
    case = draw_case(*plan)
    dispatches = ("jsq", "random") if case.values["n_instances"] > 1 else ("random",)
    return [_row(case, dispatch, run_case(case, dispatch)) for dispatch in dispatches]


def _write(lines: list[dict]) -> None:
    write_table("agreement.csv", list(lines[0]), [list(line.values()) for line in lines])
    save_figure(_figure(lines), RESULTS / "agreement")


def _anew(row: dict) -> dict:
    """A row with the laws of now. Raises RuntimeError where the plan of its number is another one now."""
    case = draw_case(row["plan"])
    for name, value in case.values.items():
        near = not isinstance(value, str) and abs(value - row[name]) < SAME_PLAN * abs(value)
        if value != row[name] and not near and name not in BY_LAWS:
            raise RuntimeError(f"plan {row['plan']} is another one now: {name} {value}, was {row[name]}")
    assumptions = replace(case.assumptions, dispatch=DISPATCHES[row["dispatch"]])
    (of_all, (of_pool,)) = analytic_metrics(evaluate(case.fleet, case.workload, assumptions), make_slo())
    laws = {name: of_all.get(name, of_pool[name]) for name in METRICS}
    now = {f"{name}_analytic": law for name, law in laws.items()}
    return row | now | {f"{name}_error": law / row[f"{name}_simulated"] - 1.0 for name, law in laws.items()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def draw_case(plan: int, seed: int = SEED) -> Case:
    """The same plan every time: each has a random stream of its own."""
    rng = np.random.default_rng([seed, plan])
    while (case := _draw(plan, rng)) is None:
        pass
    return case


def _slice(name: str, rng: np.random.Generator) -> tuple[Workload, float, float]:
    """A trace or, as often each, its shorter, longer or middle requests, and the shares they lie between."""
    whole = _workload(name)
    kind, low, high = rng.integers(4), 0.0, 1.0
    if kind == 1:
        high = rng.uniform(0.5, 0.97)
    elif kind == 2:
        low = rng.uniform(0.3, 0.95)
    elif kind == 3:
        low = rng.uniform(0.1, 0.6)
        high = rng.uniform(low + 0.2, 1.0)
    prompt, output, weight = (np.asarray(x) for x in (whole.prompt_tokens, whole.output_tokens, whole.weight))
    share = np.cumsum(weight)
    kept = (share > low) & (share <= high + 1e-12)
    return make_workload(prompt[kept], output[kept], weight[kept], arrival_rate_per_s=1.0), low, high


def _draw(plan: int, rng: np.random.Generator) -> Case | None:
    """A plan, or None where it cannot serve the window or takes too long to simulate."""
    name, kv_cache = WORKLOADS[plan % len(WORKLOADS)], ("paged", "reserved")[plan // len(WORKLOADS) % 2]
    requests, from_share, to_share = _slice(name, rng)
    gpu, llm, tp = ENGINES[rng.integers(len(ENGINES))]
    n, most = int(rng.choice(N_INSTANCES)), int(rng.choice(MAX_NUM_SEQS))
    scv, target = float(np.exp(rng.uniform(*np.log(BURSTINESS)))), rng.uniform(*UTILIZATION)
    assumptions = replace(PHYSICAL, kv_cache=CHOICES["kv_cache"][kv_cache])
    workload = replace(requests, arrival_scv=jnp.asarray(scv))
    fleet = make_fleet([_engine(gpu, llm, tp, most)], window_tokens=[float(workload.longest_tokens)], n_instances=[n])
    n_max = float(_load(fleet, workload, jnp.asarray(1e-6), assumptions)[1])
    if n_max < FEWEST_SLOTS:
        return None
    low, high = 1e-6, 1e6
    while high / low > 1.0 + 1e-6:
        rate = np.sqrt(low * high)
        low, high = (rate, high) if _load(fleet, workload, jnp.asarray(rate), assumptions)[0] < target else (low, rate)
    slower = replace(assumptions, dispatch=DISPATCHES["random"])
    utilization, _, _, _, prefill_frac = map(float, _load(fleet, workload, jnp.asarray(rate), assumptions))
    itl_s = float(_load(fleet, workload, jnp.asarray(rate), slower)[3])
    output, output2 = (float(jnp.sum(workload.weight * workload.output_tokens**k)) for k in (1, 2))
    warm_up_s = RELAXATIONS * output2 / output * itl_s
    if not np.isfinite(warm_up_s * rate):
        _say(f"plan {plan}: no ITL by the law: {name} {gpu} {llm} {tp} {most} {n} {scv} {rate} {kv_cache}")
        return None
    n_requests = max(FEWEST_REQUESTS, int(np.ceil(WARM_UPS * warm_up_s * rate)))
    if n_requests * output > MOST_TOKENS or n_requests / (rate * itl_s) > MOST_ITERATIONS:
        return None
    workload = replace(workload, arrival_rate_per_s=jnp.asarray(rate))
    numbers = (n, scv, utilization, float(rate), float(workload.longest_tokens), n_max, prefill_frac, n_requests)
    return Case(
        dict(zip(PARAMETERS, (plan, name, from_share, to_share, gpu, llm, tp, kv_cache, most, *numbers), strict=True)),
        fleet,
        workload,
        assumptions,
    )


@cache
def _workload(name: str) -> Workload:
    return load_workload(name)


@cache
def _engine(gpu: str, llm: str, tp: int, max_num_seqs: int):
    return build(EngineSpec(gpu, llm, tp, max_num_seqs=max_num_seqs))


def _load(fleet: Fleet, workload: Workload, rate_per_s, assumptions: Assumptions):
    return _load_jit(fleet, replace(workload, arrival_rate_per_s=rate_per_s), assumptions=assumptions)


def _load_of(fleet: Fleet, workload: Workload, *, assumptions: Assumptions):
    """(utilisation, n_max, in flight, mean ITL [s], prefill share)."""
    metrics = evaluate(fleet, workload, assumptions, quantiles=False)
    pools = metrics.pools
    return metrics.utilization, pools.n_max[0], pools.n_active[0], metrics.itl_s, pools.prefill_frac[0]


_load_jit = jax.jit(_load_of, static_argnames="assumptions")


def run_case(case: Case, dispatch: str) -> Simulation:
    """The plan, simulated. To one instance dispatch is the same under any policy, and fastest beforehand."""
    dispatch = dispatch if case.values["n_instances"] > 1 else "random"
    found = simulate(
        case.fleet,
        case.workload,
        replace(case.assumptions, dispatch=DISPATCHES[dispatch]),
        n_requests=case.values["n_requests"],
        n_replications=N_REPLICATIONS,
        seed=case.values["plan"],
    )
    if not found.warmed_up:
        raise RuntimeError(f"plan {case.values['plan']} needs a longer run than {case.values['n_requests']} requests")
    return found


def _row(case: Case, dispatch: str, found: Simulation) -> dict:
    row = {**case.values, "dispatch": dispatch}
    for name in METRICS:
        law = found.analytic[name] if name in found.analytic else found.pools_analytic[0][name]
        simulated = found.metrics[name]
        row |= {
            f"{name}_analytic": law,
            f"{name}_simulated": simulated.mean,
            f"{name}_low": simulated.low,
            f"{name}_high": simulated.high,
            f"{name}_error": law / simulated.mean - 1.0,
        }
    return row


def report(lines: list[dict]) -> str:
    """Median and 90th percentile of |error|, and median error, of every group."""
    halves = {
        "kept out": lambda r: r["plan"] >= KEPT_OUT,
        "looked at": lambda r: r["plan"] < KEPT_OUT,
    }
    groups = {
        f"{dispatch}, {half}": lambda r, d=dispatch, of=of: r["dispatch"] == d and of(r)
        for half, of in halves.items()
        for dispatch in ("jsq", "random")
    }
    text = [_table(lines, groups), "beyond the simulation's own interval", _table([_beyond(r) for r in lines], groups)]
    breaks = {
        "workload": [("workload", name) for name in WORKLOADS],
        "KV policy": [("kv_cache", name) for name in ("paged", "reserved")],
        "instances": [("n_instances", n) for n in N_INSTANCES],
    }
    for title, keys in breaks.items():
        groups = {
            f"{value}, {dispatch}": lambda r, k=key, v=value, d=dispatch: r[k] == v and r["dispatch"] == d
            for key, value in keys
            for dispatch in ("jsq", "random")
        }
        text += [f"by {title}", _table(lines, groups)]
    return "\n".join(text)


def _beyond(row: dict) -> dict:
    """With errors against the nearest that the interval allows: 0 within it."""

    def error(name: str) -> float:
        nearest = np.clip(row[f"{name}_analytic"], row[f"{name}_low"], row[f"{name}_high"])
        return float(row[f"{name}_analytic"] / nearest - 1.0)

    return row | {f"{name}_error": error(name) for name in METRICS}


def _table(lines: list[dict], groups: dict) -> str:
    head = f"{'':30} {'n':>3}" + "".join(f"{name:>22}" for name in METRICS)
    text = [head, f"{'':34}" + "".join(f"{'median  P90   bias':>22}" for _ in METRICS)]
    for title, of in groups.items():
        chosen = [line for line in lines if of(line)]
        if chosen:
            cells = ""
            for name in METRICS:
                error = np.array([line[f"{name}_error"] for line in chosen])
                size = np.abs(error)
                cells += f"   {np.median(size):6.1%}{np.quantile(size, 0.9):6.0%}{np.median(error):+7.1%}"
            text.append(f"{title:30} {len(chosen):3}{cells}")
    return "\n".join(text) + "\n"


def _figure(lines: list[dict]) -> Figure:
    figure = new_figure(11.5, 6.6)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito
    markers = ("o", "s", "^", "D", "v")
    lines = [line for line in lines if line["dispatch"] == "jsq"]
    for axes, name in zip(figure.subplots(2, 3, sharex=True).ravel(), METRICS):
        if name in TARGETS:
            axes.axhspan(-100 * TARGETS[name], 100 * TARGETS[name], color="#e4e4e4", zorder=0)
        axes.axhline(0.0, color=GREY, linewidth=1.0)
        for workload, colour, marker in zip(WORKLOADS, colours, markers):
            chosen = [line for line in lines if line["workload"] == workload and np.isfinite(line[f"{name}_error"])]
            x, y = ([scale * line[key] for line in chosen] for key, scale in
                    (("utilization", 100.0), (f"{name}_error", 100.0)))  # fmt: skip
            reach = 100.0 * np.array(
                [
                    np.abs(np.array([line[f"{name}_analytic"] / line[f"{name}_{end}"] for end in ("high", "low")])
                           - 1.0 - line[f"{name}_error"])
                    if line[f"{name}_low"] > 0 and np.isfinite(line[f"{name}_high"]) else (0.0, 0.0)
                    for line in chosen
                ]
            ).T  # fmt: skip
            axes.errorbar(x, y, reach, fmt=marker, color=colour, ms=4, elinewidth=0.7, alpha=0.8, label=workload)
        errors = np.array([line[f"{name}_error"] for line in lines])
        errors = errors[np.isfinite(errors)]  # an overload by the laws has no P99
        far = 100.0 * float(np.quantile(np.abs(errors), 0.97)) * 1.15
        axes.set_ylim(-max(far, 5.0), max(far, 5.0))
        label = "utilisation by the laws [%]" if axes.get_subplotspec().is_last_row() else ""
        finish(axes, x=label, y="law / simulation - 1 [%]")
        axes.set_title(f"{METRICS[name]}: median |error| {np.median(np.abs(errors)):.1%}", loc="left", fontsize=10)
    figure.axes[0].legend(frameon=False, fontsize=8, ncols=2)
    medians = {name: np.median([abs(line[f"{name}_error"]) for line in lines]) for name in METRICS}
    figure.suptitle(
        f"Up to {UTILIZATION[1]:.0%} utilisation the closed forms meet {len(lines)} simulated random plans within "
        f"{medians['tok_per_j']:.1%} (tok/J),\n{medians['n_active']:.0%} (in flight), {medians['itl_s']:.0%} (ITL) and "
        f"{medians['ttft_p99_s']:.0%} (P99 TTFT) in the median; grey: the targets, bars: 95 % intervals",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


if __name__ == "__main__":
    main()
