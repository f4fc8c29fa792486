"""`fleetopt ledger`: from the published system to the physical one."""

import argparse

from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.asked import asked_engines, asked_slo, asked_workload, at_door
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.terminal import progress
from fleetopt_jax.published.ledger import ledger
from fleetopt_jax.report import tables
from fleetopt_jax.report.figures import ledger_figure


def run(options: argparse.Namespace) -> Answer:
    loaded = asked_workload(options)
    with at_door(options.workload), progress(options, "Walking from published to physical") as step:
        rows = ledger(
            loaded.workload,
            lambda assumptions: asked_engines(options, assumptions),
            slo=asked_slo(options),
            name=loaded.name,
            knots=loaded.knots,
            output_share=loaded.output_share,
            window_tokens=options.window,
            progress=step,
        )
    document = {
        "workload": {"name": loaded.name, "arrival_rate_per_s": float(loaded.workload.arrival_rate_per_s)},
        "gpu": options.gpu,
        "llm": options.llm,
        "tp": options.tp,
        "slo": {name: value if name == "scope" else float(value) for name, value in vars(asked_slo(options)).items()},
        "rows": [row.to_json() for row in rows],
    }
    return Answer(document, tables.ledger_table, OK, ledger_figure)
