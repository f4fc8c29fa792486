"""Files that enter by the command line, validated before anything is computed."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleetopt_jax.calibrate.document import EngineFile
from fleetopt_jax.calibrate.measurements import MeasurementsRow
from fleetopt_jax.catalog.hf_config import HfConfig
from fleetopt_jax.cli.scenario import Name, NotNegative, Positive, Scenario
from fleetopt_jax.core.documents import invalid, parse_json, read_bytes
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.laws.clocks import MIN_CLOCK_FRAC
from fleetopt_jax.optimize.plan import SCHEMA
from fleetopt_jax.workload.readers import CdfDocument


class _Part(BaseModel):
    """Fields we compute may be there; those we read must be right."""

    model_config = ConfigDict(extra="ignore")


class ColumnsPart(_Part):
    prompt: Name
    output: Name
    time: Name | None = None
    time_unit_s: Positive = 1.0


class WorkloadPart(_Part):
    name: Name
    arrival_rate_per_s: Positive
    digest: Name | None = None
    columns: ColumnsPart | None = None


class SloPart(_Part):
    ttft_p99_s: Positive = 0.5
    ttft_s_per_token: NotNegative = 0.0
    itl_s: Positive | None = None  # JSON has no infinity: none is no limit
    max_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    scope: Literal["pool", "fleet"] = "pool"

    def limits(self) -> dict[str, Any]:
        """As `make_slo` takes them."""
        return self.model_dump() | {"itl_s": math.inf if self.itl_s is None else self.itl_s}


class SitePart(_Part):
    host_w_per_gpu: NotNegative = 0.0
    pue: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    usd_per_kwh: NotNegative = 0.0
    kg_co2_per_kwh: NotNegative = 0.0


class CompressorPart(_Part):
    success_frac: Annotated[float, Field(ge=0, le=1)] = 1.0
    s_per_token: NotNegative = 0.0
    j_per_token: NotNegative = 0.0


class PoolPart(_Part):
    window_tokens: Annotated[int, Field(ge=1, le=10**9)]
    gpu: Name
    llm: Name
    tp: Annotated[int, Field(ge=1)]
    n_instances: Annotated[int, Field(ge=1, le=10**9)]
    gamma: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    precision: Name | None = None
    kv_precision: str = "bf16"
    engine_file: Name | None = None
    max_num_seqs_asked: Annotated[int, Field(ge=1, le=10**6)] | None = None  # of this pool alone
    clock_frac: Annotated[float, Field(ge=MIN_CLOCK_FRAC, le=1)] = 1.0


class SearchPart(_Part):
    """How a plan was found."""

    n_evaluated: Annotated[int, Field(ge=0)]
    wall_s: NotNegative
    candidates: Name
    asked: Name
    lower_bound: float | None = None
    gap: float | None = None
    by_pools: tuple[float | None, ...] = ()


class MetricsPart(_Part):
    """What a plan promises, to tell whether it still does."""

    tok_per_j: Positive


class BudgetPart(BaseModel):
    model_config = ConfigDict(extra="allow")  # gpus_of.NAME
    max_gpus: Positive = math.inf
    max_power_w: Positive = math.inf
    max_usd_per_h: Positive = math.inf
    __pydantic_extra__: dict[str, NotNegative]

    def limits(self) -> dict[str, Any]:
        """As `make_budget` takes them."""
        stock = {name.removeprefix("gpus_of."): count for name, count in self.__pydantic_extra__.items()}
        return {name: getattr(self, name) for name in type(self).model_fields} | {"gpus_of": stock}


class PlanFile(_Part):
    """What `evaluate` needs of a plan; its metrics are recomputed."""

    schema_name: Annotated[Literal["fleetopt-plan/1"], Field(alias="schema")]
    assume: str = "physical"
    workload: WorkloadPart
    slo: SloPart = SloPart()
    budget: BudgetPart = BudgetPart()
    status: Literal["optimal", "feasible", "infeasible"] = "feasible"
    method: Literal["exact", "grid", "gradient", "given"] = "given"
    search: SearchPart | None = None
    metrics: MetricsPart | None = None
    objective: Literal["tok_per_j", "usd", "power", "gpus"] = "tok_per_j"
    site: SitePart = SitePart()
    compressor: CompressorPart = CompressorPart()
    dispatch: Literal["jsq", "round_robin", "random"] = "jsq"
    max_num_seqs: Annotated[int, Field(ge=1, le=10**6)] | None = None  # asked of every engine; none: vLLM's default
    pools: Annotated[list[PoolPart], Field(min_length=1, max_length=16)]


def read_plan(path: str) -> PlanFile:
    """A plan file, or `BadInput` naming the first field that is wrong."""
    data = read_bytes(path)
    document = parse_json(path, data)
    if isinstance(document, dict) and document.get("schema") == SCHEMA and document.get("pools") == []:
        raise BadInput(path, "the plan has no pools, for no fleet held its limits", "need a plan that was found")
    try:
        plan = PlanFile.model_validate(document)
    except ValidationError as error:
        raise invalid(path, data, error, f"need a {SCHEMA} file as fleetopt optimize --json prints it") from None
    windows = [pool.window_tokens for pool in plan.pools]
    if windows != sorted(set(windows)):
        raise BadInput(path, f"pools.window_tokens = {windows}", "need rising windows")
    return plan


def schemas() -> dict[str, Any]:
    """The JSON Schema of every file that is read, by what it is."""
    models = {
        "scenario": Scenario,
        "plan": PlanFile,
        "engine": EngineFile,
        "CDF": CdfDocument,
        "Hugging Face config": HfConfig,
        "row of measurements": MeasurementsRow,
    }
    return {name: model.model_json_schema() for name, model in models.items()}
