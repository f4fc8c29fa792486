"""Options and plan files as the library's records."""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetopt_jax.catalog.engines import engine_choice
from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.catalog.workloads import LoadedWorkload, bundled, load
from fleetopt_jax.cli.answer import refuse_outputs
from fleetopt_jax.cli.door import PlanFile, read_plan
from fleetopt_jax.cli.fields import said_as_options
from fleetopt_jax.cli.terminal import detail, say, warn
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import KW, MS, US
from fleetopt_jax.fleet.assumptions import Assumptions, parse_assumptions
from fleetopt_jax.fleet.engine import DoesNotFit, make_site
from fleetopt_jax.fleet.evaluate import Objective
from fleetopt_jax.fleet.fleet import Slo, make_slo
from fleetopt_jax.laws.compression import make_compressor
from fleetopt_jax.optimize.plan import (
    Budget,
    EngineChoice,
    Plan,
    Problem,
    Search,
    Tunable,
    make_budget,
    make_problem,
    plan_to_json,
    tuned_choice,
)
from fleetopt_jax.optimize.search import evaluate_given
from fleetopt_jax.report.decision import broken
from fleetopt_jax.report.words import NOT_TOGETHER, slope_said
from fleetopt_jax.simulate import replay_requests
from fleetopt_jax.workload.atoms import digest, share_above, total_tokens
from fleetopt_jax.workload.readers import Layout, Trace, read_workload_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAME = 1e-9  # relative, between two evaluations of one fleet: compilations round differently


def asked_layout(options: argparse.Namespace) -> Layout | None:
    named = (options.prompt_column, options.output_column, options.time_column, options.time_unit)
    if not any(named):
        return None
    if not (options.prompt_column and options.output_column):
        raise BadInput("--prompt-column, --output-column", "not both are given", "need both to read another layout")
    unit_s = {"s": 1.0, "ms": MS, "us": US}[options.time_unit or "s"]
    return Layout(options.prompt_column, options.output_column, options.time_column, unit_s)


def asked_workload(
    options: argparse.Namespace, *, rate_per_s: float | None = None, need_rate: bool = True
) -> LoadedWorkload:
    """The workload the options name, at `rate_per_s` if given, with room for it in the window they promise."""
    rate = rate_per_s or options.rate
    loaded = load(options.workload, rate_per_s=rate, layout=asked_layout(options), need_rate=need_rate)
    require_last_window("--window", getattr(options, "window", None), loaded)
    _describe(options, loaded)
    return loaded


def _describe(options: argparse.Namespace, loaded: LoadedWorkload) -> None:
    detail(
        options,
        f"{loaded.name}: {len(loaded.workload.weight):,} atoms at "
        f"{float(loaded.workload.arrival_rate_per_s):,.6g} requests/s, {digest(loaded.workload)}",
    )


def asked_slo(options: argparse.Namespace) -> Slo:
    return make_slo(
        ttft_p99_s=options.ttft_p99_ms * MS,
        ttft_s_per_token=options.ttft_ms_per_1k * MS / 1000.0,
        itl_s=math.inf if options.itl_ms is None else options.itl_ms * MS,
        scope=options.slo_scope,
    )


def asked_budget(options: argparse.Namespace) -> Budget:
    for gpu in options.gpus_of:
        gpu_entry(gpu, "--gpus-of")
    return make_budget(
        max_gpus=options.max_gpus or math.inf,
        max_power_w=math.inf if options.max_power_kw is None else options.max_power_kw * KW,
        max_usd_per_h=options.max_usd_per_h or math.inf,
        gpus_of=options.gpus_of,
    )


def asked_engines(options: argparse.Namespace, assumptions: Assumptions) -> list[EngineChoice]:
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
    precisions = [part.strip() for part in options.precision.split(",")] if options.precision else [None]
    if "" in precisions:
        raise BadInput("--precision", repr(options.precision), "need bf16,fp8,...")
    asked = list(itertools.product(options.gpu.split(","), tps, precisions))
    choices, refusals = [], []
    for gpu, tp, precision in asked:
        try:
            choice = engine_choice(
                gpu.strip(),
                options.llm,
                tp,
                precision=precision,
                kv_precision=options.kv_precision,
                engine=assumptions.engine,
                site=site,
                compressor=compressor,
                max_num_seqs=options.max_num_seqs,
            )
        except DoesNotFit:
            refusals.append(f"{tp} x {gpu.strip()} {precision or ''}".strip())
            if len(refusals) == len(asked):
                raise
            continue
        choices.append(choice)
    if refusals:
        say(options, f"left out, for the LLM does not fit: {', '.join(refusals)}")
    return distinct(choices)


def asked_problem(
    options: argparse.Namespace,
    loaded: LoadedWorkload,
    objective: Objective = "tok_per_j",
    budget: Budget | None = None,
    free: Sequence[Tunable] = (),
) -> Problem:
    """What a search is about, as the options have it."""
    assumptions = parse_assumptions(options.assume)
    with at_door(options.workload):
        return make_problem(
            loaded.workload,
            asked_engines(options, assumptions),
            slo=asked_slo(options),
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


def given_plan(options: argparse.Namespace) -> tuple[Plan, Layout | None]:
    """The plan in a file, evaluated under its own workload or the one the options name."""
    given = read_plan(options.plan)
    files = [name for pool in given.pools for name in (pool.engine_file, pool.llm)]
    refuse_outputs(options, [given.workload.name, *files])
    name = options.workload or given.workload.name
    rate = options.rate or given.workload.arrival_rate_per_s
    columns = given.workload.columns
    layout = asked_layout(options) or (Layout(**columns.model_dump()) if columns and not options.workload else None)
    loaded = load(name, rate_per_s=rate, layout=layout)
    _describe(options, loaded)
    if given.workload.digest and not options.workload and digest(loaded.workload) != given.workload.digest:
        warn(options, f"{name} has other requests than when {options.plan} was made")
    assumptions = parse_assumptions(given.assume, f"{options.plan}, assume")
    with at_door(options.plan):
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
    require_last_window(
        f"{options.plan}, pools.{len(choices) - 1}.window_tokens", last.gamma * last.window_tokens, loaded
    )
    with at_door(options.plan):
        problem = make_problem(
            loaded.workload,
            distinct(choices),
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
    return _as_found(plan, given), layout


def _as_found(plan: Plan, given: PlanFile) -> Plan:
    """With the search that found it, where the plan still is what the file promises."""
    if plan.binding or given.search is None or given.metrics is None or given.status == "infeasible":
        return plan
    of_the_same = given.search.asked == plan_to_json(plan)["search"]["asked"]
    if not (of_the_same and math.isclose(float(plan.metrics.tok_per_j), given.metrics.tok_per_j, rel_tol=SAME)):
        return plan
    search = Search(**given.search.model_dump(exclude={"asked"}))
    return dataclasses.replace(plan, status=given.status, method=given.method, search=search)


def plan_document(plan: Plan, layout: Layout | None) -> dict[str, Any]:
    """The plan, with the columns its trace was read by, so that it can be evaluated again."""
    document = plan_to_json(plan)
    if layout:
        document["workload"]["columns"] = dataclasses.asdict(layout)
    return document


def say_broken(options: argparse.Namespace, plan: Plan) -> None:
    """Which limit a given plan breaks, if any."""
    if plan.binding:
        of_ttft = plan.binding["limit"] == "ttft_p99_s"
        grows = slope_said(float(plan.problem.slo.ttft_s_per_token)) if of_ttft else ""
        say(options, f"infeasible: the {broken(plan.binding)}{grows}")


def pool_map_of(plan: Plan) -> "Callable[[dict[str, Any]], Figure]":
    """What draws the plan's pools over the lengths of its requests; matplotlib is imported where it draws."""

    def draw(document: dict[str, Any]) -> "Figure":
        from fleetopt_jax.report.pool_map import pool_map_figure

        workload = plan.problem.workload
        return pool_map_figure(document, np.asarray(total_tokens(workload)), np.asarray(workload.weight))

    return draw


def how_to_simulate(options: argparse.Namespace, problem: Problem, layout: Layout | None) -> dict[str, Any]:
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


def require_last_window(where: str, window_tokens: float | None, loaded: LoadedWorkload) -> None:
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


def distinct(choices: Iterable[EngineChoice]) -> list[EngineChoice]:
    return list({choice.names: choice for choice in choices}.values())


@contextmanager
def at_door(where: str, said: Callable[[str], str] = said_as_options):
    """Refusals of the library's own checks, said with the options they came from; with `said=str` as they are."""
    try:
        yield
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(where, said(str(error))) from None


def why(binding: dict[str, Any]) -> str:
    """Which limit cannot be held, and what can; what is reachable is rounded up, so that asking for it succeeds."""
    limit, asked, nearest = binding["limit"], binding["asked"], binding["nearest_feasible"]
    if limit == "window_tokens":
        return (
            f"no engine holds a sequence of the {asked:.0f}-token window; the largest one holds is {nearest:.0f} tokens"
        )
    if limit == "budget":
        return NOT_TOGETHER
    scarce = ("its latencies with", limit.removeprefix("gpus_of.").upper(), 1.0)
    what, unit, size = {
        "itl_s": ("a mean ITL of", "ms", MS),
        "ttft_p99_s": ("a P99 TTFT of", "ms", MS),
        "max_gpus": ("its latencies with", "GPUs", 1.0),
        "max_power_w": ("its latencies within", "kW", KW),
        "max_usd_per_h": ("its latencies for", "USD/h", 1.0),
    }.get(limit, scarce)
    said = f"no fleet holds {what} {asked / size:g} {unit}"
    if nearest is None:
        return said
    whole = limit == "max_gpus" or limit.startswith("gpus_of.")
    reachable = f"{nearest:,.0f}" if whole else f"{np.ceil(nearest / size * 10) / 10:.1f}"
    return f"{said}; the smallest reachable is {reachable} {unit}"
