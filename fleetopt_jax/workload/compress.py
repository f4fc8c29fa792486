"""From millions of requests to a bounded number of atoms, keeping what the metrics are made of."""

import heapq
import itertools

import numpy as np

from fleetopt_jax.workload.atoms import Workload, make_workload

MAX_ATOMS = 8192
TOTAL_EMPHASIS = 4.0  # routing cuts by total length: errors in it count this much more than errors in the output

Atoms = tuple[np.ndarray, np.ndarray, np.ndarray]


def compress(
    prompt_tokens: np.ndarray, output_tokens: np.ndarray, weight: np.ndarray | None = None, max_atoms: int = MAX_ATOMS
) -> Atoms:
    """(prompt, output, weight) of at most `max_atoms` atoms: see `compress_with_members`."""
    return compress_with_members(prompt_tokens, output_tokens, weight, max_atoms)[0]


def compress_with_members(
    prompt_tokens: np.ndarray,
    output_tokens: np.ndarray,
    weight: np.ndarray | None = None,
    max_atoms: int = MAX_ATOMS,
    routed_tokens: np.ndarray | None = None,
) -> tuple[Atoms, np.ndarray]:
    """((prompt, output, weight) of at most `max_atoms` atoms, the atom that each request is in).

    Equal requests are merged first; if that suffices nothing is lost. Otherwise cells are split, the one with the
    largest squared error first, at the mean of its wider coordinate (total or output length, each relative to its root
    mean square), until `max_atoms` cells are left; an atom is the mean of its cell. So mass, mean prompt and mean
    output of every cell are exact, a spike in the data is a cell of its own with no error, and the variance lost is the
    sum of the squared errors the splitting has made small. The order of the input does not matter.

    Requests that are routed by another length than their total are told apart, and cells split, by that as well.
    """
    pairs = np.asarray(prompt_tokens, dtype=float) + 1j * np.asarray(output_tokens, dtype=float)  # sorts in one pass
    weights = np.ones(len(pairs)) if weight is None else np.asarray(weight, dtype=float)
    points, where = np.unique(pairs, return_inverse=True)
    points = np.stack([points.real, points.imag], axis=1)
    if routed_tokens is not None:
        both, where = np.unique(where + 1j * np.asarray(routed_tokens, dtype=float), return_inverse=True)
        points = np.column_stack([points[both.real.astype(int)], both.imag])
    mass = np.bincount(where, weights=weights, minlength=len(points))
    kept = np.cumsum(mass > 0) - 1
    points, mass = points[mass > 0], mass[mass > 0]
    if len(points) <= max_atoms:
        return (points[:, 0], points[:, 1], mass), kept[where]
    lengths = np.stack([points[:, 0] + points[:, 1], *points.T[1:]], axis=1)
    emphasis = np.array([TOTAL_EMPHASIS, 1.0, TOTAL_EMPHASIS])[: lengths.shape[1]]
    scaled = lengths / np.sqrt(np.average(lengths**2, axis=0, weights=mass)) * emphasis
    ticket = itertools.count()  # breaks ties in the heap, so that arrays are never compared
    heap = [_cell(scaled, mass, np.arange(len(points)), next(ticket))]
    while len(heap) < max_atoms and heap[0][0] < 0:
        _, _, members, axis, mean = heapq.heappop(heap)
        below = scaled[members, axis] <= mean
        for side in (members[below], members[~below]):
            heapq.heappush(heap, _cell(scaled[side], mass[side], side, next(ticket)))
    cells = [members for _, _, members, _, _ in heap]
    means = np.array([np.average(lengths[cell, :2], axis=0, weights=mass[cell]) for cell in cells])
    # On a binary grid that doubles hold exactly, prompt + output is the total to the bit: no atom outgrows its cell.
    grid = 2.0 ** (np.ceil(np.log2(lengths.max())) - 51)
    total, output = (np.round(means / grid) * grid).T
    total = np.clip(total, *(np.array([bound(lengths[cell, 0]) for cell in cells]) for bound in (np.min, np.max)))
    atom = np.empty(len(points), int)
    for k, cell in enumerate(cells):
        atom[cell] = k
    return (total - output, output, np.array([mass[cell].sum() for cell in cells])), atom[kept[where]]


def _cell(points: np.ndarray, mass: np.ndarray, members: np.ndarray, ticket: int) -> tuple:
    """A heap entry: (-squared error, tie-break, members, axis to split, where to split)."""
    mean = np.average(points, axis=0, weights=mass)
    error = np.sum(mass[:, None] * (points - mean) ** 2, axis=0)
    axis = int(np.argmax(error))
    splittable = np.ptp(points[:, axis]) > 0
    return (-error[axis] if splittable else 0.0, ticket, members, axis, mean[axis])


def compressed(workload: Workload, max_atoms: int) -> Workload:
    """The workload in at most `max_atoms` atoms, its rate, burstiness and longest request kept."""
    prompt, output, weight = (np.asarray(x) for x in (workload.prompt_tokens, workload.output_tokens, workload.weight))
    return make_workload(
        *compress(prompt, output, weight, max_atoms),
        arrival_rate_per_s=float(workload.arrival_rate_per_s),
        arrival_scv=float(workload.arrival_scv),
        longest_tokens=float(workload.longest_tokens),
    )
