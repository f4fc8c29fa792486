"""A plan as Kubernetes manifests: a Deployment and a Service for each pool, a ConfigMap for the router."""

from collections.abc import Mapping
from typing import Any

import yaml

from fleetopt_jax.core.files import to_json
from fleetopt_jax.report.export.launch import PORT, VLLM_RELEASE, FleetLaunch, PoolLaunch
from fleetopt_jax.report.export.vllm import SCHEMA

IMAGE = f"vllm/vllm-openai:v{VLLM_RELEASE}"
# The label nvidia.com/gpu.product as GPU feature discovery writes it: the driver's name of the whole, unshared board.
GPU_PRODUCTS = {
    "a100": "NVIDIA-A100-SXM4-80GB",
    "h100": "NVIDIA-H100-80GB-HBM3",
    "h200": "NVIDIA-H200",
    "b200": "NVIDIA-B200",
    "gb200": "NVIDIA-GB200",
    "l40s": "NVIDIA-L40S",
}
START_S = 3600  # to download and load the weights
PROBE_S = 10


def kubernetes_document(fleet: FleetLaunch, *, gpu_products: Mapping[str, str] = GPU_PRODUCTS) -> dict[str, Any]:
    """The contract's object: what `kubernetes_yaml` prints, and the router.

    `gpu_products` gives the label nvidia.com/gpu.product of a GPU's nodes; a GPU without one may run on any node.
    """
    unlabelled = sorted({pool.gpu for pool in fleet.pools} - set(gpu_products))
    notes = [
        *fleet.notes,
        "A Service alone picks an instance at random. For gated checkpoints: kubectl create secret generic hf-token "
        "--from-literal=token=...",
        *(
            f"The nodes of {gpu} are not selected: add a nodeSelector if the cluster has other GPUs."
            for gpu in unlabelled
        ),
        *(f"{pool.name}: {note}" for pool in fleet.pools for note in pool.notes),
    ]
    manifests = [_config_map(fleet)]
    for pool in fleet.pools:
        manifests += [_deployment(fleet, pool, gpu_products), _service(fleet, pool)]
    return {
        "schema": SCHEMA,
        "to": "kubernetes",
        "release": VLLM_RELEASE,
        "title": fleet.title,
        "notes": notes,
        "manifests": manifests,
        "router": fleet.router,
    }


def kubernetes_yaml(document: Mapping[str, Any]) -> str:
    """One stream for `kubectl apply -f`, what is to be known first as comments."""
    comments = [f"{document['title']}.", "Written by fleetopt export from a plan.", *document["notes"]]
    stream = yaml.dump_all(document["manifests"], Dumper=_Dumper, sort_keys=False, explicit_start=True, width=110)
    return "".join(f"# {comment}\n" for comment in comments) + stream


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which reads YAML 1.1; Kubernetes also takes 1e3 and 0o7 for numbers and y for yes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    doubtful = not text[:1].isalpha() or text.lower() in ("y", "n")
    style = "|" if "\n" in text else '"' if doubtful else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _labels(fleet: FleetLaunch, pool: PoolLaunch | None = None) -> dict[str, str]:
    return {
        **({"app.kubernetes.io/instance": pool.name} if pool else {}),
        "app.kubernetes.io/part-of": fleet.name,
        "app.kubernetes.io/managed-by": "fleetopt",
    }


def _selector(pool: PoolLaunch) -> dict[str, str]:
    return {"app.kubernetes.io/instance": pool.name}


def _config_map(fleet: FleetLaunch) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{fleet.name}-router", "labels": _labels(fleet)},
        "data": {"router.json": to_json(fleet.router) + "\n"},
    }


def _service(fleet: FleetLaunch, pool: PoolLaunch) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": pool.name, "labels": _labels(fleet, pool)},
        "spec": {
            "selector": _selector(pool),
            "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
        },
    }


def _deployment(fleet: FleetLaunch, pool: PoolLaunch, gpu_products: Mapping[str, str]) -> dict[str, Any]:
    """No instance more than planned during an update, for there may be no GPU for it."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": pool.name, "labels": _labels(fleet, pool)},
        "spec": {
            "replicas": pool.n_instances,
            "selector": {"matchLabels": _selector(pool)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "progressDeadlineSeconds": START_S + 600,
            "template": {"metadata": {"labels": _labels(fleet, pool)}, "spec": _pod(pool, gpu_products)},
        },
    }


def _pod(pool: PoolLaunch, gpu_products: Mapping[str, str]) -> dict[str, Any]:
    container = {
        "name": "vllm",
        "image": IMAGE,
        "command": ["vllm", "serve"],
        "args": [arg.replace("$", "$$") for arg in pool.args],  # Kubernetes would fill in $(NAME)
        "env": [
            {
                "name": "HF_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}},
            }
        ],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"limits": {"nvidia.com/gpu": str(pool.gpus_per_instance)}},
        "startupProbe": _probe(START_S // PROBE_S),
        "readinessProbe": _probe(3),
        "livenessProbe": _probe(6),
    }
    pod: dict[str, Any] = {
        # A Service named vllm would set VLLM_PORT, which vLLM reads as its own.
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
    }
    if pool.gpu in gpu_products:
        pod["nodeSelector"] = {"nvidia.com/gpu.product": gpu_products[pool.gpu]}
    if pool.gpus_per_instance > 1:  # the processes of one instance talk through it
        size = f"{max(2, pool.gpus_per_instance)}Gi"
        pod["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}]
        container["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]
    return pod


def _probe(failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": PROBE_S,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
