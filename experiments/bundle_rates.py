"""Build the bundled rate profiles: requests a second by hour of three models, from the rates of ServeGen's clients.

    python experiments/bundle_rates.py RATES.csv.gz

RATES has a row a window of 600 s: model, window_start_s, requests_in_600s, summed over the clients of each
data/language/m-*/chunk-*-trace.csv of alibaba/ServeGen. Writes fleetopt_jax/catalog/data/rate_profiles.json. Windows
without a request, whose cause upstream does not say, are taken as missing: an hour has the mean of its other windows,
one without any is null.
"""

import argparse
import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[1] / "fleetopt_jax" / "catalog" / "data" / "rate_profiles.json"
WINDOW_S, PER_HOUR = 600.0, 6
NAMES = {"m-small": "servegen-small", "m-mid": "servegen-mid", "m-large": "servegen-large"}
SOURCE = (
    "ServeGen (arXiv:2505.09999), alibaba/ServeGen at f891d1189eb32b3868dfc443800c4150548c282a, data/language/{model}: "
    "the first 10 of 14 days"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rates", type=Path)
    text = gzip.decompress(parser.parse_args().rates.read_bytes()).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    profiles = {name: _profile(model, [row for row in rows if row["model"] == model]) for model, name in NAMES.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(profile)}" for name, profile in profiles.items()]
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _profile(model: str, rows: list[dict[str, str]]) -> dict:
    start_s = np.array([float(row["window_start_s"]) for row in rows])
    assert np.all(np.diff(start_s) == WINDOW_S), "windows are missing"
    rate = np.array([float(row["requests_in_600s"]) for row in rows]).reshape(-1, PER_HOUR) / WINDOW_S
    known = rate > 0
    hours = np.where(known, rate, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    busiest = rate.max(axis=1)[hours > 0] / hours[hours > 0]
    return {
        "title": f"{model}, a production LLM of Alibaba's, by hour over ten days",
        "source": SOURCE.format(model=model),
        "licence": "Apache-2.0",
        "missing_windows": int((~known).sum()),
        "busiest_window_over_its_hour": {"median": round(float(np.median(busiest)), 3), "max": round(busiest.max(), 3)},
        "rate_per_s": [None if x == 0 else float(f"{x:.5g}") for x in hours],
    }


if __name__ == "__main__":
    main()
