"""Power and tokens per joule over the sequences in flight: a plan's engines, one engine, and measurements."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax.calibrate.measurements import Measurements
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.programs import program
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import for_each_lane, pool_metrics
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.stage import StageLoad, all_up, setting_of, stage_load
from fleetopt_jax.fleet.traffic import PoolTraffic, routed
from fleetopt_jax.report.style import (
    BLUE,
    INK,
    PAPER,
    POOL_COLOURS,
    POOL_LINES,
    POOL_MARKERS,
    batch_ticks,
    new_figure,
    plain_numbers,
    printable,
    say,
    styled,
)
from fleetopt_jax.report.words import (
    gpus_of_instance,
    in_flight,
    instance_said,
)
from fleetopt_jax.workload.atoms import Workload

N_POINTS = 96
LEAST_IN_FLIGHT = 1.0  # sequences an instance: curves begin there, or where a pool with fewer runs
NEARLY_FULL = 0.002  # more instances than the fewest that keep up, where curves end
Curve = Mapping[str, Any]  # an engine document's "points", or a pool's
MOST_FILLED = 2  # curves whose errors can be told apart


def pool_curves(plan: Plan) -> list[Curve]:
    """What an instance of each pool would do if the pool had more or fewer instances: `points` and errors.

    From a load near the most it can take down to less than one sequence in flight, where a GPU idles between two. The
    pool itself is one point of its curve.
    """
    workload, assumptions = plan.problem.workload, plan.problem.assumptions
    traffic = routed(plan.fleet, workload, assumptions)
    loads, points, shown = _curves(plan.fleet, plan.metrics.pools.n_active, traffic, workload, assumptions)
    names = ("batch", "power_w_per_gpu", "tok_per_j")
    entries = [engine_entry(spec) for spec in plan.specs]
    return [
        {
            "context_tokens": float(loads.context_tokens[k]),
            "step_error": entry.step_error,
            "power_error": entry.power_error,
            "points": [
                dict(zip(names, point))
                for point in np.stack([np.asarray(values[k])[np.asarray(shown[k])] for values in points], 1).tolist()
            ],
        }
        for k, entry in enumerate(entries)
    ]


@partial(program, static_argnames="assumptions")
def _curves(
    fleet: Fleet, n_active: Array, pools: PoolTraffic, workload: Workload, assumptions: Assumptions
) -> tuple[StageLoad, tuple[Array, ...], Array]:
    """Each pool's load, (batch, power of one GPU [W], tokens per joule) of ever fewer instances, and which of them are
    shown, [K, N_POINTS]."""
    setting = all_up(setting_of(workload, fleet.surroundings, assumptions))

    def curve(engine: Engine, traffic: PoolTraffic, window_tokens: Array, n_instances: Array, runs: Array):
        load = stage_load(engine, traffic, window_tokens, setting)
        fewest = safe_div(load.rate_per_s * load.service_s, load.n_max)  # all slots of all instances full
        least = jnp.minimum(runs, LEAST_IN_FLIGHT)
        most = 1.5 * n_instances * runs / least  # or more than enough: steps are shorter then
        beyond = jnp.geomspace(jnp.maximum(most / fewest, 2.0) - 1.0, NEARLY_FULL, N_POINTS)  # of the fewest

        def at(n: Array) -> tuple[Array, Array, Array, Array]:
            of = pool_metrics(engine, traffic, window_tokens, n, setting)
            return of.n_active, of.gpu_power_w, of.tok_per_j, of.stable & (of.n_active >= 0.7 * least)

        *values, shown = jax.vmap(at)(fewest * (1.0 + beyond))
        return load, tuple(values), shown

    return for_each_lane(curve, fleet.engines, pools, fleet.window_tokens, fleet.n_instances, n_active)


@styled
def power_figure(plan: Mapping[str, Any], curves: Sequence[Curve], measured: Measurements | None = None) -> Figure:
    """Power of a GPU and tokens per joule over the batch, where each pool of the plan document runs, and points
    measured of the same engine (of the first pool's, where the file does not say how many GPUs)."""
    figure = new_figure(10.4, 5.0)
    left, right = figure.subplots(1, 2)
    for k, (pool, curve) in enumerate(zip(plan["pools"], curves, strict=True)):
        colour, marker = POOL_COLOURS[k % 6], POOL_MARKERS[k % 6]
        _curve(left, right, curve, colour, POOL_LINES[k % 6], filled=len(curves) <= MOST_FILLED)
        label = f"pool {k + 1}: {instance_said(pool, ' ')}, {curve['context_tokens']:,.0f} tokens in context"
        for axes, name in ((left, "gpu_power_w"), (right, "tok_per_j")):
            look = {"color": colour, "linestyle": POOL_LINES[k % 6], "markeredgecolor": INK, "markersize": 11}
            at = [pool["n_active"]], [pool[name]]
            axes.plot(*at, marker, **look, label=printable(label), zorder=4, clip_on=False)
    _measured(left, right, measured, gpus_of_instance(plan["pools"][0]))
    _finish(figure, left, right, [point["batch"] for curve in curves for point in curve["points"]])
    say(figure, power_takeaway(plan))
    return figure


def power_takeaway(plan: Mapping[str, Any]) -> str:
    """Where the pools run."""
    pools = plan["pools"]
    if len(pools) == 1:
        return (
            f"The pool runs {in_flight(pools[0]['n_active'])} sequences an instance, "
            f"at {pools[0]['tok_per_j']:#.3g} tokens per joule"
        )
    batches, tok_per_j = (sorted(pool[name] for pool in pools) for name in ("n_active", "tok_per_j"))
    return (
        f"The pools run {in_flight(batches[0])} to {in_flight(batches[-1])} sequences an instance, "
        f"at {tok_per_j[0]:#.3g} to {tok_per_j[-1]:#.3g} tokens per joule"
    )


@styled
def engine_figure(
    document: Mapping[str, Any],
    between: Sequence[Mapping[str, Any]] = (),
    steps: Sequence[Mapping[str, Any]] = (),
    measured: Measurements | None = None,
) -> Figure:
    """The same of one engine: the points of the document of `fleetopt engine`, measured points, and a line through
    points `between` them of the same kind (where there are none, straight from one to the next); `steps` are the
    engine's points without prefill, in the context that was measured."""
    figure = new_figure(10.4, 5.0)
    left, right = figure.subplots(1, 2)
    points = sorted(document["points"], key=lambda point: point["batch"])
    curve = {
        "points": sorted([*points, *between], key=lambda point: point["batch"]),
        "step_error": document["relative_error"],
        "power_error": document["power_relative_error"],
    }
    label = f"engine ({document['quality']}), {document['points'][0]['context_tokens']:,.0f} tokens in context"
    _curve(left, right, curve, BLUE, "-", filled=True, label=label)
    for axes, name in ((left, "power_w_per_gpu"), (right, "tok_per_j")):
        asked = [point["batch"] for point in points], [point[name] for point in points]
        axes.plot(*asked, "o", color=BLUE, label="at the batches asked for", clip_on=False)
    if steps:
        alone = f"its decode steps alone, {steps[0]['context_tokens']:,.0f} tokens in context"
        _curve(left, right, {"points": steps, "step_error": None, "power_error": None}, BLUE, "--", label=alone)
    _measured(left, right, measured, gpus_of_instance(document))
    batches = [point["batch"] for point in curve["points"]]
    _finish(figure, left, right, [*batches, *(measured.batch if measured else [])])
    last = points[-1]
    say(
        figure,
        f"{document['llm']} on {instance_said(document, ' ')}: {last['tok_per_j']:.3f} tokens per joule "
        f"with {in_flight(last['batch'])} sequences in flight, {last['power_w_per_gpu']:,.0f} W a GPU",
    )
    return figure


def _curve(left, right, curve: Curve, colour: str, line, *, filled: bool = False, label: str | None = None) -> None:
    batch, power_w, tok_per_j = (
        np.array([point[name] for point in curve["points"]]) for name in ("batch", "power_w_per_gpu", "tok_per_j")
    )
    power_error, step_error = curve["power_error"] or 0.0, curve["step_error"] or 0.0
    both = float(np.hypot(power_error, step_error))
    for axes, values, error in ((left, power_w, power_error), (right, tok_per_j, both)):
        axes.plot(batch, values, color=colour, linestyle=line, label=label)
        if error and filled:
            axes.fill_between(batch, values * (1 - error), values * (1 + error), color=colour, alpha=0.12, linewidth=0)


def _measured(left, right, measured: Measurements | None, n_gpus: int) -> None:
    if measured is None or measured.power_w_per_gpu is None:
        return
    power_w = measured.power_w_per_gpu
    contexts = measured.context_tokens
    context = "" if contexts is None else f", {np.mean(contexts):,.0f} tokens in context"
    look = {
        "color": INK,
        "markerfacecolor": PAPER,
        "linestyle": "none",
        "zorder": 5,
        "clip_on": False,
        "label": f"measured decode steps{context}",
    }
    left.plot(measured.batch, power_w, "h", **look)
    right.plot(measured.batch, measured.batch / measured.step_s / (power_w * (measured.tp or n_gpus)), "h", **look)


def _finish(figure: Figure, left, right, batches: Sequence[float]) -> None:
    for axes in (left, right):
        plain_numbers(axes.yaxis)
        batch_ticks(axes, min(batches), max(batches))
        axes.set_xlabel("sequences in flight an instance")
        axes.set_ylim(bottom=0)
    left.set_title("Power of one GPU [W]")
    right.set_title("Output tokens per joule")
    handles, labels = left.get_legend_handles_labels()
    if left.collections:
        handles, labels = [*handles, left.collections[0]], [*labels, "within the mean errors of the engine's laws"]
    figure.legend(handles, labels, loc="outside lower left", ncols=2)
