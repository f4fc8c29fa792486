"""Time of whole commands, cold (nothing compiled) and warm (all compiled in a run before), as a user waits for them.

    python experiments/benchmarks/commands.py [--runs 3] [--only ledger,levers] [--beside FOLDER]

Each command with its default options, `report`, `sensitivity` and `simulate` of the plan that `optimize` finds with
none. A cold run has an empty folder of compiled programs; warm ones have what the cold one left there. Wall seconds are
what a user waits, CPU seconds (user and system, of all threads) what it costs: on a busy machine only these compare.
Medians over `--runs` of both. `--beside` measures the package in another folder too, in turn with this one, run by run.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
COMMANDS = {
    "optimize": ["optimize"],
    "report": ["report", "plan.json"],
    "report_simulate": ["report", "plan.json", "--simulate"],
    "ledger": ["ledger"],
    "levers": ["levers"],
    "sensitivity": ["sensitivity", "plan.json"],
    "simulate": ["simulate", "plan.json"],
}
FINE = (0, 3)  # exit codes; 3: no fleet holds the limits, as a simulation may find


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1, help="of each command, cold and warm")
    parser.add_argument("--only", default=",".join(COMMANDS), help="commands by name")
    parser.add_argument("--beside", type=Path, help="a folder with another version of the package")
    options = parser.parse_args()
    from fleetopt_jax.core.files import write_whole

    trees = {"here": HERE.parents[1]} | ({"beside": options.beside.resolve()} if options.beside else {})
    result: dict = {
        "machine": {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "jaxlib")},
        "runs": options.runs,
        "commands": {},
    }
    for name in options.only.split(","):
        rows = [_in_turn(COMMANDS[name], trees) for _ in range(options.runs)]
        result["commands"][name] = {
            tree: {
                state: {unit: round(median(row[tree][state][unit] for row in rows), 2) for unit in ("wall_s", "cpu_s")}
                for state in ("cold", "warm")
            }
            for tree in trees
        }
        print(json.dumps({name: result["commands"][name]}), file=sys.stderr)
    text = json.dumps(result, indent=2)
    print(text)
    if list(result["commands"]) == list(COMMANDS):
        write_whole(HERE / "commands.json", text + "\n")


def _in_turn(command: list[str], trees: dict[str, Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds by tree and state, the trees one after another in each state."""
    found: dict[str, dict[str, dict[str, float]]] = {tree: {} for tree in trees}
    with tempfile.TemporaryDirectory() as folder:
        for tree, path in trees.items():
            (Path(folder) / tree).mkdir()
            if "plan.json" in command:
                _timed(["optimize", "--out", "plan.json"], path, Path(folder) / tree, "made")
        for state in ("cold", "warm"):
            for tree, path in trees.items():
                found[tree][state] = _timed(command, path, Path(folder) / tree, "kept")
    return found


def _timed(command: list[str], tree: Path, folder: Path, cache: str) -> dict[str, float]:
    """Seconds of one command of the package in `tree`, in `folder`, with compiled programs kept in `cache`."""
    environment = os.environ | {"PYTHONPATH": str(tree), "FLEETOPT_CACHE": str(folder / cache)}
    line = [sys.executable, "-m", "fleetopt_jax.cli.main", *command, "--quiet"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode not in FINE:
        raise SystemExit(f"{' '.join(command)} in {tree}: exit code {run.returncode}\n{run.stderr}")
    return {"wall_s": wall_s, "cpu_s": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime}


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
