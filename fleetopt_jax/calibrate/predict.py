"""What a closed-loop benchmark of an engine would show, with how sure that is.

    seconds and joules of every iteration: the engine's step law over `laws/closed_loop.py`'s schedule
    an interval: the engine's errors of the decode step, of prefill and of watts, each a factor exp(sigma z) common to
    the run; 90 %, by ln m ~ normal with the variance of the three, each taken at its own +-1.645 sigma

A benchmark's iterations do not depend on how long they take, so that errors of the engine change no batch: seconds and
joules are linear in the factors. Left out: the errors of the KV cache, and of the host of whoever measured.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.step_law import step_law_of
from fleetopt_jax.laws.closed_loop import Benchmark, Limits, Outcome, Schedule, fits, outcome, schedule
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS, caches_of
from fleetopt_jax.laws.mixed_step import StepBatch

LEVEL = 0.9  # of an interval
AT_ONCE = (256, 4096)  # entries of a schedule that a compiled call takes: two shapes, whatever the benchmarks
WHAT = ("ttft_s", "ttft_p99_s", "tpot_s", "output_tok_per_s", "power_w", "tok_per_j", "j_per_request")


@dataclass(frozen=True)
class Sigmas:
    """Standard deviations of the logarithms of what an engine is off by [-]."""

    step: float
    prefill: float
    power: float


@dataclass(frozen=True)
class Prediction:
    """What one benchmark would show of one instance, SI units."""

    ttft_s: float  # mean, the first wave's queueing in it
    ttft_median_s: float
    ttft_p99_s: float
    tpot_s: float  # mean over requests, after the first token
    tpot_median_s: float
    output_tok_per_s: float  # of the instance
    power_w: float  # of all its GPUs
    tok_per_j: float
    j_per_request: float
    intervals: dict[str, tuple[float, float]]  # of `WHAT`
    n_preempted: int  # sequences that lost their cache


@dataclass(frozen=True, eq=False)
class Parts:
    """Seconds and joules of every entry: what decoding takes, and what prompts add to it."""

    decode_s: np.ndarray
    prompt_s: np.ndarray
    decode_j: np.ndarray
    prompt_j: np.ndarray


def limits_of(engine: Engine) -> Limits:
    """What bounds the iterations of an engine."""
    if engine.speculation is not None:
        problem = "a closed loop is played with one token of a sequence in an iteration"
        raise BadField("speculate", problem, "need an engine that drafts nothing")
    reach = 2**30  # longer than any context: where a law does not say its window
    window = float(engine.decode.seen_tokens(jnp.asarray(float(reach))))
    kv = engine.kv
    return Limits(
        budget_tokens=int(engine.prefill.budget_tokens),
        max_num_seqs=int(kv.max_num_seqs),
        kv_tokens=float(kv.n_blocks) * BLOCK_TOKENS,
        fixed_tokens=float(kv.fixed_tokens),
        window_tokens=int(window),
        n_caches=float(np.asarray(caches_of(kv))),
    )


def predicted(
    engine: Engine, sigmas: Sigmas, benchmarks: Sequence[Benchmark], progress: Progress | None = None
) -> list[Prediction | None]:
    """What each benchmark would show of an instance of `engine`; None where the longest request does not fit."""
    limits, found = limits_of(engine), []
    for some in _chunks(benchmarks, lambda each: schedule(each, limits) if fits(each, limits) else None):
        schedules = [each for each in some if each is not None]
        parts = iter(parts_of(engine, schedules))
        found += [None if each is None else _prediction(engine, sigmas, each, next(parts)) for each in some]
        if progress:
            progress(len(found), len(benchmarks))
    return found


def _chunks(
    benchmarks: Iterable[Benchmark], made: Callable[[Benchmark], Schedule | None]
) -> Iterable[list[Schedule | None]]:
    """Schedules, as many at a time as fill a call."""
    some: list[Schedule | None] = []
    n = 0
    for benchmark in benchmarks:
        some.append(made(benchmark))
        n += 0 if some[-1] is None else len(some[-1].repeats)
        if n >= 4 * AT_ONCE[-1]:
            yield some
            some, n = [], 0
    yield some


def parts_of(engine: Engine, schedules: Sequence[Schedule]) -> list[Parts]:
    """Seconds and joules of the entries of every schedule, evaluated together."""
    if not schedules:
        return []
    ends = np.cumsum([len(each.repeats) for each in schedules])[:-1]
    found = evaluated(_entries, step_law_of(engine), [each.batch for each in schedules])
    return [Parts(*each) for each in np.split(found, ends, axis=1)]


def evaluated(function: Callable[[Any, StepBatch], Array], law: Any, batches: Sequence[StepBatch]) -> np.ndarray:
    """What a compiled function says of many entries [what, entries], by calls of two sizes."""
    names = [each.name for each in fields(StepBatch)]
    joined = np.stack([np.concatenate([getattr(each, name) for each in batches]) for name in names])
    done, start = [], 0
    while start < joined.shape[1]:
        size = AT_ONCE[0] if joined.shape[1] - start <= AT_ONCE[0] else AT_ONCE[-1]
        piece = joined[:, start : start + size]
        padded = np.pad(piece, ((0, 0), (0, size - piece.shape[1])), mode="edge")
        done.append(np.asarray(function(law, StepBatch(*padded)))[:, : piece.shape[1]])
        start += size
    return np.concatenate(done, axis=1)


@program
def _entries(law: Any, batch: StepBatch) -> Array:
    """(decode s, prompt s, decode J, prompt J) [4, entries] of one GPU."""
    none = jnp.zeros_like(batch.prompt_tokens)
    alone = replace(batch, prompt_tokens=none, prompt_pairs=none, windowed_pairs=none)
    decode_s, decode_j = jax.vmap(law.step_s)(alone), jax.vmap(law.gpu_j)(alone)
    return jnp.stack(
        [decode_s, jax.vmap(law.step_s)(batch) - decode_s, decode_j, jax.vmap(law.gpu_j)(batch) - decode_j]
    )


def _prediction(engine: Engine, sigmas: Sigmas, run: Schedule, parts: Parts) -> Prediction:
    n_gpus, first_s = float(engine.gpus_per_instance), float(step_law_of(engine).first_token_s)

    def shown(step: float = 1.0, prefill: float = 1.0) -> tuple[Outcome, dict[str, float]]:
        gpu_j = step * parts.decode_j + prefill * parts.prompt_j
        seen = outcome(run, step * parts.decode_s + prefill * parts.prompt_s, gpu_j)
        return seen, {
            "ttft_s": seen.ttft_s + first_s,
            "ttft_p99_s": seen.ttft_p99_s + first_s,
            "tpot_s": seen.tpot_s,
            "output_tok_per_s": seen.output_tok_per_s,
            "power_w": n_gpus * seen.gpu_w,
            "tok_per_j": 1.0 / (n_gpus * seen.gpu_j_per_tok),
            "j_per_request": n_gpus * seen.gpu_j_per_request,
        }

    z = NormalDist().inv_cdf(0.5 + LEVEL / 2.0)
    seen, values = shown()
    off = [
        tuple(shown(**{name: math.exp(sign * z * sigma)})[1] for sign in (1, -1))
        for name, sigma in (("step", sigmas.step), ("prefill", sigmas.prefill))
    ]
    intervals = {}
    for name, value in values.items():
        shifts = [math.log(more[name] / less[name]) / 2.0 if value > 0 else 0.0 for more, less in off]
        if name in ("power_w", "tok_per_j", "j_per_request"):
            shifts.append(z * sigmas.power)
        factor = math.exp(math.hypot(*shifts))
        intervals[name] = (value / factor, value * factor)
    return Prediction(
        ttft_median_s=seen.ttft_median_s + first_s,
        tpot_median_s=seen.tpot_median_s,
        intervals=intervals,
        n_preempted=run.n_preempted,
        **values,
    )
