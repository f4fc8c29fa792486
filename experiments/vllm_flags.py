"""Read from a vLLM wheel what the flags that `fleetopt export` writes may be: types, defaults, bounds and choices.

    python -m pip download --no-deps vllm==0.33.0 --dest DIRECTORY
    python experiments/vllm_flags.py DIRECTORY/vllm-0.33.0-*.whl

Writes tests/vllm_flags.json, which the tests hold every exported line against. The wheel's source is parsed and never
run. vLLM is Apache-2.0.
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
FLAGS = {  # flag: file and class that define its field, and the field where it is not the flag's own name
    "--served-model-name": (MODEL, "ModelConfig", ""),
    "--tensor-parallel-size": (PARALLEL, "ParallelConfig", ""),
    "--pipeline-parallel-size": (PARALLEL, "ParallelConfig", ""),
    "--data-parallel-size": (PARALLEL, "ParallelConfig", ""),
    "--enable-expert-parallel": (PARALLEL, "ParallelConfig", ""),
    "--nnodes": (PARALLEL, "ParallelConfig", ""),
    "--max-model-len": (MODEL, "ModelConfig", ""),
    "--max-num-seqs": (SCHEDULER, "SchedulerConfig", ""),
    "--max-num-batched-tokens": (SCHEDULER, "SchedulerConfig", ""),
    "--enable-chunked-prefill": (SCHEDULER, "SchedulerConfig", ""),
    "--gpu-memory-utilization": (CACHE, "CacheConfig", ""),
    "--no-enable-prefix-caching": (CACHE, "CacheConfig", "enable_prefix_caching"),
    "--shutdown-timeout": (VLLM, "VllmConfig", ""),
    "--quantization": (MODEL, "ModelConfig", ""),
    "--kv-cache-dtype": (CACHE, "CacheConfig", "cache_dtype"),
    "--port": (SERVER, "FrontendArgs", ""),
}
CHOICES = {"--quantization": (QUANTIZATION, "QuantizationMethods"), "--kv-cache-dtype": (CACHE, "CacheDType")}
ENGINE_ARGS = "vllm/engine/arg_utils.py"
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
    "an idle connection is closed after 5 s": ("vllm/envs.py", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE: int = 5"),
    "fp8 is for fp8 checkpoints; fp8_per_tensor quantizes others": (
        "vllm/model_executor/layers/quantization/fp8.py",
        "method no longer supports online",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    with zipfile.ZipFile(wheel) as archive:
        names = [*{path for path, _, _ in FLAGS.values()}, *(path for path, _ in CHECKS.values())]
        names += [ENGINE_ARGS, QUANTIZATION]
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
        "checks": list(CHECKS),
    }
    write_whole(TARGET, json.dumps(document, indent=2) + "\n")


def _flag(flag: str, source: dict[str, str]) -> dict[str, Any]:
    path, owner, field = FLAGS[flag]
    field = field or flag.removeprefix("--").replace("-", "_")
    named = flag.replace("--no-", "--")  # argparse makes the negated form of a switch
    # The server's own come from the class by their names.
    if path != SERVER and f'"{named}"' not in source[ENGINE_ARGS]:
        raise SystemExit(f"{ENGINE_ARGS} has no {flag}")
    body = next(node for node in ast.parse(source[path]).body if getattr(node, "name", "") == owner).body
    found = next(node for node in body if isinstance(node, ast.AnnAssign) and node.target.id == field)
    said: dict[str, Any] = {"field": f"{owner}.{field}", "type": ast.unparse(found.annotation)}
    if isinstance(found.value, ast.Call):  # Field(default=..., ge=...)
        said |= {keyword.arg: _value(keyword.value) for keyword in found.value.keywords}
    else:
        said["default"] = _value(found.value)
    if flag in CHOICES:
        said["choices"] = _literal(*CHOICES[flag], source)
    return said


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
