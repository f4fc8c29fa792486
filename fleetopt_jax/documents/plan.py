"""A plan as JSON (`fleetopt-plan/1`, SI units): written whole, checked when it is read, and evaluated again.

A file names its workload and its engines; `load_plan` finds them again, so that what is loaded is the plan that was
written. What no file can describe, a workload or an engine made in Python, is handed to `load_plan` once more.
"""

import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from fleetopt_jax import __version__
from fleetopt_jax._optimize.plan import Infeasible, OnePoolFleet, Plan, Search, held_in_simulation
from fleetopt_jax._optimize.problem import Problem, make_problem
from fleetopt_jax._optimize.search import evaluate_given
from fleetopt_jax._simulate.observed import within_limit
from fleetopt_jax.catalog.engines import build, engine_entry, resolved
from fleetopt_jax.catalog.gpus import GPUS, GpuEntry
from fleetopt_jax.catalog.llms import LLMS
from fleetopt_jax.catalog.own import Catalog
from fleetopt_jax.catalog.spec import EngineSpec, LaneSpec, TwoStageSpec
from fleetopt_jax.catalog.steps import Parallelism
from fleetopt_jax.catalog.workloads import LoadedWorkload, at_rate, bundled, load, made_workload
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.files import to_json, write_whole
from fleetopt_jax.documents.drafts import drafts_to_json
from fleetopt_jax.documents.engine import load_engine
from fleetopt_jax.documents.failures import reserve_to_json
from fleetopt_jax.documents.own_catalog import load_catalog
from fleetopt_jax.documents.plan_file import (
    SCHEMA,
    EnginePart,
    PlanFile,
    WeightsPart,
    beside_plan,
    read_plan_file,
    seen_from_plan,
)
from fleetopt_jax.documents.repair import broken_to_json
from fleetopt_jax.fleet.assumptions import DISPATCHES, PRESETS, Assumptions, choice_names, parse_assumptions
from fleetopt_jax.fleet.avoided import avoided_prefill
from fleetopt_jax.fleet.choices.prefix_cache import NoPrefixCache, PrefixCache
from fleetopt_jax.fleet.choices.routing_key import TotalTokens
from fleetopt_jax.fleet.fleet import Slo, make_slo
from fleetopt_jax.fleet.resources import Objective, Weights, make_budget
from fleetopt_jax.fleet.surroundings import make_site, make_surroundings
from fleetopt_jax.laws.compression import make_compressor
from fleetopt_jax.laws.speculation import pays_up_to
from fleetopt_jax.workload.atoms import Workload, digest, mean_tokens
from fleetopt_jax.workload.profile import At, Hour
from fleetopt_jax.workload.reuse import mean_reused_tokens

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import Layout  # and pyarrow, which bundled workloads do without

HOW_IT_WAS_READ = ("columns", "at", "hour")  # of a workload; its rate and its digest say what was read
SAME = 1e-9  # relative, between two evaluations of one fleet: compilations round differently

# ------------------------------------------------------------------------------------------------------------- writing


def plan_to_json(
    plan: Plan | Infeasible, columns: "Layout | None" = None, *, path: str | os.PathLike | None = None
) -> dict[str, Any]:
    """The plan, or what no fleet holds, as the contract's JSON object (SI units).

    `columns` are those that a trace of another layout was read by: with them its plan can be evaluated again. `path` is
    the file it is written to, if any: its workload's file is then also named as seen from there.
    """
    problem = plan.problem
    mean_prompt, mean_output = (float(x) for x in mean_tokens(problem.workload))
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "status": plan.status,
        "assume": _assume(problem),
        "power_scope": problem.assumptions.power_scope.name,
        "output_share": problem.assumptions.output_share,
        "assumptions": choice_names(problem.assumptions),
        "dispatch": problem.assumptions.dispatch.name,
        "method": plan.method,
        "workload": {
            "name": problem.service.name,
            "arrival_rate_per_s": float(problem.workload.arrival_rate_per_s),
            "mean_prompt_tokens": mean_prompt,
            "mean_output_tokens": mean_output,
            "digest": digest(problem.workload),
            **hour_to_json(problem.service.hour),
            **_reused(problem.workload),
        },
        "slo": slo_to_json(problem.slo),
        "budget": {name: float(cap) for name, cap in problem.budget.caps.items()},
        "objective": _objective(problem.objective),
        "max_num_seqs": problem.specs[0].max_num_seqs,
        "site": _numbers(problem.around.site),
        "compressor": _numbers(problem.around.compressor),
        "pools": _pools(plan) if isinstance(plan, Plan) else [],
        "metrics": _metrics(plan) if isinstance(plan, Plan) else None,
        "one_pool": dataclasses.asdict(plan.one_pool) if isinstance(plan, Plan) and plan.one_pool else None,
    }
    if problem.service.serve != "mixed":
        document |= {"serve": problem.service.serve, "kv_link": dataclasses.asdict(problem.service.link)}
    if problem.assumptions.route_by != TotalTokens():
        document["route_by"] = {"name": problem.assumptions.route_by.name, **vars(problem.assumptions.route_by)}
    if problem.assumptions.prefix_cache.finds:
        document["prefix_cache"] = cache_to_json(problem.assumptions.prefix_cache)
        if isinstance(plan, Plan):
            document["prefill_avoided"] = _avoided(plan)
    document |= reserve_to_json(problem)
    document["search"] = dataclasses.asdict(plan.search) | {"asked": _question(document)}
    if plan.binding is not None:
        document["binding"] = dataclasses.asdict(plan.binding)
    if isinstance(plan, Plan):
        document |= broken_to_json(plan)
    if path is not None:
        _say_places(document, path)
    if columns is not None:
        document["workload"]["columns"] = dataclasses.asdict(columns)
    return document


def _say_places(document: dict[str, Any], path: str | os.PathLike) -> None:
    """Name the files of a plan as they are seen from the folder it is written to."""
    if seen := seen_from_plan(document["workload"]["name"], path):
        document["workload"]["file"] = seen
    for part in [part for pool in document["pools"] for part in (pool, *pool.get("stages", ()))]:
        if part["catalog_file"]:
            part["catalog_file"] = seen_from_plan(part["catalog_file"], path) or part["catalog_file"]


def save_plan(plan: Plan | Infeasible, path: str | os.PathLike, columns: "Layout | None" = None) -> None:
    """`plan_to_json` as a file, written whole or not at all: `load_plan` reads it back."""
    write_whole(path, to_json(plan_to_json(plan, columns, path=path)) + "\n")


def slo_to_json(slo: Slo) -> dict[str, Any]:
    """The limits (SI units); null is no limit, for JSON has no infinity."""
    values = {name: value if name == "scope" else float(value) for name, value in vars(slo).items()}
    return values | {"itl_s": values["itl_s"] if math.isfinite(values["itl_s"]) else None}


def cache_to_json(cache: PrefixCache) -> dict[str, Any]:
    """A prefix cache by its name, and what it says beside."""
    return {"name": cache.name, **vars(cache)}


def hour_to_json(hour: Hour | None) -> dict[str, Any]:
    """The hour of a trace that is planned for, beside the workload's other fields."""
    if hour is None:
        return {"at": "mean"}
    values = dataclasses.asdict(hour)
    return {"at": values.pop("at"), "hour": values}


def _assume(problem: Problem) -> str:
    """A preset and choices changed in it that are the assumptions: the problem's own words where they are."""
    names = choice_names(problem.assumptions)
    try:
        if choice_names(parse_assumptions(problem.assume)) == names:
            return problem.assume
    except BadInput:
        pass
    ways = []
    for preset, assumptions in PRESETS.items():
        usual = choice_names(assumptions)
        ways.append([preset, *(f"{choice}={name}" for choice, name in names.items() if name != usual[choice])])
    return ",".join(min(ways, key=len))


def _question(document: Mapping[str, Any]) -> str:
    """A name of what was asked, but for the engines to choose from: a certificate is worth nothing under another."""
    parts = ("workload", "slo", "budget", "objective", "site", "compressor", "assumptions", "dispatch", "output_share")
    asked = [document[part] for part in parts] + [
        document[part] for part in ("route_by", "prefix_cache", "serve", "kv_link", "reserve") if part in document
    ]
    asked[0] = {name: value for name, value in asked[0].items() if name not in HOW_IT_WAS_READ}
    content = json.dumps(asked, sort_keys=True)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def _objective(objective: Objective | Weights) -> str | dict[str, Any]:
    if isinstance(objective, str):
        return objective
    prices: dict[str, Any] = {name: float(x) for name, x in vars(objective).items() if name != "gpus_of" and x}
    if objective.gpus_of:
        prices["gpus_of"] = {gpu: float(price) for gpu, price in objective.gpus_of.items()}
    return {"weights": prices}


def _numbers(record: Any) -> dict[str, float]:
    return {name: float(value) for name, value in vars(record).items()}


def _reused(workload: Workload) -> dict[str, float]:
    """The share of the prompt tokens that was in other prompts before, where that is known."""
    if workload.reuse is None:
        return {}
    return {"reused_frac": float(mean_reused_tokens(workload) / mean_tokens(workload)[0])}


def _pools(plan: Plan) -> list[dict[str, Any]]:
    pools = plan.metrics.pools
    names = ("traffic_frac", "utilization", "n_active", "prefill_frac", "gpu_power_w", "power_w", "tok_per_j")
    names += ("mean_prompt_tokens", "ttft_p99_s", "itl_s", "itl_p99_s")
    names += ("prefix_hit_frac",) if plan.problem.assumptions.prefix_cache.finds else ()
    numbers = {name: np.asarray(getattr(pools, name), dtype=float).tolist() for name in names}
    if plan.problem.slo.ttft_s_per_token and pools.ttft is not None:  # a P99 says nothing of a limit that grows
        numbers["ttft_within_frac"] = within_limit(plan.metrics, plan.problem.slo).tolist()
    return [
        {
            "window_tokens": int(plan.fleet.window_tokens[k]),
            **_engine(spec.stages[-1]),
            "n_instances": int(pools.n_instances[k]),
            "n_gpus": int(pools.n_gpus[k]),
            "max_num_seqs": int(pools.n_max[k]),
            "max_num_seqs_by": _batch_limit(plan, k),
            **_as_run(spec.stages[-1]),
            **_speculate(plan, k),
            "gamma": float(plan.fleet.gamma[k]),
            **{name: values[k] for name, values in numbers.items()},
            **_two_stages(plan, k),
        }
        for k, spec in enumerate(plan.lanes)
    ]


def _as_run(spec: EngineSpec) -> dict[str, Any]:
    """How an engine is run, beside its names."""
    return {
        "max_num_seqs_asked": spec.max_num_seqs,
        "max_num_batched_tokens_asked": spec.max_num_batched_tokens,
        "memory_utilization": spec.memory_utilization,
        **_host_cache(spec),
        "clock_frac": spec.clock_frac,
        **({"power_limit_w": float(spec.power_limit_w)} if spec.power_limit_w is not None else {}),
        **({"speculate": drafts_to_json(spec.drafts)} if spec.drafts else {}),
    }


def _host_cache(spec: EngineSpec) -> dict[str, Any]:
    """What each GPU keeps in its host's memory behind its prefix cache, if anything."""
    if not spec.host_cache_bytes:
        return {}
    values = {"bytes_per_gpu": spec.host_cache_bytes, "bytes_per_s_per_gpu": spec.host_cache_bytes_per_s}
    return {"host_cache": {name: float(value) for name, value in values.items()}}


def _two_stages(plan: Plan, k: int) -> dict[str, Any]:
    """What a pool of two stages has beside the fields of any pool, whose engine is that of the stage that decodes: its
    stages, and the way between them."""
    lane, stages = plan.fleet.lanes[k], plan.metrics.pools.stages
    if lane.hand_over is None or stages is None:
        return {}
    found = jax.tree.map(lambda x: np.asarray(x)[k], stages)
    each = [
        {
            "role": lane.stages[i].role,
            **_engine(spec),
            "n_instances": int(found.n_instances[i]),
            "n_gpus": int(found.n_gpus[i]),
            "power_w": float(found.power_w[i]),
            "gpu_power_w": float(found.gpu_power_w[i]),
            "utilization": float(found.utilization[i]),
            "n_active": float(found.n_active[i]),
            "max_num_seqs": int(found.n_max[i]),
            **_as_run(spec),
        }
        for i, spec in enumerate(plan.lanes[k].stages)
    ]
    prompt = float(np.asarray(plan.metrics.pools.mean_prompt_tokens)[k])
    way = {"bytes_per_s": float(lane.hand_over.bytes_per_s), "latency_s": float(lane.hand_over.latency_s)}
    return {"stages": each, "hand_over": way | {"mean_s": float(lane.hand_over.seconds(prompt))}}


def _speculate(plan: Plan, k: int) -> dict[str, Any]:
    """What the k-th pool drafts ahead, if anything, and up to which batch a token is faster for it."""
    spec, engine = plan.lanes[k].stages[-1], plan.fleet.lanes[k].stages[-1].engine
    pools = plan.metrics.pools
    if spec.drafts is None:
        return {}
    plain = build(dataclasses.replace(spec, speculate=None, laws=spec.laws and spec.laws.without_drafts))
    context = float(pools.mean_prompt_tokens[k]) + float(mean_tokens(plan.problem.workload)[1]) / 2.0
    batch = pays_up_to(plain.decode, engine.decode, engine.tokens_per_step, context, float(pools.n_max[k]))
    return {"speculate": {**drafts_to_json(spec.drafts), "pays_up_to_seqs": batch, "at_context_tokens": context}}


def _batch_limit(plan: Plan, k: int) -> Literal["kv_cache", "max_num_seqs"]:
    """What keeps the batch of a pool's instances from being larger."""
    scheduled = plan.problem.assumptions.kv_cache.caps_sequences
    at_most = float(plan.fleet.lanes[k].stages[-1].engine.kv.max_num_seqs)
    return "max_num_seqs" if scheduled and float(plan.metrics.pools.n_max[k]) >= at_most else "kv_cache"


def _engine(spec: EngineSpec) -> dict[str, Any]:
    """A pool's engine, but for how it is run."""
    entry = engine_entry(spec)
    document = {
        "gpu": spec.gpu_name,
        "llm": spec.llm_name,
        **vars(spec.split),
        "serving": spec.serving,
        "precision": entry.spec.precision,
        "kv_precision": entry.spec.kv_precision,
        "usd_per_gpu_h": float(entry.engine.usd_per_gpu_h),
        "catalog_file": spec.catalog,
        "engine_file": spec.file,
        "engine_quality": entry.quality,
        "engine_step_error": entry.step_error,
        "engine_power_error": entry.power_error,
        "engine_prefill_error": entry.prefill_error,
        "engine_of_catalog": list(entry.of_catalog),
    }
    return document | ({"laws": "own"} if _is_own(spec) else {})


def _is_own(spec: EngineSpec) -> bool:
    """Whether neither names nor a file describe the engine."""
    laws = spec.laws is not None and spec.file is None
    gpu = not isinstance(spec.gpu, str) and GPUS.get(spec.gpu.name) != _at_our_price(spec.gpu)
    llm = not isinstance(spec.llm, str) and LLMS.get(spec.llm_name) != spec.llm
    return laws or ((gpu or llm) and spec.catalog is None)


def _at_our_price(gpu: GpuEntry) -> GpuEntry:
    """A GPU at the catalog's price, if it is there: a plan says the price by itself."""
    ours = GPUS.get(gpu.name)
    return gpu if ours is None else dataclasses.replace(gpu, usd_per_h=ours.usd_per_h)


def _avoided(plan: Plan) -> dict[str, float]:
    """What the plan's prefix cache spares."""
    pools, problem = plan.metrics.pools, plan.problem
    avoided = avoided_prefill(plan.fleet, problem.workload, pools, problem.assumptions)
    prompt_per_s = float(np.sum(np.asarray(pools.rate_per_s * pools.mean_prompt_tokens)))
    values = {name: float(np.sum(np.asarray(value))) for name, value in vars(avoided).items()}
    return {"prompt_frac": values["tokens_per_s"] / prompt_per_s if prompt_per_s else 0.0, **values}


def _metrics(plan: Plan) -> dict[str, Any]:
    metrics = plan.metrics
    return {
        "tok_per_j": float(metrics.tok_per_j),
        "output_tok_per_s": float(metrics.output_tok_per_s),
        "power_w": float(metrics.power_w),
        "n_instances": int(metrics.n_instances),
        "n_gpus": int(metrics.n_gpus),
        "usd_per_h": float(metrics.usd_per_h),
        "ttft_p99_s": float(metrics.ttft_p99_s if plan.problem.slo.scope == "pool" else metrics.ttft_p99_of_all_s),
        "ttft_p99_worst_pool_s": float(metrics.ttft_p99_s),
        "ttft_p99_of_all_s": float(metrics.ttft_p99_of_all_s),
        "itl_s": float(metrics.itl_s),
        "itl_p99_s": float(metrics.itl_p99_s),
        "kg_co2_per_h": float(metrics.kg_co2_per_h),
        "unserved_frac": float(metrics.unserved_frac),
        "gain_vs_homogeneous": plan.gain_vs_homogeneous,
    }


# ------------------------------------------------------------------------------------------------------------- loading


def load_plan(
    path: str | os.PathLike,
    *,
    specs: Sequence[EngineSpec] = (),
    workload: LoadedWorkload | Workload | None = None,
    rate_per_s: float | None = None,
) -> Plan:
    """The plan in a file, evaluated under its own workload, or under another one or another rate.

    `specs` are the engines that a file cannot describe, with a GPU, an LLM or laws of your own: each is found by the
    names (gpu, llm, tp) that the file has for it. `workload` is needed where the file's is no bundled one and no file.
    Where nothing has changed, the plan keeps the search that found it, and its certificate; where its fleet now breaks
    a limit, its status says so. Warns where the file's workload has other requests by now.

    `rate_per_s` is the mean of all hours, as in `load_workload`: a plan for the busiest hour is then evaluated in it.

    Raises BadInput that names the file, the field and the value; also for a plan without pools, of no fleet at all.

    >>> import tempfile
    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> plan = fo.optimize(fo.make_problem(chat, [fo.EngineSpec("h100")], n_pools=1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fo.save_plan(plan, f"{folder}/plan.json")
    ...     again = fo.load_plan(f"{folder}/plan.json", workload=chat)
    >>> again.status, again.specs == plan.specs
    ('optimal', True)
    """
    where = os.fspath(path)
    file = read_plan_file(where)
    if workload is None:
        loaded = workload_of_file(file, where, rate_per_s=rate_per_s)
        if is_another(file, loaded.workload):
            warnings.warn(f"{loaded.name} has other requests than when {where} was made", stacklevel=2)
        return plan_of_file(file, where, loaded, specs=specs)
    share = {} if file.output_share is None else {"output_share": file.output_share}
    given = workload if isinstance(workload, LoadedWorkload) else made_workload(file.workload.name, workload, **share)
    if rate_per_s is not None:
        given = at_rate(given, rate_per_s * given.over_mean)
    return plan_of_file(file, where, given, specs=specs)


def workload_of_file(
    file: PlanFile,
    where: str,
    *,
    rate_per_s: float | None = None,
    layout: "Layout | None" = None,
    at: At | None = None,
) -> LoadedWorkload:
    """A plan's own workload, at its own rate and hour and read by its own columns unless others are given. A relative
    path is seen from the folder of the plan, `where`, or from the current one where nothing is there.

    Another rate is the mean of all hours; another hour has its share of the mean that the plan was made with.
    """
    places = {"workload": "workload.name", "columns": "workload.columns"} | (
        {"at": "workload.at"} if at is None else {}
    )
    rate = rate_per_s or file.mean_rate_per_s
    try:
        how = {"layout": layout or file.layout, "at": at or file.workload.at, "sticky": file.sticky}
        loaded = load(workload_place(file, where), rate_per_s=rate, **how)
    except BadField as error:
        raise error.at(lambda field: f"{where}, {places[field]}" if field in places else field) from None
    if rate_per_s is None and at in (None, file.workload.at):
        return at_rate(loaded, file.workload.arrival_rate_per_s)  # whatever requests the file has by now
    return loaded


def workload_place(file: PlanFile, where: str) -> str:
    """The bundled workload, or where the file lies, that a plan was made for."""
    name = file.workload.name
    return name if name in bundled() else beside_plan(name, where, file.workload.file)


def plan_of_file(
    file: PlanFile,
    where: str,
    loaded: LoadedWorkload,
    *,
    specs: Sequence[EngineSpec] = (),
    dispatch: Literal["jsq", "round_robin", "random", "affinity", "bounded_hash"] | None = None,
    serving: str | None = None,
    prefix_cache: PrefixCache | None = None,
    catalog: Catalog | None = None,
) -> Plan:
    """What a plan file, read from `where`, says of a workload; `dispatch`, `serving` and `prefix_cache` in place of its
    own, names and prices by `catalog` where that has them."""
    assumptions = dataclasses.replace(
        parse_assumptions(file.assume, f"{where}, assume"),
        output_share=loaded.output_share,
        dispatch=DISPATCHES[dispatch or file.dispatch],
        route_by=file.route_by.choice if file.route_by else TotalTokens(),
        prefix_cache=prefix_cache or (file.prefix_cache.choice if file.prefix_cache else NoPrefixCache()),
    )
    chosen = [_lane_spec(_Read(file, where, assumptions, specs, catalog), k, serving) for k in range(len(file.pools))]
    last = file.pools[-1]
    try:
        loaded.require_window(last.gamma * last.window_tokens)
    except BadField as error:
        raise error.at(lambda _: f"{where}, pools.{len(chosen) - 1}.window_tokens") from None
    try:
        problem = make_problem(
            loaded.workload,
            list(dict.fromkeys(_as_searched(spec, file) for lane in chosen for spec in lane.stages)),
            slo=make_slo(**file.slo.limits()),
            window_tokens=max(last.window_tokens, float(loaded.workload.longest_tokens)),
            workload_name=loaded.name,
            hour=loaded.hour,
            n_pools=len(chosen),
            serve=file.serve,
            link=file.link,
            objective=_objective_of(file.objective),
            budget=make_budget(**file.budget.limits()),
            assume=file.assume,
            assumptions=assumptions,
            surroundings=make_surroundings(
                make_site(**file.site.model_dump()),
                make_compressor(**file.compressor.model_dump()),
                reserve=file.reserve and file.reserve.choice,
            ),
            rates=file.failure_rates and file.failure_rates.rates,
        )
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(where, str(error)) from None
    plan = evaluate_given(
        problem,
        chosen,
        window_tokens=[pool.window_tokens for pool in file.pools],
        gamma=[pool.gamma for pool in file.pools],
        n_instances=file.n_instances,
    )
    return plan if catalog else _as_found(plan, file)  # which may have been found at other prices


def is_another(file: PlanFile, workload: Workload) -> bool:
    """Whether a workload has other requests than the one that a plan was made for, if that is known."""
    return file.workload.digest is not None and digest(workload) != file.workload.digest


@dataclasses.dataclass(frozen=True)
class _Read:
    """A plan file, read from `where`, and what its names stand for: those of the `given` catalog, if any."""

    file: PlanFile
    where: str
    assumptions: Assumptions
    specs: Sequence[EngineSpec]
    given: Catalog | None


def _lane_spec(about: _Read, k: int, serving: str | None) -> LaneSpec:
    """The engines of the k-th pool, as another serving engine runs them where that is given."""
    pool = about.file.pools[k]
    if pool.stages is None:
        return _run_by(_spec(about, pool, f"pools.{k}"), serving, about.where, f"pools.{k}")
    places = [f"pools.{k}.stages.{i}" for i in range(2)]
    each = [_spec(about, stage, place) for stage, place in zip(pool.stages, places, strict=True)]
    prefill, decode = (_run_by(spec, serving, about.where, place) for spec, place in zip(each, places, strict=True))
    return TwoStageSpec(prefill, decode, about.file.link)


def _spec(about: _Read, part: EnginePart, place: str) -> EngineSpec:
    """The engine of a pool or of a stage, which is at `place` in the file."""
    where, file = about.where, about.file
    engine_file = part.engine_file or (part.gpu if part.gpu.lower().endswith(".json") else None)
    engine_file = engine_file and beside_plan(engine_file, where)
    llm = beside_plan(part.llm, where) if part.llm.lower().endswith(".json") else part.llm
    cap = part.max_num_seqs_asked if "max_num_seqs_asked" in part.model_fields_set else file.max_num_seqs
    try:
        if part.laws == "own":
            spec = _handed_over(part, about.specs)
        elif engine_file:
            spec = load_engine(engine_file, catalog_of_pool(part, where, about.given))
        else:
            catalog = catalog_of_pool(part, where, about.given)
            how = {"ep": part.ep, "dp": part.dp, "pp": part.pp, "serving": part.serving}
            spec = catalog.spec(part.gpu, llm, part.tp, part.precision, source=about.assumptions.engine.name, **how)
        as_run = {"kv_precision": part.kv_precision, "max_num_seqs": cap, "clock_frac": part.clock_frac}
        as_run |= {"power_limit_w": part.power_limit_w}
        as_run |= {"max_num_batched_tokens": part.max_num_batched_tokens_asked}
        as_run |= {"speculate": part.speculate and part.speculate.drafts}
        as_run |= part.host_cache.as_run if part.host_cache else {}
        return resolved(dataclasses.replace(spec, **as_run, memory_utilization=part.memory_utilization))
    except BadField as error:
        raise error.at(lambda field: f"{where}, {place}.{field}") from None


def _run_by(spec: EngineSpec, serving: str | None, where: str, place: str) -> EngineSpec:
    """The engine as another serving engine runs it, if that is given."""
    if not serving:
        return spec
    try:
        return resolved(dataclasses.replace(spec, serving=serving))
    except BadField as error:
        raise error.at(lambda field: field if field == "serving" else f"{where}, {place}.{field}") from None


def catalog_of_pool(pool: EnginePart, where: str, given: Catalog | None = None) -> Catalog:
    """What a pool's names stand for, at its price, but for what a `given` catalog says of that; the plan was read from
    `where`."""
    catalog = given or own_catalog(pool.catalog_file, where)
    if pool.usd_per_gpu_h is None or (given and given.says_price(pool.gpu)):
        return catalog
    return catalog.at_prices({pool.gpu: pool.usd_per_gpu_h}, "gpu")


def own_catalog(file: str | None, where: str) -> Catalog:
    """The catalog file that a pool of the plan in `where` names, if any, beside ours."""
    return load_catalog(beside_plan(file, where)) if file else Catalog()


def _handed_over(pool: EnginePart, specs: Sequence[EngineSpec]) -> EngineSpec:
    """The first of the specs that has a pool's names; of several, one in its precision and of its serving engine."""
    split = Parallelism(pool.tp, pool.ep, pool.dp, pool.pp)
    names = (pool.gpu.lower(), pool.llm.lower(), split)
    found = [spec for spec in specs if (spec.gpu_name.lower(), spec.llm_name.lower(), spec.split) == names]
    alike = [spec for spec in found if pool.precision in (None, resolved(spec).precision)]
    if "serving" in pool.model_fields_set:
        alike = [spec for spec in alike if spec.serving == pool.serving]
    if not alike:
        problem = f"{pool.llm} on {split.n_gpus} x {pool.gpu} is an engine that no file describes"
        raise BadField("gpu", problem, "need its EngineSpec among the specs: load_plan(path, specs=[...])")
    return alike[0]


def _as_searched(spec: EngineSpec, file: PlanFile) -> EngineSpec:
    """The engine as a search had it to choose from, before pools chose their own batch limit and clock."""
    return dataclasses.replace(spec, max_num_seqs=file.max_num_seqs, clock_frac=1.0)


def _objective_of(objective: Objective | WeightsPart) -> Objective | Weights:
    return objective if isinstance(objective, str) else Weights(**objective.weights.model_dump())


def _as_found(plan: Plan, file: PlanFile) -> Plan:
    """With the search that found it, and its gain over what that search had to choose from, where the plan still is
    what the file promises; of one that held in simulation the laws' latencies do not count."""
    as_given = plan
    plan = held_in_simulation(plan) if file.verified and file.verified.held else plan
    if plan.binding or file.search is None or file.metrics is None or file.status == "infeasible":
        return as_given
    document = plan_to_json(plan)
    if not is_another(file, plan.problem.workload):  # the same requests, whatever their file and rounding
        document["workload"] |= file.workload.model_dump(include={"name", "mean_prompt_tokens", "mean_output_tokens"})
    of_the_same = file.search.asked == _question(document)
    if not (of_the_same and math.isclose(float(plan.metrics.tok_per_j), file.metrics.tok_per_j, rel_tol=SAME)):
        return as_given
    search = Search(**file.search.model_dump(exclude={"asked"}))
    told = "gain_vs_homogeneous" in file.metrics.model_fields_set
    gain = file.metrics.gain_vs_homogeneous if told else plan.gain_vs_homogeneous
    beside = OnePoolFleet(**file.one_pool.model_dump()) if file.one_pool else None
    return dataclasses.replace(
        plan,
        status=file.status,
        method=file.method,
        search=search,
        gain_vs_homogeneous=gain,
        one_pool=beside if "one_pool" in file.model_fields_set else plan.one_pool,
    )
