"""The step law of an engine: seconds and joules of one iteration, whatever is in it.

Engines made of operators have one law of a mixed step (`laws/operator_step.py`). The others add up: the decode step of
the sequences that decode, and tau1 P + tau2 (2 A - P) of P prompt tokens with A pairs, tau1 p + tau2 p^2 of a whole
prompt, each at its own watts (`laws/decode.py`, `laws/prefill.py`, `laws/power.py`).
"""

import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.mixed_step import StepBatch
from fleetopt_jax.laws.operator_step import OperatorStep
from fleetopt_jax.laws.power import PowerLaw
from fleetopt_jax.laws.prefill import Prefill


@pytree
class SumOfSteps:
    """A decode step and the prefill beside it, one after the other. Leaves shape () or with a leading vmap axis."""

    decode: DecodeLaw
    power: PowerLaw
    prefill: Prefill

    @property
    def first_token_s(self) -> Array:
        """What a first token takes beyond its iterations [s]: it is not known."""
        return jnp.zeros(())

    def step_s(self, batch: StepBatch) -> Array:
        """Time of one iteration [s]."""
        return self._decode_s(batch) + self._prefill_s(batch)

    def gpu_j(self, batch: StepBatch) -> Array:
        """Energy of one GPU in one iteration [J]."""
        n = jnp.maximum(batch.n_active, 1e-9)
        decode_w = self.power.gpu_w(n, batch.tokens / n)
        return decode_w * self._decode_s(batch) + self.prefill.gpu_w * self._prefill_s(batch)

    def _decode_s(self, batch: StepBatch) -> Array:
        return self.decode.batch_s(batch.n_active, batch.tokens, batch.windowed_tokens)

    def _prefill_s(self, batch: StepBatch) -> Array:
        of_pairs_s = self.prefill.per_token2_s * (2.0 * batch.prompt_pairs - batch.prompt_tokens)
        return self.prefill.per_token_s * batch.prompt_tokens + of_pairs_s


def step_law_of(engine: Engine) -> SumOfSteps | OperatorStep:
    """What an iteration of this engine takes."""
    return engine.step or SumOfSteps(engine.decode, engine.power, engine.prefill)
