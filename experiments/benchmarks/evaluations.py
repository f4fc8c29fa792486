"""Two-pool evaluations per second: ours, batched and warm, against vllm-sr-sim's `fleet_tpw_analysis`.

    python -m pip install -e ".[peer]" && python experiments/benchmarks/evaluations.py

One evaluation sizes both pools of the azure-cdf fleet at 1,000 requests/s on H100 for one threshold (P99 wait 500 ms,
utilisation 0.85) and returns its tokens per joule. Ours integrates the CDF exactly over its 12,288 lengths; the peer
draws 3,000 samples a pool. Both run in this process, in turn, on the same thresholds, ours in several batches on all
cores, as searches do (one takes milliseconds, the first after a pause longer); the peer has one core. Ratios are what
to quote. The same fleets under the preset `physical` are timed beside them.
Also: the cost of value_and_grad against the value, for soft evaluations.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from fleetopt_jax._optimize.candidates import BATCH, make_caps, score_batch, weight_rows  # noqa: E402
from fleetopt_jax._optimize.problem import make_problem  # noqa: E402
from fleetopt_jax.catalog.engines import build  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import cdf_knots, load_workload  # noqa: E402
from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.core.threads import in_threads  # noqa: E402
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED, Assumptions  # noqa: E402
from fleetopt_jax.fleet.engine import Engine  # noqa: E402
from fleetopt_jax.fleet.evaluate import evaluate  # noqa: E402
from fleetopt_jax.fleet.fleet import fleet_of  # noqa: E402
from fleetopt_jax.workload.atoms import Workload  # noqa: E402
from fleetopt_jax.workload.compress import compressed  # noqa: E402

LONG_WINDOW = 65_536
ROUNDS = 5
BATCHES = 20  # of ours in one turn
PEER_EVALUATIONS = 20
N_FLEETS, N_ATOMS = 12, 512  # of the soft evaluations whose gradient is timed


def main() -> None:
    ours, compile_s = per_s(PUBLISHED)
    physical, physical_compile_s = per_s(PHYSICAL)
    peer = _peer()
    value_s, gradient_s, gradient_compile_s = _gradient()
    rates = [(ours(), peer() if peer else None, physical()) for _ in range(ROUNDS)]
    ours_per_s = median(rate for rate, _, _ in rates)
    result = {
        "ours_evaluations_per_s": ours_per_s,
        "ours_compile_s": compile_s,
        "peer_evaluations_per_s": median(rate for _, rate, _ in rates) if peer else None,
        "ratio": median(a / b for a, b, _ in rates) if peer else None,
        "physical_evaluations_per_s": median(rate for _, _, rate in rates),
        "physical_compile_s": physical_compile_s,
        "value_s": value_s,
        "value_and_grad_s": gradient_s,
        "value_and_grad_over_value": gradient_s / value_s,
        "value_and_grad_compile_s": gradient_compile_s,
        "value_and_grad_fleets": N_FLEETS,
        "value_and_grad_atoms": N_ATOMS,
        "jax": jax.__version__,
    }
    print(json.dumps(result, indent=2))
    write_whole(Path(__file__).parent / "evaluations.json", json.dumps(result, indent=2) + "\n")


def asked(assumptions: Assumptions) -> tuple[tuple, dict]:
    """Arguments of `score_batch`: by their places, and named."""
    spec = EngineSpec("h100", source=assumptions.engine.name)
    problem = make_problem(load_workload("azure-cdf"), [spec], assumptions=assumptions)
    specs = problem.specs * 2
    fleet = problem.fleet(specs, [LONG_WINDOW] * 2, [1.0] * 2, [1.0] * 2)
    how = {"objective": weight_rows([problem.objective_weights], specs), "caps": make_caps(problem, specs)}
    how["assumptions"] = assumptions
    thresholds = np.linspace(1024, 12_288, BATCH).round()
    windows = jnp.stack([thresholds, np.full(BATCH, LONG_WINDOW)], axis=1)
    return (fleet, (windows, jnp.ones_like(windows)), BATCH, problem.workload, problem.slo), how


def per_s(assumptions: Assumptions) -> tuple[Callable[[], float], float]:
    """(evaluations per second in full batches, seconds of the first call)."""
    arguments, how = asked(assumptions)

    def run() -> None:
        jax.block_until_ready(score_batch(*arguments, **how))

    compile_s = _seconds(run)
    turn = range(BATCHES)
    return lambda: BATCHES * BATCH / _seconds(lambda: list(in_threads(lambda _: run(), turn))), compile_s


def _peer() -> Callable[[], float] | None:
    """Evaluations per second of the peer over the same range of thresholds, or None where it is not installed."""
    try:
        from fleet_sim.gpu_profiles.profiles import H100_80GB
        from fleet_sim.optimizer.tpw import _split_cdf, fleet_tpw_analysis
    except ImportError:
        print("skipped: vllm-sr-sim is not installed (pip install 'fleetopt_jax[peer]'); ours alone is measured")
        return None
    knots = [(int(tokens), fraction) for tokens, fraction in cdf_knots("azure-cdf")]
    thresholds = np.linspace(1024, 12_000, PEER_EVALUATIONS).round().astype(int)

    def run() -> None:
        for threshold in thresholds:
            short, long, share = _split_cdf(knots, int(threshold))
            fleet_tpw_analysis(
                [
                    {"gpu": H100_80GB, "cdf": short, "lam": 1000.0 * share, "max_ctx": int(threshold)},
                    {"gpu": H100_80GB, "cdf": long, "lam": 1000.0 * (1 - share), "max_ctx": LONG_WINDOW},
                ],
                1000.0,
            )

    return lambda: PEER_EVALUATIONS / _seconds(run)


def _gradient() -> tuple[float, float, float]:
    """(seconds of the value, of value_and_grad, of compiling the latter) for N_FLEETS fleets at once."""
    engine = build(EngineSpec("h100", source="projected"))
    real = replace(PUBLISHED, rounding="real")

    def merit(windows: jax.Array, n_instances: jax.Array, engine: Engine, workload: Workload) -> jax.Array:
        fleet = fleet_of((engine,) * 2, windows, jnp.ones(2), n_instances)
        metrics = evaluate(fleet, workload, real, router_width=0.05)
        return jnp.log(metrics.tok_per_j) + jnp.sum(metrics.pools.ttft_p99_s)

    windows = jnp.stack([jnp.linspace(2048, 12_288, N_FLEETS), jnp.full(N_FLEETS, LONG_WINDOW)], axis=1)
    workload = compressed(load_workload("azure-cdf"), N_ATOMS)
    arguments = windows, jnp.tile(jnp.array([70.0, 100.0]), (N_FLEETS, 1)), engine, workload
    value = jax.jit(jax.vmap(merit, (0, 0, None, None)))
    gradient = jax.jit(jax.vmap(jax.value_and_grad(merit, argnums=(0, 1)), (0, 0, None, None)))
    _seconds(lambda: jax.block_until_ready(value(*arguments)))
    compile_s = _seconds(lambda: jax.block_until_ready(gradient(*arguments)))
    pairs = [
        (
            _seconds(lambda: jax.block_until_ready(value(*arguments))),
            _seconds(lambda: jax.block_until_ready(gradient(*arguments))),
        )
        for _ in range(500)
    ]
    return median(a for a, _ in pairs), median(b for _, b in pairs), compile_s


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
