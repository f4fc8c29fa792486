"""`fleetopt trace`: what is in a workload."""

import argparse

from fleetopt_jax.catalog.workloads import bundled
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.inputs import workload_of
from fleetopt_jax.report import tables


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
    }
    about = bundled().get(loaded.name, {})
    document |= {key: about[key] for key in ("source", "licence", "compression_error") if key in about}
    return Answer(document, tables.trace_table, OK)
