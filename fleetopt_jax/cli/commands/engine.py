"""`fleetopt engine`: one engine at several batches."""

import argparse
import dataclasses
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fleetopt_jax.calibrate.measurements import Measurements, read_measurements
from fleetopt_jax.catalog.engines import engine_entry, engine_points, prompt_of_mix
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.inputs import at_door, catalog_of, drafts_asked, named_spec, say_llm, served, warn_of_units
from fleetopt_jax.cli.terminal import warn
from fleetopt_jax.documents.drafts import drafts_to_json
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.laws.prefill import prefill_s
from fleetopt_jax.report import tables
from fleetopt_jax.report.power import engine_figure

N_DRAWN = 48  # points of the line
BEYOND = 2.0  # how far it goes past the batches asked for and measured, either way


def run(options: argparse.Namespace) -> Answer:
    with at_door(options.gpu):
        catalog, own_fit = catalog_of(options), not options.law
        warnings = say_llm(options, catalog)
        names = options.gpu, options.llm, options.tp, options.precision
        spec = named_spec(catalog, *names, own_fit=own_fit, **served(options))
        as_run = {"kv_precision": options.kv_precision, "memory_utilization": options.gpu_memory_utilization}
        as_run |= {"power_limit_w": options.gpu_power_limit_w}
        as_run |= {"max_num_batched_tokens": options.max_num_batched_tokens, "speculate": drafts_asked(options)[0]}
        entry = engine_entry(dataclasses.replace(spec, **as_run))
    warnings += warn_of_units(options, [entry.spec])
    measured = _measured(options, entry.spec) if options.measured else None
    engine, asked = entry.engine, (options.context, options.prompt_per_output, options.prompt_tokens)
    points = engine_points(entry, options.batch, *asked)
    mix = entry.prompt_per_output if options.prompt_per_output is None else options.prompt_per_output
    prompt = prompt_of_mix(options.context, mix) if options.prompt_tokens is None else options.prompt_tokens
    document = {
        "gpu": entry.spec.gpu_name,
        "llm": entry.spec.llm_name,
        **vars(entry.spec.split),
        "serving": entry.spec.serving,
        "precision": entry.spec.precision,
        "kv_precision": entry.spec.kv_precision,
        "quality": entry.quality,
        "relative_error": entry.step_error,
        "power_relative_error": entry.power_error,
        "source": entry.source,
        "prefill_relative_error": entry.prefill_error,
        "of_catalog": list(entry.of_catalog),
        "prompt_per_output": mix,
        "prompt_tokens": prompt,
        "memory_utilization": entry.spec.memory_utilization,
        "power_limit_w": entry.spec.power_limit_w,
        "kv_capacity_tokens": float(engine.kv.n_blocks) * BLOCK_TOKENS,
        "max_num_seqs": float(engine.kv.max_num_seqs),
        "max_num_batched_tokens": float(engine.prefill.budget_tokens),
        "prefill_s_per_1k_tokens": float(prefill_s(engine.prefill, 1000.0)),
        "prefill_power_w_per_gpu": float(engine.prefill.gpu_w),
        "speculate": drafts_to_json(entry.spec.drafts) if entry.spec.drafts else None,
        "points": [dataclasses.asdict(point) for point in points],
        "warnings": warnings,
    }

    def draw(shown: dict[str, Any]) -> Figure:
        batches = [*options.batch, *(() if measured is None else measured.batch)]
        ends = max(min(batches) / BEYOND, 1.0), max(batches) * BEYOND  # a line, even of one batch
        drawn = np.geomspace(*ends, N_DRAWN).tolist()
        line = engine_points(entry, drawn, *asked)
        steps = []
        if measured is not None:  # as they were measured: in their context, without prefill
            contexts = measured.context_tokens
            alike = options.context if contexts is None else float(contexts.mean())
            steps = engine_points(entry, drawn, alike, 0.0)
        between, alone = ([dataclasses.asdict(point) for point in each] for each in (line, steps))
        return engine_figure(shown, between, alone, measured)

    return Answer(document, tables.engine_table, OK, draw)


def _measured(options: argparse.Namespace, spec: EngineSpec) -> Measurements:
    """The rows of --measured that are of this engine, and what is to be known of them."""
    measured = read_measurements(options.measured, of=spec)
    if measured.n_left_out:
        n = measured.n_left_out
        warn(options, f"{options.measured}: {n:,} row{'s are' if n > 1 else ' is'} of other engines, left out")
    for note in measured.notes:
        warn(options, f"{options.measured}: {note}")
    return measured
