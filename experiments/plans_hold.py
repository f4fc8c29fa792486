"""Whether plans hold in simulation: as they are by default, and with 90 % confidence when the engines are not what they
seem.

    python experiments/plans_hold.py [--processes 2] [--redrawn 40]

Default plans are of every bundled workload, H100 and B200, one to three pools, under the least P99 TTFT of a ladder
that some fleet can hold, so that the limit binds. Each is simulated eight times: it holds where the share of requests
in time is surely enough in every pool, fails where it surely is not in one, and is else unclear; `over` says by how
much the P99 TTFT of the worst pool is over its limit.

Redrawn plans are the same problems at other rates, planned with 90 % confidence; then every engine is off by a draw of
its errors (`perturb`), and what is simulated is that engine. The laws' own errors are not drawn: the simulator has
them. 85 to 95 % of them should hold; more says that the errors are taken for too large.

Rows are kept as they are found, and those in the tables not run again: with other laws begin with none.
"""

import argparse
import time
from collections.abc import Iterator, Sequence

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _results import kept_rows  # noqa: E402

from fleetopt_jax._optimize.confidence import Confident, confident  # noqa: E402
from fleetopt_jax._optimize.engine_errors import draw, perturbed, shared_errors  # noqa: E402
from fleetopt_jax._optimize.plan import Plan  # noqa: E402
from fleetopt_jax._optimize.problem import make_problem  # noqa: E402
from fleetopt_jax._optimize.search import optimize  # noqa: E402
from fleetopt_jax._simulate import Simulation, simulate  # noqa: E402
from fleetopt_jax._simulate.readings import limits_read  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import bundled, load_workload  # noqa: E402
from fleetopt_jax.fleet.fleet import Fleet, make_slo  # noqa: E402
from fleetopt_jax.workload.atoms import Workload  # noqa: E402

GPUS, MOST_POOLS = ("h100", "b200"), 3
LADDER_S = (0.3, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
CONFIDENCE, SEED = 0.9, 17_300
RATES = (100.0, 400.0)  # of redrawn plans [1/s]
_last: dict[tuple, Simulation] = {}  # of this process
Case = tuple[str, str, int, float, int]  # workload, GPU, pools, rate (0: as bundled), draw (-1: none)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--redrawn", type=int, default=40)
    options = parser.parse_args()
    for name, cases in (("plans_hold", default_cases()), ("plans_redrawn", redrawn_cases(options.redrawn))):
        # Of so many pools at most and of one fewer it is often the same fleet, which is not simulated again.
        together = MOST_POOLS if name == "plans_hold" else 1
        about = {"key_of": key_of, "processes": options.processes, "together": together}
        rows = kept_rows(f"{name}.csv", cases, row_of, **about)
        print(said(name, rows))


def key_of(case: Case) -> dict:
    """What tells a case from the others."""
    name, gpu, n_pools, _, number = case
    return {"workload": name, "gpu": gpu, "n_pools": n_pools, "draw": number}


def default_cases() -> list[Case]:
    return [(name, gpu, k, 0.0, -1) for name in bundled() for gpu in GPUS for k in range(1, MOST_POOLS + 1)]


def redrawn_cases(n: int) -> list[Case]:
    rng = np.random.default_rng(SEED)
    names = list(bundled())
    return [
        (
            str(rng.choice(names)),
            str(rng.choice(GPUS)),
            int(rng.integers(1, 3)),
            float(np.round(np.exp(rng.uniform(*np.log(RATES))))),
            i,
        )
        for i in range(n)
    ]


def row_of(case: Case) -> dict:
    """One plan and its simulation."""
    name, gpu, n_pools, rate_per_s, number = case
    start = time.perf_counter()
    workload = load_workload(name, rate_per_s=rate_per_s or None)
    plan = planned(name, workload, gpu, n_pools, confidence=CONFIDENCE if number >= 0 else None)
    about = key_of(case) | {"rate_per_s": float(workload.arrival_rate_per_s)}
    if plan is None:
        nothing = dict.fromkeys(("limit_s", "instances", "load", "planned_s", "simulated_s", "low_s", "high_s", "over"))
        return about | nothing | {"reading": "no fleet", "seconds": round(time.perf_counter() - start)}
    return about | judged(plan, simulated(plan, number)) | {"seconds": round(time.perf_counter() - start)}


def simulated(plan: Plan, number: int) -> Simulation:
    """The plan's fleet, or with engines that a draw has off; the last once only."""
    problem, fleet = plan.problem, plan.fleet if number < 0 else off(plan, number)
    parts = fleet.window_tokens, fleet.n_instances, problem.slo.ttft_p99_s
    key = problem.service.name, plan.specs, number, *(np.asarray(part).tobytes() for part in parts)
    if key not in _last:
        _last.clear()
        _last[key] = simulate(fleet, problem.workload, problem.assumptions, problem.slo, seed=max(number, 0))
    return _last[key]


def planned(name: str, workload: Workload, gpu: str, n_pools: int, *, confidence: float | None) -> Plan | None:
    """Under the least limit of the ladder that some fleet holds."""
    for limit_s in LADDER_S:
        about = {"n_pools": n_pools, "slo": make_slo(ttft_p99_s=limit_s), "workload_name": name}
        problem = make_problem(workload, [EngineSpec(gpu)], **about)
        plan = optimize(problem)
        if isinstance(plan, Plan) and confidence is not None:
            sure = confident(plan, confidence)
            plan = sure.plan if isinstance(sure, Confident) else sure
        if isinstance(plan, Plan):
            return plan
    return None


def off(plan: Plan, number: int) -> Fleet:
    """The fleet whose engines are off by a draw of their errors."""
    errors, engine_of = shared_errors(plan.specs)
    factors = jax.tree.map(lambda x: x[0], draw(errors, 1, (SEED, number)))
    return perturbed(plan.fleet, factors, engine_of)


def judged(plan: Plan, found: Simulation) -> dict:
    """What came of it, by the pool that is worst."""
    limit_s = float(plan.problem.slo.ttft_p99_s)
    worst = limits_read(found, plan.problem.slo)[0]
    pools = [each["ttft_p99_s"] for each in found.pools if each]
    late = max(pools, key=lambda each: each.mean)
    return {
        "limit_s": limit_s,
        "instances": "+".join(f"{n:.0f}" for n in np.asarray(plan.fleet.n_instances)),
        "load": float(np.max(np.asarray(plan.metrics.pools.utilization))),
        "planned_s": float(np.max(np.asarray(plan.metrics.pools.ttft_p99_s))),
        "simulated_s": late.mean,
        "low_s": late.low,
        "high_s": late.high,
        "over": late.mean / limit_s - 1.0,
        "reading": worst.reading,
    }


def said(name: str, rows: Sequence[dict]) -> str:
    """The shares, and by how much those fail that do."""
    some = [row for row in rows if row["reading"] != "no fleet"]
    lines = [f"{name}: {len(some)} of {len(rows)} problems have a fleet"]
    for title, chosen in _parts(some):
        n = max(len(chosen), 1)
        shares = {what: sum(row["reading"] == what for row in chosen) / n for what in ("holds", "unclear", "fails")}
        over = [row["over"] for row in chosen if row["reading"] == "fails"]
        by = f"; those that fail by {np.median(over):.0%} in the median, {max(over):.0%} at most" if over else ""
        lines.append(f"  {title:16} {len(chosen):3} " + " ".join(f"{k} {v:.0%}" for k, v in shares.items()) + by)
    return "\n".join(lines)


def _parts(rows: Sequence[dict]) -> Iterator[tuple[str, list[dict]]]:
    yield "all", list(rows)
    for key in ("workload", "gpu", "n_pools"):
        yield from ((str(value), [r for r in rows if r[key] == value]) for value in dict.fromkeys(r[key] for r in rows))


if __name__ == "__main__":
    main()
