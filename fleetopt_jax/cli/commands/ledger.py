"""`fleetopt ledger`: from the published system to the physical one, or on to a stack of 2026."""

import argparse

from fleetopt_jax.catalog.links import kv_link
from fleetopt_jax.catalog.workloads import LoadedWorkload
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.inputs import (
    at_door,
    prefix_cache_of,
    say_unread,
    slo_of,
    specs_of,
    surroundings_of,
    workload_of,
)
from fleetopt_jax.cli.terminal import progress
from fleetopt_jax.documents.ledger import LedgerRow, Walk, ledger_to_json
from fleetopt_jax.documents.plan import hour_to_json
from fleetopt_jax.fleet.assumptions import PHYSICAL
from fleetopt_jax.fleet.choices.prefix_cache import PrefixCache
from fleetopt_jax.published.ledger import ledger
from fleetopt_jax.published.stack import FOUND, stack_ledger
from fleetopt_jax.report.ledger import TITLES, ledger_figure, ledger_table

READ_WITH = {"stack": ("kv_link",)}


def run(options: argparse.Namespace) -> Answer:
    say_unread(options, READ_WITH)
    loaded, cache = workload_of(options), prefix_cache_of(options)
    walk: Walk = "stack" if options.stack else "published"
    if options.stack and cache is None:
        cache = FOUND
    rows = _walked(options, walk, loaded, cache)
    document = ledger_to_json(
        rows,
        workload_name=loaded.name,
        arrival_rate_per_s=float(loaded.workload.arrival_rate_per_s),
        spec=specs_of(options, PHYSICAL)[0],
        slo=slo_of(options),
        prefix_cache=cache,
        walk=walk,
    )
    document["workload"] |= hour_to_json(loaded.hour)
    return Answer(document, ledger_table, OK, ledger_figure)


def _walked(
    options: argparse.Namespace, walk: Walk, loaded: LoadedWorkload, cache: PrefixCache | None
) -> list[LedgerRow]:
    """The rows of either ledger."""
    with at_door(options.workload), progress(options, TITLES[walk]) as step:
        about = {
            "slo": slo_of(options),
            "name": loaded.name,
            "window_tokens": options.window,
            "surroundings": surroundings_of(options),
            "prefix_cache": cache,
            "progress": step,
        }
        if walk == "stack":
            spec = specs_of(options, PHYSICAL)[0]
            return stack_ledger(loaded.workload, spec, link=kv_link(options.kv_link), **about)
        return ledger(
            loaded.workload,
            lambda assumptions: specs_of(options, assumptions),
            knots=loaded.knots,
            output_share=loaded.output_share,
            **about,
        )
