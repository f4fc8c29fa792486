"""`simulate`: a fleet, request by request and iteration by iteration, with confidence intervals."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import betainc

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.choices import POWER_SCOPE
from fleetopt_jax.fleet.evaluate import FleetMetrics, evaluate
from fleetopt_jax.fleet.fleet import Fleet, Slo, make_slo
from fleetopt_jax.fleet.traffic import route
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.laws.latency import TAIL_PROBABILITY, ttft_tail
from fleetopt_jax.simulate.batching import GAP_RANGE_S, N_GAPS, Scheduler
from fleetopt_jax.simulate.pool import PoolRequests, PoolRun, run_pool
from fleetopt_jax.simulate.requests import Requests, draw_requests, span_requests
from fleetopt_jax.simulate.routing import REJECTED, Routed, route_requests
from fleetopt_jax.workload.atoms import Workload

Progress = Callable[[str, float], None]

QUANTILES = (0.5, 0.9, 0.99)
CONFIDENCE = 0.95
RELAXATIONS = 3.0  # warm-up, in mean residual lives of a sequence
FEWEST_REQUESTS, MOST_REQUESTS = 20_000, 400_000  # of a replication, unless asked otherwise
MOST_DRAIN = 3.0  # the run ends at most so many times its length after the last arrival, finished or not


@dataclass(frozen=True)
class Estimate:
    """A mean over replications and its 95 % confidence interval (Student's t; infinite for one replication)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Simulation:
    """Counts over all replications from the first arrival on; estimates over the window after the warm-up.

    Every arrival in the window counts: one that is rejected, or without its first token at the end, has an infinite
    TTFT and misses the SLO; only a pool's own metrics, and their worst, `ttft_p99_s` under the scope "pool", cannot
    know of requests that reached no pool. `analytic` has what the laws say of the same metrics, None where nothing.
    """

    n_arrivals: int
    n_completed: int
    n_rejected: int
    n_in_system: int
    n_preemptions: int
    n_iterations: int
    metrics: dict[str, Estimate]
    analytic: dict[str, float | None]
    pools: tuple[dict[str, Estimate], ...]
    pools_analytic: tuple[dict[str, float | None], ...]
    slo_held: bool
    warm_up_s: float
    window_s: float  # mean over replications
    warmed_up: bool  # whether the run was long enough for the warm-up it needs
    memory_bytes: int  # of the largest pool's state


def simulate(
    fleet: Fleet,
    workload: Workload,
    assumptions: Assumptions = PHYSICAL,
    slo: Slo | None = None,
    *,
    requests: Requests | None = None,
    n_requests: int | None = None,
    n_replications: int = 8,
    seed: int = 0,
    staleness_s: float = 0.05,
    router_width: float | None = None,
    arrival_scv: float | None = None,
    progress: Progress | None = None,
) -> Simulation:
    """Every iteration of every instance of `fleet` under `workload`, `n_replications` times `n_requests`.

    Requests are drawn from the workload's atoms and arrive as a gamma renewal process with its rate and burstiness
    (with `arrival_scv` instead, the analytic side too), or are given. By default there are enough for a warm-up of
    three residual lives of a sequence and a window twice as long. `assumptions.dispatch` sends a pool's requests to
    its instances, knowing their queues as they were up to `staleness_s` ago. The same seed gives the same result.
    """
    slo = slo or make_slo()
    if arrival_scv is not None:
        workload = dataclasses.replace(workload, arrival_scv=jnp.asarray(arrival_scv, dtype=float))
    analytic, life_s = _outlook(fleet, workload, assumptions=assumptions)
    needed_s = RELAXATIONS * float(np.max(life_s))
    rate_per_s = float(workload.arrival_rate_per_s)
    if requests is None:
        n_requests = n_requests or int(
            np.clip(span_requests(rate_per_s, 3.0 * needed_s), FEWEST_REQUESTS, MOST_REQUESTS)
        )
        requests = draw_requests(workload, assumptions, n_requests, n_replications, seed)
    last_s = requests.arrival_s[:, -1]
    warm_up_s = min(needed_s, float(last_s.min()) / 2.0)
    window_s = np.stack([np.full(len(last_s), warm_up_s), last_s], axis=1)
    routed = route_requests(requests, fleet, workload, assumptions, router_width=router_width, seed=seed)
    n_max = np.floor(np.asarray(analytic.pools.n_max))
    useless = (routed.pool != REJECTED) & ((n_max[routed.pool] < 1) | (_counts(fleet)[routed.pool] < 1))
    routed = Routed(**{**vars(routed), "pool": np.where(useless, REJECTED, routed.pool)})

    ttft_s, end_s = (np.full(requests.arrival_s.shape, np.inf) for _ in range(2))
    runs = []
    for k in range(len(fleet.engines)):
        where, pool_requests = _of_pool(routed, k)
        if not len(where[0]):
            runs.append(None)
            continue
        run = run_pool(
            fleet.engines[k],
            _scheduler(fleet, k, n_max[k], window_s, assumptions),
            pool_requests,
            int(_counts(fleet)[k]),
            last_s * (1.0 + MOST_DRAIN),
            policy=assumptions.dispatch,
            staleness_s=staleness_s,
            n_slots=int(min(1.4 * float(analytic.pools.n_active[k]) + 16, n_max[k])),
            seed=seed + k,
            progress=partial(progress, f"pool {k + 1} of {len(fleet.engines)}") if progress else None,
        )
        row, column, place = where
        ttft_s[row, column] = run.first_s[row, place] - requests.arrival_s[row, column]
        end_s[row, column] = run.last_s[row, place] - requests.arrival_s[row, column]
        runs.append(run)
    counted = requests.arrival_s >= warm_up_s
    limit_s = float(slo.ttft_p99_s) + float(slo.ttft_s_per_token) * routed.prompt_tokens
    pools = [
        _pool_metrics(
            fleet, k, run, window_s, counted & (routed.pool == k), ttft_s, end_s, limit_s, routed, assumptions
        )
        for k, run in enumerate(runs)
    ]
    total = _fleet_metrics(fleet, pools, runs, counted, ttft_s, end_s, limit_s, routed.pool == REJECTED, slo)
    estimates = [{name: estimate(values) for name, values in pool.items()} for pool in (total, *pools)]
    analytic_total, analytic_pools = _analytic(analytic, slo)
    return Simulation(
        n_arrivals=requests.arrival_s.size,
        n_completed=int(np.isfinite(end_s).sum()),
        n_rejected=int((routed.pool == REJECTED).sum()),
        n_in_system=int(sum(run.in_system.sum() for run in runs if run)),
        n_preemptions=int(sum(run.tally.preemptions.sum() for run in runs if run)),
        n_iterations=int(sum(run.tally.path_iterations.sum() for run in runs if run)),
        metrics=estimates[0],
        analytic=analytic_total,
        pools=tuple(estimates[1:]),
        pools_analytic=analytic_pools,
        slo_held=all(pools_holding(estimates[1:], estimates[0], slo)),
        warm_up_s=warm_up_s,
        window_s=float(np.mean(window_s[:, 1] - window_s[:, 0])),
        warmed_up=warm_up_s >= needed_s,
        memory_bytes=max((run.memory_bytes for run in runs if run), default=0),
    )


def pools_holding(pools: Sequence[dict[str, Estimate]], total: dict[str, Estimate], slo: Slo) -> list[bool]:
    """Whether each pool holds the limits, in the mean over replications; all alike if they are the whole fleet's."""
    judged = [total] * len(pools) if slo.scope == "fleet" else pools
    return [
        not each
        or (
            each["slo_attainment"].mean >= 1.0 - TAIL_PROBABILITY
            and each["itl_s"].mean <= float(slo.itl_s)
            and total["rejected_frac"].mean == 0.0
        )
        for each in judged
    ]


@partial(jax.jit, static_argnames="assumptions")
def _outlook(fleet: Fleet, workload: Workload, *, assumptions: Assumptions) -> tuple[FleetMetrics, Array]:
    """The analytic metrics, and the mean residual life of a pool's sequences E[o^2] / E[o] ITL [K]."""
    metrics = evaluate(fleet, workload, assumptions)
    traffic = route(fleet.engines, fleet.window_tokens, fleet.gamma, workload, assumptions)
    tokens = [safe_div(pool.demand.output2, pool.demand.output) for pool in traffic]
    return metrics, jnp.stack(tokens) * metrics.pools.itl_s


def _counts(fleet: Fleet) -> np.ndarray:
    return np.rint(np.asarray(fleet.n_instances))


def _of_pool(routed: Routed, k: int) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], PoolRequests]:
    """((replication, request, place in the pool's order) of each request of pool k, the pool's requests)."""
    rows = []
    for r, pool in enumerate(routed.pool):
        column = np.flatnonzero(pool == k)
        rows.append(column[np.argsort(routed.ready_s[r, column], kind="stable")])
    width = max(len(column) for column in rows)
    row = np.concatenate([np.full(len(column), r) for r, column in enumerate(rows)])
    place = np.concatenate([np.arange(len(column)) for column in rows])
    column = np.concatenate(rows)

    def padded(values: np.ndarray, pad: float) -> np.ndarray:
        out = np.full((len(rows), width), pad, values.dtype)
        out[row, place] = values[row, column]
        return out

    columns = padded(routed.ready_s, np.inf), padded(routed.prompt_tokens, 0), padded(routed.output_tokens, 0)
    return (row, column, place), PoolRequests(*columns)


def _scheduler(fleet: Fleet, k: int, n_max: float, window_s: np.ndarray, assumptions: Assumptions) -> Scheduler:
    """As the plan deploys it: `max_num_seqs` is the pool's n_max; a reserved window is never overrun."""
    kv = fleet.engines[k].kv
    return Scheduler(
        max_num_seqs=jnp.asarray(n_max, dtype=jnp.int32),
        n_blocks=kv.n_blocks if assumptions.kv_cache == "paged" else jnp.asarray(jnp.inf),
        fixed_tokens=kv.fixed_tokens,
        window_s=jnp.asarray(window_s),
        chunks_are_free=assumptions.prefill == "free_chunks",
    )


def _pool_metrics(
    fleet: Fleet,
    k: int,
    run: PoolRun | None,
    window_s: np.ndarray,
    counted: np.ndarray,
    ttft_s: np.ndarray,
    end_s: np.ndarray,
    limit_s: np.ndarray,
    routed: Routed,
    assumptions: Assumptions,
) -> dict[str, np.ndarray]:
    """Of each replication, arrays [R]; nothing of a pool without requests."""
    if run is None:
        return {}
    engine, n, seconds = fleet.engines[k], _counts(fleet)[k], window_s[:, 1] - window_s[:, 0]
    sums = {name: values.sum(axis=1) for name, values in run.tally._asdict().items()}
    tried = np.sum(routed.tried_tokens * ((routed.tried_pool == k) & counted), axis=1) / seconds
    compressor_w = tried * float(engine.compressor.j_per_token)
    gpu_w = sums["gpu_j"] / seconds / n
    power_w = np.asarray(POWER_SCOPE[assumptions.power_scope](engine, n, gpu_w, compressor_w))
    blocks = sums["blocks_s"] / seconds / n
    if assumptions.kv_cache == "reserved":
        per_sequence = np.ceil(float(fleet.window_tokens[k] + engine.kv.fixed_tokens) / BLOCK_TOKENS)
        blocks = sums["in_flight_s"] / seconds / n * per_sequence
    output_tok_per_s = sums["tokens"] / seconds
    return {
        "tok_per_j": output_tok_per_s / power_w,
        "output_tok_per_s": output_tok_per_s,
        "power_w": power_w,
        "gpu_power_w": gpu_w,
        "n_active": sums["in_flight_s"] / seconds / n,
        "busy_frac": sums["busy_s"] / seconds / n,
        "prefill_frac": sums["prefill_s"] / seconds / n,
        "kv_occupancy": blocks / float(engine.kv.n_blocks),
        "itl_s": sums["gaps_s"] / np.maximum(sums["gaps"], 1e-9),
        **_latencies(counted, ttft_s, end_s, limit_s),
        **_gap_quantiles(run.gap_counts),
    }


def _latencies(
    counted: np.ndarray, ttft_s: np.ndarray, end_s: np.ndarray, limit_s: np.ndarray
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, values in (("ttft", ttft_s), ("e2e", end_s)):
        rows = [_quantiles(row[mask]) for row, mask in zip(values, counted)]
        found |= {f"{name}_p{100 * q:.0f}_s": np.array([row[i] for row in rows]) for i, q in enumerate(QUANTILES)}
    found["slo_attainment"] = np.array(
        [np.mean(row[mask] <= most[mask]) if mask.any() else 1.0 for row, most, mask in zip(ttft_s, limit_s, counted)]
    )
    return found


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Of all arrivals; the next larger observation, since infinite ones cannot be interpolated."""
    return np.quantile(values, QUANTILES, method="higher") if len(values) else np.zeros(len(QUANTILES))


def _gap_quantiles(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Inter-token times from their histogram, 0.5 % off at most; the middle of a bin in its logarithm."""
    low, high = np.log(GAP_RANGE_S)
    middle_s = np.exp(low + (np.arange(N_GAPS) + 0.5) / N_GAPS * (high - low))
    share = np.cumsum(counts, axis=1) / np.maximum(counts.sum(axis=1, keepdims=True), 1e-9)
    return {f"itl_p{100 * q:.0f}_s": middle_s[np.argmax(share >= q - 1e-12, axis=1)] for q in QUANTILES}


def _fleet_metrics(
    fleet: Fleet,
    pools: list[dict[str, np.ndarray]],
    runs: list[PoolRun | None],
    counted: np.ndarray,
    ttft_s: np.ndarray,
    end_s: np.ndarray,
    limit_s: np.ndarray,
    rejected: np.ndarray,
    slo: Slo,
) -> dict[str, np.ndarray]:
    counts = [int(_counts(fleet)[k]) for k, pool in enumerate(pools) if pool]
    runs, pools = [run for run in runs if run], [pool for pool in pools if pool]
    zero = np.zeros(len(counted))
    power_w, output_tok_per_s = (sum((pool[name] for pool in pools), zero) for name in ("power_w", "output_tok_per_s"))
    gaps_s, gaps = (sum((getattr(run.tally, name).sum(axis=1) for run in runs), zero) for name in ("gaps_s", "gaps"))
    latencies = _latencies(counted, ttft_s, end_s, limit_s)
    worst_s = np.max([pool["ttft_p99_s"] for pool in pools], axis=0, initial=0.0)
    return {
        "tok_per_j": output_tok_per_s / np.maximum(power_w, 1e-9),
        "output_tok_per_s": output_tok_per_s,
        "power_w": power_w,
        "n_active": sum((n * pool["n_active"] for n, pool in zip(counts, pools)), zero) / max(sum(counts), 1),
        "itl_s": gaps_s / np.maximum(gaps, 1e-9),
        **_gap_quantiles(sum((run.gap_counts for run in runs), np.zeros((len(counted), N_GAPS)))),
        **latencies,
        "ttft_p99_s": worst_s if slo.scope == "pool" else latencies["ttft_p99_s"],
        "ttft_p99_of_all_s": latencies["ttft_p99_s"],
        "rejected_frac": np.sum(rejected & counted, axis=1) / np.maximum(counted.sum(axis=1), 1),
    }


def _analytic(metrics: FleetMetrics, slo: Slo) -> tuple[dict[str, float | None], tuple[dict[str, float | None], ...]]:
    """What the laws say of the simulated metrics."""
    pools, n = metrics.pools, np.asarray(metrics.pools.n_instances)
    names = ("tok_per_j", "output_tok_per_s", "power_w", "gpu_power_w", "n_active", "prefill_frac", "itl_s")
    each = [{name: float(getattr(pools, name)[k]) for name in names} for k in range(len(n))]
    for k, pool in enumerate(each):
        pool |= {"ttft_p99_s": float(pools.ttft_p99_s[k])}
        pool |= {"itl_p99_s": float(pools.itl_p99_s[k])} if pools.ttft is not None else {}
    attainment = None
    if pools.ttft is not None:
        late = jax.vmap(lambda law: ttft_tail(law, slo.ttft_p99_s, slo.ttft_s_per_token))(pools.ttft)
        stable = np.asarray(pools.utilization) < 1.0
        met = np.where(stable, 1.0 - np.asarray(late), 0.0)
        for pool, share in zip(each, met):
            pool["slo_attainment"] = float(share)
        attainment = float(np.sum(np.asarray(pools.traffic_frac) * met))
    of_all_s = float(metrics.ttft_p99_of_all_s)
    total = {
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
    return total, tuple(each)


def estimate(values: np.ndarray) -> Estimate:
    """Mean and 95 % interval of independent replications."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2 or not np.isfinite(values).all():
        return Estimate(mean, -np.inf, np.inf)
    half = student_t(n - 1) * float(np.std(values, ddof=1)) / np.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


@cache
def student_t(freedom: int) -> float:
    """The t that |T| exceeds with probability 5 %: I_{v / (v + t^2)}(v / 2, 1 / 2) = 0.05, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2.0
        outside = float(betainc(freedom / 2.0, 0.5, freedom / (freedom + middle**2)))
        low, high = (middle, high) if outside > 1.0 - CONFIDENCE else (low, middle)
    return high
