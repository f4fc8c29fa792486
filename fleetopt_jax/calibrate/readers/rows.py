"""A row of measurements, whatever file it was in: cells of text under the names that files use."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import shown

LEAST = 1e-12  # of any number: smaller ones underflow in the fit
Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """Its cells by column, and where it is, for messages."""

    place: str
    cells: Mapping[str, str]

    def number(self, column: str | None, most: float) -> float:
        """The positive number in a column."""
        text = self.cells[column or ""]  # a table without the column is refused before
        try:
            value = float(text) if text.isascii() and "_" not in text else math.nan  # Python takes 1_0 and ١ too
        except ValueError:
            value = math.nan
        if not LEAST <= value <= most:  # also NaN
            allowed = f"need a number, more than 0 (at least {LEAST:g}) and at most {most:g}"
            raise BadInput(self.place, f"{column} = {shown(text)!r}", allowed)
        return value

    def count(self, column: str, most: int = 1024) -> int:
        """The whole number from 1 in a column."""
        value = self.number(column, most)
        if value != int(value):
            raise BadInput(
                self.place, f"{column} = {shown(self.cells[column])!r}", f"need a whole number from 1 to {most}"
            )
        return int(value)

    def text(self, columns: Sequence[str]) -> str:
        """What the first of these columns that says anything says, or nothing."""
        return next((self.cells[name] for name in columns if self.cells.get(name)), "")

    def has(self, columns: Sequence[str]) -> str | None:
        """The first of these columns that says anything."""
        return next((name for name in columns if self.cells.get(name)), None)


@dataclass(frozen=True)
class Rows:
    """The rows of a file, each with all its columns, and what the file was taken for."""

    source: str
    layout: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def rows_of(source: str, layout: str, records: Sequence[Record]) -> Rows:
    """Records of a JSON document as rows: their scalars, by name in lower case."""
    flat = [
        {name.strip().lower(): _text(value) for name, value in record.items() if not isinstance(value, (dict, list))}
        for record in records
    ]
    columns = tuple(dict.fromkeys(name for record in flat for name in record))
    whole = [dict.fromkeys(columns, "") | record for record in flat]
    return Rows(source, layout, columns, tuple(Row(f"{source}, row {i}", cells) for i, cells in enumerate(whole, 1)))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return str(value).strip() if isinstance(value, (str, int, float, bool)) else ""


def at(record: Any, *path: str) -> Any:
    """What a path of keys leads to in nested objects; None where it ends."""
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def said(record: Record) -> Record:
    """Without what nobody says."""
    return {name: value for name, value in record.items() if value is not None and value != ""}
