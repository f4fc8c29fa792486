"""Scenario files (TOML): what a search is about, with the options' own names, so that it can be kept and run again.

A scenario is read, checked whole, and put before the options of the command line, which override it.
"""

import argparse
import contextlib
import io
import os
import re
import tomllib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fleetopt_jax import __version__
from fleetopt_jax.cli.terminal import warn
from fleetopt_jax.cli.values import MAX_GAMMA, MAX_TP, MAX_WINDOW_TOKENS, RATES_PER_S, flag
from fleetopt_jax.core.documents import first_problem, read_bytes
from fleetopt_jax.core.errors import BadInput

SCHEMA = "fleetopt-scenario/1"
MAX_BYTES = 2**20  # a scenario is a page of text
FILE_ENDINGS = (".json", ".csv", ".jsonl", ".parquet", ".gz")

OneOrMore = BeforeValidator(lambda value: value if isinstance(value, list) else [value])  # gpu = "h100" will do
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
Listed = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^,\x00-\x1f\x7f]+$")]  # options part at commas
Names = Annotated[list[Listed], OneOrMore, Field(min_length=1, max_length=64)]
Tps = Annotated[list[Annotated[int, Field(ge=1, le=MAX_TP)]], OneOrMore, Field(min_length=1, max_length=64)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class WorkloadSection(_Section):
    """What is asked of the fleet."""

    name: Annotated[Name, Field(description="bundled workload, or a file (relative to the scenario)")] | None = None
    rate: Annotated[float, Field(ge=RATES_PER_S[0], le=RATES_PER_S[1], description="requests per second")] | None = None
    prompt_column: Name | None = None
    output_column: Name | None = None
    time_column: Name | None = None
    time_unit: Literal["s", "ms", "us"] | None = None


class EnginesSection(_Section):
    """What the pools may be made of."""

    gpu: Annotated[Names, Field(description="GPUs, or files that fleetopt calibrate wrote")] | None = None
    llm: Annotated[Name, Field(description="LLM, or a Hugging Face config.json")] | None = None
    tp: Annotated[Tps, Field(description="GPUs per instance")] | None = None
    precision: Annotated[Names, Field(description="of the weights: bf16, fp8, int4, mxfp4")] | None = None
    kv_precision: Annotated[Name, Field(description="of the KV cache: bf16 or fp8")] | None = None
    max_num_seqs: Annotated[int, Field(ge=1, le=10**6, description="sequences an instance runs")] | None = None


class LimitsSection(_Section):
    """What every pool, or the fleet, must hold."""

    ttft_p99_ms: Annotated[Positive, Field(description="P99 time to first token [ms]")] | None = None
    ttft_ms_per_1k: (
        Annotated[NotNegative, Field(description="and so much more per 1,000 prompt tokens [ms]")] | None
    ) = None
    itl_ms: Annotated[Positive, Field(description="mean inter-token latency [ms]")] | None = None
    slo_scope: Literal["pool", "fleet"] | None = None
    window: Annotated[int, Field(ge=1, le=MAX_WINDOW_TOKENS, description="window of the last pool [tokens]")] | None = (
        None
    )


class BudgetSection(_Section):
    """What all pools may use together."""

    max_gpus: Positive | None = None
    max_power_kw: Annotated[Positive, Field(description="[kW]")] | None = None
    max_usd_per_h: Annotated[Positive, Field(description="[USD/h]")] | None = None
    gpus_of: Annotated[dict[Listed, NotNegative], Field(description="how many there are of a kind")] | None = None


class SiteSection(_Section):
    """What is counted besides GPU boards."""

    host_w_per_gpu: Annotated[NotNegative, Field(description="watts of the host a GPU [W]")] | None = None
    pue: Annotated[float, Field(ge=1, allow_inf_nan=False, description="power usage effectiveness")] | None = None
    usd_per_kwh: Annotated[NotNegative, Field(description="price of electricity [USD/kWh]")] | None = None
    kg_co2_per_kwh: Annotated[NotNegative, Field(description="carbon intensity [kg/kWh]")] | None = None


class CompressionSection(_Section):
    """Of prompts, where gamma exceeds 1."""

    compress_success: Annotated[float, Field(ge=0, le=1, description="share of the tries that do")] | None = None
    compress_ms_per_1k: Annotated[NotNegative, Field(description="latency, 1,000 prompt tokens [ms]")] | None = None
    compress_j_per_1k: Annotated[NotNegative, Field(description="energy, 1,000 prompt tokens [J]")] | None = None


class SearchSection(_Section):
    """How the plan is searched."""

    pools: Annotated[int, Field(ge=1, le=6, description="most pools")] | None = None
    gamma: Annotated[float, Field(ge=1, le=MAX_GAMMA)] | Literal["auto"] | None = None
    method: Literal["exact", "grid", "gradient"] | None = None
    free: Annotated[list[Literal["max_num_seqs", "clock"]], Field(min_length=1, max_length=2)] | None = None
    assume: Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[\w,= ]+$")] | None = None
    dispatch: Literal["jsq", "round_robin", "random"] | None = None
    objective: Literal["tok_per_j", "usd", "power", "gpus"] | None = None
    verify: bool | None = None


class RobustSection(_Section):
    """A plan for engines and traffic that are not what they seem."""

    robust: Literal["quantile", "cvar"] | None = None
    robust_level: Annotated[float, Field(gt=0, lt=1)] | None = None
    robust_workloads: Names | None = None


class SimulationSection(_Section):
    """With verify."""

    requests: Annotated[int, Field(ge=100, le=10**7)] | None = None
    replications: Annotated[int, Field(ge=1, le=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    staleness_ms: NotNegative | None = None
    arrivals: Literal["renewal", "poisson", "trace"] | None = None
    router_width: NotNegative | None = None


class FrontSection(_Section):
    """What `fleetopt pareto` draws."""

    objectives: Annotated[list[Literal["tok_per_j", "ttft_p99_s", "usd_per_h"]], Field(min_length=2)] | None = None
    points: Annotated[int, Field(ge=3, le=1000, description="searches to make")] | None = None
    axis: Annotated[Name, Field(description="NAME=V1,V2,... instead of a front")] | None = None


class LeversSection(_Section):
    """What `fleetopt levers` changes to."""

    next_gpu: Name | None = None
    other_llm: Name | None = None
    all_pairs: bool | None = None


class Scenario(_Section):
    """Every option of a search. What is left out keeps its default."""

    format: Annotated[Literal["fleetopt-scenario/1"], Field(alias="schema")]
    workload: WorkloadSection = WorkloadSection()
    engines: EnginesSection = EnginesSection()
    limits: LimitsSection = LimitsSection()
    budget: BudgetSection = BudgetSection()
    site: SiteSection = SiteSection()
    compression: CompressionSection = CompressionSection()
    search: SearchSection = SearchSection()
    robust: RobustSection = RobustSection()
    simulation: SimulationSection = SimulationSection()
    front: FrontSection = FrontSection()
    levers: LeversSection = LeversSection()


SECTIONS = {name: field.annotation for name, field in Scenario.model_fields.items() if name != "format"}
COMMANDS_WITH_SCENARIO = ("optimize", "pareto", "levers", "ledger")
FILE_OPTIONS = ("workload", "gpu", "llm", "robust_workloads", "other_llm")  # whose values may be files


def option_of(section: str, key: str) -> str:
    """The option that a key stands for, as argparse names it."""
    return "workload" if (section, key) == ("workload", "name") else key


def read_scenario(path: str) -> Scenario:
    """A scenario file, or `BadInput` naming the first thing that is wrong and its line."""
    data = read_bytes(path, MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
        return Scenario.model_validate(tomllib.loads(text))
    except ValidationError as error:
        line = _line_of(text, [str(part) for part in error.errors()[0]["loc"]])
        where = f"{path}, line {line}" if line else path
        raise BadInput(where, first_problem(error), _allowed(error)) from None
    except UnicodeDecodeError as error:
        raise BadInput(path, f"is not UTF-8 text: byte {error.start + 1}") from None
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise BadInput(path, f"is not TOML: {error}") from None


def _allowed(error: ValidationError) -> str:
    """The keys there are, where an unknown one was found."""
    problem = error.errors()[0]
    if problem["type"] != "extra_forbidden":
        return ""
    section = SECTIONS.get(str(problem["loc"][0])) if len(problem["loc"]) > 1 else Scenario
    known = ["schema", *SECTIONS] if section is Scenario else list(section.model_fields)
    return f"known: {', '.join(known)}"


def _line_of(text: str, location: Sequence[str]) -> int | None:
    """The line of a key, by its table; of the table where the key is not found."""
    found, table = None, ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\s*([^\]]*?)\s*\]", line)
        if header:
            table = header[1]
        key = re.match(r"""\s*([^\s=]+)\s*=""", line)
        here = [part.strip(" \"'") for part in (*table.split("."), *(key[1].split(".") if key else ())) if part]
        if here and here == list(location[: len(here)]) and (key or header):
            found = number
    return found


def with_scenario(
    parser: argparse.ArgumentParser, given: argparse.Namespace, arguments: Sequence[str]
) -> argparse.Namespace:
    """The options once more, with the scenario's before those of the command line."""
    scenario = read_scenario(given.scenario)
    folder = os.path.dirname(given.scenario)
    values = {option: value for option, value in _values(scenario).items() if hasattr(given, option)}
    left_out = _lost(parser, given, scenario)
    first = list(arguments).index(given.command)
    tokens = [token for option, value in values.items() for token in _tokens(option, _at(folder, option, value))]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args([given.command, *tokens])
    except SystemExit:  # a value of another command's: several engines, where this one takes one
        problem = said.getvalue().partition("argument ")[2].partition(" (see")[0]
        raise BadInput(given.scenario, problem, f"as {given.command} takes it") from None
    options = parser.parse_args([*arguments[: first + 1], *tokens, *arguments[first + 1 :]])
    if left_out:
        warn(options, f"{given.scenario}: not an option of {given.command}: {', '.join(left_out)}")
    return options


def _lost(parser: argparse.ArgumentParser, given: argparse.Namespace, scenario: Scenario) -> list[str]:
    """Options of other commands that the scenario changes from what they are by default."""
    usual = argparse.Namespace()
    for command in COMMANDS_WITH_SCENARIO:
        usual.__dict__.update(vars(parser.parse_args([command])))
    kept = {option: _saved(usual, "", option) for option in _values(scenario) if not hasattr(given, option)}
    return sorted(option for option, value in _values(scenario).items() if option in kept and value != kept[option])


def _values(scenario: Scenario) -> dict[str, Any]:
    """The value of every option that the scenario says."""
    return {
        option_of(section, key): value
        for section in SECTIONS
        for key, value in getattr(scenario, section).model_dump(exclude_none=True).items()
    }


def _tokens(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(option if value else f"no_{option}")]
    if isinstance(value, dict):
        return [f"{flag(option)}={','.join(f'{name}={count!r}' for name, count in value.items())}"] if value else []
    return [f"{flag(option)}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def _at(folder: str, option: str, value: Any) -> Any:
    """Names of files as seen from here; in the scenario they are relative to itself."""
    if option not in FILE_OPTIONS or not folder:
        return value
    if isinstance(value, list):
        return [_at(folder, option, each) for each in value]
    return os.path.join(folder, value) if _is_file(value) else value


def _is_file(name: str) -> bool:
    return "/" in name or name.lower().endswith(FILE_ENDINGS)


def scenario_text(options: argparse.Namespace) -> str:
    """What is run, as a file that `--scenario` runs again."""
    if getattr(options, "command", None) == "levers" and options.plan:
        raise BadInput("--save-scenario", f"the present fleet is that of {options.plan}", "leave one of them out")
    folder = os.path.dirname(os.path.abspath(options.save_scenario))
    document: dict[str, Any] = {"schema": SCHEMA}
    for section, model in SECTIONS.items():
        keys = {key: _saved(options, folder, option_of(section, key)) for key in model.model_fields}
        kept = {key: value for key, value in keys.items() if value is not None}
        if kept:
            document[section] = kept
    try:
        Scenario.model_validate(document)
    except ValidationError as error:
        raise BadInput("--save-scenario", first_problem(error), "need values that a scenario can hold") from None
    title = (
        f"# fleetopt {__version__}: fleetopt {options.command} --scenario {os.path.basename(options.save_scenario)}\n"
    )
    return title + tomli_w.dumps(document)


def _saved(options: argparse.Namespace, folder: str, option: str) -> Any:
    """An option's value as the file has it; None where there is nothing to say."""
    value = getattr(options, option, None)
    if option == "gamma" and hasattr(options, "gamma") and value is None:
        return "auto"
    if option in ("gpu", "precision") and value is not None:
        value = [part.strip() for part in value.split(",")]
    if option == "axis" and value is not None:
        return f"{value[0]}={','.join(map(str, value[1]))}"
    if option == "tp" and isinstance(value, int):
        value = [value]
    if isinstance(value, tuple):
        value = list(value)
    if value is None or value in ([], {}):
        return None
    if option in FILE_OPTIONS:
        names = value if isinstance(value, list) else [value]
        seen = [os.path.relpath(name, folder) if _is_file(name) and not os.path.isabs(name) else name for name in names]
        return seen if isinstance(value, list) else seen[0]
    return value
