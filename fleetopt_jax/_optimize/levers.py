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

from fleetopt_jax._optimize.changes import (
    UNKNOWN_HITS,
    Lever,
    affinity,
    all_levers,
    lacking,
    prefix_caching,
    with_affinity,
    with_hits,
)
from fleetopt_jax._optimize.derivatives import outcomes
from fleetopt_jax._optimize.engine_errors import draw, shared_errors, without_drafts
from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax._optimize.uncertainty import LEVEL, Interval, sample, sampled_interval
from fleetopt_jax.catalog.engines import engine_entry, resolved
from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.catalog.llms import LlmEntry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.core.units import KW
from fleetopt_jax.fleet.fleet import Slo, with_limits
from fleetopt_jax.fleet.resources import Resources, Weights, usage
from fleetopt_jax.fleet.two_stage import require_stage_laws
from fleetopt_jax.workload.atoms import Workload, make_workload, mean_tokens
from fleetopt_jax.workload.reuse import mean_reused_tokens

CLOCK_ERROR = 0.2  # of the watts above idle at a clock of 0.7 (`laws/clocks.py`), growing with the distance from 1
N_DRAWS = 300  # of the engines' errors
N_PAIRED = 5  # levers whose pairs are tried
PAPER_PAIRS = (("routing", "generation"), ("gamma", "generation"))  # tried whatever they gain: topology x generation
MOST_FOUND = 0.999  # of a prompt: something is left to compute
MOST_CACHED_POOLS = 2  # whose fleets are sized with what their caches find
NEVER_REPEATED = "no prompt of the workload begins as another one did"
MULTIPLY = 0.03  # gain(a and b) within so much of gain(a) gain(b) counts as their product
# Best known first.
QUALITIES = ("measured", "calibrated", "kernels", "law", "scaled", "projected", "roofline", "assumed")

Search = Callable[[Problem], Plan | Infeasible]


class LeftOut(Exception):
    """Why a lever cannot be tried."""


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
        metrics, resources = self.plan.metrics, with_extra(self.plan, self.plan.metrics.resources, self.extra_w)
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
    bench = _Bench(problem, given.stage_specs if given else problem.specs, search or optimize)
    present = bench.present()
    bench.narrow(present.specs)
    levers = all_levers(bench.specs, problem.n_pools, problem.gamma, next_gpu=next_gpu, llm=llm)
    left_out: dict[str, str] = {}
    for name, lever_of in _of_caches(problem, hit_frac).items():
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
        self._roofline = {_is_roofline(spec) for spec in self.specs}

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
        problem = self.problem
        if lacks := next(filter(None, (lacking(lever, problem.assumptions) for lever in levers)), None):
            raise LeftOut(lacks)
        specs = self.specs
        for lever in levers:
            specs = list(dict.fromkeys(variant for spec in specs for variant in lever.variants(spec)))
        frac = math.prod(lever.prompt_frac for lever in levers)
        hit_frac = max([0.0, *(lever.hit_frac for lever in levers)])
        workload, slo, extra_w = (
            (problem.service.workload, problem.slo, 0.0) if frac == 1 else _compressed(problem, frac)
        )
        assumptions = with_hits(problem.assumptions, hit_frac)
        if any(lever.by_prefix for lever in levers):
            assumptions = with_affinity(assumptions)
        served = {"serve": "any"} if any(lever.two_stages for lever in levers) else {}
        if served:
            _require_two_stages(problem)
        released = replace(
            problem.serving(specs=tuple(self._comparable(specs)), workload=workload, slo=slo, **served),
            n_pools=max([problem.n_pools, *(lever.n_pools for lever in levers)]),
            gamma=None if any(lever.free_gamma for lever in levers) else problem.gamma,
            assumptions=assumptions,
        )
        _require_few(released)
        try:
            return Pulled(levers, self._search(released), extra_w)
        except BadInput as refusal:
            if not levers:
                raise
            raise LeftOut(str(refusal)) from None

    def _comparable(self, specs: Sequence[EngineSpec]) -> list[EngineSpec]:
        """Those there are engines for; `LeftOut` where there is none, or none that compares with the present."""
        found, why = [], ""
        for spec in specs:
            try:
                engine_entry(spec)
            except BadInput as refusal:
                why = str(refusal)
            else:
                found.append(spec)
        alike = [spec for spec in found if _is_roofline(spec) in self._roofline]
        new = set(specs) - set(self.specs)
        if not alike or (new and not new & set(alike)):
            raise LeftOut("the paper's engines and its roofline law do not compare" if new & set(found) else why)
        return alike


def _require_few(released: Problem) -> None:
    """`LeftOut` of a problem whose fleets would each be sized with what they find, and are too many."""
    if not released.assumptions.prefix_cache.reads_reuse:
        return
    n, pools = len(released.specs), released.n_pools
    if pools > MOST_CACHED_POOLS or (pools > 1 and n > 1):
        what = f"{n} engines in {pools} pools" if n > 1 else f"{pools} pools"
        raise LeftOut(f"{what}, each sized with what its caches find, are more fleets than are tried")


def _require_two_stages(problem: Problem) -> None:
    """`LeftOut` of a problem that no lane of two stages is searched for."""
    if problem.slo.scope == "fleet":
        raise LeftOut("lanes of two stages share out limits that each pool holds, not those of the whole fleet")
    try:
        require_stage_laws(problem.assumptions)
    except BadInput as refusal:
        raise LeftOut(str(refusal)) from None


def _is_roofline(spec: EngineSpec) -> bool:
    return engine_entry(spec).quality == "roofline"


def _compressed(problem: Problem, frac: float) -> tuple[Workload, Slo, float]:
    """(workload, limits, watts of the compressor) with every prompt compressed to `frac` of it.

    A try that fails leaves the prompt as it was. Limits are of the prompts as they came, less the compressor's time.
    """
    workload, compressor, site = problem.service.workload, problem.around.compressor, problem.around.site
    if problem.assumptions.prefix_cache.finds:
        raise LeftOut("a compressed prompt begins otherwise, so that the fleet's prefix cache would not find it")
    if problem.assumptions.route_by.sticky is not None:
        raise LeftOut("what conversations that stay in their pool are routed by, compressed, is not known")
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
    power_w = float(problem.workload.arrival_rate_per_s * mean_tokens(workload)[0] * compressor.j_per_token)
    pue = float(site.pue) if problem.assumptions.power_scope.counts_site else 1.0
    return served, with_limits(problem.slo, ttft_s_per_token=per_token_s), pue * power_w


def _of_caches(problem: Problem, hit_frac: float | None) -> dict[str, Callable[[], Lever]]:
    """What is found of prompts, by the names of the levers: those that the present fleet has not pulled."""
    cache, dispatch = problem.assumptions.prefix_cache, problem.assumptions.dispatch
    if not cache.finds:
        workload = problem.service.workload
        return {"prefix_cache": lambda: _caching(workload, hit_frac), "affinity": lambda: _by_prefix(problem)}
    return {"affinity": lambda: _by_prefix(problem)} if not dispatch.shares_caches else {}


def _by_prefix(problem: Problem) -> Lever:
    """Dispatch by prefix, where prompts are known to repeat and what is found of them depends on where they go."""
    cache, workload = problem.assumptions.prefix_cache, problem.service.workload
    if cache.finds and not cache.reads_reuse:
        raise LeftOut("a share of every prompt is found, whatever instance it goes to")
    if workload.reuse is None:
        raise LeftOut("the workload has neither block hashes nor sessions, nor a hit curve, that tell what is found")
    if not mean_reused_tokens(workload) > 0:
        raise LeftOut(NEVER_REPEATED)
    return affinity(problem.assumptions)


def _caching(workload: Workload, hit_frac: float | None) -> Lever:
    """Prefix caching at a share that is given, else at what a cache that forgets nothing would find."""
    if hit_frac is not None:
        if hit_frac == 0:
            raise LeftOut("a share of 0 is given: nothing is found")
        return prefix_caching(hit_frac, "it was given")
    if workload.reuse is None:
        raise LeftOut(UNKNOWN_HITS)
    share = min(float(mean_reused_tokens(workload) / mean_tokens(workload)[0]), MOST_FOUND)
    if not share > 0:
        raise LeftOut(NEVER_REPEATED)
    return prefix_caching(share, "what a cache that forgets nothing would find of this workload, no fleet finds more")


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


def with_extra(plan: Plan, resources: Resources, extra_w: float) -> Resources:
    """What the plan's fleet takes, and `extra_w` more."""
    site = plan.problem.around.site
    return replace(
        resources,
        power_w=resources.power_w + extra_w,
        usd_per_h=resources.usd_per_h + extra_w / KW * site.usd_per_kwh,
        kg_co2_per_h=resources.kg_co2_per_h + extra_w / KW * site.kg_co2_per_kwh,
    )


def _benefit(plan: Plan, resources: Resources, output_tok_per_s: Array | np.ndarray, extra_w: float) -> np.ndarray:
    """1 over the cost by the objective's weights; tokens per joule, of what comes out: in overload that is less."""
    weights = plan.problem.objective_weights
    cost = _cost(plan, weights, with_extra(plan, resources, extra_w))
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
    quality = max([*engines, *(lever.quality for lever in pulled.levers)], key=_rank)
    if not (pulled.feasible and present.feasible):
        return Gain(pulled, None, None, quality)
    law_sigma = _clock_sigma(pulled) - _clock_sigma(present)  # it is off by the same in both
    return Gain(pulled, pulled.benefit / present.benefit, draws.interval([pulled], [present], law_sigma), quality)


def _rank(quality: str) -> int:
    return QUALITIES.index(quality) if quality in QUALITIES else 0


def _clock_sigma(pulled: Pulled) -> float:
    """Error of the clock law in the logarithm of the cost [-]."""
    plan = pulled.plan
    if isinstance(plan, Infeasible) or all(spec.clock_frac == 1 for spec in plan.stage_specs):
        return 0.0
    stages, weights = plan.stages, plan.problem.objective_weights
    engines = [stage.engine for lane in plan.fleet.lanes for stage in lane.stages]
    per_watt = plan.problem.prices(weights).per_watt[0]
    cost = float(_cost(plan, weights, with_extra(plan, plan.metrics.resources, pulled.extra_w)))
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
