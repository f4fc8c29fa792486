"""The least instances that hold the limits."""

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.numerics import whole_up
from fleetopt_jax.core.struct import namespace, pytree
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.choices.prefix_cache import NoPrefixCache
from fleetopt_jax.fleet.engine import Engine, EnginePair, Server
from fleetopt_jax.fleet.evaluate import PoolMetrics, fleet_metrics, for_each_lane, pool_metrics
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.limits import ROUNDING, held, worst_excess
from fleetopt_jax.fleet.parts import SHARES, Part, Terms, parts_of
from fleetopt_jax.fleet.resources import Resources, resources_of
from fleetopt_jax.fleet.stage import Setting, all_up, setting_of, stage_load, sure_of
from fleetopt_jax.fleet.traffic import PoolTraffic, route
from fleetopt_jax.workload.atoms import Workload

OVERSIZE = 10.0  # no limit is bought with more than so many times the instances the load needs
OVERSIZE_SMALL = 16.0  # or, of small pools, so many more
GROWTH = 1.05  # of the factor that all pools grow by, from one try to the next
GROWTHS = math.ceil(math.log(OVERSIZE + OVERSIZE_SMALL) / math.log(GROWTH))
MOST_EXCESS = 1e9  # of a value over its limit that is told apart: an overload has inf
FALLS = 4.0  # the power of N by which an excess falls, until two tries have told: P99 waits of the bundled traces


def least_instances(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    slo: Slo,
    setting: Setting,
) -> Array:
    """N the load alone needs: ceil(lambda / (0.85 mu)) and, as published, ceil(lambda / mu) + 1; and what may be down.

    0 without traffic; inf where an instance cannot run one sequence of the window. Prompts find in a prefix cache the
    most they can.
    """
    assumptions = setting.assumptions
    traffic = assumptions.prefix_cache.at_best(engine, traffic)
    load = stage_load(engine, traffic, window_tokens, setting)
    fits = load.n_max >= (1.0 if assumptions.whole else 1e-6)
    asked = load.rate_per_s * load.service_s / jnp.where(fits, load.n_max, 1.0)
    spare = assumptions.occupancy.spare_instances
    least = jnp.maximum(
        whole_up(asked / slo.max_utilization * (1.0 - 1e-12), whole=assumptions.whole),
        whole_up(asked, whole=assumptions.whole) + spare,
    )
    least = sure_of(least, engine, setting)
    return jnp.where(traffic.traffic_frac > 0, jnp.where(fits, least, jnp.inf), 0.0)


def worth_having(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    slo: Slo,
    setting: Setting,
) -> tuple[Array, Array]:
    """(least, most) N of one pool: what the load alone needs, and beyond what no limit is worth holding. The most is of
    prompts that find nothing, which is what more and more instances come to where none knows what the others hold."""
    least = least_instances(engine, traffic, window_tokens, slo, setting)
    cache = setting.assumptions.prefix_cache
    if not cache.reads_reuse:
        return least, most_instances(least)
    alone = replace(setting, assumptions=replace(setting.assumptions, prefix_cache=NoPrefixCache()))
    without = least_instances(engine, replace(traffic, reuse=None), window_tokens, slo, alone)
    return least, most_instances(jnp.maximum(least, without))


def most_instances(least: ArrayLike) -> Array:
    """The whole N beyond which no limit is worth holding."""
    xp = namespace(least)
    return xp.ceil(xp.maximum(OVERSIZE * least, least + OVERSIZE_SMALL))


def required_instances(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    slo: Slo,
    setting: Setting,
) -> Array:
    """Least N of one pool that holds every limit by itself; 0 without traffic, inf where no N does."""
    return _required(engine, traffic, window_tokens, slo, setting)[0]


def _required(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    slo: Slo,
    setting: Setting,
    grown: ArrayLike = 1.0,
) -> tuple[Array, Array, Array]:
    """(`required_instances`, their watts, how many times what the load alone needs they are), looked for from `grown`
    times of that on.

    With real rounding the latencies are left to the caller as constraints. The published rule bounds the slot wait
    alone; here the P99 TTFT the plan reports is bounded.
    """
    least, most = worth_having(engine, traffic, window_tokens, slo, setting)
    if not setting.assumptions.whole:
        return least, pool_metrics(engine, traffic, window_tokens, least, setting).power_w, jnp.ones_like(least)
    lane = WholeLane(engine)
    found, power_w = _least_that_holds(
        least, most, lambda n: lane.tried(traffic, window_tokens, n, slo, setting), least * grown
    )
    known = jnp.isfinite(found) & (found > 0)
    return found, power_w, jnp.where(known, found / jnp.where(known, least, 1.0), grown)


def _least_that_holds(
    least: Array, most: Array, tried: Callable[[Array], tuple[Array, Array]], begin: Array | None = None
) -> tuple[Array, Array]:
    """(least N from `least` to `most` whose excess is held, watts of so many), of what `tried` says of N: (excess,
    watts). N is `least` where that is 0 or inf, and watts are 0 where nobody is. `begin` is tried first."""
    usable = jnp.isfinite(least) & (least > 0)

    def after(at: tuple[LeastHeld, Array]) -> tuple[LeastHeld, Array]:
        held, power_w = at
        excess, trial_w = tried(held.trial)
        excess = jnp.where(usable, excess, -1.0)
        return held.after(excess), jnp.where(excess <= ROUNDING, trial_w, power_w)  # the last that passes is the least

    # One body, so that a try is compiled once; a batch under `vmap` loops as long as one of its members needs.
    start = least_held(*(jnp.where(usable, each, 1.0) for each in (least, most)))
    if begin is not None:
        first = jnp.clip(jnp.ceil(jnp.where(usable, begin, 1.0) * (1.0 - 1e-9)), start.trial, start.most)
        start = replace(start, trial=first)
    at, power_w = jax.lax.while_loop(lambda at: at[0].is_open, after, (start, jnp.zeros_like(least)))
    return jnp.where(usable, at.found, least), jnp.where(usable, power_w, 0.0)


def required_stages(
    pair: EnginePair, traffic: PoolTraffic, window_tokens: ArrayLike, slo: Slo, setting: Setting
) -> Array:
    """Least instances [2] of the stages of a lane, shared out as in `parts.py`: of the shares that hold the limits the
    one that takes fewest GPUs. With real rounding what the load alone needs."""
    each = jnp.stack([pair.prefill.gpus_per_instance, pair.decode.gpus_per_instance])

    def on_terms(first_share: Array) -> Array:
        parts = parts_of(pair.prefill, pair.decode, Terms(pair.hand_over, first_share))
        return jnp.stack([part_instances(part, traffic, window_tokens, slo, setting) for part in parts])

    found = jax.lax.map(on_terms, jnp.array(SHARES))
    return found[jnp.argmin(jnp.sum(found * each, axis=1))]


def part_instances(part: Part, traffic: PoolTraffic, window_tokens: ArrayLike, slo: Slo, setting: Setting) -> Array:
    """Least N of what is sized by itself; 0 without traffic, inf where no N holds the limits."""
    least = part.least(traffic, window_tokens, slo, setting)
    if not setting.assumptions.whole:
        return least
    return _least_that_holds(
        least, most_instances(least), lambda n: part.tried(traffic, window_tokens, n, slo, setting)
    )[0]


@pytree
class WholeLane(Part):
    """A lane of one stage."""

    engine: Engine

    def least(self, traffic: PoolTraffic, window_tokens: ArrayLike, slo: Slo, setting: Setting) -> Array:
        return least_instances(self.engine, traffic, window_tokens, slo, setting)

    def tried(
        self, traffic: PoolTraffic, window_tokens: ArrayLike, n_instances: ArrayLike, slo: Slo, setting: Setting
    ) -> tuple[Array, Array]:
        metrics = self._metrics(traffic, window_tokens, n_instances, setting)
        return pool_excess(metrics, slo), metrics.power_w

    def bound_w(self, traffic: PoolTraffic, window_tokens: ArrayLike, least: Array, setting: Setting) -> Array:
        setting, assumptions = all_up(setting), setting.assumptions  # watts are those of all instances
        metrics = self._metrics(traffic, window_tokens, least, setting)
        power_w = metrics.power_w
        if assumptions.whole and assumptions.occupancy.floors_in_flight:
            # n = floor(rho n_max): the only way to fewer watts is to add instances until one sequence fewer is counted.
            fewer = jnp.floor(metrics.utilization * metrics.n_max * least / jnp.maximum(metrics.n_active, 1.0)) + 1.0
            fewer = jnp.where(jnp.isfinite(fewer), fewer, least)
            power_w = jnp.minimum(power_w, self._metrics(traffic, window_tokens, fewer, setting).power_w)
        return power_w

    def _metrics(
        self, traffic: PoolTraffic, window_tokens: ArrayLike, n_instances: ArrayLike, setting: Setting
    ) -> PoolMetrics:
        finite = jnp.where(jnp.isfinite(n_instances), n_instances, 1.0)
        return pool_metrics(self.engine, traffic, window_tokens, finite, setting)


def pool_excess(metrics: PoolMetrics, slo: Slo) -> Array:
    """By how much a pool breaks the worst of its limits, where each pool must hold them: see `limits.excesses`."""
    return worst_excess(jax.tree.map(lambda x: x[None], metrics), replace(slo, scope="pool"))


@pytree
class LeastHeld:
    """The search for the least whole N for which an excess that falls with N is held. NumPy's or JAX's, any shape.

    First `trial`, then where the logarithm of the value over its limit, straight over that of N, would cross zero: by
    the power `FALLS`, then by the last two tries that failed, then between the last that failed and the last that
    passed. Once one has passed every third try halves what is left, and where none does every sixth doubles.
    """

    failed: Array
    passed: Array  # `most` + 1 before any has
    failed_by: Array  # ln of the value over its limit, with `failed`; 0 where that was not tried
    passed_by: Array  # and with `passed`
    slope: Array  # of that over ln N, where none has passed
    trial: Array  # the next to try
    n_tried: Array
    most: Array  # beyond which no limit is worth holding

    @property
    def is_open(self) -> Array:
        return self.passed - self.failed > 1.0

    @property
    def found(self) -> Array:
        """The least N; inf for none."""
        xp = namespace(self)
        return xp.where(self.passed > self.most, xp.inf, self.passed)

    def after(self, excess: Array) -> "LeastHeld":
        """The search after `trial` was tried."""
        xp = namespace(self, excess)
        ok, known = excess <= ROUNDING, self.failed_by > 0.0
        by = xp.log(xp.clip(excess + 1.0, 1e-9, MOST_EXCESS))
        rise = xp.where(known, xp.log(xp.where(known, self.trial, 1.0) / xp.maximum(self.failed, 0.5)), 1.0)
        slope = xp.where(known & ~ok, (by - self.failed_by) / rise, self.slope)
        failed, passed = xp.where(ok, self.failed, self.trial), xp.where(ok, self.trial, self.passed)
        failed_by, passed_by = xp.where(ok, self.failed_by, by), xp.where(ok, by, self.passed_by)
        beyond = xp.minimum(failed_by / xp.maximum(-slope, 1e-3), 50.0)
        beyond = xp.where(self.n_tried % 6 == 5, xp.maximum(beyond, math.log(2.0)), beyond)
        gap = xp.log(xp.maximum(passed, 0.5) / xp.maximum(failed, 0.5))  # 0 instances hold where nobody comes
        between = gap * failed_by / xp.maximum(failed_by - passed_by, 1e-12)
        between = xp.where(failed_by > 0.0, between, xp.maximum(gap + passed_by / FALLS, 0.0))
        between = xp.where(self.n_tried % 3 == 2, 0.5 * gap, between)
        further = xp.ceil(xp.maximum(failed, 0.5) * xp.exp(xp.where(passed <= self.most, between, beyond)))
        trial = xp.clip(further, failed + 1.0, xp.maximum(passed - 1.0, failed + 1.0))
        return LeastHeld(failed, passed, failed_by, passed_by, slope, trial, self.n_tried + 1, self.most)


def least_held(start: Array, most: Array | None = None) -> LeastHeld:
    """The search from `start` on, to `most` or else what is worth having of them."""
    xp = namespace(start)
    most, zero = most_instances(start) if most is None else most, xp.zeros_like(start)
    return LeastHeld(start - 1.0, most + 1.0, zero, zero, zero - FALLS, start, zero, most)


def size_fleet(
    fleet: Fleet,
    workload: Workload,
    slo: Slo,
    assumptions: Assumptions = PHYSICAL,
    *,
    router_width: ArrayLike | None = None,
) -> Fleet:
    """`fleet` with the least instances that hold `slo` (inf where none do); `router_width` as in `evaluate`.

    The instances that `fleet` has are not read. Where the latencies are held by the fleet as a whole, all pools grow by
    one factor until they are, then each shrinks while they are, in both orders; the smaller fleet is kept. None of its
    pools can be smaller, which is not a proof that no other fleet is.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> fleet = fo.make_fleet([fo.build(fo.EngineSpec("h100"))], window_tokens=[4400], n_instances=[1])
    >>> bool(fo.size_fleet(fleet, chat, fo.make_slo()).n_instances[0] >= 1)
    True
    """
    traffic = route(fleet, workload, assumptions, router_width=router_width)
    return fleet.with_instances(instances_for(fleet, traffic, workload, slo, assumptions))


def instances_for(
    fleet: Fleet, traffic: PoolTraffic, workload: Workload, slo: Slo, assumptions: Assumptions = PHYSICAL
) -> Array:
    """The instances [K] of `size_fleet` for lanes that get `traffic` [K]."""
    setting = setting_of(workload, fleet.surroundings, assumptions)
    lanes = fleet.servers, traffic, fleet.window_tokens
    if fleet.n_stages > 1:
        return _staged_instances(fleet, traffic, slo, setting)
    if slo.scope == "fleet" and assumptions.whole:
        between = for_each_lane(lambda engine, pool, window: worth_having(engine, pool, window, slo, setting), *lanes)
        return _share_out(fleet, traffic, between, slo, setting)
    rule = required_instances if slo.scope == "pool" else least_instances
    return for_each_lane(lambda engine, pool, window: rule(engine, pool, window, slo, setting), *lanes)


def sized_lanes(
    fleet: Fleet, traffic: PoolTraffic, workload: Workload, slo: Slo, assumptions: Assumptions, grown: Array
) -> tuple[Array, Resources, Array]:
    """(`instances_for`, what the lanes take [K] with them, how many times what the load alone needs they are [K]).

    They are looked for from `grown` times of that on [K]: of a fleet much like this one, where one is known, it is what
    that one came to; it changes how many are tried, not what is found."""
    if fleet.n_stages > 1 or slo.scope == "fleet":
        n = instances_for(fleet, traffic, workload, slo, assumptions)
        metrics = fleet_metrics(fleet.with_instances(n), traffic, workload, assumptions, quantiles=False)
        return n, metrics.pools.resources, grown
    setting, site = setting_of(workload, fleet.surroundings, assumptions), fleet.surroundings.site

    def lane(engine: Engine, pool: PoolTraffic, window: Array, grown: Array) -> tuple[Array, Resources, Array]:
        n, power_w, times = _required(engine, pool, window, slo, setting, grown)
        return n, resources_of(engine, site, n, power_w), times

    return for_each_lane(lane, fleet.engines, traffic, fleet.window_tokens, grown)


def _staged_instances(fleet: Fleet, traffic: PoolTraffic, slo: Slo, setting: Setting) -> Array:
    """Instances [K, 2] of the stages of lanes that hold their limits by themselves."""
    if slo.scope == "fleet":
        raise BadInput(
            "limits of the whole fleet", "lanes of two stages share theirs out by themselves", "need scope pool"
        )

    def stages(server: Server, pool: PoolTraffic, window: Array) -> Array:
        if isinstance(server, EnginePair):
            return required_stages(server, pool, window, slo, setting)
        n = required_instances(server, pool, window, slo, setting)
        return jnp.stack([n, jnp.zeros_like(n)])

    return for_each_lane(stages, fleet.servers, traffic, fleet.window_tokens)


def _share_out(fleet: Fleet, traffic: PoolTraffic, between: tuple[Array, Array], slo: Slo, setting: Setting) -> Array:
    """Instances [K] of the pools, `between` the least and the most, that together hold latencies of the whole fleet."""
    (least, most), engines = between, fleet.engines
    usable = jnp.all(jnp.isfinite(least)) & jnp.any(least > 0)
    start = jnp.where(usable, least, 1.0)
    most = jnp.where(start > 0, jnp.where(usable, most, most_instances(start)), 0.0)

    def holds(n: Array) -> Array:
        pools = for_each_lane(
            lambda engine, pool, window, count: pool_metrics(engine, pool, window, count, setting),
            engines,
            traffic,
            fleet.window_tokens,
            n,
        )
        return held(pools, slo)

    # One bisection after the other, of how far all pools grow and then of each pool alone, in one loop with one body:
    # what it takes to judge a fleet is compiled once.
    def narrowed(
        state: tuple[Array, Array, Array], step: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array, Array], Array]:
        n, grown, reachable = state
        k, afresh = step
        n, grows = jnp.where(afresh, grown, n), k < 0

        def at(i: Array) -> Array:
            wider = jnp.minimum(jnp.ceil(start * GROWTH**i - 1e-9), most)
            return jnp.where(grows, wider, jnp.where(jnp.arange(len(engines)) == k, i, n))

        def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds  # `high` holds, but for growth beyond the most
            middle = jnp.floor((low + high) / 2.0)
            ok = holds(at(middle))
            return jnp.where(ok, low, middle + 1.0), jnp.where(ok, middle, high)

        low, high = jnp.where(grows, 0.0, start[k]), jnp.where(grows, GROWTHS + 1.0, n[k])
        bounds = jnp.where(reachable, low, high), high
        _, found = jax.lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, bounds)
        n, reachable = at(found), reachable & ~(grows & (found > GROWTHS))
        return (n, jnp.where(grows, n, grown), reachable), n

    order = range(len(engines))
    steps = jnp.array([-1, *order, *reversed(order)]), jnp.arange(2 * len(engines) + 1) == len(engines) + 1
    (*_, reachable), tried = jax.lax.scan(narrowed, (start, start, usable), steps)
    gpus_each = jnp.stack([engine.gpus_per_instance for engine in engines])
    one, other = tried[len(engines)], tried[-1]
    best = jnp.where(jnp.sum(one * gpus_each) <= jnp.sum(other * gpus_each), one, other)
    return jnp.where(least == 0, 0.0, jnp.where(reachable, best, jnp.inf))
