"""`fleetopt export`: what deploys a plan."""

import argparse
from functools import partial
from typing import Any

from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.inputs import named_catalog
from fleetopt_jax.cli.repeat import from_here
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import parse_json, read_bytes, to_json
from fleetopt_jax.report.export.dynamo import dynamo_document
from fleetopt_jax.report.export.envoy import router_export, router_yaml
from fleetopt_jax.report.export.kubernetes import kubernetes_document
from fleetopt_jax.report.export.launch import fleet_launch
from fleetopt_jax.report.export.text import manifests_yaml
from fleetopt_jax.report.export.vllm import vllm_document, vllm_script


def run(options: argparse.Namespace) -> Answer:
    """The text of the target; --json shows the same content as one object."""
    if options.weights and options.to not in ("kubernetes", "dynamo"):
        allowed = "leave it out, or give --to kubernetes or dynamo"
        raise BadInput("--weights", f"not read with --to {options.to}", allowed)
    targets = {
        "vllm": (vllm_document, vllm_script),
        "kubernetes": (partial(kubernetes_document, weights=options.weights or "claim"), manifests_yaml),
        "dynamo": (partial(dynamo_document, weights=options.weights or "claim"), manifests_yaml),
        "envoy": (router_export, router_yaml),
    }
    plan = parse_json(options.plan, read_bytes(options.plan))
    if isinstance(plan, dict) and isinstance(plan.get("command"), str):
        plan["command"] = from_here(plan["command"], options.plan)
    catalog = named_catalog(options, _catalogs(plan))
    fleet = fleet_launch(
        plan, options.plan, models=dict(options.model), name=options.name, catalog=catalog, anyway=options.anyway
    )
    to_document, to_text = targets[options.to]
    document = to_document(fleet)
    see = "" if fleet.stage_routers else ", see optimize --verify"  # which judges no pools of two stages
    note = "" if fleet.verified else f" (unverified: no simulation has held the plan's limits{see})"
    note = f" (it FAILS its limits: {fleet.fails})" if fleet.fails else note
    return Answer(document, to_text(document), OK, files={"router": to_json(fleet.router) + "\n"}, note=note)


def _catalogs(plan: Any) -> list[str]:
    """The catalog files that a document names, which is checked later."""
    pools = plan.get("pools") if isinstance(plan, dict) else None
    pools = [pool for pool in pools if isinstance(pool, dict)] if isinstance(pools, list) else []
    stages = [pool["stages"] for pool in pools if isinstance(pool.get("stages"), list)]
    engines = [*pools, *(stage for pair in stages for stage in pair if isinstance(stage, dict))]
    named = [engine.get("catalog_file") for engine in engines]
    return [file for file in named if isinstance(file, str)]
