"""Time of the search of services that share a stock: four of them, three kinds of GPU, 500 GPUs.

    python experiments/benchmarks/services.py

A chat (azure-conv) and code (azure-code) by Llama-3.1-70B, agents (mooncake-conv) by Qwen3-32B and both Azure traces by
gpt-oss-120b, at most two pools each, on 240 H100, 140 H200 and 120 B200. The first search is a new process's, with the
compiled programs that `fleetopt` keeps, if any; the second also finds what more GPUs are worth. CPU seconds are of all
threads: on two free cores the wall clock lies between half of them and all. `load` is how many processes wanted a core.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fleetopt_jax as fo
from fleetopt_jax.cli import backend
from fleetopt_jax.core.files import write_whole

backend.configure()

HERE = Path(__file__).parent
STOCK = {"h100": 240, "h200": 140, "b200": 120}
SERVICES = {  # workload, requests/s, LLM, GPUs an instance, P99 TTFT [s]
    "chat": ("azure-conv", 300.0, "llama-3.1-70b", 8, 0.5),
    "code": ("azure-code", 30.0, "llama-3.1-70b", 8, 1.0),
    "agents": ("mooncake-conv", 12.0, "qwen3-32b", 4, 8.0),
    "both": ("azure", 250.0, "gpt-oss-120b", 4, 1.0),
}


def problem(workload: str, rate_per_s: float, llm: str, tp: int, ttft_p99_s: float) -> fo.Problem:
    return fo.make_problem(
        fo.load_workload(workload, rate_per_s=rate_per_s),
        [fo.EngineSpec(gpu, llm, tp=tp) for gpu in STOCK],
        slo=fo.make_slo(ttft_p99_s=ttft_p99_s),
    )


def timed(search: Callable[[], fo.ServicesPlan | fo.NoServicesPlan]) -> tuple[dict, fo.ServicesPlan]:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    answer = search()
    took = {"load": os.getloadavg()[1], "wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}
    assert isinstance(answer, fo.ServicesPlan)
    return took, answer


def main() -> None:
    services = fo.make_services(
        {name: problem(*said) for name, said in SERVICES.items()}, budget=fo.make_budget(gpus_of=STOCK)
    )
    result: dict = {"stock": STOCK, "services": len(SERVICES)}
    result["first"], answer = timed(lambda: fo.optimize_services(services, worth=False))
    print(json.dumps(result), answer.status, answer.search.gap, file=sys.stderr, flush=True)
    result["second_with_worth"], answer = timed(lambda: fo.optimize_services(services))
    result |= {
        "status": answer.status,
        "gap": answer.search.gap,
        "n_evaluated": answer.search.n_evaluated,
        "gpus": answer.n_gpus_of,
        "tok_per_j": answer.objective,
        "prices": dict(answer.prices),
        "worth": [vars(each) for each in answer.worth],
    }
    text = json.dumps(result, indent=2)
    print(text)
    write_whole(HERE / "services.json", text + "\n")


if __name__ == "__main__":
    main()
