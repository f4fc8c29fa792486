"""One engine step over a mixed batch: sequences that decode and the tokens of prompts, in the same kernels.

    t_gpu = T(n + P) + G(n + P') + H(n + [P > 0]) + d(n, C) + p(P', A P' / P)

n sequences with C tokens of context together, P prompt tokens that attend to A pairs of tokens. T is all that depends
on rows only, over all layers: matrix products, experts, all-reduces, norms, so that small prompts ride on weights that
decodes stream anyway; H the output layer, which reads the last token of a prompt only; d and p attention, affine in
the batch's sums (layers with a sliding window count them cut by it). T and H are built of the operator laws by
`laws/stack.py` and tabulated (`core/curve.py`), so that a step costs a look-up, whatever it is made of. The serving
engine's own time is put on top by `laws/host.py`.

With data-parallel attention g groups of GPUs have sequences of their own, and a step lasts as long as the group that
has most to do. G is what groups do each for itself (nothing of one group, where T has it all). A prompt is one group's:

    P' = max(P, g min(P, 2 A / P))      prompt tokens of the fullest group, times g; P for one group

2 A / P is the length of a lone prompt, and of several the mean by tokens: engines deal prompts out in turn or to the
group that has least, so that up to g of them are in groups of their own. (Later chunks of several prompts count as
more than they are, up to all in one group.) Groups without a prompt wait: bytes and FLOPs are those of the mean GPU,
the time is the fullest group's. Of engines that hold prompts back until every group has some (`catalog/steps.py`)
g is 1 here.

Properties, tested (tests/test_mixed_step.py): the step does not fall with contexts, prompt tokens and pairs, or with
sequences of a given mean context; of a decoding batch the time of each sequence, t / n, does not rise with n (the
weights are shared), which is what the fixed point needs. It is not concave in n where products turn from bandwidth to
FLOPs, and it is affine in the contexts only where the host does not show (the tangent is taken then).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.curve import Curve
from fleetopt_jax.core.struct import namespace, pytree
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.host import HostLaw
from fleetopt_jax.laws.operators.attention import causal_pairs

if TYPE_CHECKING:
    from fleetopt_jax.laws.prefill import Prefill

CLASSES = ("gemm", "experts", "decode_attention", "prefill_attention", "collectives", "elementwise")


@pytree
class StepBatch:
    """What one step works on, as sums over the instance's batch. Fields traced, any common shape."""

    n_active: Array  # decoding sequences [-]
    tokens: Array  # of their contexts together [tokens]
    windowed_tokens: Array  # the same, each context cut by the sliding window [tokens]
    prompt_tokens: Array  # of prompts, in this step [tokens]
    prompt_pairs: Array  # pairs of tokens that those attend to [tokens^2]
    windowed_pairs: Array  # the same, each cut by the sliding window [tokens^2]


def decoding(n_active: ArrayLike, context_tokens: ArrayLike, window_tokens: ArrayLike = 0.0) -> StepBatch:
    """A batch without prompts, of sequences of one context."""
    xp = namespace(n_active, context_tokens, window_tokens)
    n = xp.asarray(n_active, dtype=float)
    zero = xp.zeros_like(n)
    return StepBatch(n, n * context_tokens, n * xp.minimum(context_tokens, window_tokens), zero, zero, zero)


def with_prompts(
    batch: StepBatch,
    prompt_tokens: ArrayLike,
    before_tokens: ArrayLike = 0.0,
    window_tokens: ArrayLike = 0.0,
    n_prompts: ArrayLike = 1.0,
) -> StepBatch:
    """The batch with `n_prompts` prompts, of each the next `prompt_tokens` after `before_tokens` that are done."""
    pairs = causal_pairs(prompt_tokens, before_tokens)
    windowed = causal_pairs(prompt_tokens, before_tokens, window_tokens)
    return replace(
        batch,
        prompt_tokens=batch.prompt_tokens + n_prompts * prompt_tokens,
        prompt_pairs=batch.prompt_pairs + n_prompts * pairs,
        windowed_pairs=batch.windowed_pairs + n_prompts * windowed,
    )


@pytree
class SequenceCost:
    """What layers that keep something of a sequence cost one GPU: seconds, bytes or FLOPs, affine in a batch's sums."""

    per_step: Array  # of a step that decodes
    per_seq: Array
    per_token: Array  # of context
    per_mean_token: Array  # of the mean context: what few sequences cannot fill the GPU with
    per_prompt_step: Array  # of a step with prompt tokens
    per_prompt_token: Array
    per_pair: Array


# What a batch's costs are of: layers with a window and those without tell contexts and pairs apart, nothing else.
OF_DECODING = ("per_step", "per_seq", "per_token", "per_mean_token")
OF_PROMPTS = ("per_prompt_step", "per_prompt_token", "per_pair")
CUT = ("per_token", "per_mean_token", "per_pair")  # by the window, where there is one
DECODING, PROMPTS = slice(0, 6), slice(6, None)
PER_PAIR = PROMPTS.start + 2  # of layers without a window


@pytree
class AttentionCost:
    """The same of all layers, those without a window (full) and those with one. One leaf, linear in the costs: a batch
    takes one product."""

    coefficients: Array  # [..., 10]: as `_of_decoding` and `_of_prompts` have what they are of

    def decoding(self, n_active: ArrayLike, tokens: ArrayLike, windowed_tokens: ArrayLike) -> Array:
        """Of the sequences that decode [..., batch]."""
        return _product(self.coefficients[..., DECODING], _of_decoding(n_active, tokens, windowed_tokens))

    def prompts(self, batch: StepBatch) -> Array:
        """Of the prompt tokens [..., batch]."""
        return _product(self.coefficients[..., PROMPTS], _of_prompts(batch))

    def of(self, batch: StepBatch) -> Array:
        """Of both [..., batch]."""
        decoding = _of_decoding(batch.n_active, batch.tokens, batch.windowed_tokens)
        return _product(self.coefficients, (*decoding, *_of_prompts(batch)))

    def __add__(self, other: "AttentionCost") -> "AttentionCost":
        return AttentionCost(self.coefficients + other.coefficients)

    def scaled(self, factor: ArrayLike) -> "AttentionCost":
        """Every cost times `factor`."""
        return AttentionCost(self.coefficients * factor)


def attention_cost(full: SequenceCost, windowed: SequenceCost) -> AttentionCost:
    """Of all layers, from those of either kind together."""
    each = []
    for names in (OF_DECODING, OF_PROMPTS):
        whole = [name for name in names if name not in CUT]
        each += [getattr(full, name) + getattr(windowed, name) for name in whole]
        each += [getattr(cost, name) for cost in (full, windowed) for name in names if name in CUT]
    xp = namespace(each)
    return AttentionCost(xp.stack(xp.broadcast_arrays(*each), axis=-1))


def _of_decoding(n_active: ArrayLike, tokens: ArrayLike, windowed_tokens: ArrayLike) -> tuple[Any, ...]:
    """Any sequence, sequences, and their contexts together and in the mean, full and windowed."""
    xp = namespace(n_active, tokens, windowed_tokens)
    some, n = xp.minimum(n_active, 1.0), xp.maximum(n_active, 1.0)
    return some, n_active, tokens, tokens / n, windowed_tokens, windowed_tokens / n


def _of_prompts(batch: StepBatch) -> tuple[Any, ...]:
    """Any prompt token, prompt tokens, and their pairs, full and windowed."""
    return has_prompt(batch), batch.prompt_tokens, batch.prompt_pairs, batch.windowed_pairs


def _product(coefficients: Array, features: tuple[Any, ...]) -> Array:
    """Summed: a matrix product of so few numbers takes XLA three times as long in a large batch, and terms written out
    one by one half as long again, and many more operations to compile."""
    xp = namespace(coefficients, features)
    each, of = xp.moveaxis(coefficients, -1, 0), xp.stack(xp.broadcast_arrays(*features))
    each = each.reshape(each.shape + (1,) * (of.ndim - 1))
    return (each * of.reshape(of.shape[:1] + (1,) * (coefficients.ndim - 1) + of.shape[1:])).sum(axis=0)


def broadcast(batch: StepBatch) -> StepBatch:
    """The batch with fields of one shape."""
    xp = namespace(batch)
    return StepBatch(*xp.broadcast_arrays(*vars(batch).values()))


def of_fullest(batch: StepBatch, n_groups: ArrayLike) -> StepBatch:
    """The batch as if every one of the groups had as much of prompts as the fullest."""
    xp = namespace(batch, n_groups)
    tokens = batch.prompt_tokens
    some = xp.where(tokens > 0, tokens, 1.0)
    length = 2.0 * batch.prompt_pairs / some
    apart = xp.greater(n_groups, 1)
    most = xp.where(apart, xp.maximum(tokens, n_groups * xp.minimum(tokens, length)), tokens)
    fuller = xp.where(apart, most / some, 1.0)
    return replace(
        batch,
        prompt_tokens=most,
        prompt_pairs=fuller * batch.prompt_pairs,
        windowed_pairs=fuller * batch.windowed_pairs,
    )


def has_prompt(batch: StepBatch) -> Array:
    """Whether a step has prompt tokens [-]: 0 or 1, between them below one token."""
    return namespace(batch).minimum(batch.prompt_tokens, 1.0)


def of_ends(head: Curve, batch: StepBatch) -> Array:
    """Of rows whose next token is asked for: a step with prompts takes one of them to its end."""
    return head(batch.n_active + has_prompt(batch))


@pytree
class Amounts:
    """What something costs one GPU."""

    seconds: Any
    bytes: Any  # of memory, read and written
    flops: Any
    peak_s: Any  # the FLOPs at the data sheet's peak of their precision [s]


AMOUNTS = tuple(Amounts.__dataclass_fields__)  # seconds first


@pytree
class Costs:
    """All amounts of a step, by operator class; leaves are linear in them."""

    rows: Curve  # [amount, class] over the rows of a step; seconds without those of `groups`
    groups: Curve | None  # [seconds or peak_s, class] of what groups do each for itself, as if all were the fullest
    head: Curve  # [amount] of the output layer, over its rows
    attention: AttentionCost  # [amount]
    n_groups: Array | None  # that prompts are of, one each; 1 where the engine deals them out evenly [-]

    @property
    def peak_s(self) -> tuple[Curve, Curve, AttentionCost]:
        """The FLOPs at the peak, of the rows evenly dealt, the head and attention [s]."""
        k = AMOUNTS.index("peak_s")
        rows, head, attention = (part.coefficients for part in (self.rows, self.head, self.attention))
        of_rows = rows[..., k, :, :, :].sum(axis=-3)
        return Curve(of_rows), Curve(head[..., k, :, :]), AttentionCost(attention[..., k, :])

    @property
    def groups_peak_s(self) -> Curve | None:
        """Of the rows' FLOPs at the peak those of groups [s]."""
        return self.groups and Curve(self.groups.coefficients[..., 1, :, :, :].sum(axis=-3))

    def of(self, batch: StepBatch) -> Amounts:
        """Each [class, ...] of a batch."""
        return self.attending(batch, self.attention.decoding(batch.n_active, batch.tokens, batch.windowed_tokens))

    def attending(self, batch: StepBatch, decode: Array) -> Amounts:
        """The same of a batch whose sequences' attention costs `decode` [amount, ...]."""
        fullest, xp = self.fullest(batch), namespace(self, batch)
        at = {
            "gemm": of_ends(self.head, batch),
            "decode_attention": decode,
            "prefill_attention": self._prompts(batch, fullest),
        }
        beside = xp.stack([at.get(name, xp.zeros_like(decode)) for name in CLASSES], axis=1)
        found = Amounts(*(self.rows(batch.n_active + batch.prompt_tokens) + beside))
        if self.groups is None:
            return found
        groups_s = Curve(self.groups.coefficients[..., 0, :, :, :])(batch.n_active + fullest.prompt_tokens)
        return replace(found, seconds=found.seconds + groups_s)

    def _prompts(self, batch: StepBatch, fullest: StepBatch) -> Array:
        """Attention of prompts [amount, ...]: the seconds of the fullest group, the rest of the mean GPU."""
        if self.groups is None:
            return self.attention.prompts(batch)
        seconds = AttentionCost(self.attention.coefficients[..., 0, :]).prompts(fullest)
        return namespace(seconds).concatenate([seconds[None], self.attention.prompts(batch)[1:]])

    def scaled(self, factor: ArrayLike) -> "Costs":
        """Every cost times `factor`."""
        groups = None if self.groups is None else self.groups.scaled(factor)
        head, attention = self.head.scaled(factor), self.attention.scaled(factor)
        return Costs(self.rows.scaled(factor), groups, head, attention, self.n_groups)

    def fullest(self, batch: StepBatch) -> StepBatch:
        """The batch as if every group had as much of prompts as the fullest; of one group the batch itself."""
        return batch if self.n_groups is None else of_fullest(batch, self.n_groups)


@pytree
class MixedStep:
    """The step of one instance. Every field is traced; shape () or a leading vmap axis."""

    rows_s: Curve  # T over the rows of a step [s]: collectives as the engine does them
    groups_s: Curve | None  # G over the rows of as many as the fullest group [s]; None: one group
    head_s: Curve  # H over the rows whose next token is asked for [s]
    attention_s: AttentionCost  # [s]
    window_tokens: Array  # length of the sliding window; 0 without [tokens]
    n_layers: Array  # that a step passes [-]
    host: HostLaw
    costs: Costs  # of operators timed alone, at the top clock

    @property
    def every_row_s(self) -> Curve:
        """T + G, of rows that are dealt out evenly [s]."""
        return self.rows_s if self.groups_s is None else self.rows_s + self.groups_s

    def layers_s(self, n: ArrayLike, batch: StepBatch, fullest: StepBatch) -> Array:
        """T + G of `n` rows beside a batch's prompts [s]."""
        rows_s = self.rows_s(n + batch.prompt_tokens)
        return rows_s if self.groups_s is None else rows_s + self.groups_s(n + fullest.prompt_tokens)

    def gpu_s(self, batch: StepBatch) -> Array:
        """What the operators take, before kappa [s]."""
        fullest = self.costs.fullest(batch)
        beside_s = of_ends(self.head_s, batch) + self.attention_s.of(fullest)
        return self.layers_s(batch.n_active, batch, fullest) + beside_s

    def step_s(self, batch: StepBatch) -> Array:
        """The step in the serving engine [s]."""
        rows = batch.n_active + batch.prompt_tokens
        return self.host.step_of_s(self.gpu_s(batch), self.n_layers, batch.n_active, has_prompt(batch), rows)

    def clocked_s(self, batch: StepBatch, clock_frac: ArrayLike) -> Array:
        """This step, of the top clock, on cores at `clock_frac` of it, each batch at its own [s]."""
        slower_s = (1.0 / clock_frac - 1.0) * self.parts(batch).peak_s.sum(axis=0)
        rows, gpu_s = batch.n_active + batch.prompt_tokens, self.gpu_s(batch) + slower_s
        return self.host.step_of_s(gpu_s, self.n_layers, batch.n_active, has_prompt(batch), rows)

    def at_clock(self, clock_frac: ArrayLike) -> "MixedStep":
        """On cores at `clock_frac` of their top clock: its FLOPs at the peak take 1 / f as long."""
        longer = 1.0 / clock_frac - 1.0
        rows_s, head_s, attention_s = self.costs.peak_s
        groups_s, slower_s = self.costs.groups_peak_s, None
        if self.groups_s is not None and groups_s is not None:
            rows_s, slower_s = rows_s + groups_s.scaled(-1.0), self.groups_s + groups_s.scaled(longer)
        return replace(
            self,
            rows_s=self.rows_s + rows_s.scaled(longer),
            groups_s=slower_s,
            head_s=self.head_s + head_s.scaled(longer),
            attention_s=self.attention_s + attention_s.scaled(longer),
        )

    def parts(self, batch: StepBatch) -> Amounts:
        """Seconds, bytes, FLOPs and those at the peak, each by operator class [class], of operators timed alone at the
        top clock."""
        return self.costs.of(broadcast(batch))


@pytree
class OperatorDecode(DecodeLaw):
    """The step of a batch without prompts, with no more in it than a search asks for."""

    rows_s: Curve  # T + H over the sequences [s]
    compute_s: Curve  # of it, the FLOPs at the peak [s]
    attention_s: AttentionCost
    attention_compute_s: AttentionCost
    window_tokens: Array
    n_layers: Array
    host: HostLaw

    def step_s(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        windowed_tokens = jnp.minimum(context_tokens, self.window_tokens)
        return self.batch_s(n_active, n_active * context_tokens, n_active * windowed_tokens)

    def batch_s(self, n_active: ArrayLike, tokens: ArrayLike, windowed_tokens: ArrayLike) -> Array:
        gpu_s = self.rows_s(n_active) + self.attention_s.decoding(n_active, tokens, windowed_tokens)
        return self.host.step_of_s(gpu_s, self.n_layers, n_active)

    def seen_tokens(self, context_tokens: Array) -> Array:
        return jnp.minimum(context_tokens, self.window_tokens.astype(context_tokens.dtype))

    def of_step(self, step: Any) -> "OperatorDecode":
        """That of a law of iterations which differs in its inputs alone."""
        return replace(self, host=step.inputs.host)

    def at_clock(self, prefill: "Prefill", clock_frac: ArrayLike) -> "OperatorDecode":
        """Its FLOPs at the peak take 1 / f as long."""
        longer = 1.0 / clock_frac - 1.0
        attention_s = self.attention_s + self.attention_compute_s.scaled(longer)
        return replace(self, rows_s=self.rows_s + self.compute_s.scaled(longer), attention_s=attention_s)


def decode_of(step: MixedStep) -> OperatorDecode:
    """The decode step of an engine whose mixed step is `step`."""
    of_rows, of_head, of_attention = step.costs.peak_s
    return OperatorDecode(
        rows_s=step.every_row_s + step.head_s,
        compute_s=of_rows + of_head,
        attention_s=step.attention_s,
        attention_compute_s=of_attention,
        window_tokens=step.window_tokens,
        n_layers=step.n_layers,
        host=step.host,
    )
