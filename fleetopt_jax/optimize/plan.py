"""What is asked (`Problem`) and what is answered (`Plan`). Host-side records: they carry the catalog's names."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from fleetopt_jax import __version__
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.assumptions import CHOICES, PHYSICAL, Assumptions
from fleetopt_jax.fleet.choices import LENGTHS
from fleetopt_jax.fleet.engine import Engine, at_clock
from fleetopt_jax.fleet.evaluate import FleetMetrics, Objective
from fleetopt_jax.fleet.fleet import Fleet, Slo, make_slo
from fleetopt_jax.laws.compression import MAX_SHRINK
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.laws.power import RooflinePower
from fleetopt_jax.workload.atoms import Workload, digest, mean_tokens, share_above, total_tokens

SCHEMA = "fleetopt-plan/1"
MAX_ASSIGNMENTS = 128  # of engines to pools; each is a search of its own
GAMMA_MAX = 2.0  # the largest compression the paper uses

Method = Literal["exact", "grid", "gradient"]
Tunable = Literal["max_num_seqs", "clock"]
Status = Literal["optimal", "feasible", "infeasible"]


@dataclass(frozen=True)
class EngineChoice:
    """An engine a pool may use, under the names the catalog knows it by."""

    gpu: str
    llm: str
    tp: int
    engine: Engine
    quality: str = "given"  # how its coefficients came about; see the catalog
    precision: str = "bf16"  # of the weights
    kv_precision: str = "bf16"
    step_error: float | None = None  # mean relative error of the decode step; None where nobody knows [-]
    power_error: float | None = None  # and of the power [-]
    max_num_seqs: int | None = None  # asked of the scheduler; None: the GPU's default
    file: str | None = None  # where its coefficients were read from, if not from the catalog
    clock_frac: float = 1.0  # of its GPUs' cores, of their top clock; already in the engine [-]

    @property
    def names(self) -> tuple[str, str, int, str, str]:
        """What makes it this engine and no other, however it is run: equal names share their errors."""
        return self.file or self.gpu, self.llm, self.tp, self.precision, self.kv_precision


def tuned_choice(choice: EngineChoice, *, max_num_seqs: int | None = None, clock_frac: float = 1.0) -> EngineChoice:
    """The engine with a cap of its own on the sequences it runs at once, its GPUs' cores at a share of their clock."""
    engine = choice.engine
    if max_num_seqs is not None:
        engine = dataclasses.replace(engine, kv=dataclasses.replace(engine.kv, **as_floats(max_num_seqs=max_num_seqs)))
    if clock_frac != 1.0:
        engine = at_clock(engine, jnp.asarray(clock_frac, dtype=float))
    cap = choice.max_num_seqs if max_num_seqs is None else max_num_seqs
    return dataclasses.replace(choice, engine=engine, max_num_seqs=cap, clock_frac=clock_frac)


@dataclass(frozen=True)
class Budget:
    """What all pools together may use; inf for no limit. Unlike an `Slo`, which each holds, it couples the pools."""

    max_gpus: float = math.inf
    max_power_w: float = math.inf  # in the power scope of the assumptions [W]
    max_usd_per_h: float = math.inf  # [USD/h]
    gpus_of: tuple[tuple[str, float], ...] = ()  # (GPU name, how many there are), of those that are scarce

    @property
    def caps(self) -> dict[str, float]:
        """Every finite limit by its name."""
        totals = {name: getattr(self, name) for name in ("max_gpus", "max_power_w", "max_usd_per_h")}
        return {name: cap for name, cap in totals.items() if cap < math.inf} | {
            f"gpus_of.{gpu}": count for gpu, count in self.gpus_of
        }


def make_budget(
    *,
    max_gpus: float = math.inf,
    max_power_w: float = math.inf,
    max_usd_per_h: float = math.inf,
    gpus_of: Mapping[str, float] | None = None,
) -> Budget:
    """A checked `Budget`; without limits by default."""
    budget = Budget(max_gpus, max_power_w, max_usd_per_h, tuple(sorted((gpus_of or {}).items())))
    for name, cap in budget.caps.items():
        least = 0.0 if name.startswith("gpus_of.") else 1e-9
        if not cap >= least:
            raise ValueError(f"need {name} {'>= 0' if least == 0 else '> 0'}, got {cap}")
    return budget


@dataclass(frozen=True)
class Problem:
    """Find at most `n_pools` pools, each with one of `choices`, that serve `workload` within `slo` at least cost."""

    workload: Workload
    choices: tuple[EngineChoice, ...]
    slo: Slo
    workload_name: str
    n_pools: int
    window_tokens: float  # window of the last pool: the longest request the fleet promises to serve
    gamma: float | None  # of every boundary; None: searched in [1, GAMMA_MAX]
    objective: Objective
    assume: str  # name of the preset the assumptions come from
    assumptions: Assumptions
    budget: Budget = Budget()
    free: tuple[Tunable, ...] = ()  # what each pool may have of its own; only the gradient search reads it


def make_problem(
    workload: Workload,
    choices: Sequence[EngineChoice],
    *,
    slo: Slo | None = None,
    workload_name: str = "workload",
    n_pools: int = 2,
    window_tokens: float | None = None,
    gamma: float | None = 1.0,
    objective: Objective = "tok_per_j",
    assume: str = "physical",
    assumptions: Assumptions = PHYSICAL,
    budget: Budget | None = None,
    free: Sequence[Tunable] = (),
) -> Problem:
    """A checked `Problem`. The default window is the longest request, rounded up to a whole block of 16 tokens."""
    longest = float(workload.longest_tokens)
    window = BLOCK_TOKENS * math.ceil(longest / BLOCK_TOKENS) if window_tokens is None else float(window_tokens)
    if not choices:
        raise ValueError("need at least one engine choice")
    if not math.isfinite(window):
        raise ValueError(f"need a finite window, got {window}")
    if window < longest:
        raise ValueError(
            f"need a window >= the longest request of {longest:.0f} tokens, got {window:.0f}: "
            f"{float(share_above(workload, window)):.4%} of the requests would not fit"
        )
    _, output = LENGTHS[assumptions.lengths](workload, assumptions)
    if not float(jnp.sum(workload.weight * output)) > 0:
        raise ValueError("need requests with output tokens, got a mean output of 0")
    if n_pools < 1:
        raise ValueError(f"need n_pools >= 1, got {n_pools}")
    if gamma is not None and not (math.isfinite(gamma) and gamma >= 1):
        raise ValueError(f"need gamma >= 1, got {gamma}")
    if gamma is not None and gamma > MAX_SHRINK and assumptions.compression == "prompt_only":
        raise ValueError(f"need gamma <= {MAX_SHRINK:g} where only prompts shrink, got {gamma}")
    if assumptions.integration != "exact":
        raise ValueError("need exact integration: nobody should search over a noisy sampler")
    if slo is not None and slo.scope == "fleet" and assumptions.tail != "quantile":
        raise ValueError("need the tail 'quantile' for limits of the whole fleet: a mean prefill has no distribution")
    if not assumptions.whole:
        raise ValueError("need whole rounding: plans are made of whole instances (gradients relax it themselves)")
    if "max_num_seqs" in free and assumptions.kv_cache != "paged":
        raise ValueError("need a paged KV cache for a free max_num_seqs: reserved slots are capped by the window")
    if "clock" in free and any(isinstance(choice.engine.power, RooflinePower) for choice in choices):
        raise ValueError("need power laws with an idle power for a free clock, not the published roofline's")
    return Problem(
        workload=workload,
        choices=tuple(choices),
        slo=slo or make_slo(),
        workload_name=workload_name,
        n_pools=n_pools,
        window_tokens=window,
        gamma=gamma,
        objective=objective,
        assume=assume,
        assumptions=assumptions,
        budget=budget or Budget(),
        free=tuple(free),
    )


@dataclass(frozen=True)
class Search:
    """How the plan was found, and how sure it is."""

    n_evaluated: int  # pools (exact) or fleets (grid, gradient) whose cost was computed
    wall_s: float
    candidates: str  # what the plan is the best of, in words
    lower_bound: float | None = None  # of the objective over these candidates, whoever found it; None where not known
    gap: float | None = None  # cost of the plan over the lower bound, less one
    by_pools: tuple[
        float | None, ...
    ] = ()  # the objective with at most 1, 2, ... pools; None where none holds the limits


@dataclass(frozen=True)
class Found:
    """What a method found: the cheapest fleet, its pools with engines, or a cost of inf. Arrays [K]."""

    cost: float
    choices: tuple[EngineChoice, ...]
    window_tokens: np.ndarray
    gamma: np.ndarray
    n_instances: np.ndarray
    certified: bool  # no candidate is cheaper
    n_evaluated: int
    candidates: str
    lower_bound: float | None = None  # of the cost
    by_pools: tuple[float, ...] = ()  # least cost with at most 1, 2, ... pools, where the method knows
    homogeneous_w: float | None = None  # least power of one pool [W]; inf where none holds the limits


def usage(budget: Budget, choices: Sequence[EngineChoice], metrics: FleetMetrics) -> dict[str, float]:
    """What a fleet uses of every limit of the budget, by its name."""
    totals = {"max_gpus": metrics.n_gpus, "max_power_w": metrics.power_w, "max_usd_per_h": metrics.usd_per_h}
    n_gpus = np.asarray(metrics.pools.n_gpus)
    totals |= {
        f"gpus_of.{gpu}": sum(n for n, choice in zip(n_gpus, choices, strict=True) if choice.gpu == gpu)
        for gpu, _ in budget.gpus_of
    }
    return {name: float(totals[name]) for name in budget.caps}


def nothing(n_evaluated: int, candidates: str, *, certified: bool = True) -> Found:
    """No candidate holds the limits."""
    empty = np.zeros(0)
    return Found(math.inf, (), empty, empty, empty, certified, n_evaluated, candidates)


@dataclass(frozen=True)
class Plan:
    """The answer. Where no fleet holds the limits, `fleet` and `metrics` are None and `binding` says what is."""

    status: Status
    method: Method | Literal["given"]
    problem: Problem
    choices: tuple[EngineChoice, ...]  # one per pool
    fleet: Fleet | None
    metrics: FleetMetrics | None
    gain_vs_homogeneous: float | None  # tok/J over the best one-pool fleet's; None if no such fleet holds the limits
    search: Search
    binding: dict[str, Any] | None = None


def assignments(problem: Problem) -> list[tuple[EngineChoice, ...]]:
    """Every way to give the pools an engine, refused where a search of each would take too long."""
    if len(problem.choices) ** problem.n_pools > MAX_ASSIGNMENTS:
        raise BadInput(
            "engines and pools",
            f"{len(problem.choices)} engines for {problem.n_pools} pools",
            f"need at most {MAX_ASSIGNMENTS} ways to assign them: name fewer GPUs or fewer pools",
        )
    return list(itertools.product(problem.choices, repeat=problem.n_pools))


def thresholds(problem: Problem) -> np.ndarray:
    """Candidate windows of the pools [tokens]: what the certificate of an exhaustive search is over.

    Every distinct request length and, with a given gamma > 1, every length divided by it: only there does the traffic
    of a pool change. Between two of them a window reserves more without serving more; that is not a proof that none
    could score better by a rounding. The last window as a lower pool's leaves the pools above it empty: that is how
    fewer pools than asked are among the candidates.
    """
    lengths = np.unique(np.ceil(np.asarray(total_tokens(problem.workload))))
    lengths = np.append(lengths, np.ceil(lengths / (problem.gamma or 1.0)))
    return np.unique(np.append(lengths[lengths < problem.window_tokens], problem.window_tokens))


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as the contract's JSON object (SI units)."""
    problem = plan.problem
    mean_prompt, mean_output = (float(x) for x in mean_tokens(problem.workload))
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "status": plan.status,
        "assume": problem.assume,
        "power_scope": problem.assumptions.power_scope,
        "output_share": problem.assumptions.output_share,
        "assumptions": {name: getattr(problem.assumptions, name) for name in CHOICES},
        "dispatch": problem.assumptions.dispatch,
        "method": plan.method,
        "workload": {
            "name": problem.workload_name,
            "arrival_rate_per_s": float(problem.workload.arrival_rate_per_s),
            "mean_prompt_tokens": mean_prompt,
            "mean_output_tokens": mean_output,
            "digest": digest(problem.workload),
        },
        "slo": _slo_json(problem.slo),
        "budget": problem.budget.caps,
        "objective": problem.objective,
        "max_num_seqs": problem.choices[0].max_num_seqs,
        "site": _numbers(problem.choices[0].engine.site),
        "compressor": _numbers(problem.choices[0].engine.compressor),
        "pools": _pools_json(plan),
        "metrics": _metrics_json(plan),
    }
    document["search"] = dataclasses.asdict(plan.search) | {"asked": _asked(document)}
    if plan.binding is not None:
        document["binding"] = plan.binding
    return document


def _asked(document: Mapping[str, Any]) -> str:
    """A name of what was asked, but for the engines to choose from: a certificate is worth nothing under another."""
    parts = ("workload", "slo", "budget", "objective", "site", "compressor", "assumptions", "dispatch", "output_share")
    content = json.dumps([document[part] for part in parts], sort_keys=True)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def _slo_json(slo: Slo) -> dict[str, Any]:
    values = {name: value if name == "scope" else float(value) for name, value in vars(slo).items()}
    return values | {"itl_s": values["itl_s"] if math.isfinite(values["itl_s"]) else None}  # JSON has no infinity


def _numbers(record: Any) -> dict[str, float]:
    return {name: float(value) for name, value in vars(record).items()}


def _pools_json(plan: Plan) -> list[dict[str, Any]]:
    if plan.fleet is None or plan.metrics is None:
        return []
    pools = {
        name: np.asarray(values, dtype=float).tolist()
        for name, values in vars(plan.metrics.pools).items()
        if name != "ttft"
    }
    return [
        {
            "window_tokens": int(plan.fleet.window_tokens[k]),
            "gpu": choice.gpu,
            "llm": choice.llm,
            "tp": choice.tp,
            "precision": choice.precision,
            "kv_precision": choice.kv_precision,
            "engine_file": choice.file,
            "engine_quality": choice.quality,
            "engine_step_error": choice.step_error,
            "engine_power_error": choice.power_error,
            "n_instances": int(pools["n_instances"][k]),
            "n_gpus": int(pools["n_gpus"][k]),
            "max_num_seqs": int(pools["n_max"][k]),
            "max_num_seqs_asked": choice.max_num_seqs,
            "clock_frac": choice.clock_frac,
            "gamma": float(plan.fleet.gamma[k]),
            "traffic_frac": pools["traffic_frac"][k],
            "utilization": pools["utilization"][k],
            "n_active": pools["n_active"][k],
            "prefill_frac": pools["prefill_frac"][k],
            "gpu_power_w": pools["gpu_power_w"][k],
            "power_w": pools["power_w"][k],
            "tok_per_j": pools["tok_per_j"][k],
            "ttft_p99_s": pools["ttft_p99_s"][k],
            "itl_s": pools["itl_s"][k],
            "itl_p99_s": pools["itl_p99_s"][k],
        }
        for k, choice in enumerate(plan.choices)
    ]


def _metrics_json(plan: Plan) -> dict[str, Any] | None:
    if plan.metrics is None:
        return None
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
