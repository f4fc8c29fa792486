"""How much more traffic a fleet carries, as services and days have it, and how files of either are read."""

from typing import Any, Literal

from pydantic import Field

from fleetopt_jax._optimize.room import Room
from fleetopt_jax.documents.fields import Name, NotNegative, Part, Positive
from fleetopt_jax.documents.plan_file import PrefixCachePart, ReservePart


def room_to_json(room: Room | None) -> dict[str, Any] | None:
    """`rate_per_s` is the most that is carried, `limit` what a little more breaks, `pool` counts from 1; null is all
    requests together, and of a fleet that carries nothing all of it."""
    if room is None:
        return None
    pool = None if room.pool is None else room.pool + 1
    return {"rate_per_s": room.rate_per_s, "limit": room.limit, "pool": pool}


class RoomPart(Part):
    rate_per_s: Positive
    limit: Literal["utilization", "ttft_p99_s", "itl_s"]
    pool: int | None = Field(None, ge=1)


class PromisedPart(Part):
    """Limits of latencies and of the load."""

    ttft_p99_s: Positive
    ttft_s_per_token: NotNegative = 0.0
    itl_s: Positive | None = None
    max_utilization: Positive
    scope: Literal["pool", "fleet"] = "pool"


class TrafficPart(Part):
    name: Name
    arrival_rate_per_s: NotNegative
    mean_prompt_tokens: NotNegative
    mean_output_tokens: NotNegative
    digest: Name | None = None
    reused_frac: NotNegative | None = None


class ChosenPart(Part):
    """What a fleet was asked for besides its limits, and how that is said."""

    assume: Name
    output_share: NotNegative | None = None
    assumptions: dict[Name, Name]
    dispatch: Name
    power_scope: Name
    workload: TrafficPart
    slo: PromisedPart
    site: dict[Name, float]
    prefix_cache: PrefixCachePart | None = None
    reserve: ReservePart | None = None
