"""Matrix products: the coefficients of `fleetopt_jax/laws/operators/gemm.py`.

The newest vLLM table of each GPU, the fastest of the kernels timed. Left out: fp8_block products that the data sheet
has done before the host has launched them (in these tables it takes 60 to 300 us; engines other than vLLM show 9 to 16
us, which t0 is set to); on GB200, 16-bit products of more than 1,024 rows (half of them below 1,223 TFLOP/s at 8,192
rows, where 1,564 to 1,943 are usual among its kin). Types without a table borrow: see `_borrowed`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.core.units import US
from fleetopt_jax.laws.hardware import Gpu, peak_of_bits
from fleetopt_jax.laws.operators.gemm import make_gemm_law, timed_gemm_s

from ._fitting import LICENCE, SOURCE, Bounds, Rows, Tables, borrowed, by_gpu, entry, fastest, log_spacing, where

VARIANTS = {"bfloat16": "bf16", "fp8": "fp8", "int8": "int8", "fp8_block": "fp8_block", "nvfp4": "nvfp4"}
# Bytes of a weight and of an input, scales included, and bits multiplied. int4: 4 bits and a 16-bit scale for each 128;
# nvfp4: an 8-bit scale for each 16; mxfp4: one for each 32; fp8_block: 32 bits for each 128 x 128, inputs for each 128.
FORMATS = {
    "bf16": dict(weight_bytes=2.0, input_bytes=2.0, flop_bits=16.0),
    "fp8": dict(weight_bytes=1.0, input_bytes=1.0, flop_bits=8.0),
    "fp8_block": dict(weight_bytes=1.0002, input_bytes=1.0313, flop_bits=8.0),
    "int8": dict(weight_bytes=1.0, input_bytes=1.0, flop_bits=8.0),
    "int4": dict(weight_bytes=0.51563, input_bytes=2.0, flop_bits=16.0),
    "nvfp4": dict(weight_bytes=0.5625, input_bytes=0.5625, flop_bits=4.0),
    "mxfp4": dict(weight_bytes=0.53125, input_bytes=2.0, flop_bits=16.0),
}
SHAPE = ("n", "k")
LEAST_ROWS = 200
BLOCK_LAUNCH_S = 9 * US  # fp8_block: the least that engines other than vLLM show
PRODUCT: Bounds = {
    "launch_s": (3 * US, 0.1 * US, 20 * US),
    "depth_s": (1e-9, 1e-12, 1e-7),
    "split_inputs": (2000.0, 50.0, 1e7),
    "byte_excess": (1.1, 0.8, 3.0),
    "output_excess": (1.0, 0.1, 10.0),
    "flop_excess": (1.3, 0.8, 20.0),
    "sharpness": (2.0, 1.0, 12.0),
    "cached_bytes": (2e7, 1e6, 2e8),
    "cached_frac": (0.5, 0.05, 1.0),
}
QUANTIZED: Bounds = {**PRODUCT, "row_s": (1e-9, 1e-13, 1e-7), "quantize_passes": (1.0, 1e-3, 20.0)}


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: the coefficients of every GPU and data type, and how well they describe its table."""

    def all_variants(tables: Tables) -> dict[str, Any]:
        found = variants(tables)
        return {**found, **_borrowed(tables.entry, found)}

    return {"source": SOURCE, "licence": LICENCE, "gpus": by_gpu(folder, all_variants)}


def variants(tables: Tables) -> dict[str, Any]:
    """The data types that a GPU has a table of."""
    rows = tables.rows("gemm")
    kinds = rows.pop("gemm_dtype", np.full(len(rows["m"]), "bfloat16"))
    found = {}
    for kind, variant in VARIANTS.items():
        if np.any(kinds == kind):
            measured, left_out = _kept(tables, variant, fastest(where(rows, kinds == kind), ("m", "n", "k")))
            if tables.enough(np.ones(len(measured["m"]), bool), f"gemm {variant}"):
                lent = found.get("fp8", {}).get("coefficients", {}) if variant == "fp8_block" else {}
                walk = {name: lent[name] for name in ("depth_s", "split_inputs") if name in lent}
                found[variant] = _entry(tables, variant, measured, left_out, walk)
    return found


def _kept(tables: Tables, variant: str, rows: Rows) -> tuple[Rows, str]:
    """Rows that are what they say, and what was left out of them."""
    if variant == "fp8_block":
        host_s = _host_s(rows)
        kept = _ideal_s(tables.gpu, variant, rows) > host_s
        if np.sum(kept) < LEAST_ROWS:
            kept = np.zeros_like(kept)
        floor = f"the host's floor of {host_s.min() / US:.0f} to {host_s.max() / US:.0f} us"
        return where(rows, kept), f"{np.sum(~kept)} rows under {floor}; launch_s set"
    if tables.known == "gb200" and variant == "bf16":
        kept = rows["m"] <= 1024
        return where(rows, kept), f"{np.sum(~kept)} rows of m > 1024"
    return rows, ""


def _ideal_s(gpu: Gpu, variant: str, rows: Rows) -> np.ndarray:
    """The longer of bytes over the peak bandwidth and FLOPs over the peak: no product is faster."""
    of = FORMATS[variant]
    n_bytes = of["weight_bytes"] * rows["n"] * rows["k"] + rows["m"] * (of["input_bytes"] * rows["k"] + 2 * rows["n"])
    flop_s = 2.0 * rows["m"] * rows["n"] * rows["k"] / peak_of_bits(gpu, of["flop_bits"])
    return np.maximum(n_bytes / gpu.bandwidth_bytes_per_s, flop_s)


def _host_s(rows: Rows) -> np.ndarray:
    """What the host takes to launch a product of as many rows: the median of the smaller half of the shapes."""
    sizes, at = np.unique(rows["m"], return_inverse=True)
    small = rows["n"] * rows["k"] <= np.median(rows["n"] * rows["k"])
    hosts = np.array([np.median(rows["seconds"][small & (at == i)]) for i in range(len(sizes))])
    return np.minimum.accumulate(hosts[::-1])[::-1][at]  # large products are the GPU's own


def _entry(tables: Tables, variant: str, rows: Rows, left_out: str, walk: dict[str, float]) -> dict[str, Any]:
    fixed = dict(FORMATS[variant])
    bounds = PRODUCT if variant == "bf16" else QUANTIZED
    if variant == "bf16":
        fixed |= dict(row_s=0.0, quantize_passes=0.0)
    if variant == "fp8_block":
        fixed |= dict(launch_s=BLOCK_LAUNCH_S, cached_bytes=0.0, cached_frac=1.0, **walk)
        bounds = {name: bound for name, bound in bounds.items() if name not in fixed}
    bounds = tables.start("gemm", variant, bounds)
    seconds = partial(_seconds, tables.gpu, fixed)
    found = entry(seconds, rows, bounds, log_spacing(rows["m"]), SHAPE, tables.hold, left_out=left_out)
    return {**found, "coefficients": {**fixed, **found["coefficients"]}}


def _seconds(gpu: Any, fixed: dict[str, float], coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    return timed_gemm_s(make_gemm_law(**fixed, **coefficients), gpu, rows["m"], rows["n"], rows["k"])


def _borrowed(gpu: GpuEntry, found: dict[str, Any]) -> dict[str, Any]:
    """What has no table. 8-bit integers as 8-bit floats where the GPU has both; else weights are unpacked on the way to
    16-bit products (Marlin kernels): the 16-bit coefficients, with fewer bytes of weights."""
    formats = gpu.formats
    lent = {}
    for variant in FORMATS:
        if variant in found:
            continue
        lender, of = "bf16", FORMATS["bf16"] | dict(weight_bytes=FORMATS[variant]["weight_bytes"])
        if (variant == "fp8_block" and "fp8" in found) or (variant == "int8" and {"int8", "fp8"} <= {*formats}):
            lender, of = "fp8", FORMATS[variant]
        elif variant == "int8" and "int8" in formats:
            of = FORMATS[variant]
        lent[variant] = borrowed(found[lender], lender, of)
    return lent
