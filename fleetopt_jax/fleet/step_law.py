"""The step law of an engine: seconds and joules of one iteration, whatever is in it.

Engines made of operators have one law of a mixed step (`laws/operator_step.py`). The others add up: the decode step of
the sequences that decode, and tau1 P + tau2 (2 A - P) of P prompt tokens with A pairs, tau1 p + tau2 p^2 of a whole
prompt, each at its own watts (`laws/decode.py`, `laws/prefill.py`, `laws/power.py`).
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.mixed_step import StepBatch
from fleetopt_jax.laws.power import PowerLaw
from fleetopt_jax.laws.prefill import Prefill
from fleetopt_jax.laws.step_law import StepLaw


@pytree
class SumOfSteps(StepLaw):
    """A decode step and the prefill beside it, one after the other. Leaves shape () or with a leading vmap axis."""

    decode: DecodeLaw
    power: PowerLaw
    prefill: Prefill

    @property
    def first_token_s(self) -> Array:
        return self.prefill.first_token_s

    @property
    def window_tokens(self) -> Array:
        """Of no layer: tau2 counts all pairs."""
        return jnp.zeros(())

    def step_s(self, batch: StepBatch) -> Array:
        return self._decode_s(batch) + self.added_s(batch)

    def gpu_j(self, batch: StepBatch) -> Array:
        n = jnp.maximum(batch.n_active, 1e-9)
        decode_w = self.power.gpu_w(n, batch.tokens / n)
        return decode_w * self._decode_s(batch) + self.added(batch)[1]

    def added_s(self, batch: StepBatch) -> Array:
        of_pairs_s = self.prefill.per_token2_s * (2.0 * batch.prompt_pairs - batch.prompt_tokens)
        return self.prefill.per_token_s * batch.prompt_tokens + of_pairs_s

    def added(self, batch: StepBatch) -> tuple[Array, Array]:
        added_s = self.added_s(batch)
        return added_s, self.prefill.gpu_w * added_s

    def _decode_s(self, batch: StepBatch) -> Array:
        return self.decode.batch_s(batch.n_active, batch.tokens, batch.windowed_tokens)


def step_law_of(engine: Engine) -> StepLaw:
    """What an iteration of this engine takes."""
    return engine.step or SumOfSteps(engine.decode, engine.power, engine.prefill)


def decoding_in(engine: Engine, n_active: ArrayLike, context_tokens: ArrayLike) -> StepBatch:
    """Sequences of one mean context that decode, as this engine sees them."""
    context = jnp.asarray(context_tokens, dtype=float)
    n = jnp.asarray(n_active, dtype=float)
    zero = jnp.zeros_like(n)
    return StepBatch(n, n * context, n * engine.decode.seen_tokens(context), zero, zero, zero)
