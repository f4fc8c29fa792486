"""The choice `tail`: what the P99 time to first token is made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.choices.dispatch import STALENESS_S
from fleetopt_jax.fleet.choices.prefill import mean_prompt
from fleetopt_jax.fleet.step_law import decoding_in
from fleetopt_jax.laws.bursts import crowded
from fleetopt_jax.laws.cycle import mates, with_prompt
from fleetopt_jax.laws.itl import ItlLaw, cycle_moments
from fleetopt_jax.laws.mixed_step import StepBatch
from fleetopt_jax.laws.queueing import bursty_wait, fresh_frac, p99_wait_s
from fleetopt_jax.laws.step_law import stacked
from fleetopt_jax.laws.ttft import Iterations, TtftLaw

KINDS = 10  # that others' prompts are told apart by

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
        decoding = _decoding(state, operation)
        prefill_s = state.assumptions.prefill.mean_own_s(state.engine, traffic.steps, traffic.demand, decoding)
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

    The slot queue is the pool's where the router looks at queues, with its share of the burstiness (`pool_scv`); else
    every instance has its own, which sees what dispatch leaves of it (`instance_scv`).
    """

    name: ClassVar[str] = "quantile"
    has_distribution: ClassVar[bool] = True

    def delay(self, state: "StageState", operation: "Operation") -> Delay:
        load, traffic, stable, policy = state.load, state.traffic, state.stable, state.assumptions.prefill
        instances = jnp.where(stable, state.n_instances, 1.0)
        rate = jnp.where(stable, load.rate_per_s, 0.5 * load.instance_per_s)
        slot_q, slot_s = self._slot_wait(state, rate, instances)
        f = operation.prefill_frac
        mean_s = safe_div(f, rate / instances)
        square_s2 = operation.prefill_square_s2 + (state.instance_scv - 1.0) * mean_s**2
        cycle_s, variance = cycle_moments(operation.step_s, rate / instances, f, square_s2)
        own_mean_s = policy.mean_own_s(state.engine, traffic.steps, traffic.demand, _decoding(state, operation))
        return Delay(
            wait_s=slot_s,
            prefill_s=own_mean_s,
            running_s=jnp.where(load.prefill_s > 0, own_mean_s, 0.0),
            ttft_p99_s=jnp.full_like(cycle_s, jnp.inf),
            itl_p99_s=jnp.full_like(cycle_s, jnp.inf),
            ttft=self._ttft(
                state, operation, rate / instances, (slot_q, slot_s), own_mean_s, cycle_s + variance / cycle_s
            ),
            itl=self._itl(state, operation, rate / instances, cycle_s, variance),
        )

    @staticmethod
    def _slot_wait(state: "StageState", rate_per_s: Array, instances: Array) -> tuple[Array, Array]:
        """(probability [-], mean [s]): for the first slot that any instance has, where a router looks for it; else for
        one of the instance to which the request was sent."""
        load, shared = state.load, state.assumptions.dispatch.looks_at_queues
        among, scv = (instances, state.pool_scv) if shared else (jnp.ones_like(instances), state.instance_scv)
        servers = jnp.maximum(among * load.n_max, 1.0)
        return bursty_wait(servers, rate_per_s * among / instances, load.service_s, scv, load.service_scv)

    def _itl(
        self, state: "StageState", operation: "Operation", rate_per_s: Array, cycle_s: Array, variance: Array
    ) -> ItlLaw:
        prompts, budget = _histogram(state), state.engine.prefill.budget_tokens
        tokens = sum(prompts.ends_tokens) / 2.0
        full = jnp.floor(tokens / budget)
        done = full * budget
        deepest = jnp.max(jnp.where(prompts.mass > 0, done, 0.0))
        past = jnp.append(jnp.maximum(done - budget, 0.0), jnp.maximum(deepest - budget, 0.0)) / 2.0
        each_s = state.assumptions.prefill.chunk_s(
            state.engine,
            jnp.concatenate([tokens - done, jnp.full_like(past, 1.0) * budget]),
            jnp.concatenate([done, past]),
            _decoding(state, operation),
        )
        return ItlLaw(
            step_s=operation.step_s,
            cycle_s=cycle_s,
            cycle_variance_s2=variance,
            rate_per_s=rate_per_s,
            chunk_s=each_s[:-1],
            chunks=jnp.concatenate([prompts.mass, prompts.mass * full]),
            most_s=each_s[-1],
        )

    def _ttft(
        self,
        state: "StageState",
        operation: "Operation",
        rate: Array,
        slot: tuple[Array, Array],
        running_s: Array,
        met_s: Array,
    ) -> TtftLaw:
        prompts, engine = _histogram(state), state.engine
        policy, dispatch = state.assumptions.prefill, state.assumptions.dispatch
        beside, kinds = _decoding(state, operation), prompts.kinds(KINDS)

        def own_s(prefill_tokens: Array) -> Array:
            return policy.own_s(engine, prefill_tokens, beside, whole=state.assumptions.whole)

        least_s, most_s = prompts.ends_of(own_s)
        late_s = jnp.append(jnp.zeros_like(prompts.shortest), prompts.compression_s)
        shortest_tokens, longest_tokens = prompts.ends_tokens
        mean = mean_prompt(engine, state.traffic.demand)
        others = [with_prompt(beside, mean, n) for n in mates(rate * met_s, kinds)]
        batches = jax.tree.map(lambda x: x[:, None], stacked(beside, *others))
        by_others_s = policy.beside_s(engine, kinds, batches)
        alone_s, beside_s = by_others_s[0], jnp.mean(by_others_s[1:], axis=0)
        behind = jnp.minimum(1.0, safe_div(engine.prefill.budget_tokens, 2.0 * kinds.tokens, otherwise=1.0))
        mean_b = jnp.sum(kinds.mass * beside_s)
        any_s = jnp.maximum(jnp.sum(kinds.mass * (alone_s - beside_s)), 0.0)
        idle, crowd, calm = jnp.zeros_like(rate), None, jnp.zeros_like(rate)
        if dispatch.looks_at_queues:
            known = operation.n_decoding + rate * (running_s + STALENESS_S / 2.0)  # those who left meanwhile as well
            idle, crowd = crowded(state.burst, known, rate, state.n_instances, operation.step_s + any_s + mean_b)
            calm = safe_div(jnp.clip(known - 1.0, 0.0, state.fewer), known)  # not idle, it has one at least
        return TtftLaw(
            mass=prompts.mass,
            least_s=late_s + least_s,
            most_s=late_s + most_s,
            shortest_tokens=shortest_tokens,
            longest_tokens=longest_tokens,
            iterations=Iterations(
                rate_per_s=rate,
                step_s=operation.step_s,
                any_s=any_s,
                mass=kinds.mass,
                beside_s=beside_s,
                behind_s=behind * beside_s,
                in_time=1.0 - (1.0 - state.in_time) * fresh_frac(met_s, STALENESS_S),
                idle=idle,
                calm=calm,
                burst=state.burst,
                crowd=crowd,
            ),
            slot_probability=slot[0],
            slot_s=slot[1],
            stable=state.stable,
        )


def _decoding(state: "StageState", operation: "Operation") -> StepBatch:
    """Who decodes beside a prompt, in the mean."""
    n = jnp.minimum(operation.n_decoding, jnp.maximum(state.load.n_max, 1e-3))
    return decoding_in(state.engine, n, state.load.context_tokens)


def _histogram(state: "StageState") -> "PromptHistogram":
    prompts = state.traffic.prompts
    if prompts is None:
        raise ValueError("need the prompts of the traffic as a histogram: route it under this tail")
    return prompts
