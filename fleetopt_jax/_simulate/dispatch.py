"""The queues as a dispatcher knows them, and requests linked behind those of the instances it chooses."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax._simulate.state import State
from fleetopt_jax.fleet.choices.dispatch import STALENESS_S, Dispatch, Queues, ShortestQueue

LONGEST = np.iinfo(np.int32).max // 4  # a queue that nobody is sent to


@dataclass(frozen=True)
class Balancer:
    """How the requests of a pool come to its instances. It knows the queues as they were up to `staleness_s` ago."""

    policy: Dispatch = ShortestQueue()
    staleness_s: float = STALENESS_S
    seed: int = 0
    first_replication: int = 0  # of those that run together: each has random numbers of its own


class Up(NamedTuple):
    """Which instances of each group are up; JAX's or NumPy's."""

    down: Any  # [G, N]
    order: Any  # those that are up first [G, N]
    n_up: Any  # at least one [G]


def dispatch(
    state: State,
    requests: Array,
    policy: Dispatch,
    *,
    rank: Array,
    now_s: Array,
    keys: Array,
    n_instances: ArrayLike,
    up: "Up | None" = None,
) -> State:
    """Append `requests` [G, A] (numbers in order of arrival; nobody's where fewer) to the queues of their group.

    `rank` [G] counts the requests dispatched before, `now_s` [G] is the moment whose queues are known, `keys` [G] are
    of random numbers; only the first `n_instances` of a group are in service. Where some of them are down, what the
    policy sends there goes to those that are `up`, in turn.
    """
    n_groups, n_sent = requests.shape
    n_per_group = len(state.instances.clock_s) // n_groups
    home = None if state.kept is None else state.kept.home[requests]
    lengths = _lengths(state, now_s)
    lengths = lengths if up is None else jnp.where(up.down, LONGEST, lengths)
    chosen = policy.choose(Queues(lengths, rank, keys, jnp.asarray(n_instances), home), n_sent)
    if up is not None:
        instead = (rank[:, None] + jnp.arange(n_sent)) % up.n_up[:, None]
        is_down = jnp.take_along_axis(up.down, chosen, axis=1)
        chosen = jnp.where(is_down, jnp.take_along_axis(up.order, instead, axis=1), chosen)
    return _append(state, requests, chosen + n_per_group * jnp.arange(n_groups)[:, None])


def _lengths(state: State, now_s: Array) -> Array:
    """Requests each instance had at `now_s` [G], waiting and running [G, N]."""
    instances, n_groups = state.instances, len(now_s)
    clock_s, known = (x.reshape(n_groups, -1) for x in (instances.clock_s, instances.n_waiting + instances.n_running))
    # An iteration that ends after `now_s` has already been computed: whom it ends are still there.
    return known + jnp.where(clock_s > now_s[:, None], instances.just_finished.reshape(n_groups, -1), 0)


def _append(state: State, requests: Array, chosen: Array) -> State:
    """Link `requests` [G, A] behind the queues of the instances `chosen` [G, A], in their order."""
    table, instances = state.table, state.instances
    n, nobody = len(instances.clock_s), table.nobody
    request = requests.ravel()
    instance = jnp.where(request == nobody, n, chosen.ravel())  # n is out of range: dropped
    order = jnp.argsort(instance, stable=True)
    request, instance = request[order], instance[order]
    same_as_next = jnp.append(instance[1:] == instance[:-1], False)
    leads = ~jnp.append(False, same_as_next[:-1])
    behind = table.next.at[request].set(jnp.where(same_as_next, jnp.roll(request, -1), nobody))
    # The first of an instance's requests goes behind its tail, or becomes its head.
    empty = instances.n_waiting[jnp.minimum(instance, n - 1)] == 0
    tail = instances.tail[jnp.minimum(instance, n - 1)]
    behind = behind.at[jnp.where(leads & ~empty & (instance < n), tail, nobody)].set(request)
    behind = behind.at[nobody].set(nobody)
    wait_s = (
        jnp.zeros(n)
        .at[instance]
        .add(instances.clock_s[jnp.minimum(instance, n - 1)] - table.arrival_s[request], mode="drop")
    )  # what passed before an instance counts its queue, negative for those who come later
    return replace(
        state,
        table=replace(table, next=behind),
        instances=replace(
            instances,
            head=instances.head.at[jnp.where(leads & empty, instance, n)].set(request, mode="drop"),
            tail=instances.tail.at[jnp.where(same_as_next, n, instance)].set(request, mode="drop"),
            n_waiting=instances.n_waiting.at[instance].add(1, mode="drop"),
        ),
        tally=state.tally._replace(path_in_system_s=state.tally.path_in_system_s + wait_s),
    )
