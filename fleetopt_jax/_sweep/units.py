"""From scenarios to units of work: those that one program answers together, each of the others by itself.

Which scenarios are in which unit depends on the scenarios alone, in their order; so whoever works a unit off, and in
which order units are done, changes nothing.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetopt_jax import __version__
from fleetopt_jax._optimize.batch import BATCH, answers, asked_of, fingerprint, is_batched
from fleetopt_jax._optimize.problem import Method, Problem
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.files import first_line
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.documents.sweep import OURS, Row, Value, answer_rows, failed_row, plan_row

MAX_SCENARIOS = 10_000_000

Make = Callable[..., Problem]  # of the inputs, by keyword


@dataclass(frozen=True)
class Scenarios:
    """Every combination of the values of some inputs, the last input changing fastest."""

    make: Make
    axes: Mapping[str, Sequence[Value]]

    def __len__(self) -> int:
        return math.prod(len(values) for values in self.axes.values())

    def inputs(self) -> Iterator[dict[str, Value]]:
        """Of each scenario."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values))


def scenarios_of(make: Make, axes: Mapping[str, Sequence[Any]]) -> Scenarios:
    """Checked scenarios; NumPy's numbers as Python's."""
    for name, values in axes.items():
        if name in OURS:
            raise BadField(name, "a sweep has a column of that name", "need another name")
        if not len(values):
            raise BadField(name, "has no values", "need one or more")
    plain = {name: [value.item() if hasattr(value, "item") else value for value in axes[name]] for name in axes}
    scenarios = Scenarios(make, plain)
    if not axes or len(scenarios) > MAX_SCENARIOS:
        raise BadField("axes", f"{len(scenarios) if axes else 0:,} scenarios", f"need 1 to {MAX_SCENARIOS:,}")
    return scenarios


@dataclass(frozen=True)
class How:
    """How scenarios are answered."""

    method: Method | None
    n_thresholds: int


@dataclass(frozen=True)
class Member:
    """One scenario: its problem, or why there is none."""

    number: int
    inputs: dict[str, Value]
    problem: Problem | None
    reason: str = ""

    def row(self, found: Row) -> Row:
        return {"scenario": self.number} | self.inputs | found


@dataclass(frozen=True)
class Unit:
    """Scenarios that are answered together."""

    number: int
    members: tuple[Member, ...]
    how: How
    batched: bool

    @property
    def key(self) -> str:
        """A name of what is asked: equal for the same scenarios, asked the same way by the same version."""
        content = hashlib.sha256(repr((__version__, self.how)).encode())
        for member in self.members:
            content.update(repr((member.number, member.inputs, member.reason)).encode())
            if member.problem is not None:
                content.update(fingerprint(member.problem))
        return f"{self.number:07d}-{content.hexdigest()[:16]}"


def units_of(scenarios: Scenarios, how: How) -> Iterator[Unit]:
    """The units of work, as they fill up."""
    numbers, filling = itertools.count(), {}
    for number, inputs in enumerate(scenarios.inputs()):
        try:
            member = Member(number, inputs, scenarios.make(**inputs))
        except ValueError as error:  # the scenario's: that a key or a value is none was refused before
            member = Member(number, inputs, None, str(error))
        kind, size = _kind(member, how)
        filling.setdefault(kind, []).append(member)
        if len(filling[kind]) == size:
            yield Unit(next(numbers), tuple(filling.pop(kind)), how, kind is not None)
    for kind, members in filling.items():
        yield Unit(next(numbers), tuple(members), how, kind is not None)


def _kind(member: Member, how: How) -> tuple[tuple | None, int]:
    """What scenarios of one unit have in common, None for those that are answered one by one; and how many they are."""
    if member.problem is None:
        return ("failed",), BATCH
    if not is_batched(member.problem, how.method):
        return None, 1
    return asked_of(member.problem, how.n_thresholds).shape, BATCH


def answer(unit: Unit) -> list[Row]:
    """The rows of a unit."""
    require_float64("sweep")
    if unit.batched and all(member.problem is not None for member in unit.members):
        try:
            return _together(unit)
        except (ArithmeticError, AssertionError, RuntimeError, ValueError):
            pass  # one of them: which, and why, is found one by one
    return [_alone(member, unit) for member in unit.members]


def _together(unit: Unit) -> list[Row]:
    asked = [asked_of(member.problem, unit.how.n_thresholds) for member in unit.members if member.problem]
    found = answers(asked[0].sums(), [each.question for each in asked])
    return [member.row(row) for member, row in zip(unit.members, answer_rows(asked, found), strict=True)]


def _alone(member: Member, unit: Unit) -> Row:
    if member.problem is None:
        return member.row(failed_row(member.reason))
    try:
        if unit.batched:
            return _together(Unit(unit.number, (member,), unit.how, True))[0]
        return member.row(plan_row(optimize(member.problem, unit.how.method)))
    except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
        said = first_line(error)
        return member.row(failed_row(said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"))
