"""Measured serving points, as closed-loop benchmarks of the mixed step.

`points.csv` (columns backend, model_path, system, precision, mode, isl, osl, concurrency, *_size, silicon_ttft_ms,
silicon_tpot_ms) holds means over requests of closed loops: most of SemiAnalysis InferenceX (Apache-2.0), by way of the
sample in aiconfigurator-core 0.12.0 (Apache-2.0).

What the table does not say, its launchers do (SemiAnalysisAI/InferenceX, benchmarks/*.sh): Llama-70B and gpt-oss keep
their KV cache in 8 bits on B200; vLLM is started with `--tensor-parallel-size` alone, also where the table names
data-parallel attention (those points agree with the others of as many GPUs within 2 %), and with expert parallelism
where it names some.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.catalog.gpus import GPUS, GpuEntry
from fleetopt_jax.catalog.llms import llm_entry
from fleetopt_jax.catalog.steps import Parallelism
from fleetopt_jax.core.units import MS

SOURCE = (
    "serving points of SemiAnalysis InferenceX and NVIDIA, from silicon_sample.csv of aiconfigurator-core 0.12.0 "
    "(Apache-2.0)"
)
SYSTEMS = {"h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200", "gb200": "gb200"}
PRECISIONS = {"fp8": "fp8", "fp4": "nvfp4", "bf16": "bf16"}
KV_8_BITS = {("llama-3.1-70b", "b200"), ("gpt-oss-120b", "b200")}  # kv-cache-dtype: fp8 in their launchers

CONFIGS = Path(__file__).parent / "configs"  # the fields of the models' own config.json
LLMS = {  # model of the points -> what a spec takes
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "nvidia/Qwen3-32B-NVFP4": "qwen3-32b",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "deepseek-ai/DeepSeek-R1": "deepseek-v3",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "MiniMaxAI/MiniMax-M2.5": str(CONFIGS / "minimax-m2.5.json"),
    "Qwen/Qwen3.5-397B-A17B": str(CONFIGS / "qwen3.5-397b-a17b.json"),
}
NO_LAW = ("Qwen/Qwen3.5-397B-A17B",)  # whose recurrent layers no host law was fitted with
MODELS = {  # name in the fits, and architecture
    model: (Path(llm).name.removesuffix(".json"), llm_entry(llm).architecture)
    for model, llm in LLMS.items()
    if model not in NO_LAW
}
UTILIZATION = 0.90  # of each GPU's memory, as most launchers ask
BUDGET_TOKENS = 8192  # of a step, likewise


@dataclass(frozen=True)
class Served:
    """What served."""

    engine: str  # vllm | sglang | trtllm
    version: str
    llm: str
    architecture: Architecture
    gpu: GpuEntry
    precision: str
    kv_precision: str
    split: Parallelism


@dataclass(frozen=True)
class Point:
    """One measured point."""

    row: int  # of the file, from 0
    served: Served
    isl: int
    osl: int
    concurrency: int
    ttft_s: float
    tpot_s: float


def read_points(folder: Path) -> tuple[list[Point], dict[str, int]]:
    """The aggregated points of architectures that are known, without repeats, and why others are left out."""
    points: list[Point] = []
    left_out: dict[str, int] = {}
    seen = set()
    with (folder / "points.csv").open(newline="") as file:
        for number, line in enumerate(csv.DictReader(file)):
            found = _point(number, line)
            if not isinstance(found, Point):
                left_out[found] = left_out.get(found, 0) + 1
            elif (key := (found.served, found.isl, found.osl, found.concurrency, found.ttft_s, found.tpot_s)) in seen:
                left_out["the same point again"] = left_out.get("the same point again", 0) + 1
            else:
                seen.add(key)
                points.append(found)
    return points, left_out


def _point(number: int, line: dict[str, str]) -> Point | str:
    if line["mode"] != "agg":
        return "prefill and decode apart"
    if line["model_path"] not in MODELS:
        return f"{line['model_path']}: no architecture"
    if not line["precision"] or "Llama-3.1-8B" in line["model_path"]:
        return "NVIDIA's own runs, whose settings nobody says"
    if not all(line[name] for name in ("concurrency", "silicon_ttft_ms", "silicon_tpot_ms")):
        return "concurrency, TTFT or TPOT not said"
    llm, architecture = MODELS[line["model_path"]]
    gpu = SYSTEMS[line["system"]]
    precision = "mxfp4" if llm.startswith("gpt-oss") else PRECISIONS[line["precision"]]
    split = split_of(line)
    served = Served(
        engine=line["backend"],
        version=line["backend_version"],
        llm=llm,
        architecture=architecture,
        gpu=GPUS[gpu],
        precision=precision,
        kv_precision="fp8" if (llm, gpu) in KV_8_BITS else "bf16",
        split=split if architecture.n_experts else replace(split, ep=1),
    )
    return Point(
        row=number,
        served=served,
        isl=int(line["isl"]),
        osl=int(line["osl"]),
        concurrency=int(line["concurrency"]),
        ttft_s=float(line["silicon_ttft_ms"]) * MS,
        tpot_s=float(line["silicon_tpot_ms"]) * MS,
    )


def split_of(line: dict[str, str]) -> Parallelism:
    """How the GPUs share it. Where all of n GPUs are said to divide experts both ways, the table multiplies n with
    itself; vLLM's launchers know no data-parallel attention."""
    names = ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    tp, pp, dp, expert_tp, ep = (max(int(float(line[name] or 1)), 1) for name in names)
    if expert_tp == ep > 1 and tp * dp == ep**2:
        tp, dp = (ep, 1) if dp == 1 else (1, ep)
    if line["backend"] == "vllm":
        dp = 1
    return Parallelism(tp=tp, ep=min(ep, tp * dp), dp=dp, pp=pp)
