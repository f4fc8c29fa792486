"""The sampling procedure behind table 3, to the draw: 3,000 seeded samples a pool, sub-CDFs that reach below the split.

`--assume published` does not use it (nobody should search over a noisy sampler); `reproduce` prints it beside the
exact integral.
"""

import math
import random
from dataclasses import dataclass

import numpy as np

from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.kv_cache import max_sequences
from fleetopt_jax.laws.prefill import prefill_chunks
from fleetopt_jax.laws.queueing import p99_wait_s
from fleetopt_jax.laws.service import MIN_SCV
from fleetopt_jax.workload.atoms import OUTPUT_SHARE, split_total

Knots = list[tuple[float, float]]

N_DRAWS = 3000
SEED = 42
RATE_PER_S = 1000.0
TTFT_LIMIT_S = 0.5
MAX_UTILIZATION = 0.85
LONG_WINDOW_TOKENS = 65_536


@dataclass(frozen=True)
class SampledFleet:
    """Totals of a sampled fleet, in the paper's convention of one GPU's watts for an instance."""

    n_instances: int
    power_w: float
    output_tok_per_s: float

    @property
    def tok_per_w(self) -> float:
        return self.output_tok_per_s / self.power_w

    def __add__(self, other: "SampledFleet") -> "SampledFleet":
        return SampledFleet(
            self.n_instances + other.n_instances,
            self.power_w + other.power_w,
            self.output_tok_per_s + other.output_tok_per_s,
        )


def sampled_homogeneous(engine: Engine, knots: Knots, rate_per_s: float = RATE_PER_S) -> SampledFleet:
    """One pool with the long window."""
    return _pool(engine, knots, rate_per_s, _long_window(knots))


def sampled_two_pool(
    engine: Engine, knots: Knots, short_window: int, gamma: float, rate_per_s: float = RATE_PER_S
) -> SampledFleet:
    """Cut at gamma * short_window; the short part is served in a window of short_window."""
    short, long, share = cut(knots, gamma * short_window)
    return _pool(engine, short, rate_per_s * share, short_window) + _pool(
        engine, long, rate_per_s * (1.0 - share), _long_window(knots)
    )


def _long_window(knots: Knots) -> int:
    """The paper's 65,536 tokens; longer only where the requests are (no CDF of the paper's)."""
    return max(LONG_WINDOW_TOKENS, int(knots[-1][0]))


def cut(knots: Knots, at: float) -> tuple[Knots, Knots, float]:
    """(short sub-CDF, long sub-CDF, share of the short one); the long one's first interval reaches below the cut."""
    tokens, fractions = zip((0.0, 0.0), *knots)
    share = float(np.interp(at, tokens, fractions))
    short = [(t, f / share) for t, f in knots if t < at] + [(at, 1.0)]
    long = [(t, (f - share) / (1.0 - share)) for t, f in knots if t > at]
    return short, [*long[:-1], (long[-1][0], 1.0)], share


def sampled_lengths(knots: Knots, window: int) -> np.ndarray:
    """The total lengths of the 3,000 draws [tokens]."""
    rng = random.Random(SEED)
    lengths = []
    for _ in range(N_DRAWS):
        u = rng.random()
        index = next(i for i, (_, fraction) in enumerate(knots) if u <= fraction)
        low = max(1, int(knots[index - 1][0]) + 1) if index else 1
        high = min(window, int(knots[index][0]))
        lengths.append(rng.randint(low, high) if low <= high else window)
    return np.array(lengths, dtype=float)


def mean_output_tokens(knots: Knots) -> int:
    """max(1, int(0.2 * mean of the interval midpoints)) of a sub-CDF, uncompressed."""
    tokens, fractions = (np.array([0.0, *values]) for values in zip(*knots))
    midpoints = (tokens[1:] + tokens[:-1]) / 2.0
    return max(1, int(OUTPUT_SHARE * float(np.sum(midpoints * np.diff(fractions)))))


def _pool(engine: Engine, knots: Knots, rate_per_s: float, window: int) -> SampledFleet:
    n_max = float(max_sequences(engine.kv, window))
    lengths = sampled_lengths(knots, window)
    prompt, output = split_total(lengths)
    steps = prefill_chunks(prompt, engine.prefill.chunk_tokens) + np.maximum(1.0, output)
    service_s = np.asarray(steps * engine.decode.step_s(n_max, lengths))
    mean_s = float(service_s.mean())
    scv = max(MIN_SCV, float(np.mean(service_s**2)) / mean_s**2 - 1.0)
    busy = rate_per_s * mean_s / n_max
    n_instances = max(1, math.ceil(busy) + 1)
    while p99_wait_s(n_instances * n_max, rate_per_s, mean_s, scv) > TTFT_LIMIT_S:
        n_instances += 1
    n_instances = max(n_instances, math.ceil(busy / MAX_UTILIZATION))
    n_active = max(1, int(busy / n_instances * n_max))
    board_w = float(engine.power.gpu_w(n_active, 0.0))
    return SampledFleet(n_instances, n_instances * board_w, rate_per_s * mean_output_tokens(knots))
