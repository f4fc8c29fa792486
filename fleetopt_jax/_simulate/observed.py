"""What a simulation saw, as metrics of every replication; and what the laws say of the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from fleetopt_jax._simulate.pool import PoolRun
from fleetopt_jax._simulate.routing import REJECTED, Routed
from fleetopt_jax._simulate.state import GAP_RANGE_S, N_GAPS
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.evaluate import FleetMetrics
from fleetopt_jax.fleet.fleet import Lane, Slo
from fleetopt_jax.fleet.surroundings import Surroundings
from fleetopt_jax.laws.ttft import ttft_tail

QUANTILES = (0.5, 0.9, 0.99)

Replicated = dict[str, np.ndarray]  # metrics of each replication, arrays [R]
Analytic = dict[str, float | None]  # what the laws say of a metric; None where nothing


@dataclass(frozen=True)
class Observed:
    """What became of the requests; numpy arrays [R, M] unless another shape is given."""

    routed: Routed
    window_s: np.ndarray  # from when to when statistics are taken [R, 2]
    counted: np.ndarray  # whether it came in that window
    ttft_s: np.ndarray  # inf where it never came [s]
    end_s: np.ndarray  # from arrival to the last token [s]
    limit_s: np.ndarray  # of its TTFT [s]
    found_tokens: np.ndarray | None = None  # of its prompt, nan if it was never admitted; None without a prefix cache

    @property
    def seconds(self) -> np.ndarray:
        """Length of the window [R]."""
        return self.window_s[:, 1] - self.window_s[:, 0]


def n_whole(lane: Lane) -> int:
    """Instances that decode, of a lane; only whole ones can be simulated."""
    return whole_stages(lane)[-1]


def whole_stages(lane: Lane) -> list[int]:
    """Instances of each of its stages."""
    return [int(np.rint(np.asarray(stage.n_instances))) for stage in lane.stages]


def pool_metrics(
    lane: Lane, k: int, surroundings: Surroundings, run: PoolRun | None, seen: Observed, assumptions: Assumptions
) -> Replicated:
    """Of the k-th pool; nothing of one without requests. Of two stages in flight, busy and held is the second."""
    if run is None:
        return {}
    engine, n, seconds = lane.stages[-1].engine, n_whole(lane), seen.seconds
    sums = {name: values.sum(axis=1) for name, values in run.tally._asdict().items()}
    tried_tokens = seen.routed.tried_tokens * ((seen.routed.tried_pool == k) & seen.counted)
    compressor_w = np.sum(tried_tokens, axis=1) / seconds * float(surroundings.compressor.j_per_token)
    gpu_w, power_w = _watts(lane, run, seconds, surroundings, compressor_w, assumptions)
    n_active = sums["in_flight_s"] / seconds / n
    in_use = sums["blocks_s"] / seconds / n
    blocks = np.asarray(assumptions.kv_cache.occupied_blocks(engine.kv, lane.window_tokens, in_use, n_active))
    output_tok_per_s = sums["tokens"] / seconds
    return {
        "tok_per_j": output_tok_per_s / power_w,
        "output_tok_per_s": output_tok_per_s,
        "power_w": power_w,
        "gpu_power_w": gpu_w,
        "n_active": n_active,
        "busy_frac": sums["busy_s"] / seconds / n,
        "prefill_frac": sums["prefill_s"] / seconds / n,
        "kv_occupancy": blocks / float(engine.kv.n_blocks),
        "itl_s": sums["gaps_s"] / np.maximum(sums["gaps"], 1e-9),
        **_latencies(seen, seen.counted & (seen.routed.pool == k)),
        **_hits(seen, seen.counted & (seen.routed.pool == k)),
        **_gap_quantiles(run.gap_counts),
    }


def _watts(
    lane: Lane,
    run: PoolRun,
    seconds: np.ndarray,
    surroundings: Surroundings,
    compressor_w: np.ndarray,
    assumptions: Assumptions,
) -> tuple[np.ndarray, np.ndarray]:
    """(of one GPU in the mean, of the pool) [R] [W]; what compresses counts with the stage that prefills."""
    runs = [run] if run.before is None else [run.before, run]
    power_w, boards_w, boards = np.zeros_like(seconds), np.zeros_like(seconds), 0.0
    for i, (stage, each, n) in enumerate(zip(lane.stages, runs, whole_stages(lane), strict=True)):
        gpu_w, scope = each.tally.gpu_j.sum(axis=1) / seconds / n, assumptions.power_scope
        more_w = compressor_w if i == 0 else 0.0
        power_w = power_w + np.asarray(scope.pool_w(stage.engine, surroundings.site, n, gpu_w, more_w))
        gpus = n * float(stage.engine.gpus_per_instance)
        boards_w, boards = boards_w + gpus * gpu_w, boards + gpus
    return boards_w / boards, power_w


def fleet_metrics(
    lanes: Sequence[Lane], pools: Sequence[Replicated], runs: Sequence[PoolRun | None], seen: Observed, slo: Slo
) -> Replicated:
    """Of all pools together, from the metrics and the runs of each."""
    counts = [n_whole(lane) for lane, pool in zip(lanes, pools, strict=True) if pool]
    served, busy = [run for run in runs if run], [pool for pool in pools if pool]
    counted = seen.counted
    zero = np.zeros(len(counted))
    power_w, output_tok_per_s = (sum((pool[name] for pool in busy), zero) for name in ("power_w", "output_tok_per_s"))
    gaps_s, gaps = (sum((getattr(run.tally, name).sum(axis=1) for run in served), zero) for name in ("gaps_s", "gaps"))
    n_active = sum((n * pool["n_active"] for n, pool in zip(counts, busy, strict=True)), zero)
    latencies = _latencies(seen, counted)
    worst_s = np.max([pool["ttft_p99_s"] for pool in busy], axis=0, initial=0.0)
    rejected = (seen.routed.pool == REJECTED) & counted
    return {
        "tok_per_j": output_tok_per_s / np.maximum(power_w, 1e-9),
        "output_tok_per_s": output_tok_per_s,
        "power_w": power_w,
        "n_active": n_active / max(sum(counts), 1),
        "itl_s": gaps_s / np.maximum(gaps, 1e-9),
        **_gap_quantiles(sum((run.gap_counts for run in served), np.zeros((len(counted), N_GAPS)))),
        **latencies,
        **_hits(seen, counted),
        "ttft_p99_s": worst_s if slo.scope == "pool" else latencies["ttft_p99_s"],
        "ttft_p99_of_all_s": latencies["ttft_p99_s"],
        "rejected_frac": np.sum(rejected, axis=1) / np.maximum(counted.sum(axis=1), 1),
    }


def _latencies(seen: Observed, counted: np.ndarray) -> Replicated:
    """Of the requests that are `counted`; all hold their limits where there are none."""
    found: Replicated = {}
    for name, values in (("ttft", seen.ttft_s), ("e2e", seen.end_s)):
        rows = [_quantiles(row[mask]) for row, mask in zip(values, counted)]
        found |= {f"{name}_p{100 * q:.0f}_s": np.array([row[i] for row in rows]) for i, q in enumerate(QUANTILES)}
    met = [row[mask] <= most[mask] for row, most, mask in zip(seen.ttft_s, seen.limit_s, counted)]
    found["slo_attainment"] = np.array([np.mean(row) if len(row) else 1.0 for row in met])
    return found


def _hits(seen: Observed, counted: np.ndarray) -> Replicated:
    """Of the prompt tokens of the `counted` requests that were admitted, the share that was found in the cache."""
    if seen.found_tokens is None:
        return {}
    found = np.where(counted, seen.found_tokens, np.nan)
    prompts = np.where(np.isfinite(found), seen.routed.prompt_tokens, 0.0)
    return {"prefix_hit_frac": np.nansum(found, axis=1) / np.maximum(prompts.sum(axis=1), 1.0)}


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Of all arrivals; the next larger observation, since infinite ones cannot be interpolated."""
    return np.quantile(values, QUANTILES, method="higher") if len(values) else np.zeros(len(QUANTILES))


def _gap_quantiles(counts: np.ndarray) -> Replicated:
    """Inter-token times from their histogram, 0.5 % off at most; the middle of a bin in its logarithm."""
    low, high = np.log(GAP_RANGE_S)
    middle_s = np.exp(low + (np.arange(N_GAPS) + 0.5) / N_GAPS * (high - low))
    share = np.cumsum(counts, axis=1) / np.maximum(counts.sum(axis=1, keepdims=True), 1e-9)
    return {f"itl_p{100 * q:.0f}_s": middle_s[np.argmax(share >= q - 1e-12, axis=1)] for q in QUANTILES}


def analytic_metrics(metrics: FleetMetrics, slo: Slo, *, hits: bool = False) -> tuple[Analytic, tuple[Analytic, ...]]:
    """What the laws say of the simulated metrics: the fleet's, and each pool's; with `hits`, of a prefix cache too."""
    pools, n = metrics.pools, _that_decode(metrics)
    names = ("tok_per_j", "output_tok_per_s", "power_w", "gpu_power_w", "n_active", "prefill_frac", "itl_s")
    each: list[Analytic] = [
        {name: float(getattr(pools, name)[k]) for name in (*names, "ttft_p99_s")} for k in range(len(n))
    ]
    attainment = None
    if pools.ttft is not None:
        met = within_limit(metrics, slo)
        for k, pool in enumerate(each):
            pool |= {"itl_p99_s": float(pools.itl_p99_s[k]), "slo_attainment": float(met[k])}
        attainment = float(np.sum(np.asarray(pools.traffic_frac) * met))
    of_all_s = float(metrics.ttft_p99_of_all_s)
    total: Analytic = {
        "tok_per_j": float(metrics.tok_per_j),
        "output_tok_per_s": float(metrics.output_tok_per_s),
        "power_w": float(metrics.power_w),
        "n_active": float(np.sum(n * np.asarray(pools.n_active)) / max(n.sum(), 1.0)),
        "itl_s": float(metrics.itl_s),
        "ttft_p99_s": float(metrics.ttft_p99_s) if slo.scope == "pool" else of_all_s,
        "ttft_p99_of_all_s": of_all_s if pools.ttft is not None else None,
        "slo_attainment": attainment,
        "rejected_frac": float(metrics.unserved_frac),
    }
    if hits:
        found, prompts = np.asarray(pools.prefix_hit_frac), np.asarray(pools.traffic_frac * pools.mean_prompt_tokens)
        total["prefix_hit_frac"] = float(found @ prompts / max(prompts.sum(), 1e-9))
        each = [pool | {"prefix_hit_frac": float(found[k])} for k, pool in enumerate(each)]
    return total, tuple(each)


def _that_decode(metrics: FleetMetrics) -> np.ndarray:
    """Instances that decode [K]."""
    if metrics.pools.stages is None:
        return np.asarray(metrics.pools.n_instances)
    first, second = np.asarray(metrics.pools.stages.n_instances).T
    return np.where(second > 0, second, first)


def within_limit(metrics: FleetMetrics, slo: Slo) -> np.ndarray:
    """Share of each pool's requests within the limit, where TTFT has a distribution [K]."""
    late = jax.vmap(lambda law: ttft_tail(law, slo.ttft_p99_s, slo.ttft_s_per_token))(metrics.pools.ttft)
    stable = np.asarray(metrics.pools.utilization) < 1.0
    return np.where(stable, 1.0 - np.asarray(late), 0.0)
