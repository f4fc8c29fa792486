"""What pays for several services together: from their present fleets one lever released at a time, for each service
alone and for all of them, everything else re-optimised under the budget that they share.

The levers are those of one fleet (`changes.py`), released from all engines that a service may have (`releasing.py`).
Services for which a lever is not released are planned anew as well: GPUs that it frees are theirs to take. A lever that
widens what a service may have never loses; one that replaces something may. The gain is the cost of all services at
present over their cost with the lever, by the objective. Both are the exact search of `shared.py`, and a gain is proved
where both plans are.

Fleets of a service are found once for each lever: with all services it is among the same ones. Where a service may be
served in several ways, the lever is released in those that it applies to, and the others stay. Limits of whole answers
are of the prompts as they came: what compresses them takes its time from them, and its watts from the budget.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fleetopt_jax._optimize.changes import Lever, all_levers
from fleetopt_jax._optimize.levers import with_extra, worst_known
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.releasing import OF_CACHES, LeftOut, Released, of_caches, release
from fleetopt_jax._optimize.services import (
    NoServicesPlan,
    Services,
    ServicesPlan,
    SharedService,
    shared_service,
    with_services,
)
from fleetopt_jax._optimize.shared import Candidates, candidates_of, settled
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.catalog.llms import LlmEntry
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.fleet import with_limits
from fleetopt_jax.fleet.resources import Resources, limited_resource

ALREADY = "it has that already, or may have it"
NO_TIME = "compressing the longest prompt takes all the time to the end of an answer"


@dataclass(frozen=True)
class SharedLever:
    """All services planned anew with one lever released for some of them; for none: the present fleets."""

    levers: Mapping[str, Lever]  # by the service it is released for: the same, as it is for each
    answer: ServicesPlan | NoServicesPlan
    extra_w: float  # what compressing every prompt of these draws [W]

    @property
    def name(self) -> str:
        """Of the lever."""
        return next(iter(self.levers.values())).name

    @property
    def titles(self) -> tuple[str, ...]:
        """What is done, in words: one, unless it is another for another LLM."""
        return tuple(dict.fromkeys(lever.title for lever in self.levers.values()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is assumed, in words."""
        return tuple(dict.fromkeys(lever.note for lever in self.levers.values() if lever.note))

    @property
    def certified(self) -> bool:
        """Whether there is proved to be no better plan; or none."""
        return self.answer.proved if isinstance(self.answer, NoServicesPlan) else self.answer.search.gap == 0.0

    @cached_property
    def total(self) -> Resources | None:
        """Of all services and of what compresses; None where no fleets hold what they are promised."""
        if isinstance(self.answer, NoServicesPlan):
            return None
        return with_extra(self.answer.services.any.around.site, self.answer.total, self.extra_w)

    @property
    def output_tok_per_s(self) -> float:
        """Of all services; 0 where no fleets hold what they are promised."""
        if isinstance(self.answer, NoServicesPlan):
            return 0.0
        return sum(float(plan.metrics.output_tok_per_s) for plan in self.answer.plans)

    @cached_property
    def benefit(self) -> float:
        """What a gain is the ratio of: more is better; -inf where there is no plan, so that it is ranked last."""
        if isinstance(self.answer, NoServicesPlan) or self.total is None:
            return -math.inf
        weights = self.answer.services.any.objective_weights
        of_extra = float(np.asarray(weights.of(self.total)) - np.asarray(weights.of(self.answer.total)))
        cost = self.answer.cost + of_extra
        return self.output_tok_per_s / cost if self.answer.services.any.objective == "tok_per_j" else 1.0 / cost


class NotReleased(NamedTuple):
    """Why a lever was not released for a service."""

    name: str  # of the lever
    service: str
    why: str


@dataclass(frozen=True)
class ServicesLevers:
    """What each lever gives all services, released for one of them or for all."""

    services: Services
    present: SharedLever
    each: tuple[SharedLever, ...]  # ranked; those with which no fleets hold what is promised last
    left_out: tuple[NotReleased, ...]
    n_searches: int
    wall_s: float

    def gain(self, one: SharedLever) -> float | None:
        """The cost of all services at present over that with the lever; None where either has no plan."""
        if self.present.total is None or one.total is None:
            return None
        return one.benefit / self.present.benefit

    def certified(self, one: SharedLever) -> bool:
        """Whether its gain is proved, or that it has none."""
        return one.certified and self.present.certified

    def gpus_changed(self, one: SharedLever) -> dict[str, dict[str, int]]:
        """By the services whose GPUs change: of each kind so many more than at present."""
        if isinstance(one.answer, NoServicesPlan) or isinstance(self.present.answer, NoServicesPlan):
            return {}
        found = {}
        for service, now, then in zip(self.services.each, self.present.answer.plans, one.answer.plans, strict=True):
            more = {
                kind: then.n_gpus_of.get(kind, 0) - now.n_gpus_of.get(kind, 0)
                for kind in dict.fromkeys((*now.n_gpus_of, *then.n_gpus_of))
            }
            if changed := {kind: n for kind, n in more.items() if n}:
                found[service.name] = changed
        return found

    def without_end(self, one: SharedLever) -> tuple[str, ...]:
        """GPUs that a lever brings in, of which there are as many as it takes, though there is a stock of others."""
        new = [kind for kind in one.answer.services.kinds if kind not in self.services.kinds]
        return tuple(new) if self.services.stock else ()

    def quality(self, one: SharedLever) -> str:
        """How well a gain is known, at worst: engines of both plans, and the lever's own law."""
        plans = [
            plan
            for answer in (self.present.answer, one.answer)
            if isinstance(answer, ServicesPlan)
            for plan in answer.plans
        ]
        engines = [engine_entry(spec).quality for plan in plans for spec in plan.stage_specs]
        return worst_known([*engines, *(lever.quality for lever in one.levers.values())])


def services_levers(
    services: Services,
    *,
    next_gpu: str | GpuEntry | None = None,
    llm: str | LlmEntry = "qwen3-235b-a22b",
    hit_frac: float | None = None,
    progress: Progress | None = None,
) -> ServicesLevers:
    """What each lever gives all services together, by their objective, released for each of them alone and for all.

    `next_gpu` and `llm` are names of the catalog, in lower case, or records of your own; `hit_frac` is what prompts
    would find of their tokens in a prefix cache [-], as in `pull_levers`. A lever that a service has already, or that
    there is no law or engine for, is left out with the reason. GPUs that the budget does not name are there without
    limit: so is a next generation. Refuses float32.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> how = {"n_pools": 1, "assume": "published", "assumptions": fo.PUBLISHED}
    >>> spec = fo.EngineSpec("h100", source="projected")
    >>> asked = {name: fo.make_problem(chat, [spec], **how) for name in ("ours", "theirs")}
    >>> found = fo.services_levers(fo.make_services(asked), next_gpu="b200")
    >>> found.each[0].name, list(found.each[0].levers), found.gain(found.each[0]) > 1.0
    ('gamma', ['ours', 'theirs'], True)
    """
    require_float64("services_levers")
    started = time.perf_counter()
    offers, left_out = _offers(services, next_gpu, llm, hit_frac)
    total, done, each = 1 + sum(len(offer) + (len(offer) > 1) for offer in offers), 1, []
    known = candidates_of(services)
    present = SharedLever(MappingProxyType({}), settled(services, known, started), 0.0)

    def step(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, total)

    step(0)
    for offer in offers:
        tried, there = {}, list(known)
        for service, changed in offer.items():
            try:
                each.append(_pull(services, {service: changed}, there))
                tried[service] = changed
            except BadInput as refusal:
                left_out.append(NotReleased(changed.lever.name, service, str(refusal)))
            step(1)
        if len(tried) > 1:
            each.append(_pull(services, tried, there))
        step(len(offer) > 1)
    return ServicesLevers(
        services=services,
        present=present,
        each=tuple(sorted(each, key=lambda one: -one.benefit)),
        left_out=tuple(left_out),
        n_searches=1 + len(each),
        wall_s=time.perf_counter() - started,
    )


# ---------------------------------------------------------------------------------------------------- what is released


class _Changed(NamedTuple):
    """A service with a lever released."""

    lever: Lever
    service: SharedService
    extra_w: float


def _offers(
    services: Services, next_gpu: str | GpuEntry | None, llm: str | LlmEntry, hit_frac: float | None
) -> tuple[list[dict[str, _Changed]], list[NotReleased]]:
    """Of each lever the services for which it is released; and why it is not for the others."""
    of_each: dict[str, list[dict[str, Lever | str]]] = {
        service.name: [_levers(way, next_gpu, llm, hit_frac) for way in service.asked] for service in services.each
    }
    names = dict.fromkeys(name for ways in of_each.values() for way in ways for name in way)
    offers, left_out = [], []
    for name in names:
        offer = {}
        for service in services.each:
            try:
                offer[service.name] = _changed(service, [way.get(name, ALREADY) for way in of_each[service.name]])
            except LeftOut as why:
                left_out.append(NotReleased(name, service.name, str(why)))
        offers.append(offer)
    return [offer for offer in offers if offer], left_out


def _levers(
    way: Problem, next_gpu: str | GpuEntry | None, llm: str | LlmEntry, hit_frac: float | None
) -> dict[str, Lever | str]:
    """By name, those that a problem has not pulled; or why one cannot be."""
    found = all_levers(list(way.all_specs), way.n_pools, way.gamma, next_gpu=next_gpu, llm=llm)
    levers: dict[str, Lever | str] = {lever.name: lever for lever in found}
    of_its_own = of_caches(way, hit_frac)
    for name in OF_CACHES:
        try:
            levers[name] = of_its_own[name]() if name in of_its_own else ALREADY
        except LeftOut as why:
            levers[name] = str(why)
    return levers


def _changed(service: SharedService, levers: Sequence[Lever | str]) -> _Changed:
    """A service with the lever of each of its ways released where that can be, or `LeftOut` where it can in none."""
    ways, released, limits_s, why = [], [], [service.end_to_end_s], ""
    for way, lever in zip(service.asked, levers, strict=True):
        try:
            if isinstance(lever, str):
                raise LeftOut(lever)
            found, compressing_s = _released(service, way, lever)
        except LeftOut as reason:
            ways.append(way)
            why = why or str(reason)
        else:
            ways.append(found.problem)
            released.append((lever, found))
            limits_s.append(service.end_to_end_s - compressing_s)
    if not released:
        raise LeftOut(why)
    try:
        changed = shared_service(service.name, ways, min(limits_s), service.batch)
    except BadInput as refusal:
        raise LeftOut(str(refusal)) from None
    return _Changed(released[0][0], changed, max(found.extra_w for _, found in released))


def _released(service: SharedService, way: Problem, lever: Lever) -> tuple[Released, float]:
    """One way with the lever released, and the time that compressing takes of the longest answer's end [s]."""
    compressing_s = 0.0
    if lever.prompt_frac < 1:
        per_token_s = float(way.around.compressor.s_per_token)
        compressing_s = per_token_s * float(np.max(np.asarray(way.service.workload.prompt_tokens)))
        if not service.end_to_end_s > compressing_s:
            raise LeftOut(NO_TIME)
        if service.batch:  # promised no TTFT: a deadline alone, which that time is taken from
            way = way.serving(slo=with_limits(way.slo, ttft_s_per_token=per_token_s))
    found = release(way, [lever], way.all_specs)
    if lever.prompt_frac == 1 and not lever.hit_frac and not _adds(found.problem, way):
        raise LeftOut(ALREADY)
    return found, compressing_s


def _adds(then: Problem, now: Problem) -> bool:
    """Whether it has engines, pools, gammas or ways to serve them that it has not now."""
    same = (then.n_pools, then.gamma, then.service.serve) == (now.n_pools, now.gamma, now.service.serve)
    return not (same and set(then.all_specs) <= set(now.all_specs))


# ------------------------------------------------------------------------------------------------------------ searching


def _pull(services: Services, changed: Mapping[str, _Changed], known: list[Candidates]) -> SharedLever:
    """All services planned anew, of those that are changed with the lever released; `known` gets their fleets."""
    extra_w = sum(one.extra_w for one in changed.values())
    there = with_services(services, {name: one.service for name, one in changed.items()})
    there = _less(there, extra_w)
    each = candidates_of(there, known)
    known.extend(one for one in each if all(one.service is not old.service for old in known))
    answer = settled(there, each, time.perf_counter())
    return SharedLever(MappingProxyType({name: one.lever for name, one in changed.items()}), answer, extra_w)


def _less(services: Services, extra_w: float) -> Services:
    """What the budget leaves beside so many watts."""
    if not extra_w:
        return services
    site, budget = services.any.around.site, services.budget
    nothing = Resources(**as_floats(power_w=0.0, usd_per_h=0.0, kg_co2_per_h=0.0, n_gpus=0.0))
    taken = vars(with_extra(site, nothing, extra_w))
    for name, cap in budget.caps.items():
        budget = budget.with_cap(name, max(0.0, cap - float(taken[limited_resource(name)])))
    return replace(services, budget=budget)
