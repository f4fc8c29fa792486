"""`fleetopt evaluate`: metrics of a given plan."""

import argparse

from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.inputs import plan_of
from fleetopt_jax.cli.verdicts import pool_map_of, say_broken
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.report import tables


def run(options: argparse.Namespace) -> Answer:
    plan, layout = plan_of(options)
    say_broken(options, plan)
    code = INFEASIBLE if plan.binding else OK
    return Answer(plan_to_json(plan, layout, path=options.out), tables.plan_table, code, pool_map_of(plan))
