"""Gradient search: relaxed fleets by augmented Lagrangian from many starts at once, then whole windows and instances.

The relaxation has real-valued slots and instances and a soft router whose width is annealed; limits are constraints
c <= 0 with multipliers. All starts run under one `vmap` inside one `lax.scan`, compiled once. The relaxed optima are
snapped to candidate thresholds, searched nearby, and re-evaluated hard: what is returned never rests on the relaxation.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices import SPARE_INSTANCES
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import Objective, cost, evaluate
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.fleet.limits import excesses
from fleetopt_jax.fleet.sizing import size_fleet
from fleetopt_jax.optimize.candidates import Candidate, Progress, Scorer, over_assignments
from fleetopt_jax.optimize.plan import GAMMA_MAX, Found, Problem
from fleetopt_jax.workload.atoms import Workload, make_workload
from fleetopt_jax.workload.compress import compress

N_STARTS = 12
N_STEPS = 300
MULTIPLIER_EVERY = 10  # steps between multiplier updates
LEARNING_RATE = 0.05
PENALTY = 20.0
MAX_EXCESS = 9.0  # a limit missed tenfold pulls no harder
LATENCIES = ("ttft_p99_s", "itl_s")
WIDTHS = (0.3, 0.01)  # log-width of the soft router, first and last step
ROUNDING_RADIUS = 0.12  # windows within this factor of a relaxed optimum are tried when rounding
N_ROUNDED = 8  # relaxed optima that are rounded
RELAXED_ATOMS = 512  # the relaxation sees a workload compressed to this; the re-check sees it whole


class Unknowns(NamedTuple):
    """Unconstrained parameters of a relaxed fleet of K pools."""

    gaps: Array  # [K] softplus gaps between log-windows
    gamma: Array  # [K - 1] logits of gamma between 1 and GAMMA_MAX
    log_instances: Array  # [K]


class Relaxed(NamedTuple):
    """What the relaxation is of."""

    engines: tuple[Engine, ...]
    workload: Workload
    slo: Slo
    window_tokens: Array  # the last pool's window [tokens]
    gamma: Array  # the boundaries' gamma where it is not searched [-]


def search(problem: Problem, progress: Progress | None = None) -> Found:
    """The best rounded candidate over every assignment of engines to pools; never certified optimal."""
    return over_assignments(problem, search_one, progress, "windows near relaxed optima")


def search_one(scorer: Scorer, progress: Progress | None = None) -> tuple[Candidate, bool]:
    """The best rounded candidate of one assignment."""
    problem, k = scorer.problem, scorer.problem.n_pools
    window = problem.window_tokens
    options = scorer.thresholds
    alone = np.full((1, k), window), np.ones((1, k))
    if k == 1:
        return (scorer(*alone)[0], alone[0][0], alone[1][0]), False
    relaxed = Relaxed(
        engines=tuple(choice.engine for choice in scorer.choices),
        workload=coarse(problem.workload),
        slo=problem.slo,
        window_tokens=jnp.asarray(window, dtype=float),
        gamma=jnp.asarray(problem.gamma or 1.0, dtype=float),
    )
    windows, gammas = solve_relaxed(
        relaxed, _starts(problem.workload, k), problem.assumptions, problem.objective, problem.gamma is None
    )
    scorer.n_evaluated += N_STARTS * N_STEPS
    windows, gammas = np.array(windows), np.array(gammas)
    nearest = np.abs(options[:, None, None] - windows[None, :, :-1]).argmin(axis=0)
    windows[:, :-1], windows[:, -1] = options[nearest], window
    gammas = np.round(gammas, 2)
    windows, gammas = np.concatenate([windows, alone[0]]), np.concatenate([gammas, alone[1]])
    costs = scorer(windows, gammas)
    found = []
    order = [i for i in np.argsort(costs) if i < N_STARTS]
    for done, i in enumerate(_distinct(windows, order)[:N_ROUNDED]):
        found.append(scorer.descend(windows[i], gammas[i], radius=ROUNDING_RADIUS))
        if progress:
            progress(done + 1, N_ROUNDED)
    found.append((costs[-1], windows[-1], gammas[-1]))
    return min(found, key=lambda candidate: candidate[0]), False


@partial(jax.jit, static_argnames=("assumptions", "objective", "free_gamma"))
def solve_relaxed(
    relaxed: Relaxed, log_starts: Array, assumptions: Assumptions, objective: Objective, free_gamma: bool
) -> tuple[Array, Array]:
    """(windows, gammas) [S, K] after N_STEPS from the boundaries exp(`log_starts`) [S, K - 1]."""
    real = replace(assumptions, rounding="real")
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, N_STEPS, alpha=0.02))
    widths = WIDTHS[0] * (WIDTHS[1] / WIDTHS[0]) ** (jnp.arange(N_STEPS) / (N_STEPS - 1.0))

    def lagrangian(unknowns: Unknowns, multipliers: Array, width: Array) -> tuple[Array, Array]:
        fleet = _fleet(unknowns, relaxed, free_gamma)
        metrics = evaluate(fleet, relaxed.workload, real, router_width=width)
        pools = metrics.pools
        limits = excesses(pools, relaxed.slo)
        spare = SPARE_INSTANCES[assumptions.occupancy]
        excess = jnp.concatenate(
            [
                jnp.minimum(limits["utilization"], MAX_EXCESS),
                pools.utilization + spare / fleet.n_instances - 1.0,
                # Ratios as logarithms: a tail probability runs over decades.
                *(jnp.atleast_1d(jnp.log(1e-3 + jnp.minimum(limits[name], MAX_EXCESS) + 1.0)) for name in LATENCIES),
            ]
        )
        hinge = jnp.maximum(0.0, multipliers + PENALTY * excess)
        penalty = jnp.sum(hinge**2 - multipliers**2) / (2.0 * PENALTY)
        return jnp.log(cost(metrics, objective)) + penalty, hinge

    def step(state, inputs):
        unknowns, multipliers, momentum = state
        index, width = inputs
        gradient, hinge = jax.grad(lagrangian, has_aux=True)(unknowns, multipliers, width)
        updates, momentum = optimizer.update(gradient, momentum)
        multipliers = jnp.where((index + 1) % MULTIPLIER_EVERY == 0, hinge, multipliers)
        return (optax.apply_updates(unknowns, updates), multipliers, momentum), None

    def solve(log_start: Array) -> tuple[Array, Array]:
        start = _unknowns(log_start, relaxed, real)
        n_latencies = len(LATENCIES) * (len(relaxed.engines) if relaxed.slo.scope == "pool" else 1)
        state = (start, jnp.zeros(2 * len(relaxed.engines) + n_latencies), optimizer.init(start))
        (unknowns, _, _), _ = jax.lax.scan(step, state, (jnp.arange(N_STEPS), widths))
        fleet = _fleet(unknowns, relaxed, free_gamma)
        return fleet.window_tokens, fleet.gamma

    return jax.vmap(solve)(log_starts)


def _fleet(unknowns: Unknowns, relaxed: Relaxed, free_gamma: bool) -> Fleet:
    """Ordered windows between the shortest request and the last window, gamma in its range, positive instances."""
    shortest = relaxed.workload.prompt_tokens[0] + relaxed.workload.output_tokens[0]
    gaps = jnp.cumsum(jax.nn.softplus(unknowns.gaps))
    log_window = jnp.log(shortest) + (jnp.log(relaxed.window_tokens) - jnp.log(shortest)) * gaps / gaps[-1]
    searched = 1.0 + (GAMMA_MAX - 1.0) * jax.nn.sigmoid(unknowns.gamma)
    gamma = searched if free_gamma else jnp.broadcast_to(relaxed.gamma, searched.shape)
    return Fleet(
        engines=relaxed.engines,
        window_tokens=jnp.exp(log_window),
        gamma=jnp.append(gamma, 1.0),
        n_instances=jnp.exp(unknowns.log_instances),
    )


def _unknowns(log_start: Array, relaxed: Relaxed, real: Assumptions) -> Unknowns:
    """The parameters of a fleet with the given boundaries and the instances utilisation asks for."""
    shortest = relaxed.workload.prompt_tokens[0] + relaxed.workload.output_tokens[0]
    span = jnp.log(relaxed.window_tokens) - jnp.log(shortest)
    shares = jnp.diff(jnp.concatenate([jnp.zeros(1), (log_start - jnp.log(shortest)) / span, jnp.ones(1)]))
    gaps = jnp.log(jnp.expm1(jnp.maximum(shares, 1e-3)))
    unknowns = Unknowns(gaps=gaps, gamma=jnp.zeros_like(log_start), log_instances=jnp.zeros_like(gaps))
    windows = _fleet(unknowns, relaxed, free_gamma=False).window_tokens
    sized = size_fleet(relaxed.engines, windows, jnp.ones_like(windows), relaxed.workload, relaxed.slo, real)
    needed = jnp.where(jnp.isfinite(sized.n_instances), sized.n_instances, 1.0)
    return unknowns._replace(log_instances=jnp.log(jnp.maximum(1.1 * needed, 1.0)))


def _starts(workload: Workload, n_pools: int) -> Array:
    """Boundaries [S, K - 1] at evenly spread quantiles of the tokens (not of the requests), as logs."""
    totals = np.asarray(workload.prompt_tokens + workload.output_tokens)
    served = np.cumsum(np.asarray(workload.weight) * totals)
    first = (np.arange(N_STARTS) + 0.5) / N_STARTS
    ranks = (
        1.0 - (1.0 - first[:, None]) ** (1.0 / np.arange(n_pools - 1, 0, -1))[None] if n_pools > 2 else first[:, None]
    )
    levels = np.sort(ranks, axis=1) * served[-1]
    return jnp.log(jnp.asarray(totals[np.minimum(np.searchsorted(served, levels), len(totals) - 1)]))


def coarse(workload: Workload) -> Workload:
    atoms = compress(
        np.asarray(workload.prompt_tokens),
        np.asarray(workload.output_tokens),
        np.asarray(workload.weight),
        RELAXED_ATOMS,
    )
    return make_workload(
        *atoms,
        arrival_rate_per_s=float(workload.arrival_rate_per_s),
        arrival_scv=float(workload.arrival_scv),
        longest_tokens=float(workload.longest_tokens),
    )


def _distinct(windows: np.ndarray, order: list[int]) -> list[int]:
    """The candidates of `order` whose boundaries are not within 2 % of an earlier one's."""
    kept: list[int] = []
    for i in order:
        if all(np.max(np.abs(np.log(windows[i] / windows[j]))) > 0.02 for j in kept):
            kept.append(int(i))
    return kept
