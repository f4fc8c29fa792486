"""Whether `optimize --verify` ever misses a better fleet that holds, that is found by hand.

    python experiments/verified_by_hand.py [--problems 10] [--processes 2]

Each problem is a bundled workload at a low rate, on H100 or B200, with up to two pools, under a limit that binds. By
hand are: the laws' best fleets of one and of two pools, the same split at half and at twice its threshold, and each of
them with up to two instances fewer or one more in any pool. Those that cost less than the verified fleet are simulated
as it was, by its requests and by those of another seed, but for those that have no more instances in any pool than one
that failed: `better` says how many of them surely hold by both. Rows are kept as they are found, and those in the table
not run again: with other laws begin with none.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _results import kept_rows  # noqa: E402
from plans_hold import LADDER_S  # noqa: E402

from fleetopt_jax._optimize.plan import Plan  # noqa: E402
from fleetopt_jax._optimize.problem import Problem, make_problem  # noqa: E402
from fleetopt_jax._optimize.rivals import Contender, Rivals, contender  # noqa: E402
from fleetopt_jax._optimize.search import optimize  # noqa: E402
from fleetopt_jax._simulate import Verified, simulate, verify  # noqa: E402
from fleetopt_jax._simulate.readings import limits_read  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load_workload  # noqa: E402
from fleetopt_jax.fleet.fleet import make_slo  # noqa: E402
from fleetopt_jax.fleet.sizing import size_fleet  # noqa: E402

WORKLOADS = ("azure-conv", "azure-code", "azure", "lmsys-cdf", "agent-cdf")
GPUS = ("h100", "b200")
RATE_PER_S = 40.0
FEWER, MORE = 2, 1  # instances of a pool
SEEDS = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    cases = list(itertools.islice(itertools.product(WORKLOADS, GPUS), options.problems))
    rows = kept_rows("verified_by_hand.csv", cases, row_of, key_of=key_of, processes=options.processes)
    worse = sum(row["better"] > 0 for row in rows)
    tried = sum(row["cheaper"] for row in rows)
    print(f"{len(rows)} problems; {tried} cheaper fleets by hand; in {worse} problems one of them surely holds")


def key_of(case: tuple[str, str]) -> dict:
    """What tells a problem from the others."""
    name, gpu = case
    return {"workload": name, "gpu": gpu}


def row_of(case: tuple[str, str]) -> dict:
    """A problem verified, and tried by hand."""
    name, gpu = case
    plan = bound_plan(name, gpu)
    problem, start = plan.problem, time.perf_counter()
    found = verify(Rivals(plan), problem.workload, problem.assumptions, problem.slo)
    took_s = time.perf_counter() - start
    rival: Contender = found.standings[found.rival].rival
    cost = rival.cost(counts(found.fleet.n_instances))
    by_hand = [(each, cheaper(each, cost)) for each in layouts(plan)]
    better = [fleet for layout, fleets in by_hand for fleet in held_among(problem, layout, fleets)]
    return key_of(case) | {
        "limit_s": float(problem.slo.ttft_p99_s),
        "laws": said(contender(problem, plan.specs, plan.fleet), counts(plan.fleet.n_instances)),
        "verified": said(rival, counts(found.fleet.n_instances)),
        "held": found.held,
        "tried": tried_by(found),
        "verify_s": round(took_s),
        "cheaper": sum(len(fleets) for _, fleets in by_hand),
        "better": len(better),
        "best_by_hand": min(better)[1] if better else "",
        "seconds": round(time.perf_counter() - start),
    }


def bound_plan(name: str, gpu: str) -> Plan:
    """Under the least limit of the ladder that a fleet holds by the laws."""
    workload = load_workload(name, rate_per_s=RATE_PER_S)
    for limit_s in LADDER_S:
        problem = make_problem(workload, [EngineSpec(gpu)], n_pools=2, slo=make_slo(ttft_p99_s=limit_s))
        plan = optimize(problem)
        if isinstance(plan, Plan):
            return plan
    raise RuntimeError(f"{name} on {gpu}: no limit of {LADDER_S} is held")


def layouts(plan: Plan) -> Iterator[Contender]:
    """The laws' best of one and of two pools, and the split at half and twice its threshold, as the laws size them."""
    problem, (spec,) = plan.problem, plan.problem.specs
    last = problem.window_tokens
    one = optimize(replace(problem, n_pools=1))
    if isinstance(one, Plan):
        yield contender(problem, one.specs, one.fleet)
    split = [float(w) for w in np.asarray(plan.fleet.window_tokens)[:-1]] or [float(last) / 4.0]
    for times in (0.5, 1.0, 2.0):
        window = times * split[0]
        if window < last:
            fleet = problem.fleet((spec, spec), [window, last], [1.0, 1.0], [1.0, 1.0])
            sized = size_fleet(fleet, problem.workload, problem.slo, problem.assumptions)
            n = np.asarray(sized.n_instances)
            if np.all(np.isfinite(n)):
                yield contender(problem, (spec, spec), fleet.with_instances(n))


def cheaper(layout: Contender, cost: float) -> list[tuple[int, ...]]:
    """The instances of the layout with a few fewer and more that cost less, the dearest first."""
    ranges = [range(max(1, n - FEWER), n + MORE + 1) for n in counts(layout.fleet.n_instances)]
    allowed = [n for n in itertools.product(*ranges) if all(a >= least for a, least in zip(n, layout.least))]
    return sorted((n for n in allowed if layout.cost(n) < cost * (1.0 - 1e-9)), key=layout.cost, reverse=True)


def held_among(problem: Problem, layout: Contender, fleets: list[tuple[int, ...]]) -> Iterator[tuple[float, str]]:
    """(Cost, what they are) of those of which a whole simulation is sure."""
    failed: list[tuple[int, ...]] = []
    for n in fleets:
        if any(all(a <= b for a, b in zip(n, worse)) for worse in failed):
            continue
        readings = {read(problem, layout, n, seed) for seed in SEEDS}
        if readings == {"holds"}:
            yield layout.cost(n), said(layout, n)
        elif "fails" in readings:
            failed.append(n)


def read(problem: Problem, layout: Contender, n: tuple[int, ...], seed: int) -> str:
    """What a whole simulation says of the worst limit."""
    fleet = layout.fleet.with_instances(np.array(n, float))
    found = simulate(fleet, problem.workload, problem.assumptions, problem.slo, seed=seed)
    return limits_read(found, problem.slo)[0].reading


def counts(n_instances) -> tuple[int, ...]:
    return tuple(int(n) for n in np.rint(np.asarray(n_instances)))


def said(layout: Contender, n: tuple[int, ...]) -> str:
    windows = np.asarray(layout.fleet.window_tokens)
    return " + ".join(f"{each} to {window:.0f}" for each, window in zip(n, windows, strict=True))


def tried_by(found: Verified) -> int:
    return len({(each.rival, each.n_instances) for each in found.tried})


if __name__ == "__main__":
    main()
