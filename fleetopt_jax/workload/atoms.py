"""A workload is weighted atoms: every pool statistic is a weighted sum over them, exact and differentiable."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import whole_down
from fleetopt_jax.core.struct import as_floats, namespace, pytree

if TYPE_CHECKING:
    from fleetopt_jax.workload.reuse import Reuse

FEWEST_ATOMS = 64  # that programs are compiled for
OUTPUT_SHARE = 0.2  # the published 80 / 20 split of a request's total length


@pytree
class Workload:
    """Requests of J kinds. Atoms are sorted by total length; weights sum to 1. Leaves traced, shapes [J] and ()."""

    prompt_tokens: Array  # [J]
    output_tokens: Array  # [J]
    weight: Array  # share of the requests, [J]
    arrival_rate_per_s: Array  # mean arrival rate [1/s]
    arrival_scv: Array  # squared CV of inter-arrival times; no published law reads it (all are Poisson) [-]
    longest_tokens: Array  # the longest total length the fleet must serve (declared or seen) [tokens]
    by_prompt: Array  # the atoms in order of their prompts, made once; as floats, so that all of it differentiates [J]
    reuse: "Reuse | None" = None  # of prompts, where it is known
    routed_tokens: Array | None = None  # what sticky sessions are routed by, where it was read with them [J]


def make_workload(
    prompt_tokens: ArrayLike | Sequence[float],
    output_tokens: ArrayLike | Sequence[float],
    weight: ArrayLike | Sequence[float] | None = None,
    *,
    arrival_rate_per_s: float,
    arrival_scv: float = 1.0,
    longest_tokens: float | None = None,
    reuse: "Reuse | None" = None,
    routed_tokens: ArrayLike | None = None,
) -> Workload:
    """A checked, sorted `Workload`. Equal weights if none are given; weights are normalised to sum to 1.

    Lengths [J] in tokens, `arrival_rate_per_s` in requests per second; `reuse` (`workload.reuse`) in the order of the
    lengths, as `routed_tokens` (`workload.conversations`). Raises ValueError that names what is wrong.

    >>> chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    >>> float(chat.longest_tokens)
    4300.0
    """
    prompt, output = (np.atleast_1d(np.asarray(x, dtype=float)) for x in (prompt_tokens, output_tokens))
    weights = np.ones_like(prompt) if weight is None else np.atleast_1d(np.asarray(weight, dtype=float))
    if not (prompt.ndim == 1 and prompt.size and prompt.shape == output.shape == weights.shape):
        raise ValueError(
            f"need equal, non-empty 1-D arrays, got shapes {prompt.shape}, {output.shape}, {weights.shape}"
        )
    # An 80 / 20 split of a one-token request leaves no output token: zero is allowed here, not in a trace file.
    for name, values, lowest in (("prompt_tokens", prompt, 1.0), ("output_tokens", output, 0.0)):
        good = np.isfinite(values) & (values >= lowest)
        if not good.all():
            raise ValueError(f"need finite {name} >= {lowest:g}, got {values[np.argmin(good)]:g}")
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise ValueError("need finite weights >= 0 with a positive sum")
    if not (math.isfinite(arrival_rate_per_s) and arrival_rate_per_s > 0):
        raise ValueError(f"need a positive, finite arrival_rate_per_s, got {arrival_rate_per_s}")
    if not (math.isfinite(arrival_scv) and arrival_scv >= 0):
        raise ValueError(f"need a finite arrival_scv >= 0, got {arrival_scv}")
    total = prompt + output
    longest = float(total.max()) if longest_tokens is None else float(longest_tokens)
    if not total.max() <= longest < math.inf:
        raise ValueError(
            f"need a finite longest_tokens, got {longest:g}, not below the longest atom of {total.max():g}"
        )
    routed = None if routed_tokens is None else np.asarray(routed_tokens, dtype=float)
    if routed is not None and not (routed.shape == total.shape and (routed >= total * (1.0 - 1e-9)).all()):
        raise ValueError("need routed_tokens of every atom, none below its prompt and output")
    order = np.lexsort((output, total))
    return Workload(
        **as_floats(
            by_prompt=np.argsort(prompt[order], kind="stable"),
            prompt_tokens=prompt[order],
            output_tokens=output[order],
            weight=weights[order] / weights.sum(),
            arrival_rate_per_s=arrival_rate_per_s,
            arrival_scv=arrival_scv,
            longest_tokens=longest,
        ),
        reuse=None if reuse is None else reuse.in_order(order),
        routed_tokens=None if routed is None else cast(Array, np.maximum(routed, total)[order]),
    )


def total_tokens(workload: Workload) -> Array:
    """Prompt plus output of each atom [tokens], shape [J], non-decreasing."""
    return workload.prompt_tokens + workload.output_tokens


def grown_routed_tokens(workload: Workload, prompt_tokens: Array, output_tokens: Array) -> Array | None:
    """What sticky sessions are routed by where the atoms have these lengths instead [tokens] [J]: a conversation's
    first turn grows as the turn itself does. None where it is not known."""
    if workload.routed_tokens is None:
        return None
    return workload.routed_tokens * (prompt_tokens + output_tokens) / total_tokens(workload)


def mean_tokens(workload: Workload) -> tuple[Array, Array]:
    """(mean prompt, mean output) [tokens]."""
    xp = namespace(workload)
    return (
        xp.sum(workload.weight * workload.prompt_tokens),
        xp.sum(workload.weight * workload.output_tokens),
    )


def digest(workload: Workload) -> str:
    """A name of the requests' lengths and burstiness, whatever their rate: the same for the same atoms.

    In single precision, so that the order of a sum does not change it.
    """
    parts = (workload.prompt_tokens, workload.output_tokens, workload.weight, workload.arrival_scv)
    content = b"".join(np.asarray(part, dtype="<f4").tobytes() for part in (*parts, workload.longest_tokens))
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def share_above(workload: Workload, tokens: ArrayLike) -> Array:
    """Share of the requests whose total length exceeds `tokens` [-]."""
    xp = namespace(workload, tokens)
    return xp.sum(xp.where(total_tokens(workload) > tokens, workload.weight, 0.0))


def split_total(total: ArrayLike, output_share: ArrayLike = OUTPUT_SHARE, *, whole: bool = True) -> tuple[Array, Array]:
    """(prompt, output) of requests of total length L: prompt = max(1, floor((1 - share) L)), output the rest."""
    xp = namespace(total, output_share)
    prompt = xp.maximum(1.0, whole_down((1.0 - output_share) * xp.asarray(total), whole=whole))
    return prompt, total - prompt


def rounded_up(workload: Workload) -> Workload:
    """The same requests in a power of two of atoms, the last one repeated without weight, so that workloads of many
    sizes share the programs that sum over them; as it is where its reuse is known, or inside a program."""
    columns = {name: getattr(workload, name) for name in ("prompt_tokens", "output_tokens", "weight", "by_prompt")}
    if workload.reuse is not None or not all(isinstance(x, np.ndarray) for x in columns.values()):
        return workload
    n = len(workload.weight)
    more = np.arange(n, max(FEWEST_ATOMS, 1 << (n - 1).bit_length()))
    rows = np.append(np.arange(n), np.full(len(more), n - 1))
    place = int(np.flatnonzero(columns["by_prompt"] == n - 1)[0])
    columns |= {name: columns[name][rows] for name in ("prompt_tokens", "output_tokens")}
    columns["weight"] = np.append(columns["weight"], np.zeros(len(more)))
    columns["by_prompt"] = np.insert(columns["by_prompt"], place + 1, more)
    routed = None if workload.routed_tokens is None else np.asarray(workload.routed_tokens)[rows]
    return dataclasses.replace(workload, **as_floats(**columns), routed_tokens=routed)


def with_rate(workload: Workload, arrival_rate_per_s: ArrayLike) -> Workload:
    """The same requests arriving at another rate [1/s]."""
    return dataclasses.replace(workload, **as_floats(arrival_rate_per_s=arrival_rate_per_s))
