"""Fronts of points of which less is better in every coordinate: who is dominated, how much is won, where it bends.

Plain NumPy over a few hundred points [M, D]: nothing here is worth a compilation.
"""

import numpy as np


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Mask [M] of the points [M, D] that no other equals or betters in all coordinates and betters in one.

    Equal points do not dominate each other; a point with a coordinate that is not finite is never on the front.
    """
    points = np.asarray(points, dtype=float)
    finite = np.all(np.isfinite(points), axis=1)
    known = np.where(finite[:, None], points, np.inf)
    no_worse = np.all(known[:, None, :] <= known[None, :, :], axis=2)
    better = np.any(known[:, None, :] < known[None, :, :], axis=2)
    return finite & ~np.any(no_worse & better, axis=0)


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume of what the points [M, D] dominate below `reference` [D], exact, by slices along the last coordinate.

    A point that is not below the reference in every coordinate adds nothing. O(M^(D-1) log M) (Zitzler and Thiele,
    PPSN 1998).
    """
    points, reference = np.asarray(points, dtype=float), np.asarray(reference, dtype=float)
    inside = np.unique(points[(points < reference).all(axis=1)], axis=0)
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(reference[0] - inside.min())
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    depth = np.diff(np.append(inside[:, -1], reference[-1]))  # of the slice that begins at each point
    if inside.shape[1] == 2:
        return float(np.sum(depth * (reference[0] - np.minimum.accumulate(inside[:, 0]))))
    return sum(
        float(depth[i]) * hypervolume(inside[: i + 1, :-1], reference[:-1]) for i in range(len(inside)) if depth[i] > 0
    )


def knee(points: np.ndarray) -> int | None:
    """Index of the point of a front [M, D] that lies deepest below the chord, None where none lies below it.

    Every coordinate is normalised to 0 at the front's best and 1 at its worst (one that does not vary is left out). The
    chord joins the two extreme points; with three coordinates it is the plane sum(x) = 1 through the unit points. The
    distance is (1 - sum(x)) / sqrt(D): the "maximal bulge" of Das (Structural Optimization 18, 1999). With three
    coordinates a front may lie above the plane everywhere; its deepest point still trades best and is returned.
    """
    points = np.asarray(points, dtype=float)
    if len(points) < 3:
        return None
    best, worst = points.min(axis=0), points.max(axis=0)
    varies = worst > best
    if varies.sum() < 2:
        return None
    x = (points[:, varies] - best[varies]) / (worst - best)[varies]
    distance = (1.0 - x.sum(axis=1)) / np.sqrt(varies.sum())
    deepest = int(np.argmax(distance))
    if varies.sum() == 2 and distance[deepest] <= 1e-12:
        return None
    return deepest
