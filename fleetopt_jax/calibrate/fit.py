"""Least squares of the decode law and the power law on relative errors; what the data cannot tell is said aloud.

    minimise sum r_i^2,  r_i = law(theta; n_i, L_i) / measured_i - 1,  cov(theta) = r'r / (m - p) (J'J)^-1

with J the Jacobian of the differentiable law, by Levenberg and Marquardt (Marquardt, SIAM J. Appl. Math. 11, 1963).
Standard errors hold for independent errors of equal relative size. Leave-one-out errors refit without each point.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fleetopt_jax.calibrate.measurements import Measurements
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.laws.decode import DecodeStep, make_decode_step
from fleetopt_jax.laws.power import LogisticPower, make_logistic_power

Form = Literal["dense", "moe", "benchmark"]
Predict = Callable[[Mapping[str, Array], Array, Array], Array]  # (parameters, batch, context) -> what is measured

ITERATIONS = 100  # the laws need 5 to 30; more cost nothing
CONDITION_MAX = 1e5  # of the Jacobian with columns of length one: beyond, parameters cannot be told apart
CONTEXT_SPREAD = 1.5  # longest over shortest context, at about the same batch, that tells the cost of a token
SAME_BATCH = 1.1  # ratio of batches that count as the same
SIGNIFICANT = 2.0  # standard errors
DOUBLINGS_BEYOND = 2.0  # how far outside the measured batches a midpoint may lie


@dataclass(frozen=True)
class Fit:
    """What least squares says. Residuals are predicted / measured - 1."""

    names: tuple[str, ...]  # of the fitted parameters, in the order of `covariance`
    parameters: dict[str, float]  # the fitted and the given ones
    covariance: np.ndarray
    batch: np.ndarray  # of the points
    residuals: np.ndarray
    left_out: np.ndarray  # residual of each point, predicted from the others

    @property
    def estimates(self) -> dict[str, float]:
        return {name: self.parameters[name] for name in self.names}

    @property
    def standard_errors(self) -> dict[str, float]:
        return dict(zip(self.names, np.sqrt(np.diag(self.covariance)).tolist()))

    @property
    def mape(self) -> float:
        return float(np.abs(self.residuals).mean())

    @property
    def max_ape(self) -> float:
        return float(np.abs(self.residuals).max())

    @property
    def leave_one_out_mape(self) -> float:
        return float(np.abs(self.left_out).mean())


@dataclass(frozen=True)
class DecodeFit(Fit):
    notes: tuple[str, ...]  # what the data could not tell
    form: Form
    context_tokens: float | None  # mean of the measured contexts, where `per_seq_at_context_s` holds
    step: DecodeStep


@dataclass(frozen=True)
class PowerFit(Fit):
    notes: tuple[str, ...]
    identified: bool  # False: a parameter is set, not fitted, and the notes say why
    power: LogisticPower


def fit_decode(
    measurements: Measurements, *, form: Form = "dense", expert_share: float = 0.0, per_token_s: float | None = None
) -> DecodeFit:
    """Fit t = base + [expert c(n)] + n h, h = per_seq + per_token L, reported at the mean measured context.

    `per_token_s` (the law's) is used where the contexts do not tell it: where they hardly vary, or only along with the
    batch, as in a benchmark whose windows get shorter. Contexts without the prompt serve for their mean alone: the fit
    is that of W + h n. Without known contexts h is the cost of a sequence at any.
    """
    where, batch, contexts = measurements.source, measurements.batch, measurements.context_tokens
    if form == "moe" and not 0 < expert_share < 1:
        raise BadInput("expert_share", f"{expert_share}", "need the share k / E of the experts a token uses, in (0, 1)")
    names = ("base_s", "per_seq_at_context_s", *(("expert_s",) if form == "moe" else ()))
    _require_points(where, batch, len(names) + 1, f"the {form} decode law")
    known = {
        "expert_s": 0.0,
        "expert_share": expert_share if form == "moe" else 0.0,
        "mean_context": 0.0 if contexts is None else float(contexts.mean()),
        "per_token_s": 0.0 if contexts is None else per_token_s or 0.0,
        "proportional": 0.0,
    }
    solved, notes = _solve_step(measurements, names, known)
    _refuse_step(where, solved)
    errors = solved.standard_errors
    notes += [
        f"{name} cannot be told from 0"
        for name, value in solved.estimates.items()
        if value < SIGNIFICANT * errors[name]
    ]
    return DecodeFit(
        **vars(solved),
        notes=(*measurements.notes, *notes),
        form=form,
        context_tokens=None if contexts is None else known["mean_context"],
        step=make_decode_step(**_step_fields(solved.parameters)),
    )


def _solve_step(
    measurements: Measurements, names: tuple[str, ...], known: Mapping[str, float]
) -> tuple[Fit, list[str]]:
    """The least squares of the decode step, with the cost of a context token where the points tell it; and notes."""
    where, batch, contexts = measurements.source, measurements.batch, measurements.context_tokens
    start = {"base_s": measurements.step_s.min(), "per_seq_at_context_s": 0.0, "expert_s": 0.0, "per_token_s": 0.0}
    whole = contexts is not None and not measurements.context_is_partial
    seen = contexts if contexts is not None and whole else np.full_like(batch, known["mean_context"])
    solve = partial(_solve, where, _predict_step, starts=[start], data=(batch, seen, measurements.step_s))
    solved, notes = None, []
    if contexts is not None:
        reason = f"no batch was measured at two whole contexts a factor {CONTEXT_SPREAD} apart"
        if whole and len(batch) >= len(names) + 2 and _context_spread(batch, contexts) >= CONTEXT_SPREAD:
            solved, reason = _if_told(solve, (*names, "per_token_s"), known), "it cannot be told from 0"
            if solved and solved.parameters["per_token_s"] < SIGNIFICANT * solved.standard_errors["per_token_s"]:
                solved = None
        if solved is None:
            given = f"{known['per_token_s']:.3g} s as given" if known["per_token_s"] else "0, the step ignores it"
            notes.append(f"the cost of a context token is {given}: {reason}")
    solved = solved or solve(names, known)
    if _step_fields(solved.parameters)["per_seq_s"] < 0 < solved.parameters["per_seq_at_context_s"]:
        solved = solve(names, {**known, "per_token_s": 0.0, "proportional": 1.0})
        notes = ["all of the cost of a sequence is put on its context: a share of its own would be negative"]
    return solved, notes


def _refuse_step(where: str, solved: Fit) -> None:
    """Refuse a decode step that is not physical."""
    at_context_s, base_s = solved.parameters["per_seq_at_context_s"], solved.parameters["base_s"]
    if at_context_s <= 0:
        raise BadInput(where, f"one more sequence costs {at_context_s:.3g} s", "need a step that grows with the batch")
    if base_s <= 0:
        raise BadInput(where, f"the step at batch 0 comes out as {base_s:.3g} s", "need more points at small batches")
    if solved.parameters["expert_s"] < 0:
        raise BadInput(where, "streaming the experts comes out at a negative time", "fit the dense form")


def fit_power(measurements: Measurements, *, limit_w: float = math.inf) -> PowerFit:
    """Fit P(n) = idle + (nominal - idle) / (1 + exp(-(log2 n - x0))) per GPU; `idle` is the law's limit, not a reading.

    Where the batches do not show both bends a parameter is set, and the fit says so: `nominal` to `limit_w`, the most
    a board draws, where it would lie above; else x0 to the middle of the measured doublings.
    """
    where, batch, watts = measurements.source, measurements.batch, measurements.power_w_per_gpu
    if watts is None:
        raise BadInput(where, "no column of power", "need power_w_per_gpu, avg_power_per_gpu_w or power_w with n_gpus")
    _require_points(where, batch, 3, "the power law")
    low, high = (float(np.log2(max(1.0, n))) for n in (batch.min(), batch.max()))
    start = {"idle_w": watts.min(), "nominal_w": watts.max()}
    starts = [start | {"log2_half_batch": low + share * (high - low)} for share in (0.1, 0.5, 0.9)]
    solve = partial(_solve, where, _predict_power, starts=starts, data=(batch, np.zeros_like(batch), watts))
    why, note = "3 points for 3 parameters", ""
    solved = _if_told(solve, ("idle_w", "nominal_w", "log2_half_batch"), {}) if len(batch) > 3 else None
    if len(batch) > 3:
        why = _why_not(solved, low, high, limit_w)
    if why and solved and solved.parameters["nominal_w"] > limit_w:
        note = f"nominal_w is set to the most a board draws, not fitted: {why}"
        solved = _if_told(solve, ("idle_w", "log2_half_batch"), {"nominal_w": limit_w})
        why = _why_not(solved, low, high, limit_w)
    if why or solved is None:
        note = f"log2_half_batch is set to the middle of the measured batches, not fitted: {why}"
        solved = solve(("idle_w", "nominal_w"), {"log2_half_batch": (low + high) / 2})
    idle_w, nominal_w = solved.parameters["idle_w"], solved.parameters["nominal_w"]
    if not 0 <= idle_w < nominal_w:
        problem = f"power would go from {idle_w:.4g} W to {nominal_w:.4g} W as the batch grows"
        raise BadInput(where, problem, "need a power that rises with the batch, from 0 W or more; or leave it out")
    power = make_logistic_power(**solved.parameters)
    return PowerFit(**vars(solved), notes=(note,) if note else (), identified=not note, power=power)


def predict_step_s(fit: DecodeFit, batch: np.ndarray, context_tokens: float) -> np.ndarray:
    """The fitted decode step at other batches [s]."""
    return np.asarray(jax.vmap(fit.step.step_s, (0, None))(jnp.asarray(batch, float), context_tokens))


def predict_power_w(fit: PowerFit, batch: np.ndarray) -> np.ndarray:
    """The fitted power of one GPU at other batches [W]."""
    return np.asarray(jax.vmap(fit.power.gpu_w, (0, None))(jnp.asarray(batch, float), 0.0))


def _why_not(solved: Fit | None, low: float, high: float, limit_w: float) -> str:
    """Why a power fit cannot be used, or nothing."""
    if solved is None:
        return "the parameters cannot be told apart"
    idle_w, nominal_w, x0 = (solved.parameters[name] for name in ("idle_w", "nominal_w", "log2_half_batch"))
    error = solved.standard_errors["log2_half_batch"]
    if not low - DOUBLINGS_BEYOND <= x0 <= high + DOUBLINGS_BEYOND:
        return f"the midpoint would be 2^{x0:.1f} for batches of 2^{low:.1f} to 2^{high:.1f}"
    if error > DOUBLINGS_BEYOND:
        return f"the midpoint would be uncertain by {error:.1f} doublings of the batch"
    if not 0 <= idle_w < nominal_w <= limit_w:
        return f"power would go from {idle_w:.4g} W to {nominal_w:.4g} W"
    return ""


def _require_points(where: str, batch: np.ndarray, least: int, law: str) -> None:
    if len(batch) < least:
        raise BadInput(where, f"{len(batch)} points", f"{law} needs at least {least}")
    if len(np.unique(batch)) == 1:
        raise BadInput(where, f"every point has batch {batch[0]:g}", f"{law} needs several batch sizes")


def _context_spread(batch: np.ndarray, contexts: np.ndarray) -> float:
    """The longest over the shortest context at about the same batch.

    A context that only falls as the batch grows would pass any other curvature of the step off as its own cost.
    """
    same = np.maximum(batch, batch[:, None]) <= SAME_BATCH * np.minimum(batch, batch[:, None])
    return float((contexts / contexts[:, None])[same].max())


def _step_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """`DecodeStep` fields of the parameters; `proportional` = 1 puts all of a sequence's cost on its context."""
    per_seq_s, mean_context, all_of_it = (values[k] for k in ("per_seq_at_context_s", "mean_context", "proportional"))
    per_token_s = values["per_token_s"] + (all_of_it * per_seq_s / (mean_context + (1 - all_of_it)))
    return {
        "base_s": values["base_s"],
        "expert_s": values["expert_s"],
        "expert_share": values["expert_share"],
        "per_seq_s": (1 - all_of_it) * (per_seq_s - per_token_s * mean_context),
        "per_token_s": per_token_s,
    }


def _predict_step(values: Mapping[str, Array], batch: Array, contexts: Array) -> Array:
    step = DecodeStep(**_step_fields(values), windowed_token_s=jnp.zeros(()), window_tokens=jnp.zeros(()))
    return jax.vmap(step.step_s)(batch, contexts)


def _predict_power(values: Mapping[str, Array], batch: Array, contexts: Array) -> Array:
    power = LogisticPower(steepness=jnp.ones(()), **values)
    return jax.vmap(power.gpu_w)(batch, contexts)


class _Alike(BadInput):
    """Points that cannot tell parameters apart."""


def _if_told(solve: Callable[..., Fit], names: tuple[str, ...], known: Mapping[str, float]) -> Fit | None:
    """The fit, or None where the points cannot tell its parameters apart."""
    try:
        return solve(names, known)
    except _Alike:
        return None


def _solve(
    where: str,
    predict: Predict,
    names: tuple[str, ...],
    known: Mapping[str, float],
    *,
    starts: Sequence[Mapping[str, float]],
    data: tuple[np.ndarray, ...],
) -> Fit:
    """The best fit over the starts; `_Alike` where the points cannot tell parameters apart."""
    known = {name: value for name, value in known.items() if name not in names}
    points = jnp.asarray([[start[name] for name in names] for start in starts], float)
    theta, *parts = _least_squares(
        predict, names, *jax.tree.map(partial(jnp.asarray, dtype=float), (known, data)), points
    )
    residuals, jacobian, left_out = (np.asarray(part, float) for part in parts)
    lengths = np.linalg.norm(jacobian, axis=0)
    lengths[lengths == 0] = 1.0
    unit = jacobian / lengths
    _, singular, directions = np.linalg.svd(unit, full_matrices=False)
    # Also without any one point, or the leave-one-out error would not mean anything.
    worst = max(np.linalg.cond(np.delete(unit, i, axis=0)) for i in range(len(unit)))
    if not worst < CONDITION_MAX:
        alike = " and ".join(name for name, weight in zip(names, directions[-1]) if abs(weight) > 0.1)
        raise _Alike(where, f"these points cannot tell {alike} apart", "need more batch sizes, and more different ones")
    inverse = directions.T @ np.diag(singular**-2) @ directions / np.outer(lengths, lengths)
    covariance = residuals @ residuals / (len(residuals) - len(names)) * inverse
    return Fit(names, {**known, **dict(zip(names, theta.tolist()))}, covariance, data[0], residuals, left_out)


@partial(jax.jit, static_argnums=(0, 1))
def _least_squares(predict: Predict, names: tuple[str, ...], known, data, starts: Array) -> tuple[Array, ...]:
    """(theta, residuals, their Jacobian, residuals of points left out), from the best of the starts."""

    def errors(theta):
        batch, contexts, measured = data
        return predict(known | dict(zip(names, theta)), batch, contexts) / measured - 1

    def minimise(weight, start):
        def improve(_, state):
            theta, damping = state
            residuals, jacobian = weight * errors(theta), weight[:, None] * jax.jacfwd(errors)(theta)
            lengths = jnp.linalg.norm(jacobian, axis=0)  # parameters differ by eight decades: columns of length one
            lengths = jnp.where(lengths > 0, lengths, 1.0)
            unit = jacobian / lengths
            normal = unit.T @ unit + damping * jnp.eye(len(names))
            moved = theta - jnp.linalg.solve(normal, unit.T @ residuals) / lengths
            better = jnp.sum((weight * errors(moved)) ** 2) < jnp.sum(residuals**2)  # not where a step is not a number
            damping = jnp.clip(jnp.where(better, 0.1, 10.0) * damping, 1e-15, 1e6)
            return jnp.where(better, moved, theta), damping

        return jax.lax.fori_loop(0, ITERATIONS, improve, (start, jnp.asarray(1e-3)))[0]

    def best(weight):
        found = jax.vmap(minimise, (None, 0))(weight, starts)
        return found[jnp.nanargmin(jnp.sum((weight * jax.vmap(errors)(found)) ** 2, axis=1))]

    without = 1 - jnp.eye(len(data[0]))
    found = jax.vmap(best)(jnp.concatenate([jnp.ones_like(without[:1]), without]))
    theta, left_out = found[0], found[1:]
    return theta, errors(theta), jax.jacfwd(errors)(theta), jnp.diagonal(jax.vmap(errors)(left_out))
