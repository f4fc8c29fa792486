"""Plans that hold their limits with a given probability.

Every choice of windows and engines gets the cheapest instances that hold in that share of the draws (`sized.py`). The
choices are those of the plan as it stands, one pool of each engine, and the best of a coarse look at all windows
(`sections.py`); then the windows of the cheapest of several pools move, one at a time and under fewer draws, as long as
that is cheaper: by a fifth, then by ever less. The cheapest fleet is the answer: for its windows the best there is
over the draws, over all windows the best found.

An exact search for engines and laws that are all slower by as many sigmas was tried instead, with the fewest sigmas
that hold often enough: its windows cost up to twice as much, for so many errors seldom come together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetopt_jax._optimize.holding import BATCH, Holding, holding
from fleetopt_jax._optimize.plan import Infeasible, Plan, Unreachable, among, one_pool_of
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.search import default_method, evaluate_given
from fleetopt_jax._optimize.sections import Sections
from fleetopt_jax._optimize.sized import Cut, Scenarios, scenarios_of
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.fleet.choices.prefix_cache import not_searched
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS

N_MOVED = 3  # of several probabilities, those for which windows are moved
N_STARTS = 2  # of the coarse look, sized under all draws
CANDIDATES = "windows of the best plan as planned, one pool, some 10 windows in every way, and windows near the best"
STEPS = (1.2, 1.08, 1.03)  # factors by which a window moves
HIGHEST = 0.99  # confidence that may be asked for: with 1,024 draws ten of them may fail


@dataclass(frozen=True)
class Confident:
    """A plan that holds with at least the probability asked for, and what that costs."""

    confidence: float  # asked
    plan: Plan
    holding: Holding
    sigmas: float | None  # z: as much slower as engines and laws may be so that fleets sized for that hold as often
    nominal: Plan  # the optimum with engines and laws as they stand
    nominal_holding: Holding

    @property
    def costs(self) -> dict[str, float]:
        """What it takes more than the nominal plan: GPUs, watts, USD and kg CO2 an hour."""
        names = ("n_gpus", "power_w", "usd_per_h", "kg_co2_per_h")
        return {name: float(getattr(self.plan.metrics, name) - getattr(self.nominal.metrics, name)) for name in names}


def confident(nominal: Plan, confidence: float, *, seed: int = 0) -> Confident | Infeasible:
    """The cheapest fleet found that holds the limits of a plan's problem with that probability, up to 0.99.

    `nominal` is the optimum of its problem. Probabilities are shares of 1,024 draws of the errors of engines and laws.
    Where no fleet that was tried holds so often, says the most that one does. Raises ValueError for another
    probability.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> plan = fo.require_plan(fo.optimize(fo.make_problem(chat, [fo.EngineSpec("h100")], n_pools=1)))
    >>> surer = fo.confident(plan, 0.8)
    >>> surer.holding.probability >= 0.8, surer.costs["n_gpus"] >= 0
    (True, True)
    """
    return confident_along(nominal, [confidence], seed=seed)[0]


def confident_along(
    nominal: Plan, confidences: Sequence[float], *, seed: int = 0, progress: Progress | None = None
) -> list[Confident | Infeasible]:
    """`confident` for several probabilities: all of them choose among what was found for a few, so that a higher one is
    never cheaper."""
    for each in confidences:
        if not 0 < each <= HIGHEST:
            raise ValueError(f"need 0 < confidence <= {HIGHEST:g}, got {each:g}")
    if nominal.problem.assumptions.prefix_cache.reads_reuse:
        raise not_searched("a plan for a probability")
    fleets, levels = _Fleets(nominal, seed=seed), sorted(set(confidences))
    moved = np.unique(np.linspace(0, len(levels) - 1, N_MOVED).round())
    for i, each in enumerate(levels):
        fleets.look(each, moving=i in moved)
        if progress:
            progress(i + 1, len(levels))
    return [fleets.best_for(each) for each in confidences]


class _Fleets:
    """Windows and engines that are sized for one confidence or another."""

    def __init__(self, nominal: Plan, *, seed: int = 0):
        self.nominal = nominal
        self.scenarios: Scenarios = scenarios_of(nominal.problem, seed=seed)
        self._alone = [Cut(self.scenarios, plan) for plan in one_pool_plans(nominal.problem)]
        self._cuts = [Cut(self.scenarios, nominal), *self._alone]
        self._sections = Sections(nominal, seed)
        self._holding: Holding | None = None

    def look(self, confidence: float, *, moving: bool) -> None:
        """Keep the windows that are the best for this probability; with `moving` those near them too."""
        problem = self.scenarios.problem
        if problem.slo.scope == "fleet" or problem.n_pools == 1:
            return
        for plan in self._sections.best(confidence, N_STARTS):
            self._keep(plan)
        if moving:
            self._move_on(confidence)

    def _keep(self, plan: Plan) -> None:
        """Size a plan's windows under all draws, unless they are known."""
        if all(_windows(plan) != _windows(cut.plan) for cut in self._cuts):
            self._cuts.append(Cut(self.scenarios, plan))

    def best_for(self, confidence: float) -> Confident | Infeasible:
        """The cheapest of all that were kept."""
        best = self._best(self._cuts, confidence)
        if best is None:
            return self._out_of_reach(confidence)
        cut, plan = best
        alone = self._best(self._alone, confidence, any_budget=True)
        reference = None if alone is None else one_pool_of(alone[1])
        plan = replace(
            plan,
            method=self.nominal.method,
            search=among(self.nominal.search, CANDIDATES),
            one_pool=reference,
            gain_vs_homogeneous=reference and float(plan.metrics.tok_per_j) / reference.tok_per_j,
        )
        seed = self.scenarios.seed
        self._holding = self._holding or holding(self.nominal, seed=seed)
        return Confident(
            confidence=confidence,
            plan=plan,
            holding=holding(plan, seed=seed),
            sigmas=cut.slowness(confidence),
            nominal=self.nominal,
            nominal_holding=self._holding,
        )

    def _move_on(self, confidence: float) -> None:
        """Keep the windows that are reached by moving one at a time from the cheapest of several pools, or from those
        that hold most often where none of several hold as often as asked."""
        several = [cut.plan for cut in self._cuts if len(cut.plan.specs) > 1]
        if not several:
            return
        few = replace(self.scenarios, n_draws=BATCH)
        at = min((Cut(few, plan) for plan in several), key=lambda cut: self._price(cut, confidence))
        price = self._price(at, confidence)
        for step in STEPS:
            moves = [(k, factor) for k in range(len(at.plan.specs) - 1) for factor in (step, 1.0 / step)]
            while moves:
                k, factor = moves.pop(0)
                there = Cut(few, _moved(at.plan, k, factor))
                cost = self._price(there, confidence)
                if cost < price:  # and on in the same direction, then the others again
                    at, price, moves = there, cost, [(k, factor), *(each for each in moves if each[0] != k)]
        self._keep(at.plan)

    def _price(self, cut: Cut, confidence: float) -> tuple[float, float]:
        """(the cost of the cheapest instances that hold with such a probability, inf where none do; minus the most that
        any hold with): the less, the better."""
        return next((cost for cost, *_ in self._priced([cut], confidence)), math.inf), -cut.most()

    def _priced(self, cuts: list[Cut], confidence: float) -> Iterator[tuple[float, Cut, np.ndarray]]:
        """(cost, cut, instances [K]) of the cuts that hold with such a probability."""
        for cut in cuts:
            n = cut.counts(confidence)
            if n is not None:
                yield sum(float(cut.costs(k, np.array([each]))[0]) for k, each in enumerate(n)), cut, n

    def _best(self, cuts: list[Cut], confidence: float, *, any_budget: bool = False) -> tuple[Cut, Plan] | None:
        """The cheapest fleet that holds with such a probability, and keeps the budget unless `any_budget` may do."""
        for _, cut, n in sorted(self._priced(cuts, confidence), key=lambda each: each[0]):
            plan = cut.with_counts(n)
            if plan.binding is None or any_budget:
                return cut, plan
        return None

    def _out_of_reach(self, confidence: float) -> Infeasible:
        most = max(cut.most() for cut in self._cuts)
        binding = Unreachable("confidence", confidence, most if most < confidence else None)
        method = default_method(self.nominal.problem) if self.nominal.method == "given" else self.nominal.method
        return Infeasible(method, self.nominal.problem, among(self.nominal.search, CANDIDATES), binding)


def one_pool_plans(problem: Problem) -> Iterator[Plan]:
    """One pool of each engine, of whatever instances."""
    for spec in problem.specs:
        yield evaluate_given(problem, (spec,), window_tokens=[problem.window_tokens], gamma=[1.0], n_instances=[1.0])


def _windows(plan: Plan) -> tuple:
    return plan.specs, np.asarray(plan.fleet.window_tokens).tolist()


def _moved(plan: Plan, k: int, factor: float) -> Plan:
    """The plan, not evaluated, whose k-th window is so many times as long, in whole blocks between its neighbours."""
    windows = np.array(plan.fleet.window_tokens, float)
    low, high = (windows[k - 1] if k else 0.0) + BLOCK_TOKENS, windows[k + 1] - BLOCK_TOKENS
    if low <= high:
        windows[k] = np.clip(np.round(factor * windows[k] / BLOCK_TOKENS) * BLOCK_TOKENS, low, high)
    fleet = plan.problem.fleet(plan.specs, windows, plan.fleet.gamma, plan.fleet.n_instances)
    return replace(plan, fleet=fleet)
