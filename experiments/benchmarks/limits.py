"""How far evaluations are from what the machine can do: bytes moved, arithmetic, and exponentials.

    python experiments/benchmarks/limits.py

Measured in this process, on all cores: the bandwidth of copying an array that no cache holds, double-precision
multiplications and additions of a matrix product, and exponentials of an array that a cache holds. XLA says what one
evaluation of `evaluations.py` moves, computes and takes exponentials (and other transcendentals) of, each try of a pool
counted once; beside it stands how long one takes. The largest share is what holds it; what no share explains are
gathers, selections and waiting for one another. Writes limits.json.
"""

import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from evaluations import BATCH, asked, per_s  # noqa: E402

from fleetopt_jax._optimize.candidates import CHUNK, FEW, score_batch  # noqa: E402
from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.core.threads import N_THREADS, in_threads  # noqa: E402
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED, Assumptions  # noqa: E402

ROUNDS = 5
COPIED = 32 * 2**20  # numbers of an array, 256 MiB
SIDE = 1024  # of the matrices
HELD = 16 * 2**10  # numbers whose exponentials are taken
TIMES = 400


def main() -> None:
    machine = {"cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0], "jax": version("jax")}
    limits = {"bytes_per_s": _copied(), "flops_per_s": _multiplied(), "transcendentals_per_s": _exponentials()}
    result = {"machine": machine, "limits": limits} | {
        name: _beside(assumptions, limits) for name, assumptions in (("published", PUBLISHED), ("physical", PHYSICAL))
    }
    text = json.dumps(result, indent=2)
    print(text)
    write_whole(Path(__file__).parent / "limits.json", text + "\n")


def _best(work: Callable[[], object]) -> float:
    """Seconds of all cores at it, the least of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        list(in_threads(lambda _: work(), range(N_THREADS)))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _copied() -> float:
    source = np.ones(COPIED // N_THREADS)
    return 2.0 * source.nbytes * N_THREADS / _best(lambda: np.copyto(np.empty_like(source), source))


def _multiplied() -> float:
    a = jnp.asarray(np.random.default_rng(0).uniform(size=(SIDE, SIDE)))
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    started = time.perf_counter()
    for _ in range(ROUNDS):
        jax.block_until_ready(product(a))  # on all cores by itself
    return 2.0 * SIDE**3 * ROUNDS / (time.perf_counter() - started)


def _exponentials() -> float:
    x = jnp.linspace(-1.0, 0.0, HELD)
    again = jax.jit(lambda x: jax.lax.fori_loop(0, TIMES, lambda _, x: jnp.exp(-x), x))
    jax.block_until_ready(again(x))
    return HELD * TIMES * N_THREADS / _best(lambda: jax.block_until_ready(again(x)))


def _beside(assumptions: Assumptions, limits: dict[str, float]) -> dict[str, object]:
    arguments, how = asked(assumptions)
    chunk = FEW if assumptions.tail.has_distribution else CHUNK
    whole, one = (_costs(arguments, how, n) for n in (BATCH, chunk))
    # A loop over chunks is counted once, and so is a try: what is common to a batch, and a chunk.
    each = {name: (whole[name] - one[name]) / (BATCH - chunk) for name in whole}
    each = {name: max(each[name], 0.0) + (one[name] - each[name] * chunk) / chunk for name in whole}
    second_each = 1.0 / per_s(assumptions)[0]()
    names = {"flops": "flops_per_s", "bytes accessed": "bytes_per_s", "transcendentals": "transcendentals_per_s"}
    shares = {name: each[name] / limits[limit] / second_each for name, limit in names.items()}
    return {
        "seconds_each": second_each,
        "each": each,
        "share_of_its_time": shares,
        "held_by": max(shares, key=lambda name: shares[name]),
    }


def _costs(arguments: tuple, how: dict, n: int) -> dict[str, float]:
    """What XLA counts of a batch of n."""
    fleet, boundaries, _, workload, slo = arguments
    some = jax.tree.map(lambda x: x[:n], boundaries)
    lowered = jax.jit(score_batch, static_argnames="assumptions").lower(fleet, some, n, workload, slo, **how)
    found = lowered.compile().cost_analysis()
    return {name: float(found.get(name, 0.0)) for name in ("flops", "bytes accessed", "transcendentals")}


if __name__ == "__main__":
    main()
