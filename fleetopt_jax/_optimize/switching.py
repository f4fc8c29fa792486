"""When to switch what: the least cost of running some of several equal instances through periods one after another.

In period t so many n_t instances serve, of the counts n that are allowed. The cost of a course is

    sum over t of  c_t(n_t) + s_t max(0, n_t - n_{t-1})

with any running costs c_t, inf where so few do not hold the limits, and a cost s_t of starting an instance for period
t. Stopping costs nothing. **Minimum up-time**: a pool that grew for period t stays at least as large through the next
`n_held[t]` periods: its youngest instances stop first, and not before they have been up so long. (As Kubernetes does
with the stabilisation window of an autoscaler. Who stops the oldest first could shrink a little earlier.)

**Exact**: a dynamic program whose state is how many serve, and since which period they are held, if they are. No course
over the allowed counts costs less, whatever c_t and s_t are, negative ones included. Where periods repeat, the state
before the first is that after the last: the period with fewest allowed counts is taken for the first, and each of its
states in turn for the beginning. T periods, M counts and holds of h periods take T (h + 2) M steps for each beginning;
a pool that is sized for its busiest period has h + 2 of them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

State = (
    int | None
)  # the period for which a pool grew that is held to it since, -1 the last of the round before; or none


@dataclass(frozen=True)
class Switching:
    """What starts cost, and how long they bind. Arrays [T]."""

    start_cost: np.ndarray  # of an instance that serves from this period on
    n_held: np.ndarray  # further periods through which it serves at least
    repeats: bool  # whether the first period follows the last


class Course(NamedTuple):
    """How many serve by period [T], as places among the counts allowed, and what that costs."""

    cost: float
    place: np.ndarray


NO_COURSE = Course(math.inf, np.zeros(0, int))


def periods_held(length_s: np.ndarray, min_up_s: float, *, repeats: bool) -> np.ndarray:
    """How many further periods begin less than `min_up_s` after the start of each [T]."""
    n = len(length_s)
    rounds = 2 + math.ceil(min_up_s / length_s.sum()) if repeats else 1
    start_s = np.concatenate([[0.0], np.cumsum(np.tile(length_s, rounds))[:-1]])
    last = np.searchsorted(start_s, start_s[:n] + min_up_s * (1.0 - 1e-9), side="left") - 1
    return np.maximum(last - np.arange(n), 0)


def cheapest_course(costs: np.ndarray, counts: np.ndarray, switching: Switching) -> Course:
    """The cheapest course over `counts` [M], rising, whose running costs are `costs` [T, M]. Where periods do not
    repeat, what serves in the first was started before."""
    if not switching.repeats:
        return _from(costs, counts, switching, None, costs[0])
    n = len(costs)
    first = int(np.argmin(np.isfinite(costs).sum(axis=1)))
    turned = np.roll(np.arange(n), -first)
    around = Switching(switching.start_cost[turned], switching.n_held[turned], repeats=True)
    courses = [_from(costs[turned], counts, around, *state) for state in _beginnings(costs[first], around)]
    best = min([NO_COURSE, *courses], key=lambda course: course.cost)
    place = np.empty_like(best.place)
    place[turned[: len(place)]] = best.place
    return Course(best.cost, place)


def _beginnings(costs: np.ndarray, around: Switching) -> Iterator[tuple[State, np.ndarray]]:
    """Every state of the first period: the period since which its count is held, and costs [M] that allow one count."""
    n = len(around.n_held)
    grew: list[State] = [period for period in range(1 - n, 1) if around.n_held[period] + period >= 0]
    for place in np.flatnonzero(np.isfinite(costs)):
        only = np.where(np.arange(len(costs)) == place, costs, np.inf)
        yield from ((state, only) for state in (None, *grew))


class _Came(NamedTuple):
    """From where a period's states came: by count [M], the state and the place of the period before."""

    states: list[State]
    kept_of: np.ndarray  # of a pool that did not grow: which of the states,
    kept_from: np.ndarray  # and which place
    grown_of: np.ndarray  # the same of one that grew
    grown_from: np.ndarray


def _from(costs: np.ndarray, counts: np.ndarray, switching: Switching, begins: State, first: np.ndarray) -> Course:
    """The cheapest course whose first period has the state `begins` and costs [M], back to it where periods repeat."""
    n, repeats, came = len(costs), switching.repeats, []
    state: dict[State, np.ndarray] = {begins: first}
    for t in range(1, n + repeats):
        # The first period is reached again, but its costs are counted.
        running = costs[t] if t < n else np.where(np.isfinite(first), 0.0, np.inf)
        held = {s: cost for s, cost in state.items() if s is not None and s + switching.n_held[s % n] >= t}
        states, table = list(state), np.stack(list(state.values()))
        loose = np.array([s not in held for s in states])
        released = np.where(loose[:, None], table, np.inf)
        kept, kept_from = _least_from(released.min(axis=0))
        price = switching.start_cost[t % n] * counts
        grown, grown_from = _least_below(table.min(axis=0) - price)
        came.append(_Came(states, released.argmin(axis=0), kept_from, table.argmin(axis=0), grown_from))
        state = {None: kept + running, t: grown + price + running} | {s: cost + running for s, cost in held.items()}
    back = None if begins is None else begins + n
    ends = back if repeats else min(state, key=lambda s: float(state[s].min()))
    cost = state.get(ends, np.full(len(counts), np.inf))
    place = int(np.argmin(cost))
    return Course(float(cost[place]), _traced(came, ends, place)[:n]) if np.isfinite(cost[place]) else NO_COURSE


def _traced(came: list[_Came], state: State, place: int) -> np.ndarray:
    """The places by period that led to a state."""
    places = [place]
    for t in range(len(came), 0, -1):
        at = came[t - 1]
        if state is None:
            place = int(at.kept_from[place])
            state = at.states[int(at.kept_of[place])]
        elif state == t:
            place = int(at.grown_from[place])
            state = at.states[int(at.grown_of[place])]
        places.append(place)
    return np.array(places[::-1])


def _least_from(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least of the values from each place on, and where it is: the nearest of several."""
    least = np.minimum.accumulate(values[::-1])
    where = np.maximum.accumulate(np.where(values[::-1] == least, np.arange(len(values)), 0))
    return least[::-1], len(values) - 1 - where[::-1]


def _least_below(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least of the values before each place, and where it is; inf for the first."""
    least = np.minimum.accumulate(values)
    where = np.maximum.accumulate(np.where(values == least, np.arange(len(values)), 0))
    return np.append(np.inf, least[:-1]), np.append(0, where[:-1])
