"""Operator laws by GPU and data type, from `data/operators/*.json`, each with its error.

A file is a class of operators, written by `experiments/fit_operators.py`: {"gpus": {GPU: {VARIANT: {"coefficients",
"median_error", ...}}}}. A GPU without tables borrows those of the generation its data sheet names (`GpuEntry.law`): all
coefficients are shares of data-sheet peaks, and launches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.catalog.packaged import packaged_json
from fleetopt_jax.laws.operators.attention import make_decode_attention_law, make_prefill_attention_law
from fleetopt_jax.laws.operators.collectives import make_collective_law
from fleetopt_jax.laws.operators.elementwise import make_elementwise_law
from fleetopt_jax.laws.operators.experts import make_experts_law
from fleetopt_jax.laws.operators.gemm import make_gemm_law
from fleetopt_jax.laws.operators.latent_attention import make_latent_attention_law
from fleetopt_jax.laws.operators.recurrent import make_recurrent_decode_law, make_recurrent_prefill_law
from fleetopt_jax.laws.operators.watts import make_serving_watts

MAKERS: dict[str, Callable[..., Any]] = {
    "collectives": make_collective_law,
    "decode_attention": make_decode_attention_law,
    "elementwise": make_elementwise_law,
    "experts": make_experts_law,
    "gemm": make_gemm_law,
    "latent_attention": make_latent_attention_law,
    "prefill_attention": make_prefill_attention_law,
    "serving_watts": make_serving_watts,
    "recurrent": lambda **values: _RECURRENT["walk_s" in values](**values),
}
_RECURRENT = {True: make_recurrent_prefill_law, False: make_recurrent_decode_law}


@dataclass(frozen=True, eq=False)
class OperatorEntry:
    """One law, and how far to trust it. Errors are relative, of the kernel timings it was fitted to; None: unknown."""

    law: Any  # the record of its class
    gpu: str  # whose tables it was fitted to
    variant: str  # data type, or kind
    median_error: float | None
    p90_error: float | None
    mean_errors: dict[str, float]  # where a law was fitted to serving: on LLMs left out, of "dense" and "experts"
    borrowed: bool  # from another GPU, or another variant


def document(operator: str) -> dict[str, Any]:
    """The JSON document of a class of operators."""
    return packaged_json("operators", f"{operator}.json")


def operator_entry(operator: str, gpu: GpuEntry, *variants: str) -> OperatorEntry:
    """The law of a class of operators on a GPU, in the first of `variants` that it has there."""
    known = document(operator)["gpus"]
    of = gpu.name if gpu.name in known else gpu.law
    found = next((variant for variant in variants if variant in known[of]), None)
    if found is None:
        raise ValueError(f"{operator} has no law of {' or '.join(variants)} on {of}, has {', '.join(known[of])}")
    return _entry(operator, of, found, of != gpu.name or found != variants[0])


@cache
def _entry(operator: str, gpu: str, variant: str, borrowed: bool) -> OperatorEntry:
    whole = document(operator)
    part = whole["gpus"][gpu][variant]
    lent = borrowed or "borrowed_from" in part
    return OperatorEntry(
        law=MAKERS[operator](**part["coefficients"]),
        gpu=gpu,
        variant=variant,
        median_error=part.get("median_error"),
        p90_error=part.get("p90_error"),
        mean_errors=whole.get("borrowed_blind_mean_error", {}) if lent else part.get("blind_mean_error", {}),
        borrowed=lent,
    )
