"""A catalog file of one's own (TOML, `fleetopt-catalog/1`): GPUs, LLMs and prices, checked whole when it is read.

schema = "fleetopt-catalog/1"

[gpus.x1]                          # a GPU of your own, as its data sheet has it (SI units)
memory_bytes = 96e9
bandwidth_bytes_per_s = 4.2e12
peak_flop_per_s = 1.1e15
tdp_w = 650
usd_per_h = 3.1

[gpus.x1.operators.gemm.bf16]      # written by experiments/fit_operators.py, of timings of your own
coefficients = { launch_s = 2.5e-6, byte_excess = 1.1, ... }
rows = 120

[gpus.h100]                        # one of ours: what is said here goes before
idle_w = 90

[llms.my-chat]                     # relative to this file
config = "my-chat/config.json"

[usd_per_gpu_h]
b200 = 4.0
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_type_hints

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, create_model

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.catalog.gpus import GPUS, GpuEntry, OwnOperator, gpu_entry
from fleetopt_jax.catalog.llms import LlmEntry, at_precision, llm_entry
from fleetopt_jax.catalog.operators import own_operator
from fleetopt_jax.catalog.own import Catalog
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.documents.fields import Name, NotNegative, Positive
from fleetopt_jax.documents.toml_file import read_toml

SCHEMA = "fleetopt-catalog/1"
MAX_NAMES = 256
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]  # without a comma: options list names
NEEDED = ("memory_bytes", "bandwidth_bytes_per_s", "peak_flop_per_s", "tdp_w", "usd_per_h")  # of a GPU we do not know
PUBLISHED_CHUNK_TOKENS = 1024.0  # of a GPU the paper does not have


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OperatorPart(_Strict):
    """An operator law of a GPU of one's own, by data type: `experiments/fit_operators.py` writes it."""

    coefficients: Annotated[dict[str, float], Field(max_length=32)] = Field(description="Of its law, by name.")
    rows: Annotated[int, Field(ge=0)] = Field(0, description="Timings that it was fitted to.")
    median_error: NotNegative | None = Field(None, description="Relative error on those.")
    p90_error: NotNegative | None = Field(None, description="And the 90th percentile.")
    held_out_median_error: NotNegative | None = Field(None, description="On shapes left out of the fit.")


class GpuPart(_Strict):
    """A GPU as its data sheet has it. Of one that the catalog has, only what differs."""

    title: Name | None = Field(None, description="What tables call it.")
    memory_bytes: Positive | None = Field(None, description="Memory as CUDA reports it [B].")
    bandwidth_bytes_per_s: Positive | None = Field(None, description="Peak memory bandwidth [B/s].")
    peak_flop_per_s: Positive | None = Field(None, description="Dense 16-bit peak [FLOP/s].")
    peak_flop8_per_s: Positive | None = Field(None, description="Dense 8-bit peak [FLOP/s]; none: no such units.")
    peak_flop4_per_s: Positive | None = Field(None, description="Dense 4-bit peak [FLOP/s]; none: no such units.")
    formats: Annotated[list[Literal["fp8", "int8", "nvfp4"]], Field(max_length=3)] | None = Field(
        None, description="What its tensor cores multiply besides 16 bits; fp8 and int8 where it has an 8-bit peak."
    )
    tdp_w: Positive | None = Field(None, description="Thermal design power [W].")
    idle_w: NotNegative | None = Field(None, description="With a model loaded and nothing to do [W].")
    usd_per_h: NotNegative | None = Field(None, description="Price of one GPU [USD/h].")
    nccl_bytes: NotNegative | None = Field(None, description="Communication buffers when tensor-parallel [B].")
    link_bytes_per_s: Positive | None = Field(None, description="Its link to the other GPUs, one way [B/s].")
    link_gpus: Annotated[int, Field(ge=1, le=4096)] | None = Field(None, description="GPUs on that link.")
    gpus_per_node: Annotated[int, Field(ge=1, le=4096)] | None = Field(None, description="GPUs of a host.")
    inter_node_bytes_per_s: Positive | None = Field(None, description="Its share of the network, one way [B/s].")
    law: Literal["h100", "b200"] | None = Field(None, description="Whose measured law it goes by, carried over.")
    chunk_tokens: Positive | None = Field(None, description="Prefill chunk under `published` [tokens].")
    max_num_seqs: Annotated[int, Field(ge=1, le=10**6)] | None = Field(None, description="Most sequences in flight.")
    batched_tokens: Annotated[int, Field(ge=1, le=10**6)] | None = Field(None, description="Most tokens of a step.")
    source: Name | None = Field(None, description="Where its numbers come from.")
    borrows: Name | None = Field(None, description="The GPU of the catalog whose operators it has where not timed.")
    operators: Annotated[dict[str, Annotated[dict[str, OperatorPart], Field(max_length=64)]], Field(max_length=16)] = (
        Field({}, description="Operators timed on it, by class and data type.")
    )


def _architecture_fields() -> dict[str, Any]:
    """The fields of `Architecture`, none of them needed: a configuration file may say it all."""
    hints = get_type_hints(Architecture)
    fields = [
        field.name for field in dataclasses.fields(Architecture) if field.name not in ("held", "no_law", "said_widths")
    ]
    return {name: (hints[name] | None, None) for name in fields}  # those are of a checkpoint that was read


class _Llm(_Strict):
    config: Name | None = Field(None, description="A Hugging Face config.json, relative to this file.")
    repository: Name | None = Field(None, description="Of the checkpoint on Hugging Face.")
    max_position_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="Longest sequence [tokens].")
    source: Name | None = Field(None, description="Where its numbers come from.")


_LlmPart = create_model(
    "LlmPart", __base__=_Llm, __doc__="An LLM: a config.json, or its architecture.", **_architecture_fields()
)


class CatalogFile(_Strict):
    """GPUs, LLMs and prices of one's own."""

    model_config = ConfigDict(title=SCHEMA)

    format: Literal["fleetopt-catalog/1"] = Field(SCHEMA, alias="schema")
    gpus: Annotated[dict[Key, GpuPart], Field(max_length=MAX_NAMES)] = {}
    llms: Annotated[dict[Key, _LlmPart], Field(max_length=MAX_NAMES)] = {}  # pyright: ignore[reportInvalidTypeForm]
    usd_per_gpu_h: dict[Key, NotNegative] = Field({}, description="Prices by GPU [USD/h].")


def load_catalog(path: str | os.PathLike) -> Catalog:
    """The catalog in a file of one's own. Raises BadInput that names the file, the field, the value and what is
    allowed."""
    where = os.fspath(path)
    tables = {"": ("schema", *list(CatalogFile.model_fields)[1:])}
    tables |= {"gpus": tuple(GpuPart.model_fields), "llms": tuple(_LlmPart.model_fields)}
    found = read_toml(where, CatalogFile, tables)
    gpus = tuple(_gpu(where, name.lower(), part) for name, part in found.gpus.items())
    llms = tuple(_llm(where, name.lower(), part) for name, part in found.llms.items())
    for kind, names in (("gpus", [gpu.name for gpu in gpus]), ("llms", [llm.title for llm in llms])):
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise BadInput(f"{where}, {kind}.{twice}", "is there more than once, but for its case", "need it once")
    return Catalog(gpus, llms, file=where).at_prices(found.usd_per_gpu_h, f"{where}, usd_per_gpu_h")


def _gpu(where: str, name: str, part: GpuPart) -> GpuEntry:
    said = part.model_dump(exclude_none=True, exclude={"operators"})
    place = f"{where}, gpus.{name}"
    if part.operators:
        said["operators"] = _operators(place, part.operators)
    if "borrows" in said:
        said["borrows"] = gpu_entry(said["borrows"], f"{place}.borrows").name
    if "formats" in said:
        said["formats"] = tuple(said["formats"])
    if name in GPUS:
        if "memory_bytes" in said:
            said["nominal_memory_bytes"] = None  # the paper's law counts with what is said, too
        entry = dataclasses.replace(GPUS[name], **{"source": f"{where}; else {GPUS[name].source}", **said})
    else:
        if lacks := [field for field in NEEDED if field not in said]:
            raise BadInput(place, f"has no {', '.join(lacks)}", f"a GPU of your own needs {', '.join(NEEDED)}")
        usual = {"title": name.upper(), "chunk_tokens": PUBLISHED_CHUNK_TOKENS, "source": where}
        usual |= {} if "peak_flop8_per_s" in said else {"formats": ()}
        entry = GpuEntry(name=name, **{**usual, **said})
    try:
        _ = entry.gpu
    except ValueError as error:
        raise BadInput(place, str(error)) from None
    return entry


def _operators(place: str, operators: Mapping[str, Mapping[str, OperatorPart]]) -> tuple[OwnOperator, ...]:
    try:
        return tuple(
            own_operator(operator, variant, part.model_dump())
            for operator, parts in operators.items()
            for variant, part in parts.items()
        )
    except BadField as error:
        raise error.at(lambda field: f"{place}.{field}") from None


def gpu_file(entry: GpuEntry) -> str:
    """The catalog file of one GPU: what of its data sheet is not the catalog's, and its operators."""
    usual = GPUS.get(entry.name) or GpuEntry(**{**dict.fromkeys(NEEDED, 0.0), **_UNSAID, "name": entry.name})
    said = {name: getattr(entry, name) for name in GpuPart.model_fields if getattr(entry, name) != getattr(usual, name)}
    operators: dict[str, dict[str, Any]] = {}
    for each in said.pop("operators", ()):
        part = {name: value for name in OperatorPart.model_fields if (value := getattr(each, name)) is not None}
        operators.setdefault(each.operator, {})[each.variant] = part | {"coefficients": dict(each.coefficients)}
    of_gpu = said | ({"operators": operators} if operators else {})
    return tomli_w.dumps({"schema": SCHEMA, "gpus": {entry.name: of_gpu}})


_UNSAID: dict[str, Any] = {"title": "", "chunk_tokens": 0.0, "source": "", "formats": None}  # always said


def _llm(where: str, name: str, part: _Llm) -> LlmEntry:
    said = part.model_dump(exclude_none=True)
    place = f"{where}, llms.{name}"
    of_entry = {key: said.pop(key) for key in ("repository", "max_position_tokens") if key in said}
    source, config = said.pop("source", None), said.pop("config", None)
    if config is not None:
        if said:
            raise BadInput(place, f"config and {', '.join(said)}", "need one of the two: a config.json says it all")
        read = _configured(place, os.path.join(os.path.dirname(where), config))
        return dataclasses.replace(read, title=name, source=source or read.source, **of_entry)
    needed = [field.name for field in dataclasses.fields(Architecture) if field.default is dataclasses.MISSING]
    if lacks := [field for field in needed if field not in said]:
        raise BadInput(place, f"has no {', '.join(lacks)}", "need config = a config.json, or its architecture")
    try:
        architecture = Architecture(**said)
        at_precision(architecture)
    except BadField as error:
        raise error.at(lambda field: f"{place}.{field}") from None
    except (ValueError, ZeroDivisionError) as error:
        raise BadInput(place, str(error), "need whole numbers of layers, heads and parameters, above 0") from None
    return LlmEntry(name, architecture, source or where, **of_entry)


def _configured(place: str, config: str) -> LlmEntry:
    """The LLM of a config.json that `place` names."""
    if not os.path.isfile(config):
        raise BadInput(f"{place}.config = {config}", "no such file", "need a config.json, seen from the catalog's file")
    return llm_entry(config, place)
