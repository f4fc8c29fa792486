"""What people have published of single deployments, and what our engines say of it.

    python experiments/field_cases.py

`field_cases.csv` has each figure with its source and how it was measured:

    all at once                 n requests of one length sent together (`vllm bench serve` without a rate)
    closed loop                 n in flight, ten times as many in total, lengths drawn from 0.8 of the nominal ones up
    closed loop, exact lengths  likewise, of one length
    steady                      n decoding sequences of one context, prompts between them at `rate_per_s`; C19 sent the
                                same 44 to 50 prompts over and over, so that the prefix cache leaves a block of each
    idle                        a model loaded, nothing to do

Steps of vLLM 0.10 and 0.11 are those of the host law of vLLM 0.11. None of these figures was fitted to but C21, whose
LLM and GPU are among the serving points, and some of C23, which the catalog cites. Writes field_cases.csv and .md to
results/.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

from _results import RESULTS, write_table  # noqa: E402

from fleetopt_jax.calibrate.predict import Prediction, Sigmas, limits_of, predicted  # noqa: E402
from fleetopt_jax.catalog.engines import engine_entry  # noqa: E402
from fleetopt_jax.catalog.gpus import gpu_entry  # noqa: E402
from fleetopt_jax.catalog.hosts import host_entry  # noqa: E402
from fleetopt_jax.catalog.llms import llm_entry  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.fleet.engine import Engine  # noqa: E402
from fleetopt_jax.fleet.step_law import step_law_of  # noqa: E402
from fleetopt_jax.laws.closed_loop import LENGTH_SPREAD, REQUESTS_PER_SEQUENCE, Benchmark  # noqa: E402
from fleetopt_jax.laws.mixed_step import decoding, with_prompts  # noqa: E402

HERE = Path(__file__).parent
WITHIN = 0.25
N_ROUNDS = 30  # of the fixed point of a step and its prompts
TITLES = {
    "C12": "Qwen3-14B and 32B on H100",
    "C13": "the same on A100",
    "C14": "Qwen3-235B-A22B on 8 H100 and A100",
    "C15": "gpt-oss on H100",
    "C17": "DeepSeek-R1 fp8 on 8 H200",
    "C19": "Llama-2, CodeLlama and Mixtral on H100, ITL, decoding alone",
    "C19 with prompts": "the same, with 16 tokens of each prompt",
    "C20": "Llama-3.3-70B on 4 H100",
    "C21": "gpt-oss-120b on 2, 4 and 8 H100",
    "C22": "DeepSeek-V3.2 on 8 B200",
    "C23": "idle with a model loaded",
    "C24": "watts of A100, H200, B200",
    "sweep": "Llama-3.1-70B on 8 B200, windows of 2K to 64K",
}
WHYS = {  # what is not within 25 %
    "C12": "Qwen3-14B and 32B fill one H100's memory: 200 to 310 TFLOP/s there, where the same benchmark reaches 52 to "
    "57 % of the peak of A100, and ML.ENERGY's Qwen3-14B on H100 is predicted within 5 %. Nobody says how often "
    "sequences were preempted. Beside Qwen3-32B 32,000 tokens do not fit by our account (5 figures of 6).",
    "C14": "4,000 tokens on H100 come out 26 % too slow; the other five within 25 %.",
    "C19 with prompts": "Mixtral with 103 in flight, 29 % too slow: a step with any prompt tokens is taken to be as "
    "slow as one with many.",
    "C21": "watts are means of whole runs, loading and warming up with them: GPUs were 27 to 55 % busy.",
    "C23": "two publish 80 and 115 W of H200; the catalog has the latter.",
    "C24": "fractions of the TDP are borrowed from H100 (A100 draws more of its 400 W while it reads memory) and were "
    "fitted to larger LLMs (Phi-3-mini on B200).",
    "sweep": "at 64K the measured step would read caches and weights at 102 % of the data-sheet bandwidth, at 32K at "
    "87 %: contexts were shorter than is said, or kernels are better than those that were timed. Watts come out 10 to "
    "27 % too high at every window: the law was fitted to contexts below 8K.",
}
PREFILL_TOKENS = 8192.0
PREFILL = {"h200": "4.0 to 5.0", "b200": "2.6 to 3.5"}  # speed-up of a prompt of Llama-3.1-70B fp8, TP 1 to 8, measured


@dataclass(frozen=True)
class Case:
    """One figure: what was measured, of what, and how."""

    case: str
    gpu: str
    llm: str
    tp: int
    precision: str
    serving: str
    protocol: str
    prompt_tokens: int
    output_tokens: int
    n: float
    context_tokens: float
    rate_per_s: float
    quantity: str
    measured: float
    source: str


def main() -> None:
    cases = read_cases()
    said = [says(case) for case in cases]
    columns = ["case", "gpu", "llm", "tp", "precision", "serving", "protocol", "prompt_tokens", "output_tokens", "n"]
    columns += ["context_tokens", "rate_per_s", "quantity", "measured"]
    rows = [
        [*(_stem(getattr(case, name)) for name in columns), value, value / case.measured]
        for case, value in zip(cases, said)
    ]
    write_table("field_cases.csv", [*columns, "predicted", "ratio"], rows)
    text = "\n".join([*_markdown(cases, said), "", *_prefill(), ""])
    write_whole(RESULTS / "field_cases.md", text)
    print(text)


def read_cases() -> list[Case]:
    """The published figures."""
    kinds = Case.__annotations__
    with (HERE / "field_cases.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [Case(**{name: _read(line[name], of) for name, of in kinds.items()}) for line in lines]


def _read(text: str, of: type) -> Any:
    return text if of is str else of(text or 0)


def _stem(value: str | float) -> str | float:
    """An LLM's file by its name."""
    return Path(value).stem if isinstance(value, str) and value.endswith(".json") else value


@cache
def _engine(gpu: str, llm: str, tp: int, precision: str, serving: str) -> Engine:
    """The engine of operators, with the host law of `serving`."""
    name = str(HERE / llm) if llm.endswith(".json") else llm
    engine = engine_entry(EngineSpec(gpu, name, tp, precision, serving="vllm")).engine
    host = host_entry(serving, gpu_entry(gpu), experts=llm_entry(name).architecture.n_experts > 0)
    law = engine.step
    if law is None:
        raise ValueError(f"need an engine of operators for {llm} on {gpu}")
    return replace(engine, step=replace(law, step=replace(law.step, host=host.law)))


def says(case: Case) -> float:
    """What our engine says of it, SI units; nan where a request does not fit the memory."""
    if case.protocol == "idle":
        return float(gpu_entry(case.gpu).gpu.idle_w)
    engine = _engine(case.gpu, case.llm, case.tp, case.precision, case.serving)
    if case.protocol == "steady":
        return _steady(engine, case)
    seen, tokens = _benchmark(engine, case), case.prompt_tokens + case.output_tokens
    if seen is None:
        return math.nan
    return {
        "tpot_s": seen.tpot_s,
        "output_tok_per_s": seen.output_tok_per_s,
        "total_tok_per_s": seen.output_tok_per_s * tokens / case.output_tokens,
        "power_w_per_gpu": seen.power_w / case.tp,
    }[case.quantity]


def _benchmark(engine: Engine, case: Case) -> Prediction | None:
    n = int(case.n)
    n_requests = n if case.protocol == "all at once" else REQUESTS_PER_SEQUENCE * n
    spread = LENGTH_SPREAD if case.protocol == "closed loop" else 1.0
    asked = Benchmark(case.prompt_tokens, case.output_tokens, n, n_requests, spread)
    return predicted(engine, Sigmas(0.0, 0.0, 0.0), [asked])[0]


def _steady(engine: Engine, case: Case) -> float:
    """A step is one with a prompt as often as prompts come; they come by the clock."""
    law = step_law_of(engine)
    alone = decoding(case.n, case.context_tokens, limits_of(engine).window_tokens)
    both = with_prompts(alone, case.prompt_tokens) if case.rate_per_s else alone
    (alone_s, alone_j), (both_s, both_j) = ((float(law.step_s(b)), float(law.gpu_j(b))) for b in (alone, both))
    step_s = alone_s
    for _ in range(N_ROUNDS):
        share = min(1.0, case.rate_per_s * step_s)
        step_s = (1.0 - share) * alone_s + share * both_s
    share = min(1.0, case.rate_per_s * step_s)
    gpu_w = ((1.0 - share) * alone_j + share * both_j) / step_s
    return {
        "step_s": step_s,
        "output_tok_per_s": case.n / step_s,
        "power_w_per_gpu": gpu_w,
        "tok_per_j": case.n / step_s / (case.tp * gpu_w),
    }[case.quantity]


def _markdown(cases: Sequence[Case], said: Sequence[float]) -> list[str]:
    groups = defaultdict(list)
    for case, value in zip(cases, said):
        groups[case.case, case.quantity].append(value / case.measured)
    lines = ["Predicted over measured.", "", "| case | what | quantity | figures | lowest | highest | within 25 % |"]
    lines.append("|---|---|---|---:|---:|---:|---:|")
    for (name, quantity), ratios in groups.items():
        ratios = [ratio for ratio in ratios if ratio == ratio]  # nan where nothing is said
        inside = sum(abs(ratio - 1.0) <= WITHIN for ratio in ratios)
        low, high = (f"{x:.2f}" for x in (min(ratios), max(ratios)))
        lines.append(f"| {name} | {TITLES[name]} | {quantity} | {len(ratios)} | {low} | {high} | {inside} |")
    inside = sum(abs(value / case.measured - 1.0) <= WITHIN for case, value in zip(cases, said))
    lines += ["", f"{inside} of {len(cases)} figures within 25 %. Those that are not:", ""]
    return lines + [f"- {name}: {why}" for name, why in WHYS.items()]


def _prefill() -> list[str]:
    """How much faster a prompt is on eight GPUs than on one."""
    lines = []
    for gpu, measured in PREFILL.items():
        laws = [step_law_of(_engine(gpu, "llama-3.1-70b", tp, "fp8", "vllm")) for tp in (1, 8)]
        one, eight = (float(law.step_s(with_prompts(decoding(0.0, 0.0), PREFILL_TOKENS))) for law in laws)
        lines.append(f"{gpu.upper()} {one / eight:.2f} (measured {measured})")
    return [
        f"A prompt of 8K tokens to Llama-3.1-70B in fp8 on eight GPUs is faster than on one by: {', '.join(lines)}."
    ]


if __name__ == "__main__":
    main()
