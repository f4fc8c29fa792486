"""The commands: each turns checked options into one JSON document, shown as a table or printed as it is."""

import argparse
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
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
from fleetopt_jax.catalog.llms import LLMS, LlmEntry, at_precision, catalog_name, llm_entry  # noqa: E402
from fleetopt_jax.catalog.workloads import LoadedWorkload, bundled, load  # noqa: E402
from fleetopt_jax.cli.codes import BUG, INFEASIBLE, OK  # noqa: E402
from fleetopt_jax.cli.door import read_plan  # noqa: E402
from fleetopt_jax.cli.main import AXES  # noqa: E402
from fleetopt_jax.core.errors import BadInput  # noqa: E402
from fleetopt_jax.core.units import KW, MS, US  # noqa: E402
from fleetopt_jax.fleet.assumptions import Assumptions, parse_assumptions  # noqa: E402
from fleetopt_jax.fleet.engine import DoesNotFit, make_site  # noqa: E402
from fleetopt_jax.fleet.evaluate import Objective  # noqa: E402
from fleetopt_jax.fleet.fleet import Slo, make_slo  # noqa: E402
from fleetopt_jax.laws.compression import make_compressor  # noqa: E402
from fleetopt_jax.laws.decode import DecodeStep  # noqa: E402
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS  # noqa: E402
from fleetopt_jax.laws.llm import n_active_params, n_params, weight_bytes  # noqa: E402
from fleetopt_jax.laws.prefill import prefill_s  # noqa: E402
from fleetopt_jax.optimize.levers import Spec, levers_to_json, pull_levers  # noqa: E402
from fleetopt_jax.optimize.pareto import checked_objectives, front_to_json, pareto  # noqa: E402
from fleetopt_jax.optimize.plan import (  # noqa: E402
    Budget,
    EngineChoice,
    Plan,
    Problem,
    Tunable,
    make_budget,
    make_problem,
    plan_to_json,
    tuned_choice,
)
from fleetopt_jax.optimize.robust import require_window, robust, robust_to_json  # noqa: E402
from fleetopt_jax.optimize.search import default_method, evaluate_given, optimize  # noqa: E402
from fleetopt_jax.optimize.sensitivity import sensitivity, sensitivity_to_json  # noqa: E402
from fleetopt_jax.published.ledger import PAPER_WINDOWS, ledger  # noqa: E402
from fleetopt_jax.published.tables import reproduce  # noqa: E402
from fleetopt_jax.report import tables  # noqa: E402
from fleetopt_jax.report.calibration import calibration_figure, calibration_table  # noqa: E402
from fleetopt_jax.report.figures import check_figure, ledger_figure, write_figure  # noqa: E402
from fleetopt_jax.report.files import check_writable, to_json, write_whole  # noqa: E402
from fleetopt_jax.report.levers import levers_figure, levers_table  # noqa: E402
from fleetopt_jax.report.pareto import (  # noqa: E402
    axis_csv,
    axis_figure,
    axis_table,
    front_csv,
    front_figure,
    front_table,
)
from fleetopt_jax.report.sensitivity import robust_plan_table, sensitivity_table, tornado_figure  # noqa: E402
from fleetopt_jax.report.simulation import simulation_json, simulation_table, verified_plan_table  # noqa: E402
from fleetopt_jax.simulate import Simulation, replay_requests, simulate, verify  # noqa: E402
from fleetopt_jax.workload.atoms import Workload, share_above, with_rate  # noqa: E402
from fleetopt_jax.workload.readers import Layout, Trace, read_workload_file  # noqa: E402

NEXT_GPU = {"a100": "h100", "l40s": "h100", "h100": "b200", "h200": "b200", "b200": "gb200"}
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
    loaded = load(options.workload, rate_per_s=options.rate, layout=layout)
    _require_window("--window", options.window, loaded)
    problem = _problem(options, loaded, options.objective, _budget(options), options.free)
    method = options.method or default_method(problem.slo)
    if len({choice.quality == "roofline" for choice in problem.choices}) > 1:
        print(
            "fleetopt optimize: warning: calibrated and roofline engines are not comparable (the roofline law "
            "does not divide the KV cache by TP): part of the difference between these GPUs is the model's",
            file=sys.stderr,
        )
    tomorrow = _tomorrow(options, problem)
    with _progress(f"Searching ({method})") as progress:
        plan = optimize(problem, method, progress)
    if plan.binding:
        print(f"fleetopt optimize: infeasible: {_why(plan.binding)}", file=sys.stderr)
        return _plan_document(plan, layout), tables.plan_table, INFEASIBLE
    extras, table = {}, tables.plan_table
    if options.robust:
        plan, extras = _robust(options, problem, plan, tomorrow)
        table = robust_plan_table
    if not options.verify:
        return _plan_document(plan, layout) | extras, table, OK
    plan, verified = _verified(options, plan, layout)
    if not verified["held"]:
        print("fleetopt optimize: infeasible: no fleet that was simulated holds the limits", file=sys.stderr)
    document = _plan_document(plan, layout) | extras | {"verified": verified}
    return document, verified_plan_table, OK if verified["held"] else INFEASIBLE


def _tomorrow(options: argparse.Namespace, problem: Problem) -> list[tuple[str, Workload]]:
    """The workloads a robust plan must live with besides its own."""
    if options.robust_workloads and not options.robust:
        raise BadInput("--robust-workloads", "only read with --robust", "give --robust quantile or --robust cvar")
    try:
        others = [load(name.strip(), rate_per_s=options.rate) for name in options.robust_workloads]
    except BadInput as error:
        raise BadInput("--robust-workloads", str(error).removeprefix("--workload: ")) from None
    found = [(other.name, other.workload) for other in others]
    require_window(problem, found)
    return found


def _robust(
    options: argparse.Namespace, problem: Problem, nominal: Plan, tomorrow: list[tuple[str, Workload]]
) -> tuple[Plan, dict[str, Any]]:
    """The plan with the best lower tail over engine errors and the workloads named, and what it was chosen from."""
    with _progress("Searching scenarios") as progress:
        found = robust(
            problem,
            nominal,
            measure=options.robust,
            level=options.robust_level,
            workloads=tomorrow,
            method=options.method,
            progress=progress,
        )
    if found.chosen.hold_share < 1.0 - found.level:
        print(
            f"fleetopt optimize: warning: no candidate holds the limits in {1.0 - found.level:.0%} of the scenarios; "
            f"the chosen one does in {found.chosen.hold_share:.0%}",
            file=sys.stderr,
        )
    chosen = dataclasses.replace(found.chosen.plan, method=nominal.method, search=nominal.search)
    return chosen, {"robust": robust_to_json(found)}


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
    tps = options.tp if isinstance(options.tp, list) else [options.tp]
    asked = list(itertools.product(options.gpu.split(","), tps, (options.precision or "").split(",")))
    choices, refusals = [], []
    for gpu, tp, precision in asked:
        try:
            choice = engine_choice(
                gpu.strip(),
                options.llm,
                tp,
                precision=precision.strip() or None,
                kv_precision=options.kv_precision,
                engine=assumptions.engine,
                site=site,
                compressor=compressor,
                max_num_seqs=options.max_num_seqs,
            )
        except DoesNotFit:
            refusals.append(f"{tp} x {gpu.strip()} {precision.strip()}".strip())
            if len(refusals) == len(asked):
                raise
            continue
        choices.append(choice)
    if refusals:
        print(f"fleetopt {options.command}: left out, for the LLM does not fit: {', '.join(refusals)}", file=sys.stderr)
    return _distinct(choices)


def _pareto(options: argparse.Namespace) -> Answer:
    objectives = checked_objectives(options.objectives, "--objectives")
    if options.figure:
        check_figure(options.figure)
    if options.csv:
        check_writable(options.csv, "--csv")
    most_ms = options.ttft_p99_ms if "ttft_p99_s" in objectives else None
    options.ttft_p99_ms = options.ttft_p99_ms or float(make_slo().ttft_p99_s) / MS
    layout = _layout(options)
    swept_rate = options.axis[1][0] if options.axis and options.axis[0] == "workload-rate" else None
    loaded = load(options.workload, rate_per_s=swept_rate or options.rate, layout=layout)
    _require_window("--window", options.window, loaded)
    if options.axis:
        document, plans = _along_axis(options, loaded, "usd" if objectives[0] == "usd_per_h" else "tok_per_j")
        held, table, to_csv, to_figure = any(plan.metrics for plan in plans), axis_table, axis_csv, axis_figure
    else:
        problem = _problem(options, loaded, budget=_budget(options))
        window = PAPER_WINDOWS.get(loaded.name)
        with _progress("Tracing the front") as progress:
            front = pareto(
                problem,
                objectives,
                n_points=options.points,
                method=options.method,
                max_ttft_p99_s=None if most_ms is None else most_ms * MS,
                short_windows=None if window is None else [window],
                progress=progress,
            )
        if front.binding:
            print(f"fleetopt pareto: infeasible: {_why(front.binding)}", file=sys.stderr)
        document = front_to_json(front)
        held, table, to_csv, to_figure = bool(front.points), front_table, front_csv, front_figure
    if layout:  # as in `_plan_document`: every plan can be taken out and evaluated again
        shown = [*document.get("points", []), *document.get("rows", [])]
        shown += [document[key] for key in ("homogeneous", "fleetopt") if document.get(key)]
        for each in shown:
            each["plan"]["workload"]["columns"] = dataclasses.asdict(layout)
    if held and options.csv:
        write_whole(options.csv, to_csv(document), "--csv")
    if held and options.figure:
        write_figure(to_figure(document), options.figure)
    return document, table, OK if held else INFEASIBLE


def _along_axis(
    options: argparse.Namespace, loaded: LoadedWorkload, objective: str
) -> tuple[dict[str, Any], list[Plan]]:
    """The best plan at each value of the axis; what no fleet holds is said on stderr."""
    name, values = options.axis
    field = AXES[name][0]
    plans = []
    with _progress(f"Sweeping {name}") as progress:
        for done, value in enumerate(values):
            at = argparse.Namespace(**{**vars(options), field: value})
            workload = with_rate(loaded.workload, value) if name == "workload-rate" else loaded.workload
            problem = _problem(at, dataclasses.replace(loaded, workload=workload), objective, _budget(options))
            plans.append(optimize(problem, options.method))
            progress(done + 1, len(values))
    for value, plan in zip(values, plans):
        if plan.binding:
            print(f"fleetopt pareto: infeasible at {name} {value:g}: {_why(plan.binding)}", file=sys.stderr)
    document = {
        "axis": {"name": name, "values": values},
        "workload": {"name": loaded.name},
        "rows": [{"value": value, "plan": plan_to_json(plan)} for value, plan in zip(values, plans)],
    }
    return document, plans


def _budget(options: argparse.Namespace) -> Budget:
    for gpu in options.gpus_of:
        gpu_entry(gpu, "--gpus-of")
    return make_budget(
        max_gpus=options.max_gpus or math.inf,
        max_power_w=math.inf if options.max_power_kw is None else options.max_power_kw * KW,
        max_usd_per_h=options.max_usd_per_h or math.inf,
        gpus_of=options.gpus_of,
    )


def _problem(
    options: argparse.Namespace,
    loaded: LoadedWorkload,
    objective: Objective = "tok_per_j",
    budget: Budget | None = None,
    free: Sequence[Tunable] = (),
) -> Problem:
    """What a search is about, as the options have it."""
    assumptions = parse_assumptions(options.assume)
    with _at_door(options.workload):
        return make_problem(
            loaded.workload,
            _choices(options, assumptions),
            slo=_slo(options),
            window_tokens=options.window,
            workload_name=loaded.name,
            n_pools=options.pools,
            gamma=options.gamma,
            objective=objective,
            assume=options.assume,
            assumptions=dataclasses.replace(assumptions, output_share=loaded.output_share, dispatch=options.dispatch),
            budget=budget,
            free=free,
        )


def _levers(options: argparse.Namespace) -> Answer:
    if options.figure:
        check_figure(options.figure)
    if options.next_gpu:
        gpu_entry(options.next_gpu, "--next-gpu")
    llm_entry(options.other_llm, "--other-llm")
    problem, given, layout = _present_fleet(options)
    gpu = problem.choices[0].gpu
    site, compressor = problem.choices[0].engine.site, problem.choices[0].engine.compressor

    def engines(spec: Spec) -> EngineChoice:
        return engine_choice(
            spec.file or spec.gpu,
            spec.llm,
            spec.tp,
            precision=spec.precision,
            kv_precision=spec.kv_precision,
            engine=problem.assumptions.engine,
            site=site,
            compressor=compressor,
            max_num_seqs=spec.max_num_seqs,
        )

    with _progress("Pulling levers") as progress:
        found = pull_levers(
            problem,
            engines,
            given=given,
            next_gpu=(options.next_gpu or NEXT_GPU.get(gpu, "")).lower() or None,
            llm=options.other_llm,
            every_pair=options.all_pairs,
            progress=progress,
        )
    document = levers_to_json(found)
    if layout:
        document["workload"]["columns"] = dataclasses.asdict(layout)
    if found.present.plan.binding:
        print(f"fleetopt levers: the present fleet: {_why(found.present.plan.binding)}", file=sys.stderr)
    if options.figure and any(gain.gain for gain in found.gains):
        write_figure(levers_figure(document), options.figure)
    held = found.present.feasible or any(gain.pulled.feasible for gain in found.gains)
    return document, levers_table, OK if held else INFEASIBLE


def _present_fleet(options: argparse.Namespace) -> tuple[Problem, Plan | None, Layout | None]:
    """The fleet that levers start from: a plan's engines and pools, or one pool of the options' engine."""
    if options.plan is None:
        options.workload, options.pools, options.gamma = options.workload or "azure-conv", 1, 1.0
        layout = _layout(options)
        loaded = load(options.workload, rate_per_s=options.rate, layout=layout)
        _require_window("--window", options.window, loaded)
        return dataclasses.replace(_problem(options, loaded), objective=options.objective), None, layout
    for name, default in options.plan_says.items():
        if getattr(options, name) != default:
            raise BadInput(f"--{name.replace('_', '-')}", f"{options.plan} says it itself", "give one of the two")
    plan, layout = _given_plan(argparse.Namespace(**{**vars(options), "dispatch": None}))
    gammas = {float(gamma) for gamma in plan.fleet.gamma[:-1]} or {1.0}
    gamma = gammas.pop() if len(gammas) == 1 else None  # several: searched
    return dataclasses.replace(plan.problem, gamma=gamma, objective=options.objective), plan, layout


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
            max_num_seqs=pool.max_num_seqs_asked or given.max_num_seqs,
            where=f"{options.plan}, pools.{i}.".__add__,
        )
        for i, pool in enumerate(given.pools)
    )
    choices = tuple(
        tuned_choice(choice, clock_frac=pool.clock_frac) for choice, pool in zip(choices, given.pools, strict=True)
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
            objective=given.objective,
            budget=make_budget(**given.budget.limits()),
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


def _sensitivity(options: argparse.Namespace) -> Answer:
    if options.figure:
        check_figure(options.figure)
    plan, layout = _given_plan(options)
    if plan.binding:
        print(
            f"fleetopt sensitivity: infeasible: {plan.binding['limit']} is {plan.binding['value']:.6g}, "
            f"the limit is {plan.binding['asked']:.6g}",
            file=sys.stderr,
        )
    with _progress("Differentiating"):
        found = sensitivity(plan, reoptimize=optimize if options.reoptimize else None)
    document = sensitivity_to_json(found) | {
        "plan": _plan_document(plan, layout),
        "objective": plan.problem.objective,
        "shown": {"metric": options.metric, "top": options.top},
    }
    if options.figure:
        write_figure(tornado_figure(document), options.figure)
    return document, sensitivity_table, INFEASIBLE if plan.binding else OK


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
    "sensitivity": _sensitivity,
    "simulate": _simulate,
    "ledger": _ledger,
    "levers": _levers,
    "pareto": _pareto,
    "engine": _engine,
    "calibrate": _calibrate,
    "trace": _trace,
    "catalog": _catalog,
}


def _distinct(choices: Iterable[EngineChoice]) -> list[EngineChoice]:
    return list({choice.names: choice for choice in choices}.values())


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
    """Which limit cannot be held, and what can; what is reachable is rounded up, so that asking for it succeeds."""
    limit, asked, nearest = binding["limit"], binding["asked"], binding["nearest_feasible"]
    if limit == "window_tokens":
        return (
            f"no engine holds a sequence of the {asked:.0f}-token window; the largest one holds is {nearest:.0f} tokens"
        )
    if limit == "budget":
        return "each limit of the budget can be kept alone, but no fleet was found that keeps all of them"
    what, unit, size = {
        "itl_s": ("a mean ITL", "ms", MS),
        "ttft_p99_s": ("a P99 TTFT", "ms", MS),
        "max_gpus": ("its latencies with", "GPUs", 1.0),
        "max_power_w": ("its latencies within", "kW", KW),
        "max_usd_per_h": ("its latencies for", "USD/h", 1.0),
    }[limit]
    of = " of" if limit in ("itl_s", "ttft_p99_s") else ""
    reachable = np.ceil(nearest / size * 10) / 10
    return f"no fleet holds {what}{of} {asked / size:g} {unit}; the smallest reachable is {reachable:.1f} {unit}"


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
