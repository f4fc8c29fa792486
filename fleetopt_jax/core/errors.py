"""What the user did wrong, said in one line."""

import difflib
from collections.abc import Iterable


class BadInput(ValueError):
    """Input refused at the door: the message names the place, the value and what is allowed."""

    def __init__(self, where: str, problem: str, allowed: str = ""):
        line = f"{where}: {problem}" + (f"; {allowed}" if allowed else "")
        super().__init__("".join(c if c.isprintable() else " " for c in line))


def unknown_name(where: str, name: str, known: Iterable[str]) -> BadInput:
    """The refusal of a name that is not in a catalog, with the nearest ones that are."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return BadInput(where, f"unknown name {name!r}", f"{hint}known: {', '.join(names)}")
