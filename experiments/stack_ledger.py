"""What of 2.5x survives a stack of 2026: the second ledger, from the physical system on, six workloads, H100 and B200.

    python experiments/stack_ledger.py [WORKLOAD ...]

A newer release, prefill and decode apart, a prefix cache, drafts: every row adds one and is searched again. Fleets,
rates and limits are the first ledger's (`ledger.py`). Of every prompt 36 % is found in a prefix cache, as of Mooncake's
conversations, which is assumed of the others; draft heads accept what they were measured with: each walk is
`fleetopt ledger --stack`. Rows are kept as they are found, in results/stack_ledger.csv; walks that are whole are not
walked again. Draws results/stack_ledger.
"""

import argparse

import jax

jax.config.update("jax_enable_x64", True)

from _results import RESULTS, read_table, write_table  # noqa: E402
from ledger import GPUS, TTFT_P99_S, TTFT_S_PER_TOKEN, WORKLOADS  # noqa: E402

from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.catalog.workloads import load  # noqa: E402
from fleetopt_jax.documents.ledger import LedgerRow  # noqa: E402
from fleetopt_jax.fleet.fleet import make_slo  # noqa: E402
from fleetopt_jax.published.stack import ATOMS, CHANGES, stack_steps  # noqa: E402
from fleetopt_jax.published.walk import walked  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402
from fleetopt_jax.report.ledger import stack_figure  # noqa: E402
from fleetopt_jax.workload.compress import compressed  # noqa: E402

NAME = "stack_ledger.csv"


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
    save_figure(stack_figure(walks(read_table(NAME))), RESULTS / "stack_ledger")


def rows_of(name: str, gpu: str):
    """The rows of a workload on a GPU, as they are found."""
    slo = make_slo(ttft_p99_s=TTFT_P99_S, ttft_s_per_token=TTFT_S_PER_TOKEN)
    return walked(stack_steps(compressed(load(name).workload, ATOMS), EngineSpec(gpu), slo=slo, name=name))


def keep(lines: list[dict]) -> None:
    """All of them, in the order of workloads, GPUs and changes."""
    order = (WORKLOADS, GPUS, CHANGES)
    keys = ("workload", "gpu", "choice")
    rows = sorted(lines, key=lambda line: [names.index(line[key]) for names, key in zip(order, keys)])
    columns = ["workload", "gpu", *LedgerRow.__dataclass_fields__]
    names = {"from_": "from"}
    columns = [names.get(column, column) for column in columns]
    write_table(NAME, columns, [[line[column] for column in columns] for line in rows])


def walks(lines: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """The rows of each workload on each GPU."""
    found: dict[str, dict[str, list[dict]]] = {}
    for line in lines:
        found.setdefault(line["workload"], {}).setdefault(line["gpu"], []).append(line)
    return found


if __name__ == "__main__":
    main()
