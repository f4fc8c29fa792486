"""What a plan file may hold (`fleetopt-plan/1`): those fields that are read, each with its range."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fleetopt_jax.catalog.links import DEFAULT_LINK, LINKS
from fleetopt_jax.catalog.spec import MEASURED_SERVING, KvLink
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import invalid, parse_json, read_bytes
from fleetopt_jax.documents.drafts import SpeculatePart
from fleetopt_jax.documents.failures import FailureRatesPart, ReservePart
from fleetopt_jax.documents.fields import Name, NotNegative, Part, Positive
from fleetopt_jax.fleet.choices.prefix_cache import ConstantHits, PrefixCache, WorkingSetCache
from fleetopt_jax.fleet.choices.routing_key import PromptAndLimit, RoutingKey, StickySessions
from fleetopt_jax.fleet.resources import OBJECTIVES, Objective
from fleetopt_jax.laws.clocks import MIN_CLOCK_FRAC
from fleetopt_jax.laws.kv_cache import MEMORY_UTILIZATION
from fleetopt_jax.laws.prefix_cache import HOST_LINK_BYTES_PER_S
from fleetopt_jax.workload.profile import At

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import Layout

SCHEMA = "fleetopt-plan/1"
MAX_POOLS = 16


class ColumnsPart(Part):
    prompt: Name | None = None  # these two: a known layout's
    output: Name | None = None
    time: Name | None = None
    time_unit_s: Positive | None = None  # none: what the stamps tell
    count: Name | None = None
    zero_output: Literal["keep", "drop"] = "keep"
    block_tokens: Annotated[int, Field(ge=1, le=10**6)] | None = None  # none: the layout's


class HourPart(Part):
    """The hour of its trace that a plan is for."""

    mean_rate_per_s: Positive


class WorkloadPart(Part):
    name: Name
    file: Name | None = None  # of a trace: its path as seen from the plan's folder
    arrival_rate_per_s: Positive
    mean_prompt_tokens: float | None = None
    mean_output_tokens: float | None = None
    digest: Name | None = None
    columns: ColumnsPart | None = None
    at: At = "mean"
    hour: HourPart | None = None


class SloPart(Part):
    ttft_p99_s: Positive = 0.5
    ttft_s_per_token: NotNegative = 0.0
    itl_s: Positive | None = None  # JSON has no infinity: none is no limit
    max_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    scope: Literal["pool", "fleet"] = "pool"

    def limits(self) -> dict[str, Any]:
        """As `make_slo` takes them."""
        return self.model_dump() | {"itl_s": math.inf if self.itl_s is None else self.itl_s}


class SitePart(Part):
    host_w_per_gpu: NotNegative = 0.0
    pue: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    usd_per_kwh: NotNegative = 0.0
    kg_co2_per_kwh: NotNegative = 0.0


class CompressorPart(Part):
    success_frac: Annotated[float, Field(ge=0, le=1)] = 1.0
    s_per_token: NotNegative = 0.0
    j_per_token: NotNegative = 0.0


class HostCachePart(Part):
    """Memory of its host behind the prefix cache of each GPU."""

    bytes_per_gpu: Positive
    bytes_per_s_per_gpu: Positive = HOST_LINK_BYTES_PER_S

    @property
    def as_run(self) -> dict[str, float]:
        """As a spec has it."""
        return {"host_cache_bytes": self.bytes_per_gpu, "host_cache_bytes_per_s": self.bytes_per_s_per_gpu}


class EnginePart(Part):
    """An engine: of a pool, or of one of its stages."""

    gpu: Name
    llm: Name
    tp: Annotated[int, Field(ge=1)]
    ep: Annotated[int, Field(ge=1)] = 1
    dp: Annotated[int, Field(ge=1)] = 1
    pp: Annotated[int, Field(ge=1)] = 1
    serving: Name = MEASURED_SERVING  # of plans that say none: there was no other
    n_instances: Annotated[int, Field(ge=1, le=10**9)]
    precision: Name | None = None
    kv_precision: Name | None = None  # the checkpoint's
    engine_file: Name | None = None
    catalog_file: Name | None = None  # of one's own, from the plan's folder, that its GPU or its LLM was found in
    usd_per_gpu_h: NotNegative | None = None  # none: the catalog's
    laws: Literal["own"] | None = None  # of an engine that neither names nor a file describe
    max_num_seqs_asked: Annotated[int, Field(ge=1, le=10**6)] | None = None  # of this pool alone
    max_num_batched_tokens_asked: Annotated[int, Field(ge=1, le=10**6)] | None = None
    memory_utilization: Annotated[float, Field(gt=0, le=1)] = MEMORY_UTILIZATION
    host_cache: HostCachePart | None = None  # none: what its prefix cache lets go is lost
    clock_frac: Annotated[float, Field(ge=MIN_CLOCK_FRAC, le=1)] = 1.0
    power_limit_w: Positive | None = None  # of each board; none: its TDP
    speculate: SpeculatePart | None = None


class StagePart(EnginePart):
    """One of the two stages of a pool."""

    role: Literal["prefill", "decode"]


def stages_in_order(stages: list[Any] | None) -> list[Any] | None:
    """Validates those of a pool, which have a `role`."""
    if stages and [stage.role for stage in stages] != ["prefill", "decode"]:
        raise PydanticCustomError("stages", "Input should be a prefill stage, then a decode stage")
    return stages


class PoolPart(EnginePart):
    """A pool. Where it has two stages those say its engines, and its own fields are of the one that decodes."""

    window_tokens: Annotated[int, Field(ge=1, le=10**9)]
    gamma: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    stages: Annotated[list[StagePart], Field(min_length=2, max_length=2)] | None = None

    _in_order = field_validator("stages")(stages_in_order)


class LinkPart(Part):
    """What KV caches are handed over by."""

    name: Name
    bytes_per_s: Positive
    latency_s: NotNegative


class SearchPart(Part):
    """How a plan was found."""

    n_evaluated: Annotated[int, Field(ge=0)]
    wall_s: NotNegative
    candidates: Name
    asked: Name
    lower_bound: float | None = None
    gap: float | None = None
    by_pools: tuple[float | None, ...] = ()
    n_engines: Annotated[int, Field(ge=1)] = 1


class MetricsPart(Part):
    """What a plan promises, to tell whether it still does."""

    tok_per_j: Positive
    gain_vs_homogeneous: float | None = None


class OnePoolPart(Part):
    """The best fleet with one pool, of what the search had to choose from."""

    gpu: Name
    tp: Annotated[int, Field(ge=1)]
    n_instances: Annotated[int, Field(ge=1)]
    n_gpus: Annotated[int, Field(ge=1)]
    power_w: Positive
    usd_per_h: NotNegative
    kg_co2_per_h: NotNegative
    tok_per_j: Positive
    ep: Annotated[int, Field(ge=1)] = 1
    dp: Annotated[int, Field(ge=1)] = 1
    pp: Annotated[int, Field(ge=1)] = 1


class BudgetPart(BaseModel):
    model_config = ConfigDict(extra="allow")  # gpus_of.NAME
    max_gpus: Positive = math.inf
    max_power_w: Positive = math.inf
    max_usd_per_h: Positive = math.inf
    max_kg_co2_per_h: Positive = math.inf
    __pydantic_extra__: dict[str, NotNegative] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    def limits(self) -> dict[str, Any]:
        """As `make_budget` takes them."""
        stock = {name.removeprefix("gpus_of."): count for name, count in (self.model_extra or {}).items()}
        return {name: getattr(self, name) for name in type(self).model_fields} | {"gpus_of": stock}


class RouteByPart(BaseModel):
    """A routing key other than the total length."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["prompt_and_limit", "sticky_sessions"]
    max_tokens: Positive | None = None  # of the first
    headroom: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None  # of the second

    @model_validator(mode="after")
    def _has_its_own(self) -> Self:
        own, other = ("max_tokens", "headroom") if self.name == "prompt_and_limit" else ("headroom", "max_tokens")
        if getattr(self, own) is None or getattr(self, other) is not None:
            raise PydanticCustomError("own_field", f"{self.name} needs {own}, and nothing else")
        return self

    @property
    def choice(self) -> RoutingKey:
        return PromptAndLimit(self.max_tokens) if self.max_tokens is not None else StickySessions(self.headroom or 1.0)


class PrefixCachePart(BaseModel):
    """What of prompts is found in the KV cache, where anything is."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["constant", "working_set"]
    hit_frac: Annotated[float, Field(ge=0, lt=1)] | None = None  # of a constant

    @property
    def choice(self) -> PrefixCache:
        return WorkingSetCache() if self.hit_frac is None else ConstantHits(self.hit_frac)


class PricesPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    power_w: NotNegative = 0.0
    usd_per_h: NotNegative = 0.0
    kg_co2_per_h: NotNegative = 0.0
    n_gpus: NotNegative = 0.0
    gpus_of: dict[str, NotNegative] = {}


class WeightsPart(BaseModel):
    """An objective that is none of the named ones: prices of a unit of each resource."""

    model_config = ConfigDict(extra="forbid")
    weights: PricesPart


def _named(objective: Any) -> Any:
    """Refuse what is neither a known name nor prices in one line: a union would say what is wrong with each."""
    if not isinstance(objective, dict) and objective not in tuple(OBJECTIVES):
        names = ", ".join(map(repr, OBJECTIVES))
        raise PydanticCustomError("literal_error", "Input should be {names} or weights", {"names": names})
    return objective


ObjectiveField = Annotated[
    Annotated[Objective, Tag("name")] | Annotated[WeightsPart, Tag("weights")],
    Discriminator(lambda objective: "name" if isinstance(objective, str) else "weights"),
    BeforeValidator(_named),
]


class HeldPart(Part):
    """What is read of a plan's simulation."""

    held: bool


class PlanFile(Part):
    """What is read of a plan; its metrics are computed anew."""

    schema_name: Annotated[Literal["fleetopt-plan/1"], Field(alias="schema")]
    assume: str = "physical"
    output_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    workload: WorkloadPart
    slo: SloPart = SloPart()
    budget: BudgetPart = BudgetPart()
    status: Literal["optimal", "feasible", "infeasible"] = "feasible"
    method: Literal["exact", "grid", "gradient", "given"] = "given"
    search: SearchPart | None = None
    metrics: MetricsPart | None = None
    one_pool: OnePoolPart | None = None
    objective: ObjectiveField = "tok_per_j"
    site: SitePart = SitePart()
    compressor: CompressorPart = CompressorPart()
    dispatch: Literal["jsq", "round_robin", "random", "affinity", "bounded_hash"] = "jsq"
    prefix_cache: PrefixCachePart | None = None
    reserve: ReservePart | None = None  # what may be down; none: nothing
    failure_rates: FailureRatesPart | None = None
    route_by: RouteByPart | None = None
    max_num_seqs: Annotated[int, Field(ge=1, le=10**6)] | None = None  # asked of every engine; none: vLLM's default
    command: Name | None = None  # that found it
    verified: HeldPart | None = None
    serve: Literal["mixed", "disaggregated", "any"] = "mixed"  # of plans that say none: there was no other
    kv_link: LinkPart | None = None  # none: the default
    pools: Annotated[list[PoolPart], Field(min_length=1, max_length=MAX_POOLS)]

    @property
    def link(self) -> KvLink:
        """What its two stages have between them."""
        return KvLink(**self.kv_link.model_dump()) if self.kv_link else LINKS[DEFAULT_LINK]

    def with_host_cache(self, bytes_per_gpu: float | None, bytes_per_s_per_gpu: float | None) -> "PlanFile":
        """With other memory of the hosts behind the prefix caches of all pools, or another way to it; what is None
        stays. No bytes are none."""

        def other(part: HostCachePart | None) -> HostCachePart | None:
            size = (part.bytes_per_gpu if part else 0.0) if bytes_per_gpu is None else bytes_per_gpu
            usual = part.bytes_per_s_per_gpu if part else HOST_LINK_BYTES_PER_S
            speed = bytes_per_s_per_gpu or usual
            return HostCachePart(bytes_per_gpu=size, bytes_per_s_per_gpu=speed) if size else None

        pools = [pool.model_copy(update={"host_cache": other(pool.host_cache)}) for pool in self.pools]
        return self.model_copy(update={"pools": pools})

    @property
    def n_instances(self) -> list[Any]:
        """Of each pool; pairs where one has two stages."""
        if not any(pool.stages for pool in self.pools):
            return [pool.n_instances for pool in self.pools]
        counts = [[each.n_instances for each in pool.stages or [pool]] for pool in self.pools]
        return [row + [0] * (2 - len(row)) for row in counts]

    @property
    def sticky(self) -> float | None:
        """The headroom of its sticky sessions, if it has any."""
        return self.route_by.choice.sticky if self.route_by else None

    @property
    def mean_rate_per_s(self) -> float:
        """Of all hours of its trace [1/s]."""
        return self.workload.hour.mean_rate_per_s if self.workload.hour else self.workload.arrival_rate_per_s

    @property
    def layout(self) -> "Layout | None":
        """The columns its trace was read by, if they were named."""
        from fleetopt_jax.workload.readers import Layout  # and pyarrow, which bundled workloads do without

        columns = self.workload.columns
        return Layout(**columns.model_dump()) if columns else None


def seen_from_plan(name: str, plan: str | os.PathLike) -> str | None:
    """A file's path relative to the folder of a plan, to be found there however both are moved together; None of an
    absolute path, or of what is no file here."""
    folder = os.path.dirname(os.path.abspath(plan))
    if os.path.isabs(name) or not os.path.isfile(name):
        return None
    return Path(os.path.relpath(name, folder)).as_posix()


def from_plan(name: str, plan: str | os.PathLike) -> str | None:
    """The way back: how a file that is seen from a plan's folder is called here; None of what is no file there."""
    place = os.path.join(os.path.dirname(os.fspath(plan)), name)
    return os.path.normpath(place) if not os.path.isabs(name) and os.path.isfile(place) else None


def beside_plan(name: str, plan: str | os.PathLike, file: str | None = None) -> str:
    """Where a file that a plan names lies, as seen from here: in the plan's folder, at `file` or else by its name; if
    it is not there, the name as it is, in the current folder."""
    folder = os.path.dirname(os.fspath(plan))
    for each in (file, name):
        place = os.path.normpath(os.path.join(folder, each)) if each else ""
        if place and not os.path.isabs(each or "") and os.path.isfile(place):
            return place
    return name


def read_plan_file(path: str | os.PathLike) -> PlanFile:
    """What a plan file says, or `BadInput` naming the first field that is wrong."""
    where = os.fspath(path)
    data = read_bytes(where)
    document = parse_json(where, data)
    if isinstance(document, dict) and document.get("schema") == SCHEMA and document.get("pools") == []:
        raise BadInput(where, "the plan has no pools, for no fleet held its limits", "need a plan that was found")
    try:
        plan = PlanFile.model_validate(document)
    except ValidationError as error:
        raise invalid(where, data, error, f"need a {SCHEMA} file as fleetopt optimize --json prints it") from None
    if plan.serve == "mixed" and any(pool.stages for pool in plan.pools):
        raise BadInput(where, "serve = 'mixed', and a pool has stages", "need 'disaggregated' or 'any'")
    windows = [pool.window_tokens for pool in plan.pools]
    if windows != sorted(set(windows)):
        raise BadInput(where, f"pools.window_tokens = {windows}", "need rising windows")
    return plan
