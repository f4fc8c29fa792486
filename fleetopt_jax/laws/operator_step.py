"""Seconds and watts of a step that is made of operators: the mixed step, and what its operators keep busy.

    W = P(shares of the peaks by operator class, the rest of the step),   J = W t

The step is `laws/mixed_step.py`'s; its operators are at work as long as they are timed alone, and what the serving
engine's step takes beyond that is a gap (`laws/operators/watts.py`). One record gives the power of decoding
(`OperatorPower`) and of prefill (`operator_prefill`), so that they cannot drift apart.
"""

from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.clocks import DECODE_CORE_SHARE, clocked_w
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.mixed_step import CLASSES, MixedStep, StepBatch, decoding, with_prompts
from fleetopt_jax.laws.operators.watts import StepWatts, flop_w, held_w, memory_w, running_w, with_gap_w
from fleetopt_jax.laws.power import PowerLaw
from fleetopt_jax.laws.prefill import Prefill

BESIDE, BESIDE_TOKENS = 32.0, 2048.0  # sequences that decode beside a prompt whose cost is asked for, and their context
COMPUTING = ("gemm", "experts", "prefill_attention")  # whose FLOPs take watts: see `step_watts`
PROMPTS = np.exp2(np.arange(8, 15))  # whose costs the polynomial is nearest to, by relative error [tokens]


@pytree
class OperatorStep:
    """The step of one instance, with its energy. Every field is traced; shape () or a leading vmap axis."""

    step: MixedStep
    watts: StepWatts  # of the classes of operators that the step has
    gpu: Gpu

    @property
    def first_token_s(self) -> Array:
        """What a first token takes beyond its iterations [s]."""
        return self.step.host.first_token_s

    def step_s(self, batch: StepBatch) -> Array:
        """Time of one iteration [s]."""
        return self.step.step_s(batch)

    def gpu_w(self, batch: StepBatch) -> Array:
        """Mean board power of one GPU in such iterations [W]."""
        return mixed_power_w(self.step, self.watts, self.gpu, batch)

    def gpu_j(self, batch: StepBatch) -> Array:
        """Energy of one GPU in one iteration [J]."""
        return self.gpu_w(batch) * self.step_s(batch)


def mixed_power_w(step: MixedStep, watts: StepWatts, gpu: Gpu, batch: StepBatch) -> Array:
    """Mean board power of one GPU [W]: `step_power_w` of its operators.

    What they ask for by running and by bytes is linear, so that one look-up of a sum over classes tells it; what they
    ask for by FLOPs is not.
    """
    law, costs = watts.operators, step.costs
    running_j = costs.seconds.total(running_w(law, gpu))
    bytes_j = costs.bytes.total(memory_w(law, gpu) / gpu.bandwidth_bytes_per_s)
    operators_j = jax.tree.map(lambda a, b: a + b, running_j, bytes_j).of(batch)
    busy_s = costs.seconds.total(np.ones(len(CLASSES))).of(batch)
    seconds, peak_s = (cost.by_class(batch, COMPUTING) for cost in (costs.seconds, costs.peak_s))
    for name, of_class_s, of_flop_s in zip(COMPUTING, seconds, peak_s, strict=True):
        of_class = jax.tree.map(itemgetter(CLASSES.index(name)), law)
        operators_j = operators_j + of_class_s * flop_w(of_class, gpu, safe_div(of_flop_s, of_class_s))
    gap_s = namespace(busy_s).maximum(step.step_s(batch) - busy_s, 0.0)
    return held_w(with_gap_w(watts, gpu, operators_j, busy_s, gap_s), gpu.tdp_w)


@pytree
class OperatorPower(PowerLaw):
    """Power while decoding, of the operators at work. From a batch to one 1.4 times as large it may fall by up to 2 %
    of the TDP, where products turn from bandwidth to FLOPs; per sequence it falls always.
    """

    law: OperatorStep

    def gpu_w(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        return self.law.gpu_w(decoding(n_active, context_tokens, self.law.step.window_tokens))

    def at_clock(self, prefill: Prefill, idle_w: ArrayLike, clock_frac: ArrayLike) -> "ClockedPower":
        return ClockedPower(self, jnp.asarray(idle_w), jnp.asarray(clock_frac))


@pytree
class ClockedPower(PowerLaw):
    """Another law's watts on cores at a lower clock (`laws/clocks.py`); that the step takes longer lowers none."""

    power: OperatorPower
    idle_w: Array  # [W]
    clock_frac: Array  # [-]

    def gpu_w(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        return clocked_w(self.power.gpu_w(n_active, context_tokens), self.idle_w, DECODE_CORE_SHARE, self.clock_frac)


def operator_prefill(
    law: OperatorStep, *, chunk_tokens: float, calibration_tokens: float, budget_tokens: float
) -> Prefill:
    """What a prompt costs beside sequences that decode: tau1 p + tau2 p^2 nearest to the step's own increase.

    tau2 is the attention of whole prompts; tau1 has the least squares of relative errors over prompts of 256 to 16,384
    tokens, in chunks of `budget_tokens`. It is a polynomial, because searches sum it over prompts; small prompts cost
    less beside many sequences, whose weights they share, and more beside few.
    """
    tau1_s, tau2_s, gpu_w = _prefill_of(law, float(budget_tokens))
    return Prefill(
        per_token_s=tau1_s,
        per_token2_s=tau2_s,
        gpu_w=gpu_w,
        first_token_s=law.first_token_s,
        **as_floats(chunk_tokens=chunk_tokens, calibration_tokens=calibration_tokens, budget_tokens=budget_tokens),
    )


@jax.jit
def _prefill_of(law: OperatorStep, budget_tokens: float) -> tuple[Array, Array, Array]:
    window = law.step.window_tokens
    beside = decoding(BESIDE, BESIDE_TOKENS, window)
    alone_s = law.step_s(beside)

    def taken_s(chunk: ArrayLike, before: ArrayLike) -> Array:
        return law.step_s(with_prompts(beside, chunk, before, window)) - alone_s

    def prompt_s(prompt: Array) -> Array:
        def one(i: int, total: Array) -> Array:
            before = i * budget_tokens
            chunk = jnp.clip(prompt - before, 0.0, budget_tokens)
            return total + jnp.where(chunk > 0, taken_s(chunk, before), 0.0)

        n_chunks = jnp.ceil(prompt / budget_tokens).astype(int)
        return jax.lax.fori_loop(0, n_chunks, one, jnp.zeros(()))

    prompts = jnp.asarray(PROMPTS)
    cost_s = jax.vmap(prompt_s)(prompts)
    attention = law.step.costs.seconds.attention
    tau2_s = law.step.host.prompt_slowdown * attention.full.per_pair / 2.0
    a, b = prompts / cost_s, 1.0 - tau2_s * prompts**2 / cost_s
    tau1_s = jnp.maximum(jnp.sum(a * b) / jnp.sum(a * a), 1e-9)
    whole = with_prompts(decoding(0.0, 0.0, window), budget_tokens, 0.0, window)
    return tau1_s, tau2_s, law.gpu_w(whole)
