"""Operator laws by GPU and data type, from `data/operators/*.json`, each with its error.

A file is a class of operators, written by `experiments/fit_operators.py`: {"gpus": {GPU: {VARIANT: {"coefficients",
"median_error", ...}}}}. A GPU that its owner timed has operators of its own (`GpuEntry.operators`). What was not timed
is borrowed from the GPU that it names (`borrows`), else from the generation of its data sheet (`law`): all coefficients
are shares of data-sheet peaks, and launches.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from fleetopt_jax.catalog.gpus import GPUS, GpuEntry, OwnOperator, is_catalogs
from fleetopt_jax.catalog.packaged import packaged_json
from fleetopt_jax.core.errors import BadField, unknown_name
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
# What a data sheet allows, with room for peaks that are said too low: inverse shares and shares of its figures.
LEAST = {"byte_excess": 0.5, "flop_excess": 0.2}
MOST = {"efficiency": 2.0, "direct_efficiency": 2.0, "ring_efficiency": 2.0}
_RECURRENT = {True: make_recurrent_prefill_law, False: make_recurrent_decode_law}


@dataclass(frozen=True, eq=False)
class OperatorEntry:
    """One law, and how far to trust it. Errors are relative, of the kernel timings it was fitted to; None: unknown."""

    law: Any  # the record of its class
    operator: str  # its class
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
    """The law of a class of operators on a GPU, in the first of `variants` that it has there, its own or borrowed."""
    own = {each.variant: each for each in gpu.operators if each.operator == operator}
    known, of = document(operator)["gpus"], lender(gpu)
    found = next((variant for variant in variants if variant in own or variant in known[of]), None)
    if found is None:
        raise ValueError(f"{operator} has no law of {' or '.join(variants)} on {of}, has {', '.join(known[of])}")
    if found in own:
        return _own_entry(own[found], gpu.name, found != variants[0])
    return _entry(operator, of, found, not is_catalogs(gpu) or found != variants[0])


def lender(gpu: GpuEntry) -> str:
    """The GPU of the catalog whose tables say what was not timed on a GPU by its owner; itself, if it has tables."""
    return gpu.borrows or (gpu.name if gpu.name in GPUS else gpu.law)


def own_operator(operator: str, variant: str, fitted: Mapping[str, Any]) -> OwnOperator:
    """An operator of one's own GPU, checked; `fitted` are the fields of `OwnOperator`. Raises BadField."""
    if operator not in MAKERS:
        raise unknown_name("operators", operator, MAKERS)
    known = {name: part for of in document(operator)["gpus"].values() for name, part in of.items()}
    if variant not in known:
        raise unknown_name(f"operators.{operator}", variant, known)
    found = OwnOperator(operator, variant, **{**fitted, "coefficients": tuple(fitted["coefficients"].items())})
    needed, place = known[variant]["coefficients"], f"operators.{operator}.{variant}.coefficients"
    for name in {**fitted["coefficients"], **needed}:
        if name not in fitted["coefficients"] or name not in needed:
            problem = f"has {'a' if name in fitted['coefficients'] else 'no'} {name}"
            raise BadField(place, problem, f"need {', '.join(sorted(needed))}")
    try:
        MAKERS[operator](**fitted["coefficients"])
    except ValueError as error:
        raise BadField(place, f"{error}") from None
    for name, value in fitted["coefficients"].items():
        if value < LEAST.get(name, -math.inf) or value > MOST.get(name, math.inf):
            allowed = f"need at least {LEAST[name]:g}" if name in LEAST else f"need at most {MOST[name]:g}"
            raise BadField(place, f"{name} = {value:g} is faster than the data sheet's peaks", allowed)
    return found


@cache
def _own_entry(found: OwnOperator, gpu: str, borrowed: bool) -> OperatorEntry:
    return OperatorEntry(
        law=MAKERS[found.operator](**dict(found.coefficients)),
        operator=found.operator,
        gpu=gpu,
        variant=found.variant,
        median_error=found.median_error,
        p90_error=found.p90_error,
        mean_errors={},
        borrowed=borrowed,
    )


@cache
def _entry(operator: str, gpu: str, variant: str, borrowed: bool) -> OperatorEntry:
    whole = document(operator)
    part = whole["gpus"][gpu][variant]
    lent = borrowed or "borrowed_from" in part
    return OperatorEntry(
        law=MAKERS[operator](**part["coefficients"]),
        operator=operator,
        gpu=gpu,
        variant=variant,
        median_error=part.get("median_error"),
        p90_error=part.get("p90_error"),
        mean_errors=whole.get("borrowed_blind_mean_error", {}) if lent else part.get("blind_mean_error", {}),
        borrowed=lent,
    )
