"""Engines by (GPU, LLM, tensor parallelism, precision), each with how far to trust it.

`measured` engines of vLLM 0.11: a configuration's own fit where it was measured and the fit describes it (`quality`
measured), the law fitted on that GPU (`law`), or the nearest generation's law carried over by data-sheet figures
(`projected`). Of every other serving engine: operators timed on that GPU and the engine's own time (`kernels`), where
serving points of this configuration were among those fitted `measured`, with operators borrowed `projected`.
`projected` engines: the paper's coefficients, and its roofline law for everything else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal, cast

import jax
import numpy as np

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.catalog.drafts import Drafts, speculation_of
from fleetopt_jax.catalog.gpus import GpuEntry, gpu_entry, is_catalogs
from fleetopt_jax.catalog.hosts import measured_errors, serving_engines
from fleetopt_jax.catalog.llms import LlmEntry, at_precision, llm_entry, names_of
from fleetopt_jax.catalog.operators import OperatorEntry, operator_entry
from fleetopt_jax.catalog.packaged import packaged_json
from fleetopt_jax.catalog.spec import DEFAULT_LLM, DEFAULT_TP, MEASURED_SERVING, EngineSpec, OwnLaws, Quality
from fleetopt_jax.catalog.steps import Parallelism, StepEntry, step_entry
from fleetopt_jax.core.errors import BadField, unknown_name
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.core.units import MS
from fleetopt_jax.fleet.engine import (
    Engine,
    at_clock,
    at_power_limit,
    law_prefill,
    make_engine,
    measured_engine,
    require_fit,
    roofline_engine,
    speculating,
    with_laws,
)
from fleetopt_jax.laws.clocks import MIN_CLOCK_FRAC
from fleetopt_jax.laws.decode import DecodeStep, make_decode_step
from fleetopt_jax.laws.kv_cache import (
    MEMORY_UTILIZATION,
    kv_bytes_on_gpu,
    make_kv_capacity,
    physical_kv,
    workspace_bytes,
)
from fleetopt_jax.laws.llm import Llm, weight_bytes_of_gpu
from fleetopt_jax.laws.measured import EngineLaw, b200_law, h100_law
from fleetopt_jax.laws.mixed_step import CLASSES, decode_of
from fleetopt_jax.laws.operator_step import OperatorPower, operator_prefill, operator_step
from fleetopt_jax.laws.operators.watts import step_watts
from fleetopt_jax.laws.power import ActivityPower, make_logistic_power
from fleetopt_jax.laws.prefill import EFFICIENCY_ERROR, Prefill
from fleetopt_jax.laws.prefix_cache import make_host_cache
from fleetopt_jax.laws.roofline import ROOFLINE_CONTEXT_TOKENS

CALIBRATION_TOKENS = 8192
MAX_TP = 64
MAX_GPUS = 128  # of an instance: nothing larger was measured anywhere
SERVING = (MEASURED_SERVING, *(name for name in serving_engines() if name != MEASURED_SERVING))
# Of a GPU's own time by another's operators, of a decoding step and of a prompt: A100, L40S and RTX PRO 6000 by those
# of H100, H100 and B200, in the mean (tests/test_own_gpu.py); 0.01 to 0.10 among siblings.
LENT_ERRORS = {"dense": (0.12, 0.16), "experts": (0.16, 0.18)}


@dataclass(frozen=True)
class EngineEntry:
    """A built spec, with how far to trust it. Errors are mean absolute relative ones; None where nobody knows."""

    spec: EngineSpec  # its precision said
    engine: Engine
    quality: Quality
    step_error: float | None
    power_error: float | None
    source: str
    prompt_per_output: float = 0.0  # prompt tokens prefilled for each output token in the benchmark it was fitted to
    prefill_error: float | None = EFFICIENCY_ERROR  # of the time a prompt takes
    of_catalog: tuple[str, ...] = ()  # what an engine with laws of its own still has of the catalog


@dataclass(frozen=True)
class _LawOf:
    """The law a GPU goes by."""

    law: Callable[[], EngineLaw]
    quality: Quality
    step_error: float
    power_error: float
    source: str


_FIT = "fitted to ML.ENERGY Benchmark v3 (arXiv 2601.22076); error on architectures left out"
_H100 = _LawOf(h100_law, "law", 0.16, 0.13, f"H100 law {_FIT}")
_B200 = _LawOf(b200_law, "law", 0.22, 0.117, f"B200 law {_FIT}")
# Carried over: the error is the law's on the other GPU's measurements, architectures left out as well
# (experiments/law_vs_measurement.py).
_OVER = "carried over by data-sheet figures; error on the other measured GPU and architectures left out"
_FROM_H100 = replace(_H100, quality="projected", step_error=0.21, power_error=0.14, source=f"H100 law {_OVER}")
_FROM_B200 = replace(_B200, quality="projected", step_error=0.22, power_error=0.19, source=f"B200 law {_OVER}")
_OWN = {"h100": _H100, "b200": _B200}
_CARRIED = {"h100": _FROM_H100, "b200": _FROM_B200}


def law_of(gpu: GpuEntry) -> _LawOf:
    """The law a GPU goes by: its own, or that of the generation its data sheet names."""
    return (_OWN if gpu.name == gpu.law and is_catalogs(gpu) else _CARRIED)[gpu.law]


def build(spec: EngineSpec) -> Engine:
    """The engine of a spec. The same spec gives the same record; `BadField` names the field there is no engine for.

    >>> float(fo.build(fo.EngineSpec("b200", "qwen3-32b", tp=2)).gpus_per_instance)
    2.0
    """
    return engine_entry(spec).engine


def resolved(spec: EngineSpec) -> EngineSpec:
    """The spec with everything said that it leaves to the catalog, so that two ways to ask for an engine are equal."""
    return engine_entry(spec).spec


def engine_entry(spec: EngineSpec) -> EngineEntry:
    """`build`, with how far to trust it. A configuration file of the LLM is read anew, for it may have changed.

    >>> [fo.engine_entry(fo.EngineSpec("h200", serving=name)).quality for name in ("vllm", "vllm-0.11")]
    ['kernels', 'projected']
    """
    return _entry(spec, llm_entry(spec.llm))


@lru_cache(maxsize=4096)
def _entry(spec: EngineSpec, llm: LlmEntry) -> EngineEntry:
    _require_parallelism(spec)
    if spec.serving not in SERVING:
        raise unknown_name("serving", spec.serving, SERVING)
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise BadField(name, f"{value}", "need at least 1")
    if not MIN_CLOCK_FRAC <= spec.clock_frac <= 1:
        raise BadField("clock_frac", f"{spec.clock_frac:g}", f"need {MIN_CLOCK_FRAC:g} to 1")
    if not 0 < spec.memory_utilization <= 1:
        raise BadField("memory_utilization", f"{spec.memory_utilization:g}", "need a share above 0, at most 1")
    if not (0 <= spec.host_cache_bytes < math.inf and 0 < spec.host_cache_bytes_per_s < math.inf):
        name = "host_cache_bytes_per_s" if 0 <= spec.host_cache_bytes < math.inf else "host_cache_bytes"
        allowed = f"need a finite number {'above' if name.endswith('per_s') else 'from'} 0"
        raise BadField(name, f"{getattr(spec, name):g}", allowed)
    if spec.drafts and spec.pp > 1:
        raise BadField(
            "speculate", f"{spec.drafts.name} with {spec.pp} stages of layers", "need pp = 1 where drafts are made"
        )
    if spec.laws and spec.laws.are_steps and spec.laws.speculate != spec.drafts:
        problem = f"{spec.drafts.name if spec.drafts else 'none'}: the engine's own laws are of other iterations"
        raise BadField("speculate", problem, "need no drafts where laws are given")
    a = llm.architecture
    _require_whole_heads(spec, a)
    _require_laws(spec, a)
    gpu = gpu_entry(spec.gpu)
    said = replace(
        spec,
        precision=spec.precision or a.native_precision,
        kv_precision=spec.kv_precision or a.native_kv_precision,
    )
    numbers = at_precision(a, said.precision, said.kv_precision, gpu.formats)
    return _with_host_cache(_as_run(_with_laws(_of_catalog(said, gpu, llm, numbers), spec.laws)), numbers)


def _require_parallelism(spec: EngineSpec) -> None:
    """Refuse numbers of GPUs that no instance has; what an LLM cannot be divided into is its step's to refuse."""
    if not (1 <= spec.tp <= MAX_TP and spec.tp == int(spec.tp)):
        raise BadField("tp", f"{spec.tp}", f"need 1 to {MAX_TP} GPUs per instance")
    for name in ("ep", "dp", "pp"):
        value = getattr(spec, name)
        if not (1 <= value <= MAX_GPUS and value == int(value)):
            raise BadField(name, f"{value}", f"need 1 to {MAX_GPUS}")
    if spec.split.n_gpus > MAX_GPUS:
        name = "dp" if spec.dp > 1 else "pp"
        raise BadField(
            name, f"TP {spec.tp} x DP {spec.dp} x PP {spec.pp}", f"need at most {MAX_GPUS} GPUs per instance"
        )


def _require_laws(spec: EngineSpec, architecture: Architecture) -> None:
    """Refuse what only operators describe, of engines that are not made of them."""
    if spec.serving != MEASURED_SERVING and spec.source == "measured":
        return
    law, allowed = spec.serving, f"need one of the serving engines {', '.join(SERVING[1:])}"
    if spec.source == "projected":
        law, allowed = "the paper", "need engine=measured among the assumptions, and none of the paper's"
    for name in ("ep", "dp", "pp"):
        if getattr(spec, name) > 1:
            raise BadField(name, f"{getattr(spec, name)}: the law of {law} knows tensor parallelism alone", allowed)
    if spec.drafts:
        raise BadField("speculate", f"{spec.drafts.name}: the law of {law} knows no rows that verify drafts", allowed)
    if (n := architecture.cacheless_layers) and not architecture.no_law:
        problem = f"{n} of {architecture.layers} layers keep a state, which the law of {law} does not describe"
        raise BadField("llm", problem, allowed)


def _require_whole_heads(spec: EngineSpec, architecture: Architecture) -> None:
    """Refuse GPUs that the attention heads cannot be shared among, as serving engines do; KV heads may be copied."""
    heads = architecture.q_heads
    if heads and heads % spec.tp:
        allowed = ", ".join(str(tp) for tp in range(1, min(heads, MAX_TP) + 1) if heads % tp == 0)
        problem = f"{spec.tp} GPUs cannot share the {heads} attention heads of {spec.llm_name}"
        raise BadField("tp", problem, f"need one of {allowed}")


def workspace_of(
    architecture: Architecture, gpu: GpuEntry, split: Parallelism, batched_tokens: int | None = None
) -> float:
    """What an engine keeps free of one GPU's share besides weights, NCCL and KV cache [B]: `workspace_bytes` at the
    tokens of a step that the serving engine takes on this GPU, with the widths that the parameters come to. Tokens of
    all groups with attention of their own are gathered for their experts, whose choices divide over `ep`."""
    a, gathered = architecture, split.dp / split.ep
    of_a_width = 3.0 * a.layers * a.hidden  # parameters of gate, up and down
    return float(
        workspace_bytes(
            hidden=a.hidden,
            mlp_width=a.dense_params / of_a_width,
            tp=split.tp,
            batched_tokens=batched_tokens or gpu.batched_tokens,
            experts_per_token=a.experts_per_token * gathered,
            expert_width=a.expert_params / of_a_width / max(a.n_experts, 1) / gathered,
        )
    )


def _of_catalog(spec: EngineSpec, gpu: GpuEntry, entry: LlmEntry, llm: Llm) -> EngineEntry:
    """The engine at its top clock, by the catalog's coefficients."""
    names, split = _names(spec, entry), spec.split
    if spec.max_num_batched_tokens is not None:
        gpu = replace(gpu, batched_tokens=spec.max_num_batched_tokens)
    workspace = workspace_of(entry.architecture, gpu, split)
    published = None
    if spec.source == "projected" and is_catalogs(gpu):
        published = next((PUBLISHED_FLEETS[name] for name in names if name in PUBLISHED_FLEETS), None)
    if published:
        return _published(spec, gpu, llm, published)
    of = f"{spec.llm_name} on {split.n_gpus} x {gpu.name}"
    require_fit(of, gpu.gpu, llm, spec.tp, spec.memory_utilization, workspace, spec.dp, spec.pp)
    if spec.source == "projected":
        return _roofline(spec, gpu, llm)
    if spec.serving == MEASURED_SERVING and spec.laws and spec.laws.factors is not None:
        problem = f"{spec.serving} is not made of operators, which the factors are on"
        raise BadField("serving", problem, f"need one of {', '.join(SERVING[1:])}")
    if spec.serving != MEASURED_SERVING:
        plain = _of_operators(spec, gpu, entry.architecture, llm, workspace)
        return _drafting(plain, spec.drafts, gpu, entry.architecture, llm, workspace) if spec.drafts else plain
    law = _of_law(spec, gpu, llm, workspace)
    fits = own_fits() if spec.own_fit and is_catalogs(gpu) else {}
    fit = next((fits[name[:4]] for name in names if name[:4] in fits), None)
    return _of_fit(law, fit) if fit else law


def _names(spec: EngineSpec, llm: LlmEntry) -> list[tuple[str, str, int, str, str]]:
    """What a spec may be known by: an architecture has one answer, whichever of its names or files is given."""
    how = spec.tp, spec.precision or "", spec.kv_precision or ""
    return [(spec.gpu_name, name, *how) for name in names_of(llm.architecture)]


def _with_laws(entry: EngineEntry, laws: OwnLaws | None) -> EngineEntry:
    """The entry with laws of one's own where they are given: whatever is kept is still as good as it was."""
    if laws is None:
        return entry
    engine = entry.engine
    own = {
        name: value
        for name in ("decode", "power", "prefill", "step", "kv")
        if (value := getattr(laws, name)) is not None
    }
    if laws.idle_w is not None:
        own |= as_floats(idle_w=laws.idle_w)
    changed = own.keys() | _changed_by_factors(laws)
    of_catalog = tuple(words for name, words in _LAW_WORDS.items() if name not in changed)
    return replace(
        entry,
        engine=with_laws(engine, **own),
        quality=laws.quality,
        step_error=laws.step_error if "decode" in changed else entry.step_error,
        power_error=laws.power_error if "power" in changed else entry.power_error,
        source=f"{laws.source}; of the catalog: {', '.join(of_catalog)}" if of_catalog else laws.source,
        prompt_per_output=0.0 if "decode" in changed else entry.prompt_per_output,
        prefill_error=laws.prefill_error if "prefill" in changed else entry.prefill_error,
        of_catalog=of_catalog,
    )


def _changed_by_factors(laws: OwnLaws) -> set[str]:
    """Which laws of a step of operators factors have told: those whose errors they say."""
    if laws.factors is None:
        return set()
    told = {"decode": laws.step_error, "prefill": laws.prefill_error, "power": laws.power_error}
    return {name for name, error in told.items() if error is not None}


_LAW_WORDS = {"decode": "decode step", "power": "power", "prefill": "prefill", "kv": "KV cache", "idle_w": "idle power"}


def _as_run(entry: EngineEntry) -> EngineEntry:
    """At the spec's clock, with its limit on the batch."""
    spec, engine = entry.spec, entry.engine
    if spec.max_num_seqs is not None:
        engine = replace(engine, kv=replace(engine.kv, **as_floats(max_num_seqs=spec.max_num_seqs)))
    if spec.clock_frac != 1.0:
        if not engine.power.has_clock_law:
            raise BadField("clock_frac", f"{spec.clock_frac:g}", f"the {entry.quality} engine has no clock law: need 1")
        engine = at_clock(engine, np.asarray(spec.clock_frac))
    if spec.power_limit_w is not None:
        engine = _limited(entry, engine, spec.power_limit_w)
    return replace(entry, engine=engine)


def _limited(entry: EngineEntry, engine: Engine, limit_w: float) -> Engine:
    """On boards that may draw so much, as `nvidia-smi -pl` limits them."""
    idle_w, tdp_w = float(engine.idle_w), float(gpu_entry(entry.spec.gpu).gpu.tdp_w)
    if not idle_w < limit_w <= tdp_w:
        allowed = f"need above {idle_w:.0f} W, what {entry.spec.gpu_name} draws idle, to {tdp_w:.0f} W, its TDP"
        raise BadField("power_limit_w", f"{limit_w:g} W", allowed)
    try:
        return at_power_limit(engine, np.asarray(limit_w, dtype=float))
    except ValueError:
        what = "drafts" if engine.speculation is not None else f"engines of quality {entry.quality}"
        problem = f"{limit_w:g} W: there is no law of it for {what}"
        raise BadField("power_limit_w", problem, "need engines of operators that draft nothing, or no limit") from None


def _with_host_cache(entry: EngineEntry, llm: Llm) -> EngineEntry:
    """With the tier of the prefix cache in its hosts' memory, if the spec has one."""
    spec = entry.spec
    if not spec.host_cache_bytes:
        return entry
    host = make_host_cache(
        memory_bytes=spec.dp * spec.host_cache_bytes,
        bytes_per_s=spec.dp * spec.host_cache_bytes_per_s,
        kv_bytes_per_token=float(kv_bytes_on_gpu(llm, spec.tp, spec.pp)),
    )
    return replace(entry, engine=replace(entry.engine, host_cache=host))


@dataclass(frozen=True)
class EnginePoint:
    """One engine at one batch."""

    batch: float
    context_tokens: float
    step_s: float  # of a token of each sequence, with the prefill of others in it [s]
    decode_step_s: float  # without [s]
    prefill_frac: float  # share of the step that prefill takes [-]
    tok_per_s: float  # of the instance [1/s]
    power_w_per_gpu: float  # [W]
    tok_per_j: float  # of the instance [1/J]


def engine_points(
    entry: EngineEntry,
    batches: list[float],
    context_tokens: float,
    prompt_per_output: float | None = None,
    prompt_tokens: float | None = None,
) -> list[EnginePoint]:
    """Step, throughput, power and tokens per joule at each batch.

    With `prompt_per_output` prompt tokens prefilled for every output token, by default the benchmark's own mix, which a
    measured throughput contains; in prompts of `prompt_tokens`, by default those of `prompt_of_mix`. A step holds the
    prefill of n mix prompt tokens of (tau1 + tau2 p) each, and draws its power meanwhile: a plan of one constant length
    has the same. A benchmark's measured power contains that of its own mix. With drafts ahead, a step is an iteration's
    share for each token that a sequence gains in it.
    """
    engine = entry.engine
    mix = entry.prompt_per_output if prompt_per_output is None else prompt_per_output
    prompt = prompt_of_mix(context_tokens, mix) if prompt_tokens is None else prompt_tokens
    prefill_s = mix * (float(engine.prefill.per_token_s) + prompt * float(engine.prefill.per_token2_s))
    points = []
    for batch in batches:
        decode_s = float(engine.decode.step_s(batch, context_tokens)) / float(np.asarray(engine.tokens_per_step))
        step_s = decode_s + batch * prefill_s
        prefill_frac = batch * prefill_s / step_s
        power_w = float(engine.power.gpu_w(float(batch), context_tokens))
        if prompt_per_output is not None:
            power_w += prefill_frac * (float(engine.prefill.gpu_w) - power_w)
        tok_per_s = batch / step_s
        points.append(
            EnginePoint(
                batch=batch,
                context_tokens=context_tokens,
                step_s=step_s,
                decode_step_s=decode_s,
                prefill_frac=prefill_frac,
                tok_per_s=tok_per_s,
                power_w_per_gpu=power_w,
                tok_per_j=tok_per_s / (power_w * entry.spec.split.n_gpus),
            )
        )
    return points


def prompt_of_mix(context_tokens: float, prompt_per_output: float) -> float:
    """The prompt of requests of one length, from the mean context of their decoding, p + o / 2, and the mix p / o."""
    return context_tokens * 2.0 * prompt_per_output / (2.0 * prompt_per_output + 1.0)


@dataclass(frozen=True)
class OwnFit:
    """What was fitted to one measured configuration (experiments/fit_engines.py)."""

    decode: DecodeStep
    power_kind: Literal["logistic", "activity"]
    power: dict[str, float]  # its coefficients
    step_error: float
    power_error: float
    prompt_per_output: float
    source: str


@cache
def own_fits() -> dict[tuple[str, str, int, str], OwnFit]:
    """The fits of measured configurations, by (gpu, llm, tp, precision)."""
    document = packaged_json("engines.json")
    return {
        (fit["gpu"], fit["llm"], fit["tp"], fit["precision"]): OwnFit(
            decode=make_decode_step(**fit["decode"]),
            power_kind=fit["power"]["kind"],
            power={name: value for name, value in fit["power"].items() if name != "kind"},
            step_error=fit["step_error"],
            power_error=fit["power_error"],
            prompt_per_output=fit["prompt_per_output"],
            source=f"{document['source']}; {fit['n_points']} batches, {fit['batch_min']:.0f} to {fit['batch_max']:.0f}",
        )
        for fit in document["engines"]
    }


def _of_operators(
    spec: EngineSpec, gpu: GpuEntry, architecture: Architecture, llm: Llm, workspace: float
) -> EngineEntry:
    """The engine whose steps are the sum of their operators, in the serving engine's own time."""
    split, groups = spec.split, spec.dp * spec.pp
    factors = spec.laws.factors if spec.laws else None
    entry = step_entry(architecture, gpu, split, spec.precision or "", spec.kv_precision or "", spec.serving, factors)
    watts = operator_entry("serving_watts", gpu, "serving")
    of_kinds = step_watts(watts.law, CLASSES)
    law = operator_step(entry.step, factors.of_watts(of_kinds) if factors else of_kinds, gpu.gpu)
    prefill = operator_prefill(
        law,
        chunk_tokens=gpu.chunk_tokens,
        calibration_tokens=ROOFLINE_CONTEXT_TOKENS,
        budget_tokens=groups * gpu.batched_tokens,
    )
    most = spec.dp * gpu.max_num_seqs  # each group has a scheduler of its own
    engine = Engine(
        decode=decode_of(entry.step),
        kv=physical_kv(gpu.gpu, llm, spec.tp, most, spec.memory_utilization, workspace, spec.dp, spec.pp),
        power=OperatorPower(law),
        prefill=jax.tree.map(np.asarray, prefill),
        idle_w=gpu.gpu.idle_w,
        usd_per_gpu_h=gpu.gpu.usd_per_h,
        step=law,
        **as_floats(gpus_per_instance=split.n_gpus),
    )
    experts = architecture.n_experts > 0
    quality, errors, blind = _how_sure(spec, gpu, architecture, split, entry)
    step_lent, prefill_lent = _operators_errors(gpu, entry.timed, experts=experts)
    return EngineEntry(
        spec=spec,
        engine=engine,
        quality=quality,
        step_error=_both(errors.get("tpot"), step_lent),
        power_error=watts.mean_errors["experts" if experts else "dense"],
        source=f"{_timed_on(gpu, entry.timed)}, the own time of {entry.host.title} measured on "
        f"{entry.host.measured_on or 'other GPUs'}; errors on {blind} left out",
        prefill_error=_both(errors.get("ttft_8k", errors.get("ttft")), prefill_lent),
    )


def _drafting(
    entry: EngineEntry, drafts: Drafts, gpu: GpuEntry, architecture: Architecture, llm: Llm, workspace: float
) -> EngineEntry:
    """The engine with tokens drafted ahead, whose head takes its layers' share of the weights' memory and of every
    token's. Nobody measured it: acceptance was, elsewhere, and the step that drafts are verified in."""
    spec, speculation = entry.spec, speculation_of(drafts, architecture)
    frac = float(speculation.layers_frac)
    held = replace(llm, **as_floats(kv_bytes_per_token=float(llm.kv_bytes_per_token) * (1.0 + frac)))
    head_bytes = frac * float(weight_bytes_of_gpu(llm, spec.tp, spec.dp, spec.pp))
    room = spec.memory_utilization, workspace + head_bytes
    require_fit(f"{spec.llm_name} with its draft head", gpu.gpu, held, spec.tp, *room, spec.dp, spec.pp)
    kv = physical_kv(gpu.gpu, held, spec.tp, entry.engine.kv.max_num_seqs, *room, spec.dp, spec.pp)
    engine = speculating(replace(entry.engine, kv=kv), speculation)
    return replace(
        entry,
        engine=jax.tree.map(np.asarray, engine),
        quality="kernels" if drafts.is_measured and entry.quality in ("measured", "kernels") else "projected",
        source=f"{entry.source}; {drafts.k} tokens drafted by {drafts.head.title}: {drafts.tokens_per_step:.3g} an "
        f"iteration, {'measured' if drafts.is_measured else 'projected'} ({drafts.head.source})",
    )


def _operators_errors(gpu: GpuEntry, operators: Sequence[OperatorEntry], *, experts: bool) -> tuple[float, float]:
    """What operators of one's own GPU add to the errors of decoding steps and prompts: those that were borrowed theirs,
    and those that were timed what the fit is off."""
    if not gpu.operators:
        return 0.0, 0.0  # the errors of the serving engine's own time hold them
    own = max((each.median_error or 0.0 for each in operators if each.gpu == gpu.name), default=0.0)
    lent = any(each.gpu != gpu.name for each in operators)
    step, prefill = LENT_ERRORS["experts" if experts else "dense"] if lent else (0.0, 0.0)
    return max(step, own), max(prefill, own)


def _both(error: float | None, of_lent: float) -> float | None:
    """Two errors that have nothing to do with each other; None where one is not known."""
    return None if error is None else math.hypot(error, of_lent)


def _timed_on(gpu: GpuEntry, operators: Sequence[OperatorEntry]) -> str:
    """Where operators were timed, and which of them were carried over from another GPU."""
    of = {
        each.gpu: sorted({e.operator.replace("_", " ") for e in operators if e.gpu == each.gpu}) for each in operators
    }
    own, lent = of.pop(gpu.name, []), [f"{name} ({', '.join(names)})" for name, names in of.items()]
    if not lent:
        return f"operators timed on {gpu.name}"
    over = f"on {' and '.join(lent)}, carried over by data-sheet figures"
    return f"operators timed on {gpu.name} ({', '.join(own)}) and {over}" if own else f"operators timed {over}"


def _how_sure(
    spec: EngineSpec, gpu: GpuEntry, architecture: Architecture, split: Parallelism, entry: StepEntry
) -> tuple[Quality, dict[str, float], str]:
    """(quality, errors of TPOT and TTFT, what these errors are blind to) of an engine of operators: its own serving
    points were measured, or its operators were timed on this GPU, or some are borrowed."""
    if gpu.operators:
        return entry.quality, entry.host.errors, "LLMs"
    if entry.quality == "projected":
        return "projected", entry.host.projected_errors, "LLMs and GPUs"
    how = spec.precision or "", spec.kv_precision or "", vars(split)
    if spec.own_fit and is_catalogs(gpu):
        errors = measured_errors(spec.serving, gpu.name, names_of(architecture), *how)
        if errors is not None:
            return "measured", errors, "points of this configuration"
    return "kernels", entry.host.errors, "LLMs" if entry.host.measured_on else "LLMs and GPUs"


def _of_law(spec: EngineSpec, gpu: GpuEntry, llm: Llm, workspace: float) -> EngineEntry:
    law = law_of(gpu)
    kv = physical_kv(gpu.gpu, llm, spec.tp, gpu.max_num_seqs, spec.memory_utilization, workspace)
    engine = measured_engine(
        law.law(),
        gpu.gpu,
        llm,
        spec.tp,
        chunk_tokens=gpu.chunk_tokens,
        budget_tokens=gpu.batched_tokens,
        kv=kv,
    )
    return EngineEntry(
        spec=spec,
        engine=engine,
        quality=law.quality,
        step_error=law.step_error,
        power_error=law.power_error,
        source=law.source,
    )


def _of_fit(law: EngineEntry, fit: OwnFit) -> EngineEntry:
    if fit.power_kind == "logistic":
        power = make_logistic_power(**fit.power)
    else:  # shares of the peaks as in the benchmark, whose steps hold its own prefill
        prefill_s = fit.prompt_per_output * law.engine.prefill.per_token_s
        step = replace(fit.decode, per_seq_s=fit.decode.per_seq_s + prefill_s)
        activity = cast(ActivityPower, law.engine.power)  # of every engine by the law
        power = replace(activity, step=step, **as_floats(**fit.power))
    return replace(
        law,
        engine=with_laws(law.engine, decode=fit.decode, power=power),
        quality="measured",
        step_error=fit.step_error,
        power_error=fit.power_error,
        source=fit.source,
        prompt_per_output=fit.prompt_per_output,
    )


# The paper's own engines: Llama-3.1-70B in 16 bits on eight GPUs.
# (W [s], H at 8,192 tokens [s], 16-token blocks, slots at 8,192 tokens, idle and nominal W, x0), quality, source.
_B200_W_S, _B200_H_S = 2.95491 * MS, 0.134 * MS
_Paper = tuple[tuple[float, ...], Quality, str]
_PAPER: dict[str, _Paper] = {
    "a100": (
        (8.0 * MS, 0.65 * MS, 65_536, 128, 175, 385, 2.5),
        "calibrated",
        "arXiv 2603.17280v1; power from one measured anchor",
    ),
    "h100": (
        (4.0 * MS, 0.32 * MS, 65_536, 256, 300, 600, 4.2),
        "calibrated",
        "arXiv 2603.17280v1; power fitted to ML.ENERGY, step calibrated by hand",
    ),
    "b200": (
        (_B200_W_S, _B200_H_S, 171_936, 671, 430, 860, math.log2(_B200_W_S / _B200_H_S)),
        "scaled",
        "arXiv 2603.17280v1; scaled from H100 by bandwidth, memory and TDP (+-20 %)",
    ),
}
PUBLISHED_FLEETS = {(gpu, DEFAULT_LLM, DEFAULT_TP, "bf16", "bf16"): paper for gpu, paper in _PAPER.items()}


def _prefill(spec: EngineSpec, gpu: GpuEntry, llm: Llm, calibration_tokens: float) -> Prefill:
    """Published chunks and physical FLOPs side by side, the lone iteration counted at a context of so many tokens."""
    return law_prefill(
        law_of(gpu).law(),
        gpu.gpu,
        llm,
        spec.tp,
        chunk_tokens=gpu.chunk_tokens,
        calibration_tokens=calibration_tokens,
        budget_tokens=gpu.batched_tokens,
    )


def _published(spec: EngineSpec, gpu: GpuEntry, llm: Llm, paper: "_Paper") -> EngineEntry:
    if spec.memory_utilization != MEMORY_UTILIZATION:
        given = f"{spec.memory_utilization:g}"
        raise BadField("memory_utilization", given, f"the paper's KV cache is given: need {MEMORY_UTILIZATION:g}")
    (base_s, per_seq_s, blocks, slots, idle_w, nominal_w, x0), quality, source = paper
    engine = make_engine(
        make_decode_step(base_s=base_s, per_token_s=per_seq_s / CALIBRATION_TOKENS),
        make_kv_capacity(n_blocks=blocks, slot_tokens=slots * CALIBRATION_TOKENS, max_num_seqs=gpu.max_num_seqs),
        make_logistic_power(idle_w=idle_w, nominal_w=nominal_w, log2_half_batch=x0),
        _prefill(spec, gpu, llm, CALIBRATION_TOKENS),
        gpus_per_instance=spec.tp,
        usd_per_gpu_h=float(gpu.gpu.usd_per_h),
        idle_w=float(gpu.gpu.idle_w),
    )
    return EngineEntry(spec=spec, engine=engine, quality=quality, step_error=None, power_error=None, source=source)


def _roofline(spec: EngineSpec, gpu: GpuEntry, llm: Llm) -> EngineEntry:
    prefill = _prefill(spec, gpu, llm, ROOFLINE_CONTEXT_TOKENS)
    return EngineEntry(
        spec=spec,
        engine=roofline_engine(gpu.nominal_gpu, llm, spec.tp, prefill, spec.memory_utilization),
        quality="roofline",
        step_error=0.5,
        power_error=None,
        source="roofline law of arXiv 2603.17280v1 on data-sheet figures",
    )
