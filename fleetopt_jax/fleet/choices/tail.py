"""The choice `tail`: what the P99 time to first token is made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.latency import TtftLaw, cycle_moments, cycle_wait_s, itl_quantile_s, ttft_quantile_s
from fleetopt_jax.laws.queueing import bursty_wait, p99_wait_s

if TYPE_CHECKING:
    from fleetopt_jax.fleet.choices.occupancy import Operation
    from fleetopt_jax.fleet.stage import StageState


@pytree
class Delay:
    """The latencies of a stage, shape (). Finite, but without meaning, in overload."""

    wait_s: Array  # for a slot: P99 as published, mean with a full distribution [s]
    prefill_s: Array  # mean prefill counted in TTFT [s]
    ttft_p99_s: Array  # [s]
    itl_p99_s: Array  # [s]
    running_s: Array  # how long a request is in flight before it decodes [s]
    ttft: TtftLaw | None  # its distribution, where there is one


class Tail:
    """How long the unluckiest wait."""

    name: ClassVar[str]
    has_distribution: ClassVar[bool]  # whether prompts are kept as a histogram, and limits can be the whole fleet's

    def delay(self, state: "StageState", operation: "Operation", *, quantiles: bool) -> Delay:
        """The latencies; without `quantiles` the P99s of a distribution are not solved for and stand at inf."""
        raise NotImplementedError


@dataclass(frozen=True)
class MeanPrefillTail(Tail):
    """P99 wait for a slot under Poisson arrivals + mean prefill (arXiv 2603.17280v1)."""

    name: ClassVar[str] = "mean_prefill"
    has_distribution: ClassVar[bool] = False

    def delay(self, state: "StageState", operation: "Operation", *, quantiles: bool) -> Delay:
        load, traffic = state.load, state.traffic
        servers = jnp.where(state.stable, state.n_instances * load.n_max, 1.0)
        wait_s = p99_wait_s(servers, load.rate_per_s, load.service_s, load.service_scv)
        prefill_s = state.assumptions.prefill.mean_own_s(state.engine, traffic.steps, traffic.demand, operation.step_s)
        return Delay(
            wait_s=wait_s,
            prefill_s=prefill_s,
            ttft_p99_s=wait_s + prefill_s,
            itl_p99_s=operation.itl_s,
            running_s=jnp.zeros_like(prefill_s),
            ttft=None,
        )


@dataclass(frozen=True)
class QuantileTail(Tail):
    """The P99 of slot wait + prefill queue + own prefill, arrivals as bursty as the workload's.

    The slot queue is the pool's, with its share of the burstiness (`pool_scv`); an instance's prefill queue sees what
    dispatch leaves of it (`instance_scv`).
    """

    name: ClassVar[str] = "quantile"
    has_distribution: ClassVar[bool] = True

    def delay(self, state: "StageState", operation: "Operation", *, quantiles: bool) -> Delay:
        load, traffic, stable, policy = state.load, state.traffic, state.stable, state.assumptions.prefill
        instances = jnp.where(stable, state.n_instances, 1.0)
        rate = jnp.where(stable, load.rate_per_s, 0.5 * load.instance_per_s)
        servers = jnp.maximum(instances * load.n_max, 1.0)
        slot_q, slot_s = bursty_wait(servers, rate, load.service_s, state.pool_scv, load.service_scv)
        f = operation.prefill_frac
        square_s2 = load.prefill_square_s2 + (state.instance_scv - 1.0) * load.prefill_s**2
        cycle_s, variance = cycle_moments(operation.step_s, rate / instances, f, square_s2)
        law = self._ttft(state, operation, slot_q, slot_s, cycle_s, variance)
        ttft_p99_s = itl_p99_s = jnp.full_like(cycle_s, jnp.inf)
        if quantiles:
            ttft_p99_s = ttft_quantile_s(jax.tree.map(lambda x: x[None], law), jnp.ones(1))
            prompts = traffic.prompts
            itl_p99_s = itl_quantile_s(
                operation.step_s,
                cycle_s,
                variance,
                rate / instances,
                prompts.mass,
                (prompts.shortest + prompts.longest) / 2.0,
                state.engine.prefill,
            )
        own_mean_s = policy.mean_own_s(state.engine, traffic.steps, traffic.demand, operation.step_s)
        return Delay(
            wait_s=slot_s,
            prefill_s=own_mean_s,
            ttft_p99_s=ttft_p99_s,
            itl_p99_s=jnp.maximum(operation.itl_s, jnp.where(load.prefill_s > 0, itl_p99_s, operation.itl_s)),
            running_s=jnp.where(load.prefill_s > 0, own_mean_s, 0.0),
            ttft=law,
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
        prompts, f, stable = state.traffic.prompts, operation.prefill_frac, state.stable
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
