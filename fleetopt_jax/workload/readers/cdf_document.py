"""A CDF of total request lengths as a JSON document."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import invalid, parse_json
from fleetopt_jax.workload.atoms import OUTPUT_SHARE
from fleetopt_jax.workload.cdf import MAX_CDF_TOKENS, MAX_KNOTS, check_cdf
from fleetopt_jax.workload.readers.records import CdfFile

Knot = tuple[
    Annotated[
        float, Field(description=f"Total request length [tokens]: a whole number, 1 to {MAX_CDF_TOKENS}, rising.")
    ],
    Annotated[float, Field(description="Share of requests that are at most this long [-]: 0 to 1, never falling.")],
]
Knots = Annotated[
    list[Knot],
    Field(
        title="CDF",
        fail_fast=True,
        description=f"[[tokens, fraction], ...], the last fraction 1; at most {MAX_KNOTS} knots. "
        "Linear in between, from [0, 0], which may be left out.",
    ),
]


class CdfObject(BaseModel):
    """A CDF of total request lengths, and how a length splits into prompt and output."""

    model_config = ConfigDict(extra="allow", title="CDF with its output share")
    cdf: Knots
    output_share: Annotated[
        float, Field(gt=0, lt=1, title="Output share", description="Output tokens of a request's total length [-].")
    ] = OUTPUT_SHARE


class CdfDocument(RootModel[CdfObject | Knots]):
    """A CDF file as it may be written: the knots alone, or an object that holds them. More fields are ignored."""

    model_config = ConfigDict(title="CDF of request lengths")


def parse_cdf(where: str, data: bytes) -> CdfFile:
    """The CDF in a JSON document, or `BadInput`."""
    document = parse_json(where, data)
    bare = isinstance(document, list)
    if bare:
        document = {"cdf": document}
    if not isinstance(document, dict) or "cdf" not in document:
        raise BadInput(where, "holds no CDF", 'need [[tokens, fraction], ...] or {"cdf": [[tokens, fraction], ...]}')
    if isinstance(document["cdf"], list) and len(document["cdf"]) > MAX_KNOTS:
        raise BadInput(where, f"the CDF has {len(document['cdf'])} knots", f"need at most {MAX_KNOTS}")
    try:
        parsed = CdfObject.model_validate(document)
    except ValidationError as error:
        raise invalid(where, data, error, 'need "cdf": [[tokens, fraction], ...]', within=int(bare)) from None
    knots = parsed.cdf[1:] if parsed.cdf[:1] == [(0.0, 0.0)] else parsed.cdf  # the origin goes without saying
    check_cdf(where, knots)
    return CdfFile(knots, parsed.output_share)
