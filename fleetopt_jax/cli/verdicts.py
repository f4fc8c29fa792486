"""What is said of a plan on stderr, and what is drawn of it."""

import argparse
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetopt_jax._optimize.plan import Infeasible, Plan, Unreachable
from fleetopt_jax._optimize.remedies import remedies
from fleetopt_jax._optimize.services import NoServicesPlan
from fleetopt_jax.cli.terminal import progress, say
from fleetopt_jax.core.units import KW, MS
from fleetopt_jax.report.verdict import change_said, failing_said, repair_said
from fleetopt_jax.report.words import NOT_TOGETHER, limit_quantity, listed
from fleetopt_jax.workload.atoms import total_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure


RESERVED_BY = {"spares": "--spare, --spare-nodes", "target": "--availability"}  # the options of each


def not_judged(serve: str) -> str:
    """Why what simulates plans, or draws their errors, refuses those that may have pools of two stages."""
    return f"lanes of two stages (--serve {serve}) are not judged"


def say_broken(options: argparse.Namespace, plan: Mapping[str, Any]) -> None:
    """Which limits the plan of a document breaks, if any, and what mends it, where that was asked."""
    if said := failing_said(plan):
        say(options, "; ".join(filter(None, [f"infeasible: {said}", repair_said(plan)])))


def say_repaired(options: argparse.Namespace, plan: Mapping[str, Any]) -> None:
    """What was added to the plan of a document, and what it still breaks."""
    say(options, f"repaired: {change_said(plan['repaired']['instances_added'], ('added', 'took'))}")
    say_broken(options, plan)


def why(binding: Unreachable) -> str:
    """Which limit cannot be held, and what can; what is reachable is rounded up, so that asking for it succeeds."""
    limit, asked, nearest = binding.limit, binding.asked, binding.nearest_feasible
    if isinstance(asked, dict):
        return NOT_TOGETHER
    if limit == "window_tokens":
        return (
            f"no engine holds a sequence of the {asked:.0f}-token window; the largest one holds is {nearest:.0f} tokens"
        )
    if limit == "confidence":
        most = "" if nearest is None else f"; the most that one does is {100.0 * nearest:.1f} %"
        within = "" if nearest is not None else " and keeps its budget"
        return f"no fleet that was tried holds its limits with {100.0 * asked:g} % probability{within}{most}"
    scarce = ("its latencies with", limit.removeprefix("gpus_of.").upper(), 1.0)
    what, unit, size = {
        "itl_s": ("a mean ITL of", "ms", MS),
        "ttft_p99_s": ("a P99 TTFT of", "ms", MS),
        "max_gpus": ("its latencies with", "GPUs", 1.0),
        "max_power_w": ("its latencies within", "kW", KW),
        "max_usd_per_h": ("its latencies for", "USD/h", 1.0),
        "max_kg_co2_per_h": ("its latencies with", "kg CO2/h", 1.0),
    }.get(limit, scarce)
    text = f"no fleet holds {what} {asked / size:g} {unit}"
    if nearest is None:
        return text
    whole = limit == "max_gpus" or limit.startswith("gpus_of.")
    reachable = f"{nearest:,.0f}" if whole else f"{np.ceil(nearest / size * 10) / 10:.1f}"
    return f"{text}; the smallest reachable is {reachable} {unit}"


def why_together(answer: NoServicesPlan) -> str:
    """What services cannot keep: one of them by itself, or all together; and which value of a limit would do."""
    if answer.service is not None:
        return f"service {answer.service}: {why(answer.binding)}"
    limits = answer.services.budget.caps
    asked = listed([_amount(name, cap + _buyable(answer, name)) for name, cap in limits.items()])
    one = _amount(answer.binding.limit, limits[answer.binding.limit]) if answer.binding.limit in limits else asked
    others = "" if one == asked else ", whatever else they may use"
    helps = [f"{_amount(name, value)} instead" for name, value in answer.helps.items()]
    known = f"; what would do, the rest as it is: {' or '.join(helps)}" if helps else ""
    if not answer.proved:
        found = "no plan was found in which the services hold what they are promised"
        return f"{found} with {one}; that there is none is not proved"
    return f"the services together do not hold what they are promised with {one}{others}{known}"


def _buyable(answer: NoServicesPlan, limit: str) -> float:
    purchase = answer.services.purchases.get(limit.removeprefix("gpus_of."))
    return purchase.most if purchase else 0.0


def _amount(limit: str, value: float) -> str:
    """A value of a limit of the budget, rounded up so that asking for it succeeds: '64 H100', '120.1 kW'."""
    if limit.startswith("gpus_of."):
        return f"{math.ceil(value - 1e-6):,} {limit.removeprefix('gpus_of.').upper()}"
    if limit == "max_gpus":
        return f"{math.ceil(value - 1e-6):,} GPUs"
    quantity = limit_quantity(limit)
    return f"{math.ceil(value / quantity.si * 10 - 1e-6) / 10:,.1f} {quantity.unit}"


def help_said(options: argparse.Namespace, answer: Infeasible) -> str:
    """What would help, by the options that say so: each was tried by itself."""
    said = []
    with progress(options, "Trying what would help"):
        for remedy in remedies(answer):
            value = remedy.value
            match remedy.field:
                case "ttft_s_per_token":
                    said.append(f"--ttft-ms-per-1k {float(value) * 1000.0 / MS:g} (the limit grows with the prompt)")
                case "scope":
                    said.append("--slo-scope fleet (of all requests together, not of each pool)")
                case "n_pools":
                    said.append(f"--pools {value}")
                case "tp":
                    said.append(f"--tp {value}")
    reserve = answer.problem.surroundings.reserve
    counted = "" if reserve is None else f"; what may be down is counted in ({RESERVED_BY[reserve.name]})"
    return counted + (f"; what would help: {' or '.join(said)}" if said else "")


def pool_map_of(plan: Plan) -> "Callable[[dict[str, Any]], Figure]":
    """What draws the plan's pools over the lengths of its requests; matplotlib is imported where it draws."""

    def draw(document: dict[str, Any]) -> "Figure":
        from fleetopt_jax.report.pool_map import pool_map_figure

        workload = plan.problem.workload
        return pool_map_figure(document, np.asarray(total_tokens(workload)), np.asarray(workload.weight))

    return draw
