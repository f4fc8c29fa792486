"""A CDF of total request length, integrated exactly: no random draws."""

import numpy as np

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.workload.atoms import OUTPUT_SHARE, Workload, make_workload, split_total

MAX_CDF_ATOMS = 65_536
MAX_CDF_TOKENS = 16_777_216
MAX_KNOTS = 1_048_576  # one for each length up to a million tokens


def check_cdf(where: str, knots: list[tuple[float, float]]) -> None:
    """Refuse knots [(tokens, cumulative fraction)] that are no CDF of whole token counts, with one clear line."""
    if len(knots) == 0:
        raise BadInput(where, "the CDF is empty", "need at least one [tokens, fraction] pair, the last at fraction 1")
    tokens, fractions = np.asarray(knots, dtype=float).T
    with np.errstate(invalid="ignore"):
        whole = (tokens >= 1) & (tokens <= MAX_CDF_TOKENS) & (tokens == np.floor(tokens))
        sensible = np.isfinite(fractions) & (fractions >= 0)
        rising, falling = np.diff(tokens) > 0, np.diff(fractions) < 0
    if not (whole & sensible).all():
        i = int(np.argmin(whole & sensible))
        if whole[i]:
            raise BadInput(f"{where}, knot {i + 1}", f"fraction = {knots[i][1]}", "need 0..1")
        hint = "; a histogram's open bucket: put the longest length in its place" if tokens[i] == np.inf else ""
        problem = f"tokens = {knots[i][0]}"
        raise BadInput(f"{where}, knot {i + 1}", problem, f"need a whole number 1..{MAX_CDF_TOKENS}{hint}")
    if fractions.max() > 1 + 1e-9:
        hint = "; it looks like percent: divide by 100" if 50 <= fractions.max() <= 100 else ""
        raise BadInput(where, f"fraction = {fractions.max():g} is above 1", f"need 0..1{hint}")
    if not rising.all():
        i = int(np.argmin(rising))
        raise BadInput(
            f"{where}, knot {i + 2}", f"tokens fall from {tokens[i]:g} to {tokens[i + 1]:g}", "need rising tokens"
        )
    if falling.any():
        i = int(np.argmax(falling))
        raise BadInput(
            f"{where}, knot {i + 2}",
            f"fraction falls from {fractions[i]:g} to {fractions[i + 1]:g}",
            "a CDF never falls",
        )
    if abs(fractions[-1] - 1) > 1e-9:
        raise BadInput(where, f"the CDF ends at fraction {fractions[-1]:g}", "need 1")


def cdf_workload(
    knots: list[tuple[float, float]], *, arrival_rate_per_s: float, output_share: float = OUTPUT_SHARE
) -> Workload:
    """Atoms at the whole lengths 1..last knot, P(L) = F(L) - F(L - 1) with F linear between knots and F(0) = 0.

    Above 65,536 tokens, that many equally wide cells, each at its exact mean. Prompt and output follow the output
    share. Lengths without mass are dropped, but the last knot stays the longest request the fleet must promise.
    """
    tokens, fractions = (np.concatenate([[0.0], x]) for x in np.asarray(knots, dtype=float).T)
    longest = int(tokens[-1])
    length = np.arange(1, longest + 1, dtype=float)
    mass = np.diff(np.interp(np.arange(longest + 1), tokens, fractions))
    stride = -(-longest // MAX_CDF_ATOMS)
    if stride > 1:
        starts = np.arange(0, longest, stride)
        cell_mass = np.add.reduceat(mass, starts)
        moment = np.add.reduceat(mass * length, starts)
        mass, length = cell_mass[cell_mass > 0], moment[cell_mass > 0] / cell_mass[cell_mass > 0]
    used = mass > 0
    prompt, output = split_total(length[used], output_share)
    return make_workload(prompt, output, mass[used], arrival_rate_per_s=arrival_rate_per_s, longest_tokens=longest)
