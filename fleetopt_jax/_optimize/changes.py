"""What can be changed of a fleet: each lever as a change of specs, of the pools, of the prompts, or of what is found of
them.

A lever changes specs (`catalog/spec.py`) and keeps of them whatever it does not change: clocks, batch limits, laws of
one's own. Clocks are of the top clock, whatever the present one is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fleetopt_jax.catalog.drafts import Drafts, draft_heads
from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.catalog.llms import LlmEntry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices.dispatch import PrefixAffinity
from fleetopt_jax.fleet.choices.lengths import SplitByShare
from fleetopt_jax.fleet.choices.prefix_cache import ConstantHits, WorkingSetCache

MOST_POOLS = 4
TPS = (1, 2, 4, 8)
DRAFTS = (1, 2, 3, 5)  # tokens drafted ahead that are tried beside none
SLOTS = (64, 128, 256, 512, 2048, 4096)  # max_num_seqs tried beside the present
CLOCKS = (0.5, 0.6, 0.7, 0.8, 0.9)  # tried beside the top clock; below 0.5 the law is too kind
PROMPT_FRAC = 0.5  # what compression leaves of every prompt: the paper's largest gamma
ASSUMED_COMPRESSION = "answers are assumed to stay good enough"
FP8_NOTE = "answers may differ"
LAWS_HOLD_FOR = ("gpu", "llm", "tp", "ep", "dp", "pp", "precision", "serving")  # an engine that was calibrated


def changed(spec: EngineSpec, **changes: object) -> EngineSpec:
    """`spec` changed; laws of its own, calibrated or given, go with the names they hold for."""
    laws = spec.laws
    if any(getattr(spec, name) != changes.get(name, getattr(spec, name)) for name in LAWS_HOLD_FOR):
        laws = None
    elif laws and changes.get("kv_precision", spec.kv_precision) != spec.kv_precision:
        laws = replace(laws, kv=None)
    return replace(spec, **{"laws": laws, **changes})


@dataclass(frozen=True)
class Need:
    """A law that a lever needs, by the choice of `Assumptions` that has it or not."""

    choice: str
    has_law: Callable[[Assumptions], bool]
    why: str  # it is needed


Variants = Callable[[EngineSpec], Sequence[EngineSpec]]


@dataclass(frozen=True)
class Lever:
    """One thing to change. Two levers combine where they touch different parts of a plan."""

    name: str
    title: str  # what is done, in words
    touches: frozenset[str]
    quality: str = "measured"  # how well its own law is known; with the engines' quality the worst counts
    n_pools: int = 1  # released: at most so many, if more than now
    free_gamma: bool = False
    variants: Variants = lambda spec: (spec,)
    prompt_frac: float = 1.0
    hit_frac: float = 0.0  # of every prompt, found in a prefix cache
    by_prefix: bool = False  # prompts find what the KV memory keeps, and go where their beginnings are
    two_stages: bool = False  # pools may have a prefill and a decode stage
    of_stages: tuple[Variants, Variants] | None = None  # pools have a prefill and a decode stage, of these
    need: Need | None = None
    note: str = ""


PAGED_SLOTS = Need(
    "kv_cache", lambda x: x.kv_cache.caps_sequences, "slots reserve their window, whatever max_num_seqs says"
)
PAGED_BYTES = Need("kv_cache", lambda x: x.kv_cache.caps_sequences, "slots are counted, not bytes")
COMPUTE = Need(
    "prefill", lambda x: not x.prefill.chunks_are_free, "nothing is bound by compute where prefill rides along free"
)
COMPUTE_SPARED = Need(
    "prefill", lambda x: not x.prefill.chunks_are_free, "nothing is spared where prefill rides along free"
)
COMPUTE_DRAFTED = Need(
    "prefill", lambda x: not x.prefill.chunks_are_free, "an iteration takes one token of each sequence there"
)
OWN_OUTPUT = Need(
    "lengths",
    lambda x: not isinstance(x.lengths, SplitByShare),
    "a compressed request would shrink its output too",
)


UNKNOWN_HITS = "no share is given, and the workload has neither block hashes nor sessions that tell of one"


def prefix_caching(hit_frac: float, where: str) -> Lever:
    """Every prompt finds a share of itself, which nobody has measured in this fleet: `where` it is known from. What of
    it the KV memory, the number of instances and the dispatch leave is in the share or nowhere."""
    note = f"the share is assumed, in every pool and whatever the instances: {where}; compressed prompts find nothing"
    return Lever(
        "prefix_cache",
        f"prefix caching ({100 * hit_frac:.0f} % found)",
        frozenset({"beginnings", "caching"}),
        "assumed",
        hit_frac=hit_frac,
        need=COMPUTE_SPARED,
        note=note,
    )


def affinity(assumptions: Assumptions) -> Lever:
    """Requests go by how they begin, to instances that keep prompts in their KV memory, which they may do already."""
    title = "dispatch by prefix"
    if not assumptions.prefix_cache.finds:
        title = f"prefix caching by the KV memory, {title}"
    return Lever(
        "affinity",
        title,
        frozenset({"beginnings", "caching", "dispatch"}),
        "law",
        by_prefix=True,
        need=COMPUTE_SPARED,
        note="what each pool finds is by a law of its memory, in plans without proof; compressed prompts find nothing",
    )


def drafting(llm: str | LlmEntry) -> Lever:
    """Tokens drafted ahead, as many as pay in each pool: by the module of checkpoints that have one, else by a head."""
    name = llm if isinstance(llm, str) else llm.title
    head = draft_heads()["mtp" if name.startswith("deepseek") else "eagle3"]

    def variants(spec: EngineSpec) -> list[EngineSpec]:
        drafts = [Drafts(head, k) for k in DRAFTS if k <= head.most]
        return [spec, *(changed(spec, speculate=each) for each in drafts if each != spec.drafts)]

    return Lever(
        "speculate",
        f"draft up to {min(head.most, DRAFTS[-1])} tokens ahead ({head.name})",
        frozenset({"drafts"}),
        "assumed",
        variants=variants,
        need=COMPUTE_DRAFTED,
        note=f"as many are assumed to be accepted as of {head.llm.split(',')[0]} on {head.task.split(',')[0]}",
    )


def all_levers(
    present: Sequence[EngineSpec],
    n_pools: int,
    gamma: float | None,
    *,
    next_gpu: str | GpuEntry | None,
    llm: str | LlmEntry,
) -> list[Lever]:
    """Every lever that the present fleet has not pulled."""
    levers = [*_of_routing(n_pools, gamma), DISAGGREGATE, TENSOR_PARALLEL, MAX_NUM_SEQS]
    levers += [*_of_stages(present, next_gpu), *_of_engines(present, next_gpu, llm)]
    return [*levers, CLOCK, drafting(present[0].llm), COMPRESSION]


def _of_routing(n_pools: int, gamma: float | None) -> list[Lever]:
    pools = frozenset({"pools"})
    levers = []
    if n_pools < 2:
        levers.append(Lever("routing", "route by context length to two pools", pools, "law", n_pools=2))
    if gamma is not None:
        title = "compress prompts at the boundaries"
        if n_pools < 2:
            title = "two pools, compress prompts at the boundary (FleetOpt)"
        levers.append(
            Lever("gamma", title, pools | {"prompts"}, "assumed", 2, free_gamma=True, note=ASSUMED_COMPRESSION)
        )
    if n_pools < MOST_POOLS:
        title = f"up to {MOST_POOLS} pools by context length"
        levers.append(Lever("pools", title, pools, "law", n_pools=MOST_POOLS))
    return levers


def _of_stages(present: Sequence[EngineSpec], next_gpu: str | GpuEntry | None) -> list[Lever]:
    """Another GPU in one of two stages."""
    name, now = _gpu_name(next_gpu), list(dict.fromkeys(spec.gpu_name for spec in present))
    if name is None or now == [name]:
        return []

    def same(spec: EngineSpec) -> tuple[EngineSpec]:
        return (spec,)

    def other(spec: EngineSpec) -> tuple[EngineSpec]:
        return (changed(spec, gpu=next_gpu),)

    apart = replace(DISAGGREGATE, touches=DISAGGREGATE.touches | {"gpu"}, two_stages=False)
    one, kept = name.upper(), " and ".join(now).upper()
    return [
        replace(apart, name="prefill_on", title=f"prefill on {one}, decode on {kept}", of_stages=(other, same)),
        replace(apart, name="decode_on", title=f"prefill on {kept}, decode on {one}", of_stages=(same, other)),
    ]


def _gpu_name(gpu: str | GpuEntry | None) -> str | None:
    return gpu.name if isinstance(gpu, GpuEntry) else gpu


def _of_engines(present: Sequence[EngineSpec], next_gpu: str | GpuEntry | None, llm: str | LlmEntry) -> list[Lever]:
    """Another GPU, precision or model in every pool."""

    def lever(name: str, title: str, touches: str, quality: str = "measured", note: str = "", **changes: Any) -> Lever:
        return Lever(
            name, title, frozenset({touches}), quality, variants=lambda spec: (changed(spec, **changes),), note=note
        )

    levers = []
    name = _gpu_name(next_gpu)
    if name is not None and {spec.gpu_name for spec in present} != {name}:
        levers.append(lever("generation", f"{name.upper()} in every pool", "gpu", gpu=next_gpu))
    if any(spec.precision == "bf16" for spec in present):
        levers.append(lever("precision", "weights in fp8", "precision", note=FP8_NOTE, precision="fp8"))
    if any(spec.kv_precision == "bf16" for spec in present):
        of_cache = lever("kv_precision", "KV cache in fp8", "kv", "law", FP8_NOTE, kv_precision="fp8")
        levers.append(replace(of_cache, need=PAGED_BYTES))
    if {spec.llm for spec in present} != {llm}:
        title = llm.title if isinstance(llm, LlmEntry) else llm
        levers.append(lever("model", f"serve {title}", "llm", note="another model: other answers", llm=llm))
    return levers


def _tensor_parallel(spec: EngineSpec) -> list[EngineSpec]:
    return [changed(spec, tp=tp) for tp in sorted({spec.tp, *TPS})]


def _slots(spec: EngineSpec) -> list[EngineSpec]:
    return [spec, *(changed(spec, max_num_seqs=slots) for slots in SLOTS if slots != spec.max_num_seqs)]


def _clocks(spec: EngineSpec) -> list[EngineSpec]:
    """Of the top clock, whatever the present one is."""
    return [spec, *(changed(spec, clock_frac=clock) for clock in (1.0, *CLOCKS) if clock != spec.clock_frac)]


DISAGGREGATE = Lever(
    "disaggregate",
    "prefill and decode on instances of their own, where that is better",
    frozenset({"stages", "caching"}),
    "law",
    two_stages=True,
    need=Need("prefill", lambda x: not x.prefill.chunks_are_free, "prefill rides along free, and so disturbs nobody"),
)
TENSOR_PARALLEL = Lever(
    "tp",
    f"tensor parallelism {', '.join(map(str, TPS[:-1]))} or {TPS[-1]}",
    frozenset({"tp"}),
    variants=_tensor_parallel,
)
MAX_NUM_SEQS = Lever(
    "max_num_seqs",
    f"max_num_seqs from {SLOTS[0]} to {SLOTS[-1]:,}",
    frozenset({"slots"}),
    "law",
    variants=_slots,
    need=PAGED_SLOTS,
)
CLOCK = Lever(
    "clock",
    f"GPU clock, {CLOCKS[0]:.0%} to 100 % of the top",
    frozenset({"clock"}),
    "projected",
    variants=_clocks,
    need=COMPUTE,
)
COMPRESSION = Lever(
    "compression",
    f"compress every prompt to {PROMPT_FRAC:.0%}",
    frozenset({"prompts", "beginnings"}),
    "assumed",
    prompt_frac=PROMPT_FRAC,
    need=OWN_OUTPUT,
    note=ASSUMED_COMPRESSION,
)


def with_hits(assumptions: Assumptions, hit_frac: float) -> Assumptions:
    """With a prefix cache that finds a share of every prompt."""
    return replace(assumptions, prefix_cache=ConstantHits(hit_frac)) if hit_frac else assumptions


def with_affinity(assumptions: Assumptions) -> Assumptions:
    """With a prefix cache of the KV memory, and dispatch by prefix."""
    return replace(assumptions, prefix_cache=WorkingSetCache(), dispatch=PrefixAffinity())


def lacking(lever: Lever, assumptions: Assumptions) -> str | None:
    """The law that `lever` needs and `assumptions` do not have; None where all are there."""
    need = lever.need
    if need is None or need.has_law(assumptions):
        return None
    return f"{need.why} ({need.choice} = {getattr(assumptions, need.choice).name})"
