"""A GPU of one's own, from its kernel tables to a plan: the fit, its file, what is borrowed and that it is said."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fleetopt_jax.catalog.engines import LENT_ERRORS, engine_entry
from fleetopt_jax.catalog.gpus import GPUS, GpuEntry
from fleetopt_jax.catalog.hosts import host_entry
from fleetopt_jax.catalog.llms import LLMS
from fleetopt_jax.catalog.operators import MAKERS, document, operator_entry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.catalog.steps import Parallelism, step_entry
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.own_catalog import gpu_file, load_catalog
from fleetopt_jax.laws.mixed_step import decoding, with_prompts
from fleetopt_jax.laws.operators.attention import causal_pairs, prefill_attention_s, timed_decode_attention_s
from fleetopt_jax.laws.operators.collectives import all_gather_s, all_reduce_s
from fleetopt_jax.laws.operators.gemm import gemm_s, timed_gemm_s

EXPERIMENTS = str(Path(__file__).parents[1] / "experiments")
SHEET = """
[gpus.my-gpu]
memory_bytes = 96e9
bandwidth_bytes_per_s = 4e12
peak_flop_per_s = 1.2e15
tdp_w = 650
usd_per_h = 3
"""
SLOWER = {"flop_excess": 1.9, "byte_excess": 1.5, "launch_s": 7e-6}  # than H100's products, of its own peaks
HEADS = {"num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "kv_cache_dtype": "bfloat16", "window_size": 0}


@pytest.fixture(scope="module")
def fit_operators():
    sys.path.insert(0, EXPERIMENTS)
    import fit_operators

    yield fit_operators.main
    sys.path.remove(EXPERIMENTS)
    for name in [name for name, module in sys.modules.items() if EXPERIMENTS in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def law(operator: str, variant: str, **changes: float):
    return MAKERS[operator](**{**document(operator)["gpus"]["h100"][variant]["coefficients"], **changes})


def write(folder: Path, operator: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{operator}.jax-0.10.1.parquet")


def timings(gpu) -> dict[str, list[dict]]:
    """What somebody would have timed on a GPU whose products are slower than H100's, and all else as there."""
    product, reduce_, gather = law("gemm", "bf16", **SLOWER), law("collectives", "all_reduce"), law(*EXCHANGE)
    prefill, decode = law("prefill_attention", "bf16"), law("decode_attention", "bf16")
    head = [float(HEADS[name]) for name in ("num_heads", "num_key_value_heads", "head_dim")]
    tables: dict[str, list[dict]] = {"gemm": []}
    for n, k in ((4096, 4096), (28_672, 4096), (4096, 14_336), (1280, 8192), (8192, 28_672)):
        for m in (1.0, 8.0, 64.0, 256.0, 1024.0, 8192.0):
            tables["gemm"].append({"m": m, "n": n, "k": k, "seconds": timed_gemm_s(product, gpu, m, n, k)})
    tables["context_attention"] = [
        {**HEADS, "batch_size": n, "isl": t}
        | {"seconds": prefill_attention_s(prefill, gpu, n * t, n * causal_pairs(t), *head)}
        for n in (1.0, 2.0, 4.0)
        for t in (128.0, 1024.0, 8192.0)
    ]
    tables["generation_attention"] = [
        {**HEADS, "batch_size": n, "step": t}
        | {"seconds": timed_decode_attention_s(decode, gpu, n, n * (t + 1.0), *head)}
        for n in (1.0, 16.0, 128.0)
        for t in (511.0, 2047.0, 8191.0)
    ]
    sizes = [2.0**power for power in range(12, 28)]
    tables["custom_allreduce"] = [
        {"num_gpus": 4, "message_size": size, "seconds": all_reduce_s(reduce_, gpu, 2 * size, 4.0)} for size in sizes
    ]
    tables["nccl"] = [
        {"nccl_dtype": "half", "num_gpus": 4, "message_size": size, "seconds": all_gather_s(gather, gpu, 2 * size, 4.0)}
        for size in sizes
    ]
    return {name: [row | {"latency": 1e3 * float(row.pop("seconds"))} for row in rows] for name, rows in tables.items()}


EXCHANGE = ("collectives", "exchange")


@pytest.fixture(scope="module")
def timed(tmp_path_factory) -> Path:
    """A folder with the data sheet of a GPU and the tables of it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my.toml").write_text(SHEET)
    for name, rows in timings(load_catalog(folder / "my.toml").gpu_entry("my-gpu").gpu).items():
        write(folder / "kernels" / "my-gpu", name, rows)
    return folder


@pytest.fixture(scope="module")
def fitted(timed, fit_operators) -> Path:
    out = timed / "my-gpu.toml"
    tables = str(timed / "kernels" / "my-gpu")
    assert fit_operators([tables, "--catalog", str(timed / "my.toml"), "--gpu-file", str(out), "--borrow", "h200"]) == 0
    return out


def test_the_file_has_what_was_timed_and_says_whose_the_rest_is(fitted):
    catalog = load_catalog(fitted)
    gpu = catalog.gpu_entry("my-gpu")
    assert {(each.operator, each.variant) for each in gpu.operators} == {
        ("gemm", "bf16"),
        ("prefill_attention", "bf16"),
        ("decode_attention", "bf16"),
        ("collectives", "all_reduce"),
        ("collectives", "exchange"),
    }
    found, true = operator_entry("gemm", gpu, "bf16"), law("gemm", "bf16", **SLOWER)
    assert found.gpu == "my-gpu" and not found.borrowed and found.median_error < 0.01
    for m in (1.0, 32.0, 4096.0):  # as it is, not as the lender's
        assert gemm_s(found.law, gpu.gpu, m, 8192.0, 8192.0) == pytest.approx(
            float(gemm_s(true, gpu.gpu, m, 8192.0, 8192.0)), rel=0.03
        )
    assert operator_entry("gemm", gpu, "fp8").gpu == "h200" and operator_entry("gemm", gpu, "fp8").borrowed

    dense, experts = (
        engine_entry(catalog.spec("my-gpu", llm, 4, serving="vllm")) for llm in ("llama-3.1-70b", "qwen3-30b-a3b")
    )
    assert (dense.quality, experts.quality) == ("kernels", "projected")
    assert dense.source.startswith("operators timed on my-gpu, the own time of vLLM")
    assert "and on h200 (experts), carried over by data-sheet figures" in experts.source
    sheet_only = engine_entry(
        load_catalog(fitted.parent / "my.toml").spec("my-gpu", "llama-3.1-70b", 4, serving="vllm")
    )
    assert sheet_only.quality == "projected" and "my-gpu" not in sheet_only.source
    host = host_entry("vllm", GPUS["l40s"], experts=False)
    others = host.errors["tpot"]  # of GPUs that nobody measured served
    assert sheet_only.step_error == host.projected_errors["tpot"] > others
    assert others <= dense.step_error < others + 0.01 and experts.step_error > LENT_ERRORS["experts"][0]
    slower = float(dense.engine.decode.step_s(64.0, 2000.0)) / float(sheet_only.engine.decode.step_s(64.0, 2000.0))
    assert 1.2 < slower < 1.6


def test_a_gpu_file_says_the_same_again(fitted, tmp_path):
    gpu = load_catalog(fitted).gpu_entry("my-gpu")
    again = tmp_path / "again.toml"
    again.write_text(gpu_file(gpu))
    assert load_catalog(again).gpu_entry("my-gpu") == gpu
    ours = replace(GPUS["h100"], operators=gpu.operators)  # of one of ours, only what differs
    again.write_text(gpu_file(ours))
    assert load_catalog(again).gpu_entry("h100").operators == gpu.operators and "memory_bytes" not in again.read_text()
    assert operator_entry("gemm", ours, "bf16").law != operator_entry("gemm", GPUS["h100"], "bf16").law


@pytest.mark.slow
def test_from_the_file_to_a_prediction(fitted, capsys):
    arguments = ["--gpu", "my-gpu", "--llm", "llama-3.1-8b", "--tp", "1", "--serving", "vllm", "--catalog", str(fitted)]
    assert main(["predict", *arguments, "--concurrency", "4", "--json"]) == 0
    (point,) = json.loads(capsys.readouterr().out)["points"]
    assert (point["gpu"], point["quality"]) == ("my-gpu", "kernels") and point["tpot_s"] > 0.004


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda kernels: [path.unlink() for path in kernels.glob("*")],
            "has no table of a GPU of your own; need gemm.",
        ),
        (lambda kernels: write(kernels, "gemm", [{"m": 1, "n": 2, "latency": 3.0}]), "has no column k; need m, n, k"),
        (
            lambda kernels: write(kernels, "gemm", [GEMM | {"latency": float("nan")}]),
            "row 1: latency = nan; need a posi",
        ),
        (lambda kernels: write(kernels, "gemm", [GEMM, GEMM | {"latency": -1.0}]), "row 2: latency = -1; need a posi"),
        (lambda kernels: write(kernels, "gemm", [GEMM | {"m": "many"}]), "column m is not of numbers"),
        (lambda kernels: (kernels / "gemm.jax-0.10.1.parquet").write_text("m,n,k"), "is not a Parquet table"),
        (lambda kernels: write(kernels, "gemm", [GEMM] * 2), "too few rows to fit: gemm bf16: 1 rows, 8 are needed"),
    ],
)
def test_wrong_tables_are_refused_in_one_line(fit_operators, tmp_path, capsys, change, says):
    (tmp_path / "my.toml").write_text(SHEET)
    kernels = tmp_path / "kernels"
    write(kernels, "gemm", [GEMM])
    change(kernels)
    options = ["--catalog", str(tmp_path / "my.toml"), "--gpu", "my-gpu", "--gpu-file", str(tmp_path / "out.toml")]
    assert fit_operators([str(kernels), *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out.toml").exists()


GEMM = {"m": 1, "n": 256, "k": 256, "latency": 0.01}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--borrow", "h10"), "--borrow: unknown name 'h10'; did you mean h100"),
        (("--gpu", "my-gpus"), "--gpu: unknown name 'my-gpus'; did you mean my-gpu"),
    ],
)
def test_wrong_names_are_refused_in_one_line(fit_operators, timed, tmp_path, capsys, options, says):
    tables = str(timed / "kernels" / "my-gpu")
    out = str(tmp_path / "out.toml")
    assert fit_operators([tables, "--catalog", str(timed / "my.toml"), "--gpu-file", out, *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("flop_excess = ", "flop_excess = -"),
            "operators.gemm.bf16.coefficients: need a finite flop_excess > 0, got -",
        ),
        (
            ("flop_excess = ", "flop_excess = 1e-9 # "),
            "flop_excess = 1e-09 is faster than the data sheet's peaks; need at",
        ),
        (("ring_efficiency = ", "ring_efficiency = 1"), "is faster than the data sheet's peaks; need at most 2"),
        (("sharpness = ", "sharpness = nan # "), "bf16.coefficients: need a finite sharpness >= 1, got nan"),
        (
            ("sharpness = ", "sharpnes = "),
            "operators.gemm.bf16.coefficients: has a sharpnes; need byte_excess, cached_by",
        ),
        (("flop_excess = ", "l = 1.0\nflop_excess = "), "operators.gemm.bf16.coefficients: has a l; need"),
        (("operators.gemm.bf16", "operators.gemm.bf17"), "operators.gemm: unknown name 'bf17'; did you mean bf16"),
        (
            ("operators.gemm.", "operators.gem."),
            "gpus.my-gpu.operators: unknown name 'gem'; did you mean gemm",
        ),
        (('borrows = "h200"', 'borrows = "h20"'), "gpus.my-gpu.borrows: unknown name 'h20'; did you mean h200"),
        (("rows = 30", "rows = -30"), "operators.gemm.bf16.rows = -30: input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(fitted, tmp_path, change, says):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(fitted.read_text().replace(*change))
    with pytest.raises(BadInput) as refusal:
        load_catalog(wrong)
    assert says in str(refusal.value)


def test_a_gpu_of_data_sheet_figures_alone_is_an_engine_of_borrowed_operators():
    gpu = GpuEntry("x1", "X1", 96e9, 4e12, 1e15, 650.0, 3.0, 1024.0, "mine", formats=())
    entry = engine_entry(EngineSpec(gpu, "llama-3.1-8b", 1, serving="vllm"))
    assert entry.power_error == document("serving_watts")["borrowed_blind_mean_error"]["dense"]
    assert entry.quality == "projected" and "on h100 (decode attention, gemm, prefill attention)" in entry.source
    b200 = engine_entry(EngineSpec(replace(gpu, law="b200"), "llama-3.1-8b", 1, serving="vllm"))
    assert "on b200 (" in b200.source and b200.step_error > LENT_ERRORS["dense"][0]


@pytest.mark.slow
def test_borrowed_operators_are_as_far_off_as_is_said():
    """GPUs unlike the one that lends, by its operators and by their own."""
    llms = (("llama-3.1-8b", 1, "bf16"), ("llama-3.1-8b", 1, "fp8"), ("llama-3.1-70b", 4, "bf16"))
    llms += (("llama-3.1-70b", 4, "fp8"), ("qwen3-30b-a3b", 2, "bf16"), ("gpt-oss-120b", 2, "mxfp4"))
    llms += (("qwen3-235b-a22b", 8, "fp8"),)
    errors: dict[str, list[tuple[float, float]]] = {"dense": [], "experts": []}
    for gpu, lender in (("a100", "h100"), ("l40s", "h100"), ("rtx-pro-6000", "b200")):
        own: dict[str, list[np.ndarray]] = {"dense": [], "experts": []}
        for llm, tp, precision in llms:
            a = LLMS[llm].architecture
            entries = GPUS[gpu], replace(GPUS[gpu], borrows=lender)
            steps = [step_entry(a, entry, Parallelism(tp), precision, serving="vllm").step for entry in entries]
            wrong = [_wrong(*steps, float(steps[0].window_tokens))]
            own["experts" if a.n_experts else "dense"] += wrong
        for kind, found in own.items():
            errors[kind].append(tuple(np.mean(found, axis=0)))
    for kind, said in LENT_ERRORS.items():
        np.testing.assert_allclose(np.mean(errors[kind], axis=0), said, atol=0.006)


def _wrong(own, lent, window_tokens: float) -> np.ndarray:
    """Mean relative errors of decoding steps and of prompts."""
    steps = [decoding(n, c, window_tokens) for n in (1.0, 8.0, 64.0, 256.0) for c in (1000.0, 8000.0)]
    prompts = [with_prompts(decoding(0.0, 0.0, window_tokens), p, 0.0, window_tokens) for p in (1024.0, 8192.0)]
    return np.array(
        [np.mean([abs(float(lent.gpu_s(b) / own.gpu_s(b)) - 1.0) for b in each]) for each in (steps, prompts)]
    )
