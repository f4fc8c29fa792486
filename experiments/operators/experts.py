"""Routed experts: the coefficients of `fleetopt_jax/laws/operators/experts.py`.

The newest vLLM table of each GPU, the fastest of the kernels timed, all routings together, each with its own load. Left
out: kernels that vLLM takes for few models only (`_RARE`: their activations are not in the usual ones), which would need
coefficients of their own. Types without a table borrow: see `_borrowed`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.laws.operators.experts import ROUTINGS, USUAL_ROUTING, Experts, experts_s, make_experts_law

from ._fitting import LICENCE, SOURCE, TABLES, Bounds, Rows, entry, fastest, log_spacing, newest_rows, where

VARIANTS = {
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "int4_wo": "int4",
    "nvfp4": "nvfp4",
    "w4a16_mxfp4": "mxfp4",
    "w4a8_mxfp4_mxfp8": "mxfp4_mxfp8",
}
# Bytes of a weight, scales included, and bits multiplied; int4: 4 bits and a 16-bit scale for each 32.
FORMATS = {
    "bf16": dict(weight_bytes=2.0, flop_bits=16.0),
    "fp8": dict(weight_bytes=1.0, flop_bits=8.0),
    "fp8_block": dict(weight_bytes=1.0002, flop_bits=8.0),
    "int8": dict(weight_bytes=1.0, flop_bits=8.0),
    "int4": dict(weight_bytes=0.5625, flop_bits=16.0),
    "nvfp4": dict(weight_bytes=0.5625, flop_bits=4.0),
    "mxfp4": dict(weight_bytes=0.53125, flop_bits=16.0),
    "mxfp4_mxfp8": dict(weight_bytes=0.53125, flop_bits=8.0),
}
SHAPE = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
MOST_SHARE_OF_RARE = 0.2  # of a type's rows, below which the cutlass and Marlin kernels beside others are left out
BOUNDS: Bounds = {
    "launch_s": (2e-5, 1e-6, 1e-3),
    "depth_s": (1e-9, 1e-12, 1e-7),
    "choice_s": (1e-9, 1e-12, 1e-6),
    "token_s": (1e-8, 1e-12, 1e-6),
    "expert_s": (3e-8, 1e-11, 1e-5),
    "byte_excess": (1.2, 0.8, 10.0),
    "activation_excess": (1.5, 0.1, 20.0),
    "flop_excess": (2.0, 0.8, 30.0),
    "tile_rows": (30.0, 0.1, 300.0),
    "sharpness": (2.0, 1.0, 10.0),
}


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: the coefficients of every GPU and data type, and how well they describe its table."""
    return {"source": SOURCE, "licence": LICENCE, "gpus": {gpu: _variants(folder, gpu) for gpu in TABLES}}


def _variants(folder: Path, gpu: str) -> dict[str, Any]:
    rows = newest_rows(folder, gpu, "moe")
    kinds = rows.pop("moe_dtype", np.full(len(rows["seconds"]), "bfloat16"))
    found = {}
    for kind, variant in VARIANTS.items():
        if np.any(kinds == kind):
            found[variant] = _entry(gpu, variant, *_kept(where(rows, kinds == kind)))
    return {**found, **_borrowed(gpu, found)}


def _kept(rows: Rows) -> tuple[Rows, str]:
    """The fastest of each shape, without the kernels of few models."""
    rows = fastest(rows, ("num_tokens", *SHAPE, "distribution"))
    if "kernel_source" not in rows:
        return rows, ""
    kernels = rows.pop("kernel_source")
    rare = np.zeros(len(kernels), dtype=bool)
    names = []
    for kernel in np.unique(kernels):
        its = kernels == kernel
        if np.mean(its) < MOST_SHARE_OF_RARE and ("cutlass" in kernel or "marlin" in kernel):
            rare |= its
            names.append(str(kernel).removeprefix("vllm_"))
    return where(rows, ~rare), f"{np.sum(rare)} rows of {', '.join(names)}" if names else ""


def _entry(gpu: str, variant: str, rows: Rows, left_out: str) -> dict[str, Any]:
    usual = dict(zip(("unevenness", "spread"), ROUTINGS[USUAL_ROUTING]))
    seconds = partial(_seconds, gpu_entry(gpu).gpu, FORMATS[variant])
    found = entry(seconds, rows, BOUNDS, log_spacing(rows["num_tokens"]), SHAPE, left_out=left_out)
    found["coefficients"] |= {**FORMATS[variant], **usual}
    return found


def _seconds(gpu: Any, fixed: dict[str, float], coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    routing = np.array([ROUTINGS[name] for name in rows["distribution"]]).T
    law = make_experts_law(**fixed, **coefficients, unevenness=0.0, spread=0.0)
    law = type(law)(**{**vars(law), "unevenness": routing[0], "spread": routing[1]})
    return experts_s(law, gpu, _experts(rows), rows["num_tokens"], rows["moe_tp_size"], rows["moe_ep_size"])


def _experts(rows: Rows) -> Experts:
    """Of a row's shape. Nemotron's experts have no gate: those of 22 or 6 a token among 512 or 128."""
    gateless = (rows["topk"] == 22) | (rows["hidden_size"] == 2688)
    return Experts(
        hidden=rows["hidden_size"].astype(float),
        width=rows["inter_size"].astype(float),
        per_token=rows["topk"].astype(float),
        n_experts=rows["num_experts"].astype(float),
        matrices=np.where(gateless, 2.0, 3.0),
    )


def _borrowed(gpu: str, found: dict[str, Any]) -> dict[str, Any]:
    """What has no table: 16-bit coefficients with fewer bytes of weights, which are unpacked on the way (Marlin)."""
    return {
        variant: {
            "coefficients": {
                **found["bf16"]["coefficients"],
                "weight_bytes": FORMATS[variant]["weight_bytes"],
            },
            "rows": 0,
            "left_out": "",
            "borrowed_from": "bf16",
        }
        for variant in FORMATS
        if variant not in found
    }
