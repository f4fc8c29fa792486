"""Build the bundled workloads: compress the original traces to atoms and measure what that costs.

    python experiments/bundle_workloads.py DIRECTORY_OF_TRACES

The directory holds the published traces named in SOURCES (plain or .gz). Writes fleetopt_jax/catalog/data/*.npz and
workloads.json. The compression error compares the bundled atoms with one atom per distinct request: means, variances
and tok/J of the homogeneous and of 24 two-pool fleets, each sized for its traffic.
"""

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402

from fleetopt_jax.catalog.engines import build  # noqa: E402
from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.fleet.assumptions import PUBLISHED  # noqa: E402
from fleetopt_jax.fleet.evaluate import evaluate  # noqa: E402
from fleetopt_jax.fleet.fleet import fleet_of, make_slo  # noqa: E402
from fleetopt_jax.fleet.sizing import size_fleet  # noqa: E402
from fleetopt_jax.workload.atoms import Workload, make_workload  # noqa: E402
from fleetopt_jax.workload.compress import compress_with_members  # noqa: E402
from fleetopt_jax.workload.readers import Trace, read_workload_file  # noqa: E402
from fleetopt_jax.workload.reuse import Reuse, hit_curve, reuse_of  # noqa: E402
from fleetopt_jax.workload.summary import summarize  # noqa: E402

DATA = Path(__file__).parents[1] / "fleetopt_jax" / "catalog" / "data"
AZURE = ("Azure/AzurePublicDataset, 2023 LLM inference traces (Patel et al., Splitwise, ISCA 2024)", "CC-BY-4.0")
MOONCAKE = ("kvcache-ai/Mooncake, FAST25-release traces", "Apache-2.0")
KNOTS = ("18 knots as published with vllm-sr-sim and arXiv 2603.17280v1", "Apache-2.0")
CONV, CODE = "AzureLLMInferenceTrace_conv.csv.gz", "AzureLLMInferenceTrace_code.csv.gz"
SOURCES = {
    "azure-conv": ("Azure conversation, one hour of 2023", [CONV], *AZURE),
    "azure-code": ("Azure code completion, one hour of 2023", [CODE], *AZURE),
    "azure": ("Azure conversation and code together", [CONV, CODE], *AZURE),
    "mooncake-conv": (
        "Mooncake conversation, first 70 %",
        ["mooncake_conversation_hashes_first70.jsonl.gz"],
        *MOONCAKE,
    ),
    "mooncake-synthetic": ("Mooncake synthetic (public datasets)", ["mooncake_synthetic_hashes.jsonl.gz"], *MOONCAKE),
}
CDFS = {
    "azure-cdf": "Azure conversation and code, total length",
    "lmsys-cdf": "LMSYS-Chat-1M, total length",
    "agent-cdf": "agent-heavy mix (synthetic: SWE-bench, BFCL, RAG), total length",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    about = {}
    for name, (title, names, source, licence) in SOURCES.items():
        trace = _merge([read_workload_file(directory / file) for file in names])
        (prompt, output, count), atom = compress_with_members(trace.prompt_tokens, trace.output_tokens)
        arrays = {"prompt_tokens": prompt, "output_tokens": output, "count": count, **_reuse(trace, atom)}
        np.savez_compressed(DATA / f"{name}.npz", **arrays)
        about[name] = {
            "kind": "trace",
            "title": title,
            "source": source,
            "licence": licence,
            "n_atoms": len(count),
            "summary": asdict(summarize(trace)),
            "compression_error": _errors(trace, prompt, output, count),
        }
        if trace.blocks is not None:
            about[name]["prefix"] = asdict(hit_curve(trace.blocks, trace.prompt_tokens))
        print(name, len(count), about[name]["compression_error"])
    for name, title in CDFS.items():
        about[name] = {"kind": "cdf", "title": title, "source": KNOTS[0], "licence": KNOTS[1]}
    (DATA / "workloads.json").write_text(json.dumps(about, indent=1) + "\n")


def _reuse(trace: Trace, atom: np.ndarray) -> dict[str, np.ndarray]:
    """The features of reuse of atoms, if there are block hashes, in single precision."""
    if trace.blocks is None:
        return {}
    found = reuse_of(trace.blocks, trace.prompt_tokens, trace.prompt_tokens + trace.output_tokens, atom)
    return {field.name: np.asarray(getattr(found, field.name), dtype=np.float32) for field in fields(Reuse)}


def _merge(parts: list[Trace]) -> Trace:
    """Traces of one clock as one."""
    if len(parts) == 1:
        return parts[0]
    arrivals = np.sort(np.concatenate([trace.arrival_s + trace.first_arrival_s for trace in parts]))
    return Trace(
        np.concatenate([trace.prompt_tokens for trace in parts]),
        np.concatenate([trace.output_tokens for trace in parts]),
        arrivals - arrivals[0],
    )


def _errors(trace: Trace, prompt: np.ndarray, output: np.ndarray, count: np.ndarray) -> dict[str, float]:
    """Largest relative errors of the atoms against the requests themselves."""
    longest = float(np.max(trace.prompt_tokens + trace.output_tokens))
    whole = make_workload(trace.prompt_tokens, trace.output_tokens, arrival_rate_per_s=1000.0, longest_tokens=longest)
    atoms = make_workload(prompt, output, count, arrival_rate_per_s=1000.0, longest_tokens=longest)
    means, variances = zip(*(_moments(workload) for workload in (whole, atoms)))
    fleet_error = np.max(np.abs(_tok_per_j(atoms, longest, atoms) / _tok_per_j(whole, longest, atoms) - 1))
    return {
        "mean": float(np.max(np.abs(means[1] / means[0] - 1))),
        "variance": float(np.max(np.abs(variances[1] / variances[0] - 1))),
        "fleet_tok_per_j": float(fleet_error),
    }


def _moments(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    values = np.stack([workload.prompt_tokens, workload.output_tokens, workload.prompt_tokens + workload.output_tokens])
    weight = np.asarray(workload.weight)
    mean = values @ weight
    return mean, ((values - mean[:, None]) ** 2) @ weight


def _tok_per_j(workload: Workload, longest: float, reference: Workload) -> np.ndarray:
    """tok/J of one-pool and two-pool fleets, thresholds at even quantiles of the reference's atoms; real rounding, so
    that the error is that of the traffic and not of an instance more or less."""
    totals = np.asarray(reference.prompt_tokens + reference.output_tokens)
    quantiles = np.interp(np.arange(1, 25) / 25, np.cumsum(reference.weight), totals)
    engine = build(EngineSpec("h100", source="projected"))
    real = replace(PUBLISHED, rounding="real")

    @jax.jit
    def score(windows: jax.Array) -> jax.Array:
        fleet = size_fleet(fleet_of((engine, engine), windows, np.ones(2), np.ones(2)), workload, make_slo(), real)
        return evaluate(fleet, workload, real).tok_per_j

    windows = np.unique(np.ceil([*quantiles, longest]))
    return np.array([score(np.array([window, longest])) for window in windows])


if __name__ == "__main__":
    main()
