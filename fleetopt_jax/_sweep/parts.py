"""What is done of a sweep, on disk: a file for each unit of work, until all are there and make one.

A part is written whole or not at all, under the name of what it answers. So whatever ended a sweep, a power cut
included, the same sweep goes on from the parts that are there, and the file it comes to is the same to the byte.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from fleetopt_jax._sweep.units import Unit
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import write_whole
from fleetopt_jax.documents.sweep import Row, load_sweep, parquet_of, table_of


class Parts:
    """The parts of one sweep, in a folder beside its file."""

    def __init__(self, out: str | os.PathLike, schema: pa.Schema):
        self._out, self._schema = os.fspath(out), schema
        self.folder = Path(f"{self._out}.parts")
        self._mine: list[Path] = []
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise BadInput(str(self.folder), f"cannot be made: {error.strerror or error}", "need a folder") from None

    def has(self, unit: Unit) -> bool:
        """Whether a unit was done, perhaps by a run before."""
        path = self._place(unit)
        if not path.exists():
            return False
        self._mine.append(path)
        return True

    def put(self, unit: Unit, rows: Iterable[Row]) -> None:
        """Keep what a unit came to."""
        path = self._place(unit)
        write_whole(path, parquet_of(table_of(rows, self._schema)))
        self._mine.append(path)

    def finish(self) -> pa.Table:
        """All rows in the order of the scenarios, in the file of the sweep; the parts go."""
        table = pa.concat_tables([load_sweep(path) for path in sorted(self._mine)]).sort_by("scenario")
        table = table.replace_schema_metadata(self._schema.metadata).combine_chunks()
        write_whole(self._out, parquet_of(table), "--out")
        shutil.rmtree(self.folder)
        return table

    def _place(self, unit: Unit) -> Path:
        return self.folder / f"{unit.key}.parquet"
