"""`fleetopt sensitivity`: what a plan rests on."""

import argparse

from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.asked import given_plan, plan_document, say_broken
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.terminal import progress
from fleetopt_jax.optimize.search import optimize
from fleetopt_jax.optimize.sensitivity import sensitivity, sensitivity_to_json
from fleetopt_jax.report.sensitivity import sensitivity_table, tornado_figure


def run(options: argparse.Namespace) -> Answer:
    plan, layout = given_plan(options)
    say_broken(options, plan)
    with progress(options, "Differentiating"):
        found = sensitivity(plan, reoptimize=optimize if options.reoptimize else None)
    document = sensitivity_to_json(found) | {
        "plan": plan_document(plan, layout),
        "objective": plan.problem.objective,
        "shown": {"metric": options.metric, "top": options.top},
    }
    return Answer(document, sensitivity_table, INFEASIBLE if plan.binding else OK, tornado_figure)
