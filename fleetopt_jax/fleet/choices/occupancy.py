"""The choice `occupancy`: sequences in flight, time of a step, power of a GPU."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.choices.dispatch import STALENESS_S
from fleetopt_jax.fleet.choices.prefill import KINDS
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.step_law import decoding_in
from fleetopt_jax.laws.cycle import Company, of_prompts, together
from fleetopt_jax.laws.demand import NO_STEPS, Demand, held_tokens
from fleetopt_jax.laws.occupancy import MOST_PREFILL, in_flight, shared_prefill
from fleetopt_jax.laws.queueing import busy_share, fresh_frac
from fleetopt_jax.laws.service import MIN_SCV, StepMoments, service_moments_s

if TYPE_CHECKING:
    from fleetopt_jax.fleet.stage import StageState


@pytree
class Operation:
    """How one instance runs: means over time, shape ()."""

    n_decoding: Array  # decoding sequences [-]
    step_s: Array  # a decode step by itself [s]
    itl_s: Array  # of a token of each sequence, with the prefill of others in it [s]
    prefill_frac: Array  # share of the time that prefill takes; 0 in overload [-]
    prefill_square_s2: Array  # mean square of the engine time a prompt takes [s^2]
    gpu_w: Array  # one GPU [W]


class Occupancy:
    """How many sequences run at once."""

    name: ClassVar[str]
    spare_instances: ClassVar[float]  # of the sizing rule, beyond the offered load
    floors_in_flight: ClassVar[bool]  # whether sequences are counted whole, so that watts fall in steps of instances

    def service(self, engine: Engine, steps: StepMoments, mean: Demand, n_max: ArrayLike) -> tuple[Array, Array, Array]:
        """(mean context of an active sequence [tokens], E[s] [s], cs2 [-]) of the decode time a slot is held with all
        slots full."""
        raise NotImplementedError

    def operate(self, state: "StageState") -> Operation:
        """How an instance of the stage runs."""
        raise NotImplementedError


@dataclass(frozen=True)
class FullBatch(Occupancy):
    """In flight n = rho n_max, with steps as long as with all slots full."""

    name: ClassVar[str] = "full_batch"
    spare_instances: ClassVar[float] = 1.0  # the published rule adds one to the offered load
    floors_in_flight: ClassVar[bool] = True

    def service(self, engine: Engine, steps: StepMoments, mean: Demand, n_max: ArrayLike) -> tuple[Array, Array, Array]:
        service_s, scv = service_moments_s(engine.decode, steps, n_max)
        return safe_div(steps.steps_len, steps.steps, otherwise=1.0), service_s, scv

    def operate(self, state: "StageState") -> Operation:
        engine, load = state.engine, state.load
        in_flight = jnp.minimum(state.utilization, 1.0) * load.n_max
        n_active = jnp.maximum(1.0, jnp.floor(in_flight)) if state.assumptions.whole else in_flight
        prefill_frac = jnp.where(state.stable, state.instance_per_s * load.prefill_s, 0.0)
        decode_w = engine.power.gpu_w(n_active, load.context_tokens)
        return Operation(
            n_decoding=n_active,
            step_s=safe_div(load.service_s - load.n_max * load.prefill_s, load.steps),
            itl_s=safe_div(load.service_s, load.steps) * load.steps_per_token,
            prefill_frac=prefill_frac,
            prefill_square_s2=load.prefill_square_s2,
            gpu_w=decode_w + prefill_frac * (engine.prefill.gpu_w - decode_w),
        )


@dataclass(frozen=True)
class FixedPoint(Occupancy):
    """Little's law at the real step time. A GPU prefills, decodes, or idles while no sequence is there: of the time
    that prefill leaves what `queueing.busy_share` does, of one instance exp(-n) where arrivals are Poisson."""

    name: ClassVar[str] = "fixed_point"
    spare_instances: ClassVar[float] = 0.0
    floors_in_flight: ClassVar[bool] = False

    def service(self, engine: Engine, steps: StepMoments, mean: Demand, n_max: ArrayLike) -> tuple[Array, Array, Array]:
        context, _ = held_tokens(mean)
        scv = jnp.maximum(MIN_SCV, safe_div(steps.steps2, steps.steps**2, otherwise=1.0) - 1.0)
        return context, steps.steps * engine.decode.step_s(n_max, context), scv

    def operate(self, state: "StageState") -> Operation:
        engine, load, stable, policy = state.engine, state.load, state.stable, state.assumptions.prefill
        demand = state.traffic.demand
        n_max = jnp.maximum(load.n_max, 1e-3)
        rate = jnp.where(stable, state.instance_per_s, 0.0)

        company = _company(state)
        prefill_at_s = company.of(load.prefill_at_s.T)

        def prefill_frac_at(n: Array) -> Array:
            return rate * load.at(prefill_at_s, n)

        def shared_at(prefill_frac: Array) -> Array:
            met = shared_prefill(prefill_frac, load.steps, prefill_scv, state.co_arrivals)
            return met - state.fewer * prefill_frac

        prefill_scv = safe_div(load.prefill_square_s2, load.prefill_s**2, otherwise=1.0) - 1.0
        n = in_flight(
            lambda n: engine.decode.step_s(n + 1.0, load.context_tokens),
            prefill_frac_at,
            lambda prefill_frac: jnp.maximum(shared_at(prefill_frac), 0.0),
            n_max,
            rate,
            load.steps,
        )
        prefill_s = load.at(prefill_at_s, n)
        square_s2 = load.prefill_square_s2 * safe_div(prefill_s, load.prefill_s) ** 2
        prefill_frac = jnp.minimum(rate * prefill_s, MOST_PREFILL)
        shared = shared_at(prefill_frac)
        # Iterations as a token sees them: longer than the mean one where prompts come together, which n contains; where
        # requests avoid each other shorter, to first order, but no shorter than without prefill.
        lengthening = jnp.maximum(1.0 + shared / jnp.maximum(n, 1e-9), 1.0 - prefill_frac)
        # Where requests are prefilled only, no token sees an iteration.
        lengthening = jnp.where((shared == 0) | (load.steps <= NO_STEPS), 1.0, lengthening)
        n = jnp.where(stable, n * jnp.minimum(lengthening, 1.0), n_max)
        # In overload the slots are full and prefill takes what it takes of an instance at its capacity.
        overload_frac = jnp.minimum(load.prefill_s * load.instance_per_s, 1.0)
        prefilling = jnp.where(stable, prefill_frac, overload_frac)
        among = state.n_instances if state.assumptions.dispatch.looks_at_queues else 1.0
        apart = n / jnp.maximum(lengthening, 1.0)  # but for whom prompts that come together keep waiting
        working = busy_share(apart, among, state.burst.met(apart)[0] - apart)
        decode_w = engine.power.gpu_w(jnp.maximum(n / working, 1.0), load.context_tokens)
        decoding_w = engine.idle_w + working * (decode_w - engine.idle_w)
        with_it = jnp.minimum(n + 1.0, jnp.maximum(n_max, 1.0))
        company = jax.tree.map(partial(load.at, n_active=n), company)
        beside = decoding_in(engine, n, load.context_tokens)
        prefill_w = policy.gpu_w(engine, demand, state.traffic.kinds(KINDS), beside, company)
        step_s, with_it_s = engine.decode.step_s(jnp.stack([jnp.minimum(n, n_max), with_it]), load.context_tokens)
        return Operation(
            n_decoding=n,
            step_s=step_s,
            itl_s=with_it_s / (1.0 - jnp.minimum(prefilling, MOST_PREFILL)) * lengthening * load.steps_per_token,
            prefill_frac=prefill_frac,
            prefill_square_s2=square_s2,
            gpu_w=decoding_w + prefilling * (prefill_w - decoding_w),
        )


def _company(state: "StageState") -> Company:
    """Whom prompts share their iterations with beside the sequences of the load's knots [KNOTS].

    A prompt shares its iteration with those that come during the one it meets. Of the time, and so of the requests that
    come in time, iterations with prompts take more than their share, and more requests come to them; and with a burst
    come those of it that an iteration is long enough for. A router that knows old queues only follows departures less.
    """
    load, n = state.load, state.load.knots
    m = n / jnp.maximum(load.steps, NO_STEPS)
    step_s = state.engine.decode.step_s(jnp.maximum(n, 1e-9), load.context_tokens)
    added_s = of_prompts(load.prefill_at_s.T, together(m))
    cycle_s, long_s = step_s + m * added_s, step_s + together(m) * added_s
    in_time = 1.0 - (1.0 - state.in_time) * fresh_frac(cycle_s, STALENESS_S)

    def with_burst(others: Array, during_s: Array) -> Array:
        return together(others + 2.0 * state.burst.within(during_s / 2.0))

    return Company(
        short=with_burst(m, step_s),
        long=with_burst(m + m * in_time * (long_s / cycle_s - 1.0), long_s),
        meet_long=in_time * -jnp.expm1(-m) * long_s / cycle_s,
    )
