"""Scenario files (TOML): what a search is about, with the options' own names, so that it can be kept and run again.

A scenario is read, checked whole, and put before the options of the command line, which override it. Its model is made
from the table of options.
"""

import argparse
import contextlib
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from fleetopt_jax import __version__
from fleetopt_jax.cli import table
from fleetopt_jax.cli.option import Option, Section
from fleetopt_jax.cli.synopsis import SEARCHES
from fleetopt_jax.cli.table import keys_of, options_of
from fleetopt_jax.cli.terminal import warn
from fleetopt_jax.cli.values import (
    MAX_NAMES,
    Choice,
    Flag,
    FrontOf,
    Kind,
    Number,
    NumberOrAuto,
    NumberOrText,
    OneName,
    Percent,
    Several,
    Stock,
    Sweep,
    Text,
    Vary,
)
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import first_problem
from fleetopt_jax.documents.toml_file import read_toml

SCHEMA = "fleetopt-scenario/1"
MAX_SERVICES = 32
FILE_ENDINGS = (
    *(".json", ".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet", ".prom", ".toml"),
    *(".gz", ".zst", ".zip"),
)

OneOrMore = BeforeValidator(lambda value: value if isinstance(value, list) else [value])  # gpu = "h100" will do


def within(number: Number) -> Any:
    """The range of a number, as a field of a file has it."""
    bounds: dict[str, Any] = {}
    if number.least > -math.inf:
        bounds["gt" if number.open else "ge"] = number.least
    if number.most < math.inf:
        bounds["lt" if number.open else "le"] = number.most
    return Field(**bounds) if number.most < math.inf else Field(**bounds, allow_inf_nan=False)


def spelt(text: Text) -> Any:
    """The letters and the length of a text, as a field of a file has them."""
    return Field(min_length=1, max_length=text.most, pattern=f"^{text.letters}+$")


Positive = Annotated[float, within(table.POSITIVE)]
NotNegative = Annotated[float, within(table.NOT_NEGATIVE)]
Name = Annotated[str, spelt(Text())]


@singledispatch
def annotation(kind: Kind) -> Any:
    """The type that a key of a kind has."""
    raise TypeError(f"a scenario cannot hold {kind.allowed}")


@annotation.register
def _(kind: Number) -> Any:
    return Annotated[int if kind.whole else float, within(kind)]


@annotation.register
def _(kind: Percent) -> Any:
    return annotation(kind.of)  # the share


@annotation.register
def _(kind: NumberOrAuto) -> Any:
    return annotation(kind.of) | Literal["auto"]


@annotation.register
def _(kind: NumberOrText) -> Any:
    return annotation(kind.of) | Name


@annotation.register
def _(kind: Text) -> Any:
    return Annotated[str, spelt(kind)]


@annotation.register
def _(kind: Choice) -> Any:
    return Literal[kind.names]


@annotation.register
def _(kind: Flag) -> Any:
    return bool


@annotation.register
def _(kind: Several) -> Any:
    listed = Annotated[list[annotation(kind.of)], Field(min_length=kind.least, max_length=kind.most)]
    return Annotated[listed, OneOrMore] if kind.bare else listed


@annotation.register
def _(kind: Stock) -> Any:
    return dict[annotation(kind.gpu), annotation(kind.count)]


@annotation.register
def _(kind: Sweep) -> Any:
    return Name  # as it is typed


@annotation.register
def _(kind: FrontOf) -> Any:
    return Name  # likewise


@annotation.register
def _(kind: Vary) -> Any:
    return Annotated[list[Name], Field(min_length=1, max_length=MAX_NAMES), OneOrMore]  # as they are typed


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _model(name: str, about: str, fields: dict[str, Any]) -> type[BaseModel]:
    return create_model(name, __base__=_Section, __doc__=about, **fields)


def _model_of(section: Section) -> type[BaseModel]:
    keys = {
        key: (annotation(option.kind) | None, Field(None, description=option.described or None))
        for key, option in keys_of(section).items()
    }
    return _model(f"{section.name.title()}Section", section.about, keys)


SECTIONS = {section.name: _model_of(section) for section in table.SECTIONS}
OF_A_SERVICE: dict[str, Option] = {  # keys of a service, each an option: all but what the services have in common
    "workload" if option.name == "workload" else option.key or option.name: option
    for option in options_of("services")
    if option.section in (table.WORKLOAD, table.ENGINES, table.LIMITS, table.SEARCH)
    and option.name not in ("catalog", "usd_per_gpu_h", "assume", "objective", "end_to_end_s", "slo_scope")
}
_LLMS = Several(OneName())
ServiceTable = _model(
    "ServiceTable",
    "One of several services. Keys that are left out are as the scenario has them for all.",
    {
        key: (annotation(option.kind) | None, Field(None, description=option.described))
        for key, option in OF_A_SERVICE.items()
    }
    | {
        "name": (Annotated[str, spelt(Text(letters=r"[\w .+-]", most=64))], ...),
        "llm": (annotation(_LLMS) | None, Field(None, description="LLM, or several of which the service has one")),
        "promise": (
            Annotated[Literal["interactive", "batch"], Field(alias="class")],
            Field("interactive", description="interactive: its latencies are held; batch: a deadline alone"),
        ),
        "end_to_end_s": (
            Positive | None,
            Field(None, description="of an interactive one: to the end of an answer [s]"),
        ),
        "deadline_s": (Positive | None, Field(None, description="of a batch: to the end of an answer [s]")),
    },
)
Scenario = _model(
    "Scenario",
    "Every option of a search. What is left out keeps its default.",
    {"format": (Annotated[Literal["fleetopt-scenario/1"], Field(alias="schema")], ...)}
    | {name: (model, model()) for name, model in SECTIONS.items()}
    | {"service": (Annotated[list[ServiceTable], Field(max_length=MAX_SERVICES)], [])},
)


def read_scenario(path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a scenario file says of each option, and of each service; or `BadInput` naming the first thing that is wrong
    and its line."""
    keys = {name: tuple(model.model_fields) for name, model in SECTIONS.items()}
    of_service = tuple("class" if name == "promise" else name for name in ServiceTable.model_fields)
    known = {"": ("schema", *SECTIONS, "service"), **keys, "service": of_service}
    said = read_toml(path, Scenario, known).model_dump(exclude_none=True)
    options = {
        option.name: said[section.name][key]
        for section in table.SECTIONS
        for key, option in keys_of(section).items()
        if key in said[section.name]
    }
    return options, said["service"]


def with_scenario(
    parser: argparse.ArgumentParser, given: argparse.Namespace, arguments: Sequence[str]
) -> argparse.Namespace:
    """The options once more, with the scenario's before those of the command line."""
    (said, services), folder = read_scenario(given.scenario), os.path.dirname(given.scenario)
    if services and given.command != "services":
        problem = f"has [[service]] tables, which {given.command} does not read"
        raise BadInput(given.scenario, problem, "need fleetopt services")
    taken = {option.name: option for option in options_of(given.command)}
    left_out = _lost(parser, {name: value for name, value in said.items() if name not in taken})
    here = [(taken[name], value) for name, value in said.items() if name in taken]
    tokens = [token for option, value in here for token in _tokens(option, value, folder)]
    _check_tokens(parser, given, tokens, given.scenario)
    first = list(arguments).index(given.command)

    def with_words(more: Sequence[str]) -> argparse.Namespace:
        return parser.parse_args([*arguments[: first + 1], *tokens, *more, *arguments[first + 1 :]])

    options = with_words(())
    if services:
        options.services = [_service_said(parser, given, each, with_words) for each in services]
    if left_out:
        warn(options, f"{given.scenario}: not an option of {given.command}: {', '.join(left_out)}")
    return options


def _check_tokens(
    parser: argparse.ArgumentParser, given: argparse.Namespace, tokens: Sequence[str], where: str
) -> None:
    """Refuse values of a file that the command does not take: several engines, where it takes one."""
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            parser.parse_args([given.command, *tokens])
    except SystemExit:
        problem = refusal.getvalue().partition("argument ")[2].partition(" (see")[0]
        raise BadInput(where, problem, f"as {given.command} takes it") from None


@dataclass(frozen=True)
class ServiceSaid:
    """A service of a scenario: its name, what it is promised, and its options, once for each LLM it may have."""

    name: str
    batch: bool
    end_to_end_s: float | None
    options: tuple[argparse.Namespace, ...]


def _service_said(
    parser: argparse.ArgumentParser,
    given: argparse.Namespace,
    said: dict[str, Any],
    with_words: Callable[[Sequence[str]], argparse.Namespace],
) -> ServiceSaid:
    """A service's own table before the options of the command line, and after those of all."""
    where, folder = f"{given.scenario}, service {said['name']!r}", os.path.dirname(given.scenario)
    batch = said["promise"] == "batch"
    if batch != ("deadline_s" in said):
        raise BadInput(where, "class batch has no deadline_s" if batch else "deadline_s is of class batch", _PROMISES)
    if batch and (latencies := [key for key in _LATENCIES if key in said]):
        raise BadInput(where, f"class batch with {latencies[0]}", _PROMISES)
    tokens = [
        token
        for key, option in OF_A_SERVICE.items()
        if key in said and key != "llm"
        for token in _tokens(option, said[key], folder)
    ]
    llms = [_tokens(OF_A_SERVICE["llm"], llm, folder) for llm in said.get("llm", [])] or [[]]
    for llm in llms:
        _check_tokens(parser, given, [*tokens, *llm], where)
    options = tuple(with_words([*tokens, *llm]) for llm in llms)
    limit_s = said.get("deadline_s") if batch else said.get("end_to_end_s", options[0].end_to_end_s)
    return ServiceSaid(said["name"], batch, limit_s, options)


_LATENCIES = ("ttft_p99_ms", "ttft_ms_per_1k", "itl_ms", "end_to_end_s")
_PROMISES = (
    f"a batch is promised deadline_s alone, an interactive service {', '.join(_LATENCIES[:-1])} or {_LATENCIES[-1]}"
)


def _lost(parser: argparse.ArgumentParser, said: dict[str, Any]) -> list[str]:
    """Options of other commands that a scenario changes from what they are by default."""
    usual: dict[str, Any] = {}
    for command in SEARCHES:
        options = vars(parser.parse_args([command]))
        usual |= {option.name: option.kind.kept(options[option.name]) for option in options_of(command)}
    return sorted(name for name, value in said.items() if value != usual[name])


def _tokens(option: Option, value: Any, folder: str) -> list[str]:
    return option.kind.words(option.name, _seen_from(option, value, lambda name: os.path.join(folder, name)))


def _seen_from(option: Option, kept: Any, place: Callable[[str], str]) -> Any:
    """The names of files in a value as `place` has them: a scenario's are relative to itself."""
    if option.file != "named":
        return kept
    return option.kind.each(kept, lambda name: place(name) if _is_file(name) else name)


def _is_file(name: str) -> bool:
    return "/" in name or name.lower().endswith(FILE_ENDINGS)


def scenario_text(options: argparse.Namespace) -> str:
    """What is run, as a file that `--scenario` runs again."""
    if options.command == "levers" and options.plan:
        raise BadInput("--save-scenario", f"the present fleet is that of {options.plan}", "leave one of them out")
    folder = os.path.dirname(os.path.abspath(options.save_scenario))
    document = {"schema": SCHEMA, **_kept(options, folder)}
    if said := getattr(options, "services", []):
        document["service"] = [_table_of(each, options, folder) for each in said]
    try:
        Scenario.model_validate(document)
    except ValidationError as error:
        raise BadInput("--save-scenario", first_problem(error), "need values that a scenario can hold") from None
    title = (
        f"# fleetopt {__version__}: fleetopt {options.command} --scenario {os.path.basename(options.save_scenario)}\n"
    )
    return title + tomli_w.dumps(document)


def _table_of(service: ServiceSaid, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """A service as a scenario in `folder` has it: what it has otherwise than all services."""
    own = service.options[0]
    found: dict[str, Any] = {"name": service.name, "class": "batch" if service.batch else "interactive"}
    if service.batch or service.end_to_end_s != options.end_to_end_s:
        found["deadline_s" if service.batch else "end_to_end_s"] = service.end_to_end_s
    for key, option in OF_A_SERVICE.items():
        kept = option.kind.kept(getattr(own, option.name))
        if kept is not None and kept != option.kind.kept(getattr(options, option.name)):
            found[key] = _seen_from(option, kept, _placed_in(folder))
    llms = [option.llm for option in service.options]
    if llms != [options.llm]:
        of_all = OF_A_SERVICE["llm"]
        found["llm"] = [_seen_from(of_all, llm, _placed_in(folder)) for llm in llms]
    return found


def _placed_in(folder: str) -> Callable[[str], str]:
    """Names of files as they are seen from there."""
    return lambda name: name if os.path.isabs(name) else os.path.relpath(name, folder)


def _kept(options: argparse.Namespace, folder: str) -> dict[str, dict[str, Any]]:
    """What the options say, by section and key, as a scenario in `folder` has it."""

    found: dict[str, dict[str, Any]] = {}
    for option in options_of(options.command):
        kept = option.kind.kept(getattr(options, option.name))
        if option.section and kept is not None:
            found.setdefault(option.section.name, {})[option.key or option.name] = _seen_from(
                option, kept, _placed_in(folder)
            )
    return found
