"""Routed experts: the coefficients of `fleetopt_jax/laws/operators/experts.py`.

The newest vLLM table of each GPU, the fastest of the kernels timed, all routings together, each with its own load. Left
out: kernels that vLLM takes for few models, whose activations the others lack (they would need coefficients of their
own); slices narrower than 64, which no engine makes and some kernels take a thousand times as long for; more than
16,384 tokens; and of the A100's table, older than the others, rows over several GPUs with no more choices than experts:
its draws put all of them on one GPU. Types without a table borrow: see `_borrowed`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fleetopt_jax.laws.operators.experts import ROUTINGS, USUAL_ROUTING, Experts, make_experts_law, timed_experts_s

from ._fitting import LICENCE, SOURCE, Bounds, Rows, Tables, borrowed, by_gpu, entry, fastest, log_spacing, where

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
MOST_SHARE_OF_RARE = 0.4  # of a type's rows, below which the cutlass and Marlin kernels beside others are left out
LEAST_WIDTH = 64  # of a slice of an expert
MOST_TOKENS = 16384
BOUNDS: Bounds = {
    "launch_s": (2e-5, 1e-6, 1e-3),
    "depth_s": (1e-9, 1e-12, 1e-7),
    "gather_passes": (1.0, 1e-3, 30.0),
    "expert_s": (3e-8, 1e-11, 1e-5),
    "byte_excess": (1.2, 0.8, 10.0),
    "activation_excess": (1.5, 0.1, 20.0),
    "flop_excess": (2.0, 0.8, 30.0),
    "tile_rows": (30.0, 0.1, 300.0),
    "sharpness": (2.0, 1.0, 10.0),
    "cached_bytes": (4e7, 1e6, 2e8),
    "cached_frac": (0.5, 0.05, 1.0),
}


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: the coefficients of every GPU and data type, and how well they describe its table."""

    def all_variants(tables: Tables) -> dict[str, Any]:
        found = variants(tables)
        return {**found, **_borrowed(found)}

    return {"source": SOURCE, "licence": LICENCE, "gpus": by_gpu(folder, all_variants)}


def variants(tables: Tables) -> dict[str, Any]:
    """The data types that a GPU has a table of."""
    rows = tables.rows("moe")
    rows["oldest"] = np.full(len(rows["seconds"]), "moe_dtype" not in rows)
    kinds = rows.pop("moe_dtype", np.full(len(rows["seconds"]), "bfloat16"))
    found = {}
    for kind, variant in VARIANTS.items():
        if np.any(kinds == kind):
            measured, left_out = _kept(where(rows, kinds == kind))
            if tables.enough(np.ones(len(measured["seconds"]), bool), f"experts {variant}"):
                found[variant] = _entry(tables, variant, measured, left_out)
    return found


def _kept(rows: Rows) -> tuple[Rows, str]:
    """The fastest of each shape, without kernels of few models and rows that no engine has; and what was left out."""
    rows = fastest(rows, ("num_tokens", *SHAPE, "distribution"))
    kernels = rows.pop("kernel_source", np.full(len(rows["seconds"]), ""))
    rare = [name for name in np.unique(kernels) if np.mean(kernels == name) < MOST_SHARE_OF_RARE and _is_other(name)]
    few = rows["num_tokens"] * rows["topk"] <= rows["num_experts"]
    wrong = {f"of {name.removeprefix('vllm_')}": kernels == name for name in rare}
    wrong[f"of widths below {LEAST_WIDTH}"] = rows["inter_size"] / rows["moe_tp_size"] < LEAST_WIDTH
    wrong[f"of more than {MOST_TOKENS} tokens"] = rows["num_tokens"] > MOST_TOKENS
    wrong["of few choices, all on one GPU"] = rows["oldest"] & few & (rows["moe_ep_size"] > 1)
    left_out = ", ".join(f"{np.sum(each)} {why}" for why, each in wrong.items() if np.any(each))
    return where(rows, ~np.any(list(wrong.values()), axis=0)), left_out


def _is_other(kernel: str) -> bool:
    return "cutlass" in kernel or "marlin" in kernel


def _entry(tables: Tables, variant: str, rows: Rows, left_out: str) -> dict[str, Any]:
    usual = dict(zip(("unevenness", "spread"), ROUTINGS[USUAL_ROUTING]))
    seconds, bounds = partial(_seconds, tables.gpu, FORMATS[variant]), tables.start("experts", variant, BOUNDS)
    weights = log_spacing(rows["num_tokens"])
    found = entry(seconds, rows, bounds, weights, SHAPE, tables.hold, left_out=left_out)
    found["coefficients"] |= {**FORMATS[variant], **usual}
    return found


def _seconds(gpu: Any, fixed: dict[str, float], coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    routing = np.array([ROUTINGS[name] for name in rows["distribution"]]).T
    law = make_experts_law(**fixed, **coefficients, unevenness=0.0, spread=0.0)
    law = type(law)(**{**vars(law), "unevenness": routing[0], "spread": routing[1]})
    return timed_experts_s(law, gpu, _experts(rows), rows["num_tokens"], rows["moe_tp_size"], rows["moe_ep_size"])


def _experts(rows: Rows) -> Experts:
    """Of a row's shape. Nemotron's experts have no gate; the oldest table, without kernels' names, gave them one."""
    gateless = ((rows["topk"] == 22) | (rows["hidden_size"] == 2688)) & ~rows["oldest"]
    return Experts(
        hidden=rows["hidden_size"].astype(float),
        width=rows["inter_size"].astype(float),
        per_token=rows["topk"].astype(float),
        n_experts=rows["num_experts"].astype(float),
        matrices=np.where(gateless, 2.0, 3.0),
    )


def _borrowed(found: dict[str, Any]) -> dict[str, Any]:
    """What has no table: fp8_block as fp8 where that is measured; else 16-bit coefficients with fewer bytes of weights,
    which are unpacked on the way (Marlin)."""
    lent = {}
    for variant in FORMATS:
        if variant not in found:
            lender = "fp8" if variant == "fp8_block" and "fp8" in found else "bf16"
            of = FORMATS[lender] | dict(weight_bytes=FORMATS[variant]["weight_bytes"])
            lent[variant] = borrowed(found[lender], lender, of)
    return lent
