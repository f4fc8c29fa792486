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
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.evaluate import for_each_lane
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.fleet.stage import StageLoad, setting_of, stage_load
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
    printable,
    say,
    styled,
)
from fleetopt_jax.workload.atoms import Workload

N_POINTS = 48
Curve = Mapping[str, Any]  # an engine document's "points", or a pool's
MOST_FILLED = 2  # curves whose errors can be told apart


def pool_curves(plan: Plan) -> list[Curve]:
    """What an instance of each pool would do at any batch, serving the requests the pool gets: `points` and errors.

    A decode step of n sequences, then the prefill that their tokens call for; power is the mean over both. The pool
    runs at one point of it, up to the prefill it shares with others, which the curve leaves out.
    """
    workload, assumptions = plan.problem.workload, plan.problem.assumptions
    loads, points = _curves(plan.fleet, routed(plan.fleet, workload, assumptions), workload, assumptions)
    names = ("batch", "power_w_per_gpu", "tok_per_j")
    entries = [engine_entry(spec) for spec in plan.specs]
    return [
        {
            "context_tokens": float(loads.context_tokens[k]),
            "step_error": entry.step_error,
            "power_error": entry.power_error,
            "points": [dict(zip(names, point)) for point in np.stack([values[k] for values in points], 1).tolist()],
        }
        for k, entry in enumerate(entries)
    ]


@partial(jax.jit, static_argnames="assumptions")
def _curves(
    fleet: Fleet, pools: PoolTraffic, workload: Workload, assumptions: Assumptions
) -> tuple[StageLoad, tuple[Array, Array, Array]]:
    """Each pool's load, and (batch, power of one GPU [W], tokens per joule), [K, N_POINTS]."""
    setting = setting_of(workload, fleet.surroundings, assumptions)

    def curve(engine: Engine, traffic: PoolTraffic, window_tokens: Array):
        load = stage_load(engine, traffic, window_tokens, setting)
        batch = jnp.geomspace(1.0, jnp.maximum(load.n_max, 2.0), N_POINTS)
        gpu_w, tok_per_s = jax.vmap(partial(_at, engine, load))(batch)
        instance_w = assumptions.power_scope.pool_w(engine, fleet.surroundings.site, 1.0, gpu_w, 0.0)
        return load, (batch, gpu_w, tok_per_s / instance_w)

    return for_each_lane(curve, fleet.engines, pools, fleet.window_tokens)


def _at(engine: Engine, load: StageLoad, n: Array) -> tuple[Array, Array]:
    """(power of one GPU [W], output tokens per second) of an instance that decodes `n` sequences."""
    prefill_s = n * safe_div(load.prefill_s, load.steps)
    round_s = engine.decode.step_s(n, load.context_tokens) + prefill_s
    decode_w = engine.power.gpu_w(n, load.context_tokens)
    return decode_w + prefill_s / round_s * (engine.prefill.gpu_w - decode_w), n / round_s


@styled
def power_figure(plan: Mapping[str, Any], curves: Sequence[Curve], measured: Measurements | None = None) -> Figure:
    """Power of a GPU and tokens per joule over the batch, where each pool of the plan document runs, and points
    measured of the same engine (of the first pool's, where the file does not say how many GPUs)."""
    figure = new_figure(10.4, 5.0)
    left, right = figure.subplots(1, 2)
    for k, (pool, curve) in enumerate(zip(plan["pools"], curves, strict=True)):
        colour, marker = POOL_COLOURS[k % 6], POOL_MARKERS[k % 6]
        _curve(left, right, curve, colour, POOL_LINES[k % 6], filled=len(curves) <= MOST_FILLED)
        label = f"pool {k + 1}: {pool['tp']} {pool['gpu'].upper()}, {curve['context_tokens']:,.0f} tokens in context"
        for axes, name in ((left, "gpu_power_w"), (right, "tok_per_j")):
            look = {"color": colour, "linestyle": POOL_LINES[k % 6], "markeredgecolor": INK, "markersize": 11}
            axes.plot([pool["n_active"]], [pool[name]], marker, **look, label=printable(label), zorder=4)
    _measured(left, right, measured, plan["pools"][0]["tp"])
    _finish(figure, left, right, [point["batch"] for curve in curves for point in curve["points"]])
    say(figure, power_takeaway(plan))
    return figure


def power_takeaway(plan: Mapping[str, Any]) -> str:
    """Where the pools run."""
    pools = plan["pools"]
    if len(pools) == 1:
        return (
            f"The pool runs {pools[0]['n_active']:,.0f} sequences an instance, "
            f"at {pools[0]['tok_per_j']:.2f} tokens per joule"
        )
    batches, tok_per_j = ([pool[name] for pool in pools] for name in ("n_active", "tok_per_j"))
    return (
        f"The pools run {min(batches):,.0f} to {max(batches):,.0f} sequences an instance, "
        f"at {min(tok_per_j):.2f} to {max(tok_per_j):.2f} tokens per joule"
    )


@styled
def engine_figure(
    document: Mapping[str, Any], between: Sequence[Mapping[str, Any]] = (), measured: Measurements | None = None
) -> Figure:
    """The same of one engine: the points of the document of `fleetopt engine`, measured points, and a line through
    points `between` them of the same kind (where there are none, straight from one to the next)."""
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
        axes.plot(*asked, "o", color=BLUE, label="at the batches asked for")
    _measured(left, right, measured, document["tp"])
    batches = [point["batch"] for point in curve["points"]]
    _finish(figure, left, right, [*batches, *(measured.batch if measured else [])])
    last = points[-1]
    say(
        figure,
        f"{document['llm']} on {document['tp']} {document['gpu'].upper()}: {last['tok_per_j']:.3g} tokens per joule at "
        f"a batch of {last['batch']:,g}, {last['power_w_per_gpu']:,.0f} W a GPU",
    )
    return figure


def _curve(left, right, curve: Curve, colour: str, line, *, filled: bool, label: str | None = None) -> None:
    batch, power_w, tok_per_j = (
        np.array([point[name] for point in curve["points"]]) for name in ("batch", "power_w_per_gpu", "tok_per_j")
    )
    power_error, step_error = curve["power_error"] or 0.0, curve["step_error"] or 0.0
    both = float(np.hypot(power_error, step_error))
    for axes, values, error in ((left, power_w, power_error), (right, tok_per_j, both)):
        axes.plot(batch, values, color=colour, linestyle=line, label=label)
        if error and filled:
            axes.fill_between(batch, values * (1 - error), values * (1 + error), color=colour, alpha=0.12, linewidth=0)


def _measured(left, right, measured: Measurements | None, tp: int) -> None:
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
        "label": f"measured decode steps{context}",
    }
    left.plot(measured.batch, power_w, "h", **look)
    right.plot(measured.batch, measured.batch / measured.step_s / (power_w * (measured.tp or tp)), "h", **look)


def _finish(figure: Figure, left, right, batches: Sequence[float]) -> None:
    for axes in (left, right):
        batch_ticks(axes, min(batches), max(batches))
        axes.set_xlabel("sequences in flight an instance")
        axes.set_ylim(bottom=0)
    left.set_title("Power of one GPU [W]")
    right.set_title("Output tokens per joule")
    handles, labels = left.get_legend_handles_labels()
    if left.collections:
        handles, labels = [*handles, left.collections[0]], [*labels, "within the mean errors of the engine's laws"]
    figure.legend(handles, labels, loc="outside lower left", ncols=2)
