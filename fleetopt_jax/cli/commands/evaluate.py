"""`fleetopt evaluate`: metrics of a given plan; of one that fails, what it breaks and what mends it."""

import argparse
from typing import Any

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.repair import Repair, repair
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.inputs import plan_of
from fleetopt_jax.cli.terminal import progress, say
from fleetopt_jax.cli.verdicts import pool_map_of, say_broken, say_repaired
from fleetopt_jax.documents.confidence import plan_holding_to_json
from fleetopt_jax.documents.failures import failures_to_json
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.repair import repair_to_json, repaired_to_json
from fleetopt_jax.fleet.fleet import two_stages
from fleetopt_jax.report import tables


def run(options: argparse.Namespace) -> Answer:
    """The plan as it is; with --repair as it is grown, where instances mend it."""
    plan, layout = plan_of(options)
    if plan.binding and plan.fleet.n_stages == 1:
        with progress(options, "Looking for what mends it"):
            found = repair(plan)
        shown, more = _shown(options, found)
    else:
        shown, more = plan, {}
        if options.repair and plan.binding:
            raise two_stages()
        if options.repair:
            say(options, "the plan holds its limits: there is nothing to repair")
    document = plan_to_json(shown, layout, path=options.out) | more | plan_holding_to_json(shown)
    document |= failures_to_json(shown)
    if "repaired" in document:
        say_repaired(options, document)
    elif plan.binding:
        say_broken(options, document)
    return Answer(document, tables.plan_table, INFEASIBLE if shown.binding else OK, pool_map_of(shown))


def _shown(options: argparse.Namespace, found: Repair) -> tuple[Plan, dict[str, Any]]:
    """The plan that is answered, and what is said of its repair."""
    if options.repair and found.after is not None:
        return found.after, {"repaired": repaired_to_json(found)}
    return found.before, {"repair": repair_to_json(found)}
