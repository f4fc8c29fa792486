"""`fleetopt optimize`: the best plan, hardened and simulated where asked.

Tables whose files also draw are imported where they are chosen: a plain plan loads no matplotlib.
"""

import argparse
import dataclasses
from typing import Any

import numpy as np

from fleetopt_jax._optimize.confidence import confident
from fleetopt_jax._optimize.plan import Infeasible, Plan, among
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.rivals import Alone, Rivals, simulated_plan
from fleetopt_jax._optimize.robust import require_window, robust
from fleetopt_jax._optimize.search import default_method, optimize
from fleetopt_jax._simulate import verify
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.workloads import bundled, load
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.inputs import budget_of, how_to_simulate, layout_of, problem_of, workload_of
from fleetopt_jax.cli.repeat import command_said
from fleetopt_jax.cli.terminal import progress, say, simulation_progress, warn, warn_of_warm_up
from fleetopt_jax.cli.verdicts import RESERVED_BY, help_said, not_judged, pool_map_of, why
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.documents.confidence import confident_to_json, holding_to_json, plan_holding_to_json
from fleetopt_jax.documents.failures import failures_to_json
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.robust import robust_to_json
from fleetopt_jax.documents.simulation import verified_to_json
from fleetopt_jax.fleet.choices.prefix_cache import not_searched
from fleetopt_jax.report import tables
from fleetopt_jax.workload.atoms import Workload
from fleetopt_jax.workload.readers import Layout


def run(options: argparse.Namespace) -> Answer:
    layout = layout_of(options)
    problem = problem_of(options, workload_of(options), options.objective, budget_of(options), options.free)
    method = options.method or default_method(problem)
    if len({engine_entry(spec).quality == "roofline" for spec in problem.specs}) > 1:
        warn(
            options,
            "calibrated and roofline engines are not comparable (the roofline law "
            "does not divide the KV cache by TP): part of the difference between these GPUs is the model's",
        )
    tomorrow = _tomorrow(options, problem)
    if options.confidence and options.robust:
        raise BadInput("--confidence", "not read with --robust", "give one: --robust-level 0.1 asks for 90 % by itself")
    _refuse_beside(options, problem)
    with progress(options, f"Searching ({method})") as step:
        plan = optimize(problem, method, step)
    if isinstance(plan, Infeasible):
        say(options, f"infeasible: {why(plan.binding)}{help_said(options, plan)}")
        return Answer(plan_to_json(plan, layout, path=options.out), tables.plan_table, INFEASIBLE)
    extras: dict[str, Any] = {"command": command_said(options), "seed": options.seed}
    table = tables.plan_table
    if options.confidence:
        plan, found = _surer(options, plan)
        if isinstance(plan, Infeasible):
            return Answer(plan_to_json(plan, layout, path=options.out), table, INFEASIBLE)
        extras |= found
    if options.robust:
        from fleetopt_jax.report.sensitivity import robust_plan_table as table

        plan, found = _robust(options, problem, plan, tomorrow)
        extras |= found
    if not options.verify:
        if "holds" not in extras:
            extras |= plan_holding_to_json(plan, options.seed)
        extras |= failures_to_json(plan)
        return Answer(plan_to_json(plan, layout, path=options.out) | extras, table, OK, pool_map_of(plan))
    from fleetopt_jax.report.simulation import verified_plan_table

    plan, verified = _verified(options, plan, layout)
    if not verified["held"]:
        say(options, "infeasible: no fleet that was simulated holds the limits")
    extras |= plan_holding_to_json(plan, options.seed) | failures_to_json(plan) | {"verified": verified}
    document = plan_to_json(plan, layout, path=options.out) | extras
    return Answer(document, verified_plan_table, OK if verified["held"] else INFEASIBLE, pool_map_of(plan))


def _refuse_beside(options: argparse.Namespace, problem: Problem) -> None:
    """Refuse what cannot be asked of such fleets."""
    asked = [name for name in ("confidence", "robust", "verify") if getattr(options, name)]
    if {"confidence", "robust"} & set(asked) and problem.assumptions.prefix_cache.reads_reuse:
        raise not_searched("--confidence" if options.confidence else "--robust")
    if options.verify and (reserve := problem.surroundings.reserve) is not None:
        problem_is = f"not read with {RESERVED_BY[reserve.name]}: the simulator sizes fleets that are all up"
        raise BadInput("--verify", problem_is, "leave it out, then fleetopt simulate plan.json --down 1")
    if asked and problem.service.serve != "mixed":
        said = f"{not_judged(problem.service.serve)} by it yet"
        raise BadInput(f"--{asked[0]}", said, "need --serve mixed, or leave it out")


def _surer(options: argparse.Namespace, nominal: Plan) -> tuple[Plan | Infeasible, dict[str, Any]]:
    """The plan that holds with the confidence asked for, and what that costs; what no fleet does is said on stderr."""
    with progress(options, "Sizing for confidence"):
        found = confident(nominal, options.confidence, seed=options.seed)
    if isinstance(found, Infeasible):
        say(options, f"infeasible: {why(found.binding)}")
        return found, {}
    return found.plan, {"confidence": confident_to_json(found), "holds": holding_to_json(found.holding)}


def _tomorrow(options: argparse.Namespace, problem: Problem) -> list[tuple[str, Workload]]:
    """The workloads a robust plan must live with besides its own."""
    if options.robust_workloads and not options.robust:
        raise BadInput("--robust-workloads", "only read with --robust", "give --robust quantile or --robust cvar")
    try:
        layout, names = layout_of(options), [name.strip() for name in options.robust_workloads]
        others = [
            load(
                name,
                rate_per_s=options.rate,
                layout=None if name in bundled() else layout,
                at=options.at or "mean",
                sticky=options.sticky,
            )
            for name in names
        ]
    except BadField as error:
        raise error.at(lambda _: "--robust-workloads") from None
    except BadInput as error:
        raise BadInput("--robust-workloads", str(error)) from None
    found = [(other.name, other.workload) for other in others]
    require_window(problem, found)
    return found


def _robust(
    options: argparse.Namespace, problem: Problem, nominal: Plan, tomorrow: list[tuple[str, Workload]]
) -> tuple[Plan, dict[str, Any]]:
    """The plan with the best lower tail over engine errors and the workloads named, and what it was chosen from."""
    with progress(options, "Searching scenarios") as step:
        found = robust(
            problem,
            nominal,
            measure=options.robust,
            level=options.robust_level,
            workloads=tomorrow,
            method=options.method,
            seed=options.seed,
            progress=step,
        )
    if found.chosen.hold_share < 1.0 - found.level:
        warn(
            options,
            f"no candidate holds the limits in {1.0 - found.level:.0%} of the scenarios; "
            f"the chosen one does in {found.chosen.hold_share:.0%}",
        )
    search = among(nominal.search, "those of the robust choice")
    chosen = dataclasses.replace(found.chosen.plan, method=nominal.method, search=search)
    return chosen, {"robust": robust_to_json(found)}


def _verified(options: argparse.Namespace, plan: Plan, layout: Layout | None) -> tuple[Plan, dict[str, Any]]:
    """The best plan that holds in simulation, and what was found on the way."""
    problem = plan.problem
    how = how_to_simulate(options, problem, layout)
    floor = np.rint(np.asarray(plan.fleet.n_instances)).astype(int).tolist()
    if options.confidence or options.robust:  # what was added for safety stays
        propose = Alone(plan, floor=floor)
    else:
        propose = Alone(plan) if problem.slo.scope == "fleet" or problem.free else Rivals(plan)
    with simulation_progress(options) as step:
        found = verify(propose, problem.workload, problem.assumptions, problem.slo, progress=step, **how)
    warn_of_warm_up(options, found.simulation)
    specs = found.standings[found.rival].rival.specs
    better = simulated_plan(plan, specs, found.fleet, found.standings, held=found.held)
    return better, verified_to_json(found, better, plan)
