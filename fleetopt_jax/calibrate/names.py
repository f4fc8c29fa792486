"""Names as benchmarks write them, as those of the catalog."""

import re

from fleetopt_jax.catalog.engines import SERVING
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.llms import LLMS, PRECISIONS, catalog_name

# Released under a name of their own with the layers of another: their config.json differs in nothing that laws read.
SAME_ARCHITECTURE = {"deepseek-r1": "deepseek-v3"}
PRECISION_NAMES = {"bfloat16": "bf16", "float16": "bf16", "fp16": "bf16", "fp8_block": "fp8", "w4a16": "int4"}
SERVING_NAMES = {"trt": "trtllm", "tensorrt-llm": "trtllm", "tensorrt_llm": "trtllm", "trt-llm": "trtllm"}


def gpu_name(text: str) -> str:
    """The catalog's GPU that 'NVIDIA H100 80GB HBM3', 'b200_sxm' or 'b200-trt' stands for; the text where none."""
    words = f"-{'-'.join(_words(text))}-"
    found = [name for name in GPUS if f"-{'-'.join(_words(name))}-" in words]
    return max(found, key=len, default=text)


def llm_name(text: str) -> str | None:
    """The catalog's LLM of a checkpoint such as 'nvidia/Llama-3.1-8B-Instruct-FP8', or None."""
    if text.lower() in LLMS:
        return text.lower()
    model = text.lower().rsplit("/", 1)[-1].removeprefix("meta-")
    for other, ours in SAME_ARCHITECTURE.items():
        if model == other or model.startswith(f"{other}-"):
            return None if "distill" in model else ours
    return catalog_name(model)


def precision_name(text: str, llm: str) -> str:
    """The catalog's precision of weights; 'fp4' is the checkpoint's own kind of it, else nvfp4."""
    text = text.lower()
    if text in ("fp4", "nvfp4", "mxfp4"):
        native = LLMS[llm].architecture.native_precision if llm in LLMS else ""
        return native if native == "mxfp4" else "nvfp4" if text == "fp4" else text
    return PRECISION_NAMES.get(text, text)


def precision_of_checkpoint(text: str) -> str | None:
    """The precision that a checkpoint's name says; None where it says none."""
    said = set(_words(text)) & (PRECISIONS.keys() | {"fp4", "w4a16", "awq", "gptq"})
    if not said:
        return None
    (name, *more) = sorted(said)
    return None if more else {"awq": "int4", "gptq": "int4"}.get(name, name)


def serving_name(text: str, version: str = "") -> str:
    """The serving engine, 'vllm', 'sglang' or 'trtllm', or the release of it that a law is for."""
    name = SERVING_NAMES.get(text.lower().strip(), text.lower().strip())
    release = f"{name}-{'.'.join(version.split('.')[:2])}"
    return release if release in SERVING else name


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9.]+", text.lower()) if word]
