"""Factors on an engine of operators from what its users measured: whole benchmarks, or steps at known batches.

    minimise  sum over means rho((ln predicted - ln measured) / sigma)  +  sum over factors (ln f)^2 / PRIORS^2,
    rho(x) = 2 (sqrt(1 + x^2) - 1)

The factors are those of `laws/factors.py`; each is drawn towards 1, the catalog's value, as strongly as the catalog is
trusted. Measured means: TTFT, TPOT (means, or medians where there are none) and the seconds of a run (its output over
its throughput) of closed loops; the seconds of decode steps; watts. Who is in which iteration does not depend on how
long they take (`laws/closed_loop.py`), so each mean is a weighted sum of the seconds of listed iterations. The watts
are compared last, at the seconds found.

sigma is what the means of one kind are off by: what the fit leaves of them, together with four more that were off by
3 %; rho lets a few that are further off count less, as first tokens of a server that queues elsewhere are. A factor
is told by the data if they leave its logarithm no more than half of its prior deviation, or if it is two standard
errors from 1; the least told keeps the catalog's value, and the others are fitted anew, until all that are left are
told. Leave-one-out errors refit without
each point, all its means at once; beside them stands what the catalog's engine says of the same means.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # whose parts load on first use

from fleetopt_jax.calibrate.benchmarks import benchmark_of
from fleetopt_jax.calibrate.fit import Fit
from fleetopt_jax.calibrate.measurements import Measurements
from fleetopt_jax.calibrate.points import Point
from fleetopt_jax.calibrate.predict import evaluated, limits_of
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.spec import EngineSpec, OwnLaws
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.programs import program
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.closed_loop import Schedule, fits, schedule
from fleetopt_jax.laws.factors import StepFactors, make_step_factors
from fleetopt_jax.laws.mixed_step import CLASSES, MixedStep, StepBatch, decoding
from fleetopt_jax.laws.operator_step import OperatorStep

# Standard deviations of the logarithms: what the catalog may be off by for a stack that nobody measured.
PRIORS = {
    "gpu": 0.15,
    "prompt": 0.3,
    "exchange": 0.25,
    "host": 0.5,
    "sequence": 0.7,
    "first_token": 0.7,
    "watts": 0.15,
}
TOLD = 0.5  # of the prior deviation, that data which tell a factor leave at most
SIGNIFICANT = 2.0  # standard errors from 1, which tell it as well
USUAL_ERROR, USUAL_MEANS = 0.03, 4.0  # what means are off by, and how many means' worth of that is known before
BENCHMARK_KINDS = (("ttft_s", "ttft_median_s"), ("tpot_s", "tpot_median_s"), ("output_tok_per_s",))
MIDDLE = 0.1  # share of the requests about the median that stand for it
FAR = 3.0  # largest ln f
OF_MEAN_ABSOLUTE = np.sqrt(np.pi / 2.0)  # sigma of normal errors over their mean absolute value
ROUNDS = 3  # of a fit and of what it leaves
WORDS = {
    "gpu": "the time of the GPU's kernels",
    "prompt": "what prompts add to it",
    "exchange": "that of large exchanges between GPUs",
    "host": "the host's time of a step",
    "sequence": "the time of each sequence",
    "first_token": "the time of a first token beyond its steps",
    "watts": "the watts above idle",
}


@dataclass(frozen=True)
class FactorsFit(Fit):
    """Factors that the data tell, in `names`; `parameters` has all, 1 where it is the catalog's."""

    notes: tuple[str, ...]
    kinds: tuple[str, ...]  # of each residual: TTFT, TPOT, throughput, a step, or power
    before: np.ndarray  # residuals of the catalog's engine
    spec: EngineSpec  # of the catalog's engine

    @property
    def factors(self) -> StepFactors:
        """What goes into `OwnLaws`."""
        return make_step_factors(**self.parameters)

    @property
    def left_out_mape(self) -> dict[str, float]:
        """Mean relative error of each kind, each point left out in turn."""
        return self._by_kind(self.left_out)

    @property
    def catalog_mape(self) -> dict[str, float]:
        """Mean relative error of each kind, of the catalog's engine."""
        return self._by_kind(self.before)

    def _by_kind(self, residuals: np.ndarray) -> dict[str, float]:
        kinds = np.array(self.kinds)
        return {kind: float(np.abs(residuals[kinds == kind]).mean()) for kind in dict.fromkeys(self.kinds)}

    @property
    def errors(self) -> dict[str, float | None]:
        """Of the decode step, of prefill and of power, points left out; None: not measured."""
        found = self.left_out_mape
        steps = (found.get(kind) for kind in ("step_s", "tpot_s", "tpot_median_s", "output_tok_per_s"))
        return {
            "step": next((error for error in steps if error is not None), None),
            "prefill": found.get("ttft_s", found.get("ttft_median_s")),
            "power": found.get("power_w"),
        }


def fit_factors(spec: EngineSpec, measured: Sequence[Point] | Measurements, where: str = "measurements") -> FactorsFit:
    """The factors on the catalog's engine of `spec` that whole benchmarks tell, or decode steps at known contexts.

    Raises BadInput where nothing was measured that the engine predicts, or the KV cache holds less than was served.
    """
    engine = engine_entry(replace(spec, laws=None)).engine
    if not isinstance(engine.step, OperatorStep):
        raise BadInput(
            where, f"{spec.serving} is not made of operators", "need another serving engine, or another form"
        )
    if isinstance(measured, Measurements):
        seen = _seen_steps(engine, measured)
    else:
        seen = _seen_benchmarks(engine, measured, where)
    table = _Table.of(engine.step.step, seen)
    names = [name for name in PRIORS if name != "watts" and (name != "exchange" or spec.split.n_gpus > 1)]
    solved, notes = _told(table, names) if len(table.measured) else (_Solved((), np.zeros(0), np.zeros((0, 0))), [])
    watts, more = _fit_watts(spec, seen, solved)
    if not (len(table.measured) or len(watts.kinds)):
        raise BadInput(where, "nothing that was measured is predicted", "need TTFT, TPOT, output_throughput or watts")
    return _joined(spec, table, solved, watts, (*notes, *more))


def is_measured(point: Point) -> bool:
    """Whether a point says its lengths, its load and anything that a benchmark shows."""
    kinds = {kind for some in BENCHMARK_KINDS for kind in some} | {"power_w"}
    seen = point.measured.keys() | point.per_gpu.keys()
    return bool(point.isl and point.osl and point.concurrency) and bool(seen & kinds)


# ------------------------------------------------------------------------------------------------- what was measured


@dataclass(frozen=True, eq=False)
class _Seen:
    """One point: its iterations [E], and of each measured mean the seconds it is, and their weights on iterations."""

    batch: StepBatch  # [E]
    repeats: np.ndarray  # [E]
    n_sequences: float  # in flight
    kinds: tuple[str, ...] = ()
    measured_s: tuple[float, ...] = ()
    weights: tuple[np.ndarray, ...] = ()  # [E] each
    first_tokens: tuple[float, ...] = ()  # how often each mean has the first token's own time
    power_w: float | None = None  # of one GPU


def _seen_steps(engine: Engine, measured: Measurements) -> list[_Seen]:
    """Decode steps at a batch and a context each, and the watts beside them."""
    contexts = measured.context_tokens
    if contexts is None:
        need = "need context_tokens, or isl and osl, or --form dense"
        raise BadInput(measured.source, "the contexts of the sequences are not said", need)
    window = float(engine.step.window_tokens) if engine.step else 0.0
    watts = measured.power_w_per_gpu
    return [
        _Seen(
            batch=jax.tree.map(lambda x: np.asarray(x, float)[None], decoding(n, context, window)),
            repeats=np.ones(1),
            n_sequences=float(n),
            kinds=("step_s",),
            measured_s=(float(step_s),),
            weights=(np.ones(1),),
            first_tokens=(0.0,),
            power_w=None if watts is None else float(watts[i]),
        )
        for i, (n, context, step_s) in enumerate(zip(measured.batch, contexts, measured.step_s, strict=True))
    ]


def _seen_benchmarks(engine: Engine, points: Sequence[Point], where: str) -> list[_Seen]:
    if not points:
        raise BadInput(where, "no points", "factors need at least 1")
    limits, n_gpus, found = limits_of(engine), round(float(engine.gpus_per_instance)), []
    for point in points:
        load = benchmark_of(point)
        if not fits(load, limits):
            raise BadInput(
                f"{where}, row {point.row + 1}", "the KV cache does not hold one request", "check the engine"
            )
        run, measured = schedule(load, limits), point.seen(n_gpus)
        means = [
            (kind, *_mean(run, kind, measured[kind]))
            for kind in (next((kind for kind in some if kind in measured), None) for some in BENCHMARK_KINDS)
            if kind
        ]
        kinds, measured_s, weights, first_tokens = zip(*means) if means else ((), (), (), ())
        found.append(
            _Seen(
                batch=run.batch,
                repeats=run.repeats,
                n_sequences=float(load.concurrency),
                kinds=kinds,
                measured_s=measured_s,
                weights=weights,
                first_tokens=first_tokens,
                power_w=measured["power_w"] / n_gpus if "power_w" in measured else None,
            )
        )
    return found


def _mean(run: Schedule, kind: str, measured: float) -> tuple[float, np.ndarray, float]:
    """(seconds of the mean, its weight on the seconds of an iteration of each entry [E], first tokens in it)."""
    output = run.output_tokens
    if kind == "output_tok_per_s":
        return float(output.sum()) / measured, run.repeats, 0.0
    ttft = kind.startswith("ttft")
    start, end = (run.sent, run.first) if ttft else (run.first, run.last)
    share = np.ones(len(output)) if ttft else np.where(output > 1, 1.0 / np.maximum(output - 1, 1), 0.0)
    share = _about_the_median(run, start, end, share) if "median" in kind else share
    n_entries = len(run.repeats)
    starts, ends = (np.bincount(at, share, n_entries + 1) for at in (start, end))
    passed = np.cumsum(starts - ends)[:n_entries]  # requests, by their share, that wait for each entry to be over
    counted = (output > 1) & (share > 0) if not ttft else share > 0
    return measured, run.repeats * passed / counted.sum(), 1.0 if ttft else 0.0


def _about_the_median(run: Schedule, start: np.ndarray, end: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The shares of the requests that are in the middle, counted in iterations; 0 of all others."""
    ends = np.concatenate([[0.0], np.cumsum(run.repeats)])
    rank = np.argsort(np.argsort(np.where(share > 0, (ends[end] - ends[start]) * share, np.inf), kind="stable"))
    middle = (np.count_nonzero(share) - 1) / 2.0
    return np.where(np.abs(rank - middle) <= max(MIDDLE / 2.0 * np.count_nonzero(share), 0.5), share, 0.0)


# ------------------------------------------------------------------------------------------------------- seconds


@dataclass(frozen=True, eq=False)
class _Table:
    """All iterations one after another, and of each mean its weights on them."""

    step: MixedStep
    work_s: np.ndarray  # of the operators but for collectives, timed alone
    exchange_s: np.ndarray  # of collectives, timed alone
    rows: np.ndarray
    prompt: np.ndarray  # whether a step has prompt tokens
    n_active: np.ndarray
    weights: "scipy.sparse.csr_array"  # [mean, iteration]
    first_tokens: np.ndarray  # [mean]
    measured: np.ndarray  # [mean] seconds
    kinds: tuple[str, ...]
    of_point: np.ndarray  # [mean]
    n_sequences: np.ndarray  # [mean]

    @classmethod
    def of(cls, step: MixedStep, seen: Sequence[_Seen]) -> "_Table":
        batches = [each.batch for each in seen]
        seconds = evaluated(_seconds, step, batches)
        n_active, prompt_tokens = (
            np.concatenate([np.asarray(getattr(each, name)) for each in batches])
            for name in ("n_active", "prompt_tokens")
        )
        passed = CLASSES.index("collectives")
        starts = np.concatenate([[0], np.cumsum([len(each.repeats) for each in seen])])
        of_point = [i for i, each in enumerate(seen) for _ in each.kinds]
        parts = [weights for each in seen for weights in each.weights]
        columns = [np.arange(starts[i], starts[i + 1]) for i in of_point]
        ends = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(int)
        joined = np.concatenate(parts) if parts else np.zeros(0), np.concatenate(columns) if parts else np.zeros(0, int)
        return cls(
            step=step,
            work_s=seconds.sum(axis=0) - seconds[passed],
            exchange_s=seconds[passed],
            rows=n_active + prompt_tokens,
            prompt=np.minimum(prompt_tokens, 1.0),
            n_active=n_active,
            weights=scipy.sparse.csr_array((*joined, ends), shape=(len(parts), int(starts[-1]))),
            first_tokens=np.array([x for each in seen for x in each.first_tokens]),
            measured=np.array([x for each in seen for x in each.measured_s]),
            kinds=tuple(kind for each in seen for kind in each.kinds),
            of_point=np.array(of_point, dtype=int),
            n_sequences=np.array([seen[i].n_sequences for i in of_point]),
        )

    def off(self, values: Mapping[str, float]) -> np.ndarray:
        """ln(predicted / measured) of each mean, with these factors."""
        host = jax.tree.map(np.asarray, make_step_factors(**values).of_host(self.step.host))
        gpu_s = self.work_s + host.exchanges(self.rows) * self.exchange_s
        step_s = np.asarray(host.step_of_s(gpu_s, self.step.n_layers, self.n_active, self.prompt, self.rows))
        return np.log((self.weights @ step_s + self.first_tokens * float(host.first_token_s)) / self.measured)


@program
def _seconds(step: MixedStep, batch: StepBatch) -> jax.Array:
    """[class, iteration] of operators timed alone."""
    return jax.vmap(lambda one: step.parts(one).seconds, out_axes=1)(batch)


# --------------------------------------------------------------------------------------------------------- the fit


@dataclass(frozen=True, eq=False)
class _Solved:
    """Logarithms of the factors in `names`, with their covariance."""

    names: tuple[str, ...]
    logs: np.ndarray
    covariance: np.ndarray
    left_out: np.ndarray = field(default_factory=lambda: np.zeros(0))  # ln of each mean, its point left out

    @property
    def values(self) -> dict[str, float]:
        return {name: float(np.exp(log)) for name, log in zip(self.names, self.logs)}

    @property
    def doubts(self) -> dict[str, float]:
        """How far each is from being told: at most 1 where it is."""
        errors = np.sqrt(np.diag(self.covariance))
        return {
            name: float(min(error / (TOLD * PRIORS[name]), SIGNIFICANT * error / max(abs(log), 1e-9)))
            for name, log, error in zip(self.names, self.logs, errors)
        }

    def said(self, name: str) -> str:
        """A factor and its standard error."""
        i = self.names.index(name)
        value = self.values[name]
        return f"{value:.2f} +- {value * np.sqrt(self.covariance[i, i]):.2g}"


Off = Callable[[Mapping[str, float]], np.ndarray]  # ln(predicted / measured) of each mean


def _told(table: _Table, names: list[str]) -> tuple[_Solved, list[str]]:
    """The fit of the factors that the means tell, the least told held at 1 one after another; and why."""
    names, notes = list(names), []
    while names:
        solved = _solve(table.off, names, table.kinds)
        doubts = solved.doubts
        least = max(doubts, key=lambda name: doubts[name])
        if doubts[least] <= 1.0:
            break
        notes.append(f"{WORDS[least]} keeps the catalog's value: these points tell a factor {solved.said(least)}")
        names.remove(least)
    else:
        solved = _Solved((), np.zeros(0), np.zeros((0, 0)))
    return replace(solved, left_out=_left_out(table.off, table.kinds, table.of_point, solved)), notes


def _solve(
    off: Off,
    names: Sequence[str],
    kinds: Sequence[str],
    kept: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> _Solved:
    """Least squares of the means in `kept`, with what those of each kind are off by found on the way."""
    chosen = np.ones(len(kinds), bool) if kept is None else kept
    of_kind = np.unique(np.asarray(kinds)[chosen], return_inverse=True)[1]
    count, priors = np.bincount(of_kind), np.array([PRIORS[name] for name in names])
    logs = np.zeros(len(names)) if start is None else start
    error = np.full(len(of_kind), USUAL_ERROR)

    def wrong(x: np.ndarray) -> np.ndarray:
        return off(dict(zip(names, np.exp(x))))[chosen]

    def residuals(x: np.ndarray, error: np.ndarray) -> np.ndarray:
        of_means = wrong(x) / error
        counted = np.sign(of_means) * np.sqrt(2.0 * (np.sqrt(1.0 + of_means**2) - 1.0))
        return np.concatenate([counted, x / priors])

    covariance = np.diag(priors**2)
    for _ in range(ROUNDS):
        begin, bounds = np.clip(logs, -FAR, FAR), (-1.01 * FAR, 1.01 * FAR)
        found = scipy.optimize.least_squares(residuals, begin, bounds=bounds, xtol=1e-7, args=(error,))
        logs, covariance = found.x, np.linalg.inv(found.jac.T @ found.jac)
        free = count * max(1.0 - len(names) / len(of_kind), 0.0)
        left = OF_MEAN_ABSOLUTE * np.bincount(of_kind, np.abs(wrong(logs)))
        error = ((left + USUAL_MEANS * USUAL_ERROR) / (free + USUAL_MEANS))[of_kind]
    return _Solved(tuple(names), logs, covariance)


def _left_out(off: Off, kinds: Sequence[str], of_point: np.ndarray, solved: _Solved) -> np.ndarray:
    """ln(predicted / measured) of the means of each point, by a fit to the others."""
    found = np.zeros(len(of_point))
    for i in np.unique(of_point):
        out = of_point == i
        others = _solve(off, solved.names, kinds, ~out, solved.logs) if solved.names and not out.all() else None
        found[out] = off(others.values if others else {})[out]
    return found


# -------------------------------------------------------------------------------------------------------------- watts


@dataclass(frozen=True, eq=False)
class _Watts:
    solved: _Solved
    off: np.ndarray  # ln of each, with the factor
    before: np.ndarray  # and of the catalog's engine
    n_sequences: np.ndarray

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("power_w",) * len(self.off)


GRID = np.linspace(-1.2, 1.2, 49)  # ln f at which watts are computed; between them they are interpolated


def _fit_watts(spec: EngineSpec, seen: Sequence[_Seen], solved: _Solved) -> tuple[_Watts, list[str]]:
    """The factor on the watts above idle, of steps that take the seconds found."""
    some = [each for each in seen if each.power_w is not None]
    nothing, none = np.zeros(0), _Solved((), np.zeros(0), np.zeros((0, 0)))
    if not some:
        return _Watts(none, nothing, nothing, nothing), []
    measured = np.array([each.power_w for each in some], dtype=float)

    def off_at(values: Mapping[str, float], logs: np.ndarray) -> np.ndarray:
        return np.log(_mean_watts(spec, values, logs, some) / measured)

    curves = off_at(solved.values, GRID)

    def off(values: Mapping[str, float]) -> np.ndarray:
        log = float(np.log(values.get("watts", 1.0)))
        return np.array([np.interp(log, GRID, curve) for curve in curves.T])

    kinds = ["power_w"] * len(some)
    found, notes = _solve(off, ["watts"], kinds), []
    if found.doubts["watts"] > 1.0:
        notes.append(f"{WORDS['watts']} keep the catalog's value: these points tell a factor {found.said('watts')}")
        found = none
    found = replace(found, left_out=_left_out(off, kinds, np.arange(len(some)), found))
    n_sequences = np.array([each.n_sequences for each in some])
    return _Watts(found, off(found.values), off_at({}, np.zeros(1))[0], n_sequences), notes


def _mean_watts(spec: EngineSpec, values: Mapping[str, float], logs: np.ndarray, seen: Sequence[_Seen]) -> np.ndarray:
    """Of one GPU [log, point], with these factors on its seconds and each of these on its watts [W]."""
    law = engine_entry(replace(spec, laws=OwnLaws(factors=make_step_factors(**values)))).engine.step
    assert isinstance(law, OperatorStep), "factors are on steps of operators"
    repeats = np.concatenate([each.repeats for each in seen])
    of_point = np.repeat(np.arange(len(seen)), [len(each.repeats) for each in seen])
    found = []
    for log in logs:
        factor = make_step_factors(watts=float(np.exp(log)))
        step_s, gpu_j = evaluated(_energy, replace(law, watts=factor.of_watts(law.watts)), [s.batch for s in seen])
        found.append(np.bincount(of_point, repeats * gpu_j) / np.bincount(of_point, repeats * step_s))
    return np.array(found)


@program
def _energy(law: OperatorStep, batch: StepBatch) -> jax.Array:
    """(seconds, joules of one GPU) [2, iteration]."""
    return jnp.stack([jax.vmap(law.step_s)(batch), jax.vmap(law.gpu_j)(batch)])


# --------------------------------------------------------------------------------------------------------- the answer


def _joined(spec: EngineSpec, table: _Table, solved: _Solved, watts: _Watts, notes: tuple[str, ...]) -> FactorsFit:
    """Seconds and watts together, as factors and relative errors."""
    names = (*solved.names, *watts.solved.names)
    values = {**solved.values, **watts.solved.values}
    logs = np.zeros((len(names), len(names)))
    k = len(solved.names)
    logs[:k, :k], logs[k:, k:] = solved.covariance, watts.solved.covariance
    factors = np.array([values[name] for name in names])
    return FactorsFit(
        names=names,
        parameters={**dict.fromkeys(PRIORS, 1.0), **values},
        covariance=logs * factors * factors[:, None],
        batch=np.concatenate([table.n_sequences, watts.n_sequences]),
        residuals=np.expm1(np.concatenate([table.off(solved.values), watts.off])),
        left_out=np.expm1(np.concatenate([solved.left_out, watts.solved.left_out])),
        notes=notes,
        kinds=(*table.kinds, *watts.kinds),
        before=np.expm1(np.concatenate([table.off({}), watts.before])),
        spec=spec,
    )
