"""What of 2.5x survives a stack of 2026: the second ledger, from the physical system on, six workloads, H100 and B200.

    python experiments/stack_ledger.py [WORKLOAD ...]

A newer release, prefill and decode apart, a prefix cache, drafts: every row adds one and is searched again. Fleets,
rates and limits are the first ledger's (`ledger.py`). Of every prompt 36 % is found in a prefix cache, as of Mooncake's
conversations, which is assumed of the others; draft heads accept what they were measured with. Requests are 256
weighted atoms of each workload, whose lengths are the windows that are searched. Rows are kept as they are found, in
results/stack_ledger.csv; walks that are whole are not walked again. Draws results/stack_ledger.
"""

import argparse
import csv

import jax

jax.config.update("jax_enable_x64", True)

from _results import RESULTS, new_figure, write_table  # noqa: E402
from ledger import GPUS, TTFT_P99_S, TTFT_S_PER_TOKEN, WORKLOADS  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load  # noqa: E402
from fleetopt_jax.documents.ledger import LedgerRow  # noqa: E402
from fleetopt_jax.fleet.fleet import make_slo  # noqa: E402
from fleetopt_jax.published.stack import CHANGES, stack_ledger  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.style import grid_along, plain_numbers, say, styled  # noqa: E402
from fleetopt_jax.workload.compress import compressed  # noqa: E402

HIT_FRAC = 0.36  # results/prefix_thresholds: of Mooncake's conversations, two pools that forget nothing
ATOMS = 256  # with 1,024 FleetOpt is 1.3 % better on azure-conv, one pool and two by 0.02 %
NAME = "stack_ledger.csv"
LABELS = {
    "engine": "vLLM 0.11",
    "release": "newest vLLM",
    "stages": "two stages",
    "prefix_cache": "prefix cache",
    "speculate": "drafts",
}
COLOURS = {"h100": "#1f6fb4", "b200": "#c2571a"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=WORKLOADS)
    lines = kept_lines()
    for name in parser.parse_args().workloads:
        for gpu in GPUS:
            if sum((line["workload"], line["gpu"]) == (name, gpu) for line in lines) == len(CHANGES):
                continue
            lines = [line for line in lines if (line["workload"], line["gpu"]) != (name, gpu)]
            for row in rows_of(name, gpu):
                lines.append({"workload": name, "gpu": gpu, **row.to_json()})
                keep(lines)
                print({key: value for key, value in lines[-1].items() if value is not None}, flush=True)
    keep(lines)
    save_figure(figure_of(kept_lines()), RESULTS / "stack_ledger")


def rows_of(name: str, gpu: str):
    """The rows of a workload on a GPU, as they are found."""
    slo = make_slo(ttft_p99_s=TTFT_P99_S, ttft_s_per_token=TTFT_S_PER_TOKEN)
    workload = compressed(load(name).workload, ATOMS)
    return stack_ledger(workload, EngineSpec(gpu), slo=slo, hit_frac=HIT_FRAC, name=name)


def kept_lines() -> list[dict]:
    """What was found before, as numbers."""
    if not (RESULTS / NAME).exists():
        return []
    with (RESULTS / NAME).open(newline="") as file:
        return [{key: _number(value) for key, value in line.items()} for line in csv.DictReader(file)]


def _number(value: str):
    if not value:
        return None
    try:
        return float(value)
    except ValueError:
        return value


def keep(lines: list[dict]) -> None:
    """All of them, in the order of workloads, GPUs and changes."""
    order = (WORKLOADS, GPUS, CHANGES)
    keys = ("workload", "gpu", "choice")
    rows = sorted(lines, key=lambda line: [names.index(line[key]) for names, key in zip(order, keys)])
    columns = ["workload", "gpu", *LedgerRow.__dataclass_fields__]
    names = {"from_": "from"}
    columns = [names.get(column, column) for column in columns]
    write_table(NAME, columns, [[line[column] for column in columns] for line in rows])


@styled
def figure_of(lines: list[dict]) -> Figure:
    """A panel for each workload: tokens per joule of the best single pool, and of FleetOpt above it, with its gain."""
    figure = new_figure(12.0, 7.2)
    panels = figure.subplots(2, 3, sharex=True)
    for axes, name in zip(panels.flat, WORKLOADS):
        for gpu in GPUS:
            some = [line for line in lines if (line["workload"], line["gpu"]) == (name, gpu)]
            at = [CHANGES.index(line["choice"]) for line in some]
            one = [line["tok_per_j_homogeneous"] or float("nan") for line in some]
            best = [line["tok_per_j_fleetopt"] or float("nan") for line in some]
            axes.plot(at, one, "o--", color=COLOURS[gpu], markersize=5, linewidth=1.2, label=f"{gpu.upper()}, one pool")
            axes.plot(at, best, "o-", color=COLOURS[gpu], markersize=6, label=f"{gpu.upper()}, FleetOpt")
            for line, x, y in zip(some, at, best):
                if line["gain"]:
                    axes.annotate(f"{line['gain']:.2f}x", (x, y), (0, 6), textcoords="offset points", ha="center")
        axes.set_title(name)
        axes.set_xticks(range(len(CHANGES)), [LABELS[each] for each in CHANGES], rotation=30, ha="right")
        axes.set_ylim(0.0, None)
        axes.margins(y=0.18)
        plain_numbers(axes.yaxis)
        grid_along(axes, "y")
    for axes in panels[:, 0]:
        axes.set_ylabel("output tokens per joule")
    panels[0, 0].legend(loc="best")
    say(figure, takeaway(lines))
    return figure


def takeaway(lines: list[dict]) -> str:
    """What routing and compression gain at both ends, and what the stack itself does."""
    ends = {
        choice: [line for line in lines if line["choice"] == choice and line["gain"]]
        for choice in (CHANGES[0], CHANGES[-1])
    }
    texts = []
    for gpu in GPUS:
        first, last = ([line["gain"] for line in some if line["gpu"] == gpu] for some in ends.values())
        if first and last:
            texts.append(f"{gpu.upper()} {min(first):.2f} to {max(first):.2f}x, {min(last):.2f} to {max(last):.2f}x")
    return f"FleetOpt over one pool, physical and on a stack of 2026: {'; '.join(texts)}"


if __name__ == "__main__":
    main()
