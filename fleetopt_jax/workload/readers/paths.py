"""Values deep in JSON records by dotted path: `usage.prompt_tokens`.

A list of `{"key": ..., "value": {"intValue": ...}}`, as OpenTelemetry writes attributes, is read as an object.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import shown
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.numbers import place
from fleetopt_jax.workload.readers.records import Columns

Path = tuple[str, ...]
Record = dict[str, Any]


def paths_of(records: Iterable[Record]) -> dict[str, Path]:
    """The scalars in these records: dotted name -> keys that lead there, those on the outside first."""
    found: dict[str, Path] = {}
    for record in records:
        for path in _leaves(record):
            if len(found) >= limits.MAX_NAMES:
                return found
            found.setdefault(".".join(path), path)
    return found


def value_of(record: Any, path: Path) -> Any:
    """What lies at the end of a path; None where a step of it is missing."""
    for key in path:
        record = _object(record)
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def has_pairs(record: Any, path: Path) -> bool:
    """Whether a list of key-value pairs lies on a path."""
    for key in path:
        if isinstance(record, list):
            return True
        record = record.get(key) if isinstance(record, dict) else None
    return False


def columns_of(where: str, before: int, records: Sequence[Any], paths: dict[str, Path]) -> Columns:
    """The values at these paths as columns: numbers where all of one are, else texts."""
    return {
        name: _column(where, before, name, [value_of(record, path) for record in records])
        for name, path in paths.items()
    }


def list_type(values: Iterable[Any]) -> pa.DataType | None:
    """The type of a column of lists, of whole numbers or else of texts; None where there is no list among the values,
    or one of anything else."""
    lists = [value for value in values if isinstance(value, list)]
    kinds = {type(each) for value in lists for each in value}
    if not lists or not kinds <= {int, str}:
        return None
    return pa.list_(pa.int64() if kinds <= {int} else pa.string())


def _column(where: str, before: int, name: str, values: list[Any]) -> pa.Array:
    if any(isinstance(value, list) for value in values) and all(type(value) in (list, type(None)) for value in values):
        of_lists = list_type(values)
        if of_lists is None:  # lists of lists, which nothing is read from
            return pa.nulls(len(values))
        try:
            return pa.array(values, of_lists)
        except (OverflowError, pa.ArrowException):  # whole numbers that no int64 holds
            return pa.array([value and [str(each) for each in value] for value in values], pa.list_(pa.string()))
    if all(value is None or type(value) in (int, float) for value in values):
        try:
            return pa.array([None if value is None else float(value) for value in values], pa.float64())
        except OverflowError:  # an integer that no double holds: refused as a text
            pass
    texts: list[str | None] = []
    for row, value in enumerate(values):
        if value is None or isinstance(value, str):
            texts.append(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            texts.append(_written(value))
        else:
            raise BadInput(place(where, before, row), f"{name} = {shown(value)}", "need a number or a text")
    try:
        return pa.array(texts, pa.string())
    except (UnicodeEncodeError, pa.ArrowException):  # half of a surrogate pair
        raise BadInput(where, f"column {name!r} holds a text that is not UTF-8", "save the file as UTF-8") from None


def _written(value: float) -> str:
    try:
        return repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"


def _object(value: Any) -> Any:
    """A list of key-value pairs as an object; anything else as it is."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict) or "key" not in value[0]:
        return value
    pairs = (each for each in value if isinstance(each, dict) and isinstance(each.get("key"), str))
    return {each["key"]: _unwrapped(each.get("value")) for each in pairs}


def _unwrapped(value: Any) -> Any:
    """`{"intValue": "889"}` as what it wraps."""
    if isinstance(value, dict) and len(value) == 1:
        (kind,) = value
        if kind in ("stringValue", "intValue", "doubleValue", "boolValue"):
            return value[kind]
    return value


def _leaves(record: Record) -> Iterator[Path]:
    level: list[tuple[Path, Any]] = [((), record)]
    for _ in range(limits.MAX_NESTING):
        below: list[tuple[Path, Any]] = []
        for path, value in level:
            for key, child in value.items():
                inner = _object(child)
                if isinstance(inner, dict):
                    below.append(((*path, str(key)), inner))
                else:
                    yield (*path, str(key))
        level = below
