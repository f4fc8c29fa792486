"""Seconds and watts of a step that is made of operators: the mixed step, and what its operators keep busy.

    W = P(shares of the peaks by operator class, the rest of the step),   J = W t

The step is `laws/mixed_step.py`'s; its operators are at work as long as they are timed alone, and what the serving
engine's step takes beyond that is a gap (`laws/operators/watts.py`). One record gives the power of decoding
(`OperatorPower`) and of prefill (`operator_prefill`), so that they cannot drift apart.

A board's limit is a clock: where an iteration would draw more, its cores slow down until the watts meet the limit
(`LimitedStep`). At the TDP that has happened while operators were timed, so that it is in their seconds already (H200's
large products were timed at 689 to 693 W of 700); `P` then says no more than the board allows, and the law here is for
limits below. It is that of `laws/clocks.py`: projected.
"""

from dataclasses import replace
from typing import Any

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.clocks import DECODE_CORE_SHARE, PREFILL_CORE_SHARE, clock_at_power_w, clocked_w
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.mixed_step import PER_PAIR, MixedStep, StepBatch, decoding, with_prompts
from fleetopt_jax.laws.operators.watts import StepWatts, step_parts, step_power_w
from fleetopt_jax.laws.power import PowerLaw
from fleetopt_jax.laws.prefill import Prefill
from fleetopt_jax.laws.speculation import Speculation, SpeculativeDecode, speculative_decode, speculative_step
from fleetopt_jax.laws.step_law import ChangedStep, StepInputs, StepLaw

BESIDE, BESIDE_TOKENS = 32.0, 2048.0  # sequences that decode beside a prompt whose cost is asked for, and their context


@pytree
class OperatorStep(StepLaw):
    """The step of one instance, with its energy. Every field is traced; shape () or a leading vmap axis."""

    step: MixedStep  # as the cores are clocked
    top: MixedStep  # at the top clock, where watts are known
    watts: StepWatts  # of the classes of operators that the step has
    gpu: Gpu
    clock_frac: Array  # of the GPU's cores, of their top clock [-]

    @property
    def first_token_s(self) -> Array:
        """What a first token takes beyond its iterations [s]."""
        return self.step.host.first_token_s

    @property
    def window_tokens(self) -> Array:
        """Up to which layers with a sliding window read [tokens]; 0 without."""
        return self.step.window_tokens

    def step_s(self, batch: StepBatch) -> Array:
        return self.step.step_s(batch)

    def gpu_w(self, batch: StepBatch) -> Array:
        """Mean board power of one GPU in such iterations [W]; that they take longer at a lower clock lowers none."""
        power_w = mixed_power_w(self.top, self.watts, self.gpu, batch)
        return clocked_w(power_w, self.gpu.idle_w, _core_share(batch), self.clock_frac)

    def gpu_j(self, batch: StepBatch) -> Array:
        return self.gpu_w(batch) * self.step_s(batch)

    def at_clock(self, clock_frac: ArrayLike) -> "OperatorStep":
        """On cores at `clock_frac` of their top clock (`laws/clocks.py`)."""
        return replace(self, step=self.top.at_clock(clock_frac), **as_floats(clock_frac=clock_frac))

    def at_power_limit(self, limit_w: ArrayLike) -> "LimitedStep":
        """On boards limited to `limit_w` [W]; no faster than its own clock."""
        return LimitedStep(self, **as_floats(limit_w=limit_w))

    def speculating(self, speculation: Speculation, prefill: Prefill) -> tuple["OperatorStep", SpeculativeDecode]:
        top = speculative_step(self.top, speculation)
        decode = speculative_decode(top).at_clock(prefill, self.clock_frac)
        return replace(self, step=top.at_clock(self.clock_frac), top=top), decode

    @property
    def inputs(self) -> StepInputs:
        return StepInputs(self.step.host, self.gpu.tdp_w, self.watts.gap_frac)

    def with_inputs(self, inputs: StepInputs) -> "OperatorStep":
        return replace(
            self,
            step=replace(self.step, host=inputs.host),
            top=replace(self.top, host=inputs.host),
            watts=replace(self.watts, gap_frac=inputs.gap_frac),
            gpu=replace(self.gpu, tdp_w=inputs.tdp_w),
        )


def _core_share(batch: StepBatch) -> Array:
    """What of the watts above idle is the cores' in an iteration [-]."""
    rows = namespace(batch).maximum(batch.n_active + batch.prompt_tokens, 1.0)
    return DECODE_CORE_SHARE + (PREFILL_CORE_SHARE - DECODE_CORE_SHARE) * batch.prompt_tokens / rows


@pytree
class LimitedStep(ChangedStep):
    """A step of operators on boards limited to fewer watts: every iteration at the clock at which it meets them."""

    law: OperatorStep
    limit_w: Array  # of each board [W]

    def clock_frac(self, batch: StepBatch) -> Array:
        """Of the cores, of the clock that operators were timed at [-]: the law's own where the limit does not bind,
        never below `MIN_CLOCK_FRAC`, at which a board may still draw more than it is allowed."""
        law = self.law
        power_w = mixed_power_w(law.top, law.watts, law.gpu, batch)
        clock = clock_at_power_w(power_w, law.gpu.idle_w, _core_share(batch), self.limit_w)
        return namespace(clock).minimum(clock, law.clock_frac)

    def step_s(self, batch: StepBatch) -> Array:
        return self.law.top.clocked_s(batch, self.clock_frac(batch))

    def gpu_w(self, batch: StepBatch) -> Array:
        """Mean board power of one GPU in such iterations [W]."""
        law = self.law
        power_w = mixed_power_w(law.top, law.watts, law.gpu, batch)
        return clocked_w(power_w, law.gpu.idle_w, _core_share(batch), self.clock_frac(batch))

    def gpu_j(self, batch: StepBatch) -> Array:
        return self.gpu_w(batch) * self.step_s(batch)


@pytree
class StepDecode(DecodeLaw):
    """The decode step of any law of iterations."""

    law: Any

    def of_step(self, step: StepLaw) -> "StepDecode":
        """That of another law of iterations."""
        return replace(self, law=step)

    def step_s(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        return self.law.step_s(decoding(n_active, context_tokens, self.law.window_tokens))

    def batch_s(self, n_active: ArrayLike, tokens: ArrayLike, windowed_tokens: ArrayLike) -> Array:
        xp = namespace(self, n_active, tokens, windowed_tokens)
        n = xp.asarray(n_active, dtype=float)
        zero = xp.zeros_like(n)
        return self.law.step_s(StepBatch(n, tokens + zero, windowed_tokens + zero, zero, zero, zero))

    def seen_tokens(self, context_tokens: Array) -> Array:
        return namespace(context_tokens).minimum(context_tokens, self.law.window_tokens)


def operator_step(step: MixedStep, watts: StepWatts, gpu: Gpu) -> OperatorStep:
    """A step of operators at the top clock."""
    return OperatorStep(step, step, watts, gpu, **as_floats(clock_frac=1.0))


def mixed_power_w(step: MixedStep, watts: StepWatts, gpu: Gpu, batch: StepBatch) -> Array:
    """Mean board power of one GPU [W]: `step_power_w` of its operators."""
    parts = step.parts(batch)
    xp = namespace(batch, step)
    seconds_s, n_bytes, peak_s = (xp.moveaxis(x, 0, -1) for x in (parts.seconds, parts.bytes, parts.peak_s))
    return step_power_w(watts, gpu, step_parts(gpu, seconds_s, n_bytes, peak_s, step.step_s(batch)))


@pytree
class OperatorPower(PowerLaw):
    """Power while decoding, of the operators at work. From a batch to one 1.4 times as large it may fall by up to 2 %
    of the TDP, where products turn from bandwidth to FLOPs; per sequence it falls always.
    """

    law: Any  # a law of iterations

    def gpu_w(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        return self.law.gpu_w(decoding(n_active, context_tokens, self.law.window_tokens))

    def at_clock(self, prefill: Prefill, idle_w: ArrayLike, clock_frac: ArrayLike) -> "OperatorPower":
        return OperatorPower(self.law.at_clock(clock_frac))


def operator_prefill(
    law: OperatorStep, *, chunk_tokens: float, calibration_tokens: float, budget_tokens: float
) -> Prefill:
    """What prompts cost where they fill iterations, tau1 p + tau2 p^2: the step's own increase by a whole budget of
    tokens beside sequences that decode, and by the pairs of tokens of a long prompt.

    It is for what sums over prompts; a prompt that meets few others costs more (`laws/cycle.py`).
    """
    window = law.window_tokens
    beside = decoding(BESIDE, BESIDE_TOKENS, window)
    whole = replace(beside, **as_floats(prompt_tokens=budget_tokens, windowed_pairs=budget_tokens * window))
    prompt = with_prompts(decoding(0.0, 0.0, window), budget_tokens, 0.0, window)
    return Prefill(
        per_token_s=(law.step_s(whole) - law.step_s(beside)) / budget_tokens,
        per_token2_s=law.step.host.prompt_slowdown * law.step.attention_s.coefficients[..., PER_PAIR] / 2.0,
        gpu_w=law.gpu_w(prompt),
        first_token_s=law.first_token_s,
        **as_floats(chunk_tokens=chunk_tokens, calibration_tokens=calibration_tokens, budget_tokens=budget_tokens),
    )
