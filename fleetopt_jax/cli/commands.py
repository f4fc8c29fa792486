"""The commands: each turns checked options into one JSON document, shown as a table or printed as it is."""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)  # before any array is made: queueing needs float64

import numpy as np  # noqa: E402
from rich.console import Console, RenderableType  # noqa: E402
from rich.progress import Progress  # noqa: E402

from fleetopt_jax.calibrate.document import to_document  # noqa: E402
from fleetopt_jax.calibrate.fit import DecodeFit, fit_decode, fit_power  # noqa: E402
from fleetopt_jax.calibrate.measurements import Measurements, read_measurements  # noqa: E402
from fleetopt_jax.catalog.engines import (  # noqa: E402
    LAWS,
    engine_choice,
    engine_entry,
    engine_points,
    own_fits,
)
from fleetopt_jax.catalog.gpus import GPUS, gpu_entry  # noqa: E402
from fleetopt_jax.catalog.llms import LLMS, LlmEntry, at_precision, catalog_name  # noqa: E402
from fleetopt_jax.catalog.workloads import LoadedWorkload, bundled, load  # noqa: E402
from fleetopt_jax.cli.codes import BUG, INFEASIBLE, OK  # noqa: E402
from fleetopt_jax.cli.door import read_plan  # noqa: E402
from fleetopt_jax.core.errors import BadInput  # noqa: E402
from fleetopt_jax.core.units import MS, US  # noqa: E402
from fleetopt_jax.fleet.assumptions import Assumptions, parse_assumptions  # noqa: E402
from fleetopt_jax.fleet.engine import make_site  # noqa: E402
from fleetopt_jax.fleet.fleet import Slo, make_slo  # noqa: E402
from fleetopt_jax.laws.compression import make_compressor  # noqa: E402
from fleetopt_jax.laws.decode import DecodeStep  # noqa: E402
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS  # noqa: E402
from fleetopt_jax.laws.llm import n_active_params, n_params, weight_bytes  # noqa: E402
from fleetopt_jax.laws.prefill import prefill_s  # noqa: E402
from fleetopt_jax.optimize.plan import EngineChoice, Plan, Problem, make_problem, plan_to_json  # noqa: E402
from fleetopt_jax.optimize.search import evaluate_given, optimize  # noqa: E402
from fleetopt_jax.published.ledger import ledger  # noqa: E402
from fleetopt_jax.published.tables import reproduce  # noqa: E402
from fleetopt_jax.report import tables  # noqa: E402
from fleetopt_jax.report.calibration import calibration_figure, calibration_table  # noqa: E402
from fleetopt_jax.report.figures import check_figure, ledger_figure, write_figure  # noqa: E402
from fleetopt_jax.report.files import check_writable, to_json, write_whole  # noqa: E402
from fleetopt_jax.report.simulation import simulation_json, simulation_table, verified_plan_table  # noqa: E402
from fleetopt_jax.simulate import Simulation, replay_requests, simulate, verify  # noqa: E402
from fleetopt_jax.workload.atoms import share_above  # noqa: E402
from fleetopt_jax.workload.readers import Layout, Trace, read_workload_file  # noqa: E402

PRECISION_NAMES = {"bfloat16": "bf16", "float16": "bf16"}  # as measurements call them

Answer = tuple[dict[str, Any], Callable[[dict[str, Any]], RenderableType], int]  # (document, table, exit code)


def run(options: argparse.Namespace) -> int:
    """Run the command and deliver its answer."""
    if options.out:
        check_writable(options.out)
    document, table, code = COMMANDS[options.command](options)
    text = to_json(document)
    if options.out:
        write_whole(options.out, text + "\n")
    if options.json:
        print(text)
    else:
        tables.show(table(document))
    return code


def _reproduce(options: argparse.Namespace) -> Answer:
    result = reproduce(options.tables)
    document = {
        "tables": {number: [dataclasses.asdict(cell) for cell in cells] for number, cells in result.tables.items()},
        "ratios": {ratio.name: ratio.reproduced for ratio in result.ratios},
        "ratio_details": [dataclasses.asdict(ratio) for ratio in result.ratios],
        "mismatches": result.mismatches,
    }
    return document, tables.reproduction_table, BUG if result.mismatches else OK


def _optimize(options: argparse.Namespace) -> Answer:
    layout = _layout(options)
    assumptions = parse_assumptions(options.assume)
    loaded = load(options.workload, rate_per_s=options.rate, layout=layout)
    choices = _choices(options, assumptions)
    if len({choice.quality == "roofline" for choice in choices}) > 1:
        print(
            "fleetopt optimize: warning: calibrated and roofline engines are not comparable (the roofline law "
            "does not divide the KV cache by TP): part of the difference between these GPUs is the model's",
            file=sys.stderr,
        )
    _require_window("--window", options.window, loaded)
    with _at_door(options.workload):
        problem = make_problem(
            loaded.workload,
            choices,
            slo=_slo(options),
            window_tokens=options.window,
            workload_name=loaded.name,
            n_pools=options.pools,
            gamma=options.gamma,
            objective=options.objective,
            assume=options.assume,
            assumptions=dataclasses.replace(assumptions, output_share=loaded.output_share, dispatch=options.dispatch),
        )
    with _progress(f"Searching ({options.method})") as progress:
        plan = optimize(problem, options.method, progress)
    if plan.binding:
        print(f"fleetopt optimize: infeasible: {_why(plan.binding)}", file=sys.stderr)
        return _plan_document(plan, layout), tables.plan_table, INFEASIBLE
    if not options.verify:
        return _plan_document(plan, layout), tables.plan_table, OK
    plan, verified = _verified(options, plan, layout)
    if not verified["held"]:
        print("fleetopt optimize: infeasible: no fleet that was simulated holds the limits", file=sys.stderr)
    document = _plan_document(plan, layout) | {"verified": verified}
    return document, verified_plan_table, OK if verified["held"] else INFEASIBLE


def _slo(options: argparse.Namespace) -> Slo:
    return make_slo(
        ttft_p99_s=options.ttft_p99_ms * MS,
        ttft_s_per_token=options.ttft_ms_per_1k * MS / 1000.0,
        itl_s=math.inf if options.itl_ms is None else options.itl_ms * MS,
        scope=options.slo_scope,
    )


def _choices(options: argparse.Namespace, assumptions: Assumptions) -> list[EngineChoice]:
    """The engines the options name, as the assumptions have them."""
    site = make_site(
        host_w_per_gpu=options.host_w_per_gpu,
        pue=options.pue,
        usd_per_kwh=options.usd_per_kwh,
        kg_co2_per_kwh=options.kg_co2_per_kwh,
    )
    compressor = make_compressor(
        success_frac=options.compress_success,
        s_per_token=options.compress_ms_per_1k * MS / 1000.0,
        j_per_token=options.compress_j_per_1k / 1000.0,
    )
    return _distinct(
        engine_choice(
            gpu.strip(),
            options.llm,
            options.tp,
            precision=options.precision,
            kv_precision=options.kv_precision,
            engine=assumptions.engine,
            site=site,
            compressor=compressor,
            max_num_seqs=options.max_num_seqs,
        )
        for gpu in options.gpu.split(",")
    )


def _ledger(options: argparse.Namespace) -> Answer:
    loaded = load(options.workload, rate_per_s=options.rate, layout=_layout(options))
    if options.figure:
        check_figure(options.figure)
    _require_window("--window", options.window, loaded)
    with _at_door(options.workload), _progress("Walking from published to physical") as progress:
        rows = ledger(
            loaded.workload,
            lambda assumptions: _choices(options, assumptions),
            slo=_slo(options),
            name=loaded.name,
            knots=loaded.knots,
            output_share=loaded.output_share,
            window_tokens=options.window,
            progress=progress,
        )
    document = {
        "workload": {"name": loaded.name, "arrival_rate_per_s": float(loaded.workload.arrival_rate_per_s)},
        "gpu": options.gpu,
        "llm": options.llm,
        "tp": options.tp,
        "slo": {name: value if name == "scope" else float(value) for name, value in vars(_slo(options)).items()},
        "rows": [row.to_json() for row in rows],
    }
    if options.figure:
        write_figure(ledger_figure(document), options.figure)
    return document, tables.ledger_table, OK


def _engine(options: argparse.Namespace) -> Answer:
    entry = engine_entry(
        options.gpu,
        options.llm,
        options.tp,
        precision=options.precision,
        kv_precision=options.kv_precision,
        own_fit=not options.law,
    )
    engine, points = entry.engine, engine_points(entry, options.batch, options.context, options.prompt_per_output)
    mix = entry.prompt_per_output if options.prompt_per_output is None else options.prompt_per_output
    document = {
        "gpu": entry.gpu,
        "llm": entry.llm,
        "tp": entry.tp,
        "precision": entry.precision,
        "kv_precision": entry.kv_precision,
        "quality": entry.quality,
        "relative_error": entry.step_error,
        "power_relative_error": entry.power_error,
        "source": entry.source,
        "prompt_per_output": mix,
        "kv_capacity_tokens": float(engine.kv.n_blocks) * BLOCK_TOKENS,
        "max_num_seqs": float(engine.kv.max_num_seqs),
        "prefill_s_per_1k_tokens": float(prefill_s(engine.prefill, 1000.0)),
        "prefill_power_w_per_gpu": float(engine.prefill.gpu_w),
        "points": [dataclasses.asdict(point) for point in points],
    }
    return document, tables.engine_table, OK


def _calibrate(options: argparse.Namespace) -> Answer:
    path = options.measurements
    if options.figure:
        check_figure(options.figure)
    measured = read_measurements(path, model=options.model, gpu=options.gpu, tp=options.tp, task=options.task)
    gpu, tp = options.gpu or measured.gpu, options.tp or measured.tp
    llm = options.llm or (catalog_name(measured.llm) if measured.llm else None)
    for name, value in (("--gpu", gpu), ("--llm", llm), ("--tp", tp)):
        if value is None:
            raise BadInput(name, f"{path} does not say it", "give what was measured")
    precision = options.precision or PRECISION_NAMES.get(measured.precision or "", measured.precision)
    law = engine_entry(gpu, llm, tp, precision=precision, own_fit=False)
    step = _fit_step(options.form, measured, law.engine.decode)
    power = None
    if measured.power_w_per_gpu is not None:
        power = fit_power(measured, limit_w=float(gpu_entry(law.gpu).gpu.tdp_w))
    document = to_document(
        step, power, gpu=law.gpu, llm=law.llm, tp=law.tp, precision=law.precision, source=os.path.basename(path)
    )
    if options.figure:
        write_figure(calibration_figure(measured, step, power), options.figure)
    return document, calibration_table, OK


def _fit_step(form: str, measured: Measurements, law: DecodeStep) -> DecodeFit:
    """The asked form; 'auto' takes the one with the least leave-one-out error, for a model with experts."""
    share, per_token_s = float(law.expert_share), float(law.per_token_s)
    if form == "moe" and share == 0:
        raise BadInput("--form moe", "the LLM has no experts", "need dense or auto")
    fits = []
    if form != "moe":
        fits.append(fit_decode(measured, form="dense", per_token_s=per_token_s))
    if form == "moe" or (form == "auto" and share > 0):
        try:
            fits.append(fit_decode(measured, form="moe", expert_share=share, per_token_s=per_token_s))
        except BadInput:
            if form == "moe":
                raise
    return min(fits, key=lambda fit: fit.leave_one_out_mape)


def _plan_document(plan: Plan, layout: Layout | None) -> dict[str, Any]:
    """The plan, with the columns its trace was read by, so that it can be evaluated again."""
    document = plan_to_json(plan)
    if layout:
        document["workload"]["columns"] = dataclasses.asdict(layout)
    return document


def _evaluate(options: argparse.Namespace) -> Answer:
    plan, layout = _given_plan(options)
    if plan.binding:
        print(
            f"fleetopt evaluate: infeasible: {plan.binding['limit']} is {plan.binding['value']:.6g}, "
            f"the limit is {plan.binding['asked']:.6g}",
            file=sys.stderr,
        )
    return _plan_document(plan, layout), tables.plan_table, INFEASIBLE if plan.binding else OK


def _given_plan(options: argparse.Namespace) -> tuple[Plan, Layout | None]:
    """The plan in a file, evaluated under its own workload or the one the options name."""
    given = read_plan(options.plan)
    name = options.workload or given.workload.name
    rate = options.rate or given.workload.arrival_rate_per_s
    columns = given.workload.columns
    layout = _layout(options) or (Layout(**columns.model_dump()) if columns and not options.workload else None)
    loaded = load(name, rate_per_s=rate, layout=layout)
    assumptions = parse_assumptions(given.assume, f"{options.plan}, assume")
    with _at_door(options.plan):
        site, compressor = make_site(**given.site.model_dump()), make_compressor(**given.compressor.model_dump())
    choices = tuple(
        engine_choice(
            pool.engine_file or pool.gpu,
            pool.llm,
            pool.tp,
            precision=pool.precision,
            kv_precision=pool.kv_precision,
            engine=assumptions.engine,
            site=site,
            compressor=compressor,
            max_num_seqs=given.max_num_seqs,
            where=f"{options.plan}, pools.{i}.".__add__,
        )
        for i, pool in enumerate(given.pools)
    )
    last = given.pools[-1]
    _require_window(f"{options.plan}, pools.{len(choices) - 1}.window_tokens", last.gamma * last.window_tokens, loaded)
    with _at_door(options.plan):
        problem = make_problem(
            loaded.workload,
            _distinct(choices),
            slo=make_slo(**given.slo.limits()),
            window_tokens=max(last.window_tokens, float(loaded.workload.longest_tokens)),
            workload_name=loaded.name,
            n_pools=len(choices),
            assume=given.assume,
            assumptions=dataclasses.replace(
                assumptions, output_share=loaded.output_share, dispatch=options.dispatch or given.dispatch
            ),
        )
    plan = evaluate_given(
        problem,
        choices,
        window_tokens=[pool.window_tokens for pool in given.pools],
        gamma=[pool.gamma for pool in given.pools],
        n_instances=[pool.n_instances for pool in given.pools],
    )
    return plan, layout


def _simulate(options: argparse.Namespace) -> Answer:
    plan, layout = _given_plan(options)
    how = _how_to_simulate(options, plan.problem, layout)
    with _simulation_progress() as progress:
        result = simulate(
            plan.fleet, plan.problem.workload, plan.problem.assumptions, plan.problem.slo, progress=progress, **how
        )
    _warn_of_warm_up(options, result)
    if not result.slo_held:
        print("fleetopt simulate: infeasible: the simulated fleet does not hold the limits", file=sys.stderr)
    document = _plan_document(plan, layout)
    document = {
        "workload": document["workload"],
        "slo": document["slo"],
        "assume": document["assume"],
        "dispatch": plan.problem.assumptions.dispatch,
        "arrivals": options.arrivals,
        "seed": options.seed,
        "n_replications": options.replications,
        **simulation_json(result, document["pools"]),
    }
    return document, simulation_table, OK if result.slo_held else INFEASIBLE


def _how_to_simulate(options: argparse.Namespace, problem: Problem, layout: Layout | None) -> dict[str, Any]:
    """`simulate`'s keyword arguments, as the options have them."""
    how = {
        "n_requests": options.requests,
        "n_replications": options.replications,
        "seed": options.seed,
        "staleness_s": options.staleness_ms * MS,
        "router_width": options.router_width or None,
    }
    if options.arrivals == "trace":
        name = problem.workload_name
        trace = None if name in bundled() else read_workload_file(name, layout)
        if not isinstance(trace, Trace) or trace.arrival_s is None or not trace.arrival_s[-1] > 0:
            raise BadInput("--arrivals trace", f"{name} has no time stamps", "need a trace file with arrival times")
        n = options.requests or max(1, len(trace.arrival_s) // options.replications)
        how["requests"] = replay_requests(trace, float(problem.workload.arrival_rate_per_s), n, options.replications)
    elif options.arrivals == "poisson":
        how["arrival_scv"] = 1.0
    return how


@contextmanager
def _simulation_progress():
    """Progress of the pool that is being simulated, on stderr, where that is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Simulating", total=1.0)
        yield lambda what, done: bar.update(task, description=f"Simulating {what}", completed=done)


def _warn_of_warm_up(options: argparse.Namespace, result: Simulation) -> None:
    if not result.warmed_up:
        print(
            f"fleetopt {options.command}: warning: the warm-up of {result.warm_up_s:.3g} s is shorter than three lives "
            "of a sequence: give more --requests",
            file=sys.stderr,
        )


def _verified(options: argparse.Namespace, plan: Plan, layout: Layout | None) -> tuple[Plan, dict[str, Any]]:
    """The plan with as many instances as the simulation asks for, and what it found."""
    problem = plan.problem
    how = _how_to_simulate(options, problem, layout)
    with _simulation_progress() as progress:
        found = verify(plan.fleet, problem.workload, problem.assumptions, problem.slo, progress=progress, **how)
    _warn_of_warm_up(options, found.simulation)
    raised = np.asarray(found.fleet.n_instances) - np.asarray(plan.fleet.n_instances)
    if raised.any():
        given = evaluate_given(
            problem,
            plan.choices,
            window_tokens=np.asarray(found.fleet.window_tokens).tolist(),
            gamma=np.asarray(found.fleet.gamma).tolist(),
            n_instances=np.asarray(found.fleet.n_instances).tolist(),
        )
        plan = dataclasses.replace(given, method=plan.method, search=plan.search)
    document = simulation_json(found.simulation, plan_to_json(plan)["pools"])
    return plan, {"held": found.held, "rounds": found.rounds, "instances_added": int(raised.sum()), **document}


def _trace(options: argparse.Namespace) -> Answer:
    loaded = load(options.workload, rate_per_s=options.rate, layout=_layout(options), need_rate=False)
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
    return document, tables.trace_table, OK


def _catalog(options: argparse.Namespace) -> Answer:
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "gpus": lambda: {name: _numbers(e.gpu) | {"title": e.title, "source": e.source} for name, e in GPUS.items()},
        "llms": lambda: {name: _llm(entry) for name, entry in LLMS.items()},
        "engines": lambda: (
            {
                "/".join(map(str, names)): {
                    "base_s": float(fit.decode.base_s),
                    "step_error": fit.step_error,
                    "power_error": fit.power_error,
                    "quality": "measured",
                    "source": fit.source,
                }
                for names, fit in own_fits().items()
            }
            | {
                f"any LLM on {gpu}": {
                    "base_s": None,
                    "step_error": law.step_error,
                    "power_error": law.power_error,
                    "quality": law.quality,
                    "source": law.source,
                }
                for gpu, law in LAWS.items()
            }
        ),
        "workloads": bundled,
    }
    asked = [options.part] if options.part else list(parts)
    return {part: parts[part]() for part in asked}, tables.catalog_tables, OK


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


COMMANDS: dict[str, Callable[[argparse.Namespace], Answer]] = {
    "reproduce": _reproduce,
    "optimize": _optimize,
    "evaluate": _evaluate,
    "simulate": _simulate,
    "ledger": _ledger,
    "engine": _engine,
    "calibrate": _calibrate,
    "trace": _trace,
    "catalog": _catalog,
}


def _distinct(choices: Iterable[EngineChoice]) -> list[EngineChoice]:
    return list({(choice.file or choice.gpu, choice.llm, choice.tp): choice for choice in choices}.values())


def _require_window(where: str, window_tokens: float | None, loaded: LoadedWorkload) -> None:
    """Refuse a last window that does not hold the longest request, saying how many requests would not fit."""
    longest = float(loaded.workload.longest_tokens)
    if window_tokens is None or window_tokens >= longest:
        return
    share = float(share_above(loaded.workload, window_tokens))
    count = loaded.summary.n_requests
    would_not_fit = f"{share:.4%} of the requests" + (f", about {share * count:,.0f} of {count:,}," if count else "")
    raise BadInput(
        where,
        f"{window_tokens:.0f} tokens: {would_not_fit} would not fit",
        f"need >= {longest:.0f}, the longest of {loaded.name}",
    )


def _layout(options: argparse.Namespace) -> Layout | None:
    named = (options.prompt_column, options.output_column, options.time_column, options.time_unit)
    if not any(named):
        return None
    if not (options.prompt_column and options.output_column):
        raise BadInput("--prompt-column, --output-column", "not both are given", "need both to read another layout")
    unit_s = {"s": 1.0, "ms": MS, "us": US}[options.time_unit or "s"]
    return Layout(options.prompt_column, options.output_column, options.time_column, unit_s)


def _numbers(record: Any) -> dict[str, float]:
    return {name: float(np.asarray(value)) for name, value in vars(record).items()}


def _why(binding: dict[str, Any]) -> str:
    """Which limit cannot be held, and what can; a time is rounded up, so that asking for it succeeds."""
    asked, nearest = binding["asked"], binding["nearest_feasible"]
    if binding["limit"] == "window_tokens":
        return (
            f"no engine holds a sequence of the {asked:.0f}-token window; the largest one holds is {nearest:.0f} tokens"
        )
    reachable_ms = np.ceil(nearest / MS * 10) / 10
    if binding["limit"] == "itl_s":
        return f"no fleet holds a mean ITL of {asked / MS:g} ms; the smallest reachable is {reachable_ms:.1f} ms"
    return f"no fleet holds a P99 TTFT of {asked / MS:g} ms; the smallest reachable is {reachable_ms:.1f} ms"


@contextmanager
def _at_door(where: str):
    """Refusals of the library's own checks, said with the option they came from."""
    try:
        yield
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(where, str(error)) from None


@contextmanager
def _progress(title: str):
    """A progress bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
