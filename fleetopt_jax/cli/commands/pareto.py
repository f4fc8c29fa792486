"""`fleetopt pareto`: a front, or the best plan along one input."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from fleetopt_jax._optimize.confidence import Confident, confident, confident_along
from fleetopt_jax._optimize.front import Front, NoFront, checked_objectives
from fleetopt_jax._optimize.pareto import pareto
from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax.catalog.workloads import LoadedWorkload, at_rate
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.inputs import budget_of, layout_of, problem_of, workload_of
from fleetopt_jax.cli.table import AXES
from fleetopt_jax.cli.terminal import progress, say
from fleetopt_jax.cli.verdicts import not_judged, why
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.core.units import MS
from fleetopt_jax.documents.confidence import confident_to_json, holding_to_json
from fleetopt_jax.documents.front import front_to_json
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.fleet.resources import Objective
from fleetopt_jax.published.ledger import PAPER_WINDOWS
from fleetopt_jax.report.pareto import (
    axis_csv,
    axis_figure,
    axis_table,
    front_csv,
    front_figure,
    front_table,
)


def run(options: argparse.Namespace) -> Answer:
    objectives = checked_objectives(options.objectives, "--objectives")
    most_ms = options.ttft_p99_ms if "ttft_p99_s" in objectives else None
    options.ttft_p99_ms = options.ttft_p99_ms or float(make_slo().ttft_p99_s) / MS
    if options.confidence and (not options.axis or options.axis[0] == "confidence"):
        raise BadInput("--confidence", "not read here", "need --axis of another input, or --axis confidence=0.5,0.9")
    if options.serve != "mixed" and (options.confidence or (options.axis and options.axis[0] == "confidence")):
        asked = "--confidence" if options.confidence else "--axis confidence"
        raise BadInput(asked, f"{not_judged(options.serve)} by it yet", "need --serve mixed, or leave it out")
    layout = layout_of(options)
    swept_rate = options.axis[1][0] if options.axis and options.axis[0] == "workload-rate" else None
    loaded = workload_of(options, rate_per_s=swept_rate)
    if options.axis:
        document, held = _along_axis(options, loaded, "usd" if objectives[0] == "usd_per_h" else "tok_per_j")
        table, to_csv, to_figure = axis_table, axis_csv, axis_figure
    else:
        document, held = _front(options, loaded, objectives, None if most_ms is None else most_ms * MS)
        table, to_csv, to_figure = front_table, front_csv, front_figure
    if layout:  # as `plan_to_json` has them: every plan can be taken out and evaluated again
        shown = [*document.get("points", []), *document.get("rows", [])]
        shown += [document[key] for key in ("homogeneous", "fleetopt") if document.get(key)]
        for each in shown:
            each["plan"]["workload"]["columns"] = dataclasses.asdict(layout)
    if not held:
        return Answer(document, table, INFEASIBLE)
    return Answer(document, table, OK, to_figure, files={"csv": to_csv(document)})


def _front(
    options: argparse.Namespace, loaded: LoadedWorkload, objectives: Sequence[str], max_ttft_p99_s: float | None
) -> tuple[dict[str, Any], bool]:
    """The front, and whether there is one; what no fleet holds is said on stderr."""
    problem = problem_of(options, loaded, budget=budget_of(options))
    window = PAPER_WINDOWS.get(loaded.name)
    with progress(options, "Tracing the front") as step:
        front = pareto(
            problem,
            objectives,
            n_points=options.points,
            method=options.method,
            max_ttft_p99_s=max_ttft_p99_s,
            short_windows=None if window is None else [window],
            progress=step,
        )
    if isinstance(front, NoFront):
        say(options, f"infeasible: {why(front.binding)}")
    return front_to_json(front, path=options.out), isinstance(front, Front)


def _along_axis(
    options: argparse.Namespace, loaded: LoadedWorkload, objective: Objective
) -> tuple[dict[str, Any], bool]:
    """The best plan at each value of the axis, and whether there is any; what no fleet holds is said on stderr."""
    name, values = options.axis
    with progress(options, f"Sweeping {name}") as step:
        along = _surer if name == "confidence" else _best_along
        answers = along(options, loaded, objective, step)
    for value, answer in zip(values, answers):
        if isinstance(answer, Infeasible):
            say(options, f"infeasible at {name} {value:g}: {why(answer.binding)}")
    document = {
        "axis": {"name": name, "values": values},
        "workload": {"name": loaded.name},
        "rows": [{"value": value} | _row(options, answer) for value, answer in zip(values, answers)],
    }
    return document, any(not isinstance(answer, Infeasible) for answer in answers)


def _best_along(
    options: argparse.Namespace, loaded: LoadedWorkload, objective: Objective, step: Progress
) -> list[Plan | Confident | Infeasible]:
    """The best plan at each value; one that holds with a probability, where --confidence asks for it."""
    name, values = options.axis
    field, answers = AXES[name][0], []
    for done, value in enumerate(values):
        at = argparse.Namespace(**{**vars(options), field: value})
        there = at_rate(loaded, value * loaded.over_mean) if name == "workload-rate" else loaded
        answer = optimize(problem_of(at, there, objective, budget_of(options)), options.method)
        if options.confidence and isinstance(answer, Plan):
            answer = confident(answer, options.confidence)
        answers.append(answer)
        step(done + 1, len(values))
    return answers


def _surer(
    options: argparse.Namespace, loaded: LoadedWorkload, objective: Objective, step: Progress
) -> list[Confident | Infeasible]:
    """The plans that hold with each probability."""
    _, values = options.axis
    nominal = optimize(problem_of(options, loaded, objective, budget_of(options)), options.method)
    if isinstance(nominal, Infeasible):
        return [nominal] * len(values)
    return confident_along(nominal, values, progress=step)


def _row(options: argparse.Namespace, answer: Plan | Confident | Infeasible) -> dict[str, Any]:
    """A plan as it stands in the document, with what its confidence costs."""
    if not isinstance(answer, Confident):
        return {"plan": plan_to_json(answer, path=options.out)}
    sure = {"holds": holding_to_json(answer.holding), "confidence": confident_to_json(answer)}
    return {"plan": plan_to_json(answer.plan, path=options.out) | sure}
