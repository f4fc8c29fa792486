"""Every benchmark, one after another, each in a process of its own; their figures go to the json files beside this.

    python -m experiments.benchmarks [--only evaluations,limits]

On a machine that does nothing else: each file says how many processes wanted a core as it began. `evaluations`,
`optimizers` and `simulation` run the peer in turn with ours where it is installed (`pip install -e ".[peer]"`).
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS: dict[str, list[str]] = {  # and what makes them keep their figures, where they do not by themselves
    "evaluations": [],
    "limits": [],
    "optimizers": [],
    "services": [],
    "simulation": [],
    "sweeps": ["--keep"],
    "logs": ["--keep"],
    "commands": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names, with commas")
    names = parser.parse_args().only.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"--only: no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    failed = []
    for name in names:
        started = time.perf_counter()
        run = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *BENCHMARKS[name]])
        print(f"{name}: {time.perf_counter() - started:.0f} s, exit code {run.returncode}", flush=True)
        failed += [name] * (run.returncode != 0)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
