"""`fleetopt catalog`: what is known by name."""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from fleetopt_jax.catalog.engines import law_of, own_fits
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.llms import LLMS, LlmEntry, at_precision
from fleetopt_jax.catalog.workloads import bundled
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.laws.llm import n_active_params, n_params, weight_bytes
from fleetopt_jax.report import tables


def run(options: argparse.Namespace) -> Answer:
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "gpus": lambda: {name: _numbers(e.gpu) | {"title": e.title, "source": e.source} for name, e in GPUS.items()},
        "llms": lambda: {name: _llm(entry) for name, entry in LLMS.items()},
        "engines": _engines,
        "workloads": bundled,
    }
    if options.part == "schemas":
        # models of every file, which nothing else here needs
        from fleetopt_jax.cli.scenario import Scenario
        from fleetopt_jax.documents.schemas import schemas

        return Answer({"schemas": schemas({"scenario": Scenario})}, tables.schemas_table, OK)
    asked = [options.part] if options.part else list(parts)
    return Answer({part: parts[part]() for part in asked}, tables.catalog_tables, OK)


def _engines() -> dict[str, Any]:
    """Configurations with a fit of their own, then the law of each GPU."""
    fits = {
        "/".join(map(str, names)): {
            "base_s": float(fit.decode.base_s),
            "step_error": fit.step_error,
            "power_error": fit.power_error,
            "quality": "measured",
            "source": fit.source,
        }
        for names, fit in own_fits().items()
    }
    laws = {
        f"any LLM on {name}": {
            "base_s": None,
            "step_error": law.step_error,
            "power_error": law.power_error,
            "quality": law.quality,
            "source": law.source,
        }
        for name, law in sorted(((name, law_of(entry)) for name, entry in GPUS.items()), key=lambda each: each[0])
    }
    return fits | laws


def _llm(entry: LlmEntry) -> dict[str, Any]:
    llm = at_precision(entry.architecture)
    return {
        "n_params": float(n_params(llm)),
        "n_active_params": float(n_active_params(llm)),
        "n_layers": float(llm.n_layers),
        "weight_bytes": float(weight_bytes(llm)),
        "precision": entry.architecture.native_precision,
        "kv_bytes_per_token": float(llm.kv_bytes_per_token),
        "title": entry.title,
        "source": entry.source,
    }


def _numbers(record: Any) -> dict[str, float]:
    return {name: float(np.asarray(value)) for name, value in vars(record).items()}
