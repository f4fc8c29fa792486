"""Which simplification each answer rests on: nine choices, two presets, any mixture; and three ways to serve.

Every choice is a frozen record with methods (`fleet/choices/`), static under `jit`: changing one changes the program.
`fleetopt ledger` walks from one preset to the other. A record of your own takes the place of ours:
`replace(PHYSICAL, tail=MyTail())`.
"""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from fleetopt_jax.core.errors import BadInput, unknown_name
from fleetopt_jax.fleet.choices.compression import Compression, FreeCompression, PromptCompression
from fleetopt_jax.fleet.choices.dispatch import (
    AtRandom,
    BoundedHashing,
    Dispatch,
    PrefixAffinity,
    RoundRobin,
    ShortestQueue,
)
from fleetopt_jax.fleet.choices.kv_cache import KvPolicy, PagedKv, ReservedKv
from fleetopt_jax.fleet.choices.labels import EXACT, MEASURED, PROJECTED, SAMPLED, EngineSource, Integration
from fleetopt_jax.fleet.choices.lengths import Lengths, SplitByShare, TracedLengths
from fleetopt_jax.fleet.choices.occupancy import FixedPoint, FullBatch, Occupancy
from fleetopt_jax.fleet.choices.power_scope import OneGpuPerInstance, PowerScope, WholeInstance
from fleetopt_jax.fleet.choices.prefill import ComputePrefill, FreeChunks, PrefillPolicy
from fleetopt_jax.fleet.choices.prefix_cache import ConstantHits, NoPrefixCache, PrefixCache, WorkingSetCache
from fleetopt_jax.fleet.choices.routing_key import RoutingKey, TotalTokens
from fleetopt_jax.fleet.choices.tail import MeanPrefillTail, QuantileTail, Tail


@dataclass(frozen=True)
class Assumptions:
    """The choices `evaluate` takes; hashable, so it is a static argument under `jax.jit`."""

    integration: Integration = EXACT
    """Length distributions by the paper's 3,000 draws (`published.procedure` only), or summed over all lengths."""
    power_scope: PowerScope = OneGpuPerInstance()
    """Count the watts of one GPU of an instance (as the paper's tok/W does), or of all, with host and PUE if given."""
    lengths: Lengths = SplitByShare()
    """Split every request's total length by `output_share`, or take the trace's own prompt and output."""
    compression: Compression = FreeCompression()
    """A request compressed into a shorter window shrinks as a whole, for nothing and always; or its prompt shrinks, its
    output stays, a try may fail, and takes time and energy."""
    occupancy: Occupancy = FullBatch()
    """In flight n = rho n_max with steps as long as with all slots full, or Little's law at the real step time."""
    prefill: PrefillPolicy = FreeChunks()
    """Chunks of the prompt ride along for free, or take FLOPs, engine time and power."""
    kv_cache: KvPolicy = ReservedKv()
    """A slot reserves its whole window, or holds the tokens it has (overflowing at most 1 % of the time)."""
    engine: EngineSource = PROJECTED
    """The paper's coefficients, or the law (or the configuration's own fit) from measurements. Read by the catalog."""
    tail: Tail = MeanPrefillTail()
    """P99 TTFT = P99 slot wait + mean prefill with Poisson arrivals, or the P99 of slot wait + prefill queue + own
    prefill with the arrivals' own burstiness."""

    output_share: float = 0.2
    """The share where lengths are split by it."""
    rounding: Literal["whole", "real"] = "whole"
    """Floors and ceilings, or neither: the relaxation that gradients need."""

    dispatch: Dispatch = ShortestQueue()
    """Requests of a pool go to the instance with the fewest, in turn, at random, or to the one that their prompts'
    beginnings are given to. Read where the occupancy is the fixed point and the tail the quantile, and by the prefix
    cache."""
    route_by: RoutingKey = TotalTokens()
    """The length that the router compares with its thresholds."""
    prefix_cache: PrefixCache = NoPrefixCache()
    """Every prompt is computed as a whole; or a share of it is found in the KV cache: the same of each, or what the
    instances' caches keep of the workload's own reuse."""

    @property
    def whole(self) -> bool:
        return self.rounding == "whole"


def _by_name(*records: Any) -> MappingProxyType[str, Any]:
    return MappingProxyType({record.name: record for record in records})


CHOICES = MappingProxyType(  # the nine, each with its records by name, as published first
    {
        "integration": _by_name(SAMPLED, EXACT),
        "power_scope": _by_name(OneGpuPerInstance(), WholeInstance()),
        "lengths": _by_name(SplitByShare(), TracedLengths()),
        "compression": _by_name(FreeCompression(), PromptCompression()),
        "occupancy": _by_name(FullBatch(), FixedPoint()),
        "prefill": _by_name(FreeChunks(), ComputePrefill()),
        "kv_cache": _by_name(ReservedKv(), PagedKv()),
        "engine": _by_name(PROJECTED, MEASURED),
        "tail": _by_name(MeanPrefillTail(), QuantileTail()),
    }
)
DISPATCHES = _by_name(ShortestQueue(), RoundRobin(), AtRandom(), PrefixAffinity(), BoundedHashing())
PREFIX_CACHES = _by_name(NoPrefixCache(), ConstantHits(0.5), WorkingSetCache())
PUBLISHED = Assumptions()
PHYSICAL = Assumptions(
    power_scope=WholeInstance(),
    lengths=TracedLengths(),
    compression=PromptCompression(),
    occupancy=FixedPoint(),
    prefill=ComputePrefill(),
    kv_cache=PagedKv(),
    engine=MEASURED,
    tail=QuantileTail(),
)
PRESETS = MappingProxyType({"physical": PHYSICAL, "published": PUBLISHED})


def parse_assumptions(text: str, where: str = "--assume") -> Assumptions:
    """A preset, and choices changed in it: 'physical', 'published', 'physical,kv_cache=reserved,tail=mean_prefill'.

    >>> fo.parse_assumptions("physical,kv_cache=reserved").kv_cache.name
    'reserved'
    """
    preset, *changes = (part.strip() for part in text.split(","))
    if preset not in PRESETS:
        raise unknown_name(where, preset, PRESETS)
    assumptions = PRESETS[preset]
    for change in changes:
        choice, _, value = change.partition("=")
        if choice not in CHOICES:
            raise unknown_name(where, choice, CHOICES)
        allowed = CHOICES[choice]
        if value not in allowed:
            raise BadInput(where, f"{choice} = {value!r}", f"need {' or '.join(allowed)}")
        assumptions = replace(assumptions, **{choice: allowed[value]})
    if assumptions.integration != EXACT:
        raise BadInput(where, "integration = 'sampled'", "need exact: the paper's sampler is for reproduce and ledger")
    return assumptions


def choice_names(assumptions: Assumptions) -> dict[str, str]:
    """The nine choices by the names of their records."""
    return {choice: getattr(assumptions, choice).name for choice in CHOICES}
