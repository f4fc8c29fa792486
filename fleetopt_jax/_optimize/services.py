"""Services that share a budget: what is asked, and what is answered. Host-side records.

Each service is a problem of its own: its traffic, what it is promised, the engines it may have, its pools. Where it may
be served in several ways, by one LLM or another, or with a deadline split one way or another, each way is a problem,
and one of them is solved. What they share is GPUs of each kind, power, money and carbon.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fleetopt_jax._optimize.plan import Plan, Search, Status, Unreachable
from fleetopt_jax._optimize.problem import Problem, demanded_tok_per_s
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.core.errors import BadField, unknown_name
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.fleet import with_limits
from fleetopt_jax.fleet.resources import Budget, Objective, Resources, Weights, limit_weights, usage

SHARES = (0.5, 0.25, 0.1)  # of a deadline, for the first token
LONG_S_PER_TOKEN = 2.0  # of a deadline: with half of it for the first token, no ITL that anybody has binds


@dataclass(frozen=True)
class Purchase:
    """GPUs of a kind that may be had beyond those in stock."""

    most: float  # GPUs
    usd_per_gpu_h: float  # of each: what is bought or rented, written off over its life


@dataclass(frozen=True)
class SharedService:
    """One of several services: the problems of which one is solved for it."""

    name: str
    ways: tuple[Problem, ...]
    end_to_end_s: float = math.inf  # P99 TTFT and the longest answer at the mean ITL stay within it
    batch: bool = False  # promised that alone, however it is split
    asked: tuple[Problem, ...] = ()  # as they came, before the ITL had what that leaves

    @property
    def kinds(self) -> tuple[str, ...]:
        """GPUs that may serve it, by name."""
        return tuple(dict.fromkeys(kind for way in self.ways for kind in way.kinds))


@dataclass(frozen=True)
class Services:
    """Find the fleets of all services that together cost least within the budget."""

    each: tuple[SharedService, ...]
    budget: Budget
    purchases: Mapping[str, Purchase] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def any(self) -> Problem:
        """A problem that has what all have in common: objective, site, assumptions."""
        return self.each[0].ways[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """GPUs that may serve any, by name."""
        return tuple(dict.fromkeys(kind for service in self.each for kind in service.kinds))

    @property
    def stock(self) -> dict[str, float]:
        """GPUs there are of each kind that is scarce."""
        return dict(self.budget.gpus_of)

    @property
    def most_of(self) -> dict[str, float]:
        """GPUs there are of each kind that is scarce, with what may be bought."""
        return {
            kind: count + (self.purchases[kind].most if kind in self.purchases else 0.0)
            for kind, count in self.budget.gpus_of
        }

    def surcharge(self, kind: str) -> float:
        """USD an hour that a bought GPU costs over one in stock."""
        return self.purchases[kind].usd_per_gpu_h - price_of(self, kind)


def price_of(services: Services, kind: str) -> float:
    """USD an hour of a GPU in stock."""
    return float(engines_of(services, kind)[0].usd_per_gpu_h)


def engines_of(services: Services, kind: str) -> list[Engine]:
    """Of all services, on GPUs of a kind."""
    ways = [way for service in services.each for way in service.ways]
    return [build(spec) for way in ways for spec in way.all_specs if spec.gpu_name == kind]


def make_services(
    services: Mapping[str, Problem | Sequence[Problem]],
    *,
    budget: Budget | None = None,
    purchases: Mapping[str, Purchase] | None = None,
    end_to_end_s: Mapping[str, float] | None = None,
    batch: Collection[str] = (),
) -> Services:
    """Checked `Services`: by name, the problem of each, or several of which one is solved. They have the same
    objective, site and power scope, and no budget of their own: it is shared.

    `purchases` says how many GPUs of a kind may be had beyond the stock that the budget names (`gpus_of`), and at what
    price; kinds the budget does not name are there without limit.

    `end_to_end_s` are limits of whole answers, by service: P99 TTFT and the longest answer at the mean ITL stay within
    it. The TTFT limit stays as it is, the ITL has what that leaves. Of services named as `batch` that is all they are
    promised, a deadline: its share for the TTFT is searched among `SHARES`.

    Raises ValueError that names the service and what is allowed.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> jobs = fo.make_workload([2000], [50], [1.0], arrival_rate_per_s=10.0)
    >>> specs = [fo.EngineSpec("h100"), fo.EngineSpec("b200")]
    >>> asked = {"chat": fo.make_problem(chat, specs, n_pools=1), "jobs": fo.make_problem(jobs, specs, n_pools=1)}
    >>> fo.make_services(asked, budget=fo.make_budget(gpus_of={"b200": 8})).kinds
    ('h100', 'b200')
    """
    if not services:
        raise ValueError("need at least one service")
    limits = dict(end_to_end_s or {})
    for name in [*limits, *batch]:
        if name not in services:
            raise unknown_name("end_to_end_s" if name in limits else "batch", name, services)
    each = []
    for name, given in services.items():
        ways = (given,) if isinstance(given, Problem) else tuple(given)
        each.append(shared_service(name, ways, limits.get(name, math.inf), name in batch))
    found = Services(
        each=tuple(each),
        budget=budget or Budget(),
        purchases=MappingProxyType(dict(purchases or {})),
    )
    for service in found.each:
        _check_service(found, service)
    _check_budget(found)
    return found


def shared_service(name: str, ways: Sequence[Problem], limit_s: float, batch: bool) -> SharedService:
    """A service whose answers end within a limit; of a batch, whose latencies are nothing but shares of it."""
    if not limit_s > 0 or (batch and limit_s == math.inf):
        raise BadField("end_to_end_s", f"service {name!r}: {limit_s:g}", "need seconds > 0, and of a batch a deadline")
    if limit_s == math.inf:
        return SharedService(name, tuple(ways), asked=tuple(ways))
    split = [each for way in ways for each in (_by_deadline if batch else _by_rest)(name, way, limit_s)]
    return SharedService(name, tuple(split), limit_s, batch, tuple(ways))


def _by_rest(name: str, problem: Problem, limit_s: float) -> list[Problem]:
    """With the ITL that the TTFT limit leaves the longest answer."""
    slo, left_s = problem.slo, limit_s - ttft_limit_s(problem)
    if not left_s > 0:
        raise BadField(
            "end_to_end_s", f"service {name!r}: {limit_s:g} s, of which the TTFT limit takes all", "need more than that"
        )
    itl_s = min(float(slo.itl_s), left_s / longest_answer(problem))
    return [problem.serving(slo=with_limits(slo, itl_s=itl_s))]


def _by_deadline(name: str, problem: Problem, limit_s: float) -> list[Problem]:
    """Each share of the deadline for the TTFT, the rest for the longest answer; one where none of them binds."""
    found, tokens = [], longest_answer(problem)
    for share in SHARES if limit_s < LONG_S_PER_TOKEN * tokens else SHARES[:1]:
        limits = {"ttft_p99_s": share * limit_s, "ttft_s_per_token": 0.0, "itl_s": (1.0 - share) * limit_s / tokens}
        found.append(problem.serving(slo=with_limits(problem.slo, **limits)))
    return found


def with_promise(services: Services, name: str, **changes: Any) -> Services:
    """The same services, one of which is promised something else: other limits of its `Slo`, or another `end_to_end_s`.
    The others are the same records."""
    return replace(services, each=tuple(_changed(one, **changes) if one.name == name else one for one in services.each))


def _changed(service: SharedService, *, end_to_end_s: float | None = None, **limits: float) -> SharedService:
    ways = [problem.serving(slo=with_limits(problem.slo, **limits)) for problem in service.asked]
    limit_s = service.end_to_end_s if end_to_end_s is None else end_to_end_s
    return shared_service(service.name, ways, limit_s, service.batch)


def with_services(services: Services, changed: Mapping[str, SharedService]) -> Services:
    """The same services, some of which are others; the others are the same records. Limits and purchases of GPUs that
    none may be of any more go. Raises ValueError where what they share does not fit them."""
    there = replace(services, each=tuple(changed.get(one.name, one) for one in services.each))
    for kind in set(services.stock) - set(there.kinds):
        there = without(there, f"gpus_of.{kind}")
    for service in there.each:
        _check_service(there, service)
    _check_budget(there)
    return there


def without(services: Services, limit: str) -> Services:
    """Without a limit, and so without what may be bought of a kind that is not scarce any more."""
    budget = Budget()
    for name, cap in services.budget.caps.items():
        budget = budget if name == limit else budget.with_cap(name, cap)
    kept = {kind: purchase for kind, purchase in services.purchases.items() if f"gpus_of.{kind}" != limit}
    return replace(services, budget=budget, purchases=MappingProxyType(kept))


def with_objective(services: Services, objective: Objective | Weights) -> Services:
    """The same services, chosen by something else."""

    def by(problems: Sequence[Problem]) -> tuple[Problem, ...]:
        return tuple(replace(problem, objective=objective) for problem in problems)

    each = [replace(service, ways=by(service.ways), asked=by(service.asked)) for service in services.each]
    return replace(services, each=tuple(each))


def ttft_limit_s(problem: Problem) -> float:
    """The TTFT limit of the longest prompt [s]."""
    prompts = np.asarray(problem.workload.prompt_tokens)
    return float(problem.slo.ttft_p99_s) + float(problem.slo.ttft_s_per_token) * float(np.max(prompts))


def longest_answer(problem: Problem) -> float:
    """Output tokens of the longest answer."""
    workload, assumptions = problem.workload, problem.assumptions
    _, output = assumptions.lengths.split(workload, assumptions.output_share, whole=assumptions.whole)
    return float(np.max(np.where(np.asarray(workload.weight) > 0, np.asarray(output), 0.0)))


def _check_service(services: Services, service: SharedService) -> None:
    if not service.ways:
        raise BadField("services", f"service {service.name!r} has no problem", "need one or more")
    common = services.any
    for problem in service.ways:
        where, same = f"service {service.name!r}", ("objective", "surroundings")
        if len(problem.services) * len(problem.periods) != 1:
            raise BadField("services", f"{where} is several", "need a problem of one service in one period")
        if problem.budget.caps:
            raise BadField(
                "services", f"{where} has a budget of its own", "the budget is that of all services together"
            )
        if problem.slo.scope == "fleet":
            raise BadField("scope", f"{where}: fleet", "need pool: limits of the whole fleet couple its pools")
        if problem.assumptions.prefix_cache.reads_reuse:
            raise BadField("prefix_hit", f"{where} reads its own reuse", "need a share, which no instances change")
        if problem.free:
            raise BadField("free", f"{where} frees {', '.join(problem.free)}", "the exact search frees nothing")
        if any(repr(getattr(problem, name)) != repr(getattr(common, name)) for name in same):
            raise BadField("services", f"{where} has another objective or site", "need the same of all services")
        if problem.assumptions.power_scope != common.assumptions.power_scope:
            raise BadField("services", f"{where} counts power otherwise", "need the same assumptions of all services")


def _check_budget(services: Services) -> None:
    known, site = ", ".join(services.kinds), services.any.around.site
    if services.budget.max_kg_co2_per_h < math.inf and not float(site.kg_co2_per_kwh) > 0:
        raise ValueError("need kg_co2_per_kwh > 0 to count carbon, got 0")
    for kind in services.kinds:
        prices = sorted({float(engine.usd_per_gpu_h) for engine in engines_of(services, kind)})
        if len(prices) > 1:
            problem = f"{kind} costs {' and '.join(f'{price:g}' for price in prices)} USD/h"
            raise BadField("usd_per_gpu_h", problem, "need one price of a kind")
    for kind, count in services.budget.gpus_of:
        if kind not in services.kinds:
            raise BadField("gpus_of", f"{kind}={count:g}: no service may be of {kind}", f"its GPUs are {known}")
    for kind, purchase in services.purchases.items():
        if kind not in services.kinds:
            raise BadField("buy", f"{kind}: no service may be of {kind}", f"its GPUs are {known}")
        if kind not in services.stock:
            problem = f"{kind}: no stock of it is given, so that there is no end of it"
            raise BadField("buy", problem, f"need {kind} in gpus_of, 0 or more")
        if not 0 <= purchase.most < math.inf:
            raise BadField("buy", f"{kind}={purchase.most:g}", "need a finite number >= 0")
        if not purchase.usd_per_gpu_h >= price_of(services, kind):
            problem = f"{kind}={purchase.usd_per_gpu_h:g}: one in stock costs {price_of(services, kind):g} USD/h"
            raise BadField("buy_usd_per_gpu_h", problem, "need no less, or those in stock would stand idle")


# ----------------------------------------------------------------------------------------------------------- the answer


@dataclass(frozen=True)
class Worth:
    """What more GPUs of a kind would change, searched again with them. In units of the cost that is least."""

    kind: str
    n_gpus: int  # more
    saved: float | None  # of the cost; None where there was no fleet without them
    certified: bool  # whether both answers are


@dataclass(frozen=True)
class ServicesPlan:
    """A fleet for each service, within the budget."""

    status: Status
    services: Services
    plans: tuple[Plan, ...]  # in the order of the services; each is feasible by itself, and best only with the others
    search: Search
    prices: Mapping[str, float]  # of a unit of each limit of the budget, of the relaxed problem [cost per unit]
    worth: tuple[Worth, ...] = ()

    def used(self, limit: str) -> tuple[float, ...]:
        """What each service uses of a limit of the budget; what bought GPUs cost more is not among it."""
        return tuple(self._sum(plan, limit_weights(limit)) for plan in self.plans)

    @property
    def n_gpus_of(self) -> dict[str, int]:
        """GPUs of every kind, all services together."""
        each = {kind: Weights(gpus_of=MappingProxyType({kind: 1.0})) for kind in self.services.kinds}
        return {kind: round(sum(self._sum(plan, of) for plan in self.plans)) for kind, of in each.items()}

    @property
    def bought(self) -> dict[str, int]:
        """GPUs of every kind beyond those in stock."""
        stock = self.services.stock
        return {kind: max(0, math.ceil(self.n_gpus_of[kind] - stock[kind])) for kind in self.services.purchases}

    @property
    def surcharge_usd_per_h(self) -> float:
        """What bought GPUs cost over those in stock."""
        return sum(n * self.services.surcharge(kind) for kind, n in self.bought.items())

    @property
    def total(self) -> Resources:
        """Of all services, what bought GPUs cost more included."""
        metrics = [plan.metrics.resources for plan in self.plans]
        sums = {name: np.sum([np.asarray(getattr(each, name)) for each in metrics]) for name in vars(metrics[0])}
        return Resources(**{**sums, "usd_per_h": sums["usd_per_h"] + self.surcharge_usd_per_h})

    @property
    def cost(self) -> float:
        """By the objective's weights."""
        weights = self.services.any.objective_weights
        return sum(self._sum(plan, weights) for plan in self.plans) + weights.usd_per_h * self.surcharge_usd_per_h

    @property
    def objective(self) -> float:
        """The number it was chosen by: tok/J, USD/h, watts, kg CO2/h or GPUs of all services together."""
        return services_objective(self.services, self.cost)

    def _sum(self, plan: Plan, weights: Weights) -> float:
        return usage(weights, plan.kinds, plan.of_kinds)


def services_objective(services: Services, cost: float) -> float:
    """A cost as the objective's own number: tokens per joule are the output of all services over their watts."""
    if services.any.objective != "tok_per_j":
        return cost
    return sum(demanded_tok_per_s(service.ways[0]) for service in services.each) / cost


@dataclass(frozen=True)
class NoServicesPlan:
    """No fleets hold what the services are promised within the budget."""

    services: Services
    search: Search
    binding: Unreachable
    service: str | None = None  # the one that no fleet of its own serves; None: together they cannot
    helps: Mapping[str, float] = field(default_factory=dict)  # each limit that alone would do at the value, if so large
    proved: bool = True  # or else none was found

    @property
    def status(self) -> Status:
        return "infeasible"
