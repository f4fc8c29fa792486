"""Fuzz every reader with bytes that coverage of our own code guides (Atheris, libFuzzer). Not a pytest file.

    python tests/fuzz_readers.py --seconds 300 [--target NAME] [--keep FOLDER]

Each target is a process of its own. Whatever the bytes, a reader returns something valid or raises `BadInput` with one
line that can be printed; anything else, a crash below Python, or an input that takes more than 20 s ends with exit code
1 and the input in the folder `--keep` (default: fuzz_found).
"""

import argparse
import gzip
import importlib.util
import io
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

HANG_S = 20
MEMORY_MIB = 4096
MEMORY = Path("/dev/shm")  # where there is one
NO_ATHERIS = 0  # of what cannot be run: there are no wheels for every Python and platform

if __name__ == "__main__" and importlib.util.find_spec("atheris") is None:
    print(
        f"fuzz: skipped: atheris is not installed (python -m pip install atheris; no wheel may exist for Python "
        f"{sys.version_info.major}.{sys.version_info.minor} on {sys.platform})",
        file=sys.stderr,
    )
    sys.exit(NO_ATHERIS)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet  # noqa: E402

CSV = b"timestamp_s,prompt_tokens,output_tokens\n0.5,374,44\n2.5,396,109\n"
AZURE = b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
JSONL = b'{"timestamp": 27000, "input_length": 374, "output_length": 44, "hash_ids": [1, [2]]}\n' * 2
STAMPED = b'{"timestamp_s": "2024-01-01T00:00:09Z", "prompt_tokens": 374, "output_tokens": 44}\n'
CDF = b'{"cdf": [[0, 0], [100, 0.25], [200, 0.25], [400, 1.0]], "output_share": 0.35}'
MEASUREMENTS = b"llm,gpu,tp,batch,step_ms,context_tokens,power_w,n_gpus\nLlama-8B,H100,4,8,12.5,1000,1900,4\n"
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "gptq", "bits": 4},
}
LATENT = DENSE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "quantization_config": {"quant_method": "fp8"},
}
HYBRID = DENSE | {
    "model_type": "qwen3_next",
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
STATES = DENSE | {
    "model_type": "granitemoehybrid",
    "layer_types": ["mamba", "attention"] * 2,
    "num_hidden_layers": 4,
    "mamba_n_heads": 48,
    "mamba_d_state": 128,
}
QUANTIZATIONS: list[dict] = [
    {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp"],
    },
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*self_attn.*": {}}},
    {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.0.mlp*": {"quant_algo": "NVFP4"}}},
    {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}, "targets": ["re:.*mlp.*"]}
        },
        "ignore": ["re:.*lm_head", "model.layers.*.self_attn*"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    },
]
_PARAMETERS = {"base_s": 0.01}
_FIT = {
    "estimates": _PARAMETERS,
    "standard_errors": {"base_s": 0.001},
    "covariance": [[1e-6]],
    "fit_mape": 0.01,
    "max_ape": 0.02,
    "leave_one_out_mape": 0.02,
    "n_points": 5,
    "batch_min": 1.0,
    "batch_max": 64.0,
    "notes": [],
}
ENGINE = {
    "schema": "fleetopt-engine/1",
    "gpu": "h100",
    "llm": "llama-3.1-8b",
    "tp": 1,
    "precision": None,
    "quality": "measured",
    "relative_error": {"step": 0.02, "power": 0.01},
    "source": "a file",
    "decode": {
        "base_s": 0.01,
        "expert_s": 0.0,
        "expert_share": 0.0,
        "per_seq_s": 1e-5,
        "per_token_s": 1e-8,
        "windowed_token_s": 0.0,
        "window_tokens": 0.0,
    },
    "power": {"idle_w": 100.0, "nominal_w": 600.0, "steepness": 1.0, "log2_half_batch": 4.0},
    "fit": {"decode": _FIT | {"form": "dense", "context_tokens": 1000.0}, "power": _FIT | {"identified": True}},
}
PLAN = {
    "schema": "fleetopt-plan/1",
    "assume": "physical",
    "workload": {"name": "azure-conv", "arrival_rate_per_s": 1000.0, "columns": {"prompt": "a", "output": "b"}},
    "slo": {"ttft_p99_s": 0.5},
    "budget": {"max_gpus": 100, "gpus_of.h100": 50},
    "pools": [{"window_tokens": 8192, "gpu": "h100", "llm": "llama-3.1-70b", "tp": 8, "n_instances": 10}],
}

_METRICS = {"tok_per_j": {"analytic": 0.5, "simulated": 0.51, "ci95": [None, 0.6], "agrees": True}}
_COUNTS = ("n_arrivals", "n_completed", "n_rejected", "n_in_system", "n_preemptions", "n_iterations")
SIMULATION = dict.fromkeys(_COUNTS, 3) | {
    "schema": "fleetopt-simulation/1",
    "slo_held": True,
    "warm_up_s": 1.5,
    "warmed_up": True,
    "window_s": 9.0,
    "memory_bytes": 10**6,
    "metrics": _METRICS,
    "pools": [{"window_tokens": 8192, "metrics": _METRICS}],
}
_ROW = {
    "choice": "tail",
    "from": "mean_prefill",
    "to": "quantile",
    "tok_per_j_homogeneous": 0.5,
    "tok_per_j_two_pool": 0.6,
    "tok_per_j_fleetopt": None,
    "gain": None,
    "short_window_tokens": None,
    "gamma": 1.5,
}
LEDGER = {"schema": "fleetopt-ledger/1", "rows": [_ROW]}


def parquet(columns: dict, **options) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink, **options)
    return sink.getvalue().to_pybytes()


def packed(document: object) -> bytes:
    return json.dumps(document, indent=1).encode()


# One value of every kind of wrong, for each JSON reader.
WRONG = [b"[" * 2000, b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"[NaN]", b"[1e999]", b'"\\ud800"', b"9" * 5000, b"null"]
PARQUETS = [
    parquet({"prompt_tokens": [1, 2], "output_tokens": [3, 4]}),
    parquet(
        {
            "timestamp_s": pa.array([1, 2], pa.timestamp("us", "UTC")),
            "prompt_tokens": pa.array([1, 2]).dictionary_encode(),
            "output_tokens": pa.array([3, 4]).cast(pa.decimal128(21, 2)),
        },
        compression="gzip",
    ),
    parquet({"prompt_tokens": [[1], [2]], "output_tokens": [{"a": 1}, {"a": 2}], "timestamp_s": ["1", None]}),
]
_SPAN = {
    "startTimeUnixNano": "1760000000536514560",
    "attributes": [
        {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "374"}},
        {"key": "gen_ai.usage.output_tokens", "value": {"intValue": "44"}},
    ],
}
_ANSWER = 'data: {"usage": {"prompt_tokens": 374, "completion_tokens": 44}}\n\n'
_PERF = {"timestamp": 1760000000536514560, "request_inputs": {"payload": '{"prompt": "a b c"}'}}
REPORTS = [
    packed([{"usage": {"prompt_tokens": "374", "completion_tokens": 44}, "created": 1760000000}] * 2),
    packed({"input_lens": [374, 396], "output_lens": [44, 0], "start_times": [0.5, 2.5], "ttfts": [[], 1]}),
    packed({"benchmarks": [{"requests": {"successful": [{"prompt_tokens": 1, "output_tokens": 2}]}}] * 2}),
    packed({"experiments": [{"requests": [_PERF | {"response_outputs": [{"response": _ANSWER}]}, _PERF]}]}),
    packed({"resourceSpans": [{"scopeSpans": [{"spans": [_SPAN, _SPAN]}]}]}),
    packed(
        {
            "data": [
                {
                    "start_time": 1760000000,
                    "results": [
                        {"input_tokens": 900, "output_tokens": 90, "num_model_requests": 3},
                        {"num_model_requests": 0},
                    ],
                }
            ]
        }
    ),
    packed({"data": [{"promptTokens": 5, "completionTokens": None, "startTime": "2024-05-10T00:00:00Z"}]}),
]
_METRIC = 'vllm:request_{}_tokens_{}{{le="{}"}} {}\n'
METRICS = (
    "".join(
        _METRIC.format(kind, "bucket", edge, count)
        for kind in ("prompt", "generation")
        for edge, count in (("1.0", 0), ("100.0", 7), ("2000.0", 9), ("+Inf", 10))
    )
    + "vllm:request_prompt_tokens_sum 5000\nvllm:request_generation_tokens_sum 900 1760000000000\n"
)
PROMQL = {
    "status": "success",
    "data": {
        "resultType": "matrix",
        "result": [
            {
                "metric": {"__name__": f"vllm:request_{kind}_tokens_bucket", "le": edge, "pod": "a"},
                "values": [[1760000000, "1"], [1760000060.5, count]],
            }
            for kind in ("prompt", "generation")
            for edge, count in (("50", "2"), ("+Inf", "9"))
        ],
    },
}


def zipped(data: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("trace.csv", data)
    return held.getvalue()


SEEDS: dict[str, list[bytes]] = {
    "csv": [CSV, AZURE, b'"prompt_tokens","output_tokens","a\nb"\n1,2,"x\ny"\n\n3,4,z\n'],
    "jsonl": [JSONL, STAMPED, b'{"prompt_tokens": true, "output_tokens": "5"}\n[]\n' + STAMPED],
    "parquet": PARQUETS,
    "gzip": [gzip.compress(CSV)],
    "packed": [zipped(CSV), pa.compress(CSV, "zstd", asbytes=True), CSV.decode().encode("utf-16")],
    "dialects": [
        b"# said\nts;in_tokens; out_tokens\n0,5;1.374;44\n2,5;396;\n",
        b'sep=\t\nTimestamp\tRequest tokens\tResponse tokens\n05/10/2024\t"1,374"\t0\n',
        b"start_time|input_tokens|output_tokens|num_model_requests\n1760000000|9|9|3\n1760003600|0|0|0\n",
        b"date,prompt_tokens,completion_tokens\n2024-05-10,5,5\n2024-05-11 00:00:03 UTC,6,0\n",
    ],
    "reports": REPORTS,
    "metrics": [METRICS.encode()],
    "promql": [packed(PROMQL)],
    "cdf": [CDF, b"[[100, 0.5], [200, 1]]", *WRONG],
    "engine": [packed(ENGINE), *WRONG],
    "config": [
        *(packed(document) for document in (DENSE, LATENT, {"text_config": LATENT}, HYBRID, STATES)),
        *(packed(DENSE | {"quantization_config": quantization}) for quantization in QUANTIZATIONS),
        packed(HYBRID).replace(b"{", b'{"time_step_limit": [0.0, Infinity], "a": 1, "a": 2,', 1),
        *WRONG,
    ],
    "measurements": [MEASUREMENTS, b"batch,tok_per_s,task\n8,1000,chat\n16,1800,chat\n"],
    "plan": [packed(PLAN), packed(PLAN | {"objective": {"weights": {"usd_per_h": 1.0}}}), *WRONG],
    "simulation": [packed(SIMULATION), *WRONG],
    "ledger": [packed(LEDGER), *WRONG],
}


def check_workload(found) -> None:
    """Whatever a workload file holds."""
    if hasattr(found, "knots"):
        check_cdf(found)
    elif hasattr(found, "prompt_tokens"):
        check_trace(found)
    else:
        check_histograms(found)


def check_histograms(found) -> None:
    from fleetopt_jax.workload.histogram import join

    joined = join(found)
    assert (joined.prompt_tokens >= 1).all()
    assert (joined.output_tokens >= 0).all()
    assert abs(joined.weight.sum() - 1) < 1e-6
    assert joined.longest_tokens >= joined.prompt_tokens.max()
    assert joined.total_sd_range[0] <= joined.total_sd_tokens * (1 + 1e-6) + 1e-6
    assert joined.total_sd_tokens <= joined.total_sd_range[1] * (1 + 1e-6) + 1e-6
    assert found.rate_per_s is None or found.rate_per_s > 0


def check_trace(trace) -> None:
    for tokens, least in ((trace.prompt_tokens, 1), (trace.output_tokens, 0)):
        assert len(tokens) == len(trace.prompt_tokens) > 0
        assert ((tokens >= least) & (tokens <= (1e9 if trace.weight is None else 1e15))).all()
        assert trace.weight is not None or (tokens == np.floor(tokens)).all()
    assert trace.output_tokens.any()
    assert trace.weight is None or ((trace.weight >= 1) & (len(trace.weight) == len(trace.prompt_tokens))).all()
    assert all(line.isprintable() for line in (trace.understood.line, *trace.understood.warnings))
    if trace.arrival_s is not None:
        assert len(trace.arrival_s) == len(trace.prompt_tokens)
        assert np.isfinite(trace.arrival_s).all()
        assert trace.arrival_s[0] == 0
        assert (np.diff(trace.arrival_s) >= 0).all()
    assert math.isfinite(trace.first_arrival_s)


def check_cdf(cdf) -> None:
    tokens, fractions = np.array(cdf.knots, dtype=float).T
    assert (np.diff(tokens) > 0).all()
    assert (np.diff(fractions) >= 0).all()
    assert tokens[0] >= 1
    assert 0 <= fractions[0] <= fractions[-1]
    assert abs(fractions[-1] - 1) < 1e-6
    assert 0 < cdf.output_share < 1


def check_numbers(record) -> None:
    """Every number of a record, of its lists and of its parts is finite."""
    for value in vars(record).values():
        if isinstance(value, (float, int, np.ndarray)):
            assert np.isfinite(np.asarray(value, dtype=float)).all(), value
        elif hasattr(value, "__dict__"):
            check_numbers(value)


def check_plan(plan) -> None:
    assert 1 <= len(plan.pools) <= 16
    assert all(pool.window_tokens >= 1 and pool.n_instances >= 1 and pool.tp >= 1 for pool in plan.pools)
    assert math.isfinite(plan.workload.arrival_rate_per_s)


def check_simulation(simulation) -> None:
    assert simulation.n_arrivals >= 0
    assert len(simulation.pools) == len(simulation.pools_analytic)
    assert all(estimate.low <= estimate.high or estimate.low > -math.inf for estimate in simulation.metrics.values())


def check_rows(rows) -> None:
    assert all(row.gain is None or row.gain >= 0 for row in rows)


def targets(folder: Path) -> dict[str, Callable[[bytes], object]]:
    """What each target does with its bytes, as a file in `folder`. Imported late: under Atheris, after it hooks in."""

    from fleetopt_jax.calibrate.measurements import read_measurements
    from fleetopt_jax.catalog.hf_config import read_config
    from fleetopt_jax.documents.engine import load_engine
    from fleetopt_jax.documents.ledger import load_ledger
    from fleetopt_jax.documents.plan_file import read_plan_file
    from fleetopt_jax.documents.simulation import load_simulation
    from fleetopt_jax.workload.readers import read_workload_file

    def of_file(name: str, read: Callable, check: Callable) -> Callable[[bytes], object]:
        path = folder / name

        def run(data: bytes) -> None:
            path.write_bytes(data)
            check(read(str(path)))

        return run

    return {
        "csv": of_file("trace.csv", read_workload_file, check_workload),
        "jsonl": of_file("trace.jsonl", read_workload_file, check_workload),
        "parquet": of_file("trace.parquet", read_workload_file, check_workload),
        "gzip": of_file("trace.csv.gz", read_workload_file, check_workload),
        "packed": of_file("trace", read_workload_file, check_workload),
        "dialects": of_file("trace.txt", read_workload_file, check_workload),
        "reports": of_file("report", read_workload_file, check_workload),
        "metrics": of_file("metrics", read_workload_file, check_workload),
        "promql": of_file("answer.json", read_workload_file, check_workload),
        "cdf": of_file("lengths.json", read_workload_file, check_workload),
        "engine": of_file("engine.json", load_engine, lambda spec: check_numbers(spec.laws)),
        "config": of_file("config.json", read_config, check_numbers),
        "measurements": of_file("points.csv", read_measurements, check_numbers),
        "plan": of_file("plan.json", read_plan_file, check_plan),
        "simulation": of_file("simulation.json", load_simulation, check_simulation),
        "ledger": of_file("ledger.json", load_ledger, check_rows),
    }


def check_one(run: Callable[[bytes], object], data: bytes) -> None:
    """The law: valid, or refused in one printable line of bounded length."""
    from fleetopt_jax.core.errors import BadInput

    try:
        run(data)
    except BadInput as refused:
        said = str(refused)
        assert said.isprintable(), repr(said)
        assert 0 < len(said) < 3000


def fuzz(target: str, folder: Path, arguments: list[str]) -> None:
    """This process becomes libFuzzer, which never returns; every input is a file in `folder`."""
    import atheris
    import jax  # noqa: F401 — before the hook: only our own code is to be instrumented
    import pydantic  # noqa: F401

    with atheris.instrument_imports(include=["fleetopt_jax"]):
        import fleetopt_jax.workload.readers  # noqa: F401

        run = targets(folder)[target]
    atheris.Setup([sys.argv[0], *arguments], lambda data: check_one(run, data))
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="in total, shared out among the targets")
    parser.add_argument("--target", choices=SEEDS, help="one target only")
    parser.add_argument("--keep", default="fuzz_found", help="folder for inputs that break a reader")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options, libfuzzer = parser.parse_known_args()
    if options.inside is not None:
        fuzz(options.target, options.inside, libfuzzer)
        return 0
    names = [options.target] if options.target else list(SEEDS)
    keep = Path(options.keep)
    broken = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="fleetopt-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
            corpus = Path(folder) / "corpus"
            corpus.mkdir()
            for number, seed in enumerate(SEEDS[name]):
                (corpus / str(number)).write_bytes(seed)
            keep.mkdir(parents=True, exist_ok=True)
            command = [
                *(sys.executable, __file__, "--inside", folder, "--target", name, str(corpus)),
                f"-max_total_time={max(1, round(options.seconds / len(names)))}",
                *(f"-timeout={HANG_S}", f"-rss_limit_mb={MEMORY_MIB}", "-max_len=8192", "-print_final_stats=1"),
                f"-artifact_prefix={keep}/{name}-",
            ]
            ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
        runs = [line.split()[-1] for line in ended.stderr.splitlines() if "number_of_executed_units" in line]
        print(f"fuzz: {name}: {runs[0] if runs else 'no count of'} inputs, {'broken' if ended.returncode else 'ok'}")
        sys.stdout.flush()
        if ended.returncode:
            broken.append(name)
            print(ended.stdout[-3000:], ended.stderr[-6000:], sep="\n", file=sys.stderr)
    if not any(keep.iterdir()):
        keep.rmdir()
    if broken:
        print(f"fuzz: broken: {', '.join(broken)}; inputs in {keep}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
