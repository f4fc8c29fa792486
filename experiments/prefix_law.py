"""The law of prefix caching against a simulated LRU cache of the same blocks.

    python experiments/prefix_law.py TRACE [TRACE ...]

Each trace has block hashes (Mooncake's FAST'25 release, or Dynamo's layout). A cache of 1 to 100 % of the unique blocks
is filled, block by block in order of arrival, and evicts what was used longest ago: hits counted in plain Python, which
shares no line with the law. Beside it the law on the trace's own ages, and on the grid of ages that a workload keeps.
The same for a threshold that splits requests by length, whose pools have caches that forget nothing, and for N caches
that requests are sent to at random. Writes results/prefix_law.csv.
"""

import argparse
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _results import write_table  # noqa: E402

from fleetopt_jax.catalog.engines import build  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.fleet.assumptions import PHYSICAL, WorkingSetCache  # noqa: E402
from fleetopt_jax.fleet.fleet import fleet_of  # noqa: E402
from fleetopt_jax.fleet.traffic import route  # noqa: E402
from fleetopt_jax.laws.prefix_cache import hit_frac, make_working_set  # noqa: E402
from fleetopt_jax.workload.atoms import make_workload  # noqa: E402
from fleetopt_jax.workload.blocks import uses_of  # noqa: E402
from fleetopt_jax.workload.compress import compress_with_members  # noqa: E402
from fleetopt_jax.workload.readers import Trace, read_workload_file  # noqa: E402
from fleetopt_jax.workload.reuse import age_grid, reuse_of, stream_of  # noqa: E402

SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the unique blocks
THRESHOLDS = (2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0)
CACHES = (1, 2, 4, 8, 16)
COLUMNS = ("trace", "kind", "at", "simulated", "law", "law_on_grid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    rows = []
    for path in parser.parse_args().traces:
        trace = read_workload_file(path)
        name = path.name.partition(".")[0]
        rows += [(name, *row) for row in (*sizes(trace), *split(trace), *at_random(trace))]
    for row in rows:
        print(*(f"{x:.4f}" if isinstance(x, float) else x for x in row))
    write_table("prefix_law.csv", COLUMNS, rows)


def requests_of(trace: Trace) -> list[list[int]]:
    """The blocks of each request."""
    return [part.tolist() for part in np.split(trace.blocks.ids, np.cumsum(trace.blocks.counts)[:-1])]


def lru_hits(requests: Iterable[list[int]], n_blocks: float) -> int:
    """Blocks found by a cache of so many that evicts the one used longest ago."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for blocks in requests:
        for block in blocks:
            if block in cache:
                hits += 1
                cache.move_to_end(block)
            else:
                cache[block] = None
                if len(cache) > n_blocks:
                    cache.popitem(last=False)
    return hits


def sizes(trace: Trace) -> list[tuple]:
    """Shares of blocks found by caches of growing size."""
    requests, blocks = requests_of(trace), trace.blocks
    n_unique = len(np.unique(blocks.ids))
    exact = stream_of(blocks, trace.prompt_tokens, in_blocks=True)
    ages = age_grid(len(requests), uses_of(blocks, trace.prompt_tokens))
    reused = np.interp(ages, exact.age_requests, exact.reused_tokens)
    grid = make_working_set(age_requests=ages, prompt_tokens=float(exact.prompt_tokens), reused_tokens=reused)
    rows = []
    for size in SIZES:
        simulated = lru_hits(requests, int(size * n_unique)) / len(blocks.ids)
        rows.append(("size", size, simulated, *(float(hit_frac(each, size * n_unique)) for each in (exact, grid))))
    return rows


def split(trace: Trace) -> list[tuple]:
    """Shares of tokens found where requests are split by length between two pools whose caches forget nothing."""
    atoms, atom = compress_with_members(trace.prompt_tokens, trace.output_tokens)
    total = trace.prompt_tokens + trace.output_tokens
    reuse = reuse_of(trace.blocks, trace.prompt_tokens, total, atom)
    workload = make_workload(*atoms, arrival_rate_per_s=10.0, reuse=reuse)
    uses, engine, rows = uses_of(trace.blocks, trace.prompt_tokens), build(EngineSpec("h100")), []
    for window in THRESHOLDS:
        pool = (total > window).astype(int)
        found = _found_by(pool[uses.request], trace, uses.tokens)
        fleet = fleet_of([engine] * 2, [window, float(total.max())], np.ones(2), np.ones(2))
        lanes = route(fleet, workload, replace(PHYSICAL, prefix_cache=WorkingSetCache())).reuse
        kept = jax.vmap(lambda lane: lane.kept(1.0) * lane.stream.reused_tokens)(lanes)
        law = float(np.sum(kept[:, -1])) / trace.prompt_tokens.mean()
        rows.append(("threshold", window, found, law, law))
    return rows


def at_random(trace: Trace) -> list[tuple]:
    """Shares of tokens found by N caches that forget nothing, of requests sent to them at random."""
    blocks, n = trace.blocks, len(trace.prompt_tokens)
    uses = uses_of(blocks, trace.prompt_tokens)
    reuse = reuse_of(blocks, trace.prompt_tokens, trace.prompt_tokens + trace.output_tokens, np.zeros(n, int))
    all_found = float(reuse.cached_tokens[0, -1]) / trace.prompt_tokens.mean()
    rng, rows = np.random.default_rng(0), []
    for caches in CACHES:
        found = _found_by(rng.integers(0, caches, n)[uses.request], trace, uses.tokens)
        kept = float(np.interp(np.log(caches), -np.log(reuse.shares), reuse.kept_frac[:, -1]))
        rows.append(("caches at random", caches, found, kept * all_found, kept * all_found))
    return rows


def _found_by(cache: np.ndarray, trace: Trace, tokens: np.ndarray) -> float:
    """Share of the tokens found, each block [M] by a cache of its own that forgets nothing."""
    seen: set[tuple[int, int]] = set()
    found = 0.0
    for key, of_block in zip(zip(cache.tolist(), trace.blocks.ids.tolist()), tokens.tolist(), strict=True):
        found += of_block if key in seen else 0.0
        seen.add(key)
    return found / float(trace.prompt_tokens.sum())


if __name__ == "__main__":
    main()
