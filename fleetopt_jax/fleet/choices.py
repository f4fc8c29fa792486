"""The nine assumptions as small functions: each table maps a choice's name to what it means.

`integration` has no function here: 'sampled' is the paper's own procedure (`published.procedure`). `engine` chooses
among the catalog's coefficients.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.compression import MAX_SHRINK
from fleetopt_jax.laws.decode import decode_step_s
from fleetopt_jax.laws.demand import Demand, held_tokens, prefill_moments_s
from fleetopt_jax.laws.kv_cache import max_sequences, paged_sequences
from fleetopt_jax.laws.prefill import lone_iteration_s, prefill_chunks, prefill_s
from fleetopt_jax.laws.service import MIN_SCV, StepMoments, service_moments_s
from fleetopt_jax.workload.atoms import Workload, mean_tokens, split_total, total_tokens

# lengths: prompt and output of every atom, and the output share of a request compressed as a whole


def _split_by_share(workload: Workload, assumptions: Assumptions) -> tuple[Array, Array]:
    return split_total(total_tokens(workload), assumptions.output_share, whole=assumptions.whole)


def _as_traced(workload: Workload, assumptions: Assumptions) -> tuple[Array, Array]:
    return workload.prompt_tokens, workload.output_tokens


LENGTHS: dict[str, Callable[[Workload, Assumptions], tuple[Array, Array]]] = {
    "output_share": _split_by_share,
    "trace": _as_traced,
}


def _traced_share(workload: Workload, assumptions: Assumptions) -> Array:
    prompt, output = mean_tokens(workload)
    return output / (prompt + output)


WHOLE_SHARE: dict[str, Callable[[Workload, Assumptions], ArrayLike]] = {
    "output_share": lambda workload, assumptions: assumptions.output_share,
    "trace": _traced_share,
}

# compression: which requests can give way to a shorter window, and the share of the tries that succeeds

PROMPT_LEAD_TOKENS = 2.0  # by which a prompt that can give way exceeds its output: half the length and a token

COMPRESSIBLE: dict[str, Callable[[Array, Array], Array]] = {
    "free": lambda prompt, output: jnp.ones_like(prompt),
    "prompt_only": lambda prompt, output: jnp.where(prompt >= output + PROMPT_LEAD_TOKENS, 1.0, 0.0),
}
REACH: dict[str, Callable[[Array], Array]] = {  # the gamma that counts: no prompt shrinks below nothing
    "free": lambda gamma: gamma,
    "prompt_only": lambda gamma: jnp.minimum(gamma, MAX_SHRINK),
}
SUCCESS: dict[str, Callable[[Engine], ArrayLike]] = {
    "free": lambda engine: 1.0,
    "prompt_only": lambda engine: engine.compressor.success_frac,
}

# prefill: iterations that hold a slot, engine time it takes (mean and mean square), a prompt's own time


def _no_moments(engine: Engine, mean: Demand) -> tuple[Array, Array]:
    return jnp.zeros_like(mean.prompt), jnp.zeros_like(mean.prompt)


def _chunks_alone_s(engine: Engine, prompt: Array, step_s: ArrayLike, whole: bool) -> Array:
    chunks = prefill_chunks(prompt, engine.prefill.chunk_tokens, whole=whole)
    return chunks * lone_iteration_s(engine.decode, engine.prefill)


def _flops_and_steps_s(engine: Engine, prompt: Array, step_s: ArrayLike, whole: bool) -> Array:
    return prefill_s(engine.prefill, prompt) + step_s * jnp.maximum(1.0, prompt / engine.prefill.budget_tokens)


def _mean_chunks_alone_s(engine: Engine, steps: StepMoments, mean: Demand, step_s: ArrayLike) -> Array:
    return steps.chunks * lone_iteration_s(engine.decode, engine.prefill)


def _mean_flops_and_steps_s(engine: Engine, steps: StepMoments, mean: Demand, step_s: ArrayLike) -> Array:
    own_s, _ = prefill_moments_s(engine.prefill, mean)
    return own_s + step_s * jnp.maximum(1.0, mean.prompt / engine.prefill.budget_tokens)


CHUNKS: dict[str, Callable[[Engine, Array, bool], Array]] = {
    "free_chunks": lambda engine, prompt, whole: prefill_chunks(prompt, engine.prefill.chunk_tokens, whole=whole),
    "compute": lambda engine, prompt, whole: jnp.zeros_like(prompt),
}
CHUNKS_PER_TOKEN: dict[str, Callable[[Engine], ArrayLike]] = {
    "free_chunks": lambda engine: 1.0 / engine.prefill.chunk_tokens,
    "compute": lambda engine: 0.0,
}
PREFILL_MOMENTS: dict[str, Callable[[Engine, Demand], tuple[Array, Array]]] = {
    "free_chunks": _no_moments,
    "compute": lambda engine, mean: prefill_moments_s(engine.prefill, mean),
}
OWN_PREFILL: dict[str, Callable[[Engine, Array, ArrayLike, bool], Array]] = {
    "free_chunks": _chunks_alone_s,
    "compute": _flops_and_steps_s,
}
MEAN_OWN_PREFILL: dict[str, Callable[[Engine, StepMoments, Demand, ArrayLike], Array]] = {
    "free_chunks": _mean_chunks_alone_s,
    "compute": _mean_flops_and_steps_s,
}

# kv_cache: sequences one instance runs at once


def _reserved(engine: Engine, window: ArrayLike, mean: Demand, whole: bool) -> Array:
    return max_sequences(engine.kv, window, whole=whole)


def _paged(engine: Engine, window: ArrayLike, mean: Demand, whole: bool) -> Array:
    held, variance = held_tokens(mean)
    return paged_sequences(engine.kv, window, held, variance, whole=whole)


KV_CACHE: dict[str, Callable[[Engine, ArrayLike, Demand, bool], Array]] = {"reserved": _reserved, "paged": _paged}

# occupancy: mean context of an active sequence, and (E[s], cs2) of the decode time a slot is held with all slots full


def _full_batch_service(
    engine: Engine, steps: StepMoments, mean: Demand, n_max: ArrayLike
) -> tuple[Array, Array, Array]:
    service_s, scv = service_moments_s(engine.decode, steps, n_max)
    return safe_div(steps.steps_len, steps.steps, otherwise=1.0), service_s, scv


def _real_service(engine: Engine, steps: StepMoments, mean: Demand, n_max: ArrayLike) -> tuple[Array, Array, Array]:
    context, _ = held_tokens(mean)
    scv = jnp.maximum(MIN_SCV, safe_div(steps.steps2, steps.steps**2, otherwise=1.0) - 1.0)
    return context, steps.steps * decode_step_s(engine.decode, n_max, context), scv


SERVICE: dict[str, Callable[[Engine, StepMoments, Demand, ArrayLike], tuple[Array, Array, Array]]] = {
    "full_batch": _full_batch_service,
    "fixed_point": _real_service,
}
SPARE_INSTANCES = {"full_batch": 1.0, "fixed_point": 0.0}  # the published rule adds one to the offered load

# dispatch: of a Poisson stream over very many instances, (squared CV of an instance's arrivals, companions of a request
# in its iterations against a Poisson stream's). In turn and at random exactly; the shortest queue, which sends requests
# where few are, from simulation (`experiments/agreement.py`).

DISPATCH: dict[str, tuple[float, float]] = {"random": (1.0, 1.0), "jsq": (0.25, -0.6), "round_robin": (0.0, 0.0)}

# power_scope: watts of a pool from those of one GPU


def _one_gpu(engine: Engine, n_instances: ArrayLike, gpu_w: Array, compressor_w: Array) -> Array:
    return n_instances * gpu_w


def _all_gpus(engine: Engine, n_instances: ArrayLike, gpu_w: Array, compressor_w: Array) -> Array:
    boards_w = n_instances * engine.gpus_per_instance * (gpu_w + engine.site.host_w_per_gpu)
    return engine.site.pue * (boards_w + compressor_w)


POWER_SCOPE: dict[str, Callable[[Engine, ArrayLike, Array, Array], Array]] = {
    "one_gpu_per_instance": _one_gpu,
    "instance": _all_gpus,
}
