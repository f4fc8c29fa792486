"""How far the law of lanes of two stages is from their simulation, plan by random plan.

    python experiments/two_stage_agreement.py [--plans 20] [--first 0] [--seed 17021]

Every plan is one lane that serves a trace, or the shorter ones of its requests, by 1 to 12 instances that prefill and 1
to 12 that decode, each stage at a random load up to the 85 % that plans allow, with a random burstiness and link; pairs
of engines are of one LLM, on one GPU or on two. Of the loads that a draw asks for, whole instances leave what they may.
Requests go to the shortest queue of either stage. Errors are of analytic / simulated - 1, of laws alone: both sides
have the same engines. Plans are kept as they are found, and those in the table not simulated again.
"""

import argparse
import time
from dataclasses import dataclass, replace

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _results import read_table, write_table  # noqa: E402

from fleetopt_jax._simulate import simulate  # noqa: E402
from fleetopt_jax.catalog.links import LINKS, build_pair  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec, TwoStageSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load_workload  # noqa: E402
from fleetopt_jax.core import programs  # noqa: E402
from fleetopt_jax.fleet.assumptions import PHYSICAL  # noqa: E402
from fleetopt_jax.fleet.evaluate import evaluate  # noqa: E402
from fleetopt_jax.fleet.fleet import Fleet, make_fleet  # noqa: E402
from fleetopt_jax.workload.atoms import Workload, make_workload  # noqa: E402

SEED = 17_021
WORKLOADS = ("azure-conv", "azure-code", "azure", "mooncake-conv")
ENGINES = {  # by LLM: GPU and tensor parallelism
    "llama-3.1-8b": (("h100", 1), ("h200", 1), ("b200", 1)),
    "llama-3.1-70b": (("h100", 4), ("h100", 8), ("h200", 4), ("b200", 2)),
    "gpt-oss-120b": (("h100", 2), ("b200", 1)),
}
LOADS = (0.15, 0.85)
BURSTINESS = (1.0, 6.0)
MOST_INSTANCES = 12
N_REPLICATIONS, REQUESTS = 2, 4000
TABLE = "two_stage_agreement.csv"
METRICS = {"tok_per_j": "tok/J", "itl_s": "mean ITL", "ttft_p99_s": "P99 TTFT"}
TARGETS = {"tok_per_j": 0.03, "itl_s": 0.05, "ttft_p99_s": 0.15}  # in the median


@dataclass(frozen=True)
class Case:
    """A plan as drawn."""

    values: dict[str, object]
    fleet: Fleet
    workload: Workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    lines, start = read_table(TABLE) if options.seed == SEED else [], time.perf_counter()
    for plan in range(options.first, options.first + options.plans):
        if any(line["plan"] == plan for line in lines):
            continue
        lines.append(row_of(draw_case(plan, options.seed)))
        found = lines[-1]
        errors = " ".join(f"{name} {found[f'{name}_error']:+.1%}" for name in METRICS)
        what = "{plan} {workload} {llm} {prefill}>{decode} {n_prefill}+{n_decode} {rho_prefill:.2f}/{rho_decode:.2f}"
        print(f"{time.perf_counter() - start:.0f} s: {what.format(**found)} {errors}", flush=True)
        if options.seed == SEED:
            lines.sort(key=lambda line: line["plan"])
            write_table(TABLE, list(lines[0]), [list(line.values()) for line in lines])
        jax.clear_caches()
        programs.forget()
    print(report(lines))


def draw_case(plan: int, seed: int = SEED) -> Case:
    """The plan of this number: engines, traffic, and instances for about the loads it asks for."""
    rng = np.random.default_rng([seed, plan])
    name, llm = rng.choice(WORKLOADS), rng.choice(list(ENGINES))
    specs = [
        EngineSpec(gpu, llm, tp=tp) for gpu, tp in (ENGINES[llm][i] for i in rng.integers(0, len(ENGINES[llm]), 2))
    ]
    link = list(LINKS.values())[rng.integers(0, len(LINKS))]
    scv, asked = float(rng.uniform(*BURSTINESS)), rng.uniform(*LOADS, 2)
    n = int(rng.integers(1, MOST_INSTANCES + 1))
    workload = _shorter(load_workload(name), float(rng.choice([0.5, 1.0])), scv)
    window = float(workload.longest_tokens)
    pair = build_pair(TwoStageSpec(*specs, link))

    @jax.jit
    def loads(rate, counts):
        at = replace(workload, arrival_rate_per_s=rate)
        fleet = make_fleet([pair], window_tokens=[window], n_instances=[[1, 1]])
        return evaluate(fleet.with_instances(counts[None]), at, quantiles=False).pools.stages.utilization[0]

    one = np.asarray(loads(jnp.asarray(1e-3), jnp.ones(2))) * 1e3  # of one instance each, by requests a second
    larger = int(np.argmax(one / asked))  # the stage that has n instances, the other fewer
    rate = n * asked[larger] / one[larger]
    counts = np.maximum(1, np.round(rate * one / asked)).astype(int)
    rate = min(rate, 0.85 * float(np.min(counts / one)))
    found = np.asarray(loads(jnp.asarray(rate), jnp.asarray(counts, float)))
    values = {
        "plan": plan,
        "workload": str(name),
        "longest_tokens": int(window),
        "llm": str(llm),
        "prefill": f"{specs[0].tp}x{specs[0].gpu}",
        "decode": f"{specs[1].tp}x{specs[1].gpu}",
        "link": link.name,
        "n_prefill": int(counts[0]),
        "n_decode": int(counts[1]),
        "arrival_scv": scv,
        "rate_per_s": rate,
        "rho_prefill": float(found[0]),
        "rho_decode": float(found[1]),
    }
    fleet = make_fleet([pair], window_tokens=[window], n_instances=[counts.tolist()])
    return Case(values, fleet, replace(workload, arrival_rate_per_s=np.asarray(rate)))


def _shorter(workload: Workload, share: float, scv: float) -> Workload:
    """The shorter ones of the requests."""
    prompt, output, weight = (
        np.asarray(getattr(workload, name)) for name in ("prompt_tokens", "output_tokens", "weight")
    )
    kept = np.cumsum(weight) <= share * weight.sum() * (1 + 1e-12)
    return make_workload(prompt[kept], output[kept], weight[kept], arrival_rate_per_s=1.0, arrival_scv=scv)


def row_of(case: Case) -> dict[str, object]:
    """Laws and simulation beside each other."""
    found = simulate(case.fleet, case.workload, PHYSICAL, n_requests=REQUESTS, n_replications=N_REPLICATIONS)
    row = dict(case.values)
    for name in METRICS:
        analytic, simulated = found.analytic[name], found.metrics[name].mean
        row |= {name: analytic, f"{name}_simulated": simulated, f"{name}_error": analytic / simulated - 1.0}
    return row


def report(lines: list[dict]) -> str:
    """Medians of the errors beside what is wanted."""
    texts = [f"{len(lines)} plans:"]
    for name, title in METRICS.items():
        errors = np.array([line[f"{name}_error"] for line in lines], float)
        median, ninth = np.quantile(np.abs(errors), [0.5, 0.9])
        texts.append(
            f"  {title}: median |error| {median:.1%} (wanted {TARGETS[name]:.0%}), 90th percentile {ninth:.1%}, "
            f"median {np.median(errors):+.1%}"
        )
    return "\n".join(texts)


if __name__ == "__main__":
    main()
