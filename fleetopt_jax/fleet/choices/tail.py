"""The choice `tail`: what the P99 time to first token is made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.latency import ItlLaw, TtftLaw, cycle_moments, cycle_wait_s
from fleetopt_jax.laws.queueing import bursty_wait, p99_wait_s

if TYPE_CHECKING:
    from fleetopt_jax.fleet.choices.occupancy import Operation
    from fleetopt_jax.fleet.stage import StageState
    from fleetopt_jax.fleet.traffic import PromptHistogram


@pytree
class Delay:
    """The latencies of a stage, shape (). Finite, but without meaning, in overload."""

    wait_s: Array  # for a slot: P99 as published, mean with a full distribution [s]
    prefill_s: Array  # mean prefill counted in TTFT [s]
    running_s: Array  # how long a request is in flight before it decodes [s]
    ttft_p99_s: Array  # [s]; inf until it is solved for, where there is a distribution
    itl_p99_s: Array  # the same [s]
    ttft: TtftLaw | None  # the distributions, where there are any
    itl: ItlLaw | None


class Tail:
    """How long the unluckiest wait."""

    name: ClassVar[str]
    has_distribution: ClassVar[bool]  # whether prompts are kept as a histogram, and limits can be the whole fleet's

    def delay(self, state: "StageState", operation: "Operation") -> Delay:
        """The latencies of a stage that runs like this."""
        raise NotImplementedError


@dataclass(frozen=True)
class MeanPrefillTail(Tail):
    """P99 wait for a slot under Poisson arrivals + mean prefill (arXiv 2603.17280v1)."""

    name: ClassVar[str] = "mean_prefill"
    has_distribution: ClassVar[bool] = False

    def delay(self, state: "StageState", operation: "Operation") -> Delay:
        load, traffic = state.load, state.traffic
        servers = jnp.where(state.stable, state.n_instances * load.n_max, 1.0)
        wait_s = p99_wait_s(servers, load.rate_per_s, load.service_s, load.service_scv)
        prefill_s = state.assumptions.prefill.mean_own_s(state.engine, traffic.steps, traffic.demand, operation.step_s)
        return Delay(
            wait_s=wait_s,
            prefill_s=prefill_s,
            running_s=jnp.zeros_like(prefill_s),
            ttft_p99_s=wait_s + prefill_s,
            itl_p99_s=operation.itl_s,
            ttft=None,
            itl=None,
        )


@dataclass(frozen=True)
class QuantileTail(Tail):
    """The P99 of slot wait + prefill queue + own prefill, arrivals as bursty as the workload's.

    The slot queue is the pool's, with its share of the burstiness (`pool_scv`); an instance's prefill queue sees what
    dispatch leaves of it (`instance_scv`).
    """

    name: ClassVar[str] = "quantile"
    has_distribution: ClassVar[bool] = True

    def delay(self, state: "StageState", operation: "Operation") -> Delay:
        load, traffic, stable, policy = state.load, state.traffic, state.stable, state.assumptions.prefill
        instances = jnp.where(stable, state.n_instances, 1.0)
        rate = jnp.where(stable, load.rate_per_s, 0.5 * load.instance_per_s)
        servers = jnp.maximum(instances * load.n_max, 1.0)
        slot_q, slot_s = bursty_wait(servers, rate, load.service_s, state.pool_scv, load.service_scv)
        f = operation.prefill_frac
        square_s2 = load.prefill_square_s2 + (state.instance_scv - 1.0) * load.prefill_s**2
        cycle_s, variance = cycle_moments(operation.step_s, rate / instances, f, square_s2)
        prompts = _histogram(state)
        itl = ItlLaw(
            step_s=operation.step_s,
            cycle_s=cycle_s,
            cycle_variance_s2=variance,
            rate_per_s=rate / instances,
            prompt_mass=prompts.mass,
            prompt_tokens=(prompts.shortest + prompts.longest) / 2.0,
            prefill=state.engine.prefill,
        )
        own_mean_s = policy.mean_own_s(state.engine, traffic.steps, traffic.demand, operation.step_s)
        return Delay(
            wait_s=slot_s,
            prefill_s=own_mean_s,
            running_s=jnp.where(load.prefill_s > 0, own_mean_s, 0.0),
            ttft_p99_s=jnp.full_like(cycle_s, jnp.inf),
            itl_p99_s=jnp.full_like(cycle_s, jnp.inf),
            ttft=self._ttft(state, operation, slot_q, slot_s, cycle_s, variance),
            itl=itl,
        )

    def _ttft(
        self,
        state: "StageState",
        operation: "Operation",
        slot_q: Array,
        slot_s: Array,
        cycle_s: Array,
        variance: Array,
    ) -> TtftLaw:
        prompts, f, stable = _histogram(state), operation.prefill_frac, state.stable
        queue_s = cycle_wait_s(cycle_s, variance, f)
        waits_q = 1.0 - (1.0 - slot_q) * (1.0 - f)
        some = waits_q > 1e-9
        random_s = jnp.where(some, slot_s + queue_s, 1.0)

        def own_s(prefill_tokens: Array) -> Array:
            assumptions = state.assumptions
            return prompts.extra_s + assumptions.prefill.own_s(
                state.engine, prefill_tokens, operation.step_s, whole=assumptions.whole
            )

        return TtftLaw(
            mass=prompts.mass,
            least_s=own_s(prompts.shortest) + f * cycle_s,
            most_s=own_s(prompts.longest) + (1.0 + f) * cycle_s,
            shortest_tokens=prompts.shortest,
            longest_tokens=prompts.longest,
            wait_probability=jnp.where(stable, jnp.where(some, waits_q, 0.0), 1.0),
            wait_decay_per_s=jnp.where(stable, jnp.where(some, waits_q, 1.0) / jnp.maximum(random_s, 1e-9), 1e-9),
        )


def _histogram(state: "StageState") -> "PromptHistogram":
    prompts = state.traffic.prompts
    if prompts is None:
        raise ValueError("need the prompts of the traffic as a histogram: route it under this tail")
    return prompts
