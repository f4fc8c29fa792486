"""A plan as Kubernetes manifests: a Deployment, a Service and a disruption budget for each pool and for the router; in
place of its Deployment a LeaderWorkerSet, where an instance is on several hosts.

Names are relative to the namespace they are applied in. What no plan can know is said in the header: the storage class,
the secrets, and where clients come from.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

from fleetopt_jax.core.files import to_json
from fleetopt_jax.core.units import GIB
from fleetopt_jax.report.export.envoy import (
    ADMIN_PORT,
    DNS_REFRESH_S,
    ENVOY_RELEASE,
    LISTEN_PORT,
    METRICS_PORT,
    envoy_document,
    envoy_yaml,
)
from fleetopt_jax.report.export.launch import MOST_LOAD_FRAC, FleetLaunch, PoolLaunch
from fleetopt_jax.report.export.releases import PORT, STAGE_ROUTER_RELEASE, VLLM_RELEASE
from fleetopt_jax.report.export.two_stage import (
    HAND_OVER_PORT,
    KEY_NOTE,
    STAGE_METRICS_PORT,
    StageRouter,
)
from fleetopt_jax.report.export.vllm import SCHEMA
from fleetopt_jax.report.words import listed

IMAGE = f"vllm/vllm-openai:v{VLLM_RELEASE}"
ROUTER_IMAGE = f"envoyproxy/envoy:v{ENVOY_RELEASE}"
STAGE_ROUTER_IMAGE = f"vllm/vllm-router:v{STAGE_ROUTER_RELEASE}"  # as its .buildkite/scripts/publish-release-images.sh
# The label nvidia.com/gpu.product as GPU feature discovery writes it: the driver's name of the whole, unshared board.
GPU_PRODUCTS = {
    "a100": "NVIDIA-A100-SXM4-80GB",
    "h100": "NVIDIA-H100-80GB-HBM3",
    "h200": "NVIDIA-H200",
    "b200": "NVIDIA-B200",
    "gb200": "NVIDIA-GB200",
    "b300": "NVIDIA-B300-SXM6-AC",
    "gb300": "NVIDIA-GB300",
    "rtx-pro-6000": "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition",
    "l40s": "NVIDIA-L40S",
}
LWS_RELEASE = "0.7.0"  # of LeaderWorkerSet (leaderworkerset.x-k8s.io/v1): the release whose schema tests hold
LWS_LEADER, LWS_RANK = "LWS_LEADER_ADDRESS", "LWS_WORKER_INDEX"  # what it puts into the environment of containers
OF_GROUP = "leaderworkerset.sigs.k8s.io/name"  # its label of all pods of a set
START_S = 3600  # to download and load the weights
PROBE_S = 10
LEAVE_S = 30 + 2 * DNS_REFRESH_S  # until no router asks a leaving instance: kubeadm's CoreDNS keeps an answer for 30 s
CUT_S = 15  # between the end of the drain and the kill
USER = 2000  # `vllm` of the image, of group 0, whose home is /home/vllm (vLLM's guide for Docker)
ENVOY_USER = 101  # `envoy` of the image
CACHE = "/home/vllm/.cache/huggingface"
HOST_CACHE = "/var/lib/fleetopt/huggingface"
HOST_GIB_PER_PROCESS = 8  # CUDA context, Python and pinned buffers; weights stream through the page cache
# A core passed on 54,000 streamed events or 2,500 requests of 4 kB a second: Envoy 1.40.0's own CPU time over 20,000
# and 1,000 of them on 20 connections, one run on one host. Half of that is planned, which also holds the 100 us that
# hashing how a prompt begins takes.
TOKENS_PER_CPU_S, REQUESTS_PER_CPU_S = 27_000, 1_250
STREAM_BYTES = 2**16  # of router memory for a request in flight: its body and both ends' buffers
ROUTERS = 2  # one may fail
NOBODY = 65_534  # of every image

Weights = Literal["claim", "host", "none"]


def kubernetes_document(
    fleet: FleetLaunch, *, weights: Weights = "claim", gpu_products: Mapping[str, str] = GPU_PRODUCTS
) -> dict[str, Any]:
    """The contract's object: what `manifests_yaml` prints, and the router.

    `weights` are kept in one claim of all instances, in a folder of each host, or not at all (`none`): every start then
    downloads them. `gpu_products` gives the label nvidia.com/gpu.product of a GPU's nodes; a GPU without one may run on
    any node.
    """
    router = router_config(fleet)
    written = [([f"What {ROUTERS} routers read: envoy.yaml. router.json has the thresholds alone."], router)]
    if weights == "claim":
        written.append((["EDIT storageClassName: a class that offers ReadWriteMany."], claim(fleet)))
    for pool in fleet.pools:
        whose = f", {pool.role} stage" if pool.role else ""
        about = f"Requests of up to {pool.window_tokens:,} tokens{whose}: {pool.n_instances:,} instances of "
        about += f"{pool.gpus_per_instance} x {pool.gpu}."
        started = _group if pool.hosts_per_instance > 1 else _deployment
        written.append(([about, *pool.notes], started(fleet, pool, _pod(fleet, pool, weights, gpu_products))))
        labels = labels_of(fleet, pool)
        written.append((["No address of its own: DNS has every ready instance."], _service(pool.name, labels)))
        every_pod = {OF_GROUP: pool.name} if pool.hosts_per_instance > 1 else _selector(pool.name)
        written.append(([], _budget(pool.name, labels, every_pod)))
    written += _finders(fleet) if fleet.stage_routers else []
    for each in fleet.stage_routers:
        written += _stage_router(fleet, each)
    written += router_manifests(fleet, router)
    return {
        "schema": SCHEMA,
        "to": "kubernetes",
        "release": VLLM_RELEASE,
        "title": fleet.title,
        "verified": fleet.verified,
        "header": list(fleet.header),
        "notes": _notes(fleet, weights, gpu_products),
        "comments": [comments for comments, _ in written],
        "manifests": [manifest for _, manifest in written],
        "router": fleet.router,
    }


def _notes(fleet: FleetLaunch, weights: Weights, gpu_products: Mapping[str, str]) -> list[str]:
    """What an operator has to do or to know; what is to be edited is called EDIT where it is."""
    keep = {
        "claim": f"EDIT the class of the claim {claim_name(fleet)}: all instances read the weights from it.",
        "host": f"On every node, as root: install -d -o {USER} -g 0 -m 0775 {HOST_CACHE}",
        "none": "Every instance downloads its weights whenever it starts: see --weights.",
    }
    unlabelled = sorted({pool.gpu for pool in fleet.pools} - set(gpu_products))
    return [
        "Before: kubectl create secret generic "
        f'{key_name(fleet)} --from-literal=api-key="$(openssl rand -hex 32)"   # clients send it as Bearer',
        'For gated checkpoints: kubectl create secret generic hf-token --from-literal=token="$HF_TOKEN"',
        keep[weights],
        f"Clients ask http://{router_name(fleet)}/v1/... inside the cluster; TLS and a way in from outside are yours.",
        "The router estimates prompt tokens by bytes and takes the answer's from max_tokens: see the Lua below. "
        "A request without max_tokens goes to the last pool, which alone surely holds it.",
        *(
            f"The nodes of {gpu} are not selected: EDIT in a nodeSelector if the cluster has other GPUs."
            for gpu in unlabelled
        ),
        *fleet.stage_router_notes,
        *fleet.notes,
        *(_groups_said(fleet) if any(pool.hosts_per_instance > 1 for pool in fleet.pools) else []),
        *(_stages_said(fleet) if fleet.stage_routers else []),
    ]


def _groups_said(fleet: FleetLaunch) -> list[str]:
    """Of instances on several hosts."""
    several = [pool for pool in fleet.pools if pool.hosts_per_instance > 1]
    staged = "The leader of a stage hands KV caches over for all its hosts, which no test does."
    return [
        f"{listed([pool.name for pool in several])}: instances on several hosts, each a group of a LeaderWorkerSet. "
        f"The cluster needs its controller, {LWS_RELEASE} or newer: https://lws.sigs.k8s.io/docs/installation. Its "
        "schema was read, and no cluster has run this.",
        "What lets hosts pass data on by RDMA is not written (device plugins, a second network, NCCL_IB_HCA, "
        "NCCL_SOCKET_IFNAME), nor is what keeps the hosts of an instance near one another (the LeaderWorkerSet's "
        "annotation leaderworkerset.sigs.k8s.io/exclusive-topology). Without RDMA NCCL falls back to TCP.",
        *([staged] if any(pool.role for pool in several) else []),
    ]


def _stages_said(fleet: FleetLaunch) -> list[str]:
    return [
        KEY_NOTE,
        f"Look first whether {IMAGE} has NIXL (vLLM's Dockerfile puts it there with INSTALL_KV_CONNECTORS=true) and "
        f"whether {STAGE_ROUTER_IMAGE} is there (the tag that vllm-router's release script gives): no test does.",
        "Pods of two stages carry llm-d.ai/role: prefill or decode, by which llm-d's endpoint picker selects them. It "
        "would stand in vllm-router's place; it, its InferencePool and the sidecar of decode pods are not written.",
        "vllm-router is given as much CPU and memory as Envoy, which was not measured.",
    ]


def router_name(fleet: FleetLaunch) -> str:
    return f"{fleet.name}-router"


def claim_name(fleet: FleetLaunch) -> str:
    return f"{fleet.name}-weights"


def key_name(fleet: FleetLaunch) -> str:
    return f"{fleet.name}-api-key"


def _finder_name(fleet: FleetLaunch) -> str:
    return f"{fleet.name}-stage-router"


def labels_of(
    fleet: FleetLaunch, pool: PoolLaunch | None = None, *, router: tuple[str, str, str] | None = None
) -> dict[str, str]:
    """Of what all have, of a pool, or of a router: its name, its program and the release of that."""
    own = (pool.name, "vllm", VLLM_RELEASE, "engine") if pool else None
    own = (*router, "router") if router else own
    keys = ("instance", "name", "version", "component")
    return {
        **({f"app.kubernetes.io/{key}": value for key, value in zip(keys, own)} if own else {}),
        **({"llm-d.ai/role": pool.role} if pool and pool.role else {}),
        "app.kubernetes.io/part-of": fleet.name,
        "app.kubernetes.io/managed-by": "fleetopt",
    }


def _selector(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/instance": name}


def named(kind: str, api: str, name: str, labels: dict[str, str], **parts: Any) -> dict[str, Any]:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "labels": labels}, **parts}


def router_config(fleet: FleetLaunch) -> dict[str, Any]:
    files = {
        "router.json": to_json(fleet.router) + "\n",
        "envoy.yaml": envoy_yaml(envoy_document(fleet), fleet.header),
    }
    return named("ConfigMap", "v1", router_name(fleet), labels_of(fleet), data=files)


def claim(fleet: FleetLaunch) -> dict[str, Any]:
    """Room for every checkpoint and half as much again, in which one is replaced."""
    checkpoints = {pool.args[0]: pool.checkpoint_bytes or 500 * GIB for pool in fleet.pools}
    size = f"{math.ceil(1.5 * sum(checkpoints.values()) / GIB)}Gi"
    spec = {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "edit-me",
        "resources": {"requests": {"storage": size}},
    }
    return named("PersistentVolumeClaim", "v1", claim_name(fleet), labels_of(fleet), spec=spec)


def _service(name: str, labels: dict[str, str]) -> dict[str, Any]:
    ports = [{"name": "http", "port": PORT, "targetPort": "http"}]
    spec = {"clusterIP": "None", "selector": _selector(name), "ports": ports}
    return named("Service", "v1", name, labels, spec=spec)


def _budget(name: str, labels: dict[str, str], selector: dict[str, str]) -> dict[str, Any]:
    """Nodes are drained one instance at a time; what does not serve anyway keeps none."""
    spec = {"maxUnavailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow", "selector": {"matchLabels": selector}}
    return named("PodDisruptionBudget", "policy/v1", name, labels, spec=spec)


def _deployment(fleet: FleetLaunch, pool: PoolLaunch, pod: dict[str, Any]) -> dict[str, Any]:
    """No instance more than planned during an update, for there may be no GPU for it."""
    labels = labels_of(fleet, pool)
    spec = {
        "replicas": pool.n_instances,
        "selector": {"matchLabels": _selector(pool.name)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "minReadySeconds": LEAVE_S,  # the routers have found it before the next one stops
        "progressDeadlineSeconds": START_S + pool.drain_s + 600,
        "template": {"metadata": {"labels": labels, "annotations": _scraped(PORT, "/metrics")}, "spec": pod},
    }
    return named("Deployment", "apps/v1", pool.name, labels, spec=spec)


def _group(fleet: FleetLaunch, pool: PoolLaunch, pod: dict[str, Any]) -> dict[str, Any]:
    """Instances on several hosts, a pod on each: all start the same, with their ranks, and are replaced together.

    The leader (rank 0) answers, and carries the pool's labels; the Service has no worker. LeaderWorkerSet's own Service
    would have the pool's name: with one for each instance there is none. Once a leader is told to stop, its workers are
    too: they wait as long as it may drain.
    """
    labels, set_labels = labels_of(fleet, pool), labels_of(fleet)
    worker_labels = {**set_labels, "app.kubernetes.io/component": "engine-worker"}
    leader = {"metadata": {"labels": labels, "annotations": _scraped(PORT, "/metrics")}, "spec": pod}
    spec = {
        "replicas": pool.n_instances,
        "startupPolicy": "LeaderCreated",
        "networkConfig": {"subdomainPolicy": "UniquePerReplica"},
        "rolloutStrategy": {
            "type": "RollingUpdate",
            "rollingUpdateConfiguration": {"maxSurge": 0, "maxUnavailable": 1},
        },
        "leaderWorkerTemplate": {
            "size": pool.hosts_per_instance,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": leader,
            "workerTemplate": {"metadata": {"labels": worker_labels}, "spec": _worker(pod, pool)},
        },
    }
    return named("LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1", pool.name, labels, spec=spec)


def _worker(pod: dict[str, Any], pool: PoolLaunch) -> dict[str, Any]:
    """The pod of another rank than 0: it answers nobody, so that nothing can ask it how it is; it ends if it fails."""
    (leader,) = pod["containers"]
    asked = ("ports", "startupProbe", "readinessProbe", "livenessProbe")
    container = {name: value for name, value in leader.items() if name not in asked}
    container["args"] = [*leader["args"], "--headless"]
    container["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(LEAVE_S + pool.drain_s)]}}}
    kept = {name: value for name, value in pod.items() if name != "topologySpreadConstraints"}
    return {**kept, "containers": [container]}


def _of_rank(pool: PoolLaunch) -> list[str]:
    """Where a host of several stands, from what LeaderWorkerSet puts into the environment of every container."""
    if pool.hosts_per_instance == 1:
        return []
    of_groups = any(arg.startswith("--data-parallel-size=") for arg in pool.args)
    return [
        f"--node-rank=$({LWS_RANK})",
        f"--master-addr=$({LWS_LEADER})",
        *([f"--data-parallel-address=$({LWS_LEADER})"] if of_groups else []),
    ]


def _scraped(port: int, path: str) -> dict[str, str]:
    """For a Prometheus that discovers pods by their annotations."""
    return {"prometheus.io/scrape": "true", "prometheus.io/port": str(port), "prometheus.io/path": path}


def secret(variable: str, name: str, key: str, **more: bool) -> dict[str, Any]:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key, **more}}}


def _spread(name: str, *keys: str) -> list[dict[str, Any]]:
    """Over zones where that is possible: GPUs are often in one only. Over hosts as well, it would break up those that
    other pools need whole."""
    return [
        {
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": _selector(name)},
        }
        for key in ("topology.kubernetes.io/zone", *keys)
    ]


def _pod(fleet: FleetLaunch, pool: PoolLaunch, weights: Weights, gpu_products: Mapping[str, str]) -> dict[str, Any]:
    """One instance. To stop, it waits until no router asks it any more, then ends what it has begun."""
    mounts = [{"name": "weights", "mountPath": CACHE}]
    volumes = [{"name": "weights", **weights_volume(fleet, weights)}]
    shared_gib = max(2, _gpus_of_pod(pool))
    if _gpus_of_pod(pool) > 1:  # the processes of one instance talk through it
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_gib}Gi"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    container = {
        "name": "vllm",
        "image": IMAGE,
        "command": ["vllm", "serve"],
        "args": [*(arg.replace("$", "$$") for arg in pool.args), *_of_rank(pool)],  # Kubernetes fills in $(NAME)
        "env": [
            {"name": "HOME", "value": "/home/vllm"},
            secret("VLLM_API_KEY", key_name(fleet), "api-key"),
            secret("HF_TOKEN", "hf-token", "token", optional=True),
            *(met_at() if pool.role else []),
        ],
        "ports": [
            {"name": "http", "containerPort": PORT},
            *([{"name": "nixl", "containerPort": HAND_OVER_PORT}] if pool.role else []),
        ],
        "resources": engine_resources(pool, shared_gib),
        "startupProbe": _probe(START_S // PROBE_S),
        "readinessProbe": _probe(3),
        "livenessProbe": _probe(6),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVE_S)]}}},
        "securityContext": _confined(read_only=False),  # vLLM compiles into its home
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {
        **_quiet_pod(user=USER, group=0, grace_s=LEAVE_S + pool.drain_s + CUT_S),
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "topologySpreadConstraints": _spread(pool.name),
        "containers": [container],
        "volumes": volumes,
    }
    if pool.gpu in gpu_products:
        pod["nodeSelector"] = {"nvidia.com/gpu.product": gpu_products[pool.gpu]}
    return pod


def met_at() -> list[dict[str, Any]]:
    """Where the other stage's instances meet one."""
    return [
        _of_pod("VLLM_NIXL_SIDE_CHANNEL_HOST", "status.podIP"),
        {"name": "VLLM_NIXL_SIDE_CHANNEL_PORT", "value": str(HAND_OVER_PORT)},
    ]


def _of_pod(variable: str, path: str) -> dict[str, Any]:
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def weights_volume(fleet: FleetLaunch, weights: Weights) -> dict[str, Any]:
    return {
        "claim": {"persistentVolumeClaim": {"claimName": claim_name(fleet)}},
        "host": {"hostPath": {"path": HOST_CACHE, "type": "Directory"}},
        "none": {"emptyDir": {}},
    }[weights]


def engine_resources(pool: PoolLaunch, shared_gib: int) -> dict[str, Any]:
    """vLLM runs a server, a scheduler and a worker for each GPU, and wants a physical core for each (its guide to
    optimization): two of Kubernetes' CPUs, which are threads. No limits: loading weights would meet them."""
    n_gpus = _gpus_of_pod(pool)
    processes = 2 + n_gpus
    memory_gib = HOST_GIB_PER_PROCESS * processes + (shared_gib if n_gpus > 1 else 0)
    gpus = {"nvidia.com/gpu": str(n_gpus)}
    return {"requests": {"cpu": str(2 * processes), "memory": f"{memory_gib}Gi", **gpus}, "limits": gpus}


def _gpus_of_pod(pool: PoolLaunch) -> int:
    return pool.gpus_per_instance // pool.hosts_per_instance


def _quiet_pod(*, user: int, group: int, grace_s: int) -> dict[str, Any]:
    """What every pod has: no token, no root, no variables of Services (vLLM would take VLLM_PORT for its own)."""
    return {
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": group,
            "fsGroup": group,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _confined(*, read_only: bool) -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": read_only,
    }


def _probe(failures: int, path: str = "/health", port: str = "http") -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": PROBE_S,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def drain_script(drain_s: int, leave_s: int = CUT_S, admin_port: int = ADMIN_PORT) -> str:
    """Bash: connections close after their answers, Services forget the router, then it waits for what is in flight.

    Envoy's image has no client of HTTP; bash opens the connection itself."""
    rest = "host: admin\\r\\ncontent-length: 0\\r\\nconnection: close\\r\\n\\r\\n"
    return "\n".join(
        [
            "admin() {",
            f"  exec 3<>/dev/tcp/127.0.0.1/{admin_port}",
            f'  printf \'%s %s HTTP/1.1\\r\\n{rest}\' "$1" "$2" >&3',
            "  cat <&3",
            "}",
            "admin POST /healthcheck/fail",
            f"sleep {leave_s}",
            f"for ((i = 0; i < {drain_s}; i++)); do",
            "  admin GET '/stats?filter=http.requests.downstream_rq_active' | grep -q 'active: 0' && exit 0",
            "  sleep 1",
            "done",
        ]
    )


def _finders(fleet: FleetLaunch) -> list[tuple[list[str], dict[str, Any]]]:
    """What lets vLLM's routers see which instances there are."""
    name, labels, group = _finder_name(fleet), labels_of(fleet), "rbac.authorization.k8s.io"
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    subjects, role = [{"kind": "ServiceAccount", "name": name}], {"apiGroup": group, "kind": "Role", "name": name}
    about = "vllm-router finds the instances of its stages among the pods."
    return [
        ([about], named("ServiceAccount", "v1", name, labels)),
        ([], named("Role", f"{group}/v1", name, labels, rules=rules)),
        ([], named("RoleBinding", f"{group}/v1", name, labels, subjects=subjects, roleRef=role)),
    ]


def _stage_router(fleet: FleetLaunch, router: StageRouter) -> list[tuple[list[str], dict[str, Any]]]:
    """vLLM's routers of one pool: the Envoys find them by the pool's name."""
    labels = labels_of(fleet, router=(router.name, "vllm-router", STAGE_ROUTER_RELEASE))
    n_cpus, memory = router_size(fleet)
    found = {
        "service-discovery-port": PORT,
        "service-discovery-namespace": "$(NAMESPACE)",
        **{f"{role}-selector": f"app.kubernetes.io/instance={name}" for role, name in router.stages.items()},
    }
    container = {
        "name": "vllm-router",
        "image": STAGE_ROUTER_IMAGE,
        "command": ["vllm-router"],
        "args": [*router.args, "--service-discovery", *(f"--{flag}={value}" for flag, value in found.items())],
        "env": [_of_pod("NAMESPACE", "metadata.namespace"), secret("OPENAI_API_KEY", key_name(fleet), "api-key")],
        "ports": [
            {"name": "http", "containerPort": PORT},
            {"name": "metrics", "containerPort": STAGE_METRICS_PORT},
        ],
        "resources": {"requests": {"cpu": str(n_cpus), "memory": memory}, "limits": {"memory": memory}},
        "startupProbe": _probe(6, "/liveness"),
        "readinessProbe": _probe(1, "/readiness"),  # 503 until both stages have an instance
        "livenessProbe": _probe(6, "/liveness"),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVE_S)]}}},
        "securityContext": _confined(read_only=True),
    }
    pod = {
        **_quiet_pod(user=NOBODY, group=NOBODY, grace_s=LEAVE_S + router.drain_s + CUT_S),
        "automountServiceAccountToken": True,
        "serviceAccountName": _finder_name(fleet),
        "topologySpreadConstraints": _spread(router.name, "kubernetes.io/hostname"),
        "containers": [container],
    }
    deployment = {
        "replicas": ROUTERS,
        "selector": {"matchLabels": _selector(router.name)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "minReadySeconds": LEAVE_S,
        "progressDeadlineSeconds": START_S + 600,  # until its instances have loaded their weights
        "template": {
            "metadata": {"labels": labels, "annotations": _scraped(STAGE_METRICS_PORT, "/metrics")},
            "spec": pod,
        },
    }
    about = f"Before both stages of requests of up to {router.window_tokens:,} tokens: {ROUTERS} of vLLM's own router."
    return [
        ([about], named("Deployment", "apps/v1", router.name, labels, spec=deployment)),
        (["No address of its own: DNS has every ready router."], _service(router.name, labels)),
        ([], _budget(router.name, labels, _selector(router.name))),
    ]


def router_size(fleet: FleetLaunch) -> tuple[int, str]:
    """(CPUs, memory) that carry all traffic."""
    cpus = fleet.output_tok_per_s / TOKENS_PER_CPU_S + fleet.arrival_rate_per_s / REQUESTS_PER_CPU_S
    streams = sum(pool.n_instances * pool.n_active for pool in fleet.pools)
    return min(max(2, math.ceil(cpus)), 64), f"{1 + math.ceil(streams * STREAM_BYTES / GIB)}Gi"


def router_manifests(fleet: FleetLaunch, config: Mapping[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """The routers, their Service and their disruption budget."""
    name = router_name(fleet)
    labels = labels_of(fleet, router=(name, "envoy", ENVOY_RELEASE))
    drain_s = max(pool.drain_s for pool in fleet.pools)
    n_cpus, memory = router_size(fleet)
    arguments = ("-c", "/etc/fleetopt/envoy.yaml", "--concurrency", str(n_cpus))
    container = {
        "name": "envoy",
        "image": ROUTER_IMAGE,
        "command": ["envoy"],
        "args": [*arguments, "--disable-hot-restart", "--log-level", "warning"],
        **({"env": [secret("VLLM_API_KEY", key_name(fleet), "api-key")]} if fleet.router_looks_at_keys else {}),
        "ports": [
            {"name": "http", "containerPort": LISTEN_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        "resources": {"requests": {"cpu": str(n_cpus), "memory": memory}, "limits": {"memory": memory}},
        "startupProbe": _probe(6, "/ready", "metrics"),
        "readinessProbe": _probe(1, "/ready", "metrics"),
        "livenessProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": PROBE_S, "failureThreshold": 6},
        "lifecycle": {"preStop": {"exec": {"command": ["bash", "-c", drain_script(drain_s)]}}},
        "securityContext": _confined(read_only=True),
        "volumeMounts": [{"name": "config", "mountPath": "/etc/fleetopt", "readOnly": True}],
    }
    pod = {
        **_quiet_pod(user=ENVOY_USER, group=ENVOY_USER, grace_s=CUT_S + drain_s + CUT_S),
        "topologySpreadConstraints": _spread(name, "kubernetes.io/hostname"),
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": name}}],
    }
    digest = hashlib.sha256(to_json(config["data"]).encode()).hexdigest()[:16]
    annotations = {
        **_scraped(METRICS_PORT, "/stats/prometheus"),
        "fleetopt/config": digest,
    }  # new thresholds restart it
    deployment = {
        "replicas": ROUTERS,
        "selector": {"matchLabels": _selector(name)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
    }
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    return [
        ([_routers_said(fleet)], named("Deployment", "apps/v1", name, labels, spec=deployment)),
        ([], named("Service", "v1", name, labels, spec={"selector": _selector(name), "ports": ports})),
        ([], _budget(name, labels, _selector(name))),
    ]


def _routers_said(fleet: FleetLaunch) -> str:
    """What several routers do that one would not."""
    if fleet.router["dispatch_within_pool"] in MOST_LOAD_FRAC:
        return (
            "All routers hash alike (MAGLEV): prompts that begin alike come to one instance whichever is asked. "
            "Each bounds the load of an instance by the requests of its own. One carries all traffic."
        )
    return (
        "Each router counts the requests it has in an instance (LEAST_REQUEST, every instance looked at) and does not "
        f"see those of the others: with {ROUTERS} the queues are nearly those of the plan. One carries all traffic."
    )
