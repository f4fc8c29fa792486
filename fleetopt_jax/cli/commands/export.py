"""`fleetopt export`: what deploys a plan."""

import argparse
from functools import partial

from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import parse_json, read_bytes, to_json
from fleetopt_jax.report.export.envoy import router_export, router_yaml
from fleetopt_jax.report.export.kubernetes import kubernetes_document, kubernetes_yaml
from fleetopt_jax.report.export.launch import fleet_launch
from fleetopt_jax.report.export.vllm import vllm_document, vllm_script


def run(options: argparse.Namespace) -> Answer:
    """The text of the target; --json shows the same content as one object."""
    if options.weights and options.to != "kubernetes":
        raise BadInput("--weights", f"not read with --to {options.to}", "leave it out, or give --to kubernetes")
    targets = {
        "vllm": (vllm_document, vllm_script),
        "kubernetes": (partial(kubernetes_document, weights=options.weights or "claim"), kubernetes_yaml),
        "envoy": (router_export, router_yaml),
    }
    plan = parse_json(options.plan, read_bytes(options.plan))
    fleet = fleet_launch(plan, options.plan, models=dict(options.model), name=options.name)
    to_document, to_text = targets[options.to]
    document = to_document(fleet)
    return Answer(document, to_text(document), OK, files={"router": to_json(fleet.router) + "\n"})
