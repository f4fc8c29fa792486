"""Links that KV caches are handed over by, and pairs of engines that hand them over.

Bandwidths are the data sheets' of one direction, a link for each GPU, and latencies those of a message: what serving
engines take to notice, schedule and pack is not known here, nor counted. A link of one's own says what was measured.
"""

import math
from types import MappingProxyType

from fleetopt_jax.catalog.engines import build, resolved
from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.catalog.llms import at_precision, llm_entry
from fleetopt_jax.catalog.spec import EngineSpec, KvLink, TwoStageSpec
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.fleet.engine import EnginePair, Server
from fleetopt_jax.fleet.fleet import two_stages
from fleetopt_jax.laws.hand_over import HandOver, make_hand_over
from fleetopt_jax.laws.kv_cache import physical_kv

GB = 1e9
LINKS = MappingProxyType(
    {
        link.name: link
        for link in (
            # NVLink 4 of an H100: 900 GB/s in both directions (NVIDIA H100 data sheet); within a host or a rack.
            KvLink("nvlink", 450.0 * GB, 5e-6),
            # NDR: 400 Gbit/s a port, a ConnectX-7 for each GPU (NVIDIA DGX H100 user guide).
            KvLink("infiniband", 50.0 * GB, 5e-6),
            # 100 Gbit/s for each GPU (AWS p4d: 400 for 8; p5 has 3,200); a round trip of TCP in a data centre.
            KvLink("ethernet", 12.5 * GB, 50e-6),
        )
    }
)
DEFAULT_LINK = "infiniband"


def kv_link(asked: str, where: str = "kv_link") -> KvLink:
    """A link by its name, or one of one's own: 'GB/s for each GPU' or 'GB/s,latency in ms'.

    >>> fo.kv_link("25,0.5").latency_s
    0.0005
    """
    if asked in LINKS:
        return LINKS[asked]
    try:
        numbers = [float(part) for part in asked.split(",")]
    except ValueError:
        numbers = []
    if not (1 <= len(numbers) <= 2 and 0 < numbers[0] < math.inf and all(0 <= x < math.inf for x in numbers)):
        allowed = f"need {', '.join(LINKS)}, or GB/s for each GPU above 0 and a latency in ms, like 25,0.5"
        raise BadField(where, f"{asked!r}", allowed)
    return KvLink(asked, numbers[0] * GB, numbers[1] * 1e-3 if len(numbers) > 1 else 0.0)


def n_links(spec: EngineSpec) -> int:
    """Links that one request's cache can go by: the GPUs that have a part of it to themselves."""
    heads = llm_entry(spec.llm).architecture.kv_heads
    return int(min(spec.tp, heads)) * spec.pp


def hand_over_of(spec: EngineSpec, links: int, link: KvLink, *, sends: int = 1, receives: int = 1) -> HandOver:
    """The way of the caches that engines of this LLM and KV precision hold, over so many links."""
    spec = resolved(spec)
    architecture = llm_entry(spec.llm).architecture
    gpu = gpu_entry(spec.gpu)
    llm = at_precision(architecture, spec.precision or "", spec.kv_precision or "", gpu.formats)
    full_frac = max(1.0 - float(llm.windowed_frac), 1e-9)
    return make_hand_over(
        bytes_per_token=full_frac * float(llm.kv_bytes_per_token),
        fixed_tokens=float(physical_kv(gpu.gpu, llm, 1.0, 1.0).fixed_tokens),
        bytes_per_s=links * link.bytes_per_s,
        latency_s=link.latency_s,
        sends=sends,
        receives=receives,
    )


def build_pair(spec: TwoStageSpec) -> EnginePair:
    """The engines of a lane of two stages, and the way between them; `BadField` names what keeps them from it."""
    prefill, decode = (resolved(each) for each in spec.stages)
    for name, told in (("llm", "llm_name"), ("kv_precision", "kv_precision")):
        one, other = (getattr(each, told) for each in (prefill, decode))
        if one != other:
            raise BadField(name, f"{one!r} and {other!r}", "need the same of both stages: one hands its KV cache over")
    links = min(n_links(prefill), n_links(decode))
    way = hand_over_of(decode, links, spec.link, sends=prefill.dp, receives=decode.dp)
    return EnginePair(build(prefill), build(decode), way)


def server_of(spec: EngineSpec | TwoStageSpec) -> Server:
    """The engine of a lane's spec, or the pair of engines of its two stages."""
    return build_pair(spec) if isinstance(spec, TwoStageSpec) else build(spec)


def one_stage(spec: EngineSpec | TwoStageSpec) -> EngineSpec:
    """The spec of a lane that has one stage; refused, in one line, where it has two."""
    if isinstance(spec, TwoStageSpec):
        raise two_stages()
    return spec
