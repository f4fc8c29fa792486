"""`fleetopt simulate`: every iteration, beside the laws."""

import argparse
from typing import Any

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._simulate import simulate
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.inputs import how_to_simulate, plan_of
from fleetopt_jax.cli.terminal import say, simulation_progress, warn_of_warm_up
from fleetopt_jax.documents.simulation import simulation_to_json
from fleetopt_jax.report.simulation import agreement_figure, missed, simulation_table
from fleetopt_jax.workload.readers import Layout


def run(options: argparse.Namespace) -> Answer:
    plan, layout = plan_of(options)
    document, held = simulated(options, plan, layout)
    if not held:
        say(
            options,
            f"infeasible: the simulated fleet does not hold the limits: {missed(document)}; fleetopt optimize --verify "
            "plans against the simulator",
        )
    return Answer(document, simulation_table, OK if held else INFEASIBLE, agreement_figure)


def simulated(options: argparse.Namespace, plan: Plan, layout: Layout | None) -> tuple[dict[str, Any], bool]:
    """The plan beside its simulation, and whether that holds the limits."""
    problem, how = plan.problem, how_to_simulate(options, plan.problem, layout)
    with simulation_progress(options) as step:
        result = simulate(plan.fleet, problem.workload, problem.assumptions, problem.slo, progress=step, **how)
    warn_of_warm_up(options, result)
    document = simulation_to_json(
        result,
        plan,
        arrivals=options.arrivals,
        seed=options.seed,
        n_replications=options.replications,
        columns=layout,
    )
    return document, result.slo_held
