"""`fleetopt ledger`: from the published system to the physical one, and with a prefix cache."""

import argparse

from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.inputs import at_door, prefix_cache_of, slo_of, specs_of, surroundings_of, workload_of
from fleetopt_jax.cli.terminal import progress
from fleetopt_jax.documents.ledger import ledger_to_json
from fleetopt_jax.documents.plan import hour_to_json
from fleetopt_jax.fleet.assumptions import PHYSICAL
from fleetopt_jax.published.ledger import ledger
from fleetopt_jax.report import tables
from fleetopt_jax.report.figures import ledger_figure


def run(options: argparse.Namespace) -> Answer:
    loaded, cache = workload_of(options), prefix_cache_of(options)
    with at_door(options.workload), progress(options, "Walking from published to physical") as step:
        slo, spec = slo_of(options), specs_of(options, PHYSICAL)[0]
        rows = ledger(
            loaded.workload,
            lambda assumptions: specs_of(options, assumptions),
            slo=slo,
            name=loaded.name,
            knots=loaded.knots,
            output_share=loaded.output_share,
            window_tokens=options.window,
            surroundings=surroundings_of(options),
            prefix_cache=cache,
            progress=step,
        )
    rate_per_s = float(loaded.workload.arrival_rate_per_s)
    about = {"workload_name": loaded.name, "arrival_rate_per_s": rate_per_s}
    document = ledger_to_json(rows, **about, spec=spec, slo=slo, prefix_cache=cache)
    document["workload"] |= hour_to_json(loaded.hour)
    return Answer(document, tables.ledger_table, OK, ledger_figure)
