"""`simulate`: a fleet, request by request and iteration by iteration, with confidence intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fleetopt_jax._simulate import observed
from fleetopt_jax._simulate.dispatch import Balancer
from fleetopt_jax._simulate.estimates import SHARES, Estimate, estimate, half_width_frac
from fleetopt_jax._simulate.observed import Analytic, Observed, Replicated, analytic_metrics, n_whole
from fleetopt_jax._simulate.pool import Pool, PoolRequests, PoolRun, Room, run_pool
from fleetopt_jax._simulate.requests import Requests, draw_requests, span_requests
from fleetopt_jax._simulate.routing import REJECTED, Routed, route_requests
from fleetopt_jax._simulate.state import Scheduler
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.evaluate import FleetMetrics, fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet, Lane, Slo, make_slo
from fleetopt_jax.fleet.traffic import routed
from fleetopt_jax.laws.ttft import TAIL_PROBABILITY
from fleetopt_jax.workload.atoms import Workload

StageProgress = Callable[[str, float], None]  # (what is simulated, share of it that is done)

RELAXATIONS = 3.0  # warm-up, in mean residual lives of a sequence
FEWEST_REQUESTS, MOST_REQUESTS = 20_000, 400_000  # of a replication, unless asked otherwise
MOST_REPLICATIONS = 64  # that are added until intervals are narrow enough
UNTIL = ("tok_per_j", "ttft_p99_s")  # whose intervals these are
MOST_DRAIN = 3.0  # the run ends at most so many times its length after the last arrival, finished or not


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
    analytic: Analytic
    pools: tuple[dict[str, Estimate], ...]
    pools_analytic: tuple[Analytic, ...]
    slo_held: bool
    warm_up_s: float
    window_s: float  # mean over replications
    warmed_up: bool  # whether the run was long enough for the warm-up it needs
    memory_bytes: int  # of the largest pool's state
    n_replications: int = 0
    enough_requests: int = 0  # of a replication, for the warm-up and a window twice as long
    ttft_p99_s: tuple[float, ...] = field(default=(), compare=False)  # the fleet's, of each replication


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
    until_frac: float | None = None,
    progress: StageProgress | None = None,
) -> Simulation:
    """Every iteration of every instance of `fleet` under `workload`, `n_replications` times `n_requests`.

    Requests are drawn from the workload's atoms and arrive as a gamma renewal process with its rate and burstiness
    (with `arrival_scv` instead, the analytic side too), or are given. By default there are enough for a warm-up of
    three residual lives of a sequence and a window twice as long. `assumptions.dispatch` sends a pool's requests to
    its instances, knowing their queues as they were up to `staleness_s` ago. The same seed gives the same result.

    With `until_frac` as many replications again are added, those that are done kept, until the half intervals of tokens
    per joule and P99 TTFT, of the fleet and of each pool, are within that share of the mean; at most 64, or as many as
    `requests` has rows.

    Raises `ValueError` without float64: clocks and energies add up over millions of iterations.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=5.0)
    >>> fleet = fo.make_fleet([fo.build(fo.EngineSpec("h100"))], window_tokens=[4400], n_instances=[2])
    >>> fo.simulate(fleet, chat, n_requests=200, n_replications=1).n_arrivals
    200
    """
    require_float64("simulate")
    if assumptions.prefix_cache.finds:
        raise BadInput("prefix cache", "the simulator keeps none yet", "simulate the plan without: prefix hits of 0")
    slo = slo or make_slo()
    if arrival_scv is not None:
        workload = replace(workload, **as_floats(arrival_scv=arrival_scv))
    analytic, life_s = outlook(fleet, workload, assumptions=assumptions)
    needed_s = RELAXATIONS * float(np.max(life_s))
    balancer = Balancer(assumptions.dispatch, staleness_s, seed)
    setting = Setting(fleet, workload, assumptions, slo, analytic, needed_s, balancer, router_width)
    n = n_requests or enough_requests(workload, needed_s)
    most = MOST_REPLICATIONS if requests is None else len(requests.arrival_s)
    at_once = n_replications if requests is None or until_frac is not None else most
    batches: list[Batch] = []
    while True:
        first = sum(len(batch.seen.ttft_s) for batch in batches)
        some = (
            draw_requests(workload, assumptions, n, at_once, seed, first)
            if requests is None
            else requests.rows(first, at_once)
        )
        batches.append(_run(setting, some, first, progress))
        found = simulation_of(setting, batches)
        settled = until_frac is None or widest_frac(found) <= until_frac
        if settled or found.n_replications + at_once > most:
            return found


@dataclass(frozen=True)
class Setting:
    """What all replications have in common."""

    fleet: Fleet
    workload: Workload
    assumptions: Assumptions
    slo: Slo
    analytic: FleetMetrics
    needed_s: float  # of warm-up
    balancer: Balancer
    router_width: float | None

    def with_instances(self, n_instances: Sequence[int]) -> "Setting":
        """The same of a fleet with other numbers of instances [K], after the same warm-up."""
        fleet = self.fleet.with_instances(np.asarray(n_instances, float))
        return replace(self, fleet=fleet, analytic=outlook(fleet, self.workload, assumptions=self.assumptions)[0])


@dataclass(frozen=True)
class Batch:
    """Replications that ran side by side: what was seen of them, and their metrics."""

    runs: list[PoolRun | None]
    seen: Observed
    total: Replicated
    pools: list[Replicated]


@dataclass(frozen=True)
class Arrived:
    """Replications of requests as the pools get them, of which the first has the number `first`."""

    requests: Requests
    first: int
    routed: Routed
    window_s: np.ndarray  # [R, 2]
    places: tuple["Places", ...]
    of_pools: tuple[PoolRequests, ...]


def arrive(setting: Setting, requests: Requests, first: int) -> Arrived:
    """`requests`, sent to their pools."""
    last_s = requests.arrival_s[:, -1]
    warm_up_s = min(setting.needed_s, float(last_s.min()) / 2.0)
    window_s = np.stack([np.full(len(last_s), warm_up_s), last_s], axis=1)
    routed = route_requests(
        requests,
        setting.fleet,
        setting.workload,
        setting.assumptions,
        router_width=setting.router_width,
        seed=setting.balancer.seed,
        first=first,
    )
    routed = _refused(routed, setting.fleet, _n_max(setting))
    places, of_pools = zip(*(_of_pool(routed, k) for k in range(len(setting.fleet.lanes))), strict=True)
    return Arrived(requests, first, routed, window_s, places, of_pools)


def run_alone(
    setting: Setting,
    arrived: Arrived,
    k: int,
    n_instances: int,
    *,
    room: Room | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PoolRun | None:
    """Pool k with so many instances: it serves its requests without a look at the others. None where it has none."""
    if not len(arrived.places[k].row):
        return None
    lane, n_max = setting.fleet.lanes[k], _n_max(setting)[k]
    scheduler = _scheduler(lane, n_max, arrived.window_s, setting.assumptions)
    return run_pool(
        Pool(lane.stage.engine, scheduler, n_instances),
        arrived.of_pools[k],
        arrived.requests.arrival_s[:, -1] * (1.0 + MOST_DRAIN),
        replace(setting.balancer, seed=setting.balancer.seed + k, first_replication=arrived.first),
        n_slots=slots_for(setting, k),
        room=room,
        progress=progress,
    )


def slots_for(setting: Setting, k: int) -> int:
    """Sequences in flight that an instance of pool k should have room for, by the laws."""
    return int(min(1.4 * float(setting.analytic.pools.n_active[k]) + 16, _n_max(setting)[k]))


def _n_max(setting: Setting) -> np.ndarray:
    return np.floor(np.asarray(setting.analytic.pools.n_max))


def gather(setting: Setting, arrived: Arrived, runs: list[PoolRun | None]) -> Batch:
    """What was seen of the fleet whose pools ran."""
    fleet, assumptions = setting.fleet, setting.assumptions
    seen = _observed(arrived, runs, beyond_iterations_s(fleet, assumptions), setting.slo)
    each = [
        observed.pool_metrics(lane, k, fleet.surroundings, run, seen, assumptions)
        for k, (lane, run) in enumerate(zip(fleet.lanes, runs, strict=True))
    ]
    return Batch(runs, seen, observed.fleet_metrics(fleet.lanes, each, runs, seen, setting.slo), each)


def _run(setting: Setting, requests: Requests, first: int, progress: StageProgress | None) -> Batch:
    """The replications of `requests`, of which the first has the number `first`."""
    arrived, lanes = arrive(setting, requests, first), setting.fleet.lanes
    runs = [
        run_alone(setting, arrived, k, n_whole(lane), progress=_share_of(progress, f"pool {k + 1} of {len(lanes)}"))
        for k, lane in enumerate(lanes)
    ]
    return gather(setting, arrived, runs)


def _observed(arrived: Arrived, runs: Sequence[PoolRun | None], beyond_s: Sequence[float], slo: Slo) -> Observed:
    """What became of the requests, from the runs of the pools, `beyond_s` later than those saw it."""
    requests, routed, window_s = arrived.requests, arrived.routed, arrived.window_s
    ttft_s, end_s = (np.full(requests.arrival_s.shape, np.inf) for _ in range(2))
    for (row, column, place), run, later_s in zip(arrived.places, runs, beyond_s, strict=True):
        if run:
            ttft_s[row, column] = run.first_s[row, place] - requests.arrival_s[row, column] + later_s
            end_s[row, column] = run.last_s[row, place] - requests.arrival_s[row, column] + later_s
    return Observed(
        routed=routed,
        window_s=window_s,
        counted=requests.arrival_s >= window_s[:, :1],
        ttft_s=ttft_s,
        end_s=end_s,
        limit_s=float(slo.ttft_p99_s) + float(slo.ttft_s_per_token) * routed.prompt_tokens,
    )


def beyond_iterations_s(fleet: Fleet, assumptions: Assumptions) -> list[float]:
    """What users of each pool wait for the first token beyond its iterations [s]; nothing where chunks are free."""
    if assumptions.prefill.chunks_are_free:
        return [0.0] * len(fleet.lanes)
    return [float(lane.stage.engine.prefill.first_token_s) for lane in fleet.lanes]


def simulation_of(setting: Setting, batches: list[Batch]) -> Simulation:
    """The result of all replications so far."""
    slo, needed_s = setting.slo, setting.needed_s
    each = [_together([batch.pools[k] for batch in batches]) for k in range(len(setting.fleet.lanes))]
    total = _together([batch.total for batch in batches])
    of_pools = [
        sum(int((batch.seen.counted & (batch.seen.routed.pool == k)).sum()) for batch in batches)
        for k in range(len(each))
    ]
    metrics = _estimates(total, sum(int(batch.seen.counted.sum()) for batch in batches))
    pools = [_estimates(found, n) for found, n in zip(each, of_pools, strict=True)]
    analytic_total, analytic_pools = analytic_metrics(setting.analytic, slo)
    served, all_seen = [run for batch in batches for run in batch.runs if run], [batch.seen for batch in batches]
    warm_up_s = min(float(seen.window_s[0, 0]) for seen in all_seen)
    return Simulation(
        n_arrivals=sum(seen.ttft_s.size for seen in all_seen),
        n_completed=sum(int(np.isfinite(seen.end_s).sum()) for seen in all_seen),
        n_rejected=sum(int((seen.routed.pool == REJECTED).sum()) for seen in all_seen),
        n_in_system=int(sum(run.in_system.sum() for run in served)),
        n_preemptions=int(sum(run.tally.preemptions.sum() for run in served)),
        n_iterations=int(sum(run.tally.path_iterations.sum() for run in served)),
        metrics=metrics,
        analytic=analytic_total,
        pools=tuple(pools),
        pools_analytic=analytic_pools,
        slo_held=all(pools_holding(pools, metrics, slo)),
        warm_up_s=warm_up_s,
        window_s=float(np.mean(np.concatenate([seen.seconds for seen in all_seen]))),
        warmed_up=warm_up_s >= needed_s,
        memory_bytes=max((run.memory_bytes for run in served), default=0),
        n_replications=sum(len(seen.ttft_s) for seen in all_seen),
        enough_requests=span_requests(float(setting.workload.arrival_rate_per_s), 3.0 * needed_s),
        ttft_p99_s=tuple(float(value) for value in total["ttft_p99_s"]),
    )


def _together(found: list[Replicated]) -> Replicated:
    """Metrics of all replications; those in which a pool had no requests say nothing of it."""
    some = [each for each in found if each]
    return {name: np.concatenate([each[name] for each in some]) for name in (some[0] if some else {})}


def _estimates(found: Replicated, n_requests: int) -> dict[str, Estimate]:
    """Metrics with their intervals; only what is counted request by request has that many tries."""
    return {
        name: estimate(values, share=name in SHARES, n_requests=n_requests if name == "slo_attainment" else 0)
        for name, values in found.items()
    }


def widest_frac(simulation: Simulation) -> float:
    """The widest half interval, of its mean, of tokens per joule and P99 TTFT, of the fleet and of each pool."""
    parts = [simulation.metrics, *(pool for pool in simulation.pools if pool)]
    return max(half_width_frac(part[name]) for part in parts for name in UNTIL)


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


def outlook(fleet: Fleet, workload: Workload, *, assumptions: Assumptions) -> tuple[FleetMetrics, np.ndarray]:
    """The analytic metrics, and the mean residual life of a pool's sequences E[d^2] / E[d] ITL [K]."""
    traffic = routed(fleet, workload, assumptions)
    metrics = fleet_metrics(fleet, traffic, workload, assumptions)
    steps2, steps = np.asarray(traffic.demand.steps2), np.asarray(traffic.demand.steps)
    return metrics, steps2 / np.where(steps > 0, steps, np.inf) * np.asarray(metrics.pools.itl_s)


def enough_requests(workload: Workload, needed_s: float) -> int:
    """Requests of a replication that lasts three times the warm-up it needs."""
    enough = span_requests(float(workload.arrival_rate_per_s), 3.0 * needed_s)
    return int(np.clip(enough, FEWEST_REQUESTS, MOST_REQUESTS))


def _refused(routed: Routed, fleet: Fleet, n_max: np.ndarray) -> Routed:
    """What was sent to a pool that can run nothing is rejected."""
    n = np.array([n_whole(lane) for lane in fleet.lanes])
    useless = (routed.pool != REJECTED) & ((n_max[routed.pool] < 1) | (n[routed.pool] < 1))
    return replace(routed, pool=np.where(useless, REJECTED, routed.pool))


def _share_of(progress: StageProgress | None, what: str) -> Callable[[int, int], None] | None:
    """The progress of one part."""
    return None if progress is None else lambda done, total: progress(what, done / total)


class Places(NamedTuple):
    """Where each request of a pool is; numpy arrays [m]."""

    row: np.ndarray  # replication
    column: np.ndarray  # among the requests of the fleet
    place: np.ndarray  # among those of the pool


def _of_pool(routed: Routed, k: int) -> tuple[Places, PoolRequests]:
    """The requests of pool k in the order in which they come to it."""
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
    return Places(row, column, place), PoolRequests(*columns)


def _scheduler(lane: Lane, n_max: float, window_s: np.ndarray, assumptions: Assumptions) -> Scheduler:
    """As the plan deploys it: `max_num_seqs` is the pool's n_max; a reserved window is never overrun."""
    kv = lane.stage.engine.kv
    return Scheduler(
        max_num_seqs=jnp.asarray(n_max, dtype=jnp.int32),
        n_blocks=assumptions.kv_cache.scheduled_blocks(kv),
        fixed_tokens=kv.fixed_tokens,
        window_s=jnp.asarray(window_s),
        chunks_are_free=assumptions.prefill.chunks_are_free,
    )
