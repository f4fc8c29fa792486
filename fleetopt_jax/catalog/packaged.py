"""The catalog's own files: coefficients and workloads, as they were committed."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

DATA = files("fleetopt_jax.catalog") / "data"


@cache
def packaged_json(*path: str) -> Any:
    """A JSON document of `data/`, read once: not to be changed."""
    return json.loads(DATA.joinpath(*path).read_text())
