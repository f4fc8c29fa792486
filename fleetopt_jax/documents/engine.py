"""A calibrated engine as JSON (`fleetopt-engine/1`): written whole, and checked whole when it is read.

It has a decode step of its own, with factors on the catalog's prefill and power where whole benchmarks were measured;
or, of an engine of operators, factors on the catalog's step, which gives decode, prefill and power (`step_factors`).
Files from before serving engines were named are of vLLM 0.11.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fleetopt_jax.calibrate.benchmarks import BenchmarkFit
from fleetopt_jax.calibrate.factors import FactorsFit
from fleetopt_jax.calibrate.fit import DecodeFit, Form, PowerFit
from fleetopt_jax.catalog.engines import MAX_GPUS, MAX_TP, engine_entry, resolved
from fleetopt_jax.catalog.own import Catalog
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec, OwnLaws
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.files import invalid, parse_json, read_bytes, shown, to_json, write_whole
from fleetopt_jax.laws.decode import make_decode_step
from fleetopt_jax.laws.factors import make_step_factors
from fleetopt_jax.laws.power import make_logistic_power

SCHEMA = "fleetopt-engine/1"
MAX_FIELDS = 100  # of a fit, or its notes
NOT_DIVIDED: Mapping[str, int] = {"ep": 1, "dp": 1, "pp": 1}
NEVER_MEASURED = ("prefill", "KV cache", "idle power")  # what a calibrated engine has of the catalog


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a name has no control characters")
    return text


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Value = TypeVar("Value")
Parameters = Annotated[dict[str, Value], Field(max_length=MAX_FIELDS)]


def engine_to_json(
    decode_fit: DecodeFit | FactorsFit,
    power_fit: PowerFit | None,
    *,
    gpu: str,
    llm: str,
    tp: int,
    precision: str | None = None,
    serving: str = MEASURED_SERVING,
    source: str = "measurements",
    **split: int,
) -> dict[str, Any]:
    """What was fitted to an engine, under the names it is known by, its GPUs divided by `tp`, and by `ep`, `dp` and
    `pp` where that is said; `source` says where its measurements are from."""
    if unknown := split.keys() - NOT_DIVIDED:
        raise TypeError(f"need {', '.join(NOT_DIVIDED)}, got {', '.join(sorted(unknown))}")
    names = {"schema": SCHEMA, "gpu": gpu, "llm": llm, "tp": tp, **NOT_DIVIDED, **split}
    names |= {"precision": precision, "serving": serving}
    if isinstance(decode_fit, FactorsFit):
        return names | _of_factors(decode_fit, source)
    decode = {"form": decode_fit.form, **_fit(decode_fit), "context_tokens": decode_fit.context_tokens}
    power = power_fit and {"identified": power_fit.identified, **_fit(power_fit)}
    document = {
        **names,
        "quality": "measured",
        "relative_error": {
            "step": decode_fit.leave_one_out_mape,
            "power": power_fit and power_fit.leave_one_out_mape,
        },
        "source": source,
        "of_catalog": [*([] if power_fit else ["power"]), *NEVER_MEASURED],
        "decode": _numbers(decode_fit.step),
        "power": power_fit and _numbers(power_fit.power),
        "fit": {"decode": decode, "power": power},
    }
    return document | _of_benchmarks(decode_fit) if isinstance(decode_fit, BenchmarkFit) else document


def _of_factors(fit: FactorsFit, source: str) -> dict[str, Any]:
    """What is said of an engine of operators besides its names: factors on the catalog's step."""
    told = {"decode step": fit.errors["step"], "power": fit.errors["power"], "prefill": fit.errors["prefill"]}
    of_catalog = [name for name in ("decode step", "power", *NEVER_MEASURED) if told.get(name) is None]
    beside = {"catalog_mape": fit.catalog_mape, "left_out_mape": fit.left_out_mape}
    return {
        "quality": "measured",
        "relative_error": fit.errors,
        "source": source,
        "of_catalog": of_catalog,
        "step_factors": fit.parameters,
        "fit": {"step_factors": {**_fit(fit), **beside}},
    }


def _of_benchmarks(fit: BenchmarkFit) -> dict[str, Any]:
    """What an engine fitted to whole benchmarks has besides its decode step: factors on the catalog's other laws."""
    factors = {
        "prefill": fit.parameters["prefill_factor"] if "prefill_factor" in fit.names else None,
        "power": fit.power_factor,
    }
    of_catalog = ("power", *NEVER_MEASURED)
    return {
        "relative_error": {"step": fit.left_out_mape["tpot_s"], "power": fit.power_error},
        "of_catalog": [name for name in of_catalog if factors.get(name) is None],
        "factors": factors | {"left_out_mape": fit.left_out_mape},
    }


def save_engine(
    path: str | os.PathLike,
    decode_fit: DecodeFit | FactorsFit,
    power_fit: PowerFit | None,
    **names: Any,
) -> None:
    """`engine_to_json` as a file, written whole or not at all: `load_engine` reads it back."""
    write_whole(path, to_json(engine_to_json(decode_fit, power_fit, **names)) + "\n")


def load_engine(path: str | os.PathLike, catalog: Catalog | None = None) -> EngineSpec:
    """The engine in a file that `fleetopt calibrate` or `save_engine` wrote: its own step, and its own power where that
    was measured, on the memory, prefill and price of the GPU and LLM it names, by a `catalog` of one's own or ours.

    Raises BadInput that names the file, the line and the field; BadField for a name that the catalog does not have.
    """
    where = os.fspath(path)
    found = read_engine_file(where)
    laws = OwnLaws(
        decode=found.decode and make_decode_step(**found.decode.model_dump()),
        power=found.power and make_logistic_power(**found.power.model_dump()),
        factors=found.step_factors and make_step_factors(**found.step_factors.model_dump()),
        quality="measured",
        step_error=found.relative_error.step,
        power_error=found.relative_error.power,
        prefill_error=found.relative_error.prefill,
        source=f"{where}: {found.source}",
        file=where,
    )
    try:
        names = found.gpu, found.llm, found.tp, found.precision
        split = {name: getattr(found, name) for name in NOT_DIVIDED}
        spec = (catalog or Catalog()).spec(*names, **split, own_fit=False, serving=found.serving)
        return resolved(dataclasses.replace(spec, laws=_with_factors(laws, found.factors, spec)))
    except BadField as error:
        raise error.at(lambda field: f"{where}, {field}") from None


def _with_factors(laws: OwnLaws, factors: "FactorsPart | None", spec: EngineSpec) -> OwnLaws:
    """The laws with those of the catalog's that a fit has factors on."""
    if factors is None:
        return laws
    engine, changed = engine_entry(spec).engine, {}
    if factors.prefill is not None:
        changed["prefill"] = engine.prefill.slower(factors.prefill)
    if factors.power is not None:
        changed["power"] = engine.power.hungrier(factors.power)
    return dataclasses.replace(laws, **changed)


def read_engine_file(path: str) -> "EngineFile":
    """What an engine file holds, every number of it checked."""
    data = read_bytes(path)
    content = parse_json(path, data)
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        raise BadInput(path, f"schema = {shown(found)!r}", f"need {SCHEMA!r}: a file that `fleetopt calibrate` writes")
    if len(content) > MAX_FIELDS:
        raise BadInput(path, f"{len(content)} fields", f"need those of {SCHEMA}")
    try:
        read = EngineFile.model_validate(content)
        _require_one_step(path, read)
        if read.decode:
            make_decode_step(**read.decode.model_dump())
        if read.power:
            make_logistic_power(**read.power.model_dump())
    except ValidationError as error:
        raise invalid(path, data, error) from None
    except ValueError as error:
        raise BadInput(path, str(error)) from None
    return read


def _require_one_step(path: str, read: "EngineFile") -> None:
    """Refuse a file with two laws of the same, or none."""
    if (read.decode is None) == (read.step_factors is None):
        given = "neither decode nor step_factors" if read.decode is None else "both decode and step_factors"
        raise BadInput(path, given, "need one of them")
    if read.step_factors is not None and (read.power is not None or read.factors is not None):
        raise BadInput(path, f"step_factors and {'power' if read.power else 'factors'}", "need step_factors alone")


def _numbers(record: Any) -> dict[str, float]:
    return {field.name: float(getattr(record, field.name)) for field in dataclasses.fields(record)}


def _fit(fit: DecodeFit | PowerFit | FactorsFit) -> dict[str, Any]:
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


class DecodePart(_Strict):
    """Time of a decode iteration; see `laws.decode.DecodeStep`."""

    base_s: Positive = Field(description="An iteration's time without sequences [s].")
    expert_s: AtLeast0 = Field(description="Time to read all routed experts [s].")
    expert_share: AtLeast0 = Field(description="Share of the experts that one sequence reads [-], below 1.")
    per_seq_s: AtLeast0 = Field(description="Time of each sequence in flight [s].")
    per_token_s: AtLeast0 = Field(description="Time of each token of context in flight [s].")
    windowed_token_s: AtLeast0 = Field(description="The same in layers with a sliding window [s].")
    window_tokens: AtLeast0 = Field(description="Length of the sliding window [tokens]; 0: none.")


class PowerPart(_Strict):
    """Power of one GPU; see `laws.power.LogisticPower`."""

    idle_w: AtLeast0 = Field(description="Power at batch -> 0 [W].")
    nominal_w: Positive = Field(description="Power at batch -> infinity [W].")
    steepness: Positive = Field(description="Slope over log2 of the batch [-].")
    log2_half_batch: float = Field(description="log2 of the batch at the midpoint [-].")


class ErrorsPart(_Strict):
    """Mean relative errors, each point left out in turn [-]."""

    step: AtLeast0 | None = Field(description="Of the iteration time [-]; null: only power was measured.")
    power: AtLeast0 | None = Field(description="Of the power [-]; null: no power was measured.")
    prefill: AtLeast0 | None = Field(None, description="Of the time to the first token [-]; null: not measured.")


class _Fit(_Strict):
    estimates: Parameters[float] = Field(description="Fitted parameters by name.")
    standard_errors: Parameters[AtLeast0] = Field(description="Of the estimates.")
    covariance: Annotated[list[Annotated[list[float], Field(max_length=MAX_FIELDS)]], Field(max_length=MAX_FIELDS)] = (
        Field(description="Of the estimates, in their order.")
    )
    fit_mape: AtLeast0 = Field(description="Mean relative error of the fit [-].")
    max_ape: AtLeast0 = Field(description="Largest relative error of the fit [-].")
    leave_one_out_mape: AtLeast0 = Field(description="Mean relative error, each point left out in turn [-].")
    n_points: Annotated[int, Field(ge=1)] = Field(description="Points it is fitted to.")
    batch_min: Positive = Field(description="Smallest batch measured [sequences].")
    batch_max: Positive = Field(description="Largest batch measured [sequences].")
    notes: Annotated[list[str], Field(max_length=MAX_FIELDS)] = Field(description="What to know about the fit.")

    @model_validator(mode="after")
    def _sizes_agree(self):
        sizes = {len(self.estimates), len(self.standard_errors), len(self.covariance), *map(len, self.covariance)}
        if len(sizes) > 1:
            raise ValueError("estimates, standard_errors and covariance must be of one size")
        return self


class DecodeFitPart(_Fit):
    """How the iteration time was fitted."""

    form: Form = Field(description="Which parameters are fitted.")
    context_tokens: Positive | None = Field(description="Mean context of the points [tokens]; null: not said.")


class PowerFitPart(_Fit):
    """How the power was fitted."""

    identified: bool = Field(description="Whether the points tell all four parameters.")


class StepFactorsFitPart(_Fit):
    """How factors on a step of operators were fitted; `estimates` has those that the points tell."""

    catalog_mape: Parameters[AtLeast0] = Field(
        description="Mean relative error of each kind of mean by the catalog's engine [-]."
    )
    left_out_mape: Parameters[AtLeast0] = Field(
        description="The same with the factors, each point left out in turn [-]."
    )


class FitsPart(_Strict):
    """How the laws were fitted."""

    decode: DecodeFitPart | None = None
    power: PowerFitPart | None = None
    step_factors: StepFactorsFitPart | None = None


class StepFactorsPart(_Strict):
    """Factors on the catalog's step of operators; see `laws.factors.StepFactors`. 1: the catalog's."""

    gpu: Positive = Field(1.0, description="On the time of the GPU's kernels [-].")
    prompt: Positive = Field(1.0, description="Further on that of steps with prompt tokens [-].")
    exchange: Positive = Field(1.0, description="On that of large exchanges between GPUs [-].")
    host: Positive = Field(1.0, description="On the host's time of a step [-].")
    sequence: Positive = Field(1.0, description="On the time of each sequence [-].")
    first_token: Positive = Field(1.0, description="On what a first token takes beyond its steps [-].")
    watts: Positive = Field(1.0, description="On the watts above idle [-].")


class FactorsPart(_Strict):
    """Of an engine fitted to whole benchmarks: factors on laws of the catalog's engine."""

    prefill: Positive | None = Field(description="On the time of a prompt [-]; null: the points do not tell it.")
    power: Positive | None = Field(description="On the power [-]; null: no power was measured.")
    left_out_mape: Parameters[AtLeast0] = Field(
        description="Mean relative error of TTFT, TPOT and throughput, each point left out in turn [-]."
    )


class EngineFile(_Strict):
    """A measured engine, as `fleetopt calibrate` writes it."""

    model_config = ConfigDict(title=SCHEMA)

    format: Literal["fleetopt-engine/1"] = Field(alias="schema")
    gpu: Name = Field(description="GPU, of `fleetopt catalog gpus`.")
    llm: Name = Field(description="LLM, of `fleetopt catalog llms`.")
    tp: Annotated[int, Field(ge=1, le=MAX_TP)] = Field(description="GPUs that divide heads and widths.")
    ep: Annotated[int, Field(ge=1, le=MAX_GPUS)] = Field(1, description="Groups of GPUs that divide the experts whole.")
    dp: Annotated[int, Field(ge=1, le=MAX_GPUS)] = Field(1, description="Groups of tp GPUs with own sequences.")
    pp: Annotated[int, Field(ge=1, le=MAX_GPUS)] = Field(1, description="Stages of layers.")
    precision: Name | None = Field(description="Precision of the weights; null: not said.")
    serving: Name = Field(MEASURED_SERVING, description="Serving engine, of `fleetopt predict --serving`.")
    quality: Literal["measured"]
    relative_error: ErrorsPart
    source: str = Field(description="Where the measurements are from.")
    of_catalog: list[Name] = Field([], description="What was not measured: it stays the catalog's.")
    decode: DecodePart | None = Field(None, description="null: it is the catalog's, with `step_factors`.")
    power: PowerPart | None = Field(None, description="null: no power was measured, or it has a factor.")
    step_factors: StepFactorsPart | None = Field(None, description="null: it has a decode step of its own.")
    factors: FactorsPart | None = Field(None, description="null: fitted to decode steps, not to whole benchmarks.")
    fit: FitsPart
