"""A plan as NVIDIA Dynamo's custom resources: a DynamoGraphDeployment for each pool, and the router before all.

A graph is a frontend, which asks the instances, and components of equal instances: `prefill` and `decode` of a pool of
two stages, `worker` of another. Dynamo's operator makes Deployments and Services of it. Its frontend knows no lengths,
so that pools are graphs of their own, and our Envoy sends each request to the frontend of the pool that it belongs to.

Sources: Dynamo's references of `DynamoGraphDeployment` and of the component that it is made of (nvidia.com/v1beta1;
docs/kubernetes/dgd-reference.mdx, dcd-reference.mdx, dgd-guide.md of github.com/ai-dynamo/dynamo), which
`tests/dynamo_fields.json` keeps the fields of; its page of compatibility for the release of vLLM. Not run in a cluster.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.report.export.kubernetes import (
    CUT_S,
    GPU_PRODUCTS,
    ROUTERS,
    Weights,
    claim,
    claim_name,
    engine_resources,
    key_name,
    labels_of,
    met_at,
    named,
    router_config,
    router_manifests,
    router_name,
    router_size,
    secret,
    weights_volume,
)
from fleetopt_jax.report.export.launch import FleetLaunch, PoolLaunch
from fleetopt_jax.report.export.releases import DYNAMO_RELEASE, DYNAMO_VLLM_RELEASE, PORT, VLLM_RELEASE
from fleetopt_jax.report.export.vllm import SCHEMA

API = "nvidia.com/v1beta1"
IMAGE = f"nvcr.io/nvidia/ai-dynamo/vllm-runtime:{DYNAMO_RELEASE}"
MAIN = "main"  # the container that the operator adds its own to
CACHE = "/home/dynamo/.cache/huggingface"
COMMAND = ("python3", "-m", "dynamo.vllm")  # takes every engine argument of vLLM beside its own
OTHERWISE = ("--port", "--shutdown-timeout", "--kv-transfer-config")  # of vLLM's server, or said otherwise here
KV_TRANSFER = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
SHARED_GIB = 16  # at least, of two stages: what Dynamo's guide raises it to for the hand-over
ROUTER_MODES = {"jsq": "least-loaded", "round_robin": "round-robin", "random": "random"}  # of DYN_ROUTER_MODE
FRONTEND = "frontend"  # a component, by whose name the operator calls the Service: POOL-frontend


def dynamo_document(
    fleet: FleetLaunch, *, weights: Weights = "claim", gpu_products: Mapping[str, str] = GPU_PRODUCTS
) -> dict[str, Any]:
    """The contract's object: what `manifests_yaml` prints, and the router.

    `weights` are kept in one claim of all instances, or not at all (`none`); `gpu_products` as in
    `kubernetes_document`. Raises BadInput for what is not written.
    """
    _require_written(fleet, weights)
    fleet = _behind_frontends(fleet)
    config = router_config(fleet)
    written = [([f"What {ROUTERS} routers read: envoy.yaml. router.json has the thresholds alone."], config)]
    if weights == "claim":
        written.append((["EDIT storageClassName: a class that offers ReadWriteMany."], claim(fleet)))
    for name, pools in _graphs(fleet).items():
        spec = {"backendFramework": "vllm", "components": [_frontend(fleet)]}
        spec["components"] += [_component(fleet, pool, weights, gpu_products) for pool in pools]
        graph = named("DynamoGraphDeployment", API, name, labels_of(fleet), spec=spec)
        written.append(([note for pool in pools for note in _about(pool)], graph))
    written += router_manifests(fleet, config)
    return {
        "schema": SCHEMA,
        "to": "dynamo",
        "release": DYNAMO_RELEASE,
        "title": fleet.title,
        "verified": fleet.verified,
        "header": list(fleet.header),
        "notes": _notes(fleet, weights),
        "comments": [comments for comments, _ in written],
        "manifests": [manifest for _, manifest in written],
        "router": fleet.router,
    }


def _require_written(fleet: FleetLaunch, weights: Weights) -> None:
    """Refuse what Dynamo could do, perhaps, and is not written."""
    dispatch = fleet.router["dispatch_within_pool"]
    if dispatch not in ROUTER_MODES:
        problem = f"{dispatch}: Dynamo's router of prefixes is not written"
        raise BadInput("--to dynamo", problem, f"need a plan with --dispatch {', '.join(ROUTER_MODES)}")
    if weights == "host":
        raise BadInput("--weights host", "not written with --to dynamo", "need claim or none")
    for pool in fleet.pools:
        if pool.hosts_per_instance > 1:
            problem = f"{pool.gpus_per_instance} GPUs of an instance of {pool.name} are more than a host has"
            raise BadInput("--to dynamo", f"{problem}: components of several hosts are not written", "need fewer")


def _behind_frontends(fleet: FleetLaunch) -> FleetLaunch:
    """Each pool at the Service of its graph's frontend, which looks at no client's key."""
    pools = [each | {"url": f"http://{each['name']}-{FRONTEND}:{PORT}"} for each in fleet.router["pools"]]
    return replace(fleet, router=fleet.router | {"pools": pools}, keys_in_engines=False)


def _graphs(fleet: FleetLaunch) -> dict[str, list[PoolLaunch]]:
    """The components of each pool, by its name: one, or its two stages."""
    by_name = {pool.name: pool for pool in fleet.pools}
    staged = {each.name: [by_name[name] for name in each.stages.values()] for each in fleet.stage_routers}
    names = [pool["name"] for pool in fleet.router["pools"]]
    return {name: staged[name] if name in staged else [by_name[name]] for name in names}


def _about(pool: PoolLaunch) -> list[str]:
    whose = f", {pool.role} stage" if pool.role else ""
    about = f"Requests of up to {pool.window_tokens:,} tokens{whose}: {pool.n_instances:,} instances of "
    return [f"{about}{pool.gpus_per_instance} x {pool.gpu}.", *pool.notes]


def _frontend(fleet: FleetLaunch) -> dict[str, Any]:
    """As many as there are Envoys, as large as one of them."""
    n_cpus, memory = router_size(fleet)
    mode = ROUTER_MODES[fleet.router["dispatch_within_pool"]]
    container = {
        "name": MAIN,
        "image": IMAGE,
        "env": [{"name": "DYN_ROUTER_MODE", "value": mode}, _hf_token()],
        "resources": {"requests": {"cpu": str(n_cpus), "memory": memory}, "limits": {"memory": memory}},
    }
    return {
        "name": FRONTEND,
        "type": FRONTEND,
        "replicas": ROUTERS,
        "podTemplate": {"metadata": {"labels": labels_of(fleet)}, "spec": {"containers": [container]}},
    }


def _component(
    fleet: FleetLaunch, pool: PoolLaunch, weights: Weights, gpu_products: Mapping[str, str]
) -> dict[str, Any]:
    """The instances of a pool, or of one of its stages."""
    shared_gib = max(SHARED_GIB if pool.role else 2, pool.gpus_per_instance)
    container = {
        "name": MAIN,
        "image": IMAGE,
        "command": list(COMMAND),
        "args": [arg.replace("$", "$$") for arg in dynamo_args(pool)],  # Kubernetes would fill in $(NAME)
        "env": [_hf_token(), *(met_at() if pool.role else [])],
        "resources": engine_resources(pool, shared_gib),
        "volumeMounts": [{"name": "weights", "mountPath": CACHE}],
    }
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": pool.drain_s + CUT_S,
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": [{"name": "weights", **weights_volume(fleet, weights)}],
    }
    if pool.gpu in gpu_products:
        pod["nodeSelector"] = {"nvidia.com/gpu.product": gpu_products[pool.gpu]}
    kind = pool.role or "worker"
    return {
        "name": kind,
        "type": kind,
        "replicas": pool.n_instances,
        "sharedMemorySize": f"{shared_gib}Gi",
        "podTemplate": {"metadata": {"labels": labels_of(fleet)}, "spec": pod},
    }


def dynamo_args(pool: PoolLaunch) -> list[str]:
    """vLLM's engine arguments of an instance, as `dynamo.vllm` takes them, and its stage."""
    model, *flags = pool.args
    kept = [arg for arg in flags if arg.split("=", 1)[0] not in OTHERWISE]
    stage = [f"--disaggregation-mode={pool.role}", f"--kv-transfer-config={json.dumps(KV_TRANSFER)}"]
    return [f"--model={model}", *kept, *(stage if pool.role else [])]


_hf_token = partial(secret, "HF_TOKEN", "hf-token", "token", optional=True)


def _notes(fleet: FleetLaunch, weights: Weights) -> list[str]:
    """What an operator has to do or to know; what is to be edited is called EDIT where it is."""
    keep = {
        "claim": f"EDIT the class of the claim {claim_name(fleet)}: all instances read the weights from it.",
        "none": "Every instance downloads its weights whenever it starts: see --weights.",
    }
    mode = ROUTER_MODES[fleet.router["dispatch_within_pool"]]
    return [
        f"For NVIDIA Dynamo {DYNAMO_RELEASE} and its operator in the cluster ({API}). Each pool is a graph of its own, "
        "with a frontend that our Envoys ask, for Dynamo's frontend does not route by length.",
        f"Its image has vLLM {DYNAMO_VLLM_RELEASE}; the flags are those of {VLLM_RELEASE}: EDIT the images' tag to a "
        "release of Dynamo that has it, or look whether vLLM there takes them and runs as fast.",
        "Look first: kubectl apply --dry-run=server -f THIS_FILE. No test has run it in a cluster.",
        "Before: kubectl create secret generic "
        f'{key_name(fleet)} --from-literal=api-key="$(openssl rand -hex 32)"   # clients send it as Bearer',
        'For gated checkpoints: kubectl create secret generic hf-token --from-literal=token="$HF_TOKEN"',
        keep[weights],
        f"Clients ask http://{router_name(fleet)}/v1/... inside the cluster, where Envoy looks at their key. Frontends "
        "look at none: let nobody else reach them (a NetworkPolicy is not written).",
        f"Of a pool's instances its frontends ask the one that DYN_ROUTER_MODE says ({mode}); each counts the requests "
        "of its own. Whether both stages are chosen like that is not checked.",
        "How instances end what they have begun is Dynamo's; their pods have the seconds of the plan's longest answer, "
        "60 to 600, and 15.",
        "Not written: probes, security contexts and Services of instances and frontends, which are the operator's; "
        "scaling adapters and a planner, for the plan says how many; disruption budgets of the graphs; Grove's "
        "topology constraints and gang scheduling; DynamoModel; the endpoint picker; llm-d's manifests.",
        *fleet.notes,
    ]
