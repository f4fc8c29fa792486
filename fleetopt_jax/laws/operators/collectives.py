"""Seconds that GPUs of one instance spend on passing data to one another.

    t = 1 / (1 / t_direct^r + 1 / t_ring^r)^(1/r),     r = 4
    t_k = launch_k + per_gpu (n - 2) + sent_k / (efficiency_k link),     k = direct, ring

An engine has several ways to do the same and takes the shorter by the size of the message, which the formula does
smoothly: quick to begin (one shot: every GPU reads from all others) or quick in bytes (two shots, NCCL's rings and
trees, switches that add). `sent` is what a GPU passes on of a message of B bytes: in an all-reduce (n - 1) B in one
shot and (2 (n - 1) / n)^growth B in a ring, in the other collectives half of the latter. `growth` is 1 for a ring as
it is in books; less where switches add (Hopper, Blackwell), more on PCIe, where GPUs share the way through their host.

Over more GPUs than one link joins, the message goes over the link inside a node and over the network between nodes,
one after the other: projected (`NETWORK_HOP_S`, `NETWORK_EFFICIENCY`), measured nowhere here. So are instances of more
than 8 GPUs (4 on GB200 and GB300) inside one link.

Source: kernel timings of ai-dynamo/aiconfigurator (095f58a, Apache-2.0): all-reduces as vLLM does them in a CUDA graph,
and NCCL's collectives, which those tables hold as the median over all-gather, all-reduce, all-to-all and
reduce-scatter, without their names: the law serves the three that send equal bytes. 2 to 8 GPUs (4 on GB200 and
GB300), 2 KiB to 512 MiB, "left out" the median over every fifth size by a fit without it:

    error [%]       all-reduce               the others
    of rows     median   90 %  left out   median   90 %  left out
    a100           5.5   20.5     5.1      4.5   13.7     2.3
    h100           3.7   16.7     6.0      4.0   12.7     4.5
    h200           3.0   11.4     5.8      4.3   11.3     3.5
    b200           5.2   26.3     7.0      4.4   12.5     6.6
    b300           3.4   17.0     3.9      5.1   13.5     7.3
    gb200          3.1   19.2     3.8      3.8    9.7     5.1
    gb300          3.6   13.6     5.0      4.0   10.5     5.0
    l40s           1.3    7.0     1.7      3.0    7.5     4.9
    rtx-pro-6000   6.4   13.1     6.3      5.2   12.2     6.4

L40S: of two GPUs alone, for no GPU of its host could read another's memory; four and eight take 3 to 10 times what
the law says by RTX PRO 6000. Left out too: GB200, two GPUs, 8 MiB and more, a third of the bytes/s of GB300. Worst row
of the rest: 43 %, where an engine changes its way before or after it pays (8 MiB on A100; one stray row, 58 %).
"""

import math
from typing import cast

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.hardware import Gpu

SHARPNESS = 4.0  # r: the higher, the more abrupt the change from one way to the other [-]
NETWORK_HOP_S = 10e-6  # a message to another node and the wait for it: half of NCCL's 19 us over two (nccl-tests#150)
NETWORK_EFFICIENCY = 0.94  # of the network's bytes/s: 46 to 48 of 50 GB/s (nccl-tests#290)


@pytree
class CollectiveLaw:
    """Coefficients of one kind of collective on one GPU. Every field is traced; shape () or a leading vmap axis."""

    direct_launch_s: Array  # of the way that is quick to begin, with two GPUs [s]
    ring_launch_s: Array  # of the way that is quick in bytes, with two GPUs [s]
    per_gpu_s: Array  # for each further GPU to wait for [s]
    direct_efficiency: Array  # share of the link's bytes/s, of the way that is quick to begin [-]
    ring_efficiency: Array  # and of the other [-]
    growth: Array  # power of a ring's 2 (n - 1) / n by which the bytes grow with the GPUs [-]


def make_collective_law(
    *,
    direct_launch_s: float,
    ring_launch_s: float,
    per_gpu_s: float,
    direct_efficiency: float,
    ring_efficiency: float,
    growth: float = 1.0,
) -> CollectiveLaw:
    """A checked `CollectiveLaw`."""
    values = dict(locals())
    may_be_zero = ("per_gpu_s", "growth")
    for name, value in values.items():
        if not (math.isfinite(value) and (value >= 0 if name in may_be_zero else value > 0)):
            raise ValueError(f"need a positive, finite {name}, got {value}")
    return CollectiveLaw(**as_floats(**values))


def all_reduce_s(law: CollectiveLaw, gpu: Gpu, message_bytes: ArrayLike, n_gpus: ArrayLike) -> Array:
    """Time until each of `n_gpus` has the sum of all their messages of `message_bytes` [s]; 0 for one GPU.

    Rises with the message and with the GPUs. Tensor parallelism does two a layer, of rows x hidden size x 2 bytes.
    Between nodes, each GPU of a node reduces its part of the message with those of the other nodes.
    """
    xp = namespace(law, gpu, message_bytes, n_gpus)
    local, nodes = _local_and_nodes(gpu, n_gpus)
    near_s = _link_s(law, gpu, (local - 1.0) * message_bytes, _ring(law, local) * message_bytes, local)
    far_s = _network_s(gpu, 2.0 * _others(nodes) * message_bytes / local, 2.0 * xp.log2(nodes))
    return near_s + far_s


def all_gather_s(law: CollectiveLaw, gpu: Gpu, message_bytes: ArrayLike, n_gpus: ArrayLike) -> Array:
    """Time until each of `n_gpus` has all of a message of `message_bytes` that lies in equal parts on them [s].

    A reduce-scatter takes as long: the same bytes the other way.
    """
    xp = namespace(law, gpu, message_bytes, n_gpus)
    local, nodes = _local_and_nodes(gpu, n_gpus)
    sent_bytes = 0.5 * _ring(law, local) * message_bytes
    near_s = _link_s(law, gpu, sent_bytes, sent_bytes, local)
    far_s = _network_s(gpu, _others(nodes) * message_bytes / local, xp.log2(nodes))
    return near_s + far_s


def _local_and_nodes(gpu: Gpu, n_gpus: ArrayLike) -> tuple[Array, Array]:
    """GPUs that one link joins, and how many such groups there are; no fewer than one."""
    xp = namespace(gpu, n_gpus)
    n_gpus = xp.maximum(n_gpus, 1.0)
    local = xp.minimum(n_gpus, gpu.link_gpus)
    return local, n_gpus / local


def _others(n: Array) -> Array:
    """The share of a message that is not one's own."""
    return cast(Array, 1.0 - 1.0 / n)


def _ring(law: CollectiveLaw, n_gpus: Array) -> Array:
    """What a GPU sends of a message when all reduce it in a ring, in messages [-]; 1 for two GPUs."""
    xp = namespace(law, n_gpus)
    return cast(Array, (2.0 * _others(xp.maximum(n_gpus, 2.0))) ** law.growth)


def _link_s(law: CollectiveLaw, gpu: Gpu, direct_bytes: Array, ring_bytes: Array, n_gpus: Array) -> Array:
    """Time over the link of a GPU that sends as many bytes, by the shorter way [s]; 0 for one GPU."""
    xp = namespace(law, gpu, direct_bytes, ring_bytes, n_gpus)
    wait_s = law.per_gpu_s * xp.maximum(n_gpus - 2.0, 0.0)
    direct_s = law.direct_launch_s + wait_s + direct_bytes / (law.direct_efficiency * gpu.link_bytes_per_s)
    ring_s = law.ring_launch_s + wait_s + ring_bytes / (law.ring_efficiency * gpu.link_bytes_per_s)
    shorter_s = direct_s * (1.0 + (direct_s / ring_s) ** SHARPNESS) ** (-1.0 / SHARPNESS)
    return xp.where(xp.greater(n_gpus, 1.0), shorter_s, 0.0)


def _network_s(gpu: Gpu, sent_bytes: Array, hops: Array) -> Array:
    """Time over the network [s]; 0 inside a node, where there is neither traffic nor a hop."""
    return NETWORK_HOP_S * hops + sent_bytes / (NETWORK_EFFICIENCY * gpu.inter_node_bytes_per_s)
