"""`fleetopt services`: the fleets of several services that share a budget."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.services import (
    NoServicesPlan,
    Purchase,
    Services,
    ServicesPlan,
    make_services,
    price_of,
)
from fleetopt_jax._optimize.services_front import promise_front, services_front, stricter
from fleetopt_jax._optimize.services_levers import services_levers
from fleetopt_jax._optimize.shared import optimize_services
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.commands.levers import changes_to, next_gpu_of
from fleetopt_jax.cli.inputs import at_door, layout_of, problem_of, say_unread, shared_budget_of, workload_of
from fleetopt_jax.cli.scenario import ServiceSaid
from fleetopt_jax.cli.terminal import progress, say
from fleetopt_jax.cli.values import flag
from fleetopt_jax.cli.verdicts import why_together
from fleetopt_jax.core.errors import BadInput, unknown_name
from fleetopt_jax.core.files import to_json, write_whole
from fleetopt_jax.core.units import MS
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.services import services_to_json
from fleetopt_jax.documents.services_front import promise_front_to_json, services_front_to_json, stricter_to_json
from fleetopt_jax.documents.services_levers import services_levers_to_json
from fleetopt_jax.report.services import services_figure, services_table
from fleetopt_jax.report.services_front import (
    promise_front_csv,
    promise_front_figure,
    promise_front_table,
    services_front_csv,
    services_front_figure,
    services_front_table,
)
from fleetopt_jax.report.services_levers import services_levers_csv, services_levers_figure, services_levers_table

READ_WITH = {"levers": ("next_gpu", "other_llm"), "front": ("points",)}


def run(options: argparse.Namespace) -> Answer:
    said: list[ServiceSaid] = getattr(options, "services", [])
    if not said:
        raise BadInput(options.scenario or "--scenario", "there are no services", "need a file with [[service]] tables")
    say_unread(options, READ_WITH)
    if options.front:
        return _front(options, said)
    if options.levers:
        return _levers(options, said)
    services = _services(options, said)
    made = bool(options.plans) and _made_folder(options.plans)
    answer, more = _answered(options, services)
    layouts = [layout_of(each.options[0]) for each in said]
    document = services_to_json(answer, layouts, path=options.out) | more | {"command": options.line}
    if isinstance(answer, NoServicesPlan):
        say(options, f"infeasible: {why_together(answer)}")
        if made:
            os.rmdir(options.plans)
        return Answer(document, services_table, INFEASIBLE)
    if options.plans:
        for each, plan, layout in zip(said, answer.plans, layouts, strict=True):
            path = os.path.join(options.plans, f"{each.name}.json")
            write_whole(path, to_json(plan_to_json(plan, layout, path=path)) + "\n", "--plans")
    return Answer(document, services_table, OK, services_figure)


def _answered(options: argparse.Namespace, services: Services) -> tuple[ServicesPlan | NoServicesPlan, dict[str, Any]]:
    """The plan, and what stricter promises cost, where that is asked."""
    if not options.stricter:
        with progress(options, "Searching services") as step:
            return optimize_services(services, progress=step), {}
    with progress(options, "Searching services, then with stricter promises") as step:
        found = stricter(services, options.stricter, worth=True, progress=step)
    told = stricter_to_json(found)
    for one, each in zip(found.each, told["each"], strict=True):
        each["why"] = why_together(one.answer) if isinstance(one.answer, NoServicesPlan) else None
    return found.present, {"stricter": told}


def _front(options: argparse.Namespace, said: list[ServiceSaid]) -> Answer:
    """All services, by two objectives or along the limit of one of them."""
    _refuse_beside(options, "front", ("plans", "stricter", "levers"))
    service, asked = options.front
    if service is not None and service not in [each.name for each in said]:
        raise unknown_name("--front", service, [each.name for each in said])
    services = _services(options, said)
    layouts, about = [layout_of(each.options[0]) for each in said], {"command": options.line}
    if service is None:
        with progress(options, "Tracing the front") as step, at_door(options.scenario):
            front = services_front(services, asked, n_points=options.points, progress=step)
        document = services_front_to_json(front, asked, layouts, path=options.out) | about
        if isinstance(front, NoServicesPlan):
            say(options, f"infeasible: {why_together(front)}")
            return Answer(document, services_front_table, INFEASIBLE)
        files = {"csv": services_front_csv(document)}
        return Answer(document, services_front_table, OK, services_front_figure, files)
    limits = [value * MS for value in asked] or None
    with progress(options, f"Searching along the P99 TTFT of {service}") as step, at_door(options.scenario):
        along = promise_front(services, service, limits, n_points=options.points, progress=step)
    document = promise_front_to_json(along, layouts, path=options.out) | about
    for row, answer in zip(document["rows"], along.answers, strict=True):
        row["why"] = why_together(answer) if isinstance(answer, NoServicesPlan) else None
        if row["why"]:
            say(options, f"infeasible at {row['ttft_p99_s'] / MS:g} ms: {row['why']}")
    held = any(row["tok_per_j"] is not None for row in document["rows"])
    files = {"csv": promise_front_csv(document)}
    return Answer(document, promise_front_table, OK if held else INFEASIBLE, promise_front_figure, files)


def _levers(options: argparse.Namespace, said: list[ServiceSaid]) -> Answer:
    """What pays for all services."""
    _refuse_beside(options, "levers", ("plans", "stricter"))
    catalog, other_llm = changes_to(options)
    services = _services(options, said)
    next_gpu = options.next_gpu or next_gpu_of(services.kinds)
    with progress(options, "Pulling levers") as step, at_door(options.scenario):
        found = services_levers(services, next_gpu=next_gpu and catalog.gpu(next_gpu), llm=other_llm, progress=step)
    layouts = [layout_of(each.options[0]) for each in said]
    document = services_levers_to_json(found, layouts, path=options.out) | {"command": options.line}
    told = zip((document["present"], *document["levers"]), (found.present, *found.each), strict=True)
    for each, one in told:
        each["why"] = why_together(one.answer) if isinstance(one.answer, NoServicesPlan) else None
    if document["present"]["why"]:
        say(options, f"the present fleets: {document['present']['why']}")
    held = any(one.total is not None for one in (found.present, *found.each))
    drawn = services_levers_figure if any(each["gain"] for each in document["levers"]) else None
    files = {"csv": services_levers_csv(document)}
    return Answer(document, services_levers_table, OK if held else INFEASIBLE, drawn, files)


def _refuse_beside(options: argparse.Namespace, asked: str, others: Sequence[str]) -> None:
    """What another kind of answer does not read."""
    for name in others:
        if getattr(options, name):
            raise BadInput(flag(name), f"not read with {flag(asked)}", "need one of the two")


def _made_folder(path: str) -> bool:
    """Whether it was not there and is now, before the work is done; or refuse."""
    try:
        there = os.path.isdir(path)
        os.makedirs(path, exist_ok=True)
        return not there
    except OSError as error:
        raise BadInput(f"--plans {path}", f"cannot be made: {error.strerror}", "need a folder") from None


def _services(options: argparse.Namespace, said: list[ServiceSaid]) -> Services:
    """What is asked."""
    names = [each.name for each in said]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise BadInput(options.scenario, f"two services are called {doubled[0]!r}", "need a name of its own for each")
    problems = {each.name: [_problem(options, each, own) for own in each.options] for each in said}
    how: dict[str, Any] = {
        "budget": shared_budget_of(options),
        "end_to_end_s": {each.name: each.end_to_end_s for each in said if each.end_to_end_s is not None},
        "batch": [each.name for each in said if each.batch],
    }
    with at_door(options.scenario):
        services = make_services(problems, **how)
        if not (options.buy or options.buy_usd_per_gpu_h):
            return services
        return make_services(problems, **how, purchases=_purchases(options, services))


def _problem(options: argparse.Namespace, service: ServiceSaid, own: argparse.Namespace) -> Problem:
    """Of one service with one LLM."""
    try:
        return problem_of(own, workload_of(own), options.objective)
    except BadInput as error:
        raise BadInput(f"{options.scenario}, service {service.name!r}", str(error)) from None


def _purchases(options: argparse.Namespace, services: Services) -> dict[str, Purchase]:
    """What may be bought, at its price; else at that of those in stock."""
    for kind in options.buy_usd_per_gpu_h:
        if kind not in options.buy:
            raise BadInput("--buy-usd-per-gpu-h", f"{kind}: none may be bought", f"need --buy {kind}=N as well")
    for kind in options.buy:
        if kind not in services.kinds:
            raise BadInput(
                f"--buy {kind}", f"no service may be of {kind}", f"their GPUs are {', '.join(services.kinds)}"
            )
    prices = {kind: options.buy_usd_per_gpu_h.get(kind, price_of(services, kind)) for kind in options.buy}
    return {kind: Purchase(most, prices[kind]) for kind, most in options.buy.items()}
