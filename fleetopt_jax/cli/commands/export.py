"""`fleetopt export`: what deploys a plan."""

import argparse

from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.core.files import parse_json, read_bytes, to_json
from fleetopt_jax.report.export.kubernetes import kubernetes_document, kubernetes_yaml
from fleetopt_jax.report.export.launch import fleet_launch
from fleetopt_jax.report.export.vllm import vllm_document, vllm_script

TARGETS = {"vllm": (vllm_document, vllm_script), "kubernetes": (kubernetes_document, kubernetes_yaml)}


def run(options: argparse.Namespace) -> Answer:
    """The text of the target; --json shows the same content as one object."""
    plan = parse_json(options.plan, read_bytes(options.plan))
    fleet = fleet_launch(plan, options.plan, models=dict(options.model), name=options.name)
    to_document, to_text = TARGETS[options.to]
    document = to_document(fleet)
    return Answer(document, to_text(document), OK, files={"router": to_json(fleet.router) + "\n"})
