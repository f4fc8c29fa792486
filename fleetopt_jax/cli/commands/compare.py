"""`fleetopt compare`: a plan beside what was observed of its fleet."""

import argparse

from fleetopt_jax._optimize.compare import compare
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.inputs import at_door, plan_of
from fleetopt_jax.cli.terminal import progress, understood, warn
from fleetopt_jax.documents.compare import comparison_to_json
from fleetopt_jax.documents.observed import load_observed
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.report.compare import comparison_figure, comparison_table


def run(options: argparse.Namespace) -> Answer:
    """Exit code 0 wherever the figures lie: that is the answer."""
    plan, layout = plan_of(options)
    file = load_observed(options.observed, plan, since=options.since, over_s=options.over)
    with at_door(options.observed), progress(options, "Comparing"):
        found = compare(plan, file.figures)
    understood(options, f"read {options.observed}: {'; '.join(file.understood)}")
    for each in file.left_out:
        warn(options, f"{options.observed}: left out: {each}")
    document = comparison_to_json(found, plan, plan_to_json(plan, layout), file)
    return Answer(document, comparison_table, OK, comparison_figure)
