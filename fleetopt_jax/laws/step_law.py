"""What the other laws ask of an iteration, whatever is in it: its time and its energy.

A batch of sequences that decode and of prompt tokens (`laws/mixed_step.py`) takes one iteration. What its prompts add
is what the iteration takes beyond one of the same sequences without them.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.host import HostLaw
from fleetopt_jax.laws.mixed_step import StepBatch

if TYPE_CHECKING:
    from fleetopt_jax.laws.decode import DecodeLaw
    from fleetopt_jax.laws.prefill import Prefill
    from fleetopt_jax.laws.speculation import Speculation


@pytree
class StepInputs:
    """What a step of operators is asked about where its tables are given. Fields traced."""

    host: HostLaw  # of the serving engine
    tdp_w: Array  # board power, of which all watts are shares [W]
    gap_frac: Array  # of it above idle, where the GPU waits [-]


class StepLaw:
    """An iteration of one instance; a record derives from this and says these."""

    @property
    def first_token_s(self) -> Array:
        """What a first token takes beyond its iterations [s]."""
        raise NotImplementedError

    @property
    def window_tokens(self) -> Array:
        """Up to which layers with a sliding window read [tokens]; 0 without."""
        raise NotImplementedError

    def step_s(self, batch: StepBatch) -> Array:
        """Time of one iteration [s]."""
        raise NotImplementedError

    def gpu_j(self, batch: StepBatch) -> Array:
        """Energy of one GPU in one iteration [J]."""
        raise NotImplementedError

    def added_s(self, batch: StepBatch) -> Array:
        """What its prompt tokens add to an iteration [s]."""
        return self.step_s(batch) - self.step_s(without_prompts(batch))

    def added(self, batch: StepBatch) -> tuple[Array, Array]:
        """What they add to its time, and to its energy of one GPU [s, J]."""
        both = stacked(batch, without_prompts(batch))
        (with_s, without_s), (with_j, without_j) = self.step_s(both), self.gpu_j(both)
        return with_s - without_s, with_j - without_j

    def at_clock(self, clock_frac: ArrayLike) -> "StepLaw":
        """The law on cores at `clock_frac` of their top clock (`laws/clocks.py`)."""
        raise ValueError(f"{type(self).__name__} has no clock law: say at_clock, or leave the clock alone")

    def at_power_limit(self, limit_w: ArrayLike) -> "StepLaw":
        """The law on boards limited to `limit_w` [W]."""
        raise ValueError(f"{type(self).__name__} has no law of a power limit: say at_power_limit, or limit nothing")

    def gpu_w(self, batch: StepBatch) -> Array:
        """Mean board power of one GPU in such iterations [W]."""
        return self.gpu_j(batch) / self.step_s(batch)

    def speculating(self, speculation: "Speculation", prefill: "Prefill") -> tuple["StepLaw", "DecodeLaw"]:
        """The law of iterations that verify drafts and make the next ones, and that of their decode steps
        (`laws/speculation.py`); `prefill` is that at the top clock."""
        raise ValueError(f"{type(self).__name__} has no law of verified drafts: say speculating, or draft nothing")

    @property
    def inputs(self) -> StepInputs:
        """The single numbers that it depends on."""
        raise NotImplementedError

    def with_inputs(self, inputs: StepInputs) -> "StepLaw":
        """The law with other such numbers."""
        raise NotImplementedError


def without_prompts(batch: StepBatch) -> StepBatch:
    """The sequences of a batch that decode."""
    zero = jnp.zeros_like(batch.n_active)  # of fewer axes where many prompts are asked for beside the same sequences
    return replace(batch, prompt_tokens=zero, prompt_pairs=zero, windowed_pairs=zero)


def stacked(*batches: StepBatch) -> StepBatch:
    """Batches on a leading axis: one program for all."""
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in jax.tree.leaves(batches)))
    return jax.tree.map(lambda *x: jnp.stack([jnp.broadcast_to(y, shape) for y in x]), *batches)


@pytree
class ChangedStep(StepLaw):
    """Another law's iterations, changed; a record derives from this and says how."""

    law: Any  # the other law's record

    @property
    def first_token_s(self) -> Array:
        return self.law.first_token_s

    @property
    def window_tokens(self) -> Array:
        return self.law.window_tokens

    @property
    def inputs(self) -> StepInputs:
        return self.law.inputs

    def with_inputs(self, inputs: StepInputs) -> Self:
        return replace(self, law=self.law.with_inputs(inputs))


@pytree
class ScaledStep(ChangedStep):
    """Its decode steps, what prompts add, and its watts, each times a factor."""

    decode: Array  # [-]
    prefill: Array  # [-]
    power: Array  # [-]

    def at_clock(self, clock_frac: ArrayLike) -> "ScaledStep":
        return replace(self, law=self.law.at_clock(clock_frac))

    def step_s(self, batch: StepBatch) -> Array:
        return self.decode * self.law.step_s(without_prompts(batch)) + self.added_s(batch)

    def gpu_j(self, batch: StepBatch) -> Array:
        return self.power * self.decode * self.law.gpu_j(without_prompts(batch)) + self.added(batch)[1]

    def added_s(self, batch: StepBatch) -> Array:
        return self.prefill * self.law.added_s(batch)

    def added(self, batch: StepBatch) -> tuple[Array, Array]:
        added_s, added_j = self.law.added(batch)
        return self.prefill * added_s, self.power * self.prefill * added_j
