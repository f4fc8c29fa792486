"""Seconds that GPUs of one instance spend on passing data to one another.

    t = 1 / (1 / t_direct^r + 1 / t_ring^r)^(1/r),     r = 4
    t_direct = launch_direct + per_gpu (n - 2) + sent_direct / (efficiency_direct link) (n / 2)^sharing
    t_ring   = launch_ring   + per_gpu (n - 2) + sent_ring   / (efficiency_ring   link) (n / 2)^sharing

An engine has several ways to do the same and takes the shorter by the size of the message, which the formula does
smoothly: quick to begin (one shot: every GPU reads from all others) or quick in bytes (two shots, NCCL's rings and
trees, switches that add). `sent` is what a GPU passes on: of a message of B bytes, (n - 1) B in an all-reduce in one
shot and 2 (n - 1) / n B in a ring, (n - 1) / n B in the other collectives. `sharing` is 0 on NVLink; on PCIe the GPUs
share the way through their host.

Over more GPUs than one link joins, the message goes over the link inside a node and over the network between nodes,
one after the other: projected (`NETWORK_HOP_S`, `NETWORK_EFFICIENCY`), measured nowhere here. So are instances of more
than 8 GPUs (4 on GB200 and GB300) inside one link.

Source: kernel timings of ai-dynamo/aiconfigurator (095f58a, Apache-2.0): all-reduces as vLLM does them in a CUDA graph,
and NCCL's collectives, which those tables hold as the median over all-gather, all-reduce, all-to-all and
reduce-scatter, without their names: the law serves the three that send equal bytes. 2 to 8 GPUs, 2 KiB to 512 MiB.

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
    sharing: Array  # power of the GPUs by which each one's share of the link shrinks; 0 on NVLink [-]


def make_collective_law(
    *,
    direct_launch_s: float,
    ring_launch_s: float,
    per_gpu_s: float,
    direct_efficiency: float,
    ring_efficiency: float,
    sharing: float = 0.0,
) -> CollectiveLaw:
    """A checked `CollectiveLaw`."""
    values = dict(locals())
    may_be_zero = ("per_gpu_s", "sharing")
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
    near_s = _link_s(law, gpu, (local - 1.0) * message_bytes, 2.0 * _others(local) * message_bytes, local)
    far_s = _network_s(gpu, 2.0 * _others(nodes) * message_bytes / local, 2.0 * xp.log2(nodes))
    return near_s + far_s


def all_gather_s(law: CollectiveLaw, gpu: Gpu, message_bytes: ArrayLike, n_gpus: ArrayLike) -> Array:
    """Time until each of `n_gpus` has all of a message of `message_bytes` that lies in equal parts on them [s].

    A reduce-scatter takes as long: the same bytes the other way.
    """
    xp = namespace(law, gpu, message_bytes, n_gpus)
    local, nodes = _local_and_nodes(gpu, n_gpus)
    sent_bytes = _others(local) * message_bytes
    near_s = _link_s(law, gpu, sent_bytes, sent_bytes, local)
    far_s = _network_s(gpu, _others(nodes) * message_bytes / local, xp.log2(nodes))
    return near_s + far_s


def all_to_all_s(law: CollectiveLaw, gpu: Gpu, message_bytes: ArrayLike, n_gpus: ArrayLike) -> Array:
    """Time until each of `n_gpus` has passed an equal part of its own `message_bytes` to each [s]; one part stays.

    Dispatch and combine of experts: tokens of this GPU x experts a token x hidden size x bytes.
    """
    xp = namespace(law, gpu, message_bytes, n_gpus)
    local, nodes = _local_and_nodes(gpu, n_gpus)
    sent_bytes = _others(local) / nodes * message_bytes
    near_s = _link_s(law, gpu, sent_bytes, sent_bytes, local)
    far_s = _network_s(gpu, _others(nodes) * message_bytes, xp.log2(nodes))
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


def _link_s(law: CollectiveLaw, gpu: Gpu, direct_bytes: Array, ring_bytes: Array, n_gpus: Array) -> Array:
    """Time over the link of a GPU that sends as many bytes, by the shorter way [s]; 0 for one GPU."""
    xp = namespace(law, gpu, direct_bytes, ring_bytes, n_gpus)
    several = xp.maximum(n_gpus, 2.0)
    wait_s = law.per_gpu_s * (several - 2.0)
    byte_s = (several / 2.0) ** law.sharing / gpu.link_bytes_per_s
    direct_s = law.direct_launch_s + wait_s + direct_bytes * byte_s / law.direct_efficiency
    ring_s = law.ring_launch_s + wait_s + ring_bytes * byte_s / law.ring_efficiency
    shorter_s = direct_s * (1.0 + (direct_s / ring_s) ** SHARPNESS) ** (-1.0 / SHARPNESS)
    return xp.where(xp.greater(n_gpus, 1.0), shorter_s, 0.0)


def _network_s(gpu: Gpu, sent_bytes: Array, hops: Array) -> Array:
    """Time over the network [s]; 0 inside a node, where there is neither traffic nor a hop."""
    return NETWORK_HOP_S * hops + sent_bytes / (NETWORK_EFFICIENCY * gpu.inter_node_bytes_per_s)
