"""Kinds of values an option may have: each parses what is typed, and refuses the rest by saying what is allowed.

A value is known in three forms: as typed (`--tp 4,8`), as the commands have it (`[4, 8]`), and as a scenario file keeps
it. Nothing here needs JAX or pydantic, so that `--help` is immediate.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fleetopt_jax.core.errors import NEAR, did_you_mean

MAX_CHARS = 4096  # of a name in a scenario
MAX_NAMES = 64
MAX_RANGE = 1_000_000  # numbers of one input
MAX_GROWTH = 1000.0  # times a year


def flag(name: str) -> str:
    """An option as it is typed, by the name argparse keeps it under."""
    return f"--{name.replace('_', '-')}"


def refused(text: str, allowed: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text} is not allowed: need {allowed}")


def no_choice(text: str, names: Iterable[str]) -> argparse.ArgumentTypeError:
    """The refusal of what is none of a few names, with the nearest of them."""
    return argparse.ArgumentTypeError(
        f"invalid choice: {text!r}; {did_you_mean(text, names, NEAR)}need {one_of(names)}"
    )


def one_of(names: Iterable[str]) -> str:
    """'a, b or c'."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


class Kind:
    """What most kinds do: a scenario has the value as it is, and `str` types it."""

    unit = ""  # of a number
    names_more = False  # whether it may be more than the name or the file it is given as

    @property
    def allowed(self) -> str:
        """What may be typed, in words."""
        raise NotImplementedError

    @property
    def argument(self) -> dict[str, Any]:
        """What argparse is told."""
        return {"type": self.parse}

    def parse(self, text: str) -> Any:
        """The value as the commands have it."""
        return text

    def kept(self, value: Any) -> Any:
        """The value as a scenario has it; None where there is nothing to say."""
        return value

    def typed(self, kept: Any) -> str:
        """What a scenario has, as it is typed."""
        return str(kept)

    def words(self, name: str, kept: Any) -> list[str]:
        """What a scenario has, as the words of a command line."""
        return [f"{flag(name)}={self.typed(kept)}"]

    def each(self, kept: Any, change: Callable[[str], str]) -> Any:
        """What a scenario has, with `change` of every name in it."""
        return kept


@dataclass(frozen=True)
class Number(Kind):
    """From `least` to `most`, both included unless `open`; never NaN, never infinite."""

    least: float = -math.inf
    most: float = math.inf
    open: bool = False
    whole: bool = False
    unit: str = ""

    @property
    def allowed(self) -> str:
        if self.whole:
            return f"a whole number from {self.least} to {self.most}"
        if self.most == math.inf:
            return "a positive, finite number" if self.open else f"a finite number >= {self.least:g}"
        ends = "between {:g} and {:g}" if self.open else "from {:g} to {:g}"
        return f"a number {ends.format(self.least, self.most)} {self.unit}".rstrip()

    def parse(self, text: str, otherwise: str = "") -> float:
        """The number in `text`; `otherwise` ends the refusal of one that is out of range."""
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            if self.whole:
                raise refused(repr(text), self.allowed) from None
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        above = self.least < value if self.open else self.least <= value
        below = value < self.most if self.open or self.most == math.inf else value <= self.most
        if not (above and below):
            raise refused(text, self.allowed + otherwise)
        return value

    def typed(self, kept: Any) -> str:
        return repr(kept).removesuffix(".0")


@dataclass(frozen=True)
class Percent(Kind):
    """A share, typed as 5% or 0.05, which the commands have as a number."""

    of: Number

    @property
    def allowed(self) -> str:
        return f"a share from {self.of.least:.1%} to {self.of.most:.0%}, as 5% or 0.05"

    def parse(self, text: str) -> float:
        number, scale = (text[:-1], 100.0) if text.endswith("%") else (text, 1.0)
        try:
            return self.of.parse(repr(float(number) / scale))
        except (ValueError, argparse.ArgumentTypeError):
            raise refused(repr(text), self.allowed) from None

    def typed(self, kept: Any) -> str:
        return self.of.typed(kept)


@dataclass(frozen=True)
class NumberOrAuto(Kind):
    """A number, or 'auto', which the commands have as None."""

    of: Number

    @property
    def allowed(self) -> str:
        return f"{self.of.allowed}, or 'auto'"

    def parse(self, text: str) -> float | None:
        return None if text == "auto" else self.of.parse(text, ", or 'auto'")

    def kept(self, value: Any) -> Any:
        return "auto" if value is None else value

    def typed(self, kept: Any) -> str:
        return kept if kept == "auto" else self.of.typed(kept)


@dataclass(frozen=True)
class NumberOrText(Kind):
    """A number, or a text that is none: the name of a thing or of a file."""

    of: Number
    texts: str  # which, in words
    names_more = True

    @property
    def allowed(self) -> str:
        return f"{self.of.allowed}, {self.texts}"

    def parse(self, text: str) -> float | str:
        try:
            float(text)
        except ValueError:
            return text
        return self.of.parse(text, f", {self.texts}")

    def typed(self, kept: Any) -> str:
        return kept if isinstance(kept, str) else self.of.typed(kept)

    def each(self, kept: Any, change: Callable[[str], str]) -> Any:
        return change(kept) if isinstance(kept, str) else kept


@dataclass(frozen=True)
class Text(Kind):
    """A name or another text; a scenario's has 1 to `most` of the `letters`, a regular expression's set."""

    letters: str = r"[^\x00-\x1f\x7f]"
    most: int = MAX_CHARS

    @property
    def allowed(self) -> str:
        return "a text"

    def each(self, kept: Any, change: Callable[[str], str]) -> Any:
        return change(kept)


@dataclass(frozen=True)
class Growth(Text):
    """How many times as much there is a year later, typed as 2x/year, 1.2x/quarter or 30%/year."""

    most: int = 40

    @property
    def allowed(self) -> str:
        return "2x/year, 1.2x/quarter or 30%/year"

    def parse(self, text: str) -> float:
        match = re.fullmatch(r"\s*([-+]?\d+(?:\.\d+)?)\s*(x|%)\s*/\s*(year|quarter|month)\s*", text.lower())
        if not match:
            raise refused(repr(text), self.allowed)
        number, kind, span = match.groups()
        once = float(number) if kind == "x" else 1.0 + float(number) / 100.0
        factor = once ** {"year": 1, "quarter": 4, "month": 12}[span] if once > 0 else 0.0
        if not 0 < factor <= MAX_GROWTH:
            raise refused(repr(text), f"{self.allowed}, more than 0 and at most {MAX_GROWTH:g} times a year")
        return factor

    def kept(self, value: Any) -> Any:
        return None if value is None else f"{value!r}x/year"


@dataclass(frozen=True)
class OneName(Text):
    """A text without commas, at which lists part."""

    letters: str = r"[^,\x00-\x1f\x7f]"

    @property
    def allowed(self) -> str:
        return "one name"

    def parse(self, text: str) -> str:
        if "," in text:
            raise refused(repr(text), self.allowed)
        return text


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few `names`."""

    names: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return one_of(self.names)

    @property
    def argument(self) -> dict[str, Any]:
        return {"choices": self.names}

    def parse(self, text: str) -> str:
        """For lists of choices; alone, the parser checks them."""
        if text not in self.names:
            raise no_choice(text, self.names)
        return text


@dataclass(frozen=True)
class Flag(Kind):
    """Given or not; with `negated`, `--no-...` takes it back."""

    negated: bool = False

    @property
    def allowed(self) -> str:
        return "given or not"

    @property
    def argument(self) -> dict[str, Any]:
        return {"action": argparse.BooleanOptionalAction if self.negated else "store_true"}

    def typed(self, kept: Any) -> str:
        return "given" if kept else "not given"

    def words(self, name: str, kept: Any) -> list[str]:
        return [flag(name if kept else f"no_{name}")] if kept or self.negated else []


@dataclass(frozen=True)
class EngineOf(OneName):
    """A GPU, or an engine's file, and what is otherwise there than elsewhere: h100, h200:tp=4:clock=0.8."""

    keys: Mapping[str, "Number | OneName"] = field(default_factory=dict)
    names_more = True

    @property
    def allowed(self) -> str:
        return f"GPU[:KEY=VALUE...] with {', '.join(self.keys)}"

    def parse(self, text: str) -> str:
        self.said(text)
        return text.strip()

    def said(self, text: str) -> tuple[str, dict[str, Any]]:
        """The GPU, and the keys with their values."""
        gpu, *changes = (part.strip() for part in text.split(":"))
        found: dict[str, Any] = {}
        for change in changes:
            key, equals, value = (part.strip() for part in change.partition("="))
            if not (equals and value) or key in found:
                raise refused(repr(text), f"{self.allowed}, each once")
            if key not in self.keys:
                raise no_choice(key, self.keys)
            try:
                found[key] = self.keys[key].parse(value)
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentTypeError(f"{key}: {error}") from None
        if not gpu or "," in text:
            raise refused(repr(text), self.allowed)
        return gpu, found

    def each(self, kept: Any, change: Callable[[str], str]) -> Any:
        gpu, colon, changes = kept.partition(":")
        return f"{change(gpu)}{colon}{changes}"


@dataclass(frozen=True)
class Several(Kind):
    """A list, typed with commas; a scenario's has `least` to `most` of them and, where `bare`, may be one value alone.

    With `as_text` the commands have it as it was typed.
    """

    of: Number | OneName | Choice
    least: int = 1
    most: int | None = MAX_NAMES
    bare: bool = True
    as_text: bool = False

    @property
    def names_more(self) -> bool:
        return self.of.names_more

    @property
    def allowed(self) -> str:
        return f"{self.of.allowed}; several with commas"

    def parse(self, text: str) -> list[Any] | str:
        return text if self.as_text else [self.of.parse(part.strip()) for part in text.split(",")]

    def kept(self, value: Any) -> Any:
        if not value:
            return None
        return [part.strip() for part in value.split(",")] if self.as_text else list(value)

    def typed(self, kept: Any) -> str:
        return ",".join(self.of.typed(each) for each in kept)

    def each(self, kept: Any, change: Callable[[str], str]) -> Any:
        return [self.of.each(value, change) for value in kept]


@dataclass(frozen=True)
class OneOf(Kind):
    """One of what other commands take several of: the scenario has a list all the same."""

    several: Several

    @property
    def allowed(self) -> str:
        return self.several.of.allowed

    def parse(self, text: str) -> Any:
        return self.several.of.parse(text)

    def kept(self, value: Any) -> Any:
        return None if value is None else [value]

    def typed(self, kept: Any) -> str:
        return self.several.typed(kept)

    def each(self, kept: Any, change: Callable[[str], str]) -> Any:
        return self.several.each(kept, change)


@dataclass(frozen=True)
class Stock(Kind):
    """A number for each GPU that is named: how many there are, or what one costs."""

    gpu: OneName
    count: Number
    counts: str = "N"

    @property
    def allowed(self) -> str:
        return f"GPU={self.counts},GPU={self.counts},..."

    def parse(self, text: str) -> dict[str, float]:
        found = {}
        for part in text.split(","):
            gpu, equals, count = part.partition("=")
            name = gpu.strip().lower()
            if not (equals and name) or name in found:
                raise refused(repr(part), f"{self.allowed}, each GPU once")
            found[name] = self.count.parse(count)
        return found

    def kept(self, value: Any) -> Any:
        return value or None

    def typed(self, kept: Any) -> str:
        return ",".join(f"{gpu}={self.count.typed(count)}" for gpu, count in kept.items())

    def words(self, name: str, kept: Any) -> list[str]:
        return super().words(name, kept) if kept else []


@dataclass(frozen=True)
class Checkpoint(Kind):
    """What vLLM loads for an LLM, given as often as there are LLMs."""

    @property
    def allowed(self) -> str:
        return "LLM=CHECKPOINT or LLM:PRECISION=CHECKPOINT"

    @property
    def argument(self) -> dict[str, Any]:
        return {"type": self.parse, "action": "append"}

    def kept(self, value: Any) -> Any:
        return value or None

    def parse(self, text: str) -> tuple[str, str]:
        llm, _, name = text.partition("=")
        if not (llm.strip() and name.strip()):
            raise refused(repr(text), self.allowed)
        return llm.strip(), name.strip()


@dataclass(frozen=True)
class Sweep(Kind):
    """(name, values) of an input that is swept, each value as its own option takes it."""

    axes: Mapping[str, tuple[str, Kind]]
    usual: Mapping[str, str] = field(default_factory=dict)  # values of an axis that is named alone

    @property
    def allowed(self) -> str:
        alone = f", or {one_of(self.usual)} alone" if self.usual else ""
        return f"NAME=V1,V2,... of {', '.join(self.axes)}{alone}"

    def parse(self, text: str) -> tuple[str, list[float]]:
        name, equals, values = text.partition("=")
        name = {"rate": "workload-rate"}.get(name.strip(), name.strip())
        values = values if equals else self.usual.get(name, "")
        if not values:
            raise refused(repr(text), self.allowed)
        if name not in self.axes:
            raise no_choice(name, self.axes)
        _, kind = self.axes[name]
        try:
            found = {kind.parse(value.strip()) for value in values.split(",")}
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
        if len(found) < 2:
            raise refused(repr(text), "at least two different values")
        return name, sorted(found)

    def kept(self, value: Any) -> Any:
        if value is None:
            return None
        name, values = value
        return f"{name}={','.join(map(str, values))}"


@dataclass(frozen=True)
class FrontOf(Kind):
    """(service, limits) of what one service is promised, the limits empty where they are not given; or (None, names) of
    two objectives."""

    objectives: tuple[str, ...]
    axis: str  # which, of a service
    limit: Number

    @property
    def allowed(self) -> str:
        return f"two of {', '.join(self.objectives)}, or {self.axis}:SERVICE[=V1,V2,...]"

    def parse(self, text: str) -> tuple[str | None, list[Any]]:
        axis, colon, rest = text.partition(":")
        if not colon:
            return None, self._objectives(text)
        if axis.strip() != self.axis:
            raise no_choice(axis.strip(), [self.axis])
        service, equals, values = rest.partition("=")
        if not service.strip() or (equals and not values.strip()):
            raise refused(repr(text), self.allowed)
        try:
            limits = {self.limit.parse(value.strip()) for value in values.split(",")} if equals else set()
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{self.axis}: {error}") from None
        return service.strip(), sorted(limits)

    def kept(self, value: Any) -> Any:
        if value is None:
            return None
        service, each = value
        said = ",".join(map(str, each))
        return said if service is None else f"{self.axis}:{service}" + (f"={said}" if each else "")

    def _objectives(self, text: str) -> list[str]:
        names = [part.strip() for part in text.split(",")]
        for name in names:
            if name == self.axis:
                raise refused(repr(text), f"{self.axis}:SERVICE, the service whose limit it is")
            if name not in self.objectives:
                raise no_choice(name, self.objectives)
        if len(names) != 2 or names[0] == names[1]:
            raise refused(repr(text), self.allowed)
        return names


@dataclass(frozen=True)
class Axis:
    """An input of a sweep: its option, its values as rows show them, and as the commands have them."""

    name: str
    shown: list[Any]
    values: list[Any]
    typed: str


@dataclass(frozen=True)
class Vary(Kind):
    """Inputs and the values that each takes, given as often as there are inputs: the last of two that are of one."""

    kinds: Mapping[str, tuple[str, Kind]]  # the option each is, by what it is called

    @property
    def allowed(self) -> str:
        return "KEY=V1,V2,..., KEY=V1;V2;... where values have commas, or KEY=A:B:N for N numbers from A to B"

    @property
    def argument(self) -> dict[str, Any]:
        return {"type": self.parse, "action": "append"}

    def parse(self, text: str) -> Axis:
        name, equals, values = text.partition("=")
        name = name.strip().lower().removeprefix("--").rpartition(".")[2].replace("-", "_")
        if not (equals and values.strip()):
            raise refused(repr(text), self.allowed)
        if name not in self.kinds:
            raise no_choice(name, self.kinds)
        name, kind = self.kinds[name]
        try:
            words = _numbers_between(values, kind) or values.split(";" if ";" in values else ",")
            found = {word.strip(): kind.parse(word.strip()) for word in words}
            for word, value in found.items():
                _check_choice(kind, word, value)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
        shown = [_shown(kind, word, value) for word, value in found.items()]
        return Axis(name, shown, list(found.values()), f"{name}={values.strip()}")

    def kept(self, value: Any) -> Any:
        return [axis.typed for axis in value] if value else None

    def words(self, name: str, kept: Any) -> list[str]:
        return [f"{flag(name)}={each}" for each in kept]


def _numbers_between(text: str, kind: Kind) -> list[str]:
    """The numbers of A:B:N as they would be typed; none where it is no such range."""
    parts = text.split(":")
    if len(parts) != 3 or ";" in text or "," in text:
        return []
    whole = isinstance(_one(kind), Number) and _one(kind).whole
    try:
        low, high, n = float(parts[0]), float(parts[1]), int(parts[2])
    except ValueError:
        raise refused(repr(text), "A:B:N, N numbers from A to B") from None
    if not (math.isfinite(low) and math.isfinite(high) and 2 <= n <= MAX_RANGE):
        raise refused(repr(text), f"A:B:N, N from 2 to {MAX_RANGE}")
    found = [low + (high - low) * i / (n - 1) for i in range(n - 1)] + [high]
    if whole and any(value != int(value) for value in found):
        raise refused(repr(text), "a range of whole numbers")
    return [repr(int(value)) if whole else repr(value) for value in found]


def _one(kind: Kind) -> Any:
    """What one value of a list, or the number of a share, is."""
    return getattr(kind, "of", kind)


def _check_choice(kind: Kind, word: str, value: Any) -> None:
    """Refuse what is empty, and what the parser of a command line checks by itself."""
    if not word:
        raise refused(repr(word), kind.allowed)
    if isinstance(kind, Choice):
        kind.parse(word)


def _shown(kind: Kind, word: str, value: Any) -> Any:
    """A value as a row has it: a number where it is one, else as it is typed."""
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    return one if isinstance(one, (int, float)) else word
