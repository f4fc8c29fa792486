"""Engine specs: what is kept, compared and changed; equal specs are one engine, and records of one's own go where names
do."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.search import evaluate_given, optimize
from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.catalog.engines import build, engine_entry, own_fits, resolved
from fleetopt_jax.catalog.gpus import GPUS, GpuEntry
from fleetopt_jax.catalog.llms import LLMS, LlmEntry
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec, OwnLaws
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.core.units import GIB, TB, TFLOP
from fleetopt_jax.fleet.engine import DoesNotFit, Engine
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.laws.decode import make_decode_step
from fleetopt_jax.laws.kv_cache import make_kv_capacity
from fleetopt_jax.laws.mixed_step import decoding
from fleetopt_jax.laws.power import make_logistic_power
from fleetopt_jax.workload.atoms import make_workload


def assert_same_numbers(one: Engine, other: Engine) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_array_equal(a, b)


def own_laws(**changes) -> OwnLaws:
    laws = OwnLaws(
        decode=make_decode_step(base_s=0.01, per_token_s=1e-8),
        power=make_logistic_power(idle_w=100.0, nominal_w=500.0, log2_half_batch=3.0),
        idle_w=90.0,
        quality="calibrated",
        step_error=0.02,
        power_error=0.03,
        source="bench",
        file="engine.json",
    )
    return replace(laws, **changes)


# --- equality ---------------------------------------------------------------------------------------------------------


def test_equal_specs_are_one_engine_whatever_the_case_of_their_names():
    spec = EngineSpec("h100", "llama-3.1-8b", 1, "fp8", "fp8", serving="vllm")
    other = EngineSpec("H100", "Llama-3.1-8B", 1, "FP8", kv_precision="FP8", serving="vLLM")
    assert spec == other and hash(spec) == hash(other) and len({spec, other}) == 1
    assert build(spec) is build(other)
    assert (spec.gpu_name, spec.llm_name, spec.file) == ("h100", "llama-3.1-8b", None)
    with pytest.raises(FrozenInstanceError):
        spec.tp = 2


def test_every_difference_of_a_spec_is_one_of_its_engine():
    spec = EngineSpec("h100", "qwen3-32b", 2)
    changes = dict(gpu="h200", llm="qwen3-14b", tp=4, precision="fp8", kv_precision="fp8", max_num_seqs=77)
    changes |= dict(clock_frac=0.7, source="projected", laws=own_laws())
    for name, value in changes.items():
        changed = replace(spec, **{name: value})
        assert changed != spec
        leaves = [jax.tree.leaves(build(each)) for each in (changed, spec)]
        assert len(leaves[0]) != len(leaves[1]) or not all(map(np.array_equal, *leaves)), name


def test_a_resolved_spec_says_its_precision_and_two_ways_to_ask_become_one():
    for llm, precision in (("llama-3.1-70b", "bf16"), ("gpt-oss-120b", "mxfp4"), ("deepseek-v3", "fp8")):
        implicit, explicit = EngineSpec("b200", llm), EngineSpec("b200", llm, 8, precision, "bf16")
        assert implicit != explicit
        assert resolved(implicit) == resolved(explicit) == explicit
        assert_same_numbers(build(implicit), build(explicit))
        assert resolved(resolved(implicit)) == resolved(implicit)
    workload = make_workload([100.0], [20.0], arrival_rate_per_s=1.0)
    assert len(make_problem(workload, [EngineSpec("h100"), EngineSpec("H100", precision="bf16")]).specs) == 1


def test_own_laws_are_equal_by_content():
    laws, again = own_laws(), own_laws()
    assert laws is not again and laws == again and hash(laws) == hash(again)
    traced = own_laws(decode=jax.tree.map(jnp.asarray, laws.decode))  # whoever holds the numbers
    assert traced == laws
    different = (
        own_laws(decode=make_decode_step(base_s=0.011, per_token_s=1e-8)),
        own_laws(decode=None),
        own_laws(kv=make_kv_capacity(n_blocks=10)),
        own_laws(idle_w=91.0),
        own_laws(quality="given"),
        own_laws(step_error=None),
        own_laws(file=None),
        OwnLaws(),
    )
    assert len({laws, *different}) == 1 + len(different)
    assert laws != "laws"
    spec, other = EngineSpec("h100", laws=laws), EngineSpec("h100", laws=again)
    assert spec == other and build(spec) is build(other)
    assert spec.file == "engine.json"


# --- how it is run ----------------------------------------------------------------------------------------------------


def test_changing_the_clock_twice_changes_it_once():
    spec = EngineSpec("h100", max_num_seqs=96)
    slow = replace(spec, clock_frac=0.8)
    again = replace(slow, clock_frac=0.8)
    assert again == slow and build(again) is build(slow)
    step = {frac: float(build(replace(slow, clock_frac=frac)).decode.step_s(32.0, 1000.0)) for frac in (0.64, 0.8, 1.0)}
    assert step[1.0] < step[0.8] < step[0.64]
    assert_same_numbers(build(replace(slow, clock_frac=1.0)), build(spec))
    for each in (spec, slow, again, replace(slow, clock_frac=0.5)):
        assert each.max_num_seqs == 96 and float(build(each).kv.max_num_seqs) == 96.0
    assert float(build(replace(slow, max_num_seqs=None)).kv.max_num_seqs) == GPUS["h100"].max_num_seqs


def test_the_cap_on_sequences_is_kept_beside_laws_of_ones_own():
    kv = make_kv_capacity(n_blocks=5000, max_num_seqs=400)
    spec = EngineSpec("h100", laws=OwnLaws(kv=kv))
    assert float(build(spec).kv.max_num_seqs) == 400.0
    capped = build(replace(spec, max_num_seqs=40))
    assert (float(capped.kv.max_num_seqs), float(capped.kv.n_blocks)) == (40.0, 5000.0)


# --- laws of one's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["measured", "projected"])
def test_own_laws_take_the_place_of_the_catalogs_and_the_rest_stays(source):
    spec, laws = EngineSpec("b200", "llama-3.1-70b", 8, source=source), own_laws()
    plain, own = engine_entry(spec), engine_entry(replace(spec, laws=laws))
    assert own.engine.decode is laws.decode and own.engine.power is laws.power
    assert float(own.engine.idle_w) == 90.0
    for name in ("kv", "prefill", "gpus_per_instance", "usd_per_gpu_h"):
        for a, b in zip(*(jax.tree.leaves(getattr(each.engine, name)) for each in (own, plain))):
            np.testing.assert_array_equal(a, b)
    assert (own.quality, own.step_error, own.power_error) == ("calibrated", 0.02, 0.03)
    assert own.source == "bench; of the catalog: prefill, KV cache" and own.of_catalog == ("prefill", "KV cache")
    assert own.prompt_per_output == 0.0


def test_what_own_laws_leave_out_is_the_configurations_own_fit():
    gpu, llm, tp, precision = next(iter(own_fits()))
    spec = EngineSpec(gpu, llm, tp, precision, serving=MEASURED_SERVING)
    fitted = engine_entry(spec)
    assert fitted.quality == "measured"
    own = engine_entry(replace(spec, laws=OwnLaws(idle_w=55.0)))
    assert_same_numbers(replace(own.engine, idle_w=fitted.engine.idle_w), fitted.engine)
    assert (own.step_error, own.power_error) == (fitted.step_error, fitted.power_error)
    by_law = engine_entry(replace(spec, own_fit=False))
    assert by_law.quality == "law" and by_law.step_error != fitted.step_error


def test_an_own_law_runs_at_another_clock():
    spec = EngineSpec("h100", laws=own_laws(), clock_frac=0.7)
    slow, fast = build(spec), build(replace(spec, clock_frac=1.0))
    assert float(slow.decode.step_s(64.0, 1e3)) > float(fast.decode.step_s(64.0, 1e3))
    assert float(slow.power.gpu_w(64.0, 1e3)) < float(fast.power.gpu_w(64.0, 1e3))


# --- a GPU and an LLM of one's own ------------------------------------------------------------------------------------

MY_GPU = GpuEntry(
    name="x1",
    title="X1 96 GB",
    memory_bytes=96 * GIB,
    bandwidth_bytes_per_s=4.2 * TB,
    peak_flop_per_s=1100 * TFLOP,
    tdp_w=650,
    usd_per_h=3.1,
    chunk_tokens=1024,
    source="my data sheet",
)
MY_LLM = LlmEntry(
    title="mine-3b",
    architecture=Architecture(
        layers=28,
        hidden=3072,
        q_heads=24,
        kv_heads=8,
        head_dim=128,
        attention_params=700_000_000,
        dense_params=2_100_000_000,
        lm_head_params=394_000_000,
    ),
    source="my config",
)


@pytest.mark.slow
def test_a_gpu_and_an_llm_of_ones_own_need_no_file_of_ours():
    spec = EngineSpec(MY_GPU, MY_LLM, 1)
    entry = engine_entry(spec)
    assert entry.quality == "projected" and entry.step_error > 0
    assert (spec.gpu_name, spec.llm_name) == ("x1", "mine-3b")
    assert "x1" not in GPUS and "mine-3b" not in LLMS
    assert hash(spec) == hash(EngineSpec(replace(MY_GPU), replace(MY_LLM), 1))
    assert build(spec) is build(EngineSpec(replace(MY_GPU), replace(MY_LLM), 1))
    rng = np.random.default_rng(0)
    prompt, output = np.round(np.geomspace(20, 6000, 30)), np.round(rng.uniform(20, 300, 30))
    workload = make_workload(prompt, output, arrival_rate_per_s=80.0)
    problem = make_problem(workload, [spec, EngineSpec("h100", MY_LLM, 1)], slo=make_slo(ttft_p99_s=2.0))
    assert problem.kinds == ("x1", "h100")
    plan = optimize(problem)
    assert plan.status == "optimal" and set(plan.kinds) <= {"x1", "h100"}
    alone = optimize(problem.serving(specs=(spec,)))
    assert alone.kinds == ("x1",) * len(alone.specs)
    assert float(plan.metrics.tok_per_j) >= float(alone.metrics.tok_per_j)
    numbers = dict(window_tokens=[1024.0, problem.window_tokens], gamma=[1.0, 1.0], n_instances=[4.0, 8.0])
    again = evaluate_given(problem, [spec, spec], **numbers)
    assert again.kinds == ("x1", "x1") and float(again.metrics.n_gpus) == 12.0


def test_another_gpu_of_a_catalogs_name_has_none_of_its_measurements():
    faster = replace(GPUS["h100"], bandwidth_bytes_per_s=2 * GPUS["h100"].bandwidth_bytes_per_s)
    ours, other = (engine_entry(EngineSpec(gpu, tp=4, serving=MEASURED_SERVING)) for gpu in ("h100", faster))
    assert (ours.quality, other.quality) == ("measured", "projected")
    by_operators = [engine_entry(EngineSpec(gpu, tp=4)) for gpu in ("h100", faster)]
    assert [entry.quality for entry in by_operators] == ["kernels", "projected"]
    assert by_operators[1].step_error > by_operators[0].step_error
    assert float(other.engine.decode.step_s(1.0, 1000.0)) < float(ours.engine.decode.step_s(1.0, 1000.0))


def test_a_catalog_gpu_with_another_price_is_as_good_as_the_catalogs():
    cheap = EngineSpec(replace(GPUS["h100"], usd_per_h=2.0))
    entry, catalog = engine_entry(cheap), engine_entry(EngineSpec("h100"))
    assert (entry.quality, entry.step_error) == (catalog.quality, catalog.step_error)
    assert float(entry.engine.usd_per_gpu_h) == 2.0
    ours = replace(entry.engine, usd_per_gpu_h=catalog.engine.usd_per_gpu_h)
    batch = decoding(8.0, 1000.0)
    assert float(ours.step.gpu_j(batch)) == float(catalog.engine.step.gpu_j(batch))
    assert_same_numbers(replace(ours, step=None, power=None), replace(catalog.engine, step=None, power=None))


# --- refusals ---------------------------------------------------------------------------------------------------------

LIMITED = {"gpu": "h100", "power_limit_w": 500.0}


@pytest.mark.parametrize(
    ("field", "spec", "says"),
    [
        ("gpu", EngineSpec("h10"), "unknown name 'h10'; did you mean h100"),
        ("llm", EngineSpec("h100", "llama-3.1-7b"), "unknown name 'llama-3.1-7b'; did you mean llama-3.1-70b"),
        ("llm", EngineSpec("h100", "Qwen/Qwen3-8B"), "unknown name 'Qwen/Qwen3-8B'; did you mean qwen3-8b"),
        ("tp", EngineSpec("h100", tp=0), "0; need 1 to 64 GPUs per instance"),
        ("tp", EngineSpec("h100", tp=65), "65; need 1 to 64"),
        ("tp", EngineSpec("h100", tp=2.5), "2.5; need 1 to 64"),
        (
            "tp",
            EngineSpec("h100", tp=3),
            "3 GPUs cannot share the 64 attention heads of llama-3.1-70b; need one of 1, 2, ",
        ),
        (
            "power_limit_w",
            EngineSpec("h100", power_limit_w=90.0),
            "90 W; need above 122 W, what h100 draws",
        ),
        ("power_limit_w", EngineSpec("h100", power_limit_w=701.0), "701 W; need above"),
        (
            "power_limit_w",
            EngineSpec(serving="vllm-0.11", **LIMITED),
            "500 W: there is no law of it for eng",
        ),
        (
            "power_limit_w",
            EngineSpec(speculate="eagle3:2", **LIMITED),
            "500 W: there is no law of it for d",
        ),
        ("memory_utilization", EngineSpec("h100", memory_utilization=0.0), "0; need a share above 0, at most 1"),
        ("memory_utilization", EngineSpec("h100", memory_utilization=1.1), "1.1; need a share above 0, at most 1"),
        (
            "memory_utilization",
            EngineSpec("h100", source="projected", memory_utilization=0.8),
            "0.8; the paper's KV cache is given: need 0.9",
        ),
        ("precision", EngineSpec("h100", precision="fp9"), "unknown name 'fp9'; did you mean fp8"),
        ("precision", EngineSpec("h100", precision="mxfp4"), "mxfp4 is for routed experts"),
        ("kv_precision", EngineSpec("h100", kv_precision="int4"), "unknown name 'int4'"),
        ("serving", EngineSpec("h100", serving="tgi"), "unknown name 'tgi'; known: sglang, trtllm, vllm, vllm-0.11"),
        ("max_num_seqs", EngineSpec("h100", max_num_seqs=0), "0; need at least 1"),
        ("clock_frac", EngineSpec("h100", clock_frac=0.3), "0.3; need 0.4 to 1"),
        ("clock_frac", EngineSpec("h100", clock_frac=1.1), "1.1; need 0.4 to 1"),
        (
            "clock_frac",
            EngineSpec("h100", "llama-3.1-8b", 1, source="projected", clock_frac=0.8),
            "0.8; the roofline engine has no clock law: need 1",
        ),
    ],
)
def test_a_refusal_names_the_field_and_is_said_where_the_field_came_from(field, spec, says):
    with pytest.raises(BadField) as refusal:
        build(spec)
    assert refusal.value.field == field
    assert str(refusal.value).startswith(f"{field}: {says}")
    there = refusal.value.at(lambda name: f"plan.json, pools.0.{name}")
    assert isinstance(there, BadInput) and str(there).startswith(f"plan.json, pools.0.{field}: {says}")
    with pytest.raises(BadField) as again:  # a refusal is not kept as an engine
        build(spec)
    assert again.value.field == field


def test_a_model_that_does_not_fit_says_which_on_which_and_what_it_needs():
    spec = EngineSpec("h100", "llama-3.1-405b", 8)
    with pytest.raises(DoesNotFit, match=r"^llm: llama-3.1-405b on 8 x h100: does not fit: needs .* at TP 8"):
        build(spec)
    with pytest.raises(DoesNotFit, match=r"^llm: mine-3b on 1 x tiny: does not fit") as refusal:
        build(EngineSpec(replace(MY_GPU, name="tiny", memory_bytes=4 * GIB), MY_LLM, 1))
    there = refusal.value.at("--".__add__)
    assert isinstance(there, DoesNotFit) and str(there).startswith("--llm: mine-3b on 1 x tiny: does not fit")
    workload = make_workload([100.0], [20.0], arrival_rate_per_s=1.0)
    with pytest.raises(DoesNotFit):
        make_problem(workload, [spec])


def test_building_engines_compiles_nothing():
    script = """
import jax
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
jax.config.update("jax_enable_x64", True)
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec
for source in ("measured", "projected"):
    for gpu, llm, tp in (("h100", "llama-3.1-70b", 8), ("b200", "gpt-oss-120b", 2), ("l40s", "qwen3-8b", 1)):
        build(EngineSpec(gpu, llm, tp, source=source))
build(EngineSpec("h100", clock_frac=0.7, max_num_seqs=9))
print(sum("backend_compile" in event for event in compiled))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
    assert as_floats(a=1.0)["a"].dtype == np.float64
