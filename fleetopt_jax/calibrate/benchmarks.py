"""Factors on an engine's laws from closed-loop benchmarks: what a user's stack adds to, or takes from, the catalog's.

    seconds of an iteration = f_d decode + f_p prefill + h + s n,     watts = f_w of the catalog's

with n sequences that decode: h and s are the host's, of an iteration and of a sequence. Who is in which iteration does
not depend on how long they take (`laws/closed_loop.py`), so that mean TTFT, mean TPOT and the seconds of a run (its
output over its throughput) are linear in (f_d, f_p, h, s). Least squares on relative errors; each measured mean counts
alike. What the points do not tell keeps the catalog's value (1, 1, 0, 0), the least told first: a factor known no
better than +-25 %, a time that cannot be told from 0 by two standard errors, what comes out negative, and what cannot
be told apart. Leave-one-out errors refit without each point, all its means at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetopt_jax.calibrate.fit import CONDITION_MAX, DecodeFit
from fleetopt_jax.calibrate.points import Point, benchmark
from fleetopt_jax.calibrate.predict import limits_of, parts_of
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.closed_loop import (
    Benchmark,
    Outcome,
    fits,
    outcome,
    schedule,
)
from fleetopt_jax.laws.decode import DecodeStep

CATALOG = {"decode_factor": 1.0, "prefill_factor": 1.0, "iteration_s": 0.0, "sequence_s": 0.0}  # in this order
FITTED = ("ttft_s", "tpot_s", "output_tok_per_s")
FACTOR_ERROR = 0.25  # standard error beyond which a factor is not told
SIGNIFICANT = 2.0  # standard errors of a time
REPEATED = 0.01  # relative: no benchmark repeats better, however well a few points are fitted
LEAST_POINTS = 2
WORDS = {
    "decode_factor": "decode",
    "prefill_factor": "prefill",
    "iteration_s": "the host's time of an iteration",
    "sequence_s": "the host's time of a sequence",
}


@dataclass(frozen=True)
class BenchmarkFit(DecodeFit):
    """Factors, as a decode step with them; `parameters` has all four, `names` those that the points tell."""

    kinds: tuple[str, ...]  # of each residual: TTFT, TPOT or throughput
    power_factor: float | None  # None: no watts were measured
    power_error: float | None  # its mean relative error, each point left out

    @property
    def left_out_mape(self) -> dict[str, float]:
        """Mean relative error of each kind, each point left out in turn."""
        kinds = np.array(self.kinds)
        return {kind: float(np.abs(self.left_out[kinds == kind]).mean()) for kind in dict.fromkeys(self.kinds)}


def is_benchmark(point: Point) -> bool:
    """Whether a point says its lengths, its load and both latencies, of an instance that a law is for."""
    return (
        not point.parallel
        and bool(point.isl and point.osl and point.concurrency)
        and {"ttft_s", "tpot_s"} <= point.measured.keys()
    )


def benchmark_of(point: Point) -> Benchmark:
    """The closed loop of a point that says its lengths and its load."""
    assert point.isl and point.osl
    return benchmark(point, point.isl, point.osl)


def fit_benchmarks(engine: Engine, points: Sequence[Point], where: str = "measurements") -> BenchmarkFit:
    """The factors of `engine` that the points tell. `BadInput` where there are too few, or where one does not fit."""
    step = engine.decode
    if not isinstance(step, DecodeStep):
        raise BadInput(where, f"{type(step).__name__} takes no factors", "need a catalog's engine")
    if len(points) < LEAST_POINTS:
        raise BadInput(where, f"{len(points)} points", f"factors need at least {LEAST_POINTS}")
    limits = limits_of(engine)
    for point in points:
        if not fits(benchmark_of(point), limits):
            raise BadInput(
                f"{where}, row {point.row + 1}", "the KV cache does not hold one request", "check the engine"
            )
    rows, kinds, of_point, watts = _rows(engine, points)
    solved = _Solved.told(where, rows)
    left_out = np.concatenate([_left_out(rows, of_point, i, solved.names) for i in range(len(points))])
    ratio = np.array(watts)
    parameters = CATALOG | solved.estimates
    return BenchmarkFit(
        names=solved.names,
        parameters=parameters,
        covariance=solved.covariance,
        batch=np.array([points[i].concurrency for i in of_point], dtype=float),
        residuals=rows @ np.array(list(parameters.values())) - 1.0,
        left_out=left_out,
        notes=tuple(solved.notes),
        form="benchmark",
        context_tokens=None,
        step=with_factors(step, parameters),
        kinds=tuple(kinds),
        power_factor=None if not watts else float(ratio.mean()),
        power_error=_spread(ratio) if len(watts) > 1 else None,
    )


def with_factors(step: DecodeStep, parameters: Mapping[str, float]) -> DecodeStep:
    """The decode step of an engine with these factors."""
    slower = step.slower(parameters["decode_factor"])
    base_s, per_seq_s = slower.base_s + parameters["iteration_s"], slower.per_seq_s + parameters["sequence_s"]
    return replace(slower, **as_floats(base_s=base_s, per_seq_s=per_seq_s))


def _rows(engine: Engine, points: Sequence[Point]) -> tuple[np.ndarray, list[str], list[int], list[float]]:
    """What each coefficient adds to each measured mean, over the mean [m, 4]; its kind and its point; and measured
    over predicted watts."""
    limits = limits_of(engine)
    runs = [schedule(benchmark_of(point), limits) for point in points]
    rows, kinds, of_point, watts = [], [], [], []
    for i, (point, run, parts) in enumerate(zip(points, runs, parts_of(engine, runs), strict=True)):
        ones, nothing = np.ones_like(parts.decode_s), np.zeros_like(parts.decode_s)
        columns = [
            outcome(run, seconds, nothing)
            for seconds in (parts.decode_s, parts.prompt_s, ones, np.asarray(run.batch.n_active))
        ]
        measured_of = point.seen(round(float(engine.gpus_per_instance)))
        for kind in FITTED:
            if kind in measured_of:
                rows.append([_seconds(each, kind, run.output_tokens) for each in columns])
                measured = measured_of[kind]
                rows[-1] = [value / _in_seconds(measured, kind, run.output_tokens) for value in rows[-1]]
                kinds.append(kind)
                of_point.append(i)
        if "power_w" in measured_of:
            seen = outcome(run, parts.decode_s + parts.prompt_s, parts.decode_j + parts.prompt_j)
            watts.append(measured_of["power_w"] / (seen.gpu_w * float(engine.gpus_per_instance)))
    return np.array(rows), kinds, of_point, watts


def _seconds(seen: Outcome, kind: str, output: np.ndarray) -> float:
    return _in_seconds(getattr(seen, kind), kind, output)


def _in_seconds(value: float, kind: str, output: np.ndarray) -> float:
    """A throughput as the seconds of its run, which are linear in the coefficients."""
    return float(output.sum()) / value if kind == "output_tok_per_s" else value


@dataclass(frozen=True)
class _Solved:
    """Least squares with what the points tell."""

    names: tuple[str, ...]
    estimates: dict[str, float]
    covariance: np.ndarray
    notes: list[str]

    @classmethod
    def told(cls, where: str, rows: np.ndarray) -> "_Solved":
        names, notes = list(CATALOG), []
        while True:
            theta, covariance, alike = _solve(rows, names)
            errors = np.sqrt(np.maximum(np.diag(covariance), 0.0))
            least, why = _least_told(names, theta, errors, alike)
            if not why:
                return cls(tuple(names), dict(zip(names, theta.tolist())), covariance, notes)
            if len(names) == 1:
                raise BadInput(
                    where, f"these points tell no factor of the engine: {WORDS[names[0]]} {why}", "need more"
                )
            unit = "1" if names[least].endswith("factor") else "0"
            notes.append(f"{WORDS[names[least]]} keeps the catalog's value ({unit}): it {why}")
            del names[least]


def _solve(rows: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int | None]:
    """(estimates, covariance, the first coefficient that another cannot be told from, if any)."""
    free = [list(CATALOG).index(name) for name in names]
    held = np.array([0.0 if name in names else value for name, value in CATALOG.items()])
    matrix, target = rows[:, free], 1.0 - rows @ held
    sizes = np.linalg.norm(matrix, axis=0)
    unit = matrix / np.where(sizes > 0, sizes, 1.0)
    _, singular, directions = np.linalg.svd(unit, full_matrices=False)
    if len(rows) <= len(names) or singular[-1] * CONDITION_MAX < singular[0]:
        alike = int(np.argmax([abs(weight) if i else 0.0 for i, weight in enumerate(directions[-1])]))
        return np.zeros(len(names)), np.zeros((len(names), len(names))), alike
    theta = np.linalg.lstsq(unit, target, rcond=None)[0] / sizes
    residuals = matrix @ theta - target
    variance = max(float(residuals @ residuals) / (len(rows) - len(names)), REPEATED**2)
    inverse = np.linalg.inv(unit.T @ unit) / np.outer(sizes, sizes)
    return theta, variance * inverse, None


def _least_told(names: Sequence[str], theta: np.ndarray, errors: np.ndarray, alike: int | None) -> tuple[int, str]:
    """Which coefficient the points tell least, and why it is not told; nothing where all are."""
    if alike is not None:
        return alike, "cannot be told from the others by these points"
    worst, least, why = 1.0, 0, ""
    for i, (name, value, error) in enumerate(zip(names, theta, errors)):
        factor = name.endswith("factor")
        allowed = FACTOR_ERROR * value if factor else value / SIGNIFICANT
        score = np.inf if value <= 0 else error / allowed
        if score > worst:
            said = f"is {value:.3g} +- {error:.2g}" if factor else f"is {1e3 * value:.3g} +- {1e3 * error:.2g} ms"
            worst, least, why = score, i, "comes out negative" if value <= 0 else f"{said} by these points"
    return least, why


def _left_out(rows: np.ndarray, of_point: Sequence[int], i: int, names: Sequence[str]) -> np.ndarray:
    """Residuals of point i, predicted from the others; from all where the others tell nothing."""
    out = np.array(of_point) == i
    theta, _, alike = _solve(rows[~out], names)
    found = CATALOG | ({} if alike is not None else dict(zip(names, theta.tolist())))
    return rows[out] @ np.array(list(found.values())) - 1.0


def _spread(ratio: np.ndarray) -> float:
    """Mean relative error of a factor, each point left out."""
    others = (ratio.sum() - ratio) / (len(ratio) - 1)
    return float(np.abs(others / ratio - 1.0).mean())
