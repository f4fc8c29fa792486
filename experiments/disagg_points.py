"""Measured serving points of lanes of two stages, beside what our engines say of them: results/disagg_points.csv.

    python experiments/disagg_points.py FOLDER

FOLDER holds `points.csv` (`_scored_points.py`). Every point is played as it was measured (`_two_stage_loop.py`): a
closed loop of `concurrency` requests over the x instances that prefill and the y that decode, by the step laws and the
hand-over of `build_pair`, over InfiniBand, on GB200 over NVLink. No law has seen any of these points: hosts are fitted
to instances that do both (`fit_hosts.py`). Tokens per second of a GPU are by Little's law from TTFT and TPOT, measured
and predicted alike.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _results import write_table  # noqa: E402
from _scored_points import LEAST_FRAC, OWN_FOUR_BITS, Point, read_points, throughput  # noqa: E402
from _serving_points import LLMS, PRECISIONS  # noqa: E402
from _two_stage_loop import Loop, played, steps_of  # noqa: E402

from fleetopt_jax.catalog.links import LINKS, build_pair  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec, TwoStageSpec  # noqa: E402
from fleetopt_jax.catalog.steps import Parallelism  # noqa: E402

LLM_OF = LLMS | {"nvidia/Qwen3-32B-NVFP4": "qwen3-32b"}
AIM = 0.25  # of the median error
QUANTITIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "tok_per_s_per_gpu": "tok/s per GPU"}
GROUPS = ("by tensor parallelism", "by up to 8 groups", "by 16 groups and more")  # that decode


@dataclass(frozen=True)
class Stage:
    """Instances of one stage."""

    n: int
    split: Parallelism

    @property
    def name(self) -> str:
        s = self.split
        return f"{self.n} x TP{s.tp} DP{s.dp} EP{s.ep}"

    @property
    def n_gpus(self) -> int:
        return self.n * self.split.n_gpus


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    lines, whys = [], Counter()
    start = time.perf_counter()
    for point in read_points(parser.parse_args().folder):
        if point.aggregated:
            continue
        found = row_of(point)
        if isinstance(found, str):
            whys[found] += 1
        else:
            lines.append(found)
            errors = " ".join(f"{name} {found[f'{name}_error']:+.0%}" for name in QUANTITIES)
            print(f"{time.perf_counter() - start:.0f} s: {' '.join(map(str, list(found.values())[:9]))} {errors}")
    write_table("disagg_points.csv", list(lines[0]), [list(line.values()) for line in lines])
    print(report(lines))
    for why, n in whys.most_common():
        print(f"{n} left out: {why}")


def row_of(point: Point) -> dict[str, object] | str:
    """Measured and predicted, or why nothing is predicted."""
    columns = point.columns
    if not columns["prefill_num_workers"]:
        return "how many instances prefill and decode is not said"
    if point.model not in LLM_OF or not point.precision:
        return "no LLM of the catalog, or no precision said"
    if not point.concurrency:
        return "concurrency not said"
    prefill, decode = (stage_of(columns, name) for name in ("prefill", "decode"))
    link = LINKS["nvlink" if point.gpu == "gb200" else "infiniband"]
    try:
        pair = build_pair(TwoStageSpec(*(spec_of(point, stage.split) for stage in (prefill, decode)), link))
    except ValueError as error:
        return f"no engine: {error}"
    loop = Loop(
        point.nominal_prompt_tokens,
        point.nominal_output_tokens,
        LEAST_FRAC if point.is_drawn else 1.0,
        point.concurrency,
        prefill.n,
        decode.n,
        prefill.split.dp,
    )
    ttft_s, tpot_s = played(loop, steps_of(pair, loop))
    n_gpus = prefill.n_gpus + decode.n_gpus
    values = {
        "ttft_s": (point.ttft_s, ttft_s),
        "tpot_s": (point.tpot_s, tpot_s),
        "tok_per_s_per_gpu": (point.tok_per_s / n_gpus, throughput(point, ttft_s, tpot_s) / n_gpus),
    }
    row: dict[str, object] = {
        "serving": point.serving,
        "version": point.version,
        "llm": LLM_OF[point.model],
        "gpu": point.gpu,
        "precision": point.precision,
        "prompt_tokens": point.nominal_prompt_tokens,
        "output_tokens": point.nominal_output_tokens,
        "concurrency": point.concurrency,
        "prefill": prefill.name,
        "decode": decode.name,
        "n_gpus": n_gpus,
    }
    for name, (measured, predicted) in values.items():
        row |= {name: measured, f"{name}_predicted": predicted, f"{name}_error": predicted / measured - 1.0}
    return row


def stage_of(columns: dict[str, str], name: str) -> Stage:
    """As the file has it: nothing or 0 where it does not say stands for 1."""
    fields = ("tp_size", "pp_size", "attention_dp_size", "moe_ep_size")
    tp, pp, dp, ep = (max(int(float(columns[f"{name}_{each}"] or 1)), 1) for each in fields)
    return Stage(int(float(columns[f"{name}_num_workers"])), Parallelism(tp=tp, ep=min(ep, tp * dp), dp=dp, pp=pp))


def spec_of(point: Point, split: Parallelism) -> EngineSpec:
    precision = "mxfp4" if point.precision == "fp4" and point.model in OWN_FOUR_BITS else PRECISIONS[point.precision]
    return EngineSpec(
        point.gpu,
        LLM_OF[point.model],
        split.tp,
        precision,
        serving=point.serving,
        ep=split.ep,
        dp=split.dp,
        pp=split.pp,
    )


def report(lines: Sequence[dict]) -> str:
    """Medians of errors, absolute and signed: by how instances decode, by serving engine and GPU, and over all."""
    texts = ["| | points | TTFT | TPOT | tok/s per GPU |", "|---|---:|---:|---:|---:|"]
    for name, some in _groups(lines):
        cells = []
        for quantity in QUANTITIES:
            errors = np.array([line[f"{quantity}_error"] for line in some], float)
            reached = "" if np.median(np.abs(errors)) > AIM else ", reached"
            cells.append(f"{100 * np.median(np.abs(errors)):.0f} % ({100 * np.median(errors):+.0f}){reached}")
        texts.append(f"| {name} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(texts)


def _groups(lines: Sequence[dict]) -> Iterator[tuple[str, list[dict]]]:
    for name in GROUPS:
        yield f"decode {name}", [line for line in lines if _decodes(line) == name]
    for key in sorted({(line["serving"], line["gpu"], line["precision"]) for line in lines}):
        yield " ".join(key), [x for x in lines if (x["serving"], x["gpu"], x["precision"]) == key]
    yield "all", list(lines)


def _decodes(line: dict) -> str:
    """How the instances of the second stage share sequences."""
    groups = int(line["decode"].split(" DP")[1].split(" ")[0])
    return GROUPS[0] if groups == 1 else GROUPS[1] if groups <= 8 else GROUPS[2]


if __name__ == "__main__":
    main()
