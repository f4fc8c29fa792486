"""Fit the operator laws to kernel timings: fleetopt_jax/catalog/data/operators/CLASS.json.

    python experiments/fit_operators.py FOLDER [--only CLASS]

FOLDER holds the tables of each GPU: kernels timed alone, looped, by ai-dynamo/aiconfigurator (Apache-2.0). A class of
operators is a module of `experiments/operators/` whose `fit(folder)` gives its document: by GPU and data type the
coefficients of the law, the rows they were fitted to, what was left out of them and why, the median and the
90th-percentile relative error on those rows, and the median with every fifth shape left out of the fit and tried. The
same tables give the same files, byte for byte.
"""

import argparse
import json
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
from operators._fitting import rounded_document  # noqa: E402

from fleetopt_jax.core.files import write_whole  # noqa: E402

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=CLASSES, help="one class of operators")
    options = parser.parse_args()
    for name in [options.only] if options.only else CLASSES:
        document = rounded_document(CLASSES[name].fit(options.folder))
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
            errors = [found[name] for name in ("median_error", "p90_error", "held_out_median_error")]
            shown = "".join(f"{100 * error:{width}.1f}%" for error, width in zip(errors, (7, 7, 9)))
            lines.append(f"{gpu:13s}{variant:20s}{found['rows']:7d}{shown}  {found['left_out']}")
    return lines


if __name__ == "__main__":
    main()
