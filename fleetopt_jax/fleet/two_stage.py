"""A lane of two stages: instances that only prefill hand each request's KV cache over to instances that only decode.

Each stage is load, state, operation, delay as any other (`stage.py`). The prefill stage has the requests without their
steps: its iterations are prompts alone, in gated batches (`laws/gated.py`). The decode stage has them without their
prompts: no iteration has a prompt in it, so that tokens are a step apart. A request's first token comes of its first
step there:

    TTFT = prefill queue + own prefill + (wait for a port + hand-over) + (wait for a slot + rest of a step + own step)

The prefill queue and own prefill are a distribution, the hand-over grows with the prompt, the slot wait is Erlang's;
the port's wait, the rest of a step and the step count with their means.

What a stage holds in memory: the decode stage whole sequences, from when their hand-over begins; the prefill stage
prompts, from when they are prefilled until they are handed over. More than their caches, or their ports, can take is
load beyond one.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices.occupancy import Operation
from fleetopt_jax.fleet.choices.prefill import KINDS, mean_prompt, prompt_kinds
from fleetopt_jax.fleet.choices.tail import KINDS as TTFT_KINDS
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.stage import KNOTS, Setting, StageLoad, StageState, decoded_load, stage_state
from fleetopt_jax.fleet.step_law import step_law_of
from fleetopt_jax.fleet.traffic import PoolTraffic
from fleetopt_jax.laws.bursts import no_crowd
from fleetopt_jax.laws.cycle import TOGETHER, mates, nobody, of_prompts, prompts_only_s, prompts_only_w, with_prompt
from fleetopt_jax.laws.demand import Demand
from fleetopt_jax.laws.gated import MOST_TOGETHER, Batches, gated_batches
from fleetopt_jax.laws.hand_over import HandOver, port_wait_s
from fleetopt_jax.laws.queueing import bursty_wait
from fleetopt_jax.laws.step_law import stacked
from fleetopt_jax.laws.ttft import Iterations, TtftLaw


def require_stage_laws(assumptions: Assumptions) -> None:
    """Refuse assumptions that say nothing of stages."""
    described = {  # as a record of one's own may be as well
        "occupancy": not assumptions.occupancy.floors_in_flight,
        "prefill": not assumptions.prefill.chunks_are_free,
        "kv_cache": assumptions.kv_cache.caps_sequences,
        "tail": assumptions.tail.has_distribution,
    }
    for choice, known in described.items():
        if not known:
            name = getattr(assumptions, choice).name
            raise BadField("serve", f"lanes of two stages have no law under {choice} = {name}", "need assume physical")
    if assumptions.prefix_cache.finds:
        problem = "what a prefix cache of two stages finds is not modelled"
        raise BadField("serve", problem, "need serve mixed, or no prefix cache")


@pytree
class StageRun:
    """What a stage does, whichever it is: what sizing and metrics read. Leaves traced, shape ()."""

    utilization: Array  # load over what the instances can take: of time, memory and ports; inf without instances [-]
    stable: Array
    served: Array  # share of the requests that it gets through [-]
    n_max: Array  # prompts or sequences that an instance can hold [-]
    n_active: Array  # that it holds [-]
    gpu_w: Array  # one GPU [W]


# --- the prefill stage ------------------------------------------------------------------------------------------------


@pytree
class PrefillRun:
    """A prefill stage at work. Leaves traced, shape ()."""

    run: StageRun
    batches: Batches
    state: StageState
    own_s: Array  # mean own prefill [s]
    hand_over_s: Array  # mean, the wait for a port with it [s]
    port_s: Array  # that wait [s]


def prefilled_load(engine: Engine, traffic: PoolTraffic, window_tokens: ArrayLike, setting: Setting) -> StageLoad:
    """The load of a stage that only prefills.

    `n_max` are the prompts whose KV an instance holds: in the time that they are held, which grows with them, of mean
    E[p^2] / E[p] and the variance that belongs to it. `service_s` is `n_max` times a prompt's share of full iterations.
    """
    assumptions, law = setting.assumptions, step_law_of(engine)
    demand = jax.tree.map(lambda x: jnp.where(traffic.traffic_frac > 0, x, 1.0), traffic.demand)
    n_max = assumptions.kv_cache.n_max(engine.kv, window_tokens, _held_as_prompts(demand), whole=assumptions.whole)
    of_mean, of_kinds = mean_prompt(engine, demand), prompt_kinds(engine, traffic.kinds(KINDS))
    at_s = prompts_only_s(law, of_mean, of_kinds, jnp.array(TOGETHER), engine.prefill.budget_tokens)
    least_s = of_prompts(at_s, MOST_TOGETHER)
    zero = jnp.zeros_like(least_s)
    return StageLoad(
        rate_per_s=setting.arrival_rate_per_s * traffic.traffic_frac,
        n_max=n_max,
        steps=zero,
        steps_per_token=jnp.ones_like(zero),
        context_tokens=zero,
        service_s=n_max * least_s,
        service_scv=zero,
        prefill_s=least_s,
        prefill_square_s2=zero,
        prefill_at_s=jnp.broadcast_to(at_s, (KNOTS, len(TOGETHER))),
    )


def _held_as_prompts(demand: Demand) -> Demand:
    """Features by which `kv_cache` sees prompts as what an instance holds, each for as long as it is."""
    return replace(demand, steps=demand.prefill, held=demand.prefill2, held2=demand.prefill3)


def prefill_run(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    n_instances: ArrayLike,
    hand_over: HandOver,
    setting: Setting,
) -> PrefillRun:
    """How a stage of `n_instances` that prefill `traffic` runs."""
    assumptions, demand = setting.assumptions, traffic.demand
    load = prefilled_load(engine, traffic, window_tokens, setting)
    state = stage_state(engine, traffic, load, n_instances, setting)
    rate = jnp.where(state.stable, state.instance_per_s, 0.5 * load.instance_per_s)
    batches = gated_batches(
        partial(of_prompts, load.prefill_at_s[0]),
        rate,
        jnp.maximum(state.n_instances, 1.0),
        state.pool_scv,
        sees_idle=assumptions.dispatch.looks_at_queues,
    )
    own_s = assumptions.prefill.mean_own_s(engine, traffic.steps, demand, nobody())
    moments_s = hand_over.moments_s(demand)
    port_busy, port_s = port_wait_s(rate, moments_s, hand_over.sends)
    hand_over_s = port_s + moments_s[0] + hand_over.latency_s
    held_s = own_s + hand_over_s
    held = safe_div(rate * held_s, load.n_max, otherwise=jnp.inf)
    busy = traffic.traffic_frac > 0
    beside = jnp.where(state.stable, jnp.maximum(held, port_busy), 0.0)
    utilization = jnp.where(busy, jnp.where(state.used, jnp.maximum(state.utilization, beside), jnp.inf), 0.0)
    prefill_w = prompts_only_w(
        step_law_of(engine), mean_prompt(engine, demand), batches.together, engine.prefill.budget_tokens
    )
    busy_frac = jnp.where(state.stable, batches.busy_frac, 1.0) * state.used
    return PrefillRun(
        run=StageRun(
            utilization=utilization,
            stable=state.stable & (utilization < 1.0),
            served=jnp.where(state.used, 1.0 / jnp.maximum(1.0, state.utilization), 0.0),
            n_max=load.n_max,
            n_active=jnp.where(busy, jnp.where(state.stable, jnp.minimum(rate * held_s, load.n_max), load.n_max), 0.0),
            gpu_w=engine.idle_w + busy_frac * jnp.where(busy, prefill_w - engine.idle_w, 0.0),
        ),
        batches=batches,
        state=state,
        own_s=own_s,
        hand_over_s=hand_over_s,
        port_s=port_s,
    )


def handed_over_ttft(prefill: PrefillRun, hand_over: HandOver) -> TtftLaw:
    """When requests are at the decode stage: the queue of gated batches, own prefill, the way over.

    Of an instance's requests, the share W meets an iteration, with r others a second: the law of `laws/ttft.py` with
    iterations of g and of those who came during the one before, and of the one who ended a pause in the mean.
    """
    state, batches = prefill.state, prefill.batches
    engine, prompts, assumptions = state.engine, state.traffic.prompts, state.assumptions
    policy = assumptions.prefill
    if prompts is None:
        raise ValueError("need the prompts of the traffic as a histogram: route it under a tail with a distribution")
    kinds, mean, law = prompts.kinds(TTFT_KINDS), mean_prompt(engine, state.traffic.demand), step_law_of(engine)
    iteration_s = batches.together * batches.each_s
    others = [with_prompt(nobody(), mean, n) for n in mates(batches.meet_per_s * iteration_s, kinds)]
    each = jax.tree.map(lambda x: x[:, None], stacked(nobody(), *others))
    by_others_s = policy.beside_s(engine, kinds, each)
    beside_s = jnp.mean(by_others_s[1:], axis=0)
    alone_s = by_others_s[0] + law.step_s(nobody())  # all of an iteration that would not be without it
    mean_b = jnp.sum(kinds.mass * beside_s)
    any_s = jnp.maximum(jnp.sum(kinds.mass * alone_s) - mean_b, 0.0)
    after_pause = jnp.exp(-batches.meet_per_s * iteration_s)
    least_s, most_s = prompts.ends_of(lambda tokens: policy.own_s(engine, tokens, nobody(), whole=assumptions.whole))
    late_s = jnp.append(jnp.zeros_like(prompts.shortest), prompts.compression_s) + prefill.port_s
    shortest_tokens, longest_tokens = prompts.ends_tokens
    zero = jnp.zeros_like(mean_b)
    behind = jnp.minimum(1.0, safe_div(engine.prefill.budget_tokens, 2.0 * kinds.tokens, otherwise=1.0))
    return TtftLaw(
        mass=prompts.mass,
        least_s=late_s + least_s + hand_over.seconds(shortest_tokens),
        most_s=late_s + most_s + hand_over.seconds(longest_tokens),
        shortest_tokens=shortest_tokens,
        longest_tokens=longest_tokens,
        iterations=Iterations(
            rate_per_s=batches.meet_per_s,
            step_s=any_s + after_pause * mean_b,
            any_s=zero,
            mass=kinds.mass,
            beside_s=beside_s,
            behind_s=behind * beside_s,
            in_time=zero + 1.0,
            idle=zero,
            calm=zero,
            burst=state.burst,
            # As lanes of one stage beside it have it.
            crowd=no_crowd(zero) if state.assumptions.dispatch.looks_at_queues else None,
        ),
        slot_probability=zero,
        slot_s=zero,
        stable=state.stable,
        pauses=1.0 - batches.waits,
    )


# --- the decode stage -------------------------------------------------------------------------------------------------


@pytree
class DecodeRun:
    """A decode stage at work. Leaves traced, shape ()."""

    run: StageRun
    operation: Operation
    rate_per_s: Array  # requests of the lane [1/s]
    waits: Array  # share of the requests that wait for a slot [-]
    slot_s: Array  # that wait, over all requests [s]
    first_s: Array  # mean from a slot to the first token: the rest of a step, and its own [s]


def decode_run(
    engine: Engine,
    traffic: PoolTraffic,
    window_tokens: ArrayLike,
    n_instances: ArrayLike,
    hand_over: HandOver,
    setting: Setting,
) -> DecodeRun:
    """How a stage of `n_instances` that decode what was prefilled elsewhere runs."""
    load = decoded_load(engine, traffic, window_tokens, setting)
    state = stage_state(engine, traffic, load, n_instances, setting)
    operation = setting.assumptions.occupancy.operate(state)
    rate = jnp.where(state.stable, state.instance_per_s, 0.5 * load.instance_per_s)
    instances = jnp.where(state.stable, state.n_instances, 1.0)
    waits, slot_s = bursty_wait(
        jnp.maximum(instances * load.n_max, 1.0), instances * rate, load.service_s, state.pool_scv, load.service_scv
    )
    some = -jnp.expm1(-jnp.maximum(operation.n_decoding, 0.0))  # whether a step is going on
    first_s = 0.5 * some * operation.step_s + operation.itl_s
    moments_s = hand_over.moments_s(traffic.demand)
    held_s = moments_s[0] + hand_over.latency_s + 0.5 * some * operation.step_s
    held = operation.n_decoding + rate * held_s
    port_busy = rate * moments_s[0] / hand_over.receives
    busy = traffic.traffic_frac > 0
    beside = jnp.where(state.stable, jnp.maximum(safe_div(held, load.n_max), port_busy), 0.0)
    utilization = jnp.where(busy, jnp.where(state.used, jnp.maximum(state.utilization, beside), jnp.inf), 0.0)
    return DecodeRun(
        run=StageRun(
            utilization=utilization,
            stable=state.stable & (utilization < 1.0),
            served=jnp.where(state.used, 1.0 / jnp.maximum(1.0, state.utilization), 0.0),
            n_max=load.n_max,
            n_active=jnp.where(busy, jnp.where(state.stable, jnp.minimum(held, load.n_max), load.n_max), 0.0),
            gpu_w=operation.gpu_w,
        ),
        operation=operation,
        rate_per_s=load.rate_per_s,
        waits=waits,
        slot_s=slot_s,
        first_s=first_s,
    )


def first_token_ttft(arrived: TtftLaw, decode: DecodeRun) -> TtftLaw:
    """The TTFT of requests whose caches have `arrived`: later by the wait for a slot, and by their first step."""
    return replace(
        arrived,
        least_s=arrived.least_s + decode.first_s,
        most_s=arrived.most_s + decode.first_s,
        slot_probability=decode.waits,
        slot_s=decode.slot_s,
        stable=arrived.stable & decode.run.stable,
    )
