"""A lane of two stages, request by request: prefill instances, the way over, decode instances.

The first stage runs as any pool does, each request for one token: the iteration in which its prompt ends. Then its KV
cache waits for one of the stage's ports, first come first served, and is handed over; the second stage gets the
requests as their caches arrive, decodes whoever has a slot, and prefills nothing. Neither knows the other's queues.

What is not simulated: that prompts are held until they are handed over (the laws count it as load), that a port is one
instance's own, and that a sequence which a full cache has preempted must be prefilled again: it goes on as it was.
"""

import heapq
from dataclasses import replace

import numpy as np

from fleetopt_jax._simulate.dispatch import Balancer
from fleetopt_jax._simulate.pool import Pool, PoolRequests, PoolRun, run_pool
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.laws.hand_over import HandOver

SECOND = 1_000_003  # seeds of the second stage are so much further


def run_staged(
    pools: tuple[Pool, Pool],
    hand_over: HandOver,
    requests: PoolRequests,
    horizon_s: np.ndarray,
    balancer: Balancer,
    *,
    n_slots: tuple[int, int],
    progress: Progress | None = None,
) -> PoolRun:
    """What became of the requests [R, m] of a lane, in their order; `before` is of the stage that prefilled them."""

    def half(first: int) -> Progress | None:
        if (whole := progress) is None:
            return None
        return lambda done, total: whole(done + first * total, 2 * total)

    once = replace(requests, output_tokens=np.minimum(requests.output_tokens, 1))
    before = run_pool(pools[0], once, horizon_s, balancer, n_slots=n_slots[0], progress=half(0))
    sends = pools[0].n_instances * round(float(hand_over.sends))
    ready_s = handed_over_s(before.first_s, requests.prompt_tokens, sends, hand_over)
    order = np.argsort(ready_s, axis=1, kind="stable")
    row = np.arange(len(ready_s))[:, None]
    there = np.isfinite(ready_s[row, order])
    prompt, output = (np.where(there, x[row, order], 0) for x in (requests.prompt_tokens, requests.output_tokens))
    second = replace(balancer, seed=balancer.seed + SECOND)
    decoded = run_pool(
        pools[1],
        PoolRequests(ready_s[row, order], prompt, output),
        horizon_s,
        second,
        n_slots=n_slots[1],
        progress=half(1),
    )
    back = np.argsort(order, axis=1)
    names = "admit_s", "first_s", "last_s"
    times: dict[str, np.ndarray] = {name: getattr(decoded, name)[row, back] for name in names}
    came = np.sum(np.isfinite(requests.arrival_s), axis=1)
    return replace(
        decoded,
        **times,
        in_system=came - np.sum(np.isfinite(times["last_s"]), axis=1),
        memory_bytes=max(before.memory_bytes, decoded.memory_bytes),
        before=before,
    )


def handed_over_s(done_s: np.ndarray, prompt_tokens: np.ndarray, n_ports: int, hand_over: HandOver) -> np.ndarray:
    """When caches that are `done_s` [R, m] have arrived, each by the first port that is free; inf stays inf."""
    takes_s = np.asarray(hand_over.sending_s(np.asarray(prompt_tokens, float)))
    latency_s = float(hand_over.latency_s)
    arrived_s = np.full(done_s.shape, np.inf)
    for r, row in enumerate(done_s):
        free_s = [0.0] * n_ports
        for i in np.argsort(row, kind="stable")[: np.sum(np.isfinite(row))]:
            sent_s = max(row[i], free_s[0]) + takes_s[r, i]
            heapq.heapreplace(free_s, sent_s)
            arrived_s[r, i] = sent_s + latency_s
    return arrived_s
