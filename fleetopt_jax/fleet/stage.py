"""A stage at work: what is asked of it, its state with so many instances, how it runs, how long requests wait.

Four records, each made from the one before: load, state, operation (`choices/occupancy.py`), delay (`choices/tail.py`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import between, safe_div
from fleetopt_jax.core.struct import pytree, static
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices.prefill import KINDS
from fleetopt_jax.fleet.engine import Engine, Server
from fleetopt_jax.fleet.step_law import decoding_in
from fleetopt_jax.fleet.surroundings import Surroundings
from fleetopt_jax.fleet.traffic import PoolTraffic
from fleetopt_jax.laws.bursts import Burst
from fleetopt_jax.laws.cycle import TOGETHER, of_prompts, together
from fleetopt_jax.laws.demand import NO_STEPS, Demand
from fleetopt_jax.laws.queueing import dispatched_scv, thinned_scv
from fleetopt_jax.laws.service import StepMoments
from fleetopt_jax.laws.speculation import in_iterations
from fleetopt_jax.workload.atoms import Workload

T = TypeVar("T")

KNOTS = 6  # of prefill beside sequences, a quarter each: down to a thousandth of the slots


@pytree
class Setting:
    """What a stage serves in, but for its own traffic: how requests come to the fleet, what surrounds it, and by which
    assumptions it is judged. Leaves traced, shape ()."""

    arrival_rate_per_s: Array  # of the whole fleet [1/s]
    arrival_scv: Array  # squared CV of its gaps [-]
    surroundings: Surroundings
    assumptions: Assumptions = static()


def all_up(setting: Setting) -> Setting:
    """The same where nothing is ever down."""
    return replace(setting, surroundings=replace(setting.surroundings, reserve=None))


def left_and_all(
    law: Callable[[Any, Setting], T], server: Server, n_instances: ArrayLike, setting: Setting
) -> tuple[T, T]:
    """`law(n, setting)` of what is left of `n_instances` while what may be down is, and of all of them: the first says
    what a lane holds, the second what it takes. One and the same where nothing may be down. Of two stages, n is [2]."""
    reserve = setting.surroundings.reserve
    if reserve is None:
        found = law(n_instances, setting)
        return found, found
    sure, n = all_up(setting), jnp.asarray(n_instances)
    gpus = [engine.gpus_per_instance for _, engine in server.parts]
    if n.ndim == 0:
        return law(reserve.up(n, gpus[0]), sure), law(n, sure)
    return law(jnp.stack([reserve.up(each, g) for each, g in zip(n, gpus, strict=True)]), sure), law(n, sure)


def sure_of(n_up: Array, engine: Engine, setting: Setting) -> Array:
    """The least instances of which `n_up` are up while what may be down is."""
    reserve = setting.surroundings.reserve
    return n_up if reserve is None else reserve.needed(n_up, engine.gpus_per_instance)


def setting_of(workload: Workload, surroundings: Surroundings, assumptions: Assumptions) -> Setting:
    """The setting of a fleet that serves `workload`."""
    return Setting(workload.arrival_rate_per_s, workload.arrival_scv, surroundings, assumptions)


@pytree
class StageLoad:
    """What a stage asks of its instances, however many they are. Harmless positive numbers without traffic."""

    rate_per_s: Array  # requests [1/s]
    n_max: Array  # sequences one instance can run [-]
    steps: Array  # decode steps (and published prefill iterations) of a request [-]
    steps_per_token: Array  # of a token after the first; 1 without drafts [-]
    context_tokens: Array  # mean context of a decoding sequence [tokens]
    service_s: Array  # time a request holds its slot while all are full [s]
    service_scv: Array  # its squared CV [-]
    prefill_s: Array  # engine time prefill takes with all slots full, mean [s]
    prefill_square_s2: Array  # and mean square [s^2]
    prefill_at_s: Array  # mean of one of TOGETHER prompts, all slots full, a quarter, ... [KNOTS, len(TOGETHER)] [s]

    @property
    def knots(self) -> Array:
        """The sequences that decode beside the prompts of `prefill_at_s` [KNOTS]."""
        return self.n_max * jnp.exp2(-2.0 * jnp.arange(KNOTS, dtype=float))

    def at(self, values: Array, n_active: ArrayLike) -> Array:
        """What is known at the knots [KNOTS, ...], with so many sequences."""
        n = jnp.maximum(n_active, 1e-9 * self.n_max)
        return between(values, jnp.log2(jnp.maximum(self.n_max, 1e-9) / n) / 2.0)

    @property
    def instance_per_s(self) -> Array:
        """Requests one instance gets through [1/s]."""
        return safe_div(self.n_max, self.service_s)


def stage_load(engine: Engine, traffic: PoolTraffic, window_tokens: ArrayLike, setting: Setting) -> StageLoad:
    """The load of one stage."""
    load, demand = _decoded(engine, traffic, window_tokens, setting)
    n = load.n_max * jnp.exp2(-2.0 * jnp.arange(KNOTS, dtype=float))
    prompts = jnp.array(TOGETHER)
    beside = jax.tree.map(lambda x: x[:, None], decoding_in(engine, n, load.context_tokens))
    moments_s = setting.assumptions.prefill.moments_s(engine, demand, traffic.kinds(KINDS), beside, prompts)
    prefill_at_s, square = (jnp.broadcast_to(x, (KNOTS, len(TOGETHER))) for x in moments_s)
    met = together(load.n_max / jnp.maximum(load.steps, NO_STEPS))
    prefill_s = of_prompts(prefill_at_s[0], met)
    return replace(
        load,
        service_s=load.service_s + load.n_max * prefill_s,
        prefill_s=prefill_s,
        prefill_square_s2=of_prompts(square[0], met),
        prefill_at_s=prefill_at_s,
    )


def decoded_load(engine: Engine, traffic: PoolTraffic, window_tokens: ArrayLike, setting: Setting) -> StageLoad:
    """The load of a stage that only decodes."""
    return _decoded(engine, traffic, window_tokens, setting)[0]


def _decoded(
    engine: Engine, traffic: PoolTraffic, window_tokens: ArrayLike, setting: Setting
) -> tuple[StageLoad, Demand]:
    """The load without prefill, and the demand in iterations; those of some request where there is no traffic."""
    assumptions = setting.assumptions
    busy = traffic.traffic_frac > 0
    steps, demand = jax.tree.map(lambda x: jnp.where(busy, x, 1.0), (traffic.steps, traffic.demand))
    steps, demand, steps_per_token = as_decoded(engine, steps, demand)
    n_max = assumptions.kv_cache.n_max(engine.kv, window_tokens, demand, whole=assumptions.whole)
    context, decode_s, scv = assumptions.occupancy.service(engine, steps, demand, n_max)
    zero = jnp.zeros_like(context)
    load = StageLoad(
        rate_per_s=setting.arrival_rate_per_s * traffic.traffic_frac,
        n_max=n_max,
        steps=steps.steps,
        steps_per_token=steps_per_token,
        context_tokens=context,
        service_s=decode_s,
        service_scv=scv,
        prefill_s=zero,
        prefill_square_s2=zero,
        prefill_at_s=jnp.zeros((KNOTS, len(TOGETHER))),
    )
    return load, demand


def as_decoded(engine: Engine, steps: StepMoments, demand: Demand) -> tuple[StepMoments, Demand, Array]:
    """The features of requests in iterations of an engine that drafts ahead, and the iterations of a token after the
    first; as they are, and 1, of any other."""
    if engine.speculation is None:
        return steps, demand, jnp.ones(())
    of_iterations, served = in_iterations(engine.speculation, steps, demand)
    per_token = safe_div(served.steps - 1.0, jnp.maximum(demand.steps - 1.0, 0.0), 1.0)
    return of_iterations, served, jnp.minimum(per_token, 1.0)


@pytree
class StageState:
    """One stage with so many instances: what the laws of operation and delay read. Leaves traced, shape ()."""

    engine: Engine
    traffic: PoolTraffic
    load: StageLoad
    n_instances: Array
    used: Array  # whether there is traffic, and somebody to serve it
    utilization: Array  # load over what the instances can take; > 1 is overload [-]
    stable: Array
    instance_per_s: Array  # requests to one instance [1/s]
    pool_scv: Array  # squared CV of the stage's arrivals [-]
    instance_scv: Array  # of one instance's [-]
    co_arrivals: Array  # who come with a request in its iterations, against a Poisson stream's [-]
    burst: Burst  # who come soon after a request to its instance
    in_time: Array  # share of an instance's requests that come whatever it is at [-]
    fewer: Array  # sequences that an instance has less than the mean one when it gets a request [-]
    assumptions: Assumptions = static()


def stage_state(
    engine: Engine, traffic: PoolTraffic, load: StageLoad, n_instances: ArrayLike, setting: Setting
) -> StageState:
    """The state of a stage of `n_instances` equal instances."""
    used = (traffic.traffic_frac > 0) & (jnp.asarray(n_instances) > 0) & (load.n_max > 0)
    utilization = load.rate_per_s * load.service_s / jnp.where(used, n_instances * load.n_max, 1.0)
    pool_scv = thinned_scv(jnp.maximum(setting.arrival_scv, 1.0), traffic.traffic_frac)
    dispatch = setting.assumptions.dispatch
    return StageState(
        engine=engine,
        traffic=traffic,
        load=load,
        n_instances=jnp.asarray(n_instances, dtype=float),
        used=used,
        utilization=utilization,
        stable=used & (utilization < 1.0),
        instance_per_s=load.rate_per_s / jnp.where(used, n_instances, 1.0),
        pool_scv=pool_scv,
        instance_scv=dispatched_scv(pool_scv, n_instances, dispatch.arrival_scv),
        co_arrivals=dispatched_scv(pool_scv, n_instances, dispatch.co_arrivals),
        burst=Burst(
            share=traffic.traffic_frac / jnp.where(used, n_instances, 1.0),
            rate_per_s=safe_div(load.rate_per_s, traffic.traffic_frac),
            scv=jnp.maximum(setting.arrival_scv, 1.0),
        ),
        in_time=dispatched_scv(1.0, n_instances, dispatch.in_time),
        fewer=dispatched_scv(0.0, n_instances, dispatch.fewer),
        assumptions=setting.assumptions,
    )
