"""Time of the searches, cold (with compilation) and warm, beside the peer's `optimize` and `pareto`.

    python -m pip install -e ".[peer]" && python experiments/benchmarks/optimizers.py [--peer vllm-sr-sim]

The exact search: azure-cdf at 1,000 requests/s, Llama-3.1-70B on 8 H100, at most four pools, every multiple of 16
tokens up to 65,536 (and every whole window for two pools). The gradient: 16 starts, three pools. Cold times are of a
new process each, from the call of `optimize` with JAX imported to the plan; warm ones the median of the calls after it.
The peer's are whole commands, less what starting it takes. What differs is how many fleets the time is for: the exact
search decides between all of them, the peer evaluates ten thresholds (`pareto`) or one (`optimize`).
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
WARM_CALLS = 4
CASES = [(method, assume) for method in ("exact", "gradient") for assume in ("published", "physical")]
PEER_THRESHOLDS = 10  # knots of the CDF that the peer tries as thresholds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--peer", default=shutil.which("vllm-sr-sim"), help="the peer's command")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(_case(*options.case)))
        return
    from fleetopt_jax.core.files import write_whole

    result: dict = {"cases": []}
    for method, assume in CASES:
        run = subprocess.run(
            [sys.executable, __file__, "--case", method, assume], capture_output=True, text=True, check=True
        )
        result["cases"].append(json.loads(run.stdout))
        print(json.dumps(result["cases"][-1]), file=sys.stderr)
    result["peer"] = _peer(options.peer) if options.peer else None
    if not options.peer:
        print("skipped: the peer is not installed (pip install 'fleetopt_jax[peer]')", file=sys.stderr)
    text = json.dumps(result, indent=2)
    print(text)
    write_whole(HERE / "optimizers.json", text + "\n")


def _case(method: str, assume: str) -> dict:
    """One search in this process: cold, then warm."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from fleetopt_jax._optimize.plan import require_plan
    from fleetopt_jax._optimize.problem import make_problem
    from fleetopt_jax._optimize.search import optimize
    from fleetopt_jax.catalog.spec import EngineSpec
    from fleetopt_jax.catalog.workloads import load_workload
    from fleetopt_jax.fleet.assumptions import PRESETS

    assumptions = PRESETS[assume]
    n_pools = {"exact": 4, "gradient": 3}[method]
    problem = make_problem(
        load_workload("azure-cdf"),
        [EngineSpec("h100", source=assumptions.engine.name)],
        n_pools=n_pools,
        assume=assume,
        assumptions=assumptions,
    )
    times = []
    for _ in range(1 + WARM_CALLS):
        started = time.perf_counter()
        plan = require_plan(optimize(problem, method))
        times.append(time.perf_counter() - started)
    warm_s = median(times[1:])
    fleets = _fleets(n_pools, int(problem.window_tokens)) if method == "exact" else plan.search.n_evaluated
    return {
        "method": method,
        "assume": assume,
        "pools": n_pools,
        "cold_s": times[0],
        "warm_s": warm_s,
        "tok_per_j": float(plan.metrics.tok_per_j),
        "by_pools": plan.search.by_pools,
        "n_computed": plan.search.n_evaluated,
        "fleets": fleets,
        "fleets_per_s": fleets / warm_s,
    }


def _fleets(n_pools: int, window_tokens: int) -> int:
    """Fleets the exact search decides between: whole windows for two pools, multiples of 16 for more."""
    blocks = window_tokens // 16 - 1
    return 1 + (window_tokens - 1) + sum(math.comb(blocks, k - 1) for k in range(3, n_pools + 1))


def _peer(command: str) -> dict:
    """Seconds of the peer's commands on the same CDF, and the fleets each evaluates."""
    from fleetopt_jax.catalog.workloads import cdf_knots

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cdf = Path(folder) / "azure.json"
        cdf.write_text(json.dumps([[int(tokens), share] for tokens, share in cdf_knots("azure-cdf")]))
        common = ["--cdf", str(cdf), "--lam", "1000", "--slo", "500", "--long-max-ctx", "65536"]
        for name, more in {
            "pareto": [],
            "optimize": ["--b-short", "4096", "--gamma-max", "1.0", "--verify-top", "0"],
        }.items():
            line = [command, name, *common, *more]
            times = []
            for _ in range(3):
                started = time.perf_counter()
                run = subprocess.run(line, capture_output=True, text=True, check=True)
                times.append(time.perf_counter() - started)
            start_s = _start_up_s(command)
            fleets = PEER_THRESHOLDS if name == "pareto" else 1
            search_s = max(median(times[1:]) - start_s, 1e-3)
            found[name] = {
                "command": " ".join([Path(command).name, *line[1:]]).replace(str(cdf), "azure-cdf.json"),
                "whole_s": median(times[1:]),
                "start_up_s": start_s,
                "fleets": fleets,
                "fleets_per_s": fleets / search_s,
                "output_tail": run.stdout.strip().splitlines()[-3:],
            }
    return found


def _start_up_s(command: str) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([command, "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return median(times)


if __name__ == "__main__":
    main()
