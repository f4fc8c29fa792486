"""Instances that fail while they are simulated: when, which, and what becomes of their requests.

GPUs and nodes are up and down in turn, for exponential times of their means, and begin as they are in the long run.
Instances fill one node after the other; one is down while any of its GPUs or of its nodes is. A router learns of it
with the next request that it sends, and then sends to what is up; requests on an instance that dies, waiting or in
flight, are sent again, to begin anew: their time to first token counts from when they first came to when that answer
began that was not broken off. An iteration that was going on is let end. What is down draws nothing, and comes back
empty.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import jax
import numpy as np

from fleetopt_jax._simulate.state import NEVER, State
from fleetopt_jax.core.units import HOUR_S
from fleetopt_jax.fleet.reserve import Failures


class Outage(NamedTuple):
    """One instance of one replication is down from a moment to another."""

    replication: int
    instance: int
    from_s: float
    until_s: float


@dataclass(frozen=True)
class Outages:
    """All of a pool's, of any replications."""

    each: tuple[Outage, ...]

    def rows(self, first: int, n: int) -> "Outages":
        """Those of n replications, numbered from 0."""
        inside = (one for one in self.each if first <= one.replication < first + n)
        return Outages(tuple(one._replace(replication=one.replication - first) for one in inside))

    def up_frac(self, window_s: np.ndarray, n_instances: int) -> float:
        """Share of the instances' time in the windows [R, 2] in which they are up."""
        whole_s = n_instances * float(np.sum(window_s[:, 1] - window_s[:, 0]))
        down_s = sum(
            max(min(one.until_s, window_s[one.replication, 1]) - max(one.from_s, window_s[one.replication, 0]), 0.0)
            for one in self.each
        )
        return 1.0 - float(down_s) / whole_s

    def down_until(self, replication: int, n_instances: int, now_s: float) -> np.ndarray:
        """When each instance that is down comes back [N]; 0 of one that is up."""
        of, instance, from_s, until_s = self._columns
        now = (of == replication) & (from_s <= now_s) & (now_s < until_s)
        found = np.zeros(n_instances)
        found[instance[now].astype(int)] = until_s[now]
        return found

    @cached_property
    def _columns(self) -> np.ndarray:
        return np.array(self.each, float).reshape(-1, 4).T


def draw_outages(
    failures: Failures, n_instances: int, gpus_per_instance: int, horizon_s: np.ndarray, seed: int, first: int = 0
) -> Outages:
    """The outages of a pool in replications that last `horizon_s` [R], of which the first has the number `first`."""
    on_node = failures.instances_on_node(gpus_per_instance)
    nodes_each = max(1, -(-gpus_per_instance // failures.gpus_per_node))
    found = []
    for r, end_s in enumerate(horizon_s):
        rng = np.random.default_rng([seed, first + r, n_instances])
        of_nodes = [
            _down(rng, failures.node_mtbf_h, failures.repair_h, end_s)
            for _ in range(-(-n_instances // on_node) * nodes_each)
        ]
        for i in range(n_instances):
            node = i // on_node * nodes_each
            parts = [*of_nodes[node : node + nodes_each]]
            parts += [_down(rng, failures.gpu_mtbf_h, failures.repair_h, end_s) for _ in range(gpus_per_instance)]
            found += [Outage(r, i, *span) for span in merged([span for part in parts for span in part])]
    return Outages(tuple(found))


def _down(rng: np.random.Generator, mtbf_h: float, repair_h: float, end_s: float) -> list[tuple[float, float]]:
    """When one thing is down, from 0 to `end_s`; what is left of the time it begins in is exponential as well."""
    if not np.isfinite(mtbf_h) or repair_h == 0.0:
        return []
    up_s, down_s = mtbf_h * HOUR_S, repair_h * HOUR_S
    is_down, now_s, spans = rng.random() < down_s / (up_s + down_s), 0.0, []
    while now_s < end_s:
        lasts_s = rng.exponential(down_s if is_down else up_s)
        if is_down:
            spans.append((now_s, now_s + lasts_s))
        is_down, now_s = not is_down, now_s + lasts_s
    return spans


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of spans of time, in order."""
    found: list[tuple[float, float]] = []
    for start_s, end_s in sorted(spans):
        if found and start_s <= found[-1][1]:
            found[-1] = found[-1][0], max(end_s, found[-1][1])
        else:
            found.append((start_s, end_s))
    return found


@dataclass(frozen=True)
class Standing:
    """Which instances of each replication are down, from one dispatch to another."""

    first: int  # dispatch
    last: int  # the first after it
    until_s: np.ndarray  # when each comes back; 0 of one that is up, inf of one that is not in service [R, N]

    @property
    def down(self) -> np.ndarray:
        """[R, N]"""
        return self.until_s > 0.0

    @property
    def order(self) -> np.ndarray:
        """Instances that are up before those that are down, of which the first to come back is first [R, N]."""
        return np.argsort(self.until_s, axis=1, kind="stable")

    @property
    def n_up(self) -> np.ndarray:
        """At least one, to whom is sent what nobody can serve now [R]."""
        return np.maximum(np.sum(~self.down, axis=1), 1)


def standings(outages: Outages, now_s: np.ndarray, serves: np.ndarray) -> list[Standing]:
    """The stretches of the dispatches at `now_s` [T, R] in which nothing fails and nothing comes back; `serves` [N]
    are the instances in service."""
    changes = {0, len(now_s)}
    for one in outages.each:
        times = now_s[:, one.replication]
        changes |= {int(np.searchsorted(times, one.from_s)), int(np.searchsorted(times, one.until_s))}
    found = []
    for first, last in pairwise(sorted(changes)):
        until_s = [outages.down_until(r, len(serves), float(now_s[first, r])) for r in range(now_s.shape[1])]
        found.append(Standing(first, last, np.where(serves, np.stack(until_s), np.inf)))
    return found


def failed(
    state: State, dies: np.ndarray, until_s: np.ndarray, whole: tuple[np.ndarray, np.ndarray]
) -> tuple[State, np.ndarray]:
    """(the state without what was on the instances that die [I] and come back at `until_s` [I], the requests that were
    there). `whole` are the prompts and outputs of all requests as they came."""
    state = jax.tree.map(np.array, state)
    table, slots, instances = state.table, state.slots, state.instances
    at = np.flatnonzero(dies)
    request, there = slots.request[at], slots.left[at] > 0
    ended = request[~there]
    table.first_s[ended], table.last_s[ended] = slots.first_s[at][~there], slots.last_s[at][~there]
    following, heads, waiting = (np.asarray(x) for x in (table.next, instances.head, instances.n_waiting))
    lost = [request[there], *(_queue(following, int(heads[i]), int(waiting[i])) for i in at)]
    again = np.concatenate(lost).astype(np.int32)
    for column, as_it_came in zip((table.prompt_tokens, table.output_tokens), whole, strict=True):
        column[again] = as_it_came[again]
    table.next[again] = table.nobody
    for column in (table.admit_s, table.first_s, table.last_s):
        column[again] = column[table.nobody] = NEVER
    for name, values in vars(slots).items():
        values[at] = {"request": table.nobody, "first_s": NEVER, "last_s": NEVER}.get(name, 0)
    for name, values in vars(instances).items():
        values[at] = table.nobody if name in ("head", "tail") else 0
    instances.clock_s[at] = until_s[at]
    return replace(state, table=table), again


def _queue(following: np.ndarray, head: int, n_waiting: int) -> np.ndarray:
    """Who waits, in order."""
    found = np.empty(n_waiting, np.int32)
    for k in range(n_waiting):
        found[k], head = head, following[head]
    return found
