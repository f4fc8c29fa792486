"""`fleetopt evaluate`: metrics of a given plan."""

import argparse

from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.asked import given_plan, plan_document, pool_map_of
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.terminal import say
from fleetopt_jax.report import tables


def run(options: argparse.Namespace) -> Answer:
    plan, layout = given_plan(options)
    if plan.binding:
        say(
            options,
            f"infeasible: {plan.binding['limit']} is {plan.binding['value']:.6g}, "
            f"the limit is {plan.binding['asked']:.6g}",
        )
    code = INFEASIBLE if plan.binding else OK
    return Answer(plan_document(plan, layout), tables.plan_table, code, pool_map_of(plan))
