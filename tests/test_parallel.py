"""Expert, data and pipeline parallelism, a token budget and a serving engine, as specs, options and plans have them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fleetopt_jax as fo
from fleetopt_jax._optimize.search import evaluate_given
from fleetopt_jax.calibrate.points import points_of
from fleetopt_jax.calibrate.readers import Row
from fleetopt_jax.catalog.engines import MAX_GPUS, MAX_TP, build, engine_entry, engine_points, workspace_of
from fleetopt_jax.catalog.gpus import GPUS, link_notes
from fleetopt_jax.catalog.llms import LLMS, at_precision
from fleetopt_jax.catalog.spec import MEASURED_SERVING
from fleetopt_jax.catalog.steps import Parallelism
from fleetopt_jax.catalog.workloads import load
from fleetopt_jax.cli import table
from fleetopt_jax.cli.codes import BAD_INPUT, INFEASIBLE, OK
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.documents.plan import load_plan, save_plan
from fleetopt_jax.documents.plan_file import read_plan_file
from fleetopt_jax.laws.closed_loop import Benchmark, Limits, fits
from fleetopt_jax.laws.kv_cache import (
    BLOCK_TOKENS,
    kv_capacity_tokens,
    make_kv_capacity,
    max_sequences,
    paged_sequences,
)
from fleetopt_jax.laws.llm import expert_bytes, weight_bytes, weight_bytes_of_gpu
from fleetopt_jax.laws.mixed_step import CLASSES, decoding
from fleetopt_jax.report.export.launch import fleet_launch
from fleetopt_jax.report.words import gpus_of_instance, instance_said

DEEPSEEK = fo.EngineSpec("b200", "deepseek-v3", 8, serving="vllm")
OLD_PLAN = Path(__file__).parent / "plan_0.1.0.json"


def step_s(spec: fo.EngineSpec, n: float = 64.0, context: float = 2000.0) -> float:
    return float(build(spec).decode.step_s(n, context))


def streamed_bytes(spec: fo.EngineSpec, kind: str, n: float) -> float:
    law = build(spec).step
    assert law is not None
    return float(law.step.parts(decoding(n, 1000.0)).bytes[CLASSES.index(kind)])


# --------------------------------------------------------------------------------------------------------------- specs


def test_sizes_of_one_are_the_engine_that_was():
    said = fo.EngineSpec("b200", "deepseek-v3", 8, serving="vllm", ep=1, dp=1, pp=1)
    assert said == DEEPSEEK and build(said) is build(DEEPSEEK)
    llm, gpu = at_precision(LLMS["deepseek-v3"].architecture), GPUS["b200"].gpu
    assert float(weight_bytes_of_gpu(llm, 8)) == float(weight_bytes(llm)) / 8
    assert float(kv_capacity_tokens(gpu, llm, 8, dp=1, pp=1)) == float(kv_capacity_tokens(gpu, llm, 8))


def test_instances_have_as_many_gpus_as_their_parallelism_asks_for():
    for how, n in (({"dp": 2}, 16), ({"pp": 2}, 16), ({"ep": 8}, 8), ({"dp": 2, "ep": 16}, 16)):
        spec = replace(DEEPSEEK, **how)
        assert spec.split.n_gpus == n == float(build(spec).gpus_per_instance)
        (point,) = engine_points(engine_entry(spec), [64.0], 2000.0)
        assert point.tok_per_j == pytest.approx(point.tok_per_s / (n * point.power_w_per_gpu))


def test_expert_parallelism_reads_fewer_whole_experts():
    """A token or two touch few experts, which lie on few GPUs: the busiest reads whole ones, an even share of many."""
    ep = replace(DEEPSEEK, ep=8)
    many = 4096.0
    assert streamed_bytes(ep, "experts", many) < 8 * streamed_bytes(DEEPSEEK, "experts", many)
    assert streamed_bytes(ep, "experts", many) == pytest.approx(streamed_bytes(DEEPSEEK, "experts", many), rel=0.3)
    one = replace(DEEPSEEK, gpu="gb300", tp=1, llm="qwen3-235b-a22b", precision="fp8")
    spread = replace(one, dp=8, ep=8)
    assert streamed_bytes(spread, "experts", many) < 0.3 * streamed_bytes(one, "experts", many)
    few = 8.0  # whose products are their weights: copied, not divided
    assert streamed_bytes(spread, "gemm", few) > 4 * streamed_bytes(replace(one, tp=8), "gemm", few)


def test_weights_and_cache_of_one_gpu():
    llm, gpu = at_precision(LLMS["deepseek-v3"].architecture), GPUS["h200"].gpu
    experts, others = float(expert_bytes(llm)), float(weight_bytes(llm) - expert_bytes(llm))
    for tp, dp, pp in ((8, 1, 1), (1, 8, 1), (4, 2, 1), (4, 2, 2), (2, 1, 4)):
        by_hand = experts / (tp * dp * pp) + others / (tp * pp)
        assert float(weight_bytes_of_gpu(llm, tp, dp, pp)) == pytest.approx(by_hand)
    dense = at_precision(LLMS["llama-3.1-70b"].architecture)
    one = float(kv_capacity_tokens(gpu, dense, 4))
    assert float(kv_capacity_tokens(gpu, dense, 4, dp=3)) == pytest.approx(3 * one)  # three of them
    staged = float(kv_capacity_tokens(gpu, dense, 4, pp=2))  # what divides over KV heads divides as well over stages
    assert staged == pytest.approx(float(kv_capacity_tokens(gpu, dense, 8)), rel=1e-12)
    tokens = {dp: float(build(replace(DEEPSEEK, tp=8 // dp, dp=dp, ep=8)).kv.n_blocks) * BLOCK_TOKENS for dp in (1, 8)}
    assert tokens[8] > 4 * tokens[1]  # a latent cache is copied by tensor parallelism, and not by data parallelism


def test_each_group_has_a_cache_of_its_own():
    """A sequence is in one of them: none is longer than it holds, and they overflow one by one."""
    one, eight = (
        build(spec).kv for spec in (replace(DEEPSEEK, tp=1, dp=8, ep=8), replace(DEEPSEEK, tp=1, dp=16, ep=16))
    )
    assert (float(one.n_caches), float(eight.n_caches)) == (8.0, 16.0)
    whole = make_kv_capacity(n_blocks=8000.0, max_num_seqs=1e6)
    parts = make_kv_capacity(n_blocks=8000.0, max_num_seqs=1e6, n_caches=8.0)
    single = make_kv_capacity(n_blocks=1000.0, max_num_seqs=1e6)
    window, held, variance = 4000.0, 900.0, 500.0**2
    for n_of in (
        lambda kv: float(paged_sequences(kv, window, held, variance)),
        lambda kv: float(max_sequences(kv, window)),
    ):
        assert n_of(parts) == 8.0 * n_of(single) <= n_of(whole)
    assert float(paged_sequences(parts, window, held, variance)) < float(paged_sequences(whole, window, held, variance))
    assert (
        float(paged_sequences(parts, 17_000.0, held, variance))
        == 0.0
        < float(paged_sequences(whole, 17_000.0, held, variance))
    )
    limits = Limits(8192, 64, kv_tokens=128_000.0)
    long = Benchmark(prompt_tokens=17_000, output_tokens=10, concurrency=1, n_requests=1)
    assert fits(long, limits) and not fits(long, replace(limits, n_caches=8.0))


def test_each_group_has_a_scheduler_of_its_own():
    one, eight, staged = (
        build(spec) for spec in (DEEPSEEK, replace(DEEPSEEK, tp=1, dp=8, ep=8), replace(DEEPSEEK, pp=2))
    )
    assert float(eight.kv.max_num_seqs) == 8 * float(one.kv.max_num_seqs)
    assert float(eight.prefill.budget_tokens) == 8 * float(one.prefill.budget_tokens)
    assert float(staged.prefill.budget_tokens) == 2 * float(one.prefill.budget_tokens)
    assert float(staged.kv.max_num_seqs) == float(one.kv.max_num_seqs)


def test_two_nodes_are_slower_than_one_link_of_as_many_gpus():
    """What is passed over the network: TP 16 on H100, against the same GPU with sixteen on one link."""
    spec = fo.EngineSpec("h100", "deepseek-v3", 16, serving="vllm")
    linked = replace(GPUS["h100"], link_gpus=16)
    batches = (1.0, 16.0, 256.0)
    assert all(step_s(spec, n) > step_s(replace(spec, gpu=linked), n) for n in batches)
    for how in ({"tp": 8, "dp": 2}, {"tp": 1, "dp": 16, "ep": 16}, {"ep": 16}):
        there, here = (replace(each, **how) for each in (spec, replace(spec, gpu=linked)))
        assert step_s(there, 256.0) > step_s(here, 256.0)
    assert "16 x h100" in link_notes(GPUS["h100"], 16)[0] and not link_notes(GPUS["h100"], 8)
    assert not link_notes(GPUS["gb200"], 16)


def test_deepseek_runs_on_two_nodes_of_h100_on_b200_and_on_gb200():
    for gpu, how in (
        *(
            ("h100", how)
            for how in ({"tp": 16}, {"tp": 8, "pp": 2}, {"tp": 8, "dp": 2, "ep": 16}, {"dp": 16, "ep": 16})
        ),
        *((gpu, how) for gpu in ("b200", "gb200") for how in ({"tp": 8}, {"tp": 8, "ep": 8}, {"dp": 8, "ep": 8})),
        ("gb200", {"dp": 64, "ep": 64}),
    ):
        spec = replace(DEEPSEEK, gpu=gpu, tp=1) if "tp" not in how else replace(DEEPSEEK, gpu=gpu)
        engine = build(replace(spec, **how))
        assert 0.003 < float(engine.decode.step_s(16.0, 2000.0)) < 0.05
        assert float(engine.kv.n_blocks) * BLOCK_TOKENS > 100_000


@pytest.mark.parametrize(
    ("how", "field", "says"),
    [
        ({"ep": 3}, "ep", "divisor"),
        ({"ep": 16}, "ep", "divisor"),
        ({"ep": 8, "llm": "llama-3.1-70b"}, "ep", "no experts"),
        ({"pp": 100, "tp": 1, "gpu": "gb300"}, "pp", "no more stages than layers"),
        ({"dp": 0}, "dp", "need 1 to"),
        ({"pp": 1.5}, "pp", "need 1 to"),
        ({"dp": 32}, "dp", "at most 128 GPUs"),
        ({"pp": 32}, "pp", "at most 128 GPUs"),
        ({"ep": 8, "serving": MEASURED_SERVING}, "ep", "tensor parallelism alone"),
        ({"dp": 2, "serving": MEASURED_SERVING}, "dp", "tensor parallelism alone"),
        ({"pp": 2, "source": "projected"}, "pp", "tensor parallelism alone"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens", "at least 1"),
    ],
)
def test_what_there_is_no_engine_for_is_refused_in_one_line(how, field, says):
    with pytest.raises(BadField, match=says) as refusal:
        engine_entry(replace(DEEPSEEK, **how))
    assert refusal.value.field == field and "\n" not in str(refusal.value)


def test_a_budget_of_tokens_is_in_prefill_and_workspace():
    """Smaller steps keep less memory free, and take a prompt in more pieces."""
    for serving in ("vllm", MEASURED_SERVING):
        spec = fo.EngineSpec("h100", "llama-3.1-70b", 4, serving=serving)
        usual, small = build(spec), build(replace(spec, max_num_batched_tokens=2048))
        assert (float(usual.prefill.budget_tokens), float(small.prefill.budget_tokens)) == (8192, 2048)
        assert float(small.kv.n_blocks) > float(usual.kv.n_blocks)
        same = build(replace(spec, max_num_batched_tokens=8192))
        assert float(same.kv.n_blocks) == float(usual.kv.n_blocks)
        assert float(same.decode.step_s(8.0, 100.0)) == float(usual.decode.step_s(8.0, 100.0))
    a, gpu = LLMS["deepseek-v3"].architecture, GPUS["h100"]
    alone, gathered, spread = (workspace_of(a, gpu, Parallelism(1, ep, dp)) for ep, dp in ((1, 1), (1, 8), (8, 8)))
    assert gathered > alone and spread == pytest.approx(alone)  # tokens of all groups, choices of an eighth


# -------------------------------------------------------------------------------------------------------------- points


def split_of(**cells: str) -> tuple:
    row = Row("points.csv, row 1", {"model_path": "deepseek-ai/DeepSeek-R1", "precision": "fp8", **cells})
    (point,) = points_of([row])
    assert not point.why
    return point.tp, point.ep, point.dp, point.pp


def test_rows_say_how_an_instance_is_divided():
    table = {"silicon_tpot_ms": "9", "backend": "trtllm", "attention_dp_size": "1"}
    assert split_of(**table, tp_size="8", moe_ep_size="8", moe_tp_size="1") == (8, 8, 1, 1)
    assert split_of(**table, tp_size="64", moe_ep_size="8", moe_tp_size="8") == (8, 8, 1, 1)  # n with itself
    assert split_of(**table | {"attention_dp_size": "64"}, tp_size="1", moe_ep_size="8", moe_tp_size="8") == (
        1,
        8,
        8,
        1,
    )
    assert split_of(**table | {"attention_dp_size": ""}, tp_size="4", moe_ep_size="2", moe_tp_size="2") == (4, 2, 1, 1)
    assert split_of(**table | {"backend": "vllm", "attention_dp_size": "4"}, tp_size="4", moe_ep_size="16") == (
        4,
        4,
        1,
        1,
    )
    assert split_of(backend="sglang", tp="8", dp_attention="true", ep="8") == (1, 8, 8, 1)
    assert split_of(backend="vllm", tp="8", pp_size="2") == (8, 1, 1, 2)


# ------------------------------------------------------------------------------------------------- commands and plans


def ran(capsys, *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_an_instance_in_words():
    assert instance_said({"gpu": "h100", "tp": 8}) == "8 x H100"
    divided = {"gpu": "h100", "tp": 8, "ep": 16, "dp": 2, "pp": 1}
    assert instance_said(divided, " ") == "16 H100 (TP 8, EP 16, DP 2)" and gpus_of_instance(divided) == 16


def test_engine_and_predict_take_them(capsys):
    words = ("--gpu", "h100", "--llm", "deepseek-v3", "--tp", 8, "--dp", 2, "--ep", 16, "--serving", "vllm")
    code, out, err = ran(capsys, "engine", *words, "--batch", 64, "--max-num-batched-tokens", 4096, "--json")
    document = json.loads(out)
    assert code == OK and "over the network is projected" in err
    assert [document[name] for name in ("tp", "ep", "dp", "pp", "serving")] == [8, 16, 2, 1, "vllm"]
    assert document["max_num_batched_tokens"] == 2 * 4096
    (point,) = document["points"]
    assert point["tok_per_j"] == pytest.approx(point["tok_per_s"] / (16 * point["power_w_per_gpu"]))
    code, out, _ = ran(capsys, "predict", *words, "--concurrency", 8, "--json", "--quiet")
    (seen,) = json.loads(out)["points"]
    assert code == OK and seen["power_w_per_gpu"] == pytest.approx(seen["power_w"] / 16)
    assert ran(capsys, "engine", *words)[1].count("16 x H100 (TP 8, EP 16, DP 2)") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("engine", "--ep", 4, "--serving", MEASURED_SERVING), "--ep: 4: the law of vllm-0.11"),
        (("engine", "--ep", 4, "--serving", "vllm"), "--ep: 4 groups of experts, and the LLM has no experts"),
        (("engine", "--serving", "llama.cpp"), "--serving: unknown name 'llama.cpp'"),
        (("engine", "--pp", 0), "--pp: 0 is not allowed"),
        (("optimize", "--dp", "2,4"), "--dp: '2,4' is not allowed"),
        (("predict", "--dp", 2, "--serving", MEASURED_SERVING), "--dp: 2: the law of vllm-0.11"),
    ],
)
def test_bad_options_are_refused_in_one_line(capsys, words, says):
    try:
        code = main([*map(str, words), "--quiet"])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == BAD_INPUT and err.count("\n") == 1 and says.removeprefix("--") in err


@pytest.mark.slow
def test_plans_keep_them(tmp_path, capsys):
    """What is written is read back, whoever serves it; another serving engine may be tried."""
    loaded, path = load("azure-conv"), tmp_path / "plan.json"
    spec = replace(DEEPSEEK, tp=1, dp=8, ep=8, max_num_batched_tokens=4096)
    slo = fo.make_slo(ttft_p99_s=60.0)
    problem = fo.make_problem(loaded.workload, [spec], slo=slo, n_pools=1, workload_name=loaded.name)
    window = [int(problem.window_tokens)]
    plan = evaluate_given(problem, problem.specs, window_tokens=window, gamma=[1.0], n_instances=[80])
    save_plan(plan, path)
    (pool,) = json.loads(path.read_text())["pools"]
    said = ("tp", "ep", "dp", "pp", "serving", "max_num_batched_tokens_asked")
    assert [pool[name] for name in said] == [1, 8, 8, 1, "vllm", 4096]
    assert pool["n_gpus"] == 8 * pool["n_instances"] == 640
    assert load_plan(path).specs == plan.specs
    assert main(["evaluate", str(path), "--serving", "trtllm", "--json", "--quiet"]) in (OK, INFEASIBLE)
    (other,) = json.loads(capsys.readouterr().out)["pools"]
    assert other["serving"] == "trtllm" and other["itl_s"] != pool["itl_s"]
    for serving, says in (("nobody", "--serving: unknown name 'nobody'"), (MEASURED_SERVING, "pools.0.ep: 8: the law")):
        assert main(["evaluate", str(path), "--serving", serving, "--quiet"]) == BAD_INPUT
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1


def test_a_plan_that_says_none_was_made_with_what_was_measured():
    (pool, *_) = read_plan_file(OLD_PLAN).pools
    assert (pool.serving, pool.ep, pool.dp, pool.pp, pool.max_num_batched_tokens_asked) == (
        MEASURED_SERVING,
        1,
        1,
        1,
        None,
    )


def test_export_starts_what_was_planned():
    document = json.loads(OLD_PLAN.read_text())
    pools = [pool | {"llm": "deepseek-v3", "precision": None, "n_gpus": None} for pool in document["pools"]]

    def launched(**how):
        return fleet_launch({**document, "pools": [pools[0] | how, *pools[1:]]}, "plan.json")

    fleet = launched(tp=1, dp=8, ep=8, gpu="b200", serving="vllm", max_num_batched_tokens_asked=4096)
    pool = fleet.pools[0]
    words = [arg.removeprefix("--").partition("=") for arg in pool.args[1:]]
    flags = {name: value for name, _, value in words}
    assert pool.gpus_per_instance == 8
    assert (flags["tensor-parallel-size"], flags["data-parallel-size"]) == ("1", "8")
    assert flags["max-num-batched-tokens"] == "4096" and "enable-expert-parallel" in flags and "nnodes" not in flags
    assert int(flags["max-num-seqs"]) == int(np.ceil(pools[0]["max_num_seqs"] / 8))
    assert "vLLM 0.12 to 0.19 and vLLM 0.11" in " ".join(fleet.header)
    far = launched(tp=8, dp=2, ep=16).pools[0]
    assert "--nnodes=2" in far.args and "--node-rank from 0 to 1" in " ".join(far.notes)
    assert "--pipeline-parallel-size=2" in launched(tp=4, pp=2).pools[0].args
    with pytest.raises(BadInput, match="need a plan with --ep 1 or 8"):
        launched(tp=8, ep=4)


def test_the_options_know_the_largest_instance():
    assert table.MAX_GPUS == MAX_GPUS and table.MAX_TP == MAX_TP
