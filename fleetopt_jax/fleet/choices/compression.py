"""The choice `compression`: which requests give way to a shorter window, and what becomes of them."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import namespace
from fleetopt_jax.fleet.choices.prefill import PrefillPolicy
from fleetopt_jax.laws.compression import MAX_SHRINK, Compressor
from fleetopt_jax.laws.demand import Demand, demand, squeezed_demand
from fleetopt_jax.laws.prefill import Prefill
from fleetopt_jax.laws.service import StepMoments, step_moments
from fleetopt_jax.workload.atoms import split_total

PROMPT_LEAD_TOKENS = 2.0  # by which a prompt that can give way exceeds its output: half the length and a token


class Compression:
    """How a request longer than its pool's window is made to fit."""

    name: ClassVar[str]

    def compressible(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Array:
        """1 for requests that can give way, 0 for others."""
        raise NotImplementedError

    def effective_gamma(self, gamma: ArrayLike) -> ArrayLike:
        """The gamma that counts: no prompt shrinks below nothing."""
        raise NotImplementedError

    def success_frac(self, compressor: Compressor) -> ArrayLike:
        """Share of the tries that succeed [-]."""
        raise NotImplementedError

    def kept_output(self, output_tokens: Array, window_tokens: ArrayLike) -> Array:
        """Output of a compressed request [tokens]."""
        raise NotImplementedError

    def squeezed(
        self,
        policy: PrefillPolicy,
        prefill: Prefill,
        window_tokens: Array,
        output_powers: Array,
        whole_share: ArrayLike,
        *,
        whole: bool,
    ) -> tuple[StepMoments, Demand]:
        """Sums of the features of compressed requests, of which `output_powers` are the sums of o^0 ... o^4."""
        raise NotImplementedError

    def squeeze(
        self, window_tokens: np.ndarray, output_tokens: np.ndarray, whole_share: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """(prompt, output) of compressed requests one by one, in whole tokens: the simulator's."""
        raise NotImplementedError


@dataclass(frozen=True)
class FreeCompression(Compression):
    """A request shrinks as a whole, for nothing and always, and is credited in full."""

    name: ClassVar[str] = "free"

    def compressible(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Array:
        return namespace(prompt_tokens).ones_like(prompt_tokens)

    def effective_gamma(self, gamma: ArrayLike) -> ArrayLike:
        return gamma

    def success_frac(self, compressor: Compressor) -> ArrayLike:
        return 1.0

    def kept_output(self, output_tokens: Array, window_tokens: ArrayLike) -> Array:
        return output_tokens

    def squeezed(
        self,
        policy: PrefillPolicy,
        prefill: Prefill,
        window_tokens: Array,
        output_powers: Array,
        whole_share: ArrayLike,
        *,
        whole: bool,
    ) -> tuple[StepMoments, Demand]:
        """As if each were a request of the window's length."""
        prompt, output = split_total(window_tokens, whole_share, whole=whole)
        chunks = policy.chunks(prefill, prompt, whole=whole)
        steps, asked = step_moments(chunks, output, prompt + output), demand(prompt, prompt, output, output)
        several = output_powers[0]
        return (
            jax.tree.map(lambda x: several * x, steps),
            jax.tree.map(lambda x: several * x, asked),
        )

    def squeeze(
        self, window_tokens: np.ndarray, output_tokens: np.ndarray, whole_share: float
    ) -> tuple[np.ndarray, np.ndarray]:
        prompt, rest = (np.asarray(x) for x in split_total(window_tokens, whole_share))
        return prompt, np.maximum(np.floor(rest), 1)


@dataclass(frozen=True)
class PromptCompression(Compression):
    """Its prompt shrinks until it fits, its output stays; a try may fail, and takes time and energy."""

    name: ClassVar[str] = "prompt_only"

    def compressible(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Array:
        xp = namespace(prompt_tokens, output_tokens)
        return xp.where(xp.asarray(prompt_tokens) >= output_tokens + PROMPT_LEAD_TOKENS, 1.0, 0.0)

    def effective_gamma(self, gamma: ArrayLike) -> ArrayLike:
        return namespace(gamma).minimum(gamma, MAX_SHRINK)

    def success_frac(self, compressor: Compressor) -> ArrayLike:
        return compressor.success_frac

    def kept_output(self, output_tokens: Array, window_tokens: ArrayLike) -> Array:
        return jnp.minimum(output_tokens, window_tokens / 2.0)

    def squeezed(
        self,
        policy: PrefillPolicy,
        prefill: Prefill,
        window_tokens: Array,
        output_powers: Array,
        whole_share: ArrayLike,
        *,
        whole: bool,
    ) -> tuple[StepMoments, Demand]:
        """Each keeps its output and fills the window. Whole chunks are counted half a chunk up, their mean."""
        per_token = policy.chunks_per_token(prefill)
        s0, s1, s2 = output_powers[:3]
        a = per_token * window_tokens + (0.5 * jnp.sign(per_token) if whole else 0.0)
        b = 1.0 - per_token  # steps = a + b o
        steps, steps2 = a * s0 + b * s1, a**2 * s0 + 2 * a * b * s1 + b**2 * s2
        moments = StepMoments(
            chunks=a * s0 - per_token * s1,
            steps=steps,
            steps_len=steps * window_tokens,
            steps2=steps2,
            steps2_len=steps2 * window_tokens,
            steps2_len2=steps2 * window_tokens**2,
        )
        return moments, squeezed_demand(window_tokens, output_powers)

    def squeeze(
        self, window_tokens: np.ndarray, output_tokens: np.ndarray, whole_share: float
    ) -> tuple[np.ndarray, np.ndarray]:
        output = np.maximum(np.floor(np.minimum(output_tokens, window_tokens / 2)), 1)
        return np.maximum(window_tokens - output, 1), output
