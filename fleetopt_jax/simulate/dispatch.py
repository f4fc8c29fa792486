"""Which of a pool's instances gets a request, and its place in that instance's queue."""

from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fleetopt_jax.simulate.batching import State

Policy = Literal["jsq", "round_robin", "random"]


def dispatch(state: State, requests: Array, rank: Array, now_s: Array, n_instances: Array, policy: Policy, keys: Array):
    """Append `requests` [G, A] (numbers in order of arrival; nobody's where fewer) to the queues of their group.

    `rank` [G] counts the requests dispatched before, `now_s` [G] is the moment whose queues the router knows, `keys`
    [G] are of random numbers; only the first `n_instances` of a group are in service. Join-the-shortest-queue counts
    everybody an instance has, and what is sent in the same call: the shortest first, ties at random.
    """
    choose = {"jsq": _shortest, "round_robin": _in_turn, "random": _at_random}[policy]
    n_groups, n_sent = requests.shape
    n_per_group = len(state.instances.clock_s) // n_groups
    chosen = choose(state, n_groups, n_sent, rank, now_s, n_instances, keys)
    return _append(state, requests, chosen + n_per_group * jnp.arange(n_groups)[:, None])


def _shortest(state: State, n_groups: int, n_sent: int, rank, now_s: Array, n_instances: Array, keys: Array) -> Array:
    instances = state.instances
    clock_s, known = (x.reshape(n_groups, -1) for x in (instances.clock_s, instances.n_waiting + instances.n_running))
    # An iteration that ends after `now_s` has already been computed: whom it ends are still there.
    known = known + jnp.where(clock_s > now_s[:, None], instances.just_finished.reshape(n_groups, -1), 0)
    known = jnp.where(jnp.arange(known.shape[1]) < n_instances, known, jnp.iinfo(jnp.int32).max // 4)
    ties = jax.vmap(lambda key: jax.random.uniform(key, known.shape[1:]))(keys)
    order = jnp.argsort(known + ties, axis=1)
    lengths = jnp.take_along_axis(known, order, axis=1).astype(int)
    # Before the k-th queue is as long as the others, k l_k - (l_0 + ... + l_{k - 1}) requests go to the shorter ones.
    k = jnp.arange(known.shape[1])
    filled = k * lengths - (jnp.cumsum(lengths, axis=1) - lengths)
    sent = jnp.arange(n_sent)
    level = jax.vmap(lambda row: jnp.searchsorted(row, sent, side="right") - 1)(filled)
    place = (sent - jnp.take_along_axis(filled, level, axis=1)) % (level + 1)
    return jnp.take_along_axis(order, place, axis=1)


def _in_turn(state: State, n_groups: int, n_sent: int, rank: Array, now_s, n_instances: Array, keys) -> Array:
    return (rank[:, None] + jnp.arange(n_sent)) % n_instances


def _at_random(state: State, n_groups: int, n_sent: int, rank, now_s, n_instances: Array, keys: Array) -> Array:
    return jax.vmap(lambda key: jax.random.randint(key, (n_sent,), 0, n_instances))(keys)


def _append(state: State, requests: Array, chosen: Array) -> State:
    """Link `requests` [G, A] behind the queues of the instances `chosen` [G, A], in their order."""
    queues, instances = state.queues, state.instances
    n, nobody = len(instances.clock_s), queues.next.shape[0] - 1
    request = requests.ravel()
    instance = jnp.where(request == nobody, n, chosen.ravel())  # n is out of range: dropped
    order = jnp.argsort(instance, stable=True)
    request, instance = request[order], instance[order]
    same_as_next = jnp.append(instance[1:] == instance[:-1], False)
    leads = ~jnp.append(False, same_as_next[:-1])
    queue_next = queues.next.at[request].set(jnp.where(same_as_next, jnp.roll(request, -1), nobody))
    # The first of an instance's requests goes behind its tail, or becomes its head.
    empty = instances.n_waiting[jnp.minimum(instance, n - 1)] == 0
    tail = instances.tail[jnp.minimum(instance, n - 1)]
    queue_next = queue_next.at[jnp.where(leads & ~empty & (instance < n), tail, nobody)].set(request)
    queue_next = queue_next.at[nobody].set(nobody)
    wait_s = (
        jnp.zeros(n)
        .at[instance]
        .add(instances.clock_s[jnp.minimum(instance, n - 1)] - queues.arrival_s[request], mode="drop")
    )  # what passed before an instance counts its queue, negative for those who come later
    return replace(
        state,
        queues=replace(queues, next=queue_next),
        instances=replace(
            instances,
            head=instances.head.at[jnp.where(leads & empty, instance, n)].set(request, mode="drop"),
            tail=instances.tail.at[jnp.where(same_as_next, n, instance)].set(request, mode="drop"),
            n_waiting=instances.n_waiting.at[instance].add(1, mode="drop"),
        ),
        tally=state.tally._replace(path_in_system_s=state.tally.path_in_system_s + wait_s),
    )
