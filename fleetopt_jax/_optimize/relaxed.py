"""The relaxed problem: fleets of K pools as real numbers, improved from many starts at once by augmented Lagrangian.

A pool's traffic is a difference of two rows of the workload's running sums, smoothed by the logistic error of a router
whose width is annealed and tabulated on a grid of log-lengths: on the line between two rows it has a derivative with
respect to the window, and costs the same however many atoms there are. Instances and slots are real. Which of E engines
a pool has are weights that are annealed to one: a pool costs the weighted mean of what it would with each, so K pools
with E engines are K E evaluations, not E^K searches. Limits are constraints c <= 0 with multipliers.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from fleetopt_jax._optimize.candidates import Caps, WeightRows
from fleetopt_jax._optimize.problem import GAMMA_MAX
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import pytree, static
from fleetopt_jax.fleet.engine import Engine, at_clock
from fleetopt_jax.fleet.evaluate import pool_metrics
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.fleet.limits import itl_excess, ttft_excess
from fleetopt_jax.fleet.resources import Resources
from fleetopt_jax.fleet.stage import Setting
from fleetopt_jax.fleet.traffic import (
    CompressedSums,
    PoolTraffic,
    PromptCells,
    RunningSums,
    ServedSums,
    nothing_compressed,
    served_traffic,
)
from fleetopt_jax.laws.clocks import MIN_CLOCK_FRAC

N_STEPS = 800
WIDTHS = (0.2, 0.06, 0.02)  # log-widths of the router, each for a third of the steps
COLD = 0.1  # temperature of the choice of engines in the last step; 1 in the first
MULTIPLIER_EVERY = 30  # steps between multiplier updates
LEARNING_RATE = 0.02
PENALTY = 50.0
MAX_EXCESS = 9.0  # a limit missed tenfold pulls no harder
GRID = 256  # steps of the grid of log-lengths
COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}  # 2 compiles longer and runs as long, 0 runs tenfold as long
CELLS_TOGETHER = 5  # cells of the prompt histogram that the relaxation takes as one


class Unknowns(NamedTuple):
    """Unconstrained parameters of a relaxed fleet of K pools and E engines; those that are not free stay unread."""

    gaps: Array  # [K] softplus gaps between log-windows
    gamma: Array  # [K - 1] logits of gamma between 1 and GAMMA_MAX
    log_instances: Array  # [K, E]
    choice: Array  # [K, E] logits of the engines' weights
    max_num_seqs: Array  # [K, E] logits of ln(cap) between 0 and that of the engine's own
    clock: Array  # [K, E] logits of the clock between MIN_CLOCK_FRAC and 1


class Start(NamedTuple):
    """Where a search begins."""

    log_windows: Array  # of the boundaries [K - 1]
    gamma: Array  # logits [K - 1]
    choice: Array  # logits [K, E]
    log_instances: Array  # [K, E]


class Optimum(NamedTuple):
    """Where it ends."""

    window_tokens: Array  # [K]
    gamma: Array  # [K]
    weight: Array  # of the engines [K, E]
    max_num_seqs: Array  # [K, E]
    clock_frac: Array  # [K, E]
    merit: Array  # ln(cost) and the penalty of the limits that are missed


@pytree
class Table:
    """Smoothed running sums, the features side by side: a pool's traffic is a difference of two rows of a matrix."""

    of_all: Array  # requests as they are [GRID + 1, F]
    of_eligible: Array | None  # those that can be compressed, where some are
    compressed: Array | None  # what a pool tries to compress [GRID + 1, 7]
    served_like: ServedSums  # one row of `of_all` as a record
    compressed_like: CompressedSums
    cells: PromptCells | None
    whole_share: Array


@pytree
class Relaxed:
    """What the relaxation is of. Engines of one kind are stacked in a group; the groups' engines make up E."""

    groups: tuple[Engine, ...]
    tables: tuple[Table, ...]  # of each group, at each width, of each of its engines [W, E of the group, ...]
    setting: Setting  # with real rounding
    slo: Slo
    caps: Caps  # of all engines: limits over the GPUs of each [Q, E]
    objective: WeightRows  # one row
    log_ends: Array  # shortest request and last window, as logs [2]
    gamma: Array  # of the boundaries where it is not searched [-]
    free: tuple[str, ...] = static()  # of "gamma", "max_num_seqs" and "clock"

    @property
    def compresses(self) -> bool:
        return self.tables[0].compressed is not None


@program
def smoothed(sums: RunningSums, log_ends: Array) -> Table:
    """Running sums over soft shares sigmoid((ln B - ln L) / width) at the lengths B of the grid, for each width [W].

    The first row is nothing and the last everything, whatever the width: the last edge is hard. A few cells of the
    prompt histogram side by side count as one.
    """
    grid = jnp.linspace(log_ends[0], log_ends[1], GRID + 1)[:, None]
    cells, as_is = sums.cells, sums.as_is
    eligible = sums.eligible
    if cells is not None and as_is.in_cells is not None:
        some = as_is.in_cells[-1] > 0
        cells = PromptCells(
            cell=cells.cell,
            shortest=_merged(jnp.where(some, cells.shortest, cells.shortest[-1])).min(-1),
            longest=_merged(jnp.where(some, cells.longest, cells.shortest[0])).max(-1),
        )
        as_is = replace(as_is, in_cells=_merged_sum(as_is.in_cells))
        if eligible is not None:
            eligible = replace(eligible, in_cells=jax.tree.map(_merged_sum, eligible.in_cells))

    def at(width: Array) -> Table:
        share = jax.nn.sigmoid((grid - jnp.log(sums.route_tokens)) / width).at[0].set(0.0).at[-1].set(1.0)

        def smooth(tree: ServedSums | CompressedSums) -> Array:
            columns = [x.reshape(len(x), -1) for x in jax.tree.leaves(tree)]
            return share @ jnp.diff(jnp.concatenate(columns, axis=1), axis=0)

        return Table(
            of_all=smooth(as_is),
            of_eligible=None if eligible is None else smooth(eligible),
            compressed=None if sums.compressed is None else smooth(sums.compressed),
            served_like=jax.tree.map(lambda x: x[0], as_is),
            compressed_like=nothing_compressed(),
            cells=cells,
            whole_share=sums.whole_share,
        )

    return jax.lax.map(at, jnp.asarray(WIDTHS))


def _row(table: Array, log_tokens: Array, log_ends: Array) -> Array:
    """The row at a length: on the line between two of the grid, so that it has a derivative."""
    low, high = log_ends
    row = GRID * jnp.clip((log_tokens - low) / (high - low), 0.0, 1.0)
    below = jnp.clip(row, 0, GRID - 1).astype(int)
    return table[below] + (row - below) * (table[below + 1] - table[below])


def _traffic(
    table: Table, engine: Engine, ends: tuple[Array, Array], edges: tuple[Array, Array], relaxed: Relaxed
) -> PoolTraffic:
    """What `slice_traffic` gives for whole rows, between two log-windows and two log-edges."""
    (start, end), (lower_edge, upper_edge) = ends, edges
    assumptions, compressor = relaxed.setting.assumptions, relaxed.setting.surroundings.compressor

    def between(rows: Array, first: Array, last: Array) -> Array:
        return _row(rows, last, relaxed.log_ends) - _row(rows, first, relaxed.log_ends)

    served, compressed = between(table.of_all, start, end), table.compressed_like
    if table.compressed is not None and table.of_eligible is not None:
        taken = between(table.of_eligible, start, jnp.clip(lower_edge, start, end))
        served -= assumptions.compression.success_frac(compressor) * taken
        first = jnp.maximum(end, lower_edge)
        compressed = ravel_pytree(table.compressed_like)[1](
            between(table.compressed, first, jnp.maximum(upper_edge, first))
        )
    as_is = ravel_pytree(table.served_like)[1](served)
    about = table.cells, table.whole_share
    return served_traffic(engine.prefill, compressor, jnp.exp(end), as_is, compressed, about, assumptions)


def _merged(cells: Array) -> Array:
    """Neighbouring cells [..., C] side by side [..., C / CELLS_TOGETHER, CELLS_TOGETHER]."""
    return cells.reshape(*cells.shape[:-1], -1, CELLS_TOGETHER)


def _merged_sum(cells: Array) -> Array:
    """Neighbouring cells as one [..., C / CELLS_TOGETHER]."""
    return _merged(cells).sum(-1)


@partial(program, compiler_options=COMPILER_OPTIONS)
def solve(relaxed: Relaxed, starts: Start) -> Optimum:
    """The relaxed optima [S] after N_STEPS from each start [S]."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, N_STEPS, alpha=0.02))
    stages = jnp.arange(N_STEPS) * len(WIDTHS) // N_STEPS
    temperatures = COLD ** (jnp.arange(N_STEPS) / (N_STEPS - 1.0))
    first = jax.vmap(partial(_first, relaxed=relaxed))(starts)

    def step(state, schedule):
        unknowns, multipliers, momentum, _ = state
        index, stage, temperature = schedule
        tables = jax.tree.map(lambda x: x[stage], relaxed.tables)
        inputs = jax.vmap(partial(_pool_inputs, relaxed=relaxed))(unknowns)
        values, slopes = _pools(inputs, relaxed, tables)

        def merit_of(unknowns: Unknowns, multipliers: Array, values: Array, slopes: Array) -> tuple[Array, Array]:
            # Pools by their tangents: of each, outputs and few inputs, so that forward mode is cheaper than reverse.
            inputs = _pool_inputs(unknowns, relaxed)
            pools = values + jnp.einsum("kemd,ked->kem", slopes, inputs - jax.lax.stop_gradient(inputs))
            return _lagrangian(unknowns, pools, multipliers, relaxed, temperature)

        found = jax.vmap(jax.value_and_grad(merit_of, has_aux=True))(unknowns, multipliers, values, slopes)
        (merit, hinge), gradient = found
        updates, momentum = optimizer.update(gradient, momentum)
        multipliers = jnp.where((index + 1) % MULTIPLIER_EVERY == 0, hinge, multipliers)
        return (optax.apply_updates(unknowns, updates), multipliers, momentum, merit), None

    n_starts, k, e = starts.choice.shape
    n_limits = 3 * k * e + len(relaxed.caps.most) + 2 * (k * e if relaxed.slo.scope == "pool" else 1)
    state = (first, jnp.zeros((n_starts, n_limits)), optimizer.init(first), jnp.zeros(n_starts))
    (found, _, _, merit), _ = jax.lax.scan(step, state, (jnp.arange(N_STEPS), stages, temperatures))
    unknowns = cast(Unknowns, found)
    log_windows, gamma = jax.vmap(partial(_boundaries, relaxed=relaxed))(unknowns)
    caps, clocks = _tuning(unknowns.max_num_seqs, unknowns.clock, relaxed)
    return Optimum(jnp.exp(log_windows), gamma, jax.nn.softmax(unknowns.choice / COLD, axis=-1), caps, clocks, merit)


def _boundaries(unknowns: Unknowns, relaxed: Relaxed) -> tuple[Array, Array]:
    """Ordered log-windows between the shortest request and the last window, gammas in their range; each [K]."""
    low, high = relaxed.log_ends
    gaps = jnp.cumsum(jax.nn.softplus(unknowns.gaps))
    searched = 1.0 + (GAMMA_MAX - 1.0) * jax.nn.sigmoid(unknowns.gamma)
    gamma = searched if "gamma" in relaxed.free else jnp.broadcast_to(relaxed.gamma, searched.shape)
    return low + (high - low) * gaps / gaps[-1], jnp.append(gamma, 1.0)


def _tuning(max_num_seqs: Array, clock: Array, relaxed: Relaxed) -> tuple[Array, Array]:
    """(max_num_seqs, clock share) of the engines [..., E], from their logits."""
    caps = jnp.concatenate([engines.kv.max_num_seqs for engines in relaxed.groups])
    return (
        jnp.exp(jnp.log(caps) * jax.nn.sigmoid(max_num_seqs)),
        MIN_CLOCK_FRAC + (1.0 - MIN_CLOCK_FRAC) * jax.nn.sigmoid(clock),
    )


def _pool_inputs(unknowns: Unknowns, relaxed: Relaxed) -> Array:
    """What decides a pool's numbers, [K, E, D]: D are ln of its lower and upper window, of its instances and, where
    requests are compressed, of its lower and upper router edge; then cap and clock, where they are free."""
    log_windows, gamma = _boundaries(unknowns, relaxed)
    shortest = relaxed.log_ends[:1]
    shape = unknowns.log_instances.shape

    def both(ends: Array) -> list[Array]:
        return [jnp.broadcast_to(each[:, None], shape) for each in (jnp.append(shortest, ends[:-1]), ends)]

    inputs = [*both(log_windows), unknowns.log_instances]
    if relaxed.compresses:
        inputs += both(jax.lax.cummax(log_windows + jnp.log(gamma)))
    caps, clocks = _tuning(unknowns.max_num_seqs, unknowns.clock, relaxed)
    inputs += [caps] if "max_num_seqs" in relaxed.free else []
    inputs += [clocks] if "clock" in relaxed.free else []
    return jnp.stack(inputs, axis=-1)


def _pools(inputs: Array, relaxed: Relaxed, tables: tuple[Table, ...]) -> tuple[Array, Array]:
    """Numbers of all pools [S, K, E, M], and their slopes [S, K, E, M, D]; see `_numbers`."""

    def one(inputs: Array, engine: Engine, table: Table) -> tuple[Array, Array]:
        numbers = lambda x: (lambda y: (y, y))(_numbers(x, engine, table, relaxed))  # noqa: E731
        slopes, values = jax.jacfwd(numbers, has_aux=True)(inputs)
        return values, slopes

    found, start = [], 0
    for engines, of_engines in zip(relaxed.groups, tables, strict=True):
        stop = start + len(engines.idle_w)
        part = jnp.moveaxis(inputs[:, :, start:stop], 2, 0)
        rows = part.reshape(len(part), -1, part.shape[-1])  # [E, S K, D]
        if len(rows) == 1:
            alone = jax.tree.map(lambda x: x[0], (engines, of_engines))
            each = jax.tree.map(lambda x: x[None], jax.vmap(one, (0, None, None))(rows[0], *alone))
        else:
            each = jax.vmap(jax.vmap(one, (0, None, None)))(rows, engines, of_engines)
        found.append(jax.tree.map(lambda x: jnp.moveaxis(x.reshape(*part.shape[:3], *x.shape[2:]), 0, 2), each))  # noqa: B023
        start = stop
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *found)


def _numbers(inputs: Array, engine: Engine, table: Table, relaxed: Relaxed) -> Array:
    """(watts, USD/h, kg CO2/h, GPUs, utilisation, n_max, excess TTFT, excess ITL, traffic, tokens/s) of one pool."""
    lower, upper, log_instances, *more = inputs
    lower_edge, upper_edge = (more.pop(0), more.pop(0)) if relaxed.compresses else (lower, upper)
    if "max_num_seqs" in relaxed.free:
        engine = replace(engine, kv=replace(engine.kv, max_num_seqs=more.pop(0)))
    if "clock" in relaxed.free:
        engine = at_clock(engine, more.pop(0))
    traffic = _traffic(table, engine, (lower, upper), (lower_edge, upper_edge), relaxed)
    n_instances = jnp.exp(log_instances)
    pool = pool_metrics(engine, traffic, jnp.exp(upper), n_instances, relaxed.setting)
    # Infinite latencies would make the slope of their ratio to the limit 0 * inf.
    pool = replace(pool, ttft_p99_s=jnp.minimum(pool.ttft_p99_s, 1e6), itl_s=jnp.minimum(pool.itl_s, 1e6))
    return jnp.stack(
        [
            pool.power_w,
            pool.usd_per_h,
            pool.kg_co2_per_h,
            pool.n_gpus,
            jnp.minimum(pool.utilization, MAX_EXCESS),
            jnp.minimum(pool.n_max, 2.0),
            jnp.minimum(ttft_excess(pool, relaxed.slo), MAX_EXCESS),
            jnp.minimum(itl_excess(pool, relaxed.slo), MAX_EXCESS),
            pool.traffic_frac,
            pool.output_tok_per_s,
        ]
    )


def _lagrangian(
    unknowns: Unknowns, pools: Array, multipliers: Array, relaxed: Relaxed, temperature: Array
) -> tuple[Array, Array]:
    """(ln(cost) + penalty, multipliers to come) of a fleet whose pools' numbers are [K, E, M]."""
    weight = jax.nn.softmax(unknowns.choice / temperature, axis=1)
    *takes, utilization, n_max, ttft, itl, requests, tokens = jnp.moveaxis(pools, -1, 0)
    totals, gpus = Resources(*(jnp.sum(weight * each) for each in takes)), jnp.sum(weight * takes[-1], axis=0)
    (cost,) = relaxed.objective.used(totals, gpus)
    # An engine that is not chosen holds its limits, and counts in those of the whole fleet by its weight.
    limits = [
        utilization / relaxed.slo.max_utilization - 1.0,
        utilization + relaxed.setting.assumptions.occupancy.spare_instances * jnp.exp(-unknowns.log_instances) - 1.0,
        1.0 - n_max,
    ]
    late = jnp.stack([ttft, itl])
    if relaxed.slo.scope == "fleet":
        share = weight * jnp.stack([requests, tokens])
        late = jnp.sum(share * late, axis=(1, 2)) / jnp.maximum(jnp.sum(share, axis=(1, 2)), 1e-12)
    late = jnp.log(1e-3 + late + 1.0)  # ratios as logarithms: a tail probability runs over decades
    late = weight * late if relaxed.slo.scope == "pool" else late
    caps = relaxed.caps
    used = caps.limits.used(totals, gpus)
    excess = jnp.concatenate(
        [
            (weight * jnp.stack(limits)).ravel(),
            late.ravel(),
            jnp.log(used + 1e-6) - jnp.log(caps.most + 1e-6),
        ]
    )
    hinge = jnp.maximum(0.0, multipliers + PENALTY * excess)
    return jnp.log(cost) + jnp.sum(hinge**2 - multipliers**2) / (2.0 * PENALTY), hinge


def _first(start: Start, relaxed: Relaxed) -> Unknowns:
    """The parameters of a start."""
    low, high = relaxed.log_ends
    shares = jnp.diff(jnp.concatenate([jnp.zeros(1), (start.log_windows - low) / (high - low), jnp.ones(1)]))
    return Unknowns(
        gaps=jnp.log(jnp.expm1(jnp.maximum(shares, 1e-3))),
        gamma=start.gamma,
        log_instances=start.log_instances,
        choice=start.choice,
        max_num_seqs=jnp.full_like(start.choice, 3.0),
        clock=jnp.full_like(start.choice, 2.0),
    )
