"""Trials of single pools with other numbers of instances, under the same requests, until their intervals decide.

Behind a router that knows lengths alone a pool serves its slice of the traffic without a look at the other pools, so
its trial is a part of every fleet that it belongs to, and pools of a layout are searched side by side.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from fleetopt_jax._simulate.estimates import Estimate, estimate, student_t, wilson
from fleetopt_jax._simulate.observed import n_whole
from fleetopt_jax._simulate.pool import PoolRun, Room
from fleetopt_jax._simulate.readings import Held, at_least, at_most, late_by, worst
from fleetopt_jax._simulate.requests import Requests, draw_requests
from fleetopt_jax._simulate.simulate import (
    Arrived,
    Batch,
    Setting,
    StageProgress,
    arrive,
    beyond_iterations_s,
    gather,
    run_alone,
    slots_for,
)
from fleetopt_jax.core.threads import in_threads
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.laws.ttft import TAIL_PROBABILITY

T = TypeVar("T")

STRETCHES = 8  # of a replication's window, whose shares are taken for independent
WIDER = 2.5  # a compiled program with room for so many times what a pool needs is taken rather than another compiled
LEAST_SLOTS, LEAST_SIZE = 32, 2048  # of an instance, and of all: a smaller program is hardly faster
HEADROOM = 1.25  # of instances, where one is compiled


@dataclass(frozen=True)
class Seen:
    """What one replication of a pool said of the limits."""

    met: np.ndarray  # requests within the limit of their TTFT, in each stretch of the window
    counted: np.ndarray  # of so many
    gaps_s: float  # between tokens, together
    gaps: float


@dataclass(frozen=True)
class Judged:
    """What replications say of a pool, or of several together."""

    within: Estimate  # share of requests within the limit of their TTFT
    by: float  # ln of the worst value over its limit
    reading: Held


def judge(replications: Sequence[Seen], slo: Slo, arrival_scv: float = 1.0) -> Judged:
    """By the share within the TTFT, over stretches of all replications (batch means: Law, Simulation Modeling and
    Analysis, section 9.5), at least as wide as Wilson's of as many independent bursts, and by the mean ITL over
    replications. `arrival_scv` is the stream's: as many requests, in the mean, come together and meet one fate."""
    met, counted = (np.concatenate([getattr(each, name) for each in replications]) for name in ("met", "counted"))
    n = int(counted.sum())
    if not n:
        return Judged(Estimate(1.0, 1.0, 1.0), -math.inf, "holds")
    share, some = float(met.sum() / n), counted > 0
    spread = (met - share * counted)[some] / counted[some].mean()  # of a ratio
    m = len(spread)
    half = student_t(m - 1) * float(np.sqrt(np.sum(spread**2) / (m - 1) / m)) if m > 1 else 1.0
    low, high = wilson(share, n / max(arrival_scv, 1.0))
    within = Estimate(share, max(min(share - half, low), 0.0), min(max(share + half, high), 1.0))
    readings: list[Held] = [at_least(within, 1.0 - TAIL_PROBABILITY)]
    by = late_by(share, 0.5 / n)
    if math.isfinite(float(slo.itl_s)):
        itl = estimate(np.array([each.gaps_s / max(each.gaps, 1e-9) for each in replications]))
        most = float(slo.itl_s)
        readings.append(at_most(itl, most))
        by = max(by, math.log(max(itl.mean, 1e-9) / most))
    return Judged(within, by, worst(readings))


def together(parts: Sequence[Seen]) -> Seen:
    """Pools of one replication, judged as one."""
    return Seen(
        met=np.sum([part.met for part in parts], axis=0),
        counted=np.sum([part.counted for part in parts], axis=0),
        gaps_s=sum(part.gaps_s for part in parts),
        gaps=sum(part.gaps for part in parts),
    )


def seen_of(setting: Setting, arrived: Arrived, k: int, run: PoolRun | None) -> list[Seen]:
    """What each replication of a run of pool k said."""
    n_rows, (row, column, place) = len(arrived.window_s), arrived.places[k]
    if run is None:
        none = np.zeros(STRETCHES)
        return [Seen(none, none, 0.0, 0.0)] * n_rows
    arrival_s = arrived.requests.arrival_s[row, column]
    ttft_s = run.first_s[row, place] - arrival_s + beyond_iterations_s(setting.fleet, setting.assumptions)[k]
    limit_s = (
        float(setting.slo.ttft_p99_s) + float(setting.slo.ttft_s_per_token) * arrived.routed.prompt_tokens[row, column]
    )
    start_s, end_s = arrived.window_s[row].T
    counted = arrival_s >= start_s
    stretch = np.minimum((arrival_s - start_s) / (end_s - start_s) * STRETCHES, STRETCHES - 1)
    code = row * STRETCHES + np.where(counted, stretch, 0).astype(int)

    def count(mask: np.ndarray) -> np.ndarray:
        return np.bincount(code[mask], minlength=n_rows * STRETCHES).reshape(n_rows, STRETCHES).astype(float)

    met, of = count(counted & (ttft_s <= limit_s)), count(counted)
    gaps_s, gaps = run.tally.gaps_s.sum(axis=1), run.tally.gaps.sum(axis=1)
    return [Seen(met[r], of[r], float(gaps_s[r]), float(gaps[r])) for r in range(n_rows)]


@dataclass
class Rooms:
    """Shapes that programs were compiled for."""

    known: list[Room] = field(default_factory=list)
    compiled: set[Room] = field(default_factory=set)

    def is_new(self, room: Room) -> bool:
        """Whether nothing has run in it, until now."""
        new = room not in self.compiled
        self.compiled.add(room)
        return new

    def enough(self, n_instances: int, n_slots: int, n_requests: int) -> Room:
        """The smallest known one with room for so many that is not much too large, or a new one."""
        fits = [
            room
            for room in self.known
            if room.n_instances >= n_instances
            and room.n_slots >= n_slots
            and room.n_requests >= n_requests
            and room.size <= max(WIDER * n_instances * n_slots, LEAST_SIZE)
        ]
        if fits:
            return min(fits, key=lambda room: room.size)
        slots = rounded(max(n_slots, LEAST_SLOTS))
        instances = max(rounded(math.ceil(HEADROOM * n_instances)), LEAST_SIZE // slots)
        new = Room(instances, slots, 1 << (n_requests - 1).bit_length())
        self.known.append(new)
        return new


def rounded(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    unit = 1 << max((n - 1).bit_length() - 1, 0)
    return next(each for each in (unit, unit * 3 // 2, unit * 2) if each >= n)


class Trials:
    """The pools of one layout, each with whatever number of instances; replications are simulated once each."""

    def __init__(
        self,
        setting: Setting,
        n_requests: int,
        requests: Requests | None,
        rooms: Rooms,
        progress: StageProgress | None = None,
    ):
        self.setting, self._rooms, self._progress = setting, rooms, progress
        self._n, self._given = n_requests, requests
        self._arrived: dict[int, Arrived] = {}
        self._seen: dict[tuple[int, int, int], Seen] = {}  # by pool, instances and replication
        self._slots = [slots_for(setting, k) for k in range(len(setting.fleet.lanes))]

    def serves_all(self) -> bool:
        """Whether some pool takes every request."""
        return bool(np.all(self._arrival(0).routed.pool >= 0))

    def run(self, wanted: Sequence[tuple[int, int]], n_replications: int) -> None:
        """Pools with numbers of instances, in so many replications; those that ran are kept."""
        tasks = [(k, n, r) for k, n in wanted for r in range(n_replications) if (k, n, r) not in self._seen]
        arrived = [self._arrival(r) for _, _, r in tasks]
        rooms = [self._room(k, n, each) for (k, n, _), each in zip(tasks, arrived, strict=True)]

        def one(i: int) -> tuple[Seen, int]:
            (k, n, _), at = tasks[i], arrived[i]
            run = run_alone(self.setting, at, k, n, room=rooms[i])
            return seen_of(self.setting, at, k, run)[0], run.n_slots if run else 0

        for i, (found, n_slots) in self._each(one, rooms, lambda i: f"pool {tasks[i][0] + 1} with {tasks[i][1]}"):
            self._seen[tasks[i]] = found
            if n_slots > rooms[i].n_slots:
                self._slots[tasks[i][0]] = max(self._slots[tasks[i][0]], n_slots)

    def of(self, k: int, n: int, n_replications: int) -> list[Seen]:
        """What replications said that have run."""
        return [self._seen[k, n, r] for r in range(n_replications)]

    def whole(self, setting: Setting, first: int, n_replications: int) -> list[Batch]:
        """The fleet of `setting`, which is this layout's, in some replications."""
        counts = [n_whole(lane) for lane in setting.fleet.lanes]
        numbers = range(first, first + n_replications)
        tasks = [(k, r) for r in numbers for k in range(len(counts))]
        rooms = [self._room(k, counts[k], self._arrival(r)) for k, r in tasks]

        def one(i: int) -> PoolRun | None:
            k, r = tasks[i]
            return run_alone(setting, self._arrival(r), k, counts[k], room=rooms[i])

        runs = {tasks[i]: run for i, run in self._each(one, rooms, lambda i: "the best fleet")}
        return [gather(setting, self._arrival(r), [runs[k, r] for k in range(len(counts))]) for r in numbers]

    def _each(
        self, task: Callable[[int], T], rooms: Sequence[Room], what: Callable[[int], str]
    ) -> Iterator[tuple[int, T]]:
        """(i, what a task says of it) of the first that runs in each room, which compiles, and then of the others."""
        new = {room: i for i, room in reversed(list(enumerate(rooms))) if self._rooms.is_new(room)}
        first = sorted(new.values())
        others = [i for i in range(len(rooms)) if i not in first]
        done = 0
        for part in (first, others):
            for i, found in zip(part, in_threads(task, part), strict=True):
                done += 1
                if self._progress:
                    self._progress(what(i), done / len(rooms))
                yield i, found

    def _arrival(self, r: int) -> Arrived:
        """Replication r as the pools get it."""
        if r not in self._arrived:
            of = self.setting
            drawn = (
                draw_requests(of.workload, of.assumptions, self._n, 1, of.balancer.seed, r)
                if self._given is None
                else self._given.rows(r, 1)
            )
            self._arrived[r] = arrive(of, drawn, r)
        return self._arrived[r]

    def _room(self, k: int, n_instances: int, arrived: Arrived) -> Room:
        most = arrived.requests.arrival_s.shape[1]
        return self._rooms.enough(n_instances, self._slots[k], most)
