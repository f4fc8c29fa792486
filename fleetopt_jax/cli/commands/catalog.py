"""`fleetopt catalog`: what is known by name."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fleetopt_jax.catalog.engines import law_of, own_fits
from fleetopt_jax.catalog.gpus import GPUS, GpuEntry
from fleetopt_jax.catalog.llms import (
    KV_BYTES,
    LLMS,
    LlmEntry,
    checkpoint_size_bytes,
    held_at,
    llm_entry,
    padding_bytes,
)
from fleetopt_jax.catalog.own import Catalog
from fleetopt_jax.catalog.workloads import bundled
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.terminal import warn
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.own_catalog import load_catalog
from fleetopt_jax.laws.llm import EMBEDDING_BYTES
from fleetopt_jax.report import tables


def run(options: argparse.Namespace) -> Answer:
    catalog = load_catalog(options.catalog) if options.catalog else Catalog()
    gpus = {name: catalog.gpu_entry(name) for name in (*GPUS, *(gpu.name for gpu in catalog.gpus))}
    llms = LLMS | {entry.title: entry for entry in catalog.llms}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "gpus": lambda: {name: _numbers(e.gpu) | {"title": e.title, "source": e.source} for name, e in gpus.items()},
        "llms": lambda: {name: _llm(entry) for name, entry in llms.items()},
        "engines": lambda: _engines(gpus),
        "workloads": bundled,
    }
    if options.part == "llm":
        return _one_llm(options, catalog)
    if options.llm is not None:
        raise BadInput("llm", options.llm, f"catalog {options.part} takes no name: catalog llm does")
    if options.part == "schemas":
        # models of every file, which nothing else here needs
        from fleetopt_jax.cli.scenario import Scenario
        from fleetopt_jax.documents.schemas import schemas

        return Answer({"schemas": schemas({"scenario": Scenario})}, tables.schemas_table, OK)
    asked = [options.part] if options.part else list(parts)
    return Answer({part: parts[part]() for part in asked}, tables.catalog_tables, OK)


def _engines(gpus: Mapping[str, GpuEntry]) -> dict[str, Any]:
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
        for name, law in sorted(((name, law_of(entry)) for name, entry in gpus.items()), key=lambda each: each[0])
    }
    return fits | laws


def _llm(entry: LlmEntry) -> dict[str, Any]:
    a = entry.architecture
    return {
        "n_params": float(a.n_params),
        "n_active_params": float(a.n_active_params),
        "n_layers": float(a.layers),
        "weight_bytes": checkpoint_size_bytes(a),
        "precision": a.native_precision,
        "kv_bytes_per_token": KV_BYTES[a.native_kv_precision] * a.kv_values_per_token,
        "title": entry.title,
        "source": entry.source,
    }


def _one_llm(options: argparse.Namespace, catalog: Catalog) -> Answer:
    """One LLM in full: what it is made of, how its checkpoint holds it, and how its file was understood."""
    if options.llm is None:
        raise BadInput("catalog llm", "names no LLM", "need a NAME of catalog llms, or the FILE of a config.json")
    entry = llm_entry(catalog.llm(options.llm))
    a = entry.architecture
    how, shares = held_at(a, a.native_precision), dict(entry.quantized)
    parts = {
        "attention": (a.attention_params, how.attention_bytes),
        "dense": (a.dense_params, how.dense_bytes),
        "expert": (a.expert_params, how.expert_bytes),
        "lm_head": (a.lm_head_params, how.lm_head_bytes),
        "embedding": (a.embedding_params, EMBEDDING_BYTES * a.embedding_params),
    }
    for warning in entry.warnings:
        warn(options, warning)
    document = {
        "llm": entry.title,
        "family": entry.family or a.family,
        "total_params": a.n_params,
        "active_params": a.n_active_params,
        "weight_bytes": checkpoint_size_bytes(a),
        "loaded_weight_bytes": checkpoint_size_bytes(a) + padding_bytes(a, a.native_precision),
        "kv_bytes_per_token": KV_BYTES[a.native_kv_precision] * a.kv_values_per_token,
        "precision": a.native_precision,
        "kv_precision": a.native_kv_precision,
        "quantized_from": entry.quantized_from,
        "parts": {
            name: {"params": params, "bytes": nbytes, "quantized_frac": shares.get(name)}
            for name, (params, nbytes) in parts.items()
            if params
        },
        "layers": a.layers,
        "q_heads": a.q_heads,
        "kv_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "n_experts": a.n_experts,
        "experts_per_token": a.experts_per_token,
        "window_tokens": a.window_tokens,
        "windowed_layers": a.windowed_layers,
        "cacheless_layers": a.cacheless_layers,
        "max_position_tokens": entry.max_position_tokens,
        "left_out": list(entry.left_out),
        "draft_bytes": entry.draft_bytes,
        "no_engine": a.no_law or None,
        "source": entry.source,
        "warnings": list(entry.warnings),
    }
    return Answer(document, tables.llm_table, OK)


def _numbers(record: Any) -> dict[str, float]:
    return {name: float(np.asarray(value)) for name, value in vars(record).items()}
