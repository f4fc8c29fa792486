"""`fleetopt trace`: what is in a workload."""

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType

from fleetopt_jax.catalog.workloads import LoadedWorkload, bundled
from fleetopt_jax.cli.answer import Answer, Document
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.inputs import workload_of
from fleetopt_jax.documents.prefix import prefix_to_json
from fleetopt_jax.documents.rates import rates_to_json
from fleetopt_jax.report import tables
from fleetopt_jax.report.prefix import prefix_table
from fleetopt_jax.report.rates import rates_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(options: argparse.Namespace) -> Answer:
    loaded = workload_of(options, need_rate=False)
    summary = loaded.summary
    rate = float(loaded.workload.arrival_rate_per_s)
    document = {
        "name": loaded.name,
        "n_requests": summary.n_requests,
        "mean_prompt_tokens": summary.mean_prompt_tokens,
        "mean_output_tokens": summary.mean_output_tokens,
        "longest_tokens": summary.longest_tokens,
        "arrival_rate_per_s": rate if loaded.rate_known else None,
        "recorded_rate_per_s": summary.arrival_rate_per_s,
        "arrival_scv": summary.arrival_scv,
        "n_atoms": len(loaded.workload.weight),
        "quantiles": {"total_tokens": summary.total_token_quantiles},
        **_understood(loaded),
    }
    about = bundled().get(loaded.name, {})
    document |= rates_to_json(loaded.profile)
    if loaded.prefix:
        recorded = summary.arrival_rate_per_s if loaded.rate_known and options.rate is None else None
        document["prefix"] = prefix_to_json(loaded.prefix, rate if recorded is None else recorded)
    document |= {key: about[key] for key in ("source", "licence", "compression_error") if key in about}
    return Answer(document, _table, OK, _figure if loaded.profile or loaded.prefix else None)


def _understood(loaded: LoadedWorkload) -> dict[str, Any]:
    """What a file was taken for; of a bundled workload, only the requests without output."""
    read, n = loaded.understood, loaded.summary.n_requests
    if read is None:
        workload = loaded.workload
        share = float(np.sum(np.where(np.asarray(workload.output_tokens) == 0, np.asarray(workload.weight), 0.0)))
        return {"zero_output_requests": None if n is None else round(n * share), "warnings": []}
    return {
        "format": read.file_format,
        "details": list(read.details),
        "layout": read.layout,
        "columns": read.columns,
        "time_unit": read.time_unit,
        "time": read.time_note,
        "n_rows": read.n_rows,
        "n_rows_left_out": read.n_dropped,
        "zero_output_requests": read.n_zero_output,
        "zero_output": read.zero_output,
        "warnings": list(read.warnings),
    }


def _table(document: Document) -> RenderableType:
    parts = [tables.trace_table(document)]
    parts += [prefix_table(document)] if "prefix" in document else []
    parts += [rates_table(document)] if document["recorded_rate_per_s"] else []
    return Group(*parts)


def _figure(document: Document) -> "Figure":
    from fleetopt_jax.report.prefix_figure import trace_figure  # and matplotlib, which a table does without

    return trace_figure(document)
