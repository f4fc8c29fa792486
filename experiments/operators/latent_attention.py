"""Multi-head latent attention: the coefficients of `fleetopt_jax/laws/operators/latent_attention.py`.

The newest vLLM table of the whole block (`mla_context_module`, `mla_generation_module`) of each GPU, the fastest of
the kernels timed, by types of weights and KV cache. Fitted and tried on 16 tokens or more a prompt, 65,536 or fewer in
all; and on contexts of 128 tokens or more. A100 has no such table and takes H100's coefficients; an fp8 cache without
rows takes those of 16 bits, with half the bytes.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.laws.operators.attention import causal_pairs
from fleetopt_jax.laws.operators.latent_attention import (
    LatentShape,
    latent_decode_s,
    latent_prefill_s,
    make_latent_attention_law,
)

from ._attention import VARIANTS, entry
from ._fitting import LICENCE, SOURCE, Bounds, Rows, Tables, borrowed, by_gpu, fastest, where, with_borrowers

BORROWED = {"a100": "h100"}
WEIGHTS = {"bfloat16": ("bf16", 2.0), "fp8_block": ("fp8_block", 1.0002), "nvfp4": ("nvfp4", 0.5625)}
LEAST_FLOP_EXCESS = {"bfloat16": 0.9, "fp8_block": 0.45, "nvfp4": 0.22}  # no product is much above its own peak
DEEPSEEK_V3 = dict(hidden=7168.0, query_rank=1536.0, latent_dim=512.0, rope_dim=64.0, nope_dim=128.0, value_dim=128.0)
BOUNDS: Bounds = {
    "launch_s": (5e-5, 1e-6, 1e-3),
    "token_s": (1e-8, 1e-12, 1e-6),
    "weight_excess": (1.2, 0.3, 10.0),
    "flop_excess": (1.2, 0.1, 10.0),
    "operand_excess": (1.3, 0.3, 50.0),
    "attention_excess": (1.4, 0.45, 20.0),
    "few_blocks": (10.0, 1e-2, 5000.0),
    "sharpness": (1.5, 1.0, 9.0),
}
LEAST_ROWS = 200  # of a variant: RTX PRO 6000 has 101 of decode with an fp8 cache, of one number of heads
PHASES = {"prefill": ("mla_context_module", "isl"), "decode": ("mla_generation_module", "step")}


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: coefficients by GPU, phase and types, and how well they describe its table."""
    gpus = by_gpu(folder, _variants, *BORROWED)
    return {"source": SOURCE, "licence": LICENCE, "gpus": with_borrowers(gpus, BORROWED)}


def _variants(tables: Tables) -> dict[str, Any]:
    found = {}
    for phase, (operator, size) in PHASES.items():
        rows = tables.rows(operator)
        rows.setdefault("kv_cache_dtype", np.full(len(rows["seconds"]), "bfloat16"))
        rows = fastest(rows, ("gemm_type", "kv_cache_dtype", "num_heads", "batch_size", size))
        if phase == "prefill":
            rows = where(rows, (rows["isl"] >= 16) & (rows["batch_size"] * rows["isl"] <= 65536))
        else:
            rows = where(rows, rows["step"] >= 128)
        for weights, (weights_name, weight_bytes) in WEIGHTS.items():
            for kind, (kind_name, value_bytes) in VARIANTS.items():
                its = (rows["gemm_type"] == weights) & (rows["kv_cache_dtype"] == kind)
                fixed = dict(weight_bytes=weight_bytes, value_bytes=value_bytes)
                lender = f"{phase}_{weights_name}_bf16"
                if np.sum(its) > LEAST_ROWS:
                    seconds = partial(_seconds, tables.gpu, phase, fixed)
                    bounds = {**BOUNDS, "flop_excess": (1.5, LEAST_FLOP_EXCESS[weights], 10.0)}
                    kept = entry(seconds, where(rows, its), bounds, size, ("num_heads",), left_out="")
                    kept["coefficients"] |= fixed
                    found[f"{phase}_{weights_name}_{kind_name}"] = kept
                elif lender in found:
                    found[f"{phase}_{weights_name}_{kind_name}"] = borrowed(found[lender], lender, fixed)
    return found


def _seconds(gpu: Any, phase: str, fixed: dict[str, float], coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    law = make_latent_attention_law(**coefficients, **fixed)
    shape = LatentShape(**as_floats(heads=rows["num_heads"], **DEEPSEEK_V3))
    n = rows["batch_size"].astype(float)
    if phase == "decode":
        return np.asarray(latent_decode_s(law, gpu, shape, n, n * rows["step"]))
    tokens = rows["isl"].astype(float)
    return np.asarray(latent_prefill_s(law, gpu, shape, n * tokens, n * causal_pairs(tokens)))
