"""The choice `prefill`: what a prompt costs in iterations, in engine time, and in time to first token."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.demand import Demand, prefill_moments_s
from fleetopt_jax.laws.prefill import Prefill, lone_iteration_s, prefill_chunks, prefill_s
from fleetopt_jax.laws.service import StepMoments


class PrefillPolicy:
    """How prompts are served."""

    name: ClassVar[str]
    reads_chunk: ClassVar[bool]  # whether the published `chunk_tokens` counts, so that features differ by engine
    chunks_are_free: ClassVar[bool]  # whether prompts take iterations and no time, in the simulator

    def chunks(self, prefill: Prefill, prefill_tokens: Array, *, whole: bool) -> Array:
        """Iterations that hold a slot for the prompt [-], elementwise."""
        raise NotImplementedError

    def chunks_per_token(self, prefill: Prefill) -> ArrayLike:
        """The same of one more token."""
        raise NotImplementedError

    def moments_s(self, prefill: Prefill, mean: Demand) -> tuple[Array, Array]:
        """(mean [s], mean square [s^2]) of the engine time prompts take from others."""
        raise NotImplementedError

    def own_s(self, engine: Engine, prefill_tokens: ArrayLike, step_s: ArrayLike, *, whole: bool) -> Array:
        """A prompt's own prefill as its TTFT has it [s], beside steps of `step_s`."""
        raise NotImplementedError

    def mean_own_s(self, engine: Engine, steps: StepMoments, mean: Demand, step_s: ArrayLike) -> Array:
        """Its mean over requests with these mean features [s]."""
        raise NotImplementedError


@dataclass(frozen=True)
class FreeChunks(PrefillPolicy):
    """Chunks of the prompt ride along for free."""

    name: ClassVar[str] = "free_chunks"
    reads_chunk: ClassVar[bool] = True
    chunks_are_free: ClassVar[bool] = True

    def chunks(self, prefill: Prefill, prefill_tokens: Array, *, whole: bool) -> Array:
        return prefill_chunks(prefill_tokens, prefill.chunk_tokens, whole=whole)

    def chunks_per_token(self, prefill: Prefill) -> ArrayLike:
        return 1.0 / prefill.chunk_tokens

    def moments_s(self, prefill: Prefill, mean: Demand) -> tuple[Array, Array]:
        return jnp.zeros_like(mean.prefill), jnp.zeros_like(mean.prefill)

    def own_s(self, engine: Engine, prefill_tokens: ArrayLike, step_s: ArrayLike, *, whole: bool) -> Array:
        chunks = prefill_chunks(prefill_tokens, engine.prefill.chunk_tokens, whole=whole)
        return chunks * lone_iteration_s(engine.decode, engine.prefill)

    def mean_own_s(self, engine: Engine, steps: StepMoments, mean: Demand, step_s: ArrayLike) -> Array:
        return steps.chunks * lone_iteration_s(engine.decode, engine.prefill)


@dataclass(frozen=True)
class ComputePrefill(PrefillPolicy):
    """Prompts take FLOPs, engine time and power."""

    name: ClassVar[str] = "compute"
    reads_chunk: ClassVar[bool] = False
    chunks_are_free: ClassVar[bool] = False

    def chunks(self, prefill: Prefill, prefill_tokens: Array, *, whole: bool) -> Array:
        return jnp.zeros_like(prefill_tokens)

    def chunks_per_token(self, prefill: Prefill) -> ArrayLike:
        return 0.0

    def moments_s(self, prefill: Prefill, mean: Demand) -> tuple[Array, Array]:
        return prefill_moments_s(prefill, mean)

    def own_s(self, engine: Engine, prefill_tokens: ArrayLike, step_s: ArrayLike, *, whole: bool) -> Array:
        iterations = jnp.maximum(1.0, prefill_tokens / engine.prefill.budget_tokens)
        return prefill_s(engine.prefill, prefill_tokens) + step_s * iterations

    def mean_own_s(self, engine: Engine, steps: StepMoments, mean: Demand, step_s: ArrayLike) -> Array:
        own_s, _ = prefill_moments_s(engine.prefill, mean)
        return own_s + step_s * jnp.maximum(1.0, mean.prefill / engine.prefill.budget_tokens)
