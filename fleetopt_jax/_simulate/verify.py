"""The best fleet that holds its limits in simulation, among layouts that compete.

A layout is windows, gammas and engines; how many instances each of its pools needs, the simulator says, whatever the
laws thought: the least number is bracketed up and down from a guess, by trials of the pool alone under the same
requests, with more replications only where the interval straddles a limit. A layout is left as soon as what it needs at
least costs more than the best that holds. Others are proposed while they promise to be better by what trials have told.
The winner is simulated whole, in replications that none of its trials had; should it fail there, it grows, and the race
goes on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fleetopt_jax._simulate.bracket import Bracket
from fleetopt_jax._simulate.dispatch import Balancer
from fleetopt_jax._simulate.observed import n_whole
from fleetopt_jax._simulate.readings import Held, LimitReading, limits_read, verdict, worst
from fleetopt_jax._simulate.requests import Requests
from fleetopt_jax._simulate.simulate import (
    FEWEST_REQUESTS,
    MOST_REQUESTS,
    RELAXATIONS,
    Batch,
    Setting,
    Simulation,
    StageProgress,
    check_simulated_cache,
    enough_requests,
    outlook,
    pools_holding,
    simulation_of,
)
from fleetopt_jax._simulate.trials import Judged, Rooms, Trials, judge, together
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices.dispatch import STALENESS_S
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.sizing import most_instances
from fleetopt_jax.laws.queueing import thinned_scv
from fleetopt_jax.workload.atoms import Workload

FEWEST, MOST = 4, 8  # replications of the winner, unless it takes more or fewer are asked for
MOST_LAYOUTS = 12
BURSTS = 1000  # that a replication of the winner has: requests of one meet one fate
MOST_ROUNDS = 120


class Rival(Protocol):
    """A layout that competes."""

    @property
    def fleet(self) -> Fleet:
        """With the instances to try first."""
        ...

    @property
    def least(self) -> Sequence[int]:
        """The fewest instances that each pool may have [K]."""
        ...

    def cost(self, n_instances: Sequence[int]) -> float:
        """Of so many instances [K]: what is to be least; inf where they are too many to be allowed. Rises with each."""
        ...


@dataclass(frozen=True)
class Attempt:
    """A fleet that was simulated, and what came of it."""

    rival: int  # of which layout, in the order in which they came
    n_instances: tuple[int, ...]
    cost: float
    reading: Held


@dataclass(frozen=True)
class Standing:
    """How far a layout has come."""

    rival: Any
    bound: tuple[int, ...]  # no pool can do with fewer instances
    passed: tuple[int, ...] | None  # that hold; None where nobody knows yet


@dataclass(frozen=True)
class Verified:
    """The best fleet that holds the limits in simulation, or the last that was tried."""

    fleet: Fleet
    simulation: Simulation
    rounds: int  # of trials
    held: bool
    rival: int = 0  # whose layout it is
    standings: tuple[Standing, ...] = ()  # of the layouts that competed
    tried: tuple[Attempt, ...] = ()  # every fleet that was simulated, in order


Propose = Callable[[Sequence[Standing]], Rival | None]


@dataclass(frozen=True)
class How:
    """How fleets are simulated: `simulate`'s keywords."""

    requests: Requests | None = None
    n_requests: int | None = None
    n_replications: int = MOST
    seed: int = 0
    staleness_s: float = STALENESS_S
    router_width: float | None = None
    arrival_scv: float | None = None

    @property
    def most(self) -> int:
        """Replications."""
        return self.n_replications if self.requests is None else len(self.requests.arrival_s)


def verify(
    propose: Propose,
    workload: Workload,
    assumptions: Assumptions,
    slo: Slo,
    *,
    progress: StageProgress | None = None,
    **how: Any,
) -> Verified:
    """The cheapest fleet that holds, of the layouts that `propose` names, knowing how those before it stand, until it
    names none. `how` is passed on as to `simulate`.

    With one instance fewer in any of its pools the answer was not seen to hold: that fails, or is too close to tell.
    Where fewer than four replications are asked for, which have no interval worth the name, means decide.
    """
    require_float64("verify")
    of = How(**how)
    if of.arrival_scv is not None:
        workload = replace(workload, **as_floats(arrival_scv=of.arrival_scv))
    race = _Race(propose, workload, assumptions, slo, of, progress)
    return race.run()


def _as_counts(total: int, guess: np.ndarray, least: np.ndarray) -> np.ndarray:
    """So many instances shared out among pools [K] as a guess does, none with fewer than its least."""
    over = np.maximum(guess - least, 0.0)
    share = over / over.sum() if over.sum() > 0 else guess / guess.sum()
    exact = (total - least.sum()) * share
    n = np.floor(exact + 1e-9)
    n[np.argsort(n - exact, kind="stable")[: round(float(exact.sum() - n.sum()))]] += 1
    return (least + n).astype(int)


@dataclass
class _Layout:
    """A rival, its trials, and what they have told of each of its units: pools, or all of them where all requests share
    the limits."""

    number: int
    rival: Rival
    screen: Trials
    whole: Trials
    setting: Setting
    brackets: list[Bracket]
    joint: bool
    serves: bool = True

    def counts(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Instances of pools [K] for sizes of units."""
        if not self.joint:
            return tuple(int(n) for n in sizes)
        guess = np.array([n_whole(lane) for lane in self.rival.fleet.lanes], float)
        return tuple(int(n) for n in _as_counts(sizes[0], guess, np.asarray(self.rival.least, float)))

    def cost(self, sizes: Sequence[int]) -> float:
        return self.rival.cost(self.counts(sizes))

    def share_of(self, unit: int) -> float:
        """Of all requests, those that a unit serves."""
        return 1.0 if self.joint else float(self.setting.analytic.pools.traffic_frac[unit])

    @property
    def hopeless(self) -> bool:
        return not self.serves or any(each.hopeless for each in self.brackets)

    @property
    def bound(self) -> tuple[int, ...]:
        return tuple(each.bound for each in self.brackets)

    @property
    def passed(self) -> tuple[int, ...] | None:
        """Sizes that hold; None where not known."""
        found = [each.passed for each in self.brackets]
        return (
            None if not self.serves or any(each is None for each in found) else tuple(each.n for each in found if each)
        )

    @property
    def is_open(self) -> bool:
        return not self.hopeless and any(each.is_open for each in self.brackets)

    @property
    def trial(self) -> tuple[int, ...]:
        """Sizes to try next: of units that are settled what holds."""
        return tuple(
            each.trial if each.is_open else each.passed.n if each.passed else each.bound for each in self.brackets
        )


class _Race:
    """Layouts that compete."""

    def __init__(
        self,
        propose: Propose,
        workload: Workload,
        assumptions: Assumptions,
        slo: Slo,
        how: How,
        progress: StageProgress | None,
    ):
        self.propose, self.workload, self.assumptions, self.slo = propose, workload, assumptions, slo
        self.how, self.progress, self.rooms = how, progress, Rooms()
        self.layouts: list[_Layout] = []
        self.attempts: list[Attempt] = []
        self.rounds = 0
        self.last: tuple[int, Fleet, Simulation] | None = None

    def run(self) -> Verified:
        while self.rounds < MOST_ROUNDS:
            at_most = min((each.cost(each.passed) for each in self.layouts if each.passed), default=np.inf)
            on = [each for each in self.layouts if each.is_open and self._least_cost(each) < at_most]
            if on:
                self._advance(min(on, key=lambda each: each.cost(each.trial)))
            elif not self._enter():
                best = self._best()
                if best is None:
                    break
                if self._confirm(best):
                    return self._answer(held=True)
        return self._answer(held=False)

    def _least_cost(self, layout: _Layout) -> float:
        return layout.cost(layout.bound)

    def _best(self) -> _Layout | None:
        """The layout of the cheapest fleet that holds."""
        known = [(each.cost(each.passed), each.number) for each in self.layouts if each.passed]
        cost, number = min(known, default=(np.inf, 0))
        return self.layouts[number] if np.isfinite(cost) else None

    def _enter(self) -> bool:
        """Whether another layout has joined."""
        if len(self.layouts) >= MOST_LAYOUTS:
            return False
        rival = self.propose(self._standings())
        if rival is None:
            return False
        check_simulated_cache(self.assumptions, self.how.requests)
        self.layouts.append(self._layout(rival))
        return True

    def _standings(self) -> list[Standing]:
        return [
            Standing(each.rival, each.counts(each.bound), each.counts(each.passed) if each.passed else None)
            for each in self.layouts
        ]

    def _layout(self, rival: Rival) -> _Layout:
        how, fleet = self.how, rival.fleet
        analytic, life_s = outlook(fleet, self.workload, assumptions=self.assumptions)
        needed_s = RELAXATIONS * float(np.max(life_s))
        balancer = Balancer(self.assumptions.dispatch, how.staleness_s, how.seed)
        setting = Setting(
            fleet, self.workload, self.assumptions, self.slo, analytic, needed_s, balancer, how.router_width
        )
        n = how.n_requests or max(enough_requests(self.workload, needed_s), self._n_bursts)
        few = n if how.requests is not None else max(n // 2, min(n, FEWEST_REQUESTS))
        screen, whole = (Trials(setting, m, how.requests, self.rooms, self.progress) for m in (few, n))
        guess, joint = [n_whole(lane) for lane in fleet.lanes], self.slo.scope == "fleet"
        sizes = [(sum(rival.least), sum(guess))] if joint else list(zip(rival.least, guess, strict=True))
        brackets = [Bracket(least, int(most_instances(least)), first) for least, first in sizes]
        serves = screen.serves_all()
        layout = _Layout(len(self.layouts), rival, screen, whole, setting, brackets, joint, serves)
        if not serves and self.last is None:
            self._simulated(layout, layout.trial, 1)
            self._note(layout, layout.trial, "fails")
        return layout

    @property
    def _n_bursts(self) -> int:
        """Requests of `BURSTS`."""
        return min(math.ceil(BURSTS * float(self.workload.arrival_scv)), MOST_REQUESTS)

    def _advance(self, layout: _Layout) -> None:
        """One trial of every unit of a layout that is not settled."""
        self.rounds += 1
        sizes = layout.trial
        some = [u for u, each in enumerate(layout.brackets) if each.is_open]
        readings: list[Held] = []
        for u, found in self._judged(layout, sizes, some).items():
            layout.brackets[u] = layout.brackets[u].after(sizes[u], found.by, found.reading)
            readings.append(found.reading)
        self._note(layout, sizes, worst(readings))

    def _judged(self, layout: _Layout, sizes: Sequence[int], units: Sequence[int]) -> dict[int, Judged]:
        """What trials say of units, with more replications while an interval straddles a limit."""
        counts, found, left = layout.counts(sizes), {}, list(units)
        for n in _steps(self.how.most):
            pools = range(len(counts)) if layout.joint else left
            layout.screen.run([(k, counts[k]) for k in pools], n)
            for u in left:
                parts = [layout.screen.of(k, counts[k], n) for k in (pools if layout.joint else [u])]
                scv = float(thinned_scv(float(self.workload.arrival_scv), layout.share_of(u)))
                found[u] = judge([together(each) for each in zip(*parts, strict=True)], self.slo, scv)
            left = [u for u in left if found[u].reading == "unclear"]
            if not left:
                break
        if self.how.most < FEWEST:  # no interval worth the name
            found = {u: replace(each, reading="holds" if each.by <= 0 else "fails") for u, each in found.items()}
        return found

    def _confirm(self, layout: _Layout) -> bool:
        """Whether the fleet of a layout that held in trials holds whole; where it does not, its pools know."""
        sizes = layout.passed
        assert sizes is not None, "only what holds is confirmed"
        self.rounds += 1
        simulation = self._simulated(layout, sizes, self.how.most)
        wanting = [each for each in limits_read(simulation, self.slo) if each.reading != "holds"]
        held = self._holding(simulation, wanting)
        if layout.joint:
            held = [all(held)]
        for u, ok in enumerate(held):
            if not ok:
                of_it = [each for each in wanting if layout.joint or each.pool in (None, u + 1)]
                by = max((each.by for each in of_it if math.isfinite(each.by)), default=0.0)
                reading = worst(each.reading for each in of_it) if of_it else "unclear"
                layout.brackets[u] = layout.brackets[u].after(sizes[u], by, reading)
        self._note(layout, sizes, "holds" if all(held) else "unclear" if simulation.slo_held else "fails")
        return all(held)

    def _simulated(self, layout: _Layout, sizes: Sequence[int], most: int) -> Simulation:
        """A fleet whole, until its intervals decide."""
        setting = layout.setting.with_instances(layout.counts(sizes))
        batches: list[Batch] = []
        while True:
            n = min(FEWEST, most - len(batches)) if not batches else min(2, most - len(batches))
            batches += layout.whole.whole(setting, len(batches), n)
            simulation = simulation_of(setting, batches)
            unclear = verdict(limits_read(simulation, self.slo)) == "unclear" and simulation.warmed_up
            if len(batches) >= most or not unclear:
                self.last = layout.number, setting.fleet, simulation
                return simulation

    def _holding(self, simulation: Simulation, wanting: Sequence[LimitReading]) -> list[bool]:
        """Whether each pool holds: surely, with no limit `wanting`, or in the mean where no interval can tell."""
        in_mean = pools_holding(simulation.pools, simulation.metrics, self.slo)
        if simulation.n_replications < FEWEST or not simulation.warmed_up:
            return in_mean
        pools = {each.pool for each in wanting}
        return [ok and not pools & {None, k} for k, ok in enumerate(in_mean, 1)]

    def _note(self, layout: _Layout, sizes: Sequence[int], reading: Held) -> None:
        counts = layout.counts(sizes)
        self.attempts.append(Attempt(layout.number, counts, layout.rival.cost(counts), reading))

    def _answer(self, *, held: bool) -> Verified:
        if self.last is None:  # nothing held in its trials: the nearest is shown whole
            layout = min(
                self.layouts,
                key=lambda each: max(max((t.by for t in b.tries[-1:]), default=0.0) for b in each.brackets),
            )
            sizes = [max((t.n for t in b.tries), default=b.bound) for b in layout.brackets]
            self._simulated(layout, sizes, min(FEWEST, self.how.most))
        assert self.last is not None
        number, fleet, simulation = self.last
        return Verified(fleet, simulation, self.rounds, held, number, tuple(self._standings()), tuple(self.attempts))


def _steps(most: int) -> list[int]:
    """Replications after which trials are looked at."""
    return [*(n for n in (2, 4, 8) if n < most), most]
