"""A plan beside what was observed of its fleet: what lies within the errors, and which one input explains it best.

Predicted is what the laws say of the plan's fleet, at the plan's rate; and at the observed one, where that differs by
more than counters err. The intervals are of drawn errors: of the engines and the laws of latency as in `holding.py`, by
the same draws, and of what is read off counters and meters (`METERS`). The laws' error of a P99 TTFT is taken for its
mean and median too, that of a mean ITL for its P99; figures of the whole fleet err as those of one more pool.

A figure is off by ln(observed / predicted), in sigmas of its own; the misfit is the sum of their squares. For each of a
few inputs, alone, the factor is sought that leaves the least of it, by two grids and a parabola, the fleet as it is. An
input that is not the cause can leave little as well: how much each leaves is said of all of them.

Left out: causes that come together, and errors that figures share (each weighs by itself).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np

from fleetopt_jax._optimize.engine_errors import factors_of, normal_scores
from fleetopt_jax._optimize.holding import Errors, drawn
from fleetopt_jax._optimize.law_errors import LAW_ERRORS
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.shifted import FIGURES, Shift, Trial, no_shift, shifted_figures
from fleetopt_jax._optimize.uncertainty import LEVEL, Interval, sampled_interval
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.core.struct import as_floats

N_DRAWS = 256
METERS = 0.02  # sigma of the logarithm of what is read off counters and meters [-]
OF_METERS = 2  # keeps these draws from those of the laws
OF_LEVEL = 1.645  # sigmas from the middle of an interval of `LEVEL` to an end
MOST_OFF = math.log(1000.0)  # what a prediction that is infinite counts as being off by
COARSE, FINE = 25, 17  # points of the two grids of a factor
AT_BOUND = 1.02  # a factor within this of its bound may be beyond it
EXPLAINS = 0.5  # share of the misfit that an input must take away to be called an explanation
WORTH = 1.0  # misfit a figure [sigma^2] up to which there is nothing to explain

InputName = Literal["rate", "burstiness", "prompts", "outputs", "decode", "prefill", "power", "instances"]
OF_TTFT, OF_ITL = ("ttft_s", "ttft_p50_s", "ttft_p99_s"), ("itl_s", "itl_p99_s")


@dataclass(frozen=True)
class ObservedFigure:
    """A figure of a pool, or of the whole fleet, as it was observed (SI units)."""

    name: str  # of `FIGURES`: rate_per_s, output_tok_per_s, power_w, ttft_s, ttft_p50_s, ttft_p99_s, itl_s, itl_p99_s
    value: float
    pool: int | None = None  # from 0; None: the fleet
    between: tuple[float, float] | None = None  # where a histogram tells no more than its bucket; the end may be inf


@dataclass(frozen=True)
class ComparedFigure:
    """What was observed beside what the laws say (SI units)."""

    observed: ObservedFigure
    predicted: float  # inf where requests wait for ever
    interval: Interval  # of `LEVEL`, by errors of engines, laws and meters
    log_sigma: float  # of predicted and observed together [-]

    @property
    def inside(self) -> bool:
        low, high = self.observed.between or (self.observed.value, self.observed.value)
        return low <= self.interval.high and high >= self.interval.low

    @property
    def log_off(self) -> float:
        """ln(observed / predicted), at most `MOST_OFF` either way [-]."""
        return _log_off(self.observed, np.array([self.predicted]))[0]


@dataclass(frozen=True)
class Explanation:
    """What one input would have to be, times what the plan has, and how much of the misfit that takes away."""

    input: InputName
    pool: int | None  # from 0, of instances that are one pool's; None: of all pools
    factor: float
    removes: float  # share of the misfit [-]
    at_bound: bool  # whether the factor may lie beyond what was tried
    figures: tuple[float, ...]  # as then predicted, in the order of the observed ones
    hit_frac: float | None = None  # of faster prefill: what prompts would find of their tokens in a prefix cache


@dataclass(frozen=True)
class Account:
    """Observed and predicted at one rate, and what explains the difference, best first."""

    rate_per_s: float
    figures: tuple[ComparedFigure, ...]
    explanations: tuple[Explanation, ...]

    @property
    def misfit(self) -> float:
        """Mean of the squared distances in sigmas [-]; about 1 or less where errors alone explain it."""
        return float(np.mean([(each.log_off / each.log_sigma) ** 2 for each in self.figures]))

    @property
    def best(self) -> Explanation | None:
        """The input that explains it; None where none takes half of the misfit away."""
        first = self.explanations[0] if self.explanations else None
        return first if first and first.removes >= EXPLAINS else None


@dataclass(frozen=True)
class Comparison:
    """A plan beside what was observed of its fleet."""

    planned: Account  # at the plan's rate
    at_observed_rate: Account | None  # where a rate was observed that is not the plan's
    not_compared: tuple[ObservedFigure, ...]  # of which no law of the plan's assumptions says anything
    n_draws: int
    seed: int


def compare(plan: Plan, observed: Sequence[ObservedFigure], *, n_draws: int = N_DRAWS, seed: int = 0) -> Comparison:
    """What the laws say of a plan's fleet beside what was observed of it.

    `observed` are figures of pools or of the fleet; `BadField` names one that is none. The plan keeps its fleet and its
    workload; a rate that was observed is compared, and then taken for granted.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> plan = fo.require_plan(fo.optimize(fo.make_problem(chat, [fo.EngineSpec("h100")], n_pools=1)))
    >>> slow = fo.ObservedFigure("itl_s", 4.0 * float(plan.metrics.itl_s))
    >>> fo.compare(plan, [slow]).planned.figures[0].inside
    False
    """
    require_float64("compare")
    _check(plan, observed)
    n_lanes = len(plan.specs)
    as_is = predicted(plan, observed, [Trial(no_shift(n_lanes))])[0]
    known = [each for each, value in zip(observed, as_is, strict=True) if not math.isnan(value)]
    if not known:
        names = ", ".join(dict.fromkeys(each.name for each in observed))
        raise BadField(
            "observed", names, "need a figure that the plan's laws say something of, as the P99 TTFT of a pool"
        )
    planned = _account(plan, known, 1.0, n_draws, seed)
    factor = _observed_rate(planned.figures)
    there = None if factor is None else _account(plan, known, factor, n_draws, seed)
    rest = tuple(each for each in observed if each not in known)
    return Comparison(planned=planned, at_observed_rate=there, not_compared=rest, n_draws=n_draws, seed=seed)


def _check(plan: Plan, observed: Sequence[ObservedFigure]) -> None:
    if not observed:
        raise BadField("observed", "no figure", f"need some of {', '.join(FIGURES)}")
    for each in observed:
        if each.name not in FIGURES:
            raise BadField("observed", f"unknown figure {each.name!r}", f"known: {', '.join(FIGURES)}")
        if not 0 < each.value < math.inf:
            raise BadField(each.name, f"{each.value:g}", "need a positive, finite number in SI units")
        if each.pool is not None and not 0 <= each.pool < len(plan.specs):
            raise BadField("pool", f"{each.pool}", f"the plan has {len(plan.specs)}, counted from 0")
        low, high = each.between or (each.value, each.value)
        if not 0 <= low <= each.value <= high:
            raise BadField(each.name, f"{each.value:g} between {low:g} and {high:g}", "need ends around the value")


def predicted(plan: Plan, observed: Sequence[ObservedFigure], trials: Sequence[Trial]) -> np.ndarray:
    """What the laws say of each of the figures [m, figures], in SI units."""
    found = shifted_figures(plan, [each.name for each in observed], trials)
    return np.stack([found[each.name][:, _place(each, plan)] for each in observed], axis=1)


def _place(each: ObservedFigure, plan: Plan) -> int:
    return len(plan.specs) if each.pool is None else each.pool


def _observed_rate(figures: Sequence[ComparedFigure]) -> float | None:
    """The observed rate over the plan's, of the fleet or else of the pools it was observed of; None where none was, or
    it is the plan's within what counters err."""
    rates = [each for each in figures if each.observed.name == "rate_per_s"]
    rates = [each for each in rates if each.observed.pool is None] or rates
    there = sum(each.predicted for each in rates)
    if not there > 0:
        return None
    factor = sum(each.observed.value for each in rates) / there
    return None if abs(math.log(factor)) <= OF_LEVEL * METERS else factor


# --- at one rate ------------------------------------------------------------------------------------------------------


def _account(plan: Plan, observed: Sequence[ObservedFigure], rate: float, n_draws: int, seed: int) -> Account:
    """At so many times the plan's rate; where that is not 1, as it was observed, it explains nothing more."""
    base = Trial(replace(no_shift(len(plan.specs)), **as_floats(rate=rate)))
    figures = _compared(plan, observed, base, n_draws, seed)
    return Account(
        rate_per_s=rate * float(plan.problem.workload.arrival_rate_per_s),
        figures=figures,
        explanations=_explanations(plan, figures, base, known_rate=rate != 1.0),
    )


def _compared(
    plan: Plan, observed: Sequence[ObservedFigure], base: Trial, n_draws: int, seed: int
) -> tuple[ComparedFigure, ...]:
    off = [drawn(spec, k, n_draws, seed) for k, spec in enumerate(plan.specs)]
    of_fleet = off[0] if len(off) == 1 else drawn(plan.specs[0], len(off), n_draws, seed)
    factors = jax.tree.map(lambda *lanes: np.stack(lanes, axis=-1), *(each.engine for each in off))  # [n, K]
    draws = [replace(base.shift, engine=factors_of(factors, i)) for i in range(n_draws)]
    trials = [base, *(replace(base, shift=shift) for shift in draws)]
    values = predicted(plan, observed, trials)
    meters = np.exp(METERS * normal_scores((), n_draws, (seed, OF_METERS)))
    found = []
    for i, each in enumerate(observed):
        of_place = of_fleet if each.pool is None else off[each.pool]
        drawn_so = values[1:, i] * _law_error(each, of_place) * meters
        interval = sampled_interval(drawn_so, LEVEL)
        found.append(ComparedFigure(each, float(values[0, i]), interval, _log_sigma(each, values[0, i], interval)))
    return tuple(found)


def _law_error(each: ObservedFigure, errors: Errors) -> np.ndarray | float:
    """Of the laws of latency, draw by draw."""
    if each.name in OF_TTFT:
        return np.asarray(errors.ttft)
    return np.asarray(errors.itl) if each.name in OF_ITL else 1.0


def _log_sigma(each: ObservedFigure, value: float, interval: Interval) -> float:
    """Half an interval of logarithms; its lower half where the upper has no end, and the laws' where neither tells."""
    low, high = interval.low, interval.high
    if low > 0 and high < math.inf:
        sigma = math.log(high / low) / (2.0 * OF_LEVEL)
    elif 0 < low < value < math.inf:
        sigma = math.log(value / low) / OF_LEVEL
    else:
        sigma = LAW_ERRORS.ttft_p99_s
    return math.hypot(max(sigma, METERS), _log_width(each) / math.sqrt(12.0))  # anywhere in its bucket, as likely


def _log_width(each: ObservedFigure) -> float:
    low, high = each.between or (each.value, each.value)
    return math.log(min(high, 2.0 * each.value) / max(low, each.value / 8.0))


def _log_off(each: ObservedFigure, values: np.ndarray) -> np.ndarray:
    """ln(observed / predicted) of predictions [m]; 0 where what was observed is only known to be above some value, and
    so is the prediction."""
    with np.errstate(divide="ignore"):
        off = np.clip(math.log(each.value) - np.log(values), -MOST_OFF, MOST_OFF)
    return np.maximum(off, 0.0) if each.between and each.between[1] == math.inf else off


# --- what explains it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Input:
    name: InputName
    pool: int | None = None

    @property
    def most(self) -> float:
        """The largest factor that is tried; the least is its inverse."""
        return 8.0 if self.name == "burstiness" else 2.0

    def times(self, base: Trial, factor: float) -> Trial:
        """The trial with the input so many times what it is."""
        shift, n_lanes = base.shift, len(base.shift.instances)
        if self.name == "prompts":
            return replace(base, prompts=base.prompts * factor)
        if self.name == "outputs":
            return replace(base, outputs=base.outputs * factor)
        of_lanes = np.where([self.pool in (None, k) for k in range(n_lanes)], factor, 1.0)
        return replace(base, shift=_multiplied(shift, self.name, factor, of_lanes))


def _multiplied(shift: Shift, name: str, factor: float, of_lanes: np.ndarray) -> Shift:
    engine = {"decode": "step", "prefill": "prefill", "power": "power"}.get(name)
    if engine:
        changed = as_floats(**{engine: getattr(shift.engine, engine) * of_lanes})
        return replace(shift, engine=replace(shift.engine, **changed))
    by = of_lanes if name == "instances" else factor
    return replace(shift, **as_floats(**{name: getattr(shift, name) * by}))


def _inputs(plan: Plan, figures: Sequence[ComparedFigure], *, known_rate: bool) -> list[_Input]:
    """What may be the cause: the rate unless it is known; a pool's instances where figures are told by pool."""
    names: tuple[InputName, ...] = ("burstiness", "prompts", "outputs", "decode", "prefill", "power", "instances")
    found = [_Input(name) for name in (names if known_rate else ("rate", *names))]
    told = {each.observed.pool for each in figures if each.observed.pool is not None}
    return found + ([_Input("instances", k) for k in sorted(told)] if len(plan.specs) > 1 else [])


def _explanations(
    plan: Plan, figures: Sequence[ComparedFigure], base: Trial, *, known_rate: bool
) -> tuple[Explanation, ...]:
    """Best first."""
    inputs = _inputs(plan, figures, known_rate=known_rate)
    observed = [each.observed for each in figures]

    def misfits(grids: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(misfit [n], predicted [n, figures]) of each input at the logarithms of its factors."""
        trials = [each.times(base, math.exp(x)) for each, grid in zip(inputs, grids, strict=True) for x in grid]
        values = predicted(plan, observed, trials)
        of_inputs = np.split(values, np.cumsum([len(grid) for grid in grids])[:-1])
        return [(_misfit(figures, some), some) for some in of_inputs]

    coarse = [np.linspace(-math.log(each.most), math.log(each.most), COARSE) for each in inputs]
    fine = [_around(grid, misfit) for grid, (misfit, _) in zip(coarse, misfits(coarse), strict=True)]
    last = [np.array([_vertex(grid, misfit)]) for grid, (misfit, _) in zip(fine, misfits(fine), strict=True)]
    before = _misfit(figures, np.array([[each.predicted for each in figures]]))[0]
    found = []
    for each, grid, (misfit, values) in zip(inputs, last, misfits(last), strict=True):
        removes = 1.0 - misfit[0] / before if before > 0 else 0.0
        factor = math.exp(grid[0]) if removes > 0 else 1.0
        found.append(
            Explanation(
                input=each.name,
                pool=each.pool,
                factor=factor,
                removes=max(removes, 0.0),
                at_bound=max(factor, 1.0 / factor) * AT_BOUND > each.most,
                figures=tuple(values[0].tolist()),
                hit_frac=_hits(plan, factor) if each.name == "prefill" else None,
            )
        )
    return tuple(sorted(found, key=lambda each: -each.removes))


def _hits(plan: Plan, factor: float) -> float | None:
    """The share of their tokens that prompts would have to find in a cache for prefill to take so many times as long;
    None where it takes longer, or what is found depends on the cache. Attention to what is found is left out."""
    cache = plan.problem.assumptions.prefix_cache
    found = getattr(cache, "hit_frac", None if cache.finds else 0.0)
    if found is None or factor >= 1.0:
        return None
    return 1.0 - factor * (1.0 - found)


def _misfit(figures: Sequence[ComparedFigure], values: np.ndarray) -> np.ndarray:
    """Sum of the squared distances in sigmas of predictions [m, figures]."""
    off = [(_log_off(each.observed, values[:, i]) / each.log_sigma) ** 2 for i, each in enumerate(figures)]
    return np.sum(off, axis=0)


def _around(grid: np.ndarray, misfit: np.ndarray) -> np.ndarray:
    """A finer grid between the neighbours of the least."""
    at = int(np.argmin(misfit))
    return np.linspace(grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)], FINE)


def _vertex(grid: np.ndarray, misfit: np.ndarray) -> float:
    """Where a parabola through the least and its neighbours is least."""
    at = int(np.argmin(misfit))
    if not 0 < at < len(grid) - 1:
        return float(grid[at])
    before, here, after = misfit[at - 1 : at + 2]
    bend = before - 2.0 * here + after
    return float(grid[at] + (0.5 * (before - after) / bend * (grid[1] - grid[0]) if bend > 0 else 0.0))
