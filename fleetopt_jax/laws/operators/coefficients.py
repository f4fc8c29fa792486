"""The coefficients of an operator law, checked."""

import math
from collections.abc import Mapping

from jax import Array

from fleetopt_jax.core.struct import as_floats


def checked(
    law: type, coefficients: Mapping[str, float], *, positive: tuple[str, ...], least: Mapping[str, float] | None = None
) -> dict[str, Array]:
    """The fields of a law as floats: all of them and no others, finite, >= 0 or their `least`, `positive` ones > 0,
    sharpness >= 1, cached_frac <= 1."""
    names = tuple(law.__dataclass_fields__)
    if set(coefficients) != set(names):
        raise ValueError(f"need {', '.join(names)}, got {', '.join(coefficients)}")
    least = {"sharpness": 1.0} | dict(least or {})
    for name, value in coefficients.items():
        low = least.get(name, 0.0)
        if not (low <= value < math.inf and (value > 0 or name not in positive)):
            raise ValueError(f"need a finite {name} {'>' if name in positive else '>='} {low:g}, got {value}")
    if coefficients.get("cached_frac", 0.0) > 1:
        raise ValueError(f"need cached_frac <= 1, got {coefficients['cached_frac']}")
    return as_floats(**coefficients)
