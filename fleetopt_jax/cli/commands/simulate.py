"""`fleetopt simulate`: every iteration, beside the laws."""

import argparse
from functools import partial
from typing import Any

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._simulate import burstiness, poisson_arrivals, simulate
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.inputs import how_to_simulate, plan_of, rates_of
from fleetopt_jax.cli.terminal import say, simulation_progress, warn_of_warm_up
from fleetopt_jax.documents.simulation import simulation_to_json
from fleetopt_jax.report.simulation import agreement_figure, missed, simulation_table, unclear_said
from fleetopt_jax.workload.readers import Layout


def run(options: argparse.Namespace) -> Answer:
    """Exit code 3 where the means miss a limit, as ever; what the intervals say of it is said."""
    plan, layout = plan_of(options)
    document, held = simulated(options, plan, layout)
    if failed := missed(document):
        say(
            options,
            f"infeasible: the simulated fleet does not hold the limits: {failed}; fleetopt optimize --verify plans "
            "against the simulator",
        )
    elif unclear := unclear_said(document):
        say(options, unclear if held else f"infeasible in the mean, {unclear}")
    return Answer(document, simulation_table, OK if held else INFEASIBLE, agreement_figure)


def simulated(options: argparse.Namespace, plan: Plan, layout: Layout | None) -> tuple[dict[str, Any], bool]:
    """The plan beside its simulation, and whether that holds the limits in the mean."""
    problem, how = plan.problem, how_to_simulate(options, plan.problem, layout)
    until_frac, requests = getattr(options, "until", None), how.get("requests")
    with simulation_progress(options) as step:
        of = partial(simulate, plan.fleet, problem.workload, problem.assumptions, problem.slo, progress=step)
        of = partial(of, down=getattr(options, "down", 0), failures=rates_of(options))
        result = of(until_frac=until_frac, **how)
        bursts = None
        if requests is not None:
            requests = requests.rows(0, result.n_replications)
            rate_per_s = float(problem.workload.arrival_rate_per_s)
            how["requests"] = poisson_arrivals(requests, rate_per_s, options.seed)
            calm = of(**how)
            bursts = burstiness(result, calm, requests)
    warn_of_warm_up(options, result)
    document = simulation_to_json(
        result,
        plan,
        arrivals=options.arrivals,
        seed=options.seed,
        until_frac=until_frac,
        bursts=bursts,
        columns=layout,
    )
    return document, result.slo_held
