"""A catalog of one's own: names, prices, refusals, and the plans that were made with it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fleetopt_jax._optimize.changes import all_levers
from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.search import evaluate_given
from fleetopt_jax.catalog.engines import build, engine_entry
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.own import Catalog
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.catalog.workloads import made_workload
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.own_catalog import load_catalog
from fleetopt_jax.documents.plan import load_plan, plan_of_file, save_plan
from fleetopt_jax.documents.plan_file import read_plan_file
from fleetopt_jax.fleet.assumptions import PUBLISHED
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.report.export.launch import fleet_launch
from fleetopt_jax.workload.atoms import make_workload

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "max_position_embeddings": 65_536,
    "torch_dtype": "bfloat16",
}
MINE = """
schema = "fleetopt-catalog/1"

[gpus.x1]
memory_bytes = 96e9
bandwidth_bytes_per_s = 4.2e12
peak_flop_per_s = 1.1e15
tdp_w = 650
usd_per_h = 3.1

[gpus.H100]
idle_w = 90

[llms.my-chat]
config = "chat/config.json"

[llms."bare.2"]
layers = 28
hidden = 3072
q_heads = 24
kv_heads = 8
head_dim = 128
attention_params = 700_000_000
dense_params = 2_100_000_000
lm_head_params = 394_000_000

[usd_per_gpu_h]
b200 = 4.0
"""


@pytest.fixture
def mine(tmp_path) -> Path:
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "my.toml"
    path.write_text(MINE)
    return path


def test_names_of_ones_own_go_wherever_ours_do(mine):
    catalog = load_catalog(mine)
    spec = catalog.spec("X1", "My-Chat", 4)
    assert (spec.gpu_name, spec.llm_name, spec.catalog) == ("x1", "my-chat", str(mine))
    entry = engine_entry(spec)
    assert entry.quality == "projected" and float(entry.engine.usd_per_gpu_h) == 3.1
    assert catalog.spec("x1", "bare.2", 1).llm_name == "bare.2"
    # Ours, but for what the file says: still as well known, for no measured law reads it.
    changed = catalog.spec("h100", "llama-3.1-70b", 4)
    for serving, quality in ((MEASURED_SERVING, "measured"), ("vllm", "kernels")):
        pair = [engine_entry(replace(spec, serving=serving)) for spec in (EngineSpec("h100", tp=4), changed)]
        assert [entry.quality for entry in pair] == [quality] * 2
    ours, changed = pair
    assert (float(ours.engine.idle_w), float(changed.engine.idle_w)) == (121.7, 90.0)
    # A name that the file does not have is ours alone: the same spec as without a file, but for its price.
    assert catalog.spec("a100", "qwen3-8b", 1) == EngineSpec("a100", "qwen3-8b", 1)
    assert float(build(catalog.spec("b200", "qwen3-8b", 1)).usd_per_gpu_h) == 4.0
    assert "x1" not in GPUS and Catalog().gpu("B200") == "b200"


def test_an_llm_of_a_known_name_has_none_of_its_measurements(mine):
    mine.write_text('[llms."llama-3.1-70b"]\nconfig = "chat/config.json"\n')
    spec = load_catalog(mine).spec("h100", "llama-3.1-70b", 4)
    own = engine_entry(replace(spec, serving=MEASURED_SERVING))
    assert own.quality == "law" and own.spec.llm_name == "llama-3.1-70b"


def test_prices_go_with_the_gpu_not_with_the_engine():
    catalog = Catalog().at_prices({"H100": 2.1})
    spec = catalog.spec("h100", "llama-3.1-8b", 1)
    assert spec.gpu == replace(GPUS["h100"], usd_per_h=2.1)
    assert catalog.at_prices({"h100": 32.2 / 8}).spec("h100", "llama-3.1-8b", 1) == EngineSpec(
        "h100", "llama-3.1-8b", 1
    )
    levers = {lever.name: lever for lever in all_levers([spec], 1, 1.0, next_gpu="b200", llm="qwen3-8b")}
    (newer,) = levers["generation"].variants(spec)
    assert float(build(newer).usd_per_gpu_h) == 8.0  # not the H100's
    with pytest.raises(BadInput, match=r"^--usd-per-gpu-h: unknown name 'h10'; did you mean h100"):
        Catalog().at_prices({"h10": 1.0}, "--usd-per-gpu-h")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("tdp_w = 650", "tdp_w = -650"), "line 8: gpus.x1.tdp_w = -650: input should be greater than 0"),
        (
            ("tdp_w = 650", "tdp = 650"),
            "line 8: gpus.x1.tdp = 650: no such key; did you mean tdp_w",
        ),
        (("tdp_w = 650\n", ""), "gpus.x1: has no tdp_w; a GPU of your own needs memory_bytes, "),
        (("idle_w = 90", "idle_w = 900"), "gpus.h100: need idle_w <= tdp_w, got 900.0 > 700"),
        (("idle_w = 90", "law = 'b300'"), "line 12: gpus.H100.law = b300: input should be 'h100' or 'b200'"),
        (("chat/config.json", "no.json"), "my.toml, llms.my-chat.config = "),
        (("chat/config.json", "no.json"), "/no.json: no such file; need a config.json, seen from the catalog's file"),
        (
            ("[gpus.H100]\nidle_w = 90", "[gpus]\nh100 = 90"),
            "gpus.h100 = 90: input should be named keys and their values",
        ),
        (("[gpus.H100]", '[gpus."H,100"]'), "gpus: H,100 cannot be a name here; need letters, digits, dots, "),
        (("layers = 28\n", ""), "llms.bare.2: has no layers; need config = a config.json, or its architecture"),
        (("layers = 28", "layers = 28\nconfig = 'x.json'"), "llms.bare.2: config and layers, "),
        (("layers = 28", "layers = 'a'"), "line 18: llms.bare.2.layers = a: input should be a valid integer"),
        (("b200 = 4.0", "b20 = 4.0"), "usd_per_gpu_h: unknown name 'b20'; did you mean b200"),
        (
            ("b200 = 4.0", "b200 = -4.0"),
            "line 28: usd_per_gpu_h.b200 = -4.0: input should be greater than or equal to 0",
        ),
        (("[gpus.H100]", "[gpus.X1]"), "gpus.x1: has no memory_bytes"),
        (
            ("[gpus.x1]", "[gpu.x1]"),
            "line 4: gpu: no such key; did you mean gpus? known: schema, gpus, llms, usd_per_gpu_h",
        ),
        (
            ("fleetopt-catalog/1", "fleetopt-plan/1"),
            "line 2: schema = fleetopt-plan/1: input should be 'fleetopt-catalog/1'",
        ),
        (("tdp_w = 650", "tdp_w = "), "is not TOML: "),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(mine, change, says):
    mine.write_text(MINE.replace(*change))
    with pytest.raises(BadInput) as refusal:
        load_catalog(mine)
    assert says in str(refusal.value) and str(refusal.value).startswith(str(mine.parent))


@pytest.mark.slow
def test_a_plan_keeps_its_prices_its_memory_and_its_catalog(mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    few = make_workload([100.0, 200.0, 300.0, 5900.0], [50.0, 60.0, 70.0, 100.0], arrival_rate_per_s=10.0)
    catalog = load_catalog("my.toml").at_prices({"x1": 2.0, "h100": 1.0})
    specs = [catalog.spec(gpu, "my-chat", 4, source="projected", memory_utilization=0.8) for gpu in ("x1", "h100")]
    how = {"assume": "published", "assumptions": PUBLISHED, "window_tokens": 6000.0, "objective": "usd"}
    problem = make_problem(few, specs, slo=make_slo(ttft_p99_s=5.0), **how)
    two_pools = {"window_tokens": [1024.0, 6000.0], "gamma": [1.0, 1.0], "n_instances": [2.0, 3.0]}
    plan = evaluate_given(problem, problem.specs, **two_pools)
    assert float(plan.metrics.usd_per_h) == 2 * 4 * 2.0 + 3 * 4 * 1.0
    (mine.parent / "plans").mkdir()
    save_plan(plan, "plans/plan.json")
    pools = json.loads(Path("plans/plan.json").read_text())["pools"]
    assert [pool["usd_per_gpu_h"] for pool in pools] == [2.0, 1.0]
    assert {(pool["memory_utilization"], pool["catalog_file"]) for pool in pools} == {(0.8, "../my.toml")}
    assert load_plan("plans/plan.json", workload=few).specs == plan.specs
    monkeypatch.chdir("/")  # from anywhere
    elsewhere = load_plan(mine.parent / "plans" / "plan.json", workload=few)
    assert float(elsewhere.metrics.usd_per_h) == float(plan.metrics.usd_per_h)
    assert {os.path.realpath(spec.catalog or "") for spec in elsewhere.specs} == {os.path.realpath(mine)}

    # The file has moved, and has a price of its own: what it says goes before the plan.
    moved = mine.parent / "moved.toml"
    moved.write_text(MINE.replace("b200 = 4.0", "h100 = 7.0"))
    mine.unlink()
    file, where = read_plan_file(mine.parent / "plans" / "plan.json"), str(mine.parent / "plans" / "plan.json")
    loaded = made_workload("few", few)
    assert prices_of(plan_of_file(file, where, loaded, catalog=load_catalog(moved))) == [3.1, 7.0]
    with pytest.raises(BadInput, match=r"my\.toml: no such file"):
        plan_of_file(file, where, loaded)


def prices_of(plan) -> list[float]:
    return [float(build(spec).usd_per_gpu_h) for spec in plan.specs]


def test_the_catalog_lists_what_is_ones_own_beside_ours(mine, monkeypatch, capsys):
    monkeypatch.chdir(mine.parent)
    assert main(["catalog", "--catalog", "my.toml", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["gpus"]["x1"]["usd_per_h"] == 3.1 and document["gpus"]["b200"]["usd_per_h"] == 4.0
    assert document["gpus"]["h100"]["idle_w"] == 90.0 and {"my-chat", "bare.2"} < set(document["llms"])
    assert "any LLM on x1" in document["engines"]
    assert main(["catalog", "llm", "my-chat", "--catalog", "my.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 16


def test_export_knows_the_names_of_the_catalog_that_is_given(mine, monkeypatch):
    """Whose file the plan names is gone."""
    pool = {"window_tokens": 4096, "gpu": "x1", "llm": "my-chat", "tp": 4, "n_instances": 2, "max_num_seqs": 64}
    document = {
        "schema": "fleetopt-plan/1",
        "workload": {"name": "few", "arrival_rate_per_s": 1.0},
        "pools": [pool | {"catalog_file": "gone.toml"}],
    }
    with pytest.raises(BadInput, match=r"gone\.toml: no such file"):
        fleet_launch(document, "plan.json")
    (launch,) = fleet_launch(document, "plan.json", catalog=load_catalog(mine)).pools
    assert launch.gpu == "x1" and launch.checkpoint_bytes > 1e9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("optimize", "--gpus-of", "b200=96"),
            "--gpus-of b200=96: no pool may be of b200: --gpu h100; add b200 to --gpu",
        ),
        (("optimize", "--usd-per-gpu-h", "h10=2"), "--usd-per-gpu-h: unknown name 'h10'; did you mean h100"),
        (("engine", "--gpu", "x2", "--catalog", "my.toml"), "--gpu: unknown name 'x2'; did you mean x1"),
        (
            ("engine", "--llm", "my-chats", "--catalog", "my.toml"),
            "--llm: unknown name 'my-chats'; did you mean my-chat",
        ),
        (
            ("engine", "--tp", "3"),
            "--tp: 3 GPUs cannot share the 64 attention heads of llama-3.1-70b; need one of 1, 2, 4,",
        ),
        (
            ("engine", "--gpu-memory-utilization", "90"),
            "--gpu-memory-utilization: 90 is not allowed: need a number from 0.01",
        ),
    ],
)
def test_refused_at_the_door(mine, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(mine.parent)
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(main(list(arguments)))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_an_engine_of_ones_own_catalog(mine, monkeypatch, capsys):
    monkeypatch.chdir(mine.parent)
    assert main(["engine", "--gpu", "x1", "--llm", "my-chat", "--tp", "2", "--catalog", "my.toml", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["gpu"], document["llm"], document["memory_utilization"]) == ("x1", "my-chat", 0.9)
    assert 0.15 < document["prefill_relative_error"] < 0.4 and document["points"][0]["prefill_frac"] == 0.0


def test_a_gpu_of_ones_own_has_the_units_and_the_memory_that_are_said(tmp_path):
    """No 8-bit peak, no 8-bit units; and what is said of memory counts for every law."""
    file = tmp_path / "my.toml"
    sheet = "memory_bytes = 96e9\nbandwidth_bytes_per_s = 4e12\npeak_flop_per_s = 1e15\ntdp_w = 650\nusd_per_h = 3\n"
    fast = sheet + 'peak_flop8_per_s = 2e15\nformats = ["fp8"]\n'
    file.write_text(f"[gpus.x1]\n{sheet}[gpus.x2]\n{fast}[gpus.h200]\nmemory_bytes = 60e9\n")
    catalog = load_catalog(file)
    assert [catalog.gpu_entry(name).formats for name in ("x1", "x2")] == [(), ("fp8",)]
    assert float(catalog.gpu_entry("h200").nominal_gpu.memory_bytes) == 60e9
    file.write_text("[llms.mine.held]\nattention_bytes = 1.0\n")
    with pytest.raises(BadInput, match="held"):
        load_catalog(file)
