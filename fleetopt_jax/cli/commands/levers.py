"""`fleetopt levers`: what pays."""

import argparse
import dataclasses
from collections.abc import Sequence

from fleetopt_jax._optimize.levers import pull_levers
from fleetopt_jax._optimize.plan import Infeasible, Plan
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax.catalog.llms import LlmEntry, llm_entry
from fleetopt_jax.catalog.own import Catalog
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.inputs import catalog_of, layout_of, plan_of, problem_of, with_prefix, workload_of
from fleetopt_jax.cli.terminal import progress, say
from fleetopt_jax.cli.values import flag
from fleetopt_jax.cli.verdicts import why
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.levers import levers_to_json
from fleetopt_jax.documents.plan_file import read_plan_file
from fleetopt_jax.report.levers import levers_figure, levers_table
from fleetopt_jax.workload.readers import Layout

NEXT_GPU = {"a100": "h100", "l40s": "h100", "h100": "b200", "h200": "b200", "b200": "gb200"}
NEXT_GPU |= {"rtx-pro-6000": "b200", "b300": "gb300", "gb200": "gb300"}


def run(options: argparse.Namespace) -> Answer:
    catalog, other_llm = changes_to(options)
    if options.prefix_hit == "trace":
        raise BadInput("--prefix-hit", "'trace' is not a share", "need one; left out, it is what the workload tells")
    problem, given, layout = _present_fleet(options)
    hit_frac = _hit_frac(options, problem)
    next_gpu = options.next_gpu or next_gpu_of(problem.kinds[:1])
    with progress(options, "Pulling levers") as step:
        found = pull_levers(
            problem,
            given=given,
            next_gpu=next_gpu and catalog.gpu(next_gpu),
            llm=other_llm,
            hit_frac=hit_frac,
            every_pair=options.all_pairs,
            progress=step,
        )
    document = levers_to_json(found)
    if layout:
        document["workload"]["columns"] = dataclasses.asdict(layout)
    if isinstance(found.present.plan, Infeasible):
        say(options, f"the present fleet: {why(found.present.plan.binding)}")
    held = found.present.feasible or any(gain.pulled.feasible for gain in found.gains)
    drawn = levers_figure if any(gain.gain for gain in found.gains) else None
    return Answer(document, levers_table, OK if held else INFEASIBLE, drawn)


def changes_to(options: argparse.Namespace) -> tuple[Catalog, LlmEntry | str]:
    """The catalog, and the other model; or a refusal of a name that is not there, before anything is searched."""
    catalog = catalog_of(options)
    if options.next_gpu:
        catalog.gpu(options.next_gpu, "--next-gpu")
    other_llm = catalog.llm(options.other_llm, "--other-llm")
    llm_entry(other_llm, "--other-llm")
    return catalog, other_llm


def next_gpu_of(kinds: Sequence[str]) -> str | None:
    """The generation after the last of them that is none of them; None where none is known."""
    after = [NEXT_GPU[kind] for kind in kinds if NEXT_GPU.get(kind, kind) not in kinds]
    return after[-1] if after else None


def _hit_frac(options: argparse.Namespace, problem: Problem) -> float | None:
    """What prompts would find in a prefix cache that the present fleet does not have, if that is given."""
    asked = options.prefix_hit
    if isinstance(asked, str):
        return None  # a curve, which the workload has now
    if asked is not None and problem.assumptions.prefix_cache.finds:
        raise BadInput("--prefix-hit", f"{options.plan} has a prefix cache already", "need a plan without one")
    return asked


def _present_fleet(options: argparse.Namespace) -> tuple[Problem, Plan | None, Layout | None]:
    """The fleet that levers start from: a plan's engines and pools, or one pool of the options' engine."""
    as_it_is: dict[str, str | None] = {"prefix_hit": None}  # which is a lever's
    if options.plan is None:
        options.workload, options.pools, options.gamma = options.workload or "azure-conv", 1, 1.0
        present = argparse.Namespace(**{**vars(options), **as_it_is})
        loaded = with_prefix(options, workload_of(present))
        return problem_of(present, loaded, options.objective), None, layout_of(options)
    for name, default in options.plan_says.items():
        if getattr(options, name) != default:
            raise BadInput(flag(name), f"{options.plan} says it itself", "give one of the two")
    if isinstance(options.prefix_hit, str):
        cache = read_plan_file(options.plan).prefix_cache
        if cache is None or not cache.choice.reads_reuse:
            problem = f"{options.plan} has no prefix cache that a curve tells of"
            raise BadInput("--prefix-hit", problem, "need a share, or a plan that was made with the curve")
        as_it_is = {"prefix_hit": options.prefix_hit}
    plan, layout = plan_of(argparse.Namespace(**{**vars(options), **as_it_is, "dispatch": None}))
    if priced := set(plan.kinds) & set(options.usd_per_gpu_h):
        raise BadInput(f"--usd-per-gpu-h {min(priced)}", f"{options.plan} says it itself", "price the next GPU alone")
    gammas = {float(gamma) for gamma in plan.fleet.gamma[:-1]} or {1.0}
    gamma = gammas.pop() if len(gammas) == 1 else None  # several: searched
    return dataclasses.replace(plan.problem, gamma=gamma, objective=options.objective), plan, layout
