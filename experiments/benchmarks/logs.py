"""How fast long logs are read, and in how much memory.

    python experiments/benchmarks/logs.py [--rows 50000000] [--hash-rows 5000000] [--only hashes] [--keep]

A log of so many requests is generated (log-normal prompts and outputs, Poisson arrivals at 80 requests/s, stamps with
milliseconds), as csv and as Parquet in groups of a million rows; each is then read to a `Workload` in a process of its
own. Wall seconds are what a user waits; CPU seconds (user and system, of all threads) what it costs: on a busy machine
only these compare. Memory is the most that was resident, by `/usr/bin/time -v` where that is there, else by the
process itself. Both with what Python, JAX and Arrow take by themselves.

A second log has the hashes of eight blocks with each request: one of a few system prompts, a document that a few talks
are about, and a talk that goes on four times in the mean, the last ones most. It is read as Parquet by a sample of its
blocks; its first million requests, which are kept, by all of them.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIME = "/usr/bin/time"
KINDS = ("parquet", "csv")
HASHED = ("sampled", "kept")
RATE_PER_S, GROUP = 80.0, 1_000_000
BLOCKS, BLOCK_TOKENS, KEPT_ROWS = 8, 512, 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--hash-rows", type=int, default=5_000_000)
    parser.add_argument("--folder", type=Path, help="where the logs are, or are written to; else a temporary one")
    parser.add_argument("--only", choices=("lengths", "hashes"), help="one of the two logs")
    parser.add_argument("--keep", action="store_true", help="write the figures to logs.json")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(_read(options.read)))
        return
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.only != "hashes":
            if not all((folder / f"log.{kind}").exists() for kind in KINDS):
                _write(folder, options.rows)
            about = {"machine": _machine(), "rows": options.rows}
            result |= about | {"read": {kind: _measured(folder / f"log.{kind}") for kind in KINDS}}
        if options.only != "lengths":
            files = {name: folder / f"hashes-{name}.parquet" for name in HASHED}
            for file, n in zip(files.values(), (options.hash_rows, min(KEPT_ROWS, options.hash_rows))):
                if not file.exists():
                    _write_hashes(file, n)
            about = {"machine": _machine(), "rows": options.hash_rows}
            result["hashes"] = about | {"read": {name: _measured(file) for name, file in files.items()}}
    print(json.dumps(result, indent=2))
    if options.keep:
        file = HERE / "logs.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | result, indent=2) + "\n")


def _write(folder: Path, n: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    rng, before_s = np.random.default_rng(0), 0.0
    schema = pa.schema([("timestamp_s", pa.float64()), ("prompt_tokens", pa.int64()), ("output_tokens", pa.int64())])
    with (
        pyarrow.parquet.ParquetWriter(folder / "log.parquet", schema) as as_parquet,
        pyarrow.csv.CSVWriter(str(folder / "log.csv"), schema) as as_csv,
    ):
        for start in range(0, n, GROUP):
            size = min(GROUP, n - start)
            stamps = before_s + np.cumsum(rng.exponential(1.0 / RATE_PER_S, size))
            before_s = stamps[-1]
            prompt, output = (
                np.maximum(1, np.round(np.exp(rng.normal(mean, sd, size)))).astype(int)
                for mean, sd in ((6.5, 1.2), (5.0, 1.0))
            )
            table = pa.table([np.round(stamps, 3), prompt, output], schema=schema)
            as_parquet.write_table(table)
            as_csv.write_table(table)


def _write_hashes(file: Path, n: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet

    rng, before_s = np.random.default_rng(0), 0.0
    names = ("timestamp_s", "prompt_tokens", "output_tokens")
    schema = pa.schema([*((name, pa.float64()) for name in names), ("hash_ids", pa.list_(pa.int64()))])
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, n, GROUP):
            size = min(GROUP, n - start)
            stamps = before_s + np.cumsum(rng.exponential(1.0 / RATE_PER_S, size))
            before_s = stamps[-1]
            talk = np.maximum((start + np.arange(size)) // 4 - rng.geometric(1e-3, size), 0)
            document = talk // 5
            ids = np.empty((size, BLOCKS), np.int64)
            ids[:, 0] = document % 8
            for depth in range(1, BLOCKS):
                ids[:, depth] = BLOCKS * (document if depth < BLOCKS // 2 else talk) + depth + 2**40
            hashes = pa.ListArray.from_arrays(np.arange(size + 1, dtype=np.int32) * BLOCKS, pa.array(ids.ravel()))
            prompt = BLOCK_TOKENS * BLOCKS - rng.integers(0, BLOCK_TOKENS, size).astype(float)
            output = np.maximum(1, np.round(np.exp(rng.normal(5.0, 1.0, size))))
            writer.write_table(pa.table([np.round(stamps, 3), prompt, output, hashes], schema=schema))


def _read(path: str) -> dict[str, float]:
    """In this process: the workload of a log, and what it took."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from fleetopt_jax.catalog.workloads import load

    wall_s, cpu_s = time.perf_counter(), time.process_time()
    loaded = load(path)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    prefix = loaded.prefix
    about = ("hit_frac_infinite", "one_in", "standard_error") if prefix else ()
    return {name: round(getattr(prefix, name), 5) for name in about} | {
        "n_requests": loaded.summary.n_requests or 0,
        "n_atoms": len(loaded.workload.weight),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _measured(file: Path) -> dict[str, float]:
    line = [sys.executable, __file__, "--read", str(file)]
    timed = [TIME, "-v", *line] if os.path.exists(TIME) else line
    run = subprocess.run(timed, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    if resident := re.search(r"Maximum resident set size \(kbytes\): (\d+)", run.stderr):
        found["resident_mib"] = int(resident[1]) / 1024
    n = found["n_requests"]
    found |= {"rows_per_s": n / found["wall_s"], "rows_per_cpu_s": n / found["cpu_s"]}
    return {name: round(value, 5 if value < 1 else 2) for name, value in found.items()}


def _machine() -> dict[str, object]:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("jax", "numpy", "pyarrow")}
    date = datetime.now(UTC).date().isoformat()
    return {"cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0], "date": date, **versions}


if __name__ == "__main__":
    main()
