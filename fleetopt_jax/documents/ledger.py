"""A ledger as JSON (`fleetopt-ledger/1`, SI units): its rows, written whole and checked when they are read."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.files import to_json, write_whole
from fleetopt_jax.documents.fields import NotNegative, Part, Positive, read_as
from fleetopt_jax.documents.plan import cache_to_json, slo_to_json
from fleetopt_jax.fleet.choices.prefix_cache import PrefixCache
from fleetopt_jax.fleet.fleet import Slo

SCHEMA = "fleetopt-ledger/1"
Walk = Literal["published", "stack"]  # from the published system to the physical one, or on to a stack of 2026


@dataclass(frozen=True)
class LedgerRow:
    """One choice switched, from one of its records to another, by their names. tok/J is None where no fleet holds the
    limits; `gain` is FleetOpt over homogeneous."""

    choice: str
    from_: str | None
    to: str | None
    tok_per_j_homogeneous: float | None
    tok_per_j_two_pool: float | None
    tok_per_j_fleetopt: float | None
    gain: float | None
    short_window_tokens: int | None  # of the FleetOpt fleet; None where one pool is best
    gamma: float | None  # of the FleetOpt fleet

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {"choice": values.pop("choice"), "from": values.pop("from_"), "to": values.pop("to"), **values}


def ledger_to_json(
    rows: Sequence[LedgerRow],
    *,
    workload_name: str,
    arrival_rate_per_s: float,
    spec: EngineSpec,
    slo: Slo,
    prefix_cache: PrefixCache | None = None,
    walk: Walk = "published",
) -> dict[str, Any]:
    """The rows as the contract's JSON object, and what they are about: where the walk begins, and of a `prefix_cache`
    that a row of them has, what it finds."""
    found = {"prefix_cache": cache_to_json(prefix_cache)} if prefix_cache and prefix_cache.finds else {}
    return {
        "schema": SCHEMA,
        "walk": walk,
        "workload": {"name": workload_name, "arrival_rate_per_s": arrival_rate_per_s},
        "gpu": spec.file or spec.gpu_name,
        "llm": spec.llm_name,
        **vars(spec.split),
        "serving": spec.serving,
        "slo": slo_to_json(slo),
        **found,
        "rows": [row.to_json() for row in rows],
    }


def save_ledger(
    rows: Sequence[LedgerRow],
    path: str | os.PathLike,
    *,
    workload_name: str,
    arrival_rate_per_s: float,
    spec: EngineSpec,
    slo: Slo,
) -> None:
    """`ledger_to_json` as a file, written whole or not at all: `load_ledger` reads its rows back."""
    about: dict[str, Any] = {"workload_name": workload_name, "arrival_rate_per_s": arrival_rate_per_s}
    write_whole(path, to_json(ledger_to_json(rows, **about, spec=spec, slo=slo)) + "\n")


class RowPart(Part):
    choice: str
    from_: str | None = Field(alias="from")
    to: str | None
    tok_per_j_homogeneous: Positive | None
    tok_per_j_two_pool: Positive | None
    tok_per_j_fleetopt: Positive | None
    gain: NotNegative | None
    short_window_tokens: int | None
    gamma: Positive | None


class LedgerFile(Part):
    """What is read of a ledger."""

    schema_name: Literal["fleetopt-ledger/1"] = Field(SCHEMA, alias="schema")  # files of 0.1.0 have none
    rows: list[RowPart]


def load_ledger(path: str | os.PathLike) -> list[LedgerRow]:
    """The rows in a file that `fleetopt ledger` or `save_ledger` wrote.

    Raises BadInput that names the file, the field and the value.
    """
    where = os.fspath(path)
    file = read_as(LedgerFile, where, SCHEMA, "ledger")
    return [LedgerRow(**row.model_dump()) for row in file.rows]
