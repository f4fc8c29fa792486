"""What is asked: services, periods and a budget. Host-side records: they carry names and specs, never built engines."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fleetopt_jax._optimize.offers import Offers, Serve, offers_of
from fleetopt_jax.catalog.engines import build, resolved
from fleetopt_jax.catalog.links import DEFAULT_LINK, LINKS, server_of
from fleetopt_jax.catalog.spec import EngineSpec, KvLink, LaneSpec
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.assumptions import EXACT, PHYSICAL, Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.fleet import Fleet, Slo, fleet_of, make_slo
from fleetopt_jax.fleet.reserve import Failures
from fleetopt_jax.fleet.resources import (
    Budget,
    Objective,
    PoolPrices,
    Weights,
    limit_weights,
    pool_prices,
    search_weights,
    weights_of,
)
from fleetopt_jax.fleet.surroundings import Surroundings, make_surroundings
from fleetopt_jax.fleet.traffic import check_prefix_cache, routed_lengths
from fleetopt_jax.fleet.two_stage import require_stage_laws
from fleetopt_jax.laws.compression import MAX_SHRINK
from fleetopt_jax.laws.kv_cache import whole_blocks_tokens
from fleetopt_jax.workload.atoms import Workload, share_above, with_rate
from fleetopt_jax.workload.profile import Hour

MAX_ASSIGNMENTS = 128  # of engines to pools; each is a search of its own
GAMMA_MAX = 2.0  # the largest compression the paper uses

Method = Literal["exact", "grid", "gradient"]
Tunable = Literal["max_num_seqs", "clock"]


@dataclass(frozen=True)
class Service:
    """One kind of traffic, what it is promised, and the engines that may serve it."""

    name: str
    workload: Workload
    slo: Slo
    specs: tuple[EngineSpec, ...]  # everything said (`catalog.engines.resolved`)
    window_tokens: float  # window of the last pool: the longest request the fleet promises to serve
    hour: Hour | None = None  # of its trace that the workload is; None: all of it, at the mean rate
    serve: Serve = "mixed"  # each pool by instances that do all, by two stages, or by whichever is cheaper
    link: KvLink = LINKS[DEFAULT_LINK]  # that two stages have between them
    prefill_specs: tuple[EngineSpec, ...] | None = None  # of stages that prefill; None: `specs`
    decode_specs: tuple[EngineSpec, ...] | None = None  # of stages that decode; None: `specs`


@dataclass(frozen=True)
class Period:
    """A stretch of time in which rate, price and carbon are so many times what services and site say [-]."""

    rate: float = 1.0
    usd_per_kwh: float = 1.0
    kg_co2_per_kwh: float = 1.0


ALWAYS = Period()


@dataclass(frozen=True)
class Problem:
    """Find at most `n_pools` pools, each with one of its service's specs, that hold its limits at least cost.

    The searches of this room take one service in one period; its parts have names of their own here.
    """

    services: tuple[Service, ...]
    n_pools: int
    gamma: float | None  # of every boundary; None: searched in [1, GAMMA_MAX]
    objective: Objective | Weights
    assume: str  # name of the preset the assumptions come from
    assumptions: Assumptions
    surroundings: Surroundings
    periods: tuple[Period, ...] = (ALWAYS,)
    budget: Budget = Budget()
    free: tuple[Tunable, ...] = ()  # what each pool may have of its own; only the gradient search reads it
    rates: Failures | None = None  # how often things fail, where no reserve says it: nothing is searched by it

    @property
    def service(self) -> Service:
        """The only service."""
        if len(self.services) * len(self.periods) != 1:
            asked = f"{len(self.services)} services in {len(self.periods)} periods"
            raise BadField("services", asked, "need one service in one period: ask for each by itself")
        return self.services[0]

    @cached_property
    def workload(self) -> Workload:
        """Of the service, at the period's rate."""
        workload, period = self.service.workload, self.periods[0]
        return workload if period.rate == 1 else with_rate(workload, workload.arrival_rate_per_s * period.rate)

    @cached_property
    def around(self) -> Surroundings:
        """The surroundings at the period's prices, with what may be down of instances of its specs."""
        site, period, reserve = self.surroundings.site, self.periods[0], self.surroundings.reserve
        priced = as_floats(
            usd_per_kwh=site.usd_per_kwh * period.usd_per_kwh,
            kg_co2_per_kwh=site.kg_co2_per_kwh * period.kg_co2_per_kwh,
        )
        reserve = reserve and reserve.serving({spec.split.n_gpus for spec in self.all_specs})
        return replace(self.surroundings, site=replace(site, **priced), reserve=reserve)

    @property
    def failures(self) -> Failures | None:
        """How often things fail, where that is known."""
        reserve = self.surroundings.reserve
        return self.rates or (reserve and reserve.failures)

    @property
    def slo(self) -> Slo:
        return self.service.slo

    @property
    def specs(self) -> tuple[EngineSpec, ...]:
        """Of pools that are served whole, and of stages that have none of their own."""
        return self.service.specs

    @property
    def all_specs(self) -> tuple[EngineSpec, ...]:
        """With those that only stages may have."""
        service = self.service
        return tuple(dict.fromkeys((*service.specs, *(service.prefill_specs or ()), *(service.decode_specs or ()))))

    @property
    def window_tokens(self) -> float:
        return self.service.window_tokens

    @cached_property
    def engines(self) -> tuple[Engine, ...]:
        """Of the specs."""
        return tuple(build(spec) for spec in self.specs)

    @cached_property
    def offers(self) -> Offers:
        """What its pools may choose from: of pools that are served whole, the specs."""
        service = self.service
        stages = {"prefill": service.prefill_specs, "decode": service.decode_specs}
        return offers_of(self.specs, service.serve, service.link, **stages)

    @property
    def kinds(self) -> tuple[str, ...]:
        """GPUs of all specs, by name."""
        return tuple(spec.gpu_name for spec in self.all_specs)

    def keeping(self, kept: Callable[[EngineSpec], bool]) -> "Problem | None":
        """With those of its specs alone that are to be kept; None where no pool could be served then."""
        service = self.service
        names = ("specs", "prefill_specs", "decode_specs")
        each = {name: getattr(service, name) for name in names}
        found = self.serving(**{name: specs and tuple(filter(kept, specs)) for name, specs in each.items()})
        return found if found.offers.each else None

    def serving(self, **changes: Any) -> "Problem":
        """The problem with its only service changed."""
        return replace(self, services=(replace(self.service, **changes),))

    def prices(self, weights: Weights) -> PoolPrices:
        """Weights as prices of an instance and a watt of each offer."""
        each = self.offers.each
        kinds, engines = [offer.spec.gpu_name for offer in each], [offer.part.engine for offer in each]
        return pool_prices(weights, kinds, engines, self.around.site)

    @property
    def objective_weights(self) -> Weights:
        return weights_of(self.objective)

    @property
    def search_weights(self) -> Weights:
        """The objective's, and what breaks its ties: with USD fewer watts, with GPUs fewer USD, then fewer watts."""
        return search_weights(self.objective, self.around.site)

    @property
    def limit_weights(self) -> dict[str, Weights]:
        """What every finite limit of the budget is of."""
        return {name: limit_weights(name) for name in self.budget.caps}

    def fleet(self, specs: Sequence[LaneSpec], window_tokens: Any, gamma: Any, n_instances: Any) -> Fleet:
        """A fleet in these surroundings."""
        return fleet_of([server_of(spec) for spec in specs], window_tokens, gamma, n_instances, self.around)


def make_problem(
    workload: Workload,
    specs: Sequence[EngineSpec],
    *,
    slo: Slo | None = None,
    workload_name: str = "workload",
    n_pools: int = 2,
    window_tokens: float | None = None,
    gamma: float | None = 1.0,
    objective: Objective | Weights = "tok_per_j",
    assume: str = "physical",
    assumptions: Assumptions = PHYSICAL,
    surroundings: Surroundings | None = None,
    budget: Budget | None = None,
    free: Sequence[Tunable] = (),
    hour: Hour | None = None,
    serve: Serve = "mixed",
    link: KvLink | None = None,
    rates: Failures | None = None,
    prefill_specs: Sequence[EngineSpec] | None = None,
    decode_specs: Sequence[EngineSpec] | None = None,
) -> Problem:
    """A checked `Problem` of one service. The default window is the longest request, rounded up to a whole block of 16
    tokens. Where pools may have two stages (`serve` disaggregated or any), `prefill_specs` and `decode_specs` are what
    either stage may be of, in place of `specs`.

    Raises ValueError that names the field and what is allowed; `BadField` for a spec there is no engine for.
    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> problem = fo.make_problem(chat, [fo.EngineSpec("h100"), fo.EngineSpec("b200", tp=4)], n_pools=2)
    >>> problem.window_tokens, problem.kinds
    (4304.0, ('h100', 'b200'))
    """
    window = whole_blocks_tokens(float(workload.longest_tokens)) if window_tokens is None else float(window_tokens)
    service = Service(
        name=workload_name,
        workload=workload,
        slo=slo or make_slo(),
        specs=_resolved(specs),
        window_tokens=window,
        hour=hour,
        serve=serve,
        link=link or LINKS[DEFAULT_LINK],
        prefill_specs=None if prefill_specs is None else _resolved(prefill_specs),
        decode_specs=None if decode_specs is None else _resolved(decode_specs),
    )
    problem = Problem(
        services=(service,),
        n_pools=n_pools,
        gamma=gamma,
        objective=objective,
        assume=assume,
        assumptions=assumptions,
        surroundings=surroundings or make_surroundings(),
        budget=budget or Budget(),
        free=tuple(free),
        rates=rates,
    )
    for check in (_check_service, _check_assumptions, _check_stages, _check_weights):
        check(problem)
    return problem


def _resolved(specs: Sequence[EngineSpec]) -> tuple[EngineSpec, ...]:
    return tuple(dict.fromkeys(resolved(spec) for spec in specs))


def _check_stages(problem: Problem) -> None:
    service = problem.service
    if service.serve not in ("mixed", "disaggregated", "any"):
        raise BadField("serve", f"{service.serve!r}", "need mixed, disaggregated or any")
    own = [name for name in ("prefill_specs", "decode_specs") if getattr(service, name) is not None]
    if service.serve == "mixed":
        if own:
            raise BadField(own[0], "pools have one stage (serve mixed)", "need serve disaggregated or any")
        return
    require_stage_laws(problem.assumptions)
    for name in own:
        if not getattr(service, name):
            raise BadField(name, "there are none", "need at least one, or None for those of the pools")
    if not problem.offers.pairs:
        problem_is = "no prefill stage can hand its KV cache over to a decode stage"
        raise BadField(own[-1], problem_is, "need the same LLM and KV precision of both")


def _check_service(problem: Problem) -> None:
    workload, window = problem.workload, problem.window_tokens
    longest = float(workload.longest_tokens)
    if not problem.specs:
        raise ValueError("need at least one engine spec")
    if not math.isfinite(window):
        raise ValueError(f"need a finite window, got {window}")
    if window < longest:
        raise ValueError(
            f"need a window >= the longest request of {longest:.0f} tokens, got {window:.0f}: "
            f"{float(share_above(workload, window)):.4%} of the requests would not fit"
        )
    if not demanded_tok_per_s(problem) > 0:
        raise ValueError("need requests with output tokens, got a mean output of 0")
    if problem.n_pools < 1:
        raise ValueError(f"need n_pools >= 1, got {problem.n_pools}")
    gamma = problem.gamma
    if gamma is not None and not (math.isfinite(gamma) and gamma >= 1):
        raise ValueError(f"need gamma >= 1, got {gamma}")


def _check_assumptions(problem: Problem) -> None:
    assumptions, gamma = problem.assumptions, problem.gamma
    check_prefix_cache(problem.service.workload, assumptions)
    if gamma is not None and np.asarray(assumptions.compression.effective_gamma(gamma)) < gamma:
        raise ValueError(f"need gamma <= {MAX_SHRINK:g} where only prompts shrink, got {gamma}")
    if assumptions.integration != EXACT:
        raise ValueError("need exact integration: nobody should search over a noisy sampler")
    if problem.slo.scope == "fleet" and not assumptions.tail.has_distribution:
        raise ValueError("need the tail 'quantile' for limits of the whole fleet: a mean prefill has no distribution")
    if not assumptions.whole:
        raise ValueError("need whole rounding: plans are made of whole instances (gradients relax it themselves)")
    if assumptions.prefill.chunks_are_free and any(build(spec).speculation is not None for spec in problem.all_specs):
        raise ValueError(
            "need prefill=compute where tokens are drafted ahead: published iterations take one token each"
        )
    if "max_num_seqs" in problem.free and not assumptions.kv_cache.caps_sequences:
        raise ValueError("need a paged KV cache for a free max_num_seqs: reserved slots are capped by the window")
    if "clock" in problem.free and not all(engine.power.has_clock_law for engine in problem.engines):
        raise ValueError("need power laws with an idle power for a free clock, not the published roofline's")
    if "clock" in problem.free and any(spec.power_limit_w is not None for spec in problem.all_specs):
        raise ValueError("need no limit of a board's power for a free clock, which it sets in every iteration")


def _check_weights(problem: Problem) -> None:
    objective = problem.objective_weights
    weights = [objective, *problem.limit_weights.values()]
    if any(each.kg_co2_per_h for each in weights) and not float(problem.around.site.kg_co2_per_kwh) > 0:
        raise ValueError("need kg_co2_per_kwh > 0 to count carbon, got 0")
    plain = (objective.power_w, objective.usd_per_h, objective.kg_co2_per_h, objective.n_gpus)
    if not all(0 <= weight < math.inf for weight in (*plain, *objective.gpus_of.values())):
        raise ValueError(f"need finite weights >= 0 of the objective, got {objective}")
    prices = problem.prices(objective)
    if not np.all(prices.per_instance + prices.per_watt > 0):
        raise ValueError(f"need an objective by which every engine costs something, got {objective}")


def demanded_tok_per_s(problem: Problem) -> float:
    """Output tokens per second of every fleet that holds the limits."""
    workload, assumptions = problem.workload, problem.assumptions
    _, output = assumptions.lengths.split(workload, assumptions.output_share, whole=assumptions.whole)
    return float(np.asarray(workload.arrival_rate_per_s) * np.sum(np.asarray(workload.weight) * np.asarray(output)))


def as_objective(problem: Problem, cost: float) -> float:
    """A cost that a search minimises, as the objective's own number: tokens per joule are output over watts."""
    return demanded_tok_per_s(problem) / cost if problem.objective == "tok_per_j" else cost


def assignments(problem: Problem) -> list[tuple[EngineSpec, ...]]:
    """Every way to give the pools an engine, refused where a search of each would take too long."""
    if len(problem.specs) ** problem.n_pools > MAX_ASSIGNMENTS:
        raise BadInput(
            "engines and pools",
            f"{len(problem.specs)} engines for {problem.n_pools} pools",
            f"need at most {MAX_ASSIGNMENTS} ways to assign them: name fewer GPUs or fewer pools",
        )
    return list(itertools.product(problem.specs, repeat=problem.n_pools))


def thresholds(problem: Problem) -> np.ndarray:
    """Candidate windows of the pools [tokens]: what the certificate of an exhaustive search is over.

    Every distinct length that is routed by and, with a given gamma > 1, every length divided by it: only there does the
    traffic of a pool change. Between two of them a window reserves more without serving more; that is not a proof that
    none could score better by a rounding. The last window as a lower pool's leaves the pools above it empty: that is
    how fewer pools than asked are among the candidates.
    """
    lengths = np.unique(np.ceil(routed_lengths(problem.workload, problem.assumptions)))
    lengths = np.append(lengths, np.ceil(lengths / (problem.gamma or 1.0)))
    return np.unique(np.append(lengths[lengths < problem.window_tokens], problem.window_tokens))
