"""Operator laws by GPU and data type, from `data/operators/*.json`, each with its error.

A file is a class of operators, written by `experiments/fit_operators.py`: {"gpus": {GPU: {VARIANT: {"coefficients",
"median_error", ...}}}}. A GPU without tables borrows those of the generation its data sheet names (`GpuEntry.law`): all
coefficients are shares of data-sheet peaks, and launches.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.laws.operators.attention import make_decode_attention_law, make_prefill_attention_law
from fleetopt_jax.laws.operators.collectives import make_collective_law
from fleetopt_jax.laws.operators.elementwise import make_elementwise_law
from fleetopt_jax.laws.operators.experts import make_experts_law
from fleetopt_jax.laws.operators.gemm import make_gemm_law

MAKERS: dict[str, Callable[..., Any]] = {
    "collectives": make_collective_law,
    "decode_attention": make_decode_attention_law,
    "elementwise": make_elementwise_law,
    "experts": make_experts_law,
    "gemm": make_gemm_law,
    "prefill_attention": make_prefill_attention_law,
}


@dataclass(frozen=True, eq=False)
class OperatorEntry:
    """One law, and how far to trust it. Errors are relative, of the kernel timings it was fitted to; None: unknown."""

    law: Any  # the record of its class
    gpu: str  # whose tables it was fitted to
    variant: str  # data type, or kind
    median_error: float | None
    p90_error: float | None
    borrowed: bool  # from another GPU, or another variant


@cache
def document(operator: str) -> dict[str, Any]:
    """The JSON document of a class of operators."""
    text = files("fleetopt_jax.catalog").joinpath("data", "operators", f"{operator}.json").read_text()
    return json.loads(text)


def operator_entry(operator: str, gpu: GpuEntry, variant: str) -> OperatorEntry:
    """The law of a class of operators and a variant of it on a GPU."""
    known = document(operator)["gpus"]
    return _entry(operator, gpu.name if gpu.name in known else gpu.law, variant, gpu.name not in known)


@cache
def _entry(operator: str, gpu: str, variant: str, borrowed: bool) -> OperatorEntry:
    variants = document(operator)["gpus"][gpu]
    if variant not in variants:
        raise ValueError(f"{operator} has no law of {variant} on {gpu}, has {', '.join(variants)}")
    part = variants[variant]
    return OperatorEntry(
        law=MAKERS[operator](**part["coefficients"]),
        gpu=gpu,
        variant=variant,
        median_error=part.get("median_error"),
        p90_error=part.get("p90_error"),
        borrowed=borrowed or "borrowed_from" in part,
    )
