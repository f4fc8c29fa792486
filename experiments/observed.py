"""Does `fleetopt compare` find what is different? Fleets simulated with one known change, as if they had been observed.

    python experiments/observed.py

The plan: the Azure conversation trace at 100 requests/s, two pools of the newest vLLM on H100, with a fifth more
instances than the limits ask for. The simulator, which shares no queueing law with the prediction, runs it with one
input changed; `compare` sees its tokens per second, power, median and P99 TTFT and mean ITL, of the fleet and of each
pool, but not its rate, and names an input and a factor. Rank: the place of the true input in its list; beside it the
factor of that one. Writes results/observed.csv.
"""

from dataclasses import replace

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _results import write_table  # noqa: E402

import fleetopt_jax as fo  # noqa: E402
from fleetopt_jax._optimize.engine_errors import EngineFactors, perturbed  # noqa: E402
from fleetopt_jax._optimize.search import with_fleet  # noqa: E402
from fleetopt_jax.core.struct import as_floats  # noqa: E402

RATE_PER_S, REPLICATIONS, ROOM = 100.0, 3, 1.2
FIGURES = ("output_tok_per_s", "power_w", "ttft_p50_s", "ttft_p99_s", "itl_s")
CASES = (  # input, factor
    ("nothing", 1.0),
    ("rate", 0.75),
    ("rate", 1.2),
    ("prompts", 1.25),
    ("outputs", 0.8),
    ("decode", 1.15),
    ("decode", 1.3),
    ("prefill", 1.5),
    ("power", 1.25),
    ("burstiness", 5.0),
    ("instances", 0.8),
)
COLUMNS = ("changed", "factor", "named", "named_factor", "removes", "rank", "factor_of_true", "misfit", "inside", "of")


def main() -> None:
    plan, rows = planned(), []
    for name, factor in CASES:
        found = fo.compare(plan, observed(plan, name, factor)).planned
        order = [(each.input, each.pool) for each in found.explanations]
        best, rank = found.explanations[0], None if name == "nothing" else order.index((name, None)) + 1
        true = None if rank is None else found.explanations[rank - 1].factor
        inside = sum(each.inside for each in found.figures)
        named = best.input if best.pool is None else f"{best.input} of pool {best.pool + 1}"
        rows.append(
            (name, factor, named, best.factor, best.removes, rank, true, found.misfit, inside, len(found.figures))
        )
        print(*(f"{x:.3g}" if isinstance(x, float) else x for x in rows[-1]), flush=True)
    write_table("observed.csv", COLUMNS, rows)


def planned() -> fo.Plan:
    """With room for what changes."""
    workload = replace(fo.load_workload("azure-conv"), **as_floats(arrival_rate_per_s=RATE_PER_S))
    best = fo.require_plan(fo.optimize(fo.make_problem(workload, [fo.EngineSpec("h100")], n_pools=2)))
    return with_fleet(best, best.fleet.with_instances(np.ceil(ROOM * np.asarray(best.fleet.n_instances))))


def observed(plan: fo.Plan, name: str, factor: float) -> list[fo.ObservedFigure]:
    """What the simulator sees of the plan's fleet with one input so many times the plan's."""
    problem, one = plan.problem, np.ones(len(plan.specs))
    engine = {part: one * (factor if name == of else 1.0) for part, of in ENGINE.items()}
    fleet = perturbed(plan.fleet, EngineFactors(**as_floats(**engine)), np.arange(len(one)))
    if name == "instances":
        fleet = fleet.with_instances(np.round(factor * np.asarray(fleet.n_instances)))
    found = fo.simulate(
        fleet, served(plan, name, factor), problem.assumptions, problem.slo, n_replications=REPLICATIONS
    )
    of_fleet = {**found.metrics, "ttft_p99_s": found.metrics["ttft_p99_of_all_s"]}
    places = [(None, of_fleet), *enumerate(found.pools)]
    return [fo.ObservedFigure(figure, of[figure].mean, pool) for pool, of in places for figure in FIGURES]


ENGINE = {"step": "decode", "prefill": "prefill", "power": "power"}  # of an engine's factors: the inputs


def served(plan: fo.Plan, name: str, factor: float) -> fo.Workload:
    """The plan's workload with its rate, bursts or lengths changed; lengths are whole, and fit the last window."""
    workload = plan.problem.workload
    times = {each: factor if name == each else 1.0 for each in ("rate", "prompts", "outputs", "burstiness")}
    longest = float(np.asarray(plan.fleet.window_tokens)[-1])
    output = np.minimum(np.round(times["outputs"] * np.asarray(workload.output_tokens)), longest - 1.0)
    prompt = np.minimum(
        np.maximum(np.round(times["prompts"] * np.asarray(workload.prompt_tokens)), 1.0), longest - output
    )
    return fo.make_workload(
        prompt,
        output,
        np.asarray(workload.weight),
        arrival_rate_per_s=times["rate"] * float(workload.arrival_rate_per_s),
        arrival_scv=times["burstiness"] * float(workload.arrival_scv),
        longest_tokens=longest,
    )


if __name__ == "__main__":
    main()
