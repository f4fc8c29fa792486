"""A problem with levers released: what a search may choose then, or why a lever cannot be tried."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fleetopt_jax._optimize.changes import (
    UNKNOWN_HITS,
    Lever,
    Variants,
    affinity,
    lacking,
    prefix_caching,
    with_affinity,
    with_hits,
)
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.fleet.fleet import Slo, with_limits
from fleetopt_jax.fleet.two_stage import require_stage_laws
from fleetopt_jax.workload.atoms import Workload, make_workload, mean_tokens
from fleetopt_jax.workload.reuse import mean_reused_tokens

MOST_FOUND = 0.999  # of a prompt: something is left to compute
OF_CACHES = ("prefix_cache", "affinity")  # levers by what prompts find
MOST_CACHED_POOLS = 2  # whose fleets are sized with what their caches find
NEVER_REPEATED = "no prompt of the workload begins as another one did"


class LeftOut(Exception):
    """Why a lever cannot be tried."""


class Released(NamedTuple):
    """What a search may choose with levers released."""

    problem: Problem
    extra_w: float  # what compressing every prompt draws [W]


def release(problem: Problem, levers: Sequence[Lever], present: Sequence[EngineSpec]) -> Released:
    """The problem with levers released from the `present` specs. Raises `LeftOut` where one cannot be tried."""
    if lacks := next(filter(None, (lacking(lever, problem.assumptions) for lever in levers)), None):
        raise LeftOut(lacks)
    served = _served(problem, levers, present)
    frac = math.prod(lever.prompt_frac for lever in levers)
    hit_frac = max([0.0, *(lever.hit_frac for lever in levers)])
    workload, slo, extra_w = (problem.service.workload, problem.slo, 0.0) if frac == 1 else _compressed(problem, frac)
    assumptions = with_hits(problem.assumptions, hit_frac)
    if any(lever.by_prefix for lever in levers):
        assumptions = with_affinity(assumptions)
    found = replace(
        problem.serving(workload=workload, slo=slo, **served),
        n_pools=max([problem.n_pools, *(lever.n_pools for lever in levers)]),
        gamma=None if any(lever.free_gamma for lever in levers) else problem.gamma,
        assumptions=assumptions,
    )
    _require_few(found)
    if found.service.serve != "mixed" and not found.offers.pairs:
        raise LeftOut("no prefill stage could hand its KV cache over to a decode stage")
    return Released(found, extra_w)


def _served(problem: Problem, levers: Sequence[Lever], present: Sequence[EngineSpec]) -> dict[str, Any]:
    """What pools may be of, and of how many stages, as a `Service` has it."""
    service = problem.service

    def released(specs: Sequence[EngineSpec], *variants: Variants) -> tuple[EngineSpec, ...]:
        for each in (*(lever.variants for lever in levers), *variants):
            specs = list(dict.fromkeys(variant for spec in specs for variant in each(spec)))
        return tuple(_comparable(specs, present))

    own = {name: getattr(service, name) for name in ("prefill_specs", "decode_specs")}
    # Of what stages have of their own, and of the others then, what the present fleet has; else all.
    kept = {name: [spec for spec in specs if spec in present] or specs for name, specs in own.items() if specs}
    whole = ([spec for spec in service.specs if spec in present] or service.specs) if kept else present
    found: dict[str, Any] = {"specs": released(whole), **{name: released(specs) for name, specs in kept.items()}}
    apart = next((lever.of_stages for lever in levers if lever.of_stages), None)
    if apart:
        each = zip(own, apart, strict=True)
        found |= {name: released(kept.get(name, whole), variants) for name, variants in each} | {
            "serve": "disaggregated"
        }
    elif any(lever.two_stages for lever in levers):
        found["serve"] = "any"
    if "serve" in found:
        _require_two_stages(problem)
    return found


def _comparable(specs: Sequence[EngineSpec], present: Sequence[EngineSpec]) -> list[EngineSpec]:
    """Those there are engines for; `LeftOut` where there is none, or none that compares with the present."""
    now = {_is_roofline(spec) for spec in present}
    found, why = [], ""
    for spec in specs:
        try:
            engine_entry(spec)
        except BadInput as refusal:
            why = str(refusal)
        else:
            found.append(spec)
    alike = [spec for spec in found if _is_roofline(spec) in now]
    new = set(specs) - set(present)
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


def of_caches(problem: Problem, hit_frac: float | None) -> dict[str, Callable[[], Lever]]:
    """What is found of prompts, by the names of the levers: those that the present fleet has not pulled."""
    cache, dispatch = problem.assumptions.prefix_cache, problem.assumptions.dispatch
    if not cache.finds:
        workload = problem.service.workload
        return dict(zip(OF_CACHES, (lambda: _caching(workload, hit_frac), lambda: _by_prefix(problem)), strict=True))
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
