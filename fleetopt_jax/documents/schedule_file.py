"""What is read of a file of a day by three plans: all that a page says of it."""

import os
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fleetopt_jax.documents.fields import Name, NotNegative, Part, Positive, read_as
from fleetopt_jax.documents.room import ChosenPart, RoomPart
from fleetopt_jax.documents.schedule import PLANS, SCHEMA

MAX_PERIODS = 100_000
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _ProfilePart(Part):
    name: Name
    clock: Literal["day", "calendar", "since"]
    repeats: bool
    note: str = ""
    mean_rate_per_s: Positive
    peak_over_mean: Positive
    source: Name | None = None


class _RunningPart(Part):
    start_up_s: NotNegative
    min_up_s: NotNegative
    start_j: NotNegative
    warm_spares: Count
    down_w_per_gpu: NotNegative
    reserved: bool


class _PeriodPart(Part):
    start_s: Finite
    length_s: Positive
    rate_per_s: NotNegative
    usd_per_kwh: Finite
    kg_co2_per_kwh: Finite


class _ByPeriodPart(Part):
    energy_kwh: list[Finite]
    usd: list[Finite]
    kg_co2: list[Finite]


class _PoolPart(Part):
    window_tokens: Positive
    gamma: Positive
    gpu: Name
    llm: Name
    precision: Name
    tp: Annotated[int, Field(ge=1)]
    ep: Annotated[int, Field(ge=1)] = 1
    dp: Annotated[int, Field(ge=1)] = 1
    pp: Annotated[int, Field(ge=1)] = 1
    n_instances: list[Count]
    n_started: list[Count]


class _PlanPart(Part):
    energy_kwh: Finite
    usd: Finite
    kg_co2: Finite
    slo_attainment: NotNegative | None
    n_gpus: list[Count]
    n_gpus_owned: Count
    n_starts: Count
    ttft_p99_s: list[NotNegative | None]
    itl_s: list[NotNegative | None] = Field([])  # files of before say none
    utilization: list[NotNegative | None] = Field([])
    room: list[RoomPart | None] = Field([])
    by_period: _ByPeriodPart
    pools: Annotated[list[_PoolPart], Field(min_length=1)]


class _PlansPart(Part):
    static: _PlanPart
    scheduled: _PlanPart
    elastic: _PlanPart


class _SavesPart(Part):
    energy_kwh: Finite
    usd: Finite
    kg_co2: Finite


class _SearchPart(Part):
    candidates: Name
    cost: Finite
    changing_windows_bound: Finite
    wall_s: NotNegative


class _QuarterPart(Part):
    quarter: Count
    peak_rate_per_s: Positive
    n_instances: list[Count]
    n_gpus: Count
    n_bought: int


class _GrowthPart(Part):
    factor_per_year: Positive
    quarters: Annotated[list[_QuarterPart], Field(min_length=1)]


class ScheduleFile(ChosenPart):
    """Of a day that was scheduled."""

    schema_name: Annotated[Literal["fleetopt-schedule/1"], Field(alias="schema")]
    version: Name
    objective: Literal["tok_per_j", "power", "usd", "co2", "gpus"] | dict[str, Any]
    profile: _ProfilePart
    running: _RunningPart
    span_s: Positive
    periods: Annotated[list[_PeriodPart], Field(min_length=1, max_length=MAX_PERIODS)]
    plans: _PlansPart
    saves: _SavesPart
    search: _SearchPart
    growth: _GrowthPart | None = None
    command: Name | None = None

    @model_validator(mode="after")
    def _of_every_period(self) -> "ScheduleFile":
        n = len(self.periods)
        for name in PLANS:
            plan: _PlanPart = getattr(self.plans, name)
            each = [plan.n_gpus, plan.ttft_p99_s, *vars(plan.by_period).values()]
            each += [counts for pool in plan.pools for counts in (pool.n_instances, pool.n_started)]
            each += [some for some in (plan.itl_s, plan.utilization, plan.room) if some]
            if any(len(some) != n for some in each):
                raise ValueError(f"plans.{name}: need a number for each of the {n:,} periods")
        return self


def read_schedule_file(path: str | os.PathLike) -> dict[str, Any]:
    """The document of a schedule file, of it what is read; or `BadInput` naming the first field that is wrong."""
    where = os.fspath(path)
    return read_as(ScheduleFile, where, SCHEMA, "schedule").model_dump(by_alias=True)
