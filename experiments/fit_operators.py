"""Fit the operator laws to kernel timings: fleetopt_jax/catalog/data/operators/CLASS.json.

    python experiments/fit_operators.py FOLDER [--only CLASS]
    python experiments/fit_operators.py kernels/my-gpu --catalog my.toml --gpu-file my-gpu.toml [--borrow h100]

FOLDER holds the tables of each GPU: kernels timed alone, looped, by ai-dynamo/aiconfigurator (Apache-2.0). A class of
operators is a module of `experiments/operators/` whose `fit(folder)` gives its document: by GPU and data type the
coefficients of the law, the rows they were fitted to, what was left out of them and why, the median and the
90th-percentile relative error on those rows, and the median with every fifth shape left out of the fit and tried. The
same tables give the same files, byte for byte.

With --gpu-file, FOLDER holds the tables of one GPU of your own (`measure_gpu.py` writes them), and the file is a
catalog of it (`fleetopt optimize --catalog my-gpu.toml --gpu my-gpu`): its data sheet, which --catalog says (of a GPU
of ours it is known), and the operators that were timed, each coefficient near the lender's as far as the rows leave it
open. What was not timed is borrowed, when a plan asks for it, from the GPU that --borrow names.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

from operators import (  # noqa: E402
    collectives,
    decode_attention,
    elementwise,
    experts,
    gemm,
    latent_attention,
    prefill_attention,
    recurrent,
    serving_watts,
    watts,
)
from operators._fitting import Tables, rounded_document  # noqa: E402

from fleetopt_jax.catalog.gpus import OwnOperator, gpu_entry  # noqa: E402
from fleetopt_jax.catalog.operators import lender, own_operator  # noqa: E402
from fleetopt_jax.catalog.own import Catalog  # noqa: E402
from fleetopt_jax.core.errors import BadInput  # noqa: E402
from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.documents.own_catalog import gpu_file, load_catalog  # noqa: E402

OUT = Path(__file__).parents[1] / "fleetopt_jax" / "catalog" / "data" / "operators"
CLASSES = {
    "gemm": gemm,
    "experts": experts,
    "prefill_attention": prefill_attention,
    "decode_attention": decode_attention,
    "latent_attention": latent_attention,
    "recurrent": recurrent,
    "collectives": collectives,
    "elementwise": elementwise,
    "watts": watts,
    "serving_watts": serving_watts,
}
DOUBTFUL = 0.15  # median error of a fit: the nine GPUs' are 0.01 to 0.13
OWN = {  # tables that one's own GPU may have, by class
    "gemm": ("gemm",),
    "prefill_attention": ("context_attention",),
    "decode_attention": ("generation_attention",),
    "experts": ("moe",),
    "collectives": ("custom_allreduce", "nccl"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=CLASSES, help="one class of operators")
    own = parser.add_argument_group("a GPU of your own")
    own.add_argument("--gpu-file", type=Path, metavar="FILE", help="the catalog file to write")
    own.add_argument("--gpu", metavar="NAME", help="its name; by default the folder's")
    own.add_argument("--catalog", metavar="FILE", help="a catalog with its data sheet, [gpus.NAME]")
    own.add_argument("--borrow", metavar="GPU", help="the GPU of the catalog that lends what was not timed")
    options = parser.parse_args(argv)
    if options.gpu_file is None and (options.gpu or options.catalog or options.borrow):
        parser.error("--gpu, --catalog and --borrow are of a GPU of your own: need --gpu-file")
    try:
        if options.gpu_file is None:
            regenerate(options.folder, [options.only] if options.only else list(CLASSES))
        else:
            fit_own(options.folder, options)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def fit_own(folder: Path, options: argparse.Namespace) -> None:
    """Write the catalog file of one's own GPU, and say what of it was timed."""
    catalog = load_catalog(options.catalog) if options.catalog else Catalog()
    if options.catalog and options.gpu_file.resolve() == Path(options.catalog).resolve():
        raise BadInput(
            f"--gpu-file {options.gpu_file}", "is the file of --catalog", "need another: it would be replaced"
        )
    entry = catalog.gpu_entry(options.gpu or folder.resolve().name, "--gpu")
    entry = replace(entry, borrows=gpu_entry(options.borrow, "--borrow").name) if options.borrow else entry
    tables = Tables(entry, folder, lender(entry))
    asked = {name: OWN.get(name, ()) for name in ([options.only] if options.only else OWN)}
    classes = [name for name, files in asked.items() if any(tables.path(file) for file in files)]
    if not classes:
        allowed = ", ".join(f"{file}.*.parquet" for files in OWN.values() for file in files)
        raise BadInput(f"{folder}", "has no table of a GPU of your own", f"need {allowed} (experiments/measure_gpu.py)")
    found = {name: rounded_document(CLASSES[name].variants(tables)) for name in classes}
    for name in classes:
        print(name)
        print("\n".join(error_table({"gpus": {entry.name: found[name]}})))
    operators = tuple(own_operators(found))
    if not operators:
        raise BadInput(f"{folder}", f"too few rows to fit: {', '.join(tables.too_few)}")
    law = entry.law if entry.name == lender(entry) else gpu_entry(lender(entry)).law
    write_whole(options.gpu_file, gpu_file(replace(entry, borrows=lender(entry), law=law, operators=operators)))
    for what in tables.too_few:
        print(f"too few: {what}")
    for each in operators:
        if (each.median_error or 0.0) > DOUBTFUL:
            print(
                f"doubtful: {each.operator} {each.variant} is {100 * (each.median_error or 0):.0f} % off in the median"
            )
    timed = sorted({each.operator for each in operators})
    print(f"{options.gpu_file}: {entry.name} with {', '.join(timed)} as timed; all else as on {lender(entry)}")


def own_operators(found: dict[str, dict[str, Any]]) -> list[OwnOperator]:
    """The fits as a catalog has them."""
    kept = ("coefficients", "rows", "median_error", "p90_error", "held_out_median_error")
    return [
        own_operator(name, variant, {key: fit[key] for key in kept if key in fit})
        for name, variants in found.items()
        for variant, fit in variants.items()
    ]


def regenerate(folder: Path, classes: Sequence[str]) -> None:
    """The committed files, of the tables of the nine GPUs."""
    for name in classes:
        document = rounded_document(CLASSES[name].fit(folder))
        write_whole(OUT / f"{name}.json", json.dumps(document, indent=1, sort_keys=True) + "\n")
        print(f"{name}: {document['source']}")
        for line in error_table(document):
            print(line)


def error_table(document: dict[str, Any]) -> list[str]:
    """GPU, data type, rows, median and 90th-percentile error, and the median on shapes left out, a line each."""
    lines = [f"{'GPU':13s}{'type':20s}{'rows':>7s}{'median':>8s}{'p90':>8s}{'held out':>10s}  left out"]
    for gpu, variants in document["gpus"].items():
        for variant, found in variants.items():
            if not found["rows"]:
                lines.append(f"{gpu:13s}{variant:20s}{0:7d}  as {found['borrowed_from']}")
                continue
            errors = [found.get(name, float("nan")) for name in ("median_error", "p90_error", "held_out_median_error")]
            shown = "".join(f"{100 * error:{width}.1f}%" for error, width in zip(errors, (7, 7, 9))).replace(
                "nan%", "  - "
            )
            lines.append(f"{gpu:13s}{variant:20s}{found['rows']:7d}{shown}  {found['left_out']}")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
