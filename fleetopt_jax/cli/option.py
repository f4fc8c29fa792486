"""What an option is: one record, from which the parser, files, completion and the README's table are made."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fleetopt_jax.cli.values import Kind, flag

FILES = {"read": "a file", "named": "a name or a file", "written": "a file"}


@dataclass(frozen=True)
class Section:
    """A table of a scenario file; `groups` are the commands whose help has it as a group, and how that is described."""

    name: str
    about: str
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    of_plan: bool = False  # a plan file says all this itself


class Field(NamedTuple):
    """What the library calls an option where it refuses it; the option's unit is `size` of the field's."""

    name: str
    size: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Option:
    """What may be given to `commands`."""

    name: str  # as argparse keeps it
    kind: Kind
    about: str = ""
    several: str = ""  # more of `about`, where several may be given
    otherwise: str = ""  # what holds where it is not given; {} is the default
    default: Any = None
    commands: tuple[str, ...]
    metavar: str | None = None
    section: Section | None = None  # of a scenario
    key: str = ""  # in the section, where it is not the name
    grouped: bool = True  # in its section's group of the help
    of_plan: bool | None = None  # whether a plan file says it itself; None: as its section
    field: Field | None = None
    file: Literal["read", "named", "written"] | None = None  # named: a name of ours, or a file that is read
    nargs: str | None = None  # of what is given by its place: "" once, "?" perhaps, "*" any number
    required: bool = False
    alone: bool = False  # no two of these together

    @property
    def where(self) -> str:
        """As a refusal names it."""
        return flag(self.name) if self.nargs is None else self.name

    @property
    def said_by_a_plan(self) -> bool:
        if self.of_plan is not None:
            return self.of_plan
        return self.section is not None and self.section.of_plan

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        return self.kind.allowed if self.kind.names_more else FILES.get(self.file or "", self.kind.allowed)

    @property
    def unless(self) -> str:
        """What holds where it is not given, in words."""
        return self.otherwise.replace("{}", self.usual) if "{}" in self.otherwise else self.otherwise

    @property
    def help(self) -> str | None:
        return f"{self.about}{self.several}{self.unless and f' ({self.unless})'}".strip() or None

    @property
    def described(self) -> str:
        """What it is, with its unit where the words do not say it."""
        unit = self.kind.unit
        return f"{self.about} [{unit}]".strip() if unit and unit not in self.about else self.about

    @property
    def usual(self) -> str:
        """The default, as it would be typed."""
        kept = self.kind.kept(self.default)
        return "" if kept is None else self.kind.typed(kept)
