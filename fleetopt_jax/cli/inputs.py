"""Options and plan files as the library's records."""

import argparse
import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.problem import Problem, Tunable, make_problem
from fleetopt_jax._simulate import Requests, replay_requests
from fleetopt_jax.catalog.drafts import Drafts
from fleetopt_jax.catalog.engines import resolved
from fleetopt_jax.catalog.gpus import gpu_entry, link_notes
from fleetopt_jax.catalog.links import kv_link
from fleetopt_jax.catalog.llms import LlmEntry, checkpoint_size_bytes, llm_entry, precision_notes
from fleetopt_jax.catalog.own import Catalog
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.catalog.workloads import LoadedWorkload, bundled, load
from fleetopt_jax.cli.answer import refuse_outputs
from fleetopt_jax.cli.fields import FLAGS, said_as_options
from fleetopt_jax.cli.synopsis import OF_ONE_HOUR, SEARCHES, SPLITS
from fleetopt_jax.cli.table import TABLE, options_of
from fleetopt_jax.cli.terminal import detail, progress, say, understood, warn
from fleetopt_jax.cli.values import EngineOf, Several, flag
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.files import same_file
from fleetopt_jax.core.units import GB, GIB, KW, MS
from fleetopt_jax.documents.drafts import drafts_named
from fleetopt_jax.documents.engine import load_engine
from fleetopt_jax.documents.own_catalog import load_catalog
from fleetopt_jax.documents.plan import is_another, plan_of_file, read_plan_file, workload_of_file, workload_place
from fleetopt_jax.documents.plan_file import PlanFile, beside_plan
from fleetopt_jax.fleet.assumptions import DISPATCHES, Assumptions, parse_assumptions
from fleetopt_jax.fleet.choices.prefix_cache import ConstantHits, NoPrefixCache, PrefixCache, WorkingSetCache
from fleetopt_jax.fleet.choices.routing_key import StickySessions, TotalTokens
from fleetopt_jax.fleet.engine import DoesNotFit
from fleetopt_jax.fleet.fleet import Slo, make_slo
from fleetopt_jax.fleet.reserve import Failures, Reserve, make_failures, make_spares, make_target
from fleetopt_jax.fleet.resources import Budget, Objective, make_budget
from fleetopt_jax.fleet.surroundings import Surroundings, make_site, make_surroundings
from fleetopt_jax.laws.compression import make_compressor
from fleetopt_jax.report.rates import hour_warnings, mean_warning, per_s
from fleetopt_jax.report.words import listed
from fleetopt_jax.workload.atoms import digest
from fleetopt_jax.workload.profile import At, Hour, rate_profile, requests_of
from fleetopt_jax.workload.readers import Layout, Trace, read_workload_file
from fleetopt_jax.workload.readers.hit_curve import with_curve_of
from fleetopt_jax.workload.readers.stamps import UNITS

COLUMNS = "--prompt-column, --output-column"  # only together
OF_A_FILE = ("tp", "ep", "dp", "pp", "precision")  # what an engine's file says itself
NAMED = {"columns": COLUMNS} | {option.name: flag(option.name) for option in TABLE}


def option_of(field: str) -> str:
    """The option that sets what the library calls `field`; the field itself where none does."""
    return FLAGS[field][0] if field in FLAGS else NAMED.get(field, field)


def say_unread(options: argparse.Namespace, read_with: Mapping[str, Sequence[str]]) -> None:
    """Options that are given and read only with another, which is not; a scenario may hold them for other commands."""
    usual = {option.name: option.default for option in options_of(options.command)}
    for asked, names in read_with.items():
        for name in names:
            if not getattr(options, asked) and getattr(options, name) != usual[name]:
                warn(options, f"{flag(name)} is not read without {flag(asked)}")


@contextmanager
def at_door(where: str) -> Iterator[None]:
    """Refusals of the library's own checks, said with the options they came from; of no one option, at `where`."""
    try:
        yield
    except BadField as error:
        raise error.at(option_of) from None
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(where, said_as_options(str(error))) from None


def layout_of(options: argparse.Namespace) -> Layout | None:
    """How the options say that a file is to be read, if they do."""
    columns = (options.prompt_column, options.output_column, options.time_column, options.count_column)
    if not any((*columns, options.time_unit, options.zero_output, options.block_tokens)):
        return None
    prompt, output, time, count = columns
    if bool(prompt) != bool(output):
        raise BadInput(COLUMNS, "not both are given", "need both to read another layout")
    unit_s = UNITS[options.time_unit] if options.time_unit else None
    return Layout(prompt, output, time, unit_s, count, options.zero_output or "keep", options.block_tokens)


def workload_of(
    options: argparse.Namespace,
    *,
    rate_per_s: float | None = None,
    need_rate: bool = True,
    at: At | None = None,
    sticky: float | None = None,
) -> LoadedWorkload:
    """The workload the options name, at their hour or else at `at`, of `rate_per_s` on average if given, with room for
    it in the window they promise; read with the headroom of the options' sticky sessions, or else `sticky`."""
    rate, window = rate_per_s or options.rate, getattr(options, "window", None)
    at = getattr(options, "at", None) or at
    how = {"layout": layout_of(options), "at": at or "mean", "sticky": getattr(options, "sticky", None) or sticky}
    with at_door(options.workload), progress(options, f"Reading {options.workload}") as step:
        loaded = load(options.workload, rate_per_s=rate, need_rate=need_rate, progress=step, **how)
        if window is not None:
            loaded.require_window(window)
    loaded = with_prefix(options, loaded)
    _describe(options, loaded)
    if options.command != "trace":  # which prints it
        _say_understood(options, loaded)
    if at or options.command in OF_ONE_HOUR:
        _warn_of_hours(options, loaded)
    return loaded


def prefix_cache_of(options: argparse.Namespace) -> PrefixCache | None:
    """What the options say of prefixes that are found in the cache; None where they say nothing."""
    asked = getattr(options, "prefix_hit", None)
    if asked is None:
        return None
    if isinstance(asked, str):
        return WorkingSetCache()
    return ConstantHits(asked) if asked else NoPrefixCache()


def with_prefix(options: argparse.Namespace, loaded: LoadedWorkload) -> LoadedWorkload:
    """The workload with the hit curve that the options name; refused where its own reuse is asked for and not known."""
    asked = getattr(options, "prefix_hit", None)
    if not isinstance(asked, str):
        return loaded
    if asked != "trace":
        return dataclasses.replace(loaded, workload=with_curve_of(asked, loaded.workload))
    if loaded.workload.reuse is None:
        problem = f"{loaded.name} has neither block hashes nor sessions"
        raise BadInput("--prefix-hit trace", problem, "need a trace that has, a share, or the file of a hit curve")
    return loaded


def _warn_of_hours(options: argparse.Namespace, loaded: LoadedWorkload) -> None:
    """Warn of what the mean of a trace, or one of its hours, leaves out; not where the mean was asked for."""
    if loaded.profile and loaded.profile.varies and not loaded.hour and getattr(options, "at", None) != "mean":
        warn(options, mean_warning(loaded.name, loaded.profile, float(loaded.workload.arrival_rate_per_s)))
    if loaded.profile and loaded.hour:
        for text in hour_warnings(loaded.profile, loaded.hour):
            warn(options, text)


def _filled(options: argparse.Namespace, layout: Layout | None, planned: Layout | None) -> Layout | None:
    """How the options say that a file is to be read, and the plan where they do not."""
    if layout is None or planned is None:
        return layout or planned
    said = {name: value for name, value in vars(layout).items() if value is not None}
    return dataclasses.replace(planned, **said | {"zero_output": options.zero_output or planned.zero_output})


def _say_understood(options: argparse.Namespace, loaded: LoadedWorkload) -> None:
    """What a file was taken for, in a line, and what is odd about it."""
    if loaded.understood is None or options.quiet:
        return
    summary = loaded.summary
    n = "" if summary.n_requests is None else f"{summary.n_requests:,} requests, "
    means = f"mean {summary.mean_prompt_tokens:,.0f} prompt and {summary.mean_output_tokens:,.0f} output tokens"
    rate = "" if summary.arrival_rate_per_s is None else f", {summary.arrival_rate_per_s:,.4g} requests/s"
    understood(options, f"read {loaded.name} as {loaded.understood.line}: {n}{means}{rate}")
    for warning in loaded.understood.warnings:
        warn(options, f"{loaded.name}: {warning}")


def _describe(options: argparse.Namespace, loaded: LoadedWorkload) -> None:
    detail(
        options,
        f"{loaded.name}: {len(loaded.workload.weight):,} atoms at "
        f"{float(loaded.workload.arrival_rate_per_s):,.6g} requests/s, {digest(loaded.workload)}",
    )


def slo_of(options: argparse.Namespace) -> Slo:
    """The limits that every pool, or the fleet, must hold."""
    return make_slo(
        ttft_p99_s=options.ttft_p99_ms * MS,
        ttft_s_per_token=options.ttft_ms_per_1k * MS / 1000.0,
        itl_s=math.inf if options.itl_ms is None else options.itl_ms * MS,
        max_utilization=options.max_utilization,
        scope=options.slo_scope,
    )


def budget_of(options: argparse.Namespace) -> Budget:
    """What all pools together may use."""
    _refuse_unused(options)
    return shared_budget_of(options)


def shared_budget_of(options: argparse.Namespace) -> Budget:
    """What all services together may use, whatever the GPUs of each."""
    return make_budget(
        max_gpus=options.max_gpus or math.inf,
        max_power_w=math.inf if options.max_power_kw is None else options.max_power_kw * KW,
        max_usd_per_h=options.max_usd_per_h or math.inf,
        max_kg_co2_per_h=options.max_kg_co2_per_h or math.inf,
        gpus_of=options.gpus_of,
    )


def surroundings_of(options: argparse.Namespace) -> Surroundings:
    """The site, and the compressor."""
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
    return make_surroundings(site, compressor, reserve=reserve_of(options))


def reserve_of(options: argparse.Namespace) -> Reserve | None:
    """What may be down, if anything; of a command that sizes nothing for it, nothing."""
    target, rates = getattr(options, "availability", None), rates_of(options)
    spares = {"instances": getattr(options, "spare", 0), "nodes": getattr(options, "spare_nodes", 0)}
    if target is None:
        return make_spares(**spares, gpus_per_node=options.gpus_per_node) if any(spares.values()) else None
    if any(spares.values()):
        said = "--spare" if spares["instances"] else "--spare-nodes"
        raise BadInput("--availability", f"not read with {said}", "give one: spares, or a share of the time")
    if rates is None:
        raise BadInput("--availability", "nobody said how long a repair takes", "need --repair-h")
    return make_target(target, rates)


def rates_of(options: argparse.Namespace) -> Failures | None:
    """How often things fail, where the options say it."""
    given = {name: getattr(options, name, None) for name in ("repair_h", "gpu_mtbf_h", "node_mtbf_h")}
    said = {name: value for name, value in given.items() if value is not None}
    if said and "repair_h" not in said:
        raise BadInput(flag(next(iter(said))), "only read with --repair-h", "need how long a repair takes")
    return make_failures(**said, gpus_per_node=options.gpus_per_node) if said else None


def specs_of(options: argparse.Namespace, assumptions: Assumptions) -> list[EngineSpec]:
    """The engines the options name, as the assumptions have them, without those whose LLM does not fit."""
    catalog = catalog_of(options)
    say_llm(options, catalog)
    return _specs(options, assumptions, catalog, [(gpu.strip(), {}) for gpu in options.gpu.split(",")])


def stage_specs_of(options: argparse.Namespace, assumptions: Assumptions) -> dict[str, list[EngineSpec]]:
    """The engines of prefill and of decode stages, where the options name some for them."""
    found, catalog = {}, catalog_of(options)
    for option in TABLE:
        if isinstance(option.kind, Several) and isinstance(option.kind.of, EngineOf) and option.field:
            asked = getattr(options, option.name, None) or []
            engines = [option.kind.of.said(text) for text in asked]
            for gpu, own in engines:
                if gpu.lower().endswith(".json") and (named := [key for key in own if key in OF_A_FILE]):
                    raise BadInput(f"{flag(option.name)} {gpu}", f"the file says {named[0]} itself", "leave it out")
            if engines:
                found[option.field.name] = _specs(options, assumptions, catalog, engines, of=option.name)
    return found


def _specs(
    options: argparse.Namespace,
    assumptions: Assumptions,
    catalog: Catalog,
    engines: Sequence[tuple[str, Mapping[str, Any]]],
    of: str = "gpu",
) -> list[EngineSpec]:
    """Of GPUs, each with what its own keys, in the option `of` that name, say instead of the options."""
    ways = []
    for gpu, own in engines:
        tps, precisions = _own_or(own, "tp", _listed(options.tp)), _own_or(own, "precision", _precisions_asked(options))
        for tp, precision, drafts in itertools.product(tps, precisions, drafts_asked(options)):
            ways.append((gpu, {**own, "tp": tp, "precision": precision, "speculate": drafts}, own))
    specs, refusals = [], []
    for gpu, own, keys in ways:
        try:
            specs.append(_spec(options, assumptions, catalog, gpu, own))
        except DoesNotFit:
            split = served(options) | own
            named = f"{split['tp'] * split['dp'] * split['pp']} x {gpu} {own['precision'] or ''}".strip()
            refusals.append(named + (f" with {own['speculate'].name}" if own["speculate"] else ""))
            if len(refusals) == len(ways):
                raise
        except BadField as error:
            if error.field not in keys:
                raise
            raise error.at(lambda key, gpu=gpu: f"{flag(of)} {gpu}: {key}") from None
    if refusals:
        say(options, f"left out, for the LLM does not fit: {', '.join(refusals)}")
    warn_of_units(options, specs)
    return list(dict.fromkeys(specs))


def _own_or(own: Mapping[str, Any], key: str, usual: Sequence[Any]) -> Sequence[Any]:
    return [own[key]] if key in own else usual


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _precisions_asked(options: argparse.Namespace) -> Sequence[str | None]:
    precisions = [part.strip() for part in options.precision.split(",")] if options.precision else [None]
    if "" in precisions:
        raise BadInput("--precision", repr(options.precision), "need bf16,fp8,...")
    return precisions


def _spec(
    options: argparse.Namespace, assumptions: Assumptions, catalog: Catalog, gpu: str, own: Mapping[str, Any]
) -> EngineSpec:
    """One engine, as it is run; what is its `own` instead of the options' says its TP, precision and drafts."""
    how = {**served(options), "source": assumptions.engine.name}
    how |= {key: own[key] for key in ("ep", "dp", "pp") if key in own}
    spec = named_spec(catalog, gpu, options.llm, own["tp"], own["precision"], **how)
    as_run = {"kv_precision": options.kv_precision, "speculate": own["speculate"], **host_cache_of(options)}
    as_run |= {"memory_utilization": options.gpu_memory_utilization}
    as_run |= {"power_limit_w": own.get("power_limit_w", options.gpu_power_limit_w)}
    as_run |= {key: own.get(key, getattr(options, key)) for key in ("max_num_seqs", "max_num_batched_tokens")}
    as_run |= {"clock_frac": own["clock"]} if "clock" in own else {}
    return resolved(dataclasses.replace(spec, **as_run))


def host_cache_of(options: argparse.Namespace) -> dict[str, float]:
    """What of a spec the options say of the hosts' memory behind its prefix cache."""
    names = {"host_cache_bytes": "host_cache_gb", "host_cache_bytes_per_s": "host_cache_gb_per_s"}
    given = {field: getattr(options, name, None) for field, name in names.items()}
    return {field: GB * value for field, value in given.items() if value is not None}


def _require_read(options: argparse.Namespace, cache: PrefixCache, specs: Iterable[EngineSpec]) -> None:
    """Refuse what is said of the hosts' memory where no prefix cache has anything to keep there."""
    said = host_cache_of(options)
    if said.get("host_cache_bytes") and not cache.reads_reuse:
        problem = "a share of every prompt is found whatever the memory" if cache.finds else "there is no prefix cache"
        raise BadInput("--host-cache-gb", problem, "need --prefix-hit trace or the file of a hit curve")
    if "host_cache_bytes_per_s" in said and not any(spec.host_cache_bytes for spec in specs):
        raise BadInput("--host-cache-gb-per-s", "nothing is kept in the hosts' memory", "need --host-cache-gb")


def drafts_asked(options: argparse.Namespace) -> Sequence[Drafts | None]:
    """What a pool may draft ahead; None is nothing."""
    text = getattr(options, "speculate", None)
    found = drafts_named(text, option_of("speculate")) if text else [None]
    if len(found) > 1 and options.command not in SPLITS:
        raise BadInput(option_of("speculate"), repr(text), "need one number of drafts, as eagle3:3")
    return found


def served(options: argparse.Namespace) -> dict[str, Any]:
    """What divides an instance besides tensor parallelism, and what serves it, as a spec has them."""
    how = {name: getattr(options, name) for name in ("ep", "dp", "pp")}
    return how | ({"serving": options.serving} if options.serving else {})


def say_llm(options: argparse.Namespace, catalog: Catalog) -> list[str]:
    """Say how a configuration file of --llm was understood, and warn of what may be wrong with it; the warnings."""
    if all(gpu.strip().lower().endswith(".json") for gpu in options.gpu.split(",")):
        return []  # engines' files name their own
    with at_door(options.llm):
        entry = llm_entry(catalog.llm(options.llm))
    if entry.family and not options.quiet:
        understood(options, f"{entry.title}: {llm_said(entry)}")
    warnings = [] if options.precision else [f"{entry.title}: {warning}" for warning in entry.warnings]
    for warning in warnings:
        warn(options, warning)
    return warnings


def warn_of_units(options: argparse.Namespace, specs: Sequence[EngineSpec]) -> list[str]:
    """Warn of precisions that no units of a GPU, or no law, is for, and of links that are doubtful; the warnings."""
    of_gpus = [(spec, gpu_entry(spec.gpu)) for spec in specs]
    notes = [(*precision_notes(spec.precision, gpu), *link_notes(gpu, spec.split.n_gpus)) for spec, gpu in of_gpus]
    warnings = list(dict.fromkeys(note for each in notes for note in each))
    for warning in warnings:
        warn(options, warning)
    return warnings


def llm_said(entry: LlmEntry) -> str:
    """One line of what a configuration file says."""
    a = entry.architecture
    active = f", {a.n_active_params / 1e9:,.4g} B active" if a.n_experts else ""
    by = f" ({entry.quantized_from or 'no quantization in the file or beside it'})"
    return (
        f"{entry.family}, {a.n_params / 1e9:,.4g} B parameters{active}; weights {a.native_precision}{by}, "
        f"{checkpoint_size_bytes(a) / GIB:,.4g} GiB; KV {a.native_kv_precision}"
    )


def named_spec(catalog: Catalog, gpu: str, llm: str, tp: int, precision: str | None, **how: Any) -> EngineSpec:
    """The engine of these names; or that of the file that `gpu` names, whatever the others say."""
    if gpu.lower().endswith(".json"):
        return load_engine(gpu, catalog)
    return catalog.spec(gpu, llm, tp, precision, **how)


def catalog_of(options: argparse.Namespace) -> Catalog:
    """What the options' names stand for, at the options' prices."""
    catalog = load_catalog(options.catalog) if options.catalog else Catalog()
    return catalog.at_prices(getattr(options, "usd_per_gpu_h", {}), "--usd-per-gpu-h")


def _stages_asked(options: argparse.Namespace) -> list[str]:
    """What stages may be of, as it is typed."""
    return [*(getattr(options, "prefill_gpu", None) or []), *(getattr(options, "decode_gpu", None) or [])]


def _refuse_unused(options: argparse.Namespace) -> None:
    """A stock of GPUs that no pool may be made of is a mistake."""
    if not options.gpus_of:
        return
    catalog = catalog_of(options)
    names = [name.strip() for name in options.gpu.split(",")]
    names += [text.partition(":")[0] for text in _stages_asked(options)]
    known = [load_engine(name, catalog).gpu_name if name.lower().endswith(".json") else name.lower() for name in names]
    for gpu, count in options.gpus_of.items():
        catalog.gpu(gpu, "--gpus-of")
        if gpu not in known:
            raise BadInput(
                f"--gpus-of {gpu}={count:g}", f"no pool may be of {gpu}: --gpu {options.gpu}", f"add {gpu} to --gpu"
            )


def problem_of(
    options: argparse.Namespace,
    loaded: LoadedWorkload,
    objective: Objective = "tok_per_j",
    budget: Budget | None = None,
    free: Sequence[Tunable] = (),
    specs: Sequence[EngineSpec] | None = None,
) -> Problem:
    """What a search is about, as the options have it; `specs` are their engines, where somebody has them already."""
    assumptions = parse_assumptions(options.assume)
    dispatch = DISPATCHES[options.dispatch]
    cache = prefix_cache_of(options) or assumptions.prefix_cache
    with at_door(options.workload):
        specs = specs_of(options, assumptions) if specs is None else specs
        _require_read(options, cache, specs)
        return make_problem(
            loaded.workload,
            specs,
            slo=slo_of(options),
            window_tokens=options.window,
            workload_name=loaded.name,
            hour=loaded.hour,
            n_pools=options.pools,
            gamma=options.gamma,
            objective=objective,
            assume=options.assume,
            assumptions=dataclasses.replace(
                assumptions,
                output_share=loaded.output_share,
                dispatch=dispatch,
                route_by=StickySessions(options.sticky) if getattr(options, "sticky", None) else TotalTokens(),
                prefix_cache=cache,
            ),
            surroundings=surroundings_of(options),
            budget=budget,
            free=free,
            serve=getattr(options, "serve", "mixed"),
            **stage_specs_of(options, assumptions),
            link=kv_link(options.kv_link) if hasattr(options, "kv_link") else None,
            rates=rates_of(options),
        )


def plan_of(options: argparse.Namespace) -> tuple[Plan, Layout | None]:
    """The plan in a file, evaluated under its own workload or the one the options name, and how that was read."""
    file = read_plan_file(options.plan)
    named = [name for pool in file.pools for name in (pool.engine_file, pool.catalog_file, pool.llm) if name]
    place = workload_place(file, options.plan)
    refuse_outputs(options, [place, *named, *(beside_plan(name, options.plan) for name in named)])
    layout = layout_of(options)
    if options.workload:
        loaded = _another_workload(options, file)
    else:
        layout = _filled(options, layout, file.layout)
        _say_place(options, file.workload.name, place)
        with at_door(options.plan):
            loaded = workload_of_file(file, options.plan, rate_per_s=options.rate, layout=layout, at=options.at)
        loaded = with_prefix(options, loaded)
        _describe(options, loaded)
        _say_understood(options, loaded)
        _warn_of_hours(options, loaded)
        if options.at in (None, file.workload.at) and is_another(file, loaded.workload):
            warn(options, f"{loaded.name} has other requests than when {options.plan} was made")
    catalog = named_catalog(options, [pool.catalog_file for pool in file.pools])
    how = {"dispatch": options.dispatch, "serving": options.serving, "prefix_cache": prefix_cache_of(options)}
    said = host_cache_of(options)
    file = file.with_host_cache(said.get("host_cache_bytes"), said.get("host_cache_bytes_per_s"))
    with at_door(options.plan):
        plan = plan_of_file(file, options.plan, loaded, **how, catalog=catalog)
    _require_read(options, plan.problem.assumptions.prefix_cache, plan.stage_specs)
    return plan, layout


def named_catalog(options: argparse.Namespace, of_plan: Iterable[str | None]) -> Catalog | None:
    """The catalog that is named for a plan in place of its own files, if any; and which of them are read, in a line."""
    own = listed(list(dict.fromkeys(beside_plan(file, options.plan) for file in of_plan if file)))
    if options.command not in SEARCHES and options.catalog:  # levers' is of what is changed to
        instead = f", not from the plan's {own}" if own and not same_file(own, options.catalog) else ""
        understood(options, f"the plan's GPUs, LLMs and prices are read from {options.catalog}{instead}")
        return load_catalog(options.catalog)
    if own:
        understood(options, f"the plan's GPUs and LLMs are read from {own}, its prices from the plan")
    return None


def _another_workload(options: argparse.Namespace, file: PlanFile) -> LoadedWorkload:
    """The workload the options name at a plan's rate, in the hour that the plan is for where it has hours; else in the
    rate of that hour."""
    try:
        planned = options.rate or file.mean_rate_per_s
        loaded = workload_of(options, rate_per_s=planned, at=file.workload.at, sticky=file.sticky)
    except BadField as refusal:
        if options.at or refusal.field != option_of("at"):
            raise
        planned = options.rate or file.workload.arrival_rate_per_s
        loaded = workload_of(options, rate_per_s=planned, at="mean", sticky=file.sticky)
        rate = float(loaded.workload.arrival_rate_per_s)
        problem = refusal.problem.removeprefix(f"{file.workload.at}: ")
        warn(
            options,
            f"{problem}, so it has no {'busiest' if file.workload.at == 'peak' else file.workload.at} hour as the plan "
            f"has: all its requests are taken, at {per_s(rate)} requests/s",
        )
        return loaded
    if options.rate is None and not options.quiet:
        mean = per_s(file.mean_rate_per_s)
        understood(options, f"{loaded.name} is taken at the plan's {mean} requests/s on average: --rate says another")
    return loaded


def _say_place(options: argparse.Namespace, name: str, place: str) -> None:
    """Which file a plan's workload is read from, where it is not the one its name leads to from here."""
    if place == name or same_file(place, name):
        return
    if os.path.isfile(name):
        warn(options, f"the workload is read from {place}, seen from the plan, not from {name} in the current folder")
    elif not options.quiet:
        say(options, f"the workload is read from {place}, seen from the plan")


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
        name = problem.service.name
        trace = None if name in bundled() else read_workload_file(name, layout, keep=True)
        if not isinstance(trace, Trace) or trace.arrival_s is None or trace.bucket_s or not trace.arrival_s[-1] > 0:
            raise BadInput(
                "--arrivals trace",
                f"{name} has no time stamps of single requests",
                "need a trace file with arrival times",
            )
        trace = _of_the_hour(trace, problem.service.hour)
        how["requests"] = _replayed(options, trace, problem)
    elif options.arrivals == "poisson":
        how["arrival_scv"] = 1.0
    return how


def _replayed(options: argparse.Namespace, trace: Trace, problem: Problem) -> Requests:
    """Stretches of a trace, one after another: as many as asked for, or all with --until. None is replayed twice, for
    what repeats itself has no spread."""
    n = options.requests or max(1, len(trace.prompt_tokens) // options.replications)
    there = max(1, len(trace.prompt_tokens) // n)
    if there < options.replications:
        warn(
            options,
            f"--replications {options.replications}: the trace has {there} stretch{'es' if there > 1 else ''} of {n:,} "
            "requests, none is replayed twice",
        )
    until = getattr(options, "until", None) is not None
    rate_per_s = float(problem.workload.arrival_rate_per_s)
    n_stretches = there if until else min(there, options.replications)
    return replay_requests(trace, rate_per_s, n, n_stretches, sticky=problem.assumptions.route_by.sticky)


def _of_the_hour(trace: Trace, hour: Hour | None) -> Trace:
    """The requests that a plan is for: all, or those of its hour, with their own lengths."""
    profile = rate_profile(trace) if hour else None
    return requests_of(trace, profile, profile.at(hour.at)) if hour and profile else trace
