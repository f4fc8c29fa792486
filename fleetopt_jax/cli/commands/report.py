"""`fleetopt report`: one page that holds what a plan, services or a day say and rest on."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fleetopt_jax._optimize.repair import repair
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.commands.sensitivity import differentiated
from fleetopt_jax.cli.commands.simulate import simulated
from fleetopt_jax.cli.inputs import plan_of
from fleetopt_jax.cli.repeat import commands_of, from_here
from fleetopt_jax.cli.table import options_of
from fleetopt_jax.cli.verdicts import say_broken
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents import schedule, services
from fleetopt_jax.documents.failures import failures_to_json
from fleetopt_jax.documents.fields import schema_of
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.repair import repair_to_json
from fleetopt_jax.documents.schedule_file import read_schedule_file
from fleetopt_jax.documents.services_file import read_services_file
from fleetopt_jax.documents.simulation import verified_of
from fleetopt_jax.report.page import report_page
from fleetopt_jax.report.power import pool_curves
from fleetopt_jax.report.schedule_page import schedule_page
from fleetopt_jax.report.sensitivity import metric_of
from fleetopt_jax.report.services_page import services_page
from fleetopt_jax.workload.atoms import total_tokens


def run(options: argparse.Namespace) -> Answer:
    """The page; --json shows what it was written from."""
    match schema_of(options.plan):
        case services.SCHEMA:
            return _of_document(options, "services", read_services_file, services_page)
        case schedule.SCHEMA:
            return _of_document(options, "schedule", read_schedule_file, schedule_page)
    return _of_plan(options)


def _of_document(
    options: argparse.Namespace,
    command: str,
    read: Callable[[str], dict[str, Any]],
    page: Callable[[dict[str, Any], Sequence[str]], str],
) -> Answer:
    """Of what another command found: nothing is searched or evaluated again."""
    for option in options_of("report"):
        there = getattr(options, option.name)
        asked = option.section is not None or option.name == "simulate"
        if asked and option.kind.kept(there) != option.kind.kept(option.default):
            problem = f"is not read with {options.plan}, which fleetopt {command} wrote"
            raise BadInput(option.where, problem, "need a plan, or leave it out")
    document = read(options.plan)
    commands = [from_here(document["command"], options.plan)] if document["command"] else []
    return Answer({command: document}, page(document, [*commands, options.line]), OK)


def _of_plan(options: argparse.Namespace) -> Answer:
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
