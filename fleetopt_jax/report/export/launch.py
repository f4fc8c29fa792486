"""What each pool of a plan has to run, whatever starts it: the checkpoint and vLLM's flags, as the laws assumed them.

vLLM's own defaults are not those of the laws (it takes more of the memory, larger steps on the largest GPUs, and caches
prefixes whether the plan does or not), so everything a law reads is said.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.hosts import serving_titles
from fleetopt_jax.catalog.links import DEFAULT_LINK, LINKS
from fleetopt_jax.catalog.llms import KV_BYTES, LLMS, PRECISIONS, LlmEntry, at_precision, llm_entry
from fleetopt_jax.catalog.own import Catalog
from fleetopt_jax.catalog.spec import MEASURED_SERVING
from fleetopt_jax.core.errors import BadInput, unknown_name
from fleetopt_jax.core.files import first_problem
from fleetopt_jax.core.units import GIB
from fleetopt_jax.documents.drafts import SpeculatePart
from fleetopt_jax.documents.plan import own_catalog
from fleetopt_jax.documents.plan_file import (
    MAX_POOLS,
    SCHEMA,
    HostCachePart,
    LinkPart,
    PrefixCachePart,
    RouteByPart,
    SloPart,
    beside_plan,
    stages_in_order,
)
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions, parse_assumptions
from fleetopt_jax.laws.clocks import MIN_CLOCK_FRAC
from fleetopt_jax.laws.kv_cache import MEMORY_UTILIZATION
from fleetopt_jax.laws.llm import weight_bytes
from fleetopt_jax.report.export.releases import PORT, VLLM_RELEASE
from fleetopt_jax.report.export.router import router_document
from fleetopt_jax.report.export.two_stage import (
    HEAD_NOTE,
    POLICIES,
    Role,
    StageRouter,
    has_cache,
    kv_transfer_config,
    require_hand_over,
    require_same_checkpoint,
    stage_notes,
    stage_router,
    stage_router_notes,
)
from fleetopt_jax.report.verdict import LATENCIES, failing_said, repair_said
from fleetopt_jax.report.words import listed, percent

MOST_NGRAM = 4  # tokens of the context that n-grams are matched by
GPUS_PER_HOST = 8  # of a GPU that no catalog has
LEAST_DRAIN_S, MOST_DRAIN_S = 60, 600  # to finish what an instance has begun before it stops
MOST_LOAD_FRAC = {"affinity": 1.5, "bounded_hash": 1.25}  # of the mean, in flight where prefixes choose the instance
NAME_LENGTH = 30  # of the fleet; leaves room for the pool, and for what Kubernetes appends, in the 63 of a label


@dataclass(frozen=True)
class PoolLaunch:
    """One pool's instances, all alike."""

    name: str
    gpu: str
    n_instances: int
    gpus_per_instance: int
    hosts_per_instance: int  # that have as many of its GPUs each
    window_tokens: int  # longest request, prompt + output [tokens]
    drain_s: int  # what it has begun is given this long to end when the instance is stopped [s]
    n_active: float  # mean sequences in flight in an instance, as planned [-]
    checkpoint_bytes: float  # of its files, 0 where they are not known [B]
    args: tuple[str, ...]  # of `vllm serve`: the checkpoint, then --flag or --flag=value
    notes: tuple[str, ...]  # what whoever starts it must know or do
    role: Role | None = None  # of the stage, where its pool has two


@dataclass(frozen=True)
class FleetLaunch:
    """All pools, shortest window first, and the router in front of them; one of two stages is two of them."""

    name: str
    title: str
    verified: bool  # a simulation of every iteration held the plan's limits
    fails: str  # what it is known to break: '' unless it is exported anyway
    header: tuple[str, ...]  # first lines of everything that is written: what it is, and how sure
    arrival_rate_per_s: float
    output_tok_per_s: float
    pools: tuple[PoolLaunch, ...]
    router: dict[str, Any]
    notes: tuple[str, ...]
    stage_routers: tuple[StageRouter, ...] = ()  # before the pools of two stages
    stage_router_notes: tuple[str, ...] = ()
    keys_in_engines: bool = True  # they look at clients' keys, but those behind a router of stages

    @property
    def router_looks_at_keys(self) -> bool:
        """Whether Envoy has to."""
        return bool(self.stage_routers) or not self.keys_in_engines


class _Part(BaseModel):
    """Fields we compute may be there; those we read must be right."""

    model_config = ConfigDict(extra="ignore")


class _Engine(_Part):
    """An engine: of a pool, or of one of its stages."""

    gpu: str
    llm: Annotated[str, Field(min_length=1)]
    tp: Annotated[int, Field(ge=1, le=10**6)]
    ep: Annotated[int, Field(ge=1, le=10**6)] = 1
    dp: Annotated[int, Field(ge=1, le=10**6)] = 1
    pp: Annotated[int, Field(ge=1, le=10**6)] = 1
    serving: str = MEASURED_SERVING
    max_num_batched_tokens_asked: Annotated[int, Field(ge=1, le=10**6)] | None = None
    n_instances: Annotated[int, Field(ge=1, le=10**9)]
    evaluated_gpus: Annotated[int | None, Field(alias="n_gpus")] = None  # of all instances, as it was evaluated
    max_num_seqs: Annotated[int, Field(ge=1, le=10**9)]
    precision: str | None = None
    kv_precision: str = "bf16"
    catalog_file: str | None = None
    clock_frac: Annotated[float, Field(ge=MIN_CLOCK_FRAC, le=1)] = 1.0
    power_limit_w: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    memory_utilization: Annotated[float, Field(gt=0, le=1)] = MEMORY_UTILIZATION
    host_cache: HostCachePart | None = None
    utilization: float | None = 0.0  # null is overload
    n_active: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    speculate: SpeculatePart | None = None


class _Stage(_Engine):
    role: Role


class _HandOver(_Part):
    mean_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class _Pool(_Engine):
    window_tokens: Annotated[int, Field(ge=1, le=10**9)]
    gamma: Annotated[float, Field(ge=1, le=10**6)] = 1.0
    ttft_within_frac: float | None = None
    itl_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    prefix_hit_frac: Annotated[float, Field(ge=0, le=1)] | None = None
    stages: Annotated[list[_Stage], Field(min_length=2, max_length=2)] | None = None
    hand_over: _HandOver = _HandOver()
    role: Role | None = None  # of a stage that is seen as a pool

    _in_order = field_validator("stages")(stages_in_order)

    @property
    def engines(self) -> "tuple[_Pool, ...]":
        """Itself, or each of its stages as a pool of the same requests. A draft head with a KV cache is in both."""
        if self.stages is None:
            return (self,)
        prefill, decode = (self.model_copy(update={"stages": None, **dict(stage)}) for stage in self.stages)
        drafts = decode.speculate
        if drafts and has_cache(drafts) and prefill.speculate is None:
            prefill = prefill.model_copy(update={"speculate": drafts.model_copy(update={"k": 1})})
        return prefill, decode

    @property
    def rows_per_sequence(self) -> int:
        """Tokens of a step that each sequence takes: one, and its drafts."""
        return 1 + (self.speculate.k if self.speculate else 0)

    @property
    def n_gpus(self) -> int:
        """Of one instance."""
        return self.tp * self.dp * self.pp

    @property
    def group_num_seqs(self) -> int:
        """Sequences that each group with a scheduler of its own may run."""
        return math.ceil(self.max_num_seqs / self.dp)

    @property
    def drain_s(self) -> int:
        """What the longest answer takes at the plan's inter-token latency, within bounds."""
        if self.role == "prefill":
            return LEAST_DRAIN_S
        longest_s = MOST_DRAIN_S if self.itl_s is None else math.ceil(self.window_tokens * self.itl_s)
        return min(max(longest_s, LEAST_DRAIN_S), MOST_DRAIN_S)


class _Workload(_Part):
    name: str
    arrival_rate_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    mean_output_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class _Verified(_Part):
    held: bool


_LIMIT = (  # as a plan names what it breaks
    "^(utilization|ttft_p99_s|itl_s|unserved_frac|window_tokens"
    "|max_gpus|max_power_w|max_usd_per_h|max_kg_co2_per_h|gpus_of[.].+)$"
)


class _Broken(_Part):
    """A limit that the plan breaks, or that no instances mend."""

    pool: Annotated[int, Field(ge=1, le=MAX_POOLS)] | None = None
    limit: Annotated[str, Field(pattern=_LIMIT)]
    value: float | None
    asked: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Repair(_Part):
    """What mends it."""

    instances_added: list[int] | None
    binding: _Broken | None = None
    unmended: list[_Broken] = []


class _Plan(_Part):
    schema_name: Annotated[Literal["fleetopt-plan/1"], Field(alias="schema")]
    status: str = "feasible"
    assume: str = "physical"
    dispatch: Literal["jsq", "round_robin", "random", "affinity", "bounded_hash"] = "jsq"
    prefix_cache: PrefixCachePart | None = None
    route_by: RouteByPart | None = None
    verified: _Verified | None = None
    command: str | None = None
    workload: _Workload
    slo: SloPart = SloPart()
    broken: list[_Broken] = []  # which it breaks, where it was evaluated
    repair: _Repair | None = None
    kv_link: LinkPart | None = None
    pools: Annotated[list[_Pool], Field(max_length=MAX_POOLS)]

    @property
    def engines(self) -> list[tuple[str, _Pool]]:
        """(place in the plan, engine) of every pool, or of each of its stages."""
        return [
            (f"pools.{k}.stages.{i}" if pool.stages else f"pools.{k}", engine)
            for k, pool in enumerate(self.pools)
            for i, engine in enumerate(pool.engines)
        ]

    @property
    def link(self) -> LinkPart:
        """What its two stages have between them."""
        return self.kv_link or LinkPart(**vars(LINKS[DEFAULT_LINK]))


def fleet_launch(
    document: Any,
    where: str,
    *,
    models: Mapping[str, str] | None = None,
    name: str = "fleetopt",
    catalog: Catalog | None = None,
    anyway: bool = False,
) -> FleetLaunch:
    """What starts the fleet of a plan document (`plan_to_json`), or `BadInput` naming the place in `where`; its names
    are those of a `catalog` of one's own where that is given, else of the one that the plan names.

    `models` names checkpoints: of an LLM of the plan in its own precision ("llama-3.1-70b"), or in the one that follows
    a colon ("llama-3.1-70b:fp8"), which then carries it in its own config. `name` begins the name of every pool. A plan
    that is known to fail its limits is refused, unless `anyway`, which marks what is written.
    """
    plan = _read(document, where)
    fault = _fault(plan)
    if fault and not anyway:
        raise BadInput(f"{where}{fault.place}", fault.said, _mend(plan, fault, where))
    _require_router(plan, where)
    models = _checked_models(models or {}, plan)
    fleet = dns_label(name, NAME_LENGTH)
    assumptions = parse_assumptions(plan.assume, f"{where}, assume")
    names = [f"{fleet}-pool-{pool.window_tokens}" for pool in plan.pools]
    lanes = [_lane_launch(where, k, names[k], plan, models, assumptions, catalog) for k in range(len(plan.pools))]
    windows = [min(pool.window_tokens for pool in lane) for lane in lanes]
    pools = tuple(pool for lane in lanes for pool in lane)
    n_instances = sum(pool.n_instances for pool in pools)
    n_gpus = sum(pool.n_instances * pool.gpus_per_instance for pool in pools)
    rate_per_s = plan.workload.arrival_rate_per_s
    title = plain(
        f"{plan.workload.name} at {rate_per_s:,.6g} requests/s: "
        f"{n_instances:,} instances on {n_gpus:,} GPUs, vLLM {VLLM_RELEASE}"
    )
    verified = plan.verified is not None and not fault
    return FleetLaunch(
        name=fleet,
        title=title,
        verified=verified,
        fails=plain(fault.said) if fault else "",
        header=(f"{title}.", *_header(plan, where, fault, pools, assumptions)),
        arrival_rate_per_s=rate_per_s,
        output_tok_per_s=rate_per_s * plan.workload.mean_output_tokens,
        pools=pools,
        router=_router(plan, names, windows, assumptions) | {"plan": "verified" if verified else "unverified"},
        notes=_fleet_notes(plan, assumptions),
        stage_routers=tuple(
            stage_router(name, window, lane[-1].drain_s, plan.dispatch)
            for name, window, lane in zip(names, windows, lanes, strict=True)
            if len(lane) == 2
        ),
        stage_router_notes=_stage_router_notes(plan),
    )


def _router(plan: _Plan, names: Sequence[str], windows: Sequence[int], assumptions: Assumptions) -> dict[str, Any]:
    return router_document(
        names,
        windows,
        windows_of_plan=[pool.window_tokens for pool in plan.pools],
        gammas=[pool.gamma for pool in plan.pools],
        compression=assumptions.compression,
        length="prompt + max_tokens" if plan.route_by else "prompt + output tokens",
        dispatch=plan.dispatch,
        port=PORT,
    )


def _require_router(plan: _Plan, where: str) -> None:
    """Refuse what no router that is written does."""
    if plan.route_by and plan.route_by.choice.sticky is not None:
        problem = "no router that is written keeps conversations in the pool that they began in"
        raise BadInput(f"{where}, route_by", problem, "need a plan without --sticky")
    if plan.dispatch not in POLICIES and any(pool.stages for pool in plan.pools):
        problem = f"{plan.dispatch}: no router that is written follows prefixes between two stages"
        raise BadInput(f"{where}, dispatch", problem, f"need a plan with --dispatch {', '.join(POLICIES)}")


def _header(
    plan: _Plan, where: str, fault: "_Fault | None", pools: Sequence[PoolLaunch], assumptions: Assumptions
) -> tuple[str, ...]:
    """What a fleet is, and how sure, after its title."""
    fails = [plain(f"THIS FLEET FAILS ITS LIMITS, and was exported all the same: {fault.said}.")] if fault else []
    return (
        *fails,
        plain(f"Written by fleetopt export from {where}."),
        *_how_sure(plan, where, bool(fault)),
        _served(pools),
        *_planned_on(plan, assumptions),
        *_found(plan),
    )


def _served(pools: Sequence[PoolLaunch]) -> str:
    """The checkpoints that are served, each once."""
    return plain(f"Serves {listed(list(dict.fromkeys(pool.args[0] for pool in pools)))}.")


def _planned_on(plan: _Plan, assumptions: Assumptions) -> tuple[str, ...]:
    """The serving engines and releases that the steps of the plan were measured on, beside the release written for."""
    if assumptions.engine.name != PHYSICAL.engine.name:
        return ()
    titles = serving_titles()
    names = dict.fromkeys(titles.get(engine.serving, engine.serving) for _, engine in plan.engines)
    said = plain(f"Its steps are those of {listed(list(names))}; the flags are vLLM {VLLM_RELEASE}'s.")
    return (said,)


def _found(plan: _Plan) -> tuple[str, ...]:
    """What of the prompts the plan takes as found in a cache, where it does."""
    cache = plan.prefix_cache
    if cache is None:
        return ()
    if cache.hit_frac is not None:
        found = f"{percent(cache.hit_frac)} of the prompt tokens are found in the prefix cache"
        return (f"Assumes that {found}, in every pool: a share that was given, not simulated.",)
    shares = [
        "an unknown share" if pool.prefix_hit_frac is None else percent(pool.prefix_hit_frac) for pool in plan.pools
    ]
    pools = "in the pool" if len(shares) == 1 else "in its pools, shortest first"
    return (f"Assumes that {listed(shares)} of the prompt tokens are found in the prefix cache {pools}: by a law.",)


def _how_sure(plan: _Plan, where: str, fails: bool) -> tuple[str, ...]:
    if plan.verified is not None and not fails:
        return ("Verified: a simulation of every iteration held the plan's limits.",)
    if any(pool.stages for pool in plan.pools):
        return (
            "This plan is unverified: no simulation has held its limits (--verify judges no pools of two stages).",
            plain(f"What a simulation finds: fleetopt simulate {shlex.quote(where)}"),
        )
    return (
        "This plan is unverified: no simulation has held its limits. Make it again with",
        plain(f"  {plan.command or 'fleetopt optimize [ITS OPTIONS]'} --verify --out {shlex.quote(where)}"),
        plain(f"and export that. What a simulation of this one finds: fleetopt simulate {shlex.quote(where)}"),
    )


def dns_label(text: str, length: int) -> str:
    """`text` as at most `length` small ASCII letters, digits and inner dashes, a letter first (RFC 1035)."""
    label = re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"fleet-{label}"
    return label[:length].strip("-")


def plain(text: str) -> str:
    """`text` on one line: what a comment may hold."""
    return "".join(c if c.isprintable() else " " for c in text)


def _read(document: Any, where: str) -> _Plan:
    try:
        plan = _Plan.model_validate(document)
    except ValidationError as error:
        raise BadInput(
            where, first_problem(error), f"need a {SCHEMA} file as fleetopt optimize --json prints it"
        ) from None
    if not plan.pools:
        raise BadInput(where, "the plan has no pools: no fleet held its limits", "need a feasible plan")
    for each in [*plan.broken, *(plan.repair.unmended if plan.repair else ())]:
        if (each.pool or 0) > len(plan.pools) or (each.limit in LATENCIES and not each.asked > 0):
            said = f"pool {each.pool}, {each.limit}, asked {each.asked:g}"
            raise BadInput(f"{where}, broken", said, "need the limits as fleetopt evaluate writes them")
    windows = [pool.window_tokens for pool in plan.pools]
    if windows != sorted(set(windows)):
        raise BadInput(where, f"pools.window_tokens = {windows}", "need rising windows")
    for place, engine in plan.engines:
        if engine.precision is not None and engine.precision.lower() not in PRECISIONS:
            raise unknown_name(f"{where}, {place}.precision", engine.precision, PRECISIONS)
        if engine.kv_precision.lower() not in KV_BYTES:
            raise unknown_name(f"{where}, {place}.kv_precision", engine.kv_precision, KV_BYTES)
    return plan


class _Fault(NamedTuple):
    """Why a fleet is known to fail."""

    field: str | None  # of the plan
    said: str
    changed_since: bool = False  # what it was evaluated as is not this fleet

    @property
    def place(self) -> str:
        return "" if self.field is None else f", {self.field}"


def _fault(plan: _Plan) -> _Fault | None:
    """What a plan is known to break, as it was evaluated or simulated; None of one that may be started."""
    if broken := failing_said(plan.model_dump()):
        return _Fault(None, f"the plan is infeasible: {broken}")
    for place, engine in plan.engines:
        if engine.utilization is None or not engine.utilization < 1:
            what = f"{engine.role} stage" if engine.role else "pool"
            return _Fault(f"{place}.utilization", f"{_said(engine.utilization)}: the {what} is overloaded")
    for place, engine in plan.engines:
        if engine.evaluated_gpus not in (None, n_gpus := engine.n_instances * engine.n_gpus):
            changed = f"{n_gpus:,} GPUs, evaluated with {engine.evaluated_gpus:,}: the plan was changed since"
            return _Fault(f"{place}.n_instances", changed, changed_since=True)
    if plan.status == "infeasible":
        return _Fault("status", "the plan is infeasible")
    if plan.verified is not None and not plan.verified.held:
        return _Fault("verified.held", "false: in the simulation the fleet broke its limits")
    return None


def _mend(plan: _Plan, fault: _Fault, where: str) -> str:
    """What to do with a plan that fails, or may."""
    if fault.changed_since:
        return f"fleetopt evaluate {shlex.quote(where)} --out FILE says what it does now"
    grow, anyway = f"fleetopt evaluate {shlex.quote(where)} --repair --out grown.json", "--anyway exports it as it is"
    if any(pool.stages for pool in plan.pools):
        return f"fleetopt optimize finds another; {anyway}"
    if plan.repair is None:
        return f"{grow} adds what it lacks; {anyway}"
    mended = repair_said(plan.model_dump())
    return f"{mended}; {anyway}" if plan.repair.instances_added is None else f"{mended} ({grow}); {anyway}"


def _said(utilization: float | None) -> str:
    return "null" if utilization is None else f"{utilization:.3g}"


def _checked_models(models: Mapping[str, str], plan: _Plan) -> dict[str, str]:
    """Refuse a checkpoint nobody asked for, and a name that vLLM would read as a flag or nobody could read."""
    llms = dict.fromkeys(_llm_name(engine) for _, engine in plan.engines)
    known = [key for llm in llms for key in (llm, *(f"{llm}:{precision}" for precision in PRECISIONS))]
    models = {key.lower() if key.lower() in known else key: model for key, model in models.items()}
    for key, model in models.items():
        if key not in known:
            raise unknown_name("--model", key, known)
        if not model or model.startswith("-") or not model.isprintable():
            raise BadInput("--model", f"{key}={model}", "need the name or the path of a checkpoint")
    return models


def _llm_name(pool: _Pool) -> str:
    return pool.llm.lower() if pool.llm.lower() in LLMS else pool.llm


def _lane_launch(
    file: str,
    k: int,
    name: str,
    plan: _Plan,
    models: Mapping[str, str],
    assumptions: Assumptions,
    given: Catalog | None,
) -> tuple[PoolLaunch, ...]:
    """Of the k-th pool of the `plan` in a `file`, its names those of the `given` catalog, if any: one, or its two
    stages."""
    pool = plan.pools[k]
    if not pool.stages:
        return (_pool_launch(file, f"pools.{k}", name, pool, plan, models, assumptions, given),)
    prefill, decode = (
        _pool_launch(file, f"pools.{k}.stages.{i}", f"{name}-{each.role}", each, plan, models, assumptions, given)
        for i, each in enumerate(pool.engines)
    )
    catalog = given or own_catalog(pool.catalog_file, file)
    llm = catalog.llm(beside_plan(_llm_name(pool), file), f"{file}, pools.{k}.llm")
    require_hand_over(f"{file}, pools.{k}", pool.stages[0], pool.stages[1], llm_entry(llm).architecture)
    require_same_checkpoint(f"{file}, pools.{k}", prefill.args[0], decode.args[0])
    if pool.stages[0].speculate is None and pool.engines[0].speculate:
        prefill = replace(prefill, notes=(*prefill.notes, HEAD_NOTE))
    return prefill, decode


def _pool_launch(
    file: str,
    place: str,
    name: str,
    pool: _Pool,
    plan: _Plan,
    models: Mapping[str, str],
    assumptions: Assumptions,
    given: Catalog | None,
) -> PoolLaunch:
    """Of the engine at a `place` of the `plan` in a `file`, its names those of the `given` catalog, if any."""
    where, catalog = f"{file}, {place}", given or own_catalog(pool.catalog_file, file)
    named = catalog.llm(beside_plan(_llm_name(pool), file), f"{where}.llm")
    model, quantization, longest_tokens, notes = _checkpoint(where, pool, named, models)
    window_tokens = pool.window_tokens
    if longest_tokens is not None and window_tokens > longest_tokens:
        window_tokens = longest_tokens
        notes.append(
            f"The plan's window of {pool.window_tokens:,} tokens is beyond {model}, which has {longest_tokens:,} "
            "positions: the router refuses longer requests. Name a checkpoint that reaches further with --model."
        )
    gpu = catalog.gpu_entry(pool.gpu, f"{where}.gpu")
    step_tokens = pool.max_num_batched_tokens_asked or gpu.batched_tokens
    step_tokens = int(gpu.chunk_tokens) if assumptions.prefill.reads_chunk else step_tokens
    n_hosts = _n_hosts(pool, _host_gpus(pool, catalog))
    notes += _pool_notes(pool, step_tokens, n_hosts)
    flags: dict[str, Any] = {
        "served-model-name": _served_name(pool),
        "tensor-parallel-size": pool.tp,
        **_parallel_flags(where, pool, n_hosts),
        "max-model-len": window_tokens,
        "max-num-seqs": pool.group_num_seqs,
        "max-num-batched-tokens": max(step_tokens, pool.group_num_seqs * pool.rows_per_sequence),
        "enable-chunked-prefill": None,
        # Its default is the model's own (mostly on). Blocks keep the size that the attention has (16 tokens in most).
        f"{'' if plan.prefix_cache else 'no-'}enable-prefix-caching": None,
        "gpu-memory-utilization": pool.memory_utilization,
        **({"quantization": quantization} if quantization else {}),
        **({"kv-cache-dtype": "fp8"} if pool.kv_precision.lower() == "fp8" else {}),
        **({"speculative-config": _speculative_config(pool.speculate, model)} if pool.speculate else {}),
        **({"kv-transfer-config": kv_transfer_config(pool.role)} if pool.role else {}),
        "shutdown-timeout": pool.drain_s,
        "port": PORT,
    }
    return PoolLaunch(
        name=name,
        gpu=pool.gpu.lower(),
        n_instances=pool.n_instances,
        gpus_per_instance=pool.n_gpus,
        hosts_per_instance=n_hosts,
        window_tokens=window_tokens,
        drain_s=pool.drain_s,
        n_active=min(pool.n_active if pool.n_active is not None else math.inf, pool.max_num_seqs),
        checkpoint_bytes=_checkpoint_bytes(pool, named, models),
        args=(model, *(f"--{flag}" if value is None else f"--{flag}={value}" for flag, value in flags.items())),
        notes=tuple(plain(note) for note in notes),
        role=pool.role,
    )


def _speculative_config(drafts: SpeculatePart, model: str) -> str:
    """vLLM's JSON of the drafts. A module of the checkpoint and n-grams have no checkpoint of their own."""
    config: dict[str, Any] = {"method": drafts.method, "num_speculative_tokens": drafts.k}
    if drafts.method == "ngram":
        config["prompt_lookup_max"] = MOST_NGRAM
    elif drafts.method != "mtp" or drafts.model:
        config["model"] = drafts.model or f"<{drafts.method} checkpoint for {model}>"
    return json.dumps(config)


def _parallel_flags(where: str, pool: _Pool, n_hosts: int) -> dict[str, Any]:
    """What divides an instance besides tensor parallelism. vLLM divides the experts whole over all GPUs of a layer or
    over none."""
    of_a_layer = pool.tp * pool.dp
    if pool.ep not in (1, of_a_layer):
        problem = f"{pool.ep} groups of experts on {of_a_layer} GPUs are not what vLLM can do"
        raise BadInput(f"{where}.ep", problem, f"need a plan with --ep 1 or {of_a_layer}")
    flags: dict[str, Any] = {}
    if pool.pp > 1:
        flags["pipeline-parallel-size"] = pool.pp
    if pool.dp > 1:
        flags["data-parallel-size"] = pool.dp
    if pool.ep > 1:
        flags["enable-expert-parallel"] = None
    if n_hosts > 1:
        flags["nnodes"] = n_hosts
    return flags


def _n_hosts(pool: _Pool, host_gpus: int) -> int:
    """The fewest hosts that have an instance's GPUs in equal numbers: vLLM takes no others."""
    least = math.ceil(pool.n_gpus / host_gpus)
    return next(n for n in range(least, pool.n_gpus + 1) if pool.n_gpus % n == 0)


def _host_gpus(pool: _Pool, catalog: Catalog) -> int:
    """GPUs of one host of the pool."""
    known = GPUS | {gpu.name: gpu for gpu in catalog.gpus}
    name = pool.gpu.lower()
    return known[name].gpus_per_node if name in known else GPUS_PER_HOST


def _pool_notes(pool: _Pool, step_tokens: int, n_hosts: int) -> list[str]:
    """What is to be known of a pool beside its flags, where the laws assume steps of `step_tokens`."""
    notes = []
    if pool.group_num_seqs * pool.rows_per_sequence > step_tokens:
        each = "one token for every sequence" if pool.speculate is None else "every sequence's token and drafts"
        notes.append(
            f"The laws assume {step_tokens:,} tokens a step; vLLM needs at least the "
            f"{pool.group_num_seqs * pool.rows_per_sequence:,} of {each}."
        )
    if pool.speculate and pool.role != "prefill":
        notes.append(
            "Of --speculative-config the method, its drafts and its checkpoint or n-grams are written; the head's own "
            "tensor parallelism, quantization and sampling stay vLLM's. The plan counts on "
            f"{pool.speculate.drafts.tokens_per_step:.3g} tokens an iteration (logged as mean acceptance length)."
        )
    if n_hosts > 1:
        address = "--master-addr" + (" and --data-parallel-address" if pool.dp > 1 else "")
        notes.append(
            f"{pool.n_gpus} GPUs of one instance are on {n_hosts} hosts, {pool.n_gpus // n_hosts} on each, which start "
            f"it at once: each with its --node-rank from 0 to {n_hosts - 1} and rank 0's address as {address}, all but "
            "rank 0 with --headless. Rank 0 answers; a LeaderWorkerSet of Kubernetes (--to kubernetes) says all that."
        )
    if pool.clock_frac < 1:
        permille = round(1000 * pool.clock_frac)
        notes.append(
            f"On every host of this pool, as root: lock the GPUs' cores at {permille / 10:g} % of the top clock:"
        )
        notes.append(
            "nvidia-smi -lgc 0,$(( $(nvidia-smi --query-gpu=clocks.max.sm --format=csv,noheader,nounits | head -n 1) "
            f"* {permille} / 1000 ))"
        )
    if pool.power_limit_w is not None:
        notes.append(
            f"On every host of this pool, as root: limit each GPU to {pool.power_limit_w:.0f} W, as the plan counts on "
            "(after a reboot anew):"
        )
        notes.append(f"nvidia-smi -pl {pool.power_limit_w:.0f}")
    return notes


def _checkpoint(
    where: str, pool: _Pool, named: str | LlmEntry, models: Mapping[str, str]
) -> tuple[str, str | None, int | None, list[str]]:
    """(checkpoint, its --quantization, its longest sequence where known [tokens], notes).

    A quantized checkpoint says so in its own config, and vLLM refuses a flag that says otherwise. 16-bit weights are
    quantized as they are loaded to fp8 alone: vLLM's mxfp4 takes more layers than the plan's (experts only), and it has
    no int4. In this release `fp8` is for fp8 checkpoints; `fp8_per_tensor` makes fp8 of others.
    """
    llm = _llm_name(pool)
    asked = pool.precision and pool.precision.lower()
    if f"{llm}:{asked}" in models:
        return models[f"{llm}:{asked}"], None, None, []
    entry = llm_entry(named, f"{where}.llm")
    native = entry.architecture.native_precision
    precision = asked or native
    quantized = precision == "fp8" and native == "bf16"
    if precision != native and not quantized:
        note = f"vLLM cannot make {precision} of the {native} checkpoint: name one with --model {llm}:{precision}=NAME."
        return f"<checkpoint of {plain(llm)} in {precision}>", None, None, [note]
    flag = "fp8_per_tensor" if quantized else None
    if llm in models:
        return models[llm], flag, None, []
    if entry.repository is None:
        note = f"{llm} describes a model and does not name it: name its checkpoint with --model {llm}=NAME."
        return f"<checkpoint of {plain(llm)}>", flag, None, [note]
    return entry.repository, flag, entry.max_position_tokens, []


def _checkpoint_bytes(pool: _Pool, llm: str | LlmEntry, models: Mapping[str, str]) -> float:
    """Of the files that are loaded [B]: those of another precision where one is named. 0 for a file that is gone."""
    try:
        architecture = llm_entry(llm).architecture
        named = f"{_llm_name(pool)}:{pool.precision and pool.precision.lower()}" in models
        return float(weight_bytes(at_precision(architecture, pool.precision if named else None)))
    except BadInput:
        return 0.0


def _served_name(pool: _Pool) -> str:
    """One name for all precisions, so that a client need not know which pool answers."""
    name = _llm_name(pool)
    if name.lower().endswith(".json"):  # .../my-model/config.json, .../my-model.json
        path = PurePath(name)
        name = path.parent.name if path.stem == "config" else path.stem
    name = plain(name).strip()
    return name or "model"


def _fleet_notes(plan: _Plan, assumptions: Assumptions) -> tuple[str, ...]:
    notes = [_cache_note(plan), *_host_notes(plan), *_affinity_notes(plan), *_stage_notes(plan)]
    if any(pool.gamma > 1 for pool in plan.pools):
        notes.append(
            "The plan compresses prompts at the boundaries (compress_up_to_tokens in router.json). A gateway before "
            "the router has to do that: without one the fleet is too small."
        )
    if (assumptions.lengths, assumptions.kv_cache) != (PHYSICAL.lengths, PHYSICAL.kv_cache):
        notes.append(f"The plan was made under '{plain(plan.assume)}', which is not how vLLM works: see the ledger.")
    return tuple(plain(note) for note in notes)


def _stage_notes(plan: _Plan) -> list[str]:
    staged = [pool for pool in plan.pools if pool.stages]
    if not staged:
        return []
    mean_s = max(pool.hand_over.mean_s for pool in staged)
    pairs = [(pool.engines[0], pool.engines[1]) for pool in staged]
    return stage_notes(pairs, plan.link, mean_s)


def _stage_router_notes(plan: _Plan) -> tuple[str, ...]:
    return tuple(stage_router_notes(plan.dispatch)) if any(pool.stages for pool in plan.pools) else ()


def _cache_note(plan: _Plan) -> str:
    if plan.prefix_cache is None:
        return (
            "The laws prefill every prompt token, so no prefix is cached (--no-enable-prefix-caching): with the cache "
            "on, a fleet whose prompts repeat does better than planned."
        )
    return (
        "The plan counts on its prefix cache (--enable-prefix-caching): where less is found than it assumes, the fleet "
        "is too small. What is found, in tokens: vllm:prefix_cache_hits over vllm:prefix_cache_queries in /metrics. An "
        "instance that has just started finds nothing."
    )


def _host_notes(plan: _Plan) -> list[str]:
    """What keeps in the hosts' memory what the prefix caches let go, where the plan has that."""
    sizes = dict.fromkeys(
        engine.n_gpus * engine.host_cache.bytes_per_gpu for _, engine in plan.engines if engine.host_cache
    )
    if plan.prefix_cache is None or not sizes:
        return []
    each = " or ".join(f"{size / GIB:,.0f}" for size in sizes)
    return [
        f"The plan counts on {each} GiB of an instance's host memory behind its prefix cache, which is not written "
        "here: vLLM has --kv-offloading-size (GiB of all its GPUs together), not checked against this release."
    ]


def _affinity_notes(plan: _Plan) -> list[str]:
    """What sends prompts that begin alike to one instance."""
    if plan.dispatch not in MOST_LOAD_FRAC:
        return []
    most = f"{MOST_LOAD_FRAC[plan.dispatch]:g} times the mean"
    return [
        "Within a pool the router sends prompts that begin alike to one instance: a conversation by its first "
        "messages, others by their first bytes (PREFIX_BYTES in the Lua), or by the header x-prefix-key or the "
        f"request's own prompt_cache_key. An instance that has more than {most} in flight "
        "is passed over.",
        "Within a pool two others can stand in its place, neither of which is written here: the endpoint picker of "
        "Kubernetes' Gateway API Inference Extension (plugin prefix-cache-scorer of its EndpointPickerConfig), and the "
        "vllm-router of vLLM's production stack 0.1.13 (--routing-logic prefixaware, or session with --session-key). "
        "They follow prompts as far as they are alike, not their first messages alone.",
    ]
