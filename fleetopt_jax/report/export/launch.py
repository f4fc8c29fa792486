"""What each pool of a plan has to run, whatever starts it: the checkpoint and vLLM's flags, as the laws assumed them.

vLLM's own defaults are not those of the laws (it takes more of the memory, larger steps on the largest GPUs, and caches
prefixes), so everything a law reads is said.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.hosts import serving_titles
from fleetopt_jax.catalog.llms import KV_BYTES, LLMS, PRECISIONS, LlmEntry, at_precision, llm_entry
from fleetopt_jax.catalog.own import Catalog
from fleetopt_jax.catalog.spec import MEASURED_SERVING
from fleetopt_jax.core.errors import BadInput, unknown_name
from fleetopt_jax.core.files import first_problem
from fleetopt_jax.documents.plan import own_catalog
from fleetopt_jax.documents.plan_file import MAX_POOLS, SCHEMA, RouteByPart, SloPart, beside_plan
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions, parse_assumptions
from fleetopt_jax.laws.clocks import MIN_CLOCK_FRAC
from fleetopt_jax.laws.kv_cache import MEMORY_UTILIZATION
from fleetopt_jax.laws.llm import weight_bytes
from fleetopt_jax.report.export.router import router_document
from fleetopt_jax.report.verdict import LATENCIES, failing_said, repair_said
from fleetopt_jax.report.words import listed

VLLM_RELEASE = "0.33.0"
PORT = 8000
GPUS_PER_HOST = 8  # of a GPU that no catalog has
LEAST_DRAIN_S, MOST_DRAIN_S = 60, 600  # to finish what an instance has begun before it stops
NAME_LENGTH = 30  # of the fleet; leaves room for the pool, and for what Kubernetes appends, in the 63 of a label


@dataclass(frozen=True)
class PoolLaunch:
    """One pool's instances, all alike."""

    name: str
    gpu: str
    n_instances: int
    gpus_per_instance: int
    window_tokens: int  # longest request, prompt + output [tokens]
    drain_s: int  # what it has begun is given this long to end when the instance is stopped [s]
    n_active: float  # mean sequences in flight in an instance, as planned [-]
    checkpoint_bytes: float  # of its files, 0 where they are not known [B]
    args: tuple[str, ...]  # of `vllm serve`: the checkpoint, then --flag or --flag=value
    notes: tuple[str, ...]  # what whoever starts it must know or do


@dataclass(frozen=True)
class FleetLaunch:
    """All pools, shortest window first, and the router in front of them."""

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


class _Part(BaseModel):
    """Fields we compute may be there; those we read must be right."""

    model_config = ConfigDict(extra="ignore")


class _Pool(_Part):
    window_tokens: Annotated[int, Field(ge=1, le=10**9)]
    gpu: str
    llm: Annotated[str, Field(min_length=1)]
    tp: Annotated[int, Field(ge=1, le=10**6)]
    ep: Annotated[int, Field(ge=1, le=10**6)] = 1
    dp: Annotated[int, Field(ge=1, le=10**6)] = 1
    pp: Annotated[int, Field(ge=1, le=10**6)] = 1
    serving: str = MEASURED_SERVING
    max_num_batched_tokens_asked: Annotated[int, Field(ge=1, le=10**6)] | None = None
    n_instances: Annotated[int, Field(ge=1, le=10**9)]
    max_num_seqs: Annotated[int, Field(ge=1, le=10**9)]
    gamma: Annotated[float, Field(ge=1, le=10**6)] = 1.0
    precision: str | None = None
    kv_precision: str = "bf16"
    catalog_file: str | None = None
    clock_frac: Annotated[float, Field(ge=MIN_CLOCK_FRAC, le=1)] = 1.0
    memory_utilization: Annotated[float, Field(gt=0, le=1)] = MEMORY_UTILIZATION
    utilization: float | None = 0.0  # null is overload
    ttft_within_frac: float | None = None
    n_active: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    itl_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

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
    dispatch: Literal["jsq", "round_robin", "random", "affinity"] = "jsq"
    prefix_cache: dict[str, Any] | None = None
    route_by: RouteByPart | None = None
    verified: _Verified | None = None
    command: str | None = None
    workload: _Workload
    slo: SloPart = SloPart()
    broken: list[_Broken] = []  # which it breaks, where it was evaluated
    repair: _Repair | None = None
    pools: Annotated[list[_Pool], Field(max_length=MAX_POOLS)]


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
    if plan.prefix_cache is not None or plan.dispatch == "affinity":
        what = "prefix_cache" if plan.prefix_cache is not None else "dispatch"
        raise BadInput(f"{where}, {what}", "prefix caches and their routing cannot be exported yet", "plan without")
    if fault and not anyway:
        raise BadInput(where if fault.field is None else f"{where}, {fault.field}", fault.said, _mend(plan, where))
    models = _checked_models(models or {}, plan)
    fleet = dns_label(name, NAME_LENGTH)
    assumptions = parse_assumptions(plan.assume, f"{where}, assume")
    pools = tuple(
        _pool_launch(where, k, f"{fleet}-pool-{pool.window_tokens}", pool, models, assumptions, catalog)
        for k, pool in enumerate(plan.pools)
    )
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
        router=router_document(
            [pool.name for pool in pools],
            [pool.window_tokens for pool in pools],
            windows_of_plan=[pool.window_tokens for pool in plan.pools],
            gammas=[pool.gamma for pool in plan.pools],
            compression=assumptions.compression,
            length="prompt + max_tokens" if plan.route_by else "prompt + output tokens",
            dispatch=plan.dispatch,
            port=PORT,
        )
        | {"plan": "verified" if verified else "unverified"},
        notes=_fleet_notes(plan, assumptions),
    )


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
    )


def _served(pools: Sequence[PoolLaunch]) -> str:
    """The checkpoints that are served, each once."""
    return plain(f"Serves {listed(list(dict.fromkeys(pool.args[0] for pool in pools)))}.")


def _planned_on(plan: _Plan, assumptions: Assumptions) -> tuple[str, ...]:
    """The serving engines and releases that the steps of the plan were measured on, beside the release written for."""
    if assumptions.engine.name != PHYSICAL.engine.name:
        return ()
    titles = serving_titles()
    names = dict.fromkeys(titles.get(pool.serving, pool.serving) for pool in plan.pools)
    said = plain(f"Its steps are those of {listed(list(names))}; the flags are vLLM {VLLM_RELEASE}'s.")
    return (said,)


def _how_sure(plan: _Plan, where: str, fails: bool) -> tuple[str, ...]:
    if plan.verified is not None and not fails:
        return ("Verified: a simulation of every iteration held the plan's limits.",)
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
    for k, pool in enumerate(plan.pools):
        if pool.precision is not None and pool.precision.lower() not in PRECISIONS:
            raise unknown_name(f"{where}, pools.{k}.precision", pool.precision, PRECISIONS)
        if pool.kv_precision.lower() not in KV_BYTES:
            raise unknown_name(f"{where}, pools.{k}.kv_precision", pool.kv_precision, KV_BYTES)
    return plan


class _Fault(NamedTuple):
    """Why a fleet is known to fail."""

    field: str | None  # of the plan
    said: str


def _fault(plan: _Plan) -> _Fault | None:
    """What a plan is known to break, as it was evaluated or simulated; None of one that may be started."""
    if broken := failing_said(plan.model_dump()):
        return _Fault(None, f"the plan is infeasible: {broken}")
    for k, pool in enumerate(plan.pools):
        if pool.utilization is None or not pool.utilization < 1:
            return _Fault(f"pools.{k}.utilization", f"{_said(pool.utilization)}: the pool is overloaded")
    if plan.status == "infeasible":
        return _Fault("status", "the plan is infeasible")
    if plan.verified is not None and not plan.verified.held:
        return _Fault("verified.held", "false: in the simulation the fleet broke its limits")
    return None


def _mend(plan: _Plan, where: str) -> str:
    """What to do with a plan that fails."""
    grow, anyway = f"fleetopt evaluate {shlex.quote(where)} --repair --out grown.json", "--anyway exports it as it is"
    if plan.repair is None:
        return f"{grow} adds what it lacks; {anyway}"
    mended = repair_said(plan.model_dump())
    return f"{mended}; {anyway}" if plan.repair.instances_added is None else f"{mended} ({grow}); {anyway}"


def _said(utilization: float | None) -> str:
    return "null" if utilization is None else f"{utilization:.3g}"


def _checked_models(models: Mapping[str, str], plan: _Plan) -> dict[str, str]:
    """Refuse a checkpoint nobody asked for, and a name that vLLM would read as a flag or nobody could read."""
    llms = dict.fromkeys(_llm_name(pool) for pool in plan.pools)
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


def _pool_launch(
    plan: str,
    k: int,
    name: str,
    pool: _Pool,
    models: Mapping[str, str],
    assumptions: Assumptions,
    given: Catalog | None,
) -> PoolLaunch:
    """Of the k-th pool of the plan file `plan`, its names those of the `given` catalog, if any."""
    where, catalog = f"{plan}, pools.{k}", given or own_catalog(pool.catalog_file, plan)
    named = catalog.llm(beside_plan(_llm_name(pool), plan), f"{where}.llm")
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
    notes += _pool_notes(pool, step_tokens, _host_gpus(pool, catalog))
    flags: dict[str, Any] = {
        "served-model-name": _served_name(pool),
        "tensor-parallel-size": pool.tp,
        **_parallel_flags(where, pool, _host_gpus(pool, catalog)),
        "max-model-len": window_tokens,
        "max-num-seqs": pool.group_num_seqs,
        "max-num-batched-tokens": max(step_tokens, pool.group_num_seqs),
        "enable-chunked-prefill": None,
        "no-enable-prefix-caching": None,  # the laws prefill every prompt token
        "gpu-memory-utilization": pool.memory_utilization,
        **({"quantization": quantization} if quantization else {}),
        **({"kv-cache-dtype": "fp8"} if pool.kv_precision.lower() == "fp8" else {}),
        "shutdown-timeout": pool.drain_s,
        "port": PORT,
    }
    return PoolLaunch(
        name=name,
        gpu=pool.gpu.lower(),
        n_instances=pool.n_instances,
        gpus_per_instance=pool.n_gpus,
        window_tokens=window_tokens,
        drain_s=pool.drain_s,
        n_active=min(pool.n_active if pool.n_active is not None else math.inf, pool.max_num_seqs),
        checkpoint_bytes=_checkpoint_bytes(pool, named, models),
        args=(model, *(f"--{flag}" if value is None else f"--{flag}={value}" for flag, value in flags.items())),
        notes=tuple(plain(note) for note in notes),
    )


def _parallel_flags(where: str, pool: _Pool, host_gpus: int) -> dict[str, Any]:
    """What divides an instance besides tensor parallelism. vLLM divides the experts whole over all GPUs of a layer or
    over none, and counts hosts of equal numbers of GPUs."""
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
    if pool.n_gpus > host_gpus:
        flags["nnodes"] = math.ceil(pool.n_gpus / host_gpus)
    return flags


def _host_gpus(pool: _Pool, catalog: Catalog) -> int:
    """GPUs of one host of the pool."""
    known = GPUS | {gpu.name: gpu for gpu in catalog.gpus}
    name = pool.gpu.lower()
    return known[name].gpus_per_node if name in known else GPUS_PER_HOST


def _pool_notes(pool: _Pool, step_tokens: int, host_gpus: int) -> list[str]:
    """What is to be known of a pool beside its flags, where the laws assume steps of `step_tokens`."""
    notes = []
    if pool.group_num_seqs > step_tokens:
        notes.append(
            f"The laws assume {step_tokens:,} tokens a step; vLLM needs at least the {pool.group_num_seqs:,} of one "
            "token for every sequence."
        )
    if pool.n_gpus > host_gpus:
        n = math.ceil(pool.n_gpus / host_gpus)
        address = "--master-addr" + (" and --data-parallel-address" if pool.dp > 1 else "")
        notes.append(
            f"{pool.n_gpus} GPUs of one instance are more than the {host_gpus} of a host: start it on {n} hosts at "
            f"once, on each with its --node-rank from 0 to {n - 1} and rank 0's address as {address}, and with "
            "--headless on all but rank 0. A pod of a Kubernetes Deployment has one host: there it needs a "
            "LeaderWorkerSet, which is not written here."
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
    notes = [
        "The laws prefill every prompt token, so no prefix is cached (--no-enable-prefix-caching): with the cache on, "
        "a fleet whose prompts repeat does better than planned.",
    ]
    if any(pool.gamma > 1 for pool in plan.pools):
        notes.append(
            "The plan compresses prompts at the boundaries (compress_up_to_tokens in router.json). A gateway before "
            "the router has to do that: without one the fleet is too small."
        )
    if (assumptions.lengths, assumptions.kv_cache) != (PHYSICAL.lengths, PHYSICAL.kv_cache):
        notes.append(f"The plan was made under '{plain(plan.assume)}', which is not how vLLM works: see the ledger.")
    return tuple(plain(note) for note in notes)
