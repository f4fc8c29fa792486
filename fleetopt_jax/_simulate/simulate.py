"""`simulate`: a fleet, request by request and iteration by iteration, with confidence intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fleetopt_jax._simulate import observed
from fleetopt_jax._simulate.dispatch import Balancer
from fleetopt_jax._simulate.estimates import SHARES, Estimate, estimate, half_width_frac
from fleetopt_jax._simulate.kept import prompt_blocks, without
from fleetopt_jax._simulate.observed import Analytic, Observed, Replicated, analytic_metrics, n_whole, whole_stages
from fleetopt_jax._simulate.outages import draw_outages
from fleetopt_jax._simulate.pool import Course, Pool, PoolRequests, PoolRun, Room, run_pool
from fleetopt_jax._simulate.requests import Requests, draw_requests, span_requests
from fleetopt_jax._simulate.routing import REJECTED, Routed, route_requests
from fleetopt_jax._simulate.staged import run_staged
from fleetopt_jax._simulate.state import Scheduler
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.choices.dispatch import STALENESS_S
from fleetopt_jax.fleet.evaluate import FleetMetrics, fleet_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo, Stage, make_slo
from fleetopt_jax.fleet.reserve import Failures
from fleetopt_jax.fleet.traffic import routed
from fleetopt_jax.laws.ttft import TAIL_PROBABILITY
from fleetopt_jax.workload.atoms import Workload
from fleetopt_jax.workload.blocks import Blocks

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
    down: int = 0  # instances of every pool that were left out
    failures: Failures | None = None  # of GPUs and nodes, where they fail
    n_outages: int = 0  # of instances
    up_frac: tuple[float, ...] = ()  # of the instances' time in the window, by pool; none where nothing fails


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
    staleness_s: float = STALENESS_S,
    router_width: float | None = None,
    arrival_scv: float | None = None,
    until_frac: float | None = None,
    down: int = 0,
    failures: Failures | None = None,
    progress: StageProgress | None = None,
) -> Simulation:
    """Every iteration of every instance of `fleet` under `workload`, `n_replications` times `n_requests`.

    Requests are drawn from the workload's atoms and arrive as a gamma renewal process with its rate and burstiness
    (with `arrival_scv` instead, the analytic side too), or are given. By default there are enough for a warm-up of
    three residual lives of a sequence and a window twice as long. `assumptions.dispatch` sends a pool's requests to
    its instances, knowing their queues as they were up to `staleness_s` ago. The same seed gives the same result.
    A prefix cache of the working set needs `requests` with their blocks; each replication begins with empty ones.

    With `until_frac` as many replications again are added, those that are done kept, until the half intervals of tokens
    per joule and P99 TTFT, of the fleet and of each pool, are within that share of the mean; at most 64, or as many as
    `requests` has rows.

    Of every pool, and stage, `down` instances are left out, by the laws too. With `failures` GPUs and nodes fail at
    random and requests of what dies are sent again; to the laws all is up. A reserve of the fleet is up otherwise.
    Raises `ValueError` without float64: clocks and energies add up over millions of iterations.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=5.0)
    >>> fleet = fo.make_fleet([fo.build(fo.EngineSpec("h100"))], window_tokens=[4400], n_instances=[2])
    >>> fo.simulate(fleet, chat, n_requests=200, n_replications=1).n_arrivals
    200
    """
    require_float64("simulate")
    check_simulated_cache(assumptions, requests)
    fleet, slo = _left(fleet, down), slo or make_slo()
    if failures is not None:
        _check_failing(fleet, assumptions)
    if arrival_scv is not None:
        workload = replace(workload, **as_floats(arrival_scv=arrival_scv))
    analytic, life_s = outlook(fleet, workload, assumptions=assumptions)
    needed_s = RELAXATIONS * float(np.max(life_s))
    balancer = Balancer(assumptions.dispatch, staleness_s, seed)
    setting = Setting(fleet, workload, assumptions, slo, analytic, needed_s, balancer, router_width, failures)
    n = n_requests or enough_requests(workload, needed_s)
    most = MOST_REPLICATIONS if requests is None else len(requests.arrival_s)
    at_once = n_replications if requests is None or until_frac is not None else most

    def some(first: int) -> Requests:
        if requests is not None:
            return requests.rows(first, at_once)
        return draw_requests(workload, assumptions, n, at_once, seed, first)

    return replace(_until_narrow(setting, some, (at_once, most), until_frac, progress), down=down)


def _until_narrow(
    setting: "Setting",
    some: Callable[[int], Requests],
    counts: tuple[int, int],
    until_frac: float | None,
    progress: StageProgress | None,
) -> Simulation:
    """Replications of `some` requests from a number on, so many `counts` at once and at most, until the intervals are
    as narrow as asked."""
    at_once, most = counts
    batches: list[Batch] = []
    while True:
        first = sum(len(batch.seen.ttft_s) for batch in batches)
        batches.append(_run(setting, some(first), first, progress))
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
    failures: Failures | None = None  # of GPUs and nodes; None: nothing fails

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
    found = _given_hits(routed, setting.assumptions)
    blocks = _blocks_of(requests, routed, setting.assumptions)
    places, of_pools = zip(*(_of_pool(routed, k, found, blocks) for k in range(len(setting.fleet.lanes))), strict=True)
    return Arrived(requests, first, routed, window_s, places, of_pools)


def run_alone(
    setting: Setting,
    arrived: Arrived,
    k: int,
    n_instances: int,
    *,
    room: Room | None = None,
    course: Course | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PoolRun | None:
    """Pool k with so many instances: it serves its requests without a look at the others. None where it has none. With
    a `course` not all of them take requests all the time."""
    if not len(arrived.places[k].row):
        return None
    lane, horizon_s = setting.fleet.lanes[k], arrived.requests.arrival_s[:, -1] * (1.0 + MOST_DRAIN)
    balancer = replace(setting.balancer, seed=setting.balancer.seed + k, first_replication=arrived.first)
    if lane.hand_over is not None:
        return _run_stages(setting, arrived, k, horizon_s, balancer, progress)
    scheduler = _scheduler(lane.stages[0], _n_max(setting)[k], arrived.window_s, setting.assumptions)
    outages = None
    if setting.failures is not None:
        gpus = round(float(lane.stage.engine.gpus_per_instance))
        outages = draw_outages(setting.failures, n_instances, gpus, horizon_s, balancer.seed, arrived.first)
    return run_pool(
        Pool(lane.stage.engine, scheduler, n_instances, outages, course),
        arrived.of_pools[k],
        horizon_s,
        balancer,
        n_slots=slots_for(setting, k),
        room=room,
        progress=progress,
    )


def _run_stages(
    setting: Setting,
    arrived: Arrived,
    k: int,
    horizon_s: np.ndarray,
    balancer: Balancer,
    progress: Callable[[int, int], None] | None,
) -> PoolRun:
    """A lane of two stages, each with as many instances as the fleet has."""
    lane, metrics = setting.fleet.lanes[k], setting.analytic.pools.stages
    if metrics is None or lane.hand_over is None:
        raise ValueError("need a fleet with lanes of two stages")
    n_max, n_active = np.floor(np.asarray(metrics.n_max))[k], np.asarray(metrics.n_active)[k]
    pools = tuple(
        Pool(stage.engine, _scheduler(stage, n_max[i], arrived.window_s, setting.assumptions), n)
        for i, (stage, n) in enumerate(zip(lane.stages, whole_stages(lane), strict=True))
    )
    slots = tuple(int(min(1.4 * float(n) + 16, most)) for n, most in zip(n_active, n_max, strict=True))
    return run_staged(
        (pools[0], pools[1]),
        lane.hand_over,
        arrived.of_pools[k],
        horizon_s,
        balancer,
        n_slots=(slots[0], slots[1]),
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
    seen = observed_of(arrived, runs, beyond_iterations_s(fleet, assumptions), setting.slo)
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


def observed_of(arrived: Arrived, runs: Sequence[PoolRun | None], beyond_s: Sequence[float], slo: Slo) -> Observed:
    """What became of the requests, from the runs of the pools, `beyond_s` later than those saw it."""
    requests, routed, window_s = arrived.requests, arrived.routed, arrived.window_s
    ttft_s, end_s = (np.full(requests.arrival_s.shape, np.inf) for _ in range(2))
    found = np.full(requests.arrival_s.shape, np.nan)
    for (row, column, place), run, later_s in zip(arrived.places, runs, beyond_s, strict=True):
        if run:
            ttft_s[row, column] = run.first_s[row, place] - requests.arrival_s[row, column] + later_s
            end_s[row, column] = run.last_s[row, place] - requests.arrival_s[row, column] + later_s
            if run.found_tokens is not None:
                admitted = np.isfinite(run.admit_s[row, place])
                found[row, column] = np.where(admitted, run.found_tokens[row, place], np.nan)
    return Observed(
        routed=routed,
        window_s=window_s,
        counted=requests.arrival_s >= window_s[:, :1],
        ttft_s=ttft_s,
        end_s=end_s,
        limit_s=float(slo.ttft_p99_s) + float(slo.ttft_s_per_token) * routed.prompt_tokens,
        found_tokens=found if any(run and run.found_tokens is not None for run in runs) else None,
    )


def beyond_iterations_s(fleet: Fleet, assumptions: Assumptions) -> list[float]:
    """What users of each pool wait for the first token beyond its iterations [s]; nothing where chunks are free."""
    if assumptions.prefill.chunks_are_free:
        return [0.0] * len(fleet.lanes)
    return [float(lane.stages[0].engine.prefill.first_token_s) for lane in fleet.lanes]


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
    hits = setting.assumptions.prefix_cache.finds
    analytic_total, analytic_pools = analytic_metrics(setting.analytic, slo, hits=hits)
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
        **_outages_of(setting, batches),
    )


def _outages_of(setting: Setting, batches: Sequence[Batch]) -> dict[str, Any]:
    """How many instances failed, and how much of the time those of each pool were up; nothing where nothing fails."""
    if setting.failures is None:
        return {}
    n_outages, up_frac = 0, []
    for k, lane in enumerate(setting.fleet.lanes):
        found = [(batch.runs[k], batch.seen.window_s) for batch in batches]
        there = [(run.outages, window_s) for run, window_s in found if run is not None and run.outages is not None]
        n_outages += sum(len(outages.each) for outages, _ in there)
        up_frac.append(float(np.mean([outages.up_frac(window_s, n_whole(lane)) for outages, window_s in there] or [1])))
    return {"failures": setting.failures, "n_outages": n_outages, "up_frac": tuple(up_frac)}


def _left(fleet: Fleet, down: int) -> Fleet:
    """The fleet with so many instances of every pool, and stage, left out, where nothing else may be down."""
    fleet = replace(fleet, surroundings=replace(fleet.surroundings, reserve=None))
    if not down:
        return fleet
    n = np.rint(np.asarray(fleet.n_instances))
    if (n[n > 0] <= down).any():
        problem = f"{down} of the {n[n > 0].min():.0f} instances of a pool cannot be left out"
        raise BadField("down", problem, "need fewer, so that some are left")
    return fleet.with_instances(np.maximum(n - down, 0.0))


def _check_failing(fleet: Fleet, assumptions: Assumptions) -> None:
    """Refuse failures where the simulator has none."""
    if fleet.n_stages > 1:
        raise BadInput("failures", "lanes of two stages are simulated without", "need --down, or --serve mixed")
    if assumptions.prefix_cache.reads_reuse:
        raise BadInput("failures", "what a cache loses with its instance is not simulated", "need --down")


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
    n = np.array([min(whole_stages(lane)) for lane in fleet.lanes])
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


def _given_hits(routed: Routed, assumptions: Assumptions) -> np.ndarray | None:
    """Tokens that each prompt finds whatever the cache holds [R, M]; None where there is none, or it decides."""
    cache = assumptions.prefix_cache
    if not cache.finds or cache.reads_reuse:
        return None
    return np.where(routed.compressed, 0, cache.whole_tokens_found(routed.prompt_tokens))


def _blocks_of(requests: Requests, routed: Routed, assumptions: Assumptions) -> Blocks | None:
    """The blocks of the prompts as pools get them, row after row; None where the cache does not look at them. One that
    was compressed begins as no other."""
    if not assumptions.prefix_cache.reads_reuse:
        return None
    if requests.blocks is None:
        raise no_blocks()
    return without(requests.blocks, routed.compressed.ravel())


def _of_pool(
    routed: Routed, k: int, found_tokens: np.ndarray | None = None, blocks: Blocks | None = None
) -> tuple[Places, PoolRequests]:
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
    found = None if found_tokens is None else padded(found_tokens, 0)
    of_each = None
    if blocks is not None:
        of_rows = [blocks.of(r * routed.pool.shape[1] + column) for r, column in enumerate(rows)]
        lengths = (
            [x[r, column] for r, column in enumerate(rows)] for x in (routed.prompt_tokens, routed.output_tokens)
        )
        of_each = prompt_blocks(of_rows, *lengths)
    return Places(row, column, place), PoolRequests(*columns, found_tokens=found, blocks=of_each)


def check_simulated_cache(assumptions: Assumptions, requests: Requests | None) -> None:
    """Refuse a prefix cache of which the simulator is not told enough."""
    if not assumptions.prefix_cache.reads_reuse:
        return
    if requests is None or requests.blocks is None:
        raise no_blocks()


def no_blocks() -> BadInput:
    """The refusal of requests that do not say what they begin with."""
    return BadInput(
        "prefix cache",
        "the requests to simulate have no block hashes, which say what is in it",
        "replay a trace that has them, --arrivals trace, or take a share, --prefix-hit 0.5",
    )


def _scheduler(stage: Stage, n_max: float, window_s: np.ndarray, assumptions: Assumptions) -> Scheduler:
    """As the plan deploys it: `max_num_seqs` is the pool's n_max; a reserved window is never overrun."""
    kv = stage.engine.kv
    return Scheduler(
        max_num_seqs=jnp.asarray(n_max, dtype=jnp.int32),
        n_blocks=assumptions.kv_cache.scheduled_blocks(kv),
        fixed_tokens=kv.fixed_tokens,
        window_s=jnp.asarray(window_s),
        chunks_are_free=assumptions.prefill.chunks_are_free,
        decodes_only=stage.role == "decode",
    )
