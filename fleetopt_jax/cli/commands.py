"""The commands: each turns checked options into one JSON document, shown as a table or printed as it is."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)  # before any array is made: queueing needs float64

import numpy as np  # noqa: E402
from rich.console import Console, RenderableType  # noqa: E402
from rich.progress import Progress  # noqa: E402

from fleetopt_jax.catalog.engines import CALIBRATED, engine_choice  # noqa: E402
from fleetopt_jax.catalog.gpus import GPUS  # noqa: E402
from fleetopt_jax.catalog.llms import LLMS  # noqa: E402
from fleetopt_jax.catalog.workloads import LoadedWorkload, bundled, load  # noqa: E402
from fleetopt_jax.cli.codes import BUG, INFEASIBLE, OK  # noqa: E402
from fleetopt_jax.cli.door import read_plan  # noqa: E402
from fleetopt_jax.core.errors import BadInput  # noqa: E402
from fleetopt_jax.core.units import MS, US  # noqa: E402
from fleetopt_jax.fleet.assumptions import PRESETS, Assumptions  # noqa: E402
from fleetopt_jax.fleet.fleet import make_slo  # noqa: E402
from fleetopt_jax.laws.kv_cache import max_sequences  # noqa: E402
from fleetopt_jax.optimize.plan import EngineChoice, Plan, make_problem, plan_to_json  # noqa: E402
from fleetopt_jax.optimize.search import evaluate_given, optimize  # noqa: E402
from fleetopt_jax.published.tables import reproduce  # noqa: E402
from fleetopt_jax.report import tables  # noqa: E402
from fleetopt_jax.report.files import check_writable, to_json, write_whole  # noqa: E402
from fleetopt_jax.workload.atoms import share_above  # noqa: E402
from fleetopt_jax.workload.readers import Layout  # noqa: E402

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
    choices = [engine_choice(gpu.strip(), options.llm, options.tp) for gpu in options.gpu.split(",")]
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
            _distinct(choices),
            slo=make_slo(ttft_p99_s=options.ttft_p99_ms * MS),
            window_tokens=options.window,
            workload_name=loaded.name,
            n_pools=options.pools,
            gamma=options.gamma,
            objective=options.objective,
            assume=options.assume,
            assumptions=_assumptions(options.assume, loaded),
        )
    with _progress(f"Searching ({options.method})") as progress:
        plan = optimize(problem, options.method, progress)
    if plan.binding:
        print(f"fleetopt optimize: infeasible: {_why(plan.binding)}", file=sys.stderr)
    return _plan_document(plan, layout), tables.plan_table, INFEASIBLE if plan.binding else OK


def _plan_document(plan: Plan, layout: Layout | None) -> dict[str, Any]:
    """The plan, with the columns its trace was read by, so that it can be evaluated again."""
    document = plan_to_json(plan)
    if layout:
        document["workload"]["columns"] = dataclasses.asdict(layout)
    return document


def _evaluate(options: argparse.Namespace) -> Answer:
    given = read_plan(options.plan)
    name = options.workload or given.workload.name
    rate = options.rate or given.workload.arrival_rate_per_s
    columns = given.workload.columns
    layout = _layout(options) or (Layout(**columns.model_dump()) if columns and not options.workload else None)
    loaded = load(name, rate_per_s=rate, layout=layout)
    choices = tuple(
        engine_choice(pool.gpu, pool.llm, pool.tp, where=f"{options.plan}, pools.{i}.".__add__)
        for i, pool in enumerate(given.pools)
    )
    last = given.pools[-1]
    _require_window(f"{options.plan}, pools.{len(choices) - 1}.window_tokens", last.gamma * last.window_tokens, loaded)
    with _at_door(options.plan):
        problem = make_problem(
            loaded.workload,
            _distinct(choices),
            slo=make_slo(ttft_p99_s=given.slo.ttft_p99_s, max_utilization=given.slo.max_utilization),
            window_tokens=max(last.window_tokens, float(loaded.workload.longest_tokens)),
            workload_name=loaded.name,
            n_pools=len(choices),
            assume=given.assume,
            assumptions=_assumptions(given.assume, loaded),
        )
    plan = evaluate_given(
        problem,
        choices,
        window_tokens=[pool.window_tokens for pool in given.pools],
        gamma=[pool.gamma for pool in given.pools],
        n_instances=[pool.n_instances for pool in given.pools],
    )
    if plan.binding:
        print(
            f"fleetopt evaluate: infeasible: {plan.binding['limit']} is {plan.binding['value']:.6g}, "
            f"the limit is {plan.binding['asked']:.6g}",
            file=sys.stderr,
        )
    return _plan_document(plan, layout), tables.plan_table, INFEASIBLE if plan.binding else OK


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
        "llms": lambda: {name: _numbers(e.llm) | {"title": e.title, "source": e.source} for name, e in LLMS.items()},
        "engines": lambda: {
            f"{gpu}/{llm}/tp{tp}": _numbers(entry.engine.decode)
            | {
                "n_max_8k": float(max_sequences(entry.engine.kv, 8192.0)),
                "quality": entry.quality,
                "source": entry.source,
            }
            for (gpu, llm, tp), entry in CALIBRATED.items()
        },
        "workloads": bundled,
    }
    asked = [options.part] if options.part else list(parts)
    return {part: parts[part]() for part in asked}, tables.catalog_tables, OK


COMMANDS: dict[str, Callable[[argparse.Namespace], Answer]] = {
    "reproduce": _reproduce,
    "optimize": _optimize,
    "evaluate": _evaluate,
    "trace": _trace,
    "catalog": _catalog,
}


def _distinct(choices: Iterable[EngineChoice]) -> list[EngineChoice]:
    return list({(choice.gpu, choice.llm, choice.tp): choice for choice in choices}.values())


def _assumptions(preset: str, loaded: LoadedWorkload) -> Assumptions:
    """The preset, with the output share a CDF file states of itself."""
    return dataclasses.replace(PRESETS[preset], output_share=loaded.output_share)


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
