"""What pays: from the present fleet, one lever released at a time, everything else re-optimised; then pairs of them.

The present fleet is planned anew first (same specs, as many pools), so that a gain is the lever's own and not that of a
better threshold. A lever widens what the search may choose (pools, gamma, tensor parallelism, slots, clock or drafts),
and then it never loses; or it replaces something in every pool (GPU generation, precision, model), and then it may; or
it takes work away, as much as is assumed (compression, prefix caching). What it does not change is kept (`changes.py`).
The gain is the cost of the present fleet over the cost with the lever, by the objective: tokens per joule, unless asked
otherwise.

Two levers multiply where gain(a and b) = gain(a) gain(b); they reinforce where it is more and cancel where it is less.

Intervals hold the errors of the engines (`uncertainty.py`), common to every fleet that uses an engine, and where a
lever's own law states an error, that too. What nobody has measured has a label instead: see `Lever.quality`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax._optimize.changes import Lever, all_levers
from fleetopt_jax._optimize.derivatives import outcomes
from fleetopt_jax._optimize.engine_errors import draw, shared_errors, without_drafts
from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.releasing import MOST_CACHED_POOLS, LeftOut, of_caches, release
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax._optimize.uncertainty import LEVEL, Interval, sample, sampled_interval
from fleetopt_jax.catalog.engines import engine_entry, resolved
from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.catalog.llms import LlmEntry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.core.units import KW
from fleetopt_jax.fleet.resources import Resources, Weights, usage
from fleetopt_jax.fleet.surroundings import Site

CLOCK_ERROR = 0.2  # of the watts above idle at a clock of 0.7 (`laws/clocks.py`), growing with the distance from 1
N_DRAWS = 300  # of the engines' errors
N_PAIRED = 5  # levers whose pairs are tried
PAPER_PAIRS = (("routing", "generation"), ("gamma", "generation"))  # tried whatever they gain: topology x generation
MULTIPLY = 0.03  # gain(a and b) within so much of gain(a) gain(b) counts as their product
# Best known first.
QUALITIES = ("measured", "calibrated", "kernels", "law", "scaled", "projected", "roofline", "assumed")

Search = Callable[[Problem], Plan | Infeasible]


# --- what came of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pulled:
    """The best fleet with these levers released (none: the present fleet, planned anew)."""

    levers: tuple[Lever, ...]
    plan: Plan | Infeasible
    extra_w: float  # what compressing every prompt draws [W]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the levers."""
        return tuple(lever.name for lever in self.levers)

    @property
    def feasible(self) -> bool:
        return isinstance(self.plan, Plan)

    @property
    def specs(self) -> tuple[EngineSpec, ...]:
        """Of the stages of the plan's lanes; none where it is infeasible."""
        return self.plan.stage_specs if isinstance(self.plan, Plan) else ()

    @cached_property
    def values(self) -> Mapping[str, float]:
        """output_tok_per_s, tok_per_j, power_w, usd_per_h, ttft_p99_s, itl_s, n_gpus, n_instances, with what compresses
        every prompt; empty where infeasible."""
        if isinstance(self.plan, Infeasible):
            return {}
        metrics, site = self.plan.metrics, self.plan.problem.around.site
        resources = with_extra(site, metrics.resources, self.extra_w)
        return {
            "output_tok_per_s": float(metrics.output_tok_per_s),
            "ttft_p99_s": float(outcomes(metrics, self.plan.problem.slo)["ttft_p99_s"]),
            "itl_s": float(metrics.itl_s),
            "n_gpus": float(metrics.n_gpus),
            "n_instances": float(metrics.n_instances),
            "tok_per_j": float(metrics.tok_per_j * metrics.power_w / resources.power_w),
            "power_w": float(resources.power_w),
            "usd_per_h": float(resources.usd_per_h),
        }

    @cached_property
    def benefit(self) -> float:
        """What a gain is the ratio of: more is better; -inf where infeasible, so that it is ranked last."""
        if isinstance(self.plan, Infeasible):
            return -math.inf
        metrics = self.plan.metrics
        return float(_benefit(self.plan, metrics.resources, metrics.output_tok_per_s, self.extra_w))


@dataclass(frozen=True)
class Gain:
    """A lever, or pair of them, over the present fleet; None where either fleet cannot hold the limits."""

    pulled: Pulled
    gain: float | None
    interval: Interval | None  # at `LEVEL`
    quality: str


@dataclass(frozen=True)
class Pair:
    """Two levers: gain(a and b) over gain(a) gain(b); None where one of these is."""

    gain: Gain
    product: float | None
    ratio: float | None
    interval: Interval | None  # of the ratio
    verdict: str  # multiply, reinforce, cancel; infeasible, or unknown where a gain is


@dataclass(frozen=True)
class Levers:
    """The answer, levers ranked by gain; those that cannot hold the limits last."""

    present: Pulled
    given: Plan | None  # the fleet as it was given
    gains: list[Gain]
    pairs: list[Pair]
    left_out: dict[str, str]  # why, by lever


def pull_levers(
    problem: Problem,
    *,
    given: Plan | None = None,
    next_gpu: str | GpuEntry | None = None,
    llm: str | LlmEntry = "qwen3-235b-a22b",
    hit_frac: float | None = None,
    every_pair: bool = False,
    progress: Progress | None = None,
    search: Search | None = None,
) -> Levers:
    """Every lever from the fleet that `problem` describes: its specs, at most as many pools, its gamma.

    `given` is the present fleet where there is one: then its specs, with their clocks and batch limits. A lever for
    which the catalog has no engine is left out, with the reason. `next_gpu` and `llm` are names of the catalog, in
    lower case, or records of your own. `hit_frac` is what prompts would find of their tokens in a prefix cache; where
    it is not given, what they would in one that forgets nothing, if the workload tells. What the KV memory of pools
    finds is searched by `grid`, of the present fleet where it has such a cache, else with lever "affinity"; levers that
    leave too many fleets to size with what each finds are left out. Raises BadInput where the present fleet itself
    cannot be searched for.
    """
    bench = _Bench(problem, given.stage_specs if given else problem.all_specs, search or optimize)
    present = bench.present()
    bench.narrow(present.specs)
    levers = all_levers(bench.specs, problem.n_pools, problem.gamma, next_gpu=next_gpu, llm=llm)
    left_out: dict[str, str] = {}
    for name, lever_of in of_caches(problem, hit_frac).items():
        try:
            levers.append(lever_of())
        except LeftOut as why:
            left_out[name] = str(why)
    n_pairs = math.comb(len(levers) if every_pair else N_PAIRED, 2) + len(PAPER_PAIRS)
    total = 1 + len(levers) + n_pairs

    def pull_each(several: Iterable[tuple[Lever, ...]], first: int) -> list[Pulled]:
        pulled = []
        for done, each in enumerate(several):
            if progress:
                progress(min(first + done, total), total)
            try:
                pulled.append(bench.pull(each))
            except LeftOut as why:
                left_out[" x ".join(lever.name for lever in each)] = str(why)
        return pulled

    singles = pull_each(((lever,) for lever in levers), 1)
    pairs = pull_each(_pairs(singles, every_pair), 1 + len(levers))
    if progress:
        progress(total, total)
    draws = _Draws([present, *singles, *pairs] if present.feasible else [])
    gains = {each.levers[0].name: _gain(each, present, draws) for each in singles}
    return Levers(
        present=present,
        given=given,
        gains=sorted(gains.values(), key=lambda gain: -gain.pulled.benefit),
        pairs=[_pair(each, present, gains, draws) for each in pairs],
        left_out=left_out,
    )


# --- searching --------------------------------------------------------------------------------------------------------


class _Bench:
    """The present problem, and the specs of the present fleet."""

    def __init__(self, problem: Problem, specs: Sequence[EngineSpec], search: Search):
        self.problem, self._search = replace(problem, free=()), search  # what is free are levers here
        self.specs = list(dict.fromkeys(resolved(spec) for spec in specs))

    def narrow(self, specs: Sequence[EngineSpec]) -> None:
        """Keep the specs that the present fleet, planned anew, uses."""
        self.specs = list(dict.fromkeys(specs)) or self.specs

    def present(self) -> Pulled:
        """The present fleet, planned anew."""
        try:
            return self.pull(())
        except LeftOut as why:
            raise BadInput(
                "the present fleet", str(why), f"need up to {MOST_CACHED_POOLS} pools of one engine"
            ) from None

    def pull(self, levers: tuple[Lever, ...]) -> Pulled:
        found = release(self.problem, levers, self.specs)
        try:
            return Pulled(levers, self._search(found.problem), found.extra_w)
        except BadInput as refusal:
            if not levers:
                raise
            raise LeftOut(str(refusal)) from None


def _pairs(singles: Sequence[Pulled], every: bool) -> list[tuple[Lever, Lever]]:
    """Pairs of levers to try: of all, or of the best that touch different things, and the paper's own."""
    ranked = [each.levers[0] for each in sorted(singles, key=lambda each: -each.benefit)]
    best: list[Lever] = []
    for lever in ranked:
        if len(best) < N_PAIRED and not any(lever.touches & other.touches for other in best):
            best.append(lever)
    pairs = [(a, b) for a, b in itertools.combinations(ranked if every else best, 2) if not a.touches & b.touches]
    by_name = {lever.name: lever for lever in ranked}
    chosen = {frozenset((a.name, b.name)) for a, b in pairs}
    papers = [pair for pair in PAPER_PAIRS if by_name.keys() >= set(pair) and frozenset(pair) not in chosen]
    return pairs + [(by_name[a], by_name[b]) for a, b in papers]


# --- what it is worth -------------------------------------------------------------------------------------------------


def with_extra(site: Site, resources: Resources, extra_w: float) -> Resources:
    """What fleets take, and `extra_w` more."""
    return replace(
        resources,
        power_w=resources.power_w + extra_w,
        usd_per_h=resources.usd_per_h + extra_w / KW * site.usd_per_kwh,
        kg_co2_per_h=resources.kg_co2_per_h + extra_w / KW * site.kg_co2_per_kwh,
    )


def _benefit(plan: Plan, resources: Resources, output_tok_per_s: Array | np.ndarray, extra_w: float) -> np.ndarray:
    """1 over the cost by the objective's weights; tokens per joule, of what comes out: in overload that is less."""
    weights = plan.problem.objective_weights
    cost = _cost(plan, weights, with_extra(plan.problem.around.site, resources, extra_w))
    return np.asarray(output_tok_per_s) / cost if plan.problem.objective == "tok_per_j" else 1.0 / cost


def _cost(plan: Plan, weights: Weights, resources: Resources) -> np.ndarray:
    """By weights, of a plan whose fleet takes `resources`, of any shape; its GPUs are as many as planned."""
    of_kinds = usage(Weights(gpus_of=weights.gpus_of), plan.kinds, plan.of_kinds)
    return np.asarray(weights.of(resources)) + of_kinds


class _Draws:
    """Benefits of several fleets under common draws of their engines' errors."""

    def __init__(self, several: Sequence[Pulled]):
        plans = [(each, each.plan) for each in several if isinstance(each.plan, Plan)]
        ranks = np.random.default_rng(0).permutation(N_DRAWS)
        self._law_errors = np.array([NormalDist().inv_cdf((rank + 0.5) / N_DRAWS) for rank in ranks])
        self._benefits: dict[tuple[str, ...], np.ndarray] = {}
        if not plans:
            return

        def same(spec: EngineSpec) -> EngineSpec:
            """Another precision of the KV cache leaves weights, kernels and prefill, and so their errors, alone."""
            return replace(without_drafts(spec), kv_precision="any")

        errors, engine_of = shared_errors([spec for _, plan in plans for spec in plan.stage_specs], same)
        factors = draw(errors, N_DRAWS)
        ends = np.cumsum([len(plan.stage_specs) for _, plan in plans])
        for (each, plan), indices in zip(plans, np.split(np.asarray(engine_of), ends[:-1]), strict=True):
            problem = plan.problem
            sampled = sample(
                plan.fleet,
                problem.workload,
                problem.slo,
                factors,
                jnp.asarray(indices),
                assumptions=problem.assumptions,
            )
            power_w = sampled["power_w"]
            taken = replace(
                plan.metrics.resources,
                power_w=power_w,
                usd_per_h=sampled["usd_per_h"],
                kg_co2_per_h=power_w / KW * problem.around.site.kg_co2_per_kwh,
            )
            drawn = _benefit(plan, taken, sampled["tok_per_j"] * power_w, each.extra_w)
            self._benefits[each.names] = np.broadcast_to(drawn, (N_DRAWS,))

    def interval(self, over: Iterable[Pulled], under: Iterable[Pulled], law_sigma: float = 0.0) -> Interval:
        """Of the product of the benefits `over` divided by those `under`, and the error of a lever's own law."""
        drawn = math.prod((self._benefits[each.names] for each in over), start=np.ones(N_DRAWS))
        for each in under:
            drawn = drawn / self._benefits[each.names]
        return sampled_interval(drawn * np.exp(law_sigma * self._law_errors), LEVEL)


def _gain(pulled: Pulled, present: Pulled, draws: _Draws) -> Gain:
    engines = [engine_entry(spec).quality for each in (pulled, present) for spec in each.specs]
    quality = worst_known([*engines, *(lever.quality for lever in pulled.levers)])
    if not (pulled.feasible and present.feasible):
        return Gain(pulled, None, None, quality)
    law_sigma = _clock_sigma(pulled) - _clock_sigma(present)  # it is off by the same in both
    return Gain(pulled, pulled.benefit / present.benefit, draws.interval([pulled], [present], law_sigma), quality)


def worst_known(qualities: Iterable[str]) -> str:
    """What a gain that rests on all of them is known by."""
    return max(qualities, key=lambda quality: QUALITIES.index(quality) if quality in QUALITIES else 0)


def _clock_sigma(pulled: Pulled) -> float:
    """Error of the clock law in the logarithm of the cost [-]."""
    plan = pulled.plan
    if isinstance(plan, Infeasible) or all(spec.clock_frac == 1 for spec in plan.stage_specs):
        return 0.0
    stages, weights = plan.stages, plan.problem.objective_weights
    engines = [stage.engine for lane in plan.fleet.lanes for stage in lane.stages]
    per_watt = plan.problem.prices(weights).per_watt[0]
    cost = float(_cost(plan, weights, with_extra(plan.problem.around.site, plan.metrics.resources, pulled.extra_w)))
    sigma = 0.0
    for k, spec in enumerate(plan.stage_specs):
        above_idle = 1.0 - float(engines[k].idle_w) / float(stages.gpu_power_w[k])
        of_cost = per_watt * float(stages.power_w[k]) / cost
        sigma += CLOCK_ERROR * above_idle * (1.0 - spec.clock_frac) / 0.3 * of_cost
    return sigma


def _pair(pulled: Pulled, present: Pulled, gains: Mapping[str, Gain], draws: _Draws) -> Pair:
    both = _gain(pulled, present, draws)
    singles = [gains[lever.name] for lever in pulled.levers]
    factors = [single.gain for single in singles if single.gain is not None]
    if both.gain is None or len(factors) < len(singles):
        return Pair(both, None, None, None, "unknown" if pulled.feasible else "infeasible")
    product = math.prod(factors)
    ratio = both.gain / product
    interval = draws.interval([pulled, present], [single.pulled for single in singles])
    verdict = "multiply" if abs(ratio - 1.0) <= MULTIPLY else "reinforce" if ratio > 1 else "cancel"
    return Pair(both, product, ratio, interval, verdict)
