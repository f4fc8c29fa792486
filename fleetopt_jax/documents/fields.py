"""Kinds of values that several files hold, and how a file that a command wrote is read."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleetopt_jax.core.files import invalid, parse_json, read_bytes

MAX_CHARS = 4096  # of a name

Name = Annotated[str, Field(min_length=1, max_length=MAX_CHARS, pattern=r"^[^\x00-\x1f\x7f]+$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Part(BaseModel):
    """Fields we compute may be there; those we read must be right."""

    model_config = ConfigDict(extra="ignore")


Model = TypeVar("Model", bound=BaseModel)


def schema_of(path: str) -> str | None:
    """What a JSON file says it is, if it does."""
    document = parse_json(path, read_bytes(path))
    said = document.get("schema") if isinstance(document, dict) else None
    return said if isinstance(said, str) else None


def read_as(model: type[Model], path: str, schema: str, command: str) -> Model:
    """A JSON file checked as `model`, or `BadInput` naming the first field that is wrong, its value and its line."""
    data = read_bytes(path)
    try:
        return model.model_validate(parse_json(path, data))
    except ValidationError as error:
        raise invalid(path, data, error, f"need a {schema} file as fleetopt {command} --json prints it") from None
