"""What is read of a file of services that share a budget: all that a page says of them."""

import os
from typing import Annotated, Any, Literal

from pydantic import Field

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import parse_json, read_bytes
from fleetopt_jax.documents.fields import Name, NotNegative, Part, Positive, read_as
from fleetopt_jax.documents.plan_file import MAX_POOLS
from fleetopt_jax.documents.room import ChosenPart, RoomPart
from fleetopt_jax.documents.services import SCHEMA

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _StagePart(Part):
    """An engine, and how many there are of it."""

    gpu: Name
    tp: Annotated[int, Field(ge=1)]
    ep: Annotated[int, Field(ge=1)] = 1
    dp: Annotated[int, Field(ge=1)] = 1
    pp: Annotated[int, Field(ge=1)] = 1
    n_instances: Count
    n_gpus: Count
    engine_file: Name | None = None
    engine_quality: Name
    engine_of_catalog: list[Name] = Field([])
    engine_step_error: NotNegative | None = None
    engine_power_error: NotNegative | None = None
    engine_prefill_error: NotNegative | None = None


class _OfTwoPart(_StagePart):
    role: Name


class _PoolPart(_StagePart):
    window_tokens: Positive
    gamma: Positive
    llm: Name
    precision: Name
    kv_precision: Name
    traffic_frac: NotNegative
    utilization: NotNegative | None
    ttft_p99_s: NotNegative | None
    itl_s: NotNegative | None
    stages: list[_OfTwoPart] | None = None


class _OfServicePart(ChosenPart):
    """The plan of a service."""

    pools: Annotated[list[_PoolPart], Field(min_length=1, max_length=MAX_POOLS)]


class _ServicePart(Part):
    name: Name
    promise: Annotated[Literal["interactive", "batch"], Field(alias="class")]
    end_to_end_s: Positive | None
    llm: Name
    rate_per_s: Positive
    gpus_of: dict[Name, Count]
    power_w: Positive
    usd_per_h: NotNegative
    tok_per_j: NotNegative
    utilization: NotNegative | None
    ttft_p99_s: NotNegative | None
    itl_s: NotNegative | None
    ends_s: NotNegative | None
    room: RoomPart | None = None  # files of before say none
    plan: _OfServicePart


class _WorthPart(Part):
    n_gpus: Count
    saved: Finite
    certified: bool


class _KindPart(Part):
    gpu: Name
    stock: NotNegative | None
    may_buy: NotNegative
    usd_per_gpu_h: NotNegative
    buy_usd_per_gpu_h: NotNegative | None
    used: Count
    bought: Count
    worth: list[_WorthPart]


class _SharedPart(Part):
    """A limit of all services together."""

    limit: Annotated[Name, Field(pattern=r"^(max_(gpus|power_w|usd_per_h|kg_co2_per_h)|gpus_of\..+)$")]
    cap: NotNegative
    with_bought: NotNegative
    used: NotNegative
    by_service: dict[Name, NotNegative]
    price: Finite


class _AllPart(Part):
    tok_per_j: NotNegative
    output_tok_per_s: NotNegative
    power_w: Positive
    usd_per_h: Finite
    kg_co2_per_h: Finite
    n_gpus: Count
    surcharge_usd_per_h: NotNegative


class _SearchPart(Part):
    candidates: Name
    n_evaluated: Count
    wall_s: NotNegative
    gap: NotNegative | None


class ServicesFile(Part):
    """Of fleets that were found."""

    schema_name: Annotated[Literal["fleetopt-services/1"], Field(alias="schema")]
    version: Name
    status: Literal["optimal", "feasible"]
    assume: Name
    objective: Literal["tok_per_j", "power", "usd", "co2", "gpus"] | dict[str, Any]
    cost: Name
    services: Annotated[list[_ServicePart], Field(min_length=1)]
    gpus: list[_KindPart]
    limits: list[_SharedPart]
    metrics: _AllPart
    search: _SearchPart
    command: Name | None = None


def read_services_file(path: str | os.PathLike) -> dict[str, Any]:
    """The document of a services file, of it what is read; or `BadInput` naming the first field that is wrong."""
    where = os.fspath(path)
    document = parse_json(where, read_bytes(where))
    if isinstance(document, dict) and document.get("schema") == SCHEMA and document.get("status") == "infeasible":
        raise BadInput(where, "no fleets held what the services are promised", "need services that were planned")
    return read_as(ServicesFile, where, SCHEMA, "services").model_dump(by_alias=True)
