"""`fleetopt sensitivity`: what a plan rests on."""

import argparse
from typing import Any

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax._optimize.sensitivity import sensitivity
from fleetopt_jax.cli.answer import Answer, Document
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.inputs import plan_of
from fleetopt_jax.cli.terminal import progress
from fleetopt_jax.cli.verdicts import say_broken
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.sensitivity import sensitivity_to_json
from fleetopt_jax.report.sensitivity import metric_of, sensitivity_table, tornado_figure


def run(options: argparse.Namespace) -> Answer:
    plan, layout = plan_of(options)
    of_plan = plan_to_json(plan, layout)
    say_broken(options, of_plan)
    shown = {"metric": options.metric or metric_of(plan.problem.objective), "top": options.top}
    document = differentiated(options, plan, of_plan, shown, reoptimize=options.reoptimize)
    return Answer(document, sensitivity_table, INFEASIBLE if plan.binding else OK, tornado_figure)


def differentiated(
    options: argparse.Namespace, plan: Plan, document: Document, shown: dict[str, Any], *, reoptimize: bool = False
) -> Document:
    """What the plan of `document` rests on, and what of it is `shown`."""
    with progress(options, "Differentiating"):
        found = sensitivity(plan, reoptimize=optimize if reoptimize else None)
    return sensitivity_to_json(found) | {"plan": document, "objective": document["objective"], "shown": shown}
