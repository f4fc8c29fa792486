"""A hit curve in a file: csv or JSON, shares of prompt tokens over the size of a cache or the age it keeps."""

import csv
import io
import os
from typing import Any

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import parse_json, read_bytes
from fleetopt_jax.workload.atoms import Workload
from fleetopt_jax.workload.reuse import with_age_curve, with_hit_curve

SIZES = {"cache_tokens": with_hit_curve, "age_s": with_age_curve}
SHARES = ("hit_token_frac", "hit_frac")  # the first that is there
NEED = "need columns cache_tokens or age_s, and hit_frac, as fleetopt trace --json has them in its prefix.curve"


def with_curve_of(path: str | os.PathLike, workload: Workload) -> Workload:
    """The workload with the hit curve in a file, or `BadInput` that names the file and what is wrong.

    JSON is a list of points, or an object whose `curve`, or whose `prefix` has one: what `fleetopt trace` writes. csv
    has a point a row, and a header.
    """
    where = os.fspath(path)
    points = _points(where, read_bytes(where))
    size = next((name for name in SIZES if all(name in point for point in points)), None)
    share = next((name for name in SHARES if all(name in point for point in points)), None)
    if not points or size is None or share is None:
        raise BadInput(where, f"has no hit curve: its columns are {', '.join(points[0]) if points else 'none'}", NEED)
    try:
        return SIZES[size](workload, *([float(point[name]) for point in points] for name in (size, share)))
    except (TypeError, ValueError) as error:
        raise BadInput(where, str(error)) from None


def _points(where: str, data: bytes) -> list[dict[str, Any]]:
    if data.lstrip()[:1] in (b"{", b"["):
        found = parse_json(where, data)
        for key in ("prefix", "curve"):
            found = found.get(key, found) if isinstance(found, dict) else found
        points = found if isinstance(found, list) else []
    else:
        try:
            points = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
        except (UnicodeDecodeError, csv.Error):
            raise BadInput(where, "is neither csv nor JSON", NEED) from None
    if not all(isinstance(point, dict) for point in points):
        raise BadInput(where, "its points are no objects", NEED)
    return points
