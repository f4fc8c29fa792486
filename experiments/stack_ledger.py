"""What of 2.5x survives a stack of 2026: the second ledger, from the physical system on, six workloads, H100 and B200.

    python experiments/stack_ledger.py [WORKLOAD ...]

A newer release, prefill and decode apart, a prefix cache, drafts: every row adds one and is searched again. Fleets,
rates and limits are the first ledger's (`ledger.py`). Of every prompt 36 % is found in a prefix cache, as of Mooncake's
conversations, which is assumed of the others; draft heads accept what they were measured with. Requests are 256
weighted atoms of each workload, whose lengths are the windows that are searched. Rows are kept as they are found, in
results/stack_ledger.csv; walks that are whole are not walked again. Draws results/stack_ledger.
"""

import argparse

import jax

jax.config.update("jax_enable_x64", True)

from _results import RESULTS, new_figure, read_table, write_table  # noqa: E402
from ledger import GPUS, TTFT_P99_S, TTFT_S_PER_TOKEN, WORKLOADS  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load  # noqa: E402
from fleetopt_jax.documents.ledger import LedgerRow  # noqa: E402
from fleetopt_jax.fleet.fleet import make_slo  # noqa: E402
from fleetopt_jax.published.stack import CHANGES, stack_steps  # noqa: E402
from fleetopt_jax.published.walk import walked  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.style import grid_along, plain_numbers, say, styled  # noqa: E402
from fleetopt_jax.workload.compress import compressed  # noqa: E402

HIT_FRAC = 0.36  # results/prefix_thresholds: of Mooncake's conversations, two pools that forget nothing
ATOMS = 256  # with 1,024 FleetOpt is up to 1.2 % better on azure-conv, one pool and two by 0.02 %
NAME = "stack_ledger.csv"
LABELS = {
    "engine": "vLLM 0.11",
    "release": "newest vLLM",
    "stages": "two stages",
    "prefix_cache": "prefix cache",
    "speculate": "drafts",
}
COLOURS = {"h100": "#1f6fb4", "b200": "#c2571a"}
ABOVE = {"h100": -16, "b200": 6}  # of a dot of FleetOpt, or below one of one pool, the label [points]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=WORKLOADS)
    lines = read_table(NAME)
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
    save_figure(figure_of(read_table(NAME)), RESULTS / "stack_ledger")


def rows_of(name: str, gpu: str):
    """The rows of a workload on a GPU, as they are found."""
    slo = make_slo(ttft_p99_s=TTFT_P99_S, ttft_s_per_token=TTFT_S_PER_TOKEN)
    workload = compressed(load(name).workload, ATOMS)
    return walked(stack_steps(workload, EngineSpec(gpu), slo=slo, hit_frac=HIT_FRAC, name=name))


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
    names = [name for name in WORKLOADS if any(line["workload"] == name for line in lines)]
    columns = min(3, len(names))
    figure = new_figure(2.0 + 3.6 * columns, 1.0 + 3.2 * -(-len(names) // columns))
    panels = figure.subplots(-(-len(names) // columns), columns, sharex=True, squeeze=False)
    for axes, name in zip(panels.flat, names):
        of_panel = [line for line in lines if line["workload"] == name]
        for gpu in dict.fromkeys(line["gpu"] for line in of_panel):
            _draw(axes, gpu, [line for line in of_panel if line["gpu"] == gpu])
        axes.set_title(name)
        axes.set_xticks(range(len(CHANGES)), [LABELS[each] for each in CHANGES], rotation=30, ha="right")
        axes.set_xlim(-0.4, len(CHANGES) - 0.6)
        axes.set_ylim(0.0, 1.15 * max(line["tok_per_j_fleetopt"] or 1e-3 for line in of_panel))
        plain_numbers(axes.yaxis)
        grid_along(axes, "y")
    for axes in list(panels.flat)[len(names) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("output tokens per joule")
    panels[0, 0].legend(loc="lower right")
    say(figure, takeaway(lines))
    return figure


def _draw(axes, gpu: str, some: list[dict]) -> None:
    at = [CHANGES.index(line["choice"]) for line in some]
    one, best = ([line[f"tok_per_j_{name}"] or float("nan") for line in some] for name in ("homogeneous", "fleetopt"))
    look = {"color": COLOURS[gpu], "markersize": 5}
    axes.plot(at, one, "o--", linewidth=1.2, label=f"{gpu.upper()}, one pool", **look)
    axes.plot(at, best, "o-", label=f"{gpu.upper()}, FleetOpt", **look)
    for line, x, y in zip(some, at, best if ABOVE[gpu] > 0 else one):
        if line["gain"]:
            at_text = {"xytext": (0, ABOVE[gpu]), "textcoords": "offset points", "ha": "center", "fontsize": 9.5}
            axes.annotate(f"{line['gain']:.2f}x", (x, y), color=COLOURS[gpu], **at_text)


def takeaway(lines: list[dict]) -> str:
    """What FleetOpt gains before and behind the stack."""
    texts = []
    for gpu in GPUS:
        ends = [
            [line["gain"] for line in lines if (line["gpu"], line["choice"]) == (gpu, choice) and line["gain"]]
            for choice in (CHANGES[1], CHANGES[-1])
        ]
        if all(ends):
            before, after = (" to ".join(f"{x:.2f}" for x in sorted({min(some), max(some)})) for some in ends)
            texts.append(f"{gpu.upper()} {before}x and {after}x")
    return "FleetOpt over one pool, with the newest vLLM and on a stack of 2026:\n" + "; ".join(texts)


if __name__ == "__main__":
    main()
