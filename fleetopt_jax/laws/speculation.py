"""Speculative decoding: k tokens of each sequence are drafted, and one step of the LLM verifies them together.

    AL(k)   = 1 + sum over j <= k of S_j                      tokens that a sequence gains in an iteration
    t       = host(T(r n + P) + H(r n + [P > 0]) + d(n, C) + v + p(P, A)) + s n        the LLM's own step
            + [k] c + k t_draft + [k] phi (T(n + P) - T(n) + p(P, A)),     r = 1 + m k, [k] = min(k, 1)
    t_draft = kappa (phi (T(n) + d(n, C)) + psi H(n)) + l

S_j is the chance that the first j drafts are all accepted, so that AL rises with k and ever less. T, H, d, p, kappa and
s are those of the mixed step and its host (`laws/mixed_step.py`, `laws/host.py`): r rows of each sequence go through
weights that are streamed anyway, while its cache is read once. m is the share of the iterations that draft, 1 but for
n-grams, which do where they find a match. v is what attention takes longer for the FLOPs of the further rows,
R(d, f(r)) - R(d, f(1)), R the soft roofline and f the FLOPs of r rows of each sequence, whose mean context is k / 2
tokens longer, at the data sheet's peak: kernels reach less, which only latent attention shows.

A draft head is phi of the LLM's layers and psi of its output layer. It is passed once for each token that it drafts and
once by prompts; l is the engine's time for launching it. Matching n-grams is work of the host (phi = psi = l = 0). c is
what an iteration with drafts takes longer whoever made them: rejection, and outputs that the next step waits for.
Between whole k everything is the mix of both, so that k can be optimised; at k = 0 nothing of it is left, and the step
is the mixed step (to 1e-9). A token takes t / AL and an iteration's joules / AL: drafts pay while AL rises by more than
t does, and no longer where r n rows are bound by FLOPs (tests/test_speculation.py).

A request of o tokens, the first of them from its prefill, takes N iterations; with X the tokens of one, of mean AL,

    E[N] = 1 + (o - 1) / AL + E[X (X - 1)] / (2 AL^2),    Var N = (o - 1) Var X / AL^3

(renewal theory; the last term of E[N] is what the last iteration drafts in vain). At k = 0 N is o.

c and l are fitted to twelve iterations of vLLM on one H100 (`catalog/data/drafts.json`); everything else is the mixed
step's and the curve's. Speed-ups, measured over predicted less one: 3 to 8 % for those of EAGLE-3 in the fit (one
request, k = 2 to 7); not in it, -12 % (EAGLE-3 by SGLang, 64 requests) and 15 and 2 % (DeepSeek-V3's module by SGLang,
eight H200, 1 and 32 requests). Left out: drafts of a sequence share experts, so that a mixture of experts streams fewer
than T says; acceptance falls with temperature, and where the task is another than the curve's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.curve import Curve
from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.demand import NO_STEPS, Demand
from fleetopt_jax.laws.host import longer_s
from fleetopt_jax.laws.mixed_step import (
    AMOUNTS,
    Amounts,
    AttentionCost,
    MixedStep,
    OperatorDecode,
    StepBatch,
    broadcast,
    decode_of,
    has_prompt,
    of_ends,
)
from fleetopt_jax.laws.service import StepMoments
from fleetopt_jax.laws.step_law import without_prompts

if TYPE_CHECKING:
    from fleetopt_jax.laws.prefill import Prefill

MOST_DRAFTS = 16  # tokens drafted ahead, of any curve
N_BATCHES = 257  # that are asked where drafts stop paying


@pytree
class Speculation:
    """k drafts an iteration, how many of them are accepted, and what they cost. Every field is traced; shape () or a
    leading vmap axis, `survival` with a last axis of MOST_DRAFTS."""

    n_drafts: Array  # k [-]
    drafted_frac: Array  # m, share of a sequence's iterations that have drafts: 1 but for n-grams without a match [-]
    survival: Array  # S_j: all of the first j drafts are accepted; 0 beyond the curve [-]
    layers_frac: Array  # phi, layers of the draft head over those of the LLM [-]
    head_frac: Array  # psi, its output layer over the LLM's [-]
    launch_s: Array  # l, of a drafted token [s]
    verify_s: Array  # c, of an iteration with drafts [s]

    @property
    def some(self) -> Array:
        """[k], whether anything is drafted [-]: 0 or 1, between them below one draft."""
        return namespace(self).minimum(self.n_drafts, 1.0)

    @property
    def accepted(self) -> Array:
        """S_j of the drafts that are made [..., MOST_DRAFTS]."""
        xp = namespace(self)
        made = xp.clip(xp.asarray(self.n_drafts)[..., None] - np.arange(MOST_DRAFTS), 0.0, 1.0)
        return self.survival * made

    @property
    def tokens_per_step(self) -> Array:
        """AL, tokens that a sequence gains in an iteration [-]."""
        return 1.0 + self.accepted.sum(axis=-1)

    @property
    def rows_per_sequence(self) -> Array:
        """1 + m k, rows that a sequence has in an iteration, in the mean [-]."""
        return 1.0 + self.drafted_frac * self.n_drafts


def make_speculation(
    survival: Sequence[float] | ArrayLike,
    n_drafts: float,
    *,
    drafted_frac: float = 1.0,
    layers_frac: float = 0.0,
    head_frac: float = 0.0,
    launch_s: float = 0.0,
    verify_s: float = 0.0,
) -> Speculation:
    """A checked `Speculation`: the chance that the first 1, 2, ... drafts are all accepted, and how many are made.

    >>> head = make_speculation([0.8, 0.6, 0.4], 2)
    >>> round(float(head.tokens_per_step), 6)
    2.4
    """
    curve = np.atleast_1d(np.asarray(survival, dtype=float))
    if curve.ndim != 1 or not 1 <= len(curve) <= MOST_DRAFTS:
        raise ValueError(f"need the acceptance of 1 to {MOST_DRAFTS} drafts, got shape {np.shape(survival)}")
    if not (np.all(np.isfinite(curve)) and np.all(np.diff(np.append(1.0, curve)) <= 1e-12) and curve[-1] >= 0):
        raise ValueError(
            f"need an acceptance of the first j drafts that starts at most at 1 and never rises, got {curve}"
        )
    if not 0 <= n_drafts <= len(curve):
        raise ValueError(f"need n_drafts from 0 to the curve's {len(curve)}, got {n_drafts}")
    costs = {"layers_frac": layers_frac, "head_frac": head_frac, "launch_s": launch_s, "verify_s": verify_s}
    for name, value in costs.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"need {name} >= 0 and finite, got {value}")
    padded = np.append(curve, np.zeros(MOST_DRAFTS - len(curve)))
    if not 0 < drafted_frac <= 1 or drafted_frac < curve[0]:
        raise ValueError(f"need a drafted_frac up to 1, and no more accepted drafts than that, got {drafted_frac}")
    return Speculation(**as_floats(n_drafts=n_drafts, drafted_frac=drafted_frac, survival=padded, **costs))


# --- the step ---------------------------------------------------------------------------------------------------------


def _verified(batch: StepBatch, speculation: Speculation) -> StepBatch:
    """The batch with every row of its sequences, where rows count: in products, not in the cache."""
    return replace(batch, n_active=batch.n_active * speculation.rows_per_sequence)


def _decoding_rows(
    cost: AttentionCost, speculation: Speculation, n_active: ArrayLike, tokens: ArrayLike, windowed_tokens: ArrayLike
) -> Array:
    """What attention of all rows costs where each reads its own context."""
    rows, later = speculation.rows_per_sequence, n_active * speculation.n_drafts / 2.0
    return cost.decoding(rows * n_active, rows * (tokens + later), rows * windowed_tokens)


def _with_rows_s(
    read_s: Array,
    flops_s: AttentionCost,
    speculation: Speculation,
    n_active: ArrayLike,
    tokens: ArrayLike,
    windowed_tokens: ArrayLike,
) -> Array:
    """d + v: attention of all rows, which takes `read_s` for one of each sequence [s]."""
    of_one = flops_s.decoding(n_active, tokens, windowed_tokens)
    of_all = _decoding_rows(flops_s, speculation, n_active, tokens, windowed_tokens)
    return read_s + (longer_s(read_s, of_all) - longer_s(read_s, of_one))


def _engines_s(speculation: Speculation, n_active: ArrayLike) -> Array:
    """[k] c + k l: what the engine takes for drafts, of any sequences [s]."""
    there = namespace(speculation, n_active).minimum(n_active, 1.0)
    return there * (speculation.some * speculation.verify_s + speculation.n_drafts * speculation.launch_s)


@pytree
class SpeculativeStep(MixedStep):
    """The step of one instance that verifies drafts and makes the next ones. Every field is traced; shape () or a
    leading vmap axis."""

    speculation: Speculation
    attention_flops_s: AttentionCost  # of decoding at the peak, as the cores are clocked [s]

    def gpu_s(self, batch: StepBatch) -> Array:
        """What the LLM's own operators take, before kappa [s]."""
        wide, sequences = _verified(batch, self.speculation), _sequences(batch)
        read_s = self.attention_s.decoding(*sequences)
        attention_s = _with_rows_s(read_s, self.attention_flops_s, self.speculation, *sequences)
        fullest = self.costs.fullest(batch)
        beside_s = of_ends(self.head_s, wide) + attention_s + self.attention_s.prompts(fullest)
        return self.layers_s(wide.n_active, batch, fullest) + beside_s

    def drafts_s(self, batch: StepBatch) -> Array:
        """What drafting adds to an iteration [s]."""
        s, n = self.speculation, batch.n_active
        fullest, alone_s = self.costs.fullest(batch), self.every_row_s(n)
        layers_s = alone_s + self.attention_s.decoding(*_sequences(batch))
        one_s = s.layers_frac * layers_s + s.head_frac * self.head_s(n)
        prompts_s = self.layers_s(n, batch, fullest) - alone_s + self.attention_s.prompts(fullest)
        there = namespace(self, batch).minimum(n, 1.0)
        gpu_s = there * s.n_drafts * one_s + s.some * s.layers_frac * prompts_s
        return self.host.slowdown * gpu_s + _engines_s(s, n)

    def step_s(self, batch: StepBatch) -> Array:
        rows = batch.n_active * self.speculation.rows_per_sequence + batch.prompt_tokens
        own_s = self.host.step_of_s(self.gpu_s(batch), self.n_layers, batch.n_active, has_prompt(batch), rows)
        return own_s + self.drafts_s(batch)

    def at_clock(self, clock_frac: ArrayLike) -> "SpeculativeStep":
        slower = cast(SpeculativeStep, MixedStep.at_clock(self, clock_frac))
        return replace(slower, attention_flops_s=self.costs.peak_s[2].scaled(1.0 / clock_frac))

    def parts(self, batch: StepBatch) -> Amounts:
        """Of the LLM's own step and of the drafts together, by operator class."""
        batch = broadcast(batch)
        s, costs, alone = self.speculation, self.costs, without_prompts(batch)
        own = costs.attending(_verified(batch, s), self._attention(batch))
        layers = replace(costs.scaled(s.layers_frac), head=costs.head.scaled(0.0))
        drafts = replace(layers, head=costs.head.scaled(s.head_frac)).of(alone)
        prompts = jax.tree.map(lambda a, b: a - b, layers.of(batch), layers.of(alone))
        made = namespace(self, batch).minimum(batch.n_active, 1.0) * s.n_drafts
        return jax.tree.map(lambda own, draft, prompt: own + made * draft + s.some * prompt, own, drafts, prompts)

    def _attention(self, batch: StepBatch) -> Array:
        """All amounts of attention of all rows [amount, ...]: the bytes of one of each sequence, everybody's FLOPs."""
        one = self.costs.attention.decoding(*_sequences(batch))
        every = _decoding_rows(self.costs.attention, self.speculation, *_sequences(batch))
        seconds, n_bytes, flops, peak_s = (AMOUNTS.index(name) for name in ("seconds", "bytes", "flops", "peak_s"))
        longer = longer_s(one[seconds], every[peak_s]) - longer_s(one[seconds], one[peak_s])
        amounts = {seconds: one[seconds] + longer, n_bytes: one[n_bytes], flops: every[flops], peak_s: every[peak_s]}
        return namespace(self, batch).stack([amounts[k] for k in range(len(AMOUNTS))])


def _sequences(batch: StepBatch) -> tuple[Array, Array, Array]:
    """Those that decode, and their contexts."""
    return batch.n_active, batch.tokens, batch.windowed_tokens


def speculative_step(step: MixedStep, speculation: Speculation) -> SpeculativeStep:
    """The step of an engine that drafts, at its top clock."""
    return SpeculativeStep(**vars(step), speculation=speculation, attention_flops_s=step.costs.peak_s[2])


@pytree
class SpeculativeDecode(OperatorDecode):
    """The same of a batch without prompts, with no more in it than a search asks for."""

    speculation: Speculation
    draft_s: Curve  # phi T + psi H over the sequences [s]
    draft_compute_s: Curve  # of it, the FLOPs at the peak [s]
    attention_flops_s: AttentionCost

    def batch_s(self, n_active: ArrayLike, tokens: ArrayLike, windowed_tokens: ArrayLike) -> Array:
        s, sequences = self.speculation, (n_active, tokens, windowed_tokens)
        read_s = self.attention_s.decoding(*sequences)
        rows_s = self.rows_s(n_active * s.rows_per_sequence)
        gpu_s = rows_s + _with_rows_s(read_s, self.attention_flops_s, s, *sequences)
        there = jnp.minimum(n_active, 1.0)
        drafts_s = there * s.n_drafts * (self.draft_s(n_active) + s.layers_frac * read_s)
        own_s = self.host.step_of_s(gpu_s, self.n_layers, n_active)
        return own_s + self.host.slowdown * drafts_s + _engines_s(s, n_active)

    def at_clock(self, prefill: "Prefill", clock_frac: ArrayLike) -> "SpeculativeDecode":
        slower = cast(SpeculativeDecode, OperatorDecode.at_clock(self, prefill, clock_frac))
        longer = 1.0 / clock_frac - 1.0
        return replace(
            slower,
            draft_s=self.draft_s + self.draft_compute_s.scaled(longer),
            attention_flops_s=self.attention_compute_s.scaled(1.0 / clock_frac),
        )


def speculative_decode(step: SpeculativeStep) -> SpeculativeDecode:
    """The decode step of an engine whose step, at the top clock, is `step`."""
    s, (rows, head, _) = step.speculation, step.costs.peak_s
    return SpeculativeDecode(
        **vars(decode_of(step)),
        speculation=s,
        draft_s=step.every_row_s.scaled(s.layers_frac) + step.head_s.scaled(s.head_frac),
        draft_compute_s=rows.scaled(s.layers_frac) + head.scaled(s.head_frac),
        attention_flops_s=step.attention_flops_s,
    )


# --- what requests take of it -----------------------------------------------------------------------------------------


def in_iterations(speculation: Speculation, steps: StepMoments, mean: Demand) -> tuple[StepMoments, Demand]:
    """The mean features of requests with their decode steps counted in iterations, N, where without drafts they are
    their output tokens. Contexts are those of a mean decoding sequence as before."""
    tokens = speculation.tokens_per_step
    j = np.arange(1, MOST_DRAFTS + 1)
    pairs = jnp.sum(2.0 * j * speculation.accepted, axis=-1)  # E[X (X - 1)]
    variance = pairs + tokens - tokens**2
    beyond = 1.0 - 1.0 / tokens + pairs / (2.0 * tokens**2)

    def iterations(output: Array, square: Array) -> tuple[Array, Array]:
        """(E[N], E[N^2]) of requests with mean output and mean square; of none where nothing is decoded."""
        more = beyond * jnp.minimum(output, 1.0)
        n = jnp.minimum(more + output / tokens, output)
        spread = jnp.maximum(output - 1.0, 0.0) * variance / tokens**3
        return n, more**2 + 2.0 * more * output / tokens + square / tokens**2 + spread

    n, square = iterations(mean.steps, mean.steps2)
    share = jnp.where(mean.steps > NO_STEPS, n / jnp.where(mean.steps > NO_STEPS, mean.steps, 1.0), 1.0)
    of_demand = replace(mean, steps=n, steps2=square, held=mean.held * share, held2=mean.held2 * share)
    n, square = iterations(steps.steps, steps.steps2)
    of_steps = replace(
        steps,
        steps=n,
        steps2=square,
        steps_len=steps.steps_len * share,
        steps2_len=steps.steps2_len * share**2,
        steps2_len2=steps.steps2_len2 * share**2,
    )
    return of_steps, of_demand


def pays_up_to(
    without: DecodeLaw, drafting: DecodeLaw, tokens_per_step: ArrayLike, context_tokens: float, most: float
) -> float:
    """The largest batch, up to `most`, at which a token of each sequence takes no longer with drafts than without [-];
    0 where it always does. Beyond it rows are no longer free."""
    n = np.geomspace(1.0, max(most, 1.0), N_BATCHES)
    gain = np.asarray(tokens_per_step * without.step_s(n, context_tokens) / drafting.step_s(n, context_tokens))
    pays = np.flatnonzero(gain >= 1.0)
    if pays.size == 0:
        return 0.0
    last = pays[-1]
    if last == N_BATCHES - 1:
        return float(n[-1])
    between = (gain[last] - 1.0) / (gain[last] - gain[last + 1])
    return float(n[last] * (n[last + 1] / n[last]) ** between)
