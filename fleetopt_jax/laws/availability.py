"""Availability: how often GPUs, nodes and instances are up, and how many of a pool's instances are down at once.

Symbols: g = GPUs of an instance, G = GPUs of a node, a = share of the time that something is up.

    a = MTBF / (MTBF + MTTR)                    of what fails and is repaired in turn, in the long run
    a_i = a_gpu^g a_node^(b - 1)                of an instance on b = ceil(g / G) nodes, given that its first node is up
    node of m = max(1, floor(G / g)) instances: with probability a_node Binomial(m, 1 - a_i) are down, else all m
    pool: instances fill one node after the other, so that its distribution is the convolution of its nodes'

A GPU failure takes its instance, a node failure all instances on its GPUs; an instance over several nodes dies with any
of them, and no other instance is on these. Failures of GPUs and of nodes are independent of each other, and what is
down draws on no common repair crew: exact under these assumptions, whatever the distributions of up and repair times
(the long-run share of an alternating renewal process depends on their means alone). What they leave out, a rack's power
or a switch that takes many nodes, a bug that takes all, makes failures come together more often than said here.

Sources: S. M. Ross, Introduction to Probability Models, sec. 7.5.1 (alternating renewal processes) for a. Rates: The
Llama 3 Herd of Models (arXiv 2407.21783), table 5: 419 unexpected interruptions in 54 days of 16,384 H100 in 2,048
nodes. 268 of them are of GPUs (faulty GPU 148, HBM3 72, SRAM 19, system processor 17, silent data corruption 6, thermal
interface and sensor 6), 88 of nodes (network switch or cable 35, host maintenance 32, NIC 7, SSD 3, power supply 3,
chassis 2, IO board 2, CPU 2, system memory 2); 63 are of software or unknown and count for neither. One training run
under full load on hardware a year old: yours may be off by a factor of two either way. How long a repair takes depends
on who repairs, and has no default anywhere here.
"""

from typing import cast

import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace

GPUS_PER_NODE = 8  # HGX and DGX boards; hosts of a GB200 or GB300 rack have 4
_RUN_H = 54 * 24
GPU_MTBF_H = 16_384 * _RUN_H / 268  # 79,000 h: one GPU in nine fails in a year
NODE_MTBF_H = 2_048 * _RUN_H / 88  # 30,000 h, beside its GPUs
MOST_INSTANCES = 4096  # of a pool, that `most_down` is tabulated to
MOST_DOWN = 1024  # of them, whose probabilities are computed


def availability(mtbf_h: ArrayLike, repair_h: ArrayLike) -> Array:
    """Share of the time that something is up, a = MTBF / (MTBF + MTTR) [-]; 1 where it never fails (inf).

    Any common shape; mtbf_h > 0 [h], repair_h >= 0 [h]. Differentiable in both. Source: see the file.
    """
    xp = namespace(mtbf_h, repair_h)
    return cast(Array, 1.0 / (1.0 + repair_h / xp.asarray(mtbf_h, dtype=float)))


def instances_on_node(gpus_per_instance: ArrayLike, gpus_per_node: ArrayLike) -> Array:
    """m, the instances that a node holds [-]; 1 where one takes more than a node. Any common shape."""
    xp = namespace(gpus_per_instance, gpus_per_node)
    return xp.maximum(1.0, xp.floor(gpus_per_node / xp.asarray(gpus_per_instance, dtype=float) + 1e-9))


def instance_availability(
    gpu_up: ArrayLike, node_up: ArrayLike, gpus_per_instance: ArrayLike, gpus_per_node: ArrayLike
) -> Array:
    """a_i: share of the time that an instance is up while its first node is [-]: all its GPUs, and its other nodes.

    Any common shape. Differentiable in `gpu_up` and `node_up`.
    """
    xp = namespace(gpu_up, node_up, gpus_per_instance, gpus_per_node)
    n_nodes = xp.maximum(1.0, xp.ceil(xp.asarray(gpus_per_instance, dtype=float) / gpus_per_node - 1e-9))
    return cast(Array, xp.asarray(gpu_up) ** gpus_per_instance * xp.asarray(node_up) ** (n_nodes - 1.0))


def node_down_pmf(n_on_node: int, instance_up: ArrayLike, node_up: ArrayLike) -> Array:
    """P(0, 1, ... m of the instances of one node are down) [m + 1]: binomial while the node is up, all while it is not.

    `instance_up` and `node_up` [-] of shape (); differentiable in both.
    """
    xp = namespace(instance_up, node_up)
    of_one = xp.stack([xp.asarray(instance_up, dtype=float), 1.0 - xp.asarray(instance_up, dtype=float)])
    pmf = xp.ones(1)
    for _ in range(n_on_node):
        pmf = xp.convolve(pmf, of_one)
    all_down = (xp.arange(n_on_node + 1) == n_on_node) * 1.0
    return cast(Array, node_up * pmf + (1.0 - xp.asarray(node_up)) * all_down)


def down_pmf(n_instances: int, n_on_node: int, instance_up: ArrayLike, node_up: ArrayLike) -> Array:
    """P(0, 1, ... n of a pool's instances are down) [n + 1], by exact convolution of its nodes, the last with the rest.

    Differentiable in `instance_up` and `node_up`, of shape (); costs n^2 operations.
    """
    xp = namespace(instance_up, node_up)
    n_full, rest = divmod(n_instances, n_on_node)
    pmf = node_down_pmf(rest, instance_up, node_up) if rest else xp.ones(1)
    power, of_node = n_full, node_down_pmf(n_on_node, instance_up, node_up)
    while power:  # of_node convolved with itself n_full times, by squaring
        pmf = xp.convolve(pmf, of_node) if power % 2 else pmf
        power //= 2
        of_node = xp.convolve(of_node, of_node) if power else of_node
    return cast(Array, pmf)


def most_down(target: float, n_on_node: int, instance_up: float, node_up: float, n: int = MOST_INSTANCES) -> np.ndarray:
    """The least d with P(at most d of N instances are down) >= target, for N = 0, 1, ... n [n + 1]: NumPy's.

    N where no fewer than all will do. Both d and N - d rise with N: more instances are never worse. Nodes are added one
    by one to a distribution that is cut behind `MOST_DOWN`, which leaves what is before exact.
    """
    size = min(n, MOST_DOWN) + 1
    partial = [np.asarray(node_down_pmf(rest, instance_up, node_up)) for rest in range(1, n_on_node + 1)]
    found, full = np.zeros(n + 1), np.ones(1)
    for first in range(0, n, n_on_node):
        for rest, of_node in enumerate(partial, start=1):
            if first + rest > n:
                break
            pmf = np.convolve(full, of_node)[:size]
            d = int(np.searchsorted(np.cumsum(pmf), target))
            found[first + rest] = d if d < len(pmf) else first + rest
        full = np.convolve(full, partial[-1])[:size]
    return np.minimum(found, np.arange(n + 1.0))
