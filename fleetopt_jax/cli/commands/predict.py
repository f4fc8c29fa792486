"""`fleetopt predict`: what a closed-loop benchmark would show, beside what one did."""

import argparse
import dataclasses
import math
from collections.abc import Sequence

from fleetopt_jax.calibrate.points import Point, benchmark, read_points
from fleetopt_jax.calibrate.predict import Prediction
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.hosts import NEWEST
from fleetopt_jax.catalog.own import Catalog
from fleetopt_jax.catalog.spec import DEFAULT_LLM, DEFAULT_TP, EngineSpec
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.inputs import at_door, catalog_of, named_spec, say_llm, warn_of_units
from fleetopt_jax.cli.terminal import progress, understood
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.documents.engine import load_engine
from fleetopt_jax.documents.predict import TOO_LONG, Case, predict, predict_to_json
from fleetopt_jax.fleet.engine import DoesNotFit
from fleetopt_jax.report.predict import predict_figure, predict_table

DEFAULT_GPU, DEFAULT_TOKENS = "h100", 1024


def run(options: argparse.Namespace) -> Answer:
    cases, skipped = _of_file(options) if options.points else (_asked(options), [])
    document = predict_to_json(cases, _predictions(options, cases), skipped)
    if not document["points"] and not options.points:
        raise BadInput("--isl", TOO_LONG, "need shorter requests, or more GPUs per instance")
    drawable = bool(document["points"])
    return Answer(document, predict_table, OK, predict_figure if drawable else None)


def _asked(options: argparse.Namespace) -> list[Case]:
    """A point for each concurrency of the options."""
    gpu, llm, tp = options.gpu or DEFAULT_GPU, options.llm or DEFAULT_LLM, options.tp or DEFAULT_TP
    with at_door(gpu):
        catalog = catalog_of(options)
        say_llm(argparse.Namespace(**vars(options) | {"gpu": gpu, "llm": llm}), catalog)
        how = _divided(options, Point(0)) | {"serving": options.serving or NEWEST}
        spec = _as_run(options, named_spec(catalog, gpu, llm, tp, options.precision, **how))
        entry = engine_entry(spec)
    warn_of_units(options, [entry.spec])
    isl, osl = options.isl or DEFAULT_TOKENS, options.osl or DEFAULT_TOKENS
    how = {"spread": options.length_spread, "n_requests": options.requests}
    return [Case(entry, benchmark(Point(0, concurrency=n), isl, osl, **how)) for n in options.concurrency]


def _of_file(options: argparse.Namespace) -> tuple[list[Case], list[tuple[int | None, str]]]:
    """The points of a file that can be predicted, and the rows that cannot, each with why."""
    file, catalog = read_points(options.points), catalog_of(options)
    cases, skipped = [], []
    for point in file.points:
        found = _case(options, catalog, point)
        if isinstance(found, Case):
            cases.append(found)
        else:
            skipped.append((point.row, found))
    if not options.quiet:
        understood(options, f"read {file.source} as {file.layout}: {len(file.points):,} rows")
    return cases, skipped


def _case(options: argparse.Namespace, catalog: Catalog, point: Point) -> Case | str:
    """What a row asks for, as the options have it, else the row; or why it cannot be predicted."""
    gpu, llm, tp = options.gpu or point.gpu, options.llm or point.llm, options.tp or point.tp
    if gpu and gpu.lower().endswith(".json"):  # which says what was calibrated
        own = load_engine(gpu, catalog)
        llm, tp = llm or own.llm_name, own.tp
    precision, serving = options.precision or point.precision, options.serving or point.serving or NEWEST
    isl, osl = options.isl or point.isl, options.osl or point.osl
    if point.why and not (options.llm and "LLM" in point.why) and not (options.precision and "precision" in point.why):
        return point.why
    said = {"--gpu": gpu, "--llm": llm, "--tp": tp, "--isl": isl, "--osl": osl, "concurrency": point.concurrency}
    for name, value in said.items():
        if not value:
            return f"{name.removeprefix('--')} is not said" + (f": give {name}" if name.startswith("--") else "")
    assert gpu and llm and tp and isl and osl and point.concurrency  # as was just checked
    try:
        spec = named_spec(catalog, gpu, llm, tp, precision, **_divided(options, point), serving=serving)
        entry = engine_entry(_as_run(options, spec))
    except DoesNotFit:
        n_gpus = tp * math.prod(_divided(options, point)[name] for name in ("dp", "pp"))
        return f"{llm} at {precision or 'its own precision'} does not fit on {n_gpus} x {gpu}"
    except BadField as error:
        unknown = error.problem.startswith("unknown name")  # and what is known would fill the line
        return f"{error.field}: {error.problem}" + ("" if unknown else f"; {error.allowed}")
    load = benchmark(point, isl, osl, spread=options.length_spread, n_requests=options.requests)
    return Case(entry, load, point.row, point.seen(entry.spec.split.n_gpus))


def _divided(options: argparse.Namespace, point: Point) -> dict[str, int]:
    """What divides an instance besides tensor parallelism: as the options have it, else the row."""
    return {name: getattr(options, name) or getattr(point, name) for name in ("ep", "dp", "pp")}


def _as_run(options: argparse.Namespace, spec: EngineSpec) -> EngineSpec:
    """The spec as the options run it."""
    names = ("kv_precision", "max_num_seqs", "max_num_batched_tokens")
    as_run = {name: getattr(options, name) for name in names}
    as_run = {name: value for name, value in as_run.items() if value is not None}
    as_run |= {"memory_utilization": options.gpu_memory_utilization, "power_limit_w": options.gpu_power_limit_w}
    return dataclasses.replace(spec, **as_run)


def _predictions(options: argparse.Namespace, cases: Sequence[Case]) -> list[Prediction | None]:
    """Of every case; those of one engine are computed together."""
    groups: dict[EngineSpec, list[int]] = {}
    for i, case in enumerate(cases):
        groups.setdefault(case.entry.spec, []).append(i)
    found: list[Prediction | None] = [None] * len(cases)
    with progress(options, "Predicting") as tell:
        done = 0
        for spec, places in groups.items():
            for i, each in zip(places, predict(spec, [cases[i].benchmark for i in places]), strict=True):
                found[i] = each
            done += len(places)
            tell(done, len(cases))
    return found
