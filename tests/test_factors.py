"""Factors on a step of operators: what made the data is found, the rest stays the catalog's, and files keep it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fleetopt_jax as fo
from fleetopt_jax.calibrate.factors import PRIORS, FactorsFit, fit_factors
from fleetopt_jax.calibrate.measurements import Measurements
from fleetopt_jax.calibrate.points import Point
from fleetopt_jax.calibrate.predict import Sigmas, predicted
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.spec import OwnLaws
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.documents.engine import load_engine, save_engine
from fleetopt_jax.laws.closed_loop import Benchmark
from fleetopt_jax.laws.factors import StepFactors, make_step_factors
from fleetopt_jax.laws.host import make_host_law
from fleetopt_jax.laws.mixed_step import decoding, with_prompts

SPEC = fo.EngineSpec("h100", "llama-3.1-70b", 4, "fp8", serving="vllm")
TRUTH = {"gpu": 0.9, "prompt": 1.2, "host": 1.8, "first_token": 2.0, "watts": 1.1}
LOADS = [(n, isl) for n in (1, 4, 16, 64, 256) for isl in (200, 2000)]  # requests in flight, prompt
BENCHMARKS = Path(__file__).parent / "benchmarks"
ENGINE = ("--gpu", "h100", "--tp", "4", "--llm", "llama-3.1-70b", "--precision", "fp8")
FORMATS = ("vllm.jsonl", "aiperf", "guidellm.json", "inferencex.json", "points.csv", "own.csv", "mlenergy.csv")


def with_factors(**factors: float) -> fo.EngineSpec:
    return replace(SPEC, laws=OwnLaws(factors=make_step_factors(**factors), quality="measured"))


def shown(spec: fo.EngineSpec, n: int, isl: int):
    (seen,) = predicted(fo.build(spec), Sigmas(0, 0, 0), [Benchmark(isl, 200, n, 10 * n)])
    assert seen is not None
    return seen


def points(loads=LOADS, medians=False, noise=0.0) -> list[Point]:
    made, rng = [], np.random.default_rng(0)
    for i, (n, isl) in enumerate(loads):
        seen = shown(with_factors(**TRUTH), n, isl)
        measured = {"output_tok_per_s": seen.output_tok_per_s, "power_w": seen.power_w}
        for name in ("ttft", "tpot"):
            which = f"{name}_median_s" if medians else f"{name}_s"
            measured[which] = getattr(seen, which)
        measured = {name: value * (1 + noise * rng.standard_normal()) for name, value in measured.items()}
        made.append(Point(i, isl=isl, osl=200, concurrency=n, measured=measured))
    return made


@pytest.fixture(scope="module")
def fit() -> FactorsFit:
    return fit_factors(SPEC, points())


# The law


def test_factors_of_one_are_the_catalogs_engine_and_each_moves_its_own():
    batch = with_prompts(decoding(32.0, 2000.0), 512.0)
    alone = decoding(32.0, 2000.0)
    base, ones = (fo.build(spec).step for spec in (SPEC, with_factors()))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(ones), strict=True))
    slow, late = (fo.build(with_factors(**{name: 1.5})).step for name in ("gpu", "prompt"))
    assert float(slow.step_s(batch)) > float(base.step_s(batch)) and float(slow.step_s(alone)) > float(
        base.step_s(alone)
    )
    assert float(late.step_s(batch)) > float(base.step_s(batch))
    assert float(late.step_s(alone)) == pytest.approx(float(base.step_s(alone)), rel=1e-12)
    hot = fo.build(with_factors(watts=1.2))
    limit = fo.catalog.gpus.GPUS["h100"].tdp_w
    watts = [float(law.gpu_w(alone)) for law in (base, hot.step)]
    assert float(base.gpu.idle_w) < watts[0] < watts[1] < limit
    assert watts[1] - float(base.gpu.idle_w) < 1.2 * (watts[0] - float(base.gpu.idle_w))  # the board holds it
    assert float(hot.power.gpu_w(32.0, 2000.0)) == pytest.approx(watts[1])
    assert float(hot.idle_w) == float(fo.build(SPEC).idle_w)


def test_a_prompt_never_makes_a_step_shorter_and_gradients_are_finite():
    law = make_host_law(slowdown=1.0, prompt_slowdown=1.1, step_s=1e-3)
    quick = make_step_factors(prompt=0.5).of_host(law)
    assert float(quick.prompt_slowdown) == float(quick.slowdown)

    def total(factors: StepFactors) -> jax.Array:
        host = factors.of_host(law)
        return jnp.sum(host.step_of_s(jnp.array([0.0, 1e-3, 1.0]), 80.0, jnp.array([0.0, 1.0, 64.0]), 1.0))

    ones = jax.tree.map(jnp.asarray, make_step_factors())
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(jax.grad(total)(ones)))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factor host"):
            make_step_factors(host=wrong)


# The fit


def test_what_made_the_benchmarks_is_found_and_the_rest_stays_the_catalogs(fit):
    assert set(fit.names) == set(TRUTH)
    assert fit.parameters == pytest.approx({**dict.fromkeys(PRIORS, 1.0), **TRUTH}, rel=2e-3)
    assert fit.parameters["sequence"] == fit.parameters["exchange"] == 1.0
    assert len(fit.notes) == 2 and all("keeps the catalog's value" in note for note in fit.notes)
    assert max(fit.left_out_mape.values()) < 2e-3 < 0.04 < min(fit.catalog_mape.values())
    assert set(fit.kinds) == {"ttft_s", "tpot_s", "output_tok_per_s", "power_w"}


def test_errors_of_the_means_are_the_engines_own(fit):
    """The residuals are what `predict` would say of the same points, by the catalog and by the factors."""
    for residuals, spec in ((fit.before, SPEC), (fit.residuals, with_factors(**fit.parameters))):
        by_kind = {kind: residuals[np.array(fit.kinds) == kind] for kind in set(fit.kinds)}
        for i, (point, (n, isl)) in enumerate(zip(points(), LOADS)):
            seen = shown(spec, n, isl)
            for kind, values in by_kind.items():
                off = getattr(seen, kind) / point.measured[kind] - 1.0
                off = 1.0 / (1.0 + off) - 1.0 if kind == "output_tok_per_s" else off  # compared as seconds of a run
                assert values[i] == pytest.approx(off, abs=2e-3), (kind, n, isl)


def test_standard_errors_hold_under_noise_and_points_left_out_are_predicted():
    fit = fit_factors(SPEC, points(noise=0.03))
    for name, value in TRUTH.items():
        assert abs(fit.parameters[name] - value) < 4.0 * fit.standard_errors[name], name
    assert np.mean(list(fit.left_out_mape.values())) < 0.04 < np.mean(list(fit.catalog_mape.values()))


def test_medians_serve_where_there_are_no_means():
    fit = fit_factors(SPEC, points(medians=True))
    assert {"ttft_median_s", "tpot_median_s"} < set(fit.kinds)
    assert {name: fit.parameters[name] for name in ("gpu", "host")} == pytest.approx(
        {"gpu": 0.9, "host": 1.8}, rel=0.05
    )


def test_few_points_tell_few_factors_and_stay_near_the_catalog():
    one = fit_factors(SPEC, points(LOADS[3:4]))
    assert set(one.names) < set(TRUTH) and all(abs(np.log(value)) < 1.5 for value in one.parameters.values())
    np.testing.assert_allclose(one.left_out[:3], one.before[:3])  # nothing else tells that point: the catalog does
    watts = [Point(0, isl=200, osl=200, concurrency=4, measured={"power_w": 1800.0})]
    alone = fit_factors(SPEC, watts)
    assert set(alone.kinds) == {"power_w"} and alone.errors["step"] is None
    entry = engine_entry(replace(SPEC, laws=OwnLaws(factors=alone.factors, power_error=0.1)))
    base = engine_entry(SPEC)
    assert (entry.step_error, entry.power_error, entry.prefill_error) == (base.step_error, 0.1, base.prefill_error)
    assert entry.of_catalog == ("decode step", "prefill", "KV cache", "idle power")


def test_decode_steps_at_known_contexts_tell_the_kernels():
    batch, context = np.array([1.0, 8, 32, 64, 128, 256]), np.full(6, 2000.0)
    mine = fo.build(with_factors(gpu=1.25, watts=0.9))
    step_s = np.array([float(mine.decode.step_s(n, c)) for n, c in zip(batch, context)])
    watts = np.array([float(mine.power.gpu_w(n, c)) for n, c in zip(batch, context)])
    fit = fit_factors(SPEC, Measurements(batch, step_s, context, watts))
    assert (fit.parameters["gpu"], fit.parameters["watts"]) == pytest.approx((1.25, 0.9), rel=5e-3)
    assert fit.errors["prefill"] is None and fit.errors["step"] < 5e-3
    with pytest.raises(BadInput, match="contexts of the sequences are not said; need context_tokens, or isl and osl"):
        fit_factors(SPEC, Measurements(batch, step_s))
    with pytest.raises(BadInput, match=r"vllm-0.11 is not made of operators"):
        fit_factors(replace(SPEC, serving="vllm-0.11"), Measurements(batch, step_s, context))


# Files


def test_an_engine_file_keeps_the_step_of_operators(tmp_path, fit):
    path = tmp_path / "mine.json"
    save_engine(path, fit, None, gpu="h100", llm="llama-3.1-70b", tp=4, precision="fp8", serving="vllm", source="mine")
    spec = load_engine(path)
    entry, made = engine_entry(spec), engine_entry(with_factors(**fit.parameters))
    assert entry.quality == "measured" and entry.engine.step is not None
    for ours, theirs in zip(jax.tree.leaves(entry.engine), jax.tree.leaves(made.engine), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert (entry.step_error, entry.power_error, entry.prefill_error) == tuple(
        fit.errors[name] for name in ("step", "power", "prefill")
    )
    assert entry.of_catalog == ("KV cache", "idle power") == tuple(json.loads(path.read_text())["of_catalog"])
    assert load_engine(path) == spec
    slow = fo.build(replace(spec, clock_frac=0.7))
    assert float(slow.decode.step_s(64, 1000.0)) > float(entry.engine.decode.step_s(64, 1000.0))


def test_a_file_has_one_law_of_a_step(tmp_path, fit):
    path = tmp_path / "mine.json"
    save_engine(path, fit, None, gpu="h100", llm="llama-3.1-70b", tp=4, serving="vllm")
    document = json.loads(path.read_text())
    for change, says in (
        ({"step_factors": None}, "neither decode nor step_factors; need one of them"),
        ({"step_factors": {"gpu": 0.0}}, "step_factors.gpu = 0.0"),
        ({"factors": {"prefill": 1.0, "power": None, "left_out_mape": {}}}, "step_factors and factors"),
        ({"serving": "magic"}, "serving: unknown name 'magic'"),
        ({"serving": "vllm-0.11"}, "vllm-0.11 is not made of operators"),
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises((BadInput, BadField)) as refused:
            load_engine(path)
        assert says in str(refused.value) and "\n" not in str(refused.value)


# The command


def ran(capsys, *words: object) -> tuple[int, str]:
    code = main([str(word) for word in words])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("name", FORMATS)
def test_calibrate_takes_every_format(capsys, tmp_path, name):
    """A file of each becomes an engine that is nearer to it than the catalog's, points left out; and it is loaded."""
    mine = tmp_path / "mine.json"
    words = ("calibrate", BENCHMARKS / name, *ENGINE, "--dp", 1, "--isl", 2000, "--out", mine)
    code, out = ran(capsys, *words, "--json")
    document = json.loads(out)
    assert code == OK and document["serving"] == "vllm" and document["quality"] == "measured"
    errors = document["fit"]["step_factors"]
    kind = "tpot_s" if "tpot_s" in errors["catalog_mape"] else "output_tok_per_s"
    assert document["relative_error"]["step"] == errors["left_out_mape"][kind] < 0.6 * errors["catalog_mape"][kind]
    assert set(errors["estimates"]) <= set(PRIORS)
    spec = load_engine(mine)
    assert fo.build(spec).step is not None and engine_entry(spec).step_error == errors["left_out_mape"][kind]


def test_the_table_says_what_is_told_and_how_well_points_left_out_are_met(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    figure, mine = tmp_path / "left.svg", tmp_path / "mine.json"
    code, out = ran(capsys, "calibrate", BENCHMARKS / "own.csv", *ENGINE, "--out", mine, "--figure", figure)
    assert code == OK and max(map(len, out.splitlines())) <= 80 and figure.exists()
    said = " ".join(out.split())
    for words in ("kernels of the GPU", "the catalog's", "point left out", "keeps the catalog's value", "TTFT"):
        assert words in said
    code, out = ran(capsys, "predict", "--points", BENCHMARKS / "own.csv", "--gpu", mine, "--json")
    found = json.loads(out)
    assert code == OK and len(found["points"]) == 3 and found["points"][0]["quality"] == "measured"
    code, out = ran(capsys, "predict", "--points", BENCHMARKS / "own.csv", *ENGINE, "--json")
    before = json.loads(out)["errors"]["all"]
    assert found["errors"]["all"]["tpot_s"]["mean"] < 0.5 * before["tpot_s"]["mean"]


def test_a_step_of_its_own_is_there_for_the_asking(capsys, tmp_path):
    path, mine = tmp_path / "steps.csv", tmp_path / "mine.json"
    path.write_text("batch,step_ms\n" + "".join(f"{n},{10 + 0.1 * n}\n" for n in (1, 2, 4, 8, 16, 32)))
    code, out = ran(capsys, "calibrate", path, *ENGINE, "--form", "dense", "--out", mine, "--json")
    document = json.loads(out)
    assert code == OK and document["serving"] == "vllm" and document["decode"]["base_s"] == pytest.approx(0.01)
    assert fo.build(load_engine(mine)).step is None


@pytest.mark.slow
def test_a_calibrated_step_of_operators_plans_and_is_simulated(capsys, tmp_path, fit):
    """Slower kernels and hungrier boards than the catalog's: the plan says so, is read back, and is simulated alike."""
    mine, trace, path = tmp_path / "mine.json", tmp_path / "trace.csv", tmp_path / "plan.json"
    save_engine(mine, fit, None, gpu="h100", llm="llama-3.1-70b", tp=4, precision="fp8", serving="vllm")
    rng = np.random.default_rng(0)
    lengths = zip(rng.integers(200, 3000, 300), rng.integers(50, 400, 300))
    trace.write_text("prompt_tokens,output_tokens\n" + "".join(f"{p},{o}\n" for p, o in lengths))
    load = ("--workload", trace, "--rate", 30, "--ttft-p99-ms", 3000, "--pools", 1)
    code, out = ran(capsys, "optimize", *load, "--gpu", mine, "--out", path, "--json")
    (pool,) = json.loads(out)["pools"]
    assert code == OK and (pool["engine_file"], pool["engine_quality"]) == (str(mine), "measured")
    errors = [pool[f"engine_{name}_error"] for name in ("step", "prefill", "power")]
    assert errors == [fit.errors[name] for name in ("step", "prefill", "power")]
    code, out = ran(capsys, "evaluate", path, "--json")
    planned = json.loads(path.read_text())["metrics"]
    assert code == OK and json.loads(out)["metrics"] == pytest.approx(planned, rel=1e-9)
    code, out = ran(capsys, "simulate", path, "--requests", 2000, "--json")
    seen = json.loads(out)["pools"][0]["metrics"]["tok_per_j"]
    assert code == OK and seen["simulated"] == pytest.approx(seen["analytic"], rel=0.15)


# Instances that are divided otherwise than by tensors

MOE = fo.EngineSpec("b200", "qwen3-235b-a22b", 8, "fp8", serving="vllm")
SPLITS = {"ep": {"ep": 8}, "dp": {"tp": 1, "dp": 8, "ep": 8}, "pp": {"tp": 4, "pp": 2}}
WRITTEN = {  # as rows have it: our own names, InferenceX's, and a column of all GPUs
    "ep": {"tp": 8, "ep": 8},
    "dp": {"tp": 8, "dp_attention": "true", "ep": 8},
    "pp": {"num_gpus": 8, "pp_size": 2},
}


def rows_of(way: str) -> list[dict]:
    """Benchmarks of an engine that is 0.8 of the catalog's GPU time."""
    spec = replace(MOE, **SPLITS[way])
    mine = replace(spec, laws=OwnLaws(factors=make_step_factors(gpu=0.8, watts=1.1)))
    rows = []
    for n, isl in ((8, 500), (32, 500), (128, 2000), (512, 2000)):
        seen = shown(mine, n, isl)
        load = {"isl": isl, "osl": 200, "max_concurrency": n, "num_prompts": 10 * n}
        found = {"mean_ttft_ms": 1e3 * seen.ttft_s, "mean_tpot_ms": 1e3 * seen.tpot_s}
        found |= {"output_throughput": seen.output_tok_per_s, "power_w": seen.power_w}
        rows.append({"gpu": "b200", "model": MOE.llm, "precision": "fp8", **WRITTEN[way], **load, **found})
    return rows


def table_of(path: Path, rows: list[dict]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(columns), *(",".join(str(row.get(name, "")) for name in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("way", SPLITS)
def test_rows_of_divided_instances_calibrate_engines_that_are_divided_alike(way, tmp_path, capsys):
    path, mine = table_of(tmp_path / "rows.csv", rows_of(way)), tmp_path / "mine.json"
    assert main(["calibrate", str(path), "--json", "--quiet", "--out", str(mine)]) == OK
    capsys.readouterr()
    document = json.loads(mine.read_text())
    split = replace(MOE, **SPLITS[way]).split
    assert {name: document[name] for name in ("tp", "ep", "dp", "pp")} == vars(split)
    fit = document["fit"]["step_factors"]
    assert fit["n_points"] == 16 and fit["estimates"]["gpu"] == pytest.approx(0.8, rel=0.03)
    assert fit["estimates"]["watts"] == pytest.approx(1.1, rel=0.03)
    assert max(fit["left_out_mape"].values()) < 0.02 < max(fit["catalog_mape"].values())
    spec = load_engine(mine)
    assert spec.split == split and fo.build(spec).gpus_per_instance == split.n_gpus == 8
    assert float(spec.laws.factors.gpu) == pytest.approx(0.8, rel=0.03)


def test_one_engine_is_chosen_among_instances_that_are_divided_otherwise(tmp_path, capsys):
    rows = rows_of("ep") + [{**row, "tp": 4, "pp": 2, "ep": 1} for row in rows_of("ep")]
    path = table_of(tmp_path / "rows.csv", rows)
    assert main(["calibrate", str(path), "--quiet"]) != OK
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1 and "holds 2 groups" in refused and "--ep" in refused and "--pp" in refused
    assert main(["calibrate", str(path), "--ep", "8", "--json", "--quiet"]) == OK
    chosen = json.loads(capsys.readouterr().out)
    assert (chosen["tp"], chosen["ep"], chosen["pp"]) == (8, 8, 1)
    assert main(["calibrate", str(path), "--pp", "3", "--quiet"]) != OK
    assert "--pp 3: no such rows" in capsys.readouterr().err


def test_what_the_file_does_not_say_of_its_instances_the_options_do(tmp_path, capsys):
    rows = [{name: value for name, value in row.items() if name != "ep"} for row in rows_of("ep")]
    path = table_of(tmp_path / "rows.csv", rows)
    assert main(["calibrate", str(path), "--ep", "8", "--json", "--quiet"]) == OK
    document = json.loads(capsys.readouterr().out)
    assert document["ep"] == 8 and document["step_factors"]["gpu"] == pytest.approx(0.8, rel=0.03)
