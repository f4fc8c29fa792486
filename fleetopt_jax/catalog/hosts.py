"""Host laws by serving engine and GPU, from `data/hosts.json`, with their errors (`experiments/fit_hosts.py`).

An engine is a name (`vllm`, the newest releases; `vllm-0.11`, `sglang`, `trtllm`); its law has coefficients for dense
LLMs and for mixtures of experts, and for a GPU those of its own where the measurements identify them.

Errors are of whole closed loops, by operators and host together, mean absolute relative ones, of "tpot", "ttft" and
"ttft_8k" (prompts of 8,192 tokens). Blind: of a GPU that was measured, of fits without the LLM; of one that was not, of
fits without the LLM and the GPU; of one whose operators are borrowed, with those of another generation as well. A GPU
and a kind of LLM with fewer than 20 points or 3 LLMs says the error of a wider pool where that is larger. Of a
configuration that was measured, of fits without the point.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetopt_jax.catalog.gpus import GpuEntry, is_catalogs
from fleetopt_jax.catalog.packaged import packaged_json
from fleetopt_jax.core.errors import unknown_name
from fleetopt_jax.laws.host import HostLaw, make_host_law

NEWEST = "vllm"


@dataclass(frozen=True, eq=False)
class HostEntry:
    """One serving engine's law, and how far to trust it on a GPU. Errors are mean absolute relative ones."""

    law: HostLaw
    title: str  # engine and releases
    measured_on: str | None  # the GPU whose measurements are in it; None: of other GPUs
    errors: dict[str, float]  # blind
    projected_errors: dict[str, float]  # where operators are borrowed from another GPU


def document() -> dict[str, Any]:
    """`hosts.json`."""
    return packaged_json("hosts.json")


def serving_engines() -> tuple[str, ...]:
    """The names of the serving engines there is a law of."""
    return tuple(document()["engines"])


def serving_titles() -> dict[str, str]:
    """What each serving engine is called, with its releases."""
    return {name: engine["title"] for name, engine in document()["engines"].items()}


def host_entry(serving: str, gpu: GpuEntry, *, experts: bool) -> HostEntry:
    """The law of a serving engine on a GPU, for dense LLMs or for mixtures of experts."""
    engines = document()["engines"]
    if serving not in engines:
        raise unknown_name("serving", serving, engines)
    engine = engines[serving]
    kind = engine["experts" if experts else "dense"]
    own = kind["gpus"].get(gpu.name) if is_catalogs(gpu) else None
    part = (
        own or kind["gpus"].get(gpu.borrows) or kind["gpus"].get(gpu.law) or kind["others"]
    )  # of its generation, else of all
    measured = own is not None and own["points"] > 0
    return HostEntry(
        law=make_host_law(**part["coefficients"]),
        title=engine["title"],
        measured_on=gpu.name if measured else None,
        errors=part["errors"] if measured else kind["others"]["errors"],
        projected_errors=kind["projected"]["errors"],
    )


def measured_errors(
    serving: str, gpu: str, llms: Sequence[str], precision: str, kv_precision: str, split: Mapping[str, int]
) -> dict[str, float] | None:
    """The errors of a configuration whose serving points were measured, points left out; None where none were. `llms`
    are all names of its architecture, `split` how its GPUs share it ("tp", "ep", "dp", "pp")."""
    how = {"gpu": gpu, "precision": precision, "kv_precision": kv_precision, **split}
    found = (each for each in document()["engines"][serving]["measured"] if each["llm"] in llms)
    return next((each["errors"] for each in found if all(each[name] == value for name, value in how.items())), None)
