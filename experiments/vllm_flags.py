"""Read from wheels of vLLM and of its router what the flags that `fleetopt export` writes may be: types, defaults,
bounds and choices.

    python -m pip download --no-deps vllm==0.33.0 vllm-router==0.1.17 --dest DIRECTORY
    python experiments/vllm_flags.py DIRECTORY/vllm-0.33.0-*.whl DIRECTORY/vllm_router-0.1.17-*.whl

Writes tests/vllm_flags.json, which the tests hold every exported line against. The wheels' source is parsed and never
run. Both are Apache-2.0.
"""

import argparse
import ast
import json
import zipfile
from pathlib import Path
from typing import Any

from fleetopt_jax.core.files import write_whole

TARGET = Path(__file__).parents[1] / "tests" / "vllm_flags.json"
MODEL, CACHE, PARALLEL, SCHEDULER, VLLM, SERVER, QUANTIZATION = (
    f"vllm/{path}.py"
    for path in (
        "config/model",
        "config/cache",
        "config/parallel",
        "config/scheduler",
        "config/vllm",
        "entrypoints/common/cli_args",
        "model_executor/layers/quantization/__init__",
    )
)
ENGINE_ARGS, SPECULATIVE = "vllm/engine/arg_utils.py", "vllm/config/speculative.py"
KV_TRANSFER, ENVIRONMENT = "vllm/config/kv_transfer.py", "vllm/envs.py"
NIXL = "vllm/distributed/kv_transfer/kv_connector/v1/nixl"
ROUTER_ARGS = "vllm_router/router_args.py"
ROUTER_FLAGS = (
    *("--host", "--port", "--vllm-pd-disaggregation", "--kv-connector", "--prefill", "--decode"),
    *("--prefill-policy", "--decode-policy", "--worker-startup-timeout-secs", "--request-timeout-secs"),
    *("--health-check-interval-secs", "--prometheus-host", "--prometheus-port", "--log-level", "--service-discovery"),
    *("--service-discovery-port", "--service-discovery-namespace", "--prefill-selector", "--decode-selector"),
)
FLAGS = {  # flag: file and class that define its field, and the field where it is not the flag's own name
    "--served-model-name": (MODEL, "ModelConfig", ""),
    "--tensor-parallel-size": (PARALLEL, "ParallelConfig", ""),
    "--pipeline-parallel-size": (PARALLEL, "ParallelConfig", ""),
    "--data-parallel-size": (PARALLEL, "ParallelConfig", ""),
    "--enable-expert-parallel": (PARALLEL, "ParallelConfig", ""),
    "--nnodes": (PARALLEL, "ParallelConfig", ""),
    "--node-rank": (PARALLEL, "ParallelConfig", ""),
    "--master-addr": (PARALLEL, "ParallelConfig", ""),
    "--data-parallel-address": (PARALLEL, "ParallelConfig", "data_parallel_master_ip"),
    "--max-model-len": (MODEL, "ModelConfig", ""),
    "--max-num-seqs": (SCHEDULER, "SchedulerConfig", ""),
    "--max-num-batched-tokens": (SCHEDULER, "SchedulerConfig", ""),
    "--enable-chunked-prefill": (SCHEDULER, "SchedulerConfig", ""),
    "--gpu-memory-utilization": (CACHE, "CacheConfig", ""),
    "--enable-prefix-caching": (CACHE, "CacheConfig", ""),
    "--no-enable-prefix-caching": (CACHE, "CacheConfig", "enable_prefix_caching"),
    "--shutdown-timeout": (VLLM, "VllmConfig", ""),
    "--quantization": (MODEL, "ModelConfig", ""),
    "--kv-cache-dtype": (CACHE, "CacheConfig", "cache_dtype"),
    "--speculative-config": (ENGINE_ARGS, "EngineArgs", ""),
    "--kv-transfer-config": (ENGINE_ARGS, "EngineArgs", ""),
    "--port": (SERVER, "FrontendArgs", ""),
}
HAND_OVER = ("kv_connector", "kv_role", "kv_load_failure_policy")  # of the JSON of --kv-transfer-config
DRAFTS = ("method", "model", "num_speculative_tokens", "prompt_lookup_max")  # of the JSON of --speculative-config
CHOICES = {"--quantization": (QUANTIZATION, "QuantizationMethods"), "--kv-cache-dtype": (CACHE, "CacheDType")}
METRICS = "vllm/v1/metrics/loggers.py"
CHECKS = {  # what vLLM checks of several values at once: the file and the words it does it in
    "max_num_batched_tokens >= max_num_seqs": (SCHEDULER, "if self.max_num_batched_tokens < self.max_num_seqs:"),
    "quantization == quant_method of the checkpoint, where it has one": (
        MODEL,
        "elif self.quantization != quant_method:",
    ),
    "VLLM_API_KEY is a key, without --api-key": (
        "vllm/entrypoints/serve/middleware/register.py",
        "(args.api_key or [envs.VLLM_API_KEY])",
    ),
    "--nnodes with --node-rank divides TP, PP and DP ranks over hosts": (
        ENGINE_ARGS,
        "self.node_rank * local_world_size",
    ),
    "--master-addr is rank 0's": (ENGINE_ARGS, '"--master-addr"'),
    "--data-parallel-address is rank 0's": (ENGINE_ARGS, '"--data-parallel-address"'),
    "--headless is for all hosts but that of rank 0": (SERVER, '"--headless",'),
    "--nnodes divides an instance's GPUs": (ENGINE_ARGS, "if world_size % self.nnodes != 0:"),
    "an idle connection is closed after 5 s": ("vllm/envs.py", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE: int = 5"),
    "fp8 is for fp8 checkpoints; fp8_per_tensor quantizes others": (
        "vllm/model_executor/layers/quantization/fp8.py",
        "method no longer supports online",
    ),
    "VLLM_NIXL_SIDE_CHANNEL_HOST is where the other stage meets an instance": (
        ENVIRONMENT,
        '"VLLM_NIXL_SIDE_CHANNEL_HOST", "localhost"',
    ),
    "VLLM_NIXL_SIDE_CHANNEL_PORT is 5600 unless it is said": (ENVIRONMENT, '"VLLM_NIXL_SIDE_CHANNEL_PORT", "5600"'),
    "NixlConnector is a connector's name": (f"{NIXL}/connector.py", "NixlConnector = NixlPullConnector"),
    "stages compare the checkpoint's name": (f"{NIXL}/metadata.py", '"model": model_config.model,'),
    "stages compare KV precisions": (f"{NIXL}/metadata.py", '"cache_dtype": str(cache_config.cache_dtype),'),
    "stages compare attention backends": (f"{NIXL}/metadata.py", '"attn_backend_name": attn_backend_name,'),
    "stages compare draft heads, whatever the number of drafts": (
        f"{NIXL}/metadata.py",
        '"model": draft_model_config.model,',
    ),
    "one stage's TP divides the other's": (
        "vllm/distributed/kv_transfer/kv_connector/utils.py",
        "assert remote_tp_size % self.tp_size == 0",
    ),
    "no copies of KV heads are read by fewer GPUs": (
        f"{NIXL}/base_worker.py",
        "tp_ratio < 0 and self.transfer_topo.is_kv_replicated(remote_engine_id)",
    ),
    "a decode stage is no pipeline": (f"{NIXL}/base_worker.py", "Decode-side PP is unsupported"),
    "/metrics counts tokens asked of the prefix cache, and found": (METRICS, '"vllm:prefix_cache_hits"'),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("router", type=Path)
    wheel, router = vars(parser.parse_args()).values()
    with zipfile.ZipFile(wheel) as archive:
        names = [*{path for path, _, _ in FLAGS.values()}, *(path for path, _ in CHECKS.values())]
        names += [ENGINE_ARGS, QUANTIZATION, SPECULATIVE, KV_TRANSFER]
        source = {name: archive.read(name).decode() for name in names}
    flags = {flag: _flag(flag, source) for flag in FLAGS}
    for check, (path, words) in CHECKS.items():
        if words not in source[path]:
            raise SystemExit(f"{path} no longer says {words!r}: is it still so that {check}?")
    document = {
        "release": wheel.name.split("-")[1],
        "source": f"{wheel.name} on pypi.org, by experiments/vllm_flags.py",
        "licence": "Apache-2.0",
        "flags": flags,
        "speculative_config": {name: _field(SPECULATIVE, "SpeculativeConfig", name, source) for name in DRAFTS},
        "speculative_methods": _names(SPECULATIVE, "SpeculativeMethod", source),
        "kv_transfer_config": {name: _field(KV_TRANSFER, "KVTransferConfig", name, source) for name in HAND_OVER},
        "kv_roles": sorted({*_names(KV_TRANSFER, "KVProducer", source), *_names(KV_TRANSFER, "KVConsumer", source)}),
        "checks": list(CHECKS),
        "router": {
            "release": router.name.split("-")[1],
            "source": f"{router.name} on pypi.org, by experiments/vllm_flags.py",
            "licence": "Apache-2.0",
            "flags": _router_flags(router),
        },
    }
    write_whole(TARGET, json.dumps(document, indent=2) + "\n")


def _router_flags(wheel: Path) -> dict[str, Any]:
    """What the launcher of vLLM's router takes, as its argparse has it."""
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read(ROUTER_ARGS).decode())
    flags = {}
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]:
        flag = ast.unparse(call.args[0]).removeprefix("f").strip("'").replace("{prefix}", "")
        if flag in ROUTER_FLAGS:
            said = {each.arg: _value(each.value) for each in call.keywords}
            flags[flag] = {name: said[name] for name in ("type", "action", "nargs", "choices") if name in said}
    return {flag: flags[flag] for flag in ROUTER_FLAGS}


def _flag(flag: str, source: dict[str, str]) -> dict[str, Any]:
    path, owner, field = FLAGS[flag]
    field = field or flag.removeprefix("--").replace("-", "_")
    named = flag.replace("--no-", "--")  # argparse makes the negated form of a switch
    # The server's own come from the class by their names.
    if path != SERVER and f'"{named}"' not in source[ENGINE_ARGS]:
        raise SystemExit(f"{ENGINE_ARGS} has no {flag}")
    said = _field(path, owner, field, source)
    if flag in CHOICES:
        said["choices"] = _literal(*CHOICES[flag], source)
    return said


def _field(path: str, owner: str, field: str, source: dict[str, str]) -> dict[str, Any]:
    """What a class says of one of its fields."""
    body = next(node for node in ast.parse(source[path]).body if getattr(node, "name", "") == owner).body
    found = next(node for node in body if isinstance(node, ast.AnnAssign) and node.target.id == field)
    said: dict[str, Any] = {"field": f"{owner}.{field}", "type": ast.unparse(found.annotation)}
    if isinstance(found.value, ast.Call):  # Field(default=..., ge=...)
        said |= {keyword.arg: _value(keyword.value) for keyword in found.value.keywords}
    else:
        said["default"] = _value(found.value)
    return said


def _names(path: str, name: str, source: dict[str, str]) -> list[str]:
    """The strings of a Literal, of those that it names with them."""
    assigned = next(
        node.value
        for node in ast.parse(source[path]).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name
    )
    nodes = assigned.slice.elts if isinstance(assigned.slice, ast.Tuple) else [assigned.slice]
    each = [[node.value] if isinstance(node, ast.Constant) else _names(path, node.id, source) for node in nodes]
    return [one for several in each for one in several]


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _literal(path: str, name: str, source: dict[str, str]) -> list[str]:
    assigned = next(
        node.value
        for node in ast.parse(source[path]).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name
    )
    return list(ast.literal_eval(assigned.slice))


if __name__ == "__main__":
    main()
