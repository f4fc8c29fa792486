"""What the five table scripts share: reproduce one table, print it, keep it as results/tableN.csv."""

import csv
import io
from dataclasses import astuple, fields
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.published.tables import Cell, reproduce  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def run(number: int) -> None:
    """Reproduce table `number`; a cell that misses its printed digits is an error."""
    result = reproduce([number])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Cell)])
    for cell in result.tables[str(number)]:
        writer.writerow([f"{x:.9g}" if isinstance(x, float) else x for x in astuple(cell)])  # the same on any machine
    write_whole(RESULTS / f"table{number}.csv", text.getvalue())
    print(text.getvalue())
    if result.mismatches:
        raise SystemExit(f"table {number}: {result.mismatches} mismatches")
