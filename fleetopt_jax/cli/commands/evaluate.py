"""`fleetopt evaluate`: metrics of a given plan."""

import argparse

from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.asked import given_plan, plan_document, pool_map_of, say_broken
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.report import tables


def run(options: argparse.Namespace) -> Answer:
    plan, layout = given_plan(options)
    say_broken(options, plan)
    code = INFEASIBLE if plan.binding else OK
    return Answer(plan_document(plan, layout), tables.plan_table, code, pool_map_of(plan))
