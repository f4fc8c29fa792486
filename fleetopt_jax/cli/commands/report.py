"""`fleetopt report`: one page that holds what a plan says and rests on."""

import argparse

import numpy as np

from fleetopt_jax._optimize.repair import repair
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.commands.sensitivity import differentiated
from fleetopt_jax.cli.commands.simulate import simulated
from fleetopt_jax.cli.inputs import plan_of
from fleetopt_jax.cli.repeat import commands_of
from fleetopt_jax.cli.verdicts import say_broken
from fleetopt_jax.documents.failures import failures_to_json
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.repair import repair_to_json
from fleetopt_jax.documents.simulation import verified_of
from fleetopt_jax.report.page import report_page
from fleetopt_jax.report.power import pool_curves
from fleetopt_jax.report.sensitivity import metric_of
from fleetopt_jax.workload.atoms import total_tokens


def run(options: argparse.Namespace) -> Answer:
    """The page; --json shows what it was written from."""
    plan, layout = plan_of(options)
    document = {"plan": plan_to_json(plan, layout) | failures_to_json(plan), "curves": pool_curves(plan)}
    if plan.binding:
        document["plan"]["repair"] = repair_to_json(repair(plan))
    say_broken(options, document["plan"])
    if verified := verified_of(options.plan, document["plan"]):
        document["plan"]["verified"] = verified
    shown = {"metric": metric_of(plan.problem.objective), "top": 15}
    document["sensitivity"] = differentiated(options, plan, document["plan"], shown)
    if options.simulate:
        document["simulation"], _ = simulated(options, plan, layout)
    workload = plan.problem.workload
    page = report_page(
        document["plan"],
        np.asarray(total_tokens(workload)),
        np.asarray(workload.weight),
        curves=document["curves"],
        sensitivity=document["sensitivity"],
        simulation=document.get("simulation"),
        commands=commands_of(options, plan),
    )
    return Answer(document, page, INFEASIBLE if plan.binding else OK)
