"""Simulated requests and output tokens per second: ours, iteration by iteration, beside `vllm-sr-sim simulate`.

    python -m pip install -e ".[peer]" && taskset -c 0,1 python experiments/benchmarks/simulation.py

The peer's own command at its own sizes: azure-cdf at 200 requests/s, 18 + 10 instances split at 4,096 of 65,536 tokens,
30,000 requests, on its H100s. It serves a request in one event, at the step time of the batch it meets; ours runs every
iteration of every instance for the same fleet and workload, under `published` (the peer's laws) and `physical`. Both
draw their requests and simulate in this process, in turn; ratios are what to quote. The peer's printing and the start
of Python are left out.
Also, on the fleet that `fleetopt optimize` finds with no options: simulated output tokens per second, and iterations.
The first simulation of a size compiles it: `first_s`, to be compared with `seconds`, what the next ones take.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402

from fleetopt_jax._optimize.plan import require_plan  # noqa: E402
from fleetopt_jax._optimize.problem import make_problem  # noqa: E402
from fleetopt_jax._optimize.search import optimize  # noqa: E402
from fleetopt_jax._simulate import Simulation, simulate  # noqa: E402
from fleetopt_jax.catalog.engines import build  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import cdf_knots, load_workload  # noqa: E402
from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED, Assumptions  # noqa: E402
from fleetopt_jax.fleet.fleet import Fleet, make_fleet  # noqa: E402
from fleetopt_jax.workload.atoms import Workload  # noqa: E402

RATE_PER_S, WINDOWS, N_INSTANCES, N_REQUESTS = 200.0, (4096, 65_536), (18, 10), 30_000
PLAN_REPLICATIONS, PLAN_REQUESTS = 8, 50_000
ROUNDS = 5


@dataclass(frozen=True)
class Timed:
    """One simulation."""

    seconds: float
    simulation: Simulation

    @property
    def requests_per_s(self) -> float:
        return self.simulation.n_arrivals / self.seconds

    @property
    def iterations_per_s(self) -> float:
        return self.simulation.n_iterations / self.seconds


def main() -> None:
    of_both = {"published": _peers_fleet(PUBLISHED), "physical": _peers_fleet(PHYSICAL)}
    firsts = {name: run() for name, run in of_both.items()}
    peer = _peer()
    if peer:
        peer()
    rounds = [({name: run() for name, run in of_both.items()}, peer() if peer else None) for _ in range(ROUNDS)]
    result: dict[str, object] = {"n_requests": N_REQUESTS}
    for name in of_both:
        runs = [ours[name] for ours, _ in rounds]
        result |= {
            f"{name}_requests_per_s": median(run.requests_per_s for run in runs),
            f"{name}_iterations_per_s": median(run.iterations_per_s for run in runs),
            f"{name}_ratio": median(ours[name].requests_per_s / rate for ours, rate in rounds) if peer else None,
            f"{name}_first_s": firsts[name].seconds,
            f"{name}_seconds": median(run.seconds for run in runs),
        }
    result |= {"peer_requests_per_s": median(rate for _, rate in rounds) if peer else None}
    result |= _plan() | {"cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
    print(json.dumps(result, indent=2))
    write_whole(Path(__file__).parent / "simulation.json", json.dumps(result, indent=2) + "\n")


def _peers_fleet(assumptions: Assumptions) -> Callable[[], Timed]:
    engine = build(EngineSpec("h100", source=assumptions.engine.name))
    fleet = make_fleet([engine] * 2, window_tokens=WINDOWS, n_instances=N_INSTANCES)
    workload = load_workload("azure-cdf", rate_per_s=RATE_PER_S)
    return lambda: _timed(fleet, workload, assumptions, N_REQUESTS, 1)


def _plan() -> dict[str, float]:
    """The fleet of the default plan, as `simulate` runs it."""
    workload = load_workload("azure-conv")
    plan = require_plan(optimize(make_problem(workload, [EngineSpec("h100")])))
    runs = [_timed(plan.fleet, workload, PHYSICAL, PLAN_REQUESTS, PLAN_REPLICATIONS) for _ in range(1 + ROUNDS)]
    # All arrivals are served to the end, so that what was generated is what was asked for.
    tokens = runs[0].simulation.n_completed * float(np.sum(workload.weight * workload.output_tokens))
    warm = runs[1:]
    return {
        "plan_n_requests": runs[0].simulation.n_arrivals,
        "plan_n_instances": float(np.sum(plan.fleet.n_instances)) * PLAN_REPLICATIONS,
        "plan_output_tok_per_s": median(tokens / run.seconds for run in warm),
        "plan_requests_per_s": median(run.requests_per_s for run in warm),
        "plan_iterations_per_s": median(run.iterations_per_s for run in warm),
        "plan_first_s": runs[0].seconds,
        "plan_seconds": median(run.seconds for run in warm),
        "plan_memory_bytes": runs[0].simulation.memory_bytes,
    }


def _timed(fleet: Fleet, workload: Workload, assumptions: Assumptions, n_requests: int, n_replications: int) -> Timed:
    started = time.perf_counter()
    simulation = simulate(fleet, workload, assumptions, n_requests=n_requests, n_replications=n_replications)
    return Timed(time.perf_counter() - started, simulation)


def _peer() -> Callable[[], float] | None:
    """Requests per second of the peer's `simulate` on the same fleet, or None where it is not installed."""
    try:
        from fleet_sim.core.fleet import Fleet as PeerFleet
        from fleet_sim.core.fleet import FleetConfig, PoolConfig
        from fleet_sim.gpu_profiles.profiles import H100_80GB
        from fleet_sim.workload.synthetic import CdfWorkload, PoissonWorkload
    except ImportError:
        print("skipped: vllm-sr-sim is not installed (pip install 'fleetopt_jax[peer]'); ours alone is measured")
        return None
    knots = [(int(tokens), fraction) for tokens, fraction in cdf_knots("azure-cdf")]
    pools = [PoolConfig(name, H100_80GB, n, window) for name, n, window in zip(("short", "long"), N_INSTANCES, WINDOWS)]
    config = FleetConfig(pools=pools, router_type="LengthRouter", router_kwargs={"threshold": WINDOWS[0]})

    def run() -> float:
        started = time.perf_counter()
        lengths = CdfWorkload(knots, seed=42)
        arrivals = PoissonWorkload(RATE_PER_S, lengths, n_requests=N_REQUESTS, seed=42).generate()
        PeerFleet(config).run(arrivals, verbose=False)
        return N_REQUESTS / (time.perf_counter() - started)

    return run


if __name__ == "__main__":
    main()
