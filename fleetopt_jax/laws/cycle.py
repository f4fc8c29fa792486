"""Prompts in the iterations of an instance: what one takes by itself, and what it adds where others share iterations.

Of an iteration with m prompts in the mean, Poisson, the share h = 1 - exp(-m) has any, and those have k = m / h each.
What a prompt adds is then, in the mean over prompts,

    s(m) = E[c / k (t(n, P / c) - t(n))],   P = a prompt and k - 1 mean ones,   c = max(1, P / budget)

t the mixed step of n decoding sequences, c the iterations that the P tokens fill: c = 1 below a budget, and no
fraction of an iteration is lost to rounding up. A lone prompt pays what a step with prompts costs however few there are
(m -> 0: k = 1); prompts that meet share that (m -> inf: only the slope of a full budget is left). Where t adds up
(`fleet/step_law.py`), s is tau1 E[p] + tau2 E[p^2], whatever m.
"""

import math
from dataclasses import replace
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.laws.mixed_step import StepBatch
from fleetopt_jax.laws.operators.attention import causal_pairs
from fleetopt_jax.laws.step_law import StepLaw, stacked, without_prompts

TOGETHER = (1.0, 2.0, 8.0)  # prompts of an iteration that tables are made for
Z99 = 2.326  # sigmas that 99 % of a normal distribution stay below
GAUSS = 0.5 / math.sqrt(3.0)  # from the middle of an interval to the points of its quadrature with two, of its length


@pytree
class Prompt:
    """A prompt, or the mean of many. Fields traced, any common shape."""

    tokens: Array
    pairs: Array  # of tokens that see each other [tokens^2]
    windowed_pairs: Array  # the same, cut by the sliding window [tokens^2]


@pytree
class PromptKinds:
    """Prompts in a few kinds [G]. May have leading vmap axes."""

    mass: Array  # share of the requests, sums to 1 (0 without traffic) [-]
    tokens: Array  # mean; 0 where a kind has none
    square_tokens2: Array  # mean square


def prompt_of(
    tokens: ArrayLike, square_tokens2: ArrayLike, window_tokens: ArrayLike, past_tokens: ArrayLike = 0.0
) -> Prompt:
    """Prompts of a mean length and mean square, less that of what is done, `past_tokens`; layers with a window see
    those of the mean length."""
    tokens = jnp.asarray(tokens, dtype=float)
    return Prompt(
        tokens, cast(Array, (square_tokens2 + tokens) / 2.0), causal_pairs(tokens, past_tokens, window_tokens)
    )


def with_prompt(beside: StepBatch, prompt: Prompt, times: ArrayLike = 1.0) -> StepBatch:
    """The batch with so much of a prompt in it."""
    return replace(
        beside,
        prompt_tokens=beside.prompt_tokens + times * prompt.tokens,
        prompt_pairs=beside.prompt_pairs + times * prompt.pairs,
        windowed_pairs=beside.windowed_pairs + times * prompt.windowed_pairs,
    )


@pytree
class Company:
    """Whom prompts share their iterations with. Any common shape."""

    short: Array  # k, prompts of an iteration, for a prompt that came during one without prompts [-]
    long: Array  # the same, of one that came during one with some [-]
    meet_long: Array  # share of the prompts that did [-]

    @property
    def one_in(self) -> Array:
        """1 / k in the mean over prompts [-]."""
        return 1.0 / self.short + self.meet_long * (1.0 / self.long - 1.0 / self.short)

    def of(self, at: Array) -> Array:
        """The mean of what is known of iterations with TOGETHER prompts [len(TOGETHER), ...]."""
        of_short = of_prompts(at, self.short)
        return of_short + self.meet_long * (of_prompts(at, self.long) - of_short)


def alone() -> Company:
    """Each prompt in an iteration of its own."""
    return Company(jnp.ones(()), jnp.ones(()), jnp.zeros(()))


def alone_s(
    law: StepLaw, beside: StepBatch, prompt: Prompt, budget_tokens: ArrayLike, first: StepBatch | None = None
) -> Array:
    """From the begin of its first iteration to its first token [s]: all iterations of a prompt, in chunks of at most a
    budget of tokens, beside sequences that decode; the first one beside `first`, where others' prompts are in it."""
    chunks = jnp.maximum(1.0, prompt.tokens / budget_tokens)
    share = replace(prompt, pairs=prompt.pairs / chunks, windowed_pairs=prompt.windowed_pairs / chunks)
    whole = with_prompt(beside, replace(share, tokens=jnp.asarray(budget_tokens)))
    last = replace(share, tokens=jnp.minimum(prompt.tokens, budget_tokens))
    whole_s, last_s = law.step_s(stacked(whole, with_prompt(beside if first is None else first, last)))
    return (chunks - 1.0) * whole_s + last_s


def together(per_cycle: ArrayLike) -> Array:
    """k, prompts of an iteration that has any, of `per_cycle` in the mean."""
    m = jnp.maximum(jnp.asarray(per_cycle, dtype=float), 1e-9)
    return m / -jnp.expm1(-m)


def beside_s(law: StepLaw, batch: StepBatch, prompt: Prompt, budget_tokens: ArrayLike) -> Array:
    """What a prompt adds to iterations that begin with `batch`, others' prompts in it or none [s]."""
    return alone_s(law, without_prompts(batch), prompt, budget_tokens, batch) - law.step_s(batch)


def mates(n: ArrayLike, kinds: PromptKinds) -> tuple[Array, Array]:
    """Mean prompts beside which one is added, from the first after another to the last of as many as n prompts in the
    mean, Poisson, have the tokens of at most 99 % of the time: the two points of Gauss between them, so that what such
    a crowd adds is right together."""
    mean, square = jnp.sum(kinds.mass * kinds.tokens), jnp.sum(kinds.mass * kinds.square_tokens2)
    crowd = n + Z99 * jnp.sqrt(jnp.maximum(n * safe_div(square, mean**2), 1e-12))
    more = jnp.maximum(crowd - 1.0, 0.0)
    return 1.0 + (0.5 - GAUSS) * more, 1.0 + (0.5 + GAUSS) * more


def added_s(
    law: StepLaw, beside: StepBatch, mean: Prompt, kinds: tuple[Prompt, Array], n_prompts: ArrayLike, budget: ArrayLike
) -> Array:
    """s [s] of a prompt in an iteration with `n_prompts`, k: the equation above. `kinds` of prompts and the share of
    each [G], of whom `mean` is the mean; `beside` and `n_prompts` of any common shape."""
    weight, batch = _met(beside, mean, kinds, n_prompts, budget)
    return jnp.sum(weight * law.added_s(batch), axis=-1)


def prompts_only_s(
    law: StepLaw, mean: Prompt, kinds: tuple[Prompt, Array], n_prompts: ArrayLike, budget: ArrayLike
) -> Array:
    """The share of a prompt in iterations with `n_prompts`, k, and nobody who decodes [s]: E[c / k t(P / c)], all of an
    iteration that would not be without them. Arguments as in `added_s`."""
    weight, batch = _met(nobody(), mean, kinds, n_prompts, budget)
    return jnp.sum(weight * law.step_s(batch), axis=-1)


def prompts_only_w(law: StepLaw, prompt: Prompt, n_prompts: ArrayLike, budget_tokens: ArrayLike) -> Array:
    """Board power of one GPU in such iterations, each prompt the mean one [W]."""
    chunks = jnp.maximum(1.0, n_prompts * prompt.tokens / budget_tokens)
    batch = with_prompt(nobody(), prompt, n_prompts / chunks)
    return safe_div(law.gpu_j(batch), law.step_s(batch))


def nobody() -> StepBatch:
    """A batch in which nothing is."""
    return StepBatch(*(jnp.zeros(()) for _ in range(6)))


def of_prompts(at_s: Array, n_prompts: ArrayLike) -> Array:
    """What is known of iterations with TOGETHER prompts [len(TOGETHER)], of one with `n_prompts`: the parabola in one
    over their number, which is a line where an iteration costs so much and each prompt so much."""
    u = 1.0 / jnp.asarray(n_prompts)
    one, two, many = (1.0 / k for k in TOGETHER)
    return (
        at_s[0] * (u - two) * (u - many) / ((one - two) * (one - many))
        + at_s[1] * (u - one) * (u - many) / ((two - one) * (two - many))
        + at_s[2] * (u - one) * (u - two) / ((many - one) * (many - two))
    )


def added(
    law: StepLaw, beside: StepBatch, mean: Prompt, kinds: tuple[Prompt, Array], n_prompts: ArrayLike, budget: ArrayLike
) -> tuple[Array, Array]:
    """(s, what a prompt adds to one GPU's energy) [s, J]; arguments as in `added_s`, but for one `beside`."""
    weight, batch = _met(beside, mean, kinds, n_prompts, budget)
    seconds, joules = law.step_s(batch) - law.step_s(beside), law.gpu_j(batch) - law.gpu_j(beside)
    return jnp.sum(weight * seconds, axis=-1), jnp.sum(weight * joules, axis=-1)


def _met(
    beside: StepBatch, mean: Prompt, kinds: tuple[Prompt, Array], n_prompts: ArrayLike, budget: ArrayLike
) -> tuple[Array, StepBatch]:
    """(what counts of an iteration for a prompt of each kind, that iteration) [..., G]."""
    prompts, mass = kinds
    k = jnp.asarray(n_prompts)[..., None]
    beside = jax.tree.map(lambda x: jnp.asarray(x)[..., None], beside)
    met = jax.tree.map(lambda one, mean: one + (k - 1.0) * mean, prompts, mean)
    chunks = jnp.maximum(1.0, met.tokens / budget)
    return mass * chunks / k, with_prompt(beside, met, 1.0 / chunks)
