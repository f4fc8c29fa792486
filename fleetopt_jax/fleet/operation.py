"""How a pool's instances run: what is asked of them, sequences in flight, time of a step, power."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices import KV_CACHE, PREFILL_MOMENTS, SERVICE
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.traffic import PoolTraffic
from fleetopt_jax.laws.decode import decode_step_s
from fleetopt_jax.laws.occupancy import crowding, sequences_in_flight
from fleetopt_jax.laws.power import gpu_power_w
from fleetopt_jax.workload.atoms import Workload


@pytree
class PoolLoad:
    """What a pool asks of its instances, however many they are. Harmless positive numbers without traffic."""

    rate_per_s: Array  # requests [1/s]
    n_max: Array  # sequences one instance can run [-]
    steps: Array  # decode steps (and published prefill iterations) of a request [-]
    context_tokens: Array  # mean context of a decoding sequence [tokens]
    service_s: Array  # time a request holds its slot while all are full [s]
    service_scv: Array  # its squared CV [-]
    prefill_s: Array  # engine time prefill takes, mean [s]
    prefill_square_s2: Array  # and mean square [s^2]

    @property
    def instance_per_s(self) -> Array:
        """Requests one instance gets through [1/s]."""
        return safe_div(self.n_max, self.service_s)


def pool_load(
    engine: Engine, traffic: PoolTraffic, window_tokens: ArrayLike, workload: Workload, assumptions: Assumptions
) -> PoolLoad:
    """The load of one pool."""
    busy = traffic.traffic_frac > 0
    steps, demand = jax.tree.map(lambda x: jnp.where(busy, x, 1.0), (traffic.steps, traffic.demand))
    n_max = KV_CACHE[assumptions.kv_cache](engine, window_tokens, demand, assumptions.whole)
    context, decode_s, scv = SERVICE[assumptions.occupancy](engine, steps, demand, n_max)
    prefill_s, square = PREFILL_MOMENTS[assumptions.prefill](engine, demand)
    return PoolLoad(
        rate_per_s=workload.arrival_rate_per_s * traffic.traffic_frac,
        n_max=n_max,
        steps=steps.steps,
        context_tokens=context,
        service_s=decode_s + n_max * prefill_s,
        service_scv=scv,
        prefill_s=prefill_s,
        prefill_square_s2=square,
    )


@pytree
class Operation:
    """How one instance runs: means over time, shape ()."""

    n_decoding: Array  # decoding sequences [-]
    step_s: Array  # a decode step by itself [s]
    itl_s: Array  # between two tokens of a sequence, with the prefill of others in it [s]
    prefill_frac: Array  # share of the time that prefill takes; 0 in overload [-]
    gpu_w: Array  # one GPU [W]


def _full_batch(
    engine: Engine,
    load: PoolLoad,
    rate: Array,
    companions: Array,
    utilization: Array,
    stable: Array,
    assumptions: Assumptions,
) -> Operation:
    """n = rho n_max; steps as long as with all slots full."""
    in_flight = jnp.minimum(utilization, 1.0) * load.n_max
    n_active = jnp.maximum(1.0, jnp.floor(in_flight)) if assumptions.whole else in_flight
    prefill_frac = jnp.where(stable, rate * load.prefill_s, 0.0)
    decode_w = gpu_power_w(engine.power, n_active, load.context_tokens)
    return Operation(
        n_decoding=n_active,
        step_s=safe_div(load.service_s - load.n_max * load.prefill_s, load.steps),
        itl_s=safe_div(load.service_s, load.steps),
        prefill_frac=prefill_frac,
        gpu_w=decode_w + prefill_frac * (engine.prefill.gpu_w - decode_w),
    )


def _fixed_point(
    engine: Engine,
    load: PoolLoad,
    rate: Array,
    companions: Array,
    utilization: Array,
    stable: Array,
    assumptions: Assumptions,
) -> Operation:
    """Little's law at the real step time. A GPU prefills, decodes, or idles while no sequence is there (with Poisson
    numbers in flight, exp(-n) of the time that prefill leaves)."""
    prefill_frac = jnp.where(stable, rate * load.prefill_s, 0.0)
    n_max = jnp.maximum(load.n_max, 1e-3)
    prefill_scv = safe_div(load.prefill_square_s2, load.prefill_s**2, otherwise=1.0) - 1.0
    crowd = crowding(prefill_frac, load.steps, prefill_scv, companions)
    rate = jnp.where(stable, rate, 0.0)
    n = sequences_in_flight(
        engine.decode, n_max, rate, load.steps, load.context_tokens, prefill_frac, jnp.maximum(crowd, 0.0)
    )
    # Iterations as a token sees them: longer than the mean one in a crowd, which n contains; where requests avoid each
    # other shorter, to first order, but no shorter than without prefill.
    crowded = jnp.maximum(1.0 + crowd / jnp.maximum(n, 1e-9), 1.0 - jnp.minimum(prefill_frac, 0.5))
    crowded = jnp.where(crowd == 0, 1.0, crowded)
    n = jnp.where(stable, n * jnp.minimum(crowded, 1.0), n_max)
    # In overload the slots are full and prefill takes what it takes of an instance at its capacity.
    overload_frac = jnp.minimum(load.prefill_s * load.instance_per_s, 1.0)
    prefilling = jnp.where(stable, prefill_frac, overload_frac)
    working = -jnp.expm1(-jnp.maximum(n, 1e-9))
    decode_w = gpu_power_w(engine.power, jnp.maximum(n, 1e-9) / working, load.context_tokens)
    decoding_w = engine.idle_w + working * (decode_w - engine.idle_w)
    return Operation(
        n_decoding=n,
        step_s=decode_step_s(engine.decode, jnp.minimum(n, n_max), load.context_tokens),
        itl_s=decode_step_s(engine.decode, jnp.minimum(n + 1.0, jnp.maximum(n_max, 1.0)), load.context_tokens)
        / (1.0 - jnp.minimum(prefilling, 0.999))
        * crowded,
        prefill_frac=prefill_frac,
        gpu_w=decoding_w + prefilling * (engine.prefill.gpu_w - decoding_w),
    )


OCCUPANCY = {"full_batch": _full_batch, "fixed_point": _fixed_point}
