"""Columns as numbers, whatever type or writing they come in; a wrong one is named by its row."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import shown

arrow: Any = pc  # which makes its functions at run time, unseen by type checkers
GROUPS = (",", "'", "\u2019", " ", "\u00a0", "\u202f")  # between thousands
NULLS = ("", "null", "NULL", "Null", "None", "NA", "N/A", "#N/A", "\\N", "-")  # texts for no value
BLANKS = " \t\u00a0"


class BadRow(Exception):
    """A wrong value in a row of a piece."""

    def __init__(self, row: int, problem: str, need: str):
        self.row, self.problem, self.need = row, problem, need

    def at(self, where: str, before: int) -> BadInput:
        """The refusal, of a piece before which there are `before` rows."""
        return BadInput(place(where, before, self.row), self.problem, self.need)


def place(where: str, before: int, row: int) -> str:
    """Row `row` of a piece before which there are `before` rows, as refusals name it."""
    return f"{where}, row {before + row + 1}"


def numbers(name: str, column: pa.Array, *, decimal_comma: bool, whole: bool) -> np.ndarray:
    """The values of a column, NaN where there is none, or `BadRow`.

    Text is read with its separators of thousands: `4,446` is 4446 where `whole` numbers are meant. Between semicolons
    a comma is a decimal point, and a dot may part thousands.
    """
    column = undictionaried(column)
    values = None if pa.types.is_boolean(column.type) else cast(column, pa.float64())
    plain = column
    if values is None and is_text(column.type):
        plain = _with_nulls(column)
        values = cast(plain, pa.float64())
    if values is None and is_text(column.type):
        plain = _plainly_written(plain, decimal_comma, whole)
        values = cast(plain, pa.float64())
    if values is None:
        row = 0 if pa.types.is_boolean(column.type) else first_uncastable(plain, pa.float64())
        raise BadRow(row, f"{name} = {value_at(column, row)!r}", "need a number")
    found = values.to_numpy(zero_copy_only=False)
    if values.null_count == 0:
        return _without_nan(name, column, found)
    given = ~values.is_null().to_numpy(zero_copy_only=False)
    return np.where(given, _without_nan(name, column, np.where(given, found, 0.0)), np.nan)


def _without_nan(name: str, column: pa.Array, found: np.ndarray) -> np.ndarray:
    bad = np.isnan(found)
    if bad.any():
        row = int(np.argmax(bad))
        raise BadRow(row, f"{name} = {value_at(column, row)}", "need a number")
    return found


def tokens(name: str, column: pa.Array, *, decimal_comma: bool, most: float) -> np.ndarray:
    """Whole numbers of tokens, 0 included, NaN where there is none; or `BadRow`."""
    values = numbers(name, column, decimal_comma=decimal_comma, whole=True)
    if decimal_comma and is_text(column.type) and (values != np.floor(values))[~np.isnan(values)].any():
        values = numbers(name, _without_dots(column), decimal_comma=decimal_comma, whole=True)
    good = (values >= 0) & (values <= most) & (values == np.floor(values))
    if not good.all() and not (good | np.isnan(values)).all():
        row = int(np.argmin(good | np.isnan(values)))
        shown_value = value_at(undictionaried(column), row)
        raise BadRow(row, f"{name} = {shown_value}", f"need a whole number from 1 to {most:.0e}")
    return values


def _with_nulls(column: pa.Array) -> pa.Array:
    """Texts that stand for no value as none."""
    text = arrow.utf8_trim(column, characters=BLANKS)
    nothing = arrow.is_in(text, value_set=pa.array(NULLS, text.type))
    return arrow.if_else(nothing, pa.scalar(None, text.type), text)


def _plainly_written(column: pa.Array, decimal_comma: bool, whole: bool) -> pa.Array:
    """Text numbers without blanks, separators of thousands and decimal commas."""
    text = column
    for group in GROUPS:
        if group == "," and decimal_comma and not whole:
            continue
        end = "$" if whole else r"(\.\d+)?$"
        grouped = arrow.match_substring_regex(text, rf"^[-+]?[1-9]\d{{0,2}}({group}\d{{3}})+{end}")
        text = arrow.if_else(grouped, arrow.replace_substring(text, group, ""), text)
    if decimal_comma:
        with_comma = arrow.match_substring_regex(text, r"^[-+]?\d[\d.]*,\d+$")
        dotless = arrow.replace_substring(arrow.replace_substring(text, ".", ""), ",", ".")
        text = arrow.if_else(with_comma, dotless, text)
    return text


def _without_dots(column: pa.Array) -> pa.Array:
    """`1.234` as 1234, where thousands are parted by dots."""
    text = arrow.utf8_trim(column, characters=BLANKS)
    grouped = arrow.match_substring_regex(text, r"^[1-9]\d{0,2}(\.\d{3})+$")
    return arrow.if_else(grouped, arrow.replace_substring(text, ".", ""), text)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def undictionaried(column: pa.Array) -> pa.Array:
    """A column of categories as the values they stand for."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def cast(column: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """The column in another type, or None where a value has none."""
    try:
        return pc.cast(column, kind)
    except pa.ArrowException:
        return None


def first_uncastable(column: pa.Array, kind: pa.DataType) -> int:
    """The row of the first value that cannot be cast, by bisection."""
    good, bad = 0, len(column)  # the first `good` rows can be cast, the first `bad` cannot
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if cast(column[good:middle], kind) is not None else (good, middle)
    return bad - 1


def value_at(column: pa.Array, row: int) -> str:
    """A value as a message shows it."""
    try:
        value = column[row].as_py()
    except (ValueError, OverflowError):  # not UTF-8; a time finer or further than Python's
        return "unreadable"
    return shown(value)
