"""The gradient of a fleet's tokens per joule through the optimum, in a notebook's worth of lines.

    python experiments/envelope.py

How much better would the best fleet be with 1 % more memory for the KV cache, not the fleet at hand but the one that
would then be built? The optimum moves, thresholds and instances with it, and yet its derivative needs no derivative of
the search: at an optimum d ln(tok/J) / d ln(x) is that of the Lagrangian with everything held (envelope theorem).
Checked against the optima with 0.1 to 30 % more or less, searched anew: with real-valued instances at the same
threshold the two are one; whole fleets follow in steps. Two pools on Azure conversations, 1,000 requests/s, the
published laws on H100.
"""

from dataclasses import replace

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _results import GREY, LAW, MEASURED, RESULTS, finish, new_figure, write_table  # noqa: E402

from fleetopt_jax._optimize.plan import require_plan  # noqa: E402
from fleetopt_jax._optimize.problem import make_problem  # noqa: E402
from fleetopt_jax._optimize.search import optimize  # noqa: E402
from fleetopt_jax.catalog.engines import build, resolved  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec, OwnLaws  # noqa: E402
from fleetopt_jax.catalog.workloads import load_workload  # noqa: E402
from fleetopt_jax.fleet.assumptions import PUBLISHED  # noqa: E402
from fleetopt_jax.fleet.evaluate import evaluate  # noqa: E402
from fleetopt_jax.fleet.fleet import Fleet  # noqa: E402
from fleetopt_jax.fleet.sizing import size_fleet  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402

WORKLOAD = "azure-conv"
MOVES = (-0.3, -0.2, -0.1, -0.05, -0.001, 0.0, 0.001, 0.05, 0.1, 0.2, 0.3)  # ln of the factor on the KV cache
REAL = replace(PUBLISHED, rounding="real")
COLUMNS = ("log_kv_factor", "tok_per_j_envelope", "tok_per_j_relaxed", "tok_per_j_whole", "short_window_tokens")


def main() -> None:
    spec = EngineSpec("h100", source="projected")
    problem = make_problem(
        load_workload(WORKLOAD), [spec], workload_name=WORKLOAD, assume="published", assumptions=PUBLISHED
    )
    plan = require_plan(optimize(problem))
    engine = build(spec)

    def kv_off(log_blocks):
        return replace(engine.kv, n_blocks=engine.kv.n_blocks * jnp.exp(log_blocks))

    def off(log_blocks) -> Fleet:
        return plan.fleet.with_engines([replace(engine, kv=kv_off(log_blocks))] * len(plan.fleet.lanes))

    def sized(log_blocks) -> Fleet:
        """Real-valued instances, as few as the load needs: the relaxed optimum at the plan's thresholds."""
        return size_fleet(off(log_blocks), problem.workload, problem.slo, REAL)

    def log_tok_per_j(log_blocks, n_instances):
        fleet = off(log_blocks).with_instances(n_instances)
        return jnp.log(evaluate(fleet, problem.workload, REAL).tok_per_j)

    @jax.jit
    def through(log_blocks):
        return log_tok_per_j(log_blocks, sized(log_blocks).n_instances)

    # Straight through the optimum, and by its multipliers: N_k >= needed_k binds, so lambda_k = - d ln(tok/J) / d N_k.
    straight = float(jax.jit(jax.grad(through))(0.0))
    by_blocks, by_n = jax.jit(jax.grad(log_tok_per_j, argnums=(0, 1)))(0.0, sized(0.0).n_instances)
    _, needed_moves = jax.jvp(lambda x: sized(x).n_instances, (0.0,), (1.0,))
    envelope = float(by_blocks + jnp.dot(by_n, needed_moves))
    difference = float((through(1e-4) - through(-1e-4)) / 2e-4)
    rows = []
    for move in MOVES:
        laws = OwnLaws(kv=jax.tree.map(np.asarray, kv_off(move)))
        best = require_plan(optimize(problem.serving(specs=(resolved(replace(spec, laws=laws)),))))
        rows.append(
            [
                move,
                float(jnp.exp(through(0.0) + envelope * move)),
                float(jnp.exp(through(move))),
                float(best.metrics.tok_per_j),
                float(best.fleet.window_tokens[0]),
            ]
        )
    write_table("envelope.csv", COLUMNS, rows)
    save_figure(_figure(rows, envelope), RESULTS / "envelope")
    logs = np.log([row[3] for row in rows])
    whole = float((logs[-1] - logs[0]) / (MOVES[-1] - MOVES[0]))
    print(f"d ln(tok/J at the optimum) / d ln(KV blocks): by multipliers {envelope:.8f}, straight {straight:.8f},")
    print(f"differences of relaxed optima {difference:.8f}, of whole optima over the whole range {whole:.4f}")


def _figure(rows: list[list], envelope: float):
    figure = new_figure(7.4, 4.8)
    axes = figure.subplots()
    move = [100 * np.expm1(row[0]) for row in rows]
    axes.plot(move, [row[1] for row in rows], "--", color=LAW, label=f"envelope theorem, slope {envelope:.3f}")
    axes.plot(move, [row[2] for row in rows], color=GREY, linewidth=1.2, label="sized anew, real instances")
    axes.plot(move, [row[3] for row in rows], "o", color=MEASURED, markersize=5, label="searched anew, whole instances")
    axes.legend(frameon=False, fontsize=9)
    finish(
        axes,
        x="change of the memory for the KV cache [%]",
        y="output tokens per joule of the best fleet\n(one GPU's watts per instance)",
    )
    axes.set_title(
        f"One derivative at the optimum foretells the optima around it:\n1 % more memory for the KV cache is "
        f"worth {envelope:.2f} % of the tokens per joule",
        loc="left",
        fontsize=11,
    )
    return figure


if __name__ == "__main__":
    main()
