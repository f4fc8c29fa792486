"""A plan as vLLM command lines, Kubernetes manifests and a router: the laws' numbers, and names that break nothing."""

import json
import math
import re
import runpy
import shlex
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import kubernetes_validate
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.search import evaluate_given
from fleetopt_jax._simulate.requests import Requests
from fleetopt_jax._simulate.routing import REJECTED, route_requests
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.llms import LLMS
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED, parse_assumptions
from fleetopt_jax.fleet.choices.routing_key import PromptAndLimit
from fleetopt_jax.fleet.fleet import make_fleet
from fleetopt_jax.fleet.traffic import route as routing_law
from fleetopt_jax.laws.kv_cache import MEMORY_UTILIZATION
from fleetopt_jax.report.export.dynamo import dynamo_document
from fleetopt_jax.report.export.envoy import router_export, router_yaml
from fleetopt_jax.report.export.kubernetes import GPU_PRODUCTS, IMAGE, kubernetes_document
from fleetopt_jax.report.export.launch import VLLM_RELEASE, dns_label, fleet_launch
from fleetopt_jax.report.export.releases import STAGE_ROUTER_RELEASE
from fleetopt_jax.report.export.text import manifests_yaml
from fleetopt_jax.report.export.vllm import vllm_document, vllm_script
from fleetopt_jax.workload.atoms import make_workload

ROOT = Path(__file__).parents[1]
RELEASE = json.loads((ROOT / "tests" / "vllm_flags.json").read_text())
ROUTER = runpy.run_path(str(ROOT / "experiments" / "router.py"))
KUBERNETES = "1.37"
kubernetes_validate.utils.schema_contents = cache(
    kubernetes_validate.utils.schema_contents
)  # else read for every manifest
HOSTILE = [
    "; rm -rf /",
    "{{x}}",
    "$(reboot)",
    "`reboot`",
    "a\nb: c",
    "é漢字\u202e",
    "x" * 300,
    "'\"\\",
    "",
    "-",
    "# y",
    "y",
]


def plan(*pools: dict, **fields) -> dict:
    """A plan document with what the export reads."""
    base = {"gpu": "h100", "llm": "llama-3.1-70b", "tp": 8, "n_instances": 3, "max_num_seqs": 256, "gamma": 1.0}
    base |= {"precision": "bf16", "kv_precision": "bf16", "clock_frac": 1.0}
    return {
        "schema": "fleetopt-plan/1",
        "workload": {"name": "chat", "arrival_rate_per_s": 100.0},
        "pools": [base | {"window_tokens": 4096 * 2**k} | pool for k, pool in enumerate(pools or [{}])],
    } | fields


def staged(prefill: dict | None = None, decode: dict | None = None, **fields) -> dict:
    """A pool of two stages, as `plan` takes pools."""
    one = {"gpu": "h100", "llm": "llama-3.1-70b", "tp": 8, "precision": "bf16", "kv_precision": "bf16"}
    stages = [
        one | {"role": "prefill", "n_instances": 5, "max_num_seqs": 64, "n_active": 2.0} | (prefill or {}),
        one | {"role": "decode", "n_instances": 2, "max_num_seqs": 512, "n_active": 90.0} | (decode or {}),
    ]
    return {"stages": stages, "hand_over": {"mean_s": 0.0012}, "itl_s": 0.05, "n_instances": 7} | fields


NGRAM = {"method": "ngram", "head": "ngram", "acceptance": [0.5], "k": 1}
HEAD = {"method": "eagle3", "head": "mine", "model": "me/head", "acceptance": [0.8, 0.6, 0.5], "k": 3}
LOADED = {"pool": 1, "limit": "utilization", "value": 1.43, "asked": 0.85}  # as `broken` has it
LATE = {"pool": 1, "limit": "ttft_p99_s", "value": 0.6, "asked": 0.5}


def flags_of(args) -> dict[str, str | None]:
    """Flag to value, as argparse reads --flag=value."""
    assert not args[0].startswith("-")
    found = [arg.split("=", 1) if "=" in arg else (arg, None) for arg in args[1:]]
    assert len(dict(found)) == len(found)
    return dict(found)


def assert_allowed(args) -> None:
    """Every flag is one of the release, of its type, in its bounds and among its choices."""
    flags = flags_of(args)
    for flag, value in flags.items():
        law = RELEASE["flags"][flag]
        kind = law["type"]
        if kind == "bool":
            assert value is None
        elif "str" in kind or "Config" in kind:
            assert value and value in law.get("choices", [value])
        else:
            number = {"int": int, "float": float}[kind](value)
            assert str(number) == value
            assert number >= law.get("ge", -math.inf) and number <= law.get("le", math.inf)
            assert number > law.get("gt", -math.inf)
    assert int(flags["--max-num-batched-tokens"]) >= int(flags["--max-num-seqs"])  # RELEASE["checks"]
    assert flags.get("--quantization") != "fp8"  # would need an fp8 checkpoint, which needs no flag


def load_all(text: str) -> list[dict]:
    """As `yaml.safe_load_all`, in C."""
    return list(yaml.load_all(text, yaml.CSafeLoader))


def manifests_of(text: str) -> dict[str, list[dict]]:
    by_kind: dict[str, list[dict]] = {}
    for manifest in load_all(text):
        if manifest["kind"] == "LeaderWorkerSet":
            assert_leader_worker_set(manifest)
        else:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        by_kind.setdefault(manifest["kind"], []).append(manifest)
    return by_kind


# Fields of leaderworkerset.x-k8s.io/v1 and what they may be: api/leaderworkerset/v1/leaderworkerset_types.go of
# kubernetes-sigs/lws (Apache-2.0), whose templates are those of pods.
GROUP = {
    "replicas": int,
    "startupPolicy": ("LeaderCreated", "LeaderReady"),
    "networkConfig": {"subdomainPolicy": ("Shared", "UniquePerReplica")},
    "rolloutStrategy": {
        "type": ("RollingUpdate",),
        "rollingUpdateConfiguration": {"partition": int, "maxUnavailable": int, "maxSurge": int},
    },
    "leaderWorkerTemplate": {
        "size": int,
        "restartPolicy": ("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
        "leaderTemplate": "pod",
        "workerTemplate": "pod",
    },
}


def assert_leader_worker_set(manifest: dict) -> None:
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert_of(manifest["spec"], GROUP)


def assert_of(value, law) -> None:
    """No field but the schema's, each of its type or among its words."""
    if law == "pod":
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **value["metadata"]}, "spec": value["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    elif isinstance(law, dict):
        assert set(value) <= set(law)
        for name, each in value.items():
            assert_of(each, law[name])
    else:
        assert value in law if isinstance(law, tuple) else type(value) is law


def engines_of(text: str) -> list[dict]:
    """What starts each pool: the Deployments but the router's, which comes last, and LeaderWorkerSets."""
    return started_of(load_all(text), manifests_of(text))


def started_of(manifests: list[dict], kinds: dict[str, list[dict]]) -> list[dict]:
    """In the order of the manifests."""
    routers = len(kinds["Deployment"]) - 1
    deployments = kinds["Deployment"][:routers] + kinds.get("LeaderWorkerSet", [])
    return [manifest for manifest in manifests if manifest in deployments]


def template_of(started: dict) -> dict:
    """The pods that answer."""
    spec = started["spec"]
    return spec["template"] if started["kind"] == "Deployment" else spec["leaderWorkerTemplate"]["leaderTemplate"]


def as_kubelet(arg: str) -> str:
    """Kubernetes fills in $(NAME), and reads $$ as $."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", arg)
    return arg.replace("$$", "$")


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def run_with(directory: Path, command: list) -> subprocess.CompletedProcess:
    """Run with the programs of a directory before the system's."""
    return subprocess.run(command, env={"PATH": f"{directory}:/usr/bin:/bin"}, capture_output=True, check=True)


def check_all(document: dict, **options) -> None:
    """What holds of every export: the release's flags, one source for both targets, exact numbers, inert text."""
    fleet = fleet_launch(document, "plan.json", **options)
    given_pools = document["pools"]
    both = {"vllm": vllm_document(fleet), "kubernetes": kubernetes_document(fleet)}
    assert json.loads(json.dumps(both, allow_nan=False)) == both
    script, text = vllm_script(both["vllm"]), manifests_yaml(both["kubernetes"])
    assert load_all(text) == both["kubernetes"]["manifests"]
    kinds = manifests_of(text)
    (config,) = kinds["ConfigMap"]
    deployments, (*services, _) = started_of(load_all(text), kinds), kinds["Service"]  # the router's come last
    assert len(fleet.pools) == len(given_pools) == len(deployments) == len(services)
    for pool, asked, deployment, service in zip(fleet.pools, given_pools, deployments, services, strict=True):
        assert_allowed(pool.args)
        flags = flags_of(pool.args)
        assert int(flags["--max-num-seqs"]) == asked["max_num_seqs"]
        assert int(flags["--tensor-parallel-size"]) == asked["tp"] == pool.gpus_per_instance
        assert int(flags["--max-model-len"]) == pool.window_tokens <= asked["window_tokens"]
        assert float(flags["--gpu-memory-utilization"]) == MEMORY_UTILIZATION
        spec, template = deployment["spec"], template_of(deployment)
        (container,) = template["spec"]["containers"]
        of_rank = container["args"][len(pool.args) :]
        assert [as_kubelet(arg) for arg in container["args"][: len(pool.args)]] == list(pool.args)
        assert spec["replicas"] == asked["n_instances"] == pool.n_instances
        n_hosts = int(flags.get("--nnodes") or 1)
        assert n_hosts == pool.hosts_per_instance and asked["tp"] % n_hosts == 0  # vLLM takes no other numbers
        assert (deployment["kind"] == "LeaderWorkerSet") == bool(of_rank) == (n_hosts > 1)
        assert container["resources"]["limits"] == {"nvidia.com/gpu": str(asked["tp"] // n_hosts)}
        labels = template["metadata"]["labels"]
        own = [spec["selector"]["matchLabels"]] if n_hosts == 1 else []
        for selector in (*own, service["spec"]["selector"]):
            assert selector.items() <= labels.items()
            assert sum(selector.items() <= template_of(d)["metadata"]["labels"].items() for d in deployments) == 1
        (port,) = service["spec"]["ports"]
        assert [p["containerPort"] for p in container["ports"] if p["name"] == port["targetPort"]] == [
            int(flags["--port"])
        ]
        assert service["metadata"]["name"] == pool.name
        begin = script.index("exec vllm serve", script.index(f"\n{pool.name})\n"))
        words = shlex.split(script[begin : script.index('"$@"', begin)].replace(" \\\n", " "))
        assert words == ["exec", "vllm", "serve", *pool.args]
    names = [m["metadata"]["name"] for found in kinds.values() for m in found]
    assert len(names) == 3 * len(set(names)) - 1  # Deployment, Service and budget share one; the claim has its own
    assert all(len(name) <= 63 and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) for name in names)
    assert json.loads(config["data"]["router.json"]) == fleet.router
    assert [pool["url"] for pool in fleet.router["pools"]] == [
        f"http://{s['metadata']['name']}:{s['spec']['ports'][0]['port']}" for s in services
    ]
    for pool, row in zip(fleet.pools, fleet.router["pools"], strict=True):
        assert row["max_total_tokens"] == pool.window_tokens
    assert_complete(fleet, kinds, deployments)
    header = text.split("\n---\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    for written in (text, script, config["data"]["envoy.yaml"], router_yaml(router_export(fleet))):
        assert "This plan is unverified" in written.split("\n---\n")[0]


def assert_complete(fleet, kinds: dict[str, list[dict]], started: list[dict]) -> None:
    """What an operator looks for in every pod: it may be drained, watched, moved and trusted."""
    budgets = kinds["PodDisruptionBudget"]
    for deployment, service, budget in zip([*started, kinds["Deployment"][-1]], kinds["Service"], budgets, strict=True):
        template = template_of(deployment)
        pod, labels = template["spec"], template["metadata"]["labels"]
        (container,) = pod["containers"]
        of_group = {"matchLabels": {"leaderworkerset.sigs.k8s.io/name": deployment["metadata"]["name"]}}
        assert budget["spec"]["selector"] == deployment["spec"].get("selector", of_group)
        assert service["spec"]["selector"].items() <= labels.items()
        assert {f"app.kubernetes.io/{name}" for name in ("name", "instance", "version", "component")} < set(labels)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert container["lifecycle"]["preStop"] and pod["terminationGracePeriodSeconds"] > 30
        assert all(container[f"{probe}Probe"] for probe in ("startup", "readiness", "liveness"))
        keys = [spread["topologyKey"] for spread in pod["topologySpreadConstraints"]]
        assert keys[0] == "topology.kubernetes.io/zone"
        annotations = template["metadata"]["annotations"]
        ports = {port["containerPort"] for port in container["ports"]}
        assert annotations["prometheus.io/scrape"] == "true" and int(annotations["prometheus.io/port"]) in ports
    for pool, deployment, service in zip(fleet.pools, started, kinds["Service"]):
        pod = template_of(deployment)["spec"]
        (container,) = pod["containers"]
        sleep_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        flags = flags_of(pool.args)
        assert pod["terminationGracePeriodSeconds"] > sleep_s + int(flags["--shutdown-timeout"])
        if deployment["kind"] == "Deployment":
            assert deployment["spec"]["minReadySeconds"] >= sleep_s  # of a roll, no two instances are away at once
        assert ("--no-enable-prefix-caching" in flags) != ("--enable-prefix-caching" in flags)
        assert service["spec"]["clusterIP"] == "None"  # DNS has every instance
        env = {each["name"]: each.get("valueFrom", {}).get("secretKeyRef") for each in container["env"]}
        assert not env["VLLM_API_KEY"].get("optional") and env["HF_TOKEN"]["optional"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        n_gpus = pool.gpus_per_instance // pool.hosts_per_instance
        assert int(container["resources"]["requests"]["cpu"]) == 2 * (2 + n_gpus)


def test_the_release_is_the_one_whose_flags_are_tested():
    assert RELEASE["release"] == VLLM_RELEASE
    assert f"vllm/vllm-openai:v{RELEASE['release']}" == IMAGE
    assert set(GPU_PRODUCTS) == set(GPUS)


@pytest.mark.slow
def test_a_plan_of_the_library_is_exported_as_it_is(h100, b200):
    """The document itself, not a hand-made one: fields, types and the number of sequences the law found."""
    workload = make_workload([100.0, 3000.0, 20_000.0], [50.0, 100.0, 100.0], arrival_rate_per_s=10.0)
    problem = make_problem(workload, [h100, b200], n_pools=2, gamma=1.5, assume="published", assumptions=PUBLISHED)
    windows = [2048, int(problem.window_tokens)]
    found = evaluate_given(problem, (h100, b200), window_tokens=windows, gamma=[1.5, 1.0], n_instances=[4, 6])
    document = json.loads(json.dumps(plan_to_json(found)))
    check_all(document)
    fleet = fleet_launch(document, "plan.json")
    assert [flags_of(pool.args)["--max-num-seqs"] for pool in fleet.pools] == [
        str(int(n)) for n in np.asarray(found.metrics.pools.n_max)
    ]
    assert [pool.gpu for pool in fleet.pools] == ["h100", "b200"]
    assert [row.get("compress_up_to_tokens") for row in fleet.router["pools"]] == [3072, None]


def test_the_catalog_names_every_checkpoint_and_its_longest_sequence():
    for entry in LLMS.values():
        assert entry.source == f"config.json of {entry.repository}" and entry.max_position_tokens >= 40_960


@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_step_and_memory_are_what_the_laws_assumed(gpu):
    prefill = build(EngineSpec(gpu, "llama-3.1-8b", 1)).prefill
    one = {"gpu": gpu, "llm": "llama-3.1-8b", "tp": 1}
    for assume, tokens in (("physical", prefill.budget_tokens), ("published", prefill.chunk_tokens)):
        (pool,) = fleet_launch(plan(one, assume=assume), "plan.json").pools
        assert int(flags_of(pool.args)["--max-num-batched-tokens"]) == int(tokens)


def test_a_step_holds_a_token_of_every_sequence():
    (pool,) = fleet_launch(plan({"gpu": "a100", "max_num_seqs": 4096}), "plan.json").pools
    assert flags_of(pool.args)["--max-num-batched-tokens"] == "4096"
    assert any("2,048 tokens a step" in note for note in pool.notes)


@pytest.mark.parametrize(
    ("llm", "precision", "model", "quantization"),
    [
        ("llama-3.1-70b", "bf16", "meta-llama/Llama-3.1-70B", None),
        ("llama-3.1-70b", None, "meta-llama/Llama-3.1-70B", None),
        ("Llama-3.1-70B", "FP8", "meta-llama/Llama-3.1-70B", "fp8_per_tensor"),
        ("qwen3-30b-a3b", "fp8", "Qwen/Qwen3-30B-A3B", "fp8_per_tensor"),
        ("deepseek-v3", "fp8", "deepseek-ai/DeepSeek-V3", None),  # its own config says fp8
        ("gpt-oss-120b", "mxfp4", "openai/gpt-oss-120b", None),
        ("llama-3.1-70b", "int4", None, None),
        ("qwen3-30b-a3b", "mxfp4", None, None),
        ("deepseek-v3", "bf16", None, None),
        ("gpt-oss-120b", "fp8", None, None),
    ],
)
def test_only_16_bit_checkpoints_are_quantized_and_only_to_fp8(llm, precision, model, quantization):
    document = plan({"llm": llm, "precision": precision})
    (pool,) = fleet_launch(document, "plan.json").pools
    assert flags_of(pool.args).get("--quantization") == quantization
    if model:
        assert pool.args[0] == model and not pool.notes
    else:  # nothing vLLM could take for a repository, and how to name one
        assert "<" in pool.args[0] and f"--model {llm}:{precision}=" in pool.notes[0]
        (named,) = fleet_launch(document, "plan.json", models={f"{llm}:{precision}": "me/mine"}).pools
        assert named.args[0] == "me/mine" and not named.notes and "--quantization" not in flags_of(named.args)


def test_a_named_checkpoint_of_its_own_precision_is_still_quantized():
    (pool,) = fleet_launch(plan({"precision": "fp8"}), "p", models={"LLAMA-3.1-70b": "me/instruct"}).pools
    assert pool.args[0] == "me/instruct" and flags_of(pool.args)["--quantization"] == "fp8_per_tensor"
    (pool,) = fleet_launch(plan({"precision": "fp8"}), "p", models={"llama-3.1-70b:fp8": "me/instruct-FP8"}).pools
    assert pool.args[0] == "me/instruct-FP8" and "--quantization" not in flags_of(pool.args)


def test_the_kv_cache_is_held_in_8_bits_where_planned():
    pools = fleet_launch(plan({}, {"kv_precision": "fp8"}), "plan.json").pools
    assert [flags_of(pool.args).get("--kv-cache-dtype") for pool in pools] == [None, "fp8"]


def test_an_llm_from_a_file_needs_its_checkpoint_named(tmp_path):
    path = tmp_path / "my-model" / "config.json"
    path.parent.mkdir()
    shape = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, vocab_size=256, num_attention_heads=4)
    path.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **shape}))
    document = plan({"llm": str(path), "tp": 1})
    check_all(document)
    (pool,) = fleet_launch(document, "plan.json").pools
    assert pool.args[0].startswith("<") and f"--model {path}=NAME" in pool.notes[0]
    (pool,) = fleet_launch(document, "plan.json", models={str(path): "/models/mine"}).pools
    assert pool.args[0] == "/models/mine" and flags_of(pool.args)["--served-model-name"] == "my-model"


def test_no_pool_is_longer_than_the_model():
    document = plan({"llm": "qwen3-8b", "window_tokens": 60_000})
    fleet = fleet_launch(document, "plan.json")
    longest = LLMS["qwen3-8b"].max_position_tokens
    assert flags_of(fleet.pools[0].args)["--max-model-len"] == str(longest)
    assert "60,000" in fleet.pools[0].notes[0] and f"{longest:,}" in fleet.pools[0].notes[0]
    assert ROUTER["route"](fleet.router, longest - 1, 1)[1] == longest - 1
    with pytest.raises(ROUTER["TooLong"]):
        ROUTER["route"](fleet.router, longest, 1)
    (named,) = fleet_launch(document, "plan.json", models={"qwen3-8b": "me/qwen3-8b-yarn"}).pools
    assert flags_of(named.args)["--max-model-len"] == "60000"


def test_the_clock_is_a_command_to_run_as_root(tmp_path):
    (pool,) = fleet_launch(plan({"clock_frac": 0.62345}), "plan.json").pools
    command = next(note for note in pool.notes if note.startswith("nvidia-smi"))
    write_program(tmp_path / "nvidia-smi", 'if [ "$1" = -lgc ]; then echo "$2"; else printf "1980\\n1980\\n"; fi')
    ran = run_with(tmp_path, ["sh", "-c", command])
    assert ran.stdout.decode().strip() == f"0,{1980 * 623 // 1000}"
    assert fleet_launch(plan({"power_limit_w": 500.0}), "plan.json").pools[0].notes[-1] == "nvidia-smi -pl 500"
    assert not fleet_launch(plan(), "plan.json").pools[0].notes


@pytest.mark.parametrize(("gpu", "tp", "said"), [("h100", 8, False), ("h100", 16, True), ("gb200", 8, True)])
def test_more_gpus_than_a_host_has_are_said(gpu, tp, said):
    (pool,) = fleet_launch(plan({"gpu": gpu, "tp": tp}), "plan.json").pools
    assert any(note.startswith(f"{tp} GPUs") for note in pool.notes) == said


@pytest.mark.parametrize(
    ("how", "n_hosts", "size"),
    [
        ({"tp": 16}, 2, {"--tensor-parallel-size": "16"}),
        ({"tp": 8, "pp": 2}, 2, {"--tensor-parallel-size": "8", "--pipeline-parallel-size": "2"}),
        ({"tp": 8, "dp": 2, "ep": 16}, 2, {"--data-parallel-size": "2", "--enable-expert-parallel": None}),
        ({"dp": 16, "ep": 16, "tp": 1}, 2, {"--data-parallel-size": "16", "--enable-expert-parallel": None}),
        ({"tp": 12}, 2, {"--tensor-parallel-size": "12"}),
        ({"tp": 3, "pp": 3}, 3, {"--pipeline-parallel-size": "3"}),
    ],
)
def test_instances_on_several_hosts_are_groups(how, n_hosts, size):
    """DeepSeek-V3 on 16 H100, among others: each host says its rank and the leader's address, one of them answers."""
    document = plan({"llm": "deepseek-v3", "precision": None, "max_num_seqs": 1024, **how})
    fleet = fleet_launch(document, "plan.json")
    text = manifests_yaml(kubernetes_document(fleet))
    kinds, (pool,) = manifests_of(text), fleet.pools
    (group,) = kinds["LeaderWorkerSet"]
    assert [each["metadata"]["labels"]["app.kubernetes.io/name"] for each in kinds["Deployment"]] == ["envoy"]
    shape = group["spec"]["leaderWorkerTemplate"]
    n_gpus = str(pool.gpus_per_instance // n_hosts)
    assert (shape["size"], group["spec"]["replicas"]) == (n_hosts, 3) and int(n_gpus) <= 8
    leader, worker = (shape[f"{role}Template"] for role in ("leader", "worker"))
    (first,), (other,) = leader["spec"]["containers"], worker["spec"]["containers"]
    assert_allowed([arg.replace("$(LWS_WORKER_INDEX)", "1") for arg in first["args"]])
    assert "--headless is for all hosts but that of rank 0" in RELEASE["checks"]
    flags = flags_of(first["args"])
    assert size.items() <= flags.items() and flags["--nnodes"] == str(n_hosts)
    assert (flags["--node-rank"], flags["--master-addr"]) == ("$(LWS_WORKER_INDEX)", "$(LWS_LEADER_ADDRESS)")
    assert ("--data-parallel-address" in flags) == ("dp" in how)
    assert other["args"] == [*first["args"], "--headless"]
    assert all(each["resources"]["limits"] == {"nvidia.com/gpu": n_gpus} for each in (first, other))
    # Nobody asks a worker: the Service, the budget and the probes.
    (service, _), (budget, _) = kinds["Service"], kinds["PodDisruptionBudget"]
    assert service["spec"]["selector"].items() <= leader["metadata"]["labels"].items()
    assert not service["spec"]["selector"].items() <= worker["metadata"]["labels"].items()
    assert budget["spec"]["selector"]["matchLabels"] == {"leaderworkerset.sigs.k8s.io/name": pool.name}
    assert not {"ports", "startupProbe", "readinessProbe", "livenessProbe"} & set(other) and first["readinessProbe"]
    # The set's own Service would have the name of ours.
    assert service["metadata"]["name"] == group["metadata"]["name"]
    assert group["spec"]["networkConfig"] == {"subdomainPolicy": "UniquePerReplica"}
    sleep_s = int(other["lifecycle"]["preStop"]["exec"]["command"][1])
    assert worker["spec"]["terminationGracePeriodSeconds"] > sleep_s >= int(flags["--shutdown-timeout"])
    head = " ".join(text.split("\n---\n")[0].replace("\n# ", " ").split())
    assert "LeaderWorkerSet" in head and "RDMA" in head
    assert f"--node-rank from 0 to {n_hosts - 1}" in " ".join(vllm_script(vllm_document(fleet)).split())


def test_instances_of_one_host_are_no_groups():
    document = kubernetes_document(fleet_launch(plan({}, {"gpu": "h200", "tp": 4}), "plan.json"))
    assert not any(manifest["kind"] == "LeaderWorkerSet" for manifest in document["manifests"])
    assert not any("LeaderWorkerSet" in note for note in document["notes"])


def test_a_gpu_without_a_label_may_run_anywhere_and_that_is_said():
    document = kubernetes_document(fleet_launch(plan(), "plan.json"), gpu_products={})
    (deployment,) = engines_of(manifests_yaml(document))
    assert "nodeSelector" not in deployment["spec"]["template"]["spec"]
    assert any("h100" in note for note in document["notes"])
    (labelled,) = engines_of(manifests_yaml(kubernetes_document(fleet_launch(plan(), "plan.json"))))
    assert labelled["spec"]["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": GPU_PRODUCTS["h100"]}


def test_tensor_parallel_instances_share_memory():
    document = kubernetes_document(fleet_launch(plan({"tp": 1, "llm": "qwen3-8b"}, {"tp": 4}), "plan.json"))
    single, several = (
        {mount["mountPath"] for mount in deployment["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]}
        for deployment in engines_of(manifests_yaml(document))
    )
    assert several - single == {"/dev/shm"}


@pytest.mark.parametrize(
    ("weights", "kind"), [("claim", "persistentVolumeClaim"), ("host", "hostPath"), ("none", "emptyDir")]
)
def test_the_weights_are_kept_where_they_are_wanted(weights, kind):
    fleet = fleet_launch(plan({"precision": "fp8"}, {"precision": "bf16"}), "plan.json")
    kinds = manifests_of(manifests_yaml(kubernetes_document(fleet, weights=weights)))
    for deployment in kinds["Deployment"][:-1]:
        volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
        assert kind in volumes["weights"]
    claims = kinds.get("PersistentVolumeClaim", [])
    assert len(claims) == (weights == "claim")
    for claim in claims:  # one checkpoint of 70.6e9 parameters in 16 bits, which both pools read
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        gib = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))
        assert 70.6e9 * 2 / 2**30 < gib < 2 * 70.6e9 * 2 / 2**30


def test_how_sure_a_plan_is_heads_everything_that_is_written():
    for document, said, known in [
        (plan(), "This plan is unverified", "unverified"),
        (plan(verified={"held": True}), "Verified: a simulation", "verified"),
    ]:
        fleet = fleet_launch(document, "plan.json")
        written = [
            vllm_script(vllm_document(fleet)),
            manifests_yaml(kubernetes_document(fleet)),
            router_yaml(router_export(fleet)),
        ]
        assert all(said in text[:500] for text in written)
        assert fleet.router["plan"] == known
        assert ("--verify" in written[0]) == (known == "unverified")
        assert all("# Serves meta-llama/Llama-3.1-70B.\n" in text.split("\n---\n")[0] for text in written)


def test_what_was_written_is_said(tmp_path, capsys):
    path, script, router = (tmp_path / name for name in ("plan.json", "fleet.sh", "router.json"))
    for verified in ({}, {"verified": {"held": True}}):
        path.write_text(json.dumps(plan(**verified)))
        assert main(["export", str(path), "--to", "vllm", "--out", str(script), "--router", str(router)]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"Wrote {script} and {router}") and ("unverified" in said) == (not verified)


def test_an_instance_is_given_the_time_of_its_longest_answer():
    """Window times inter-token latency, between a minute and ten."""
    pools = [{"itl_s": 0.05, "window_tokens": window} for window in (100, 4000, 100_000)] + [{"window_tokens": 200_000}]
    fleet = fleet_launch(plan(*pools), "plan.json")
    assert [flags_of(pool.args)["--shutdown-timeout"] for pool in fleet.pools] == ["60", "200", "600", "600"]


def test_the_router_has_room_for_the_traffic():
    """CPUs grow with tokens and requests a second, memory with the requests in flight."""

    def resources_of(rate_per_s: float, n_active: float) -> tuple[int, int]:
        document = plan({"n_active": n_active, "n_instances": 1000, "max_num_seqs": 1024})
        document["workload"] |= {"arrival_rate_per_s": rate_per_s, "mean_output_tokens": 200.0}
        manifests = manifests_of(manifests_yaml(kubernetes_document(fleet_launch(document, "plan.json"))))
        (container,) = manifests["Deployment"][-1]["spec"]["template"]["spec"]["containers"]
        assert (
            container["args"][container["args"].index("--concurrency") + 1] == container["resources"]["requests"]["cpu"]
        )
        return int(container["resources"]["requests"]["cpu"]), int(container["resources"]["requests"]["memory"][:-2])

    assert resources_of(1.0, 0.1) == (2, 2)
    assert resources_of(1000.0, 100.0) == (9, 8)  # 200,000 / 27,000 + 1,000 / 1,250; 1 GiB and 100,000 of 64 KiB


@pytest.mark.parametrize("text", HOSTILE)
def test_names_cannot_break_out(text, tmp_path):
    """Of the fleet, the workload and the checkpoint, as shells and Kubernetes read them."""
    document = plan({"precision": "int4"}, {}, workload={"name": text, "arrival_rate_per_s": 1.0})
    model = f"org/{text}" if text.isprintable() else "org/model"
    options = {"name": text, "models": {"llama-3.1-70b": model, "llama-3.1-70b:int4": model}}
    check_all(document, **options)
    fleet = fleet_launch(document, "plan.json", **options)
    write_program(tmp_path / "vllm", 'printf "%s\\0" "$@"')
    script = tmp_path / "fleet.sh"
    script.write_text(vllm_script(vllm_document(fleet)), encoding="utf-8")
    for pool in fleet.pools:
        ran = run_with(tmp_path, ["sh", script, pool.name, "--port=8001"])
        assert ran.stdout.decode().split("\0")[:-1] == ["serve", *pool.args, "--port=8001"]
        assert ran.stderr.decode().startswith("VLLM_API_KEY is not set")
    unknown = subprocess.run(["sh", script, "nobody"], capture_output=True, text=True)
    assert unknown.returncode == 2 and unknown.stderr.startswith("no such pool: nobody; there are: ")
    assert all(pool.name in unknown.stderr for pool in fleet.pools)


def test_a_plan_with_a_prefix_cache_keeps_one_and_says_what_it_assumes():
    """vLLM's own default is that of the model; the share stands at the head of everything that is written."""
    law = RELEASE["flags"]["--enable-prefix-caching"]
    assert law["field"] == RELEASE["flags"]["--no-enable-prefix-caching"]["field"] and law["default"]
    shares = plan({"prefix_hit_frac": 0.2}, {"prefix_hit_frac": 0.414}, prefix_cache={"name": "working_set"})
    for document, said in [
        (plan({}, {}, prefix_cache={"name": "constant", "hit_frac": 0.37}), "Assumes that 37 % of the prompt tokens"),
        (shares, "Assumes that 20 % and 41 % of the prompt tokens"),
        (plan({}, {}), None),
    ]:
        check_all(document)
        fleet = fleet_launch(document, "plan.json")
        for pool in fleet.pools:
            assert ("--enable-prefix-caching" in pool.args) == bool(said)
            assert ("--no-enable-prefix-caching" in pool.args) != bool(said)
            assert not any(arg.startswith("--block-size") for arg in pool.args)  # MLA and hybrids have their own
        written = (
            vllm_script(vllm_document(fleet)),
            manifests_yaml(kubernetes_document(fleet)),
            router_yaml(router_export(fleet)),
        )
        for text in written:
            head = " ".join(text.split("\n---\n")[0].replace("\n# ", " ").split())
            assert said in head if said else "Assumes that" not in head
        assert ("vllm:prefix_cache_hits" in written[0]) == bool(said)


def test_a_plan_that_follows_prefixes_is_routed_by_them():
    """Maglev over the hash that the filter sets, its table of a hundred places an instance; otherwise nothing of it."""
    sizes = {3: 65_537, 655: 65_537, 656: 655_373, 6554: 5_000_011, 10**6: 5_000_011}
    for n, size in sizes.items():
        assert all(size % factor for factor in range(2, math.isqrt(size) + 1))
        dispatch = "bounded_hash" if n == 655 else "affinity"
        fleet = fleet_launch(plan({"n_instances": n}, dispatch=dispatch), "plan.json")
        config = router_export(fleet)["config"]["static_resources"]
        (policy,) = config["clusters"][0]["load_balancing_policy"]["policies"]
        extension = policy["typed_extension_config"]
        assert extension["name"] == "envoy.load_balancing_policies.maglev"
        assert extension["typed_config"]["table_size"] == size
        balance = {"hash_balance_factor": 125 if n == 655 else 150}
        assert extension["typed_config"]["consistent_hashing_lb_config"] == balance
        assert '"header_name": "x-fleetopt-prefix"' in json.dumps(config["listeners"])
        assert "local BY_PREFIX = true" in json.dumps(config["listeners"])
        assert fleet.router["dispatch_within_pool"] == dispatch
        assert any(f"{balance['hash_balance_factor'] / 100:g} times the mean" in note for note in fleet.notes)
        assert any("prefix-cache-scorer" in note and "prefixaware" in note for note in fleet.notes)
        text = manifests_yaml(kubernetes_document(fleet))
        assert "MAGLEV" in text and "LEAST_REQUEST" not in text
    usual = json.dumps(router_export(fleet_launch(plan(), "plan.json"))["config"])
    assert "hash_policy" not in usual and "maglev" not in usual and "local BY_PREFIX = false" in usual


def test_what_fails_is_exported_anyway_and_marked():
    for document in (plan(broken=[LOADED]), plan(status="infeasible"), plan(verified={"held": False})):
        fleet = fleet_launch(document, "plan.json", anyway=True)
        assert fleet.fails and not fleet.verified and "FAILS" in fleet.header[1]
        assert "unverified" in " ".join(fleet.header)
        assert "FAILS" in vllm_script(vllm_document(fleet))
    held = fleet_launch(plan(verified={"held": True}), "plan.json", anyway=True)
    assert not held.fails and held.verified and "FAILS" not in " ".join(held.header)


@pytest.mark.parametrize(
    ("document", "options", "said"),
    [
        (plan() | {"pools": []}, {}, "no pools"),
        (plan(status="infeasible"), {}, "infeasible"),
        (plan({"utilization": 1.2}), {}, "pools.0.utilization: 1.2: the pool is overloaded"),
        (plan({"utilization": 0.8}, {"utilization": None}), {}, "pools.1.utilization: null: the pool is overloaded"),
        (
            plan({"n_instances": 7}, broken=[LOADED]),
            {},
            "asked for 1.43 times what its 7 instances can serve",
        ),
        (
            plan(broken=[LOADED], repair={"instances_added": [12]}),
            {},
            "; add 12 instances to pool 1 (fleetopt",
        ),
        (plan(broken=[LOADED]), {}, "--repair --out grown.json adds what it lacks; --anyway exports it as it is"),
        (plan(broken=[LATE], repair={"instances_added": None, "unmended": [LATE]}), {}, "no number of instances holds"),
        (plan(broken=[LOADED | {"pool": 2}]), {"anyway": True}, "plan.json, broken"),
        (plan(broken=[LOADED | {"limit": "luck"}]), {"anyway": True}, "broken.0.limit"),
        (plan(broken=[LATE | {"asked": 0.0}]), {"anyway": True}, "plan.json, broken"),
        (
            plan({"n_instances": 3, "n_gpus": 32}),
            {},
            "pools.0.n_instances: 24 GPUs, evaluated with 32",
        ),
        (plan(verified={"held": False}), {}, "verified.held"),
        (plan(verified={}), {}, "verified.held"),
        ([], {}, "plan.json"),
        (plan(schema="other/1"), {}, "schema"),
        (plan({"n_instances": 0}), {}, "pools.0.n_instances"),
        (plan({"max_num_seqs": 0}), {}, "pools.0.max_num_seqs"),
        (plan({"window_tokens": 4096.5}), {}, "pools.0.window_tokens"),
        (plan({}, {"window_tokens": 4096}), {}, "rising"),
        (plan({"gamma": math.inf}), {}, "pools.0.gamma"),
        (plan({"gpu": "h10"}), {}, "plan.json, pools.0.gpu"),
        (plan({"llm": "llama-3.1-7b"}), {}, "plan.json, pools.0.llm"),
        (plan({"precision": "fp6"}), {}, "plan.json, pools.0.precision"),
        (plan({"kv_precision": "fp4"}), {}, "plan.json, pools.0.kv_precision"),
        (plan(dispatch="psychic"), {}, "dispatch"),
        (plan(prefix_cache={"name": "perfect"}), {}, "prefix_cache.name"),
        (plan(prefix_cache={"name": "constant", "hit_frac": 1.0}), {}, "prefix_cache.hit_frac"),
        (plan({"prefix_hit_frac": 1.5}), {}, "pools.0.prefix_hit_frac"),
        (plan(assume="optimistic"), {}, "plan.json, assume"),
        (plan(staged({"tp": 2}, {"tp": 3})), {}, "pools.0.tp: TP 2 and 3: vLLM 0.33.0 hands no KV cache over where"),
        (plan(staged({"tp": 16})), {}, "pools.0.tp: 16 GPUs prefill, 8 decode, of 8 KV heads"),
        (plan(staged(decode={"pp": 2, "tp": 4})), {}, "pools.0, decode.pp: 2: vLLM 0.33.0 hands no KV cache over"),
        (
            plan(staged({"speculate": HEAD})),
            {},
            "eagle3 drafts of me/head in prefill, no drafts in decode: vLLM 0.33.0",
        ),
        (
            plan(staged({"speculate": HEAD}, {"speculate": HEAD | {"model": "b"}})),
            {},
            "need the same draft head in both",
        ),
        (
            plan(staged({"speculate": NGRAM}, {"speculate": HEAD})),
            {},
            "pools.0.speculate: ngram drafts in prefill, eagle3",
        ),
        (plan(staged({"precision": "int4"})), {}, "need one checkpoint for both stages"),
        (plan(staged({"role": "decode"})), {}, "pools.0.stages = [..., ...]: input should be a prefill stage, then"),
        (plan({"stages": []}), {}, "pools.0.stages"),
        (plan(staged({"utilization": 1.1})), {}, "pools.0.stages.0.utilization: 1.1: the prefill stage is overloaded"),
        (plan(staged(decode={"n_gpus": 99})), {}, "pools.0.stages.1.n_instances: 16 GPUs, evaluated with 99"),
        (plan(staged({"gpu": "h10"})), {}, "plan.json, pools.0.stages.0.gpu"),
        (plan(staged(), dispatch="affinity"), {}, "follows prefixes between two stages"),
        (plan(staged(), broken=[LOADED]), {}, "fleetopt optimize finds another; --anyway exports it as it is"),
        (plan(), {"models": {"qwen3-8b": "x"}}, "--model"),
        (plan(), {"models": {"llama-3.1-70b": "--help"}}, "--model"),
        (plan(), {"models": {"llama-3.1-70b": "a\nb"}}, "--model"),
        (plan(), {"models": {"llama-3.1-70b": ""}}, "--model"),
    ],
)
def test_what_cannot_be_started_is_refused_in_one_line(document, options, said):
    with pytest.raises(BadInput) as refused:
        fleet_launch(document, "plan.json", **options)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@st.composite
def plans(draw) -> dict:
    windows = sorted(draw(st.sets(st.integers(1, 10**9), min_size=1, max_size=4)))
    pools = [
        {
            "window_tokens": window,
            "gpu": draw(st.sampled_from(sorted(GPUS))),
            "llm": draw(st.sampled_from(sorted(LLMS))),
            "tp": draw(st.integers(1, 64)),
            "precision": draw(st.sampled_from([None, "bf16", "fp8", "int4", "mxfp4"])),
            "kv_precision": draw(st.sampled_from(["bf16", "fp8"])),
            "n_instances": draw(st.integers(1, 10**9)),
            "max_num_seqs": draw(st.integers(1, 10**6)),
            "gamma": draw(st.floats(1, 5)),
            "clock_frac": draw(st.floats(0.4, 1)),
        }
        for window in windows
    ]
    return plan(
        *pools,
        assume=draw(st.sampled_from(["physical", "published", "physical,compression=free"])),
        dispatch=draw(st.sampled_from(["jsq", "round_robin", "random", "affinity", "bounded_hash"])),
        prefix_cache=draw(st.sampled_from([None, {"name": "constant", "hit_frac": 0.5}, {"name": "working_set"}])),
        workload={"name": draw(st.text(max_size=20)), "arrival_rate_per_s": draw(st.floats(1e-6, 1e9))},
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(document=plans(), name=st.text(max_size=40))
def test_every_plan_comes_out_exact_and_valid(document, name):
    check_all(document, name=name)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80), length=st.integers(7, 40))
def test_any_text_becomes_a_label(text, length):
    label = dns_label(text, length)
    assert len(label) <= length and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", label)


# pools of two stages


def hand_over_of(args) -> dict:
    """What an instance says of its hand-over, each field one of the release."""
    config = json.loads(flags_of(args)["--kv-transfer-config"])
    assert set(config) <= set(RELEASE["kv_transfer_config"]) and config["kv_role"] in RELEASE["kv_roles"]
    assert "NixlConnector is a connector's name" in RELEASE["checks"] and config["kv_connector"] == "NixlConnector"
    assert repr(config["kv_load_failure_policy"]) in RELEASE["kv_transfer_config"]["kv_load_failure_policy"]["type"]
    return config


def assert_router_takes(args) -> dict[str, str | None]:
    """Every flag is one of vLLM's router, of its type and among its choices."""
    flags = flags_of(["", *args])
    for flag, value in flags.items():
        law = RELEASE["router"]["flags"][flag]
        if law.get("action") == "store_true":
            assert value is None
        else:
            assert value and value in law.get("choices", [value]) and {"int": int, "str": str}[law["type"]](value)
    return flags


def test_each_stage_has_instances_and_flags_of_its_own():
    """Its GPU, TP, sequences and tokens; what it hands over by; a whole pool beside it stays what it is alone."""
    stages = staged({"gpu": "b200", "tp": 4, "memory_utilization": 0.85}, {"max_num_batched_tokens_asked": 1024})
    document = plan({}, stages)
    fleet = fleet_launch(document, "plan.json")
    whole, prefill, decode = fleet.pools
    assert whole == fleet_launch(plan(), "plan.json").pools[0] and whole.role is None
    for pool, asked in zip((prefill, decode), stages["stages"]):
        assert_allowed(pool.args)
        flags = flags_of(pool.args)
        assert pool.name == f"fleetopt-pool-8192-{asked['role']}" and pool.gpu == asked["gpu"]
        assert (pool.n_instances, pool.n_active) == (asked["n_instances"], asked["n_active"])
        assert int(flags["--tensor-parallel-size"]) == pool.gpus_per_instance == asked["tp"]
        assert int(flags["--max-num-seqs"]) == asked["max_num_seqs"] and flags["--max-model-len"] == "8192"
    assert flags_of(prefill.args)["--gpu-memory-utilization"] == "0.85"
    assert flags_of(decode.args)["--max-num-batched-tokens"] == "1024"
    assert hand_over_of(prefill.args)["kv_role"] == "kv_producer" and prefill.drain_s == 60
    assert hand_over_of(decode.args)["kv_role"] == "kv_consumer" and decode.drain_s == math.ceil(8192 * 0.05)
    assert [pool["url"] for pool in fleet.router["pools"]] == [f"http://fleetopt-pool-{w}:8000" for w in (4096, 8192)]
    assert fleet.title.endswith("10 instances on 60 GPUs, vLLM 0.33.0")
    (router,) = fleet.stage_routers
    assert (router.name, router.prefill, router.decode) == ("fleetopt-pool-8192", prefill.name, decode.name)
    assert any("--attention-backend" in note for note in fleet.notes)
    assert not any("--attention-backend" in note for note in fleet_launch(plan(staged()), "plan.json").notes)
    assert RELEASE["router"]["release"] == STAGE_ROUTER_RELEASE
    longest = fleet_launch(plan(stages | {"window_tokens": 10**9}), "plan.json", name="x" * 99)
    assert max(len(pool.name) for pool in longest.pools) <= 63  # of a label


@pytest.mark.parametrize(
    ("dispatch", "policy", "said"),
    [
        ("jsq", "round_robin", "not by the shortest queue"),
        ("round_robin", "round_robin", "in turn, as planned"),
        ("random", "random", "at random, as planned"),
    ],
)
def test_stages_are_asked_as_near_to_the_plan_as_their_router_can(dispatch, policy, said):
    fleet = fleet_launch(plan(staged(), dispatch=dispatch), "plan.json")
    flags = assert_router_takes(fleet.stage_routers[0].args)
    assert flags["--prefill-policy"] == flags["--decode-policy"] == policy
    assert any(said in note for note in fleet.stage_router_notes)


def test_a_draft_head_is_in_both_stages_and_n_grams_where_they_are_planned():
    prefill, decode = fleet_launch(plan(staged(decode={"speculate": HEAD})), "plan.json").pools
    heads = [json.loads(flags_of(pool.args)["--speculative-config"]) for pool in (prefill, decode)]
    assert [head.pop("num_speculative_tokens") for head in heads] == [1, 3] and heads[0] == heads[1]
    assert "stages compare draft heads, whatever the number of drafts" in RELEASE["checks"]
    assert any("counts neither" in note for note in prefill.notes) and not any("counts on" in n for n in prefill.notes)
    both = fleet_launch(plan(staged({"speculate": HEAD}, {"speculate": HEAD})), "plan.json").pools
    assert not any("counts neither" in note for note in both[0].notes)
    pools = fleet_launch(plan(staged(decode={"speculate": NGRAM})), "plan.json").pools
    assert ["--speculative-config" in flags_of(pool.args) for pool in pools] == [False, True]


def test_manifests_of_two_stages_are_found_by_their_router_and_it_by_envoy():
    fleet = fleet_launch(plan({}, staged(), verified={"held": True}), "plan.json")
    document = kubernetes_document(fleet)
    text = manifests_yaml(document)
    assert load_all(text) == document["manifests"]
    kinds = manifests_of(text)
    assert_complete(fleet, kinds, kinds["Deployment"][:-1])
    whole, *stages, router, envoy = kinds["Deployment"]
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in kinds["Deployment"]]
    assert [each.get("llm-d.ai/role") for each in labels] == [None, "prefill", "decode", None, None]
    for stage in stages:
        (container,) = stage["spec"]["template"]["spec"]["containers"]
        env = {each["name"]: each for each in container["env"]}
        assert env["VLLM_NIXL_SIDE_CHANNEL_HOST"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
        port = int(env["VLLM_NIXL_SIDE_CHANNEL_PORT"]["value"])
        assert port in [each["containerPort"] for each in container["ports"]]
        hand_over_of([as_kubelet(arg) for arg in container["args"]])
    pod = router["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = assert_router_takes(container["args"])
    assert container["image"] == f"vllm/vllm-router:v{RELEASE['router']['release']}"
    for role, stage in zip(("prefill", "decode"), stages):
        key, value = flags[f"--{role}-selector"].split("=", 1)
        assert [each.get(key) for each in labels].count(value) == 1 and stage["metadata"]["name"] == value
    assert flags["--service-discovery-namespace"] == "$(NAMESPACE)" and flags["--service-discovery-port"] == "8000"
    env = {each["name"]: each["valueFrom"] for each in container["env"]}
    assert env["NAMESPACE"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}
    (account,), (role,), (binding,) = (kinds[kind] for kind in ("ServiceAccount", "Role", "RoleBinding"))
    assert pod["automountServiceAccountToken"] and pod["serviceAccountName"] == account["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["metadata"]["name"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    service = next(each for each in kinds["Service"] if each["metadata"]["name"] == "fleetopt-pool-8192")
    assert service["spec"]["selector"] == router["spec"]["selector"]["matchLabels"]
    key = {each["name"]: each for each in whole["spec"]["template"]["spec"]["containers"][0]["env"]}["VLLM_API_KEY"]
    assert env["OPENAI_API_KEY"] == key["valueFrom"]
    assert envoy["spec"]["template"]["spec"]["containers"][0]["env"] == [key]
    head = " ".join(text.split("\n---\n")[0].replace("\n# ", " ").split())
    for said in ("RDMA", "UCX", "1.2 ms for a mean prompt", "infiniband: 50 GB/s", "IPC_LOCK", "InferencePool"):
        assert said in head
    alone = manifests_yaml(kubernetes_document(fleet_launch(plan(), "plan.json")))
    assert not any(word in alone for word in ("RDMA", "vllm-router:", "llm-d.ai", "ServiceAccount\n", "OPENAI_API_KEY"))


def test_envoy_asks_the_router_of_two_stages_and_looks_at_keys():
    document = router_export(fleet_launch(plan({}, staged()), "plan.json"))
    clusters = document["config"]["static_resources"]["clusters"]
    assert [each["name"] for each in clusters] == ["fleetopt-pool-4096", "fleetopt-pool-8192", "admin"]
    (endpoint,) = clusters[1]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert endpoint["endpoint"]["address"]["socket_address"] == {"address": "fleetopt-pool-8192", "port_value": 8000}
    text = router_yaml(document)
    assert text.index("VLLM_API_KEY") < text.index("x-fleetopt-pool") and "addresses of its vllm-router" in text
    assert "VLLM_API_KEY" not in router_yaml(router_export(fleet_launch(plan(), "plan.json")))


def test_the_script_starts_stages_and_their_router(tmp_path):
    fleet = fleet_launch(plan({}, staged()), "plan.json")
    document = vllm_document(fleet)
    assert json.loads(json.dumps(document)) == document and "role" not in document["pools"][0]
    script = tmp_path / "fleet.sh"
    script.write_text(vllm_script(document))
    said = 'printf "%s\\0" "$@" "$VLLM_NIXL_SIDE_CHANNEL_HOST $VLLM_NIXL_SIDE_CHANNEL_PORT"'
    write_program(tmp_path / "vllm", said)
    write_program(tmp_path / "vllm-router", 'printf "%s\\0" "$@" "$OPENAI_API_KEY"')
    for pool in fleet.pools[1:]:
        met = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.7"}
        ran = subprocess.run(["sh", script, pool.name], env=met | {"PATH": f"{tmp_path}:/bin"}, capture_output=True)
        assert ran.stdout.decode().split("\0")[:-1] == ["serve", *pool.args, "10.0.0.7 5600"]
        refused = subprocess.run(["sh", script, pool.name], env={"PATH": f"{tmp_path}:/bin"}, capture_output=True)
        assert refused.returncode and b"VLLM_NIXL_SIDE_CHANNEL_HOST: need the address" in refused.stderr
    (router,) = fleet.stage_routers
    asked = ["--prefill", "http://a:8000", "--decode", "http://b:8000"]
    env = {"PATH": f"{tmp_path}:/bin", "VLLM_API_KEY": "k"}
    ran = subprocess.run(["sh", script, router.name, *asked], env=env, capture_output=True)
    assert ran.stdout.decode().split("\0")[:-1] == [*router.args, *asked, "k"]
    assert {"--prefill", "--decode"} < set(RELEASE["router"]["flags"])


# graphs of NVIDIA Dynamo

DYNAMO = json.loads((ROOT / "tests" / "dynamo_fields.json").read_text())


def assert_fields(record: dict, laws: dict) -> None:
    """Every field is documented, of its type, in its bounds and among its choices."""
    for field, value in record.items():
        law = laws[field]
        types = {"string": str, "integer": int, "list": list, "boolean": bool}
        assert isinstance(value, types.get(law["type"], dict)), field
        if isinstance(value, str):
            assert value in law.get("choices", [value]) and re.fullmatch(law.get("pattern", ".*"), value)
        assert (value if isinstance(value, int) else len(value)) <= law.get("most", math.inf)
        assert not isinstance(value, int) or value >= law.get("least", value)
    assert {field for field, law in laws.items() if law.get("required")} <= set(record)


def graphs_of(text: str) -> tuple[list[dict], dict[str, list[dict]]]:
    """The graphs, each as it is documented, and what else there is, by kind; every pod is one of Kubernetes."""
    graphs, others = [], {}
    for manifest in load_all(text):
        if manifest["kind"] != DYNAMO["kind"]:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
            others.setdefault(manifest["kind"], []).append(manifest)
            continue
        assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
        assert manifest["apiVersion"] == DYNAMO["apiVersion"]
        assert_fields(manifest["spec"], DYNAMO["spec"])
        components = manifest["spec"]["components"]
        names = [each["name"].lower() for each in components]
        assert len(set(names)) == len(names)
        for component in components:
            assert_fields(component, DYNAMO["component"])
            pod = {"selector": {"matchLabels": {}}, "template": component["podTemplate"]}
            whole = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": manifest["metadata"], "spec": pod}
            kubernetes_validate.validate(whole, KUBERNETES, strict=True)
        graphs.append(manifest)
    return graphs, others


def main_of(component: dict) -> dict:
    (container,) = component["podTemplate"]["spec"]["containers"]
    assert container["name"] == DYNAMO["main_container"] and container["image"].endswith(f":{DYNAMO['release']}")
    return container


def test_a_graph_of_dynamo_has_the_documented_fields_and_the_plans_numbers():
    stages = staged({"gpu": "b200", "tp": 4}, {"max_num_batched_tokens_asked": 1024})
    fleet = fleet_launch(plan({}, stages), "plan.json")
    document = dynamo_document(fleet)
    text = manifests_yaml(document)
    assert load_all(text) == document["manifests"] and json.loads(json.dumps(document)) == document
    graphs, others = graphs_of(text)
    assert [each["metadata"]["name"] for each in graphs] == ["fleetopt-pool-4096", "fleetopt-pool-8192"]
    kinds = [[each["type"] for each in graph["spec"]["components"]] for graph in graphs]
    assert kinds == [["frontend", "worker"], ["frontend", "prefill", "decode"]]
    engines = [each for graph in graphs for each in graph["spec"]["components"][1:]]
    for pool, component in zip(fleet.pools, engines, strict=True):
        container = main_of(component)
        assert component["replicas"] == pool.n_instances and container["command"] == DYNAMO["command"]
        args = [as_kubelet(arg) for arg in container["args"]]
        own, flags = flags_of(pool.args), flags_of(["", *args])
        assert flags.pop("--model") == pool.args[0]
        assert flags.pop("--disaggregation-mode", None) == pool.role
        transfer = flags.pop("--kv-transfer-config", None)
        assert (transfer and json.loads(transfer)) == (DYNAMO["kv_transfer_config"] if pool.role else None)
        assert not [flag for flag in flags if RELEASE["flags"][flag]["field"].startswith("FrontendArgs")]
        otherwise = {"--port", "--shutdown-timeout", "--kv-transfer-config"}
        assert flags == {flag: own[flag] for flag in own if flag not in otherwise}
        limit = container["resources"]["limits"]["nvidia.com/gpu"]
        assert limit == str(pool.gpus_per_instance) == flags["--tensor-parallel-size"]
        assert container["volumeMounts"] == [{"name": "weights", "mountPath": DYNAMO["weights"]}]
        pod = component["podTemplate"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > pool.drain_s
        assert pod["nodeSelector"] == {"nvidia.com/gpu.product": GPU_PRODUCTS[pool.gpu]}
    assert set(others) == {"ConfigMap", "PersistentVolumeClaim", "Deployment", "Service", "PodDisruptionBudget"}
    (envoy,) = others["Deployment"]
    assert envoy["metadata"]["name"] == "fleetopt-router"
    assert [each["name"] for each in envoy["spec"]["template"]["spec"]["containers"][0]["env"]] == ["VLLM_API_KEY"]


def test_envoy_asks_the_frontend_of_each_graph_and_looks_at_keys():
    document = dynamo_document(fleet_launch(plan({}, {}), "plan.json"))
    config = yaml.load(document["manifests"][0]["data"]["envoy.yaml"], yaml.CSafeLoader)
    asked = [
        each["endpoint"]["address"]["socket_address"]
        for cluster in config["static_resources"]["clusters"][:-1]
        for each in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    ]
    names = [DYNAMO["frontend_service"].replace("NAME", f"fleetopt-pool-{window}") for window in (4096, 8192)]
    assert [f"{each['address']}:{each['port_value']}" for each in asked] == names
    assert [pool["url"] for pool in document["router"]["pools"]] == [f"http://{name}" for name in names]
    assert "VLLM_API_KEY" in document["manifests"][0]["data"]["envoy.yaml"]


@pytest.mark.parametrize(("dispatch", "mode"), [("jsq", "least-loaded"), ("random", "random")])
def test_frontends_choose_as_planned(dispatch, mode):
    graphs, _ = graphs_of(manifests_yaml(dynamo_document(fleet_launch(plan(dispatch=dispatch), "plan.json"))))
    env = {each["name"]: each.get("value") for each in main_of(graphs[0]["spec"]["components"][0])["env"]}
    assert env["DYN_ROUTER_MODE"] == mode and mode in DYNAMO["router_modes"]


def test_what_is_not_written_for_dynamo_is_said_or_refused():
    text = manifests_yaml(dynamo_document(fleet_launch(plan(staged()), "plan.json"), weights="none"))
    head = " ".join(text.split("\n---\n")[0].replace("\n# ", " ").split())
    for said in (f"vLLM {DYNAMO['vllm']}", "--dry-run=server", "NetworkPolicy", "RDMA", "planner", "1.2 ms for a mean"):
        assert said in head, said
    assert "vllm-router" not in text and "EDIT storageClassName" not in text
    refused = {
        "affinity: Dynamo's router of prefixes": (plan(dispatch="affinity"), {}),
        "need claim or none": (plan(), {"weights": "host"}),
        "components of several hosts": (plan({"tp": 8, "pp": 2}), {}),
    }
    for words, (asked, how) in refused.items():
        with pytest.raises(BadInput, match=words) as refusal:
            dynamo_document(fleet_launch(asked, "plan.json"), **how)
        assert "\n" not in str(refusal.value)


# the router


@cache
def fleet_of(windows: tuple[int, ...], gammas: tuple[float, ...]):
    engine = build(EngineSpec("h100"))
    ones = [1] * len(windows)
    return make_fleet([engine] * len(windows), window_tokens=list(windows), gamma=list(gammas), n_instances=ones)


FLEETS = [
    ((100,), (1.0,), "physical"),
    ((100, 400), (1.0, 1.0), "physical"),
    ((100, 400), (1.5, 1.0), "physical"),
    ((101, 150, 1000), (1.7, 1.001, 1.0), "physical"),  # the first edge is beyond the second
    ((100, 400), (5.0, 1.2), "physical"),  # no prompt shrinks by more than 2
    ((100, 150, 401), (2.0, 2.0, 2.0), "physical"),
    ((100, 400), (1.999, 1.0), "physical,compression=free"),
    ((64, 80, 400), (1.5, 1.5, 1.1), "published"),
]


N_REQUESTS = 600


def interesting_requests(windows, gammas, compression) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output of requests whose length is at, and one off, every window and edge, and of others at random.

    Where whole requests shrink (as published), no router can follow an output longer than the window: none here.
    """
    edges = [math.floor(w * g) for w, g in zip(windows, gammas)] + [2 * w for w in windows]
    near = [length + off for length in [*windows, *edges] for off in (-1, 0, 1)]
    pairs = []
    for total in near:
        outputs = [1, total // 4]
        if compression == PHYSICAL.compression:  # about where a prompt can just give way, and can not
            outputs += [(total - 3) // 2, (total - 2) // 2, (total - 1) // 2, total // 2, total - 1]
        pairs += [(total, output) for output in outputs]
    rng = np.random.default_rng(0)
    total = rng.integers(2, 2 * windows[-1] + 3, N_REQUESTS - len(pairs))
    most = 1.0 if compression == PHYSICAL.compression else 0.25
    output = np.maximum(1, (rng.random(total.shape) * most * (total - 1)).astype(int))
    total, output = (np.append(column, more) for column, more in zip(zip(*pairs), (total, output)))
    return total - output, output


@pytest.mark.parametrize(("windows", "gammas", "assume"), FLEETS)
def test_the_router_sends_every_request_where_the_law_does(windows, gammas, assume):
    fleet = fleet_of(windows, gammas)
    document = plan(*({"window_tokens": w, "gamma": g} for w, g in zip(windows, gammas)), assume=assume)
    router = json.loads(json.dumps(fleet_launch(document, "plan.json").router))
    assumptions = parse_assumptions(assume)
    prompt, output = interesting_requests(windows, gammas, assumptions.compression)
    urls = [pool["url"] for pool in router["pools"]]

    def sent(p: int, o: int, **asked) -> tuple[int, int]:
        try:
            url, tokens = ROUTER["route"](router, int(p), int(o), **asked)
        except ROUTER["TooLong"]:
            return REJECTED, p
        return urls.index(url), tokens

    found = [sent(p, o) for p, o in zip(prompt, output)]
    pool, tokens = (np.array(column) for column in zip(*found))
    requests = Requests(arrival_s=np.zeros(prompt.shape), prompt_tokens=prompt, output_tokens=output)
    workload = make_workload(prompt, output, arrival_rate_per_s=1.0)
    law = route_requests(requests, fleet, workload, assumptions)
    np.testing.assert_array_equal(pool, law.pool)
    np.testing.assert_array_equal(tokens < prompt, law.tried_pool != REJECTED)
    served = pool != REJECTED
    held = np.array(windows)[pool[served]]
    assert ((tokens + output)[served] <= held).all() and tokens.min() >= 1

    # Weights that no two sums share tell the pools of the law's integral apart.
    weight = np.random.default_rng(0).uniform(0.5, 1.5, prompt.shape)
    workload = make_workload(prompt, output, weight, arrival_rate_per_s=1.0)
    order = np.lexsort((output, prompt + output))
    shares = np.asarray(routing_law(fleet, workload, of_the_trace(assumptions)).traffic_frac)
    expected = [np.sum(np.asarray(workload.weight)[pool[order] == k]) for k in range(len(windows))]
    np.testing.assert_allclose(shares, expected, atol=1e-12)

    # Where compression fails, the law sends it to the first pool whose window holds it.
    holds = np.searchsorted(windows, prompt + output)
    failed = np.array([sent(p, o, compressed_ok=False)[0] for p, o in zip(prompt, output)])
    np.testing.assert_array_equal(failed, np.where(holds < len(windows), holds, REJECTED))


def test_a_router_that_knows_only_the_limit_sends_by_it():
    """The plan says `max_tokens`; the router is asked with it, and the law has the same pool."""
    asked = PromptAndLimit(max_tokens=50.0)
    document = plan(*({"window_tokens": w} for w in (100, 400)), route_by={"name": asked.name, **vars(asked)})
    router = fleet_launch(document, "plan.json").router
    assert router["length"] == "prompt + max_tokens"
    prompt, output = np.array([1, 49, 50, 51, 60, 60, 350]), np.array([1, 51, 50, 49, 1, 99, 50])
    requests = Requests(arrival_s=np.zeros(prompt.shape), prompt_tokens=prompt, output_tokens=output)
    law = route_requests(
        requests,
        fleet_of((100, 400), (1.0, 1.0)),
        make_workload(prompt, output, arrival_rate_per_s=1.0),
        replace(PHYSICAL, route_by=asked),
    )
    urls = [pool["url"] for pool in router["pools"]]
    limit = np.maximum(output, 50)
    assert [urls.index(ROUTER["route"](router, int(p), int(o))[0]) for p, o in zip(prompt, limit)] == law.pool.tolist()


def of_the_trace(assumptions):
    """With the lengths of the trace, whatever the preset says of them."""
    return replace(assumptions, lengths=PHYSICAL.lengths, tail=PUBLISHED.tail)


def test_the_router_runs_on_its_own(tmp_path):
    """With nothing but Python's standard library, as a stranger would copy it."""
    file = tmp_path / "router.json"
    file.write_text(json.dumps(fleet_launch(plan({"gamma": 1.5}, {}), "plan.json").router))
    command = ["python3", "-I", "-S", str(ROOT / "experiments" / "router.py"), str(file)]
    shown = [
        subprocess.run([*command, *tokens], capture_output=True, text=True)
        for tokens in (["4000", "96"], ["5000", "96"], ["8000", "193"])
    ]
    assert shown[0].stdout == "http://fleetopt-pool-4096:8000 prompt of 4000 tokens\n"
    assert shown[1].stdout == "http://fleetopt-pool-4096:8000 prompt of 4000 tokens, compressed\n"
    status, body = shown[2].stdout.removeprefix("HTTP ").split(" ", 1)
    assert (status, json.loads(body)["error"]["code"], shown[2].stderr, shown[2].returncode) == ("400", 400, "", 1)
    assert "8193 tokens" in json.loads(body)["error"]["message"]
    for wrong in (["4000"], ["4000", "x"], ["4000", "0"], ["4000", "-1"], ["4000", "9", "9"]):
        ran = subprocess.run([*command, *wrong], capture_output=True, text=True)
        assert ran.returncode == 2 and ran.stderr.startswith("router: need") and ran.stderr.count("\n") == 1
    command[-1] = str(tmp_path / "nothing.json")
    ran = subprocess.run([*command, "1", "1"], capture_output=True, text=True)
    assert ran.returncode == 2 and "nothing.json: cannot be read: No such file" in ran.stderr
    (tmp_path / "nothing.json").write_text('{"pools": []}')
    ran = subprocess.run([*command, "1", "1"], capture_output=True, text=True)
    assert ran.returncode == 2 and "not a router's file" in ran.stderr and ran.stderr.count("\n") == 1
    ran = subprocess.run([*command[:-1], "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "ROUTER.json PROMPT_TOKENS MAX_TOKENS" in ran.stdout.replace(
        "router.json", "ROUTER.json"
    )
