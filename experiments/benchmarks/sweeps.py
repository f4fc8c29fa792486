"""How long sweeps take, from a hundred scenarios to ten thousand, beside `optimize` one by one.

    python experiments/benchmarks/sweeps.py [--sizes 100,1000,10000] [--workers 1] [--keep]

Scenarios: the published two-pool exact search of azure-cdf over 256 thresholds, rates from 50 to 1,000 requests/s on
H100. Each size is a sweep in a process of its own, programs compiled before: seconds from the call to the file. Wall
seconds are what a user waits, CPU seconds (user and system, of all threads) what it costs: on a busy machine only these
compare. Beside it, the mean of a few warm calls of `optimize`, which searches every window, not 256 of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
N_ALONE = 5  # calls of optimize


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="100,1000,10000")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="write the figures to sweeps.json")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.size is not None:
        print(json.dumps(_swept(options.size, options.workers) if options.size else _alone()))
        return
    machine: dict[str, object] = {"cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}
    machine |= {"date": datetime.now(UTC).date().isoformat(), "jax": version("jax")}
    sizes = [int(size) for size in options.sizes.split(",")]
    _measured(1, options.workers)  # compiles
    result = {
        "machine": machine,
        "workers": options.workers,
        "sweeps": [_measured(size, options.workers) for size in sizes],
        "optimize_alone": _measured(0, 1),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.keep:
        (HERE / "sweeps.json").write_text(text + "\n")


def _measured(size: int, workers: int) -> dict[str, float]:
    line = [sys.executable, __file__, "--size", str(size), "--workers", str(workers)]
    return json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


def prepare() -> None:
    """JAX as the commands use it."""
    from fleetopt_jax.cli.backend import configure

    configure()


def problem(rate: float):
    """One scenario."""
    import fleetopt_jax as fo

    workload = fo.load_workload("azure-cdf", rate_per_s=rate)
    spec = fo.EngineSpec("h100", source="projected")
    return fo.make_problem(workload, [spec], assume="published", assumptions=fo.PUBLISHED)


def _swept(size: int, workers: int) -> dict[str, float]:
    prepare()
    import fleetopt_jax as fo

    with tempfile.TemporaryDirectory() as folder:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        rates = np.linspace(50.0, 1000.0, size)
        table = fo.sweep(problem, {"rate": rates}, f"{folder}/rates.parquet", workers=workers, prepare=prepare)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    optimal = table["status"].to_pylist().count("optimal")
    each = {"wall_ms_each": round(1e3 * wall_s / size, 3), "cpu_ms_each": round(1e3 * cpu_s / size, 3)}
    return {"scenarios": size, "optimal": optimal, "wall_s": round(wall_s, 2), "cpu_s": round(cpu_s, 2), **each}


def _alone() -> dict[str, float]:
    prepare()
    import fleetopt_jax as fo

    rates = np.linspace(50.0, 1000.0, N_ALONE)
    fo.optimize(problem(500.0))  # compiles
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for rate in rates:
        fo.optimize(problem(float(rate)))
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return {
        "scenarios": N_ALONE,
        "wall_ms_each": round(1e3 * wall_s / N_ALONE, 1),
        "cpu_ms_each": round(1e3 * cpu_s / N_ALONE, 1),
    }


if __name__ == "__main__":
    main()
