"""Kinds of values that several files hold."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_CHARS = 4096  # of a name

Name = Annotated[str, Field(min_length=1, max_length=MAX_CHARS, pattern=r"^[^\x00-\x1f\x7f]+$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Part(BaseModel):
    """Fields we compute may be there; those we read must be right."""

    model_config = ConfigDict(extra="ignore")
