"""What the user did wrong, said in one line."""

import difflib
from collections.abc import Callable, Iterable

NEAR = 0.6  # of an option, a choice or a key to what was typed: from here on it is offered instead
MOST_CHARS = 800  # of each part of a message: a user's own text may be megabytes


class BadInput(ValueError):
    """Input refused at the door: the message names the place, the value and what is allowed.

    One line of bounded length without control characters, whatever a file or an option held.
    """

    def __init__(self, where: str, problem: str, allowed: str = ""):
        line = f"{_short(where)}: {_short(problem)}" + (f"; {_short(allowed)}" if allowed else "")
        super().__init__("".join(c if c.isprintable() else " " for c in line))


class BadField(BadInput):
    """A record refused for one of its fields. Whoever knows where the field came from, an option or a file, says it
    `at` that place."""

    def __init__(self, field: str, problem: str, allowed: str = "", *, of: str = ""):
        super().__init__(f"{field}: {of}" if of else field, problem, allowed)
        self.field, self.problem, self.allowed, self.of = field, problem, allowed, of

    def at(self, where: Callable[[str], str]) -> "BadField":
        """The same refusal, the field called as `where` has it."""
        return type(self)(where(self.field), self.problem, self.allowed, of=self.of)


def unknown_name(where: str, name: str, known: Iterable[str]) -> BadField:
    """The refusal of a name that is not in a catalog, with the nearest ones that are."""
    names = sorted(known)
    return BadField(where, f"unknown name {name!r}", f"{did_you_mean(name, names)}known: {', '.join(names)}")


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """What begins the list of what is known: the names nearest to one that is not, if any are near."""
    asked, names = name[:MOST_CHARS].lower(), list(known)
    near = difflib.get_close_matches(asked, names, n=3, cutoff=cutoff)
    near = near or [each for each in names if len(asked) > 2 and asked in each][:3]
    return f"did you mean {' or '.join(near)}? " if near else ""


def _short(text: str) -> str:
    """Both ends of a long text: a path has its name, and a message its end, on the right."""
    if len(text) <= MOST_CHARS:
        return text
    half = MOST_CHARS // 2 - 2
    return f"{text[:half]} … {text[-half:]}"
