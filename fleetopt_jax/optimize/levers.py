"""What pays: from the present fleet, one lever released at a time, everything else re-optimised; then pairs of them.

The present fleet is planned anew first (same engines, as many pools), so that a gain is the lever's own and not that of
a better threshold. A lever widens what the search may choose (pools, gamma, tensor parallelism, slots, clock), and then
it never loses; or it replaces something in every pool (GPU generation, precision, model), and then it may. The gain is
the cost of the present fleet over the cost with the lever, by the objective: tokens per joule, unless asked otherwise.

Two levers multiply where gain(a and b) = gain(a) gain(b); they reinforce where it is more and cancel where it is less.

Intervals hold the errors of the engines (`uncertainty.py`), common to every fleet that uses an engine, and where a
lever's own law states an error, that too. What nobody has measured has a label instead: see `Lever.quality`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import jax.numpy as jnp
import numpy as np

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import KW
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import at_clock
from fleetopt_jax.fleet.evaluate import FleetMetrics, Objective
from fleetopt_jax.optimize.plan import EngineChoice, Plan, Problem, plan_to_json
from fleetopt_jax.optimize.search import optimize
from fleetopt_jax.optimize.uncertainty import LEVEL, draw, sample, sampled_interval, shared_errors
from fleetopt_jax.workload.atoms import Workload, make_workload, mean_tokens

MOST_POOLS = 4
TPS = (1, 2, 4, 8)
SLOTS = (64, 128, 256, 512, 2048, 4096)  # max_num_seqs tried beside the present
CLOCKS = (0.5, 0.6, 0.7, 0.8, 0.9)  # tried beside the top clock; below 0.5 the law is too kind
CLOCK_ERROR = 0.2  # of the watts above idle at a clock of 0.7 (`laws/clocks.py`), growing with the distance from 1
PROMPT_FRAC = 0.5  # what compression leaves of every prompt: the paper's largest gamma
N_DRAWS = 300  # of the engines' errors
N_PAIRED = 5  # levers whose pairs are tried
PAPER_PAIRS = (("routing", "generation"), ("gamma", "generation"))  # tried whatever they gain: topology x generation
MULTIPLY = 0.03  # gain(a and b) within so much of gain(a) gain(b) counts as their product
QUALITIES = ("measured", "calibrated", "law", "scaled", "projected", "roofline", "assumed")  # best known first


@dataclass(frozen=True)
class Spec:
    """An engine by its names, and how it is run."""

    gpu: str
    llm: str
    tp: int
    precision: str
    kv_precision: str
    max_num_seqs: int | None = None
    clock_frac: float = 1.0
    file: str | None = None  # of a calibrated engine; one with other names comes from the catalog


def spec_of(choice: EngineChoice) -> Spec:
    """The names of a choice that runs at its top clock."""
    return Spec(
        gpu=choice.gpu,
        llm=choice.llm,
        tp=choice.tp,
        precision=choice.precision,
        kv_precision=choice.kv_precision,
        max_num_seqs=choice.max_num_seqs,
        file=choice.file,
    )


def _with(spec: Spec, **changes: Any) -> Spec:
    """`spec` changed; what was calibrated holds for its own names only."""
    renamed = any(
        changes.get(name, getattr(spec, name)) != getattr(spec, name) for name in ("gpu", "llm", "tp", "precision")
    )
    return replace(spec, **changes, **({"file": None} if renamed else {}))


Engines = Callable[[Spec], EngineChoice]  # the catalog; BadInput where it has no such engine or the LLM does not fit


class LeftOut(Exception):
    """Why a lever cannot be tried."""


@dataclass(frozen=True)
class Lever:
    """One thing to change. Two levers combine where they touch different parts of a plan."""

    name: str
    title: str  # what is done, in words
    touches: frozenset[str]
    quality: str  # how well its own law is known; with the engines' quality the worst counts
    n_pools: int = 1  # released: at most so many, if more than now
    free_gamma: bool = False
    variants: Callable[[Spec], Sequence[Spec]] = lambda spec: (spec,)
    prompt_frac: float = 1.0
    note: str = ""


def all_levers(
    present: Sequence[Spec], n_pools: int, gamma: float | None, *, next_gpu: str | None, llm: str
) -> list[Lever]:
    """Every lever that the present fleet has not pulled."""
    levers = []

    def add(name: str, title: str, touches: str, quality: str = "measured", **how: Any) -> None:
        levers.append(Lever(name, title, frozenset(touches.split()), quality, **how))

    if n_pools < 2:
        add("routing", "route by context length to two pools", "pools", "law", n_pools=2)
    if gamma is not None:
        title = (
            "two pools, compress prompts at the boundary (FleetOpt)"
            if n_pools < 2
            else "compress prompts at the boundaries"
        )
        add("gamma", title, "pools prompts", "assumed", n_pools=2, free_gamma=True, note=ASSUMED_COMPRESSION)
    if n_pools < MOST_POOLS:
        add("pools", f"up to {MOST_POOLS} pools by context length", "pools", "law", n_pools=MOST_POOLS)
    add("tp", f"tensor parallelism {', '.join(map(str, TPS[:-1]))} or {TPS[-1]}", "tp", variants=_tensor_parallel)
    add("max_num_seqs", f"max_num_seqs from {SLOTS[0]} to {SLOTS[-1]:,}", "slots", "law", variants=_slots)
    if next_gpu is not None and {spec.gpu for spec in present} != {next_gpu}:
        add(
            "generation", f"{next_gpu.upper()} in every pool", "gpu", variants=lambda spec: (_with(spec, gpu=next_gpu),)
        )
    if any(spec.precision == "bf16" for spec in present):
        add(
            "precision",
            "weights in fp8",
            "precision",
            variants=lambda spec: (_with(spec, precision="fp8"),),
            note=FP8_NOTE,
        )
    if any(spec.kv_precision == "bf16" for spec in present):
        add(
            "kv_precision",
            "KV cache in fp8",
            "kv",
            "law",
            variants=lambda spec: (_with(spec, kv_precision="fp8"),),
            note=FP8_NOTE,
        )
    if {spec.llm for spec in present} != {llm}:
        add(
            "model",
            f"serve {llm}",
            "llm",
            variants=lambda spec: (_with(spec, llm=llm),),
            note="another model: other answers",
        )
    add("clock", f"GPU clock, {CLOCKS[0]:.0%} to 100 % of the top", "clock", "projected", variants=_clocks)
    add(
        "compression",
        f"compress every prompt to {PROMPT_FRAC:.0%}",
        "prompts",
        "assumed",
        prompt_frac=PROMPT_FRAC,
        note=ASSUMED_COMPRESSION,
    )
    return levers


ASSUMED_COMPRESSION = "answers are assumed to stay good enough"
FP8_NOTE = "answers may differ"


def _tensor_parallel(spec: Spec) -> list[Spec]:
    return [_with(spec, tp=tp) for tp in sorted({spec.tp, *TPS})]


def _slots(spec: Spec) -> list[Spec]:
    return [spec, *(_with(spec, max_num_seqs=slots) for slots in SLOTS if slots != spec.max_num_seqs)]


def _clocks(spec: Spec) -> list[Spec]:
    return [spec, *(_with(spec, clock_frac=clock) for clock in CLOCKS)]


def lacking(lever: Lever, assumptions: Assumptions) -> str | None:
    """The law that `lever` needs and `assumptions` do not have; None where all are there."""
    needs = {
        "max_num_seqs": ("kv_cache", "paged", "slots reserve their window, whatever max_num_seqs says"),
        "kv_precision": ("kv_cache", "paged", "slots are counted, not bytes"),
        "clock": ("prefill", "compute", "nothing is bound by compute where prefill rides along free"),
        "compression": ("lengths", "trace", "a compressed request would shrink its output too"),
    }
    if lever.name not in needs:
        return None
    choice, value, why = needs[lever.name]
    return None if getattr(assumptions, choice) == value else f"{why} ({choice} = {getattr(assumptions, choice)})"


@dataclass(frozen=True)
class Pulled:
    """The best fleet with these levers released (none: the present fleet, planned anew)."""

    levers: tuple[Lever, ...]
    plan: Plan
    specs: tuple[Spec, ...]  # of the plan's pools
    values: Mapping[
        str, float
    ]  # tok_per_j, power_w, usd_per_h, ttft_p99_s, n_gpus, n_instances; empty where infeasible
    extra_w: float  # what compressing every prompt draws [W]

    @property
    def feasible(self) -> bool:
        return self.plan.metrics is not None


@dataclass(frozen=True)
class Gain:
    """A lever, or pair of them, over the present fleet; None where either fleet cannot hold the limits."""

    pulled: Pulled
    gain: float | None
    low: float | None  # interval at `LEVEL`
    high: float | None
    quality: str


@dataclass(frozen=True)
class Pair:
    """Two levers: gain(a and b) over gain(a) gain(b)."""

    gain: Gain
    product: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str  # multiply, reinforce, cancel; infeasible, or unknown where a gain is


@dataclass(frozen=True)
class Levers:
    """The answer, levers ranked by gain; those that cannot hold the limits last."""

    present: Pulled
    given: Plan | None  # the fleet as it was given
    gains: list[Gain]
    pairs: list[Pair]
    left_out: dict[str, str]  # why, by lever


Progress = Callable[[int, int], None]


def pull_levers(
    problem: Problem,
    engines: Engines,
    *,
    given: Plan | None = None,
    next_gpu: str | None = None,
    llm: str = "qwen3-235b-a22b",
    every_pair: bool = False,
    progress: Progress | None = None,
    search: Callable[[Problem], Plan] | None = None,
) -> Levers:
    """Every lever from the fleet that `problem` describes: its engines, at most as many pools, its gamma.

    `engines` makes the engines that levers need. `given` is the present fleet where there is one.
    """
    bench = _Bench(problem, engines, search or optimize)
    present = bench.pull(())
    specs = present.specs or tuple(bench.present)
    bench.present = list(dict.fromkeys(specs))
    left_out, pulled = {}, []
    levers = all_levers(specs, problem.n_pools, problem.gamma, next_gpu=next_gpu, llm=llm)
    n_pairs = math.comb(len(levers) if every_pair else N_PAIRED, 2) + len(PAPER_PAIRS)
    total = 1 + len(levers) + n_pairs
    for done, lever in enumerate(levers):
        if progress:
            progress(1 + done, total)
        try:
            pulled.append(bench.pull((lever,)))
        except LeftOut as why:
            left_out[lever.name] = str(why)
    by_name = {each.levers[0].name: each for each in pulled}
    pairs = []
    for done, names in enumerate(_pairs(pulled, problem.objective, every_pair)):
        if progress:
            progress(min(1 + len(levers) + done, total), total)
        try:
            pairs.append(bench.pull(tuple(by_name[name].levers[0] for name in names)))
        except LeftOut as why:
            left_out[" x ".join(names)] = str(why)
    if progress:
        progress(total, total)
    draws = _Draws([present, *pulled, *pairs] if present.feasible else [])
    gains = {each.levers[0].name: _gain(each, present, draws) for each in pulled}
    ranked = sorted(gains.values(), key=lambda gain: -_worth(gain.pulled, problem.objective))
    return Levers(present, given, ranked, [_pair(each, present, gains, draws) for each in pairs], left_out)


class _Bench:
    """The present problem, and what has been searched from it."""

    def __init__(self, problem: Problem, engines: Engines, search: Callable[[Problem], Plan]):
        self.problem, self._engines, self._search = problem, engines, search
        self._choices = {spec_of(choice): choice for choice in problem.choices}
        self.present = list(self._choices)
        self._rooflines = {choice.quality == "roofline" for choice in problem.choices}

    def pull(self, levers: tuple[Lever, ...]) -> Pulled:
        problem = self.problem
        if lacks := next(filter(None, (lacking(lever, problem.assumptions) for lever in levers)), None):
            raise LeftOut(lacks)
        specs = self.present
        for lever in levers:
            specs = list(dict.fromkeys(other for spec in specs for other in lever.variants(spec)))
        choices = self._known(specs)
        frac = math.prod(lever.prompt_frac for lever in levers)
        workload, slo, extra_w = (problem.workload, problem.slo, 0.0) if frac == 1 else _compressed(problem, frac)
        released = replace(
            problem,
            choices=tuple(choices.values()),
            n_pools=max([problem.n_pools, *(lever.n_pools for lever in levers)]),
            gamma=None if any(lever.free_gamma for lever in levers) else problem.gamma,
            workload=workload,
            slo=slo,
        )
        try:
            plan = self._search(released)
        except BadInput as refusal:
            if not levers:
                raise
            raise LeftOut(str(refusal)) from None
        by_identity = {id(choice): spec for spec, choice in choices.items()}
        used = tuple(by_identity[id(choice)] for choice in plan.choices)
        return Pulled(levers, plan, used, _values(plan, extra_w), extra_w)

    def _known(self, specs: Sequence[Spec]) -> dict[Spec, EngineChoice]:
        """The engines there are of these; `LeftOut` where there is none, or none that compares with the present."""
        found, why = {}, ""
        for spec in specs:
            try:
                found[spec] = self._choice(spec)
            except BadInput as refusal:
                why = str(refusal)
        alike = {spec: choice for spec, choice in found.items() if (choice.quality == "roofline") in self._rooflines}
        new = set(specs) - set(self.present)
        if not alike or (new and not new & set(alike)):
            comparable = "the paper's engines and its roofline law do not compare"
            raise LeftOut(comparable if new & set(found) else why)
        return alike

    def _choice(self, spec: Spec) -> EngineChoice:
        if spec not in self._choices:
            if spec.clock_frac == 1:
                self._choices[spec] = self._engines(spec)
            else:
                choice = self._choice(replace(spec, clock_frac=1.0))
                if choice.quality == "roofline":
                    raise BadInput(f"{spec.tp} x {spec.gpu}", "the roofline engine has no clock law")
                self._choices[spec] = replace(choice, engine=at_clock(choice.engine, spec.clock_frac))
        return self._choices[spec]


def _compressed(problem: Problem, frac: float) -> tuple[Workload, Any, float]:
    """(workload, limits, watts of the compressor) with every prompt compressed to `frac` of it.

    A try that fails leaves the prompt as it was. Limits are of the prompts as they came, less the compressor's time.
    """
    workload, compressor = problem.workload, problem.choices[0].engine.compressor
    success = float(compressor.success_frac)
    shapes = [(frac, success), (1.0, 1.0 - success)] if success < 1 else [(frac, 1.0)]
    prompt = np.asarray(workload.prompt_tokens)
    served = make_workload(
        np.concatenate([np.maximum(1.0, np.ceil(shrunk * prompt)) for shrunk, _ in shapes]),
        np.tile(np.asarray(workload.output_tokens), len(shapes)),
        np.concatenate([share * np.asarray(workload.weight) for _, share in shapes]),
        arrival_rate_per_s=float(workload.arrival_rate_per_s),
        arrival_scv=float(workload.arrival_scv),
        longest_tokens=float(workload.longest_tokens),
    )
    per_token_s = (float(problem.slo.ttft_s_per_token) - float(compressor.s_per_token)) / (
        frac if success == 1 else 1.0
    )
    if per_token_s < 0:
        raise LeftOut("compressing takes longer than the limit grows with the prompt; no law for that outside routing")
    power_w = float(workload.arrival_rate_per_s * mean_tokens(workload)[0] * compressor.j_per_token)
    site = problem.choices[0].engine.site
    pue = float(site.pue) if problem.assumptions.power_scope == "instance" else 1.0
    slo = replace(problem.slo, ttft_s_per_token=jnp.asarray(per_token_s, dtype=float))
    return served, slo, pue * power_w


def _values(plan: Plan, extra_w: float) -> dict[str, float]:
    metrics = plan.metrics
    if metrics is None:
        return {}
    of_all = plan.problem.slo.scope == "fleet"
    return {
        "output_tok_per_s": float(metrics.output_tok_per_s),
        "ttft_p99_s": float(metrics.ttft_p99_of_all_s if of_all else metrics.ttft_p99_s),
        "itl_s": float(metrics.itl_s),
        "n_gpus": float(metrics.n_gpus),
        "n_instances": float(metrics.n_instances),
        **_with_extra(metrics, plan, extra_w),
    }


def _with_extra(metrics: FleetMetrics | Mapping[str, Any], plan: Plan, extra_w: float) -> dict[str, Any]:
    """tok/J, watts and USD/h with `extra_w` more."""
    values = metrics if isinstance(metrics, Mapping) else vars(metrics)
    price = float(plan.choices[0].engine.site.usd_per_kwh)
    tok_per_j, power_w = np.asarray(values["tok_per_j"]), np.asarray(values["power_w"])
    made = {
        "tok_per_j": tok_per_j * power_w / (power_w + extra_w),
        "power_w": power_w + extra_w,
        "usd_per_h": np.asarray(values["usd_per_h"]) + extra_w / KW * price,
    }
    return made if isinstance(metrics, Mapping) else {name: float(value) for name, value in made.items()}


def _benefit(values: Mapping[str, Any], objective: Objective) -> Any:
    """What a gain is the ratio of: more is better."""
    match objective:
        case "tok_per_j":
            return values["tok_per_j"]
        case "usd":
            return 1.0 / values["usd_per_h"]
        case "power":
            return 1.0 / values["power_w"]
        case "gpus":
            return 1.0 / values["n_gpus"]


def _worth(pulled: Pulled, objective: Objective) -> float:
    """By which levers are ranked: those that cannot hold the limits last."""
    return float(_benefit(pulled.values, objective)) if pulled.feasible else -math.inf


def _pairs(pulled: Sequence[Pulled], objective: Objective, every: bool) -> list[tuple[str, str]]:
    """Pairs of levers to try: of all, or of the best that touch different things, and the paper's own."""
    ranked = [each.levers[0] for each in sorted(pulled, key=lambda each: -_worth(each, objective))]
    if not every:
        best: list[Lever] = []
        for lever in ranked:
            if len(best) < N_PAIRED and not any(lever.touches & other.touches for other in best):
                best.append(lever)
    combinable = [
        (a.name, b.name) for a, b in itertools.combinations(ranked if every else best, 2) if not a.touches & b.touches
    ]
    names = {lever.name for lever in ranked}
    asked = [pair for pair in PAPER_PAIRS if names.issuperset(pair)]
    return combinable + [pair for pair in asked if not {pair, pair[::-1]} & set(combinable)]


class _Draws:
    """Objectives of several fleets under common draws of their engines' errors."""

    def __init__(self, several: Sequence[Pulled]):
        usable = [each for each in several if each.feasible]
        self._benefits: dict[tuple[str, ...], np.ndarray] = {}
        ranks = np.random.default_rng(0).permutation(N_DRAWS)
        self._own = np.array([NormalDist().inv_cdf((rank + 0.5) / N_DRAWS) for rank in ranks])
        if not usable:
            return
        # The precision of the KV cache leaves weights, kernels and prefill as they are: the errors are the same ones.
        errors, of = shared_errors(
            [replace(choice, kv_precision="any") for each in usable for choice in each.plan.choices]
        )
        factors = draw(errors, N_DRAWS)
        ends = np.cumsum([len(each.plan.choices) for each in usable])
        for each, indices in zip(usable, np.split(np.asarray(of), ends[:-1])):
            problem = each.plan.problem
            values, _ = sample(
                each.plan.fleet,
                problem.workload,
                problem.slo,
                factors,
                jnp.asarray(indices),
                assumptions=problem.assumptions,
            )
            drawn = _with_extra({name: np.asarray(x) for name, x in values.items()}, each.plan, each.extra_w)
            drawn["n_gpus"] = np.full(N_DRAWS, each.values["n_gpus"])
            self._benefits[_names(each)] = _benefit(drawn, problem.objective)

    def interval(self, over: Iterable[Pulled], under: Iterable[Pulled], own_sigma: float = 0.0) -> tuple[float, float]:
        """Of the product of the objectives `over` divided by those `under`, and a lever's own error."""
        drawn = math.prod(self._benefits[_names(each)] for each in over)
        drawn = drawn / math.prod(self._benefits[_names(each)] for each in under)
        drawn = drawn * np.exp(own_sigma * self._own)
        found = sampled_interval(drawn, LEVEL)
        return found.low, found.high


def _names(pulled: Pulled) -> tuple[str, ...]:
    return tuple(lever.name for lever in pulled.levers)


def _gain(pulled: Pulled, present: Pulled, draws: _Draws) -> Gain:
    engines = [choice.quality for each in (pulled, present) for choice in each.plan.choices]
    quality = max([*engines, *(lever.quality for lever in pulled.levers)], key=_rank)
    if not (pulled.feasible and present.feasible):
        return Gain(pulled, None, None, None, quality)
    objective = pulled.plan.problem.objective
    gain = float(_benefit(pulled.values, objective) / _benefit(present.values, objective))
    own = _clock_sigma(pulled) if objective in ("tok_per_j", "power") else 0.0
    return Gain(pulled, gain, *draws.interval([pulled], [present], own), quality)


def _rank(quality: str) -> int:
    return QUALITIES.index(quality) if quality in QUALITIES else 0


def _clock_sigma(pulled: Pulled) -> float:
    """Error of the clock law in the logarithm of the fleet's power [-]."""
    if all(spec.clock_frac == 1 for spec in pulled.specs):
        return 0.0
    pools, total_w = pulled.plan.metrics.pools, float(pulled.plan.metrics.power_w)
    sigma = 0.0
    for k, (spec, choice) in enumerate(zip(pulled.specs, pulled.plan.choices)):
        above_idle = 1.0 - float(choice.engine.idle_w) / float(pools.gpu_power_w[k])
        sigma += CLOCK_ERROR * above_idle * (1.0 - spec.clock_frac) / 0.3 * float(pools.power_w[k]) / total_w
    return sigma


def _pair(pulled: Pulled, present: Pulled, gains: Mapping[str, Gain], draws: _Draws) -> Pair:
    both = _gain(pulled, present, draws)
    singles = [gains[lever.name] for lever in pulled.levers]
    if not pulled.feasible:
        return Pair(both, None, None, None, None, "infeasible")
    if both.gain is None or any(single.gain is None for single in singles):
        return Pair(both, None, None, None, None, "unknown")
    product = math.prod(single.gain for single in singles)
    ratio = both.gain / product
    low, high = draws.interval([pulled, present], [single.pulled for single in singles])
    verdict = "multiply" if abs(ratio - 1.0) <= MULTIPLY else "reinforce" if ratio > 1 else "cancel"
    return Pair(both, product, ratio, low, high, verdict)


def levers_to_json(found: Levers) -> dict[str, Any]:
    """The answer as one JSON object (SI units)."""
    present = found.present
    document = plan_to_json(present.plan)
    about = ("assume", "assumptions", "power_scope", "dispatch", "workload", "slo", "site", "compressor")
    given = found.given
    return {
        "schema": "fleetopt-levers/1",
        **{name: document[name] for name in about},
        "objective": present.plan.problem.objective,
        "interval_level": LEVEL,
        "present": _fleet_json(present)
        | {
            "binding": present.plan.binding,
            "given": given
            and {
                "status": given.status,
                "binding": given.binding,
                "tok_per_j": float(given.metrics.tok_per_j),
                "usd_per_h": float(given.metrics.usd_per_h),
                "n_gpus": float(given.metrics.n_gpus),
            },
        },
        "levers": [
            {
                "name": gain.pulled.levers[0].name,
                "title": gain.pulled.levers[0].title,
                "note": gain.pulled.levers[0].note,
            }
            | _gain_json(gain, present)
            for gain in found.gains
        ],
        "pairs": [
            {
                "levers": list(_names(pair.gain.pulled)),
                **_gain_json(pair.gain, present),
                "product": pair.product,
                "ratio": pair.ratio,
                "ratio_interval": _both(pair.low, pair.high),
                "verdict": pair.verdict,
            }
            for pair in found.pairs
        ],
        "left_out": [{"name": name, "why": why} for name, why in found.left_out.items()],
    }


def _gain_json(gain: Gain, present: Pulled) -> dict[str, Any]:
    now, then = present.values, gain.pulled.values
    known = bool(now and then)
    return {
        "feasible": gain.pulled.feasible,
        "gain": gain.gain,
        "gain_interval": _both(gain.low, gain.high),
        "tok_per_j_gain": then["tok_per_j"] / now["tok_per_j"] if known else None,
        "usd_per_h_change": then["usd_per_h"] - now["usd_per_h"] if known else None,
        "ttft_p99_change_s": then["ttft_p99_s"] - now["ttft_p99_s"] if known else None,
        "quality": gain.quality,
        "binding": gain.pulled.plan.binding,
        **_fleet_json(gain.pulled),
    }


def _both(low: float | None, high: float | None) -> list[float] | None:
    return None if low is None or high is None else [low, high]


def _fleet_json(pulled: Pulled) -> dict[str, Any]:
    names = ("tok_per_j", "power_w", "usd_per_h", "ttft_p99_s", "itl_s", "n_gpus", "n_instances")
    plan = pulled.plan
    return {
        "status": plan.status,
        **{name: pulled.values.get(name) for name in names},
        "pools": [
            {
                "window_tokens": int(plan.fleet.window_tokens[k]),
                "gamma": float(plan.fleet.gamma[k]),
                "n_instances": int(plan.fleet.n_instances[k]),
                **dataclasses.asdict(spec),
            }
            for k, spec in enumerate(pulled.specs)
        ],
    }
