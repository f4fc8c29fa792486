"""Gradient search: relaxed fleets from many starts at once (`relaxed.py`), then whole windows, engines and instances.

The relaxed optima say where to look. Windows and gammas around the boundaries of all of them become nodes, and the
cheapest path over these nodes that holds the limits, a budget of all pools among them, is searched with the exact costs
of whole instances; then again around that path, until nothing improves. So six engines are rounded in one search, and
what is returned never rests on the relaxation. Where latencies are limits of the whole fleet, pools are not priced one
by one: there the relaxed optima are improved by coordinate search.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from fleetopt_jax._optimize import coupled, exact
from fleetopt_jax._optimize.candidates import Candidate, Scorer, best_found, gamma_grid, make_caps, weight_rows
from fleetopt_jax._optimize.graph import Boundaries
from fleetopt_jax._optimize.layouts import ManyPools, OnePool, TwoPools
from fleetopt_jax._optimize.plan import Found, nothing
from fleetopt_jax._optimize.problem import Problem, thresholds
from fleetopt_jax._optimize.relaxed import N_STEPS, Optimum, Relaxed, Start, smoothed, solve
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.core.struct import stack
from fleetopt_jax.laws.clocks import MIN_CLOCK_FRAC
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.workload.atoms import total_tokens

N_STARTS = 16
FAR = (
    0.15  # windows within this of a relaxed boundary in log-length are nodes; the same of a fleet to be improved, with
)
NEAR_GAMMA = 0.1  # gammas within this
MAX_NEAR = 160  # windows near one boundary of a relaxed optimum
SPREAD = 7  # of them that are taken for every relaxed optimum, before the best ones get more
NEXT_LENGTHS = 5  # the nearest lengths of requests on either side, where the traffic changes
MAX_NODES = 1022  # of three pools and more
MAX_NODES_OF_TWO = 16_384
MAX_ROUNDS = 6
TUNED = 3  # relaxed optima whose caps and clocks are tried
CLOCK_STEP = 0.02
ROUNDING_RADIUS = 0.12  # windows within this factor of a relaxed optimum are tried for limits of the whole fleet
N_ROUNDED = 4  # relaxed optima that are rounded there
CANDIDATES = "windows near relaxed optima"


def search(problem: Problem, progress: Progress | None = None, *, warm: bool = True) -> Found:
    """The best fleet near the relaxed optima; never certified, but held against the bound of the exact search.

    `warm`: where a budget couples the pools, some starts are exact plans of the problem without it: the cheapest one
    and the most frugal ones.
    """
    problem = _grouped(coupled.with_stock(problem))
    if problem.slo.scope == "fleet":
        return _search_whole(problem, progress)
    fleets = None
    if problem.gamma is not None and not problem.free:
        most = coupled.MAX_POOLS if problem.budget.caps else exact.MAX_POOLS
        fleets = exact.Fleets(problem, None, most)  # shares its sums and compilations with the rounding
    boundaries = fleets.boundaries if fleets else Boundaries(problem, *exact.candidates(problem))
    known: list[Found] = []
    bound = None
    if fleets:
        own = problem.prices(problem.search_weights)
        weights = [own, *(coupled.frugal_prices(problem) if problem.budget.caps else [])]
        known = [exact.as_found(fleets, fleets.cheapest_of_all(each), []) for each in weights]
        bound = known[0].cost
        if problem.budget.caps:
            bound = max(bound, coupled.dual_bound_of(fleets))
        if not math.isfinite(bound):
            return nothing(boundaries.n_evaluated, CANDIDATES, certified=True)
    starts = known if warm and problem.budget.caps else []
    grid = _Grid(problem, boundaries, fleets.many_pool_nodes() if fleets and problem.n_pools > 2 else None)
    optimum = relaxed_optima(problem, boundaries, starts)
    found = _rounded(problem, boundaries, grid, optimum, starts, progress)
    n_evaluated = found.n_evaluated + N_STEPS * len(optimum.merit)
    return replace(found, n_evaluated=n_evaluated, lower_bound=None if not known else bound)


def _grouped(problem: Problem) -> Problem:
    """Engines of one kind next to each other."""
    kinds = [jax.tree.structure(engine) for engine in problem.engines]
    order = sorted(range(len(kinds)), key=lambda i: kinds.index(kinds[i]))
    return problem.serving(specs=tuple(problem.specs[i] for i in order))


def relaxed_optima(problem: Problem, boundaries: Boundaries, known: Sequence[Found] = ()) -> Optimum:
    """The relaxed optima [S] of `N_STARTS` starts, the best first; some of these from plans that are known."""
    engines, shortest = problem.engines, boundaries.sums[0].route_tokens[0]
    ends = jnp.log(jnp.stack([shortest, jnp.maximum(problem.window_tokens, shortest + 1.0)]))
    groups, tables = [], []
    by_sums = {id(sums): smoothed(sums, ends) for sums in boundaries.sums}
    for first, last in _runs([jax.tree.structure(engine) for engine in engines]):
        groups.append(jax.tree.map(jnp.asarray, stack(engines[first:last])))
        of_engines = [by_sums[id(sums)] for sums in boundaries.sums[first:last]]
        tables.append(jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *of_engines))
    setting = replace(boundaries.setting, assumptions=replace(problem.assumptions, rounding="real"))
    relaxed = Relaxed(
        groups=tuple(groups),
        tables=tuple(tables),
        setting=setting,
        slo=problem.slo,
        caps=make_caps(problem, problem.specs),
        log_ends=ends,
        gamma=jnp.asarray(problem.gamma or 1.0, dtype=float),
        objective=weight_rows([problem.objective_weights], problem.specs),
        free=(*(["gamma"] if problem.gamma is None else []), *problem.free),
    )
    optimum = solve(relaxed, _starts(problem, boundaries, known))
    merit = np.where(np.isfinite(optimum.merit), optimum.merit, np.inf)
    order = np.argsort(merit, kind="stable")
    return jax.tree.map(lambda x: np.asarray(x)[order], optimum._replace(merit=merit))


def _runs(kinds: Sequence[object]) -> list[tuple[int, int]]:
    """Where equal neighbours begin and end."""
    first = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
    return list(zip(first, [*first[1:], len(kinds)], strict=True))


def _starts(problem: Problem, boundaries: Boundaries, known: Sequence[Found]) -> Start:
    """Windows spread over the tokens (not the requests) and over log-length, evenly in K - 1 dimensions."""
    k, specs = problem.n_pools, problem.specs
    total, weight = (np.asarray(x) for x in (total_tokens(problem.workload), problem.workload.weight))
    served = np.cumsum(weight * total)
    low, high = np.log(total[0]), np.log(max(problem.window_tokens, total[0] + 1.0))
    rank = served / served[-1] + (np.log(total) - low) / (high - low)
    # The additive recurrence of the generalised golden ratio (Roberts 2018): low discrepancy in any dimension.
    golden = 2.0
    for _ in range(40):
        golden = (1.0 + golden) ** (1.0 / k)
    levels = np.sort((0.5 + np.outer(np.arange(N_STARTS), golden ** -np.arange(1.0, k))) % 1.0, axis=1)
    spread = rank[0] + levels * (rank[-1] - rank[0])
    windows = np.maximum(total[np.minimum(np.searchsorted(rank, spread), len(total) - 1)], total[0] + 1.0)
    rng = np.random.default_rng(0)
    gammas = np.tile(np.linspace(-2.0, 2.0, N_STARTS)[:, None], (1, k - 1))
    likes = rng.normal(size=(N_STARTS, k, len(specs))) * (np.arange(N_STARTS) > 0)[:, None, None]
    for row, found in enumerate(known):
        pools = np.minimum(np.arange(k), len(found.specs) - 1)
        inner = found.window_tokens[:-1]
        padded = np.concatenate([np.repeat(inner[:1] if len(inner) else total[:1], k - 1 - len(inner)), inner])
        windows[row] = np.minimum(padded, problem.window_tokens * 0.999)
        chosen = [specs.index(found.specs[i]) for i in pools]
        likes[row] = 2.0 * (np.arange(len(specs)) == np.array(chosen)[:, None])
    return Start(
        log_windows=jnp.log(jnp.asarray(windows)),
        gamma=jnp.asarray(gammas),
        choice=jnp.asarray(likes),
        log_instances=jnp.asarray(np.log(_needed(problem, boundaries, windows))),
    )


def _needed(problem: Problem, boundaries: Boundaries, windows: np.ndarray) -> np.ndarray:
    """A tenth more instances [S, K, E] than the load of pools between these windows [S, K - 1] asks for, at least 1."""
    inner = boundaries.nearest(windows)
    n = len(windows)
    lower = np.concatenate([np.zeros((n, 1), int), inner], axis=1).ravel()
    upper = np.concatenate([inner, np.full((n, 1), boundaries.last)], axis=1).ravel()
    needed = [boundaries.least(e, lower, upper)[0] for e in range(len(problem.specs))]
    needed = np.stack(needed, axis=-1).reshape(n, -1, len(problem.specs))
    return np.maximum(np.where(np.isfinite(needed), 1.1 * needed, 1.0), 1.0)


def max_nodes(problem: Problem) -> int:
    """Boundaries that are searched together."""
    return MAX_NODES_OF_TWO if problem.n_pools <= 2 else MAX_NODES


class Near(exact.Fleets):
    """The fleets over some of the boundaries, the first of the nodes if there are too many."""

    def __init__(self, problem: Problem, boundaries: Boundaries, nodes: Sequence[np.ndarray]):
        self.problem, self.boundaries, self._progress = problem, boundaries, None
        self.layouts = [OnePool(boundaries).seeded()]
        inner = np.sort(_first(nodes, max_nodes(problem)))
        if problem.n_pools == 2 and len(inner):
            self.layouts.append(TwoPools(boundaries, inner).seeded())
        elif problem.n_pools > 2 and len(inner):
            nodes_ = np.concatenate([[0], inner, [boundaries.last]])
            self.layouts.append(ManyPools(boundaries, nodes_, None).seeded())

    @property
    def certified(self) -> bool:
        return False

    def description(self) -> str:
        return CANDIDATES

    def best(self) -> Found:
        """The cheapest of them that keeps the budget."""
        if self.problem.budget.caps:
            return coupled.within_budget(self)
        return exact.as_found(self, self.cheapest_of_all(self.problem.prices(self.problem.search_weights)), [])


def _rounded(
    problem: Problem,
    boundaries: Boundaries,
    grid: "_Grid",
    optimum: Optimum,
    known: Sequence[Found],
    progress: Progress | None,
) -> Found:
    """The best whole fleet near the relaxed optima and the plans that are known, and then near that."""
    problem = problem.serving(specs=_tuned(problem, optimum))
    if problem.free:
        boundaries = Boundaries(problem, *exact.candidates(problem))
    windows, gammas = optimum.window_tokens[:, :-1], optimum.gamma[:, :-1]
    nodes = [grid.near(w, g) for plan in known for w, g in zip(plan.window_tokens[:-1], plan.gamma[:-1])]
    for most in (SPREAD, MAX_NEAR):
        nodes += [grid.near(w, g, most) for w, g in zip(windows.ravel(), gammas.ravel())]
    near = Near(problem, boundaries, nodes)
    best = near.best()
    if problem.budget.caps and not math.isfinite(best.cost):
        best = _frugal(near, grid, nodes)
    for done in range(MAX_ROUNDS if problem.n_pools > 1 else 0):
        if progress:
            progress(done + 1, MAX_ROUNDS)
        beside = [grid.near(w, g) for w, g in zip(best.window_tokens[:-1], best.gamma[:-1])]
        # Among the rest of all windows too, for a way out of the basin of one boundary.
        rest = grid.spread(MAX_NODES_OF_TWO - sum(map(len, beside)) if problem.n_pools <= 2 else MAX_NODES // 2)
        closer = Near(problem, boundaries, [*beside, rest]).best()
        if not closer.cost < best.cost:
            break
        best = closer
    if problem.n_pools > 2:  # two may have windows that are no whole blocks
        two = replace(problem, n_pools=2)
        pair = Near(two, boundaries, [_Grid(two, boundaries, None).spread(MAX_NODES_OF_TWO)]).best()
        best = min(best, pair, key=lambda each: each.cost)
    return replace(best, n_evaluated=boundaries.n_evaluated, certified=False, by_pools=())


def _frugal(near: Near, grid: "_Grid", nodes: list[np.ndarray]) -> Found:
    """The cheapest fleet within the budget after more nodes were added, next to the fleets that use least."""
    problem, boundaries = near.problem, near.boundaries
    for weights in coupled.frugal_prices(problem):
        least = math.inf
        for _ in range(MAX_ROUNDS):
            answer = near.cheapest_of_all(weights)
            if not answer.cost < least:
                break
            least = answer.cost
            plan = exact.as_found(near, answer, [])
            beside = [grid.near(w, g) for w, g in zip(plan.window_tokens[:-1], plan.gamma[:-1])]
            nodes = [*nodes, *beside]
            near = Near(problem, boundaries, beside)
    return Near(problem, boundaries, nodes).best()


def _first(nodes: Iterable[np.ndarray], most: int) -> np.ndarray:
    """The nodes in this order, each once, until there are enough."""
    every = np.concatenate([np.zeros(0, int), *nodes])
    _, first = np.unique(every, return_index=True)
    return every[np.sort(first)[:most]]


class _Grid:
    """The candidate boundaries by window and gamma: for three pools and more whole blocks, as in the exact search."""

    def __init__(self, problem: Problem, boundaries: Boundaries, nodes: np.ndarray | None):
        self.gammas, self.lengths = gamma_grid(problem), thresholds(problem)
        self.most = max_nodes(problem) // (2 * max(problem.n_pools - 1, 1) * min(len(self.gammas), 5))
        self.windows = boundaries.window_tokens[1:-1].reshape(-1, len(self.gammas))[:, 0]
        blocks = self.windows % BLOCK_TOKENS == 0
        if nodes is not None:
            self.kept = np.unique((nodes[1:-1] - 1) // len(self.gammas))
        elif problem.n_pools > 2 and blocks.sum() > 1:
            self.kept = np.flatnonzero(blocks)
        else:
            self.kept = np.arange(len(self.windows))

    def spread(self, most: int) -> np.ndarray:
        """So many nodes all over, gammas in turn."""
        ranks = np.unique(np.linspace(0, len(self.kept) - 1, min(len(self.kept), most)).astype(int))
        return 1 + self.kept[ranks] * len(self.gammas) + np.arange(len(ranks)) % len(self.gammas)

    def near(self, window: float, gamma: float, most: int | None = None) -> np.ndarray:
        """At most so many windows near a boundary, and the nearest lengths, with the gammas near it."""
        most = most or self.most
        options = self.windows[self.kept]
        low, high = np.searchsorted(options, window * np.exp([-FAR, FAR]))
        spread = options[low + np.unique(np.linspace(0, high - 1 - low, min(high - low, most)).astype(int))]
        rank = np.searchsorted(self.lengths, window)
        lengths = self.lengths[max(rank - NEXT_LENGTHS, 0) : rank + NEXT_LENGTHS]
        return self._nodes(np.concatenate([[window], lengths, spread]), gamma)

    def _nodes(self, windows: np.ndarray, gamma: float) -> np.ndarray:
        """With the least windows that are not shorter than these, and the gammas near."""
        if not len(self.kept):
            return np.zeros(0, int)
        ranks = np.unique(np.searchsorted(self.windows[self.kept], windows).clip(0, len(self.kept) - 1))
        near = np.flatnonzero(np.abs(self.gammas - gamma) <= NEAR_GAMMA + 1e-9)
        near = near if len(near) else np.array([np.argmin(np.abs(self.gammas - gamma))])
        return (1 + self.kept[ranks][:, None] * len(self.gammas) + near).ravel()


# caps and clocks


def _tuned(problem: Problem, optimum: Optimum) -> tuple[EngineSpec, ...]:
    """The specs as they are and, where caps and clocks are free, as the best relaxed optima have them: a clock is a
    share of the one a spec has."""
    found = dict.fromkeys(problem.specs)
    for s in range(min(TUNED, len(optimum.merit)) if problem.free else 0):
        for k, e in zip(*np.nonzero(optimum.weight[s] > 0.3)):
            spec = problem.specs[e]
            cap = max(1, round(float(optimum.max_num_seqs[s, k, e])))
            capped = "max_num_seqs" in problem.free and cap <= 0.9 * float(build(spec).kv.max_num_seqs)
            clocks = [spec.clock_frac]
            if "clock" in problem.free:
                clock = round(spec.clock_frac * float(optimum.clock_frac[s, k, e]) / CLOCK_STEP) * CLOCK_STEP
                clocks = [clock - CLOCK_STEP, clock, clock + CLOCK_STEP]
            for each in clocks:
                at = replace(spec, clock_frac=round(min(max(each, MIN_CLOCK_FRAC), spec.clock_frac), 2))
                found |= dict.fromkeys([at, *([replace(at, max_num_seqs=cap)] if capped else [])])
    return tuple(found)


# limits of the whole fleet


def _search_whole(problem: Problem, progress: Progress | None) -> Found:
    """Relaxed optima improved by coordinate search, each with the engines it has chosen."""
    k, window = problem.n_pools, problem.window_tokens
    boundaries = Boundaries(problem, *exact.candidates(problem))
    optimum = relaxed_optima(problem, boundaries)
    scorers: dict[tuple[int, ...], Scorer] = {}
    found: list[tuple[Scorer, Candidate]] = []

    def scorer(chosen: tuple[int, ...]) -> Scorer:
        return scorers.setdefault(chosen, Scorer(problem, tuple(problem.specs[e] for e in chosen)))

    for e in range(len(problem.specs)):
        alone = np.full(k, window), np.ones(k)
        one = scorer((e,) * k)
        found.append((one, (one(alone[0][None], alone[1][None])[0], *alone)))
    near = []
    for s in range(N_STARTS if k > 1 else 0):
        one = scorer(tuple(int(e) for e in np.argmax(optimum.weight[s], axis=1)))
        windows, gammas = np.array(optimum.window_tokens[s]), np.round(np.asarray(optimum.gamma[s]), 2)
        windows[:-1] = one.thresholds[np.abs(one.thresholds[:, None] - windows[:-1]).argmin(axis=0)]
        windows[-1] = window
        near.append((one, (one(windows[None], gammas[None])[0], windows, gammas)))
    near.sort(key=lambda each: each[1][0])
    for done, (one, (_, windows, gammas)) in enumerate(_distinct(near)[:N_ROUNDED]):
        found.append((one, one.descend(windows, gammas, radius=ROUNDING_RADIUS)))
        if progress:
            progress(done + 1, N_ROUNDED)
    return best_found(found, CANDIDATES, certified=False)


def _distinct(near: list[tuple[Scorer, Candidate]]) -> list[tuple[Scorer, Candidate]]:
    """Those whose boundaries are not within 2 % of an earlier one's with the same engines."""
    kept: list[tuple[Scorer, Candidate]] = []
    for one, candidate in near:
        windows = candidate[1]
        if all(one is not other or np.max(np.abs(np.log(windows / seen[1]))) > 0.02 for other, seen in kept):
            kept.append((one, candidate))
    return kept
