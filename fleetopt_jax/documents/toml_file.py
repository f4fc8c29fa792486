"""TOML files: read whole, and refused by the first thing that is wrong with its line."""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fleetopt_jax.core.errors import NEAR, BadInput, did_you_mean
from fleetopt_jax.core.files import first_problem, read_bytes

MAX_BYTES = 2**20  # what people write is a page of text

Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: str, model: type[Model], known: Mapping[str, Sequence[str]]) -> Model:
    """A TOML file checked as `model`, or `BadInput` with the line; `known` are the keys of each table, of the file
    itself under "", which the refusal of an unknown one lists."""
    data = read_bytes(path, MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(path, f"is not UTF-8 text: byte {error.start + 1}") from None
    try:
        return model.model_validate(tomllib.loads(text))
    except ValidationError as error:
        line = line_of(text, [str(part) for part in error.errors()[0]["loc"]])
        where = f"{path}, line {line}" if line else path
        raise BadInput(where, first_problem(error), _allowed(error, known)) from None
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise BadInput(path, f"is not TOML: {error}") from None


def _allowed(error: ValidationError, known: Mapping[str, Sequence[str]]) -> str:
    """The keys there are, where an unknown one was found, or how a name may be."""
    problem = error.errors()[0]
    if problem["loc"] and problem["loc"][-1] == "[key]":
        return "need letters, digits, dots, dashes and underscores, the first a letter or a digit"
    if problem["type"] != "extra_forbidden":
        return ""
    table = str(problem["loc"][0]) if len(problem["loc"]) > 1 else ""
    if table not in known:
        return ""
    return f"{did_you_mean(str([*problem['loc']][-1]), known[table], NEAR)}known: {', '.join(known[table])}"


def line_of(text: str, location: Sequence[str]) -> int | None:
    """The line of a key, by its table, or the number of it among those of an array; of the table where the key is not
    found."""
    found, inside, counts = None, "", Counter[str]()
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[(\[?)\s*([^\]]*?)\s*\]", line)
        if header:
            inside = f"{header[2]}.{counts[header[2]]}" if header[1] else header[2]
            counts[header[2]] += 1
        key = re.match(r"""\s*([^\s=]+)\s*=""", line)
        here = [*_parts(inside), *(_parts(key[1]) if key else ())]
        if not (key or header) or not here:
            continue
        on_the_way, beneath = here == list(location[: len(here)]), here[: len(location)] == list(location)
        if on_the_way or (beneath and found is None):  # [gpu.x1] is where an unknown table `gpu` begins
            found = number
    return found


def _parts(dotted: str) -> list[str]:
    """The keys of `gpus."my.gpu"`: a dot in quotes parts nothing."""
    return [part.strip(" \"'") for part in re.findall(r"""(?:"[^"]*"|'[^']*'|[^."'])+""", dotted) if part.strip()]
