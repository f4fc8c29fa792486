"""A calibrated engine as JSON (`fleetopt-engine/1`): written here, and checked whole when it is read."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fleetopt_jax.calibrate.fit import DecodeFit, Form, PowerFit
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.laws.decode import DecodeStep, make_decode_step
from fleetopt_jax.laws.power import LogisticPower, make_logistic_power
from fleetopt_jax.workload.readers import first_problem, parse_json, read_bytes

SCHEMA = "fleetopt-engine/1"
MAX_TP = 64

Name = Annotated[str, Field(min_length=1, max_length=200)]
Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class EngineDocument:
    """A read document: checked records under their names. `power` is None where no power was measured."""

    gpu: str
    llm: str
    tp: int
    precision: str | None
    step_error: float  # leave-one-out mean relative error
    power_error: float | None
    source: str
    decode: DecodeStep
    power: LogisticPower | None


def to_document(
    decode_fit: DecodeFit,
    power_fit: PowerFit | None,
    *,
    gpu: str,
    llm: str,
    tp: int,
    precision: str | None,
    source: str,
) -> dict[str, Any]:
    """The engine under its names, with how it was fitted."""
    decode = {"form": decode_fit.form, **_fit(decode_fit), "context_tokens": decode_fit.context_tokens}
    power = power_fit and {"identified": power_fit.identified, **_fit(power_fit)}
    return {
        "schema": SCHEMA,
        "gpu": gpu,
        "llm": llm,
        "tp": tp,
        "precision": precision,
        "quality": "measured",
        "relative_error": {
            "step": decode_fit.leave_one_out_mape,
            "power": power_fit and power_fit.leave_one_out_mape,
        },
        "source": source,
        "decode": _numbers(decode_fit.step),
        "power": power_fit and _numbers(power_fit.power),
        "fit": {"decode": decode, "power": power},
    }


def read_document(path: str | os.PathLike) -> EngineDocument:
    """The engine in a JSON file, every number of it checked."""
    where = os.fspath(path)
    content = parse_json(where, read_bytes(where))
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        raise BadInput(where, f"schema = {found!r}", f"need {SCHEMA!r}: a file that `fleetopt calibrate` writes")
    try:
        read = _Document.model_validate(content)
        decode = make_decode_step(**read.decode.model_dump())
        power = read.power and make_logistic_power(**read.power.model_dump())
    except ValidationError as error:
        raise BadInput(where, first_problem(error)) from None
    except ValueError as error:
        raise BadInput(where, str(error)) from None
    errors = read.relative_error
    names = (read.gpu, read.llm, read.tp, read.precision)
    return EngineDocument(*names, errors.step, errors.power, read.source, decode, power)


def _numbers(record: Any) -> dict[str, float]:
    return {field.name: float(getattr(record, field.name)) for field in dataclasses.fields(record)}


def _fit(fit: DecodeFit | PowerFit) -> dict[str, Any]:
    return {
        "estimates": fit.estimates,
        "standard_errors": fit.standard_errors,
        "covariance": fit.covariance.tolist(),
        "fit_mape": fit.mape,
        "max_ape": fit.max_ape,
        "leave_one_out_mape": fit.leave_one_out_mape,
        "n_points": len(fit.residuals),
        "batch_min": float(fit.batch.min()),
        "batch_max": float(fit.batch.max()),
        "notes": list(fit.notes),
    }


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class _Decode(_Strict):
    base_s: Positive
    expert_s: AtLeast0
    expert_share: AtLeast0
    per_seq_s: AtLeast0
    per_token_s: AtLeast0
    windowed_token_s: AtLeast0
    window_tokens: AtLeast0


class _Power(_Strict):
    idle_w: AtLeast0
    nominal_w: Positive
    steepness: Positive
    log2_half_batch: float


class _Errors(_Strict):
    step: AtLeast0
    power: AtLeast0 | None


class _Fit(_Strict):
    estimates: dict[str, float]
    standard_errors: dict[str, AtLeast0]
    covariance: list[list[float]]
    fit_mape: AtLeast0
    max_ape: AtLeast0
    leave_one_out_mape: AtLeast0
    n_points: Annotated[int, Field(ge=1)]
    batch_min: Positive
    batch_max: Positive
    notes: list[str]

    @model_validator(mode="after")
    def _sizes_agree(self):
        sizes = {len(self.estimates), len(self.standard_errors), len(self.covariance), *map(len, self.covariance)}
        if len(sizes) > 1:
            raise ValueError("estimates, standard_errors and covariance must be of one size")
        return self


class _DecodeFit(_Fit):
    form: Form
    context_tokens: Positive | None


class _PowerFit(_Fit):
    identified: bool


class _Fits(_Strict):
    decode: _DecodeFit
    power: _PowerFit | None


class _Document(_Strict):
    format: Literal["fleetopt-engine/1"] = Field(alias="schema")
    gpu: Name
    llm: Name
    tp: Annotated[int, Field(ge=1, le=MAX_TP)]
    precision: Name | None
    quality: Literal["measured"]
    relative_error: _Errors
    source: str
    decode: _Decode
    power: _Power | None
    fit: _Fits
