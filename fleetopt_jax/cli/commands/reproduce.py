"""`fleetopt reproduce`: the published tables, cell by cell."""

import argparse
import dataclasses

from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import BUG, OK
from fleetopt_jax.published.tables import reproduce
from fleetopt_jax.report import tables


def run(options: argparse.Namespace) -> Answer:
    result = reproduce(options.tables)
    document = {
        "tables": {number: [dataclasses.asdict(cell) for cell in cells] for number, cells in result.tables.items()},
        "ratios": {ratio.name: ratio.reproduced for ratio in result.ratios},
        "ratio_details": [dataclasses.asdict(ratio) for ratio in result.ratios],
        "mismatches": result.mismatches,
    }
    return Answer(document, tables.reproduction_table, BUG if result.mismatches else OK)
