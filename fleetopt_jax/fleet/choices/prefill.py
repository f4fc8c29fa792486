"""The choice `prefill`: what a prompt costs in iterations, in engine time, and in time to first token."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import at_some, safe_div
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.step_law import step_law_of
from fleetopt_jax.laws.cycle import Company, Prompt, PromptKinds, added, added_s, alone_s, beside_s, prompt_of
from fleetopt_jax.laws.demand import Demand, prefill_moments_s
from fleetopt_jax.laws.mixed_step import StepBatch, with_prompts
from fleetopt_jax.laws.prefill import Prefill, lone_iteration_s, prefill_chunks
from fleetopt_jax.laws.service import StepMoments

# Of so many neighbouring prompts, two a cell, the first and the last are asked for, straight lines in between: within
# 0.3 % of the cells of bundled traces. Of twice as many it would be 8 % where a prompt is about as long as a serving
# engine's largest graph.
EVERY = 8
KINDS = 5  # of prompts that the time and the watts of the mean one are of


def mean_prompt(engine: Engine, mean: Demand) -> Prompt:
    """The prompt of requests with these mean features, as this engine's steps see it."""
    past_tokens = 0.0 if mean.cached is None else mean.cached.tokens
    return prompt_of(mean.prefill, mean.prefill2, step_law_of(engine).window_tokens, past_tokens)


def _prompts(engine: Engine, kinds: PromptKinds) -> Prompt:
    """The mean prompt of each kind."""
    return prompt_of(kinds.tokens, kinds.square_tokens2, step_law_of(engine).window_tokens)


def prompt_kinds(engine: Engine, kinds: PromptKinds) -> tuple[Prompt, Array]:
    """The mean prompt of each kind, and the share of each."""
    return _prompts(engine, kinds), kinds.mass


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

    def moments_s(
        self, engine: Engine, mean: Demand, kinds: PromptKinds, beside: StepBatch, n_prompts: ArrayLike
    ) -> tuple[Array, Array]:
        """(mean [s], mean square [s^2]) of the engine time that a prompt takes from others, `n_prompts` of them in
        an iteration, beside sequences that decode."""
        raise NotImplementedError

    def gpu_w(self, engine: Engine, mean: Demand, kinds: PromptKinds, beside: StepBatch, company: Company) -> Array:
        """Board power of one GPU in that time [W]."""
        raise NotImplementedError

    def own_s(self, engine: Engine, prefill_tokens: ArrayLike, beside: StepBatch, *, whole: bool) -> Array:
        """A prompt's own prefill as its TTFT has it [s], in steps with sequences that decode."""
        raise NotImplementedError

    def beside_s(self, engine: Engine, kinds: PromptKinds, batch: StepBatch) -> Array:
        """What a prompt of each kind adds to iterations that begin with `batch`, others' prompts in it or none [..., G]
        [s]."""
        raise NotImplementedError

    def mean_own_s(self, engine: Engine, steps: StepMoments, mean: Demand, beside: StepBatch) -> Array:
        """Its mean over requests with these mean features [s]."""
        raise NotImplementedError

    def chunk_s(self, engine: Engine, new_tokens: Array, past_tokens: Array, beside: StepBatch) -> Array:
        """What a chunk of a prompt, after tokens that are done, adds to an iteration [s]."""
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

    def moments_s(
        self, engine: Engine, mean: Demand, kinds: PromptKinds, beside: StepBatch, n_prompts: ArrayLike
    ) -> tuple[Array, Array]:
        return jnp.zeros_like(mean.prefill), jnp.zeros_like(mean.prefill)

    def gpu_w(self, engine: Engine, mean: Demand, kinds: PromptKinds, beside: StepBatch, company: Company) -> Array:
        return engine.prefill.gpu_w

    def own_s(self, engine: Engine, prefill_tokens: ArrayLike, beside: StepBatch, *, whole: bool) -> Array:
        chunks = prefill_chunks(prefill_tokens, engine.prefill.chunk_tokens, whole=whole)
        return chunks * lone_iteration_s(engine.decode, engine.prefill)

    def beside_s(self, engine: Engine, kinds: PromptKinds, batch: StepBatch) -> Array:
        return jnp.zeros_like(batch.n_active * kinds.tokens)

    def mean_own_s(self, engine: Engine, steps: StepMoments, mean: Demand, beside: StepBatch) -> Array:
        return steps.chunks * lone_iteration_s(engine.decode, engine.prefill)

    def chunk_s(self, engine: Engine, new_tokens: Array, past_tokens: Array, beside: StepBatch) -> Array:
        return jnp.zeros_like(new_tokens)


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

    def moments_s(
        self, engine: Engine, mean: Demand, kinds: PromptKinds, beside: StepBatch, n_prompts: ArrayLike
    ) -> tuple[Array, Array]:
        mean_s, square_s2 = prefill_moments_s(engine.prefill, mean)
        if engine.step is None:
            return mean_s, square_s2  # steps add up: whatever is beside
        of_mean, budget = mean_prompt(engine, mean), engine.prefill.budget_tokens
        of_kinds = prompt_kinds(engine, kinds)
        s = added_s(engine.step, beside, of_mean, of_kinds, n_prompts, budget)
        return s, square_s2 * safe_div(s, mean_s) ** 2

    def gpu_w(self, engine: Engine, mean: Demand, kinds: PromptKinds, beside: StepBatch, company: Company) -> Array:
        if engine.step is None:
            return engine.prefill.gpu_w
        of = mean_prompt(engine, mean), prompt_kinds(engine, kinds), jnp.array([1.0, 2.0]), engine.prefill.budget_tokens
        beyond_one = 2.0 * (1.0 - company.one_in)  # a line in 1 / k, from one prompt to two
        seconds, joules = (x[0] + beyond_one * (x[1] - x[0]) for x in added(engine.step, beside, *of))
        return safe_div(joules, seconds)

    def own_s(self, engine: Engine, prefill_tokens: ArrayLike, beside: StepBatch, *, whole: bool) -> Array:
        law = step_law_of(engine)

        def of(p: Array) -> Array:
            prompt = prompt_of(p, p**2, law.window_tokens)
            own_s = alone_s(law, beside, prompt, engine.prefill.budget_tokens)
            return own_s + engine.prefill.first_token_s

        return of(jnp.asarray(prefill_tokens)) if engine.step is None else at_some(of, prefill_tokens, EVERY)

    def beside_s(self, engine: Engine, kinds: PromptKinds, batch: StepBatch) -> Array:
        return beside_s(step_law_of(engine), batch, _prompts(engine, kinds), engine.prefill.budget_tokens)

    def mean_own_s(self, engine: Engine, steps: StepMoments, mean: Demand, beside: StepBatch) -> Array:
        return (
            alone_s(step_law_of(engine), beside, mean_prompt(engine, mean), engine.prefill.budget_tokens)
            + engine.prefill.first_token_s
        )

    def chunk_s(self, engine: Engine, new_tokens: Array, past_tokens: Array, beside: StepBatch) -> Array:
        law = step_law_of(engine)
        return law.added_s(with_prompts(beside, new_tokens, past_tokens, law.window_tokens))
