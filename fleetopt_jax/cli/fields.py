"""What the library calls its fields, said as the options that set them."""

import re

from fleetopt_jax.cli.option import Field
from fleetopt_jax.cli.table import TABLE
from fleetopt_jax.cli.values import flag

FLAGS: dict[str, tuple[str, Field]] = {
    option.field.name: (flag(option.name), option.field) for option in reversed(TABLE) if option.field
}
_NUMBER = r"-?(?:inf|nan|\d+(?:\.\d+)?(?:e[-+]?\d+)?)\b"
_FIELD = re.compile(
    rf"(?:(?P<less>{_NUMBER})(?P<is_less> <=? ))?"
    rf"\b(?P<field>{'|'.join(FLAGS)})\b"
    rf"(?:(?P<more_is>=| [<>]=? )(?P<more>{_NUMBER}))?"
)
_GOT = re.compile(rf"(?<=, got ){_NUMBER}$")


def said_as_options(message: str) -> str:
    """A refusal of the library with the options in place of its fields, and the numbers beside them in their units.

    "need ttft_p99_s > 0, got ttft_p99_s=-0.5" becomes "need --ttft-p99-ms > 0, got --ttft-p99-ms=-500". Fields that no
    option stands for are left as they are.
    """
    sizes = {FLAGS[match["field"]][1].size for match in _FIELD.finditer(message)}
    said = _FIELD.sub(_as_option, message)
    if len(sizes) == 1:  # it is clear of what the last number is
        size = sizes.pop()
        said = _GOT.sub(lambda match: _in_unit(match[0], size), said)
    return said


def _as_option(match: re.Match[str]) -> str:
    name, (_, size) = FLAGS[match["field"]]
    less = f"{_in_unit(match['less'], size)}{match['is_less']}" if match["less"] else ""
    more = f"{match['more_is']}{_in_unit(match['more'], size)}" if match["more"] else ""
    return f"{less}{name}{more}"


def _in_unit(number: str, size: float) -> str:
    return number if size == 1.0 else f"{float(number) / size:g}"
